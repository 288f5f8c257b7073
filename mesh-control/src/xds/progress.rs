//! How far the agents are: which generation of the index each of them has applied.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::credentials::NodeName;

/// Agents without something that are named.
const LACKING_NAMED_MAX: usize = 3;

/// How many agents have applied something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spread {
    /// Agents that are connected.
    pub agents: usize,
    /// Those of them that have applied it.
    pub applied: usize,
    /// Nodes of some of those that have not, by name.
    pub lacking: Vec<NodeName>,
}

/// Node and generation, by stream.
type Streams = HashMap<u64, (NodeName, u64)>;

/// The generation that every stream has applied. Bounded by the number of streams.
#[derive(Debug, Default)]
pub struct Progress {
    streams: Mutex<Streams>,
    next: AtomicU64,
}

/// One stream's entry; it is gone with it.
#[derive(Debug)]
pub(super) struct Entry {
    progress: Arc<Progress>,
    stream: u64,
}

impl Progress {
    /// Notes a stream of `node` that has applied nothing yet.
    pub(super) fn enter(self: &Arc<Self>, node: NodeName) -> Entry {
        let stream = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(stream, (node, 0));
        Entry {
            progress: self.clone(),
            stream,
        }
    }

    /// How many have applied `generation`.
    #[must_use]
    pub fn spread(&self, generation: u64) -> Spread {
        let streams = self.lock();
        let lacks = |(_, applied): &&(NodeName, u64)| *applied < generation;
        let mut lacking: Vec<_> = streams
            .values()
            .filter(lacks)
            .map(|(node, _)| node)
            .collect();
        lacking.sort_unstable();
        Spread {
            agents: streams.len(),
            applied: streams.len() - lacking.len(),
            lacking: lacking
                .into_iter()
                .take(LACKING_NAMED_MAX)
                .cloned()
                .collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Notes how far the stream is.
    pub fn set(&self, generation: u64) {
        if let Some((_, applied)) = self.progress.lock().get_mut(&self.stream) {
            *applied = generation;
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.progress.lock().remove(&self.stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_counts_while_its_stream_lives() {
        let progress = Arc::new(Progress::default());
        let node = |name: &str| NodeName(name.into());
        let (a, b) = (progress.enter(node("a")), progress.enter(node("b")));
        a.set(7);
        b.set(6);
        let spread = |agents, applied, lacking: &[&str]| Spread {
            agents,
            applied,
            lacking: lacking.iter().map(|name| node(name)).collect(),
        };
        assert_eq!(progress.spread(7), spread(2, 1, &["b"]));
        assert_eq!(progress.spread(6), spread(2, 2, &[]));
        drop(b);
        assert_eq!(progress.spread(7), spread(1, 1, &[]));
        let many: Vec<_> = (0..9).map(|_| progress.enter(node("c"))).collect();
        assert_eq!(progress.spread(7), spread(10, 1, &["c", "c", "c"]));
        drop(many);
    }
}
