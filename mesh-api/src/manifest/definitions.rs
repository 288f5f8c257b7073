//! The CustomResourceDefinitions of Weft's kinds: what the Rust types say, and what types cannot say (bounds, patterns,
//! CEL rules, columns). `cargo xtask crds` writes them into the chart.
//!
//! The API server refuses here what [`super::parse`] would refuse later, as far as a schema can tell. Every list and text has
//! a bound, because the server estimates the cost of a rule by the largest object that the schema lets through.

use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use super::{AuthorizationPolicy, ExternalWorkload, MeshPolicy};
use crate::limits::{ADDRESSES_MAX, PORTS_MAX};

/// Most rules of a policy in a cluster.
const RULES_MAX: usize = 256;
/// Most sources or operations of a rule in a cluster.
const CLAUSES_MAX: usize = 64;
/// Most values of one field of a source or operation in a cluster.
const VALUES_MAX: usize = 1_024;
/// Most ports with an mTLS mode of their own in a cluster.
const MODE_PORTS_MAX: usize = 256;
/// Most labels of a selector.
const LABELS_MAX: usize = 64;
/// Longest pattern: a SPIFFE ID (2,048 bytes) would never be typed; trust domain, namespace and account have 253 each.
const PATTERN_MAX_BYTES: usize = 800;
/// Longest object name, in bytes.
const NAME_MAX_BYTES: usize = 253;
/// Longest label value, in bytes.
const LABEL_MAX_BYTES: usize = 63;
/// Longest text of an IPv6 range with an IPv4 part, in bytes.
const BLOCK_MAX_BYTES: usize = 49;

/// Exact, `prefix*`, `*suffix` or `*`.
const PATTERN: &str = r"^(\*|\*?[^*]+|[^*]+\*)$";
/// `<namespace>/<name>` or `<name>`.
const ACCOUNT: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-.a-z0-9]*[a-z0-9])?$";
/// The letters of an address or range; the control plane says what is wrong with a value that has only those.
const BLOCK: &str = r"^[0-9a-fA-F:.]+(/[0-9]{1,3})?$";
/// Keys of `mtls.ports`. No regular expression: its cost over keys without a bound would be refused.
const PORT_KEYS: &str = "self.all(port, int(port) >= 1 && int(port) <= 65535)";

/// Every definition, in alphabetical order of the kinds.
#[must_use]
pub fn definitions() -> Vec<Value> {
    vec![
        definition::<AuthorizationPolicy>(
            "weftauth",
            &[
                ("Action", "string", ".spec.action"),
                ("Accepted", "string", ACCEPTED),
            ],
            &authorization_policy(),
        ),
        definition::<ExternalWorkload>(
            "weftext",
            &[
                ("Addresses", "string", ".spec.addresses"),
                ("Node", "string", ".spec.node"),
                ("Account", "string", ".spec.serviceAccount"),
                ("Accepted", "string", ACCEPTED),
            ],
            &external_workload(),
        ),
        definition::<MeshPolicy>(
            "weftmesh",
            &[
                ("mTLS", "string", ".spec.mtls.mode"),
                ("On death", "string", ".spec.failureMode"),
                ("Same node", "string", ".spec.sameNode"),
                ("Accepted", "string", ACCEPTED),
            ],
            &mesh_policy(),
        ),
    ]
}

/// What the control plane thinks of an object.
const ACCEPTED: &str = r#".status.conditions[?(@.type=="Accepted")].status"#;

/// A place in the schema of `spec`, and what is added there.
type Addition = (String, Value);

fn authorization_policy() -> Vec<Addition> {
    let rule = "/properties/rules/items";
    let mut additions = vec![
        selector(),
        at("/properties/rules", json!({"maxItems": RULES_MAX})),
    ];
    for clause in ["from", "to"] {
        let list = format!("{rule}/properties/{clause}");
        additions.push((list.clone(), json!({"maxItems": CLAUSES_MAX})));
        // An empty source or operation would match everything, which nobody writes on purpose.
        additions.push((format!("{list}/items"), json!({"minProperties": 1})));
    }
    let mut values = |clause: &str, field: &str, items: Value| {
        let list = format!("{rule}/properties/{clause}/items/properties/{field}");
        additions.push((list.clone(), json!({"maxItems": VALUES_MAX})));
        additions.push((format!("{list}/items"), items));
    };
    for field in ["principals", "notPrincipals", "namespaces", "notNamespaces"] {
        let bounds = json!({"minLength": 1, "maxLength": PATTERN_MAX_BYTES, "pattern": PATTERN});
        values("from", field, bounds);
    }
    for field in ["serviceAccounts", "notServiceAccounts"] {
        let bounds = json!({"minLength": 1, "maxLength": NAME_MAX_BYTES + 1 + LABEL_MAX_BYTES, "pattern": ACCOUNT});
        values("from", field, bounds);
    }
    for field in ["ipBlocks", "notIpBlocks"] {
        let bounds = json!({"minLength": 2, "maxLength": BLOCK_MAX_BYTES, "pattern": BLOCK});
        values("from", field, bounds);
    }
    for field in ["ports", "notPorts"] {
        values("to", field, port());
    }
    additions
}

fn mesh_policy() -> Vec<Addition> {
    let rule =
        json!({"rule": PORT_KEYS, "message": "every key must be a port between 1 and 65535"});
    vec![
        selector(),
        at(
            "/properties/mtls/properties/ports",
            json!({"maxProperties": MODE_PORTS_MAX, "x-kubernetes-validations": [rule]}),
        ),
        at(
            "",
            json!({"x-kubernetes-validations": [{
                "rule": "has(self.mtls) || has(self.failureMode) || has(self.sameNode)",
                "message": "sets nothing: give at least one of mtls, failureMode and sameNode",
            }]}),
        ),
    ]
}

fn external_workload() -> Vec<Addition> {
    let name = || json!({"maxLength": NAME_MAX_BYTES});
    let address =
        json!({"rule": "isIP(self)", "message": "must be an IPv4 or IPv6 address without a range"});
    vec![
        at(
            "/properties/addresses",
            json!({"minItems": 1, "maxItems": ADDRESSES_MAX, "x-kubernetes-list-type": "set"}),
        ),
        at(
            "/properties/addresses/items",
            json!({"maxLength": BLOCK_MAX_BYTES, "x-kubernetes-validations": [address]}),
        ),
        at("/properties/node", name()),
        at(
            "/properties/network",
            json!({"maxLength": NAME_MAX_BYTES, "pattern": "^[^/]*$"}),
        ),
        at(
            "/properties/serviceAccount",
            json!({"maxLength": NAME_MAX_BYTES, "minLength": 1}),
        ),
        at("/properties/locality/properties/region", name()),
        at("/properties/locality/properties/zone", name()),
        at("/properties/locality/properties/subzone", name()),
        at("/properties/weight", json!({"minimum": 1})),
        at("/properties/ports", json!({"maxProperties": PORTS_MAX})),
        at("/properties/ports/additionalProperties", port()),
    ]
}

fn selector() -> Addition {
    at(
        "/properties/selector/properties/matchLabels",
        json!({"maxProperties": LABELS_MAX, "additionalProperties": {"type": "string", "maxLength": LABEL_MAX_BYTES}}),
    )
}

fn port() -> Value {
    json!({"minimum": 1, "maximum": u16::MAX})
}

fn at(place: &str, addition: Value) -> Addition {
    (place.to_owned(), addition)
}

fn definition<K: CustomResourceExt>(
    short_name: &str,
    columns: &[(&str, &str, &str)],
    additions: &[Addition],
) -> Value {
    let mut definition = json!(K::crd());
    if let Some(names) = definition.pointer_mut("/spec/names") {
        merge(
            names,
            &json!({"shortNames": [short_name], "categories": ["weft"]}),
        );
    }
    let Some(version) = definition.pointer_mut("/spec/versions/0") else {
        return definition;
    };
    let age = json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"});
    let columns = columns
        .iter()
        .map(|(name, kind, path)| json!({"name": name, "type": kind, "jsonPath": path}));
    let columns: Vec<Value> = columns.chain([age]).collect();
    merge(
        version,
        &json!({"subresources": {"status": {}}, "additionalPrinterColumns": columns}),
    );
    if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
        // `kubectl explain` begins with it, and the derived one says nothing.
        if let Some(text) = schema.pointer("/properties/spec/description").cloned() {
            merge(schema, &json!({"description": text}));
        }
        name_known_formats(schema);
        if schema.pointer("/properties/status").is_none() {
            merge(schema, &json!({"properties": {"status": status()}}));
        }
        for (place, addition) in additions {
            if let Some(target) = schema.pointer_mut(&format!("/properties/spec{place}")) {
                merge(target, addition);
            }
        }
    }
    definition
}

/// What the control plane writes about every object of ours.
fn status() -> Value {
    json!({
        "description": "What the control plane made of the object, and which agents have applied it. Written by the control plane.",
        "type": "object",
        "nullable": true,
        "properties": {
            "observedGeneration": {
                "description": "The generation of the object that this status is about.",
                "type": "integer", "format": "int64",
            },
            "agents": {
                "description": "How many agents were told, and how many have applied it.",
                "type": "object",
                "properties": {
                    "told": {"type": "integer", "format": "int32", "minimum": 0},
                    "applied": {"type": "integer", "format": "int32", "minimum": 0},
                },
            },
            "conditions": {
                "description": "`Accepted`: the object was understood. `Applied`: every agent that it concerns has it.",
                "type": "array",
                "maxItems": 16,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                    "properties": {
                        "type": {"type": "string", "maxLength": 316},
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
                        "message": {"type": "string", "maxLength": 32768},
                    },
                },
            },
        },
    })
}

/// The API server warns of formats that OpenAPI does not name; bounds say the same.
fn name_known_formats(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            for (name, member) in members.iter_mut() {
                match member.as_str() {
                    Some("uint16" | "uint32") if name == "format" => *member = json!("int64"),
                    _ => name_known_formats(member),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(name_known_formats),
        _ => {}
    }
}

/// Adds the members of an object, deeply; what is no object is replaced.
fn merge(target: &mut Value, addition: &Value) {
    match (target, addition) {
        (Value::Object(target), Value::Object(addition)) => merge_members(target, addition),
        (target, addition) => *target = addition.clone(),
    }
}

fn merge_members(target: &mut Map<String, Value>, addition: &Map<String, Value>) {
    for (name, value) in addition {
        match target.get_mut(name) {
            Some(existing) => merge(existing, value),
            None => {
                target.insert(name.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_chart_has_these_definitions() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/weft/files/crds");
        for definition in definitions() {
            let name = definition["metadata"]["name"].as_str().expect("a name");
            let path = folder.join(format!("{name}.yaml"));
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let found: Value = serde_norway::from_str(&text).expect("YAML");
            assert!(
                found == definition,
                "{} is not what the types say; run: cargo xtask crds",
                path.display()
            );
        }
    }

    #[test]
    fn every_addition_has_its_place() {
        for (additions, crd) in [
            (authorization_policy(), json!(AuthorizationPolicy::crd())),
            (mesh_policy(), json!(MeshPolicy::crd())),
            (external_workload(), json!(ExternalWorkload::crd())),
        ] {
            for (place, _) in additions {
                let path =
                    format!("/spec/versions/0/schema/openAPIV3Schema/properties/spec{place}");
                assert!(crd.pointer(&path).is_some(), "{path} does not exist");
            }
        }
    }

    #[test]
    fn every_list_and_text_of_a_spec_has_a_bound() {
        fn unbounded(path: &str, schema: &Value, found: &mut Vec<String>) {
            let lacks = |name: &str| schema.get(name).is_none();
            match schema["type"].as_str() {
                Some("array") if lacks("maxItems") => found.push(path.to_owned()),
                Some("string") if lacks("maxLength") && lacks("enum") => {
                    found.push(path.to_owned());
                }
                Some("object") if !lacks("additionalProperties") && lacks("maxProperties") => {
                    found.push(path.to_owned());
                }
                _ => {}
            }
            for (name, member) in schema["properties"].as_object().into_iter().flatten() {
                unbounded(&format!("{path}.{name}"), member, found);
            }
            for inner in ["items", "additionalProperties"] {
                if let Some(inner) = schema.get(inner) {
                    unbounded(&format!("{path}[]"), inner, found);
                }
            }
        }
        let mut found = Vec::new();
        for definition in definitions() {
            let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
            let name = definition["spec"]["names"]["kind"]
                .as_str()
                .expect("a kind");
            unbounded(name, definition.pointer(spec).expect("a spec"), &mut found);
        }
        assert_eq!(found, Vec::<String>::new());
    }
}
