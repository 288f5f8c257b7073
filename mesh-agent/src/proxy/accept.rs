//! Accepting: from a listener to the worker that will carry the connection.

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::yield_now,
    time::sleep,
};

use super::{
    inbound,
    limits::{ACCEPT_BACKOFF, ACCEPT_BATCH},
    outbound, relay,
    room::{Need, Refused},
    served::Served,
    unmapped,
    worker::{Admission, Worker},
};
use crate::telemetry::{CloseReason, ConnectionInfo, Direction, Limit, Party, Security};

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Captured connections of the workload.
    Outbound,
    /// Captured connections to the workload.
    Plaintext,
    /// Tunnels to the workload.
    Tunnel,
}

impl Kind {
    fn need(self) -> Need {
        match self {
            Self::Outbound | Self::Plaintext => Need::Connection,
            Self::Tunnel => Need::InboundTunnel,
        }
    }
}

/// A socket on its way to another worker; it belongs to no runtime.
#[derive(Debug)]
pub(super) struct Accepted {
    socket: std::net::TcpStream,
    peer: SocketAddr,
    kind: Kind,
    admission: Admission,
}

impl Accepted {
    /// A socket that `admission` has room for.
    pub fn new(
        socket: std::net::TcpStream,
        peer: SocketAddr,
        kind: Kind,
        admission: Admission,
    ) -> Self {
        Self {
            socket,
            peer,
            kind,
            admission,
        }
    }
}

/// Accepts on a task of its own until the workload is no longer served.
pub(super) fn listen(
    worker: &Rc<Worker>,
    listener: std::net::TcpListener,
    kind: Kind,
    served: Arc<Served>,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => Rc::new(listener),
        Err(error) => {
            tracing::error!(%error, ?kind, workload = %served.local.name, "cannot watch a listener");
            return;
        }
    };
    let mut listeners = worker.listeners.borrow_mut();
    listeners.push((served.id, kind, listener.clone()));
    drop(listeners);
    let own = worker.clone();
    worker.spawn(&served.local.clone(), async move {
        accept_until_stopped(&own, &listener, kind, &served).await;
        let mut listeners = own.listeners.borrow_mut();
        listeners.retain(|(id, other, _)| (*id, *other) != (served.id, kind));
    });
}

/// Errors of the system are waited out, never spun on.
async fn accept_until_stopped(
    worker: &Rc<Worker>,
    listener: &TcpListener,
    kind: Kind,
    served: &Arc<Served>,
) {
    let mut stopped = pin!(served.stop.cancelled());
    for accepted_before in 1_usize.. {
        if accepted_before.is_multiple_of(ACCEPT_BATCH) {
            yield_now().await;
        }
        let next = tokio::select! {
            // First: once another agent accepts, what waits is for that one, which will be there longer.
            biased;
            () = &mut stopped => return,
            next = listener.accept() => next,
        };
        match next {
            Ok((socket, peer)) => accepted(worker, served, kind, socket, unmapped(peer)),
            Err(error) if belongs_to_one_connection(&error) => {}
            // It does not listen (any more), accept(2).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::error!(?kind, workload = %served.local.name, "a listener was ended behind the agent's back");
                served.lost_listener.store(true, Ordering::Release);
                return stopped.await;
            }
            Err(error) => {
                worker.context.telemetry.limits.reached(Limit::Accept);
                if let Some(held_back) = worker.accept_failures.line(Instant::now()) {
                    tracing::warn!(%error, ?kind, workload = %served.local.name, held_back, "cannot accept; pausing");
                }
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// accept(2): errors of the new connection, not of the system; the next one may be fine.
fn belongs_to_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}

fn accepted(
    worker: &Rc<Worker>,
    served: &Arc<Served>,
    kind: Kind,
    socket: TcpStream,
    peer: SocketAddr,
) {
    let index = worker.shared.worker_for(worker.index);
    let admission = match worker.shared.admit(index, served, kind.need()) {
        Ok(admission) => admission,
        Err(refused) => return refuse(worker, served, kind, socket, peer, refused),
    };
    if index == worker.index {
        return start(worker, kind, socket, peer, admission);
    }
    let socket = match socket.into_std() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::debug!(%error, ?kind, "accepted socket cannot be handed over");
            return;
        }
    };
    let accepted = Accepted::new(socket, peer, kind, admission);
    let handed_over = worker.shared.hand_over(index, accepted);
    if let Err(accepted) = handed_over {
        adopt(worker, *accepted);
    }
}

/// Resets a connection for which there is no room, and says so in the access log.
pub(super) fn refuse(
    worker: &Worker,
    served: &Served,
    kind: Kind,
    socket: TcpStream,
    peer: SocketAddr,
    refused: Refused,
) {
    let own = socket.local_addr().ok().map(unmapped);
    relay::reset(socket);
    let workload = served.local.workload.load_full();
    let mut local = Party {
        identity: workload.as_ref().map(|known| known.identity.clone()),
        workload,
        address: own,
    };
    let mut remote = Party {
        address: Some(peer),
        ..Party::default()
    };
    if kind == Kind::Outbound {
        std::mem::swap(&mut local.address, &mut remote.address);
    }
    let (direction, source, destination) = match kind {
        Kind::Outbound => (Direction::Outbound, local, remote),
        Kind::Plaintext | Kind::Tunnel => (Direction::Inbound, remote, local),
    };
    let info = ConnectionInfo {
        direction,
        source,
        destination,
        service: None,
        security: match kind {
            Kind::Tunnel => Security::MutualTls,
            Kind::Outbound | Kind::Plaintext => Security::None,
        },
    };
    let telemetry = &worker.context.telemetry;
    telemetry.failed(&info, CloseReason::Limit, &refused);
}

/// Begins to carry a connection that was accepted elsewhere.
pub(super) fn adopt(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted {
        socket,
        peer,
        kind,
        admission,
    } = accepted;
    match TcpStream::from_std(socket) {
        Ok(socket) => start(worker, kind, socket, peer, admission),
        Err(error) => tracing::debug!(%error, ?kind, "handed over socket cannot be used"),
    }
}

fn start(
    worker: &Rc<Worker>,
    kind: Kind,
    socket: TcpStream,
    peer: SocketAddr,
    admission: Admission,
) {
    let own = worker.clone();
    let local = admission.served().local.clone();
    match kind {
        Kind::Outbound => worker.spawn(&local, outbound::serve(own, socket, peer, admission)),
        Kind::Plaintext => {
            worker.spawn(
                &local,
                inbound::serve_plaintext(own, socket, peer, admission),
            );
        }
        Kind::Tunnel => worker.spawn(&local, inbound::serve_tunnel(own, socket, peer, admission)),
    }
}
