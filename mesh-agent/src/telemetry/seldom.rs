//! Log lines about what strangers can cause as often as they like: one line a period tells how many were held back.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Lets one line per period through. Belongs to one thread.
#[derive(Debug)]
pub struct Seldom {
    period: Duration,
    last: Cell<Option<Instant>>,
    held_back: Cell<u64>,
}

impl Seldom {
    /// At most one line per `period`.
    #[must_use]
    pub const fn every(period: Duration) -> Self {
        Self {
            period,
            last: Cell::new(None),
            held_back: Cell::new(0),
        }
    }

    /// How many lines were held back since the last one, if it is time for another; else this one is held back too.
    #[must_use]
    pub fn line(&self, now: Instant) -> Option<u64> {
        let soon = |last: Instant| now.saturating_duration_since(last) < self.period;
        if self.last.get().is_some_and(soon) {
            self.held_back.set(self.held_back.get() + 1);
            return None;
        }
        self.last.set(Some(now));
        Some(self.held_back.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_period_tells_how_many_there_were() {
        let seldom = Seldom::every(Duration::from_secs(1));
        let began = Instant::now();
        let lines =
            [0, 1, 999, 1000, 1500, 5000].map(|ms| seldom.line(began + Duration::from_millis(ms)));
        assert_eq!(lines, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
