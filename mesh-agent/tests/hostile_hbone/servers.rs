//! The agent as the client of servers that are within HTTP/2 and HBONE and yet unlike ours: small windows, few streams,
//! GOAWAY in the middle, answers that are late, odd or refusals. The applications' records are what is judged.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use h2::{RecvStream, SendStream, server};
use http::{Request, Response, StatusCode};
use mesh_tests::{
    conversation::{self, client, client_with, talk},
    lab::{Pod, PodSpec},
    process::Program,
    programs,
    seqecho::report::Report,
    wait,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    task::spawn_local,
};
use tokio_rustls::TlsAcceptor;

use super::{CODECS, PORT, World, identity, within};
use crate::peer::{self, Credentials, TUNNEL_PORT};

/// What a server does with a request.
#[derive(Debug, Clone, Copy)]
enum Answer {
    /// 200 and the application's bytes.
    Serve,
    /// 100 and 103 first, then 200 with many headers that mean nothing to HBONE.
    Talkative,
    /// 200 only once this many requests wait for theirs.
    LateUntil(usize),
    /// This status, without a body.
    Refuse(u16),
    /// 200, and RST_STREAM after the first bytes.
    Cut,
}

/// How a server is.
#[derive(Debug, Clone, Copy)]
struct Behaviour {
    stream_window: u32,
    connection_window: u32,
    frame: u32,
    streams: u32,
    answer: Answer,
    /// GOAWAY after so many requests of a tunnel; those that are open go on.
    goaway_after: Option<usize>,
}

/// ztunnel's.
const ZTUNNEL: Behaviour = Behaviour {
    stream_window: 4 << 20,
    connection_window: 16 << 20,
    frame: 1 << 20,
    streams: 200,
    answer: Answer::Serve,
    goaway_after: None,
};

/// What a server saw.
#[derive(Debug, Default)]
struct Seen {
    tunnels: Cell<usize>,
    streams: Cell<usize>,
    waiting: Cell<usize>,
    arrived: Notify,
    errors: RefCell<Vec<String>>,
}

/// The lab with a pod that the mesh believes enrolled, without an agent: the test is its tunnel's end.
struct Foreign {
    world: World,
    own: Credentials,
}

impl Foreign {
    fn start(codec: &str) -> Result<Self> {
        let mut world = World::start(codec)?;
        world.lab.add_pod("n2", PodSpec::new("foreign"))?;
        let node = world.lab.node("n2")?;
        world
            .mesh
            .write_pod(node, world.lab.pod("foreign")?, true)?;
        wait::until("the mesh to know the pod", conversation::LIMIT, || {
            let dump = ["-o", "json", "dump"];
            let dump = world.mesh.weft(&world.lab, world.lab.node("n1")?, &dump)?;
            Ok(dump.ok()?.contains(&identity("foreign")).then_some(()))
        })?;
        let own = world.certificate("foreign")?;
        Ok(Self { world, own })
    }

    fn pod(&self) -> Result<&Pod> {
        self.world.lab.pod("foreign")
    }

    /// What a client of `web` reports of the pod's application.
    fn talk(&self, arguments: &str) -> Result<Report> {
        let program = client_with(self.pod()?.at(PORT), arguments)?;
        talk(&self.world.lab, self.world.lab.pod("web")?, &program)
    }

    /// Serves with this behaviour while `run` runs, then ends every tunnel. Returns how many tunnels and streams there
    /// were.
    fn serving(
        &self,
        behaviour: Behaviour,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<(usize, usize)> {
        let pod = self.pod()?;
        let at = SocketAddr::new(pod.address(), TUNNEL_PORT);
        let over = Arc::new(Notify::new());
        let (ready, listening) = std::sync::mpsc::sync_channel(1);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                within(&pod.netns, || {
                    serve(at, &self.own, behaviour, ready, over.clone())
                })
            });
            // The server's own error says more than a closed channel.
            let ran = listening.recv().context("no server").and_then(|()| run());
            over.notify_one();
            let seen = server
                .join()
                .map_err(|_| anyhow!("the server panicked"))??;
            let node = self.world.lab.node("n1")?;
            ran.with_context(|| format!("{behaviour:?}\n{}", self.world.mesh.log_of(node)))?;
            Ok::<_, anyhow::Error>(seen)
        })
    }
}

#[test]
fn servers_unlike_ours_lose_nothing_and_refusals_are_never_a_clean_end() -> Result<()> {
    for codec in CODECS {
        servers_unlike_ours(codec).context(codec)?;
    }
    Ok(())
}

fn servers_unlike_ours(codec: &str) -> Result<()> {
    let foreign = Foreign::start(codec)?;
    let application: SocketAddr = ([127, 0, 0, 1], PORT).into();
    let echo = Program::new(programs::own("seqecho")?).args([
        "server",
        "--listen",
        &application.to_string(),
    ]);
    let lab = &foreign.world.lab;
    let _echo = lab.serve(foreign.pod()?, &echo, application, conversation::LIMIT)?;
    exact(&foreign, ZTUNNEL)?;
    let (tunnels, streams) = exact(
        &foreign,
        Behaviour {
            stream_window: 1 << 10,
            connection_window: 65_535,
            frame: 16 << 10,
            streams: 2,
            ..ZTUNNEL
        },
    )?;
    ensure!(
        tunnels * 2 >= 12 && streams >= 12,
        "{streams} streams on {tunnels} tunnels"
    );
    let (tunnels, _) = exact(
        &foreign,
        Behaviour {
            goaway_after: Some(3),
            ..ZTUNNEL
        },
    )?;
    ensure!(tunnels > 1, "all went on after GOAWAY");
    for answer in [Answer::Talkative, Answer::LateUntil(4)] {
        exact(&foreign, Behaviour { answer, ..ZTUNNEL })?;
    }
    refusals(&foreign)
}

/// Up, down, both at once, ended by either side: nothing may be lost, repeated or changed.
fn exact(foreign: &Foreign, behaviour: Behaviour) -> Result<(usize, usize)> {
    foreign.serving(behaviour, || {
        for arguments in [
            "--connections 12 --records 100 --stall-ms 20000",
            "--mode answer --connections 4 --records 5000 --stall-ms 20000",
            "--mode server-fin --connections 4 --records 10 --stall-ms 20000",
        ] {
            let report = foreign.talk(arguments)?;
            ensure!(
                report.lost() == 0 && report.complete >= 4,
                "{arguments}: {report:?}"
            );
        }
        Ok(())
    })
}

fn refusals(foreign: &Foreign) -> Result<()> {
    let answer = Answer::Cut;
    foreign.serving(Behaviour { answer, ..ZTUNNEL }, || {
        let report = foreign.talk("--connections 4 --records 1000")?;
        ensure!(report.resets == 4, "not all reset: {report:?}");
        Ok(())
    })?;
    // 401 last: the kernel remembers it, and asks nobody again.
    for status in [204, 302, 400, 403, 404, 429, 500, 503, 401] {
        let answer = Answer::Refuse(status);
        foreign.serving(Behaviour { answer, ..ZTUNNEL }, || {
            let (lab, web) = (&foreign.world.lab, foreign.world.lab.pod("web")?);
            let report = talk(lab, web, &client(foreign.pod()?.at(PORT))?)?;
            // An RST may come before connect(2) has looked.
            let resets = report.resets + report.connect_errors.get("ECONNRESET").unwrap_or(&0);
            ensure!(
                resets == 1 && report.records == 0,
                "not a reset: {report:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// Accepts tunnels until `over`; everything that is open then is cut.
async fn serve(
    at: SocketAddr,
    own: &Credentials,
    behaviour: Behaviour,
    ready: std::sync::mpsc::SyncSender<()>,
    over: Arc<Notify>,
) -> Result<(usize, usize)> {
    let listener = TcpListener::bind(at).await?;
    ready.send(())?;
    let acceptor = TlsAcceptor::from(Arc::new(peer::server_config(own)?));
    let seen = Rc::new(Seen::default());
    let tasks = tokio::task::LocalSet::new();
    let accepting = tasks.run_until(async {
        loop {
            let (socket, _) = listener.accept().await?;
            let (acceptor, seen) = (acceptor.clone(), seen.clone());
            spawn_local(async move {
                if let Err(error) = tunnel(socket, acceptor, behaviour, &seen).await {
                    seen.errors.borrow_mut().push(format!("{error:#}"));
                }
            });
        }
    });
    tokio::select! {
        ended = accepting => return ended,
        () = over.notified() => {}
    }
    let errors = seen.errors.borrow();
    ensure!(errors.is_empty(), "the server met {errors:?}");
    Ok((seen.tunnels.get(), seen.streams.get()))
}

async fn tunnel(
    socket: TcpStream,
    acceptor: TlsAcceptor,
    behaviour: Behaviour,
    seen: &Rc<Seen>,
) -> Result<()> {
    socket.set_nodelay(true)?;
    let stream = acceptor.accept(socket).await?;
    seen.tunnels.set(seen.tunnels.get() + 1);
    let mut connection = server::Builder::new()
        .initial_window_size(behaviour.stream_window)
        .initial_connection_window_size(behaviour.connection_window)
        .max_frame_size(behaviour.frame)
        .max_concurrent_streams(behaviour.streams)
        .handshake::<_, Bytes>(stream)
        .await?;
    let mut count = 0;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        count += 1;
        seen.streams.set(seen.streams.get() + 1);
        let seen = seen.clone();
        spawn_local(async move {
            // What the peer or the application resets ends one stream; the records tell whether it should have.
            drop(stream_of(request, respond, behaviour.answer, &seen).await);
        });
        if behaviour.goaway_after == Some(count) {
            connection.graceful_shutdown();
        }
    }
    Ok(())
}

async fn stream_of(
    request: Request<RecvStream>,
    mut respond: server::SendResponse<Bytes>,
    answer: Answer,
    seen: &Seen,
) -> Result<()> {
    let mut response = Response::builder().status(StatusCode::OK);
    match answer {
        Answer::Serve | Answer::Cut => {}
        Answer::Refuse(status) => {
            let refusal = Response::builder().status(status).body(())?;
            respond.send_response(refusal, true)?;
            return Ok(());
        }
        Answer::LateUntil(requests) => {
            seen.waiting.set(seen.waiting.get() + 1);
            seen.arrived.notify_waiters();
            while seen.waiting.get() < requests {
                seen.arrived.notified().await;
            }
        }
        Answer::Talkative => {
            for status in [100, 103] {
                respond.send_informational(Response::builder().status(status).body(())?)?;
            }
            response = response
                .header(
                    "baggage",
                    &b"k8s.namespace.name=x,,=,k8s.pod.name==;%00,\xe9"[..],
                )
                .header("baggage", "")
                .header("traceparent", "ff-not-one")
                .header("server", "x".repeat(8 << 10))
                .header("x-forwarded-network", "")
                .header("set-cookie", "a=b");
        }
    }
    let mut send = respond.send_response(response.body(())?, false)?;
    let mut body = request.into_body();
    if let Answer::Cut = answer {
        let first = body.data().await.context("no data")??;
        send.send_data(first, false)?;
        send.send_reset(h2::Reason::INTERNAL_ERROR);
        return Ok(());
    }
    let application = TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, PORT)).await?;
    let (reader, writer) = application.into_split();
    tokio::try_join!(up(body, writer), down(reader, send)).map(drop)
}

/// END_STREAM becomes FIN.
async fn up(mut body: RecvStream, mut writer: OwnedWriteHalf) -> Result<()> {
    while let Some(data) = body.data().await {
        let data = data?;
        writer.write_all(&data).await?;
        body.flow_control().release_capacity(data.len())?;
    }
    Ok(writer.shutdown().await?)
}

/// FIN becomes END_STREAM.
async fn down(mut reader: OwnedReadHalf, mut send: SendStream<Bytes>) -> Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            return Ok(send.send_data(Bytes::new(), true)?);
        }
        peer::send_all(&mut send, Bytes::copy_from_slice(&buffer[..length])).await?;
    }
}
