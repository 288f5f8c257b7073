//! The agent as the server of a client with ztunnel's settings: many streams of one connection, half-closed, reset,
//! with windows that change and PINGs in between. Every byte is compared at both ends.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use h2::{Ping, RecvStream, SendStream, client};
use http::{Method, Request, StatusCode};
use mesh_tests::paths::pattern;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::spawn_local,
    time::timeout,
};

use super::{CODECS, PORT, World, identity, within};
use crate::{
    peer::{self, Credentials, LIMIT, TUNNEL_PORT},
    raw,
};

/// ztunnel's settings as a client, and the most streams that it puts on a connection.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
const HEADER_LIST: u32 = 16 << 10;
const STREAMS: usize = 100;
/// Sent each way on every stream, bytes; the first stream carries more than a window.
const BYTES: usize = 96 << 10;
const LONG_BYTES: usize = 6 << 20;
/// Streams that are reset in the middle, beside the others.
const RESETS: usize = 10;

/// What the application saw.
#[derive(Debug, Default)]
struct Application {
    finished: AtomicU64,
    reset: AtomicU64,
    changed: Notify,
}

#[test]
fn a_client_of_the_field_is_served_to_the_byte() -> Result<()> {
    for codec in CODECS {
        a_client_of_the_field_is_served(codec).context(codec)?;
    }
    Ok(())
}

fn a_client_of_the_field_is_served(codec: &str) -> Result<()> {
    let world = World::start(codec)?;
    let (victim, web) = (world.lab.pod("victim")?, world.lab.pod("web")?);
    let own = world.certificate("web")?;
    let application = Arc::new(Application::default());
    let stop = Arc::new(Notify::new());
    let (ready, listening) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            within(&victim.netns, || {
                echo(victim.at(PORT), application.clone(), ready, stop.clone())
            })
        });
        // The server's own error says more than a closed channel.
        let ran = listening
            .recv()
            .context("no server")
            .and_then(|()| within(&web.netns, || converse(victim.at(PORT), &own, &application)));
        stop.notify_one();
        serving
            .join()
            .map_err(|_| anyhow!("the server panicked"))??;
        ran
    })
}

async fn converse(to: SocketAddr, own: &Credentials, application: &Application) -> Result<()> {
    let tasks = tokio::task::LocalSet::new();
    let all = tasks.run_until(async {
        let config = peer::client_config(Some(own), own, &identity("victim"))?;
        let tunnel = SocketAddr::new(to.ip(), TUNNEL_PORT);
        let stream = peer::connect(tunnel, config).await?;
        let (requests, mut connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEADER_LIST)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await?;
        let mut ping = connection.ping_pong().context("PING")?;
        let resize = Arc::new(Notify::new());
        let resized = resize.clone();
        let driving = spawn_local(async move {
            // Smaller than what is on its way, then ztunnel's own again: SETTINGS with streams open (RFC 9113
            // section 6.9.2), each time the test says so.
            for window in [1 << 10, STREAM_WINDOW] {
                tokio::select! {
                    ended = &mut connection => return ended,
                    () = resized.notified() => connection.set_initial_window_size(window)?,
                }
            }
            connection.await
        });
        let mut streams = Vec::new();
        for number in 0..STREAMS {
            let bytes = if number == 0 { LONG_BYTES } else { BYTES };
            let mut sent = pattern(bytes);
            // No two streams say the same.
            sent.rotate_left(number * 7);
            let (send, receive) = open(&requests, to).await?;
            streams.push(spawn_local(exchange(send, receive, sent)));
            if number == STREAMS / 3 || number == STREAMS * 2 / 3 {
                resize.notify_one();
                timeout(LIMIT, ping.ping(Ping::opaque())).await??;
            }
        }
        for number in 0..RESETS {
            let (mut send, _receive) = open(&requests, to).await?;
            peer::send_all(&mut send, Bytes::from(vec![number as u8; 1 << 10])).await?;
            send.send_reset(h2::Reason::CANCEL);
        }
        for (number, stream) in streams.into_iter().enumerate() {
            let exchanged = stream.await.context("a stream's task")?;
            exchanged.with_context(|| format!("stream {number}"))?;
        }
        // The application is told of either end as it was.
        loop {
            let changed = application.changed.notified();
            let finished = application.finished.load(Ordering::Acquire);
            let reset = application.reset.load(Ordering::Acquire);
            if finished >= STREAMS as u64 && reset >= RESETS as u64 {
                ensure!(finished == STREAMS as u64, "{finished} clean ends");
                break;
            }
            timeout(LIMIT, changed)
                .await
                .with_context(|| format!("{finished} clean ends, {reset} resets"))?;
        }
        ensure!(!driving.is_finished(), "the tunnel ended");
        goaway(to, own).await
    });
    all.await
}

/// A client that goes away lets its stream end first.
async fn goaway(to: SocketAddr, own: &Credentials) -> Result<()> {
    let config = peer::client_config(Some(own), own, &identity("victim"))?;
    let mut stream = peer::connect(SocketAddr::new(to.ip(), TUNNEL_PORT), config).await?;
    let authority = to.to_string();
    let fields: [(&[u8], &[u8]); 2] = [
        (b":method", b"CONNECT"),
        (b":authority", authority.as_bytes()),
    ];
    // Within the window that HTTP/2 begins with.
    let (before, after) = (pattern(12_000), pattern(9_000));
    let heard = raw::goaway_in_between(&mut stream, &fields, &before, &after).await?;
    ensure!(heard == [before, after].concat(), "{} bytes", heard.len());
    Ok(())
}

/// CONNECT with every header that ztunnel sends.
async fn open(
    requests: &client::SendRequest<Bytes>,
    to: SocketAddr,
) -> Result<(SendStream<Bytes>, RecvStream)> {
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(to.to_string())
        .header(
            "baggage",
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web,\
             service.name=web,service.version=v1",
        )
        .header("forwarded", "for=\"10.244.1.1:40000\"")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        )
        .body(())?;
    let mut requests = timeout(LIMIT, requests.clone().ready()).await??;
    let (answer, send) = requests.send_request(request, false)?;
    let answer = timeout(LIMIT, answer).await??;
    ensure!(answer.status() == StatusCode::OK, "{answer:?}");
    Ok((send, answer.into_body()))
}

/// Sends everything, ends, and compares what comes back until the other side ends too.
async fn exchange(
    mut send: SendStream<Bytes>,
    mut receive: RecvStream,
    sent: Vec<u8>,
) -> Result<()> {
    let sent = Bytes::from(sent);
    let up = async {
        peer::send_all(&mut send, sent.clone()).await?;
        Ok::<_, anyhow::Error>(send.send_data(Bytes::new(), true)?)
    };
    let down = async {
        let mut at = 0;
        while let Some(data) = timeout(LIMIT, receive.data()).await? {
            let data = data?;
            ensure!(
                sent.get(at..at + data.len()) == Some(&data[..]),
                "other bytes at {at}"
            );
            at += data.len();
            receive.flow_control().release_capacity(data.len())?;
        }
        ensure!(at == sent.len(), "ended after {at} of {}", sent.len());
        Ok(())
    };
    tokio::try_join!(up, down).map(drop)
}

/// The application: sends back what it gets, and ends when its client has.
async fn echo(
    at: SocketAddr,
    application: Arc<Application>,
    ready: std::sync::mpsc::SyncSender<()>,
    stop: Arc<Notify>,
) -> Result<()> {
    let listener = TcpListener::bind(at).await?;
    ready.send(())?;
    let tasks = tokio::task::LocalSet::new();
    let accepting = tasks.run_until(async {
        loop {
            let (socket, _) = listener.accept().await?;
            let application = application.clone();
            spawn_local(async move {
                let ended = match echo_one(socket).await {
                    Ok(()) => &application.finished,
                    Err(_) => &application.reset,
                };
                ended.fetch_add(1, Ordering::Release);
                application.changed.notify_waiters();
            });
        }
    });
    tokio::select! {
        ended = accepting => ended,
        () = stop.notified() => Ok(()),
    }
}

async fn echo_one(socket: TcpStream) -> std::io::Result<()> {
    let (mut reader, mut writer) = socket.into_split();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            return writer.shutdown().await;
        }
        writer.write_all(&buffer[..length]).await?;
    }
}
