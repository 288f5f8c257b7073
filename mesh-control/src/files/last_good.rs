//! The last good objects of every manifest file, on disk: without them a restart would forget what a file said before
//! somebody broke it, and agents would be told that it is gone.
//!
//! One file per manifest file, of the same name; one JSON document per object. It is replaced as a whole and not
//! flushed: after a loss of power the older state, or none, may be there, which is what a restart without it has.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, OpenOptions},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use mesh_api::manifest::Object;

use super::{FILE_MAX_BYTES, FileProblem, is_manifest, read_limited};

/// Largest file read: JSON repeats names that YAML may abbreviate.
const KEPT_MAX_BYTES: u64 = 8 * FILE_MAX_BYTES;
/// Keeps them, if there is a folder for it.
#[derive(Debug, Default)]
pub(super) struct LastGood {
    folder: Option<PathBuf>,
    /// Digest of what is on disk, by manifest file.
    written: BTreeMap<String, u64>,
    /// Files that could not be written, and why.
    failed: BTreeMap<String, String>,
}

impl LastGood {
    pub fn new(folder: Option<&Path>) -> Self {
        Self {
            folder: folder.map(Path::to_path_buf),
            ..Self::default()
        }
    }

    /// What was kept of a file.
    pub fn read(&mut self, file: &str) -> Option<String> {
        let text = read_limited(&self.folder.as_ref()?.join(file), KEPT_MAX_BYTES).ok()?;
        self.written.insert(file.to_owned(), digest(&text));
        Some(text)
    }

    /// Keeps the objects of a file. What cannot be written is a problem, and tried again with the next call.
    pub fn keep<'a>(&mut self, file: &str, objects: impl Iterator<Item = &'a Object>) {
        let Some(folder) = &self.folder else { return };
        let written = documents(objects).and_then(|text| {
            let digest = digest(&text);
            if self.written.get(file) != Some(&digest) {
                write(folder, file, &text)?;
            }
            Ok(digest)
        });
        match written {
            Ok(digest) => {
                self.written.insert(file.to_owned(), digest);
                self.failed.remove(file);
            }
            Err(error) => {
                self.failed.insert(file.to_owned(), error.to_string());
            }
        }
    }

    /// Forgets a file that is gone.
    pub fn forget(&mut self, file: &str) {
        self.written.remove(file);
        self.failed.remove(file);
        if let Some(folder) = &self.folder {
            // If it cannot be removed it is removed at the next start.
            let _ = fs::remove_file(folder.join(file));
        }
    }

    /// Removes what was kept of files that are not among `known`.
    pub fn forget_others(&mut self, known: impl Fn(&str) -> bool) {
        let entries = self.folder.as_ref().and_then(|it| fs::read_dir(it).ok());
        let names = entries.into_iter().flatten().flatten();
        let names: Vec<_> = names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_manifest(name) && !known(name))
            .collect();
        for name in names {
            self.forget(&name);
        }
    }

    /// Files to be kept once more.
    pub fn failed(&self) -> Vec<String> {
        self.failed.keys().cloned().collect()
    }

    pub fn problems(&self) -> impl Iterator<Item = FileProblem> {
        self.failed.iter().map(|(file, error)| FileProblem {
            file: file.clone(),
            message: format!(
                "its last good state cannot be kept in --last-good, so that a restart would forget it: {error}"
            ),
        })
    }
}

fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn documents<'a>(objects: impl Iterator<Item = &'a Object>) -> io::Result<String> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(&object.to_json()?);
        text.push('\n');
    }
    Ok(text)
}

fn write(folder: &Path, file: &str, text: &str) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    // Hidden, so that it is never taken for a kept file; of this process, because another one may take over from it.
    let staged = folder.join(format!(".staged.{}", std::process::id()));
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&staged)?.write_all(text.as_bytes())?;
    fs::rename(&staged, folder.join(file))
}
