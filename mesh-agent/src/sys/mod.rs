//! System calls that no well-kept crate offers: network namespaces, raw `bpf(2)`, socket options. The only module
//! of the agent, with `capture::maps`, that holds `unsafe` code.
#![allow(unsafe_code)]

pub mod bpf;
pub mod diag;
pub mod netns;
pub mod socket;

/// `CLOCK_MONOTONIC` in nanoseconds, the clock of `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| {
        now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
    })
}
