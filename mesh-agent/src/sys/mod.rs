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

/// Lets the runtime wait for a descriptor that `owner` owns.
///
/// # Errors
/// When the descriptor cannot be watched (epoll refuses it).
pub fn watch_fd<T: std::os::fd::AsFd + std::os::fd::AsRawFd>(
    owner: T,
) -> std::io::Result<tokio::io::unix::AsyncFd<T>> {
    // SAFETY: `AsFd` on an owned value means that the descriptor is open for as long as the value lives, and the value
    // moves into the result.
    unsafe { tokio::io::unix::AsyncFd::register(owner) }.map_err(|error| error.into_parts().1)
}

/// Gives memory that is free back to the system. The allocator does so by itself only while it is used, and an agent
/// that has started, or whose load is over, is not.
pub fn release_memory() {
    // SAFETY: may be called at any time from any thread (mimalloc.h); it touches the allocator's own state only.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
