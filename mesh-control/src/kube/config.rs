//! Configuration of a control plane in a cluster, in sections.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use super::agents::ServiceAccount;
use crate::config::{
    ConfigError, DEFAULT_LEAF_MAX_LIFETIME, MeshConfig, ServerConfig, check_leaf_max_lifetime,
};

/// Everything that [`super::start`] needs.
#[derive(Debug, Clone, Default)]
pub struct KubernetesConfig {
    /// The API server.
    pub cluster: ClusterConfig,
    /// Where agents connect to.
    pub server: ServerConfig,
    /// The certificate authority.
    pub ca: SecretCaConfig,
    /// Which agents may connect.
    pub agents: AgentsConfig,
    /// Names of the mesh.
    pub mesh: MeshConfig,
}

/// The API server, and this replica in it.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Kubeconfig; `None`: as the pod that this process runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the Lease, the authority's Secret and the trust bundle.
    pub namespace: String,
    /// Name of the Lease that the replicas elect their writer with.
    pub lease: String,
    /// Name of this replica: its pod's name.
    pub replica: String,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            namespace: "weft-system".into(),
            lease: "weft-control".into(),
            replica: String::new(),
        }
    }
}

/// The certificate authority.
#[derive(Debug, Clone)]
pub struct SecretCaConfig {
    /// Secret with certificate and key.
    pub secret: String,
    /// Whether to make it where it does not exist.
    pub create: bool,
    /// ConfigMap in which the trusted roots are published.
    pub bundle: String,
    /// Longest lifetime of a workload certificate.
    pub leaf_max_lifetime: Duration,
}

impl Default for SecretCaConfig {
    fn default() -> Self {
        Self {
            secret: "weft-ca".into(),
            create: true,
            bundle: "weft-roots".into(),
            leaf_max_lifetime: DEFAULT_LEAF_MAX_LIFETIME,
        }
    }
}

/// Which agents may connect.
#[derive(Debug, Clone)]
pub struct AgentsConfig {
    /// Service accounts of the agents' pods.
    pub accounts: BTreeSet<ServiceAccount>,
    /// Audience of the agents' projected tokens.
    pub audience: String,
}

impl Default for AgentsConfig {
    fn default() -> Self {
        let account = ServiceAccount {
            namespace: "weft-system".into(),
            name: "weft-agent".into(),
        };
        Self {
            accounts: [account].into(),
            audience: "weft".into(),
        }
    }
}

impl KubernetesConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.server.validate()?;
        self.mesh.validate()?;
        check_leaf_max_lifetime(self.ca.leaf_max_lifetime)?;
        for (setting, name) in [
            ("namespace", &self.cluster.namespace),
            ("lease", &self.cluster.lease),
            ("replica", &self.cluster.replica),
            ("ca-secret", &self.ca.secret),
            ("ca-bundle", &self.ca.bundle),
            ("token-audience", &self.agents.audience),
        ] {
            if name.is_empty() || name.contains(['/', ' ']) {
                return Err(ConfigError {
                    setting,
                    message: format!("{name:?} is not a name"),
                });
            }
        }
        if self.agents.accounts.is_empty() {
            return Err(ConfigError {
                setting: "agent-account",
                message: "without one no agent may connect".into(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> KubernetesConfig {
        let mut config = KubernetesConfig::default();
        config.cluster.replica = "weft-control-1".into();
        config
    }

    #[test]
    fn the_defaults_and_a_name_are_enough() {
        assert_eq!(usable().validate(), Ok(()));
    }

    #[test]
    fn names_the_setting_that_cannot_work() {
        type Spoil = fn(&mut KubernetesConfig);
        let cases: [(&str, Spoil); 6] = [
            ("replica", |c| c.cluster.replica = String::new()),
            ("namespace", |c| c.cluster.namespace = "a/b".into()),
            ("ca-secret", |c| c.ca.secret = "a b".into()),
            ("agent-account", |c| c.agents.accounts.clear()),
            ("leaf-max-lifetime", |c| {
                c.ca.leaf_max_lifetime = Duration::ZERO
            }),
            ("trust-domain", |c| c.mesh.trust_domain = "a b".into()),
        ];
        for (setting, spoil) in cases {
            let mut config = usable();
            spoil(&mut config);
            assert_eq!(config.validate().expect_err(setting).setting, setting);
        }
    }
}
