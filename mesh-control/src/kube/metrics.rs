//! What only a control plane in Kubernetes measures.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

/// Every metric. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct KubeMetrics {
    /// Requests of the source that failed, by kind.
    pub errors: IntCounterVec,
    /// Lists after the first one, by kind.
    pub relists: IntCounterVec,
    /// Whether a kind was listed as a whole (1), by kind.
    pub listed: IntGaugeVec,
    /// Reviews of agents' tokens, by result.
    pub token_reviews: IntCounterVec,
    /// Whether this replica writes (1).
    pub leader: IntGauge,
    /// Writes of status and events, by result.
    pub status_writes: IntCounterVec,
    /// Statuses that wait for the rate limit.
    pub status_waiting: IntGauge,
}

impl KubeMetrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// When `registry` already holds one of that name.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(format!("weft_control_{name}"), help);
        let metrics = Self {
            errors: IntCounterVec::new(
                opts(
                    "source_errors_total",
                    "Lists and watches of the API server that failed.",
                ),
                &["kind"],
            )?,
            relists: IntCounterVec::new(
                opts("source_relists_total", "Lists after the first one."),
                &["kind"],
            )?,
            listed: IntGaugeVec::new(
                opts("source_listed", "Whether a kind was listed as a whole."),
                &["kind"],
            )?,
            token_reviews: IntCounterVec::new(
                opts("token_reviews_total", "Reviews of agents' tokens."),
                &["result"],
            )?,
            leader: IntGauge::with_opts(opts(
                "leader",
                "Whether this replica writes status, events and the trust bundle.",
            ))?,
            status_writes: IntCounterVec::new(
                opts("status_writes_total", "Writes of status and events."),
                &["result"],
            )?,
            status_waiting: IntGauge::with_opts(opts(
                "status_waiting",
                "Statuses that wait for the rate limit.",
            ))?,
        };
        let all: [Box<dyn prometheus::core::Collector>; 7] = [
            Box::new(metrics.errors.clone()),
            Box::new(metrics.relists.clone()),
            Box::new(metrics.listed.clone()),
            Box::new(metrics.token_reviews.clone()),
            Box::new(metrics.leader.clone()),
            Box::new(metrics.status_writes.clone()),
            Box::new(metrics.status_waiting.clone()),
        ];
        for metric in all {
            registry.register(metric)?;
        }
        Ok(metrics)
    }
}
