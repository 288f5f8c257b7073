//! The kernel path between pods of one node: taken only after the proxy has let the same pair through, seen by the
//! application as what it is, counted, and closed to everybody else.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server, client, reaches, report, talk},
    lab::{Families, Lab, LabSpec, Place, Pod, PodSpec},
    manifests::policy,
    mesh::{Mesh, MeshSpec},
    metrics::Metrics,
    netns,
    process::Program,
    wait,
};
use serde_json::{Value, json};

const PORT: u16 = 7000;
const OTHER_PORT: u16 = 7001;
/// Connections that shall go by the kernel.
const FAST: u64 = 20;
/// seqecho sends a request and one record of 64 bytes each, and gets one back.
const SENT_BYTES: u64 = 128;
const RECEIVED_BYTES: u64 = 64;
/// Source port of the connections that reuse one; below the ephemeral range, so that nobody else has it.
const REUSED_PORT: u16 = 20_000;
/// An address that belongs to nobody.
const NOBODY: &str = "10.99.99.99";

fn lab(families: Families) -> Result<Lab> {
    let pod = |name| PodSpec::new(name).namespace("shop");
    let pods = [
        pod("api"),
        pod("web"),
        pod("bot"),
        PodSpec::new("plain").unmeshed(),
    ];
    // A lab of one node has no link, hence no address for the control plane.
    Lab::build(LabSpec::new(families).node("n1", pods).node("n2", []))
}

/// Strict, and on `api` only `web` is allowed, on [`PORT`] alone.
fn only_web() -> Vec<Value> {
    vec![
        policy(
            "MeshPolicy",
            "shop",
            "strict",
            json!({ "mtls": { "mode": "STRICT" } }),
        ),
        policy(
            "AuthorizationPolicy",
            "shop",
            "only-web",
            json!({
                "selector": { "matchLabels": { "app": "api" } },
                "action": "ALLOW",
                "rules": [{ "from": [{ "serviceAccounts": ["web"] }], "to": [{ "ports": [PORT] }] }],
            }),
        ),
    ]
}

struct Node<'a> {
    lab: &'a Lab,
    mesh: &'a Mesh,
}

impl Node<'_> {
    fn metrics(&self) -> Result<Metrics> {
        self.mesh.metrics(&self.lab.nodes()[0])
    }

    /// Connections that `connect(2)` let go from application to application.
    fn in_kernel(&self) -> Result<u64> {
        let metrics = self.metrics()?;
        Ok(metrics.sum("weft_kernel_connections_total", &[("outcome", "same_node")]) as u64)
    }

    /// Connections that `api` got through a tunnel.
    fn by_tunnel(&self) -> Result<u64> {
        let labels = [
            ("direction", "inbound"),
            ("security", "mutual_tls"),
            ("destination_workload", "api"),
        ];
        Ok(self
            .metrics()?
            .sum("weft_connections_opened_total", &labels) as u64)
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        self.lab.pod(name)
    }
}

#[test]
fn the_kernel_carries_what_the_proxy_has_let_through_and_nothing_else() -> Result<()> {
    let lab = lab(Families::V4)?;
    let mesh = Mesh::start(&lab, MeshSpec::default().manifest("policies", only_web()))?;
    mesh.wait_policies(&lab, &["shop/only-web", "weft-system/weft_strict"])?;
    let node = Node {
        lab: &lab,
        mesh: &mesh,
    };
    let api = lab.pod("api")?;
    let server = Server::start(&lab, api, PORT)?;
    let other = Server::start(&lab, api, OTHER_PORT)?;

    first_by_tunnel_then_in_the_kernel(&node, &server).context(mesh.log_of(&lab.nodes()[0]))?;
    nobody_else_gets_through(&node, &server, &other)?;
    a_foreign_address_is_not_let_through(&node, &server)?;
    let web = lab.pod("web")?.address();
    for served in server.served()? {
        ensure!(served.peer.ip() == web, "{} was served", served.peer);
    }
    ensure!(
        other.served()?.is_empty(),
        "the port that nobody may use was used"
    );
    Ok(())
}

fn first_by_tunnel_then_in_the_kernel(node: &Node<'_>, server: &Server) -> Result<()> {
    let web = node.pod("web")?;
    ensure!(
        reaches(node.lab, web, server.address)?,
        "the first connection"
    );
    ensure!(
        node.by_tunnel()? == 1 && node.in_kernel()? == 0,
        "the first one goes by tunnel"
    );
    let program = client(server.address)?.args(["--connections", &FAST.to_string()]);
    let report = talk(node.lab, web, &program)?;
    ensure!(report.complete == FAST && report.lost() == 0, "{report:?}");
    ensure!(
        node.by_tunnel()? == 1 && node.in_kernel()? == FAST,
        "tunnel {}, kernel {}",
        node.by_tunnel()?,
        node.in_kernel()?
    );
    // The application sees its true peer, either way.
    wait::until("the server's log", LIMIT, || {
        Ok((server.served()?.len() as u64 == FAST + 1).then_some(()))
    })?;
    for served in server.served()? {
        ensure!(
            served.peer.ip() == web.address(),
            "the application saw {}",
            served.peer
        );
    }
    kernel_flows_are_counted(node)
}

/// The agent reads the kernel's counters every two seconds.
fn kernel_flows_are_counted(node: &Node<'_>) -> Result<()> {
    let labels = [
        ("direction", "outbound"),
        ("security", "kernel"),
        ("source_workload", "web"),
        ("source_identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("destination_workload", "api"),
        (
            "destination_identity",
            "spiffe://cluster.local/ns/shop/sa/api",
        ),
    ];
    wait::until("the flows in the metrics", LIMIT, || {
        let metrics = node.metrics()?;
        let closed = metrics.sum("weft_connections_closed_total", &labels);
        Ok((closed == FAST as f64).then_some(()))
    })
    .with_context(|| format!("{:?}", node.metrics()))?;
    let metrics = node.metrics()?;
    for (name, expected, phantoms) in [
        ("weft_connections_opened_total", FAST, 0),
        ("weft_connections_open", 0, 0),
        // The kernel counts sequence numbers: SYN and FIN take one each, as if they were bytes.
        ("weft_sent_bytes_total", FAST * SENT_BYTES, 2 * FAST),
        ("weft_received_bytes_total", FAST * RECEIVED_BYTES, 2 * FAST),
    ] {
        let value = metrics.sum(name, &labels) as u64;
        ensure!(
            (expected..=expected + phantoms).contains(&value),
            "{name} is {value}, not {expected}"
        );
    }
    Ok(())
}

/// After `web` has used the kernel path: another identity, a pod outside the mesh, a process of the node, and `web`
/// itself on another port.
fn nobody_else_gets_through(node: &Node<'_>, server: &Server, other: &Server) -> Result<()> {
    let before = node.in_kernel()?;
    // Twice: the second try could use what the first one taught.
    for _ in 0..2 {
        ensure!(!reaches(node.lab, node.pod("bot")?, server.address)?, "bot");
        ensure!(
            !reaches(node.lab, node.pod("plain")?, server.address)?,
            "plain"
        );
        ensure!(
            !reaches(node.lab, &node.lab.nodes()[0], server.address)?,
            "the host"
        );
        ensure!(
            !reaches(node.lab, node.pod("web")?, other.address)?,
            "web, other port"
        );
    }
    ensure!(node.in_kernel()? == before, "the kernel path was used");
    Ok(())
}

/// `bot` with the address of `web`, and `web` with the address of nobody, each on its own `lo`.
fn a_foreign_address_is_not_let_through(node: &Node<'_>, server: &Server) -> Result<()> {
    let web = node.pod("web")?.address();
    for (name, address) in [("bot", web), ("web", NOBODY.parse::<IpAddr>()?)] {
        let pod = node.pod(name)?;
        let add = format!("ip addr add {address}/32 dev lo");
        node.lab.run(pod, &Program::line(&add), LIMIT)?.ok()?;
        // What cannot be answered shall give up soon: one SYN again, three seconds in all.
        netns::sysctl(pod.netns(), &[("ipv4/tcp_syn_retries", "1")])?;
        let program = client(server.address)?.args(["--bind", &address.to_string()]);
        let report = talk(node.lab, pod, &program)?;
        ensure!(
            report.records == 0 && report.complete == 0,
            "{name} as {address}: {report:?}"
        );
        let remove = format!("ip addr del {address}/32 dev lo");
        node.lab.run(pod, &Program::line(&remove), LIMIT)?.ok()?;
    }
    // Negative control: with its own address it still is.
    ensure!(reaches(node.lab, node.pod("web")?, server.address)?, "web");
    Ok(())
}

#[test]
fn a_workload_may_ask_for_mutual_tls_on_its_own_node() -> Result<()> {
    let lab = lab(Families::V4)?;
    let tunnel = policy(
        "MeshPolicy",
        "shop",
        "tunnel",
        json!({ "sameNode": "tunnel" }),
    );
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let node = Node {
        lab: &lab,
        mesh: &mesh,
    };
    let server = Server::start(&lab, lab.pod("api")?, PORT)?;
    let web = lab.pod("web")?;
    for _ in 0..3 {
        ensure!(reaches(&lab, web, server.address)?);
    }
    ensure!(
        node.by_tunnel()? == 1 && node.in_kernel()? == 2,
        "by default the kernel carries"
    );
    mesh.manifests.write("tunnel", &[tunnel])?;
    wait::until("the wish for mutual TLS", LIMIT, || {
        let status = mesh.status(&lab, &lab.nodes()[0])?.unwrap_or_default();
        let workloads = status["workloads"].as_array().cloned().unwrap_or_default();
        Ok(workloads
            .iter()
            .all(|workload| workload["sameNode"] == "tunnel")
            .then_some(()))
    })?;
    for _ in 0..3 {
        ensure!(reaches(&lab, web, server.address)?);
    }
    ensure!(
        node.by_tunnel()? == 4 && node.in_kernel()? == 2,
        "tunnel {}, kernel {}",
        node.by_tunnel()?,
        node.in_kernel()?
    );
    Ok(())
}

/// One source port, in turn by tunnel and in the kernel: an entry of the one kind must not catch the other.
#[test]
fn a_source_port_may_change_between_the_kernel_and_the_proxy() -> Result<()> {
    let lab = lab(Families::V4)?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let node = Node {
        lab: &lab,
        mesh: &mesh,
    };
    let (api, web) = (lab.pod("api")?, lab.pod("web")?);
    let server = Server::start(&lab, api, PORT)?;
    for round in 0..4_u64 {
        // The first connection after a change of the mesh goes by tunnel, the second one in the kernel.
        for fast in [false, true] {
            let kernel = node.in_kernel()?;
            let program = client(server.address)?.args(["--close", "rst", "--source-port"]);
            let program = program.arg(REUSED_PORT.to_string());
            let program = program.args(["--bind", &web.address().to_string()]);
            let report = talk(&lab, web, &program)?;
            ensure!(
                report.complete == 1 && report.lost() == 0,
                "{round}, {fast}: {report:?}"
            );
            ensure!(
                node.in_kernel()? - kernel == u64::from(fast),
                "{round}: in the kernel is not {fast}"
            );
        }
        let name = format!("edit-{round}");
        let edit = json!({
            "selector": { "matchLabels": { "app": "bot" } },
            "action": "DENY",
            "rules": [{ "from": [{ "namespaces": ["nowhere"] }] }],
        });
        mesh.manifests.write(
            "edit",
            &[policy("AuthorizationPolicy", "shop", &name, edit)],
        )?;
        mesh.wait_policies(&lab, &[&format!("shop/{name}")])?;
    }
    Ok(())
}

/// A process that has entered a pod's namespace and not its cgroup, as debuggers do.
struct Visitor<'a> {
    pod: &'a Pod,
    cgroup: PathBuf,
}

impl Place for Visitor<'_> {
    fn netns(&self) -> &Path {
        self.pod.netns()
    }

    fn cgroup(&self) -> PathBuf {
        self.cgroup.clone()
    }
}

/// Flows of a process outside the pod's cgroup cannot be recorded, so they go by tunnel, every one of them.
#[test]
fn a_process_outside_the_pods_cgroup_is_served_by_tunnel() -> Result<()> {
    let lab = lab(Families::V4)?;
    let mesh = Mesh::start(&lab, MeshSpec::default().manifest("policies", only_web()))?;
    mesh.wait_policies(&lab, &["shop/only-web", "weft-system/weft_strict"])?;
    let node = Node {
        lab: &lab,
        mesh: &mesh,
    };
    let server = Server::start(&lab, lab.pod("api")?, PORT)?;
    let web = lab.pod("web")?;
    for _ in 0..2 {
        ensure!(reaches(&lab, web, server.address)?, "web");
    }
    ensure!(
        node.by_tunnel()? == 1 && node.in_kernel()? == 1,
        "the kernel is taught"
    );
    let visitor = Visitor {
        pod: web,
        cgroup: lab.nodes()[0].host_cgroup(),
    };
    let program = client(server.address)?.args(["--connections", &FAST.to_string()]);
    let report = talk(&lab, &visitor, &program)?;
    ensure!(report.complete == FAST && report.lost() == 0, "{report:?}");
    ensure!(
        node.by_tunnel()? == 1 + FAST && node.in_kernel()? == 1,
        "tunnel {}, kernel {}",
        node.by_tunnel()?,
        node.in_kernel()?
    );
    Ok(())
}

/// Nobody could revoke a flow with only one end in the mesh.
#[test]
fn a_flow_ends_when_either_end_leaves_the_mesh() -> Result<()> {
    let lab = lab(Families::V4)?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let node = Node {
        lab: &lab,
        mesh: &mesh,
    };
    let (n1, api, web) = (&lab.nodes()[0], lab.pod("api")?, lab.pod("web")?);
    let server = Server::start(&lab, api, PORT)?;
    for leaving in [web, api] {
        ensure!(reaches(&lab, web, server.address)?, "the first connection");
        let before = node.in_kernel()?;
        let held = client(server.address)?.args(["--connections", "4", "--seconds", "20"]);
        let held = lab.spawn(web, &held)?;
        wait::until("the flows", LIMIT, || {
            Ok((node.in_kernel()? == before + 4).then_some(()))
        })?;
        mesh.unenroll(&lab, n1, leaving)?;
        let report = report(held)?;
        ensure!(
            report.complete == 0 && report.resets + report.other_errors == 4,
            "{} left: {report:?}",
            leaving.spec.name
        );
        mesh.enroll(&lab, n1, leaving)?;
        mesh.wait_enrolled(&lab, n1, leaving)?;
    }
    Ok(())
}
