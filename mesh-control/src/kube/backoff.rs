//! Capped back-off with jitter. Randomness comes from outside.

use std::{fmt, time::Duration};

use rand::{Rng, rngs::ThreadRng};

/// First pause: an API server that closes connections while it restarts is back within a second or two.
const FIRST: Duration = Duration::from_millis(200);
/// Longest pause: a control plane is to notice within seconds that the API server is back, and a dozen requests every few
/// seconds burden nobody.
const LONGEST: Duration = Duration::from_secs(5);

/// Gives numbers in `0.0..1.0`.
pub(super) struct Dice(Box<dyn FnMut() -> f64 + Send + Sync>);

impl Dice {
    /// Of the operating system's randomness.
    pub fn random() -> Self {
        Self(Box::new(|| ThreadRng::default().random()))
    }

    /// Always `value`.
    #[cfg(test)]
    pub fn fixed(value: f64) -> Self {
        Self(Box::new(move || value))
    }

    /// `duration`, shortened by up to half.
    pub fn jitter(&mut self, duration: Duration) -> Duration {
        duration.mul_f64(0.5 + 0.5 * (self.0)().clamp(0.0, 1.0))
    }
}

impl fmt::Debug for Dice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dice")
    }
}

/// The pauses after failures in a row.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    dice: Dice,
}

impl Backoff {
    pub fn new(dice: Dice) -> Self {
        Self { next: FIRST, dice }
    }

    /// The pause after one more failure: 200 ms, doubling to 5 s, each shortened by up to half.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        self.dice.jitter(pause)
    }

    /// It worked.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::new(Dice::fixed(1.0));
        let pauses: Vec<_> = (0..7).map(|_| backoff.pause().as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000]);
        backoff.reset();
        assert_eq!(backoff.pause(), FIRST);
    }

    #[test]
    fn jitter_shortens_by_up_to_half() {
        assert_eq!(Dice::fixed(0.0).jitter(LONGEST), LONGEST / 2);
        let mut dice = Dice::random();
        for _ in 0..100 {
            let pause = dice.jitter(LONGEST);
            assert!((LONGEST / 2..=LONGEST).contains(&pause), "{pause:?}");
        }
    }
}
