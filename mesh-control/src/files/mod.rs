//! The files source: a folder of manifests, watched.
//!
//! The kernel says (inotify) when a file was closed after writing or renamed into place, so that a half-written file is
//! not read. A slow comparison of all files beside it covers what the kernel does not report, such as file
//! systems of other machines. Single events are believed at once; that a whole folder, or files of it, are gone only when a
//! later look confirms it (`steady`).

pub mod folder;
mod last_good;
mod steady;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch as channel,
    time::{Instant, sleep, timeout_at},
};
use tracing::{error, info, warn};

pub use folder::{FileProblem, Folder};
use last_good::LastGood;
use steady::{FolderId, Listing, Steady};
use watch::{FolderWatch, Seen};

use crate::{hub::Hub, index::Change, telemetry::Metrics};

/// Largest manifest file. 16 MiB of YAML are about 40,000 small objects; more belong into several files.
pub const FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// Most manifest files in a folder.
pub const FILES_MAX: usize = 10_000;
/// Quiet time after an event before files are read, so that a series of writes is one batch.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Longest delay by the former, however busy the folder is.
const DEBOUNCE_MAX: Duration = Duration::from_millis(200);
/// How often all files are compared although the kernel reported nothing.
const RESCAN_INTERVAL: Duration = Duration::from_secs(30);
/// The same while the kernel cannot report anything, and while something was seen that a later look has to confirm. Also
/// how often the path is checked to still lead to the same folder.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A file that changed more recently may still be being written: comparisons (not events) leave it for next time. Also how
/// long a replaced folder, or the absence of a file, has to last before it counts.
const SETTLE: Duration = Duration::from_secs(2);

/// Why the source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The folder cannot be listed.
    #[error("source folder {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A manifest of which nothing is known cannot be read. Mend it, or remove it if what it held is to be forgotten.
    #[error("source folder {path}: {problem}")]
    Unread {
        /// The folder.
        path: PathBuf,
        /// The file, and why.
        problem: FileProblem,
    },
}

/// Which files a scan looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    /// All.
    All,
    /// All, except those that changed a moment ago.
    Settled,
    /// These.
    Files(BTreeSet<String>),
}

/// What tells a changed file from an unchanged one.
type Fingerprint = (u64, u64, i64, i64, u64);

/// The wall clock, which file systems use.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// A folder and what was last read of it.
#[derive(Debug)]
pub struct FilesSource {
    path: PathBuf,
    folder: Folder,
    fingerprints: BTreeMap<String, Fingerprint>,
    steady: Steady,
    last_good: LastGood,
    /// A file was left for next time.
    unsettled: bool,
    clock: Clock,
    /// Problems of the folder itself.
    own_problems: BTreeSet<FileProblem>,
    reported: BTreeSet<FileProblem>,
}

impl FilesSource {
    /// Reads the folder once. Policies in `root_namespace` apply to the whole mesh. In the folder `last_good` the last good
    /// objects are kept over restarts.
    ///
    /// # Errors
    /// When the folder itself cannot be read. Bad files are [`FilesSource::problems`], not errors.
    pub fn open(
        path: &Path,
        root_namespace: &str,
        last_good: Option<&Path>,
    ) -> Result<(Self, Vec<Change>), SourceError> {
        let failed = |source| SourceError::Folder {
            path: path.into(),
            source,
        };
        fs::read_dir(path).map_err(failed)?;
        let mut steady = Steady::default();
        steady.begin(folder_id(path).map_err(failed)?);
        let mut source = Self {
            path: path.into(),
            folder: Folder::new(root_namespace),
            fingerprints: BTreeMap::new(),
            steady,
            last_good: LastGood::new(last_good),
            unsettled: false,
            clock: Clock(Arc::new(SystemTime::now)),
            own_problems: BTreeSet::new(),
            reported: BTreeSet::new(),
        };
        source.restore().map_err(failed)?;
        let changes = source.scan(&Scope::All);
        let Self {
            folder, last_good, ..
        } = &mut source;
        last_good.forget_others(|kept| folder.files().any(|file| file == kept));
        Ok((source, changes))
    }

    /// Begins with what was last good of the files that are there, as if they had been read so a moment ago.
    fn restore(&mut self) -> io::Result<()> {
        for name in self.list()? {
            if let Some(kept) = self.last_good.read(&name) {
                self.folder.update(&name, Ok(&kept));
            }
        }
        Ok(())
    }

    fn update(&mut self, name: &str, content: Result<&str, String>) {
        self.folder.update(name, content);
        self.last_good.keep(name, self.folder.objects(name));
    }

    /// Everything that is wrong now.
    #[must_use]
    pub fn problems(&self) -> BTreeSet<FileProblem> {
        self.folder
            .problems()
            .union(&self.own_problems)
            .cloned()
            .chain(self.last_good.problems())
            .collect()
    }

    /// That every file could be read, well-formed or not. A state without one of them must never be the first to be
    /// published: what it forbids would be taken for gone.
    ///
    /// # Errors
    /// [`SourceError::Unread`].
    pub fn require_read(&self) -> Result<(), SourceError> {
        match self.folder.unread() {
            None => Ok(()),
            Some(problem) => Err(SourceError::Unread {
                path: self.path.clone(),
                problem,
            }),
        }
    }

    /// Logs what was not logged before.
    fn report(&mut self) {
        let problems = self.problems();
        for problem in problems.difference(&self.reported) {
            error!(file = problem.file, "{}", problem.message);
        }
        if problems.is_empty() && !self.reported.is_empty() {
            info!("all problems of the source folder are repaired");
        }
        self.reported = problems;
    }

    fn scan(&mut self, scope: &Scope) -> Vec<Change> {
        let now = (self.clock.0)();
        self.own_problems.clear();
        match scope {
            Scope::Files(names)
                if folder_id(&self.path).is_ok_and(|id| self.steady.is_same(id)) =>
            {
                for name in names {
                    self.scan_file(name, None);
                }
            }
            _ => {
                if let Err(message) = self.scan_all(*scope == Scope::Settled, now) {
                    self.own_problems.insert(FileProblem {
                        file: String::new(),
                        message,
                    });
                }
            }
        }
        for name in self.last_good.failed() {
            self.last_good.keep(&name, self.folder.objects(&name));
        }
        self.folder.changes()
    }

    /// Compares everything. `settled`: leave files that changed a moment ago. Whoever replaces the folder is busy: what was
    /// read stays until another one is complete.
    fn scan_all(&mut self, settled: bool, now: SystemTime) -> Result<(), String> {
        self.unsettled = false;
        let listed = folder_id(&self.path).and_then(|id| Ok((id, self.list()?)));
        let (id, names) = listed.map_err(|error| {
            self.steady.lose();
            format!("the folder cannot be read: {error}; the last state stays")
        })?;
        let replaced = !self.steady.is_same(id);
        let listing = if replaced {
            self.listing(&names)
        } else {
            Listing::new()
        };
        if !self.steady.believes(id, listing, now) {
            return Err(
                "the folder is another one than before; the last state stays until the new one has had \
                 manifests that did not change for 2 s"
                    .to_owned(),
            );
        }
        // All of another folder has settled, and what it lacks is gone.
        let gone = if replaced {
            self.absent(&names)
        } else {
            self.steady.gone(self.folder.files(), &names, now)
        };
        for name in gone {
            self.forget(&name);
        }
        let settled_before = (settled && !replaced).then(|| now - SETTLE);
        for name in names {
            self.scan_file(&name, settled_before);
        }
        Ok(())
    }

    fn absent(&self, listed: &BTreeSet<String>) -> Vec<String> {
        let known = self.folder.files();
        let absent = known.filter(|file| !listed.contains(*file));
        absent.map(Into::into).collect()
    }

    fn listing(&self, names: &BTreeSet<String>) -> Listing {
        let of = |name: &String| {
            let metadata = fs::metadata(self.path.join(name)).ok();
            (name.clone(), metadata.as_ref().map(fingerprint))
        };
        names.iter().map(of).collect()
    }

    /// Whether another look is due soon.
    fn is_waiting(&self) -> bool {
        self.unsettled || self.steady.is_waiting()
    }

    fn list(&mut self) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string()
                && is_manifest(&name)
            {
                names.insert(name);
            }
        }
        if names.len() > FILES_MAX {
            let message = format!(
                "the folder holds {} manifests; the first {FILES_MAX} are used",
                names.len()
            );
            self.own_problems.insert(FileProblem {
                file: String::new(),
                message,
            });
            names = names.into_iter().take(FILES_MAX).collect();
        }
        Ok(names)
    }

    fn forget(&mut self, name: &str) {
        self.fingerprints.remove(name);
        self.folder.remove(name);
        self.last_good.forget(name);
    }

    fn scan_file(&mut self, name: &str, settled_before: Option<SystemTime>) {
        let path = self.path.join(name);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return self.forget(name),
            Err(error) => {
                // A link that leads nowhere is not a file that was removed.
                let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
                if absent(&error) && fs::symlink_metadata(&path).is_err_and(|error| absent(&error))
                {
                    return self.forget(name);
                }
                self.fingerprints.remove(name);
                return self.update(name, Err(format!("cannot be read: {error}")));
            }
        };
        let fingerprint = fingerprint(&metadata);
        let unsettled = settled_before
            .is_some_and(|before| metadata.modified().is_ok_and(|modified| modified > before));
        if self.fingerprints.get(name) == Some(&fingerprint) {
            return;
        }
        if unsettled {
            self.unsettled = true;
            return;
        }
        self.fingerprints.insert(name.into(), fingerprint);
        match read_limited(&path, FILE_MAX_BYTES) {
            Ok(text) => self.update(name, Ok(&text)),
            Err(message) => self.update(name, Err(message)),
        }
    }

    /// Follows the folder until `stop` turns true. `watch` was made before the folder was first read, so that nothing
    /// falls between.
    pub(crate) async fn run(
        mut self,
        mut watch: Option<FolderWatch>,
        hub: Hub,
        metrics: Metrics,
        mut stop: channel::Receiver<bool>,
    ) {
        self.report();
        self.publish_metrics(&hub, &metrics);
        loop {
            let pause = if watch.is_some() && !self.is_waiting() {
                RESCAN_INTERVAL
            } else {
                POLL_INTERVAL
            };
            let scope = tokio::select! {
                scope = next_scope(&mut watch) => scope,
                () = sleep(pause) => Scope::Settled,
                () = self.leads_elsewhere() => {
                    watch = None;
                    Scope::Settled
                }
                () = crate::stopped(&mut stop) => return,
            };
            if watch.is_none() {
                watch = FolderWatch::open(&self.path).ok();
            }
            // Reading and parsing may take long; the runtime's workers are for streams.
            let scanned = tokio::task::spawn_blocking(move || {
                let changes = self.scan(&scope);
                (self, changes)
            });
            let Ok((source, changes)) = scanned.await else {
                error!("reading the source folder failed; it is no longer followed");
                return;
            };
            self = source;
            self.report();
            if !changes.is_empty() {
                let objects = changes.len();
                let diff = hub.apply(changes);
                info!(
                    objects,
                    changed = diff.changed.len(),
                    removed = diff.removed.len(),
                    "source changed"
                );
            }
            self.publish_metrics(&hub, &metrics);
        }
    }

    /// Waits until the path leads to another folder, as when a link is changed: no watch on a folder reports that. While
    /// such a change is already known the poll looks after it.
    async fn leads_elsewhere(&self) {
        if self.steady.is_waiting() {
            return std::future::pending().await;
        }
        loop {
            sleep(POLL_INTERVAL).await;
            let path = self.path.clone();
            let id = tokio::task::spawn_blocking(move || folder_id(&path)).await;
            if !id.is_ok_and(|id| id.is_ok_and(|id| self.steady.is_same(id))) {
                return;
            }
        }
    }

    fn publish_metrics(&self, hub: &Hub, metrics: &Metrics) {
        metrics.source_problems.set(self.reported.len() as i64);
        crate::publish_objects(hub, metrics);
    }
}

/// Makes the watch on `path`; without one the folder is polled.
pub(crate) fn watch_folder(path: &Path) -> Option<FolderWatch> {
    FolderWatch::open(path)
        .inspect_err(|error| {
            warn!(folder = %path.display(), %error, "cannot watch the folder (fs.inotify limits?); polling it");
        })
        .ok()
}

/// Waits for events, then for quiet. Drops a watch that the kernel has ended.
async fn next_scope(watch: &mut Option<FolderWatch>) -> Scope {
    let Some(events) = watch else {
        return std::future::pending().await;
    };
    let Seen {
        mut names,
        mut everything,
        mut lost,
    } = events.next().await;
    let last = Instant::now() + DEBOUNCE_MAX;
    while !lost {
        let quiet = (Instant::now() + DEBOUNCE).min(last);
        let Ok(more) = timeout_at(quiet, events.next()).await else {
            break;
        };
        names.extend(more.names);
        everything |= more.everything;
        lost |= more.lost;
    }
    if lost {
        *watch = None;
    }
    if lost || everything {
        Scope::All
    } else {
        Scope::Files(names)
    }
}

fn folder_id(path: &Path) -> io::Result<FolderId> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn fingerprint(metadata: &fs::Metadata) -> Fingerprint {
    (
        metadata.dev(),
        metadata.ino(),
        metadata.ctime(),
        metadata.ctime_nsec(),
        metadata.len(),
    )
}

/// Whether a file of that name is read. Hidden files are editors' and mounts' own.
fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read_limited(path: &Path, max_bytes: u64) -> Result<String, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    let file = fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > max_bytes {
        return Err(format!("is larger than {max_bytes} bytes; split it"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        format!("is not UTF-8 (from byte {valid} on)")
    })
}

#[cfg(test)]
mod tests;
