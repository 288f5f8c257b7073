//! What this side does: opens, answers, sends, ends.

use http::{HeaderMap, StatusCode};

use super::{
    super::{
        super::ConnectRequest,
        frame::{self, Code, LEAVING, MAX_STREAM, MAX_WINDOW, flag, kind, setting},
        hpack,
    },
    Connection, Role, Stream,
};

impl<X> Connection<X> {
    /// Opens a stream by a CONNECT request. `None` when the connection takes none any more: GOAWAY, or all numbers
    /// are used up (section 5.1.1).
    pub fn open(&mut self, request: &ConnectRequest, user: X) -> Option<u32> {
        let stream = match self.newest {
            0 => 1,
            newest => newest + 2,
        };
        let numbers_left = i64::from(stream) < MAX_WINDOW;
        if self.is_leaving() || self.failed.is_some() || !numbers_left {
            return None;
        }
        self.newest = stream;
        let mut block = Vec::with_capacity(512);
        hpack::put_connect(&mut block, request.authority.as_bytes());
        put_fields(&mut block, &request.headers);
        let max_frame = self.max_frame();
        frame::put_headers(&mut self.control, stream, &block, false, max_frame);
        self.enter(stream, false, user);
        Some(stream)
    }

    pub(super) fn enter(&mut self, stream: u32, answered: bool, user: X) {
        let state = Stream {
            send_window: self.peer.initial_window.into(),
            receive_window: self.granted.bytes.into(),
            owed: 0,
            undelivered: 0,
            sent_end: false,
            got_end: false,
            reset: None,
            answered,
            taken: matches!(self.role, Role::Client),
            counted: true,
            user,
        };
        self.streams.insert(stream, state);
        self.open += 1;
    }

    /// Notes that a request was handed to whoever serves it; false when it was reset before.
    pub fn take(&mut self, stream: u32) -> bool {
        let Some(state) = self.streams.get_mut(&stream) else {
            return false;
        };
        let first = !std::mem::replace(&mut state.taken, true);
        let reset = state.reset.is_some();
        if first && reset {
            self.untaken_resets = self.untaken_resets.saturating_sub(1);
        }
        !reset
    }

    /// Answers a request; false when the stream is gone.
    pub fn respond(
        &mut self,
        stream: u32,
        status: StatusCode,
        headers: &HeaderMap,
        end: bool,
    ) -> bool {
        let max_frame = self.max_frame();
        let Some(state) = self.sending(stream) else {
            return false;
        };
        state.sent_end = end;
        let mut block = Vec::with_capacity(256);
        hpack::put_status(&mut block, status.as_u16());
        put_fields(&mut block, headers);
        frame::put_headers(&mut self.control, stream, &block, end, max_frame);
        self.settle(stream);
        true
    }

    /// A stream on which we may still send.
    fn sending(&mut self, stream: u32) -> Option<&mut Stream<X>> {
        if self.failed.is_some() {
            return None;
        }
        let state = self.streams.get_mut(&stream)?;
        (state.reset.is_none() && !state.sent_end).then_some(state)
    }

    /// Payload bytes that the windows allow a stream now.
    #[must_use]
    pub fn sendable(&self, stream: u32) -> usize {
        let own = self
            .streams
            .get(&stream)
            .map_or(0, |state| state.send_window);
        usize::try_from(own.min(self.send_window)).unwrap_or(0)
    }

    /// Whether only the connection's window, not the stream's own, stands in the way.
    #[must_use]
    pub fn stream_sendable(&self, stream: u32) -> bool {
        self.streams
            .get(&stream)
            .is_some_and(|state| state.send_window > 0)
    }

    /// Whether the connection's window is open.
    #[must_use]
    pub fn connection_sendable(&self) -> bool {
        self.send_window > 0
    }

    /// Counts payload that was framed, no more than [`Connection::sendable`].
    pub fn sent(&mut self, stream: u32, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(MAX_WINDOW);
        self.send_window -= bytes;
        self.calm.frames = 0;
        if let Some(state) = self.streams.get_mut(&stream) {
            state.send_window -= bytes;
        }
    }

    /// Ends our direction; false when the stream is gone.
    pub fn finish(&mut self, stream: u32) -> bool {
        let Some(state) = self.sending(stream) else {
            return false;
        };
        state.sent_end = true;
        frame::put(&mut self.control, kind::DATA, flag::END_STREAM, stream, &[]);
        self.settle(stream);
        true
    }

    /// Ends both directions at once, unless the stream is over already.
    pub fn reset(&mut self, stream: u32, code: Code) {
        let failed = self.failed.is_some();
        let Some(state) = self.streams.get_mut(&stream) else {
            return;
        };
        if failed || state.reset.is_some() || (state.sent_end && state.got_end) {
            return;
        }
        state.reset = Some(code);
        frame::put_reset(&mut self.control, stream, code);
        self.settle(stream);
    }

    /// Passed-on bytes of a stream open its window again.
    pub fn consumed(&mut self, stream: u32, bytes: usize) {
        if let Some(state) = self.streams.get_mut(&stream) {
            let bytes = bytes.min(state.undelivered);
            state.undelivered -= bytes;
            self.credit_stream(stream, u32::try_from(bytes).unwrap_or(u32::MAX));
        }
    }

    /// Nobody uses the stream any more: it is reset unless it had ended both ways, and its bytes are dropped. A server
    /// that has sent everything says so with NO_ERROR (section 8.1).
    pub fn release(&mut self, stream: u32) {
        let server = matches!(self.role, Role::Server { .. });
        let Some(state) = self.streams.get(&stream) else {
            return;
        };
        let code = if server && state.sent_end {
            Code::NO_ERROR
        } else {
            Code::CANCEL
        };
        self.take(stream);
        self.reset(stream, code);
        let removed = self.streams.remove(&stream);
        if removed.is_some_and(|state| state.reset.is_some()) {
            self.forget(stream);
        }
    }

    /// Grants streams a window of so many bytes, open ones included (section 6.9.2). Waits until the peer has acknowledged
    /// earlier settings: the next call tries again.
    pub fn set_window(&mut self, bytes: u32) {
        let granted = &mut self.granted;
        if granted.bytes == bytes || granted.unacknowledged > 0 || self.failed.is_some() {
            return;
        }
        granted.said = Some(bytes);
        granted.unacknowledged += 1;
        let settings = [(setting::INITIAL_WINDOW_SIZE, bytes)];
        frame::put_settings(&mut self.control, &settings);
    }

    /// From here on the peer keeps to what was said last.
    pub(super) fn settings_acknowledged(&mut self) {
        let granted = &mut self.granted;
        granted.unacknowledged = granted.unacknowledged.saturating_sub(1);
        let Some(bytes) = granted.said.take() else {
            return;
        };
        let change = i64::from(bytes) - i64::from(granted.bytes);
        granted.bytes = bytes;
        let adjust = |(stream, state): (&u32, &mut Stream<X>)| {
            state.receive_window += change;
            *stream
        };
        let streams: Vec<u32> = self.streams.iter_mut().map(adjust).collect();
        for stream in streams {
            // Credit that was not due before may be more than the whole window now: nothing else would bring it.
            self.credit_stream(stream, 0);
        }
    }

    /// Asks the peer for an answer.
    pub fn ping(&mut self) {
        frame::put(&mut self.control, kind::PING, 0, 0, &[0; 8]);
    }

    /// Says that no more streams are opened or taken (GOAWAY without an error). Open ones go on. A server says so
    /// twice, as RFC 9113 section 6.8 has it: at once without a last stream, and with one after an answer to PING, so
    /// that what was on its way is still taken.
    pub fn leave(&mut self) {
        if std::mem::replace(&mut self.announced, true) || self.failed.is_some() {
            return;
        }
        match self.role {
            Role::Client => self.take_no_more(),
            Role::Server { .. } => {
                frame::put_go_away(&mut self.control, MAX_STREAM, Code::NO_ERROR);
                frame::put(&mut self.control, kind::PING, 0, 0, &LEAVING);
            }
        }
    }

    /// From now on new streams are ignored.
    pub(super) fn take_no_more(&mut self) {
        if !std::mem::replace(&mut self.leaving, true) {
            let last = self.last_taken();
            frame::put_go_away(&mut self.control, last, Code::NO_ERROR);
        }
    }
}

fn put_fields(block: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        hpack::put_field(block, name.as_str().as_bytes(), value.as_bytes());
    }
}
