//! Netlink without waiting: the kernel handles a request of rtnetlink within `send(2)` and has queued its answer when
//! that returns (net/netlink/af_netlink.c, `netlink_unicast_kernel`), so one socket, used and closed, will do.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// The kernel's own address (netlink(7)).
const KERNEL: (u32, u32) = (0, 0);
/// An acknowledgement repeats the header of its request, an error all of it, and perhaps says why.
const ANSWER_BYTES: usize = 4096;

/// Adds what is not there yet, in the network namespace of the calling thread. Returns whether anything was missing.
///
/// # Errors
/// Those of the socket, or the first other refusal of the kernel.
pub(super) fn add(requests: impl Iterator<Item = RouteNetlinkMessage>) -> io::Result<bool> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    let mut was_missing = false;
    for request in requests {
        match ask(&socket, request) {
            Ok(()) => was_missing = true,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(was_missing)
}

fn ask(socket: &Socket, request: RouteNetlinkMessage) -> io::Result<()> {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(KERNEL.0, KERNEL.1), 0)?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES);
    // It is there already; were it not, waiting would be of no use.
    socket.recv_from(&mut answer, libc::MSG_DONTWAIT)?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    match answer.payload {
        NetlinkPayload::Error(error) => match error.code {
            None => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(code.get().saturating_abs())),
        },
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "an answer that is no acknowledgement",
        )),
    }
}
