use mesh_api::proto::{discovery::Node, security, weft, workload as wire};
use prost::Message as _;
use prost_types::Any;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};

use super::*;
use crate::discovery::{
    convert::*,
    model::{FailureMode, SameNode},
    subscription::Subscription,
};

fn workload_fault(change: impl FnOnce(&mut wire::Workload)) -> String {
    let mut w = member("a", "10.0.0.1");
    change(&mut w);
    Update::workload(w)
        .expect_err("must be refused")
        .to_string()
}

fn service_fault(change: impl FnOnce(&mut wire::Service)) -> String {
    let mut s = service();
    change(&mut s);
    Update::service(s).expect_err("must be refused").to_string()
}

#[test]
fn every_malformed_workload_is_refused_by_name_and_field() {
    type Case = (&'static str, fn(&mut wire::Workload));
    let cases: [Case; 19] = [
        ("uid is missing", |w| w.uid.clear()),
        ("addresses holds an address of 3 bytes", |w| {
            w.addresses = vec![vec![1, 2, 3]]
        }),
        ("addresses holds an address of 0 bytes", |w| {
            w.addresses = vec![vec![]]
        }),
        ("unusable address 0.0.0.0", |w| {
            w.addresses = vec![vec![0; 4]]
        }),
        ("unusable address 224.0.0.1", |w| {
            w.addresses = vec![vec![224, 0, 0, 1]]
        }),
        ("addresses has 257 elements", |w| {
            w.addresses = vec![vec![10, 0, 0, 1]; ADDRESSES_MAX + 1]
        }),
        ("the legacy Istio mTLS tunnel", |w| w.tunnel_protocol = 2),
        ("tunnel_protocol has the unknown value 9", |w| {
            w.tunnel_protocol = 9
        }),
        ("workload_type has the unknown value -1", |w| {
            w.workload_type = -1
        }),
        ("status has the unknown value 7", |w| w.status = 7),
        ("network_mode has the unknown value 7", |w| {
            w.network_mode = 7
        }),
        ("identity is unusable", |w| w.namespace.clear()),
        ("identity is unusable", |w| {
            w.service_account = "a/b".to_owned()
        }),
        ("services.service_port holds the unusable port 65536", |w| {
            w.services.insert(
                "shop/x".to_owned(),
                wire::PortList {
                    ports: vec![port(65_536, 1)],
                },
            );
        }),
        ("services.target_port holds the unusable port 0", |w| {
            w.services.insert(
                "shop/x".to_owned(),
                wire::PortList {
                    ports: vec![port(80, 0)],
                },
            );
        }),
        ("services: \"cart\" is not of the form", |w| {
            w.services
                .insert("cart".to_owned(), wire::PortList::default());
        }),
        ("authorization_policies: \"x\" is not of the form", |w| {
            w.authorization_policies = vec!["x".to_owned()]
        }),
        ("waypoint.destination is missing", |w| {
            w.waypoint = Some(wire::GatewayAddress::default())
        }),
        ("node is 1501 bytes long", |w| {
            w.node = "n".repeat(TEXT_MAX_BYTES + 1)
        }),
    ];
    for (expected, change) in cases {
        let fault = workload_fault(change);
        assert!(
            fault.contains(expected),
            "expected {expected:?} in {fault:?}"
        );
    }
    assert!(workload_fault(|w| w.node = "n".repeat(2_000)).starts_with("c1//Pod/shop/a: "));
}

#[test]
fn every_malformed_service_is_refused_by_name_and_field() {
    type Case = (&'static str, fn(&mut wire::Service));
    let cases: [Case; 11] = [
        ("namespace is missing", |s| s.namespace.clear()),
        ("hostname is missing", |s| s.hostname.clear()),
        ("holds an address of 5 bytes", |s| {
            s.addresses[0].address = vec![0; 5]
        }),
        ("a prefix of 33 bits", |s| s.addresses[0].length = Some(33)),
        ("a prefix of 95 bits for ::ffff:10.0.0.0", |s| {
            s.addresses[0] = wire::NetworkAddress {
                length: Some(95),
                ..vip("::ffff:10.0.0.0")
            };
        }),
        ("ports.service_port holds the unusable port 0", |s| {
            s.ports = vec![port(0, 1)]
        }),
        ("ports.target_port holds the unusable port 70000", |s| {
            s.ports = vec![port(80, 70_000)]
        }),
        ("load_balancing.mode has the unknown value 4", |s| {
            s.load_balancing = Some(wire::LoadBalancing {
                mode: 4,
                ..wire::LoadBalancing::default()
            });
        }),
        ("routing_preference is missing", |s| {
            s.load_balancing = Some(wire::LoadBalancing {
                routing_preference: vec![0],
                ..wire::LoadBalancing::default()
            });
        }),
        ("ip_families has the unknown value 4", |s| s.ip_families = 4),
        ("visibility has the unknown value 2", |s| s.visibility = 2),
    ];
    for (expected, change) in cases {
        let fault = service_fault(change);
        assert!(
            fault.contains(expected),
            "expected {expected:?} in {fault:?}"
        );
    }
}

#[test]
fn limits_are_reached_but_not_passed() {
    let mut full = member("a", "10.0.0.1");
    full.addresses = (0..ADDRESSES_MAX)
        .map(|i| vec![10, 0, (i / 256) as u8 + 1, (i % 256) as u8])
        .collect();
    full.node = "n".repeat(TEXT_MAX_BYTES);
    full.services = (0..SERVICES_PER_WORKLOAD_MAX)
        .map(|i| (format!("shop/s{i}"), wire::PortList::default()))
        .collect();
    full.authorization_policies = (0..POLICIES_PER_WORKLOAD_MAX)
        .map(|i| format!("shop/p{i}"))
        .collect();
    let mut over = full.clone();
    assert!(Update::workload(full).is_ok());
    over.services
        .insert("shop/more".to_owned(), wire::PortList::default());
    assert!(
        Update::workload(over)
            .expect_err("over")
            .to_string()
            .contains("1025 elements")
    );
}

#[test]
fn defaults_of_the_protocol_apply() {
    let mut state = MeshState::new("");
    let mut bare = pod("a", "10.0.0.1");
    bare.service_account.clear();
    put(&mut state, bare);
    let w = state.local_workload("n1", "shop", "a").expect("put");
    assert_eq!(
        w.identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/default"
    );
    assert_eq!(
        (&*w.cluster, w.capacity, w.healthy),
        ("Kubernetes", 1, true)
    );
    assert_eq!(w.capture.failure_mode, FailureMode::Closed);
}

#[test]
fn a_weight_of_zero_takes_an_endpoint_out_of_service() {
    let mut state = MeshState::new("");
    put(
        &mut state,
        wire::Workload {
            capacity: Some(0),
            ..pod("a", "10.0.0.1")
        },
    );
    let w = state.local_workload("n1", "shop", "a").expect("put");
    assert_eq!((w.capacity, w.healthy), (1, false));
}

#[test]
fn the_capture_extension_is_read_and_a_broken_one_refuses_the_workload() {
    let extension = |value: Vec<u8>, type_url: &str| wire::Extension {
        name: weft::CAPTURE_EXTENSION.to_owned(),
        config: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
    };
    let capture = weft::Capture {
        failure_mode: 1,
        same_node: 1,
    };
    let mut state = MeshState::new("");
    let mut good = pod("a", "10.0.0.1");
    good.extensions = vec![extension(capture.encode_to_vec(), weft::CAPTURE_TYPE_URL)];
    put(&mut state, good);
    let w = state.local_workload("n1", "shop", "a").expect("put");
    assert_eq!(
        (w.capture.failure_mode, w.capture.same_node),
        (FailureMode::Open, SameNode::Tunnel)
    );

    let unknown = weft::Capture {
        failure_mode: 5,
        same_node: 0,
    }
    .encode_to_vec();
    for bad in [
        extension(vec![0xff], weft::CAPTURE_TYPE_URL),
        extension(vec![], "type.googleapis.com/other"),
        extension(unknown, weft::CAPTURE_TYPE_URL),
    ] {
        assert!(
            Update::workload(wire::Workload {
                extensions: vec![bad],
                ..pod("a", "10.0.0.1")
            })
            .is_err()
        );
    }
}

#[test]
fn a_resource_under_a_foreign_name_is_refused() {
    let workload = wire::Address {
        r#type: Some(wire::address::Type::Workload(pod("a", "10.0.0.1"))),
    };
    let error = Update::address("c1//Pod/shop/b", &workload.encode_to_vec()).expect_err("misnamed");
    assert!(matches!(error.fault, Fault::Misnamed { .. }));
    let allow = policy("a", security::Action::Allow, security::Scope::Global).encode_to_vec();
    let refused = Update::authorization("shop/b", &allow).expect_err("misnamed");
    assert!(matches!(refused.rejected.fault, Fault::Misnamed { .. }));
}

#[test]
fn an_empty_address_is_refused() {
    let error = Update::address("x", &[]).expect_err("neither workload nor service");
    assert_eq!(error.fault, Fault::Missing { field: "type" });
}

/// Random bytes, and good messages with random damage: an error or a value, never a panic.
#[test]
fn the_decoder_survives_anything() {
    let seed = 0x5eed;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut deny = policy("p", security::Action::Deny, security::Scope::Global);
    let ports = security::Match {
        destination_ports: vec![80],
        ..security::Match::default()
    };
    deny.rules = vec![security::Rule {
        clauses: vec![security::Clause {
            matches: vec![ports],
        }],
    }];
    let originals = [
        wire::Address {
            r#type: Some(wire::address::Type::Workload(member("a", "10.0.0.1"))),
        }
        .encode_to_vec(),
        wire::Address {
            r#type: Some(wire::address::Type::Service(service())),
        }
        .encode_to_vec(),
        deny.encode_to_vec(),
    ];
    let mut state = MeshState::new("");
    let source = client(&mut state);
    let mut accepted = 0;
    for round in 0..30_000 {
        let mut body = if round % 2 == 0 {
            let mut noise = vec![0; rng.random_range(0..64)];
            rng.fill_bytes(&mut noise);
            noise
        } else {
            originals[rng.random_range(0..originals.len())].clone()
        };
        for _ in 0..rng.random_range(0..4) {
            if let Some(index) = (!body.is_empty()).then(|| rng.random_range(0..body.len())) {
                body[index] = rng.random();
            }
        }
        for name in ["c1//Pod/shop/a", "shop/cart"] {
            if let Ok(update) = Update::address(name, &body) {
                state.apply(update);
                accepted += 1;
            }
        }
        match Update::authorization("shop/p", &body) {
            Ok(update) => state.apply(update),
            Err(refused) => refused.stand_in.is_some_and(|update| state.apply(update)),
        };
        let _ = state.route(&source, socket("10.96.0.1:80"));
    }
    assert!(
        accepted > 1_000,
        "seed {seed:#x}: the damage must leave some intact, left {accepted}"
    );
    let _ = state.dump();
}

#[test]
fn random_responses_do_not_panic_the_subscription() {
    let mut rng = SmallRng::seed_from_u64(0xf00d);
    let mut subscription = Subscription::new(Node::default(), true);
    for _ in 0..5_000 {
        let mut noise = vec![0; rng.random_range(0..80)];
        rng.fill_bytes(&mut noise);
        if let Ok(response) =
            mesh_api::proto::discovery::DeltaDiscoveryResponse::decode(noise.as_slice())
        {
            subscription.on_response(response);
        }
    }
    assert!(!subscription.is_answered(), "noise is no answer");
}
