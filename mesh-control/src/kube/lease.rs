//! The Lease that the replicas elect their writer with.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    api::{Api, ApiError},
    backoff::Dice,
    election::{Attempt, Election, LEASE_DURATION, RETRY_INTERVAL, Record},
    metrics::KubeMetrics,
};

/// How long giving the Lease back may take when the process stops.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where the Lease is.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub namespace: String,
    pub name: String,
}

impl Place {
    fn path(&self) -> String {
        format!(
            "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
            self.namespace
        )
    }
}

/// Takes part in the election until `stop` turns true; says in `leader` whether this replica writes.
pub(super) async fn elect(
    api: Api,
    place: Place,
    me: String,
    metrics: KubeMetrics,
    leader: watch::Sender<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut candidate = Candidate {
        api,
        place,
        election: Election::new(me),
        lease: None,
        complaint: String::new(),
    };
    let mut dice = Dice::random();
    loop {
        candidate.attempt().await;
        let leads = candidate.election.leads(Instant::now());
        if leader.send_if_modified(|was| std::mem::replace(was, leads) != leads) {
            metrics.leader.set(leads.into());
            let me = candidate.election.me();
            info!(
                me,
                "{}",
                if leads {
                    "this replica writes"
                } else {
                    "another replica writes"
                }
            );
        }
        tokio::select! {
            () = sleep(dice.jitter(RETRY_INTERVAL)) => {}
            () = crate::stopped(&mut stop) => break,
        }
    }
    if leader.send_replace(false) {
        // Whoever comes next need not wait; if this fails they do.
        let _ = timeout(RELEASE_TIMEOUT, candidate.release()).await;
    }
}

struct Candidate {
    api: Api,
    place: Place,
    election: Election,
    /// As it was last read or written.
    lease: Option<Lease>,
    complaint: String,
}

impl Candidate {
    async fn attempt(&mut self) {
        match self.try_once().await {
            Ok(()) => self.complaint.clear(),
            // Somebody else was faster.
            Err(ApiError::Conflict(_)) => {}
            Err(error) => {
                let complaint = error.to_string();
                if complaint != self.complaint {
                    warn!(
                        lease = self.place.name,
                        "cannot take part in the election: {complaint}"
                    );
                    self.complaint = complaint;
                }
            }
        }
    }

    async fn try_once(&mut self) -> Result<(), ApiError> {
        let path = self.place.path();
        // An answer that comes later than a renewal is due is worth nothing.
        let found = match self
            .within(self.api.get::<Lease>(&path, &self.place.name))
            .await
        {
            Ok(lease) => Some(lease),
            Err(ApiError::NotFound(_)) => None,
            Err(error) => return Err(error),
        };
        let record = found.as_ref().map(record_of);
        let attempt = self.election.saw(record, Instant::now());
        let sent = Instant::now();
        let lease = match attempt {
            Attempt::Wait => return Ok(()),
            Attempt::Create => {
                let lease = self.renewed(None, attempt);
                self.within(self.api.create(&path, &lease)).await?
            }
            Attempt::Take | Attempt::Renew => {
                let lease = self.renewed(found, attempt);
                let replaced = self.api.replace(&path, &self.place.name, &lease);
                self.within(replaced).await?
            }
        };
        self.election.won(sent);
        self.lease = Some(lease);
        Ok(())
    }

    async fn within<T>(
        &self,
        answer: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let limit = LEASE_DURATION / 3;
        timeout(limit, answer)
            .await
            .unwrap_or(Err(ApiError::Slow(limit)))
    }

    /// The Lease as its holder writes it.
    fn renewed(&self, lease: Option<Lease>, attempt: Attempt) -> Lease {
        let mut lease = lease.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.place.name.clone()),
                namespace: Some(self.place.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        let now = MicroTime(Timestamp::now());
        if attempt != Attempt::Renew {
            spec.acquire_time = Some(now.clone());
            let transitions = spec.lease_transitions.unwrap_or(0);
            let taken = i32::from(attempt == Attempt::Take);
            spec.lease_transitions = Some(transitions.saturating_add(taken));
        }
        spec.holder_identity = Some(self.election.me().to_owned());
        spec.lease_duration_seconds = i32::try_from(LEASE_DURATION.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    async fn release(&mut self) {
        let Some(mut lease) = self.lease.take() else {
            return;
        };
        if let Some(spec) = &mut lease.spec {
            // The API server refuses an empty one.
            spec.holder_identity = None;
        }
        let path = self.place.path();
        let released = self
            .api
            .replace::<Lease>(&path, &self.place.name, &lease)
            .await;
        if let Err(error) = released {
            info!(%error, "could not give the lease back");
        }
    }
}

fn record_of(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.unwrap_or(0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        duration: Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
    }
}
