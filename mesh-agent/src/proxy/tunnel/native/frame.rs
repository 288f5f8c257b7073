//! Frames of HTTP/2 as bytes (RFC 9113 sections 4 and 6). Nothing here keeps state.

use std::fmt;

/// What a client says first (RFC 9113 section 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length of a frame's head.
pub const HEAD_BYTES: usize = 9;
/// Smallest value that a peer may allow, and what it allows before its settings have come (section 4.2).
pub const MIN_MAX_FRAME: u32 = 16_384;
/// Largest value that a peer may allow (section 6.5.2).
pub const MAX_MAX_FRAME: u32 = 16_777_215;
/// Windows before settings have come (section 6.9.2).
pub const DEFAULT_WINDOW: u32 = 65_535;
/// Largest window (section 6.9.1).
pub const MAX_WINDOW: i64 = 0x7fff_ffff;
/// The last number that a stream can have (RFC 9113 section 5.1.1).
pub const MAX_STREAM: u32 = 0x7fff_ffff;
/// What a PING carries whose answer means that the peer has seen our first GOAWAY.
pub const LEAVING: [u8; 8] = *b"leaving!";

/// Frame types.
pub mod kind {
    /// Bytes of a stream.
    pub const DATA: u8 = 0;
    /// Opens a stream, or answers.
    pub const HEADERS: u8 = 1;
    /// Deprecated, ignored.
    pub const PRIORITY: u8 = 2;
    /// Ends a stream at once.
    pub const RST_STREAM: u8 = 3;
    /// Parameters.
    pub const SETTINGS: u8 = 4;
    /// Never allowed here.
    pub const PUSH_PROMISE: u8 = 5;
    /// Asks for an answer.
    pub const PING: u8 = 6;
    /// No more streams.
    pub const GOAWAY: u8 = 7;
    /// Credit.
    pub const WINDOW_UPDATE: u8 = 8;
    /// More of a header block.
    pub const CONTINUATION: u8 = 9;
}

/// Frame flags.
pub mod flag {
    /// DATA, HEADERS: the sender's last on this stream.
    pub const END_STREAM: u8 = 0x1;
    /// SETTINGS, PING: an answer.
    pub const ACK: u8 = 0x1;
    /// HEADERS, CONTINUATION: the block is whole.
    pub const END_HEADERS: u8 = 0x4;
    /// DATA, HEADERS: a pad length comes first.
    pub const PADDED: u8 = 0x8;
    /// HEADERS: five bytes of deprecated priority come first.
    pub const PRIORITY: u8 = 0x20;
}

/// Parameters (section 6.5.2).
pub mod setting {
    /// Dynamic table of the header decoder.
    pub const HEADER_TABLE_SIZE: u16 = 1;
    /// Server push.
    pub const ENABLE_PUSH: u16 = 2;
    /// Streams that the peer may open.
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    /// Window of new streams.
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    /// Largest payload of a frame.
    pub const MAX_FRAME_SIZE: u16 = 5;
    /// Largest header list, a wish.
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Why a stream or a connection ended (section 7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    /// Not an error.
    pub const NO_ERROR: Self = Self(0);
    /// Broke the protocol in a way that has no code of its own.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Sent more than the window allowed, or made a window too large.
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    /// A frame for a stream that was over.
    pub const STREAM_CLOSED: Self = Self(5);
    /// A frame of an impossible length.
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    /// Not processed at all.
    pub const REFUSED_STREAM: Self = Self(7);
    /// No longer wanted.
    pub const CANCEL: Self = Self(8);
    /// The header block cannot be decoded.
    pub const COMPRESSION_ERROR: Self = Self(9);
    /// Too much of something.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::NO_ERROR => "NO_ERROR",
            Self::PROTOCOL_ERROR => "PROTOCOL_ERROR",
            Self::FLOW_CONTROL_ERROR => "FLOW_CONTROL_ERROR",
            Self::STREAM_CLOSED => "STREAM_CLOSED",
            Self::FRAME_SIZE_ERROR => "FRAME_SIZE_ERROR",
            Self::REFUSED_STREAM => "REFUSED_STREAM",
            Self::CANCEL => "CANCEL",
            Self::COMPRESSION_ERROR => "COMPRESSION_ERROR",
            Self::ENHANCE_YOUR_CALM => "ENHANCE_YOUR_CALM",
            Self(other) => return write!(f, "error {other}"),
        })
    }
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Bytes of payload, below 2^24.
    pub length: u32,
    /// One of [`kind`], or unknown.
    pub kind: u8,
    /// Of [`flag`].
    pub flags: u8,
    /// 0 for the connection.
    pub stream: u32,
}

impl Head {
    /// Reads a head; the reserved bit is ignored (section 4.1).
    #[must_use]
    pub fn read(bytes: [u8; HEAD_BYTES]) -> Self {
        let [a, b, c, kind, flags, s, t, u, v] = bytes;
        Self {
            length: u32::from_be_bytes([0, a, b, c]),
            kind,
            flags,
            stream: u32::from_be_bytes([s & 0x7f, t, u, v]),
        }
    }

    /// Writes a head.
    #[must_use]
    pub fn bytes(self) -> [u8; HEAD_BYTES] {
        let [_, a, b, c] = self.length.to_be_bytes();
        let [s, t, u, v] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, s, t, u, v]
    }

    /// Whether a flag is set.
    #[must_use]
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The head of a DATA frame.
#[must_use]
pub fn data_head(stream: u32, length: usize, end: bool) -> [u8; HEAD_BYTES] {
    Head {
        length: u32::try_from(length).unwrap_or(MAX_MAX_FRAME),
        kind: kind::DATA,
        flags: if end { flag::END_STREAM } else { 0 },
        stream,
    }
    .bytes()
}

/// Appends a frame. The payload is at most [`MIN_MAX_FRAME`] long.
pub fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let head = Head {
        length: u32::try_from(payload.len()).unwrap_or(MAX_MAX_FRAME),
        kind,
        flags,
        stream,
    };
    out.extend_from_slice(&head.bytes());
    out.extend_from_slice(payload);
}

/// Appends SETTINGS.
pub fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    let payload: Vec<u8> = settings
        .iter()
        .flat_map(|(name, value)| {
            let [a, b] = name.to_be_bytes();
            let [c, d, e, f] = value.to_be_bytes();
            [a, b, c, d, e, f]
        })
        .collect();
    put(out, kind::SETTINGS, 0, 0, &payload);
}

/// Appends RST_STREAM.
pub fn put_reset(out: &mut Vec<u8>, stream: u32, code: Code) {
    put(out, kind::RST_STREAM, 0, stream, &code.0.to_be_bytes());
}

/// Appends WINDOW_UPDATE; an increment of 0 is none.
pub fn put_window_update(out: &mut Vec<u8>, stream: u32, increment: u32) {
    if increment > 0 {
        put(
            out,
            kind::WINDOW_UPDATE,
            0,
            stream,
            &increment.to_be_bytes(),
        );
    }
}

/// Appends GOAWAY.
pub fn put_go_away(out: &mut Vec<u8>, last: u32, code: Code) {
    let mut payload = last.to_be_bytes().to_vec();
    payload.extend_from_slice(&code.0.to_be_bytes());
    put(out, kind::GOAWAY, 0, 0, &payload);
}

/// Appends a header block, split over HEADERS and CONTINUATION where it is longer than `max_frame`.
pub fn put_headers(out: &mut Vec<u8>, stream: u32, block: &[u8], end: bool, max_frame: usize) {
    let mut pieces = block.chunks(max_frame.max(1)).peekable();
    let (mut kind, mut flags) = (kind::HEADERS, if end { flag::END_STREAM } else { 0 });
    loop {
        let piece = pieces.next().unwrap_or_default();
        let last = pieces.peek().is_none();
        if last {
            flags |= flag::END_HEADERS;
        }
        put(out, kind, flags, stream, piece);
        if last {
            return;
        }
        (kind, flags) = (kind::CONTINUATION, 0);
    }
}

/// Reads a big-endian number of four bytes; missing bytes read as 0, lengths are checked before.
#[must_use]
pub fn read_u32(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .copied()
        .map(u32::from_be_bytes)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_reads_as_it_was_written() {
        let head = Head {
            length: 0x01_0203,
            kind: kind::CONTINUATION,
            flags: flag::END_HEADERS,
            stream: 0x7fff_fffd,
        };
        assert_eq!(Head::read(head.bytes()), head);
    }

    #[test]
    fn the_reserved_bit_is_ignored() {
        let read = Head::read([0, 0, 1, 0, 0, 0x80, 0, 0, 5]);
        assert_eq!(read.stream, 5);
    }

    #[test]
    fn a_long_block_is_continued() {
        let mut out = Vec::new();
        put_headers(&mut out, 1, &[7; 25], true, 10);
        let heads: Vec<Head> = [0, 19, 38]
            .iter()
            .map(|at| Head::read(*out[*at..].first_chunk().expect("a head")))
            .collect();
        let seen: Vec<_> = heads.iter().map(|h| (h.kind, h.flags, h.length)).collect();
        assert_eq!(
            seen,
            [
                (kind::HEADERS, flag::END_STREAM, 10),
                (kind::CONTINUATION, 0, 10),
                (kind::CONTINUATION, flag::END_HEADERS, 5)
            ]
        );
        assert_eq!(out.len(), 3 * HEAD_BYTES + 25);
    }
}
