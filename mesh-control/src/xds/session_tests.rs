use mesh_api::{
    manifest::{Kind, ObjectKey, parse},
    proto::discovery::Status,
};

use super::*;
use crate::{
    config::MeshConfig,
    index::{Change, Index},
};

const ADDRESS: ResourceType = ResourceType::Address;
const AUTHORIZATION: ResourceType = ResourceType::Authorization;
const CART: &str = "Kubernetes//Pod/shop/cart";
const WEB: &str = "Kubernetes//Pod/shop/web";
const CART_SERVICE: &str = "shop/cart.shop.svc.cluster.local";

fn pod(name: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: a}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn service(name: &str, vip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{clusterIPs: [{vip}], selector: {{app: {name}}}, ports: [{{port: 80}}]}}\n"
    )
}

const STRICT: &str = "---\napiVersion: weft.dev/v1alpha1\nkind: MeshPolicy\n\
    metadata: {name: mesh, namespace: weft-system}\nspec: {mtls: {mode: STRICT}}\n";

struct World {
    index: Index,
    session: Session,
}

/// A response, reduced to what matters.
#[derive(Debug, PartialEq, Eq)]
struct Got {
    kind: ResourceType,
    names: Vec<String>,
    removed: Vec<String>,
}

impl World {
    fn new(text: &str) -> Self {
        let mut world = Self {
            index: Index::new(MeshConfig::default()),
            session: Session::default(),
        };
        world.put(text);
        world
    }

    fn put(&mut self, text: &str) {
        let parsed = parse(text);
        assert_eq!(parsed.problems, []);
        self.index.apply(
            parsed
                .objects
                .into_iter()
                .map(|it| Change::Upsert(Arc::new(it.object))),
        );
    }

    fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        let key = ObjectKey {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        };
        self.index.apply([Change::Remove(key)]);
    }

    fn send(&mut self, request: DeltaDiscoveryRequest) -> Event {
        self.session
            .on_request(request, self.index.store())
            .expect("accepted")
    }

    fn subscribe(&mut self, kind: ResourceType, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: kind.url().into(),
            resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    fn raw(&mut self) -> Option<DeltaDiscoveryResponse> {
        self.session.next(self.index.store(), false)
    }

    fn next(&mut self) -> Option<Got> {
        let response = self.raw()?;
        Some(Got {
            kind: ResourceType::from_url(&response.type_url).expect("known"),
            names: response
                .resources
                .into_iter()
                .map(|resource| resource.name)
                .collect(),
            removed: response.removed_resources,
        })
    }

    fn answer(&mut self, kind: ResourceType, error: Option<&str>) -> Event {
        let nonce = self.session.subscriptions[kind as usize]
            .as_ref()
            .and_then(|subscription| Some(subscription.in_flight.as_ref()?.nonce.clone()))
            .expect("something is in flight");
        self.send(DeltaDiscoveryRequest {
            type_url: kind.url().into(),
            response_nonce: nonce,
            error_detail: error.map(|message| Status {
                message: message.into(),
                ..Status::default()
            }),
            ..DeltaDiscoveryRequest::default()
        })
    }

    fn ack(&mut self, kind: ResourceType) {
        assert_eq!(self.answer(kind, None), Event::Accepted);
    }
}

fn got(kind: ResourceType, names: &[&str], removed: &[&str]) -> Option<Got> {
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    Some(Got {
        kind,
        names: owned(names),
        removed: owned(removed),
    })
}

#[test]
fn both_types_are_answered_even_when_there_is_nothing() {
    let mut world = World::new("");
    world.subscribe(ADDRESS, &[]);
    world.subscribe(AUTHORIZATION, &[]);
    assert_eq!(world.next(), got(AUTHORIZATION, &[], &[]));
    assert_eq!(world.next(), got(ADDRESS, &[], &[]));
    assert_eq!(world.next(), None);
}

#[test]
fn a_wildcard_gets_everything_and_then_what_changes() {
    for wildcard in [&[][..], &["*"][..]] {
        let mut world = World::new(&(pod("cart", "10.0.0.1") + &pod("web", "10.0.0.2")));
        world.subscribe(ADDRESS, wildcard);
        assert_eq!(world.next(), got(ADDRESS, &[CART, WEB], &[]));
        world.ack(ADDRESS);
        assert_eq!(world.next(), None);
        world.put(&pod("web", "10.0.0.3"));
        assert_eq!(world.next(), got(ADDRESS, &[WEB], &[]));
        world.ack(ADDRESS);
        world.delete(Kind::Pod, "shop", "cart");
        assert_eq!(world.next(), got(ADDRESS, &[], &[CART]));
    }
}

#[test]
fn a_slow_client_gets_the_newest_state_at_once() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    world.subscribe(ADDRESS, &[]);
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));
    for last in 1..=250 {
        world.put(&pod("web", &format!("10.0.1.{last}")));
        assert_eq!(world.next(), None, "one response is unacknowledged");
    }
    world.delete(Kind::Pod, "shop", "cart");
    world.put(&pod("gone", "10.0.9.9"));
    world.delete(Kind::Pod, "shop", "gone");
    world.ack(ADDRESS);
    assert_eq!(
        world.next(),
        got(ADDRESS, &[WEB], &[CART]),
        "one response, without what came and went"
    );
    world.ack(ADDRESS);
    assert_eq!(world.next(), None);
}

#[test]
fn a_client_that_is_further_behind_than_the_log_still_converges() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    world.subscribe(ADDRESS, &[]);
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));
    world.ack(ADDRESS);
    world.put(&pod("web", "10.0.0.2"));
    world.delete(Kind::Pod, "shop", "cart");
    world.index.forget_log();
    assert_eq!(world.next(), got(ADDRESS, &[WEB], &[CART]));
}

#[test]
fn after_a_reconnect_only_the_difference_is_sent() {
    let mut world = World::new(&(pod("cart", "10.0.0.1") + &pod("web", "10.0.0.2")));
    let version = |name: &str| {
        let held = world.index.store().get(ADDRESS, name).expect("there");
        (name.to_owned(), held.version.to_string())
    };
    let held = [
        version(CART),
        (WEB.to_owned(), "old".into()),
        ("gone".to_owned(), "1".into()),
    ];
    world.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        initial_resource_versions: held.into(),
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(world.next(), got(ADDRESS, &[WEB], &["gone"]));
}

/// An agent names a policy that it refused, and denies for, by an empty version (`Subscription::connect` there).
#[test]
fn what_a_client_holds_in_an_unknown_version_is_sent_again_or_removed() {
    let mut world = World::new(&(STRICT.to_owned() + &pod("cart", "10.0.0.1")));
    let names = world.index.store().all(AUTHORIZATION);
    let strict = names.map(|it| it.name.to_string()).next().expect("one");
    let held = [&*strict, "shop/gone"].map(|name| (name.to_owned(), String::new()));
    world.send(DeltaDiscoveryRequest {
        type_url: AUTHORIZATION.url().into(),
        initial_resource_versions: held.into(),
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(world.next(), got(AUTHORIZATION, &[&strict], &[]));
    world.ack(AUTHORIZATION);
    assert_eq!(world.next(), got(AUTHORIZATION, &[], &["shop/gone"]));
}

#[test]
fn a_refused_version_is_not_sent_again_until_it_changes() {
    let mut world = World::new(&(pod("cart", "10.0.0.1") + &pod("web", "10.0.0.2")));
    world.subscribe(ADDRESS, &[]);
    world.next();
    let event = world.answer(ADDRESS, Some(&"x".repeat(5000)));
    let Event::Nack {
        kind,
        names,
        reason,
    } = event
    else {
        panic!("{event:?}")
    };
    assert_eq!(
        (kind, names.len(), reason.len()),
        (ADDRESS, 2, NACK_REASON_MAX_BYTES)
    );
    assert_eq!(world.next(), None);
    world.put(&pod("cart", "10.0.0.9"));
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));
}

#[test]
fn a_stale_nonce_acknowledges_nothing() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    world.subscribe(ADDRESS, &[]);
    world.next();
    world.put(&pod("web", "10.0.0.2"));
    world.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        response_nonce: "another".into(),
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(world.next(), None);
    world.ack(ADDRESS);
    assert_eq!(world.next(), got(ADDRESS, &[WEB], &[]));
}

#[test]
fn policies_come_before_the_workloads_that_list_them_and_leave_after() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    world.subscribe(ADDRESS, &[]);
    assert!(world.session.awaits_authorization());
    assert_eq!(world.session.next(world.index.store(), true), None, "held");
    world.subscribe(AUTHORIZATION, &[]);
    assert!(!world.session.awaits_authorization());
    assert_eq!(world.next(), got(AUTHORIZATION, &[], &[]));
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));

    world.put(STRICT);
    assert_eq!(
        world.next(),
        None,
        "the workload would list a policy that was not sent yet"
    );
    world.ack(AUTHORIZATION);
    assert_eq!(
        world.next(),
        got(AUTHORIZATION, &["weft-system/weft_strict"], &[])
    );
    assert_eq!(world.next(), None);
    world.ack(ADDRESS);
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));
    world.ack(AUTHORIZATION);

    world.delete(Kind::MeshPolicy, "weft-system", "mesh");
    assert_eq!(
        world.next(),
        None,
        "the workload still lists it at the client"
    );
    world.ack(ADDRESS);
    assert_eq!(world.next(), got(ADDRESS, &[CART], &[]));
    assert_eq!(
        world.next(),
        got(AUTHORIZATION, &[], &["weft-system/weft_strict"])
    );
}

fn on_demand(world: &mut World) {
    world.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["*".into()],
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(world.next(), got(ADDRESS, &[], &[]));
    world.ack(ADDRESS);
}

#[test]
fn on_demand_every_demand_is_answered_under_its_own_name() {
    let all = pod("cart", "10.0.0.1") + &pod("web", "10.0.0.2") + &service("cart", "10.96.0.1");
    let mut world = World::new(&all);
    on_demand(&mut world);
    for (demanded, expected, removed) in [
        ("/10.0.0.2", vec!["/10.0.0.2", WEB], vec![]),
        ("/10.96.0.1", vec!["/10.96.0.1", CART, CART_SERVICE], vec![]),
        (CART_SERVICE, vec![CART, CART_SERVICE], vec![]),
        (WEB, vec![WEB], vec![]),
        ("/192.0.2.1", vec![], vec!["/192.0.2.1"]),
    ] {
        world.subscribe(ADDRESS, &[demanded]);
        assert_eq!(
            world.next(),
            got(ADDRESS, &expected, &removed),
            "{demanded}"
        );
        world.ack(ADDRESS);
        assert_eq!(world.next(), None);
    }
}

#[test]
fn a_demanded_service_address_stands_for_the_service() {
    let mut world = World::new(&(pod("cart", "10.0.0.1") + &service("cart", "10.96.0.1")));
    on_demand(&mut world);
    world.subscribe(ADDRESS, &["/10.96.0.1"]);
    let response = world.raw().expect("answered");
    let body = |name: &str| {
        let found = response
            .resources
            .iter()
            .find(|resource| resource.name == name);
        found
            .and_then(|resource| resource.resource.clone())
            .expect(name)
            .value
    };
    assert_eq!(body("/10.96.0.1"), body(CART_SERVICE));
    assert_ne!(body("/10.96.0.1"), body(CART));
}

#[test]
fn on_demand_only_what_was_demanded_is_updated() {
    let mut world = World::new(&(pod("cart", "10.0.0.1") + &pod("web", "10.0.0.2")));
    on_demand(&mut world);
    world.subscribe(ADDRESS, &["/10.0.0.1", "/10.0.0.7"]);
    assert_eq!(
        world.next(),
        got(ADDRESS, &["/10.0.0.1", CART], &["/10.0.0.7"])
    );
    world.ack(ADDRESS);
    world.put(&pod("web", "10.0.0.3"));
    assert_eq!(world.next(), None);
    world.put(&pod("late", "10.0.0.7"));
    assert_eq!(
        world.next(),
        got(ADDRESS, &["/10.0.0.7", "Kubernetes//Pod/shop/late"], &[])
    );
    world.ack(ADDRESS);
    world.delete(Kind::Pod, "shop", "cart");
    assert_eq!(world.next(), got(ADDRESS, &[], &["/10.0.0.1", CART]));
    world.ack(ADDRESS);
    world.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        resource_names_unsubscribe: vec!["/10.0.0.7".into()],
        ..DeltaDiscoveryRequest::default()
    });
    world.put(&pod("late", "10.0.0.8"));
    assert_eq!(world.next(), None, "no longer wanted");
}

#[test]
fn on_demand_a_reconnect_repeats_the_demands() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    world.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["*".into()],
        initial_resource_versions: [(CART, "old"), ("/10.0.0.5", ""), ("gone", "1")]
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .into(),
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(world.next(), got(ADDRESS, &[CART], &["/10.0.0.5", "gone"]));
}

#[test]
fn unknown_types_are_answered_with_nothing_and_their_acknowledgement_is_not() {
    let mut world = World::new("");
    let request = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/other".into(),
        resource_names_subscribe: vec!["*".into(), "x".into()],
        ..DeltaDiscoveryRequest::default()
    };
    let Event::UnknownType(response) = world.send(request.clone()) else {
        panic!("no answer")
    };
    assert_eq!(response.type_url, request.type_url);
    assert_eq!(response.removed_resources, ["x"]);
    let ack = DeltaDiscoveryRequest {
        response_nonce: response.nonce,
        resource_names_subscribe: Vec::new(),
        ..request
    };
    assert_eq!(world.send(ack), Event::Accepted);
}

#[test]
fn demands_are_limited() {
    let mut world = World::new("");
    on_demand(&mut world);
    let request = |count: usize| DeltaDiscoveryRequest {
        type_url: ADDRESS.url().into(),
        resource_names_subscribe: (0..count).map(|index| format!("/name-{index}")).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    world.send(request(DEMANDED_MAX));
    let refused = world
        .session
        .on_request(request(DEMANDED_MAX + 1), world.index.store());
    assert_eq!(refused, Err(Violation::TooManyNames));

    let mut fresh = Session::default();
    let refused = fresh.on_request(request(DEMANDED_MAX + 1), world.index.store());
    assert_eq!(
        refused,
        Err(Violation::TooManyNames),
        "in the first request as well"
    );
}

#[test]
fn what_is_applied_is_what_was_acknowledged() {
    let mut world = World::new(&pod("cart", "10.0.0.1"));
    let is_newest = |world: &World| world.session.applied() == world.index.store().generation();
    world.subscribe(ADDRESS, &["*"]);
    world.subscribe(AUTHORIZATION, &["*"]);
    assert_eq!(world.session.applied(), 0);
    while let Some(got) = world.next() {
        world.ack(got.kind);
    }
    assert!(is_newest(&world));
    world.put(&pod("web", "10.0.0.2"));
    assert!(!is_newest(&world));
    world.next();
    assert!(!is_newest(&world), "sent is not applied");
    world.answer(ADDRESS, Some("no"));
    assert!(world.next().is_none() && !is_newest(&world), "refused");
    world.put(&pod("web", "10.0.0.3"));
    world.next();
    world.ack(ADDRESS);
    assert!(is_newest(&world));
}
