//! The `weft` binary against a fake agent on a socket in a folder of the test's own.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::{Command, Output},
    thread::{self, JoinHandle},
};

use mesh_api::local::{Edge, Enrolment, Request, Response, SOCKET_NAME, Status};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A fake agent: answers one connection per entry, then goes away; gives back what it was asked.
struct FakeAgent {
    dir: TempDir,
    asked: JoinHandle<Vec<Request>>,
}

impl FakeAgent {
    fn answering(answers: Vec<Vec<u8>>) -> Self {
        Self::serving(answers.len(), move |index, stream| {
            // A client that gave up early is the test's business, not the fake's.
            let _ = stream.write_all(&answers[index]);
        })
    }

    fn serving(
        count: usize,
        mut answer: impl FnMut(usize, &mut UnixStream) + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().expect("temporary folder");
        let listener = UnixListener::bind(dir.path().join(SOCKET_NAME)).expect("bind");
        let asked = thread::spawn(move || {
            (0..count)
                .map(|index| {
                    let (mut stream, _) = listener.accept().expect("a client");
                    let mut line = String::new();
                    BufReader::new(&stream)
                        .read_line(&mut line)
                        .expect("a line");
                    assert!(line.ends_with('\n'), "the request is one whole line");
                    answer(index, &mut stream);
                    serde_json::from_str(&line).expect("a request of the protocol")
                })
                .collect()
        });
        Self { dir, asked }
    }

    fn asked(self) -> Vec<Request> {
        self.asked
            .join()
            .expect("the fake agent saw only valid requests")
    }
}

fn line(response: &Response) -> Vec<u8> {
    let mut line = serde_json::to_vec(response).expect("serialisable");
    line.push(b'\n');
    line
}

fn weft(run_dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .env("WEFT_RUN_DIR", run_dir)
        .args(args)
        .output()
        .expect("weft runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn node() -> Status {
    Status {
        node: "n1".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 7,
        uptime_ms: 61_000,
        discovery: "connected".to_owned(),
        snapshot: "current".to_owned(),
        workloads: Vec::new(),
        pending: Vec::new(),
        confinement: None,
        draining: Vec::new(),
    }
}

fn edge(bytes_sent: u64) -> Edge {
    Edge {
        direction: "outbound".to_owned(),
        source: "shop/web".to_owned(),
        destination: "shop/db".to_owned(),
        destination_address: None,
        security: "mutual_tls".to_owned(),
        open: 1,
        opened: 1,
        failed: 0,
        bytes_sent,
        bytes_received: 0,
        rtt_us: None,
    }
}

#[test]
fn enroll_sends_absolute_paths_and_prints_what_was_done() {
    let agent = FakeAgent::answering(vec![line(&Response::Done {
        message: "enrolled shop/web".to_owned(),
    })]);
    let output = weft(
        agent.dir.path(),
        &[
            "enroll",
            "--namespace",
            "shop",
            "--name",
            "web",
            "--netns",
            "n1-web",
        ],
    );
    assert_eq!(stdout(&output), "enrolled shop/web\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let expected = Enrolment {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        netns: "/run/netns/n1-web".to_owned(),
        cgroup: None,
    };
    assert_eq!(agent.asked(), [Request::Enroll(expected)]);
}

#[test]
fn unenroll_names_the_workload() {
    let agent = FakeAgent::answering(vec![line(&Response::Done {
        message: "gone".to_owned(),
    })]);
    let output = weft(
        agent.dir.path(),
        &[
            "unenroll",
            "--namespace",
            "shop",
            "--name",
            "web",
            "-o",
            "json",
        ],
    );
    let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(printed, json!({"message": "gone"}));
    assert_eq!(
        agent.asked(),
        [Request::Unenroll {
            namespace: "shop".to_owned(),
            name: "web".to_owned()
        }]
    );
}

#[test]
fn a_refusal_is_exit_code_1_with_the_agents_reason() {
    let message = "namespace /run/netns/x does not exist".to_owned();
    let agent = FakeAgent::answering(vec![line(&Response::Error { message })]);
    let output = weft(
        agent.dir.path(),
        &["enroll", "--namespace", "a", "--name", "b", "--netns", "x"],
    );
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "weft: the agent refused: namespace /run/netns/x does not exist\n"
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn status_as_a_table_and_as_the_agents_own_json() {
    let mut newer = serde_json::to_value(Response::Status(Box::new(node()))).expect("serialisable");
    newer["fieldOfALaterVersion"] = json!(5);
    let newer_line = format!("{newer}\n").into_bytes();
    let agent = FakeAgent::answering(vec![newer_line.clone(), newer_line]);
    let table = weft(agent.dir.path(), &["status"]);
    assert!(
        stdout(&table).starts_with("Node       n1\nAgent      0.1.0, pid 7, up 1m1s\n"),
        "{table:?}"
    );
    let output = weft(agent.dir.path(), &["status", "-o", "json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    newer.as_object_mut().expect("object").remove("result");
    assert_eq!(printed, newer);
    assert_eq!(agent.asked(), [Request::Status, Request::Status]);
}

#[test]
fn dump_prints_the_state() {
    let state = json!({"services": [{"name": "shop/web"}]});
    let answer = line(&Response::Dump {
        state: state.clone(),
    });
    let agent = FakeAgent::answering(vec![answer.clone(), answer]);
    let output = weft(agent.dir.path(), &["dump", "-o", "json"]);
    assert_eq!(
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON"),
        state
    );
    let table = weft(agent.dir.path(), &["dump"]);
    assert_eq!(stdout(&table), "services (1)\nNAME\nshop/web\n");
    assert_eq!(agent.asked(), [Request::Dump, Request::Dump]);
}

#[test]
fn top_takes_two_samples_and_prints_rates() {
    let sample = |bytes| {
        line(&Response::Top {
            edges: vec![edge(bytes)],
        })
    };
    let agent = FakeAgent::answering(vec![sample(0), sample(1_000_000)]);
    let output = weft(
        agent.dir.path(),
        &["top", "--interval", "0.1", "-o", "json"],
    );
    let rows: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(rows[0]["bytesSent"], json!(1_000_000), "{rows}");
    assert!(
        rows[0]["sentBytesPerSecond"]
            .as_f64()
            .is_some_and(|rate| rate > 0.0),
        "{rows}"
    );
    assert_eq!(agent.asked(), [Request::Top, Request::Top]);
}

#[test]
fn top_watches_until_the_agent_goes_away() {
    let sample = || {
        line(&Response::Top {
            edges: vec![edge(0)],
        })
    };
    let agent = FakeAgent::answering(vec![sample(), sample(), sample()]);
    let output = weft(
        agent.dir.path(),
        &["top", "--watch", "--interval", "0.1", "-o", "json"],
    );
    assert_eq!(stdout(&output).lines().count(), 2, "one line per interval");
    assert_eq!(output.status.code(), Some(3));
    assert!(
        stderr(&output).contains("nobody listens"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn without_an_agent_it_says_where_it_looked_and_how_to_start_one() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let output = weft(dir.path(), &["status"]);
    assert_eq!(output.status.code(), Some(3));
    let said = stderr(&output);
    let socket = dir.path().join(SOCKET_NAME);
    assert!(
        said.contains(&format!("there is no socket at {}", socket.display())),
        "{said}"
    );
    assert!(
        said.contains(&format!(
            "mesh-agent run --run-dir {}",
            dir.path().display()
        )),
        "{said}"
    );
}

#[test]
fn a_path_too_long_for_a_socket_is_an_error_not_a_crash() {
    let output = weft(Path::new(&format!("/tmp/{}", "d".repeat(200))), &["status"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        stderr(&output).contains("cannot connect to the agent"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn answers_that_are_none_are_a_version_mismatch() {
    for garbage in [
        &b"\xff\xfe\x00garbage\n"[..],
        b"{}\n",
        b"\n",
        b"{\"result\":\"restarted\"}\n",
        b"{\"result\":\"status\",\"node\":5}\n",
        b"{\"result\":\"top\",\"edges\":[]}\n",
    ] {
        let agent = FakeAgent::answering(vec![garbage.to_vec()]);
        let output = weft(agent.dir.path(), &["status"]);
        assert_eq!(output.status.code(), Some(1), "{garbage:?}");
        assert!(
            stderr(&output).contains("must be of the same version"),
            "{}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn half_an_answer_is_never_taken_for_one() {
    let whole = line(&Response::Done {
        message: "enrolled".to_owned(),
    });
    for cut in [0, whole.len() / 2, whole.len() - 1] {
        let agent = FakeAgent::answering(vec![whole[..cut].to_vec()]);
        let output = weft(
            agent.dir.path(),
            &["unenroll", "--namespace", "a", "--name", "b"],
        );
        assert_eq!(output.status.code(), Some(3), "cut at {cut}");
        assert!(
            stderr(&output).contains("without a whole answer"),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn an_endless_answer_is_cut_off() {
    let agent = FakeAgent::serving(1, |_, stream| {
        let block = vec![b'x'; 1 << 20];
        while stream.write_all(&block).is_ok() {}
    });
    let output = weft(agent.dir.path(), &["dump"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("longer than"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_silent_agent_costs_the_deadline_and_no_more() {
    let agent = FakeAgent::serving(1, |_, stream| {
        // Until the client gives up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let output = weft(agent.dir.path(), &["status", "--timeout", "0.2"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        stderr(&output).contains("did not answer within 200ms"),
        "{}",
        stderr(&output)
    );
    assert_eq!(agent.asked(), [Request::Status]);
}

#[test]
fn a_request_that_the_agent_would_not_read_is_not_sent() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let long = "n".repeat(mesh_api::local::REQUEST_MAX_BYTES);
    let output = weft(
        dir.path(),
        &["unenroll", "--namespace", "a", "--name", &long],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("the agent reads at most 16384"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn check_needs_no_agent_and_its_json_has_every_finding() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let output = weft(dir.path(), &["check", "-o", "json"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let failed = findings.iter().any(|finding| finding["outcome"] == "fail");
    assert_eq!(
        output.status.code(),
        Some(i32::from(failed)),
        "{}",
        stdout(&output)
    );
    let agent = findings
        .iter()
        .find(|finding| finding["check"] == "agent")
        .expect("a finding on the agent");
    assert_eq!(agent["outcome"], "warn");
    for finding in &findings {
        assert_eq!(
            finding["outcome"] == "ok",
            finding.get("fix").is_none(),
            "{finding}"
        );
    }
}
