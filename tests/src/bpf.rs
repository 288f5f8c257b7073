//! Kernel objects of a node's agent, looked at and taken apart with `bpftool`, as somebody with every right would.

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::Node;

/// The pins of a node's agent.
#[derive(Debug, Clone)]
pub struct Pins(PathBuf);

impl Pins {
    /// Those of the one version that the node has.
    ///
    /// # Errors
    /// No agent has run, or objects of two versions are there.
    pub fn of(node: &Node) -> Result<Self> {
        let folder = node.bpffs_root.join(format!("weft-{}", node.name));
        let versions: Vec<PathBuf> = fs::read_dir(&folder)
            .with_context(|| folder.display().to_string())?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        ensure!(versions.len() == 1, "versions: {versions:?}");
        versions.into_iter().next().map(Self).context("no version")
    }

    /// Version of the objects' layout, as the folder says.
    ///
    /// # Errors
    /// The folder has another name.
    pub fn version(&self) -> Result<u32> {
        let name = self.0.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix('v'));
        Ok(number.context("no version")?.parse()?)
    }

    /// Takes a link from its place and leaves its pin.
    ///
    /// # Errors
    /// There is no such link.
    pub fn detach(&self, link: &str) -> Result<()> {
        bpftool(&[
            "link",
            "detach",
            "pinned",
            &self.path(&format!("link-{link}")),
        ])
        .map(drop)
    }

    /// Removes an entry of a map.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn delete(&self, map: &str, key: &[u8]) -> Result<()> {
        let mut arguments = vec!["map".to_owned(), "delete".to_owned()];
        arguments.extend(["pinned".to_owned(), self.path(map), "key".to_owned()]);
        arguments.push("hex".to_owned());
        arguments.extend(key.iter().map(|byte| format!("{byte:02x}")));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        bpftool(&arguments).map(drop)
    }

    /// Writes entries into a map; `file` holds the commands.
    ///
    /// # Errors
    /// They do not fit.
    pub fn insert(&self, map: &str, entries: &[(Vec<u8>, Vec<u8>)], file: &Path) -> Result<()> {
        let mut commands = String::new();
        for (key, value) in entries {
            let path = self.path(map);
            writeln!(
                commands,
                "map update pinned {path} key hex{} value hex{}",
                hex(key),
                hex(value)
            )?;
        }
        fs::write(file, commands)?;
        bpftool(&["batch", "file", &file.to_string_lossy()]).map(drop)
    }

    /// Entries of a map.
    ///
    /// # Errors
    /// There is no such map.
    pub fn count(&self, map: &str) -> Result<usize> {
        let dump = bpftool(&["-j", "map", "dump", "pinned", &self.path(map)])?;
        let dump: Value = serde_json::from_str(&dump)?;
        Ok(dump.as_array().map_or(0, Vec::len))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

/// An address as the programs have it: IPv6, or IPv4 mapped into it.
#[must_use]
pub fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, " {byte:02x}");
        text
    })
}

fn bpftool(arguments: &[&str]) -> Result<String> {
    let output = Command::new("bpftool")
        .args(arguments)
        .output()
        .context("cannot run bpftool")?;
    ensure!(
        output.status.success(),
        "bpftool {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
