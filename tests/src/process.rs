//! Programs inside the lab: started in a namespace and a cgroup, captured to files, killed and reaped on drop.
//!
//! A child is forked by one thread that lives as long as the process, because the parent-death signal that keeps a
//! killed harness from leaving programs behind follows the forking *thread*. That thread enters the namespace for
//! the moment of the fork, so the child needs no wrapper that would hide bpffs or cgroupfs (as `ip netns exec` does).

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use crate::{cleanup, netns, wait};

/// How much of a failed program's output an error shows, in bytes from its end.
const ERROR_TAIL_BYTES: usize = 4000;

/// How long a killed process may take to be reaped.
const REAP_LIMIT: Duration = Duration::from_secs(10);

/// A program to start, with its arguments.
#[derive(Debug, Clone)]
pub struct Program {
    name: String,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    stdin: Option<PathBuf>,
}

impl Program {
    /// A program by path, or by name on `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref();
        let name = Path::new(program)
            .file_name()
            .unwrap_or(program)
            .to_string_lossy()
            .into_owned();
        Self {
            name,
            arguments: vec![program.to_owned()],
            environment: Vec::new(),
            stdin: None,
        }
    }

    /// Splits a line at spaces into program and arguments; no quoting.
    #[must_use]
    pub fn line(line: &str) -> Self {
        let mut words = line.split_whitespace();
        Self::new(words.next().unwrap_or("true")).args(words)
    }

    /// Starts another file with the same arguments.
    #[must_use]
    pub fn with_file(mut self, program: impl AsRef<OsStr>) -> Self {
        if let Some(first) = self.arguments.first_mut() {
            program.as_ref().clone_into(first);
        }
        self
    }

    /// Replaces the value of an option, or adds the option.
    #[must_use]
    pub fn with_option(mut self, name: &str, value: &str) -> Self {
        let index = self.arguments.iter().position(|argument| argument == name);
        match index.and_then(|index| self.arguments.get_mut(index + 1)) {
            Some(present) => {
                *present = value.into();
                self
            }
            None => self.arg(name).arg(value),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(
            arguments
                .into_iter()
                .map(|argument| argument.as_ref().to_owned()),
        );
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Reads standard input from a file instead of nothing.
    #[must_use]
    pub fn stdin(mut self, path: impl Into<PathBuf>) -> Self {
        self.stdin = Some(path.into());
        self
    }

    /// Lets it open no more than so many descriptors.
    #[must_use]
    pub fn with_descriptors(mut self, most: u64) -> Self {
        let limited = [
            "sh".into(),
            "-c".into(),
            r#"ulimit -n "$0" && exec "$@""#.into(),
            most.to_string().into(),
        ];
        self.arguments.splice(0..0, limited);
        self
    }

    /// The name under which its output files and errors appear.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }
}

/// Where a program runs.
#[derive(Debug, Clone, Copy)]
pub struct Room<'a> {
    /// Network namespace; `None` is the harness's own.
    pub netns: Option<&'a Path>,
    /// Cgroup that the process joins before it becomes the program.
    pub cgroup: &'a Path,
    /// Folder for its output files.
    pub logs: &'a Path,
    /// Leave it running when the harness ends.
    pub outlive: bool,
}

/// A started program. Dropping it kills its process group and reaps it, unless it may outlive the harness.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    outlive: bool,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// The standard output of a program that must have succeeded.
    ///
    /// # Errors
    /// It failed; the error carries the end of its output.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "{}: {}\n{}{}",
            self.name,
            self.status,
            tail(&self.stdout),
            tail(&self.stderr)
        );
    }
}

/// Starts a program.
///
/// # Errors
/// The namespace or cgroup has gone, or the program does not exist.
pub fn spawn(room: Room<'_>, program: &Program) -> Result<Running> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let stem = room.logs.join(format!("{number:03}-{}", program.name));
    let (stdout, stderr) = (stem.with_extension("out"), stem.with_extension("err"));

    let mut command = wrapped(room, program);
    command
        .envs(
            program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(match &program.stdin {
            Some(path) => File::open(path)
                .with_context(|| format!("cannot open {}", path.display()))?
                .into(),
            None => Stdio::null(),
        })
        .stdout(
            File::create(&stdout).with_context(|| format!("cannot create {}", stdout.display()))?,
        )
        .stderr(
            File::create(&stderr).with_context(|| format!("cannot create {}", stderr.display()))?,
        )
        .process_group(0);
    let _permit = cleanup::permit();
    let child = fork(command, room.netns)?;
    Ok(Running {
        child,
        name: program.name.clone(),
        stdout,
        stderr,
        outlive: room.outlive,
    })
}

/// The command that joins the cgroup and becomes the program; with a parent-death signal unless it may outlive us.
/// `setpriv` and `sh` keep the process id, so signals reach the program itself.
fn wrapped(room: Room<'_>, program: &Program) -> Command {
    let join = r#"echo $$ >"$0" && exec "$@""#;
    let mut command;
    if room.outlive {
        command = Command::new("sh");
    } else {
        command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "sh"]);
    }
    command
        .arg("-c")
        .arg(join)
        .arg(room.cgroup.join("cgroup.procs"))
        .args(&program.arguments);
    command
}

impl Running {
    /// Process id of the program.
    #[must_use]
    pub fn pid(&self) -> Pid {
        // A process id always fits: the kernel's largest is 2^22.
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the program.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for the end of the program and collects its output.
    ///
    /// # Errors
    /// It does not end within `limit`; it is killed on drop.
    pub fn wait(mut self, limit: Duration) -> Result<Finished> {
        let status = self.await_exit(limit)?;
        Ok(Finished {
            name: self.name.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }

    /// Ends the program with a signal and collects its output.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub fn stop(self, signal: Signal, limit: Duration) -> Result<Finished> {
        // A program that has just ended by itself is fine: the wait below tells how.
        drop(self.signal(signal));
        self.wait(limit)
    }

    /// Kills the program and its process group with SIGKILL and reaps it.
    ///
    /// # Errors
    /// It cannot be reaped.
    pub fn kill(mut self) -> Result<()> {
        self.kill_now()
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stdout).unwrap_or_default()).into_owned()
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// The file that receives its standard output.
    #[must_use]
    pub fn stdout_path(&self) -> &Path {
        &self.stdout
    }

    /// The file that receives its standard error.
    #[must_use]
    pub fn stderr_path(&self) -> &Path {
        &self.stderr
    }

    /// Waits until its output (either stream) contains a text.
    ///
    /// # Errors
    /// It ends first, or `limit` passes; the error carries the end of its output.
    pub fn wait_for_output(&mut self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("{} to print {text:?}", self.name);
        wait::until(&what, limit, || {
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return Ok(Some(()));
            }
            self.check_running()?;
            Ok(None)
        })
        .with_context(|| {
            format!(
                "output of {}:\n{}{}",
                self.name,
                tail(&self.stdout()),
                tail(&self.stderr())
            )
        })
    }

    /// Makes sure that it still runs.
    ///
    /// # Errors
    /// It has ended; the error carries the end of its output.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!(
                    "{} ended: {status}\n{}{}",
                    self.name,
                    tail(&self.stdout()),
                    tail(&self.stderr())
                )
            }
        }
    }

    fn await_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait::until(&what, limit, || Ok(self.child.try_wait()?))
            .with_context(|| format!("output:\n{}{}", tail(&self.stdout()), tail(&self.stderr())))
    }

    fn kill_now(&mut self) -> Result<()> {
        if self.is_running() {
            // The group may be gone between the look and the kill; reaping below is what counts.
            let _ = killpg(self.pid(), Signal::SIGKILL);
        }
        self.await_exit(REAP_LIMIT).map(drop)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.outlive {
            return;
        }
        if let Err(error) = self.kill_now() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Whether a status says "killed by this signal".
#[must_use]
pub fn killed_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(ERROR_TAIL_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or(text)
}

/// One order to the forking thread.
struct Order {
    command: Command,
    netns: Option<PathBuf>,
    answer: mpsc::SyncSender<Result<Child>>,
}

fn fork(command: Command, netns: Option<&Path>) -> Result<Child> {
    static FORKER: OnceLock<mpsc::SyncSender<Order>> = OnceLock::new();
    let orders = FORKER.get_or_init(|| {
        let (orders, inbox) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("lab-forker".into())
            .spawn(move || serve_orders(&inbox))
            .expect("a thread can be started at the first use of the lab");
        orders
    });
    let (answer, child) = mpsc::sync_channel(1);
    orders
        .send(Order {
            command,
            netns: netns.map(Path::to_owned),
            answer,
        })
        .map_err(|_| anyhow!("the thread that starts programs has ended"))?;
    child
        .recv()
        .context("the thread that starts programs has ended")?
}

fn serve_orders(inbox: &mpsc::Receiver<Order>) {
    let home = File::open("/proc/thread-self/ns/net").expect("a thread can open its own namespace");
    for mut order in inbox {
        let child = (|| {
            if let Some(path) = &order.netns {
                netns::enter(path)?;
            }
            order
                .command
                .spawn()
                .with_context(|| format!("cannot start {:?}", order.command.get_program()))
        })();
        setns(&home, CloneFlags::CLONE_NEWNET)
            .expect("a thread can return to the namespace it came from");
        // The asker may have panicked; its child is then killed by the drop of the answer's owner or the cgroup.
        drop(order.answer.send(child));
    }
}
