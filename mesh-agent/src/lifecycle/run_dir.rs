//! The run directory: locked by one agent at a time, and left as it was found when an agent cannot start.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::{AgentError, records, standalone};

/// Attempts to lock the file that the path names: between opening and locking it, an agent that ends may remove it.
const LOCK_ATTEMPTS: usize = 8;

/// The run directory, held by one agent at a time.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    /// Folders that were made for it, the innermost first.
    made: Vec<PathBuf>,
    /// No agent had left anything in it.
    is_fresh: bool,
    /// Released when its last copy is closed, also one in another process (flock(2)).
    lock: Mutex<Option<File>>,
}

impl RunDir {
    /// Last-good state of the mesh.
    pub(super) const SNAPSHOT: &'static str = "mesh.snapshot";
    const LOCK: &'static str = "agent.lock";
    /// Everything that agents leave in it, enrolments and the standalone authority aside.
    const FILES: [&'static str; 5] = [
        Self::SNAPSHOT,
        Self::LOCK,
        mesh_api::local::SOCKET_NAME,
        mesh_api::handover::SOCKET_NAME,
        standalone::ROOTS_FILE,
    ];

    /// Makes the folder if need be, readable for root alone, and locks it.
    pub(super) fn open(path: &Path) -> Result<Self, AgentError> {
        let made: Vec<PathBuf> = path
            .ancestors()
            .take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists())
            .map(Path::to_owned)
            .collect();
        if !path.is_dir() {
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(path);
            made.map_err(AgentError::file("create the run directory", path))?;
        }
        let is_fresh = Self::FILES
            .iter()
            .chain(&[
                records::FILE_NAME,
                records::DAMAGED_NAME,
                standalone::CA_DIR,
            ])
            .all(|name| !path.join(name).exists());
        Ok(Self {
            lock: Mutex::new(Some(lock(path)?)),
            path: path.to_owned(),
            made,
            is_fresh,
        })
    }

    /// The folder of a running agent, which has given its lock.
    pub(super) fn inherited(path: &Path, lock: File) -> Self {
        Self {
            path: path.to_owned(),
            made: Vec::new(),
            is_fresh: false,
            lock: Mutex::new(Some(lock)),
        }
    }

    /// A copy of the lock, for the agent that takes over.
    pub(super) fn share_lock(&self) -> io::Result<File> {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock.as_ref().ok_or(io::ErrorKind::NotFound)?.try_clone()
    }

    /// The folder is another agent's from here on.
    pub(super) fn give_up(&self) {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// After a failed start: removes what this agent made, and keeps what it found.
    pub(super) fn undo(self) {
        let made = self.made.clone();
        if self.is_fresh {
            self.remove_files();
        }
        for folder in made {
            // Not empty means that somebody else uses it by now.
            let _ = fs::remove_dir(folder);
        }
    }

    /// Removes everything that agents make, and the folder if nothing else is in it.
    pub(super) fn remove_all(self) {
        let path = self.path.clone();
        self.remove_files();
        let _ = fs::remove_dir(path);
    }

    fn remove_files(self) {
        for name in Self::FILES
            .iter()
            .chain(&[records::FILE_NAME, records::DAMAGED_NAME])
        {
            // A file that is not there is what we want.
            let _ = fs::remove_file(self.path.join(name));
        }
        let _ = fs::remove_dir_all(self.path.join(standalone::CA_DIR));
    }
}

fn lock(path: &Path) -> Result<File, AgentError> {
    let path_of_lock = path.join(RunDir::LOCK);
    for _ in 0..LOCK_ATTEMPTS {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path_of_lock)
            .map_err(AgentError::file("create", &path_of_lock))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(AgentError::Running(path.to_owned())),
            Err(TryLockError::Error(error)) => {
                return Err(AgentError::file("lock", path_of_lock)(error));
            }
        }
        if is_the_file_at(&file, &path_of_lock) {
            return Ok(file);
        }
    }
    let gone = io::Error::from(io::ErrorKind::NotFound);
    Err(AgentError::file("lock", path_of_lock)(gone))
}

fn is_the_file_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(named)) => (ours.dev(), ours.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_start_leaves_nothing_in_a_new_folder() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let path = dir.path().join("a/b");
        let run_dir = RunDir::open(&path).expect("opened");
        fs::write(path.join(RunDir::SNAPSHOT), "x").expect("written");
        fs::create_dir(path.join(standalone::CA_DIR)).expect("made");
        run_dir.undo();
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0);
    }

    #[test]
    fn a_failed_start_keeps_what_an_earlier_agent_left() {
        let dir = tempfile::tempdir().expect("a temp folder");
        fs::write(dir.path().join(records::FILE_NAME), "records").expect("written");
        fs::write(dir.path().join(RunDir::SNAPSHOT), "state").expect("written");
        RunDir::open(dir.path()).expect("opened").undo();
        for name in [records::FILE_NAME, RunDir::SNAPSHOT] {
            assert!(dir.path().join(name).exists(), "{name} is gone");
        }
    }

    #[test]
    fn a_lock_that_was_shared_is_held_until_the_last_copy_goes() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let first = RunDir::open(dir.path()).expect("opened");
        let second = RunDir::inherited(dir.path(), first.share_lock().expect("a copy"));
        first.give_up();
        drop(first);
        RunDir::open(dir.path()).expect_err("held by the second");
        drop(second);
        RunDir::open(dir.path()).expect("free again");
    }

    #[test]
    fn one_agent_at_a_time_holds_it() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let first = RunDir::open(dir.path()).expect("opened");
        let error = RunDir::open(dir.path()).expect_err("held");
        assert!(error.to_string().contains("another agent is running"));
        drop(first);
        RunDir::open(dir.path()).expect("free again").remove_all();
        assert!(!dir.path().exists());
    }
}
