//! Looks after labs from outside: holds one to play with, runs commands in it, removes what a killed run has left.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Parser, Subcommand};
use mesh_tests::{
    cgroup, cleanup,
    lab::{Families, Lab, LabSpec, PodSpec},
    netns,
    process::Program,
};

/// How long `lab hold` holds at most.
const HOLD_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Builds a lab by hand, runs commands in one, or removes what one has left behind.
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
    /// Run a command in a pod or on a node of a lab: in its network namespace and its cgroup
    Exec {
        /// Prefix of the lab
        prefix: String,
        /// Name of the pod or node
        place: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
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
        Command::Exec {
            prefix,
            place,
            command,
        } => return Err(exec(&prefix, &place, &command)),
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

/// Becomes the command; returns only if that fails.
fn exec(prefix: &str, place: &str, command: &[String]) -> anyhow::Error {
    let prepared = (|| -> Result<()> {
        cleanup::check_prefix(prefix)?;
        let netns = netns::path(&format!("{prefix}-{place}"));
        let root = cgroup::mount_point()?.join(prefix);
        let cgroup = cgroup_of(&root, place)?;
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
            .with_context(|| format!("cannot join {}", cgroup.display()))?;
        netns::enter(&netns)
    })();
    if let Err(error) = prepared {
        return error;
    }
    let Some((program, arguments)) = command.split_first() else {
        return anyhow!("no command");
    };
    let error = std::process::Command::new(program).args(arguments).exec();
    anyhow!(error).context(format!("cannot run {program}"))
}

/// A pod's cgroup is `<node>/pods/<pod>`, a node's `<node>/host`.
fn cgroup_of(root: &Path, place: &str) -> Result<PathBuf> {
    let host = root.join(place).join("host");
    if host.is_dir() {
        return Ok(host);
    }
    let nodes = fs::read_dir(root).with_context(|| format!("no lab at {}", root.display()))?;
    let mut pods = nodes.filter_map(|node| Some(node.ok()?.path().join("pods").join(place)));
    pods.find(|cgroup| cgroup.is_dir())
        .with_context(|| format!("the lab has no pod or node {place}"))
}
