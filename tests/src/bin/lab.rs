//! Looks after labs from outside: lists and removes what a killed run has left.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use mesh_tests::{
    cleanup,
    lab::{Families, Lab, LabSpec, PodSpec},
    process::Program,
};

/// How long `lab hold` holds at most.
const HOLD_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Builds a lab by hand, or removes what one has left behind.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build two nodes with three pods (a, b and c) and hold them until interrupted, to try things out in them
    Hold {
        /// What the names of the namespaces begin with
        #[arg(long)]
        prefix: String,
    },
    /// Kill and remove everything of the lab with this prefix
    Cleanup {
        /// Prefix of the lab, as it was printed or as `ip netns` shows it before the first dash
        #[arg(long)]
        prefix: String,
    },
}

fn main() -> Result<()> {
    match Options::parse().command {
        Command::Hold { prefix } => {
            let spec = LabSpec::new(Families::Dual).prefix(&prefix);
            let spec = spec
                .node("n1", [PodSpec::new("a"), PodSpec::new("b")])
                .node("n2", [PodSpec::new("c")]);
            let lab = Lab::build(spec)?;
            for pod in lab.pods() {
                println!("{} {:?}", pod.netns.display(), pod.addresses);
            }
            let placeholder = lab.spawn(lab.pod("a")?, &Program::line("sleep infinity"))?;
            println!("child {}", placeholder.pid());
            println!("the lab is up; interrupt (Ctrl-C) to remove it");
            drop(placeholder.wait(HOLD_LIMIT)?);
        }
        Command::Cleanup { prefix } => {
            for thing in cleanup::leftovers(&prefix)? {
                println!("removing {thing}");
            }
            cleanup::remove(&prefix)?;
            let left = cleanup::leftovers(&prefix)?;
            if !left.is_empty() {
                bail!("still there: {}", left.join(", "));
            }
        }
    }
    Ok(())
}
