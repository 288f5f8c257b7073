//! The servers of the local test cluster, built by Go from `tests/cluster/servers`.
//!
//! Two binaries: every server of Kubernetes in one, because they share most of their code, and CoreDNS. A stamp beside them
//! names what they were built from; while it fits, nothing is built and Go is not needed.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use mesh_tests::cluster::local;

use super::go;
use crate::shell::{root, run, say};

/// What they are built from.
const SOURCES: [&str; 4] = ["go.mod", "go.sum", "main.go", "dns/main.go"];

/// Builds them unless they are there.
pub fn ensure() -> Result<PathBuf> {
    let folder = local::servers_directory();
    let stamp = stamp()?;
    let stamp_file = folder.join("stamp");
    if fs::read_to_string(&stamp_file).is_ok_and(|built| built == stamp) {
        return Ok(folder);
    }
    say(
        "building the servers of Kubernetes: about 5 minutes on two cores the first time, seconds when Go remembers",
    );
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let version = kubernetes_version()?;
    let minor = version.split('.').nth(1).unwrap_or_default();
    let package = "k8s.io/component-base/version";
    // Without debug information; with the version, because clients and servers compare theirs.
    let flags = format!(
        "-s -w -X {package}.gitVersion=v{version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}"
    );
    build("servers", ".", &flags, &folder)?;
    build("dns", "./dns", "-s -w", &folder)?;
    fs::write(&stamp_file, stamp).context("cannot write the servers' stamp")?;
    Ok(folder)
}

fn build(name: &str, package: &str, flags: &str, folder: &Path) -> Result<()> {
    let mut command = go::command()?;
    command
        .current_dir(sources())
        .args([
            "build",
            "-trimpath",
            "-buildvcs=false",
            "-ldflags",
            flags,
            "-o",
        ])
        .arg(folder.join(name))
        .arg(package)
        .env("CGO_ENABLED", "0");
    run(&mut command)
}

fn sources() -> PathBuf {
    root().join("tests/cluster/servers")
}

/// The same for the same sources and the same architecture.
fn stamp() -> Result<String> {
    let mut hasher = DefaultHasher::new();
    std::env::consts::ARCH.hash(&mut hasher);
    for source in SOURCES {
        let path = sources().join(source);
        fs::read(&path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

fn kubernetes_version() -> Result<String> {
    let text = fs::read_to_string(sources().join("go.mod"))?;
    version_in(&text).context("go.mod requires no k8s.io/kubernetes")
}

fn version_in(module: &str) -> Option<String> {
    module.lines().find_map(|line| {
        let version = line.trim().strip_prefix("k8s.io/kubernetes v")?;
        version.split_whitespace().next().map(ToOwned::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_required() {
        let module =
            "require (\n\tk8s.io/kubectl v0.0.0\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n";
        assert_eq!(version_in(module).as_deref(), Some("1.36.3"));
    }
}
