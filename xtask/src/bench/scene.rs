//! The lab of the bench: two nodes, their pods and the servers in them, before any mesh.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    netns,
    process::{Program, Running},
    programs, wait,
};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

/// Node of the clients.
pub const NEAR: &str = "n1";
/// Node of the far server.
pub const FAR: &str = "n2";

/// The pod that dials, on [`NEAR`].
pub const CLIENT: &str = "client";
/// The server on the same node.
pub const LOCAL: &str = "local";
/// The server on the other node.
pub const SERVER: &str = "server";
/// The server of a quiet pod, on the other node.
pub const QUIET: &str = "quiet";
/// A pod on [`NEAR`] that no mesh has; it dials itself.
pub const OUTSIDER: &str = "outsider";

/// Workloads on [`FAR`] when it is crowded, [`SERVER`] and [`QUIET`] among them.
pub const CROWD: usize = 50;

/// Port of the HTTP server.
pub const HTTP: u16 = 8080;
/// Port of the bulk server.
pub const BULK: u16 = 8081;
/// Port of the echo server.
pub const ECHO: u16 = 8082;

/// How long a server may take to listen.
const SERVER_LIMIT: Duration = Duration::from_secs(10);

/// How much longer than its measurement a client may take: connecting, waiting for stragglers, a loaded machine.
const CLIENT_SLACK: Duration = Duration::from_secs(30);

/// The lab with its servers. All of its processes live in one cgroup, which accounts for their processor time, those
/// that have ended included.
#[derive(Debug)]
pub struct Scene {
    // Dropped before the lab that they live in.
    _servers: Vec<Running>,
    /// The lab.
    pub lab: Lab,
    benchtool: PathBuf,
}

impl Scene {
    /// Builds the lab and starts the servers. When it is crowded, there are [`CROWD`] pods on [`FAR`] that echo.
    ///
    /// # Errors
    /// Not root, the load tool is not built, or a server does not start.
    pub fn build(crowded: bool) -> Result<Self> {
        let benchtool = programs::own("benchtool")?;
        let mut far = vec![PodSpec::new(SERVER), PodSpec::new(QUIET)];
        if crowded {
            far.extend((2..CROWD).map(|number| PodSpec::new(&format!("crowd{number}"))));
        }
        let spec = LabSpec::new(Families::V4)
            .node(
                NEAR,
                [
                    PodSpec::new(CLIENT),
                    PodSpec::new(LOCAL),
                    PodSpec::new(OUTSIDER).unmeshed(),
                ],
            )
            .node(FAR, far);
        let lab = Lab::build(spec)?;
        for netns in lab
            .pods()
            .map(|pod| &pod.netns)
            .chain(lab.nodes().iter().map(|node| &node.netns))
        {
            // Many short connections between two addresses would run out of ports that wait in TIME_WAIT.
            netns::sysctl(netns, &[("ipv4/tcp_tw_reuse", "1")])?;
        }
        let mut servers = Vec::new();
        for (pod, mode, port) in [
            (SERVER, "http-server", HTTP),
            (SERVER, "bulk-server", BULK),
            (SERVER, "echo-server", ECHO),
            (LOCAL, "http-server", HTTP),
            (LOCAL, "bulk-server", BULK),
            (LOCAL, "echo-server", ECHO),
            (QUIET, "http-server", HTTP),
            (QUIET, "echo-server", ECHO),
            (OUTSIDER, "echo-server", ECHO),
        ] {
            let pod = lab.pod(pod)?;
            let program = Program::new(&benchtool)
                .arg(mode)
                .arg(format!("0.0.0.0:{port}"));
            servers.push(lab.serve(pod, &program, pod.at(port), SERVER_LIMIT)?);
        }
        servers.extend(crowd_server(&lab, &benchtool)?);
        Ok(Self {
            _servers: servers,
            lab,
            benchtool,
        })
    }

    /// The pod with this name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.lab.pod(name)
    }

    /// A port of the pod with this name.
    pub fn at(&self, pod: &str, port: u16) -> Result<SocketAddr> {
        Ok(self.pod(pod)?.at(port))
    }

    /// A client of the load tool, for a pod.
    pub fn client(&self, mode: &str, address: SocketAddr, options: &[(&str, String)]) -> Program {
        self.client_of(mode, &[address], options)
    }

    /// The same for several servers.
    pub fn client_of(
        &self,
        mode: &str,
        addresses: &[SocketAddr],
        options: &[(&str, String)],
    ) -> Program {
        let client = Program::new(&self.benchtool)
            .arg(mode)
            .args(addresses.iter().map(ToString::to_string))
            .named(mode);
        options
            .iter()
            .fold(client, |client, (name, value)| client.arg(name).arg(value))
    }

    /// Runs a client in a pod to its end, which comes after about `duration`, and reads its report.
    pub fn report<R: DeserializeOwned>(
        &self,
        pod: &str,
        client: &Program,
        duration: Duration,
    ) -> Result<R> {
        let text = self
            .lab
            .run(self.pod(pod)?, client, duration + CLIENT_SLACK)?
            .ok()?;
        serde_json::from_str(&text).with_context(|| format!("the load tool printed {text:?}"))
    }

    /// The cgroup of everything in the lab.
    pub fn cgroup(&self) -> Result<&Path> {
        let node = self.lab.node(NEAR)?;
        node.cgroup_root
            .parent()
            .context("a node's cgroup lies in the lab's")
    }

    /// Processor time of everything in the lab since its making, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds_of(self.cgroup()?)
    }
}

/// One process that echoes in every pod of the crowd; none without a crowd. Pods are the same to it as namespaces.
fn crowd_server(lab: &Lab, benchtool: &Path) -> Result<Option<Running>> {
    let far = lab.node(FAR)?;
    let crowd: Vec<&Pod> = far
        .pods
        .iter()
        .filter(|pod| ![SERVER, QUIET].contains(&pod.spec.name.as_str()))
        .collect();
    let Some(last) = crowd.last() else {
        return Ok(None);
    };
    let program = Program::new(benchtool)
        .arg("echo-server")
        .arg(format!("0.0.0.0:{ECHO}"))
        .args(
            crowd
                .iter()
                .map(|pod| format!("--netns={}", pod.netns.display())),
        );
    let mut server = lab.spawn(far, &program)?;
    wait::until("the crowd's server to listen", SERVER_LIMIT, || {
        server.check_running()?;
        Ok(wait::accepts(&last.netns, last.at(ECHO))?.then_some(()))
    })?;
    Ok(Some(server))
}

/// Processor time of a node's agent of Weft since its start, in seconds.
pub fn agent_cpu_seconds(node: &Node) -> Result<f64> {
    cpu_seconds_of(&node.cgroup_root.join(format!("weft-agent-{}", node.name)))
}

/// What a cgroup has used.
fn cpu_seconds_of(cgroup: &Path) -> Result<f64> {
    let path = cgroup.join("cpu.stat");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    usage_seconds(&text).with_context(|| format!("no usage_usec in {}", path.display()))
}

fn usage_seconds(stat: &str) -> Option<f64> {
    let micros: f64 = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))?
        .trim()
        .parse()
        .ok()?;
    Some(micros / 1e6)
}

/// Resident memory of processes, in bytes.
///
/// # Errors
/// One has ended.
pub fn resident_bytes(pids: &[Pid]) -> Result<Vec<u64>> {
    pids.iter()
        .map(|pid| {
            let path = format!("/proc/{pid}/status");
            let status = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {path}: has it ended?"))?;
            rss_bytes(&status).with_context(|| format!("no VmRSS in {path}"))
        })
        .collect()
}

fn rss_bytes(status: &str) -> Option<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_accounts() {
        assert_eq!(
            usage_seconds("usage_usec 2500000\nuser_usec 1\n"),
            Some(2.5)
        );
        assert_eq!(usage_seconds("nr_periods 0\n"), None);
        assert_eq!(
            rss_bytes("Name:\tx\nVmRSS:\t    1024 kB\n"),
            Some(1024 * 1024)
        );
        assert_eq!(rss_bytes("Name:\tzombie\n"), None);
    }
}
