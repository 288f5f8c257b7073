//! Which workloads are enrolled, on disk: so that a restarted agent takes them over, and `uninstall` undoes them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::capture::Record;

/// Name of the file inside the run directory.
pub(super) const FILE_NAME: &str = "workloads.json";
/// Where a file that cannot be understood is put, also as the sign that enrolments are not known.
pub(super) const DAMAGED_NAME: &str = "workloads.json.damaged";
/// Largest file read, in bytes: 4096 workloads of 4 KiB each.
const FILE_MAX_BYTES: u64 = 16 << 20;
/// Format of the file.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    workloads: Vec<Record>,
}

/// The file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// Reading or writing failed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not ours, or damaged.
    #[error(
        "{path} is damaged ({reason}) and was put aside as {DAMAGED_NAME}: what was captured stays captured without service; enrol it again, then remove {DAMAGED_NAME}"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The file of enrolments.
#[derive(Debug, Clone)]
pub struct Records {
    path: PathBuf,
}

impl Records {
    /// The file in `run_dir`.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self {
            path: run_dir.join(FILE_NAME),
        }
    }

    /// What an earlier agent left; nothing if there is no file. A damaged file is put aside, so that it is neither
    /// overwritten nor forgotten ([`Records::are_damaged`]).
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn load(&self) -> Result<Vec<Record>, RecordsError> {
        let loaded = self.read();
        if matches!(loaded, Err(RecordsError::Damaged { .. })) {
            fs::rename(&self.path, self.path.with_file_name(DAMAGED_NAME))
                .map_err(self.failed("put aside"))?;
        }
        loaded
    }

    /// Whether enrolments were lost and nobody has said yet that this is settled, by removing the damaged file.
    #[must_use]
    pub fn are_damaged(&self) -> bool {
        self.path.with_file_name(DAMAGED_NAME).exists()
    }

    fn read(&self) -> Result<Vec<Record>, RecordsError> {
        let damaged = |reason: String| RecordsError::Damaged {
            path: self.path.clone(),
            reason,
        };
        let bytes = match fs::metadata(&self.path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(self.failed("look at")(source)),
        };
        if bytes > FILE_MAX_BYTES {
            return Err(damaged(format!(
                "{bytes} bytes, at most {FILE_MAX_BYTES} expected"
            )));
        }
        let text = fs::read(&self.path).map_err(self.failed("read"))?;
        let contents: Contents =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if contents.version != VERSION {
            return Err(damaged(format!(
                "version {} instead of {VERSION}",
                contents.version
            )));
        }
        Ok(contents.workloads)
    }

    /// Replaces the file atomically; on failure the former one stays.
    ///
    /// # Errors
    /// When it cannot be written (a full disk).
    pub fn save(&self, workloads: Vec<Record>) -> Result<(), RecordsError> {
        let temporary = self.path.with_extension("json.new");
        let written = self.write(
            &temporary,
            &Contents {
                version: VERSION,
                workloads,
            },
        );
        if written.is_err() {
            // Half a file is of no use; the error that matters is the first one.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        fs::rename(&temporary, &self.path).map_err(self.failed("replace"))
    }

    /// Removes the file.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self) -> Result<(), RecordsError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove")(error))
            }
            _ => Ok(()),
        }
    }

    fn write(&self, temporary: &Path, contents: &Contents) -> Result<(), RecordsError> {
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(temporary)
            .map_err(self.failed("create a file beside"))?;
        let text = serde_json::to_vec_pretty(contents)
            .map_err(|error| self.failed("write")(error.into()))?;
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .map_err(self.failed("write"))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> RecordsError {
        let path = self.path.clone();
        move |source| RecordsError::File {
            action,
            path,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::local::Enrolment;

    use super::*;

    fn record(name: &str) -> Record {
        Record {
            enrolment: Enrolment {
                namespace: "shop".into(),
                name: name.into(),
                netns: format!("/run/netns/{name}"),
                cgroup: None,
            },
            cookie: 7,
            addresses: vec![[10, 0, 0, 1].into()],
            former_sysctls: crate::capture::steering::FormerSysctls::kernel_defaults(),
        }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let records = Records::new(dir.path());
        assert_eq!(records.load().expect("no file yet"), []);
        records
            .save(vec![record("web"), record("cart")])
            .expect("saved");
        assert_eq!(
            records.load().expect("loaded"),
            [record("web"), record("cart")]
        );
        records.remove().expect("removed");
        assert_eq!(records.load().expect("gone"), []);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let records = Records::new(dir.path());
        for text in [
            "",
            "{",
            r#"{"version": 9, "workloads": []}"#,
            r#"{"version": 1, "workloads": [{}]}"#,
        ] {
            fs::write(dir.path().join(FILE_NAME), text).expect("written");
            let error = records.load().expect_err(text).to_string();
            assert!(error.contains(FILE_NAME), "{error}");
            let aside = fs::read_to_string(dir.path().join(DAMAGED_NAME));
            assert_eq!(aside.expect("put aside"), text);
            assert!(records.are_damaged());
            assert_eq!(records.load().expect("no file any more"), []);
        }
    }

    #[test]
    fn a_failed_save_keeps_the_former_file() {
        let dir = tempfile::tempdir().expect("a temp folder");
        let records = Records::new(dir.path());
        records.save(vec![record("web")]).expect("saved");
        // A folder in the way of the temporary file makes every write fail, for root as well.
        fs::create_dir(dir.path().join("workloads.json.new")).expect("in the way");
        records.save(vec![]).expect_err("cannot be written");
        assert_eq!(records.load().expect("still there"), [record("web")]);
    }
}
