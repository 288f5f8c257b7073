//! Structured logs to standard error, with a filter that can be changed while running. Nobody who logs waits for
//! whoever reads them: see [`log_queue`](super::log_queue).

use std::{
    io::{self, IsTerminal as _},
    sync::LazyLock,
    time::Duration,
};

use mesh_api::one_line::OneLine;
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
    let lines = tracing_subscriber::fmt::layer().with_ansi(io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        Format::Text => {
            let lines_of_queue = queue.clone();
            registry
                .with(lines.with_writer(move || OneLine(lines_of_queue.clone())))
                .try_init()?;
        }
        // JSON escapes control characters by itself (RFC 8259 section 7).
        Format::Json => registry
            .with(lines.with_writer(queue.clone()).json().flatten_event(true))
            .try_init()?,
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
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;

    /// What one event with a hostile value looks like.
    fn line_of(value: &str) -> String {
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = written.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || OneLine(Sink(sink.clone())));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            tracing::info!(name = %value, debug = ?value, "message of {value}");
        });
        let bytes = written.lock().expect("not poisoned").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_value_begins_a_line_of_its_own_or_moves_the_cursor() {
        let forged = "web\r\n2026-01-01T00:00:00Z  INFO access: forged\x1b[2J\x07";
        let line = line_of(forged);
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        assert!(line.ends_with('\n') && line.contains("forged"), "{line:?}");
        let control = |c: char| c.is_ascii_control() && c != '\n';
        assert!(!line.contains(control), "{line:?}");
        assert!(
            line_of("wéb").contains("name=wéb"),
            "other text is left alone"
        );
    }

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
