//! What a peer may send, as bytes; and the same bytes cut at random places. What it must not send is in `hostile`.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    super::{
        super::ConnectRequest,
        frame::{HEAD_BYTES, Head, PREFACE, data_head, flag, kind, put, read_u32},
        hpack,
    },
    *,
};

mod hostile;

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
        self.ends_for(bytes, code, "");
    }

    fn ends_for(&mut self, bytes: &[u8], code: Code, why: &str) {
        let error = self.feed(bytes).expect_err(why);
        assert_eq!(error.code, code, "{why}: {}", error.what);
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
fn a_server_that_leaves_takes_what_was_on_its_way_ignores_the_rest_and_keeps_the_old() {
    let mut bench = Bench::serving();
    bench.connection.leave();
    bench.connection.leave();
    let sent = bench.sent();
    let [(first, payload), (asked, question)] = sent.as_slice() else {
        panic!("GOAWAY and PING, not {sent:?}");
    };
    assert_eq!((first.kind, asked.kind), (kind::GOAWAY, kind::PING));
    assert_eq!(payload, &[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let other = one(kind::PING, flag::ACK, 0, &[0; 8]);
    let answer = one(kind::PING, flag::ACK, 0, question);
    let on_its_way = [other, connect(3), answer].concat();
    bench.feed(&on_its_way).expect("fine");
    assert!(matches!(
        bench.saw.as_slice(),
        [.., Saw::Request(3, _), Saw::Pong]
    ));
    let (head, payload) = bench.sent().remove(0);
    assert_eq!(
        (head.kind, payload),
        (kind::GOAWAY, vec![0, 0, 0, 3, 0, 0, 0, 0])
    );
    bench.saw.clear();
    bench
        .feed(&[connect(5), data(5, b"x", 0), data(1, b"old", 0)].concat())
        .expect("fine");
    assert_eq!(bench.saw, [Saw::Data(1, b"old".to_vec())]);
    assert_eq!(bench.resets(), []);
    bench.connection.release(3);
    bench.connection.release(1);
    assert!(bench.connection.is_unused());
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
