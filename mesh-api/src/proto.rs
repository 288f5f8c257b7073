//! Generated protobuf types and gRPC stubs (`proto/*.proto`).
#![allow(missing_docs, clippy::all, rust_2018_idioms, unused_qualifications)]

/// `istio.workload`: workloads and services.
pub mod workload {
    tonic::include_proto!("istio.workload");

    /// Type URL of [`Address`].
    pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
}

/// `istio.security`: L4 authorization.
pub mod security {
    tonic::include_proto!("istio.security");

    /// Type URL of [`Authorization`].
    pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
}

/// `istio.v1.auth`: certificate signing.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}

/// `envoy.service.discovery.v3`: delta xDS.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// `weft.v1`: Weft's own extensions.
pub mod weft {
    tonic::include_proto!("weft.v1");

    /// Name of the workload extension that carries [`Capture`].
    pub const CAPTURE_EXTENSION: &str = "weft.dev/capture";
    /// Type URL of [`Capture`] inside the extension's `Any`.
    pub const CAPTURE_TYPE_URL: &str = "type.googleapis.com/weft.v1.Capture";
}
