//! HTTP/1.1 with keep-alive: a server with a small fixed body, and a client that either goes as fast as the answers
//! come or keeps a rate. At a rate every latency counts from the moment the request was due, not from when a free
//! connection was found for it, so that a stall is charged to every request it delayed.

use std::{
    collections::VecDeque,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use serde::{Deserialize, Serialize};

use super::{
    ANSWER_LIMIT,
    echo::Answer,
    epoll::{Outbox, Ready, read_some},
};
use crate::histogram::Histogram;

/// What the server answers to everything: a body of 64 bytes.
const RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 64\r\n\r\n\
    weft bench: the body is sixty-four bytes long, newline included\n";

/// What the client asks.
const REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: benchtool\r\nAccept: */*\r\n\r\n";

/// The end of a head (RFC 9112, section 2.1).
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Longest head of an answer; any server's fits.
const HEAD_MAX_BYTES: usize = 16 * 1024;

/// Bytes per read.
const READ_BYTES: usize = 16 * 1024;

/// Connections fail one by one when the path is broken: after so many the run is worthless.
const ERRORS_MAX: u64 = 100;

/// Answers each request head with the same response. Requests with bodies are not expected.
#[derive(Debug, Default)]
pub struct FixedResponse {
    matched: usize,
}

impl Answer for FixedResponse {
    fn take(&mut self, bytes: &[u8], reply: &mut dyn FnMut(&[u8])) {
        for byte in bytes {
            self.matched = match HEAD_END.get(self.matched) {
                Some(wanted) if wanted == byte => self.matched + 1,
                _ => usize::from(*byte == b'\r'),
            };
            if self.matched == HEAD_END.len() {
                self.matched = 0;
                reply(RESPONSE);
            }
        }
    }
}

/// What to send.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The server.
    pub address: SocketAddr,
    /// Connections, opened once and kept.
    pub connections: usize,
    /// Time that is measured.
    pub duration: Duration,
    /// Time before it that is not.
    pub warm_up: Duration,
    /// Requests per second, or as many as go.
    pub rate: Option<u32>,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Requests answered in the measured time.
    pub requests: u64,
    /// Requests that failed or were never answered, warm-up included.
    pub errors: u64,
    /// The measured time.
    pub seconds: f64,
    /// Requests per second.
    pub rps: f64,
    /// Median latency, microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// All requests since the start, warm-up included: what a CPU account of the whole run is divided by.
    pub requests_total: u64,
}

struct Connection {
    stream: TcpStream,
    outbox: Outbox,
    /// When the request now under way was due.
    due: Option<Instant>,
    answer: Vec<u8>,
}

/// Opens the connections, sends for the planned time and collects what is still under way.
///
/// # Errors
/// The first connections cannot be made, or more than 100 requests failed.
pub fn run(plan: &Plan) -> Result<Report> {
    let mut load = Load::open(plan)?;
    let end = load.measure_from + plan.duration;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        load.send_due(now, end)?;
        let wait = end.saturating_duration_since(now).as_millis().min(100);
        load.receive(u16::try_from(wait + 1)?, &mut buffer)?;
    }
    // What fell due while this process had no processor is sent late and counted from when it was due.
    if plan.rate.is_some() {
        load.send_due(end, end)?;
    }
    load.drain(&mut buffer)?;
    Ok(load.report(plan.duration))
}

struct Load {
    plan: Plan,
    ready: Ready,
    timer: TimerFd,
    connections: Vec<Connection>,
    idle: VecDeque<usize>,
    /// Requests due for which no connection was free.
    waiting: VecDeque<Instant>,
    /// When the next request is due, at a rate.
    next_due: Instant,
    measure_from: Instant,
    latencies: Histogram,
    requests_total: u64,
    errors: u64,
    draining: bool,
}

impl Load {
    fn open(plan: &Plan) -> Result<Self> {
        if plan.connections == 0 || plan.rate == Some(0) {
            bail!("no connections or no requests: nothing to measure");
        }
        let connections = (0..plan.connections)
            .map(|_| connect(plan.address))
            .collect::<Result<Vec<_>>>()?;
        let ready = Ready::new()?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        for (number, connection) in connections.iter().enumerate() {
            ready.watch(&connection.stream, number as u64)?;
        }
        ready.watch(&timer, plan.connections as u64)?;
        let start = Instant::now();
        Ok(Self {
            ready,
            timer,
            idle: (0..connections.len()).collect(),
            connections,
            waiting: VecDeque::new(),
            next_due: start,
            measure_from: start + plan.warm_up,
            latencies: Histogram::default(),
            requests_total: 0,
            errors: 0,
            draining: false,
            plan: plan.clone(),
        })
    }

    /// Sends what is due now on idle connections, and sets the timer for the next.
    fn send_due(&mut self, now: Instant, end: Instant) -> Result<()> {
        let Some(rate) = self.plan.rate else {
            while let Some(number) = self.idle.pop_front() {
                self.send(number, Instant::now());
            }
            return Ok(());
        };
        while self.next_due <= now && self.next_due < end {
            self.waiting.push_back(self.next_due);
            self.next_due += Duration::from_secs(1) / rate;
        }
        while let (Some(&due), Some(&number)) = (self.waiting.front(), self.idle.front()) {
            self.waiting.pop_front();
            self.idle.pop_front();
            self.send(number, due);
        }
        // A relative time of zero would disarm the timer.
        let left = self
            .next_due
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        self.timer.set(
            Expiration::OneShot(TimeSpec::from_duration(left)),
            TimerSetTimeFlags::empty(),
        )?;
        Ok(())
    }

    fn send(&mut self, number: usize, due: Instant) {
        let connection = &mut self.connections[number];
        connection.due = Some(due);
        connection.outbox.push(REQUEST);
        // A request is far smaller than any socket buffer and one at a time is under way: it fits, or the
        // connection is broken, which reading finds out.
        drop(connection.outbox.flush(&mut connection.stream));
    }

    fn receive(&mut self, wait_ms: u16, buffer: &mut [u8]) -> Result<()> {
        for source in self.ready.wait(Some(wait_ms))? {
            let number = usize::try_from(source)?;
            if number == self.connections.len() {
                // Takes the expiry, so that the timer is not ready any more; send_due sets it anew.
                let _ = self.timer.wait();
                continue;
            }
            match self.take_answer(number, buffer) {
                Ok(false) => {}
                Ok(true) if self.draining => {}
                Ok(true) if self.plan.rate.is_none() => self.send(number, Instant::now()),
                Ok(true) => self.idle.push_back(number),
                Err(error) => self.replace(number, &error)?,
            }
        }
        Ok(())
    }

    /// True when a whole answer has come.
    fn take_answer(&mut self, number: usize, buffer: &mut [u8]) -> Result<bool> {
        let connection = &mut self.connections[number];
        let Some(count) = read_some(&mut connection.stream, buffer)? else {
            return Ok(false);
        };
        if count == 0 {
            bail!("the server closed the connection");
        }
        connection.answer.extend_from_slice(&buffer[..count]);
        let Some(length) = answer_length(&connection.answer)? else {
            return Ok(false);
        };
        if connection.answer.len() < length {
            return Ok(false);
        }
        let due = connection
            .due
            .take()
            .filter(|_| connection.answer.len() == length);
        let due = due.context("the server sent more than was asked for")?;
        connection.answer.clear();
        self.requests_total += 1;
        let now = Instant::now();
        // As fast as it goes, the answers within the measured time count; at a rate, the requests due within it.
        let counted_by = if self.plan.rate.is_some() { due } else { now };
        let counts =
            counted_by >= self.measure_from && !(self.draining && self.plan.rate.is_none());
        if counts {
            self.latencies.add(now.saturating_duration_since(due));
        }
        Ok(true)
    }

    fn replace(&mut self, number: usize, error: &anyhow::Error) -> Result<()> {
        self.errors += 1;
        if self.errors > ERRORS_MAX {
            bail!("more than {ERRORS_MAX} requests failed, the last with: {error:#}");
        }
        self.connections[number] = connect(self.plan.address)?;
        self.ready
            .watch(&self.connections[number].stream, number as u64)?;
        if !self.draining {
            self.idle.push_back(number);
        }
        Ok(())
    }

    /// Waits for the answers under way; at a rate also sends what was due and found no connection.
    fn drain(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.draining = self.plan.rate.is_none();
        let limit = Instant::now() + ANSWER_LIMIT;
        while Instant::now() < limit {
            while let (Some(&due), Some(&number)) = (self.waiting.front(), self.idle.front()) {
                self.waiting.pop_front();
                self.idle.pop_front();
                self.send(number, due);
            }
            if self.under_way() == 0 {
                return Ok(());
            }
            self.receive(10, buffer)?;
        }
        self.errors += self.under_way();
        Ok(())
    }

    fn under_way(&self) -> u64 {
        let open = self
            .connections
            .iter()
            .filter(|connection| connection.due.is_some())
            .count();
        (open + self.waiting.len()) as u64
    }

    fn report(&self, duration: Duration) -> Report {
        let (latencies, seconds) = (self.latencies.summary(), duration.as_secs_f64());
        Report {
            requests: latencies.count,
            errors: self.errors,
            seconds,
            rps: latencies.count as f64 / seconds,
            p50_us: latencies.p50_us,
            p99_us: latencies.p99_us,
            p999_us: latencies.p999_us,
            requests_total: self.requests_total,
        }
    }
}

fn connect(address: SocketAddr) -> Result<Connection> {
    let stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(Connection {
        stream,
        outbox: Outbox::default(),
        due: None,
        answer: Vec::new(),
    })
}

/// Length of the whole answer, head included; `None` while its head is not complete.
fn answer_length(answer: &[u8]) -> Result<Option<usize>> {
    let Some(head) = answer
        .windows(HEAD_END.len())
        .position(|window| window == HEAD_END)
    else {
        if answer.len() > HEAD_MAX_BYTES {
            bail!("the answer's head is longer than {HEAD_MAX_BYTES} bytes");
        }
        return Ok(None);
    };
    let text = std::str::from_utf8(&answer[..head]).context("the answer's head is not text")?;
    let mut lines = text.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") {
        bail!("the server answered {status:?}");
    }
    let body = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .context("the answer has no Content-Length")?
        .1;
    let body: usize = body
        .trim()
        .parse()
        .context("Content-Length is not a number")?;
    Ok(Some(head + HEAD_END.len() + body))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;
    use crate::load::echo;

    fn plan(address: SocketAddr) -> Plan {
        Plan {
            address,
            connections: 4,
            duration: Duration::from_millis(200),
            warm_up: Duration::from_millis(50),
            rate: None,
        }
    }

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        thread::spawn(move || echo::serve::<FixedResponse>(&[listener]));
        address
    }

    #[test]
    fn the_body_has_the_length_its_head_says() {
        assert_eq!(
            answer_length(RESPONSE).expect("well formed"),
            Some(RESPONSE.len())
        );
    }

    #[test]
    fn requests_cut_anywhere_are_answered_once_each() {
        let two = [REQUEST, REQUEST].concat();
        for cut in 0..two.len() {
            let (mut answer, mut replies) = (FixedResponse::default(), 0);
            answer.take(&two[..cut], &mut |_| replies += 1);
            answer.take(&two[cut..], &mut |_| replies += 1);
            assert_eq!(replies, 2, "cut at {cut}");
        }
    }

    #[test]
    fn as_fast_as_it_goes_every_request_is_answered() {
        let report = run(&plan(server())).expect("a run");
        assert_eq!(report.errors, 0);
        assert!(
            report.requests > 0 && report.requests_total >= report.requests,
            "{report:?}"
        );
        assert!(
            report.p50_us > 0.0 && report.p50_us <= report.p999_us,
            "{report:?}"
        );
    }

    #[test]
    fn at_a_rate_exactly_the_requests_due_are_counted() {
        let report = run(&Plan {
            rate: Some(1000),
            ..plan(server())
        })
        .expect("a run");
        assert_eq!((report.requests, report.errors), (200, 0));
        assert_eq!(report.requests_total, 250);
    }

    /// A server that does not answer anything until it has seen the tenth request, on connections that wait.
    #[test]
    fn a_stall_is_charged_to_every_request_it_delays() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let stall = Duration::from_millis(100);
        thread::spawn(move || {
            static SERVED: AtomicUsize = AtomicUsize::new(0);
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = vec![0; REQUEST.len()];
            while stream.read_exact(&mut request).is_ok() {
                if SERVED.fetch_add(1, Ordering::Relaxed) == 0 {
                    // The stall is what is tested; it is virtual for nobody but the generator's clock.
                    crate::wait::pace_until(Instant::now() + stall);
                }
                if stream.write_all(RESPONSE).is_err() {
                    return;
                }
            }
        });
        let plan = Plan {
            connections: 1,
            warm_up: Duration::ZERO,
            rate: Some(1000),
            ..plan(address)
        };
        let report = run(&plan).expect("a run");
        assert_eq!(report.requests, 200);
        // 100 of 200 requests were due during the stall, half of them in its first half; had they been timed from
        // when they were sent, a single one would be slow.
        assert!(report.p99_us > 50_000.0, "{report:?}");
    }

    #[test]
    fn answers_that_are_none_are_errors() {
        assert!(
            answer_length(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
                .is_err()
        );
        assert!(answer_length(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        assert!(answer_length(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n").is_err());
        assert!(answer_length(&[b'x'; HEAD_MAX_BYTES + 1]).is_err());
        assert_eq!(
            answer_length(b"HTTP/1.1 200 OK\r\nConte").expect("not yet"),
            None
        );
    }
}
