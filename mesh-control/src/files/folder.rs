//! What the files of a folder say, taken together. No I/O: file contents come in, changes of objects go out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use mesh_api::manifest::{self, Kind, Object, ObjectKey, RefusedPolicy};

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
#[derive(Debug)]
pub struct Folder {
    root_namespace: String,
    files: BTreeMap<String, FileState>,
    holders: BTreeMap<ObjectKey, BTreeSet<String>>,
    /// Files with a refused policy of that key. Its stand-in counts where no file has a good version.
    refusers: BTreeMap<ObjectKey, BTreeSet<String>>,
    published: BTreeMap<ObjectKey, Arc<Object>>,
    touched: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
struct FileState {
    objects: BTreeMap<ObjectKey, Arc<Object>>,
    stand_ins: BTreeMap<ObjectKey, Arc<Object>>,
    problems: Vec<String>,
    /// It could never be read as a whole, so that nobody knows what it holds.
    unread: bool,
}

impl Folder {
    /// An empty folder. Policies in `root_namespace` apply to the whole mesh.
    #[must_use]
    pub fn new(root_namespace: &str) -> Self {
        Self {
            root_namespace: root_namespace.to_owned(),
            files: BTreeMap::new(),
            holders: BTreeMap::new(),
            refusers: BTreeMap::new(),
            published: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// Takes the new content of a file, or why it could not be read. An object that has become bad keeps its last good
    /// version; so does every object that is missing from a file of which a part could not be read at all. A policy of
    /// which no good version is known is stood in for by one that is at least as strict.
    pub fn update(&mut self, file: &str, content: Result<&str, String>) {
        let known = self.files.contains_key(file);
        let old = self.files.remove(file).unwrap_or_default();
        let new = match content {
            Ok(text) => merge(&old, manifest::parse(text), &self.root_namespace),
            Err(message) => FileState {
                objects: old.objects.clone(),
                stand_ins: old.stand_ins.clone(),
                problems: vec![message],
                unread: old.unread || !known,
            },
        };
        self.unlink(file, old);
        for (keys, files) in [
            (&new.objects, &mut self.holders),
            (&new.stand_ins, &mut self.refusers),
        ] {
            for key in keys.keys() {
                let files = files.entry(key.clone()).or_default();
                files.insert(file.to_owned());
                self.touched.insert(key.clone());
            }
        }
        self.files.insert(file.to_owned(), new);
    }

    /// Forgets a file and its objects.
    pub fn remove(&mut self, file: &str) {
        if let Some(old) = self.files.remove(file) {
            self.unlink(file, old);
        }
    }

    fn unlink(&mut self, file: &str, old: FileState) {
        for (keys, files) in [
            (old.objects, &mut self.holders),
            (old.stand_ins, &mut self.refusers),
        ] {
            for key in keys.into_keys() {
                if let Some(files) = files.get_mut(&key) {
                    files.remove(file);
                }
                self.touched.insert(key);
            }
        }
    }

    /// Names of the files that are known.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The last good objects of a file.
    pub fn objects(&self, file: &str) -> impl Iterator<Item = &Object> {
        let objects = self.files.get(file).map(|state| &state.objects);
        objects
            .into_iter()
            .flat_map(|it| it.values().map(AsRef::as_ref))
    }

    /// A file of which nothing could ever be read, and why.
    #[must_use]
    pub fn unread(&self) -> Option<FileProblem> {
        let (file, state) = self.files.iter().find(|(_, state)| state.unread)?;
        Some(FileProblem {
            file: file.clone(),
            message: state.problems.concat(),
        })
    }

    /// What changed since the last call. Of several files that define one object the first by name counts.
    pub fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.touched) {
            for files in [&mut self.holders, &mut self.refusers] {
                if files.get(&key).is_some_and(BTreeSet::is_empty) {
                    files.remove(&key);
                }
            }
            match self.in_force(&key).cloned() {
                Some(object) => {
                    if self.published.get(&key) != Some(&object) {
                        self.published.insert(key, object.clone());
                        changes.push(Change::Upsert(object));
                    }
                }
                None => {
                    if self.published.remove(&key).is_some() {
                        changes.push(Change::Remove(key));
                    }
                }
            }
        }
        changes
    }

    fn in_force(&self, key: &ObjectKey) -> Option<&Arc<Object>> {
        if let Some(file) = self.holders.get(key).and_then(BTreeSet::first) {
            return self.files.get(file)?.objects.get(key);
        }
        let file = self.refusers.get(key)?.first()?;
        self.files.get(file)?.stand_ins.get(key)
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
        let in_force = |key: &ObjectKey| self.holders.get(key).is_none_or(BTreeSet::is_empty);
        let stand_ins = self.refusers.iter().filter(|(key, _)| in_force(key));
        let stand_ins = stand_ins.flat_map(|(key, files)| {
            let scope = if key.namespace == self.root_namespace {
                "the mesh".to_owned()
            } else {
                format!("namespace {}", key.namespace)
            };
            files.iter().map(move |file| FileProblem {
                file: file.clone(),
                message: format!(
                    "{key}: no good version of this policy is known; until it is mended, what it may have been meant \
                     to forbid in {scope} is refused"
                ),
            })
        });
        of_files.chain(duplicates).chain(stand_ins).collect()
    }
}

fn merge(old: &FileState, parsed: manifest::Parsed, root_namespace: &str) -> FileState {
    let mut objects: BTreeMap<ObjectKey, Arc<Object>> = parsed
        .objects
        .into_iter()
        .map(|located| (located.object.key(), Arc::new(located.object)))
        .collect();
    let found: BTreeSet<ObjectKey> = objects.keys().cloned().collect();
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
    let kept: Vec<_> = objects
        .keys()
        .filter(|key| nameless && !found.contains(*key))
        .map(|key| key.kind)
        .collect();
    let stand_ins = stand_ins(&parsed.refused_policies, kept, root_namespace);
    FileState {
        stand_ins: stand_ins
            .map(|object| (object.key(), Arc::new(object)))
            .filter(|(key, _)| !objects.contains_key(key))
            .collect(),
        objects,
        problems: parsed.problems.iter().map(ToString::to_string).collect(),
        unread: false,
    }
}

/// `kept` are the kinds of objects that are missing from the file and were kept because of what cannot be read: each
/// accounts for one policy without a name.
fn stand_ins(
    refused: &[RefusedPolicy],
    mut kept: Vec<Kind>,
    root_namespace: &str,
) -> impl Iterator<Item = Object> {
    refused
        .iter()
        .filter(move |policy| {
            let same = kept.iter().position(|kind| *kind == policy.kind());
            match same {
                Some(same) if !policy.is_named() => {
                    kept.swap_remove(same);
                    false
                }
                _ => true,
            }
        })
        .map(|policy| policy.stand_in(root_namespace))
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
        let mut folder = Folder::new("weft-system");
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
        let mut folder = Folder::new("weft-system");
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
        let mut folder = Folder::new("weft-system");
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

    fn stood_in(folder: &mut Folder) -> Vec<Object> {
        let changes = folder.changes().into_iter();
        changes
            .filter_map(|change| match change {
                Change::Upsert(object) => Some((*object).clone()),
                Change::Remove(_) => None,
            })
            .collect()
    }

    #[test]
    fn a_refused_policy_without_a_good_version_is_stood_in_for_until_it_is_mended() {
        const GOOD: &str = "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
            metadata: {name: p, namespace: shop}\nspec: {action: DENY, rules: [{}]}\n";
        let bad = GOOD.replace("rules: [{}]", "rulez: [{}]");
        let mut folder = Folder::new("weft-system");
        folder.update("a.yaml", Ok(&bad));
        let [Object::AuthorizationPolicy(policy)] = &stood_in(&mut folder)[..] else {
            panic!("a stand-in");
        };
        assert_eq!(policy.spec.action, manifest::Action::Deny);
        assert_eq!(policy.spec.rules, [manifest::Rule::default()]);
        assert_eq!(
            folder.problems().len(),
            2,
            "what is wrong, and what it does"
        );

        folder.update("b.yaml", Ok(GOOD));
        folder.changes();
        assert_eq!(folder.problems().len(), 1, "a good version is known");
        folder.remove("b.yaml");
        folder.update("a.yaml", Ok(GOOD));
        folder.update("a.yaml", Ok(&bad));
        let back = stood_in(&mut folder);
        assert!(back.is_empty(), "the last good version stays: {back:?}");
        folder.remove("a.yaml");
        assert_eq!(folder.changes().len(), 1);
        assert!(folder.problems().is_empty());
    }

    #[test]
    fn a_policy_that_is_no_yaml_denies_everywhere_unless_its_good_version_was_kept() {
        let broken = "{\"kind\": \"AuthorizationPolicy\", [";
        let mut folder = Folder::new("weft-system");
        folder.update("a.json", Ok(broken));
        let [Object::AuthorizationPolicy(policy)] = &stood_in(&mut folder)[..] else {
            panic!("a stand-in");
        };
        assert_eq!(policy.metadata.namespace.as_deref(), Some("weft-system"));

        let good = r#"{"apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p"}, "spec": {}}"#;
        folder.update("a.json", Ok(good));
        folder.changes();
        folder.update("a.json", Ok(broken));
        assert!(folder.changes().is_empty(), "it is the one that was there");
    }

    #[test]
    fn a_file_that_was_never_read_is_told_from_one_that_was() {
        let mut folder = Folder::new("weft-system");
        folder.update("a.yaml", Ok(&account("x", "1")));
        folder.update("a.yaml", Err("unreadable".into()));
        assert_eq!(folder.unread(), None);
        folder.update("b.yaml", Err("unreadable".into()));
        folder.update("b.yaml", Err("unreadable".into()));
        assert!(folder.unread().is_some_and(|it| it.file == "b.yaml"));
        folder.update("b.yaml", Ok(""));
        assert_eq!(folder.unread(), None);
    }

    #[test]
    fn the_first_of_two_files_counts_and_both_are_named() {
        let mut folder = Folder::new("weft-system");
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
