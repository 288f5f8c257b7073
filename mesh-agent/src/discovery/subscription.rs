//! The bookkeeping of incremental xDS, without I/O: takes responses, gives the requests to send and the changes to
//! apply.
//!
//! Both types are subscribed as wildcards. A response is answered by an ACK, or by one NACK that joins every reason;
//! good resources of a response apply even when others are refused. The same bad bytes are reported once per stream:
//! when they come again the response is acknowledged, so that a server that resends what was refused does not spin.
//!
//! On reconnect `initial_resource_versions` names what is held. A refused resource is named by the version that is in
//! force, its last good one; a policy for which only a stand-in is held, by an empty version. Either way the server
//! sends the current version or reports the removal. What was refused and left nothing behind is not named.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use bytes::Bytes;
use mesh_api::proto::{
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status},
    security::AUTHORIZATION_TYPE_URL,
    workload::ADDRESS_TYPE_URL,
};

use super::{
    RefusedPolicy, Update,
    convert::{Fault, Rejected, TEXT_MAX_BYTES},
};

/// Longest NACK message, in bytes: enough for some twenty reasons. The rest is counted.
pub const NACK_MESSAGE_MAX_BYTES: usize = 4 * 1024;
/// Most workloads and services together: ten times what the control plane is built for. More are refused, so that a
/// control plane gone wild costs its own new resources and not the node's memory. Policies have no such limit, because
/// leaving one out could allow what it denies.
pub const ADDRESSES_HELD_MAX: usize = 1_000_000;
/// Most refused workloads and services that are remembered in order not to be reported twice. Refused policies are
/// always remembered: their stand-ins are in force.
pub const REFUSED_REMEMBERED_MAX: usize = 10_000;
/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// The types that the agent subscribes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Workloads and services.
    Address,
    /// L4 policies.
    Authorization,
}

impl Kind {
    /// All of them, in the order in which they are requested.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The name of the type on the wire.
    #[must_use]
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE_URL,
            Self::Authorization => AUTHORIZATION_TYPE_URL,
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.type_url() == type_url)
    }
}

/// A resource in force, as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Its type.
    pub kind: Kind,
    /// Its name.
    pub name: Arc<str>,
    /// Its version; control planes may leave it empty.
    pub version: Arc<str>,
    /// The message, encoded.
    pub body: Bytes,
}

/// What a response asks of the caller.
#[derive(Debug)]
pub struct Reaction {
    /// The request that answers the response.
    pub reply: DeltaDiscoveryRequest,
    /// Changes to apply, in this order: additions before removals, so that a replacement leaves no gap.
    pub updates: Vec<Update>,
    /// What was refused.
    pub rejected: Vec<Rejected>,
    /// The reply is a NACK.
    pub nack: bool,
}

/// The state of both subscriptions, across streams.
#[derive(Debug)]
pub struct Subscription {
    node: Node,
    rules: Rules,
    types: BTreeMap<Kind, TypeState>,
}

#[derive(Debug, Clone, Copy)]
struct Rules {
    keep_bodies: bool,
    addresses_max: usize,
}

#[derive(Debug, Default)]
struct TypeState {
    held: HashMap<Arc<str>, Held>,
    /// Fingerprint of the bytes last refused under a name that has no newer good version.
    refused: HashMap<Arc<str>, Refused>,
    /// A response of this type was applied since the process started.
    answered: bool,
    /// A response of this type was applied on the present stream.
    answered_now: bool,
}

#[derive(Debug)]
struct Held {
    version: Arc<str>,
    /// Empty unless bodies are kept for the snapshot.
    body: Bytes,
}

#[derive(Debug)]
struct Refused {
    fingerprint: u64,
    reported: bool,
    stand_in: bool,
    /// Kept for the snapshot where a stand-in takes its place: a restart must not lose what is denied.
    body: Bytes,
}

impl Subscription {
    /// A subscription that holds nothing. Bodies are kept only for a snapshot: they cost their size in memory.
    #[must_use]
    pub fn new(node: Node, keep_bodies: bool) -> Self {
        let types = Kind::ALL
            .into_iter()
            .map(|kind| (kind, TypeState::default()))
            .collect();
        Self {
            node,
            rules: Rules {
                keep_bodies,
                addresses_max: ADDRESSES_HELD_MAX,
            },
            types,
        }
    }

    #[cfg(test)]
    pub(super) fn with_addresses_max(mut self, addresses_max: usize) -> Self {
        self.rules.addresses_max = addresses_max;
        self
    }

    /// The node as it introduces itself.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Takes what a snapshot held; the changes to apply, and what this version of the agent refuses of it.
    pub fn restore(&mut self, records: Vec<Record>) -> (Vec<Update>, Vec<Rejected>) {
        let (mut updates, mut rejected) = (Vec::with_capacity(records.len()), Vec::new());
        for record in records {
            self.types.entry(record.kind).or_default().take(
                record,
                self.rules,
                &mut updates,
                &mut rejected,
            );
        }
        // Only a state of which both types were known is ever saved.
        updates.push(Update::policies_known());
        (updates, rejected)
    }

    /// The first requests of a new stream.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::with_capacity(Kind::ALL.len());
        for (kind, state) in &mut self.types {
            state.answered_now = false;
            state
                .refused
                .values_mut()
                .for_each(|refused| refused.reported = false);
            let held = state
                .held
                .iter()
                .map(|(name, held)| (name.to_string(), held.version.to_string()));
            let mut versions: HashMap<String, String> = held.collect();
            for (name, _) in state.refused.iter().filter(|(_, refused)| refused.stand_in) {
                versions.entry(name.to_string()).or_default();
            }
            requests.push(DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: kind.type_url().to_owned(),
                initial_resource_versions: versions,
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// Takes a response. A response of a type that was not asked for changes nothing and is acknowledged.
    pub fn on_response(&mut self, response: DeltaDiscoveryResponse) -> Reaction {
        let mut reply = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        let (mut updates, mut rejected) =
            (Vec::with_capacity(response.resources.len()), Vec::new());
        let Some(kind) = Kind::of(&response.type_url) else {
            return Reaction {
                reply,
                updates,
                rejected,
                nack: false,
            };
        };
        let rules = self.rules;
        let state = self.types.entry(kind).or_default();
        for resource in response.resources {
            let Resource {
                name,
                version,
                resource,
                ..
            } = resource;
            let Some(any) = resource else {
                rejected.push(Rejected {
                    name: name.chars().take(TEXT_MAX_BYTES).collect(),
                    fault: Fault::Empty,
                });
                continue;
            };
            let record = Record {
                kind,
                name: name.into(),
                version: version.into(),
                body: any.value.into(),
            };
            state.take(record, rules, &mut updates, &mut rejected);
        }
        for name in response.removed_resources {
            state.held.remove(name.as_str());
            state.refused.remove(name.as_str());
            updates.push(match kind {
                Kind::Address => Update::remove_address(&name),
                Kind::Authorization => Update::remove_policy(&name),
            });
        }
        if kind == Kind::Authorization && !state.answered {
            updates.push(Update::policies_known());
        }
        state.answered = true;
        state.answered_now = true;
        let nack = state.report(&rejected);
        if nack {
            reply.error_detail = Some(Status {
                code: INVALID_ARGUMENT,
                message: joined(&rejected),
                details: Vec::new(),
            });
        }
        Reaction {
            reply,
            updates,
            rejected,
            nack,
        }
    }

    /// Both types were answered at least once since the process started. A response counts even if part of it was
    /// refused: one bad resource must not keep a node from becoming ready, and refused policies deny meanwhile.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.types.values().all(|state| state.answered)
    }

    /// Both types were answered on the present stream.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.types.values().all(|state| state.answered_now)
    }

    /// How many resources are refused at present, as far as they are remembered.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.types.values().map(|state| state.refused.len()).sum()
    }

    /// Everything in force, for the snapshot; empty unless bodies are kept.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        if !self.rules.keep_bodies {
            return Vec::new();
        }
        let of = |(kind, state): (&Kind, &TypeState)| {
            let record = |name: &Arc<str>, version: &Arc<str>, body: &Bytes| Record {
                kind: *kind,
                name: Arc::clone(name),
                version: Arc::clone(version),
                body: body.clone(),
            };
            let held = state
                .held
                .iter()
                .map(|(name, held)| record(name, &held.version, &held.body));
            let denying = state
                .refused
                .iter()
                .filter(|(name, r)| r.stand_in && !state.held.contains_key(*name));
            let denying =
                denying.map(|(name, refused)| record(name, &Arc::default(), &refused.body));
            held.chain(denying).collect::<Vec<_>>()
        };
        self.types.iter().flat_map(of).collect()
    }
}

impl TypeState {
    fn take(
        &mut self,
        record: Record,
        rules: Rules,
        updates: &mut Vec<Update>,
        rejected: &mut Vec<Rejected>,
    ) {
        let (refusal, stand_in) = match self.convert(&record, rules) {
            Ok(update) => {
                updates.push(update);
                let body = if rules.keep_bodies {
                    record.body
                } else {
                    Bytes::new()
                };
                self.refused.remove(&record.name);
                self.held.insert(
                    record.name,
                    Held {
                        version: record.version,
                        body,
                    },
                );
                return;
            }
            Err(refused) => (refused.rejected, refused.stand_in),
        };
        let fingerprint = fingerprint(&record.body);
        let reported = self
            .refused
            .get(&record.name)
            .is_some_and(|r| r.reported && r.fingerprint == fingerprint);
        let in_force = stand_in.is_some();
        let body = if rules.keep_bodies && in_force {
            record.body
        } else {
            Bytes::new()
        };
        let refused = Refused {
            fingerprint,
            reported,
            stand_in: in_force,
            body,
        };
        if in_force
            || self.refused.len() < REFUSED_REMEMBERED_MAX
            || self.refused.contains_key(&record.name)
        {
            self.refused.insert(record.name, refused);
        }
        updates.extend(stand_in);
        rejected.push(refusal);
    }

    fn convert(&self, record: &Record, rules: Rules) -> Result<Update, Box<RefusedPolicy>> {
        let refuse = |rejected| {
            Box::new(RefusedPolicy {
                rejected,
                stand_in: None,
            })
        };
        match record.kind {
            Kind::Authorization => Update::authorization(&record.name, &record.body),
            Kind::Address
                if self.held.len() >= rules.addresses_max
                    && !self.held.contains_key(&record.name) =>
            {
                let (count, limit) = (self.held.len() + 1, rules.addresses_max);
                let fault = Fault::TooMany {
                    field: "the list of workloads and services",
                    count,
                    limit,
                };
                Err(refuse(Rejected {
                    name: record.name.chars().take(TEXT_MAX_BYTES).collect(),
                    fault,
                }))
            }
            Kind::Address => Update::address(&record.name, &record.body).map_err(refuse),
        }
    }

    /// Whether any of the refusals is news on this stream; afterwards none is.
    fn report(&mut self, rejected: &[Rejected]) -> bool {
        let mut news = false;
        for refusal in rejected {
            match self.refused.get_mut(refusal.name.as_str()) {
                Some(refused) => news |= !std::mem::replace(&mut refused.reported, true),
                // Without a body, or one too many to be remembered: always news.
                None => news = true,
            }
        }
        news
    }
}

fn fingerprint(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

fn joined(rejected: &[Rejected]) -> String {
    let mut message = String::new();
    for (index, refusal) in rejected.iter().enumerate() {
        let reason = refusal.to_string();
        if message.len() + reason.len() > NACK_MESSAGE_MAX_BYTES && index > 0 {
            message.push_str(&format!("; and {} more", rejected.len() - index));
            break;
        }
        if index > 0 {
            message.push_str("; ");
        }
        message.push_str(&reason);
    }
    message
}
