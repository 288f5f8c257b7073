//! Another mesh, put onto the lab, or onto one node of it, by a script (the contract is in docs/bench.md).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use crate::{
    lab::{Lab, Node},
    mesh::Mesh,
    process::{self, Program, Room},
    programs,
};

/// How long a script may take: meshes with a control plane of their own start slowly.
const SCRIPT_LIMIT: Duration = Duration::from_secs(300);

/// What all variables begin with.
const PREFIX: &str = "WEFT_BENCH";

/// File in the script's folder that names the proxies' processes.
const PROXIES_FILE: &str = "proxies";

/// What the script has to put its mesh onto.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// All nodes, with a control plane of its own.
    Whole,
    /// One node of a mesh whose other nodes are Weft's, with Weft's control plane.
    Node(&'a Node, &'a Mesh),
}

/// A peer that is up. It ends with the lab; what it made outside the lab's namespaces only by [`Peer::down`].
#[derive(Debug)]
pub struct Peer {
    script: PathBuf,
    folder: PathBuf,
    variables: Vec<(String, String)>,
}

impl Peer {
    /// Calls the script with `up`.
    ///
    /// # Errors
    /// The script fails or takes longer than five minutes; the error has the end of its output.
    pub fn up(script: &Path, lab: &Lab, part: Part<'_>) -> Result<Self> {
        let folder = lab.directory().join("peer");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let peer = Self {
            variables: variables(lab, part, &folder)?,
            script: script.to_owned(),
            folder,
        };
        if let Err(error) = peer.call("up", lab) {
            // Half a mesh may need undoing too; the first error is the one to tell.
            if let Err(second) = peer.call("down", lab) {
                eprintln!("{}: down after a failed up: {second:#}", script.display());
            }
            return Err(error);
        }
        Ok(peer)
    }

    /// Calls the script with `down`.
    ///
    /// # Errors
    /// As [`Peer::up`].
    pub fn down(self, lab: &Lab) -> Result<()> {
        self.call("down", lab)
    }

    /// The folder that the script was given.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
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

    fn call(&self, verb: &str, lab: &Lab) -> Result<()> {
        let node = lab.nodes().first().context("a lab has nodes")?;
        let root = node.cgroup_root.parent();
        let cgroup = root
            .context("a node's cgroup lies in the lab's")?
            .join("peer");
        fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        let program = Program::new(&self.script).arg(verb);
        let program = self
            .variables
            .iter()
            .fold(program, |program, (name, value)| program.env(name, value));
        let logs = lab.logs();
        let room = Room {
            netns: None,
            cgroup: &cgroup,
            logs: &logs,
            outlive: false,
        };
        let finished = process::spawn(room, &program)?.wait(SCRIPT_LIMIT);
        finished
            .and_then(process::Finished::ok)
            .with_context(|| format!("{} {verb}", self.script.display()))?;
        Ok(())
    }
}

/// What the script is told of the lab.
fn variables(lab: &Lab, part: Part<'_>, folder: &Path) -> Result<Vec<(String, String)>> {
    let mut variables = Vec::new();
    let mut tell = |name: &str, value: String| variables.push((format!("{PREFIX}_{name}"), value));
    let its_own = |node: &Node| match part {
        Part::Whole => true,
        Part::Node(own, _) => own.name == node.name,
    };
    let nodes: Vec<&Node> = lab.nodes().iter().filter(|node| its_own(node)).collect();
    tell("PREFIX", lab.prefix().to_owned());
    tell("DIR", folder.display().to_string());
    let benchtool = programs::own("benchtool")?;
    tell("BENCHTOOL", benchtool.display().to_string());
    tell("TRUST_DOMAIN", "cluster.local".to_owned());
    let mut names = Vec::new();
    for node in &nodes {
        let name = node.name.to_uppercase();
        names.push(node.name.as_str());
        tell(&format!("NODE_{name}_NETNS"), shown(&node.netns));
        tell(&format!("NODE_{name}_ADDRESS"), node.address().to_string());
        tell(&format!("NODE_{name}_RUN_DIR"), shown(&node.run_dir));
        if let Part::Node(_, mesh) = part {
            let token = mesh.token_file(&node.name);
            tell(&format!("NODE_{name}_TOKEN_FILE"), shown(&token));
        }
    }
    tell("NODES", names.join(" "));
    if let Part::Node(_, mesh) = part {
        tell("CONTROL_PLANE", mesh.control_plane());
        tell("CONTROL_PLANE_CA", shown(&mesh.root_file()));
    }
    let mut names = Vec::new();
    for node in nodes {
        for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
            names.push(pod.spec.name.as_str());
            let name = pod.spec.name.to_uppercase();
            let mut tell = |what: &str, value: String| tell(&format!("POD_{name}_{what}"), value);
            tell("NODE", node.name.clone());
            tell("NETNS", shown(&pod.netns));
            tell("ADDRESS", pod.address().to_string());
            tell("NAMESPACE", pod.spec.namespace.clone());
            tell("SERVICE_ACCOUNT", pod.spec.service_account.clone());
        }
    }
    tell("PODS", names.join(" "));
    Ok(variables)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
