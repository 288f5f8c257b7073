//! Socket options that `socket2` and `nix` do not name.

use std::{
    cell::Cell,
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use super::netns::NetnsCookie;

/// `IPV6_TRANSPARENT` (include/uapi/linux/in6.h).
const IPV6_TRANSPARENT: libc::c_int = 75;
/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h), Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// `IP_BIND_ADDRESS_NO_PORT` (include/uapi/linux/in.h).
const IP_BIND_ADDRESS_NO_PORT: libc::c_int = 24;

/// What the kernel knows of a TCP connection (`struct tcp_info`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpStatistics {
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Segments sent again since the connection began.
    pub retransmits: u32,
}

/// Tells the users of a shared connection apart what it measured: each segment sent again counts for one of them, the
/// first to ask afterwards.
#[derive(Debug, Default)]
pub struct SharedStatistics {
    told: Cell<u32>,
}

impl SharedStatistics {
    /// `total` with the retransmissions that nobody was told of yet.
    #[must_use]
    pub fn since_last(&self, total: TcpStatistics) -> TcpStatistics {
        let before = self.told.replace(self.told.get().max(total.retransmits));
        TcpStatistics {
            retransmits: total.retransmits.saturating_sub(before),
            ..total
        }
    }
}

/// Cookie of the namespace that the socket belongs to.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<NetnsCookie> {
    get::<u64>(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE).map(NetnsCookie)
}

/// Lets the socket use addresses that are not its host's (`IP_TRANSPARENT`); needs `CAP_NET_ADMIN` in its namespace.
///
/// # Errors
/// `EPERM` without the capability.
pub fn set_transparent(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set(socket, libc::SOL_IPV6, IPV6_TRANSPARENT, 1)
    } else {
        set(socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1)
    }
}

/// Leaves the choice of the source port to `connect(2)`, so that it only has to be unique per 4-tuple.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 4.2.
pub fn set_bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Marks the packets of a socket.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn set_mark(socket: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// Makes `close(2)` send RST and drop unsent data (`SO_LINGER` with a zero timeout).
///
/// # Errors
/// Those of `setsockopt(2)`.
pub fn set_reset_on_close(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_linger(socket, true)
}

/// Undoes [`set_reset_on_close`]: `close(2)` sends what is unsent, then FIN.
///
/// # Errors
/// Those of `setsockopt(2)`.
pub fn set_finish_on_close(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_linger(socket, false)
}

fn set_linger(socket: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: on.into(),
        l_linger: 0,
    };
    set(socket, libc::SOL_SOCKET, libc::SO_LINGER, linger)
}

/// Round-trip time and retransmissions of a TCP socket.
///
/// # Errors
/// Those of `getsockopt(2)`.
pub fn tcp_statistics(socket: BorrowedFd<'_>) -> io::Result<TcpStatistics> {
    let info = get::<libc::tcp_info>(socket, libc::SOL_TCP, libc::TCP_INFO)?;
    Ok(TcpStatistics {
        rtt_us: info.tcpi_rtt,
        retransmits: info.tcpi_total_retrans,
    })
}

/// For how long the peer of a TCP socket has acknowledged nothing although something is on its way to it.
///
/// # Errors
/// Those of `getsockopt(2)`.
pub fn unanswered_for(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    let info = get::<libc::tcp_info>(socket, libc::SOL_TCP, libc::TCP_INFO)?;
    Ok(match info.tcpi_unacked {
        0 => Duration::ZERO,
        _ => Duration::from_millis(info.tcpi_last_ack_recv.into()),
    })
}

/// Bytes that a TCP socket was given and its peer has not acknowledged (`SIOCOUTQ`); a FIN counts as one.
///
/// # Errors
/// Those of `ioctl(2)`.
pub fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, the same number as TIOCOUTQ, writes one int, and the pointer is to one.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.max(0).cast_unsigned())
}

fn set<T: Copy>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: T,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `T` must be plain old data for which all zeroes is a value; the kernel may fill it only in part.
fn get<T: Copy>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `value`; the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the callers use integers and `tcp_info`, for which zeroes, overwritten in part, are valid.
    Ok(unsafe { value.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_sent_again_counts_for_one_user_of_a_shared_connection() {
        let shared = SharedStatistics::default();
        let ask = |retransmits| {
            let total = TcpStatistics {
                rtt_us: 70,
                retransmits,
            };
            shared.since_last(total)
        };
        let told: Vec<u32> = [3, 3, 5, 4, 6].map(|total| ask(total).retransmits).to_vec();
        assert_eq!(told, [3, 0, 2, 0, 1]);
        assert_eq!(ask(6).rtt_us, 70, "the round-trip time is everybody's");
    }
}
