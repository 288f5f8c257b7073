//! The index: from objects to resources. Pure and synchronous; it knows no file, no API server, no clock.
//!
//! ```text
//!  Pod, ExternalWorkload ──► Member ──┐
//!  Namespace, Node (labels) ──────────┼──► Workload ──┐
//!  Service ──► ServiceSpec ───────────┤               ├──► Store: Address
//!  EndpointSlice ──► SliceSpec ───────┘   Service ────┘
//!  AuthorizationPolicy ─────────────────► policies ───┐
//!  MeshPolicy ──► strictness of a Member ─► policies ─┴──► Store: Authorization
//! ```
//!
//! A change recomputes only what can depend on it: a pod its own workload, a service the workloads that it selected or
//! selects, a namespace or node what lives there.

mod member;
mod policy;
mod service;
mod store;
mod workload;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use mesh_api::{
    identity::Identity,
    manifest::{Kind, Object, ObjectKey},
    proto::workload::{Address, address},
};
use prost::Message;

use member::{Labels, Member, MemberKey, MemberKind};
use policy::{AuthorizationSpec, MeshSpec, Strictness};
use service::{ServiceSpec, SliceSpec};

pub use store::{CHANGE_LOG_MAX, Diff, Resource, ResourceType, Store};

use crate::config::MeshConfig;

/// A change of the input.
#[derive(Debug, Clone)]
pub enum Change {
    /// The object is new or different.
    Upsert(Arc<Object>),
    /// The object is gone.
    Remove(ObjectKey),
}

/// Namespace and name.
type Name = (String, String);

/// What lives in one namespace.
#[derive(Debug, Default)]
struct NamespaceState {
    labels: Labels,
    members: BTreeMap<MemberKey, Member>,
    services: BTreeMap<String, ServiceSpec>,
    slices: BTreeMap<String, SliceSpec>,
}

/// Objects and the resources that follow from them.
#[derive(Debug)]
pub struct Index {
    mesh: MeshConfig,
    namespaces: HashMap<String, NamespaceState>,
    node_labels: HashMap<String, Labels>,
    node_members: HashMap<String, BTreeSet<MemberKey>>,
    address_members: HashMap<IpAddr, BTreeSet<MemberKey>>,
    /// Endpoints that slices list and that are no member, by address.
    address_slices: HashMap<IpAddr, BTreeSet<Name>>,
    authorizations: BTreeMap<Name, AuthorizationSpec>,
    mesh_policies: BTreeMap<Name, MeshSpec>,
    /// Number of workloads that list a generated policy.
    strict_users: BTreeMap<Strictness, usize>,
    member_strictness: HashMap<MemberKey, Strictness>,
    /// Names of the workloads that were made from a slice.
    slice_outputs: BTreeMap<Name, BTreeSet<String>>,
    objects: BTreeMap<Kind, usize>,
    known: BTreeSet<ObjectKey>,
    store: Store,
}

/// What a batch made necessary to compute again.
#[derive(Debug, Default)]
struct Dirty {
    members: BTreeSet<MemberKey>,
    slices: BTreeSet<Name>,
}

impl Index {
    /// An empty index.
    #[must_use]
    pub fn new(mesh: MeshConfig) -> Self {
        Self {
            mesh,
            namespaces: HashMap::new(),
            node_labels: HashMap::new(),
            node_members: HashMap::new(),
            address_members: HashMap::new(),
            address_slices: HashMap::new(),
            authorizations: BTreeMap::new(),
            mesh_policies: BTreeMap::new(),
            strict_users: BTreeMap::new(),
            member_strictness: HashMap::new(),
            slice_outputs: BTreeMap::new(),
            objects: BTreeMap::new(),
            known: BTreeSet::new(),
            store: Store::default(),
        }
    }

    /// The resources.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Empties the change log, as many changes would.
    #[cfg(test)]
    pub(crate) fn forget_log(&mut self) {
        self.store.forget_log();
    }

    /// Number of objects of a kind.
    #[must_use]
    pub fn objects(&self, kind: Kind) -> usize {
        self.objects.get(&kind).copied().unwrap_or(0)
    }

    /// Whether a workload of that identity runs on `node`: the question on which signing depends. What shares the node's own
    /// network is never enrolled and gets no certificate.
    #[must_use]
    pub fn runs_on(&self, node: &str, identity: &Identity) -> bool {
        identity.trust_domain() == self.mesh.trust_domain
            && self
                .node_members
                .get(node)
                .into_iter()
                .flatten()
                .any(|key| {
                    key.namespace == identity.namespace()
                        && self.member(key).is_some_and(|member| {
                            member.running
                                && !member.host_network
                                && member.service_account == identity.service_account()
                        })
                })
    }

    /// Applies a batch; streams see it as one generation.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Diff {
        let mut diff = Diff::default();
        let mut dirty = Dirty::default();
        for change in changes {
            match change {
                Change::Upsert(object) => self.upsert(&object, &mut dirty, &mut diff),
                Change::Remove(key) => self.remove(&key, &mut dirty, &mut diff),
            }
        }
        for key in &dirty.members {
            self.compute_member(key, &mut diff);
        }
        for name in &dirty.slices {
            self.compute_slice(name, &mut diff);
        }
        self.store.commit(&diff);
        diff
    }

    fn upsert(&mut self, object: &Object, dirty: &mut Dirty, diff: &mut Diff) {
        let key = object.key();
        let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
        match object {
            Object::Namespace(object) => {
                let labels = object.metadata.labels.clone().unwrap_or_default();
                self.set_namespace_labels(name, labels, dirty);
            }
            Object::Node(object) => {
                let labels = object.metadata.labels.clone().unwrap_or_default();
                self.set_node_labels(name, Some(labels), dirty);
            }
            // Accounts are named by their users; the object itself adds nothing to the mesh.
            Object::ServiceAccount(_) => {}
            Object::Pod(pod) => {
                self.set_member(Member::from_pod(namespace, name, pod), dirty);
            }
            Object::ExternalWorkload(workload) => {
                self.set_member(Member::from_external(namespace, name, workload), dirty);
            }
            Object::Service(service) => {
                let spec = ServiceSpec::from_manifest(&self.mesh, namespace, name, service);
                self.set_service(namespace, name, Some(spec), dirty, diff);
            }
            Object::EndpointSlice(slice) => {
                let spec = SliceSpec::from_manifest(namespace, slice);
                self.set_slice(namespace, name, Some(spec), dirty);
            }
            Object::AuthorizationPolicy(policy) => {
                let root = &self.mesh.root_namespace;
                let spec = AuthorizationSpec::from_manifest(root, namespace, name, policy);
                self.set_authorization(namespace, name, Some(spec), dirty, diff);
            }
            Object::MeshPolicy(policy) => {
                let spec = MeshSpec::from_manifest(namespace, name, policy);
                self.set_mesh_policy(namespace, name, Some(spec), dirty);
            }
        }
        if self.known.insert(key.clone()) {
            *self.objects.entry(key.kind).or_default() += 1;
        }
    }

    fn remove(&mut self, key: &ObjectKey, dirty: &mut Dirty, diff: &mut Diff) {
        if !self.known.remove(key) {
            return;
        }
        if let Some(count) = self.objects.get_mut(&key.kind) {
            *count -= 1;
        }
        let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
        let member = |kind| MemberKey {
            namespace: namespace.into(),
            kind,
            name: name.into(),
        };
        match key.kind {
            Kind::Namespace => self.set_namespace_labels(name, Labels::new(), dirty),
            Kind::Node => self.set_node_labels(name, None, dirty),
            Kind::ServiceAccount => {}
            Kind::Pod => self.drop_member(&member(MemberKind::Pod), dirty),
            Kind::ExternalWorkload => self.drop_member(&member(MemberKind::External), dirty),
            Kind::Service => self.set_service(namespace, name, None, dirty, diff),
            Kind::EndpointSlice => self.set_slice(namespace, name, None, dirty),
            Kind::AuthorizationPolicy => self.set_authorization(namespace, name, None, dirty, diff),
            Kind::MeshPolicy => self.set_mesh_policy(namespace, name, None, dirty),
        }
    }

    fn member(&self, key: &MemberKey) -> Option<&Member> {
        self.namespaces.get(&key.namespace)?.members.get(key)
    }

    fn namespace(&mut self, name: &str) -> &mut NamespaceState {
        self.namespaces.entry(name.to_owned()).or_default()
    }

    fn set_namespace_labels(&mut self, name: &str, labels: Labels, dirty: &mut Dirty) {
        let namespace = self.namespace(name);
        if namespace.labels != labels {
            namespace.labels = labels;
            dirty.members.extend(namespace.members.keys().cloned());
        }
    }

    fn set_node_labels(&mut self, name: &str, labels: Option<Labels>, dirty: &mut Dirty) {
        match labels {
            Some(labels) => self.node_labels.insert(name.into(), labels),
            None => self.node_labels.remove(name),
        };
        dirty
            .members
            .extend(self.node_members.get(name).into_iter().flatten().cloned());
    }

    fn set_member(&mut self, member: Member, dirty: &mut Dirty) {
        self.drop_member(&member.key, dirty);
        let key = member.key.clone();
        self.node_members
            .entry(member.node.clone())
            .or_default()
            .insert(key.clone());
        for address in &member.addresses {
            self.address_members
                .entry(*address)
                .or_default()
                .insert(key.clone());
            dirty.slices.extend(
                self.address_slices
                    .get(address)
                    .into_iter()
                    .flatten()
                    .cloned(),
            );
        }
        self.namespace(&key.namespace).members.insert(key, member);
    }

    fn drop_member(&mut self, key: &MemberKey, dirty: &mut Dirty) {
        dirty.members.insert(key.clone());
        let Some(old) = self.namespace(&key.namespace).members.remove(key) else {
            return;
        };
        forget(&mut self.node_members, &old.node, key);
        for address in &old.addresses {
            forget(&mut self.address_members, address, key);
            dirty.slices.extend(
                self.address_slices
                    .get(address)
                    .into_iter()
                    .flatten()
                    .cloned(),
            );
        }
    }

    fn set_service(
        &mut self,
        namespace: &str,
        name: &str,
        spec: Option<ServiceSpec>,
        dirty: &mut Dirty,
        diff: &mut Diff,
    ) {
        let state = self.namespace(namespace);
        let old = match &spec {
            Some(spec) => state.services.insert(name.into(), spec.clone()),
            None => state.services.remove(name),
        };
        for (slice_name, slice) in &state.slices {
            if slice.service.as_deref() == Some(name) {
                dirty.slices.insert((namespace.into(), slice_name.clone()));
            }
        }
        let versions = || old.iter().chain(&spec);
        let selected = versions().flat_map(|service| {
            state
                .members
                .values()
                .filter(|member| service.selects(&member.labels))
        });
        dirty
            .members
            .extend(selected.map(|member| member.key.clone()));
        self.dirty_slice_members(namespace, name, dirty);
        if let Some(old) = &old
            && spec.is_none()
        {
            self.store.remove(ResourceType::Address, &old.key(), diff);
        }
        let Some(spec) = spec else { return };
        let aliases = spec
            .vips
            .iter()
            .map(|vip| alias(&self.mesh.network, *vip))
            .collect();
        let name = spec.key();
        let body = Address {
            r#type: Some(address::Type::Service(spec.wire)),
        }
        .encode_to_vec();
        self.store.put(
            ResourceType::Address,
            &name,
            body.into(),
            aliases,
            Vec::new(),
            diff,
        );
    }

    /// Members that the slices of a service list.
    fn dirty_slice_members(&self, namespace: &str, service: &str, dirty: &mut Dirty) {
        let Some(state) = self.namespaces.get(namespace) else {
            return;
        };
        for slice in state
            .slices
            .values()
            .filter(|slice| slice.service.as_deref() == Some(service))
        {
            self.dirty_listed(slice, dirty);
        }
    }

    fn dirty_listed(&self, slice: &SliceSpec, dirty: &mut Dirty) {
        for endpoint in &slice.endpoints {
            dirty.members.extend(endpoint.target.clone());
            for address in &endpoint.addresses {
                let members = self.address_members.get(address).into_iter().flatten();
                dirty.members.extend(members.cloned());
            }
        }
    }

    fn set_slice(
        &mut self,
        namespace: &str,
        name: &str,
        spec: Option<SliceSpec>,
        dirty: &mut Dirty,
    ) {
        let key: Name = (namespace.into(), name.into());
        let state = self.namespace(namespace);
        let old = match &spec {
            Some(spec) => state.slices.insert(name.into(), spec.clone()),
            None => state.slices.remove(name),
        };
        for slice in old.iter().chain(&spec) {
            self.dirty_listed(slice, dirty);
        }
        let addresses = |slice: &SliceSpec| -> Vec<IpAddr> {
            slice
                .endpoints
                .iter()
                .flat_map(|endpoint| endpoint.addresses.clone())
                .collect()
        };
        for address in old.iter().flat_map(addresses) {
            forget(&mut self.address_slices, &address, &key);
        }
        for address in spec.iter().flat_map(addresses) {
            self.address_slices
                .entry(address)
                .or_default()
                .insert(key.clone());
        }
        dirty.slices.insert(key);
    }

    fn set_authorization(
        &mut self,
        namespace: &str,
        name: &str,
        spec: Option<AuthorizationSpec>,
        dirty: &mut Dirty,
        diff: &mut Diff,
    ) {
        let key: Name = (namespace.into(), name.into());
        let resource = format!("{namespace}/{name}");
        let old = match &spec {
            Some(spec) => self.authorizations.insert(key, spec.clone()),
            None => self.authorizations.remove(&key),
        };
        match &spec {
            Some(spec) => {
                let body = spec.wire.encode_to_vec();
                let kind = ResourceType::Authorization;
                self.store
                    .put(kind, &resource, body.into(), Vec::new(), Vec::new(), diff);
            }
            None => self
                .store
                .remove(ResourceType::Authorization, &resource, diff),
        }
        let selectors = [
            old.and_then(|old| old.selector),
            spec.and_then(|spec| spec.selector),
        ];
        if selectors[0] != selectors[1] {
            for selector in selectors.iter().flatten() {
                self.dirty_selected(namespace, Some(selector), dirty);
            }
        }
    }

    fn set_mesh_policy(
        &mut self,
        namespace: &str,
        name: &str,
        spec: Option<MeshSpec>,
        dirty: &mut Dirty,
    ) {
        let key: Name = (namespace.into(), name.into());
        let old = match &spec {
            Some(spec) => self.mesh_policies.insert(key, spec.clone()),
            None => self.mesh_policies.remove(&key),
        };
        for spec in old.iter().chain(&spec) {
            self.dirty_selected(namespace, spec.selector.as_ref(), dirty);
        }
    }

    /// Members to which a policy of `namespace` applies: those of every namespace when it is the root namespace.
    fn dirty_selected(&self, namespace: &str, selector: Option<&Labels>, dirty: &mut Dirty) {
        let everywhere = namespace == self.mesh.root_namespace;
        let states = self
            .namespaces
            .iter()
            .filter(|(name, _)| everywhere || *name == namespace);
        let members = states.flat_map(|(_, state)| state.members.values());
        let selected = members.filter(|member| {
            selector.is_none_or(|selector| service::contains_all(&member.labels, selector))
        });
        dirty
            .members
            .extend(selected.map(|member| member.key.clone()));
    }
}

/// The name under which an address may be asked for.
fn alias(network: &str, address: IpAddr) -> Arc<str> {
    format!("{network}/{address}").into()
}

fn forget<K: std::hash::Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
