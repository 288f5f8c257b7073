//! From samples to a table and to JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::figures::{DIRECT, Figure};

/// All values taken, by figure and variant.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(String, String), Vec<f64>>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, figure: &str, variant: &str, value: f64) {
        self.0
            .entry((figure.to_owned(), variant.to_owned()))
            .or_default()
            .push(value);
    }

    fn of(&self, figure: &str, variant: &str) -> &[f64] {
        self.0
            .get(&(figure.to_owned(), variant.to_owned()))
            .map_or(&[], Vec::as_slice)
    }
}

/// One figure of one variant.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Name of the figure.
    pub figure: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// `direct`, `weft`, or a peer's name.
    pub variant: String,
    /// Median of the repeats.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// A row per figure and variant that has samples.
pub fn rows(figures: &[&'static Figure], variants: &[&str], samples: &Samples) -> Vec<Row> {
    let mut rows = Vec::new();
    for figure in figures {
        for variant in variants {
            let mut values = samples.of(figure.name, variant).to_vec();
            values.sort_by(f64::total_cmp);
            let (Some(min), Some(max), Some(median)) =
                (values.first(), values.last(), median(&values))
            else {
                continue;
            };
            rows.push(Row {
                figure: figure.name,
                unit: figure.unit,
                variant: (*variant).to_owned(),
                median,
                min: *min,
                max: *max,
            });
        }
    }
    rows
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

/// A line per figure: median [min-max] of each variant, and the ratio to `direct` of each but `direct`.
pub fn table(figures: &[&'static Figure], variants: &[&str], rows: &[Row]) -> String {
    let mut lines = vec![vec!["FIGURE".to_owned(), "UNIT".to_owned()]];
    for variant in variants {
        lines[0].push((*variant).to_owned());
        if *variant != DIRECT {
            lines[0].push(format!("{variant}/direct"));
        }
    }
    for figure in figures {
        let row = |variant: &str| {
            rows.iter()
                .find(|row| row.figure == figure.name && row.variant == variant)
        };
        let direct = row(DIRECT).map(|row| row.median);
        let mut line = vec![figure.name.to_owned(), figure.unit.to_owned()];
        for variant in variants {
            let row = row(variant);
            line.push(row.map_or_else(
                || "-".to_owned(),
                |row| {
                    format!(
                        "{} [{}-{}]",
                        number(row.median),
                        number(row.min),
                        number(row.max)
                    )
                },
            ));
            if *variant != DIRECT {
                let ratio = row.zip(direct).filter(|(_, direct)| *direct != 0.0);
                line.push(ratio.map_or_else(
                    || "-".to_owned(),
                    |(row, direct)| format!("{:.3}", row.median / direct),
                ));
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

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (variant, values) in [("direct", [40.0, 50.0, 45.0]), ("weft", [10.0, 30.0, 15.0])] {
            for value in values {
                samples.add("bulk-1", variant, value);
            }
        }
        samples.add("rss-idle-mb", "weft", 12.345);
        samples
    }

    fn figures() -> Vec<&'static Figure> {
        ["bulk-1", "rss-idle-mb", "enrol-ms"]
            .map(|name| figures::parse(name).expect("known"))
            .to_vec()
    }

    #[test]
    fn a_table_with_ratios() {
        let variants = ["direct", "weft"];
        let rows = rows(&figures(), &variants, &samples());
        let expected = "\
FIGURE       UNIT    direct            weft              weft/direct
bulk-1       Gbit/s  45.0 [40.0-50.0]  15.0 [10.0-30.0]  0.333
rss-idle-mb  MB      -                 12.3 [12.3-12.3]  -
enrol-ms     ms      -                 -                 -
";
        assert_eq!(table(&figures(), &variants, &rows), expected);
    }

    #[test]
    fn json_has_the_fields_of_the_contract_and_no_empty_figures() {
        let rows = rows(&figures(), &["direct", "weft"], &samples());
        assert_eq!(rows.len(), 3);
        assert_eq!(
            serde_json::to_value(&rows[1]).expect("serialisable"),
            serde_json::json!({"figure": "bulk-1", "unit": "Gbit/s", "variant": "weft",
                "median": 15.0, "min": 10.0, "max": 30.0})
        );
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
