//! Starts that must fail: each says why, leaves nothing, and harms nobody who runs.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server, client_with, report, require_service},
    inventory::{self, Inventory},
    lab::{Families, Lab, LabSpec, Node, PodSpec},
    mesh::{ADMIN_PORT, METRICS_PORT, Mesh, MeshSpec, READINESS_PORT},
    process::Program,
    programs,
};

const PORT: u16 = 7000;

/// `web` on the first node, `cart` on the second.
fn two_nodes(families: Families) -> Result<Lab> {
    Lab::build(
        LabSpec::new(families)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [PodSpec::new("cart")]),
    )
}

#[test]
fn a_second_agent_is_refused_and_the_first_is_unharmed() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = Server::start(&lab, cart, PORT)?;
    let node = lab.node("n1")?;
    // The snapshot is written when the agent finds the time.
    let before = Inventory::of(&lab)?.without("mesh.snapshot");
    let stream = lab.spawn(
        web,
        &client_with(
            cart.at(PORT),
            "--connections 5 --seconds 3 --interval-ms 20",
        )?,
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
    let report = report(stream)?;
    ensure!(report.lost() == 0, "the first agent was harmed: {report:?}");
    require_service(&lab, web, cart.at(PORT))
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
    bad_flags(&lab, node, &good)?;
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
        .with("--bpffs-root", &lab.directory().to_string_lossy());
    refused(&lab, node, &in_new_folder, &["--bpffs-root"])?;
    ensure!(
        !lab.directory().join("deep").exists(),
        "folders made for a failed start stay"
    );
    // The control: the same command line without a mistake starts.
    let mut agent = lab.spawn_agent(node, &good.program()?)?;
    agent.wait_for_output("agent is running", LIMIT)
}

/// Flags and files they name: each wrong in one way.
fn bad_flags(lab: &Lab, node: &Node, good: &Arguments) -> Result<()> {
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
        refused(lab, node, &arguments, &texts)?;
    }
    Ok(())
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
