//! L4 authorization at the destination. Pure: it takes the state and a connection and gives a decision.
//!
//! Order: before the policies were told once, and where a listed policy is unknown, every connection is denied; then
//! any DENY policy that matches denies; then, if there is any ALLOW policy, one of them has to match. Audit policies
//! (`dry_run`) never change the verdict.
//!
//! **Policies that cannot be enforced.** When a policy is refused at conversion and no earlier good version of it is
//! held, what it would have forbidden must not become allowed: a refused ALLOW policy counts as one that matches
//! nothing, and a refused DENY policy denies every connection in its scope. The state keeps these stand-ins
//! (`discovery::state`), and the NACK names the policy and the reason.

use std::net::{IpAddr, SocketAddr};

use mesh_api::{identity::Identity, names::NamespacedName};

use crate::discovery::{MeshState, model::Workload};

mod compile;
#[cfg(test)]
mod tests;

pub(crate) use compile::{Action, Compiled, Frame, Reach, compile, frame};
pub use compile::{PolicyError, VALUES_PER_POLICY_MAX};

/// What is known of a connection before the application is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Verified identity of the peer; `None` for plaintext.
    pub peer: Option<Identity>,
    /// Address of the TCP peer, IPv4-mapped ones in IPv4 form.
    pub source: IpAddr,
    /// The application's address and port.
    pub destination: SocketAddr,
}

/// Proof that a connection was authorised; dialling the application requires it. Only [`authorize`] makes one.
#[derive(Debug)]
pub struct Authorized {
    audited: Vec<NamespacedName>,
}

impl Authorized {
    /// The audit (dry-run) policies that would have denied the connection.
    #[must_use]
    pub fn audited(&self) -> &[NamespacedName] {
        &self.audited
    }
}

/// The verdict.
#[derive(Debug)]
pub enum Decision {
    /// Go on.
    Allowed(Authorized),
    /// Refuse.
    Denied {
        /// The DENY policy that matched; `None` when no ALLOW policy did, or policies are unknown.
        policy: Option<NamespacedName>,
        /// The audit (dry-run) policies that would have denied it too.
        audited: Vec<NamespacedName>,
    },
}

impl Decision {
    /// Whether the connection may go on.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed(_))
    }
}

/// Decides, and names the audit (dry-run) policies that would have denied. `workload` is the destination, as the state
/// knows it now: take it from the same `state`, so that the policies listed on it are current.
#[must_use]
pub fn authorize(state: &MeshState, workload: &Workload, connection: &Connection) -> Decision {
    let Some(policies) = state.policies(workload) else {
        return Decision::Denied {
            policy: None,
            audited: Vec::new(),
        };
    };
    let subject = Subject::of(connection);
    let mut tally = Tally::default();
    for policy in &policies {
        tally.add(&policy.key, &policy.compiled, &subject);
    }
    tally.verdict()
}

/// A connection in the form that matching wants, made once per decision.
pub(crate) struct Subject<'a> {
    peer: Option<&'a Identity>,
    /// The peer's identity without `spiffe://`.
    principal: Option<String>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

impl<'a> Subject<'a> {
    pub(crate) fn of(connection: &'a Connection) -> Self {
        Self {
            peer: connection.peer.as_ref(),
            principal: connection.peer.as_ref().map(Identity::principal),
            source: connection.source.to_canonical(),
            destination: connection.destination.ip().to_canonical(),
            port: connection.destination.port(),
        }
    }
}

/// What the policies said so far.
#[derive(Default)]
struct Tally {
    denied_by: Option<NamespacedName>,
    allow_exists: bool,
    allowed: bool,
    audit_denies: Vec<NamespacedName>,
    audit_allows: Vec<NamespacedName>,
    audit_allowed: bool,
}

impl Tally {
    fn add(&mut self, key: &NamespacedName, policy: &Compiled, subject: &Subject<'_>) {
        let matched = policy.matches(subject);
        match (policy.action, policy.dry_run) {
            (Action::Deny, false) => {
                if matched && self.denied_by.is_none() {
                    self.denied_by = Some(key.clone());
                }
            }
            (Action::Allow, false) => {
                self.allow_exists = true;
                self.allowed |= matched;
            }
            (Action::Deny, true) => {
                if matched {
                    self.audit_denies.push(key.clone());
                }
            }
            (Action::Allow, true) => {
                self.audit_allows.push(key.clone());
                self.audit_allowed |= matched;
            }
        }
    }

    fn verdict(self) -> Decision {
        let mut audited = self.audit_denies;
        // Enforced, audited ALLOW policies would deny what neither they nor the enforced ones allow.
        if !self.audit_allowed && !self.allowed {
            audited.extend(self.audit_allows);
        }
        if self.denied_by.is_some() || (self.allow_exists && !self.allowed) {
            return Decision::Denied {
                policy: self.denied_by,
                audited,
            };
        }
        Decision::Allowed(Authorized { audited })
    }
}
