//! Weft's own kinds, group `weft.dev/v1alpha1`.

use std::{collections::BTreeMap, str::FromStr};

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Selects workloads by their labels; every label must be equal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSelector {
    /// The labels.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
}

/// Who may connect to which port of a workload (TCP level), decided at the destination.
///
/// Without a selector it applies to every workload of its namespace, and in the root namespace to the whole mesh.
/// With a selector it applies to the selected workloads of its namespace, and in the root namespace of every one.
/// Any matching DENY refuses. Where at least one ALLOW policy applies, only what one of them matches is let through.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "AuthorizationPolicy",
    namespaced,
    status = "ObjectStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// Which workloads; absent or empty means all of the scope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// What a match means.
    #[serde(default)]
    pub action: Action,
    /// One matching rule suffices. Without rules the policy matches nothing (an ALLOW policy then allows nothing);
    /// an empty rule (`{}`) matches everything.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// What a matching policy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Let the connection through, and refuse what no ALLOW policy matches.
    #[default]
    Allow,
    /// Refuse the connection.
    Deny,
    /// Let it through, but log and count it as one that a DENY policy with the same rules would refuse.
    Audit,
}

/// A rule matches when one of `from` (if any) and one of `to` (if any) matches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// Sources; absent means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Source>,
    /// Operations; absent means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Operation>,
}

/// A source matches when every field that is set matches; one value of a field suffices. Text values are exact, or
/// `prefix*`, or `*suffix`, or `*` for any peer that has a verified identity.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Identities, `<trust domain>/ns/<namespace>/sa/<account>`, with or without `spiffe://`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<String>,
    /// Identities that must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<String>,
    /// Namespaces of the peer's identity.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// Namespaces that must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<String>,
    /// Service accounts, `<namespace>/<name>`, or `<name>` for the policy's own namespace. Exact only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<String>,
    /// Service accounts that must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<String>,
    /// Addresses or ranges (`10.0.0.0/8`) of the TCP peer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip_blocks: Vec<String>,
    /// Addresses that must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_ip_blocks: Vec<String>,
}

/// An operation matches when every field that is set matches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// Ports of the application (target ports, not service ports).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// Ports that must not match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_ports: Vec<u16>,
}

/// How workloads are treated. In the root namespace without a selector it is the mesh's default; in another
/// namespace without a selector that namespace's; with a selector it is the selected workloads' own. For each
/// field the most specific policy that sets it wins; of several equally specific ones the oldest, then the first by name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "MeshPolicy",
    namespaced,
    status = "ObjectStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicySpec {
    /// Which workloads; absent or empty means the namespace or the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// Whether plaintext is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// What the kernel does with connections while the agent of the node is dead. Default `closed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_mode: Option<FailureMode>,
    /// How authorised flows between workloads of one node travel. Default `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_node: Option<SameNode>,
}

/// Whether plaintext is accepted, and exceptions by port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Mtls {
    /// Mode of every port that `ports` does not name. Default `PERMISSIVE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<MtlsMode>,
    /// Mode by port of the application. A more specific policy's map replaces this one as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<BTreeMap<String, MtlsMode>>,
}

/// Whether plaintext is accepted.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// Mutual TLS and plaintext are accepted.
    #[default]
    Permissive,
    /// Only mutual TLS is accepted.
    Strict,
}

/// What happens to connections while the agent is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FailureMode {
    /// They are refused.
    #[default]
    Closed,
    /// They go on as if there were no mesh.
    Open,
}

/// How authorised flows between workloads of one node travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SameNode {
    /// From application to application in the kernel.
    #[default]
    Kernel,
    /// Through the proxy, with mutual TLS.
    Tunnel,
}

/// A workload that is not a pod: a process, container or machine with addresses of its own. Its labels
/// (`metadata.labels`) are what Services and policies select.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "ExternalWorkload",
    namespaced,
    status = "ObjectStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ExternalWorkloadSpec {
    /// Its IPv4 and IPv6 addresses, at least one.
    pub addresses: Vec<String>,
    /// Node (agent) that runs it; only that node gets certificates for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Service account, the last part of its identity. Default `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// Named ports, for Services whose `targetPort` is a name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// Network it lives in; absent means the default network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Where it runs; absent means the topology labels of its Node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<ExternalLocality>,
    /// Weight in balancing, at least 1. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Whether it is enrolled; absent means by label, as for pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mesh: Option<Toggle>,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExternalLocality {
    /// Region.
    #[serde(default)]
    pub region: String,
    /// Zone within the region.
    #[serde(default)]
    pub zone: String,
    /// Subzone within the zone.
    #[serde(default)]
    pub subzone: String,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Toggle {
    /// Enrolled.
    Enabled,
    /// Not enrolled.
    Disabled,
}

/// What the control plane says of an object. Users do not write it; manifest files need not have it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStatus {
    /// `Accepted`: whether the object was understood. `Programmed`: whether the agents have applied it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// One statement about an object, in the form that Kubernetes uses (`meta/v1` Condition).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What is stated.
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// The generation of the object that is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` last changed, RFC 3339.
    pub last_transition_time: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, for a human.
    pub message: String,
}

/// How a text value of a policy matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringPattern {
    /// Equal.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Not empty.
    Presence,
}

/// A text value that is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StringPatternError {
    /// Nothing to compare with.
    #[error("is empty; write `*` for any value")]
    Empty,
    /// A star that is neither first nor last, or more than one.
    #[error("{0:?} has a `*` that is neither its only first nor its only last character")]
    Star(String),
}

impl FromStr for StringPattern {
    type Err = StringPatternError;

    fn from_str(text: &str) -> Result<Self, StringPatternError> {
        let pattern = match (text, text.strip_suffix('*'), text.strip_prefix('*')) {
            ("", ..) => return Err(StringPatternError::Empty),
            ("*", ..) => return Ok(Self::Presence),
            (_, Some(prefix), _) => Self::Prefix(prefix.to_owned()),
            (_, None, Some(suffix)) => Self::Suffix(suffix.to_owned()),
            (text, None, None) => Self::Exact(text.to_owned()),
        };
        let (Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest)) = &pattern else {
            return Ok(pattern);
        };
        if rest.contains('*') {
            return Err(StringPatternError::Star(text.to_owned()));
        }
        Ok(pattern)
    }
}
