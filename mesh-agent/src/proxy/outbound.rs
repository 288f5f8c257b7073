//! Captured outbound connections: who dials where, and how it gets there.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, StatusCode};
use mesh_api::names::NamespacedName;
use tokio::{
    net::TcpStream,
    time::{self, timeout, timeout_at},
};

use super::{
    OWN_PORTS,
    connect::{Dialer, Source},
    memory::{Far, Stalls},
    never_a_destination,
    pool::{Lease, PoolKey},
    relay::{self, End, Meter, relay_tcp, relay_tunnel, reset},
    tunnel::{
        ConnectRequest, TunnelError, TunnelStream,
        headers::{BAGGAGE, FORWARDED, TRACEPARENT, TraceParent, baggage, forwarded},
    },
    unmapped,
    worker::{Admission, Worker},
};
use crate::{
    capture::{DialOptions, LocalWorkload, TUNNEL_PORT, Verdict, dial},
    discovery::model::{Endpoint, Refusal, Route, SameNode, Service, Tunnel, Workload},
    identity::{CertificateError, Certified},
    policy::{self, Decision},
    sys::socket::tcp_statistics,
    telemetry::{CloseReason, ConnectionInfo, Direction, OpenConnection, Party, Security},
};

/// Endpoints that are tried for one connection: the first choice and, before the first byte, one other.
const ENDPOINT_ATTEMPTS: usize = 2;
/// Tunnels that are tried for one endpoint when the peer says that it has not looked at the stream.
const TUNNEL_ATTEMPTS: usize = 3;

/// How long a tunnel's peer may leave a CONNECT unacknowledged, by TCP, before another endpoint is tried: several
/// retransmissions. The peer, or the way to it, is gone, and keepalive will say so only later.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// Why an outbound connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// The destination is this machine, this proxy, nobody or everybody.
    #[error("destination {0} is never served")]
    Destination(SocketAddr),
    /// Discovery has not told of the workload that dials. Look at the connection to the control plane.
    #[error("the dialling workload is not known yet")]
    UnknownWorkload,
    /// The service has no endpoint for this port.
    #[error("the service has no usable endpoint")]
    NoEndpoint,
    /// The destination cannot be reached without bypassing what its owner asked for.
    #[error("{0}: {1}")]
    Refused(NamespacedName, Refusal),
    /// Plain TCP to the destination failed.
    #[error("cannot connect to {0}: {1}")]
    Dial(SocketAddr, #[source] io::Error),
    /// Plain TCP to the destination was not answered.
    #[error("{0} did not answer in time")]
    TimedOut(SocketAddr),
    /// The tunnel, or the peer's answer.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The application gave up while we were connecting.
    #[error("the client gave up")]
    Abandoned,
    /// The agent drains, or the workload is no longer served.
    #[error("the connection was closed while it was being established")]
    Closed(CloseReason),
}

impl OutboundError {
    fn elsewhere(&self) -> bool {
        match self {
            Self::Dial(..) | Self::TimedOut(_) => true,
            Self::Tunnel(error) => error.elsewhere(),
            Self::Destination(_)
            | Self::UnknownWorkload
            | Self::NoEndpoint
            | Self::Refused(..)
            | Self::Abandoned
            | Self::Closed(_) => false,
        }
    }

    fn denied(&self) -> bool {
        matches!(
            self,
            Self::Tunnel(TunnelError::Refused(StatusCode::UNAUTHORIZED))
        )
    }

    fn reason(&self) -> CloseReason {
        match self {
            Self::Destination(_) => CloseReason::BadRequest,
            Self::UnknownWorkload => CloseReason::UnknownWorkload,
            Self::NoEndpoint | Self::Refused(..) => CloseReason::NoEndpoint,
            Self::Abandoned => CloseReason::ClientReset,
            Self::Closed(reason) => *reason,
            Self::Dial(..) | Self::TimedOut(_) => CloseReason::ConnectFailed,
            Self::Tunnel(error) => match error {
                TunnelError::Refused(StatusCode::UNAUTHORIZED) => CloseReason::Denied,
                TunnelError::Refused(status) if status.is_client_error() => CloseReason::BadRequest,
                TunnelError::Refused(_) | TunnelError::Dial(_) | TunnelError::TimedOut(_) => {
                    CloseReason::ConnectFailed
                }
                TunnelError::NoCertificate(_) => CloseReason::NoCertificate,
                TunnelError::Limit => CloseReason::Limit,
                TunnelError::Tls(_)
                | TunnelError::Protocol(_)
                | TunnelError::Abuse(_)
                | TunnelError::NotTaken => CloseReason::TunnelFailed,
            },
        }
    }
}

/// Where a connection goes, once established.
enum Upstream {
    Tunnel(TunnelStream, Lease<Dialer>),
    Plain(TcpStream),
}

/// Carries one captured connection from its accept to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    app: TcpStream,
    client: SocketAddr,
    mut admission: Admission,
) {
    let began = Instant::now();
    relay::guard(&app);
    let local = admission.served().local.clone();
    let registered = worker.registry.enter(admission.served().id, None);
    let Ok(destination) = app.local_addr().map(unmapped) else {
        return reset(app);
    };
    let mut attempt = Box::new(Attempt::new(&worker, &local, client, destination));
    let established = {
        let mut establish = pin!(Box::pin(attempt.establish()));
        tokio::select! {
            established = &mut establish => established,
            () = relay::broken(&app) => Err(OutboundError::Abandoned),
            reason = registered.signal().closed() => Err(OutboundError::Closed(reason)),
        }
    };
    let info = attempt.info();
    let upstream = match established {
        Ok(upstream) => upstream,
        Err(error) => {
            attempt.learn_refusal(&error);
            worker
                .context
                .telemetry
                .failed(&info, error.reason(), &error);
            return reset(app);
        }
    };
    attempt.learn_success();
    let _in_flight = attempt.in_flight.take();
    drop(attempt);
    worker
        .context
        .telemetry
        .observe_connect(Direction::Outbound, info.security, began.elapsed());
    let open = worker.context.telemetry.open(info);
    let idle = worker.context.limits.time.half_close_idle;
    match upstream {
        Upstream::Tunnel(stream, lease) => {
            admission.tunnelled();
            let meter = Rc::new(OutboundMeter(open, admission.stalls(Far::Stream)));
            let end = relay_tunnel(app, stream, &meter, registered.signal(), idle).await;
            if let Some(statistics) = lease.tunnel().tcp_statistics() {
                meter.0.observe_tcp(statistics);
            }
            meter.0.finish(close_reason(end));
        }
        Upstream::Plain(upstream) => {
            let meter = OutboundMeter(open, admission.stalls(Far::Socket));
            let end = relay_tcp(app, upstream, &meter, registered.signal(), idle).await;
            meter.0.finish(close_reason(end));
        }
    }
}

fn close_reason(end: End) -> CloseReason {
    match end {
        End::Finished => CloseReason::Finished,
        End::NearReset => CloseReason::ClientReset,
        End::FarReset => CloseReason::ServerReset,
        End::TimedOut => CloseReason::TimedOut,
        End::Closed(reason) => reason,
    }
}

struct OutboundMeter(OpenConnection, Stalls);

impl Meter for OutboundMeter {
    fn near_to_far(&self, bytes: usize) {
        self.0.add_sent(bytes as u64);
    }

    fn far_to_near(&self, bytes: usize) {
        self.0.add_received(bytes as u64);
    }

    fn waits(&self, up: bool, down: bool) {
        self.1.set(up, down);
    }

    fn ended(&self, far: Option<&TcpStream>) {
        if let Some(Ok(statistics)) = far.map(|far| tcp_statistics(far.as_fd())) {
            self.0.observe_tcp(statistics);
        }
    }
}

/// What the kernel may be told once the outcome is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lesson {
    /// Nothing.
    None,
    /// On success the destination is outside the mesh.
    Outside,
    /// On success the destination is this node's, by its own address, through a tunnel; policy is asked.
    SameNode,
}

/// One attempt to find out where a connection goes and to get it there.
struct Attempt<'a> {
    worker: &'a Rc<Worker>,
    local: &'a Arc<LocalWorkload>,
    client: SocketAddr,
    destination: SocketAddr,
    /// When it has failed, however far it has come.
    deadline: time::Instant,
    /// That of `source`, or an older one: what is learnt holds for it only.
    generation: u64,
    source: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    endpoint: Option<Endpoint>,
    /// A refusal holds for the whole destination, not for one of several endpoints.
    single: bool,
    lesson: Lesson,
    /// Of a service's endpoint, once connected.
    in_flight: Option<InFlight>,
}

impl<'a> Attempt<'a> {
    fn new(
        worker: &'a Rc<Worker>,
        local: &'a Arc<LocalWorkload>,
        client: SocketAddr,
        destination: SocketAddr,
    ) -> Self {
        let (generation, source) = worker.context.source(local);
        Self {
            worker,
            local,
            client,
            destination,
            deadline: time::Instant::now() + worker.context.limits.time.connect,
            generation,
            source,
            service: None,
            endpoint: None,
            single: false,
            lesson: Lesson::None,
            in_flight: None,
        }
    }

    async fn establish(&mut self) -> Result<Upstream, OutboundError> {
        let own_port =
            OWN_PORTS.contains(&self.destination.port()) && self.local.owns(self.destination.ip());
        if own_port || never_a_destination(self.destination.ip()) {
            return Err(OutboundError::Destination(self.destination));
        }
        let source = self.source.clone().ok_or(OutboundError::UnknownWorkload)?;
        let route = self
            .worker
            .context
            .mesh
            .read()
            .route(&source, self.destination);
        match route {
            Route::Passthrough => {
                self.lesson = Lesson::Outside;
                self.plain(self.destination, self.deadline).await
            }
            Route::NoEndpoint { service } => {
                self.service = Some(service);
                Err(OutboundError::NoEndpoint)
            }
            Route::Refused {
                destination,
                reason,
            } => Err(OutboundError::Refused(destination, reason)),
            Route::Workload(endpoint) => {
                self.single = true;
                self.lesson = Lesson::SameNode;
                self.reach_endpoint(&source, endpoint, 1).await
            }
            Route::Service { service, endpoints } => {
                self.single = endpoints.len() == 1;
                self.service = Some(service);
                self.reach_service(&source, &endpoints).await
            }
        }
    }

    async fn reach_service(
        &mut self,
        source: &Workload,
        endpoints: &[Endpoint],
    ) -> Result<Upstream, OutboundError> {
        let mut exclude = None;
        let mut last = OutboundError::NoEndpoint;
        for left in (1..=ENDPOINT_ATTEMPTS.min(endpoints.len())).rev() {
            let Some(endpoint) = self.choose(endpoints, exclude) else {
                break;
            };
            let in_flight = InFlight::start(self.worker, endpoint.address);
            let began = Instant::now();
            let reached = self.reach_endpoint(source, endpoint.clone(), left);
            match reached.await {
                Ok(upstream) => {
                    in_flight.connected(began.elapsed());
                    self.in_flight = Some(in_flight);
                    return Ok(upstream);
                }
                Err(error) if error.elsewhere() => {
                    in_flight.failed(began.elapsed());
                    exclude = Some(endpoint.address);
                    last = error;
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// The endpoint to try next, never the one that has just failed.
    fn choose<'e>(
        &self,
        endpoints: &'e [Endpoint],
        exclude: Option<SocketAddr>,
    ) -> Option<&'e Endpoint> {
        let mut balancer = self.worker.balancer.borrow_mut();
        let index = balancer.choose(Instant::now(), endpoints, exclude)?;
        endpoints.get(index)
    }

    /// With `left` endpoints to try, this one included.
    async fn reach_endpoint(
        &mut self,
        source: &Workload,
        endpoint: Endpoint,
        left: usize,
    ) -> Result<Upstream, OutboundError> {
        self.endpoint = Some(endpoint.clone());
        let deadline = || share_of(time::Instant::now(), self.deadline, left);
        match endpoint.workload.tunnel {
            Tunnel::None => self.plain(endpoint.address, deadline()).await,
            Tunnel::Hbone => {
                let certified = self.certified(source).await?;
                let opened = self.through_tunnel(source, &endpoint, certified);
                timeout_at(deadline(), opened)
                    .await
                    .unwrap_or(Err(OutboundError::TimedOut(endpoint.address)))
            }
        }
    }

    /// The source's certificate. Its want is no endpoint's fault, and no other endpoint would help.
    async fn certified(&self, source: &Workload) -> Result<Arc<Certified>, TunnelError> {
        let certificates = &self.worker.context.certificates;
        if let Some(certified) = certificates.current(&source.identity) {
            return Ok(certified);
        }
        let late = || Err(CertificateError::TimedOut(source.identity.clone()));
        let certified = timeout_at(self.deadline, certificates.get(&source.identity)).await;
        Ok(certified.unwrap_or_else(|_| late())?)
    }

    async fn plain(
        &self,
        destination: SocketAddr,
        deadline: time::Instant,
    ) -> Result<Upstream, OutboundError> {
        let dialled = dial(self.local, destination, DialOptions::default());
        match timeout_at(deadline, dialled).await {
            Ok(Ok(socket)) => Ok(Upstream::Plain(socket)),
            Ok(Err(error)) => {
                self.worker.context.telemetry.limits.dial_failed(&error);
                Err(OutboundError::Dial(destination, error))
            }
            Err(_) => Err(OutboundError::TimedOut(destination)),
        }
    }

    async fn through_tunnel(
        &self,
        source: &Workload,
        endpoint: &Endpoint,
        certified: Arc<Certified>,
    ) -> Result<Upstream, OutboundError> {
        let key = PoolKey {
            source: source.identity.clone(),
            expected: endpoint.identities.clone(),
            destination: SocketAddr::new(endpoint.address.ip(), TUNNEL_PORT),
            netns: self.local.cookie(),
            source_address: None,
            roots: certified.roots_fingerprint,
        };
        let context = Source {
            local: self.local.clone(),
            certified,
        };
        let request = self.request(source, endpoint);
        let mut last = TunnelError::NotTaken;
        for _ in 0..TUNNEL_ATTEMPTS {
            let lease = self.worker.pool.lease(&key, &context).await?;
            match open_stream(&lease, request.clone(), !self.single).await {
                Ok((stream, _)) => return Ok(Upstream::Tunnel(stream, lease)),
                Err(error @ TunnelError::NotTaken) => last = error,
                // The tunnel had died unnoticed: no byte was passed on, so a new one may try.
                Err(error @ TunnelError::Protocol(_)) if !lease.tunnel().client.is_open() => {
                    last = error;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.into())
    }

    fn request(&self, source: &Workload, endpoint: &Endpoint) -> ConnectRequest {
        let host = self.service.as_ref().map(|service| &*service.key.name);
        let trace = TraceParent::random(&mut rand::rng());
        tracing::debug!(?trace, destination = %endpoint.address, "CONNECT");
        let mut headers = HeaderMap::with_capacity(3);
        let values = [
            (BAGGAGE, baggage(source)),
            (FORWARDED, forwarded(self.client, host)),
            (TRACEPARENT, trace.header()),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        ConnectRequest {
            authority: endpoint.address.to_string(),
            headers,
        }
    }

    fn info(&self) -> ConnectionInfo {
        let tunnelled = self
            .endpoint
            .as_ref()
            .is_some_and(|endpoint| endpoint.workload.tunnel == Tunnel::Hbone);
        ConnectionInfo {
            direction: Direction::Outbound,
            source: Party {
                identity: self.source.as_ref().map(|source| source.identity.clone()),
                workload: self.source.clone(),
                address: Some(self.client),
            },
            destination: Party {
                workload: self
                    .endpoint
                    .as_ref()
                    .map(|endpoint| endpoint.workload.clone()),
                identity: self
                    .endpoint
                    .as_ref()
                    .filter(|_| tunnelled)
                    .and_then(|endpoint| endpoint.identities.first().cloned()),
                address: Some(
                    self.endpoint
                        .as_ref()
                        .map_or(self.destination, |endpoint| endpoint.address),
                ),
            },
            service: self
                .service
                .as_ref()
                .map(|service| service.key.to_string().into()),
            security: if tunnelled {
                Security::MutualTls
            } else {
                Security::None
            },
        }
    }

    fn learn_refusal(&self, error: &OutboundError) {
        if error.denied() && self.single {
            self.remember(Verdict::Denied);
        }
    }

    fn learn_success(&self) {
        match self.lesson {
            Lesson::None => {}
            Lesson::Outside => self.remember(Verdict::Pass),
            Lesson::SameNode if self.may_stay_in_kernel() => self.remember(Verdict::SameNode),
            Lesson::SameNode => {}
        }
    }

    fn remember(&self, verdict: Verdict) {
        self.worker.context.verdicts.remember(
            self.local,
            self.destination,
            self.generation,
            verdict,
        );
    }

    /// Whether the next connection may go from application to application in the kernel: both on this node, both
    /// without a wish for more, and allowed by the destination's policy, which nobody asks then, without an audit.
    fn may_stay_in_kernel(&self) -> bool {
        let (Some(source), Some(endpoint)) = (&self.source, &self.endpoint) else {
            return false;
        };
        let workload = &endpoint.workload;
        if !kernel_eligible(source, workload, &self.worker.context.node) {
            return false;
        }
        let connection = policy::Connection {
            peer: Some(source.identity.clone()),
            source: self.client.ip(),
            destination: endpoint.address,
        };
        let decision = policy::authorize(&self.worker.context.mesh.read(), workload, &connection);
        // An audit is for the proxy to count: in the kernel nobody would.
        matches!(decision, Decision::Allowed(proof) if proof.audited().is_empty())
    }
}

/// Until when the next endpoint may be tried: with `left` of them to go, each gets an equal part of the time.
fn share_of(now: time::Instant, deadline: time::Instant, left: usize) -> time::Instant {
    let parts = u32::try_from(left.max(1)).unwrap_or(u32::MAX);
    now + deadline.saturating_duration_since(now) / parts
}

/// Opens a stream; the caller has a deadline. Where there are other endpoints, a tunnel whose peer is silent is retired and not waited for.
async fn open_stream(
    lease: &Lease<Dialer>,
    request: ConnectRequest,
    others: bool,
) -> Result<(TunnelStream, HeaderMap), TunnelError> {
    let client = &lease.tunnel().client;
    let mut open = pin!(client.open(request));
    if let Ok(opened) = timeout(SILENCE_MAX, &mut open).await {
        return opened;
    }
    // Half of it: the last acknowledgement may be that of an earlier stream.
    if others && client.unanswered_for() >= SILENCE_MAX / 2 {
        lease.retire();
        return Err(TunnelError::TimedOut("acknowledge CONNECT"));
    }
    open.await
}

fn kernel_eligible(source: &Workload, destination: &Workload, node: &str) -> bool {
    let wish = |workload: &Workload| workload.capture.same_node == SameNode::Kernel;
    *destination.node == *node
        && destination.tunnel == Tunnel::Hbone
        && !destination.host_network
        && wish(source)
        && wish(destination)
}

/// A connection to an endpoint of a service, from its choice to its end, as the balancer counts it.
struct InFlight {
    worker: Rc<Worker>,
    address: SocketAddr,
    /// Still counted; a failure counts itself out.
    counted: bool,
}

impl InFlight {
    fn start(worker: &Rc<Worker>, address: SocketAddr) -> Self {
        worker
            .balancer
            .borrow_mut()
            .started(Instant::now(), address);
        Self {
            worker: worker.clone(),
            address,
            counted: true,
        }
    }

    fn connected(&self, took: Duration) {
        let mut balancer = self.worker.balancer.borrow_mut();
        balancer.connected(Instant::now(), self.address, took);
    }

    fn failed(mut self, latency: Duration) {
        self.counted = false;
        let mut balancer = self.worker.balancer.borrow_mut();
        balancer.failed(Instant::now(), self.address, latency);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.counted {
            self.worker.balancer.borrow_mut().finished(self.address);
        }
    }
}

#[cfg(test)]
mod tests;
