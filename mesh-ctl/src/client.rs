//! One question to the agent, one answer, within a deadline.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_api::local::{REQUEST_MAX_BYTES, Request, Response, SOCKET_NAME};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};
use serde_json::Value;

/// Longest answer that is read. A dump is the largest: 100,000 workloads (the design's budget) of about 600 bytes
/// each, doubled for services and policies.
pub const RESPONSE_MAX_BYTES: usize = 128 * 1024 * 1024;

/// Bytes per read from the socket; a status fits in one.
const READ_BYTES: usize = 64 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent behind the socket.
    #[error(
        "no agent is running: {reason} at {socket}\n  start one: mesh-agent run --run-dir {run_dir} (see docs/standalone.md)\n  \
         or, if it uses another run directory, name it with --run-dir or WEFT_RUN_DIR"
    )]
    NotRunning {
        reason: &'static str,
        socket: String,
        run_dir: String,
    },
    /// The socket may not be opened.
    #[error("permission denied for {socket}: only root may talk to the agent; try again with sudo")]
    Permission { socket: String },
    /// Another failure of the socket.
    #[error("cannot {action} the agent at {socket}: {source}")]
    Io {
        action: &'static str,
        socket: String,
        source: io::Error,
    },
    /// The agent took too long.
    #[error(
        "the agent at {socket} did not answer within {deadline:?}; it may be overloaded or hung: look at its log, \
         or wait longer with --timeout"
    )]
    Silent { socket: String, deadline: Duration },
    /// It went away in the middle.
    #[error("the agent at {socket} closed the connection without a whole answer; look at its log")]
    Closed { socket: String },
    /// What came back is not an answer that this version knows.
    #[error(
        "the agent at {socket} answered something that this weft ({}) does not understand: {reason}\n  \
         weft and mesh-agent must be of the same version",
        env!("CARGO_PKG_VERSION")
    )]
    Mismatch { socket: String, reason: String },
    /// The request is longer than the agent reads.
    #[error(
        "the request is {0} bytes long, the agent reads at most {REQUEST_MAX_BYTES}; shorten names and paths"
    )]
    RequestTooLong(usize),
}

impl ClientError {
    /// Whether the agent could not be talked to at all, as opposed to an answer that could not be used.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::NotRunning { .. }
            | Self::Permission { .. }
            | Self::Io { .. }
            | Self::Silent { .. }
            | Self::Closed { .. } => true,
            Self::Mismatch { .. } | Self::RequestTooLong(_) => false,
        }
    }
}

/// An answer, as this version understands it and as it came.
#[derive(Debug)]
pub struct Answer {
    /// What this version understands.
    pub response: Response,
    /// All that the agent said, fields of newer versions included.
    pub json: Value,
}

/// Where the agent is and how long to wait for it.
#[derive(Debug)]
pub struct Client {
    run_dir: PathBuf,
    socket: PathBuf,
    deadline: Duration,
}

impl Client {
    pub fn new(run_dir: &Path, deadline: Duration) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            socket: run_dir.join(SOCKET_NAME),
            deadline,
        }
    }

    /// Asks once. A refusal by the agent ([`Response::Error`]) is an answer, not an error.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn ask(&self, request: &Request) -> Result<Answer, ClientError> {
        let mut line = serde_json::to_vec(request)
            .map_err(|error| self.mismatch(format!("the request cannot be written: {error}")))?;
        line.push(b'\n');
        if line.len() > REQUEST_MAX_BYTES {
            return Err(ClientError::RequestTooLong(line.len()));
        }
        let ends_at = Instant::now() + self.deadline;
        let mut stream = self.connect()?;
        stream
            .set_write_timeout(Some(self.deadline))
            .and_then(|()| stream.write_all(&line))
            .map_err(|error| self.io("write to", error))?;
        self.read_answer(&mut stream, ends_at)
    }

    /// `connect(2)` on a UNIX socket waits while the listener's queue is full (a hung agent): for SO_SNDTIMEO, which
    /// the standard library cannot set before connecting.
    fn connect(&self) -> Result<UnixStream, ClientError> {
        let open = || -> nix::Result<UnixStream> {
            let fd = socket(
                AddressFamily::Unix,
                SockType::Stream,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            let micros = i64::from(self.deadline.subsec_micros());
            let seconds = i64::try_from(self.deadline.as_secs()).unwrap_or(i64::MAX);
            setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(seconds, micros))?;
            connect(
                std::os::fd::AsRawFd::as_raw_fd(&fd),
                &UnixAddr::new(&self.socket)?,
            )?;
            Ok(fd.into())
        };
        open().map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => self.not_running("there is no socket"),
            Errno::ECONNREFUSED => self.not_running("nobody listens"),
            Errno::EACCES | Errno::EPERM => ClientError::Permission {
                socket: self.shown(),
            },
            Errno::EAGAIN => ClientError::Silent {
                socket: self.shown(),
                deadline: self.deadline,
            },
            other => ClientError::Io {
                action: "connect to",
                socket: self.shown(),
                source: other.into(),
            },
        })
    }

    fn read_answer(
        &self,
        stream: &mut UnixStream,
        ends_at: Instant,
    ) -> Result<Answer, ClientError> {
        let mut answer = Vec::new();
        let mut chunk = vec![0; READ_BYTES];
        loop {
            let left = ends_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Silent {
                    socket: self.shown(),
                    deadline: self.deadline,
                });
            }
            stream
                .set_read_timeout(Some(left))
                .map_err(|error| self.io("read from", error))?;
            let count = match stream.read(&mut chunk) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.io("read from", error)),
            };
            let fresh = chunk.get(..count).unwrap_or_default();
            let end = fresh.iter().position(|byte| *byte == b'\n');
            answer.extend_from_slice(fresh.get(..end.unwrap_or(count)).unwrap_or_default());
            if answer.len() > RESPONSE_MAX_BYTES {
                return Err(self.mismatch(format!("longer than {RESPONSE_MAX_BYTES} bytes")));
            }
            if end.is_some() {
                return self.parse(&answer);
            }
            if count == 0 {
                return Err(ClientError::Closed {
                    socket: self.shown(),
                });
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<Answer, ClientError> {
        let json: Value = serde_json::from_slice(line)
            .map_err(|error| self.mismatch(format!("not JSON ({error})")))?;
        let response = serde::Deserialize::deserialize(&json)
            .map_err(|error: serde_json::Error| self.mismatch(error.to_string()))?;
        Ok(Answer { response, json })
    }

    fn io(&self, action: &'static str, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent {
                socket: self.shown(),
                deadline: self.deadline,
            },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed {
                socket: self.shown(),
            },
            _ => ClientError::Io {
                action,
                socket: self.shown(),
                source,
            },
        }
    }

    fn not_running(&self, reason: &'static str) -> ClientError {
        ClientError::NotRunning {
            reason,
            socket: self.shown(),
            run_dir: self.run_dir.display().to_string(),
        }
    }

    /// The answer is of another kind than the question.
    pub fn mismatch(&self, reason: String) -> ClientError {
        ClientError::Mismatch {
            socket: self.shown(),
            reason,
        }
    }

    fn shown(&self) -> String {
        self.socket.display().to_string()
    }
}
