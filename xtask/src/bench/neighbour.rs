//! What a noisy pod does to its neighbour: the same modest load alone, and beside a storm from another pod of the node.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::load::{connect, http};

use super::{
    Mesh,
    measure::{Settings, Value, value},
    scene::{BULK, CLIENT, ECHO, HTTP, LOCAL, QUIET, SERVER, Scene},
};

/// Streams of the noisy pod that send as fast as they can, beside its new connections.
const STORM_STREAMS: u32 = 64;
/// Requests a second of the neighbour, over [`CONNECTIONS`].
const RATE: u32 = 500;
const CONNECTIONS: u32 = 4;
/// How much longer the storm lasts than what is measured in it.
const STORM_SLACK: Duration = Duration::from_secs(2);

/// Takes both figures.
pub fn take(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let quiet = neighbour(scene, settings)?;
    let address = scene.at(SERVER, BULK)?;
    let seconds = || {
        let storm = settings.duration + STORM_SLACK;
        ("--seconds", storm.as_secs_f64().to_string())
    };
    let streams = ("--streams", STORM_STREAMS.to_string());
    let bulk = scene.client("bulk-client", address, &[streams, seconds()]);
    let connects = scene.client("connect-load", scene.at(SERVER, ECHO)?, &[seconds()]);
    let storm = [bulk, connects].map(|program| scene.lab.spawn(scene.pod(CLIENT)?, &program));
    let beside = neighbour(scene, settings);
    for program in storm {
        program?.wait(settings.duration + 10 * STORM_SLACK)?.ok()?;
    }
    Ok(vec![
        value("neighbour-p99-quiet", quiet),
        value("neighbour-p99-storm", beside?),
    ])
}

/// The neighbour's 99th percentile in microseconds.
fn neighbour(scene: &Scene, settings: &Settings) -> Result<f64> {
    let options = [
        ("--connections", CONNECTIONS.to_string()),
        ("--rate", RATE.to_string()),
        settings.seconds(),
    ];
    // Tunnels are there before anything is measured.
    let first = scene.client(
        "connect-load",
        scene.at(QUIET, ECHO)?,
        &[("--seconds", "0.1".into())],
    );
    scene.report::<connect::RateReport>(LOCAL, &first, Duration::ZERO)?;
    let load = scene.client("http-load", scene.at(QUIET, HTTP)?, &options);
    let report: http::Report = scene.report(LOCAL, &load, settings.duration)?;
    ensure!(report.errors == 0, "{} requests failed", report.errors);
    Ok(report.p99_us)
}
