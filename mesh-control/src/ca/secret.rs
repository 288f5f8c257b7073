//! An authority in a Kubernetes Secret: which of its keys are read.
//!
//! | who made it | certificate | key | root |
//! |---|---|---|---|
//! | Weft, or the user as with `--ca-dir` | `ca-cert.pem` | `ca-key.pem` | `roots.pem`, needed for an intermediate |
//! | Istio's `cacerts` | `ca-cert.pem` | `ca-key.pem` | `root-cert.pem` |
//! | cert-manager, `kubectl create secret tls` | `tls.crt` | `tls.key` | `ca.crt` |

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use k8s_openapi::ByteString;
use zeroize::{Zeroize as _, Zeroizing};

use super::{Authority, CaFilesError, Material, make_root};

/// The data of a Secret.
pub(crate) type Data = BTreeMap<String, ByteString>;

const CERTIFICATE_KEYS: [&str; 2] = ["ca-cert.pem", "tls.crt"];
const KEY_KEYS: [&str; 2] = ["ca-key.pem", "tls.key"];
const ROOT_KEYS: [&str; 3] = ["roots.pem", "root-cert.pem", "ca.crt"];
/// Largest value that is read; a whole Secret has at most 1 MiB.
const VALUE_MAX_BYTES: usize = 1024 * 1024;

/// Why a Secret is no authority.
#[derive(Debug, thiserror::Error)]
pub enum CaSecretError {
    /// A value is missing.
    #[error("has neither {} nor {}", .0[0], .0[1])]
    Missing([&'static str; 2]),
    /// A value is no text.
    #[error("{0} is not PEM")]
    NotText(&'static str),
    /// The values do not make an authority.
    #[error(transparent)]
    Unusable(#[from] CaFilesError),
}

/// Key, certificate and further roots, not checked yet.
pub(crate) struct SecretMaterial {
    material: Material,
    extra_roots: String,
}

impl std::fmt::Debug for SecretMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretMaterial").finish_non_exhaustive()
    }
}

impl SecretMaterial {
    /// Reads the values.
    ///
    /// # Errors
    /// When one is missing or no text.
    pub fn read(data: &Data) -> Result<Self, CaSecretError> {
        let certificate = required(data, CERTIFICATE_KEYS)?;
        let key = required(data, KEY_KEYS)?;
        let mut extra_roots = String::new();
        for name in ROOT_KEYS {
            if let Some(text) = text(data, name)? {
                extra_roots.push_str(text);
                extra_roots.push('\n');
            }
        }
        Ok(Self {
            material: Material {
                key: Zeroizing::new(key.to_owned()),
                certificate: certificate.to_owned(),
            },
            extra_roots,
        })
    }

    /// The same, and leaves no copy of the key behind.
    ///
    /// # Errors
    /// As [`SecretMaterial::read`].
    pub fn take(mut data: Data) -> Result<Self, CaSecretError> {
        let read = Self::read(&data);
        for ByteString(bytes) in data.values_mut() {
            bytes.zeroize();
        }
        read
    }

    /// The authority's certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.material.certificate
    }

    /// Makes a new root.
    ///
    /// # Errors
    /// When the crypto library fails.
    pub fn make(trust_domain: &str, now: SystemTime) -> Result<Self, CaSecretError> {
        let material = make_root(trust_domain, now).map_err(CaFilesError::Make)?;
        Ok(Self {
            material,
            extra_roots: String::new(),
        })
    }

    /// The values, as [`SecretMaterial::read`] reads them.
    pub fn to_data(&self) -> Data {
        let values = [
            (CERTIFICATE_KEYS[0], self.material.certificate.as_str()),
            (KEY_KEYS[0], self.material.key.as_str()),
            (ROOT_KEYS[0], self.extra_roots.as_str()),
        ];
        values
            .into_iter()
            .filter(|(_, text)| !text.trim().is_empty())
            .map(|(name, text)| (name.to_owned(), ByteString(text.as_bytes().to_vec())))
            .collect()
    }

    /// The authority.
    ///
    /// # Errors
    /// When key, certificate and roots do not fit each other.
    pub fn authority(&self, leaf_max_lifetime: Duration) -> Result<Authority, CaSecretError> {
        let authority =
            Authority::from_material(&self.material, &self.extra_roots, leaf_max_lifetime)?;
        Ok(authority)
    }
}

fn required<'a>(data: &'a Data, names: [&'static str; 2]) -> Result<&'a str, CaSecretError> {
    for name in names {
        if let Some(text) = text(data, name)? {
            return Ok(text);
        }
    }
    Err(CaSecretError::Missing(names))
}

fn text<'a>(data: &'a Data, name: &'static str) -> Result<Option<&'a str>, CaSecretError> {
    let Some(ByteString(bytes)) = data.get(name) else {
        return Ok(None);
    };
    let text = std::str::from_utf8(bytes).ok();
    let text = text.filter(|text| text.len() <= VALUE_MAX_BYTES);
    text.map(Some).ok_or(CaSecretError::NotText(name))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn data(values: &[(&str, &str)]) -> Data {
        let pair = |(name, text): &(&str, &str)| {
            ((*name).to_owned(), ByteString(text.as_bytes().to_vec()))
        };
        values.iter().map(pair).collect()
    }

    fn opened(data: &Data) -> Result<Authority, CaSecretError> {
        SecretMaterial::read(data)?.authority(DAY)
    }

    #[test]
    fn what_was_made_is_read_again() {
        let made = SecretMaterial::make("cluster.local", SystemTime::now()).expect("made");
        let again = opened(&made.to_data()).expect("readable");
        let first = made.authority(DAY).expect("usable");
        assert_eq!(again.roots_pem(), first.roots_pem());
    }

    #[test]
    fn a_secret_of_cert_manager_is_an_authority() {
        let root = make_root("cluster.local", SystemTime::now()).expect("root");
        let own = data(&[
            ("tls.crt", &root.certificate),
            ("tls.key", &root.key),
            ("ca.crt", &root.certificate),
        ]);
        let authority = opened(&own).expect("a self-signed one");
        assert_eq!(authority.roots_pem().matches("BEGIN").count(), 1);

        let issuer = Issuer::from_ca_cert_pem(
            &root.certificate,
            KeyPair::from_pem(&root.key).expect("key"),
        );
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "between");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().expect("key");
        let between = params
            .signed_by(&key, &issuer.expect("issuer"))
            .expect("signed")
            .pem();
        let key = key.serialize_pem();
        let with_root = [
            ("tls.crt", between.as_str()),
            ("tls.key", &key),
            ("ca.crt", &root.certificate),
        ];
        let authority = opened(&data(&with_root)).expect("an intermediate");
        assert_eq!(authority.roots_pem().trim(), root.certificate.trim());
        let without_root = opened(&data(&with_root[..2]));
        assert!(matches!(without_root, Err(CaSecretError::Unusable(_))));
    }

    /// As `openssl ecparam -genkey` and cert-manager write it (RFC 5915). It is no secret.
    const SEC1_KEY: &str = "-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIBHJ7UteZ/2jpl6dk9wD1WJEhOj8QzKaDfNZ5XnlFcEHoAoGCCqGSM49
AwEHoUQDQgAEEvDmNfnqd/Mlho2PEVJm7KMolCk+tMSZ3r88PpMbrebRIu/nIkiL
sGBKHYElQojjYjhCf3sKFtiyTSfd0sc/VQ==
-----END EC PRIVATE KEY-----
";

    #[test]
    fn a_key_in_the_older_form_is_read() {
        let key = KeyPair::from_pem(SEC1_KEY).expect("readable");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed").pem();
        opened(&data(&[("tls.crt", &certificate), ("tls.key", SEC1_KEY)])).expect("an authority");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = opened(&data(&[("tls.crt", "x")])).expect_err("no key");
        assert_eq!(error.to_string(), "has neither ca-key.pem nor tls.key");
        let binary = BTreeMap::from([("tls.crt".to_owned(), ByteString(vec![0xff]))]);
        assert!(matches!(
            opened(&binary),
            Err(CaSecretError::NotText("tls.crt"))
        ));
    }
}
