//! The groups that the index is made of: members of a service, ranges of addresses, policies.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::names::{NamespacedName, WorkloadUid};

use super::{model::Policy, state::WorkloadEntry};
use crate::policy::Reach;

/// The workloads of one service, known or not yet known.
#[derive(Debug, Default)]
pub(super) struct Members {
    pub(super) entries: BTreeMap<WorkloadUid, Arc<WorkloadEntry>>,
    pub(super) usable: Usable,
}

/// How many members can be dialled, so that "none" is known without walking them.
#[derive(Debug, Default)]
pub(super) struct Usable {
    total: HealthCount,
    /// By service port, members that map it themselves.
    mapped: BTreeMap<u16, HealthCount>,
}

#[derive(Debug, Default)]
struct HealthCount {
    all: usize,
    healthy: usize,
}

impl HealthCount {
    fn any(&self, unhealthy_too: bool) -> bool {
        if unhealthy_too {
            self.all > 0
        } else {
            self.healthy > 0
        }
    }
}

impl Usable {
    pub(super) fn add(&mut self, healthy: bool, ports: &BTreeMap<u16, u16>) {
        let mapped = &mut self.mapped;
        let count = |c: &mut HealthCount| {
            c.all += 1;
            c.healthy += usize::from(healthy);
        };
        count(&mut self.total);
        ports
            .keys()
            .for_each(|port| count(mapped.entry(*port).or_default()));
    }

    pub(super) fn remove(&mut self, healthy: bool, ports: &BTreeMap<u16, u16>) {
        let uncount = |c: &mut HealthCount| {
            c.all = c.all.saturating_sub(1);
            c.healthy = c.healthy.saturating_sub(usize::from(healthy));
        };
        uncount(&mut self.total);
        for port in ports.keys() {
            if let Some(count) = self.mapped.get_mut(port) {
                uncount(count);
                if count.all == 0 {
                    self.mapped.remove(port);
                }
            }
        }
    }

    pub(super) fn any(&self, port: u16, target: u16, unhealthy_too: bool) -> bool {
        let count = if target > 0 {
            Some(&self.total)
        } else {
            self.mapped.get(&port)
        };
        count.is_some_and(|count| count.any(unhealthy_too))
    }
}

/// Ranges of virtual addresses of one network, found by trying each prefix length in use.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    by_range: HashMap<IpNet, BTreeSet<NamespacedName>>,
    /// How many ranges have this length, for IPv4 and IPv6 apart.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Ranges {
    pub(super) fn insert(&mut self, range: IpNet, key: NamespacedName) {
        let keys = self.by_range.entry(range).or_default();
        if keys.is_empty() {
            *self.lengths.entry(length_key(range)).or_default() += 1;
        }
        keys.insert(key);
    }

    /// Whether nothing is left.
    pub(super) fn remove(&mut self, range: &IpNet, key: &NamespacedName) -> bool {
        if let Some(keys) = self.by_range.get_mut(range)
            && keys.remove(key)
            && keys.is_empty()
        {
            self.by_range.remove(range);
            if let Some(count) = self.lengths.get_mut(&length_key(*range)) {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&length_key(*range));
                }
            }
        }
        self.by_range.is_empty()
    }

    /// Every service with a range around the address, with the length of its prefix.
    pub(super) fn containing(
        &self,
        address: IpAddr,
    ) -> impl Iterator<Item = (u8, &NamespacedName)> {
        let lengths = self
            .lengths
            .keys()
            .filter(move |(v6, _)| *v6 == address.is_ipv6());
        lengths.flat_map(move |(_, length)| {
            let range = IpNet::new(address, *length).ok().map(|net| net.trunc());
            let keys = range.and_then(|range| self.by_range.get(&range));
            keys.into_iter().flatten().map(move |key| (*length, key))
        })
    }
}

fn length_key(range: IpNet) -> (bool, u8) {
    (range.addr().is_ipv6(), range.prefix_len())
}

/// Policies by key and by reach.
#[derive(Debug, Default)]
pub(super) struct PolicyIndex {
    pub(super) all: HashMap<NamespacedName, Arc<Policy>>,
    pub(super) global: BTreeMap<NamespacedName, Arc<Policy>>,
    pub(super) namespaces: HashMap<Arc<str>, BTreeMap<NamespacedName, Arc<Policy>>>,
    pub(super) stand_ins: usize,
}

impl PolicyIndex {
    pub(super) fn put(&mut self, policy: Arc<Policy>) -> bool {
        let key = policy.key.clone();
        if self.all.get(&key) == Some(&policy) {
            return false;
        }
        self.remove(&key);
        match policy.compiled.reach {
            Reach::Global => {
                self.global.insert(key.clone(), Arc::clone(&policy));
            }
            Reach::Namespace => {
                let namespace = self.namespaces.entry(key.namespace.clone()).or_default();
                namespace.insert(key.clone(), Arc::clone(&policy));
            }
            Reach::Selected => {}
        }
        self.stand_ins += usize::from(policy.compiled.stand_in);
        self.all.insert(key, policy);
        true
    }

    pub(super) fn remove(&mut self, key: &NamespacedName) -> bool {
        self.global.remove(key);
        prune(&mut self.namespaces, &key.namespace, |policies| {
            policies.remove(key);
            policies.is_empty()
        });
        let removed = self.all.remove(key);
        self.stand_ins -= usize::from(
            removed
                .as_ref()
                .is_some_and(|policy| policy.compiled.stand_in),
        );
        removed.is_some()
    }
}

/// Lets `trim` change the value at `key`, and drops the value when `trim` says that it is empty.
pub(super) fn prune<K: std::hash::Hash + Eq, V>(
    map: &mut HashMap<K, V>,
    key: &K,
    trim: impl FnOnce(&mut V) -> bool,
) {
    if map.get_mut(key).is_some_and(trim) {
        map.remove(key);
    }
}
