//! The loss oracle's client and server; the client prints its report as one JSON object.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use mesh_tests::seqecho::{client, server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Sends numbered, checksummed records over TCP and counts every way to lose one.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve until killed
    Server(server::ServerOptions),
    /// Run, print the report as JSON, exit with 1 if anything was lost
    Client(client::ClientOptions),
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    match options.role {
        Role::Server(options) => server::run(&options)?,
        Role::Client(options) => {
            let report = client::run(&options)?;
            println!("{}", serde_json::to_string(&report)?);
            if report.lost() > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
