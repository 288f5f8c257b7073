//! What the agent reads and writes in the maps of its programs.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    sync::PoisonError,
};

use aya::maps::MapError;
use mesh_ebpf::{
    Address, Destination, EdgeCounters, EdgeKey, Flow, FlowKey, Globals, ListenerKey, Verdict,
    Workload,
};

use super::{Kernel, Maps, address};
use crate::{
    capture::{CaptureError, Listeners},
    sys::netns::NetnsCookie,
};

/// Of listeners.
const CLASSES: [u32; 3] = [
    mesh_ebpf::CLASS_OUTBOUND,
    mesh_ebpf::CLASS_PLAINTEXT,
    mesh_ebpf::CLASS_TUNNEL,
];

impl Kernel {
    /// Puts the listeners where the programs find them.
    pub(in crate::capture) fn set_listeners(
        &self,
        cookie: NetnsCookie,
        listeners: &Listeners,
    ) -> Result<(), CaptureError> {
        let mut maps = self.lock();
        let classes = [
            (mesh_ebpf::CLASS_OUTBOUND, &listeners.outbound),
            (mesh_ebpf::CLASS_PLAINTEXT, &listeners.plaintext),
            (mesh_ebpf::CLASS_TUNNEL, &listeners.tunnel),
        ];
        for (class, listener) in classes {
            let key = ListenerKey {
                cookie: cookie.0,
                class,
                padding: 0,
            };
            maps.listeners
                .insert(key, listener.as_raw_fd(), 0)
                .map_err(|error| CaptureError::map("LISTENERS", error))?;
        }
        Ok(())
    }

    /// Makes the programs know the workload's addresses (inbound).
    ///
    /// # Errors
    /// When the map is full.
    pub fn set_addresses(
        &self,
        workload: Workload,
        addresses: &[IpAddr],
    ) -> Result<(), CaptureError> {
        let mut maps = self.lock();
        for ip in addresses {
            let key = address(*ip);
            maps.addresses
                .insert(key, workload, 0)
                .map_err(|error| CaptureError::map("ADDRESSES", error))?;
        }
        Ok(())
    }

    /// Makes the connect hooks capture the workload (outbound).
    pub(in crate::capture) fn set_workload(&self, workload: Workload) -> Result<(), CaptureError> {
        self.lock()
            .workloads
            .insert(workload.cookie, workload, 0)
            .map_err(|error| CaptureError::map("WORKLOADS", error))
    }

    /// Stops capturing a namespace. Outbound first: what `connect(2)` still captured would find nobody once the inbound
    /// program or the listeners have gone.
    pub(in crate::capture) fn let_go(&self, cookie: NetnsCookie) {
        report("WORKLOADS", self.lock().workloads.remove(&cookie.0));
        self.detach_workload(cookie);
        self.forget(cookie);
    }

    /// Forgets what belongs to a namespace, live flows aside: those must still be found to be ended.
    fn forget(&self, cookie: NetnsCookie) {
        let mut maps = self.lock();
        let addresses: Vec<Address> = maps
            .addresses
            .iter()
            .flatten()
            .filter(|(_, w)| w.cookie == cookie.0)
            .map(|(a, _)| a)
            .collect();
        for key in addresses {
            report("ADDRESSES", maps.addresses.remove(&key));
        }
        for class in CLASSES {
            report(
                "LISTENERS",
                maps.listeners.remove(&ListenerKey {
                    cookie: cookie.0,
                    class,
                    padding: 0,
                }),
            );
        }
        let edges: Vec<EdgeKey> = maps
            .edges
            .keys()
            .flatten()
            .filter(|key| key.cookie == cookie.0)
            .collect();
        for key in edges {
            report("EDGES", maps.edges.remove(&key));
        }
    }

    /// Namespace that an address belongs to.
    pub(in crate::capture) fn owner(&self, ip: IpAddr) -> Option<u64> {
        self.lock()
            .addresses
            .get(&address(ip), 0)
            .ok()
            .map(|workload| workload.cookie)
    }

    /// Namespaces that the programs know, whoever enrolled them.
    pub(in crate::capture) fn known_workloads(&self) -> Vec<NetnsCookie> {
        self.lock()
            .workloads
            .keys()
            .flatten()
            .map(NetnsCookie)
            .collect()
    }

    /// Whether the programs know the workload as it should be, for the status.
    pub(in crate::capture) fn workload(&self, cookie: NetnsCookie) -> Option<Workload> {
        self.lock().workloads.get(&cookie.0, 0).ok()
    }

    /// Whether all these addresses are the workload's, with its settings.
    pub(in crate::capture) fn has_addresses(
        &self,
        workload: Workload,
        addresses: &[IpAddr],
    ) -> bool {
        let maps = self.lock();
        let mut addresses = addresses.iter();
        addresses.all(|ip| maps.addresses.get(&address(*ip), 0).ok() == Some(workload))
    }

    /// Namespaces all listeners of which the programs find. Only the keys can be read, one after the other: the values
    /// are sockets.
    pub(in crate::capture) fn listening(&self) -> HashSet<NetnsCookie> {
        let mut found: HashMap<u64, usize> = HashMap::new();
        for key in self.lock().listeners.keys().flatten() {
            *found.entry(key.cookie).or_default() += 1;
        }
        let whole = found
            .into_iter()
            .filter(|(_, listeners)| *listeners == CLASSES.len());
        whole.map(|(cookie, _)| NetnsCookie(cookie)).collect()
    }

    /// Voids all verdicts of other generations.
    pub(in crate::capture) fn set_generation(&self, generation: u64) -> Result<(), CaptureError> {
        self.lock()
            .globals
            .set(0, Globals { generation }, 0)
            .map_err(|error| CaptureError::map("GLOBALS", error))
    }

    /// Replaces the set of service addresses that `connect(2)` refuses. More than the map holds are left to the proxy.
    pub(in crate::capture) fn set_dead(&self, destinations: &[SocketAddr]) {
        let wanted: HashSet<Destination> = destinations
            .iter()
            .map(|d| Destination {
                address: address(d.ip()),
                port: u32::from(d.port()),
            })
            .collect();
        let mut maps = self.lock();
        let present: Vec<Destination> = maps.dead.keys().flatten().collect();
        for key in &present {
            if !wanted.contains(key) {
                report("DEAD", maps.dead.remove(key));
            }
        }
        for key in wanted.into_iter().take(mesh_ebpf::DEAD_MAX as usize) {
            if let Err(error) = maps.dead.insert(key, 1, 0) {
                tracing::warn!(%error, "cannot mark a service without endpoints; the proxy refuses its connections instead");
                return;
            }
        }
    }

    /// Same-node flows that live now.
    pub(in crate::capture) fn same_node_flows(&self) -> Vec<(FlowKey, Flow)> {
        self.lock().flows.iter().flatten().collect()
    }

    /// Connections of agents to applications.
    pub(in crate::capture) fn agent_flows(&self) -> Vec<(FlowKey, Flow)> {
        self.lock().agent_flows.iter().flatten().collect()
    }

    /// Forgets a flow that was destroyed.
    pub(in crate::capture) fn forget_flow(&self, key: &FlowKey) {
        report("FLOWS", self.lock().flows.remove(key));
    }

    /// Forgets a connection that has ended, unless another one has its ends by now.
    pub(in crate::capture) fn forget_ended(&self, key: &FlowKey, flow: &Flow) {
        let mut maps = self.lock();
        let Maps {
            flows, agent_flows, ..
        } = &mut *maps;
        for (name, map) in [("FLOWS", flows), ("AGENT_FLOWS", agent_flows)] {
            if map.get(key, 0).ok().as_ref() == Some(flow) {
                report(name, map.remove(key));
            }
        }
    }

    /// What same-node edges did since they were first seen.
    pub(in crate::capture) fn edges(&self) -> Vec<(EdgeKey, EdgeCounters)> {
        let maps = self.lock();
        let sum = |values: &aya::maps::PerCpuValues<EdgeCounters>| {
            values
                .iter()
                .fold(EdgeCounters::default(), |mut total, one| {
                    total.opened += one.opened;
                    total.closed += one.closed;
                    total.failed += one.failed;
                    total.sent_bytes += one.sent_bytes;
                    total.received_bytes += one.received_bytes;
                    total.retransmits += one.retransmits;
                    total.rtt_us = total.rtt_us.max(one.rtt_us);
                    total
                })
        };
        maps.edges
            .iter()
            .flatten()
            .map(|(key, values)| (key, sum(&values)))
            .collect()
    }

    /// Sums of the event counters (`mesh_ebpf::counter`).
    #[must_use]
    pub fn counters(&self) -> [u64; mesh_ebpf::counter::COUNT as usize] {
        let maps = self.lock();
        std::array::from_fn(|index| {
            let values = maps
                .counters
                .get(&u32::try_from(index).unwrap_or(u32::MAX), 0);
            values.map_or(0, |values| values.iter().sum())
        })
    }

    pub(in crate::capture) fn set_verdict(
        &self,
        key: EdgeKey,
        verdict: Verdict,
    ) -> Result<(), MapError> {
        self.verdicts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, verdict, 0)
    }
}

/// An entry that is not there is as good as removed.
fn report(map: &'static str, result: Result<(), MapError>) {
    match result {
        Ok(()) | Err(MapError::KeyNotFound | MapError::ElementNotFound) => {}
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => tracing::warn!(map, %error, "cannot remove an entry"),
    }
}
