//! Policies: users' AuthorizationPolicies in wire form, and what MeshPolicies mean for one workload.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_api::{
    manifest::{
        Action, AuthorizationPolicy, FailureMode, MeshPolicy, MtlsMode, Operation, Rule, SameNode,
        Source, StringPattern, parse_block,
    },
    proto::{
        security::{
            self as wire, Address, Authorization, Clause, Match, Scope, ServiceAccountMatch,
            StringMatch, string_match::MatchType,
        },
        weft::Capture,
    },
};

use sha2::{Digest, Sha256};

use super::{
    member::{Labels, Member},
    service::{address_bytes, contains_all},
};

/// Name of the generated policy that refuses plaintext on every port. Generated names hold an underscore, which no
/// Kubernetes name may, so they never meet a user's.
const STRICT_POLICY: &str = "weft_strict";
/// Longest list of ports that is part of a generated name, in bytes; a longer one is named by a digest.
const LISTED_PORTS_MAX_BYTES: usize = 128;

/// An AuthorizationPolicy in both forms.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AuthorizationSpec {
    pub selector: Option<Labels>,
    pub wire: Authorization,
}

impl AuthorizationSpec {
    pub fn from_manifest(
        root_namespace: &str,
        namespace: &str,
        name: &str,
        policy: &AuthorizationPolicy,
    ) -> Self {
        let selector = labels_of(policy.spec.selector.as_ref());
        let scope = match (&selector, namespace == root_namespace) {
            (Some(_), _) => Scope::WorkloadSelector,
            (None, true) => Scope::Global,
            (None, false) => Scope::Namespace,
        };
        let (action, dry_run) = match policy.spec.action {
            Action::Allow => (wire::Action::Allow, false),
            Action::Deny => (wire::Action::Deny, false),
            // What it matches is what an enforced policy of the same rules would deny.
            Action::Audit => (wire::Action::Deny, true),
        };
        let wire = Authorization {
            name: name.into(),
            namespace: namespace.into(),
            scope: scope.into(),
            action: action.into(),
            rules: policy
                .spec
                .rules
                .iter()
                .map(|rule| wire_rule(namespace, rule))
                .collect(),
            dry_run,
            extensions: Vec::new(),
        };
        Self { selector, wire }
    }
}

fn labels_of(selector: Option<&mesh_api::manifest::WorkloadSelector>) -> Option<Labels> {
    selector
        .map(|selector| selector.match_labels.clone())
        .filter(|labels| !labels.is_empty())
}

/// Clauses are joined by AND, the matches of a clause by OR: one clause for `from`, one for `to`. A rule with neither
/// has no clause and matches everything (wire.md section 8).
fn wire_rule(namespace: &str, rule: &Rule) -> wire::Rule {
    let from: Vec<_> = rule
        .from
        .iter()
        .map(|source| wire_source(namespace, source))
        .collect();
    let to: Vec<_> = rule.to.iter().map(wire_operation).collect();
    let clauses = [from, to].into_iter().filter(|matches| !matches.is_empty());
    wire::Rule {
        clauses: clauses.map(|matches| Clause { matches }).collect(),
    }
}

fn wire_source(namespace: &str, source: &Source) -> Match {
    // On the wire principals bear no scheme.
    let principals = |values: &[String]| -> Vec<StringMatch> {
        values
            .iter()
            .map(|text| text.strip_prefix("spiffe://").unwrap_or(text))
            .map(pattern)
            .collect()
    };
    let namespaces = |values: &[String]| values.iter().map(|text| pattern(text)).collect();
    let accounts = |values: &[String]| -> Vec<ServiceAccountMatch> {
        values.iter().map(|text| account(namespace, text)).collect()
    };
    Match {
        namespaces: namespaces(&source.namespaces),
        not_namespaces: namespaces(&source.not_namespaces),
        principals: principals(&source.principals),
        not_principals: principals(&source.not_principals),
        source_ips: blocks(&source.ip_blocks),
        not_source_ips: blocks(&source.not_ip_blocks),
        service_accounts: accounts(&source.service_accounts),
        not_service_accounts: accounts(&source.not_service_accounts),
        ..Match::default()
    }
}

fn wire_operation(operation: &Operation) -> Match {
    let ports = |ports: &[u16]| ports.iter().map(|port| u32::from(*port)).collect();
    Match {
        destination_ports: ports(&operation.ports),
        not_destination_ports: ports(&operation.not_ports),
        ..Match::default()
    }
}

fn account(own_namespace: &str, text: &str) -> ServiceAccountMatch {
    let (namespace, name) = text.split_once('/').unwrap_or((own_namespace, text));
    ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: name.into(),
    }
}

fn pattern(text: &str) -> StringMatch {
    let match_type = match text.parse::<StringPattern>() {
        Ok(StringPattern::Prefix(prefix)) => MatchType::Prefix(prefix),
        Ok(StringPattern::Suffix(suffix)) => MatchType::Suffix(suffix),
        Ok(StringPattern::Presence) => MatchType::Presence(()),
        Ok(StringPattern::Exact(exact)) => MatchType::Exact(exact),
        // Validation refused such a policy before it came here; compared as it is, it matches no identity.
        Err(_) => MatchType::Exact(text.into()),
    };
    StringMatch {
        match_type: Some(match_type),
    }
}

fn blocks(texts: &[String]) -> Vec<Address> {
    let blocks = texts.iter().filter_map(|text| parse_block(text).ok());
    blocks
        .map(|block: IpNet| Address {
            address: address_bytes(block.network()),
            length: block.prefix_len().into(),
        })
        .collect()
}

/// A MeshPolicy, ready to be compared.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MeshSpec {
    pub selector: Option<Labels>,
    /// Seconds since 1970; among equally specific policies the oldest wins.
    created: i64,
    namespace: String,
    name: String,
    policy: MeshPolicy,
}

/// How specific a policy is for a workload; the smallest wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Workload,
    WorkloadOfAnyNamespace,
    Namespace,
    Mesh,
}

impl MeshSpec {
    pub fn from_manifest(namespace: &str, name: &str, policy: &MeshPolicy) -> Self {
        let created = policy.metadata.creation_timestamp.as_ref();
        Self {
            selector: labels_of(policy.spec.selector.as_ref()),
            created: created.map_or(i64::MAX, |time| time.0.as_second()),
            namespace: namespace.into(),
            name: name.into(),
            policy: policy.clone(),
        }
    }

    fn rank(&self, root_namespace: &str, member: &Member) -> Option<Rank> {
        let own = self.namespace == member.key.namespace;
        let root = self.namespace == root_namespace;
        match &self.selector {
            Some(selector) if !contains_all(&member.labels, selector) => None,
            Some(_) if own => Some(Rank::Workload),
            Some(_) if root => Some(Rank::WorkloadOfAnyNamespace),
            None if root => Some(Rank::Mesh),
            None if own => Some(Rank::Namespace),
            _ => None,
        }
    }
}

/// What applies to one workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Effective {
    pub strict: Strictness,
    failure_mode: FailureMode,
    same_node: SameNode,
}

impl Effective {
    pub fn of<'a>(
        root_namespace: &str,
        member: &Member,
        policies: impl Iterator<Item = &'a MeshSpec>,
    ) -> Self {
        let mut ranked: Vec<_> = policies
            .filter_map(|policy| Some((policy.rank(root_namespace, member)?, policy)))
            .collect();
        ranked.sort_by_key(|(rank, policy)| (*rank, policy.created, &policy.name));
        let specs = || ranked.iter().map(|(_, policy)| &policy.policy.spec);
        let mtls = || specs().filter_map(|spec| spec.mtls.as_ref());
        Self {
            strict: Strictness::new(
                mtls().find_map(|mtls| mtls.mode).unwrap_or_default(),
                mtls().find_map(|mtls| mtls.ports.as_ref()),
            ),
            failure_mode: specs()
                .find_map(|spec| spec.failure_mode)
                .unwrap_or_default(),
            same_node: specs().find_map(|spec| spec.same_node).unwrap_or_default(),
        }
    }

    /// `None` when every setting is the default, which an agent assumes by itself.
    pub fn capture(&self) -> Option<Capture> {
        use mesh_api::proto::weft;
        let failure_mode = match self.failure_mode {
            FailureMode::Closed => weft::FailureMode::Closed,
            FailureMode::Open => weft::FailureMode::Open,
        };
        let same_node = match self.same_node {
            SameNode::Kernel => weft::SameNode::Kernel,
            SameNode::Tunnel => weft::SameNode::Tunnel,
        };
        let capture = Capture {
            failure_mode: failure_mode.into(),
            same_node: same_node.into(),
        };
        (capture != Capture::default()).then_some(capture)
    }
}

/// Which ports refuse plaintext.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Strictness {
    mode: MtlsMode,
    /// Ports whose mode is the other one, ascending.
    exceptions: Vec<u16>,
}

impl Strictness {
    fn new(mode: MtlsMode, ports: Option<&BTreeMap<String, MtlsMode>>) -> Self {
        let differing = ports
            .into_iter()
            .flatten()
            .filter(|(_, port_mode)| **port_mode != mode);
        let mut exceptions: Vec<u16> = differing
            .filter_map(|(port, _)| port.parse().ok())
            .collect();
        exceptions.sort_unstable();
        exceptions.dedup();
        Self { mode, exceptions }
    }

    fn listed_ports(&self) -> String {
        let ports: Vec<_> = self.exceptions.iter().map(u16::to_string).collect();
        let listed = ports.join("_");
        if listed.len() <= LISTED_PORTS_MAX_BYTES {
            return listed;
        }
        let digest = Sha256::digest(listed.as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}_ports_{digest}", ports.len())
    }

    /// The policy that a workload must list: a function of the value alone, so that all workloads of one strictness
    /// share it. `None` when plaintext is accepted everywhere.
    pub fn policy(&self, root_namespace: &str) -> Option<Authorization> {
        let listed = self.listed_ports();
        let ports: Vec<u32> = self
            .exceptions
            .iter()
            .map(|port| u32::from(*port))
            .collect();
        let no_identity = Match {
            not_principals: vec![pattern("*")],
            ..Match::default()
        };
        let (name, refused) = match (self.mode, ports.is_empty()) {
            (MtlsMode::Permissive, true) => return None,
            (MtlsMode::Permissive, false) => (
                format!("{STRICT_POLICY}_only_{listed}"),
                Match {
                    destination_ports: ports,
                    ..no_identity
                },
            ),
            (MtlsMode::Strict, true) => (STRICT_POLICY.to_owned(), no_identity),
            (MtlsMode::Strict, false) => (
                format!("{STRICT_POLICY}_except_{listed}"),
                Match {
                    not_destination_ports: ports,
                    ..no_identity
                },
            ),
        };
        Some(Authorization {
            name,
            namespace: root_namespace.into(),
            scope: Scope::WorkloadSelector.into(),
            action: wire::Action::Deny.into(),
            rules: vec![wire::Rule {
                clauses: vec![Clause {
                    matches: vec![refused],
                }],
            }],
            dry_run: false,
            extensions: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_strict_policy_is_short_however_many_ports_are_excepted() {
        let name = |ports: std::ops::Range<u16>| {
            let ports = ports.map(|port| (port.to_string(), MtlsMode::Permissive));
            let policy = Strictness::new(MtlsMode::Strict, Some(&ports.collect()));
            policy.policy("root").expect("strict").name
        };
        assert_eq!(name(80..82), "weft_strict_except_80_81");
        let (a, b) = (name(1..5_000), name(1..5_001));
        assert!(
            a.len() < 253 && a.starts_with("weft_strict_except_4999_ports_"),
            "{a}"
        );
        assert_ne!(a, b);
    }
}
