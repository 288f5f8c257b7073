//! What lies below HTTP/2: TLS over a socket that is read in large pieces.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::buffers::{Buffer, Size};

/// Reads ahead of TLS, which asks for 4 KiB at a time (rustls's deframer): fewer system calls for bulk traffic.
/// The buffer is a pooled one, held only while there are bytes in it.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    buffer: Option<Buffer>,
    start: usize,
    size: Size,
}

impl<S> ReadAhead<S> {
    /// Wraps a socket.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            buffer: None,
            start: 0,
            size: Size::Small,
        }
    }

    /// The socket.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncBufRead for ReadAhead<S> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.buffer.is_none() {
            let mut buffer = Buffer::take(this.size);
            let mut read = ReadBuf::new(buffer.memory());
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            let filled = read.filled().len();
            if filled == 0 {
                return Poll::Ready(Ok(&[]));
            }
            buffer.set_filled(filled);
            this.size = this.size.after_read(filled, Size::Medium);
            this.start = 0;
            this.buffer = Some(buffer);
        }
        let bytes = this
            .buffer
            .as_ref()
            .and_then(|buffer| buffer.filled().get(this.start..))
            .unwrap_or_default();
        Poll::Ready(Ok(bytes))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let this = self.get_mut();
        this.start += amount;
        if this
            .buffer
            .as_ref()
            .is_some_and(|buffer| this.start >= buffer.filled().len())
        {
            this.buffer = None;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let bytes = ready!(self.as_mut().poll_fill_buf(cx))?;
        let taken = bytes.len().min(into.remaining());
        into.put_slice(bytes.get(..taken).unwrap_or_default());
        self.consume(taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_come_whole_and_the_buffer_is_given_back() {
        let (mut far, near) = duplex(64 << 10);
        let mut near = ReadAhead::new(near);
        far.write_all(b"hello world").await.expect("fits");
        let mut first = [0; 5];
        near.read_exact(&mut first).await.expect("there");
        assert_eq!(&first, b"hello");
        assert!(near.buffer.is_some(), "the rest is kept");
        let mut rest = [0; 6];
        near.read_exact(&mut rest).await.expect("there");
        assert_eq!(&rest, b" world");
        assert!(near.buffer.is_none(), "nothing is held while idle");
        drop(far);
        assert_eq!(near.read(&mut rest).await.expect("end"), 0);
    }
}
