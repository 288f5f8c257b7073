//! The mount table, as `/proc/self/mountinfo` writes it (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub point: PathBuf,
    /// Its type, for example `cgroup2`.
    pub kind: String,
}

/// Reads the table; lines of another shape are left out.
pub fn parse(table: &str) -> Vec<Mount> {
    table
        .lines()
        .filter_map(|line| {
            // `36 35 98:0 /root /point options [optional fields] - type source options`
            let (head, tail) = line.split_once(" - ")?;
            let point = head.split(' ').nth(4)?;
            let kind = tail.split(' ').next().filter(|kind| !kind.is_empty())?;
            Some(Mount {
                point: unescape(point),
                kind: kind.to_owned(),
            })
        })
        .collect()
}

/// The mount that holds `path`: the longest mount point above it, the latest of several on the same point.
pub fn holding<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len())
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() {
            tail.get(3..).unwrap_or_default()
        } else {
            tail
        };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 master:2 - cgroup2 cgroup2 rw,nsdelegate
31 27 0:27 / /mnt/with\\040space\\134 rw - bpf none rw
32 27 0:28 / /mnt rw - tmpfs first rw
33 27 0:29 / /mnt rw - xfs second rw
garbage
1 2 3 - short
";

    #[test]
    fn reads_points_and_types() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 6);
        assert_eq!(
            mounts[2],
            Mount {
                point: "/sys/fs/cgroup/unified".into(),
                kind: "cgroup2".into()
            }
        );
        assert_eq!(mounts[3].point, PathBuf::from("/mnt/with space\\"));
    }

    #[test]
    fn the_deepest_and_latest_mount_holds_a_path() {
        let mounts = parse(TABLE);
        let kind = |path: &str| holding(&mounts, Path::new(path)).map(|mount| mount.kind.as_str());
        assert_eq!(kind("/sys/fs/cgroup/unified/pod"), Some("cgroup2"));
        assert_eq!(kind("/sys/fs/cgroup/unified-not"), Some("ext4"));
        assert_eq!(kind("/mnt/x"), Some("xfs"));
    }
}
