//! What an agent gives up, and that it does its work without it: the rights of its process, files and sockets that others
//! could reach, and secrets that its log could tell.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server, require_service},
    http,
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    mesh::{ADMIN_PORT, Mesh, MeshSpec},
    process::Program,
};
use nix::{sys::signal::Signal, unistd::Pid};

const PORT: u16 = 7000;

/// `CAP_DAC_READ_SEARCH`, `CAP_NET_ADMIN`, `CAP_SYS_PTRACE`, `CAP_SYS_ADMIN` (include/uapi/linux/capability.h).
const KEPT: u64 = 1 << 2 | 1 << 12 | 1 << 19 | 1 << 21;

#[test]
fn an_agent_keeps_four_capabilities_and_does_everything_with_them() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let mut mesh = Mesh::start(&lab, chatty())?;
    let (web, cart, node) = (lab.pod("web")?, lab.pod("cart")?, lab.node("n1")?);
    let _server = Server::start(&lab, cart, PORT)?;
    require_service(&lab, web, cart.at(PORT))?;
    require_confined(mesh.agent(node)?.pid())?;
    require_told(&lab, &mesh, node)?;
    require_private_files(node)?;
    require_local_admin(node)?;

    // Un-enrolling and enrolling while it runs, by the namespace of a process of another user.
    mesh.unenroll(&lab, node, web)?;
    enroll_by_process(&lab, &mesh, node, web)?;
    require_service(&lab, web, cart.at(PORT))?;
    let first_log = mesh.agent(node)?.stderr();

    // Taking over what an earlier agent left: links, maps, records.
    mesh.stop_agent(node, Signal::SIGTERM)?;
    mesh.start_agent(&lab, node)?;
    mesh.wait_ready(&lab, node)?;
    mesh.wait_enrolled(&lab, node, web)?;
    require_service(&lab, web, cart.at(PORT))?;
    require_confined(mesh.agent(node)?.pid())?;
    require_confined_successors(&lab, &mut mesh, node)?;
    require_service(&lab, web, cart.at(PORT))?;
    require_no_secrets(&mesh, &lab, &first_log)
}

/// Every program logs everything it can.
fn chatty() -> MeshSpec {
    let trace = || vec!["--log".to_owned(), "trace".to_owned()];
    MeshSpec {
        agent_arguments: trace(),
        control_arguments: trace(),
        ..MeshSpec::default()
    }
}

/// Each thread has rights of its own: all must be without.
fn require_confined(agent: Pid) -> Result<()> {
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{agent}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
                .with_context(|| format!("no {name} in {status}"))
        };
        for (name, expected) in [
            ("CapEff", KEPT),
            ("CapPrm", KEPT),
            ("CapBnd", KEPT),
            ("CapInh", 0),
            ("CapAmb", 0),
        ] {
            let held = u64::from_str_radix(field(name)?, 16)?;
            ensure!(held == expected, "{name} is {held:x}, not {expected:x}");
        }
        ensure!(field("NoNewPrivs")? == "1", "{status}");
        ensure!(field("Seccomp")? == "2", "{status}");
        threads += 1;
    }
    ensure!(threads > 2, "only {threads} threads");
    let limits = fs::read_to_string(format!("/proc/{agent}/limits"))?;
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .context("no limit of core files")?;
    let words: Vec<&str> = core.split_whitespace().collect();
    ensure!(words.get(4..6) == Some(&["0", "0"]), "{core}");
    Ok(())
}

/// An agent that is started by a confined one has the same rights, which suffice to take over, and no more filters.
fn require_confined_successors(lab: &Lab, mesh: &mut Mesh, node: &Node) -> Result<()> {
    let filters = filters(mesh.agent(node)?.pid())?;
    for _ in 0..2 {
        mesh.weft(lab, node, &["agent", "upgrade"])?.ok()?;
        let status = mesh.status(lab, node)?.context("the successor answers")?;
        let pid = status["pid"].as_i64().context("a process id")?;
        let pid = Pid::from_raw(i32::try_from(pid)?);
        ensure!(pid != mesh.agent(node)?.pid(), "the same agent serves");
        require_confined(pid)?;
        require_told(lab, mesh, node)?;
        let now = self::filters(pid)?;
        ensure!(now == filters, "{now} filters, not {filters}");
    }
    Ok(())
}

/// Filters of system calls that a process has.
fn filters(agent: Pid) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{agent}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"));
    Ok(line.context("Linux 5.9 or later")?.trim().parse()?)
}

fn require_told(lab: &Lab, mesh: &Mesh, node: &Node) -> Result<()> {
    let status = mesh.status(lab, node)?.context("the agent answers")?;
    let told = &status["confinement"];
    ensure!(
        told["capabilities"]
            .as_array()
            .is_some_and(|all| all.len() == 4)
            && told["noNewPrivileges"] == true
            && told["systemCallFilter"] == true
            && told["coreDumps"] == false,
        "{status}"
    );
    Ok(())
}

fn require_private_files(node: &Node) -> Result<()> {
    let mode = |path: &Path| -> Result<u32> {
        Ok(fs::symlink_metadata(path)
            .with_context(|| path.display().to_string())?
            .permissions()
            .mode()
            & 0o777)
    };
    ensure!(mode(&node.run_dir)? == 0o700, "{}", node.run_dir.display());
    for file in fs::read_dir(&node.run_dir)? {
        let path = file?.path();
        ensure!(
            mode(&path)? & 0o077 == 0 || path.ends_with("agent.lock"),
            "others may use {} (mode {:o})",
            path.display(),
            mode(&path)?
        );
    }
    Ok(())
}

/// A page that a browser on the node shows must not reach admin by a name that leads to loopback.
fn require_local_admin(node: &Node) -> Result<()> {
    let address = ([127, 0, 0, 1], ADMIN_PORT).into();
    let own = http::get(&node.netns, address, "/healthz/live", LIMIT)?;
    ensure!(own.status == 200, "{own:?}");
    Ok(())
}

fn enroll_by_process(lab: &Lab, mesh: &Mesh, node: &Node, pod: &Pod) -> Result<()> {
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups sleep 600";
    let application = lab.spawn(pod, &Program::line(nobody))?;
    let netns = format!("/proc/{}/ns/net", application.pid());
    let (namespace, name) = (pod.spec.namespace.as_str(), pod.spec.name.as_str());
    let arguments = [
        "enroll",
        "--namespace",
        namespace,
        "--name",
        name,
        "--netns",
        &netns,
    ];
    mesh.weft(lab, node, &arguments)?.ok()?;
    mesh.wait_enrolled(lab, node, pod)?;
    // The path ends with the process: from here on by the name that stays.
    mesh.unenroll(lab, node, pod)?;
    mesh.enroll(lab, node, pod)?;
    mesh.wait_enrolled(lab, node, pod)
}

fn require_no_secrets(mesh: &Mesh, lab: &Lab, first_log: &str) -> Result<()> {
    let mut logs = vec![first_log.to_owned(), mesh.control_log()];
    for node in lab.nodes() {
        logs.push(mesh.full_log_of(node));
    }
    let mut secrets = vec!["PRIVATE KEY".to_owned()];
    for node in lab.nodes() {
        let token = mesh.directory().join(format!("token-{}", node.name));
        secrets.push(fs::read_to_string(token)?.trim().to_owned());
    }
    let key = fs::read_to_string(mesh.directory().join("ca/ca-key.pem"))?;
    secrets.extend(
        key.lines()
            .filter(|line| !line.starts_with('-'))
            .map(str::to_owned),
    );
    for log in &logs {
        ensure!(log.contains("TRACE"), "nothing was traced: {log}");
        for secret in &secrets {
            ensure!(
                !log.contains(secret),
                "a log tells {secret:?}: {:?}",
                log.lines().find(|line| line.contains(secret))
            );
        }
    }
    Ok(())
}
