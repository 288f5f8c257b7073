//! Workloads as their manifests describe them, before anything else of the mesh is known.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use mesh_api::{
    manifest::{
        ENROL_LABEL, ExternalLocality, ExternalWorkload, ISTIO_ENROL_LABEL, Toggle, parse_address,
    },
    proto::workload::WorkloadType,
};

pub(super) type Labels = BTreeMap<String, String>;

/// Label that names a workload's owner where no owner reference does.
const WORKLOAD_NAME_LABEL: &str = "weft.dev/workload-name";
/// Label that a ReplicaSet of a Deployment adds; its value ends the ReplicaSet's name.
const POD_TEMPLATE_HASH_LABEL: &str = "pod-template-hash";
/// Digits that a CronJob appends to the name of a Job: the scheduled time in minutes since 1970.
const CRON_JOB_SUFFIX_DIGITS: usize = 8;

/// What names a workload within the index.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct MemberKey {
    pub namespace: String,
    pub kind: MemberKind,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum MemberKind {
    Pod,
    External,
}

impl fmt::Display for MemberKey {
    /// The uid without the cluster: `<group>/<kind>/<namespace>/<name>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            MemberKind::Pod => "/Pod",
            MemberKind::External => "weft.dev/ExternalWorkload",
        };
        write!(f, "{kind}/{}/{}", self.namespace, self.name)
    }
}

/// A pod or an external workload.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Member {
    pub key: MemberKey,
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    pub node: String,
    pub service_account: String,
    /// Ready for new connections.
    pub healthy: bool,
    /// It has not ended.
    pub running: bool,
    pub host_network: bool,
    /// What the object itself says about enrolment.
    pub enrolled: Option<bool>,
    pub named_ports: BTreeMap<String, u16>,
    pub workload_type: WorkloadType,
    pub workload_name: String,
    pub network: Option<String>,
    pub locality: Option<ExternalLocality>,
    pub weight: Option<u32>,
}

impl Member {
    pub fn from_pod(namespace: &str, name: &str, pod: &Pod) -> Self {
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let (workload_type, workload_name) = owner(pod, name, &labels);
        let named_ports = spec
            .into_iter()
            .flat_map(|spec| {
                spec.containers
                    .iter()
                    .chain(spec.init_containers.iter().flatten())
            })
            .flat_map(|container| container.ports.iter().flatten())
            .filter(|port| {
                port.protocol
                    .as_deref()
                    .is_none_or(|protocol| protocol == "TCP")
            })
            .filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)))
            .collect();
        let phase = status.and_then(|status| status.phase.as_deref());
        Self {
            key: MemberKey {
                namespace: namespace.into(),
                kind: MemberKind::Pod,
                name: name.into(),
            },
            addresses: status.map(pod_addresses).unwrap_or_default(),
            node: spec
                .and_then(|spec| spec.node_name.clone())
                .unwrap_or_default(),
            service_account: spec
                .and_then(|spec| spec.service_account_name.clone())
                .filter(|account| !account.is_empty())
                .unwrap_or_else(|| "default".into()),
            healthy: pod.metadata.deletion_timestamp.is_none() && status.is_none_or(is_ready),
            running: !matches!(phase, Some("Succeeded" | "Failed")),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            enrolled: enrolment(&labels),
            labels,
            named_ports,
            workload_type,
            workload_name,
            network: None,
            locality: None,
            weight: None,
        }
    }

    pub fn from_external(namespace: &str, name: &str, workload: &ExternalWorkload) -> Self {
        let labels = workload.metadata.labels.clone().unwrap_or_default();
        let spec = &workload.spec;
        Self {
            key: MemberKey {
                namespace: namespace.into(),
                kind: MemberKind::External,
                name: name.into(),
            },
            addresses: spec
                .addresses
                .iter()
                .filter_map(|text| parse_address(text).ok())
                .collect(),
            node: spec.node.clone().unwrap_or_default(),
            service_account: spec
                .service_account
                .clone()
                .unwrap_or_else(|| "default".into()),
            healthy: workload.metadata.deletion_timestamp.is_none(),
            running: true,
            host_network: false,
            enrolled: match spec.mesh {
                Some(toggle) => Some(toggle == Toggle::Enabled),
                None => enrolment(&labels),
            },
            named_ports: spec.ports.clone(),
            workload_type: WorkloadType::Pod,
            workload_name: labels
                .get(WORKLOAD_NAME_LABEL)
                .cloned()
                .unwrap_or_else(|| name.into()),
            labels,
            network: spec.network.clone(),
            locality: spec.locality.clone(),
            weight: spec.weight,
        }
    }

    /// The name of the application, for telemetry.
    pub fn canonical_name(&self) -> &str {
        ["app.kubernetes.io/name", "app"]
            .iter()
            .find_map(|label| self.labels.get(*label))
            .map_or(&self.workload_name, String::as_str)
    }

    /// Its version, for telemetry.
    pub fn canonical_revision(&self) -> &str {
        ["app.kubernetes.io/version", "version"]
            .iter()
            .find_map(|label| self.labels.get(*label))
            .map_or("latest", String::as_str)
    }
}

/// What labels say about enrolment; Weft's own label wins over Istio's.
pub(super) fn enrolment(labels: &Labels) -> Option<bool> {
    match (labels.get(ENROL_LABEL), labels.get(ISTIO_ENROL_LABEL)) {
        (Some(value), _) => Some(value == "enabled"),
        (None, Some(value)) => Some(value == "ambient"),
        (None, None) => None,
    }
}

fn pod_addresses(status: &PodStatus) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses = Vec::new();
    for address in status.pod_ip.as_deref().into_iter().chain(listed) {
        if let Ok(address) = parse_address(address)
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

/// A kubelet always writes the condition; a manifest written by hand need not.
fn is_ready(status: &PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready")
        .is_none_or(|condition| condition.status == "True")
}

/// Type and name of what created a pod.
fn owner(pod: &Pod, name: &str, labels: &Labels) -> (WorkloadType, String) {
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut sorted: Vec<_> = owners.collect();
    sorted.sort_by_key(|owner| !owner.controller.unwrap_or(false));
    let Some(owner) = sorted.first() else {
        return match labels.get(WORKLOAD_NAME_LABEL) {
            Some(named) => (WorkloadType::Deployment, named.clone()),
            None => (WorkloadType::Pod, name.into()),
        };
    };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = labels
                .get(POD_TEMPLATE_HASH_LABEL)
                .map(|hash| format!("-{hash}"));
            let deployment = hash.and_then(|hash| owner.name.strip_suffix(&hash));
            (
                WorkloadType::Deployment,
                deployment.unwrap_or(&owner.name).into(),
            )
        }
        "Deployment" => (WorkloadType::Deployment, owner.name.clone()),
        "CronJob" => (WorkloadType::Cronjob, owner.name.clone()),
        "Job" => match owner.name.rsplit_once('-') {
            Some((cron_job, time))
                if time.len() >= CRON_JOB_SUFFIX_DIGITS
                    && time.bytes().all(|b| b.is_ascii_digit()) =>
            {
                (WorkloadType::Cronjob, cron_job.into())
            }
            _ => (WorkloadType::Job, owner.name.clone()),
        },
        _ => (WorkloadType::Pod, owner.name.clone()),
    }
}
