//! What the client counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::End;
use crate::histogram::Histogram;

/// Figures of a run; "lost = 0" means that [`Report::lost`] is zero.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Connections tried.
    pub connections: u64,
    /// Connections that ended as they should.
    pub complete: u64,
    /// Records echoed or received right.
    pub records: u64,
    /// Failed connects by error (`ECONNREFUSED`, `ETIMEDOUT`, …).
    pub connect_errors: BTreeMap<String, u64>,
    /// Connections ended by RST (or EPIPE) before their time.
    pub resets: u64,
    /// Connections ended by FIN before their time.
    pub early_eofs: u64,
    /// Records missing between two that came.
    pub gaps: u64,
    /// Records that came twice or late.
    pub repeats: u64,
    /// Records damaged or of another connection.
    pub damaged: u64,
    /// Waits for a record longer than the stall bound.
    pub stalls: u64,
    /// Reads that gave up after the time limit.
    pub timeouts: u64,
    /// Other errors.
    pub other_errors: u64,
    /// How the connections ended, as the client saw it.
    pub ends: BTreeMap<String, u64>,
    /// Connect latency, microseconds: p50, p99, p99.9, max.
    pub connect_us: Percentiles,
    /// Latency from a record to its echo, microseconds.
    pub echo_us: Percentiles,
    /// Time from the connect to the first byte of the server, microseconds (banner and answer modes).
    pub first_byte_us: Percentiles,
}

/// Percentiles of a latency, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

impl From<&Histogram> for Percentiles {
    fn from(histogram: &Histogram) -> Self {
        let summary = histogram.summary();
        Self {
            p50: summary.p50_us,
            p99: summary.p99_us,
            p999: summary.p999_us,
            max: summary.max_us,
        }
    }
}

impl Report {
    /// Sum of everything that counts as lost.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.connect_errors.values().sum::<u64>()
            + self.resets
            + self.early_eofs
            + self.gaps
            + self.repeats
            + self.damaged
            + self.stalls
            + self.timeouts
            + self.other_errors
    }

    /// Reads the report that the client printed.
    ///
    /// # Errors
    /// It is not one.
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

/// A report in the making, with the histograms.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub report: Report,
    pub connect: Histogram,
    pub echo: Histogram,
    pub first_byte: Histogram,
}

impl Tally {
    pub(super) fn ended(&mut self, end: End) {
        let name = format!("{end:?}").to_lowercase();
        *self.report.ends.entry(name).or_default() += 1;
    }

    /// Counts an end that came too early.
    pub(super) fn failed(&mut self, error: &std::io::Error) {
        let end = End::of(error);
        match end {
            End::Fin => self.report.early_eofs += 1,
            End::Rst | End::BrokenPipe => self.report.resets += 1,
            End::Timeout => self.report.timeouts += 1,
            End::Error if error.kind() == std::io::ErrorKind::InvalidData => {
                self.report.damaged += 1
            }
            End::Error | End::Ours => self.report.other_errors += 1,
        }
        self.ended(end);
    }

    pub(super) fn merge(&mut self, other: Self) {
        let (mine, theirs) = (&mut self.report, other.report);
        mine.connections += theirs.connections;
        mine.complete += theirs.complete;
        mine.records += theirs.records;
        mine.resets += theirs.resets;
        mine.early_eofs += theirs.early_eofs;
        mine.gaps += theirs.gaps;
        mine.repeats += theirs.repeats;
        mine.damaged += theirs.damaged;
        mine.stalls += theirs.stalls;
        mine.timeouts += theirs.timeouts;
        mine.other_errors += theirs.other_errors;
        for (mine, theirs) in [
            (&mut mine.connect_errors, theirs.connect_errors),
            (&mut mine.ends, theirs.ends),
        ] {
            for (name, count) in theirs {
                *mine.entry(name).or_default() += count;
            }
        }
        self.connect.merge(&other.connect);
        self.echo.merge(&other.echo);
        self.first_byte.merge(&other.first_byte);
    }

    pub(super) fn finish(mut self) -> Report {
        self.report.connect_us = (&self.connect).into();
        self.report.echo_us = (&self.echo).into();
        self.report.first_byte_us = (&self.first_byte).into();
        self.report
    }
}
