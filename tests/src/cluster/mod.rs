//! The Kubernetes that the cluster tests use: the user's own, kind, or one of our own making on this machine.
//!
//! [`Cluster::choose`] takes the cluster of `KUBECONFIG` where the user names one, else kind where it is installed, else a
//! local one ([`local`]). Everything that tests do goes through [`Cluster`], so that they run on each of them.

mod kind;
pub mod local;

use std::{
    env,
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::{kind::Kind, local::Local};
use crate::{netns, programs, wait};

/// Set for the tests: the name of the cluster that they shall use.
pub const NAME_VARIABLE: &str = "WEFT_CLUSTER";

/// Name where the user gives none.
pub const DEFAULT_NAME: &str = "weftk8s";

/// A running cluster.
#[derive(Debug)]
pub enum Cluster {
    /// The user's, by `KUBECONFIG`.
    Given(PathBuf),
    /// Made by kind.
    Kind(Kind),
    /// Made by us.
    Local(Local),
}

/// Which kind of cluster there would be, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// `KUBECONFIG` names one.
    Given,
    /// kind is installed.
    Kind,
    /// Neither.
    Local,
}

/// What decides between the kinds of cluster.
#[must_use]
pub fn choose(kubeconfig: Option<&OsStr>, has_kind: bool) -> Choice {
    match kubeconfig {
        Some(path) if !path.is_empty() => Choice::Given,
        _ if has_kind => Choice::Kind,
        _ => Choice::Local,
    }
}

impl Cluster {
    /// What would be used here.
    #[must_use]
    pub fn choice() -> Choice {
        choose(
            env::var_os("KUBECONFIG").as_deref(),
            programs::installed("kind").is_some(),
        )
    }

    /// Starts a cluster of this name with so many nodes; the user's own is taken as it is.
    ///
    /// # Errors
    /// It does not come up; what was made of it is removed.
    pub fn up(name: &str, nodes: u8) -> Result<Self> {
        match Self::choice() {
            Choice::Given => Self::open(name)?.context("KUBECONFIG names no file"),
            Choice::Kind => Ok(Self::Kind(Kind::up(name, nodes)?)),
            Choice::Local => Ok(Self::Local(Local::up(name, nodes)?)),
        }
    }

    /// The cluster of this name, if it is up.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn open(name: &str) -> Result<Option<Self>> {
        Ok(match Self::choice() {
            Choice::Given => env::var_os("KUBECONFIG").map(|path| Self::Given(path.into())),
            Choice::Kind => Kind::open(name)?.map(Self::Kind),
            Choice::Local => Local::open(name)?.map(Self::Local),
        })
    }

    /// The cluster that `cargo xtask cluster test` made for the tests of this process, if it did.
    ///
    /// # Errors
    /// It was made and is gone.
    pub fn of_tests() -> Result<Option<Self>> {
        let Some(name) = env::var_os(NAME_VARIABLE) else {
            return Ok(None);
        };
        let name = name.to_string_lossy();
        let cluster = Self::open(&name)?;
        cluster
            .with_context(|| format!("the cluster {name} is not up"))
            .map(Some)
    }

    /// Removes it; the user's own is left alone.
    ///
    /// # Errors
    /// Something stays behind.
    pub fn down(name: &str) -> Result<()> {
        match Self::choice() {
            Choice::Given => Ok(()),
            Choice::Kind => Kind::down(name),
            Choice::Local => local::down(name),
        }
    }

    /// A command that talks to the cluster: kubectl, helm, or another that reads `KUBECONFIG`.
    #[must_use]
    pub fn client(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// The file with the administrator's access.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Kind(kind) => kind.kubeconfig(),
            Self::Local(local) => local.kubeconfig(),
        }
    }

    /// Runs something where the API server can be reached from: processes that it starts can reach it, too.
    ///
    /// # Errors
    /// The namespace of a local cluster cannot be entered.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        match self {
            Self::Local(local) => netns::within(&local.control_netns(), run),
            Self::Given(_) | Self::Kind(_) => Ok(run()),
        }
    }

    /// Runs a client with this on its standard input, and returns what it printed.
    ///
    /// # Errors
    /// It cannot be started. Its own failure is in the output.
    pub fn output(&self, command: &mut Command, stdin: Option<&str>) -> Result<Output> {
        self.within(|| -> Result<Output> {
            let mut child = command
                .stdin(stdin.map_or_else(Stdio::null, |_| Stdio::piped()))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot run {:?}", command.get_program()))?;
            if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
                pipe.write_all(text.as_bytes())?;
            }
            Ok(child.wait_with_output()?)
        })?
    }

    /// Runs a client with this process's own input and output, and returns whether it succeeded.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn interactive(&self, command: &mut Command) -> Result<bool> {
        let status = self.within(|| command.status())?;
        let status = status.with_context(|| format!("cannot run {:?}", command.get_program()))?;
        Ok(status.success())
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, None)
    }

    /// Runs kubectl with this on its standard input.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl_with(&self, arguments: &[&str], stdin: Option<&str>) -> Result<String> {
        let mut command = self.client(kubectl()?);
        let output = self.output(command.args(arguments), stdin)?;
        checked(output, || format!("kubectl {}", arguments.join(" ")))
    }

    /// Runs helm.
    ///
    /// # Errors
    /// What it said.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let program = programs::tool("helm").context("helm is missing (cargo xtask setup)")?;
        let mut command = self.client(program);
        let output = self.output(command.args(arguments), None)?;
        checked(output, || format!("helm {}", arguments.join(" ")))
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// What the API server said.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.kubectl_with(&["apply", "-f", "-"], Some(manifests))
            .map(drop)
    }

    /// Reads an object.
    ///
    /// # Errors
    /// There is none, or it is no JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        serde_json::from_str(&self.kubectl(&all)?).context("kubectl prints JSON")
    }

    /// Waits until kubectl succeeds with these arguments.
    ///
    /// # Errors
    /// It does not within `limit`; the error has what it said last.
    pub fn wait_for(&self, arguments: &[&str], limit: Duration) -> Result<String> {
        let mut last = String::new();
        let waited = wait::until(&arguments.join(" "), limit, || {
            match self.kubectl(arguments) {
                Ok(text) => Ok(Some(text)),
                Err(error) => {
                    last = format!("{error:#}");
                    Ok(None)
                }
            }
        });
        waited.with_context(|| last)
    }

    /// Makes an image archive known to every node.
    ///
    /// # Errors
    /// A node does not take it, or it is the user's cluster, whose nodes are not ours.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        match self {
            Self::Given(_) => bail!(
                "the nodes of the cluster of KUBECONFIG are not ours: push {} to a registry that they read",
                archive.display()
            ),
            Self::Kind(kind) => kind.load_image(archive),
            Self::Local(local) => local.load_image(archive),
        }
    }
}

/// The kubectl that fits the servers: the one that came with helm, else the machine's.
///
/// # Errors
/// There is none.
pub fn kubectl() -> Result<PathBuf> {
    let ours = programs::tools_directory().join("kubectl");
    if ours.is_file() {
        return Ok(ours);
    }
    programs::installed("kubectl").context("kubectl is missing (cargo xtask setup)")
}

/// What a program printed, if it succeeded.
fn checked(output: Output, line: impl FnOnce() -> String) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        bail!(
            "{}: {}{}",
            line(),
            text(&output.stderr),
            text(&output.stdout)
        );
    }
    Ok(text(&output.stdout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_own_cluster_comes_first_and_ours_last() {
        let named = Some(OsStr::new("/home/me/.kube/config"));
        assert_eq!(choose(named, true), Choice::Given);
        assert_eq!(choose(None, true), Choice::Kind);
        assert_eq!(choose(Some(OsStr::new("")), false), Choice::Local);
    }
}
