//! The certificate authority: its key, what it signs, and the service that agents call.

mod csr;
mod files;
mod key;
pub(crate) mod roots;
pub(crate) mod rotation;
pub(crate) mod secret;
mod service;

use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_api::identity::Identity;
use rand::{Rng, rngs::ThreadRng};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use rustls::{pki_types::CertificateDer, sign::SigningKey};
use zeroize::Zeroizing;

pub use csr::{CSR_MAX_BYTES, CsrError, Request as SigningRequest};
pub use files::CaFilesError;
use key::SecretKey;
pub use secret::CaSecretError;
pub(crate) use service::{CaService, service as grpc_service};

/// How far certificates reach back: clocks of nodes may differ that much from the control plane's.
pub const BACKDATE: Duration = Duration::from_secs(5 * 60);
/// Lifetime of a root that the control plane makes: ten years, since replacing it needs the overlap of `roots.pem`.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Lifetime of the serving certificate; renewed at half of it.
pub const SERVING_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Random bytes of a serial number; RFC 5280 section 4.1.2.2 allows 20 octets.
const SERIAL_BYTES: usize = 16;

/// Why something could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The authority's own certificate has expired or is about to: nothing can be signed until it is replaced.
    #[error("the authority's certificate ends before a new certificate could begin; replace it")]
    AuthorityExpired,
    /// A serving name is neither a DNS name nor an address.
    #[error("{name:?} cannot be a name of a certificate")]
    Name {
        /// The name.
        name: String,
    },
    /// The crypto library refused.
    #[error("signing failed: {0}")]
    Library(#[from] rcgen::Error),
    /// The TLS library refused a key of ours.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// The authority. Its key never leaves it.
pub struct Authority {
    issuer: Issuer<'static, SecretKey>,
    /// PEM of the own certificate when it is not itself a root.
    intermediate: Option<String>,
    roots: String,
    not_after: SystemTime,
    leaf_max_lifetime: Duration,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A signed workload certificate.
#[derive(Debug, Clone)]
pub struct Signed {
    /// PEM: leaf, intermediates, and last all roots.
    pub chain: Vec<String>,
    /// End of validity.
    pub not_after: SystemTime,
}

/// A certificate and key for the control plane's own listener.
#[derive(Debug)]
pub struct ServingCertificate {
    /// DER: leaf and intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: std::sync::Arc<dyn SigningKey>,
}

/// A key and certificate of an authority, PEM.
struct Material {
    key: Zeroizing<String>,
    certificate: String,
}

impl Authority {
    /// Makes an authority whose key exists in this process only.
    ///
    /// # Errors
    /// When the crypto library fails.
    pub fn ephemeral(
        trust_domain: &str,
        leaf_max_lifetime: Duration,
        now: SystemTime,
    ) -> Result<Self, CaFilesError> {
        let material = make_root(trust_domain, now).map_err(CaFilesError::Make)?;
        Self::from_material(&material, "", leaf_max_lifetime)
    }

    /// All trusted roots, PEM.
    #[must_use]
    pub fn roots_pem(&self) -> &str {
        &self.roots
    }

    /// The same authority, beside which others are trusted too.
    #[must_use]
    pub(crate) fn with_roots(mut self, roots_pem: String) -> Self {
        self.roots = roots_pem;
        self
    }

    /// End of the authority's own validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a workload certificate. The caller has made sure that `identity` belongs to whoever asks.
    ///
    /// # Errors
    /// When the authority has expired or the crypto library fails.
    pub fn sign(
        &self,
        request: &SigningRequest,
        identity: &Identity,
        requested: Option<Duration>,
        now: SystemTime,
    ) -> Result<Signed, SignError> {
        let lifetime = requested
            .unwrap_or(self.leaf_max_lifetime)
            .min(self.leaf_max_lifetime);
        let mut params = CertificateParams::default();
        let uri = identity.to_string();
        let uri = uri.try_into().map_err(|_| SignError::Name {
            name: identity.to_string(),
        })?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let not_after = self.fill(&mut params, lifetime, now)?;
        let leaf = params.signed_by(request.public_key(), &self.issuer)?.pem();
        let mut chain = vec![leaf];
        chain.extend(self.intermediate.clone());
        chain.push(self.roots.clone());
        Ok(Signed { chain, not_after })
    }

    /// Makes a certificate for the control plane's own listener.
    ///
    /// # Errors
    /// When a name is unusable, the authority has expired or the crypto library fails.
    pub fn serving(
        &self,
        names: &[String],
        now: SystemTime,
    ) -> Result<ServingCertificate, SignError> {
        let key = SecretKey::generate()?;
        let mut params = CertificateParams::default();
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    name.as_str()
                        .try_into()
                        .map_err(|_| SignError::Name { name: name.clone() })?,
                ),
            });
        }
        self.fill(&mut params, SERVING_LIFETIME, now)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        if let Some(pem) = &self.intermediate {
            chain.extend(files::certificates(pem).unwrap_or_default());
        }
        let key = key.for_tls()?;
        Ok(ServingCertificate { chain, key })
    }

    /// What all leaves have in common. Returns the end of validity.
    fn fill(
        &self,
        params: &mut CertificateParams,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<SystemTime, SignError> {
        let not_after = (now + lifetime).min(self.not_after);
        if not_after <= now {
            return Err(SignError::AuthorityExpired);
        }
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        set_validity(params, now - BACKDATE, not_after);
        Ok(not_after)
    }

    fn from_material(
        material: &Material,
        extra_roots: &str,
        leaf_max_lifetime: Duration,
    ) -> Result<Self, CaFilesError> {
        let key = SecretKey::from_pem(&material.key).ok_or(CaFilesError::Key)?;
        let checked = files::check_authority(&material.certificate, key.der_bytes(), extra_roots)?;
        let issuer = Issuer::from_ca_cert_der(&checked.certificate, key)
            .map_err(|_| CaFilesError::Certificate("is not one that this program can sign with"))?;
        Ok(Self {
            issuer,
            intermediate: checked.intermediate,
            roots: checked.roots,
            not_after: checked.not_after,
            leaf_max_lifetime,
        })
    }
}

fn make_root(trust_domain: &str, now: SystemTime) -> Result<Material, rcgen::Error> {
    let key = SecretKey::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    params
        .distinguished_name
        .push(DnType::CommonName, "Weft root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    set_validity(&mut params, now - BACKDATE, now + ROOT_LIFETIME);
    let certificate = params.self_signed(&key)?.pem();
    Ok(Material {
        key: key.to_pem(),
        certificate,
    })
}

/// A positive random number: the first bit is cleared.
fn serial() -> SerialNumber {
    let mut bytes = [0_u8; SERIAL_BYTES];
    ThreadRng::default().fill(&mut bytes);
    bytes[0] = (bytes[0] & 0x7f) | 0x01;
    SerialNumber::from_slice(&bytes)
}

fn set_validity(params: &mut CertificateParams, not_before: SystemTime, not_after: SystemTime) {
    // Certificates count whole seconds.
    let seconds = |time: SystemTime| {
        Duration::from_secs(
            time.duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
        )
    };
    params.not_before = date_time_ymd(1970, 1, 1) + seconds(not_before);
    params.not_after = date_time_ymd(1970, 1, 1) + seconds(not_after);
}

#[cfg(test)]
mod tests;
