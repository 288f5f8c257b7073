//! Handing over: a new agent process takes the place of a running one without a lost connection. The messages and their
//! order are those of [`mesh_api::handover`].
//!
//! What makes it lossless: listeners are the same sockets in both processes, so what waits in their queues is accepted
//! by whoever accepts next; programs are replaced inside their links; the one that is replaced stops accepting only when
//! the other is ready, and keeps its connections until they end. What makes it safe to try: until the successor says
//! that it serves, the predecessor can go on as if nothing had been asked.

use std::{io, path::PathBuf, time::Duration};

mod channel;
pub(super) mod draining;
mod predecessor;
mod successor;
mod upgrade;

pub(super) use channel::Door;
pub(super) use draining::Notice;
pub(super) use predecessor::{Descriptors, hand_over_to_successors};
pub(super) use successor::{Offer, Predecessor, report_failure};
pub(super) use upgrade::Attempts;
use upgrade::Outcome;

/// For one message: the other end answers between two events, unless it is stuck or stopped.
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(10);
/// What a successor has from the last offer to its commitment: certificates for all workloads of a full node.
pub(super) const READY_LIMIT: Duration = Duration::from_secs(40);

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The socket.
    #[error("hand-over socket {path}: {source}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Sending or receiving.
    #[error("hand-over: {0}")]
    Io(#[from] io::Error),
    /// The other agent has ended.
    #[error("the other agent went away in the middle of the hand-over; look at its log")]
    Gone,
    /// The other agent says nothing.
    #[error("the other agent said nothing for {0:?}; is it stopped?")]
    Silent(Duration),
    /// The other agent is another program, or another version of it.
    #[error("the other agent said something unexpected: {0}")]
    Malformed(String),
    /// The running agent does not want to.
    #[error("the running agent does not hand over: {0}")]
    Refused(String),
    /// The new agent gave up.
    #[error("the new agent gave up: {0}")]
    Aborted(String),
    /// The new agent is not ready in time.
    #[error("not ready to take over after {READY_LIMIT:?}: {0}")]
    NotReady(String),
}
