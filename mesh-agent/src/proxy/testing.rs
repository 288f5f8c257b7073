//! Values that several tests of the proxy use.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use mesh_api::identity::Identity;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    version::TLS13,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, duplex},
    time::Instant,
};

use super::{
    Limits, TunnelCodec,
    tunnel::{
        TunnelClient, TunnelServer,
        transport::{SecuredClient, SecuredServer, accept_tls, connect_tls},
    },
};
use crate::{
    capture::LocalWorkload,
    discovery::model::{CaptureSettings, Locality, Tunnel, Workload},
    sys::netns::Netns,
};

/// A workload of namespace `shop` that lives in this process's own network namespace.
pub fn local(name: &str) -> Arc<LocalWorkload> {
    Arc::new(LocalWorkload {
        namespace: "shop".into(),
        name: name.into(),
        netns: Arc::new(Netns::open(Path::new("/proc/self/ns/net")).expect("own namespace")),
        addresses: Vec::new(),
        keepalive: Default::default(),
        workload: Default::default(),
        holds: Default::default(),
    })
}

/// An identity of namespace `shop`.
pub fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account).expect("plain name")
}

/// A workload of namespace `shop`.
pub fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/shop/{name}").as_str().into(),
        name: name.into(),
        namespace: "shop".into(),
        identity: identity(name),
        addresses: vec![address.parse().expect("literal address")],
        network: "".into(),
        tunnel: Tunnel::Hbone,
        node: "node-a".into(),
        cluster: "c1".into(),
        canonical_name: name.into(),
        canonical_revision: Arc::from(""),
        workload_type: "deployment",
        workload_name: name.into(),
        healthy: true,
        host_network: false,
        locality: Locality::default(),
        capacity: 1,
        services: Default::default(),
        policies: Vec::new(),
        capture: CaptureSettings::default(),
    }
}

/// TLS for tests: a server called `cart`, and a client that believes it.
pub(crate) fn tls() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    static CONFIGS: OnceLock<(Arc<ClientConfig>, Arc<ServerConfig>)> = OnceLock::new();
    let make = || {
        let made = rcgen::generate_simple_self_signed(["cart".to_owned()]).expect("makes a key");
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("PKCS #8");
        let certificate = CertificateDer::from(made.cert);
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3 is there")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3 is there")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("they belong together");
        client.alpn_protocols = vec![b"h2".to_vec()];
        server.alpn_protocols = vec![b"h2".to_vec()];
        (Arc::new(client), Arc::new(server))
    };
    CONFIGS.get_or_init(make).clone()
}

/// The name of [`tls`]'s server.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from("cart").expect("a name")
}

/// Which codec is at the client's end and which at the server's: every pair.
pub(crate) const PAIRS: [(TunnelCodec, TunnelCodec); 4] = [
    (TunnelCodec::Native, TunnelCodec::Native),
    (TunnelCodec::Native, TunnelCodec::H2),
    (TunnelCodec::H2, TunnelCodec::Native),
    (TunnelCodec::H2, TunnelCodec::H2),
];

/// A tunnel over an in-memory connection.
pub(crate) async fn tunnel(
    (client, server): (TunnelCodec, TunnelCodec),
) -> (TunnelClient, TunnelServer<DuplexStream>) {
    let (near, far) = duplex(1 << 20);
    let limits = Limits::default();
    let client = async {
        let secured = secured_client(client, near).await;
        TunnelClient::handshake(secured, &limits, None).await
    };
    let server = async {
        let secured = secured_server(server, far).await;
        TunnelServer::handshake(secured, &limits).await
    };
    // Boxed: handshakes are large, and every test has one.
    let both = Box::pin(futures::future::join(client, server));
    let (client, server) = both.await;
    (client.expect("handshake"), server.expect("handshake"))
}

/// A client's end after its TLS handshake.
pub(crate) async fn secured_client<S>(codec: TunnelCodec, socket: S) -> SecuredClient<S>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let deadline = Instant::now() + Limits::default().time.handshake;
    connect_tls(codec, tls().0, server_name(), socket, deadline)
        .await
        .expect("TLS")
}

/// A server's end after its TLS handshake.
pub(crate) async fn secured_server<S>(codec: TunnelCodec, socket: S) -> SecuredServer<S>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let deadline = Instant::now() + Limits::default().time.handshake;
    accept_tls(codec, tls().1, socket, deadline)
        .await
        .expect("TLS")
}
