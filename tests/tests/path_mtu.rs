//! A link that carries less than its ends believe, and no ICMP that says so.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    firewall::Drops,
    lab::{Families, LINK, LabSpec, PodSpec},
    mesh::MeshSpec,
    netns,
    paths::{PORT, pattern},
    sockets::finish,
    world::{LIMIT, World},
};
use nix::sys::signal::Signal;

/// The least that IPv6 allows a link to carry (RFC 8200 section 5); the pods believe in 1500.
const LINK_MTU: &str = "1280";
/// Sent each way on each connection.
const BYTES: usize = 1 << 20;
/// Connections of each family; the reliability table has 200.
const CONNECTIONS: usize = 20;
/// How long the connection without the mesh gets before it counts as stuck: the mesh's takes 3 s to notice.
const STUCK: Duration = Duration::from_secs(8);

#[test]
fn nothing_is_lost_where_large_packets_vanish_silently() -> Result<()> {
    let spec = LabSpec::new(Families::Dual)
        .node(
            "n1",
            [PodSpec::new("web"), PodSpec::new("plain").unmeshed()],
        )
        .node(
            "n2",
            [PodSpec::new("cart"), PodSpec::new("legacy").unmeshed()],
        );
    let mut world = World::start(spec, MeshSpec::default())?;
    // A tunnel of each family is open before the link becomes narrow; it goes on, and so does what it carries.
    let (v4, v6) = (IpAddr::is_ipv4, IpAddr::is_ipv6);
    transfer(&world, "web", "cart", v4, LIMIT)?;
    transfer(&world, "web", "cart", v6, LIMIT)?;
    narrow(&world)?;
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        // Without the mesh, the same transfer gets stuck: the link does swallow what is too large.
        let control = transfer(&world, "plain", "legacy", family, STUCK);
        ensure!(control.is_err(), "a direct transfer got through");
        transfer(&world, "web", "cart", family, LIMIT).context("on a tunnel that was open")?;
    }
    // New tunnels: those of before belong to certificates that are gone, and to an agent that is.
    let node = world.lab.node("n1")?;
    world.mesh.stop_agent(node, Signal::SIGTERM)?;
    world.mesh.start_agent(&world.lab, node)?;
    world.mesh.wait_ready(&world.lab, node)?;
    for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
        world.mesh.wait_enrolled(&world.lab, node, pod)?;
    }
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        for connection in 0..CONNECTIONS {
            transfer(&world, "web", "cart", family, LIMIT)
                .with_context(|| format!("connection {connection}"))?;
        }
    }
    world.wait_nothing_open()
}

fn narrow(world: &World) -> Result<()> {
    for node in world.lab.nodes() {
        let name = node.netns.file_name().context("a namespace has a name")?;
        let name = name.to_string_lossy();
        netns::ip(&["-n", &name, "link", "set", LINK, "mtu", LINK_MTU])?;
        let too_big = [
            "icmp type destination-unreachable",
            "icmpv6 type packet-too-big",
        ];
        Drops::install(&world.lab, node, &too_big.map(str::to_owned))?;
    }
    Ok(())
}

/// Sends [`BYTES`] both ways at once; every byte is compared.
fn transfer(
    world: &World,
    from: &str,
    to: &str,
    family: fn(&IpAddr) -> bool,
    limit: Duration,
) -> Result<()> {
    let address = world.lab.pod(to)?.addresses.iter().copied().find(family);
    let address = SocketAddr::new(address.context("both families")?, PORT);
    let listener = world.opener(to)?.listen(address)?;
    let client = world.dial(from, address)?;
    let (server, _) = listener.accept(LIMIT)?;
    let sent = pattern(BYTES);
    std::thread::scope(|scope| {
        let mut ends = Vec::new();
        for end in [&client, &server] {
            end.set_read_timeout(Some(limit))?;
            end.set_write_timeout(Some(limit))?;
            let sent = &sent;
            ends.push(scope.spawn(move || (&*end).write_all(sent).and_then(|()| finish(end))));
            ends.push(scope.spawn(move || {
                let mut received = Vec::with_capacity(BYTES);
                (&*end).read_to_end(&mut received)?;
                match received == *sent {
                    true => Ok(()),
                    false => Err(std::io::Error::other("other bytes")),
                }
            }));
        }
        for end in ends {
            end.join().expect("no thread panics")?;
        }
        Ok(())
    })
}
