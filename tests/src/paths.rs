//! The ways that a connection can take, with and without the mesh.

use std::net::TcpStream;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    lab::{Families, LabSpec, PodSpec},
    manifests,
    mesh::MeshSpec,
    sockets::Listener,
    world::{LIMIT, World},
};

/// Where the servers of all paths listen.
pub const PORT: u16 = 7000;

/// A way from a client to a server.
#[derive(Debug)]
pub struct Path {
    /// What it is called in messages.
    pub name: &'static str,
    /// Pod of the client.
    pub from: &'static str,
    /// Pod of the server.
    pub to: &'static str,
}

/// Without the mesh: what everything else is compared with.
pub const DIRECT: Path = Path {
    name: "direct",
    from: "plain",
    to: "legacy",
};
/// Every way through the mesh.
pub const MESH: [Path; 5] = [
    Path {
        name: "tunnel between nodes",
        from: "web",
        to: "cart",
    },
    Path {
        name: "tunnel within a node",
        from: "web",
        to: "quiet",
    },
    // The first connection takes the tunnel, the rest the kernel.
    Path {
        name: "kernel within a node",
        from: "web",
        to: "near",
    },
    Path {
        name: "plaintext out of the mesh",
        from: "web",
        to: "legacy",
    },
    Path {
        name: "plaintext into the mesh",
        from: "plain",
        to: "cart",
    },
];

/// The lab of the paths: meshed `web`, `near` and `quiet` and unmeshed `plain` on `n1`, meshed `cart` and unmeshed
/// `legacy` on `n2`. `quiet` wishes the tunnel also within its node.
#[must_use]
pub fn lab() -> (LabSpec, MeshSpec) {
    let lab = LabSpec::new(Families::V4)
        .node(
            "n1",
            [
                PodSpec::new("web"),
                PodSpec::new("near"),
                PodSpec::new("quiet"),
                PodSpec::new("plain").unmeshed(),
            ],
        )
        .node(
            "n2",
            [PodSpec::new("cart"), PodSpec::new("legacy").unmeshed()],
        );
    let quiet = json!({ "selector": { "matchLabels": { "app": "quiet" } }, "sameNode": "tunnel" });
    let quiet = manifests::policy("MeshPolicy", "default", "quiet", quiet);
    (lab, MeshSpec::default().manifest("quiet", [quiet]))
}

/// Starts the lab and the mesh of the paths.
///
/// # Errors
/// Those of the lab and of the mesh.
pub fn start() -> Result<World> {
    let (lab, mesh) = lab();
    World::start(lab, mesh)
}

impl Path {
    /// Listens where the path ends.
    ///
    /// # Errors
    /// The port is taken.
    pub fn listen(&self, world: &World) -> Result<Listener> {
        world.listen(self.to, PORT)
    }

    /// Connects to the listener and returns both ends, the client's first.
    ///
    /// # Errors
    /// The connection does not come about.
    pub fn pair(&self, world: &World, listener: &Listener) -> Result<(TcpStream, TcpStream)> {
        let client = world.dial(self.from, world.at(self.to, PORT)?)?;
        let (server, _) = listener
            .accept(LIMIT)
            .with_context(|| self.name.to_owned())?;
        Ok((client, server))
    }
}

/// Bytes that differ from their neighbours near and far.
#[must_use]
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|position| (position % 251) as u8 ^ (position >> 10) as u8)
        .collect()
}
