//! `weft pod run` in what a container without privilege is: namespaces of its own and a read-only `/proc/sys`.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::programs;

/// Makes the surroundings of a container and runs a line of shell in them; `$0` is weft.
fn in_a_container(line: &str) -> Result<String> {
    let surroundings = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro,nosuid,nodev,noexec /proc/sys";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--net", "--cgroup"])
        .args(["sh", "-c", &format!("{surroundings} && {line}")])
        .arg(programs::own("weft")?)
        .output()
        .context("cannot run unshare (Debian package util-linux)")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

/// A setting of the container's own network namespace.
const WRITE: &str = "echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward";

#[test]
fn settings_become_writable_in_the_container_only() -> Result<()> {
    let refused = in_a_container(WRITE).expect_err("read-only without weft pod run");
    ensure!(
        refused.to_string().contains("Read-only file system"),
        "{refused}"
    );
    let written = in_a_container(&format!("$0 pod run -- sh -c '{WRITE}'"))?;
    assert_eq!(written.trim(), "1");
    // The shell that started it still sees what the runtime has mounted, and so does the machine.
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let ours = mounts
        .lines()
        .filter(|line| line.contains(" /proc/sys "))
        .count();
    assert_eq!(ours, 0, "{mounts}");
    Ok(())
}

#[test]
fn the_program_runs_in_the_nodes_cgroup_namespace() -> Result<()> {
    let namespace = "readlink /proc/self/ns/cgroup";
    let of_node = std::fs::read_link("/proc/1/ns/cgroup")?;
    let before = in_a_container(namespace)?;
    ensure!(
        Path::new(before.trim()) != of_node,
        "the container has none of its own"
    );
    let after = in_a_container(&format!("$0 pod run -- {namespace}"))?;
    assert_eq!(Path::new(after.trim()), of_node);
    Ok(())
}

#[test]
fn a_missing_program_is_named() -> Result<()> {
    let error = in_a_container("$0 pod run -- /mesh-agent run").expect_err("there is none");
    ensure!(
        error.to_string().contains("cannot run /mesh-agent"),
        "{error}"
    );
    Ok(())
}
