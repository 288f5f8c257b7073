//! Where connections go: services spread them, pass over a dead endpoint, leave an unready one alone; and what is
//! outside the mesh is left to the kernel.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, PodSpec},
    manifests::{self, ServicePort},
    mesh::{Mesh, MeshSpec},
    sockets::{Listener, Opener, Seen, look},
    wait,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;
const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
/// Connections per step.
const DIALS: usize = 100;
/// Least that each of two endpoints gets of [`DIALS`] connections that stay open. Equal ones get half each; on a loaded
/// machine one may have answered its first connect several times slower, and open connections count against that.
const SHARE_MIN: usize = 5;

/// `web` on the first node, one pod of the service `shop` on each of two others.
struct World {
    web: Opener,
    shops: [Opener; 2],
    mesh: Mesh,
    lab: Lab,
}

impl World {
    fn start() -> Result<Self> {
        let shop = |name| PodSpec::new(name).account("shop").label("app", "shop");
        let spec = LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [shop("shop-1")])
            .node("n3", [shop("shop-2")]);
        let lab = Lab::build(spec)?;
        let port = ServicePort {
            name: "tcp",
            port: SERVICE.port(),
            target: PORT,
        };
        let service = manifests::service("default", "shop", "shop", &[SERVICE.ip()], &[port]);
        let mesh = Mesh::start(&lab, MeshSpec::default().manifest("shop", [service]))?;
        let opener = |pod: &str| Opener::start(&lab, lab.pod(pod)?, pod);
        Ok(Self {
            web: opener("web")?,
            shops: [opener("shop-1")?, opener("shop-2")?],
            mesh,
            lab,
        })
    }

    fn listen(&self, shop: usize) -> Result<Listener> {
        let name = format!("shop-{}", shop + 1);
        self.shops[shop].listen(self.lab.pod(&name)?.at(PORT))
    }

    /// Dials the service and finds out which endpoint got it; `None` where the client saw anything but success.
    fn dial(
        &self,
        shops: &[Option<&Listener>; 2],
    ) -> Result<Option<(usize, TcpStream, TcpStream)>> {
        let Ok(client) = self.web.connect(SERVICE)? else {
            return Ok(None);
        };
        client.set_nonblocking(true)?;
        let arrived = wait::until("the connection to arrive, or to fail", LIMIT, || {
            for (index, shop) in shops.iter().enumerate() {
                if let Some(shop) = shop
                    && shop.has_waiting()?
                {
                    return Ok(Some(Some((index, shop.accept(LIMIT)?.0))));
                }
            }
            Ok((look(&client, 1) != Seen::Silence).then_some(None))
        })?;
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(LIMIT))?;
        Ok(arrived.map(|(index, server)| (index, client, server)))
    }

    /// Connections that each endpoint got out of [`DIALS`] that stay open until the last, and those that failed.
    fn spread(&self, shops: &[Option<&Listener>; 2]) -> Result<([usize; 2], usize)> {
        let (mut served, mut failed) = ([0; 2], 0);
        let mut open = Vec::new();
        for _ in 0..DIALS {
            match self.dial(shops)? {
                Some((index, client, server)) => {
                    talk(&client, &server)?;
                    served[index] += 1;
                    open.push((client, server));
                }
                None => failed += 1,
            }
        }
        Ok((served, failed))
    }

    fn sum(&self, node: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.metrics(self.lab.node(node)?)?.sum(name, labels))
    }

    /// Marks an endpoint ready or not, and waits until the client's agent has heard of it.
    fn set_ready(&self, pod: &str, ready: bool) -> Result<()> {
        let node = self.lab.node_of(pod)?;
        self.mesh.write_pod(node, self.lab.pod(pod)?, ready)?;
        let n1 = self.lab.node("n1")?;
        wait::until("the client's agent to hear of it", LIMIT, || {
            let dump = self
                .mesh
                .weft(&self.lab, n1, &["-o", "json", "dump"])?
                .ok()?;
            let dump: Value = serde_json::from_str(&dump)?;
            let workloads = dump["mesh"]["workloads"]["items"].as_array();
            let shop = workloads
                .context("no workloads in the dump")?
                .iter()
                .find(|workload| workload["name"] == pod);
            let usable = shop.is_some_and(|shop| {
                shop["healthy"] == true
                    && shop["services"].as_object().is_some_and(|s| !s.is_empty())
            });
            Ok((usable == ready).then_some(()))
        })
    }
}

fn talk(client: &TcpStream, server: &TcpStream) -> Result<()> {
    (&*client).write_all(b"ping")?;
    assert_eq!(look(server, 4), Seen::Bytes(b"ping".into()));
    (&*server).write_all(b"pong")?;
    assert_eq!(look(client, 4), Seen::Bytes(b"pong".into()));
    Ok(())
}

#[test]
fn a_service_spreads_connections_and_passes_over_dead_and_unready_endpoints() -> Result<()> {
    let world = World::start()?;
    let (first, second) = (world.listen(0)?, world.listen(1)?);
    let (served, failed) = world.spread(&[Some(&first), Some(&second)])?;
    assert_eq!(failed, 0);
    assert!(served.iter().all(|count| *count >= SHARE_MIN), "{served:?}");

    unready_gets_nothing_new(&world, &first, &second)?;
    dead_is_passed_over(&world, first, second)
}

fn unready_gets_nothing_new(world: &World, first: &Listener, second: &Listener) -> Result<()> {
    let shops = [Some(first), Some(second)];
    let mut others = Vec::new();
    let (_, client, server) = wait::until("a connection to the second endpoint", LIMIT, || {
        let dialled = world.dial(&shops)?.context("a dial failed")?;
        if dialled.0 == 1 {
            return Ok(Some(dialled));
        }
        others.push(dialled);
        Ok(None)
    })?;
    world.set_ready("shop-2", false)?;
    assert_eq!(
        world.spread(&shops)?,
        ([DIALS, 0], 0),
        "the second is not ready"
    );
    talk(&client, &server).context("an established connection stays")?;
    // Negative control: ready again, it is used again.
    world.set_ready("shop-2", true)?;
    let (served, failed) = world.spread(&shops)?;
    assert_eq!(failed, 0);
    assert!(served[1] >= SHARE_MIN, "{served:?}");
    Ok(())
}

fn dead_is_passed_over(world: &World, first: Listener, second: Listener) -> Result<()> {
    let refused = || {
        let labels = [("direction", "inbound"), ("reason", "connect_failed")];
        world.sum("n2", "weft_connections_failed_total", &labels)
    };
    let before = refused()?;
    // As when the process ends: its port is closed, and manifests do not say so yet.
    drop(first);
    let (served, failed) = world.spread(&[None, Some(&second)])?;
    assert_eq!(
        (served, failed),
        ([0, DIALS], 0),
        "no client saw the dead endpoint"
    );
    assert!(
        refused()? > before,
        "nobody tried the dead endpoint: nothing was retried"
    );
    // Negative control: with both dead, clients do see it.
    drop(second);
    assert!(world.dial(&[None, None])?.is_none());
    Ok(())
}

#[test]
fn what_is_outside_the_mesh_is_left_to_the_kernel_after_the_first_connection() -> Result<()> {
    let world = World::start()?;
    // A machine that no manifest knows.
    let node = world.lab.node("n2")?;
    let outside = SocketAddr::new(node.address(), PORT);
    let server = Opener::start(&world.lab, node, "outside")?;
    let listener = server.listen(outside)?;
    let web = world.lab.pod("web")?.address();
    let connect = || -> Result<()> {
        let client = world.web.connect(outside)??;
        client.set_read_timeout(Some(LIMIT))?;
        let (server, peer) = listener.accept(LIMIT)?;
        assert_eq!(peer.ip(), web, "the server sees the pod");
        talk(&client, &server)
    };
    let by_agent = || {
        world.sum(
            "n1",
            "weft_connections_opened_total",
            &[("direction", "outbound")],
        )
    };
    let by_kernel = |outcome| {
        world.sum(
            "n1",
            "weft_kernel_connections_total",
            &[("outcome", outcome)],
        )
    };

    let (agent, passed) = (by_agent()?, by_kernel("passed")?);
    connect()?;
    assert_eq!(
        (by_agent()?, by_kernel("passed")?),
        (agent + 1.0, passed),
        "the first"
    );
    for _ in 0..DIALS {
        connect()?;
    }
    assert_eq!(
        (by_agent()?, by_kernel("passed")?),
        (agent + 1.0, passed + DIALS as f64),
        "the kernel passes the rest by itself"
    );

    // A change of the mesh voids it: the destination might be in it now.
    world.set_ready("shop-1", false)?;
    wait::until("the agent to be asked again", LIMIT, || {
        connect()?;
        Ok((by_agent()? > agent + 1.0).then_some(()))
    })
}
