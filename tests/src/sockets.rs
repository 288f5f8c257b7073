//! Sockets of a pod in the hands of the test: which bytes go first, who closes and how is then decided in one place.
//!
//! A program in the pod's namespace and cgroup (`opener`) makes the sockets, so the connection is one of an
//! unmodified program of the pod, `connect(2)` with its errno included; it then passes the descriptor to the test.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::Linger},
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::{
    lab::{Lab, Place},
    process::{Program, Running},
    programs, wait,
};

/// How long the opener may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What the opener is asked for; one order per connection to its own socket.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Order {
    Connect(SocketAddr),
    Listen(SocketAddr),
}

/// A program in a pod, or on a node, that opens sockets for the test.
#[derive(Debug)]
pub struct Opener {
    path: PathBuf,
    _program: Running,
}

impl Opener {
    /// Starts it; `name` is free within the lab.
    ///
    /// # Errors
    /// It is not built, or ends.
    pub fn start(lab: &Lab, place: &impl Place, name: &str) -> Result<Self> {
        let path = lab.directory().join(format!("opener-{name}.sock"));
        let program = Program::new(programs::own("opener")?)
            .named(&format!("opener-{name}"))
            .arg(&path);
        let mut running = lab.spawn(place, &program)?;
        wait::until("the opener to listen", START_LIMIT, || {
            running.check_running()?;
            Ok(UnixStream::connect(&path).ok().map(drop))
        })?;
        Ok(Self {
            path,
            _program: running,
        })
    }

    /// Connects with one blocking `connect(2)`. The inner result is what that call returned.
    ///
    /// # Errors
    /// The opener has ended.
    pub fn connect(&self, to: SocketAddr) -> Result<io::Result<TcpStream>> {
        Ok(self.order(Order::Connect(to))?.map(TcpStream::from))
    }

    /// Listens.
    ///
    /// # Errors
    /// The opener has ended, or the address is taken or not the pod's.
    pub fn listen(&self, at: SocketAddr) -> Result<Listener> {
        let socket = self
            .order(Order::Listen(at))?
            .with_context(|| format!("cannot listen on {at}"))?;
        Ok(Listener(TcpListener::from(socket)))
    }

    fn order(&self, order: Order) -> Result<io::Result<OwnedFd>> {
        let mut stream = UnixStream::connect(&self.path).context("the opener has gone")?;
        let mut line = serde_json::to_string(&order)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut errno = [0; 4];
        let received = recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut errno)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        ensure!(received.bytes == errno.len(), "the opener has ended");
        let socket = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
            _ => None,
        });
        match socket {
            Some(socket) => Ok(Ok(socket)),
            None => Ok(Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))),
        }
    }
}

/// Serves orders until it is killed: what the program `opener` does.
///
/// # Errors
/// It cannot listen on `path`.
pub fn serve_orders(path: &Path) -> Result<()> {
    drop(fs::remove_file(path));
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::Builder::new()
            .spawn(move || {
                // A test that went away in the middle of an order wants no answer.
                drop(serve_order(&stream));
            })
            .context("cannot start a thread for an order")?;
    }
    Ok(())
}

fn serve_order(stream: &UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let opened: io::Result<OwnedFd> = match serde_json::from_str(&line)? {
        Order::Connect(to) => TcpStream::connect(to).map(Into::into),
        Order::Listen(at) => TcpListener::bind(at).map(Into::into),
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let errno = match &opened {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    };
    let sockets = opened.as_ref().map(|socket| [socket.as_fd()]);
    if let Ok(sockets) = &sockets
        && !control.push(SendAncillaryMessage::ScmRights(sockets))
    {
        bail!("no room for one descriptor");
    }
    let errno = errno.to_ne_bytes();
    sendmsg(
        stream,
        &[IoSlice::new(&errno)],
        &mut control,
        SendFlags::empty(),
    )?;
    Ok(())
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// The next connection; every read of it waits at most `limit`, too.
    ///
    /// # Errors
    /// None comes within `limit`.
    pub fn accept(&self, limit: Duration) -> Result<(TcpStream, SocketAddr)> {
        let timeout = PollTimeout::try_from(limit).context("the limit is too long")?;
        let ready = poll(
            &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
            timeout,
        )?;
        ensure!(ready > 0, "nobody connected within {limit:?}");
        let (stream, peer) = self.0.accept()?;
        stream.set_read_timeout(Some(limit))?;
        Ok((stream, peer))
    }

    /// Whether a connection waits to be accepted.
    ///
    /// # Errors
    /// The socket cannot be polled.
    pub fn has_waiting(&self) -> Result<bool> {
        let mut sockets = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut sockets, PollTimeout::ZERO)? > 0)
    }
}

/// What one read of a socket, or the failed `connect(2)` before it, told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// `connect(2)` failed with this error.
    ConnectFailed(Errno),
    /// These bytes, as many as were expected or as many as came.
    Bytes(Vec<u8>),
    /// FIN.
    Fin,
    /// RST.
    Rst,
    /// Nothing within the read limit.
    Silence,
    /// Another error.
    Error(Errno),
}

impl Seen {
    /// What an error of a read means.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        match errno {
            Errno::ECONNRESET => Self::Rst,
            Errno::EAGAIN => Self::Silence,
            other => Self::Error(other),
        }
    }
}

/// Reads up to `expected` bytes, fewer only if the stream ends before.
#[must_use]
pub fn look(mut stream: &TcpStream, expected: usize) -> Seen {
    let mut bytes = vec![0; expected.max(1)];
    let mut filled = 0;
    while filled < bytes.len() {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) if filled == 0 => return Seen::Fin,
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if filled == 0 => return Seen::of(&error),
            Err(_) => break,
        }
    }
    bytes.truncate(filled);
    Seen::Bytes(bytes)
}

/// Ends our direction with FIN.
///
/// # Errors
/// The peer has reset the connection.
pub fn finish(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)
}

/// Closes with RST.
///
/// # Errors
/// The option cannot be set.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    let now = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &now)?;
    drop(stream);
    Ok(())
}
