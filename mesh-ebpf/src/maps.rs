//! The maps. All are pinned by name, so that a new agent finds what the previous one left.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release},
    macros::map,
    maps::{Array, HashMap, LruHashMap, LruPerCpuHashMap, PerCpuArray, SockHash},
};
use mesh_ebpf::{
    ADDRESSES_MAX, AGENT_FLOWS_PER_FLOW, Address, DEAD_MAX, Destination, EDGES_MAX, EdgeCounters,
    EdgeKey, FAST_SOCKETS_MAX, FLOWS_MAX, FastSocket, Flow, FlowKey, Globals, LISTENERS_MAX,
    ListenerKey, VERDICTS_MAX, Verdict, WORKLOADS_MAX, Workload, counter,
};

/// Memory is taken per entry, not up front: most nodes use a small part.
const NO_PREALLOC: u32 = aya_ebpf::bindings::BPF_F_NO_PREALLOC;

#[map]
pub static GLOBALS: Array<Globals> = Array::pinned(1, 0);
#[map]
pub static WORKLOADS: HashMap<u64, Workload> = HashMap::pinned(WORKLOADS_MAX, NO_PREALLOC);
#[map]
pub static ADDRESSES: HashMap<Address, Workload> = HashMap::pinned(ADDRESSES_MAX, NO_PREALLOC);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(LISTENERS_MAX, 0);
#[map]
pub static VERDICTS: LruHashMap<EdgeKey, Verdict> = LruHashMap::pinned(VERDICTS_MAX, 0);
#[map]
pub static DEAD: HashMap<Destination, u32> = HashMap::pinned(DEAD_MAX, NO_PREALLOC);
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::pinned(FLOWS_MAX, NO_PREALLOC);
#[map]
pub static AGENT_FLOWS: HashMap<FlowKey, Flow> =
    HashMap::pinned(FLOWS_MAX * AGENT_FLOWS_PER_FLOW, NO_PREALLOC);
#[map]
pub static FAST_SOCKETS: LruHashMap<u64, FastSocket> = LruHashMap::pinned(FAST_SOCKETS_MAX, 0);
#[map]
pub static EDGES: LruPerCpuHashMap<EdgeKey, EdgeCounters> = LruPerCpuHashMap::pinned(EDGES_MAX, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(counter::COUNT, 0);
#[map]
static LAST_LOG: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// At most one kernel log line per CPU in this time, nanoseconds: a storm must not drown the agent's log.
const LOG_INTERVAL_NS: u64 = 1_000_000_000;

/// `CLOCK_MONOTONIC`, nanoseconds.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: takes no argument and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts an event (`mesh_ebpf::counter`).
#[inline(always)]
pub fn count(index: u32) {
    if let Some(slot) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a per-CPU slot; the verifier checked the bound, and a program is not preempted by itself here.
        unsafe { *slot += 1 };
    }
}

/// Whether this CPU may write a log line now.
#[inline(always)]
pub fn may_log() -> bool {
    let Some(last) = LAST_LOG.get_ptr_mut(0) else {
        return false;
    };
    let now = now_ns();
    // SAFETY: a per-CPU slot, bound checked by the verifier.
    unsafe {
        if now - *last < LOG_INTERVAL_NS {
            return false;
        }
        *last = now;
    }
    true
}

/// The mesh's generation; none before the agent has set it.
#[inline(always)]
pub fn generation() -> Option<u64> {
    GLOBALS.get(0).map(|globals| globals.generation)
}

/// Whether an agent listens for this workload: entries of the listener map vanish with the listener.
#[inline(always)]
pub fn agent_listens(cookie: u64, class: u32) -> bool {
    let key = ListenerKey {
        cookie,
        class,
        padding: 0,
    };
    let map = (&raw const LISTENERS).cast_mut().cast::<c_void>();
    // SAFETY: the map is a SOCKHASH; the helper returns a referenced socket or null, and the reference is given back.
    unsafe {
        let socket = bpf_map_lookup_elem(map, (&raw const key).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}
