//! Sockets by readiness: the little of epoll that servers and clients here share.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
};

use anyhow::{Context as _, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Events taken at a time; more only delay the first of them.
const EVENTS_MAX: usize = 256;

/// Readiness of sockets, each known by a number of the caller's.
#[derive(Debug)]
pub(super) struct Ready {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Ready {
    pub(super) fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
        Ok(Self {
            epoll,
            events: vec![EpollEvent::empty(); EVENTS_MAX],
        })
    }

    /// Watches for something to read.
    pub(super) fn watch(&self, source: impl AsFd, number: u64) -> Result<()> {
        Ok(self
            .epoll
            .add(source, EpollEvent::new(EpollFlags::EPOLLIN, number))?)
    }

    /// Watches also, or no longer, for room to write.
    pub(super) fn watch_room(&self, source: impl AsFd, number: u64, room: bool) -> Result<()> {
        let flags = if room {
            EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT
        } else {
            EpollFlags::EPOLLIN
        };
        Ok(self
            .epoll
            .modify(source, &mut EpollEvent::new(flags, number))?)
    }

    /// Numbers of the sources that are ready; empty after `milliseconds` (rounded up by the kernel) or a signal.
    pub(super) fn wait(&mut self, milliseconds: Option<u16>) -> Result<Vec<u64>> {
        let timeout = milliseconds.map_or(EpollTimeout::NONE, EpollTimeout::from);
        match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => Ok(self
                .events
                .iter()
                .take(count)
                .map(EpollEvent::data)
                .collect()),
            Err(nix::errno::Errno::EINTR) => Ok(Vec::new()),
            Err(error) => Err(error).context("cannot wait for sockets"),
        }
    }
}

/// One read: `None` when there is nothing now, `Some(0)` at the end.
pub(super) fn read_some(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(buffer) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        other => other.map(Some),
    }
}

/// Bytes that wait for room in a socket.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
}

impl Outbox {
    /// Adds bytes to send.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Sends as much as fits; true when all is gone.
    pub(super) fn flush(&mut self, stream: &mut TcpStream) -> io::Result<bool> {
        while !self.bytes.is_empty() {
            match stream.write(&self.bytes) {
                Ok(count) => drop(self.bytes.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
