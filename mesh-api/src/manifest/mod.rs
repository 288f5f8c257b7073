//! Manifests that users write: placeholder.
