//! A lab: nodes joined by a link, pods behind each node, everything removed when it is dropped.
//!
//! ```text
//!   pod a ── veth ── node n1 ──────── link0 ──────── node n2 ── veth ── pod c
//!   pod b ── veth ──┘            (a bridge namespace when there are more than two nodes)
//! ```
//! Nodes route; every pod address is a host route, so any address may be given to any pod.

mod spec;
mod topology;

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

pub use self::spec::{Addressing, Families, LabSpec, NodeSpec, PodSpec};
use crate::{
    cgroup, cleanup, netns,
    process::{self, Finished, Program, Room, Running},
    wait,
};

/// Name of every node's interface to the other nodes.
pub const LINK: &str = "link0";

/// Name of every pod's interface.
pub const POD_INTERFACE: &str = "eth0";

/// A machine of the lab: a namespace that routes for its pods and is where its agent lives.
#[derive(Debug)]
pub struct Node {
    /// Name, as in `spec.nodeName`.
    pub name: String,
    /// Position among the nodes, from 1; the addresses are made from it.
    pub index: u8,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its addresses on the link between the nodes.
    pub addresses: Vec<IpAddr>,
    /// What its agent gets as `--cgroup-root`: a cgroup with its pods' and its own below.
    pub cgroup_root: PathBuf,
    /// What its agent gets as `--bpffs-root`.
    pub bpffs_root: PathBuf,
    /// What its agent gets as `--run-dir`.
    pub run_dir: PathBuf,
    /// Its pods, in the order of their making.
    pub pods: Vec<Pod>,
    pods_made: u8,
}

/// A pod: a namespace with one interface and a cgroup.
#[derive(Debug)]
pub struct Pod {
    /// Name, namespace, service account, labels.
    pub spec: PodSpec,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its cgroup.
    pub cgroup: PathBuf,
}

impl Node {
    /// The cgroup of programs of the node itself, pods and agent aside.
    #[must_use]
    pub fn host_cgroup(&self) -> PathBuf {
        self.cgroup_root.join("host")
    }

    /// The cgroup of the node's agent.
    #[must_use]
    pub fn agent_cgroup(&self) -> PathBuf {
        self.cgroup_root.join("agent")
    }

    /// Its first address on the link.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses
            .first()
            .copied()
            .expect("every node has an address of each family of the lab")
    }
}

impl Pod {
    /// Its first address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses
            .first()
            .copied()
            .expect("every pod has an address of each family of the lab")
    }

    /// A port at its first address.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(), port)
    }
}

/// Somewhere a program can run.
pub trait Place {
    /// Path of the network namespace.
    fn netns(&self) -> &Path;
    /// Cgroup for its programs.
    fn cgroup(&self) -> PathBuf;
}

impl Place for Node {
    fn netns(&self) -> &Path {
        &self.netns
    }

    fn cgroup(&self) -> PathBuf {
        self.host_cgroup()
    }
}

impl Place for Pod {
    fn netns(&self) -> &Path {
        &self.netns
    }

    fn cgroup(&self) -> PathBuf {
        self.cgroup.clone()
    }
}

/// The lab. Dropping it kills and removes everything it made, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    families: Families,
    addressing: Addressing,
    pod_mtu: Option<u32>,
    directory: PathBuf,
    cgroup: PathBuf,
    nodes: Vec<Node>,
    outlive: bool,
    kept: bool,
}

impl Lab {
    /// Builds what the specification says.
    ///
    /// # Errors
    /// Not root, no cgroup v2, no `ip`, or an unusable specification; nothing is left behind.
    pub fn build(spec: LabSpec) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces and needs root");
        }
        let prefix = spec.prefix.clone().unwrap_or_else(fresh_prefix);
        cleanup::check_prefix(&prefix)?;
        if !cleanup::leftovers(&prefix)?.is_empty() {
            bail!("the prefix {prefix} is in use; remove it with: lab cleanup --prefix {prefix}");
        }
        let cgroup = cgroup::mount_point()?.join(&prefix);
        cleanup::register(&prefix)?;
        let mut lab = Self {
            directory: cleanup::directory(&prefix),
            families: spec.families,
            addressing: spec.addressing,
            pod_mtu: spec.pod_mtu,
            cgroup,
            nodes: Vec::new(),
            outlive: spec.outlive,
            kept: false,
            prefix,
        };
        lab.populate(spec)?;
        Ok(lab)
    }

    fn populate(&mut self, spec: LabSpec) -> Result<()> {
        topology::mount_bpffs()?;
        make_directory(&self.logs())?;
        for (position, node) in spec.nodes.iter().enumerate() {
            let index = u8::try_from(position + 1).context("a lab has at most 255 nodes")?;
            self.add_node(node, index)?;
        }
        {
            let _permit = cleanup::permit();
            topology::link_nodes(&self.prefix, &self.nodes, spec.link_mtu)?;
        }
        for node in spec.nodes {
            for pod in node.pods {
                self.add_pod(&node.name, pod)?;
            }
        }
        Ok(())
    }

    fn add_node(&mut self, spec: &NodeSpec, index: u8) -> Result<()> {
        let _permit = cleanup::permit();
        let namespace = self.namespace_name(&spec.name)?;
        topology::make_namespace(&namespace, self.families, true)?;
        let node = Node {
            name: spec.name.clone(),
            index,
            netns: netns::path(&namespace),
            addresses: self.addressing.node(self.families, index),
            cgroup_root: self.cgroup.join(&spec.name),
            bpffs_root: Path::new(cleanup::BPFFS).join(&namespace),
            run_dir: self.directory.join(&spec.name),
            pods: Vec::new(),
            pods_made: 0,
        };
        for directory in [
            &node.host_cgroup(),
            &node.agent_cgroup(),
            &node.bpffs_root,
            &node.run_dir,
        ] {
            make_directory(directory)?;
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Adds a pod to a node.
    ///
    /// # Errors
    /// No such node, or the name is taken.
    pub fn add_pod(&mut self, node: &str, spec: PodSpec) -> Result<&Pod> {
        let _permit = cleanup::permit();
        let namespace = self.namespace_name(&spec.name)?;
        let (families, addressing, pod_mtu) = (self.families, self.addressing, self.pod_mtu);
        let position = self.position(node)?;
        let target = &mut self.nodes[position];
        target.pods_made = target
            .pods_made
            .checked_add(1)
            .context("a node makes at most 255 pods")?;
        let addresses = match spec.addresses.is_empty() {
            true => addressing.pod(families, target.index, target.pods_made),
            false => spec.addresses.clone(),
        };
        let pod = Pod {
            netns: netns::path(&namespace),
            cgroup: target.cgroup_root.join("pods").join(&spec.name),
            addresses,
            spec,
        };
        topology::make_namespace(&namespace, families, false)?;
        make_directory(&pod.cgroup)?;
        let number = target.pods_made;
        topology::attach_pod(
            &namespace,
            &self.nodes,
            position,
            number,
            &pod.addresses,
            pod_mtu,
        )?;
        let pods = &mut self.nodes[position].pods;
        pods.push(pod);
        pods.last().context("a pod was just added")
    }

    /// Kills a pod's processes and removes its namespace and cgroup, as when a pod is deleted.
    ///
    /// # Errors
    /// No such pod.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let _permit = cleanup::permit();
        for node in &mut self.nodes {
            if let Some(position) = node.pods.iter().position(|pod| pod.spec.name == name) {
                let pod = node.pods.remove(position);
                cgroup::remove(&pod.cgroup)?;
                return netns::delete(&format!("{}-{name}", self.prefix));
            }
        }
        bail!("the lab has no pod {name}")
    }

    /// The node with this name.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        Ok(&self.nodes[self.position(name)?])
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The pod with this name.
    ///
    /// # Errors
    /// There is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods()
            .find(|pod| pod.spec.name == name)
            .with_context(|| format!("the lab has no pod {name}"))
    }

    /// All pods of all nodes.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// The node on which a pod lives.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn node_of(&self, pod: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.pods.iter().any(|candidate| candidate.spec.name == pod))
            .with_context(|| format!("the lab has no pod {pod}"))
    }

    /// What all names of this lab begin with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The address families of the lab.
    #[must_use]
    pub fn families(&self) -> Families {
        self.families
    }

    /// A folder for files of the run; it goes with the lab.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The folder of the programs' output files.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Starts a program in a pod or on a node.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, place: &impl Place, program: &Program) -> Result<Running> {
        self.spawn_in(place.netns(), &place.cgroup(), program)
    }

    /// Starts a node's agent or another program in the agent's cgroup, in the node's namespace.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_agent(&self, node: &Node, program: &Program) -> Result<Running> {
        self.spawn_in(&node.netns, &node.agent_cgroup(), program)
    }

    fn spawn_in(&self, netns: &Path, cgroup: &Path, program: &Program) -> Result<Running> {
        let logs = self.logs();
        process::spawn(
            Room {
                netns: Some(netns),
                cgroup,
                logs: &logs,
                outlive: self.outlive,
            },
            program,
        )
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// It cannot be started, or does not end within `limit`. Its failure is in the [`Finished`].
    pub fn run(&self, place: &impl Place, program: &Program, limit: Duration) -> Result<Finished> {
        let logs = self.logs();
        let room = Room {
            netns: Some(place.netns()),
            cgroup: &place.cgroup(),
            logs: &logs,
            outlive: false,
        };
        process::spawn(room, program)?.wait(limit)
    }

    /// Starts a server and waits until its port accepts connections from inside its own namespace.
    ///
    /// # Errors
    /// It ends, or does not listen within `limit`.
    pub fn serve(
        &self,
        place: &impl Place,
        program: &Program,
        address: SocketAddr,
        limit: Duration,
    ) -> Result<Running> {
        let mut server = self.spawn(place, program)?;
        wait::until(&format!("{address} to accept connections"), limit, || {
            server.check_running()?;
            Ok(wait::accepts(place.netns(), address)?.then_some(()))
        })?;
        Ok(server)
    }

    /// Leaves everything as it is when the lab is dropped. Programs stay only if the lab was specified to outlive
    /// the harness.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn position(&self, node: &str) -> Result<usize> {
        self.nodes
            .iter()
            .position(|known| known.name == node)
            .with_context(|| format!("the lab has no node {node}"))
    }

    fn namespace_name(&self, name: &str) -> Result<String> {
        let fits = (1..=40).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !fits {
            bail!("lab name {name:?}: use up to 40 lower-case letters, digits and dashes");
        }
        let taken = self.nodes.iter().any(|node| node.name == name)
            || self.pods().any(|pod| pod.spec.name == name);
        if taken || name == topology::BRIDGE_NODE {
            bail!("the lab's name {name} is taken");
        }
        Ok(format!("{}-{name}", self.prefix))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            cleanup::unregister(&self.prefix);
            return;
        }
        let permit = cleanup::permit();
        if let Err(error) = cleanup::remove(&self.prefix) {
            eprintln!("lab: {error:#}");
        }
        drop(permit);
        cleanup::unregister(&self.prefix);
    }
}

/// A prefix that no other run on this machine has: process ids are unique, the counter tells this run's labs apart.
fn fresh_prefix() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "weft{}x{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))
}
