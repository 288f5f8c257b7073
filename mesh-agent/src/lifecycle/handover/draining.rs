//! Agents that were replaced and still serve connections: each keeps a file in `<run-dir>/draining`, locked for as long
//! as it lives, so that whoever runs now can tell of it.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use mesh_api::local::DrainingAgent;

/// Folder inside the run directory.
pub(in crate::lifecycle) const FOLDER: &str = "draining";
/// Files read at a time: an agent drains for an hour by default, and nobody upgrades twice a minute.
const AGENTS_MAX: usize = 128;
/// Largest file read, in bytes.
const FILE_MAX_BYTES: u64 = 4096;

/// The file of this process. Removed when it is dropped.
#[derive(Debug)]
pub(in crate::lifecycle) struct Notice {
    path: PathBuf,
    file: File,
}

impl Notice {
    /// Puts up a notice.
    pub(in crate::lifecycle) fn post(run_dir: &Path, agent: &DrainingAgent) -> io::Result<Self> {
        let folder = run_dir.join(FOLDER);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        let path = folder.join(agent.pid.to_string());
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        file.try_lock()?;
        let notice = Self { path, file };
        notice.update(agent)?;
        Ok(notice)
    }

    /// Replaces what it says. A reader that comes in between sees nothing, as if the process had ended.
    pub(in crate::lifecycle) fn update(&self, agent: &DrainingAgent) -> io::Result<()> {
        let text = serde_json::to_vec(agent)?;
        let mut file = &self.file;
        io::Seek::rewind(&mut file)?;
        file.write_all(&text)?;
        file.set_len(text.len() as u64)
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        // A file that stays is not locked any more: it is taken away by the next reader. The folder may hold others.
        let _ = fs::remove_file(&self.path);
        if let Some(folder) = self.path.parent() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// The agents that drain now, by process id. What dead ones left is removed.
pub(in crate::lifecycle) fn list(run_dir: &Path) -> Vec<DrainingAgent> {
    let Ok(entries) = fs::read_dir(run_dir.join(FOLDER)) else {
        return Vec::new();
    };
    let mut found: Vec<DrainingAgent> = entries
        .flatten()
        .take(AGENTS_MAX)
        .filter_map(|entry| read(&entry.path()))
        .collect();
    found.sort_by_key(|agent| agent.pid);
    found
}

fn read(path: &Path) -> Option<DrainingAgent> {
    let file = File::open(path).ok()?;
    if file.try_lock_shared().is_ok() {
        // Nobody holds it: its process was killed.
        let _ = fs::remove_file(path);
        return None;
    }
    if file.metadata().ok()?.len() > FILE_MAX_BYTES {
        return None;
    }
    serde_json::from_reader(file).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(pid: u32, connections: u64) -> DrainingAgent {
        DrainingAgent {
            pid,
            version: "0.1.0".into(),
            connections,
            ends_at: 7,
        }
    }

    #[test]
    fn living_agents_are_listed_and_the_notices_of_dead_ones_are_removed() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(list(dir.path()), []);
        let first = Notice::post(dir.path(), &agent(1, 12_345)).expect("posted");
        let _second = Notice::post(dir.path(), &agent(2, 2)).expect("posted");
        first.update(&agent(1, 3)).expect("updated");
        let dead = dir.path().join(FOLDER).join("3");
        fs::write(&dead, "{}").expect("written");
        assert_eq!(list(dir.path()), [agent(1, 3), agent(2, 2)]);
        assert!(!dead.exists());
        drop(first);
        assert_eq!(list(dir.path()), [agent(2, 2)]);
    }

    #[test]
    fn the_last_notice_takes_the_folder_with_it() {
        let dir = tempfile::tempdir().expect("a folder");
        drop(Notice::post(dir.path(), &agent(1, 1)).expect("posted"));
        assert!(!dir.path().join(FOLDER).exists());
    }
}
