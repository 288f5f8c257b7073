//! Everything that reads bytes of others, as fuzz targets: a target takes any bytes, must not panic, and checks what holds
//! for every input.
//!
//! `cargo xtask fuzz` searches for inputs with libFuzzer; the test `corpus` runs every committed input, and variations of
//! them, through every target. An input that once broke something is committed under `corpus/TARGET/` for good.

#![forbid(unsafe_code)]

mod certificates;
mod codec;
mod mesh;
mod relay;
mod script;
mod sockets;
mod text;
mod tunnel;
pub mod wire;
mod world;

pub use world::World;

/// One way in.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Name, also that of its folder of inputs.
    pub name: &'static str,
    /// Who sends such bytes, and to what.
    pub boundary: &'static str,
    /// Longest input that is tried, bytes: long enough for every limit that the code below has to be passed.
    pub max_bytes: usize,
    /// Reads the bytes.
    pub run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: [Target; 17] = [
    Target {
        name: "connect_authority",
        boundary: "peer to agent: `:authority` of CONNECT",
        max_bytes: 512,
        run: text::connect_authority,
    },
    Target {
        name: "connect_headers",
        boundary: "peer to agent: `forwarded` and `traceparent`; control plane to agent: what `baggage` is made of",
        max_bytes: 2048,
        run: text::connect_headers,
    },
    Target {
        name: "spiffe_identity",
        boundary: "peer and control plane to agent: SPIFFE identities",
        max_bytes: 2560,
        run: text::spiffe_identity,
    },
    Target {
        name: "peer_certificate",
        boundary: "peer to agent: X.509 certificate to identity, in a TLS handshake",
        max_bytes: 4096,
        run: certificates::peer_certificate,
    },
    Target {
        name: "authority_answer",
        boundary: "control plane to agent: the chain that it signed",
        max_bytes: 8192,
        run: certificates::authority_answer,
    },
    Target {
        name: "signing_request",
        boundary: "agent to control plane: a PKCS#10 request",
        max_bytes: 4096,
        run: certificates::signing_request,
    },
    Target {
        name: "xds_address",
        boundary: "control plane to agent: Address resources",
        max_bytes: 4096,
        run: mesh::xds_address,
    },
    Target {
        name: "xds_authorization",
        boundary: "control plane to agent: Authorization resources",
        max_bytes: 4096,
        run: mesh::xds_authorization,
    },
    Target {
        name: "manifest",
        boundary: "files to control plane, and what becomes of them to agent",
        max_bytes: 4096,
        run: mesh::manifest,
    },
    Target {
        name: "admin_http",
        boundary: "local programs to agent: metrics, readiness and admin",
        max_bytes: 16 * 1024,
        run: sockets::admin_http,
    },
    Target {
        name: "local_socket",
        boundary: "local programs to agent: enrolment and status",
        max_bytes: 4096,
        run: sockets::local_socket,
    },
    Target {
        name: "tunnel_tls",
        boundary: "anybody to port 15008: bytes before a handshake",
        max_bytes: 4096,
        run: tunnel::tls,
    },
    Target {
        name: "tunnel_server",
        boundary: "peer to port 15008: HTTP/2 after the handshake",
        max_bytes: 8192,
        run: tunnel::server,
    },
    Target {
        name: "tunnel_client",
        boundary: "peer to agent: HTTP/2 answers on a tunnel that the agent opened",
        max_bytes: 8192,
        run: tunnel::client,
    },
    Target {
        name: "tunnel_frames",
        boundary: "peer to agent: HTTP/2 as the agent's own codec reads it, both roles",
        max_bytes: 8192,
        run: codec::frames,
    },
    Target {
        name: "header_blocks",
        boundary: "peer to agent: HPACK as the agent's own codec reads it",
        max_bytes: 8192,
        run: codec::header_blocks,
    },
    Target {
        name: "relay",
        boundary: "pod to ports 15001 and 15006: bytes, FIN and RST in any order",
        max_bytes: 256,
        run: relay::relay,
    },
];

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// The first line and the rest: inputs of two parts that people can read and edit.
fn two_parts(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(at) => (
            bytes.get(..at).unwrap_or_default(),
            bytes.get(at + 1..).unwrap_or_default(),
        ),
        None => (bytes, &[]),
    }
}
