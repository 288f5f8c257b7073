//! Writes what `status` decides: the conditions of Weft's own objects, and Events about them. Only the leader does.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use mesh_api::manifest::{Condition, Kind, ObjectKey};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tracing::{debug, warn};

use super::{
    api::{Api, ApiError},
    inputs::Report,
    metrics::KubeMetrics,
    status::{COUNTS_INTERVAL, Difference, Pacer, conditions, difference, event},
};
use crate::xds::Progress;

/// How often is looked for something to say: a human does not notice a second.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause of one object after a write that failed.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// Whose Events these are.
const CONTROLLER: &str = "weft.dev/control";
/// What was done when an Event arose.
const ACTION: &str = "Read";
/// Bytes of an Event's note that Kubernetes allows.
const NOTE_MAX_BYTES: usize = 1_024;

/// What is to be told of every object.
pub(super) type Reports = Arc<BTreeMap<ObjectKey, Report>>;

/// Writes while this replica leads.
pub(super) struct Reporter {
    pub api: Api,
    pub reports: watch::Receiver<Reports>,
    pub progress: Arc<Progress>,
    pub leader: watch::Receiver<bool>,
    /// Name of this replica.
    pub replica: String,
    pub metrics: KubeMetrics,
}

/// What was written of an object, until the source shows it.
struct Written {
    conditions: Vec<Condition>,
    /// Generation that it speaks of.
    generation: i64,
    not_before: Instant,
}

/// What the writer remembers.
struct Desk {
    pacer: Pacer,
    written: HashMap<ObjectKey, Written>,
    /// The last error that was logged.
    complaint: String,
}

impl Reporter {
    /// Writes until `stop` turns true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            () = self.follow() => {}
            () = crate::stopped(&mut stop) => {}
        }
    }

    async fn follow(&self) {
        let mut desk = Desk {
            pacer: Pacer::new(Instant::now()),
            written: HashMap::new(),
            complaint: String::new(),
        };
        loop {
            sleep(LOOK_INTERVAL).await;
            if !*self.leader.borrow() {
                desk.written.clear();
                continue;
            }
            let reports = self.reports.borrow().clone();
            desk.written.retain(|key, _| reports.contains_key(key));
            let mut waiting = 0;
            for (key, report) in reports.iter() {
                if !self.tell(key, report, &mut desk).await {
                    waiting += 1;
                }
            }
            self.metrics.status_waiting.set(waiting);
        }
    }

    /// Writes what is to be told of one object, if anything. Returns false if it has to wait for the rate limit.
    async fn tell(&self, key: &ObjectKey, report: &Report, desk: &mut Desk) -> bool {
        let now = Instant::now();
        let spread = report.applied_in.map(|it| self.progress.spread(it));
        let last = desk.written.get(key);
        // What was just written may not have come back through the watch yet.
        let mut report = report.clone();
        if let Some(last) = last.filter(|last| last.generation == report.own.generation) {
            report.own.conditions.clone_from(&last.conditions);
        }
        let should = conditions(&report, spread, &Timestamp::now().to_string());
        let is = &report.own.conditions;
        let resting = last.is_some_and(|last| now < last.not_before);
        match difference(is, &should) {
            Difference::None => return true,
            Difference::Counts if resting => return true,
            Difference::Meaning if resting && is.is_empty() => return true,
            Difference::Counts | Difference::Meaning => {}
        }
        if !desk.pacer.take(now) {
            return false;
        }
        let news = event(is, &should);
        let entry = match self.write(key, &should).await {
            Ok(()) => Written {
                conditions: should,
                generation: report.own.generation,
                not_before: now + COUNTS_INTERVAL,
            },
            Err(error) => {
                self.failed(key, &error, &mut desk.complaint);
                Written {
                    conditions: Vec::new(),
                    generation: report.own.generation,
                    not_before: now + RETRY_AFTER,
                }
            }
        };
        let told = !entry.conditions.is_empty();
        desk.written.insert(key.clone(), entry);
        if let Some((kind, condition)) = news
            && told
            && let Err(error) = self.announce(key, &report, kind, &condition).await
        {
            self.failed(key, &error, &mut desk.complaint);
        }
        true
    }

    async fn write(&self, key: &ObjectKey, conditions: &[Condition]) -> Result<(), ApiError> {
        let path = path_of(key);
        let patch = json!({ "status": { "conditions": conditions } });
        match self.api.patch_status(&path, &key.name, &patch).await {
            Ok(()) => {
                self.metrics.status_writes.with_label_values(&["ok"]).inc();
                debug!(%key, "status written");
                Ok(())
            }
            // It is gone; the watch will say so.
            Err(ApiError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Counts a failure, and says so once per reason.
    fn failed(&self, key: &ObjectKey, error: &ApiError, complaint: &mut String) {
        self.metrics
            .status_writes
            .with_label_values(&["failed"])
            .inc();
        let text = error.to_string();
        if text != *complaint {
            warn!(%key, "cannot write status or event: {text}");
            *complaint = text;
        }
    }

    async fn announce(
        &self,
        key: &ObjectKey,
        report: &Report,
        kind: &str,
        condition: &Condition,
    ) -> Result<(), ApiError> {
        let now = Timestamp::now();
        let message = &condition.message;
        let event = Event {
            metadata: ObjectMeta {
                // As Kubernetes' own: unique, and sorted by time within an object.
                name: Some(format!("{}.{:x}", key.name, now.as_nanosecond())),
                namespace: Some(key.namespace.clone()),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some(key.kind.api_version().into()),
                kind: Some(key.kind.name().into()),
                namespace: Some(key.namespace.clone()),
                name: Some(key.name.clone()),
                uid: Some(report.own.uid.clone()),
                ..ObjectReference::default()
            }),
            type_: Some(kind.into()),
            reason: Some(condition.reason.clone()),
            action: Some(ACTION.into()),
            note: Some(message[..message.floor_char_boundary(NOTE_MAX_BYTES)].into()),
            reporting_controller: Some(CONTROLLER.into()),
            reporting_instance: Some(self.replica.clone()),
            event_time: Some(MicroTime(now)),
            ..Event::default()
        };
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", key.namespace);
        self.api
            .create::<serde::de::IgnoredAny>(&path, &event)
            .await
            .map(drop)
    }
}

/// The collection that holds an object of Weft's own kinds.
fn path_of(key: &ObjectKey) -> String {
    let plural = match key.kind {
        Kind::AuthorizationPolicy => "authorizationpolicies",
        Kind::MeshPolicy => "meshpolicies",
        _ => "externalworkloads",
    };
    format!(
        "/apis/{}/namespaces/{}/{plural}",
        key.kind.api_version(),
        key.namespace
    )
}
