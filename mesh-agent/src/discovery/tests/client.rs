//! The thin part: a real TLS stream to a scripted control plane on loopback.

use std::{
    future::{Ready, ready},
    io,
    path::PathBuf,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _};
use http::Uri;
use hyper_util::rt::TokioIo;

use mesh_api::proto::{
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
    workload as wire,
};
use prost::Message as _;
use prost_types::Any;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, duplex},
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming,
    codegen::Service,
    transport::{Identity as TlsIdentity, Server, ServerTlsConfig, server::Connected},
};

use super::*;
use crate::discovery::{
    DiscoveryClient, DiscoveryConfig, DiscoveryError, DiscoveryStatus, Mesh, Phase, SnapshotState,
    subscription::Kind,
};

/// One stream that an agent opened, from the server's side.
pub(super) struct Session {
    pub(super) authorization: String,
    pub(super) requests: Streaming<DeltaDiscoveryRequest>,
    pub(super) responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Session {
    pub(super) async fn request(&mut self) -> DeltaDiscoveryRequest {
        self.requests
            .message()
            .await
            .expect("no error")
            .expect("a request")
    }

    pub(super) async fn send(
        &mut self,
        kind: Kind,
        resources: Vec<Resource>,
    ) -> DeltaDiscoveryRequest {
        let type_url = kind.type_url().to_owned();
        let response = DeltaDiscoveryResponse {
            type_url,
            resources,
            nonce: "n".to_owned(),
            ..Default::default()
        };
        self.responses
            .send(Ok(response))
            .await
            .expect("the agent listens");
        self.request().await
    }
}

struct Scripted(mpsc::Sender<Session>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Scripted {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let header = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        let authorization = header.unwrap_or_default().to_owned();
        let (responses, stream) = mpsc::channel(4);
        let session = Session {
            authorization,
            requests: request.into_inner(),
            responses,
        };
        self.0
            .send(session)
            .await
            .map_err(|_| Status::unavailable("test over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Connections in memory: each call makes one, and hands its far end over.
#[derive(Debug, Clone)]
pub(in crate::discovery) struct Pipes(pub(super) mpsc::Sender<DuplexStream>);

/// Bytes on their way.
pub(super) const PIPE_BYTES: usize = 64 * 1024;

impl Service<Uri> for Pipes {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (near, far) = duplex(PIPE_BYTES);
        let handed = self.0.try_send(far);
        ready(
            handed
                .map(|()| TokioIo::new(near))
                .map_err(io::Error::other),
        )
    }
}

pub(super) struct Lab {
    pub(super) directory: tempfile::TempDir,
    pub(super) address: String,
    pub(super) sessions: mpsc::Receiver<Session>,
    pub(super) server: JoinHandle<()>,
}

impl Lab {
    pub(super) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        Self::serving(TcpListenerStream::new(listener), address)
    }

    /// A control plane that serves what the pipes bring: nothing but tasks of this runtime is waited for, so that time
    /// may be paused.
    pub(super) fn in_memory() -> (Self, Pipes) {
        let (pipes, incoming) = mpsc::channel(16);
        let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
        let lab = Self::serving(incoming, "127.0.0.1:1".to_owned());
        (lab, Pipes(pipes))
    }

    fn serving<T>(
        incoming: impl Stream<Item = io::Result<T>> + Send + 'static,
        address: String,
    ) -> Self
    where
        T: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let directory = tempfile::tempdir().expect("a directory");
        let certified = rcgen::generate_simple_self_signed(vec!["control.test".to_owned()])
            .expect("a certificate");
        let (certificate, key) = (certified.cert.pem(), certified.signing_key.serialize_pem());
        std::fs::write(directory.path().join("roots.pem"), &certificate).expect("writable");
        std::fs::write(directory.path().join("token"), "first\n").expect("writable");
        let (sender, sessions) = mpsc::channel(4);
        let tls = ServerTlsConfig::new().identity(TlsIdentity::from_pem(certificate, key));
        let server = Server::builder()
            .tls_config(tls)
            .expect("good TLS settings")
            .add_service(AggregatedDiscoveryServiceServer::new(Scripted(sender)))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(async move { server.await.expect("served") });
        Self {
            directory,
            address,
            sessions,
            server,
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn config(&self) -> DiscoveryConfig {
        DiscoveryConfig {
            address: self.address.clone(),
            roots_file: self.path("roots.pem"),
            server_name: Some("control.test".to_owned()),
            token_file: Some(self.path("token")),
            node: "n1".to_owned(),
            cluster: "c1".to_owned(),
            network: String::new(),
            snapshot_file: Some(self.path("snapshot")),
            writes_snapshot: Arc::new(true.into()),
        }
    }

    /// Starts an agent, or the successor of one.
    pub(super) fn agent(&self) -> Agent {
        Self::agent_with(self.config())
    }

    pub(super) fn agent_with(config: DiscoveryConfig) -> Agent {
        Self::agent_of(config, |client| client)
    }

    /// An agent that connects through these pipes.
    pub(super) fn agent_through(&self, pipes: &Pipes) -> Agent {
        Self::agent_of(self.config(), |client| client.through(pipes.clone()))
    }

    fn agent_of(
        config: DiscoveryConfig,
        change: impl FnOnce(DiscoveryClient) -> DiscoveryClient,
    ) -> Agent {
        let (writer, mesh) = Mesh::channel("");
        let (client, status) =
            DiscoveryClient::new(config, writer, 1).expect("a good configuration");
        let client = change(client);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(client.run(shutdown.clone()));
        Agent {
            mesh,
            status,
            shutdown,
            task,
        }
    }

    pub(super) async fn session(&mut self) -> Session {
        self.sessions.recv().await.expect("the agent connects")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub(super) struct Agent {
    pub(super) mesh: Mesh,
    pub(super) status: tokio::sync::watch::Receiver<DiscoveryStatus>,
    pub(super) shutdown: CancellationToken,
    pub(super) task: JoinHandle<()>,
}

impl Agent {
    pub(super) async fn until(
        &mut self,
        what: impl Fn(&DiscoveryStatus) -> bool,
    ) -> DiscoveryStatus {
        self.status
            .wait_for(|status| what(status))
            .await
            .expect("the agent runs")
            .clone()
    }

    pub(super) fn knows(&self, address: &str) -> bool {
        self.mesh
            .read()
            .workload_by_address(address.parse().expect("an address"))
            .is_some()
    }

    pub(super) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("no panic");
    }
}

pub(super) fn workload(name: &str, address: &str) -> Resource {
    let pod = pod(name, address);
    let uid = pod.uid.clone();
    let value = wire::Address {
        r#type: Some(wire::address::Type::Workload(pod)),
    }
    .encode_to_vec();
    Resource {
        name: uid,
        version: "1".to_owned(),
        resource: Some(Any {
            type_url: String::new(),
            value,
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn an_agent_becomes_ready_survives_the_stream_and_restarts_from_its_snapshot() {
    let mut lab = Lab::new().await;
    let mut agent = lab.agent();
    assert_eq!(
        agent.until(|_| true).await,
        DiscoveryStatus::default(),
        "nothing is known at first"
    );

    let mut session = lab.session().await;
    assert_eq!(session.authorization, "Bearer first");
    let first = session.request().await;
    let node = first.node.expect("the node introduces itself");
    assert!(node.id.starts_with("ztunnel~") && node.id.contains("n1") && node.cluster == "c1");
    session.request().await;
    let mut bad = workload("bad", "10.0.0.2");
    bad.version = "2".to_owned();
    bad.name = "c1//Pod/shop/other".to_owned();
    let nack = session
        .send(Kind::Address, vec![workload("a", "10.0.0.1"), bad])
        .await;
    assert!(nack.error_detail.is_some());
    assert!(agent.knows("10.0.0.1") && !agent.knows("10.0.0.2"));
    assert!(
        !agent.until(|status| status.nacks == 1).await.ready,
        "policies are still unknown"
    );
    assert!(
        session
            .send(Kind::Authorization, vec![])
            .await
            .error_detail
            .is_none()
    );
    let status = agent.until(|status| status.ready).await;
    assert_eq!(
        (status.phase, status.counts.workloads, status.refused),
        (Phase::Connected, 1, 1)
    );

    std::fs::write(lab.path("token"), "second").expect("writable");
    drop(session);
    let mut session = lab.session().await;
    assert_eq!(
        session.authorization, "Bearer second",
        "the token is read again"
    );
    assert_eq!(
        session.request().await.initial_resource_versions["c1//Pod/shop/a"],
        "1"
    );
    let status = agent.until(|status| status.phase == Phase::Snapshot).await;
    assert!(
        status.ready && status.last_error.is_some() && agent.knows("10.0.0.1"),
        "it serves what it knew"
    );
    agent.stop().await;
    lab.server.abort();

    let mut restarted = lab.agent();
    let status = restarted.until(|status| status.ready).await;
    assert_eq!(
        (status.phase, status.counts.workloads),
        (Phase::Snapshot, 1)
    );
    assert!(restarted.knows("10.0.0.1"));
    restarted.stop().await;
}

/// The wait before the next attempt is reset by a time of service, not by a time of hanging.
#[tokio::test]
async fn a_stream_counts_as_served_from_its_first_response_on() {
    let mut lab = Lab::new().await;
    let (writer, _mesh) = Mesh::channel("");
    let (mut client, _status) =
        DiscoveryClient::new(lab.config(), writer, 1).expect("a good configuration");
    for answers in [false, true] {
        let mut answered = None;
        let served = async {
            let mut session = lab.session().await;
            session.request().await;
            session.request().await;
            if answers {
                session.send(Kind::Address, vec![]).await;
            }
        };
        let (ended, ()) = tokio::join!(client.stream(&mut answered), served);
        assert!(ended.is_err());
        assert_eq!(answered.is_some(), answers);
    }
}

#[tokio::test]
async fn what_the_snapshot_is_said_to_hold_survives_a_killed_agent() {
    let mut lab = Lab::new().await;
    let mut agent = lab.agent();
    assert_eq!(
        agent.until(|_| true).await.snapshot(),
        SnapshotState::Missing
    );
    let mut session = lab.session().await;
    session.request().await;
    session.request().await;
    session
        .send(Kind::Address, vec![workload("a", "10.0.0.1")])
        .await;
    session.send(Kind::Authorization, vec![]).await;
    agent
        .until(|status| status.snapshot() == SnapshotState::Current)
        .await;
    let second = session
        .send(Kind::Address, vec![workload("b", "10.0.0.2")])
        .await;
    assert!(second.error_detail.is_none());
    agent
        .until(|status| status.responses == 3 && status.snapshot() == SnapshotState::Current)
        .await;
    agent.task.abort();
    lab.server.abort();

    let mut restarted = lab.agent();
    let status = restarted.until(|status| status.ready).await;
    assert_eq!(
        (status.phase, status.snapshot()),
        (Phase::Snapshot, SnapshotState::Current)
    );
    assert!(restarted.knows("10.0.0.1") && restarted.knows("10.0.0.2"));
    restarted.stop().await;
}

#[tokio::test]
async fn an_untrusted_control_plane_is_not_believed() {
    let mut lab = Lab::new().await;
    let foreign =
        rcgen::generate_simple_self_signed(vec!["control.test".to_owned()]).expect("a certificate");
    std::fs::write(lab.path("roots.pem"), foreign.cert.pem()).expect("writable");
    let mut agent = lab.agent();
    let status = agent.until(|status| status.last_error.is_some()).await;
    let error = status.last_error.unwrap_or_default();
    assert!(
        error.starts_with("cannot connect to the control plane: ") && error.contains("certificate"),
        "{error}"
    );
    assert!(!status.ready && lab.sessions.try_recv().is_err());
    agent.stop().await;
}

#[tokio::test]
async fn missing_files_are_named_and_a_broken_snapshot_is_ignored() {
    let lab = Lab::new().await;
    std::fs::write(lab.path("snapshot"), "noise").expect("writable");
    std::fs::remove_file(lab.path("token")).expect("there");
    let mut agent = lab.agent();
    let status = agent.until(|status| status.last_error.is_some()).await;
    let error = status.last_error.unwrap_or_default();
    assert!(error.starts_with("cannot read the token "), "{error}");
    assert_eq!((status.phase, status.ready), (Phase::Waiting, false));
    agent.stop().await;
}

#[tokio::test]
async fn plain_http_and_unusable_addresses_are_refused_at_once() {
    let lab = Lab::new().await;
    for address in ["http://127.0.0.1:1", "unix:///x", "", "https://", "a b"] {
        let config = DiscoveryConfig {
            address: address.to_owned(),
            ..lab.config()
        };
        let (writer, _mesh) = Mesh::channel("");
        let refused = DiscoveryClient::new(config, writer, 1);
        assert!(
            matches!(refused, Err(DiscoveryError::Address { .. })),
            "{address:?}"
        );
    }
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_written_is_counted_and_nothing_else_suffers() {
    let mut lab = Lab::new().await;
    let nowhere = Some(lab.path("missing/snapshot"));
    let mut agent = Lab::agent_with(DiscoveryConfig {
        snapshot_file: nowhere,
        ..lab.config()
    });
    let mut session = lab.session().await;
    session.request().await;
    session.request().await;
    session
        .send(Kind::Address, vec![workload("a", "10.0.0.1")])
        .await;
    session.send(Kind::Authorization, vec![]).await;
    agent.until(|status| status.phase == Phase::Connected).await;
    assert!(agent.knows("10.0.0.1"));
    let status = agent.status.clone();
    agent.stop().await;
    // Once before the end; on a slow machine also when it was due.
    let failures = status.borrow().snapshot_failures;
    assert!((1..=2).contains(&failures), "{failures} failures");
}
