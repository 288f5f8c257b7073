//! A new agent takes over from a running one: nobody loses a connection, whatever happens to either of them.

use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    bpf::Pins,
    conversation::{LIMIT, Server, client_with, report, require_service, talk},
    inventory::{self, Inventory},
    lab::{Families, Lab, LabSpec, Node, PodSpec},
    mesh::{Mesh, MeshSpec, TOOK_OVER},
    process::{Program, Running, killed_by},
    programs,
    seqecho::report::Report,
    successor::{FalseSuccessor, with_rejected_program},
    wait,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const PORT: u16 = 7000;
/// Upgrades in a row.
const UPGRADES: usize = 20;
/// New connections per second meanwhile.
const RATE: u64 = 200;
/// Connections that last over all of them.
const LONG: usize = 120;
/// Changes of layout and back.
const LAYOUT_CYCLES: usize = 5;
/// Connections that wait in a queue that nobody reads.
const QUEUED: usize = 300;
/// Descriptors that an agent may have more, for tunnels that come and go: fewer than it took over.
const TUNNELS: usize = 8;
/// A wait that counts as a loss. Tests run on loaded machines, where two agents start side by side.
const STALL: &str = "--stall-ms 10000";

/// `web` and `shelf` on the first node, `cart` on the second, servers in `shelf` and `cart`.
struct Scene {
    lab: Lab,
    mesh: Mesh,
    server: Server,
    near: Server,
}

impl Scene {
    fn start(families: Families) -> Result<Self> {
        let lab = Lab::build(
            LabSpec::new(families)
                .node("n1", [PodSpec::new("web"), PodSpec::new("shelf")])
                .node("n2", [PodSpec::new("cart")]),
        )?;
        let mesh = Mesh::start(&lab, MeshSpec::default())?;
        let server = Server::start(&lab, lab.pod("cart")?, PORT)?;
        let near = Server::start(&lab, lab.pod("shelf")?, PORT)?;
        let scene = Self {
            lab,
            mesh,
            server,
            near,
        };
        scene.require_service()?;
        Ok(scene)
    }

    fn require_service(&self) -> Result<()> {
        require_service(&self.lab, self.lab.pod("web")?, self.server.address)
    }

    /// A client in `web`.
    fn client(&self, arguments: &str) -> Result<Running> {
        let program = client_with(self.server.address, &format!("{arguments} {STALL}"))?;
        self.lab.spawn(self.lab.pod("web")?, &program)
    }

    /// The same with connections that last, once they are all served.
    fn long(&self, connections: usize, arguments: &str) -> Result<Running> {
        let client = self.client(&format!("--connections {connections} {arguments}"))?;
        self.wait_established(connections)?;
        Ok(client)
    }

    fn wait_established(&self, connections: usize) -> Result<()> {
        let netns = &self.lab.pod("cart")?.netns;
        wait::until("connections under way", LIMIT, || {
            Ok((inventory::established(netns, PORT)? >= connections).then_some(()))
        })
    }

    fn node(&self, name: &str) -> Result<&Node> {
        self.lab.node(name)
    }

    fn take_over(&mut self, node: &str, arguments: &[&str]) -> Result<Running> {
        self.mesh
            .take_over(&self.lab, self.lab.node(node)?, arguments)
    }

    fn status(&self, node: &str) -> Result<Value> {
        let status = self.mesh.status(&self.lab, self.node(node)?)?;
        status.context("no agent answers")
    }

    /// Everything that agents of this lab have in the kernel and on disk, but for what changes all the time.
    fn inventory(&self) -> Result<Inventory> {
        Ok(Inventory::of(&self.lab)?
            .without("mesh.snapshot")
            .without("draining"))
    }

    /// One program per hook.
    fn require_one_program_per_hook(&self) -> Result<()> {
        for node in self.lab.nodes() {
            let links = inventory::links(&self.lab, node)?;
            let places: BTreeSet<_> = links.iter().map(|link| (&link.place, &link.hook)).collect();
            ensure!(places.len() == links.len(), "two programs: {links:?}");
        }
        Ok(())
    }
}

fn nothing_lost(what: &str, report: &Report) -> Result<()> {
    println!("{what}: {report:?}");
    ensure!(
        report.lost() == 0 && report.complete == report.connections,
        "{what} lost: {report:?}"
    );
    Ok(())
}

/// A replaced agent must end by itself, in order, having cut so many connections.
fn ended_after_draining(agent: Running, cut: usize) -> Result<()> {
    let finished = agent.wait(LIMIT)?;
    ensure!(
        finished.stderr.contains(&format!("cut={cut}")),
        "{}",
        finished.stderr
    );
    finished.ok().map(drop)
}

#[test]
fn twenty_upgrades_under_load_lose_nothing() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    let before = scene.inventory()?;
    let web = scene.lab.pod("web")?.netns.clone();
    let listeners = inventory::listeners(&web)?;
    let few = descriptors(&mut scene, "n1")? + TUNNELS;
    let long = scene.long(LONG, "--seconds 45 --interval-ms 100")?;
    // The first one goes by tunnel, the others in the kernel.
    require_service(&scene.lab, scene.lab.pod("web")?, scene.near.address)?;
    let program = client_with(
        scene.near.address,
        &format!("--connections 20 --seconds 45 --interval-ms 100 {STALL}"),
    )?;
    let near = scene.lab.spawn(scene.lab.pod("web")?, &program)?;
    let mut load = scene.client(&format!("--rate {RATE} --seconds 40 --records 2"))?;
    let mut replaced = Vec::new();
    let began = Instant::now();
    for upgrade in 0..UPGRADES {
        let node = ["n1", "n2"][upgrade % 2];
        replaced.push(scene.take_over(node, &[])?);
    }
    println!("{UPGRADES} upgrades in {:?}", began.elapsed());
    ensure!(load.is_running(), "the load ended before the upgrades");
    scene.require_one_program_per_hook()?;
    let draining = scene.status("n1")?["draining"].clone();
    println!("draining on n1: {draining}");
    let tunnels = scene.mesh.metrics(scene.node("n1")?)?;
    ensure!(
        tunnels.sum("weft_draining_agents", &[]) >= 1.0,
        "{draining}"
    );
    nothing_lost("new connections", &report(load)?)?;
    nothing_lost("established connections", &report(long)?)?;
    nothing_lost("connections within the node", &report(near)?)?;
    for agent in replaced {
        ended_after_draining(agent, 0)?;
    }
    ensure!(
        inventory::listeners(&web)? == listeners,
        "the same sockets, in every agent"
    );
    wait::until("no more descriptors than at first", LIMIT, || {
        Ok((descriptors(&mut scene, "n1")? <= few).then_some(()))
    })?;
    scene.inventory()?.require_same_as(&before)?;
    scene.require_service()
}

/// Up and down between two layouts of the kernel objects, ten times.
#[test]
fn agents_of_two_layouts_of_the_maps_replace_each_other() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    let own = Pins::of(scene.node("n1")?)?.version()?;
    let links = inventory::links(&scene.lab, scene.node("n1")?)?;
    let long = scene.long(LONG, "--seconds 40 --interval-ms 100")?;
    let near = client_with(
        scene.near.address,
        &format!("--connections 80 --seconds 40 --interval-ms 100 {STALL}"),
    )?;
    let near = scene.lab.spawn(scene.lab.pod("web")?, &near)?;
    let load = scene.client("--rate 50 --seconds 35 --records 2")?;
    let mut replaced_agents = Vec::new();
    for cycle in 0..2 * LAYOUT_CYCLES {
        let layout = [own + 1, own][cycle % 2];
        let replaced = scene.take_over("n1", &["--kernel-abi", &layout.to_string()])?;
        ensure!(
            Pins::of(scene.node("n1")?)?.version()? == layout,
            "objects of one layout only"
        );
        scene.require_one_program_per_hook()?;
        ensure!(
            inventory::links(&scene.lab, scene.node("n1")?)? == links,
            "the same links"
        );
        replaced_agents.push(replaced);
    }
    nothing_lost("new connections", &report(load)?)?;
    nothing_lost("established connections", &report(long)?)?;
    nothing_lost("connections within the node", &report(near)?)?;
    for agent in replaced_agents {
        ended_after_draining(agent, 0)?;
    }
    scene.require_service()
}

/// Descriptors of a node's agent.
fn descriptors(scene: &mut Scene, node: &str) -> Result<usize> {
    let pid = scene.mesh.agent(scene.lab.node(node)?)?.pid();
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

#[test]
fn what_waits_in_the_queue_of_a_stopped_agent_is_served_by_its_successor() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    // Stopped for a moment, with the queue full, and asked to hand over while it is.
    let node = scene.lab.node("n1")?;
    scene.mesh.agent(node)?.signal(Signal::SIGSTOP)?;
    let queued = scene.client(&format!("--connections {QUEUED}"))?;
    wait_queued(&scene, QUEUED)?;
    let program = scene.mesh.agent_program(node)?.arg("--take-over");
    let mut successor = scene.lab.spawn_agent(node, &program)?;
    wait_stopped_for(&scene, Duration::from_millis(200))?;
    scene.mesh.agent(node)?.signal(Signal::SIGCONT)?;
    successor.wait_for_output(TOOK_OVER, LIMIT)?;
    nothing_lost("queued at a stopped agent", &report(queued)?)?;
    let replaced = scene.mesh.release_agent(node)?;
    scene.mesh.adopt_agent(node, successor)?;
    ended_after_draining(replaced, 0)?;

    // Killed while its successor is about to take over, with connections that it never saw.
    let program = scene.mesh.agent_program(node)?.arg("--take-over");
    let mut successor = scene.lab.spawn_agent(node, &program)?;
    successor.wait_for_output("has the listeners", LIMIT)?;
    successor.signal(Signal::SIGSTOP)?;
    scene.mesh.agent(node)?.signal(Signal::SIGSTOP)?;
    let queued = scene.client(&format!("--connections {QUEUED}"))?;
    wait_queued(&scene, QUEUED)?;
    scene.mesh.stop_agent(node, Signal::SIGKILL)?;
    successor.signal(Signal::SIGCONT)?;
    successor.wait_for_output(TOOK_OVER, LIMIT)?;
    nothing_lost("queued at a killed agent", &report(queued)?)?;
    scene.mesh.adopt_agent(node, successor)?;
    scene.require_service()?;

    // The control: without a successor that has the listeners, they are lost.
    scene.mesh.agent(node)?.signal(Signal::SIGSTOP)?;
    let queued = scene.client(&format!("--connections {QUEUED} --limit-ms 5000"))?;
    wait_queued(&scene, QUEUED)?;
    scene.mesh.stop_agent(node, Signal::SIGKILL)?;
    scene.mesh.start_agent(&scene.lab, node)?;
    let lost = report(queued)?;
    ensure!(
        lost.lost() == QUEUED as u64,
        "a restart must lose what had waited, else this test sees nothing: {lost:?}"
    );
    Ok(())
}

/// Connections that the kernel has accepted in `web` and nobody else has.
fn wait_queued(scene: &Scene, connections: usize) -> Result<()> {
    let netns = &scene.lab.pod("web")?.netns;
    wait::until("connections in the queue", LIMIT, || {
        Ok((inventory::established(netns, PORT)? >= connections).then_some(()))
    })
}

/// Lets a stopped agent be stopped: nothing can happen that could be waited for.
fn wait_stopped_for(scene: &Scene, time: Duration) -> Result<()> {
    let began = Instant::now();
    wait::until("the stop to last", LIMIT, || {
        let served = inventory::established(&scene.lab.pod("cart")?.netns, PORT)?;
        ensure!(served == 0, "a stopped agent serves {served} connections");
        Ok((began.elapsed() >= time).then_some(()))
    })
}

#[test]
fn what_is_left_after_the_drain_deadline_is_closed_and_the_old_agent_is_gone() -> Result<()> {
    let mut scene = Scene::start(Families::Dual)?;
    let before = scene.inventory()?;
    for node in ["n1", "n2"] {
        let long = scene.long(5, "--records 100000 --interval-ms 50 --limit-ms 10000")?;
        let replaced = scene.take_over(node, &["--upgrade-drain", "2"])?;
        let pid = replaced.pid().as_raw();
        let draining = scene.status(node)?["draining"].clone();
        ensure!(draining[0]["pid"] == pid, "{draining}");
        ensure!(draining[0]["connections"].as_u64() >= Some(5), "{draining}");
        let left = report(long)?;
        ensure!(
            left.resets + left.early_eofs == 5 && left.timeouts == 0,
            "{node}: connections beyond the deadline end, and do not hang: {left:?}"
        );
        let finished = replaced.wait(LIMIT)?;
        ensure!(finished.status.success(), "{}", finished.stderr);
        ensure!(!finished.stderr.contains("cut=0"), "{}", finished.stderr);
        let draining = scene.status(node)?["draining"].clone();
        ensure!(draining.is_null(), "{draining}");
        scene.require_service()?;
    }
    scene.require_one_program_per_hook()?;
    scene.inventory()?.require_same_as(&before)?;
    // SIGTERM ends a draining agent sooner; it harms nobody else.
    let long = scene.long(3, "--records 100000 --interval-ms 50 --limit-ms 20000")?;
    let replaced = scene.take_over("n1", &[])?;
    let finished = replaced.stop(Signal::SIGTERM, LIMIT)?;
    ensure!(finished.stderr.contains("cut=3"), "{}", finished.stderr);
    finished.ok()?;
    ensure!(report(long)?.timeouts == 0, "they must end");
    scene.require_service()
}

#[test]
fn a_successor_that_fails_changes_nothing() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    let before = scene.inventory()?;
    let pid = scene.status("n1")?["pid"].clone();
    let long = scene.long(20, "--seconds 12 --interval-ms 50")?;
    let load = scene.client("--rate 50 --seconds 10")?;

    let bad = scene.lab.directory().join("bad.yaml");
    fs::write(&bad, "proxy:\n  workers: many\n")?;
    let rejected = with_rejected_program(
        &programs::own("mesh-agent")?,
        "cgroup/connect4",
        &scene.lab.directory().join("rejected-agent"),
    )?;
    let node = scene.node("n1")?;
    let good = || -> Result<Program> { Ok(scene.mesh.agent_program(node)?.arg("--take-over")) };
    let cases: [(Program, &[&str]); 4] = [
        (
            good()?.with_option("--config", &bad.to_string_lossy()),
            &["bad.yaml", "workers"],
        ),
        (
            good()?.with_option("--node", "n2"),
            &["does not hand over", "n2"],
        ),
        (
            good()?.with_option("--token-file", "/nonexistent/token"),
            &["--token-file"],
        ),
        (
            good()?.with_file(&rejected),
            &["weft_connect4", "R9 !read_ok"],
        ),
    ];
    for (program, texts) in cases {
        failed_successor(&scene, &program, texts)?;
        scene.inventory()?.require_same_as(&before)?;
    }
    die_at_every_stage(&scene)?;
    nothing_lost("new connections", &report(load)?)?;
    nothing_lost("established connections", &report(long)?)?;
    ensure!(scene.status("n1")?["pid"] == pid, "another agent serves");
    scene.inventory()?.require_same_as(&before)?;
    scene.mesh.check_running()?;
    // And none of it is in the way of one that does not fail.
    let replaced = scene.take_over("n1", &[])?;
    ended_after_draining(replaced, 0)?;
    scene.require_service()
}

fn failed_successor(scene: &Scene, program: &Program, texts: &[&str]) -> Result<()> {
    let node = scene.node("n1")?;
    let finished = scene.lab.spawn_agent(node, program)?.wait(LIMIT)?;
    println!("{}", finished.stderr.trim());
    ensure!(!finished.status.success(), "it reported success: {texts:?}");
    for text in texts {
        ensure!(
            finished.stderr.contains(text),
            "the message lacks {text:?}: {}",
            finished.stderr
        );
    }
    Ok(())
}

/// Successors that vanish after each step of the conversation, or talk nonsense.
fn die_at_every_stage(scene: &Scene) -> Result<()> {
    let node = scene.node("n1")?;
    let commit = json!({ "say": "commit", "drain_deadline_seconds": 60 });
    drop(FalseSuccessor::connect(node)?);
    scene.require_service()?;

    let greeted = FalseSuccessor::connect(node)?;
    greeted.hello(node)?;
    drop(greeted);
    scene.require_service()?;

    let mut offered = FalseSuccessor::connect(node)?;
    offered.hello(node)?;
    offered.hear_until("complete")?;
    ensure!(
        offered
            .descriptors
            .iter()
            .all(|one| one.as_fd().try_clone_to_owned().is_ok())
            && offered.descriptors.len() == 7 + 2 * 3,
        "of the node and of two workloads: {:?}",
        offered.descriptors
    );
    drop(offered);
    scene.require_service()?;

    let mut committed = FalseSuccessor::connect(node)?;
    committed.hello(node)?;
    committed.hear_until("complete")?;
    committed.say(&commit)?;
    committed.hear_until("paused")?;
    drop(committed);
    scene.require_service()?;

    let mut aborting = FalseSuccessor::connect(node)?;
    aborting.hello(node)?;
    aborting.hear_until("complete")?;
    aborting.say(&commit)?;
    aborting.hear_until("paused")?;
    aborting.say(&json!({ "say": "abort", "reason": "changed my mind" }))?;
    ensure!(aborting.hear()?.is_none(), "that was the end of it");
    scene.require_service()?;

    for nonsense in ["", "{}", "{\"say\":\"sing\"}", "{\"say\":\"serving\"}"] {
        let mut stranger = FalseSuccessor::connect(node)?;
        if !nonsense.is_empty() {
            stranger.say_text(nonsense)?;
            ensure!(stranger.hear()?.is_none(), "{nonsense:?} was answered");
        }
    }
    scene.require_service()
}

#[test]
fn a_successor_that_hangs_with_the_listeners_is_ended_and_what_waited_is_served() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    let node = scene.lab.node("n1")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hanging_successor.py");
    let python = programs::installed("python3").context("python3 is missing")?;
    let hanging = Program::new(python)
        .arg(script)
        .arg(node.run_dir.join("handover.sock"))
        .arg(&node.name)
        .arg(&node.cgroup_root)
        .arg(&node.bpffs_root);
    let mut hanging = scene.lab.spawn(node, &hanging)?;
    hanging.wait_for_output("paused", LIMIT)?;
    let waiting = scene.lab.spawn(
        scene.lab.pod("web")?,
        &client_with(
            scene.server.address,
            "--connections 50 --stall-ms 30000 --limit-ms 40000",
        )?,
    )?;
    nothing_lost("waiting connections", &report(waiting)?)?;
    let ended = hanging.wait(LIMIT)?;
    ensure!(killed_by(ended.status, Signal::SIGKILL), "{}", ended.status);
    let replaced = scene.take_over("n1", &[])?;
    ended_after_draining(replaced, 0)
}

#[test]
fn an_operator_upgrades_and_goes_back_with_one_command() -> Result<()> {
    let mut scene = Scene::start(Families::V4)?;
    let node = scene.lab.node("n1")?;
    let long = scene.long(20, "--seconds 14 --interval-ms 50")?;
    let load = scene.client("--rate 50 --seconds 12")?;
    let first = scene.status("n1")?["pid"].clone();
    let weft = |scene: &Scene, arguments: &[&str]| {
        let mut words = vec!["agent", "upgrade"];
        words.extend(arguments);
        scene.mesh.weft(&scene.lab, node, &words)
    };
    for (program, text) in [
        ("/bin/false", "exit status: 1"),
        ("/etc/hostname", "cannot start"),
        ("/nonexistent/agent", "No such file"),
    ] {
        let refused = weft(&scene, &["--binary", program])?;
        ensure!(
            !refused.status.success() && refused.stderr.contains(text),
            "{program}: {}",
            refused.stderr
        );
        ensure!(scene.status("n1")?["pid"] == first, "{program} took over");
    }
    let newer = scene.lab.directory().join("mesh-agent-newer");
    fs::copy(programs::own("mesh-agent")?, &newer)?;
    let said = weft(
        &scene,
        &[
            "--binary",
            &newer.to_string_lossy(),
            "--drain-deadline",
            "60",
        ],
    )?
    .ok()?;
    println!("{said}");
    let second = scene.status("n1")?;
    ensure!(
        said.contains(&second["pid"].to_string()) && said.contains("60 s"),
        "{said}"
    );
    ensure!(
        second["pid"] != first && program_of(&second)? == newer,
        "{second}"
    );
    ensure!(second["draining"][0]["pid"] == first, "{second}");
    let shown = scene.mesh.weft(&scene.lab, node, &["status"])?.ok()?;
    ensure!(
        shown.contains(&format!("Draining   pid {first}")),
        "{shown}"
    );

    // Back again, and once more without a word: the program that runs.
    let older = programs::own("mesh-agent")?;
    weft(&scene, &["--binary", &older.to_string_lossy()])?.ok()?;
    let third = scene.status("n1")?;
    ensure!(program_of(&third)? == older.canonicalize()?, "{third}");
    weft(&scene, &[])?.ok()?;
    let fourth = scene.status("n1")?;
    ensure!(program_of(&fourth)? == older.canonicalize()?, "{fourth}");
    ensure!(fourth["pid"] != third["pid"], "{fourth}");

    nothing_lost("new connections", &report(load)?)?;
    nothing_lost("established connections", &report(long)?)?;
    let replaced = scene.mesh.release_agent(node)?;
    ended_after_draining(replaced, 0)?;
    // The last of them is nobody's child here; SIGTERM ends it as any other.
    let pid = fourth["pid"].to_string();
    scene
        .lab
        .run(node, &Program::line(&format!("kill -TERM {pid}")), LIMIT)?
        .ok()?;
    wait::until("the last agent to end", LIMIT, || {
        Ok(scene.mesh.status(&scene.lab, node)?.is_none().then_some(()))
    })?;
    let report = talk(
        &scene.lab,
        scene.lab.pod("web")?,
        &client_with(scene.server.address, "--connections 3")?,
    )?;
    ensure!(
        report.connect_errors.get("ECONNREFUSED") == Some(&3),
        "{report:?}"
    );
    Ok(())
}

/// The program that an agent runs, by its status.
fn program_of(status: &Value) -> Result<PathBuf> {
    Ok(fs::read_link(format!("/proc/{}/exe", status["pid"]))?)
}
