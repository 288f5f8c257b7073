//! Certificate signing requests: what is accepted of them.

use mesh_api::identity::Identity;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ECDSA_WITH_SHA256,
        OID_SIG_ECDSA_WITH_SHA384,
    },
    prelude::FromDer,
};

/// Largest request, PEM. One with a P-384 key and one long name stays below 2 KiB.
pub const CSR_MAX_BYTES: usize = 16 * 1024;

/// Why a request was refused. All are the client's fault and are not to be retried unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Larger than [`CSR_MAX_BYTES`].
    #[error("the signing request has {0} bytes, at most {CSR_MAX_BYTES} are allowed")]
    TooLarge(usize),
    /// Not a PEM PKCS#10 request.
    #[error("the signing request is not a PEM PKCS#10 request")]
    Malformed,
    /// The requester does not hold the key.
    #[error("the signature of the signing request does not verify")]
    Signature,
    /// Neither P-256 nor P-384.
    #[error("the key must be ECDSA P-256 (with SHA-256) or P-384 (with SHA-384)")]
    Algorithm,
    /// It asks for names other than its identity.
    #[error("the signing request names {0}, which is not the identity it is for")]
    Name(String),
    /// It names no identity, and none was named beside it.
    #[error("the signing request names no SPIFFE identity")]
    NoIdentity,
}

/// A verified request.
#[derive(Debug)]
pub struct Request {
    public_key: SubjectPublicKeyInfo,
    /// Its subject alternative names; anything but a URI in a form that equals no identity.
    names: Vec<String>,
}

impl Request {
    /// Reads and verifies a PEM request.
    ///
    /// # Errors
    /// See [`CsrError`].
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > CSR_MAX_BYTES {
            return Err(CsrError::TooLarge(pem.len()));
        }
        let (_, block) =
            x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| CsrError::Malformed)?;
        if !matches!(
            block.label.as_str(),
            "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST"
        ) {
            return Err(CsrError::Malformed);
        }
        let (rest, request) =
            X509CertificationRequest::from_der(&block.contents).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        check_algorithm(&request)?;
        request
            .verify_signature()
            .map_err(|_| CsrError::Signature)?;
        let spki = request.certification_request_info.subject_pki.raw;
        let public_key = SubjectPublicKeyInfo::from_der(spki).map_err(|_| CsrError::Algorithm)?;
        let names = request
            .requested_extensions()
            .into_iter()
            .flatten()
            .filter_map(|extension| match extension {
                ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
                _ => None,
            })
            .flatten()
            .map(|name| match name {
                GeneralName::URI(uri) => (*uri).to_owned(),
                other => format!("{other:?}"),
            })
            .collect();
        Ok(Self { public_key, names })
    }

    /// The key to certify.
    #[must_use]
    pub fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public_key
    }

    /// The identity to certify: `impersonated` if given, which the request may repeat but not contradict; else the one
    /// that the request names.
    ///
    /// # Errors
    /// When the request names anything else, or nothing at all.
    pub fn identity(&self, impersonated: Option<Identity>) -> Result<Identity, CsrError> {
        let identity = match (impersonated, self.names.first()) {
            (Some(identity), _) => identity,
            (None, Some(name)) => name.parse().map_err(|_| CsrError::Name(name.clone()))?,
            (None, None) => return Err(CsrError::NoIdentity),
        };
        let wanted = identity.to_string();
        match self.names.iter().find(|name| **name != wanted) {
            Some(other) => Err(CsrError::Name(other.chars().take(200).collect())),
            None => Ok(identity),
        }
    }
}

fn check_algorithm(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    let key = &request.certification_request_info.subject_pki.algorithm;
    let curve = key
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok());
    let signature = &request.signature_algorithm.algorithm;
    let p256 = curve.as_ref() == Some(&OID_EC_P256) && *signature == OID_SIG_ECDSA_WITH_SHA256;
    let p384 = curve.as_ref() == Some(&OID_NIST_EC_P384) && *signature == OID_SIG_ECDSA_WITH_SHA384;
    if key.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && (p256 || p384) {
        return Ok(());
    }
    Err(CsrError::Algorithm)
}
