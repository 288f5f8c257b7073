//! The discovery client: one delta-ADS stream over TLS, reconnected for ever. The bookkeeping is in
//! [`subscription`](super::subscription); here are the socket, the clock and the disk.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_api::proto::discovery::{
    DeltaDiscoveryResponse, Node,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use prost_types::{Struct, Value, value};
use rand::{SeedableRng, rngs::StdRng};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    metadata::AsciiMetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use super::{
    Counts, MeshWriter,
    backoff::Backoff,
    snapshot::{self, SNAPSHOT_DEBOUNCE, SNAPSHOT_PAUSE_FACTOR, SNAPSHOT_RETRY},
    subscription::{Record, Subscription},
};

/// Longest time to reach the control plane, TLS included: room for two lost SYNs (sent again after 1 s and 3 s).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest time until the control plane accepts the stream. It answers at once unless it is stuck.
pub const STREAM_OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time from there to its first response, which may hold the whole mesh: 40 MiB at 6 Mbit/s. A control plane
/// that is stuck may still answer pings.
pub const FIRST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// A ping on the idle connection, so that a control plane that vanished is noticed within
/// `KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT`.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the answer to a ping may take.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest response. The first one may hold the whole mesh: 100,000 workloads take some 40 MiB.
pub const RESPONSE_MAX_BYTES: usize = 200 * 1024 * 1024;
/// Receive window of the stream: large enough that the first response is not paced by round trips.
const WINDOW_BYTES: u32 = 1024 * 1024;
/// Most requests on their way. Each answers one response, so a queue of this length means that the control plane has
/// stopped reading; the stream is given up.
pub const REQUESTS_MAX: usize = 64;
/// Largest token file. Kubernetes' tokens have one to two KiB.
pub const TOKEN_MAX_BYTES: usize = 64 * 1024;
/// Longest text of an error kept in the status, in characters.
const ERROR_TEXT_MAX: usize = 1_024;

/// Where the control plane is, and as whom to ask.
#[derive(Debug, Clone)]
pub struct DiscoveryConfig {
    /// `https://host:port`; without a scheme, `https` is meant. Plain `http` is refused.
    pub address: String,
    /// PEM file of the roots that the server's certificate has to chain to; read on every connect.
    pub roots_file: PathBuf,
    /// Name that the server's certificate has to carry, if it is not the host of `address`.
    pub server_name: Option<String>,
    /// File of the bearer token; read on every connect.
    pub token_file: Option<PathBuf>,
    /// Name of this node.
    pub node: String,
    /// Name of this cluster.
    pub cluster: String,
    /// Network of this node; empty is the default one.
    pub network: String,
    /// File of the last good state; none is kept without it.
    pub snapshot_file: Option<PathBuf>,
    /// Whether this process is the one that writes it: two may run while one takes over from the other.
    pub writes_snapshot: Arc<AtomicBool>,
}

/// Why there is no stream. All but [`DiscoveryError::Address`] are retried.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// Ours: the configured address cannot be used.
    #[error("control plane address {address:?}: {reason}")]
    Address {
        /// As configured.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// Ours: a file that has to be sent or trusted cannot be read.
    #[error("cannot read the {what} {path}: {source}")]
    File {
        /// `roots` or `token`.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Ours: the token cannot be sent.
    #[error("the token in {0} is empty, too long, or not printable ASCII")]
    Token(PathBuf),
    /// The control plane cannot be reached, or its certificate is not trusted: look at its address, the network and
    /// the roots.
    #[error("cannot connect to the control plane: {0}")]
    Connect(String),
    /// Nothing came back in time.
    #[error("the control plane did not {0} in time")]
    Timeout(&'static str),
    /// The control plane ended the stream with an error; `Unauthenticated` and `PermissionDenied` mean the token.
    #[error("the control plane ended the stream: {0}")]
    Stream(String),
    /// The control plane ended the stream in order, as it does when it stops.
    #[error("the control plane closed the stream")]
    Closed,
    /// The control plane sends but does not read.
    #[error("the control plane left {REQUESTS_MAX} requests unread")]
    Stalled,
}

/// From where the present state comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Nothing is known yet.
    #[default]
    Waiting,
    /// The last good state, from disk or from an earlier stream; the control plane has not confirmed it.
    Snapshot,
    /// The control plane has told everything on the present stream.
    Connected,
}

impl Phase {
    /// The word for it in `weft status`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Snapshot => "snapshot",
            Self::Connected => "connected",
        }
    }
}

/// State of discovery, for readiness, status and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiscoveryStatus {
    /// From where the present state comes.
    pub phase: Phase,
    /// There is a state to serve from: a snapshot was loaded, or both types were answered once.
    pub ready: bool,
    /// Why the last stream ended or could not be opened; cleared once connected.
    pub last_error: Option<String>,
    /// What is held.
    pub counts: Counts,
    /// Resources refused at present.
    pub refused: usize,
    /// Reason of the last refusal.
    pub last_refusal: Option<String>,
    /// Streams opened since start.
    pub streams: u64,
    /// Responses taken since start.
    pub responses: u64,
    /// NACKs sent since start.
    pub nacks: u64,
    /// Snapshots that could not be written since start.
    pub snapshot_failures: u64,
    /// The responses that the snapshot on disk contains; `None` while there is no usable one.
    pub snapshot_responses: Option<u64>,
}

impl DiscoveryStatus {
    /// Whether an agent that restarted now, without the control plane, would know all that this one knows.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotState {
        match self.snapshot_responses {
            None => SnapshotState::Missing,
            Some(contained) if contained >= self.responses => SnapshotState::Current,
            Some(_) => SnapshotState::Behind,
        }
    }
}

/// How the snapshot on disk compares with what the agent knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// It holds everything.
    Current,
    /// Newer responses wait for the next write.
    Behind,
    /// There is none, or none that can be used.
    Missing,
}

impl SnapshotState {
    /// The word for it in `weft status`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Behind => "behind",
            Self::Missing => "missing",
        }
    }
}

/// The client. It owns the writer: nobody else changes the mesh.
#[derive(Debug)]
pub struct DiscoveryClient {
    config: DiscoveryConfig,
    writer: MeshWriter,
    subscription: Arc<Mutex<Subscription>>,
    /// Bumped by every response, for the snapshot.
    changes: watch::Sender<u64>,
    status: watch::Sender<DiscoveryStatus>,
    backoff: Backoff<StdRng>,
    #[cfg(test)]
    pipes: Option<super::tests::Pipes>,
}

impl DiscoveryClient {
    /// Checks the configuration and loads the snapshot, so that the mesh is filled before the control plane answers.
    /// An unusable snapshot is reported in the log and ignored. `seed` feeds the jitter of reconnecting and must differ
    /// between agents.
    ///
    /// # Errors
    /// [`DiscoveryError::Address`] when the address cannot be used.
    pub fn new(
        config: DiscoveryConfig,
        writer: MeshWriter,
        seed: u64,
    ) -> Result<(Self, watch::Receiver<DiscoveryStatus>), DiscoveryError> {
        endpoint(&config)?;
        let (status, receiver) = watch::channel(DiscoveryStatus::default());
        let subscription = Subscription::new(node(&config), config.snapshot_file.is_some());
        let mut client = Self {
            config,
            writer,
            subscription: Arc::new(Mutex::new(subscription)),
            changes: watch::Sender::new(0),
            status,
            backoff: Backoff::new(StdRng::seed_from_u64(seed)),
            #[cfg(test)]
            pipes: None,
        };
        client.load_snapshot();
        Ok((client, receiver))
    }

    /// Connects in memory, for tests in paused time.
    #[cfg(test)]
    pub(super) fn through(mut self, pipes: super::tests::Pipes) -> Self {
        self.pipes = Some(pipes);
        self
    }

    fn load_snapshot(&mut self) {
        let Some(path) = self.config.snapshot_file.clone() else {
            return;
        };
        let (updates, rejected) = {
            let mut subscription = lock(&self.subscription);
            match snapshot::load(&path, subscription.node()) {
                Ok(Some(records)) => subscription.restore(records),
                Ok(None) => {
                    return info!(path = %path.display(), "no snapshot yet, waiting for the control plane");
                }
                Err(error) => {
                    return warn!(%error, "snapshot ignored, waiting for the control plane");
                }
            }
        };
        for refusal in &rejected {
            warn!(%refusal, "resource of the snapshot refused");
        }
        let counts = self.writer.apply(updates);
        info!(
            ?counts,
            "serving from the snapshot until the control plane answers"
        );
        self.status.send_modify(|status| {
            status.phase = Phase::Snapshot;
            status.ready = true;
            status.counts = counts;
            status.snapshot_responses = Some(status.responses);
        });
    }

    /// Keeps the mesh up to date until `shutdown`; then writes a last snapshot if anything changed.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let keeper = self.config.snapshot_file.clone().map(|path| {
            let keeper = SnapshotKeeper {
                path,
                subscription: Arc::clone(&self.subscription),
                changes: self.changes.subscribe(),
                status: self.status.clone(),
                may_write: self.config.writes_snapshot.clone(),
                failing: false,
            };
            tokio::spawn(keeper.run(shutdown.clone()))
        });
        let _ = shutdown
            .run_until_cancelled(self.reconnect_for_ever())
            .await;
        if let Some(keeper) = keeper
            && let Err(error) = keeper.await
        {
            warn!(%error, "the snapshot task failed");
        }
    }

    async fn reconnect_for_ever(&mut self) {
        loop {
            let (begun, mut answered) = (Instant::now(), None);
            let Err(error) = self.stream(&mut answered).await;
            // A control plane that accepts and then hangs never lived, however long that took.
            let (lived, spent) = match answered {
                Some(since) => (Instant::elapsed(&since), Duration::ZERO),
                None => (Duration::ZERO, begun.elapsed()),
            };
            let wait = self.backoff.after(lived, spent);
            warn!(%error, wait_ms = wait.as_millis(), "no discovery stream");
            self.status.send_modify(|status| {
                status.phase = if status.ready {
                    Phase::Snapshot
                } else {
                    Phase::Waiting
                };
                status.last_error = Some(error.to_string().chars().take(ERROR_TEXT_MAX).collect());
            });
            sleep(wait).await;
        }
    }

    /// One stream, from connecting to its end; `answered` is when its first response came.
    pub(super) async fn stream(
        &mut self,
        answered: &mut Option<Instant>,
    ) -> Result<std::convert::Infallible, DiscoveryError> {
        let channel = self.connect().await?;
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(RESPONSE_MAX_BYTES);
        let (requests, queue) = mpsc::channel(REQUESTS_MAX);
        for request in lock(&self.subscription).connect() {
            requests
                .try_send(request)
                .map_err(|_| DiscoveryError::Stalled)?;
        }
        let mut call = Request::new(ReceiverStream::new(queue));
        if let Some(value) = self.bearer_token().await? {
            call.metadata_mut().insert("authorization", value);
        }
        if let Ok(cluster) = self.config.cluster.parse() {
            call.metadata_mut().insert("clusterid", cluster);
        }
        let opened = timeout(STREAM_OPEN_TIMEOUT, client.delta_aggregated_resources(call)).await;
        let opened = opened.map_err(|_| DiscoveryError::Timeout("accept the stream"))?;
        let mut responses = opened
            .map_err(|status| DiscoveryError::Stream(status.to_string()))?
            .into_inner();
        info!(address = %self.config.address, "discovery stream open");
        self.status.send_modify(|status| status.streams += 1);
        let first = Instant::now() + FIRST_RESPONSE_TIMEOUT;
        loop {
            let response = match *answered {
                Some(_) => responses.message().await,
                None => timeout_at(first, responses.message())
                    .await
                    .map_err(|_| DiscoveryError::Timeout("answer the first request"))?,
            };
            let response = response.map_err(|status| DiscoveryError::Stream(status.to_string()))?;
            let response = response.ok_or(DiscoveryError::Closed)?;
            answered.get_or_insert_with(Instant::now);
            let reply = self.react(response);
            requests
                .try_send(reply)
                .map_err(|_| DiscoveryError::Stalled)?;
        }
    }

    async fn connect(&self) -> Result<Channel, DiscoveryError> {
        let endpoint = endpoint(&self.config)?;
        let roots = read_file("roots", &self.config.roots_file).await?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        if let Some(name) = &self.config.server_name {
            tls = tls.domain_name(name);
        }
        let endpoint = endpoint
            .tls_config(tls)
            .map_err(|e| DiscoveryError::Connect(chain(&e)))?;
        match timeout(CONNECT_TIMEOUT, self.dial(&endpoint)).await {
            Ok(connected) => connected.map_err(|e| DiscoveryError::Connect(chain(&e))),
            Err(_) => Err(DiscoveryError::Timeout("answer the connection")),
        }
    }

    async fn dial(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        #[cfg(test)]
        if let Some(pipes) = &self.pipes {
            return endpoint.connect_with_connector(pipes.clone()).await;
        }
        endpoint.connect().await
    }

    async fn bearer_token(&self) -> Result<Option<AsciiMetadataValue>, DiscoveryError> {
        let Some(path) = &self.config.token_file else {
            return Ok(None);
        };
        let bytes = Zeroizing::new(read_file("token", path).await?);
        let unusable = || DiscoveryError::Token(path.clone());
        let token = str::from_utf8(&bytes).map_err(|_| unusable())?.trim();
        if token.is_empty() || token.len() > TOKEN_MAX_BYTES {
            return Err(unusable());
        }
        let header = Zeroizing::new(format!("Bearer {token}"));
        let mut value: AsciiMetadataValue = header.parse().map_err(|_| unusable())?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn react(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> mesh_api::proto::discovery::DeltaDiscoveryRequest {
        let (reaction, answered, current, refused) = {
            let mut subscription = lock(&self.subscription);
            let reaction = subscription.on_response(response);
            (
                reaction,
                subscription.is_answered(),
                subscription.is_current(),
                subscription.refused(),
            )
        };
        debug!(
            type_url = reaction.reply.type_url,
            changes = reaction.updates.len(),
            nack = reaction.nack,
            "response"
        );
        if reaction.nack {
            let reasons = reaction
                .reply
                .error_detail
                .as_ref()
                .map_or("", |detail| detail.message.as_str());
            warn!(
                count = reaction.rejected.len(),
                reasons, "resources refused, the rest applied"
            );
        }
        let counts = self.writer.apply(reaction.updates);
        self.status.send_modify(|status| {
            status.ready |= answered;
            status.counts = counts;
            status.refused = refused;
            status.responses += 1;
            status.nacks += u64::from(reaction.nack);
            if let Some(refusal) = reaction.rejected.last() {
                status.last_refusal =
                    Some(refusal.to_string().chars().take(ERROR_TEXT_MAX).collect());
            }
            if current {
                status.phase = Phase::Connected;
                status.last_error = None;
            }
        });
        // Last: whoever writes the snapshot from now on finds this response counted.
        self.changes.send_modify(|changes| *changes += 1);
        reaction.reply
    }
}

fn lock(subscription: &Mutex<Subscription>) -> MutexGuard<'_, Subscription> {
    subscription.lock().unwrap_or_else(PoisonError::into_inner)
}

fn endpoint(config: &DiscoveryConfig) -> Result<Endpoint, DiscoveryError> {
    let unusable = |reason: &str| DiscoveryError::Address {
        address: config.address.clone(),
        reason: reason.to_owned(),
    };
    let address = match config.address.split_once("://") {
        Some(("https", _)) => config.address.clone(),
        Some((scheme, _)) => {
            return Err(unusable(&format!(
                "{scheme} is refused, only https is spoken"
            )));
        }
        None if config.address.is_empty() => return Err(unusable("it is empty")),
        None => format!("https://{}", config.address),
    };
    let endpoint = Endpoint::from_shared(address).map_err(|e| unusable(&chain(&e)))?;
    Ok(endpoint
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}

async fn read_file(what: &'static str, path: &std::path::Path) -> Result<Vec<u8>, DiscoveryError> {
    let error = |source| DiscoveryError::File {
        what,
        path: path.to_owned(),
        source,
    };
    tokio::fs::read(path).await.map_err(error)
}

/// An error with its causes: the outer text of a transport error says nothing.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// The node in the form that control planes of the field expect: the first part of the id selects the protocol.
fn node(config: &DiscoveryConfig) -> Node {
    let text = |text: &str| Value {
        kind: Some(value::Kind::StringValue(text.to_owned())),
    };
    let fields = [
        ("NODE_NAME", &config.node),
        ("CLUSTER_ID", &config.cluster),
        ("NETWORK", &config.network),
    ];
    let fields: BTreeMap<_, _> = fields
        .into_iter()
        .map(|(key, value)| (key.to_owned(), text(value)))
        .collect();
    Node {
        id: format!(
            "ztunnel~127.0.0.1~{}.weft-system~weft-system.svc.cluster.local",
            config.node
        ),
        cluster: config.cluster.clone(),
        metadata: Some(Struct { fields }),
        build_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Writes the snapshot some time after a change, never two at once.
struct SnapshotKeeper {
    path: PathBuf,
    subscription: Arc<Mutex<Subscription>>,
    changes: watch::Receiver<u64>,
    status: watch::Sender<DiscoveryStatus>,
    may_write: Arc<AtomicBool>,
    /// The last attempt failed and was logged.
    failing: bool,
}

impl SnapshotKeeper {
    async fn run(mut self, shutdown: CancellationToken) {
        while let Some(Ok(())) = shutdown.run_until_cancelled(self.changes.changed()).await {
            // A node's first state is not held back: until it is on disk, a restart would know nothing.
            let debounce = match self.status.borrow().snapshot_responses {
                Some(_) => SNAPSHOT_DEBOUNCE,
                None => Duration::ZERO,
            };
            let settled = shutdown
                .run_until_cancelled(sleep(debounce))
                .await
                .is_some();
            if !settled {
                self.changes.mark_changed();
                break;
            }
            self.changes.mark_unchanged();
            let pause = self.write().await;
            if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
                break;
            }
        }
        if self.changes.has_changed().unwrap_or(false) {
            self.write().await;
        }
    }

    /// Writes what is in force now; how long to pause before the next attempt.
    async fn write(&mut self) -> Duration {
        if !self.may_write.load(Ordering::Acquire) {
            self.changes.mark_changed();
            return SNAPSHOT_DEBOUNCE;
        }
        let start = Instant::now();
        // Read before the records: they may hold more than that, never less.
        let contained = self.status.borrow().responses;
        let (node, records): (Node, Vec<Record>) = {
            let subscription = lock(&self.subscription);
            // Before both types are known the file on disk, if any, is the better state.
            if !subscription.is_answered() {
                return Duration::ZERO;
            }
            (subscription.node().clone(), subscription.records())
        };
        let path = self.path.clone();
        let written =
            tokio::task::spawn_blocking(move || snapshot::save(&path, &node, &records)).await;
        let error = match written {
            Ok(Ok(())) => {
                self.failing = false;
                self.status
                    .send_modify(|status| status.snapshot_responses = Some(contained));
                return start.elapsed() * SNAPSHOT_PAUSE_FACTOR;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panicked) => panicked.to_string(),
        };
        self.failed(&error);
        self.changes.mark_changed();
        SNAPSHOT_RETRY
    }

    /// Logged once per failure, not once per attempt: a full disk must not be filled with complaints about it.
    fn failed(&mut self, error: &str) {
        if !self.failing {
            warn!(
                error,
                "snapshot not written, the older one stays; discovery goes on"
            );
        }
        self.failing = true;
        self.status
            .send_modify(|status| status.snapshot_failures += 1);
    }
}
