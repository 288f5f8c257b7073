//! Rules of our own about the sources, as code. Each rule takes text and yields findings, so each has its tests.

mod docs;
mod lexer;
mod modules;
mod rust;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::shell::say;

/// Folders that hold nothing of ours.
const SKIPPED_FOLDERS: [&str; 3] = ["target", ".git", "node_modules"];

/// Endings of the files that rules about text apply to.
const TEXT_ENDINGS: [&str; 7] = ["rs", "toml", "md", "yaml", "yml", "proto", "sh"];

/// Something against the rules.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// File, relative to the root.
    pub file: PathBuf,
    /// Line, from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.message)
    }
}

/// A text file of the workspace.
#[derive(Debug, Clone)]
pub struct Source {
    /// Path relative to the root.
    pub path: PathBuf,
    /// Content.
    pub text: String,
}

impl Source {
    /// A finding at a line of this file.
    pub fn finding(&self, line: usize, message: impl Into<String>) -> Finding {
        Finding {
            file: self.path.clone(),
            line,
            message: message.into(),
        }
    }

    /// Whether the file's name ends so.
    pub fn is(&self, ending: &str) -> bool {
        self.path
            .extension()
            .is_some_and(|extension| extension == ending)
    }

    /// The path as text with forward slashes.
    pub fn name(&self) -> String {
        self.path.to_string_lossy().replace('\\', "/")
    }
}

/// Applies every rule to the workspace.
pub fn run(root: &Path) -> Result<()> {
    let mut sources = Vec::new();
    collect(root, Path::new(""), &mut sources)?;
    let mut findings: Vec<Finding> = sources.iter().flat_map(trailing_spaces).collect();
    for source in sources.iter().filter(|source| source.is("rs")) {
        findings.extend(rust::check(source));
    }
    findings.extend(modules::unreachable(&sources));
    findings.extend(docs::links(root, &sources));
    findings.extend(docs::named_tests(&sources));
    findings.sort();
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy: {} findings", findings.len());
    }
    say(&format!("tidy: {} files are in order", sources.len()));
    Ok(())
}

fn collect(root: &Path, folder: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let entries = fs::read_dir(root.join(folder))
        .with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let path = folder.join(&name);
        if entry.file_type()?.is_dir() {
            if !SKIPPED_FOLDERS.iter().any(|skipped| name == *skipped) {
                collect(root, &path, sources)?;
            }
        } else if path
            .extension()
            .is_some_and(|ending| TEXT_ENDINGS.iter().any(|text| ending == *text))
        {
            let text = fs::read_to_string(root.join(&path))
                .with_context(|| format!("cannot read {}", path.display()))?;
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

fn trailing_spaces(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().enumerate();
    let mut findings: Vec<Finding> = lines
        .filter(|(_, line)| line.ends_with([' ', '\t']))
        .map(|(number, _)| source.finding(number + 1, "trailing space"))
        .collect();
    if !source.text.is_empty() && !source.text.ends_with('\n') {
        findings.push(source.finding(source.text.lines().count(), "no newline at the end"));
    }
    findings
}

/// Sources made by hand for the tests of this folder.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// A source with this path and text.
    pub fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.into(),
            text: text.to_owned(),
        }
    }

    /// `line: message` of each finding.
    pub fn told(findings: &[Finding]) -> Vec<String> {
        findings
            .iter()
            .map(|finding| format!("{}: {}", finding.line, finding.message))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    #[test]
    fn spaces_at_the_end_of_a_line_are_found() {
        let text = "fine\nnot fine \n\tfine\n";
        assert_eq!(
            told(&trailing_spaces(&source("a.md", text))),
            ["2: trailing space"]
        );
        assert_eq!(
            told(&trailing_spaces(&source("a.md", "cut"))),
            ["1: no newline at the end"]
        );
    }
}
