//! Configuration, in sections. It is validated as a whole before anything starts.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use mesh_api::identity::Identity;

/// Longest lifetime of a workload certificate unless configured otherwise. A day bounds what a stolen key is worth,
/// and leaves half a day to repair a control plane before renewals at half-life run out.
pub const DEFAULT_LEAF_MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Shortest lifetime that may be configured as the maximum: below it, clock differences between nodes matter.
pub const LEAF_MAX_LIFETIME_MIN: Duration = Duration::from_secs(10);
/// Most names of the serving certificate.
pub const TLS_NAMES_MAX: usize = 64;

/// Everything that [`crate::ControlPlane::start`] needs.
#[derive(Debug, Clone, Default)]
pub struct ControlConfig {
    /// Where the objects come from.
    pub source: SourceConfig,
    /// Where agents connect to.
    pub server: ServerConfig,
    /// The certificate authority.
    pub ca: CaConfig,
    /// Which nodes may connect.
    pub nodes: NodesConfig,
    /// Names of the mesh.
    pub mesh: MeshConfig,
}

/// Where the objects come from.
#[derive(Debug, Clone, Default)]
pub struct SourceConfig {
    /// Folder of `*.yaml`, `*.yml` and `*.json` manifests; watched.
    pub folder: PathBuf,
    /// Folder in which the last good objects are kept over restarts; made when it is first needed. `None`: what is bad at
    /// a restart is gone, except that bad policies deny.
    pub last_good: Option<PathBuf>,
}

/// Where agents connect to.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address of the TLS listener (discovery and certificates); port 0 picks a free one.
    pub listen: SocketAddr,
    /// DNS names and IP addresses that agents dial, in addition to `localhost`, `127.0.0.1`, `::1` and the
    /// listening address.
    pub tls_names: Vec<String>,
    /// Address of the plain HTTP listener for `/metrics` and `/healthz`.
    pub metrics: Option<SocketAddr>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 0).into(),
            tls_names: Vec::new(),
            metrics: None,
        }
    }
}

/// The certificate authority.
#[derive(Debug, Clone)]
pub struct CaConfig {
    /// Folder with `ca-cert.pem` and `ca-key.pem`, made at the first start. `None`: a key in memory only, so that
    /// every start is a new mesh.
    pub folder: Option<PathBuf>,
    /// Longest lifetime of a workload certificate.
    pub leaf_max_lifetime: Duration,
}

impl Default for CaConfig {
    fn default() -> Self {
        Self {
            folder: None,
            leaf_max_lifetime: DEFAULT_LEAF_MAX_LIFETIME,
        }
    }
}

/// Which nodes may connect.
#[derive(Debug, Clone, Default)]
pub struct NodesConfig {
    /// File of node credentials: lines `<token> <node name>`. `None`: only tokens that
    /// [`crate::ControlHandle::node_token`] made.
    pub tokens: Option<PathBuf>,
}

/// Names of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// First part of every identity.
    pub trust_domain: String,
    /// First part of every workload's uid.
    pub cluster_id: String,
    /// DNS suffix of services: `<name>.<namespace>.svc.<cluster domain>`.
    pub cluster_domain: String,
    /// Namespace whose policies apply to the whole mesh.
    pub root_namespace: String,
    /// Network of every workload that names none; empty is the default network.
    pub network: String,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "weft-system".into(),
            network: String::new(),
        }
    }
}

/// A setting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("configuration: {setting}: {message}")]
pub struct ConfigError {
    /// The setting.
    pub setting: &'static str,
    /// What is wrong with it.
    pub message: String,
}

impl ControlConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.source.folder.as_os_str().is_empty() {
            return refuse("source", "names no folder".into());
        }
        self.server.validate()?;
        check_leaf_max_lifetime(self.ca.leaf_max_lifetime)?;
        self.mesh.validate()
    }
}

fn refuse(setting: &'static str, message: String) -> Result<(), ConfigError> {
    Err(ConfigError { setting, message })
}

/// Checks the longest lifetime of a workload certificate.
pub(crate) fn check_leaf_max_lifetime(lifetime: Duration) -> Result<(), ConfigError> {
    if lifetime < LEAF_MAX_LIFETIME_MIN {
        let message = format!("must be at least {} s", LEAF_MAX_LIFETIME_MIN.as_secs());
        return refuse("leaf-max-lifetime", message);
    }
    Ok(())
}

impl ServerConfig {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if self.tls_names.len() > TLS_NAMES_MAX {
            let message = format!("at most {TLS_NAMES_MAX} names are allowed");
            return refuse("tls-name", message);
        }
        if let Some(name) = self.tls_names.iter().find(|name| name.is_empty()) {
            return refuse("tls-name", format!("{name:?} is not a name"));
        }
        Ok(())
    }
}

impl MeshConfig {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if let Err(error) = Identity::new(&self.trust_domain, "checked", "checked") {
            return refuse("trust-domain", error.to_string());
        }
        for (setting, value) in [
            ("cluster-id", &self.cluster_id),
            ("cluster-domain", &self.cluster_domain),
            ("root-namespace", &self.root_namespace),
        ] {
            if value.is_empty() || value.contains(['/', ' ']) {
                return refuse(setting, format!("{value:?} is not a name"));
            }
        }
        if self.network.contains('/') {
            return refuse("network", "must not contain `/`".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> ControlConfig {
        ControlConfig {
            source: SourceConfig {
                folder: "manifests".into(),
                last_good: None,
            },
            ..ControlConfig::default()
        }
    }

    #[test]
    fn the_defaults_and_a_folder_are_enough() {
        assert_eq!(usable().validate(), Ok(()));
    }

    #[test]
    fn names_the_setting_that_cannot_work() {
        type Spoil = fn(&mut ControlConfig);
        let cases: [(&str, Spoil); 6] = [
            ("source", |c| c.source.folder = PathBuf::new()),
            ("tls-name", |c| {
                c.server.tls_names = vec!["a".into(); TLS_NAMES_MAX + 1]
            }),
            ("leaf-max-lifetime", |c| {
                c.ca.leaf_max_lifetime = Duration::from_secs(9)
            }),
            ("trust-domain", |c| c.mesh.trust_domain = "a b".into()),
            ("cluster-id", |c| c.mesh.cluster_id = String::new()),
            ("network", |c| c.mesh.network = "a/b".into()),
        ];
        for (setting, spoil) in cases {
            let mut config = usable();
            spoil(&mut config);
            assert_eq!(config.validate().expect_err(setting).setting, setting);
        }
    }
}
