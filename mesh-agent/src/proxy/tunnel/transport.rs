//! What lies below HTTP/2: TLS, by the codec that will speak above it; for the `h2` crate over a socket that is read in
//! large pieces.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{TunnelCodec, TunnelError, native::Session};
use crate::proxy::buffers::{Buffer, Size};

/// A client's stream of the `h2` crate.
pub type ClientStream<S> = client::TlsStream<ReadAhead<S>>;
/// A server's stream of the `h2` crate.
pub type ServerStream<S> = server::TlsStream<ReadAhead<S>>;

/// A client's connection whose server is who it should be.
#[derive(Debug)]
pub enum SecuredClient<S> {
    /// For our own codec.
    Native(Session),
    /// For the `h2` crate.
    H2(Box<ClientStream<S>>),
}

/// A server's connection whose client has shown a certificate.
#[derive(Debug)]
pub enum SecuredServer<S> {
    /// For our own codec.
    Native(Session),
    /// For the `h2` crate.
    H2(Box<ServerStream<S>>),
}

impl<S> SecuredServer<S> {
    /// The client's certificates, leaf first.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Native(session) => session.peer_certificates(),
            Self::H2(stream) => stream.get_ref().1.peer_certificates(),
        }
    }
}

/// The client's side of a TLS handshake, over when `deadline` is.
///
/// # Errors
/// When the server does not finish it in time, or is not who `config` expects.
pub async fn connect_tls<S>(
    codec: TunnelCodec,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: S,
    deadline: Instant,
) -> Result<SecuredClient<S>, TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let connect = async {
        match codec {
            TunnelCodec::Native => Session::connect(config, name, Box::new(socket))
                .await
                .map(SecuredClient::Native),
            TunnelCodec::H2 => TlsConnector::from(config)
                .connect(name, ReadAhead::new(socket))
                .await
                .map(|stream| SecuredClient::H2(Box::new(stream))),
        }
    };
    in_time(connect, deadline).await
}

/// The server's side of a TLS handshake, over when `deadline` is: a silent or dribbling client must not stay.
///
/// # Errors
/// When the client does not finish it in time, or has no certificate that `config` accepts.
pub async fn accept_tls<S>(
    codec: TunnelCodec,
    config: Arc<ServerConfig>,
    socket: S,
    deadline: Instant,
) -> Result<SecuredServer<S>, TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let accept = async {
        match codec {
            TunnelCodec::Native => Session::accept(config, Box::new(socket))
                .await
                .map(SecuredServer::Native),
            TunnelCodec::H2 => TlsAcceptor::from(config)
                .accept(ReadAhead::new(socket))
                .await
                .map(|stream| SecuredServer::H2(Box::new(stream))),
        }
    };
    in_time(accept, deadline).await
}

async fn in_time<T>(
    handshake: impl Future<Output = io::Result<T>>,
    deadline: Instant,
) -> Result<T, TunnelError> {
    match timeout_at(deadline, handshake).await {
        Ok(Ok(secured)) => Ok(secured),
        Ok(Err(error)) => Err(TunnelError::Tls(Arc::new(error))),
        Err(_) => Err(TunnelError::TimedOut("finish the TLS handshake")),
    }
}

/// Reads ahead of TLS, which asks for 4 KiB at a time (rustls's deframer): fewer system calls for bulk traffic.
/// The buffer is a pooled one, held only while there are bytes in it.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    buffer: Option<Buffer>,
    start: usize,
    size: Size,
}

impl<S> ReadAhead<S> {
    /// Wraps a socket.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            buffer: None,
            start: 0,
            size: Size::Small,
        }
    }

    /// The socket.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncBufRead for ReadAhead<S> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.buffer.is_none() {
            let mut buffer = Buffer::take(this.size);
            let mut read = ReadBuf::new(buffer.memory());
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            let filled = read.filled().len();
            if filled == 0 {
                return Poll::Ready(Ok(&[]));
            }
            buffer.set_filled(filled);
            this.size = this
                .size
                .after_read(filled, this.size.bytes(), Size::Medium);
            this.start = 0;
            this.buffer = Some(buffer);
        }
        let bytes = this
            .buffer
            .as_ref()
            .and_then(|buffer| buffer.filled().get(this.start..))
            .unwrap_or_default();
        Poll::Ready(Ok(bytes))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let this = self.get_mut();
        this.start += amount;
        if this
            .buffer
            .as_ref()
            .is_some_and(|buffer| this.start >= buffer.filled().len())
        {
            this.buffer = None;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let bytes = ready!(self.as_mut().poll_fill_buf(cx))?;
        let taken = bytes.len().min(into.remaining());
        into.put_slice(bytes.get(..taken).unwrap_or_default());
        self.consume(taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::pki_types::PrivateKeyDer;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::sleep,
    };

    use super::*;

    const CODECS: [TunnelCodec; 2] = [TunnelCodec::Native, TunnelCodec::H2];
    const DEADLINE: Duration = Duration::from_secs(10);

    fn config() -> Arc<ServerConfig> {
        let made = rcgen::generate_simple_self_signed(["cart".to_owned()]).expect("makes a key");
        let certificate = CertificateDer::from(made.cert);
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("PKCS #8");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3 is there")
            .with_no_client_auth();
        Arc::new(
            builder
                .with_single_cert(vec![certificate], key)
                .expect("they belong together"),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_gone_at_the_deadline() {
        for codec in CODECS {
            let (_silent, near) = duplex(64 << 10);
            let began = Instant::now();
            let result = accept_tls(codec, config(), near, began + DEADLINE).await;
            assert!(matches!(result, Err(TunnelError::TimedOut(_))));
            assert_eq!(began.elapsed(), DEADLINE);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_dribbles_is_gone_at_the_same_deadline() {
        for codec in CODECS {
            let (mut far, near) = duplex(64 << 10);
            let began = Instant::now();
            let dribble = async {
                // A record header that promises 512 bytes, then one byte each second (RFC 8446 section 5.1).
                far.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252])
                    .await
                    .expect("open");
                while far.write_all(&[3]).await.is_ok() {
                    sleep(Duration::from_secs(1)).await;
                }
            };
            let accept = accept_tls(codec, config(), near, began + DEADLINE);
            let (result, ()) = futures::future::join(accept, dribble).await;
            assert!(matches!(result, Err(TunnelError::TimedOut(_))));
            assert!(began.elapsed() <= DEADLINE + Duration::from_secs(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_speaks_no_tls_is_refused_at_once() {
        for codec in CODECS {
            let (mut far, near) = duplex(64 << 10);
            far.write_all(b"GET / HTTP/1.1\r\n\r\n")
                .await
                .expect("open");
            let began = Instant::now();
            let result = accept_tls(codec, config(), near, began + DEADLINE).await;
            assert!(matches!(result, Err(TunnelError::Tls(_))));
            assert_eq!(began.elapsed(), Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn bytes_come_whole_and_the_buffer_is_given_back() {
        let (mut far, near) = duplex(64 << 10);
        let mut near = ReadAhead::new(near);
        far.write_all(b"hello world").await.expect("fits");
        let mut first = [0; 5];
        near.read_exact(&mut first).await.expect("there");
        assert_eq!(&first, b"hello");
        assert!(near.buffer.is_some(), "the rest is kept");
        let mut rest = [0; 6];
        near.read_exact(&mut rest).await.expect("there");
        assert_eq!(&rest, b" world");
        assert!(near.buffer.is_none(), "nothing is held while idle");
        drop(far);
        assert_eq!(near.read(&mut rest).await.expect("end"), 0);
    }
}
