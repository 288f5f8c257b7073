//! A peer in memory: says what it was given, then ends or falls silent, and takes everything that it is told.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    runtime::{Builder, Runtime},
    task::LocalSet,
};

/// Bytes that a script says in one go: smaller than most, so that messages arrive in parts.
const PIECE_BYTES: usize = 61;

/// The peer.
#[derive(Debug)]
pub(crate) struct Script {
    says: Vec<u8>,
    at: usize,
    piece: usize,
    falls_silent: bool,
}

impl Script {
    /// A peer that says `says`; the length chooses whether in one piece or in many, and what it does then.
    pub(crate) fn new(says: &[u8]) -> Self {
        let in_pieces = says.len() % 2 == 1;
        Self {
            says: says.to_vec(),
            at: 0,
            piece: if in_pieces { PIECE_BYTES } else { usize::MAX },
            falls_silent: says.len() % 4 > 1,
        }
    }
}

impl AsyncRead for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = self.says.get(self.at..).unwrap_or_default();
        if rest.is_empty() && self.falls_silent {
            // Nobody will wake the reader: only a deadline gets it on.
            return Poll::Pending;
        }
        let count = rest.len().min(buffer.remaining()).min(self.piece);
        buffer.put_slice(rest.get(..count).unwrap_or_default());
        self.at += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script {
    fn poll_write(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs a conversation in virtual time: whoever waits for nothing but a deadline meets it at once.
pub(crate) fn in_virtual_time(conversation: impl Future<Output = ()>) {
    run(
        &Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build(),
        conversation,
    );
}

/// Runs a conversation over sockets.
pub(crate) fn in_real_time(conversation: impl Future<Output = ()>) {
    run(
        &Builder::new_current_thread().enable_all().build(),
        conversation,
    );
}

fn run(runtime: &io::Result<Runtime>, conversation: impl Future<Output = ()>) {
    let runtime = runtime.as_ref().expect("a runtime can be made");
    LocalSet::new().block_on(runtime, conversation);
}
