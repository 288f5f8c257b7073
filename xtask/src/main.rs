//! `cargo xtask`: every task of the project by one command, the same for people and for CI.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod check;
mod cluster;
mod crds;
mod demo;
mod fuzz;
mod image;
mod setup;
mod shell;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Every task of the Weft project.
///
/// Begin with `demo` (see it work) and `test` (see it proved). Both install what they lack.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::Options),
    Build(build::Options),
    Check(check::Options),
    Demo(demo::Options),
    Test(test::Options),
    Bench(bench::Options),
    Fuzz(fuzz::Options),
    Image(image::Options),
    Crds(crds::Options),
    Cluster(cluster::Options),
}

fn main() -> ExitCode {
    let outcome = match Options::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Check(options) => check::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Image(options) => image::run(&options),
        Command::Crds(options) => crds::run(&options),
        Command::Cluster(options) => cluster::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
