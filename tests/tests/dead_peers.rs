//! A peer that vanishes without FIN or RST: whichever leg of a connection falls silent, both applications are told, and
//! connections that are only idle live on.

use std::{
    io::Write as _,
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    firewall::Drops,
    paths::{self, MESH, PORT, Path},
    sockets::{Seen, look},
    wait,
    world::{LIMIT, World},
};

/// Keepalive: 1 s + 2 × 1 s. Tunnels: 1 s + 2 s. The defaults, 315 s and 30 s, are longer than any wait here.
const SETTINGS: &str = "proxy:\n  keepalive: {idleSeconds: 1, intervalSeconds: 1, probes: 2}\n  \
                        tunnelPing: {intervalSeconds: 1, timeoutSeconds: 2}\n";
const CONFIGURED: Duration = Duration::from_secs(3);
/// What the kernel's timers and a loaded machine may add.
const SLACK: Duration = Duration::from_secs(10);

/// Who of the two applications can hear of the broken leg while it is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hears {
    Client,
    Server,
    Both,
}

/// A leg: where its packets are dropped, how nft knows them, and who hears of it.
struct Leg {
    name: &'static str,
    path: &'static Path,
    place: &'static str,
    matches: fn(&str) -> String,
    hears: Hears,
}

const TUNNEL: &Path = &MESH[0];
const OUT: &Path = &MESH[3];
const IN: &Path = &MESH[4];

const LEGS: [Leg; 5] = [
    Leg {
        name: "client to its agent",
        path: TUNNEL,
        place: "web",
        matches: |port| format!("meta iifname lo tcp {port} {PORT}"),
        hears: Hears::Server,
    },
    Leg {
        name: "agent to its server",
        path: TUNNEL,
        place: "cart",
        matches: |port| format!("meta iifname lo tcp {port} {PORT}"),
        hears: Hears::Client,
    },
    Leg {
        name: "tunnel",
        path: TUNNEL,
        place: "n1",
        matches: |port| format!("tcp {port} 15008"),
        hears: Hears::Both,
    },
    Leg {
        name: "agent to a server outside the mesh",
        path: OUT,
        place: "n1",
        matches: |port| format!("tcp {port} {PORT}"),
        hears: Hears::Client,
    },
    Leg {
        name: "client outside the mesh to the agent",
        path: IN,
        place: "n1",
        matches: |port| format!("tcp {port} {PORT}"),
        hears: Hears::Server,
    },
];

#[test]
fn a_leg_that_falls_silent_ends_the_connection_and_idle_ones_live_on() -> Result<()> {
    let (lab, mut mesh) = paths::lab();
    mesh.agent_config = Some(SETTINGS.to_owned());
    let world = World::start(lab, mesh)?;
    let began = Instant::now();
    // Idle from the first to the last moment, on another port than the legs that are broken; no tunnels, which are
    // shared and break for all.
    let idle = IdleOnes::open(&world)?;
    for leg in &LEGS {
        both_ends_are_told(&world, leg).with_context(|| leg.name)?;
    }
    ensure!(
        began.elapsed() > 2 * CONFIGURED,
        "nothing was idle for long enough"
    );
    idle.still_live()?;
    drop(idle);
    world.wait_nothing_open()
}

fn both_ends_are_told(world: &World, leg: &Leg) -> Result<()> {
    let listener = leg.path.listen(world)?;
    let (client, server) = leg.path.pair(world, &listener)?;
    exchange(&client, &server)?;
    let matches = ["dport", "sport"].map(leg.matches);
    let began = Instant::now();
    let drops = match world.lab.node(leg.place) {
        Ok(node) => Drops::install(&world.lab, node, &matches)?,
        Err(_) => Drops::install(&world.lab, world.lab.pod(leg.place)?, &matches)?,
    };
    let (first, second) = match leg.hears {
        Hears::Client | Hears::Both => (&client, &server),
        Hears::Server => (&server, &client),
    };
    ensure!(look(first, 1) == Seen::Rst, "the first end saw no RST");
    if leg.hears == Hears::Both {
        ensure!(look(second, 1) == Seen::Rst, "the second end saw no RST");
    }
    let took = began.elapsed();
    ensure!(took < CONFIGURED + SLACK, "told after {took:?}");
    match world.lab.node(leg.place) {
        Ok(node) => drops.lift(&world.lab, node)?,
        Err(_) => drops.lift(&world.lab, world.lab.pod(leg.place)?)?,
    }
    if leg.hears != Hears::Both {
        // Cut off while it was told, it hears as soon as it says something.
        wait::until("the end that was cut off to hear", LIMIT, || {
            Ok((&*second).write_all(b"there?").is_err().then_some(()))
        })?;
    }
    Ok(())
}

fn exchange(client: &TcpStream, server: &TcpStream) -> Result<()> {
    for (mut from, to) in [(client, server), (server, client)] {
        from.write_all(b"here")?;
        let heard = look(to, 4);
        ensure!(heard == Seen::Bytes(b"here".to_vec()), "{heard:?}");
    }
    Ok(())
}

/// Connections on which nothing is said.
struct IdleOnes(Vec<(&'static str, TcpStream, TcpStream)>);

impl IdleOnes {
    const PORT: u16 = 7100;

    fn open(world: &World) -> Result<Self> {
        let mut all = Vec::new();
        for path in [OUT, IN] {
            let listener = world.listen(path.to, Self::PORT)?;
            let client = world.dial(path.from, world.at(path.to, Self::PORT)?)?;
            let (server, _) = listener.accept(LIMIT)?;
            exchange(&client, &server).context(path.name)?;
            all.push((path.name, client, server));
        }
        Ok(Self(all))
    }

    fn still_live(&self) -> Result<()> {
        for (name, client, server) in &self.0 {
            exchange(client, server).context(*name)?;
        }
        Ok(())
    }
}
