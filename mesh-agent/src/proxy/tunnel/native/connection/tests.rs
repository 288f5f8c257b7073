//! What a peer may send, must not send, and sends to hurt, as bytes; and the same bytes cut at random places.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    super::{
        super::ConnectRequest,
        frame::{HEAD_BYTES, Head, PREFACE, data_head, flag, kind, put, read_u32},
        hpack,
    },
    *,
};
use crate::proxy::limits::MAX_CONTINUATION_FRAMES;

const SERVER: Role = Role::Server { streams: 4 };

/// What happened, short enough to compare.
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
}

/// A connection and what it saw.
struct Bench {
    connection: Connection<()>,
    saw: Vec<Saw>,
    now: Instant,
}

impl Bench {
    fn new(role: Role) -> Self {
        let mut connection = Connection::new(role);
        connection.control().clear();
        Self {
            connection,
            saw: Vec::new(),
            now: Instant::now(),
        }
    }

    /// A server that has seen preface and settings.
    fn server() -> Self {
        let mut bench = Self::new(SERVER);
        bench.feed(&greeting(&[])).expect("a greeting");
        bench.fresh()
    }

    /// A client that has seen settings and has stream 1 open, answered.
    fn client() -> Self {
        let mut bench = Self::new(Role::Client);
        bench.feed(&settings(&[])).expect("settings");
        assert_eq!(bench.connection.open(&connect_request(), ()), Some(1));
        bench
            .feed(&headers(1, &[(":status", "200")], 0))
            .expect("an answer");
        bench.fresh()
    }

    /// A server with stream 1 open.
    fn serving() -> Self {
        let mut bench = Self::server();
        bench.feed(&connect(1)).expect("a request");
        assert!(bench.connection.take(1));
        bench.fresh()
    }

    fn fresh(mut self) -> Self {
        self.saw.clear();
        self.connection.control().clear();
        self
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let mut input = bytes;
        while let Some(event) = self.connection.receive(&mut input, self.now)? {
            let saw = match event {
                Event::Request { stream, request } => {
                    let authority = request.uri.authority().map(ToString::to_string);
                    Saw::Request(
                        stream,
                        format!("{} {}", request.method, authority.unwrap_or_default()),
                    )
                }
                Event::Response { stream, status, .. } => Saw::Response(stream, status.as_u16()),
                Event::Data { stream, bytes } => {
                    // Pieces of one frame count as one.
                    if let Some(Saw::Data(last, all)) = self.saw.last_mut()
                        && *last == stream
                    {
                        all.extend_from_slice(bytes);
                        continue;
                    }
                    Saw::Data(stream, bytes.to_vec())
                }
                Event::End { stream } => Saw::End(stream),
                Event::Reset { stream } => Saw::Reset(stream),
                Event::StreamCredit { stream } => Saw::Credit(stream),
                Event::Credit => Saw::Credit(0),
                Event::GoAway => Saw::GoAway,
                Event::Pong => Saw::Pong,
            };
            self.saw.push(saw);
        }
        assert!(input.is_empty(), "all is used up");
        Ok(())
    }

    /// Frames that wait to be sent.
    fn sent(&mut self) -> Vec<(Head, Vec<u8>)> {
        let bytes = std::mem::take(self.connection.control());
        let (mut rest, mut frames) = (bytes.as_slice(), Vec::new());
        while let Some((head, after)) = rest.split_first_chunk::<HEAD_BYTES>() {
            let head = Head::read(*head);
            let (payload, after) = after.split_at(head.length as usize);
            frames.push((head, payload.to_vec()));
            rest = after;
        }
        frames
    }

    /// Streams that we reset, with the codes.
    fn resets(&mut self) -> Vec<(u32, Code)> {
        let frames = self.sent().into_iter();
        frames
            .filter(|(head, _)| head.kind == kind::RST_STREAM)
            .map(|(head, payload)| (head.stream, Code(read_u32(&payload))))
            .collect()
    }

    /// The connection ends by GOAWAY with this code, for good.
    fn ends(&mut self, bytes: &[u8], code: Code) {
        let error = self.feed(bytes).expect_err("the connection is over");
        assert_eq!(error.code, code, "{}", error.what);
        let (head, payload) = self.sent().pop().expect("GOAWAY");
        assert_eq!((head.kind, read_u32(&payload[4..])), (kind::GOAWAY, code.0));
        assert_eq!(self.feed(&ping()), Err(error), "nothing more is looked at");
        assert!(self.connection.control().is_empty());
    }
}

fn one(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, kind, flags, stream, payload);
    out
}

fn settings(pairs: &[(u16, u32)]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::put_settings(&mut out, pairs);
    out
}

fn greeting(pairs: &[(u16, u32)]) -> Vec<u8> {
    [PREFACE.as_slice(), &settings(pairs)].concat()
}

fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        hpack::put_field(&mut block, name.as_bytes(), value.as_bytes());
    }
    block
}

fn headers(stream: u32, fields: &[(&str, &str)], flags: u8) -> Vec<u8> {
    one(
        kind::HEADERS,
        flag::END_HEADERS | flags,
        stream,
        &block(fields),
    )
}

const CONNECT: [(&str, &str); 2] = [(":method", "CONNECT"), (":authority", "10.1.0.5:80")];

fn connect(stream: u32) -> Vec<u8> {
    headers(stream, &CONNECT, 0)
}

fn connect_request() -> ConnectRequest {
    ConnectRequest {
        authority: "10.1.0.5:80".into(),
        headers: HeaderMap::new(),
    }
}

fn data(stream: u32, payload: &[u8], flags: u8) -> Vec<u8> {
    one(kind::DATA, flags, stream, payload)
}

fn reset(stream: u32) -> Vec<u8> {
    one(kind::RST_STREAM, 0, stream, &Code::CANCEL.0.to_be_bytes())
}

fn ping() -> Vec<u8> {
    one(kind::PING, 0, 0, b"12345678")
}

fn window(stream: u32, increment: u32) -> Vec<u8> {
    one(kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

/// A tunnel's life as a client sends it.
fn a_life() -> Vec<u8> {
    let padded = [&[3][..], b"padded", &[0; 3]].concat();
    let prioritised = [&[0, 0, 0, 0, 9][..], &block(&CONNECT)].concat();
    [
        greeting(&[(setting::INITIAL_WINDOW_SIZE, 1 << 20)]),
        connect(1),
        data(1, b"hello", 0),
        ping(),
        one(
            kind::HEADERS,
            flag::END_HEADERS | flag::PRIORITY,
            3,
            &prioritised,
        ),
        data(1, &padded, flag::PADDED),
        one(0xbe, 0xff, 7, b"an unknown frame"),
        one(kind::PRIORITY, 0, 5, &[0; 5]),
        data(3, &vec![7; 16_000], 0),
        data(1, b"bye", flag::END_STREAM),
        window(3, 1000),
        one(kind::SETTINGS, flag::ACK, 0, &[]),
        one(kind::PING, flag::ACK, 0, &[0; 8]),
        reset(3),
        one(kind::GOAWAY, 0, 0, &[0; 20]),
    ]
    .concat()
}

fn what_it_means() -> Vec<Saw> {
    let request = "CONNECT 10.1.0.5:80".to_owned();
    vec![
        Saw::Credit(0),
        Saw::Request(1, request.clone()),
        Saw::Data(1, b"hello".to_vec()),
        Saw::Request(3, request),
        Saw::Data(1, b"padded".to_vec()),
        Saw::Data(3, vec![7; 16_000]),
        Saw::Data(1, b"bye".to_vec()),
        Saw::End(1),
        Saw::Credit(3),
        Saw::Pong,
        Saw::Reset(3),
        Saw::GoAway,
    ]
}

#[test]
fn a_tunnels_life_is_understood() {
    let mut bench = Bench::new(SERVER);
    bench.feed(&a_life()).expect("well formed");
    assert_eq!(bench.saw, what_it_means());
    let answers: Vec<(u8, u8)> = bench
        .sent()
        .iter()
        .map(|(head, _)| (head.kind, head.flags))
        .collect();
    assert_eq!(
        answers,
        [(kind::SETTINGS, flag::ACK), (kind::PING, flag::ACK)]
    );
}

/// A byte stream means the same however it is cut.
#[test]
fn cuts_at_random_places_change_nothing() {
    let bytes = a_life();
    for seed in 0..200 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bench = Bench::new(SERVER);
        let (mut rest, most) = (bytes.as_slice(), random.random_range(1..600));
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(random.random_range(1..=most).min(rest.len()));
            bench.feed(piece).expect("well formed");
            rest = after;
        }
        assert_eq!(bench.saw, what_it_means(), "seed {seed}");
    }
}

/// Bytes changed at random: an error or an odd meaning, never a panic, and never a frame without end in our queue.
#[test]
fn noise_never_panics() {
    for seed in 0..2000 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut bytes, mut bench) = (a_life(), Bench::new(SERVER));
        for _ in 0..random.random_range(1..20) {
            let at = random.random_range(PREFACE.len()..bytes.len());
            bytes[at] = random.random();
        }
        let _ = bench.feed_quietly(&bytes);
        assert!(
            bench.connection.control().len() <= 2 * MAX_QUEUED_ANSWER_BYTES,
            "seed {seed}"
        );
    }
}

impl Bench {
    fn feed_quietly(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let mut input = bytes;
        while self.connection.receive(&mut input, self.now)?.is_some() {}
        Ok(())
    }
}

/// Errors of the connection (RFC 9113; the section is in each line).
#[test]
fn mistakes_that_end_the_connection() {
    let interrupted = [one(kind::HEADERS, 0, 3, &block(&CONNECT)), ping()].concat();
    let others = [
        one(kind::HEADERS, 0, 3, &[]),
        one(kind::CONTINUATION, flag::END_HEADERS, 5, &[]),
    ];
    let table: Vec<(&str, Vec<u8>, Code)> = vec![
        (
            "4.2 frame too large",
            Head {
                length: MAX_FRAME_BYTES + 1,
                kind: kind::DATA,
                flags: 0,
                stream: 1,
            }
            .bytes()
            .to_vec(),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "4.3 undecodable",
            one(kind::HEADERS, flag::END_HEADERS, 3, &[0xff, 0xff]),
            Code::COMPRESSION_ERROR,
        ),
        ("4.3 interrupted", interrupted, Code::PROTOCOL_ERROR),
        (
            "6.10 of another stream",
            others.concat(),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.10 of nothing",
            one(kind::CONTINUATION, 0, 1, &[]),
            Code::PROTOCOL_ERROR,
        ),
        ("5.1 DATA, idle", data(9, b"x", 0), Code::PROTOCOL_ERROR),
        ("5.1 RST_STREAM, idle", reset(9), Code::PROTOCOL_ERROR),
        (
            "5.1 WINDOW_UPDATE, idle",
            window(9, 1),
            Code::PROTOCOL_ERROR,
        ),
        ("5.1.1 even", connect(4), Code::PROTOCOL_ERROR),
        ("6.1 DATA, stream 0", data(0, b"x", 0), Code::PROTOCOL_ERROR),
        (
            "6.1 padding too long",
            data(1, &[9, 1, 2], flag::PADDED),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.1 no pad length",
            data(1, &[], flag::PADDED),
            Code::FRAME_SIZE_ERROR,
        ),
        ("6.2 HEADERS, stream 0", connect(0), Code::PROTOCOL_ERROR),
        (
            "6.2 padding too long",
            one(kind::HEADERS, flag::END_HEADERS | flag::PADDED, 3, &[9, 1]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.3 PRIORITY, length",
            one(kind::PRIORITY, 0, 1, &[0; 4]),
            Code::FRAME_SIZE_ERROR,
        ),
        ("6.4 RST_STREAM, stream 0", reset(0), Code::PROTOCOL_ERROR),
        (
            "6.4 RST_STREAM, length",
            one(kind::RST_STREAM, 0, 1, &[0; 5]),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "6.5 SETTINGS, stream",
            one(kind::SETTINGS, 0, 1, &[]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.5 SETTINGS, length",
            one(kind::SETTINGS, 0, 0, &[0; 7]),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "6.5 ack with payload",
            one(kind::SETTINGS, flag::ACK, 0, &[0; 6]),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "6.5.2 push",
            settings(&[(setting::ENABLE_PUSH, 2)]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.5.2 window",
            settings(&[(setting::INITIAL_WINDOW_SIZE, 1 << 31)]),
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "6.5.2 frame too small",
            settings(&[(setting::MAX_FRAME_SIZE, 16_383)]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.5.2 frame too large",
            settings(&[(setting::MAX_FRAME_SIZE, 1 << 24)]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.6 PUSH_PROMISE",
            one(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0; 4]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.7 PING, length",
            one(kind::PING, 0, 0, &[0; 7]),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "6.7 PING, stream",
            one(kind::PING, 0, 1, &[0; 8]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.8 GOAWAY, length",
            one(kind::GOAWAY, 0, 0, &[0; 7]),
            Code::FRAME_SIZE_ERROR,
        ),
        (
            "6.8 GOAWAY, stream",
            one(kind::GOAWAY, 0, 1, &[0; 8]),
            Code::PROTOCOL_ERROR,
        ),
        (
            "6.9 WINDOW_UPDATE, length",
            one(kind::WINDOW_UPDATE, 0, 0, &[0; 3]),
            Code::FRAME_SIZE_ERROR,
        ),
        ("6.9 of nothing", window(0, 0), Code::PROTOCOL_ERROR),
        (
            "6.9.1 connection's window",
            window(0, 0x7fff_ffff),
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "6.9.2 stream's window",
            [
                window(1, 0x7fff_0000),
                settings(&[(setting::INITIAL_WINDOW_SIZE, 1 << 20)]),
            ]
            .concat(),
            Code::FLOW_CONTROL_ERROR,
        ),
    ];
    for (what, bytes, code) in table {
        eprintln!("{what}");
        Bench::serving().ends(&bytes, code);
    }
}

#[test]
fn a_wrong_beginning_ends_the_connection() {
    Bench::new(SERVER).ends(b"GET / HTTP/1.1\r\n", Code::PROTOCOL_ERROR);
    let early = [PREFACE.as_slice(), &ping()].concat();
    Bench::new(SERVER).ends(&early, Code::PROTOCOL_ERROR);
    let acknowledged = [PREFACE.as_slice(), &one(kind::SETTINGS, flag::ACK, 0, &[])].concat();
    Bench::new(SERVER).ends(&acknowledged, Code::PROTOCOL_ERROR);
    Bench::new(Role::Client).ends(&ping(), Code::PROTOCOL_ERROR);
}

#[test]
fn what_only_a_client_must_not_be_sent() {
    Bench::client().ends(&connect(2), Code::PROTOCOL_ERROR);
    Bench::client().ends(&headers(3, &[(":status", "200")], 0), Code::PROTOCOL_ERROR);
    Bench::client().ends(
        &settings(&[(setting::ENABLE_PUSH, 1)]),
        Code::PROTOCOL_ERROR,
    );
}

/// Errors of one stream: it is reset, its neighbour goes on.
#[test]
fn mistakes_that_end_one_stream() {
    let other = |fields: &[(&str, &str)]| headers(3, fields, 0);
    let finished = [data(1, b"x", flag::END_STREAM), data(1, b"y", 0)].concat();
    let table: Vec<(&str, Vec<u8>, u32, Code)> = vec![
        (
            "5.1 DATA after END_STREAM",
            finished,
            1,
            Code::STREAM_CLOSED,
        ),
        ("6.9 of nothing", window(1, 0), 1, Code::PROTOCOL_ERROR),
        (
            "6.9.1 too much",
            window(1, 0x7fff_ffff),
            1,
            Code::FLOW_CONTROL_ERROR,
        ),
        (
            "8.5 HEADERS in a tunnel",
            headers(1, &[("a", "b")], flag::END_STREAM),
            1,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.5 no authority",
            other(&[(":method", "CONNECT")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.5 path",
            other(&[CONNECT[0], CONNECT[1], (":path", "/")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.5 scheme",
            other(&[CONNECT[0], CONNECT[1], (":scheme", "https")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 no method",
            other(&[CONNECT[1]]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 GET without path",
            other(&[(":method", "GET"), CONNECT[1]]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 twice",
            other(&[CONNECT[0], CONNECT[1], CONNECT[1]]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 late",
            other(&[CONNECT[0], ("a", "b"), CONNECT[1]]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 unknown",
            other(&[CONNECT[0], CONNECT[1], (":protocol", "x")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.3 status",
            other(&[CONNECT[0], CONNECT[1], (":status", "200")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.2.1 capitals",
            other(&[CONNECT[0], CONNECT[1], ("A", "b")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.2.1 line feed",
            other(&[CONNECT[0], CONNECT[1], ("a", "b\nc")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.2.1 blank",
            other(&[CONNECT[0], CONNECT[1], ("a", " b")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.2.2 connection",
            other(&[CONNECT[0], CONNECT[1], ("connection", "close")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "8.2.2 te",
            other(&[CONNECT[0], CONNECT[1], ("te", "gzip")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        (
            "authority",
            other(&[CONNECT[0], (":authority", "a b")]),
            3,
            Code::PROTOCOL_ERROR,
        ),
        ("no fields", other(&[]), 3, Code::PROTOCOL_ERROR),
    ];
    for (what, bytes, stream, code) in table {
        let mut bench = Bench::serving();
        bench.feed(&bytes).expect(what);
        assert_eq!(bench.resets(), [(stream, code)], "{what}");
        bench
            .feed(&[connect(5), data(5, b"fine", 0)].concat())
            .expect(what);
        assert_eq!(
            bench.saw.last(),
            Some(&Saw::Data(5, b"fine".to_vec())),
            "{what}"
        );
        if stream == 1 {
            bench.feed(&data(1, b"still on its way", 0)).expect(what);
            assert_eq!(bench.resets(), [], "{what}: said once");
        }
    }
}

#[test]
fn other_methods_are_for_the_caller_to_refuse() {
    let mut bench = Bench::server();
    let get = [
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", "a:1"),
    ];
    bench
        .feed(&headers(1, &get, flag::END_STREAM))
        .expect("well formed");
    assert_eq!(bench.saw, [Saw::Request(1, "GET a:1".into())]);
    assert!(bench.connection.got_end(1));
}

#[test]
fn a_client_gets_its_answer_after_interim_ones() {
    let mut bench = Bench::client();
    assert_eq!(bench.connection.open(&connect_request(), ()), Some(3));
    bench
        .feed(&headers(3, &[(":status", "103")], 0))
        .expect("interim");
    bench
        .feed(&headers(3, &[(":status", "503")], flag::END_STREAM))
        .expect("final");
    assert_eq!(bench.saw, [Saw::Response(3, 503)]);
    assert!(bench.connection.got_end(3));
    assert_eq!(bench.connection.open(&connect_request(), ()), Some(5));
    bench.connection.control().clear();
    bench
        .feed(&data(5, b"early", 0))
        .expect("a stream's mistake");
    assert_eq!(bench.resets(), [(5, Code::PROTOCOL_ERROR)]);
}

#[test]
fn streams_beyond_a_goaway_were_not_taken() {
    let mut bench = Bench::client();
    assert_eq!(bench.connection.open(&connect_request(), ()), Some(3));
    bench
        .feed(&one(kind::GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]))
        .expect("GOAWAY");
    assert_eq!(bench.connection.reset_code(1), None);
    assert_eq!(bench.connection.reset_code(3), Some(Code::REFUSED_STREAM));
    assert_eq!(bench.connection.open(&connect_request(), ()), None);
    bench.feed(&data(1, b"goes on", 0)).expect("open");
    assert_eq!(bench.saw.last(), Some(&Saw::Data(1, b"goes on".to_vec())));
}

#[test]
fn a_server_that_leaves_ignores_new_streams_and_keeps_the_old() {
    let mut bench = Bench::serving();
    bench.connection.leave();
    let (head, payload) = bench.sent().remove(0);
    assert_eq!(
        (head.kind, payload),
        (kind::GOAWAY, vec![0, 0, 0, 1, 0, 0, 0, 0])
    );
    bench
        .feed(&[connect(3), data(3, b"x", 0), data(1, b"old", 0)].concat())
        .expect("fine");
    assert_eq!(bench.saw, [Saw::Data(1, b"old".to_vec())]);
    assert_eq!(bench.resets(), []);
    bench.connection.release(1);
    assert!(bench.connection.is_unused());
}

#[test]
fn too_many_streams_are_refused_one_by_one() {
    let mut bench = Bench::server();
    for stream in [1, 3, 5, 7, 9] {
        bench
            .feed(&connect(stream))
            .expect("refusals are not errors");
    }
    assert_eq!(bench.resets(), [(9, Code::REFUSED_STREAM)]);
    bench.connection.take(1);
    bench.connection.release(1);
    bench.feed(&connect(11)).expect("room again");
    assert!(bench.connection.user(11).is_some());
}

/// Streams that are over on the wire and still served: an attacker who resets at once has no more than twice as many.
#[test]
fn reset_streams_that_are_still_served_count() {
    let mut bench = Bench::server();
    for stream in (1..=15).step_by(2) {
        bench.feed(&connect(stream)).expect("a request");
        bench.connection.take(stream);
        bench.feed(&reset(stream)).expect("a reset");
    }
    bench.feed(&connect(17)).expect("a refusal");
    assert_eq!(bench.resets(), [(17, Code::REFUSED_STREAM)]);
}

#[test]
fn streams_opened_and_reset_before_anyone_looked_end_the_connection() {
    let mut bench = Bench::new(Role::Server { streams: 1000 });
    bench.feed(&greeting(&[])).expect("a greeting");
    let last = u32::try_from(2 * MAX_PENDING_RESET_STREAMS + 1).expect("small");
    for stream in (1..last).step_by(2) {
        bench
            .feed(&[connect(stream), reset(stream)].concat())
            .expect("within the limit");
    }
    // Those that were looked at do not count.
    assert!(!bench.connection.take(1));
    bench.connection.release(1);
    bench
        .feed(&[connect(last), reset(last)].concat())
        .expect("within the limit");
    bench.ends(
        &[connect(last + 2), reset(last + 2)].concat(),
        Code::ENHANCE_YOUR_CALM,
    );
}

#[test]
fn header_blocks_have_limits() {
    let piece = vec![0; 16_384];
    let begin = one(kind::HEADERS, 0, 3, &[]);
    let endless = |count, piece: &[u8]| {
        let more = one(kind::CONTINUATION, 0, 3, piece);
        [begin.clone(), more.repeat(count)].concat()
    };
    Bench::serving()
        .feed(&endless(MAX_CONTINUATION_FRAMES, &[]))
        .expect("within the limit");
    Bench::serving().ends(
        &endless(MAX_CONTINUATION_FRAMES + 1, &[]),
        Code::ENHANCE_YOUR_CALM,
    );
    Bench::serving()
        .feed(&endless(4, &piece))
        .expect("64 KiB are within the limit");
    Bench::serving().ends(&endless(5, &piece), Code::ENHANCE_YOUR_CALM);
    // Small on the wire, large as a list: the stream alone is refused, and the decoder stays in step.
    let mut fields = CONNECT.to_vec();
    fields.extend([("a", ""); 2000]);
    let mut bench = Bench::serving();
    bench
        .feed(&headers(3, &fields, 0))
        .expect("one stream's mistake");
    assert_eq!(bench.resets(), [(3, Code::ENHANCE_YOUR_CALM)]);
    bench.feed(&connect(5)).expect("well formed");
}

#[test]
fn frames_that_carry_nothing_have_a_limit_per_second() {
    let floods = [
        ping(),
        settings(&[]),
        data(1, &[], 0),
        one(kind::PRIORITY, 0, 1, &[0; 5]),
        one(0xbe, 0, 1, b"x"),
    ];
    for frame in floods {
        let mut bench = Bench::serving();
        for _ in 0..MAX_EMPTY_FRAMES_PER_SECOND {
            bench.feed(&frame).expect("within the limit");
            bench.connection.control().clear();
        }
        let (mut patient, mut useful) = (bench.again(), bench.again());
        patient.now += std::time::Duration::from_secs(1);
        patient.feed(&frame).expect("a second later");
        useful
            .feed(&[data(1, b"useful", 0), frame.clone()].concat())
            .expect("after a byte");
        bench.ends(&frame, Code::ENHANCE_YOUR_CALM);
    }
}

impl Bench {
    /// A bench in the same place: the limit's state is all that matters.
    fn again(&self) -> Self {
        let mut again = Self::serving();
        again.now = self.now;
        again.connection.calm = Calm {
            since: self.connection.calm.since,
            frames: self.connection.calm.frames,
        };
        again
    }
}

#[test]
fn answers_that_nobody_reads_have_a_limit() {
    let mut bench = Bench::serving();
    let error = loop {
        // Slow enough for the limit per second.
        bench.now += std::time::Duration::from_secs(1);
        if let Err(error) = bench.feed(&ping().repeat(500)) {
            break error;
        }
        assert!(bench.connection.control().len() <= MAX_QUEUED_ANSWER_BYTES + 17);
    };
    assert_eq!(error.code, Code::ENHANCE_YOUR_CALM);
}

#[test]
fn a_peer_that_makes_many_mistakes_is_made_to_go() {
    let mut bench = Bench::serving();
    let mut stream = 3;
    for _ in 0..MAX_LOCAL_ERROR_RESETS {
        bench
            .feed(&headers(stream, &[], 0))
            .expect("within the limit");
        bench.connection.control().clear();
        stream += 2;
    }
    bench.ends(&headers(stream, &[], 0), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn settings_have_a_limit() {
    let pairs = vec![(0x1234, 1); crate::proxy::limits::MAX_SETTINGS_PER_FRAME];
    Bench::serving()
        .feed(&settings(&pairs))
        .expect("unknown ones are ignored");
    let more = [pairs, vec![(0x1234, 1)]].concat();
    Bench::serving().ends(&settings(&more), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn frames_for_streams_that_we_reset_are_ignored_and_their_bytes_credited() {
    let mut bench = Bench::serving();
    bench.connection.release(1);
    assert_eq!(bench.resets(), [(1, Code::CANCEL)]);
    let quarter = CONNECTION_WINDOW_BYTES / 4;
    let frames =
        data(1, &vec![0; 1 << 14], 0).repeat(usize::try_from(quarter >> 14).expect("small"));
    bench.feed(&frames).expect("ignored");
    bench
        .feed(&[window(1, 1), reset(1), headers(1, &[], 0)].concat())
        .expect("ignored");
    let sent = bench.sent();
    assert_eq!(bench.saw, []);
    assert_eq!(sent.len(), 1, "the connection's window is opened again");
    assert_eq!((sent[0].0.kind, sent[0].0.stream), (kind::WINDOW_UPDATE, 0));
    assert_eq!(read_u32(&sent[0].1), quarter);
}

#[test]
fn more_than_a_window_is_refused() {
    // The stream's: one byte more than 4 MiB, undelivered.
    let mut bench = Bench::serving();
    let full = data(1, &vec![0; 1 << 14], 0)
        .repeat(usize::try_from(STREAM_WINDOW_BYTES >> 14).expect("small"));
    bench.feed(&full).expect("within the window");
    bench.connection.control().clear();
    bench.feed(&data(1, b"x", 0)).expect("one stream's mistake");
    assert_eq!(bench.resets(), [(1, Code::FLOW_CONTROL_ERROR)]);
    // The connection's, when it is not opened again because too much is undelivered.
    let mut bench = Bench::new(Role::Server { streams: 100 });
    bench.feed(&greeting(&[])).expect("a greeting");
    let mut outcome = Ok(());
    for stream in (1..40).step_by(2) {
        outcome = bench
            .feed(&connect(stream))
            .and_then(|()| bench.feed(&full_for(stream)));
        if outcome.is_err() {
            break;
        }
    }
    assert_eq!(
        outcome.expect_err("memory is bounded").code,
        Code::FLOW_CONTROL_ERROR
    );
    let bound = CONNECTION_QUEUE_BYTES + usize::try_from(CONNECTION_WINDOW_BYTES).expect("small");
    assert!(bench.connection.undelivered <= bound + (1 << 14));
}

fn full_for(stream: u32) -> Vec<u8> {
    data(stream, &vec![0; 1 << 14], 0)
        .repeat(usize::try_from(STREAM_WINDOW_BYTES >> 14).expect("small"))
}

#[test]
fn a_stalled_stream_leaves_the_connections_window_open() {
    let mut bench = Bench::serving();
    bench.feed(&full_for(1)).expect("within the window");
    let credited: Vec<u32> = bench
        .sent()
        .iter()
        .filter(|(head, _)| head.kind == kind::WINDOW_UPDATE)
        .map(|(head, _)| head.stream)
        .collect();
    assert_eq!(credited, [0], "the connection's, not the stream's");
    bench
        .connection
        .consumed(1, usize::try_from(STREAM_WINDOW_BYTES).expect("small"));
    let (head, payload) = bench.sent().remove(0);
    assert_eq!((head.kind, head.stream), (kind::WINDOW_UPDATE, 1));
    assert_eq!(read_u32(&payload), STREAM_WINDOW_BYTES);
}

#[test]
fn windows_of_the_peer_bind_us() {
    let mut bench = Bench::new(SERVER);
    bench
        .feed(&greeting(&[(setting::INITIAL_WINDOW_SIZE, 100)]))
        .expect("a greeting");
    bench.feed(&connect(1)).expect("a request");
    assert_eq!(bench.connection.sendable(1), 100);
    bench.connection.sent(1, 60);
    bench
        .feed(&settings(&[(setting::INITIAL_WINDOW_SIZE, 10)]))
        .expect("smaller");
    assert_eq!(bench.connection.sendable(1), 0, "negative by now");
    bench.feed(&window(1, 51)).expect("credit");
    assert_eq!(bench.connection.sendable(1), 1);
    bench.feed(&window(1, 1 << 20)).expect("credit");
    let connection = usize::try_from(DEFAULT_WINDOW).expect("small") - 60;
    assert_eq!(bench.connection.sendable(1), connection);
}

#[test]
fn a_streams_end_is_told_apart() {
    // Both ended: nothing more is said. A server that has sent everything: NO_ERROR (section 8.1). Else: CANCEL.
    let mut bench = Bench::serving();
    bench.feed(&data(1, &[], flag::END_STREAM)).expect("an end");
    assert!(bench.connection.finish(1));
    assert_eq!(bench.sent(), [(Head::read(data_head(1, 0, true)), vec![])]);
    assert_eq!(bench.connection.open_streams(), 0);
    bench.connection.release(1);
    assert_eq!(bench.resets(), []);
    let mut bench = Bench::serving();
    bench.connection.finish(1);
    bench.connection.release(1);
    assert_eq!(bench.resets(), [(1, Code::NO_ERROR)]);
    let mut bench = Bench::client();
    bench.connection.finish(1);
    bench.connection.release(1);
    assert_eq!(bench.resets(), [(1, Code::CANCEL)]);
}
