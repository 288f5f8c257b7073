use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::*;
use crate::kube::{
    agents::ServiceAccount,
    objects::{KubeAuthorizationPolicy, KubeNamespace, KubePod, Watched},
};

const KINDS: [Kind; 3] = [Kind::Namespace, Kind::Pod, Kind::AuthorizationPolicy];

fn agent_account() -> ServiceAccount {
    ServiceAccount {
        namespace: "weft-system".into(),
        name: "weft-agent".into(),
    }
}

fn inputs() -> Inputs {
    let agents = AgentPods::new([agent_account()].into());
    Inputs::new(&KINDS, "weft-system", agents)
}

fn item<T: Watched>(value: Value) -> Box<Item> {
    let object: T = serde_json::from_value(value).expect("readable");
    Box::new(object.into_item())
}

fn pod(name: &str, ip: &str) -> Box<Item> {
    item::<KubePod>(json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("{name}-{ip}")},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIP": ip},
    }))
}

fn policy(name: &str, action: &str, principal: &str) -> Box<Item> {
    item::<KubeAuthorizationPolicy>(json!({
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1},
        "spec": {"action": action, "rules": [{"from": [{"principals": [principal]}]}]},
    }))
}

fn namespace(name: &str) -> Box<Item> {
    item::<KubeNamespace>(json!({"metadata": {"name": name}}))
}

impl Inputs {
    fn list(&mut self, kind: Kind, items: impl IntoIterator<Item = Box<Item>>) {
        self.on(kind, Event::Begin);
        for item in items {
            self.on(kind, Event::Listed(item));
        }
        self.on(kind, Event::End);
    }

    /// `+name` or `-name` of every change that the index does not know yet.
    fn told(&mut self) -> Vec<String> {
        let changes = self.take_changes();
        let told = changes.iter().map(|change| match change {
            Change::Upsert(object) => format!("+{}", object.key().name),
            Change::Remove(key) => format!("-{}", key.name),
        });
        told.collect()
    }
}

#[test]
fn nothing_is_complete_before_every_kind_was_listed_as_a_whole() {
    let mut inputs = inputs();
    inputs.list(Kind::Namespace, [namespace("shop")]);
    inputs.list(Kind::AuthorizationPolicy, []);
    inputs.on(Kind::Pod, Event::Begin);
    inputs.on(Kind::Pod, Event::Listed(pod("a", "10.0.0.1")));
    assert_eq!(inputs.missing(), [Kind::Pod], "half a list");
    inputs.on(Kind::Pod, Event::Begin);
    assert_eq!(inputs.missing(), [Kind::Pod], "the list began anew");
    inputs.on(Kind::Pod, Event::End);
    assert!(inputs.missing().is_empty());
}

#[test]
fn only_the_end_of_a_list_says_that_something_is_gone() {
    let mut inputs = inputs();
    inputs.list(Kind::Pod, [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    inputs.told();

    inputs.on(Kind::Pod, Event::Begin);
    inputs.on(Kind::Pod, Event::Listed(pod("a", "10.0.0.1")));
    assert!(inputs.told().is_empty(), "b may be on the next page");
    inputs.on(Kind::Pod, Event::Begin);
    inputs.on(Kind::Pod, Event::Listed(pod("c", "10.0.0.3")));
    assert_eq!(inputs.told(), ["+c"], "what is shown is true at once");
    inputs.on(Kind::Pod, Event::Listed(pod("a", "10.0.0.1")));
    inputs.on(Kind::Pod, Event::End);
    assert_eq!(inputs.told(), ["-b"]);
}

#[test]
fn what_did_not_change_is_no_change() {
    let mut inputs = inputs();
    inputs.list(Kind::Pod, [pod("a", "10.0.0.1")]);
    inputs.told();
    inputs.on(Kind::Pod, Event::Upsert(pod("a", "10.0.0.1")));
    assert!(inputs.told().is_empty());
    inputs.on(Kind::Pod, Event::Upsert(pod("a", "10.0.0.9")));
    assert_eq!(inputs.told(), ["+a"]);
    inputs.on(Kind::Pod, Event::Delete(pod("a", "10.0.0.9").key));
    inputs.on(Kind::Pod, Event::Delete(pod("a", "10.0.0.9").key));
    assert_eq!(inputs.told(), ["-a"], "gone once");
}

#[test]
fn a_policy_that_becomes_bad_keeps_its_last_good_version() {
    let mut inputs = inputs();
    inputs.list(Kind::AuthorizationPolicy, [policy("p", "DENY", "a")]);
    assert_eq!(inputs.told(), ["+p"]);
    let key = policy("p", "DENY", "a").key;
    inputs.on(
        Kind::AuthorizationPolicy,
        Event::Upsert(policy("p", "DENY", "a*b")),
    );
    assert!(inputs.told().is_empty());
    assert_eq!(inputs.reports()[&key].instead, Instead::LastGood);
    assert_eq!(inputs.problems().len(), 1);
    inputs.on(
        Kind::AuthorizationPolicy,
        Event::Upsert(policy("p", "DENY", "b")),
    );
    assert_eq!(inputs.told(), ["+p"]);
    assert!(inputs.problems().is_empty());
}

#[test]
fn a_policy_that_was_never_good_is_stood_in_for() {
    let mut inputs = inputs();
    inputs.list(Kind::AuthorizationPolicy, [policy("p", "DENY", "a*b")]);
    let changes = inputs.take_changes();
    let [Change::Upsert(object)] = &changes[..] else {
        panic!("no stand-in: {changes:?}");
    };
    let Object::AuthorizationPolicy(stand_in) = &**object else {
        panic!("another kind");
    };
    assert_eq!(
        stand_in.spec.rules,
        [Default::default()],
        "it refuses everything"
    );
    let key = object.key();
    assert_eq!(inputs.reports()[&key].instead, Instead::StandIn);

    // An audit policy forbids nothing and needs none.
    inputs.on(
        Kind::AuthorizationPolicy,
        Event::Upsert(policy("p", "AUDIT", "a*b")),
    );
    assert_eq!(inputs.told(), ["-p"]);
    assert_eq!(inputs.reports()[&key].instead, Instead::Absent);
    inputs.on(Kind::AuthorizationPolicy, Event::Delete(key));
    assert!(inputs.reports().is_empty());
}

#[test]
fn a_status_that_was_written_is_seen_without_a_change() {
    let mut inputs = inputs();
    inputs.list(Kind::AuthorizationPolicy, [policy("p", "DENY", "a")]);
    inputs.told();
    inputs.applied(7);
    let mut written = policy("p", "DENY", "a");
    let own = written.own.as_mut().expect("one of ours");
    own.conditions.push(Default::default());
    let key = written.key.clone();
    inputs.on(Kind::AuthorizationPolicy, Event::Upsert(written));
    assert!(inputs.told().is_empty());
    let report = &inputs.reports()[&key];
    assert_eq!(
        (report.own.conditions.len(), report.applied_in),
        (1, Some(7))
    );
}

#[test]
fn the_pods_of_agents_are_known_as_long_as_they_exist() {
    let mut inputs = inputs();
    let agent = |account: &str, node: &str| {
        item::<KubePod>(json!({
            "metadata": {"name": "agent-x", "namespace": "weft-system", "uid": "u1"},
            "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
        }))
    };
    let get = |inputs: &Inputs| inputs.agents.get("weft-system", "agent-x");
    inputs.on(Kind::Pod, Event::Upsert(agent("default", "n1")));
    assert_eq!(get(&inputs), None, "another account");
    inputs.on(Kind::Pod, Event::Upsert(agent("weft-agent", "")));
    assert_eq!(get(&inputs), None, "not on a node yet");
    inputs.on(Kind::Pod, Event::Upsert(agent("weft-agent", "n1")));
    let pod = get(&inputs).expect("known");
    assert_eq!((pod.uid.as_str(), &*pod.node.0), ("u1", "n1"));
    inputs.list(Kind::Pod, []);
    assert_eq!(get(&inputs), None, "gone");
}

/// Whatever is cut off and in which order things happen, after a whole list the index has what the API server has.
#[test]
fn after_a_whole_list_the_index_has_what_the_server_has() {
    for seed in 0..200 {
        let mut dice = StdRng::seed_from_u64(seed);
        let mut inputs = inputs();
        let mut server: BTreeMap<String, u8> = BTreeMap::new();
        let mut index: BTreeSet<String> = BTreeSet::new();
        let ip = |version: u8| format!("10.0.0.{version}");
        for _ in 0..60 {
            let name = format!("p{}", dice.random_range(0..8));
            match dice.random_range(0..4) {
                0 if !server.contains_key(&name) => {
                    server.insert(name.clone(), 1);
                    if dice.random() {
                        inputs.on(Kind::Pod, Event::Upsert(pod(&name, &ip(1))));
                    }
                }
                1 if server.contains_key(&name) => {
                    server.remove(&name);
                    if dice.random() {
                        inputs.on(Kind::Pod, Event::Delete(pod(&name, &ip(1)).key));
                    }
                }
                2 => {
                    inputs.on(Kind::Pod, Event::Begin);
                    for name in server.keys().take(dice.random_range(0..4)) {
                        inputs.on(Kind::Pod, Event::Listed(pod(name, &ip(1))));
                    }
                }
                _ => {
                    let all = server
                        .iter()
                        .map(|(name, version)| pod(name, &ip(*version)));
                    let all: Vec<_> = all.collect();
                    inputs.list(Kind::Pod, all);
                    for change in inputs.take_changes() {
                        match change {
                            Change::Upsert(object) => index.insert(object.key().name),
                            Change::Remove(key) => index.remove(&key.name),
                        };
                    }
                    let expected: BTreeSet<_> = server.keys().cloned().collect();
                    assert_eq!(index, expected, "seed {seed}");
                }
            }
        }
    }
}
