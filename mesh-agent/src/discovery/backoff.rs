//! How long to wait before the next attempt to connect.

use std::time::Duration;

use rand::Rng;

/// First wait: a control plane that restarted in place is usually back at once.
pub const BACKOFF_MIN: Duration = Duration::from_millis(10);
/// Longest wait. An agent has to be back within 5 s of the control plane (reliability, row 32), and because the wait is
/// drawn evenly from everything up to this, many agents spread over the same 5 s instead of arriving together.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest wait after an attempt that hung: it was a wait already. Together with the connect deadline
/// ([`super::client::CONNECT_TIMEOUT`]) it makes no more than [`BACKOFF_MAX`].
pub const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A stream that was served this long was healthy: the next failure starts from [`BACKOFF_MIN`] again. Longer than
/// [`BACKOFF_MAX`], so that a control plane that accepts and fails at once is not hammered.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Doubling, capped, fully jittered waits.
#[derive(Debug)]
pub struct Backoff<R> {
    rng: R,
    ceiling: Duration,
}

impl<R: Rng> Backoff<R> {
    /// Starts at [`BACKOFF_MIN`].
    pub fn new(rng: R) -> Self {
        Self {
            rng,
            ceiling: BACKOFF_MIN,
        }
    }

    /// The wait after an attempt that was served for `lived`, from its first response to its end, or that was never
    /// served and took `spent`. Its time counts as part of the wait.
    pub fn after(&mut self, lived: Duration, spent: Duration) -> Duration {
        if lived >= HEALTHY_AFTER {
            self.ceiling = BACKOFF_MIN;
        }
        let wait = self.rng.random_range(BACKOFF_MIN / 2..=self.ceiling);
        // Never none: agents that began to hang together would stay together.
        let pause = self
            .rng
            .random_range(BACKOFF_MIN / 2..=self.ceiling.min(PAUSE_MAX));
        self.ceiling = (self.ceiling * 2).min(BACKOFF_MAX);
        wait.saturating_sub(spent).max(pause)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::{super::client::CONNECT_TIMEOUT, *};

    const AGENTS: u64 = 100;

    #[test]
    fn waits_grow_to_the_cap_and_never_beyond() {
        let mut backoff = Backoff::new(SmallRng::seed_from_u64(7));
        let mut ceiling = BACKOFF_MIN;
        for attempt in 0..50 {
            let wait = backoff.after(Duration::ZERO, Duration::ZERO);
            assert!(
                wait >= BACKOFF_MIN / 2 && wait <= ceiling,
                "attempt {attempt} waits {wait:?}, at most {ceiling:?}"
            );
            ceiling = (ceiling * 2).min(BACKOFF_MAX);
        }
        assert_eq!(backoff.ceiling, BACKOFF_MAX);
    }

    #[test]
    fn a_healthy_period_resets_and_a_short_one_does_not() {
        let mut backoff = Backoff::new(SmallRng::seed_from_u64(7));
        let none = Duration::ZERO;
        (0..20).for_each(|_| _ = backoff.after(none, none));
        backoff.after(HEALTHY_AFTER - Duration::from_millis(1), none);
        assert_eq!(backoff.ceiling, BACKOFF_MAX);
        assert!(backoff.after(HEALTHY_AFTER, none) <= BACKOFF_MIN);
    }

    #[test]
    fn an_attempt_that_hung_is_followed_by_a_short_and_jittered_wait() {
        let mut backoff = Backoff::new(SmallRng::seed_from_u64(7));
        (0..20).for_each(|_| _ = backoff.after(Duration::ZERO, CONNECT_TIMEOUT));
        let mut waits: Vec<_> = (0..50)
            .map(|_| backoff.after(Duration::ZERO, CONNECT_TIMEOUT))
            .collect();
        assert!(waits.iter().all(|wait| *wait <= PAUSE_MAX), "{waits:?}");
        waits.dedup();
        assert!(waits.len() > 40, "{waits:?}");
    }

    /// When the agents that lost their control plane at once reach it again, counted from its return at `returns`.
    /// Every attempt before takes `attempt`.
    fn arrivals(attempt: Duration, returns: Duration) -> Vec<Duration> {
        let arrival = |seed| {
            let mut backoff = Backoff::new(SmallRng::seed_from_u64(seed));
            let mut now = backoff.after(HEALTHY_AFTER, Duration::ZERO);
            while now < returns {
                now += attempt;
                now += backoff.after(Duration::ZERO, attempt);
            }
            now - returns
        };
        let mut all: Vec<_> = (0..AGENTS).map(arrival).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_hundred_agents_return_within_five_seconds_and_not_together() {
        let window = Duration::from_millis(250);
        for attempt in [Duration::ZERO, CONNECT_TIMEOUT] {
            for returns in (60..660).step_by(60).map(Duration::from_secs) {
                let all = arrivals(attempt, returns);
                let (first, last) = (all[0], all[all.len() - 1]);
                assert!(last <= BACKOFF_MAX, "attempts of {attempt:?}: {last:?}");
                assert!(
                    last - first >= BACKOFF_MAX * 7 / 10,
                    "attempts of {attempt:?}: all within {:?}",
                    last - first
                );
                let together = all
                    .iter()
                    .map(|start| {
                        let near = |at: &&Duration| **at >= *start && **at < *start + window;
                        all.iter().filter(near).count()
                    })
                    .max();
                assert!(
                    together < Some(20),
                    "attempts of {attempt:?}: {together:?} within {window:?}"
                );
            }
        }
    }
}
