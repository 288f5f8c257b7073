//! How a worker's pool makes tunnels: dial from the workload's namespace, TLS with its certificate, HTTP/2.

use std::{os::fd::AsFd, rc::Rc, sync::Arc};

use rustls::pki_types::ServerName;
use tokio::time::{Instant, timeout_at};

use super::{
    ProxyContext,
    limits::Limits,
    memory::stream_window,
    pool::{Connector, PoolEvent, PoolKey, Pooled},
    room::{Need, Place, Room},
    tunnel::{TunnelClient, TunnelCodec, TunnelError, transport::connect_tls},
};
use crate::{
    capture::{DialOptions, LocalWorkload, dial},
    identity::Certified,
    sys::{
        netns::duplicate,
        socket::{SharedStatistics, TcpStatistics},
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
        let dialled = timeout_at(
            deadline,
            dial(
                &source.local,
                key.destination,
                DialOptions {
                    source: key.source_address,
                },
            ),
        );
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
        let secured = connect_tls(self.codec, config, self.name.clone(), socket, handshake).await?;
        self.telemetry
            .observe_handshake(Direction::Outbound, began.elapsed());
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
