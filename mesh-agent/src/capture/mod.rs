//! Everything in the kernel: eBPF programs, maps and links, and per workload the rule, routes and listeners in its
//! network namespace. The proxy sees only [`LocalWorkload`], its listeners, [`dial`] and [`Verdicts`].

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
};

use arc_swap::ArcSwapOption;

use crate::{
    discovery::model::Workload,
    sys::netns::{Netns, NetnsCookie},
};

mod dial;
mod error;
pub mod flows;
pub mod kernel;
mod manager;
mod netlink;
pub mod steering;
mod verdicts;

pub use dial::Keepalive;
pub use error::CaptureError;
pub use manager::{Capture, Enrolled, Record, undo_record};
pub use verdicts::{Verdict, Verdicts};

/// Captured outbound connections.
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured inbound plaintext.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Inbound tunnels (HBONE).
pub const TUNNEL_PORT: u16 = 15008;

/// An enrolled workload of this node.
#[derive(Debug)]
pub struct LocalWorkload {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// Addresses of that namespace when it was enrolled, loopback and link-local ones left out.
    pub addresses: Vec<IpAddr>,
    /// How its sockets find out that their peer has gone.
    pub keepalive: Keepalive,
    /// What discovery says of it; absent until the control plane has told. Kept current by `lifecycle`.
    pub workload: ArcSwapOption<Workload>,
    /// What it holds of what the node has once.
    pub holds: Arc<Holdings>,
}

/// What one workload holds in the proxy now.
#[derive(Debug, Default)]
pub struct Holdings {
    /// Connections, inbound and outbound; streams of tunnels are connections.
    pub connections: AtomicU64,
    /// Tunnels that it has open, or is opening, to peers.
    pub outbound_tunnels: AtomicU64,
    /// Descriptors of both.
    pub descriptors: AtomicU64,
    /// Bytes that may wait here because somebody does not read them.
    pub buffered_bytes: AtomicU64,
    /// Window that streams to it shall have; 0 as long as nothing ever waited.
    pub stream_window_bytes: AtomicU32,
}

impl LocalWorkload {
    /// The kernel's name of its namespace.
    #[must_use]
    pub fn cookie(&self) -> NetnsCookie {
        self.netns.cookie()
    }

    /// Whether `address` is one of its own.
    #[must_use]
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }
}

/// The listeners of one workload, made inside its namespace and already in the kernel's listener map.
/// Non-blocking, dual-stack where the namespace has IPv6 (addresses are then IPv4-mapped: unmap them).
#[derive(Debug)]
pub struct Listeners {
    /// Captured outbound connections; `local_addr()` of an accepted socket is the original destination.
    pub outbound: TcpListener,
    /// Captured inbound plaintext; `local_addr()` is the address that the client dialled.
    pub plaintext: TcpListener,
    /// Inbound tunnels.
    pub tunnel: TcpListener,
}

/// How to dial from inside a workload's namespace.
#[derive(Debug, Clone, Copy, Default)]
pub struct DialOptions {
    /// Show this address to the peer instead of the namespace's own (inbound: the client's). Its port is none that
    /// the client itself would use.
    pub source: Option<IpAddr>,
    /// Largest segment, bytes without headers, that either end shall send; `None` is what the interfaces carry.
    pub max_segment: Option<u32>,
}

/// Makes a socket inside the workload's namespace and connects it. The socket is recognised by the kernel programs
/// as the agent's own, so it is never captured. `TCP_NODELAY` and keepalive are set.
///
/// # Errors
/// Those of `connect(2)`; `AddrNotAvailable` when the ports towards this destination are exhausted.
pub async fn dial(
    workload: &LocalWorkload,
    destination: SocketAddr,
    options: DialOptions,
) -> std::io::Result<tokio::net::TcpStream> {
    dial::dial(workload, destination, options).await
}
