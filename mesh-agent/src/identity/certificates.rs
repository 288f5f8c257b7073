//! The running part: asks by the schedule, and publishes what came.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use futures::{StreamExt, stream::FuturesUnordered};
use mesh_api::identity::Identity;
use rand::{SeedableRng, rngs::StdRng};
use rustls::{pki_types::UnixTime, time_provider::TimeProvider};
use serde::Serialize;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
};

use super::{
    CertificateError, Certified, IdentityConfig,
    ca_client::{Authority, CaClient},
    key::NodeKey,
    peer::ClientProof,
    response::{Material, accept},
    roots::TrustRoots,
    schedule::{Demand, Now, Row, Schedule, Validity},
    tls::{PeerRejection, unix_time},
};
use crate::telemetry::Telemetry;

/// How long a connection waits for its certificate: longer than one call to the authority may take, shorter than
/// applications usually wait for a connection.
pub const GET_TIMEOUT: Duration = Duration::from_secs(15);

/// Both clocks.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Monotonic time since any fixed moment.
    fn monotonic(&self) -> Duration;
    /// Wall clock, seconds since 1970.
    fn unix(&self) -> i64;
}

/// The clocks of this machine.
#[derive(Debug)]
pub struct SystemClock {
    start: tokio::time::Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self {
            start: tokio::time::Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn unix(&self) -> i64 {
        // A clock before 1970 makes every certificate not valid yet, which is the truth.
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }
}

/// Gives TLS the same wall clock.
#[derive(Debug)]
struct TlsTime(Arc<dyn Clock>);

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.0.unix()))
    }
}

/// What [`Certificates::spawn`] is made of.
pub struct Parts {
    /// Who signs.
    pub authority: Arc<dyn Authority>,
    /// The only trust domain that certificates are asked for.
    pub trust_domain: Arc<str>,
    /// Clocks.
    pub clock: Arc<dyn Clock>,
    /// Randomness of the schedule; keys come from the system.
    pub random: StdRng,
    /// Where to count.
    pub telemetry: Arc<Telemetry>,
}

/// Hands out certificates; fetches, renews and forgets them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Certificates {
    shared: Arc<Shared>,
}

type Published = HashMap<Identity, Arc<Certified>>;
/// What became of one request; `None` while it is under way.
type Outcome = Option<Result<Arc<Certified>, CertificateError>>;

struct Shared {
    /// Read on every connection, replaced as a whole.
    published: ArcSwap<Published>,
    state: Mutex<State>,
    /// Something became due.
    wake: Notify,
    trust_domain: Arc<str>,
    authority: Arc<dyn Authority>,
    clock: Arc<dyn Clock>,
    tls_time: Arc<dyn TimeProvider>,
    telemetry: Arc<Telemetry>,
}

struct State {
    schedule: Schedule,
    material: HashMap<Identity, Arc<Material>>,
    roots: Option<Arc<TrustRoots>>,
    /// Connections that wait, by identity; an entry lives as long as a request.
    waiters: HashMap<Identity, watch::Sender<Outcome>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("published", &self.published.load().len())
            .finish_non_exhaustive()
    }
}

/// State of one certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateState {
    /// Usable.
    Valid,
    /// Usable, but the last renewal failed.
    RenewalFailing,
    /// There was one and it has ended: connections are refused.
    Expired,
    /// There is none yet.
    Missing,
}

impl fmt::Display for CertificateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Valid => "valid",
            Self::RenewalFailing => "renewal failing",
            Self::Expired => "expired",
            Self::Missing => "missing",
        })
    }
}

/// One certificate for the operator.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// Whose.
    pub identity: Identity,
    /// Whether it can be used.
    pub state: CertificateState,
    /// Serial number, hexadecimal.
    pub serial: Option<String>,
    /// Start of validity, seconds since 1970.
    pub not_before: Option<i64>,
    /// End of validity, seconds since 1970.
    pub not_after: Option<i64>,
    /// A request is under way.
    pub requesting: bool,
    /// Failed requests since the last success.
    pub failures: u32,
    /// Why the last request failed.
    pub last_error: Option<String>,
    /// Milliseconds until the next request.
    pub next_request_in_ms: u64,
}

impl Certificates {
    /// Starts asking `config`'s certificate service, on `runtime`.
    ///
    /// # Errors
    /// When the configuration cannot work.
    pub fn start(
        config: IdentityConfig,
        telemetry: Arc<Telemetry>,
        runtime: &Handle,
    ) -> Result<Self, CertificateError> {
        let trust_domain = config.trust_domain.as_str().into();
        let authority = Arc::new(CaClient::new(config)?);
        let (clock, random) = (Arc::new(SystemClock::default()), StdRng::from_os_rng());
        Ok(Self::spawn(
            Parts {
                authority,
                trust_domain,
                clock,
                random,
                telemetry,
            },
            runtime,
        ))
    }

    /// Starts with any authority, clock and randomness, on `runtime`. The task ends with the runtime.
    #[must_use]
    pub fn spawn(parts: Parts, runtime: &Handle) -> Self {
        let Parts {
            authority,
            trust_domain,
            clock,
            random,
            telemetry,
        } = parts;
        let state = State {
            schedule: Schedule::new(random),
            material: HashMap::new(),
            roots: None,
            waiters: HashMap::new(),
        };
        let shared = Arc::new(Shared {
            published: ArcSwap::default(),
            state: Mutex::new(state),
            wake: Notify::new(),
            trust_domain,
            authority,
            tls_time: Arc::new(TlsTime(clock.clone())),
            clock,
            telemetry,
        });
        runtime.spawn(drive(shared.clone()));
        Self { shared }
    }

    /// The current certificate of `identity`, fetched if need be (one request at a time per identity). Waits at most
    /// [`GET_TIMEOUT`]; after a failure it refuses at once until the next attempt is due.
    ///
    /// # Errors
    /// When the control plane refuses or cannot be reached and there is no valid certificate.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<Certified>, CertificateError> {
        if let Some(certified) = self.current(identity) {
            return Ok(certified);
        }
        if *identity.trust_domain() != *self.shared.trust_domain {
            let trust_domain = self.shared.trust_domain.clone();
            return Err(CertificateError::ForeignTrustDomain {
                identity: identity.clone(),
                trust_domain,
            });
        }
        let mut outcome = {
            let mut state = self.shared.state();
            match state.schedule.demand(identity, self.shared.now()) {
                Demand::Refuse(error) => return Err(error),
                Demand::Wait => state
                    .waiters
                    .entry(identity.clone())
                    .or_insert_with(|| watch::Sender::new(None))
                    .subscribe(),
            }
        };
        self.shared.wake.notify_one();
        match tokio::time::timeout(GET_TIMEOUT, outcome.wait_for(Option::is_some)).await {
            Ok(Ok(result)) => result
                .clone()
                .unwrap_or_else(|| Err(CertificateError::Forgotten(identity.clone()))),
            Ok(Err(_)) => Err(CertificateError::Forgotten(identity.clone())),
            Err(_) => Err(CertificateError::TimedOut(identity.clone())),
        }
    }

    /// The current certificate, if there is a valid one already.
    #[must_use]
    pub fn current(&self, identity: &Identity) -> Option<Arc<Certified>> {
        let published = self.shared.published.load();
        let certified = published.get(identity)?;
        certified
            .is_valid_at(self.shared.clock.unix())
            .then(|| certified.clone())
    }

    /// Judges the client of an open tunnel to `own` as at a new handshake. Without a valid certificate of our own
    /// there is nothing to judge it by, and no new handshake either.
    ///
    /// # Errors
    /// What the handshake would say.
    pub fn judge_again(
        &self,
        own: &Identity,
        client: &mut ClientProof,
    ) -> Result<(), PeerRejection> {
        let judge = self.current(own);
        judge.map_or(Ok(()), |judge| client.judge_again(&judge))
    }

    /// Says which identities this node needs: others are forgotten, new ones prefetched. Identities of a foreign trust
    /// domain, and those beyond the limit, are left out with a warning.
    pub fn retain(&self, needed: &[Identity]) {
        let now = self.shared.now();
        let mut state = self.shared.state();
        let gone = state.schedule.retain(&needed.iter().collect());
        for identity in &gone {
            state.material.remove(identity);
            state.waiters.remove(identity);
            self.shared.telemetry.certificates.forget(identity);
        }
        for identity in needed {
            if *identity.trust_domain() != *self.shared.trust_domain {
                tracing::warn!(%identity, ours = %self.shared.trust_domain, "identity of a foreign trust domain");
            } else if let Err(error) = state.schedule.prefetch(identity, now) {
                tracing::warn!(%identity, %error, "identity gets no certificate");
            }
        }
        if !gone.is_empty() {
            self.shared.publish(&mut state);
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Every identity of this node with the state of its certificate, sorted.
    #[must_use]
    pub fn status(&self) -> Vec<CertificateStatus> {
        let now = self.shared.now();
        let state = self.shared.state();
        let describe = |row: Row| {
            let material = state.material.get(&row.identity);
            let certificate = match row.validity {
                Some(validity) if now.unix >= validity.not_after => CertificateState::Expired,
                Some(_) if row.failures > 0 => CertificateState::RenewalFailing,
                Some(_) => CertificateState::Valid,
                None => CertificateState::Missing,
            };
            CertificateStatus {
                state: certificate,
                serial: material.map(|material| material.serial.clone()),
                not_before: row.validity.map(|validity| validity.not_before),
                not_after: row.validity.map(|validity| validity.not_after),
                requesting: row.in_flight,
                failures: row.failures,
                last_error: row.last_error.map(|error| error.to_string()),
                next_request_in_ms: u64::try_from(row.next_in.as_millis()).unwrap_or(u64::MAX),
                identity: row.identity,
            }
        };
        state.schedule.rows(now).into_iter().map(describe).collect()
    }
}

/// Runs until its runtime ends.
async fn drive(shared: Arc<Shared>) {
    let mut requests = FuturesUnordered::new();
    loop {
        let (started, idle) = {
            let (mut state, now) = (shared.state(), shared.now());
            (state.schedule.start(now), state.schedule.idle_for(now))
        };
        for identity in started {
            requests.push(request(shared.clone(), identity));
        }
        tokio::select! {
            Some((identity, result)) = requests.next(), if !requests.is_empty() => shared.finish(&identity, result),
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(idle) => {}
        }
    }
}

/// One request, in a task of its own, so that a panic in it is a failure like any other.
async fn request(
    shared: Arc<Shared>,
    identity: Identity,
) -> (Identity, Result<Material, CertificateError>) {
    shared.telemetry.certificates.requests.inc();
    let task = tokio::spawn({
        let identity = identity.clone();
        async move {
            let key = NodeKey::generate()?;
            let request = key.certificate_request(&identity)?;
            let chain = shared.authority.sign(&identity, request).await?;
            Ok(accept(&chain, &key, &identity, shared.clock.unix())?)
        }
    });
    let result = task
        .await
        .unwrap_or_else(|error| Err(CertificateError::BrokenOff(error.to_string())));
    (identity, result)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Now {
        Now {
            monotonic: self.clock.monotonic(),
            unix: self.clock.unix(),
        }
    }

    /// Takes the outcome of a request into the schedule, publishes a certificate and tells those who wait.
    fn finish(&self, identity: &Identity, result: Result<Material, CertificateError>) {
        let mut state = self.state();
        let outcome = result.and_then(|material| self.install(&mut state, identity, material));
        if let Err(error) = &outcome {
            self.telemetry.certificates.failures.inc();
            let left_s = state
                .material
                .get(identity)
                .map(|material| material.not_after.saturating_sub(self.clock.unix()));
            tracing::warn!(%identity, %error, left_s, "no new certificate");
            state.schedule.failed(identity, error.clone(), self.now());
        }
        if let Some(waiters) = state.waiters.remove(identity) {
            waiters.send_replace(Some(outcome));
        }
    }

    fn install(
        &self,
        state: &mut State,
        identity: &Identity,
        material: Material,
    ) -> Result<Arc<Certified>, CertificateError> {
        let validity = Validity {
            not_before: material.not_before,
            not_after: material.not_after,
        };
        let before = state.material.insert(identity.clone(), Arc::new(material));
        let roots = match self.union(state) {
            Ok(roots) => roots,
            Err(error) => {
                // What worked before goes on.
                match before {
                    Some(before) => state.material.insert(identity.clone(), before),
                    None => state.material.remove(identity),
                };
                return Err(error);
            }
        };
        if !state.schedule.succeeded(identity, validity, self.now()) {
            state.material.remove(identity);
            return Err(CertificateError::Forgotten(identity.clone()));
        }
        state.roots = Some(roots);
        self.publish(state);
        self.telemetry
            .certificates
            .renewed(identity, validity.not_after);
        tracing::info!(%identity, not_after = validity.not_after, "new certificate");
        let published = self.published.load();
        published
            .get(identity)
            .cloned()
            .ok_or_else(|| CertificateError::Forgotten(identity.clone()))
    }

    /// The roots that the newest answers gave, together: while a root is being replaced, identities that have already
    /// been renewed and those that have not must believe each other's peers.
    fn union(&self, state: &State) -> Result<Arc<TrustRoots>, CertificateError> {
        let now = self.clock.unix();
        let living = state
            .material
            .values()
            .filter(|material| now < material.not_after);
        let seen: HashSet<_> = living
            .flat_map(|material| material.roots.iter().cloned())
            .collect();
        let roots = TrustRoots::new(seen.into_iter().collect())?;
        match &state.roots {
            Some(known) if known.fingerprint() == roots.fingerprint() => Ok(known.clone()),
            _ => Ok(Arc::new(roots)),
        }
    }

    /// Publishes all certificates anew; those whose key and roots are unchanged keep their configurations.
    fn publish(&self, state: &mut State) {
        if let Ok(roots) = self.union(state) {
            state.roots = Some(roots);
        }
        let Some(roots) = &state.roots else { return };
        let before = self.published.load();
        let make = |identity: &Identity, material: &Material| {
            let same = before.get(identity).filter(|old| {
                old.roots_fingerprint == roots.fingerprint() && old.is_made_of(material)
            });
            match same {
                Some(old) => Ok(old.clone()),
                None => Certified::new(material, roots, &self.tls_time).map(Arc::new),
            }
        };
        let mut published = Published::with_capacity(state.material.len());
        for (identity, material) in &state.material {
            match make(identity, material) {
                Ok(certified) => {
                    published.insert(identity.clone(), certified);
                }
                Err(error) => tracing::error!(%identity, %error, "certificate cannot be used"),
            }
        }
        self.published.store(Arc::new(published));
    }
}

#[cfg(test)]
mod tests;
