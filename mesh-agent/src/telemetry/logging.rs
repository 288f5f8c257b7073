//! Structured logs to standard error, with a filter that can be changed while running. Nobody who logs waits for
//! whoever reads them: see [`log_queue`](super::log_queue).

use std::{
    io::{self, IsTerminal as _},
    sync::LazyLock,
    time::Duration,
};

use prometheus::IntCounter;
use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

use super::log_queue::LogQueue;

/// Lines that were lost. One per process, as is the log.
static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    IntCounter::new(
        "weft_log_lines_dropped_total",
        "Log lines lost because standard error took them too slowly",
    )
    .expect("a constant name")
});

/// How long an ending process waits for its last lines to be written.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// The counter of lost lines, for the metrics.
pub(super) fn dropped_lines() -> IntCounter {
    DROPPED.clone()
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For a human.
    Text,
    /// One JSON object per line.
    Json,
}

/// Longest filter accepted, bytes.
pub const FILTER_MAX_BYTES: usize = 1024;

/// Changes the filter of the running process.
#[derive(Debug, Clone)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
    queue: LogQueue,
}

/// Why logging cannot be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is longer than [`FILTER_MAX_BYTES`].
    #[error("a log filter may be {FILTER_MAX_BYTES} bytes long, this one has {0}")]
    TooLong(usize),
    /// The filter is malformed.
    #[error(
        "log filter {filter:?}: {source} (for example `info,mesh_agent::proxy=debug,access=off`)"
    )]
    Filter {
        /// The filter as given.
        filter: String,
        /// What the parser says.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The thread that writes cannot be started. Look at the process limits.
    #[error("cannot start the thread that writes logs: {0}")]
    Thread(#[source] io::Error),
    /// The process already logs.
    #[error("logging is already set up: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// The subscriber is gone.
    #[error("the log filter cannot be changed: {0}")]
    Reload(#[from] reload::Error),
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    if filter.len() > FILTER_MAX_BYTES {
        return Err(LogError::TooLong(filter.len()));
    }
    EnvFilter::try_new(filter).map_err(|source| LogError::Filter {
        filter: filter.to_owned(),
        source,
    })
}

/// Makes this process log to standard error through `filter`. Once per process.
///
/// # Errors
/// When the filter is malformed, logging was set up before, or there is no thread to be had.
pub fn init(filter: &str, format: Format) -> Result<LogControl, LogError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    // Colours are for a person in front of a terminal, not for a file or a log collector.
    let queue = LogQueue::start(io::stderr(), dropped_lines()).map_err(LogError::Thread)?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(queue.clone())
        .with_ansi(io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        Format::Text => registry.with(lines).try_init()?,
        Format::Json => registry.with(lines.json().flatten_event(true)).try_init()?,
    }
    Ok(LogControl { handle, queue })
}

impl LogControl {
    /// The filter now.
    ///
    /// # Errors
    /// When the subscriber is gone.
    pub fn filter(&self) -> Result<String, LogError> {
        Ok(self.handle.with_current(ToString::to_string)?)
    }

    /// Replaces the filter. A malformed one changes nothing.
    ///
    /// # Errors
    /// When the filter is malformed.
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        Ok(self.handle.reload(parse(filter)?)?)
    }

    /// Waits, not for long, until what was logged has been written: for the end of the process.
    pub fn flush(&self) {
        self.queue.flush(FLUSH_PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_changes_and_a_malformed_one_changes_nothing() {
        let control = init("info,access=off", Format::Text).expect("first in this process");
        assert_eq!(control.filter().expect("alive"), "access=off,info");
        control.set_filter("warn").expect("well-formed");
        for bad in ["mesh_agent=verbose", &"a".repeat(FILTER_MAX_BYTES + 1)] {
            assert!(control.set_filter(bad).is_err(), "{bad} must be refused");
        }
        assert_eq!(control.filter().expect("alive"), "warn");
        assert!(matches!(
            init("info", Format::Json),
            Err(LogError::Twice(_))
        ));
    }
}
