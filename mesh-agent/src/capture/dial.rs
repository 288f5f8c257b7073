//! Sockets inside a workload's namespace: listeners, and connections that the agent makes there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    os::fd::AsFd,
    time::Duration,
};

use mesh_ebpf::CAPTURE_MARK;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{
    DialOptions, Listeners, LocalWorkload, OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT,
    error::CaptureError,
};
use crate::sys::{netns::Netns, socket};

/// Connections that wait to be accepted, per listener. The kernel caps it at `net.core.somaxconn` (4096 by default).
const LISTEN_BACKLOG: i32 = 4096;

/// How the agent's sockets find out that their peer has gone while nothing is on its way: what is, TCP sends again
/// until the kernel's own limit (`tcp_retries2`), as without a mesh. `TCP_USER_TIMEOUT` would bound that too, but it
/// also ends connections whose reader is alive and only reads nothing (net/ipv4/tcp_timer.c, `tcp_probe_timer`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe, whole seconds.
    pub idle: Duration,
    /// Between probes, whole seconds.
    pub interval: Duration,
    /// Probes without an answer that end the connection; at most 127.
    pub probes: u32,
}

impl Default for Keepalive {
    /// Under the 350 s after which common load balancers and NATs forget; a dead peer is found within 315 s.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(180),
            interval: Duration::from_secs(15),
            probes: 9,
        }
    }
}

/// Ports that applications see beside their client's address. The client's own port is in use in the same namespace:
/// by the socket that the agent accepted (plaintext), or by the application's (same-node flows). A SYN of ours with
/// that port would arrive at that live connection instead of the listener. So these lie outside what Linux gives its
/// clients (`ip_local_port_range`, 32768–60999).
const SHOWN_PORTS: RangeInclusive<u16> = 61_000..=65_535;
/// Ports that are tried before the kernel chooses: both are taken already only if this client has thousands of
/// connections, or of the remains of connections, to this application. Each try costs a socket.
const SHOWN_PORT_ATTEMPTS: usize = 2;

/// See [`super::dial`].
pub(super) async fn dial(
    workload: &LocalWorkload,
    destination: SocketAddr,
    options: DialOptions,
) -> io::Result<TcpStream> {
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let source = options
        .source
        .map(|ip| ip.to_canonical())
        .filter(|ip| *ip != destination.ip() && ip.is_ipv4() == destination.is_ipv4());
    let Some(source) = source else {
        return connect(new_socket(workload, destination, options)?, destination).await;
    };
    for _ in 0..SHOWN_PORT_ATTEMPTS {
        let shown = SocketAddr::new(source, rand::random_range(SHOWN_PORTS));
        match connect_as(workload, shown, destination, options).await {
            Err(error) if is_taken(&error) => {}
            result => return result,
        }
    }
    connect_as(workload, SocketAddr::new(source, 0), destination, options).await
}

/// Shows `source`, which is not an address of this namespace. Port 0 is the kernel's choice, made at connect(2), so
/// that ports run out per destination only.
async fn connect_as(
    workload: &LocalWorkload,
    source: SocketAddr,
    destination: SocketAddr,
    options: DialOptions,
) -> io::Result<TcpStream> {
    let socket = new_socket(workload, destination, options)?;
    socket::set_transparent(socket.as_fd(), source.is_ipv6())?;
    socket::set_mark(socket.as_fd(), CAPTURE_MARK)?;
    if source.port() == 0 {
        socket::set_bind_address_no_port(socket.as_fd())?;
    } else {
        // The same port towards another destination is no conflict.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&source.into())?;
    connect(socket, destination).await
}

/// Another connection has this pair of addresses, or something listens on the port.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}

fn new_socket(
    workload: &LocalWorkload,
    destination: SocketAddr,
    options: DialOptions,
) -> io::Result<Socket> {
    let socket = workload.netns.run(|| {
        Socket::new(
            Domain::for_address(destination),
            Type::STREAM.nonblocking(),
            None,
        )
    })??;
    set_common_options(&socket, workload.keepalive)?;
    if let Some(bytes) = options.max_segment {
        // Before connect(2) it is also what the peer is told (tcp(7), TCP_MAXSEG).
        socket.set_tcp_mss(bytes)?;
    }
    Ok(socket)
}

async fn connect(socket: Socket, destination: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into())
        .connect(destination)
        .await
}

/// Applied to every connection of the agent, accepted ones included.
fn set_common_options(socket: &Socket, keepalive: Keepalive) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(keepalive.idle)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.probes),
    )
}

/// What accepted sockets inherit from their listener, `TCP_NODELAY` and keepalive among it (net/ipv4/tcp_minisocks.c,
/// `tcp_create_openreq_child`): a client that vanished must not be held for ever.
fn set_listener_options(socket: &Socket, keepalive: Keepalive) -> io::Result<()> {
    socket.set_reuse_address(true)?;
    set_common_options(socket, keepalive)
}

/// Gives listeners of another agent our keepalive.
pub(super) fn adopt(listeners: &Listeners, keepalive: Keepalive) -> io::Result<()> {
    for listener in [&listeners.outbound, &listeners.plaintext, &listeners.tunnel] {
        set_common_options(&SockRef::from(listener), keepalive)?;
    }
    Ok(())
}

/// Opens the three listeners of a workload.
pub(super) fn listen(netns: &Netns, keepalive: Keepalive) -> Result<Listeners, CaptureError> {
    Ok(Listeners {
        outbound: open(netns, OUTBOUND_PORT, keepalive)?,
        plaintext: open(netns, PLAINTEXT_PORT, keepalive)?,
        tunnel: open(netns, TUNNEL_PORT, keepalive)?,
    })
}

/// Opens those anew that do not listen any more (`SOCK_DESTROY` ends listeners, too). Returns whether any was.
pub(super) fn revive(
    netns: &Netns,
    listeners: Listeners,
    keepalive: Keepalive,
) -> Result<(Listeners, bool), CaptureError> {
    let mut is_new = false;
    let mut revive = |listener: TcpListener, port| {
        if getsockopt(&listener, AcceptConn) == Ok(true) {
            return Ok(listener);
        }
        // It has the port still, which two sockets may have while only one listens (`SO_REUSEADDR`, socket(7)).
        is_new = true;
        open(netns, port, keepalive)
    };
    let listeners = Listeners {
        outbound: revive(listeners.outbound, OUTBOUND_PORT)?,
        plaintext: revive(listeners.plaintext, PLAINTEXT_PORT)?,
        tunnel: revive(listeners.tunnel, TUNNEL_PORT)?,
    };
    Ok((listeners, is_new))
}

fn open(netns: &Netns, port: u16, keepalive: Keepalive) -> Result<TcpListener, CaptureError> {
    let opened = netns
        .run(|| open_listener(port, keepalive))
        .and_then(|inner| inner);
    opened.map_err(|source| CaptureError::Listen {
        port,
        path: netns.path().to_owned(),
        source,
    })
}

/// Dual-stack where the namespace has IPv6: one listener then takes the SYNs of both families, which sk_lookup
/// allows for sockets that are not IPv6-only (net/core/filter.c, `bpf_sk_lookup_assign`).
fn open_listener(port: u16, keepalive: Keepalive) -> io::Result<TcpListener> {
    let has_ipv6 = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
    let (socket, any) = match has_ipv6 {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
        Err(_) => (
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?,
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        ),
    };
    set_listener_options(&socket, keepalive)?;
    // Captured SYNs have destinations that are not this host's.
    socket::set_transparent(socket.as_fd(), any.is_ipv6())?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(LISTEN_BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_sockets_probe_whether_their_peer_is_there() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("socket");
        let keepalive = Keepalive {
            idle: Duration::from_secs(7),
            interval: Duration::from_secs(3),
            probes: 5,
        };
        set_listener_options(&socket, keepalive).expect("allowed");
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        socket.bind(&loopback.into()).expect("free port");
        socket.listen(1).expect("bound");
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().expect("bound");
        let _client = std::net::TcpStream::connect(address).expect("listens");
        let (accepted, _) = listener.accept().expect("one waits");
        let accepted = SockRef::from(&accepted);
        assert!(accepted.keepalive().expect("open"));
        let found = Keepalive {
            idle: accepted.tcp_keepalive_time().expect("open"),
            interval: accepted.tcp_keepalive_interval().expect("open"),
            probes: accepted.tcp_keepalive_retries().expect("open"),
        };
        assert_eq!(found, keepalive);
        assert!(accepted.tcp_nodelay().expect("open"));
    }
}
