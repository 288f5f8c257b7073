//! The bytes below HTTP/2: socket, TLS records and work buffers of one tunnel. Plaintext is framed straight into the
//! buffer that is sealed, and opened records into one buffer that frames are read from; buffers come from the worker's
//! pool and are held only while there are bytes in them.

use std::{
    io::{self, IoSliceMut},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    frame::{HEAD_BYTES, data_head},
    records::{
        Plain, RECORD_MAX_BYTES, RECORD_OVERHEAD_BYTES, RECORD_PLAINTEXT_BYTES, RecordError,
        Records,
    },
};
use crate::proxy::buffers::{Buffer, LARGE_BYTES, Size};

/// Records that one output buffer holds, with room for what TLS itself may have to say (KeyUpdate, alerts).
const RECORDS_AT_ONCE: usize = LARGE_BYTES / (RECORD_PLAINTEXT_BYTES + RECORD_OVERHEAD_BYTES);
/// Plaintext that is sealed at once.
const STAGING_BYTES: usize = RECORDS_AT_ONCE * RECORD_PLAINTEXT_BYTES;
/// A frame of DATA that fills a record.
pub const SLOT_PAYLOAD_BYTES: usize = RECORD_PLAINTEXT_BYTES - HEAD_BYTES;
/// Below this much free staging, what is staged goes first.
const STAGING_RESERVE_BYTES: usize = RECORD_PLAINTEXT_BYTES;
/// Received bytes that wait for more: a record that has come in part, or a handshake message over several records,
/// which rustls takes up to 64 KiB of.
const HELD_MAX_BYTES: usize = 128 << 10;

const _: () = assert!(RECORD_MAX_BYTES < Size::Medium.bytes());

/// Anything that bytes can be read from and written to.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Socket for T {}

/// Why the channel is over.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// TCP failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// TLS failed.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// TCP ended without close_notify: something may be missing.
    #[error("the peer's bytes were cut off")]
    Truncated,
    /// It was closed from this side.
    #[error("the tunnel is closed")]
    Closed,
}

/// What was read.
#[derive(Debug)]
pub enum Received {
    /// Plaintext, perhaps none.
    Plain(Buffer),
    /// The last plaintext: close_notify came with it.
    Last(Buffer),
}

/// Socket, records and buffers.
pub struct Channel {
    socket: Option<Box<dyn Socket>>,
    records: Records,
    /// Received and not yet complete.
    held: Vec<u8>,
    /// Size of the next read.
    size: Size,
    /// Plaintext to seal.
    staging: Option<Buffer>,
    staged: usize,
    /// What TLS itself has to send.
    urgent: Vec<u8>,
    /// Records to write, and how much of them is written.
    output: Option<Buffer>,
    written: usize,
}

impl Channel {
    /// After the handshake.
    pub fn new(socket: Box<dyn Socket>, records: Records, held: Vec<u8>) -> Self {
        Self {
            socket: Some(socket),
            records,
            held,
            size: Size::Medium,
            staging: None,
            staged: 0,
            urgent: Vec::new(),
            output: None,
            written: 0,
        }
    }

    /// Reads once and opens what is complete.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Received, ChannelError>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Ready(Err(ChannelError::Closed));
        };
        let held = self.held.len();
        let size = if held >= RECORD_MAX_BYTES {
            Size::Large
        } else {
            self.size
        };
        let mut buffer = Buffer::take(size);
        let memory = buffer.memory();
        let mut read = ReadBuf::new(memory.get_mut(held..).unwrap_or_default());
        let outcome = ready!(Pin::new(socket).poll_read(cx, &mut read));
        let count = read.filled().len();
        outcome?;
        if count == 0 {
            return Poll::Ready(Err(ChannelError::Truncated));
        }
        if let Some(front) = memory.get_mut(..held) {
            front.copy_from_slice(&self.held);
        }
        self.size = match size.after_read(held + count, size.bytes(), Size::Large) {
            Size::Small => Size::Medium,
            other => other,
        };
        let mut plain = Buffer::take(size);
        let bytes = memory.get_mut(..held + count).unwrap_or_default();
        let mut into = Plain::new(plain.memory());
        let opened = self.records.open(bytes, &mut into, &mut self.urgent)?;
        let filled = into.filled();
        plain.set_filled(filled);
        self.hold(bytes.get(opened.discard..).unwrap_or_default())?;
        Poll::Ready(Ok(if opened.closed {
            Received::Last(plain)
        } else {
            Received::Plain(plain)
        }))
    }

    fn hold(&mut self, rest: &[u8]) -> Result<(), ChannelError> {
        if rest.len() > HELD_MAX_BYTES {
            return Err(RecordError::TooLong.into());
        }
        self.held.clear();
        if rest.is_empty() {
            // An idle tunnel holds nothing.
            self.held = Vec::new();
        }
        self.held.extend_from_slice(rest);
        Ok(())
    }

    /// Whether everything that was staged is on its way and was given to the kernel.
    pub fn is_flushed(&self) -> bool {
        self.staged == 0 && self.output.is_none() && self.urgent.is_empty()
    }

    /// Plaintext that waits to be sealed, bytes.
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// Whether DATA can be staged now; `bulk` wants all of the staging. `control` goes before it.
    pub fn accepts(&mut self, control: &mut Vec<u8>, bulk: bool) -> bool {
        let idle = self.output.is_none() && self.urgent.is_empty() && self.socket.is_some();
        if !idle || !self.stage(control) {
            return false;
        }
        if bulk {
            self.staged == 0
        } else {
            self.staged + STAGING_RESERVE_BYTES <= STAGING_BYTES
        }
    }

    /// Moves control frames into the staging; false when some had no room.
    fn stage(&mut self, control: &mut Vec<u8>) -> bool {
        if control.is_empty() {
            return true;
        }
        let staging = self
            .staging
            .get_or_insert_with(|| Buffer::take(Size::Large));
        let count = control.len().min(STAGING_BYTES - self.staged);
        let into = staging.memory().get_mut(self.staged..self.staged + count);
        if let (Some(into), Some(from)) = (into, control.get(..count)) {
            into.copy_from_slice(from);
            self.staged += count;
            control.drain(..count);
        }
        if control.is_empty() && control.capacity() > RECORD_PLAINTEXT_BYTES {
            *control = Vec::new();
        }
        control.is_empty()
    }

    /// Reads at most `window` bytes of payload into frames of `stream`: one, or with `bulk` as many as there is room
    /// for. Only when [`Channel::accepts`]. Returns what `read` returned.
    pub fn fill(
        &mut self,
        stream: u32,
        bulk: bool,
        window: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let staging = self
            .staging
            .get_or_insert_with(|| Buffer::take(Size::Large));
        let free = staging
            .memory()
            .get_mut(self.staged..STAGING_BYTES)
            .unwrap_or_default();
        let got = if bulk {
            fill_slots(free, window, read)
        } else {
            let slot = free.get_mut(HEAD_BYTES..).unwrap_or_default();
            let room = window.min(SLOT_PAYLOAD_BYTES).min(slot.len());
            read(&mut [IoSliceMut::new(slot.get_mut(..room).unwrap_or_default())])
        };
        let count = *got.as_ref().unwrap_or(&0);
        let mut left = count;
        for slot in free.chunks_mut(RECORD_PLAINTEXT_BYTES) {
            if left == 0 {
                break;
            }
            let length = left.min(SLOT_PAYLOAD_BYTES);
            if let Some(head) = slot.first_chunk_mut() {
                *head = data_head(stream, length, false);
            }
            left -= length;
            self.staged += HEAD_BYTES + length;
        }
        if self.staged == 0 {
            self.staging = None;
        }
        got.map(|_| count)
    }

    /// Seals and writes everything: what TLS has to say, what is staged, and `control`.
    pub fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        control: &mut Vec<u8>,
    ) -> Poll<Result<(), ChannelError>> {
        loop {
            if self.output.is_some() {
                ready!(self.poll_write(cx))?;
            } else if !self.urgent.is_empty() {
                let mut output = Buffer::take(Size::Large);
                let count = self.urgent.len().min(LARGE_BYTES);
                if let Some(into) = output.memory().get_mut(..count) {
                    into.copy_from_slice(self.urgent.get(..count).unwrap_or_default());
                }
                self.urgent.drain(..count);
                output.set_filled(count);
                self.output = Some(output);
            } else {
                self.stage(control);
                if self.staged == 0 {
                    return Poll::Ready(Ok(()));
                }
                self.seal()?;
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ChannelError>> {
        let (Some(socket), Some(output)) = (&mut self.socket, &self.output) else {
            return Poll::Ready(Err(ChannelError::Closed));
        };
        let rest = output.filled().get(self.written..).unwrap_or_default();
        match ready!(Pin::new(socket).poll_write(cx, rest))? {
            0 => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
            count => self.written += count,
        }
        if self.written >= output.filled().len() {
            self.output = None;
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn seal(&mut self) -> Result<(), ChannelError> {
        let Some(mut staging) = self.staging.take() else {
            return Ok(());
        };
        staging.set_filled(std::mem::take(&mut self.staged));
        let mut output = Buffer::take(Size::Large);
        let sealed = self
            .records
            .seal(&mut self.held, staging.filled(), output.memory())?;
        output.set_filled(sealed);
        self.output = Some(output);
        Ok(())
    }

    /// Tries to say what is left to say and close_notify, without waiting, and closes. A peer that reads gets it.
    pub fn close(&mut self, cx: &mut Context<'_>, control: &mut Vec<u8>) {
        if let Poll::Ready(Ok(())) = self.poll_flush(cx, control) {
            let mut output = Buffer::take(Size::Small);
            if let Ok(count) = self.records.close(&mut self.held, output.memory()) {
                output.set_filled(count);
                self.output = (count > 0).then_some(output);
                // What the kernel does not take now is given up.
                let _ = self.poll_flush(cx, control);
            }
        }
        if let Some(socket) = &mut self.socket {
            let _ = Pin::new(socket).poll_shutdown(cx);
        }
        self.abandon();
    }

    /// Closes at once; everything held is given back.
    pub fn abandon(&mut self) {
        self.socket = None;
        self.staging = None;
        self.staged = 0;
        self.output = None;
        self.written = 0;
        self.urgent = Vec::new();
        self.held = Vec::new();
    }

    /// Lets a test send a KeyUpdate.
    #[cfg(test)]
    pub fn refresh_keys(&mut self) {
        let mut out = [0; 1024];
        let count = self
            .records
            .refresh_keys(&mut self.held, &mut out)
            .expect("keys can be refreshed");
        self.urgent.extend_from_slice(&out[..count]);
    }
}

/// Reads into the payloads of consecutive slots, each the frame that fills a record.
fn fill_slots(
    free: &mut [u8],
    mut window: usize,
    read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut slots = Vec::with_capacity(RECORDS_AT_ONCE);
    for slot in free.chunks_exact_mut(RECORD_PLAINTEXT_BYTES) {
        let room = window.min(SLOT_PAYLOAD_BYTES);
        if room == 0 {
            break;
        }
        window -= room;
        let payload = slot.get_mut(HEAD_BYTES..HEAD_BYTES + room);
        slots.push(IoSliceMut::new(payload.unwrap_or_default()));
    }
    read(&mut slots)
}
