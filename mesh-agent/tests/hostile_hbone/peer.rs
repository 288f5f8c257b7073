//! An HBONE peer of its own: certificates from the mesh's authority, TLS and HTTP/2 with the settings that Istio's
//! ztunnel uses. Shares no code with the agent's tunnels, so that a mistake in those cannot hide itself.

use std::{
    fs,
    future::poll_fn,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;
use h2::SendStream;
use mesh_api::proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{
        CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime,
        pem::PemObject as _,
    },
    server::WebPkiClientVerifier,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request,
    transport::{Certificate, Channel, ClientTlsConfig},
};
use x509_parser::time::ASN1Time;

/// Longest step of a conversation.
pub const LIMIT: Duration = Duration::from_secs(20);
/// A day, seconds.
pub const DAY_S: i64 = 86_400;
/// Port of HBONE.
pub const TUNNEL_PORT: u16 = 15008;

/// A key, its chain (leaf first) and the mesh's roots.
#[derive(Debug)]
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    roots: Vec<CertificateDer<'static>>,
}

/// Asks the control plane for a certificate of `identity`, with a node's token. Call it in that node's namespace.
pub async fn certificate(
    mesh: &Path,
    node: &str,
    control: SocketAddr,
    identity: &str,
) -> Result<Credentials> {
    let root = fs::read(mesh.join("ca/root-cert.pem"))?;
    let token = fs::read_to_string(mesh.join(format!("token-{node}")))?;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root));
    let channel = Channel::from_shared(format!("https://{control}"))?
        .tls_config(tls)?
        .connect()
        .await?;
    let (key, request) = signing_request(identity)?;
    let kind = Some(Kind::StringValue(identity.to_owned()));
    let fields = [("ImpersonatedIdentity".to_owned(), Value { kind })].into();
    let mut request = Request::new(IstioCertificateRequest {
        csr: request,
        validity_duration: 3600,
        metadata: Some(Struct { fields }),
    });
    let bearer = format!("Bearer {}", token.trim());
    request
        .metadata_mut()
        .insert("authorization", bearer.parse()?);
    request
        .metadata_mut()
        .insert("clusterid", "Kubernetes".parse()?);
    let answer = IstioCertificateServiceClient::new(channel)
        .create_certificate(request)
        .await?;
    let chain = answer.into_inner().cert_chain;
    let (roots, certificates) = chain.split_last().context("an empty chain")?;
    let first = |pem: &String| Ok(CertificateDer::from_pem_slice(pem.as_bytes())?);
    Ok(Credentials {
        chain: certificates.iter().map(first).collect::<Result<_>>()?,
        key: key.serialize_der(),
        roots: CertificateDer::pem_slice_iter(roots.as_bytes()).collect::<Result<_, _>>()?,
    })
}

fn signing_request(identity: &str) -> Result<(KeyPair, String)> {
    let key = KeyPair::generate()?;
    let request = leaf_parameters(&[identity])?
        .serialize_request(&key)?
        .pem()?;
    Ok((key, request))
}

fn leaf_parameters(uris: &[&str]) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for uri in uris {
        params
            .subject_alt_names
            .push(SanType::URI((*uri).try_into()?));
    }
    Ok(params)
}

/// What a certificate made by the test itself says.
#[derive(Debug)]
pub struct Forgery<'a> {
    /// URI names.
    pub uris: &'a [&'a str],
    /// Signed by the mesh's own authority, or by one that only claims to be it.
    pub by_the_mesh: bool,
    /// Seconds until it is over, or negative since then.
    pub ends_in_s: i64,
    /// What the key may be used for.
    pub usage: ExtendedKeyUsagePurpose,
}

/// Makes a certificate that the mesh's authority never would.
pub fn forge(mesh: &Path, forgery: &Forgery<'_>) -> Result<Credentials> {
    let read = |name: &str| Ok::<_, anyhow::Error>(fs::read_to_string(mesh.join("ca").join(name))?);
    let (key, authority) = if forgery.by_the_mesh {
        (
            KeyPair::from_pem(&read("ca-key.pem")?)?,
            read("ca-cert.pem")?,
        )
    } else {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "cluster.local");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?.pem();
        (key, certificate)
    };
    let issuer = Issuer::from_ca_cert_pem(&authority, key)?;
    let leaf_key = KeyPair::generate()?;
    let pem = leaf_parameters(forgery.uris)?
        .serialize_request(&leaf_key)?
        .pem()?;
    let mut request = CertificateSigningRequestParams::from_pem(&pem)?;
    request.params.not_before = after(-2 * DAY_S)?.to_datetime();
    request.params.not_after = after(forgery.ends_in_s)?.to_datetime();
    request.params.extended_key_usages = vec![forgery.usage.clone()];
    let leaf = request.signed_by(&issuer)?;
    Ok(Credentials {
        chain: vec![leaf.der().clone()],
        key: leaf_key.serialize_der(),
        roots: CertificateDer::pem_slice_iter(read("root-cert.pem")?.as_bytes())
            .collect::<Result<_, _>>()?,
    })
}

/// So many seconds from now, as certificates have it.
fn after(seconds: i64) -> Result<ASN1Time> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(ASN1Time::from_timestamp(
        i64::try_from(now.as_secs())? + seconds,
    )?)
}

/// TLS 1.3, ALPN `h2`, no SNI; the server must be `expected`.
pub fn client_config(
    own: Option<&Credentials>,
    roots: &Credentials,
    expected: &str,
) -> Result<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = ExpectOne {
        roots: roots.roots.clone(),
        expected: expected.to_owned(),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(own.chain.clone(), own.private_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS 1.3, ALPN `h2`, clients must show a certificate of the mesh.
pub fn server_config(own: &Credentials) -> Result<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(own.roots.iter().cloned());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain.clone(), own.private_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

impl Credentials {
    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}

/// TCP and TLS to a tunnel port. In TLS 1.3 a server refuses the client's certificate after the client's handshake is
/// over, so success here does not yet mean that it was accepted.
pub async fn connect(to: SocketAddr, config: ClientConfig) -> Result<TlsStream<TcpStream>> {
    let socket = tokio::time::timeout(LIMIT, TcpStream::connect(to)).await??;
    socket.set_nodelay(true)?;
    // Not sent: `enable_sni` is off, and an address would not be sent anyway (RFC 6066 section 3).
    let name = ServerName::IpAddress(to.ip().into());
    let shaken = TlsConnector::from(Arc::new(config)).connect(name, socket);
    Ok(tokio::time::timeout(LIMIT, shaken).await??)
}

/// Sends as the peer's windows allow (RFC 9113 section 6.9).
pub async fn send_all(send: &mut SendStream<Bytes>, mut bytes: Bytes) -> Result<()> {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        let room = poll_fn(|cx| send.poll_capacity(cx));
        let room = tokio::time::timeout(LIMIT, room).await?;
        let room = room.context("the stream has ended")??;
        send.send_data(bytes.split_to(room.min(bytes.len())), false)?;
    }
    Ok(())
}

/// The URI names of a certificate.
pub fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)?;
    let names = parsed
        .subject_alternative_name()?
        .context("no subject alternative name")?;
    let uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
    Ok(uris.collect())
}

/// Chain to the mesh's roots, and one expected identity; names are not looked at.
#[derive(Debug)]
struct ExpectOne {
    roots: Vec<CertificateDer<'static>>,
    expected: String,
}

impl ServerCertVerifier for ExpectOne {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refused = |error: anyhow::Error| rustls::Error::General(format!("{error:#}"));
        let anchors: Vec<_> = self
            .roots
            .iter()
            .filter_map(|root| webpki::anchor_from_trusted_cert(root).ok())
            .collect();
        let parsed =
            webpki::EndEntityCert::try_from(leaf).map_err(|error| refused(error.into()))?;
        parsed
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchors,
                intermediates,
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(|error| refused(error.into()))?;
        let names = uris(leaf).map_err(refused)?;
        if names.contains(&self.expected) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(refused(anyhow!(
            "the server is {names:?}, not {}",
            self.expected
        )))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(
            "TLS 1.2 is not spoken here".to_owned(),
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
