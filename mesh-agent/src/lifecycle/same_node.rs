//! Flows that the kernel carries by itself: reported to telemetry, and ended when policy forbids them.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use mesh_ebpf::{EdgeCounters, EdgeKey};

use super::agent::Agent;
use crate::{
    capture::{
        LocalWorkload,
        flows::{EndedFlow, SameNodeEdge, SameNodeFlow},
    },
    discovery::model::{SameNode, Workload},
    policy::{self, Connection},
    telemetry::{CloseReason, ConnectionInfo, Direction, KernelFlow, Party, Security},
};

/// How often ended connections are looked for that the programs have missed. Two looks are needed, and a minute is
/// promised.
const SWEEP_INTERVAL: Duration = Duration::from_secs(15);
/// How often same-node counters are read: well below the usual scrape interval of 15 s and more.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

impl Agent {
    /// Reports what same-node edges did, for ever.
    pub(super) async fn report_same_node(self: Arc<Self>) {
        let mut before: HashMap<EdgeKey, EdgeCounters> = HashMap::new();
        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.is_active() {
                continue;
            }
            let mut now = HashMap::new();
            for edge in self.capture.same_node_edges() {
                let earlier = before.get(&edge.key).copied().unwrap_or_default();
                if earlier != edge.counters {
                    self.report_edge(&edge, &earlier);
                }
                now.insert(edge.key, edge.counters);
            }
            before = now;
        }
    }

    /// Forgets connections that ended while nobody looked, for ever: the programs had been detached, or their cgroup was
    /// removed under them.
    pub(super) async fn forget_ended_flows(self: Arc<Self>) {
        let mut before = HashSet::new();
        let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.is_active() {
                continue;
            }
            let agent = self.clone();
            let looked = tokio::task::spawn_blocking(move || agent.capture.ended_flows());
            // Only a panic, or the end of the process, makes it fail.
            let ended = looked.await.unwrap_or_default();
            let twice: Vec<&EndedFlow> = ended.intersection(&before).collect();
            if !twice.is_empty() && self.is_active() {
                tracing::info!(connections = twice.len(), "forgotten: ended unseen");
                self.capture.forget_ended_flows(twice);
            }
            before = ended;
        }
    }

    fn report_edge(&self, edge: &SameNodeEdge, earlier: &EdgeCounters) {
        let counters = &edge.counters;
        let since = |now: u64, before: u64| now.saturating_sub(before);
        let info = self.same_node_info(edge);
        let flow = KernelFlow {
            opened: since(counters.opened, earlier.opened),
            closed: since(counters.closed, earlier.closed),
            bytes_sent: since(counters.sent_bytes, earlier.sent_bytes),
            bytes_received: since(counters.received_bytes, earlier.received_bytes),
            rtt_us: u32::try_from(counters.rtt_us).ok().filter(|rtt| *rtt > 0),
            retransmits: since(counters.retransmits, earlier.retransmits),
        };
        self.telemetry.kernel_flow(&info, flow);
        for _ in 0..since(counters.failed, earlier.failed) {
            self.telemetry.failed(
                &info,
                CloseReason::ConnectFailed,
                &"the application did not accept",
            );
        }
    }

    fn same_node_info(&self, edge: &SameNodeEdge) -> ConnectionInfo {
        let source = edge.source.local.workload.load_full();
        let destination = self.mesh.read().workload_by_address(edge.destination.ip());
        ConnectionInfo {
            direction: Direction::Outbound,
            source: Party {
                identity: source.as_ref().map(|workload| workload.identity.clone()),
                workload: source,
                address: None,
            },
            destination: Party {
                identity: destination
                    .as_ref()
                    .map(|workload| workload.identity.clone()),
                workload: destination,
                address: Some(edge.destination),
            },
            service: None,
            security: Security::Kernel,
        }
    }

    /// Ends same-node flows that the mesh, as it is now, would not allow.
    pub(super) fn end_forbidden_flows(&self) {
        if !self.is_active() {
            return;
        }
        for flow in self.capture.same_node_flows() {
            if self.may_go_on(&flow) {
                continue;
            }
            let (from, to) = (flow.source_address, flow.destination_address);
            match self.capture.end_flow(&flow) {
                Ok(()) => {
                    self.telemetry.policy.revoked.inc();
                    tracing::info!(%from, %to, "same-node flow ended: policy forbids it now");
                }
                Err(error) => {
                    tracing::error!(%from, %to, %error, "cannot end a same-node flow that policy forbids")
                }
            }
        }
    }

    /// An end that has left the mesh, or that discovery does not know (any more), is unknown, and unknown means deny.
    fn may_go_on(&self, flow: &SameNodeFlow) -> bool {
        let state = self.mesh.read();
        let known = |local: &LocalWorkload| {
            state.local_workload(&self.config.node.name, &local.namespace, &local.name)
        };
        let (Some(source), Some(destination)) = (&flow.source, &flow.destination) else {
            return false;
        };
        let (Some(source), Some(destination)) = (known(&source.local), known(&destination.local))
        else {
            return false;
        };
        let connection = Connection {
            peer: Some(source.identity.clone()),
            source: flow.source_address.ip(),
            destination: flow.destination_address,
        };
        let wanted = |workload: &Workload| workload.capture.same_node == SameNode::Kernel;
        wanted(&source)
            && wanted(&destination)
            && policy::authorize(&state, &destination, &connection).is_allowed()
    }
}
