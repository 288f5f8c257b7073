//! Which of the replicas writes. No I/O; the clock is an argument.
//!
//! The usual algorithm over a Lease: its holder renews it; who sees it unchanged for its duration, measured by the own
//! clock, may take it. Writes carry the resource version that was seen, so that of two takers one fails. A holder stops
//! leading before anybody else may begin.

use std::time::Duration;

use tokio::time::Instant;

/// How long a Lease holds without renewal. What the leader writes is for information, so that a gap of this length harms
/// nobody; shorter ones cost more writes.
pub(super) const LEASE_DURATION: Duration = Duration::from_secs(15);
/// How long after its last renewal a holder still leads. The difference to the duration is for clocks that run unevenly and
/// for a write that is under way.
const LEAD_MAX: Duration = Duration::from_secs(10);
/// How often the Lease is looked at and renewed.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// A Lease, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Who holds it; empty when nobody does.
    pub holder: String,
    /// Changes with every renewal.
    pub version: String,
    /// How long it holds.
    pub duration: Duration,
}

/// What to do about the Lease that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    /// There is none: make it.
    Create,
    /// It is free: take it.
    Take,
    /// It is ours: renew it.
    Renew,
    /// Somebody else holds it.
    Wait,
}

/// One replica.
#[derive(Debug)]
pub(super) struct Election {
    me: String,
    seen: Option<(Record, Instant)>,
    /// When the last renewal that succeeded was sent.
    renewed: Option<Instant>,
}

impl Election {
    /// `me` names this replica, and only this one.
    pub fn new(me: String) -> Self {
        Self {
            me,
            seen: None,
            renewed: None,
        }
    }

    /// Who this is.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// The Lease as it is now. Says what to do.
    pub fn saw(&mut self, record: Option<Record>, now: Instant) -> Attempt {
        let Some(record) = record else {
            self.seen = None;
            return Attempt::Create;
        };
        let since = match &self.seen {
            Some((known, since)) if *known == record => *since,
            _ => now,
        };
        let ours = record.holder == self.me;
        if !ours {
            self.renewed = None;
        }
        let free = record.holder.is_empty() || now.duration_since(since) >= record.duration;
        self.seen = Some((record, since));
        match (ours, free) {
            (true, _) => Attempt::Renew,
            (false, true) => Attempt::Take,
            (false, false) => Attempt::Wait,
        }
    }

    /// An attempt that was sent at `sent` succeeded.
    pub fn won(&mut self, sent: Instant) {
        self.renewed = Some(sent);
    }

    /// Whether this replica may write.
    pub fn leads(&self, now: Instant) -> bool {
        self.renewed
            .is_some_and(|renewed| now.duration_since(renewed) < LEAD_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn held_by(holder: &str, version: u32) -> Option<Record> {
        Some(Record {
            holder: holder.into(),
            version: version.to_string(),
            duration: LEASE_DURATION,
        })
    }

    #[test]
    fn the_first_makes_it_and_renews_it() {
        let (mut a, start) = (Election::new("a".into()), Instant::now());
        assert!(!a.leads(start));
        assert_eq!(a.saw(None, start), Attempt::Create);
        a.won(start);
        assert!(a.leads(start));
        let later = start + RETRY_INTERVAL;
        assert_eq!(a.saw(held_by("a", 1), later), Attempt::Renew);
        a.won(later);
        assert!(a.leads(later + LEAD_MAX - SECOND));
        assert!(!a.leads(later + LEAD_MAX), "it could not renew");
    }

    #[test]
    fn another_waits_until_it_has_seen_no_renewal_for_the_duration() {
        let (mut b, start) = (Election::new("b".into()), Instant::now());
        assert_eq!(b.saw(held_by("a", 1), start), Attempt::Wait);
        let almost = start + LEASE_DURATION - SECOND;
        assert_eq!(b.saw(held_by("a", 1), almost), Attempt::Wait);
        assert_eq!(b.saw(held_by("a", 2), almost), Attempt::Wait, "renewed");
        assert_eq!(
            b.saw(held_by("a", 2), start + LEASE_DURATION),
            Attempt::Wait
        );
        let free = almost + LEASE_DURATION;
        assert_eq!(b.saw(held_by("a", 2), free), Attempt::Take);
        assert!(!b.leads(free), "not before it has succeeded");
        b.won(free);
        assert!(b.leads(free));
    }

    #[test]
    fn what_was_given_back_is_free_at_once() {
        let (mut b, start) = (Election::new("b".into()), Instant::now());
        assert_eq!(b.saw(held_by("", 1), start), Attempt::Take);
    }

    #[test]
    fn who_lost_it_stops_at_once() {
        let (mut a, start) = (Election::new("a".into()), Instant::now());
        a.saw(None, start);
        a.won(start);
        assert_eq!(a.saw(held_by("b", 2), start + SECOND), Attempt::Wait);
        assert!(!a.leads(start + SECOND));
    }

    /// A holder that hangs never leads while another does, however late its answers are.
    #[test]
    fn two_never_lead_together() {
        let start = Instant::now();
        for hang in 0..40_u32 {
            let (mut a, mut b) = (Election::new("a".into()), Election::new("b".into()));
            a.saw(None, start);
            a.won(start);
            // `a` sends a renewal and learns only `hang` seconds later that it succeeded.
            let sent = start + SECOND;
            let mut version = 2;
            for second in 1..60 {
                let now = start + SECOND * second;
                if second == 1 + hang {
                    a.won(sent);
                }
                let holder = if version == 2 { "a" } else { "b" };
                if b.saw(held_by(holder, version), now) == Attempt::Take {
                    version = 3;
                    b.won(now);
                }
                assert!(
                    !(a.leads(now) && b.leads(now)),
                    "hang {hang}, second {second}"
                );
            }
        }
    }
}
