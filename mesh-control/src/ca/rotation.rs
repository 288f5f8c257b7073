//! How one authority follows another without anybody being refused. No I/O, no clock.
//!
//! ```text
//!  new root appears ──► announce: both trusted, old one signs ──► retire: both trusted, new one signs ──► new root alone
//!                       one overlap                                one overlap
//! ```
//!
//! One overlap is the longest life of a workload certificate: agents learn roots with their certificates, so after it
//! every agent has renewed once. A new intermediate below a trusted root needs no announcement and signs at once.
//!
//! What has to outlive a restart is in the cluster: the published bundle, and the outgoing authority.

use std::time::{Duration, SystemTime};

use super::roots;

/// The authority that is being replaced, as the cluster remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    /// Whether its key is remembered too, so that it can still sign.
    pub signs: bool,
    /// Roots that were trusted when it was replaced, PEM.
    pub roots: String,
    /// Digest of the roots that replace it.
    pub replaced_by: String,
    /// Since when.
    pub since: SystemTime,
}

/// What is known.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    /// Roots of the authority that is to be used.
    pub present: &'a str,
    /// The roots that agents and workloads were last told.
    pub bundle: Option<&'a str>,
    /// What is being replaced.
    pub outgoing: Option<&'a Outgoing>,
    /// This process has an authority that it signed with so far.
    pub active: bool,
}

/// Who signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signer {
    /// The authority that is to be used.
    Present,
    /// The one that is being replaced.
    Outgoing,
    /// Whichever this process has used so far.
    Active,
}

/// What the writer has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Write {
    /// Remember the active authority as outgoing.
    Remember(Outgoing),
    /// Tell the roots.
    Bundle,
    /// The outgoing authority is history.
    Forget,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Who signs.
    pub signer: Signer,
    /// All roots to trust, PEM.
    pub roots: String,
    /// What to write, one thing at a time: what is written decides what comes next.
    pub write: Option<Write>,
}

/// Decides.
pub(crate) fn decide(seen: Seen<'_>, overlap: Duration, now: SystemTime) -> Decision {
    let bundle = seen.bundle.unwrap_or_default();
    let bundle_if = |roots: &str| (!roots::equal(bundle, roots)).then_some(Write::Bundle);
    let steady = || Decision {
        signer: Signer::Present,
        roots: seen.present.to_owned(),
        write: bundle_if(seen.present),
    };
    let replaced_by = roots::digest(seen.present);
    let current = seen
        .outgoing
        .filter(|outgoing| outgoing.replaced_by == replaced_by);
    if let Some(outgoing) = current {
        // A clock that went back says nothing about time that passed.
        let age = now.duration_since(outgoing.since).unwrap_or_default();
        if age >= overlap * 2 {
            let retired = steady();
            let write = retired.write.or(Some(Write::Forget));
            return Decision { write, ..retired };
        }
        let roots = roots::union(&[seen.present, &outgoing.roots]);
        let announcing = outgoing.signs && age < overlap;
        return Decision {
            signer: if announcing {
                Signer::Outgoing
            } else {
                Signer::Present
            },
            write: bundle_if(&roots),
            roots,
        };
    }
    let earlier = seen.outgoing.map_or("", |outgoing| &outgoing.roots);
    let trusted = roots::union(&[bundle, earlier]);
    if seen.bundle.is_none() || roots::equal(&trusted, seen.present) {
        return steady();
    }
    // Another root than those that are trusted, or fewer. Nobody may be surprised by either.
    let is_new = !roots::equal(&roots::union(&[&trusted, seen.present]), &trusted);
    Decision {
        signer: if is_new && seen.active {
            Signer::Active
        } else {
            Signer::Present
        },
        roots: roots::union(&[seen.present, &trusted]),
        write: Some(Write::Remember(Outgoing {
            signs: is_new && seen.active,
            roots: trusted,
            replaced_by,
            since: now,
        })),
    }
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
