//! Private keys of workloads: made here, kept in memory, never written anywhere.

use std::{fmt, sync::Arc};

use mesh_api::identity::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::{
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::SigningKey,
};
use zeroize::{Zeroize, Zeroizing};

/// An ECDSA P-256 key pair. Its encoded form is overwritten when it is dropped; the form that signs lives in
/// aws-lc, which overwrites what it frees.
pub struct NodeKey {
    pair: KeyPair,
}

/// The cryptographic library failed; nothing that a peer or an operator sent can cause it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action}: {detail}")]
pub struct KeyError {
    action: &'static str,
    detail: String,
}

impl KeyError {
    fn new(action: &'static str, detail: &dyn fmt::Display) -> Self {
        Self {
            action,
            detail: detail.to_string(),
        }
    }
}

impl NodeKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate() -> Result<Self, KeyError> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
            .map(|pair| Self { pair })
            .map_err(|error| KeyError::new("make a key", &error))
    }

    /// A PKCS#10 request in PEM: empty subject, and one critical subject alternative name (RFC 5280 section 4.2.1.6:
    /// critical because the subject is empty) with the identity as its only URI.
    ///
    /// # Errors
    /// When signing fails.
    pub fn certificate_request(&self, identity: &Identity) -> Result<String, KeyError> {
        let failed = |error: rcgen::Error| KeyError::new("make a certificate request", &error);
        let uri = identity.to_string().try_into().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        params
            .serialize_request(&self.pair)
            .and_then(|request| request.pem())
            .map_err(failed)
    }

    /// The public key as a `SubjectPublicKeyInfo` (RFC 5280 section 4.1), in DER.
    #[must_use]
    pub fn public_key_info(&self) -> Vec<u8> {
        self.pair.subject_public_key_info()
    }

    /// The key as rustls signs with it.
    ///
    /// # Errors
    /// When the library does not accept its own key.
    pub fn signing_key(&self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let encoded = Zeroizing::new(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(
            self.pair.serialize_der(),
        )));
        rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&encoded)
            .map_err(|error| KeyError::new("load the new key", &error))
    }
}

impl Drop for NodeKey {
    fn drop(&mut self) {
        self.pair.zeroize();
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use mesh_tests::memory::Masked;
    use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

    use super::*;

    #[test]
    fn the_request_has_an_empty_subject_and_one_critical_uri() {
        let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web"
            .parse()
            .expect("valid");
        let key = NodeKey::generate().expect("a key");
        let pem = key.certificate_request(&identity).expect("a request");
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let (_, request) = X509CertificationRequest::from_der(&block.contents).expect("PKCS#10");
        let info = &request.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        assert_eq!(info.subject_pki.raw, key.public_key_info());
        assert_eq!(
            request.signature_algorithm.algorithm.to_id_string(),
            "1.2.840.10045.4.3.2",
            "ECDSA with SHA-256"
        );
        let names: Vec<_> = request
            .requested_extensions()
            .expect("extensions")
            .collect();
        let [ParsedExtension::SubjectAlternativeName(san)] = names[..] else {
            panic!("only a SAN, got {names:?}")
        };
        let [GeneralName::URI(uri)] = san.general_names[..] else {
            panic!("one URI, got {san:?}")
        };
        assert_eq!(uri, identity.to_string());
        // 06 03 55 1d 11 is the OID of subjectAltName; 01 01 ff is BOOLEAN TRUE, the critical flag.
        let critical = [0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff];
        assert!(
            block
                .contents
                .windows(critical.len())
                .any(|bytes| bytes == critical)
        );
    }

    #[test]
    fn nothing_of_a_dropped_key_stays_in_memory_in_encoded_form() {
        let key = NodeKey::generate().expect("a key");
        let identity = "spiffe://cluster.local/ns/shop/sa/web".parse();
        key.certificate_request(&identity.expect("valid"))
            .expect("a request");
        let signing = key.signing_key().expect("usable");
        let encoded = Zeroizing::new(key.pair.serialize_der());
        // The private scalar alone (RFC 5915 section 3): allocators write over the beginning of what was freed.
        let masked = Masked::new(encoded.get(36..68).expect("PKCS#8 of P-256"));
        drop(encoded);
        assert!(masked.count().expect("readable") > 0, "while it lives");
        drop(key);
        assert_eq!(masked.count().expect("readable"), 0);
        drop(signing);
    }

    #[test]
    fn a_key_never_prints_itself() {
        let key = NodeKey::generate().expect("a key");
        assert_eq!(format!("{key:?}"), "NodeKey(..)");
    }
}
