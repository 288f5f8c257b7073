//! `cargo xtask image`: container images as OCI archives, without a container engine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use mesh_tests::oci::{Image, Written};

use crate::{
    build,
    shell::{root, run as execute, say, target_directory},
};

/// Who runs the control plane: nobody in particular, by a number that no distribution gives away.
const NOBODY: &str = "65532:65532";

/// Write container images: the agent (with weft and, where it is built, the CNI plugin) and the control plane
///
/// OCI archives in target/images, for `skopeo copy oci-archive:…`, `ctr images import`, `kind load image-archive` or
/// `docker load`. They hold the programs, the C library that they need, and nothing else; the same programs give the same
/// digest. The programs are built first.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Where the images will be: put before `weft/agent` and `weft/control`
    #[arg(long, default_value = "localhost")]
    registry: String,
    /// The images' tag
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Unoptimised programs, as the tests use them
    #[arg(long)]
    debug: bool,
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    build::programs(!options.debug)?;
    let folder = options.output.clone().unwrap_or_else(default_folder);
    let written = write(
        &target_directory(!options.debug),
        &options.registry,
        &options.tag,
        &folder,
    )?;
    for image in written {
        println!(
            "{}  {} bytes  {}",
            image.path.display(),
            image.bytes,
            image.digest
        );
    }
    Ok(())
}

/// Where archives go unless the user says otherwise.
pub fn default_folder() -> PathBuf {
    target_directory(false)
        .parent()
        .map_or_else(|| root().join("target"), Path::to_path_buf)
        .join("images")
}

/// Writes both images from the programs of a folder.
pub fn write(programs: &Path, registry: &str, tag: &str, folder: &Path) -> Result<Vec<Written>> {
    let stripped = folder.join("stripped");
    fs::create_dir_all(&stripped)
        .with_context(|| format!("cannot create {}", stripped.display()))?;
    let take = |name: &str| -> Result<PathBuf> {
        let target = stripped.join(name);
        // Names of functions stay, for backtraces.
        let mut command = Command::new("strip");
        command
            .args(["--strip-debug", "-o"])
            .arg(&target)
            .arg(programs.join(name));
        execute(&mut command).context("cannot strip (Debian package binutils)")?;
        Ok(target)
    };
    let mut agent = base(
        &format!("{registry}/weft/agent:{tag}"),
        "the agent of a node",
    )?
    .program(&take("mesh-agent")?, "/mesh-agent")?
    .program(&take("weft")?, "/weft")?
    .entrypoint(&["/mesh-agent"]);
    if programs.join("weft-cni").is_file() {
        agent = agent.program(&take("weft-cni")?, "/weft-cni")?;
    }
    let control = base(
        &format!("{registry}/weft/control:{tag}"),
        "the control plane",
    )?
    .program(&take("mesh-control")?, "/mesh-control")?
    .entrypoint(&["/mesh-control"])
    .user(NOBODY);
    let written = vec![
        agent.write(&folder.join("weft-agent.tar"))?,
        control.write(&folder.join("weft-control.tar"))?,
    ];
    fs::remove_dir_all(&stripped)?;
    say(&format!(
        "images {registry}/weft/{{agent,control}}:{tag} are in {}",
        folder.display()
    ));
    Ok(written)
}

fn base(reference: &str, what: &str) -> Result<Image> {
    let image = Image::new(reference)
        .text(
            "/etc/passwd",
            "root:x:0:0::/:/none\nweft:x:65532:65532::/:/none\n",
        )?
        .text("/etc/group", "root:x:0:\nweft:x:65532:\n")?
        // How the C library looks names up; without it, it would not ask DNS first for some.
        .text("/etc/nsswitch.conf", "hosts: files dns\n")?
        .folder("/tmp", 0o1777)?
        .environment("PATH", "/")
        .label("org.opencontainers.image.title", &format!("Weft, {what}"))
        .label(
            "org.opencontainers.image.version",
            env!("CARGO_PKG_VERSION"),
        )
        .label(
            "org.opencontainers.image.licenses",
            env!("CARGO_PKG_LICENSE"),
        );
    Ok(image)
}
