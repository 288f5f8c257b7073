//! placeholder
use super::AgentError;
use crate::config::AgentConfig;
use std::path::{Path, PathBuf};
pub(super) const ROOTS_FILE: &str = "standalone-roots.pem";
pub(super) const TOKEN_FILE: &str = "standalone-token";
#[derive(Debug)]
pub(super) struct Upstream {
    pub address: String,
    pub roots_file: PathBuf,
    pub server_name: Option<String>,
    pub token_file: Option<PathBuf>,
}
impl Upstream {
    pub(super) async fn stop(self) {}
}
pub(super) async fn upstream(
    config: &AgentConfig,
    _run_dir: &Path,
) -> Result<Upstream, AgentError> {
    let control = &config.control_plane;
    Ok(Upstream {
        address: control.address.clone(),
        roots_file: control.ca_file.clone(),
        server_name: control.server_name.clone(),
        token_file: control.token_file.clone(),
    })
}
