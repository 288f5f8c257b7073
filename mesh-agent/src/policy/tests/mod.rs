//! The engine, line by line of its semantics, and what becomes of policies that it cannot enforce.

mod faults;
mod semantics;

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
    state.apply(Update::policies_known());
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
