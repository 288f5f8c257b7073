//! Judgements: what was read in, finding out. Pure.

use std::{io, path::Path};

use mesh_api::local::Response;

use super::{
    Finding,
    mounts::{self, Mount},
    read::Cgroup,
};
use crate::{
    client::{Answer, ClientError},
    units,
};

/// Oldest kernel with everything the programs need (one sk_lookup program for all pods needs 5.17's `ingress_ifindex`,
/// the network-namespace cookie in sock_ops and `bpf_set_retval` come by 6.1).
const KERNEL_MIN: (u32, u32) = (6, 1);

/// Kernel functions that exist only where a program type is compiled in, by program type.
pub const PROGRAM_TYPE_FUNCTIONS: [(&str, &str); 3] = [
    ("cgroup/connect4 and connect6", "sock_addr_func_proto"),
    ("sk_lookup", "sk_lookup_func_proto"),
    ("sock_ops", "sock_ops_func_proto"),
];

/// Descriptors with which a node is not short: a captured connection takes up to three (client's side, upstream's,
/// its share of a tunnel), and a busy node has ten thousand of them.
const DESCRIPTORS_MIN: u64 = 32_768;

/// Ephemeral ports below which one destination's connections run out under load.
const PORTS_MIN: u32 = 16_384;

/// Ports that the agent listens on in pods and on the node.
const AGENT_PORTS: std::ops::RangeInclusive<u32> = 15_000..=15_021;

/// A snapshot of the mesh at the design's size, written twice while it is replaced.
const SPACE_MIN_BYTES: u64 = 128 * 1024 * 1024;

/// Nothing can be written any more: socket, lock and snapshot need a few pages each.
const SPACE_FATAL_BYTES: u64 = 1024 * 1024;

pub fn kernel(release: io::Result<String>) -> Finding {
    const CHECK: &str = "kernel";
    let release = match release {
        Ok(release) => release.trim().to_owned(),
        Err(error) => return unread(CHECK, "/proc/sys/kernel/osrelease", &error),
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    match version {
        Some(version) if version >= KERNEL_MIN => Finding::ok(CHECK, release),
        Some(_) => Finding::fail(CHECK, release, "boot a kernel of version 6.1 or later"),
        None => Finding::warn(
            CHECK,
            format!("{release:?} is not a version"),
            "make sure that the kernel is 6.1 or later",
        ),
    }
}

pub fn btf(present: bool) -> Finding {
    const CHECK: &str = "btf";
    if present {
        return Finding::ok(CHECK, "/sys/kernel/btf/vmlinux");
    }
    Finding::fail(
        CHECK,
        "no /sys/kernel/btf/vmlinux",
        "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (distribution kernels are)",
    )
}

pub fn program_types(known: io::Result<Vec<&'static str>>) -> Finding {
    const CHECK: &str = "program types";
    let known = match known {
        Ok(known) => known,
        Err(error) => return unread(CHECK, "/sys/kernel/btf/vmlinux", &error),
    };
    let missing: Vec<&str> = PROGRAM_TYPE_FUNCTIONS
        .iter()
        .filter(|(_, function)| !known.contains(function))
        .map(|(kind, _)| *kind)
        .collect();
    if missing.is_empty() {
        let kinds: Vec<&str> = PROGRAM_TYPE_FUNCTIONS
            .iter()
            .map(|(kind, _)| *kind)
            .collect();
        let found = format!(
            "{} compiled in (not test-loaded: the agent reports that)",
            kinds.join(", ")
        );
        return Finding::ok(CHECK, found);
    }
    Finding::fail(
        CHECK,
        format!("the kernel lacks {}", missing.join(", ")),
        "boot a kernel built with CONFIG_BPF_SYSCALL=y, CONFIG_CGROUP_BPF=y and CONFIG_INET=y",
    )
}

pub fn jit(setting: io::Result<String>) -> Finding {
    const CHECK: &str = "bpf jit";
    match setting.as_deref().map(str::trim) {
        Ok("1" | "2") => Finding::ok(CHECK, "on"),
        Ok("0") => Finding::warn(
            CHECK,
            "off: every connect(2) on the node is slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(other) => Finding::warn(
            CHECK,
            format!("unknown setting {other:?}"),
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        // Kernels with CONFIG_BPF_JIT_ALWAYS_ON in a user namespace or without a JIT hide the file.
        Err(error) => unread(CHECK, "/proc/sys/net/core/bpf_jit_enable", error),
    }
}

pub fn cgroup(cgroup: &Cgroup) -> Finding {
    const CHECK: &str = "cgroup v2";
    match cgroup {
        Cgroup::Usable(path) => Finding::ok(CHECK, path.display().to_string()),
        Cgroup::ReadOnly(path) => Finding::fail(
            CHECK,
            format!("{} may not be written", path.display()),
            "run as root; in a container, mount the host's cgroup file system read-write",
        ),
        Cgroup::NotCgroup2(path) => Finding::fail(
            CHECK,
            format!("{} is not a cgroup v2 folder", path.display()),
            "name one with --cgroup-root, or leave the option out to have it found",
        ),
        Cgroup::NotMounted => Finding::fail(
            CHECK,
            "not mounted",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
    }
}

pub fn bpffs(root: &Path, mounts: &[Mount]) -> Finding {
    const CHECK: &str = "bpffs";
    match mounts::holding(mounts, root) {
        Some(mount) if mount.kind == "bpf" => Finding::ok(CHECK, root.display().to_string()),
        _ => Finding::fail(
            CHECK,
            format!("no bpf file system at {}", root.display()),
            format!("mount -t bpf bpf {}", root.display()),
        ),
    }
}

/// Linux capability numbers (include/uapi/linux/capability.h) and what each is for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "rules, routes and transparent sockets"),
    (13, "CAP_NET_RAW", "binding to clients' addresses"),
    (21, "CAP_SYS_ADMIN", "entering network namespaces"),
    (39, "CAP_BPF", "loading programs"),
];

/// Opens `/proc/PID/ns/net` of other users' processes; named namespaces work without.
const CAP_SYS_PTRACE: u32 = 19;

pub fn capabilities(status: io::Result<String>) -> Finding {
    const CHECK: &str = "capabilities";
    let status = match status {
        Ok(status) => status,
        Err(error) => return unread(CHECK, "/proc/self/status", &error),
    };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let Some(effective) = effective else {
        return Finding::warn(
            CHECK,
            "no CapEff in /proc/self/status",
            "make sure that /proc is the kernel's",
        );
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, _, _)| !has(*bit))
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if !missing.is_empty() {
        return Finding::fail(
            CHECK,
            format!("missing {}", missing.join(", ")),
            "run as root, or give the service these capabilities",
        );
    }
    if !has(CAP_SYS_PTRACE) {
        return Finding::warn(
            CHECK,
            "missing CAP_SYS_PTRACE (namespaces of running processes)",
            "add it, or enrol by named namespaces under /run/netns only",
        );
    }
    Finding::ok(
        CHECK,
        "CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, CAP_SYS_PTRACE",
    )
}

pub fn descriptors(limits: io::Result<(u64, u64)>) -> Finding {
    const CHECK: &str = "open files";
    match limits {
        Ok((soft, hard)) if hard >= DESCRIPTORS_MIN => Finding::ok(
            CHECK,
            format!("soft {soft}, hard {hard} (the agent raises its own to the hard limit)"),
        ),
        Ok((_, hard)) => Finding::warn(
            CHECK,
            format!(
                "hard limit {hard}: about {} connections at a time",
                hard / 3
            ),
            "LimitNOFILE=1048576 in the agent's unit, or ulimit -Hn 1048576 in the shell that starts it",
        ),
        Err(error) => unread(CHECK, "the limit of open files", &error),
    }
}

pub fn port_range(range: io::Result<String>) -> Finding {
    const CHECK: &str = "ephemeral ports";
    let range = match range {
        Ok(range) => range,
        Err(error) => return unread(CHECK, "/proc/sys/net/ipv4/ip_local_port_range", &error),
    };
    let mut ports = range
        .split_whitespace()
        .map(|port| port.parse::<u32>().ok());
    let (Some(low), Some(high)) = (ports.next().flatten(), ports.next().flatten()) else {
        return Finding::warn(
            CHECK,
            format!("unreadable range {:?}", range.trim()),
            "sysctl net.ipv4.ip_local_port_range",
        );
    };
    let count = high.saturating_add(1).saturating_sub(low);
    if low <= *AGENT_PORTS.end() && high >= *AGENT_PORTS.start() {
        return Finding::warn(
            CHECK,
            format!("{low}-{high} holds the agent's own ports 15000-15021"),
            "sysctl -w net.ipv4.ip_local_reserved_ports=15000-15021 (on the node and in pods)",
        );
    }
    if count < PORTS_MIN {
        return Finding::warn(
            CHECK,
            format!(
                "{low}-{high}: only {count} connections at a time from one address to one destination"
            ),
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        );
    }
    Finding::ok(CHECK, format!("{low}-{high}"))
}

pub fn fwmark_accept(present: bool) -> Finding {
    const CHECK: &str = "tcp_fwmark_accept";
    if present {
        return Finding::ok(CHECK, "present");
    }
    Finding::fail(
        CHECK,
        "no net.ipv4.tcp_fwmark_accept: applications could not answer to their clients' addresses",
        "boot a kernel built with CONFIG_INET=y and CONFIG_SYSCTL=y; in a container, mount /proc whole",
    )
}

pub fn ipv6(stack: bool, disabled: io::Result<String>) -> Finding {
    const CHECK: &str = "ipv6";
    let on = stack && disabled.is_ok_and(|setting| setting.trim() == "0");
    if on {
        return Finding::ok(CHECK, "on");
    }
    Finding::warn(
        CHECK,
        "off: only IPv4 is captured",
        "nothing if pods are IPv4-only; else sysctl -w net.ipv6.conf.all.disable_ipv6=0",
    )
}

pub fn space(run_dir: &Path, free: io::Result<u64>) -> Finding {
    const CHECK: &str = "run directory";
    let free = match free {
        Ok(free) => free,
        Err(error) => return unread(CHECK, &run_dir.display().to_string(), &error),
    };
    let found = format!("{}: {} free", run_dir.display(), units::bytes(free as f64));
    let fix = "free space there, or choose another folder with --run-dir";
    match free {
        0..SPACE_FATAL_BYTES => Finding::fail(CHECK, found, fix),
        SPACE_FATAL_BYTES..SPACE_MIN_BYTES => Finding::warn(CHECK, found, fix),
        _ => Finding::ok(CHECK, found),
    }
}

pub fn agent(answer: Result<Answer, ClientError>) -> Finding {
    const CHECK: &str = "agent";
    let status = match answer.map(|answer| answer.response) {
        Ok(Response::Status(status)) => status,
        Ok(Response::Error { message }) => {
            return Finding::fail(
                CHECK,
                format!("runs, but: {message}"),
                "look at the agent's log",
            );
        }
        Ok(_) => {
            return Finding::fail(
                CHECK,
                "answered another question",
                "use one version of weft and mesh-agent",
            );
        }
        Err(ClientError::NotRunning { reason, socket, .. }) => {
            return Finding::warn(
                CHECK,
                format!("not running ({reason} at {socket})"),
                "nothing if it shall not run yet; else see docs/standalone.md",
            );
        }
        Err(ClientError::Permission { socket }) => {
            return Finding::warn(
                CHECK,
                format!("{socket} may not be opened"),
                "run weft as root",
            );
        }
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default().to_owned();
            return Finding::fail(CHECK, first, "look at the agent's log");
        }
    };
    if !status.pending.is_empty() {
        return Finding::warn(
            CHECK,
            format!("runs, not ready: waits for {}", status.pending.join(", ")),
            "weft status, and the agent's log",
        );
    }
    let broken: Vec<String> = status
        .workloads
        .iter()
        .filter(|workload| workload.capture != "ok")
        .map(|workload| {
            format!(
                "{}/{}: {}",
                workload.namespace, workload.name, workload.capture
            )
        })
        .collect();
    if broken.is_empty() {
        let workloads = status.workloads.len();
        return Finding::ok(
            CHECK,
            format!(
                "version {}, ready, capture of {workloads} workloads ok",
                status.version
            ),
        );
    }
    Finding::fail(
        CHECK,
        format!("capture is broken for {}", broken.join("; ")),
        "weft unenroll and enroll the workload; look at the agent's log",
    )
}

fn unread(check: &'static str, what: &str, error: &io::Error) -> Finding {
    Finding::warn(
        check,
        format!("cannot read {what}: {error}"),
        "run as root, with /proc and /sys mounted",
    )
}

#[cfg(test)]
mod tests {
    use mesh_api::local::{Status, WorkloadStatus};

    use super::{super::Outcome, *};

    fn text(content: &str) -> io::Result<String> {
        Ok(content.to_owned())
    }

    fn gone<T>() -> io::Result<T> {
        Err(io::ErrorKind::NotFound.into())
    }

    #[test]
    fn kernels() {
        for (release, outcome) in [
            ("6.18.44-fc-v657\n", Outcome::Ok),
            ("6.1.0", Outcome::Ok),
            ("10.0-rc1", Outcome::Ok),
            ("6.0.19", Outcome::Fail),
            ("5.15.0-91-generic", Outcome::Fail),
            ("", Outcome::Warn),
            ("99999999999.1", Outcome::Warn),
        ] {
            assert_eq!(kernel(text(release)).outcome, outcome, "{release:?}");
        }
        assert_eq!(kernel(gone()).outcome, Outcome::Warn);
    }

    #[test]
    fn program_types_are_named_when_missing() {
        let all = PROGRAM_TYPE_FUNCTIONS
            .map(|(_, function)| function)
            .to_vec();
        assert_eq!(program_types(Ok(all)).outcome, Outcome::Ok);
        let finding = program_types(Ok(vec!["sk_lookup_func_proto"]));
        assert_eq!(finding.outcome, Outcome::Fail);
        assert_eq!(
            finding.found,
            "the kernel lacks cgroup/connect4 and connect6, sock_ops"
        );
        assert_eq!(program_types(gone()).outcome, Outcome::Warn);
    }

    #[test]
    fn switches_of_the_kernel() {
        assert_eq!(btf(true).outcome, Outcome::Ok);
        assert_eq!(btf(false).outcome, Outcome::Fail);
        assert_eq!(jit(text("1\n")).outcome, Outcome::Ok);
        assert_eq!(jit(text("0\n")).outcome, Outcome::Warn);
        assert_eq!(fwmark_accept(false).outcome, Outcome::Fail);
        assert_eq!(ipv6(true, text("0\n")).outcome, Outcome::Ok);
        assert_eq!(ipv6(true, text("1\n")).outcome, Outcome::Warn);
        assert_eq!(ipv6(false, gone()).outcome, Outcome::Warn);
    }

    #[test]
    fn cgroups_say_how_to_get_one() {
        let path = || "/sys/fs/cgroup".into();
        assert_eq!(cgroup(&Cgroup::Usable(path())).outcome, Outcome::Ok);
        for bad in [
            Cgroup::NotMounted,
            Cgroup::ReadOnly(path()),
            Cgroup::NotCgroup2(path()),
        ] {
            let finding = cgroup(&bad);
            assert_eq!(finding.outcome, Outcome::Fail, "{bad:?}");
            assert!(finding.fix.is_some());
        }
    }

    #[test]
    fn bpffs_must_be_mounted_where_the_agent_pins() {
        let table = "1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /sys/fs/bpf rw - bpf bpf rw\n";
        let mounts = mounts::parse(table);
        assert_eq!(
            bpffs(Path::new("/sys/fs/bpf"), &mounts).outcome,
            Outcome::Ok
        );
        assert_eq!(
            bpffs(Path::new("/sys/fs/bpf/n1"), &mounts).outcome,
            Outcome::Ok
        );
        let finding = bpffs(Path::new("/run/bpf"), &mounts);
        assert_eq!(finding.outcome, Outcome::Fail);
        assert_eq!(finding.fix.as_deref(), Some("mount -t bpf bpf /run/bpf"));
    }

    #[test]
    fn capabilities_are_named_when_missing() {
        let with = |bits: u64| capabilities(text(&format!("Name:\tweft\nCapEff:\t{bits:016x}\n")));
        assert_eq!(with(u64::MAX).outcome, Outcome::Ok);
        let finding = with(!(1 << 39) & !(1 << 12));
        assert_eq!(finding.outcome, Outcome::Fail);
        assert!(finding.found.contains("CAP_NET_ADMIN (") && finding.found.contains("CAP_BPF ("));
        assert!(!finding.found.contains("CAP_SYS_ADMIN"));
        assert_eq!(with(!(1 << CAP_SYS_PTRACE)).outcome, Outcome::Warn);
        assert_eq!(capabilities(text("CapEff:\txyz\n")).outcome, Outcome::Warn);
    }

    #[test]
    fn limits_and_ports() {
        assert_eq!(
            descriptors(Ok((1_024, DESCRIPTORS_MIN))).outcome,
            Outcome::Ok
        );
        assert_eq!(
            descriptors(Ok((1_024, DESCRIPTORS_MIN - 1))).outcome,
            Outcome::Warn
        );
        for (range, outcome) in [
            ("32768\t60999\n", Outcome::Ok),
            ("15021\t60999\n", Outcome::Warn),
            ("1024\t65535\n", Outcome::Warn),
            ("32768\t40000\n", Outcome::Warn),
            ("60999\t32768\n", Outcome::Warn),
            ("many\n", Outcome::Warn),
        ] {
            assert_eq!(port_range(text(range)).outcome, outcome, "{range:?}");
        }
    }

    #[test]
    fn space_in_the_run_directory() {
        let of = |free| space(Path::new("/run/weft"), Ok(free)).outcome;
        assert_eq!(of(SPACE_MIN_BYTES), Outcome::Ok);
        assert_eq!(of(SPACE_MIN_BYTES - 1), Outcome::Warn);
        assert_eq!(of(SPACE_FATAL_BYTES - 1), Outcome::Fail);
    }

    fn answer(pending: &[&str], capture: &str) -> Result<Answer, ClientError> {
        let status = Status {
            node: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 1,
            uptime_ms: 1,
            discovery: "connected".to_owned(),
            snapshot: "current".to_owned(),
            workloads: vec![WorkloadStatus {
                namespace: "shop".to_owned(),
                name: "web".to_owned(),
                uid: None,
                identity: None,
                addresses: Vec::new(),
                netns: "/run/netns/web".to_owned(),
                netns_cookie: 1,
                capture: capture.to_owned(),
                failure_mode: "closed".to_owned(),
                same_node: "kernel".to_owned(),
                connections: 0,
                certificate_not_after: None,
                certificate: "missing".to_owned(),
            }],
            pending: pending.iter().map(ToString::to_string).collect(),
            confinement: None,
            draining: Vec::new(),
        };
        Ok(Answer {
            response: Response::Status(Box::new(status)),
            json: serde_json::Value::Null,
        })
    }

    #[test]
    fn agents() {
        assert_eq!(agent(answer(&[], "ok")).outcome, Outcome::Ok);
        assert_eq!(agent(answer(&["discovery"], "ok")).outcome, Outcome::Warn);
        let broken = agent(answer(&[], "route missing"));
        assert_eq!(broken.outcome, Outcome::Fail);
        assert_eq!(
            broken.found,
            "capture is broken for shop/web: route missing"
        );
        let absent = ClientError::NotRunning {
            reason: "there is no socket",
            socket: "s".into(),
            run_dir: "r".into(),
        };
        assert_eq!(agent(Err(absent)).outcome, Outcome::Warn);
        let hung = ClientError::Silent {
            socket: "s".into(),
            deadline: std::time::Duration::from_secs(1),
        };
        assert_eq!(agent(Err(hung)).outcome, Outcome::Fail);
    }
}
