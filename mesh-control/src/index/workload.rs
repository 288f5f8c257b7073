//! Computes the workload resources of members and of slices' other endpoints.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_api::proto::{
    security::Authorization,
    weft::{CAPTURE_EXTENSION, CAPTURE_TYPE_URL},
    workload::{
        Extension, Locality, NetworkMode, PortList, TunnelProtocol, Workload, WorkloadStatus,
        WorkloadType,
    },
};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};

use super::{
    Diff, Index, Name, NamespaceState, ResourceType, alias,
    member::{Member, MemberKey, MemberKind, enrolment},
    policy::{Effective, Strictness},
    service::{ServiceSpec, SliceEndpoint, SliceSpec, address_bytes, contains_all},
};

/// Labels of a Node that say where it is.
const REGION_LABEL: &str = "topology.kubernetes.io/region";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const SUBZONE_LABEL: &str = "topology.istio.io/subzone";

/// Field number of `workload` in `Address`.
const ADDRESS_WORKLOAD_FIELD: u32 = 1;

type Services = BTreeMap<String, PortList>;

impl Index {
    pub(super) fn compute_member(&mut self, key: &MemberKey, diff: &mut Diff) {
        let name = format!("{}/{key}", self.mesh.cluster_id);
        let computed = self
            .namespaces
            .get(&key.namespace)
            .and_then(|state| Some((state, state.members.get(key)?)))
            .filter(|(_, member)| member.running && !member.addresses.is_empty())
            .map(|(state, member)| self.member_workload(&name, state, member));
        let strictness = computed.as_ref().map(|(.., strictness)| strictness.clone());
        self.count_strictness(key, strictness, diff);
        let Some((workload, services, _)) = computed else {
            self.store.remove(ResourceType::Address, &name, diff);
            return;
        };
        self.put_workload(&name, workload, &services, diff);
    }

    fn put_workload(
        &mut self,
        name: &str,
        workload: Workload,
        services: &Services,
        diff: &mut Diff,
    ) {
        let addresses = workload.addresses.iter().filter_map(|bytes| ip_of(bytes));
        let aliases = if workload.network_mode() == NetworkMode::HostNetwork {
            Vec::new()
        } else {
            addresses
                .map(|address| alias(&workload.network, address))
                .collect()
        };
        let names = services
            .keys()
            .map(|service| Arc::from(service.as_str()))
            .collect();
        let body = encode_address(&workload, services);
        self.store.put(
            ResourceType::Address,
            name,
            body.into(),
            aliases,
            names,
            diff,
        );
    }

    fn member_workload(
        &self,
        uid: &str,
        state: &NamespaceState,
        member: &Member,
    ) -> (Workload, Services, Strictness) {
        let root = &self.mesh.root_namespace;
        let effective = Effective::of(root, member, self.mesh_policies.values());
        let enrolled = member
            .enrolled
            .or_else(|| enrolment(&state.labels))
            .unwrap_or(false);
        let tunnel = if enrolled && !member.host_network {
            TunnelProtocol::Hbone
        } else {
            TunnelProtocol::None
        };
        let healthy = member.healthy && !listed_unready(state, member);
        let network_mode = if member.host_network {
            NetworkMode::HostNetwork
        } else {
            NetworkMode::Standard
        };
        let strict = effective.strict.policy(root);
        let workload = Workload {
            uid: uid.into(),
            name: member.key.name.clone(),
            namespace: member.key.namespace.clone(),
            addresses: member
                .addresses
                .iter()
                .map(|address| address_bytes(*address))
                .collect(),
            network: member
                .network
                .clone()
                .unwrap_or_else(|| self.mesh.network.clone()),
            tunnel_protocol: tunnel.into(),
            trust_domain: self.mesh.trust_domain.clone(),
            service_account: member.service_account.clone(),
            node: member.node.clone(),
            canonical_name: member.canonical_name().into(),
            canonical_revision: member.canonical_revision().into(),
            workload_type: member.workload_type.into(),
            workload_name: member.workload_name.clone(),
            authorization_policies: self.listed_policies(member, strict.as_ref()),
            status: status(healthy).into(),
            cluster_id: self.mesh.cluster_id.clone(),
            locality: self.locality(member),
            network_mode: network_mode.into(),
            extensions: effective.capture().iter().map(capture_extension).collect(),
            capacity: member.weight,
            ..Workload::default()
        };
        (workload, services_of(state, member), effective.strict)
    }

    /// Selector-scoped policies that apply, sorted.
    fn listed_policies(&self, member: &Member, strict: Option<&Authorization>) -> Vec<String> {
        let root = &self.mesh.root_namespace;
        let selecting = self.authorizations.iter().filter(|((namespace, _), spec)| {
            (*namespace == member.key.namespace || namespace == root)
                && spec
                    .selector
                    .as_ref()
                    .is_some_and(|labels| contains_all(&member.labels, labels))
        });
        let mut listed: Vec<_> = selecting
            .map(|((namespace, name), _)| format!("{namespace}/{name}"))
            .collect();
        listed.extend(strict.map(|policy| format!("{}/{}", policy.namespace, policy.name)));
        listed.sort_unstable();
        listed
    }

    fn locality(&self, member: &Member) -> Option<Locality> {
        if let Some(own) = &member.locality {
            let (region, zone, subzone) =
                (own.region.clone(), own.zone.clone(), own.subzone.clone());
            return Some(Locality {
                region,
                zone,
                subzone,
            });
        }
        let labels = self.node_labels.get(&member.node)?;
        let label = |name: &str| labels.get(name).cloned().unwrap_or_default();
        let locality = Locality {
            region: label(REGION_LABEL),
            zone: label(ZONE_LABEL),
            subzone: label(SUBZONE_LABEL),
        };
        (locality != Locality::default()).then_some(locality)
    }

    /// Keeps a generated policy as long as a workload lists it.
    fn count_strictness(&mut self, key: &MemberKey, new: Option<Strictness>, diff: &mut Diff) {
        let root = self.mesh.root_namespace.clone();
        let old = match &new {
            Some(new) => self.member_strictness.insert(key.clone(), new.clone()),
            None => self.member_strictness.remove(key),
        };
        if old == new {
            return;
        }
        let kind = ResourceType::Authorization;
        if let Some(new) = new {
            let users = self.strict_users.entry(new.clone()).or_default();
            *users += 1;
            if *users == 1
                && let Some(policy) = new.policy(&root)
            {
                let name = format!("{root}/{}", policy.name);
                let body = policy.encode_to_vec();
                self.store
                    .put(kind, &name, body.into(), Vec::new(), Vec::new(), diff);
            }
        }
        let Some(old) = old else { return };
        let Some(users) = self.strict_users.get_mut(&old) else {
            return;
        };
        *users -= 1;
        if *users == 0 {
            self.strict_users.remove(&old);
            if let Some(policy) = old.policy(&root) {
                self.store
                    .remove(kind, &format!("{root}/{}", policy.name), diff);
            }
        }
    }

    /// Endpoints of a selector-less service that are neither pods nor external workloads become plain workloads.
    pub(super) fn compute_slice(&mut self, name: &Name, diff: &mut Diff) {
        let computed = self.slice_workloads(name);
        let new = computed.iter().map(|(uid, ..)| uid.clone()).collect();
        let old = self
            .slice_outputs
            .insert(name.clone(), new)
            .unwrap_or_default();
        for (uid, workload, services) in computed {
            self.put_workload(&uid, workload, &services, diff);
        }
        let Some(new) = self.slice_outputs.get(name) else {
            return;
        };
        for uid in old.difference(new) {
            self.store.remove(ResourceType::Address, uid, diff);
        }
        if new.is_empty() {
            self.slice_outputs.remove(name);
        }
    }

    fn slice_workloads(&self, (namespace, name): &Name) -> Vec<(String, Workload, Services)> {
        let Some(state) = self.namespaces.get(namespace) else {
            return Vec::new();
        };
        let Some(slice) = state.slices.get(name) else {
            return Vec::new();
        };
        let Some(service) = slice_service(state, slice) else {
            return Vec::new();
        };
        let strangers = slice.endpoints.iter().filter(|endpoint| {
            let known = |address| self.address_members.contains_key(address);
            endpoint.target.is_none()
                && !endpoint.addresses.is_empty()
                && !endpoint.addresses.iter().any(known)
        });
        strangers
            .filter_map(|endpoint| {
                let address = endpoint.addresses.first()?;
                let uid = format!(
                    "{}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}",
                    self.mesh.cluster_id
                );
                let services = Services::from([(service.key(), service.slice_ports(slice))]);
                Some((
                    uid.clone(),
                    self.stranger(uid, namespace, name, endpoint),
                    services,
                ))
            })
            .collect()
    }

    fn stranger(
        &self,
        uid: String,
        namespace: &str,
        name: &str,
        endpoint: &SliceEndpoint,
    ) -> Workload {
        let zone = endpoint.zone.clone();
        Workload {
            uid,
            name: name.into(),
            namespace: namespace.into(),
            addresses: endpoint
                .addresses
                .iter()
                .map(|address| address_bytes(*address))
                .collect(),
            network: self.mesh.network.clone(),
            tunnel_protocol: TunnelProtocol::None.into(),
            trust_domain: self.mesh.trust_domain.clone(),
            node: endpoint.node.clone(),
            canonical_name: name.into(),
            canonical_revision: "latest".into(),
            workload_type: WorkloadType::Pod.into(),
            workload_name: name.into(),
            status: status(endpoint.ready).into(),
            cluster_id: self.mesh.cluster_id.clone(),
            locality: (!zone.is_empty()).then(|| Locality {
                zone,
                ..Locality::default()
            }),
            ..Workload::default()
        }
    }
}

fn status(healthy: bool) -> WorkloadStatus {
    if healthy {
        WorkloadStatus::Healthy
    } else {
        WorkloadStatus::Unhealthy
    }
}

fn capture_extension(capture: &mesh_api::proto::weft::Capture) -> Extension {
    Extension {
        name: CAPTURE_EXTENSION.into(),
        config: Some(prost_types::Any {
            type_url: CAPTURE_TYPE_URL.into(),
            value: capture.encode_to_vec(),
        }),
    }
}

/// Pods report their readiness themselves; for an external workload a slice may.
fn listed_unready(state: &NamespaceState, member: &Member) -> bool {
    member.key.kind == MemberKind::External
        && state
            .slices
            .values()
            .flat_map(|slice| &slice.endpoints)
            .any(|endpoint| !endpoint.ready && endpoint.is(member))
}

/// The service of a slice, if its endpoints come from slices at all.
fn slice_service<'a>(state: &'a NamespaceState, slice: &SliceSpec) -> Option<&'a ServiceSpec> {
    let service = state.services.get(slice.service.as_deref()?)?;
    service.selector.is_none().then_some(service)
}

fn services_of(state: &NamespaceState, member: &Member) -> Services {
    let selecting = state
        .services
        .values()
        .filter(|service| service.selects(&member.labels));
    let mut services: Services = selecting
        .map(|service| (service.key(), service.endpoint_ports(member)))
        .collect();
    for slice in state.slices.values() {
        if let Some(service) = slice_service(state, slice)
            && slice.endpoints.iter().any(|endpoint| endpoint.is(member))
        {
            services.insert(service.key(), service.slice_ports(slice));
        }
    }
    services.retain(|_, ports| !ports.ports.is_empty());
    services
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// Encodes an `Address` holding `workload` such that equal content has equal bytes. The generated type keeps
/// `services` in a hash map, whose order is random; a message may be encoded in parts (Protocol Buffers encoding:
/// concatenated messages merge), so each service is a part of its own, in order.
fn encode_address(workload: &Workload, services: &Services) -> Vec<u8> {
    let mut inner = workload.encode_to_vec();
    for (name, ports) in services {
        let part = Workload {
            services: [(name.clone(), ports.clone())].into(),
            ..Workload::default()
        };
        part.encode_raw(&mut inner);
    }
    let mut body = Vec::with_capacity(inner.len() + 8);
    encode_key(ADDRESS_WORKLOAD_FIELD, WireType::LengthDelimited, &mut body);
    encode_varint(inner.len() as u64, &mut body);
    body.extend_from_slice(&inner);
    body
}
