//! Hostile and friendly strangers at the tunnel port: a client and a server of HBONE that were written from the wire
//! description alone, with a certificate of the mesh. Needs root.

mod attacks;
mod clients;
mod control;
mod expiry;
mod floods;
mod interop;
mod istio_wire;
mod peer;
mod raw;
mod servers;
mod silence;

use std::{future::Future, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, Node, PodSpec},
    mesh::{CONTROL_PORT, Mesh, MeshSpec},
    netns,
};

use peer::Credentials;

/// Port of the applications.
const PORT: u16 = 7000;
/// Port of an application that listens on loopback alone.
const PRIVATE_PORT: u16 = 7002;

/// Implementations of the tunnels that agents have; each meets everything here.
const CODECS: [&str; 2] = ["native", "h2"];

/// `web` and the attacker `evil` on one node; the victim and its neighbour on the other.
struct World {
    lab: Lab,
    mesh: Mesh,
}

impl World {
    /// With agents whose tunnels are written by `codec`.
    fn start(codec: &str) -> Result<Self> {
        let lab = Lab::build(
            LabSpec::new(Families::V4)
                .node("n1", [PodSpec::new("web"), PodSpec::new("evil")])
                .node("n2", [PodSpec::new("victim"), PodSpec::new("neighbour")]),
        )?;
        let spec = MeshSpec {
            agent_arguments: ["--tunnel-codec", codec].map(String::from).into(),
            ..MeshSpec::default()
        };
        let mesh = Mesh::start(&lab, spec)?;
        Ok(Self { lab, mesh })
    }

    /// A certificate that the authority grants to the pod's node.
    fn certificate(&self, pod: &str) -> Result<Credentials> {
        let node = self.lab.node_of(pod)?;
        let control = self.lab.nodes().first().context("a lab has nodes")?;
        let control = SocketAddr::new(Node::address(control), CONTROL_PORT);
        within(&node.netns, || async {
            peer::certificate(self.mesh.directory(), &node.name, control, &identity(pod)).await
        })
    }
}

fn identity(pod: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{pod}")
}

/// Runs asynchronous code on a thread of its own inside a namespace. Sockets made there belong to this process, not
/// to the pod's cgroup, so they are not captured: the attacker speaks to the wire.
fn within<T: Send, F: Future<Output = Result<T>>>(
    place: &Path,
    run: impl FnOnce() -> F + Send,
) -> Result<T> {
    netns::within(place, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(run())
    })?
}
