//! `cargo xtask check`: everything that can be said about the sources without running them.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::{
    setup::{self, Need},
    shell::{cargo, line_of, root, run as execute, say},
    tidy,
};

/// Check the sources: format, lints, dependencies, and rules of our own
///
/// Runs cargo fmt, clippy with warnings denied, cargo-deny (licences, bans, sources; advisories if the database can
/// be had) and `tidy`: lengths of files and functions, leftovers, unsafe code out of place, dead files, links of the
/// docs, tests that docs/guarantees.md and docs/threat-model.md name. Installs cargo-deny if it is missing.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only the rules of our own (seconds, needs nothing)
    #[arg(long)]
    tidy: bool,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    say("tidy");
    tidy::run(root())?;
    if options.tidy {
        return Ok(());
    }
    execute(cargo().args(["fmt", "--all", "--", "--check"])).context("run `cargo fmt`")?;
    setup::ensure(&[Need::Build, Need::Check])?;
    execute(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    execute(cargo().args([
        "deny",
        "--log-level",
        "error",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))?;
    advisories()?;
    say("check passed");
    Ok(())
}

/// The advisory database is fetched from the network. Without it nothing is known, which is said but is no failure.
fn advisories() -> Result<()> {
    let mut command = cargo();
    command
        .args(["deny", "--log-level", "error", "check", "advisories"])
        .stdin(Stdio::null());
    say(&line_of(&command));
    let output = command.output().context("cannot run cargo deny")?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    if output.status.success() {
        return Ok(());
    }
    if let Some(reason) = unavailable(&text) {
        say(&format!(
            "advisories NOT CHECKED: the database could not be fetched: {reason}"
        ));
        return Ok(());
    }
    eprint!("{text}");
    bail!("a dependency has an advisory");
}

fn unavailable(text: &str) -> Option<&str> {
    const SIGNS: [&str; 3] = [
        "failed to fetch advisory database",
        "failed to load advisory database",
        "failed to clone",
    ];
    text.lines()
        .find(|line| SIGNS.iter().any(|sign| line.contains(sign)))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_database_is_told_from_an_advisory() {
        assert!(unavailable("x\n[ERROR] failed to fetch advisory database https://…\n").is_some());
        assert!(unavailable("error[vulnerability]: use after free in foo\n").is_none());
    }
}
