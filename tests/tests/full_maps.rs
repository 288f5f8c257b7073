//! The maps that hold live connections, at their limit and over restarts: what is recorded stays, what does not fit is
//! told, what has ended unseen goes.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    bpf::{self, Pins},
    conversation::{LIMIT, Server, client_with, report, require_service, talk},
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    mesh::{Mesh, MeshSpec},
    process::Running,
    wait,
};
use nix::sys::signal::Signal;

const PORT: u16 = 7000;
/// `kernel.flowsMax` of the agent.
const FLOWS: usize = 256;
/// Flows of agents that fit: of the one that runs and of the one before.
const AGENT_FLOWS: usize = 2 * FLOWS;
/// Connections at a time that find the map full. Each is one out and one in, and all must fit into what the node may
/// have.
const FURTHER: usize = 60;
/// Rounds of them: with the flows that fit, some three times the map.
const ROUNDS: usize = 8;
/// Seconds that the flows in the map last: longer than everything that happens meanwhile.
const LAST_SECONDS: u64 = 60;

struct Scene {
    lab: Lab,
    mesh: Mesh,
    server: Server,
}

impl Scene {
    fn start() -> Result<Self> {
        let pods = [
            PodSpec::new("web"),
            PodSpec::new("api"),
            PodSpec::new("plain").unmeshed(),
        ];
        // A lab of one node has no link, hence no address for the control plane.
        let lab = Lab::build(LabSpec::new(Families::V4).node("n1", pods).node("n2", []))?;
        let spec = MeshSpec {
            agent_config: Some(format!("kernel:\n  flowsMax: {FLOWS}\n")),
            ..MeshSpec::default()
        };
        let mesh = Mesh::start(&lab, spec)?;
        let server = Server::start(&lab, lab.pod("api")?, PORT)?;
        // The first one goes by tunnel, and opens the way in the kernel.
        require_service(&lab, lab.pod("web")?, server.address)?;
        Ok(Self { lab, mesh, server })
    }

    fn node(&self) -> &Node {
        &self.lab.nodes()[0]
    }

    fn web(&self) -> Result<&Pod> {
        self.lab.pod("web")
    }

    fn outcome(&self, outcome: &str) -> Result<usize> {
        let metrics = self.mesh.metrics(self.node())?;
        Ok(metrics.sum("weft_kernel_connections_total", &[("outcome", outcome)]) as usize)
    }

    fn recorded(&self, map: &str) -> Result<usize> {
        Pins::of(self.node())?.count(map)
    }

    /// Clients with as many connections as the map has room for, half of them idle.
    fn fill(&self) -> Result<[Running; 2]> {
        let client = |interval_ms: u64| {
            let arguments = format!(
                "--connections {} --seconds {LAST_SECONDS} --interval-ms {interval_ms} --stall-ms 30000 --limit-ms 150000",
                FLOWS / 2
            );
            let program = client_with(self.server.address, &arguments)?;
            self.lab.spawn(self.web()?, &program)
        };
        let clients = [client(500)?, client(20_000)?];
        wait::until("the map to be full", LIMIT, || {
            Ok((self.recorded("FLOWS")? == FLOWS).then_some(()))
        })?;
        Ok(clients)
    }
}

#[test]
fn what_is_recorded_outlives_a_full_map_and_restarts() -> Result<()> {
    let mut scene = Scene::start()?;
    let clients = scene.fill()?;
    ensure!(scene.outcome("same_node")? >= FLOWS, "by the kernel");
    let (fast, full) = (scene.outcome("same_node")?, scene.outcome("flows_full")?);
    for _ in 0..ROUNDS {
        let arguments = format!("--connections {FURTHER} --records 3");
        let program = client_with(scene.server.address, &arguments)?;
        let report = talk(&scene.lab, scene.web()?, &program)?;
        ensure!(
            report.lost() == 0 && report.complete == FURTHER as u64,
            "what does not fit goes by tunnel: {report:?}"
        );
    }
    ensure!(scene.outcome("same_node")? == fast, "none by the kernel");
    ensure!(
        scene.outcome("flows_full")? == full + ROUNDS * FURTHER,
        "each is told: {} after {full}",
        scene.outcome("flows_full")?
    );
    the_node_has_its_limit(&scene)?;
    restarts(&mut scene)?;
    no_room_for_the_agent(&scene)?;
    for client in clients {
        let report = report(client)?;
        ensure!(
            report.lost() == 0 && report.complete == FLOWS as u64 / 2,
            "what was recorded must not notice anything: {report:?}"
        );
    }
    wait::until("ended flows to be forgotten", LIMIT, || {
        Ok((scene.recorded("FLOWS")? == 0).then_some(()))
    })
}

/// More connections than can be recorded are refused at once.
fn the_node_has_its_limit(scene: &Scene) -> Result<()> {
    let arguments =
        format!("--connections {FLOWS} --records 20 --interval-ms 100 --limit-ms 20000");
    let program = client_with(scene.server.address, &arguments)?;
    let report = talk(&scene.lab, scene.web()?, &program)?;
    ensure!(
        report.complete > 0 && report.resets > 0 && report.timeouts == 0,
        "some are served, the others reset, none hangs: {report:?}"
    );
    let limits = scene.mesh.metrics(scene.node())?;
    let reached = limits.sum(
        "weft_limit_reached_total",
        &[("limit", "connections_per_node")],
    );
    ensure!(reached > 0.0, "the limit is told");
    Ok(())
}

/// Neither a killed agent nor one that is replaced takes a live entry with it.
fn restarts(scene: &mut Scene) -> Result<()> {
    let node = &scene.lab.nodes()[0];
    for _ in 0..2 {
        scene.mesh.stop_agent(node, Signal::SIGKILL)?;
        scene.mesh.start_agent(&scene.lab, node)?;
        scene.mesh.wait_ready(&scene.lab, node)?;
        scene
            .mesh
            .wait_enrolled(&scene.lab, node, scene.lab.pod("web")?)?;
        let replaced = scene.mesh.take_over(&scene.lab, node, &[])?;
        replaced.stop(Signal::SIGTERM, LIMIT)?.ok()?;
        ensure!(scene.recorded("FLOWS")? == FLOWS, "live entries were lost");
    }
    Ok(())
}

/// Entries of connections that ended unseen fill the map of the agent's own: a connection that cannot be recorded fails
/// by its deadline, is counted, and does not come back to the agent for ever. The entries go by themselves.
fn no_room_for_the_agent(scene: &Scene) -> Result<()> {
    let api = scene.lab.pod("api")?;
    let status = scene.mesh.status(&scene.lab, scene.node())?;
    let status = status.context("the agent answers")?;
    let workloads = status["workloads"].as_array().cloned().unwrap_or_default();
    let own = workloads.iter().find(|one| one["name"] == "api");
    let cookie = own.and_then(|one| one["netnsCookie"].as_u64());
    let cookie = cookie.context("the status names the namespace")?;
    let entry = |number: usize| {
        let mut key = bpf::address([10, 99, 99, 99].into()).to_vec();
        key.extend(bpf::address(api.address()));
        key.extend((number as u32 + 1).to_le_bytes());
        key.extend(u32::from(PORT).to_le_bytes());
        let value = [1_u64, 0, cookie].map(u64::to_le_bytes).concat();
        (key, value)
    };
    let pins = Pins::of(scene.node())?;
    let there = pins.count("AGENT_FLOWS")?;
    let entries: Vec<_> = (0..AGENT_FLOWS - there).map(entry).collect();
    let commands = scene.lab.directory().join("fill");
    pins.insert("AGENT_FLOWS", &entries, &commands)?;
    let full = scene.outcome("flows_full")?;
    let plain = scene.lab.pod("plain")?;
    let program = client_with(scene.server.address, "--connections 3 --limit-ms 20000")?;
    let refused = talk(&scene.lab, plain, &program)?;
    ensure!(
        refused.complete == 0 && refused.timeouts == 0 && refused.resets == 3,
        "without an entry they fail, and do not hang: {refused:?}"
    );
    ensure!(
        scene.outcome("flows_full")? == full + 3,
        "once per connection: {} after {full}",
        scene.outcome("flows_full")?
    );
    wait::until(
        "entries without a socket to be forgotten",
        2 * LIMIT,
        || Ok((scene.recorded("AGENT_FLOWS")? < AGENT_FLOWS / 2).then_some(())),
    )?;
    require_service(&scene.lab, plain, scene.server.address)?;
    ensure!(
        scene.recorded("FLOWS")? == FLOWS,
        "those with a socket stay"
    );
    Ok(())
}
