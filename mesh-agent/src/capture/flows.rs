//! Same-node flows: what they did, and ending those that policy forbids by now.

use std::net::SocketAddr;

use mesh_ebpf::{EdgeCounters, EdgeKey, FlowKey};

use super::{Capture, Enrolled, kernel};
use crate::sys::{diag, netns::NetnsCookie};

/// A live same-node flow. An end that has left the mesh is absent.
#[derive(Debug, Clone)]
pub struct SameNodeFlow {
    /// Who dialled.
    pub source: Option<Enrolled>,
    /// Who was dialled.
    pub destination: Option<Enrolled>,
    /// Address of the client's socket.
    pub source_address: SocketAddr,
    /// Address that was dialled.
    pub destination_address: SocketAddr,
    key: FlowKey,
}

/// What one same-node edge did since it was first seen.
#[derive(Debug, Clone)]
pub struct SameNodeEdge {
    /// Who dials.
    pub source: Enrolled,
    /// What it dials.
    pub destination: SocketAddr,
    /// Totals, never decreasing while the edge is known.
    pub counters: EdgeCounters,
    /// Identifies the edge between two calls.
    pub key: EdgeKey,
}

impl Capture {
    /// Same-node flows that live now. Those with an end that an earlier agent captured and this one has not taken over
    /// (yet) are left out: nobody can judge them.
    #[must_use]
    pub fn same_node_flows(&self) -> Vec<SameNodeFlow> {
        // An end is enrolled, or (inside) has left the mesh; otherwise it is not known which.
        let end = |cookie: u64| {
            let enrolled = self.by_cookie(NetnsCookie(cookie));
            let is_known =
                enrolled.is_some() || self.kernel().workload(NetnsCookie(cookie)).is_none();
            is_known.then_some(enrolled)
        };
        let flow = |(key, flow): (FlowKey, mesh_ebpf::Flow)| {
            Some(SameNodeFlow {
                source: end(flow.source_cookie)?,
                destination: end(flow.destination_cookie)?,
                source_address: SocketAddr::new(kernel::ip(&key.source), port(key.source_port)),
                destination_address: SocketAddr::new(
                    kernel::ip(&key.destination),
                    port(key.destination_port),
                ),
                key,
            })
        };
        self.kernel()
            .same_node_flows()
            .into_iter()
            .filter_map(flow)
            .collect()
    }

    /// Ends a flow with RST at both ends. One that has left the mesh gets it from the other.
    ///
    /// # Errors
    /// Those of [`diag::destroy_tcp`].
    pub fn end_flow(&self, flow: &SameNodeFlow) -> std::io::Result<()> {
        // The server's end first: its RST is what the client sees then (ECONNRESET, as by a tunnel); a destroyed socket
        // itself sees ECONNABORTED. The client's end after it, in case the RST was lost or the server's end failed.
        let (to, from) = (flow.destination_address, flow.source_address);
        let end = |end: &Option<Enrolled>, local, remote| match end {
            Some(end) => diag::destroy_tcp(&end.local.netns, local, remote),
            None => Ok(()),
        };
        let server = end(&flow.destination, to, from);
        let client = end(&flow.source, from, to);
        server.and(client)?;
        self.kernel().forget_flow(&flow.key);
        Ok(())
    }

    /// Counters of all same-node edges of enrolled workloads.
    #[must_use]
    pub fn same_node_edges(&self) -> Vec<SameNodeEdge> {
        let edge = |(key, counters): (EdgeKey, EdgeCounters)| {
            let source = self.by_cookie(NetnsCookie(key.cookie))?;
            let destination = SocketAddr::new(kernel::ip(&key.address), port(key.port));
            Some(SameNodeEdge {
                source,
                destination,
                counters,
                key,
            })
        };
        self.kernel().edges().into_iter().filter_map(edge).collect()
    }
}

/// Ports of map keys come from 16-bit fields of the kernel.
fn port(value: u32) -> u16 {
    u16::try_from(value).unwrap_or_default()
}
