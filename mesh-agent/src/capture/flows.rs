//! Same-node flows: what they did, and ending those that policy forbids by now.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use mesh_ebpf::{EdgeCounters, EdgeKey, Flow, FlowKey};

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
        let flow = |(key, flow): (FlowKey, Flow)| {
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

/// A recorded connection that has no socket (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndedFlow {
    key: FlowKey,
    flow: Flow,
}

impl Capture {
    /// Recorded connections, of workloads and of agents, that have no socket. The programs forget a connection when it
    /// ends; one that ended while they were detached stays. A connection that has just begun may be among them: only
    /// one that is found twice has ended. Blocks, for some microseconds per connection.
    #[must_use]
    pub fn ended_flows(&self) -> HashSet<EndedFlow> {
        let kernel = self.kernel();
        // Whose socket is looked for: the client's, or the server's where the client has left the mesh.
        let of_workloads = kernel.same_node_flows().into_iter().map(|(key, flow)| {
            let sides = [(flow.source_cookie, false), (flow.destination_cookie, true)];
            (EndedFlow { key, flow }, sides)
        });
        let of_agents = kernel.agent_flows().into_iter().map(|(key, flow)| {
            let side = (flow.destination_cookie, false);
            (EndedFlow { key, flow }, [side, side])
        });
        let mut ended = HashSet::new();
        let mut asked: HashMap<u64, Vec<(EndedFlow, bool)>> = HashMap::new();
        let is_enrolled = self.is_enrolled();
        for (one, sides) in of_workloads.chain(of_agents) {
            match sides.into_iter().find(|(cookie, _)| is_enrolled(*cookie)) {
                Some((cookie, is_server)) => {
                    asked.entry(cookie).or_default().push((one, is_server));
                }
                None if sides.iter().all(|(cookie, _)| is_stranger(kernel, *cookie)) => {
                    ended.insert(one);
                }
                // An earlier agent has captured it, and it is not taken over (yet).
                None => {}
            }
        }
        for (cookie, some) in asked {
            ended.extend(self.without_socket(NetnsCookie(cookie), &some));
        }
        ended
    }

    /// Forgets connections that [`Capture::ended_flows`] has found twice.
    pub fn forget_ended_flows<'a>(&self, ended: impl IntoIterator<Item = &'a EndedFlow>) {
        for one in ended {
            self.kernel().forget_ended(&one.key, &one.flow);
        }
    }

    fn is_enrolled(&self) -> impl Fn(u64) -> bool + use<> {
        let all: HashSet<u64> = self
            .enrolled()
            .iter()
            .map(|one| one.local.cookie().0)
            .collect();
        move |cookie| all.contains(&cookie)
    }

    fn without_socket(&self, cookie: NetnsCookie, some: &[(EndedFlow, bool)]) -> Vec<EndedFlow> {
        let Some(enrolled) = self.by_cookie(cookie) else {
            return Vec::new();
        };
        let ends = some.iter().map(|(one, is_server)| {
            let client = SocketAddr::new(kernel::ip(&one.key.source), port(one.key.source_port));
            let server = SocketAddr::new(
                kernel::ip(&one.key.destination),
                port(one.key.destination_port),
            );
            match is_server {
                true => (server, client),
                false => (client, server),
            }
        });
        let found = match diag::have_sockets(&enrolled.local.netns, ends) {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, "cannot tell which connections have ended");
                return Vec::new();
            }
        };
        let pairs = some.iter().zip(found);
        pairs
            .filter(|(_, has_socket)| !has_socket)
            .map(|((one, _), _)| *one)
            .collect()
    }
}

fn is_stranger(kernel: &kernel::Kernel, cookie: u64) -> bool {
    kernel.workload(NetnsCookie(cookie)).is_none()
}

/// Ports of map keys come from 16-bit fields of the kernel.
fn port(value: u32) -> u16 {
    u16::try_from(value).unwrap_or_default()
}
