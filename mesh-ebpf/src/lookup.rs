//! `sk_lookup`, attached to the namespace of each workload: runs for TCP packets that belong to no established
//! connection, and hands SYNs to the agent's listeners.

use aya_ebpf::{bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::warn;
use mesh_ebpf::{
    Address, CLASS_OUTBOUND, CLASS_PLAINTEXT, CLASS_TUNNEL, FLAG_FAIL_CLOSED, FLOW_SYN_WINDOW_NS,
    FlowKey, ListenerKey, Workload, counter,
};

use crate::maps::{ADDRESSES, AGENT_FLOWS, FLOWS, LISTENERS, count, may_log, now_ns};

const PASS: u32 = sk_action::SK_PASS;
const DROP: u32 = sk_action::SK_DROP;
const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// `lo` has index 1 in every network namespace (net/core/dev.c, `dev_index_reserve` after `LOOPBACK_IFINDEX`).
const LOOPBACK_IFINDEX: u32 = 1;
/// Inbound tunnels arrive on this port of the workload.
const TUNNEL_PORT: u32 = 15008;

struct Packet {
    local: Address,
    local_port: u32,
    remote: Address,
    remote_port: u32,
    ingress_ifindex: u32,
}

/// Decides by address, not by interface alone: for a local packet to an own non-loopback address the kernel reports
/// the interface of that address, although the packet crosses `lo`. Only the capture route and loopback give 1.
#[sk_lookup]
pub fn weft_lookup(ctx: SkLookupContext) -> u32 {
    let Some(packet) = read(&ctx) else {
        return PASS;
    };
    if packet.local.is_loopback() || packet.remote.is_loopback() {
        return PASS;
    }
    let own_remote = owner(&packet.remote);
    if packet.ingress_ifindex == LOOPBACK_IFINDEX {
        let Some(source) = own_remote else {
            return unknown(&ctx, &packet);
        };
        return steer(&ctx, source, CLASS_OUTBOUND);
    }
    // Only now: a captured SYN may have the tuple of an earlier same-node flow.
    if is_recorded(&packet) {
        return PASS;
    }
    let own_local = owner(&packet.local);
    match (own_local, own_remote) {
        (Some(local), Some(remote)) if local.cookie == remote.cookie => PASS,
        (Some(local), _) => {
            count(counter::INBOUND);
            steer(
                &ctx,
                local,
                if packet.local_port == TUNNEL_PORT {
                    CLASS_TUNNEL
                } else {
                    CLASS_PLAINTEXT
                },
            )
        }
        (None, _) => unknown(&ctx, &packet),
    }
}

/// All fields are read before any is looked at: LLVM would merge the reads of two branches into one with a computed
/// offset, which the verifier refuses.
#[inline(always)]
fn read(ctx: &SkLookupContext) -> Option<Packet> {
    // SAFETY: u32 (and one u16) fields of the context; the verifier checks every offset.
    unsafe {
        let lookup = ctx.lookup;
        let family = core::ptr::read_volatile(&raw const (*lookup).family);
        let protocol = core::ptr::read_volatile(&raw const (*lookup).protocol);
        let remote_ip4 = core::ptr::read_volatile(&raw const (*lookup).remote_ip4);
        let local_ip4 = core::ptr::read_volatile(&raw const (*lookup).local_ip4);
        let remote_ip6 = (&raw const (*lookup).remote_ip6).cast::<u32>();
        let local_ip6 = (&raw const (*lookup).local_ip6).cast::<u32>();
        let word = |base: *const u32, i: usize| core::ptr::read_volatile(base.add(i));
        let remote6 = [
            word(remote_ip6, 0),
            word(remote_ip6, 1),
            word(remote_ip6, 2),
            word(remote_ip6, 3),
        ];
        let local6 = [
            word(local_ip6, 0),
            word(local_ip6, 1),
            word(local_ip6, 2),
            word(local_ip6, 3),
        ];
        let remote_port_be = core::ptr::read_volatile(&raw const (*lookup).remote_port);
        let local_port = core::ptr::read_volatile(&raw const (*lookup).local_port);
        let ingress_ifindex = core::ptr::read_volatile(&raw const (*lookup).ingress_ifindex);
        if protocol != IPPROTO_TCP {
            return None;
        }
        let v4 = family == AF_INET;
        Some(Packet {
            local: if v4 {
                Address::v4(local_ip4)
            } else {
                Address { words: local6 }
            },
            local_port,
            remote: if v4 {
                Address::v4(remote_ip4)
            } else {
                Address { words: remote6 }
            },
            remote_port: u32::from(u16::from_be(remote_port_be)),
            ingress_ifindex,
        })
    }
}

#[inline(always)]
fn owner(address: &Address) -> Option<&'static Workload> {
    // SAFETY: plain data; a reference, because the verifier sees a moved copy of nothing as a read of nothing.
    unsafe { ADDRESSES.get(address) }
}

/// A same-node flow, or the agent's own connection to the application. The entry stays after the handshake, because
/// with SYN cookies the look-up runs again for the ACK; it is good only for the SYN window. A foreign SYN with the same
/// tuple cannot use it: while the connection lives its socket takes the packet, and its end removes the entry.
#[inline(always)]
fn is_recorded(packet: &Packet) -> bool {
    let key = FlowKey {
        source: packet.remote,
        destination: packet.local,
        source_port: packet.remote_port,
        destination_port: packet.local_port,
    };
    // SAFETY: plain data.
    let flow = unsafe { FLOWS.get(&key).or_else(|| AGENT_FLOWS.get(&key)) };
    let Some(flow) = flow else {
        return false;
    };
    let Some(local) = owner(&packet.local) else {
        return false;
    };
    flow.destination_cookie == local.cookie && now_ns() - flow.started_ns < FLOW_SYN_WINDOW_NS
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, workload: &Workload, class: u32) -> u32 {
    let key = ListenerKey {
        cookie: workload.cookie,
        class,
        padding: 0,
    };
    if LISTENERS.redirect_sk_lookup(ctx, key, 0).is_ok() {
        return PASS;
    }
    if workload.flags & FLAG_FAIL_CLOSED == 0 {
        count(counter::FAILED_OPEN);
        return PASS;
    }
    count(counter::AGENT_DEAD);
    DROP
}

/// An address that was not there at enrolment, or a source that is not the workload's: nothing may pass uncaptured.
#[inline(always)]
fn unknown(ctx: &SkLookupContext, packet: &Packet) -> u32 {
    if packet.local == packet.remote {
        return PASS;
    }
    count(counter::UNKNOWN_ADDRESS);
    if may_log() {
        warn!(
            ctx,
            "connection to or from an address that belongs to no workload, port {}: refused",
            packet.local_port
        );
    }
    DROP
}
