//! Starting, dying, restarting, enrolling, un-enrolling and uninstalling: nothing leaks, nothing stays behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    capture::LinkCapture,
    conversation::{LIMIT, Server, client_with, report, require_service, talk, wait_for_service},
    inventory::{self, Inventory},
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    manifests,
    mesh::{Mesh, MeshSpec},
    process::Program,
    wait,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

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

/// Tries until a connection works; the time since `since`.
fn time_to_service(lab: &Lab, from: &Pod, to: SocketAddr, since: Instant) -> Result<Duration> {
    wait_for_service(lab, from, to, SERVES_AGAIN_WITHIN)?;
    Ok(since.elapsed())
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
    let _servers = (
        Server::start(&lab, cart, PORT)?,
        Server::start(&lab, bystander, PORT)?,
    );
    let node = lab.node("n1")?;
    let before = inventory::links(&lab, node)?;
    let records = fs::read_to_string(node.run_dir.join("workloads.json"))?;

    let capture = LinkCapture::start(&lab)?;
    let load = lab.spawn(
        web,
        &client_with(
            cart.at(PORT),
            "--rate 50 --seconds 8 --records 20 --interval-ms 20",
        )?,
    )?;
    let unmeshed = lab.spawn(
        plain,
        &client_with(
            bystander.at(PORT),
            "--rate 50 --seconds 8 --records 20 --interval-ms 20",
        )?,
    )?;
    for kill in 1..=KILLS {
        wait::until("connections under way", LIMIT, || {
            Ok((inventory::established(&cart.netns, PORT)? > 2).then_some(()))
        })?;
        mesh.stop_agent(node, Signal::SIGKILL)?;
        let dead = talk(&lab, web, &client_with(cart.at(PORT), "--connections 20")?)?;
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
    let seen = report(load)?;
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
    let unmeshed = report(unmeshed)?;
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
        talk(lab, plain, &client_with(cart.at(PORT), "--records 3")?)?.lost() == 0,
        "plaintext is accepted while policy permits it"
    );
    mesh.stop_agent(node, Signal::SIGKILL)?;
    for from in [web, plain] {
        let report = talk(
            lab,
            from,
            &client_with(cart.at(PORT), "--connections 5 --limit-ms 5000")?,
        )?;
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
    let _server = Server::start(&lab, cart, PORT)?;
    for (node, name) in [("n1", "web"), ("n2", "cart")] {
        wait::until("the policy to arrive", LIMIT, || {
            let status = workload_status(&lab, &mesh, lab.node(node)?, name)?;
            Ok((status["failureMode"] == "open").then_some(()))
        })?;
    }
    let capture = LinkCapture::start(&lab)?;
    require_service(&lab, web, cart.at(PORT))?;
    capture.finish(&[MARKER])?.require_tls_only()?;

    for node in lab.nodes() {
        mesh.stop_agent(node, Signal::SIGKILL)?;
    }
    let capture = LinkCapture::start(&lab)?;
    require_service(&lab, web, cart.at(PORT))?;
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
    require_service(&lab, web, cart.at(PORT))?;
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
    let _server = Server::start(&lab, cart, PORT)?;
    let idle = Inventory::of(&lab)?;
    let held = lab.spawn(
        web,
        &client_with(
            cart.at(PORT),
            &format!("--connections {HELD} --seconds 12 --interval-ms 20"),
        )?,
    )?;
    wait::until("direct connections", LIMIT, || {
        Ok((inventory::established(&cart.netns, PORT)? == HELD).then_some(()))
    })?;
    mesh.enroll_all(&lab)?;
    require_service(&lab, web, cart.at(PORT))?;
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
        require_service(&lab, web, cart.at(PORT))?;
    }
    let held = report(held)?;
    ensure!(
        held.lost() == 0 && held.complete == HELD as u64,
        "connections from before the enrolment must not notice anything: {held:?}"
    );
    for (node, pod) in members {
        mesh.unenroll(&lab, lab.node(node)?, lab.pod(pod)?)?;
    }
    same_but_for_files(&lab, &idle)?;
    require_service(&lab, web, cart.at(PORT))?;

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
    require_service(&lab, web, cart.at(PORT))
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
    let _server = Server::start(&lab, cart, PORT)?;
    let (source, destination) = (lab.node("n1")?, lab.node("n2")?);
    for node in [source, destination] {
        // Ends within the drain deadline of 5 s.
        let short = lab.spawn(
            web,
            &client_with(
                cart.at(PORT),
                &format!("--connections {HELD} --records 40 --interval-ms 50"),
            )?,
        )?;
        wait::until("connections under way", LIMIT, || {
            Ok((inventory::established(&cart.netns, PORT)? == HELD).then_some(()))
        })?;
        let stopped = mesh.stop_agent(node, Signal::SIGTERM)?;
        let drained = stopped.stderr.clone();
        stopped.ok()?;
        let report = report(short)?;
        ensure!(
            report.lost() == 0,
            "{}: connections that end within the deadline lose nothing: {report:?}\n{drained}",
            node.name
        );
        ensure!(drained.contains("cut=0"), "{drained}");
        let late = talk(
            &lab,
            web,
            &client_with(cart.at(PORT), "--connections 3 --limit-ms 5000")?,
        )?;
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
        &client_with(
            cart.at(PORT),
            "--connections 3 --records 100000 --interval-ms 50 --limit-ms 10000",
        )?,
    )?;
    wait::until("connections under way", LIMIT, || {
        Ok((inventory::established(&cart.netns, PORT)? == 3).then_some(()))
    })?;
    let stopped = mesh.stop_agent(source, Signal::SIGTERM)?;
    ensure!(stopped.stderr.contains("cut=3"), "{}", stopped.stderr);
    let report = report(long)?;
    ensure!(
        report.resets + report.early_eofs == 3 && report.timeouts == 0,
        "connections beyond the deadline end: {report:?}"
    );
    Ok(())
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
    let _server = Server::start(&lab, lab.pod("cart")?, PORT)?;
    let cart = lab.pod("cart")?.at(PORT);
    let missing = |lab: &Lab, mesh: &Mesh, name: &str| -> Result<String> {
        let status = workload_status(lab, mesh, lab.node("n1")?, name)?;
        Ok(status["capture"].as_str().unwrap_or_default().to_owned())
    };

    // While the agent runs.
    let stream = lab.spawn(
        lab.pod("web")?,
        &client_with(cart, "--connections 5 --seconds 3 --interval-ms 20")?,
    )?;
    lab.remove_pod("gone1")?;
    let says = missing(&lab, &mesh, "gone1")?;
    ensure!(
        says.contains("gone1") && says.contains("un-enrol"),
        "{says:?}"
    );
    unenrol_by_name(&lab, &mesh, "gone1")?;
    let report = report(stream)?;
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
    require_service(&lab, lab.pod("web")?, cart)
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
    let _server = Server::start(&lab, cart, PORT)?;
    let node = lab.node("n1")?;
    require_service(&lab, web, cart.at(PORT))?;
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
    let report = talk(&lab, web, &client_with(cart.at(PORT), "--connections 5")?)?;
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
    require_service(&lab, web, cart.at(PORT))?;
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
        let report = talk(lab, web, &client_with(cart.at(PORT), "--connections 5")?)?;
        ensure!(
            report.connect_errors.get("ECONNREFUSED") == Some(&5),
            "round {round}: what was captured must not become open: {report:?}"
        );
    }
    mesh.enroll(lab, node, web)?;
    fs::remove_file(damaged)?;
    mesh.wait_ready(lab, node)?;
    mesh.wait_enrolled(lab, node, web)?;
    require_service(lab, web, cart.at(PORT))
}

/// What captures a workload in its own namespace is as needed as what the agent has pinned: without the rule, nothing
/// that the workload dials finds the agent.
#[test]
fn capture_that_a_pod_takes_apart_is_put_back() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (n1, web, cart) = (lab.node("n1")?, lab.pod("web")?, lab.pod("cart")?);
    let server = Server::start(&lab, cart, PORT)?;
    require_service(&lab, web, server.address)?;
    let repairs =
        || Ok::<_, anyhow::Error>(mesh.metrics(n1)?.sum("weft_capture_repairs_total", &[]));
    for (number, sabotage) in [
        "ip rule del fwmark 0x8000000/0x8000000",
        "ip route flush table 15001",
    ]
    .iter()
    .enumerate()
    {
        lab.run(web, &Program::line(sabotage), LIMIT)?.ok()?;
        wait::until("the repair", LIMIT, || {
            Ok((repairs()? == (number + 1) as f64).then_some(()))
        })
        .with_context(|| mesh.log_of(n1))?;
        require_service(&lab, web, server.address)?;
    }
    Ok(())
}
