//! Connections rather than bytes: how many can be made, and what one costs.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::{ANSWER_LIMIT, PING_BYTES};
use crate::{cgroup, histogram::Histogram, wait};

/// Failures after which a run is worthless.
const ERRORS_MAX: u64 = 100;

/// Connections timed in one cgroup before the other has its turn: some ten milliseconds, so that whatever else the
/// machine does hits both alike, and long enough that moving the process (itself milliseconds) does not eat the time.
const BATCH: usize = 1000;

/// Longest wait for one attempt of [`first_answer`]: a mesh that is not there yet may drop packets silently.
const ATTEMPT_LIMIT: Duration = Duration::from_millis(50);

/// Pause between attempts of [`first_answer`]: the resolution of what it measures.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(1);

/// New connections made in a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RateReport {
    /// Connections with a whole ping-pong.
    pub connections: u64,
    /// Connections that failed.
    pub errors: u64,
    /// Connections per second.
    pub per_second: f64,
    /// Median time of connect, ping-pong and close, microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

/// Connects, plays one ping-pong and closes, on `concurrency` threads, which go through the addresses in turn, each
/// from another one on.
///
/// # Errors
/// More than 100 connections failed, or there is no address.
pub fn rate(
    addresses: &[SocketAddr],
    concurrency: usize,
    duration: Duration,
) -> Result<RateReport> {
    if addresses.is_empty() {
        bail!("no address to connect to");
    }
    let start = Instant::now();
    let workers: Vec<_> = (0..concurrency)
        .map(|number| {
            let mut addresses = addresses.to_vec();
            let first = number % addresses.len();
            addresses.rotate_left(first);
            thread::spawn(move || worker(&addresses, start + duration))
        })
        .collect();
    let (mut times, mut errors) = (Histogram::default(), 0);
    for worker in workers {
        let (more, failed) = worker.join().map_err(|_| anyhow!("a worker panicked"))??;
        times.merge(&more);
        errors += failed;
    }
    let seconds = start.elapsed().as_secs_f64();
    let times = times.summary();
    Ok(RateReport {
        connections: times.count,
        errors,
        per_second: times.count as f64 / seconds,
        p50_us: times.p50_us,
        p99_us: times.p99_us,
    })
}

fn worker(addresses: &[SocketAddr], end: Instant) -> Result<(Histogram, u64)> {
    let (mut times, mut errors) = (Histogram::default(), 0);
    for &address in addresses.iter().cycle() {
        let started = Instant::now();
        if started >= end {
            break;
        }
        match ping(address, ANSWER_LIMIT) {
            Ok(stream) => {
                drop(stream);
                times.add(started.elapsed());
            }
            Err(error) => {
                errors += 1;
                if errors > ERRORS_MAX {
                    bail!("more than {ERRORS_MAX} connections failed, the last with: {error:#}");
                }
            }
        }
    }
    Ok((times, errors))
}

/// A new connection on which one ping was answered.
pub(super) fn ping(address: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[0x50; PING_BYTES])?;
    let mut pong = [0; PING_BYTES];
    stream.read_exact(&mut pong).context("no pong")?;
    Ok(stream)
}

/// When a ping was answered for the first time, as the machine's clock shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstAnswer {
    /// Nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Attempts that failed before.
    pub failed: u64,
}

/// Tries until a ping is answered.
///
/// # Errors
/// None is within `limit`; the last attempt's reason.
pub fn first_answer(address: SocketAddr, limit: Duration) -> Result<FirstAnswer> {
    let end = Instant::now() + limit;
    let mut failed = 0;
    loop {
        match ping(address, ATTEMPT_LIMIT) {
            Ok(_) => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
                return Ok(FirstAnswer {
                    unix_nanos: u64::try_from(since.as_nanos())?,
                    failed,
                });
            }
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!(
                    "no answer within {limit:?}, {failed} attempts before"
                )));
            }
            Err(_) => failed += 1,
        }
        wait::pace_until(Instant::now() + ATTEMPT_PAUSE);
    }
}

/// What one connection costs its client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CostReport {
    /// In which cgroup; empty for the one it was started in.
    pub cgroup: String,
    /// Connections timed.
    pub connections: u64,
    /// Median time of socket, connect and close, microseconds.
    pub median_us: f64,
}

/// Times socket, connect and closing by reset (which leaves no TIME_WAIT behind), for `duration`, in batches that
/// alternate between `cgroups`. A socket belongs to the cgroup that its process is in when it is made, so one
/// process compares two cgroups with different programs attached, milliseconds apart.
///
/// # Errors
/// A connection fails, or a cgroup cannot be joined.
pub fn cost(
    address: SocketAddr,
    cgroups: &[PathBuf],
    duration: Duration,
) -> Result<Vec<CostReport>> {
    let stay = [PathBuf::new()];
    let rooms = if cgroups.is_empty() {
        &stay[..]
    } else {
        cgroups
    };
    // Every time is kept: a histogram's buckets are wider than the difference that is looked for.
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); rooms.len()];
    let end = Instant::now() + duration;
    while Instant::now() < end {
        for (room, times) in rooms.iter().zip(&mut times) {
            if !room.as_os_str().is_empty() {
                cgroup::join(room)?;
            }
            for _ in 0..BATCH {
                times.push(once(address)?);
            }
        }
    }
    let report = |(room, times): (&PathBuf, &mut Vec<Duration>)| CostReport {
        cgroup: room.display().to_string(),
        connections: times.len() as u64,
        median_us: median(times).as_nanos() as f64 / 1e3,
    };
    Ok(rooms.iter().zip(&mut times).map(report).collect())
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn once(address: SocketAddr) -> Result<Duration> {
    let started = Instant::now();
    let stream =
        TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    setsockopt(
        &stream,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    drop(stream);
    Ok(started.elapsed())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::load::echo::{self, Echo};

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        thread::spawn(move || echo::serve::<Echo>(&[listener]));
        address
    }

    /// A port at which nobody listens.
    fn nobody() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
    }

    #[test]
    fn connections_are_counted_and_timed() {
        let servers = [server(), server(), server()];
        let report = rate(&servers, 2, Duration::from_millis(50)).expect("a run");
        assert!(
            report.connections > 0 && report.errors == 0 && report.p50_us > 0.0,
            "{report:?}"
        );
    }

    #[test]
    fn every_address_has_its_turn() {
        let (near, far) = (server(), nobody());
        let error = rate(&[near, far], 1, Duration::from_secs(60)).expect_err("one is dead");
        assert!(error.to_string().contains("cannot connect"), "{error:#}");
        assert!(rate(&[], 1, Duration::ZERO).is_err());
    }

    #[test]
    fn a_dead_server_ends_the_run() {
        let error = rate(&[nobody()], 1, Duration::from_secs(60)).expect_err("nobody listens");
        assert!(error.to_string().contains("cannot connect"), "{error:#}");
    }

    #[test]
    fn the_first_answer_is_found_or_the_reason_why_not() {
        assert_eq!(
            first_answer(server(), ANSWER_LIMIT)
                .expect("at once")
                .failed,
            0
        );
        let error = first_answer(nobody(), Duration::ZERO).expect_err("nobody listens");
        assert!(format!("{error:#}").contains("cannot connect"), "{error:#}");
    }

    #[test]
    fn the_cost_of_a_connection_is_timed_where_it_stands() {
        let report = cost(server(), &[], Duration::from_millis(20)).expect("a run");
        assert_eq!(report.len(), 1);
        assert!(
            report[0].median_us > 0.0 && report[0].connections.is_multiple_of(BATCH as u64),
            "{report:?}"
        );
    }
}
