//! Starting a successor on request, as a child of this process: in the same namespaces and cgroup, with the same
//! arguments, environment and log.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use super::READY_LIMIT;
use crate::{config::UPGRADE_DRAIN_MAX_SECONDS, lifecycle::agent::Agent};

/// For a whole upgrade; below what the local socket gives a request.
const UPGRADE_LIMIT: Duration = READY_LIMIT.saturating_add(Duration::from_secs(15));
/// What makes a new agent take over.
const TAKE_OVER: &str = "--take-over";

/// How a hand-over ended.
#[derive(Debug, Clone)]
pub(in crate::lifecycle) enum Outcome {
    /// Another agent serves.
    HandedOver {
        /// What is left of this one's connections is closed after it.
        drain_deadline: Duration,
    },
    /// This one goes on.
    Failed(String),
}

/// What is known of hand-overs from this agent, and how to start a successor.
#[derive(Debug)]
pub(in crate::lifecycle) struct Attempts {
    outcome: watch::Sender<Option<Outcome>>,
    /// One upgrade at a time.
    upgrading: tokio::sync::Mutex<()>,
    drain_deadline_seconds: Mutex<Option<u64>>,
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Attempts {
    /// None yet.
    ///
    /// # Errors
    /// When the system does not tell where this program lies.
    pub(in crate::lifecycle) fn new() -> std::io::Result<Self> {
        Ok(Self {
            outcome: watch::Sender::new(None),
            upgrading: tokio::sync::Mutex::default(),
            drain_deadline_seconds: Mutex::default(),
            // Read now: once the file is replaced, as package managers do, the kernel calls the running one deleted.
            program: std::env::current_exe()?,
            arguments: std::env::args_os().skip(1).collect(),
        })
    }

    pub(super) fn tell(&self, outcome: Outcome) {
        self.outcome.send_replace(Some(outcome));
    }

    /// What the operator asked for, if anything.
    pub(super) fn drain_deadline_seconds(&self) -> Option<u64> {
        *self.deadline()
    }

    fn deadline(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        let deadline = self.drain_deadline_seconds.lock();
        deadline.unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(&self.arguments).stdin(Stdio::null());
        if !self.arguments.iter().any(|argument| argument == TAKE_OVER) {
            command.arg(TAKE_OVER);
        }
        // What a terminal or a supervisor sends to this process's group is not for the successor.
        command.process_group(0);
        command
    }
}

impl Agent {
    /// Starts another agent and waits until it serves. Returns what was done.
    ///
    /// # Errors
    /// Says why this agent goes on.
    pub(in crate::lifecycle) async fn upgrade(
        &self,
        program: Option<&str>,
        drain_deadline_seconds: Option<u64>,
    ) -> Result<String, String> {
        let Ok(_one_at_a_time) = self.attempts.upgrading.try_lock() else {
            return Err("an upgrade is under way".to_owned());
        };
        let program = program.map_or(self.attempts.program.as_path(), Path::new);
        if !program.is_absolute() {
            return Err(format!("{} is not an absolute path", program.display()));
        }
        if drain_deadline_seconds.is_some_and(|seconds| seconds > UPGRADE_DRAIN_MAX_SECONDS) {
            return Err(format!(
                "a drain deadline of more than {UPGRADE_DRAIN_MAX_SECONDS} s"
            ));
        }
        *self.attempts.deadline() = drain_deadline_seconds;
        let mut outcomes = self.attempts.outcome.subscribe();
        outcomes.mark_unchanged();
        let mut child = Child::start(&mut self.attempts.command(program))
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        tracing::info!(pid = child.pid, program = %program.display(), "started an agent that shall take over");
        let ended = tokio::select! {
            ended = timeout(UPGRADE_LIMIT, outcomes.changed()) => ended.map(drop).map_err(|_| None),
            status = child.ended() => Err(Some(status)),
        };
        let outcome = outcomes.borrow().clone().filter(|_| match ended {
            Ok(()) => true,
            // It ends right after it has said why.
            Err(_) => outcomes.has_changed().unwrap_or(false),
        });
        match (outcome, ended) {
            (Some(Outcome::HandedOver { drain_deadline }), _) => Ok(format!(
                "process {} serves; {} connections of process {} get up to {} s to end",
                child.pid,
                self.workers.live(),
                std::process::id(),
                drain_deadline.as_secs()
            )),
            (Some(Outcome::Failed(reason)), _) => Err(format!(
                "{reason}\n  the agent that ran before goes on, nothing was changed"
            )),
            (None, Err(Some(status))) => Err(format!(
                "{} ended with {status} before it took over; its reason is in the agent's log\n  the agent that ran \
                 before goes on, nothing was changed",
                program.display()
            )),
            (None, _) => {
                child.kill();
                Err(format!(
                    "{} did not take over within {} s and was ended",
                    program.display(),
                    UPGRADE_LIMIT.as_secs()
                ))
            }
        }
    }
}

/// A process that is reaped by a thread of its own, however long it runs.
struct Child {
    pid: u32,
    ended: oneshot::Receiver<ExitStatus>,
}

impl Child {
    fn start(command: &mut Command) -> std::io::Result<Self> {
        let mut child = command.spawn()?;
        let pid = child.id();
        let (tell, ended) = oneshot::channel();
        let reaper = std::thread::Builder::new()
            .name("weft-reaper".to_owned())
            .spawn(move || {
                if let Ok(status) = child.wait() {
                    // Nobody asks any more once it serves.
                    let _ = tell.send(status);
                }
            });
        // Without a thread it is not reaped before this process ends, which does no harm.
        if let Err(error) = reaper {
            tracing::warn!(%error, pid, "the new agent is not watched");
        }
        Ok(Self { pid, ended })
    }

    async fn ended(&mut self) -> ExitStatus {
        match (&mut self.ended).await {
            Ok(status) => status,
            // Not watched: the other ways of the wait remain.
            Err(_) => std::future::pending().await,
        }
    }

    fn kill(&mut self) {
        if self.ended.try_recv().is_err()
            && let Err(error) = kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL)
        {
            tracing::warn!(pid = self.pid, %error, "cannot end the new agent");
        }
    }
}
