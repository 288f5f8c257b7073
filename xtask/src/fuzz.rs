//! `cargo xtask fuzz`: searches for inputs that break what reads bytes of others.
//!
//! The targets are in `tests/fuzz`; this builds them with the coverage instrumentation that libFuzzer is guided by, which
//! a stable compiler has too, and runs one after the other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    setup::{self, Need},
    shell::{cargo, root, run as execute, say, target_directory},
};
use anyhow::{Context as _, Result, bail, ensure};

/// What soak gives each target.
pub const SOAK_MINUTES: f64 = 10.0;

/// Seconds of a minute.
const MINUTE_SECONDS: f64 = 60.0;

/// An input that takes longer than this, seconds, is a finding: few bytes must not keep a core busy.
const INPUT_SECONDS_MAX: u64 = 10;

/// Longest input that is made, bytes; targets cut it to what they try.
const INPUT_BYTES_MAX: usize = 16 * 1024;

/// Most memory, MiB. A target that needs more holds more than its limits allow.
const MEMORY_MIB_MAX: u64 = 2048;

/// Coverage as libFuzzer wants it: counters per edge, a table of them, and the operands of comparisons (LLVM,
/// SanitizerCoverage). All are options of stable rustc.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Search for inputs that break what reads bytes of others
///
/// Builds the targets of tests/fuzz with coverage and runs libFuzzer on each, beginning with the committed inputs and with
/// what earlier runs found. A finding ends the command; its message says how to repeat it, and where to commit the input
/// once it is mended. Needs a C++ compiler; no root.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Targets; all if none is named
    targets: Vec<String>,
    /// How long each target is run
    #[arg(long, default_value_t = SOAK_MINUTES)]
    minutes: f64,
    /// Print the names of the targets; tests/fuzz/src/lib.rs says what they stand for
    #[arg(long)]
    list: bool,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let known = targets()?;
    if options.list {
        println!("{}", known.join("\n"));
        return Ok(());
    }
    for name in &options.targets {
        ensure!(known.contains(name), "{name} is no target; see --list");
    }
    let chosen = if options.targets.is_empty() {
        &known
    } else {
        &options.targets
    };
    let failed = search(chosen, options.minutes)?;
    ensure!(failed.is_empty(), "findings in {}", failed.join(", "));
    say(&format!("{} targets, no findings", chosen.len()));
    Ok(())
}

/// Runs every target, and names those with findings.
pub fn all(minutes: f64) -> Result<Vec<String>> {
    search(&targets()?, minutes)
}

/// Every target has a folder of committed inputs; a test of theirs makes sure.
fn targets() -> Result<Vec<String>> {
    let folder = committed();
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn committed() -> PathBuf {
    root().join("tests/fuzz/corpus")
}

fn search(targets: &[String], minutes: f64) -> Result<Vec<String>> {
    ensure!(
        minutes.is_finite() && minutes > 0.0,
        "--minutes must be above zero"
    );
    setup::ensure(&[Need::Build])?;
    let fuzzer = build()?;
    let mut failed = Vec::new();
    for target in targets {
        if !finds_nothing(&fuzzer, target, minutes)? {
            failed.push(target.clone());
        }
    }
    Ok(failed)
}

/// The folder of instrumented programs and of what was found.
fn folder() -> PathBuf {
    target_directory(false)
        .parent()
        .unwrap_or_else(|| root())
        .join("fuzz")
}

fn build() -> Result<PathBuf> {
    let host = host()?;
    let programs = folder().join("build");
    let mut command = cargo();
    command
        .args(["build", "--package", "mesh-fuzz", "--bin", "mesh-fuzzer"])
        .args(["--features", "fuzzer", "--profile", "fuzz"])
        // With a target named, build scripts and macros are not instrumented.
        .args(["--target", &host, "--target-dir"])
        .arg(&programs)
        .env("RUSTFLAGS", COVERAGE.join(" "));
    execute(&mut command).context("build the fuzzer; it needs a C++ compiler (Debian: g++)")?;
    Ok(programs.join(host).join("fuzz/mesh-fuzzer"))
}

/// The triple of this machine.
fn host() -> Result<String> {
    let text = crate::shell::output(Command::new("rustc").arg("-vV")).context("run rustc -vV")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// Runs a target for its time; whether it held.
fn finds_nothing(fuzzer: &Path, name: &str, minutes: f64) -> Result<bool> {
    let make = |kind: &str| -> Result<PathBuf> {
        let path = folder().join(kind).join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    };
    let (found, broken) = (make("corpus")?, make("broken")?);
    let committed = committed().join(name);
    let seconds = (minutes * MINUTE_SECONDS).ceil();
    let mut command = Command::new(fuzzer);
    command
        .env("WEFT_FUZZ_TARGET", name)
        .args([&found, &committed])
        .args([
            format!("-max_total_time={seconds}"),
            format!("-max_len={INPUT_BYTES_MAX}"),
            format!("-timeout={INPUT_SECONDS_MAX}"),
            format!("-rss_limit_mb={MEMORY_MIB_MAX}"),
            format!("-artifact_prefix={}/", broken.display()),
            "-print_final_stats=1".to_owned(),
            "-verbosity=0".to_owned(),
        ]);
    say(&format!("{name}: {minutes} min"));
    match execute(&mut command) {
        Ok(()) => Ok(true),
        Err(error) => {
            say(&format!("{name}: {error:#}"));
            say(&format!(
                "{name}: what broke it is in {}. Repeat: WEFT_FUZZ_TARGET={name} {} FILE. Mended, it goes to {}/ for good",
                broken.display(),
                fuzzer.display(),
                committed.display()
            ));
            if fs::read_dir(&broken)?.next().is_none() {
                bail!("the fuzzer could not run");
            }
            Ok(false)
        }
    }
}
