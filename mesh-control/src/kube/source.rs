//! The task that feeds the index with what the API server says.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_api::manifest::{Kind, ObjectKey};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use super::{
    inputs::{Event, Inputs},
    metrics::KubeMetrics,
    reporter::Reports,
};
use crate::{hub::Hub, telemetry::Metrics};

/// Events that wait for the index. Reading stops while it is full.
pub(super) const EVENTS_QUEUED_MAX: usize = 1_024;
/// Most events of one batch.
const BATCH_MAX: usize = 4_096;
/// How long a batch gathers, so that a burst wakes every stream once and not once per object.
const GATHER: Duration = Duration::from_millis(20);

/// What the API server said, and where it goes.
pub(super) struct Source {
    pub inputs: Inputs,
    pub hub: Hub,
    pub metrics: Metrics,
    pub kube_metrics: KubeMetrics,
    /// Kinds that were not listed as a whole yet.
    pub missing: watch::Sender<Vec<Kind>>,
    pub reports: watch::Sender<Reports>,
    /// Problems that were logged.
    pub reported: BTreeMap<ObjectKey, Vec<String>>,
}

impl Source {
    /// Takes events until `stop` turns true.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<(Kind, Event)>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut batch = Vec::with_capacity(EVENTS_QUEUED_MAX);
        loop {
            let received = tokio::select! {
                received = gather(&mut events, &mut batch) => received,
                () = crate::stopped(&mut stop) => return,
            };
            if !received {
                return;
            }
            for (kind, event) in batch.drain(..) {
                self.inputs.on(kind, event);
            }
            self.publish();
        }
    }

    fn publish(&mut self) {
        let changes = self.inputs.take_changes();
        let complete = self.missing.borrow().is_empty();
        if !changes.is_empty() {
            let objects = changes.len();
            let diff = self.hub.apply(changes);
            if complete {
                let (changed, removed) = (diff.changed.len(), diff.removed.len());
                tracing::debug!(objects, changed, removed, "source changed");
            }
            crate::publish_objects(&self.hub, &self.metrics);
        }
        let generation = self.hub.read().store().generation();
        self.inputs.applied(generation);
        self.report();
        let missing = self.inputs.missing();
        if *self.missing.borrow() != missing {
            for kind in super::KINDS {
                let listed = i64::from(!missing.contains(&kind));
                self.kube_metrics
                    .listed
                    .with_label_values(&[kind.name()])
                    .set(listed);
            }
            if missing.is_empty() {
                info!("every kind was listed: the mesh is known");
            }
            self.missing.send_replace(missing);
        }
    }

    /// Logs what was not logged before, and hands on what the user is to be told.
    fn report(&mut self) {
        let problems = self.inputs.problems();
        for (key, lines) in &problems {
            if self.reported.get(*key) != Some(lines) {
                warn!(object = %key, "{}", lines.join("; "));
            }
        }
        self.metrics.source_problems.set(problems.len() as i64);
        self.reported = problems
            .into_iter()
            .map(|(key, lines)| (key.clone(), lines))
            .collect();
        let reports = self.inputs.reports();
        self.reports.send_if_modified(|known| {
            let differs = **known != *reports;
            if differs {
                *known = Arc::new(reports.clone());
            }
            differs
        });
    }
}

/// Waits for events, then for more. Returns false when none can come any more.
async fn gather(
    events: &mut mpsc::Receiver<(Kind, Event)>,
    batch: &mut Vec<(Kind, Event)>,
) -> bool {
    if events.recv_many(batch, BATCH_MAX).await == 0 {
        return false;
    }
    let until = Instant::now() + GATHER;
    while batch.len() < BATCH_MAX {
        let room = BATCH_MAX - batch.len();
        match timeout_at(until, events.recv_many(batch, room)).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    true
}
