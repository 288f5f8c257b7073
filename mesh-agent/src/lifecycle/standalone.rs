//! Where discovery and certificates come from: a control plane elsewhere, or one inside the agent's process. The
//! embedded one is reached over the same protocol on a loopback port, so there is one code path.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use mesh_control::{
    ControlHandle, ControlPlane,
    config::{CaConfig, ControlConfig, MeshConfig, SourceConfig},
};

use super::AgentError;
use crate::config::AgentConfig;

/// Roots of the embedded control plane's certificate, inside the run directory.
pub(super) const ROOTS_FILE: &str = "standalone-roots.pem";
/// Token of the agent for the embedded control plane.
pub(super) const TOKEN_FILE: &str = "standalone-token";
/// Its certificate authority, so that a restart is not a new mesh.
pub(super) const CA_DIR: &str = "standalone-ca";

/// How to reach the control plane.
#[derive(Debug)]
pub(super) struct Upstream {
    pub address: String,
    pub roots_file: PathBuf,
    pub server_name: Option<String>,
    pub token_file: Option<PathBuf>,
    embedded: Option<ControlHandle>,
}

impl Upstream {
    /// Ends the embedded control plane, if there is one.
    pub(super) async fn stop(self) {
        if let Some(handle) = self.embedded {
            handle.shutdown().await;
        }
    }
}

/// Starts the embedded control plane where the configuration asks for it.
pub(super) async fn upstream(config: &AgentConfig, run_dir: &Path) -> Result<Upstream, AgentError> {
    let control = &config.control_plane;
    let Some(folder) = &control.standalone else {
        return Ok(Upstream {
            address: control.address.clone(),
            roots_file: control.ca_file.clone(),
            server_name: control.server_name.clone(),
            token_file: control.token_file.clone(),
            embedded: None,
        });
    };
    let control_config = ControlConfig {
        source: SourceConfig {
            folder: folder.clone(),
            last_good: Some(run_dir.join(CA_DIR).join("last-good")),
        },
        ca: CaConfig {
            folder: Some(run_dir.join(CA_DIR)),
            ..CaConfig::default()
        },
        mesh: MeshConfig {
            trust_domain: config.node.trust_domain.clone(),
            cluster_id: config.node.cluster.clone(),
            network: config.node.network.clone(),
            ..MeshConfig::default()
        },
        ..ControlConfig::default()
    };
    let handle = ControlPlane::start(control_config, prometheus::Registry::new())
        .await
        .map_err(|error| AgentError::ControlPlane(error.to_string()))?;
    let (roots_file, token_file) = (run_dir.join(ROOTS_FILE), run_dir.join(TOKEN_FILE));
    write_private(&roots_file, handle.roots_pem())?;
    write_private(&token_file, &handle.node_token(&config.node.name))?;
    Ok(Upstream {
        address: format!("https://{}", handle.address()),
        roots_file,
        server_name: None,
        token_file: Some(token_file),
        embedded: Some(handle),
    })
}

fn write_private(path: &Path, text: &str) -> Result<(), AgentError> {
    let mut options = fs::File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(AgentError::file("create", path))?;
    file.write_all(text.as_bytes())
        .map_err(AgentError::file("write", path))
}
