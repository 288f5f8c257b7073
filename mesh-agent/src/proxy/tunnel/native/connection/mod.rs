//! The HTTP/2 state of one tunnel, without I/O: bytes in, events out, and frames to send in a queue (RFC 9113).
//!
//! It speaks for exactly CONNECT (section 8.5): a stream is a request or its answer, then DATA both ways. Both roles
//! share everything but who opens streams. What a stream means to its user is `X`, kept beside its protocol state.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    time::Instant,
};

use http::{HeaderMap, StatusCode, request::Parts};

use super::{
    frame::{self, Code, DEFAULT_WINDOW, MAX_MAX_FRAME, MAX_WINDOW, MIN_MAX_FRAME, setting},
    hpack::Decoder,
};
use crate::proxy::limits::{
    CLIENT_HEADER_LIST_BYTES, CONNECTION_WINDOW_BYTES, MAX_EMPTY_FRAMES_PER_SECOND,
    MAX_FRAME_BYTES, MAX_IGNORED_STREAMS, MAX_LOCAL_ERROR_RESETS, MAX_PENDING_RESET_STREAMS,
    MAX_QUEUED_ANSWER_BYTES, SERVER_HEADER_LIST_BYTES, STREAM_WINDOW_BYTES,
};

mod frames;
mod local;
mod message;
mod receive;

use frames::Block;
use receive::Reading;

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Opens streams.
    Client,
    /// Accepts them, so many at a time.
    Server {
        /// Announced as SETTINGS_MAX_CONCURRENT_STREAMS.
        streams: u32,
    },
}

/// The peer broke the protocol, or did too much of something. The connection is over; GOAWAY is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} ({code})")]
pub struct ConnectionError {
    /// What GOAWAY says.
    pub code: Code,
    /// What the peer did.
    pub what: &'static str,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A stream was opened by a request.
    Request {
        /// Its number.
        stream: u32,
        /// Method, authority and headers.
        request: Box<Parts>,
    },
    /// The final answer to our request.
    Response {
        /// To which.
        stream: u32,
        /// Status.
        status: StatusCode,
        /// Headers.
        headers: HeaderMap,
    },
    /// Bytes of a stream; they count against its window until [`Connection::consumed`].
    Data {
        /// Whose.
        stream: u32,
        /// At least one.
        bytes: &'a [u8],
    },
    /// END_STREAM: the peer has sent everything.
    End {
        /// On which stream.
        stream: u32,
    },
    /// A stream is over: reset by the peer, or by us for the peer's mistake.
    Reset {
        /// Which.
        stream: u32,
    },
    /// The peer gave credit for one stream.
    StreamCredit {
        /// Which.
        stream: u32,
    },
    /// The peer gave credit for all streams, or changed its settings.
    Credit,
    /// The peer opens no streams any more (to a server), or takes none (to a client): those beyond its last one are
    /// reset with REFUSED_STREAM.
    GoAway,
    /// Our PING was answered.
    Pong,
}

/// What the peer has announced.
#[derive(Debug, Clone, Copy)]
struct Peer {
    initial_window: u32,
    max_frame: u32,
    /// `None`: no limit, or not told yet.
    max_streams: Option<u32>,
    /// Its first SETTINGS have come.
    greeted: bool,
}

/// One stream.
#[derive(Debug)]
struct Stream<X> {
    send_window: i64,
    receive_window: i64,
    /// Credit that is due and not yet given.
    owed: u32,
    /// Received and not yet consumed.
    undelivered: usize,
    sent_end: bool,
    got_end: bool,
    reset: Option<Code>,
    /// A client has its final answer; always true for a server.
    answered: bool,
    /// Its request was handed to whoever serves it.
    taken: bool,
    /// Counts as open (section 5.1.2).
    counted: bool,
    user: X,
}

/// Spreads stream numbers over the buckets of a table. Nothing more is needed: a peer who chose numbers that collide would
/// make us look through as many streams as it may have, a few hundred.
#[derive(Debug, Default)]
struct StreamHasher(u64);

impl Hasher for StreamHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((*byte).into());
        }
    }

    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing: 2^64 divided by the golden ratio. Client's streams are odd and follow one another.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Counts frames that carry nothing; useful traffic or a second forgive them all.
#[derive(Debug)]
struct Calm {
    since: Option<Instant>,
    frames: u32,
}

/// The window that the peer's streams begin with (section 6.9.2).
#[derive(Debug)]
struct Granted {
    /// What the peer has acknowledged.
    bytes: u32,
    /// What was said and is not acknowledged yet.
    said: Option<u32>,
    /// SETTINGS of ours that are not acknowledged yet, the first ones among them.
    unacknowledged: u32,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Connection<X> {
    role: Role,
    reading: Reading,
    /// A frame's payload that has come in part; never DATA.
    partial: Vec<u8>,
    block: Option<Block>,
    decoder: Decoder,
    streams: HashMap<u32, Stream<X>, BuildHasherDefault<StreamHasher>>,
    /// Streams that are neither closed nor reset.
    open: usize,
    newest: u32,
    peer: Peer,
    send_window: i64,
    /// Credit for the connection's window that is due and not yet given.
    owed: u32,
    granted: Granted,
    control: Vec<u8>,
    /// Streams reset by us: frames for them may still be on their way.
    forgotten: VecDeque<u32>,
    error_resets: usize,
    untaken_resets: usize,
    calm: Calm,
    /// We have said that we are about to leave.
    announced: bool,
    /// No more streams are taken.
    leaving: bool,
    peer_leaves: bool,
    failed: Option<ConnectionError>,
}

impl<X> Connection<X> {
    /// A connection whose preface and settings are queued.
    #[must_use]
    pub fn new(role: Role) -> Self {
        let mut control = Vec::new();
        let mut settings = vec![
            (setting::HEADER_TABLE_SIZE, 0),
            (setting::INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES),
            (setting::MAX_FRAME_SIZE, MAX_FRAME_BYTES),
        ];
        match role {
            Role::Client => {
                control.extend_from_slice(frame::PREFACE);
                settings.push((setting::ENABLE_PUSH, 0));
                settings.push((setting::MAX_HEADER_LIST_SIZE, CLIENT_HEADER_LIST_BYTES));
            }
            Role::Server { streams } => {
                settings.push((setting::MAX_CONCURRENT_STREAMS, streams));
                settings.push((setting::MAX_HEADER_LIST_SIZE, SERVER_HEADER_LIST_BYTES));
            }
        }
        frame::put_settings(&mut control, &settings);
        frame::put_window_update(&mut control, 0, CONNECTION_WINDOW_BYTES - DEFAULT_WINDOW);
        Self {
            role,
            reading: Reading::begin(role),
            partial: Vec::new(),
            block: None,
            decoder: Decoder::default(),
            streams: HashMap::default(),
            open: 0,
            newest: 0,
            peer: Peer {
                initial_window: DEFAULT_WINDOW,
                max_frame: MIN_MAX_FRAME,
                max_streams: None,
                greeted: false,
            },
            send_window: DEFAULT_WINDOW.into(),
            owed: 0,
            granted: Granted {
                bytes: STREAM_WINDOW_BYTES,
                said: None,
                unacknowledged: 1,
            },
            control,
            forgotten: VecDeque::new(),
            error_resets: 0,
            untaken_resets: 0,
            calm: Calm {
                since: None,
                frames: 0,
            },
            announced: false,
            leaving: false,
            peer_leaves: false,
            failed: None,
        }
    }

    /// Whether the peer's settings have come: it speaks HTTP/2.
    #[must_use]
    pub fn greeted(&self) -> bool {
        self.peer.greeted
    }

    /// Streams that the peer allows us at a time; `None` while it has not told, or has no limit.
    #[must_use]
    pub fn peer_streams(&self) -> Option<usize> {
        self.peer
            .max_streams
            .map(|streams| usize::try_from(streams).unwrap_or(usize::MAX))
    }

    /// Largest payload that the peer takes in one frame.
    #[must_use]
    pub fn max_frame(&self) -> usize {
        usize::try_from(self.peer.max_frame).unwrap_or(usize::MAX)
    }

    /// Streams that are open on the wire.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.open
    }

    /// Whether nobody uses any stream.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        self.streams.is_empty()
    }

    /// Whether either side opens or takes no more streams. A server that has only announced it still does.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.leaving || self.peer_leaves
    }

    /// Frames to send, oldest first. Whoever takes them sends them before any DATA that is framed later.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.control
    }

    /// The user's part of a stream; `None` once it was released.
    pub fn user(&mut self, stream: u32) -> Option<&mut X> {
        self.streams.get_mut(&stream).map(|stream| &mut stream.user)
    }

    /// The user's parts of all streams.
    pub fn users(&mut self) -> impl Iterator<Item = &mut X> {
        self.streams.values_mut().map(|stream| &mut stream.user)
    }

    /// Why a stream was reset, by either side; `None` while it was not.
    #[must_use]
    pub fn reset_code(&self, stream: u32) -> Option<Code> {
        self.streams.get(&stream)?.reset
    }

    /// Whether everything that the peer sends on a stream has come.
    #[must_use]
    pub fn got_end(&self, stream: u32) -> bool {
        self.streams
            .get(&stream)
            .is_some_and(|stream| stream.got_end)
    }

    /// Bytes of a stream that were received and not yet consumed.
    #[must_use]
    pub fn undelivered(&self, stream: u32) -> usize {
        self.streams
            .get(&stream)
            .map_or(0, |stream| stream.undelivered)
    }

    /// Ends the connection; the first reason counts.
    fn fail(&mut self, code: Code, what: &'static str) -> ConnectionError {
        if let Some(failed) = self.failed {
            return failed;
        }
        let error = ConnectionError { code, what };
        self.failed = Some(error);
        let last = self.last_taken();
        frame::put_go_away(&mut self.control, last, code);
        error
    }

    /// The last stream of the peer that was looked at (section 6.8); a client's peer opens none.
    fn last_taken(&self) -> u32 {
        match self.role {
            Role::Client => 0,
            Role::Server { .. } => self.newest,
        }
    }

    /// A stream's end as the count of open streams sees it.
    fn settle(&mut self, stream: u32) {
        if let Some(state) = self.streams.get_mut(&stream)
            && (state.reset.is_some() || (state.sent_end && state.got_end))
            && std::mem::take(&mut state.counted)
        {
            self.open = self.open.saturating_sub(1);
        }
    }

    fn forget(&mut self, stream: u32) {
        if self.forgotten.len() >= MAX_IGNORED_STREAMS {
            self.forgotten.pop_front();
        }
        self.forgotten.push_back(stream);
    }

    /// Gives the connection's credit back on receipt, in large pieces, so that a stalled stream does not stop the others:
    /// what it holds is bounded by its own window. So the connection's window, unlike a stream's, never closes.
    fn credit_connection(&mut self, bytes: u32) {
        self.owed = self.owed.saturating_add(bytes);
        if self.owed >= CONNECTION_WINDOW_BYTES / 4 {
            let owed = std::mem::take(&mut self.owed);
            frame::put_window_update(&mut self.control, 0, owed);
        }
    }

    fn credit_stream(&mut self, stream: u32, bytes: u32) {
        let Some(state) = self.streams.get_mut(&stream) else {
            return;
        };
        state.owed = state.owed.saturating_add(bytes);
        if state.owed >= self.granted.bytes / 4 && !state.got_end && state.reset.is_none() {
            let owed = std::mem::take(&mut state.owed);
            state.receive_window += i64::from(owed);
            frame::put_window_update(&mut self.control, stream, owed);
        }
    }
}

#[cfg(test)]
mod tests;
