//! Rules about the documents: links lead somewhere, and promises name tests that exist.

use std::path::Path;

use super::{
    Finding, Source,
    lexer::{code_of, is_word, words},
};

/// The documents whose tables are promises.
const PROMISES: [&str; 2] = ["docs/guarantees.md", "docs/limits.md"];
/// What attackers may do; it names tests too, but not in every table.
const THREAT_MODEL: &str = "docs/threat-model.md";

/// Relative links of Markdown files whose target does not exist.
pub fn links(root: &Path, sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| source.is("md")) {
        for (line, target) in link_targets(&source.text) {
            if is_elsewhere(target) {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = source.path.parent().unwrap_or(Path::new("")).join(file);
            let path = if file.is_empty() {
                source.path.clone()
            } else {
                path
            };
            if !root.join(&path).exists() {
                findings.push(
                    source.finding(line, format!("a link to {target}, which does not exist")),
                );
            } else if !anchor.is_empty() {
                let text = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
                if !anchors(&text).any(|known| known == anchor) {
                    findings
                        .push(source.finding(line, format!("a link to {target}: no such heading")));
                }
            }
        }
    }
    findings
}

/// Promises without a test, and tests that do not exist. A test is named as `path/of/file.rs::name_of_test`, in
/// backquotes.
pub fn named_tests(sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for document in sources {
        match document.name().as_str() {
            name if PROMISES.contains(&name) => findings.extend(promises(document)),
            THREAT_MODEL => {}
            _ => continue,
        }
        for (number, line) in document.text.lines().enumerate() {
            for test in quoted_tests(line).filter(|test| !exists(sources, test)) {
                findings.push(document.finding(number + 1, format!("{test} does not exist")));
            }
        }
    }
    findings
}

/// Rows of tables that name no test.
fn promises(document: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut in_table = false;
    for (number, line) in document.text.lines().enumerate() {
        let is_rule = line.starts_with('|') && line.chars().all(|c| "|-: ".contains(c));
        if in_table && line.starts_with('|') && quoted_tests(line).next().is_none() {
            findings.push(document.finding(number + 1, "a promise that names no test"));
        }
        in_table = is_rule || (in_table && line.starts_with('|'));
    }
    findings
}

/// What is between backquotes and has a path of Rust in it: names of tests, well-formed or not.
fn quoted_tests(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    quoted.filter(|quoted| quoted.contains("::"))
}

fn exists(sources: &[Source], test: &str) -> bool {
    let Some((file, name)) = test.split_once("::") else {
        return false;
    };
    let Some(source) = sources.iter().find(|source| source.name() == file) else {
        return false;
    };
    let code = code_of(&source.text);
    let name = name.rsplit("::").next().unwrap_or(name);
    words(&code, "fn").any(|at| {
        let declared: String = code[at + "fn".len()..]
            .trim_start()
            .chars()
            .take_while(|character| is_word(*character))
            .collect();
        declared == name
    })
}

/// Targets of `[text](target)` outside of code, with their lines.
fn link_targets(text: &str) -> Vec<(usize, &str)> {
    let mut targets = Vec::new();
    let mut in_code = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code {
            continue;
        }
        // Every other piece between backquotes is code.
        for prose in line.split('`').step_by(2) {
            for (at, _) in prose.match_indices("](") {
                if let Some((target, _)) = prose[at + 2..].split_once(')') {
                    targets.push((number + 1, target.trim()));
                }
            }
        }
    }
    targets
}

fn is_elsewhere(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

/// Anchors as forges make them from headings: lower case, dashes for spaces, no punctuation.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|character| is_word(*character) || matches!(character, ' ' | '-'))
                .map(|character| if character == ' ' { '-' } else { character })
                .collect()
        })
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let text = "[a](b.md) and [c](https://d.example) and [e](x/f.md#g)\n`[no](link)`\n```\n[no](link)\n```\n";
        assert_eq!(
            link_targets(text),
            [(1, "b.md"), (1, "https://d.example"), (1, "x/f.md#g")]
        );
        let found = links(Path::new("/nonexistent"), &[source("docs/a.md", text)]);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn headings_become_anchors() {
        assert_eq!(
            anchors("# One, two: `three`\ntext\n## Four\n").collect::<Vec<_>>(),
            ["one-two-three", "four"]
        );
    }

    #[test]
    fn promises_name_tests_that_exist() {
        let document = "| Promise | Test |\n|---|---|\n| a | `tests/tests/x.rs::holds` |\n| b | `tests/tests/x.rs::gone` |\n| c | soon |\n\nProse about `x.rs`.\n";
        let threats = "| Boundary | Test |\n|---|---|\n| a | `tests/tests/x.rs::holds`, `x::gone` |\n| b | none |\n";
        let sources = [
            source(PROMISES[0], document),
            source(THREAT_MODEL, threats),
            source("docs/other.md", "`tests/tests/x.rs::gone`\n"),
            source(
                "tests/tests/x.rs",
                "#[test]\nfn holds() {}\n// fn gone() {}\n",
            ),
        ];
        let found = named_tests(&sources);
        assert_eq!(
            told(&found),
            [
                "5: a promise that names no test",
                "4: tests/tests/x.rs::gone does not exist",
                "3: x::gone does not exist",
            ]
        );
    }
}
