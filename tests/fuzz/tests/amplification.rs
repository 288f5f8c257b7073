//! What bytes of a stranger may cost, in bytes and memory: the structural bounds of docs/threat-model.md. What they cost
//! in processor time depends on the machine: `cargo run --release -p mesh-fuzz --example costs`.

use std::{
    fs,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_agent::{
    identity::tls,
    proxy::{
        Limits, TunnelCodec,
        tunnel::{Incoming, TunnelServer, transport::accept_tls},
    },
};
use mesh_fuzz::{World, wire};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    task::{LocalSet, spawn_local},
    time::Instant,
};
use tokio_rustls::TlsConnector;

const CODECS: [TunnelCodec; 2] = [TunnelCodec::Native, TunnelCodec::H2];
/// A server's answer to a ClientHello: its certificate, and a key share of the hybrid exchange.
const FLIGHT_BYTES_MAX: usize = 4096;
/// Of that, per byte of the smallest ClientHello.
const FLIGHT_PER_BYTE_MAX: usize = 16;
/// An alert in a record of its own (RFC 8446 sections 5.1 and 6).
const ALERT_BYTES: usize = 7;
/// Memory of a connection that has said nothing, and per byte of one that says as much as TLS lets it.
const SILENT_BYTES_MAX: usize = 8 << 10;
const PENDING_PER_BYTE_MAX: usize = 3;
/// Memory of a stream that was opened and says nothing.
const STREAM_BYTES_MAX: usize = 8 << 10;
/// What a header block of a MiB, each byte of which stands for 4,000, may need; a frame may be as large itself.
const HEADERS_BYTES_MAX: usize = 8 << 20;

/// Memory is the process's, so one measurement at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kib.expect("VmRSS in kB") << 10
}

/// Growth of memory per thing that `make` makes, `count` of them alive together; the first few only warm up.
fn bytes_each<T>(count: usize, mut make: impl FnMut() -> T) -> usize {
    let warm: Vec<T> = (0..16).map(|_| make()).collect();
    let before = resident();
    let all: Vec<T> = (0..count).map(|_| make()).collect();
    let grown = resident().saturating_sub(before);
    drop((warm, all));
    grown / count
}

fn server() -> ServerConnection {
    ServerConnection::new(World::get().certified.server.clone()).expect("a valid configuration")
}

/// A ClientHello, with the hybrid key share or the smallest one.
fn client_hello(small: bool) -> Vec<u8> {
    let mut provider = (*tls::provider()).clone();
    if small {
        provider
            .kx_groups
            .retain(|group| group.name() == rustls::NamedGroup::X25519);
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    config.enable_sni = false;
    let mut client = ClientConnection::new(Arc::new(config), tls::dummy_server_name())
        .expect("a valid configuration");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("a vector takes all");
    hello
}

/// Feeds bytes and returns how many come back.
fn answered(server: &mut ServerConnection, mut bytes: &[u8]) -> usize {
    while !bytes.is_empty() {
        if !server.read_tls(&mut bytes).is_ok_and(|read| read > 0) {
            break;
        }
        // An error is answered with an alert.
        if server.process_new_packets().is_err() {
            break;
        }
    }
    let mut out = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut out).expect("a vector takes all");
    }
    out.len()
}

#[test]
fn before_a_handshake_few_bytes_come_back_for_each_that_came() {
    for small in [true, false] {
        let hello = client_hello(small);
        let flight = answered(&mut server(), &hello);
        println!("ClientHello {} bytes, answer {flight} bytes", hello.len());
        assert!(flight > hello.len() / 2, "no handshake: {flight} bytes");
        assert!(flight <= FLIGHT_BYTES_MAX, "{flight} bytes");
        assert!(
            flight <= hello.len() * FLIGHT_PER_BYTE_MAX,
            "{flight} bytes for {}",
            hello.len()
        );
    }
    for noise in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        &[22, 3, 1, 0, 0],
    ] {
        let back = answered(&mut server(), noise);
        assert!(back <= ALERT_BYTES, "{back} bytes for noise");
    }
}

#[test]
fn a_pending_handshake_holds_little_more_than_it_was_told() {
    let _alone = alone();
    let silent = bytes_each(1000, server);
    println!("silent: {silent} bytes");
    assert!(silent <= SILENT_BYTES_MAX, "{silent} bytes");
    let told = wire::endless_client_hello();
    let pending = bytes_each(100, || {
        let mut server = server();
        assert_eq!(answered(&mut server, &told), 0, "it waits for the rest");
        server
    });
    println!("told {} bytes: {pending} bytes", told.len());
    assert!(
        pending <= SILENT_BYTES_MAX + told.len() * PENDING_PER_BYTE_MAX,
        "{pending} bytes"
    );
}

#[test]
fn a_stream_that_says_nothing_costs_a_bounded_amount() {
    let _alone = alone();
    for codec in CODECS {
        silent_streams(codec);
    }
}

fn silent_streams(codec: TunnelCodec) {
    const TUNNELS: usize = 20;
    let limits = Limits::default();
    let streams = limits.tunnel.server_streams as usize;
    let mut held = Vec::new();
    let before = resident();
    run(async {
        for _ in 0..TUNNELS {
            held.push(tunnel(codec, &limits, wire::connects(streams), streams).await);
        }
        let grown = resident().saturating_sub(before) / (TUNNELS * streams);
        println!("{codec:?}: {grown} bytes per stream");
        assert!(grown <= STREAM_BYTES_MAX, "{grown} bytes per stream");
        for requests in &held {
            assert_eq!(requests.len(), streams, "not all streams were opened");
        }
    });
}

#[test]
fn headers_that_unpack_to_gigabytes_do_not() {
    let _alone = alone();
    for codec in CODECS {
        header_bomb(codec);
    }
}

fn header_bomb(codec: TunnelCodec) {
    let limits = Limits::default();
    let bomb = wire::header_bomb();
    let before = resident();
    run(async {
        let requests = tunnel(codec, &limits, bomb, 1).await;
        let grown = resident().saturating_sub(before);
        println!(
            "{codec:?}: {grown} bytes for {} of headers",
            wire::header_bomb().len()
        );
        assert!(requests.is_empty(), "the request was let in");
        assert!(grown <= HEADERS_BYTES_MAX, "{grown} bytes");
    });
}

fn run(conversation: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    LocalSet::new().block_on(&runtime, conversation);
}

/// Accepts a tunnel from a client that says `says` and stays. Returns the requests, up to `wanted`; fewer if the
/// tunnel ends or a request is refused before it gets so far.
async fn tunnel(
    codec: TunnelCodec,
    limits: &Limits,
    says: Vec<u8>,
    wanted: usize,
) -> Vec<Incoming> {
    let (far, io) = duplex(64 << 10);
    let certified = &World::get().certified;
    let config = certified.client([World::get().identity.clone()].into());
    let answered = Rc::new(tokio::sync::Notify::new());
    let refused = answered.clone();
    spawn_local(async move {
        let connector = TlsConnector::from(config);
        let shaken = connector.connect(tls::dummy_server_name(), far).await;
        let mut client = shaken.expect("certified by the same authority");
        // A server that refuses may close before it has read all.
        let _ = client.write_all(&says).await;
        let mut buffer = vec![0; 16 << 10];
        loop {
            match client.read(&mut buffer).await {
                Ok(length) if length > 0 => {
                    if wire::holds_an_end(buffer.get(..length).unwrap_or_default()) {
                        refused.notify_one();
                    }
                }
                _ => return refused.notify_one(),
            }
        }
    });
    let deadline = Instant::now() + limits.time.handshake;
    let secured = accept_tls(codec, certified.server.clone(), io, deadline).await;
    let secured = secured.expect("certified by the same authority");
    let mut requests = Vec::new();
    // What follows the preface at once may already have ended it.
    let Ok(mut server) = TunnelServer::handshake(secured, limits).await else {
        return requests;
    };
    while requests.len() < wanted {
        tokio::select! {
            next = server.accept() => match next {
                Some(Ok(request)) => requests.push(request),
                _ => break,
            },
            () = answered.notified() => break,
        }
    }
    // What was accepted lives as long as its tunnel does.
    spawn_local(async move { while let Some(Ok(_)) = server.accept().await {} });
    requests
}
