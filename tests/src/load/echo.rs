//! Servers on one epoll thread: what comes in decides what goes out.

use std::{
    collections::HashMap,
    io,
    net::{TcpListener, TcpStream},
};

use anyhow::{Context as _, Result};

use super::epoll::{Outbox, Ready, read_some};

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

/// Serves listeners for ever. They have the first numbers, connections those after.
///
/// # Errors
/// Only of the listeners and of epoll; a connection's error ends that connection.
pub fn serve<A: Answer>(listeners: &[TcpListener]) -> Result<()> {
    let mut ready = Ready::new()?;
    let mut number = 0;
    for listener in listeners {
        listener.set_nonblocking(true)?;
        ready.watch(listener, number)?;
        number += 1;
    }
    let mut connections: HashMap<u64, Connection<A>> = HashMap::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        for source in ready.wait(None)? {
            if let Some(listener) = listeners.get(usize::try_from(source)?) {
                accept(listener, &ready, &mut connections, &mut number)?;
            } else if let Some(connection) = connections.get_mut(&source)
                && !matches!(turn(connection, source, &ready, &mut buffer), Ok(true))
            {
                connections.remove(&source);
            }
        }
    }
}

/// Takes what waits; `number` is the next free one.
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
        ready.watch(&stream, *number)?;
        let connection = Connection {
            stream,
            answer: A::default(),
            outbox: Outbox::default(),
            blocked: false,
        };
        connections.insert(*number, connection);
        *number += 1;
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
