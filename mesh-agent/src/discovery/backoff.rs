//! How long to wait before the next attempt to connect.

use std::time::Duration;

use rand::Rng;

/// First wait: a control plane that restarted in place is usually back at once.
pub const BACKOFF_MIN: Duration = Duration::from_millis(10);
/// Longest wait. An agent has to be back within 5 s of the control plane (reliability, row 32), and because the wait is
/// drawn evenly from everything up to this, many agents spread over the same 5 s instead of arriving together.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);
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

    /// The wait after an attempt that was served for `lived`: from its first response to its end.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= HEALTHY_AFTER {
            self.ceiling = BACKOFF_MIN;
        }
        let wait = self.rng.random_range(BACKOFF_MIN / 2..=self.ceiling);
        self.ceiling = (self.ceiling * 2).min(BACKOFF_MAX);
        wait
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_never_beyond() {
        let mut backoff = Backoff::new(SmallRng::seed_from_u64(7));
        let mut ceiling = BACKOFF_MIN;
        for attempt in 0..50 {
            let wait = backoff.after(Duration::ZERO);
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
        (0..20).for_each(|_| _ = backoff.after(Duration::ZERO));
        backoff.after(HEALTHY_AFTER - Duration::from_millis(1));
        assert_eq!(backoff.ceiling, BACKOFF_MAX);
        assert!(backoff.after(HEALTHY_AFTER) <= BACKOFF_MIN);
    }

    #[test]
    fn a_hundred_agents_spread_over_the_whole_cap() {
        let mut thirds = [0u32; 3];
        for seed in 0..100 {
            let mut backoff = Backoff::new(SmallRng::seed_from_u64(seed));
            (0..20).for_each(|_| _ = backoff.after(Duration::ZERO));
            let wait = backoff.after(Duration::ZERO);
            thirds[(wait.as_secs_f64() / BACKOFF_MAX.as_secs_f64() * 2.999) as usize] += 1;
        }
        assert!(
            thirds.iter().all(|count| *count >= 20),
            "uneven: {thirds:?}"
        );
    }
}
