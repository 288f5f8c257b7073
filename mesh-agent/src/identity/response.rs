//! Judging what a certificate authority answered, before anything uses it.

use std::sync::Arc;

use mesh_api::identity::Identity;
use rustls::{
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    sign::SigningKey,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    key::{KeyError, NodeKey},
    peer_identity,
    roots::{RootsError, TrustRoots},
    tls::{PeerRejection, Usage, utc, verify_path},
};

/// Longest chain accepted, root element included: leaf, root and a few intermediates.
pub const CHAIN_MAX: usize = 10;
/// Shortest remaining life worth having, seconds: less could not be renewed in time.
pub const REMAINING_MIN_S: i64 = 5;
/// Longest life accepted, seconds (366 days). A workload certificate of more is a misconfigured authority: it could
/// not be withdrawn in any useful time.
pub const LIFETIME_MAX_S: i64 = 366 * 24 * 3600;
/// How far the authority's clock may be ahead of ours, seconds, before its certificates are refused as not yet valid.
pub const CLOCK_SKEW_MAX_S: i64 = 300;

/// An accepted answer: key, chain and roots that belong together.
#[derive(Debug)]
pub struct Material {
    /// Whose it is.
    pub identity: Identity,
    /// Leaf first, then intermediates; without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: Arc<dyn SigningKey>,
    /// The roots that came with it.
    pub roots: Vec<CertificateDer<'static>>,
    /// Start of validity, seconds since 1970.
    pub not_before: i64,
    /// End of validity, seconds since 1970.
    pub not_after: i64,
    /// Serial number of the leaf, hexadecimal.
    pub serial: String,
}

/// Why an answer was refused. All of these are the authority's doing (or a clock's); asking again may help.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ResponseError {
    /// Not between two and [`CHAIN_MAX`] elements.
    #[error("the chain has {0} elements; leaf first and roots last make 2 to {CHAIN_MAX}")]
    Length(usize),
    /// An element holds no certificate in PEM.
    #[error("element {0} of the chain holds no PEM certificate")]
    Pem(usize),
    /// The leaf is not a certificate.
    #[error("the leaf is not an X.509 certificate: {0}")]
    Malformed(String),
    /// The leaf was made for another key.
    #[error("the certificate is not for the key that was sent")]
    ForeignKey,
    /// The leaf names somebody else.
    #[error("asked for {asked}, the certificate is for {}", .given.as_ref().map_or("nobody in the mesh".to_owned(), ToString::to_string))]
    WrongIdentity {
        /// Who was asked for.
        asked: Identity,
        /// Who is in the leaf.
        given: Option<Identity>,
    },
    /// The leaf is over, or nearly.
    #[error("the certificate ends at {}, it is {} here; check both clocks", utc(*.not_after), utc(*.now))]
    Expired {
        /// Our clock, seconds since 1970.
        now: i64,
        /// End of validity, seconds since 1970.
        not_after: i64,
    },
    /// The leaf begins later than [`CLOCK_SKEW_MAX_S`] from now.
    #[error("the certificate begins at {}, it is {} here; check both clocks", utc(*.not_before), utc(*.now))]
    NotYetValid {
        /// Our clock, seconds since 1970.
        now: i64,
        /// Start of validity, seconds since 1970.
        not_before: i64,
    },
    /// Longer than [`LIFETIME_MAX_S`].
    #[error("the certificate lives {0} s, at most {LIFETIME_MAX_S} s are accepted")]
    Lifetime(i64),
    /// The roots are unusable.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The chain does not lead to the roots that came with it, or may not be used for both ends of TLS.
    #[error("the chain does not hold against the roots it came with: {0}")]
    Path(Box<PeerRejection>),
    /// Our own cryptographic library failed.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Accepts or refuses `cert_chain` of a response (wire order: leaf, intermediates, roots) to a request for `identity`
/// with `key`. `now` is the wall clock, seconds since 1970.
///
/// # Errors
/// The first thing found wrong.
pub fn accept(
    cert_chain: &[String],
    key: &NodeKey,
    identity: &Identity,
    now: i64,
) -> Result<Material, ResponseError> {
    let (chain, roots) = split(cert_chain)?;
    let leaf_der = chain.first().ok_or(ResponseError::Length(0))?;
    let (_, leaf) = X509Certificate::from_der(leaf_der)
        .map_err(|error| ResponseError::Malformed(error.to_string()))?;
    if leaf.public_key().raw != key.public_key_info() {
        return Err(ResponseError::ForeignKey);
    }
    let given = peer_identity(Some(&chain));
    if given.as_ref() != Some(identity) {
        return Err(ResponseError::WrongIdentity {
            asked: identity.clone(),
            given,
        });
    }
    let (not_before, not_after) = (
        leaf.validity().not_before.timestamp(),
        leaf.validity().not_after.timestamp(),
    );
    check_validity(not_before, not_after, now)?;
    let trust = TrustRoots::new(roots)?;
    // A certificate that begins within the tolerated skew is verified at its beginning.
    let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(
        now.max(not_before).max(0).unsigned_abs(),
    ));
    for usage in [Usage::Server, Usage::Client] {
        verify_path(
            &trust,
            leaf_der,
            chain.get(1..).unwrap_or_default(),
            at,
            usage,
        )
        .map_err(|error| ResponseError::Path(Box::new(PeerRejection::from(error))))?;
    }
    let serial = leaf
        .raw_serial()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let (key, roots) = (key.signing_key()?, trust.certificates().to_vec());
    Ok(Material {
        identity: identity.clone(),
        chain,
        key,
        roots,
        not_before,
        not_after,
        serial,
    })
}

type Certificates = Vec<CertificateDer<'static>>;

fn split(cert_chain: &[String]) -> Result<(Certificates, Certificates), ResponseError> {
    let [certificates @ .., roots] = cert_chain else {
        return Err(ResponseError::Length(0));
    };
    if certificates.is_empty() || cert_chain.len() > CHAIN_MAX {
        return Err(ResponseError::Length(cert_chain.len()));
    }
    let first_block = |(index, pem): (usize, &String)| {
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| ResponseError::Pem(index))
    };
    let chain = certificates
        .iter()
        .enumerate()
        .map(first_block)
        .collect::<Result<_, _>>()?;
    let roots = CertificateDer::pem_slice_iter(roots.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| ResponseError::Pem(certificates.len()))?;
    Ok((chain, roots))
}

fn check_validity(not_before: i64, not_after: i64, now: i64) -> Result<(), ResponseError> {
    if not_after.saturating_sub(now) < REMAINING_MIN_S {
        return Err(ResponseError::Expired { now, not_after });
    }
    if not_before.saturating_sub(now) > CLOCK_SKEW_MAX_S {
        return Err(ResponseError::NotYetValid { now, not_before });
    }
    let lifetime = not_after.saturating_sub(not_before);
    if lifetime > LIFETIME_MAX_S {
        return Err(ResponseError::Lifetime(lifetime));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{NOW, TestCa, identity};

    struct Asked {
        key: NodeKey,
        web: Identity,
        request: String,
    }

    fn asked() -> Asked {
        let (key, web) = (NodeKey::generate().expect("a key"), identity("web"));
        let request = key.certificate_request(&web).expect("a request");
        Asked { key, web, request }
    }

    #[test]
    fn a_good_answer_is_accepted_with_and_without_an_intermediate() {
        let Asked { key, web, request } = asked();
        let ca = TestCa::new("root");
        let material =
            accept(&ca.sign(&request, NOW - 60, NOW + 3600), &key, &web, NOW).expect("accepted");
        assert_eq!(
            (material.not_before, material.not_after),
            (NOW - 60, NOW + 3600)
        );
        assert_eq!(material.roots, [ca.root()]);
        let below = ca.intermediate("below");
        let material =
            accept(&below.sign(&request, NOW - 60, NOW + 3600), &key, &web, NOW).expect("accepted");
        assert_eq!(material.chain.len(), 2);
        assert_eq!(material.roots, [ca.root()]);
    }

    #[test]
    fn several_roots_are_accepted_and_kept() {
        let Asked { key, web, request } = asked();
        let (old, new) = (TestCa::new("old"), TestCa::new("new"));
        let mut answer = new.sign(&request, NOW - 60, NOW + 3600);
        answer[1].push_str(&old.root_pem());
        let material = accept(&answer, &key, &web, NOW).expect("accepted");
        assert_eq!(material.roots.len(), 2);
    }

    #[test]
    fn an_answer_for_somebody_else_is_refused() {
        let Asked { key, web, request } = asked();
        let answer = TestCa::new("root").sign(&request, NOW - 60, NOW + 3600);
        let error = accept(&answer, &key, &identity("admin"), NOW).expect_err("refused");
        assert_eq!(
            error,
            ResponseError::WrongIdentity {
                asked: identity("admin"),
                given: Some(web.clone())
            }
        );
        let error =
            accept(&answer, &NodeKey::generate().expect("a key"), &web, NOW).expect_err("refused");
        assert_eq!(error, ResponseError::ForeignKey);
    }

    #[test]
    fn a_chain_to_other_roots_is_refused() {
        let Asked { key, web, request } = asked();
        let mut answer = TestCa::new("root").sign(&request, NOW - 60, NOW + 3600);
        answer[1] = TestCa::new("root").root_pem();
        assert!(matches!(
            accept(&answer, &key, &web, NOW),
            Err(ResponseError::Path(_))
        ));
    }

    #[test]
    fn validity_is_judged_with_both_times() {
        let Asked { key, web, request } = asked();
        let ca = TestCa::new("root");
        let judge = |from, to| accept(&ca.sign(&request, from, to), &key, &web, NOW).map(|_| ());
        let over = NOW + REMAINING_MIN_S - 1;
        assert_eq!(
            judge(NOW - 60, over),
            Err(ResponseError::Expired {
                now: NOW,
                not_after: over
            })
        );
        assert_eq!(judge(NOW + CLOCK_SKEW_MAX_S, NOW + 3600), Ok(()));
        let late = NOW + CLOCK_SKEW_MAX_S + 1;
        assert_eq!(
            judge(late, NOW + 3600),
            Err(ResponseError::NotYetValid {
                now: NOW,
                not_before: late
            })
        );
        assert_eq!(judge(NOW, NOW + LIFETIME_MAX_S), Ok(()));
        assert_eq!(
            judge(NOW, NOW + LIFETIME_MAX_S + 1),
            Err(ResponseError::Lifetime(LIFETIME_MAX_S + 1))
        );
        let message = judge(late, NOW + 3600)
            .expect_err("not yet valid")
            .to_string();
        assert!(
            message.contains("2030") && message.contains("check both clocks"),
            "{message}"
        );
    }

    #[test]
    fn malformed_answers_are_refused() {
        let Asked { key, web, request } = asked();
        let good = TestCa::new("root").sign(&request, NOW - 60, NOW + 3600);
        let judge = |chain: &[String]| {
            accept(chain, &key, &web, NOW)
                .map(|_| ())
                .expect_err("refused")
        };
        assert_eq!(judge(&[]), ResponseError::Length(0));
        assert_eq!(judge(&good[..1]), ResponseError::Length(1));
        assert_eq!(
            judge(&vec![good[0].clone(); CHAIN_MAX + 1]),
            ResponseError::Length(CHAIN_MAX + 1)
        );
        assert_eq!(
            judge(&["garbage".to_owned(), good[1].clone()]),
            ResponseError::Pem(0)
        );
        assert_eq!(
            judge(&[good[0].clone(), String::new()]),
            ResponseError::Roots(RootsError::Empty)
        );
        let empty = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
        assert!(matches!(
            judge(&[empty, good[1].clone()]),
            ResponseError::Malformed(_)
        ));
    }
}
