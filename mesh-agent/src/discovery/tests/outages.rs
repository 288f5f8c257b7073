//! A control plane that hangs, and one that resends what is refused: in memory and in paused time, which passes only
//! while every task waits for nothing but time.

use std::time::Duration;

use mesh_api::proto::discovery::{DeltaDiscoveryRequest, Resource};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use super::client::{Agent, Lab, PIPE_BYTES, Pipes, Session, workload};
use crate::discovery::{
    DiscoveryConfig, Phase,
    backoff::BACKOFF_MAX,
    client::{
        CONNECT_TIMEOUT, FIRST_RESPONSE_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
        STREAM_OPEN_TIMEOUT,
    },
    subscription::Kind,
};

/// How much a promised time may be exceeded by, for what is not waiting.
const SLACK: Duration = Duration::from_secs(1);
/// Longer than any wait of a client that would repeat itself.
const QUIET: Duration = Duration::from_secs(60);

/// The text of the agent's first failure, and when it came.
async fn failure(mut agent: Agent) -> (String, Duration) {
    let begun = Instant::now();
    let status = agent.until(|status| status.last_error.is_some()).await;
    let took = begun.elapsed();
    agent.stop().await;
    (status.last_error.unwrap_or_default(), took)
}

/// An agent that dials a real address.
fn dialling(lab: &Lab, address: String) -> Agent {
    Lab::agent_with(DiscoveryConfig {
        address,
        ..lab.config()
    })
}

#[tokio::test(start_paused = true)]
async fn a_syn_without_an_answer_is_given_up_in_time() {
    let lab = Lab::new().await;
    let socket = TcpSocket::new_v4().expect("a socket");
    let any = "127.0.0.1:0".parse().expect("an address");
    socket.bind(any).expect("a port");
    let listener = socket.listen(1).expect("listens");
    let address = listener.local_addr().expect("bound");
    // Nobody accepts: once the queue is full the kernel drops every further SYN.
    let mut queued = Vec::new();
    while let Ok(connected) = timeout(SLACK, TcpStream::connect(address)).await {
        queued.push(connected.expect("connects"));
    }
    let (error, took) = failure(dialling(&lab, address.to_string())).await;
    assert!(error.contains("in time"), "{error}");
    assert!(took <= CONNECT_TIMEOUT + SLACK, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_accepted_and_never_answered_is_given_up_in_time() {
    let lab = Lab::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let (error, took) = failure(dialling(&lab, address)).await;
    assert!(error.contains("in time"), "{error}");
    assert!(took <= CONNECT_TIMEOUT + SLACK, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_not_accepted_is_given_up_in_time() {
    let (lab, pipes) = Lab::in_memory();
    let relay = Relay::start(pipes);
    // TLS passes, then nothing comes back: the client hears neither settings nor headers.
    relay.freeze_after.send_replace(Some(1));
    let (error, took) = failure(lab.agent_through(&relay.pipes)).await;
    assert!(
        error.contains("did not accept the stream in time"),
        "{error}"
    );
    assert!(
        took <= CONNECT_TIMEOUT + STREAM_OPEN_TIMEOUT + SLACK,
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_answers_pings_and_nothing_else_is_given_up_in_time() {
    let (mut lab, pipes) = Lab::in_memory();
    let begun = Instant::now();
    let mut agent = lab.agent_through(&pipes);
    let mut session = lab.session().await;
    session.request().await;
    session.request().await;
    let status = agent.until(|status| status.last_error.is_some()).await;
    assert_eq!(
        status.last_error.as_deref(),
        Some("the control plane did not answer the first request in time")
    );
    assert!(begun.elapsed() <= FIRST_RESPONSE_TIMEOUT + SLACK);
    drop(session);
    let mut session = lab.session().await;
    welcome(&mut session).await;
    agent.until(|status| status.phase == Phase::Connected).await;
    tokio::time::sleep(2 * FIRST_RESPONSE_TIMEOUT).await;
    assert_eq!(agent.status.borrow().streams, 2, "silence later is normal");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_vanishes_is_noticed_and_found_again() {
    let (mut lab, pipes) = Lab::in_memory();
    let relay = Relay::start(pipes);
    let mut agent = lab.agent_through(&relay.pipes);
    let mut session = lab.session().await;
    welcome(&mut session).await;
    agent.until(|status| status.phase == Phase::Connected).await;

    let vanished = Instant::now();
    relay.freeze_after.send_replace(Some(0));
    let status = agent.until(|status| status.phase == Phase::Snapshot).await;
    let noticed = vanished.elapsed();
    assert!(
        noticed <= KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT + SLACK,
        "{noticed:?}"
    );
    assert!(status.ready && agent.knows("10.0.0.1"), "it serves on");

    // Long enough for the waits to have grown to their cap.
    tokio::time::sleep(10 * BACKOFF_MAX).await;
    let back = Instant::now();
    relay.freeze_after.send_replace(None);
    let mut session = lab.session().await;
    welcome(&mut session).await;
    agent.until(|status| status.phase == Phase::Connected).await;
    assert!(
        back.elapsed() <= BACKOFF_MAX + SLACK,
        "{:?}",
        back.elapsed()
    );
    agent.stop().await;
}

/// Takes the first requests and answers them.
async fn welcome(session: &mut Session) {
    session.request().await;
    session.request().await;
    session
        .send(Kind::Address, vec![workload("a", "10.0.0.1")])
        .await;
    session.send(Kind::Authorization, vec![]).await;
}

/// Between agent and control plane; it can stop passing on what the control plane says, without closing anything.
struct Relay {
    pipes: Pipes,
    /// After so many pieces of a connection nothing more comes back.
    freeze_after: watch::Sender<Option<usize>>,
}

impl Relay {
    /// Passes on to `far`.
    fn start(far: Pipes) -> Self {
        let (pipes, mut incoming) = mpsc::channel(16);
        let freeze_after = watch::Sender::new(None);
        let frozen = freeze_after.clone();
        tokio::spawn(async move {
            while let Some(near) = incoming.recv().await {
                let (own, other) = duplex(PIPE_BYTES);
                far.0.send(other).await.expect("the server runs");
                let (near, own) = (split(near), split(own));
                tokio::spawn(pass(near.0, own.1, watch::channel(None).1));
                tokio::spawn(pass(own.0, near.1, frozen.subscribe()));
            }
        });
        let pipes = Pipes(pipes);
        Self {
            pipes,
            freeze_after,
        }
    }
}

async fn pass(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    mut freeze_after: watch::Receiver<Option<usize>>,
) {
    let mut buffer = vec![0; PIPE_BYTES];
    for piece in 0_usize.. {
        let length = from.read(&mut buffer).await.unwrap_or(0);
        // Without a sender the last value counts for ever.
        let flows = |after: &Option<usize>| after.is_none_or(|after| piece < after);
        let _ = freeze_after.wait_for(flows).await;
        if length == 0 || to.write_all(&buffer[..length]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// A thousand workloads, every hundredth of them malformed.
fn thousand(malformed: impl Fn(Resource) -> Resource) -> Vec<Resource> {
    let one = |i: usize| {
        let good = workload(
            &format!("p{i}"),
            &format!("10.0.{}.{}", i / 250, i % 250 + 1),
        );
        if i.is_multiple_of(100) {
            malformed(good)
        } else {
            good
        }
    };
    (0..1_000).map(one).collect()
}

fn broken(mut resource: Resource, version: &str) -> Resource {
    version.clone_into(&mut resource.version);
    if let Some(body) = &mut resource.resource {
        body.value = format!("noise {version}").into_bytes();
    }
    resource
}

/// The next request, if one comes within [`QUIET`].
async fn unasked(session: &mut Session) -> Option<DeltaDiscoveryRequest> {
    timeout(QUIET, session.request()).await.ok()
}

#[tokio::test(start_paused = true)]
async fn ten_malformed_resources_of_a_thousand_cost_one_nack_per_version_and_no_storm() {
    let (mut lab, pipes) = Lab::in_memory();
    let mut agent = lab.agent_through(&pipes);
    let mut session = lab.session().await;
    session.request().await;
    session.request().await;
    session.send(Kind::Authorization, vec![]).await;
    for (version, nacks) in [("1", 1), ("2", 2)] {
        let reply = session
            .send(Kind::Address, thousand(|good| broken(good, version)))
            .await;
        let reason = reply
            .error_detail
            .expect("a new version is refused")
            .message;
        assert_eq!(reason.split("; ").count(), 10, "{reason}");
        let status = agent.until(|status| status.nacks == nacks).await;
        assert_eq!((status.counts.workloads, status.refused), (990, 10));
        // A control plane that sends the same again is acknowledged, so that it has no reason to go on.
        for _ in 0..3 {
            let resent = thousand(|good| broken(good, version));
            let resent = resent.into_iter().step_by(100).collect();
            let reply = session.send(Kind::Address, resent).await;
            assert_eq!(reply.error_detail, None);
        }
        assert_eq!(unasked(&mut session).await, None, "nobody speaks unasked");
        assert_eq!(agent.status.borrow().nacks, nacks);
    }
    let fixed = session.send(Kind::Address, thousand(|good| good)).await;
    assert_eq!(fixed.error_detail, None);
    let status = agent.until(|status| status.refused == 0).await;
    assert_eq!((status.counts.workloads, status.nacks), (1_000, 2));
    assert!(agent.knows("10.0.3.151"), "a mended one is in force");
    agent.stop().await;
}
