//! The kernel's socket diagnostics: whether a TCP connection is there, and `SOCK_DESTROY`, which ends one of somebody
//! else's socket with RST.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::netns::Netns;

// include/uapi/linux/sock_diag.h, netlink.h, inet_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_REQUEST_ACK: u16 = 0x5;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// `idiag_state` of `struct inet_diag_msg`, and the parts of its `id` (`struct inet_diag_sockid`).
const STATE_AT: usize = HEADER_BYTES + 1;
const PORTS_AT: usize = HEADER_BYTES + 4;
const COOKIE_AT: usize = PORTS_AT + 4 + 32 + 4;
// include/net/tcp_states.h
const TCP_LISTEN: u8 = 10;

/// `idiag_cookie`: names one socket for good, whatever tuple it has.
type SocketCookie = [u8; 8];
/// `INET_DIAG_NOCOOKIE`, twice: whichever socket has the tuple.
const ANY_SOCKET: SocketCookie = [0xff; 8];

/// Resets the connection that `local` of this namespace has with `remote`. Gone already counts as done.
///
/// The kernel answers for a tuple without a connection with the listener that would take its SYN
/// (net/ipv4/inet_diag.c, `inet_diag_find_one_icsk`), and to destroy that closes it for good. So the socket is looked
/// at first, and destroyed by its cookie.
///
/// # Errors
/// Those of the kernel: `EOPNOTSUPP` without `CONFIG_INET_DIAG_DESTROY`, `EPERM` without `CAP_NET_ADMIN`.
pub fn destroy_tcp(netns: &Netns, local: SocketAddr, remote: SocketAddr) -> io::Result<()> {
    let socket = netns.run(|| Socket::new(NETLINK_SOCK_DIAG))??;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    let ends = Ends { local, remote };
    let query = ends.request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, ANY_SOCKET);
    let Some(cookie) = ends.connection(&ask(&socket, &query)?)? else {
        return Ok(());
    };
    let destroy = ends.request(SOCK_DESTROY, NLM_F_REQUEST_ACK, cookie);
    match error_code(&ask(&socket, &destroy)?) {
        Some(0) => Ok(()),
        Some(code) if code == -libc::ENOENT => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(not_understood()),
    }
}

/// Whether each of these connections (local end, remote end) has a socket in the namespace, in whatever state.
///
/// # Errors
/// Those of the kernel: `EPERM`, or no sock_diag at all.
pub fn have_sockets(
    netns: &Netns,
    connections: impl IntoIterator<Item = (SocketAddr, SocketAddr)>,
) -> io::Result<Vec<bool>> {
    let socket = netns.run(|| Socket::new(NETLINK_SOCK_DIAG))??;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    let has_socket = |(local, remote)| {
        let ends = Ends { local, remote };
        let query = ends.request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, ANY_SOCKET);
        Ok(ends.connection(&ask(&socket, &query)?)?.is_some())
    };
    connections.into_iter().map(has_socket).collect()
}

fn ask(socket: &Socket, request: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(request, 0)?;
    let mut answer = Vec::with_capacity(4096);
    socket.recv(&mut answer, 0)?;
    Ok(answer)
}

fn not_understood() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unexpected answer of sock_diag")
}

/// A connection as one of its sockets has it.
struct Ends {
    local: SocketAddr,
    remote: SocketAddr,
}

impl Ends {
    /// `struct nlmsghdr` and `struct inet_diag_req_v2`.
    fn request(&self, kind: u16, flags: u16, cookie: SocketCookie) -> Vec<u8> {
        let family = if self.local.ip().to_canonical().is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let mut bytes = Vec::with_capacity(REQUEST_BYTES);
        bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
        bytes.extend(u32::MAX.to_ne_bytes());
        bytes.extend(self.ports());
        for end in [self.local, self.remote] {
            match end.ip().to_canonical() {
                IpAddr::V4(v4) => {
                    bytes.extend(v4.octets());
                    bytes.extend([0; 12]);
                }
                IpAddr::V6(v6) => bytes.extend(v6.octets()),
            }
        }
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(cookie);
        bytes
    }

    fn ports(&self) -> [u8; 4] {
        let ([a, b], [c, d]) = (
            self.local.port().to_be_bytes(),
            self.remote.port().to_be_bytes(),
        );
        [a, b, c, d]
    }

    /// Cookie of the connection's socket; none if there is none any more. A listener's remote port is 0.
    fn connection(&self, answer: &[u8]) -> io::Result<Option<SocketCookie>> {
        match error_code(answer) {
            Some(code) if code == -libc::ENOENT => return Ok(None),
            Some(code) => return Err(io::Error::from_raw_os_error(-code)),
            None => {}
        }
        let part = |at: usize, length: usize| answer.get(at..at + length);
        let kind = part(4, 2).ok_or_else(not_understood)?;
        let state = part(STATE_AT, 1).ok_or_else(not_understood)?;
        let ports = part(PORTS_AT, 4).ok_or_else(not_understood)?;
        let cookie = part(COOKIE_AT, 8).ok_or_else(not_understood)?;
        if kind != SOCK_DIAG_BY_FAMILY.to_ne_bytes() {
            return Err(not_understood());
        }
        if state == [TCP_LISTEN] || ports != self.ports() {
            return Ok(None);
        }
        cookie.try_into().map(Some).map_err(|_| not_understood())
    }
}

/// The errno of an `NLMSG_ERROR` message, negative; 0 is the acknowledgement.
fn error_code(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    if kind != NLMSG_ERROR {
        return None;
    }
    Some(i32::from_ne_bytes(
        answer
            .get(HEADER_BYTES..HEADER_BYTES + 4)?
            .try_into()
            .ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
        path::Path,
    };

    use super::*;

    fn ends() -> Ends {
        Ends {
            local: ([10, 0, 0, 1], 80).into(),
            remote: ([10, 0, 0, 2], 4000).into(),
        }
    }

    fn own_namespace() -> Netns {
        Netns::open(Path::new("/proc/self/ns/net")).expect("the own namespace")
    }

    #[test]
    fn the_request_has_the_kernels_layout() {
        let bytes = ends().request(SOCK_DESTROY, NLM_F_REQUEST_ACK, [7; 8]);
        assert_eq!(bytes.len(), REQUEST_BYTES);
        assert_eq!(&bytes[24..28], &[0, 80, 15, 160], "ports, big-endian");
        assert_eq!(&bytes[28..32], &[10, 0, 0, 1]);
        assert_eq!(&bytes[44..48], &[10, 0, 0, 2]);
        assert_eq!(&bytes[64..72], &[7; 8], "the cookie");
    }

    #[test]
    fn answers_that_are_no_errors_are_not_understood() {
        assert_eq!(error_code(&[]), None);
        assert_eq!(error_code(&[0; 64]), None);
        let mut acknowledged = [0; 36];
        acknowledged[4] = 2;
        assert_eq!(error_code(&acknowledged), Some(0));
        for short in [&[][..], &[0; 64], &[0; 200]] {
            assert!(ends().connection(short).is_err());
        }
    }

    /// What the kernel finds for a tuple whose connection has gone.
    #[test]
    fn a_listener_is_never_ended() {
        let netns = own_namespace();
        for ip in [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ] {
            let listener = TcpListener::bind((ip, 0)).expect("a listener");
            let local = listener.local_addr().expect("its address");
            destroy_tcp(&netns, local, SocketAddr::new(ip, 9)).expect("nothing to end");
            TcpStream::connect(local).expect("the listener listens");
        }
    }

    #[test]
    fn a_connection_is_ended_and_its_listener_goes_on() {
        let netns = own_namespace();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let local = listener.local_addr().expect("its address");
        let mut client = TcpStream::connect(local).expect("connects");
        let (_server, remote) = listener.accept().expect("accepts");
        if !nix::unistd::geteuid().is_root() {
            destroy_tcp(&netns, local, remote).expect_err("that takes CAP_NET_ADMIN");
            return;
        }
        // Twice: the second time it is gone, and only the listener is left.
        for _ in 0..2 {
            destroy_tcp(&netns, local, remote).expect("ends");
        }
        let error = client.read(&mut [0]).expect_err("reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        TcpStream::connect(local).expect("the listener listens");
    }
}
