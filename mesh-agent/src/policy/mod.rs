//! L4 authorization at the destination. Pure: it takes the state and a connection and gives a decision.

use std::net::{IpAddr, SocketAddr};

use mesh_api::{identity::Identity, names::NamespacedName};

use crate::discovery::{MeshState, model::Workload};

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

/// Proof that a connection was authorised; dialling the application requires it.
#[derive(Debug)]
pub struct Authorized(());

/// The verdict.
#[derive(Debug)]
pub enum Decision {
    /// Go on.
    Allowed(Authorized),
    /// Refuse.
    Denied {
        /// The DENY policy that matched; `None` when no ALLOW policy did, or a listed policy is unknown.
        policy: Option<NamespacedName>,
    },
}

/// Decides, and names the audit (dry-run) policies that would have denied.
#[must_use]
pub fn authorize(_state: &MeshState, _workload: &Workload, _connection: &Connection) -> Decision {
    todo!()
}
