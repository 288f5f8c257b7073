//! `cgroup/connect4` and `cgroup/connect6`: every `connect(2)` of the node comes by here. Sockets of namespaces that
//! are not enrolled leave after one map look-up.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
        bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use mesh_ebpf::{
    Address, CAPTURE_MARK, CLASS_OUTBOUND, Destination, EdgeKey, FLAG_FAIL_CLOSED, FLAG_SAME_NODE,
    FastSocket, VERDICT_DENIED, VERDICT_PASS, VERDICT_SAME_NODE, Verdict, Workload, counter,
};

use crate::maps::{
    ADDRESSES, DEAD, FAST_SOCKETS, VERDICTS, WORKLOADS, agent_listens, count, generation, may_log,
    now_ns,
};

/// Inode of the agent's cgroup, which names it (`bpf_get_current_cgroup_id`). Set by the agent before loading.
#[unsafe(no_mangle)]
static AGENT_CGROUP: u64 = 0;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
// include/uapi/asm-generic/errno-base.h and errno.h
const EACCES: i32 = 13;
const ECONNREFUSED: i32 = 111;
// include/linux/net.h, include/uapi/linux/in.h
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
/// Depth at which a workload's cgroup is looked for. Kubernetes puts pods at 3 or 4, a node in a container some lower.
const CGROUP_LEVELS: i32 = 16;
// include/uapi/asm-generic/socket.h
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;

/// Entry for IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn weft_connect4(ctx: SockAddrContext) -> i32 {
    let Some(source) = enrolled(&ctx) else {
        return ALLOW;
    };
    // SAFETY: reads of a u32 field of the context, which the verifier rewrites.
    let ip = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip4) };
    decide(&ctx, &source, Address::v4(ip))
}

/// Entry for IPv6 sockets, those that dial IPv4-mapped addresses included.
#[cgroup_sock_addr(connect6)]
pub fn weft_connect6(ctx: SockAddrContext) -> i32 {
    let Some(source) = enrolled(&ctx) else {
        return ALLOW;
    };
    // SAFETY: as above; word by word, because the verifier refuses reads of the whole array.
    let words = unsafe {
        let ip = &raw const (*ctx.sock_addr).user_ip6;
        let word = |i: usize| core::ptr::read_volatile(ip.cast::<u32>().add(i));
        [word(0), word(1), word(2), word(3)]
    };
    decide(&ctx, &source, Address { words })
}

/// The workload of a TCP socket; none for everything that is left alone.
#[inline(always)]
fn enrolled(ctx: &SockAddrContext) -> Option<Workload> {
    // SAFETY: the context is valid for the program's run.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is plain data; a torn read is impossible to misuse, flags are a single word.
    let workload = unsafe { WORKLOADS.get(&cookie) }.copied()?;
    // SAFETY: u32 fields of the context.
    let (kind, protocol) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.sock_addr).type_),
            core::ptr::read_volatile(&raw const (*ctx.sock_addr).protocol),
        )
    };
    if kind != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return None;
    }
    Some(workload)
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, source: &Workload, address: Address) -> i32 {
    // SAFETY: takes no argument. The agent is known by its cgroup, which a workload cannot enter; a mark could be forged.
    let by_agent = unsafe { bpf_get_current_cgroup_id() } == agent_cgroup();
    if by_agent {
        return ALLOW;
    }
    if address.is_loopback() || address.is_link_local_v6() || is_own(source, &address) {
        return pass(ctx);
    }
    // SAFETY: a u32 field of the context; the port is its low half, big-endian.
    let port_be = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port) };
    let port = u32::from(u16::from_be(port_be as u16));
    if is_dead(address, port) {
        count(counter::NO_ENDPOINT);
        return refuse(ECONNREFUSED);
    }
    let edge = EdgeKey {
        cookie: source.cookie,
        address,
        port,
        padding: 0,
    };
    match cached_verdict(&edge) {
        Some(verdict) if verdict.action == VERDICT_PASS => {
            count(counter::PASSED);
            return pass(ctx);
        }
        Some(verdict) if verdict.action == VERDICT_DENIED => {
            count(counter::DENIED);
            return refuse(EACCES);
        }
        Some(verdict) if verdict.action == VERDICT_SAME_NODE && may_go_fast(ctx, source) => {
            if unmark(ctx) && remember_fast(ctx, edge, verdict) {
                return ALLOW;
            }
        }
        _ => {}
    }
    capture(ctx, source)
}

#[inline(always)]
fn agent_cgroup() -> u64 {
    // SAFETY: read-only data, set before the program was loaded; volatile, so that the compiler does not fold the zero.
    unsafe { core::ptr::read_volatile(&raw const AGENT_CGROUP) }
}

#[inline(always)]
fn is_own(source: &Workload, address: &Address) -> bool {
    // SAFETY: plain data.
    unsafe { ADDRESSES.get(address) }.is_some_and(|owner| owner.cookie == source.cookie)
}

#[inline(always)]
fn is_dead(address: Address, port: u32) -> bool {
    // SAFETY: plain data.
    unsafe { DEAD.get(&Destination { address, port }) }.is_some()
}

/// A verdict that is still good.
#[inline(always)]
fn cached_verdict(edge: &EdgeKey) -> Option<&'static Verdict> {
    // SAFETY: plain data; the agent replaces whole values.
    let verdict = unsafe { VERDICTS.get(edge) }?;
    if verdict.generation != generation()? || now_ns() > verdict.expires_ns {
        return None;
    }
    Some(verdict)
}

/// The flow program must see the socket's SYN: the process is in the workload's cgroup, which carries the program, and
/// the socket is not MPTCP, whose subflows have other cookies than the socket that `connect(2)` sees.
#[inline(always)]
fn may_go_fast(ctx: &SockAddrContext, source: &Workload) -> bool {
    // SAFETY: a u32 field of the context.
    let protocol = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).protocol) };
    source.flags & FLAG_SAME_NODE != 0 && protocol == IPPROTO_TCP && is_inside(source.cgroup)
}

/// Whether the process is in this cgroup or below it: whoever has only entered the workload's namespace is not. Where
/// the cgroup lies in the hierarchy is not known, because the agent may see a part of it only.
#[inline(always)]
fn is_inside(cgroup: u64) -> bool {
    let mut level = 1;
    while level <= CGROUP_LEVELS {
        // SAFETY: takes a number; 0 below the process's own cgroup.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == cgroup {
            return cgroup != 0;
        }
        if ancestor == 0 {
            return false;
        }
        level += 1;
    }
    false
}

#[inline(always)]
fn remember_fast(ctx: &SockAddrContext, edge: EdgeKey, verdict: &Verdict) -> bool {
    // SAFETY: the context is valid for the program's run.
    let socket = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let fast = FastSocket {
        edge,
        peer_cookie: verdict.peer_cookie,
        generation: verdict.generation,
        expires_ns: verdict.expires_ns,
    };
    FAST_SOCKETS.insert(&socket, &fast, 0).is_ok()
}

/// Marks the socket, so that its SYN takes the workload's local route to the agent's listener.
#[inline(always)]
fn capture(ctx: &SockAddrContext, source: &Workload) -> i32 {
    if source.flags & FLAG_SAME_NODE != 0 {
        // An earlier connect(2) of this socket may have been let through and have failed before its SYN: what it was
        // let through for must not be recorded for this one.
        // SAFETY: the context is valid for the program's run.
        let _ = FAST_SOCKETS.remove(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    }
    if !agent_listens(source.cookie, CLASS_OUTBOUND) {
        if source.flags & FLAG_FAIL_CLOSED == 0 {
            count(counter::FAILED_OPEN);
            return pass(ctx);
        }
        count(counter::AGENT_DEAD);
        if may_log() {
            warn!(
                ctx,
                "no agent listens for namespace {}: connection refused", source.cookie
            );
        }
        return refuse(ECONNREFUSED);
    }
    if !unbind_device(ctx) || !mark(ctx) {
        return refuse(EACCES);
    }
    count(counter::CAPTURED);
    ALLOW
}

/// Leaves the connection alone, also on a socket whose earlier connection was not.
#[inline(always)]
fn pass(ctx: &SockAddrContext) -> i32 {
    if unmark(ctx) { ALLOW } else { refuse(EACCES) }
}

/// A socket bound to a device would never take the local route: the route look-up with an output device skips it.
#[inline(always)]
fn unbind_device(ctx: &SockAddrContext) -> bool {
    // SAFETY: the verifier gives `sk` as a socket or null; the field is readable (`bpf_sock`).
    let bound = unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() { 0 } else { (*sk).bound_dev_if }
    };
    bound == 0 || set_option(ctx, SO_BINDTODEVICE, 0)
}

#[inline(always)]
fn mark(ctx: &SockAddrContext) -> bool {
    set_option(ctx, SO_MARK, socket_mark(ctx) | CAPTURE_MARK)
}

/// A socket whose earlier connect(2) was captured keeps the mark, which would send its SYN over `lo` again.
#[inline(always)]
fn unmark(ctx: &SockAddrContext) -> bool {
    let mark = socket_mark(ctx);
    mark & CAPTURE_MARK == 0 || set_option(ctx, SO_MARK, mark & !CAPTURE_MARK)
}

#[inline(always)]
fn socket_mark(ctx: &SockAddrContext) -> u32 {
    // SAFETY: as above.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() { 0 } else { (*sk).mark }
    }
}

#[inline(always)]
fn set_option(ctx: &SockAddrContext, option: i32, mut value: u32) -> bool {
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

/// Makes `connect(2)` fail with an errno (Linux 5.18; `EPERM` would be the default).
#[inline(always)]
fn refuse(errno: i32) -> i32 {
    // SAFETY: takes a number.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}
