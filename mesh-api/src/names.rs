//! Names that several processes use as keys.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// The primary key of a workload, for example `c1//Pod/shop/cart-0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for WorkloadUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

/// `<namespace>/<name>`: the key of a service (its hostname as the name) or of a policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamespacedName {
    /// The Kubernetes namespace.
    pub namespace: Arc<str>,
    /// The name, or the full hostname of a service.
    pub name: Arc<str>,
}

/// A key that is not `<namespace>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not of the form <namespace>/<name>")]
pub struct NotNamespaced(pub String);

impl NamespacedName {
    /// Builds a key from its two parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::str::FromStr for NamespacedName {
    type Err = NotNamespaced;

    fn from_str(text: &str) -> Result<Self, NotNamespaced> {
        match text.split_once('/') {
            Some((namespace, name)) if !name.is_empty() && !name.contains('/') => {
                Ok(Self::new(namespace, name))
            }
            _ => Err(NotNamespaced(text.to_owned())),
        }
    }
}

impl TryFrom<String> for NamespacedName {
    type Error = NotNamespaced;

    fn try_from(text: String) -> Result<Self, NotNamespaced> {
        text.parse()
    }
}

impl From<NamespacedName> for String {
    fn from(name: NamespacedName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
