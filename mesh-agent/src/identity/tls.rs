//! TLS between nodes: which parameters are spoken, and who is believed.
//!
//! TLS 1.3 (RFC 8446) only, both ends with certificates, ALPN `h2`. Names of hosts mean nothing here: a peer is who
//! the SPIFFE URI in its certificate says, provided that the chain leads to the mesh's roots.

use std::{fmt, sync::Arc, time::Duration};

use mesh_api::identity::Identity;
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName,
    OtherError, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
    version::TLS13,
};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::time::ASN1Time;

use super::{peer_identity, roots::TrustRoots};

/// The only protocol spoken inside the tunnel.
pub const ALPN_H2: &[u8] = b"h2";

/// Most SPIFFE names of a certificate that are looked at. Ours have one; a few allow for aliases.
const NAMES_MAX: usize = 16;

/// The cryptography: AES-GCM only (AES-128 first: fastest at the same practical strength), hybrid post-quantum key
/// exchange preferred.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// The cryptography of everything but tunnels, above all the control channel: the library's defaults, so that any control
/// plane can be spoken to, but hybrid post-quantum key exchange is preferred here as well.
#[must_use]
pub fn control_provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    let preferred = aws_lc_rs::kx_group::X25519MLKEM768;
    provider
        .kx_groups
        .retain(|group| group.name() != preferred.name());
    provider.kx_groups.insert(0, preferred);
    provider
}

/// The server name that rustls asks for. It is neither sent nor verified.
#[must_use]
pub fn dummy_server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// Why a peer is not believed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PeerRejection {
    /// Its certificate is over.
    #[error("the peer's certificate ended at {}, it is {} here", utc(*.not_after), utc(*.now))]
    Expired {
        /// Our clock, seconds since 1970.
        now: i64,
        /// End of validity, seconds since 1970.
        not_after: i64,
    },
    /// Its certificate has not begun.
    #[error("the peer's certificate begins at {}, it is {} here; check both clocks", utc(*.not_before), utc(*.now))]
    NotYetValid {
        /// Our clock, seconds since 1970.
        now: i64,
        /// Start of validity, seconds since 1970.
        not_before: i64,
    },
    /// Its chain does not lead to a root of ours.
    #[error("the peer's certificate was not signed under a root of this mesh")]
    UnknownRoot,
    /// Its certificate may not be used for this end of TLS.
    #[error("the peer's certificate is not made for this end of TLS (extended key usage)")]
    WrongPurpose,
    /// The server is somebody else.
    #[error("expected {}, the peer is {}", names(.expected), names(.presented))]
    WrongIdentity {
        /// Who was expected.
        expected: Arc<[Identity]>,
        /// Who it is.
        presented: Vec<Identity>,
    },
    /// The client belongs to another mesh.
    #[error("the peer {} is not of trust domain {expected}", names(.presented))]
    ForeignTrustDomain {
        /// Our trust domain.
        expected: Arc<str>,
        /// Who it is.
        presented: Vec<Identity>,
    },
    /// It showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Its certificate holds no SPIFFE identity of the mesh's form.
    #[error("the peer's certificate holds no identity of this mesh")]
    NoIdentity,
    /// It did not agree to HTTP/2 (RFC 7301).
    #[error("the peer did not agree on ALPN h2")]
    NoAlpn,
    /// Anything else that makes a certificate unusable.
    #[error("the peer's certificate is unusable: {0}")]
    Certificate(CertificateError),
    /// Not about a certificate at all.
    #[error("TLS failed: {0}")]
    Tls(rustls::Error),
}

impl From<rustls::Error> for PeerRejection {
    fn from(error: rustls::Error) -> Self {
        use rustls::Error as E;
        let certificate = match error {
            E::InvalidCertificate(certificate) => certificate,
            E::NoCertificatesPresented => return Self::NoCertificate,
            E::NoApplicationProtocol => return Self::NoAlpn,
            other => return Self::Tls(other),
        };
        match certificate {
            CertificateError::ExpiredContext { time, not_after } => Self::Expired {
                now: seconds(time),
                not_after: seconds(not_after),
            },
            CertificateError::NotValidYetContext { time, not_before } => Self::NotYetValid {
                now: seconds(time),
                not_before: seconds(not_before),
            },
            CertificateError::UnknownIssuer => Self::UnknownRoot,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::WrongPurpose
            }
            CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<Self>() {
                Some(rejection) => rejection.clone(),
                None => Self::Certificate(CertificateError::Other(OtherError(inner))),
            },
            other => Self::Certificate(other),
        }
    }
}

impl PeerRejection {
    /// The reason inside an I/O error, as `tokio-rustls` returns it; `None` when the transport itself failed.
    #[must_use]
    pub fn of_io(error: &std::io::Error) -> Option<Self> {
        error
            .get_ref()?
            .downcast_ref::<rustls::Error>()
            .cloned()
            .map(Self::from)
    }

    fn into_tls(self) -> rustls::Error {
        CertificateError::Other(OtherError(Arc::new(self))).into()
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// A time as an operator reads it.
pub(super) fn utc(seconds: i64) -> String {
    ASN1Time::from_timestamp(seconds).map_or_else(
        |_| format!("{seconds} s since 1970"),
        |time| time.to_string(),
    )
}

fn names(identities: &[Identity]) -> String {
    let names: Vec<String> = identities.iter().map(ToString::to_string).collect();
    if names.is_empty() {
        "nobody in the mesh".to_owned()
    } else {
        names.join(" or ")
    }
}

/// Who the peer of a finished handshake is: its first SPIFFE identity, the one that policy judges.
///
/// # Errors
/// When ALPN did not settle on `h2` (rustls lets a server ignore it), or there is no identity.
pub fn peer(connection: &CommonState) -> Result<Identity, PeerRejection> {
    if connection.alpn_protocol() != Some(ALPN_H2) {
        return Err(PeerRejection::NoAlpn);
    }
    let chain = connection
        .peer_certificates()
        .ok_or(PeerRejection::NoCertificate)?;
    peer_identity(Some(chain)).ok_or(PeerRejection::NoIdentity)
}

/// Which end of TLS a certificate must be good for (RFC 5280 section 4.2.1.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    Server,
    Client,
}

/// Builds the path from `leaf` to one of the roots.
pub(super) fn verify_path(
    roots: &TrustRoots,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: Usage,
) -> Result<(), rustls::Error> {
    let usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    let certificate = EndEntityCert::try_from(leaf).map_err(path_error)?;
    certificate
        .verify_for_usage(
            algorithms().all,
            roots.anchors(),
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map(|_| ())
        .map_err(path_error)
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    aws_lc_rs::default_provider().signature_verification_algorithms
}

/// rustls's own variants, so that the alert that the peer gets says what was wrong.
fn path_error(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    match error {
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::InvalidCertValidity => CertificateError::Expired,
        // A root of the right name but of another mesh has another key.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
}

/// The SPIFFE identities in a leaf, in its order; other names are ignored.
pub(super) fn identities(leaf: &CertificateDer<'_>) -> Vec<Identity> {
    let Ok(certificate) = EndEntityCert::try_from(leaf) else {
        return Vec::new();
    };
    certificate
        .valid_uri_names()
        .filter_map(|uri| uri.parse().ok())
        .take(NAMES_MAX)
        .collect()
}

/// Whom a verifier believes, besides what the path says.
#[derive(Debug)]
enum Believed {
    /// One of these servers.
    Servers(Arc<[Identity]>),
    /// Every client of this trust domain.
    Clients(Arc<str>),
}

#[derive(Debug)]
struct Verifier {
    roots: Arc<TrustRoots>,
    algorithms: WebPkiSupportedAlgorithms,
    believed: Believed,
}

impl Verifier {
    fn new(roots: Arc<TrustRoots>, believed: Believed) -> Self {
        Self {
            roots,
            algorithms: algorithms(),
            believed,
        }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let usage = match self.believed {
            Believed::Servers(_) => Usage::Server,
            Believed::Clients(_) => Usage::Client,
        };
        verify_path(&self.roots, leaf, intermediates, now, usage)?;
        let presented = identities(leaf);
        if presented.is_empty() {
            return Err(PeerRejection::NoIdentity.into_tls());
        }
        match &self.believed {
            Believed::Servers(expected)
                if !presented.iter().any(|name| expected.contains(name)) =>
            {
                Err(PeerRejection::WrongIdentity {
                    expected: expected.clone(),
                    presented,
                }
                .into_tls())
            }
            Believed::Clients(domain)
                if !presented
                    .iter()
                    .any(|name| name.trust_domain() == &**domain) =>
            {
                Err(PeerRejection::ForeignTrustDomain {
                    expected: domain.clone(),
                    presented,
                }
                .into_tls())
            }
            _ => Ok(()),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

/// TLS 1.2 is never negotiated, so its signatures are never asked for.
fn no_tls12() -> rustls::Error {
    rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into()
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// No hints: a client of the mesh has one certificate, and the roots' names would only make the handshake longer.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Serves one certificate, and only to clients that offer `h2`: rustls itself would go on without ALPN.
#[derive(Debug)]
struct OnlyForH2(Arc<CertifiedKey>);

impl ResolvesServerCert for OnlyForH2 {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        hello
            .alpn()?
            .any(|offered| offered == ALPN_H2)
            .then(|| self.0.clone())
    }
}

/// What all configurations of one certificate share.
pub(super) struct Parameters {
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) time: Arc<dyn TimeProvider>,
    pub(super) roots: Arc<TrustRoots>,
    pub(super) key: Arc<CertifiedKey>,
    resolver: Arc<SingleCertAndKey>,
}

impl fmt::Debug for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parameters")
            .field("roots", &self.roots.certificates().len())
            .finish_non_exhaustive()
    }
}

impl Parameters {
    pub(super) fn new(
        key: CertifiedKey,
        roots: Arc<TrustRoots>,
        time: Arc<dyn TimeProvider>,
    ) -> Self {
        let resolver = Arc::new(SingleCertAndKey::from(key.clone()));
        Self {
            provider: provider(),
            time,
            roots,
            key: Arc::new(key),
            resolver,
        }
    }

    /// Wire reference: client certificate required, no tickets, no early data.
    pub(super) fn server(&self, trust_domain: &str) -> Result<ServerConfig, rustls::Error> {
        let verifier = Verifier::new(self.roots.clone(), Believed::Clients(trust_domain.into()));
        let mut config =
            ServerConfig::builder_with_details(self.provider.clone(), self.time.clone())
                .with_protocol_versions(&[&TLS13])?
                .with_client_cert_verifier(Arc::new(verifier))
                .with_cert_resolver(Arc::new(OnlyForH2(self.key.clone())));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// Wire reference: no server name, no resumption, no early data.
    pub(super) fn client(&self, expected: Arc<[Identity]>) -> Result<ClientConfig, rustls::Error> {
        let verifier = Verifier::new(self.roots.clone(), Believed::Servers(expected));
        let mut config =
            ClientConfig::builder_with_details(self.provider.clone(), self.time.clone())
                .with_protocol_versions(&[&TLS13])?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
                .with_client_cert_resolver(self.resolver.clone());
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.enable_sni = false;
        config.enable_early_data = false;
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Converts a wall clock, seconds since 1970, into what TLS wants.
pub(super) fn unix_time(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds.max(0).unsigned_abs()))
}

#[cfg(test)]
mod tests;
