//! The loss oracle: connections of numbered, checksummed records whose client counts every way to lose one.
//!
//! A connection begins with one request record that tells the server what to do (echo, answer with many bytes,
//! close in a certain way); all further records are numbered from 0. Blocking sockets and one thread per connection:
//! it must be simple enough to be believed.

pub mod client;
mod record;
pub mod report;
pub mod server;

use std::{
    io::ErrorKind,
    net::{Shutdown, TcpStream},
};

use nix::sys::socket::{setsockopt, sockopt::Linger};
use serde::{Deserialize, Serialize};

pub use self::record::{RECORD_BYTES, Record, RecordKind};

/// What the server sends first, when it is asked to speak first.
pub const BANNER: &[u8] = b"220 seqecho ready\r\n";

/// How a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Close {
    /// With FIN: everything sent arrives.
    Fin,
    /// With RST: SO_LINGER of zero seconds.
    Rst,
}

/// How a connection was seen to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// FIN: a read returned zero bytes.
    Fin,
    /// RST: ECONNRESET.
    Rst,
    /// EPIPE on a write: the peer had closed before.
    BrokenPipe,
    /// Nothing came within the limit.
    Timeout,
    /// Another error.
    Error,
    /// We closed first and did not look.
    Ours,
}

impl End {
    /// The end that an error of a read or write means.
    #[must_use]
    pub fn of(error: &std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof => Self::Fin,
            ErrorKind::ConnectionReset => Self::Rst,
            ErrorKind::BrokenPipe => Self::BrokenPipe,
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Error,
        }
    }
}

/// Begins to close a connection: sends FIN now, or arranges that dropping the socket sends RST.
fn close(stream: &TcpStream, how: Close) {
    // Both fail only on a socket that the peer has reset already, which the caller's next read tells.
    match how {
        Close::Fin => drop(stream.shutdown(Shutdown::Write)),
        Close::Rst => {
            let now = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            let _ = setsockopt(stream, Linger, &now);
        }
    }
}
