//! How a worker's pool makes tunnels: dial from the workload's namespace, TLS with its certificate, HTTP/2.

use std::{
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    sync::Arc,
};

use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};

use super::{
    ProxyContext,
    limits::{Limits, NARROW_SEGMENT_BYTES, VANISHED_AFTER, VANISHED_LOOK},
    memory::stream_window,
    pool::{Connector, PoolEvent, PoolKey, Pooled},
    room::{Need, Place, Room},
    tunnel::{
        TunnelClient, TunnelCodec, TunnelError,
        transport::{SecuredClient, connect_tls},
    },
};
use crate::{
    capture::{DialOptions, LocalWorkload, dial},
    identity::Certified,
    sys::{
        netns::duplicate,
        socket::{SharedStatistics, TcpStatistics, unanswered_for},
    },
    telemetry::{Direction, Limit, Telemetry, metrics::TunnelGuard},
};

/// What a tunnel is made from, beside its key.
#[derive(Debug, Clone)]
pub struct Source {
    /// Who dials.
    pub local: Arc<LocalWorkload>,
    /// With which certificate.
    pub certified: Arc<Certified>,
}

/// Makes tunnels for real.
#[derive(Debug)]
pub struct Dialer {
    limits: Arc<Limits>,
    telemetry: Arc<Telemetry>,
    codec: TunnelCodec,
    room: Arc<Room>,
    name: ServerName<'static>,
}

impl Dialer {
    /// For one worker.
    #[must_use]
    pub fn new(context: &ProxyContext, room: Arc<Room>) -> Self {
        Self {
            limits: context.limits.clone(),
            telemetry: context.telemetry.clone(),
            codec: context.codec,
            room,
            // Neither sent nor looked at: identities are compared, not names.
            name: ServerName::IpAddress(
                std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into(),
            ),
        }
    }

    async fn set_up(&self, key: &PoolKey, source: &Source) -> Result<Tunnel, TunnelError> {
        let room = self.room.enter(&source.local, Need::OutboundTunnel);
        let place = room.map_err(|_| TunnelError::Limit)?;
        // For all steps together.
        let deadline = Instant::now() + self.limits.time.connect;
        let secured = match self.secure(key, source, deadline, None).await? {
            Some(secured) => Some(secured),
            None => {
                tracing::debug!(destination = %key.destination, "large segments vanish; sending small ones");
                let narrow = Some(NARROW_SEGMENT_BYTES);
                self.secure(key, source, deadline, narrow).await?
            }
        };
        let (secured, measured) =
            secured.ok_or(TunnelError::TimedOut("finish the TLS handshake"))?;
        let greeted = TunnelClient::handshake(secured, &self.limits, measured);
        let client = timeout_at(deadline, greeted)
            .await
            .map_err(|_| TunnelError::TimedOut("take the HTTP/2 preface"))??;
        let holds = source.local.holds.clone();
        client.follow_window(Rc::new(move || stream_window(&holds)));
        Ok(Tunnel {
            client,
            statistics: Rc::default(),
            _open: Rc::new((self.telemetry.tunnels.open(Direction::Outbound), place)),
        })
    }

    /// Dials and shakes hands. `None`, without `max_segment` only: the path swallows what we send.
    async fn secure(
        &self,
        key: &PoolKey,
        source: &Source,
        deadline: Instant,
        max_segment: Option<u32>,
    ) -> Result<Option<Secured>, TunnelError> {
        let options = DialOptions {
            source: key.source_address,
            max_segment,
        };
        let dialled = timeout_at(deadline, dial(&source.local, key.destination, options));
        let socket = dialled
            .await
            .map_err(|_| TunnelError::TimedOut("accept the connection"))?
            .inspect_err(|error| self.telemetry.limits.dial_failed(error))
            .map_err(|error| TunnelError::Dial(Arc::new(error)))?;
        // Its statistics are wanted for as long as streams use it; without it there are none.
        let measured = duplicate(socket.as_fd()).ok().map(Rc::new);
        let began = Instant::now();
        let handshake = deadline.min(began + self.limits.time.handshake);
        let config = source.certified.client(key.expected.clone());
        let shaken = connect_tls(self.codec, config, self.name.clone(), socket, handshake);
        let watched = measured.as_deref().filter(|_| max_segment.is_none());
        let secured = tokio::select! {
            shaken = shaken => shaken?,
            () = vanishes(watched) => return Ok(None),
        };
        self.telemetry
            .observe_handshake(Direction::Outbound, began.elapsed());
        Ok(Some((secured, measured)))
    }
}

/// TLS to a peer, and the socket below it for its statistics.
type Secured = (SecuredClient<TcpStream>, Option<Rc<OwnedFd>>);

/// Ready when what was sent on the socket is lost again and again.
async fn vanishes(socket: Option<&OwnedFd>) {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    loop {
        match unanswered_for(socket.as_fd()) {
            Ok(time) if time >= VANISHED_AFTER => return,
            Ok(_) => sleep(VANISHED_LOOK).await,
            // The handshake itself will tell.
            Err(_) => return std::future::pending().await,
        }
    }
}

impl Connector for Dialer {
    type Context = Source;
    type Tunnel = Tunnel;

    async fn connect(&self, key: &PoolKey, source: &Source) -> Result<Tunnel, TunnelError> {
        let result = Box::pin(self.set_up(key, source)).await;
        if let Err(error) = &result {
            let tunnels = &self.telemetry.tunnels;
            tunnels.failed(Direction::Outbound, error.failure());
            tracing::debug!(%error, destination = %key.destination, source = %key.source, "no tunnel");
        }
        result
    }

    fn note(&self, event: PoolEvent) {
        let pool = &self.telemetry.pool;
        match event {
            PoolEvent::Hit => pool.hits.inc(),
            PoolEvent::Miss => pool.misses.inc(),
            PoolEvent::Waits => pool.waiting.inc(),
            PoolEvent::WaitsNoMore => pool.waiting.dec(),
            PoolEvent::Evicted(count) => pool.evicted.inc_by(count as u64),
            PoolEvent::Full => self.telemetry.limits.reached(Limit::TunnelsPerKey),
        }
    }

    fn interchangeable(old: &Source, new: &Source) -> bool {
        Arc::ptr_eq(&old.certified, &new.certified)
    }
}

/// A tunnel in the pool.
#[derive(Debug, Clone)]
pub struct Tunnel {
    /// Its client end.
    pub client: TunnelClient,
    statistics: Rc<SharedStatistics>,
    _open: Rc<(TunnelGuard, Place)>,
}

impl Tunnel {
    /// What the kernel measured on its TCP connection, retransmissions since the last call.
    #[must_use]
    pub fn tcp_statistics(&self) -> Option<TcpStatistics> {
        let total = self.client.tcp_statistics()?;
        Some(self.statistics.since_last(total))
    }
}

impl Pooled for Tunnel {
    fn is_open(&self) -> bool {
        self.client.is_open()
    }

    fn peer_streams(&self) -> usize {
        self.client.peer_streams()
    }
}
