//! Tests that cannot run here say so, and are counted as skipped instead of passed.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Names the file that collects skipped tests.
pub const FILE_VARIABLE: &str = "WEFT_SKIP_FILE";

/// Set in the soak tier.
pub const SOAK_VARIABLE: &str = "WEFT_SOAK";

/// Notes that a test cannot run on this machine; the test then returns. The reason says what is missing.
///
/// # Errors
/// The note cannot be written: the test must fail, since nobody would know that it did not run.
pub fn note(test: &str, reason: &str) -> Result<()> {
    let line = format!("{test}: {reason}\n");
    match env::var_os(FILE_VARIABLE) {
        None => eprint!("skipped: {line}"),
        Some(path) => fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .context("cannot note a skipped test")?,
    }
    Ok(())
}

/// Whether tests shall take their long form.
#[must_use]
pub fn is_soak() -> bool {
    env::var_os(SOAK_VARIABLE).is_some()
}

/// The file that collects skipped tests; it goes when this is dropped.
#[derive(Debug)]
pub struct Notes {
    path: PathBuf,
}

impl Notes {
    /// Begins to collect.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn collect() -> Result<Self> {
        let path = env::temp_dir().join(format!("weft-skips-{}", std::process::id()));
        fs::write(&path, "").with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The notes so far.
    ///
    /// # Errors
    /// The file has gone.
    pub fn read(&self) -> Result<Vec<String>> {
        let text =
            fs::read_to_string(&self.path).context("cannot read the notes of skipped tests")?;
        Ok(text.lines().map(ToOwned::to_owned).collect())
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        // It is in the temporary folder: leaving it would be untidy, not wrong.
        drop(fs::remove_file(&self.path));
    }
}
