//! The server: does what each connection's first record asks.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{BANNER, Close, End, RECORD_BYTES, Record, RecordKind, close};

/// Longest wait for a record: longer than any test's silence, shorter than forever.
const READ_LIMIT: Duration = Duration::from_secs(300);

/// Records written at once in an answer.
const ANSWER_BATCH_RECORDS: u64 = 256;

/// Stack of a connection's thread: the work is shallow and there may be thousands.
pub(super) const STACK_BYTES: usize = 128 * 1024;

/// How the server listens.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerOptions {
    /// Address to listen on
    #[arg(long)]
    pub listen: SocketAddr,
    /// Speak first: send a banner before reading anything
    #[arg(long)]
    pub banner: bool,
    /// Print one JSON line for every connection that ends
    #[arg(long)]
    pub log: bool,
}

/// One line of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServedConnection {
    /// Address of the client as accept(2) told it.
    pub peer: SocketAddr,
    /// Records received.
    pub records: u64,
    /// Payload bytes received.
    pub bytes: u64,
    /// How the server saw the end.
    pub end: End,
}

/// Serves until it is killed.
///
/// # Errors
/// It cannot listen.
pub fn run(options: &ServerOptions) -> Result<()> {
    let listener = TcpListener::bind(options.listen)
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    for stream in listener.incoming() {
        // A client that left before accept(2) is the client's to count.
        let Ok(stream) = stream else { continue };
        let (banner, log) = (options.banner, options.log);
        std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || serve(stream, banner, log))
            .context("cannot start a thread for a connection")?;
    }
    Ok(())
}

fn serve(stream: TcpStream, banner: bool, log: bool) {
    let Ok(peer) = stream.peer_addr() else { return };
    let mut connection = Connection { stream, records: 0 };
    let end = connection
        .run(banner)
        .unwrap_or_else(|error| End::of(&error));
    if log {
        let records = connection.records;
        let line = ServedConnection {
            peer,
            records,
            bytes: records * RECORD_BYTES as u64,
            end,
        };
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        text.push('\n');
        // One write per line, so that lines of several threads do not mix.
        drop(io::stdout().lock().write_all(text.as_bytes()));
    }
}

struct Connection {
    stream: TcpStream,
    records: u64,
}

impl Connection {
    fn run(&mut self, banner: bool) -> io::Result<End> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(READ_LIMIT))?;
        if banner {
            self.stream.write_all(BANNER)?;
        }
        let Some(request) = self.next()? else {
            return Ok(End::Fin);
        };
        match request.kind {
            RecordKind::Echo => self.echo(u64::MAX),
            RecordKind::EchoAndFin => self.echo_and_close(request.argument, Close::Fin),
            RecordKind::EchoAndRst => self.echo_and_close(request.argument, Close::Rst),
            RecordKind::Sink => self.drain(),
            RecordKind::Answer => {
                let end = self.drain()?;
                self.answer(&request)?;
                Ok(end)
            }
            RecordKind::AnswerAndFin => {
                self.answer(&request)?;
                Ok(End::Ours)
            }
            RecordKind::Data | RecordKind::Reply => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn next(&mut self) -> io::Result<Option<Record>> {
        let record = Record::read(&mut self.stream)?;
        self.records += u64::from(record.is_some());
        Ok(record)
    }

    fn echo(&mut self, limit: u64) -> io::Result<End> {
        for _ in 0..limit {
            let Some(record) = self.next()? else {
                return Ok(End::Fin);
            };
            Record {
                kind: RecordKind::Reply,
                ..record
            }
            .write(&mut self.stream)?;
        }
        Ok(End::Ours)
    }

    /// After closing with FIN, looks how the client answers; after RST nothing can be seen.
    fn echo_and_close(&mut self, limit: u64, how: Close) -> io::Result<End> {
        let end = self.echo(limit)?;
        if end != End::Ours {
            return Ok(end);
        }
        close(&self.stream, how);
        match how {
            Close::Rst => Ok(End::Ours),
            Close::Fin => self.drain(),
        }
    }

    fn drain(&mut self) -> io::Result<End> {
        while self.next()?.is_some() {}
        Ok(End::Fin)
    }

    fn answer(&mut self, request: &Record) -> io::Result<()> {
        let mut number = 0;
        while number < request.argument {
            let end = request.argument.min(number + ANSWER_BATCH_RECORDS);
            let batch: Vec<u8> = (number..end)
                .flat_map(|number| {
                    Record {
                        kind: RecordKind::Reply,
                        connection: request.connection,
                        number,
                        argument: 0,
                    }
                    .encode()
                })
                .collect();
            self.stream.write_all(&batch)?;
            number = end;
        }
        self.stream.shutdown(std::net::Shutdown::Write)?;
        // Bytes of the client that are still unread would turn our FIN into a RST at close(2).
        io::copy(&mut (&self.stream).take(u64::MAX), &mut io::sink()).map(drop)
    }
}
