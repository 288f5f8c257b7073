//! Identities across the mesh: every connection is attributed to the pod that made it, however many identities share
//! a worker, a node and its tunnels; and an address that changes hands carries no identity over.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server, client, reaches, report},
    lab::{Families, Lab, LabSpec, Node, PodSpec},
    manifests::{ServicePort, policy, service},
    mesh::{CONTROL_PORT, Mesh, MeshSpec},
    process::Program,
    programs, wait,
};
use serde_json::json;

const PORT: u16 = 7000;
const SOURCES: [&str; 6] = [
    "source-a", "source-b", "source-c", "source-d", "source-e", "source-f",
];
const TARGETS: [&str; 4] = ["target-a", "target-b", "target-c", "target-d"];
/// Connections per pair of identities. The reliability table asks for 20 × 20 × 50 = 20,000; here 6 × 4 × 20 = 480,
/// each a process of its own on two shared cores. What must not happen is the same: one mixed up is one too many.
const CONNECTIONS: u64 = 20;

/// Sources and targets on both nodes; everything by tunnel, also within a node, and all tunnels of a node on one worker.
fn crowd() -> Result<(Lab, Mesh)> {
    let pod = |name: &&str| PodSpec::new(name).namespace(&format!("ns-{name}"));
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", SOURCES[..3].iter().chain(&TARGETS[..2]).map(pod))
            .node("n2", SOURCES[3..].iter().chain(&TARGETS[2..]).map(pod)),
    )?;
    let tunnel = policy(
        "MeshPolicy",
        "weft-system",
        "tunnel",
        json!({ "sameNode": "tunnel" }),
    );
    let mut spec = MeshSpec::default().manifest("tunnel", [tunnel]);
    spec.agent_arguments = vec!["--workers".into(), "1".into()];
    let mesh = Mesh::start(&lab, spec)?;
    Ok((lab, mesh))
}

fn identity(pod: &str) -> String {
    format!("spiffe://cluster.local/ns/ns-{pod}/sa/{pod}")
}

#[test]
fn every_connection_is_attributed_to_the_identity_that_made_it() -> Result<()> {
    let (lab, mesh) = crowd()?;
    let mut servers = BTreeMap::new();
    for target in TARGETS {
        servers.insert(target, Server::start(&lab, lab.pod(target)?, PORT)?);
    }
    let mut talking = Vec::new();
    for source in SOURCES {
        for target in TARGETS {
            let program = client(servers[target].address)?;
            let program = program.args(["--connections", &CONNECTIONS.to_string()]);
            // Concurrently, so that tunnels of all identities are being set up at once.
            talking.push((source, target, lab.spawn(lab.pod(source)?, &program)?));
        }
    }
    for (source, target, running) in talking {
        let report = report(running)?;
        ensure!(
            report.complete == CONNECTIONS && report.lost() == 0,
            "{source} to {target}: {report:?}"
        );
    }
    for (target, server) in &servers {
        let expected = CONNECTIONS * SOURCES.len() as u64;
        wait::until(&format!("the log of {target}"), LIMIT, || {
            Ok((server.served()?.len() as u64 >= expected).then_some(()))
        })?;
        metrics_name_the_sources(&lab, &mesh, target)?;
    }
    for node in lab.nodes() {
        access_log_names_the_sources(&lab, node)?;
    }
    Ok(())
}

fn metrics_name_the_sources(lab: &Lab, mesh: &Mesh, target: &str) -> Result<()> {
    let metrics = mesh.metrics(lab.node_of(target)?)?;
    let destination = identity(target);
    let inbound = [
        ("direction", "inbound"),
        ("destination_identity", destination.as_str()),
    ];
    for source in SOURCES {
        let from = identity(source);
        let edge = [
            inbound[0],
            inbound[1],
            ("security", "mutual_tls"),
            ("source_identity", from.as_str()),
            ("source_workload", source),
        ];
        let opened = metrics.sum("weft_connections_opened_total", &edge);
        ensure!(
            opened == CONNECTIONS as f64,
            "{source} to {target}: {opened} were counted"
        );
    }
    let all = metrics.sum("weft_connections_opened_total", &inbound);
    ensure!(
        all == (CONNECTIONS * SOURCES.len() as u64) as f64,
        "{target}: {all} in all"
    );
    Ok(())
}

/// Every inbound line of the access log: the identity is that of the pod with the peer's address.
fn access_log_names_the_sources(lab: &Lab, node: &Node) -> Result<()> {
    let owners: BTreeMap<String, String> = lab
        .pods()
        .map(|pod| (pod.address().to_string(), identity(&pod.spec.name)))
        .collect();
    let expected = CONNECTIONS as usize * SOURCES.len() * TARGETS.len() / 2;
    let lines = wait::until("the access log", LIMIT, || {
        let log = without_colours(&log_of(lab, node)?);
        let lines: Vec<String> = log
            .lines()
            .filter(|line| line.contains("direction=\"inbound\""))
            .map(str::to_owned)
            .collect();
        Ok((lines.len() >= expected).then_some(lines))
    })?;
    ensure!(
        lines.len() == expected,
        "{}: {} inbound lines",
        node.name,
        lines.len()
    );
    for line in lines {
        let address = field(&line, "src.addr=")?;
        let (ip, _) = address.rsplit_once(':').context("an address has a port")?;
        let owner = owners
            .get(ip)
            .with_context(|| format!("nobody owns {ip}"))?;
        ensure!(
            field(&line, "src.identity=")? == owner,
            "{owner} is named otherwise: {line}"
        );
    }
    Ok(())
}

fn field<'a>(line: &'a str, name: &str) -> Result<&'a str> {
    let (_, rest) = line
        .split_once(name)
        .with_context(|| format!("no {name} in {line}"))?;
    rest.split(' ').next().context("split yields something")
}

fn log_of(lab: &Lab, node: &Node) -> Result<String> {
    let wanted = format!("-agent-{}.err", node.name);
    for entry in fs::read_dir(lab.logs())? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(&wanted) {
            return Ok(fs::read_to_string(path)?);
        }
    }
    anyhow::bail!("no log of the agent of {}", node.name)
}

/// Without escape sequences of terminals (ECMA-48): ESC, `[`, parameters, one letter.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut parts = text.split('\u{1b}');
    plain.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let end = part.find(|c: char| c.is_ascii_alphabetic());
        plain.push_str(end.map_or("", |end| &part[end + 1..]));
    }
    plain
}

/// The pod behind an address is replaced by one of another identity while the client's node hears nothing of it.
#[test]
fn an_address_that_changed_hands_is_refused_until_the_client_knows() -> Result<()> {
    let mut lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("old")])
            .node("n2", [PodSpec::new("web")]),
    )?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let address = lab.pod("old")?.address();
    {
        let server = Server::start(&lab, lab.pod("old")?, PORT)?;
        ensure!(
            reaches(&lab, lab.pod("web")?, server.address)?,
            "before the change"
        );
    }
    cut_off(&lab, lab.node("n2")?, true)?;
    let old = lab.pod("old")?;
    mesh.unenroll(&lab, lab.node("n1")?, old)?;
    mesh.delete_pod(old)?;
    lab.remove_pod("old")?;
    lab.add_pod("n1", PodSpec::new("new").address(address))?;
    let (new, node) = (lab.pod("new")?, lab.node("n1")?);
    mesh.write_pod(node, new, true)?;
    mesh.enroll(&lab, node, new)?;
    mesh.wait_enrolled(&lab, node, new)?;
    let server = Server::start(&lab, new, PORT)?;
    for _ in 0..10 {
        ensure!(
            !reaches(&lab, lab.pod("web")?, server.address)?,
            "delivered to another identity"
        );
    }
    ensure!(
        server.served()?.is_empty(),
        "the new pod got what was for the old one"
    );
    cut_off(&lab, lab.node("n2")?, false)?;
    wait::until("the client's node to know the new pod", LIMIT, || {
        Ok(reaches(&lab, lab.pod("web")?, server.address)?.then_some(()))
    })
}

/// Two pods whose addresses are swapped again and again, and what is asked of them: by address and by service.
struct Pair {
    lab: Lab,
    mesh: Mesh,
    /// Of each identity, since the last swap.
    servers: [Server; 2],
}

const PAIR: [&str; 2] = ["one", "two"];
/// Swaps. The reliability table asks for 200; each makes two pods and enrols them, half a second in all.
const SWAPS: usize = 30;

impl Pair {
    fn start() -> Result<Self> {
        let lab = Lab::build(
            LabSpec::new(Families::V4)
                .node("n1", PAIR.map(PodSpec::new))
                .node("n2", [PodSpec::new("web")]),
        )?;
        let mut spec = MeshSpec::default();
        for (name, address) in PAIR.iter().zip(service_addresses()) {
            let port = ServicePort {
                name: "tcp",
                port: PORT,
                target: PORT,
            };
            let service = service("default", name, name, &[address], &[port]);
            spec = spec.manifest(&format!("service-{name}"), [service]);
        }
        let mesh = Mesh::start(&lab, spec)?;
        let servers = servers(&lab)?;
        Ok(Self { lab, mesh, servers })
    }

    /// Deletes both pods and makes them again, each with the other's address.
    fn swap(&mut self) -> Result<()> {
        let node = self.lab.node("n1")?;
        let addresses = [
            self.lab.pod(PAIR[1])?.address(),
            self.lab.pod(PAIR[0])?.address(),
        ];
        for name in PAIR {
            let pod = self.lab.pod(name)?;
            self.mesh.unenroll(&self.lab, node, pod)?;
            self.mesh.delete_pod(pod)?;
        }
        for name in PAIR {
            self.lab.remove_pod(name)?;
        }
        for (name, address) in PAIR.into_iter().zip(addresses) {
            self.lab
                .add_pod("n1", PodSpec::new(name).address(address))?;
        }
        let node = self.lab.node("n1")?;
        for name in PAIR {
            let pod = self.lab.pod(name)?;
            self.mesh.write_pod(node, pod, true)?;
            self.mesh.enroll(&self.lab, node, pod)?;
        }
        for name in PAIR {
            self.mesh
                .wait_enrolled(&self.lab, node, self.lab.pod(name)?)?;
        }
        self.servers = servers(&self.lab)?;
        Ok(())
    }

    fn served(&self) -> Result<[usize; 2]> {
        let [one, two] = &self.servers;
        Ok([one.served()?.len(), two.served()?.len()])
    }
}

fn service_addresses() -> [IpAddr; 2] {
    [1, 2].map(|last| IpAddr::from([10, 96, 0, last]))
}

fn servers(lab: &Lab) -> Result<[Server; 2]> {
    let [one, two] = PAIR.map(|name| Server::start(lab, lab.pod(name)?, PORT));
    Ok([one?, two?])
}

/// Each address and each service name an identity. Whoever has the address meanwhile, nothing reaches another one.
#[test]
fn addresses_that_are_swapped_deliver_nothing_to_the_wrong_identity() -> Result<()> {
    let mut pair = Pair::start()?;
    for swap in 0..SWAPS {
        // Every other time the client's node hears of it late.
        let late = swap % 2 == 0;
        let before = PAIR.map(|name| pair.lab.pod(name).map(|pod| pod.at(PORT)));
        let services = service_addresses().map(|address| SocketAddr::new(address, PORT));
        if late {
            cut_off(&pair.lab, pair.lab.node("n2")?, true)?;
        }
        pair.swap()?;
        let (lab, web) = (&pair.lab, pair.lab.pod("web")?);
        if late {
            for to in before.into_iter().collect::<Result<Vec<_>>>()? {
                ensure!(
                    !reaches(lab, web, to)?,
                    "swap {swap}: {to} has changed hands"
                );
            }
            for to in services {
                ensure!(!reaches(lab, web, to)?, "swap {swap}: {to} leads elsewhere");
            }
            ensure!(
                pair.served()? == [0, 0],
                "swap {swap}: delivered to another identity"
            );
            cut_off(lab, lab.node("n2")?, false)?;
        }
        // By service only the right pod may answer, from the first time on.
        for (number, to) in services.into_iter().enumerate() {
            wait::until("the client's node to know the swap", LIMIT, || {
                Ok(reaches(lab, web, to)?.then_some(()))
            })?;
            let mut expected = [1, 1];
            expected[number + 1..].fill(0);
            wait::until("the served connection to be logged", LIMIT, || {
                let served = pair.served()?;
                ensure!(
                    served.iter().zip(&expected).all(|(is, most)| is <= most),
                    "swap {swap}: {to} was served as {served:?}"
                );
                Ok((served == expected).then_some(()))
            })?;
        }
    }
    Ok(())
}

/// Drops what the control plane sends to a node, or lets it through again. TCP sends it again then.
fn cut_off(lab: &Lab, node: &Node, cut: bool) -> Result<()> {
    let rules = if cut {
        format!(
            "table ip cut {{\nchain arriving {{\ntype filter hook input priority 0;\ntcp sport {CONTROL_PORT} drop\n}}\n}}\n"
        )
    } else {
        "delete table ip cut\n".to_owned()
    };
    let file = lab.directory().join("cut.nft");
    fs::write(&file, rules)?;
    let nft = programs::installed("nft").context("nft is missing (Debian package nftables)")?;
    lab.run(node, &Program::new(nft).arg("-f").arg(&file), LIMIT)?
        .ok()
        .map(drop)
}
