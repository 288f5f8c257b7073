//! Tunnels by our own codec: HTTP/2 for exactly CONNECT, straight on rustls's records.
//!
//! `frame`, `hpack` and `connection` know no I/O, `records` is TLS without I/O, `channel` has socket and buffers, `link`
//! joins them and is shared by a tunnel's task and its streams. One DATA frame fills one TLS record, so 16 KiB frames
//! cost nothing extra; a read of the application goes into the frame's place in the buffer that is sealed; small frames
//! of several streams share records and writes.

use std::{
    future::{Future, poll_fn},
    io::{self, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::{Instant, Sleep, sleep};

use super::{
    ConnectRequest, DirectSink, Incoming, StreamError, StreamWindow, TunnelError, TunnelReceive,
    TunnelSend, TunnelStream,
};
use crate::{
    proxy::{buffers::Size, fair, limits::Limits},
    sys::socket::{TcpStatistics, tcp_statistics, unanswered_for},
};

mod channel;
pub mod connection;
pub mod frame;
mod handshake;
pub mod hpack;
mod link;
mod records;

use connection::Role;
use frame::Code;
pub use handshake::Session;
use link::{Link, LinkError};

/// A stream that the peer reset while it was being opened.
#[derive(Debug, thiserror::Error)]
#[error("the peer reset the stream ({0})")]
struct ResetWith(Code);

/// A tunnel that ended while a stream was being opened.
#[derive(Debug, thiserror::Error)]
#[error("the tunnel ended")]
struct Ended;

/// The client end.
#[derive(Debug)]
pub struct Client {
    link: Rc<Link>,
    socket: Option<Rc<OwnedFd>>,
    /// Streams until the peer has told how many it takes.
    assumed: usize,
}

impl Clone for Client {
    fn clone(&self) -> Self {
        self.link.with(|core| core.count_users(true));
        Self {
            link: self.link.clone(),
            socket: self.socket.clone(),
            assumed: self.assumed,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.link.try_with(|core| core.count_users(false));
    }
}

impl Client {
    pub(super) fn start(session: Session, limits: &Limits, socket: Option<Rc<OwnedFd>>) -> Self {
        let link = Link::new(Role::Client, session);
        let guard = Closes(link.clone());
        let mut keepalive = Keepalive::new(limits);
        fair::spawn_local(async move {
            let ended = poll_fn(|cx| poll_link(&guard.0, &mut keepalive, cx)).await;
            if let Err(error) = ended {
                tracing::debug!(%error, "tunnel ended");
            }
        });
        Self {
            link,
            socket,
            assumed: limits.tunnel.client_streams,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.link.with(|core| core.is_open())
    }

    pub(super) fn peer_streams(&self) -> usize {
        self.link
            .with(|core| core.peer_streams().unwrap_or(self.assumed))
    }

    pub(super) fn follow_window(&self, window: StreamWindow) {
        self.link.with(|core| core.follow_window(window));
    }

    pub(super) fn unanswered_for(&self) -> Duration {
        let socket = self.socket.as_ref();
        socket
            .and_then(|socket| unanswered_for(socket.as_fd()).ok())
            .unwrap_or_default()
    }

    pub(super) fn tcp_statistics(&self) -> Option<TcpStatistics> {
        tcp_statistics(self.socket.as_ref()?.as_fd()).ok()
    }

    /// Lets a test change the keys under running streams.
    #[cfg(test)]
    pub(super) fn refresh_keys(&self) {
        self.link.with(link::Core::refresh_keys);
    }

    pub(super) async fn open(
        &self,
        request: ConnectRequest,
    ) -> Result<(TunnelStream, HeaderMap), TunnelError> {
        poll_fn(|cx| self.link.with(|core| core.poll_place(cx, self.assumed))).await;
        let stream = self
            .link
            .with(|core| core.open(&request))
            .ok_or(TunnelError::NotTaken)?;
        let handle = Handle {
            link: self.link.clone(),
            stream,
        };
        drop(request);
        match poll_fn(|cx| self.link.with(|core| core.poll_answer(cx, stream))).await {
            Ok((StatusCode::OK, headers)) => Ok((handle.into_stream(), headers)),
            Ok((status, _)) => Err(TunnelError::Refused(status)),
            // RFC 9113 sections 6.8 and 8.7: it was not processed.
            Err(Some(Code::REFUSED_STREAM)) => Err(TunnelError::NotTaken),
            Err(Some(code)) => Err(TunnelError::Protocol(Arc::new(ResetWith(code)))),
            Err(None) => Err(TunnelError::Protocol(Arc::new(Ended))),
        }
    }
}

/// Ends a tunnel when its task ends, however it ends.
#[derive(Debug)]
struct Closes(Rc<Link>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.try_with(link::Core::end);
    }
}

/// Moves a tunnel's bytes; ready when it is over.
fn poll_link(
    link: &Link,
    keepalive: &mut Keepalive,
    cx: &mut Context<'_>,
) -> Poll<Result<(), TunnelError>> {
    link.with(|core| {
        if let Poll::Ready(ended) = core.poll(cx) {
            return Poll::Ready(ended.map_err(protocol));
        }
        keepalive.poll(core, cx).map(|()| {
            core.end();
            Err(TunnelError::TimedOut("answer PING"))
        })
    })
}

fn protocol(error: LinkError) -> TunnelError {
    match error {
        LinkError::Protocol(excess) if excess.code == Code::ENHANCE_YOUR_CALM => {
            TunnelError::Abuse(Arc::new(excess))
        }
        other => TunnelError::Protocol(Arc::new(other)),
    }
}

/// Asks the peer for an answer now and then.
struct Keepalive {
    timer: Pin<Box<Sleep>>,
    asked: bool,
    interval: Duration,
    patience: Duration,
}

impl std::fmt::Debug for Keepalive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keepalive")
    }
}

impl Keepalive {
    fn new(limits: &Limits) -> Self {
        let interval = limits.time.ping_interval;
        Self {
            timer: Box::pin(sleep(interval)),
            asked: false,
            interval,
            patience: limits.time.ping_timeout,
        }
    }

    /// Ready when the peer no longer answers.
    fn poll(&mut self, core: &mut link::Core, cx: &mut Context<'_>) -> Poll<()> {
        if core.take_pong() && self.asked {
            self.asked = false;
            self.timer.as_mut().reset(Instant::now() + self.interval);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.asked {
                return Poll::Ready(());
            }
            self.asked = true;
            core.ping();
            self.timer.as_mut().reset(Instant::now() + self.patience);
        }
        Poll::Pending
    }
}

/// The server end.
#[derive(Debug)]
pub struct Server {
    link: Closes,
    keepalive: Keepalive,
    over: bool,
}

impl Server {
    pub(super) async fn handshake(session: Session, limits: &Limits) -> Result<Self, TunnelError> {
        let role = Role::Server {
            streams: limits.tunnel.server_streams,
        };
        let mut server = Self {
            link: Closes(Link::new(role, session)),
            keepalive: Keepalive::new(limits),
            over: false,
        };
        poll_fn(|cx| server.poll_greeted(cx)).await?;
        Ok(server)
    }

    fn poll_greeted(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        if let Poll::Ready(ended) = poll_link(&self.link.0, &mut self.keepalive, cx) {
            self.over = true;
            ended?;
        }
        if self.over || self.link.0.with(|core| core.greeted()) {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    pub(super) async fn accept(&mut self) -> Option<Result<Incoming, TunnelError>> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, TunnelError>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(ended) = poll_link(&self.link.0, &mut self.keepalive, cx) {
            self.over = true;
            return Poll::Ready(ended.err().map(Err));
        }
        let Some((stream, request)) = self.link.0.with(link::Core::next_request) else {
            return Poll::Pending;
        };
        let link = self.link.0.clone();
        let responder = Responder(Handle { link, stream });
        Poll::Ready(Some(Ok(Incoming::native(*request, responder))))
    }

    pub(super) fn follow_window(&mut self, window: StreamWindow) {
        self.link.0.with(|core| core.follow_window(window));
    }

    pub(super) fn shut_down(&mut self) {
        self.link.0.with(link::Core::leave);
    }
}

/// The right to a stream; the last one takes it along.
#[derive(Debug)]
struct Handle {
    link: Rc<Link>,
    stream: u32,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.link.try_with(|core| core.drop_handle(self.stream));
    }
}

impl Handle {
    fn into_stream(self) -> TunnelStream {
        self.link.with(|core| core.add_handle(self.stream));
        let receive = Self {
            link: self.link.clone(),
            stream: self.stream,
        };
        TunnelStream {
            send: TunnelSend::Native(Send(self)),
            receive: TunnelReceive::Native(Receive(receive)),
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut link::Core, u32) -> R) -> R {
        self.link.with(|core| f(core, self.stream))
    }
}

/// What answers one request.
#[derive(Debug)]
pub struct Responder(Handle);

impl Responder {
    pub(super) fn refuse(self, status: StatusCode) {
        let headers = HeaderMap::new();
        self.0
            .with(|core, stream| core.respond(stream, status, &headers, true));
    }

    pub(super) fn turn_away(self) {
        self.0
            .with(|core, stream| core.reset_with(stream, Code::REFUSED_STREAM));
    }

    pub(super) fn accept(self, headers: &HeaderMap) -> Result<TunnelStream, StreamError> {
        let there = self
            .0
            .with(|core, stream| core.respond(stream, StatusCode::OK, headers, false));
        if there {
            Ok(self.0.into_stream())
        } else {
            Err(StreamError::Reset)
        }
    }

    pub(super) async fn abandoned(&mut self) {
        poll_fn(|cx| self.0.with(|core, stream| core.poll_reset(cx, stream))).await;
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Send(Handle);

impl Send {
    pub(super) fn poll_read_from(
        &mut self,
        cx: &mut Context<'_>,
        size: Size,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Poll<Result<io::Result<usize>, StreamError>> {
        self.0
            .with(|core, stream| core.poll_fill(cx, stream, size, read))
    }

    pub(super) fn finish(&mut self) -> Result<(), StreamError> {
        self.0.with(link::Core::finish)
    }

    pub(super) fn reset(&mut self) {
        self.0.with(link::Core::reset);
    }

    pub(super) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.link.with(|core| core.poll_flushed(cx))
    }

    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.0.with(|core, stream| core.poll_reset(cx, stream))
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receive(Handle);

impl Receive {
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        self.0.with(|core, stream| core.poll_data(cx, stream))
    }

    pub(super) fn consumed(&mut self, bytes: usize) {
        self.0.with(|core, stream| core.consumed(stream, bytes));
    }

    pub(super) fn attach(&mut self, sink: Rc<dyn DirectSink>) {
        self.0.with(|core, stream| core.attach(stream, Some(sink)));
    }

    pub(super) fn sink_failed(&self) -> bool {
        self.0.with(link::Core::sink_failed)
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        let stream = self.0.stream;
        self.0.link.try_with(|core| core.attach(stream, None));
    }
}
