//! The root of the authority is changed, step by step as the guide says, under connections that must not notice.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    capture::LinkCapture,
    conversation::{
        LIMIT, Server, client_with, reaches, report, require_service, wait_for_service,
    },
    lab::{Families, Lab, LabSpec, Node, PodSpec},
    mesh::{CONTROL_PORT, Mesh, MeshSpec},
    process::{Program, Running},
    programs, wait,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const PORT: u16 = 7000;
/// The shortest lifetime that the control plane signs, in seconds; renewals begin at half of it.
const LIFE_S: u64 = 10;
/// Pods of each of the two nodes; every one of them has a certificate to renew.
const CLIENTS: [&str; 3] = ["web", "web-b", "web-c"];
const TARGETS: [&str; 3] = ["cart", "cart-b", "cart-c"];
/// Connections that stay open the whole time.
const OPEN: u64 = 100;
/// New connections a second meanwhile.
const RATE: u64 = 20;
/// How long the load lasts, seconds; the change must end before it does.
const LOAD_S: u64 = 40;
/// Certificates that must have been replaced meanwhile, at least.
const ROTATIONS: f64 = 20.0;
const MARKER: &str = "WEFTSEQ";

/// The folder of the mesh's authority, and beside it the files of the new one.
struct Authority {
    folder: PathBuf,
    new: PathBuf,
}

impl Authority {
    fn copy(&self, from: &str, to: &str) -> Result<()> {
        let copied = fs::copy(self.at(from), self.at(to));
        copied.map(drop).with_context(|| format!("{from} to {to}"))
    }

    /// `new/NAME` is in the folder of the new authority.
    fn at(&self, name: &str) -> PathBuf {
        match name.strip_prefix("new/") {
            Some(name) => self.new.join(name),
            None => self.folder.join(name),
        }
    }
}

fn control_plane(mesh: &Mesh, node: &Node, authority: &Path, name: &str) -> Result<Program> {
    let address = SocketAddr::new(node.address(), CONTROL_PORT);
    Ok(Program::new(programs::own("mesh-control")?)
        .named(name)
        .args(["run", "--source"])
        .arg(mesh.manifests.path())
        .args(["--listen", &address.to_string(), "--ca-dir"])
        .arg(authority)
        .args(["--leaf-max-lifetime", &LIFE_S.to_string(), "--node-tokens"])
        .arg(mesh.directory().join("node-tokens")))
}

/// Serials of all certificates of two nodes.
fn serials(lab: &Lab, mesh: &Mesh) -> Result<BTreeSet<String>> {
    let mut serials = BTreeSet::new();
    for node in ["n1", "n2"] {
        let text = mesh.weft(lab, lab.node(node)?, &["-o", "json", "dump"])?;
        let state: Value = serde_json::from_str(&text.ok()?)?;
        let certificates = state["certificates"].as_array().context("a list")?;
        serials.extend(
            certificates
                .iter()
                .map(|certificate| certificate["serial"].to_string()),
        );
    }
    Ok(serials)
}

/// Waits until every certificate was replaced.
fn renewed(lab: &Lab, mesh: &Mesh) -> Result<()> {
    let before = serials(lab, mesh)?;
    wait::until("every certificate to be renewed", LIMIT, || {
        let now = serials(lab, mesh)?;
        let whole = now.len() == before.len();
        Ok((whole && now.is_disjoint(&before)).then_some(()))
    })
}

/// Certificates that both nodes were given until now.
fn rotations(lab: &Lab, mesh: &Mesh) -> Result<f64> {
    let mut all = 0.0;
    for node in ["n1", "n2"] {
        let metrics = mesh.metrics(lab.node(node)?)?;
        all += metrics.sum("weft_certificate_requests_total", &[])
            - metrics.sum("weft_certificate_failures_total", &[]);
    }
    Ok(all)
}

/// A node whose control plane and agent stay with the old authority.
struct Relic {
    _control: Running,
    _agent: Running,
}

impl Relic {
    /// Copies the authority as it is now.
    fn start(lab: &Lab, mesh: &mut Mesh, authority: &Authority) -> Result<Self> {
        let node = lab.node("n3")?;
        let folder = lab.directory().join("relic-ca");
        fs::create_dir(&folder)?;
        for name in ["ca-key.pem", "ca-cert.pem", "roots.pem"] {
            fs::copy(authority.at(name), folder.join(name))?;
        }
        mesh.stop_agent(node, Signal::SIGTERM)?.ok()?;
        let control = control_plane(mesh, node, &folder, "relic-control")?;
        let address = SocketAddr::new(node.address(), CONTROL_PORT);
        let control = lab.serve(node, &control, address, LIMIT)?;
        let agent = Program::new(programs::own("mesh-agent")?)
            .named("relic-agent")
            .args(["run", "--node", "n3", "--run-dir"])
            .arg(&node.run_dir)
            .arg("--cgroup-root")
            .arg(&node.cgroup_root)
            .arg("--bpffs-root")
            .arg(&node.bpffs_root)
            .args(["--control-plane", &format!("https://{address}")])
            .arg("--control-plane-ca")
            .arg(folder.join("root-cert.pem"))
            .arg("--token-file")
            .arg(mesh.directory().join("token-n3"));
        let agent = lab.spawn_agent(node, &agent)?;
        mesh.wait_enrolled(lab, node, lab.pod("relic")?)?;
        Ok(Self {
            _control: control,
            _agent: agent,
        })
    }
}

/// A control plane with an empty folder makes an authority, and is stopped again.
fn make_authority(lab: &Lab, mesh: &Mesh) -> Result<Authority> {
    let new = lab.directory().join("new-ca");
    let node = lab.node("n2")?;
    let maker = control_plane(mesh, node, &new, "new-control")?;
    let address = SocketAddr::new(node.address(), CONTROL_PORT);
    lab.serve(node, &maker, address, LIMIT)?
        .stop(Signal::SIGTERM, LIMIT)?
        .ok()?;
    Ok(Authority {
        folder: mesh.directory().join("ca"),
        new,
    })
}

fn restart_control(lab: &Lab, mesh: &mut Mesh, change: impl FnOnce() -> Result<()>) -> Result<()> {
    mesh.stop_control(Signal::SIGTERM)?.ok()?;
    change()?;
    mesh.start_control(lab)
}

#[test]
fn certificates_and_their_root_change_without_a_connection_noticing() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", CLIENTS.map(PodSpec::new))
            .node("n2", TARGETS.map(PodSpec::new))
            .node("n3", [PodSpec::new("relic")]),
    )?;
    let spec = MeshSpec {
        control_arguments: vec!["--leaf-max-lifetime".to_owned(), LIFE_S.to_string()],
        ..MeshSpec::default()
    };
    let mut mesh = Mesh::start(&lab, spec)?;
    let (web, cart, relic) = (lab.pod("web")?, lab.pod("cart")?, lab.pod("relic")?);
    let _servers = (
        Server::start(&lab, cart, PORT)?,
        Server::start(&lab, relic, PORT)?,
        Server::start(&lab, web, PORT)?,
    );
    let capture = LinkCapture::start(&lab)?;
    let before = rotations(&lab, &mesh)?;
    let [open, mut new] = [
        format!("--connections {OPEN} --seconds {LOAD_S} --interval-ms 200"),
        format!("--rate {RATE} --seconds {LOAD_S} --records 3"),
    ]
    .map(|arguments| lab.spawn(web, &client_with(cart.at(PORT), &arguments)?));

    // 1 and 2: the new root is made, and handed out beside the old one.
    let authority = make_authority(&lab, &mesh)?;
    restart_control(&lab, &mut mesh, || {
        authority.copy("new/ca-cert.pem", "roots.pem")
    })?;
    renewed(&lab, &mesh)?;
    let _relic = Relic::start(&lab, &mut mesh, &authority)?;
    // 3: the agents' file is that of the control plane here. 4: the new root signs.
    restart_control(&lab, &mut mesh, || {
        authority.copy("ca-cert.pem", "roots.pem")?;
        for name in ["ca-cert.pem", "ca-key.pem"] {
            authority.copy(&format!("new/{name}"), name)?;
        }
        let private = fs::Permissions::from_mode(0o600);
        Ok(fs::set_permissions(authority.at("ca-key.pem"), private)?)
    })?;
    renewed(&lab, &mesh)?;
    // The overlap: peers with certificates of the old root are believed, both ways.
    for (from, to) in [(web, relic), (relic, web)] {
        wait_for_service(&lab, from, to.at(PORT), LIMIT)?;
        require_service(&lab, from, to.at(PORT)).context("old and new believe each other")?;
    }
    // 5: the old root goes.
    restart_control(&lab, &mut mesh, || {
        Ok(fs::remove_file(authority.at("roots.pem"))?)
    })?;
    renewed(&lab, &mesh)?;
    for (from, to) in [(web, relic), (relic, web)] {
        // A tunnel of before may serve until its client is judged again.
        wait::until("the old root to be refused", LIMIT, || {
            Ok((!reaches(&lab, from, to.at(PORT))?).then_some(()))
        })?;
        for _ in 0..5 {
            ensure!(
                !reaches(&lab, from, to.at(PORT))?,
                "{} reached {} with a certificate of the old root",
                from.spec.name,
                to.spec.name
            );
        }
    }
    if let Ok(new) = &mut new {
        new.check_running().context("the load ended too early")?;
    }
    for load in [open, new] {
        let report = report(load?)?;
        ensure!(
            report.lost() == 0 && report.complete >= OPEN,
            "the change must not be noticed: {report:?}\n{}",
            mesh.log_of(lab.node("n1")?)
        );
    }
    let rotations = rotations(&lab, &mesh)? - before;
    println!("{rotations} certificates replaced");
    ensure!(rotations >= ROTATIONS, "only {rotations} rotations");
    require_service(&lab, web, cart.at(PORT))?;
    capture.finish(&[MARKER])?.require_tls_only()
}
