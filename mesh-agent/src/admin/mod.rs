//! Answers questions about this node: metrics and readiness for everybody, state and log level on loopback, and the
//! local socket of the command line. Runs on the admin runtime and never delays a byte of a connection.
//!
//! This module knows no other part of the agent: what it shows comes through [`AdminState`] and
//! [`local::LocalHandler`].

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

pub mod http;
pub mod local;

pub use http::{AdminServers, BindError};
pub use local::{LocalHandler, LocalServer, LocalSocketError};

/// Where the HTTP servers listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdminAddresses {
    /// `/metrics`, in the node's namespace.
    pub metrics: SocketAddr,
    /// `/healthz/ready`, in the node's namespace.
    pub readiness: SocketAddr,
    /// State and log level; keep it on loopback, whoever reaches it may read everything but keys.
    pub admin: SocketAddr,
}

impl Default for AdminAddresses {
    fn default() -> Self {
        Self {
            metrics: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15020)),
            readiness: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15021)),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)),
        }
    }
}

/// What the HTTP servers show. The methods are called on the admin runtime and must not block for long.
pub trait AdminState: Send + Sync + 'static {
    /// What readiness still waits for; empty when ready.
    fn pending(&self) -> Vec<String>;

    /// All metrics in the Prometheus text format.
    fn metrics(&self) -> String;

    /// The configuration in force, without secrets.
    fn config(&self) -> serde_json::Value;

    /// Everything the agent believes: services, workloads, policies, certificates, verdicts.
    fn dump(&self) -> serde_json::Value;

    /// The log filter in force.
    fn log_filter(&self) -> String;

    /// Replaces the log filter.
    ///
    /// # Errors
    /// A text for the operator, when the filter is malformed; nothing is changed then.
    fn set_log_filter(&self, filter: &str) -> Result<(), String>;
}
