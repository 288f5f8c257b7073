//! Kubernetes-shaped manifests in the folder that the control plane watches.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::lab::{Node, Pod};

/// A folder of manifests.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `<name>.yaml` with these objects, replacing it as a whole.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let documents: Vec<String> = objects.iter().map(yaml).collect();
        self.write_text(name, &documents.join("---\n"))
    }

    /// Writes `<name>.yaml` with this text, replacing it as a whole: renamed into place, so no reader sees half.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        let draft = self.path.join(format!(".{name}.draft"));
        let file = self.path.join(format!("{name}.yaml"));
        fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        fs::rename(&draft, &file).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Removes `<name>.yaml`.
    ///
    /// # Errors
    /// It does not exist.
    pub fn remove(&self, name: &str) -> Result<()> {
        let file = self.path.join(format!("{name}.yaml"));
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }
}

/// A Pod as the kubelet of its node would report it.
#[must_use]
pub fn pod(node: &Node, pod: &Pod, ready: bool) -> Value {
    let mut labels = json!(pod.spec.labels);
    if pod.spec.meshed {
        labels["weft.dev/mesh"] = json!("enabled");
    }
    let status = if ready { "True" } else { "False" };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": pod.spec.name, "namespace": pod.spec.namespace, "labels": labels },
        "spec": {
            "nodeName": node.name,
            "serviceAccountName": pod.spec.service_account,
            "containers": [{ "name": "app", "image": "app" }],
        },
        "status": {
            "phase": "Running",
            "podIP": pod.address(),
            "podIPs": pod.addresses.iter().map(|address| json!({ "ip": address })).collect::<Vec<_>>(),
            "conditions": [{ "type": "Ready", "status": status }],
        },
    })
}

/// A ServiceAccount.
#[must_use]
pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": namespace } })
}

/// A port of a Service.
#[derive(Debug, Clone, Copy)]
pub struct ServicePort<'a> {
    /// Its name; a prefix such as `http` or `tcp` declares the protocol.
    pub name: &'a str,
    /// Port of the Service.
    pub port: u16,
    /// Port of the pods.
    pub target: u16,
}

/// A Service that selects pods by their `app` label.
#[must_use]
pub fn service(
    namespace: &str,
    name: &str,
    app: &str,
    addresses: &[IpAddr],
    ports: &[ServicePort<'_>],
) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| json!({ "name": port.name, "port": port.port, "targetPort": port.target, "protocol": "TCP" }))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "selector": { "app": app },
            "clusterIP": addresses.first(),
            "clusterIPs": addresses,
            "ports": ports,
        },
    })
}

/// An object of Weft's own kinds: `AuthorizationPolicy` or `MeshPolicy`.
#[must_use]
pub fn policy(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1",
        "kind": kind,
        "metadata": { "name": name, "namespace": namespace },
        "spec": spec,
    })
}

/// Block-style YAML of a value. Texts are quoted as in JSON, which YAML reads the same.
fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_block(value, 0, &mut text);
    text
}

fn write_block(value: &Value, indent: usize, text: &mut String) {
    let margin = "  ".repeat(indent);
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                text.push_str(&format!("{margin}{}:", key(name)));
                write_value(value, indent, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                text.push_str(&format!("{margin}-"));
                write_value(item, indent, text);
            }
        }
        scalar => text.push_str(&format!("{margin}{scalar}\n")),
    }
}

fn write_value(value: &Value, indent: usize, text: &mut String) {
    let is_block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        text.push('\n');
        write_block(value, indent + 1, text);
    } else {
        text.push_str(&format!(" {value}\n"));
    }
}

/// Keys stay bare where that is safe in YAML.
fn key(name: &str) -> String {
    let is_plain = name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._/".contains(c));
    if is_plain {
        name.to_owned()
    } else {
        Value::from(name).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_readable_and_exact() {
        let value =
            json!({ "kind": "Pod", "a": [{ "b": 1, "c": "x: y" }, 2], "none": {}, "9": true });
        let expected =
            "\"9\": true\na:\n  -\n    b: 1\n    c: \"x: y\"\n  - 2\nkind: \"Pod\"\nnone: {}\n";
        assert_eq!(yaml(&value), expected);
    }
}
