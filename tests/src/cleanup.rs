//! Removing everything that bears a lab's prefix, whoever made it and however the run ended.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{cgroup, cluster::local::sweep, netns};

/// Where the kernel's BPF file system belongs.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Longest prefix: interface and socket paths are made from it, and UNIX socket paths end at 108 bytes.
const PREFIX_MAX_BYTES: usize = 16;

/// Exit code after a signal, as shells count it for SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// The labs alive in this process, and whether a signal has closed the gate for new ones.
#[derive(Debug, Default)]
struct Live {
    prefixes: Vec<String>,
    closing: bool,
}

static LIVE: OnceLock<Mutex<Live>> = OnceLock::new();

fn live() -> MutexGuard<'static, Live> {
    LIVE.get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Permission to make something that a signal would have to remove. While one is held, clean-up waits.
#[derive(Debug)]
pub struct Permit(#[expect(dead_code, reason = "held for its lock")] MutexGuard<'static, Live>);

/// Asks for a [`Permit`]; once a signal has begun the clean-up, the caller is parked until the process ends.
#[must_use]
pub fn permit() -> Permit {
    let guard = live();
    if guard.closing {
        drop(guard);
        loop {
            std::thread::park();
        }
    }
    Permit(guard)
}

/// Notes a lab for removal on a signal; the first call installs the handler.
///
/// # Errors
/// The prefix is not usable, or the handler cannot be installed.
pub fn register(prefix: &str) -> Result<()> {
    check_prefix(prefix)?;
    static HANDLER: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    HANDLER
        .get_or_init(|| handle_signals().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)?;
    live().prefixes.push(prefix.to_owned());
    Ok(())
}

/// Forgets a lab: it has been removed, or shall outlive this process.
pub fn unregister(prefix: &str) {
    live().prefixes.retain(|known| known != prefix);
}

fn handle_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    std::thread::Builder::new()
        .name("lab-signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                let prefixes = {
                    let mut live = live();
                    live.closing = true;
                    std::mem::take(&mut live.prefixes)
                };
                eprintln!("\nlab: interrupted, removing what this run made");
                for prefix in prefixes {
                    if let Err(error) = remove(&prefix) {
                        eprintln!("lab: {error:#}");
                    }
                }
                std::process::exit(EXIT_INTERRUPTED);
            }
        })?;
    Ok(())
}

/// Directory for the files of a lab.
#[must_use]
pub fn directory(prefix: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{prefix}.lab"))
}

/// Kills and removes everything that a lab or cluster with this prefix has made: processes, containers, mounts, namespaces,
/// cgroups, pinned BPF objects, files. What is gone already is no error; everything is tried even when a part fails.
///
/// # Errors
/// The prefix is unusable, or the first thing that could not be removed.
pub fn remove(prefix: &str) -> Result<()> {
    check_prefix(prefix)?;
    let directory = directory(prefix);
    let containers = sweep::containers(&directory);
    let mut outcome = cgroup::mount_point().and_then(|root| cgroup::remove(&root.join(prefix)));
    if !containers.is_empty() {
        outcome = outcome.and(sweep::remove_containers(&containers));
    }
    outcome = outcome.and(sweep::unmount(&directory));
    for name in entries_of(Path::new(netns::NETNS_DIR), prefix) {
        outcome = outcome.and(netns::delete(&name));
    }
    for name in entries_of(Path::new(BPFFS), prefix) {
        outcome = outcome.and(remove_directory(&Path::new(BPFFS).join(name)));
    }
    outcome.and(remove_directory(&directory))
}

/// Everything of a lab that still exists, for a test to show that nothing does.
///
/// # Errors
/// There is no cgroup mount to look at.
pub fn leftovers(prefix: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let cgroup = cgroup::mount_point()?.join(prefix);
    if cgroup.exists() {
        found.push(format!("cgroup {}", cgroup.display()));
    }
    found.extend(
        entries_of(Path::new(netns::NETNS_DIR), prefix)
            .into_iter()
            .map(|name| format!("namespace {name}")),
    );
    found.extend(
        entries_of(Path::new(BPFFS), prefix)
            .into_iter()
            .map(|name| format!("pins {name}")),
    );
    if directory(prefix).exists() {
        found.push(format!("directory {}", directory(prefix).display()));
    }
    Ok(found)
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn entries_of(directory: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let start = format!("{prefix}-");
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&start))
        .collect()
}

/// A prefix is short, lower-case letters and digits: no dash, so that no prefix is the beginning of another's names.
///
/// # Errors
/// It is not.
pub fn check_prefix(prefix: &str) -> Result<()> {
    let fits = (4..=PREFIX_MAX_BYTES).contains(&prefix.len())
        && prefix
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if !fits {
        bail!("lab prefix {prefix:?}: use 4 to {PREFIX_MAX_BYTES} lower-case letters and digits");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_that_could_name_other_things_is_refused() {
        for bad in [
            "",
            "abc",
            "../etc",
            "with-dash",
            "UPPER",
            "weft.1",
            "averyverylongprefix",
        ] {
            assert!(check_prefix(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(check_prefix("weft4f2a").is_ok());
    }
}
