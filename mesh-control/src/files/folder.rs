//! What the files of a folder say, taken together. No I/O: file contents come in, changes of objects go out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use mesh_api::manifest::{self, Object, ObjectKey};

use crate::index::Change;

/// Something wrong in the folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileProblem {
    /// Name of the file within the folder; empty when the folder itself is meant.
    pub file: String,
    /// What is wrong and where.
    pub message: String,
}

impl fmt::Display for FileProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.file.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.file, self.message)
        }
    }
}

/// The last good state of every file.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, FileState>,
    holders: BTreeMap<ObjectKey, BTreeSet<String>>,
    published: BTreeMap<ObjectKey, Arc<Object>>,
    touched: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
struct FileState {
    objects: BTreeMap<ObjectKey, Arc<Object>>,
    problems: Vec<String>,
}

impl Folder {
    /// Takes the new content of a file, or why it could not be read. An object that has become bad keeps its last good
    /// version; so does every object that is missing from a file of which a part could not be read at all.
    pub fn update(&mut self, file: &str, content: Result<&str, String>) {
        let old = self.files.remove(file).unwrap_or_default();
        let new = match content {
            Ok(text) => merge(&old, manifest::parse(text)),
            Err(message) => FileState {
                objects: old.objects.clone(),
                problems: vec![message],
            },
        };
        for key in old
            .objects
            .keys()
            .filter(|key| !new.objects.contains_key(*key))
        {
            if let Some(holders) = self.holders.get_mut(key) {
                holders.remove(file);
            }
        }
        for key in new.objects.keys() {
            self.holders
                .entry(key.clone())
                .or_default()
                .insert(file.to_owned());
        }
        self.touched
            .extend(old.objects.into_keys().chain(new.objects.keys().cloned()));
        self.files.insert(file.to_owned(), new);
    }

    /// Forgets a file and its objects.
    pub fn remove(&mut self, file: &str) {
        let Some(old) = self.files.remove(file) else {
            return;
        };
        for key in old.objects.into_keys() {
            if let Some(holders) = self.holders.get_mut(&key) {
                holders.remove(file);
            }
            self.touched.insert(key);
        }
    }

    /// Names of the files that are known.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// What changed since the last call. Of several files that define one object the first by name counts.
    pub fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.touched) {
            let winner = self.holders.get(&key).and_then(BTreeSet::first);
            let object = winner
                .and_then(|file| self.files.get(file)?.objects.get(&key))
                .cloned();
            match object {
                Some(object) => {
                    if self.published.get(&key) != Some(&object) {
                        self.published.insert(key, object.clone());
                        changes.push(Change::Upsert(object));
                    }
                }
                None => {
                    self.holders.remove(&key);
                    if self.published.remove(&key).is_some() {
                        changes.push(Change::Remove(key));
                    }
                }
            }
        }
        changes
    }

    /// Everything that is wrong now, by file.
    #[must_use]
    pub fn problems(&self) -> BTreeSet<FileProblem> {
        let of_files = self.files.iter().flat_map(|(file, state)| {
            state.problems.iter().map(|message| FileProblem {
                file: file.clone(),
                message: message.clone(),
            })
        });
        let duplicates = self.holders.iter().flat_map(|(key, holders)| {
            let first = holders.first().cloned().unwrap_or_default();
            holders.iter().skip(1).map(move |file| FileProblem {
                file: file.clone(),
                message: format!("{key} is already defined in {first}, whose version is used"),
            })
        });
        of_files.chain(duplicates).collect()
    }
}

fn merge(old: &FileState, parsed: manifest::Parsed) -> FileState {
    let mut objects: BTreeMap<ObjectKey, Arc<Object>> = parsed
        .objects
        .into_iter()
        .map(|located| (located.object.key(), Arc::new(located.object)))
        .collect();
    let nameless = parsed
        .problems
        .iter()
        .any(|problem| problem.object.is_none());
    let bad: BTreeSet<_> = parsed
        .problems
        .iter()
        .filter_map(|problem| problem.object.as_ref())
        .collect();
    for (key, object) in &old.objects {
        if nameless || bad.contains(key) {
            objects.entry(key.clone()).or_insert_with(|| object.clone());
        }
    }
    let problems = parsed.problems.iter().map(ToString::to_string).collect();
    FileState { objects, problems }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str, label: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {name}\n  labels: {{v: \"{label}\"}}\n"
        )
    }

    fn summary(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .map(|change| match change {
                Change::Upsert(object) => {
                    let labels = object.metadata().labels.clone().unwrap_or_default();
                    format!("+{}={}", object.key().name, labels["v"])
                }
                Change::Remove(key) => format!("-{}", key.name),
            })
            .collect()
    }

    #[test]
    fn only_what_differs_is_a_change() {
        let mut folder = Folder::default();
        folder.update(
            "a.yaml",
            Ok(&format!("{}---\n{}", account("x", "1"), account("y", "1"))),
        );
        assert_eq!(summary(&folder.changes()), ["+x=1", "+y=1"]);
        folder.update(
            "a.yaml",
            Ok(&format!("{}---\n{}", account("x", "1"), account("y", "2"))),
        );
        assert_eq!(summary(&folder.changes()), ["+y=2"]);
        folder.remove("a.yaml");
        assert_eq!(summary(&folder.changes()), ["-x", "-y"]);
    }

    #[test]
    fn a_bad_object_keeps_its_last_good_version_and_others_go_on() {
        let mut folder = Folder::default();
        folder.update(
            "a.yaml",
            Ok(&format!("{}---\n{}", account("x", "1"), account("y", "1"))),
        );
        folder.changes();
        let spoilt = account("x", "2").replace("labels", "lables");
        folder.update("a.yaml", Ok(&format!("{spoilt}---\n{}", account("y", "2"))));
        assert_eq!(summary(&folder.changes()), ["+y=2"]);
        assert_eq!(folder.problems().len(), 1);
        folder.update("a.yaml", Ok(&account("y", "2")));
        assert_eq!(
            summary(&folder.changes()),
            ["-x"],
            "an object that is simply gone is removed"
        );
        assert!(folder.problems().is_empty());
    }

    #[test]
    fn a_document_that_cannot_be_read_at_all_keeps_what_is_missing() {
        let mut folder = Folder::default();
        folder.update(
            "a.yaml",
            Ok(&format!("{}---\n{}", account("x", "1"), account("y", "1"))),
        );
        folder.changes();
        folder.update(
            "a.yaml",
            Ok(&format!("{{ not: [yaml\n---\n{}", account("y", "2"))),
        );
        assert_eq!(summary(&folder.changes()), ["+y=2"]);
        folder.update("a.yaml", Err("unreadable".into()));
        assert_eq!(summary(&folder.changes()), Vec::<String>::new());
    }

    #[test]
    fn the_first_of_two_files_counts_and_both_are_named() {
        let mut folder = Folder::default();
        folder.update("b.yaml", Ok(&account("x", "b")));
        assert_eq!(summary(&folder.changes()), ["+x=b"]);
        folder.update("a.yaml", Ok(&account("x", "a")));
        assert_eq!(summary(&folder.changes()), ["+x=a"]);
        let problems: Vec<_> = folder.problems().iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            [
                "b.yaml: ServiceAccount default/x is already defined in a.yaml, whose version is used"
            ]
        );
        folder.remove("a.yaml");
        assert_eq!(summary(&folder.changes()), ["+x=b"]);
        assert!(folder.problems().is_empty());
    }
}
