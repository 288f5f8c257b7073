//! One node by itself, and the guide for standalone use: its commands are run as they are written.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    cgroup,
    conversation::{LIMIT, Server, require_service},
    inventory::Inventory,
    lab::{Families, Lab, LabSpec, PodSpec},
    manifests::{self, ServicePort},
    mesh::{Mesh, MeshSpec, TOOK_OVER},
    process::{Finished, Program, Running},
    programs, wait,
};
use nix::sys::signal::Signal;

/// The whole guide: two meshes are started, used and removed.
const GUIDE_LIMIT: Duration = Duration::from_secs(120);
const PORT: u16 = 7000;

#[test]
fn one_process_serves_a_node_and_leaves_nothing() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::Dual).node("solo", [PodSpec::new("web"), PodSpec::new("cart")]),
    )?;
    let node = lab.node("solo")?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let before = Inventory::of(&lab)?;
    let mesh = Mesh::prepare(&lab, MeshSpec::default())?;
    mesh.write_pods(&lab)?;
    let service = SocketAddr::from(([10, 96, 0, 1], 80));
    let port = ServicePort {
        name: "tcp",
        port: 80,
        target: PORT,
    };
    let cart_service = manifests::service("default", "cart", "cart", &[service.ip()], &[port]);
    mesh.manifests.write("service", &[cart_service])?;
    let address = cart.at(PORT);
    let _server = Server::start(&lab, cart, PORT)?;

    let mut first = start(&lab, &mesh)?;
    for pod in [web, cart] {
        mesh.enroll(&lab, node, pod)?;
        mesh.wait_enrolled(&lab, node, pod)?;
    }
    for to in [address, service] {
        require_service(&lab, web, to)?;
    }
    first.check_running()?;
    let authority = fs::read(node.run_dir.join("standalone-roots.pem"))?;

    // Restarted, it is the same mesh: same authority, same workloads, new certificates.
    first.stop(Signal::SIGKILL, LIMIT)?;
    let second = start(&lab, &mesh)?;
    for pod in [web, cart] {
        mesh.wait_enrolled(&lab, node, pod)?;
    }
    require_service(&lab, web, service)?;
    ensure!(
        authority == fs::read(node.run_dir.join("standalone-roots.pem"))?,
        "a restart must keep the authority"
    );

    // Upgraded, too: with a control plane of its own, beside the one that runs.
    let mut third = lab.spawn_agent(node, &program(&lab, &mesh)?.arg("--take-over"))?;
    third.wait_for_output(TOOK_OVER, LIMIT)?;
    second.wait(LIMIT)?.ok()?;
    for to in [address, service] {
        require_service(&lab, web, to)?;
    }
    third.stop(Signal::SIGTERM, LIMIT)?.ok()?;
    mesh.uninstall(&lab, node)?;
    // The lab made it; only its content is the agent's.
    fs::create_dir(&node.run_dir)?;
    Inventory::of(&lab)?.require_same_as(&before)?;
    require_service(&lab, web, address)
}

fn program(lab: &Lab, mesh: &Mesh) -> Result<Program> {
    let node = lab.node("solo")?;
    Ok(Program::new(programs::own("mesh-agent")?)
        .args(["run", "--node", "solo", "--run-dir"])
        .arg(&node.run_dir)
        .arg("--cgroup-root")
        .arg(&node.cgroup_root)
        .arg("--bpffs-root")
        .arg(&node.bpffs_root)
        .arg("--standalone")
        .arg(mesh.manifests.path()))
}

fn start(lab: &Lab, mesh: &Mesh) -> Result<Running> {
    let node = lab.node("solo")?;
    let mut agent = lab.spawn_agent(node, &program(lab, mesh)?)?;
    wait::until("the agent to be ready", LIMIT, || {
        agent.check_running()?;
        let status = mesh.status(lab, node)?.unwrap_or_default();
        let pending = status["pending"].as_array().cloned();
        Ok(pending.filter(Vec::is_empty).map(drop))
    })?;
    Ok(agent)
}

#[test]
fn the_guide_works_as_written() -> Result<()> {
    follow(&guide()?, "demo", "browser")
}

#[test]
fn the_guide_works_with_other_names_and_addresses() -> Result<()> {
    let mut text = guide()?;
    for (written, other) in [
        ("192.0.2.", "10.20.30."),
        ("198.51.100.", "10.99.1."),
        ("203.0.113.", "10.99.2."),
        ("demo", "retail"),
        ("browser", "kiosk"),
        ("shop", "depot"),
        ("left", "alpha"),
        ("right", "omega"),
    ] {
        text = text.replace(written, other);
    }
    follow(&text, "retail", "kiosk")
}

fn guide() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/standalone.md");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The code blocks of a language, in order.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}");
    let mut found = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        match &mut open {
            Some(block) if line == "```" => {
                found.push(std::mem::take(block));
                open = None;
            }
            Some(block) => {
                block.push_str(line);
                block.push('\n');
            }
            None if line == fence => open = Some(String::new()),
            None => {}
        }
    }
    found
}

/// Runs every command of the guide in a sandbox and checks what it prints.
fn follow(text: &str, namespace: &str, client: &str) -> Result<()> {
    let lab = Lab::build(LabSpec::new(Families::V4).node("machine", []))?;
    let commands = blocks(text, "sh");
    ensure!(commands.len() >= 10, "the guide has lost its commands");
    let finished = in_sandbox(&lab, &commands)?;
    let (out, log) = (&finished.stdout, &finished.stderr);
    println!("{out}");
    let require = |holds: bool, what: &str| -> Result<()> {
        ensure!(holds, "{what}\n--- output\n{out}\n--- log\n{log}");
        Ok(())
    };
    for number in 1..=commands.len() {
        let done = format!("@@ {number} ended with 0");
        require(
            out.contains(&done),
            &format!("block {number} failed:\n{}", commands[number - 1]),
        )?;
    }
    require(
        out.matches("200 OK").count() == 3,
        "by the pod's address, by the service's, and by the service's with one process",
    )?;
    require(
        out.matches("ready").count() >= 3,
        "every agent becomes ready",
    )?;
    let row = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.first() == Some(&namespace) && words.contains(&"ok") && words.contains(&"valid,")
    };
    require(
        out.lines().filter(row).count() >= 3,
        "the workloads are captured and have certificates",
    )?;
    let statuses = out
        .lines()
        .filter(|line| line.contains(client) && row(line));
    require(
        statuses.count() >= 1,
        "the client is in the status of one process",
    )?;
    require(
        // The reset comes before or after curl has looked at its connect.
        out.contains("refused")
            && (log.contains("reset by peer") || log.contains("Couldn't connect")),
        "plaintext of the node is refused",
    )?;
    let behind = out
        .lines()
        .filter(|line| line.starts_with("@@ left behind:"));
    let behind: Vec<&str> = behind.collect();
    require(
        behind.len() == 2
            && behind
                .iter()
                .all(|line| line.trim_end() == "@@ left behind:"),
        "uninstalling leaves nothing",
    )
}

/// A machine of its own as far as the guide can see: mounts, network, processes, and a part of the cgroups.
fn in_sandbox(lab: &Lab, commands: &[String]) -> Result<Finished> {
    let machine = lab.node("machine")?;
    let home = lab.directory().join("home");
    fs::create_dir_all(home.join("target"))?;
    let built = programs::own("mesh-agent")?;
    let built = built.parent().context("programs live in a folder")?;
    symlink(built, home.join("target/release"))?;
    let etc = lab.directory().join("etc");
    let cgroups = cgroup::mount_point()?;
    let mut script = format!(
        "set -eu\ncp -a /etc {etc}\nmount --bind {etc} /etc\nmount -t tmpfs tmpfs /run\nmount -t tmpfs tmpfs /var/lib\n\
         mount -t bpf bpf /sys/fs/bpf\nmount --bind {own} {cgroups}\nip link set lo up\ncd {home}\nset +e\n",
        etc = etc.display(),
        own = machine.cgroup_root.display(),
        cgroups = cgroups.display(),
        home = home.display(),
    );
    for (number, block) in (1..).zip(commands) {
        script.push_str(block);
        script.push_str(&format!("echo \"@@ {number} ended with $?\"\n"));
        if block.contains("mesh-agent uninstall") {
            let listing = format!(
                "ls -d /sys/fs/bpf/weft-* /run/weft-* {0}/weft-* 2>/dev/null",
                cgroups.display()
            );
            let rules = "for pod in $(ip netns list | cut -d' ' -f1); do ip -n $pod rule | grep 15001; done";
            script.push_str(&format!("echo \"@@ left behind: $({listing}; {rules})\"\n"));
        }
    }
    let file: PathBuf = lab.directory().join("guide.sh");
    fs::write(&file, script)?;
    let program =
        Program::line("unshare --mount --net --pid --ipc --fork --kill-child --mount-proc bash")
            .named("guide")
            .arg(&file);
    lab.spawn(machine, &program)?.wait(GUIDE_LIMIT)
}

#[test]
fn the_configuration_file_of_the_guide_is_accepted() -> Result<()> {
    let lab = Lab::build(LabSpec::new(Families::V4).node("machine", []))?;
    let text = guide()?;
    let configurations = blocks(&text, "yaml");
    ensure!(
        !configurations.is_empty(),
        "the guide shows a configuration file"
    );
    for configuration in configurations {
        let file = lab.directory().join("agent.yaml");
        fs::write(&file, configuration)?;
        let program = Program::new(programs::own("mesh-agent")?)
            .arg("check-config")
            .arg(&file);
        lab.run(lab.node("machine")?, &program, LIMIT)?.ok()?;
    }
    Ok(())
}
