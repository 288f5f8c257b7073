//! Application socket and tunnel stream.

use std::{
    cell::Cell,
    future::poll_fn,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Directions, Drive, End, Fault, Flow, Meter, close as close_socket, drive, finish, guard, read,
    reset, reset_after_fin, turn, turn_over, would_block,
};
use crate::proxy::{
    buffers::{Buffer, Size},
    registry::CloseSignal,
    tunnel::{TunnelReceive, TunnelSend, TunnelStream},
};

/// How long bytes that an application sent before its RST may wait in the tunnel: a busy TCP connection has written
/// them long before.
const FLUSH_WAIT: Duration = Duration::from_secs(1);

struct TunnelDirections<'a, M> {
    near: &'a TcpStream,
    send: TunnelSend,
    receive: TunnelReceive,
    meter: &'a M,
    /// Size of the next read.
    size: Size,
    /// Received and not yet written.
    chunk: Bytes,
    moved: Cell<u64>,
    near_gone: bool,
    /// The peer's window is closed.
    stalled: bool,
}

/// Moves bytes between an application and a tunnel until both directions have ended or one side broke, and closes
/// both accordingly.
pub async fn relay_tunnel<M: Meter>(
    near: TcpStream,
    stream: TunnelStream,
    meter: &M,
    close: &CloseSignal,
    half_close_idle: Duration,
) -> End {
    guard(&near);
    let directions = TunnelDirections {
        near: &near,
        send: stream.send,
        receive: stream.receive,
        meter,
        size: Size::Small,
        chunk: Bytes::new(),
        moved: Cell::new(0),
        near_gone: false,
        stalled: false,
    };
    let mut state = Drive::new(directions);
    let end = drive(&near, None, &mut state, close, half_close_idle).await;
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
                match self.near.poll_read_ready(cx) {
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
            let Ok(room) = ready!(self.send.poll_room(cx, self.size.bytes())) else {
                return Poll::Ready(Err(Fault::Far));
            };
            self.stalled = false;
            let mut buffer = Buffer::take(self.size);
            let Some(into) = buffer.memory().get_mut(..room) else {
                return Poll::Ready(Err(Fault::Far));
            };
            match read(self.near, into) {
                // A write failed before, so this end is a reset, not a FIN.
                Ok(0) if self.near_gone => return Poll::Ready(Err(Fault::Near)),
                Ok(0) => return Poll::Ready(self.send.finish().map_err(|_| Fault::Far)),
                Ok(count) => {
                    buffer.set_filled(count);
                    self.size = self.size.after_read(count, Size::Large);
                    if self.send.send(buffer.freeze()).is_err() {
                        return Poll::Ready(Err(Fault::Far));
                    }
                    self.meter.near_to_far(count);
                    self.moved.set(self.moved.get().wrapping_add(1));
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
            if self.chunk.is_empty() {
                match ready!(self.receive.poll_data(cx)) {
                    Some(Ok(chunk)) => self.chunk = chunk,
                    Some(Err(_)) => return Poll::Ready(Err(Fault::Far)),
                    None => {
                        finish(self.near);
                        return Poll::Ready(Ok(()));
                    }
                }
                if self.chunk.is_empty() {
                    continue;
                }
            }
            if ready!(self.near.poll_write_ready(cx)).is_err() {
                return Poll::Ready(Err(Fault::Near));
            }
            match self.near.try_write(&self.chunk) {
                Ok(count) => {
                    self.chunk.advance(count);
                    self.receive.consumed(count);
                    self.meter.far_to_near(count);
                    self.moved.set(self.moved.get().wrapping_add(1));
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
        self.meter.waits(up, down);
    }

    fn near_is_gone(&mut self) {
        self.near_gone = true;
    }

    fn moved(&self) -> &Cell<u64> {
        &self.moved
    }
}
