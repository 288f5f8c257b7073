//! Tunnels by the `h2` crate, set up as measured in the tunnel experiment: large frames, windows and buffers.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io::{self, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason, RecvStream, SendStream,
    client::{self, SendRequest},
    server::{self, SendResponse},
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};

use super::{
    ConnectRequest, Incoming, StreamError, TunnelError, TunnelReceive, TunnelSend, TunnelStream,
};
use crate::{
    proxy::{
        buffers::{Buffer, Size},
        fair,
        limits::{
            CLIENT_HEADER_LIST_BYTES, Limits, MAX_FRAME_BYTES, MAX_LOCAL_ERROR_RESETS,
            MAX_LOCAL_RESET_STREAMS, MAX_PENDING_RESET_STREAMS, SERVER_HEADER_LIST_BYTES,
            STREAM_SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES, TunnelLimits,
        },
    },
    sys::socket::{TcpStatistics, tcp_statistics, unanswered_for},
};

/// The client end.
#[derive(Debug, Clone)]
pub struct Client {
    requests: SendRequest<Bytes>,
    open: Rc<Cell<bool>>,
    socket: Option<Rc<OwnedFd>>,
}

impl Client {
    pub(super) async fn handshake<T>(
        io: T,
        limits: &Limits,
        socket: Option<Rc<OwnedFd>>,
    ) -> Result<Self, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let streams = u32::try_from(limits.tunnel.client_streams).unwrap_or(u32::MAX);
        let (requests, mut connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(TunnelLimits::connection_window(streams))
            .max_frame_size(MAX_FRAME_BYTES)
            .max_header_list_size(CLIENT_HEADER_LIST_BYTES)
            .max_send_buffer_size(STREAM_SEND_BUFFER_BYTES)
            .max_concurrent_reset_streams(MAX_LOCAL_RESET_STREAMS)
            .max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .initial_max_send_streams(limits.tunnel.client_streams)
            .enable_push(false)
            .handshake::<_, Bytes>(io)
            .await
            .map_err(protocol)?;
        let open = Rc::new(Cell::new(true));
        let keepalive = keepalive(
            connection.ping_pong(),
            limits.time.ping_interval,
            limits.time.ping_timeout,
        );
        let guard = Closes(open.clone());
        fair::spawn_local(async move {
            let _guard = guard;
            // Boxed: a tunnel's state is large, and tasks are moved when they are spawned.
            let mut keepalive = Box::pin(keepalive);
            tokio::select! {
                ended = &mut connection => if let Err(error) = ended {
                    tracing::debug!(%error, "tunnel ended");
                },
                () = &mut keepalive => tracing::debug!("tunnel's peer answers no PING"),
            }
        });
        Ok(Self {
            requests,
            open,
            socket,
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.get()
    }

    pub(super) fn peer_streams(&self) -> usize {
        self.requests.current_max_send_streams()
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

    pub(super) async fn open(
        &self,
        request: ConnectRequest,
    ) -> Result<(TunnelStream, HeaderMap), TunnelError> {
        let mut requests = self.requests.clone();
        if poll_fn(|cx| requests.poll_ready(cx)).await.is_err() {
            // GOAWAY or loss: nothing of ours has been sent.
            self.open.set(false);
            return Err(TunnelError::NotTaken);
        }
        let (response, send) = requests
            .send_request(connect_request(request)?, false)
            .map_err(|error| self.not_taken(error))?;
        let response = response.await.map_err(|error| self.not_taken(error))?;
        let (head, receive) = response.into_parts();
        if head.status != StatusCode::OK {
            return Err(TunnelError::Refused(head.status));
        }
        Ok((stream(send, receive), head.headers))
    }

    /// RFC 9113 sections 6.8 and 8.7: a stream above GOAWAY's last identifier, or refused, was not processed.
    fn not_taken(&self, error: h2::Error) -> TunnelError {
        if error.is_go_away() && error.reason() == Some(Reason::NO_ERROR) {
            self.open.set(false);
            return TunnelError::NotTaken;
        }
        if error.reason() == Some(Reason::REFUSED_STREAM) {
            return TunnelError::NotTaken;
        }
        protocol(error)
    }
}

/// Marks a tunnel as closed when its task ends, however it ends.
struct Closes(Rc<Cell<bool>>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// The server end.
#[derive(Debug)]
pub struct Server<T> {
    connection: server::Connection<T, Bytes>,
    ping: Keepalive,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Server<T> {
    pub(super) async fn handshake(io: T, limits: &Limits) -> Result<Self, TunnelError> {
        let streams = limits.tunnel.server_streams;
        let mut connection = server::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(TunnelLimits::connection_window(streams))
            .max_frame_size(MAX_FRAME_BYTES)
            .max_header_list_size(SERVER_HEADER_LIST_BYTES)
            .max_concurrent_streams(streams)
            .max_send_buffer_size(STREAM_SEND_BUFFER_BYTES)
            .max_concurrent_reset_streams(MAX_LOCAL_RESET_STREAMS)
            .max_pending_accept_reset_streams(MAX_PENDING_RESET_STREAMS)
            .max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .handshake(io)
            .await
            .map_err(protocol)?;
        let ping = Keepalive(Box::pin(keepalive(
            connection.ping_pong(),
            limits.time.ping_interval,
            limits.time.ping_timeout,
        )));
        Ok(Self { connection, ping })
    }

    pub(super) async fn accept(&mut self) -> Option<Result<Incoming, TunnelError>> {
        poll_fn(|cx| {
            if self.ping.0.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Some(Err(TunnelError::TimedOut("answer PING"))));
            }
            let Some(next) = ready!(self.connection.poll_accept(cx)) else {
                return Poll::Ready(None);
            };
            Poll::Ready(Some(next.map_err(protocol).map(|(request, respond)| {
                let (head, body) = request.into_parts();
                Incoming::h2(
                    head,
                    Responder {
                        respond,
                        receive: body,
                    },
                )
            })))
        })
        .await
    }

    pub(super) fn shut_down(&mut self) {
        self.connection.graceful_shutdown();
    }
}

struct Keepalive(std::pin::Pin<Box<dyn Future<Output = ()>>>);

impl std::fmt::Debug for Keepalive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keepalive")
    }
}

/// Ends when the peer no longer answers PING.
async fn keepalive(ping: Option<PingPong>, interval: Duration, patience: Duration) {
    let Some(mut ping) = ping else {
        return std::future::pending().await;
    };
    loop {
        sleep(interval).await;
        match timeout(patience, ping.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection's own task reports its end.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// What answers one request.
#[derive(Debug)]
pub struct Responder {
    respond: SendResponse<Bytes>,
    receive: RecvStream,
}

impl Responder {
    pub(super) fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        if let Err(error) = self.respond.send_response(response, true) {
            tracing::debug!(%error, "request was gone before its refusal");
        }
    }

    pub(super) fn turn_away(mut self) {
        self.respond.send_reset(Reason::REFUSED_STREAM);
    }

    pub(super) fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, StreamError> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false).map_err(lost)?;
        Ok(stream(send, self.receive))
    }

    pub(super) async fn abandoned(&mut self) {
        // Either way the client is no longer there.
        let _ = poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Send {
    stream: SendStream<Bytes>,
    reserved: bool,
}

impl Send {
    pub(super) fn poll_read_from(
        &mut self,
        cx: &mut Context<'_>,
        size: Size,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Poll<Result<io::Result<usize>, StreamError>> {
        let room = ready!(self.poll_room(cx, size.bytes()))?;
        let mut buffer = Buffer::take(size);
        let into = buffer.memory().get_mut(..room).unwrap_or_default();
        let got = read(&mut [IoSliceMut::new(into)]);
        if let Ok(count @ 1..) = got {
            buffer.set_filled(count);
            self.stream
                .send_data(buffer.freeze(), false)
                .map_err(lost)?;
        }
        Poll::Ready(Ok(got))
    }

    /// How many bytes may be sent now, at most `wanted`; pending while the peer's windows are closed.
    fn poll_room(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, StreamError>> {
        self.stream.reserve_capacity(wanted);
        self.reserved = true;
        loop {
            // `poll_capacity` reports growth only, so what is there already is asked for first.
            let room = self.stream.capacity().min(wanted);
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(lost(error))),
                None => return Poll::Ready(Err(StreamError::Reset)),
            }
        }
    }

    pub(super) fn release(&mut self) {
        if std::mem::take(&mut self.reserved) {
            self.stream.reserve_capacity(0);
        }
    }

    pub(super) fn finish(&mut self) -> Result<(), StreamError> {
        self.release();
        self.stream.send_data(Bytes::new(), true).map_err(lost)
    }

    pub(super) fn reset(&mut self) {
        self.stream.send_reset(Reason::CANCEL);
    }

    /// The crate tells how much may be buffered, not how much is: all of the buffer is free when nothing waits. A peer
    /// whose window is smaller than our buffer never gets there; the caller has a deadline.
    pub(super) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.reserve_capacity(STREAM_SEND_BUFFER_BYTES);
        while self.stream.capacity() < STREAM_SEND_BUFFER_BYTES {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => break,
            }
        }
        Poll::Ready(())
    }

    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ready!(self.stream.poll_reset(cx)) {
            Ok(_) => Poll::Ready(StreamError::Reset),
            Err(error) => Poll::Ready(lost(error)),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receive(RecvStream);

impl Receive {
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        match ready!(self.0.poll_data(cx)) {
            Some(Ok(bytes)) => Poll::Ready(Some(Ok(bytes))),
            Some(Err(error)) => Poll::Ready(Some(Err(lost(error)))),
            // The end of the data without END_STREAM is a reset that h2 does not report.
            None if self.0.is_end_stream() => Poll::Ready(None),
            None => Poll::Ready(Some(Err(StreamError::Reset))),
        }
    }

    pub(super) fn consumed(&mut self, bytes: usize) {
        // Fails only for a stream that is over, whose window matters to nobody.
        let _ = self.0.flow_control().release_capacity(bytes);
    }
}

fn stream(send: SendStream<Bytes>, receive: RecvStream) -> TunnelStream {
    TunnelStream {
        send: TunnelSend::H2(Send {
            stream: send,
            reserved: false,
        }),
        receive: TunnelReceive::H2(Receive(receive)),
    }
}

fn connect_request(request: ConnectRequest) -> Result<Request<()>, TunnelError> {
    let uri = Uri::builder()
        .authority(request.authority)
        .build()
        .map_err(|error| {
            TunnelError::Dial(Arc::new(io::Error::new(io::ErrorKind::InvalidInput, error)))
        })?;
    let mut connect = Request::new(());
    *connect.method_mut() = Method::CONNECT;
    *connect.uri_mut() = uri;
    *connect.headers_mut() = request.headers;
    Ok(connect)
}

fn protocol(error: h2::Error) -> TunnelError {
    // Said by this side, not by the peer.
    if error.is_library() && error.reason() == Some(Reason::ENHANCE_YOUR_CALM) {
        return TunnelError::Abuse(Arc::new(error));
    }
    TunnelError::Protocol(Arc::new(error))
}

fn lost(error: h2::Error) -> StreamError {
    if error.is_reset() {
        StreamError::Reset
    } else {
        StreamError::Lost
    }
}
