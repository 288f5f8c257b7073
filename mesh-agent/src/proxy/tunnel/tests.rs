//! The seam with each codec behind it, over an in-memory connection.

use std::{
    future::poll_fn,
    io::{IoSliceMut, Read},
    time::Duration,
};

use http::Method;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::{LocalSet, spawn_local},
    time::Instant,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::proxy::{
    buffers::SMALL_BYTES,
    testing::{PAIRS, secured_client, secured_server, server_name, tls, tunnel},
};

const MIB: usize = 1 << 20;

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

/// Sends all of `bytes`.
async fn send(send: &mut TunnelSend, mut bytes: &[u8]) -> Result<(), StreamError> {
    while !bytes.is_empty() {
        let size = if bytes.len() > SMALL_BYTES {
            Size::Large
        } else {
            Size::Small
        };
        let read = |into: &mut [IoSliceMut<'_>]| bytes.read_vectored(into);
        let mut read = Some(read);
        poll_fn(|cx| send.poll_read_from(cx, size, |into| read.take().expect("asked once")(into)))
            .await?
            .expect("memory can be read");
    }
    Ok(())
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
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
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
            }
        })
        .await;
}

#[tokio::test]
async fn anything_but_200_is_a_refusal() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                for status in [
                    StatusCode::UNAUTHORIZED,
                    StatusCode::NO_CONTENT,
                    StatusCode::SERVICE_UNAVAILABLE,
                ] {
                    let (client, server) = tunnel(codecs).await;
                    answer(server, status);
                    let refused = client.open(request()).await.expect_err("not 200");
                    assert!(
                        matches!(refused, TunnelError::Refused(seen) if seen == status),
                        "{status}"
                    );
                    assert!(client.is_open(), "a refusal concerns one stream only");
                }
            }
        })
        .await;
}

#[tokio::test]
async fn a_server_that_drains_takes_no_stream_and_finishes_the_open_one() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
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
                send(&mut far.send, b"end").await.expect("still open");
                far.send.finish().expect("still open");
                assert_eq!(read_to_end(&mut stream.receive).await, Ok(b"end".to_vec()));
            }
        })
        .await;
}

#[tokio::test]
async fn a_reset_is_not_an_end() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
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
                send(&mut stream.send, b"x").await.expect("open");
                assert_eq!(
                    read_to_end(&mut stream.receive).await,
                    Err(StreamError::Reset)
                );
            }
        })
        .await;
}

const CODECS: [TunnelCodec; 2] = [TunnelCodec::Native, TunnelCodec::H2];

/// A client that the test speaks for, byte by byte, and the server's end.
async fn raw_client(
    codec: TunnelCodec,
) -> (client::TlsStream<DuplexStream>, SecuredServer<DuplexStream>) {
    let (far, near) = duplex(MIB);
    let connector = TlsConnector::from(tls().0);
    let connect = connector.connect(server_name(), far);
    let (far, near) = futures::future::join(connect, secured_server(codec, near)).await;
    (far.expect("TLS"), near)
}

/// A server that the test speaks for, byte by byte, and the client's end.
async fn raw_server(
    codec: TunnelCodec,
) -> (server::TlsStream<DuplexStream>, SecuredClient<DuplexStream>) {
    let (far, near) = duplex(MIB);
    let acceptor = TlsAcceptor::from(tls().1);
    let (far, near) =
        futures::future::join(acceptor.accept(far), secured_client(codec, near)).await;
    (far.expect("TLS"), near)
}

#[tokio::test(start_paused = true)]
async fn a_client_without_a_preface_is_gone_at_the_deadline() {
    for codec in CODECS {
        let (_silent, near) = raw_client(codec).await;
        let limits = Limits::default();
        let began = Instant::now();
        let result = TunnelServer::handshake(near, &limits).await;
        assert!(matches!(result, Err(TunnelError::TimedOut(_))));
        assert_eq!(began.elapsed(), limits.time.first_frame);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_no_ping_is_dead() {
    LocalSet::new()
        .run_until(async {
            for codec in CODECS {
                let (mut far, near) = raw_server(codec).await;
                let limits = Limits::default();
                let client = TunnelClient::handshake(near, &limits, None)
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
            }
        })
        .await;
}

#[tokio::test]
async fn a_peer_that_speaks_something_else_is_refused() {
    for codec in CODECS {
        let (mut far, near) = raw_client(codec).await;
        far.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n")
            .await
            .expect("open");
        let result = TunnelServer::handshake(near, &Limits::default()).await;
        assert!(matches!(result, Err(TunnelError::Protocol(_))));
    }
}

#[tokio::test]
async fn the_servers_stream_limit_reaches_the_client() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
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
            }
        })
        .await;
}

/// Bytes that differ everywhere, so that a lost, repeated or moved piece shows.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Sends back what comes, on every stream.
fn echo(mut server: TunnelServer<DuplexStream>) {
    spawn_local(async move {
        while let Some(Ok(incoming)) = server.accept().await {
            let stream = incoming.accept(HeaderMap::new()).expect("there");
            spawn_local(async move {
                let TunnelStream {
                    send: mut back,
                    mut receive,
                } = stream;
                while let Some(bytes) = poll_fn(|cx| receive.poll_data(cx)).await {
                    let bytes = bytes.expect("open");
                    send(&mut back, &bytes).await.expect("open");
                    receive.consumed(bytes.len());
                }
                back.finish().expect("open");
                poll_fn(|cx| back.poll_flushed(cx)).await;
            });
        }
    });
}

/// Sends everything and reads everything back, at the same time.
async fn there_and_back(client: &TunnelClient, bytes: &[u8], piece: usize) -> Vec<u8> {
    let (stream, _) = client.open(request()).await.expect("200");
    let TunnelStream {
        send: mut out,
        mut receive,
    } = stream;
    let sending = async {
        for piece in bytes.chunks(piece) {
            send(&mut out, piece).await.expect("open");
        }
        out.finish().expect("open");
    };
    let (all, ()) = futures::future::join(read_to_end(&mut receive), sending).await;
    all.expect("whole")
}

#[tokio::test]
async fn every_byte_comes_back_in_its_place() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, server) = tunnel(codecs).await;
                echo(server);
                let bytes = pattern(24 * MIB, 1);
                let back = there_and_back(&client, &bytes, MIB).await;
                assert!(back == bytes, "{codecs:?}");
            }
        })
        .await;
}

#[tokio::test]
async fn many_streams_of_all_sizes_do_not_mix() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, server) = tunnel(codecs).await;
                echo(server);
                let streams = (0..50).map(|seed| {
                    let client = client.clone();
                    spawn_local(async move {
                        let bytes = pattern(1 << (seed % 20), seed);
                        let piece = 1 + usize::try_from(seed * seed * 97).expect("small");
                        let back = there_and_back(&client, &bytes, piece).await;
                        assert!(back == bytes, "{codecs:?}, seed {seed}");
                    })
                });
                for ended in futures::future::join_all(streams).await {
                    ended.expect("whole");
                }
            }
        })
        .await;
}

#[tokio::test]
async fn keys_change_under_running_streams() {
    LocalSet::new()
        .run_until(async {
            for server_codec in CODECS {
                let (client, server) = tunnel((TunnelCodec::Native, server_codec)).await;
                echo(server);
                let TunnelClient::Native(native) = &client else {
                    panic!("asked for the native codec");
                };
                let bytes = pattern(4 * MIB, 2);
                let (stream, _) = client.open(request()).await.expect("200");
                let TunnelStream {
                    send: mut out,
                    mut receive,
                } = stream;
                let sending = async {
                    for piece in bytes.chunks(MIB / 16) {
                        native.refresh_keys();
                        send(&mut out, piece).await.expect("open");
                    }
                    out.finish().expect("open");
                };
                let (back, ()) = futures::future::join(read_to_end(&mut receive), sending).await;
                assert!(back.as_ref() == Ok(&bytes), "{server_codec:?}");
            }
        })
        .await;
}

#[tokio::test]
async fn the_clients_reset_reaches_the_server_and_nobody_else() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
                let (one, first) = opened(&client, &mut server).await;
                let (mut two, mut second) = opened(&client, &mut server).await;
                let serving = spawn_local(async move { while server.accept().await.is_some() {} });
                let mut first = first;
                drop(one);
                assert_eq!(
                    read_to_end(&mut first.receive).await,
                    Err(StreamError::Reset)
                );
                assert_eq!(
                    poll_fn(|cx| first.send.poll_reset(cx)).await,
                    StreamError::Reset
                );
                send(&mut two.send, b"unharmed").await.expect("open");
                two.send.finish().expect("open");
                let all = read_to_end(&mut second.receive).await;
                assert_eq!(all, Ok(b"unharmed".to_vec()), "{codecs:?}");
                serving.abort();
            }
        })
        .await;
}

/// A stream from both ends.
async fn opened(
    client: &TunnelClient,
    server: &mut TunnelServer<DuplexStream>,
) -> (TunnelStream, TunnelStream) {
    let opening = spawn_local({
        let client = client.clone();
        async move { client.open(request()).await.expect("200").0 }
    });
    let incoming = server.accept().await.expect("open").expect("well formed");
    let far = incoming.accept(HeaderMap::new()).expect("there");
    let near = tokio::select! {
        near = opening => near.expect("no panic"),
        _ = server.accept() => panic!("nothing else comes"),
    };
    (near, far)
}

#[tokio::test]
async fn a_request_that_is_given_up_is_abandoned() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
                let opening = spawn_local({
                    let client = client.clone();
                    async move { client.open(request()).await.map(|_| ()) }
                });
                let mut incoming = server.accept().await.expect("open").expect("well formed");
                opening.abort();
                tokio::select! {
                    () = incoming.abandoned() => {}
                    _ = server.accept() => panic!("nothing else comes"),
                }
                assert!(client.is_open(), "{codecs:?}");
            }
        })
        .await;
}

/// Reads what a client sends up to its first HEADERS (RFC 9113 sections 3.4 and 4.1).
async fn request_comes(far: &mut server::TlsStream<DuplexStream>) {
    far.read_exact(&mut [0; 24]).await.expect("a preface");
    loop {
        let mut head = [0; 9];
        far.read_exact(&mut head).await.expect("a frame");
        let [_, high, low, kind, ..] = head;
        let mut payload = vec![0; usize::from(u16::from_be_bytes([high, low]))];
        far.read_exact(&mut payload).await.expect("a frame");
        if kind == 1 {
            return;
        }
    }
}

/// TCP that ends without close_notify may have lost something: nobody may take it for an end.
#[tokio::test]
async fn a_connection_that_is_cut_off_is_lost_not_ended() {
    LocalSet::new()
        .run_until(async {
            for codec in CODECS {
                let (mut far, near) = raw_server(codec).await;
                let client = TunnelClient::handshake(near, &Limits::default(), None)
                    .await
                    .expect("writes");
                let opening = spawn_local({
                    let client = client.clone();
                    async move { client.open(request()).await }
                });
                request_comes(&mut far).await;
                // SETTINGS, then 200 on stream 1, then some bytes (RFC 9113 section 6, RFC 7541 appendix A).
                let answer = [
                    &[0, 0, 0, 4, 0, 0, 0, 0, 0][..],
                    &[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88],
                    &[0, 0, 4, 0, 0, 0, 0, 0, 1],
                    b"half",
                ];
                far.write_all(&answer.concat()).await.expect("open");
                far.flush().await.expect("open");
                let (mut stream, _) = opening.await.expect("no panic").expect("200");
                let (mut socket, _) = far.into_inner();
                socket.shutdown().await.expect("open");
                let first = poll_fn(|cx| stream.receive.poll_data(cx)).await;
                assert_eq!(first, Some(Ok(Bytes::from_static(b"half"))));
                let end = poll_fn(|cx| stream.receive.poll_data(cx)).await;
                assert_eq!(end, Some(Err(StreamError::Lost)), "{codec:?}");
                assert!(!client.is_open());
            }
        })
        .await;
}

/// Frames that break the protocol end the tunnel of who sent them, with GOAWAY, and no panic.
#[tokio::test]
async fn an_offender_is_told_and_closed() {
    let (mut far, near) = raw_client(TunnelCodec::Native).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // SETTINGS, then DATA on a stream that nobody has opened.
    let frames = [
        &preface[..],
        &[0, 0, 0, 4, 0, 0, 0, 0, 0],
        &[0, 0, 1, 0, 0, 0, 0, 0, 1, 7],
    ];
    far.write_all(&frames.concat()).await.expect("open");
    let serving = async {
        let mut server = TunnelServer::handshake(near, &Limits::default()).await?;
        match server.accept().await {
            Some(Err(error)) => Err(error),
            other => panic!("{other:?}"),
        }
    };
    let error: Result<(), TunnelError> = serving.await;
    assert!(matches!(error, Err(TunnelError::Protocol(_))), "{error:?}");
    let mut answer = Vec::new();
    far.read_to_end(&mut answer)
        .await
        .expect("ends with close_notify");
    // The last frame is GOAWAY, PROTOCOL_ERROR (RFC 9113 sections 6.8 and 7).
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    assert!(answer.ends_with(&goaway), "{answer:02x?}");
}

#[tokio::test]
async fn a_tunnel_that_nobody_holds_closes() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
                drop(client);
                let end = server.accept().await;
                assert!(!matches!(end, Some(Ok(_))), "{codecs:?}: {end:?}");
            }
        })
        .await;
}

#[test]
fn a_stream_is_small() {
    // Budget: 3 KB for an idle connection, of which the relay's future takes up to one.
    assert!(size_of::<TunnelStream>() <= 256);
    assert!(size_of::<TunnelClient>() <= 128);
}

mod windows;
