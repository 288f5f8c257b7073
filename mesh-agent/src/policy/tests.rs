use mesh_api::proto::security::{
    Action, Address, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};

use super::*;
use crate::discovery::{
    Update,
    convert::Fault,
    tests::{bytes, pod, policy, put, socket},
};

const PEER: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn exact(text: &str) -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Exact(text.to_owned())),
    }
}

fn prefix(text: &str) -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Prefix(text.to_owned())),
    }
}

fn suffix(text: &str) -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Suffix(text.to_owned())),
    }
}

fn presence() -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Presence(())),
    }
}

fn range(address: &str, length: u32) -> Address {
    Address {
        address: bytes(address),
        length,
    }
}

fn account(namespace: &str, name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: namespace.to_owned(),
        service_account: name.to_owned(),
    }
}

fn any() -> Match {
    Match::default()
}

/// A connection from `PEER` at 10.0.0.9 to 10.0.0.1:8080.
fn meshed() -> Connection {
    let peer = Some(PEER.parse().expect("an identity"));
    Connection {
        peer,
        source: "10.0.0.9".parse().expect("an address"),
        destination: socket("10.0.0.1:8080"),
    }
}

fn plain() -> Connection {
    Connection {
        peer: None,
        ..meshed()
    }
}

fn with_rules(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    Authorization {
        rules,
        ..policy(name, action, Scope::Namespace)
    }
}

/// One rule of one clause of these matches.
fn rule(matches: Vec<Match>) -> Rule {
    Rule {
        clauses: vec![Clause { matches }],
    }
}

fn deny(name: &str, m: Match) -> Authorization {
    with_rules(name, Action::Deny, vec![rule(vec![m])])
}

fn allow(name: &str, m: Match) -> Authorization {
    with_rules(name, Action::Allow, vec![rule(vec![m])])
}

/// Decides on a connection to pod `shop/a`, which lists the given policies.
fn decide_listed(
    policies: Vec<Authorization>,
    listed: &[&str],
    connection: &Connection,
) -> Decision {
    let mut state = MeshState::new("");
    for policy in policies {
        put(&mut state, policy);
    }
    let mut a = pod("a", "10.0.0.1");
    a.authorization_policies = listed.iter().map(|key| (*key).to_owned()).collect();
    put(&mut state, a);
    let workload = state.local_workload("n1", "shop", "a").expect("put");
    authorize(&state, &workload, connection)
}

fn decide(policies: Vec<Authorization>, connection: &Connection) -> Decision {
    decide_listed(policies, &[], connection)
}

fn denied_by(decision: &Decision) -> Option<&str> {
    match decision {
        Decision::Denied {
            policy: Some(key), ..
        } => Some(&*key.name),
        _ => None,
    }
}

/// Whether the match holds, asked both of an ALLOW and of a DENY policy.
fn matches(m: &Match, connection: &Connection) -> bool {
    let allowed = decide(vec![allow("p", m.clone())], connection).is_allowed();
    let denied = !decide(vec![deny("p", m.clone())], connection).is_allowed();
    assert_eq!(allowed, denied, "ALLOW and DENY must read {m:?} alike");
    allowed
}

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
