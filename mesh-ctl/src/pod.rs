//! `weft pod`: what the pods of the Helm chart need from the inside. Their images hold no shell and no curl.
//!
//! At an upgrade two agents share a node, its ports and its run directory for a while. Which of them a pod's probe talks
//! to, the answer's process id tells: the agent that shares this process's mount namespace is the one of this pod.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use mesh_api::local::Request;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, Signal},
        statvfs::{FsFlags, statvfs},
    },
};
use serde_json::Value;

use crate::{
    cli::{DrainArgs, PodCommand, PodRunArgs},
    client::{Client, ClientError},
    run::{Exit, pause},
};

/// Where the kernel's settings of network namespaces are written; read-only in a container that is not privileged.
const SETTINGS: &str = "/proc/sys";
/// The cgroup namespace of the node, as seen with the node's process ids.
const NODE_CGROUPS: &str = "/proc/1/ns/cgroup";
/// Between two looks at an agent that drains or ends. Nobody waits for it to the second.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Answers in a row that an agent may owe before it counts as gone.
const ANSWERS_MISSED_MAX: u32 = 5;
/// How long `run --after-agent` waits: longer than an agent that is told to end takes, draining and removal included.
const AGENT_END_MAX: Duration = Duration::from_secs(120);
/// Longest wait for a connection of `reach`.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How much of an HTTP answer is read: its first line says it all.
const ANSWER_MAX_BYTES: u64 = 4096;

/// Why a command of a pod failed.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The serving agent belongs to another pod.
    #[error(
        "process {pid}, which serves this node, is not of this pod; this pod's agent has not taken over"
    )]
    OtherPod { pid: u64 },
    /// It serves, but not everything yet.
    #[error("the agent waits for: {0}")]
    Pending(String),
    /// The agent ought to have ended.
    #[error(
        "an agent still runs on this node after {0:?}; it must end before what it left is removed"
    )]
    StillRuns(Duration),
    /// A step of `run`.
    #[error("cannot {what}: {source}\n  {hint}")]
    Step {
        what: String,
        source: io::Error,
        hint: &'static str,
    },
    /// A target of `reach`.
    #[error("{target}: {reason}")]
    Unreached { target: String, reason: String },
    /// The agent cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Carries out a command.
///
/// # Errors
/// See [`PodError`].
pub fn execute(command: &PodCommand, client: &Client) -> Result<Exit, PodError> {
    match command {
        PodCommand::Run(args) => run(args, client),
        PodCommand::Ready => ready(&status(client)?, &is_of_this_pod),
        PodCommand::Drain(args) => {
            drain(args, client);
            Ok(Exit::Done)
        }
        PodCommand::Idle => idle(),
        PodCommand::Reach { targets } => {
            for target in targets {
                reach(target)?;
            }
            Ok(Exit::Done)
        }
    }
}

fn status(client: &Client) -> Result<Value, ClientError> {
    Ok(client.ask(&Request::Status)?.json)
}

/// Whether a process lives in the mount namespace that this one lives in: containers have one each.
fn is_of_this_pod(pid: u64) -> bool {
    let namespace = |pid: &str| fs::read_link(Path::new("/proc").join(pid).join("ns/mnt"));
    match (namespace("self"), namespace(&pid.to_string())) {
        (Ok(own), Ok(other)) => own == other,
        _ => false,
    }
}

fn ready(status: &Value, is_ours: &dyn Fn(u64) -> bool) -> Result<Exit, PodError> {
    let pid = status["pid"].as_u64().unwrap_or_default();
    if !is_ours(pid) {
        return Err(PodError::OtherPod { pid });
    }
    let pending: Vec<&str> = status["pending"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !pending.is_empty() {
        return Err(PodError::Pending(pending.join(", ")));
    }
    Ok(Exit::Done)
}

/// What this pod's agent does for its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// It serves it.
    Serves,
    /// Another agent has taken over; this one has connections left.
    Drains,
    /// Another agent has taken over; nothing is left.
    Done,
}

fn part(status: &Value, is_ours: &dyn Fn(u64) -> bool) -> Part {
    let is_ours = |agent: &Value| agent["pid"].as_u64().is_some_and(is_ours);
    let mut draining = status["draining"].as_array().into_iter().flatten();
    if is_ours(status) {
        Part::Serves
    } else if draining.any(is_ours) {
        Part::Drains
    } else {
        Part::Done
    }
}

/// Waits for the agent of another pod to take over, then while this pod's agent has connections. A DaemonSet with a surge makes
/// the next pod as soon as this one is told to end (`podsShouldBeOnNode`, pkg/controller/daemon in Kubernetes), so ending
/// before it has come would only make a gap. When nobody comes in time, the agent is to be told to end.
fn drain(args: &DrainArgs, client: &Client) {
    let comes_until = Instant::now() + args.successor;
    let mut failures = 0;
    while failures < ANSWERS_MISSED_MAX {
        match status(client).map(|status| part(&status, &is_of_this_pod)) {
            Ok(Part::Done) | Err(ClientError::NotRunning { .. }) => return,
            Ok(Part::Serves) if Instant::now() >= comes_until => return,
            Ok(Part::Serves | Part::Drains) => failures = 0,
            // Both have the socket while one takes over from the other.
            Err(_) => failures += 1,
        }
        pause(LOOK_INTERVAL);
    }
}

/// Prepares what an agent needs and a container lacks, and becomes the program.
fn run(args: &PodRunArgs, client: &Client) -> Result<Exit, PodError> {
    if args.after_agent {
        await_end(client)?;
    }
    open_settings()?;
    join_node_cgroups()?;
    let mut words = args.program.iter();
    let program = words.next().map_or("", String::as_str);
    let source = Command::new(program).args(words).exec();
    Err(PodError::Step {
        what: format!("run {program}"),
        source,
        hint: "the image must hold it",
    })
}

fn await_end(client: &Client) -> Result<(), PodError> {
    let ends_at = Instant::now() + AGENT_END_MAX;
    loop {
        match client.ask(&Request::Status) {
            Err(ClientError::NotRunning { .. }) => return Ok(()),
            _ if Instant::now() > ends_at => return Err(PodError::StillRuns(AGENT_END_MAX)),
            _ => pause(LOOK_INTERVAL),
        }
    }
}

/// Container runtimes mount `/proc/sys` read-only. The mount is this container's own, so the node's is not touched; what can
/// be written through it is limited by capabilities as before.
fn open_settings() -> Result<(), PodError> {
    let step = |what: &str, errno: nix::errno::Errno| PodError::Step {
        what: what.to_owned(),
        source: errno.into(),
        hint: "it needs CAP_SYS_ADMIN, and an AppArmor profile that allows mount(2) (agent.security.appArmorProfile)",
    };
    let flags = statvfs(SETTINGS).map_err(|errno| step("look at /proc/sys", errno))?;
    if !flags.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let writable = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount::<str, str, str, str>(None, SETTINGS, None, writable, None)
        .map_err(|errno| step("make /proc/sys writable for this container", errno))
}

/// In a cgroup namespace of its own the kernel refuses to move the agent into the cgroup by which its sockets are known
/// (`cgroup_attach_permissions` with `nsdelegate`, kernel/cgroup/cgroup.c).
fn join_node_cgroups() -> Result<(), PodError> {
    let same = fs::read_link(NODE_CGROUPS).ok() == fs::read_link("/proc/self/ns/cgroup").ok();
    if same {
        return Ok(());
    }
    let enter = || -> io::Result<()> {
        let namespace = File::open(NODE_CGROUPS)?;
        Ok(setns(namespace, CloneFlags::CLONE_NEWCGROUP)?)
    };
    enter().map_err(|source| PodError::Step {
        what: "enter the node's cgroup namespace".to_owned(),
        source,
        hint: "it needs CAP_SYS_ADMIN, CAP_SYS_PTRACE and the node's process ids (agent.hostPID)",
    })
}

/// Does nothing until it is told to end: process 1 of a container has no default action for signals.
fn idle() -> Result<Exit, PodError> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    let waited = signals
        .thread_block()
        .and_then(|()| signals.wait().map(drop));
    waited.map_err(|errno| PodError::Step {
        what: "wait for a signal".to_owned(),
        source: errno.into(),
        hint: "this is a bug",
    })?;
    Ok(Exit::Done)
}

/// A place that must answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Path to ask for over HTTP; a connection suffices without.
    http_path: Option<String>,
    host: String,
    port: u16,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || format!("{text:?} is neither tcp://HOST:PORT nor http://HOST:PORT/PATH");
        let (scheme, rest) = text.split_once("://").ok_or_else(usage)?;
        let (address, http_path) = match (scheme, rest.split_once('/')) {
            ("tcp", None) => (rest, None),
            ("http", None) => (rest, Some("/".to_owned())),
            ("http", Some((address, path))) => (address, Some(format!("/{path}"))),
            _ => return Err(usage()),
        };
        // The port is behind the last colon: the downward API gives IPv6 addresses without brackets.
        let (host, port) = address.rsplit_once(':').ok_or_else(usage)?;
        Ok(Self {
            http_path,
            host: host.trim_matches(['[', ']']).to_owned(),
            port: port.parse().map_err(|_| usage())?,
        })
    }
}

fn reach(target: &Target) -> Result<(), PodError> {
    let failed = |reason: String| PodError::Unreached {
        target: format!("{}:{}", target.host, target.port),
        reason,
    };
    let addresses = (target.host.as_str(), target.port)
        .to_socket_addrs()
        .map_err(|error| failed(format!("the name cannot be resolved: {error}")))?;
    let mut outcome = Err(failed("the name has no address".to_owned()));
    for address in addresses {
        outcome = TcpStream::connect_timeout(&address, CONNECT_MAX)
            .map_err(|error| failed(format!("{address} does not accept connections: {error}")));
        if outcome.is_ok() {
            break;
        }
    }
    let mut stream = outcome?;
    let Some(path) = &target.http_path else {
        return Ok(());
    };
    let mut answer = String::new();
    let asked = stream
        .set_read_timeout(Some(CONNECT_MAX))
        .and_then(|()| {
            let host = &target.host;
            write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n")
        })
        .and_then(|()| stream.take(ANSWER_MAX_BYTES).read_to_string(&mut answer));
    asked.map_err(|error| failed(format!("no answer to GET {path}: {error}")))?;
    match answer.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(failed(format!("GET {path} answered: {}", answer.trim()))),
    }
}

/// What `reach` is given, for the command line.
///
/// # Errors
/// A message for the user.
pub fn target(text: &str) -> Result<Target, String> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use std::{io::BufRead as _, net::TcpListener, thread};

    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_ready_when_its_own_agent_serves_everything() {
        let ours = |pid: u64| pid == 7;
        ready(&json!({"pid": 7, "pending": []}), &ours).expect("ready");
        let other = ready(&json!({"pid": 8, "pending": []}), &ours).expect_err("of another pod");
        assert!(other.to_string().contains("process 8"), "{other}");
        let waits = json!({"pid": 7, "pending": ["the control plane"]});
        let waits = ready(&waits, &ours).expect_err("waits");
        assert!(waits.to_string().contains("the control plane"), "{waits}");
    }

    #[test]
    fn a_pod_knows_its_part_while_agents_change() {
        let ours = |pid: u64| pid == 7;
        assert_eq!(part(&json!({"pid": 7}), &ours), Part::Serves);
        let replaced = json!({"pid": 8, "draining": [{"pid": 3}, {"pid": 7}]});
        assert_eq!(part(&replaced, &ours), Part::Drains);
        let drained = json!({"pid": 8, "draining": [{"pid": 3}]});
        assert_eq!(part(&drained, &ours), Part::Done);
        assert_eq!(part(&json!({"pid": 8}), &ours), Part::Done);
    }

    #[test]
    fn without_an_agent_there_is_nothing_to_wait_for() {
        let client = Client::new(Path::new("/nonexistent"), Duration::from_secs(1));
        let successor = Duration::from_secs(3600);
        drain(&DrainArgs { successor }, &client);
    }

    #[test]
    fn this_process_is_of_this_pod() {
        assert!(is_of_this_pod(u64::from(std::process::id())));
        assert!(!is_of_this_pod(u64::MAX));
    }

    #[test]
    fn targets_are_read_with_names_and_both_families() {
        let parsed = |text: &str| text.parse::<Target>().expect(text);
        assert_eq!(
            parsed("tcp://weft-control.weft-system.svc:15012").port,
            15012
        );
        let bare = parsed("http://fd00::1:15021/healthz/ready");
        assert_eq!(bare.host, "fd00::1");
        assert_eq!(bare.http_path.as_deref(), Some("/healthz/ready"));
        assert_eq!(parsed("http://[fd00::1]:15021/healthz/ready"), bare);
        for wrong in ["", "tcp://x", "tcp://x:99999", "udp://x:1", "tcp://x:1/y"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    /// A server that answers one request with this.
    fn answering(answer: &'static str) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let lines = io::BufReader::new(stream.try_clone().expect("a handle")).lines();
            lines
                .map_while(Result::ok)
                .take_while(|line| !line.is_empty())
                .for_each(drop);
            stream.write_all(answer.as_bytes()).expect("written");
        });
        format!("http://127.0.0.1:{port}/healthz/ready")
            .parse()
            .expect("a target")
    }

    #[test]
    fn only_an_answer_of_200_counts() {
        reach(&answering("HTTP/1.1 200 OK\r\n\r\nready\n")).expect("ready");
        let waits = answering("HTTP/1.1 503 Service Unavailable\r\n\r\nno certificate\n");
        let error = reach(&waits).expect_err("not ready").to_string();
        assert!(error.contains("no certificate"), "{error}");
    }
}
