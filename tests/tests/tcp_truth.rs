//! TCP's truth: what an application sees through the mesh is what it would see without it. A dead peer is never a
//! clean end, nothing is lost at the end, half-closed connections work, and server-first protocols do not wait.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    lab::PodSpec,
    manifests::{self, ServicePort},
    paths::{self, DIRECT, MESH, PORT, Path, pattern},
    process::Program,
    sockets::{Listener, Seen, finish, look},
    wait,
    world::{LIMIT, World},
};
use nix::errno::Errno;
use serde_json::{Value, json};

/// "Refused comes quickly": far below the agent's connect limit of 10 s, so it was not a timeout.
const QUICK: Duration = Duration::from_secs(5);
/// Where nobody listens.
const CLOSED_PORT: u16 = 7999;
/// Service of `cart`, of `guarded`, and one that selects nothing.
const CART_SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
const GUARDED_SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 2));
const EMPTY_SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 3));
/// Addresses whose packets the second node discards without an answer.
const BLACKHOLE: &str = "10.99.0.0/24";
const BLACKHOLED: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
/// A workload of the mesh, as far as manifests tell, that is blackholed.
const GHOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));

/// The lab of the paths, with a pod `guarded` on the second node that denies `web`.
fn start() -> Result<World> {
    let (mut lab, mesh) = paths::lab();
    lab.nodes[1].pods.push(PodSpec::new("guarded"));
    let service = |name: &str, address: IpAddr| {
        let port = |name, port, target| ServicePort { name, port, target };
        let ports = [port("tcp", 80, PORT), port("tcp-closed", 81, CLOSED_PORT)];
        manifests::service("default", name, name, &[address], &ports)
    };
    let web = json!({ "serviceAccounts": ["default/web"] });
    let mesh = mesh
        .manifest("deny", [deny("guarded", web)])
        .manifest(
            "services",
            [
                service("cart", CART_SERVICE),
                service("guarded", GUARDED_SERVICE),
                service("empty", EMPTY_SERVICE),
            ],
        )
        .manifest("ghost", [ghost()]);
    World::start(lab, mesh)
}

/// Refuses a source at a pod.
fn deny(app: &str, source: Value) -> Value {
    let spec = json!({
        "selector": { "matchLabels": { "app": app } },
        "action": "DENY",
        "rules": [{ "from": [source] }],
    });
    manifests::policy(
        "AuthorizationPolicy",
        "default",
        &format!("deny-at-{app}"),
        spec,
    )
}

fn ghost() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "ghost", "namespace": "default", "labels": { "weft.dev/mesh": "enabled" } },
        "spec": { "nodeName": "n2", "serviceAccountName": "cart", "containers": [{ "name": "app", "image": "app" }] },
        "status": {
            "phase": "Running",
            "podIP": GHOST,
            "podIPs": [{ "ip": GHOST }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    })
}

#[test]
fn an_unreachable_destination_ends_in_reset_or_a_failed_connect_never_in_a_clean_end() -> Result<()>
{
    let world = start()?;
    refused_is_quick_and_never_clean(&world)?;
    a_service_without_endpoints_fails_inside_connect(&world)?;
    denied_fails_inside_connect_from_the_second_dial_on(&world)?;
    blackholed_ends_in_reset(&world)?;
    world.wait_nothing_open()
}

fn refused_is_quick_and_never_clean(world: &World) -> Result<()> {
    /// Dials per destination; the reliability table has 100, and one in a hundred would show in 5 × 20.
    const DIALS: usize = 20;
    let service = SocketAddr::new(CART_SERVICE, 81);
    let closed = |pod| world.at(pod, CLOSED_PORT);
    let cases = [
        ("web", closed("cart")?),
        ("web", closed("near")?),
        ("web", closed("legacy")?),
        ("web", service),
        ("plain", closed("cart")?),
    ];
    for (from, to) in cases {
        for dial in 0..DIALS {
            let began = Instant::now();
            let fate = world.fate(from, to)?;
            assert_eq!(fate, Seen::Rst, "{from} to {to}, dial {dial}");
            assert!(
                began.elapsed() < QUICK,
                "{from} to {to}, dial {dial}: {:?}, a timeout?\n{}\n{}",
                began.elapsed(),
                world.mesh.log_of(&world.lab.nodes()[0]),
                world.mesh.log_of(&world.lab.nodes()[1])
            );
        }
    }
    // The eye is not blind: a server that accepts and closes is a clean end.
    let listener = world.listen("cart", PORT)?;
    let client = world.dial("web", world.at("cart", PORT)?)?;
    drop(listener.accept(LIMIT)?);
    assert_eq!(look(&client, 1), Seen::Fin);
    Ok(())
}

fn a_service_without_endpoints_fails_inside_connect(world: &World) -> Result<()> {
    const DIALS: u32 = 100;
    let captured = world.kernel_count("n1", "captured")?;
    let counted = world.kernel_count("n1", "no_endpoint")?;
    for dial in 0..DIALS {
        let fate = world.fate("web", SocketAddr::new(EMPTY_SERVICE, 80))?;
        assert_eq!(
            fate,
            Seen::ConnectFailed(Errno::ECONNREFUSED),
            "dial {dial}"
        );
    }
    assert_eq!(
        world.kernel_count("n1", "no_endpoint")? - counted,
        f64::from(DIALS)
    );
    assert_eq!(
        world.kernel_count("n1", "captured")?,
        captured,
        "no agent was asked"
    );
    Ok(())
}

fn denied_fails_inside_connect_from_the_second_dial_on(world: &World) -> Result<()> {
    const DIALS: u64 = 100;
    /// How long the agent believes a peer's refusal without asking again.
    const REFUSAL_KEPT: Duration = Duration::from_secs(5);
    let listener = world.listen("guarded", PORT)?;
    for to in [
        world.at("guarded", PORT)?,
        SocketAddr::new(GUARDED_SERVICE, 80),
    ] {
        let began = Instant::now();
        assert_eq!(world.fate("web", to)?, Seen::Rst, "the first dial of {to}");
        let mut asked_again = 0;
        for dial in 0..DIALS {
            match world.fate("web", to)? {
                Seen::ConnectFailed(Errno::EACCES) => {}
                Seen::Rst => asked_again += 1,
                other => bail!("dial {dial} of {to}: {other:?}"),
            }
        }
        let allowed = began.elapsed().as_secs() / REFUSAL_KEPT.as_secs();
        assert!(
            asked_again <= allowed,
            "{to}: the peer was asked {asked_again} times more"
        );
    }
    ensure!(
        !listener.has_waiting()?,
        "a denied connection reached the application"
    );
    assert!(world.kernel_count("n1", "denied")? > 0.0);
    // A client outside the mesh has no agent to learn for it: reset each time, and never a clean end.
    let plain = json!({ "ipBlocks": [world.lab.pod("plain")?.address()] });
    world
        .mesh
        .manifests
        .write("deny-plain", &[deny("cart", plain)])?;
    let open = world.listen("cart", PORT)?;
    let cart = world.at("cart", PORT)?;
    wait::until("the plaintext client to be denied", LIMIT, || {
        let client = world.dial("plain", cart)?;
        client.set_read_timeout(Some(Duration::from_millis(200)))?;
        match look(&client, 1) {
            Seen::Rst => Ok(Some(())),
            Seen::Silence => Ok(None),
            other => bail!("{other:?}"),
        }
    })?;
    for dial in 0..DIALS {
        assert_eq!(world.fate("plain", cart)?, Seen::Rst, "dial {dial}");
    }
    drop(open);
    world.mesh.manifests.remove("deny-plain")?;

    // Negative control: it is the policy that bites; a verdict dies with the mesh it was taken from.
    world.mesh.manifests.remove("deny")?;
    let to = world.at("guarded", PORT)?;
    let client = wait::until("the destination to be allowed", LIMIT, || {
        let Ok(client) = world.opener("web")?.connect(to)? else {
            return Ok(None);
        };
        client.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok((look(&client, 1) == Seen::Silence).then_some(client))
    })?;
    let (server, _) = listener.accept(LIMIT)?;
    (&client).write_all(b"allowed")?;
    assert_eq!(look(&server, 7), Seen::Bytes(b"allowed".to_vec()));
    Ok(())
}

fn blackholed_ends_in_reset(world: &World) -> Result<()> {
    /// All wait for the same 10 s; more would only show the same again.
    const DIALS: usize = 5;
    let (n1, n2) = (world.lab.node("n1")?, world.lab.node("n2")?);
    let via = format!("ip route add {BLACKHOLE} via {}", n2.address());
    world.lab.run(n1, &Program::line(&via), LIMIT)?.ok()?;
    let discard = format!("ip route add blackhole {BLACKHOLE}");
    world.lab.run(n2, &Program::line(&discard), LIMIT)?.ok()?;
    std::thread::scope(|scope| {
        let dials: Vec<_> = [BLACKHOLED, GHOST]
            .into_iter()
            .flat_map(|address| [SocketAddr::new(address, PORT); DIALS])
            .map(|to| (to, scope.spawn(move || world.fate("web", to))))
            .collect();
        for (to, dial) in dials {
            let fate = dial.join().expect("the dialling thread does not panic")?;
            assert_eq!(fate, Seen::Rst, "{to}");
        }
        Ok(())
    })
}

#[test]
fn nothing_is_lost_at_the_end_and_half_closed_connections_work() -> Result<()> {
    let world = paths::start()?;
    for path in &MESH {
        let listener = path.listen(&world)?;
        a_server_that_closes_at_once_is_heard_whole(&world, path, &listener)?;
        a_half_closed_connection_is_answered_whole(&world, path, &listener)?;
    }
    // The gauge that is waited for does see open connections.
    let listener = MESH[0].listen(&world)?;
    let open = MESH[0].pair(&world, &listener)?;
    (&open.0).write_all(b"here")?;
    assert_eq!(look(&open.1, 4), Seen::Bytes(b"here".into()));
    ensure!(world.sum("n1", "weft_connections_open", &[])? > 0.0);
    drop(open);
    world.wait_nothing_open()?;
    drop(listener);
    a_server_that_speaks_first_is_heard_at_once(&world)?;
    world.wait_nothing_open()
}

fn a_server_that_closes_at_once_is_heard_whole(
    world: &World,
    path: &Path,
    listener: &Listener,
) -> Result<()> {
    /// Reduced from 500 for time; every path has its own 40.
    const ROUNDS: usize = 40;
    let answer = pattern(1 << 20);
    for round in 0..ROUNDS {
        let (mut client, server) = path.pair(world, listener)?;
        let mut received = Vec::new();
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut server = server;
                server.write_all(&answer)
                // Dropped at once.
            });
            let outcome = client.read_to_end(&mut received);
            sender.join().expect("the sending thread does not panic")?;
            outcome
        })
        .with_context(|| format!("{}, round {round}, {} bytes", path.name, received.len()))?;
        ensure!(
            received == answer,
            "{}, round {round}: {} bytes, or other ones",
            path.name,
            received.len()
        );
    }
    Ok(())
}

fn a_half_closed_connection_is_answered_whole(
    world: &World,
    path: &Path,
    listener: &Listener,
) -> Result<()> {
    /// Half-closed at the same time; the table has 200.
    const CONNECTIONS: usize = 10;
    const ANSWER_BYTES: usize = 10 << 20;
    let answer = pattern(ANSWER_BYTES);
    let mut pairs = Vec::new();
    for _ in 0..CONNECTIONS {
        let (client, server) = path.pair(world, listener)?;
        (&client).write_all(b"question")?;
        finish(&client)?;
        pairs.push((client, server));
    }
    std::thread::scope(|scope| -> Result<()> {
        let mut readers = Vec::new();
        for (client, server) in &pairs {
            assert_eq!(look(server, 8), Seen::Bytes(b"question".to_vec()));
            assert_eq!(look(server, 1), Seen::Fin, "{}: half-close", path.name);
            let answer = &answer;
            scope.spawn(move || {
                let mut server = server;
                server.write_all(answer).and_then(|()| finish(server))
            });
            readers.push(scope.spawn(move || {
                let mut received = Vec::with_capacity(ANSWER_BYTES);
                let mut client = client;
                client.read_to_end(&mut received).map(|_| received)
            }));
        }
        for reader in readers {
            let received = reader.join().expect("the reading thread does not panic");
            let received = received.with_context(|| path.name.to_owned())?;
            ensure!(received == answer, "{}: {}", path.name, received.len());
        }
        Ok(())
    })
}

fn a_server_that_speaks_first_is_heard_at_once(world: &World) -> Result<()> {
    /// Dials per path; the median of these is compared.
    const DIALS: usize = 100;
    /// Waiting for a client to speak first costs detecting proxies whole seconds; a loaded machine costs less.
    const ADDED_AT_MOST: Duration = Duration::from_millis(250);
    let measure = |path: &Path| -> Result<Duration> {
        let listener = path.listen(world)?;
        let mut waits = Vec::new();
        for _ in 0..DIALS {
            let began = Instant::now();
            let (client, server) = path.pair(world, &listener)?;
            (&server).write_all(b"220 ready\r\n")?;
            let banner = look(&client, 11);
            waits.push(began.elapsed());
            assert_eq!(banner, Seen::Bytes(b"220 ready\r\n".to_vec()));
        }
        waits.sort_unstable();
        Ok(waits[DIALS / 2])
    };
    let direct = measure(&DIRECT)?;
    for path in &MESH {
        let median = measure(path)?;
        assert!(
            median < direct + ADDED_AT_MOST,
            "{}: {median:?}, direct {direct:?}",
            path.name
        );
    }
    Ok(())
}
