//! Servers on one epoll thread: what comes in decides what goes out.

use std::{
    collections::HashMap,
    io,
    net::{TcpListener, TcpStream},
};

use anyhow::{Context as _, Result};

use super::epoll::{Outbox, Ready, read_some};

/// The listener's number; connections count from the next on.
const LISTENER: u64 = 0;

/// Bytes per read: requests and pings fit many times.
const READ_BYTES: usize = 16 * 1024;

/// Something that answers the bytes of one connection.
pub trait Answer: Default {
    /// Takes what has come in and adds what shall go out to `reply`.
    fn take(&mut self, bytes: &[u8], reply: &mut dyn FnMut(&[u8]));
}

/// Sends back what it gets.
#[derive(Debug, Default)]
pub struct Echo;

impl Answer for Echo {
    fn take(&mut self, bytes: &[u8], reply: &mut dyn FnMut(&[u8])) {
        reply(bytes);
    }
}

struct Connection<A> {
    stream: TcpStream,
    answer: A,
    outbox: Outbox,
    blocked: bool,
}

/// Serves a listener for ever.
///
/// # Errors
/// Only of the listener and of epoll; a connection's error ends that connection.
pub fn serve<A: Answer>(listener: &TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut ready = Ready::new()?;
    ready.watch(listener, LISTENER)?;
    let mut connections: HashMap<u64, Connection<A>> = HashMap::new();
    let mut number = LISTENER;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        for source in ready.wait(None)? {
            if source == LISTENER {
                accept(listener, &ready, &mut connections, &mut number)?;
            } else if let Some(connection) = connections.get_mut(&source)
                && !matches!(turn(connection, source, &ready, &mut buffer), Ok(true))
            {
                connections.remove(&source);
            }
        }
    }
}

fn accept<A: Answer>(
    listener: &TcpListener,
    ready: &Ready,
    connections: &mut HashMap<u64, Connection<A>>,
    number: &mut u64,
) -> Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // The client gave up before its turn came (accept(2)).
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("cannot accept"),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        *number += 1;
        ready.watch(&stream, *number)?;
        let connection = Connection {
            stream,
            answer: A::default(),
            outbox: Outbox::default(),
            blocked: false,
        };
        connections.insert(*number, connection);
    }
}

/// Reads once, answers, sends; false when the connection is over. While its answers do not fit, nothing is read.
fn turn<A: Answer>(
    connection: &mut Connection<A>,
    number: u64,
    ready: &Ready,
    buffer: &mut [u8],
) -> Result<bool> {
    let Connection {
        stream,
        answer,
        outbox,
        blocked,
    } = connection;
    if !*blocked {
        match read_some(stream, buffer)? {
            Some(0) => return Ok(false),
            Some(count) => answer.take(&buffer[..count], &mut |bytes| outbox.push(bytes)),
            None => {}
        }
    }
    let full = !outbox.flush(stream)?;
    if full != *blocked {
        *blocked = full;
        ready.watch_room(&*stream, number, full)?;
    }
    Ok(true)
}
