//! The agent's configuration, in sections: read from a YAML file, overridden by flags, validated before anything
//! starts.

use std::{
    collections::HashSet,
    fs,
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_api::{identity::Identity, local::Enrolment};
use serde::{Deserialize, Serialize};

use crate::{
    capture::Keepalive,
    proxy::{
        TunnelCodec,
        limits::{Limits, STREAM_WINDOW_BYTES},
    },
};

/// Largest configuration file read, in bytes: thousands of workloads fit, a wrong file (a log, a disk) does not.
pub const FILE_MAX_BYTES: u64 = 4 << 20;

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AgentConfig {
    /// Who this node is.
    pub node: NodeConfig,
    /// Where kernel objects live.
    pub kernel: KernelPaths,
    /// Where the control plane is.
    pub control_plane: ControlPlaneConfig,
    /// Where the agent answers.
    pub listen: ListenConfig,
    /// The proxy.
    pub proxy: ProxyConfig,
    /// Workloads to enrol at start, beside those that were enrolled over the local socket.
    pub workloads: Vec<Enrolment>,
}

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeConfig {
    /// Node name, as discovery spells it.
    pub name: String,
    /// Network; empty is the default one.
    pub network: String,
    /// Cluster.
    pub cluster: String,
    /// First part of every identity.
    pub trust_domain: String,
    /// Folder of the local socket, the enrolments and the snapshot.
    pub run_dir: PathBuf,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            network: String::new(),
            cluster: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            run_dir: "/run/weft".into(),
        }
    }
}

/// Where kernel objects live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct KernelPaths {
    /// cgroup v2 folder below which connections are captured.
    pub cgroup_root: PathBuf,
    /// A bpffs.
    pub bpffs_root: PathBuf,
    /// Flows within the node that the kernel carries at a time, and connections of the node; what the kernel cannot
    /// record goes by tunnel, and at that limit is refused. The maps of an agent that ran before keep their size.
    pub flows_max: u32,
    /// Version of the layout of kernel objects; no setting, but tests of upgrades have another one.
    #[serde(skip)]
    pub abi: u32,
}

impl Default for KernelPaths {
    fn default() -> Self {
        // Hybrid mounts have v2 at `unified`; everywhere else it is the mount itself.
        let hybrid = Path::new("/sys/fs/cgroup/unified");
        let cgroup_root = if hybrid.is_dir() {
            hybrid
        } else {
            Path::new("/sys/fs/cgroup")
        };
        Self {
            cgroup_root: cgroup_root.into(),
            bpffs_root: "/sys/fs/bpf".into(),
            flows_max: mesh_ebpf::FLOWS_MAX,
            abi: mesh_ebpf::ABI_VERSION,
        }
    }
}

/// Where the control plane is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ControlPlaneConfig {
    /// `https://host:port` of discovery and certificates.
    pub address: String,
    /// PEM file of the roots of its certificate.
    pub ca_file: PathBuf,
    /// Name in its certificate, where it is not the host of `address`.
    pub server_name: Option<String>,
    /// File with this node's token.
    pub token_file: Option<PathBuf>,
    /// Folder of manifests: the control plane runs inside the agent, and the settings above are not needed.
    pub standalone: Option<PathBuf>,
}

/// Where the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ListenConfig {
    /// Prometheus metrics. `[::]` is both families, and IPv4 alone where the node has no IPv6.
    pub metrics: SocketAddr,
    /// Readiness.
    pub readiness: SocketAddr,
    /// Admin; loopback only.
    pub admin: SocketAddr,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            metrics: (Ipv6Addr::UNSPECIFIED, 15020).into(),
            readiness: (Ipv6Addr::UNSPECIFIED, 15021).into(),
            admin: ([127, 0, 0, 1], 15000).into(),
        }
    }
}

/// The proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ProxyConfig {
    /// Workers, each with a runtime of its own; 0 means one per core.
    pub workers: usize,
    /// Seconds that established connections get to end by themselves after SIGTERM.
    pub drain_deadline_seconds: u64,
    /// Seconds that the established connections of the agent before get to end by themselves when this one takes over
    /// from it.
    pub upgrade_drain_seconds: u64,
    /// Lifetime to ask certificates for, in seconds.
    pub certificate_lifetime_seconds: u64,
    /// Which implementation of HTTP/2 writes the tunnels: `native`, our own, or `h2`, the crate. Both speak the same
    /// protocol; peers need not agree.
    pub tunnel_codec: TunnelCodec,
    /// Connections, in and out, of one workload.
    pub max_connections_per_workload: u64,
    /// Bytes that may wait for the slow readers of one workload.
    pub max_buffered_bytes_per_workload: u64,
    /// Bytes that may wait for all slow readers of the node.
    pub max_buffered_bytes: u64,
    /// TCP keepalive of every connection, to applications and between nodes.
    pub keepalive: KeepaliveConfig,
    /// HTTP/2 PING of tunnels.
    pub tunnel_ping: TunnelPingConfig,
}

/// Fewest and most flows; an entry takes some 100 bytes of kernel memory.
const FLOWS_RANGE: std::ops::RangeInclusive<u32> = 64..=1 << 20;

/// TCP keepalive: a peer that is gone while nothing is on its way to it is found within
/// `idleSeconds + probes × intervalSeconds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct KeepaliveConfig {
    /// Silence before the first probe, 1 to 32767 seconds.
    pub idle_seconds: u64,
    /// Seconds between probes, 1 to 32767.
    pub interval_seconds: u64,
    /// Probes without an answer that end the connection, 1 to 127.
    pub probes: u32,
}

impl Default for KeepaliveConfig {
    fn default() -> Self {
        let Keepalive {
            idle,
            interval,
            probes,
        } = Keepalive::default();
        Self {
            idle_seconds: idle.as_secs(),
            interval_seconds: interval.as_secs(),
            probes,
        }
    }
}

impl KeepaliveConfig {
    /// As sockets are given it.
    #[must_use]
    pub fn keepalive(&self) -> Keepalive {
        Keepalive {
            idle: Duration::from_secs(self.idle_seconds),
            interval: Duration::from_secs(self.interval_seconds),
            probes: self.probes,
        }
    }
}

/// PING of tunnels: a peer that is gone is found within `intervalSeconds + timeoutSeconds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TunnelPingConfig {
    /// Seconds from one PING to the next, 1 to 3600.
    pub interval_seconds: u64,
    /// Seconds without an answer that end the tunnel, 1 to 3600.
    pub timeout_seconds: u64,
}

impl Default for TunnelPingConfig {
    fn default() -> Self {
        let time = Limits::default().time;
        Self {
            interval_seconds: time.ping_interval.as_secs(),
            timeout_seconds: time.ping_timeout.as_secs(),
        }
    }
}

/// Largest keepalive times and count that Linux takes (include/net/tcp.h, `MAX_TCP_KEEPIDLE` and its neighbours).
const KEEPALIVE_MAX_SECONDS: u64 = 32_767;
const KEEPALIVE_MAX_PROBES: u32 = 127;
/// Longest times of a tunnel's PING: an hour is next to never.
const TUNNEL_PING_MAX_SECONDS: u64 = 3600;

/// Most workers: more than any machine has cores that this proxy could feed.
const WORKERS_MAX: usize = 256;
/// Longest drain after an upgrade, one week: a process that is replaced must end some day.
pub const UPGRADE_DRAIN_MAX_SECONDS: u64 = 7 * 24 * 60 * 60;
/// Shortest certificate lifetime: below it the clocks of two nodes matter more than the lifetime.
const CERTIFICATE_LIFETIME_MIN_SECONDS: u64 = 10;

impl Default for ProxyConfig {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            workers: 0,
            drain_deadline_seconds: 5,
            // An hour: long downloads and the like end by themselves. The process that waits costs its memory only.
            upgrade_drain_seconds: 60 * 60,
            certificate_lifetime_seconds: 24 * 60 * 60,
            tunnel_codec: TunnelCodec::default(),
            max_connections_per_workload: limits.connections_per_workload,
            max_buffered_bytes_per_workload: limits.memory.per_workload_bytes,
            max_buffered_bytes: limits.memory.per_node_bytes,
            keepalive: KeepaliveConfig::default(),
            tunnel_ping: TunnelPingConfig::default(),
        }
    }
}

impl ProxyConfig {
    fn validate_dead_peers(&self) -> Result<(), ConfigError> {
        let within = |setting, value: u64, most: u64| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(ConfigError::Invalid {
                setting,
                message: format!("{value} is not between 1 and {most}"),
            }),
        };
        let (keepalive, ping) = (&self.keepalive, &self.tunnel_ping);
        let seconds = KEEPALIVE_MAX_SECONDS;
        within(
            "proxy.keepalive.idleSeconds",
            keepalive.idle_seconds,
            seconds,
        )?;
        within(
            "proxy.keepalive.intervalSeconds",
            keepalive.interval_seconds,
            seconds,
        )?;
        let (probes, most) = (keepalive.probes, KEEPALIVE_MAX_PROBES);
        within("proxy.keepalive.probes", probes.into(), most.into())?;
        let seconds = TUNNEL_PING_MAX_SECONDS;
        within(
            "proxy.tunnelPing.intervalSeconds",
            ping.interval_seconds,
            seconds,
        )?;
        within(
            "proxy.tunnelPing.timeoutSeconds",
            ping.timeout_seconds,
            seconds,
        )
    }
}

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too large.
    #[error("configuration file {path} has {bytes} bytes; at most {FILE_MAX_BYTES} are read")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not what it should be; the message has line, column and field.
    #[error("configuration file {path}: {message}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// A setting that cannot work.
    #[error("configuration: {setting}: {message}")]
    Invalid {
        /// The setting, as the file spells it.
        setting: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

impl AgentConfig {
    /// Reads a YAML file.
    ///
    /// # Errors
    /// Names the file, the line and the field.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let bytes = fs::metadata(path).map_err(failed)?.len();
        if bytes > FILE_MAX_BYTES {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
                bytes,
            });
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_norway::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        })
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// The first that cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |setting, message: String| Err(ConfigError::Invalid { setting, message });
        let name = &self.node.name;
        if name.is_empty() {
            return invalid("node.name", "is missing (--node NAME)".into());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if !name.chars().all(plain) || name.starts_with('.') || name.len() > 128 {
            return invalid(
                "node.name",
                format!("{name:?} is not made of letters, digits, dots, dashes and underscores"),
            );
        }
        if let Err(error) = Identity::new(&self.node.trust_domain, "checked", "checked") {
            return invalid("node.trustDomain", error.to_string());
        }
        if self.node.network.contains('/') {
            return invalid("node.network", "must not contain `/`".into());
        }
        if !self.listen.admin.ip().is_loopback() {
            return invalid(
                "listen.admin",
                format!(
                    "{} is not a loopback address; admin is for this machine only",
                    self.listen.admin
                ),
            );
        }
        if !FLOWS_RANGE.contains(&self.kernel.flows_max) {
            let (least, most) = (FLOWS_RANGE.start(), FLOWS_RANGE.end());
            return invalid("kernel.flowsMax", format!("{least} to {most}"));
        }
        if self.proxy.workers > WORKERS_MAX {
            return invalid("proxy.workers", format!("at most {WORKERS_MAX}"));
        }
        if self.proxy.upgrade_drain_seconds > UPGRADE_DRAIN_MAX_SECONDS {
            return invalid(
                "proxy.upgradeDrainSeconds",
                format!("at most {UPGRADE_DRAIN_MAX_SECONDS}"),
            );
        }
        if self.proxy.certificate_lifetime_seconds < CERTIFICATE_LIFETIME_MIN_SECONDS {
            return invalid(
                "proxy.certificateLifetimeSeconds",
                format!("at least {CERTIFICATE_LIFETIME_MIN_SECONDS}"),
            );
        }
        let least = u64::from(STREAM_WINDOW_BYTES);
        for (setting, bytes) in [
            (
                "proxy.maxBufferedBytesPerWorkload",
                self.proxy.max_buffered_bytes_per_workload,
            ),
            ("proxy.maxBufferedBytes", self.proxy.max_buffered_bytes),
        ] {
            if bytes < least {
                return invalid(setting, format!("at least {least}, the window of a stream"));
            }
        }
        if self.proxy.max_connections_per_workload == 0 {
            return invalid("proxy.maxConnectionsPerWorkload", "at least 1".into());
        }
        self.proxy.validate_dead_peers()?;
        self.validate_control_plane()?;
        self.validate_workloads()
    }

    fn validate_control_plane(&self) -> Result<(), ConfigError> {
        let invalid = |setting, message: String| Err(ConfigError::Invalid { setting, message });
        let control = &self.control_plane;
        match (&control.standalone, control.address.is_empty()) {
            (None, true) => invalid(
                "controlPlane.address",
                "is missing (--control-plane https://host:port, or --standalone DIR)".into(),
            ),
            (Some(_), false) => invalid(
                "controlPlane.standalone",
                "cannot be combined with controlPlane.address".into(),
            ),
            (None, false) if !control.address.starts_with("https://") => invalid(
                "controlPlane.address",
                format!("{:?} must begin with https://", control.address),
            ),
            (None, false) if control.ca_file.as_os_str().is_empty() => invalid(
                "controlPlane.caFile",
                "is missing (--control-plane-ca FILE)".into(),
            ),
            _ => Ok(()),
        }
    }

    fn validate_workloads(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::new();
        for workload in &self.workloads {
            validate_enrolment(workload).map_err(|message| ConfigError::Invalid {
                setting: "workloads",
                message,
            })?;
            if !seen.insert((&workload.namespace, &workload.name)) {
                let message = format!("{}/{} is named twice", workload.namespace, workload.name);
                return Err(ConfigError::Invalid {
                    setting: "workloads",
                    message,
                });
            }
        }
        Ok(())
    }
}

/// Checks the names and paths of an enrolment, from a file or from the local socket.
///
/// # Errors
/// Says which field is wrong.
pub fn validate_enrolment(enrolment: &Enrolment) -> Result<(), String> {
    // The names become part of an identity, so the same characters are allowed.
    Identity::new("checked", &enrolment.namespace, &enrolment.name)
        .map_err(|error| error.to_string())?;
    let absolute =
        |field: &str, path: &str| match Path::new(path).is_absolute() && !path.contains('\0') {
            true => Ok(()),
            false => Err(format!(
                "{field} {path:?} of {}/{} is not an absolute path",
                enrolment.namespace, enrolment.name
            )),
        };
    absolute("netns", &enrolment.netns)?;
    enrolment
        .cgroup
        .as_deref()
        .map_or(Ok(()), |cgroup| absolute("cgroup", cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> AgentConfig {
        let mut config = AgentConfig::default();
        config.node.name = "node-a".into();
        config.control_plane.standalone = Some("/etc/weft/manifests".into());
        config
    }

    fn parse(text: &str) -> Result<AgentConfig, ConfigError> {
        let file = tempfile::NamedTempFile::new().expect("a temp file");
        fs::write(file.path(), text).expect("written");
        AgentConfig::read(file.path())
    }

    #[test]
    fn a_node_name_and_a_source_are_enough() {
        usable().validate().expect("usable");
    }

    #[test]
    fn reads_every_section() {
        let text = "node: {name: n1, runDir: /run/w}\ncontrolPlane: {address: 'https://10.0.0.1:15012', caFile: /ca.pem}\n\
                    listen: {metrics: '127.0.0.1:1'}\nworkloads: [{namespace: shop, name: web, netns: /run/netns/web}]\n";
        let config = parse(text).expect("parsed");
        config.validate().expect("valid");
        assert_eq!(config.node.run_dir, Path::new("/run/w"));
        assert_eq!(config.workloads.len(), 1);
    }

    #[test]
    fn a_misspelt_field_is_named_with_its_place() {
        let error = parse("node:\n  nmae: n1\n")
            .expect_err("unknown field")
            .to_string();
        assert!(
            error.contains("nmae") && error.contains("line 2"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_type_is_named_with_its_place() {
        let error = parse("proxy:\n  workers: many\n")
            .expect_err("wrong type")
            .to_string();
        assert!(
            error.contains("workers") && error.contains("line 2"),
            "{error}"
        );
    }

    #[test]
    fn names_the_setting_that_cannot_work() {
        type Spoil = fn(&mut AgentConfig);
        let cases: [(&str, Spoil); 18] = [
            ("node.name", |c| c.node.name.clear()),
            ("node.name", |c| c.node.name = "../n".into()),
            ("node.trustDomain", |c| c.node.trust_domain = "a b".into()),
            ("node.network", |c| c.node.network = "a/b".into()),
            ("listen.admin", |c| {
                c.listen.admin = ([0, 0, 0, 0], 1).into()
            }),
            ("proxy.maxBufferedBytesPerWorkload", |c| {
                c.proxy.max_buffered_bytes_per_workload = 1;
            }),
            ("proxy.maxBufferedBytes", |c| c.proxy.max_buffered_bytes = 1),
            ("proxy.maxConnectionsPerWorkload", |c| {
                c.proxy.max_connections_per_workload = 0;
            }),
            ("kernel.flowsMax", |c| {
                c.kernel.flows_max = FLOWS_RANGE.start() - 1
            }),
            ("kernel.flowsMax", |c| {
                c.kernel.flows_max = FLOWS_RANGE.end() + 1
            }),
            ("proxy.workers", |c| c.proxy.workers = WORKERS_MAX + 1),
            ("proxy.upgradeDrainSeconds", |c| {
                c.proxy.upgrade_drain_seconds = UPGRADE_DRAIN_MAX_SECONDS + 1
            }),
            ("proxy.keepalive.idleSeconds", |c| {
                c.proxy.keepalive.idle_seconds = 0
            }),
            ("proxy.keepalive.probes", |c| c.proxy.keepalive.probes = 128),
            ("proxy.tunnelPing.timeoutSeconds", |c| {
                c.proxy.tunnel_ping.timeout_seconds = 0
            }),
            ("controlPlane.address", |c| {
                c.control_plane.standalone = None
            }),
            ("controlPlane.standalone", |c| {
                c.control_plane.address = "https://x".into()
            }),
            ("workloads", |c| {
                let one = Enrolment {
                    namespace: "a".into(),
                    name: "b".into(),
                    netns: "/n".into(),
                    cgroup: None,
                };
                c.workloads = vec![one.clone(), one];
            }),
        ];
        for (setting, spoil) in cases {
            let mut config = usable();
            spoil(&mut config);
            let error = config.validate().expect_err(setting).to_string();
            assert!(error.contains(setting), "{error}");
        }
    }

    #[test]
    fn enrolments_need_absolute_paths_and_plain_names() {
        let good = Enrolment {
            namespace: "shop".into(),
            name: "web".into(),
            netns: "/n".into(),
            cgroup: Some("/c".into()),
        };
        validate_enrolment(&good).expect("good");
        for bad in [
            Enrolment {
                netns: "run/netns/x".into(),
                ..good.clone()
            },
            Enrolment {
                cgroup: Some("c".into()),
                ..good.clone()
            },
            Enrolment {
                name: String::new(),
                ..good.clone()
            },
            Enrolment {
                namespace: "a/b".into(),
                ..good.clone()
            },
        ] {
            assert!(validate_enrolment(&bad).is_err(), "{bad:?}");
        }
    }
}
