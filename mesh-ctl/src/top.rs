//! Rates of edges between two samples.

use std::{cmp::Ordering, collections::BTreeMap, time::Duration};

use mesh_api::local::Edge;
use serde::Serialize;

/// An edge with what happened on it between two samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EdgeRates {
    /// The later sample.
    #[serde(flatten)]
    pub edge: Edge,
    /// Connections opened per second.
    pub opened_per_second: f64,
    /// Connections failed per second.
    pub failed_per_second: f64,
    /// Bytes per second from source to destination.
    pub sent_bytes_per_second: f64,
    /// Bytes per second from destination to source.
    pub received_bytes_per_second: f64,
}

/// What makes two rows of two samples the same edge. The address is not part of it: a service's edge shows the one
/// that was dialled last.
type Key<'a> = (&'a str, &'a str, &'a str, &'a str);

fn key(edge: &Edge) -> Key<'_> {
    (
        &edge.direction,
        &edge.source,
        &edge.destination,
        &edge.security,
    )
}

/// A sample with one row per edge: the agent also tells edges apart by identities, which rows do not show.
fn merged(sample: &[Edge]) -> BTreeMap<Key<'_>, Edge> {
    let mut edges: BTreeMap<Key<'_>, Edge> = BTreeMap::new();
    for edge in sample {
        let Some(row) = edges.get_mut(&key(edge)) else {
            edges.insert(key(edge), edge.clone());
            continue;
        };
        row.open = row.open.saturating_add(edge.open);
        row.opened = row.opened.saturating_add(edge.opened);
        row.failed = row.failed.saturating_add(edge.failed);
        row.bytes_sent = row.bytes_sent.saturating_add(edge.bytes_sent);
        row.bytes_received = row.bytes_received.saturating_add(edge.bytes_received);
        row.rtt_us = row.rtt_us.max(edge.rtt_us);
        row.destination_address = row.destination_address.or(edge.destination_address);
    }
    edges
}

/// The later sample's edges with their rates, the busiest first.
pub fn rates(before: &[Edge], after: &[Edge], elapsed: Duration) -> Vec<EdgeRates> {
    let earlier = merged(before);
    let mut rows: Vec<EdgeRates> = merged(after)
        .into_iter()
        .map(|(key, edge)| {
            let was = earlier.get(&key);
            let rate = |counter: fn(&Edge) -> u64| {
                per_second(was.map_or(0, counter), counter(&edge), elapsed)
            };
            EdgeRates {
                opened_per_second: rate(|edge| edge.opened),
                failed_per_second: rate(|edge| edge.failed),
                sent_bytes_per_second: rate(|edge| edge.bytes_sent),
                received_bytes_per_second: rate(|edge| edge.bytes_received),
                edge,
            }
        })
        .collect();
    rows.sort_by(busiest_first);
    rows
}

/// A counter that went down was started anew (another agent): all it shows happened since.
fn per_second(before: u64, after: u64, elapsed: Duration) -> f64 {
    let seconds = elapsed.as_secs_f64();
    if seconds <= 0.0 {
        return 0.0;
    }
    after.checked_sub(before).unwrap_or(after) as f64 / seconds
}

fn busiest_first(a: &EdgeRates, b: &EdgeRates) -> Ordering {
    let traffic = |row: &EdgeRates| row.sent_bytes_per_second + row.received_bytes_per_second;
    traffic(b)
        .total_cmp(&traffic(a))
        .then(b.opened_per_second.total_cmp(&a.opened_per_second))
        .then_with(|| key(&a.edge).cmp(&key(&b.edge)))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn edge(source: &str, destination: &str) -> Edge {
        Edge {
            direction: "outbound".to_owned(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            destination_address: "10.77.2.11:80".parse().ok(),
            security: "mutual_tls".to_owned(),
            open: 2,
            opened: 10,
            failed: 1,
            bytes_sent: 1_000,
            bytes_received: 5_000,
            rtt_us: Some(85),
        }
    }

    #[test]
    fn rates_are_differences_over_the_time_between() {
        let before = [edge("shop/web", "shop/db")];
        let mut later = before[0].clone();
        later.opened += 5;
        later.bytes_sent += 3_000;
        let rows = rates(&before, &[later], Duration::from_secs(2));
        assert_eq!(rows[0].opened_per_second, 2.5);
        assert_eq!(rows[0].failed_per_second, 0.0);
        assert_eq!(rows[0].sent_bytes_per_second, 1_500.0);
        assert_eq!(rows[0].received_bytes_per_second, 0.0);
    }

    #[test]
    fn a_new_edge_and_a_restarted_agent_count_from_zero() {
        let mut restarted = edge("shop/web", "shop/db");
        restarted.opened = 4;
        let fresh = edge("shop/web", "shop/cache");
        let rows = rates(
            &[edge("shop/web", "shop/db")],
            &[restarted, fresh],
            Duration::from_secs(1),
        );
        let opened = |name: &str| {
            rows.iter()
                .find(|row| row.edge.destination == name)
                .map(|row| row.opened_per_second)
        };
        assert_eq!(opened("shop/db"), Some(4.0));
        assert_eq!(opened("shop/cache"), Some(10.0));
    }

    #[test]
    fn a_service_whose_next_endpoint_was_dialled_is_the_same_edge() {
        let before = [edge("shop/web", "shop/db")];
        let mut later = before[0].clone();
        later.destination_address = "10.77.2.99:80".parse().ok();
        later.opened += 1;
        let rows = rates(&before, &[later], Duration::from_secs(1));
        assert_eq!(rows[0].opened_per_second, 1.0);
    }

    #[test]
    fn edges_that_differ_in_identity_only_are_one_row() {
        let two = [edge("shop/web", "shop/db"), edge("shop/web", "shop/db")];
        let mut later = two.clone();
        later[0].opened += 1;
        later[1].opened += 2;
        let rows = rates(&two, &later, Duration::from_secs(1));
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].opened_per_second, rows[0].edge.opened), (3.0, 23));
    }

    #[test]
    fn the_busiest_edge_is_first_and_ties_are_stable() {
        let quiet = [edge("a/a", "z/z"), edge("a/a", "b/b")];
        let mut busy = edge("q/q", "r/r");
        let before = [quiet[0].clone(), quiet[1].clone(), busy.clone()];
        busy.bytes_received += 1;
        let rows = rates(
            &before,
            &[quiet[0].clone(), quiet[1].clone(), busy],
            Duration::from_secs(1),
        );
        let order: Vec<&str> = rows
            .iter()
            .map(|row| row.edge.destination.as_str())
            .collect();
        assert_eq!(order, ["r/r", "b/b", "z/z"]);
    }

    #[test]
    fn two_samples_at_the_same_instant_have_no_rate() {
        let rows = rates(&[], &[edge("a/a", "b/b")], Duration::ZERO);
        assert_eq!(rows[0].sent_bytes_per_second, 0.0);
    }
}
