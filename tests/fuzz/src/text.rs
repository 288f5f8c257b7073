//! Text in headers and certificates.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, HeaderValue};
use mesh_agent::{
    discovery::model::{CaptureSettings, Locality, Tunnel, Workload},
    proxy::tunnel::headers::{
        Authority, FORWARDED, TRACEPARENT, TraceParent, baggage, forwarded, forwarded_host,
        parse_authority,
    },
};
use mesh_api::identity::Identity;

/// What was read means the same when it is written and read again: no two parsers may differ about a target.
pub(crate) fn connect_authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(authority) = parse_authority(text) else {
        return;
    };
    let written = match &authority {
        Authority::Address(address) => {
            assert_eq!(address.ip(), address.ip().to_canonical(), "{text:?}");
            address.to_string()
        }
        Authority::Host(host, port) => {
            assert!(host.parse::<std::net::IpAddr>().is_err(), "{text:?}");
            format!("{host}:{port}")
        }
    };
    assert_eq!(
        parse_authority(&written).as_ref(),
        Ok(&authority),
        "{text:?}"
    );
}

/// First line: `forwarded`. Second: `traceparent`. Third: names of a workload.
pub(crate) fn connect_headers(bytes: &[u8]) {
    let (first, rest) = crate::two_parts(bytes);
    let (second, names) = crate::two_parts(rest);
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_bytes(first) {
        headers.insert(FORWARDED, value);
    }
    if let Ok(value) = HeaderValue::from_bytes(second) {
        headers.insert(TRACEPARENT, value);
    }
    if let Some(host) = forwarded_host(&headers) {
        assert!(host.bytes().all(|byte| byte.is_ascii_graphic()), "{host:?}");
        let written = forwarded(SocketAddr::from(([10, 1, 0, 5], 80)), Some(host));
        let mut own = HeaderMap::new();
        own.insert(FORWARDED, written.expect("a host name fits into a header"));
        assert_eq!(forwarded_host(&own), Some(host));
    }
    if let Some(trace) = TraceParent::from_headers(&headers) {
        let written = trace
            .header()
            .expect("hexadecimal digits fit into a header");
        let (given, written) = (headers.get(TRACEPARENT), written.as_bytes());
        // The flags, the last part, are not passed on.
        let names = |value: &[u8]| value.get(..52).map(<[u8]>::to_vec);
        assert_eq!(
            given.and_then(|value| names(value.as_bytes())),
            names(written)
        );
    }
    if let Some(value) = baggage(&workload(&String::from_utf8_lossy(names))) {
        let text = value.to_str().expect("baggage is ASCII");
        for pair in text.split(',') {
            assert_eq!(pair.matches('=').count(), 1, "{text:?} smuggles a pair");
        }
    }
}

/// A workload that has the same text in all its names.
fn workload(name: &str) -> Workload {
    let name: Arc<str> = name.into();
    Workload {
        uid: "c1//Pod/shop/cart".into(),
        name: name.clone(),
        namespace: name.clone(),
        identity: Identity::new("cluster.local", "shop", "cart").expect("plain names"),
        addresses: Vec::new(),
        network: name.clone(),
        tunnel: Tunnel::Hbone,
        node: name.clone(),
        cluster: name.clone(),
        canonical_name: name.clone(),
        canonical_revision: name.clone(),
        workload_type: "deployment",
        workload_name: name.clone(),
        healthy: true,
        host_network: false,
        locality: Locality {
            region: name.clone(),
            zone: name.clone(),
            subzone: name,
        },
        capacity: 1,
        services: Default::default(),
        policies: Vec::new(),
        capture: CaptureSettings::default(),
    }
}

/// An identity is its text: two texts of one identity could be judged differently by policies.
pub(crate) fn spiffe_identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(identity) = text.parse::<Identity>() else {
        return;
    };
    assert_eq!(identity.to_string(), text);
    let again = Identity::new(
        identity.trust_domain(),
        identity.namespace(),
        identity.service_account(),
    );
    assert_eq!(again.as_ref(), Ok(&identity));
}
