//! Which metrics and labels a PromQL expression names, to compare dashboards and alerts with what agents serve.
//!
//! It reads names and skips the rest: it must not accept a query that Prometheus refuses (promtool tells that), it must only
//! not miss a name.

use std::collections::{BTreeMap, BTreeSet};

/// Metric by metric, the labels that an expression selects by. Labels by which it groups belong to every metric in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Labels in braces, by metric.
    pub metrics: BTreeMap<String, BTreeSet<String>>,
    /// Labels of `by`, `without`, `on`, `ignoring`, `group_left` and `group_right`.
    pub grouping: BTreeSet<String>,
}

/// Words that are neither metrics nor functions.
const WORDS: [&str; 14] = [
    "and", "or", "unless", "bool", "offset", "atan2", "start", "end", "inf", "nan", "by",
    "without", "on", "ignoring",
];

/// Words before a list of labels.
const GROUPINGS: [&str; 6] = [
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
];

/// A piece of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Text,
    Sign(char),
}

/// Reads an expression; Grafana's `$variables` are skipped.
#[must_use]
pub fn names(expression: &str) -> Names {
    let tokens = tokens(expression);
    let mut names = Names::default();
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token {
            // A range or an offset: durations only.
            Token::Sign('[') => at = after(&tokens, at, ']'),
            Token::Word(word) => {
                let next = tokens.get(at);
                if GROUPINGS.contains(&word.as_str()) {
                    if next == Some(&Token::Sign('(')) {
                        let end = after(&tokens, at, ')');
                        names.grouping.extend(words(&tokens[at..end]));
                        at = end;
                    }
                } else if next.is_some_and(begins_arguments) || is_no_metric(word) {
                    // A function, an aggregation, or the like.
                } else {
                    let labels = names.metrics.entry(word.clone()).or_default();
                    if next == Some(&Token::Sign('{')) {
                        let end = after(&tokens, at, '}');
                        labels.extend(words(&tokens[at..end]));
                        at = end;
                    }
                }
            }
            Token::Text | Token::Sign(_) => {}
        }
    }
    names
}

/// `sum(`, and `sum by (label) (`.
fn begins_arguments(token: &Token) -> bool {
    match token {
        Token::Sign(sign) => *sign == '(',
        Token::Word(word) => matches!(word.as_str(), "by" | "without"),
        Token::Text => false,
    }
}

fn is_no_metric(word: &str) -> bool {
    WORDS.contains(&word.to_lowercase().as_str())
        || word.starts_with(|first: char| first.is_ascii_digit())
}

/// The position behind the next such sign.
fn after(tokens: &[Token], from: usize, sign: char) -> usize {
    let found = tokens[from..]
        .iter()
        .position(|token| *token == Token::Sign(sign));
    found.map_or(tokens.len(), |offset| from + offset + 1)
}

fn words(tokens: &[Token]) -> impl Iterator<Item = String> {
    tokens.iter().filter_map(|token| match token {
        Token::Word(word) => Some(word.clone()),
        _ => None,
    })
}

fn tokens(expression: &str) -> Vec<Token> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    let mut tokens = Vec::new();
    let mut rest = expression.chars().peekable();
    while let Some(first) = rest.next() {
        match first {
            '"' | '\'' | '`' => {
                while let Some(inner) = rest.next() {
                    match inner {
                        '\\' if first != '`' => drop(rest.next()),
                        _ if inner == first => break,
                        _ => {}
                    }
                }
                tokens.push(Token::Text);
            }
            '$' => {
                while rest
                    .next_if(|c| is_word(*c) || matches!(c, '{' | '}'))
                    .is_some()
                {}
            }
            '#' => while rest.next_if(|c| *c != '\n').is_some() {},
            _ if is_word(first) => {
                let mut word = String::from(first);
                while let Some(more) = rest.next_if(|c| is_word(*c)) {
                    word.push(more);
                }
                tokens.push(Token::Word(word));
            }
            _ if first.is_whitespace() => {}
            _ => tokens.push(Token::Sign(first)),
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn names_metrics_with_their_labels() {
        let found = names(
            r#"sum by (node, reason) (rate(a_total{b="x", c=~"$d|e{}"}[5m])) / count(f offset 1h) > 6 * 3600"#,
        );
        assert_eq!(found.grouping, set(&["node", "reason"]));
        assert_eq!(
            found.metrics,
            [
                ("a_total".to_owned(), set(&["b", "c"])),
                ("f".to_owned(), set(&[]))
            ]
            .into()
        );
    }

    #[test]
    fn skips_variables_and_functions() {
        let found = names(
            "histogram_quantile(0.99, sum by (le) (rate(x_bucket{}[$__rate_interval]))) or vector(0)",
        );
        assert_eq!(found.metrics.keys().collect::<Vec<_>>(), ["x_bucket"]);
        let found = names(r#"label_values(up{job="${job}"}, node)"#);
        assert_eq!(found.metrics.get("up"), Some(&set(&["job"])));
    }

    #[test]
    fn a_grouping_may_come_last_and_name_nothing() {
        let found = names("sum(a) by (b) and on() c");
        assert_eq!(found.grouping, set(&["b"]));
        assert_eq!(found.metrics.keys().collect::<Vec<_>>(), ["a", "c"]);
    }
}
