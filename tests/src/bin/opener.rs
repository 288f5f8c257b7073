//! Opens sockets in a pod and passes them to the test; see `mesh_tests::sockets`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Connects and listens on behalf of a test.
#[derive(Debug, Parser)]
struct Options {
    /// Unix socket for the orders
    path: PathBuf,
}

fn main() -> Result<()> {
    mesh_tests::sockets::serve_orders(&Options::parse().path)
}
