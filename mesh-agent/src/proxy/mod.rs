//! Moves bytes: accepts captured connections, decides where they go, and carries them through tunnels (HBONE), plain
//! TCP, or to the application of a local workload.
//!
//! One current-thread runtime per core ([`worker`]); everything a connection touches on its byte path belongs to
//! one worker, so nothing is locked there. Discovery, certificates, metrics and admin live elsewhere and are seen
//! through [`ProxyContext`].

use std::{net::IpAddr, sync::Arc};

use crate::{
    capture::{LocalWorkload, OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT, Verdicts},
    discovery::{Mesh, model::Workload},
    identity::Certificates,
    policy::{self, Connection, Decision},
    telemetry::Telemetry,
};

mod accept;
pub mod balance;
pub mod buffers;
pub mod connect;
pub mod fair;
pub mod handover;
pub mod inbound;
pub mod limits;
pub mod memory;
pub mod outbound;
pub mod pool;
pub mod registry;
pub mod relay;
pub mod room;
mod served;
pub mod share;
mod sources;
#[cfg(test)]
pub(crate) mod testing;
pub mod tunnel;
pub mod worker;

pub use limits::Limits;
pub use served::ServeHandle;
pub use tunnel::TunnelCodec;
pub use worker::{WorkerError, Workers};

/// Ports of the proxy itself inside a workload's namespace: never a destination of proxied traffic.
pub const OWN_PORTS: [u16; 3] = [OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT];

/// What every worker is given. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ProxyContext {
    /// What exists in the mesh.
    pub mesh: Mesh,
    /// Keys and certificates of local workloads.
    pub certificates: Certificates,
    /// Counts and logs connections.
    pub telemetry: Arc<Telemetry>,
    /// The kernel's cache of outbound verdicts.
    pub verdicts: Verdicts,
    /// Limits of this proxy.
    pub limits: Arc<Limits>,
    /// Name of this node, as discovery spells it.
    pub node: Arc<str>,
    /// Which implementation writes the tunnels.
    pub codec: TunnelCodec,
}

impl ProxyContext {
    /// Asks policy about a connection to a local workload. The workload and its policies are read under one lock: a
    /// list of policies from before a change must not be judged by the policies after it. `None`: discovery does not
    /// know the workload.
    pub(crate) fn judge(&self, local: &LocalWorkload, connection: &Connection) -> Option<Decision> {
        let state = self.mesh.read();
        let workload = state.local_workload(&self.node, &local.namespace, &local.name)?;
        Some(policy::authorize(&state, &workload, connection))
    }

    /// The mesh's generation and what is then known of a local workload, or something newer. What is decided by it may
    /// be remembered under that generation: whatever changes later makes another. ([`LocalWorkload::workload`] is
    /// brought up to date only after the generation has changed.)
    pub(crate) fn source(&self, local: &LocalWorkload) -> (u64, Option<Arc<Workload>>) {
        source_in(&self.mesh, &self.node, local)
    }
}

fn source_in(mesh: &Mesh, node: &str, local: &LocalWorkload) -> (u64, Option<Arc<Workload>>) {
    let generation = *mesh.generation().borrow();
    let workload = mesh
        .read()
        .local_workload(node, &local.namespace, &local.name);
    (generation, workload)
}

/// The canonical form of an address: dual-stack listeners see IPv4 peers as `::ffff:a.b.c.d` (RFC 4291 section
/// 2.5.5.2), while discovery and policy know them as IPv4.
#[must_use]
pub fn unmapped(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Addresses that no proxied connection may have as its destination: they mean the machine itself, nobody, or
/// everybody.
#[must_use]
pub fn never_a_destination(address: IpAddr) -> bool {
    let address = address.to_canonical();
    address.is_loopback() || address.is_unspecified() || address.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::tests::{Put, pod};

    #[test]
    fn the_source_is_no_older_than_the_generation_that_verdicts_are_remembered_under() {
        let (mut writer, mesh) = Mesh::channel("");
        let local = testing::local("web");
        assert_eq!(source_in(&mesh, "n1", &local), (0, None));
        writer.apply(vec![pod("web", "10.1.0.4").update()]);
        // Nobody has brought `local.workload` up to date yet.
        let (generation, source) = source_in(&mesh, "n1", &local);
        assert_eq!(generation, 1);
        assert!(source.is_some_and(|source| *source.name == *"web"));
    }
}
