//! What whole frames other than DATA mean: each becomes an event, an answer, or the end of a stream or of the connection.

use std::time::{Duration, Instant};

use super::{
    super::{
        frame::{self, Head, LEAVING, flag, kind, put, read_u32},
        hpack::DecodeError,
    },
    Code, Connection, ConnectionError, Event, MAX_EMPTY_FRAMES_PER_SECOND, MAX_LOCAL_ERROR_RESETS,
    MAX_MAX_FRAME, MAX_PENDING_RESET_STREAMS, MAX_QUEUED_ANSWER_BYTES, MAX_WINDOW, MIN_MAX_FRAME,
    Role,
    message::{Fault, Message},
    setting,
};
use crate::proxy::limits::{MAX_CONTINUATION_FRAMES, SMALL_CREDIT_BYTES};

/// A header block that CONTINUATION goes on with.
#[derive(Debug)]
pub(super) struct Block {
    stream: u32,
    end: bool,
    bytes: Vec<u8>,
    continuations: usize,
}

impl Block {
    /// Whose it is.
    pub(super) fn stream(&self) -> u32 {
        self.stream
    }
}

impl<X: Default> Connection<X> {
    /// A frame whose payload is complete.
    pub(super) fn frame(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        match head.kind {
            kind::HEADERS => self.headers(head, payload, now),
            kind::CONTINUATION => self.continuation(head, payload, now),
            kind::RST_STREAM => self.reset_by_peer(head.stream, Code(read_u32(payload)), now),
            kind::SETTINGS => self.settings(head, payload, now),
            kind::PING => self.ping_received(head, payload, now),
            kind::GOAWAY => self.goes_away(read_u32(payload) & 0x7fff_ffff, now),
            kind::WINDOW_UPDATE => {
                self.window_update(head.stream, read_u32(payload) & 0x7fff_ffff, now)
            }
            _ => Ok(None),
        }
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
                self.request(stream, message, end, streams, now)
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
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        if stream.is_multiple_of(2) {
            return Err(self.fail(Code::PROTOCOL_ERROR, "a client opened an even stream"));
        }
        if self.leaving {
            // Section 6.8: beyond what GOAWAY named, so it is as if it had never come.
            self.newest = stream;
            self.forget(stream);
            self.count_empty(now)?;
            return Ok(None);
        }
        self.newest = stream;
        // Streams that are over on the wire but still served here count too, at twice the number: an attacker who
        // resets at once would else have as many served as it likes.
        let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
        if self.open >= allowed || self.streams.len() >= allowed.saturating_mul(2) {
            self.count_empty(now)?;
            self.answer(|out| frame::put_reset(out, stream, Code::REFUSED_STREAM))?;
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
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let state = self.streams.get_mut(&stream).filter(|state| {
            // Else there is nothing left to reset.
            state.reset.is_none() && !(state.sent_end && state.got_end)
        });
        let Some(state) = state else {
            self.count_empty(now)?;
            return Ok(None);
        };
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
    pub(super) fn reset_for_mistake(
        &mut self,
        stream: u32,
        code: Code,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        self.error_resets += 1;
        if self.error_resets > MAX_LOCAL_ERROR_RESETS {
            return Err(self.fail(Code::ENHANCE_YOUR_CALM, "too many streams had to be reset"));
        }
        self.answer(|out| frame::put_reset(out, stream, code))?;
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
            self.settings_acknowledged();
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
            if self.announced && payload == LEAVING {
                self.take_no_more();
            }
            return Ok(Some(Event::Pong));
        }
        self.answer(|out| put(out, kind::PING, flag::ACK, 0, payload))?;
        Ok(None)
    }

    /// Section 6.8: streams above the last one were not looked at.
    fn goes_away(
        &mut self,
        last: u32,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        self.count_empty(now)?;
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
        Ok(Some(Event::GoAway))
    }

    /// Section 6.9.
    fn window_update(
        &mut self,
        stream: u32,
        increment: u32,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        if increment < SMALL_CREDIT_BYTES {
            self.count_empty(now)?;
        }
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

    /// Counts a frame that carries nothing. Honest peers have a reason for most of theirs: a byte or a request of theirs, or
    /// bytes of ours, forgive them all.
    pub(super) fn count_empty(&mut self, now: Instant) -> Result<(), ConnectionError> {
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
