//! The lab itself, without a mesh: what it builds works, its oracles see what they must, and nothing stays behind.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    capture::LinkCapture,
    cleanup,
    lab::{Families, Lab, LabSpec, PodSpec},
    process::{Program, killed_by},
    programs,
    seqecho::report::Report,
    wait,
};
use nix::sys::signal::{Signal, kill};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
const FAMILIES: [Families; 3] = [Families::V4, Families::V6, Families::Dual];

fn two_nodes(families: Families) -> LabSpec {
    LabSpec::new(families)
        .node("n1", [PodSpec::new("a"), PodSpec::new("b")])
        .node("n2", [PodSpec::new("c")])
}

fn seqecho(arguments: &str) -> Result<Program> {
    Ok(Program::new(programs::own("seqecho")?).args(arguments.split_whitespace()))
}

/// Runs the seqecho client in one pod against a server in another and returns its report.
fn echo_across(lab: &Lab, from: &str, to: &str, arguments: &str) -> Result<Report> {
    let (from, to) = (lab.pod(from)?, lab.pod(to)?);
    let mut last = None;
    for address in &to.addresses {
        let server = std::net::SocketAddr::new(*address, PORT);
        let _server = lab.serve(
            to,
            &seqecho(&format!("server --listen {server}"))?,
            server,
            LIMIT,
        )?;
        let client = lab.run(
            from,
            &seqecho(&format!("client --to {server} {arguments}"))?,
            LIMIT,
        )?;
        last = Some(Report::parse(&client.ok()?)?);
    }
    last.context("every pod has an address")
}

#[test]
fn pods_reach_each_other_across_and_within_nodes_in_every_family() -> Result<()> {
    for families in FAMILIES {
        let lab = Lab::build(two_nodes(families))?;
        for (from, to) in [("a", "c"), ("a", "b"), ("c", "a")] {
            let report = echo_across(&lab, from, to, "--connections 5 --records 20")?;
            assert_eq!(
                (report.lost(), report.records),
                (0, 100),
                "{families:?} {from} to {to}"
            );
        }
    }
    Ok(())
}

#[test]
fn three_nodes_are_joined_by_a_bridge() -> Result<()> {
    let spec = two_nodes(Families::Dual)
        .node("n3", [PodSpec::new("d")])
        .link_mtu(1400);
    let lab = Lab::build(spec)?;
    for (from, to) in [("a", "d"), ("c", "d"), ("d", "b")] {
        assert_eq!(
            echo_across(&lab, from, to, "--records 3")?.lost(),
            0,
            "{from} to {to}"
        );
    }
    let link = lab
        .run(
            lab.node("n2")?,
            &Program::line("ip -o link show link0"),
            LIMIT,
        )?
        .ok()?;
    assert!(link.contains("mtu 1400"), "{link}");
    Ok(())
}

#[test]
fn the_plaintext_oracle_sees_plaintext() -> Result<()> {
    for families in [Families::V4, Families::V6] {
        let lab = Lab::build(two_nodes(families))?;
        let capture = LinkCapture::start(&lab)?;
        echo_across(&lab, "a", "c", "--connections 10 --records 100")?;
        let verdict = capture.finish(&["WEFTSEQ"])?;
        // One request, 100 records and 100 echoes of 64 bytes on each of 10 connections.
        assert_eq!(
            verdict.plaintext_bytes,
            10 * 201 * 64,
            "{families:?}: {verdict}"
        );
        assert_eq!(
            verdict.markers["WEFTSEQ"],
            10 * 201,
            "{families:?}: {verdict}"
        );
        assert!(verdict.require_tls_only().is_err());
    }
    Ok(())
}

#[test]
fn the_plaintext_oracle_does_not_see_what_stays_on_a_node() -> Result<()> {
    let lab = Lab::build(two_nodes(Families::V4))?;
    let capture = LinkCapture::start(&lab)?;
    echo_across(&lab, "a", "b", "--records 10")?;
    let verdict = capture.finish(&["WEFTSEQ"])?;
    assert_eq!(
        (
            verdict.plaintext_bytes,
            verdict.tls_bytes,
            verdict.markers["WEFTSEQ"]
        ),
        (0, 0, 0)
    );
    Ok(())
}

#[test]
fn seqecho_tells_a_reset_from_an_end() -> Result<()> {
    let lab = Lab::build(two_nodes(Families::V4))?;
    for (mode, end) in [
        ("server-fin", "fin"),
        ("server-rst", "rst"),
        ("answer", "fin"),
        ("answer-and-fin", "fin"),
    ] {
        let report = echo_across(
            &lab,
            "a",
            "c",
            &format!("--mode {mode} --connections 5 --records 50"),
        )?;
        assert_eq!(
            (report.lost(), report.records),
            (0, 250),
            "{mode}: {report:?}"
        );
        assert_eq!(report.ends.get(end), Some(&5), "{mode}: {report:?}");
    }
    Ok(())
}

#[test]
fn seqecho_counts_what_is_lost() -> Result<()> {
    let lab = Lab::build(two_nodes(Families::V4))?;
    let client = seqecho(&format!(
        "client --to {} --connections 3",
        lab.pod("c")?.at(PORT)
    ))?;
    let refused = lab.run(lab.pod("a")?, &client, LIMIT)?;
    let report = Report::parse(&refused.stdout)?;
    assert_eq!(
        (report.lost(), report.connect_errors.get("ECONNREFUSED")),
        (3, Some(&3))
    );
    assert!(!refused.status.success());

    let (pod, address) = (lab.pod("c")?, lab.pod("c")?.at(PORT));
    let server = lab.serve(
        pod,
        &seqecho(&format!("server --listen {address}"))?,
        address,
        LIMIT,
    )?;
    let client = seqecho(&format!(
        "client --to {address} --connections 4 --seconds 60 --interval-ms 10"
    ))?;
    let client = lab.spawn(lab.pod("a")?, &client)?;
    wait::until("the connections to be open", LIMIT, || {
        let sockets = lab
            .run(
                pod,
                &Program::line("ss -Htn state established sport = :7000"),
                LIMIT,
            )?
            .ok()?;
        Ok((sockets.lines().count() == 4).then_some(()))
    })?;
    server.kill()?;
    let report = Report::parse(&client.wait(LIMIT)?.stdout)?;
    assert_eq!(report.lost(), 4, "{report:?}");
    Ok(())
}

#[test]
fn a_removed_pod_is_gone_and_its_address_can_move() -> Result<()> {
    let mut lab = Lab::build(two_nodes(Families::Dual))?;
    let addresses = lab.pod("b")?.addresses.clone();
    lab.remove_pod("b")?;
    let moved = addresses
        .iter()
        .fold(PodSpec::new("e"), |spec, address| spec.address(*address));
    lab.add_pod("n2", moved)?;
    assert_eq!(echo_across(&lab, "a", "e", "--records 3")?.lost(), 0);
    Ok(())
}

#[test]
fn nothing_is_left_when_a_lab_is_dropped_or_a_test_panics() -> Result<()> {
    let lab = Lab::build(two_nodes(Families::Dual))?;
    let prefix = lab.prefix().to_owned();
    // A program that leaves its process group and its parent behind still dies: it is in the pod's cgroup.
    let daemon = Program::new("sh").args(["-c", "setsid sleep 4242 & echo $!"]);
    let pid: i32 = lab
        .run(lab.pod("a")?, &daemon, LIMIT)?
        .ok()?
        .trim()
        .parse()?;
    let child = lab.spawn(lab.pod("c")?, &Program::line("sleep 4243"))?;
    let child_pid = child.pid();
    ensure!(!cleanup::leftovers(&prefix)?.is_empty(), "the lab exists");

    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _owned = (child, lab);
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(cleanup::leftovers(&prefix)?, Vec::<String>::new());
    for pid in [pid, child_pid.as_raw()] {
        assert!(!is_alive(pid), "process {pid} survived");
    }
    Ok(())
}

#[test]
fn an_interrupted_or_killed_run_leaves_nothing_that_clean_up_does_not_find() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let home = Lab::build(LabSpec::new(Families::V4).node("home", []))?;
        let prefix = format!("inner{}", std::process::id());
        let inner = Program::new(programs::own("lab")?).args(["hold", "--prefix", &prefix]);
        let mut inner = home.spawn(home.node("home")?, &inner)?;
        inner.wait_for_output("the lab is up", LIMIT)?;
        let pid: i32 = wait::until("the inner program's id", LIMIT, || {
            let output = inner.stdout();
            Ok(output
                .lines()
                .find_map(|line| line.strip_prefix("child ")?.parse().ok()))
        })?;
        kill(inner.pid(), signal)?;
        let finished = inner.wait(LIMIT)?;
        if signal == Signal::SIGKILL {
            assert!(killed_by(finished.status, signal));
            wait::until("the child of a killed run to die", LIMIT, || {
                Ok((!is_alive(pid)).then_some(()))
            })?;
            ensure!(
                !cleanup::leftovers(&prefix)?.is_empty(),
                "SIGKILL cannot be handled"
            );
            cleanup::remove(&prefix)?;
        } else {
            assert_eq!(
                finished.status.code(),
                Some(130),
                "{signal}: {}",
                finished.stderr
            );
            assert!(!is_alive(pid), "{signal}: the child survived");
        }
        assert_eq!(
            cleanup::leftovers(&prefix)?,
            Vec::<String>::new(),
            "{signal}"
        );
    }
    Ok(())
}

/// Alive means more than a zombie that its new parent has not reaped yet.
fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with('Z')
    })
}
