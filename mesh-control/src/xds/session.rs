//! What one discovery stream has asked for, has been sent and has acknowledged. No sockets, no clock.
//!
//! At most one response per type is unacknowledged. While a client is slow, changes gather as a set of names, so that it
//! then gets the newest state at once, however many changes lie between.
//!
//! Responses are ordered so that a workload never lists a policy that the agent does not know (it would have to
//! deny): new policies first, then addresses, then the removal of policies.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mesh_api::proto::discovery::{self as wire, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::index::{Resource, ResourceType, Store};

/// Most names that one stream may demand. A node talks to far fewer; beyond, a wildcard is cheaper for both sides.
pub const DEMANDED_MAX: usize = 50_000;
/// Names of a refused response that are logged.
const NACK_NAMES_MAX: usize = 10;
/// Bytes of a client's reason that are logged.
const NACK_REASON_MAX_BYTES: usize = 1024;

const WILDCARD: &str = "*";
/// The version of what a client holds without being able to say which: no resource has it.
const UNKNOWN_VERSION: &str = "?";

/// A client that breaks the protocol or asks for too much; its stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More than [`DEMANDED_MAX`] names.
    #[error("more than {DEMANDED_MAX} names are demanded on one stream; use a wildcard")]
    TooManyNames,
}

/// What a request was, beyond what it asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Nothing of note.
    Accepted,
    /// The client refused the last response.
    Nack {
        /// The type of the response.
        kind: ResourceType,
        /// The first names in it.
        names: Vec<Arc<str>>,
        /// What the client said, shortened.
        reason: String,
    },
    /// A type that this control plane does not have: to be answered with nothing.
    UnknownType(Box<DeltaDiscoveryResponse>),
}

/// One stream.
#[derive(Debug, Default)]
pub struct Session {
    subscriptions: [Option<Subscription>; 2],
    last_nonce: u64,
}

#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    demanded: BTreeSet<Arc<str>>,
    /// Version that the client has of a name; empty: it was told that there is none.
    sent: HashMap<Arc<str>, Arc<str>>,
    dirty: Dirty,
    /// Generation of the store up to which `dirty` is complete.
    seen: u64,
    /// Generation of the store that the client has applied.
    applied: u64,
    /// The client refused the last response that it answered.
    refused: bool,
    in_flight: Option<InFlight>,
    /// A request is owed a response, even an empty one.
    owed: bool,
}

/// Names whose state at the client may differ from the store's.
#[derive(Debug)]
enum Dirty {
    All,
    Names(BTreeSet<Arc<str>>),
}

impl Default for Dirty {
    fn default() -> Self {
        Self::Names(BTreeSet::new())
    }
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<Arc<str>>,
    /// Generation that the client has when it acknowledges; `None` if more is to follow for it.
    completes: Option<u64>,
}

/// Which half of the difference a response carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Both,
    Upserts,
    Removals,
}

#[derive(Debug, Default)]
struct Delta {
    /// By the name to send, which may be an alias of the resource's own.
    upserts: BTreeMap<Arc<str>, Arc<Resource>>,
    removals: BTreeSet<Arc<str>>,
}

impl Session {
    /// Takes a request.
    ///
    /// # Errors
    /// When the client must be cut off.
    pub fn on_request(
        &mut self,
        request: DeltaDiscoveryRequest,
        store: &Store,
    ) -> Result<Event, Violation> {
        let Some(kind) = ResourceType::from_url(&request.type_url) else {
            return Ok(self.unknown_type(request));
        };
        let slot = &mut self.subscriptions[kind as usize];
        let Some(subscription) = slot else {
            let subscription = slot.insert(Subscription::begin(&request));
            subscription.check_limit()?;
            return Ok(Event::Accepted);
        };
        let event = subscription.acknowledge(kind, &request);
        subscription.change(&request, kind, store)?;
        Ok(event)
    }

    /// Whether a client has asked for addresses but not yet for policies: worth a short wait, see [`Session::next`].
    #[must_use]
    pub fn awaits_authorization(&self) -> bool {
        let [address, authorization] = &self.subscriptions;
        authorization.is_none() && address.as_ref().is_some_and(Subscription::has_work)
    }

    /// Generation of the store up to which the client has acknowledged everything of every type; 0 until it has asked for
    /// all of them.
    #[must_use]
    pub fn applied(&self) -> u64 {
        let applied = self.subscriptions.iter();
        let applied = applied.map(|it| it.as_ref().map_or(0, Subscription::applied));
        applied.min().unwrap_or(0)
    }

    /// The next response to send, or `None` until something happens. `hold_addresses`: do not begin with addresses
    /// before policies are asked for.
    pub fn next(&mut self, store: &Store, hold_addresses: bool) -> Option<DeltaDiscoveryResponse> {
        for (subscription, kind) in self.subscriptions.iter_mut().zip(ResourceType::ALL) {
            if let Some(subscription) = subscription {
                subscription.refresh(kind, store);
            }
        }
        if let response @ Some(_) = self.respond(ResourceType::Authorization, Half::Upserts, store)
        {
            return response;
        }
        let policies_wait = self.subscriptions[ResourceType::Authorization as usize]
            .as_ref()
            .map_or(hold_addresses, |policies| {
                policies.in_flight.is_some() && policies.has_work()
            });
        if policies_wait {
            return None;
        }
        if let response @ Some(_) = self.respond(ResourceType::Address, Half::Both, store) {
            return response;
        }
        if self.subscriptions[ResourceType::Address as usize]
            .as_ref()
            .is_some_and(Subscription::has_work)
        {
            return None;
        }
        self.respond(ResourceType::Authorization, Half::Removals, store)
    }

    fn respond(
        &mut self,
        kind: ResourceType,
        half: Half,
        store: &Store,
    ) -> Option<DeltaDiscoveryResponse> {
        let subscription = self.subscriptions[kind as usize].as_mut()?;
        if subscription.in_flight.is_some() || !subscription.has_work() {
            return None;
        }
        let delta = subscription.take(kind, half, store)?;
        self.last_nonce += 1;
        let nonce = format!("{:x}", self.last_nonce);
        let names = delta
            .upserts
            .keys()
            .chain(&delta.removals)
            .take(NACK_NAMES_MAX)
            .cloned();
        subscription.in_flight = Some(InFlight {
            nonce: nonce.clone(),
            names: names.collect(),
            completes: (!subscription.has_work()).then_some(subscription.seen),
        });
        let resources = delta.upserts.iter().map(|(name, resource)| wire::Resource {
            version: resource.version.to_string(),
            resource: Some(prost_types::Any {
                type_url: kind.url().into(),
                value: resource.body.to_vec(),
            }),
            name: name.to_string(),
            aliases: resource.aliases.iter().map(ToString::to_string).collect(),
            ttl: None,
        });
        Some(DeltaDiscoveryResponse {
            system_version_info: store.generation().to_string(),
            resources: resources.collect(),
            type_url: kind.url().into(),
            nonce,
            removed_resources: delta.removals.iter().map(ToString::to_string).collect(),
        })
    }

    /// First requests and demands are answered; acknowledgements are not, else the two sides would never stop.
    fn unknown_type(&mut self, request: DeltaDiscoveryRequest) -> Event {
        if !request.response_nonce.is_empty() && request.resource_names_subscribe.is_empty() {
            return Event::Accepted;
        }
        self.last_nonce += 1;
        let mut removed_resources = request.resource_names_subscribe;
        removed_resources.retain(|name| name != WILDCARD);
        Event::UnknownType(Box::new(DeltaDiscoveryResponse {
            type_url: request.type_url,
            nonce: format!("{:x}", self.last_nonce),
            removed_resources,
            ..DeltaDiscoveryResponse::default()
        }))
    }
}

impl Subscription {
    /// The first request of a type. Empty lists are the legacy wildcard; `*` in both lists means nothing yet.
    fn begin(request: &DeltaDiscoveryRequest) -> Self {
        let (subscribe, unsubscribe) = (
            &request.resource_names_subscribe,
            &request.resource_names_unsubscribe,
        );
        let has_star = |names: &[String]| names.iter().any(|name| name == WILDCARD);
        let legacy = subscribe.is_empty() && unsubscribe.is_empty();
        let wildcard = (legacy || has_star(subscribe)) && !has_star(unsubscribe);
        let held = &request.initial_resource_versions;
        let named = subscribe.iter().filter(|name| *name != WILDCARD);
        // After a reconnect an on-demand client repeats its demands as what it holds, or still waits for.
        let repeated = held.keys().filter(|_| !wildcard);
        Self {
            wildcard,
            demanded: named
                .chain(repeated)
                .map(|name| Arc::from(name.as_str()))
                .collect(),
            sent: held
                .iter()
                .map(|(name, version)| {
                    // A client names so what it refused and acts on nevertheless: it must learn when that is gone.
                    let unknown = version.is_empty();
                    let version = if unknown { UNKNOWN_VERSION } else { version };
                    (name.as_str().into(), version.into())
                })
                .collect(),
            dirty: Dirty::All,
            seen: 0,
            applied: 0,
            refused: false,
            in_flight: None,
            owed: true,
        }
    }

    fn acknowledge(&mut self, kind: ResourceType, request: &DeltaDiscoveryRequest) -> Event {
        let answers = |in_flight: &mut InFlight| in_flight.nonce == request.response_nonce;
        let Some(in_flight) = self.in_flight.take_if(answers) else {
            return Event::Accepted;
        };
        self.refused = request.error_detail.is_some();
        let Some(error) = &request.error_detail else {
            self.applied = in_flight.completes.unwrap_or(self.applied);
            return Event::Accepted;
        };
        let mut reason = error.message.clone();
        let end = reason.floor_char_boundary(NACK_REASON_MAX_BYTES);
        reason.truncate(end);
        // What was sent stays recorded as sent: a refused version is not sent again until it changes.
        Event::Nack {
            kind,
            names: in_flight.names,
            reason,
        }
    }

    fn change(
        &mut self,
        request: &DeltaDiscoveryRequest,
        kind: ResourceType,
        store: &Store,
    ) -> Result<(), Violation> {
        for name in &request.resource_names_subscribe {
            self.owed = true;
            self.dirty = Dirty::All;
            if name == WILDCARD {
                self.wildcard = true;
                continue;
            }
            self.demanded.insert(name.as_str().into());
            // A name that is asked for again is sent again.
            self.sent.remove(name.as_str());
            for resource in demanded_resources(kind, name, store) {
                self.sent.remove(&resource.name);
            }
        }
        self.check_limit()?;
        if request.resource_names_unsubscribe.is_empty() {
            return Ok(());
        }
        for name in &request.resource_names_unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.demanded.remove(name.as_str());
            }
        }
        // The client forgets by itself what it no longer wants; it is not told again.
        let wanted = self.wanted(kind, store);
        self.sent
            .retain(|name, _| wanted.contains_key(name) || self.demanded.contains(name));
        self.dirty = Dirty::All;
        Ok(())
    }

    fn check_limit(&self) -> Result<(), Violation> {
        if self.demanded.len() > DEMANDED_MAX {
            return Err(Violation::TooManyNames);
        }
        Ok(())
    }

    fn applied(&self) -> u64 {
        let idle = self.in_flight.is_none() && !self.has_work() && !self.refused;
        if idle { self.seen } else { self.applied }
    }

    fn has_work(&self) -> bool {
        self.owed
            || match &self.dirty {
                Dirty::All => true,
                Dirty::Names(names) => !names.is_empty(),
            }
    }

    /// Notes what changed since the last look.
    fn refresh(&mut self, kind: ResourceType, store: &Store) {
        if self.seen == store.generation() {
            return;
        }
        match (&mut self.dirty, store.changes_since(kind, self.seen)) {
            (Dirty::Names(names), Some(changes)) => names.extend(changes.cloned()),
            (dirty, None) => *dirty = Dirty::All,
            (Dirty::All, Some(_)) => {}
        }
        self.seen = store.generation();
    }

    /// Everything that the client should have, by the name under which it should have it.
    fn wanted(&self, kind: ResourceType, store: &Store) -> BTreeMap<Arc<str>, Arc<Resource>> {
        let mut wanted = BTreeMap::new();
        if self.wildcard {
            wanted.extend(
                store
                    .all(kind)
                    .map(|resource| (resource.name.clone(), resource.clone())),
            );
        }
        for demanded in &self.demanded {
            let found = demanded_resources(kind, demanded, store);
            // A client may wake only on exactly the name that it demanded (wire.md trap T1).
            if let Some(first) = found.first() {
                wanted.insert(demanded.clone(), first.clone());
            }
            wanted.extend(
                found
                    .into_iter()
                    .map(|resource| (resource.name.clone(), resource)),
            );
        }
        wanted
    }

    /// The difference, noted as sent; `None` when there is nothing to say.
    fn take(&mut self, kind: ResourceType, half: Half, store: &Store) -> Option<Delta> {
        let mut delta = self.delta(kind, store);
        match half {
            Half::Both => self.dirty = Dirty::default(),
            Half::Upserts => self.dirty = Dirty::Names(std::mem::take(&mut delta.removals)),
            Half::Removals => {
                // The other half went out just before, from the same state of the store.
                self.dirty = Dirty::default();
            }
        }
        let owed = half != Half::Removals && std::mem::take(&mut self.owed);
        if delta.upserts.is_empty() && delta.removals.is_empty() && !owed {
            return None;
        }
        for (name, resource) in &delta.upserts {
            self.sent.insert(name.clone(), resource.version.clone());
        }
        for name in &delta.removals {
            if self.demanded.contains(name) {
                self.sent.insert(name.clone(), Arc::default());
            } else {
                self.sent.remove(name);
            }
        }
        Some(delta)
    }

    fn delta(&self, kind: ResourceType, store: &Store) -> Delta {
        let mut delta = Delta::default();
        if let Dirty::Names(names) = &self.dirty
            && self.wildcard
            && self.demanded.is_empty()
        {
            for name in names {
                self.compare(name, store.get(kind, name), &mut delta);
            }
            return delta;
        }
        if let Dirty::Names(names) = &self.dirty
            && names.is_empty()
        {
            return delta;
        }
        let wanted = self.wanted(kind, store);
        for (name, resource) in &wanted {
            self.compare(name, Some(resource), &mut delta);
        }
        for name in self.sent.keys().chain(&self.demanded) {
            if !wanted.contains_key(name) {
                self.compare(name, None, &mut delta);
            }
        }
        delta
    }

    fn compare(&self, name: &Arc<str>, now: Option<&Arc<Resource>>, delta: &mut Delta) {
        match (self.sent.get(name), now) {
            (Some(sent), Some(now)) if *sent == now.version => {}
            (_, Some(now)) => {
                delta.upserts.insert(name.clone(), now.clone());
            }
            (Some(sent), None) if !sent.is_empty() => {
                delta.removals.insert(name.clone());
            }
            (None, None) if self.demanded.contains(name) => {
                delta.removals.insert(name.clone());
            }
            (_, None) => {}
        }
    }
}

fn demanded_resources(kind: ResourceType, name: &str, store: &Store) -> Vec<Arc<Resource>> {
    match kind {
        ResourceType::Authorization => store.get(kind, name).cloned().into_iter().collect(),
        ResourceType::Address => {
            let mut found = store.resolve(name);
            // A service before its endpoints: it is what an address of its own stands for.
            found.sort_by_key(|resource| {
                let own = resource.aliases.iter().any(|alias| **alias == *name);
                (!own, !resource.services.is_empty())
            });
            found
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
