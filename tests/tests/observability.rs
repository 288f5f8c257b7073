//! Dashboards and alerts of the chart name what agents serve, and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    chart,
    lab::{Families, LabSpec, PodSpec},
    mesh::MeshSpec,
    process::Program,
    programs,
    promql::{self, Names},
    skip, wait,
    world::{LIMIT, World},
};
use serde_json::Value;

const PORT: u16 = 7000;

/// Labels that Prometheus and the chart's PodMonitor add to every series.
const TARGET_LABELS: [&str; 5] = ["job", "instance", "namespace", "pod", "node"];

/// What Prometheus itself says of a target.
const OF_PROMETHEUS: &str = "up";

/// Where an expression stands, and the expression.
type Queries = Vec<(String, String)>;

/// Everything below `files/dashboards` and `files/rules`.
fn queries() -> Result<Queries> {
    let mut queries = Queries::new();
    for path in files("dashboards")? {
        let board: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let name = board["title"]
            .as_str()
            .context("a dashboard without title")?;
        for panel in board["panels"].as_array().context("no panels")? {
            for target in panel["targets"].as_array().context("no targets")? {
                let place = format!("{name}, {}", panel["title"]);
                queries.push((place, text(&target["expr"])?));
            }
        }
        for variable in board["templating"]["list"]
            .as_array()
            .context("no variables")?
        {
            if variable["type"] == "query" {
                let place = format!("{name}, variable {}", variable["name"]);
                queries.push((place, text(&variable["query"]["query"])?));
            }
        }
    }
    for path in files("rules")? {
        let rules: Value = serde_norway::from_str(&fs::read_to_string(&path)?)?;
        for group in rules["groups"].as_array().context("no groups")? {
            for rule in group["rules"].as_array().context("no rules")? {
                queries.push((format!("alert {}", rule["alert"]), text(&rule["expr"])?));
            }
        }
    }
    Ok(queries)
}

fn files(folder: &str) -> Result<Vec<PathBuf>> {
    let folder = chart::folder().join("files").join(folder);
    let entries = fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn text(value: &Value) -> Result<String> {
    Ok(value
        .as_str()
        .context("an expression is a text")?
        .to_owned())
}

/// Metrics with their labels, as docs/metrics.md has them; histograms under the names of their series.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let page = fs::read_to_string(chart::repository().join("docs/metrics.md"))?;
    let mut metrics = BTreeMap::new();
    let mut of_edges = BTreeSet::new();
    let mut header: Vec<&str> = Vec::new();
    for line in page.lines() {
        let Some(row) = line.strip_prefix('|') else {
            header.clear();
            continue;
        };
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        if header.is_empty() {
            header = cells;
        } else if header.first() == Some(&"label") {
            of_edges.extend(quoted(cells.first().copied().unwrap_or_default()));
        } else if header.first() == Some(&"metric") {
            let column = header.iter().position(|title| title.ends_with("labels"));
            let cell = column
                .and_then(|at| cells.get(at))
                .copied()
                .unwrap_or_default();
            let mut labels: BTreeSet<String> = quoted(cell).collect();
            let further = header.contains(&"further labels") && cell != "none at all";
            if further {
                labels.extend(of_edges.iter().cloned());
            }
            let is_histogram = !header.contains(&"type");
            for name in quoted(cells.first().copied().unwrap_or_default()) {
                if is_histogram {
                    for series in ["sum", "count", "bucket"] {
                        let mut labels = labels.clone();
                        labels.extend((series == "bucket").then(|| "le".to_owned()));
                        metrics.insert(format!("{name}_{series}"), labels);
                    }
                } else {
                    metrics.insert(name, labels.clone());
                }
            }
        }
    }
    ensure!(
        metrics.len() > 40,
        "docs/metrics.md has {} metrics",
        metrics.len()
    );
    Ok(metrics)
}

/// Words in backquotes; what stands in parentheses are values.
fn quoted(cell: &str) -> impl Iterator<Item = String> {
    let before = cell.split('(').next().unwrap_or_default();
    before.split('`').skip(1).step_by(2).map(ToOwned::to_owned)
}

/// What a query names beyond these metrics and labels.
fn unknown(names: &Names, served: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let is_target = |label: &String| TARGET_LABELS.contains(&label.as_str());
    let mut found = Vec::new();
    let mut all = BTreeSet::new();
    for (metric, labels) in &names.metrics {
        if metric == OF_PROMETHEUS {
            continue;
        }
        let Some(known) = served.get(metric) else {
            // A variable's query has the label that it lists beside the metric.
            let is_label =
                served.values().any(|labels| labels.contains(metric)) || is_target(metric);
            if !is_label {
                found.push(format!("metric {metric}"));
            }
            continue;
        };
        all.extend(known.iter().cloned());
        let strangers = labels
            .iter()
            .filter(|label| !known.contains(*label) && !is_target(label));
        found.extend(strangers.map(|label| format!("label {label} of {metric}")));
    }
    let strangers = names
        .grouping
        .iter()
        .filter(|label| !all.contains(*label) && !is_target(label));
    found.extend(strangers.map(|label| format!("grouping by {label}")));
    found
}

#[test]
fn dashboards_and_alerts_name_documented_metrics_and_labels() -> Result<()> {
    let served = documented()?;
    let queries = queries()?;
    ensure!(queries.len() > 50, "only {} queries", queries.len());
    let mut findings = Vec::new();
    for (place, query) in queries {
        let strangers = unknown(&promql::names(&query), &served);
        findings.extend(
            strangers
                .into_iter()
                .map(|stranger| format!("{place}: {stranger}")),
        );
    }
    assert_eq!(findings, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_name_that_no_agent_serves_is_found() -> Result<()> {
    let served = documented()?;
    let found = |query: &str| unknown(&promql::names(query), &served);
    assert_eq!(
        found("weft_connections_total"),
        ["metric weft_connections_total"]
    );
    assert_eq!(
        found(r#"sum by (colour) (weft_tunnels_open{workload="x",direction="inbound"})"#),
        ["label workload of weft_tunnels_open", "grouping by colour"]
    );
    Ok(())
}

#[test]
fn a_running_agent_serves_what_dashboards_and_alerts_name() -> Result<()> {
    let world = World::start(
        LabSpec::new(Families::V4)
            .node("n1", [PodSpec::new("web")])
            .node("n2", [PodSpec::new("cart"), PodSpec::new("near")]),
        MeshSpec::default(),
    )?;
    let cart = world.lab.pod("cart")?;
    let to = cart.at(PORT).to_string();
    let seqecho = programs::own("seqecho")?;
    let server = Program::new(&seqecho).args(["server", "--listen", &to]);
    let _server = world.lab.serve(cart, &server, cart.at(PORT), LIMIT)?;
    for client in ["web", "near"] {
        let talk = Program::new(&seqecho).args(["client", "--records", "10", "--to", &to]);
        world.lab.run(world.lab.pod(client)?, &talk, LIMIT)?.ok()?;
        // Nobody listens there.
        world.fate(client, cart.at(PORT + 1))?;
    }
    let scrape = |node: &str| world.mesh.metrics(world.lab.node(node)?);
    wait::until("both agents to have counted", LIMIT, || {
        let closed = |node: &str| {
            Ok::<_, anyhow::Error>(scrape(node)?.sum("weft_connections_closed_total", &[]))
        };
        Ok((closed("n1")? > 0.0 && closed("n2")? > 0.0).then_some(()))
    })?;
    let mut served: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in ["n1", "n2"] {
        for sample in scrape(node)?.samples {
            served
                .entry(sample.name)
                .or_default()
                .extend(sample.labels.into_keys());
        }
    }
    let (documented, mut unseen) = (documented()?, BTreeSet::new());
    for (place, query) in queries()? {
        let mut names = promql::names(&query);
        // Series that this little traffic does not bring about are judged by the documentation alone.
        names.metrics.retain(|metric, _| {
            let seen = served.contains_key(metric);
            if !seen && documented.contains_key(metric) {
                unseen.insert(metric.clone());
            }
            seen
        });
        if names.metrics.is_empty() {
            continue;
        }
        let strangers = unknown(&names, &served);
        ensure!(strangers.is_empty(), "{place}: {strangers:?}");
    }
    // These begin with the first event of their kind.
    let seldom = [
        "weft_limit_reached_total",
        "weft_policy_audit_total",
        "weft_policy_denied_total",
        "weft_tunnel_failed_total",
    ];
    let unexpected: Vec<&String> = unseen
        .iter()
        .filter(|name| !seldom.contains(&name.as_str()))
        .collect();
    assert!(
        unexpected.is_empty(),
        "documented and used, but not served: {unexpected:?}"
    );
    Ok(())
}

#[test]
fn alerts_fire_when_they_should() -> Result<()> {
    let Some(promtool) = programs::tool("promtool") else {
        return skip::note(
            "observability::alerts_fire_when_they_should",
            "promtool is not installed (Debian package prometheus)",
        );
    };
    let folder = chart::repository().join("tests/chart");
    for arguments in [
        &["check", "rules", "../../charts/weft/files/rules/weft.yaml"][..],
        &["test", "rules", "rules_test.yaml"][..],
    ] {
        let output = Command::new(&promtool)
            .args(arguments)
            .current_dir(&folder)
            .output()?;
        assert!(
            output.status.success(),
            "{arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
