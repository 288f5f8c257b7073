//! Control groups, version 2: one per node and pod, so that programs can be attached and processes found.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::wait;

/// How long killed processes may take to be gone. They are gone in milliseconds unless the machine is in trouble.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The mount point of cgroup v2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid machine.
///
/// # Errors
/// There is none.
pub fn mount_point() -> Result<PathBuf> {
    let mounts =
        fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mount_point_in(&mounts)
        .context("no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup)")
}

fn mount_point_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    })
}

/// Moves this process into a cgroup; sockets that it makes from then on belong there.
///
/// # Errors
/// There is no such cgroup.
pub fn join(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("cannot join through {}", procs.display()))
}

/// Kills every process in a cgroup and below it, waits until they are gone, and removes the cgroups.
/// A cgroup that does not exist is done already.
///
/// # Errors
/// Processes survive SIGKILL, or the cgroups cannot be removed.
pub fn remove(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    kill(cgroup)?;
    remove_tree(cgroup).with_context(|| format!("cannot remove cgroup {}", cgroup.display()))
}

/// Kills every process in a cgroup and below it, and waits until they are gone.
///
/// # Errors
/// Processes survive SIGKILL.
pub fn kill(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1")
        .with_context(|| format!("cannot kill the processes of cgroup {}", cgroup.display()))?;
    wait::until(
        &format!("cgroup {} to be empty", cgroup.display()),
        KILL_LIMIT,
        || Ok((!populated(cgroup)?).then_some(())),
    )
}

/// Whether a process lives in a cgroup or below it.
///
/// # Errors
/// The cgroup cannot be read.
pub fn populated(cgroup: &Path) -> Result<bool> {
    let events = fs::read_to_string(cgroup.join("cgroup.events"))
        .with_context(|| format!("cannot read the events of cgroup {}", cgroup.display()))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_mount_is_found_on_hybrid_and_pure_machines() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let pure = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        assert_eq!(
            mount_point_in(hybrid),
            Some("/sys/fs/cgroup/unified".into())
        );
        assert_eq!(mount_point_in(pure), Some("/sys/fs/cgroup".into()));
        assert_eq!(mount_point_in("tmpfs /tmp tmpfs rw 0 0\n"), None);
    }
}
