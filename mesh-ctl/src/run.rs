//! Carries out one command.

use std::{
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mesh_api::local::{Edge, Enrolment, Request, Response};
use serde_json::{Value, json};

use crate::{
    check,
    cli::{AgentCommand, Cli, Command, EnrollArgs, Output, TopArgs, UpgradeArgs},
    client::{Answer, Client, ClientError},
    pod::{self, PodError},
    top, views,
};

/// Where `ip netns` keeps its namespaces.
const NETNS_DIR: &str = "/run/netns";

/// Clears a terminal and puts the cursor at its top left (ECMA-48 ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// How the process ends. Wrong usage is 2, by clap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Done,
    Failed,
    Unreachable,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Unreachable => 3,
        })
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The agent said no.
    #[error("the agent refused: {0}")]
    Refused(String),
    #[error("cannot make {path} absolute: {source}")]
    Path { path: String, source: io::Error },
    #[error("{0} is not UTF-8, which the agent's protocol cannot carry")]
    NotUtf8(String),
    #[error("cannot print: {0}")]
    Output(#[from] io::Error),
    #[error(transparent)]
    Pod(#[from] PodError),
}

impl Failure {
    pub fn exit(&self) -> Exit {
        match self {
            Self::Client(error) | Self::Pod(PodError::Client(error)) if error.is_unreachable() => {
                Exit::Unreachable
            }
            _ => Exit::Failed,
        }
    }
}

/// Carries out the command, printing to `out`.
///
/// # Errors
/// See [`Failure`]; its [`Failure::exit`] is the process's exit code.
pub fn run(cli: &Cli, out: &mut impl Write) -> Result<Exit, Failure> {
    let client = Client::new(&cli.run_dir, cli.deadline());
    match &cli.command {
        Command::Check(args) => {
            let findings = check::run(args, &cli.run_dir, &client);
            let text = match cli.output {
                Output::Table => check::table(&findings),
                Output::Json => views::pretty(&json!(findings)),
            };
            out.write_all(text.as_bytes())?;
            Ok(if check::passed(&findings) {
                Exit::Done
            } else {
                Exit::Failed
            })
        }
        Command::Top(args) => show_top(cli.output, args, &client, out),
        Command::Enroll(args) => ask_and_print(&enrolment(args)?, cli.output, &client, out),
        Command::Unenroll(args) => {
            let request = Request::Unenroll {
                namespace: args.namespace.clone(),
                name: args.name.clone(),
            };
            ask_and_print(&request, cli.output, &client, out)
        }
        Command::Status => ask_and_print(&Request::Status, cli.output, &client, out),
        Command::Dump => ask_and_print(&Request::Dump, cli.output, &client, out),
        Command::Agent(AgentCommand::Upgrade(args)) => {
            ask_and_print(&upgrade(args)?, cli.output, &client, out)
        }
        Command::Pod(command) => Ok(pod::execute(command, &client)?),
    }
}

fn upgrade(args: &UpgradeArgs) -> Result<Request, Failure> {
    Ok(Request::Upgrade {
        binary: args.binary.as_deref().map(absolute).transpose()?,
        drain_deadline_seconds: args.drain_deadline,
    })
}

fn enrolment(args: &EnrollArgs) -> Result<Request, Failure> {
    let named = args.netns.components().count() == 1 && !args.netns.has_root();
    let netns = if named {
        Path::new(NETNS_DIR).join(&args.netns)
    } else {
        args.netns.clone()
    };
    Ok(Request::Enroll(Enrolment {
        namespace: args.workload.namespace.clone(),
        name: args.workload.name.clone(),
        netns: absolute(&netns)?,
        cgroup: args.cgroup.as_deref().map(absolute).transpose()?,
    }))
}

/// The agent has another working directory than the caller.
fn absolute(path: &Path) -> Result<String, Failure> {
    let whole: PathBuf = std::path::absolute(path).map_err(|source| Failure::Path {
        path: path.display().to_string(),
        source,
    })?;
    whole
        .into_os_string()
        .into_string()
        .map_err(|path| Failure::NotUtf8(path.to_string_lossy().into_owned()))
}

fn ask_and_print(
    request: &Request,
    output: Output,
    client: &Client,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let answer = ask(request, client)?;
    let text = match output {
        Output::Json => views::pretty(&content(&answer)),
        Output::Table => match &answer.response {
            Response::Done { message } => format!("{message}\n"),
            Response::Status(status) => views::status(status, now_seconds()),
            Response::Dump { state } => views::dump(state),
            // `ask` lets only the kinds above and refusals through.
            Response::Top { .. } | Response::Error { .. } => String::new(),
        },
    };
    out.write_all(text.as_bytes())?;
    Ok(Exit::Done)
}

/// Asks; a refusal and an answer of another kind than the question are failures.
fn ask(request: &Request, client: &Client) -> Result<Answer, Failure> {
    let answer = client.ask(request)?;
    let fits = match (&answer.response, request) {
        (Response::Error { message }, _) => return Err(Failure::Refused(message.clone())),
        (
            Response::Done { .. },
            Request::Enroll(_) | Request::Unenroll { .. } | Request::Upgrade { .. },
        )
        | (Response::Status(_), Request::Status)
        | (Response::Dump { .. }, Request::Dump)
        | (Response::Top { .. }, Request::Top) => true,
        _ => false,
    };
    if !fits {
        return Err(client
            .mismatch("the answer belongs to another request".to_owned())
            .into());
    }
    Ok(answer)
}

/// What the agent said, without the envelope.
fn content(answer: &Answer) -> Value {
    match (&answer.response, &answer.json) {
        (Response::Dump { state }, _) => state.clone(),
        (_, Value::Object(fields)) => {
            let mut fields = fields.clone();
            fields.remove("result");
            Value::Object(fields)
        }
        (_, other) => other.clone(),
    }
}

fn show_top(
    output: Output,
    args: &TopArgs,
    client: &Client,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let (mut before, mut taken) = (edges(client)?, Instant::now());
    let clear = args.watch && output == Output::Table && io::stdout().is_terminal();
    loop {
        pause(args.interval);
        let (after, now) = (edges(client)?, Instant::now());
        let rows = top::rates(&before, &after, now.duration_since(taken));
        match output {
            Output::Table if clear => write!(out, "{CLEAR}{}", views::top(&rows))?,
            Output::Table => write!(out, "{}", views::top(&rows))?,
            // One line per sample, so that a reader can follow `--watch`.
            Output::Json if args.watch => writeln!(out, "{}", json!(rows))?,
            Output::Json => write!(out, "{}", views::pretty(&json!(rows)))?,
        }
        out.flush()?;
        if !args.watch {
            return Ok(Exit::Done);
        }
        (before, taken) = (after, now);
    }
}

/// Lets the interval between two samples pass; parking may end early.
pub fn pause(interval: Duration) {
    let end = Instant::now() + interval;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
    }
}

fn edges(client: &Client) -> Result<Vec<Edge>, Failure> {
    match ask(&Request::Top, client)?.response {
        Response::Top { edges } => Ok(edges),
        _ => Err(client.mismatch("no edges in the answer".to_owned()).into()),
    }
}

fn now_seconds() -> i64 {
    // A clock before 1970 makes every certificate look fresh; the agent, not this view, judges them.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
}
