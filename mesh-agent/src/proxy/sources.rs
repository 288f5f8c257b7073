//! What one worker has in flight with one source address, or for one workload.

use std::{cell::RefCell, collections::HashMap, hash::Hash, rc::Rc};

/// Counts per key, on one thread.
#[derive(Debug)]
pub(super) struct Counts<K>(Rc<RefCell<HashMap<K, usize>>>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(Rc::default())
    }
}

impl<K: Hash + Eq + Clone> Counts<K> {
    /// One more for `key`, unless it has `limit` already. The map holds only keys that have any.
    pub fn enter(&self, key: K, limit: usize) -> Option<Counted<K>> {
        let mut counts = self.0.borrow_mut();
        let count = counts.entry(key.clone()).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Counted {
            counts: self.0.clone(),
            key,
        })
    }
}

/// One of a key's.
#[derive(Debug)]
pub(super) struct Counted<K: Hash + Eq> {
    counts: Rc<RefCell<HashMap<K, usize>>>,
    key: K,
}

impl<K: Hash + Eq> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.borrow_mut();
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_source_at_its_limit_is_refused_and_others_are_not() {
        let counts = Counts::default();
        let (noisy, quiet) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<_> = (0..3).map_while(|_| counts.enter(noisy, 3)).collect();
        assert_eq!(held.len(), 3);
        assert!(counts.enter(noisy, 3).is_none());
        assert!(counts.enter(quiet, 3).is_some());
        drop(held);
        assert!(counts.enter(noisy, 3).is_some(), "released again");
        assert!(
            counts.0.borrow().is_empty(),
            "no memory of sources that have none"
        );
    }
}
