//! A lab with its mesh and the sockets of its pods: what most scenarios begin with.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use crate::{
    lab::{Lab, LabSpec},
    mesh::{Mesh, MeshSpec},
    sockets::{Listener, Opener, Seen, look},
    wait,
};

/// Longest wait for anything: three times the agent's own limit for a connect, because machines are loaded.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A lab, its mesh, and an [`Opener`] in every pod.
#[derive(Debug)]
pub struct World {
    openers: BTreeMap<String, Opener>,
    /// The mesh.
    pub mesh: Mesh,
    /// The lab.
    pub lab: Lab,
}

impl World {
    /// Builds the lab, starts the mesh, enrols its pods.
    ///
    /// # Errors
    /// Those of the lab and of the mesh.
    pub fn start(lab: LabSpec, mesh: MeshSpec) -> Result<Self> {
        let lab = Lab::build(lab)?;
        let mesh = Mesh::start(&lab, mesh)?;
        let mut openers = BTreeMap::new();
        for pod in lab.pods() {
            let name = &pod.spec.name;
            openers.insert(name.clone(), Opener::start(&lab, pod, name)?);
        }
        Ok(Self { openers, mesh, lab })
    }

    /// Who opens a pod's sockets.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn opener(&self, pod: &str) -> Result<&Opener> {
        self.openers
            .get(pod)
            .with_context(|| format!("no pod {pod}"))
    }

    /// A port at a pod's first address.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn at(&self, pod: &str, port: u16) -> Result<SocketAddr> {
        Ok(self.lab.pod(pod)?.at(port))
    }

    /// Listens at a pod's first address.
    ///
    /// # Errors
    /// There is no such pod, or the port is taken.
    pub fn listen(&self, pod: &str, port: u16) -> Result<Listener> {
        self.opener(pod)?.listen(self.at(pod, port)?)
    }

    /// Connects; reads of the socket wait at most [`LIMIT`].
    ///
    /// # Errors
    /// `connect(2)` fails.
    pub fn dial(&self, from: &str, to: SocketAddr) -> Result<TcpStream> {
        let client = self.opener(from)?.connect(to)?;
        let client = client.with_context(|| format!("{from} cannot connect to {to}"))?;
        client.set_read_timeout(Some(LIMIT))?;
        client.set_nodelay(true)?;
        Ok(client)
    }

    /// What a client that only dials and reads sees.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn fate(&self, from: &str, to: SocketAddr) -> Result<Seen> {
        match self.opener(from)?.connect(to)? {
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                Ok(Seen::ConnectFailed(Errno::from_raw(errno)))
            }
            Ok(client) => {
                client.set_read_timeout(Some(LIMIT))?;
                Ok(look(&client, 1))
            }
        }
    }

    /// Connections of a node by what the kernel did with them.
    ///
    /// # Errors
    /// The node's agent cannot be scraped.
    pub fn kernel_count(&self, node: &str, outcome: &str) -> Result<f64> {
        let labels = [("outcome", outcome)];
        self.sum(node, "weft_kernel_connections_total", &labels)
    }

    /// The sum of samples of a node's agent.
    ///
    /// # Errors
    /// It cannot be scraped.
    pub fn sum(&self, node: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.metrics(self.lab.node(node)?)?.sum(name, labels))
    }

    /// Waits until no agent carries a connection any more.
    ///
    /// # Errors
    /// Some are open after [`LIMIT`].
    pub fn wait_nothing_open(&self) -> Result<()> {
        let mut open = 0.0;
        let outcome = wait::until("all connections to be gone", LIMIT, || {
            open = 0.0;
            for node in self.lab.nodes() {
                open += self.sum(&node.name, "weft_connections_open", &[])?;
            }
            Ok((open == 0.0).then_some(()))
        });
        outcome.with_context(|| format!("{open} are still open"))
    }
}
