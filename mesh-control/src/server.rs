//! The TLS listener that both services share.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use tracing::{debug, error, info, warn};

use crate::{
    ca::{Authority, SERVING_LIFETIME, SignError},
    telemetry::Metrics,
    xds::STREAMS_MAX,
};

/// How long a client may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most handshakes at a time: after a restart all agents come at once, and each costs a signature.
const HANDSHAKES_MAX: usize = 256;
/// Most connections at a time, handshakes included: two for each of the streams that are served (one for discovery, one
/// for certificates). Further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 2 * STREAMS_MAX;
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Pause after a failed renewal of the serving certificate.
const RENEWAL_RETRY: Duration = Duration::from_secs(60);

/// Why the listener cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The serving certificate could not be made.
    #[error("serving certificate: {0}")]
    Sign(#[from] SignError),
    /// The TLS library refused it.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// The serving certificate, replaceable while running.
pub(crate) struct Serving {
    authority: Arc<Authority>,
    names: Vec<String>,
    current: RwLock<Arc<CertifiedKey>>,
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
        authority: Arc<Authority>,
        names: Vec<String>,
        now: SystemTime,
    ) -> Result<Self, ServerError> {
        let current = RwLock::new(issue(&authority, &names, now)?);
        Ok(Self {
            authority,
            names,
            current,
        })
    }

    /// Renews at half-life until `stop` turns true. A certificate is kept when its renewal fails.
    pub async fn renew(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut pause = SERVING_LIFETIME / 2;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = crate::stopped(&mut stop) => return,
            }
            match issue(&self.authority, &self.names, SystemTime::now()) {
                Ok(new) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
                    info!("renewed the serving certificate");
                    pause = SERVING_LIFETIME / 2;
                }
                Err(error) => {
                    error!(%error, "could not renew the serving certificate; the present one stays");
                    pause = RENEWAL_RETRY;
                }
            }
        }
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(
            self.current
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        )
    }
}

fn issue(
    authority: &Authority,
    names: &[String],
    now: SystemTime,
) -> Result<Arc<CertifiedKey>, ServerError> {
    let made = authority.serving(names, now)?;
    let key = CertifiedKey::from_der(made.chain, made.key, &aws_lc_rs::default_provider())?;
    Ok(Arc::new(key))
}

/// TLS 1.3 with ALPN `h2`.
pub(crate) fn tls_config(serving: Arc<Serving>) -> Result<ServerConfig, ServerError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
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

/// A connection, counted as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted {
    stream: TlsStream<TcpStream>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Counted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
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
                    tokio::time::sleep(ACCEPT_PAUSE).await;
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
                        let _ = ready
                            .send(Ok(Counted {
                                stream,
                                _permit: permit,
                            }))
                            .await;
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
