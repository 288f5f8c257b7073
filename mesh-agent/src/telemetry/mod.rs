//! Counting and logging: Prometheus metrics, live edges, and one access-log line per connection.
//!
//! What is counted per edge (source workload, destination workload, service) lives in [`edges`], as plain atomics that
//! the byte path adds to; everything else is in the sections of [`metrics`].

use std::{
    fmt::{self, Display},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_api::{identity::Identity, local::Edge, names::NamespacedName};
use prometheus::{HistogramVec, Registry, TextEncoder};

use crate::{discovery::model::Workload, sys::socket::TcpStatistics};

mod access;
mod edges;
pub mod log_queue;
pub mod logging;
pub mod metrics;
pub mod seldom;

pub use edges::{EDGE_IDLE, EDGES_MAX};
use edges::{EdgeCounters, Edges};
use metrics::{
    AgentMetrics, CaptureMetrics, CertificateMetrics, LimitMetrics, PolicyMetrics, PoolMetrics,
    TunnelMetrics, XdsMetrics,
};
pub use metrics::{Limit, TunnelFailure};

/// Which side of a connection this node saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A local workload dialled.
    Outbound,
    /// A local workload was dialled.
    Inbound,
}

impl Direction {
    /// The label value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
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

impl Security {
    /// The label value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Kernel => "kernel",
            Self::None => "none",
        }
    }
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

impl CloseReason {
    /// Every reason, in the order of declaration.
    pub const ALL: [Self; 14] = [
        Self::Finished,
        Self::ClientReset,
        Self::ServerReset,
        Self::Denied,
        Self::Revoked,
        Self::ConnectFailed,
        Self::TunnelFailed,
        Self::NoCertificate,
        Self::NoEndpoint,
        Self::UnknownWorkload,
        Self::Limit,
        Self::TimedOut,
        Self::Drained,
        Self::BadRequest,
    ];

    /// The label value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ClientReset => "client_reset",
            Self::ServerReset => "server_reset",
            Self::Denied => "denied",
            Self::Revoked => "revoked",
            Self::ConnectFailed => "connect_failed",
            Self::TunnelFailed => "tunnel_failed",
            Self::NoCertificate => "no_certificate",
            Self::NoEndpoint => "no_endpoint",
            Self::UnknownWorkload => "unknown_workload",
            Self::Limit => "limit",
            Self::TimedOut => "timed_out",
            Self::Drained => "drained",
            Self::BadRequest => "bad_request",
        }
    }
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

/// Traffic that the kernel carried by itself since it was last reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelFlow {
    /// Connections opened.
    pub opened: u64,
    /// Connections closed.
    pub closed: u64,
    /// Bytes from the client to the server.
    pub bytes_sent: u64,
    /// Bytes from the server to the client.
    pub bytes_received: u64,
    /// Smoothed round-trip time, microseconds; `None` when not measured.
    pub rtt_us: Option<u32>,
    /// Segments sent again.
    pub retransmits: u64,
}

/// All metrics of the agent. One instance, shared.
pub struct Telemetry {
    registry: Registry,
    edges: Arc<Edges>,
    connect: HistogramVec,
    handshake: HistogramVec,
    /// The agent's own life.
    pub agent: AgentMetrics,
    /// Capture per workload.
    pub capture: CaptureMetrics,
    /// Certificates and requests for them.
    pub certificates: CertificateMetrics,
    /// Limits that were reached.
    pub limits: LimitMetrics,
    /// Denials and audits.
    pub policy: PolicyMetrics,
    /// Tunnel reuse.
    pub pool: PoolMetrics,
    /// Tunnels.
    pub tunnels: TunnelMetrics,
    /// The discovery stream.
    pub xds: XdsMetrics,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry")
            .field("edges", &self.edges.len())
            .finish_non_exhaustive()
    }
}

impl Telemetry {
    /// An empty set of metrics of an agent of `version`.
    #[must_use]
    pub fn new(version: &str) -> Arc<Self> {
        Self::with_edge_limit(version, EDGES_MAX)
    }

    /// Like [`Telemetry::new`], with another limit of edges.
    #[must_use]
    pub fn with_edge_limit(version: &str, edges_max: usize) -> Arc<Self> {
        let registry = Registry::new();
        let edges = Arc::new(Edges::new(edges_max));
        metrics::register(&registry, edges::Collect(edges.clone()));
        metrics::register(&registry, logging::dropped_lines());
        metrics::build_info(&registry, version);
        Arc::new(Self {
            edges,
            connect: metrics::latency(
                &registry,
                "weft_connect_duration_seconds",
                "Time from an application's connect to the upstream being ready",
                &["direction", "security"],
            ),
            handshake: metrics::latency(
                &registry,
                "weft_tls_handshake_duration_seconds",
                "Time of TLS handshakes between nodes",
                &["direction"],
            ),
            agent: AgentMetrics::new(&registry),
            capture: CaptureMetrics::new(&registry),
            certificates: CertificateMetrics::new(&registry),
            limits: LimitMetrics::new(&registry),
            policy: PolicyMetrics::new(&registry),
            pool: PoolMetrics::new(&registry),
            tunnels: TunnelMetrics::new(&registry),
            xds: XdsMetrics::new(&registry),
            registry,
        })
    }

    /// For collectors of other modules.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Forgets the series of a workload (`<namespace>/<name>`) that was un-enrolled.
    pub fn forget_workload(&self, workload: &str) {
        self.capture.forget(workload);
        self.limits.forget(workload);
    }

    /// Counts an opened connection. The returned value counts bytes and must be finished.
    #[must_use]
    pub fn open(self: &Arc<Self>, info: ConnectionInfo) -> OpenConnection {
        let now = Instant::now();
        let edge = self
            .edges
            .with(&info, now, |edge| edge.opened(1, info.destination.address));
        OpenConnection {
            telemetry: self.clone(),
            edge,
            info,
            started: now,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            rtt_us: AtomicU32::new(0),
            retransmits: AtomicU32::new(0),
            finished: AtomicBool::new(false),
        }
    }

    /// Counts a connection that these audit policies would have refused.
    pub fn audited(&self, policies: &[NamespacedName]) {
        for policy in policies {
            self.policy.audit.inc(&policy.to_string());
        }
    }

    /// Counts a connection that failed before it was established, and logs it.
    pub fn failed(&self, info: &ConnectionInfo, reason: CloseReason, error: &dyn Display) {
        self.edges.with(info, Instant::now(), |edge| {
            edge.failed(reason, info.destination.address)
        });
        if reason == CloseReason::Denied {
            self.policy.denied(info.direction);
        }
        access::failed(info, reason, error);
    }

    /// Time from the application's `connect(2)` arriving here to the upstream being ready.
    pub fn observe_connect(&self, direction: Direction, security: Security, took: Duration) {
        self.connect
            .with_label_values(&[direction.name(), security.name()])
            .observe(took.as_secs_f64());
    }

    /// Time of a TLS handshake.
    pub fn observe_handshake(&self, direction: Direction, took: Duration) {
        self.handshake
            .with_label_values(&[direction.name()])
            .observe(took.as_secs_f64());
    }

    /// Adds what the kernel carried on an edge since the last report (same-node flows).
    pub fn kernel_flow(&self, info: &ConnectionInfo, flow: KernelFlow) {
        self.edges.with(info, Instant::now(), |edge| {
            edge.kernel_flow(flow, info.destination.address)
        });
        if flow.closed > 0 {
            access::kernel(info, flow);
        }
    }

    /// The edges for `weft top`, the busiest first.
    #[must_use]
    pub fn edges(&self) -> Vec<Edge> {
        self.edges.rows()
    }

    /// All metrics in the Prometheus text format, version 0.0.4. Edges that have been idle for [`EDGE_IDLE`] go first.
    #[must_use]
    pub fn render(&self) -> String {
        self.render_at(Instant::now())
    }

    fn render_at(&self, now: Instant) -> String {
        self.edges.drop_idle(now);
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_else(|error| {
                tracing::error!(%error, "metrics cannot be written");
                String::new()
            })
    }
}

/// A connection being counted. Adding bytes is a plain atomic addition: it may sit on the byte path.
/// Dropped without [`OpenConnection::finish`] (a panic, a cancelled task) it counts as `Drained`.
#[derive(Debug)]
pub struct OpenConnection {
    telemetry: Arc<Telemetry>,
    edge: Arc<EdgeCounters>,
    info: ConnectionInfo,
    started: Instant,
    sent: AtomicU64,
    received: AtomicU64,
    rtt_us: AtomicU32,
    retransmits: AtomicU32,
    finished: AtomicBool,
}

impl OpenConnection {
    /// Bytes from the client to the server.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
        self.edge.add_sent(bytes);
    }

    /// Bytes from the server to the client.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
        self.edge.add_received(bytes);
    }

    /// What the kernel measured on the leg between the nodes. Retransmissions are totals of this connection: of repeated
    /// reports only the growth counts. Those of a shared tunnel count for one connection each.
    pub fn observe_tcp(&self, statistics: TcpStatistics) {
        let before = self.retransmits.fetch_max(statistics.retransmits, Relaxed);
        self.edge
            .add_retransmits(u64::from(statistics.retransmits.saturating_sub(before)));
        if statistics.rtt_us > 0 {
            self.rtt_us.store(statistics.rtt_us, Relaxed);
            self.edge.observe_rtt(statistics.rtt_us);
        }
    }

    /// Counts the end and writes the access-log line.
    pub fn finish(&self, reason: CloseReason) {
        self.end(reason);
    }

    fn end(&self, reason: CloseReason) {
        if self.finished.swap(true, Relaxed) {
            return;
        }
        let now = Instant::now();
        self.telemetry.edges.touch(&self.edge, now);
        self.edge.closed(reason);
        if reason == CloseReason::Revoked {
            self.telemetry.policy.revoked.inc();
        }
        let (sent, received) = (self.sent.load(Relaxed), self.received.load(Relaxed));
        let took = now.saturating_duration_since(self.started);
        access::closed(
            &self.info,
            reason,
            took,
            (sent, received),
            self.rtt_us.load(Relaxed),
        );
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.end(CloseReason::Drained);
    }
}

#[cfg(test)]
mod tests;
