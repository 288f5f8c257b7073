//! A certificate authority for unit tests, with certificates of any validity.

use std::sync::Arc;

use mesh_api::identity::Identity;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{
    ClientConfig, ClientConnection, CommonState, ConnectionCommon, NamedGroup, ServerConfig,
    ServerConnection, SideData,
    pki_types::{CertificateDer, UnixTime},
    time_provider::TimeProvider,
};

use x509_parser::time::ASN1Time;

use super::{
    Certified,
    response::Material,
    roots::TrustRoots,
    tls::{PeerRejection, dummy_server_name, peer},
};

/// The wall clock of tests: 2030-01-01T00:00:00Z, seconds since 1970.
pub(crate) const NOW: i64 = 1_893_456_000;

/// `spiffe://cluster.local/ns/shop/sa/<account>`.
pub(crate) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account).expect("a valid name")
}

/// A clock that stands still, for TLS.
#[derive(Debug)]
pub(crate) struct FixedTime(pub(crate) i64);

impl TimeProvider for FixedTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(
            self.0.unsigned_abs(),
        )))
    }
}

/// An authority with a key of its own.
pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
    /// Certificates above it: empty for a root.
    above: Vec<Certificate>,
}

fn time(seconds: i64) -> ASN1Time {
    ASN1Time::from_timestamp(seconds).expect("a representable time")
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let (params, key) = (authority(name), KeyPair::generate().expect("a key"));
        let certificate = params.self_signed(&key).expect("a root");
        Self {
            issuer: Issuer::new(params, key),
            certificate,
            above: Vec::new(),
        }
    }

    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let (params, key) = (authority(name), KeyPair::generate().expect("a key"));
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("an intermediate");
        Self {
            issuer: Issuer::new(params, key),
            certificate,
            above: vec![self.certificate.clone()],
        }
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.above.last().unwrap_or(&self.certificate).der().clone()
    }

    pub(crate) fn root_pem(&self) -> String {
        self.above.last().unwrap_or(&self.certificate).pem()
    }

    /// Signs a request as the wire has it: leaf, intermediates, roots.
    pub(crate) fn sign(&self, request: &str, not_before: i64, not_after: i64) -> Vec<String> {
        let mut request = CertificateSigningRequestParams::from_pem(request).expect("PKCS#10");
        Self::limit(&mut request.params, not_before, not_after);
        let leaf = request.signed_by(&self.issuer).expect("a leaf");
        self.chain(leaf.pem())
    }

    fn limit(params: &mut CertificateParams, not_before: i64, not_after: i64) {
        params.not_before = time(not_before).to_datetime();
        params.not_after = time(not_after).to_datetime();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
    }

    fn chain(&self, leaf: String) -> Vec<String> {
        let mut chain = vec![leaf];
        if !self.above.is_empty() {
            chain.push(self.certificate.pem());
        }
        chain.push(self.root_pem());
        chain
    }

    /// Key and certificate with any list of URI names.
    pub(crate) fn material(&self, uris: &[&str], not_before: i64, not_after: i64) -> Material {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().expect("ASCII")))
            .collect();
        Self::limit(&mut params, not_before, not_after);
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf");
        let mut chain = vec![leaf.der().clone()];
        if !self.above.is_empty() {
            chain.push(self.certificate.der().clone());
        }
        let encoded = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Material {
            identity: uris
                .iter()
                .find_map(|uri| uri.parse().ok())
                .unwrap_or_else(|| identity("nobody")),
            chain,
            key: rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&encoded).expect("a P-256 key"),
            roots: vec![self.root()],
            not_before,
            not_after,
            serial: "01".to_owned(),
        }
    }

    /// A certificate of `account`, valid an hour around [`NOW`], with a clock that stands at [`NOW`].
    pub(crate) fn certified(&self, account: &str) -> Certified {
        let uri = identity(account).to_string();
        certify(&self.material(&[&uri], NOW - 1800, NOW + 1800), NOW)
    }
}

/// Makes TLS configurations of `material` alone, with a clock that stands at `now`.
pub(crate) fn certify(material: &Material, now: i64) -> Certified {
    let roots = Arc::new(TrustRoots::new(material.roots.clone()).expect("roots"));
    Certified::new(
        material,
        &roots,
        &(Arc::new(FixedTime(now)) as Arc<dyn TimeProvider>),
    )
    .expect("configurations")
}

/// How a handshake ended on each side.
pub(crate) struct Ended {
    pub(crate) client: Result<Identity, PeerRejection>,
    pub(crate) server: Result<Identity, PeerRejection>,
    pub(crate) group: Option<NamedGroup>,
    pub(crate) suite: Option<rustls::CipherSuite>,
}

/// A whole handshake in memory.
pub(crate) fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ended {
    let mut client = ClientConnection::new(client, dummy_server_name()).expect("a client");
    let mut server = ServerConnection::new(server).expect("a server");
    let mut failed = (None, None);
    // Four flights are enough for TLS 1.3; more only carry alerts.
    for _ in 0..6 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        failed.1 = failed.1.or(receive(&mut server, &wire));
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("memory");
        }
        failed.0 = failed.0.or(receive(&mut client, &wire));
    }
    let judge = |error: Option<rustls::Error>, connection: &CommonState| match error {
        Some(error) => Err(PeerRejection::from(error)),
        None => peer(connection),
    };
    Ended {
        client: judge(failed.0, &client),
        server: judge(failed.1, &server),
        group: client
            .negotiated_key_exchange_group()
            .map(|group| group.name()),
        suite: client.negotiated_cipher_suite().map(|suite| suite.suite()),
    }
}

/// Gives `wire` to one side and returns what it finds wrong.
fn receive<S: SideData>(side: &mut ConnectionCommon<S>, mut wire: &[u8]) -> Option<rustls::Error> {
    while !wire.is_empty() {
        side.read_tls(&mut wire).expect("memory");
        if let Err(error) = side.process_new_packets() {
            return Some(error);
        }
    }
    None
}
