//! `cargo xtask build`: all programs of the workspace.

use anyhow::Result;

use crate::{
    setup::{self, Need},
    shell::{self, cargo, say, target_directory},
};

/// Build all programs: mesh-agent, mesh-control, weft, and those of the lab
///
/// Installs the eBPF toolchain and bpf-linker first if they are missing (see `cargo xtask setup --help`).
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Optimised, as for the demo, the bench and production
    #[arg(long)]
    release: bool,
}

/// Builds the programs of a profile.
pub fn programs(release: bool) -> Result<()> {
    setup::ensure(&[Need::Build])?;
    let mut command = cargo();
    // xtask itself is left out: it is running, and it is built already.
    command.args(["build", "--workspace", "--bins", "--exclude", "xtask"]);
    if release {
        command.arg("--release");
    }
    shell::run(&mut command)
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    programs(options.release)?;
    say(&format!(
        "the programs are in {}",
        target_directory(options.release).display()
    ));
    Ok(())
}

/// Builds the programs and every test, unoptimised, in one go: cargo gives dependencies other features for tests
/// than for programs alone, and would compile half of them twice.
pub fn programs_and_tests() -> Result<()> {
    setup::ensure(&[Need::Build])?;
    shell::run(cargo().args(["build", "--workspace", "--all-targets"]))
}
