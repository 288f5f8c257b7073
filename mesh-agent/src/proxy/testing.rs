//! Values that several tests of the proxy use.

use std::{path::Path, sync::Arc};

use mesh_api::identity::Identity;

use crate::{
    capture::LocalWorkload,
    discovery::model::{CaptureSettings, Locality, Tunnel, Workload},
    sys::netns::Netns,
};

/// A workload of namespace `shop` that lives in this process's own network namespace.
pub fn local(name: &str) -> Arc<LocalWorkload> {
    Arc::new(LocalWorkload {
        namespace: "shop".into(),
        name: name.into(),
        netns: Arc::new(Netns::open(Path::new("/proc/self/ns/net")).expect("own namespace")),
        addresses: Vec::new(),
        workload: Default::default(),
        holds: Default::default(),
    })
}

/// An identity of namespace `shop`.
pub fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account).expect("plain name")
}

/// A workload of namespace `shop`.
pub fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/shop/{name}").as_str().into(),
        name: name.into(),
        namespace: "shop".into(),
        identity: identity(name),
        addresses: vec![address.parse().expect("literal address")],
        network: "".into(),
        tunnel: Tunnel::Hbone,
        node: "node-a".into(),
        cluster: "c1".into(),
        canonical_name: name.into(),
        canonical_revision: Arc::from(""),
        workload_type: "deployment",
        workload_name: name.into(),
        healthy: true,
        host_network: false,
        locality: Locality::default(),
        capacity: 1,
        services: Default::default(),
        policies: Vec::new(),
        capture: CaptureSettings::default(),
    }
}
