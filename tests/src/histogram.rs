//! A histogram of durations with buckets of about 1.6 % width: constant memory, cheap to add to, merged at the end.

use std::time::Duration;

use serde::Serialize;

/// Buckets per power of two, as a power of two: 64, so a value is known to 1/64.
const SUB_BUCKET_BITS: u32 = 6;

/// Largest value: 2^40 µs is twelve days.
const VALUE_BITS: u32 = 40;

const BUCKETS: usize = ((VALUE_BITS - SUB_BUCKET_BITS + 1) as usize) << SUB_BUCKET_BITS;

/// Counts of durations, in tenths of a microsecond inside.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_us: f64,
    max: u64,
}

/// What is reported of a histogram, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Largest value.
    pub max_us: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
            sum_us: 0.0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Adds a duration.
    pub fn add(&mut self, value: Duration) {
        let tenths = u64::try_from(value.as_nanos() / 100)
            .unwrap_or(u64::MAX)
            .min((1 << VALUE_BITS) - 1);
        self.counts[bucket_of(tenths)] += 1;
        self.total += 1;
        self.sum_us += tenths as f64 / 10.0;
        self.max = self.max.max(tenths);
    }

    /// Adds all values of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.sum_us += other.sum_us;
        self.max = self.max.max(other.max);
    }

    /// The value below or at which this share (0 to 1) of the values lies, in microseconds; 0 without values.
    #[must_use]
    pub fn quantile_us(&self, share: f64) -> f64 {
        let rank = (share * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_end_of(bucket).min(self.max) as f64 / 10.0;
            }
        }
        0.0
    }

    /// The usual figures.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            count: self.total,
            mean_us: if self.total == 0 {
                0.0
            } else {
                self.sum_us / self.total as f64
            },
            p50_us: self.quantile_us(0.5),
            p90_us: self.quantile_us(0.9),
            p99_us: self.quantile_us(0.99),
            p999_us: self.quantile_us(0.999),
            max_us: self.max as f64 / 10.0,
        }
    }
}

/// Values below 64 have a bucket each; above, the 64 values' worth of leading bits below the highest one pick it.
fn bucket_of(value: u64) -> usize {
    let highest = value.max(1).ilog2();
    let Some(shift) = highest.checked_sub(SUB_BUCKET_BITS) else {
        return value as usize;
    };
    (((shift as usize) + 1) << SUB_BUCKET_BITS)
        + ((value >> shift) as usize & ((1 << SUB_BUCKET_BITS) - 1))
}

fn upper_end_of(bucket: usize) -> u64 {
    let (row, column) = (
        bucket >> SUB_BUCKET_BITS,
        (bucket & ((1 << SUB_BUCKET_BITS) - 1)) as u64,
    );
    match row {
        0 => column,
        _ => ((((1 << SUB_BUCKET_BITS) + column + 1) << (row - 1)) - 1).max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_two_percent() {
        let mut histogram = Histogram::default();
        for us in 1..=10_000 {
            histogram.add(Duration::from_micros(us));
        }
        for (share, exact) in [
            (0.5, 5_000.0),
            (0.9, 9_000.0),
            (0.99, 9_900.0),
            (0.999, 9_990.0),
            (1.0, 10_000.0),
        ] {
            let found = histogram.quantile_us(share);
            assert!(
                (found - exact).abs() <= exact * 0.02,
                "{share}: {found}, not {exact}"
            );
        }
    }

    #[test]
    fn every_value_falls_into_its_bucket() {
        for value in (0..5_000).chain([1 << 20, (1 << 20) + 12_345, (1 << VALUE_BITS) - 1]) {
            let bucket = bucket_of(value);
            assert!(
                bucket < BUCKETS && upper_end_of(bucket) >= value,
                "{value} in bucket {bucket}"
            );
            assert!(
                bucket == 0 || upper_end_of(bucket - 1) < value,
                "{value} fits the bucket below {bucket}"
            );
        }
    }

    #[test]
    fn merging_is_adding() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        one.add(Duration::from_micros(10));
        other.add(Duration::from_micros(30));
        one.merge(&other);
        assert_eq!(
            (
                one.summary().count,
                one.summary().mean_us,
                one.summary().max_us
            ),
            (2, 20.0, 30.0)
        );
    }

    #[test]
    fn an_empty_histogram_reports_zeros() {
        assert_eq!(Histogram::default().summary(), Summary::default());
    }
}
