//! The kernel programs' own counters, read when metrics are scraped.

use std::sync::Arc;

use mesh_ebpf::counter;
use prometheus::{
    CounterVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::capture::kernel::Kernel;

/// Label values, by index of the counter.
const OUTCOMES: [(u32, &str); counter::COUNT as usize] = [
    (counter::CAPTURED, "captured"),
    (counter::PASSED, "passed"),
    (counter::SAME_NODE, "same_node"),
    (counter::DENIED, "denied"),
    (counter::NO_ENDPOINT, "no_endpoint"),
    (counter::AGENT_DEAD, "agent_dead"),
    (counter::FAILED_OPEN, "failed_open"),
    (counter::UNKNOWN_ADDRESS, "unknown_address"),
    (counter::FLOWS_FULL, "flows_full"),
    (counter::INBOUND, "inbound"),
];

struct KernelCounters {
    kernel: Arc<Kernel>,
    descriptions: Vec<Desc>,
}

/// Adds `weft_kernel_connections_total{outcome}` to the metrics.
pub(super) fn register(registry: &Registry, kernel: Arc<Kernel>) -> Result<(), prometheus::Error> {
    let descriptions = fresh()?.desc().into_iter().cloned().collect();
    registry.register(Box::new(KernelCounters {
        kernel,
        descriptions,
    }))
}

fn fresh() -> Result<CounterVec, prometheus::Error> {
    let options = Opts::new(
        "weft_kernel_connections_total",
        "Connections by what the kernel programs did with them, since the programs' maps were made",
    );
    CounterVec::new(options, &["outcome"])
}

impl Collector for KernelCounters {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // The same call succeeded at registration.
        let Ok(counters) = fresh() else {
            return Vec::new();
        };
        let values = self.kernel.counters();
        for (index, outcome) in OUTCOMES {
            let value = values.get(index as usize).copied().unwrap_or_default();
            counters.with_label_values(&[outcome]).inc_by(value as f64);
        }
        counters.collect()
    }
}
