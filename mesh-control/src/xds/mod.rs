//! The discovery service: delta ADS as agents (Weft's and Istio's) speak it.

mod progress;
pub mod session;

use std::{sync::Arc, time::Duration};

use mesh_api::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};
use prost_types::value::Kind;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, debug, info, info_span, warn};

use crate::{
    authn::{Caller, Nodes},
    hub::Hub,
    index::ResourceType,
    telemetry::Metrics,
};
pub use progress::{Progress, Spread};
use session::{Event, Session, Violation};

/// Most streams at a time: ten times the 1,000 agents that a control plane is built for, for restarts that overlap.
pub const STREAMS_MAX: usize = 10_000;
/// Largest request: what a client holds, name and version, of 200,000 resources.
const REQUEST_MAX_BYTES: usize = 32 * 1024 * 1024;
/// Responses that wait for the socket. One is enough: what changes meanwhile gathers in the session.
const RESPONSES_QUEUED_MAX: usize = 1;
/// How long a client may leave the socket full before it is cut off.
const SEND_STALL_MAX: Duration = Duration::from_secs(60);
/// How often a stream's token is checked again.
const CREDENTIAL_RECHECK: Duration = Duration::from_secs(2);
/// How long addresses wait for the client to ask for policies as well, so that these can go first.
const AUTHORIZATION_WAIT: Duration = Duration::from_millis(200);

/// The service.
#[derive(Debug)]
pub(crate) struct Discovery {
    pub hub: Hub,
    pub nodes: Nodes,
    pub metrics: Metrics,
    pub progress: Arc<Progress>,
    pub stop: watch::Receiver<bool>,
    pub streams: Arc<Semaphore>,
}

pub(crate) fn service(discovery: Discovery) -> AggregatedDiscoveryServiceServer<Discovery> {
    AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(REQUEST_MAX_BYTES)
}

type Outgoing = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let caller = self.nodes.authenticate(request.metadata()).await?;
        let permit = self.streams.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("this control plane serves too many streams")
        })?;
        let (outgoing, responses) = mpsc::channel(RESPONSES_QUEUED_MAX);
        let span = info_span!("discovery", node = %caller.node);
        let stream = Stream {
            session: Session::default(),
            hub: self.hub.clone(),
            nodes: self.nodes.clone(),
            metrics: self.metrics.clone(),
            progress: self.progress.enter(caller.node.clone()),
            caller,
            outgoing,
            _permit: permit,
        };
        tokio::spawn(
            stream
                .run(request.into_inner(), self.stop.clone())
                .instrument(span),
        );
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One client.
struct Stream {
    session: Session,
    hub: Hub,
    nodes: Nodes,
    metrics: Metrics,
    progress: progress::Entry,
    caller: Caller,
    outgoing: Outgoing,
    _permit: OwnedSemaphorePermit,
}

/// Why a stream ended.
enum End {
    /// The client left, or the connection broke.
    Client,
    /// This side ends it, with a reason for the client.
    Refused(Status),
}

impl Stream {
    async fn run(
        mut self,
        requests: Streaming<DeltaDiscoveryRequest>,
        stop: watch::Receiver<bool>,
    ) {
        info!("stream opened");
        self.metrics.clients.inc();
        let end = self.serve(requests, stop).await;
        self.metrics.clients.dec();
        match end {
            End::Client => info!("stream ended"),
            End::Refused(status) => {
                info!(reason = status.message(), "stream closed");
                // The client may be gone or stalled; then there is nobody to tell.
                let _ = self.outgoing.try_send(Err(status));
            }
        }
    }

    async fn serve(
        &mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        mut stop: watch::Receiver<bool>,
    ) -> End {
        let mut generation = self.hub.generation();
        let mut recheck = interval(CREDENTIAL_RECHECK);
        recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut hold_until: Option<Instant> = None;
        loop {
            if self.session.awaits_authorization() {
                hold_until.get_or_insert_with(|| Instant::now() + AUTHORIZATION_WAIT);
            }
            let hold = hold_until.is_some_and(|until| Instant::now() < until);
            generation.mark_unchanged();
            if let Err(end) = self.send_pending(hold).await {
                return end;
            }
            self.progress.set(self.session.applied());
            let held = hold && self.session.awaits_authorization();
            let release = hold_until.unwrap_or_else(Instant::now);
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(end) = self.take(request).await {
                            return end;
                        }
                    }
                    Ok(None) => return End::Client,
                    Err(status) => {
                        debug!(%status, "stream broke");
                        return End::Client;
                    }
                },
                changed = generation.changed() => if changed.is_err() { return End::Client },
                () = sleep_until(release), if held => {}
                _ = recheck.tick() => if !self.nodes.still_valid(&self.caller) {
                    return End::Refused(Status::unauthenticated("the node's token was withdrawn"));
                },
                () = crate::stopped(&mut stop) => {
                    return End::Refused(Status::unavailable("the control plane is stopping"));
                }
            }
        }
    }

    async fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), End> {
        if let Some(node) = &request.node {
            debug!(
                client = node.id,
                type_url = request.type_url,
                "first request"
            );
            if let Some(name) = node_name(node).filter(|name| **name != *self.caller.node.0) {
                // It would get the mesh but no certificate: better told here, where the operator looks first.
                return Err(End::Refused(Status::permission_denied(format!(
                    "the token is that of node {}, but the agent is {name}: give it the token of {name}",
                    self.caller.node
                ))));
            }
        }
        let event = self.session.on_request(request, self.hub.read().store());
        match event {
            Ok(Event::Accepted) => Ok(()),
            Ok(Event::Nack {
                kind,
                names,
                reason,
            }) => {
                self.metrics.nacks.with_label_values(&[label(kind)]).inc();
                warn!(
                    kind = label(kind),
                    ?names,
                    reason,
                    "the client refused a response"
                );
                Ok(())
            }
            Ok(Event::UnknownType(response)) => self.send(*response).await,
            Err(violation @ Violation::TooManyNames) => Err(End::Refused(
                Status::resource_exhausted(violation.to_string()),
            )),
        }
    }

    async fn send_pending(&mut self, hold_addresses: bool) -> Result<(), End> {
        loop {
            let response = self.session.next(self.hub.read().store(), hold_addresses);
            let Some(response) = response else {
                return Ok(());
            };
            if let Some(kind) = ResourceType::from_url(&response.type_url) {
                self.metrics.pushes.with_label_values(&[label(kind)]).inc();
            }
            self.send(response).await?;
        }
    }

    async fn send(&self, response: DeltaDiscoveryResponse) -> Result<(), End> {
        match timeout(SEND_STALL_MAX, self.outgoing.send(Ok(response))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Client),
            Err(_) => Err(End::Refused(Status::deadline_exceeded(
                "the client reads too slowly",
            ))),
        }
    }
}

/// What a client calls its node; clients that do not say are known by their credentials alone.
fn node_name(node: &Node) -> Option<&str> {
    match &node.metadata.as_ref()?.fields.get("NODE_NAME")?.kind {
        Some(Kind::StringValue(name)) if !name.is_empty() => Some(name),
        _ => None,
    }
}

/// The type as metrics and logs spell it.
pub(crate) fn label(kind: ResourceType) -> &'static str {
    match kind {
        ResourceType::Address => "address",
        ResourceType::Authorization => "authorization",
    }
}
