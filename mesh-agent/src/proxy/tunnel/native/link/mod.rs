//! One tunnel: its HTTP/2 state, its channel, and everybody who waits for something of it. Shared by the tunnel's own
//! task and its streams, all on one thread.
//!
//! The task reads; whoever has bytes to send seals and writes them itself, with the task's waker, so that a blocked
//! socket wakes the task and nobody else. Received bytes go from the task straight to the application's socket while
//! that takes them; what it does not take waits in the stream's queue for the relay.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, IoSlice},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use http::{HeaderMap, StatusCode, request::Parts};
use tokio::time::Instant;

use super::{
    super::{DirectSink, StreamWindow},
    channel::{Channel, ChannelError, Received},
    connection::{Connection, ConnectionError, Event, Role},
    handshake::Session,
};
use crate::proxy::limits::CROWD_WINDOW;

mod streams;

/// Reads of the tunnel before other tasks have their turn: up to 2 MiB.
const TURN: usize = 8;
/// Slices of one stream's DATA that are written at once.
const SLICES_MAX: usize = 64;
/// Smallest piece of a stream's queue: tiny frames share one.
const QUEUE_PIECE_BYTES: usize = 4 << 10;

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// TCP or TLS.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// HTTP/2.
    #[error(transparent)]
    Protocol(#[from] ConnectionError),
}

/// Status and headers of an answer.
pub type Answer = (StatusCode, HeaderMap);

/// A stream's user: its two halves, or the request that waits for an answer.
#[derive(Default)]
pub struct Ends {
    handles: u8,
    sender: Option<Waker>,
    receiver: Option<Waker>,
    answer: Option<Box<Answer>>,
    /// Received and not yet handed over; bounded by the stream's window.
    queue: VecDeque<Vec<u8>>,
    sink: Option<Rc<dyn DirectSink>>,
    sink_failed: bool,
    /// Waits in [`Core::room`].
    waits: bool,
}

impl Ends {
    fn wake(&mut self) {
        for waker in [self.sender.take(), self.receiver.take()] {
            wake(waker);
        }
    }

    fn push(&mut self, slices: &[IoSlice<'_>], mut skip: usize) {
        for slice in slices {
            let bytes = slice.get(skip.min(slice.len())..).unwrap_or_default();
            skip = skip.saturating_sub(slice.len());
            match self.queue.back_mut() {
                Some(last) if last.capacity() - last.len() >= bytes.len() => {
                    last.extend_from_slice(bytes);
                }
                _ => {
                    let mut piece = Vec::with_capacity(bytes.len().max(QUEUE_PIECE_BYTES));
                    piece.extend_from_slice(bytes);
                    self.queue.push_back(piece);
                }
            }
        }
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Remembers who waits.
fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *slot = Some(cx.waker().clone()),
    }
}

/// DATA of one stream in a row.
#[derive(Default)]
struct Run<'a> {
    stream: u32,
    slices: Vec<IoSlice<'a>>,
    bytes: usize,
}

/// Whether several streams send these days: their small frames then share records and writes.
struct Crowd {
    last: (u32, Instant),
    until: Instant,
}

impl Crowd {
    /// Notes a send; says whether it should wait for others.
    fn note(&mut self, stream: u32, now: Instant) -> bool {
        if self.last.0 != stream && now < self.last.1 + CROWD_WINDOW {
            self.until = now + CROWD_WINDOW;
        }
        self.last = (stream, now);
        now < self.until
    }
}

/// The shared part of a tunnel.
pub struct Link(RefCell<Core>);

/// What [`Link`] guards.
pub struct Core {
    http: Connection<Ends>,
    channel: Channel,
    /// Plaintext that came with the handshake.
    first: Vec<u8>,
    task: Option<Waker>,
    /// Streams that wait for a place in the staging or for the connection's window, oldest first.
    room: VecDeque<u32>,
    /// Who waits until everything is written.
    flushed: Vec<Waker>,
    /// Who waits for a stream more to be allowed.
    openers: VecDeque<Waker>,
    requests: VecDeque<(u32, Box<Parts>)>,
    crowd: Crowd,
    ponged: bool,
    /// Client handles; always one for a server.
    users: usize,
    ended: bool,
    /// Which window streams shall have; none: the default.
    window: Option<StreamWindow>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

impl Link {
    /// A tunnel over a finished handshake.
    pub fn new(role: Role, session: Session) -> Rc<Self> {
        let now = Instant::now();
        Rc::new(Self(RefCell::new(Core {
            http: Connection::new(role),
            channel: Channel::new(session.socket, session.records, session.held),
            first: session.plain,
            task: None,
            room: VecDeque::new(),
            flushed: Vec::new(),
            openers: VecDeque::new(),
            requests: VecDeque::new(),
            crowd: Crowd {
                last: (0, now),
                until: now,
            },
            ponged: false,
            users: 1,
            ended: false,
            window: None,
        })))
    }

    /// Runs `f` on the shared state. Nothing in there calls back.
    pub fn with<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        f(&mut self.0.borrow_mut())
    }

    /// Like [`Link::with`], for destructors, which may run while a panic unwinds through a borrow.
    pub fn try_with(&self, f: impl FnOnce(&mut Core)) {
        if let Ok(mut core) = self.0.try_borrow_mut() {
            f(&mut core);
        }
    }
}

impl Core {
    /// Moves bytes: the task's turn. Ready when the tunnel is over.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        register(&mut self.task, cx);
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        if let Some(window) = &self.window {
            self.http.set_window(window());
        }
        let first = std::mem::take(&mut self.first);
        if let Err(error) = self.digest(&first) {
            return Poll::Ready(self.fail(cx, error.into()));
        }
        self.flush();
        for _ in 0..TURN {
            let received = match self.channel.poll_receive(cx) {
                Poll::Ready(Ok(received)) => received,
                Poll::Ready(Err(_)) if self.ended => return Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => return Poll::Ready(self.fail(cx, error.into())),
                Poll::Pending => return self.poll_unused(cx),
            };
            let (plain, last) = match received {
                Received::Plain(plain) => (plain, false),
                Received::Last(plain) => (plain, true),
            };
            if let Err(error) = self.digest(plain.filled()) {
                return Poll::Ready(self.fail(cx, error.into()));
            }
            if last {
                self.close(cx);
                return Poll::Ready(Ok(()));
            }
            self.flush();
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// From now on grants streams the window that `window` says.
    pub fn follow_window(&mut self, window: StreamWindow) {
        self.window = Some(window);
    }

    /// Closes when nobody can use the tunnel any more.
    fn poll_unused(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        let unused = self.http.is_unused() && (self.users == 0 || self.http.is_leaving());
        if !unused {
            return Poll::Pending;
        }
        self.http.leave();
        self.flush();
        if !self.is_flushed() && !self.ended {
            return Poll::Pending;
        }
        self.close(cx);
        Poll::Ready(Ok(()))
    }

    fn is_flushed(&mut self) -> bool {
        self.channel.is_flushed() && self.http.control().is_empty()
    }

    /// Ends with an error; GOAWAY or an alert is queued already and is sent if the kernel takes it.
    fn fail(&mut self, cx: &mut Context<'_>, error: LinkError) -> Result<(), LinkError> {
        self.close(cx);
        Err(error)
    }

    fn close(&mut self, cx: &mut Context<'_>) {
        self.channel.close(cx, self.http.control());
        self.end();
    }

    /// The tunnel is gone: everybody learns it.
    pub fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.channel.abandon();
        self.requests.clear();
        self.room.clear();
        for ends in self.http.users() {
            ends.wake();
        }
        for waker in self.openers.drain(..).chain(self.flushed.drain(..)) {
            waker.wake();
        }
        wake(self.task.take());
    }

    /// Seals and writes what there is, as far as the kernel takes it.
    fn flush(&mut self) {
        let Some(waker) = self.task.clone() else {
            return;
        };
        let mut cx = Context::from_waker(&waker);
        match self.channel.poll_flush(&mut cx, self.http.control()) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => {
                for waker in self.flushed.drain(..) {
                    waker.wake();
                }
                self.pass_room();
            }
            Poll::Ready(Err(error)) => {
                tracing::debug!(%error, "tunnel cannot be written to");
                self.end();
            }
        }
    }

    /// Flushes now, or with what other streams are about to send.
    fn flush_soon(&mut self, stream: u32) {
        if self.crowd.note(stream, Instant::now()) {
            self.wake_task();
        } else {
            self.flush();
        }
    }

    /// Has the task look again.
    pub fn wake_task(&mut self) {
        if let Some(waker) = &self.task {
            waker.wake_by_ref();
        }
    }

    /// Wakes the stream that has waited longest, if there is something for it. Every stream that was woken passes on.
    fn pass_room(&mut self) {
        if self.room.is_empty()
            || !self.http.connection_sendable()
            || !self.channel.accepts(self.http.control(), false)
        {
            return;
        }
        while let Some(stream) = self.room.pop_front() {
            let Some(ends) = self.http.user(stream) else {
                continue;
            };
            ends.waits = false;
            if let Some(waker) = ends.sender.take() {
                waker.wake();
                return;
            }
        }
    }

    fn digest(&mut self, plain: &[u8]) -> Result<(), ConnectionError> {
        let (mut input, mut run) = (plain, Run::default());
        let now = Instant::now().into_std();
        loop {
            let event = self.http.receive(&mut input, now);
            match event {
                Ok(Some(Event::Data { stream, bytes })) => {
                    if run.stream != stream || run.slices.len() >= SLICES_MAX {
                        self.deliver(&mut run);
                    }
                    run.stream = stream;
                    run.bytes += bytes.len();
                    run.slices.push(IoSlice::new(bytes));
                }
                Ok(Some(event)) => {
                    self.deliver(&mut run);
                    self.note(event);
                }
                Ok(None) => {
                    self.deliver(&mut run);
                    return Ok(());
                }
                Err(error) => {
                    self.deliver(&mut run);
                    return Err(error);
                }
            }
        }
    }

    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Request { stream, request } => self.requests.push_back((stream, request)),
            Event::Response {
                stream,
                status,
                headers,
            } => {
                if let Some(ends) = self.http.user(stream) {
                    ends.answer = Some(Box::new((status, headers)));
                    ends.wake();
                }
            }
            Event::End { stream } | Event::Reset { stream } => {
                if let Some(ends) = self.http.user(stream) {
                    ends.wake();
                }
                self.pass_place();
            }
            Event::StreamCredit { stream } => {
                if let Some(ends) = self.http.user(stream) {
                    wake(ends.sender.take());
                }
            }
            Event::Credit => {
                for ends in self.http.users().filter(|ends| !ends.waits) {
                    wake(ends.sender.take());
                }
                self.pass_room();
                self.pass_place();
            }
            Event::GoAway => {
                for ends in self.http.users() {
                    ends.wake();
                }
                for waker in self.openers.drain(..) {
                    waker.wake();
                }
            }
            Event::Pong => self.ponged = true,
            Event::Data { .. } => {}
        }
    }

    /// Gives received bytes to the application, or to the stream's queue. Directly only if nothing is before them.
    fn deliver(&mut self, run: &mut Run<'_>) {
        let total = std::mem::take(&mut run.bytes);
        if total == 0 {
            return;
        }
        let direct = self.http.undelivered(run.stream) == total;
        let mut written = 0;
        if let Some(ends) = self.http.user(run.stream) {
            let sink = ends.sink.as_ref().filter(|_| direct && !ends.sink_failed);
            match sink.map(|sink| sink.write(&run.slices)) {
                Some(Ok(count)) => written = count,
                Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    ends.sink_failed = true;
                }
                Some(Err(_)) | None => {}
            }
            if written < total {
                ends.push(&run.slices, written);
                wake(ends.receiver.take());
            }
        }
        run.slices.clear();
        if written > 0 {
            self.http.consumed(run.stream, written);
        }
    }
}
