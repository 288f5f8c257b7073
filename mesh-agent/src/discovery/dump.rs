//! The index as JSON, for the admin interface.

use std::{net::SocketAddr, sync::Arc};

use serde_json::{Value, json};

use super::{
    model::{Policy, Service, Workload},
    state::{MeshState, ServiceEntry, WorkloadEntry},
};

/// Most resources of one kind in a dump. A dump is for a human or a support bundle; at some 500 bytes each this keeps
/// it near 5 MB, whatever the size of the mesh.
pub const DUMP_MAX: usize = 10_000;

/// What the index held at one moment. Taking it costs a reference per resource, so the index need not be locked while
/// it is written out.
#[derive(Debug)]
pub struct Picture {
    network: Arc<str>,
    workloads: Vec<Arc<WorkloadEntry>>,
    /// With the number of their members.
    services: Vec<(Arc<ServiceEntry>, usize)>,
    policies: Vec<Arc<Policy>>,
    dead: Vec<SocketAddr>,
}

impl MeshState {
    /// What is believed now.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let members = |entry: &ServiceEntry| {
            let members = self.members.get(&entry.service.key);
            members.map_or(0, |members| members.entries.len())
        };
        let services = self.services.values();
        Picture {
            network: self.network.clone(),
            workloads: self.workloads.values().cloned().collect(),
            services: services
                .map(|entry| (entry.clone(), members(entry)))
                .collect(),
            policies: self.policies.all.values().cloned().collect(),
            dead: self.dead_destinations(),
        }
    }

    /// [`Picture::dump`] of now.
    #[must_use]
    pub fn dump(&self) -> Value {
        self.picture().dump()
    }
}

impl Picture {
    /// What was believed, by section, each cut at [`DUMP_MAX`] in the order of its keys (`total` counts all).
    #[must_use]
    pub fn dump(&self) -> Value {
        let workloads = self
            .workloads
            .iter()
            .map(|entry| (&entry.workload.uid, entry));
        let services = self
            .services
            .iter()
            .map(|entry| (&entry.0.service.key, entry));
        let policies = self.policies.iter().map(|policy| (&policy.key, policy));
        json!({
            "network": &*self.network,
            "workloads": section(workloads.collect(), |e| workload(&e.workload, e.waypoint)),
            "services": section(services.collect(), |(e, members)| service(&e.service, e.waypoint, *members)),
            "policies": section(policies.collect(), |p| policy(p)),
            "deadDestinations": self.dead.iter().take(DUMP_MAX).collect::<Vec<_>>(),
        })
    }
}

fn section<K: Ord, V>(mut items: Vec<(K, V)>, show: impl Fn(&V) -> Value) -> Value {
    let total = items.len();
    items.sort_by(|a, b| a.0.cmp(&b.0));
    items.truncate(DUMP_MAX);
    json!({ "total": total, "items": items.iter().map(|(_, item)| show(item)).collect::<Vec<_>>() })
}

fn workload(w: &Workload, waypoint: bool) -> Value {
    let services: serde_json::Map<String, Value> = w
        .services
        .iter()
        .map(|(key, ports)| (key.to_string(), json!(ports)))
        .collect();
    json!({
        "uid": w.uid, "name": &*w.name, "namespace": &*w.namespace, "identity": w.identity,
        "addresses": w.addresses, "network": &*w.network, "node": &*w.node, "cluster": &*w.cluster,
        "tunnel": format!("{:?}", w.tunnel), "healthy": w.healthy, "hostNetwork": w.host_network,
        "capacity": w.capacity, "waypoint": waypoint, "services": services, "policies": w.policies,
        "locality": [&*w.locality.region, &*w.locality.zone, &*w.locality.subzone],
        "failureMode": format!("{:?}", w.capture.failure_mode), "sameNode": format!("{:?}", w.capture.same_node),
    })
}

fn service(s: &Service, waypoint: bool, members: usize) -> Value {
    json!({
        "key": s.key, "vips": s.vips, "vipRanges": s.vip_ranges, "ports": s.ports, "members": members,
        "mode": format!("{:?}", s.mode), "namespaceOnly": s.namespace_only, "canonical": s.canonical,
        "subjectAltNames": s.subject_alt_names, "waypoint": waypoint,
    })
}

fn policy(p: &Policy) -> Value {
    json!({
        "key": p.key, "action": format!("{:?}", p.compiled.action), "scope": format!("{:?}", p.compiled.reach),
        "dryRun": p.compiled.dry_run, "refused": p.compiled.stand_in, "rules": format!("{:?}", p.spec.rules),
    })
}
