use super::*;
use crate::limits::{ADDRESSES_MAX, VALUES_PER_POLICY_MAX};

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {nodeName: a}\n";

fn weft(kind: &str, spec: &str) -> String {
    format!(
        "apiVersion: weft.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: it, namespace: shop}}\nspec: {spec}\n"
    )
}

/// The only problem of a text, as `field: message`.
fn problem(text: &str) -> String {
    let parsed = parse(text);
    assert_eq!(parsed.problems.len(), 1, "{text}: {:#?}", parsed.problems);
    let problem = &parsed.problems[0];
    format!("{}: {}", problem.field, problem.message)
}

#[test]
fn reads_every_kind_and_json() {
    let text = [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n",
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web}\n",
        POD,
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\naddressType: IPv4\nendpoints: []\n",
        &weft("AuthorizationPolicy", "{rules: [{}]}"),
        &weft("MeshPolicy", "{mtls: {mode: STRICT, ports: {8080: PERMISSIVE}}}"),
        r#"{"apiVersion": "weft.dev/v1alpha1", "kind": "ExternalWorkload", "metadata": {"name": "vm"},
            "spec": {"addresses": ["10.0.0.1"]}}"#,
    ]
    .join("\n---\n");
    let parsed = parse(&text);
    assert_eq!(parsed.problems, []);
    let kinds: Vec<_> = parsed
        .objects
        .iter()
        .map(|located| located.object.kind())
        .collect();
    assert_eq!(kinds, Kind::ALL.to_vec().into_iter().collect::<Vec<_>>());
    assert_eq!(
        parsed.objects[2].object.key().to_string(),
        "ServiceAccount default/web"
    );
}

#[test]
fn a_bad_document_does_not_disturb_its_neighbours() {
    let text = format!(
        "# shop\n{POD}---\nkind: [\n---\n\n---\n{}",
        POD.replace("web", "cart")
    );
    let parsed = parse(&text);
    assert_eq!(parsed.objects.len(), 2);
    let problem = &parsed.problems[0];
    assert_eq!((problem.document, problem.object.as_ref()), (2, None));
    assert!((7..=9).contains(&problem.line), "{problem}");
}

#[test]
fn problems_name_document_line_object_and_field() {
    let text = format!(
        "{POD}---\n{}",
        POD.replace("web", "cart")
            .replace("spec: {", "spec: {nodNam: b, ")
    );
    let parsed = parse(&text);
    assert_eq!(
        parsed.problems[0].to_string(),
        "document 2 (line 6), Pod shop/cart, field spec.nodNam: unknown field"
    );
    let wrong_type = weft(
        "ExternalWorkload",
        "\n  addresses: [10.0.0.1]\n  ports: {db: many}",
    );
    let parsed = parse(&wrong_type);
    let problem = &parsed.problems[0];
    assert_eq!(
        (problem.line, problem.field.as_str()),
        (6, "spec.ports.db"),
        "{problem}"
    );
    assert!(problem.message.contains("expected u16"), "{problem}");
}

#[test]
fn every_unknown_field_is_named() {
    let text = weft(
        "AuthorizationPolicy",
        "{rulez: [], rules: [{from: [{principal: [a], namespaces: [b]}]}]}",
    );
    let fields: Vec<_> = parse(&text)
        .problems
        .into_iter()
        .map(|problem| problem.field)
        .collect();
    assert_eq!(fields, ["spec.rulez", "spec.rules[0].from[0].principal"]);
}

#[test]
fn refuses_what_is_no_object() {
    for (text, expected) in [
        (
            "just a text",
            ": invalid type: string \"just a text\", expected struct Header",
        ),
        (
            "kind: Pod\nkind: Pod",
            ": duplicate entry with key \"kind\"",
        ),
        (
            "apiVersion: v1\nkind: Secret\nmetadata: {name: x}",
            "kind: \"Secret\" is not a known kind",
        ),
        (
            "apiVersion: v2\nkind: Pod\nmetadata: {name: x}",
            "apiVersion: \"v2\" must be \"v1\"",
        ),
        (
            "apiVersion: v1\nkind: Pod\nspec: {}",
            "metadata.name: is required",
        ),
    ] {
        let problem = problem(text);
        assert!(problem.starts_with(expected), "{text:?} gave {problem:?}");
    }
}

#[test]
fn refuses_impossible_values() {
    let cases = [
        (POD.replace("web", "We_b"), "metadata.name"),
        (POD.replace("shop", "sh.op"), "metadata.namespace"),
        (POD.replace("{name: web", "{labels: {weft.dev/mesh: yes}, name: web"), "metadata.labels.weft.dev/mesh"),
        (POD.replace("{name: web", "{labels: {a: 'x y'}, name: web"), "metadata.labels.a"),
        (format!("{POD}status: {{podIPs: [{{ip: 10.0.0.256}}]}}\n"), "status.podIPs[0].ip"),
        (format!("{POD}status: {{podIP: 0.0.0.0}}\n"), "status.podIP"),
        (POD.replace("nodeName: a", "containers: [{name: c, ports: [{containerPort: 70000}]}]"),
            "spec.containers[0].ports[0].containerPort"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: ten, ports: [{port: 80}]}".into(),
            "spec.clusterIP"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 0}]}".into(), "spec.ports[0].port"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {trafficDistribution: Near}".into(),
            "spec.trafficDistribution"),
        (weft("MeshPolicy", "{mtls: {ports: {'0': STRICT}}}"), "spec.mtls.ports.0"),
        (weft("MeshPolicy", "{mtls: {mode: strict}}"), "spec.mtls.mode"),
        (weft("ExternalWorkload", "{addresses: []}"), "spec.addresses"),
        (weft("ExternalWorkload", "{addresses: [10.0.0.1], weight: 0}"), "spec.weight"),
        (weft("AuthorizationPolicy", "{action: CUSTOM}"), "spec.action"),
        (weft("AuthorizationPolicy", "{rules: [{from: [{}]}]}"), "spec.rules[0].from[0]"),
        (weft("AuthorizationPolicy", "{rules: [{to: [{}]}]}"), "spec.rules[0].to[0]"),
        (weft("AuthorizationPolicy", "{rules: [{to: [{ports: [0]}]}]}"), "spec.rules[0].to[0].ports[0]"),
        (weft("AuthorizationPolicy", "{rules: [{from: [{ipBlocks: [10.0.0.0/33]}]}]}"),
            "spec.rules[0].from[0].ipBlocks[0]"),
        (weft("AuthorizationPolicy", "{rules: [{from: [{principals: ['a*b']}]}]}"),
            "spec.rules[0].from[0].principals[0]"),
        (weft("AuthorizationPolicy", "{rules: [{from: [{serviceAccounts: ['a/b/c']}]}]}"),
            "spec.rules[0].from[0].serviceAccounts[0]"),
    ];
    for (text, field) in cases {
        let problem = problem(&text);
        assert!(
            problem.starts_with(&format!("{field}: ")),
            "{text} gave {problem:?}"
        );
    }
}

#[test]
fn one_text_cannot_define_an_object_twice() {
    let parsed = parse(&format!("{POD}---\n{POD}"));
    assert_eq!(parsed.objects.len(), 1);
    assert!(
        parsed.problems[0]
            .message
            .contains("already defined at line 1"),
        "{:?}",
        parsed.problems
    );
}

#[test]
fn patterns_are_exact_prefix_suffix_or_presence() {
    use StringPattern::{Exact, Prefix, Presence, Suffix};
    for (text, expected) in [
        ("a", Ok(Exact("a".into()))),
        ("a*", Ok(Prefix("a".into()))),
        ("*a", Ok(Suffix("a".into()))),
        ("*", Ok(Presence)),
        ("", Err(StringPatternError::Empty)),
        ("a*b", Err(StringPatternError::Star("a*b".into()))),
        ("*a*", Err(StringPatternError::Star("*a*".into()))),
        ("**", Err(StringPatternError::Star("**".into()))),
    ] {
        assert_eq!(text.parse::<StringPattern>(), expected, "{text:?}");
    }
}

#[test]
fn the_documented_example_is_valid() {
    let documentation = include_str!("../../../docs/manifests.md");
    let examples = documentation.split("```yaml\n").skip(1);
    let text: Vec<_> = examples
        .filter_map(|rest| rest.split("```").next())
        .collect();
    let parsed = parse(&text.join("\n---\n"));
    assert_eq!(parsed.problems, []);
    let kinds: std::collections::BTreeSet<_> = parsed
        .objects
        .iter()
        .map(|located| located.object.kind())
        .collect();
    assert_eq!(kinds.len(), Kind::ALL.len(), "an example of every kind");
    for Located { object, .. } in parsed.objects {
        let json = object.to_json().expect("written");
        let back = parse(&json);
        assert_eq!(back.problems, [], "{json}");
        let back: Vec<_> = back.objects.into_iter().map(|it| it.object).collect();
        assert_eq!(back, [object], "{json}");
    }
}

/// The stand-ins of a text's refused policies, as `kind namespace/name`.
fn stand_ins(text: &str) -> Vec<String> {
    let parsed = parse(text);
    assert!(!parsed.problems.is_empty(), "{text}");
    let policies = parsed.refused_policies.iter();
    policies
        .map(|policy| {
            let object = policy.stand_in("root");
            let key = object.key();
            let name = if policy.is_named() { &key.name } else { "?" };
            format!("{} {}/{name}", key.kind, key.namespace)
        })
        .collect()
}

#[test]
fn of_a_refused_policy_as_much_is_read_as_can_be() {
    let named = ["AuthorizationPolicy shop/it"];
    assert_eq!(
        stand_ins(&weft("AuthorizationPolicy", "{rulez: []}")),
        named
    );
    assert_eq!(stand_ins(&weft("AuthorizationPolicy", "{rules: [")), named);
    assert_eq!(stand_ins(&weft("AuthorizationPolicy", "[]")), named);
    assert_eq!(
        stand_ins(&weft("MeshPolicy", "{mtls: {mode: STRIKT}}")),
        ["MeshPolicy shop/it"]
    );
    let nowhere = |kind: &str| weft(kind, "{rules: [").replace("namespace: shop", "namespace: [");
    assert_eq!(
        stand_ins(&nowhere("AuthorizationPolicy")),
        ["AuthorizationPolicy root/?"]
    );
    // A policy against plaintext: a mesh-wide MeshPolicy would yield to more specific ones.
    assert_eq!(
        stand_ins(&nowhere("MeshPolicy")),
        ["AuthorizationPolicy root/?"]
    );
    assert_eq!(
        stand_ins("{\"kind\": \"AuthorizationPolicy\", "),
        ["AuthorizationPolicy root/?"]
    );
    let none: [&str; 0] = [];
    assert_eq!(
        stand_ins(&weft("AuthorizationPolicy", "{action: AUDIT, rulez: []}")),
        none,
        "it forbids nothing"
    );
    assert_eq!(stand_ins("# AuthorizationPolicy\nkind: Pod\nspec: ["), none);
    assert_eq!(stand_ins(&POD.replace("nodeName", "nodeNam")), none);
    assert_eq!(stand_ins("[ no manifest"), none);
}

#[test]
fn a_stand_in_keeps_only_a_selector_that_is_understood() {
    let selector = |spec: &str| {
        let parsed = parse(&weft("AuthorizationPolicy", spec));
        match parsed.refused_policies[0].stand_in("root") {
            Object::AuthorizationPolicy(policy) => policy.spec.selector.is_some(),
            other => panic!("{other:?}"),
        }
    };
    assert!(selector("{selector: {matchLabels: {app: a}}, rulez: []}"));
    assert!(!selector("{selector: {matchLabelz: {app: a}}, rules: []}"));
    assert!(!selector("{selector: {matchLabels: {app: [a]}}}"));
    assert!(!selector("{selektor: {matchLabels: {app: a}}}"));
}

#[test]
fn a_stand_in_is_at_least_as_strict_as_the_policy() {
    let spec = |spec: &str| match parse(&weft("AuthorizationPolicy", spec)).refused_policies[0]
        .stand_in("root")
    {
        Object::AuthorizationPolicy(policy) => (policy.spec.action, policy.spec.rules.len()),
        other => panic!("{other:?}"),
    };
    assert_eq!(spec("{action: ALLOW, rulez: []}"), (Action::Allow, 0));
    assert_eq!(spec("{action: DENY, rulez: []}"), (Action::Deny, 1));
    assert_eq!(spec("{acton: DENY, rules: []}"), (Action::Deny, 1));
    let mesh = parse(&weft("MeshPolicy", "{mtls: {mod: STRICT}}"));
    let Object::MeshPolicy(mesh) = mesh.refused_policies[0].stand_in("root") else {
        panic!("a MeshPolicy");
    };
    let mtls = mesh.spec.mtls.expect("set");
    assert_eq!(mtls.mode, Some(MtlsMode::Strict));
    assert!(mtls.ports.is_some_and(|ports| ports.is_empty()));
}

#[test]
fn what_no_agent_would_take_is_refused_here() {
    let list = |count: usize, of: &dyn Fn(usize) -> String| {
        let values: Vec<_> = (0..count).map(of).collect();
        values.join(", ")
    };
    let address = |index: usize| format!("10.0.{}.{}", index / 250, index % 250 + 1);
    let external = |addresses: usize, rest: &str| {
        let spec = format!("{{addresses: [{}]{rest}}}", list(addresses, &address));
        weft("ExternalWorkload", &spec)
    };
    assert!(parse(&external(ADDRESSES_MAX, "")).problems.is_empty());
    assert_eq!(
        problem(&external(ADDRESSES_MAX + 1, "")),
        "spec.addresses: has 257 values, at most 256 are allowed"
    );
    let long = "n".repeat(254);
    assert!(problem(&external(1, &format!(", node: {long}"))).starts_with("spec.node: "));
    assert!(problem(&external(1, &format!(", network: {long}"))).starts_with("spec.network: "));
    let pod = POD.replace("nodeName: a", &format!("nodeName: {long}"));
    assert!(problem(&pod).starts_with("spec.nodeName: "));

    // A rule, its clause and its source count as well.
    let policy = |values: usize| {
        let names = list(values, &|index| format!("ns{index}"));
        weft(
            "AuthorizationPolicy",
            &format!("{{rules: [{{from: [{{namespaces: [{names}]}}]}}]}}"),
        )
    };
    assert!(
        parse(&policy(VALUES_PER_POLICY_MAX - 3))
            .problems
            .is_empty()
    );
    assert!(problem(&policy(VALUES_PER_POLICY_MAX - 2)).starts_with("spec.rules: has 10001 "));
}

#[test]
fn mapped_blocks_are_blocks_of_ipv4() {
    let block = |text: &str| parse_block(text).map(|block| block.to_string());
    assert_eq!(block("::ffff:10.1.2.3/104").as_deref(), Ok("10.0.0.0/8"));
    assert_eq!(block("::ffff:10.1.2.3").as_deref(), Ok("10.1.2.3/32"));
    assert_eq!(block("::/0").as_deref(), Ok("::/0"));
    assert_eq!(block("10.1.2.3/8").as_deref(), Ok("10.0.0.0/8"));
    assert_eq!(block("fd00::1/64").as_deref(), Ok("fd00::/64"));
}
