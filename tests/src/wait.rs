//! The one place of the tests that lets time pass: bounded polling, and pacing for load generators.

use std::{
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::netns;

/// Pause between two looks at a condition. Short enough not to be felt, long enough not to steal the CPU that the
/// condition needs to come true on a machine of two cores.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Longest wait for one TCP connect of [`accepts`].
const CONNECT_LIMIT: Duration = Duration::from_millis(500);

/// Looks at a condition until it yields a value, for at most `limit`.
///
/// # Errors
/// The probe's own error at once; after `limit`, an error that names `what` was waited for.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        pause(POLL_INTERVAL);
    }
}

/// Whether something accepts TCP connections on `address`, dialled from the network namespace `netns`.
///
/// # Errors
/// The namespace cannot be entered.
pub fn accepts(netns: &Path, address: SocketAddr) -> Result<bool> {
    netns::within(netns, || {
        TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok()
    })
}

/// Blocks until the clock shows `at`: how a load generator keeps its rate.
pub fn pace_until(at: Instant) {
    let now = Instant::now();
    if at > now {
        pause(at - now);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place where tests and load generators let time pass"
)]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
