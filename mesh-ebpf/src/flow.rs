//! `sock_ops`: records the connections that `sk_lookup` shall let through, and counts same-node flows. Attached to
//! the cgroups of workloads (`weft_flow`) and to the agent's (`weft_agent_flow`), never to the root: sock_ops costs
//! every TCP socket below it nine calls per connection.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_ebpf::{Address, EdgeCounters, EdgeKey, FastSocket, Flow, FlowKey, counter};

use crate::maps::{ADDRESSES, EDGES, FAST_SOCKETS, FLOWS, WORKLOADS, count, now_ns};

const AF_INET: u32 = 2;
/// include/net/tcp_states.h
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;

/// For the sockets of workloads.
#[sock_ops]
pub fn weft_flow(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => workload_connects(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changes(&ctx),
        _ => {}
    }
    1
}

/// For the sockets of the agent: its connections to applications, made with the client's address.
#[sock_ops]
pub fn weft_agent_flow(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => agent_connects(&ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_CLOSE => {
            let _ = FLOWS.remove(&tuple(&ctx));
        }
        _ => {}
    }
    1
}

/// Runs inside `connect(2)`, after the source port was chosen and before the SYN leaves.
#[inline(always)]
fn workload_connects(ctx: &SockOpsContext) {
    let key = tuple(ctx);
    let fast = fast_socket(ctx).filter(|fast| is_for(fast, &key));
    let Some(fast) = fast else {
        forget_own(ctx, &key);
        return;
    };
    let flow = Flow {
        started_ns: now_ns(),
        source_cookie: fast.edge.cookie,
        destination_cookie: fast.peer_cookie,
    };
    record(ctx, &key, &flow);
}

/// An earlier same-node flow may have had this tuple: its entry is not for the connection that begins now. The entry
/// of another workload stays, whatever address this one gave itself: without it that flow could not be revoked.
#[inline(always)]
fn forget_own(ctx: &SockOpsContext, key: &FlowKey) {
    // SAFETY: the context is valid for the program's run.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: plain data.
    if unsafe { FLOWS.get(key) }.is_some_and(|flow| flow.source_cookie == cookie) {
        let _ = FLOWS.remove(key);
    }
}

/// Whether the connection is the one that was let through. A workload that gave itself a foreign address is not
/// recorded: the source must be its own.
#[inline(always)]
fn is_for(fast: &FastSocket, key: &FlowKey) -> bool {
    let destination =
        key.destination == fast.edge.address && key.destination_port == fast.edge.port;
    // SAFETY: plain data.
    let owner = unsafe { ADDRESSES.get(&key.source) };
    destination && owner.is_some_and(|owner| owner.cookie == fast.edge.cookie)
}

#[inline(always)]
fn agent_connects(ctx: &SockOpsContext) {
    // SAFETY: the context is valid for the program's run.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: plain data.
    if unsafe { WORKLOADS.get(&cookie) }.is_none() {
        return;
    }
    let key = tuple(ctx);
    // SAFETY: plain data.
    let to_application =
        unsafe { ADDRESSES.get(&key.destination) }.is_some_and(|owner| owner.cookie == cookie);
    if to_application {
        record(
            ctx,
            &key,
            &Flow {
                started_ns: now_ns(),
                source_cookie: 0,
                destination_cookie: cookie,
            },
        );
    } else {
        let _ = FLOWS.remove(&key);
    }
}

#[inline(always)]
fn record(ctx: &SockOpsContext, key: &FlowKey, flow: &Flow) {
    if FLOWS.insert(key, flow, 0).is_err() {
        count(counter::FLOWS_FULL);
        return;
    }
    // Without the callback the entry would stay; then it is better not to have one.
    if ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_err() {
        let _ = FLOWS.remove(key);
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext) {
    if let Some(fast) = fast_socket(ctx) {
        update(&fast.edge, |counters| counters.opened += 1);
    }
}

#[inline(always)]
fn state_changes(ctx: &SockOpsContext) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    if new != TCP_CLOSE {
        return;
    }
    let _ = FLOWS.remove(&tuple(ctx));
    let Some(fast) = fast_socket(ctx) else { return };
    // SAFETY: the context is valid for the program's run.
    let _ = FAST_SOCKETS.remove(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    // SAFETY: fields of the context.
    let (sent, received, retransmits, srtt) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.ops).bytes_acked),
            core::ptr::read_volatile(&raw const (*ctx.ops).bytes_received),
            core::ptr::read_volatile(&raw const (*ctx.ops).total_retrans),
            core::ptr::read_volatile(&raw const (*ctx.ops).srtt_us),
        )
    };
    if old == TCP_SYN_SENT {
        update(&fast.edge, |counters| counters.failed += 1);
        return;
    }
    update(&fast.edge, |counters| {
        counters.closed += 1;
        counters.sent_bytes += sent;
        counters.received_bytes += received;
        counters.retransmits += u64::from(retransmits);
        // include/net/tcp.h: the field holds eight times the smoothed round-trip time.
        counters.rtt_us = u64::from(srtt >> 3);
    });
}

#[inline(always)]
fn fast_socket(ctx: &SockOpsContext) -> Option<FastSocket> {
    // SAFETY: the context is valid for the program's run; the value is plain data.
    unsafe { FAST_SOCKETS.get(bpf_get_socket_cookie(ctx.as_ptr())) }.copied()
}

#[inline(always)]
fn update(edge: &EdgeKey, change: impl FnOnce(&mut EdgeCounters)) {
    if EDGES.get_ptr_mut(edge).is_none() {
        let _ = EDGES.insert(edge, &EdgeCounters::default(), 0);
    }
    if let Some(counters) = EDGES.get_ptr_mut(edge) {
        // SAFETY: the value of this CPU; the verifier checked that it is not null.
        change(unsafe { &mut *counters });
    }
}

/// The connection as its client sees it; these sockets are all clients.
#[inline(always)]
fn tuple(ctx: &SockOpsContext) -> FlowKey {
    // SAFETY: u32 fields of the context, read one by one and all before any decision (see `lookup::read`).
    unsafe {
        let ops = ctx.ops;
        let family = core::ptr::read_volatile(&raw const (*ops).family);
        let local_ip4 = core::ptr::read_volatile(&raw const (*ops).local_ip4);
        let remote_ip4 = core::ptr::read_volatile(&raw const (*ops).remote_ip4);
        let local_ip6 = (&raw const (*ops).local_ip6).cast::<u32>();
        let remote_ip6 = (&raw const (*ops).remote_ip6).cast::<u32>();
        let word = |base: *const u32, i: usize| core::ptr::read_volatile(base.add(i));
        let local6 = [
            word(local_ip6, 0),
            word(local_ip6, 1),
            word(local_ip6, 2),
            word(local_ip6, 3),
        ];
        let remote6 = [
            word(remote_ip6, 0),
            word(remote_ip6, 1),
            word(remote_ip6, 2),
            word(remote_ip6, 3),
        ];
        let source_port = core::ptr::read_volatile(&raw const (*ops).local_port);
        // Network byte order in the upper half on little-endian machines (net/core/filter.c, sock_ops conversion).
        let remote_port = core::ptr::read_volatile(&raw const (*ops).remote_port);
        let v4 = family == AF_INET;
        FlowKey {
            source: if v4 {
                Address::v4(local_ip4)
            } else {
                Address { words: local6 }
            },
            destination: if v4 {
                Address::v4(remote_ip4)
            } else {
                Address { words: remote6 }
            },
            source_port,
            destination_port: u32::from_be(remote_port),
        }
    }
}
