//! What exists and what is allowed: manifests, and resources of the discovery stream.

use std::sync::Arc;

use mesh_agent::{
    discovery::{MeshState, Update},
    policy::{Connection, authorize},
};
use mesh_api::{manifest::parse, proto::workload as wire};
use mesh_control::{
    config::MeshConfig,
    index::{Change, Index, ResourceType},
};
use prost::Message as _;

use crate::World;

/// First line: the resource's name; empty: the name that the message gives itself. Then the message.
pub(crate) fn xds_address(bytes: &[u8]) {
    let (name, body) = crate::two_parts(bytes);
    let mut name = String::from_utf8_lossy(name).into_owned();
    if name.is_empty()
        && let Ok(address) = wire::Address::decode(body)
    {
        name = match address.r#type {
            Some(wire::address::Type::Workload(workload)) => workload.uid,
            Some(wire::address::Type::Service(service)) => {
                format!("{}/{}", service.namespace, service.hostname)
            }
            None => name,
        };
    }
    let mut state = MeshState::new("");
    match Update::address(&name, body) {
        Ok(update) => {
            state.apply(update.clone());
            // Applied again it changes nothing; taken away nothing stays.
            assert!(!state.apply(update), "{name:?} differs from itself");
            use_everything(&state);
            state.apply(Update::remove_address(&name));
            let counts = state.counts();
            assert_eq!((counts.workloads, counts.services), (0, 0), "{name:?}");
        }
        Err(rejected) => drop(rejected.to_string()),
    }
}

/// Asks what is known of every workload, as connections and operators do.
fn use_everything(state: &MeshState) {
    drop(state.dump().to_string());
    drop(state.dead_destinations());
    for address in [
        "10.1.0.5",
        "fd00::5",
        "10.96.0.7",
        "0.0.0.0",
        "255.255.255.255",
    ] {
        let address = address.parse().expect("a literal");
        let Some(workload) = state.workload_by_address(address) else {
            continue;
        };
        assert!(workload.capacity > 0);
        for port in [1, 80, u16::MAX] {
            drop(state.route(&workload, (address, port).into()));
            for peer in [None, Some(World::get().identity.clone())] {
                let connection = Connection {
                    peer,
                    source: address,
                    destination: (address, port).into(),
                };
                drop(authorize(state, &workload, &connection));
            }
        }
    }
}

/// The workload that policies are applied to.
fn victim(policy: &str) -> wire::Workload {
    wire::Workload {
        uid: "c1//Pod/shop/cart".into(),
        name: "cart".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        addresses: vec![vec![10, 1, 0, 5]],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        node: "n1".into(),
        authorization_policies: vec![policy.to_owned()],
        ..wire::Workload::default()
    }
}

/// First line: the resource's name. Then the message. A policy that is refused must not leave the workload open.
pub(crate) fn xds_authorization(bytes: &[u8]) {
    let (name, body) = crate::two_parts(bytes);
    let name = String::from_utf8_lossy(name);
    let mut state = MeshState::new("");
    let Ok(workload) = Update::workload(victim(&name)) else {
        return;
    };
    state.apply(workload);
    let refused = match Update::authorization(&name, body) {
        Ok(update) => {
            state.apply(update);
            false
        }
        Err(refused) => {
            drop(refused.rejected.to_string());
            if let Some(stand_in) = refused.stand_in {
                state.apply(stand_in);
            }
            true
        }
    };
    use_everything(&state);
    let workload = state
        .workload_by_address([10, 1, 0, 5].into())
        .expect("it was accepted");
    let connection = Connection {
        peer: None,
        source: [10, 1, 0, 9].into(),
        destination: ([10, 1, 0, 5], 80).into(),
    };
    let unreadable = refused && mesh_api::proto::security::Authorization::decode(body).is_err();
    assert!(
        !(unreadable && authorize(&state, &workload, &connection).is_allowed()),
        "an unreadable policy leaves {name:?} open"
    );
}

/// What the control plane makes of manifests that it accepts, agents accept too.
pub(crate) fn manifest(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let parsed = parse(text);
    for problem in &parsed.problems {
        drop(problem.to_string());
    }
    let mut index = Index::new(MeshConfig::default());
    let changes = parsed
        .objects
        .into_iter()
        .map(|located| Change::Upsert(Arc::new(located.object)));
    index.apply(changes);
    let mut state = MeshState::new("");
    for resource in index.store().all(ResourceType::Address) {
        match Update::address(&resource.name, &resource.body) {
            Ok(update) => drop(state.apply(update)),
            Err(rejected) => panic!("agents refuse what the control plane says: {rejected}"),
        }
    }
    for resource in index.store().all(ResourceType::Authorization) {
        match Update::authorization(&resource.name, &resource.body) {
            Ok(update) => drop(state.apply(update)),
            Err(refused) => panic!(
                "agents refuse what the control plane says: {}",
                refused.rejected
            ),
        }
    }
    use_everything(&state);
}
