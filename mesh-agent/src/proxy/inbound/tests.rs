use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::*;
use crate::sys::netns::Netns;

fn local() -> LocalWorkload {
    LocalWorkload {
        namespace: "shop".into(),
        name: "cart".into(),
        netns: Arc::new(Netns::open(Path::new("/proc/self/ns/net")).expect("own namespace")),
        addresses: ["10.1.0.5", "fd00::5"]
            .map(|text| text.parse().expect("literal"))
            .to_vec(),
        keepalive: Default::default(),
        workload: Default::default(),
        holds: Default::default(),
    }
}

fn services() -> BTreeMap<NamespacedName, BTreeMap<u16, u16>> {
    let ports = |target: u16| BTreeMap::from([(80, target), (81, 15008), (82, 0)]);
    BTreeMap::from([
        (NamespacedName::new("alpha", "cart.example"), ports(9090)),
        (NamespacedName::new("shop", "cart.example"), ports(8080)),
        (NamespacedName::new("alpha", "only.alpha"), ports(7070)),
    ])
}

fn target(method: &Method, authority: &str, own: &str) -> Result<SocketAddr, InboundError> {
    let own = own.parse().expect("literal");
    request_target(method, authority, own, &local(), "shop", &services())
}

#[test]
fn a_request_for_the_workloads_own_address_or_service_reaches_it() {
    for (authority, own, expected) in [
        ("10.1.0.5:8080", "10.1.0.5", "10.1.0.5:8080"),
        ("[fd00::5]:8080", "fd00::5", "[fd00::5]:8080"),
        ("[::ffff:10.1.0.5]:8080", "10.1.0.5", "10.1.0.5:8080"),
        ("cart.example:80", "10.1.0.5", "10.1.0.5:8080"),
        ("CART.example:80", "fd00::5", "[fd00::5]:8080"),
        ("only.alpha:80", "10.1.0.5", "10.1.0.5:7070"),
    ] {
        let reached = target(&Method::CONNECT, authority, own).expect(authority);
        assert_eq!(reached, expected.parse().expect("literal"), "{authority:?}");
    }
}

#[test]
fn hostile_requests_are_refused_with_their_status() {
    for (authority, own, status) in [
        // Others' addresses.
        ("10.1.0.6:8080", "10.1.0.5", 400),
        ("[fd00::5]:8080", "10.1.0.5", 400),
        ("169.254.169.254:80", "10.1.0.5", 400),
        ("[fd00:ec2::254]:80", "fd00::5", 400),
        ("10.1.0.255:80", "10.1.0.5", 400),
        // The machine itself.
        ("127.0.0.1:8080", "10.1.0.5", 400),
        ("127.0.0.1:8080", "127.0.0.1", 400),
        ("[::1]:8080", "::1", 400),
        ("[::ffff:127.0.0.1]:8080", "127.0.0.1", 400),
        ("0.0.0.0:8080", "0.0.0.0", 400),
        ("[::]:8080", "::", 400),
        ("224.0.0.1:80", "224.0.0.1", 400),
        // Odd notation.
        ("10.1.0.5", "10.1.0.5", 400),
        ("10.1.0.5:0", "10.1.0.5", 400),
        ("10.1.0.5:65536", "10.1.0.5", 400),
        ("10.1.0.5.:80", "10.1.0.5", 400),
        ("012.1.0.5:80", "10.1.0.5", 400),
        ("0xa.1.0.5:80", "10.1.0.5", 400),
        ("[fd00::5%1]:80", "fd00::5", 400),
        ("", "10.1.0.5", 400),
        // The proxy's own ports.
        ("10.1.0.5:15001", "10.1.0.5", 503),
        ("10.1.0.5:15006", "10.1.0.5", 503),
        ("10.1.0.5:15008", "10.1.0.5", 503),
        ("cart.example:81", "10.1.0.5", 503),
        // Host names and ports that are not this workload's.
        ("localhost:8080", "10.1.0.5", 503),
        ("other.example:80", "10.1.0.5", 503),
        ("cart.example:83", "10.1.0.5", 503),
        ("cart.example:82", "10.1.0.5", 503),
    ] {
        let refused = target(&Method::CONNECT, authority, own).expect_err(authority);
        assert_eq!(refused.status().as_u16(), status, "{authority:?} on {own}");
    }
    let refused = target(&Method::GET, "10.1.0.5:8080", "10.1.0.5").expect_err("not CONNECT");
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
}

#[test]
fn plaintext_reaches_only_the_workloads_own_ports() {
    let local = local();
    let reach = |text: &str| dialled_target(text.parse().expect("literal"), &local);
    assert!(reach("10.1.0.5:8080").is_ok());
    for text in [
        "10.1.0.6:8080",
        "127.0.0.1:8080",
        "10.1.0.5:15006",
        "10.1.0.5:15001",
        "[fd00::5]:15008",
    ] {
        assert!(reach(text).is_err(), "{text}");
    }
}

#[test]
fn a_connections_task_is_small() {
    fn size<A, B, C, D, F>(_: fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }
    let (tunnelled, plaintext) = (size(serve_connect), size(serve_plaintext));
    assert!(
        tunnelled <= 2048,
        "a tunnelled connection takes {tunnelled} bytes"
    );
    assert!(
        plaintext <= 2048,
        "a plaintext connection takes {plaintext} bytes"
    );
}
