//! Application socket and another socket: destinations outside the mesh, and applications behind plaintext.

use std::{
    cell::Cell,
    io,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::net::TcpStream;

use super::{
    Directions, Drive, End, Fault, Flow, Meter, close as close_socket, drive, finish, guard, read,
    reset, reset_after_fin, turn, turn_over, would_block,
};
use crate::proxy::{
    buffers::{Buffer, Size},
    registry::CloseSignal,
};

/// What one direction has read and not yet written.
struct Pipe {
    held: Option<Buffer>,
    written: usize,
    size: Size,
    /// The socket that is written to takes no more.
    waits: bool,
}

/// Which end of a pipe failed.
enum PipeError {
    Read,
    Write {
        /// By RST. Only the first call tells: whoever reads the socket next would see an end of file.
        reset: bool,
    },
}

impl PipeError {
    /// tcp(7): a write fails with EPIPE instead where the peer had sent FIN before, which is to be read then.
    fn of_write(error: &io::Error) -> Self {
        Self::Write {
            reset: error.kind() != io::ErrorKind::BrokenPipe,
        }
    }
}

impl Pipe {
    const fn new() -> Self {
        Self {
            held: None,
            written: 0,
            size: Size::Small,
            waits: false,
        }
    }

    /// Ready when FIN was passed on or an end failed. `last` reads without waiting and takes an empty socket for a
    /// failed one.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        last: bool,
        mut passed: impl FnMut(usize),
    ) -> Poll<Result<(), PipeError>> {
        // What a socket that is gone still holds is bounded by its receive buffer.
        let turn = if last { usize::MAX } else { turn() };
        for _ in 0..turn {
            if let Some(held) = &self.held {
                self.waits = true;
                if let Err(error) = ready!(to.poll_write_ready(cx)) {
                    return Poll::Ready(Err(PipeError::of_write(&error)));
                }
                self.waits = false;
                match to.try_write(held.filled().get(self.written..).unwrap_or_default()) {
                    Ok(count) => {
                        passed(count);
                        self.written += count;
                        if self.written >= held.filled().len() {
                            self.held = None;
                            self.written = 0;
                        }
                    }
                    Err(error) if would_block(&error) => {}
                    Err(error) => return Poll::Ready(Err(PipeError::of_write(&error))),
                }
                continue;
            }
            if !last && ready!(from.poll_read_ready(cx)).is_err() {
                return Poll::Ready(Err(PipeError::Read));
            }
            let mut buffer = Buffer::take(self.size);
            match read(from, buffer.memory()) {
                Ok(0) if last => return Poll::Ready(Err(PipeError::Read)),
                Ok(0) => {
                    finish(to);
                    return Poll::Ready(Ok(()));
                }
                Ok(count) => {
                    buffer.set_filled(count);
                    self.size = self.size.after_read(count, self.size.bytes(), Size::Large);
                    self.held = Some(buffer);
                }
                Err(error) if would_block(&error) && last => {
                    return Poll::Ready(Err(PipeError::Read));
                }
                Err(error) if would_block(&error) => {}
                Err(_) => return Poll::Ready(Err(PipeError::Read)),
            }
        }
        turn_over(cx)
    }
}

struct TcpDirections<'a, M> {
    near: &'a TcpStream,
    far: &'a TcpStream,
    meter: &'a M,
    up: Pipe,
    down: Pipe,
    moved: Cell<u64>,
    near_gone: bool,
    far_gone: bool,
}

/// Moves bytes between two sockets until both directions have ended or one side broke, and closes both accordingly.
pub async fn relay_tcp<M: Meter>(
    near: TcpStream,
    far: TcpStream,
    meter: &M,
    close: &CloseSignal,
    half_close_idle: Duration,
) -> End {
    guard(&near);
    guard(&far);
    let directions = TcpDirections {
        near: &near,
        far: &far,
        meter,
        up: Pipe::new(),
        down: Pipe::new(),
        moved: Cell::new(0),
        near_gone: false,
        far_gone: false,
    };
    let mut state = Drive::new(directions);
    let end = drive(&near, Some(&far), &mut state, close, half_close_idle).await;
    meter.ended(Some(&far));
    let (up, down) = (state.up, state.down);
    drop(state);
    match end {
        End::Finished => {
            close_socket(near);
            close_socket(far);
        }
        End::NearReset if up == Flow::Finished => reset_after_fin(far).await,
        End::FarReset if down == Flow::Finished => reset_after_fin(near).await,
        End::NearReset => reset(far),
        End::FarReset => reset(near),
        End::TimedOut | End::Closed(_) => {
            reset(near);
            reset(far);
        }
    }
    end
}

impl<M: Meter> Directions for TcpDirections<'_, M> {
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let (meter, moved) = (self.meter, &self.moved);
        let outcome = ready!(
            self.up
                .poll(cx, self.near, self.far, self.near_gone, |count| {
                    meter.near_to_far(count);
                    moved.set(moved.get().wrapping_add(1));
                })
        );
        Poll::Ready(outcome.map_err(|error| match error {
            PipeError::Read => Fault::Near,
            PipeError::Write { reset } => {
                self.far_gone = reset;
                // What came before the RST is still to be passed on, and then the RST.
                cx.waker().wake_by_ref();
                Fault::Far
            }
        }))
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let (meter, moved) = (self.meter, &self.moved);
        let outcome = ready!(
            self.down
                .poll(cx, self.far, self.near, self.far_gone, |count| {
                    meter.far_to_near(count);
                    moved.set(moved.get().wrapping_add(1));
                })
        );
        Poll::Ready(outcome.map_err(|error| match error {
            PipeError::Read => Fault::Far,
            PipeError::Write { .. } => Fault::Near,
        }))
    }

    fn poll_far_reset(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }

    fn up_waits(&self) -> bool {
        self.up.waits
    }

    fn down_waits(&self) -> bool {
        self.down.waits
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
