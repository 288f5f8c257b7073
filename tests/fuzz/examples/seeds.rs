//! Writes the seeds that are no text: certificates, resources in protobuf, TLS, HTTP/2 frames.
//!
//! `cargo run -p mesh-fuzz --example seeds` once, when a format changes; what it wrote is committed. The authority is a new
//! one every time, so the certificates differ from run to run.

use std::{fs, io, path::Path};

use mesh_api::{
    manifest::parse,
    proto::{security, weft, workload as wire},
};
use mesh_control::{
    config::MeshConfig,
    index::{Change, Index, ResourceType},
};
use mesh_fuzz::World;
use prost::Message as _;

fn main() -> io::Result<()> {
    certificates()?;
    resources()?;
    tls()?;
    frames()
}

fn write(target: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(name), bytes)
}

fn certificates() -> io::Result<()> {
    let world = World::get();
    let leaf = world.material.chain[0].as_ref();
    let root = world.material.roots[0].as_ref();
    write("peer_certificate", "leaf", leaf)?;
    write("peer_certificate", "authority", root)?;
    let mut two = u16::try_from(leaf.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes()
        .to_vec();
    two.extend(leaf);
    two.extend(root);
    write("peer_certificate", "leaf_and_authority", &two)?;
    write("peer_certificate", "cut", &leaf[..leaf.len() / 2])?;
    write(
        "authority_answer",
        "usual",
        world.answer.join("\n--\n").as_bytes(),
    )?;
    let reversed: Vec<&str> = world.answer.iter().rev().map(String::as_str).collect();
    write(
        "authority_answer",
        "reversed",
        reversed.join("\n--\n").as_bytes(),
    )?;
    write("authority_answer", "alone", world.answer[0].as_bytes())?;
    write("signing_request", "usual", world.request.as_bytes())?;
    let other_label = world
        .request
        .replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST");
    write("signing_request", "other_label", other_label.as_bytes())?;
    write("signing_request", "certificate", world.answer[0].as_bytes())
}

/// What the control plane makes of the committed manifests, and messages that use every field.
fn resources() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/manifest");
    for name in ["workload", "service", "policy", "guide_policies"] {
        let text = fs::read_to_string(folder.join(name))?;
        let mut index = Index::new(MeshConfig::default());
        let objects = parse(&text).objects.into_iter();
        index.apply(objects.map(|it| Change::Upsert(std::sync::Arc::new(it.object))));
        let targets = [
            (ResourceType::Address, "xds_address"),
            (ResourceType::Authorization, "xds_authorization"),
        ];
        for (kind, target) in targets {
            for (number, resource) in index.store().all(kind).enumerate() {
                let mut bytes = format!("{}\n", resource.name).into_bytes();
                bytes.extend(&resource.body);
                write(target, &format!("{name}_{number}"), &bytes)?;
            }
        }
    }
    full_workload()?;
    full_policy()
}

fn full_workload() -> io::Result<()> {
    let capture = weft::Capture {
        failure_mode: weft::FailureMode::Open.into(),
        same_node: weft::SameNode::Tunnel.into(),
    };
    let mut workload = wire::Workload {
        uid: "c1//Pod/shop/cart".into(),
        name: "cart".into(),
        namespace: "shop".into(),
        addresses: vec![
            vec![10, 1, 0, 5],
            [0; 10]
                .into_iter()
                .chain([0xff, 0xff, 10, 1, 0, 6])
                .collect(),
        ],
        network: "n".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: "cart".into(),
        node: "n1".into(),
        canonical_name: "cart".into(),
        canonical_revision: "v1".into(),
        workload_name: "cart".into(),
        authorization_policies: vec!["shop/p".into()],
        cluster_id: "c1".into(),
        capacity: Some(3),
        extensions: vec![wire::Extension {
            name: weft::CAPTURE_EXTENSION.into(),
            config: Some(prost_any(weft::CAPTURE_TYPE_URL, &capture)),
        }],
        ..wire::Workload::default()
    };
    let ports = wire::PortList {
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
    };
    workload.services.insert("shop/cart.shop.svc".into(), ports);
    let address = wire::Address {
        r#type: Some(wire::address::Type::Workload(workload)),
    };
    let mut bytes = vec![b'\n'];
    bytes.extend(address.encode_to_vec());
    write("xds_address", "full", &bytes)
}

fn prost_any(type_url: &str, message: &impl prost::Message) -> prost_types::Any {
    prost_types::Any {
        type_url: type_url.to_owned(),
        value: message.encode_to_vec(),
    }
}

fn full_policy() -> io::Result<()> {
    let policy = security::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        ..security::Authorization::default()
    };
    let mut bytes = b"shop/p\n".to_vec();
    bytes.extend(policy.encode_to_vec());
    write("xds_authorization", "no_rules", &bytes)?;
    bytes.extend([0xff, 0xff]);
    write("xds_authorization", "unreadable", &bytes)
}

fn tls() -> io::Result<()> {
    let world = World::get();
    let config = world.certified.client([world.identity.clone()].into());
    let name = mesh_agent::identity::tls::dummy_server_name();
    let mut client = rustls::ClientConnection::new(config, name).map_err(io::Error::other)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    write("tunnel_tls", "client_hello", &hello)?;
    write("tunnel_tls", "half_a_hello", &hello[..hello.len() / 2])?;
    write("tunnel_tls", "http", b"GET / HTTP/1.1\r\n\r\n")?;
    write("tunnel_tls", "http2_in_plain", PREFACE)
}

/// RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// A literal field without indexing whose name has this index in the static table (RFC 7541 section 6.2.2).
fn literal(name_index: u8, value: &str) -> Vec<u8> {
    let mut bytes = vec![name_index];
    bytes.push(u8::try_from(value.len()).unwrap_or(0x7f));
    bytes.extend(value.as_bytes());
    bytes
}

fn connect(authority: &str) -> Vec<u8> {
    // 2 is `:method`, 1 is `:authority` (RFC 7541 appendix A).
    [literal(2, "CONNECT"), literal(1, authority)].concat()
}

fn frames() -> io::Result<()> {
    let begin = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let request = frame(HEADERS, END_HEADERS, 1, &connect("10.1.0.5:80"));
    let server = |name: &str, parts: &[Vec<u8>]| {
        let bytes = [begin.clone(), parts.concat()].concat();
        write("tunnel_server", name, &bytes)?;
        write(
            "tunnel_frames",
            &format!("to_server_{name}"),
            &[&[0, 6], bytes.as_slice()].concat(),
        )
    };
    server("nothing_more", &[])?;
    server(
        "data",
        &[
            request.clone(),
            frame(DATA, 0, 1, b"hello"),
            frame(DATA, END_STREAM, 1, b""),
        ],
    )?;
    server(
        "reset",
        &[
            request.clone(),
            frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()),
        ],
    )?;
    server("ping", &[frame(PING, 0, 0, &[7; 8]), request.clone()])?;
    server(
        "windows",
        &[
            request.clone(),
            frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()),
            frame(WINDOW_UPDATE, 0, 1, &0_u32.to_be_bytes()),
        ],
    )?;
    server(
        "settings",
        &[frame(
            SETTINGS,
            0,
            0,
            &[0, 4, 0xff, 0xff, 0xff, 0xff, 0, 5, 0, 0, 0, 1],
        )],
    )?;
    server(
        "closed_window",
        &[
            frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
            request.clone(),
            frame(DATA, 0, 1, &[1; 64]),
        ],
    )?;
    server(
        "continuation",
        &[
            frame(HEADERS, 0, 1, &connect("cart.shop:80")),
            frame(CONTINUATION, END_HEADERS, 1, &[0, 1, b'a', 1, b'b']),
        ],
    )?;
    let burst: Vec<Vec<u8>> = (0..12)
        .flat_map(|number| {
            let stream = 1 + 2 * number;
            [
                frame(HEADERS, END_HEADERS, stream, &connect("10.1.0.5:80")),
                frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()),
            ]
        })
        .collect();
    server("rapid_reset", &burst)?;
    server("goaway", &[request, frame(GOAWAY, 0, 0, &[0; 8])])?;
    server(
        "get",
        &[frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            1,
            &[0x82, 0x84, 0x87],
        )],
    )?;
    answers()
}

/// 8 in the static table is `:status` 200, 13 is 404 (RFC 7541 appendix A).
fn answers() -> io::Result<()> {
    let begin = [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])].concat();
    let client = |name: &str, parts: &[Vec<u8>]| {
        let bytes = [begin.clone(), parts.concat()].concat();
        write("tunnel_client", name, &bytes)?;
        write(
            "tunnel_frames",
            &format!("to_client_{name}"),
            &[&[1, 6], bytes.as_slice()].concat(),
        )
    };
    let accepted = frame(HEADERS, END_HEADERS, 1, &[0x88]);
    client("nothing_more", &[])?;
    client(
        "accepted",
        &[accepted.clone(), frame(DATA, END_STREAM, 1, b"hello")],
    )?;
    client(
        "refused",
        &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x8d])],
    )?;
    client(
        "reset",
        &[
            accepted.clone(),
            frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()),
        ],
    )?;
    client("goaway", &[frame(GOAWAY, 0, 0, &[0; 8])])?;
    client(
        "informational",
        &[frame(HEADERS, END_HEADERS, 1, &literal(8, "103")), accepted],
    )?;
    client("no_streams", &[frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0])])?;
    client("push", &[frame(5, END_HEADERS, 1, &[0, 0, 0, 2, 0x82])])?;
    blocks()
}

/// RFC 7541 appendix C and what an attacker would make of it: each block after its length.
fn blocks() -> io::Result<()> {
    let block = |bytes: &[u8]| {
        let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        [&[length], bytes].concat()
    };
    let remembered = [&[0x41, 11][..], b"10.1.0.5:80"].concat();
    let huffman = [
        &[0x41, 0x8c][..],
        &[
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ],
    ];
    let table = [
        ("connect", block(&connect("10.1.0.5:80"))),
        ("huffman", block(&huffman.concat())),
        ("remembered", [block(&remembered), block(&[0xbe])].concat()),
        ("table_size", block(&[0x20, 0x3f, 0xe1, 0x1f, 0x88])),
        ("table_too_large", block(&[0x3f, 0xe1, 0xff, 0x7f])),
        (
            "repeated",
            [block(&remembered), block(&[0xbe; 200])].concat(),
        ),
        (
            "long_integer",
            block(&[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ),
        ("never_indexed", block(&[0x10, 1, b'a', 1, b'b'])),
    ];
    for (name, bytes) in table {
        write("header_blocks", name, &bytes)?;
    }
    Ok(())
}
