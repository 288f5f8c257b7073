//! One mesh, one control plane, Weft on one node and Istio's ztunnel on the other (tests/peers/README.md). Where the
//! variable `ZTUNNEL` names no ztunnel program, the test is counted as skipped.

use std::{env, path::Path};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    capture::LinkCapture,
    conversation::{self, Server, client_with, reaches, talk},
    lab::{Families, Lab, LabSpec, PodSpec},
    manifests::{self, ServicePort},
    mesh::{Mesh, MeshSpec},
    peer::{Part, Peer},
    skip,
};
use serde_json::{Value, json};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/ztunnel");
const PORT: u16 = 7000;
/// Where nobody listens.
const CLOSED_PORT: u16 = 7999;
/// Port of the services.
const SERVICE_PORT: u16 = 80;
/// Services of `web`, on Weft's node, and of `cart`, on ztunnel's.
const WEB_SERVICE: [u8; 4] = [10, 96, 0, 1];
const CART_SERVICE: [u8; 4] = [10, 96, 0, 2];

/// What the clients do; each checks every byte and counts what is lost. No server resets: ztunnel turns an application's
/// RST into END_STREAM, so that its end of a tunnel cannot be told apart from a clean one.
const CONVERSATIONS: [&str; 5] = [
    "--connections 20 --records 100",
    "--mode answer --connections 4 --records 20000",
    "--mode answer-and-fin --connections 4 --records 20000",
    "--mode server-fin --connections 4 --records 10",
    "--close rst --connections 4 --records 10",
];

/// `web` and `evil` are Weft's, `cart` and `guest` ztunnel's; `evil` and `guest` may not reach the other node.
fn spec() -> MeshSpec {
    let deny = |at: &str, who: &str| {
        let spec = json!({
            "selector": { "matchLabels": { "app": at } },
            "action": "DENY",
            "rules": [{ "from": [{ "serviceAccounts": [format!("default/{who}")] }] }],
        });
        manifests::policy(
            "AuthorizationPolicy",
            "default",
            &format!("deny-at-{at}"),
            spec,
        )
    };
    let service = |name: &str, address: [u8; 4]| -> Value {
        let port = ServicePort {
            name: "tcp",
            port: SERVICE_PORT,
            target: PORT,
        };
        manifests::service("default", name, name, &[address.into()], &[port])
    };
    let strict = json!({ "mtls": { "mode": "STRICT" } });
    MeshSpec::default()
        .manifest("deny", [deny("cart", "evil"), deny("web", "guest")])
        .manifest(
            "services",
            [service("web", WEB_SERVICE), service("cart", CART_SERVICE)],
        )
        .manifest(
            "strict",
            [manifests::policy(
                "MeshPolicy",
                "weft-system",
                "default",
                strict,
            )],
        )
}

#[test]
fn a_ztunnel_under_our_control_plane_and_our_agent_serve_each_other() -> Result<()> {
    if env::var_os("ZTUNNEL").is_none() {
        return skip::note(
            "a_ztunnel_under_our_control_plane_and_our_agent_serve_each_other",
            "ZTUNNEL names no ztunnel program (tests/peers/README.md)",
        );
    }
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web"), PodSpec::new("evil")])
            .node("n2", [PodSpec::new("cart"), PodSpec::new("guest")]),
    )?;
    let (ours, theirs) = (lab.node("n1")?, lab.node("n2")?);
    let mut mesh = Mesh::prepare(&lab, spec())?;
    mesh.write_pods(&lab)?;
    mesh.start_control(&lab)?;
    mesh.start_agent(&lab, ours)?;
    mesh.wait_ready(&lab, ours)?;
    for pod in &ours.pods {
        mesh.enroll(&lab, ours, pod)?;
        mesh.wait_enrolled(&lab, ours, pod)?;
    }
    let peer = Peer::up(Path::new(SCRIPT), &lab, Part::Node(theirs, &mesh))?;
    let outcome = both_ways(&lab);
    let outcome = outcome.with_context(|| {
        let log = peer.folder().join("n2.log");
        let log = std::fs::read_to_string(log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(30).collect();
        format!(
            "{}\nztunnel, last line first:\n{}",
            mesh.log_of(ours),
            last.join("\n")
        )
    });
    mesh.check_running()?;
    peer.down(&lab)?;
    outcome
}

fn both_ways(lab: &Lab) -> Result<()> {
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    let servers = [
        Server::start(lab, web, PORT)?,
        Server::start(lab, cart, PORT)?,
    ];
    let capture = LinkCapture::start(lab)?;
    for (from, to, service) in [(web, cart, CART_SERVICE), (cart, web, WEB_SERVICE)] {
        for arguments in CONVERSATIONS {
            for to in [to.at(PORT), (service, SERVICE_PORT).into()] {
                let report = talk(lab, from, &client_with(to, arguments)?)?;
                ensure!(
                    report.lost() == 0 && report.complete > 0,
                    "{} to {to}, {arguments}: {report:?}",
                    from.spec.name
                );
            }
        }
    }
    capture.finish(&[])?.require_tls_only()?;
    let [web_server, cart_server] = &servers;
    for (server, from) in [(web_server, cart), (cart_server, web)] {
        // The application sees its client's own address through either mesh.
        let served = server.served()?;
        ensure!(
            !served.is_empty() && served.iter().all(|one| one.peer.ip() == from.address()),
            "not all from {}: {served:?}",
            from.address()
        );
    }
    refused(lab)
}

/// Policies hold on either end, and what is refused never looks served.
fn refused(lab: &Lab) -> Result<()> {
    let (web, cart) = (lab.pod("web")?, lab.pod("cart")?);
    ensure!(
        !reaches(lab, lab.pod("evil")?, cart.at(PORT))?,
        "ztunnel served whom policy denies"
    );
    ensure!(
        !reaches(lab, web, cart.at(CLOSED_PORT))?,
        "a closed port behind ztunnel was served"
    );
    // How ztunnel ends its client's connection is its own affair.
    for (from, to) in [("guest", web.at(PORT)), ("cart", web.at(CLOSED_PORT))] {
        let report = talk(lab, lab.pod(from)?, &conversation::client(to)?)?;
        ensure!(
            report.complete == 0 && report.records == 0,
            "{from} was served at {to}: {report:?}"
        );
    }
    Ok(())
}
