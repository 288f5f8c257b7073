//! Moves bytes between an application's socket and the other side, a tunnel stream or a socket, and keeps TCP's
//! truth: FIN stays FIN, RST stays RST, a half-closed connection works, a slow reader slows the writer down, and
//! nothing that was sent before a FIN is lost.
//!
//! *Near* is the local application's socket, *far* the other side. Each direction is a small state machine polled by
//! hand, so that an idle connection holds no buffer and no boxed future.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io::{self, IoSliceMut, Read},
    net::Shutdown,
    os::fd::AsFd,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Sleep, sleep, timeout},
};

use super::{fair, registry::CloseSignal};
use crate::{
    sys::socket::{set_finish_on_close, set_reset_on_close, unacknowledged_bytes},
    telemetry::CloseReason,
};

mod tcp;
mod tunnel;

pub use tcp::relay_tcp;
pub use tunnel::relay_tunnel;

/// Reads, or writes, of one direction before the other has its turn and other connections have theirs: with large
/// buffers 2 MiB.
const TURN: usize = 8;
/// The same while other workloads are active: a message still goes through in one.
const SHARED_TURN: usize = 2;

/// How long bytes before a FIN may take to be acknowledged, and bytes before a reset to be taken, before the reset
/// follows: more than delayed acknowledgements (40 ms) and a few round trips.
const DELIVERY_WAIT: Duration = Duration::from_secs(1);
/// How often that is looked at; the kernel has no event for it.
const DELIVERY_POLL: Duration = Duration::from_millis(10);

/// Counts bytes that were passed on.
pub trait Meter {
    /// From the application to the other side.
    fn near_to_far(&self, bytes: usize);
    /// From the other side to the application.
    fn far_to_near(&self, bytes: usize);
    /// Says whether what the application sent waits for the other side (`up`), and the other way round (`down`). Called
    /// when that changes.
    fn waits(&self, up: bool, down: bool);
    /// No more will be; `far` is the other side where that is a socket, open still for measurements.
    fn ended(&self, far: Option<&TcpStream>);
}

/// How a relayed connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both directions ended with FIN.
    Finished,
    /// The application reset it.
    NearReset,
    /// The other side reset it, or the tunnel is gone.
    FarReset,
    /// Half-closed and silent for too long.
    TimedOut,
    /// Told to end.
    Closed(CloseReason),
}

/// Which side broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Near,
    Far,
}

/// One direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Open,
    /// FIN was passed on.
    Finished,
    /// It broke; the other direction may still have bytes that came before.
    Broken(Fault),
}

impl Flow {
    fn settle(outcome: Result<(), Fault>) -> Self {
        match outcome {
            Ok(()) => Self::Finished,
            Err(fault) => Self::Broken(fault),
        }
    }
}

/// Both directions of a connection, as the loop below drives them.
trait Directions {
    /// Application to other side; ready when FIN was passed on or it broke.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;
    /// Other side to application; ready when FIN was passed on or it broke.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;
    /// Ready when the other side reset a tunnel's stream, also while nothing is read from it.
    fn poll_far_reset(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// What the application sent waits for the other side, so nothing more is read from the application.
    fn up_waits(&self) -> bool;
    /// What the other side sent waits for the application, so nothing more is read from the other side.
    fn down_waits(&self) -> bool;
    /// Tells the meter which directions wait.
    fn note_waits(&self, up: bool, down: bool);
    /// From now on only what the application had sent already is passed on.
    fn near_is_gone(&mut self);
    /// Bytes passed on since the beginning; only its changes matter.
    fn moved(&self) -> &Cell<u64>;
}

/// Where the two directions stand.
struct Drive<D> {
    directions: D,
    up: Flow,
    down: Flow,
    down_first: bool,
    /// Which directions waited when last told.
    waited: (bool, bool),
}

impl<D: Directions> Drive<D> {
    fn new(directions: D) -> Self {
        Self {
            directions,
            up: Flow::Open,
            down: Flow::Open,
            down_first: false,
            waited: (false, false),
        }
    }

    /// Runs both directions. Ready with the end, or with `None` when `until_half` and one of them has finished.
    fn poll(&mut self, cx: &mut Context<'_>, until_half: bool) -> Poll<Option<End>> {
        // The one that went first may use up the task's budget, so they take turns.
        self.down_first = !self.down_first;
        if self.down_first {
            self.poll_down(cx);
            self.poll_up(cx);
        } else {
            self.poll_up(cx);
            self.poll_down(cx);
        }
        let waits = (self.directions.up_waits(), self.directions.down_waits());
        if waits != self.waited {
            self.waited = waits;
            self.directions.note_waits(waits.0, waits.1);
        }
        let end = match (self.up, self.down) {
            (Flow::Finished, Flow::Finished) => Some(End::Finished),
            (Flow::Broken(Fault::Near), _) => Some(End::NearReset),
            (_, Flow::Broken(Fault::Far)) => Some(End::FarReset),
            (Flow::Broken(Fault::Far), Flow::Finished) => Some(End::FarReset),
            (Flow::Finished, Flow::Broken(Fault::Near)) => Some(End::NearReset),
            (Flow::Broken(Fault::Far), Flow::Broken(Fault::Near)) => Some(End::NearReset),
            // Bytes that came before the break are still on their way.
            (Flow::Open, _) | (_, Flow::Open) => None,
        };
        let half = until_half && (self.up != Flow::Open || self.down != Flow::Open);
        match end {
            Some(end) => Poll::Ready(Some(end)),
            None if half => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) {
        if self.up != Flow::Open {
            return;
        }
        if let Poll::Ready(outcome) = self.directions.poll_up(cx) {
            self.up = Flow::settle(outcome);
        } else if self.down == Flow::Finished && self.directions.poll_far_reset(cx).is_ready() {
            self.up = Flow::Broken(Fault::Far);
        } else if self.down == Flow::Broken(Fault::Near) {
            // The application is gone and the other side takes no more.
            self.up = Flow::Broken(Fault::Near);
        }
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) {
        if self.down != Flow::Open {
            return;
        }
        if let Poll::Ready(outcome) = self.directions.poll_down(cx) {
            self.down = Flow::settle(outcome);
            if self.down == Flow::Broken(Fault::Near) {
                self.directions.near_is_gone();
                cx.waker().wake_by_ref();
            }
        }
    }
}

/// Waits for a socket's reset once asked to; boxed, so that a connection that never has to is small.
struct Reset<'a> {
    socket: &'a TcpStream,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + 'a>>>,
    seen: bool,
}

impl<'a> Reset<'a> {
    const fn of(socket: &'a TcpStream) -> Self {
        Self {
            socket,
            waiting: None,
            seen: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.seen {
            let waiting = self
                .waiting
                .get_or_insert_with(|| Box::pin(broken(self.socket)));
            self.seen = waiting.as_mut().poll(cx).is_ready();
        }
        self.seen
    }
}

/// Notices the reset of a side that nothing is read from: because its direction has finished, or because what it sent
/// before waits for the other side, which may be forever.
struct Watch<'a> {
    near: Reset<'a>,
    far: Option<Reset<'a>>,
    /// What had been passed on when the wait began, and its end.
    patience: Option<(u64, Pin<Box<Sleep>>)>,
}

impl Watch<'_> {
    fn poll<D: Directions>(&mut self, cx: &mut Context<'_>, drive: &mut Drive<D>) -> Poll<End> {
        let (up_done, down_done) = (drive.up == Flow::Finished, drive.down == Flow::Finished);
        let up_waits = drive.up == Flow::Open && drive.directions.up_waits();
        let down_waits = drive.down == Flow::Open && drive.directions.down_waits();
        let near_broken = (up_done || up_waits) && self.near.poll(cx);
        let far_broken =
            (down_done || down_waits) && self.far.as_mut().is_some_and(|far| far.poll(cx));
        if near_broken && up_done {
            return Poll::Ready(End::NearReset);
        }
        if far_broken && down_done {
            return Poll::Ready(End::FarReset);
        }
        if near_broken && up_waits {
            return self.poll_patience(cx, drive, End::NearReset);
        }
        if down_waits && (far_broken || drive.directions.poll_far_reset(cx).is_ready()) {
            return self.poll_patience(cx, drive, End::FarReset);
        }
        self.patience = None;
        Poll::Pending
    }

    /// Ready with `end` once nothing has been passed on for [`DELIVERY_WAIT`]: what came before the reset goes first,
    /// unless nobody takes it.
    fn poll_patience<D: Directions>(
        &mut self,
        cx: &mut Context<'_>,
        drive: &Drive<D>,
        end: End,
    ) -> Poll<End> {
        loop {
            let moved = drive.directions.moved().get();
            match &mut self.patience {
                Some((seen, wait)) if *seen == moved => {
                    return wait.as_mut().poll(cx).map(|()| end);
                }
                patience => *patience = Some((moved, Box::pin(sleep(DELIVERY_WAIT)))),
            }
        }
    }
}

/// Drives both directions to the end.
async fn drive<D: Directions>(
    near: &TcpStream,
    far: Option<&TcpStream>,
    drive: &mut Drive<D>,
    close: &CloseSignal,
    half_close_idle: Duration,
) -> End {
    let mut watch = Watch {
        near: Reset::of(near),
        far: far.map(Reset::of),
        patience: None,
    };
    let first = poll_fn(|cx| {
        if let Poll::Ready(reason) = close.poll(cx) {
            return Poll::Ready(Some(End::Closed(reason)));
        }
        if let Poll::Ready(end) = drive.poll(cx, true) {
            return Poll::Ready(end);
        }
        watch.poll(cx, drive).map(Some)
    });
    if let Some(end) = first.await {
        return end;
    }
    let mut seen = drive.directions.moved().get();
    let mut idle = pin!(sleep(half_close_idle));
    poll_fn(|cx| {
        if let Poll::Ready(reason) = close.poll(cx) {
            return Poll::Ready(End::Closed(reason));
        }
        if let Poll::Ready(Some(end)) = drive.poll(cx, false) {
            return Poll::Ready(end);
        }
        if let Poll::Ready(end) = watch.poll(cx, drive) {
            return Poll::Ready(end);
        }
        while idle.as_mut().poll(cx).is_ready() {
            let moved = drive.directions.moved().get();
            if moved == seen {
                return Poll::Ready(End::TimedOut);
            }
            seen = moved;
            idle.set(sleep(half_close_idle));
        }
        Poll::Pending
    })
    .await
}

/// Waits until a socket has an error, which is how RST shows when nobody reads or writes.
pub async fn broken(socket: &TcpStream) {
    loop {
        match socket.ready(Interest::ERROR).await {
            Ok(ready) if ready.is_error() => return,
            Ok(_) => tokio::task::yield_now().await,
            Err(_) => return,
        }
    }
}

/// Makes every end but [`close`] an RST: also that of a process that is killed, which would else look complete.
pub fn guard(socket: &TcpStream) {
    if let Err(error) = set_reset_on_close(socket.as_fd()) {
        tracing::debug!(%error, "cannot make the socket end with RST");
    }
}

/// Closes a socket with RST, so that its peer does not take the end for a clean one.
pub fn reset(socket: TcpStream) {
    guard(&socket);
    drop(socket);
}

/// Closes a guarded socket so that everything written before arrives.
fn close(socket: TcpStream) {
    if let Err(error) = set_finish_on_close(socket.as_fd()) {
        tracing::debug!(%error, "cannot make the socket end with FIN");
    }
    drop(socket);
}

/// Closes a socket that has had its FIN, after its other side was reset. RST would destroy bytes before the FIN that
/// are still on their way, so it waits for them a little; then the close is a plain one, and the kernel answers
/// whatever comes later with RST.
async fn reset_after_fin(socket: TcpStream) {
    let delivered = async {
        // The FIN itself counts as one byte and need not have arrived.
        while unacknowledged_bytes(socket.as_fd()).is_ok_and(|bytes| bytes > 1) {
            sleep(DELIVERY_POLL).await;
        }
    };
    match timeout(DELIVERY_WAIT, delivered).await {
        Ok(()) => reset(socket),
        Err(_) => close(socket),
    }
}

/// One read. A read that does not fill `into` has emptied the socket: readiness is then cleared at once, which saves
/// the call that would only say so (epoll is edge triggered: newer bytes make a newer event).
fn read(socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    read_vectored(socket, &mut [IoSliceMut::new(into)])
}

/// [`read`] into several pieces.
fn read_vectored(socket: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let room: usize = into.iter().map(|piece| piece.len()).sum();
    let mut got = None;
    let result = socket.try_io(Interest::READABLE, || {
        let socket = SockRef::from(socket);
        let mut source = &*socket;
        // The vectored call is the dearer one.
        let read = match into {
            [piece] => source.read(piece)?,
            pieces => source.read_vectored(pieces)?,
        };
        got = Some(read);
        if read > 0 && read < room {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            Ok(read)
        }
    });
    match (result, got) {
        (_, Some(read)) => Ok(read),
        (result, None) => result,
    }
}

/// Passes FIN on. A socket that is gone already reports that elsewhere.
fn finish(socket: &TcpStream) {
    if let Err(error) = SockRef::from(socket).shutdown(Shutdown::Write) {
        tracing::trace!(%error, "socket was gone before its FIN");
    }
}

/// Whether an I/O error means "not now".
fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// How often a direction may read, or write, before others have their turn.
fn turn() -> usize {
    if fair::is_shared() { SHARED_TURN } else { TURN }
}

/// Lets other tasks run before this direction goes on.
fn turn_over<T>(cx: &Context<'_>) -> Poll<T> {
    cx.waker().wake_by_ref();
    Poll::Pending
}

#[cfg(test)]
mod tests;
