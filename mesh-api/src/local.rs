//! Messages of the agent's local socket (`<run-dir>/agent.sock`, a UNIX stream socket that only root may open).
//!
//! One request per connection: a JSON object on one line of at most [`REQUEST_MAX_BYTES`], answered by one JSON
//! object on one line. Unknown fields are errors, so that a misspelt option is never ignored.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{identity::Identity, names::WorkloadUid};

/// Longest request line, newline included, in bytes.
pub const REQUEST_MAX_BYTES: usize = 16 * 1024;

/// Name of the socket inside the agent's run directory.
pub const SOCKET_NAME: &str = "agent.sock";

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Capture a workload's traffic from now on.
    Enroll(Enrolment),
    /// Stop capturing; undo everything that enrolment did.
    Unenroll {
        /// Namespace of the workload.
        namespace: String,
        /// Name of the workload.
        name: String,
    },
    /// The node, its workloads, capture health and certificates.
    Status,
    /// Everything the agent believes: services, workloads, policies, verdicts.
    Dump,
    /// Live edges with their rates.
    Top,
    /// Start another agent that takes over from this one without a lost connection.
    Upgrade {
        /// Absolute path of its program; the running agent's own when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        binary: Option<String>,
        /// Seconds that open connections get to end by themselves; the new agent's configuration says when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        drain_deadline_seconds: Option<u64>,
    },
}

/// Which process group to capture, and as whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Enrolment {
    /// Kubernetes namespace of the workload.
    pub namespace: String,
    /// Name of the workload (of the pod).
    pub name: String,
    /// Path of its network namespace, for example `/run/netns/web` or `/proc/123/ns/net`.
    pub netns: String,
    /// Path of its cgroup (v2), where it has one of its own. Needed for the same-node kernel path, because only there
    /// can its flows be recorded without a cost to every other process of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Response {
    /// The request was carried out.
    Done {
        /// What was done, for a human.
        message: String,
    },
    /// The request was refused or failed; nothing that worked before was lost.
    Error {
        /// What went wrong, where, and what to do.
        message: String,
    },
    /// Answer to [`Request::Status`].
    Status(Box<Status>),
    /// Answer to [`Request::Dump`]: a JSON object of sections.
    Dump {
        /// The state, by section.
        state: serde_json::Value,
    },
    /// Answer to [`Request::Top`].
    Top {
        /// One row per live or recent edge.
        edges: Vec<Edge>,
    },
}

/// The node as its agent sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Node name.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// Process id of the agent.
    pub pid: u32,
    /// Milliseconds since the agent started.
    pub uptime_ms: u64,
    /// State of the discovery stream: `connected`, `snapshot` (serving from disk) or `waiting`.
    pub discovery: String,
    /// The last good state on disk: `current`, `behind` (newer changes are about to be written) or `missing`.
    pub snapshot: String,
    /// Enrolled workloads.
    pub workloads: Vec<WorkloadStatus>,
    /// What readiness still waits for; empty when ready.
    pub pending: Vec<String>,
    /// What the agent's process may do; absent where the kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confinement: Option<Confinement>,
    /// Earlier agents that still serve connections from before their upgrade.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<DrainingAgent>,
}

/// What a process has given up, as the kernel sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Confinement {
    /// Capabilities that it holds, without the prefix `CAP_`.
    pub capabilities: Vec<String>,
    /// No program that it starts can gain rights.
    pub no_new_privileges: bool,
    /// System calls that it never needs are refused.
    pub system_call_filter: bool,
    /// Whether a crash may write its memory, keys included, to disk.
    pub core_dumps: bool,
}

/// An agent that was replaced and still serves the connections that it had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainingAgent {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Connections and tunnels that it still has.
    pub connections: u64,
    /// When it closes those that are left, seconds since 1970.
    pub ends_at: i64,
}

/// One enrolled workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadStatus {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Key in discovery; absent until the control plane has told of the workload.
    pub uid: Option<WorkloadUid>,
    /// Identity; absent until the control plane has told of the workload.
    pub identity: Option<Identity>,
    /// Addresses captured.
    pub addresses: Vec<IpAddr>,
    /// Path of the network namespace.
    pub netns: String,
    /// Network-namespace cookie, the kernel's name of it.
    pub netns_cookie: u64,
    /// `ok`, or what is wrong with its capture.
    pub capture: String,
    /// `closed` or `open`: what the kernel does when the agent is dead.
    pub failure_mode: String,
    /// `kernel` or `tunnel`.
    pub same_node: String,
    /// Connections open now.
    pub connections: u64,
    /// Expiry of the certificate, seconds since 1970; absent without one.
    pub certificate_not_after: Option<i64>,
    /// `valid`, `missing`, or what is wrong.
    pub certificate: String,
}

/// Traffic between two workloads, one direction of connecting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Edge {
    /// `outbound` or `inbound`, as seen by this node.
    pub direction: String,
    /// Source workload, `<namespace>/<name>` or `unknown`.
    pub source: String,
    /// Destination workload or service.
    pub destination: String,
    /// Destination as dialled.
    pub destination_address: Option<SocketAddr>,
    /// `mutual_tls`, `kernel` or `none`.
    pub security: String,
    /// Connections open now.
    pub open: u64,
    /// Connections opened since start.
    pub opened: u64,
    /// Connections that failed since start.
    pub failed: u64,
    /// Bytes from source to destination since start.
    pub bytes_sent: u64,
    /// Bytes from destination to source since start.
    pub bytes_received: u64,
    /// Smoothed round-trip time as the kernel measured it, microseconds.
    pub rtt_us: Option<u64>,
}
