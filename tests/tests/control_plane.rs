//! The control plane away, wrong, foreign or fed with mistakes; certificates that end; a disk that is full.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    capture::LinkCapture,
    conversation::{LIMIT, Server, client_with, report, require_service, talk, wait_for_service},
    inventory,
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    manifests::{self, ServicePort},
    mesh::{CONTROL_PORT, Mesh, MeshSpec},
    process::{Program, Running},
    programs, wait,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use serde_json::Value;

/// After the control plane is back: one certificate request per node every 25 s is promised while it is away.
const RESUMES_WITHIN: Duration = Duration::from_secs(60);
const PORT: u16 = 7000;
/// Text in every record of seqecho, which must not be seen between nodes.
const MARKER: &str = "WEFTSEQ";
/// The shortest lifetime that the control plane signs, in seconds.
const SHORT_LIFE: u64 = 10;

/// Every connection ends with an error, none hangs, no byte gets through.
fn require_refusal(lab: &Lab, from: &Pod, to: SocketAddr) -> Result<()> {
    let report = talk(
        lab,
        from,
        &client_with(to, "--connections 3 --records 2 --limit-ms 25000")?,
    )?;
    ensure!(
        report.complete == 0 && report.records == 0 && report.timeouts == 0,
        "{} to {to} must be refused: {report:?}",
        from.spec.name
    );
    Ok(())
}

/// How long it takes until a connection is served.
fn time_to_service(lab: &Lab, from: &Pod, to: SocketAddr) -> Result<Duration> {
    let started = Instant::now();
    wait_for_service(lab, from, to, RESUMES_WITHIN)?;
    Ok(started.elapsed())
}

fn wait_for_status(
    lab: &Lab,
    mesh: &Mesh,
    node: &Node,
    what: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<()> {
    let mut last = Value::Null;
    wait::until(what, RESUMES_WITHIN, || {
        last = mesh.status(lab, node)?.unwrap_or_default();
        Ok(holds(&last).then_some(()))
    })
    .with_context(|| format!("the status is {last}\n{}", mesh.log_of(node)))
}

fn dump(lab: &Lab, mesh: &Mesh, node: &Node) -> Result<Value> {
    let text = mesh.weft(lab, node, &["-o", "json", "dump"])?.ok()?;
    serde_json::from_str(&text).context("weft dump printed no JSON")
}

fn certificate_of<'a>(status: &'a Value, name: &str) -> &'a str {
    let workloads = status["workloads"].as_array().map(Vec::as_slice);
    let mut all = workloads.unwrap_or_default().iter();
    let found = all.find(|workload| workload["name"] == name);
    found
        .and_then(|one| one["certificate"].as_str())
        .unwrap_or_default()
}

fn is_ready(status: &Value) -> bool {
    status["pending"].as_array().is_some_and(Vec::is_empty)
}

/// `web` and the un-enrolled `plain` on the first node, `cart` on the second.
fn two_nodes() -> Result<Lab> {
    Lab::build(
        LabSpec::new(Families::V4)
            .node(
                "n1",
                [PodSpec::new("web"), PodSpec::new("plain").unmeshed()],
            )
            .node("n2", [PodSpec::new("cart")]),
    )
}

#[test]
fn agents_go_on_without_the_control_plane_and_never_in_plaintext() -> Result<()> {
    let lab = two_nodes()?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, plain, cart) = (lab.pod("web")?, lab.pod("plain")?, lab.pod("cart")?);
    let _servers = (
        Server::start(&lab, cart, PORT)?,
        Server::start(&lab, plain, PORT)?,
        Server::start(&lab, web, PORT)?,
    );
    let node = lab.node("n1")?;
    require_service(&lab, web, cart.at(PORT))?;
    // What a restart may know is what has been written by then.
    wait_for_status(&lab, &mesh, node, "the snapshot to be written", |status| {
        status["snapshot"] == "current"
    })?;
    let capture = LinkCapture::start(&lab)?;

    // Away: what runs goes on, new connections included.
    mesh.stop_control(Signal::SIGKILL)?;
    wait_for_status(&lab, &mesh, node, "the loss to be noticed", |status| {
        status["discovery"] == "snapshot"
    })?;
    require_service(&lab, web, cart.at(PORT))?;

    // An agent that restarts now knows the mesh from its snapshot, but keys are never on disk.
    mesh.stop_agent(node, Signal::SIGKILL)?;
    mesh.start_agent(&lab, node)?;
    wait_for_status(&lab, &mesh, node, "readiness from the snapshot", is_ready)?;
    let status = mesh.status(&lab, node)?.unwrap_or_default();
    ensure!(
        status["discovery"] == "snapshot" && certificate_of(&status, "web").starts_with("missing"),
        "{status}"
    );
    require_refusal(&lab, web, cart.at(PORT))?;
    for (from, to) in [(web, plain), (plain, web)] {
        require_service(&lab, from, to.at(PORT)).context("what needs no certificate goes on")?;
    }

    // Without a snapshot nothing is known: refused.
    mesh.stop_agent(node, Signal::SIGKILL)?;
    fs::remove_file(node.run_dir.join("mesh.snapshot"))?;
    mesh.start_agent(&lab, node)?;
    wait_for_status(&lab, &mesh, node, "the agent to answer", |status| {
        status["discovery"] == "waiting" && !is_ready(status)
    })?;
    require_refusal(&lab, web, cart.at(PORT))?;

    mesh.start_control(&lab)?;
    let took = time_to_service(&lab, web, cart.at(PORT))?;
    println!("served again {took:?} after the control plane was back");
    wait_for_status(&lab, &mesh, node, "the stream to be back", |status| {
        status["discovery"] == "connected" && is_ready(status)
    })?;
    let verdict = capture.finish(&[MARKER])?;
    println!("{verdict}");
    verdict.require_tls_only()
}

#[test]
fn certificates_are_renewed_under_traffic_and_their_end_closes() -> Result<()> {
    let lab = two_nodes()?;
    let spec = MeshSpec {
        control_arguments: vec!["--leaf-max-lifetime".to_owned(), SHORT_LIFE.to_string()],
        ..MeshSpec::default()
    };
    let mut mesh = Mesh::start(&lab, spec)?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = Server::start(&lab, cart, PORT)?;
    let node = lab.node("n1")?;
    let serials = |mesh: &Mesh| -> Result<String> {
        Ok(dump(&lab, mesh, node)?["certificates"][0]["serial"].to_string())
    };
    let first = serials(&mesh)?;
    let capture = LinkCapture::start(&lab)?;
    let seconds = 2 * SHORT_LIFE;
    let [long, short] = [
        format!("--connections 20 --seconds {seconds} --interval-ms 50"),
        format!("--rate 20 --seconds {seconds} --records 3"),
    ]
    .map(|arguments| lab.spawn(web, &client_with(cart.at(PORT), &arguments)?));
    for load in [long, short] {
        let report = report(load?)?;
        ensure!(
            report.lost() == 0 && report.complete >= 20,
            "renewals must not be noticed: {report:?}\n{}",
            mesh.log_of(node)
        );
    }
    let second = serials(&mesh)?;
    ensure!(first != second, "the certificate was not renewed");

    mesh.stop_control(Signal::SIGKILL)?;
    wait_for_status(&lab, &mesh, node, "the certificate to end", |status| {
        certificate_of(status, "web").starts_with("expired")
    })?;
    require_refusal(&lab, web, cart.at(PORT))?;
    mesh.start_control(&lab)?;
    let took = time_to_service(&lab, web, cart.at(PORT))?;
    println!("served again {took:?} after the control plane was back");
    capture.finish(&[MARKER])?.require_tls_only()
}

/// A control plane with an authority of its own, at a node's address, for the same nodes.
fn foreign_control(lab: &Lab, mesh: &Mesh, node: &Node) -> Result<(Running, PathBuf)> {
    let authority = lab.directory().join("foreign-ca");
    let address = SocketAddr::new(node.address(), CONTROL_PORT);
    let program = Program::new(programs::own("mesh-control")?)
        .named("foreign-control")
        .args(["run", "--source"])
        .arg(mesh.manifests.path())
        .args(["--listen", &address.to_string(), "--ca-dir"])
        .arg(&authority)
        .arg("--node-tokens")
        .arg(mesh.directory().join("node-tokens"));
    Ok((lab.serve(node, &program, address, LIMIT)?, authority))
}

#[test]
fn another_authority_is_not_believed() -> Result<()> {
    let lab = two_nodes()?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = Server::start(&lab, cart, PORT)?;
    let (n1, n2) = (lab.node("n1")?, lab.node("n2")?);
    let capture = LinkCapture::start(&lab)?;

    // In the place of the control plane: agents do not talk to it, and go on with what they have.
    mesh.stop_control(Signal::SIGKILL)?;
    let (foreign, _) = foreign_control(&lab, &mesh, n1)?;
    let mut told = Value::Null;
    wait::until("the foreign certificate to be noticed", LIMIT, || {
        told = dump(&lab, &mesh, n1)?["discovery"]["lastError"].take();
        let text = told.as_str().unwrap_or_default();
        Ok((text.contains("certificate") || text.contains("UnknownIssuer")).then_some(()))
    })
    .with_context(|| format!("the last error is {told}"))?;
    println!("{told}");
    require_service(&lab, web, cart.at(PORT))?;
    foreign.kill()?;
    mesh.start_control(&lab)?;
    wait_for_status(&lab, &mesh, n1, "the stream to be back", |status| {
        status["discovery"] == "connected"
    })?;

    // A whole node of another authority, same names: its certificates are worth nothing here.
    mesh.stop_agent(n2, Signal::SIGTERM)?.ok()?;
    let (_foreign, authority) = foreign_control(&lab, &mesh, n2)?;
    let agent = Program::new(programs::own("mesh-agent")?)
        .named("foreign-agent")
        .args(["run", "--node", "n2", "--run-dir"])
        .arg(&n2.run_dir)
        .arg("--cgroup-root")
        .arg(&n2.cgroup_root)
        .arg("--bpffs-root")
        .arg(&n2.bpffs_root)
        .args([
            "--control-plane",
            &format!("https://{}", SocketAddr::new(n2.address(), CONTROL_PORT)),
            "--control-plane-ca",
        ])
        .arg(authority.join("root-cert.pem"))
        .arg("--token-file")
        .arg(mesh.directory().join("token-n2"));
    let foreign_agent = lab.spawn_agent(n2, &agent)?;
    mesh.wait_enrolled(&lab, n2, cart)?;
    require_refusal(&lab, web, cart.at(PORT))?;
    ensure!(
        mesh.log_of(n1)
            .contains("TLS with the peer failed: invalid peer certificate"),
        "the log must say why: {}",
        mesh.log_of(n1)
    );
    foreign_agent.stop(Signal::SIGTERM, LIMIT)?.ok()?;
    mesh.start_agent(&lab, n2)?;
    time_to_service(&lab, web, cart.at(PORT))?;
    capture.finish(&[MARKER])?.require_tls_only()
}

#[test]
fn a_wrong_token_is_told_and_mended_by_itself() -> Result<()> {
    let lab = two_nodes()?;
    let mut mesh = Mesh::prepare(&lab, MeshSpec::default())?;
    mesh.write_pods(&lab)?;
    mesh.start_control(&lab)?;
    let node = lab.node("n1")?;
    let file = mesh.directory().join("token-n1");
    let right = fs::read_to_string(&file)?;
    // Right for another node, then for none.
    let other = fs::read_to_string(mesh.directory().join("token-n2"))?;
    fs::write(&file, other)?;
    mesh.start_agent(&lab, node)?;
    let mut wrong = vec!["f".repeat(64)];
    loop {
        wait_for_status(&lab, &mesh, node, "the refusal to be told", |status| {
            let pending = status["pending"].to_string();
            pending.contains("token") || pending.contains("credential")
        })?;
        println!(
            "{}",
            mesh.status(&lab, node)?.unwrap_or_default()["pending"]
        );
        let Some(next) = wrong.pop() else { break };
        fs::write(&file, next)?;
    }
    let web = lab.pod("web")?;
    mesh.enroll(&lab, node, web)?;
    require_refusal(&lab, web, lab.pod("cart")?.at(PORT))?;
    fs::write(&file, right)?;
    wait_for_status(&lab, &mesh, node, "readiness", is_ready)?;
    mesh.wait_enrolled(&lab, node, web)
}

const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1));
const TWO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 2));

/// One file with two services; the second is spoilt by replacing a text of it.
fn services(one: u16, two: u16, spoil: impl Fn(&str) -> String) -> String {
    let text = |name: &str, address: IpAddr, port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  \
             clusterIP: {address}\n  clusterIPs: [{address}]\n  selector: {{app: cart}}\n  ports:\n  \
             - {{name: tcp, port: {port}, targetPort: {PORT}}}\n"
        )
    };
    format!(
        "{}---\n{}",
        text("one", ONE, one),
        spoil(&text("two", TWO, two))
    )
}

#[test]
fn mistakes_in_manifests_cost_only_what_they_concern() -> Result<()> {
    let lab = two_nodes()?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let _server = Server::start(&lab, cart, PORT)?;
    let file = mesh.manifests.clone();
    let at = |address, port| SocketAddr::new(address, port);
    let good = |text: &str| text.to_owned();
    file.write_text("services", &services(80, 80, good))?;
    for address in [ONE, TWO] {
        time_to_service(&lab, web, at(address, 80))?;
    }
    type Spoil = fn(&str) -> String;
    // (what, how the second service is spoilt, what the log must name)
    let mistakes: [(&str, Spoil, &[&str]); 4] = [
        (
            "an unknown field",
            |text| text.replace("selector:", "selektor:"),
            &["services.yaml", "selektor"],
        ),
        (
            "a wrong type",
            |text| text.replace("port: ", "port: many"),
            &["services.yaml", "port"],
        ),
        (
            "an impossible value",
            |text| text.replace("10.96.0.2", "10.96.0.two"),
            &["services.yaml", "10.96.0.two"],
        ),
        (
            "broken YAML",
            |text| text.replace("ports:", "ports: ["),
            &["services.yaml", "line"],
        ),
    ];
    for (number, (what, spoil, expected)) in (81..).zip(mistakes) {
        // The neighbour in the same file changes at the same time, and the change counts.
        let spoilt = services(number, number, spoil);
        file.write_text("services", &spoilt)?;
        let mut log = String::new();
        wait::until(&format!("{what} to be reported"), LIMIT, || {
            log = mesh.control_log();
            Ok(log
                .lines()
                .any(|line| {
                    line.contains("ERROR") && expected.iter().all(|text| line.contains(text))
                })
                .then_some(()))
        })
        .with_context(|| format!("{what}: {expected:?} in\n{log}"))?;
        time_to_service(&lab, web, at(ONE, number))
            .with_context(|| format!("{what}: the good object must be applied"))?;
        require_service(&lab, web, at(TWO, number - 1))
            .with_context(|| format!("{what}: the last good version must stay"))?;
        file.write_text("services", &services(number, number, good))?;
        time_to_service(&lab, web, at(TWO, number))
            .with_context(|| format!("{what}: mended, it must be applied"))?;
    }
    mesh.check_running()?;
    // The control: what is no longer there is refused.
    let old = talk(
        &lab,
        web,
        &client_with(at(TWO, 80), "--records 1 --limit-ms 5000")?,
    )?;
    ensure!(old.complete == 0, "port 80 has gone: {old:?}");
    let service = manifests::service(
        "default",
        "three",
        "cart",
        &["10.96.0.3".parse()?],
        &[ServicePort {
            name: "tcp",
            port: 80,
            target: PORT,
        }],
    );
    file.write("third", &[service])?;
    time_to_service(&lab, web, at("10.96.0.3".parse()?, 80)).map(drop)
}

/// A file system of a few pages; unmounted when dropped.
struct TinyDisk(PathBuf);

impl TinyDisk {
    fn mount(at: &Path) -> Result<Self> {
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=256k,mode=0700"),
        )
        .with_context(|| format!("cannot mount a tmpfs at {}", at.display()))?;
        Ok(Self(at.to_owned()))
    }

    /// Takes every byte that is left.
    fn fill(&self) -> Result<()> {
        use std::io::Write as _;
        let mut ballast = fs::File::create(self.0.join("ballast"))?;
        loop {
            match ballast.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_is_told_and_service_goes_on() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web"), PodSpec::new("late")])
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let node = lab.node("n1")?;
    let (web, late, cart) = (lab.pod("web")?, lab.pod("late")?, lab.pod("cart")?);
    let disk = TinyDisk::mount(&node.run_dir)?;
    let mut mesh = Mesh::start(&lab, MeshSpec::default())?;
    let _server = Server::start(&lab, cart, PORT)?;
    mesh.unenroll(&lab, node, late)?;
    require_service(&lab, web, cart.at(PORT))?;
    let before = inventory::links(&lab, node)?;

    disk.fill()?;
    let refused = mesh
        .enroll(&lab, node, late)
        .expect_err("an enrolment that cannot be recorded must be refused");
    let text = format!("{refused:#}");
    ensure!(
        text.contains("No space left") && text.contains("workloads.json"),
        "{text}"
    );
    ensure!(
        inventory::links(&lab, node)? == before,
        "the refused enrolment left links"
    );
    require_service(&lab, web, cart.at(PORT))?;
    // A change of the mesh that cannot be saved is applied all the same.
    mesh.delete_pod(late)?;
    wait::until("the snapshot to fail", LIMIT, || {
        let failures = dump(&lab, &mesh, node)?["discovery"]["snapshotFailures"].as_u64();
        Ok(failures.filter(|count| *count > 0))
    })?;
    mesh.stop_agent(node, Signal::SIGKILL)?;
    mesh.start_agent(&lab, node)?;
    mesh.wait_ready(&lab, node)?;
    mesh.wait_enrolled(&lab, node, web)?;
    require_service(&lab, web, cart.at(PORT))
        .context("an agent that starts on a full disk serves what is recorded")?;

    disk.empty()?;
    mesh.write_pod(node, late, true)?;
    mesh.enroll(&lab, node, late)?;
    mesh.wait_enrolled(&lab, node, late)?;
    require_service(&lab, late, cart.at(PORT))
}
