//! Messages between two agents of a node, of which one takes over from the other (`<run-dir>/handover.sock`, a UNIX
//! socket of type SEQPACKET that only root may open).
//!
//! Each message is one JSON object of at most [`MESSAGE_MAX_BYTES`], with at most [`MESSAGE_MAX_DESCRIPTORS`]
//! descriptors (`SCM_RIGHTS`). The conversation:
//!
//! ```text
//! successor                                            predecessor
//! Hello ────────────────────────────────────────────▶  changes no enrolment from here on
//!         ◀──────────────────────────────── Offer (descriptors of the node)
//!         ◀──────────────────────────────── Workloads (three listeners each), as often as needed
//!         ◀──────────────────────────────── Tunnels, as often as needed
//!         ◀──────────────────────────────── Complete
//! becomes ready, warms its pool, puts its programs in place
//! Commit ───────────────────────────────────────────▶  stops accepting; what arrives waits in the shared queues
//!         ◀──────────────────────────────── Paused
//! accepts
//! Serving ──────────────────────────────────────────▶  drains and ends
//! ```
//!
//! A successor that goes away before `Serving` changes nothing: the predecessor puts its programs back and goes on.
//! A predecessor that goes away after `Complete` does not stop the successor, which has everything it needs.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::identity::Identity;

/// Version of this conversation.
pub const PROTOCOL: u32 = 1;
/// Name of the socket inside the run directory.
pub const SOCKET_NAME: &str = "handover.sock";
/// Longest message, in bytes: well below the default socket buffer of 208 KiB, which a message must fit into.
pub const MESSAGE_MAX_BYTES: usize = 64 * 1024;
/// Most descriptors of one message; the kernel allows 253 (`SCM_MAX_FD`, include/net/scm.h).
pub const MESSAGE_MAX_DESCRIPTORS: usize = WORKLOADS_PER_MESSAGE * LISTENERS_PER_WORKLOAD;
/// Workloads of one message.
pub const WORKLOADS_PER_MESSAGE: usize = 64;
/// Outbound, plaintext, tunnel: in this order.
pub const LISTENERS_PER_WORKLOAD: usize = 3;
/// Tunnels of one message.
pub const TUNNELS_PER_MESSAGE: usize = 32;
/// Tunnels that are told of; more are opened when they are needed.
pub const TUNNELS_MAX: usize = 1024;
/// Identities of a tunnel's peer that are told; a tunnel with more is opened when it is needed.
pub const TUNNEL_IDENTITIES_MAX: usize = 8;

/// What the agent that takes over says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromSuccessor {
    /// Asks for everything.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Version of the program.
        version: String,
        /// Which node it wants to serve, and where its kernel objects would lie.
        place: Place,
    },
    /// It is ready and its programs are in place: stop accepting.
    Commit {
        /// What its configuration gives the predecessor's connections, in seconds.
        drain_deadline_seconds: u64,
    },
    /// It accepts: the predecessor is not needed any more.
    Serving,
    /// It gives up; nothing changes.
    Abort {
        /// Why, for the operator.
        reason: String,
    },
}

/// What the agent that is replaced says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromPredecessor {
    /// No.
    Refused {
        /// Why, for the operator.
        reason: String,
    },
    /// Who it is. Carries the descriptors named by [`NodeDescriptor::ALL`], in that order.
    Offer {
        /// Version of the program.
        version: String,
        /// Its process id.
        pid: u32,
        /// Version of the kernel objects.
        abi: u32,
        /// Where it serves metrics, readiness and admin: as configured, not as bound.
        addresses: [SocketAddr; 3],
    },
    /// Workloads that it serves. Carries [`LISTENERS_PER_WORKLOAD`] descriptors for each.
    Workloads {
        /// At most [`WORKLOADS_PER_MESSAGE`].
        workloads: Vec<OfferedWorkload>,
    },
    /// Tunnels that it has open.
    Tunnels {
        /// At most [`TUNNELS_PER_MESSAGE`].
        tunnels: Vec<OpenTunnel>,
    },
    /// That was all.
    Complete,
    /// It accepts no more.
    Paused,
}

/// The descriptors of an [`FromPredecessor::Offer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeDescriptor {
    /// Lock of the run directory.
    RunLock,
    /// Lock of the agent's cgroup.
    CgroupLock,
    /// Listener of the hand-over socket.
    Handover,
    /// Listener of the local socket.
    Local,
    /// Listener of the metrics.
    Metrics,
    /// Listener of readiness.
    Readiness,
    /// Listener of admin.
    Admin,
}

impl NodeDescriptor {
    /// All of them, in the order in which they are sent.
    pub const ALL: [Self; 7] = [
        Self::RunLock,
        Self::CgroupLock,
        Self::Handover,
        Self::Local,
        Self::Metrics,
        Self::Readiness,
        Self::Admin,
    ];
}

/// What two agents must agree in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Name of the node.
    pub node: String,
    /// The cgroup v2 folder below which connections are captured.
    pub cgroup_root: String,
    /// The folder on bpffs.
    pub bpffs_root: String,
}

/// A workload that the predecessor serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferedWorkload {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Cookie of its network namespace.
    pub cookie: u64,
    /// The predecessor has a valid certificate for it: the successor waits until it has one, too.
    pub certified: bool,
}

/// A tunnel that the predecessor has open.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenTunnel {
    /// Number of the worker that holds it.
    pub worker: usize,
    /// Cookie of the network namespace that it was dialled from.
    pub cookie: u64,
    /// Whose certificate it shows.
    pub source: Identity,
    /// Whose certificate is accepted; at most [`TUNNEL_IDENTITIES_MAX`].
    pub expected: Vec<Identity>,
    /// The peer's tunnel port.
    pub destination: SocketAddr,
    /// The address that it shows, where it is not the kernel's choice.
    pub source_address: Option<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_messages_fit() {
        let name = "n".repeat(253);
        let workload = OfferedWorkload {
            namespace: name.clone(),
            name: name.clone(),
            cookie: u64::MAX,
            certified: false,
        };
        let identity = Identity::new("cluster.local", &"n".repeat(63), &"s".repeat(63));
        let tunnel = OpenTunnel {
            worker: usize::MAX,
            cookie: u64::MAX,
            source: identity.clone().expect("an identity"),
            expected: vec![identity.expect("an identity"); TUNNEL_IDENTITIES_MAX],
            destination: "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
                .parse()
                .expect("an address"),
            source_address: Some([0xff; 16].into()),
        };
        for message in [
            FromPredecessor::Workloads {
                workloads: vec![workload; WORKLOADS_PER_MESSAGE],
            },
            FromPredecessor::Tunnels {
                tunnels: vec![tunnel; TUNNELS_PER_MESSAGE],
            },
        ] {
            let text = serde_json::to_vec(&message).expect("JSON");
            assert!(text.len() <= MESSAGE_MAX_BYTES, "{}", text.len());
            let back: FromPredecessor = serde_json::from_slice(&text).expect("read back");
            assert_eq!(back, message);
        }
    }
}
