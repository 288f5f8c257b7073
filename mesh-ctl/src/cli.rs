//! The command line's grammar.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::pod::{self, Target};

/// Longest wait or interval that the command line takes, in seconds: one hour is already a mistake.
const SECONDS_MAX: f64 = 3600.0;

/// Shortest interval between two samples of `weft top`, in seconds: below it the rates are noise.
const INTERVAL_MIN_SECONDS: f64 = 0.1;

/// The agent gives up a request by itself after 60 seconds and the sending of its answer after 10 more.
const CHANGE_DEADLINE: Duration = Duration::from_secs(75);

/// What the agent knows it tells at once, unless it is hung.
const QUESTION_DEADLINE: Duration = Duration::from_secs(15);

/// Less than the time that the chart's probes have.
const PROBE_DEADLINE: Duration = Duration::from_secs(4);

/// Operate Weft on this node: enrol workloads, see what the agent does, check the machine.
///
/// Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 the agent could not be reached.
#[derive(Debug, Parser)]
#[command(name = "weft", version)]
pub struct Cli {
    /// Run directory of the agent; its socket `agent.sock` lies there.
    #[arg(
        long,
        env = "WEFT_RUN_DIR",
        default_value = "/run/weft",
        value_name = "DIR",
        global = true
    )]
    pub run_dir: PathBuf,

    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true)]
    pub output: Output,

    /// How long to wait for the agent's answer, in seconds; 75 for changes and 15 for questions when absent.
    #[arg(long, value_parser = wait, value_name = "SECONDS", global = true)]
    pub timeout: Option<Duration>,

    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// How long to wait for the agent's answer.
    pub fn deadline(&self) -> Duration {
        self.timeout.unwrap_or(match self.command {
            Command::Enroll(_) | Command::Unenroll(_) | Command::Agent(_) => CHANGE_DEADLINE,
            // A probe of the kubelet waits for 5 seconds.
            Command::Pod(_) => PROBE_DEADLINE,
            Command::Status | Command::Check(_) | Command::Dump | Command::Top(_) => {
                QUESTION_DEADLINE
            }
        })
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Aligned columns for a human.
    Table,
    /// JSON for a program.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Capture a workload's traffic from now on.
    Enroll(EnrollArgs),
    /// Stop capturing a workload and undo what enrolment did.
    Unenroll(WorkloadArgs),
    /// Show the node, its workloads, capture health and certificates.
    Status,
    /// Check whether this machine can run an agent, and how to fix what is missing. Needs no agent.
    Check(CheckArgs),
    /// Show everything the agent believes: services, workloads, policies, verdicts.
    Dump,
    /// Show who talks to whom: rates, bytes, round-trip times, failures.
    Top(TopArgs),
    /// Change the agent itself.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// What the pods of the Helm chart run inside their containers.
    #[command(subcommand)]
    Pod(PodCommand),
}

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Start another agent that takes over from the running one without a lost connection.
    ///
    /// It gets the arguments, the environment and the log of the running one. If it cannot take over, the running one
    /// goes on. Going back to an earlier version is the same command with the earlier program.
    Upgrade(UpgradeArgs),
}

#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Program of the new agent; the file that the running one was started from when absent.
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// How long the open connections get to end by themselves, in seconds; one hour, unless the new agent's
    /// configuration says otherwise, when absent.
    #[arg(long, value_name = "SECONDS")]
    pub drain_deadline: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub enum PodCommand {
    /// Prepare a container for an agent, and become it.
    Run(PodRunArgs),
    /// Succeed when the agent of this pod serves the node.
    Ready,
    /// Wait until another agent has taken over from the one of this pod, and while that one has connections left.
    Drain(DrainArgs),
    /// Do nothing until SIGTERM.
    Idle,
    /// Succeed when every target answers.
    Reach {
        /// `tcp://HOST:PORT` or `http://HOST:PORT/PATH`.
        #[arg(required = true, value_parser = pod::target, value_name = "TARGET")]
        targets: Vec<Target>,
    },
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// How long to wait for another agent to take over, in seconds.
    #[arg(long, default_value = "0", value_parser = patience, value_name = "SECONDS")]
    pub successor: Duration,
}

#[derive(Debug, Args)]
pub struct PodRunArgs {
    /// Wait until no agent runs on this node.
    #[arg(long)]
    pub after_agent: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub program: Vec<String>,
}

#[derive(Debug, Args)]
pub struct WorkloadArgs {
    /// Kubernetes namespace of the workload.
    #[arg(long)]
    pub namespace: String,
    /// Name of the workload (of the pod).
    #[arg(long)]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct EnrollArgs {
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// Its network namespace: a path, or a name under /run/netns.
    #[arg(long, value_name = "PATH|NAME")]
    pub netns: PathBuf,
    /// Its cgroup (v2), where it has one of its own; without it its flows within the node take the tunnel.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Where the agent shall pin its eBPF objects.
    #[arg(long, default_value = "/sys/fs/bpf", value_name = "DIR")]
    pub bpffs_root: PathBuf,
    /// The cgroup v2 folder that the agent shall attach to; found by itself when absent.
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Go on until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// Time between two samples, in seconds.
    #[arg(long, default_value = "1", value_parser = interval, value_name = "SECONDS")]
    pub interval: Duration,
}

fn wait(text: &str) -> Result<Duration, String> {
    seconds(text, 0.001)
}

fn patience(text: &str) -> Result<Duration, String> {
    seconds(text, 0.0)
}

fn interval(text: &str) -> Result<Duration, String> {
    seconds(text, INTERVAL_MIN_SECONDS)
}

fn seconds(text: &str, min: f64) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(value) if (min..=SECONDS_MAX).contains(&value) => Ok(Duration::from_secs_f64(value)),
        _ => Err(format!(
            "not a number of seconds between {min} and {SECONDS_MAX}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::error::ErrorKind> {
        Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())
    }

    #[test]
    fn the_grammar_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn enroll_takes_its_options_and_globals_after_the_command() {
        let cli = parse(
            "weft enroll --namespace shop --name web --netns n1-web -o json --run-dir /run/n1",
        )
        .expect("complete");
        assert_eq!(cli.run_dir, PathBuf::from("/run/n1"));
        assert_eq!(cli.output, Output::Json);
        let Command::Enroll(args) = cli.command else {
            panic!("not enroll: {cli:?}")
        };
        assert_eq!(
            (
                args.workload.namespace.as_str(),
                args.workload.name.as_str()
            ),
            ("shop", "web")
        );
        assert_eq!(args.netns, PathBuf::from("n1-web"));
        assert_eq!(args.cgroup, None);
    }

    #[test]
    fn defaults_are_those_of_an_installed_node() {
        let cli = parse("weft top").expect("no argument needed");
        assert_eq!(cli.output, Output::Table);
        assert_eq!(cli.deadline(), QUESTION_DEADLINE);
        let Command::Top(args) = cli.command else {
            panic!("not top")
        };
        assert_eq!((args.watch, args.interval), (false, Duration::from_secs(1)));
    }

    #[test]
    fn an_upgrade_needs_no_option() {
        let cli = parse("weft agent upgrade").expect("no argument needed");
        assert_eq!(cli.deadline(), CHANGE_DEADLINE);
        let cli = parse("weft agent upgrade --binary /b --drain-deadline 60").expect("complete");
        let Command::Agent(AgentCommand::Upgrade(args)) = cli.command else {
            panic!("not an upgrade: {cli:?}")
        };
        assert_eq!(args.binary, Some(PathBuf::from("/b")));
        assert_eq!(args.drain_deadline, Some(60));
    }

    #[test]
    fn wrong_usage_is_refused() {
        use clap::error::ErrorKind;
        for (line, kind) in [
            ("weft", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
            (
                "weft enroll --namespace shop --name web",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "weft unenroll --name web",
                ErrorKind::MissingRequiredArgument,
            ),
            ("weft status --netns web", ErrorKind::UnknownArgument),
            ("weft status -o yaml", ErrorKind::InvalidValue),
            ("weft top --interval 0", ErrorKind::ValueValidation),
            ("weft top --interval NaN", ErrorKind::ValueValidation),
            ("weft status --timeout 86400", ErrorKind::ValueValidation),
            ("weft restart", ErrorKind::InvalidSubcommand),
            (
                "weft agent",
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
            ),
            (
                "weft agent upgrade --drain-deadline soon",
                ErrorKind::ValueValidation,
            ),
        ] {
            assert_eq!(parse(line).expect_err(line), kind, "{line}");
        }
    }
}
