//! `weft`, the command line of a node: enrols workloads, shows what the agent does, and checks whether a machine can
//! run one.
//!
//! It owns the human's view and nothing else. It talks to the agent only through the local socket's messages
//! ([`mesh_api::local`]) and must not know how the agent does its work, nor Kubernetes' API.

#![forbid(unsafe_code)]

mod check;
mod cli;
mod client;
mod pod;
mod run;
mod table;
mod top;
mod units;
mod views;

use std::{io, process::ExitCode};

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let outcome = run::run(&cli, &mut io::stdout().lock());
    match outcome {
        Ok(code) => code.into(),
        // The reader (`head`, a closed terminal) has seen enough.
        Err(run::Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            run::Exit::Done.into()
        }
        Err(failure) => {
            eprintln!("weft: {failure}");
            failure.exit().into()
        }
    }
}
