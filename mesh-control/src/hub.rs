//! The index, shared: one writer applies batches, streams read and are woken.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use mesh_api::{identity::Identity, manifest::Kind};
use tokio::sync::watch;

use crate::{
    config::MeshConfig,
    index::{Change, Diff, Index},
};

/// A shared handle on the index. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hub {
    index: Arc<RwLock<Index>>,
    generation: Arc<watch::Sender<u64>>,
}

impl Hub {
    /// An empty hub.
    #[must_use]
    pub fn new(mesh: MeshConfig) -> Self {
        Self {
            index: Arc::new(RwLock::new(Index::new(mesh))),
            generation: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Applies a batch and wakes every stream if it changed anything.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Diff {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let diff = index.apply(changes);
        let generation = index.store().generation();
        drop(index);
        if !diff.is_empty() {
            self.generation.send_replace(generation);
        }
        diff
    }

    /// Read access; hold it only for a look-up, never across an await.
    pub fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Grows with every change; await `changed()` to react.
    #[must_use]
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Whether a workload of that identity runs on `node`.
    #[must_use]
    pub fn runs_on(&self, node: &str, identity: &Identity) -> bool {
        self.read().runs_on(node, identity)
    }

    /// Number of objects of every kind.
    #[must_use]
    pub fn objects(&self) -> Vec<(Kind, usize)> {
        let index = self.read();
        Kind::ALL
            .into_iter()
            .map(|kind| (kind, index.objects(kind)))
            .collect()
    }
}
