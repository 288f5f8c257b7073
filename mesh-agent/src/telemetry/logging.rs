//! Structured logs to standard error, with a filter that can be changed while running.

use std::io::IsTerminal as _;

use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

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
/// When the filter is malformed or logging was set up before.
pub fn init(filter: &str, format: Format) -> Result<LogControl, LogError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    // Colours are for a person in front of a terminal, not for a file or a log collector.
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        Format::Text => registry.with(lines).try_init()?,
        Format::Json => registry.with(lines.json().flatten_event(true)).try_init()?,
    }
    Ok(LogControl { handle })
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
