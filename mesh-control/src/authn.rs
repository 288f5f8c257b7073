//! Who calls: every request of an agent bears a token, and a token belongs to one node.

use std::{fmt, sync::Arc};

use tonic::{Status, metadata::MetadataMap};
use zeroize::Zeroizing;

use crate::{
    credentials::{Authenticated, NodeCredentials, NodeName},
    kube::Bearer,
};

/// Longest token of a service account: names, and the pod and node it is bound to; about 1.2 KB in practice.
const REVIEWED_TOKEN_MAX_BYTES: usize = 16 * 1024;

/// Knows which token belongs to which node.
#[derive(Debug, Clone)]
pub enum Nodes {
    /// Tokens of a file, or of the embedding process.
    Listed(Arc<NodeCredentials>),
    /// Tokens of service accounts, which the API server vouches for.
    Reviewed(Arc<dyn Review>),
}

/// Whoever vouches for tokens of service accounts. A trait so that an agent with the control plane inside does not carry
/// the client of the API server.
#[tonic::async_trait]
pub trait Review: fmt::Debug + Send + Sync {
    /// Whose token it is.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when it proves nothing; `UNAVAILABLE` when that cannot be told at the moment.
    async fn review(&self, token: &str) -> Result<Bearer, Status>;

    /// Whether what the token proved still holds.
    fn still_valid(&self, bearer: &Bearer) -> bool;
}

/// A node that proved itself, and the proof that lets a long stream ask again whether it still holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The node.
    pub node: NodeName,
    proof: Proof,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Proof {
    Listed(Authenticated),
    Reviewed(Bearer),
}

impl Nodes {
    /// The node whose token the request bears.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when there is none; `UNAVAILABLE` when it cannot be told at the moment.
    pub async fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        match self {
            Self::Listed(credentials) => {
                let authenticated = credentials.authenticate(metadata)?;
                Ok(Caller {
                    node: authenticated.node.clone(),
                    proof: Proof::Listed(authenticated),
                })
            }
            Self::Reviewed(reviewer) => {
                let token = bearer_token(metadata, REVIEWED_TOKEN_MAX_BYTES);
                let token = token.ok_or_else(|| {
                    Status::unauthenticated("the request bears no token of a service account")
                })?;
                let bearer = reviewer.review(&token).await?;
                Ok(Caller {
                    node: bearer.node.clone(),
                    proof: Proof::Reviewed(bearer),
                })
            }
        }
    }

    /// Whether the proof with which a stream began still holds.
    #[must_use]
    pub fn still_valid(&self, caller: &Caller) -> bool {
        match (self, &caller.proof) {
            (Self::Listed(credentials), Proof::Listed(authenticated)) => {
                credentials.still_valid(authenticated)
            }
            (Self::Reviewed(reviewer), Proof::Reviewed(bearer)) => reviewer.still_valid(bearer),
            _ => false,
        }
    }
}

/// The token of `authorization: Bearer <token>`.
fn bearer_token(metadata: &MetadataMap, max_bytes: usize) -> Option<Zeroizing<String>> {
    metadata
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .filter(|token| !token.is_empty() && token.len() <= max_bytes)
        .map(|token| Zeroizing::new(token.to_owned()))
}
