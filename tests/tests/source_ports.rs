//! The agent shows the client's address to the application, with a source port of its own. The client's real port
//! lives in the same namespace, on the socket that the agent accepted: the two must never meet, or the SYN of a new
//! connection would end up at a live one and reset it.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{LIMIT, Server, client, report, talk},
    lab::{Families, Lab, LabSpec, PodSpec},
    mesh::{Mesh, MeshSpec},
    netns, wait,
};

const PORT: u16 = 7000;
/// The kernel's choice of ports in the server's pod, so narrow that chance has no part in it.
const LOCAL_PORTS: &str = "40000 40031";
/// Source ports of live connections, all of them within that choice.
const CLIENT_PORTS: std::ops::Range<u16> = 40_000..40_024;
/// Connections that come on top.
const MORE: u64 = 24;

#[test]
fn a_new_connection_never_takes_the_port_of_a_live_one() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("plain").unmeshed()])
            .node("n2", [PodSpec::new("api")]),
    )?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (plain, api, node) = (lab.pod("plain")?, lab.pod("api")?, lab.node("n2")?);
    let server = Server::start(&lab, api, PORT)?;
    netns::sysctl(&api.netns, &[("ipv4/ip_local_port_range", LOCAL_PORTS)])?;
    let mut live = Vec::new();
    for port in CLIENT_PORTS {
        let program = client(server.address)?
            .args([
                "--seconds",
                "8",
                "--interval-ms",
                "50",
                "--stall-ms",
                "8000",
                "--bind",
            ])
            .args([
                plain.address().to_string(),
                "--source-port".into(),
                port.to_string(),
            ]);
        live.push((port, lab.spawn(plain, &program)?));
    }
    wait::until("the live connections", LIMIT, || {
        let open = mesh
            .metrics(node)?
            .sum("weft_connections_open", &[("direction", "inbound")]);
        Ok((open >= live.len() as f64).then_some(()))
    })
    .with_context(|| mesh.log_of(node))?;
    let more = talk(
        &lab,
        plain,
        &client(server.address)?.args(["--connections", &MORE.to_string()]),
    )?;
    ensure!(
        more.complete == MORE && more.lost() == 0,
        "new connections: {more:?}"
    );
    for (port, running) in live {
        let report = report(running)?;
        ensure!(
            report.complete == 1 && report.lost() == 0,
            "the one from port {port}: {report:?}"
        );
    }
    Ok(())
}
