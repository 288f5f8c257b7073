//! What the peer sends: bytes become frames, and DATA events. Every rule that a frame's head can break is here; what other
//! frames mean is in `frames`.

use std::time::Instant;

use super::{
    super::frame::{HEAD_BYTES, Head, PREFACE, flag, kind},
    CLIENT_HEADER_LIST_BYTES, Code, Connection, ConnectionError, Event, MAX_FRAME_BYTES, Role,
    SERVER_HEADER_LIST_BYTES,
    frames::Block,
};
use crate::proxy::limits::MAX_SETTINGS_PER_FRAME;

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
                    self.read_pad_length(input, stream, left, end, now)?;
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
        let expected = self.block.as_ref().map(Block::stream);
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
    pub(super) fn is_idle(&self, stream: u32) -> bool {
        stream != 0 && (stream.is_multiple_of(2) || stream > self.newest)
    }

    pub(super) fn header_list_limit(&self) -> usize {
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

    /// Section 6.1. Padding counts against the windows and comes back at once.
    fn begin_data(
        &mut self,
        head: Head,
        now: Instant,
    ) -> Result<Option<Event<'static>>, ConnectionError> {
        let left = usize::try_from(head.length).unwrap_or(usize::MAX);
        let (stream, end) = (head.stream, head.has(flag::END_STREAM));
        self.credit_connection(head.length);
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
        now: Instant,
    ) -> Result<(), ConnectionError> {
        let Some(length) = cut(input, 1).first() else {
            return Ok(());
        };
        let padding = usize::from(*length);
        let Some(payload) = (left - 1).checked_sub(padding) else {
            return Err(self.fail(Code::PROTOCOL_ERROR, "padding is longer than its frame"));
        };
        if payload == 0 && !end {
            self.count_empty(now)?;
        }
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
        Some(Event::Data { stream, bytes })
    }
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
