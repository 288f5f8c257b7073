//! Pods with NET_RAW and NET_ADMIN in their own namespace: marks, raw packets, and the capture's own rules do not
//! get them past a strict policy. The tricks themselves are in `hostile_pod.py`.

use std::{collections::BTreeMap, fs, io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server},
    lab::{Families, Lab, LabSpec, Pod, PodSpec},
    manifests::policy,
    mesh::{Mesh, MeshSpec},
    process::Program,
    programs, wait,
};
use serde_json::json;

const PORT: u16 = 7000;
const FORBIDDEN_PORT: u16 = 7001;
/// Connections that the script makes by hand from the pod's own address, at least.
const RAW_TRIES: u64 = 250;
const SCRIPT: &str = include_str!("hostile_pod.py");

struct World {
    lab: Lab,
    mesh: Mesh,
    script: PathBuf,
}

impl World {
    /// `api` on the pods' own node, `far-api` on the other; both strict, and open to `web` alone, on one port.
    fn start() -> Result<Self> {
        let pod = |name| PodSpec::new(name).namespace("shop");
        let lab = Lab::build(
            LabSpec::new(Families::V4)
                .node(
                    "n1",
                    [
                        pod("api").label("tier", "api"),
                        pod("web"),
                        pod("bot"),
                        PodSpec::new("open").unmeshed(),
                    ],
                )
                .node("n2", [pod("far-api").label("tier", "api")]),
        )?;
        let strict = policy(
            "MeshPolicy",
            "shop",
            "strict",
            json!({ "mtls": { "mode": "STRICT" } }),
        );
        let only_web = policy(
            "AuthorizationPolicy",
            "shop",
            "only-web",
            json!({
                "selector": { "matchLabels": { "tier": "api" } },
                "action": "ALLOW",
                "rules": [{ "from": [{ "serviceAccounts": ["web"] }], "to": [{ "ports": [PORT] }] }],
            }),
        );
        let mesh = Mesh::start(
            &lab,
            MeshSpec::default().manifest("policies", [strict, only_web]),
        )?;
        mesh.wait_policies(&lab, &["shop/only-web", "weft-system/weft_strict"])?;
        let script = lab.directory().join("hostile_pod.py");
        fs::write(&script, SCRIPT)?;
        Ok(Self { lab, mesh, script })
    }

    fn script(&self, from: &Pod, target: &Pod, tricks: &[&str]) -> Result<Program> {
        let python = programs::installed("python3").context("python3 is missing")?;
        Ok(Program::new(python)
            .arg(&self.script)
            .args([from.address().to_string(), target.address().to_string()])
            .args([PORT.to_string(), FORBIDDEN_PORT.to_string()])
            .args(tricks)
            .env("FOREIGN", self.lab.pod("web")?.address().to_string()))
    }

    /// `web` connects to `api` and says nothing before `meanwhile` has come to pass. Whether it is heard then.
    fn late_word(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<bool> {
        let (web, api) = (self.lab.pod("web")?, self.lab.pod("api")?);
        let pipe = self.lab.directory().join("say");
        let _ = fs::remove_file(&pipe);
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU)?;
        // Both ways, so that neither end waits to be opened.
        let mut say = fs::File::options().read(true).write(true).open(&pipe)?;
        let program = self.script(web, api, &["late_word"])?.stdin(&pipe);
        let mut running = self.lab.spawn(web, &program)?;
        running.wait_for_output("connected", LIMIT)?;
        meanwhile()?;
        writeln!(say)?;
        let output = running.wait(LIMIT)?.ok()?;
        Ok(output.ends_with("late_word 1\n"))
    }

    /// Connections that went from application to application.
    fn in_kernel(&self) -> Result<f64> {
        let metrics = self.mesh.metrics(self.lab.node("n1")?)?;
        Ok(metrics.sum("weft_kernel_connections_total", &[("outcome", "same_node")]))
    }

    /// Denies somebody `api`, instead of whomever it was before; done when the agents know.
    fn deny(&self, account: &str) -> Result<()> {
        let name = format!("deny-{account}");
        let deny = policy(
            "AuthorizationPolicy",
            "shop",
            &name,
            json!({
                "selector": { "matchLabels": { "tier": "api" } },
                "action": "DENY",
                "rules": [{ "from": [{ "serviceAccounts": [account] }] }],
            }),
        );
        self.mesh.manifests.write("deny", &[deny])?;
        let all = [
            "shop/only-web",
            "weft-system/weft_strict",
            &format!("shop/{name}"),
        ];
        self.mesh.wait_policies(&self.lab, &all)
    }

    /// Plays tricks from a pod against a target: how many tries of each got through.
    fn play(&self, from: &Pod, target: &Pod, tricks: &[&str]) -> Result<BTreeMap<String, u64>> {
        let program = self.script(from, target, tricks)?;
        let output = self.lab.run(from, &program, 4 * LIMIT)?.ok()?;
        let lines = output.lines().map(|line| {
            let (trick, count) = line.split_once(' ').context("a line of the script")?;
            Ok((trick.to_owned(), count.parse()?))
        });
        let played: BTreeMap<_, _> = lines.collect::<Result<_>>()?;
        ensure!(
            played.len() == tricks.len(),
            "not all tricks were played: {output}"
        );
        Ok(played)
    }

    /// Takes away what the capture has put into a pod's namespace, and keeps its kernel from answering raw tricks.
    fn sabotage(&self, pod: &Pod) -> Result<()> {
        let nft = "add table ip mute\n\
            add chain ip mute out { type filter hook output priority 0 ; }\n\
            add rule ip mute out tcp flags rst tcp sport 1024-32767 drop\n";
        let file = self.lab.directory().join("mute.nft");
        fs::write(&file, nft)?;
        let mute =
            programs::installed("nft").context("nft is missing (Debian package nftables)")?;
        let rule = "ip rule del fwmark 0x8000000/0x8000000";
        for program in [Program::new(mute).arg("-f").arg(&file), Program::line(rule)] {
            self.lab.run(pod, &program, LIMIT)?.ok()?;
        }
        Ok(())
    }
}

#[test]
fn a_pod_with_every_right_in_its_namespace_does_not_get_past_a_strict_policy() -> Result<()> {
    let world = World::start()?;
    let (lab, bot, web) = (&world.lab, world.lab.pod("bot")?, world.lab.pod("web")?);
    let targets = [lab.pod("api")?, lab.pod("far-api")?];
    let mut servers = Vec::new();
    for target in targets {
        servers.push(Server::start_with_banner(lab, target, PORT)?);
        servers.push(Server::start_with_banner(lab, target, FORBIDDEN_PORT)?);
        // The negative control: the same script gets through from the pod that may.
        let allowed = world.play(web, target, &["plain", "marks", "kinds"])?;
        let (marks, kinds) = (allowed["marks"], allowed["kinds"]);
        ensure!(
            allowed["plain"] == 1 && marks > 30 && kinds >= 3,
            "{}: {allowed:?}",
            target.spec.name
        );
    }
    let tricks = ["plain", "marks", "kinds", "raw"];
    for sabotaged in [false, true] {
        if sabotaged {
            world.sabotage(bot)?;
        }
        for target in targets {
            let through = world.play(bot, target, &tricks)?;
            ensure!(
                through.values().all(|count| *count == 0),
                "sabotaged {sabotaged}, {}: {through:?}",
                target.spec.name
            );
        }
    }
    // The negative control of the raw packets: where nobody guards the door, they get in.
    let _open = Server::start_with_banner(lab, lab.pod("open")?, PORT)?;
    let through = world.play(bot, lab.pod("open")?, &["raw"])?;
    ensure!(
        through["raw"] >= RAW_TRIES,
        "raw packets are no threat here: {through:?}"
    );
    for server in &servers {
        for served in server.served()? {
            ensure!(
                served.peer.ip() == web.address(),
                "{} was served",
                served.peer
            );
        }
    }
    let metrics = world.mesh.metrics(lab.node("n1")?)?;
    ensure!(
        metrics.sum("weft_agent_panics_total", &[]) == 0.0,
        "an agent panicked"
    );
    Ok(())
}

/// `web` may use one port, in the kernel. A socket of it that was let through there and then dials another port has
/// to be judged anew, even if the pod has taken the capture's rule away.
#[test]
fn a_socket_that_was_let_through_once_is_judged_again_for_another_port() -> Result<()> {
    let world = World::start()?;
    let (lab, web) = (&world.lab, world.lab.pod("web")?);
    let api = lab.pod("api")?;
    let _allowed = Server::start_with_banner(lab, api, PORT)?;
    let forbidden = Server::start_with_banner(lab, api, FORBIDDEN_PORT)?;
    // By tunnel, so that the kernel carries from here on.
    ensure!(world.play(web, api, &["plain"])?["plain"] == 1);
    world.sabotage(web)?;
    let through = world.play(web, api, &["second_wind"])?;
    ensure!(through["second_wind"] == 0, "{through:?}");
    ensure!(
        forbidden.served()?.is_empty(),
        "the forbidden port was served"
    );
    Ok(())
}

/// With TCP Fast Open the SYN leaves at the first write, long after `connect(2)` was judged. What counts is the mesh at
/// that time.
#[test]
fn a_syn_that_waits_is_judged_when_it_leaves() -> Result<()> {
    let world = World::start()?;
    let (web, api) = (world.lab.pod("web")?, world.lab.pod("api")?);
    let server = Server::start_with_banner(&world.lab, api, PORT)?;
    ensure!(world.play(web, api, &["plain"])?["plain"] == 1);
    // Nothing changes meanwhile: in the kernel.
    ensure!(world.late_word(|| Ok(()))?, "as it was judged");
    ensure!(world.in_kernel()? == 1.0, "the kernel carried it");
    // Something that does not concern it: by tunnel, as every first connection after a change.
    ensure!(
        world.late_word(|| world.deny("nobody"))?,
        "after a change that does not concern it"
    );
    ensure!(world.in_kernel()? == 1.0, "the agent carried it");
    ensure!(world.play(web, api, &["plain"])?["plain"] == 1);
    ensure!(world.in_kernel()? == 2.0, "the kernel is taught again");
    wait::until("the server's log", LIMIT, || {
        Ok((server.served()?.len() == 4).then_some(()))
    })?;
    ensure!(
        !world.late_word(|| world.deny("web"))?,
        "after it was denied"
    );
    ensure!(
        server.served()?.len() == 4,
        "a denied connection was served"
    );
    Ok(())
}
