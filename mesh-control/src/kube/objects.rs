//! Objects as the API server gives them, reduced to what the mesh needs.
//!
//! A pod of a real cluster is 5 to 20 KB of JSON, of which the mesh needs some 300 bytes; a hundred thousand of them pass
//! through here. So pods are read into small types that skip the rest, nodes and namespaces are asked for without spec and
//! status, and of what is read only a fingerprint stays.
//!
//! Weft's own kinds go through the same reader as manifest files, so that both sources accept the same and say the same.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use k8s_openapi::{
    api::{
        core::v1::{
            Container, ContainerPort, Namespace, Node, Pod, PodCondition, PodIP, PodSpec,
            PodStatus, Service,
        },
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
    jiff::Timestamp,
};
use mesh_api::manifest::{self, Condition, FieldProblem, Kind, Object, ObjectKey, RefusedPolicy};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

use super::api::Resource;

/// Label of the EndpointSlices that Kubernetes derives from a Service's selector. The index derives the same from pods,
/// without that detour, so these slices are not needed; what is left are those of Services without a selector.
const SLICES_OF_OTHERS: &str =
    "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";
/// A pod that has ended keeps its address in its status while another pod may already have it.
const PODS_THAT_RUN: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// An object of the API server that this source follows.
pub(super) trait Watched: DeserializeOwned + Clone + Send + Sync + 'static {
    /// Its kind in the index.
    const KIND: Kind;
    /// Where it is.
    const RESOURCE: Resource;

    /// What the index needs of it.
    fn into_item(self) -> Item;
}

/// One object, read.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// What names it.
    pub key: ObjectKey,
    /// Its resource version, to resume a watch.
    pub version: String,
    /// Equal when nothing differs that the mesh needs.
    pub fingerprint: u64,
    /// What it says.
    pub content: Content,
    /// Of Weft's own kinds: what tells the user about it.
    pub own: Option<Own>,
}

/// Whether an object can be used.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// It can, although something about it may be wrong.
    Good(Box<Object>, Vec<FieldProblem>),
    /// It cannot.
    Refused {
        /// Why.
        problems: Vec<FieldProblem>,
        /// What could be read of it, if it is a policy.
        policy: Option<RefusedPolicy>,
    },
}

/// What an object of Weft's own kinds has beside its meaning.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Own {
    /// Unique identifier.
    pub uid: String,
    /// Counts changes of the spec.
    pub generation: i64,
    /// The conditions that it bears.
    pub conditions: Vec<Condition>,
}

/// Metadata, reduced.
#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Meta {
    name: String,
    namespace: Option<String>,
    uid: String,
    resource_version: String,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Vec<Owner>,
    deletion_timestamp: Option<Present>,
}

/// A value of which only the presence counts.
#[derive(Debug, Clone, Copy, Hash)]
struct Present;

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default)]
struct Owner {
    kind: String,
    name: String,
    controller: Option<bool>,
}

impl Meta {
    /// Takes the version out, so that it is no part of the fingerprint.
    fn take_version(&mut self) -> String {
        std::mem::take(&mut self.resource_version)
    }

    fn key(&self, kind: Kind) -> ObjectKey {
        ObjectKey {
            kind,
            namespace: self.namespace.clone().unwrap_or_default(),
            name: self.name.clone(),
        }
    }

    fn into_full(self) -> ObjectMeta {
        let owners = self
            .owner_references
            .into_iter()
            .map(|owner| OwnerReference {
                kind: owner.kind,
                name: owner.name,
                controller: owner.controller,
                ..OwnerReference::default()
            });
        let owners: Vec<_> = owners.collect();
        ObjectMeta {
            name: Some(self.name),
            namespace: self.namespace,
            uid: Some(self.uid),
            labels: self.labels,
            owner_references: (!owners.is_empty()).then_some(owners),
            // When is of no interest, only that it will be gone.
            deletion_timestamp: self.deletion_timestamp.map(|_| Time(Timestamp::UNIX_EPOCH)),
            ..ObjectMeta::default()
        }
    }
}

fn fingerprint(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// What the API server has already accepted is used even where a value of it is one that the mesh does not know, because
/// the index reads such a value as absent. Only what no agent could take is refused.
fn judged(object: Object) -> Content {
    let problems = object.problems();
    let tolerable = |problem: &FieldProblem| {
        [
            "metadata.labels",
            "spec.trafficDistribution",
            "spec.internalTrafficPolicy",
        ]
        .iter()
        .any(|field| problem.field.starts_with(field))
    };
    if problems.iter().all(tolerable) {
        return Content::Good(Box::new(object), problems);
    }
    Content::Refused {
        problems,
        policy: None,
    }
}

/// `v1` Namespace, metadata only.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct KubeNamespace {
    #[serde(default)]
    metadata: Meta,
}

impl Watched for KubeNamespace {
    const KIND: Kind = Kind::Namespace;
    const RESOURCE: Resource = Resource {
        path: "/api/v1/namespaces",
        fields: None,
        labels: None,
        metadata_only: true,
    };

    fn into_item(mut self) -> Item {
        let version = self.metadata.take_version();
        Item {
            key: self.metadata.key(Self::KIND),
            version,
            fingerprint: fingerprint(&self.metadata),
            content: judged(Object::Namespace(Box::new(Namespace {
                metadata: self.metadata.into_full(),
                ..Namespace::default()
            }))),
            own: None,
        }
    }
}

/// `v1` Node, metadata only: its labels are the locality of its pods.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct KubeNode {
    #[serde(default)]
    metadata: Meta,
}

impl Watched for KubeNode {
    const KIND: Kind = Kind::Node;
    const RESOURCE: Resource = Resource {
        path: "/api/v1/nodes",
        fields: None,
        labels: None,
        metadata_only: true,
    };

    fn into_item(mut self) -> Item {
        let version = self.metadata.take_version();
        Item {
            key: self.metadata.key(Self::KIND),
            version,
            fingerprint: fingerprint(&self.metadata),
            content: judged(Object::Node(Box::new(Node {
                metadata: self.metadata.into_full(),
                ..Node::default()
            }))),
            own: None,
        }
    }
}

/// `v1` Pod, reduced.
#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default)]
pub(super) struct KubePod {
    metadata: Meta,
    spec: KubePodSpec,
    status: KubePodStatus,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default, rename_all = "camelCase")]
struct KubePodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
    containers: Vec<KubeContainer>,
    init_containers: Vec<KubeContainer>,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default)]
struct KubeContainer {
    ports: Vec<KubePort>,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default, rename_all = "camelCase")]
struct KubePort {
    name: Option<String>,
    container_port: i32,
    protocol: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default, rename_all = "camelCase")]
struct KubePodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<KubeIp>,
    conditions: Vec<KubeCondition>,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default)]
struct KubeIp {
    ip: String,
}

#[derive(Debug, Clone, Default, Deserialize, Hash)]
#[serde(default)]
struct KubeCondition {
    r#type: String,
    status: String,
}

impl KubeContainer {
    fn into_full(self) -> Container {
        let ports = self.ports.into_iter().map(|port| ContainerPort {
            name: port.name,
            container_port: port.container_port,
            protocol: port.protocol,
            ..ContainerPort::default()
        });
        Container {
            ports: Some(ports.collect()),
            ..Container::default()
        }
    }
}

impl KubePod {
    fn into_full(self) -> Pod {
        let containers = |list: Vec<KubeContainer>| {
            // The named ports are all that is needed of a container.
            let named = list
                .into_iter()
                .filter(|container| !container.ports.is_empty());
            named.map(KubeContainer::into_full).collect::<Vec<_>>()
        };
        let conditions = self.status.conditions.into_iter();
        let conditions = conditions.map(|condition| PodCondition {
            type_: condition.r#type,
            status: condition.status,
            ..PodCondition::default()
        });
        let ips = self.status.pod_ips.into_iter();
        Pod {
            metadata: self.metadata.into_full(),
            spec: Some(PodSpec {
                node_name: self.spec.node_name,
                service_account_name: self.spec.service_account_name,
                host_network: self.spec.host_network,
                containers: containers(self.spec.containers),
                init_containers: Some(containers(self.spec.init_containers)),
                ..PodSpec::default()
            }),
            status: Some(PodStatus {
                phase: self.status.phase,
                pod_ip: self.status.pod_ip,
                pod_ips: Some(ips.map(|ip| PodIP { ip: ip.ip }).collect()),
                conditions: Some(conditions.collect()),
                ..PodStatus::default()
            }),
        }
    }
}

impl Watched for KubePod {
    const KIND: Kind = Kind::Pod;
    const RESOURCE: Resource = Resource {
        path: "/api/v1/pods",
        fields: Some(PODS_THAT_RUN),
        labels: None,
        metadata_only: false,
    };

    fn into_item(mut self) -> Item {
        let version = self.metadata.take_version();
        self.status
            .conditions
            .retain(|condition| condition.r#type == "Ready");
        if self.status.conditions.is_empty() {
            // A kubelet that has not reported yet: not ready. (In a manifest file the absence means ready.)
            self.status.conditions.push(KubeCondition {
                r#type: "Ready".into(),
                status: "False".into(),
            });
        }
        Item {
            key: self.metadata.key(Self::KIND),
            version,
            fingerprint: fingerprint(&self),
            content: judged(Object::Pod(Box::new(self.into_full()))),
            own: None,
        }
    }
}

/// Only what the index reads of the metadata; managed fields alone are larger than the rest of the object.
fn slim(metadata: ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: metadata.name,
        namespace: metadata.namespace,
        labels: metadata.labels,
        ..ObjectMeta::default()
    }
}

fn key_of(kind: Kind, metadata: &ObjectMeta) -> ObjectKey {
    ObjectKey {
        kind,
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
    }
}

/// Of objects that are few and seldom change every version is a change.
fn fingerprint_of_version(metadata: &ObjectMeta) -> u64 {
    fingerprint(&(&metadata.uid, &metadata.resource_version))
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
    const RESOURCE: Resource = Resource {
        path: "/api/v1/services",
        fields: None,
        labels: None,
        metadata_only: false,
    };

    fn into_item(self) -> Item {
        Item {
            key: key_of(Self::KIND, &self.metadata),
            version: self.metadata.resource_version.clone().unwrap_or_default(),
            fingerprint: fingerprint_of_version(&self.metadata),
            content: judged(Object::Service(Box::new(Self {
                metadata: slim(self.metadata),
                spec: self.spec,
                status: None,
            }))),
            own: None,
        }
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const RESOURCE: Resource = Resource {
        path: "/apis/discovery.k8s.io/v1/endpointslices",
        fields: None,
        labels: Some(SLICES_OF_OTHERS),
        metadata_only: false,
    };

    fn into_item(self) -> Item {
        Item {
            key: key_of(Self::KIND, &self.metadata),
            version: self.metadata.resource_version.clone().unwrap_or_default(),
            fingerprint: fingerprint_of_version(&self.metadata),
            content: judged(Object::EndpointSlice(Box::new(Self {
                metadata: slim(self.metadata),
                ..self
            }))),
            own: None,
        }
    }
}

/// Defines the reader of one of Weft's own kinds.
macro_rules! own_kind {
    ($name:ident, $kind:expr, $path:literal) => {
        #[doc = concat!("An object of Weft's own at `", $path, "`, not read yet.")]
        #[derive(Debug, Clone, Deserialize)]
        #[serde(transparent)]
        pub(super) struct $name(serde_json::Value);

        impl Watched for $name {
            const KIND: Kind = $kind;
            const RESOURCE: Resource = Resource {
                path: $path,
                fields: None,
                labels: None,
                metadata_only: false,
            };

            fn into_item(self) -> Item {
                own_item($kind, self.0)
            }
        }
    };
}

own_kind!(
    KubeAuthorizationPolicy,
    Kind::AuthorizationPolicy,
    "/apis/weft.dev/v1alpha1/authorizationpolicies"
);
own_kind!(
    KubeMeshPolicy,
    Kind::MeshPolicy,
    "/apis/weft.dev/v1alpha1/meshpolicies"
);
own_kind!(
    KubeExternalWorkload,
    Kind::ExternalWorkload,
    "/apis/weft.dev/v1alpha1/externalworkloads"
);

/// What is read of an object of Weft's own kinds before its meaning.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnHead {
    metadata: OwnMeta,
    status: OwnStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct OwnMeta {
    name: String,
    namespace: Option<String>,
    uid: String,
    resource_version: String,
    generation: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnStatus {
    conditions: Vec<Condition>,
}

/// Metadata that the meaning of an object depends on.
const OWN_METADATA: [&str; 5] = [
    "name",
    "namespace",
    "labels",
    "creationTimestamp",
    "deletionTimestamp",
];

/// Reads an object as manifest files are read: JSON is YAML.
fn own_item(kind: Kind, mut value: serde_json::Value) -> Item {
    let head: OwnHead = serde_json::from_value(value.clone()).unwrap_or_default();
    let key = ObjectKey {
        kind,
        namespace: head.metadata.namespace.unwrap_or_default(),
        name: head.metadata.name,
    };
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
        // Items of a list come without them.
        object.insert("apiVersion".into(), kind.api_version().into());
        object.insert("kind".into(), kind.name().into());
        if let Some(metadata) = object.get_mut("metadata").and_then(|m| m.as_object_mut()) {
            metadata.retain(|field, _| OWN_METADATA.contains(&field.as_str()));
        }
    }
    let text = value.to_string();
    let mut parsed = manifest::parse(&text);
    let content = match parsed.objects.pop() {
        Some(located) => Content::Good(Box::new(located.object), Vec::new()),
        None => Content::Refused {
            problems: parsed
                .problems
                .into_iter()
                .map(|problem| FieldProblem {
                    field: problem.field,
                    message: problem.message,
                })
                .collect(),
            policy: parsed.refused_policies.pop(),
        },
    };
    Item {
        key,
        version: head.metadata.resource_version,
        fingerprint: fingerprint(&text),
        content,
        own: Some(Own {
            uid: head.metadata.uid,
            generation: head.metadata.generation,
            conditions: head.status.conditions,
        }),
    }
}

#[cfg(test)]
#[path = "objects_tests.rs"]
mod tests;
