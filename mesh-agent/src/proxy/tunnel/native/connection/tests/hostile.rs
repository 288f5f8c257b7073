//! What a peer must not send, and what it sends to hurt.

use super::*;
use crate::proxy::limits::MAX_CONTINUATION_FRAMES;

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
        Bench::serving().ends_for(&bytes, code, what);
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
        data(1, &[3, 0, 0, 0], flag::PADDED),
        one(kind::GOAWAY, 0, 0, &[0; 8]),
        window(0, 1),
        window(1, 1),
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

#[test]
fn resets_of_nothing_have_a_limit_per_second() {
    let mut bench = Bench::serving();
    for _ in 0..=MAX_EMPTY_FRAMES_PER_SECOND {
        bench
            .feed(&reset(1))
            .expect("one reset and many of nothing");
    }
    bench.ends(&reset(1), Code::ENHANCE_YOUR_CALM);
}

#[test]
fn refused_streams_have_a_limit_per_second() {
    let mut bench = Bench::new(Role::Server { streams: 1 });
    bench.feed(&greeting(&[])).expect("a greeting");
    bench.feed(&connect(1)).expect("a request");
    let mut stream = 3;
    for _ in 0..MAX_EMPTY_FRAMES_PER_SECOND {
        bench.feed(&connect(stream)).expect("refused");
        bench.connection.control().clear();
        stream += 2;
    }
    bench.ends(&connect(stream), Code::ENHANCE_YOUR_CALM);
}

/// A peer that gives credit byte by byte has a reason as long as bytes go its way.
#[test]
fn tiny_credit_is_forgiven_while_we_send() {
    let mut bench = Bench::serving();
    for _ in 0..3 * MAX_EMPTY_FRAMES_PER_SECOND {
        bench.connection.sent(1, 1);
        bench
            .feed(&window(1, 1))
            .expect("for the byte that was sent");
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
}

fn full_for(stream: u32) -> Vec<u8> {
    data(stream, &vec![0; 1 << 14], 0)
        .repeat(usize::try_from(STREAM_WINDOW_BYTES >> 14).expect("small"))
}

/// What stalled streams hold is bounded by their own windows; the connection's comes back at once.
#[test]
fn stalled_streams_leave_the_connections_window_open() {
    let mut bench = Bench::new(Role::Server { streams: 100 });
    bench.feed(&greeting(&[])).expect("a greeting");
    let streams = (1..40).step_by(2);
    for stream in streams.clone() {
        bench.feed(&connect(stream)).expect("a request");
        bench.feed(&full_for(stream)).expect("within its window");
        let credited: Vec<(u32, u32)> = bench
            .sent()
            .iter()
            .filter(|(head, _)| head.kind == kind::WINDOW_UPDATE)
            .map(|(head, payload)| (head.stream, read_u32(payload)))
            .collect();
        assert_eq!(
            credited,
            [(0, STREAM_WINDOW_BYTES)],
            "the connection's only"
        );
    }
    let full = usize::try_from(STREAM_WINDOW_BYTES).expect("small");
    for stream in streams {
        assert_eq!(bench.connection.undelivered(stream), full);
        bench.connection.consumed(stream, full);
        let (head, payload) = bench.sent().remove(0);
        assert_eq!((head.kind, head.stream), (kind::WINDOW_UPDATE, stream));
        assert_eq!(read_u32(&payload), STREAM_WINDOW_BYTES);
    }
}
