//! What somebody takes apart behind the agent's back is put back, as the kernel has it and not as the agent remembers:
//! links, entries of maps, listeners.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    bpf::{self, Pins},
    conversation::{LIMIT, Server, client_with, report, require_service},
    inventory,
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    mesh::{Mesh, MeshSpec},
    process::Program,
    wait,
};
use serde_json::Value;

const PORT: u16 = 7000;
/// Pods that lose something, and those that lose nothing.
const TAKEN_APART: usize = 10;
const NEIGHBOURS: usize = 2;
/// Port of tunnels in every pod.
const TUNNEL_PORT: u16 = 15008;
/// `CLASS_OUTBOUND` of the listeners' key.
const OUTBOUND: u32 = 1;

struct Scene {
    lab: Lab,
    mesh: Mesh,
    server: Server,
}

impl Scene {
    fn start() -> Result<Self> {
        let pods =
            (0..TAKEN_APART + NEIGHBOURS).map(|number| PodSpec::new(&format!("pod{number}")));
        let lab = Lab::build(
            LabSpec::new(Families::V4)
                .node("n1", pods)
                .node("n2", [PodSpec::new("cart")]),
        )?;
        let mesh = Mesh::start(&lab, MeshSpec::default())?;
        let server = Server::start(&lab, lab.pod("cart")?, PORT)?;
        let scene = Self { lab, mesh, server };
        for number in 0..TAKEN_APART + NEIGHBOURS {
            scene.require_service(number)?;
        }
        Ok(scene)
    }

    fn node(&self) -> Result<&Node> {
        self.lab.node("n1")
    }

    fn pod(&self, number: usize) -> Result<&Pod> {
        self.lab.pod(&format!("pod{number}"))
    }

    fn require_service(&self, number: usize) -> Result<()> {
        require_service(&self.lab, self.pod(number)?, self.server.address)
    }

    fn repairs(&self) -> Result<usize> {
        let metrics = self.mesh.metrics(self.node()?)?;
        Ok(metrics.sum("weft_capture_repairs_total", &[]) as usize)
    }

    fn wait_repairs(&self, expected: usize) -> Result<()> {
        wait::until("the repairs", LIMIT, || {
            Ok((self.repairs()? >= expected).then_some(()))
        })
        .with_context(|| self.mesh.log_of(&self.lab.nodes()[0]))
    }

    fn cookie(&self, number: usize) -> Result<u64> {
        let status = self.mesh.status(&self.lab, self.node()?)?;
        let status = status.context("the agent answers")?;
        let name = &self.pod(number)?.spec.name;
        let all = status["workloads"].as_array().cloned().unwrap_or_default();
        let own = all.iter().find(|one| one["name"] == name.as_str());
        own.and_then(|one| one["netnsCookie"].as_u64())
            .with_context(|| format!("no cookie of {name}: {status}"))
    }

    fn every_capture(&self) -> Result<Vec<Value>> {
        let status = self.mesh.status(&self.lab, self.node()?)?;
        let workloads = status.context("the agent answers")?["workloads"].clone();
        let all = workloads.as_array().cloned().unwrap_or_default();
        Ok(all.into_iter().map(|one| one["capture"].clone()).collect())
    }
}

/// Takes one thing away from a pod.
fn take_apart(scene: &Scene, pins: &Pins, number: usize) -> Result<()> {
    let cookie = scene.cookie(number)?;
    match number % 5 {
        0 => pins.detach(&format!("lookup-{cookie:x}")),
        1 => pins.detach(&format!("flow-{cookie:x}")),
        2 => pins.delete("WORKLOADS", &cookie.to_le_bytes()),
        3 => pins.delete("ADDRESSES", &bpf::address(scene.pod(number)?.address())),
        _ => {
            let mut key = cookie.to_le_bytes().to_vec();
            key.extend(u64::from(OUTBOUND).to_le_bytes());
            pins.delete("LISTENERS", &key)
        }
    }
}

#[test]
fn links_and_entries_that_are_taken_away_are_put_back() -> Result<()> {
    let scene = Scene::start()?;
    let node = scene.node()?;
    let before = inventory::links(&scene.lab, node)?;
    let places = |links: &std::collections::BTreeSet<inventory::Link>| -> Vec<_> {
        let mut all: Vec<_> = links
            .iter()
            .map(|link| (link.place.clone(), link.hook.clone()))
            .collect();
        all.sort();
        all
    };
    let neighbours: Vec<_> = (TAKEN_APART..TAKEN_APART + NEIGHBOURS)
        .map(|number| {
            let arguments = "--rate 20 --seconds 12 --records 5 --interval-ms 20";
            let program = client_with(scene.server.address, arguments)?;
            scene.lab.spawn(scene.pod(number)?, &program)
        })
        .collect::<Result<_>>()?;
    let pins = Pins::of(node)?;
    let repaired = scene.repairs()?;
    let began = Instant::now();
    for number in 0..TAKEN_APART {
        take_apart(&scene, &pins, number)?;
    }
    scene.wait_repairs(repaired + TAKEN_APART)?;
    println!(
        "{TAKEN_APART} put back {:?} after the first was taken apart",
        began.elapsed()
    );
    for number in 0..TAKEN_APART {
        scene.require_service(number)?;
    }
    for capture in scene.every_capture()? {
        ensure!(capture == "ok", "{capture}");
    }
    ensure!(
        places(&inventory::links(&scene.lab, node)?) == places(&before),
        "every program at its place, and one only"
    );

    // The same for what all pods share: whoever comes first puts it back.
    let repaired = scene.repairs()?;
    ensure!(repaired == TAKEN_APART, "{repaired} repairs");
    pins.detach("connect4")?;
    scene.wait_repairs(repaired + 1)?;
    scene.require_service(0)?;
    for neighbour in neighbours {
        let report = report(neighbour)?;
        ensure!(
            report.lost() == 0 && report.connections > 0,
            "a neighbour lost: {report:?}"
        );
    }
    ensure!(
        places(&inventory::links(&scene.lab, node)?) == places(&before),
        "every program at its place, and one only"
    );
    let repairs = scene.repairs()?;
    ensure!(
        repairs == repaired + 1,
        "{repairs} repairs: something is put back for ever"
    );
    Ok(())
}

#[test]
fn a_listener_that_is_ended_is_opened_anew_and_its_connections_go_on() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart, n2) = (lab.pod("web")?, lab.pod("cart")?, lab.node("n2")?);
    let server = Server::start(&lab, cart, PORT)?;
    require_service(&lab, web, server.address)?;
    let arguments = "--connections 10 --seconds 10 --interval-ms 20";
    let long = lab.spawn(web, &client_with(server.address, arguments)?)?;
    wait::until("connections under way", LIMIT, || {
        Ok((inventory::established(&cart.netns, PORT)? >= 10).then_some(()))
    })?;
    let before = inventory::listeners(&cart.netns)?;
    let kill = format!("ss -K state listening sport = :{TUNNEL_PORT}");
    lab.run(cart, &Program::line(&kill), LIMIT)?.ok()?;
    let listens = || -> Result<bool> {
        let all = inventory::listeners(&cart.netns)?;
        Ok(all.iter().any(|(port, _)| *port == TUNNEL_PORT))
    };
    ensure!(!listens()?, "ss ended nothing, so this test proves nothing");
    wait::until("another listener", LIMIT, || Ok(listens()?.then_some(())))
        .with_context(|| mesh.log_of(n2))?;
    wait::until("the repair to be counted", LIMIT, || {
        let repairs = mesh.metrics(n2)?.sum("weft_capture_repairs_total", &[]);
        Ok((repairs == 1.0).then_some(()))
    })?;
    let after = inventory::listeners(&cart.netns)?;
    let kept = before.intersection(&after).count();
    ensure!(kept + 1 == before.len(), "{before:?} became {after:?}");
    let report = report(long)?;
    ensure!(
        report.lost() == 0 && report.complete == 10,
        "what was open must not notice anything: {report:?}"
    );
    // A client without a tunnel needs the listener.
    lab.run(
        web,
        &Program::line(&format!("ss -K dport = :{TUNNEL_PORT}")),
        LIMIT,
    )?;
    require_service(&lab, web, server.address)
}
