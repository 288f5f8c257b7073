//! The set of root certificates that peers are verified against.

use rustls::pki_types::{CertificateDer, TrustAnchor};
use sha2::{Digest, Sha256};

/// Most roots accepted in one set. A rotation needs two; a handful of clusters that trust each other needs one each.
pub const ROOTS_MAX: usize = 64;

/// A sorted set of roots, ready for path building.
#[derive(Debug)]
pub struct TrustRoots {
    certificates: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    fingerprint: [u8; 32],
}

/// Why a set of roots is unusable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootsError {
    /// There is none.
    #[error("the certificate authority sent no root")]
    Empty,
    /// More than [`ROOTS_MAX`].
    #[error("{0} roots, at most {ROOTS_MAX} are accepted")]
    TooMany(usize),
    /// One is not a certificate.
    #[error("a root is not a usable certificate: {0}")]
    Malformed(String),
}

impl TrustRoots {
    /// Sorts, removes repeats and parses.
    ///
    /// # Errors
    /// When the set is empty, too large or holds something that is not a certificate.
    pub fn new(mut certificates: Vec<CertificateDer<'static>>) -> Result<Self, RootsError> {
        certificates.sort_unstable_by(|a, b| a.as_ref().cmp(b.as_ref()));
        certificates.dedup();
        if certificates.is_empty() {
            return Err(RootsError::Empty);
        }
        if certificates.len() > ROOTS_MAX {
            return Err(RootsError::TooMany(certificates.len()));
        }
        let anchors = certificates
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| RootsError::Malformed(error.to_string()))?;
        let mut hash = Sha256::new();
        for root in &certificates {
            // The length keeps two different sets from hashing the same bytes.
            hash.update((root.len() as u64).to_be_bytes());
            hash.update(root);
        }
        Ok(Self {
            certificates,
            anchors,
            fingerprint: hash.finalize().into(),
        })
    }

    /// The certificates, sorted.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// SHA-256 over the sorted set.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::TestCa;

    #[test]
    fn order_and_repeats_do_not_change_the_fingerprint() {
        let (a, b) = (TestCa::new("a").root(), TestCa::new("b").root());
        let one = TrustRoots::new(vec![a.clone(), b.clone(), a.clone()]).expect("two roots");
        let other = TrustRoots::new(vec![b, a.clone()]).expect("two roots");
        assert_eq!(one.fingerprint(), other.fingerprint());
        assert_eq!(one.certificates().len(), 2);
        assert_ne!(
            TrustRoots::new(vec![a]).expect("one root").fingerprint(),
            one.fingerprint()
        );
    }

    #[test]
    fn empty_malformed_and_oversize_sets_are_refused() {
        assert_eq!(TrustRoots::new(Vec::new()).err(), Some(RootsError::Empty));
        let garbage = CertificateDer::from(b"not DER".to_vec());
        assert!(matches!(
            TrustRoots::new(vec![garbage]),
            Err(RootsError::Malformed(_))
        ));
        let many: Vec<_> = (0..=ROOTS_MAX)
            .map(|n| CertificateDer::from(n.to_be_bytes().to_vec()))
            .collect();
        assert_eq!(
            TrustRoots::new(many).err(),
            Some(RootsError::TooMany(ROOTS_MAX + 1))
        );
    }
}
