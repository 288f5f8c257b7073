//! Reading metrics in Prometheus' text format.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the metric.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// All samples of a scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// In the order of the text.
    pub samples: Vec<Sample>,
}

impl Sample {
    /// The value of a label; empty if there is none.
    #[must_use]
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

impl Metrics {
    /// Reads a scrape.
    ///
    /// # Errors
    /// A line that is no sample.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples =
            lines.map(|line| sample(line).with_context(|| format!("metrics line {line:?}")));
        Ok(Self {
            samples: samples.collect::<Result<_>>()?,
        })
    }

    /// The samples with this name whose labels contain these.
    pub fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(label, value)| sample.label(label) == *value)
        })
    }

    /// The sum of the samples with this name whose labels contain these; 0 if there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }
}

fn sample(line: &str) -> Result<Sample> {
    let (name, rest) = line.split_at(line.find(['{', ' ']).context("no value")?);
    let mut labels = BTreeMap::new();
    let mut rest = rest;
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(behind) = rest.strip_prefix('}') {
                rest = behind;
                break;
            }
            let (label, quoted) = rest.split_once("=\"").context("a label without a value")?;
            let (value, behind) = unquote(quoted)?;
            labels.insert(label.trim().to_owned(), value);
            rest = behind;
        }
    }
    let value = rest.split_whitespace().next().context("no value")?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().context("the value is no number")?,
    })
}

/// Reads up to the closing quote; backslash escapes a quote, a backslash and (as `n`) a newline.
fn unquote(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, text.get(at + 1..).unwrap_or_default())),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped)) => value.push(escaped),
                None => break,
            },
            _ => value.push(character),
        }
    }
    bail!("a label value without its closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# HELP x_total Things.\n# TYPE x_total counter\n\
        x_total{direction=\"inbound\",who=\"a, \\\"b\\\" {c}\"} 3\nx_total{direction=\"outbound\"} 4\n\nup 1 1700000000\n\
        bucket{le=\"+Inf\"} +Inf\n";

    #[test]
    fn samples_labels_and_sums_are_read() -> Result<()> {
        let metrics = Metrics::parse(SCRAPE)?;
        assert_eq!(metrics.samples[0].label("who"), "a, \"b\" {c}");
        assert_eq!(metrics.sum("x_total", &[]), 7.0);
        assert_eq!(metrics.sum("x_total", &[("direction", "outbound")]), 4.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("absent", &[]), 0.0);
        Ok(())
    }

    #[test]
    fn nonsense_is_an_error() {
        for text in ["x", "x{a=\"b} 1", "x{a} 1", "x one"] {
            assert!(Metrics::parse(text).is_err(), "{text:?} was accepted");
        }
    }
}
