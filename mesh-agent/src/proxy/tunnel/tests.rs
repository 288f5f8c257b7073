//! The seam with each codec behind it, over an in-memory connection.

use std::{future::poll_fn, time::Duration};

use http::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::{LocalSet, spawn_local},
    time::Instant,
};

use super::*;
use crate::proxy::limits::{
    STREAM_SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES, STREAM_WINDOW_MIN_BYTES,
};

const MIB: usize = 1 << 20;

async fn ends() -> (TunnelClient, TunnelServer<DuplexStream>) {
    let (near, far) = duplex(MIB);
    let limits = Limits::default();
    let client = TunnelClient::handshake(TunnelCodec::H2, near, &limits, None);
    let server = TunnelServer::handshake(TunnelCodec::H2, far, &limits);
    let (client, server) = futures::future::join(client, server).await;
    (client.expect("handshake"), server.expect("handshake"))
}

fn request() -> ConnectRequest {
    let mut headers = HeaderMap::new();
    headers.insert(headers::BAGGAGE, "service.name=web".parse().expect("plain"));
    ConnectRequest {
        authority: "10.1.0.5:80".into(),
        headers,
    }
}

async fn read_to_end(receive: &mut TunnelReceive) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    while let Some(bytes) = poll_fn(|cx| receive.poll_data(cx)).await {
        let bytes = bytes?;
        receive.consumed(bytes.len());
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// Answers every request with `status`.
fn answer(mut server: TunnelServer<DuplexStream>, status: StatusCode) {
    spawn_local(async move {
        while let Some(Ok(incoming)) = server.accept().await {
            incoming.refuse(status);
        }
    });
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            spawn_local(async move { client.open(request()).await.map(|_| ()) });
            let incoming = server.accept().await.expect("open").expect("well formed");
            assert_eq!(incoming.request.method, Method::CONNECT);
            let authority = incoming.request.uri.authority().expect("sent");
            assert_eq!(authority.as_str(), "10.1.0.5:80");
            assert_eq!(incoming.request.uri.path(), "");
            assert_eq!(
                incoming.request.headers[headers::BAGGAGE],
                "service.name=web"
            );
        })
        .await;
}

#[tokio::test]
async fn anything_but_200_is_a_refusal() {
    LocalSet::new()
        .run_until(async {
            for status in [
                StatusCode::UNAUTHORIZED,
                StatusCode::NO_CONTENT,
                StatusCode::SERVICE_UNAVAILABLE,
            ] {
                let (client, server) = ends().await;
                answer(server, status);
                let refused = client.open(request()).await.expect_err("not 200");
                assert!(
                    matches!(refused, TunnelError::Refused(seen) if seen == status),
                    "{status}"
                );
                assert!(client.is_open(), "a refusal concerns one stream only");
            }
        })
        .await;
}

#[tokio::test]
async fn a_server_that_drains_takes_no_stream_and_finishes_the_open_one() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            let (opened, accepted) = futures::future::join(client.open(request()), async {
                let incoming = server.accept().await.expect("open").expect("well formed");
                let stream = incoming.accept(HeaderMap::new()).expect("there");
                spawn_local(async move {
                    server.shut_down();
                    while server.accept().await.is_some() {}
                });
                stream
            })
            .await;
            let (mut stream, _) = opened.expect("200");
            let mut far = accepted;
            while client.is_open() {
                if let Err(error) = client.open(request()).await {
                    assert!(matches!(error, TunnelError::NotTaken), "{error}");
                }
            }
            let room = poll_fn(|cx| far.send.poll_room(cx, 3))
                .await
                .expect("still open");
            assert_eq!(room, 3);
            far.send
                .send(Bytes::from_static(b"end"))
                .expect("still open");
            far.send.finish().expect("still open");
            assert_eq!(read_to_end(&mut stream.receive).await, Ok(b"end".to_vec()));
        })
        .await;
}

#[tokio::test]
async fn a_reset_is_not_an_end() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            spawn_local(async move {
                while let Some(Ok(incoming)) = server.accept().await {
                    let mut stream = incoming.accept(HeaderMap::new()).expect("there");
                    spawn_local(async move {
                        assert!(poll_fn(|cx| stream.receive.poll_data(cx)).await.is_some());
                        stream.send.reset();
                    });
                }
            });
            let (mut stream, _) = client.open(request()).await.expect("200");
            poll_fn(|cx| stream.send.poll_room(cx, 1))
                .await
                .expect("open");
            stream.send.send(Bytes::from_static(b"x")).expect("open");
            assert_eq!(
                read_to_end(&mut stream.receive).await,
                Err(StreamError::Reset)
            );
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_without_a_preface_is_gone_at_the_deadline() {
    let (_silent, near) = duplex(MIB);
    let limits = Limits::default();
    let began = Instant::now();
    let result = TunnelServer::handshake(TunnelCodec::H2, near, &limits).await;
    assert!(matches!(result, Err(TunnelError::TimedOut(_))));
    assert_eq!(began.elapsed(), limits.time.first_frame);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_no_ping_is_dead() {
    LocalSet::new()
        .run_until(async {
            let (near, mut far) = duplex(MIB);
            let limits = Limits::default();
            let client = TunnelClient::handshake(TunnelCodec::H2, near, &limits, None)
                .await
                .expect("writes");
            // Reads everything, answers nothing.
            spawn_local(async move {
                while far.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {}
            });
            let began = Instant::now();
            while client.is_open() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let patience = limits.time.ping_interval + limits.time.ping_timeout;
            assert!(began.elapsed() >= patience);
            assert!(began.elapsed() <= patience + Duration::from_secs(2));
        })
        .await;
}

#[tokio::test]
async fn a_peer_that_speaks_something_else_is_refused() {
    let (mut far, near) = duplex(MIB);
    far.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n")
        .await
        .expect("open");
    let result = TunnelServer::handshake(TunnelCodec::H2, near, &Limits::default()).await;
    assert!(matches!(result, Err(TunnelError::Protocol(_))));
}

#[tokio::test]
async fn the_servers_stream_limit_reaches_the_client() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            let accepted = spawn_local(async move {
                let mut held = Vec::new();
                while let Some(Ok(incoming)) = server.accept().await {
                    held.push(incoming.accept(HeaderMap::new()).expect("there"));
                }
                held.len()
            });
            let (stream, _) = client.open(request()).await.expect("200");
            let advertised = Limits::default().tunnel.server_streams as usize;
            assert_eq!(
                client.peer_streams(),
                advertised,
                "known once the settings have arrived"
            );
            drop((stream, client));
            assert_eq!(accepted.await.expect("no panic"), 1);
        })
        .await;
}

/// Sends on a stream that nobody reads until no more goes; returns how much went.
async fn fill(stream: &mut TunnelStream) -> usize {
    let mut sent = 0;
    loop {
        let room = poll_fn(|cx| stream.send.poll_room(cx, 64 << 10));
        // Time is the runtime's: it passes when nothing else can happen.
        match timeout(Duration::from_secs(1), room).await {
            Ok(room) => {
                let room = room.expect("open");
                stream.send.send(vec![0; room].into()).expect("open");
                sent += room;
            }
            Err(_) => return sent,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn streams_get_the_window_that_the_workload_may_have_now() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            let window = Rc::new(std::cell::Cell::new(STREAM_WINDOW_BYTES));
            let wanted = window.clone();
            server.follow_window(Rc::new(move || wanted.get()));
            let accepted = spawn_local(async move {
                let mut held = Vec::new();
                while let Some(Ok(incoming)) = server.accept().await {
                    held.push(incoming.accept(HeaderMap::new()).expect("there"));
                }
            });
            // A codec may take more than the window, up to its own buffer.
            let within = |window: u32, sent: usize| {
                let window = window as usize;
                assert!(
                    (window..=window + STREAM_SEND_BUFFER_BYTES).contains(&sent),
                    "{sent}"
                );
            };
            let (mut first, _) = client.open(request()).await.expect("200");
            within(STREAM_WINDOW_BYTES, fill(&mut first).await);
            window.set(STREAM_WINDOW_MIN_BYTES);
            // The change goes out with the answer to this one.
            let (_, _) = client.open(request()).await.expect("200");
            let (mut last, _) = client.open(request()).await.expect("200");
            within(STREAM_WINDOW_MIN_BYTES, fill(&mut last).await);
            drop((first, last, client));
            accepted.await.expect("no panic");
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_full_stream_whose_window_shrank_goes_on_when_it_is_read() {
    LocalSet::new()
        .run_until(async {
            let (client, mut server) = ends().await;
            let window = Rc::new(std::cell::Cell::new(STREAM_WINDOW_BYTES));
            let wanted = window.clone();
            server.follow_window(Rc::new(move || wanted.get()));
            let (tell, mut told) = tokio::sync::mpsc::channel(2);
            spawn_local(async move {
                while let Some(Ok(incoming)) = server.accept().await {
                    let stream = incoming.accept(HeaderMap::new()).expect("there");
                    tell.send(stream).await.expect("wanted");
                }
            });
            let (mut full, _) = client.open(request()).await.expect("200");
            let mut reader = told.recv().await.expect("accepted");
            let mut sent = fill(&mut full).await;
            window.set(STREAM_WINDOW_MIN_BYTES);
            let (_other, _) = client.open(request()).await.expect("200");
            // Nothing more goes: the window is closed, by more than it was before.
            assert!(fill(&mut full).await <= STREAM_SEND_BUFFER_BYTES);
            let reading = spawn_local(async move { read_to_end(&mut reader.receive).await });
            for _ in 0..100 {
                let room = poll_fn(|cx| full.send.poll_room(cx, 64 << 10));
                let room = timeout(Duration::from_secs(10), room).await;
                let room = room.expect("the window opens again").expect("open");
                full.send.send(vec![0; room].into()).expect("open");
                sent += room;
            }
            full.send.finish().expect("open");
            let received = timeout(Duration::from_secs(10), reading).await;
            let received = received.expect("in time").expect("no panic");
            assert!(received.expect("an end").len() >= sent);
        })
        .await;
}
