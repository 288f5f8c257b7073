//! A Rust toolchain that compiles for the kernel: found by looking, as the agent's build script does.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::programs;

use super::{Need, Requirement, packages};
use crate::shell::{output, say};

const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler that brings `core` compiled for the kernel; it does not disturb rustup's toolchains.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

const REMEDY: &str = "install a rustup nightly with its sources (rustup toolchain install nightly --component rust-src), \
                      or on Debian: apt-get install rustc-web libstd-rust-web-dev-bpf";

/// The toolchain for the eBPF side.
#[derive(Debug)]
struct Toolchain;

impl Requirement for Toolchain {
    fn name(&self) -> String {
        "eBPF toolchain".to_owned()
    }

    fn why(&self) -> String {
        "compiles the kernel's side".to_owned()
    }

    fn found(&self) -> Option<String> {
        nightly_with_sources().or_else(|| {
            rustc_with_core().map(|rustc| format!("{} (prebuilt core)", rustc.display()))
        })
    }

    fn remedy(&self) -> String {
        REMEDY.to_owned()
    }
}

/// The requirement, if these needs have it.
pub fn all(needs: &[Need]) -> impl Iterator<Item = Box<dyn Requirement>> {
    needs
        .contains(&Need::Build)
        .then(|| Box::new(Toolchain) as Box<dyn Requirement>)
        .into_iter()
}

/// Installs Debian's toolchain unless one is there.
pub fn ensure() -> Result<()> {
    if Toolchain.found().is_some() {
        return Ok(());
    }
    if programs::installed("apt-get").is_none() {
        bail!("no Rust toolchain for {TARGET} found; {REMEDY}");
    }
    say("no Rust toolchain for eBPF found, installing Debian's");
    packages::install(&DEBIAN_PACKAGES).context(REMEDY)?;
    Toolchain
        .found()
        .map(drop)
        .with_context(|| format!("still no Rust toolchain for {TARGET} found; {REMEDY}"))
}

/// A rustup nightly whose `rust-src` is installed, so that `-Z build-std=core` works.
fn nightly_with_sources() -> Option<String> {
    let list = output(Command::new("rustup").args(["toolchain", "list"]))?;
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("nightly"))
        .find_map(|name| {
            let sysroot =
                output(Command::new("rustup").args(["run", name, "rustc", "--print", "sysroot"]))?;
            let core = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
            core.is_dir()
                .then(|| format!("rustup toolchain {name} with rust-src"))
        })
}

/// A rustc outside rustup that has `core` for the kernel.
fn rustc_with_core() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([PathBuf::from("/usr/bin")])
        .map(|directory| directory.join("rustc"))
        .filter(|rustc| rustc.is_file())
        .find(|rustc| has_core(rustc))
}

fn has_core(rustc: &Path) -> bool {
    let library =
        output(Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]));
    let Some(entries) = library.and_then(|library| std::fs::read_dir(library).ok()) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}
