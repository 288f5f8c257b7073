//! A client with a valid identity of the mesh that asks for what is not the victim's, clients without a valid one,
//! and noise.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_tests::{
    conversation::{self, AppSyns, Server, client},
    lab::Pod,
    process::{Program, Running},
    programs,
};
use rcgen::ExtendedKeyUsagePurpose;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{CODECS, PORT, PRIVATE_PORT, World, identity, within};
use crate::{
    peer::{self, Credentials, DAY_S, Forgery, LIMIT, TUNNEL_PORT},
    raw::{self, Answer},
};

/// Connections of an honest client.
const HONEST_CONNECTIONS: u64 = 4;
/// Records of each, so that it lives for half a second.
const HONEST_RECORDS: u64 = 100;

/// Authorities that are not the victim's application, whatever a lenient parser might make of them.
fn wrong_authorities(victim: IpAddr, neighbour: IpAddr) -> Vec<String> {
    let (v, n) = (victim.to_string(), neighbour.to_string());
    let octets: Vec<u32> = v
        .split('.')
        .filter_map(|octet| octet.parse().ok())
        .collect();
    let number = octets
        .iter()
        .fold(0, |number: u32, octet| number << 8 | octet);
    let octal: Vec<String> = octets.iter().map(|octet| format!("0{octet:o}")).collect();
    let mut all: Vec<String> = [
        // Others.
        "{n}:7000",
        "[::ffff:{n}]:7000",
        "172.30.0.1:15012",
        "172.30.0.2:15020",
        "169.254.169.254:80",
        "224.0.0.1:7000",
        "255.255.255.255:7000",
        "[fe80::1]:7000",
        "neighbour:7000",
        "victim.default.svc.cluster.local:7000",
        // The machine itself.
        "127.0.0.1:7000",
        "127.0.0.1:7002",
        "127.1:7002",
        "[::1]:7002",
        "[::ffff:127.0.0.1]:7002",
        "0.0.0.0:7000",
        "[::]:7000",
        "localhost:7002",
        // The proxy.
        "{v}:15001",
        "{v}:15006",
        "{v}:15008",
        "[::ffff:{v}]:15008",
        // Ports.
        "{v}",
        "{v}:",
        "{v}:0",
        "{v}:65536",
        "{v}:4294974296",
        "{v}:99999999999",
        "{v}:-1",
        "{v}:+7000",
        "{v}:07000",
        "{v}: 7000",
        "{v}:7000 ",
        "{v}:0x1b58",
        "{v}:7000.",
        "{v}:7000:7000",
        // Notations.
        "{v}.:7000",
        " {v}:7000",
        "[{v}]:7000",
        "[::ffff:{v}:7000",
        "{v}%lo:7000",
        "[fe80::1%lo]:7000",
        // Other things.
        "",
        ":",
        ":7000",
        "user@{v}:7000",
        "user:password@{v}:7000",
        "{v}:7000@{n}:7000",
        "{v}:7000,{n}:7000",
        "{v}:7000/",
        "http://{v}:7000",
        "{v}:7000#fragment",
        "{v}:7000?query",
        "*",
        "{v}\u{0}:7000",
        "\u{ff11}:7000",
    ]
    .iter()
    .map(|text| text.replace("{v}", &v).replace("{n}", &n))
    .collect();
    all.push(format!("0x{number:08x}:7000"));
    all.push(format!("{number}:7000"));
    all.push(format!("{}:7000", octal.join(".")));
    all.push(format!("{}:7000", "a".repeat(240)));
    all
}

/// An application that nobody outside its pod may reach.
fn private_server(world: &World, pod: &Pod) -> Result<Running> {
    let address: SocketAddr = ([127, 0, 0, 1], PRIVATE_PORT).into();
    let program = Program::new(programs::own("seqecho")?).args(["server", "--log", "--listen"]);
    let program = program.arg(address.to_string());
    world.lab.serve(pod, &program, address, conversation::LIMIT)
}

#[test]
fn strangers_get_nowhere_while_an_honest_client_is_served() -> Result<()> {
    for codec in CODECS {
        strangers_get_nowhere(codec).context(codec)?;
    }
    Ok(())
}

fn strangers_get_nowhere(codec: &str) -> Result<()> {
    let world = World::start(codec)?;
    let lab = &world.lab;
    let (victim, neighbour, evil) = (lab.pod("victim")?, lab.pod("neighbour")?, lab.pod("evil")?);
    let server = Server::start(lab, victim, PORT)?;
    let other = Server::start(lab, neighbour, PORT)?;
    let private = private_server(&world, victim)?;
    let syns = AppSyns::install(lab, victim, &[evil.address()])?;
    let other_syns = AppSyns::install(lab, neighbour, &[evil.address()])?;
    let valid = world.certificate("evil")?;
    let over = AtomicBool::new(false);
    let (good, honest) = std::thread::scope(|scope| {
        let honest = scope.spawn(|| honest_clients(&world, server.address, &over));
        let good = attack(&world, victim, neighbour, evil, &valid);
        over.store(true, Ordering::Relaxed);
        (good, honest.join())
    });
    let good = good?;
    let rounds = honest.map_err(|_| anyhow!("the honest client panicked"))??;
    ensure!(rounds > 0, "no honest client was served meanwhile");
    let dialled = syns.count(lab, victim, evil.address())?;
    ensure!(
        dialled == good,
        "{dialled} SYNs reached the application, allowed {good}"
    );
    ensure!(
        other_syns.count(lab, neighbour, evil.address())? == 0,
        "the neighbour was dialled"
    );
    ensure!(other.served()?.is_empty(), "the neighbour was served");
    // The lab itself has looked whether it listens.
    ensure!(
        private.stdout().lines().count() <= 1,
        "loopback was served: {}",
        private.stdout()
    );
    let metrics = world.mesh.metrics(lab.node("n2")?)?;
    ensure!(
        metrics.sum("weft_agent_panics_total", &[]) == 0.0,
        "the agent panicked"
    );
    Ok(())
}

/// All attacks, one after the other. Returns how many connections to the application were right.
fn attack(
    world: &World,
    victim: &Pod,
    neighbour: &Pod,
    evil: &Pod,
    valid: &Credentials,
) -> Result<u64> {
    let good = within(&evil.netns, || async {
        authorities(victim.address(), neighbour.address(), valid).await?;
        odd_requests(victim.address(), valid).await?;
        noise(victim.address()).await?;
        control(victim.address(), valid).await
    })?;
    within(&evil.netns, || certificates(world, victim.address(), valid))?;
    Ok(good)
}

/// Clients that talk, one round after the other, until the attacks are over. Returns the rounds.
pub fn honest_clients(world: &World, to: SocketAddr, over: &AtomicBool) -> Result<u64> {
    let (web, mut rounds) = (world.lab.pod("web")?, 0);
    while !over.load(Ordering::Relaxed) {
        let connections = HONEST_CONNECTIONS.to_string();
        let program = client(to)?.args(["--connections", &connections, "--stall-ms", "10000"]);
        let program = program.args([
            "--records",
            &HONEST_RECORDS.to_string(),
            "--interval-ms",
            "5",
        ]);
        let report = conversation::talk(&world.lab, web, &program)?;
        ensure!(
            report.complete == HONEST_CONNECTIONS && report.lost() == 0,
            "an honest client: {report:?}"
        );
        rounds += 1;
    }
    Ok(rounds)
}

/// One CONNECT on a tunnel of its own.
async fn ask(victim: IpAddr, own: &Credentials, fields: &[(&[u8], &[u8])]) -> Result<Answer> {
    let config = peer::client_config(Some(own), own, &identity("victim"))?;
    let mut stream = peer::connect(SocketAddr::new(victim, TUNNEL_PORT), config).await?;
    raw::request(&mut stream, fields).await
}

async fn authorities(victim: IpAddr, neighbour: IpAddr, valid: &Credentials) -> Result<()> {
    let all = wrong_authorities(victim, neighbour);
    ensure!(all.len() >= 40, "the table has shrunk to {}", all.len());
    for authority in all {
        let fields: [(&[u8], &[u8]); 2] = [
            (b":method", b"CONNECT"),
            (b":authority", authority.as_bytes()),
        ];
        let answer = ask(victim, valid, &fields)
            .await
            .with_context(|| format!("{authority:?}"))?;
        ensure!(answer != Answer::Accepted, "{authority:?} was accepted");
    }
    Ok(())
}

/// Requests for the right place in a wrong form.
async fn odd_requests(victim: IpAddr, valid: &Credentials) -> Result<()> {
    let right = format!("{victim}:{PORT}");
    let right = right.as_bytes();
    let requests: Vec<Vec<(&[u8], &[u8])>> = vec![
        vec![
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":path", b"/"),
            (b":authority", right),
        ],
        vec![
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", b"/"),
            (b":authority", right),
        ],
        vec![
            (b":method", b"OPTIONS"),
            (b":scheme", b"http"),
            (b":path", b"*"),
            (b":authority", right),
        ],
        vec![(b":method", b"connect"), (b":authority", right)],
        vec![(b":method", b"CONNECT")],
        vec![(b":authority", right)],
        vec![
            (b":method", b"CONNECT"),
            (b":authority", right),
            (b":authority", b"127.0.0.1:7002"),
        ],
        vec![
            (b":method", b"CONNECT"),
            (b":method", b"CONNECT"),
            (b":authority", right),
        ],
        vec![
            (b":method", b"CONNECT"),
            (b"x", b"y"),
            (b":authority", right),
        ],
        vec![
            (b":method", b"CONNECT"),
            (b":authority", right),
            (b"X-Upper", b"y"),
        ],
        vec![
            (b":method", b"CONNECT"),
            (b":authority", right),
            (b"connection", b"close"),
        ],
        vec![
            (b":method", b"CONNECT"),
            (b":authority", right),
            (b"x", b"a\r\nb"),
        ],
        vec![],
    ];
    for fields in requests {
        let answer = ask(victim, valid, &fields)
            .await
            .with_context(|| format!("{fields:?}"))?;
        ensure!(answer != Answer::Accepted, "{fields:?} was accepted");
    }
    Ok(())
}

/// The negative control: the victim's own address, in both notations. Returns how many were accepted.
async fn control(victim: IpAddr, valid: &Credentials) -> Result<u64> {
    let right = [
        format!("{victim}:{PORT}"),
        format!("[::ffff:{victim}]:{PORT}"),
    ];
    for authority in &right {
        let fields: [(&[u8], &[u8]); 2] = [
            (b":method", b"CONNECT"),
            (b":authority", authority.as_bytes()),
        ];
        let answer = ask(victim, valid, &fields).await?;
        ensure!(
            answer == Answer::Accepted,
            "{authority} was not accepted: {answer:?}"
        );
    }
    Ok(right.len() as u64)
}

/// Certificates that prove no identity of this mesh, and none at all.
async fn certificates(world: &World, victim: IpAddr, valid: &Credentials) -> Result<()> {
    let evil = identity("evil");
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let forgery = |uris, by_the_mesh, expired, usage| Forgery {
        uris,
        by_the_mesh,
        ends_in_s: if expired { -DAY_S } else { DAY_S },
        usage,
    };
    let own = [evil.as_str()];
    let table = [
        (
            "of another authority",
            forgery(&own, false, false, client.clone()),
        ),
        ("expired", forgery(&own, true, true, client.clone())),
        (
            "for servers only",
            forgery(&own, true, false, ExtendedKeyUsagePurpose::ServerAuth),
        ),
        (
            "of another trust domain",
            forgery(
                &["spiffe://elsewhere/ns/default/sa/evil"],
                true,
                false,
                client.clone(),
            ),
        ),
        (
            "without an identity",
            forgery(&[], true, false, client.clone()),
        ),
        (
            "with another name",
            forgery(
                &["https://cluster.local/ns/default/sa/evil"],
                true,
                false,
                client.clone(),
            ),
        ),
    ];
    let to = SocketAddr::new(victim, TUNNEL_PORT);
    let right = format!("{victim}:{PORT}");
    let fields: [(&[u8], &[u8]); 2] = [(b":method", b"CONNECT"), (b":authority", right.as_bytes())];
    for (what, forgery) in table {
        let forged = peer::forge(world.mesh.directory(), &forgery)?;
        let config = peer::client_config(Some(&forged), valid, &identity("victim"))?;
        let mut stream = peer::connect(to, config)
            .await
            .with_context(|| what.to_owned())?;
        let answer = raw::request(&mut stream, &fields).await?;
        ensure!(answer == Answer::Closed, "a certificate {what}: {answer:?}");
    }
    let mut stream =
        peer::connect(to, peer::client_config(None, valid, &identity("victim"))?).await?;
    let answer = raw::request(&mut stream, &fields).await?;
    ensure!(
        answer == Answer::Closed,
        "without a certificate: {answer:?}"
    );
    let mut config = peer::client_config(Some(valid), valid, &identity("victim"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    ensure!(
        peer::connect(to, config).await.is_err(),
        "HTTP/1.1 was agreed on"
    );
    Ok(())
}

/// Bytes that are no TLS at all, on every port of the proxy: the connection ends, and nothing comes back but a TLS
/// alert.
async fn noise(victim: IpAddr) -> Result<()> {
    let payloads: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: victim\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0xff; 4096],
        // A ClientHello that says to be 16 KiB long, and its first bytes.
        &[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3],
        &[21, 3, 3, 0, 2, 2, 40],
    ];
    for port in [15008, 15006, 15001] {
        for payload in payloads {
            // Reset at once, which connect(2) may already tell.
            let Ok(mut socket) = TcpStream::connect((victim, port)).await else {
                continue;
            };
            // The proxy may have reset the connection already: that is what is wanted.
            let _ = socket.write_all(payload).await;
            let _ = socket.shutdown().await;
            let mut answer = Vec::new();
            let ended = timeout(LIMIT, socket.read_to_end(&mut answer)).await;
            ensure!(
                ended.is_ok(),
                "port {port} holds a connection of {payload:02x?}"
            );
            let is_alert = answer.first().is_none_or(|kind| *kind == 21);
            ensure!(is_alert, "port {port} answered {answer:02x?}");
        }
    }
    Ok(())
}
