//! `SOCK_DESTROY` of the kernel's socket diagnostics: ends a TCP connection of somebody else's socket with RST.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::netns::Netns;

// include/uapi/linux/sock_diag.h, netlink.h, inet_diag.h
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST_ACK: u16 = 0x5;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
const INET_DIAG_NOCOOKIE: u32 = u32::MAX;

/// Resets the connection that `local` of this namespace has with `remote`. Gone already counts as done.
///
/// # Errors
/// Those of the kernel: `EOPNOTSUPP` without `CONFIG_INET_DIAG_DESTROY`, `EPERM` without `CAP_NET_ADMIN`.
pub fn destroy_tcp(netns: &Netns, local: SocketAddr, remote: SocketAddr) -> io::Result<()> {
    let socket = netns.run(|| Socket::new(NETLINK_SOCK_DIAG))??;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    socket.send(&request(local, remote), 0)?;
    let mut answer = Vec::with_capacity(4096);
    socket.recv(&mut answer, 0)?;
    match answer_code(&answer) {
        Some(0) => Ok(()),
        Some(code) if code == -libc::ENOENT => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "unexpected answer of sock_diag",
        )),
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let (local_ip, remote_ip) = (local.ip().to_canonical(), remote.ip().to_canonical());
    let family = if local_ip.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend(SOCK_DESTROY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for ip in [local_ip, remote_ip] {
        match ip {
            IpAddr::V4(v4) => {
                bytes.extend(v4.octets());
                bytes.extend([0; 12]);
            }
            IpAddr::V6(v6) => bytes.extend(v6.octets()),
        }
    }
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(INET_DIAG_NOCOOKIE.to_ne_bytes());
    bytes.extend(INET_DIAG_NOCOOKIE.to_ne_bytes());
    bytes
}

/// The errno of an `NLMSG_ERROR` message; 0 is the acknowledgement.
fn answer_code(answer: &[u8]) -> Option<i32> {
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
    use super::*;

    #[test]
    fn the_request_has_the_kernels_layout() {
        let bytes = request(([10, 0, 0, 1], 80).into(), ([10, 0, 0, 2], 4000).into());
        assert_eq!(bytes.len(), REQUEST_BYTES);
        assert_eq!(&bytes[24..28], &[0, 80, 15, 160], "ports, big-endian");
        assert_eq!(&bytes[28..32], &[10, 0, 0, 1]);
        assert_eq!(&bytes[44..48], &[10, 0, 0, 2]);
    }

    #[test]
    fn answers_that_are_no_errors_are_not_understood() {
        assert_eq!(answer_code(&[]), None);
        assert_eq!(answer_code(&[0; 64]), None);
        let mut acknowledged = [0; 36];
        acknowledged[4] = 2;
        assert_eq!(answer_code(&acknowledged), Some(0));
    }
}
