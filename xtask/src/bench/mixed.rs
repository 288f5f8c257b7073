//! Weft on one node, another mesh on the other, with Weft's control plane for both.

use std::path::Path;

use anyhow::{Context as _, Result};
use mesh_tests::{
    mesh::{Mesh, MeshSpec},
    peer::{Part, Peer},
};
use nix::unistd::Pid;

use super::{
    scene::Scene,
    weft::{self, PROBE_LIMIT},
};

/// Both, running.
#[derive(Debug)]
pub struct Mixed {
    mesh: Mesh,
    peer: Peer,
    weft: Pid,
}

impl Mixed {
    /// Starts everything, Weft on the node of that name. Mutual TLS is strict, so that the ping that ends this has gone
    /// through both meshes.
    ///
    /// # Errors
    /// A program or the script fails, or nothing comes through.
    pub fn up(script: &Path, scene: &Scene, weft: &str) -> Result<Self> {
        let (lab, node) = (&scene.lab, scene.lab.node(weft)?);
        let mut mesh = weft::control_plane(lab, MeshSpec::default())?;
        mesh.start_agent(lab, node)?;
        mesh.wait_ready(lab, node)?;
        for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
            mesh.enroll(lab, node, pod)?;
            mesh.wait_enrolled(lab, node, pod)?;
        }
        let pid = mesh.agent(node)?.pid();
        let other = lab.nodes().iter().find(|node| node.name != weft);
        let other = other.context("the scene has two nodes")?;
        let peer = Peer::up(script, lab, Part::Node(other, &mesh))?;
        let probe = weft::probe(scene)?.wait(PROBE_LIMIT)?;
        probe.ok().context("nothing came through both meshes")?;
        Ok(Self {
            mesh,
            peer,
            weft: pid,
        })
    }

    /// The proxies of both.
    ///
    /// # Errors
    /// Those of [`Peer::proxies`].
    pub fn proxies(&self) -> Result<Vec<Pid>> {
        let mut proxies = self.peer.proxies()?;
        proxies.push(self.weft);
        Ok(proxies)
    }

    /// Removes what the lab's removal would not.
    ///
    /// # Errors
    /// Those of [`Peer::down`].
    pub fn down(self, scene: &Scene) -> Result<()> {
        let down = self.peer.down(&scene.lab);
        drop(self.mesh);
        down
    }
}
