//! What exists in the mesh: the delta-ADS client, the index it feeds, and the last-good snapshot on disk.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, RwLock, RwLockReadGuard},
};

use tokio::sync::watch;

pub mod model;

use model::{Policy, Route, Workload};

/// The index: pure state, fed by [`client`] and by the snapshot.
#[derive(Debug, Default)]
pub struct MeshState {}

impl MeshState {
    /// The workload that owns `address`, in its canonical (unmapped) form.
    #[must_use]
    pub fn workload_by_address(&self, _address: IpAddr) -> Option<Arc<Workload>> {
        todo!()
    }

    /// The workload of that name on `node`.
    #[must_use]
    pub fn local_workload(
        &self,
        _node: &str,
        _namespace: &str,
        _name: &str,
    ) -> Option<Arc<Workload>> {
        todo!()
    }

    /// Where a connection from `source` to `destination` goes: service address first, then workload address.
    #[must_use]
    pub fn route(&self, _source: &Workload, _destination: SocketAddr) -> Route {
        todo!()
    }

    /// Every policy that applies to `workload`: its namespace's, the global ones, and those that select it.
    /// A policy that is listed but unknown makes the answer `None`: unknown means deny.
    #[must_use]
    pub fn policies(&self, _workload: &Workload) -> Option<Vec<Arc<Policy>>> {
        todo!()
    }

    /// Service addresses that have no usable endpoint for any client, for the kernel to refuse in `connect(2)`.
    #[must_use]
    pub fn dead_destinations(&self) -> Vec<SocketAddr> {
        todo!()
    }
}

/// A shared handle on the index. Writers replace values under a short lock; every change bumps a generation.
#[derive(Debug, Clone)]
pub struct Mesh {
    state: Arc<RwLock<MeshState>>,
    generation: watch::Receiver<u64>,
}

impl Mesh {
    /// Read access; hold it only for a look-up, never across an await.
    #[must_use]
    pub fn read(&self) -> RwLockReadGuard<'_, MeshState> {
        self.state
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Grows with every applied change; await `changed()` to react.
    #[must_use]
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.clone()
    }
}
