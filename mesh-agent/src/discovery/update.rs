//! One change of the mesh, converted and checked, ready to be applied under the write lock.

use std::sync::Arc;

use mesh_api::{
    names::NamespacedName,
    proto::{security, workload as wire},
};
use prost::Message as _;

use super::{
    convert::{self, AddressEntry, Fault, Rejected, TEXT_MAX_BYTES},
    model::Policy,
    state::{ServiceEntry, WorkloadEntry},
};
use crate::policy::{Action, Compiled, Frame, Reach, compile, frame};

/// A checked change. Conversion happens outside the lock; applying it cannot fail.
#[derive(Debug, Clone)]
pub struct Update(pub(super) Change);

#[derive(Debug, Clone)]
pub(super) enum Change {
    Workload(Arc<WorkloadEntry>),
    Service(Arc<ServiceEntry>),
    Policy(Arc<Policy>),
    /// Applied only where no good version of the policy is held.
    StandIn(Arc<Policy>),
    RemoveAddress(Arc<str>),
    RemovePolicy(Arc<str>),
    PoliciesKnown,
}

/// A policy that was refused, and what takes its place while no good version is held.
#[derive(Debug)]
pub struct RefusedPolicy {
    /// Why.
    pub rejected: Rejected,
    /// What to apply; absent when even the policy's name is unusable.
    pub stand_in: Option<Update>,
}

impl Update {
    /// Converts an `istio.workload.Address` resource.
    ///
    /// # Errors
    /// [`Rejected`] when any part of it is malformed; the previous version stays.
    pub fn address(name: &str, body: &[u8]) -> Result<Self, Rejected> {
        match convert::address(name, body) {
            Ok(AddressEntry::Workload(entry)) => Ok(Self(Change::Workload(entry))),
            Ok(AddressEntry::Service(entry)) => Ok(Self(Change::Service(entry))),
            Err(fault) => Err(rejected(name, fault)),
        }
    }

    /// Converts an `istio.workload.Workload` message under its own name.
    ///
    /// # Errors
    /// As [`Update::address`].
    pub fn workload(workload: wire::Workload) -> Result<Self, Rejected> {
        let name = workload.uid.clone();
        let address = wire::Address {
            r#type: Some(wire::address::Type::Workload(workload)),
        };
        Self::address(&name, &address.encode_to_vec())
    }

    /// Converts an `istio.workload.Service` message under its own name.
    ///
    /// # Errors
    /// As [`Update::address`].
    pub fn service(service: wire::Service) -> Result<Self, Rejected> {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let address = wire::Address {
            r#type: Some(wire::address::Type::Service(service)),
        };
        Self::address(&name, &address.encode_to_vec())
    }

    /// Converts an `istio.security.Authorization` resource.
    ///
    /// # Errors
    /// [`RefusedPolicy`] when any part of it is malformed; the previous version stays, else its stand-in is applied.
    pub fn authorization(name: &str, body: &[u8]) -> Result<Self, Box<RefusedPolicy>> {
        let key: NamespacedName = name.parse().map_err(|source| {
            let fault = Fault::Key {
                field: "resource name",
                source,
            };
            Box::new(RefusedPolicy {
                rejected: rejected(name, fault),
                stand_in: None,
            })
        })?;
        let spec = match security::Authorization::decode(body) {
            Ok(spec) => spec,
            Err(e) => return Err(refuse(key, None, Fault::Decode(e.to_string()))),
        };
        if spec.namespace != *key.namespace || spec.name != *key.name {
            let content: String = format!("{}/{}", spec.namespace, spec.name)
                .chars()
                .take(128)
                .collect();
            return Err(refuse(key, Some(spec), Fault::Misnamed { key: content }));
        }
        match compile(&spec) {
            Ok(compiled) => Ok(Self(Change::Policy(Arc::new(Policy {
                key,
                spec,
                compiled,
            })))),
            Err(fault) => Err(refuse(key, Some(spec), fault)),
        }
    }

    /// Converts an `istio.security.Authorization` message under its own name.
    ///
    /// # Errors
    /// As [`Update::authorization`].
    pub fn policy(policy: &security::Authorization) -> Result<Self, Box<RefusedPolicy>> {
        Self::authorization(
            &format!("{}/{}", policy.namespace, policy.name),
            &policy.encode_to_vec(),
        )
    }

    /// The workload or service of that resource name is gone.
    #[must_use]
    pub fn remove_address(name: &str) -> Self {
        Self(Change::RemoveAddress(name.into()))
    }

    /// The policy of that resource name is gone.
    #[must_use]
    pub fn remove_policy(name: &str) -> Self {
        Self(Change::RemovePolicy(name.into()))
    }

    /// Every policy there is was told, even if that is none. Before, no connection is allowed.
    #[must_use]
    pub fn policies_known() -> Self {
        Self(Change::PoliciesKnown)
    }
}

fn rejected(name: &str, fault: Fault) -> Rejected {
    Rejected {
        name: name.chars().take(TEXT_MAX_BYTES).collect(),
        fault,
    }
}

/// Where action or scope are not to be read, the stand-in denies in the namespace of the name, and wherever the policy
/// is listed. (That a policy is mesh-wide cannot be known from its name.)
fn refuse(
    key: NamespacedName,
    spec: Option<security::Authorization>,
    fault: Fault,
) -> Box<RefusedPolicy> {
    let unreadable = Frame {
        action: Action::Deny,
        reach: Reach::Namespace,
        dry_run: false,
    };
    let frame = spec
        .as_ref()
        .and_then(|spec| frame(spec).ok())
        .unwrap_or(unreadable);
    let rejected = rejected(&key.to_string(), fault);
    let policy = Policy {
        key,
        spec: spec.unwrap_or_default(),
        compiled: Compiled::stand_in(frame),
    };
    Box::new(RefusedPolicy {
        rejected,
        stand_in: Some(Update(Change::StandIn(Arc::new(policy)))),
    })
}
