//! What happens on the stage: each scene runs programs, counts, and notes what must hold.

use std::{collections::BTreeMap, fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    capture::{LinkCapture, Verdict},
    http,
    load::http::Report as LoadReport,
    mesh::{METRICS_PORT, Mesh},
    process::Program,
    programs, wait,
};
use serde_json::Value;

use super::{
    report::{Edge, MetricsPlace, Report},
    world::{self, BULK_PORT, CACHE_PORT, WEB_PORT, World},
};

/// How long a client program may take.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// How long metrics may lag behind what happened; kernel flows are read in intervals.
const METRICS_LIMIT: Duration = Duration::from_secs(15);

/// A text that the clients send and that must not be seen on the link.
const MARKER: &str = "weft-demo-secret-8d1f";

/// User agent of the identity without permission.
const INTRUDER: &str = "weft-demo-intruder";

/// Requests of each kind by curl, every one on a connection of its own.
const CURL_REQUESTS: u64 = 20;

/// Commands that redis-cli sends on one connection.
const REDIS_COMMANDS: u64 = 100;

/// What iperf3 sends: enough to see a rate, little enough to judge every byte of it in a moment.
const BULK_BYTES: &str = "64M";

/// Requests of the failover scene, before and after an endpoint dies.
const FAILOVER_REQUESTS: u64 = 30;

/// Connections that the identity without permission tries, to each target.
const DENIED_ATTEMPTS: u64 = 5;

/// Seconds of each latency measurement.
const LATENCY_SECONDS: &str = "1.5";

/// curl's answers: bodies, one a line, and how many requests failed.
struct Answers {
    bodies: Vec<String>,
    failures: u64,
}

/// Before the mesh: latency, and the proof that the capture sees plaintext.
pub fn direct(world: &World, report: &mut Report) -> Result<()> {
    let web = world.lab.pod("web-2")?.at(WEB_PORT);
    let load = http_load(world, web)?;
    (report.p50_us_direct, report.p99_us_direct) = (load.p50_us, load.p99_us);
    let capture = LinkCapture::start(&world.lab)?;
    curl(world, "client", web, 1, MARKER)?;
    let verdict = capture.finish(&[MARKER])?;
    report.plaintext_bytes_without_mesh = verdict.plaintext_bytes;
    let sees = verdict.plaintext_bytes > 0 && verdict.markers.values().all(|count| *count > 0);
    report.check(
        "without the mesh the capture sees plaintext",
        sees,
        verdict.to_string(),
    );
    Ok(())
}

/// curl within the node, across the nodes, and through the service, IPv4 and IPv6.
pub fn web(world: &World, report: &mut Report) -> Result<()> {
    let across = world.lab.pod("web-2")?;
    let within = world.lab.pod("web-1")?;
    let targets = [
        ("across nodes", across.at(WEB_PORT)),
        (
            "across nodes, IPv6",
            SocketAddr::new(across.addresses[1], WEB_PORT),
        ),
        ("within a node", within.at(WEB_PORT)),
        ("a service", world::web_service()),
        ("a service, IPv6", world::web_service_v6()),
    ];
    let client = &world.lab.pod("client")?.addresses;
    for (what, target) in targets {
        let answers = curl(world, "client", target, CURL_REQUESTS, MARKER)?;
        report.requests += CURL_REQUESTS;
        report.failures += answers.failures;
        let is_kept = answers.bodies.iter().all(|body| {
            body.rsplit(' ')
                .next()
                .is_some_and(|seen| client.iter().any(|own| own.to_string() == seen))
        });
        let held = answers.failures == 0 && answers.bodies.len() as u64 == CURL_REQUESTS && is_kept;
        let servers = servers_of(&answers);
        let seen = format!(
            "{} of {CURL_REQUESTS} by {servers}; client address kept: {is_kept}",
            answers.bodies.len()
        );
        report.check(&format!("curl {what} ({target})"), held, seen);
    }
    Ok(())
}

/// redis-cli through its service.
pub fn cache(world: &World, report: &mut Report) -> Result<()> {
    let commands = world.folder("client")?.join("commands.redis");
    let lines: String = (0..REDIS_COMMANDS)
        .map(|number| format!("SET key:{number} {MARKER}-{number}\n"))
        .collect();
    fs::write(&commands, lines).context("cannot write redis commands")?;
    let redis = redis_cli()?.stdin(&commands);
    let finished = world
        .lab
        .run(world.lab.pod("client")?, &redis, CLIENT_LIMIT)?;
    let done = finished.stdout.lines().filter(|line| *line == "OK").count() as u64;
    report.requests += REDIS_COMMANDS;
    report.failures += REDIS_COMMANDS - done.min(REDIS_COMMANDS);
    let read = world.lab.run(
        world.lab.pod("client")?,
        &redis_cli()?.args(["GET", "key:7"]),
        CLIENT_LIMIT,
    )?;
    let is_right = read.stdout.trim() == format!("{MARKER}-7");
    report.requests += 1;
    report.failures += u64::from(!is_right);
    let seen = format!(
        "{done} of {REDIS_COMMANDS} commands, read back {}",
        if is_right { "right" } else { "WRONG" }
    );
    report.check(
        "redis-cli to redis across nodes",
        done == REDIS_COMMANDS && is_right,
        seen,
    );
    Ok(())
}

/// iperf3 across the nodes.
pub fn bulk(world: &World, report: &mut Report) -> Result<()> {
    let server = world.lab.pod("bulk")?.address().to_string();
    let iperf3 = Program::new(world::installed("iperf3")?).args([
        "-J",
        "-c",
        &server,
        "-p",
        &BULK_PORT.to_string(),
        "-n",
        BULK_BYTES,
    ]);
    let finished = world
        .lab
        .run(world.lab.pod("client")?, &iperf3, CLIENT_LIMIT)?;
    let result: Value = serde_json::from_str(&finished.stdout).unwrap_or_default();
    let rate = result["end"]["sum_received"]["bits_per_second"].as_f64();
    report.requests += 1;
    report.failures += u64::from(rate.is_none());
    report.bulk_gbit_per_s = rate.unwrap_or(0.0) / 1e9;
    let seen = match rate {
        Some(rate) => format!("{:.2} Gbit/s", rate / 1e9),
        None => format!(
            "{} {}",
            result["error"].as_str().unwrap_or("no result"),
            finished.stderr.trim()
        ),
    };
    report.check("iperf3 across nodes", rate.is_some(), seen);
    Ok(())
}

/// The identity without permission is refused: no answer, and no request arrives at a server.
pub fn denied(world: &World, report: &mut Report) -> Result<()> {
    let targets = [
        world::web_service(),
        world.lab.pod("web-1")?.at(WEB_PORT),
        world.lab.pod("web-2")?.at(WEB_PORT),
    ];
    for target in targets {
        report.denied_attempts += DENIED_ATTEMPTS;
        report.denied += curl(world, "intruder", target, DENIED_ATTEMPTS, INTRUDER)?.failures;
    }
    let ping = world.lab.run(
        world.lab.pod("intruder")?,
        &redis_cli()?.arg("PING"),
        CLIENT_LIMIT,
    )?;
    report.denied_attempts += 1;
    report.denied += u64::from(!ping.stdout.contains("PONG"));
    let seen = format!("{} of {}", report.denied, report.denied_attempts);
    report.check(
        "an identity without permission is refused",
        report.denied == report.denied_attempts,
        seen,
    );
    let mut arrived = 0;
    for pod in ["web-1", "web-2"] {
        arrived += world
            .nginx_log(pod)?
            .lines()
            .filter(|line| line.contains(INTRUDER))
            .count();
    }
    report.check(
        "nothing of it arrives at a server",
        arrived == 0,
        format!("{arrived} requests in nginx' logs"),
    );
    Ok(())
}

/// The endpoint that the balancing prefers is killed between requests; the client notices nothing. It is started again
/// at the end.
pub fn failover(world: &mut World, report: &mut Report) -> Result<()> {
    let before = curl(
        world,
        "client",
        world::web_service(),
        FAILOVER_REQUESTS,
        MARKER,
    )?;
    let share = |name: &str| {
        before
            .bodies
            .iter()
            .filter(|body| body.starts_with(name))
            .count()
    };
    let preferred = (0..world.web.len()).max_by_key(|position| share(&world.web[*position].0));
    let (name, nginx) = world
        .web
        .remove(preferred.context("the service has endpoints")?);
    let served = share(&name);
    nginx.kill()?;
    let after = curl(
        world,
        "client",
        world::web_service(),
        FAILOVER_REQUESTS,
        MARKER,
    )?;
    report.failover_requests = 2 * FAILOVER_REQUESTS;
    report.failover_failures = before.failures + after.failures;
    report.requests += report.failover_requests;
    report.failures += report.failover_failures;
    let is_gone = !after.bodies.iter().any(|body| body.starts_with(&name));
    let seen = format!(
        "{} of {} failed; {name} answered {served}, was killed, then {} answered",
        report.failover_failures,
        report.failover_requests,
        servers_of(&after)
    );
    let held = report.failover_failures == 0 && served > 0 && is_gone;
    report.check("a service outlives one of its endpoints", held, seen);
    let nginx = world.start_nginx(&name)?;
    world.web.push((name, nginx));
    Ok(())
}

/// The verdict over everything that crossed the link since the capture began.
pub fn wire(capture: LinkCapture, report: &mut Report) -> Result<()> {
    let verdict: Verdict = capture.finish(&[MARKER, INTRUDER])?;
    (report.plaintext_bytes, report.tls_bytes) = (verdict.plaintext_bytes, verdict.tls_bytes);
    let held = verdict.require_tls_only().is_ok();
    report.check(
        "between the nodes there is only TLS",
        held,
        verdict.to_string(),
    );
    Ok(())
}

/// Latency with the mesh, as it was measured without.
pub fn latency(world: &World, report: &mut Report) -> Result<()> {
    let load = http_load(world, world.lab.pod("web-2")?.at(WEB_PORT))?;
    (report.p50_us_mesh, report.p99_us_mesh) = (load.p50_us, load.p99_us);
    report.requests += load.requests_total;
    report.failures += load.errors;
    let seen = format!(
        "p50 {:.0} µs, without the mesh {:.0} µs",
        load.p50_us, report.p50_us_direct
    );
    report.check(
        "a kept HTTP connection through the mesh",
        load.errors == 0 && load.requests > 0,
        seen,
    );
    Ok(())
}

/// Who talked to whom, read from the agents' metrics.
pub fn identities(world: &World, mesh: &Mesh, report: &mut Report) -> Result<()> {
    let expected = [
        ("client", "web-1"),
        ("client", "web-2"),
        ("client", "cache"),
        ("client", "bulk"),
    ];
    let outcome = wait::until("all edges in the agents' metrics", METRICS_LIMIT, || {
        report.identities = edges(world, mesh)?;
        let missing = expected
            .iter()
            .find(|(client, server)| !has_edge(world, &report.identities, client, server));
        Ok(missing.is_none().then_some(()))
    });
    let mut seen = format!("{} edges", report.identities.len());
    if let Err(error) = &outcome {
        seen = format!("{seen}: {error:#}");
    }
    report.check("the agents know who talked to whom", outcome.is_ok(), seen);
    for node in world.lab.nodes() {
        let address = SocketAddr::new(node.address(), METRICS_PORT);
        let response = http::get(&node.netns, address, "/metrics", CLIENT_LIMIT)?;
        if response.status != 200 {
            bail!(
                "the metrics of {} answer with status {}",
                node.name,
                response.status
            );
        }
        let (netns, url) = (
            node.netns.display().to_string(),
            format!("http://{address}/metrics"),
        );
        report.metrics.push(MetricsPlace {
            node: node.name.clone(),
            netns,
            url,
        });
    }
    Ok(())
}

/// Edges as the server's node saw them: the client's identity is then one that was proved, not one that was claimed.
/// Connections that the kernel carried within a node are counted where they began; their identity is the namespace's.
fn edges(world: &World, mesh: &Mesh) -> Result<Vec<Edge>> {
    let mut edges = BTreeMap::new();
    for node in world.lab.nodes() {
        let metrics = mesh.metrics(node)?;
        let inbound =
            metrics.matching("weft_connections_opened_total", &[("direction", "inbound")]);
        let kernel = metrics.matching(
            "weft_connections_opened_total",
            &[("direction", "outbound"), ("security", "kernel")],
        );
        for sample in inbound
            .chain(kernel)
            .filter(|sample| sample.label("source_identity").starts_with("spiffe://"))
        {
            let edge = Edge {
                source: sample.label("source_identity").to_owned(),
                destination: sample.label("destination_identity").to_owned(),
                workload: sample.label("destination_workload").to_owned(),
                security: sample.label("security").to_owned(),
                node: node.name.clone(),
                connections: 0,
            };
            *edges.entry(edge).or_insert(0) += sample.value as u64;
        }
    }
    let counted = edges
        .into_iter()
        .filter(|(_, connections)| *connections > 0);
    Ok(counted
        .map(|(edge, connections)| Edge {
            connections,
            ..edge
        })
        .collect())
}

fn has_edge(world: &World, edges: &[Edge], client: &str, server: &str) -> bool {
    let identity = |pod: &str| {
        let spec = &world.lab.pod(pod).ok()?.spec;
        Some(format!(
            "/ns/{}/sa/{}",
            spec.namespace, spec.service_account
        ))
    };
    let (Some(source), Some(destination)) = (identity(client), identity(server)) else {
        return false;
    };
    edges.iter().any(|edge| {
        edge.source.ends_with(&source)
            && edge.destination.ends_with(&destination)
            && edge.workload == server
            && matches!(edge.security.as_str(), "mutual_tls" | "kernel")
    })
}

/// Runs curl once for several requests, each on a connection of its own. `agent` travels as the user agent.
fn curl(
    world: &World,
    pod: &str,
    target: SocketAddr,
    requests: u64,
    agent: &str,
) -> Result<Answers> {
    let curl = Program::new(world::installed("curl")?)
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "10",
            "--user-agent",
            agent,
            "--header",
            "Connection: close",
        ])
        .arg(format!("http://{target}/?request=[1-{requests}]"));
    let finished = world.lab.run(world.lab.pod(pod)?, &curl, CLIENT_LIMIT)?;
    let bodies: Vec<String> = finished
        .stdout
        .lines()
        .filter(|line| line.contains(" answers "))
        .map(ToOwned::to_owned)
        .collect();
    Ok(Answers {
        failures: requests.saturating_sub(bodies.len() as u64),
        bodies,
    })
}

fn servers_of(answers: &Answers) -> String {
    let mut servers: Vec<&str> = answers
        .bodies
        .iter()
        .filter_map(|body| body.split(' ').next())
        .collect();
    servers.sort_unstable();
    servers.dedup();
    if servers.is_empty() {
        "nobody".to_owned()
    } else {
        servers.join(" and ")
    }
}

fn redis_cli() -> Result<Program> {
    let host = world::cache_service().ip().to_string();
    Ok(Program::new(world::installed("redis-cli")?).args([
        "-h",
        &host,
        "-p",
        &CACHE_PORT.to_string(),
    ]))
}

/// One kept connection, as fast as answers come.
fn http_load(world: &World, target: SocketAddr) -> Result<LoadReport> {
    let load = Program::new(programs::own("benchtool")?).args([
        "http-load",
        &target.to_string(),
        "--seconds",
        LATENCY_SECONDS,
        "--warm-up",
        "0.3",
    ]);
    let finished = world
        .lab
        .run(world.lab.pod("client")?, &load, CLIENT_LIMIT)?;
    serde_json::from_str(&finished.ok()?).context("the load generator printed no report")
}
