//! Keys and certificates of the workloads of this node.
//!
//! [`schedule`] decides when to ask, without I/O; [`ca_client`] asks; [`response`] judges the answer; [`tls`] turns it
//! into configurations; [`Certificates`] ties them together on the admin runtime and publishes the result to all.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_api::identity::Identity;
use rustls::{
    ClientConfig, pki_types::CertificateDer, sign::CertifiedKey, time_provider::TimeProvider,
};

pub mod ca_client;
mod certificates;
pub mod key;
pub mod peer;
pub mod response;
pub mod roots;
pub mod schedule;
#[cfg(test)]
pub(crate) mod testing;
pub mod tls;

pub use certificates::{
    CertificateState, CertificateStatus, Certificates, Clock, Parts, SystemClock,
};
use key::KeyError;
use response::{Material, ResponseError};
use roots::{RootsError, TrustRoots};

/// Client configurations kept per certificate. One per set of expected identities, hence about one per workload or
/// service that this workload talks to; beyond it they are made again, which costs a few allocations.
const CLIENT_CONFIGS_MAX: usize = 256;

/// Where and how certificates are asked for.
#[derive(Debug, Clone)]
pub struct IdentityConfig {
    /// Address of the certificate service, `https://host:port`; without a scheme it is https too.
    pub ca_address: String,
    /// PEM file of the roots that the service's own certificate is verified against; read again on every call.
    pub roots_file: PathBuf,
    /// Name in the service's certificate, where it is not the host of `ca_address`.
    pub server_name: Option<String>,
    /// Bearer token; read again on every call. None: calls carry no token.
    pub token_file: Option<PathBuf>,
    /// Value of the `clusterid` header.
    pub cluster: String,
    /// Lifetime to ask for; the authority may grant another one.
    pub requested_lifetime: Duration,
    /// The only trust domain that certificates are asked for.
    pub trust_domain: String,
}

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
    parameters: tls::Parameters,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

impl Certified {
    /// Makes TLS configurations of accepted `material` that believe peers under `roots` and read the time from
    /// `clock`.
    ///
    /// # Errors
    /// When the cryptographic library does not support what the mesh speaks.
    pub fn new(
        material: &Material,
        roots: &Arc<TrustRoots>,
        clock: &Arc<dyn TimeProvider>,
    ) -> Result<Self, CertificateError> {
        let key = CertifiedKey::new(material.chain.clone(), material.key.clone());
        let parameters = tls::Parameters::new(key, roots.clone(), clock.clone());
        let server = parameters
            .server(material.identity.trust_domain())
            .map_err(|error| CertificateError::Tls(error.to_string()))?;
        Ok(Self {
            identity: material.identity.clone(),
            not_before: material.not_before,
            not_after: material.not_after,
            roots_fingerprint: roots.fingerprint(),
            server: Arc::new(server),
            parameters,
            clients: Mutex::default(),
        })
    }

    /// A client that accepts exactly the given identities. Repeated calls return the same configuration.
    #[must_use]
    pub fn client(&self, expected: Arc<[Identity]>) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(&expected) {
            return config.clone();
        }
        if clients.len() >= CLIENT_CONFIGS_MAX {
            clients.clear();
        }
        let config = self.parameters.client(expected.clone());
        let config = Arc::new(
            config.expect("Certified::new made a server of the same provider and versions"),
        );
        clients.insert(expected, config.clone());
        config
    }

    /// Whether it was made of exactly this key and chain.
    fn is_made_of(&self, material: &Material) -> bool {
        Arc::ptr_eq(&self.parameters.key.key, &material.key)
            && self.parameters.key.cert == material.chain
    }

    /// Whether it may still be used at `now`, seconds since 1970.
    #[must_use]
    pub fn is_valid_at(&self, now: i64) -> bool {
        now < self.not_after
    }
}

/// Why there is no certificate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CertificateError {
    /// The configuration cannot work; asking again does not help.
    #[error("certificate service {address:?}: {detail}")]
    Config {
        /// The address as configured.
        address: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A file that the configuration names cannot be used.
    #[error("cannot use the {purpose} {}: {detail}", path.display())]
    File {
        /// What the file is for.
        purpose: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The control plane cannot be reached or did not answer in time.
    #[error(
        "cannot reach the certificate service {address}: {detail}; is the control plane running?"
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the transport said.
        detail: String,
    },
    /// The control plane refused.
    #[error(
        "the certificate service refused ({code}): {message}; look at the agent's token and at whether this node runs the workload"
    )]
    Refused {
        /// gRPC status code.
        code: String,
        /// The service's words.
        message: String,
    },
    /// The answer is unusable.
    #[error("the certificate service's answer is refused: {0}")]
    Response(#[from] ResponseError),
    /// The identity is of another mesh.
    #[error("{identity} is not of this agent's trust domain {trust_domain}")]
    ForeignTrustDomain {
        /// Who was asked for.
        identity: Identity,
        /// Ours.
        trust_domain: Arc<str>,
    },
    /// More identities than [`schedule::IDENTITIES_MAX`].
    #[error("this node already holds {0} identities, the most it accepts")]
    TooMany(usize),
    /// The last attempt failed and the next one is not due.
    #[error("no certificate for {identity} (next attempt in {retry_in_ms} ms): {last}")]
    Waiting {
        /// Who was asked for.
        identity: Identity,
        /// Milliseconds until the next attempt.
        retry_in_ms: u64,
        /// Why the last one failed.
        last: Box<Self>,
    },
    /// The certificate did not come within the time that a connection waits.
    #[error("no certificate for {0} yet")]
    TimedOut(Identity),
    /// No workload of this node has the identity any more.
    #[error("{0} is no longer an identity of this node")]
    Forgotten(Identity),
    /// The roots of all certificates together are unusable.
    #[error("cannot combine the roots: {0}")]
    Roots(#[from] RootsError),
    /// Key generation failed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The TLS library refuses our parameters.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// A request ended without a result; a bug of ours.
    #[error("the request for a certificate broke off: {0}")]
    BrokenOff(String),
}

impl CertificateError {
    /// Whether asking again may help without anybody changing the configuration.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::Config { .. } | Self::ForeignTrustDomain { .. })
    }

    /// Whether the control plane as a whole seems to be away, as opposed to having answered.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// The first SPIFFE identity among the URI names of a verified peer's leaf certificate.
#[must_use]
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    tls::identities(chain?.first()?).into_iter().next()
}
