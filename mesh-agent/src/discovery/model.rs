//! The mesh as the agent believes it to be: plain values, no I/O.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::{
    identity::Identity,
    names::{NamespacedName, WorkloadUid},
    proto::security::Authorization,
};

use crate::policy::Compiled;

/// A workload that the control plane told of.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Who it is.
    pub identity: Identity,
    /// Its addresses, IPv4-mapped ones in IPv4 form.
    pub addresses: Vec<IpAddr>,
    /// Network it lives in; empty is the default one.
    pub network: Arc<str>,
    /// How to reach it.
    pub tunnel: Tunnel,
    /// Node that runs it.
    pub node: Arc<str>,
    /// Cluster that runs it.
    pub cluster: Arc<str>,
    /// Name for telemetry ("app").
    pub canonical_name: Arc<str>,
    /// Version for telemetry.
    pub canonical_revision: Arc<str>,
    /// `deployment`, `cronjob`, `pod` or `job`: a key of the baggage header.
    pub workload_type: &'static str,
    /// Name of the owner (of the deployment).
    pub workload_name: Arc<str>,
    /// Whether it may receive new connections as an endpoint of a service.
    pub healthy: bool,
    /// It shares its node's addresses and is never found by address.
    pub host_network: bool,
    /// Where it runs.
    pub locality: Locality,
    /// Weight in balancing, at least 1.
    pub capacity: u32,
    /// Services it belongs to, with the target port of each service port.
    pub services: BTreeMap<NamespacedName, BTreeMap<u16, u16>>,
    /// Policies that select this workload by name.
    pub policies: Vec<NamespacedName>,
    /// How its node captures it.
    pub capture: CaptureSettings,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// Plain TCP to the application.
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Where a workload runs; empty parts are unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone within the region.
    pub zone: Arc<str>,
    /// Subzone within the zone.
    pub subzone: Arc<str>,
}

/// Settings that the control plane derives from `MeshPolicy` for one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptureSettings {
    /// What the kernel does when the agent is dead.
    pub failure_mode: FailureMode,
    /// How flows to a workload of the same node travel.
    pub same_node: SameNode,
}

/// What happens to a workload's connections while its agent is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FailureMode {
    /// They are refused.
    #[default]
    Closed,
    /// They go out as if there were no mesh.
    Open,
}

/// How an authorised L4 flow between two workloads of one node travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SameNode {
    /// From application to application in the kernel.
    #[default]
    Kernel,
    /// Through the proxy, with mutual TLS.
    Tunnel,
}

/// A service that the control plane told of.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Primary key: namespace and hostname.
    pub key: NamespacedName,
    /// Short name.
    pub name: Arc<str>,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Ranges of virtual addresses.
    pub vip_ranges: Vec<IpNet>,
    /// Target port of each service port; 0 where every endpoint names its own.
    pub ports: BTreeMap<u16, u16>,
    /// Further identities that an endpoint may present.
    pub subject_alt_names: Vec<Identity>,
    /// Balancing mode.
    pub mode: BalancingMode,
    /// Localities in the order of preference.
    pub preference: Vec<Scope>,
    /// Unhealthy endpoints are used too.
    pub allow_unhealthy: bool,
    /// Only clients of its own namespace see it.
    pub namespace_only: bool,
    /// Wins ties between services of one address.
    pub canonical: bool,
}

/// How locality preference is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BalancingMode {
    /// No explicit preference: endpoints of the nearest locality first, all others as failover.
    #[default]
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// The best rank present.
    Failover,
    /// The destination is dialled as it is.
    Passthrough,
}

/// One level of locality preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// One place a connection may go to.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// The workload behind it.
    pub workload: Arc<Workload>,
    /// Its address and the port that the application listens on.
    pub address: SocketAddr,
    /// Identities that its certificate may carry; never empty for HBONE.
    pub identities: Arc<[Identity]>,
    /// Distance by the service's locality preference: 0 is nearest. A farther rank is for when every nearer endpoint
    /// fails.
    pub rank: u8,
}

/// Where a captured connection goes.
#[derive(Debug, Clone)]
pub enum Route {
    /// To one of these endpoints (never empty).
    Service {
        /// The service that was addressed.
        service: Arc<Service>,
        /// The usable endpoints.
        endpoints: Vec<Endpoint>,
    },
    /// Addressed by the workload's own address.
    Workload(Endpoint),
    /// A service without a usable endpoint, or a port that it does not define.
    NoEndpoint {
        /// The service that was addressed.
        service: Arc<Service>,
    },
    /// Known, but not reachable without bypassing what its owner asked for: refuse the connection.
    Refused {
        /// The service, or the workload, that was addressed.
        destination: NamespacedName,
        /// What stands in the way.
        reason: Refusal,
    },
    /// Outside the mesh, or a service in passthrough mode: dial the destination as it is.
    Passthrough,
}

/// Why a known destination is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its traffic has to pass a waypoint, which enforces policies that this node does not know; going around it would
    /// bypass them.
    #[error(
        "the destination requires a waypoint, which this agent does not support; it refuses rather than bypass it"
    )]
    Waypoint,
}

/// An authorization policy together with its key.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// `<namespace>/<name>`.
    pub key: NamespacedName,
    /// The wire form; checked when it was accepted.
    pub spec: Authorization,
    /// The form in which it is evaluated.
    pub(crate) compiled: Compiled,
}
