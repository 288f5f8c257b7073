use mesh_api::proto::{security, workload as wire};

use super::*;
use crate::discovery::{APPLY_CHUNK, Mesh};

fn owner(state: &MeshState, address: &str) -> Option<String> {
    state
        .workload_by_address(address.parse().expect("an address"))
        .map(|w| w.name.to_string())
}

#[test]
fn a_workload_is_found_by_address_and_by_name_until_it_is_removed() {
    let mut state = MeshState::new("");
    assert!(put(&mut state, pod("a", "10.0.0.1")));
    assert_eq!(owner(&state, "10.0.0.1").as_deref(), Some("a"));
    assert_eq!(
        owner(&state, "::ffff:10.0.0.1").as_deref(),
        Some("a"),
        "mapped addresses are IPv4"
    );
    assert!(state.local_workload("n1", "shop", "a").is_some());
    assert!(state.local_workload("n2", "shop", "a").is_none());
    assert!(state.apply(Update::remove_address("c1//Pod/shop/a")));
    assert_eq!(owner(&state, "10.0.0.1"), None);
    assert!(state.local_workload("n1", "shop", "a").is_none());
    assert!(
        !state.apply(Update::remove_address("c1//Pod/shop/a")),
        "nothing is left to remove"
    );
}

#[test]
fn a_mapped_address_on_the_wire_is_stored_as_ipv4() {
    let mut state = MeshState::new("");
    put(&mut state, pod("a", "::ffff:10.0.0.1"));
    assert_eq!(owner(&state, "10.0.0.1").as_deref(), Some("a"));
}

#[test]
fn an_update_moves_the_workload_and_leaves_nothing_behind() {
    let mut state = MeshState::new("");
    put(&mut state, pod("a", "10.0.0.1"));
    put(
        &mut state,
        wire::Workload {
            node: "n2".to_owned(),
            ..pod("a", "10.0.0.2")
        },
    );
    assert_eq!(
        (
            owner(&state, "10.0.0.1"),
            owner(&state, "10.0.0.2").as_deref()
        ),
        (None, Some("a"))
    );
    assert!(state.local_workload("n1", "shop", "a").is_none());
    assert!(state.local_workload("n2", "shop", "a").is_some());
    assert!(
        !put(
            &mut state,
            wire::Workload {
                node: "n2".to_owned(),
                ..pod("a", "10.0.0.2")
            }
        ),
        "nothing changed"
    );
}

#[test]
fn of_two_workloads_at_one_address_a_pod_wins_then_a_tunnel_then_the_later() {
    let entry = |name: &str| wire::Workload {
        uid: format!("c1/x/WorkloadEntry/{name}"),
        ..pod(name, "10.0.0.1")
    };
    let plain = |w: wire::Workload| wire::Workload {
        tunnel_protocol: 0,
        ..w
    };
    let mut state = MeshState::new("");
    put(&mut state, plain(pod("plain-pod", "10.0.0.1")));
    put(&mut state, entry("hbone-entry"));
    assert_eq!(owner(&state, "10.0.0.1").as_deref(), Some("plain-pod"));
    put(&mut state, pod("old-pod", "10.0.0.1"));
    put(&mut state, plain(pod("late-plain-pod", "10.0.0.1")));
    assert_eq!(owner(&state, "10.0.0.1").as_deref(), Some("old-pod"));
    put(&mut state, pod("new-pod", "10.0.0.1"));
    assert_eq!(
        owner(&state, "10.0.0.1").as_deref(),
        Some("new-pod"),
        "it got the reused address"
    );
    put(
        &mut state,
        wire::Workload {
            status: 1,
            ..pod("old-pod", "10.0.0.1")
        },
    );
    assert_eq!(
        owner(&state, "10.0.0.1").as_deref(),
        Some("new-pod"),
        "an update of the old one does not take it back"
    );
    state.apply(Update::remove_address("c1//Pod/shop/new-pod"));
    assert_eq!(owner(&state, "10.0.0.1").as_deref(), Some("old-pod"));
}

#[test]
fn host_network_workloads_and_other_networks_are_not_found_by_address() {
    let mut state = MeshState::new("home");
    put(
        &mut state,
        wire::Workload {
            network_mode: 1,
            network: "home".to_owned(),
            ..pod("host", "10.0.0.1")
        },
    );
    put(
        &mut state,
        wire::Workload {
            network: "away".to_owned(),
            ..pod("far", "10.0.0.2")
        },
    );
    assert_eq!(
        (owner(&state, "10.0.0.1"), owner(&state, "10.0.0.2")),
        (None, None)
    );
}

#[test]
fn a_removed_name_is_a_uid_first_and_a_service_second() {
    let mut state = MeshState::new("");
    put(&mut state, service());
    put(
        &mut state,
        wire::Workload {
            uid: "shop/cart".to_owned(),
            ..pod("a", "10.0.0.1")
        },
    );
    state.apply(Update::remove_address("shop/cart"));
    assert_eq!((state.counts().workloads, state.counts().services), (0, 1));
    state.apply(Update::remove_address("shop/cart"));
    assert_eq!(state.counts().services, 0);
}

#[test]
fn dead_destinations_follow_the_last_endpoint() {
    let dead = |state: &MeshState| state.dead_destinations();
    let mut state = MeshState::new("");
    put(&mut state, member("a", "10.0.0.1"));
    put(&mut state, service());
    assert_eq!(
        dead(&state),
        [],
        "the endpoint came before its service and was held"
    );
    put(
        &mut state,
        wire::Workload {
            status: 1,
            ..member("a", "10.0.0.1")
        },
    );
    assert_eq!(dead(&state), [socket("10.96.0.1:80")], "unhealthy");
    put(&mut state, member("b", "10.0.0.2"));
    assert_eq!(dead(&state), []);
    state.apply(Update::remove_address("c1//Pod/shop/b"));
    assert_eq!(dead(&state), [socket("10.96.0.1:80")]);
    let allow_all = wire::LoadBalancing {
        health_policy: 1,
        ..wire::LoadBalancing::default()
    };
    put(
        &mut state,
        wire::Service {
            load_balancing: Some(allow_all),
            ..service()
        },
    );
    assert_eq!(
        dead(&state),
        [],
        "the service takes unhealthy endpoints too"
    );
    put(
        &mut state,
        wire::Service {
            ports: vec![port(81, 0)],
            ..service()
        },
    );
    assert_eq!(
        dead(&state),
        [socket("10.96.0.1:81")],
        "no endpoint names a target for that port"
    );
    state.apply(Update::remove_address("shop/cart"));
    assert_eq!(dead(&state), [], "no service, no verdict");
}

#[test]
fn an_address_is_not_dead_while_some_client_may_still_use_it() {
    let passthrough = wire::LoadBalancing {
        mode: 3,
        ..wire::LoadBalancing::default()
    };
    let gateway = wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(
            wire::NamespacedHostname::default(),
        )),
        hbone_mtls_port: 15_008,
    };
    for (why, alive) in [
        (
            "passthrough",
            wire::Service {
                load_balancing: Some(passthrough),
                ..service()
            },
        ),
        (
            "others dial the address as it is",
            wire::Service {
                visibility: 1,
                ..service()
            },
        ),
        (
            "the proxy refuses and says why",
            wire::Service {
                waypoint: Some(gateway),
                ..service()
            },
        ),
    ] {
        let mut state = MeshState::new("");
        put(&mut state, alive);
        assert_eq!(state.dead_destinations(), [], "{why}");
    }
    let mut state = MeshState::new("");
    put(&mut state, service());
    assert_eq!(state.dead_destinations().len(), 1);
    put(
        &mut state,
        wire::Service {
            hostname: "twin".to_owned(),
            ..service()
        },
    );
    let mut of_twin = pod("t", "10.0.0.3");
    of_twin
        .services
        .insert("shop/twin".to_owned(), wire::PortList::default());
    put(&mut state, of_twin);
    assert_eq!(
        state.dead_destinations(),
        [],
        "its neighbour at the address lives"
    );
}

#[test]
fn policies_are_the_global_ones_the_namespaces_and_the_listed_ones() {
    use security::{Action::Allow, Scope};
    let mut state = MeshState::new("");
    state.apply(Update::policies_known());
    put(&mut state, policy("global", Allow, Scope::Global));
    put(&mut state, policy("local", Allow, Scope::Namespace));
    put(
        &mut state,
        security::Authorization {
            namespace: "other".to_owned(),
            ..policy("foreign", Allow, Scope::Namespace)
        },
    );
    put(&mut state, policy("listed", Allow, Scope::WorkloadSelector));
    put(
        &mut state,
        policy("unlisted", Allow, Scope::WorkloadSelector),
    );
    let listing = |keys: &[&str]| wire::Workload {
        authorization_policies: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..pod("a", "10.0.0.1")
    };
    put(&mut state, listing(&["shop/listed", "shop/local"]));
    let names = |state: &MeshState| {
        let w = state.local_workload("n1", "shop", "a").expect("put");
        state.policies(&w).map(|found| {
            found
                .iter()
                .map(|p| p.key.name.to_string())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(
        names(&state),
        Some(vec![
            "global".to_owned(),
            "local".to_owned(),
            "listed".to_owned()
        ])
    );
    put(&mut state, policy("local", Allow, Scope::WorkloadSelector));
    state.apply(Update::remove_policy("shop/global"));
    assert_eq!(
        names(&state),
        Some(vec!["listed".to_owned(), "local".to_owned()]),
        "listed policies in their order"
    );
    state.apply(Update::remove_policy("shop/listed"));
    assert_eq!(names(&state), None, "a listed policy is unknown");
}

#[test]
fn a_stand_in_never_replaces_a_good_policy_and_yields_to_one() {
    use security::{Action::Deny, Scope};
    let empty_match = security::Rule {
        clauses: vec![security::Clause {
            matches: vec![security::Match::default()],
        }],
    };
    let broken = security::Authorization {
        rules: vec![empty_match],
        ..policy("p", Deny, Scope::Namespace)
    };
    let mut state = MeshState::new("");
    put(&mut state, broken.clone());
    assert_eq!((state.counts().policies, state.counts().stand_ins), (1, 1));
    put(&mut state, policy("p", Deny, Scope::Namespace));
    assert_eq!((state.counts().policies, state.counts().stand_ins), (1, 0));
    assert!(!put(&mut state, broken), "the good version stays");
    assert_eq!(state.counts().stand_ins, 0);
}

#[test]
fn the_generation_moves_once_per_batch_and_only_for_changes() {
    let (mut writer, mesh) = Mesh::channel("");
    let generation = mesh.generation();
    let pods = |count: usize| -> Vec<Update> {
        (0..count)
            .map(|i| {
                pod(
                    &format!("p{i}"),
                    &format!("10.0.{}.{}", i / 250, i % 250 + 1),
                )
                .update()
            })
            .collect()
    };
    let counts = writer.apply(pods(APPLY_CHUNK + 1));
    assert_eq!(
        (counts.workloads, *generation.borrow()),
        (APPLY_CHUNK + 1, 1)
    );
    writer.apply(pods(APPLY_CHUNK + 1));
    assert_eq!(*generation.borrow(), 1, "the same again is no change");
    writer.apply(vec![pod("p0", "10.9.9.9").update()]);
    assert_eq!(*generation.borrow(), 2);
}

#[test]
fn one_change_among_a_hundred_thousand_does_work_of_its_own_size() {
    let mut state = MeshState::new("");
    for s in 0..1_000u32 {
        let address = format!("10.96.{}.{}", s / 250, s % 250 + 1);
        put(
            &mut state,
            wire::Service {
                hostname: format!("s{s}"),
                addresses: vec![vip(&address)],
                ..service()
            },
        );
    }
    for i in 0..100_000u32 {
        let mut w = pod(
            &format!("p{i}"),
            &format!("10.{}.{}.{}", i / 62_500 + 1, i / 250 % 250, i % 250 + 1),
        );
        w.node = format!("n{}", i / 100);
        w.services
            .insert(format!("shop/s{}", i % 1_000), wire::PortList::default());
        put(&mut state, w);
    }
    assert_eq!(
        (state.counts().workloads, state.counts().services),
        (100_000, 1_000)
    );
    let before = state.steps();
    let mut changed = pod("p7", "10.1.0.8");
    changed.node = "n0".to_owned();
    changed.status = 1;
    changed
        .services
        .insert("shop/s7".to_owned(), wire::PortList::default());
    assert!(put(&mut state, changed));
    let steps = state.steps() - before;
    assert!(
        (1..=20).contains(&steps),
        "one address, one service with one port and one neighbour: {steps} steps"
    );
    assert_eq!(
        state
            .members
            .values()
            .map(|m| m.entries.len())
            .sum::<usize>(),
        100_000
    );
    for i in 0..100_000u32 {
        state.apply(Update::remove_address(&format!("c1//Pod/shop/p{i}")));
    }
    assert!(
        state.members.is_empty() && state.by_address.is_empty(),
        "removal leaves nothing behind"
    );
    assert_eq!(state.dead_destinations().len(), 1_000);
}

#[test]
fn the_dump_shows_every_section_and_is_bounded() {
    let mut state = MeshState::new("");
    put(&mut state, member("a", "10.0.0.1"));
    put(&mut state, service());
    put(
        &mut state,
        policy("p", security::Action::Allow, security::Scope::Global),
    );
    let dump = state.dump();
    assert_eq!(
        dump["workloads"]["items"][0]["identity"],
        "spiffe://cluster.local/ns/shop/sa/web"
    );
    assert_eq!(dump["services"]["items"][0]["members"], 1);
    assert_eq!(dump["policies"]["items"][0]["key"], "shop/p");
    for i in 0..=crate::discovery::DUMP_MAX {
        put(&mut state, pod(&format!("p{i}"), "10.0.0.1"));
    }
    let workloads = &state.dump()["workloads"];
    assert_eq!(workloads["total"], crate::discovery::DUMP_MAX + 2);
    assert_eq!(
        workloads["items"].as_array().map(Vec::len),
        Some(crate::discovery::DUMP_MAX)
    );
}
