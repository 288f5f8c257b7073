//! SPIFFE identities of the one form that the mesh uses: `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Longest identity accepted, in bytes (SPIFFE-ID specification, section 2.3: 2048).
pub const IDENTITY_MAX_BYTES: usize = 2048;

/// A workload identity. Cheap to clone; compared by value.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    trust_domain: Arc<str>,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// Why a string is not an [`Identity`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It does not start with `spiffe://`.
    #[error("identity {0:?} does not start with spiffe://")]
    Scheme(String),
    /// It is not `<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error(
        "identity {0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>"
    )]
    Shape(String),
    /// A part is empty or holds a character that a SPIFFE path segment may not hold.
    #[error("identity has an unusable {part}: {value:?}")]
    Part {
        /// Which part.
        part: &'static str,
        /// What it was.
        value: String,
    },
    /// Longer than [`IDENTITY_MAX_BYTES`].
    #[error("identity is {0} bytes long, at most {IDENTITY_MAX_BYTES} are allowed")]
    TooLong(usize),
}

impl Identity {
    /// Builds an identity from its three parts.
    ///
    /// # Errors
    /// [`IdentityError::Part`] when a part is empty or not made of `[A-Za-z0-9._-]`.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        check_part("trust domain", trust_domain)?;
        check_part("namespace", namespace)?;
        check_part("service account", service_account)?;
        Ok(Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    /// The trust domain, without the scheme.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account's name.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// The identity without `spiffe://`, the form in which authorization policies name principals.
    #[must_use]
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// SPIFFE-ID specification, sections 2.1 and 2.2: letters, digits, dots, dashes and underscores.
fn check_part(part: &'static str, value: &str) -> Result<(), IdentityError> {
    let usable = value
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if value.is_empty() || value == "." || value == ".." || !usable {
        return Err(IdentityError::Part {
            part,
            value: value.chars().take(64).collect(),
        });
    }
    Ok(())
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.len() > IDENTITY_MAX_BYTES {
            return Err(IdentityError::TooLong(text.len()));
        }
        let rest = text
            .strip_prefix("spiffe://")
            .ok_or_else(|| IdentityError::Scheme(text.to_owned()))?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts[..] else {
            return Err(IdentityError::Shape(text.to_owned()));
        };
        Self::new(trust_domain, namespace, service_account)
    }
}

impl TryFrom<String> for Identity {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, IdentityError> {
        text.parse()
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints_the_canonical_form() {
        let text = "spiffe://cluster.local/ns/shop/sa/web";
        let identity: Identity = text.parse().expect("canonical");
        assert_eq!(identity.to_string(), text);
        assert_eq!(identity.principal(), "cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn refuses_everything_else() {
        for bad in [
            "",
            "spiffe://",
            "https://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/web/extra",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/shop/sa/we b",
            "spiffe://cluster.local/ns/../sa/web",
            "spiffe://cluster.local:80/ns/shop/sa/web",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?} must be refused");
        }
        let long = format!(
            "spiffe://cluster.local/ns/{}/sa/web",
            "n".repeat(IDENTITY_MAX_BYTES)
        );
        assert!(matches!(
            long.parse::<Identity>(),
            Err(IdentityError::TooLong(_))
        ));
    }
}
