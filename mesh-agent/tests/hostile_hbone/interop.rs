//! The agent as the client of a server of the test: what its request looks like on the wire.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use h2::{RecvStream, SendStream, server};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use mesh_tests::{
    conversation::{self, client},
    lab::PodSpec,
    process::Program,
    programs, wait,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use tokio_rustls::LazyConfigAcceptor;

use super::{CODECS, PORT, World, identity, within};
use crate::peer::{self, Credentials, LIMIT, TUNNEL_PORT};

/// What ztunnel announces (SETTINGS, windows), so that the agent meets a server of the field.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
const STREAMS: u32 = 200;
/// Records of the application.
const RECORDS: u64 = 100;

/// One request as it came.
struct Seen {
    peer: Vec<String>,
    server_name: Option<String>,
    protocols: Vec<Vec<u8>>,
    request: Request<()>,
    source: SocketAddr,
}

#[test]
fn a_server_of_the_field_understands_the_agent() -> Result<()> {
    for codec in CODECS {
        a_server_of_the_field_understands(codec).context(codec)?;
    }
    Ok(())
}

fn a_server_of_the_field_understands(codec: &str) -> Result<()> {
    let mut world = World::start(codec)?;
    // A pod that the mesh believes enrolled, without an agent: the test is its tunnel's end.
    world.lab.add_pod("n2", PodSpec::new("foreign"))?;
    let (foreign, web) = (world.lab.pod("foreign")?, world.lab.pod("web")?);
    world.mesh.write_pod(world.lab.node("n2")?, foreign, true)?;
    let application: SocketAddr = ([127, 0, 0, 1], PORT).into();
    let echo = Program::new(programs::own("seqecho")?).args([
        "server",
        "--listen",
        &application.to_string(),
    ]);
    let _echo = world
        .lab
        .serve(foreign, &echo, application, conversation::LIMIT)?;
    wait::until("the mesh to know the pod", conversation::LIMIT, || {
        let dump = world
            .mesh
            .weft(&world.lab, world.lab.node("n1")?, &["-o", "json", "dump"])?
            .ok()?;
        Ok(dump.contains(&identity("foreign")).then_some(()))
    })?;

    let own = world.certificate("foreign")?;
    let talk = client(foreign.at(PORT))?.args(["--records", &RECORDS.to_string()]);
    let to = SocketAddr::new(foreign.address(), TUNNEL_PORT);
    let (ready, listening) = std::sync::mpsc::sync_channel(1);
    let (seen, report) = std::thread::scope(|scope| {
        let server =
            scope.spawn(|| within(&foreign.netns, || serve_one(to, application, &own, ready)));
        // The server's own error says more than a closed channel.
        let report = listening.recv().context("no server").and_then(|()| {
            let running = world.lab.spawn(web, &talk)?;
            conversation::report(running)
        });
        (server.join(), report)
    });
    let seen = seen.map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let report = report?;
    ensure!(
        report.complete == 1 && report.records == RECORDS && report.lost() == 0,
        "{report:?}"
    );
    check_transport(&seen, web.address().to_string())?;
    check_request(
        &seen,
        &foreign.at(PORT).to_string(),
        &web.address().to_string(),
    )
}

fn check_transport(seen: &Seen, web: String) -> Result<()> {
    ensure!(
        seen.peer == [identity("web")],
        "the client is {:?}",
        seen.peer
    );
    ensure!(
        seen.server_name.is_none(),
        "SNI was sent: {:?}",
        seen.server_name
    );
    ensure!(
        seen.protocols == [b"h2"],
        "ALPN offers {:?}",
        seen.protocols
    );
    ensure!(
        seen.source.ip().to_string() == web,
        "dialled from {}",
        seen.source
    );
    Ok(())
}

fn check_request(seen: &Seen, authority: &str, web: &str) -> Result<()> {
    let request = &seen.request;
    ensure!(*request.method() == Method::CONNECT, "{request:?}");
    let uri = request.uri();
    ensure!(
        uri.authority()
            .is_some_and(|found| found.as_str() == authority)
            && uri.scheme().is_none()
            && uri.path_and_query().is_none(),
        "{uri:?}"
    );
    let headers = request.headers();
    let baggage = header(headers, "baggage")?;
    ensure!(
        baggage
            .starts_with("k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=web"),
        "baggage is {baggage:?}"
    );
    let forwarded = header(headers, "forwarded")?;
    let port = forwarded
        .strip_prefix(&format!("for=\"{web}:"))
        .and_then(|rest| rest.strip_suffix('"'));
    ensure!(
        port.is_some_and(|port| port.parse::<u16>().is_ok()),
        "forwarded is {forwarded:?}"
    );
    let trace = header(headers, "traceparent")?;
    let hex = |part: &str, length| {
        part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<&str> = trace.split('-').collect();
    ensure!(
        matches!(parts[..], ["00", id, parent, "00"] if hex(id, 32) && hex(parent, 16)),
        "traceparent is {trace:?}"
    );
    ensure!(
        headers.len() == 3,
        "more headers than the field has: {headers:?}"
    );
    Ok(())
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str> {
    Ok(headers
        .get(name)
        .with_context(|| format!("no {name}"))?
        .to_str()?)
}

/// Accepts one tunnel and carries its first stream to the application.
async fn serve_one(
    address: SocketAddr,
    application: SocketAddr,
    own: &Credentials,
    ready: std::sync::mpsc::SyncSender<()>,
) -> Result<Seen> {
    let listener = TcpListener::bind(address).await?;
    ready.send(())?;
    let (socket, source) = timeout(LIMIT, listener.accept()).await??;
    let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
    let client_hello = hello.client_hello();
    let server_name = client_hello.server_name().map(str::to_owned);
    let protocols = client_hello
        .alpn()
        .into_iter()
        .flatten()
        .map(<[u8]>::to_vec)
        .collect();
    let stream = hello
        .into_stream(Arc::new(peer::server_config(own)?))
        .await?;
    let certificates = stream
        .get_ref()
        .1
        .peer_certificates()
        .context("no client certificate")?;
    let peer = peer::uris(certificates.first().context("an empty chain")?)?;
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(STREAMS)
        .handshake::<_, Bytes>(stream)
        .await?;
    let (request, mut respond) = timeout(LIMIT, connection.accept())
        .await?
        .context("no request")??;
    let (head, body) = request.into_parts();
    let (reader, writer) = TcpStream::connect(application).await?.into_split();
    let response = Response::builder().status(StatusCode::OK).body(())?;
    let answer = respond.send_response(response, false)?;
    let pumps = async {
        tokio::try_join!(
            to_application(body, writer),
            from_application(reader, answer)
        )
    };
    let mut pumps = std::pin::pin!(pumps);
    // The connection itself has to be driven for its streams to move.
    loop {
        tokio::select! {
            done = &mut pumps => {
                done?;
                break;
            }
            next = connection.accept() => ensure!(next.is_none(), "a second request"),
        }
    }
    connection.graceful_shutdown();
    while let Some(extra) = timeout(LIMIT, connection.accept()).await? {
        extra?;
    }
    Ok(Seen {
        peer,
        server_name,
        protocols,
        request: Request::from_parts(head, ()),
        source,
    })
}

/// END_STREAM becomes FIN.
async fn to_application(mut body: RecvStream, mut writer: OwnedWriteHalf) -> Result<()> {
    while let Some(data) = body.data().await {
        let data = data?;
        writer.write_all(&data).await?;
        body.flow_control().release_capacity(data.len())?;
    }
    writer.shutdown().await?;
    Ok(())
}

/// FIN becomes END_STREAM. What the application sends here is far below the window.
async fn from_application(mut reader: OwnedReadHalf, mut answer: SendStream<Bytes>) -> Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let length = reader.read(&mut buffer).await?;
        let data = Bytes::copy_from_slice(&buffer[..length]);
        answer.send_data(data, length == 0)?;
        if length == 0 {
            return Ok(());
        }
    }
}
