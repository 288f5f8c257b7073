//! `cargo xtask test`: the tests in tiers, with one summary at the end.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{cluster::Cluster, skip};

use crate::{
    build, fuzz,
    setup::{self, Need},
    shell::{cargo, is_root, line_of, say, target_directory},
};

/// Seconds of an hour.
const HOUR_SECONDS: f64 = 3600.0;

/// Run the tests
///
/// quick: unit tests, under a minute once built; no root needed.
/// full (the default, and CI's): builds what is missing, then unit tests and the end-to-end tests in network
/// namespaces; needs root.
/// soak: ten minutes of `cargo xtask fuzz` for every target, then the end-to-end tests again and again for --hours, with
/// long waits where a test has them; by hand.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Options {
    /// Which tests
    #[arg(value_enum, default_value_t = Tier::Full)]
    tier: Tier,
    /// How long to soak
    #[arg(long, default_value_t = 1.0)]
    hours: f64,
    /// Only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
}

/// How much is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Tier {
    /// Unit tests
    Quick,
    /// Everything CI runs
    Full,
    /// End-to-end tests for hours
    Soak,
}

/// What came out.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
    skipped: Vec<String>,
    /// Runs of cargo that failed without a failing test (a compile error, a crash).
    broken: Vec<String>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if options.tier != Tier::Quick && !is_root() {
        bail!(
            "the {:?} tier makes network namespaces and loads eBPF programs: run it as root (quick needs none)",
            options.tier
        );
    }
    let began = Instant::now();
    let mut summary = Summary::default();
    if options.tier == Tier::Quick {
        setup::ensure(&[Need::Build])?;
    } else {
        setup::ensure(&[Need::Build, Need::Lab, Need::Chart])?;
        build::programs_and_tests()?;
    }
    let skips =
        skip::Notes::collect().context("cannot make the file that collects skipped tests")?;
    if options.tier != Tier::Soak {
        unit(options, &mut summary)?;
    }
    match options.tier {
        Tier::Quick => {}
        Tier::Full => end_to_end(options, &skips, &mut summary)?,
        Tier::Soak => {
            if options.filter.is_none() {
                fuzz(&mut summary)?;
            }
            soak(options, &skips, &mut summary)?;
        }
    }
    summary.note_skips(skips.read()?);
    summary.print(began.elapsed());
    if summary.failed > 0 || !summary.broken.is_empty() {
        bail!("tests failed");
    }
    if summary.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

fn unit(options: &Options, summary: &mut Summary) -> Result<()> {
    let mut command = cargo();
    command
        .args([
            "test",
            "--workspace",
            "--lib",
            "--bins",
            "--no-fail-fast",
            "--",
        ])
        .args(&options.filter);
    observe(&mut command, summary)
}

/// One test at a time: they share the kernel, two cores, and the clock that latency is measured with.
fn end_to_end(options: &Options, skips: &skip::Notes, summary: &mut Summary) -> Result<()> {
    let mut command = cargo();
    command.args([
        "test",
        "--workspace",
        "--test",
        "*",
        "--no-fail-fast",
        "--",
        "--test-threads=1",
    ]);
    command.args(&options.filter);
    command.env(
        mesh_tests::programs::DIRECTORY_VARIABLE,
        target_directory(false),
    );
    command.env(skip::FILE_VARIABLE, skips.path());
    if options.tier == Tier::Soak {
        command.env(skip::SOAK_VARIABLE, "1");
    }
    observe(&mut command, summary)
}

/// Runs the tests that need a Kubernetes, with what tells them which.
pub fn cluster(
    cluster: &Cluster,
    environment: &[(&str, OsString)],
    filter: Option<&str>,
) -> Result<()> {
    let began = Instant::now();
    let mut summary = Summary::default();
    let skips =
        skip::Notes::collect().context("cannot make the file that collects skipped tests")?;
    let mut command = cargo();
    command
        .args(["test", "--workspace", "--test", "cluster*"])
        .args(["--no-fail-fast", "--", "--test-threads=1"])
        .args(filter)
        .env(
            mesh_tests::programs::DIRECTORY_VARIABLE,
            target_directory(false),
        )
        .env(skip::FILE_VARIABLE, skips.path())
        .envs(environment.iter().cloned());
    // Where the API server of a local cluster can be reached.
    cluster.within(|| observe(&mut command, &mut summary))??;
    summary.note_skips(skips.read()?);
    summary.print(began.elapsed());
    if summary.failed > 0 || !summary.broken.is_empty() {
        bail!("cluster tests failed");
    }
    if summary.passed == 0 {
        bail!("no cluster test ran");
    }
    Ok(())
}

/// A target with findings counts as a failed test.
fn fuzz(summary: &mut Summary) -> Result<()> {
    for target in fuzz::all(fuzz::SOAK_MINUTES)? {
        summary.failed += 1;
        summary.failures.push(format!("fuzz target {target}"));
    }
    Ok(())
}

fn soak(options: &Options, skips: &skip::Notes, summary: &mut Summary) -> Result<()> {
    let end = Instant::now() + Duration::from_secs_f64(options.hours * HOUR_SECONDS);
    let mut round = 0;
    while round == 0 || Instant::now() < end {
        round += 1;
        say(&format!("soak round {round}"));
        end_to_end(options, skips, summary)?;
        if summary.failed > 0 {
            say(&format!("round {round} ends with failures; ending"));
            break;
        }
    }
    Ok(())
}

/// Runs cargo test, shows its output as it comes, and counts.
fn observe(command: &mut Command, summary: &mut Summary) -> Result<()> {
    let line = line_of(command);
    say(&line);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {line}"))?;
    let stdout = child.stdout.take().context("standard output is piped")?;
    let failed_before = summary.failed;
    for text in BufReader::new(stdout).lines() {
        let text = text.with_context(|| format!("cannot read the output of {line}"))?;
        println!("{text}");
        summary.take(&text);
    }
    if !child.wait()?.success() && summary.failed == failed_before {
        summary.broken.push(line);
    }
    Ok(())
}

impl Summary {
    /// Takes a line of the test harness.
    fn take(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |word: &str| {
                let before = counts.split(&format!(" {word}")).next().unwrap_or_default();
                before
                    .rsplit(' ')
                    .next()
                    .and_then(|number| number.parse::<u64>().ok())
                    .unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
        } else if let Some(test) = line.strip_prefix("test ") {
            if let Some(name) = test.strip_suffix(" ... FAILED") {
                self.failures.push(name.to_owned());
            } else if let Some((name, reason)) = test.split_once(" ... ignored") {
                self.skipped
                    .push(format!("{name}: {}", reason.trim_start_matches([',', ' '])));
            }
        }
    }

    /// A test that skips itself passes as far as the harness knows: count it where it belongs.
    fn note_skips(&mut self, notes: Vec<String>) {
        self.passed = self.passed.saturating_sub(notes.len() as u64);
        self.skipped.extend(notes);
    }

    fn print(&self, took: Duration) {
        println!();
        for test in &self.skipped {
            println!("skipped: {test}");
        }
        for test in &self.failures {
            println!("failed: {test}");
        }
        for command in &self.broken {
            println!("failed: {command} (it did not build, or crashed)");
        }
        println!(
            "{} passed, {} failed, {} skipped ({:.0} s)",
            self.passed,
            self.failed + self.broken.len() as u64,
            self.skipped.len(),
            took.as_secs_f64()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_failures_and_skips_are_counted() {
        let mut summary = Summary::default();
        for line in [
            "running 4 tests",
            "test a::works ... ok",
            "test a::breaks ... FAILED",
            "test b::waits ... ignored, needs a cluster",
            "test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            summary.take(line);
        }
        summary.note_skips(vec!["c::skips: no MPTCP".to_owned()]);
        let expected = Summary {
            passed: 8,
            failed: 1,
            failures: vec!["a::breaks".to_owned()],
            skipped: vec![
                "b::waits: needs a cluster".to_owned(),
                "c::skips: no MPTCP".to_owned(),
            ],
            broken: Vec::new(),
        };
        assert_eq!(summary, expected);
    }
}
