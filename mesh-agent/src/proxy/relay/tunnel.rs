//! Application socket and tunnel stream.

use std::{
    cell::Cell,
    future::poll_fn,
    io::{self, IoSlice},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Directions, Drive, End, Fault, Flow, Meter, close as close_socket, drive, finish, guard,
    read_vectored, reset, reset_after_fin, turn, turn_over, would_block,
};
use crate::proxy::{
    buffers::Size,
    registry::CloseSignal,
    tunnel::{DirectSink, TunnelReceive, TunnelSend, TunnelStream},
};

/// How long bytes that an application sent before its RST may wait in the tunnel: a busy TCP connection has written
/// them long before.
const FLUSH_WAIT: Duration = Duration::from_secs(1);

/// The application's socket, shared with the tunnel for as long as the relay lasts.
struct Near<M> {
    socket: TcpStream,
    meter: Rc<M>,
    /// Writes that passed something on; only its changes matter.
    moved: Cell<u64>,
}

impl<M: Meter> Near<M> {
    fn note_written(&self, count: usize) {
        self.meter.far_to_near(count);
        self.moved.set(self.moved.get().wrapping_add(1));
    }
}

impl<M: Meter> DirectSink for Near<M> {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = match slices {
            [piece] => self.socket.try_write(piece)?,
            pieces => self.socket.try_write_vectored(pieces)?,
        };
        self.note_written(count);
        Ok(count)
    }
}

struct TunnelDirections<'a, M> {
    near: &'a Near<M>,
    send: TunnelSend,
    receive: TunnelReceive,
    /// Size of the next read.
    size: Size,
    /// Received and not yet written.
    chunk: Bytes,
    near_gone: bool,
    /// The peer's window is closed.
    stalled: bool,
}

/// Moves bytes between an application and a tunnel until both directions have ended or one side broke, and closes
/// both accordingly.
pub async fn relay_tunnel<M: Meter + 'static>(
    near: TcpStream,
    mut stream: TunnelStream,
    meter: &Rc<M>,
    close: &CloseSignal,
    half_close_idle: Duration,
) -> End {
    guard(&near);
    let near = Rc::new(Near {
        socket: near,
        meter: meter.clone(),
        moved: Cell::new(0),
    });
    stream.receive.attach(near.clone());
    let directions = TunnelDirections {
        near: &near,
        send: stream.send,
        receive: stream.receive,
        size: Size::Small,
        chunk: Bytes::new(),
        near_gone: false,
        stalled: false,
    };
    let mut state = Drive::new(directions);
    let end = drive(&near.socket, None, &mut state, close, half_close_idle).await;
    meter.ended(None);
    let (up, down) = (state.up, state.down);
    let mut directions = state.directions;
    match end {
        // A server's END_STREAM is delivered before the reset that dropping the halves means (RFC 9113 section 8.1).
        End::Finished | End::FarReset => {}
        End::NearReset if up == Flow::Finished => {}
        End::NearReset => {
            // What the application sent before its RST goes first, unless the peer's window is closed.
            if !directions.stalled {
                let flushed = poll_fn(|cx| directions.send.poll_flushed(cx));
                let _ = timeout(FLUSH_WAIT, flushed).await;
            }
            directions.send.reset();
        }
        End::TimedOut | End::Closed(_) => directions.send.reset(),
    }
    drop(directions);
    // The tunnel has given it back with the receiving half.
    let Some(Near { socket: near, .. }) = Rc::into_inner(near) else {
        return end;
    };
    match end {
        End::Finished => close_socket(near),
        End::NearReset => drop(near),
        End::FarReset if down == Flow::Finished => reset_after_fin(near).await,
        End::FarReset | End::TimedOut | End::Closed(_) => reset(near),
    }
    end
}

impl<M: Meter> Directions for TunnelDirections<'_, M> {
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        // What a socket that is gone still holds is bounded by its receive buffer.
        let turn = if self.near_gone { usize::MAX } else { turn() };
        for _ in 0..turn {
            if !self.near_gone {
                match self.near.socket.poll_read_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Fault::Near)),
                    Poll::Pending => {
                        // Unused room would be taken from the neighbours.
                        self.send.release();
                        return Poll::Pending;
                    }
                }
            }
            self.stalled = true;
            let (near, mut room) = (&self.near.socket, 0);
            let got = self.send.poll_read_from(cx, self.size, |into| {
                room = into.iter().map(|piece| piece.len()).sum();
                read_vectored(near, into)
            });
            let Ok(got) = ready!(got) else {
                return Poll::Ready(Err(Fault::Far));
            };
            self.stalled = false;
            match got {
                // A write failed before, so this end is a reset, not a FIN.
                Ok(0) if self.near_gone => return Poll::Ready(Err(Fault::Near)),
                Ok(0) => return Poll::Ready(self.send.finish().map_err(|_| Fault::Far)),
                Ok(count) => {
                    self.size = self.size.after_read(count, room, Size::Large);
                    self.near.meter.near_to_far(count);
                    self.near.moved.set(self.near.moved.get().wrapping_add(1));
                }
                Err(error) if would_block(&error) && self.near_gone => {
                    return Poll::Ready(Err(Fault::Near));
                }
                Err(error) if would_block(&error) => {}
                Err(_) => return Poll::Ready(Err(Fault::Near)),
            }
        }
        turn_over(cx)
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        for _ in 0..turn() {
            if self.receive.sink_failed() {
                return Poll::Ready(Err(Fault::Near));
            }
            if self.chunk.is_empty() {
                match ready!(self.receive.poll_data(cx)) {
                    Some(Ok(chunk)) => self.chunk = chunk,
                    Some(Err(_)) => return Poll::Ready(Err(Fault::Far)),
                    None => {
                        finish(&self.near.socket);
                        return Poll::Ready(Ok(()));
                    }
                }
                if self.chunk.is_empty() {
                    continue;
                }
            }
            if ready!(self.near.socket.poll_write_ready(cx)).is_err() {
                return Poll::Ready(Err(Fault::Near));
            }
            match self.near.socket.try_write(&self.chunk) {
                Ok(count) => {
                    self.chunk.advance(count);
                    self.receive.consumed(count);
                    self.near.note_written(count);
                }
                Err(error) if would_block(&error) => {}
                Err(_) => return Poll::Ready(Err(Fault::Near)),
            }
        }
        turn_over(cx)
    }

    fn poll_far_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.send.poll_reset(cx).map(|_| ())
    }

    fn up_waits(&self) -> bool {
        self.stalled
    }

    fn down_waits(&self) -> bool {
        !self.chunk.is_empty()
    }

    fn note_waits(&self, up: bool, down: bool) {
        self.near.meter.waits(up, down);
    }

    fn near_is_gone(&mut self) {
        self.near_gone = true;
    }

    fn moved(&self) -> &Cell<u64> {
        &self.near.moved
    }
}
