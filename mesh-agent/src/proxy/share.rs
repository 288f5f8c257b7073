//! What the node has once, shared among its workloads.
//!
//! The rule is that of shared-buffer switches, the *dynamic threshold* (Choudhury and Hahne, 1998). As long as one part
//! in [`SCARCE_PART`] is free, a workload may take what it wants, up to limits of its own. Then it may hold no more than
//! is still free. So a storm ends with that part free for the others; whoever holds little is always served; and the
//! second storm leaves half of that part. Nothing that was given is taken back.
//!
//! Only numbers live here: no sockets, no clock.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::capture::Holdings;

/// The part of a budget, one in so many, in which holders of much are refused: enough for what neighbours need while a
/// storm lasts, little enough that a single busy workload has nearly all of the node.
pub const SCARCE_PART: u64 = 8;

/// Why something is not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scarce {
    /// Nothing is left.
    Exhausted,
    /// Little is left, and this workload holds more than that already.
    OverShare,
}

/// Whether a workload that holds `own` may have `amount` more of `total`, of which all workloads together hold `used`.
///
/// # Errors
/// Why not.
pub fn admits(total: u64, used: u64, own: u64, amount: u64) -> Result<(), Scarce> {
    let free = total
        .checked_sub(used)
        .and_then(|free| free.checked_sub(amount))
        .ok_or(Scarce::Exhausted)?;
    if free >= total / SCARCE_PART || own <= free {
        Ok(())
    } else {
        Err(Scarce::OverShare)
    }
}

/// Something that the node has once, shared by all workers.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    /// Where a workload's part of it is counted.
    account: fn(&Holdings) -> &AtomicU64,
    used: AtomicU64,
}

impl Budget {
    /// A budget of `total`, nothing of it used; each workload's part is counted in its `account`.
    #[must_use]
    pub fn new(total: u64, account: fn(&Holdings) -> &AtomicU64) -> Arc<Self> {
        Arc::new(Self {
            total,
            account,
            used: AtomicU64::new(0),
        })
    }

    /// How much there is.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How much is held now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `amount` for a workload.
    ///
    /// # Errors
    /// When the workload may not have it.
    pub fn take(self: &Arc<Self>, holder: &Arc<Holdings>, amount: u64) -> Result<Held, Scarce> {
        // Counted first: two workers that ask at once must not both get the last.
        let held = self.take_anyway(holder, amount);
        let used = self.used().saturating_sub(amount);
        let own = (self.account)(holder).load(Ordering::Relaxed);
        let own = own.saturating_sub(amount);
        admits(self.total, used, own, amount).map(|()| held)
    }

    /// Takes `amount` that is in use already, whether or not there is room.
    #[must_use]
    pub fn take_anyway(self: &Arc<Self>, holder: &Arc<Holdings>, amount: u64) -> Held {
        self.used.fetch_add(amount, Ordering::Relaxed);
        (self.account)(holder).fetch_add(amount, Ordering::Relaxed);
        Held {
            budget: self.clone(),
            holder: holder.clone(),
            amount,
        }
    }
}

/// What was taken; dropped, it is free again.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    holder: Arc<Holdings>,
    amount: u64,
}

impl Held {
    /// Keeps `amount` at most and gives the rest back.
    pub fn keep(&mut self, amount: u64) {
        let back = self.amount.saturating_sub(amount);
        self.amount -= back;
        self.budget.used.fetch_sub(back, Ordering::Relaxed);
        (self.budget.account)(&self.holder).fetch_sub(back, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.keep(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_alone_may_have_all_but_the_part_that_is_kept_free() {
        assert_eq!(admits(800, 0, 0, 1), Ok(()));
        assert_eq!(admits(800, 699, 699, 1), Ok(()), "a hundred stay free");
        assert_eq!(admits(800, 700, 700, 1), Err(Scarce::OverShare));
    }

    #[test]
    fn in_that_part_holders_of_little_are_served_to_the_last() {
        assert_eq!(admits(800, 790, 5, 1), Ok(()));
        assert_eq!(admits(800, 799, 0, 1), Ok(()), "the last one");
        assert_eq!(admits(800, 800, 0, 1), Err(Scarce::Exhausted));
        assert_eq!(admits(800, 799, 0, 2), Err(Scarce::Exhausted));
        assert_eq!(admits(800, 900, 0, 1), Err(Scarce::Exhausted), "beyond it");
    }

    fn budget(total: u64) -> Arc<Budget> {
        Budget::new(total, |holder| &holder.descriptors)
    }

    /// Lets every storm take what it can get, one after the other, and returns what each got.
    fn storms(budget: &Arc<Budget>, count: usize) -> (Vec<u64>, Vec<Held>) {
        let mut held = Vec::new();
        let mut got = Vec::new();
        for _ in 0..count {
            let holder = Arc::new(Holdings::default());
            while let Ok(more) = budget.take(&holder, 2) {
                held.push(more);
            }
            got.push(holder.descriptors.load(Ordering::Relaxed));
        }
        (got, held)
    }

    #[test]
    fn however_many_storms_come_one_after_the_other_something_is_left_for_a_quiet_workload() {
        let budget = budget(16_000);
        let (got, _held) = storms(&budget, 4);
        assert_eq!(got, [14_000, 1_000, 500, 250]);
        let quiet = Arc::new(Holdings::default());
        let hers: Vec<_> = (0..60).map_while(|_| budget.take(&quiet, 2).ok()).collect();
        assert_eq!(hers.len(), 60);
    }

    #[test]
    fn storms_that_take_turns_get_the_same() {
        let budget = budget(16_000);
        let holders: Vec<_> = (0..4).map(|_| Arc::new(Holdings::default())).collect();
        let mut held = Vec::new();
        loop {
            let before = held.len();
            held.extend(
                holders
                    .iter()
                    .filter_map(|holder| budget.take(holder, 2).ok()),
            );
            if held.len() == before {
                break;
            }
        }
        for holder in &holders {
            let own = holder.descriptors.load(Ordering::Relaxed);
            // A fifth each: what is free counts as one more.
            assert!((3_190..=3_500).contains(&own), "{own}");
        }
    }

    #[test]
    fn what_is_refused_or_dropped_leaves_no_trace() {
        let budget = budget(10);
        let holder = Arc::new(Holdings::default());
        assert_eq!(budget.take(&holder, 11).map(drop), Err(Scarce::Exhausted));
        assert_eq!(budget.used(), 0);
        let mut held = budget.take(&holder, 2).expect("there is room");
        held.keep(1);
        assert_eq!(
            (budget.used(), holder.descriptors.load(Ordering::Relaxed)),
            (1, 1)
        );
        held.keep(5);
        assert_eq!(budget.used(), 1, "more is never kept");
        drop(held);
        assert_eq!(
            (budget.used(), holder.descriptors.load(Ordering::Relaxed)),
            (0, 0)
        );
    }

    #[test]
    fn what_exists_already_counts_even_without_room() {
        let budget = budget(2);
        let holder = Arc::new(Holdings::default());
        let _listeners = budget.take_anyway(&holder, 4);
        assert_eq!(budget.take(&holder, 1).map(drop), Err(Scarce::Exhausted));
    }
}
