//! The tunnel's own codec without TLS and sockets: bytes of HTTP/2 to events, and header blocks to fields.

use std::time::Instant;

use http::{HeaderMap, StatusCode};
use mesh_agent::proxy::tunnel::{
    ConnectRequest,
    native::{
        connection::{Connection, Event, Role},
        frame::{Code, HEAD_BYTES, Head},
        hpack::{Decoder, put_field},
    },
};

/// Streams that the server allows.
const STREAMS: u32 = 8;

/// What happened, bytes of one stream in a row joined: where they were cut is not the peer's business.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Saw {
    Request(u32, String),
    Response(u32, u16),
    Data(u32, Vec<u8>),
    End(u32),
    Reset(u32),
    Credit(u32),
    GoAway,
    Pong,
    Failed(Code, &'static str),
}

/// Bit 0 of the first byte chooses the role, the second byte how the rest is cut. A byte stream means the same however it
/// is cut, and what is answered is well formed.
pub(crate) fn frames(bytes: &[u8]) {
    let [role, piece, rest @ ..] = bytes else {
        return;
    };
    let client = role & 1 == 1;
    let now = Instant::now();
    let whole = Peer::new(client, now).hear(rest, usize::MAX);
    let cut = Peer::new(client, now).hear(rest, usize::from(*piece) + 1);
    assert_eq!(whole, cut, "the meaning depends on where bytes are cut");
}

/// A connection, and a user of it who answers everything.
struct Peer {
    connection: Connection<()>,
    now: Instant,
    saw: Vec<Saw>,
}

impl Peer {
    fn new(client: bool, now: Instant) -> Self {
        let role = match client {
            true => Role::Client,
            false => Role::Server { streams: STREAMS },
        };
        let mut connection = Connection::new(role);
        if client {
            for _ in 0..2 {
                let request = ConnectRequest {
                    authority: "10.1.0.5:80".into(),
                    headers: HeaderMap::new(),
                };
                connection.open(&request, ()).expect("numbers are left");
            }
            // The preface is no frame.
            connection.control().clear();
        }
        Self {
            connection,
            now,
            saw: Vec::new(),
        }
    }

    fn hear(mut self, bytes: &[u8], piece: usize) -> Vec<Saw> {
        for mut input in bytes.chunks(piece.min(bytes.len()).max(1)) {
            loop {
                match self.connection.receive(&mut input, self.now) {
                    Ok(Some(event)) => react(&mut self.connection, event, &mut self.saw),
                    Ok(None) => break,
                    Err(error) => {
                        self.saw.push(Saw::Failed(error.code, error.what));
                        self.check_control();
                        return self.saw;
                    }
                }
            }
            assert!(input.is_empty(), "bytes are left behind");
            self.check_control();
        }
        self.saw
    }

    /// Frames that are whole, and none after what was written.
    fn check_control(&mut self) {
        let bytes = std::mem::take(self.connection.control());
        let mut rest = bytes.as_slice();
        while let Some((head, after)) = rest.split_first_chunk::<HEAD_BYTES>() {
            let length = Head::read(*head).length as usize;
            rest = after.get(length..).expect("a frame is cut off");
        }
        assert!(rest.is_empty(), "a frame's head is cut off");
    }
}

fn react(connection: &mut Connection<()>, event: Event<'_>, saw: &mut Vec<Saw>) {
    let seen = match event {
        Event::Request { stream, request } => {
            if connection.take(stream) {
                let there = connection.respond(stream, StatusCode::OK, &HeaderMap::new(), false);
                assert!(there, "a new stream cannot be answered");
            }
            Saw::Request(stream, format!("{} {}", request.method, request.uri))
        }
        Event::Response { stream, status, .. } => Saw::Response(stream, status.as_u16()),
        Event::Data { stream, bytes } => {
            assert!(!bytes.is_empty(), "nothing is no data");
            connection.consumed(stream, bytes.len());
            if let Some(Saw::Data(last, all)) = saw.last_mut()
                && *last == stream
            {
                return all.extend_from_slice(bytes);
            }
            Saw::Data(stream, bytes.to_vec())
        }
        Event::End { stream } => {
            connection.finish(stream);
            connection.release(stream);
            Saw::End(stream)
        }
        Event::Reset { stream } => {
            connection.release(stream);
            Saw::Reset(stream)
        }
        Event::StreamCredit { stream } => {
            let room = connection.sendable(stream).min(16 << 10);
            connection.sent(stream, room);
            Saw::Credit(stream)
        }
        Event::Credit => Saw::Credit(0),
        Event::GoAway => Saw::GoAway,
        Event::Pong => Saw::Pong,
    };
    assert!(connection.open_streams() <= STREAMS as usize);
    saw.push(seen);
}

/// Blocks of one connection, each after its length in a byte. Fields that were decoded are what our own encoder makes of
/// them.
pub(crate) fn header_blocks(bytes: &[u8]) {
    let (mut decoder, mut rest) = (Decoder::default(), bytes);
    while let Some((length, after)) = rest.split_first() {
        let (block, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        let mut fields = Vec::new();
        let decoded = decoder.decode(block, |name, value| {
            fields.push((name.to_vec(), value.to_vec()));
        });
        if decoded.is_err() {
            return;
        }
        let (mut again, mut encoded) = (Vec::new(), Vec::new());
        for (name, value) in &fields {
            put_field(&mut encoded, name, value);
        }
        Decoder::default()
            .decode(&encoded, |name, value| {
                again.push((name.to_vec(), value.to_vec()));
            })
            .expect("our own block");
        assert_eq!(fields, again);
    }
}
