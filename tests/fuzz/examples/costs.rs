//! Processor time that bytes of a stranger cost before they are anybody's: the numbers of docs/threat-model.md.
//!
//! `cargo run --release -p mesh-fuzz --example costs`

use std::{sync::Arc, time::Instant};

use mesh_agent::identity::tls;
use mesh_fuzz::{TARGETS, World, wire};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};

/// How long each cost is measured.
const SECONDS: f64 = 1.0;

fn main() {
    let hello = client_hello();
    let cut = wire::endless_client_hello();
    println!("| input | bytes | µs each | ns per byte |\n|---|---|---|---|");
    row("a ClientHello, answered", hello.len(), || answer(&hello));
    row("an endless ClientHello", cut.len(), || answer(&cut));
    row("noise", 4096, || answer(&[0xff; 4096]));
    let server = TARGETS.iter().find(|target| target.name == "tunnel_server");
    let server = server.expect("the target of tunnels").run;
    let connects = wire::connects(100);
    row(
        "100 CONNECT requests, refused or echoed",
        connects.len(),
        || {
            server(&connects);
        },
    );
    let bomb = wire::header_bomb();
    row("a header block that unpacks to 4 GB", bomb.len(), || {
        server(&bomb)
    });
}

fn row(what: &str, bytes: usize, mut run: impl FnMut()) {
    run();
    let began = Instant::now();
    let mut rounds = 0_u32;
    while began.elapsed().as_secs_f64() < SECONDS {
        run();
        rounds += 1;
    }
    let micros = began.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);
    println!(
        "| {what} | {bytes} | {micros:.0} | {:.0} |",
        micros * 1e3 / bytes as f64
    );
}

fn client_hello() -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    let mut client = ClientConnection::new(Arc::new(config), tls::dummy_server_name())
        .expect("a valid configuration");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("a vector takes all");
    hello
}

fn answer(mut bytes: &[u8]) {
    let config = World::get().certified.server.clone();
    let mut server = ServerConnection::new(config).expect("a valid configuration");
    while !bytes.is_empty() && server.read_tls(&mut bytes).is_ok_and(|read| read > 0) {
        if server.process_new_packets().is_err() {
            break;
        }
    }
    let mut out = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut out).expect("a vector takes all");
    }
}
