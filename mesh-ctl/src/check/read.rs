//! Looks at the machine. Thin: every judgement is in [`super::judge`].

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit},
        statvfs::statvfs,
    },
    unistd::{AccessFlags, access},
};

use super::mounts::{self, Mount};

/// A cgroup v2 folder for the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cgroup {
    /// No cgroup v2 file system is mounted.
    NotMounted,
    /// The folder asked for does not lie in a cgroup v2 file system.
    NotCgroup2(PathBuf),
    /// It is there but may not be written.
    ReadOnly(PathBuf),
    /// Usable.
    Usable(PathBuf),
}

/// A file as text.
pub fn text(path: &str) -> io::Result<String> {
    fs::read_to_string(path)
}

/// Whether a file or folder is there.
pub fn exists(path: &str) -> bool {
    Path::new(path).exists()
}

/// What `uname -r` says.
pub fn kernel_release() -> io::Result<String> {
    text("/proc/sys/kernel/osrelease")
}

/// The mount table; empty when /proc is not there.
pub fn mounts() -> Vec<Mount> {
    text("/proc/self/mountinfo")
        .map(|table| mounts::parse(&table))
        .unwrap_or_default()
}

/// The cgroup v2 folder asked for, or else the first mount of that kind (unified or hybrid).
pub fn cgroup(asked: Option<&Path>, mounts: &[Mount]) -> Cgroup {
    let root = match asked {
        Some(path) => {
            let held_by = mounts::holding(mounts, path).map(|mount| mount.kind.as_str());
            if held_by != Some("cgroup2") || !path.is_dir() {
                return Cgroup::NotCgroup2(path.to_owned());
            }
            path.to_owned()
        }
        None => match mounts.iter().find(|mount| mount.kind == "cgroup2") {
            Some(mount) => mount.point.clone(),
            None => return Cgroup::NotMounted,
        },
    };
    match access(&root, AccessFlags::W_OK) {
        Ok(()) => Cgroup::Usable(root),
        Err(_) => Cgroup::ReadOnly(root),
    }
}

/// Soft and hard limit of open files.
pub fn descriptor_limits() -> io::Result<(u64, u64)> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?)
}

/// Free bytes where `path` lies or will lie: of its nearest folder that exists.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let stat = statvfs(existing)?;
    // The types differ between architectures of libc.
    #[allow(clippy::useless_conversion)]
    Ok(u64::from(stat.blocks_available()).saturating_mul(u64::from(stat.fragment_size())))
}

/// Which of `names` the kernel's type information knows.
pub fn btf_names(names: &[(&'static str, &'static str)]) -> io::Result<Vec<&'static str>> {
    let btf = fs::read("/sys/kernel/btf/vmlinux")?;
    // Names in BTF's string section end with NUL and follow the NUL of the name before (kernel, btf.rst).
    let known: std::collections::HashSet<&[u8]> = btf.split(|byte| *byte == 0).collect();
    Ok(names
        .iter()
        .map(|(_, name)| *name)
        .filter(|name| known.contains(name.as_bytes()))
        .collect())
}
