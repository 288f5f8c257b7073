//! The index as JSON, for the admin interface.

use serde_json::{Value, json};

use super::{
    model::{Policy, Service, Workload},
    state::MeshState,
};

/// Most resources of one kind in a dump. A dump is for a human or a support bundle; at some 500 bytes each this keeps
/// it near 5 MB, whatever the size of the mesh.
pub const DUMP_MAX: usize = 10_000;

impl MeshState {
    /// What is believed, by section, each cut at [`DUMP_MAX`] in the order of its keys (`total` counts all).
    #[must_use]
    pub fn dump(&self) -> Value {
        json!({
            "network": &*self.network,
            "workloads": section(self.workloads.values().map(|e| (&e.workload.uid, e)).collect(), |e| {
                workload(&e.workload, e.waypoint)
            }),
            "services": section(self.services.iter().collect(), |e| {
                service(&e.service, e.waypoint, self.members.get(&e.service.key).map_or(0, |m| m.entries.len()))
            }),
            "policies": section(self.policies.all.iter().collect(), |p| policy(p)),
            "deadDestinations": self.dead_destinations().iter().take(DUMP_MAX).collect::<Vec<_>>(),
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
