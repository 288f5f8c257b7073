//! The TLS listener that both services share.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use tracing::{debug, error, info, warn};

use crate::{
    ca::{Authority, BACKDATE, SERVING_LIFETIME, SignError},
    telemetry::Metrics,
    xds::STREAMS_MAX,
};

/// How long a client may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take from the end of its handshake to its first request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Most handshakes at a time: after a restart all agents come at once, and each costs a signature.
const HANDSHAKES_MAX: usize = 256;
/// Most connections at a time, handshakes included: two for each of the streams that are served (one for discovery, one
/// for certificates). Further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 2 * STREAMS_MAX;
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often the serving certificate's age is compared with the wall clock, which may jump or run on while the machine
/// sleeps.
const RENEWAL_TICK: Duration = Duration::from_secs(30);

/// Why the listener cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The serving certificate could not be made.
    #[error("serving certificate: {0}")]
    Sign(#[from] SignError),
    /// The TLS library refused it.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The listener is none.
    #[error("listener: {0}")]
    Listener(io::Error),
}

/// The serving certificate, replaceable while running.
pub(crate) struct Serving {
    authority: watch::Receiver<Arc<Authority>>,
    names: Vec<String>,
    current: RwLock<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    issued: SystemTime,
}

impl Current {
    /// Whether half of its life is over, or it is from the future.
    fn is_due(&self, now: SystemTime) -> bool {
        match now.duration_since(self.issued) {
            Ok(age) => age >= SERVING_LIFETIME / 2,
            Err(ahead) => ahead.duration() >= BACKDATE / 2,
        }
    }
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Serving {
    pub fn new(
        authority: watch::Receiver<Arc<Authority>>,
        names: Vec<String>,
        now: SystemTime,
    ) -> Result<Self, ServerError> {
        let key = issue(&authority.borrow().clone(), &names, now)?;
        let current = RwLock::new(Current { key, issued: now });
        Ok(Self {
            authority,
            names,
            current,
        })
    }

    /// Renews at half-life, and when the authority is another one, until `stop` turns true. A certificate is kept when its
    /// renewal fails.
    pub async fn renew(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut authority = self.authority.clone();
        loop {
            tokio::select! {
                () = sleep(RENEWAL_TICK) => self.renew_if_due(SystemTime::now()),
                () = changed(&mut authority) => self.renew_now(SystemTime::now()),
                () = crate::stopped(&mut stop) => return,
            }
        }
    }

    fn renew_if_due(&self, now: SystemTime) {
        if self.read().is_due(now) {
            self.renew_now(now);
        }
    }

    fn renew_now(&self, now: SystemTime) {
        let authority = self.authority.borrow().clone();
        match issue(&authority, &self.names, now) {
            Ok(key) => {
                let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
                *current = Current { key, issued: now };
                info!("renewed the serving certificate");
            }
            Err(error) => {
                error!(%error, "could not renew the serving certificate; the present one stays");
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.read().key.clone())
    }
}

/// Returns when there is another authority; never where it cannot change.
async fn changed(authority: &mut watch::Receiver<Arc<Authority>>) {
    if authority.changed().await.is_err() {
        std::future::pending().await
    }
}

fn issue(
    authority: &Authority,
    names: &[String],
    now: SystemTime,
) -> Result<Arc<CertifiedKey>, ServerError> {
    let made = authority.serving(names, now)?;
    Ok(Arc::new(CertifiedKey::new(made.chain, made.key)))
}

/// The library's defaults, but hybrid post-quantum key exchange is preferred.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
    Arc::new(CryptoProvider {
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1],
        ..aws_lc_rs::default_provider()
    })
}

/// TLS 1.3 with ALPN `h2`.
pub(crate) fn tls_config(serving: Arc<Serving>) -> Result<ServerConfig, ServerError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The names of the serving certificate: what was configured, and what always leads here.
pub(crate) fn serving_names(configured: &[String], listen: IpAddr) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"]
        .into_iter()
        .map(String::from)
        .collect();
    if !listen.is_unspecified() {
        names.push(listen.to_string());
    }
    for name in configured {
        names.push(name.clone());
    }
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Whether a connection has brought a request. Every request carries it as an extension.
#[derive(Debug, Clone, Default)]
pub(crate) struct Used(Arc<AtomicBool>);

impl Used {
    /// Notes a request.
    pub fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connection, counted as long as it lives. It ends when no request comes.
#[derive(Debug)]
pub(crate) struct Counted<S = TlsStream<TcpStream>> {
    stream: S,
    used: Used,
    /// Until the first request.
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

impl<S> Counted<S> {
    fn new(stream: S, permit: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            used: Used::default(),
            deadline: Some(Box::pin(sleep(FIRST_REQUEST_TIMEOUT))),
            _permit: permit,
        }
    }

    fn is_overdue(&mut self, context: &mut Context<'_>) -> bool {
        if self.used.0.load(Ordering::Relaxed) {
            self.deadline = None;
        }
        let deadline = self.deadline.as_mut();
        deadline.is_some_and(|deadline| deadline.as_mut().poll(context).is_ready())
    }
}

impl<S> Connected for Counted<S> {
    type ConnectInfo = Used;

    fn connect_info(&self) -> Used {
        self.used.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_overdue(context) {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "no request came on the connection",
            )));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Accepts connections and finishes their handshakes, each in a task of its own, until `stop` turns true.
pub(crate) fn accept(
    listener: TcpListener,
    tls: ServerConfig,
    metrics: Metrics,
    mut stop: watch::Receiver<bool>,
) -> mpsc::Receiver<io::Result<Counted>> {
    let (ready, connections) = mpsc::channel(1);
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let connections_max = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::spawn(async move {
        loop {
            let Ok(handshake) = handshakes.clone().acquire_owned().await else {
                return;
            };
            let Ok(permit) = connections_max.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = crate::stopped(&mut stop) => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "could not accept");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (acceptor, ready, metrics) = (acceptor.clone(), ready.clone(), metrics.clone());
            tokio::spawn(async move {
                // Small messages are latency here; a failure to say so is no reason to refuse the client.
                let _ = stream.set_nodelay(true);
                match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        // Fails only when the server is gone.
                        let _ = ready.send(Ok(Counted::new(stream, permit))).await;
                    }
                    Ok(Err(error)) => {
                        metrics.handshakes_failed.inc();
                        debug!(%peer, %error, "TLS handshake failed");
                    }
                    Err(_) => {
                        metrics.handshakes_failed.inc();
                        debug!(%peer, "TLS handshake took too long");
                    }
                }
                drop(handshake);
            });
        }
    });
    connections
}

#[cfg(test)]
mod tests {
    use rustls::{
        ClientConfig, NamedGroup, RootCertStore,
        pki_types::{CertificateDer, pem::PemObject},
    };

    use tokio::io::AsyncReadExt;

    use super::*;

    fn serving(now: SystemTime) -> Serving {
        let lifetime = Duration::from_secs(3600);
        let authority = Authority::ephemeral("cluster.local", lifetime, now).expect("made");
        let names = serving_names(&[], [127, 0, 0, 1].into());
        let (_, authority) = watch::channel(Arc::new(authority));
        Serving::new(authority, names, now).expect("signed")
    }

    #[tokio::test]
    async fn the_key_exchange_is_hybrid_post_quantum_with_clients_that_offer_it() {
        let serving = Arc::new(serving(SystemTime::now()));
        let mut roots = RootCertStore::empty();
        let pem = serving.authority.borrow().roots_pem().to_owned();
        let root = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a root");
        roots.add(root).expect("usable");
        let client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("supported")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = TlsAcceptor::from(Arc::new(tls_config(serving).expect("usable")));
        let client = tokio_rustls::TlsConnector::from(Arc::new(client));
        let (near, far) = tokio::io::duplex(16 * 1024);
        let name = "localhost".try_into().expect("a name");
        let (client, server) = tokio::join!(client.connect(name, near), server.accept(far));
        let (_client, server) = (client.expect("trusted"), server.expect("served"));
        let group = server.get_ref().1.negotiated_key_exchange_group();
        assert_eq!(
            group.map(|group| group.name()),
            Some(NamedGroup::X25519MLKEM768)
        );
    }

    #[test]
    fn the_serving_certificate_follows_the_wall_clock() {
        let start = SystemTime::now();
        let serving = serving(start);
        let renewed = |now| {
            let before = serving.read().key.clone();
            serving.renew_if_due(now);
            !Arc::ptr_eq(&before, &serving.read().key)
        };
        assert!(!renewed(start + SERVING_LIFETIME / 2 - RENEWAL_TICK));
        assert!(renewed(start + SERVING_LIFETIME / 2), "half of its life");
        assert!(!renewed(start + SERVING_LIFETIME / 2));
        assert!(
            renewed(start),
            "the clock went back: it would not be valid yet"
        );
        assert!(!renewed(start - RENEWAL_TICK), "a small correction");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_when_no_request_comes() {
        let permits = Arc::new(Semaphore::new(2));
        for used in [false, true] {
            let permit = permits.clone().acquire_owned().await.expect("free");
            let (stream, _client) = tokio::io::duplex(64);
            let mut connection = Counted::new(stream, permit);
            if used {
                connection.connect_info().note();
            }
            let read = timeout(FIRST_REQUEST_TIMEOUT * 2, connection.read_u8()).await;
            let ended = read
                .is_ok_and(|read| read.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut));
            assert_ne!(ended, used);
        }
    }
}
