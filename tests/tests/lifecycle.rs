//! Starting, dying, restarting, enrolling, un-enrolling and uninstalling: nothing leaks, nothing stays behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    capture::LinkCapture,
    inventory::{self, Inventory},
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    manifests,
    mesh::{ADMIN_PORT, METRICS_PORT, Mesh, MeshSpec, READINESS_PORT},
    process::{Finished, Program, Running},
    programs,
    seqecho::report::Report,
    wait,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;
/// Text in every record of seqecho, which must not be seen between nodes.
const MARKER: &str = "WEFTSEQ";

/// Agent deaths per run; the reliability table's ten take too long for a test that runs all day.
const KILLS: usize = 3;
/// Rounds of un-enrolling and enrolling; the reliability table's twenty take too long.
const ROUNDS: usize = 8;
/// Connections open while a pod is enrolled.
const HELD: usize = 20;
/// The promise is 2 s on an idle machine; tests run on a loaded one, with unoptimised programs.
const SERVES_AGAIN_WITHIN: Duration = Duration::from_secs(20);

fn seqecho(arguments: &str) -> Result<Program> {
    Ok(Program::new(programs::own("seqecho")?).args(arguments.split_whitespace()))
}

fn serve(lab: &Lab, pod: &Pod) -> Result<Running> {
    let address = pod.at(PORT);
    lab.serve(
        pod,
        &seqecho(&format!("server --listen {address}"))?,
        address,
        LIMIT,
    )
}

/// Runs the client to its end; what it lost is in the report.
fn client(lab: &Lab, from: &Pod, to: SocketAddr, arguments: &str) -> Result<Report> {
    let program = seqecho(&format!("client --to {to} {arguments}"))?;
    report(lab.run(from, &program, LIMIT)?)
}

fn report(finished: Finished) -> Result<Report> {
    Report::parse(&finished.stdout)
        .with_context(|| format!("no report: {}{}", finished.stdout, finished.stderr))
}

/// The client must lose nothing.
fn require_service(lab: &Lab, mesh: &Mesh, from: &Pod, to: SocketAddr) -> Result<()> {
    let report = client(lab, from, to, "--connections 5 --records 5")?;
    ensure!(
        report.lost() == 0 && report.records == 25,
        "{} to {to} lost something: {report:?}\n{}",
        from.spec.name,
        logs(lab, mesh)
    );
    Ok(())
}

fn logs(lab: &Lab, mesh: &Mesh) -> String {
    let logs = lab.nodes().iter().map(|node| mesh.log_of(node));
    logs.collect::<Vec<_>>().join("\n")
}

/// Tries until a connection works; the time since `since`.
fn time_to_service(lab: &Lab, from: &Pod, to: SocketAddr, since: Instant) -> Result<Duration> {
    wait::until("service after a restart", SERVES_AGAIN_WITHIN, || {
        let report = client(lab, from, to, "--records 1")?;
        Ok((report.lost() == 0).then(|| since.elapsed()))
    })
}

fn workload_status(lab: &Lab, mesh: &Mesh, node: &Node, name: &str) -> Result<Value> {
    let status = mesh
        .status(lab, node)?
        .context("the agent does not answer")?;
    let workloads = status["workloads"].as_array().cloned().unwrap_or_default();
    let found = workloads.into_iter().find(|one| one["name"] == name);
    Ok(found.unwrap_or_default())
}

/// `web` and the un-enrolled `plain` and `bystander` on the first node, `cart` on the second.
fn two_nodes(families: Families) -> Result<Lab> {
    Lab::build(
        LabSpec::new(families)
            .node(
                "n1",
                [
                    PodSpec::new("web"),
                    PodSpec::new("plain").unmeshed(),
                    PodSpec::new("bystander").unmeshed(),
                ],
            )
            .node("n2", [PodSpec::new("cart")]),
    )
}

#[test]
fn a_killed_agent_means_refused_connections_no_plaintext_and_quick_recovery() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, plain) = (lab.pod("web")?, lab.pod("plain")?);
    let (cart, bystander) = (lab.pod("cart")?, lab.pod("bystander")?);
    let _servers = (serve(&lab, cart)?, serve(&lab, bystander)?);
    let node = lab.node("n1")?;
    let before = inventory::links(&lab, node)?;
    let records = fs::read_to_string(node.run_dir.join("workloads.json"))?;

    let capture = LinkCapture::start(&lab)?;
    let load = lab.spawn(
        web,
        &seqecho(&format!(
            "client --to {} --rate 50 --seconds 8 --records 20 --interval-ms 20",
            cart.at(PORT)
        ))?,
    )?;
    let unmeshed = lab.spawn(
        plain,
        &seqecho(&format!(
            "client --to {} --rate 50 --seconds 8 --records 20 --interval-ms 20",
            bystander.at(PORT)
        ))?,
    )?;
    for kill in 1..=KILLS {
        wait::until("connections under way", LIMIT, || {
            Ok((inventory::established(&cart.netns, PORT)? > 2).then_some(()))
        })?;
        mesh.stop_agent(node, Signal::SIGKILL)?;
        let dead = client(&lab, web, cart.at(PORT), "--connections 20")?;
        ensure!(
            dead.connect_errors == BTreeMap::from([("ECONNREFUSED".to_owned(), 20)]),
            "kill {kill}: connections without an agent must be refused inside connect(2): {dead:?}"
        );
        let restarted = Instant::now();
        mesh.start_agent(&lab, node)?;
        let took = time_to_service(&lab, web, cart.at(PORT), restarted)?;
        println!("kill {kill}: served again {took:?} after the start of the agent");
        mesh.wait_ready(&lab, node)?;
    }
    let seen = report(load.wait(LIMIT)?)?;
    println!("captured load over {KILLS} deaths: {seen:?}");
    ensure!(
        seen.connect_errors
            .keys()
            .all(|error| error == "ECONNREFUSED")
            && seen.gaps + seen.repeats + seen.damaged + seen.timeouts + seen.other_errors == 0,
        "connections may only be refused or end, never hang or be damaged: {seen:?}"
    );
    ensure!(
        seen.connect_errors.len() + usize::try_from(seen.resets + seen.early_eofs)? > 0,
        "the deaths of the agent were not felt, so this test proves nothing: {seen:?}"
    );
    let unmeshed = report(unmeshed.wait(LIMIT)?)?;
    ensure!(unmeshed.lost() == 0, "un-enrolled pods lost: {unmeshed:?}");
    let verdict = capture.finish(&[MARKER])?;
    println!("{verdict}");
    verdict.require_tls_only()?;

    let after = inventory::links(&lab, node)?;
    ensure!(
        before == after,
        "a restarted agent must keep the kernel's links: {before:?} became {after:?}"
    );
    let places: BTreeSet<_> = after.iter().map(|link| (&link.place, &link.hook)).collect();
    ensure!(
        places.len() == after.len(),
        "one program per hook: {after:?}"
    );
    ensure!(
        records == fs::read_to_string(node.run_dir.join("workloads.json"))?,
        "the enrolments on disk must not change by a restart"
    );
    the_destination_dies_too(&lab, &mut mesh)
}

/// Inbound: without an agent nothing reaches an enrolled server, neither by tunnel nor in plaintext.
fn the_destination_dies_too(lab: &Lab, mesh: &mut Mesh) -> Result<()> {
    let (web, plain, cart) = (lab.pod("web")?, lab.pod("plain")?, lab.pod("cart")?);
    let node = lab.node("n2")?;
    ensure!(
        client(lab, plain, cart.at(PORT), "--records 3")?.lost() == 0,
        "plaintext is accepted while policy permits it"
    );
    mesh.stop_agent(node, Signal::SIGKILL)?;
    for from in [web, plain] {
        let report = client(lab, from, cart.at(PORT), "--connections 5 --limit-ms 5000")?;
        ensure!(
            report.complete == 0 && report.records == 0 && report.timeouts == 0,
            "{}: a server without its agent must be out of reach at once: {report:?}",
            from.spec.name
        );
    }
    mesh.start_agent(lab, node)?;
    for from in [web, plain] {
        time_to_service(lab, from, cart.at(PORT), Instant::now())?;
    }
    Ok(())
}

#[test]
fn a_fail_open_workload_goes_on_directly_while_no_agent_runs() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let open = manifests::policy(
        "MeshPolicy",
        "weft-system",
        "open",
        json!({ "failureMode": "open" }),
    );
    let mut mesh = Mesh::start(&lab, MeshSpec::default().manifest("open", [open]))?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = serve(&lab, cart)?;
    for (node, name) in [("n1", "web"), ("n2", "cart")] {
        wait::until("the policy to arrive", LIMIT, || {
            let status = workload_status(&lab, &mesh, lab.node(node)?, name)?;
            Ok((status["failureMode"] == "open").then_some(()))
        })?;
    }
    let capture = LinkCapture::start(&lab)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    capture.finish(&[MARKER])?.require_tls_only()?;

    for node in lab.nodes() {
        mesh.stop_agent(node, Signal::SIGKILL)?;
    }
    let capture = LinkCapture::start(&lab)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    let verdict = capture.finish(&[])?;
    // Also the control that the oracle of the fail-closed test would see a leak.
    ensure!(
        verdict.plaintext_bytes > 0 && verdict.tls_bytes == 0,
        "{verdict}"
    );
    for node in lab.nodes() {
        mesh.start_agent(&lab, node)?;
    }
    for node in lab.nodes() {
        mesh.wait_ready(&lab, node)?;
    }
    for (node, name) in [("n1", "web"), ("n2", "cart")] {
        mesh.wait_enrolled(&lab, lab.node(node)?, lab.pod(name)?)?;
    }
    let capture = LinkCapture::start(&lab)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    capture.finish(&[MARKER])?.require_tls_only()
}

#[test]
fn enrolling_and_unenrolling_spare_open_connections_and_leave_nothing() -> Result<()> {
    let lab = two_nodes(Families::Dual)?;
    let untouched = Inventory::of(&lab)?;
    let mut mesh = Mesh::prepare(&lab, MeshSpec::default())?;
    mesh.write_pods(&lab)?;
    mesh.start_control(&lab)?;
    for node in lab.nodes() {
        mesh.start_agent(&lab, node)?;
    }
    for node in lab.nodes() {
        mesh.wait_ready(&lab, node)?;
    }
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = serve(&lab, cart)?;
    let idle = Inventory::of(&lab)?;
    let held = lab.spawn(
        web,
        &seqecho(&format!(
            "client --to {} --connections {HELD} --seconds 12 --interval-ms 20",
            cart.at(PORT)
        ))?,
    )?;
    wait::until("direct connections", LIMIT, || {
        Ok((inventory::established(&cart.netns, PORT)? == HELD).then_some(()))
    })?;
    mesh.enroll_all(&lab)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    let metrics = mesh.metrics(lab.node("n1")?)?;
    let tunnelled = metrics.sum(
        "weft_connections_opened_total",
        &[("direction", "outbound"), ("security", "mutual_tls")],
    );
    ensure!(
        tunnelled == 5.0,
        "connections after the enrolment take the mesh: {tunnelled}"
    );
    let enrolled = Inventory::of(&lab)?;
    enrolled
        .require_same_as(&idle)
        .expect_err("an enrolment leaves traces, else this test sees nothing");
    let members = [("n1", "web"), ("n2", "cart")];
    for round in 0..ROUNDS {
        let (node, pod) = members[round % members.len()];
        let (node, pod) = (lab.node(node)?, lab.pod(pod)?);
        mesh.unenroll(&lab, node, pod)?;
        mesh.enroll(&lab, node, pod)?;
        mesh.wait_enrolled(&lab, node, pod)?;
        require_service(&lab, &mesh, web, cart.at(PORT))?;
    }
    let held = report(held.wait(LIMIT)?)?;
    ensure!(
        held.lost() == 0 && held.complete == HELD as u64,
        "connections from before the enrolment must not notice anything: {held:?}"
    );
    for (node, pod) in members {
        mesh.unenroll(&lab, lab.node(node)?, lab.pod(pod)?)?;
    }
    same_but_for_files(&lab, &idle)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;

    // One node is stopped in order, the other dies with its workload enrolled.
    mesh.enroll(&lab, lab.node("n2")?, cart)?;
    mesh.stop_agent(lab.node("n1")?, Signal::SIGTERM)?.ok()?;
    mesh.stop_agent(lab.node("n2")?, Signal::SIGKILL)?;
    for node in lab.nodes() {
        mesh.uninstall(&lab, node)?;
        ensure!(!node.run_dir.exists(), "{} stays", node.run_dir.display());
        // The lab made it; only its content is the agent's.
        fs::create_dir(&node.run_dir)?;
    }
    Inventory::of(&lab)?.require_same_as(&untouched)?;
    require_service(&lab, &mesh, web, cart.at(PORT))
}

/// Everything as in `before`, except for the files that an agent keeps in its run directory while it runs.
fn same_but_for_files(lab: &Lab, before: &Inventory) -> Result<()> {
    for node in lab.nodes() {
        let records = fs::read_to_string(node.run_dir.join("workloads.json"))?;
        let records: Value = serde_json::from_str(&records)?;
        ensure!(records["workloads"] == json!([]), "{records}");
    }
    let now = Inventory::of(lab)?;
    now.without("workloads.json")
        .without("mesh.snapshot")
        .require_same_as(&before.without("workloads.json").without("mesh.snapshot"))
}

#[test]
fn sigterm_lets_connections_end() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = serve(&lab, cart)?;
    let (source, destination) = (lab.node("n1")?, lab.node("n2")?);
    for node in [source, destination] {
        // Ends within the drain deadline of 5 s.
        let short = lab.spawn(
            web,
            &seqecho(&format!(
                "client --to {} --connections {HELD} --records 40 --interval-ms 50",
                cart.at(PORT)
            ))?,
        )?;
        wait::until("connections under way", LIMIT, || {
            Ok((inventory::established(&cart.netns, PORT)? == HELD).then_some(()))
        })?;
        let stopped = mesh.stop_agent(node, Signal::SIGTERM)?;
        let drained = stopped.stderr.clone();
        stopped.ok()?;
        let report = report(short.wait(LIMIT)?)?;
        ensure!(
            report.lost() == 0,
            "{}: connections that end within the deadline lose nothing: {report:?}\n{drained}",
            node.name
        );
        ensure!(drained.contains("cut=0"), "{drained}");
        let late = client(&lab, web, cart.at(PORT), "--connections 3 --limit-ms 5000")?;
        ensure!(
            late.complete == 0 && late.timeouts == 0,
            "a stopped agent's workloads are refused at once: {late:?}"
        );
        mesh.start_agent(&lab, node)?;
        mesh.wait_ready(&lab, node)?;
        time_to_service(&lab, web, cart.at(PORT), Instant::now())?;
    }
    // Longer than the deadline: ended by the agent, not left hanging.
    let long = lab.spawn(
        web,
        &seqecho(&format!(
            "client --to {} --connections 3 --records 100000 --interval-ms 50 --limit-ms 10000",
            cart.at(PORT)
        ))?,
    )?;
    wait::until("connections under way", LIMIT, || {
        Ok((inventory::established(&cart.netns, PORT)? == 3).then_some(()))
    })?;
    let stopped = mesh.stop_agent(source, Signal::SIGTERM)?;
    ensure!(stopped.stderr.contains("cut=3"), "{}", stopped.stderr);
    let report = report(long.wait(LIMIT)?)?;
    ensure!(
        report.resets + report.early_eofs == 3 && report.timeouts == 0,
        "connections beyond the deadline end: {report:?}"
    );
    Ok(())
}

#[test]
fn a_second_agent_is_refused_and_the_first_is_unharmed() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = serve(&lab, cart)?;
    let node = lab.node("n1")?;
    // The snapshot is written when the agent finds the time.
    let before = Inventory::of(&lab)?.without("mesh.snapshot");
    let stream = lab.spawn(
        web,
        &seqecho(&format!(
            "client --to {} --connections 5 --seconds 3 --interval-ms 20",
            cart.at(PORT)
        ))?,
    )?;
    let other_ports = Arguments::of(&lab, &mesh, node)
        .with("--metrics-addr", "127.0.0.1:16020")
        .with("--readiness-addr", "127.0.0.1:16021")
        .with("--admin-addr", "127.0.0.1:16000");
    refused(&lab, node, &other_ports, &["another agent", "--run-dir"])?;
    let other_run_dir = lab.directory().join("second");
    let same_node = other_ports.with("--run-dir", &other_run_dir.to_string_lossy());
    refused(&lab, node, &same_node, &["another agent", "n1"])?;
    ensure!(!other_run_dir.exists(), "the second run directory stays");
    mesh.check_running()?;
    Inventory::of(&lab)?
        .without("mesh.snapshot")
        .require_same_as(&before)?;
    let report = report(stream.wait(LIMIT)?)?;
    ensure!(report.lost() == 0, "the first agent was harmed: {report:?}");
    require_service(&lab, &mesh, web, cart.at(PORT))
}

/// An agent's command line that can be changed.
#[derive(Debug, Clone)]
struct Arguments(BTreeMap<String, String>);

impl Arguments {
    fn of(lab: &Lab, mesh: &Mesh, node: &Node) -> Self {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let control = format!("https://{}:15012", lab.nodes()[0].address());
        let pairs = [
            ("--node", node.name.clone()),
            ("--run-dir", text(&node.run_dir)),
            ("--cgroup-root", text(&node.cgroup_root)),
            ("--bpffs-root", text(&node.bpffs_root)),
            ("--control-plane", control),
            (
                "--control-plane-ca",
                text(&mesh.directory().join("ca/root-cert.pem")),
            ),
            (
                "--token-file",
                text(&mesh.directory().join(format!("token-{}", node.name))),
            ),
        ];
        Self(pairs.map(|(flag, value)| (flag.to_owned(), value)).into())
    }

    fn with(&self, flag: &str, value: &str) -> Self {
        let mut changed = self.clone();
        changed.0.insert(flag.to_owned(), value.to_owned());
        changed
    }

    fn without(&self, flag: &str) -> Self {
        let mut changed = self.clone();
        changed.0.remove(flag);
        changed
    }

    fn program(&self) -> Result<Program> {
        let words = self.0.iter().flat_map(|(flag, value)| [flag, value]);
        Ok(Program::new(programs::own("mesh-agent")?)
            .named("refused-agent")
            .arg("run")
            .args(words))
    }
}

/// The agent must end with a failure whose message holds all of these texts.
fn refused(lab: &Lab, node: &Node, arguments: &Arguments, texts: &[&str]) -> Result<()> {
    refused_program(lab, node, &arguments.program()?, texts)
}

fn refused_program(lab: &Lab, node: &Node, program: &Program, texts: &[&str]) -> Result<()> {
    let finished = lab
        .spawn_agent(node, program)?
        .wait(LIMIT)
        .with_context(|| format!("an agent that must not start ({texts:?})"))?;
    println!("{}", finished.stderr.trim());
    ensure!(!finished.status.success(), "it reported success: {texts:?}");
    ensure!(
        finished.status.code().is_some(),
        "it crashed: {}",
        finished.stderr
    );
    for text in texts {
        ensure!(
            finished.stderr.contains(text),
            "the message lacks {text:?}: {}",
            finished.stderr
        );
    }
    Ok(())
}

#[test]
fn a_failed_start_says_why_and_leaves_nothing() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::prepare(&lab, MeshSpec::default())?;
    mesh.start_control(&lab)?;
    let node = lab.node("n1")?;
    let good = Arguments::of(&lab, &mesh, node);
    let before = Inventory::of(&lab)?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = lab.directory().join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let garbage = file("garbage.pem", "not a certificate")?;
    let empty = file("empty", "")?;
    let plain = lab.directory().to_string_lossy().into_owned();
    let cases = [
        (good.with("--bpffs-root", &plain), ["bpf", "--bpffs-root"]),
        (
            good.with("--cgroup-root", &plain),
            ["cgroup2", "--cgroup-root"],
        ),
        (
            good.with("--control-plane-ca", "/nonexistent/root.pem"),
            ["--control-plane-ca", "root-cert.pem"],
        ),
        (
            good.with("--control-plane-ca", &garbage),
            ["--control-plane-ca", "no PEM certificate"],
        ),
        (
            good.with("--token-file", "/nonexistent/token"),
            ["--token-file", "--node-tokens"],
        ),
        (good.with("--token-file", &empty), ["--token-file", "empty"]),
        (
            good.with("--control-plane", "http://10.0.0.1:1"),
            ["controlPlane.address", "https://"],
        ),
        (
            good.without("--control-plane"),
            ["controlPlane.address", "--standalone"],
        ),
        (
            good.without("--control-plane-ca"),
            ["controlPlane.caFile", "--control-plane-ca"],
        ),
        // Known only after the programs are loaded: they go again.
        (
            good.with("--control-plane", "https://"),
            ["control plane", "https://"],
        ),
        (good.without("--node"), ["node.name", "--node"]),
        (good.with("--node", "a/b"), ["node.name", "a/b"]),
        (
            good.with("--admin-addr", "0.0.0.0:15000"),
            ["listen.admin", "loopback"],
        ),
        (good.with("--workers", "many"), ["--workers", "many"]),
        (
            good.with("--no-such-flag", "1"),
            ["--no-such-flag", "Usage"],
        ),
        (
            good.without("--control-plane")
                .with("--standalone", "/nonexistent/manifests"),
            ["control plane", "/nonexistent/manifests"],
        ),
    ];
    for (arguments, texts) in cases {
        refused(&lab, node, &arguments, &texts)?;
    }
    for port in [METRICS_PORT, READINESS_PORT, ADMIN_PORT] {
        let _taken = inventory::occupy(&node.netns, SocketAddr::from(([127, 0, 0, 1], port)))?;
        refused(&lab, node, &good, &["in use", &port.to_string()])?;
    }
    bad_configuration(&lab, node, &good)?;
    let nobody = Program::line("setpriv --reuid 65534 --regid 65534 --clear-groups")
        .arg(programs::own("mesh-agent")?)
        .args([
            "run",
            "--node",
            "n1",
            "--control-plane",
            "https://10.0.0.1:1",
        ])
        .args(["--control-plane-ca", "/nonexistent/root.pem"]);
    refused_program(&lab, node, &nobody, &["must run as root", "CAP_BPF"])?;
    Inventory::of(&lab)?.require_same_as(&before)?;
    let new = lab.directory().join("deep/er/run");
    let in_new_folder = good
        .with("--run-dir", &new.to_string_lossy())
        .with("--bpffs-root", &plain);
    refused(&lab, node, &in_new_folder, &["--bpffs-root"])?;
    ensure!(
        !lab.directory().join("deep").exists(),
        "folders made for a failed start stay"
    );
    // The control: the same command line without a mistake starts.
    let mut agent = lab.spawn_agent(node, &good.program()?)?;
    agent.wait_for_output("agent is running", LIMIT)
}

fn bad_configuration(lab: &Lab, node: &Node, good: &Arguments) -> Result<()> {
    let path = lab.directory().join("bad.yaml");
    let with_file = good.with("--config", &path.to_string_lossy());
    let cases: [(&str, &[&str]); 6] = [
        ("node:\n  nmae: x\n", &["bad.yaml", "line 2", "nmae"]),
        (
            "proxy:\n  workers: many\n",
            &["bad.yaml", "line 2", "workers"],
        ),
        ("node: [\n", &["bad.yaml", "line"]),
        (
            "workloads:\n- namespace: a\n  name: b\n",
            &["bad.yaml", "netns"],
        ),
        (
            "workloads:\n- {namespace: a, name: b, netns: run/x}\n",
            &["workloads", "absolute"],
        ),
        (
            "listen:\n  metrics: here\n",
            &["bad.yaml", "line 2", "metrics"],
        ),
    ];
    for (text, expected) in cases {
        fs::write(&path, text)?;
        refused(lab, node, &with_file, expected)?;
    }
    fs::remove_file(&path)?;
    refused(lab, node, &with_file, &["bad.yaml", "No such file"])
}

#[test]
fn a_namespace_that_vanishes_disturbs_nobody() -> Result<()> {
    let mut lab = Lab::build(
        LabSpec::new(Families::V4)
            .node(
                "n1",
                [
                    PodSpec::new("web"),
                    PodSpec::new("gone1"),
                    PodSpec::new("gone2"),
                ],
            )
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let _server = serve(&lab, lab.pod("cart")?)?;
    let cart = lab.pod("cart")?.at(PORT);
    let missing = |lab: &Lab, mesh: &Mesh, name: &str| -> Result<String> {
        let status = workload_status(lab, mesh, lab.node("n1")?, name)?;
        Ok(status["capture"].as_str().unwrap_or_default().to_owned())
    };

    // While the agent runs.
    let stream = lab.spawn(
        lab.pod("web")?,
        &seqecho(&format!(
            "client --to {cart} --connections 5 --seconds 3 --interval-ms 20"
        ))?,
    )?;
    lab.remove_pod("gone1")?;
    let says = missing(&lab, &mesh, "gone1")?;
    ensure!(
        says.contains("gone1") && says.contains("un-enrol"),
        "{says:?}"
    );
    unenrol_by_name(&lab, &mesh, "gone1")?;
    let report = report(stream.wait(LIMIT)?)?;
    ensure!(report.lost() == 0, "neighbours lost: {report:?}");

    // While it does not.
    mesh.stop_agent(lab.node("n1")?, Signal::SIGKILL)?;
    lab.remove_pod("gone2")?;
    mesh.start_agent(&lab, lab.node("n1")?)?;
    mesh.wait_ready(&lab, lab.node("n1")?)?;
    time_to_service(&lab, lab.pod("web")?, cart, Instant::now())?;
    let says = missing(&lab, &mesh, "gone2")?;
    ensure!(
        says.contains("not captured") && says.contains("gone2"),
        "{says:?}"
    );
    unenrol_by_name(&lab, &mesh, "gone2")?;
    let links = inventory::links(&lab, lab.node("n1")?)?;
    let lookups = links.iter().filter(|link| link.hook.contains("lookup"));
    ensure!(lookups.count() == 1, "only web is captured: {links:?}");
    let pins: Vec<_> = fs::read_dir(lab.node("n1")?.bpffs_root.join("weft-n1"))?
        .flat_map(|version| fs::read_dir(version.expect("listed").path()).expect("a folder"))
        .filter_map(|pin| pin.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("link-lookup"))
        .collect();
    ensure!(pins.len() == 1, "pins of vanished workloads stay: {pins:?}");
    require_service(&lab, &mesh, lab.pod("web")?, cart)
}

fn unenrol_by_name(lab: &Lab, mesh: &Mesh, name: &str) -> Result<()> {
    let node = lab.node("n1")?;
    let arguments = ["unenroll", "--namespace", "default", "--name", name];
    mesh.weft(lab, node, &arguments)?.ok()?;
    if workload_status(lab, mesh, node, name)? != Value::Null {
        bail!("{name} is still in the status");
    }
    Ok(())
}

#[test]
fn a_workload_that_cannot_be_taken_over_stays_closed() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = serve(&lab, cart)?;
    let node = lab.node("n1")?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    mesh.stop_agent(node, Signal::SIGKILL)?;
    let capture = LinkCapture::start(&lab)?;
    // The application takes the agent's port while no agent holds it.
    let taken = inventory::occupy(&web.netns, SocketAddr::from(([0, 0, 0, 0], 15001)))?;
    mesh.start_agent(&lab, node)?;
    wait::until("the agent to answer", LIMIT, || {
        Ok(mesh.status(&lab, node)?.map(drop))
    })?;
    let status = workload_status(&lab, &mesh, node, "web")?;
    let says = status["capture"].as_str().unwrap_or_default();
    ensure!(
        says.contains("not captured") && says.contains("15001"),
        "{status}"
    );
    let report = client(&lab, web, cart.at(PORT), "--connections 5")?;
    ensure!(
        report.connect_errors.get("ECONNREFUSED") == Some(&5),
        "what was captured must not become open: {report:?}"
    );
    let verdict = capture.finish(&[MARKER])?;
    ensure!(verdict.plaintext_bytes == 0, "{verdict}");
    // Un-enrolled and enrolled again it works, and nothing of before is in the way.
    drop(taken);
    mesh.unenroll(&lab, node, web)?;
    mesh.enroll(&lab, node, web)?;
    mesh.wait_enrolled(&lab, node, web)?;
    require_service(&lab, &mesh, web, cart.at(PORT))?;
    damaged_records(&lab, &mut mesh)
}

/// An agent that has lost its records does not know whom to serve, and opens nobody.
fn damaged_records(lab: &Lab, mesh: &mut Mesh) -> Result<()> {
    let (web, cart, node) = (lab.pod("web")?, lab.pod("cart")?, lab.node("n1")?);
    let damaged = node.run_dir.join("workloads.json.damaged");
    for round in 0..2 {
        mesh.stop_agent(node, Signal::SIGKILL)?;
        if round == 0 {
            fs::write(node.run_dir.join("workloads.json"), "{")?;
        }
        mesh.start_agent(lab, node)?;
        let mut status = Value::Null;
        wait::until("the damage to be told", LIMIT, || {
            status = mesh.status(lab, node)?.unwrap_or_default();
            let pending = status["pending"].to_string();
            Ok(pending.contains("workloads.json.damaged").then_some(()))
        })
        .with_context(|| format!("{status}"))?;
        let report = client(lab, web, cart.at(PORT), "--connections 5")?;
        ensure!(
            report.connect_errors.get("ECONNREFUSED") == Some(&5),
            "round {round}: what was captured must not become open: {report:?}"
        );
    }
    mesh.enroll(lab, node, web)?;
    fs::remove_file(damaged)?;
    mesh.wait_ready(lab, node)?;
    mesh.wait_enrolled(lab, node, web)?;
    require_service(lab, mesh, web, cart.at(PORT))
}
