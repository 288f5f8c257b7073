//! Network namespaces: making, entering and configuring them.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Where `ip netns` keeps the names of namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// Path of the namespace with this name.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// Makes a namespace and gives it a name.
///
/// # Errors
/// Not root, or the name is taken.
pub fn add(name: &str) -> Result<()> {
    ip(&["netns", "add", name])
}

/// Takes the name away; the namespace itself goes when its last process and socket have gone.
///
/// # Errors
/// There is no such name.
pub fn delete(name: &str) -> Result<()> {
    ip(&["netns", "del", name])
}

/// Runs a closure on a thread of its own inside a namespace.
///
/// # Errors
/// The namespace cannot be entered, or the closure panicked.
pub fn within<T: Send>(netns: &Path, run: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(netns)?;
                Ok(run())
            })
            .join()
            .map_err(|_| anyhow!("a thread in {} panicked", netns.display()))?
    })
}

/// Moves the calling thread into a namespace.
///
/// # Errors
/// The namespace has gone, or we lack CAP_SYS_ADMIN.
pub fn enter(netns: &Path) -> Result<()> {
    let file =
        File::open(netns).with_context(|| format!("cannot open namespace {}", netns.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter namespace {}", netns.display()))
}

/// Sets kernel parameters below `/proc/sys/net` in a namespace; each is `(path below net, value)`.
///
/// # Errors
/// A parameter does not exist or refuses the value.
pub fn sysctl(netns: &Path, settings: &[(&str, &str)]) -> Result<()> {
    within(netns, || {
        for (name, value) in settings {
            std::fs::write(Path::new("/proc/sys/net").join(name), value)
                .with_context(|| format!("cannot set net/{name} to {value}"))?;
        }
        Ok(())
    })?
}

/// Runs lines of `ip` commands in a namespace, all or up to the first that fails.
///
/// # Errors
/// What `ip` said.
pub fn ip_batch(netns: &str, lines: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", netns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip (Debian package iproute2)")?;
    let mut stdin = child.stdin.take().context("ip has no standard input")?;
    stdin.write_all((lines.join("\n") + "\n").as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip in {netns}: {}\nof:\n{}",
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.join("\n")
        );
    }
    Ok(())
}

/// Runs one `ip` command.
///
/// # Errors
/// What `ip` said.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot run ip (Debian package iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
