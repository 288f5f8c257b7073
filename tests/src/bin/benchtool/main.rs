//! The bench's load generator: every server and client of `cargo xtask bench`, one process each, so that its
//! processor time can be told apart. Clients print one JSON object.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use mesh_tests::{
    load::{
        bulk, connect,
        echo::{self, Echo},
        hold, http,
    },
    netns,
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::Backlog,
};
use serde::Serialize;

/// Connections that may wait to be accepted: what the kernel allows by default (`net.core.somaxconn`).
const QUEUE_MAX: i32 = 4096;

/// Servers and clients of the bench.
#[derive(Debug, Parser)]
#[command(name = "benchtool")]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Answers every HTTP/1.1 request with the same 64 bytes.
    HttpServer { listen: SocketAddr },
    /// Sends HTTP/1.1 requests on kept connections.
    HttpLoad {
        address: SocketAddr,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long, value_parser = seconds, default_value = "3")]
        seconds: Duration,
        #[arg(long, value_parser = seconds, default_value = "0.5")]
        warm_up: Duration,
        /// Requests per second; as many as go when absent.
        #[arg(long)]
        rate: Option<u32>,
    },
    /// Reads and counts.
    BulkServer { listen: SocketAddr },
    /// Writes as much as goes.
    BulkClient {
        address: SocketAddr,
        #[arg(long, default_value_t = 1)]
        streams: usize,
        #[arg(long, value_parser = seconds, default_value = "3")]
        seconds: Duration,
    },
    /// Sends back what it gets.
    EchoServer {
        listen: SocketAddr,
        /// Listens in this network namespace instead of its own; may be repeated.
        #[arg(long)]
        netns: Vec<PathBuf>,
    },
    /// Connects, plays one ping-pong, closes, and again; goes through the addresses in turn.
    ConnectLoad {
        #[arg(required = true)]
        address: Vec<SocketAddr>,
        #[arg(long, default_value_t = 16)]
        concurrency: usize,
        #[arg(long, value_parser = seconds, default_value = "3")]
        seconds: Duration,
    },
    /// Opens connections, plays one ping-pong on each, and holds them until killed.
    IdleHold {
        address: SocketAddr,
        /// From every namespace.
        #[arg(long, default_value_t = 1000)]
        connections: usize,
        /// Opens them in this network namespace instead of its own; may be repeated.
        #[arg(long)]
        netns: Vec<PathBuf>,
        /// Joins this cgroup for the sockets of a namespace, one per namespace in the same order.
        #[arg(long)]
        cgroup: Vec<PathBuf>,
    },
    /// Times socket, connect and close; alternates between cgroups when some are given.
    ConnectUs {
        address: SocketAddr,
        #[arg(long, value_parser = seconds, default_value = "3")]
        seconds: Duration,
        #[arg(long)]
        cgroup: Vec<PathBuf>,
    },
    /// Tries until a ping is answered and prints when that was.
    FirstAnswer {
        address: SocketAddr,
        #[arg(long, value_parser = seconds, default_value = "30")]
        limit: Duration,
    },
}

#[derive(Serialize)]
struct Held {
    held: usize,
}

fn main() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    match Cli::parse().mode {
        Mode::HttpServer { listen } => echo::serve::<http::FixedResponse>(&[bind(listen)?]),
        Mode::HttpLoad {
            address,
            connections,
            seconds,
            warm_up,
            rate,
        } => print(&http::run(&http::Plan {
            address,
            connections,
            duration: seconds,
            warm_up,
            rate,
        })?),
        Mode::BulkServer { listen } => bulk::serve(&bind(listen)?),
        Mode::BulkClient {
            address,
            streams,
            seconds,
        } => print(&bulk::run(address, streams, seconds)?),
        Mode::EchoServer { listen, netns } => echo::serve::<Echo>(&bind_all(listen, &netns)?),
        Mode::ConnectLoad {
            address,
            concurrency,
            seconds,
        } => print(&connect::rate(&address, concurrency, seconds)?),
        Mode::IdleHold {
            address,
            connections,
            netns,
            cgroup: cgroups,
        } => {
            let held = hold::hold(address, connections, &hold::Places { netns, cgroups })?;
            print(&Held { held: held.len() })?;
            loop {
                nix::unistd::pause();
            }
        }
        Mode::ConnectUs {
            address,
            seconds,
            cgroup,
        } => print(&connect::cost(address, &cgroup, seconds)?),
        Mode::FirstAnswer { address, limit } => print(&connect::first_answer(address, limit)?),
    }
}

/// The standard library's queue of 128 overflows when a client is faster than the server for a moment, and a lost SYN
/// then costs a second.
fn bind(listen: SocketAddr) -> Result<TcpListener> {
    let listener =
        TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    nix::sys::socket::listen(&listener, Backlog::new(QUEUE_MAX)?)
        .context("cannot lengthen the queue")?;
    Ok(listener)
}

/// One listener per namespace, or one where we are.
fn bind_all(listen: SocketAddr, netns: &[PathBuf]) -> Result<Vec<TcpListener>> {
    if netns.is_empty() {
        return Ok(vec![bind(listen)?]);
    }
    netns
        .iter()
        .map(|netns| netns::within(netns, || bind(listen))?)
        .collect()
}

fn print(report: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_are_positive_numbers() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["-1", "NaN", "inf", "three"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
