//! How each figure is taken.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    lab::Node,
    load::{bulk, connect, http},
    wait,
};
use nix::sys::signal::Signal;

use super::{
    Mesh,
    figures::{self, DIRECT, WEFT},
    neighbour,
    scene::{self, BULK, CLIENT, CROWD, ECHO, FAR, HTTP, LOCAL, NEAR, OUTSIDER, SERVER, Scene},
};

/// Unmeasured load before each measurement: tunnels are made, verdicts cached, processors awake.
const WARM_UP_SECONDS: &str = "0.3";

/// Idle connections held for the memory of one, and how many more then.
const IDLE_CONNECTIONS: [u64; 2] = [1000, 9000];

/// Peace before an idle process is weighed.
const SETTLE: Duration = Duration::from_secs(1);

/// How long proxies are left alone before they count as idle: some let go of what starting needed after a few seconds.
pub const IDLE_AFTER: Duration = Duration::from_secs(5);

/// How long the processor time of an idle proxy is looked at: several periods of whatever it does now and then.
const IDLE_WINDOW: Duration = Duration::from_secs(28);

/// How long the idle connections may take to be opened.
const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// Share of requests or connections that may fail before a measurement is refused: none.
const ERRORS_ALLOWED: u64 = 0;

/// What is common to all measurements.
#[derive(Debug)]
pub struct Settings {
    /// Length of one.
    pub duration: Duration,
}

impl Settings {
    /// As an option of the load tool.
    pub fn seconds(&self) -> (&'static str, String) {
        ("--seconds", self.duration.as_secs_f64().to_string())
    }
}

/// One taken value.
#[derive(Debug)]
pub struct Value {
    /// Name of the figure.
    pub figure: &'static str,
    /// Of another variant than the one that is up.
    pub variant: Option<&'static str>,
    /// In the figure's unit.
    pub value: f64,
}

/// A value of the variant that is up.
pub fn value(figure: &'static str, value: f64) -> Value {
    Value {
        figure,
        variant: None,
        value,
    }
}

/// On which scene a measurement is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Few pods.
    Few,
    /// 50 pods of the mesh on the far node.
    Crowd,
}

type Take = fn(&Scene, &mut Mesh, &Settings) -> Result<Vec<Value>>;

/// A run that gives one or several figures.
pub struct Measurement {
    /// For progress.
    pub title: &'static str,
    /// Where it is taken.
    pub stage: Stage,
    /// The figures that it gives.
    pub figures: &'static [&'static str],
    /// Takes them.
    pub take: Take,
}

/// All, in their order: memory while the proxies are fresh, disturbances last.
pub static MEASUREMENTS: [Measurement; 15] = [
    Measurement {
        title: "cold start",
        stage: Stage::Few,
        figures: &["cold-start-ms"],
        take: cold_start,
    },
    Measurement {
        title: "idle memory",
        stage: Stage::Few,
        figures: &["rss-idle-mb"],
        take: idle_memory,
    },
    Measurement {
        title: "memory of idle connections",
        stage: Stage::Few,
        figures: &[
            "rss-per-idle-conn-kb",
            "rss-1k-conns-mb",
            "rss-per-idle-conn-10k-kb",
            "rss-10k-conns-mb",
        ],
        take: connection_memory,
    },
    Measurement {
        title: "bulk, 1 stream",
        stage: Stage::Few,
        figures: &["bulk-1", "cpu-s-per-gb"],
        take: bulk_1,
    },
    Measurement {
        title: "bulk, 8 streams",
        stage: Stage::Few,
        figures: &["bulk-8"],
        take: bulk_8,
    },
    Measurement {
        title: "HTTP, 1 connection",
        stage: Stage::Few,
        figures: &["http-rps-1", "http-p50-1", "http-p99-1", figures::ADDED.0],
        take: http_1,
    },
    Measurement {
        title: "HTTP, 32 connections",
        stage: Stage::Few,
        figures: &[
            "http-rps-32",
            "http-p50-32",
            "http-p99-32",
            "cpu-s-per-10k-req",
        ],
        take: http_32,
    },
    Measurement {
        title: "HTTP, 2,000 requests/s",
        stage: Stage::Few,
        figures: &["rate2000-p50", "rate2000-p99", "rate2000-p999"],
        take: rate_2000,
    },
    Measurement {
        title: "new connections",
        stage: Stage::Few,
        figures: &["connect-rate"],
        take: connect_rate,
    },
    Measurement {
        title: "a noisy neighbour",
        stage: Stage::Few,
        figures: &["neighbour-p99-quiet", "neighbour-p99-storm"],
        take: neighbour::take,
    },
    Measurement {
        title: "same node",
        stage: Stage::Few,
        figures: &["same-node-bulk-1", "same-node-http-rps-32"],
        take: same_node,
    },
    Measurement {
        title: "un-enrolled connect",
        stage: Stage::Few,
        figures: &["unenrolled-connect-us"],
        take: unenrolled_connect,
    },
    Measurement {
        title: "enrolment",
        stage: Stage::Few,
        figures: &["enrol-ms"],
        take: enrol,
    },
    Measurement {
        title: "50 workloads on a node",
        stage: Stage::Crowd,
        figures: &["rss-per-workload-kb", "cpu-idle-50-percent"],
        take: crowd,
    },
    Measurement {
        title: "new connections to many",
        stage: Stage::Crowd,
        figures: &["connect-rate-many"],
        take: connect_rate_many,
    },
];

fn bulk_1(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (report, cpu) = bulk_to(scene, SERVER, 1, settings)?;
    Ok(vec![
        value("bulk-1", report.gbit_per_second),
        value("cpu-s-per-gb", cpu / (report.bytes as f64 / 1e9)),
    ])
}

fn bulk_8(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (report, _) = bulk_to(scene, SERVER, 8, settings)?;
    Ok(vec![value("bulk-8", report.gbit_per_second)])
}

/// The report and the processor seconds of everything meanwhile.
fn bulk_to(
    scene: &Scene,
    pod: &str,
    streams: u32,
    settings: &Settings,
) -> Result<(bulk::Report, f64)> {
    let address = scene.at(pod, BULK)?;
    let run = |seconds: (&'static str, String), duration| {
        let client = scene.client(
            "bulk-client",
            address,
            &[("--streams", streams.to_string()), seconds],
        );
        scene.report::<bulk::Report>(CLIENT, &client, duration)
    };
    run(("--seconds", WARM_UP_SECONDS.to_owned()), Duration::ZERO)?;
    let before = scene.cpu_seconds()?;
    let report = run(settings.seconds(), settings.duration)?;
    Ok((report, scene.cpu_seconds()? - before))
}

fn http_1(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (report, _) = http_to(scene, SERVER, 1, None, settings)?;
    Ok(vec![
        value("http-rps-1", report.rps),
        value("http-p50-1", report.p50_us),
        value("http-p99-1", report.p99_us),
    ])
}

fn http_32(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (report, cpu) = http_to(scene, SERVER, 32, None, settings)?;
    Ok(vec![
        value("http-rps-32", report.rps),
        value("http-p50-32", report.p50_us),
        value("http-p99-32", report.p99_us),
        value(
            "cpu-s-per-10k-req",
            cpu / (report.requests_total as f64 / 1e4),
        ),
    ])
}

fn rate_2000(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (report, _) = http_to(scene, SERVER, 32, Some(2000), settings)?;
    Ok(vec![
        value("rate2000-p50", report.p50_us),
        value("rate2000-p99", report.p99_us),
        value("rate2000-p999", report.p999_us),
    ])
}

/// The report and the processor seconds of everything meanwhile, the tool's own warm-up included (as it is in
/// `requests_total`).
fn http_to(
    scene: &Scene,
    pod: &str,
    connections: u32,
    rate: Option<u32>,
    settings: &Settings,
) -> Result<(http::Report, f64)> {
    let address = scene.at(pod, HTTP)?;
    let mut options = vec![
        ("--connections", connections.to_string()),
        ("--warm-up", WARM_UP_SECONDS.to_owned()),
    ];
    options.extend(rate.map(|rate| ("--rate", rate.to_string())));
    // On connections of its own, so that the measured ones find everything in place.
    let ping = scene.client(
        "connect-load",
        scene.at(pod, ECHO)?,
        &[("--seconds", "0.1".to_owned())],
    );
    scene.report::<connect::RateReport>(CLIENT, &ping, Duration::ZERO)?;
    let first = scene.client("http-load", address, &[("--seconds", "0.1".to_owned())]);
    scene.report::<http::Report>(CLIENT, &first, Duration::ZERO)?;
    options.push(settings.seconds());
    let before = scene.cpu_seconds()?;
    let report: http::Report = scene.report(
        CLIENT,
        &scene.client("http-load", address, &options),
        settings.duration,
    )?;
    let cpu = scene.cpu_seconds()? - before;
    no_errors(report.errors, "requests")?;
    Ok((report, cpu))
}

fn connect_rate(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let rate = connect_rate_to(scene, &[scene.at(SERVER, ECHO)?], settings)?;
    Ok(vec![value("connect-rate", rate)])
}

fn connect_rate_many(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let pods = scene.lab.node(FAR)?.pods.iter();
    let addresses: Vec<SocketAddr> = pods.map(|pod| pod.at(ECHO)).collect();
    let rate = connect_rate_to(scene, &addresses, settings)?;
    Ok(vec![value("connect-rate-many", rate)])
}

/// Connections per second to the addresses in turn.
fn connect_rate_to(scene: &Scene, addresses: &[SocketAddr], settings: &Settings) -> Result<f64> {
    let run = |seconds: (&'static str, String), duration| {
        let client = scene.client_of("connect-load", addresses, &[seconds]);
        scene.report::<connect::RateReport>(CLIENT, &client, duration)
    };
    run(("--seconds", WARM_UP_SECONDS.to_owned()), Duration::ZERO)?;
    let report = run(settings.seconds(), settings.duration)?;
    no_errors(report.errors, "connections")?;
    Ok(report.per_second)
}

fn same_node(scene: &Scene, _: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    let (bulk, _) = bulk_to(scene, LOCAL, 1, settings)?;
    let (http, _) = http_to(scene, LOCAL, 32, None, settings)?;
    Ok(vec![
        value("same-node-bulk-1", bulk.gbit_per_second),
        value("same-node-http-rps-32", http.rps),
    ])
}

fn idle_memory(_: &Scene, mesh: &mut Mesh, _: &Settings) -> Result<Vec<Value>> {
    let proxies = mesh.proxies()?;
    if proxies.is_empty() {
        return Ok(Vec::new());
    }
    wait::pace_until(Instant::now() + IDLE_AFTER);
    let largest = scene::resident_bytes(&proxies)?
        .into_iter()
        .max()
        .unwrap_or(0);
    Ok(vec![value("rss-idle-mb", largest as f64 / 1e6)])
}

fn connection_memory(scene: &Scene, mesh: &mut Mesh, _: &Settings) -> Result<Vec<Value>> {
    let proxies = mesh.proxies()?;
    if proxies.is_empty() {
        return Ok(Vec::new());
    }
    let address = scene.at(SERVER, ECHO)?;
    // What the first connection brings about is not what one more costs.
    let first = scene.client(
        "connect-load",
        address,
        &[("--seconds", WARM_UP_SECONDS.to_owned())],
    );
    scene.report::<connect::RateReport>(CLIENT, &first, Duration::ZERO)?;
    wait::pace_until(Instant::now() + SETTLE);
    let before: u64 = scene::resident_bytes(&proxies)?.into_iter().sum();
    let figures = [
        ("rss-per-idle-conn-kb", "rss-1k-conns-mb"),
        ("rss-per-idle-conn-10k-kb", "rss-10k-conns-mb"),
    ];
    let (mut held, mut holders, mut values) = (0, Vec::new(), Vec::new());
    for (more, (each, all)) in IDLE_CONNECTIONS.into_iter().zip(figures) {
        let options = [("--connections", more.to_string())];
        let holder = scene.client("idle-hold", address, &options);
        let mut holder = scene.lab.spawn(scene.pod(CLIENT)?, &holder)?;
        holder.wait_for_output("held", OPEN_LIMIT)?;
        holders.push(holder);
        held += more;
        wait::pace_until(Instant::now() + SETTLE);
        let resident = scene::resident_bytes(&proxies)?;
        let grown = resident.iter().sum::<u64>().saturating_sub(before);
        values.push(value(each, grown as f64 / held as f64 / 1e3));
        let largest = resident.into_iter().max().unwrap_or(0);
        values.push(value(all, largest as f64 / 1e6));
    }
    for holder in holders {
        holder.stop(Signal::SIGKILL, OPEN_LIMIT)?;
    }
    Ok(values)
}

/// What workloads cost a node that does nothing else: memory and processor time of the far node's agent.
fn crowd(scene: &Scene, mesh: &mut Mesh, _: &Settings) -> Result<Vec<Value>> {
    let Mesh::Weft(weft) = mesh else {
        return Ok(Vec::new());
    };
    wait::pace_until(Instant::now() + IDLE_AFTER);
    let (before, after) = (weft.far_before_crowd(), weft.far_resident()?);
    let grown = after.saturating_sub(before) as f64;
    let node = scene.lab.node(FAR)?;
    Ok(vec![
        value("rss-per-workload-kb", grown / (CROWD - 1) as f64 / 1e3),
        value("cpu-idle-50-percent", idle_percent(node)?),
    ])
}

/// Processor time that a node's agent needs while nothing happens, in percent of one core.
pub fn idle_percent(node: &Node) -> Result<f64> {
    let before = scene::agent_cpu_seconds(node)?;
    let began = Instant::now();
    wait::pace_until(began + IDLE_WINDOW);
    let used = scene::agent_cpu_seconds(node)? - before;
    Ok(used / began.elapsed().as_secs_f64() * 100.0)
}

/// With Weft one process alternates between a cgroup that the agent's programs are attached to and one that they are
/// not, so the figure is taken for `direct` too: the two differ by less than two runs of anything would.
fn unenrolled_connect(scene: &Scene, mesh: &mut Mesh, settings: &Settings) -> Result<Vec<Value>> {
    const FIGURE: &str = "unenrolled-connect-us";
    let pod = scene.pod(OUTSIDER)?;
    let mut cgroups: Vec<PathBuf> = vec![pod.cgroup.clone()];
    if matches!(mesh, Mesh::Weft(_)) {
        let outside = scene.cgroup()?.join("outside");
        std::fs::create_dir_all(&outside)
            .with_context(|| format!("cannot make {}", outside.display()))?;
        if outside.starts_with(&scene.lab.node(NEAR)?.cgroup_root) {
            bail!("{} is not outside of the agent's cgroup", outside.display());
        }
        cgroups.push(outside);
    } else if matches!(mesh, Mesh::Direct) {
        // Taken beside Weft, and not mixed with a value from another time.
        return Ok(Vec::new());
    }
    let mut options = vec![settings.seconds()];
    options.extend(
        cgroups
            .iter()
            .map(|cgroup| ("--cgroup", cgroup.display().to_string())),
    );
    let client = scene.client("connect-us", pod.at(ECHO), &options);
    let reports: Vec<connect::CostReport> = scene.report(OUTSIDER, &client, settings.duration)?;
    let variants = match reports.len() {
        2 => vec![Some(WEFT), Some(DIRECT)],
        _ => vec![None],
    };
    Ok(variants
        .into_iter()
        .zip(reports)
        .map(|(variant, report)| Value {
            figure: FIGURE,
            variant,
            value: report.median_us,
        })
        .collect())
}

fn cold_start(_: &Scene, mesh: &mut Mesh, _: &Settings) -> Result<Vec<Value>> {
    let Mesh::Weft(weft) = mesh else {
        return Ok(Vec::new());
    };
    Ok(vec![value(
        "cold-start-ms",
        weft.cold_start().as_secs_f64() * 1e3,
    )])
}

fn enrol(scene: &Scene, mesh: &mut Mesh, _: &Settings) -> Result<Vec<Value>> {
    let Mesh::Weft(weft) = mesh else {
        return Ok(Vec::new());
    };
    Ok(vec![value(
        "enrol-ms",
        weft.enrol(scene)?.as_secs_f64() * 1e3,
    )])
}

fn no_errors(errors: u64, what: &str) -> Result<()> {
    if errors > ERRORS_ALLOWED {
        bail!("{errors} {what} failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_taken_by_exactly_one_measurement() {
        let taken: Vec<&str> = MEASUREMENTS
            .iter()
            .flat_map(|measurement| measurement.figures)
            .copied()
            .collect();
        let default = figures::default_selection();
        for figure in &default {
            let times = taken.iter().filter(|name| **name == figure.name).count();
            assert_eq!(times, 1, "{}", figure.name);
        }
        assert_eq!(
            taken.len(),
            default.len(),
            "no measurement gives an unknown figure"
        );
    }
}
