//! Application socket and tunnel stream.

use std::{
    cell::Cell,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::net::TcpStream;

use super::{
    Directions, Drive, End, Fault, Flow, Meter, TURN, drive, finish, read, reset, turn_over,
    would_block,
};
use crate::proxy::{
    buffers::{Buffer, Size},
    registry::CloseSignal,
    tunnel::{TunnelReceive, TunnelSend, TunnelStream},
};

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
    let down = state.down;
    let mut directions = state.directions;
    let abrupt = match end {
        // Dropping the halves delivers what the application had sent before its RST, then resets the stream; where
        // the peer's window is closed that could take for ever.
        End::NearReset => directions.stalled,
        End::TimedOut | End::Closed(_) => true,
        End::Finished | End::FarReset => false,
    };
    if abrupt {
        directions.send.reset();
    }
    drop(directions);
    match end {
        End::Finished | End::NearReset => drop(near),
        // After a FIN a plain close lets the application read what is still on its way; the kernel answers later
        // bytes with RST.
        End::FarReset if down == Flow::Finished => drop(near),
        End::FarReset | End::TimedOut | End::Closed(_) => reset(near),
    }
    end
}

impl<M: Meter> Directions for TunnelDirections<'_, M> {
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        // What a socket that is gone still holds is bounded by its receive buffer.
        let turn = if self.near_gone { usize::MAX } else { TURN };
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
                    self.size = self.size.after_read(count);
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
        for _ in 0..TURN {
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

    fn near_is_gone(&mut self) {
        self.near_gone = true;
    }

    fn moved(&self) -> &Cell<u64> {
        &self.moved
    }
}
