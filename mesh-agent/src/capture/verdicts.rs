//! The kernel's cache of verdicts on outbound connections.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_ebpf::{EdgeKey, VERDICT_DENIED, VERDICT_PASS, VERDICT_SAME_NODE};

use super::{
    LocalWorkload,
    kernel::{self, Kernel},
};
use crate::sys;

/// Pass and same-node verdicts hold until the mesh changes; the time only bounds how long an idle entry may live.
const KEEP: Duration = Duration::from_secs(300);
/// A refusal came from the peer, whose policies may change before ours do: ask again soon.
const KEEP_DENIED: Duration = Duration::from_secs(5);

/// What `connect(2)` shall do by itself the next time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The destination is outside the mesh: leave the socket alone.
    Pass,
    /// The destination is on this node and allowed: application to application in the kernel.
    SameNode,
    /// The peer refused by policy: fail with `EACCES`.
    Denied,
}

/// The cache, per (workload, destination). A verdict is forgotten when the mesh changes (generation) or its time is
/// over. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Verdicts {
    kernel: Arc<Kernel>,
    /// Added to the mesh's generation, so that verdicts of an earlier agent are void.
    generation_base: u64,
    complained: Arc<AtomicBool>,
}

impl Verdicts {
    pub(super) fn new(kernel: Arc<Kernel>, generation_base: u64) -> Self {
        Self {
            kernel,
            generation_base,
            complained: Arc::default(),
        }
    }

    /// Remembers a verdict that was taken while `generation` was the mesh's. Never fails for the caller: a full or
    /// broken cache only means that the agent is asked again.
    pub fn remember(
        &self,
        workload: &LocalWorkload,
        destination: SocketAddr,
        generation: u64,
        verdict: Verdict,
    ) {
        let ip = destination.ip().to_canonical();
        let (action, keep, peer_cookie) = match verdict {
            Verdict::Pass => (VERDICT_PASS, KEEP, 0),
            Verdict::Denied => (VERDICT_DENIED, KEEP_DENIED, 0),
            Verdict::SameNode => match self.peer(ip) {
                Some(cookie) => (VERDICT_SAME_NODE, KEEP, cookie),
                None => return,
            },
        };
        let key = EdgeKey {
            cookie: workload.cookie().0,
            address: kernel::address(ip),
            port: u32::from(destination.port()),
            padding: 0,
        };
        let value = mesh_ebpf::Verdict {
            generation: self.generation_base + generation,
            expires_ns: sys::monotonic_ns()
                .saturating_add(u64::try_from(keep.as_nanos()).unwrap_or(u64::MAX)),
            peer_cookie,
            action,
            padding: 0,
        };
        if let Err(error) = self.kernel.set_verdict(key, value)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "cannot cache verdicts in the kernel; every connection goes by the agent");
        }
    }

    fn peer(&self, ip: IpAddr) -> Option<u64> {
        self.kernel.owner(ip)
    }
}
