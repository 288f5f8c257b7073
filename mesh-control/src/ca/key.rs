//! Private keys. Their encoded form is overwritten when they are dropped; the form that signs lives in aws-lc, which
//! overwrites what it frees. Not overwritten is what the libraries copy while they turn text (PEM) into bytes.

use std::sync::Arc;

use rcgen::{KeyPair, PublicKeyData, SignatureAlgorithm};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::SigningKey,
};
use zeroize::{Zeroize, Zeroizing};

/// A key of the authority or of its listener.
pub(super) struct SecretKey(KeyPair);

impl SecretKey {
    /// Makes an ECDSA P-256 key.
    pub fn generate() -> Result<Self, rcgen::Error> {
        KeyPair::generate().map(Self)
    }

    /// Reads a PEM private key; `None` if it is none of a supported kind.
    pub fn from_pem(pem: &str) -> Option<Self> {
        let encoded = Zeroizing::new(PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok()?);
        KeyPair::try_from(&*encoded).ok().map(Self)
    }

    /// PEM, PKCS#8.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// The key as rustls signs with it.
    pub fn for_tls(&self) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        let encoded = PrivatePkcs8KeyDer::from(self.0.serialize_der());
        let encoded = Zeroizing::new(PrivateKeyDer::Pkcs8(encoded));
        aws_lc_rs::sign::any_supported_type(&encoded)
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for SecretKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for SecretKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        rcgen::SigningKey::sign(&self.0, message)
    }
}

#[cfg(test)]
mod tests {
    use mesh_tests::memory::Masked;

    use super::*;

    #[test]
    fn nothing_of_a_dropped_key_stays_in_memory_in_encoded_form() {
        let key = SecretKey::generate().expect("a key");
        let serving = key.for_tls().expect("usable");
        let encoded = Zeroizing::new(key.0.serialize_der());
        // The private scalar alone (RFC 5915 section 3): allocators write over the beginning of what was freed.
        let masked = Masked::new(encoded.get(36..68).expect("PKCS#8 of P-256"));
        drop(encoded);
        assert!(masked.count().expect("readable") > 0, "while it lives");
        drop(key);
        assert_eq!(masked.count().expect("readable"), 0);
        drop(serving);
    }

    #[test]
    fn a_key_survives_its_file() {
        let key = SecretKey::generate().expect("a key");
        let read = SecretKey::from_pem(&key.to_pem()).expect("read back");
        assert_eq!(read.der_bytes(), key.der_bytes());
        assert!(SecretKey::from_pem("noise").is_none());
    }
}
