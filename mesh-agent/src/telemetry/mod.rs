//! Counting and logging: Prometheus metrics, live edges, and one access-log line per connection.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use mesh_api::identity::Identity;

use crate::discovery::model::Workload;

/// Which side of a connection this node saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A local workload dialled.
    Outbound,
    /// A local workload was dialled.
    Inbound,
}

/// How the bytes travelled between workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// HBONE.
    MutualTls,
    /// Application to application in the kernel of one node, identity attested by the namespace.
    Kernel,
    /// Plaintext.
    None,
}

/// Why a connection ended. The names are label values of `weft_connections_closed_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// Both directions ended with FIN.
    Finished,
    /// The client reset it.
    ClientReset,
    /// The server (or the tunnel's peer) reset it.
    ServerReset,
    /// Refused by authorization, here or at the peer.
    Denied,
    /// A policy change closed it.
    Revoked,
    /// The destination could not be reached.
    ConnectFailed,
    /// TLS or HTTP/2 with the peer failed.
    TunnelFailed,
    /// No certificate for the workload.
    NoCertificate,
    /// The service has no usable endpoint.
    NoEndpoint,
    /// The agent does not know the workload yet.
    UnknownWorkload,
    /// A limit of the agent was reached.
    Limit,
    /// A half-open or idle connection ran out of time.
    TimedOut,
    /// The agent drains.
    Drained,
    /// The request was malformed or asked for something that is never served.
    BadRequest,
}

/// One end of a connection, for labels and logs.
#[derive(Debug, Clone, Default)]
pub struct Party {
    /// The workload, where known.
    pub workload: Option<Arc<Workload>>,
    /// Verified identity (inbound peer) or the identity that was asked for (outbound).
    pub identity: Option<Identity>,
    /// TCP address.
    pub address: Option<SocketAddr>,
}

/// What is known of a connection when it is opened.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Which side this node is.
    pub direction: Direction,
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
    /// `<namespace>/<hostname>` when a service was addressed.
    pub service: Option<Arc<str>>,
    /// How the bytes travel.
    pub security: Security,
}

/// All metrics of the agent. One instance, shared.
#[derive(Debug)]
pub struct Telemetry {}

impl Telemetry {
    /// Counts an opened connection. The returned value counts bytes and must be finished.
    #[must_use]
    pub fn open(self: &Arc<Self>, _info: ConnectionInfo) -> OpenConnection {
        todo!()
    }

    /// Counts a connection that failed before it was established, and logs it.
    pub fn failed(&self, _info: &ConnectionInfo, _reason: CloseReason, _error: &dyn std::fmt::Display) {
        todo!()
    }

    /// Time from the application's `connect(2)` arriving here to the upstream being ready.
    pub fn observe_connect(&self, _direction: Direction, _security: Security, _took: Duration) {
        todo!()
    }

    /// Time of a TLS handshake.
    pub fn observe_handshake(&self, _direction: Direction, _took: Duration) {
        todo!()
    }
}

/// A connection being counted. Adding bytes is a plain atomic addition: it may sit on the byte path.
/// Dropped without [`OpenConnection::finish`] (a panic, a cancelled task) it counts as `Drained`.
#[derive(Debug)]
pub struct OpenConnection {}

impl OpenConnection {
    /// Bytes from the client to the server.
    pub fn add_sent(&self, _bytes: u64) {
        todo!()
    }

    /// Bytes from the server to the client.
    pub fn add_received(&self, _bytes: u64) {
        todo!()
    }

    /// What the kernel measured on one leg.
    pub fn observe_tcp(&self, _statistics: crate::sys::socket::TcpStatistics) {
        todo!()
    }

    /// Counts the end and writes the access-log line.
    pub fn finish(self, _reason: CloseReason) {
        todo!()
    }
}
