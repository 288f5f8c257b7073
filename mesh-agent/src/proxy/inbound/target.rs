//! Which application address a connection to a workload means.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use http::Method;
use mesh_api::names::NamespacedName;

use super::InboundError;
use crate::{
    capture::LocalWorkload,
    proxy::{
        OWN_PORTS, never_a_destination,
        tunnel::headers::{Authority, parse_authority},
    },
};

/// The application address that a CONNECT request means: always the workload's own, only the port is the client's
/// choice.
pub(super) fn request_target(
    method: &Method,
    authority: &str,
    own: IpAddr,
    local: &LocalWorkload,
    namespace: &str,
    services: &BTreeMap<NamespacedName, BTreeMap<u16, u16>>,
) -> Result<SocketAddr, InboundError> {
    if *method != Method::CONNECT {
        return Err(InboundError::BadRequest("method is not CONNECT"));
    }
    let port = match parse_authority(authority) {
        Ok(Authority::Address(address)) if address.ip() != own => {
            return Err(InboundError::BadRequest(
                "authority is not the address that was dialled",
            ));
        }
        Ok(Authority::Address(address)) => address.port(),
        Ok(Authority::Host(host, port)) => service_port(&host, port, namespace, services)
            .ok_or(InboundError::NotServed("service or port unknown"))?,
        Err(_) => {
            return Err(InboundError::BadRequest(
                "authority is not an address or host name with a port",
            ));
        }
    };
    dialled_target(SocketAddr::new(own, port), local)
}

/// The target port of a service that this workload belongs to; services of its own namespace first.
fn service_port(
    host: &str,
    port: u16,
    namespace: &str,
    services: &BTreeMap<NamespacedName, BTreeMap<u16, u16>>,
) -> Option<u16> {
    let named = || {
        services
            .iter()
            .filter(|(key, _)| key.name.eq_ignore_ascii_case(host))
    };
    let own = named().find(|(key, _)| *key.namespace == *namespace);
    let (_, ports) = own.or_else(|| named().next())?;
    ports.get(&port).copied().filter(|target| *target != 0)
}

/// Refuses destinations that are not the application's: others' addresses, loopback, the proxy's own ports.
pub(super) fn dialled_target(
    address: SocketAddr,
    local: &LocalWorkload,
) -> Result<SocketAddr, InboundError> {
    if never_a_destination(address.ip()) || !local.owns(address.ip()) {
        return Err(InboundError::BadRequest("address is not this workload's"));
    }
    if OWN_PORTS.contains(&address.port()) {
        return Err(InboundError::NotServed("port is the proxy's own"));
    }
    Ok(address)
}
