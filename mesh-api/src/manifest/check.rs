//! Values that a schema cannot check: names, labels, addresses, ports and patterns.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    AuthorizationPolicy, ENROL_LABEL, ExternalWorkload, MeshPolicy, Object, Rule, Source,
    StringPattern, WorkloadSelector,
};
use crate::{
    identity::Identity,
    limits::{ADDRESSES_MAX, PORTS_MAX, VALUES_PER_POLICY_MAX},
};

/// Longest object name (RFC 1123 subdomain as Kubernetes limits it), in bytes.
const NAME_MAX_BYTES: usize = 253;
/// Longest namespace, label value or name part of a label key, in bytes.
const LABEL_MAX_BYTES: usize = 63;
/// Most ports of a MeshPolicy: each is a value of the policy that is made of it, beside a few of its own.
const MODE_PORTS_MAX: usize = VALUES_PER_POLICY_MAX - 10;

/// Something wrong with the value of one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldProblem {
    /// Path of the field.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

#[derive(Default)]
struct Problems(Vec<FieldProblem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldProblem {
            field: field.into(),
            message: message.into(),
        });
    }

    fn address(&mut self, field: String, text: &str) {
        if let Err(message) = parse_address(text) {
            self.add(field, message);
        }
    }

    fn port(&mut self, field: String, port: i64) {
        if !(1..=i64::from(u16::MAX)).contains(&port) {
            self.add(field, format!("port {port} is not between 1 and 65535"));
        }
    }

    fn count(&mut self, field: &str, count: usize, max: usize) {
        if count > max {
            self.add(
                field,
                format!("has {count} values, at most {max} are allowed"),
            );
        }
    }

    fn short(&mut self, field: &str, text: &str) {
        let bytes = text.len();
        if bytes > NAME_MAX_BYTES {
            let message = format!("is {bytes} bytes long, at most {NAME_MAX_BYTES} are allowed");
            self.add(field, message);
        }
    }

    fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        for (key, value) in labels {
            if !is_label_key(key) {
                self.add(format!("{field}.{key}"), "is not a label key");
            }
            if !is_label_value(value) {
                let message = format!(
                    "{value:?} is not a label value: at most {LABEL_MAX_BYTES} letters, digits, `-`, `_` or `.`"
                );
                self.add(format!("{field}.{key}"), message);
            }
        }
    }

    fn selector(&mut self, selector: Option<&WorkloadSelector>) {
        if let Some(selector) = selector {
            self.labels("spec.selector.matchLabels", &selector.match_labels);
        }
    }

    fn service_account(&mut self, field: &str, account: &str) {
        if Identity::new("checked.elsewhere", "checked", account).is_err() {
            self.add(field, format!("{account:?} cannot be part of an identity"));
        }
    }
}

/// Reads an address; IPv4-mapped IPv6 becomes IPv4.
///
/// # Errors
/// A message for the user when `text` is not an address of a workload.
pub fn parse_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address"))?;
    let address = address.to_canonical();
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!(
            "{text:?} is not the address of a workload or service"
        ));
    }
    Ok(address)
}

/// Bits of the prefix of IPv4-mapped IPv6 addresses (RFC 4291 section 2.5.5.2).
const MAPPED_PREFIX_BITS: u8 = 96;

/// Reads an address or a range of addresses, host bits cleared; IPv4-mapped IPv6 becomes IPv4.
///
/// # Errors
/// A message for the user when `text` is neither.
pub fn parse_block(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address.to_canonical()));
    }
    let block: IpNet = text
        .parse()
        .map_err(|_| format!("{text:?} is neither an address nor a range"))?;
    let block = block.trunc();
    let IpAddr::V4(mapped) = block.network().to_canonical() else {
        return Ok(block);
    };
    if block.addr().is_ipv4() {
        return Ok(block);
    }
    let bits = block.prefix_len().checked_sub(MAPPED_PREFIX_BITS);
    let bits = bits.ok_or_else(|| format!("{text:?} is neither a range of IPv4 nor of IPv6"))?;
    IpNet::new(mapped.into(), bits).map_err(|error| format!("{text:?}: {error}"))
}

pub(super) fn object(object: &Object) -> Vec<FieldProblem> {
    let mut problems = Problems::default();
    metadata(object, &mut problems);
    match object {
        Object::Pod(pod) => check_pod(pod, &mut problems),
        Object::Service(service) => check_service(service, &mut problems),
        Object::EndpointSlice(slice) => check_slice(slice, &mut problems),
        Object::AuthorizationPolicy(policy) => check_authorization(policy, &mut problems),
        Object::MeshPolicy(policy) => check_mesh_policy(policy, &mut problems),
        Object::ExternalWorkload(workload) => check_external(workload, &mut problems),
        Object::Namespace(_) | Object::Node(_) | Object::ServiceAccount(_) => {}
    }
    problems.0
}

fn metadata(object: &Object, problems: &mut Problems) {
    let metadata = object.metadata();
    let key = object.key();
    if !is_name(&key.name) {
        let message = format!(
            "{:?} is not a name: lower-case letters, digits, `-` and `.`",
            key.name
        );
        problems.add("metadata.name", message);
    }
    if object.kind().namespaced() {
        if !is_namespace(&key.namespace) {
            problems.add(
                "metadata.namespace",
                format!("{:?} is not a namespace", key.namespace),
            );
        }
    } else if metadata.namespace.is_some() {
        problems.add(
            "metadata.namespace",
            format!("a {} has no namespace", object.kind()),
        );
    }
    if let Some(labels) = &metadata.labels {
        problems.labels("metadata.labels", labels);
        if let Some(value) = labels.get(ENROL_LABEL)
            && value != "enabled"
            && value != "disabled"
        {
            let message = format!("{value:?} must be `enabled` or `disabled`");
            problems.add(format!("metadata.labels.{ENROL_LABEL}"), message);
        }
    }
}

fn check_pod(pod: &Pod, problems: &mut Problems) {
    if let Some(status) = &pod.status {
        if let Some(ip) = &status.pod_ip {
            problems.address("status.podIP".into(), ip);
        }
        let count = status.pod_ips.as_ref().map_or(0, Vec::len);
        problems.count("status.podIPs", count, ADDRESSES_MAX);
        for (index, ip) in status.pod_ips.iter().flatten().enumerate() {
            problems.address(format!("status.podIPs[{index}].ip"), &ip.ip);
        }
    }
    let Some(spec) = &pod.spec else {
        problems.add("spec", "is required");
        return;
    };
    problems.short(
        "spec.nodeName",
        spec.node_name.as_deref().unwrap_or_default(),
    );
    if let Some(account) = &spec.service_account_name {
        problems.service_account("spec.serviceAccountName", account);
    }
    for (index, container) in spec.containers.iter().enumerate() {
        for (port_index, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("spec.containers[{index}].ports[{port_index}].containerPort");
            problems.port(field, port.container_port.into());
        }
    }
}

fn check_service(service: &Service, problems: &mut Problems) {
    let Some(spec) = &service.spec else {
        problems.add("spec", "is required");
        return;
    };
    if let Some(ip) = spec
        .cluster_ip
        .as_deref()
        .filter(|ip| !matches!(*ip, "" | "None"))
    {
        problems.address("spec.clusterIP".into(), ip);
    }
    let count = |values: Option<usize>| values.unwrap_or(0);
    let (addresses, ports) = (
        spec.cluster_ips.as_ref().map(Vec::len),
        spec.ports.as_ref().map(Vec::len),
    );
    problems.count("spec.clusterIPs", count(addresses), ADDRESSES_MAX);
    problems.count("spec.ports", count(ports), PORTS_MAX);
    for (index, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        if ip != "None" {
            problems.address(format!("spec.clusterIPs[{index}]"), ip);
        }
    }
    if let Some(selector) = &spec.selector {
        problems.labels("spec.selector", selector);
    }
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        problems.port(format!("spec.ports[{index}].port"), port.port.into());
        match &port.target_port {
            Some(IntOrString::Int(target)) => {
                problems.port(format!("spec.ports[{index}].targetPort"), (*target).into());
            }
            Some(IntOrString::String(name)) if !is_port_name(name) => {
                let message = format!("{name:?} is neither a port nor the name of one");
                problems.add(format!("spec.ports[{index}].targetPort"), message);
            }
            _ => {}
        }
    }
    if let Some(value) = &spec.traffic_distribution
        && !matches!(
            value.as_str(),
            "PreferClose" | "PreferSameZone" | "PreferSameNode"
        )
    {
        let message = format!("{value:?} must be PreferClose, PreferSameZone or PreferSameNode");
        problems.add("spec.trafficDistribution", message);
    }
    if let Some(value) = &spec.internal_traffic_policy
        && !matches!(value.as_str(), "Cluster" | "Local")
    {
        problems.add(
            "spec.internalTrafficPolicy",
            format!("{value:?} must be Cluster or Local"),
        );
    }
}

fn check_slice(slice: &EndpointSlice, problems: &mut Problems) {
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        for (address_index, address) in endpoint.addresses.iter().enumerate() {
            if slice.address_type == "FQDN" {
                continue;
            }
            problems.address(
                format!("endpoints[{index}].addresses[{address_index}]"),
                address,
            );
        }
    }
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        if let Some(port) = port.port {
            problems.port(format!("ports[{index}].port"), port.into());
        }
    }
    if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6" | "FQDN") {
        problems.add(
            "addressType",
            format!("{:?} must be IPv4, IPv6 or FQDN", slice.address_type),
        );
    }
}

fn check_authorization(policy: &AuthorizationPolicy, problems: &mut Problems) {
    problems.selector(policy.spec.selector.as_ref());
    let values = policy.spec.rules.iter().map(values_of_rule).sum();
    problems.count("spec.rules", values, VALUES_PER_POLICY_MAX);
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        for (from, source) in rule.from.iter().enumerate() {
            check_source(
                &format!("spec.rules[{index}].from[{from}]"),
                source,
                problems,
            );
        }
        for (to, operation) in rule.to.iter().enumerate() {
            let field = format!("spec.rules[{index}].to[{to}]");
            if operation.ports.is_empty() && operation.not_ports.is_empty() {
                problems.add(&field, "sets no field; leave it out to mean any operation");
            }
            for (port_index, port) in operation.ports.iter().enumerate() {
                problems.port(format!("{field}.ports[{port_index}]"), (*port).into());
            }
            for (port_index, port) in operation.not_ports.iter().enumerate() {
                problems.port(format!("{field}.notPorts[{port_index}]"), (*port).into());
            }
        }
    }
}

/// As an agent counts: every rule, its two clauses where they exist, their members and the values of those.
fn values_of_rule(rule: &Rule) -> usize {
    let from = rule.from.iter().map(|source| {
        1 + source.principals.len()
            + source.not_principals.len()
            + source.namespaces.len()
            + source.not_namespaces.len()
            + source.service_accounts.len()
            + source.not_service_accounts.len()
            + source.ip_blocks.len()
            + source.not_ip_blocks.len()
    });
    let to = rule
        .to
        .iter()
        .map(|operation| 1 + operation.ports.len() + operation.not_ports.len());
    let clauses = usize::from(!rule.from.is_empty()) + usize::from(!rule.to.is_empty());
    1 + clauses + from.sum::<usize>() + to.sum::<usize>()
}

fn check_source(field: &str, source: &Source, problems: &mut Problems) {
    let texts = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
    ];
    for (name, values) in texts {
        for (index, value) in values.iter().enumerate() {
            if let Err(error) = value.parse::<StringPattern>() {
                problems.add(format!("{field}.{name}[{index}]"), error.to_string());
            }
        }
    }
    let accounts = [
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
    ];
    for (name, values) in accounts {
        for (index, value) in values.iter().enumerate() {
            let (namespace, account) = value.split_once('/').unwrap_or(("own", value));
            if Identity::new("checked.elsewhere", namespace, account).is_err() {
                let message = format!("{value:?} is neither <namespace>/<name> nor <name>");
                problems.add(format!("{field}.{name}[{index}]"), message);
            }
        }
    }
    for (name, values) in [
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
    ] {
        for (index, value) in values.iter().enumerate() {
            if let Err(message) = parse_block(value) {
                problems.add(format!("{field}.{name}[{index}]"), message);
            }
        }
    }
    if *source == Source::default() {
        problems.add(field, "sets no field; leave it out to mean any source");
    }
}

fn check_mesh_policy(policy: &MeshPolicy, problems: &mut Problems) {
    problems.selector(policy.spec.selector.as_ref());
    let ports = policy
        .spec
        .mtls
        .as_ref()
        .and_then(|mtls| mtls.ports.as_ref());
    let count = ports.map_or(0, BTreeMap::len);
    problems.count("spec.mtls.ports", count, MODE_PORTS_MAX);
    for port in ports.into_iter().flat_map(BTreeMap::keys) {
        if !port.parse::<u16>().is_ok_and(|number| number > 0) {
            problems.add(
                format!("spec.mtls.ports.{port}"),
                "is not a port between 1 and 65535",
            );
        }
    }
}

fn check_external(workload: &ExternalWorkload, problems: &mut Problems) {
    let spec = &workload.spec;
    if spec.addresses.is_empty() {
        problems.add("spec.addresses", "needs at least one address");
    }
    problems.count("spec.addresses", spec.addresses.len(), ADDRESSES_MAX);
    problems.short("spec.node", spec.node.as_deref().unwrap_or_default());
    problems.short("spec.network", spec.network.as_deref().unwrap_or_default());
    if let Some(locality) = &spec.locality {
        problems.short("spec.locality.region", &locality.region);
        problems.short("spec.locality.zone", &locality.zone);
        problems.short("spec.locality.subzone", &locality.subzone);
    }
    for (index, address) in spec.addresses.iter().enumerate() {
        problems.address(format!("spec.addresses[{index}]"), address);
    }
    if let Some(account) = &spec.service_account {
        problems.service_account("spec.serviceAccount", account);
    }
    for (name, port) in &spec.ports {
        problems.port(format!("spec.ports.{name}"), (*port).into());
    }
    if spec.weight == Some(0) {
        problems.add("spec.weight", "must be at least 1");
    }
}

pub(super) fn is_name(text: &str) -> bool {
    is_dns_name(text, NAME_MAX_BYTES)
}

pub(super) fn is_namespace(text: &str) -> bool {
    !text.contains('.') && is_dns_name(text, LABEL_MAX_BYTES)
}

pub(super) fn are_labels(labels: &BTreeMap<String, String>) -> bool {
    let mut labels = labels.iter();
    labels.all(|(key, value)| is_label_key(key) && is_label_value(value))
}

fn is_dns_name(text: &str, max_bytes: usize) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= max_bytes && text.split('.').all(label)
}

fn is_label_value(text: &str) -> bool {
    let edge = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= LABEL_MAX_BYTES
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && edge(text.bytes().next())
        && edge(text.bytes().last())
}

fn is_label_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => {
            is_dns_name(prefix, NAME_MAX_BYTES) && !name.is_empty() && is_label_value(name)
        }
        None => !text.is_empty() && is_label_value(text),
    }
}

/// An IANA service name: what Kubernetes takes as a port name.
fn is_port_name(text: &str) -> bool {
    is_dns_name(text, 15) && !text.contains('.') && text.bytes().any(|b| b.is_ascii_lowercase())
}
