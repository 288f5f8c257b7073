//! The tunnel's seam: HBONE as the rest of the proxy sees it, whichever codec writes the frames.
//!
//! A [`TunnelClient`] opens streams with CONNECT, a [`TunnelServer`] accepts them; either way the result is a
//! [`TunnelStream`] of two halves, polled by the relay. Another codec is another variant of these enums.

use std::{
    io,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::limits::Limits;
use crate::telemetry::TunnelFailure;

pub mod h2;
pub mod headers;
pub mod transport;

/// Which implementation writes the tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TunnelCodec {
    /// The `h2` crate.
    #[default]
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
    Protocol(#[source] Arc<::h2::Error>),
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
            Self::Protocol(_) | Self::NotTaken | Self::Refused(_) => TunnelFailure::Http2,
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
    /// By the `h2` crate.
    H2(h2::Client),
}

impl TunnelClient {
    /// Speaks the client's side of HTTP/2 on `io` and moves its bytes in a task of its own.
    ///
    /// # Errors
    /// When the preface cannot be written.
    pub async fn handshake<T>(
        codec: TunnelCodec,
        io: T,
        limits: &Limits,
        socket: Option<Rc<std::os::fd::OwnedFd>>,
    ) -> Result<Self, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        match codec {
            TunnelCodec::H2 => h2::Client::handshake(io, limits, socket)
                .await
                .map(Self::H2),
        }
    }

    /// Whether new streams can be opened.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self {
            Self::H2(client) => client.is_open(),
        }
    }

    /// Streams that the peer allows at a time.
    #[must_use]
    pub fn peer_streams(&self) -> usize {
        match self {
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
            Self::H2(client) => client.open(request).await,
        }
    }

    /// From now on grants streams the window that `window` says, open streams included.
    pub fn follow_window(&self, window: StreamWindow) {
        match self {
            Self::H2(client) => client.follow_window(window),
        }
    }

    /// For how long the peer's kernel has acknowledged nothing of what is on its way; zero when that is unknown.
    #[must_use]
    pub fn unanswered_for(&self) -> Duration {
        match self {
            Self::H2(client) => client.unanswered_for(),
        }
    }

    /// What the kernel measured on the tunnel's TCP connection.
    #[must_use]
    pub fn tcp_statistics(&self) -> Option<crate::sys::socket::TcpStatistics> {
        match self {
            Self::H2(client) => client.tcp_statistics(),
        }
    }
}

/// The server end of a tunnel. It moves bytes only while [`TunnelServer::accept`] is awaited.
#[derive(Debug)]
pub enum TunnelServer<T> {
    /// By the `h2` crate.
    H2(Box<h2::Server<T>>),
}

impl<T: AsyncRead + AsyncWrite + Unpin> TunnelServer<T> {
    /// Sends our settings and reads the client's preface, within [`TimeLimits::first_frame`].
    ///
    /// [`TimeLimits::first_frame`]: super::limits::TimeLimits::first_frame
    ///
    /// # Errors
    /// When the client does not speak HTTP/2, or says nothing.
    pub async fn handshake(
        codec: TunnelCodec,
        io: T,
        limits: &Limits,
    ) -> Result<Self, TunnelError> {
        let handshake = async {
            match codec {
                TunnelCodec::H2 => h2::Server::handshake(io, limits)
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
            Self::H2(server) => server.accept().await,
        }
    }

    /// From now on grants streams the window that `window` says, open streams included.
    pub fn follow_window(&mut self, window: StreamWindow) {
        match self {
            Self::H2(server) => server.follow_window(window),
        }
    }

    /// Asks the client to open no more streams (GOAWAY); those that are open go on.
    pub fn shut_down(&mut self) {
        match self {
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
    H2(h2::Responder),
}

impl Incoming {
    fn h2(request: http::request::Parts, respond: h2::Responder) -> Self {
        Self {
            request,
            respond: Responder::H2(respond),
        }
    }

    /// Answers with an error and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        match self.respond {
            Responder::H2(respond) => respond.refuse(status),
        }
    }

    /// Resets the stream as one that was not looked at (REFUSED_STREAM, RFC 9113 section 8.7): the client may try it on
    /// another tunnel or elsewhere.
    pub fn turn_away(self) {
        match self.respond {
            Responder::H2(respond) => respond.turn_away(),
        }
    }

    /// Answers 200.
    ///
    /// # Errors
    /// When the stream is gone already.
    pub fn accept(self, headers: HeaderMap) -> Result<TunnelStream, StreamError> {
        match self.respond {
            Responder::H2(respond) => respond.accept(headers),
        }
    }

    /// Waits until the client gives the request up.
    pub async fn abandoned(&mut self) {
        match &mut self.respond {
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
    /// By the `h2` crate.
    H2(h2::Send),
}

impl TunnelSend {
    /// How many bytes may be sent now, at most `wanted`; pending while the peer's windows are closed. Bytes that are
    /// ready to be sent but are not must be given back with [`TunnelSend::release`].
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone.
    pub fn poll_room(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, StreamError>> {
        match self {
            Self::H2(send) => send.poll_room(cx, wanted),
        }
    }

    /// Gives back room that will not be used now, so that neighbours may use it.
    pub fn release(&mut self) {
        match self {
            Self::H2(send) => send.release(),
        }
    }

    /// Sends bytes, no more than there was room for.
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone.
    pub fn send(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        match self {
            Self::H2(send) => send.send(bytes),
        }
    }

    /// Ends this direction (END_STREAM).
    ///
    /// # Errors
    /// When the stream was reset or the tunnel is gone.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        match self {
            Self::H2(send) => send.finish(),
        }
    }

    /// Ends both directions at once, unsent bytes dropped (RST_STREAM, CANCEL).
    pub fn reset(&mut self) {
        match self {
            Self::H2(send) => send.reset(),
        }
    }

    /// Ready when no sent bytes wait in the tunnel any more, or never will again.
    pub fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::H2(send) => send.poll_flushed(cx),
        }
    }

    /// Ready when the peer reset the stream or the tunnel is gone.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match self {
            Self::H2(send) => send.poll_reset(cx),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub enum TunnelReceive {
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
            Self::H2(receive) => receive.poll_data(cx),
        }
    }

    /// Opens the window again by `bytes` that were passed on.
    pub fn consumed(&mut self, bytes: usize) {
        match self {
            Self::H2(receive) => receive.consumed(bytes),
        }
    }
}

#[cfg(test)]
mod tests;
