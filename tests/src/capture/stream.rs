//! One direction of a TCP connection: bytes put in order, and judged as TLS records.

use std::collections::BTreeMap;

/// Largest TLS record body: 2^14 bytes of content and 256 of expansion (RFC 8446 section 5.2).
const RECORD_BODY_MAX_BYTES: usize = (1 << 14) + 256;

/// Bytes of the header of a TLS record.
const RECORD_HEADER_BYTES: usize = 5;

/// Content types change_cipher_spec to application_data (RFC 8446 section 5.1).
const CONTENT_TYPES: std::ops::RangeInclusive<u8> = 20..=23;

const HANDSHAKE: u8 = 22;

/// Segments kept while an earlier one is missing; a capture that lost this much is no evidence.
const OUT_OF_ORDER_MAX_SEGMENTS: usize = 4096;

/// What became of the bytes of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes of well-formed TLS records, headers included.
    pub tls_bytes: u64,
    /// Bytes that are not TLS.
    pub plaintext_bytes: u64,
    /// Bytes that could not be judged: the beginning of the connection or a part of it was not captured.
    pub unjudged_bytes: u64,
}

/// Where the judge is within the records of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Bytes of the header seen so far.
    Header {
        seen: usize,
        bytes: [u8; RECORD_HEADER_BYTES],
    },
    /// Bytes of the body still to come.
    Body { left: usize },
    /// It was not TLS; nothing that follows is.
    Plaintext,
}

const NEXT_RECORD: State = State::Header {
    seen: 0,
    bytes: [0; RECORD_HEADER_BYTES],
};

/// Judges the bytes of one direction of a connection.
#[derive(Debug)]
pub struct Stream {
    next: Option<u32>,
    waiting: BTreeMap<u32, Vec<u8>>,
    first_record: bool,
    began_at: Option<u32>,
    state: State,
    counts: Counts,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            next: None,
            waiting: BTreeMap::new(),
            first_record: true,
            began_at: None,
            state: NEXT_RECORD,
            counts: Counts::default(),
        }
    }
}

impl Stream {
    /// Takes a segment. `syn` begins the connection; without one, judging begins at the first segment that starts
    /// like a record, as a connection older than the capture.
    pub fn segment(&mut self, sequence: u32, syn: bool, payload: &[u8]) {
        if syn {
            if self.began_at(sequence) {
                return;
            }
            self.next = Some(sequence.wrapping_add(1));
            self.began_at = Some(sequence);
            // Data in a SYN (TCP Fast Open) follows the SYN's own sequence number.
            self.in_order(sequence.wrapping_add(1), payload);
            return;
        }
        if payload.is_empty() {
            return;
        }
        if self.next.is_none() {
            if !looks_like_record(payload) {
                self.counts.unjudged_bytes += payload.len() as u64;
                return;
            }
            self.first_record = false;
            self.next = Some(sequence);
        }
        self.in_order(sequence, payload);
    }

    /// Whether the connection began with a SYN of this sequence number.
    #[must_use]
    pub fn began_at(&self, sequence: u32) -> bool {
        self.began_at == Some(sequence)
    }

    /// Ends the stream: what waits for lost segments cannot be judged any more.
    #[must_use]
    pub fn finish(mut self) -> Counts {
        self.counts.unjudged_bytes += self
            .waiting
            .values()
            .map(|bytes| bytes.len() as u64)
            .sum::<u64>();
        if let State::Header { seen, .. } = self.state {
            // Less than a header is no record.
            self.counts.plaintext_bytes += seen as u64;
        }
        self.counts
    }

    fn in_order(&mut self, sequence: u32, payload: &[u8]) {
        let Some(next) = self.next else { return };
        // Sequence numbers wrap: the distance as a signed number tells earlier from later (RFC 9293 section 3.4).
        let ahead = sequence.wrapping_sub(next).cast_signed();
        if ahead > 0 {
            if self.waiting.len() >= OUT_OF_ORDER_MAX_SEGMENTS {
                self.counts.unjudged_bytes += payload.len() as u64;
            } else {
                let known = self.waiting.entry(sequence).or_default();
                if known.len() < payload.len() {
                    *known = payload.to_vec();
                }
            }
            return;
        }
        let repeated = ahead.unsigned_abs() as usize;
        let Some(fresh) = payload.get(repeated..).filter(|fresh| !fresh.is_empty()) else {
            return;
        };
        self.judge(fresh);
        // A segment has at most 64 KiB, or 512 KiB as one large packet of the sender.
        self.next = Some(next.wrapping_add(fresh.len() as u32));
        self.take_waiting();
    }

    fn take_waiting(&mut self) {
        while let Some(next) = self.next {
            let ready = self
                .waiting
                .keys()
                .copied()
                .find(|sequence| sequence.wrapping_sub(next).cast_signed() <= 0);
            let Some(sequence) = ready else { return };
            if let Some(payload) = self.waiting.remove(&sequence) {
                self.in_order(sequence, &payload);
            }
        }
    }

    fn judge(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = match self.state {
                State::Plaintext => {
                    self.counts.plaintext_bytes += bytes.len() as u64;
                    bytes.len()
                }
                State::Body { left } => self.body(left, bytes),
                State::Header {
                    seen,
                    bytes: header,
                } => self.header(seen, header, bytes),
            };
            bytes = bytes.get(taken..).unwrap_or_default();
        }
    }

    fn body(&mut self, left: usize, bytes: &[u8]) -> usize {
        let taken = left.min(bytes.len());
        self.counts.tls_bytes += taken as u64;
        self.state = if taken == left {
            NEXT_RECORD
        } else {
            State::Body { left: left - taken }
        };
        taken
    }

    fn header(
        &mut self,
        seen: usize,
        mut header: [u8; RECORD_HEADER_BYTES],
        bytes: &[u8],
    ) -> usize {
        let taken = (RECORD_HEADER_BYTES - seen).min(bytes.len());
        header[seen..seen + taken].copy_from_slice(&bytes[..taken]);
        let seen = seen + taken;
        if seen < RECORD_HEADER_BYTES {
            self.state = State::Header {
                seen,
                bytes: header,
            };
            return taken;
        }
        match record_body_bytes(header) {
            Some(left) if !self.first_record || header[0] == HANDSHAKE => {
                self.first_record = false;
                self.counts.tls_bytes += RECORD_HEADER_BYTES as u64;
                self.state = State::Body { left };
            }
            _ => {
                self.counts.plaintext_bytes += RECORD_HEADER_BYTES as u64;
                self.state = State::Plaintext;
            }
        }
        taken
    }
}

fn looks_like_record(payload: &[u8]) -> bool {
    payload
        .first_chunk()
        .is_some_and(|header| record_body_bytes(*header).is_some())
}

/// Length of the body that a record header announces; `None` if it is not one. Legacy versions 0x0301 (first
/// ClientHello) and 0x0303 only (RFC 8446 section 5.1).
/// An empty body is legal for application data only and sent by nobody.
fn record_body_bytes([kind, major, minor, high, low]: [u8; RECORD_HEADER_BYTES]) -> Option<usize> {
    let body = usize::from(u16::from_be_bytes([high, low]));
    let version = major == 3 && (minor == 1 || minor == 3);
    (CONTENT_TYPES.contains(&kind) && version && (1..=RECORD_BODY_MAX_BYTES).contains(&body))
        .then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: usize) -> Vec<u8> {
        let length = u16::try_from(body)
            .expect("a record's length")
            .to_be_bytes();
        let mut record = vec![kind, 3, 3, length[0], length[1]];
        record.resize(RECORD_HEADER_BYTES + body, 0xab);
        record
    }

    fn connection() -> Vec<u8> {
        [
            record(22, 300),
            record(20, 1),
            record(23, 16_000),
            record(23, 40),
        ]
        .concat()
    }

    fn judged(segments: &[(u32, bool, &[u8])]) -> Counts {
        let mut stream = Stream::default();
        for (sequence, syn, payload) in segments {
            stream.segment(*sequence, *syn, payload);
        }
        stream.finish()
    }

    fn tls(bytes: usize) -> Counts {
        Counts {
            tls_bytes: bytes as u64,
            ..Counts::default()
        }
    }

    #[test]
    fn records_are_tls_however_they_are_cut() {
        let bytes = connection();
        for cut in [1, 2, 3, 4, 5, 304, 305, 306, 1000, bytes.len() - 1] {
            let (head, tail) = bytes.split_at(cut);
            let counts = judged(&[
                (99, true, b""),
                (100, false, head),
                (100 + cut as u32, false, tail),
            ]);
            assert_eq!(counts, tls(bytes.len()), "cut at {cut}");
        }
    }

    #[test]
    fn order_repeats_and_wrapping_do_not_matter() {
        let bytes = connection();
        let start = u32::MAX - 500;
        let at = |offset: usize| start.wrapping_add(1).wrapping_add(offset as u32);
        let counts = judged(&[
            (start, true, b""),
            (at(1000), false, &bytes[1000..]),
            (at(0), false, &bytes[..600]),
            (at(0), false, &bytes[..600]),
            (at(500), false, &bytes[500..1000]),
        ]);
        assert_eq!(counts, tls(bytes.len()));
    }

    #[test]
    fn http_is_plaintext_from_its_first_byte() {
        let request = b"GET / HTTP/1.1\r\n\r\n";
        let counts = judged(&[(9, true, b""), (10, false, request)]);
        assert_eq!(
            counts,
            Counts {
                plaintext_bytes: request.len() as u64,
                ..Counts::default()
            }
        );
    }

    #[test]
    fn plaintext_behind_honest_records_is_found() {
        let mut bytes = connection();
        let honest = bytes.len();
        bytes.extend(b"leaked bytes");
        let counts = judged(&[(9, true, b""), (10, false, &bytes)]);
        assert_eq!(
            counts,
            Counts {
                tls_bytes: honest as u64,
                plaintext_bytes: 12,
                unjudged_bytes: 0
            }
        );
    }

    #[test]
    fn a_connection_must_begin_with_a_handshake() {
        let bytes = record(23, 100);
        let counts = judged(&[(9, true, b""), (10, false, &bytes)]);
        assert_eq!(counts.plaintext_bytes, bytes.len() as u64);
    }

    #[test]
    fn a_short_tail_is_plaintext() {
        let counts = judged(&[(9, true, b""), (10, false, b"hi")]);
        assert_eq!(counts.plaintext_bytes, 2);
    }

    #[test]
    fn a_lost_segment_leaves_the_rest_unjudged() {
        let bytes = connection();
        let counts = judged(&[
            (9, true, b""),
            (10, false, &bytes[..100]),
            (200, false, &bytes[190..]),
        ]);
        assert_eq!(counts.tls_bytes, 100);
        assert_eq!(counts.unjudged_bytes, (bytes.len() - 190) as u64);
    }

    #[test]
    fn an_older_connection_is_judged_from_its_first_record_on() {
        let bytes = record(23, 100);
        let counts = judged(&[
            (50, false, b"\xff\xfftail of a record"),
            (68, false, &bytes),
        ]);
        assert_eq!(
            counts,
            Counts {
                tls_bytes: bytes.len() as u64,
                plaintext_bytes: 0,
                unjudged_bytes: 18
            }
        );
    }

    #[test]
    fn waiting_segments_are_bounded() {
        let mut stream = Stream::default();
        stream.segment(0, true, b"");
        for number in 0..=OUT_OF_ORDER_MAX_SEGMENTS as u32 {
            stream.segment(10 + 2 * number, false, b"x");
        }
        assert_eq!(stream.waiting.len(), OUT_OF_ORDER_MAX_SEGMENTS);
        assert_eq!(
            stream.finish().unjudged_bytes,
            OUT_OF_ORDER_MAX_SEGMENTS as u64 + 1
        );
    }
}
