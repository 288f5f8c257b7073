//! Another mesh, put onto the lab by a script (the contract is in docs/bench.md).

use std::{fs, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context as _, Result};
use mesh_tests::process::{self, Program, Room};
use nix::unistd::Pid;

use super::{
    figures::{DIRECT, WEFT, WEFT_H2, WEFT_NATIVE},
    scene::Scene,
};

/// How long a script may take: meshes with a control plane of their own start slowly.
const SCRIPT_LIMIT: Duration = Duration::from_secs(300);

/// What all variables begin with.
const PREFIX: &str = "WEFT_BENCH";

/// File in the script's folder that names the proxies' processes.
const PROXIES_FILE: &str = "proxies";

/// `NAME=SCRIPT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerOption {
    /// Name of the variant.
    pub name: String,
    /// The script.
    pub script: PathBuf,
}

impl FromStr for PeerOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, script) = text.split_once('=').ok_or("not of the form NAME=SCRIPT")?;
        let plain = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !plain || [DIRECT, WEFT, WEFT_NATIVE, WEFT_H2].contains(&name) {
            return Err(format!(
                "{name:?} cannot be a variant's name: use letters, digits, dashes, and none of ours"
            ));
        }
        let script = fs::canonicalize(script).map_err(|error| format!("{script}: {error}"))?;
        Ok(Self {
            name: name.to_owned(),
            script,
        })
    }
}

/// A peer that is up.
#[derive(Debug)]
pub struct Peer {
    option: PeerOption,
    folder: PathBuf,
}

impl Peer {
    /// Calls the script with `up`.
    ///
    /// # Errors
    /// The script fails or takes longer than five minutes; the error has the end of its output.
    pub fn up(option: &PeerOption, scene: &Scene) -> Result<Self> {
        let folder = scene.lab.directory().join("peer");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let peer = Self {
            option: option.clone(),
            folder,
        };
        if let Err(error) = peer.call("up", scene) {
            // Half a mesh may need undoing too; the first error is the one to tell.
            if let Err(second) = peer.call("down", scene) {
                eprintln!("{}: down after a failed up: {second:#}", option.name);
            }
            return Err(error);
        }
        Ok(peer)
    }

    /// Calls the script with `down`.
    ///
    /// # Errors
    /// As [`Peer::up`].
    pub fn down(self, scene: &Scene) -> Result<()> {
        self.call("down", scene)
    }

    /// The processes that the script named.
    ///
    /// # Errors
    /// The file holds something else than numbers.
    pub fn proxies(&self) -> Result<Vec<Pid>> {
        let path = self.folder.join(PROXIES_FILE);
        let Ok(text) = fs::read_to_string(&path) else {
            return Ok(Vec::new());
        };
        text.split_whitespace()
            .map(|word| Ok(Pid::from_raw(word.parse()?)))
            .collect::<Result<_>>()
            .with_context(|| format!("{} must hold process ids", path.display()))
    }

    fn call(&self, verb: &str, scene: &Scene) -> Result<()> {
        let cgroup = scene.cgroup()?.join("peer");
        fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        let program = variables(scene, &self.folder)?.into_iter().fold(
            Program::new(&self.option.script).arg(verb),
            |program, (name, value)| program.env(name, value),
        );
        let logs = scene.lab.logs();
        let room = Room {
            netns: None,
            cgroup: &cgroup,
            logs: &logs,
            outlive: false,
        };
        let finished = process::spawn(room, &program)?.wait(SCRIPT_LIMIT);
        finished
            .and_then(process::Finished::ok)
            .with_context(|| format!("peer {} {verb}", self.option.name))?;
        Ok(())
    }
}

/// What the script is told of the lab.
fn variables(scene: &Scene, folder: &std::path::Path) -> Result<Vec<(String, String)>> {
    let lab = &scene.lab;
    let mut variables = Vec::new();
    let mut tell = |name: &str, value: String| variables.push((format!("{PREFIX}_{name}"), value));
    tell("PREFIX", lab.prefix().to_owned());
    tell("DIR", folder.display().to_string());
    tell("BENCHTOOL", scene.benchtool().display().to_string());
    tell("TRUST_DOMAIN", "cluster.local".to_owned());
    tell(
        "NODES",
        lab.nodes()
            .iter()
            .map(|node| node.name.clone())
            .collect::<Vec<_>>()
            .join(" "),
    );
    let meshed: Vec<String> = lab
        .pods()
        .filter(|pod| pod.spec.meshed)
        .map(|pod| pod.spec.name.clone())
        .collect();
    tell("PODS", meshed.join(" "));
    for node in lab.nodes() {
        let name = node.name.to_uppercase();
        tell(
            &format!("NODE_{name}_NETNS"),
            node.netns.display().to_string(),
        );
        tell(&format!("NODE_{name}_ADDRESS"), node.address().to_string());
        tell(
            &format!("NODE_{name}_RUN_DIR"),
            node.run_dir.display().to_string(),
        );
    }
    for pod in lab.pods().filter(|pod| pod.spec.meshed) {
        let name = pod.spec.name.to_uppercase();
        tell(
            &format!("POD_{name}_NODE"),
            lab.node_of(&pod.spec.name)?.name.clone(),
        );
        tell(
            &format!("POD_{name}_NETNS"),
            pod.netns.display().to_string(),
        );
        tell(&format!("POD_{name}_ADDRESS"), pod.address().to_string());
        tell(&format!("POD_{name}_NAMESPACE"), pod.spec.namespace.clone());
        tell(
            &format!("POD_{name}_SERVICE_ACCOUNT"),
            pod.spec.service_account.clone(),
        );
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_needs_a_name_of_its_own_and_a_script_that_exists() {
        let peer: PeerOption = "other-1=/bin/true".parse().expect("fine");
        assert_eq!(peer.name, "other-1");
        for bad in [
            "/bin/true",
            "=/bin/true",
            "weft=/bin/true",
            "direct=/bin/true",
            "a b=/bin/true",
            "x=/nowhere",
        ] {
            assert!(bad.parse::<PeerOption>().is_err(), "{bad}");
        }
    }
}
