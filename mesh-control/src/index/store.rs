//! The index's output: named, versioned resources, and a log of what changed so that a stream need not look at all
//! of them after every change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
};

use mesh_api::proto::{security::AUTHORIZATION_TYPE_URL, workload::ADDRESS_TYPE_URL};
use prost::bytes::Bytes;
use sha2::{Digest, Sha256};

/// Entries that the change log keeps. A stream that is further behind compares everything instead, which costs time but
/// no memory. 65,536 entries of a shared name are about 2 MiB, and cover a rollout of 60,000 pods.
pub const CHANGE_LOG_MAX: usize = 65_536;

/// Bytes of the content's SHA-256 that make a version: 64 bits, so that two contents of one name never meet by chance.
const VERSION_BYTES: usize = 8;

/// The types of resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// `istio.workload.Address`: workloads and services.
    Address,
    /// `istio.security.Authorization`: policies.
    Authorization,
}

impl ResourceType {
    /// Every type.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// Its type URL.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE_URL,
            Self::Authorization => AUTHORIZATION_TYPE_URL,
        }
    }

    /// The type of a URL.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

/// One resource, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Its name on the wire.
    pub name: Arc<str>,
    /// A digest of its content: equal content has an equal version, also after a restart.
    pub version: Arc<str>,
    /// The protobuf message.
    pub body: Bytes,
    /// Further names under which it may be asked for: `<network>/<ip>`.
    pub aliases: Vec<Arc<str>>,
    /// Names of the services whose endpoint it is.
    pub services: Vec<Arc<str>>,
}

/// What one batch of changes did to the output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diff {
    /// New or different resources.
    pub changed: BTreeSet<(ResourceType, Arc<str>)>,
    /// Resources that are gone.
    pub removed: BTreeSet<(ResourceType, Arc<str>)>,
    /// Resources that were computed again, whether or not they differ: the work that the batch cost.
    pub recomputed: usize,
}

impl Diff {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

/// All resources. Grows a generation with every batch that changed something.
#[derive(Debug, Default)]
pub struct Store {
    resources: [BTreeMap<Arc<str>, Arc<Resource>>; 2],
    aliases: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    endpoints: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    generation: u64,
    log: VecDeque<(u64, ResourceType, Arc<str>)>,
    /// The newest generation that the log may have forgotten a change of.
    forgotten: u64,
}

impl Store {
    /// Number of the last batch that changed something.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// A resource by its name.
    #[must_use]
    pub fn get(&self, kind: ResourceType, name: &str) -> Option<&Arc<Resource>> {
        self.resources[kind as usize].get(name)
    }

    /// Every resource of a type, by name.
    pub fn all(&self, kind: ResourceType) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources[kind as usize].values()
    }

    /// Number of resources of a type.
    #[must_use]
    pub fn len(&self, kind: ResourceType) -> usize {
        self.resources[kind as usize].len()
    }

    /// Names that changed after generation `seen`, or `None` when the log does not reach back that far.
    pub fn changes_since(
        &self,
        kind: ResourceType,
        seen: u64,
    ) -> Option<impl Iterator<Item = &Arc<str>>> {
        let newer = (seen >= self.forgotten).then(|| {
            self.log
                .iter()
                .rev()
                .take_while(move |(generation, ..)| *generation > seen)
        })?;
        Some(
            newer
                .filter(move |(_, changed, _)| *changed == kind)
                .map(|(.., name)| name),
        )
    }

    /// What a demanded name stands for: a resource of that name, those with that alias, and with a service its
    /// endpoints (wire.md section 11).
    #[must_use]
    pub fn resolve(&self, demanded: &str) -> Vec<Arc<Resource>> {
        let mut names: BTreeSet<&Arc<str>> =
            self.aliases.get(demanded).into_iter().flatten().collect();
        if let Some((name, _)) =
            self.resources[ResourceType::Address as usize].get_key_value(demanded)
        {
            names.insert(name);
        }
        let services: Vec<_> = names.iter().copied().cloned().collect();
        for service in &services {
            names.extend(self.endpoints.get(service).into_iter().flatten());
        }
        names
            .into_iter()
            .filter_map(|name| self.get(ResourceType::Address, name))
            .cloned()
            .collect()
    }

    /// Inserts or replaces a resource; nothing happens when the content is the same.
    pub(super) fn put(
        &mut self,
        kind: ResourceType,
        name: &str,
        body: Bytes,
        aliases: Vec<Arc<str>>,
        services: Vec<Arc<str>>,
        diff: &mut Diff,
    ) {
        diff.recomputed += 1;
        let version = version_of(&body);
        let old = self.resources[kind as usize].get(name).cloned();
        if old.as_ref().is_some_and(|old| old.version == version) {
            return;
        }
        let name: Arc<str> = old
            .as_ref()
            .map_or_else(|| name.into(), |old| old.name.clone());
        if let Some(old) = old {
            self.unlink(&old);
        }
        for alias in &aliases {
            self.aliases
                .entry(alias.clone())
                .or_default()
                .insert(name.clone());
        }
        for service in &services {
            self.endpoints
                .entry(service.clone())
                .or_default()
                .insert(name.clone());
        }
        let resource = Resource {
            name: name.clone(),
            version,
            body,
            aliases,
            services,
        };
        self.resources[kind as usize].insert(name.clone(), Arc::new(resource));
        diff.removed.remove(&(kind, name.clone()));
        diff.changed.insert((kind, name));
    }

    pub(super) fn remove(&mut self, kind: ResourceType, name: &str, diff: &mut Diff) {
        let Some(old) = self.resources[kind as usize].remove(name) else {
            return;
        };
        self.unlink(&old);
        diff.changed.remove(&(kind, old.name.clone()));
        diff.removed.insert((kind, old.name.clone()));
    }

    fn unlink(&mut self, old: &Resource) {
        let unlink = |map: &mut HashMap<Arc<str>, BTreeSet<Arc<str>>>, key: &Arc<str>| {
            if let Some(names) = map.get_mut(key) {
                names.remove(&old.name);
                if names.is_empty() {
                    map.remove(key);
                }
            }
        };
        old.aliases
            .iter()
            .for_each(|alias| unlink(&mut self.aliases, alias));
        old.services
            .iter()
            .for_each(|service| unlink(&mut self.endpoints, service));
    }

    /// What a log that has overflowed many times looks like.
    #[cfg(test)]
    pub(super) fn forget_log(&mut self) {
        self.log.clear();
        self.forgotten = self.generation;
    }

    /// Makes a batch visible to streams.
    pub(super) fn commit(&mut self, diff: &Diff) {
        if diff.is_empty() {
            return;
        }
        self.generation += 1;
        for (kind, name) in diff.changed.iter().chain(&diff.removed) {
            if self.log.len() == CHANGE_LOG_MAX
                && let Some((generation, ..)) = self.log.pop_front()
            {
                self.forgotten = generation;
            }
            self.log.push_back((self.generation, *kind, name.clone()));
        }
    }
}

fn version_of(body: &[u8]) -> Arc<str> {
    let digest = Sha256::digest(body);
    let mut version = String::with_capacity(VERSION_BYTES * 2);
    for byte in digest.iter().take(VERSION_BYTES) {
        // Writing to a String cannot fail.
        let _ = write!(version, "{byte:02x}");
    }
    version.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, name: &str, content: &str) {
        let mut diff = Diff::default();
        let body = Bytes::from(content.to_owned());
        store.put(
            ResourceType::Address,
            name,
            body,
            Vec::new(),
            Vec::new(),
            &mut diff,
        );
        store.commit(&diff);
    }

    #[test]
    fn equal_content_is_no_change() {
        let mut store = Store::default();
        put(&mut store, "a", "1");
        put(&mut store, "a", "1");
        assert_eq!(store.generation(), 1);
        put(&mut store, "a", "2");
        assert_eq!(store.generation(), 2);
    }

    #[test]
    fn a_reader_that_is_further_behind_than_the_log_is_told_so() {
        let mut store = Store::default();
        for index in 0..=CHANGE_LOG_MAX {
            put(&mut store, &format!("r{index}"), "x");
        }
        assert_eq!(store.log.len(), CHANGE_LOG_MAX);
        assert!(store.changes_since(ResourceType::Address, 0).is_none());
        let known = store
            .changes_since(ResourceType::Address, 1)
            .expect("still in the log");
        assert_eq!(known.count(), CHANGE_LOG_MAX);
    }
}
