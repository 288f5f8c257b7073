//! A real Kubernetes on this machine: every node is a network namespace with its own kubelet, containerd and kube-proxy.
//!
//! ```text
//!   ctl (172.30.0.10): etcd, API server, controllers, scheduler
//!        │
//!   switch ── node1 (172.30.0.101): kubelet, containerd, proxy ── bridge ── pods 10.42.1.0/24
//!        └─── node2 (172.30.0.102) …
//! ```
//! The addresses exist only inside these namespaces; nothing leads outside. All nodes share the machine's file system and
//! cgroup tree: what a node needs of its own lies in its folder. Everything bears the cluster's name as prefix and is
//! removed by [`down`], which also removes what a failed or killed start has left.

mod network;
mod node;
mod pki;
mod servers;
pub(crate) mod sweep;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use self::{node::NodePaths, pki::Authority, servers::Server};
use super::{Cluster, checked};
use crate::{
    cgroup, chart, cleanup, netns,
    oci::Image,
    process::{self, Program, Room},
    programs, wait,
};

/// Longest wait for one step of the start; each takes seconds on an idle machine of two cores.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// The image that pause containers, DNS and test pods use: busybox.
pub const BOX_IMAGE: &str = "localhost/weft-tests/box:1";

/// Names the folder of the servers that `cargo xtask cluster` has built.
pub const SERVERS_VARIABLE: &str = "WEFT_CLUSTER_SERVERS";

/// A local cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Local {
    name: String,
    directory: PathBuf,
    kubeconfig: PathBuf,
    /// Where the servers are.
    programs: PathBuf,
    nodes: Vec<String>,
}

/// Removes a cluster that did not come up.
struct Unfinished<'a>(&'a str);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Err(error) = down(self.0) {
            eprintln!("cluster: {error:#}");
        }
        cleanup::unregister(self.0);
    }
}

/// The folder of the servers: where the environment says, else where xtask puts them.
#[must_use]
pub fn servers_directory() -> PathBuf {
    std::env::var_os(SERVERS_VARIABLE).map_or_else(
        || programs::tools_directory().join("kubernetes"),
        PathBuf::from,
    )
}

impl Local {
    /// Starts a cluster and waits until its nodes are ready and DNS serves.
    ///
    /// # Errors
    /// Not root, something is not installed, the name is in use, or a server does not come up. Its log's end is in the error,
    /// and everything is removed.
    pub fn up(name: &str, nodes: u8) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a local cluster makes network namespaces and needs root");
        }
        cleanup::check_prefix(name)?;
        if !cleanup::leftovers(name)?.is_empty() {
            bail!("{name} is in use; remove it with: cargo xtask cluster down --name {name}");
        }
        let programs = servers_directory();
        if !programs.join("servers").is_file() {
            bail!(
                "no servers in {} (cargo xtask cluster up builds them)",
                programs.display()
            );
        }
        cleanup::register(name)?;
        let unfinished = Unfinished(name);
        let directory = cleanup::directory(name);
        let local = Self {
            name: name.to_owned(),
            kubeconfig: directory.join("admin.conf"),
            directory,
            programs,
            nodes: (1..=nodes).map(|number| format!("node{number}")).collect(),
        };
        local.start()?;
        fs::write(local.state_file(), serde_json::to_string(&local)?)?;
        std::mem::forget(unfinished);
        cleanup::unregister(name);
        Ok(local)
    }

    /// The cluster of this name, if it was started and not removed.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub fn open(name: &str) -> Result<Option<Self>> {
        cleanup::check_prefix(name)?;
        let file = cleanup::directory(name).join("cluster.json");
        if !file.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&file)?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not a cluster's", file.display()))
            .map(Some)
    }

    fn start(&self) -> Result<()> {
        for folder in [self.logs(), self.directory.join("pki")] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        {
            let _permit = cleanup::permit();
            sweep::share(&self.directory)?;
            network::build(&self.name, &self.nodes)?;
        }
        let authority = Authority::make(&self.directory.join("pki"))?;
        servers::prepare(self, &authority)?;
        for server in servers::first(self) {
            self.serve(&server)?;
        }
        self.until("the API server to be ready", |cluster| {
            cluster.kubectl(&["get", "--raw", "/readyz"]).map(drop)
        })?;
        for server in servers::second(self) {
            self.serve(&server)?;
        }
        for (number, node) in (1..).zip(&self.nodes) {
            for server in node::prepare(self, &authority, node, number)? {
                self.serve(&server)?;
            }
        }
        self.load_box()?;
        let wanted = self.nodes.len();
        self.until("the nodes to be ready", |cluster| {
            let nodes = cluster.get(&["nodes"])?;
            let ready = nodes["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|node| {
                    let conditions = node["status"]["conditions"].as_array();
                    conditions.into_iter().flatten().any(|condition| {
                        condition["type"] == "Ready" && condition["status"] == "True"
                    })
                });
            anyhow::ensure!(ready.count() == wanted, "not all nodes are ready");
            Ok(())
        })?;
        self.serve_dns()
    }

    fn serve_dns(&self) -> Result<()> {
        let file = chart::repository().join("tests/cluster/dns.yaml");
        let manifests = fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .replace("BOX", BOX_IMAGE)
            .replace("SERVERS", &self.programs.display().to_string());
        self.until("DNS to be accepted", |cluster| cluster.apply(&manifests))?;
        self.until("DNS to serve", |cluster| {
            let arguments = [
                "-n",
                "kube-system",
                "rollout",
                "status",
                "deployment/dns",
                "--timeout=1s",
            ];
            cluster.kubectl(&arguments).map(drop)
        })
    }

    /// Waits until something succeeds with the cluster as clients see it.
    fn until(&self, what: &str, step: impl Fn(&Cluster) -> Result<()>) -> Result<()> {
        let cluster = Cluster::Local(self.clone());
        let mut last = String::new();
        let waited = wait::until(what, STEP_LIMIT, || match step(&cluster) {
            Ok(()) => Ok(Some(())),
            Err(error) => {
                last = format!("{error:#}");
                Ok(None)
            }
        });
        waited.with_context(|| format!("{last}\n{}", self.ends_of_logs()))
    }

    /// Starts a server in its namespace; it outlives this process.
    fn serve(&self, server: &Server) -> Result<()> {
        let cgroup = cgroup::mount_point()?.join(&self.name).join(&server.name);
        fs::create_dir_all(&cgroup)
            .with_context(|| format!("cannot create {}", cgroup.display()))?;
        let (netns, logs) = (self.netns(&server.place), self.logs());
        let room = Room {
            netns: Some(&netns),
            cgroup: &cgroup,
            logs: &logs,
            outlive: true,
        };
        let program = Program::new(&server.program)
            .args(&server.arguments)
            .named(&server.name);
        process::spawn(room, &program)
            .with_context(|| format!("cannot start {}", server.name))
            .map(drop)
    }

    /// Kills a server with SIGKILL and starts it again: `etcd`, `apiserver`, `controllers`, `scheduler`, or `kubelet`,
    /// `containerd` and `proxy` of a node as `kubelet-node1`.
    ///
    /// # Errors
    /// There is no such server.
    pub fn restart(&self, name: &str) -> Result<()> {
        self.stop(name)?;
        let servers = servers::first(self)
            .into_iter()
            .chain(servers::second(self))
            .chain(self.nodes.iter().zip(1..).flat_map(|(node, number)| {
                node::servers(self, &NodePaths::new(self, node), number)
            }));
        let server = servers.into_iter().find(|server| server.name == name);
        self.serve(&server.with_context(|| format!("the cluster has no server {name}"))?)
    }

    /// Kills a server with SIGKILL, as [`Local::restart`] names them. Containers of a containerd stay.
    ///
    /// # Errors
    /// There is no such server.
    pub fn stop(&self, name: &str) -> Result<()> {
        let cgroup = cgroup::mount_point()?.join(&self.name).join(name);
        anyhow::ensure!(cgroup.is_dir(), "the cluster has no server {name}");
        sweep::kill_servers_only(&cgroup)
    }

    /// Makes an image archive known to every node.
    ///
    /// # Errors
    /// A node's containerd does not take it.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        for node in &self.nodes {
            let socket = NodePaths::new(self, node).containerd_socket();
            let output = std::process::Command::new("ctr")
                .arg("--address")
                .arg(&socket)
                .args(["--namespace", "k8s.io", "images", "import"])
                .arg(archive)
                .output()
                .context("cannot run ctr (Debian package containerd)")?;
            checked(output, || format!("import {} on {node}", archive.display()))?;
        }
        Ok(())
    }

    fn load_box(&self) -> Result<()> {
        let archive = self.directory.join("box.tar");
        box_image()?.write(&archive)?;
        for node in &self.nodes {
            let socket = NodePaths::new(self, node).containerd_socket();
            wait::until("containerd to serve", STEP_LIMIT, || {
                Ok(std::os::unix::net::UnixStream::connect(&socket)
                    .is_ok()
                    .then_some(()))
            })?;
        }
        self.load_image(&archive)
    }

    fn ends_of_logs(&self) -> String {
        let mut files: Vec<PathBuf> = fs::read_dir(self.logs())
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|ending| ending == "err"))
            .collect();
        files.sort();
        let last_lines = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(3).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("{}:\n  {}", path.display(), lines.join("\n  "))
        };
        files.iter().map(last_lines).collect::<Vec<_>>().join("\n")
    }

    /// Names of the nodes.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// Folder of everything of the cluster; of a node in it: `<node>/`.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The administrator's access.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The namespace from which the API server is reached.
    #[must_use]
    pub fn control_netns(&self) -> PathBuf {
        self.netns(network::CONTROL)
    }

    /// The namespace of a node, or of `ctl`.
    #[must_use]
    pub fn netns(&self, place: &str) -> PathBuf {
        netns::path(&format!("{}-{place}", self.name))
    }

    fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    fn state_file(&self) -> PathBuf {
        self.directory.join("cluster.json")
    }
}

/// Removes a local cluster of this name and whatever is left of one.
///
/// # Errors
/// The first thing that could not be removed; everything is tried.
pub fn down(name: &str) -> Result<()> {
    cleanup::remove(name)
}

/// busybox with its usual names, as root or not.
///
/// # Errors
/// busybox is not installed.
pub fn box_image() -> Result<Image> {
    let busybox = programs::installed("busybox")
        .context("busybox is missing (Debian package busybox-static)")?;
    let mut image = Image::new(BOX_IMAGE)
        .program(&busybox, "/bin/busybox")?
        .text(
            "/etc/passwd",
            "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
        )?
        .folder("/tmp", 0o1777)?
        .environment("PATH", "/bin")
        // What a pause container does; pods give a command of their own.
        .entrypoint(&["/bin/busybox", "sleep", "2147483647"]);
    for name in [
        "sh", "cat", "echo", "env", "false", "grep", "head", "httpd", "id", "ip", "ls", "mkdir",
        "nc", "nslookup", "ps", "rm", "sleep", "tail", "test", "touch", "true", "wget",
    ] {
        image = image.link(&format!("/bin/{name}"), "busybox")?;
    }
    Ok(image)
}
