//! Bytes in one direction: the server counts and tells the count at the end, so that only delivered bytes are
//! measured and a lost one is an error.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::ANSWER_LIMIT;

/// Bytes per write and read: what iperf3 uses.
const BLOCK_BYTES: usize = 128 * 1024;

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes that the server has read.
    pub bytes: u64,
    /// From the first write until the server told its last count.
    pub seconds: f64,
    /// Throughput.
    pub gbit_per_second: f64,
}

/// Serves for ever, a thread per connection.
///
/// # Errors
/// The listener's.
pub fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().context("cannot accept")?;
        thread::spawn(move || {
            if let Err(error) = count(stream) {
                eprintln!("bulk from {peer}: {error}");
            }
        });
    }
}

fn count(mut stream: TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut bytes = 0u64;
    loop {
        match stream.read(&mut block)? {
            0 => return stream.write_all(&bytes.to_be_bytes()),
            count => bytes += count as u64,
        }
    }
}

/// Sends on `streams` connections at once for `duration`.
///
/// # Errors
/// A connection fails, or the server has read another number of bytes than was sent.
pub fn run(address: SocketAddr, streams: usize, duration: Duration) -> Result<Report> {
    let connections = (0..streams)
        .map(|_| {
            TcpStream::connect_timeout(&address, ANSWER_LIMIT)
                .with_context(|| format!("cannot connect to {address}"))
        })
        .collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let senders: Vec<_> = connections
        .into_iter()
        .map(|stream| thread::spawn(move || send(stream, start + duration)))
        .collect();
    let mut bytes = 0;
    for sender in senders {
        bytes += sender.join().map_err(|_| anyhow!("a sender panicked"))??;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        bytes,
        seconds,
        gbit_per_second: bytes as f64 * 8.0 / seconds / 1e9,
    })
}

fn send(mut stream: TcpStream, end: Instant) -> Result<u64> {
    let block = vec![0x5a; BLOCK_BYTES];
    let mut sent = 0u64;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    while Instant::now() < end {
        stream
            .write_all(&block)
            .with_context(|| format!("after {sent} bytes"))?;
        sent += block.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut count = [0; 8];
    stream
        .read_exact(&mut count)
        .context("the server did not tell its count")?;
    let received = u64::from_be_bytes(count);
    if received != sent {
        bail!("sent {sent} bytes, the server has read {received}");
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        (listener, address)
    }

    #[test]
    fn only_what_the_server_has_read_is_counted() {
        let (listener, address) = listen();
        thread::spawn(move || serve(&listener));
        let report = run(address, 3, Duration::from_millis(50)).expect("a run");
        assert!(report.bytes >= 3 * BLOCK_BYTES as u64, "{report:?}");
        assert_eq!(report.bytes % BLOCK_BYTES as u64, 0);
    }

    #[test]
    fn a_lost_byte_is_an_error() {
        let (listener, address) = listen();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("to the end");
            stream
                .write_all(&(all.len() as u64 - 1).to_be_bytes())
                .expect("an answer");
        });
        let error = run(address, 1, Duration::from_millis(10)).expect_err("a byte is missing");
        assert!(
            error.to_string().contains("the server has read"),
            "{error:#}"
        );
    }
}
