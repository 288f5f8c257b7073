//! `cargo xtask crds`: the chart's CustomResourceDefinitions from the Rust types.

use anyhow::Result;

use crate::shell::{cargo, root, run as execute};

/// Write the chart's CustomResourceDefinitions from the types in mesh-api
///
/// A test of mesh-api fails while they differ.
#[derive(Debug, clap::Args)]
pub struct Options {}

/// Runs the command.
pub fn run(_: &Options) -> Result<()> {
    let folder = root().join("charts/weft/files/crds");
    execute(
        cargo()
            .args([
                "run",
                "--quiet",
                "-p",
                "mesh-api",
                "--example",
                "crds",
                "--",
            ])
            .arg(folder),
    )
}
