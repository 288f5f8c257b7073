//! Answers to the local socket and to admin.

use std::{collections::BTreeMap, sync::Arc};

use mesh_api::local::{Request, Response, Status, WorkloadStatus};
use serde_json::{Value, json};

use super::{agent::Agent, handover::draining, harden, records::DAMAGED_NAME};
use crate::{
    admin::{AdminState, LocalHandler},
    capture::Enrolled,
    discovery::{
        DiscoveryStatus, Phase, SnapshotState,
        model::{FailureMode, SameNode},
    },
    identity::CertificateStatus,
    telemetry::logging::LogControl,
};

impl LocalHandler for Agent {
    async fn handle(&self, request: Request) -> Response {
        match request {
            Request::Enroll(enrolment) => match self.enrol(&enrolment).await {
                Ok(enrolled) => Response::Done {
                    message: format!(
                        "{}/{} is enrolled: {} captured",
                        enrolment.namespace,
                        enrolment.name,
                        join(&enrolled.record.addresses)
                    ),
                },
                Err(message) => Response::Error { message },
            },
            Request::Unenroll { namespace, name } => match self.unenrol(&namespace, &name).await {
                Ok(()) => Response::Done {
                    message: format!("{namespace}/{name} is no longer captured"),
                },
                Err(message) => Response::Error { message },
            },
            Request::Status => Response::Status(Box::new(self.status())),
            Request::Dump => Response::Dump { state: self.dump() },
            Request::Top => Response::Top {
                edges: self.telemetry.edges(),
            },
            Request::Upgrade {
                binary,
                drain_deadline_seconds,
            } => match self
                .upgrade(binary.as_deref(), drain_deadline_seconds)
                .await
            {
                Ok(message) => Response::Done { message },
                Err(message) => Response::Error { message },
            },
        }
    }
}

/// What the HTTP servers show.
pub(super) struct AdminView {
    pub agent: Arc<Agent>,
    pub logs: LogControl,
}

impl AdminState for AdminView {
    fn pending(&self) -> Vec<String> {
        self.agent.pending()
    }

    fn metrics(&self) -> String {
        self.agent.metrics()
    }

    fn config(&self) -> Value {
        json!(self.agent.config)
    }

    fn dump(&self) -> Value {
        self.agent.dump()
    }

    fn log_filter(&self) -> String {
        self.logs.filter().unwrap_or_else(|error| error.to_string())
    }

    fn set_log_filter(&self, filter: &str) -> Result<(), String> {
        self.logs
            .set_filter(filter)
            .map_err(|error| error.to_string())
    }
}

impl Agent {
    /// What readiness waits for; empty when ready.
    pub(super) fn pending(&self) -> Vec<String> {
        let mut pending = Vec::new();
        let discovery = self.discovery.borrow();
        if !discovery.ready {
            let reason = discovery
                .last_error
                .clone()
                .unwrap_or_else(|| "no answer yet".to_owned());
            pending.push(format!("discovery: {reason}"));
        }
        drop(discovery);
        let missing = self.missing();
        for ((namespace, name), missing) in missing.iter().filter(|(_, one)| !one.has_vanished) {
            pending.push(format!("capture of {namespace}/{name}: {}", missing.reason));
        }
        drop(missing);
        if self.records.are_damaged() {
            pending.push(format!(
                "enrolments: {} holds some that are not known any more; enrol what is missing, then remove it",
                self.config.node.run_dir.join(DAMAGED_NAME).display()
            ));
        }
        self.telemetry
            .agent
            .ready
            .set(i64::from(pending.is_empty()));
        pending.sort();
        pending
    }

    /// Metrics in the Prometheus text format, those that are read on demand brought up to date.
    fn metrics(&self) -> String {
        let discovery = self.discovery.borrow().clone();
        self.observe_discovery(&discovery);
        let _ = self.pending();
        let draining = draining::list(&self.config.node.run_dir);
        let connections = draining.iter().map(|one| one.connections).sum();
        self.telemetry
            .agent
            .set_draining(draining.len(), connections);
        self.telemetry.render()
    }

    /// Discovery counts by itself; its totals become the metrics' totals.
    fn observe_discovery(&self, status: &DiscoveryStatus) {
        let xds = &self.telemetry.xds;
        xds.connected
            .set(i64::from(status.phase == Phase::Connected));
        xds.messages
            .inc_by(status.responses.saturating_sub(xds.messages.get()));
        xds.nacks
            .inc_by(status.nacks.saturating_sub(xds.nacks.get()));
        xds.snapshot_failures.inc_by(
            status
                .snapshot_failures
                .saturating_sub(xds.snapshot_failures.get()),
        );
        xds.snapshot_current
            .set(i64::from(status.snapshot() == SnapshotState::Current));
        xds.set_resources("workload", status.counts.workloads);
        xds.set_resources("service", status.counts.services);
        xds.set_resources("policy", status.counts.policies);
    }

    /// The node for `weft status`.
    fn status(&self) -> Status {
        let certificates: BTreeMap<String, CertificateStatus> = self
            .certificates
            .status()
            .into_iter()
            .map(|c| (c.identity.to_string(), c))
            .collect();
        let listening = self.capture.listening();
        let mut workloads: Vec<WorkloadStatus> = self
            .capture
            .enrolled()
            .iter()
            .map(|enrolled| {
                let is_captured = self.capture.is_captured(enrolled, &listening);
                self.workload_status(enrolled, is_captured, &certificates)
            })
            .collect();
        workloads.extend(self.missing_status());
        workloads.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let (phase, snapshot) = {
            let discovery = self.discovery.borrow();
            (discovery.phase, discovery.snapshot())
        };
        Status {
            node: self.config.node.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            discovery: phase.as_str().to_owned(),
            snapshot: snapshot.as_str().to_owned(),
            workloads,
            pending: self.pending(),
            confinement: harden::observed(),
            draining: draining::list(&self.config.node.run_dir),
        }
    }

    fn workload_status(
        &self,
        enrolled: &Enrolled,
        is_captured: bool,
        certificates: &BTreeMap<String, CertificateStatus>,
    ) -> WorkloadStatus {
        let local = &enrolled.local;
        let known = local.workload.load_full();
        let settings = self.settings(&local.namespace, &local.name);
        let certificate = known
            .as_ref()
            .and_then(|workload| certificates.get(&workload.identity.to_string()));
        let capture = if !local.netns.is_at_its_path() {
            format!(
                "{} is no longer its network namespace; if the workload has gone, un-enrol it",
                local.netns.path().display()
            )
        } else if !is_captured {
            "taken apart behind the agent's back; it is put back within seconds".to_owned()
        } else if known.is_none() {
            "captured, but unknown to the control plane: connections are refused".to_owned()
        } else {
            "ok".to_owned()
        };
        WorkloadStatus {
            namespace: local.namespace.to_string(),
            name: local.name.to_string(),
            uid: known.as_ref().map(|workload| workload.uid.clone()),
            identity: known.as_ref().map(|workload| workload.identity.clone()),
            addresses: local.addresses.clone(),
            netns: enrolled.record.enrolment.netns.clone(),
            netns_cookie: enrolled.record.cookie,
            capture,
            failure_mode: failure_mode(settings.failure_mode).to_owned(),
            same_node: self.same_node_word(enrolled, settings.same_node).to_owned(),
            connections: local
                .holds
                .connections
                .load(std::sync::atomic::Ordering::Relaxed),
            certificate_not_after: certificate.and_then(|c| c.not_after),
            certificate: certificate.map_or_else(|| "missing".to_owned(), describe),
        }
    }

    /// Without a cgroup of its own a workload cannot use the kernel path, whatever policy says.
    fn same_node_word(&self, enrolled: &Enrolled, setting: SameNode) -> &'static str {
        match (setting, &enrolled.record.enrolment.cgroup) {
            (SameNode::Kernel, Some(_)) => "kernel",
            _ => "tunnel",
        }
    }

    fn missing_status(&self) -> Vec<WorkloadStatus> {
        let describe = |missing: &super::enrolment::Missing| WorkloadStatus {
            namespace: missing.enrolment.namespace.clone(),
            name: missing.enrolment.name.clone(),
            uid: None,
            identity: None,
            addresses: missing
                .record
                .as_ref()
                .map(|record| record.addresses.clone())
                .unwrap_or_default(),
            netns: missing.enrolment.netns.clone(),
            netns_cookie: missing.record.as_ref().map_or(0, |record| record.cookie),
            capture: format!("not captured: {}", missing.reason),
            failure_mode: failure_mode(FailureMode::Closed).to_owned(),
            same_node: "tunnel".to_owned(),
            connections: 0,
            certificate_not_after: None,
            certificate: "missing".to_owned(),
        };
        self.missing().values().map(describe).collect()
    }

    /// Everything the agent believes.
    fn dump(&self) -> Value {
        // Connections need the index: it is free again before anything is written.
        let mesh = self.mesh.read().picture();
        json!({
            "config": self.config,
            "status": self.status(),
            "discovery": self.discovery_summary(),
            "mesh": mesh.dump(),
            "certificates": self.certificates.status(),
            "workers": self.workers.loads(),
            "sameNodeFlows": self.capture.same_node_flows().iter().map(|flow| json!({
                "source": flow.source.as_ref().map(full_name),
                "destination": flow.destination.as_ref().map(full_name),
                "sourceAddress": flow.source_address.to_string(),
                "destinationAddress": flow.destination_address.to_string(),
            })).collect::<Vec<_>>(),
        })
    }

    fn discovery_summary(&self) -> Value {
        let status = self.discovery.borrow();
        json!({
            "phase": status.phase.as_str(),
            "ready": status.ready,
            "lastError": status.last_error,
            "refused": status.refused,
            "lastRefusal": status.last_refusal,
            "streams": status.streams,
            "responses": status.responses,
            "nacks": status.nacks,
            "snapshot": status.snapshot().as_str(),
            "snapshotFailures": status.snapshot_failures,
        })
    }
}

fn full_name(enrolled: &Enrolled) -> String {
    format!("{}/{}", enrolled.local.namespace, enrolled.local.name)
}

fn failure_mode(mode: FailureMode) -> &'static str {
    match mode {
        FailureMode::Closed => "closed",
        FailureMode::Open => "open",
    }
}

fn describe(certificate: &CertificateStatus) -> String {
    match &certificate.last_error {
        Some(error) => format!("{}: {error}", certificate.state),
        None => certificate.state.to_string(),
    }
}

fn join(addresses: &[std::net::IpAddr]) -> String {
    addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
