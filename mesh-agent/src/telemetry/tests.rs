use std::{collections::BTreeMap, io::ErrorKind};

use mesh_api::names::WorkloadUid;

use super::*;
use crate::discovery::model::{CaptureSettings, Locality, Tunnel};

fn workload(name: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: WorkloadUid::from(name),
        name: format!("{name}-0").into(),
        namespace: "shop".into(),
        identity: identity(name),
        addresses: Vec::new(),
        network: "".into(),
        tunnel: Tunnel::Hbone,
        node: "node-a".into(),
        cluster: "c1".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_type: "deployment",
        workload_name: name.into(),
        healthy: true,
        host_network: false,
        locality: Locality::default(),
        capacity: 1,
        services: BTreeMap::new(),
        policies: Vec::new(),
        capture: CaptureSettings::default(),
    })
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account).expect("valid")
}

fn party(name: &str) -> Party {
    let address = "10.1.0.5:8080".parse().ok();
    Party {
        workload: Some(workload(name)),
        identity: Some(identity(name)),
        address,
    }
}

fn connection(source: &str, destination: &str) -> ConnectionInfo {
    ConnectionInfo {
        direction: Direction::Outbound,
        source: party(source),
        destination: party(destination),
        service: Some("shop/db.shop.svc.cluster.local".into()),
        security: Security::MutualTls,
    }
}

const LABELS: &str = "destination_identity=\"spiffe://cluster.local/ns/shop/sa/db\",destination_namespace=\"shop\",\
    destination_service=\"shop/db.shop.svc.cluster.local\",destination_workload=\"db\",direction=\"outbound\",";
const MORE: &str = "security=\"mutual_tls\",source_identity=\"spiffe://cluster.local/ns/shop/sa/web\",\
    source_namespace=\"shop\",source_workload=\"web\"";

/// The value of the series `name` of the edge from web to db.
fn edge_value(text: &str, name: &str, reason: Option<&str>) -> Option<f64> {
    let reason = reason
        .map(|reason| format!("reason=\"{reason}\","))
        .unwrap_or_default();
    let start = format!("{name}{{{LABELS}{reason}{MORE}}} ");
    text.lines()
        .find_map(|line| line.strip_prefix(&start))?
        .parse()
        .ok()
}

#[test]
fn a_connection_is_counted_while_it_runs_and_when_it_ends() {
    let telemetry = Telemetry::new("1.2.3");
    let open = telemetry.open(connection("web", "db"));
    open.add_sent(100);
    open.add_received(2000);
    open.observe_tcp(TcpStatistics {
        rtt_us: 250,
        retransmits: 2,
    });
    open.observe_tcp(TcpStatistics {
        rtt_us: 250,
        retransmits: 3,
    });
    let text = telemetry.render();
    let value = |name| edge_value(&text, name, None);
    assert_eq!(value("weft_connections_opened_total"), Some(1.0));
    assert_eq!(value("weft_connections_open"), Some(1.0));
    assert_eq!(value("weft_sent_bytes_total"), Some(100.0));
    assert_eq!(value("weft_received_bytes_total"), Some(2000.0));
    assert_eq!(value("weft_tcp_rtt_seconds"), Some(0.000_25));
    assert_eq!(value("weft_tcp_retransmits_total"), Some(3.0));
    open.finish(CloseReason::ClientReset);
    let text = telemetry.render();
    assert_eq!(edge_value(&text, "weft_connections_open", None), Some(0.0));
    assert_eq!(
        edge_value(&text, "weft_connections_closed_total", Some("client_reset")),
        Some(1.0)
    );
    assert_eq!(
        edge_value(&text, "weft_connections_closed_total", Some("drained")),
        None
    );
}

#[test]
fn a_connection_dropped_without_an_end_counts_as_drained() {
    let telemetry = Telemetry::new("1.2.3");
    drop(telemetry.open(connection("web", "db")));
    let text = telemetry.render();
    assert_eq!(
        edge_value(&text, "weft_connections_closed_total", Some("drained")),
        Some(1.0)
    );
    assert_eq!(edge_value(&text, "weft_connections_open", None), Some(0.0));
}

#[test]
fn failures_and_denials_are_counted_apart() {
    let telemetry = Telemetry::new("1.2.3");
    telemetry.failed(
        &connection("web", "db"),
        CloseReason::ConnectFailed,
        &"refused",
    );
    telemetry.failed(&connection("web", "db"), CloseReason::Denied, &"by policy");
    telemetry
        .open(connection("web", "cache"))
        .finish(CloseReason::Revoked);
    let text = telemetry.render();
    assert!(text.contains("weft_policy_revoked_total 1\n"));
    assert_eq!(
        edge_value(
            &text,
            "weft_connections_failed_total",
            Some("connect_failed")
        ),
        Some(1.0)
    );
    assert_eq!(
        edge_value(&text, "weft_connections_failed_total", Some("denied")),
        Some(1.0)
    );
    assert_eq!(
        edge_value(&text, "weft_connections_opened_total", None),
        Some(0.0)
    );
    assert!(text.contains("weft_policy_denied_total{direction=\"outbound\"} 1\n"));
}

#[test]
fn kernel_flows_are_added_as_deltas() {
    let telemetry = Telemetry::new("1.2.3");
    let mut info = connection("web", "db");
    info.security = Security::Kernel;
    let flow = KernelFlow {
        opened: 3,
        closed: 1,
        bytes_sent: 10,
        bytes_received: 20,
        rtt_us: Some(40),
        retransmits: 0,
    };
    telemetry.kernel_flow(&info, flow);
    telemetry.kernel_flow(
        &info,
        KernelFlow {
            closed: 5,
            bytes_sent: 1,
            ..KernelFlow::default()
        },
    );
    let rows = telemetry.edges();
    let [row] = &rows[..] else {
        panic!("one edge, got {rows:?}")
    };
    assert_eq!(
        (row.opened, row.open, row.bytes_sent, row.bytes_received),
        (3, 0, 11, 20)
    );
    assert_eq!((row.security.as_str(), row.rtt_us), ("kernel", Some(40)));
}

#[test]
fn rows_name_both_ends_and_the_busiest_comes_first() {
    let telemetry = Telemetry::new("1.2.3");
    let quiet = telemetry.open(connection("web", "db"));
    quiet.add_sent(1);
    let mut info = connection("web", "cache");
    info.service = None;
    let busy = telemetry.open(info);
    busy.add_received(1000);
    let mut outside = connection("web", "db");
    (outside.destination, outside.service, outside.security) =
        (Party::default(), None, Security::None);
    let _outside = telemetry.open(outside);
    let rows = telemetry.edges();
    let named: Vec<_> = rows
        .iter()
        .map(|row| (row.source.as_str(), row.destination.as_str()))
        .collect();
    let service = "shop/db.shop.svc.cluster.local";
    assert_eq!(
        named,
        [
            ("shop/web", "shop/cache"),
            ("shop/web", service),
            ("shop/web", "unknown")
        ]
    );
    assert_eq!(rows[0].destination_address, "10.1.0.5:8080".parse().ok());
}

#[test]
fn beyond_the_limit_edges_are_folded_and_nothing_is_lost() {
    let telemetry = Telemetry::with_edge_limit("1.2.3", 3);
    let open: Vec<_> = (0..10)
        .map(|n| telemetry.open(connection(&format!("app-{n}"), "db")))
        .collect();
    open.iter().for_each(|connection| connection.add_sent(7));
    let text = telemetry.render();
    let series = text
        .lines()
        .filter(|line| line.starts_with("weft_connections_opened_total{"));
    let values: Vec<f64> = series
        .filter_map(|line| line.rsplit(' ').next())
        .filter_map(|value| value.parse().ok())
        .collect();
    assert_eq!(values.len(), 4, "three edges and the overflow edge");
    assert!(
        (values.iter().sum::<f64>() - 10.0).abs() < 0.5,
        "{values:?}"
    );
    assert!(
        text.contains("weft_edges_overflow_total 7\n")
            && text.contains("source_workload=\"overflow\"")
    );
    let known = telemetry.open(connection("app-0", "db"));
    assert!(
        telemetry.render().contains("weft_edges_overflow_total 7\n"),
        "a known edge still counts apart"
    );
    drop((known, open));
}

#[test]
fn idle_edges_are_dropped_and_edges_with_open_connections_stay() {
    let telemetry = Telemetry::new("1.2.3");
    let open = telemetry.open(connection("web", "db"));
    telemetry
        .open(connection("web", "cache"))
        .finish(CloseReason::Finished);
    let later = Instant::now() + EDGE_IDLE;
    assert!(
        telemetry
            .render_at(later - Duration::from_secs(60))
            .contains("destination_workload=\"cache\"")
    );
    let text = telemetry.render_at(later + Duration::from_secs(60));
    assert!(!text.contains("destination_workload=\"cache\""));
    assert_eq!(edge_value(&text, "weft_connections_open", None), Some(1.0));
    open.finish(CloseReason::Finished);
    let _ = telemetry.render_at(later + EDGE_IDLE + EDGE_IDLE);
    assert!(telemetry.edges().is_empty());
}

#[test]
fn every_documented_metric_is_there() {
    let telemetry = Telemetry::new("1.2.3");
    telemetry.observe_connect(
        Direction::Outbound,
        Security::MutualTls,
        Duration::from_micros(300),
    );
    telemetry.observe_handshake(Direction::Inbound, Duration::from_millis(2));
    let tunnel = telemetry.tunnels.open(Direction::Outbound);
    telemetry
        .tunnels
        .failed(Direction::Inbound, TunnelFailure::Tls);
    telemetry.capture.set_state("shop/web", true);
    telemetry.capture.set_state("shop/gone", false);
    telemetry.limits.refused("shop", "web");
    telemetry.limits.refused("shop", "gone");
    telemetry.forget_workload("shop/gone");
    telemetry
        .certificates
        .renewed(&identity("web"), 1_900_000_000);
    telemetry.limits.reached(Limit::OrderQueue);
    telemetry.policy.audit.inc("shop/only-web");
    telemetry.xds.set_resources("workload", 12);
    let text = telemetry.render();
    for line in [
        "weft_build_info{version=\"1.2.3\"} 1",
        "weft_connect_duration_seconds_count{direction=\"outbound\",security=\"mutual_tls\"} 1",
        "weft_connect_duration_seconds_bucket{direction=\"outbound\",security=\"mutual_tls\",le=\"0.00025\"} 0",
        "weft_connect_duration_seconds_bucket{direction=\"outbound\",security=\"mutual_tls\",le=\"0.0005\"} 1",
        "weft_tls_handshake_duration_seconds_count{direction=\"inbound\"} 1",
        "weft_tunnels_open{direction=\"outbound\"} 1",
        "weft_tunnel_opened_total{direction=\"outbound\"} 1",
        "weft_tunnel_failed_total{direction=\"inbound\",reason=\"tls\"} 1",
        "weft_pool_hits_total 0",
        "weft_pool_misses_total 0",
        "weft_pool_waiting 0",
        "weft_pool_evicted_total 0",
        "weft_capture_state{workload=\"shop/web\"} 1",
        "weft_capture_repairs_total 0",
        "weft_agent_ready 0",
        "weft_agent_panics_total 0",
        "weft_agent_turns_waited_total 0",
        "weft_log_lines_dropped_total 0",
        "weft_certificate_expiry_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/web\"} 1900000000",
        "weft_xds_connected 0",
        "weft_xds_messages_total 0",
        "weft_xds_nacks_total 0",
        "weft_xds_resources{type=\"workload\"} 12",
        "weft_limit_reached_total{limit=\"order_queue\"} 1",
        "weft_workload_refused_total{workload=\"shop/web\"} 1",
        "weft_descriptors 0",
        "weft_descriptors_used 0",
        "weft_buffered_bytes 0",
        "weft_policy_audit_total{policy=\"shop/only-web\"} 1",
        "weft_policy_revoked_total 0",
    ] {
        assert!(
            text.lines().any(|have| have == line),
            "{line} is missing in:\n{text}"
        );
    }
    assert!(!text.contains("shop/gone"));
    drop(tunnel);
    assert!(
        telemetry
            .render()
            .contains("weft_tunnels_open{direction=\"outbound\"} 0\n")
    );
}

#[test]
fn only_a_want_of_source_ports_counts_as_one() {
    let telemetry = Telemetry::new("1.2.3");
    for kind in [ErrorKind::ConnectionRefused, ErrorKind::AddrNotAvailable] {
        telemetry.limits.dial_failed(&kind.into());
    }
    let line = "weft_limit_reached_total{limit=\"source_ports\"} 1\n";
    assert!(telemetry.render().contains(line));
}

#[test]
fn pods_that_come_and_go_leave_no_series() {
    let telemetry = Telemetry::new("1.2.3");
    let series = |now| {
        let text = telemetry.render_at(now);
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    let come_and_go = |n: usize| {
        let (name, workload) = (format!("pod-{n}"), format!("shop/pod-{n}"));
        telemetry.capture.set_state(&workload, true);
        telemetry.limits.refused("shop", &name);
        telemetry.certificates.renewed(&identity(&name), 1);
        telemetry
            .open(connection(&name, "db"))
            .finish(CloseReason::Finished);
        telemetry.certificates.forget(&identity(&name));
        telemetry.forget_workload(&workload);
    };
    let start = Instant::now();
    let before = series(start);
    (0..EDGES_MAX).for_each(come_and_go);
    assert!(
        series(start) > before + EDGES_MAX,
        "edges live on for a while"
    );
    assert_eq!(series(start + EDGE_IDLE * 2), before);
    let capture = telemetry.render();
    assert!(
        !capture.contains("pod-"),
        "of pods themselves nothing stays"
    );
}

#[test]
fn every_limit_is_documented() {
    let metrics = include_str!("../../../docs/metrics.md");
    let limits = include_str!("../../../docs/limits.md");
    for limit in Limit::ALL {
        let row = format!("`{}`", limit.name());
        assert!(metrics.contains(&row), "{row} is missing in metrics.md");
        assert!(limits.contains(&row), "{row} is missing in limits.md");
    }
}

#[test]
fn every_reason_of_a_failed_tunnel_is_documented() {
    let documented = include_str!("../../../docs/metrics.md");
    for failure in TunnelFailure::ALL {
        let row = format!("`{}`", failure.name());
        assert!(documented.contains(&row), "{row} is missing");
    }
}

#[test]
fn labels_from_configuration_are_bounded() {
    let telemetry = Telemetry::new("1.2.3");
    for n in 0..metrics::LABEL_VALUES_MAX + 50 {
        telemetry.policy.audit.inc(&format!("shop/policy-{n}"));
    }
    let text = telemetry.render();
    let series = text
        .lines()
        .filter(|line| line.starts_with("weft_policy_audit_total{"))
        .count();
    assert_eq!(series, metrics::LABEL_VALUES_MAX + 1);
    assert!(text.contains("weft_policy_audit_total{policy=\"overflow\"} 50\n"));
}

#[test]
fn hostile_names_cannot_break_the_text_format() {
    let telemetry = Telemetry::new("1.2.3");
    let mut info = connection("web", "db");
    info.service = Some("shop/\"} 1\nweft_fake 1\\".into());
    let _open = telemetry.open(info);
    let text = telemetry.render();
    assert!(
        !text.lines().any(|line| line.starts_with("weft_fake")),
        "{text}"
    );
}

#[test]
fn the_order_of_reasons_is_the_order_of_their_discriminants() {
    for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, index, "{}", reason.name());
    }
}

/// Collects what is logged on this thread.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .expect("not poisoned")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn each_connection_leaves_one_line_in_the_access_log() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let telemetry = Telemetry::new("1.2.3");
        let open = telemetry.open(connection("web", "db"));
        open.add_sent(5);
        open.observe_tcp(TcpStatistics {
            rtt_us: 99,
            retransmits: 0,
        });
        open.finish(CloseReason::Finished);
        telemetry.failed(
            &connection("web", "db"),
            CloseReason::Denied,
            &"no ALLOW policy matched",
        );
    });
    let text = String::from_utf8(lines.0.lock().expect("not poisoned").clone()).expect("UTF-8");
    let records: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let [closed, failed] = &records[..] else {
        panic!("two lines, got {text}")
    };
    assert_eq!(closed["target"], "access");
    let fields = &closed["fields"];
    assert_eq!(
        (&fields["src.workload"], &fields["dst.namespace"]),
        (&"web-0".into(), &"shop".into())
    );
    assert_eq!(
        (&fields["bytes_sent"], &fields["rtt_us"], &fields["reason"]),
        (&5.into(), &99.into(), &"finished".into())
    );
    assert_eq!(
        fields["dst.identity"],
        "spiffe://cluster.local/ns/shop/sa/db"
    );
    assert_eq!(failed["fields"]["error"], "no ALLOW policy matched");
}
