use super::*;

#[test]
fn an_empty_match_in_an_allow_policy_matches_nothing() {
    assert!(!decide(vec![allow("p", any())], &meshed()).is_allowed());
}

#[test]
fn an_empty_match_in_a_deny_policy_is_refused_and_denies_meanwhile() {
    let broken = deny("p", any());
    let refused = Update::policy(&broken).expect_err("must be refused");
    assert_eq!(
        refused.rejected.fault,
        Fault::Policy(PolicyError::EmptyMatch { rule: 0 })
    );
    let message = refused.rejected.to_string();
    assert!(
        message.starts_with("shop/p: rule 0") && message.contains("without any L4 condition"),
        "{message}"
    );
    assert_eq!(denied_by(&decide(vec![broken], &meshed())), Some("p"));
    let elsewhere = Authorization {
        namespace: "other".to_owned(),
        ..deny("p", any())
    };
    assert!(
        decide(vec![elsewhere], &meshed()).is_allowed(),
        "its scope is another namespace"
    );
    let selector = Authorization {
        scope: Scope::WorkloadSelector.into(),
        ..deny("p", any())
    };
    assert!(
        decide(vec![selector.clone()], &meshed()).is_allowed(),
        "it selects other workloads"
    );
    assert!(!decide_listed(vec![selector], &["shop/p"], &meshed()).is_allowed());
    let audit = Authorization {
        dry_run: true,
        ..deny("p", any())
    };
    assert!(
        decide(vec![audit], &meshed()).is_allowed(),
        "what was only audited is not enforced by a fault"
    );
}

#[test]
fn a_refused_allow_policy_allows_nothing_but_leaves_others_alone() {
    let broken = || {
        allow(
            "p",
            Match {
                destination_ports: vec![70_000],
                ..any()
            },
        )
    };
    assert!(!decide(vec![broken()], &meshed()).is_allowed());
    let good = allow(
        "q",
        Match {
            destination_ports: vec![8080],
            ..any()
        },
    );
    assert!(decide(vec![broken(), good], &meshed()).is_allowed());
}

#[test]
fn an_undecodable_policy_denies_its_namespace_and_where_it_is_listed() {
    for (name, listed, expected) in [
        ("shop/p", vec![], false),
        ("other/p", vec![], true),
        ("other/p", vec!["other/p".to_owned()], false),
    ] {
        let mut state = MeshState::new("");
        state.apply(Update::policies_known());
        let refused = Update::authorization(name, &[0xff]).expect_err("noise");
        state.apply(refused.stand_in.expect("a usable name"));
        put(
            &mut state,
            mesh_api::proto::workload::Workload {
                authorization_policies: listed,
                ..pod("a", "10.0.0.1")
            },
        );
        let workload = state.local_workload("n1", "shop", "a").expect("put");
        assert_eq!(
            authorize(&state, &workload, &meshed()).is_allowed(),
            expected,
            "{name}"
        );
    }
}

#[test]
fn malformed_policies_are_refused_by_field() {
    let bad = |change: fn(&mut Authorization)| {
        let mut policy = deny(
            "p",
            Match {
                destination_ports: vec![1],
                ..any()
            },
        );
        change(&mut policy);
        Update::policy(&policy)
            .expect_err("must be refused")
            .rejected
            .to_string()
    };
    fn first(policy: &mut Authorization) -> &mut Match {
        &mut policy.rules[0].clauses[0].matches[0]
    }
    type Case = (&'static str, fn(&mut Authorization));
    let cases: [Case; 9] = [
        ("scope has the unknown value 3", |p| p.scope = 3),
        ("action has the unknown value 2", |p| p.action = 2),
        ("destination_ports holds the unusable port 0", |p| {
            first(p).destination_ports = vec![0]
        }),
        ("destination_ports holds the unusable port 65536", |p| {
            first(p).not_destination_ports = vec![65_536]
        }),
        ("source_ips holds an address of 2 bytes", |p| {
            first(p).source_ips = vec![Address {
                address: vec![1, 2],
                length: 8,
            }];
        }),
        ("destination_ips holds a prefix of 33 bits", |p| {
            first(p).destination_ips = vec![range("10.0.0.0", 33)]
        }),
        ("principals holds a string match of an unknown kind", |p| {
            first(p).not_principals = vec![StringMatch { match_type: None }];
        }),
        ("incomplete service account \"\"/\"web\"", |p| {
            first(p).service_accounts = vec![account("", "web")]
        }),
        ("more than 10000 values", |p| {
            first(p).destination_ports = vec![1; VALUES_PER_POLICY_MAX]
        }),
    ];
    for (expected, change) in cases {
        let message = bad(change);
        assert!(
            message.contains(expected),
            "expected {expected:?} in {message:?}"
        );
    }
    // A rule, a clause and a match count too: this is the largest that passes.
    let largest = Match {
        destination_ports: vec![1; VALUES_PER_POLICY_MAX - 3],
        ..any()
    };
    assert!(Update::policy(&deny("p", largest)).is_ok());
}

#[test]
fn a_listed_but_unknown_policy_denies() {
    assert!(!decide_listed(vec![], &["shop/late"], &meshed()).is_allowed());
    let everyone = with_rules("a", Action::Allow, vec![Rule::default()]);
    assert!(
        !decide_listed(vec![everyone], &["shop/late"], &meshed()).is_allowed(),
        "whatever others allow"
    );
}

#[test]
fn strict_mutual_tls_as_a_policy_refuses_plaintext_only() {
    let strict = deny(
        "strict",
        Match {
            not_principals: vec![presence()],
            ..any()
        },
    );
    assert!(decide(vec![strict.clone()], &meshed()).is_allowed());
    assert_eq!(denied_by(&decide(vec![strict], &plain())), Some("strict"));
}

#[test]
fn audit_policies_are_reported_and_change_nothing() {
    let hit = || Match {
        destination_ports: vec![8080],
        ..any()
    };
    let miss = || Match {
        destination_ports: vec![1],
        ..any()
    };
    let audit = |policy: Authorization| Authorization {
        dry_run: true,
        ..policy
    };
    let (none, ad, aa): (&[&str], &[&str], &[&str]) = (&[], &["ad"], &["aa"]);
    for (why, policies, allowed, expected) in [
        (
            "a DENY that would deny",
            vec![audit(deny("ad", hit()))],
            true,
            ad,
        ),
        (
            "a DENY that would not",
            vec![audit(deny("ad", miss()))],
            true,
            none,
        ),
        (
            "an ALLOW that would deny the rest",
            vec![audit(allow("aa", miss()))],
            true,
            aa,
        ),
        (
            "an ALLOW that would allow",
            vec![audit(allow("aa", hit()))],
            true,
            none,
        ),
        (
            "an enforced ALLOW allows anyway",
            vec![audit(allow("aa", miss())), allow("a", hit())],
            true,
            none,
        ),
        (
            "an audited ALLOW does not save",
            vec![audit(allow("aa", hit())), allow("a", miss())],
            false,
            none,
        ),
        (
            "denied, and would be twice",
            vec![audit(deny("ad", hit())), deny("d", hit())],
            false,
            ad,
        ),
    ] {
        let (found, audited) = match decide(policies, &meshed()) {
            Decision::Allowed(proof) => (true, proof.audited().to_vec()),
            Decision::Denied { audited, .. } => (false, audited),
        };
        let audited: Vec<&str> = audited.iter().map(|key| &*key.name).collect();
        assert_eq!((found, audited.as_slice()), (allowed, expected), "{why}");
    }
}
