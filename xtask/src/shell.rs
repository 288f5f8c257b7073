//! Running other programs with a line that says what happens.

use std::{
    env,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
}

/// The cargo that runs us, so that nested calls use the same toolchain.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The folder of compiled programs of a profile.
pub fn target_directory(release: bool) -> PathBuf {
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join(if release { "release" } else { "debug" })
}

/// Prints a line of progress, on standard error so that standard output stays for results.
pub fn say(text: &str) {
    eprintln!("==> {text}");
}

/// Runs a command whose output the user sees, on standard error so that standard output stays for results; an error
/// if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let line = line_of(command);
    say(&line);
    let began = Instant::now();
    let status = command
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot run {line}"))?;
    if !status.success() {
        bail!(
            "{line}: {status} after {:.0} s",
            began.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// Runs a command silently and returns what it printed; `None` if it does not exist or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command as a user would type it.
pub fn line_of(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program())
        .to_owned();
    let words: Vec<OsString> = std::iter::once(program)
        .chain(command.get_args().map(OsString::from))
        .collect();
    words
        .iter()
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether we may make namespaces and load programs into the kernel.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
