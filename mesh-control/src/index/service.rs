//! Services and EndpointSlices.

use std::net::IpAddr;

use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort as KubePort},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use mesh_api::{
    manifest::parse_address,
    proto::workload::{
        self as wire, AppProtocol, IpFamilies, LoadBalancing, NetworkAddress, Port, PortList,
        load_balancing::{HealthPolicy, Mode, Scope},
    },
};

use super::member::{Labels, Member, MemberKey, MemberKind};
use crate::config::MeshConfig;

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A Service, reduced to what the mesh needs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ServiceSpec {
    pub namespace: String,
    pub hostname: String,
    /// `None`: its endpoints are those that EndpointSlices list.
    pub selector: Option<Labels>,
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub wire: wire::Service,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct ServicePort {
    name: Option<String>,
    port: u16,
    target: Target,
    protocol: AppProtocol,
}

#[derive(Debug, Clone, PartialEq)]
enum Target {
    Number(u16),
    Name(String),
}

impl ServiceSpec {
    /// The key on the wire.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    pub fn selects(&self, labels: &Labels) -> bool {
        self.selector
            .as_ref()
            .is_some_and(|selector| contains_all(labels, selector))
    }

    pub fn from_manifest(
        mesh: &MeshConfig,
        namespace: &str,
        name: &str,
        service: &Service,
    ) -> Self {
        let spec = service.spec.clone().unwrap_or_default();
        let ports: Vec<_> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(ServicePort::from_kube)
            .collect();
        let mut vips = Vec::new();
        let listed = spec.cluster_ips.iter().flatten().map(String::as_str);
        for ip in spec.cluster_ip.as_deref().into_iter().chain(listed) {
            // `None` (headless) and the empty text are no addresses.
            if let Ok(ip) = parse_address(ip)
                && !vips.contains(&ip)
            {
                vips.push(ip);
            }
        }
        let hostname = format!("{name}.{namespace}.svc.{}", mesh.cluster_domain);
        let families: Vec<_> = spec
            .ip_families
            .iter()
            .flatten()
            .map(String::as_str)
            .collect();
        let wire = wire::Service {
            name: name.into(),
            namespace: namespace.into(),
            hostname: hostname.clone(),
            addresses: vips
                .iter()
                .map(|vip| network_address(&mesh.network, *vip))
                .collect(),
            ports: ports.iter().map(ServicePort::to_wire).collect(),
            load_balancing: load_balancing(
                spec.traffic_distribution.as_deref(),
                spec.internal_traffic_policy.as_deref() == Some("Local"),
                spec.publish_not_ready_addresses.unwrap_or(false),
            ),
            ip_families: match families[..] {
                ["IPv4"] => IpFamilies::Ipv4Only,
                ["IPv6"] => IpFamilies::Ipv6Only,
                [_, _] => IpFamilies::Dual,
                _ => IpFamilies::Automatic,
            }
            .into(),
            ..wire::Service::default()
        };
        Self {
            namespace: namespace.into(),
            hostname,
            selector: spec.selector.filter(|selector| !selector.is_empty()),
            vips,
            ports,
            wire,
        }
    }

    /// The ports of `member` as an endpoint chosen by the selector.
    pub fn endpoint_ports(&self, member: &Member) -> PortList {
        let ports = self.ports.iter().filter_map(|port| {
            let target = match &port.target {
                Target::Number(number) => *number,
                Target::Name(name) => *member.named_ports.get(name)?,
            };
            Some(port.resolved(target))
        });
        PortList {
            ports: ports.collect(),
        }
    }

    /// The ports of an endpoint that a slice lists: joined by the name of the port, as EndpointSlices define it.
    pub fn slice_ports(&self, slice: &SliceSpec) -> PortList {
        let ports = self.ports.iter().filter_map(|port| {
            let name = port.name.as_deref().unwrap_or_default();
            let (_, target) = slice
                .ports
                .iter()
                .find(|(slice_name, _)| slice_name == name)?;
            Some(port.resolved(*target))
        });
        PortList {
            ports: ports.collect(),
        }
    }
}

impl ServicePort {
    fn from_kube(port: &KubePort) -> Option<Self> {
        if port
            .protocol
            .as_deref()
            .is_some_and(|protocol| protocol != "TCP")
        {
            return None;
        }
        let number = u16::try_from(port.port).ok()?;
        let target = match &port.target_port {
            None => Target::Number(number),
            Some(IntOrString::Int(target)) => Target::Number(u16::try_from(*target).ok()?),
            Some(IntOrString::String(name)) => Target::Name(name.clone()),
        };
        Some(Self {
            name: port.name.clone(),
            port: number,
            target,
            protocol: app_protocol(port.app_protocol.as_deref(), port.name.as_deref()),
        })
    }

    /// Target 0 says that every endpoint names its own.
    fn to_wire(&self) -> Port {
        match self.target {
            Target::Number(number) => self.resolved(number),
            Target::Name(_) => self.resolved(0),
        }
    }

    fn resolved(&self, target: u16) -> Port {
        Port {
            service_port: self.port.into(),
            target_port: target.into(),
            app_protocol: self.protocol.into(),
        }
    }
}

/// The declared protocol: `appProtocol` first, else the first word of the port's name.
fn app_protocol(declared: Option<&str>, name: Option<&str>) -> AppProtocol {
    let from_name = name.map(|name| name.split('-').next().unwrap_or(name));
    match declared
        .or(from_name)
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        Some("http" | "http1") => AppProtocol::Http11,
        Some("http2" | "h2c" | "kubernetes.io/h2c") => AppProtocol::Http2,
        Some("grpc") => AppProtocol::Grpc,
        Some("https" | "tls") => AppProtocol::Tls,
        Some("tcp") => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

fn load_balancing(
    distribution: Option<&str>,
    local_only: bool,
    publish_not_ready: bool,
) -> Option<LoadBalancing> {
    let (mode, preference) = match (local_only, distribution) {
        (true, _) => (Mode::Strict, vec![Scope::Node]),
        (false, Some("PreferClose" | "PreferSameZone")) => (
            Mode::Failover,
            vec![Scope::Network, Scope::Region, Scope::Zone],
        ),
        (false, Some("PreferSameNode")) => (
            Mode::Failover,
            vec![
                Scope::Network,
                Scope::Region,
                Scope::Zone,
                Scope::Subzone,
                Scope::Node,
            ],
        ),
        (false, _) if publish_not_ready => (Mode::UnspecifiedMode, Vec::new()),
        (false, _) => return None,
    };
    let health = if publish_not_ready {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    Some(LoadBalancing {
        routing_preference: preference.into_iter().map(Into::into).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

pub(super) fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn network_address(network: &str, address: IpAddr) -> NetworkAddress {
    NetworkAddress {
        network: network.into(),
        address: address_bytes(address),
        length: None,
    }
}

pub(super) fn contains_all(labels: &Labels, wanted: &Labels) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// An EndpointSlice, reduced to what the mesh needs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SliceSpec {
    pub service: Option<String>,
    pub endpoints: Vec<SliceEndpoint>,
    /// TCP ports by name; the name may be empty.
    ports: Vec<(String, u16)>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct SliceEndpoint {
    pub addresses: Vec<IpAddr>,
    pub ready: bool,
    pub target: Option<MemberKey>,
    pub node: String,
    pub zone: String,
}

impl SliceSpec {
    pub fn from_manifest(namespace: &str, slice: &EndpointSlice) -> Self {
        let labels = slice.metadata.labels.as_ref();
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            let tcp = port
                .protocol
                .as_deref()
                .is_none_or(|protocol| protocol == "TCP");
            let number = u16::try_from(port.port?).ok()?;
            tcp.then(|| (port.name.clone().unwrap_or_default(), number))
        });
        let endpoints = slice.endpoints.iter().flatten().map(|endpoint| {
            let target = endpoint.target_ref.as_ref().and_then(|target| {
                let kind = match target.kind.as_deref()? {
                    "Pod" => MemberKind::Pod,
                    "ExternalWorkload" => MemberKind::External,
                    _ => return None,
                };
                let namespace = target.namespace.clone().unwrap_or_else(|| namespace.into());
                Some(MemberKey {
                    namespace,
                    kind,
                    name: target.name.clone()?,
                })
            });
            let conditions = endpoint.conditions.as_ref();
            SliceEndpoint {
                addresses: endpoint
                    .addresses
                    .iter()
                    .filter_map(|ip| parse_address(ip).ok())
                    .collect(),
                // Kubernetes: an unknown condition is to be read as ready.
                ready: conditions
                    .and_then(|conditions| conditions.ready)
                    .unwrap_or(true),
                target,
                node: endpoint.node_name.clone().unwrap_or_default(),
                zone: endpoint.zone.clone().unwrap_or_default(),
            }
        });
        Self {
            service: labels.and_then(|labels| labels.get(SERVICE_NAME_LABEL).cloned()),
            endpoints: endpoints.collect(),
            ports: ports.collect(),
        }
    }
}

impl SliceEndpoint {
    /// Whether this endpoint is `member`, by reference or else by address.
    pub fn is(&self, member: &Member) -> bool {
        match &self.target {
            Some(target) => *target == member.key,
            None => self
                .addresses
                .iter()
                .any(|address| member.addresses.contains(address)),
        }
    }
}
