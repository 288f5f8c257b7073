//! What the process gives up before it does anything for anybody: capabilities, system calls, ways to gain rights, and
//! core dumps. A hole in what parses a peer's bytes is then worth less to who finds it.
//!
//! Everything here is inherited by threads and by programs that are started later. The agent that `weft agent upgrade`
//! starts is one, so what is kept suffices to start an agent and to take over, too; it never gets more.

use std::{collections::BTreeMap, fs};

use mesh_api::local::Confinement;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::AgentError;
use crate::sys;

/// Capabilities that are kept, and why.
const KEPT: [(CapabilitySet, &str); 4] = [
    (
        CapabilitySet::SYS_ADMIN,
        "setns(2) into the namespaces of pods, bpf(2): programs, maps, pins (it includes CAP_BPF and CAP_PERFMON)",
    ),
    (
        CapabilitySet::NET_ADMIN,
        "rules and routes of pods, transparent sockets and marks, attaching programs, SOCK_DESTROY",
    ),
    (
        CapabilitySet::SYS_PTRACE,
        "opening /proc/PID/ns/net of pods that run as other users (ptrace(2) itself is refused)",
    ),
    (
        CapabilitySet::DAC_READ_SEARCH,
        "reading tokens, roots and manifests that belong to another user (open_by_handle_at(2) is refused)",
    ),
];

/// Without these nothing works; the others are missed only where they are needed.
const REQUIRED: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::NET_ADMIN);

/// System calls that no agent makes and that are steps of known attacks: on other processes, on the kernel itself, on
/// the file systems and the clock of the node. A list of what is refused, not of what is allowed: libraries and the
/// allocator change what they call, and a data path that dies of it is worse.
const REFUSED: &[libc::c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_personality,
    // The kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_lookup_dcookie,
    // File systems, by CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_mknodat,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_nfsservctl,
    // The node.
    libc::SYS_unshare,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
];

/// Numbers of x86-64 system calls with 32-bit pointers have this bit (arch/x86/include/uapi/asm/unistd.h).
#[cfg(target_arch = "x86_64")]
const X32_BIT: i64 = 0x4000_0000;
/// System calls that have numbers of their own there (arch/x86/entry/syscalls/syscall_64.tbl), ptrace among them.
#[cfg(target_arch = "x86_64")]
const X32_OWN: std::ops::RangeInclusive<i64> = 512..=547;

/// What [`confine`] did, to be told once there are logs.
#[derive(Debug)]
#[must_use]
pub struct Confined {
    unfiltered: Option<seccompiler::Error>,
}

/// Gives up what no agent needs. Call it before the first thread is started, that of the logs included: capabilities
/// and filters belong to threads, which inherit them.
///
/// # Errors
/// When a required capability is missing, or the kernel refuses a step that every kernel with eBPF links knows.
pub fn confine() -> Result<Confined, AgentError> {
    let system = |what, errno: nix::errno::Errno| AgentError::System {
        what,
        source: errno.into(),
    };
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
        .map_err(|errno| system("the limit of core dumps", errno))?;
    drop_capabilities()?;
    prctl::set_no_new_privs().map_err(|errno| system("no new privileges", errno))?;
    // No core file whatever the limit says, and no debugger of another process with the same rights: there are keys here.
    prctl::set_dumpable(false).map_err(|errno| system("the protection of its memory", errno))?;
    Ok(Confined {
        unfiltered: refuse_system_calls().err(),
    })
}

impl Confined {
    /// Logs what is kept and why.
    pub(super) fn tell(&self) {
        if let Some(reason) = &self.unfiltered {
            tracing::warn!(%reason, "system calls are not filtered; is seccomp part of this kernel?");
        }
        if let Some(observed) = observed() {
            tracing::info!(
                capabilities = observed.capabilities.join(" "),
                no_new_privileges = observed.no_new_privileges,
                refused_system_calls = if observed.system_call_filter {
                    REFUSED.len()
                } else {
                    0
                },
                core_dumps = observed.core_dumps,
                "rights are given up"
            );
        }
        for (capability, reason) in KEPT {
            tracing::debug!(capability = %names(capability), reason, "kept");
        }
    }
}

fn drop_capabilities() -> Result<(), AgentError> {
    let system = |source: rustix::io::Errno| AgentError::System {
        what: "the capabilities of the process",
        source: source.into(),
    };
    let held = capabilities(None).map_err(system)?.permitted;
    let missing = REQUIRED.difference(held);
    if !missing.is_empty() {
        return Err(AgentError::Capabilities(names(missing)));
    }
    let kept = KEPT
        .iter()
        .fold(CapabilitySet::empty(), |all, (one, _)| all.union(*one))
        .intersection(held);
    // The kernel may know capabilities that no list of ours has; it says where they end.
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(one) {
            Ok(true) if !kept.contains(one) => {
                if let Err(error) = remove_capability_from_bounding_set(one) {
                    // Without CAP_SETPCAP. No new privileges, set below, closes the same way.
                    tracing::debug!(%error, "the bounding set stays as it is");
                    break;
                }
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    clear_ambient_capability_set().map_err(system)?;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(system)
}

/// Makes the kernel answer `EPERM` to every call of [`REFUSED`], on this thread and what it starts. An agent that was
/// started by another one has inherited a filter, and filters only add up: each costs time, and together they may have
/// 32,768 instructions (kernel/seccomp.c, `MAX_INSNS_PER_PATH`). So only a filter that refuses other calls is added.
fn refuse_system_calls() -> Result<(), seccompiler::Error> {
    if is_refused_already() {
        return Ok(());
    }
    seccompiler::apply_filter(&filter()?)
}

/// An option of prctl(2) that no kernel has: our filters answer it with `EPERM` for the list that they refuse, everything
/// else with `EINVAL`.
const QUESTION: i32 = i32::from_be_bytes(*b"WFTq");

fn is_refused_already() -> bool {
    let list = fingerprint();
    // The second question is about a list that nobody has: who refuses that refuses the question.
    sys::is_refused(QUESTION, list) && !sys::is_refused(QUESTION, !list)
}

/// Names the list of refused calls (FNV-1a).
fn fingerprint() -> u64 {
    let bytes = REFUSED.iter().flat_map(|call| call.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn answer() -> Result<SeccompRule, seccompiler::BackendError> {
    let option = u64::from(QUESTION.cast_unsigned());
    SeccompRule::new(vec![
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, option)?,
        SeccompCondition::new(1, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, fingerprint())?,
    ])
}

fn filter() -> Result<BpfProgram, seccompiler::Error> {
    let always = Vec::<SeccompRule>::new;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|call| (*call, always())).collect();
    #[cfg(target_arch = "x86_64")]
    {
        let twins: Vec<i64> = rules.keys().copied().chain(X32_OWN).collect();
        rules.extend(twins.iter().map(|call| (call | X32_BIT, always())));
    }
    rules.insert(libc::SYS_prctl, vec![answer()?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// What the kernel says about this thread; all threads are alike.
pub(super) fn observed() -> Option<Confinement> {
    let text = fs::read_to_string("/proc/thread-self/status").ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let held = u64::from_str_radix(field("CapPrm")?, 16).ok()?;
    let (soft_core_bytes, _) = getrlimit(Resource::RLIMIT_CORE).ok()?;
    Some(Confinement {
        capabilities: CapabilitySet::from_bits_retain(held)
            .iter_names()
            .map(|(name, _)| name.to_owned())
            .collect(),
        no_new_privileges: field("NoNewPrivs")? == "1",
        // 2 is SECCOMP_MODE_FILTER (include/uapi/linux/seccomp.h).
        system_call_filter: field("Seccomp")? == "2",
        core_dumps: soft_core_bytes != 0,
    })
}

/// `CAP_A, CAP_B`.
fn names(set: CapabilitySet) -> String {
    set.iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, path::Path, thread};

    use nix::{
        errno::Errno,
        sys::stat::{Mode, SFlag, mknod},
    };

    use super::*;

    /// Making a regular file so needs no right, hence only the filter can refuse it.
    fn make_node(folder: &Path, name: &str) -> Result<(), Errno> {
        mknod(&folder.join(name), SFlag::S_IFREG, Mode::S_IRUSR, 0)
    }

    #[test]
    fn refused_calls_fail_and_the_others_work() {
        let folder = tempfile::tempdir().expect("a temp folder");
        // A filter is for one thread and never goes away.
        let confined = thread::scope(|scope| {
            let confined = scope.spawn(|| {
                make_node(folder.path(), "before").expect("no filter yet");
                prctl::set_no_new_privs().expect("always allowed");
                refuse_system_calls().expect("this kernel has seccomp");
                let refused = make_node(folder.path(), "after");
                fs::write(folder.path().join("file"), "x").expect("files are ours");
                TcpListener::bind("127.0.0.1:0").expect("sockets are ours");
                thread::scope(|inner| {
                    let inherited = inner.spawn(|| make_node(folder.path(), "inner"));
                    assert_eq!(inherited.join().expect("no panic"), Err(Errno::EPERM));
                });
                let observed = observed().expect("/proc is there");
                assert!(observed.system_call_filter && observed.no_new_privileges);
                refused
            });
            confined.join().expect("no panic")
        });
        assert_eq!(confined, Err(Errno::EPERM));
        make_node(folder.path(), "elsewhere").expect("other threads are not touched");
    }

    /// `Seccomp_filters` of /proc/PID/status.
    fn filters() -> u32 {
        let status = fs::read_to_string("/proc/thread-self/status").expect("/proc is there");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp_filters:"));
        let number = line.expect("Linux 5.9 or later").trim();
        number.parse().expect("a number")
    }

    #[test]
    fn a_filter_that_was_inherited_is_not_added_again() {
        let counted = thread::spawn(|| {
            prctl::set_no_new_privs().expect("always allowed");
            let before = filters();
            assert!(!is_refused_already(), "no filter yet");
            refuse_system_calls().expect("this kernel has seccomp");
            let inherited = thread::spawn(|| {
                refuse_system_calls().expect("refused already");
                filters()
            });
            (before, filters(), inherited.join().expect("no panic"))
        });
        let (before, first, second) = counted.join().expect("no panic");
        assert_eq!((first, second), (before + 1, before + 1));
    }

    #[test]
    fn programs_can_still_be_started() {
        let status = thread::spawn(|| {
            prctl::set_no_new_privs().expect("always allowed");
            refuse_system_calls().expect("this kernel has seccomp");
            std::process::Command::new("true").status()
        });
        let status = status.join().expect("no panic").expect("started");
        assert!(status.success());
    }

    #[test]
    fn every_kept_capability_is_one_that_the_kernel_knows_and_has_a_reason() {
        for (capability, reason) in KEPT {
            assert_eq!(capability.iter_names().count(), 1, "{capability:?}");
            assert!(!reason.is_empty());
        }
        assert_eq!(names(REQUIRED), "CAP_NET_ADMIN, CAP_SYS_ADMIN");
    }
}
