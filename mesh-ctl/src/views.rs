//! What a human sees of each answer. Pure: text out of data and the time.

use std::fmt::Write as _;

use mesh_api::local::{Confinement, DrainingAgent, Status, WorkloadStatus};
use serde_json::{Map, Value};

use crate::{
    table::{Table, printable},
    top::EdgeRates,
    units,
};

/// Characters of a cell in a dump; longer values are cut there and whole in JSON.
const DUMP_CELL_MAX_CHARS: usize = 60;

/// `weft status`. `now` is seconds since 1970, for what is left of certificates.
pub fn status(status: &Status, now: i64) -> String {
    let ready = if status.pending.is_empty() {
        "yes".to_owned()
    } else {
        format!("no, waits for {}", status.pending.join(", "))
    };
    let up = units::span(status.uptime_ms / 1000);
    let mut text = String::new();
    for (label, value) in [
        ("Node", status.node.clone()),
        (
            "Agent",
            format!("{}, pid {}, up {up}", status.version, status.pid),
        ),
        ("Ready", ready),
        ("Discovery", discovery(&status.discovery)),
        ("Snapshot", snapshot(&status.snapshot)),
        (
            "Rights",
            status
                .confinement
                .as_ref()
                .map_or_else(|| "unknown".to_owned(), rights),
        ),
    ] {
        push_line(&mut text, format_args!("{label:<11}{}", printable(&value)));
    }
    for agent in &status.draining {
        push_line(
            &mut text,
            format_args!("{:<11}{}", "Draining", draining(agent, now)),
        );
    }
    text.push('\n');
    if status.workloads.is_empty() {
        text.push_str("No workload is enrolled.\n");
        return text;
    }
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "ADDRESSES",
        "IDENTITY",
        "CAPTURE",
        "CERTIFICATE",
        "SAME-NODE",
        "ON-DEATH",
        ">OPEN",
    ]);
    for workload in &status.workloads {
        table.row(workload_row(workload, now));
    }
    text + &table.render()
}

fn rights(confinement: &Confinement) -> String {
    let yes_or_no = |holds| if holds { "yes" } else { "no" };
    format!(
        "{}; no new privileges: {}, system calls filtered: {}, core dumps: {}",
        confinement.capabilities.join(" "),
        yes_or_no(confinement.no_new_privileges),
        yes_or_no(confinement.system_call_filter),
        yes_or_no(confinement.core_dumps),
    )
}

/// A replaced agent that still serves connections.
fn draining(agent: &DrainingAgent, now: i64) -> String {
    let left = u64::try_from(agent.ends_at.saturating_sub(now)).unwrap_or_default();
    format!(
        "pid {} ({}): {} connections, closed in {}",
        agent.pid,
        printable(&agent.version),
        agent.connections,
        units::span(left)
    )
}

fn discovery(state: &str) -> String {
    match state {
        "snapshot" => {
            "snapshot (control plane away, serving the last good state from disk)".to_owned()
        }
        "waiting" => "waiting (nothing received from the control plane yet)".to_owned(),
        other => other.to_owned(),
    }
}

fn snapshot(state: &str) -> String {
    match state {
        "behind" => "behind (newer changes are about to be written)".to_owned(),
        "missing" => "missing (a restart without the control plane would know nothing)".to_owned(),
        other => other.to_owned(),
    }
}

fn workload_row(workload: &WorkloadStatus, now: i64) -> [String; 9] {
    let addresses: Vec<String> = workload.addresses.iter().map(ToString::to_string).collect();
    [
        workload.namespace.clone(),
        workload.name.clone(),
        addresses.join(","),
        workload
            .identity
            .as_ref()
            .map_or_else(|| "unknown".to_owned(), |identity| identity.principal()),
        workload.capture.clone(),
        certificate(&workload.certificate, workload.certificate_not_after, now),
        workload.same_node.clone(),
        workload.failure_mode.clone(),
        workload.connections.to_string(),
    ]
}

fn certificate(state: &str, not_after: Option<i64>, now: i64) -> String {
    let Some(not_after) = not_after else {
        return state.to_owned();
    };
    match u64::try_from(not_after.saturating_sub(now)) {
        Ok(left) if left > 0 => format!("{state}, {} left", units::span(left)),
        _ => format!(
            "{state}, expired {} ago",
            units::span(now.abs_diff(not_after))
        ),
    }
}

/// `weft top`.
pub fn top(rows: &[EdgeRates]) -> String {
    if rows.is_empty() {
        return "No traffic seen yet.\n".to_owned();
    }
    let mut table = Table::new(&[
        "DIRECTION",
        "SOURCE",
        "DESTINATION",
        "ADDRESS",
        "SECURITY",
        ">OPEN",
        ">CONN/S",
        ">FAIL/S",
        ">FAILED",
        ">SENT/S",
        ">RECEIVED/S",
        ">RTT",
    ]);
    for row in rows {
        let edge = &row.edge;
        table.row([
            edge.direction.clone(),
            edge.source.clone(),
            edge.destination.clone(),
            edge.destination_address
                .map_or_else(String::new, |address| address.to_string()),
            edge.security.clone(),
            edge.open.to_string(),
            units::rate(row.opened_per_second),
            units::rate(row.failed_per_second),
            edge.failed.to_string(),
            units::bytes(row.sent_bytes_per_second),
            units::bytes(row.received_bytes_per_second),
            edge.rtt_us.map_or_else(String::new, units::micros),
        ]);
    }
    table.render()
}

/// `weft dump`: one block per section; lists of objects become tables, everything else is shown as JSON.
pub fn dump(state: &Value) -> String {
    let mut text = String::new();
    match state {
        Value::Object(sections) => {
            for (name, section) in sections {
                push_section(&mut text, name, section);
            }
        }
        other => text = pretty(other),
    }
    text
}

fn push_section(text: &mut String, name: &str, section: &Value) {
    let separator = if text.is_empty() { "" } else { "\n" };
    match section {
        Value::Array(entries) => {
            push_line(
                text,
                format_args!("{separator}{} ({})", printable(name), entries.len()),
            );
            text.push_str(&entries_table(entries).unwrap_or_else(|| pretty(section)));
        }
        Value::Object(fields) if fields.values().any(holds_table) => {
            let (tables, plain): (Vec<_>, Vec<_>) =
                fields.iter().partition(|(_, value)| holds_table(value));
            if !plain.is_empty() {
                let plain = plain
                    .into_iter()
                    .map(|(key, value)| (key.clone(), value.clone()));
                push_section(text, name, &Value::Object(plain.collect()));
            }
            for (key, value) in tables {
                push_section(text, &format!("{name}.{key}"), value);
            }
        }
        other => {
            push_line(text, format_args!("{separator}{}", printable(name)));
            text.push_str(&pretty(other));
        }
    }
}

/// Whether a list of objects is somewhere in it. The reader of the JSON bounds the depth.
fn holds_table(value: &Value) -> bool {
    match value {
        Value::Array(entries) => !entries.is_empty() && entries.iter().all(Value::is_object),
        Value::Object(fields) => fields.values().any(holds_table),
        _ => false,
    }
}

/// A table of a list of objects; absent for an empty list or one of other things.
fn entries_table(entries: &[Value]) -> Option<String> {
    if entries.is_empty() {
        return Some(String::new());
    }
    let objects: Vec<&Map<String, Value>> = entries.iter().filter_map(Value::as_object).collect();
    if objects.len() != entries.len() {
        return None;
    }
    let mut keys: Vec<&str> = Vec::new();
    for key in objects.iter().flat_map(|object| object.keys()) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let titles: Vec<String> = keys
        .iter()
        .map(|key| printable(&key.to_uppercase()))
        .collect();
    let mut table = Table::new(&titles.iter().map(String::as_str).collect::<Vec<_>>());
    for object in objects {
        table.row(
            keys.iter()
                .map(|key| object.get(*key).map_or_else(String::new, cell)),
        );
    }
    Some(table.render())
}

fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if text.chars().count() <= DUMP_CELL_MAX_CHARS {
        return text;
    }
    text.chars()
        .take(DUMP_CELL_MAX_CHARS)
        .chain(['…'])
        .collect()
}

/// JSON over several lines, ended by a newline.
pub fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn push_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::top::{rates, tests::edge};

    fn node() -> Status {
        let workload = |name: &str| WorkloadStatus {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: Some("c1//Pod/shop/web".into()),
            identity: "spiffe://cluster.local/ns/shop/sa/web".parse().ok(),
            addresses: vec![
                "10.77.1.10".parse().expect("v4"),
                "fd77:1::10".parse().expect("v6"),
            ],
            netns: "/run/netns/n1-web".to_owned(),
            netns_cookie: 4_097,
            capture: "ok".to_owned(),
            failure_mode: "closed".to_owned(),
            same_node: "kernel".to_owned(),
            connections: 3,
            certificate_not_after: Some(1_000_000 + 40_000),
            certificate: "valid".to_owned(),
        };
        let unknown = WorkloadStatus {
            identity: None,
            uid: None,
            addresses: Vec::new(),
            capture: "route missing, repaired".to_owned(),
            certificate: "missing".to_owned(),
            certificate_not_after: None,
            connections: 1_204,
            ..workload("cart-7")
        };
        Status {
            node: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 4_242,
            uptime_ms: 7_805_000,
            discovery: "connected".to_owned(),
            snapshot: "current".to_owned(),
            workloads: vec![workload("web"), unknown],
            pending: Vec::new(),
            confinement: Some(Confinement {
                capabilities: vec!["NET_ADMIN".to_owned(), "SYS_ADMIN".to_owned()],
                no_new_privileges: true,
                system_call_filter: true,
                core_dumps: false,
            }),
            draining: Vec::new(),
        }
    }

    #[test]
    fn replaced_agents_are_shown_while_they_serve() {
        let mut upgraded = node();
        upgraded.draining.push(DrainingAgent {
            pid: 4_100,
            version: "0.0.9".to_owned(),
            connections: 12,
            ends_at: 1_000_000 + 3_000,
        });
        let text = status(&upgraded, 1_000_000);
        let line = "Draining   pid 4100 (0.0.9): 12 connections, closed in 50m0s";
        assert!(text.lines().any(|shown| shown == line), "{text}");
    }

    #[test]
    fn status_of_a_healthy_node() {
        let expected = "\
Node       n1
Agent      0.1.0, pid 4242, up 2h10m
Ready      yes
Discovery  connected
Snapshot   current
Rights     NET_ADMIN SYS_ADMIN; no new privileges: yes, system calls filtered: yes, core dumps: no

NAMESPACE  NAME    ADDRESSES              IDENTITY                      CAPTURE                  CERTIFICATE        SAME-NODE  ON-DEATH  OPEN
shop       web     10.77.1.10,fd77:1::10  cluster.local/ns/shop/sa/web  ok                       valid, 11h6m left  kernel     closed       3
shop       cart-7  -                      unknown                       route missing, repaired  missing            kernel     closed    1204
";
        assert_eq!(status(&node(), 1_000_000), expected);
    }

    #[test]
    fn status_says_what_it_waits_for_and_that_nothing_is_enrolled() {
        let node = Status {
            pending: vec!["certificates".to_owned(), "discovery".to_owned()],
            discovery: "snapshot".to_owned(),
            workloads: Vec::new(),
            ..node()
        };
        let shown = status(&node, 0);
        assert!(
            shown.contains("Ready      no, waits for certificates, discovery\n"),
            "{shown}"
        );
        assert!(
            shown.contains("Discovery  snapshot (control plane away"),
            "{shown}"
        );
        assert!(shown.ends_with("No workload is enrolled.\n"), "{shown}");
    }

    #[test]
    fn an_expired_certificate_says_so() {
        assert_eq!(
            certificate("expired", Some(100), 280),
            "expired, expired 3m0s ago"
        );
        assert_eq!(
            certificate("valid", Some(i64::MIN), i64::MAX)
                .split(',')
                .next(),
            Some("valid")
        );
    }

    #[test]
    fn top_shows_rates() {
        let before = [edge("shop/web", "shop/db")];
        let mut after = before.clone();
        after[0].bytes_received += 4_200_000;
        after[0].opened += 120;
        let expected = "\
DIRECTION  SOURCE    DESTINATION  ADDRESS        SECURITY    OPEN  CONN/S  FAIL/S  FAILED  SENT/S  RECEIVED/S    RTT
outbound   shop/web  shop/db      10.77.2.11:80  mutual_tls     2     120       0       1     0 B      4.2 MB  85 µs
";
        assert_eq!(
            top(&rates(&before, &after, Duration::from_secs(1))),
            expected
        );
        assert_eq!(top(&[]), "No traffic seen yet.\n");
    }

    #[test]
    fn dump_shows_lists_of_objects_as_tables() {
        let state = json!({
            "generation": 7,
            "policies": [],
            "services": [
                {"name": "shop/web", "vips": ["10.96.0.1"]},
                {"name": "shop/db", "note": "x".repeat(70)},
            ],
            "zone": {"name": "a", "workloads": {"total": 1, "items": [{"uid": "u"}]}},
        });
        let expected = format!(
            "generation\n7\n\npolicies (0)\n\nservices (2)\n\
             NAME      VIPS           NOTE\n\
             shop/web  [\"10.96.0.1\"]  -\n\
             shop/db   -              {}…\n\
             \nzone\n{{\n  \"name\": \"a\"\n}}\n\
             \nzone.workloads\n{{\n  \"total\": 1\n}}\n\
             \nzone.workloads.items (1)\nUID\nu\n",
            "x".repeat(60)
        );
        assert_eq!(dump(&state), expected);
    }
}
