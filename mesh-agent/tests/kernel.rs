//! The eBPF programs in the running kernel: they load, they are adopted, and `sk_lookup` decides right on hand-made
//! contexts. Needs root.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use aya::maps::{HashMap, Map, MapData};
use mesh_agent::capture::kernel::{
    Found, Kernel, KernelConfig, remove_agent_cgroup, remove_node_pins,
};
use mesh_ebpf::{AGENT_FLOWS_PER_FLOW, FLOW_SYN_WINDOW_NS, Flow, FlowKey};
use nix::{
    mount::{MsFlags, mount, umount},
    time::{ClockId, clock_gettime},
};

/// Flows that fit.
const FLOWS_MAX: u32 = 1024;

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
            flows_max: FLOWS_MAX,
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

/// Inodes of the pinned links of this ABI: links are the same exactly if these are.
fn links(config: &KernelConfig) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(config.pin_dir())
        .expect("a folder of pins")
        .map(|entry| entry.expect("listed").file_name())
        .filter_map(|name| name.into_string().ok())
        .filter(|name| name.starts_with("link-"))
        .collect();
    names.sort();
    let link = |name: &String| {
        let path = config.pin_dir().join(name);
        let shown = std::process::Command::new("bpftool")
            .args(["-j", "link", "show", "pinned"])
            .arg(&path)
            .output()
            .expect("bpftool runs");
        let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        format!("{name}: {} {}", shown["id"], shown["prog_id"])
    };
    names.iter().map(link).collect()
}

/// The same without the programs, which change.
fn places(links: &[String]) -> Vec<&str> {
    links
        .iter()
        .filter_map(|link| link.rsplit_once(' '))
        .map(|(place, _)| place)
        .collect()
}

#[test]
fn another_abi_is_built_beside_and_takes_the_same_links() {
    let scratch = Scratch::new("abi");
    let (running, _) = Kernel::start(scratch.0.clone()).expect("the running agent");
    let before = links(&scratch.0);
    let mut other = scratch.0.clone();
    other.abi += 1;
    let lock = || running.share_lock().expect("the running agent's lock");

    let beside = Kernel::beside(other.clone(), lock()).expect("loaded beside");
    assert!(beside.follows_another_abi());
    assert_eq!(links(&scratch.0), before, "nothing is swapped yet");
    beside.attach_node().expect("swapped in");
    let swapped = links(&other);
    assert_eq!(places(&swapped), places(&before), "the same links");
    assert_ne!(swapped, before, "with other programs");

    // It gives up: the running agent puts its programs back.
    drop(beside);
    running.attach_node().expect("put back");
    running.remove_other_versions();
    assert_eq!(links(&scratch.0), before);
    assert!(!other.pin_dir().exists());

    // It takes over.
    let beside = Kernel::beside(other.clone(), lock()).expect("loaded beside");
    beside.attach_node().expect("swapped in");
    beside.remove_other_versions();
    drop(running);
    assert_eq!(places(&links(&other)), places(&before), "the same links");
    assert!(!scratch.0.pin_dir().exists());
    assert!(!beside.follows_another_abi());
}

#[test]
fn a_rejected_program_is_named_and_leaves_the_running_ones() {
    let scratch = Scratch::new("rejected");
    let (running, _) = Kernel::start(scratch.0.clone()).expect("the running agent");
    let before = links(&scratch.0);
    let lock = || running.share_lock().expect("the running agent's lock");
    let object = mesh_agent::capture::kernel::OBJECT;
    let rejected = mesh_tests::successor::reject_program(object.to_vec(), "cgroup/connect6");
    let rejected = rejected.expect("the object has that program");
    let mut other = scratch.0.clone();
    other.abi += 1;
    for config in [&scratch.0, &other] {
        let error = Kernel::beside_with(config.clone(), lock(), &rejected);
        let error = error.expect_err("no verifier takes it").to_string();
        assert!(
            error.contains("weft_connect6") && error.contains("R9 !read_ok"),
            "{error}"
        );
        assert_eq!(links(&scratch.0), before);
    }
    assert!(!other.pin_dir().exists());
    Kernel::beside_with(scratch.0.clone(), lock(), object).expect("unchanged they load");
}

/// Pins tell nothing: a link may have been detached, and may have got the program of somebody else.
#[test]
fn what_is_attached_is_asked_of_the_kernel() {
    let scratch = Scratch::new("attached");
    let (running, _) = Kernel::start(scratch.0.clone()).expect("the running agent");
    let before = links(&scratch.0);
    assert!(!running.attach_node().expect("nothing to do"));
    let pin = scratch.0.pin_dir().join("link-connect4");
    let detached = std::process::Command::new("bpftool")
        .args(["link", "detach", "pinned"])
        .arg(&pin)
        .status();
    assert!(detached.expect("bpftool runs").success());
    assert!(pin.exists());
    assert!(running.attach_node().expect("put back"));
    assert!(!running.attach_node().expect("nothing to do"));

    let lock = running.share_lock().expect("the running agent's lock");
    let other = Kernel::beside(scratch.0.clone(), lock).expect("loaded beside");
    other.attach_node().expect("swapped in");
    assert!(running.attach_node().expect("swapped back"));
    drop(other);

    fs::remove_file(&pin).expect("a pin");
    fs::hard_link(scratch.0.pin_dir().join("link-connect6"), &pin)
        .expect("a link of the same place, and of another hook");
    assert!(running.attach_node().expect("put back"));
    let programs = |links: &[String]| -> Vec<String> {
        let program = |link: &String| link.rsplit_once(' ').map(|(_, program)| program.to_owned());
        links.iter().filter_map(program).collect()
    };
    assert_eq!(programs(&links(&scratch.0)), programs(&before));
}

#[test]
fn a_second_agent_of_a_node_is_refused_until_the_lock_is_given_up() {
    let scratch = Scratch::new("lock");
    let (running, _) = Kernel::start(scratch.0.clone()).expect("the running agent");
    let error = Kernel::start(scratch.0.clone()).expect_err("it runs");
    assert!(error.to_string().contains("another agent"), "{error}");
    // It only drains from here on, in the same cgroup.
    running.give_up_lock();
    Kernel::start(scratch.0.clone()).expect("the place is free");
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
    remote: IpAddr,
    local: IpAddr,
    local_port: u32,
}

const TCP: u32 = 6;
const UDP: u32 = 17;
const WORKLOAD: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2));
const WORKLOAD_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 9, 9));
const STRANGER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9));
const REMOTE_PORT: u16 = 40_000;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

impl Packet {
    fn tcp(remote: IpAddr, local: IpAddr) -> Self {
        Self {
            protocol: TCP,
            remote,
            local,
            local_port: 80,
        }
    }

    fn context(&self) -> Vec<u8> {
        let family = if self.local.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let mut bytes = vec![0; 8];
        bytes.extend((family as u32).to_ne_bytes());
        bytes.extend(self.protocol.to_ne_bytes());
        bytes.extend(field(self.remote));
        bytes.extend(REMOTE_PORT.to_be_bytes());
        bytes.extend([0; 2]);
        bytes.extend(field(self.local));
        bytes.extend(self.local_port.to_ne_bytes());
        // The kernel insists on zero: a test cannot choose the interface (net/bpf/test_run.c).
        bytes.extend([0; 4]);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// The connection as its client sees it.
    fn flow(&self) -> FlowKey {
        FlowKey {
            source: in_maps(self.remote),
            destination: in_maps(self.local),
            source_port: u32::from(REMOTE_PORT),
            destination_port: self.local_port,
        }
    }
}

/// Four bytes for IPv4, then sixteen for IPv6.
fn field(ip: IpAddr) -> [u8; 20] {
    let mut bytes = [0; 20];
    match ip {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes[4..].copy_from_slice(&v6.octets()),
    }
    bytes
}

fn in_maps(ip: IpAddr) -> mesh_ebpf::Address {
    let ip = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    mesh_ebpf::Address::from_octets(ip.octets())
}

#[test]
fn sk_lookup_decides_by_address_and_fails_closed_or_open() {
    let scratch = Scratch::new("lookup");
    let (kernel, _) = Kernel::start(scratch.0.clone()).expect("programs load");
    let closed = mesh_ebpf::Workload {
        cookie: 42,
        flags: mesh_ebpf::FLAG_FAIL_CLOSED,
        padding: 0,
        cgroup: 0,
    };
    kernel
        .set_addresses(closed, &[WORKLOAD, WORKLOAD_V6])
        .expect("the address is known");
    let cases = [
        (
            "UDP is not ours",
            Packet {
                protocol: UDP,
                ..Packet::tcp(STRANGER, WORKLOAD)
            },
            SK_PASS,
        ),
        (
            "loopback stays in the pod",
            Packet::tcp(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()),
            SK_PASS,
        ),
        (
            "IPv6 loopback, too",
            Packet::tcp(Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
            SK_PASS,
        ),
        ("to itself", Packet::tcp(WORKLOAD, WORKLOAD), SK_PASS),
        (
            "to itself, IPv6",
            Packet::tcp(WORKLOAD_V6, WORKLOAD_V6),
            SK_PASS,
        ),
        (
            "inbound without an agent",
            Packet::tcp(STRANGER, WORKLOAD),
            SK_DROP,
        ),
        (
            "inbound without an agent, IPv6",
            Packet::tcp(STRANGER_V6, WORKLOAD_V6),
            SK_DROP,
        ),
        (
            "to an address that nobody enrolled",
            Packet::tcp(STRANGER, Ipv4Addr::new(10, 8, 8, 8).into()),
            SK_DROP,
        ),
        (
            "to an IPv6 address that nobody enrolled",
            Packet::tcp(
                STRANGER_V6,
                Ipv6Addr::new(0xfd00, 8, 0, 0, 0, 0, 0, 8).into(),
            ),
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
    kernel.set_addresses(open, &[WORKLOAD]).expect("replaced");
    let inbound = Packet::tcp(STRANGER, WORKLOAD);
    assert_eq!(
        kernel.test_lookup(&mut inbound.context()).expect("runs"),
        SK_PASS,
        "fail open"
    );
}

/// Flows are never forgotten to make room, nor by another agent that takes the maps over.
#[test]
fn a_full_map_of_flows_refuses_others_and_outlives_restarts() {
    let scratch = Scratch::new("full");
    let (kernel, _) = Kernel::start(scratch.0.clone()).expect("programs load");
    let maps = [("FLOWS", 1), ("AGENT_FLOWS", AGENT_FLOWS_PER_FLOW)];
    let open = |map: &str| -> HashMap<MapData, FlowKey, Flow> {
        let pinned = MapData::from_pin(scratch.0.pin_dir().join(map)).expect("the pinned map");
        Map::HashMap(pinned).try_into().expect("a hash map")
    };
    let key = |number: u32| FlowKey {
        source_port: number,
        ..Packet::tcp(STRANGER, WORKLOAD).flow()
    };
    let flow = Flow {
        started_ns: 1,
        source_cookie: 7,
        destination_cookie: 42,
    };
    for (map, factor) in maps {
        let mut flows = open(map);
        for number in 0..FLOWS_MAX * factor {
            flows.insert(key(number), flow, 0).expect("fits");
        }
        let refused = flows.insert(key(u32::MAX), flow, 0);
        assert!(refused.is_err(), "{map}: one more than fits");
    }
    drop(kernel);
    let (_kernel, found) = Kernel::start(scratch.0.clone()).expect("taken over");
    assert_eq!(found, Found::Previous);
    for (map, factor) in maps {
        let flows = open(map);
        assert_eq!(flows.keys().count(), (FLOWS_MAX * factor) as usize, "{map}");
    }
}

/// A recorded flow lets its SYN through, to its workload only and for as long as a SYN may take.
#[test]
fn sk_lookup_lets_recorded_flows_through() {
    let scratch = Scratch::new("flows");
    let (kernel, _) = Kernel::start(scratch.0.clone()).expect("programs load");
    let workload = mesh_ebpf::Workload {
        cookie: 42,
        flags: mesh_ebpf::FLAG_FAIL_CLOSED,
        ..mesh_ebpf::Workload::default()
    };
    kernel
        .set_addresses(workload, &[WORKLOAD, WORKLOAD_V6])
        .expect("the addresses are known");
    let clock = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock");
    let now = u64::try_from(std::time::Duration::from(clock).as_nanos()).expect("fits");
    let fresh = Flow {
        started_ns: now,
        source_cookie: 7,
        destination_cookie: workload.cookie,
    };
    let cases = [
        ("fresh", fresh, SK_PASS),
        (
            "of an earlier connection",
            Flow {
                started_ns: now.wrapping_sub(FLOW_SYN_WINDOW_NS),
                ..fresh
            },
            SK_DROP,
        ),
        (
            "to another workload",
            Flow {
                destination_cookie: 43,
                ..fresh
            },
            SK_DROP,
        ),
    ];
    for map in ["FLOWS", "AGENT_FLOWS"] {
        let pinned = MapData::from_pin(scratch.0.pin_dir().join(map)).expect("the pinned map");
        let mut flows: HashMap<_, FlowKey, Flow> =
            Map::HashMap(pinned).try_into().expect("a hash map");
        for packet in [
            Packet::tcp(STRANGER, WORKLOAD),
            Packet::tcp(STRANGER_V6, WORKLOAD_V6),
        ] {
            for (name, flow, expected) in &cases {
                flows.insert(packet.flow(), flow, 0).expect("recorded");
                assert_eq!(
                    kernel.test_lookup(&mut packet.context()).expect(name),
                    *expected,
                    "{map}, {name}, {}",
                    packet.local
                );
            }
            flows.remove(&packet.flow()).expect("forgotten");
        }
    }
}
