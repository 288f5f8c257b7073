//! What a local cluster leaves beyond the lab's own things: containers in cgroups of containerd's naming, and mounts.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::cgroup;

/// Folder below a containerd's state with one folder a running container (containerd's runtime v2 layout).
const TASKS: &str = "containerd-state/io.containerd.runtime.v2.task/k8s.io";

/// cgroup below which containerd's CRI puts containers, in every hierarchy.
const CONTAINERS: &str = "k8s.io";

/// Where hierarchies of version 1 are mounted, one folder each, beside that of version 2.
const HIERARCHIES: &str = "/sys/fs/cgroup";

/// The containers of all nodes below a cluster's folder. To be looked up before their containerds are gone.
pub(crate) fn containers(directory: &Path) -> Vec<String> {
    let nodes = entries(directory);
    nodes
        .iter()
        .flat_map(|node| entries(&node.join(TASKS)))
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect()
}

/// Kills the containers and removes their cgroups in every hierarchy.
///
/// # Errors
/// The first that could not be removed; all are tried.
pub(crate) fn remove_containers(ids: &[String]) -> Result<()> {
    let mut outcome = Ok(());
    let unified = cgroup::mount_point()?;
    for id in ids {
        outcome = outcome.and(cgroup::remove(&unified.join(CONTAINERS).join(id)));
    }
    for hierarchy in entries(Path::new(HIERARCHIES)) {
        let parent = hierarchy.join(CONTAINERS);
        for id in ids {
            remove_empty(&parent.join(id));
        }
        // Stays while another cluster's containers are in it.
        drop(fs::remove_dir(&parent));
    }
    drop(fs::remove_dir(unified.join(CONTAINERS)));
    outcome
}

/// Removes a folder of cgroups of version 1, which are empty once version 2 has killed everything; the kernel removes the
/// last traces of a dead process by itself, a moment later.
fn remove_empty(folder: &Path) {
    for inner in entries(folder) {
        if inner.is_dir() {
            remove_empty(&inner);
        }
    }
    drop(fs::remove_dir(folder));
}

/// Makes a folder a mount of its own that shares what is mounted below it later, as the root of a real node does: pods then
/// see the namespaces of pods that come after them.
///
/// # Errors
/// The kernel refuses.
pub(super) fn share(directory: &Path) -> Result<()> {
    let itself = |flags, source: Option<&Path>| {
        mount::<Path, Path, str, str>(source, directory, None, flags, None)
            .with_context(|| format!("cannot make {} a shared mount", directory.display()))
    };
    itself(MsFlags::MS_BIND, Some(directory))?;
    itself(MsFlags::MS_SHARED, None)
}

/// Takes away every mount of a folder and below it, the inner ones first.
///
/// # Errors
/// The first that could not be taken away; all are tried.
pub(crate) fn unmount(directory: &Path) -> Result<()> {
    let mounts =
        fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let mut outcome = Ok(());
    for target in below(&mounts, directory) {
        let unmounted = umount2(&target, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", target.display()));
        outcome = outcome.and(unmounted);
    }
    outcome
}

fn below(mounts: &str, directory: &Path) -> Vec<PathBuf> {
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let mut found: Vec<PathBuf> = targets
        .map(|target| PathBuf::from(target.replace("\\040", " ")))
        .filter(|target| target.starts_with(directory))
        .collect();
    found.sort();
    found.reverse();
    found
}

/// Kills the processes of one server's cgroup, but not the shims that a containerd has started there: they hold containers,
/// and a restarted containerd finds them.
pub(crate) fn kill_servers_only(cgroup: &Path) -> Result<()> {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs"))
        .with_context(|| format!("cannot list the processes of {}", cgroup.display()))?;
    for pid in processes.lines() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if !name.starts_with("containerd-shim") {
            let pid = pid.parse().context("the kernel lists numbers")?;
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_mounts_come_first_and_others_are_left_alone() {
        let mounts = "a /run/c/n1 tmpfs rw 0 0\nb /run/c/n1/x\\040y tmpfs rw 0 0\nc /run/cc tmpfs rw 0 0\nd /run/c tmpfs rw 0 0\n";
        assert_eq!(
            below(mounts, Path::new("/run/c")),
            ["/run/c/n1/x y", "/run/c/n1", "/run/c"].map(PathBuf::from)
        );
    }

    #[test]
    fn containers_of_every_node_are_found() {
        let folder = std::env::temp_dir().join(format!("weft-sweep-{}", std::process::id()));
        for (node, id) in [("node1", "aa"), ("node2", "bb")] {
            fs::create_dir_all(folder.join(node).join(TASKS).join(id)).expect("made");
        }
        let mut found = containers(&folder);
        found.sort();
        assert_eq!(found, ["aa", "bb"]);
        fs::remove_dir_all(folder).expect("removed");
    }
}
