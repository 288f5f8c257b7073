//! What exists in the mesh: the delta-ADS client, the index it feeds, and the last-good snapshot on disk.
//!
//! Bytes become checked [`Update`]s outside any lock ([`convert`]); the one [`MeshWriter`] applies them to the
//! [`MeshState`]; the data path reads through [`Mesh`].

use std::sync::{Arc, RwLock, RwLockReadGuard};

use tokio::sync::watch;

pub mod backoff;
pub mod client;
pub mod convert;
mod dump;
mod group;
mod lookup;
pub mod model;
pub mod snapshot;
pub mod state;
pub mod subscription;
#[cfg(test)]
pub(crate) mod tests;
mod update;

pub use client::{
    DiscoveryClient, DiscoveryConfig, DiscoveryError, DiscoveryStatus, Phase, SnapshotState,
};
pub use dump::{DUMP_MAX, Picture};
pub use state::{Counts, MeshState};
pub use update::{RefusedPolicy, Update};

/// Most changes applied under one hold of the write lock. Readers (every new connection) wait for one hold, and a
/// change costs a few microseconds, so the wait stays in the low milliseconds even while 100,000 workloads arrive.
pub const APPLY_CHUNK: usize = 1_024;

/// A shared handle on the index. Writers replace values under a short lock; every change bumps a generation.
#[derive(Debug, Clone)]
pub struct Mesh {
    state: Arc<RwLock<MeshState>>,
    generation: watch::Receiver<u64>,
}

impl Mesh {
    /// An empty mesh for a node of `network`: the one writer, and the handle that readers clone.
    #[must_use]
    pub fn channel(network: &str) -> (MeshWriter, Self) {
        let state = Arc::new(RwLock::new(MeshState::new(network)));
        let (sender, generation) = watch::channel(0);
        (
            MeshWriter {
                state: Arc::clone(&state),
                generation: sender,
            },
            Self { state, generation },
        )
    }

    /// Read access; hold it only for a look-up, never across an await.
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

/// The only way to change the index. There is one per mesh.
#[derive(Debug)]
pub struct MeshWriter {
    state: Arc<RwLock<MeshState>>,
    generation: watch::Sender<u64>,
}

impl MeshWriter {
    /// Applies a batch in its order, at most [`APPLY_CHUNK`] changes per hold of the lock, and then bumps the
    /// generation once if anything differs. Returns what is held afterwards.
    pub fn apply(&mut self, updates: Vec<Update>) -> Counts {
        let mut changed = false;
        let mut updates = updates.into_iter().peekable();
        while updates.peek().is_some() {
            let mut state = self
                .state
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for update in updates.by_ref().take(APPLY_CHUNK) {
                changed |= state.apply(update);
            }
        }
        if changed {
            self.generation.send_modify(|generation| *generation += 1);
        }
        self.state
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .counts()
    }
}
