//! IPv4, IPv6 and both: the mesh does the same in each, and servers see their clients' own addresses on every path.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    capture::LinkCapture,
    lab::{Families, Lab, LabSpec, Pod, PodSpec},
    manifests::{self, ServicePort},
    mesh::{Mesh, MeshSpec},
    sockets::{Listener, Opener, Seen, look},
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
/// Where applications listen.
const PORT: u16 = 7000;
/// Where `cart` listens for both families with one socket.
const DUAL_PORT: u16 = 7001;
/// Where `cart` refuses IPv4 peers by policy.
const GUARDED_PORT: u16 = 7002;
const SERVICE_PORT: u16 = 80;
/// Connections of one kind: the first teaches the kernel, the second may go another way, the third as the second.
const DIALS: usize = 3;
/// Said on every connection within the mesh; no link between nodes may show it.
const SECRET: &[u8] = b"family secret";

/// `web`, `near` and, outside the mesh, `plain` on the first node; `cart` on the second.
struct World {
    openers: BTreeMap<String, Opener>,
    mesh: Mesh,
    lab: Lab,
}

impl World {
    fn start(families: Families) -> Result<Self> {
        let spec = LabSpec::new(families)
            .node(
                "n1",
                [
                    PodSpec::new("web"),
                    PodSpec::new("near"),
                    PodSpec::new("plain").unmeshed(),
                ],
            )
            .node("n2", [PodSpec::new("cart")]);
        let lab = Lab::build(spec)?;
        let port = ServicePort {
            name: "tcp",
            port: SERVICE_PORT,
            target: PORT,
        };
        let services = ["cart", "near"].map(|app| {
            manifests::service(
                "default",
                app,
                app,
                &service_addresses(families, app),
                &[port],
            )
        });
        let mut mesh = MeshSpec::default().manifest("services", services);
        if families.has_v4() {
            mesh = mesh.manifest("guard", [deny_address(lab.pod("web")?.address())]);
        }
        let mesh = Mesh::start(&lab, mesh)?;
        let mut openers = BTreeMap::new();
        for pod in lab.pods() {
            let name = &pod.spec.name;
            openers.insert(name.clone(), Opener::start(&lab, pod, name)?);
        }
        Ok(Self { lab, mesh, openers })
    }

    fn opener(&self, pod: &str) -> Result<&Opener> {
        self.openers
            .get(pod)
            .with_context(|| format!("no pod {pod}"))
    }

    /// Listeners of a pod, one per address.
    fn listen(&self, pod: &str) -> Result<BTreeMap<IpAddr, Listener>> {
        let addresses = self.lab.pod(pod)?.addresses.iter();
        let listen = |address: &IpAddr| {
            let listener = self.opener(pod)?.listen(SocketAddr::new(*address, PORT))?;
            Ok((*address, listener))
        };
        addresses.map(listen).collect()
    }

    fn dial(&self, from: &str, to: SocketAddr) -> Result<TcpStream> {
        let client = self.opener(from)?.connect(to)?;
        let client = client.with_context(|| format!("{from} cannot connect to {to}"))?;
        client.set_read_timeout(Some(LIMIT))?;
        Ok(client)
    }

    /// Dials, talks both ways, and checks every address that either application can see.
    fn talk(
        &self,
        from: &str,
        to: SocketAddr,
        listener: &Listener,
        server_at: SocketAddr,
    ) -> Result<()> {
        let what = format!("{from} to {to}, served at {server_at}");
        let client = self.dial(from, to)?;
        let (server, peer) = listener.accept(LIMIT).with_context(|| what.clone())?;
        (&client).write_all(SECRET)?;
        assert_eq!(
            look(&server, SECRET.len()),
            Seen::Bytes(SECRET.into()),
            "{what}"
        );
        (&server).write_all(SECRET)?;
        assert_eq!(
            look(&client, SECRET.len()),
            Seen::Bytes(SECRET.into()),
            "{what}"
        );

        let own = address_like(self.lab.pod(from)?, server_at.ip())?;
        assert_eq!(
            peer.ip(),
            own,
            "{what}: the client as the server's accept(2) sees it"
        );
        assert_eq!(
            server.peer_addr()?,
            peer,
            "{what}: getpeername of the server"
        );
        assert_eq!(
            server.local_addr()?,
            server_at,
            "{what}: getsockname of the server"
        );
        assert_eq!(client.peer_addr()?, to, "{what}: getpeername of the client");
        assert_eq!(
            client.local_addr()?.ip().to_canonical(),
            own,
            "{what}: getsockname of the client"
        );
        Ok(())
    }

    fn kernel_count(&self, outcome: &str) -> Result<f64> {
        let metrics = self.mesh.metrics(self.lab.node("n1")?)?;
        Ok(metrics.sum("weft_kernel_connections_total", &[("outcome", outcome)]))
    }
}

fn service_addresses(families: Families, app: &str) -> Vec<IpAddr> {
    let number = if app == "cart" { 1 } else { 2 };
    let v4 = IpAddr::V4(Ipv4Addr::new(10, 96, 0, number));
    let v6 = IpAddr::V6(Ipv6Addr::new(
        0xfd00,
        0x96,
        0,
        0,
        0,
        0,
        0,
        u16::from(number),
    ));
    match families {
        Families::V4 => vec![v4],
        Families::V6 => vec![v6],
        Families::Dual => vec![v4, v6],
    }
}

/// The pod's address of the same family as another one.
fn address_like(pod: &Pod, other: IpAddr) -> Result<IpAddr> {
    let mut addresses = pod.addresses.iter().copied();
    addresses
        .find(|address| address.is_ipv4() == other.is_ipv4())
        .context("both pods have addresses of the same families")
}

fn deny_address(address: IpAddr) -> serde_json::Value {
    let spec = json!({
        "selector": { "matchLabels": { "app": "cart" } },
        "action": "DENY",
        "rules": [{
            "from": [{ "ipBlocks": [address] }],
            "to": [{ "ports": [GUARDED_PORT] }],
        }],
    });
    manifests::policy("AuthorizationPolicy", "default", "deny-address", spec)
}

#[test]
fn ipv4_only() -> Result<()> {
    let world = World::start(Families::V4)?;
    core_scenario(&world)?;
    mapped_addresses_are_ipv4(&world)
}

#[test]
fn ipv6_only() -> Result<()> {
    core_scenario(&World::start(Families::V6)?)
}

#[test]
fn dual_stack() -> Result<()> {
    let world = World::start(Families::Dual)?;
    core_scenario(&world)?;
    mapped_addresses_are_ipv4(&world)?;
    one_socket_for_both_families(&world)
}

fn core_scenario(world: &World) -> Result<()> {
    let capture = LinkCapture::start(&world.lab)?;
    let families = world.lab.families();
    for (from, to) in [("web", "cart"), ("cart", "web"), ("web", "near")] {
        let in_kernel = world.kernel_count("same_node")?;
        let listeners = world.listen(to)?;
        for (address, listener) in &listeners {
            let at = SocketAddr::new(*address, PORT);
            for _ in 0..DIALS {
                world.talk(from, at, listener, at)?;
            }
            let services = service_addresses(families, to).into_iter();
            let services =
                services.filter(|service| to != "web" && service.is_ipv4() == address.is_ipv4());
            for service in services {
                for _ in 0..DIALS {
                    world.talk(from, SocketAddr::new(service, SERVICE_PORT), listener, at)?;
                }
            }
        }
        let expected = if to == "near" {
            (DIALS - 1) * listeners.len()
        } else {
            0
        };
        assert_eq!(
            world.kernel_count("same_node")? - in_kernel,
            expected as f64,
            "{from} to {to}: by the pod's own address, and within the node, all but the first go in the kernel"
        );
    }
    let verdict = capture.finish(&[std::str::from_utf8(SECRET)?])?;
    verdict.require_tls_only()?;
    ensure!(
        verdict.tls_bytes > 0,
        "the oracle saw no bytes at all: {verdict}"
    );

    // From outside the mesh, within the node and across: plaintext, captured inbound.
    let inbound = world.kernel_count("inbound")?;
    for to in ["near", "cart"] {
        for (address, listener) in &world.listen(to)? {
            let at = SocketAddr::new(*address, PORT);
            for _ in 0..DIALS {
                world.talk("plain", at, listener, at)?;
            }
        }
    }
    assert!(
        world.kernel_count("inbound")? > inbound,
        "plaintext into the mesh is captured"
    );
    // And out of it.
    for (address, listener) in &world.listen("plain")? {
        let at = SocketAddr::new(*address, PORT);
        for from in ["web", "cart"] {
            for _ in 0..DIALS {
                world.talk(from, at, listener, at)?;
            }
        }
    }
    Ok(())
}

/// An IPv6 socket that dials an IPv4-mapped address is an IPv4 client, for the server and for policy.
fn mapped_addresses_are_ipv4(world: &World) -> Result<()> {
    let mapped = |address: IpAddr, port| match address {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), port),
        IpAddr::V6(_) => SocketAddr::new(address, port),
    };
    for to in ["cart", "near"] {
        let address = world.lab.pod(to)?.address();
        let at = SocketAddr::new(address, PORT);
        let listener = world.opener(to)?.listen(at)?;
        for _ in 0..DIALS {
            world.talk("web", mapped(address, PORT), &listener, at)?;
        }
        for service in service_addresses(Families::V4, to) {
            world.talk("web", mapped(service, SERVICE_PORT), &listener, at)?;
        }
    }
    let cart = world.lab.pod("cart")?;
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), GUARDED_PORT);
    let listener = world.opener("cart")?.listen(any)?;
    let refused = world.dial("web", mapped(cart.address(), GUARDED_PORT))?;
    assert_eq!(
        look(&refused, 1),
        Seen::Rst,
        "the rule for its IPv4 address matches"
    );
    ensure!(
        !listener.has_waiting()?,
        "a refused connection reached the application"
    );
    // Negative control: the rule names web alone.
    let at = SocketAddr::new(cart.address(), GUARDED_PORT);
    world.talk("near", mapped(cart.address(), GUARDED_PORT), &listener, at)
}

/// A server whose one socket takes both families sees what it would see without the mesh.
fn one_socket_for_both_families(world: &World) -> Result<()> {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), DUAL_PORT);
    let listener = world.opener("cart")?.listen(any)?;
    for from in ["web", "plain"] {
        for address in &world.lab.pod("cart")?.addresses {
            let client = world.dial(from, SocketAddr::new(*address, DUAL_PORT))?;
            let (server, peer) = listener.accept(LIMIT)?;
            let own = address_like(world.lab.pod(from)?, *address)?;
            let expected = match own {
                IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
                IpAddr::V6(_) => own,
            };
            assert_eq!(peer.ip(), expected, "{from} to {address}");
            (&client).write_all(SECRET)?;
            assert_eq!(look(&server, SECRET.len()), Seen::Bytes(SECRET.into()));
        }
    }
    Ok(())
}
