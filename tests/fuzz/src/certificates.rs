//! Certificates: a peer's, the authority's answer, and requests.

use std::{sync::Arc, time::SystemTime};

use mesh_agent::identity::{
    peer_identity,
    response::accept,
    tls::{self, PeerRejection},
};
use mesh_control::ca::SigningRequest;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConnection, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use crate::{
    World,
    world::{self},
};

/// The bytes are a client's certificate, or two with the first's length (two bytes, big-endian) before them.
pub(crate) fn peer_certificate(bytes: &[u8]) {
    let chain = chain(bytes);
    let alone = peer_identity(Some(&chain));
    let world = World::get();
    // The chain is not signed by the mesh's authority, whatever it is: nobody must come out of the handshake.
    let own = chain == world.material.chain;
    match handshake(chain) {
        Ok(identity) => assert!(
            own,
            "{identity} was believed without the authority's signature"
        ),
        Err(rejection) => drop(rejection.to_string()),
    }
    drop(alone.map(|identity| identity.to_string()));
}

fn chain(bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    let split = bytes
        .split_first_chunk::<2>()
        .and_then(|(length, rest)| rest.split_at_checked(usize::from(u16::from_be_bytes(*length))));
    let parts = match split {
        Some((leaf, next)) if !next.is_empty() => vec![leaf, next],
        _ => vec![bytes],
    };
    parts
        .into_iter()
        .map(|der| CertificateDer::from(der.to_vec()))
        .collect()
}

/// A client that presents `chain` shakes hands with the agent's server.
fn handshake(
    chain: Vec<CertificateDer<'static>>,
) -> Result<mesh_api::identity::Identity, PeerRejection> {
    let world = World::get();
    let key = CertifiedKey::new(chain, world.material.key.clone());
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    let mut client = ClientConnection::new(Arc::new(config), tls::dummy_server_name())?;
    let mut server = ServerConnection::new(world.certified.server.clone())?;
    for _ in 0..4 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("a vector takes all");
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("bytes are there");
            server.process_new_packets()?;
        }
        if !server.is_handshaking() {
            return tls::peer(&server);
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("a vector takes all");
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("bytes are there");
            client.process_new_packets()?;
        }
    }
    Err(PeerRejection::NoCertificate)
}

/// A client that believes every server.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::HandshakeNotComplete)
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Elements are separated by a line `--`; the leaf's key is not ours, so everything must be refused, without a panic.
pub(crate) fn authority_answer(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let elements: Vec<String> = text.split("\n--\n").map(str::to_owned).collect();
    let world = World::get();
    let now = world::seconds(SystemTime::now());
    match accept(&elements, &world.key, &world.identity, now) {
        Ok(material) => assert_eq!(material.chain, world.material.chain, "a foreign chain"),
        Err(error) => drop(error.to_string()),
    }
}

/// A request that is accepted names one identity at most, and never another than the one asked for beside it.
pub(crate) fn signing_request(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let request = match SigningRequest::from_pem(text) {
        Ok(request) => request,
        Err(error) => return drop(error.to_string()),
    };
    let alone = request.identity(None);
    let asked = World::get().identity.clone();
    if let Ok(given) = request.identity(Some(asked.clone())) {
        assert_eq!(given, asked);
        assert!(alone.is_err() || alone.as_ref() == Ok(&asked));
    }
}
