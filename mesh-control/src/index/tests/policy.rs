//! Policies and their wire form.

use super::*;

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
