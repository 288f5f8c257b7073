//! What the peer sends: bytes become frames, frames become events. Every rule that a peer can break is here.

use std::time::{Duration, Instant};

use super::{
    super::{
        frame::{HEAD_BYTES, Head, PREFACE, flag, kind, put, read_u32},
        hpack::DecodeError,
    },
    CLIENT_HEADER_LIST_BYTES, Code, Connection, ConnectionError, Event,
    MAX_EMPTY_FRAMES_PER_SECOND, MAX_FRAME_BYTES, MAX_LOCAL_ERROR_RESETS, MAX_MAX_FRAME,
    MAX_PENDING_RESET_STREAMS, MAX_QUEUED_ANSWER_BYTES, MAX_WINDOW, MIN_MAX_FRAME, Role,
    SERVER_HEADER_LIST_BYTES,
    message::{Fault, Message},
    setting,
};
use crate::proxy::limits::{MAX_CONTINUATION_FRAMES, MAX_SETTINGS_PER_FRAME};

/// Pad length and deprecated priority before a header block.
const HEADERS_EXTRA_BYTES: usize = 1 + 5;
/// Longest padding.
const MAX_PADDING_BYTES: usize = 255;

/// Where in the byte stream we are.
#[derive(Debug)]
pub(super) enum Reading {
    /// The client's preface, so many bytes of it seen.
    Preface(usize),
    /// The head of a frame, so many bytes of it seen.
    Head([u8; HEAD_BYTES], usize),
    /// The payload of a frame that is handled whole; what lies beyond `wanted` is dropped.
    Payload {
        head: Head,
        wanted: usize,
        dropped: usize,
    },
    /// The pad length of a DATA frame.
    PadLength { stream: u32, left: usize, end: bool },
    /// The payload of a DATA frame.
    Data {
        stream: u32,
        left: usize,
        padding: usize,
        end: bool,
    },
    /// Bytes without meaning.
    Skip(usize),
}

impl Reading {
    pub(super) fn begin(role: Role) -> Self {
        match role {
            Role::Client => Self::NEXT,
            Role::Server { .. } => Self::Preface(0),
        }
    }

    const NEXT: Self = Self::Head([0; HEAD_BYTES], 0);
}

/// A header block that CONTINUATION goes on with.
#[derive(Debug)]
pub(super) struct Block {
    stream: u32,
    end: bool,
    bytes: Vec<u8>,
    continuations: usize,
}

impl<X: Default> Connection<X> {
    /// The next event in `input`, which is advanced; `None` when it is used up.
    ///
    /// # Errors
    /// When the connection is over. Later calls repeat the error.
    pub fn receive<'a>(
        &mut self,
        input: &mut &'a [u8],
        now: Instant,
    ) -> Result<Option<Event<'a>>, ConnectionError> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        while !input.is_empty() || self.needs_no_input() {
            let event = match self.reading {
                Reading::Preface(seen) => self.read_preface(input, seen)?,
                Reading::Head(bytes, seen) => self.read_head(input, bytes, seen, now)?,
                Reading::Payload {
                    head,
                    wanted,
                    dropped,
                } => self.read_payload(input, head, wanted, dropped, now)?,
                Reading::PadLength { stream, left, end } => {
                    self.read_pad_length(input, stream, left, end)?;
                    None
                }
                Reading::Data {
                    stream,
                    left,
                    padding,
                    end,
                } => self.read_data(input, stream, left, padding, end),
                Reading::Skip(left) => {
                    let skipped = cut(input, left).len();
                    self.reading = skip(left - skipped);
                    None
                }
            };
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }

    /// A frame without payload is complete with its head.
    fn needs_no_input(&self) -> bool {
        match self.reading {
            Reading::Payload { wanted, .. } => wanted == self.partial.len(),
            Reading::Data { left, .. } => left == 0,
            _ => false,
        }
    }

    fn read_preface(
        &mut self,
        input: &mut &[u8],
        seen: usize,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let expected = PREFACE.get(seen..).unwrap_or_default();
        let got = cut(input, expected.len());
        if !expected.starts_with(got) {
            return Err(self.fail(Code::PROTOCOL_ERROR, "the preface is not that of HTTP/2"));
        }
        self.reading = if got.len() == expected.len() {
            Reading::NEXT
        } else {
            Reading::Preface(seen + got.len())
        };
        Ok(None)
    }

    fn read_head(
        &mut self,
        input: &mut &[u8],
        mut bytes: [u8; HEAD_BYTES],
        seen: usize,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let got = cut(input, HEAD_BYTES - seen);
        if let Some(into) = bytes.get_mut(seen..seen + got.len()) {
            into.copy_from_slice(got);
        }
        if seen + got.len() < HEAD_BYTES {
            self.reading = Reading::Head(bytes, seen + got.len());
            return Ok(None);
        }
        let head = Head::read(bytes);
        self.reading = Reading::NEXT;
        self.admit(head)?;
        if head.kind == kind::DATA {
            return self.begin_data(head, now);
        }
        self.begin_payload(head, now)?;
        Ok(None)
    }

    /// Rules that hold for every frame (sections 3.4, 4.2, 5.1, 6.2, 6.6 and 6.10).
    fn admit(&mut self, head: Head) -> Result<(), ConnectionError> {
        let is_settings = head.kind == kind::SETTINGS && !head.has(flag::ACK);
        if !self.peer.greeted && !is_settings {
            return Err(self.fail(Code::PROTOCOL_ERROR, "the first frame is not SETTINGS"));
        }
        if head.length > MAX_FRAME_BYTES {
            return Err(self.fail(Code::FRAME_SIZE_ERROR, "a frame is larger than we allow"));
        }
        let expected = self.block.as_ref().map(|block| block.stream);
        let continues = head.kind == kind::CONTINUATION;
        if continues != expected.is_some() || (continues && expected != Some(head.stream)) {
            return Err(self.fail(
                Code::PROTOCOL_ERROR,
                "a header block is interrupted or continued",
            ));
        }
        match head.kind {
            kind::PUSH_PROMISE => {
                Err(self.fail(Code::PROTOCOL_ERROR, "PUSH_PROMISE is not allowed"))
            }
            kind::SETTINGS | kind::PING | kind::GOAWAY if head.stream != 0 => Err(self.fail(
                Code::PROTOCOL_ERROR,
                "a frame of the connection names a stream",
            )),
            kind::DATA | kind::HEADERS | kind::PRIORITY | kind::RST_STREAM if head.stream == 0 => {
                Err(self.fail(Code::PROTOCOL_ERROR, "a frame of a stream names none"))
            }
            kind::DATA | kind::RST_STREAM | kind::WINDOW_UPDATE if self.is_idle(head.stream) => {
                Err(self.fail(
                    Code::PROTOCOL_ERROR,
                    "a frame for a stream that nobody has opened",
                ))
            }
            _ => Ok(()),
        }
    }

    /// Section 5.1: neither side has used the number. Streams are opened by clients only.
    fn is_idle(&self, stream: u32) -> bool {
        stream != 0 && (stream.is_multiple_of(2) || stream > self.newest)
    }

    fn header_list_limit(&self) -> usize {
        let limit = match self.role {
            Role::Client => CLIENT_HEADER_LIST_BYTES,
            Role::Server { .. } => SERVER_HEADER_LIST_BYTES,
        };
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    /// Lengths of frames other than DATA (section 6).
    fn begin_payload(&mut self, head: Head, now: Instant) -> Result<(), ConnectionError> {
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        let block_limit = self.header_list_limit();
        let (valid, wanted) = match head.kind {
            kind::PRIORITY => (length == 5, 0),
            kind::RST_STREAM | kind::WINDOW_UPDATE => (length == 4, 4),
            kind::PING => (length == 8, 8),
            kind::GOAWAY => (length >= 8, 8),
            kind::SETTINGS if head.has(flag::ACK) => (length == 0, 0),
            kind::SETTINGS => (length.is_multiple_of(6), length),
            kind::HEADERS | kind::CONTINUATION => (true, length),
            _ => (true, 0),
        };
        if !valid {
            return Err(self.fail(Code::FRAME_SIZE_ERROR, "a frame has an impossible length"));
        }
        let most = match head.kind {
            kind::SETTINGS => 6 * MAX_SETTINGS_PER_FRAME,
            kind::HEADERS => block_limit + HEADERS_EXTRA_BYTES + MAX_PADDING_BYTES,
            kind::CONTINUATION => block_limit,
            _ => length,
        };
        if wanted > most {
            return Err(self.fail(
                Code::ENHANCE_YOUR_CALM,
                "a frame is larger than its kind needs",
            ));
        }
        let known = head.kind <= kind::CONTINUATION && head.kind != kind::PRIORITY;
        if !known {
            self.count_empty(now)?;
        }
        self.partial.clear();
        self.reading = if known {
            Reading::Payload {
                head,
                wanted,
                dropped: length - wanted,
            }
        } else {
            skip(length)
        };
        Ok(())
    }

    fn read_payload(
        &mut self,
        input: &mut &[u8],
        head: Head,
        wanted: usize,
        dropped: usize,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let got = cut(input, wanted - self.partial.len());
        if got.len() == wanted {
            self.reading = skip(dropped);
            return self.frame(head, got, now);
        }
        self.partial.extend_from_slice(got);
        if self.partial.len() < wanted {
            return Ok(None);
        }
        self.reading = skip(dropped);
        let payload = std::mem::take(&mut self.partial);
        self.frame(head, &payload, now)
    }

    fn frame(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        match head.kind {
            kind::HEADERS => self.headers(head, payload, now),
            kind::CONTINUATION => self.continuation(head, payload, now),
            kind::RST_STREAM => self.reset_by_peer(head.stream, Code(read_u32(payload))),
            kind::SETTINGS => self.settings(head, payload, now),
            kind::PING => self.ping_received(head, payload, now),
            kind::GOAWAY => Ok(self.goes_away(read_u32(payload) & 0x7fff_ffff)),
            kind::WINDOW_UPDATE => self.window_update(head.stream, read_u32(payload) & 0x7fff_ffff),
            _ => Ok(None),
        }
    }

    /// Section 6.1. Padding counts against the windows and comes back at once.
    fn begin_data(
        &mut self,
        head: Head,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let left = usize::try_from(head.length).unwrap_or(usize::MAX);
        let (stream, end) = (head.stream, head.has(flag::END_STREAM));
        self.receive_window -= i64::from(head.length);
        if self.receive_window < 0 {
            return Err(self.fail(
                Code::FLOW_CONTROL_ERROR,
                "more DATA than the connection's window",
            ));
        }
        self.owed = self.owed.saturating_add(head.length);
        self.credit_connection();
        if left == 0 && !end {
            self.count_empty(now)?;
        }
        if head.has(flag::PADDED) && left == 0 {
            return Err(self.fail(Code::FRAME_SIZE_ERROR, "a padded frame has no pad length"));
        }
        let refused = match self.streams.get_mut(&stream) {
            None if self.forgotten.contains(&stream) => return self.skip_data(left),
            None => Some(Code::STREAM_CLOSED),
            Some(state) if state.reset.is_some() => return self.skip_data(left),
            Some(state) if state.got_end => Some(Code::STREAM_CLOSED),
            Some(state) if !state.answered => Some(Code::PROTOCOL_ERROR),
            Some(state) => {
                state.receive_window -= i64::from(head.length);
                (state.receive_window < 0).then_some(Code::FLOW_CONTROL_ERROR)
            }
        };
        if let Some(code) = refused {
            self.reading = skip(left);
            return self.reset_for_mistake(stream, code);
        }
        self.reading = if head.has(flag::PADDED) {
            Reading::PadLength { stream, left, end }
        } else {
            Reading::Data {
                stream,
                left,
                padding: 0,
                end,
            }
        };
        Ok(None)
    }

    fn skip_data(&mut self, left: usize) -> Result<Option<Event<'static>>, ConnectionError> {
        self.reading = skip(left);
        Ok(None)
    }

    fn read_pad_length(
        &mut self,
        input: &mut &[u8],
        stream: u32,
        left: usize,
        end: bool,
    ) -> Result<(), ConnectionError> {
        let Some(length) = cut(input, 1).first() else {
            return Ok(());
        };
        let padding = usize::from(*length);
        let Some(payload) = (left - 1).checked_sub(padding) else {
            return Err(self.fail(Code::PROTOCOL_ERROR, "padding is longer than its frame"));
        };
        self.credit_stream(stream, u32::from(*length) + 1);
        self.reading = Reading::Data {
            stream,
            left: payload,
            padding,
            end,
        };
        Ok(())
    }

    fn read_data<'a>(
        &mut self,
        input: &mut &'a [u8],
        stream: u32,
        left: usize,
        padding: usize,
        end: bool,
    ) -> Option<Event<'a>> {
        // It may have been reset since the frame began.
        let state = self.streams.get_mut(&stream);
        let state = state.filter(|state| state.reset.is_none());
        if left == 0 {
            self.reading = skip(padding);
            let state = state.filter(|_| end)?;
            state.got_end = true;
            self.settle(stream);
            return Some(Event::End { stream });
        }
        let bytes = cut(input, left);
        self.reading = Reading::Data {
            stream,
            left: left - bytes.len(),
            padding,
            end,
        };
        self.calm.frames = 0;
        let state = state?;
        state.undelivered += bytes.len();
        self.undelivered += bytes.len();
        Some(Event::Data { stream, bytes })
    }

    fn headers(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let Some(fragment) = without_extras(head, payload) else {
            return Err(self.fail(Code::PROTOCOL_ERROR, "HEADERS with too much padding"));
        };
        let end = head.has(flag::END_STREAM);
        if head.has(flag::END_HEADERS) {
            return self.message(head.stream, fragment, end, now);
        }
        self.block = Some(Block {
            stream: head.stream,
            end,
            bytes: fragment.to_vec(),
            continuations: 0,
        });
        Ok(None)
    }

    /// Section 6.10, within limits: a block that never ends would cost memory and time.
    fn continuation(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let limit = self.header_list_limit();
        let Some(mut block) = self.block.take() else {
            return Ok(None);
        };
        block.continuations += 1;
        block.bytes.extend_from_slice(payload);
        if block.continuations > MAX_CONTINUATION_FRAMES || block.bytes.len() > limit {
            return Err(self.fail(Code::ENHANCE_YOUR_CALM, "a header block is too long"));
        }
        if head.has(flag::END_HEADERS) {
            return self.message(block.stream, &block.bytes, block.end, now);
        }
        self.block = Some(block);
        Ok(None)
    }

    /// A whole header block. It is decoded even if nobody wants it, for the decoder's sake (section 4.3).
    fn message(
        &mut self,
        stream: u32,
        block: &[u8],
        end: bool,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let limit = self.header_list_limit();
        let message = match Message::decode(&mut self.decoder, block, limit) {
            Ok(message) => message,
            Err(error) => return Err(self.fail(Code::COMPRESSION_ERROR, undecodable(error))),
        };
        match self.role {
            Role::Server { streams } if stream > self.newest => {
                self.request(stream, message, end, streams)
            }
            _ if self.is_idle(stream) => Err(self.fail(
                Code::PROTOCOL_ERROR,
                "HEADERS on a stream that we have not opened",
            )),
            _ => self.later_message(stream, message, end, now),
        }
    }

    fn request(
        &mut self,
        stream: u32,
        message: Message,
        end: bool,
        allowed: u32,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        if stream.is_multiple_of(2) {
            return Err(self.fail(Code::PROTOCOL_ERROR, "a client opened an even stream"));
        }
        if self.leaving {
            // Section 6.8: beyond what GOAWAY named, so it is as if it had never come.
            self.newest = stream;
            self.forget(stream);
            return Ok(None);
        }
        self.newest = stream;
        // Streams that are over on the wire but still served here count too, at twice the number: an attacker who
        // resets at once would else have as many served as it likes.
        let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
        if self.open >= allowed || self.streams.len() >= allowed.saturating_mul(2) {
            self.answer(|out| super::frame::put_reset(out, stream, Code::REFUSED_STREAM))?;
            self.forget(stream);
            return Ok(None);
        }
        match message.into_request() {
            Ok(request) => {
                self.enter(stream, true, X::default());
                if end && let Some(state) = self.streams.get_mut(&stream) {
                    state.got_end = true;
                }
                self.calm.frames = 0;
                let request = Box::new(request);
                Ok(Some(Event::Request { stream, request }))
            }
            Err(fault) => self.reset_for_mistake(stream, code_of(fault)),
        }
    }

    /// HEADERS on a stream that is there: a client's answer, and nothing else (section 8.5).
    fn later_message(
        &mut self,
        stream: u32,
        message: Message,
        end: bool,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let Some(state) = self.streams.get_mut(&stream) else {
            if self.forgotten.contains(&stream) {
                return Ok(None);
            }
            return Err(self.fail(Code::STREAM_CLOSED, "HEADERS on a stream that was over"));
        };
        if state.reset.is_some() {
            return Ok(None);
        }
        if state.got_end {
            return self.reset_for_mistake(stream, Code::STREAM_CLOSED);
        }
        if state.answered {
            return self.reset_for_mistake(stream, Code::PROTOCOL_ERROR);
        }
        match message.into_response() {
            Ok((status, _)) if status.is_informational() => {
                self.count_empty(now)?;
                if end {
                    return self.reset_for_mistake(stream, Code::PROTOCOL_ERROR);
                }
                Ok(None)
            }
            Ok((status, headers)) => {
                state.answered = true;
                state.got_end = end;
                self.settle(stream);
                Ok(Some(Event::Response {
                    stream,
                    status,
                    headers,
                }))
            }
            Err(fault) => self.reset_for_mistake(stream, code_of(fault)),
        }
    }

    fn reset_by_peer(
        &mut self,
        stream: u32,
        code: Code,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let Some(state) = self.streams.get_mut(&stream) else {
            return Ok(None);
        };
        if state.reset.is_some() || (state.sent_end && state.got_end) {
            return Ok(None);
        }
        state.reset = Some(code);
        if !state.taken {
            self.untaken_resets += 1;
            if self.untaken_resets > MAX_PENDING_RESET_STREAMS {
                return Err(self.fail(
                    Code::ENHANCE_YOUR_CALM,
                    "streams are opened and reset at once",
                ));
            }
        }
        self.settle(stream);
        Ok(Some(Event::Reset { stream }))
    }

    /// A stream error (section 5.4.2). Peers that make many are made to go (CVE-2025-8671).
    fn reset_for_mistake(
        &mut self,
        stream: u32,
        code: Code,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        self.error_resets += 1;
        if self.error_resets > MAX_LOCAL_ERROR_RESETS {
            return Err(self.fail(Code::ENHANCE_YOUR_CALM, "too many streams had to be reset"));
        }
        self.answer(|out| super::frame::put_reset(out, stream, code))?;
        let Some(state) = self.streams.get_mut(&stream) else {
            self.forget(stream);
            return Ok(None);
        };
        state.reset = Some(code);
        self.settle(stream);
        Ok(Some(Event::Reset { stream }))
    }

    /// Section 6.5.
    fn settings(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        self.count_empty(now)?;
        if head.has(flag::ACK) {
            self.decoder.allow(0);
            return Ok(None);
        }
        for pair in payload.chunks_exact(6) {
            let [a, b, value @ ..] = pair else { continue };
            self.set(u16::from_be_bytes([*a, *b]), read_u32(value))?;
        }
        self.peer.greeted = true;
        self.answer(|out| put(out, kind::SETTINGS, flag::ACK, 0, &[]))?;
        Ok(Some(Event::Credit))
    }

    fn set(&mut self, name: u16, value: u32) -> Result<(), ConnectionError> {
        match name {
            setting::ENABLE_PUSH if value > 1 || (value == 1 && self.role == Role::Client) => {
                Err(self.fail(Code::PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH is wrong"))
            }
            setting::MAX_CONCURRENT_STREAMS => {
                self.peer.max_streams = Some(value);
                Ok(())
            }
            setting::MAX_FRAME_SIZE if !(MIN_MAX_FRAME..=MAX_MAX_FRAME).contains(&value) => {
                Err(self.fail(Code::PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE is wrong"))
            }
            setting::MAX_FRAME_SIZE => {
                self.peer.max_frame = value;
                Ok(())
            }
            setting::INITIAL_WINDOW_SIZE => self.set_initial_window(value),
            // Table and list sizes bind an encoder that needs neither; unknown ones are ignored.
            _ => Ok(()),
        }
    }

    /// Section 6.9.2: windows of open streams change by the difference, and may become negative.
    fn set_initial_window(&mut self, value: u32) -> Result<(), ConnectionError> {
        let change = i64::from(value) - i64::from(self.peer.initial_window);
        let mut valid = i64::from(value) <= MAX_WINDOW;
        for state in self.streams.values_mut() {
            state.send_window += change;
            valid &= state.send_window <= MAX_WINDOW;
        }
        self.peer.initial_window = value;
        if !valid {
            return Err(self.fail(
                Code::FLOW_CONTROL_ERROR,
                "SETTINGS_INITIAL_WINDOW_SIZE is too large",
            ));
        }
        Ok(())
    }

    /// Section 6.7.
    fn ping_received(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        self.count_empty(now)?;
        if head.has(flag::ACK) {
            return Ok(Some(Event::Pong));
        }
        self.answer(|out| put(out, kind::PING, flag::ACK, 0, payload))?;
        Ok(None)
    }

    /// Section 6.8: streams above the last one were not looked at.
    fn goes_away(&mut self, last: u32) -> Option<Event<'static>> {
        self.peer_leaves = true;
        if self.role == Role::Client {
            let beyond: Vec<u32> = self
                .streams
                .iter()
                .filter(|(stream, state)| **stream > last && state.reset.is_none())
                .map(|(stream, _)| *stream)
                .collect();
            for stream in beyond {
                if let Some(state) = self.streams.get_mut(&stream) {
                    state.reset = Some(Code::REFUSED_STREAM);
                }
                self.settle(stream);
            }
        }
        Some(Event::GoAway)
    }

    /// Section 6.9.
    fn window_update(
        &mut self,
        stream: u32,
        increment: u32,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        if stream == 0 {
            self.send_window += i64::from(increment);
            if increment == 0 {
                return Err(self.fail(Code::PROTOCOL_ERROR, "WINDOW_UPDATE of nothing"));
            }
            if self.send_window > MAX_WINDOW {
                return Err(self.fail(
                    Code::FLOW_CONTROL_ERROR,
                    "the connection's window is too large",
                ));
            }
            return Ok(Some(Event::Credit));
        }
        let Some(state) = self.streams.get_mut(&stream) else {
            return Ok(None);
        };
        if state.reset.is_some() {
            return Ok(None);
        }
        state.send_window += i64::from(increment);
        let too_large = state.send_window > MAX_WINDOW;
        if increment == 0 {
            return self.reset_for_mistake(stream, Code::PROTOCOL_ERROR);
        }
        if too_large {
            return self.reset_for_mistake(stream, Code::FLOW_CONTROL_ERROR);
        }
        Ok(Some(Event::StreamCredit { stream }))
    }

    /// Queues an answer that the peer asked for. A peer that asks and does not read would fill our memory.
    fn answer(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), ConnectionError> {
        if self.control.len() >= MAX_QUEUED_ANSWER_BYTES {
            return Err(self.fail(Code::ENHANCE_YOUR_CALM, "answers are not read"));
        }
        write(&mut self.control);
        Ok(())
    }

    /// Counts a frame that carries nothing.
    fn count_empty(&mut self, now: Instant) -> Result<(), ConnectionError> {
        let over = |since| now.saturating_duration_since(since) >= Duration::from_secs(1);
        if self.calm.since.is_none_or(over) {
            self.calm.since = Some(now);
            self.calm.frames = 0;
        }
        self.calm.frames += 1;
        if self.calm.frames > MAX_EMPTY_FRAMES_PER_SECOND {
            return Err(self.fail(
                Code::ENHANCE_YOUR_CALM,
                "too many frames that carry nothing",
            ));
        }
        Ok(())
    }
}

fn code_of(fault: Fault) -> Code {
    match fault {
        Fault::Malformed => Code::PROTOCOL_ERROR,
        Fault::TooLarge => Code::ENHANCE_YOUR_CALM,
    }
}

fn undecodable(error: DecodeError) -> &'static str {
    match error {
        DecodeError::Truncated => "a header block is truncated",
        DecodeError::Integer => "an integer in a header block is too large",
        DecodeError::Index => "an index in a header block names no entry",
        DecodeError::Huffman => "a Huffman string in a header block is wrong",
        DecodeError::TableSize => "a header table size is wrong",
    }
}

/// The block fragment of HEADERS: without padding and deprecated priority (section 6.2).
fn without_extras(head: Head, payload: &[u8]) -> Option<&[u8]> {
    let (mut rest, mut padding) = (payload, 0);
    if head.has(flag::PADDED) {
        let (length, after) = rest.split_first()?;
        (rest, padding) = (after, usize::from(*length));
    }
    if head.has(flag::PRIORITY) {
        rest = rest.get(5..)?;
    }
    rest.get(..rest.len().checked_sub(padding)?)
}

/// Cuts at most `length` bytes off the front.
fn cut<'a>(input: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (front, rest) = input.split_at(length.min(input.len()));
    *input = rest;
    front
}

fn skip(length: usize) -> Reading {
    if length == 0 {
        Reading::NEXT
    } else {
        Reading::Skip(length)
    }
}
