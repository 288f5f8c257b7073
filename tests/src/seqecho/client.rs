//! The client: opens connections as its mode says and counts what is lost.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use super::{
    BANNER, Close, End, Record, RecordKind, close,
    report::{Report, Tally},
    server::STACK_BYTES,
};
use crate::wait;

/// What the client does.
#[derive(Debug, Clone, clap::Args)]
pub struct ClientOptions {
    /// Address of the server, or of a service
    #[arg(long)]
    pub to: SocketAddr,
    /// What to do on each connection
    #[arg(long, value_enum, default_value_t = Mode::Stream)]
    pub mode: Mode,
    /// Connections at the same time (with --rate: connections in all are --rate times --seconds)
    #[arg(long, default_value_t = 1)]
    pub connections: u64,
    /// Records per connection; in `answer` modes, records of the answer
    #[arg(long, default_value_t = 1)]
    pub records: u64,
    /// Pause between two records of a connection, milliseconds
    #[arg(long, default_value_t = 0)]
    pub interval_ms: u64,
    /// New connections per second; without it, all are opened at once
    #[arg(long)]
    pub rate: Option<u64>,
    /// How long to open connections with --rate, or to stream without counting records, seconds
    #[arg(long)]
    pub seconds: Option<u64>,
    /// How to close
    #[arg(long, value_enum, default_value_t = Close::Fin)]
    pub close: Close,
    /// The server speaks first: expect its banner before sending anything
    #[arg(long)]
    pub banner: bool,
    /// A wait for a record longer than this is a stall, milliseconds
    #[arg(long, default_value_t = 1000)]
    pub stall_ms: u64,
    /// Give up a connect or a read after this, milliseconds
    #[arg(long, default_value_t = 30_000)]
    pub limit_ms: u64,
    /// Source address
    #[arg(long)]
    pub bind: Option<IpAddr>,
    /// Source port, together with --bind; 0 for the kernel's choice
    #[arg(long, default_value_t = 0, requires = "bind")]
    pub source_port: u16,
}

/// What happens on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Send records, each after the echo of the one before, then close
    Stream,
    /// Send one record, shut down writing, read a large answer to its end
    Answer,
    /// Ask for a large answer that the server sends and closes at once; read it to its end
    AnswerAndFin,
    /// Send records; the server closes with FIN after their echoes: expect it
    ServerFin,
    /// Send records; the server resets after their echoes: expect it
    ServerRst,
    /// Send records without any answer, then close: shows that a server receives nothing or all
    Sink,
}

/// Runs the client to its end.
///
/// # Errors
/// Threads cannot be started. What happens to connections is in the report.
pub fn run(options: &ClientOptions) -> Result<Report> {
    let total = Mutex::new(Tally::default());
    let started = Instant::now();
    let until = options
        .seconds
        .map(|seconds| started + Duration::from_secs(seconds));
    let ids = AtomicU64::new(u64::from(std::process::id()) << 32);
    let one = || {
        let mut tally = Tally::default();
        connection(
            options,
            ids.fetch_add(1, Ordering::Relaxed),
            until,
            &mut tally,
        );
        total
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .merge(tally);
    };
    std::thread::scope(|scope| -> Result<()> {
        let count = match options.rate {
            Some(rate) => rate.saturating_mul(options.seconds.unwrap_or(1)),
            None => options.connections,
        };
        for number in 0..count {
            if let Some(rate) = options.rate {
                wait::pace_until(
                    started + Duration::from_secs_f64(number as f64 / rate.max(1) as f64),
                );
            }
            std::thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, one)
                .context("cannot start a thread for a connection")?;
        }
        Ok(())
    })?;
    Ok(total
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .finish())
}

fn connection(options: &ClientOptions, id: u64, until: Option<Instant>, tally: &mut Tally) {
    tally.report.connections += 1;
    let began = Instant::now();
    let stream = match connect(options) {
        Ok(stream) => stream,
        Err(error) => {
            *tally
                .report
                .connect_errors
                .entry(name_of(&error))
                .or_default() += 1;
            return;
        }
    };
    tally.connect.add(began.elapsed());
    // With a rate, --seconds says how long connections are opened, not how long each lives.
    let until = until.filter(|_| options.rate.is_none());
    let mut conversation = Conversation {
        options,
        id,
        stream,
        began,
        until,
        tally,
    };
    match conversation.run() {
        Ok(end) => {
            tally.report.complete += 1;
            tally.ended(end);
        }
        Err(error) => tally.failed(&error),
    }
}

fn connect(options: &ClientOptions) -> io::Result<TcpStream> {
    let limit = Duration::from_millis(options.limit_ms);
    let stream = match options.bind {
        None => TcpStream::connect_timeout(&options.to, limit)?,
        Some(source) => bound(options.to, SocketAddr::new(source, options.source_port))?,
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// Connects from a given source address (the kernel's own limit applies to the connect).
fn bound(to: SocketAddr, source: SocketAddr) -> io::Result<TcpStream> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    use std::os::fd::AsRawFd as _;
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(socket.into())
}

/// The symbolic name of an error, or what the standard library calls it.
fn name_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None if error.kind() == io::ErrorKind::TimedOut => "ETIMEDOUT".to_owned(),
        None => format!("{:?}", error.kind()),
    }
}

struct Conversation<'a> {
    options: &'a ClientOptions,
    id: u64,
    stream: TcpStream,
    began: Instant,
    until: Option<Instant>,
    tally: &'a mut Tally,
}

impl Conversation<'_> {
    fn run(&mut self) -> io::Result<End> {
        if self.options.banner {
            self.expect_banner()?;
        }
        let records = self.options.records;
        match self.options.mode {
            Mode::Stream => {
                self.request(RecordKind::Echo, 0)?;
                self.exchange()?;
                self.close_and_look()
            }
            Mode::Sink => {
                self.request(RecordKind::Sink, 0)?;
                for number in 0..records {
                    self.send(number)?;
                }
                self.close_and_look()
            }
            Mode::ServerFin | Mode::ServerRst => {
                let reset = self.options.mode == Mode::ServerRst;
                self.request(
                    if reset {
                        RecordKind::EchoAndRst
                    } else {
                        RecordKind::EchoAndFin
                    },
                    records,
                )?;
                self.exchange()?;
                self.expect_end(if reset { End::Rst } else { End::Fin })
            }
            Mode::Answer | Mode::AnswerAndFin => {
                let at_once = self.options.mode == Mode::AnswerAndFin;
                self.request(
                    if at_once {
                        RecordKind::AnswerAndFin
                    } else {
                        RecordKind::Answer
                    },
                    records,
                )?;
                if !at_once {
                    self.stream.shutdown(Shutdown::Write)?;
                }
                for number in 0..records {
                    self.receive(number)?;
                    if number == 0 {
                        self.tally.first_byte.add(self.began.elapsed());
                    }
                }
                self.expect_end(End::Fin)
            }
        }
    }

    fn expect_banner(&mut self) -> io::Result<()> {
        let mut banner = [0; BANNER.len()];
        self.stream.read_exact(&mut banner[..1])?;
        self.tally.first_byte.add(self.began.elapsed());
        self.stream.read_exact(&mut banner[1..])?;
        if banner != BANNER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the banner"));
        }
        Ok(())
    }

    fn request(&mut self, kind: RecordKind, argument: u64) -> io::Result<()> {
        Record {
            kind,
            connection: self.id,
            number: 0,
            argument,
        }
        .write(&mut self.stream)
    }

    fn send(&mut self, number: u64) -> io::Result<()> {
        Record {
            kind: RecordKind::Data,
            connection: self.id,
            number,
            argument: 0,
        }
        .write(&mut self.stream)
    }

    /// Sends records one by one, each after the echo of the one before.
    fn exchange(&mut self) -> io::Result<()> {
        let interval = Duration::from_millis(self.options.interval_ms);
        let mut number = 0;
        loop {
            let done = match self.until {
                Some(until) => Instant::now() >= until,
                None => number >= self.options.records,
            };
            if done {
                return Ok(());
            }
            let sent = Instant::now();
            self.send(number)?;
            self.receive(number)?;
            let took = sent.elapsed();
            self.tally.echo.add(took);
            number += 1;
            wait::pace_until(sent + interval);
        }
    }

    fn receive(&mut self, expected: u64) -> io::Result<()> {
        let asked = Instant::now();
        let record = Record::read(&mut self.stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if asked.elapsed() > Duration::from_millis(self.options.stall_ms) {
            self.tally.report.stalls += 1;
        }
        if record.connection != self.id || record.kind != RecordKind::Reply {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a record of another connection",
            ));
        }
        if record.number == expected {
            self.tally.report.records += 1;
            return Ok(());
        }
        // Out of step: count what is missing or repeated, and end the connection (nothing after this means anything).
        if record.number > expected {
            self.tally.report.gaps += record.number - expected;
        } else {
            self.tally.report.repeats += 1;
        }
        Err(io::Error::other("records out of order"))
    }

    /// Closes as the options say; after FIN, waits for the server's end.
    fn close_and_look(&mut self) -> io::Result<End> {
        close(&self.stream, self.options.close);
        match self.options.close {
            Close::Rst => Ok(End::Ours),
            Close::Fin => self.expect_end(End::Fin),
        }
    }

    fn expect_end(&mut self, expected: End) -> io::Result<End> {
        let seen = match Record::read(&mut self.stream) {
            Ok(None) => End::Fin,
            Ok(Some(_)) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a record after the last",
                ));
            }
            Err(error) if End::of(&error) == expected => expected,
            Err(error) => return Err(error),
        };
        if seen == expected {
            return Ok(seen);
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
