//! The tunnel's seam: HBONE as the rest of the proxy sees it, whichever codec writes the frames.
//!
//! A [`TunnelClient`] opens streams with CONNECT, a [`TunnelServer`] accepts them; either way the result is a
//! [`TunnelStream`] of two halves, polled by the relay. Another codec is another variant of these enums.

use std::{
    io::{self, IoSlice, IoSliceMut},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{buffers::Size, limits::Limits};
use crate::telemetry::TunnelFailure;

pub mod h2;
pub mod headers;
pub mod native;
pub mod transport;

use transport::{SecuredClient, SecuredServer};

/// Which implementation writes the tunnels. Both speak the same protocol, so the two ends of a tunnel may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TunnelCodec {
    /// Our own.
    #[default]
    Native,
    /// The `h2` crate.
    H2,
}

/// Why a tunnel, or a stream in it, could not be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TunnelError {
    /// TCP to the peer's tunnel port failed. Another endpoint may do; look at the peer node's agent and at network
    /// policies that block port 15008.
    #[error("cannot reach the peer's tunnel port: {0}")]
    Dial(#[source] Arc<io::Error>),
    /// The peer did not answer in time. Another endpoint may do.
    #[error("the peer did not {0} in time")]
    TimedOut(&'static str),
    /// TLS failed: our certificate, the peer's, or its identity. Look at both nodes' certificates and roots.
    #[error("TLS with the peer failed: {0}")]
    Tls(#[source] Arc<io::Error>),
    /// There is no certificate for the source workload. Look at this node's connection to the control plane.
    #[error(transparent)]
    NoCertificate(#[from] crate::identity::CertificateError),
    /// HTTP/2 with the peer failed. Another endpoint may do.
    #[error("HTTP/2 with the peer failed: {0}")]
    Protocol(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// The peer did more of something than HTTP/2 needs, and its tunnel was closed. Look at the peer; it counts as
    /// `tunnel_abuse` among the limits that were reached.
    #[error("the peer exceeded a limit of HTTP/2: {0}")]
    Abuse(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// The peer is going away or full and has not looked at the stream: another tunnel may take it.
    #[error("the peer takes no more streams on this tunnel")]
    NotTaken,
    /// The peer answered CONNECT with something else than 200.
    #[error("the peer answered {0}")]
    Refused(StatusCode),
    /// A limit of this node on tunnels; `weft_limit_reached_total` says which.
    #[error("no room for another tunnel")]
    Limit,
}

impl TunnelError {
    /// Whether another endpoint may succeed where this one failed. A refusal by policy or of the request itself is
    /// final: asking elsewhere would only hide it.
    #[must_use]
    pub fn elsewhere(&self) -> bool {
        match self {
            Self::Dial(_)
            | Self::TimedOut(_)
            | Self::Tls(_)
            | Self::Protocol(_)
            | Self::Abuse(_)
            | Self::NotTaken => true,
            Self::Refused(status) => status.is_server_error(),
            Self::NoCertificate(_) | Self::Limit => false,
        }
    }

    /// What is counted for a tunnel that did not come about.
    #[must_use]
    pub fn failure(&self) -> TunnelFailure {
        match self {
            Self::Dial(_) => TunnelFailure::Dial,
            Self::TimedOut(_) => TunnelFailure::TimedOut,
            Self::Tls(_) => TunnelFailure::Tls,
            Self::NoCertificate(_) => TunnelFailure::NoCertificate,
            Self::Protocol(_) | Self::Abuse(_) | Self::NotTaken | Self::Refused(_) => {
                TunnelFailure::Http2
            }
            Self::Limit => TunnelFailure::Limit,
        }
    }
}

/// Why a stream ended without END_STREAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamError {
    /// RST_STREAM from the peer.
    Reset,
    /// The tunnel itself is gone.
    Lost,
}

/// A CONNECT request.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// `:authority`.
    pub authority: String,
    /// Everything else.
    pub headers: HeaderMap,
}

/// Says which window the streams of a tunnel shall have, in bytes; asked whenever the tunnel is at work.
pub type StreamWindow = Rc<dyn Fn() -> u32>;

/// The client end of a tunnel. Cheap to clone; the tunnel closes when the last clone and the last stream are gone.
#[derive(Debug, Clone)]
pub enum TunnelClient {
    /// By our own codec.
    Native(native::Client),
    /// By the `h2` crate.
    H2(h2::Client),
}

impl TunnelClient {
    /// Speaks the client's side of HTTP/2 on a connection after its TLS handshake, and moves its bytes in a task of its
    /// own. `socket` is for questions to the kernel about the connection.
    ///
    /// # Errors
    /// When the preface cannot be written.
    pub async fn handshake<T>(
        secured: SecuredClient<T>,
        limits: &Limits,
        socket: Option<Rc<std::os::fd::OwnedFd>>,
    ) -> Result<Self, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        match secured {
            SecuredClient::Native(session) => {
                Ok(Self::Native(native::Client::start(session, limits, socket)))
            }
            SecuredClient::H2(stream) => h2::Client::handshake(*stream, limits, socket)
                .await
                .map(Self::H2),
        }
    }

    /// Whether new streams can be opened.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self {
            Self::Native(client) => client.is_open(),
            Self::H2(client) => client.is_open(),
        }
    }

    /// Streams that the peer allows at a time.
    #[must_use]
    pub fn peer_streams(&self) -> usize {
        match self {
            Self::Native(client) => client.peer_streams(),
            Self::H2(client) => client.peer_streams(),
        }
    }

    /// Opens a stream: sends the request and waits for the answer, 200.
    ///
    /// # Errors
    /// [`TunnelError::Refused`] for another answer; [`TunnelError::NotTaken`] when the peer never looked at it.
    pub async fn open(
        &self,
        request: ConnectRequest,
    ) -> Result<(TunnelStream, HeaderMap), TunnelError> {
        match self {
            Self::Native(client) => client.open(request).await,
            Self::H2(client) => client.open(request).await,
        }
    }

    /// From now on grants streams the window that `window` says, open streams included.
    pub fn follow_window(&self, window: StreamWindow) {
        match self {
            Self::Native(client) => client.follow_window(window),
            // The crate loses credit that is not yet due when a window shrinks, and such a stream stands still for ever.
            Self::H2(_) => {}
        }
    }

    /// For how long the peer's kernel has acknowledged nothing of what is on its way; zero when that is unknown.
    #[must_use]
    pub fn unanswered_for(&self) -> Duration {
        match self {
            Self::Native(client) => client.unanswered_for(),
            Self::H2(client) => client.unanswered_for(),
        }
    }

    /// What the kernel measured on the tunnel's TCP connection.
    #[must_use]
    pub fn tcp_statistics(&self) -> Option<crate::sys::socket::TcpStatistics> {
        match self {
            Self::Native(client) => client.tcp_statistics(),
            Self::H2(client) => client.tcp_statistics(),
        }
    }
}

/// The server end of a tunnel. It moves bytes only while [`TunnelServer::accept`] is awaited.
#[derive(Debug)]
pub enum TunnelServer<T> {
    /// By our own codec.
    Native(native::Server),
    /// By the `h2` crate.
    H2(Box<h2::Server<transport::ServerStream<T>>>),
}

impl<T: AsyncRead + AsyncWrite + Unpin> TunnelServer<T> {
    /// Sends our settings and reads the client's preface, within [`TimeLimits::first_frame`].
    ///
    /// [`TimeLimits::first_frame`]: super::limits::TimeLimits::first_frame
    ///
    /// # Errors
    /// When the client does not speak HTTP/2, or says nothing.
    pub async fn handshake(
        secured: SecuredServer<T>,
        limits: &Limits,
    ) -> Result<Self, TunnelError> {
        let handshake = async {
            match secured {
                SecuredServer::Native(session) => native::Server::handshake(session, limits)
                    .await
                    .map(Self::Native),
                SecuredServer::H2(stream) => h2::Server::handshake(*stream, limits)
                    .await
                    .map(|server| Self::H2(Box::new(server))),
            }
        };
        let deadline = limits.time.first_frame;
        timeout(deadline, handshake)
            .await
            .unwrap_or(Err(TunnelError::TimedOut("send its preface")))
    }

    /// The next request; `None` when the tunnel is closed. Cancel safe.
    ///
    /// # Errors
    /// When the peer broke the protocol, stopped answering or vanished. The tunnel is over then.
    pub async fn accept(&mut self) -> Option<Result<Incoming, TunnelError>> {
        match self {
            Self::Native(server) => server.accept().await,
            Self::H2(server) => server.accept().await,
        }
    }

    /// From now on grants streams the window that `window` says, open streams included.
    pub fn follow_window(&mut self, window: StreamWindow) {
        match self {
            Self::Native(server) => server.follow_window(window),
            // As above.
            Self::H2(_) => {}
        }
    }

    /// Asks the client to open no more streams (GOAWAY); those that are open go on.
    pub fn shut_down(&mut self) {
        match self {
            Self::Native(server) => server.shut_down(),
            Self::H2(server) => server.shut_down(),
        }
    }
}

/// A request that waits for its answer; dropped without one it is reset.
#[derive(Debug)]
pub struct Incoming {
    /// Method, authority and headers.
    pub request: http::request::Parts,
    respond: Responder,
}

#[derive(Debug)]
enum Responder {
    Native(native::Responder),
    H2(h2::Responder),
}

impl Incoming {
    fn native(request: http::request::Parts, respond: native::Responder) -> Self {
        Self {
            request,
            respond: Responder::Native(respond),
        }
    }

    fn h2(request: http::request::Parts, respond: h2::Responder) -> Self {
        Self {
            request,
            respond: Responder::H2(respond),
        }
    }

    /// Answers with an error and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        match self.respond {
            Responder::Native(respond) => respond.refuse(status),
            Responder::H2(respond) => respond.refuse(status),
        }
    }

    /// Resets the stream as one that was not looked at (REFUSED_STREAM, RFC 9113 section 8.7): the client may try it on
    /// another tunnel or elsewhere.
    pub fn turn_away(self) {
        match self.respond {
            Responder::Native(respond) => respond.turn_away(),
            Responder::H2(respond) => respond.turn_away(),
        }
    }

    /// Answers 200.
    ///
    /// # Errors
    /// When the stream is gone already.
    pub fn accept(self, headers: HeaderMap) -> Result<TunnelStream, StreamError> {
        match self.respond {
            Responder::Native(respond) => respond.accept(&headers),
            Responder::H2(respond) => respond.accept(headers),
        }
    }

    /// Waits until the client gives the request up.
    pub async fn abandoned(&mut self) {
        match &mut self.respond {
            Responder::Native(respond) => respond.abandoned().await,
            Responder::H2(respond) => respond.abandoned().await,
        }
    }
}

/// A stream of a tunnel: one application connection. Dropping both halves resets it unless both directions had ended;
/// bytes that still wait in the tunnel are lost then, except those of a server that had finished its direction.
#[derive(Debug)]
pub struct TunnelStream {
    /// Towards the peer.
    pub send: TunnelSend,
    /// From the peer.
    pub receive: TunnelReceive,
}

/// The sending half.
#[derive(Debug)]
pub enum TunnelSend {
    /// By our own codec.
    Native(native::Send),
    /// By the `h2` crate.
    H2(h2::Send),
}

impl TunnelSend {
    /// Has `read` read into memory that is then sent: about `size` bytes, or fewer where the peer's windows allow no
    /// more; pending while they allow nothing. Returns what `read` returned; after an error or 0 nothing is sent.
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone.
    pub fn poll_read_from(
        &mut self,
        cx: &mut Context<'_>,
        size: Size,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Poll<Result<io::Result<usize>, StreamError>> {
        match self {
            Self::Native(send) => send.poll_read_from(cx, size, read),
            Self::H2(send) => send.poll_read_from(cx, size, read),
        }
    }

    /// Gives back what was reserved for bytes that do not come now, so that neighbours may use it.
    pub fn release(&mut self) {
        match self {
            // Reserves nothing.
            Self::Native(_) => {}
            Self::H2(send) => send.release(),
        }
    }

    /// Ends this direction (END_STREAM).
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Native(send) => send.finish(),
            Self::H2(send) => send.finish(),
        }
    }

    /// Ends both directions at once, unsent bytes dropped (RST_STREAM, CANCEL).
    pub fn reset(&mut self) {
        match self {
            Self::Native(send) => send.reset(),
            Self::H2(send) => send.reset(),
        }
    }

    /// Ready when no sent bytes wait in the tunnel any more, or never will again.
    pub fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Native(send) => send.poll_flushed(cx),
            Self::H2(send) => send.poll_flushed(cx),
        }
    }

    /// Ready when the peer reset the stream or the tunnel is gone.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match self {
            Self::Native(send) => send.poll_reset(cx),
            Self::H2(send) => send.poll_reset(cx),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub enum TunnelReceive {
    /// By our own codec.
    Native(native::Receive),
    /// By the `h2` crate.
    H2(h2::Receive),
}

impl TunnelReceive {
    /// The next bytes; `None` after END_STREAM. They count against the stream's window until
    /// [`TunnelReceive::consumed`].
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone; bytes that came before are given out first.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        match self {
            Self::Native(receive) => receive.poll_data(cx),
            Self::H2(receive) => receive.poll_data(cx),
        }
    }

    /// Opens the window again by `bytes` that were passed on.
    pub fn consumed(&mut self, bytes: usize) {
        match self {
            Self::Native(receive) => receive.consumed(bytes),
            Self::H2(receive) => receive.consumed(bytes),
        }
    }

    /// Offers a way past [`TunnelReceive::poll_data`]: bytes may go to `sink` as they come, and then count as consumed.
    /// Dropping this half takes the offer back.
    pub fn attach(&mut self, sink: Rc<dyn DirectSink>) {
        match self {
            Self::Native(receive) => receive.attach(sink),
            Self::H2(_) => {}
        }
    }

    /// Whether the sink has failed; it gets nothing more then.
    #[must_use]
    pub fn sink_failed(&self) -> bool {
        match self {
            Self::Native(receive) => receive.sink_failed(),
            Self::H2(_) => false,
        }
    }
}

/// Takes received bytes without waiting.
pub trait DirectSink {
    /// Writes as much as goes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when nothing goes now; anything else when nothing ever will.
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
}

#[cfg(test)]
mod tests;
