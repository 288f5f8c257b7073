use super::*;

#[test]
fn no_policies_allow() {
    assert!(decide(vec![], &meshed()).is_allowed());
    assert!(decide(vec![], &plain()).is_allowed());
}

#[test]
fn deny_comes_before_allow_and_allow_policies_have_to_match() {
    let hit = || Match {
        destination_ports: vec![8080],
        ..any()
    };
    let miss = || Match {
        destination_ports: vec![1],
        ..any()
    };
    for (why, policies, expected) in [
        ("a matching ALLOW", vec![allow("a", hit())], true),
        ("no ALLOW matches", vec![allow("a", miss())], false),
        (
            "one of several matches",
            vec![allow("a", miss()), allow("b", hit())],
            true,
        ),
        (
            "a DENY beats an ALLOW",
            vec![allow("a", hit()), deny("d", hit())],
            false,
        ),
        (
            "a DENY that does not match allows",
            vec![deny("d", miss())],
            true,
        ),
        (
            "it does not replace a missing ALLOW",
            vec![deny("d", miss()), allow("a", miss())],
            false,
        ),
    ] {
        assert_eq!(decide(policies, &meshed()).is_allowed(), expected, "{why}");
    }
    let decision = decide(vec![deny("d", hit())], &meshed());
    assert_eq!(denied_by(&decision), Some("d"), "the DENY policy is named");
    let decision = decide(vec![allow("a", miss())], &meshed());
    assert!(
        matches!(decision, Decision::Denied { policy: None, .. }),
        "a missing ALLOW has no name"
    );
}

#[test]
fn rules_or_clauses_and_matches_or() {
    let (yes, no) = (
        || Match {
            destination_ports: vec![8080],
            ..any()
        },
        || Match {
            destination_ports: vec![1],
            ..any()
        },
    );
    let clause = |matches: Vec<Match>| Clause { matches };
    for (why, rules, expected) in [
        ("no rules match nothing", vec![], false),
        (
            "a rule without clauses matches everything",
            vec![Rule::default()],
            true,
        ),
        ("a clause without matches is true", vec![rule(vec![])], true),
        (
            "an empty clause does not help a false one",
            vec![Rule {
                clauses: vec![clause(vec![]), clause(vec![no()])],
            }],
            false,
        ),
        (
            "rules are joined by OR",
            vec![rule(vec![no()]), rule(vec![yes()])],
            true,
        ),
        (
            "clauses are joined by AND",
            vec![Rule {
                clauses: vec![clause(vec![yes()]), clause(vec![no()])],
            }],
            false,
        ),
        (
            "all clauses match",
            vec![Rule {
                clauses: vec![clause(vec![yes()]), clause(vec![yes()])],
            }],
            true,
        ),
        (
            "matches are joined by OR",
            vec![rule(vec![no(), yes()])],
            true,
        ),
    ] {
        let allowed = decide(
            vec![with_rules("p", Action::Allow, rules.clone())],
            &meshed(),
        )
        .is_allowed();
        let denied = !decide(vec![with_rules("p", Action::Deny, rules)], &meshed()).is_allowed();
        assert_eq!((allowed, denied), (expected, expected), "{why}");
    }
}

#[test]
fn each_kind_of_condition() {
    let cases: Vec<(&str, Match, bool, bool)> = vec![
        // (what, match, holds for the mesh peer, holds for plaintext)
        (
            "namespace exact",
            Match {
                namespaces: vec![exact("shop")],
                ..any()
            },
            true,
            false,
        ),
        (
            "namespace other",
            Match {
                namespaces: vec![exact("sho")],
                ..any()
            },
            false,
            false,
        ),
        (
            "namespace prefix",
            Match {
                namespaces: vec![prefix("sh")],
                ..any()
            },
            true,
            false,
        ),
        (
            "namespace suffix",
            Match {
                namespaces: vec![suffix("op")],
                ..any()
            },
            true,
            false,
        ),
        (
            "namespace presence",
            Match {
                namespaces: vec![presence()],
                ..any()
            },
            true,
            false,
        ),
        (
            "not namespace",
            Match {
                not_namespaces: vec![exact("shop")],
                ..any()
            },
            false,
            true,
        ),
        (
            "not other namespace",
            Match {
                not_namespaces: vec![exact("x")],
                ..any()
            },
            true,
            true,
        ),
        (
            "principal",
            Match {
                principals: vec![exact("cluster.local/ns/shop/sa/web")],
                ..any()
            },
            true,
            false,
        ),
        (
            "principal with its scheme",
            Match {
                principals: vec![exact(PEER)],
                ..any()
            },
            true,
            false,
        ),
        (
            "scheme as prefix",
            Match {
                principals: vec![prefix("spiffe://cluster.local/")],
                ..any()
            },
            true,
            false,
        ),
        (
            "principal prefix",
            Match {
                principals: vec![prefix("cluster.local/ns/shop/")],
                ..any()
            },
            true,
            false,
        ),
        (
            "principal suffix",
            Match {
                principals: vec![suffix("/sa/web")],
                ..any()
            },
            true,
            false,
        ),
        (
            "principal presence",
            Match {
                principals: vec![presence()],
                ..any()
            },
            true,
            false,
        ),
        (
            "empty prefix is a value",
            Match {
                principals: vec![prefix("")],
                ..any()
            },
            true,
            false,
        ),
        (
            "no principal",
            Match {
                not_principals: vec![presence()],
                ..any()
            },
            false,
            true,
        ),
        (
            "source range",
            Match {
                source_ips: vec![range("10.0.0.0", 24)],
                ..any()
            },
            true,
            true,
        ),
        (
            "source elsewhere",
            Match {
                source_ips: vec![range("10.0.1.0", 24)],
                ..any()
            },
            false,
            false,
        ),
        (
            "not source",
            Match {
                not_source_ips: vec![range("10.0.0.9", 32)],
                ..any()
            },
            false,
            false,
        ),
        (
            "any source",
            Match {
                source_ips: vec![range("0.0.0.0", 0)],
                ..any()
            },
            true,
            true,
        ),
        (
            "mapped range",
            Match {
                source_ips: vec![range("::ffff:10.0.0.0", 120)],
                ..any()
            },
            true,
            true,
        ),
        (
            "IPv6 range",
            Match {
                source_ips: vec![range("::", 0)],
                ..any()
            },
            false,
            false,
        ),
        (
            "destination",
            Match {
                destination_ips: vec![range("10.0.0.1", 32)],
                ..any()
            },
            true,
            true,
        ),
        (
            "not destination",
            Match {
                not_destination_ips: vec![range("10.0.0.0", 8)],
                ..any()
            },
            false,
            false,
        ),
        (
            "port",
            Match {
                destination_ports: vec![1, 8080],
                ..any()
            },
            true,
            true,
        ),
        (
            "not port",
            Match {
                not_destination_ports: vec![8080],
                ..any()
            },
            false,
            false,
        ),
        (
            "account",
            Match {
                service_accounts: vec![account("shop", "web")],
                ..any()
            },
            true,
            false,
        ),
        (
            "account elsewhere",
            Match {
                service_accounts: vec![account("x", "web")],
                ..any()
            },
            false,
            false,
        ),
        (
            "not account",
            Match {
                not_service_accounts: vec![account("shop", "web")],
                ..any()
            },
            false,
            true,
        ),
    ];
    for (what, m, for_peer, for_plain) in cases {
        assert_eq!(matches(&m, &meshed()), for_peer, "{what}, mesh peer");
        assert_eq!(matches(&m, &plain()), for_plain, "{what}, plaintext");
    }
}

#[test]
fn kinds_are_joined_by_and_values_by_or_and_exclusions_win() {
    let ports = vec![1, 8080];
    for (m, expected) in [
        (
            Match {
                namespaces: vec![exact("shop")],
                destination_ports: ports.clone(),
                ..any()
            },
            true,
        ),
        (
            Match {
                namespaces: vec![exact("x")],
                destination_ports: ports.clone(),
                ..any()
            },
            false,
        ),
        (
            Match {
                namespaces: vec![exact("x"), exact("shop")],
                ..any()
            },
            true,
        ),
        (
            Match {
                destination_ports: ports.clone(),
                not_destination_ports: vec![8080],
                ..any()
            },
            false,
        ),
        (
            Match {
                namespaces: vec![prefix("s")],
                not_namespaces: vec![exact("x")],
                ..any()
            },
            true,
        ),
        (
            Match {
                not_namespaces: vec![exact("x"), exact("shop")],
                ..any()
            },
            false,
        ),
    ] {
        assert_eq!(matches(&m, &meshed()), expected, "{m:?}");
    }
}

/// Every pair of conditions of different kinds must behave as the AND of the two alone, for every peer.
#[test]
fn any_two_kinds_together_are_the_and_of_each_alone() {
    let singles = [
        Match {
            namespaces: vec![exact("shop")],
            ..any()
        },
        Match {
            not_namespaces: vec![exact("shop")],
            ..any()
        },
        Match {
            principals: vec![presence()],
            ..any()
        },
        Match {
            not_principals: vec![presence()],
            ..any()
        },
        Match {
            source_ips: vec![range("10.0.0.0", 24)],
            ..any()
        },
        Match {
            not_source_ips: vec![range("10.0.0.0", 24)],
            ..any()
        },
        Match {
            destination_ips: vec![range("10.0.0.2", 32)],
            ..any()
        },
        Match {
            not_destination_ips: vec![range("10.0.0.2", 32)],
            ..any()
        },
        Match {
            destination_ports: vec![8080],
            ..any()
        },
        Match {
            not_destination_ports: vec![8080],
            ..any()
        },
        Match {
            service_accounts: vec![account("shop", "web")],
            ..any()
        },
        Match {
            not_service_accounts: vec![account("shop", "web")],
            ..any()
        },
    ];
    for (i, a) in singles.iter().enumerate() {
        for b in singles.iter().skip(i + 1) {
            let both = join(a.clone(), b.clone());
            for connection in [meshed(), plain()] {
                let expected = matches(a, &connection) && matches(b, &connection);
                assert_eq!(matches(&both, &connection), expected, "{a:?} and {b:?}");
            }
        }
    }
}

fn join(mut a: Match, b: Match) -> Match {
    a.namespaces.extend(b.namespaces);
    a.not_namespaces.extend(b.not_namespaces);
    a.principals.extend(b.principals);
    a.not_principals.extend(b.not_principals);
    a.source_ips.extend(b.source_ips);
    a.not_source_ips.extend(b.not_source_ips);
    a.destination_ips.extend(b.destination_ips);
    a.not_destination_ips.extend(b.not_destination_ips);
    a.destination_ports.extend(b.destination_ports);
    a.not_destination_ports.extend(b.not_destination_ports);
    a.service_accounts.extend(b.service_accounts);
    a.not_service_accounts.extend(b.not_service_accounts);
    a
}

#[test]
fn mapped_addresses_of_a_connection_match_ipv4_rules() {
    let mapped = Connection {
        source: "::ffff:10.0.0.9".parse().expect("an address"),
        destination: socket("[::ffff:10.0.0.1]:8080"),
        ..meshed()
    };
    let m = Match {
        source_ips: vec![range("10.0.0.9", 32)],
        destination_ips: vec![range("10.0.0.1", 32)],
        ..any()
    };
    assert!(matches(&m, &mapped));
}

#[test]
fn the_trust_domain_is_part_of_principals_and_not_of_accounts() {
    let foreign = Connection {
        peer: Some(
            "spiffe://other/ns/shop/sa/web"
                .parse()
                .expect("an identity"),
        ),
        ..meshed()
    };
    assert!(matches(
        &Match {
            service_accounts: vec![account("shop", "web")],
            ..any()
        },
        &foreign
    ));
    assert!(!matches(
        &Match {
            principals: vec![exact("cluster.local/ns/shop/sa/web")],
            ..any()
        },
        &foreign
    ));
}
