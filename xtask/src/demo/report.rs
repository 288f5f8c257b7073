//! What the demo found, for people and for programs.

use std::fmt::Write as _;

use serde::Serialize;

/// A connection as an agent counted it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Edge {
    /// Identity of the client, as its certificate (or the kernel, within a node) proved it.
    pub source: String,
    /// Identity of the server.
    pub destination: String,
    /// Name of the server's workload.
    pub workload: String,
    /// `mutual_tls` or `kernel`.
    pub security: String,
    /// Node whose agent counted it.
    pub node: String,
    /// Connections.
    pub connections: u64,
}

/// Something that must hold.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What.
    pub what: String,
    /// Whether it did.
    pub held: bool,
    /// What was seen.
    pub seen: String,
}

/// Everything the demo found; `--json` prints it as it is.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Whether all of it held.
    pub passed: bool,
    /// Why the demo ended early, if it did.
    pub error: Option<String>,
    /// Requests that programs made through the mesh and that must succeed.
    pub requests: u64,
    /// How many of them failed.
    pub failures: u64,
    /// Bytes between pods that crossed the link outside of TLS.
    pub plaintext_bytes: u64,
    /// Bytes between pods that crossed the link in TLS records.
    pub tls_bytes: u64,
    /// Bytes of plaintext that the same capture saw before the mesh was there: it can see.
    pub plaintext_bytes_without_mesh: u64,
    /// Who talked to whom, from the agents' metrics.
    pub identities: Vec<Edge>,
    /// Connections of an identity without permission that were refused.
    pub denied: u64,
    /// Connections of an identity without permission that were tried.
    pub denied_attempts: u64,
    /// Requests while and after an endpoint died.
    pub failover_requests: u64,
    /// How many of them failed.
    pub failover_failures: u64,
    /// Median latency of an HTTP request between the nodes without the mesh, microseconds.
    pub p50_us_direct: f64,
    /// The same with the mesh.
    pub p50_us_mesh: f64,
    /// 99th percentile without the mesh.
    pub p99_us_direct: f64,
    /// 99th percentile with the mesh.
    pub p99_us_mesh: f64,
    /// What iperf3 reported through the mesh, Gbit/s.
    pub bulk_gbit_per_s: f64,
    /// Where the agents' metrics are: network namespace and URL.
    pub metrics: Vec<MetricsPlace>,
    /// Each thing that must hold.
    pub checks: Vec<Check>,
    /// Prefix of everything the demo made.
    pub prefix: String,
    /// How long it took.
    pub seconds: f64,
}

/// Where to find an agent's metrics.
#[derive(Debug, Clone, Serialize)]
pub struct MetricsPlace {
    /// Node.
    pub node: String,
    /// Path of its network namespace.
    pub netns: String,
    /// URL inside it.
    pub url: String,
}

impl Report {
    /// Notes something that must hold.
    pub fn check(&mut self, what: &str, held: bool, seen: impl Into<String>) {
        let check = Check {
            what: what.to_owned(),
            held,
            seen: seen.into(),
        };
        eprintln!(
            "    {} {}: {}",
            if held { "ok  " } else { "FAIL" },
            check.what,
            check.seen
        );
        self.checks.push(check);
    }

    /// Judges the whole.
    pub fn conclude(&mut self) {
        self.passed = self.error.is_none()
            && !self.checks.is_empty()
            && self.checks.iter().all(|check| check.held);
    }

    /// The report for a human.
    pub fn text(&self) -> String {
        let mut text = String::from("\nWho talked to whom (from the agents' metrics)\n");
        for edge in &self.identities {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "  {} -> {} ({})  {}: {} connections, counted by {}",
                edge.source,
                edge.destination,
                edge.workload,
                edge.security,
                edge.connections,
                edge.node
            );
        }
        let _ = writeln!(
            text,
            "\nBetween the nodes: {} bytes of TLS, {} bytes of plaintext ({} before the mesh was there)",
            self.tls_bytes, self.plaintext_bytes, self.plaintext_bytes_without_mesh
        );
        let _ = writeln!(
            text,
            "Requests: {}, failed: {}",
            self.requests, self.failures
        );
        let _ = writeln!(
            text,
            "Denied identity: {} of {} refused",
            self.denied, self.denied_attempts
        );
        let _ = writeln!(
            text,
            "Failover: {} requests while an endpoint died, {} failed",
            self.failover_requests, self.failover_failures
        );
        let _ = writeln!(
            text,
            "HTTP latency between nodes: p50 {:.0} µs direct, {:.0} µs meshed; p99 {:.0} and {:.0} µs",
            self.p50_us_direct, self.p50_us_mesh, self.p99_us_direct, self.p99_us_mesh
        );
        let _ = writeln!(
            text,
            "iperf3 through the mesh: {:.2} Gbit/s",
            self.bulk_gbit_per_s
        );
        for place in &self.metrics {
            let _ = writeln!(
                text,
                "Metrics of {}: nsenter --net={} curl {}",
                place.node, place.netns, place.url
            );
        }
        if let Some(error) = &self.error {
            let _ = writeln!(text, "\nENDED EARLY: {error}");
        }
        for check in self.checks.iter().filter(|check| !check.held) {
            let _ = writeln!(text, "\nDID NOT HOLD: {}: {}", check.what, check.seen);
        }
        let verdict = if self.passed {
            "Everything held"
        } else {
            "NOT everything held"
        };
        let _ = writeln!(text, "\n{verdict} ({:.0} s).", self.seconds);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_checked_or_one_thing_broken_is_no_success() {
        let mut report = Report::default();
        report.conclude();
        assert!(!report.passed);
        report.check("a", true, "");
        report.conclude();
        assert!(report.passed);
        report.check("b", false, "");
        report.conclude();
        assert!(!report.passed);
    }

    #[test]
    fn the_json_has_the_promised_keys() -> serde_json::Result<()> {
        let json = serde_json::to_value(Report::default())?;
        for key in [
            "requests",
            "failures",
            "plaintext_bytes",
            "tls_bytes",
            "identities",
            "denied",
            "failover_failures",
            "p50_us_direct",
            "p50_us_mesh",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        Ok(())
    }
}
