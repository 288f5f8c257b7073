//! System calls that no well-kept crate offers: network namespaces, raw `bpf(2)`, socket options. The only module
//! of the agent that holds `unsafe` code.
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

/// Whether a filter of system calls answers this question to prctl(2) with `EPERM`.
#[must_use]
pub fn is_refused(option: i32, argument: u64) -> bool {
    // SAFETY: the arguments are numbers; an option that the kernel does not know does nothing (kernel/sys.c).
    let result = unsafe { libc::prctl(option, argument, 0, 0, 0) };
    result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
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

/// Lets go of the pages of this program's code that only starting needed; what is needed still comes back from the page
/// cache, by a minor fault. Without it some 6 MB of code stay in the resident set (measured).
pub fn forget_startup_code() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Ok(program) = std::fs::read_link("/proc/self/exe") else {
        return;
    };
    for (start, length) in code_of(&maps, &program.to_string_lossy()) {
        // SAFETY: the range is a private mapping of a file that is readable and executable only, never written: its pages
        // are those of the file, before and after. MADV_DONTNEED unmaps them (madvise(2)).
        let result = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(start),
                length,
                libc::MADV_DONTNEED,
            )
        };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "code that only starting needed stays in memory");
        }
    }
}

/// Start and length of the executable mappings of `program` in the text of `/proc/PID/maps` (proc_pid_maps(5)).
fn code_of(maps: &str, program: &str) -> Vec<(usize, usize)> {
    let mapping = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let is_code = fields.next()? == "r-xp" && line.ends_with(program);
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        is_code.then_some((start, end.checked_sub(start)?))
    };
    maps.lines().filter_map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_code_is_found() {
        let maps = "\
55e0a0000000-55e0a0100000 r--p 00000000 08:01 42                         /usr/bin/agent
55e0a0100000-55e0a0900000 r-xp 00100000 08:01 42                         /usr/bin/agent
55e0a0900000-55e0a0a00000 rw-p 00900000 08:01 42                         /usr/bin/agent
7f0000000000-7f0000100000 r-xp 00000000 08:01 43                         /usr/lib/libc.so.6
7f0000200000-7f0000300000 r-xp 00000000 00:00 0
nonsense
";
        assert_eq!(
            code_of(maps, "/usr/bin/agent"),
            [(0x55e0_a010_0000, 0x80_0000)]
        );
    }

    #[test]
    fn code_that_was_forgotten_runs_again() {
        forget_startup_code();
        let maps = std::fs::read_to_string("/proc/self/maps").expect("this process has maps");
        let program = std::fs::read_link("/proc/self/exe").expect("this process has a program");
        assert_eq!(code_of(&maps, &program.to_string_lossy()).len(), 1);
    }
}
