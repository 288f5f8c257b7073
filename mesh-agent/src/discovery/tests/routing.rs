use mesh_api::proto::workload as wire;

use super::*;
use crate::discovery::model::{Endpoint, Refusal, Route};

/// What a route comes to, in a form that reads well in assertions.
fn told(route: Route) -> String {
    let list = |endpoints: &[Endpoint]| {
        let shown: Vec<_> = endpoints
            .iter()
            .map(|e| format!("{}#{}", e.address, e.rank))
            .collect();
        shown.join(" ")
    };
    match route {
        Route::Service { service, endpoints } => format!("{}: {}", service.key, list(&endpoints)),
        Route::Workload(endpoint) => format!("workload {}", list(&[endpoint])),
        Route::NoEndpoint { service } => format!("{}: none", service.key),
        Route::Refused {
            destination,
            reason: Refusal::Waypoint,
        } => format!("{destination}: waypoint"),
        Route::Passthrough => "passthrough".to_owned(),
    }
}

fn route(state: &mut MeshState, destination: &str) -> String {
    let source = client(state);
    told(state.route(&source, socket(destination)))
}

fn balancing(
    mode: wire::load_balancing::Mode,
    scopes: &[wire::load_balancing::Scope],
) -> wire::Service {
    let routing_preference = scopes.iter().map(|scope| (*scope).into()).collect();
    let balancing = wire::LoadBalancing {
        routing_preference,
        mode: mode.into(),
        health_policy: 0,
    };
    wire::Service {
        load_balancing: Some(balancing),
        ..service()
    }
}

fn at(region: &str, zone: &str, w: wire::Workload) -> wire::Workload {
    let locality = wire::Locality {
        region: region.to_owned(),
        zone: zone.to_owned(),
        subzone: String::new(),
    };
    wire::Workload {
        locality: Some(locality),
        ..w
    }
}

#[test]
fn a_service_address_leads_to_its_healthy_endpoints_on_the_target_port() {
    let mut state = MeshState::new("");
    put(&mut state, member("a", "10.0.0.1"));
    put(
        &mut state,
        wire::Workload {
            status: 1,
            ..member("sick", "10.0.0.2")
        },
    );
    put(&mut state, service());
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.1:8080#0"
    );
    assert_eq!(
        route(&mut state, "[::ffff:10.96.0.1]:80"),
        "shop/cart: 10.0.0.1:8080#0",
        "mapped destination"
    );
    assert_eq!(
        route(&mut state, "10.96.0.1:81"),
        "shop/cart: none",
        "a port that it does not define"
    );
    assert_eq!(route(&mut state, "10.0.0.1:9"), "workload 10.0.0.1:9#0");
    assert_eq!(
        route(&mut state, "10.0.0.2:9"),
        "workload 10.0.0.2:9#0",
        "by its own address, health does not matter"
    );
    assert_eq!(route(&mut state, "192.0.2.1:80"), "passthrough");
}

#[test]
fn the_service_address_is_tried_before_the_workload_address() {
    let mut state = MeshState::new("");
    put(&mut state, pod("squatter", "10.96.0.1"));
    put(&mut state, service());
    assert_eq!(route(&mut state, "10.96.0.1:80"), "shop/cart: none");
}

#[test]
fn target_port_is_the_endpoints_own_then_the_services() {
    let mut state = MeshState::new("");
    let mut unmapped = pod("b", "10.0.0.2");
    unmapped
        .services
        .insert("shop/cart".to_owned(), wire::PortList::default());
    put(&mut state, member("a", "10.0.0.1"));
    put(&mut state, unmapped);
    put(
        &mut state,
        wire::Service {
            ports: vec![port(80, 9090)],
            ..service()
        },
    );
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.1:8080#0 10.0.0.2:9090#0"
    );
    put(
        &mut state,
        wire::Service {
            ports: vec![port(80, 0)],
            ..service()
        },
    );
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.1:8080#0",
        "no target is known for the other"
    );
}

#[test]
fn endpoints_without_an_address_or_in_another_network_are_not_usable() {
    let mut state = MeshState::new("");
    put(
        &mut state,
        wire::Workload {
            addresses: vec![],
            hostname: "db.example".to_owned(),
            ..member("a", "10.0.0.1")
        },
    );
    put(
        &mut state,
        wire::Workload {
            network: "away".to_owned(),
            ..member("b", "10.0.0.2")
        },
    );
    put(&mut state, service());
    assert_eq!(route(&mut state, "10.96.0.1:80"), "shop/cart: none");
    assert_eq!(state.dead_destinations(), [socket("10.96.0.1:80")]);
}

#[test]
fn allow_all_keeps_unhealthy_endpoints() {
    let mut state = MeshState::new("");
    put(
        &mut state,
        wire::Workload {
            status: 1,
            ..member("sick", "10.0.0.2")
        },
    );
    let balancing = wire::LoadBalancing {
        health_policy: 1,
        ..wire::LoadBalancing::default()
    };
    put(
        &mut state,
        wire::Service {
            load_balancing: Some(balancing),
            ..service()
        },
    );
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.2:8080#0"
    );
}

#[test]
fn locality_ranks_by_mode() {
    use wire::load_balancing::{Mode, Scope};
    let scopes = [Scope::Region, Scope::Zone];
    let (near, region, far) = ("10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080");
    for (service, expected) in [
        (service(), format!("{near}#0 {region}#2 {far}#3")),
        (
            balancing(Mode::Failover, &scopes),
            format!("{near}#0 {region}#1 {far}#2"),
        ),
        (balancing(Mode::Strict, &scopes), format!("{near}#0")),
        (
            balancing(Mode::Strict, &[Scope::Region]),
            format!("{near}#0 {region}#0"),
        ),
        (
            balancing(Mode::Failover, &[Scope::Network, Scope::Node]),
            format!("{near}#1 {region}#0 {far}#1"),
        ),
    ] {
        let mut state = MeshState::new("");
        put(
            &mut state,
            at(
                "r1",
                "z1",
                wire::Workload {
                    node: "n2".to_owned(),
                    ..member("a", "10.0.0.1")
                },
            ),
        );
        put(&mut state, at("r1", "z2", member("b", "10.0.0.2")));
        // The same zone name in another region: the first mismatch ends the comparison.
        put(
            &mut state,
            at(
                "r2",
                "z1",
                wire::Workload {
                    node: "n3".to_owned(),
                    ..member("c", "10.0.0.3")
                },
            ),
        );
        let mode = format!("{:?}", service.load_balancing);
        put(&mut state, service);
        put(&mut state, at("r1", "z1", pod("source", "10.0.0.98")));
        let source = state.local_workload("n1", "shop", "source").expect("put");
        let found = told(state.route(&source, socket("10.96.0.1:80")));
        assert_eq!(found, format!("shop/cart: {expected}"), "{mode}");
    }
}

#[test]
fn unknown_localities_are_all_equally_near() {
    let mut state = MeshState::new("");
    put(&mut state, member("a", "10.0.0.1"));
    put(&mut state, member("b", "10.0.0.2"));
    put(&mut state, service());
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.1:8080#0 10.0.0.2:8080#0"
    );
}

#[test]
fn passthrough_services_are_dialled_as_they_are() {
    let mut state = MeshState::new("");
    put(
        &mut state,
        balancing(wire::load_balancing::Mode::Passthrough, &[]),
    );
    assert_eq!(route(&mut state, "10.96.0.1:80"), "passthrough");
}

#[test]
fn what_requires_a_waypoint_is_refused() {
    let gateway = || {
        let hostname = wire::NamespacedHostname {
            namespace: "shop".to_owned(),
            hostname: "way".to_owned(),
        };
        let destination = Some(wire::gateway_address::Destination::Hostname(hostname));
        Some(wire::GatewayAddress {
            destination,
            hbone_mtls_port: 15_008,
        })
    };
    let mut state = MeshState::new("");
    put(
        &mut state,
        wire::Workload {
            waypoint: gateway(),
            ..member("a", "10.0.0.1")
        },
    );
    put(
        &mut state,
        wire::Service {
            waypoint: gateway(),
            ..service()
        },
    );
    assert_eq!(route(&mut state, "10.96.0.1:80"), "shop/cart: waypoint");
    assert_eq!(route(&mut state, "10.0.0.1:80"), "shop/a: waypoint");
    let weighted = wire::WeightedWaypoint {
        destination: gateway(),
        weight: 1,
    };
    put(
        &mut state,
        wire::Service {
            weighted_waypoints: vec![weighted],
            ..service()
        },
    );
    assert_eq!(route(&mut state, "10.96.0.1:80"), "shop/cart: waypoint");
    put(&mut state, service());
    assert_eq!(
        route(&mut state, "10.96.0.1:80"),
        "shop/cart: 10.0.0.1:8080#0",
        "addressed as a service without one"
    );
}

#[test]
fn services_at_one_address_rank_by_namespace_then_canonical_then_name() {
    let at = |namespace: &str, hostname: &str, canonical: bool, visibility: i32| wire::Service {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        canonical,
        visibility,
        ..service()
    };
    let mut state = MeshState::new("");
    for (added, expected) in [
        (at("b", "b", false, 0), "b/b: none"),
        (at("a", "a", false, 0), "a/a: none"),
        (at("c", "c", true, 0), "c/c: none"),
        (at("a", "hidden", true, 1), "c/c: none"),
        (at("shop", "own", false, 1), "shop/own: none"),
    ] {
        put(&mut state, added);
        assert_eq!(route(&mut state, "10.96.0.1:80"), expected);
    }
}

#[test]
fn ranges_come_after_exact_addresses_and_the_longer_prefix_first() {
    let range = |namespace: &str, hostname: &str, length: u32| wire::Service {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        addresses: vec![wire::NetworkAddress {
            length: Some(length),
            ..vip("10.96.0.9")
        }],
        ..service()
    };
    let mut state = MeshState::new("");
    for (added, expected) in [
        (range("x", "wide", 8), "x/wide: none"),
        (range("x", "narrow", 24), "x/narrow: none"),
        (range("shop", "own", 16), "shop/own: none"),
        (range("x", "exact", 32), "x/exact: none"),
    ] {
        put(&mut state, added);
        assert_eq!(route(&mut state, "10.96.0.9:80"), expected);
    }
    assert_eq!(route(&mut state, "10.96.0.8:80"), "shop/own: none");
    for gone in ["shop/own", "x/narrow", "x/exact"] {
        state.apply(Update::remove_address(gone));
    }
    assert_eq!(route(&mut state, "10.96.0.9:80"), "x/wide: none");
    assert_eq!(
        route(&mut state, "[2001:db8::1]:80"),
        "passthrough",
        "an IPv4 range holds no IPv6 address"
    );
    state.apply(Update::remove_address("x/wide"));
    assert_eq!(route(&mut state, "10.96.0.9:80"), "passthrough");
}

#[test]
fn the_address_of_an_endpoint_fits_the_services_families_and_the_client() {
    let both = |families: i32| wire::Service {
        ip_families: families,
        addresses: vec![vip("10.96.0.1"), vip("2001:db8::1")],
        ..service()
    };
    let mut state = MeshState::new("");
    let addresses = vec![bytes("10.0.0.1"), bytes("2001:db8::a")];
    put(
        &mut state,
        wire::Workload {
            addresses,
            ..member("a", "10.0.0.1")
        },
    );
    let (v4, v6) = (
        "shop/cart: 10.0.0.1:8080#0",
        "shop/cart: [2001:db8::a]:8080#0",
    );
    for (families, to_v4, to_v6) in [(0, v4, v6), (1, v4, v4), (2, v6, v6), (3, v4, v6)] {
        put(&mut state, both(families));
        assert_eq!(
            route(&mut state, "10.96.0.1:80"),
            to_v4,
            "families {families}"
        );
        assert_eq!(
            route(&mut state, "[2001:db8::1]:80"),
            to_v6,
            "families {families}"
        );
    }
}

#[test]
fn endpoints_accept_the_services_further_names() {
    let mut state = MeshState::new("");
    put(&mut state, member("a", "10.0.0.1"));
    let names = vec![
        "spiffe://cluster.local/ns/shop/sa/gate".to_owned(),
        "cart.example".to_owned(),
    ];
    put(
        &mut state,
        wire::Service {
            subject_alt_names: names,
            ..service()
        },
    );
    let source = client(&mut state);
    let Route::Service { endpoints, .. } = state.route(&source, socket("10.96.0.1:80")) else {
        panic!("a service")
    };
    let accepted: Vec<_> = endpoints[0]
        .identities
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        accepted,
        [
            "spiffe://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/gate"
        ]
    );
}
