use mesh_api::proto::{
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource},
    security, workload as wire,
};
use prost::Message as _;
use prost_types::Any;

use super::*;
use crate::{
    discovery::subscription::{Kind, NACK_MESSAGE_MAX_BYTES, REFUSED_REMEMBERED_MAX, Subscription},
    policy::{Connection, authorize},
};

fn subscription() -> Subscription {
    Subscription::new(
        Node {
            id: "agent".to_owned(),
            ..Node::default()
        },
        true,
    )
}

fn resource(name: &str, version: &str, body: Vec<u8>) -> Resource {
    let any = Any {
        type_url: String::new(),
        value: body,
    };
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(any),
        ..Resource::default()
    }
}

fn workload(name: &str, version: &str) -> Resource {
    let pod = pod(name, "10.0.0.1");
    let uid = pod.uid.clone();
    resource(
        &uid,
        version,
        wire::Address {
            r#type: Some(wire::address::Type::Workload(pod)),
        }
        .encode_to_vec(),
    )
}

fn broken(name: &str, version: &str) -> Resource {
    resource(&format!("c1//Pod/shop/{name}"), version, vec![0xff; 3])
}

fn response(kind: Kind, nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: nonce.to_owned(),
        resources,
        ..DeltaDiscoveryResponse::default()
    }
}

fn reason(request: &DeltaDiscoveryRequest) -> Option<&str> {
    request
        .error_detail
        .as_ref()
        .map(|detail| detail.message.as_str())
}

#[test]
fn the_first_requests_subscribe_to_everything() {
    let requests = subscription().connect();
    let urls: Vec<_> = requests.iter().map(|r| r.type_url.as_str()).collect();
    assert_eq!(
        urls,
        [
            "type.googleapis.com/istio.workload.Address",
            "type.googleapis.com/istio.security.Authorization"
        ]
    );
    for request in &requests {
        assert_eq!(request.node.as_ref().map(|n| n.id.as_str()), Some("agent"));
        assert!(
            request.resource_names_subscribe.is_empty()
                && request.resource_names_unsubscribe.is_empty()
        );
        assert!(request.initial_resource_versions.is_empty() && request.response_nonce.is_empty());
    }
}

#[test]
fn a_good_response_is_acknowledged_by_nonce_without_the_node() {
    let mut subscription = subscription();
    let reaction = subscription.on_response(response(Kind::Address, "7", vec![workload("a", "1")]));
    let expected = DeltaDiscoveryRequest {
        type_url: Kind::Address.type_url().to_owned(),
        response_nonce: "7".to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(reaction.reply, expected);
    assert_eq!((reaction.updates.len(), reaction.nack), (1, false));
}

#[test]
fn of_a_thousand_resources_ten_malformed_ones_cost_one_nack_and_nothing_else() {
    let mut subscription = subscription();
    let resources = (0..1_000).map(|i| {
        let name = format!("p{i}");
        if i % 100 == 0 {
            broken(&name, "1")
        } else {
            workload(&name, "1")
        }
    });
    let resources: Vec<_> = resources.collect();
    let reaction = subscription.on_response(response(Kind::Address, "1", resources.clone()));
    assert_eq!(
        (
            reaction.updates.len(),
            reaction.rejected.len(),
            reaction.nack
        ),
        (990, 10, true)
    );
    let reasons = reason(&reaction.reply).expect("a NACK");
    assert_eq!(
        reasons.split("; ").count(),
        10,
        "every reason is told: {reasons}"
    );
    assert!(reasons.contains("c1//Pod/shop/p900: cannot be decoded"));

    let again = subscription.on_response(response(Kind::Address, "2", resources));
    assert!(!again.nack, "the same bytes are reported once");
    let other = resource("c1//Pod/shop/p0", "2", vec![0xfe]);
    assert!(
        subscription
            .on_response(response(Kind::Address, "3", vec![other]))
            .nack,
        "a new version is news"
    );
    assert_eq!(subscription.refused(), 10);
    let fixed = subscription.on_response(response(Kind::Address, "4", vec![workload("p0", "3")]));
    assert_eq!(
        (fixed.updates.len(), fixed.nack, subscription.refused()),
        (1, false, 9)
    );
}

#[test]
fn a_new_stream_hears_of_refusals_again() {
    let mut subscription = subscription();
    assert!(
        subscription
            .on_response(response(Kind::Address, "1", vec![broken("a", "1")]))
            .nack
    );
    subscription.connect();
    assert!(
        subscription
            .on_response(response(Kind::Address, "1", vec![broken("a", "1")]))
            .nack
    );
}

#[test]
fn reconnecting_names_what_is_in_force() {
    let mut subscription = subscription();
    let first = vec![
        workload("good", "1"),
        workload("worse", "1"),
        workload("gone", "1"),
        broken("bad", "1"),
    ];
    subscription.on_response(response(Kind::Address, "1", first));
    let mut second = response(Kind::Address, "2", vec![broken("worse", "2")]);
    second.removed_resources = vec!["c1//Pod/shop/gone".to_owned()];
    subscription.on_response(second);
    subscription.on_response(response(
        Kind::Authorization,
        "3",
        vec![resource("shop/deny", "1", vec![0xff])],
    ));
    let requests = subscription.connect();
    let versions = |index: usize| {
        let mut named: Vec<_> = requests[index]
            .initial_resource_versions
            .clone()
            .into_iter()
            .collect();
        named.sort();
        named
    };
    let entry = |name: &str, version: &str| (name.to_owned(), version.to_owned());
    assert_eq!(
        versions(0),
        [
            entry("c1//Pod/shop/good", "1"),
            entry("c1//Pod/shop/worse", "1")
        ]
    );
    assert_eq!(
        versions(1),
        [entry("shop/deny", "")],
        "so that the server tells when the stand-in may go"
    );
}

#[test]
fn removals_come_after_additions_and_remove_the_right_type() {
    let mut subscription = subscription();
    let mut replaced = response(Kind::Address, "1", vec![workload("new", "1")]);
    replaced.removed_resources = vec!["c1//Pod/shop/old".to_owned()];
    let reaction = subscription.on_response(replaced);
    let mut state = MeshState::new("");
    put(&mut state, pod("old", "10.0.0.1"));
    put(
        &mut state,
        policy("p", security::Action::Allow, security::Scope::Global),
    );
    let present: Vec<_> = reaction
        .updates
        .into_iter()
        .map(|update| {
            state.apply(update);
            state
                .workload_by_address("10.0.0.1".parse().expect("an address"))
                .map(|w| w.name.to_string())
        })
        .collect();
    assert_eq!(
        present,
        [Some("new".to_owned()), Some("new".to_owned())],
        "at no time nobody owns the address"
    );
    let mut removed = response(Kind::Authorization, "2", Vec::new());
    removed.removed_resources = vec!["shop/p".to_owned()];
    subscription
        .on_response(removed)
        .updates
        .into_iter()
        .for_each(|update| _ = state.apply(update));
    assert_eq!((state.counts().workloads, state.counts().policies), (1, 0));
}

#[test]
fn ready_means_that_both_types_were_answered_even_with_nothing() {
    let mut subscription = subscription();
    subscription.on_response(response(Kind::Address, "1", Vec::new()));
    assert!(!subscription.is_answered());
    subscription.on_response(response(Kind::Authorization, "2", Vec::new()));
    assert!(subscription.is_answered() && subscription.is_current());
    subscription.connect();
    assert!(
        subscription.is_answered() && !subscription.is_current(),
        "a new stream has yet to confirm"
    );
}

#[test]
fn while_policies_are_unknown_nothing_is_allowed() {
    let answers = |subscription: &mut Subscription, kind, resources| {
        subscription
            .on_response(response(kind, "n", resources))
            .updates
    };
    let allowed = |state: &MeshState| {
        let workload = state.local_workload("n1", "shop", "a").expect("told");
        let connection = Connection {
            peer: None,
            source: "10.0.0.2".parse().expect("an address"),
            destination: socket("10.0.0.1:8080"),
        };
        authorize(state, &workload, &connection).is_allowed()
    };
    let apply = |state: &mut MeshState, updates: Vec<Update>| {
        updates.into_iter().for_each(|u| _ = state.apply(u));
    };

    let mut subscription = subscription();
    let mut state = MeshState::new("");
    let updates = answers(&mut subscription, Kind::Address, vec![workload("a", "1")]);
    apply(&mut state, updates);
    assert!(!allowed(&state), "the addresses came first");
    let updates = answers(&mut subscription, Kind::Authorization, Vec::new());
    apply(&mut state, updates);
    assert!(allowed(&state), "there are no policies");

    let mut restarted = self::subscription();
    let mut state = MeshState::new("");
    apply(&mut state, restarted.restore(subscription.records()).0);
    assert!(allowed(&state), "the snapshot knew that there are none");
}

#[test]
fn an_unknown_type_is_acknowledged_and_changes_nothing() {
    let mut subscription = subscription();
    let mut foreign = response(Kind::Address, "9", vec![workload("a", "1")]);
    foreign.type_url = "type.googleapis.com/other".to_owned();
    let reaction = subscription.on_response(foreign);
    assert_eq!(
        (
            reaction.reply.response_nonce.as_str(),
            reaction.nack,
            reaction.updates.len()
        ),
        ("9", false, 0)
    );
    assert!(subscription.records().is_empty());
}

#[test]
fn a_resource_without_a_body_is_refused() {
    let empty = Resource {
        name: "x".to_owned(),
        ..Resource::default()
    };
    let reaction = subscription().on_response(response(Kind::Address, "1", vec![empty]));
    assert_eq!(reason(&reaction.reply), Some("x: has no body"));
}

#[test]
fn the_text_of_a_nack_is_bounded_and_counts_the_rest() {
    let many = (0..10_000).map(|i| broken(&format!("p{i}"), "1")).collect();
    let reaction = subscription().on_response(response(Kind::Address, "1", many));
    let text = reason(&reaction.reply).expect("a NACK");
    assert!(
        text.len() <= NACK_MESSAGE_MAX_BYTES + 64 && text.ends_with(" more"),
        "{} bytes",
        text.len()
    );
}

#[test]
fn the_memory_of_refusals_is_bounded_and_what_it_lacks_is_reported_again() {
    let mut subscription = subscription();
    let many =
        |range: std::ops::Range<usize>| range.map(|i| broken(&format!("p{i}"), "1")).collect();
    let max = REFUSED_REMEMBERED_MAX;
    subscription.on_response(response(Kind::Address, "1", many(0..max + 1)));
    assert_eq!(subscription.refused(), max);
    assert!(
        !subscription
            .on_response(response(Kind::Address, "2", many(0..max)))
            .nack
    );
    assert!(
        subscription
            .on_response(response(Kind::Address, "3", many(max..max + 1)))
            .nack
    );
    let policy = resource("shop/deny", "1", vec![0xff]);
    subscription.on_response(response(Kind::Authorization, "4", vec![policy]));
    assert_eq!(
        subscription.refused(),
        max + 1,
        "a policy that denies is never forgotten"
    );
}

#[test]
fn a_full_index_refuses_new_addresses_and_still_updates_old_ones() {
    let mut subscription = subscription().with_addresses_max(2);
    let three = vec![workload("a", "1"), workload("b", "1"), workload("c", "1")];
    let reaction = subscription.on_response(response(Kind::Address, "1", three));
    assert_eq!(reaction.updates.len(), 2);
    assert!(
        reason(&reaction.reply)
            .expect("a NACK")
            .contains("at most 2 are allowed")
    );
    assert!(
        !subscription
            .on_response(response(Kind::Address, "2", vec![workload("a", "2")]))
            .nack
    );
}

#[test]
fn what_is_recorded_restores_the_same_state_denials_included() {
    let mut subscription = subscription();
    subscription.on_response(response(
        Kind::Address,
        "1",
        vec![workload("a", "1"), broken("b", "1")],
    ));
    subscription.on_response(response(
        Kind::Authorization,
        "2",
        vec![resource("shop/deny", "1", vec![0xff])],
    ));
    let records = subscription.records();
    assert_eq!(
        records.len(),
        2,
        "the workload, and the policy that denies as long as it cannot be read"
    );
    let mut restarted = self::subscription();
    let (updates, rejected) = restarted.restore(records);
    let mut state = MeshState::new("");
    updates
        .into_iter()
        .for_each(|update| _ = state.apply(update));
    assert_eq!(
        (
            state.counts().workloads,
            state.counts().stand_ins,
            rejected.len()
        ),
        (1, 1, 1)
    );
    assert!(!restarted.is_answered());
    assert_eq!(
        restarted.connect()[0].initial_resource_versions["c1//Pod/shop/a"],
        "1"
    );
}
