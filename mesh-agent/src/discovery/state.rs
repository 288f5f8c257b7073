//! The index: what exists, keyed the ways the data path asks for it. Synchronous and pure; one change costs what the
//! changed resource itself is large, whatever the size of the mesh.
//!
//! ```text
//!   workloads (uid) ──┬── by_address (network, ip)        services (ns/hostname) ──┬── by_vip (network, ip)
//!                     ├── by_node (node, ns/name)                                  ├── ranges (network, prefix)
//!                     └── members (service key) ◄── held for services yet unknown ─┘
//!   policies (ns/name) ── global, by namespace
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::{
    identity::Identity,
    names::{NamespacedName, WorkloadUid},
    proto::workload::IpFamilies,
};

use super::{
    group::{Members, PolicyIndex, Ranges, prune},
    model::{BalancingMode, Policy, Service, Workload},
    update::{Change, Update},
};

/// A workload with what only the index needs.
#[derive(Debug, PartialEq)]
pub(super) struct WorkloadEntry {
    pub(super) workload: Arc<Workload>,
    /// The workload's identity as the list that endpoints share.
    pub(super) identities: Arc<[Identity]>,
    pub(super) waypoint: bool,
}

/// A service with what only the index needs.
#[derive(Debug, PartialEq)]
pub(super) struct ServiceEntry {
    pub(super) service: Arc<Service>,
    pub(super) virtual_addresses: Vec<VirtualAddress>,
    pub(super) families: IpFamilies,
    pub(super) waypoint: bool,
}

/// An address or a range in one network.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VirtualAddress {
    pub(super) network: Arc<str>,
    pub(super) range: IpNet,
}

impl VirtualAddress {
    fn host(&self) -> Option<IpAddr> {
        (self.range.prefix_len() == self.range.max_prefix_len()).then(|| self.range.addr())
    }
}

/// The index: pure state, fed by [`client`](super::client) and by the snapshot.
#[derive(Debug, Default)]
pub struct MeshState {
    /// The network of this node.
    pub(super) network: Arc<str>,
    pub(super) workloads: HashMap<WorkloadUid, Arc<WorkloadEntry>>,
    /// In the order of arrival: of two equals, the later one is the pod that got a reused address.
    pub(super) by_address: HashMap<Arc<str>, HashMap<IpAddr, Vec<Arc<WorkloadEntry>>>>,
    by_node: HashMap<Arc<str>, HashMap<NamespacedName, Vec<WorkloadUid>>>,
    pub(super) services: HashMap<NamespacedName, Arc<ServiceEntry>>,
    pub(super) members: HashMap<NamespacedName, Members>,
    pub(super) by_vip: HashMap<Arc<str>, HashMap<IpAddr, BTreeSet<NamespacedName>>>,
    pub(super) ranges: HashMap<Arc<str>, Ranges>,
    pub(super) policies: PolicyIndex,
    /// All policies were told once, by the control plane or by the snapshot. "None" means nothing before.
    policies_known: bool,
    dead: BTreeSet<SocketAddr>,
    /// Entries visited by changes, so that a test can tell that their cost does not grow with the mesh.
    #[cfg(test)]
    steps: std::sync::atomic::AtomicUsize,
}

/// How many resources the index holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Workloads.
    pub workloads: usize,
    /// Services.
    pub services: usize,
    /// Policies, stand-ins included.
    pub policies: usize,
    /// Policies that were refused and for which a stand-in denies.
    pub stand_ins: usize,
}

impl MeshState {
    /// An empty index for a node of `network` (empty: the default network).
    #[must_use]
    pub fn new(network: &str) -> Self {
        Self {
            network: network.into(),
            ..Self::default()
        }
    }

    /// How many resources are held.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            workloads: self.workloads.len(),
            services: self.services.len(),
            policies: self.policies.all.len(),
            stand_ins: self.policies.stand_ins,
        }
    }

    #[cfg(test)]
    pub(super) fn steps(&self) -> usize {
        self.steps.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn count_step(&self) {
        #[cfg(test)]
        self.steps
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Applies one change; whether anything differs afterwards.
    pub fn apply(&mut self, update: Update) -> bool {
        match update.0 {
            Change::Workload(entry) => self.put_workload(entry),
            Change::Service(entry) => self.put_service(entry),
            Change::Policy(policy) => self.policies.put(policy),
            Change::StandIn(policy) => {
                let held = self.policies.all.get(&policy.key);
                let good = held.is_some_and(|held| !held.compiled.stand_in);
                !good && self.policies.put(policy)
            }
            Change::RemoveAddress(name) => self.remove_address(&name),
            Change::RemovePolicy(name) => name.parse().is_ok_and(|key| self.policies.remove(&key)),
            Change::PoliciesKnown => !std::mem::replace(&mut self.policies_known, true),
        }
    }

    /// Service addresses that have no usable endpoint for any client, for the kernel to refuse in `connect(2)`.
    /// Services behind a waypoint are not among them: the proxy refuses those and says why.
    #[must_use]
    pub fn dead_destinations(&self) -> Vec<SocketAddr> {
        self.dead.iter().copied().collect()
    }

    /// The workload of that name on `node`.
    #[must_use]
    pub fn local_workload(&self, node: &str, namespace: &str, name: &str) -> Option<Arc<Workload>> {
        let uid = self
            .by_node
            .get(node)?
            .get(&NamespacedName::new(namespace, name))?
            .last()?;
        self.workloads
            .get(uid)
            .map(|entry| Arc::clone(&entry.workload))
    }

    /// Every policy that applies to `workload`: its namespace's, the global ones, and those that select it.
    /// `None` before the policies were told, and when a policy that is listed is unknown: unknown means deny.
    #[must_use]
    pub fn policies(&self, workload: &Workload) -> Option<Vec<Arc<Policy>>> {
        if !self.policies_known {
            return None;
        }
        let mut found: Vec<Arc<Policy>> = self.policies.global.values().cloned().collect();
        found.extend(
            self.policies
                .namespaces
                .get(&*workload.namespace)
                .into_iter()
                .flatten()
                .map(|(_, p)| p.clone()),
        );
        for key in &workload.policies {
            let policy = self.policies.all.get(key)?;
            if !found.iter().any(|p| p.key == *key) {
                found.push(Arc::clone(policy));
            }
        }
        Some(found)
    }

    fn put_workload(&mut self, entry: Arc<WorkloadEntry>) -> bool {
        let uid = &entry.workload.uid;
        let old = self.workloads.get(uid).cloned();
        if old.as_ref() == Some(&entry) {
            return false;
        }
        if let Some(old) = &old {
            self.unlink_members(old);
            if old.workload.node != entry.workload.node || old.workload.name != entry.workload.name
            {
                self.unlink_node(old);
            }
        }
        self.link_addresses(old.as_deref(), &entry);
        self.link_members(&entry);
        let w = &entry.workload;
        let name = NamespacedName {
            namespace: w.namespace.clone(),
            name: w.name.clone(),
        };
        let named = self
            .by_node
            .entry(w.node.clone())
            .or_default()
            .entry(name)
            .or_default();
        if !named.contains(uid) {
            named.push(uid.clone());
        }
        let touched = services_of(old.as_deref(), &entry);
        self.workloads.insert(uid.clone(), entry);
        self.refresh_dead_of(&touched);
        true
    }

    fn remove_workload(&mut self, uid: &WorkloadUid) -> bool {
        let Some(old) = self.workloads.remove(uid) else {
            return false;
        };
        for address in indexed_addresses(&old) {
            self.unlink_address(&old.workload.network, address, uid);
        }
        self.unlink_members(&old);
        self.unlink_node(&old);
        let touched: Vec<_> = old.workload.services.keys().cloned().collect();
        self.refresh_dead_of(&touched);
        true
    }

    /// A workload keeps its place in the order of arrival at an address that it already had.
    fn link_addresses(&mut self, old: Option<&WorkloadEntry>, entry: &Arc<WorkloadEntry>) {
        let uid = &entry.workload.uid;
        if let Some(old) = old {
            let moved = old.workload.network != entry.workload.network;
            for address in indexed_addresses(old) {
                if moved || !indexed_addresses(entry).any(|a| a == address) {
                    self.unlink_address(&old.workload.network, address, uid);
                }
            }
        }
        for address in indexed_addresses(entry) {
            let network = self
                .by_address
                .entry(entry.workload.network.clone())
                .or_default();
            let owners = network.entry(address).or_default();
            match owners.iter_mut().find(|owner| owner.workload.uid == *uid) {
                Some(owner) => *owner = Arc::clone(entry),
                None => owners.push(Arc::clone(entry)),
            }
        }
    }

    fn unlink_address(&mut self, network: &Arc<str>, address: IpAddr, uid: &WorkloadUid) {
        prune(&mut self.by_address, network, |addresses| {
            prune(addresses, &address, |owners| {
                owners.retain(|owner| owner.workload.uid != *uid);
                owners.is_empty()
            });
            addresses.is_empty()
        });
    }

    fn unlink_node(&mut self, old: &WorkloadEntry) {
        let w = &old.workload;
        let name = NamespacedName {
            namespace: w.namespace.clone(),
            name: w.name.clone(),
        };
        prune(&mut self.by_node, &w.node, |names| {
            prune(names, &name, |uids| {
                uids.retain(|uid| *uid != w.uid);
                uids.is_empty()
            });
            names.is_empty()
        });
    }

    fn link_members(&mut self, entry: &Arc<WorkloadEntry>) {
        let reachable = self.is_reachable(entry);
        for (key, ports) in &entry.workload.services {
            self.count_step();
            let members = self.members.entry(key.clone()).or_default();
            members
                .entries
                .insert(entry.workload.uid.clone(), Arc::clone(entry));
            if reachable {
                members.usable.add(entry.workload.healthy, ports);
            }
        }
    }

    fn unlink_members(&mut self, old: &WorkloadEntry) {
        let reachable = self.is_reachable(old);
        for (key, ports) in &old.workload.services {
            self.count_step();
            prune(&mut self.members, key, |members| {
                members.entries.remove(&old.workload.uid);
                if reachable {
                    members.usable.remove(old.workload.healthy, ports);
                }
                members.entries.is_empty()
            });
        }
    }

    /// Whether a client of this node's network can dial it: gateways to other networks are not supported.
    fn is_reachable(&self, entry: &WorkloadEntry) -> bool {
        !entry.workload.addresses.is_empty() && entry.workload.network == self.network
    }

    fn put_service(&mut self, entry: Arc<ServiceEntry>) -> bool {
        let key = entry.service.key.clone();
        let old = self.services.get(&key).cloned();
        if old.as_ref() == Some(&entry) {
            return false;
        }
        if let Some(old) = &old {
            self.unlink_service(old);
        }
        for virtual_address in &entry.virtual_addresses {
            let network = virtual_address.network.clone();
            match virtual_address.host() {
                Some(vip) => {
                    self.by_vip
                        .entry(network)
                        .or_default()
                        .entry(vip)
                        .or_default()
                        .insert(key.clone());
                }
                None => self
                    .ranges
                    .entry(network)
                    .or_default()
                    .insert(virtual_address.range, key.clone()),
            }
        }
        self.services.insert(key, Arc::clone(&entry));
        if let Some(old) = old {
            self.refresh_dead(&old, true);
        }
        self.refresh_dead(&entry, true);
        true
    }

    fn unlink_service(&mut self, old: &ServiceEntry) {
        let key = &old.service.key;
        for VirtualAddress { network, range } in &old.virtual_addresses {
            prune(&mut self.ranges, network, |ranges| {
                ranges.remove(range, key)
            });
            prune(&mut self.by_vip, network, |vips| {
                prune(vips, &range.addr(), |keys| {
                    keys.remove(key);
                    keys.is_empty()
                });
                vips.is_empty()
            });
        }
    }

    /// A name is a workload's uid first; else, if nothing but the first `/` divides it, a service's key.
    fn remove_address(&mut self, name: &str) -> bool {
        if self.remove_workload(&WorkloadUid::from(name)) {
            return true;
        }
        let Ok(key) = name.parse::<NamespacedName>() else {
            return false;
        };
        let Some(old) = self.services.remove(&key) else {
            return false;
        };
        self.unlink_service(&old);
        self.refresh_dead(&old, true);
        true
    }

    fn refresh_dead_of(&mut self, services: &[NamespacedName]) {
        for key in services {
            if let Some(entry) = self.services.get(key).cloned() {
                self.refresh_dead(&entry, false);
            }
        }
    }

    /// Recomputes the verdict on the service's addresses. When the service itself changed, so may the verdict on ports
    /// that only its neighbours at the same address define.
    fn refresh_dead(&mut self, entry: &ServiceEntry, neighbours: bool) {
        for virtual_address in entry
            .virtual_addresses
            .iter()
            .filter(|v| v.network == self.network)
        {
            let Some(vip) = virtual_address.host() else {
                continue;
            };
            let mut ports: BTreeSet<u16> = entry.service.ports.keys().copied().collect();
            if neighbours {
                ports.extend(self.services_at(vip).flat_map(|e| e.service.ports.keys()));
            }
            for port in ports {
                self.count_step();
                let address = SocketAddr::new(vip, port);
                if self.is_dead(vip, port) {
                    self.dead.insert(address);
                } else {
                    self.dead.remove(&address);
                }
            }
        }
    }

    fn services_at(&self, vip: IpAddr) -> impl Iterator<Item = &Arc<ServiceEntry>> {
        let keys = self
            .by_vip
            .get(&self.network)
            .and_then(|vips| vips.get(&vip));
        keys.into_iter()
            .flatten()
            .filter_map(|key| self.services.get(key))
    }

    /// Dead for any client: every service at the address is, and one of them is visible to all (clients that see none
    /// of them dial the address as it is).
    fn is_dead(&self, vip: IpAddr, port: u16) -> bool {
        let services = || self.services_at(vip);
        services().any(|e| !e.service.namespace_only)
            && services().any(|e| e.service.ports.contains_key(&port))
            && services().all(|e| self.is_dead_in(e, port))
    }

    fn is_dead_in(&self, entry: &ServiceEntry, port: u16) -> bool {
        if entry.waypoint || entry.service.mode == BalancingMode::Passthrough {
            return false;
        }
        let Some(target) = entry.service.ports.get(&port) else {
            return true;
        };
        let Some(members) = self.members.get(&entry.service.key) else {
            return true;
        };
        !members
            .usable
            .any(port, *target, entry.service.allow_unhealthy)
    }
}

fn services_of(old: Option<&WorkloadEntry>, new: &WorkloadEntry) -> Vec<NamespacedName> {
    let old = old.into_iter().flat_map(|old| old.workload.services.keys());
    let gone = old.filter(|key| !new.workload.services.contains_key(*key));
    gone.chain(new.workload.services.keys()).cloned().collect()
}

/// Host-network workloads share their node's addresses and are never found by them.
fn indexed_addresses(entry: &WorkloadEntry) -> impl Iterator<Item = IpAddr> {
    entry
        .workload
        .addresses
        .iter()
        .copied()
        .filter(|_| !entry.workload.host_network)
}
