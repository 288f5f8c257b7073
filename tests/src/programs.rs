//! Where the programs are: Weft's own, built by cargo, and those of the distribution.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};

/// Names the folder with Weft's programs when it is not the one of the running executable.
pub const DIRECTORY_VARIABLE: &str = "WEFT_BIN_DIR";

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Sets the folder of Weft's own programs for this process, once.
///
/// # Errors
/// It has been set to another folder.
pub fn use_directory(directory: &Path) -> Result<()> {
    if DIRECTORY.get_or_init(|| directory.to_owned()) != directory {
        bail!("the programs' folder has been set already");
    }
    Ok(())
}

/// Path of one of Weft's own programs: in the folder set by [`use_directory`] or `$WEFT_BIN_DIR`, else near the running
/// executable (a test lives in `target/PROFILE/deps`, the programs in `target/PROFILE`).
///
/// # Errors
/// It has not been built.
pub fn own(name: &str) -> Result<PathBuf> {
    let named = DIRECTORY
        .get()
        .cloned()
        .or_else(|| env::var_os(DIRECTORY_VARIABLE).map(PathBuf::from));
    if let Some(directory) = named {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
        bail!("{} does not exist (cargo xtask build)", path.display());
    }
    let executable = env::current_exe().context("cannot find the running executable")?;
    executable
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "{name} is not built (cargo xtask build), looked near {}",
                executable.display()
            )
        })
}

/// Names the folder with tools that xtask has installed for the project alone.
pub const TOOLS_VARIABLE: &str = "WEFT_TOOLS_DIR";

/// The folder of such tools: `target/tools`, unless the environment names another.
#[must_use]
pub fn tools_directory() -> PathBuf {
    env::var_os(TOOLS_VARIABLE).map_or_else(
        || {
            env::var_os("CARGO_TARGET_DIR")
                .map_or_else(
                    || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
                    PathBuf::from,
                )
                .join("tools")
        },
        PathBuf::from,
    )
}

/// Path of a tool: the machine's own, else the one that xtask has installed.
#[must_use]
pub fn tool(name: &str) -> Option<PathBuf> {
    let ours = tools_directory().join(name);
    installed(name).or_else(|| ours.is_file().then_some(ours))
}

/// Path of a program of the distribution, looked for on `PATH` and in the folders for administrators.
#[must_use]
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}
