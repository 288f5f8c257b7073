//! When to ask for which certificate. No I/O and no clock: it takes times and outcomes and says what to start.
//!
//! Two clocks are needed. Validity is wall-clock time. The schedule runs on the monotonic clock, so that a step of the
//! wall clock cannot start a loop of renewals; it is only looked at to notice that a certificate has ended early.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use mesh_api::identity::Identity;
use rand::{Rng, rngs::StdRng};

use super::{CertificateError, response::CLOCK_SKEW_MAX_S};

/// Identities that one node may hold. Kubernetes allows some hundred pods on a node; every identity costs a key, a
/// certificate and a metric series.
pub const IDENTITIES_MAX: usize = 4096;
/// Requests under way at one time; enough to fetch a node's certificates in seconds, without flooding the authority
/// when every node of a cluster starts.
pub const IN_FLIGHT_MAX: usize = 8;
/// First wait after a failure.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(500);
/// Longest wait after a failure.
pub const BACKOFF_MAX: Duration = Duration::from_secs(150);
/// While the control plane is away one identity asks at least this often: when it is back, all others follow at once.
/// So every certificate is renewed within 30 s of its return, at the cost of one request per node and interval.
pub const PROBE_MAX: Duration = Duration::from_secs(25);
/// Over which time the others follow, so that they do not arrive together.
pub const FOLLOW_SPREAD: Duration = Duration::from_secs(2);
/// Shortest time between a success and the next request for the same identity, whatever the clocks say.
pub const RENEWAL_MIN: Duration = Duration::from_secs(1);
/// A connection that needs a certificate may cut a backoff short, but not more often than this.
pub const DEMAND_SPACING: Duration = Duration::from_secs(5);
/// The schedule is looked at this often even if nothing is due, to notice steps of the wall clock.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// Renewal happens at half of the remaining life, this fraction more or less, so that nodes do not renew together.
const RENEWAL_JITTER: f64 = 0.1;
/// Waits after failures are shortened by up to this fraction.
const BACKOFF_JITTER: f64 = 0.25;

/// A moment on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time since any fixed moment.
    pub monotonic: Duration,
    /// Seconds since 1970.
    pub unix: i64,
}

/// Validity of a certificate, seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Start.
    pub not_before: i64,
    /// End; the certificate is gone then.
    pub not_after: i64,
}

impl Validity {
    fn remaining(self, now: Now) -> Duration {
        Duration::from_secs(u64::try_from(self.not_after.saturating_sub(now.unix)).unwrap_or(0))
    }

    /// Ended, or begins so much later that the clock must have been set back.
    fn is_off(self, now: Now) -> bool {
        now.unix >= self.not_after || self.not_before.saturating_sub(now.unix) > CLOCK_SKEW_MAX_S
    }
}

/// Who waits for a request; the order is the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A connection.
    Demand,
    /// Nobody yet, but a certificate ends.
    Renewal,
    /// Nobody yet.
    Prefetch,
}

/// What a connection that has no certificate shall do.
#[derive(Debug, Clone, PartialEq)]
pub enum Demand {
    /// Wait: a request is under way or due.
    Wait,
    /// Give up.
    Refuse(CertificateError),
}

/// What is known of one identity.
#[derive(Debug, Clone)]
struct Entry {
    priority: Priority,
    /// Monotonic time of the next request.
    due: Duration,
    last_start: Option<Duration>,
    failures: u32,
    last_error: Option<CertificateError>,
    validity: Option<Validity>,
}

/// One identity as an operator sees it.
#[derive(Debug, Clone)]
pub struct Row {
    /// Whose.
    pub identity: Identity,
    /// A request is under way.
    pub in_flight: bool,
    /// Time until the next request.
    pub next_in: Duration,
    /// Validity of the last certificate.
    pub validity: Option<Validity>,
    /// Failures since the last success.
    pub failures: u32,
    /// Why the last request failed; none after a success.
    pub last_error: Option<CertificateError>,
}

/// The schedule of all identities of a node.
#[derive(Debug)]
pub struct Schedule {
    entries: HashMap<Identity, Entry>,
    in_flight: HashSet<Identity>,
    random: StdRng,
}

impl Schedule {
    /// An empty schedule.
    #[must_use]
    pub fn new(random: StdRng) -> Self {
        Self {
            entries: HashMap::new(),
            in_flight: HashSet::new(),
            random,
        }
    }

    /// Adds an identity that will be needed, if it is not known yet.
    ///
    /// # Errors
    /// [`CertificateError::TooMany`] at the limit.
    pub fn prefetch(&mut self, identity: &Identity, now: Now) -> Result<(), CertificateError> {
        self.entry(identity, now).map(|_| ())
    }

    /// A connection needs the certificate of `identity` and there is no valid one.
    pub fn demand(&mut self, identity: &Identity, now: Now) -> Demand {
        let in_flight = self.in_flight.contains(identity);
        let entry = match self.entry(identity, now) {
            Ok(entry) => entry,
            Err(error) => return Demand::Refuse(error),
        };
        entry.priority = Priority::Demand;
        if in_flight {
            return Demand::Wait;
        }
        let rested = entry
            .last_start
            .is_none_or(|last| now.monotonic >= last + DEMAND_SPACING);
        if let (Some(last), false, true) = (&entry.last_error, rested, entry.due > now.monotonic) {
            let retry_in_ms =
                u64::try_from((entry.due - now.monotonic).as_millis()).unwrap_or(u64::MAX);
            let last = Box::new(last.clone());
            return Demand::Refuse(CertificateError::Waiting {
                identity: identity.clone(),
                retry_in_ms,
                last,
            });
        }
        entry.due = entry.due.min(now.monotonic);
        Demand::Wait
    }

    fn entry(&mut self, identity: &Identity, now: Now) -> Result<&mut Entry, CertificateError> {
        if !self.entries.contains_key(identity) && self.entries.len() >= IDENTITIES_MAX {
            return Err(CertificateError::TooMany(IDENTITIES_MAX));
        }
        Ok(self.entries.entry(identity.clone()).or_insert(Entry {
            priority: Priority::Prefetch,
            due: now.monotonic,
            last_start: None,
            failures: 0,
            last_error: None,
            validity: None,
        }))
    }

    /// Forgets every identity that is not in `needed` and returns those that went.
    pub fn retain(&mut self, needed: &HashSet<&Identity>) -> Vec<Identity> {
        let gone: Vec<Identity> = self
            .entries
            .keys()
            .filter(|known| !needed.contains(known))
            .cloned()
            .collect();
        for identity in &gone {
            self.entries.remove(identity);
        }
        gone
    }

    /// The identities to ask for now, most urgent first. They are under way until [`Schedule::succeeded`] or
    /// [`Schedule::failed`].
    pub fn start(&mut self, now: Now) -> Vec<Identity> {
        for entry in self.entries.values_mut() {
            entry.notice_clock_step(now);
        }
        let mut due: Vec<(Priority, Duration, Identity)> = self
            .entries
            .iter()
            .filter(|(identity, entry)| {
                entry.due <= now.monotonic && !self.in_flight.contains(*identity)
            })
            .map(|(identity, entry)| (entry.priority, entry.due, identity.clone()))
            .collect();
        due.sort_unstable();
        let free = IN_FLIGHT_MAX.saturating_sub(self.in_flight.len());
        let started: Vec<Identity> = due
            .into_iter()
            .take(free)
            .map(|(_, _, identity)| identity)
            .collect();
        for identity in &started {
            self.in_flight.insert(identity.clone());
            if let Some(entry) = self.entries.get_mut(identity) {
                entry.last_start = Some(now.monotonic);
            }
        }
        started
    }

    /// How long nothing needs to happen, unless an answer or a demand comes.
    #[must_use]
    pub fn idle_for(&self, now: Now) -> Duration {
        if self.in_flight.len() >= IN_FLIGHT_MAX {
            return HEARTBEAT;
        }
        let waiting = self
            .entries
            .iter()
            .filter(|(identity, _)| !self.in_flight.contains(*identity));
        let next = waiting
            .map(|(_, entry)| entry.due.saturating_sub(now.monotonic))
            .min();
        next.unwrap_or(HEARTBEAT).min(HEARTBEAT)
    }

    /// A certificate came. Returns whether the identity is still wanted.
    pub fn succeeded(&mut self, identity: &Identity, validity: Validity, now: Now) -> bool {
        self.in_flight.remove(identity);
        let jitter = self
            .random
            .random_range(1.0 - RENEWAL_JITTER..1.0 + RENEWAL_JITTER);
        let Some(entry) = self.entries.get_mut(identity) else {
            return false;
        };
        entry.failures = 0;
        entry.last_error = None;
        entry.validity = Some(validity);
        entry.priority = Priority::Renewal;
        let half = (validity.remaining(now) / 2).mul_f64(jitter);
        entry.due = now.monotonic + half.max(RENEWAL_MIN);
        self.others_follow(now);
        true
    }

    /// The control plane is back: whoever failed because it was away asks again soon.
    fn others_follow(&mut self, now: Now) {
        for entry in self.entries.values_mut() {
            if entry
                .last_error
                .as_ref()
                .is_some_and(CertificateError::is_outage)
            {
                let soon = FOLLOW_SPREAD.mul_f64(self.random.random_range(0.0..1.0));
                entry.due = entry.due.min(now.monotonic + soon);
            }
        }
    }

    /// A request failed. A certificate that is still valid stays. Returns whether the identity is still wanted.
    pub fn failed(&mut self, identity: &Identity, error: CertificateError, now: Now) -> bool {
        self.in_flight.remove(identity);
        let probed = error.is_outage() && self.another_probes(identity, now);
        let longest = if error.is_outage() && !probed {
            PROBE_MAX
        } else {
            BACKOFF_MAX
        };
        let jitter = self.random.random_range(1.0 - BACKOFF_JITTER..1.0);
        let Some(entry) = self.entries.get_mut(identity) else {
            return false;
        };
        let doubled = BACKOFF_FIRST.saturating_mul(1_u32 << entry.failures.min(16));
        let mut wait = doubled.min(longest).mul_f64(jitter);
        if let Some(validity) = entry.validity.filter(|validity| !validity.is_off(now)) {
            // Never sleep through the end of the certificate.
            wait = wait.min(validity.remaining(now)).max(RENEWAL_MIN);
        }
        entry.failures = entry.failures.saturating_add(1);
        entry.last_error = Some(error);
        // Counted from the start of the request: one that hung was a wait already.
        let begun = entry.last_start.unwrap_or(now.monotonic);
        entry.due = (begun + wait).max(now.monotonic + wait.min(RENEWAL_MIN));
        if entry.priority == Priority::Demand {
            // Those who waited have been told; from here on it is ordinary upkeep.
            entry.priority = Priority::Renewal;
        }
        true
    }

    /// Whether some other identity finds out within [`PROBE_MAX`] that the control plane is back.
    fn another_probes(&self, identity: &Identity, now: Now) -> bool {
        let soon = now.monotonic..now.monotonic + PROBE_MAX;
        self.entries
            .iter()
            .filter(|(other, _)| *other != identity)
            .any(|(other, entry)| {
                let outage = entry
                    .last_error
                    .as_ref()
                    .is_some_and(CertificateError::is_outage);
                outage && (self.in_flight.contains(other) || soon.contains(&entry.due))
            })
    }

    /// All identities, for the operator.
    #[must_use]
    pub fn rows(&self, now: Now) -> Vec<Row> {
        let mut rows: Vec<Row> = self
            .entries
            .iter()
            .map(|(identity, entry)| Row {
                identity: identity.clone(),
                in_flight: self.in_flight.contains(identity),
                next_in: entry.due.saturating_sub(now.monotonic),
                validity: entry.validity,
                failures: entry.failures,
                last_error: entry.last_error.clone(),
            })
            .collect();
        rows.sort_unstable_by(|a, b| a.identity.cmp(&b.identity));
        rows
    }
}

impl Entry {
    /// Moves the next request forward when the wall clock was set so that the certificate ends before it. A failure's
    /// backoff is respected, so this cannot make a loop.
    fn notice_clock_step(&mut self, now: Now) {
        let Some(validity) = self.validity.filter(|_| self.failures == 0) else {
            return;
        };
        let too_late = self.due > now.monotonic + validity.remaining(now);
        if validity.is_off(now) || too_late {
            let rested = self
                .last_start
                .map_or(now.monotonic, |last| last + RENEWAL_MIN);
            self.due = self.due.min(rested.max(now.monotonic));
        }
    }
}

#[cfg(test)]
mod tests;
