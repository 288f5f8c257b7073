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

/// `mi_option_purge_delay` and `mi_option_minimal_purge_size` of mimalloc.h, which the bindings do not name.
const MI_OPTION_PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
const MI_OPTION_MINIMAL_PURGE_KIB: libmimalloc_sys::mi_option_t = 44;

/// How long the allocator keeps free memory under load, in milliseconds: long enough that buffers are not mapped anew
/// for every burst. While starting it is zero, else some 25 MB that only starting needed would stay (measured).
const PURGE_DELAY_MS: std::ffi::c_long = 1000;

/// Makes the process give back memory as soon as it is free, until [`keep_memory_at_hand`]. Huge pages go for good, since
/// they round every small heap up to megabytes. Call it first in `main`.
pub fn keep_memory_small() {
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::debug!(%error, "huge pages stay on; more memory is used");
    }
    set_purge_delay(0);
    // SAFETY: may be called at any time; the number is that of the header that the bindings compile.
    unsafe { libmimalloc_sys::mi_option_set(MI_OPTION_MINIMAL_PURGE_KIB, 64) };
}

/// From here on free memory is kept for a moment: what starting needed is gone, and speed matters.
pub fn keep_memory_at_hand() {
    set_purge_delay(PURGE_DELAY_MS);
}

fn set_purge_delay(milliseconds: std::ffi::c_long) {
    // SAFETY: may be called at any time; the number is that of the header that the bindings compile.
    unsafe { libmimalloc_sys::mi_option_set(MI_OPTION_PURGE_DELAY, milliseconds) };
}
