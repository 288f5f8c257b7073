//! Where discovery and certificates come from: a control plane elsewhere, or one inside the agent's process. The
//! embedded one is reached over the same protocol on a loopback port, so there is one code path.

use std::{
    fs::{self, File},
    io::Write as _,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use mesh_control::{
    ControlHandle, ControlPlane,
    config::{CaConfig, ControlConfig, MeshConfig, SourceConfig},
};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::AgentError;
use crate::config::AgentConfig;

/// Roots of the embedded control plane's certificate, inside the run directory.
pub(super) const ROOTS_FILE: &str = "standalone-roots.pem";
/// Its certificate authority, so that a restart is not a new mesh.
pub(super) const CA_DIR: &str = "standalone-ca";

/// How to reach the control plane.
#[derive(Debug)]
pub(super) struct Upstream {
    pub address: String,
    pub roots_file: PathBuf,
    pub server_name: Option<String>,
    pub token_file: Option<PathBuf>,
    embedded: Option<(ControlHandle, PrivateFile)>,
}

impl Upstream {
    /// Ends the embedded control plane, if there is one.
    pub(super) async fn stop(self) {
        if let Some((handle, _token)) = self.embedded {
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
    let roots_file = run_dir.join(ROOTS_FILE);
    write_roots(&roots_file, handle.roots_pem())?;
    let token = PrivateFile::new(&handle.node_token(&config.node.name))?;
    Ok(Upstream {
        address: format!("https://{}", handle.address()),
        roots_file,
        server_name: None,
        token_file: Some(token.path()),
        embedded: Some((handle, token)),
    })
}

/// A file without a name, that only this process sees: an agent that takes over has another control plane, hence
/// another token, and must not replace that of the one that runs.
#[derive(Debug)]
struct PrivateFile(File);

impl PrivateFile {
    fn new(text: &str) -> Result<Self, AgentError> {
        let create = || {
            let file = memfd_create("weft-token", MFdFlags::MFD_CLOEXEC)?;
            let mut file = File::from(file);
            file.write_all(text.as_bytes())?;
            Ok(file)
        };
        create().map(Self).map_err(|source| AgentError::System {
            what: "a file in memory for the token",
            source,
        })
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// The authority outlives the agent, so the text is the same when an agent takes over from one that reads it.
fn write_roots(path: &Path, text: &str) -> Result<(), AgentError> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    let mut options = File::options();
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
