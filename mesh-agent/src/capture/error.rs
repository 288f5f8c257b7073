//! What can go wrong with the kernel, and what the operator should look at.

use std::{io, path::PathBuf};

/// A failure of capture. Nothing that worked before it is lost: each step undoes itself.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The programs were refused.
    #[error(
        "cannot load eBPF program {program}: {reason} (is this Linux 6.1 or later with BTF, and does the agent hold CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON? `weft check` tells)"
    )]
    Load {
        /// Which program.
        program: String,
        /// The kernel's reason, verifier output included.
        reason: String,
    },
    /// A link could not be made or updated.
    #[error("cannot attach {program} to {target}: {source}")]
    Attach {
        /// Which program.
        program: &'static str,
        /// The cgroup or namespace.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// A file of bpffs, cgroupfs or the run directory.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds the agent's cgroup.
    #[error(
        "another agent of node {node} is running (in {cgroup}: process {pids}); stop it first, or give this one a --node name of its own"
    )]
    AnotherAgent {
        /// The node.
        node: String,
        /// The processes there, as the kernel names them here; 0 is one of another PID namespace.
        pids: String,
        /// The cgroup of that node's agents.
        cgroup: PathBuf,
    },
    /// The folder is not on the file system it must be on.
    #[error(
        "{path} is not on a {expected} file system; mount it with `{hint}`, or name another folder with {option}"
    )]
    WrongFileSystem {
        /// Which folder.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// How to mount it.
        hint: &'static str,
        /// The option that names it.
        option: &'static str,
    },
    /// A map operation.
    #[error("kernel map {map}: {reason}")]
    Map {
        /// Which map.
        map: &'static str,
        /// Why.
        reason: String,
    },
    /// The namespace cannot be opened or entered.
    #[error("network namespace {path}: {source} (does it still exist?)")]
    Netns {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The namespace has no address to capture.
    #[error(
        "network namespace {0} has no global address yet; enrol the workload after its network was set up"
    )]
    NoAddress(PathBuf),
    /// An address is already captured for another workload.
    #[error(
        "address {address} of {path} belongs to an enrolled workload already; overlapping addresses on one node are not supported"
    )]
    AddressTaken {
        /// Which address.
        address: std::net::IpAddr,
        /// Of which namespace.
        path: PathBuf,
    },
    /// The namespace is the agent's own.
    #[error("{0} is the agent's own network namespace, which cannot be enrolled")]
    OwnNamespace(PathBuf),
    /// Another process has one of the agent's ports.
    #[error(
        "port {port} in network namespace {path}: {source} (another program of the workload uses it?)"
    )]
    Listen {
        /// Which port.
        port: u16,
        /// In which namespace.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The rule or the routes.
    #[error("cannot {action} in network namespace {path}: {reason}")]
    Route {
        /// What was tried.
        action: &'static str,
        /// In which namespace.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The workload is enrolled already, under that name or that namespace.
    #[error("{0} is enrolled already")]
    AlreadyEnrolled(String),
    /// The agent serves no listener of the workload; only a new enrolment makes others.
    #[error("there are no listeners of {0}; un-enrol it and enrol it again")]
    NoListener(String),
    /// No such workload.
    #[error("{0} is not enrolled on this node")]
    NotEnrolled(String),
    /// A named limit was reached.
    #[error("limit {name} ({limit}) reached")]
    Limit {
        /// Its name.
        name: &'static str,
        /// Its value.
        limit: u32,
    },
}

impl CaptureError {
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    pub(crate) fn map(map: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Map {
            map,
            reason: error.to_string(),
        }
    }
}
