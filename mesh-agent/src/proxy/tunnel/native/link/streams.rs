//! What streams and handles do with a tunnel.

use std::{
    io::{self, IoSliceMut},
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, request::Parts};

use super::{
    super::{
        super::{ConnectRequest, DirectSink, StreamError},
        frame::Code,
    },
    Answer, Core, Ends, register, wake,
};
use crate::proxy::{buffers::Size, limits::SMALL_SEND_BYTES};

impl Core {
    /// Whether the client can open streams.
    pub fn is_open(&self) -> bool {
        !self.ended && !self.http.is_leaving()
    }

    /// Whether the peer speaks HTTP/2.
    pub fn greeted(&self) -> bool {
        self.http.greeted()
    }

    /// Streams that the peer allows.
    pub fn peer_streams(&self) -> Option<usize> {
        self.http.peer_streams()
    }

    /// Asks the peer whether it is there.
    pub fn ping(&mut self) {
        self.http.ping();
        self.flush();
    }

    /// Whether it has answered since this was last asked.
    pub fn take_pong(&mut self) -> bool {
        std::mem::take(&mut self.ponged)
    }

    /// Another client handle, or one less.
    pub fn count_users(&mut self, more: bool) {
        self.users = if more {
            self.users + 1
        } else {
            self.users.saturating_sub(1)
        };
        if self.users == 0 {
            self.wake_task();
        }
    }

    /// GOAWAY.
    pub fn leave(&mut self) {
        self.http.leave();
        self.flush();
        self.wake_task();
    }

    /// Ready when one more stream is allowed, or none ever will be. `assumed` holds until the peer has told.
    pub fn poll_place(&mut self, cx: &mut Context<'_>, assumed: usize) -> Poll<()> {
        let allowed = if self.http.greeted() {
            self.peer_streams().unwrap_or(usize::MAX)
        } else {
            assumed
        };
        if !self.is_open() || self.http.open_streams() < allowed {
            return Poll::Ready(());
        }
        if !self.openers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.openers.push_back(cx.waker().clone());
        }
        Poll::Pending
    }

    pub(super) fn pass_place(&mut self) {
        wake(self.openers.pop_front());
    }

    /// Sends a request.
    pub fn open(&mut self, request: &ConnectRequest) -> Option<u32> {
        if self.ended {
            return None;
        }
        let ends = Ends {
            handles: 1,
            ..Ends::default()
        };
        let stream = self.http.open(request, ends)?;
        self.flush_soon(stream);
        Some(stream)
    }

    /// The answer to a request, or the code with which it was reset; `None`: the tunnel is gone.
    pub fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        stream: u32,
    ) -> Poll<Result<Answer, Option<Code>>> {
        let code = self.http.reset_code(stream);
        let Some(ends) = self.http.user(stream) else {
            return Poll::Ready(Err(None));
        };
        if let Some(answer) = ends.answer.take() {
            return Poll::Ready(Ok(*answer));
        }
        if code.is_some() || self.ended {
            return Poll::Ready(Err(code));
        }
        register(&mut ends.receiver, cx);
        Poll::Pending
    }

    /// The next request that has not been reset meanwhile.
    pub fn next_request(&mut self) -> Option<(u32, Box<Parts>)> {
        loop {
            let (stream, request) = self.requests.pop_front()?;
            if !self.http.take(stream) {
                self.http.release(stream);
                continue;
            }
            if let Some(ends) = self.http.user(stream) {
                ends.handles = 1;
            }
            return Some((stream, request));
        }
    }

    /// Answers a request; false when the stream is gone.
    pub fn respond(
        &mut self,
        stream: u32,
        status: StatusCode,
        headers: &HeaderMap,
        end: bool,
    ) -> bool {
        let there = !self.ended && self.http.respond(stream, status, headers, end);
        self.flush_soon(stream);
        there
    }

    /// One more handle of a stream.
    pub fn add_handle(&mut self, stream: u32) {
        if let Some(ends) = self.http.user(stream) {
            ends.handles += 1;
        }
    }

    /// One handle less; with the last the stream goes.
    pub fn drop_handle(&mut self, stream: u32) {
        let Some(ends) = self.http.user(stream) else {
            return;
        };
        ends.handles = ends.handles.saturating_sub(1);
        if ends.handles == 0 {
            self.http.release(stream);
            self.wake_task();
            // It may have been woken for room, or for nothing.
            self.pass_room();
            self.pass_place();
        }
    }

    fn check(&self, stream: u32) -> Result<(), StreamError> {
        if self.ended {
            return Err(StreamError::Lost);
        }
        match self.http.reset_code(stream) {
            Some(_) => Err(StreamError::Reset),
            None => Ok(()),
        }
    }

    /// Has `read` fill frames of the stream, as far as windows and buffers allow; pending while they do not.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        stream: u32,
        size: Size,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Poll<Result<io::Result<usize>, StreamError>> {
        if let Err(error) = self.check(stream) {
            return Poll::Ready(Err(error));
        }
        if !self.http.stream_sendable(stream) {
            if let Some(ends) = self.http.user(stream) {
                register(&mut ends.sender, cx);
            }
            self.pass_room();
            return Poll::Pending;
        }
        let bulk = size != Size::Small;
        if !self.channel.accepts(self.http.control(), bulk) {
            self.flush();
            self.check(stream)?;
        }
        if !self.http.connection_sendable() || !self.channel.accepts(self.http.control(), bulk) {
            self.wait_for_room(cx, stream);
            return Poll::Pending;
        }
        let window = self.http.sendable(stream);
        let got = self.channel.fill(stream, bulk, window, read);
        if let Ok(count @ 1..) = got {
            self.http.sent(stream, count);
            if count > SMALL_SEND_BYTES {
                self.flush();
            } else {
                self.flush_soon(stream);
            }
        }
        self.pass_room();
        Poll::Ready(Ok(got))
    }

    fn wait_for_room(&mut self, cx: &Context<'_>, stream: u32) {
        let Some(ends) = self.http.user(stream) else {
            return;
        };
        register(&mut ends.sender, cx);
        if !std::mem::replace(&mut ends.waits, true) {
            self.room.push_back(stream);
        }
    }

    /// END_STREAM.
    pub fn finish(&mut self, stream: u32) -> Result<(), StreamError> {
        self.check(stream)?;
        if self.http.finish(stream) {
            self.flush_soon(stream);
            self.pass_place();
        }
        Ok(())
    }

    /// RST_STREAM(CANCEL).
    pub fn reset(&mut self, stream: u32) {
        self.reset_with(stream, Code::CANCEL);
    }

    /// The same, saying why.
    pub fn reset_with(&mut self, stream: u32, code: Code) {
        if !self.ended {
            self.http.reset(stream, code);
            self.wake_task();
            self.pass_place();
        }
    }

    /// Ready when everything sent was given to the kernel, or never will be.
    pub fn poll_flushed(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.ended || self.is_flushed() {
            return Poll::Ready(());
        }
        if !self.flushed.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.flushed.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Ready when the stream was reset or the tunnel is gone.
    pub fn poll_reset(&mut self, cx: &Context<'_>, stream: u32) -> Poll<StreamError> {
        if let Err(error) = self.check(stream) {
            return Poll::Ready(error);
        }
        if let Some(ends) = self.http.user(stream) {
            register(&mut ends.sender, cx);
        }
        Poll::Pending
    }

    /// The next received bytes.
    pub fn poll_data(
        &mut self,
        cx: &Context<'_>,
        stream: u32,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        let (got_end, checked) = (self.http.got_end(stream), self.check(stream));
        let Some(ends) = self.http.user(stream) else {
            return Poll::Ready(Some(Err(StreamError::Lost)));
        };
        if let Some(piece) = ends.queue.pop_front() {
            return Poll::Ready(Some(Ok(Bytes::from(piece))));
        }
        match checked {
            _ if got_end => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(Err(error))),
            Ok(()) => {
                register(&mut ends.receiver, cx);
                Poll::Pending
            }
        }
    }

    /// Bytes were passed on.
    pub fn consumed(&mut self, stream: u32, bytes: usize) {
        self.http.consumed(stream, bytes);
        if !self.ended && !self.http.control().is_empty() {
            self.flush_soon(stream);
        }
    }

    /// Where received bytes go without a detour; `None`: to the queue.
    pub fn attach(&mut self, stream: u32, sink: Option<Rc<dyn DirectSink>>) {
        if let Some(ends) = self.http.user(stream) {
            ends.sink = sink;
        }
    }

    /// Whether the sink broke.
    pub fn sink_failed(&mut self, stream: u32) -> bool {
        self.http.user(stream).is_some_and(|ends| ends.sink_failed)
    }

    /// Lets a test send a KeyUpdate.
    #[cfg(test)]
    pub fn refresh_keys(&mut self) {
        self.channel.refresh_keys();
        self.wake_task();
    }
}
