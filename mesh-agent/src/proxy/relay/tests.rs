//! Close orders are run three times: directly between two sockets (what TCP does), through a plain relay, and through
//! two relays with a tunnel between them. All three must look alike to the applications.

use std::{net::SocketAddr, rc::Rc};

use http::HeaderMap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{JoinHandle, LocalSet, spawn_local},
    time::Instant,
};

use super::*;
use crate::proxy::{
    TunnelCodec,
    limits::{STREAM_SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES},
    testing::{PAIRS, tunnel},
    tunnel::{ConnectRequest, TunnelServer},
};

mod stalls;

const MIB: usize = 1 << 20;
const HALF_CLOSE_IDLE: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    Direct,
    Plain,
    Tunnel(TunnelCodec, TunnelCodec),
}

impl Via {
    const RELAYS: [Self; 5] = [
        Self::Plain,
        Self::Tunnel(TunnelCodec::Native, TunnelCodec::Native),
        Self::Tunnel(TunnelCodec::Native, TunnelCodec::H2),
        Self::Tunnel(TunnelCodec::H2, TunnelCodec::Native),
        Self::Tunnel(TunnelCodec::H2, TunnelCodec::H2),
    ];
}

#[derive(Debug, Default)]
struct Counted {
    up: Cell<usize>,
    down: Cell<usize>,
    /// Address of the socket to the other side, asked for when all was over.
    far: Cell<Option<SocketAddr>>,
    /// Which directions wait.
    waits: Cell<(bool, bool)>,
}

impl Meter for Counted {
    fn near_to_far(&self, bytes: usize) {
        self.up.set(self.up.get() + bytes);
    }

    fn far_to_near(&self, bytes: usize) {
        self.down.set(self.down.get() + bytes);
    }

    fn waits(&self, up: bool, down: bool) {
        self.waits.set((up, down));
    }

    fn ended(&self, far: Option<&TcpStream>) {
        self.far.set(far.and_then(|far| far.local_addr().ok()));
    }
}

struct Chain {
    client: TcpStream,
    server: TcpStream,
    /// At the client's side, then at the server's.
    relays: Vec<JoinHandle<End>>,
    close: Rc<CloseSignal>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address: SocketAddr = listener.local_addr().expect("bound");
    let (dialled, accepted) =
        futures::future::join(TcpStream::connect(address), listener.accept()).await;
    (dialled.expect("connects"), accepted.expect("accepts").0)
}

fn request() -> ConnectRequest {
    ConnectRequest {
        authority: "10.1.0.5:80".into(),
        headers: HeaderMap::new(),
    }
}

/// Relays the server's side of every stream to one of `sockets`.
fn serve(
    mut server: TunnelServer<tokio::io::DuplexStream>,
    mut sockets: Vec<TcpStream>,
) -> JoinHandle<Vec<JoinHandle<End>>> {
    spawn_local(async move {
        let mut relays = Vec::new();
        while let Some(Ok(incoming)) = server.accept().await {
            let stream = incoming.accept(HeaderMap::new()).expect("stream is there");
            let socket = sockets.remove(0);
            relays.push(spawn_local(async move {
                let signal = CloseSignal::default();
                relay_tunnel(
                    socket,
                    stream,
                    &Rc::<Counted>::default(),
                    &signal,
                    HALF_CLOSE_IDLE,
                )
                .await
            }));
        }
        relays
    })
}

async fn chain(via: Via) -> Chain {
    let (client, client_near) = pair().await;
    if via == Via::Direct {
        return Chain {
            client,
            server: client_near,
            relays: Vec::new(),
            close: Rc::default(),
        };
    }
    let (server_near, server) = pair().await;
    let close = Rc::new(CloseSignal::default());
    let signal = close.clone();
    if via == Via::Plain {
        let relay = spawn_local(async move {
            relay_tcp(
                client_near,
                server_near,
                &Counted::default(),
                &signal,
                HALF_CLOSE_IDLE,
            )
            .await
        });
        return Chain {
            client,
            server,
            relays: vec![relay],
            close,
        };
    }
    let Via::Tunnel(near_codec, far_codec) = via else {
        unreachable!("the other ways were taken above");
    };
    let (tunnel, tunnel_server) = tunnel((near_codec, far_codec)).await;
    serve(tunnel_server, vec![server_near]);
    let relay = spawn_local(async move {
        let (stream, _) = tunnel.open(request()).await.expect("200");
        relay_tunnel(
            client_near,
            stream,
            &Rc::<Counted>::default(),
            &signal,
            HALF_CLOSE_IDLE,
        )
        .await
    });
    Chain {
        client,
        server,
        relays: vec![relay],
        close,
    }
}

/// How a reader saw the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saw {
    Fin(usize),
    /// Bytes before a reset are not counted: TCP promises none of them.
    Rst,
}

async fn read_to_end(socket: &mut TcpStream) -> Saw {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    loop {
        match socket.read(&mut buffer).await {
            Ok(0) => return Saw::Fin(total),
            Ok(count) => total += count,
            Err(_) => return Saw::Rst,
        }
    }
}

async fn all_ways<F>(scenario: impl Fn(Chain) -> F)
where
    F: Future<Output = (Saw, Saw)>,
{
    LocalSet::new()
        .run_until(async {
            let expected = scenario(chain(Via::Direct).await).await;
            for via in Via::RELAYS {
                for round in 0..20 {
                    assert_eq!(
                        scenario(chain(via).await).await,
                        expected,
                        "{via:?}, round {round}"
                    );
                }
            }
        })
        .await;
}

fn rst(socket: TcpStream) {
    reset(socket);
}

#[tokio::test]
async fn a_half_closed_connection_carries_the_answer() {
    all_ways(|mut chain| async move {
        chain.client.write_all(b"question").await.expect("open");
        chain.client.shutdown().await.expect("open");
        let server = spawn_local(async move {
            let saw = read_to_end(&mut chain.server).await;
            chain
                .server
                .write_all(&vec![7; 3 * MIB])
                .await
                .expect("client reads");
            saw
        });
        let client = read_to_end(&mut chain.client).await;
        let saw = (client, server.await.expect("no panic"));
        assert_eq!(saw, (Saw::Fin(3 * MIB), Saw::Fin(8)));
        saw
    })
    .await;
}

#[tokio::test]
async fn a_server_that_sends_and_closes_at_once_is_read_whole() {
    all_ways(|mut chain| async move {
        let server = spawn_local(async move {
            chain
                .server
                .write_all(&vec![7; MIB])
                .await
                .expect("client reads");
        });
        let client = read_to_end(&mut chain.client).await;
        server.await.expect("no panic");
        assert_eq!(client, Saw::Fin(MIB));
        (client, Saw::Fin(0))
    })
    .await;
}

#[tokio::test]
async fn a_client_that_sends_and_closes_at_once_is_read_whole() {
    all_ways(|mut chain| async move {
        let client = spawn_local(async move {
            chain
                .client
                .write_all(&vec![7; MIB])
                .await
                .expect("server reads");
        });
        let server = read_to_end(&mut chain.server).await;
        client.await.expect("no panic");
        assert_eq!(server, Saw::Fin(MIB));
        (Saw::Fin(0), server)
    })
    .await;
}

#[tokio::test]
async fn a_clients_reset_is_a_reset() {
    all_ways(|mut chain| async move {
        chain
            .client
            .write_all(b"half an upload")
            .await
            .expect("open");
        rst(chain.client);
        let server = read_to_end(&mut chain.server).await;
        assert_eq!(server, Saw::Rst);
        (Saw::Rst, server)
    })
    .await;
}

#[tokio::test]
async fn a_servers_reset_is_a_reset() {
    all_ways(|mut chain| async move {
        chain
            .server
            .write_all(b"half an answer")
            .await
            .expect("open");
        rst(chain.server);
        let client = read_to_end(&mut chain.client).await;
        assert_eq!(client, Saw::Rst);
        (client, Saw::Rst)
    })
    .await;
}

/// The error of a reset socket goes to the first call that meets it; a read after a failed write sees an end of file.
#[tokio::test]
async fn a_servers_reset_is_a_reset_also_when_a_write_meets_it_first() {
    // Which direction goes first alternates from one wake-up to the next.
    for exchanges in 0..4 {
        LocalSet::new()
            .run_until(async {
                let mut chain = chain(Via::Plain).await;
                for _ in 0..exchanges {
                    chain.client.write_all(b"x").await.expect("open");
                    chain.server.read_exact(&mut [0]).await.expect("open");
                }
                rst(chain.server);
                chain.client.write_all(b"x").await.expect("open");
                assert_eq!(
                    read_to_end(&mut chain.client).await,
                    Saw::Rst,
                    "after {exchanges}"
                );
            })
            .await;
    }
}

#[tokio::test]
async fn a_servers_reset_after_the_clients_fin_is_a_reset() {
    all_ways(|mut chain| async move {
        chain.client.shutdown().await.expect("open");
        assert_eq!(read_to_end(&mut chain.server).await, Saw::Fin(0));
        rst(chain.server);
        let client = read_to_end(&mut chain.client).await;
        assert_eq!(client, Saw::Rst);
        (client, Saw::Fin(0))
    })
    .await;
}

#[tokio::test]
async fn a_clients_reset_after_the_servers_fin_is_a_reset() {
    all_ways(|mut chain| async move {
        chain.server.shutdown().await.expect("open");
        assert_eq!(read_to_end(&mut chain.client).await, Saw::Fin(0));
        rst(chain.client);
        let server = read_to_end(&mut chain.server).await;
        assert_eq!(server, Saw::Rst);
        (Saw::Fin(0), server)
    })
    .await;
}

#[tokio::test]
async fn a_clients_reset_after_its_own_fin_is_a_reset() {
    all_ways(|mut chain| async move {
        chain.client.shutdown().await.expect("open");
        assert_eq!(read_to_end(&mut chain.server).await, Saw::Fin(0));
        rst(chain.client);
        broken(&chain.server).await;
        (Saw::Rst, Saw::Rst)
    })
    .await;
}

#[tokio::test]
async fn an_answer_before_a_close_with_unread_input_is_delivered_then_reset() {
    all_ways(|mut chain| async move {
        chain.client.write_all(b"never read").await.expect("open");
        chain.server.peek(&mut [0]).await.expect("input is there");
        chain.server.write_all(b"413").await.expect("open");
        drop(chain.server);
        let mut answer = [0; 3];
        chain
            .client
            .read_exact(&mut answer)
            .await
            .expect("the answer comes first");
        let client = read_to_end(&mut chain.client).await;
        assert_eq!((&answer, client), (b"413", Saw::Rst));
        (client, Saw::Rst)
    })
    .await;
}

#[tokio::test]
async fn the_first_bytes_of_a_server_need_none_of_the_client() {
    all_ways(|mut chain| async move {
        chain.server.write_all(b"220 hello").await.expect("open");
        let mut banner = [0; 9];
        chain.client.read_exact(&mut banner).await.expect("no wait");
        (Saw::Fin(0), Saw::Fin(0))
    })
    .await;
}

#[tokio::test]
async fn a_lost_tunnel_is_a_reset_on_both_sides() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (mut client, client_near) = pair().await;
                let (server_near, mut server) = pair().await;
                let (tunnel, tunnel_server) = tunnel(codecs).await;
                let serving = serve(tunnel_server, vec![server_near]);
                let relay = spawn_local(async move {
                    let (stream, _) = tunnel.open(request()).await.expect("200");
                    let signal = CloseSignal::default();
                    relay_tunnel(
                        client_near,
                        stream,
                        &Rc::<Counted>::default(),
                        &signal,
                        HALF_CLOSE_IDLE,
                    )
                    .await
                });
                client.write_all(b"x").await.expect("open");
                server.read_exact(&mut [0]).await.expect("passed on");
                serving.abort();
                assert_eq!(read_to_end(&mut client).await, Saw::Rst);
                assert_eq!(read_to_end(&mut server).await, Saw::Rst);
                assert_eq!(relay.await.expect("no panic"), End::FarReset);
            }
        })
        .await;
}

/// As when the process is killed: the sockets are closed by whoever cleans up, not by the relay.
#[tokio::test]
async fn a_relay_that_is_torn_down_is_a_reset_on_both_sides() {
    LocalSet::new()
        .run_until(async {
            for via in Via::RELAYS {
                let mut chain = chain(via).await;
                chain.client.write_all(b"x").await.expect("open");
                chain.server.read_exact(&mut [0]).await.expect("passed on");
                chain.relays.remove(0).abort();
                assert_eq!(read_to_end(&mut chain.client).await, Saw::Rst, "{via:?}");
                assert_eq!(read_to_end(&mut chain.server).await, Saw::Rst, "{via:?}");
            }
        })
        .await;
}

#[tokio::test]
async fn a_connection_told_to_close_is_reset_on_both_sides() {
    LocalSet::new()
        .run_until(async {
            for via in Via::RELAYS {
                let mut chain = chain(via).await;
                chain.client.write_all(b"x").await.expect("open");
                chain.server.read_exact(&mut [0]).await.expect("passed on");
                chain.close.close(CloseReason::Revoked);
                assert_eq!(read_to_end(&mut chain.client).await, Saw::Rst, "{via:?}");
                assert_eq!(read_to_end(&mut chain.server).await, Saw::Rst, "{via:?}");
                let end = chain.relays.remove(0).await.expect("no panic");
                assert_eq!(end, End::Closed(CloseReason::Revoked));
            }
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_silent_connection_ends() {
    LocalSet::new()
        .run_until(async {
            for via in Via::RELAYS {
                let mut chain = chain(via).await;
                let began = Instant::now();
                chain.client.shutdown().await.expect("open");
                let end = chain.relays.remove(0).await.expect("no panic");
                assert_eq!(end, End::TimedOut, "{via:?}");
                assert!(began.elapsed() >= HALF_CLOSE_IDLE);
                assert_eq!(read_to_end(&mut chain.client).await, Saw::Rst, "{via:?}");
            }
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_connection_lives_while_bytes_come() {
    LocalSet::new()
        .run_until(async {
            for via in Via::RELAYS {
                let mut chain = chain(via).await;
                chain.client.shutdown().await.expect("open");
                let server = spawn_local(async move {
                    for _ in 0..5 {
                        sleep(HALF_CLOSE_IDLE / 2 + Duration::from_secs(1)).await;
                        chain.server.write_all(b"x").await.expect("still open");
                    }
                });
                assert_eq!(read_to_end(&mut chain.client).await, Saw::Fin(5), "{via:?}");
                server.await.expect("no panic");
            }
        })
        .await;
}

/// Small kernel buffers, so that what the relay holds shows.
fn shrink(socket: &TcpStream) {
    let socket = SockRef::from(socket);
    socket.set_send_buffer_size(32 << 10).expect("allowed");
    socket.set_recv_buffer_size(32 << 10).expect("allowed");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stops_stops_the_writer_and_gets_everything_later() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (mut client, client_near) = pair().await;
                let (server_near, mut server) = pair().await;
                for socket in [&client, &client_near, &server_near, &server] {
                    shrink(socket);
                }
                let (tunnel, tunnel_server) = tunnel(codecs).await;
                serve(tunnel_server, vec![server_near]);
                spawn_local(async move {
                    let (stream, _) = tunnel.open(request()).await.expect("200");
                    let signal = CloseSignal::default();
                    relay_tunnel(
                        client_near,
                        stream,
                        &Rc::<Counted>::default(),
                        &signal,
                        HALF_CLOSE_IDLE,
                    )
                    .await
                });
                let block = vec![7; 64 << 10];
                let mut written = 0;
                // Paused time moves only when nothing else can: then the writer is stopped for good.
                while let Ok(count) = timeout(Duration::from_secs(1), client.write(&block)).await {
                    written += count.expect("open");
                    assert!(written < 64 * MIB, "the writer is not stopped");
                }
                let bound = STREAM_WINDOW_BYTES as usize + STREAM_SEND_BUFFER_BYTES + 2 * MIB;
                assert!(
                    written <= bound,
                    "{written} bytes are on their way, at most {bound} are allowed"
                );
                drop(client.shutdown().await);
                assert_eq!(read_to_end(&mut server).await, Saw::Fin(written));
            }
        })
        .await;
}

/// The writer has filled every buffer on the way to a reader that stopped, then it resets: nothing is read from it any
/// more, and yet the reader must hear of it, and every relay must end.
#[tokio::test(start_paused = true)]
async fn a_reset_behind_a_closed_window_is_a_reset() {
    LocalSet::new()
        .run_until(async {
            for via in Via::RELAYS {
                for upload in [true, false] {
                    let mut chain = chain(via).await;
                    let (mut writer, frozen) = match upload {
                        true => (chain.client, chain.server),
                        false => (chain.server, chain.client),
                    };
                    let block = vec![7; 256 << 10];
                    while timeout(Duration::from_secs(1), writer.write(&block))
                        .await
                        .is_ok()
                    {}
                    rst(writer);
                    let patience = Duration::from_secs(10);
                    let end = timeout(patience, chain.relays.remove(0)).await;
                    let end = end.unwrap_or_else(|_| panic!("{via:?}, {upload}: relay stays"));
                    let expected = if upload {
                        End::NearReset
                    } else {
                        End::FarReset
                    };
                    assert_eq!(end.expect("no panic"), expected, "{via:?}");
                    let heard = timeout(patience, broken(&frozen)).await;
                    assert!(heard.is_ok(), "{via:?}, {upload}: the reader hears nothing");
                }
            }
        })
        .await;
}

#[tokio::test]
async fn bytes_are_counted_on_both_ways() {
    LocalSet::new()
        .run_until(async {
            let (mut client, client_near) = pair().await;
            let (server_near, mut server) = pair().await;
            let far = server_near.local_addr().expect("connected");
            let relay = spawn_local(async move {
                let (counted, signal) = (Counted::default(), CloseSignal::default());
                let end =
                    relay_tcp(client_near, server_near, &counted, &signal, HALF_CLOSE_IDLE).await;
                let passed = (counted.up.get(), counted.down.get());
                (end, passed, counted.far.get())
            });
            client.write_all(b"12345").await.expect("open");
            client.shutdown().await.expect("open");
            assert_eq!(read_to_end(&mut server).await, Saw::Fin(5));
            server.write_all(b"123").await.expect("open");
            drop(server);
            assert_eq!(read_to_end(&mut client).await, Saw::Fin(3));
            assert_eq!(
                relay.await.expect("no panic"),
                (End::Finished, (5, 3), Some(far)),
                "the socket is measured before it is closed"
            );
        })
        .await;
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    fn size<A, B, M, C, F>(_: fn(A, B, M, C, Duration) -> F) -> usize {
        size_of::<F>()
    }
    // The budget is 3 KB per idle connection, everything included; the future is its largest part.
    let tunnel = size(relay_tunnel::<Counted>);
    let tcp = size(relay_tcp::<Counted>);
    assert!(tunnel <= 1024, "relay_tunnel takes {tunnel} bytes");
    assert!(tcp <= 1024, "relay_tcp takes {tcp} bytes");
}

mod waits;
