//! `sock_ops`: records the connections that `sk_lookup` shall let through, and counts same-node flows. Attached to
//! the cgroups of workloads (`weft_flow`) and to the agent's (`weft_agent_flow`), never to the root: sock_ops costs
//! every TCP socket below it nine calls per connection.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt},
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_ebpf::{Address, CAPTURE_MARK, EdgeCounters, EdgeKey, FastSocket, Flow, FlowKey, counter};

use crate::maps::{
    ADDRESSES, AGENT_FLOWS, EDGES, FAST_SOCKETS, FLOWS, WORKLOADS, count, generation, now_ns,
};

const AF_INET: u32 = 2;
/// include/net/tcp_states.h
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;
// include/uapi/asm-generic/socket.h
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;

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
            let _ = AGENT_FLOWS.remove(&tuple(&ctx));
        }
        _ => {}
    }
    1
}

/// Runs after the source port was chosen and before the SYN leaves. That is inside `connect(2)`, or with TCP Fast Open
/// at the first write. A flow that may not go the same-node way, or that could not be revoked, goes by the agent.
#[inline(always)]
fn workload_connects(ctx: &SockOpsContext) {
    let key = tuple(ctx);
    let fast = fast_socket(ctx).filter(|fast| {
        key.destination == fast.edge.address && key.destination_port == fast.edge.port
    });
    let Some(fast) = fast else {
        forget_own(ctx, &key);
        return;
    };
    let flow = Flow {
        started_ns: now_ns(),
        source_cookie: fast.edge.cookie,
        destination_cookie: fast.peer_cookie,
    };
    if is_good(&fast, &key, flow.started_ns) {
        if FLOWS.insert(&key, &flow, 0).is_ok() {
            // Without the callback the entry would stay; then it is better not to have one.
            if follow(ctx) {
                count(counter::SAME_NODE);
                return;
            }
        }
        count(counter::FLOWS_FULL);
    }
    forget_own(ctx, &key);
    // SAFETY: the context is valid for the program's run.
    let _ = FAST_SOCKETS.remove(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    if capture(ctx) {
        count(counter::CAPTURED);
    }
}

/// Whether the verdict of `connect(2)` still holds, and each end has its address. A workload that gave itself a foreign
/// address is not recorded, nor is a flow to a workload that has left the mesh.
#[inline(always)]
fn is_good(fast: &FastSocket, key: &FlowKey, now: u64) -> bool {
    // SAFETY: plain data.
    let (source, destination) =
        unsafe { (ADDRESSES.get(&key.source), ADDRESSES.get(&key.destination)) };
    generation() == Some(fast.generation)
        && now <= fast.expires_ns
        && source.is_some_and(|owner| owner.cookie == fast.edge.cookie)
        && destination.is_some_and(|owner| owner.cookie == fast.peer_cookie)
}

/// The kernel looks for the route again after this program (net/ipv4/tcp_output.c, `tcp_connect`), and a changed mark
/// voids the one that it had: the SYN goes where `connect(2)` would have sent it. A SYN that cannot be marked arrives
/// unrecorded, hence at the agent of the destination, as plaintext.
#[inline(always)]
fn capture(ctx: &SockOpsContext) -> bool {
    // SAFETY: the verifier gives `sk` as a socket or null; the fields are readable (`bpf_sock`).
    let (bound, mark) = unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            (0, 0)
        } else {
            ((*sk).bound_dev_if, (*sk).mark)
        }
    };
    (bound == 0 || set_option(ctx, SO_BINDTODEVICE, 0))
        && set_option(ctx, SO_MARK, mark | CAPTURE_MARK)
}

#[inline(always)]
fn set_option(ctx: &SockOpsContext, option: i32, mut value: u32) -> bool {
    // SAFETY: pointer and length describe `value`.
    let result = unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            size_of::<u32>() as i32,
        )
    };
    result == 0
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
        let flow = Flow {
            started_ns: now_ns(),
            source_cookie: 0,
            destination_cookie: cookie,
        };
        if AGENT_FLOWS.insert(&key, &flow, 0).is_err() {
            count(counter::FLOWS_FULL);
            fail(ctx);
        } else if !follow(ctx) {
            // Without the callback the entry would stay.
            let _ = AGENT_FLOWS.remove(&key);
        }
    } else {
        let _ = AGENT_FLOWS.remove(&key);
    }
}

/// A connection of the agent that is not recorded arrives at the agent's own listener, which would dial again, and so
/// on. Without the mark the answer to its SYN goes to the client that it shows, which knows nothing of it: the
/// connection fails by its deadline.
#[inline(always)]
fn fail(ctx: &SockOpsContext) {
    set_option(ctx, SO_MARK, 0);
}

/// Asks for the callbacks on changes of the socket's state.
#[inline(always)]
fn follow(ctx: &SockOpsContext) -> bool {
    ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_ok()
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
