//! Connections to a local workload: tunnels (TLS, then one CONNECT per connection) and captured plaintext. Nothing
//! reaches the application before policy has allowed it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    rc::{Rc, Weak},
    sync::Arc,
    time::Instant,
};

use http::{HeaderMap, Method, StatusCode};
use mesh_api::{identity::Identity, names::NamespacedName};
use tokio::{
    net::TcpStream,
    time::{MissedTickBehavior, interval, timeout, timeout_at},
};

use super::{
    accept::{self, Kind},
    limits::REJUDGE_INTERVAL,
    memory::{Far, Stalls, stream_window},
    registry::{Judged, Registered},
    relay::{self, End, Meter, relay_tcp, relay_tunnel, reset},
    room::{Need, Refused},
    served::Served,
    tunnel::{
        Incoming, TunnelError, TunnelServer, TunnelStream,
        headers::{BAGGAGE, TraceParent, baggage, forwarded_host},
        transport::accept_tls,
    },
    unmapped,
    worker::{Admission, Worker},
};
use crate::{
    capture::{DialOptions, LocalWorkload, dial},
    discovery::model::Workload,
    identity::{CertificateError, peer::ClientProof, peer_identity},
    policy::{self, Authorized, Decision},
    sys::{
        netns::duplicate,
        socket::{SharedStatistics, TcpStatistics, tcp_statistics},
    },
    telemetry::{
        CloseReason, ConnectionInfo, Direction, Limit, OpenConnection, Party, Security,
        TunnelFailure,
    },
};

mod target;

use target::{dialled_target, request_target};

/// Why an inbound connection was refused.
#[derive(Debug, thiserror::Error)]
pub enum InboundError {
    /// The request is malformed or names somebody else (400).
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The target is the proxy itself or cannot be resolved here (503).
    #[error("not served: {0}")]
    NotServed(&'static str),
    /// Discovery has not told of this workload (503). Look at the connection to the control plane.
    #[error("the local workload is not known yet")]
    UnknownWorkload,
    /// Policy refuses (401).
    #[error("denied by {}", policy.as_ref().map_or_else(|| "absence of an allowing policy".to_owned(), ToString::to_string))]
    Denied {
        /// The policy that matched.
        policy: Option<NamespacedName>,
    },
    /// The application does not accept (503).
    #[error("the application cannot be reached: {0}")]
    Application(#[source] io::Error),
    /// A limit was reached (503).
    #[error(transparent)]
    Limit(#[from] Refused),
    /// The client gave up before it was answered.
    #[error("the client gave up")]
    Abandoned,
    /// A policy change or a drain closed it before it was answered.
    #[error("closed before it was established")]
    Closed(CloseReason),
}

impl InboundError {
    fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Denied { .. } | Self::Closed(CloseReason::Revoked) => StatusCode::UNAUTHORIZED,
            Self::NotServed(_)
            | Self::UnknownWorkload
            | Self::Application(_)
            | Self::Limit(_)
            | Self::Abandoned
            | Self::Closed(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn reason(&self) -> CloseReason {
        match self {
            Self::BadRequest(_) | Self::NotServed(_) => CloseReason::BadRequest,
            Self::UnknownWorkload => CloseReason::UnknownWorkload,
            Self::Denied { .. } => CloseReason::Denied,
            Self::Application(_) => CloseReason::ConnectFailed,
            Self::Limit(_) => CloseReason::Limit,
            Self::Abandoned => CloseReason::ClientReset,
            Self::Closed(reason) => *reason,
        }
    }
}

/// The ends of an accepted tunnel.
#[derive(Debug, Clone)]
struct TunnelEnds {
    peer: SocketAddr,
    own: SocketAddr,
    identity: Identity,
    /// Its socket, for as long as the tunnel is open, for measurements.
    socket: Weak<OwnedFd>,
    statistics: Rc<SharedStatistics>,
}

impl TunnelEnds {
    /// What the kernel measured on the tunnel's TCP connection, retransmissions since the last call.
    fn tcp_statistics(&self) -> Option<TcpStatistics> {
        let total = tcp_statistics(self.socket.upgrade()?.as_fd()).ok()?;
        Some(self.statistics.since_last(total))
    }
}

/// Carries one tunnel from its accept to its end.
pub(super) async fn serve_tunnel(
    worker: Rc<Worker>,
    socket: TcpStream,
    peer: SocketAddr,
    admission: Admission,
) {
    let limits = &worker.context.limits.tunnel;
    let served = admission.served().clone();
    let refuse = |socket, limit| {
        let refused = worker.shared.room.refuse(&served.local, limit);
        accept::refuse(&worker, &served, Kind::Tunnel, socket, peer, refused);
    };
    let (by_source, by_workload) = &worker.handshakes;
    let Some(permit) = by_source.enter(peer.ip(), limits.handshakes_per_source) else {
        return refuse(socket, Limit::HandshakesPerSource);
    };
    let most = limits.handshakes_per_workload;
    let Some(workload_permit) = by_workload.enter(served.id, most) else {
        return refuse(socket, Limit::HandshakesPerWorkload);
    };
    let Some(_place) = worker.tunnels.enter(peer.ip(), limits.per_source) else {
        return refuse(socket, Limit::TunnelsPerSource);
    };
    let registered = worker.registry.enter(served.id, None);
    let Ok(own) = socket.local_addr().map(unmapped) else {
        return;
    };
    let measured = duplicate(socket.as_fd()).ok().map(Rc::new);
    let shaken = Box::pin(shake_hands(&worker, &served.local, socket)).await;
    let (identity, proof, mut server) = match shaken {
        Ok(shaken) => shaken,
        Err(error) => {
            let telemetry = &worker.context.telemetry;
            telemetry
                .tunnels
                .failed(Direction::Inbound, error.failure());
            if let HandshakeError::Tunnel(TunnelError::Abuse(_)) = error {
                // What came along with the preface was already too much.
                worker.shared.room.refuse(&served.local, Limit::TunnelAbuse);
            }
            if let Some(held_back) = worker.handshake_failures.line(Instant::now()) {
                tracing::info!(%peer, workload = %served.local.name, %error, held_back, "no tunnel with a client");
            }
            return;
        }
    };
    drop((permit, workload_permit));
    let holds = served.local.holds.clone();
    server.follow_window(Rc::new(move || stream_window(&holds)));
    let _open = worker.context.telemetry.tunnels.open(Direction::Inbound);
    serve_streams(
        &worker,
        &served,
        &registered,
        TunnelEnds {
            peer,
            own,
            identity,
            socket: measured.as_ref().map(Rc::downgrade).unwrap_or_default(),
            statistics: Rc::default(),
        },
        proof,
        server,
    )
    .await;
}

/// Why a client has no tunnel. Not its fault: the first three; look at this node's connection to the control plane.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("the local workload is not known yet")]
    UnknownWorkload,
    #[error("no certificate of our own: {0}")]
    NoCertificate(#[source] CertificateError),
    #[error("no certificate of our own in time")]
    CertificateLate,
    #[error("the client's certificate names no workload")]
    NoIdentity,
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
}

impl HandshakeError {
    fn failure(&self) -> TunnelFailure {
        match self {
            Self::UnknownWorkload => TunnelFailure::UnknownWorkload,
            Self::NoCertificate(_) | Self::CertificateLate => TunnelFailure::NoCertificate,
            Self::NoIdentity => TunnelFailure::NoIdentity,
            Self::Tunnel(error) => error.failure(),
        }
    }
}

/// TLS and the HTTP/2 preface, each with its deadline: a silent or dribbling client must not stay.
async fn shake_hands(
    worker: &Worker,
    local: &LocalWorkload,
    socket: TcpStream,
) -> Result<(Identity, ClientProof, TunnelServer<TcpStream>), HandshakeError> {
    let context = &worker.context;
    let deadline = tokio::time::Instant::now() + context.limits.time.handshake;
    let Some(workload) = local.workload.load_full() else {
        reset(socket);
        return Err(HandshakeError::UnknownWorkload);
    };
    let certified = match timeout_at(deadline, context.certificates.get(&workload.identity)).await {
        Ok(Ok(certified)) => certified,
        Ok(Err(error)) => {
            reset(socket);
            return Err(HandshakeError::NoCertificate(error));
        }
        Err(_) => {
            reset(socket);
            return Err(HandshakeError::CertificateLate);
        }
    };
    let began = Instant::now();
    let shaken = accept_tls(context.codec, certified.server.clone(), socket, deadline).await;
    let late = |limit| {
        move |error: &TunnelError| {
            if matches!(error, TunnelError::TimedOut(_)) {
                context.telemetry.limits.reached(limit);
            }
        }
    };
    let secured = shaken.inspect_err(late(Limit::HandshakeDeadline))?;
    context
        .telemetry
        .observe_handshake(Direction::Inbound, began.elapsed());
    let chain = secured.peer_certificates();
    let identity = peer_identity(chain).ok_or(HandshakeError::NoIdentity)?;
    let proof = ClientProof::new(chain.unwrap_or_default(), &certified)
        .ok_or(HandshakeError::NoIdentity)?;
    let server = TunnelServer::handshake(secured, &context.limits).await;
    let server = server.inspect_err(late(Limit::FirstFrameDeadline))?;
    Ok((identity, proof, server))
}

async fn serve_streams(
    worker: &Rc<Worker>,
    served: &Arc<Served>,
    registered: &Registered,
    ends: TunnelEnds,
    mut proof: ClientProof,
    mut server: TunnelServer<TcpStream>,
) {
    let ends = Rc::new(ends);
    let mut stopped = pin!(served.stop.cancelled());
    let mut stopping = false;
    let mut again = interval(REJUDGE_INTERVAL);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = tokio::select! {
            () = &mut stopped, if !stopping => {
                stopping = true;
                server.shut_down();
                continue;
            }
            _ = again.tick(), if !stopping => {
                let own = served.local.workload.load();
                let certificates = &worker.context.certificates;
                let holds = own.as_ref().map_or(Ok(()), |own| certificates.judge_again(&own.identity, &mut proof));
                if let Err(rejection) = holds {
                    tracing::info!(peer = %ends.identity, %rejection, "a tunnel takes no more connections");
                    stopping = true;
                    server.shut_down();
                }
                continue;
            }
            _ = registered.signal().closed() => return,
            next = server.accept() => next,
        };
        match next {
            Some(Ok(incoming)) => {
                let (own, ends) = (worker.clone(), ends.clone());
                worker.spawn(
                    &served.local,
                    serve_connect(own, served.clone(), ends, incoming),
                );
            }
            Some(Err(error @ TunnelError::Abuse(_))) => {
                worker.shared.room.refuse(&served.local, Limit::TunnelAbuse);
                tracing::warn!(%error, peer = %ends.identity, "a client's tunnel was closed");
                return;
            }
            Some(Err(error)) => {
                tracing::debug!(%error, peer = %ends.identity, "tunnel ended");
                return;
            }
            None => return,
        }
    }
}

/// Carries one CONNECT stream from its request to its end.
async fn serve_connect(
    worker: Rc<Worker>,
    served: Arc<Served>,
    ends: Rc<TunnelEnds>,
    incoming: Incoming,
) {
    let admission = match worker.shared.admit(worker.index, &served, Need::Stream) {
        Ok(admission) => admission,
        Err(refused) => {
            let info = Guest::of_tunnel(&worker, &served, &ends).info();
            let (telemetry, error) = (&worker.context.telemetry, InboundError::from(refused));
            telemetry.failed(&info, error.reason(), &error);
            // Not looked at: the client may try another way.
            return incoming.turn_away();
        }
    };
    // Boxed, so that an established connection does not carry what only its beginning needs.
    let Some(connected) = Box::pin(answer_connect(&worker, &served, &ends, incoming)).await else {
        return;
    };
    let Connected {
        app,
        stream,
        registered,
        open,
    } = connected;
    let idle = worker.context.limits.time.half_close_idle;
    let meter = Rc::new(InboundMeter(open, admission.stalls(Far::Stream)));
    let end = relay_tunnel(app, stream, &meter, registered.signal(), idle).await;
    if let Some(statistics) = ends.tcp_statistics() {
        meter.0.observe_tcp(statistics);
    }
    meter.0.finish(close_reason(end));
}

/// A CONNECT stream that was answered with 200.
struct Connected {
    app: TcpStream,
    stream: TunnelStream,
    registered: Registered,
    open: OpenConnection,
}

/// Admits or refuses a request, and answers it.
async fn answer_connect(
    worker: &Rc<Worker>,
    served: &Arc<Served>,
    ends: &TunnelEnds,
    mut incoming: Incoming,
) -> Option<Connected> {
    let began = Instant::now();
    let mut guest = Guest::of_tunnel(worker, served, ends);
    guest.service = guest.service_of(&incoming.request.headers);
    let trace = TraceParent::from_headers(&incoming.request.headers)
        .unwrap_or_else(|| TraceParent::random(&mut rand::rng()));
    let admitted = {
        let request = (incoming.request.method.clone(), authority_of(&incoming));
        let mut admit = pin!(Box::pin(guest.admit(Target::Request(
            &request.0,
            &request.1,
            ends.own.ip()
        ))));
        tokio::select! {
            admitted = &mut admit => admitted,
            () = incoming.abandoned() => Err(InboundError::Abandoned),
        }
    };
    let info = guest.info();
    tracing::debug!(?trace, peer = %ends.identity, destination = ?guest.destination, "CONNECT");
    let (app, registered) = match admitted {
        Ok(admitted) => admitted,
        Err(error) => {
            worker
                .context
                .telemetry
                .failed(&info, error.reason(), &error);
            incoming.refuse(error.status());
            return None;
        }
    };
    let mut headers = HeaderMap::new();
    if let Some(value) = guest.workload.as_deref().and_then(baggage) {
        headers.insert(BAGGAGE, value);
    }
    let Ok(stream) = incoming.accept(headers) else {
        worker
            .context
            .telemetry
            .failed(&info, CloseReason::ClientReset, &InboundError::Abandoned);
        reset(app);
        return None;
    };
    worker.context.telemetry.observe_connect(
        Direction::Inbound,
        Security::MutualTls,
        began.elapsed(),
    );
    let open = worker.context.telemetry.open(info);
    Some(Connected {
        app,
        stream,
        registered,
        open,
    })
}

/// Carries one captured plaintext connection from its accept to its end.
pub(super) async fn serve_plaintext(
    worker: Rc<Worker>,
    client: TcpStream,
    peer: SocketAddr,
    admission: Admission,
) {
    let began = Instant::now();
    relay::guard(&client);
    let served = admission.served().clone();
    let Ok(destination) = client.local_addr().map(unmapped) else {
        return reset(client);
    };
    let mut guest = Guest {
        worker: &worker,
        served: &served,
        peer: None,
        client: peer,
        workload: served.local.workload.load_full(),
        destination: None,
        service: None,
        security: Security::None,
    };
    let admitted = {
        let mut admit = pin!(Box::pin(guest.admit(Target::Dialled(destination))));
        tokio::select! {
            admitted = &mut admit => admitted,
            () = relay::broken(&client) => Err(InboundError::Abandoned),
        }
    };
    let info = guest.info();
    let (app, registered) = match admitted {
        Ok(admitted) => admitted,
        Err(error) => {
            worker
                .context
                .telemetry
                .failed(&info, error.reason(), &error);
            return reset(client);
        }
    };
    worker
        .context
        .telemetry
        .observe_connect(Direction::Inbound, Security::None, began.elapsed());
    let open = worker.context.telemetry.open(info);
    let idle = worker.context.limits.time.half_close_idle;
    let meter = InboundMeter(open, admission.stalls(Far::Socket));
    let end = relay_tcp(app, client, &meter, registered.signal(), idle).await;
    meter.0.finish(close_reason(end));
}

/// The application is near, the client far.
fn close_reason(end: End) -> CloseReason {
    match end {
        End::Finished => CloseReason::Finished,
        End::NearReset => CloseReason::ServerReset,
        End::FarReset => CloseReason::ClientReset,
        End::TimedOut => CloseReason::TimedOut,
        End::Closed(reason) => reason,
    }
}

struct InboundMeter(OpenConnection, Stalls);

impl Meter for InboundMeter {
    fn near_to_far(&self, bytes: usize) {
        self.0.add_received(bytes as u64);
    }

    fn far_to_near(&self, bytes: usize) {
        self.0.add_sent(bytes as u64);
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

fn authority_of(incoming: &Incoming) -> String {
    incoming
        .request
        .uri
        .authority()
        .map(|authority| authority.as_str().to_owned())
        .unwrap_or_default()
}

/// How the destination is known.
enum Target<'a> {
    /// Method and authority of a request, and the tunnel's own address.
    Request(&'a Method, &'a str, IpAddr),
    /// The address that was dialled.
    Dialled(SocketAddr),
}

/// A connection that asks to be let in.
struct Guest<'a> {
    worker: &'a Rc<Worker>,
    served: &'a Arc<Served>,
    peer: Option<Identity>,
    client: SocketAddr,
    workload: Option<Arc<Workload>>,
    destination: Option<SocketAddr>,
    service: Option<Arc<str>>,
    security: Security,
}

impl<'a> Guest<'a> {
    fn of_tunnel(worker: &'a Rc<Worker>, served: &'a Arc<Served>, ends: &TunnelEnds) -> Self {
        Self {
            worker,
            served,
            peer: Some(ends.identity.clone()),
            client: ends.peer,
            workload: served.local.workload.load_full(),
            destination: None,
            service: None,
            security: Security::MutualTls,
        }
    }

    /// Resolves the destination, asks policy, and dials the application.
    async fn admit(&mut self, target: Target<'_>) -> Result<(TcpStream, Registered), InboundError> {
        let local = &self.served.local;
        let workload = self.workload.clone().ok_or(InboundError::UnknownWorkload)?;
        let destination = match target {
            Target::Request(method, authority, own) => request_target(
                method,
                authority,
                own,
                local,
                &workload.namespace,
                &workload.services,
            )?,
            Target::Dialled(address) => dialled_target(address, local)?,
        };
        self.destination = Some(destination);
        let connection = policy::Connection {
            peer: self.peer.clone(),
            source: self.client.ip(),
            destination,
        };
        // Entered before policy is asked, so that a change in between is not missed.
        let judged = Judged {
            local: local.clone(),
            connection: connection.clone(),
        };
        let registered = self.worker.registry.enter(self.served.id, Some(judged));
        let proof = match self.worker.context.judge(local, &connection) {
            Some(Decision::Allowed(proof)) => {
                self.worker.context.telemetry.audited(proof.audited());
                proof
            }
            Some(Decision::Denied { policy, audited }) => {
                self.worker.context.telemetry.audited(&audited);
                return Err(InboundError::Denied { policy });
            }
            None => return Err(InboundError::UnknownWorkload),
        };
        let limit = self.worker.context.limits.time.connect;
        let app = tokio::select! {
            reason = registered.signal().closed() => return Err(InboundError::Closed(reason)),
            app = timeout(limit, dial_application(proof, local, destination, self.client.ip())) => app,
        };
        match app {
            Ok(Ok(app)) => Ok((app, registered)),
            Ok(Err(error)) => {
                self.worker.context.telemetry.limits.dial_failed(&error);
                Err(InboundError::Application(error))
            }
            Err(_) => Err(InboundError::Application(io::ErrorKind::TimedOut.into())),
        }
    }

    fn info(&self) -> ConnectionInfo {
        let found = self
            .worker
            .context
            .mesh
            .read()
            .workload_by_address(self.client.ip());
        // An address may have changed hands; the certificate has not.
        let source = found.filter(|found| {
            self.peer
                .as_ref()
                .is_none_or(|peer| *peer == found.identity)
        });
        ConnectionInfo {
            direction: Direction::Inbound,
            source: Party {
                workload: source,
                identity: self.peer.clone(),
                address: Some(self.client),
            },
            destination: Party {
                identity: self
                    .workload
                    .as_ref()
                    .map(|workload| workload.identity.clone()),
                workload: self.workload.clone(),
                address: self.destination,
            },
            service: self.service.clone(),
            security: self.security,
        }
    }

    /// The service that the client says it addressed, if this workload belongs to it.
    fn service_of(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let host = forwarded_host(headers)?;
        let services = &self.workload.as_ref()?.services;
        services
            .keys()
            .find(|key| key.name.eq_ignore_ascii_case(host))
            .map(|key| key.to_string().into())
    }
}

/// Dials the application from the client's own address. Only a connection that policy allowed gets here.
async fn dial_application(
    _proof: Authorized,
    local: &LocalWorkload,
    destination: SocketAddr,
    client: IpAddr,
) -> io::Result<TcpStream> {
    // The workload calling itself: its address is the namespace's own already.
    let source =
        (client != destination.ip() && client.is_ipv4() == destination.is_ipv4()).then_some(client);
    let options = DialOptions {
        source,
        ..DialOptions::default()
    };
    dial(local, destination, options).await
}

#[cfg(test)]
mod tests;
