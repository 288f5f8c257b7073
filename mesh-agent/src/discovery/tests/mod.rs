//! Scenarios for discovery, and the builders that they and the tests of policy and balancing share.

mod client;
mod convert;
mod index;
mod outages;
mod routing;
mod snapshot;
mod subscription;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_api::proto::{security, workload as wire};

pub(super) use client::Pipes;

use super::{MeshState, Update, model::Workload};

pub(crate) fn bytes(address: &str) -> Vec<u8> {
    match address.parse().expect("an address") {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(crate) fn socket(address: &str) -> SocketAddr {
    address.parse().expect("an address with a port")
}

/// An HBONE pod of namespace `shop` on node `n1`.
pub(crate) fn pod(name: &str, address: &str) -> wire::Workload {
    wire::Workload {
        uid: format!("c1//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
        addresses: vec![bytes(address)],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        node: "n1".to_owned(),
        ..wire::Workload::default()
    }
}

/// The pod as an endpoint of `shop/cart`, which maps service port 80 to 8080.
pub(crate) fn member(name: &str, address: &str) -> wire::Workload {
    let mut pod = pod(name, address);
    pod.services.insert(
        "shop/cart".to_owned(),
        wire::PortList {
            ports: vec![port(80, 8080)],
        },
    );
    pod
}

pub(crate) fn port(service_port: u32, target_port: u32) -> wire::Port {
    wire::Port {
        service_port,
        target_port,
        app_protocol: 0,
    }
}

pub(crate) fn vip(address: &str) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: String::new(),
        address: bytes(address),
        length: None,
    }
}

/// Service `shop/cart` at 10.96.0.1, port 80 to 8080.
pub(crate) fn service() -> wire::Service {
    wire::Service {
        name: "cart".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "cart".to_owned(),
        addresses: vec![vip("10.96.0.1")],
        ports: vec![port(80, 8080)],
        ..wire::Service::default()
    }
}

/// A policy `shop/<name>` without rules.
pub(crate) fn policy(
    name: &str,
    action: security::Action,
    scope: security::Scope,
) -> security::Authorization {
    security::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: scope.into(),
        action: action.into(),
        ..security::Authorization::default()
    }
}

/// Something that can be put into the index.
pub(crate) trait Put {
    fn update(self) -> Update;
}

impl Put for wire::Workload {
    fn update(self) -> Update {
        Update::workload(self).expect("a good workload")
    }
}

impl Put for wire::Service {
    fn update(self) -> Update {
        Update::service(self).expect("a good service")
    }
}

impl Put for security::Authorization {
    fn update(self) -> Update {
        match Update::policy(&self) {
            Ok(update) => update,
            Err(refused) => refused.stand_in.expect("a policy with a usable name"),
        }
    }
}

pub(crate) fn put(state: &mut MeshState, resource: impl Put) -> bool {
    state.apply(resource.update())
}

/// A client: pod `client` at 10.0.0.99.
pub(crate) fn client(state: &mut MeshState) -> Arc<Workload> {
    put(state, pod("client", "10.0.0.99"));
    state
        .local_workload("n1", "shop", "client")
        .expect("just put")
}
