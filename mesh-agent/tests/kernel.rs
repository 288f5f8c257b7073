//! The eBPF programs in the running kernel: they load, they are adopted, and `sk_lookup` decides right on hand-made
//! contexts. Needs root.

use std::{fs, path::PathBuf};

use mesh_agent::capture::kernel::{Found, Kernel, KernelConfig, remove_agent_cgroup, remove_node_pins};
use nix::mount::{MsFlags, mount, umount};

/// Kernel objects in a cgroup and on a bpffs of their own; gone at the end, also of a failed test.
struct Scratch(KernelConfig);

impl Scratch {
    fn new(name: &str) -> Self {
        let unified = PathBuf::from("/sys/fs/cgroup/unified");
        let cgroup = if unified.is_dir() { unified } else { PathBuf::from("/sys/fs/cgroup") };
        let root = cgroup.join(format!("weft-test-{name}-{}", std::process::id()));
        fs::create_dir(&root).expect("a cgroup of the test's own");
        let bpffs = std::env::temp_dir().join(format!("weft-test-{name}-{}", std::process::id()));
        fs::create_dir(&bpffs).expect("a mount point");
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).expect("mount bpffs");
        Self(KernelConfig { cgroup_root: root, bpffs_root: bpffs, node: format!("test-{name}") })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_node_pins(&self.0);
        remove_agent_cgroup(&self.0);
        // The process sits in the test's root cgroup by now; it must leave before that can go.
        let parent = self.0.cgroup_root.parent().expect("below the mount").join("cgroup.procs");
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
    let (_second, found) = Kernel::start(scratch.0.clone()).expect("pinned maps and links are taken over");
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
