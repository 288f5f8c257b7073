//! What takes the place of a policy that was refused and of which no good version is known. It is at least as strict as
//! whatever the policy may have been meant to say, so that a mistake in a policy never opens what it was to close.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use serde_norway::Value;

use super::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, FailureMode, Kind, MeshPolicy,
    MeshPolicySpec, Mtls, MtlsMode, Object, Rule, SameNode, Source, WorkloadSelector, check,
    key_of,
};

/// Begins the names of stand-ins for policies without a usable name. No name of Kubernetes holds an underscore.
const UNNAMED_PREFIX: &str = "weft_refused_";

/// A policy that was refused, reduced to what could be read of it.
#[derive(Debug, Clone, PartialEq)]
pub struct RefusedPolicy {
    kind: Kind,
    /// Absent when it cannot be read: then it may have been meant for any.
    namespace: Option<String>,
    name: Result<String, u64>,
    action: Action,
    selector: Option<WorkloadSelector>,
}

impl RefusedPolicy {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether namespace and name could be read, so that an earlier version of it can be found.
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.namespace.is_some() && self.name.is_ok()
    }

    /// The object to put in its place. Where the namespace is not to be read it applies to the whole mesh.
    #[must_use]
    pub fn stand_in(&self, root_namespace: &str) -> Object {
        let name = match &self.name {
            Ok(name) => name.clone(),
            Err(fingerprint) => format!("{UNNAMED_PREFIX}{fingerprint:016x}"),
        };
        let metadata = |namespace: &str| ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace.to_owned()),
            // Of equally specific MeshPolicies the oldest wins.
            creation_timestamp: Some(Time(Timestamp::UNIX_EPOCH)),
            ..ObjectMeta::default()
        };
        match (self.kind, &self.namespace) {
            (Kind::MeshPolicy, Some(namespace)) => Object::MeshPolicy(Box::new(MeshPolicy {
                metadata: metadata(namespace),
                spec: MeshPolicySpec {
                    selector: self.selector.clone(),
                    mtls: Some(Mtls {
                        mode: Some(MtlsMode::Strict),
                        ports: Some(BTreeMap::new()),
                    }),
                    failure_mode: Some(FailureMode::Closed),
                    same_node: Some(SameNode::Tunnel),
                },
                status: None,
            })),
            // A mesh-wide MeshPolicy would yield to every more specific one, which this one may have been itself.
            (Kind::MeshPolicy, None) => {
                let plaintext = Source {
                    not_principals: vec!["*".to_owned()],
                    ..Source::default()
                };
                let rule = Rule {
                    from: vec![plaintext],
                    to: Vec::new(),
                };
                authorization(metadata(root_namespace), None, Action::Deny, vec![rule])
            }
            (_, namespace) => {
                // An ALLOW policy without rules allows nothing; an empty rule matches everything.
                let rules = match self.action {
                    Action::Allow => Vec::new(),
                    Action::Deny | Action::Audit => vec![Rule::default()],
                };
                let metadata = metadata(namespace.as_deref().unwrap_or(root_namespace));
                authorization(metadata, self.selector.clone(), self.action, rules)
            }
        }
    }
}

fn authorization(
    metadata: ObjectMeta,
    selector: Option<WorkloadSelector>,
    action: Action,
    rules: Vec<Rule>,
) -> Object {
    Object::AuthorizationPolicy(Box::new(AuthorizationPolicy {
        metadata,
        spec: AuthorizationPolicySpec {
            selector,
            action,
            rules,
        },
        status: None,
    }))
}

/// What can be read of a refused document, if it is a policy (audit policies forbid nothing and need no stand-in).
pub(super) fn refused_policy(document: &str) -> Option<RefusedPolicy> {
    let refused = match serde_norway::from_str::<Value>(document) {
        Ok(value) => from_value(&value, document)?,
        Err(_) => from_lines(document)?,
    };
    (refused.action != Action::Audit).then_some(refused)
}

fn from_value(value: &Value, document: &str) -> Option<RefusedPolicy> {
    let kind = policy_kind(value.get("kind")?.as_str()?)?;
    let spec = value.get("spec");
    let action = match spec.and_then(|spec| spec.get("action")?.as_str()) {
        Some("ALLOW") => Action::Allow,
        Some("AUDIT") if kind == Kind::AuthorizationPolicy => Action::Audit,
        // Absent means ALLOW, but in a refused policy the field may only be misspelt.
        _ => Action::Deny,
    };
    Some(RefusedPolicy {
        action,
        selector: spec.and_then(selector),
        ..named(kind, value.get("metadata"), document)
    })
}

/// A selector that is wholly understood; anything else counts as none, which selects more.
fn selector(spec: &Value) -> Option<WorkloadSelector> {
    let fields = spec.get("selector")?.as_mapping()?;
    let labels = fields.get("matchLabels")?;
    let match_labels: BTreeMap<String, String> = serde_norway::from_value(labels.clone()).ok()?;
    (fields.len() == 1 && check::are_labels(&match_labels))
        .then_some(WorkloadSelector { match_labels })
}

/// A document that is no YAML as a whole: its outermost fields are read one by one.
fn from_lines(document: &str) -> Option<RefusedPolicy> {
    let blocks = outermost_blocks(document);
    let of = |field: &'static str| {
        let values = blocks.iter().filter_map(move |block| {
            let value: Value = serde_norway::from_str(block).ok()?;
            value.get(field).cloned()
        });
        values.collect::<Vec<_>>()
    };
    let kinds = of("kind");
    let kind = if kinds.is_empty() {
        mentioned_kind(document)?
    } else {
        kinds.iter().find_map(|kind| policy_kind(kind.as_str()?))?
    };
    let metadata = of("metadata");
    let metadata = match metadata.as_slice() {
        [one] if kinds.len() == 1 => Some(one),
        _ => None,
    };
    Some(named(kind, metadata, document))
}

/// The document cut before every line that is not indented.
fn outermost_blocks(document: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in document.split_inclusive('\n') {
        let outermost = line.starts_with(|first: char| !first.is_whitespace() && first != '#');
        if outermost {
            blocks.push(String::new());
        }
        if let Some(block) = blocks.last_mut() {
            block.push_str(line);
        }
    }
    blocks
}

fn mentioned_kind(document: &str) -> Option<Kind> {
    let mentions = |kind: Kind| {
        let mut lines = document.lines();
        lines.any(|line| !line.trim_start().starts_with('#') && line.contains(kind.name()))
    };
    [Kind::AuthorizationPolicy, Kind::MeshPolicy]
        .into_iter()
        .find(|kind| mentions(*kind))
}

fn policy_kind(text: &str) -> Option<Kind> {
    let kind = text.parse().ok()?;
    matches!(kind, Kind::AuthorizationPolicy | Kind::MeshPolicy).then_some(kind)
}

/// Reads namespace and name. What is not to be understood counts as absent.
fn named(kind: Kind, metadata: Option<&Value>, document: &str) -> RefusedPolicy {
    let text = |field: &str| metadata?.get(field)?.as_str();
    let name = text("name").filter(|name| check::is_name(name));
    let namespace = match metadata {
        Some(Value::Mapping(fields)) if !fields.contains_key("namespace") => {
            // The name must be there: metadata of which nothing can be used says nothing about the namespace.
            name.map(|_| key_of(kind, None, None).namespace)
        }
        _ => text("namespace")
            .filter(|namespace| check::is_namespace(namespace))
            .map(ToOwned::to_owned),
    };
    let mut hasher = DefaultHasher::new();
    document.hash(&mut hasher);
    RefusedPolicy {
        kind,
        namespace,
        name: name.map(ToOwned::to_owned).ok_or_else(|| hasher.finish()),
        action: Action::Deny,
        selector: None,
    }
}
