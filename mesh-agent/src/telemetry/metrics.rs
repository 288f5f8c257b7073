//! The metrics that are not per edge, in sections by who counts them. All handles are cheap atomics.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use mesh_api::identity::Identity;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

use super::Direction;

/// Different values that a label filled from configuration may take, before further ones count as `overflow`.
pub const LABEL_VALUES_MAX: usize = 256;

/// Buckets of latencies, seconds: 50 µs (a connect on one node) to 10 s (every limit of ours is below).
const LATENCY_BUCKETS: [f64; 17] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

const CONSTANT: &str = "names, labels and buckets are constants that the tests exercise";

pub(super) fn register(registry: &Registry, metric: impl Collector + 'static) {
    registry.register(Box::new(metric)).expect(CONSTANT);
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let metric = IntCounter::new(name, help).expect(CONSTANT);
    register(registry, metric.clone());
    metric
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let metric = IntCounterVec::new(Opts::new(name, help), labels).expect(CONSTANT);
    register(registry, metric.clone());
    metric
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let metric = IntGauge::new(name, help).expect(CONSTANT);
    register(registry, metric.clone());
    metric
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let metric = IntGaugeVec::new(Opts::new(name, help), labels).expect(CONSTANT);
    register(registry, metric.clone());
    metric
}

pub(super) fn latency(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> HistogramVec {
    let options = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec());
    let metric = HistogramVec::new(options, labels).expect(CONSTANT);
    register(registry, metric.clone());
    metric
}

pub(super) fn build_info(registry: &Registry, version: &str) {
    gauges(
        registry,
        "weft_build_info",
        "Version of the agent",
        &["version"],
    )
    .with_label_values(&[version])
    .set(1);
}

/// Counters with one label whose values come from configuration, at most [`LABEL_VALUES_MAX`] of them.
#[derive(Debug)]
pub struct BoundedCounters {
    counters: IntCounterVec,
    seen: Mutex<HashSet<String>>,
}

impl BoundedCounters {
    fn new(registry: &Registry, name: &str, help: &str, label: &str) -> Self {
        Self {
            counters: counters(registry, name, help, &[label]),
            seen: Mutex::default(),
        }
    }

    /// Adds one for `value`.
    pub fn inc(&self, value: &str) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen.contains(value)
            || (seen.len() < LABEL_VALUES_MAX && seen.insert(value.to_owned()));
        drop(seen);
        self.counters
            .with_label_values(&[if known { value } else { "overflow" }])
            .inc();
    }
}

/// The agent's own life.
#[derive(Debug)]
pub struct AgentMetrics {
    /// 1 when ready.
    pub ready: IntGauge,
    /// Enrolled workloads.
    pub workloads: IntGauge,
    /// Panics that ended one connection or one task.
    pub panics: IntCounter,
    /// Tasks of busy workloads that let others go first.
    pub waits: IntCounter,
    draining: IntGauge,
    draining_connections: IntGauge,
}

impl AgentMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        gauge(
            registry,
            "weft_agent_start_time_seconds",
            "When the agent started, seconds since 1970",
        )
        .set(i64::try_from(since).unwrap_or(i64::MAX));
        Self {
            ready: gauge(registry, "weft_agent_ready", "1 when the agent is ready"),
            workloads: gauge(registry, "weft_agent_workloads", "Enrolled workloads"),
            panics: counter(
                registry,
                "weft_agent_panics_total",
                "Panics contained to one connection or task",
            ),
            waits: counter(
                registry,
                "weft_agent_turns_waited_total",
                "Tasks of busy workloads that let others go first",
            ),
            draining: gauge(
                registry,
                "weft_draining_agents",
                "Replaced agents of this node that still serve connections",
            ),
            draining_connections: gauge(
                registry,
                "weft_draining_connections",
                "Connections and tunnels that replaced agents of this node still serve",
            ),
        }
    }

    /// What agents that this one has replaced still do.
    pub fn set_draining(&self, agents: usize, connections: u64) {
        self.draining.set(i64::try_from(agents).unwrap_or(i64::MAX));
        self.draining_connections
            .set(i64::try_from(connections).unwrap_or(i64::MAX));
    }
}

/// Capture per workload.
#[derive(Debug)]
pub struct CaptureMetrics {
    state: IntGaugeVec,
    /// Times that kernel state was found missing and put back.
    pub repairs: IntCounter,
}

impl CaptureMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            state: gauges(
                registry,
                "weft_capture_state",
                "1 while a workload's capture is whole",
                &["workload"],
            ),
            repairs: counter(
                registry,
                "weft_capture_repairs_total",
                "Kernel state found missing and put back",
            ),
        }
    }

    /// Says whether the capture of `workload` (`<namespace>/<name>`) is whole.
    pub fn set_state(&self, workload: &str, whole: bool) {
        self.state
            .with_label_values(&[workload])
            .set(i64::from(whole));
    }

    /// Forgets a workload that was un-enrolled.
    pub fn forget(&self, workload: &str) {
        // Only fails when there was no such series.
        let _ = self.state.remove_label_values(&[workload]);
    }
}

/// Certificates and requests for them.
#[derive(Debug)]
pub struct CertificateMetrics {
    expiry: IntGaugeVec,
    /// Requests to the control plane.
    pub requests: IntCounter,
    /// Requests without a usable answer.
    pub failures: IntCounter,
}

impl CertificateMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            expiry: gauges(
                registry,
                "weft_certificate_expiry_seconds",
                "End of a certificate, seconds since 1970",
                &["identity"],
            ),
            requests: counter(
                registry,
                "weft_certificate_requests_total",
                "Certificates asked for",
            ),
            failures: counter(
                registry,
                "weft_certificate_failures_total",
                "Certificates asked for in vain",
            ),
        }
    }

    /// Notes the end of a new certificate, seconds since 1970.
    pub fn renewed(&self, identity: &Identity, not_after: i64) {
        self.expiry
            .with_label_values(&[&identity.to_string()])
            .set(not_after);
    }

    /// Forgets an identity that left the node.
    pub fn forget(&self, identity: &Identity) {
        // Only fails when there was no certificate.
        let _ = self.expiry.remove_label_values(&[&identity.to_string()]);
    }
}

/// Limits whose being reached is counted. The names are label values of `weft_limit_reached_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The system has no descriptors or memory for another accepted socket.
    Accept,
    /// Connections of the node: few or none are left, and the workload holds more than that.
    ConnectionsPerNode,
    /// Descriptors of the node: none is left.
    Descriptors,
    /// Descriptors of the node: few are left, and the workload holds more than that.
    DescriptorShare,
    /// Connections of one workload.
    ConnectionsPerWorkload,
    /// TLS handshakes in flight with one source address.
    HandshakesPerSource,
    /// TLS handshakes in flight for one workload.
    HandshakesPerWorkload,
    /// Tunnels from one source address.
    TunnelsPerSource,
    /// Tunnels to one peer for one workload.
    TunnelsPerKey,
    /// Tunnels to peers for one workload.
    TunnelsPerWorkload,
    /// Accepted sockets that wait for another worker; they stay where they are.
    HandoverQueue,
    /// Bytes that wait because somebody does not read them: the workload's streams have the least window now.
    BufferedBytes,
    /// Source ports towards one destination, which the kernel chooses from `ip_local_port_range`.
    SourcePorts,
    /// Orders that wait for a worker.
    OrderQueue,
    /// Time for a client's TLS handshake.
    HandshakeDeadline,
    /// Time for a client's HTTP/2 preface.
    FirstFrameDeadline,
    /// What a client may do to a tunnel: frames that carry nothing, streams reset at once, long headers and the like.
    TunnelAbuse,
}

impl Limit {
    /// Every limit.
    pub const ALL: [Self; 17] = [
        Self::Accept,
        Self::ConnectionsPerNode,
        Self::Descriptors,
        Self::DescriptorShare,
        Self::ConnectionsPerWorkload,
        Self::HandshakesPerSource,
        Self::HandshakesPerWorkload,
        Self::TunnelsPerSource,
        Self::TunnelsPerKey,
        Self::TunnelsPerWorkload,
        Self::HandoverQueue,
        Self::BufferedBytes,
        Self::SourcePorts,
        Self::OrderQueue,
        Self::HandshakeDeadline,
        Self::FirstFrameDeadline,
        Self::TunnelAbuse,
    ];

    /// The label value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::ConnectionsPerNode => "connections_per_node",
            Self::Descriptors => "descriptors",
            Self::DescriptorShare => "descriptor_share",
            Self::ConnectionsPerWorkload => "connections_per_workload",
            Self::HandshakesPerSource => "handshakes_per_source",
            Self::HandshakesPerWorkload => "handshakes_per_workload",
            Self::TunnelsPerSource => "tunnels_per_source",
            Self::TunnelsPerKey => "tunnels_per_key",
            Self::TunnelsPerWorkload => "tunnels_per_workload",
            Self::HandoverQueue => "handover_queue",
            Self::BufferedBytes => "buffered_bytes",
            Self::SourcePorts => "source_ports",
            Self::OrderQueue => "order_queue",
            Self::HandshakeDeadline => "handshake_deadline",
            Self::FirstFrameDeadline => "first_frame_deadline",
            Self::TunnelAbuse => "tunnel_abuse",
        }
    }
}

/// Limits that were reached, and how far the node is from them.
#[derive(Debug)]
pub struct LimitMetrics {
    reached: IntCounterVec,
    refused: IntCounterVec,
    /// Descriptors that workloads may hold.
    pub descriptors: IntGauge,
    /// Descriptors that they hold.
    pub descriptors_used: IntGauge,
    /// Bytes that may wait for somebody to read them.
    pub buffered_bytes: IntGauge,
}

impl LimitMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            reached: counters(
                registry,
                "weft_limit_reached_total",
                "A limit of the agent was reached",
                &["limit"],
            ),
            refused: counters(
                registry,
                "weft_workload_refused_total",
                "Connections and tunnels of a workload that a limit refused",
                &["workload"],
            ),
            descriptors: gauge(
                registry,
                "weft_descriptors",
                "Descriptors that workloads may hold",
            ),
            descriptors_used: gauge(
                registry,
                "weft_descriptors_used",
                "Descriptors that workloads hold",
            ),
            buffered_bytes: gauge(
                registry,
                "weft_buffered_bytes",
                "Bytes that may wait in the proxy for somebody to read them",
            ),
        }
    }

    /// Counts that `limit` was reached.
    pub fn reached(&self, limit: Limit) {
        self.reached.with_label_values(&[limit.name()]).inc();
    }

    /// Counts that a limit refused something of a workload.
    pub fn refused(&self, namespace: &str, name: &str) {
        let workload = format!("{namespace}/{name}");
        self.refused.with_label_values(&[&workload]).inc();
    }

    /// Counts a failed dial if there was no source port left. connect(2): EADDRNOTAVAIL.
    pub fn dial_failed(&self, error: &std::io::Error) {
        if error.kind() == std::io::ErrorKind::AddrNotAvailable {
            self.reached(Limit::SourcePorts);
        }
    }

    /// Forgets a workload (`<namespace>/<name>`) that was un-enrolled.
    pub fn forget(&self, workload: &str) {
        // Only fails when nothing of it was refused.
        let _ = self.refused.remove_label_values(&[workload]);
    }
}

/// Denials and audits.
#[derive(Debug)]
pub struct PolicyMetrics {
    denied: IntCounterVec,
    /// Connections that an audit policy would have denied, by policy (`<namespace>/<name>`).
    pub audit: BoundedCounters,
    /// Connections closed because a policy changed, those in the kernel too. Ending one with the reason `Revoked`
    /// counts it.
    pub revoked: IntCounter,
}

impl PolicyMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            denied: counters(
                registry,
                "weft_policy_denied_total",
                "Connections refused by policy",
                &["direction"],
            ),
            audit: BoundedCounters::new(
                registry,
                "weft_policy_audit_total",
                "Connections that an audit policy would have refused",
                "policy",
            ),
            revoked: counter(
                registry,
                "weft_policy_revoked_total",
                "Connections closed by a policy change",
            ),
        }
    }

    /// Counts a refused connection. [`super::Telemetry::failed`] does it for the reason `Denied`.
    pub fn denied(&self, direction: Direction) {
        self.denied.with_label_values(&[direction.name()]).inc();
    }
}

/// Tunnel reuse.
#[derive(Debug)]
pub struct PoolMetrics {
    /// Connections that found a tunnel.
    pub hits: IntCounter,
    /// Connections that needed a new tunnel.
    pub misses: IntCounter,
    /// Connections that wait for a tunnel now.
    pub waiting: IntGauge,
    /// Tunnels thrown out of the pool.
    pub evicted: IntCounter,
}

impl PoolMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            hits: counter(
                registry,
                "weft_pool_hits_total",
                "Connections that found a tunnel",
            ),
            misses: counter(
                registry,
                "weft_pool_misses_total",
                "Connections that needed a new tunnel",
            ),
            waiting: gauge(
                registry,
                "weft_pool_waiting",
                "Connections that wait for a tunnel",
            ),
            evicted: counter(
                registry,
                "weft_pool_evicted_total",
                "Tunnels thrown out of the pool",
            ),
        }
    }
}

/// Why a tunnel did not come about. The names are label values of `weft_tunnel_failed_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelFailure {
    /// TCP to the peer failed.
    Dial,
    /// The peer was silent for too long.
    TimedOut,
    /// TLS failed.
    Tls,
    /// HTTP/2 failed.
    Http2,
    /// No certificate of our own.
    NoCertificate,
    /// The client's certificate names no workload.
    NoIdentity,
    /// The agent does not know its own workload yet.
    UnknownWorkload,
    /// A limit of this agent.
    Limit,
}

impl TunnelFailure {
    /// Every failure.
    pub const ALL: [Self; 8] = [
        Self::Dial,
        Self::TimedOut,
        Self::Tls,
        Self::Http2,
        Self::NoCertificate,
        Self::NoIdentity,
        Self::UnknownWorkload,
        Self::Limit,
    ];

    /// The label value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dial => "dial",
            Self::TimedOut => "timed_out",
            Self::Tls => "tls",
            Self::Http2 => "http2",
            Self::NoCertificate => "no_certificate",
            Self::NoIdentity => "no_identity",
            Self::UnknownWorkload => "unknown_workload",
            Self::Limit => "limit",
        }
    }
}

/// Tunnels.
#[derive(Debug)]
pub struct TunnelMetrics {
    open: IntGaugeVec,
    opened: IntCounterVec,
    failed: IntCounterVec,
}

impl TunnelMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let labels = &["direction"];
        Self {
            open: gauges(registry, "weft_tunnels_open", "Tunnels open now", labels),
            opened: counters(
                registry,
                "weft_tunnel_opened_total",
                "Tunnels opened",
                labels,
            ),
            failed: counters(
                registry,
                "weft_tunnel_failed_total",
                "Tunnels that could not be opened",
                &["direction", "reason"],
            ),
        }
    }

    /// Counts a tunnel as opened and open, until the guard is dropped.
    #[must_use]
    pub fn open(&self, direction: Direction) -> TunnelGuard {
        self.opened.with_label_values(&[direction.name()]).inc();
        let open = self.open.with_label_values(&[direction.name()]);
        open.inc();
        TunnelGuard(open)
    }

    /// Counts a tunnel that could not be opened.
    pub fn failed(&self, direction: Direction, failure: TunnelFailure) {
        self.failed
            .with_label_values(&[direction.name(), failure.name()])
            .inc();
    }
}

/// Counts one open tunnel.
#[derive(Debug)]
pub struct TunnelGuard(IntGauge);

impl Drop for TunnelGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The discovery stream.
#[derive(Debug)]
pub struct XdsMetrics {
    /// 1 while the stream is up.
    pub connected: IntGauge,
    /// Responses received.
    pub messages: IntCounter,
    /// Responses rejected in part.
    pub nacks: IntCounter,
    /// Snapshots that could not be written.
    pub snapshot_failures: IntCounter,
    /// 1 while the snapshot on disk holds all that is known.
    pub snapshot_current: IntGauge,
    resources: IntGaugeVec,
}

impl XdsMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            connected: gauge(
                registry,
                "weft_xds_connected",
                "1 while the discovery stream is up",
            ),
            messages: counter(
                registry,
                "weft_xds_messages_total",
                "Discovery responses received",
            ),
            nacks: counter(
                registry,
                "weft_xds_nacks_total",
                "Discovery responses rejected in part",
            ),
            snapshot_failures: counter(
                registry,
                "weft_xds_snapshot_failures_total",
                "Snapshots that could not be written",
            ),
            snapshot_current: gauge(
                registry,
                "weft_xds_snapshot_current",
                "1 while the snapshot on disk holds all that is known",
            ),
            resources: gauges(
                registry,
                "weft_xds_resources",
                "Resources held, by type",
                &["type"],
            ),
        }
    }

    /// Notes how many resources of a type (`workload`, `service`, `policy`) are held.
    pub fn set_resources(&self, kind: &'static str, held: usize) {
        self.resources
            .with_label_values(&[kind])
            .set(i64::try_from(held).unwrap_or(i64::MAX));
    }
}
