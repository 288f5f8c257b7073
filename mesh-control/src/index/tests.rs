use std::collections::BTreeMap;

use mesh_api::{
    manifest::parse,
    proto::{
        security::{Action, Authorization, Match, Scope, StringMatch, string_match::MatchType},
        weft::{Capture, FailureMode, SameNode},
        workload::{
            Service, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, load_balancing,
        },
    },
};

use super::*;

/// An index that is fed with YAML.
struct World(Index);

impl World {
    fn new(text: &str) -> Self {
        let mut world = Self(Index::new(MeshConfig {
            cluster_id: "c1".into(),
            ..MeshConfig::default()
        }));
        world.put(text);
        world
    }

    fn put(&mut self, text: &str) -> Diff {
        let parsed = parse(text);
        assert_eq!(parsed.problems, [], "{text}");
        self.0.apply(
            parsed
                .objects
                .into_iter()
                .map(|it| Change::Upsert(Arc::new(it.object))),
        )
    }

    fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Diff {
        let key = ObjectKey {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        };
        self.0.apply([Change::Remove(key)])
    }

    fn address(&self, name: &str) -> Option<address::Type> {
        let resource = self.0.store.get(ResourceType::Address, name)?;
        Address::decode(resource.body.clone())
            .expect("decodes")
            .r#type
    }

    fn workload(&self, uid: &str) -> Workload {
        match self.address(uid) {
            Some(address::Type::Workload(workload)) => workload,
            other => panic!("{uid} is {other:?}"),
        }
    }

    fn pod(&self, name: &str) -> Workload {
        self.workload(&format!("c1//Pod/shop/{name}"))
    }

    fn service(&self, name: &str) -> Service {
        match self.address(&format!("shop/{name}.shop.svc.cluster.local")) {
            Some(address::Type::Service(service)) => service,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn policy(&self, name: &str) -> Option<Authorization> {
        let resource = self.0.store.get(ResourceType::Authorization, name)?;
        Some(Authorization::decode(resource.body.clone()).expect("decodes"))
    }
}

fn pod(name: &str, ip: &str, app: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}}}\n\
         spec: {{nodeName: node-a, serviceAccountName: {app}, containers: [{{name: c, ports: [{{name: api, containerPort: 8080}}]}}]}}\n\
         status: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn service(name: &str, vip: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{clusterIPs: [{vip}], {spec}}}\n"
    )
}

fn namespace(labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n"
    )
}

fn weft(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: weft.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn names(set: &BTreeSet<(ResourceType, Arc<str>)>) -> Vec<&str> {
    set.iter().map(|(_, name)| &**name).collect()
}

const CART: &str = "selector: {app: cart}, ports: [{name: http, port: 80, targetPort: api}]";
const CART_KEY: &str = "shop/cart.shop.svc.cluster.local";

#[test]
fn a_pod_becomes_a_workload() {
    let world = World::new(
        &(namespace("weft.dev/mesh: enabled")
            + "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}\n"
            + &pod("cart-0", "10.0.0.1", "cart")),
    );
    let workload = world.pod("cart-0");
    assert_eq!(workload.addresses, [vec![10, 0, 0, 1]]);
    assert_eq!(workload.tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!(
        (
            workload.trust_domain.as_str(),
            workload.service_account.as_str()
        ),
        ("cluster.local", "cart")
    );
    assert_eq!(
        (workload.node.as_str(), workload.cluster_id.as_str()),
        ("node-a", "c1")
    );
    assert_eq!(
        (
            workload.canonical_name.as_str(),
            workload.canonical_revision.as_str()
        ),
        ("cart", "latest")
    );
    assert_eq!(
        (workload.workload_type(), workload.workload_name.as_str()),
        (WorkloadType::Pod, "cart-0")
    );
    let locality = workload.locality.clone().expect("from the node");
    assert_eq!(
        (locality.region.as_str(), locality.zone.as_str()),
        ("r", "z")
    );
    assert_eq!(workload.status(), WorkloadStatus::Healthy);
    assert!(workload.extensions.is_empty() && workload.authorization_policies.is_empty());
}

#[test]
fn enrolment_is_the_pods_label_then_the_namespaces() {
    let labels = [
        ("", "app: x", TunnelProtocol::None),
        ("weft.dev/mesh: enabled", "app: x", TunnelProtocol::Hbone),
        (
            "weft.dev/mesh: enabled",
            "weft.dev/mesh: disabled",
            TunnelProtocol::None,
        ),
        (
            "weft.dev/mesh: disabled",
            "weft.dev/mesh: enabled",
            TunnelProtocol::Hbone,
        ),
        (
            "istio.io/dataplane-mode: ambient",
            "app: x",
            TunnelProtocol::Hbone,
        ),
        (
            "istio.io/dataplane-mode: ambient",
            "istio.io/dataplane-mode: none",
            TunnelProtocol::None,
        ),
        (
            "",
            "istio.io/dataplane-mode: ambient",
            TunnelProtocol::Hbone,
        ),
    ];
    for (of_namespace, of_pod, expected) in labels {
        let text = pod("x", "10.0.0.1", "x").replace("app: x", of_pod);
        let world = World::new(&(namespace(of_namespace) + &text));
        assert_eq!(
            world.pod("x").tunnel_protocol(),
            expected,
            "{of_namespace} / {of_pod}"
        );
    }
    let host = pod("x", "10.0.0.1", "x").replace("nodeName", "hostNetwork: true, nodeName");
    let world = World::new(&(namespace("weft.dev/mesh: enabled") + &host));
    assert_eq!(
        world.pod("x").tunnel_protocol(),
        TunnelProtocol::None,
        "host network is never captured"
    );
}

#[test]
fn the_state_of_a_pod_decides_over_its_endpoints() {
    let ready = |status| format!("conditions: [{{type: Ready, status: '{status}'}}], podIPs");
    let with = |from: &str, to: &str| pod("cart-0", "10.0.0.1", "cart").replace(from, to);
    let cases = [
        (
            with("podIPs", &ready("True")),
            Some(WorkloadStatus::Healthy),
        ),
        (
            with("podIPs", &ready("False")),
            Some(WorkloadStatus::Unhealthy),
        ),
        (
            with(
                "{name: cart-0",
                "{deletionTimestamp: '2026-01-01T00:00:00Z', name: cart-0",
            ),
            Some(WorkloadStatus::Unhealthy),
        ),
        (with("podIPs", "phase: Succeeded, podIPs"), None),
        (with("podIPs", "phase: Failed, podIPs"), None),
        (with("{podIPs: [{ip: 10.0.0.1}]}", "{}"), None),
    ];
    for (text, expected) in cases {
        let mut world = World::new(&pod("cart-0", "10.0.0.1", "cart"));
        world.put(&text);
        let status = world
            .address("c1//Pod/shop/cart-0")
            .map(|_| world.pod("cart-0").status());
        assert_eq!(status, expected, "{text}");
    }
}

#[test]
fn owners_name_workloads() {
    let owned = |kind: &str, name: &str, extra: &str| {
        pod("x", "10.0.0.1", "x").replace(
            "{name: x,",
            &format!("{{ownerReferences: [{{apiVersion: v1, kind: {kind}, name: {name}, uid: u, controller: true}}], name: x,"),
        ).replace("app: x", &format!("app: x{extra}"))
    };
    for (text, kind, name) in [
        (
            owned("ReplicaSet", "cart-5d4f", ", pod-template-hash: 5d4f"),
            WorkloadType::Deployment,
            "cart",
        ),
        (owned("Job", "backup", ""), WorkloadType::Job, "backup"),
        (
            owned("Job", "backup-28000000", ""),
            WorkloadType::Cronjob,
            "backup",
        ),
        (owned("StatefulSet", "db", ""), WorkloadType::Pod, "db"),
        (
            pod("x", "10.0.0.1", "x").replace("app: x", "weft.dev/workload-name: cart"),
            WorkloadType::Deployment,
            "cart",
        ),
    ] {
        let workload = World::new(&text).pod("x");
        assert_eq!(
            (workload.workload_type(), workload.workload_name.as_str()),
            (kind, name),
            "{text}"
        );
    }
}

#[test]
fn a_service_selects_its_endpoints_and_resolves_named_ports() {
    let mut world = World::new(
        &(pod("cart-0", "10.0.0.1", "cart")
            + &pod("web-0", "10.0.0.2", "web")
            + &service("cart", "10.96.0.1", CART)),
    );
    let ports = &world.pod("cart-0").services[CART_KEY].ports;
    assert_eq!((ports[0].service_port, ports[0].target_port), (80, 8080));
    assert!(world.pod("web-0").services.is_empty());
    let wire = world.service("cart");
    assert_eq!(wire.ports[0].target_port, 0, "every endpoint names its own");
    assert_eq!(wire.addresses[0].address, [10, 96, 0, 1]);

    world.put(&service(
        "cart",
        "10.96.0.1",
        &CART.replace("app: cart", "app: web"),
    ));
    assert!(world.pod("cart-0").services.is_empty());
    assert!(world.pod("web-0").services.contains_key(CART_KEY));

    let diff = world.delete(Kind::Service, "shop", "cart");
    assert_eq!(names(&diff.removed), [CART_KEY]);
    assert!(world.pod("web-0").services.is_empty());
}

#[test]
fn traffic_settings_become_load_balancing() {
    use load_balancing::{HealthPolicy, Mode, Scope};
    for (setting, mode, last, health) in [
        (
            "trafficDistribution: PreferClose",
            Mode::Failover,
            Some(Scope::Zone),
            HealthPolicy::OnlyHealthy,
        ),
        (
            "trafficDistribution: PreferSameNode",
            Mode::Failover,
            Some(Scope::Node),
            HealthPolicy::OnlyHealthy,
        ),
        (
            "internalTrafficPolicy: Local",
            Mode::Strict,
            Some(Scope::Node),
            HealthPolicy::OnlyHealthy,
        ),
        (
            "publishNotReadyAddresses: true",
            Mode::UnspecifiedMode,
            None,
            HealthPolicy::AllowAll,
        ),
    ] {
        let world = World::new(&service("cart", "None", &format!("{CART}, {setting}")));
        let wire = world.service("cart");
        assert!(wire.addresses.is_empty(), "headless");
        let balancing = wire.load_balancing.expect(setting);
        assert_eq!(
            (balancing.mode(), balancing.health_policy()),
            (mode, health),
            "{setting}"
        );
        assert_eq!(
            balancing.routing_preference().next_back(),
            last,
            "{setting}"
        );
    }
}

fn slice(address: &str, ready: bool) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: bank-1, namespace: shop, labels: {{kubernetes.io/service-name: bank}}}}\n\
         addressType: IPv4\nports: [{{name: tls, port: 8443}}]\n\
         endpoints: [{{addresses: [{address}], conditions: {{ready: {ready}}}}}]\n"
    )
}

#[test]
fn slices_list_the_endpoints_of_services_without_a_selector() {
    const BANK: &str = "shop/bank.shop.svc.cluster.local";
    const STRANGER: &str = "c1/discovery.k8s.io/EndpointSlice/shop/bank-1/10.0.0.1";
    let mut world = World::new(
        &(service("bank", "10.96.0.2", "ports: [{name: tls, port: 443}]")
            + &slice("10.0.0.1", true)),
    );
    let stranger = world.workload(STRANGER);
    assert_eq!(stranger.services[BANK].ports[0].target_port, 8443);
    assert_eq!(stranger.tunnel_protocol(), TunnelProtocol::None);

    let diff = world.put(&pod("bank-0", "10.0.0.1", "bank"));
    assert_eq!(
        names(&diff.removed),
        [STRANGER],
        "the address now belongs to a workload"
    );
    assert_eq!(
        world.pod("bank-0").services[BANK].ports[0].target_port,
        8443
    );

    world.delete(Kind::EndpointSlice, "shop", "bank-1");
    assert!(world.pod("bank-0").services.is_empty());
}

#[test]
fn an_external_workload_is_an_endpoint_and_slices_know_its_readiness() {
    let external = "---\napiVersion: weft.dev/v1alpha1\nkind: ExternalWorkload\n\
        metadata: {name: vm, namespace: shop, labels: {app: cart}}\n\
        spec: {addresses: [10.0.0.9], node: node-b, serviceAccount: cart, mesh: enabled, ports: {api: 9090}, weight: 3, locality: {zone: z}}\n";
    let uid = "c1/weft.dev/ExternalWorkload/shop/vm";
    let mut world = World::new(&(external.to_owned() + &service("cart", "10.96.0.1", CART)));
    let workload = world.workload(uid);
    assert_eq!(workload.services[CART_KEY].ports[0].target_port, 9090);
    assert_eq!(
        (workload.capacity, workload.tunnel_protocol()),
        (Some(3), TunnelProtocol::Hbone)
    );
    assert_eq!(
        workload.locality.map(|locality| locality.zone),
        Some("z".into())
    );
    world.put(&slice("10.0.0.9", false));
    assert_eq!(world.workload(uid).status(), WorkloadStatus::Unhealthy);
    world.put(&slice("10.0.0.9", true));
    assert_eq!(world.workload(uid).status(), WorkloadStatus::Healthy);
}

#[test]
fn a_change_recomputes_only_what_depends_on_it() {
    let mut text = service("cart", "10.96.0.1", CART)
        + &service("web", "10.96.0.2", &CART.replace("cart", "web"));
    for index in 0..50 {
        text += &pod(
            &format!("cart-{index}"),
            &format!("10.0.0.{}", index + 1),
            "cart",
        );
        text += &pod(
            &format!("web-{index}"),
            &format!("10.0.1.{}", index + 1),
            "web",
        );
    }
    let mut world = World::new(&text);
    let recomputed = |diff: Diff| (diff.recomputed, diff.changed.len());
    let moved = pod("cart-7", "10.0.2.1", "cart");
    assert_eq!(recomputed(world.put(&moved)), (1, 1), "a pod: itself");
    assert_eq!(
        recomputed(world.put(&moved)),
        (1, 0),
        "the same again: nothing changes"
    );
    let repriced = service("cart", "10.96.0.1", &CART.replace("port: 80", "port: 81"));
    assert_eq!(
        recomputed(world.put(&repriced)),
        (51, 51),
        "a service: itself and its endpoints"
    );
    let policy = weft(
        "AuthorizationPolicy",
        "shop",
        "p",
        "{selector: {matchLabels: {app: web}}, rules: [{}]}",
    );
    assert_eq!(
        recomputed(world.put(&policy)),
        (51, 51),
        "a policy: itself and what it selects"
    );
    let narrowed = policy.replace("[{}]", "[{to: [{ports: [1]}]}]");
    assert_eq!(
        recomputed(world.put(&narrowed)),
        (1, 1),
        "other rules: itself"
    );
    let account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: cart, namespace: shop}\n";
    assert_eq!(recomputed(world.put(account)), (0, 0));
}

fn only_match(policy: &Authorization) -> &Match {
    assert_eq!(policy.rules.len(), 1);
    assert_eq!(policy.rules[0].clauses.len(), 1);
    &policy.rules[0].clauses[0].matches[0]
}

#[test]
fn authorization_policies_have_the_wire_form() {
    let rules = "{action: ALLOW, rules: [{from: [\
        {principals: ['spiffe://cluster.local/ns/shop/sa/web', 'cluster.local/*', '*/web', '*'], namespaces: [shop], \
         serviceAccounts: [web, other/job], ipBlocks: [10.1.2.3/8], notIpBlocks: ['::1']}], to: [{ports: [80], notPorts: [81]}]}]}";
    let world = World::new(&weft("AuthorizationPolicy", "shop", "p", rules));
    let policy = world.policy("shop/p").expect("there");
    assert_eq!(
        (policy.scope(), policy.action(), policy.dry_run),
        (Scope::Namespace, Action::Allow, false)
    );
    let [from, to] = &policy.rules[0].clauses[..] else {
        panic!("{policy:?}")
    };
    let text = |text: &StringMatch| text.match_type.clone().expect("set");
    let from = &from.matches[0];
    assert_eq!(
        from.principals.iter().map(text).collect::<Vec<_>>(),
        [
            MatchType::Exact("cluster.local/ns/shop/sa/web".into()),
            MatchType::Prefix("cluster.local/".into()),
            MatchType::Suffix("/web".into()),
            MatchType::Presence(()),
        ]
    );
    assert_eq!(
        from.namespaces.iter().map(text).collect::<Vec<_>>(),
        [MatchType::Exact("shop".into())]
    );
    let accounts: Vec<_> = from
        .service_accounts
        .iter()
        .map(|it| (it.namespace.as_str(), it.service_account.as_str()))
        .collect();
    assert_eq!(accounts, [("shop", "web"), ("other", "job")]);
    assert_eq!(
        (
            from.source_ips[0].address.as_slice(),
            from.source_ips[0].length
        ),
        ([10, 0, 0, 0].as_slice(), 8)
    );
    assert_eq!(from.not_source_ips[0].length, 128);
    assert_eq!(
        (
            &to.matches[0].destination_ports[..],
            &to.matches[0].not_destination_ports[..]
        ),
        (&[80][..], &[81][..])
    );
}

#[test]
fn scope_action_and_empty_rules() {
    let selector = "selector: {matchLabels: {app: web}}";
    for (namespace, spec, scope, action, dry_run, rules) in [
        (
            "shop",
            "{}".to_owned(),
            Scope::Namespace,
            Action::Allow,
            false,
            0,
        ),
        (
            "weft-system",
            "{action: DENY, rules: [{}]}".into(),
            Scope::Global,
            Action::Deny,
            false,
            1,
        ),
        (
            "shop",
            format!("{{{selector}, action: AUDIT, rules: [{{}}]}}"),
            Scope::WorkloadSelector,
            Action::Deny,
            true,
            1,
        ),
        (
            "shop",
            "{selector: {matchLabels: {}}}".into(),
            Scope::Namespace,
            Action::Allow,
            false,
            0,
        ),
    ] {
        let world = World::new(&weft("AuthorizationPolicy", namespace, "p", &spec));
        let policy = world.policy(&format!("{namespace}/p")).expect("there");
        assert_eq!(
            (policy.scope(), policy.action(), policy.dry_run),
            (scope, action, dry_run),
            "{spec}"
        );
        assert_eq!(policy.rules.len(), rules, "{spec}");
        assert!(
            policy.rules.iter().all(|rule| rule.clauses.is_empty()),
            "an empty rule matches everything"
        );
    }
}

#[test]
fn selected_workloads_list_their_policies() {
    let spec = "{selector: {matchLabels: {app: web}}, rules: [{}]}";
    let mut world =
        World::new(&(pod("web-0", "10.0.0.1", "web") + &pod("cart-0", "10.0.0.2", "cart")));
    world.put(&weft("AuthorizationPolicy", "shop", "own", spec));
    world.put(&weft("AuthorizationPolicy", "weft-system", "root", spec));
    world.put(&weft("AuthorizationPolicy", "elsewhere", "foreign", spec));
    assert_eq!(
        world.pod("web-0").authorization_policies,
        ["shop/own", "weft-system/root"]
    );
    assert!(world.pod("cart-0").authorization_policies.is_empty());
    world.put(&weft(
        "AuthorizationPolicy",
        "shop",
        "own",
        &spec.replace("web", "cart"),
    ));
    assert_eq!(
        world.pod("web-0").authorization_policies,
        ["weft-system/root"]
    );
    assert_eq!(world.pod("cart-0").authorization_policies, ["shop/own"]);
    world.delete(Kind::AuthorizationPolicy, "weft-system", "root");
    assert!(world.pod("web-0").authorization_policies.is_empty());
}

#[test]
fn strictness_is_a_shared_deny_policy() {
    let mut world =
        World::new(&(pod("web-0", "10.0.0.1", "web") + &pod("cart-0", "10.0.0.2", "cart")));
    world.put(&weft(
        "MeshPolicy",
        "weft-system",
        "mesh",
        "{mtls: {mode: STRICT}}",
    ));
    let strict = world.policy("weft-system/weft_strict").expect("generated");
    assert_eq!(
        (strict.scope(), strict.action()),
        (Scope::WorkloadSelector, Action::Deny)
    );
    assert_eq!(
        *only_match(&strict),
        Match {
            not_principals: vec![StringMatch {
                match_type: Some(MatchType::Presence(()))
            }],
            ..Match::default()
        }
    );
    assert_eq!(
        world.pod("web-0").authorization_policies,
        ["weft-system/weft_strict"]
    );

    let web =
        "{selector: {matchLabels: {app: web}}, mtls: {ports: {8080: PERMISSIVE, 9090: STRICT}}}";
    world.put(&weft("MeshPolicy", "shop", "web", web));
    assert_eq!(
        world.pod("web-0").authorization_policies,
        ["weft-system/weft_strict_except_8080"]
    );
    let except = world
        .policy("weft-system/weft_strict_except_8080")
        .expect("generated");
    assert_eq!(only_match(&except).not_destination_ports, [8080]);

    world.put(&weft(
        "MeshPolicy",
        "weft-system",
        "mesh",
        "{mtls: {mode: PERMISSIVE}}",
    ));
    assert_eq!(
        world.pod("web-0").authorization_policies,
        ["weft-system/weft_strict_only_9090"]
    );
    let only = world
        .policy("weft-system/weft_strict_only_9090")
        .expect("generated");
    assert_eq!(only_match(&only).destination_ports, [9090]);
    assert_eq!(
        world.policy("weft-system/weft_strict"),
        None,
        "nobody lists it any more"
    );

    world.delete(Kind::MeshPolicy, "shop", "web");
    assert!(world.pod("web-0").authorization_policies.is_empty());
    assert_eq!(world.0.store.len(ResourceType::Authorization), 0);
}

#[test]
fn the_most_specific_mesh_policy_wins_field_by_field() {
    let mut world = World::new(&pod("web-0", "10.0.0.1", "web"));
    let capture = |world: &World| {
        let extensions = world.pod("web-0").extensions;
        extensions.first().map(|extension| {
            let config = extension.config.as_ref().expect("set");
            let capture = Capture::decode(config.value.as_slice()).expect("decodes");
            (capture.failure_mode(), capture.same_node())
        })
    };
    let strict = |world: &World| !world.pod("web-0").authorization_policies.is_empty();
    assert_eq!((capture(&world), strict(&world)), (None, false), "defaults");
    world.put(&weft(
        "MeshPolicy",
        "weft-system",
        "mesh",
        "{mtls: {mode: STRICT}, failureMode: open, sameNode: tunnel}",
    ));
    assert_eq!(
        (capture(&world), strict(&world)),
        (Some((FailureMode::Open, SameNode::Tunnel)), true)
    );
    world.put(&weft(
        "MeshPolicy",
        "shop",
        "namespace",
        "{failureMode: closed}",
    ));
    assert_eq!(
        capture(&world),
        Some((FailureMode::Closed, SameNode::Tunnel))
    );
    world.put(&weft(
        "MeshPolicy",
        "shop",
        "web",
        "{selector: {matchLabels: {app: web}}, sameNode: kernel, mtls: {mode: PERMISSIVE}}",
    ));
    assert_eq!((capture(&world), strict(&world)), (None, false));
    world.put(&weft(
        "MeshPolicy",
        "shop",
        "other",
        "{selector: {matchLabels: {app: other}}, failureMode: open}",
    ));
    assert_eq!(capture(&world), None, "it selects others");
    world.put(&weft(
        "MeshPolicy",
        "shop",
        "a-namespace",
        "{failureMode: open}",
    ));
    assert_eq!(
        capture(&world),
        Some((FailureMode::Open, SameNode::Kernel)),
        "first by name"
    );
}

#[test]
fn only_the_node_that_runs_an_identity_may_have_it() {
    let mut world =
        World::new(&pod("web-0", "10.0.0.1", "web").replace("{podIPs: [{ip: 10.0.0.1}]}", "{}"));
    let identity = |text: &str| text.parse::<Identity>().expect("valid");
    let web = identity("spiffe://cluster.local/ns/shop/sa/web");
    assert!(
        world.0.runs_on("node-a", &web),
        "even before it has an address"
    );
    for (node, other) in [
        ("node-b", web.clone()),
        ("", web.clone()),
        ("node-a", identity("spiffe://cluster.local/ns/shop/sa/cart")),
        ("node-a", identity("spiffe://cluster.local/ns/other/sa/web")),
        ("node-a", identity("spiffe://elsewhere/ns/shop/sa/web")),
    ] {
        assert!(!world.0.runs_on(node, &other), "{node} {other}");
    }
    world.put(&pod("web-0", "10.0.0.1", "web").replace("podIPs", "phase: Succeeded, podIPs"));
    assert!(!world.0.runs_on("node-a", &web), "it has ended");
    world.put(&pod("web-0", "10.0.0.1", "web").replace("node-a", "node-b"));
    assert!(world.0.runs_on("node-b", &web) && !world.0.runs_on("node-a", &web));
    world.delete(Kind::Pod, "shop", "web-0");
    assert!(!world.0.runs_on("node-b", &web));
}

#[test]
fn order_and_history_leave_no_trace() {
    let all = [
        namespace("weft.dev/mesh: enabled"),
        pod("cart-0", "10.0.0.1", "cart"),
        pod("web-0", "10.0.0.2", "web"),
        service("cart", "10.96.0.1", CART),
        service("bank", "10.96.0.2", "ports: [{name: tls, port: 443}]"),
        slice("10.0.0.77", true),
        weft(
            "MeshPolicy",
            "weft-system",
            "mesh",
            "{mtls: {mode: STRICT}}",
        ),
        weft(
            "AuthorizationPolicy",
            "shop",
            "p",
            "{selector: {matchLabels: {app: web}}, rules: [{}]}",
        ),
    ];
    let versions = |world: &World| -> BTreeMap<Arc<str>, Arc<str>> {
        ResourceType::ALL
            .into_iter()
            .flat_map(|kind| world.0.store.all(kind))
            .map(|resource| (resource.name.clone(), resource.version.clone()))
            .collect()
    };
    let at_once = World::new(&all.concat());
    let mut backwards = World::new("");
    for text in all.iter().rev() {
        backwards.put(text);
    }
    assert_eq!(versions(&at_once), versions(&backwards));

    let mut emptied = backwards;
    let known: Vec<_> = emptied.0.known.iter().cloned().collect();
    for key in known {
        emptied.0.apply([Change::Remove(key)]);
    }
    assert!(versions(&emptied).is_empty(), "{:?}", versions(&emptied));
    assert!(emptied.0.strict_users.is_empty() && emptied.0.address_slices.is_empty());
    assert!(emptied.0.store.resolve("/10.0.0.1").is_empty());
    assert!(
        Kind::ALL
            .into_iter()
            .all(|kind| emptied.0.objects(kind) == 0)
    );
}

#[test]
fn a_demanded_name_stands_for_a_service_and_its_endpoints() {
    let world =
        World::new(&(pod("cart-0", "10.0.0.1", "cart") + &service("cart", "10.96.0.1", CART)));
    let resolve = |name: &str| -> Vec<String> {
        world
            .0
            .store
            .resolve(name)
            .iter()
            .map(|resource| resource.name.to_string())
            .collect()
    };
    let both = ["c1//Pod/shop/cart-0", CART_KEY];
    assert_eq!(resolve("/10.96.0.1"), both);
    assert_eq!(resolve(CART_KEY), both);
    assert_eq!(resolve("/10.0.0.1"), [both[0]]);
    assert_eq!(resolve("c1//Pod/shop/cart-0"), [both[0]]);
    assert!(resolve("/10.0.0.99").is_empty());
}
