//! Whether what a listing shows may be believed: a folder that is being replaced shows nothing or half of it for a while.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use super::{Fingerprint, SETTLE};

/// Device and inode of a folder.
pub(super) type FolderId = (u64, u64);
/// What a folder holds, by name; nothing where a name leads nowhere.
pub(super) type Listing = BTreeMap<String, Option<Fingerprint>>;

/// What was seen before.
#[derive(Debug, Default)]
pub(super) struct Steady {
    /// The folder that was last believed.
    folder: Option<FolderId>,
    /// Another folder at the same path, its content, and since when it is so.
    newcomer: Option<(FolderId, Listing, SystemTime)>,
    lost: bool,
    /// Files that are known and no longer listed, and since when.
    missing: BTreeMap<String, SystemTime>,
}

impl Steady {
    /// The folder cannot be listed.
    pub fn lose(&mut self) {
        self.lost = true;
        self.newcomer = None;
    }

    /// Whether `id` is the folder that was last believed.
    pub fn is_same(&self, id: FolderId) -> bool {
        !self.lost && self.folder == Some(id)
    }

    /// Takes the folder as it is now, as when it is first read.
    pub fn begin(&mut self, id: FolderId) {
        self.folder = Some(id);
    }

    /// Whether the folder may be believed: it is the known one, or it has had this content for [`SETTLE`] and has any.
    /// (One without manifests is the mount point that an unmounted folder leaves.)
    pub fn believes(&mut self, id: FolderId, listing: Listing, now: SystemTime) -> bool {
        if self.is_same(id) {
            return true;
        }
        match &self.newcomer {
            Some((seen, content, since)) if *seen == id && *content == listing => {
                if listing.is_empty() || !is_over(*since, now) {
                    return false;
                }
            }
            _ => {
                self.newcomer = Some((id, listing, now));
                return false;
            }
        }
        *self = Self {
            folder: Some(id),
            ..Self::default()
        };
        true
    }

    /// Those of the `known` files that have been absent from `listed` for [`SETTLE`].
    pub fn gone<'a>(
        &mut self,
        known: impl Iterator<Item = &'a str>,
        listed: &BTreeSet<String>,
        now: SystemTime,
    ) -> Vec<String> {
        let known: BTreeSet<&str> = known.filter(|file| !listed.contains(*file)).collect();
        self.missing.retain(|file, _| known.contains(file.as_str()));
        let mut gone = Vec::new();
        for file in known {
            let since = *self.missing.entry(file.to_owned()).or_insert(now);
            if is_over(since, now) {
                self.missing.remove(file);
                gone.push(file.to_owned());
            }
        }
        gone
    }

    /// Whether another look is due soon.
    pub fn is_waiting(&self) -> bool {
        self.lost || self.newcomer.is_some() || !self.missing.is_empty()
    }
}

/// When the clock went back the wait cannot be measured, and ends.
fn is_over(since: SystemTime, now: SystemTime) -> bool {
    now.duration_since(since)
        .map_or(true, |passed| passed >= SETTLE)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OLD: FolderId = (1, 1);
    const NEW: FolderId = (1, 2);
    const STEP: Duration = Duration::from_millis(1);

    fn listing(names: &[&str]) -> Listing {
        let named = |name: &&str| ((*name).to_owned(), None);
        names.iter().map(named).collect()
    }

    fn known() -> Steady {
        let mut steady = Steady::default();
        steady.begin(OLD);
        steady
    }

    #[test]
    fn another_folder_is_believed_once_its_content_has_been_the_same_for_a_while() {
        let (mut steady, start) = (known(), SystemTime::UNIX_EPOCH + SETTLE);
        assert!(steady.believes(OLD, listing(&["a"]), start));
        assert!(!steady.believes(NEW, listing(&["a"]), start));
        assert!(steady.is_waiting());
        let later = start + SETTLE;
        assert!(
            !steady.believes(NEW, listing(&["a", "b"]), later),
            "it is still being filled"
        );
        assert!(!steady.believes(NEW, listing(&["a", "b"]), later + SETTLE - STEP));
        assert!(steady.believes(NEW, listing(&["a", "b"]), later + SETTLE));
        assert!(steady.believes(NEW, listing(&["a"]), later + SETTLE));
        assert!(!steady.is_waiting());
    }

    #[test]
    fn an_empty_newcomer_is_never_believed_and_the_old_folder_only_after_a_wait() {
        let (mut steady, start) = (known(), SystemTime::UNIX_EPOCH);
        for step in 0..10 {
            assert!(!steady.believes(NEW, Listing::new(), start + SETTLE * step));
        }
        assert!(steady.believes(OLD, listing(&["a"]), start));
        steady.lose();
        assert!(!steady.believes(OLD, listing(&["a"]), start));
        assert!(steady.believes(OLD, listing(&["a"]), start + SETTLE));
    }

    #[test]
    fn a_file_is_gone_when_it_was_absent_twice() {
        let (mut steady, start) = (known(), SystemTime::UNIX_EPOCH);
        let files = || ["a", "b"].into_iter();
        let only_b = BTreeSet::from(["b".to_owned()]);
        assert!(steady.gone(files(), &only_b, start).is_empty());
        assert!(steady.is_waiting());
        assert!(
            steady
                .gone(files(), &only_b, start + SETTLE - STEP)
                .is_empty()
        );
        assert_eq!(steady.gone(files(), &only_b, start + SETTLE), ["a"]);
        let both = files().map(str::to_owned).collect();
        assert!(steady.gone(files(), &only_b, start).is_empty());
        assert!(
            steady.gone(files(), &both, start + SETTLE).is_empty(),
            "it is back"
        );
        assert!(!steady.is_waiting());
    }
}
