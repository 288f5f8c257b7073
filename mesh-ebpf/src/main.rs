//! Weft's eBPF programs, one file per hook. The agent loads, pins and attaches them; `mesh_ebpf` (the library beside
//! this file) is the ABI.
//!
//! - `connect`: `cgroup/connect4` and `connect6` on the node's cgroup root decide about outbound connections;
//! - `lookup`: `sk_lookup` in each workload's namespace hands captured connections to the agent's listeners;
//! - `flow`: `sock_ops` on the cgroups of workloads and of the agent records the flows that `lookup` lets through and
//!   counts same-node traffic.
#![no_std]
#![no_main]

mod connect;
mod flow;
mod lookup;
mod maps;

// The verifier proves that no panic is reachable; the linker needs the symbol all the same.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// bpf_sk_release, bpf_setsockopt and others are for GPL-compatible programs only; the licence of the source is
// Apache-2.0, which the kernel does not know.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
