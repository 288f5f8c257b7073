//! The eBPF programs in the running kernel: they load, they are adopted, and `sk_lookup` decides right on hand-made
//! contexts. Needs root.

use std::{fs, path::PathBuf};

use mesh_agent::capture::kernel::{
    Found, Kernel, KernelConfig, remove_agent_cgroup, remove_node_pins,
};
use nix::mount::{MsFlags, mount, umount};

/// Kernel objects in a cgroup and on a bpffs of their own; gone at the end, also of a failed test.
struct Scratch(KernelConfig);

impl Scratch {
    fn new(name: &str) -> Self {
        let unified = PathBuf::from("/sys/fs/cgroup/unified");
        let cgroup = if unified.is_dir() {
            unified
        } else {
            PathBuf::from("/sys/fs/cgroup")
        };
        let root = cgroup.join(format!("weft-test-{name}-{}", std::process::id()));
        fs::create_dir(&root).expect("a cgroup of the test's own");
        let bpffs = std::env::temp_dir().join(format!("weft-test-{name}-{}", std::process::id()));
        fs::create_dir(&bpffs).expect("a mount point");
        mount(
            Some("bpf"),
            &bpffs,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mount bpffs");
        Self(KernelConfig {
            cgroup_root: root,
            bpffs_root: bpffs,
            node: format!("test-{name}"),
            abi: mesh_ebpf::ABI_VERSION,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_node_pins(&self.0);
        remove_agent_cgroup(&self.0);
        // The process sits in the test's root cgroup by now; it must leave before that can go.
        let parent = self
            .0
            .cgroup_root
            .parent()
            .expect("below the mount")
            .join("cgroup.procs");
        fs::write(parent, std::process::id().to_string()).expect("back to the root cgroup");
        fs::remove_dir(&self.0.cgroup_root).expect("nothing left in the test's cgroup");
        umount(&self.0.bpffs_root).expect("unmount bpffs");
        fs::remove_dir(&self.0.bpffs_root).expect("remove the mount point");
    }
}

#[test]
fn programs_load_and_a_second_agent_adopts_them() {
    let scratch = Scratch::new("adopt");
    let (first, found) = Kernel::start(scratch.0.clone()).expect("programs pass the verifier");
    assert_eq!(found, Found::Nothing);
    drop(first);
    let (_second, found) =
        Kernel::start(scratch.0.clone()).expect("pinned maps and links are taken over");
    assert_eq!(found, Found::Previous);
}

#[test]
fn a_folder_that_is_not_bpffs_is_refused_and_nothing_is_left() {
    let scratch = Scratch::new("nobpffs");
    let mut config = scratch.0.clone();
    config.bpffs_root = std::env::temp_dir();
    let error = Kernel::start(config).expect_err("a temp folder is not bpffs");
    assert!(error.to_string().contains("--bpffs-root"), "{error}");
    assert!(!scratch.0.agent_cgroup().exists());
}

/// `struct bpf_sk_lookup` (include/uapi/linux/bpf.h), as `BPF_PROG_TEST_RUN` takes it.
struct Packet {
    protocol: u32,
    remote: [u8; 4],
    local: [u8; 4],
    local_port: u32,
}

const TCP: u32 = 6;
const UDP: u32 = 17;
const WORKLOAD: [u8; 4] = [10, 1, 1, 2];
const STRANGER: [u8; 4] = [10, 9, 9, 9];
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

impl Packet {
    fn context(&self) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        bytes.extend((libc::AF_INET as u32).to_ne_bytes());
        bytes.extend(self.protocol.to_ne_bytes());
        bytes.extend(self.remote);
        bytes.extend([0; 16]);
        bytes.extend(40_000_u16.to_be_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.local);
        bytes.extend([0; 16]);
        bytes.extend(self.local_port.to_ne_bytes());
        // The kernel insists on zero: a test cannot choose the interface (net/bpf/test_run.c).
        bytes.extend([0; 4]);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

#[test]
fn sk_lookup_decides_by_address_and_fails_closed_or_open() {
    let scratch = Scratch::new("lookup");
    let (kernel, _) = Kernel::start(scratch.0.clone()).expect("programs load");
    let closed = mesh_ebpf::Workload {
        cookie: 42,
        flags: mesh_ebpf::FLAG_FAIL_CLOSED,
        padding: 0,
    };
    kernel
        .set_addresses(closed, &[WORKLOAD.into()])
        .expect("the address is known");
    let packet = |protocol, remote, local| Packet {
        protocol,
        remote,
        local,
        local_port: 80,
    };
    let cases = [
        ("UDP is not ours", packet(UDP, STRANGER, WORKLOAD), SK_PASS),
        (
            "loopback stays in the pod",
            packet(TCP, [127, 0, 0, 1], [127, 0, 0, 1]),
            SK_PASS,
        ),
        ("to itself", packet(TCP, WORKLOAD, WORKLOAD), SK_PASS),
        (
            "inbound without an agent",
            packet(TCP, STRANGER, WORKLOAD),
            SK_DROP,
        ),
        (
            "to an address that nobody enrolled",
            packet(TCP, STRANGER, [10, 8, 8, 8]),
            SK_DROP,
        ),
    ];
    for (name, packet, expected) in cases {
        assert_eq!(
            kernel.test_lookup(&mut packet.context()).expect(name),
            expected,
            "{name}"
        );
    }
    let open = mesh_ebpf::Workload { flags: 0, ..closed };
    kernel
        .set_addresses(open, &[WORKLOAD.into()])
        .expect("replaced");
    let inbound = packet(TCP, STRANGER, WORKLOAD);
    assert_eq!(
        kernel.test_lookup(&mut inbound.context()).expect("runs"),
        SK_PASS,
        "fail open"
    );
}
