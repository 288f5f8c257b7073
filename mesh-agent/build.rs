//! Builds the eBPF programs with an inner cargo and makes them available to `include_bytes!`.
//!
//! The BPF target is not a tier that rustup ships, so the toolchain is found by looking: a rustup nightly with
//! `rust-src` (which compiles `core` itself), else a rustc that has `core` for BPF prebuilt, which Debian packages.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";
const LINKER: &str = "bpf-linker";
const HELP: &str = "run `cargo xtask setup`, or install one by hand: either a rustup nightly with the rust-src component \
    (rustup toolchain install nightly --component rust-src), or on Debian the packages rustc-web and \
    libstd-rust-web-dev-bpf; WEFT_BPF_RUSTC may name a rustc that has core for bpfel-unknown-none";

/// How `core` for BPF comes about.
enum Toolchain {
    /// `cargo +nightly -Z build-std=core`.
    Nightly,
    /// A rustc that has it.
    Prebuilt(PathBuf),
}

fn main() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let programs = manifest_dir.join("../mesh-ebpf");
    for path in ["src", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", programs.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=WEFT_BPF_RUSTC");
    println!("cargo::rerun-if-env-changed=PATH");
    if !runs(Command::new(LINKER).arg("--version")) {
        return Err(format!(
            "{LINKER} is not in PATH, and the eBPF programs cannot be linked without it; {HELP}"
        )
        .into());
    }
    let toolchain = find_toolchain()?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let object = build(&programs, &out_dir.join("ebpf"), &toolchain)?;
    fs::copy(object, out_dir.join("weft-ebpf.o"))?;
    Ok(())
}

fn find_toolchain() -> Result<Toolchain, Box<dyn Error>> {
    if let Some(rustc) = env::var_os("WEFT_BPF_RUSTC") {
        let rustc = PathBuf::from(rustc);
        return match has_core(&rustc) {
            true => Ok(Toolchain::Prebuilt(rustc)),
            false => Err(format!(
                "WEFT_BPF_RUSTC={} has no core for {TARGET}",
                rustc.display()
            )
            .into()),
        };
    }
    let sysroot =
        output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    if sysroot.is_some_and(|root| {
        Path::new(&root)
            .join("lib/rustlib/src/rust/library/core")
            .is_dir()
    }) {
        return Ok(Toolchain::Nightly);
    }
    ["/usr/bin/rustc", "/usr/local/bin/rustc"]
        .into_iter()
        .map(PathBuf::from)
        .find(|rustc| has_core(rustc))
        .map(Toolchain::Prebuilt)
        .ok_or_else(|| format!("no Rust toolchain can compile for {TARGET}; {HELP}").into())
}

fn has_core(rustc: &Path) -> bool {
    let libdir = output(Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]));
    let Some(entries) = libdir.and_then(|dir| fs::read_dir(dir).ok()) else {
        return false;
    };
    entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn build(
    programs: &Path,
    target_dir: &Path,
    toolchain: &Toolchain,
) -> Result<PathBuf, Box<dyn Error>> {
    let mut cargo = match toolchain {
        Toolchain::Nightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]);
            command
        }
        Toolchain::Prebuilt(_) => {
            Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        }
    };
    // What the outer cargo set is about the host: wrappers, flags and toolchain must not leak into the inner build.
    for (name, _) in env::vars_os() {
        let keep = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR"]
            .iter()
            .any(|kept| name == *kept);
        let text = name.to_string_lossy();
        if !keep && (text.starts_with("CARGO") || text.starts_with("RUST") && text != "RUSTUP_HOME")
        {
            cargo.env_remove(&name);
        }
    }
    cargo
        .args([
            "build",
            "--release",
            "--package",
            "mesh-ebpf",
            "--bin",
            "weft-ebpf",
            "--features",
            "bpf",
        ])
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .arg("--manifest-path")
        .arg(programs.join("Cargo.toml"))
        // Map definitions need BTF, and BTF is made from debug information.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("-Cdebuginfo=2\x1f-Clinker={LINKER}\x1f-Clink-arg=--btf"),
        );
    match toolchain {
        Toolchain::Nightly => {
            cargo.args(["-Z", "build-std=core"]);
        }
        // aya-ebpf uses an unstable feature.
        Toolchain::Prebuilt(rustc) => {
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
        }
    }
    let status = cargo
        .status()
        .map_err(|error| format!("cannot start cargo for the eBPF programs: {error}"))?;
    if !status.success() {
        return Err(format!("building the eBPF programs failed ({status}); {HELP}").into());
    }
    Ok(target_dir.join(TARGET).join("release/weft-ebpf"))
}

fn runs(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
