//! The socket between two agents: whole messages with descriptors, from root only, each within a deadline.

use std::{
    fs::{self, Permissions},
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_api::handover::{MESSAGE_MAX_BYTES, MESSAGE_MAX_DESCRIPTORS, SOCKET_NAME};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
        SocketType, accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{io::unix::AsyncFd, time::timeout};

use super::HandoverError;
use crate::sys;

/// Successors that wait to be heard: one is served at a time, and a second one is a mistake.
const BACKLOG: i32 = 4;
const SOCKET_MODE: u32 = 0o600;
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Where successors ask. The file goes with it, unless it was handed over.
#[derive(Debug)]
pub(in crate::lifecycle) struct Door {
    socket: AsyncFd<OwnedFd>,
    file: Option<PathBuf>,
}

impl Door {
    /// Makes the socket. The run directory's lock must be held: a socket that is there is a dead agent's.
    pub(in crate::lifecycle) fn open(run_dir: &Path) -> Result<Self, HandoverError> {
        let path = run_dir.join(SOCKET_NAME);
        let failed = |source: io::Error| HandoverError::Socket {
            path: path.clone(),
            source,
        };
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(failed(io::ErrorKind::AlreadyExists.into()));
            }
            Ok(_) => fs::remove_file(&path).map_err(failed)?,
            Err(_) => {}
        }
        let open = || -> io::Result<OwnedFd> {
            let socket = new_socket()?;
            bind(&socket, &SocketAddrUnix::new(&path)?)?;
            fs::set_permissions(&path, Permissions::from_mode(SOCKET_MODE))?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket = open().map_err(failed)?;
        let mut door = Self::inherited(socket)?;
        door.claim(run_dir);
        Ok(door)
    }

    /// A listener that was handed over. The file is not ours yet.
    pub(super) fn inherited(socket: OwnedFd) -> Result<Self, HandoverError> {
        Ok(Self {
            socket: sys::watch_fd(socket)?,
            file: None,
        })
    }

    /// The file is this agent's: it goes when this is dropped.
    pub(in crate::lifecycle) fn claim(&mut self, run_dir: &Path) {
        self.file = Some(run_dir.join(SOCKET_NAME));
    }

    /// The file is another agent's by now.
    pub(super) fn leave(&mut self) {
        self.file = None;
    }

    /// The next successor; who is not root is turned away.
    pub(super) async fn accept(&self) -> io::Result<Channel> {
        loop {
            let mut guard = self.socket.readable().await?;
            let accepted =
                guard.try_io(|socket| accept_with(socket.get_ref(), FLAGS).map_err(Into::into));
            let Ok(accepted) = accepted else { continue };
            let accepted = accepted?;
            let peer = getsockopt(&accepted, PeerCredentials)?;
            if peer.uid() == 0 {
                return Channel::new(accepted, peer.pid());
            }
            tracing::warn!(uid = peer.uid(), "refused on the hand-over socket");
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // One that stays is only stale: the next start replaces it.
            let _ = fs::remove_file(file);
        }
    }
}

/// One conversation.
#[derive(Debug)]
pub(super) struct Channel {
    socket: AsyncFd<OwnedFd>,
    peer_pid: i32,
}

impl Channel {
    fn new(socket: OwnedFd, peer_pid: i32) -> io::Result<Self> {
        Ok(Self {
            socket: sys::watch_fd(socket)?,
            peer_pid,
        })
    }

    /// Who has connected, or, on the side that has, who once made the socket; 0 is a process of another PID namespace.
    pub(super) fn peer_pid(&self) -> i32 {
        self.peer_pid
    }

    /// Says one thing.
    pub(super) async fn send<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), HandoverError> {
        let text = serde_json::to_vec(message).map_err(io::Error::from)?;
        if text.len() > MESSAGE_MAX_BYTES || descriptors.len() > MESSAGE_MAX_DESCRIPTORS {
            return Err(HandoverError::Malformed(format!(
                "a message of {} bytes and {} descriptors",
                text.len(),
                descriptors.len()
            )));
        }
        let sending = async {
            loop {
                let mut guard = self.socket.writable().await?;
                if let Ok(sent) = guard.try_io(|socket| send(socket.get_ref(), &text, descriptors))
                {
                    return sent;
                }
            }
        };
        timeout(limit, sending)
            .await
            .map_err(|_| HandoverError::Silent(limit))?
            .map_err(gone_or_failed)
    }

    /// Hears one thing. [`HandoverError::Gone`] when the other end has closed.
    pub(super) async fn receive<M: DeserializeOwned>(
        &self,
        limit: Duration,
    ) -> Result<(M, Vec<OwnedFd>), HandoverError> {
        let receiving = async {
            loop {
                let mut guard = self.socket.readable().await?;
                if let Ok(received) = guard.try_io(|socket| receive(socket.get_ref())) {
                    return received;
                }
            }
        };
        let (text, descriptors) = timeout(limit, receiving)
            .await
            .map_err(|_| HandoverError::Silent(limit))?
            .map_err(gone_or_failed)?;
        if text.is_empty() {
            return Err(HandoverError::Gone);
        }
        let message = serde_json::from_slice(&text)
            .map_err(|error| HandoverError::Malformed(error.to_string()))?;
        Ok((message, descriptors))
    }
}

/// An end that has closed shows itself on sending, and on receiving when it had not heard everything (unix(7)).
fn gone_or_failed(error: io::Error) -> HandoverError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => HandoverError::Gone,
        _ => HandoverError::Io(error),
    }
}

/// Connects to the agent that serves `run_dir`; `None` when none does.
pub(super) fn knock(run_dir: &Path) -> Result<Option<OwnedFd>, HandoverError> {
    let path: PathBuf = run_dir.join(SOCKET_NAME);
    let failed = |source| HandoverError::Socket {
        path: path.clone(),
        source,
    };
    let socket = new_socket().map_err(failed)?;
    let address = SocketAddrUnix::new(&path).map_err(|errno| failed(io::Error::from(errno)))?;
    match connect(&socket, &address).map_err(io::Error::from) {
        Ok(()) => Ok(Some(socket)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(failed(error)),
    }
}

/// The successor's end; needs a runtime.
pub(super) fn channel(socket: OwnedFd) -> Result<Channel, HandoverError> {
    let peer = getsockopt(&socket, PeerCredentials).map_err(io::Error::from)?;
    Ok(Channel::new(socket, peer.pid())?)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        FLAGS,
        None,
    )?)
}

fn send(socket: &OwnedFd, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // A message of this socket type is sent whole or not at all (unix(7)).
    sendmsg(socket, &[IoSlice::new(text)], &mut control, flags)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = vec![0; MESSAGE_MAX_BYTES];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut text)],
        &mut control,
        flags,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            descriptors.extend(some);
        }
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        // CTRUNC is also what the kernel says when this process is out of descriptors (net/core/scm.c).
        return Err(io::Error::other(
            "a message was cut short; are file descriptors exhausted?",
        ));
    }
    text.truncate(received.bytes);
    Ok((text, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd as _, time::Instant};

    use mesh_api::handover::{FromPredecessor, FromSuccessor};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn pair(dir: &Path) -> (Channel, Channel) {
        let door = Door::open(dir).expect("a socket");
        let successor = knock(dir).expect("no error").expect("somebody is there");
        let successor = channel(successor).expect("watched");
        (successor, door.accept().await.expect("root"))
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_message_and_belong_to_the_receiver() {
        let dir = tempfile::tempdir().expect("a folder");
        let (successor, predecessor) = pair(dir.path()).await;
        let file = tempfile::tempfile().expect("a file");
        let all = vec![file.as_fd(); MESSAGE_MAX_DESCRIPTORS];
        let sent = predecessor.send(&FromPredecessor::Complete, &all, SOON);
        sent.await.expect("fits");
        let (message, descriptors): (FromPredecessor, _) =
            successor.receive(SOON).await.expect("arrives");
        assert_eq!(message, FromPredecessor::Complete);
        assert_eq!(descriptors.len(), MESSAGE_MAX_DESCRIPTORS);
        for descriptor in &descriptors {
            assert_ne!(descriptor.as_raw_fd(), file.as_raw_fd());
            let flags = rustix::io::fcntl_getfd(descriptor).expect("open");
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[tokio::test]
    async fn one_more_than_the_limit_is_not_sent() {
        let dir = tempfile::tempdir().expect("a folder");
        let (_successor, predecessor) = pair(dir.path()).await;
        let file = tempfile::tempfile().expect("a file");
        let many = vec![file.as_fd(); MESSAGE_MAX_DESCRIPTORS + 1];
        let sent = predecessor.send(&FromPredecessor::Complete, &many, SOON);
        assert!(matches!(
            sent.await.expect_err("too many"),
            HandoverError::Malformed(_)
        ));
        let long = FromPredecessor::Refused {
            reason: "x".repeat(MESSAGE_MAX_BYTES),
        };
        let sent = predecessor.send(&long, &[], SOON).await;
        assert!(matches!(
            sent.expect_err("too long"),
            HandoverError::Malformed(_)
        ));
    }

    #[tokio::test]
    async fn an_end_that_goes_away_and_nonsense_are_told_apart() {
        let dir = tempfile::tempdir().expect("a folder");
        let (successor, predecessor) = pair(dir.path()).await;
        send(successor.socket.get_ref(), b"{\"say\":\"sing\"}", &[]).expect("sent");
        let heard = predecessor.receive::<FromSuccessor>(SOON).await;
        assert!(matches!(heard, Err(HandoverError::Malformed(_))));
        drop(successor);
        let heard = predecessor.receive::<FromSuccessor>(SOON).await;
        assert!(matches!(heard, Err(HandoverError::Gone)));
        let said = predecessor.send(&FromPredecessor::Paused, &[], SOON).await;
        assert!(matches!(said, Err(HandoverError::Gone)));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends() {
        let dir = tempfile::tempdir().expect("a folder");
        let (successor, _predecessor) = pair(dir.path()).await;
        let began = Instant::now();
        let heard = successor.receive::<FromPredecessor>(SOON).await;
        assert!(matches!(heard, Err(HandoverError::Silent(SOON))));
        assert!(began.elapsed() < SOON, "virtual time");
    }

    #[tokio::test]
    async fn nobody_there_is_no_error_and_a_dead_agents_socket_is_replaced() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(knock(dir.path()).expect("no error").is_none());
        drop(Door::open(dir.path()).expect("a socket"));
        assert!(knock(dir.path()).expect("a stale socket").is_none());
        let _door = Door::open(dir.path()).expect("replaced");
        assert!(knock(dir.path()).expect("alive").is_some());
    }
}
