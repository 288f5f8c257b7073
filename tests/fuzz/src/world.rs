//! What targets need of a mesh: an authority, and a workload's key and certificate. Made once, with keys of its own.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_agent::identity::{
    Certified,
    key::NodeKey,
    response::{Material, accept},
    roots::TrustRoots,
};
use mesh_api::identity::Identity;
use mesh_control::ca::{Authority, SigningRequest};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};

/// The trust domain of everything here.
const TRUST_DOMAIN: &str = "cluster.local";

/// An authority, and one workload that it certified.
#[derive(Debug)]
pub struct World {
    /// Who the workload is.
    pub identity: Identity,
    /// The request that was signed, PEM.
    pub request: String,
    /// What the authority answered, PEM, in wire order.
    pub answer: Vec<String>,
    /// The workload's key.
    pub key: NodeKey,
    /// The accepted answer.
    pub material: Material,
    /// TLS of the workload.
    pub certified: Certified,
}

impl World {
    /// The one of this process.
    pub fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(Self::new)
    }

    fn new() -> Self {
        let now = SystemTime::now();
        let authority = Authority::ephemeral(TRUST_DOMAIN, Duration::from_secs(24 * 3600), now)
            .expect("an authority can be made");
        let identity = Identity::new(TRUST_DOMAIN, "shop", "cart").expect("plain names");
        let key = NodeKey::generate().expect("a key can be made");
        let request = key.certificate_request(&identity).expect("a request");
        let signing = SigningRequest::from_pem(&request).expect("our own request");
        let signed = authority
            .sign(&signing, &identity, None, now)
            .expect("the authority signs");
        let material = accept(&signed.chain, &key, &identity, seconds(now)).expect("our own chain");
        let roots = TrustRoots::new(material.roots.clone()).expect("roots");
        let clock: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
        let certified = Certified::new(&material, &Arc::new(roots), &clock).expect("TLS");
        Self {
            identity,
            request,
            answer: signed.chain,
            key,
            material,
            certified,
        }
    }
}

/// Seconds since 1970.
pub(crate) fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
