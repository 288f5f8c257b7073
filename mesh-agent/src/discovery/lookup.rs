//! What the data path asks of the index: who owns an address, and where a connection goes.

use std::{
    cmp::Reverse,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_api::{identity::Identity, names::NamespacedName, proto::workload::IpFamilies};

use super::{
    model::{BalancingMode, Endpoint, Refusal, Route, Scope, Service, Tunnel, Workload},
    state::{MeshState, ServiceEntry, WorkloadEntry},
};

/// What [`BalancingMode::Standard`] prefers: the nearest place, but not the same node, which would load the endpoints
/// of busy nodes only.
const STANDARD_PREFERENCE: [Scope; 3] = [Scope::Region, Scope::Zone, Scope::Subzone];

impl MeshState {
    /// The workload that owns `address` in this node's network; IPv4-mapped addresses are taken in their IPv4 form.
    #[must_use]
    pub fn workload_by_address(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let entry = self.owner(&self.network, address.to_canonical())?;
        Some(Arc::clone(&entry.workload))
    }

    /// Where a connection from `source` to `destination` goes: service address first, then workload address.
    #[must_use]
    pub fn route(&self, source: &Workload, destination: SocketAddr) -> Route {
        let address = destination.ip().to_canonical();
        let port = destination.port();
        if let Some(entry) = self.service_for(source, address) {
            return self.route_to_service(source, entry, address, port);
        }
        let Some(entry) = self.owner(&source.network, address) else {
            return Route::Passthrough;
        };
        let workload = Arc::clone(&entry.workload);
        if entry.waypoint {
            let destination = NamespacedName {
                namespace: workload.namespace.clone(),
                name: workload.name.clone(),
            };
            return Route::Refused {
                destination,
                reason: Refusal::Waypoint,
            };
        }
        Route::Workload(Endpoint {
            workload,
            address: SocketAddr::new(address, port),
            identities: Arc::clone(&entry.identities),
            rank: 0,
        })
    }

    /// Of several workloads at one address: a pod, then one with a tunnel, then the one that came last.
    fn owner(&self, network: &str, address: IpAddr) -> Option<&Arc<WorkloadEntry>> {
        let owners = self.by_address.get(network)?.get(&address)?;
        owners.iter().max_by_key(|e| {
            (
                e.workload.uid.0.contains("//Pod/"),
                e.workload.tunnel == Tunnel::Hbone,
            )
        })
    }

    /// Of several services at one address: an exact address before a range; the client's own namespace; for ranges
    /// the longer prefix; the canonical one; and so that every agent chooses the same, the first by name.
    fn service_for(&self, source: &Workload, address: IpAddr) -> Option<&Arc<ServiceEntry>> {
        let visible = |key: &NamespacedName| {
            let entry = self.services.get(key)?;
            let own = entry.service.key.namespace == source.namespace;
            (own || !entry.service.namespace_only).then_some((own, entry))
        };
        let exact = self
            .by_vip
            .get(&source.network)
            .and_then(|vips| vips.get(&address));
        let exact = exact.into_iter().flatten().filter_map(visible);
        let exact =
            exact.max_by_key(|(own, e)| (*own, e.service.canonical, Reverse(&e.service.key)));
        if let Some((_, entry)) = exact {
            return Some(entry);
        }
        let ranges = self.ranges.get(&source.network)?.containing(address);
        let ranges = ranges
            .filter_map(|(length, key)| visible(key).map(|(own, entry)| (own, length, entry)));
        ranges
            .max_by_key(|(own, length, e)| {
                (*own, *length, e.service.canonical, Reverse(&e.service.key))
            })
            .map(|(_, _, entry)| entry)
    }

    fn route_to_service(
        &self,
        source: &Workload,
        entry: &ServiceEntry,
        address: IpAddr,
        port: u16,
    ) -> Route {
        let service = Arc::clone(&entry.service);
        if entry.waypoint {
            return Route::Refused {
                destination: service.key.clone(),
                reason: Refusal::Waypoint,
            };
        }
        if service.mode == BalancingMode::Passthrough {
            return Route::Passthrough;
        }
        let endpoints = match service.ports.get(&port) {
            Some(target) => self.endpoints(source, entry, address, port, *target),
            None => Vec::new(),
        };
        if endpoints.is_empty() {
            Route::NoEndpoint { service }
        } else {
            Route::Service { service, endpoints }
        }
    }

    fn endpoints(
        &self,
        source: &Workload,
        entry: &ServiceEntry,
        address: IpAddr,
        port: u16,
        service_target: u16,
    ) -> Vec<Endpoint> {
        let service = &entry.service;
        let Some(members) = self.members.get(&service.key) else {
            return Vec::new();
        };
        let usable = members.entries.values().filter_map(|member| {
            let workload = &member.workload;
            // Other networks are behind gateways, which this agent does not support.
            if workload.network != source.network || !(workload.healthy || service.allow_unhealthy)
            {
                return None;
            }
            let mapped = workload
                .services
                .get(&service.key)
                .and_then(|ports| ports.get(&port))
                .copied();
            let target = mapped.or((service_target > 0).then_some(service_target))?;
            Some(Endpoint {
                address: SocketAddr::new(
                    endpoint_address(workload, entry.families, address)?,
                    target,
                ),
                identities: accepted_identities(member, service),
                rank: rank(source, workload, service)?,
                workload: Arc::clone(workload),
            })
        });
        usable.collect()
    }
}

/// One of the families that the service has; the one that the client asked for, if there is a choice.
fn endpoint_address(
    workload: &Workload,
    families: IpFamilies,
    requested: IpAddr,
) -> Option<IpAddr> {
    let fits = |address: &&IpAddr| match families {
        IpFamilies::Ipv4Only => address.is_ipv4(),
        IpFamilies::Ipv6Only => address.is_ipv6(),
        IpFamilies::Automatic | IpFamilies::Dual => true,
    };
    let same_family = |address: &&IpAddr| address.is_ipv4() == requested.is_ipv4();
    let mut fitting = workload.addresses.iter().filter(fits);
    let first = fitting.clone().next()?;
    Some(*fitting.find(same_family).unwrap_or(first))
}

fn accepted_identities(member: &WorkloadEntry, service: &Service) -> Arc<[Identity]> {
    if service.subject_alt_names.is_empty() {
        return Arc::clone(&member.identities);
    }
    member
        .identities
        .iter()
        .chain(&service.subject_alt_names)
        .cloned()
        .collect()
}

/// How many of the preferred scopes, from the first mismatch on, the endpoint does not share with the client; `None`
/// when a strict service must not use it.
fn rank(source: &Workload, endpoint: &Workload, service: &Service) -> Option<u8> {
    let scopes = match service.mode {
        BalancingMode::Standard if service.preference.is_empty() => STANDARD_PREFERENCE.as_slice(),
        _ => service.preference.as_slice(),
    };
    let shared = scopes
        .iter()
        .take_while(|scope| shares(**scope, source, endpoint))
        .count();
    let missed = scopes.len() - shared;
    if service.mode == BalancingMode::Strict && missed > 0 {
        return None;
    }
    // Conversion admits six scopes.
    Some(u8::try_from(missed).unwrap_or(u8::MAX))
}

fn shares(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster == b.cluster,
        Scope::Network => a.network == b.network,
    }
}
