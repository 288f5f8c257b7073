//! TCP's truth: what an application sees through the mesh is what it would see without it. A dead peer is never a
//! clean end, FIN stays FIN, RST stays RST, half-closed connections work, nothing is added to server-first protocols,
//! and a slow reader slows its writer.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, PodSpec},
    manifests::{self, ServicePort},
    mesh::{Mesh, MeshSpec},
    process::Program,
    sockets::{Listener, Opener, Seen, finish, look, reset},
    wait,
};
use nix::{errno::Errno, sys::signal::Signal};
use serde_json::json;

/// Longest wait for anything: three times the agent's own limit for a connect, because machines are loaded.
const LIMIT: Duration = Duration::from_secs(30);
/// "Refused comes quickly": far below the agent's connect limit of 10 s, so it was not a timeout.
const QUICK: Duration = Duration::from_secs(5);
/// Where applications listen.
const PORT: u16 = 7000;
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

/// Two nodes with meshed pods (`web`, `near`, `quiet`; `cart`, `guarded`) and pods outside the mesh (`plain`;
/// `legacy`). `guarded` denies `web`; `quiet` wishes the tunnel also within its node.
struct World {
    openers: BTreeMap<String, Opener>,
    mesh: Mesh,
    lab: Lab,
}

impl World {
    fn start() -> Result<Self> {
        let spec = LabSpec::new(Families::V4)
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
                [
                    PodSpec::new("cart"),
                    PodSpec::new("guarded"),
                    PodSpec::new("legacy").unmeshed(),
                ],
            );
        let lab = Lab::build(spec)?;
        let service = |name: &str, address: IpAddr| {
            let port = ServicePort {
                name: "tcp",
                port: 80,
                target: PORT,
            };
            let closed = ServicePort {
                name: "tcp-closed",
                port: 81,
                target: CLOSED_PORT,
            };
            manifests::service("default", name, name, &[address], &[port, closed])
        };
        let quiet =
            json!({ "selector": { "matchLabels": { "app": "quiet" } }, "sameNode": "tunnel" });
        let mesh = MeshSpec::default()
            .manifest("deny", [deny_web()])
            .manifest(
                "quiet",
                [manifests::policy("MeshPolicy", "default", "quiet", quiet)],
            )
            .manifest(
                "services",
                [
                    service("cart", CART_SERVICE),
                    service("guarded", GUARDED_SERVICE),
                    service("empty", EMPTY_SERVICE),
                ],
            )
            .manifest("ghost", [ghost()]);
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

    fn at(&self, pod: &str, port: u16) -> Result<SocketAddr> {
        Ok(self.lab.pod(pod)?.at(port))
    }

    fn listen(&self, pod: &str) -> Result<Listener> {
        self.opener(pod)?.listen(self.at(pod, PORT)?)
    }

    /// Connects a pod to a listener of another and returns both ends.
    fn pair(&self, path: &Path, listener: &Listener) -> Result<(TcpStream, TcpStream)> {
        let client = self.dial(path.from, self.at(path.to, PORT)?)?;
        let (server, _) = listener
            .accept(LIMIT)
            .with_context(|| path.name.to_owned())?;
        Ok((client, server))
    }

    fn dial(&self, from: &str, to: SocketAddr) -> Result<TcpStream> {
        let client = self
            .opener(from)?
            .connect(to)?
            .with_context(|| format!("{from} cannot connect to {to}"))?;
        client.set_read_timeout(Some(LIMIT))?;
        client.set_nodelay(true)?;
        Ok(client)
    }

    /// What a client that only dials and reads sees.
    fn fate(&self, from: &str, to: SocketAddr) -> Result<Seen> {
        match self.opener(from)?.connect(to)? {
            Err(error) => Ok(Seen::ConnectFailed(Errno::from_raw(
                error.raw_os_error().unwrap_or(libc::EIO),
            ))),
            Ok(client) => {
                client.set_read_timeout(Some(LIMIT))?;
                Ok(look(&client, 1))
            }
        }
    }

    /// Connections by what the kernel did with them, over both nodes.
    fn kernel_count(&self, outcome: &str) -> Result<f64> {
        self.sum("weft_kernel_connections_total", &[("outcome", outcome)])
    }

    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut sum = 0.0;
        for node in self.lab.nodes() {
            sum += self.mesh.metrics(node)?.sum(name, labels);
        }
        Ok(sum)
    }

    /// Waits until no agent carries a connection any more.
    fn wait_nothing_open(&self) -> Result<()> {
        let mut open = 0.0;
        let outcome = wait::until("all connections to be gone", LIMIT, || {
            open = self.sum("weft_connections_open", &[])?;
            Ok((open == 0.0).then_some(()))
        });
        outcome.with_context(|| format!("{open} are still open"))
    }
}

fn deny_web() -> serde_json::Value {
    let spec = json!({
        "selector": { "matchLabels": { "app": "guarded" } },
        "action": "DENY",
        "rules": [{ "from": [{ "serviceAccounts": ["default/web"] }] }],
    });
    manifests::policy("AuthorizationPolicy", "default", "deny-web", spec)
}

fn ghost() -> serde_json::Value {
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

/// A way from a client to a server.
struct Path {
    name: &'static str,
    from: &'static str,
    to: &'static str,
}

/// Without the mesh: what everything else is compared with.
const DIRECT: Path = Path {
    name: "direct",
    from: "plain",
    to: "legacy",
};
/// Every way through the mesh.
const MESH: [Path; 5] = [
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

#[test]
fn an_unreachable_destination_ends_in_reset_or_a_failed_connect_never_in_a_clean_end() -> Result<()>
{
    let world = World::start()?;
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
    let listener = world.listen("cart")?;
    let client = world.dial("web", world.at("cart", PORT)?)?;
    drop(listener.accept(LIMIT)?);
    assert_eq!(look(&client, 1), Seen::Fin);
    Ok(())
}

fn a_service_without_endpoints_fails_inside_connect(world: &World) -> Result<()> {
    const DIALS: u32 = 100;
    let captured = world.kernel_count("captured")?;
    let counted = world.kernel_count("no_endpoint")?;
    for dial in 0..DIALS {
        let fate = world.fate("web", SocketAddr::new(EMPTY_SERVICE, 80))?;
        assert_eq!(
            fate,
            Seen::ConnectFailed(Errno::ECONNREFUSED),
            "dial {dial}"
        );
    }
    assert_eq!(
        world.kernel_count("no_endpoint")? - counted,
        f64::from(DIALS)
    );
    assert_eq!(
        world.kernel_count("captured")?,
        captured,
        "no agent was asked"
    );
    Ok(())
}

fn denied_fails_inside_connect_from_the_second_dial_on(world: &World) -> Result<()> {
    const DIALS: u64 = 100;
    /// How long the agent believes a peer's refusal without asking again.
    const REFUSAL_KEPT: Duration = Duration::from_secs(5);
    let listener = world.listen("guarded")?;
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
    assert!(world.kernel_count("denied")? > 0.0);
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

/// Who does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Client,
    Server,
}

/// What one end does; the other end then looks.
#[derive(Debug, Clone, Copy)]
enum Act {
    Send,
    /// The other end sees that bytes came, and leaves them unread.
    SendUnread,
    Fin,
    Rst,
    /// `close(2)`, whatever is unread: the kernel then makes it RST.
    Close,
}

use Act::{Close, Fin, Rst, Send, SendUnread};
use Who::{Client, Server};

/// Every order in which two ends can close, after bytes went both ways.
const ORDERS: [&[(Who, Act)]; 10] = [
    &[(Client, Fin), (Server, Fin)],
    &[(Server, Fin), (Client, Fin)],
    &[(Client, Fin), (Server, Send), (Server, Fin)],
    &[(Server, Fin), (Client, Send), (Client, Fin)],
    &[(Client, Rst)],
    &[(Server, Rst)],
    &[(Client, Fin), (Server, Send), (Server, Rst)],
    &[(Server, Fin), (Client, Send), (Client, Rst)],
    &[(Client, SendUnread), (Server, Close)],
    &[(Server, SendUnread), (Client, Close)],
];

const WORDS: &[u8] = b"words";

#[test]
fn every_order_of_closing_looks_as_without_the_mesh() -> Result<()> {
    /// Rounds per order and path: the table has 500; races that one round in ten shows are found by 5 × 20.
    const ROUNDS: usize = 20;
    let world = World::start()?;
    let expected: Vec<Vec<Seen>> = {
        let listener = world.listen(DIRECT.to)?;
        let once = |order: &&[(Who, Act)]| play(order, world.pair(&DIRECT, &listener)?);
        ORDERS.iter().map(once).collect::<Result<_>>()?
    };
    // The comparison can fail: the orders differ in what is seen.
    assert!(expected.iter().any(|seen| seen.contains(&Seen::Rst)));
    assert!(expected.iter().any(|seen| seen.contains(&Seen::Fin)));
    let mut wrong = Vec::new();
    for path in &MESH {
        let listener = world.listen(path.to)?;
        for (order, expected) in ORDERS.iter().zip(&expected) {
            for round in 0..ROUNDS {
                let seen = play(order, world.pair(path, &listener)?)?;
                if seen != *expected {
                    wrong.push(format!(
                        "{}, {order:?}, round {round}: {seen:?} instead of {expected:?}",
                        path.name
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
    assert!(
        world.kernel_count("same_node")? >= (ORDERS.len() * ROUNDS - 1) as f64,
        "within the node the kernel carried all but the first"
    );
    world.wait_nothing_open()
}

/// Sends words both ways, then plays an order; returns what was seen after each step.
fn play(order: &[(Who, Act)], (client, server): (TcpStream, TcpStream)) -> Result<Vec<Seen>> {
    let mut ends = [Some(client), Some(server)];
    let mut seen = Vec::new();
    let beginning = [(Client, Send), (Server, Send)];
    for (who, act) in beginning.iter().chain(order) {
        let (actor, other) = match who {
            Client => (0, 1),
            Server => (1, 0),
        };
        let acting = ends[actor].take().context("an end acts after its close")?;
        match act {
            Send | SendUnread => (&acting).write_all(WORDS)?,
            Fin => finish(&acting)?,
            Rst | Close => {}
        }
        match act {
            Rst => reset(acting)?,
            Close => drop(acting),
            Send | SendUnread | Fin => ends[actor] = Some(acting),
        }
        let looking = ends[other]
            .as_ref()
            .context("an end looks after its close")?;
        seen.push(match act {
            SendUnread => {
                let mut bytes = [0; WORDS.len()];
                let peeked = looking.peek(&mut bytes);
                peeked.map_or_else(
                    |error| Seen::of(&error),
                    |_| Seen::Bytes(bytes[..1].to_vec()),
                )
            }
            _ => look(looking, WORDS.len()),
        });
    }
    Ok(seen)
}

#[test]
fn nothing_is_lost_at_the_end_and_half_closed_connections_work() -> Result<()> {
    let world = World::start()?;
    for path in &MESH {
        let listener = world.listen(path.to)?;
        a_server_that_closes_at_once_is_heard_whole(&world, path, &listener)?;
        a_half_closed_connection_is_answered_whole(&world, path, &listener)?;
    }
    world.wait_nothing_open()?;
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
        let (mut client, server) = world.pair(path, listener)?;
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
        let (client, server) = world.pair(path, listener)?;
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
        let listener = world.listen(path.to)?;
        let mut waits = Vec::new();
        for _ in 0..DIALS {
            let began = Instant::now();
            let (client, server) = world.pair(path, &listener)?;
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

#[test]
fn a_killed_agent_ends_its_connections_with_reset_and_touches_no_others() -> Result<()> {
    let mut world = World::start()?;
    let established = |path: &Path| -> Result<(TcpStream, TcpStream)> {
        let pair = world.pair(path, &world.listen(path.to)?)?;
        converse(&pair)?;
        Ok(pair)
    };
    let [tunnel, within, kernel, plain_out, plain_in] = &MESH;
    let first_by_tunnel = established(kernel)?;
    let in_kernel = established(kernel)?;
    let by_both = established(tunnel)?;
    let by_first = [
        first_by_tunnel,
        established(within)?,
        established(plain_out)?,
    ];
    let by_second = established(plain_in)?;

    // Ends that the killed process itself held, and ends of the other agent, which lost the tunnel.
    let n1 = world.lab.node("n1")?;
    world.mesh.stop_agent(n1, Signal::SIGKILL)?;
    for (client, server) in by_first.iter().chain([&by_both]) {
        assert_eq!(look(client, 1), Seen::Rst, "client of {client:?}");
        assert_eq!(look(server, 1), Seen::Rst, "server of {server:?}");
    }
    converse(&in_kernel).context("the kernel carries it without an agent")?;
    converse(&by_second).context("another node's agent carries it")?;

    let n2 = world.lab.node("n2")?;
    world.mesh.stop_agent(n2, Signal::SIGKILL)?;
    assert_eq!(look(&by_second.0, 1), Seen::Rst, "plaintext client");
    assert_eq!(
        look(&by_second.1, 1),
        Seen::Rst,
        "server of a plaintext client"
    );
    Ok(())
}

/// Says something both ways.
fn converse((client, server): &(TcpStream, TcpStream)) -> Result<()> {
    for (mut from, to) in [(client, server), (server, client)] {
        from.write_all(WORDS)?;
        assert_eq!(look(to, WORDS.len()), Seen::Bytes(WORDS.into()));
    }
    Ok(())
}

#[test]
fn a_frozen_reader_stops_its_writer_and_nobody_else() -> Result<()> {
    let mut world = World::start()?;
    for path in [&MESH[0], &MESH[3], &MESH[4]] {
        frozen_readers(&mut world, path)?;
        world.wait_nothing_open()?;
    }
    Ok(())
}

fn frozen_readers(world: &mut World, path: &Path) -> Result<()> {
    /// Two tunnels with four streams each: a connection window's worth per tunnel.
    const FROZEN: usize = 8;
    /// A write that cannot go on within this is stopped.
    const STOPPED_AFTER: Duration = Duration::from_secs(2);
    /// The kernels' buffers of all legs (4 MiB to send, 6 MiB to receive, each doubled at most) and the stream window.
    const SENT_MAX: u64 = 64 << 20;
    /// Memory of both agents per frozen stream: the stream window of 4 MiB and the reads that its frames were cut from
    /// (7 MiB were measured), on the other side 512 KiB to send, as TLS records again, and a read (2 MiB).
    const MEMORY_PER_STREAM_KIB: u64 = 10 << 10;
    /// Beside the streams: code first touched, allocator arenas.
    const MEMORY_BASE_KIB: u64 = 16 << 10;

    let listener = world.listen(path.to)?;
    let mut pairs = Vec::new();
    for _ in 0..FROZEN {
        pairs.push(world.pair(path, &listener)?);
    }
    let before = agents_memory_kib(world)?;
    let sent: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = pairs
            .iter()
            .map(|(client, _)| scope.spawn(|| write_until_stopped(client, STOPPED_AFTER, SENT_MAX)))
            .collect();
        let join = |writer: std::thread::ScopedJoinHandle<'_, Result<u64>>| {
            writer.join().expect("the writing thread does not panic")
        };
        writers.into_iter().map(join).collect::<Result<_>>()
    })
    .with_context(|| path.name.to_owned())?;
    let grown = agents_memory_kib(world)?.saturating_sub(before);
    let allowed = FROZEN as u64 * MEMORY_PER_STREAM_KIB + MEMORY_BASE_KIB;
    assert!(
        grown <= allowed,
        "{}: the agents grew by {grown} KiB, {allowed} KiB are allowed; sent {sent:?}",
        path.name
    );

    // Neighbours on the same tunnels go on.
    let (client, server) = world.pair(path, &listener)?;
    (&client).write_all(b"hello")?;
    assert_eq!(look(&server, 5), Seen::Bytes(b"hello".to_vec()));
    (&server).write_all(b"hello back")?;
    assert_eq!(look(&client, 10), Seen::Bytes(b"hello back".to_vec()));

    // Thawed, everything that was sent arrives. (Negative control: it had not arrived by itself.)
    for ((client, mut server), sent) in pairs.into_iter().zip(sent) {
        finish(&client)?;
        let received = std::io::copy(&mut server, &mut std::io::sink())
            .with_context(|| format!("{}: thawed", path.name))?;
        assert_eq!(received, sent, "{}", path.name);
    }
    Ok(())
}

/// Writes until a write does not go on; returns how many bytes went.
fn write_until_stopped(mut client: &TcpStream, stopped: Duration, max: u64) -> Result<u64> {
    client.set_write_timeout(Some(stopped))?;
    let piece = pattern(64 << 10);
    let mut sent = 0;
    while sent < max {
        match client.write(&piece) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(sent),
            Err(error) => return Err(error.into()),
        }
    }
    bail!("nothing stopped the writer after {sent} bytes")
}

/// Resident memory of all agents, in KiB.
fn agents_memory_kib(world: &mut World) -> Result<u64> {
    let mut sum = 0;
    for node in world.lab.nodes() {
        let pid = world.mesh.agent(node)?.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let value = line.and_then(|line| line.split_whitespace().next());
        sum += value.context("no VmRSS")?.parse::<u64>()?;
    }
    Ok(sum)
}

/// Bytes that differ from their neighbours near and far.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|position| (position % 251) as u8 ^ (position >> 10) as u8)
        .collect()
}
