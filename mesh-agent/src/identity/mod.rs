//! Keys and certificates of the workloads of this node.

use std::sync::Arc;

use mesh_api::identity::Identity;
use rustls::pki_types::CertificateDer;

/// A key, its certificate chain and the roots it came with, ready for TLS.
#[derive(Debug)]
pub struct Certified {
    /// Whose it is.
    pub identity: Identity,
    /// Start of validity, seconds since 1970.
    pub not_before: i64,
    /// End of validity, seconds since 1970.
    pub not_after: i64,
    /// Names the set of roots; part of the pool key, so that tunnels of retired roots are not reused.
    pub roots_fingerprint: [u8; 32],
    /// Serves 15008: TLS 1.3, ALPN `h2`, client certificate of the own trust domain required.
    pub server: Arc<rustls::ServerConfig>,
}

impl Certified {
    /// A client that accepts exactly the given identities.
    #[must_use]
    pub fn client(&self, _expected: Arc<[Identity]>) -> Arc<rustls::ClientConfig> {
        todo!()
    }
}

/// Hands out certificates; fetches, renews and forgets them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Certificates {}

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateError {}

impl Certificates {
    /// The current certificate of `identity`, fetched if need be (one request at a time per identity).
    ///
    /// # Errors
    /// When the control plane refuses or cannot be reached and there is no valid certificate.
    pub async fn get(&self, _identity: &Identity) -> Result<Arc<Certified>, CertificateError> {
        todo!()
    }

    /// The current certificate, if there is a valid one already.
    #[must_use]
    pub fn current(&self, _identity: &Identity) -> Option<Arc<Certified>> {
        todo!()
    }

    /// Says which identities this node needs: others are forgotten, new ones prefetched.
    pub fn retain(&self, _needed: &[Identity]) {
        todo!()
    }
}

/// The first SPIFFE identity among the URI names of a verified peer's leaf certificate.
#[must_use]
pub fn peer_identity(_chain: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    todo!()
}
