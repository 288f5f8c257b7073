//! What the API server has said so far, and what of it the index has to know. No I/O, no clock.
//!
//! For every kind the events come in order: a list (begin, items, end), then single changes, then perhaps another list.
//! A list that is cut off counts for what it showed, never for what it did not show: only the end of a list says that
//! something is gone. Until every kind was listed once, nothing that follows from the index may be told to an agent.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use mesh_api::manifest::{FieldProblem, Kind, Object, ObjectKey};

use super::{
    agents::AgentPods,
    objects::{Content, Item, Own},
};
use crate::index::Change;

/// Namespace and name.
type Name = (String, String);

/// What happened to objects of one kind.
#[derive(Debug)]
pub(super) enum Event {
    /// A list begins, from its first page.
    Begin,
    /// An object of the list.
    Listed(Box<Item>),
    /// The list is whole.
    End,
    /// An object is new or different.
    Upsert(Box<Item>),
    /// An object is gone.
    Delete(ObjectKey),
}

/// What the user is to be told of an object of Weft's own kinds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Report {
    /// Identifier, generation and conditions, as last seen.
    pub own: Own,
    /// Why it was refused; empty when it is in force.
    pub problems: Vec<FieldProblem>,
    /// What is in force instead of a refused object.
    pub instead: Instead,
    /// Generation of the index that has it; `None` while it is on its way there.
    pub applied_in: Option<u64>,
}

/// What is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instead {
    /// The object itself.
    Nothing,
    /// An earlier version of it.
    LastGood,
    /// A policy at least as strict as whatever it may have been meant to say.
    StandIn,
    /// Nothing at all.
    Absent,
}

/// One kind.
#[derive(Debug, Default)]
struct KindState {
    /// Fingerprint of every object that the API server has.
    known: HashMap<Name, u64>,
    /// What the present list has shown; `None` between lists.
    listed: Option<HashSet<Name>>,
    /// A list was whole.
    complete: bool,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Inputs {
    root_namespace: String,
    kinds: BTreeMap<Kind, KindState>,
    agents: AgentPods,
    /// The good version in force of every object of Weft's own kinds.
    good: HashMap<ObjectKey, Arc<Object>>,
    reports: BTreeMap<ObjectKey, Report>,
    /// Problems of other objects.
    problems: BTreeMap<ObjectKey, Vec<FieldProblem>>,
    changes: Vec<Change>,
}

impl Inputs {
    /// Nothing is known of `kinds`.
    pub fn new(kinds: &[Kind], root_namespace: &str, agents: AgentPods) -> Self {
        let kinds = kinds.iter().map(|kind| (*kind, KindState::default()));
        Self {
            root_namespace: root_namespace.to_owned(),
            kinds: kinds.collect(),
            agents,
            good: HashMap::new(),
            reports: BTreeMap::new(),
            problems: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    /// Takes what happened to objects of `kind`.
    pub fn on(&mut self, kind: Kind, event: Event) {
        match event {
            Event::Begin => {
                let state = self.kinds.entry(kind).or_default();
                state.listed = Some(HashSet::new());
            }
            Event::Listed(item) => {
                let state = self.kinds.entry(kind).or_default();
                if let Some(listed) = &mut state.listed {
                    listed.insert(name_of(&item.key));
                }
                self.upsert(kind, *item);
            }
            Event::End => self.end(kind),
            Event::Upsert(item) => self.upsert(kind, *item),
            Event::Delete(key) => self.delete(&key),
        }
    }

    fn end(&mut self, kind: Kind) {
        let state = self.kinds.entry(kind).or_default();
        let Some(listed) = state.listed.take() else {
            return;
        };
        state.complete = true;
        let gone: Vec<_> = state
            .known
            .keys()
            .filter(|name| !listed.contains(*name))
            .cloned()
            .collect();
        for (namespace, name) in gone {
            self.delete(&ObjectKey {
                kind,
                namespace,
                name,
            });
        }
    }

    fn upsert(&mut self, kind: Kind, item: Item) {
        let state = self.kinds.entry(kind).or_default();
        let old = state.known.insert(name_of(&item.key), item.fingerprint);
        let unchanged = old == Some(item.fingerprint);
        if let Some(own) = item.own {
            return self.upsert_own(item.key, own, item.content, unchanged);
        }
        if unchanged {
            return;
        }
        let problems = match item.content {
            Content::Good(object, problems) => {
                if let Object::Pod(pod) = &*object {
                    self.agents.set(&item.key, Some(pod));
                }
                self.changes.push(Change::Upsert(Arc::new(*object)));
                problems
            }
            // What was known of it stays.
            Content::Refused { problems, .. } => problems,
        };
        if problems.is_empty() {
            self.problems.remove(&item.key);
        } else {
            self.problems.insert(item.key, problems);
        }
    }

    fn upsert_own(&mut self, key: ObjectKey, own: Own, content: Content, unchanged: bool) {
        if unchanged && let Some(report) = self.reports.get_mut(&key) {
            report.own = own;
            return;
        }
        let (problems, instead) = match content {
            Content::Good(object, _) => {
                let object = Arc::new(*object);
                if self.good.get(&key) != Some(&object) {
                    self.changes.push(Change::Upsert(object.clone()));
                    self.good.insert(key.clone(), object);
                }
                (Vec::new(), Instead::Nothing)
            }
            Content::Refused { problems, .. } if self.good.contains_key(&key) => {
                (problems, Instead::LastGood)
            }
            Content::Refused { problems, policy } => match policy {
                Some(policy) => {
                    let object = policy.stand_in(&self.root_namespace);
                    self.changes.push(Change::Upsert(Arc::new(object)));
                    (problems, Instead::StandIn)
                }
                None => {
                    let stood_in = |report: &Report| report.instead == Instead::StandIn;
                    if self.reports.get(&key).is_some_and(stood_in) {
                        self.changes.push(Change::Remove(key.clone()));
                    }
                    (problems, Instead::Absent)
                }
            },
        };
        let report = Report {
            own,
            problems,
            instead,
            applied_in: None,
        };
        self.reports.insert(key, report);
    }

    fn delete(&mut self, key: &ObjectKey) {
        let Some(state) = self.kinds.get_mut(&key.kind) else {
            return;
        };
        if state.known.remove(&name_of(key)).is_none() {
            return;
        }
        if key.kind == Kind::Pod {
            self.agents.set(key, None);
        }
        self.good.remove(key);
        self.reports.remove(key);
        self.problems.remove(key);
        self.changes.push(Change::Remove(key.clone()));
    }

    /// The kinds of which no list was whole yet.
    pub fn missing(&self) -> Vec<Kind> {
        let incomplete = self.kinds.iter().filter(|(_, state)| !state.complete);
        incomplete.map(|(kind, _)| *kind).collect()
    }

    /// What the index does not know yet.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// All that was taken so far is in the index, whose generation is now `generation`.
    pub fn applied(&mut self, generation: u64) {
        for report in self.reports.values_mut() {
            report.applied_in.get_or_insert(generation);
        }
    }

    /// What is to be said of every object of Weft's own kinds.
    pub fn reports(&self) -> &BTreeMap<ObjectKey, Report> {
        &self.reports
    }

    /// Everything that is wrong now, by object.
    pub fn problems(&self) -> BTreeMap<&ObjectKey, Vec<String>> {
        let own = self
            .reports
            .iter()
            .filter(|(_, report)| !report.problems.is_empty());
        let own = own.map(|(key, report)| (key, &report.problems));
        let lines = |problems: &Vec<FieldProblem>| problems.iter().map(line).collect();
        self.problems
            .iter()
            .chain(own)
            .map(|(key, problems)| (key, lines(problems)))
            .collect()
    }
}

/// A problem on one line.
pub(super) fn line(problem: &FieldProblem) -> String {
    if problem.field.is_empty() {
        problem.message.clone()
    } else {
        format!("{}: {}", problem.field, problem.message)
    }
}

fn name_of(key: &ObjectKey) -> Name {
    (key.namespace.clone(), key.name.clone())
}

#[cfg(test)]
#[path = "inputs_tests.rs"]
mod tests;
