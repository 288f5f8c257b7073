//! From the wire to the model: parse, check every field, apply the protocol's defaults. What does not parse is
//! refused as a whole, with an error that names the resource and the field; nothing is ever half accepted.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::{
    identity::{Identity, IdentityError},
    names::{NamespacedName, NotNamespaced, WorkloadUid},
    proto::{weft, workload as wire},
};
use prost::Message as _;

use super::{
    model::{
        BalancingMode, CaptureSettings, FailureMode, Locality, SameNode, Scope, Service, Tunnel,
        Workload,
    },
    state::{ServiceEntry, VirtualAddress, WorkloadEntry},
};
use crate::policy::PolicyError;

/// Most addresses of one workload, or virtual addresses of one service. Pods have two; services of many networks have
/// tens. The limit keeps one resource from filling the address index.
pub use mesh_api::limits::ADDRESSES_MAX;
/// Most services that one workload is a member of.
pub const SERVICES_PER_WORKLOAD_MAX: usize = 1_024;
/// Most ports of one service, and most port mappings of one workload in one service.
pub use mesh_api::limits::PORTS_MAX;
/// Most policies that select one workload by name.
pub const POLICIES_PER_WORKLOAD_MAX: usize = 4_096;
/// Longest resource name or free-text field, in bytes. Kubernetes names are at most 253 bytes, and a workload's uid
/// joins five parts.
pub const TEXT_MAX_BYTES: usize = 1_500;

/// A resource that was refused. The peer (the control plane) is at fault; sending the same bytes again cannot succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {fault}")]
pub struct Rejected {
    /// The resource's name.
    pub name: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a resource, and in which field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The bytes are not the message they claim to be.
    #[error("cannot be decoded: {0}")]
    Decode(String),
    /// The resource carries no body.
    #[error("has no body")]
    Empty,
    /// The resource's name is not the key that its content has.
    #[error("is named differently from its content, {key:?}")]
    Misnamed {
        /// Key by content.
        key: String,
    },
    /// A field that must be set is not.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A text is longer than [`TEXT_MAX_BYTES`].
    #[error("{field} is {bytes} bytes long, at most {TEXT_MAX_BYTES} are allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// A list is longer than its limit.
    #[error("{field} has {count} elements, at most {limit} are allowed")]
    TooMany {
        /// The field.
        field: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// A number that the enumeration does not define.
    #[error("{field} has the unknown value {value}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// The number.
        value: i32,
    },
    /// A value that is defined, but that this agent cannot honour.
    #[error("{field} asks for {what}, which is not supported")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// What it asks for.
        what: &'static str,
    },
    /// An address that is neither 4 nor 16 bytes long.
    #[error("{field} holds an address of {bytes} bytes, not 4 or 16")]
    AddressLength {
        /// The field.
        field: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// An address that cannot be a workload's.
    #[error("{field} holds the unusable address {address}")]
    AddressUnusable {
        /// The field.
        field: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// A prefix longer than the address.
    #[error("{field} holds a prefix of {length} bits for {address}")]
    PrefixLength {
        /// The field.
        field: &'static str,
        /// The address.
        address: IpAddr,
        /// The length.
        length: u32,
    },
    /// Not a usable port number.
    #[error("{field} holds the unusable port {port}")]
    Port {
        /// The field.
        field: &'static str,
        /// The number.
        port: u32,
    },
    /// The parts do not make an identity.
    #[error("its identity is unusable: {0}")]
    Identity(#[from] IdentityError),
    /// A key that is not `<namespace>/<name>`.
    #[error("{field}: {source}")]
    Key {
        /// The field.
        field: &'static str,
        /// Why not.
        source: NotNamespaced,
    },
    /// The policy is not one that can be enforced.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// One converted `Address` resource.
#[derive(Debug)]
pub(super) enum AddressEntry {
    Workload(Arc<WorkloadEntry>),
    Service(Arc<ServiceEntry>),
}

/// Converts the body of an `istio.workload.Address` resource.
pub(super) fn address(name: &str, body: &[u8]) -> Result<AddressEntry, Fault> {
    check_text("resource name", name)?;
    match wire::Address::decode(body)
        .map_err(|e| Fault::Decode(e.to_string()))?
        .r#type
    {
        None => Err(Fault::Missing { field: "type" }),
        Some(wire::address::Type::Workload(workload)) => {
            if workload.uid != name {
                return Err(Fault::Misnamed {
                    key: head(&workload.uid),
                });
            }
            Ok(AddressEntry::Workload(Arc::new(workload_entry(workload)?)))
        }
        Some(wire::address::Type::Service(service)) => {
            let key = service_key(&service)?;
            if key.to_string() != name {
                return Err(Fault::Misnamed {
                    key: head(&key.to_string()),
                });
            }
            Ok(AddressEntry::Service(Arc::new(service_entry(
                service, key,
            )?)))
        }
    }
}

/// Enough of a text for an error message.
fn head(text: &str) -> String {
    text.chars().take(128).collect()
}

fn workload_entry(w: wire::Workload) -> Result<WorkloadEntry, Fault> {
    required("uid", &w.uid)?;
    for (field, text) in [
        ("name", &w.name),
        ("network", &w.network),
        ("node", &w.node),
        ("canonical_name", &w.canonical_name),
        ("canonical_revision", &w.canonical_revision),
        ("workload_name", &w.workload_name),
        ("cluster_id", &w.cluster_id),
    ] {
        check_text(field, text)?;
    }
    let tunnel = match known("tunnel_protocol", w.tunnel_protocol)? {
        wire::TunnelProtocol::None => Tunnel::None,
        wire::TunnelProtocol::Hbone => Tunnel::Hbone,
        wire::TunnelProtocol::LegacyIstioMtls => {
            return Err(Fault::Unsupported {
                field: "tunnel_protocol",
                what: "the legacy Istio mTLS tunnel",
            });
        }
    };
    let waypoint = w
        .waypoint
        .as_ref()
        .map(check_gateway)
        .transpose()?
        .is_some();
    // A weight of zero asks for no traffic, which is what an unhealthy endpoint gets.
    let capacity = w.capacity.unwrap_or(1);
    let healthy = known::<wire::WorkloadStatus>("status", w.status)?
        == wire::WorkloadStatus::Healthy
        && capacity > 0;
    let identity = Identity::new(
        default_to(&w.trust_domain, "cluster.local"),
        &w.namespace,
        default_to(&w.service_account, "default"),
    )?;
    let workload = Workload {
        addresses: workload_addresses(&w.addresses)?,
        services: workload_services(&w.services)?,
        policies: workload_policies(&w.authorization_policies)?,
        capture: capture_settings(&w.extensions)?,
        locality: locality(w.locality)?,
        workload_type: workload_type(w.workload_type)?,
        host_network: known::<wire::NetworkMode>("network_mode", w.network_mode)?
            == wire::NetworkMode::HostNetwork,
        uid: WorkloadUid(w.uid.into()),
        name: w.name.into(),
        namespace: w.namespace.into(),
        identity: identity.clone(),
        network: w.network.into(),
        tunnel,
        node: w.node.into(),
        cluster: default_to(&w.cluster_id, "Kubernetes").into(),
        canonical_name: w.canonical_name.into(),
        canonical_revision: w.canonical_revision.into(),
        workload_name: w.workload_name.into(),
        healthy,
        capacity: capacity.max(1),
    };
    Ok(WorkloadEntry {
        workload: Arc::new(workload),
        identities: Arc::new([identity]),
        waypoint,
    })
}

fn default_to<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn workload_type(value: i32) -> Result<&'static str, Fault> {
    Ok(match known("workload_type", value)? {
        wire::WorkloadType::Deployment => "deployment",
        wire::WorkloadType::Cronjob => "cronjob",
        wire::WorkloadType::Pod => "pod",
        wire::WorkloadType::Job => "job",
    })
}

fn locality(locality: Option<wire::Locality>) -> Result<Locality, Fault> {
    let Some(l) = locality else {
        return Ok(Locality::default());
    };
    for (field, text) in [
        ("region", &l.region),
        ("zone", &l.zone),
        ("subzone", &l.subzone),
    ] {
        check_text(field, text)?;
    }
    Ok(Locality {
        region: l.region.into(),
        zone: l.zone.into(),
        subzone: l.subzone.into(),
    })
}

fn workload_addresses(addresses: &[Vec<u8>]) -> Result<Vec<IpAddr>, Fault> {
    const FIELD: &str = "addresses";
    check_count(FIELD, addresses.len(), ADDRESSES_MAX)?;
    let mut parsed = Vec::with_capacity(addresses.len());
    for bytes in addresses {
        let address = ip_address(FIELD, bytes)?;
        if address.is_unspecified() || address.is_multicast() {
            return Err(Fault::AddressUnusable {
                field: FIELD,
                address,
            });
        }
        if !parsed.contains(&address) {
            parsed.push(address);
        }
    }
    Ok(parsed)
}

type PortMaps = BTreeMap<NamespacedName, BTreeMap<u16, u16>>;

fn workload_services(
    services: &std::collections::HashMap<String, wire::PortList>,
) -> Result<PortMaps, Fault> {
    const FIELD: &str = "services";
    check_count(FIELD, services.len(), SERVICES_PER_WORKLOAD_MAX)?;
    let mut parsed = BTreeMap::new();
    for (key, ports) in services {
        check_count("services.ports", ports.ports.len(), PORTS_MAX)?;
        let ports = ports.ports.iter().map(|p| {
            Ok((
                port("services.service_port", p.service_port)?,
                port("services.target_port", p.target_port)?,
            ))
        });
        parsed.insert(
            namespaced(FIELD, key)?,
            ports.collect::<Result<_, Fault>>()?,
        );
    }
    Ok(parsed)
}

fn workload_policies(policies: &[String]) -> Result<Vec<NamespacedName>, Fault> {
    const FIELD: &str = "authorization_policies";
    check_count(FIELD, policies.len(), POLICIES_PER_WORKLOAD_MAX)?;
    policies.iter().map(|key| namespaced(FIELD, key)).collect()
}

fn capture_settings(extensions: &[wire::Extension]) -> Result<CaptureSettings, Fault> {
    const FIELD: &str = "extensions[weft.dev/capture]";
    let Some(extension) = extensions
        .iter()
        .find(|e| e.name == weft::CAPTURE_EXTENSION)
    else {
        return Ok(CaptureSettings::default());
    };
    let any = extension
        .config
        .as_ref()
        .ok_or(Fault::Missing { field: FIELD })?;
    if any.type_url != weft::CAPTURE_TYPE_URL {
        return Err(Fault::Unsupported {
            field: FIELD,
            what: "a type of configuration that is not weft.v1.Capture",
        });
    }
    let capture = weft::Capture::decode(any.value.as_slice())
        .map_err(|e| Fault::Decode(format!("{FIELD}: {e}")))?;
    Ok(CaptureSettings {
        failure_mode: match known(FIELD, capture.failure_mode)? {
            weft::FailureMode::Closed => FailureMode::Closed,
            weft::FailureMode::Open => FailureMode::Open,
        },
        same_node: match known(FIELD, capture.same_node)? {
            weft::SameNode::Kernel => SameNode::Kernel,
            weft::SameNode::Tunnel => SameNode::Tunnel,
        },
    })
}

fn service_key(s: &wire::Service) -> Result<NamespacedName, Fault> {
    required("namespace", &s.namespace)?;
    required("hostname", &s.hostname)?;
    Ok(NamespacedName::new(&s.namespace, &s.hostname))
}

fn service_entry(s: wire::Service, key: NamespacedName) -> Result<ServiceEntry, Fault> {
    check_text("name", &s.name)?;
    check_count("addresses", s.addresses.len(), ADDRESSES_MAX)?;
    check_count("ports", s.ports.len(), PORTS_MAX)?;
    let mut virtual_addresses = Vec::with_capacity(s.addresses.len());
    for address in &s.addresses {
        check_text("addresses.network", &address.network)?;
        let range = ip_range("addresses", &address.address, address.length)?;
        // Istio's placeholder for "no address of its own".
        if !range.addr().is_unspecified() || range.prefix_len() == 0 {
            virtual_addresses.push(VirtualAddress {
                network: address.network.as_str().into(),
                range,
            });
        }
    }
    let ports = s.ports.iter().map(|p| {
        // Zero: the name of a container port, which every endpoint resolves for itself.
        let target = if p.target_port == 0 {
            0
        } else {
            port("ports.target_port", p.target_port)?
        };
        Ok((port("ports.service_port", p.service_port)?, target))
    });
    let balancing = s.load_balancing.unwrap_or_default();
    let is_host = |v: &&VirtualAddress| v.range.prefix_len() == v.range.max_prefix_len();
    let service = Service {
        key,
        name: s.name.into(),
        vips: virtual_addresses
            .iter()
            .filter(is_host)
            .map(|v| v.range.addr())
            .collect(),
        vip_ranges: virtual_addresses
            .iter()
            .filter(|v| !is_host(v))
            .map(|v| v.range)
            .collect(),
        ports: ports.collect::<Result<_, Fault>>()?,
        // Names of another form cannot be matched against a mesh certificate: leaving them out only refuses more.
        subject_alt_names: s
            .subject_alt_names
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect(),
        mode: balancing_mode(balancing.mode)?,
        preference: preference(&balancing.routing_preference)?,
        allow_unhealthy: known::<wire::load_balancing::HealthPolicy>(
            "health_policy",
            balancing.health_policy,
        )? == wire::load_balancing::HealthPolicy::AllowAll,
        namespace_only: known::<wire::service::Visibility>("visibility", s.visibility)?
            == wire::service::Visibility::Namespace,
        canonical: s.canonical,
    };
    if let Some(gateway) = &s.waypoint {
        check_gateway(gateway)?;
    }
    Ok(ServiceEntry {
        service: Arc::new(service),
        virtual_addresses,
        families: known("ip_families", s.ip_families)?,
        waypoint: s.waypoint.is_some() || !s.weighted_waypoints.is_empty(),
    })
}

fn balancing_mode(value: i32) -> Result<BalancingMode, Fault> {
    Ok(match known("load_balancing.mode", value)? {
        wire::load_balancing::Mode::UnspecifiedMode => BalancingMode::Standard,
        wire::load_balancing::Mode::Strict => BalancingMode::Strict,
        wire::load_balancing::Mode::Failover => BalancingMode::Failover,
        wire::load_balancing::Mode::Passthrough => BalancingMode::Passthrough,
    })
}

fn preference(scopes: &[i32]) -> Result<Vec<Scope>, Fault> {
    const FIELD: &str = "load_balancing.routing_preference";
    // There are six scopes; naming one twice adds nothing.
    check_count(FIELD, scopes.len(), 6)?;
    let scope = |value: &i32| {
        Ok(match known(FIELD, *value)? {
            wire::load_balancing::Scope::UnspecifiedScope => {
                return Err(Fault::Missing { field: FIELD });
            }
            wire::load_balancing::Scope::Region => Scope::Region,
            wire::load_balancing::Scope::Zone => Scope::Zone,
            wire::load_balancing::Scope::Subzone => Scope::Subzone,
            wire::load_balancing::Scope::Node => Scope::Node,
            wire::load_balancing::Scope::Cluster => Scope::Cluster,
            wire::load_balancing::Scope::Network => Scope::Network,
        })
    };
    scopes.iter().map(scope).collect()
}

fn check_gateway(gateway: &wire::GatewayAddress) -> Result<(), Fault> {
    match &gateway.destination {
        Some(_) => Ok(()),
        None => Err(Fault::Missing {
            field: "waypoint.destination",
        }),
    }
}

/// An enumeration's value, if it defines one for the number.
fn known<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, Fault> {
    E::try_from(value).map_err(|_| Fault::UnknownValue { field, value })
}

fn required(field: &'static str, text: &str) -> Result<(), Fault> {
    if text.is_empty() {
        Err(Fault::Missing { field })
    } else {
        check_text(field, text)
    }
}

fn check_text(field: &'static str, text: &str) -> Result<(), Fault> {
    if text.len() > TEXT_MAX_BYTES {
        Err(Fault::TooLong {
            field,
            bytes: text.len(),
        })
    } else {
        Ok(())
    }
}

fn check_count(field: &'static str, count: usize, limit: usize) -> Result<(), Fault> {
    if count > limit {
        Err(Fault::TooMany {
            field,
            count,
            limit,
        })
    } else {
        Ok(())
    }
}

fn namespaced(field: &'static str, key: &str) -> Result<NamespacedName, Fault> {
    check_text(field, key)?;
    key.parse().map_err(|source| Fault::Key { field, source })
}

fn port(field: &'static str, port: u32) -> Result<u16, Fault> {
    match u16::try_from(port) {
        Ok(usable) if usable > 0 => Ok(usable),
        _ => Err(Fault::Port { field, port }),
    }
}

/// An address in its canonical form: IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2) becomes IPv4.
pub(crate) fn ip_address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Fault> {
    raw_address(field, bytes).map(|address| address.to_canonical())
}

fn raw_address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Fault> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(Ipv4Addr::from(v4).into())
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(Ipv6Addr::from(v6).into())
    } else {
        Err(Fault::AddressLength {
            field,
            bytes: bytes.len(),
        })
    }
}

/// A range in its canonical form, host bits cleared; without a length it is the one address.
pub(crate) fn ip_range(
    field: &'static str,
    bytes: &[u8],
    length: Option<u32>,
) -> Result<IpNet, Fault> {
    /// Bits of the prefix `::ffff:0:0/96`.
    const MAPPED_BITS: u8 = 96;
    let raw = raw_address(field, bytes)?;
    let width = if raw.is_ipv4() { 32 } else { 128 };
    let length = length.unwrap_or(width);
    let fault = Fault::PrefixLength {
        field,
        address: raw,
        length,
    };
    let Ok(bits) = u8::try_from(length) else {
        return Err(fault);
    };
    let canonical = raw.to_canonical();
    let bits = match (raw, canonical) {
        // A mapped address with fewer bits than the mapping's own prefix is a range of neither family: refused.
        (IpAddr::V6(_), IpAddr::V4(_)) if bits >= MAPPED_BITS => bits - MAPPED_BITS,
        (IpAddr::V6(_), IpAddr::V4(_)) => return Err(fault),
        _ => bits,
    };
    IpNet::new(canonical, bits)
        .map(|net| net.trunc())
        .map_err(|_| fault)
}
