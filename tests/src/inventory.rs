//! What programs have changed on a machine: listings of everything a node agent may touch, to be compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    lab::{Lab, Node},
    netns,
};

/// State of an established connection in `/proc/net/tcp` (include/net/tcp_states.h).
const TCP_ESTABLISHED: &str = "01";
/// State of a listener.
const TCP_LISTEN: &str = "0A";

/// Everything found, by what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory(BTreeMap<String, BTreeSet<String>>);

impl Inventory {
    /// Lists the routing, the kernel parameters and the BPF links of every namespace of a lab, and the pins, cgroups
    /// and run directories of its nodes.
    ///
    /// # Errors
    /// `ip` or `bpftool` is missing, or a namespace has gone.
    pub fn of(lab: &Lab) -> Result<Self> {
        let mut found = BTreeMap::new();
        let places = lab.nodes().iter().map(|node| &node.netns);
        for netns in places.chain(lab.pods().map(|pod| &pod.netns)) {
            let name = netns.display();
            found.insert(format!("routing of {name}"), routing(netns)?);
            found.insert(format!("sysctls of {name}"), sysctls(netns)?);
        }
        for node in lab.nodes() {
            for folder in [&node.bpffs_root, &node.cgroup_root, &node.run_dir] {
                found.insert(format!("below {}", folder.display()), tree(folder, true)?);
            }
            let links = links(lab, node)?;
            let lines = links.iter().map(|link| format!("{link:?}")).collect();
            found.insert(format!("links of {}", node.name), lines);
        }
        Ok(Self(found))
    }

    /// The same without the lines that name this text.
    #[must_use]
    pub fn without(&self, text: &str) -> Self {
        let mut found = self.0.clone();
        for lines in found.values_mut() {
            lines.retain(|line| !line.contains(text));
        }
        Self(found)
    }

    /// Makes sure that nothing has changed since `before`.
    ///
    /// # Errors
    /// Every line that came or went.
    pub fn require_same_as(&self, before: &Self) -> Result<()> {
        let mut changes = String::new();
        let empty = BTreeSet::new();
        let subjects: BTreeSet<&String> = self.0.keys().chain(before.0.keys()).collect();
        for subject in subjects {
            let now = self.0.get(subject).unwrap_or(&empty);
            let then = before.0.get(subject).unwrap_or(&empty);
            for line in now.difference(then) {
                writeln!(changes, "came to the {subject}: {line}")?;
            }
            for line in then.difference(now) {
                writeln!(changes, "went from the {subject}: {line}")?;
            }
        }
        if !changes.is_empty() {
            bail!("not as before:\n{changes}");
        }
        Ok(())
    }
}

/// A BPF link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Number of the link, unique until reboot.
    pub id: u64,
    /// Where it is attached: cgroup or namespace.
    pub place: PathBuf,
    /// The hook, as `bpftool` spells it.
    pub hook: String,
}

/// The BPF links on a node's cgroups, in its namespace and in those of its pods.
///
/// # Errors
/// `bpftool` is missing.
pub fn links(lab: &Lab, node: &Node) -> Result<BTreeSet<Link>> {
    let mut places: BTreeMap<(&str, u64), PathBuf> = BTreeMap::new();
    for folder in tree(&node.cgroup_root, false)? {
        let path = node.cgroup_root.join(folder);
        places.insert(("cgroup_id", fs::metadata(&path)?.ino()), path);
    }
    let namespaces = node.pods.iter().map(|pod| &pod.netns).chain([&node.netns]);
    for path in namespaces {
        places.insert(("netns_ino", fs::metadata(path)?.ino()), path.clone());
    }
    let listing = Command::new("bpftool")
        .args(["-j", "link"])
        .output()
        .with_context(|| format!("cannot run bpftool for {}", lab.prefix()))?;
    let listing: Value = serde_json::from_slice(&listing.stdout).context("bpftool -j link")?;
    let all = listing.as_array().cloned().unwrap_or_default();
    let link = |entry: &Value| {
        let place = ["cgroup_id", "netns_ino"].iter().find_map(|kind| {
            let number = entry.get(kind)?.as_u64()?;
            places.get(&(*kind, number)).cloned()
        })?;
        Some(Link {
            id: entry.get("id")?.as_u64()?,
            place,
            hook: entry.get("attach_type")?.as_str()?.to_owned(),
        })
    };
    Ok(all.iter().filter_map(link).collect())
}

/// Connections that a server on a port of a namespace has, in state ESTABLISHED.
///
/// # Errors
/// The namespace has gone.
pub fn established(netns: &Path, port: u16) -> Result<usize> {
    let on_port = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = fields.get(1).and_then(|end| end.rsplit_once(':'));
        fields.get(3) == Some(&TCP_ESTABLISHED)
            && local.is_some_and(|(_, digits)| u16::from_str_radix(digits, 16) == Ok(port))
    };
    netns::within(netns, || {
        ["tcp", "tcp6"]
            .iter()
            .map(|table| {
                // A kernel without IPv6 has one table only.
                let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                text.unwrap_or_default()
                    .lines()
                    .skip(1)
                    .filter(on_port)
                    .count()
            })
            .sum()
    })
}

/// Sockets of a namespace that listen: their ports and inodes, which name the sockets.
///
/// # Errors
/// The namespace has gone.
pub fn listeners(netns: &Path) -> Result<BTreeSet<(u16, u64)>> {
    netns::within(netns, || {
        let mut found = BTreeSet::new();
        for table in ["tcp", "tcp6"] {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
            for line in text.unwrap_or_default().lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let port = fields.get(1).and_then(|end| end.rsplit_once(':'));
                let port = port.and_then(|(_, digits)| u16::from_str_radix(digits, 16).ok());
                let inode = fields.get(9).and_then(|inode| inode.parse().ok());
                if let (Some(port), Some(inode), Some(&TCP_LISTEN)) = (port, inode, fields.get(3)) {
                    found.insert((port, inode));
                }
            }
        }
        found
    })
}

/// Occupies a port of a namespace for as long as the result lives.
///
/// # Errors
/// It is taken.
pub fn occupy(netns: &Path, address: SocketAddr) -> Result<std::net::TcpListener> {
    netns::within(netns, || std::net::TcpListener::bind(address))?
        .with_context(|| format!("cannot listen on {address}"))
}

fn routing(netns: &Path) -> Result<BTreeSet<String>> {
    let name = netns.file_name().context("a namespace has a name")?;
    let mut lines = BTreeSet::new();
    for (family, object) in [
        ("-4", "rule"),
        ("-6", "rule"),
        ("-4", "route"),
        ("-6", "route"),
    ] {
        let mut command = Command::new("ip");
        command.arg("-n").arg(name).args([family, object, "show"]);
        if object == "route" {
            command.args(["table", "all"]);
        }
        let output = command.output().context("cannot run ip")?;
        // A namespace without IPv6 has no tables to show, which `ip` calls an error.
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        lines.extend(
            text.lines()
                .map(|line| format!("{family} {object} {}", line.trim())),
        );
    }
    Ok(lines)
}

/// All readable parameters below `net`, counters aside.
fn sysctls(netns: &Path) -> Result<BTreeSet<String>> {
    netns::within(netns, || {
        let mut lines = BTreeSet::new();
        for path in tree(Path::new("/proc/sys/net"), true)? {
            let Ok(value) = fs::read_to_string(Path::new("/proc/sys/net").join(&path)) else {
                continue;
            };
            if !path.ends_with("_count") {
                lines.insert(format!("{path} = {}", value.trim()));
            }
        }
        Ok(lines)
    })?
}

/// Paths below a folder, relative to it, the folder itself included; with or without what is no folder.
fn tree(folder: &Path, with_files: bool) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(inner) = open.pop() {
        let path = folder.join(&inner);
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|file| file.is_dir());
        if is_folder {
            let entries =
                fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
            for entry in entries {
                open.push(inner.join(entry?.file_name()));
            }
        }
        if (is_folder || with_files) && path.exists() {
            found.insert(inner.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}
