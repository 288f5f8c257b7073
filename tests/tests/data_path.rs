//! The data path as its users see it: unmodified programs on two nodes, mutual TLS between them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, PodSpec},
    mesh::{Mesh, MeshSpec},
    process::Program,
    programs,
};

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;

/// Two nodes, `web` on the first, `cart` on the second.
fn lab(families: Families) -> Result<Lab> {
    let spec = LabSpec::new(families)
        .node("n1", [PodSpec::new("web")])
        .node("n2", [PodSpec::new("cart")]);
    Lab::build(spec)
}

#[test]
fn an_unmodified_client_reaches_an_unmodified_server_through_mutual_tls() -> Result<()> {
    let lab = lab(Families::V4)?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let cart = lab.pod("cart")?;
    let server = Program::new(programs::own("seqecho")?).args([
        "server",
        "--listen",
        &cart.at(PORT).to_string(),
    ]);
    let _server = lab.serve(cart, &server, cart.at(PORT), LIMIT)?;
    let client = Program::new(programs::own("seqecho")?).args([
        "client",
        "--records",
        "100",
        "--to",
        &cart.at(PORT).to_string(),
    ]);
    let report = lab
        .run(lab.pod("web")?, &client, LIMIT)?
        .ok()
        .with_context(|| {
            format!(
                "{}\n{}",
                mesh.log_of(&lab.nodes()[0]),
                mesh.log_of(&lab.nodes()[1])
            )
        })?;
    println!("{report}");
    println!("{}", mesh.log_of(&lab.nodes()[0]));
    Ok(())
}
