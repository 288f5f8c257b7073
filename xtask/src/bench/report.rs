//! From samples to tables and to JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::figures::{ADDED, Bound, DIRECT, Figure, WEFT};

/// Unit of a ratio in JSON.
const RATIO: &str = "ratio";

/// All values taken, by figure and variant, and then by repeat.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(String, String), BTreeMap<u32, f64>>);

impl Samples {
    /// Adds one; a repeat takes a value once.
    pub fn add(&mut self, repeat: u32, figure: &str, variant: &str, value: f64) {
        self.0
            .entry((figure.to_owned(), variant.to_owned()))
            .or_default()
            .insert(repeat, value);
    }

    /// Adds what every variant adds to `direct`, repeat by repeat.
    pub fn derive_added(&mut self, variants: &[&str]) {
        let (added, of) = ADDED;
        for variant in variants.iter().filter(|variant| **variant != DIRECT) {
            let differences = self.paired(of, variant, DIRECT, |own, direct| Some(own - direct));
            for (repeat, difference) in differences {
                self.add(repeat, added, variant, difference);
            }
        }
    }

    fn of(&self, figure: &str, variant: &str) -> Vec<f64> {
        self.0
            .get(&(figure.to_owned(), variant.to_owned()))
            .map_or_else(Vec::new, |values| values.values().copied().collect())
    }

    /// What `combine` makes of two variants' values, where a repeat has both.
    fn paired(
        &self,
        figure: &str,
        one: &str,
        other: &str,
        combine: impl Fn(f64, f64) -> Option<f64>,
    ) -> Vec<(u32, f64)> {
        let values = |variant: &str| self.0.get(&(figure.to_owned(), variant.to_owned()));
        let (Some(one), Some(other)) = (values(one), values(other)) else {
            return Vec::new();
        };
        one.iter()
            .filter_map(|(repeat, value)| Some((*repeat, combine(*value, *other.get(repeat)?)?)))
            .collect()
    }
}

/// One figure of one variant, or the ratio of two variants.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Name of the figure.
    pub figure: &'static str,
    /// Its unit, or `ratio`.
    pub unit: &'static str,
    /// `direct`, `weft`, or a peer's name; `weft/direct` and the like for ratios.
    pub variant: String,
    /// Median of the repeats.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// What was promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promised: Option<String>,
    /// Whether the median keeps the promise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<bool>,
}

impl Row {
    fn new(
        figure: &'static Figure,
        unit: &'static str,
        variant: String,
        mut values: Vec<f64>,
        promise: Option<Bound>,
    ) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let median = median(&values)?;
        Some(Self {
            figure: figure.name,
            unit,
            variant,
            median,
            min: *values.first()?,
            max: *values.last()?,
            promised: promise.map(|bound| bound.to_string()),
            kept: promise.map(|bound| bound.holds(median)),
        })
    }

    fn cell(&self) -> String {
        format!(
            "{} [{}-{}]",
            number(self.median),
            number(self.min),
            number(self.max)
        )
    }

    fn verdict(&self) -> String {
        match (&self.promised, self.kept) {
            (Some(promised), Some(true)) => format!("{promised} ok"),
            (Some(promised), _) => format!("{promised} MISSED"),
            _ => String::new(),
        }
    }
}

/// A ratio of two variants that is reported.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Whose figures are divided.
    pub one: String,
    /// By whose.
    pub other: String,
    /// What was promised of it, figure by figure.
    pub promise: fn(&Figure) -> Option<Bound>,
}

impl Comparison {
    fn name(&self) -> String {
        format!("{}/{}", self.one, self.other)
    }
}

/// A row per figure and variant that has samples, then one per ratio. A ratio is taken within a repeat, so that what
/// changed between repeats is not in it.
pub fn rows(
    figures: &[&'static Figure],
    variants: &[&str],
    comparisons: &[Comparison],
    samples: &Samples,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for figure in figures {
        for variant in variants {
            let promise = figure.value.filter(|_| *variant == WEFT);
            let values = samples.of(figure.name, variant);
            let variant = (*variant).to_owned();
            rows.extend(Row::new(figure, figure.unit, variant, values, promise));
        }
    }
    for figure in figures {
        for comparison in comparisons {
            let Comparison {
                one,
                other,
                promise,
            } = comparison;
            let ratio = |one: f64, other: f64| (other > 0.0).then(|| one / other);
            let ratios = samples.paired(figure.name, one, other, ratio);
            let values = ratios.into_iter().map(|(_, ratio)| ratio).collect();
            let (name, promise) = (comparison.name(), promise(figure));
            rows.extend(Row::new(figure, RATIO, name, values, promise));
        }
    }
    rows
}

/// What was promised and not kept, a line each.
pub fn missed(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .filter(|row| row.kept == Some(false))
        .map(|row| {
            format!(
                "{} of {}: {}, promised {}",
                row.figure,
                row.variant,
                row.cell(),
                row.promised.as_deref().unwrap_or_default()
            )
        })
        .collect()
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

/// Two tables of a line per figure, medians [smallest-largest]: the variants' values, and the ratios. What was promised
/// stands beside.
pub fn tables(
    figures: &[&'static Figure],
    variants: &[&str],
    comparisons: &[Comparison],
    rows: &[Row],
) -> String {
    let values: Vec<String> = variants.iter().map(|name| (*name).to_owned()).collect();
    let ratios: Vec<String> = comparisons.iter().map(Comparison::name).collect();
    let values = table("UNIT", figures, &values, rows, |figure| figure.unit);
    if !rows.iter().any(|row| row.unit == RATIO) {
        return values;
    }
    let ratios = table("BETTER", figures, &ratios, rows, better);
    format!("{values}\n{ratios}")
}

/// Which side of a figure is the good one.
fn better(figure: &Figure) -> &'static str {
    match figure.unit {
        "Gbit/s" | "/s" => "more",
        _ => "less",
    }
}

/// Figures without any cell are left out; so is the column of promises where there are none.
fn table(
    second: &str,
    figures: &[&'static Figure],
    columns: &[String],
    rows: &[Row],
    note: impl Fn(&Figure) -> &'static str,
) -> String {
    let find = |figure: &str, column: &String| {
        rows.iter()
            .find(|row| row.figure == figure && row.variant == *column)
    };
    let promises = |column: &String| {
        let mut rows = rows.iter().filter(|row| row.variant == *column);
        rows.any(|row| row.promised.is_some())
    };
    let mut head = vec!["FIGURE".to_owned(), second.to_owned()];
    for column in columns {
        head.push(column.clone());
        head.extend(promises(column).then(|| "PROMISED".to_owned()));
    }
    let mut lines = vec![head];
    for figure in figures {
        if !columns
            .iter()
            .any(|column| find(figure.name, column).is_some())
        {
            continue;
        }
        let mut line = vec![figure.name.to_owned(), note(figure).to_owned()];
        for column in columns {
            let row = find(figure.name, column);
            line.push(row.map_or_else(|| "-".to_owned(), Row::cell));
            if promises(column) {
                line.push(row.map(Row::verdict).unwrap_or_default());
            }
        }
        lines.push(line);
    }
    aligned(&lines)
}

fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Three significant digits, without an exponent.
pub fn number(value: f64) -> String {
    let magnitude = if value == 0.0 {
        0
    } else {
        value.abs().log10().floor() as i32
    };
    let decimals = usize::try_from(2 - magnitude).unwrap_or(0).min(6);
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures;

    const VARIANTS: [&str; 3] = ["direct", "weft", "other"];

    fn comparisons() -> [Comparison; 2] {
        let with = |other: &str, promise| Comparison {
            one: "weft".to_owned(),
            other: other.to_owned(),
            promise,
        };
        [
            with("direct", |figure| figure.to_direct),
            with("other", |figure| figure.to_peer),
        ]
    }

    /// Two repeats; the second one of a machine that is twice as fast.
    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (repeat, speed) in [(0, 1.0), (1, 2.0)] {
            for (variant, value) in [("direct", 40.0), ("weft", 16.0), ("other", 10.0)] {
                samples.add(repeat, "bulk-1", variant, value * speed);
            }
            for (variant, value) in [("direct", 20.0), ("weft", 60.0), ("other", 70.0)] {
                samples.add(repeat, "http-p50-1", variant, value / speed);
            }
        }
        samples.add(0, "rss-idle-mb", "weft", 12.345);
        samples.derive_added(&VARIANTS);
        samples
    }

    fn figures() -> Vec<&'static Figure> {
        [
            "bulk-1",
            "http-p50-1",
            "added-p50-1",
            "rss-idle-mb",
            "enrol-ms",
        ]
        .iter()
        .flat_map(|name| figures::parse(name).expect("known").0)
        .collect()
    }

    #[test]
    fn tables_with_ratios_within_repeats_and_promises() {
        let rows = rows(&figures(), &VARIANTS, &comparisons(), &samples());
        let expected = "\
FIGURE       UNIT    direct            weft              PROMISED  other
bulk-1       Gbit/s  60.0 [40.0-80.0]  24.0 [16.0-32.0]            15.0 [10.0-20.0]
http-p50-1   µs      15.0 [10.0-20.0]  45.0 [30.0-60.0]            52.5 [35.0-70.0]
added-p50-1  µs      -                 30.0 [20.0-40.0]            37.5 [25.0-50.0]
rss-idle-mb  MB      -                 12.3 [12.3-12.3]  ≤ 16 ok   -

FIGURE       BETTER  weft/direct          weft/other              PROMISED
bulk-1       more    0.400 [0.400-0.400]  1.60 [1.60-1.60]        ≥ 1.5 ok
http-p50-1   less    3.00 [3.00-3.00]     0.857 [0.857-0.857]
added-p50-1  less    -                    0.800 [0.800-0.800]     ≤ 0.8 ok
";
        let squeeze = |text: &str| {
            let lines = text
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>());
            lines.map(|words| words.join(" ")).collect::<Vec<_>>()
        };
        let shown = tables(&figures(), &VARIANTS, &comparisons(), &rows);
        assert_eq!(squeeze(&shown), squeeze(expected), "{shown}");
        assert_eq!(missed(&rows), [""; 0]);
    }

    #[test]
    fn a_promise_that_is_not_kept_is_named() {
        let mut samples = samples();
        samples.add(0, "bulk-1", "other", 16.0);
        samples.add(1, "bulk-1", "other", 32.0);
        let rows = rows(&figures(), &VARIANTS, &comparisons(), &samples);
        assert!(tables(&figures(), &VARIANTS, &comparisons(), &rows).contains("≥ 1.5 MISSED"));
        assert_eq!(
            missed(&rows),
            ["bulk-1 of weft/other: 1.00 [1.00-1.00], promised ≥ 1.5"]
        );
    }

    #[test]
    fn json_has_the_fields_of_the_contract_and_no_empty_figures() {
        let rows = rows(&figures(), &VARIANTS, &comparisons(), &samples());
        assert_eq!(
            serde_json::to_value(&rows[1]).expect("serialisable"),
            serde_json::json!({"figure": "bulk-1", "unit": "Gbit/s", "variant": "weft",
                "median": 24.0, "min": 16.0, "max": 32.0})
        );
        let ratio = rows.iter().find(|row| row.variant == "weft/other");
        assert_eq!(
            serde_json::to_value(ratio).expect("serialisable"),
            serde_json::json!({"figure": "bulk-1", "unit": "ratio", "variant": "weft/other",
                "median": 1.6, "min": 1.6, "max": 1.6, "promised": "≥ 1.5", "kept": true})
        );
        assert!(!rows.iter().any(|row| row.figure == "enrol-ms"));
    }

    #[test]
    fn medians_of_even_and_odd_counts() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.0, 0.012_345, 1.0, 9.876, 98.76, 987.6, 98_765.4].map(number);
        assert_eq!(
            shown,
            ["0.00", "0.0123", "1.00", "9.88", "98.8", "988", "98765"]
        );
    }
}
