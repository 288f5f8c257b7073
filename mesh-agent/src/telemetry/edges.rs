//! Traffic per edge: who talks to whom, how, and through which service.
//!
//! The number of edges is bounded: beyond the limit connections are counted in one edge of its own kind, `overflow`.
//! Idle edges are dropped when metrics are read, so that churned pods do not fill the memory.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_api::{identity::Identity, local::Edge};
use prometheus::{
    core::{Collector, Desc},
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};

use super::{CloseReason, ConnectionInfo, Direction, KernelFlow, Party, Security};

/// Edges counted apart. Each has at most some ten series unless its connections fail in many ways, so a node stays
/// well below the tens of thousands of series that a Prometheus target may reasonably have.
pub const EDGES_MAX: usize = 2000;
/// An edge without open connections is dropped after this time: three times the five minutes after which Prometheus
/// itself takes a series for stale.
pub const EDGE_IDLE: Duration = Duration::from_secs(15 * 60);

const REASONS: usize = CloseReason::ALL.len();
const UNKNOWN: &str = "unknown";

/// Labels of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    direction: Direction,
    security: Security,
    source: PartyKey,
    destination: PartyKey,
    service: Option<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PartyKey {
    workload: Arc<str>,
    namespace: Arc<str>,
    identity: Option<Identity>,
}

impl PartyKey {
    fn new(party: &Party) -> Self {
        let identity = party.identity.clone();
        match &party.workload {
            // The owner, not the pod: pods come and go.
            Some(workload) => {
                let owner = if workload.workload_name.is_empty() {
                    &workload.name
                } else {
                    &workload.workload_name
                };
                Self {
                    workload: owner.clone(),
                    namespace: workload.namespace.clone(),
                    identity,
                }
            }
            None => {
                let namespace = identity
                    .as_ref()
                    .map_or(UNKNOWN, Identity::namespace)
                    .into();
                Self {
                    workload: UNKNOWN.into(),
                    namespace,
                    identity,
                }
            }
        }
    }

    fn named(name: &str) -> Self {
        Self {
            workload: name.into(),
            namespace: name.into(),
            identity: None,
        }
    }

    fn identity(&self) -> String {
        self.identity
            .as_ref()
            .map_or_else(|| UNKNOWN.to_owned(), ToString::to_string)
    }

    fn title(&self) -> String {
        if &*self.workload == UNKNOWN && self.identity.is_none() {
            return UNKNOWN.to_owned();
        }
        format!("{}/{}", self.namespace, self.workload)
    }
}

impl Key {
    fn new(info: &ConnectionInfo) -> Self {
        Self {
            direction: info.direction,
            security: info.security,
            source: PartyKey::new(&info.source),
            destination: PartyKey::new(&info.destination),
            service: info.service.clone(),
        }
    }

    /// Where connections beyond the limit are counted; at most six different ones.
    fn overflow(info: &ConnectionInfo) -> Self {
        Self {
            direction: info.direction,
            security: info.security,
            source: PartyKey::named("overflow"),
            destination: PartyKey::named("overflow"),
            service: None,
        }
    }

    fn labels(&self) -> Vec<LabelPair> {
        vec![
            label("destination_identity", self.destination.identity()),
            label(
                "destination_namespace",
                self.destination.namespace.to_string(),
            ),
            label(
                "destination_service",
                self.service.as_deref().unwrap_or(UNKNOWN).to_owned(),
            ),
            label(
                "destination_workload",
                self.destination.workload.to_string(),
            ),
            label("direction", self.direction.name().to_owned()),
            label("security", self.security.name().to_owned()),
            label("source_identity", self.source.identity()),
            label("source_namespace", self.source.namespace.to_string()),
            label("source_workload", self.source.workload.to_string()),
        ]
    }
}

fn label(name: &str, value: String) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value);
    pair
}

/// What is counted on one edge.
#[derive(Debug, Default)]
pub(super) struct EdgeCounters {
    opened: AtomicU64,
    open: AtomicU64,
    closed: [AtomicU64; REASONS],
    failed: [AtomicU64; REASONS],
    sent: AtomicU64,
    received: AtomicU64,
    retransmits: AtomicU64,
    /// Microseconds; 0 is not measured.
    rtt_us: AtomicU64,
    /// Milliseconds since the table was made.
    last_used_ms: AtomicU64,
    address: Mutex<Option<SocketAddr>>,
}

impl EdgeCounters {
    pub(super) fn opened(&self, connections: u64, address: Option<SocketAddr>) {
        self.opened.fetch_add(connections, Relaxed);
        self.open.fetch_add(connections, Relaxed);
        self.dialled(address);
    }

    fn dialled(&self, address: Option<SocketAddr>) {
        if address.is_some() {
            *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
        }
    }

    pub(super) fn failed(&self, reason: CloseReason, address: Option<SocketAddr>) {
        self.failed[reason as usize].fetch_add(1, Relaxed);
        self.dialled(address);
    }

    pub(super) fn closed(&self, reason: CloseReason) {
        self.closed[reason as usize].fetch_add(1, Relaxed);
        self.open.fetch_sub(1, Relaxed);
    }

    pub(super) fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_retransmits(&self, segments: u64) {
        if segments > 0 {
            self.retransmits.fetch_add(segments, Relaxed);
        }
    }

    /// Smooths over connections as TCP smooths over segments (RFC 6298 section 2: alpha is 1/8).
    pub(super) fn observe_rtt(&self, rtt_us: u32) {
        let sample = u64::from(rtt_us);
        let before = self.rtt_us.load(Relaxed);
        let smoothed = if before == 0 {
            sample
        } else {
            (before * 7 + sample) / 8
        };
        // A lost update of two connections that report together only loses one sample.
        self.rtt_us.store(smoothed.max(1), Relaxed);
    }

    pub(super) fn kernel_flow(&self, flow: KernelFlow, address: Option<SocketAddr>) {
        self.opened(flow.opened, address);
        self.closed[CloseReason::Finished as usize].fetch_add(flow.closed, Relaxed);
        // The kernel's records of flows that began before this agent may report more ends than beginnings.
        let left = |open: u64| Some(open.saturating_sub(flow.closed));
        let _ = self.open.fetch_update(Relaxed, Relaxed, left);
        self.add_sent(flow.bytes_sent);
        self.add_received(flow.bytes_received);
        self.add_retransmits(flow.retransmits);
        if let Some(rtt_us) = flow.rtt_us {
            self.observe_rtt(rtt_us);
        }
    }

    fn row(&self, key: &Key) -> Edge {
        let total =
            |counters: &[AtomicU64]| counters.iter().map(|counter| counter.load(Relaxed)).sum();
        let destination = match &key.service {
            Some(service) => service.to_string(),
            None => key.destination.title(),
        };
        Edge {
            direction: key.direction.name().to_owned(),
            source: key.source.title(),
            destination,
            destination_address: *self.address.lock().unwrap_or_else(PoisonError::into_inner),
            security: key.security.name().to_owned(),
            open: self.open.load(Relaxed),
            opened: self.opened.load(Relaxed),
            failed: total(&self.failed),
            bytes_sent: self.sent.load(Relaxed),
            bytes_received: self.received.load(Relaxed),
            rtt_us: Some(self.rtt_us.load(Relaxed)).filter(|rtt| *rtt > 0),
        }
    }
}

type Table = HashMap<Arc<Key>, Arc<EdgeCounters>>;

/// All edges.
#[derive(Debug)]
pub(super) struct Edges {
    table: RwLock<Table>,
    limit: usize,
    folded: AtomicU64,
    start: Instant,
}

impl Edges {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            table: RwLock::default(),
            limit,
            folded: AtomicU64::new(0),
            start: Instant::now(),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.read().len()
    }

    /// Counts on the edge of `info`. The count happens under the table's lock, so that an edge is not dropped as idle
    /// between being found and being counted on.
    pub(super) fn with(
        &self,
        info: &ConnectionInfo,
        now: Instant,
        count: impl Fn(&EdgeCounters),
    ) -> Arc<EdgeCounters> {
        let key = Key::new(info);
        let use_edge = |edge: &Arc<EdgeCounters>| {
            self.touch(edge, now);
            count(edge);
            edge.clone()
        };
        if let Some(edge) = self.read().get(&key) {
            return use_edge(edge);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let full = table.len() >= self.limit && !table.contains_key(&key);
        let key = if full {
            self.folded.fetch_add(1, Relaxed);
            Key::overflow(info)
        } else {
            key
        };
        use_edge(table.entry(Arc::new(key)).or_default())
    }

    /// What is there, for whoever takes long: connections that begin and end need the lock.
    fn snapshot(&self) -> Vec<(Arc<Key>, Arc<EdgeCounters>)> {
        let table = self.read();
        let edges = table.iter();
        edges
            .map(|(key, edge)| (key.clone(), edge.clone()))
            .collect()
    }

    /// Notes that `edge` was used at `now`.
    pub(super) fn touch(&self, edge: &EdgeCounters, now: Instant) {
        let since = now.saturating_duration_since(self.start).as_millis();
        edge.last_used_ms
            .fetch_max(u64::try_from(since).unwrap_or(u64::MAX), Relaxed);
    }

    /// Drops edges that nobody has used for [`EDGE_IDLE`] and that have no open connection.
    pub(super) fn drop_idle(&self, now: Instant) {
        let now_ms = u64::try_from(now.saturating_duration_since(self.start).as_millis())
            .unwrap_or(u64::MAX);
        let idle_ms = u64::try_from(EDGE_IDLE.as_millis()).unwrap_or(u64::MAX);
        let is_idle = |edge: &EdgeCounters| {
            let idle = now_ms.saturating_sub(edge.last_used_ms.load(Relaxed));
            edge.open.load(Relaxed) == 0 && idle >= idle_ms
        };
        if !self.read().values().any(|edge| is_idle(edge)) {
            return;
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, edge| !is_idle(edge));
    }

    /// For `weft top`, the busiest first.
    pub(super) fn rows(&self) -> Vec<Edge> {
        let edges = self.snapshot();
        let mut rows: Vec<Edge> = edges.iter().map(|(key, edge)| edge.row(key)).collect();
        rows.sort_by_key(|row| {
            std::cmp::Reverse(row.bytes_sent.saturating_add(row.bytes_received))
        });
        rows
    }
}

/// One family being written.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    metrics: Vec<Metric>,
}

impl Family {
    fn new(name: &'static str, help: &'static str, kind: MetricType) -> Self {
        Self {
            name,
            help,
            kind,
            metrics: Vec::new(),
        }
    }

    fn push(&mut self, labels: Vec<LabelPair>, value: f64) {
        let mut metric = Metric::from_label(labels);
        if self.kind == MetricType::GAUGE {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        } else {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        }
        self.metrics.push(metric);
    }

    /// One series per reason that has happened.
    fn push_reasons(&mut self, labels: &[LabelPair], counters: &[AtomicU64; REASONS]) {
        for (reason, counter) in CloseReason::ALL.iter().zip(counters) {
            let value = counter.load(Relaxed);
            if value > 0 {
                let mut labels = labels.to_vec();
                // Labels are sorted by name: `reason` comes after `direction` and before `security`.
                let place = labels.partition_point(|pair| pair.name() < "reason");
                labels.insert(place, label("reason", reason.name().to_owned()));
                self.push(labels, number(value));
            }
        }
    }

    fn finish(self) -> Option<MetricFamily> {
        // The encoder refuses families without a series.
        if self.metrics.is_empty() {
            return None;
        }
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(self.kind);
        family.set_metric(self.metrics);
        Some(family)
    }
}

/// Prometheus counts in doubles.
#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53, which at 100 Gbit/s are nine days of bytes; then by 1"
)]
fn number(value: u64) -> f64 {
    value as f64
}

/// Reads all edges into the registry's answer.
pub(super) struct Collect(pub(super) Arc<Edges>);

impl Collector for Collect {
    fn desc(&self) -> Vec<&Desc> {
        // Descriptions only guard against two collectors of one name; the labels here change with the traffic.
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        use MetricType::{COUNTER, GAUGE};
        let mut opened = Family::new(
            "weft_connections_opened_total",
            "Connections established",
            COUNTER,
        );
        let mut closed = Family::new(
            "weft_connections_closed_total",
            "Connections ended, by reason",
            COUNTER,
        );
        let mut failed = Family::new(
            "weft_connections_failed_total",
            "Connections never established",
            COUNTER,
        );
        let mut open = Family::new("weft_connections_open", "Connections open now", GAUGE);
        let mut sent = Family::new(
            "weft_sent_bytes_total",
            "Bytes from client to server",
            COUNTER,
        );
        let mut received = Family::new(
            "weft_received_bytes_total",
            "Bytes from server to client",
            COUNTER,
        );
        let mut rtt = Family::new(
            "weft_tcp_rtt_seconds",
            "Smoothed TCP round-trip time",
            GAUGE,
        );
        let mut again = Family::new(
            "weft_tcp_retransmits_total",
            "TCP segments sent again",
            COUNTER,
        );
        let mut folded = Family::new(
            "weft_edges_overflow_total",
            "Connections counted in the overflow edge",
            COUNTER,
        );
        let mut known = Family::new("weft_edges", "Edges counted apart", GAUGE);
        let edges = self.0.snapshot();
        for (key, edge) in &edges {
            let labels = key.labels();
            closed.push_reasons(&labels, &edge.closed);
            failed.push_reasons(&labels, &edge.failed);
            opened.push(labels.clone(), number(edge.opened.load(Relaxed)));
            open.push(labels.clone(), number(edge.open.load(Relaxed)));
            sent.push(labels.clone(), number(edge.sent.load(Relaxed)));
            received.push(labels.clone(), number(edge.received.load(Relaxed)));
            again.push(labels.clone(), number(edge.retransmits.load(Relaxed)));
            let measured = edge.rtt_us.load(Relaxed);
            if measured > 0 {
                rtt.push(labels, number(measured) / 1e6);
            }
        }
        folded.push(Vec::new(), number(self.0.folded.load(Relaxed)));
        known.push(Vec::new(), number(edges.len() as u64));
        [
            opened, closed, failed, open, sent, received, rtt, again, folded, known,
        ]
        .into_iter()
        .filter_map(Family::finish)
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_the_edges_holds_no_lock_that_a_connection_needs() {
        let edges = Edges::new(10);
        let key = PartyKey::named("web");
        let key = Key {
            direction: Direction::Outbound,
            security: Security::None,
            source: key.clone(),
            destination: key,
            service: None,
        };
        edges
            .table
            .write()
            .expect("not poisoned")
            .insert(Arc::new(key), Arc::default());
        let seen = edges.snapshot();
        assert_eq!(seen.len(), 1);
        assert!(
            edges.table.try_write().is_ok(),
            "a new edge can be counted while the old ones are written"
        );
    }
}
