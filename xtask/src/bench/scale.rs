//! A node and a mesh as large as is promised: 250 workloads, 20,000 open connections, 1,000 services with 20,000
//! endpoints. Everything is Weft as installed; what is behind the endpoints does not exist.
//!
//! All connections go to the other node where processes may have enough descriptors for that; otherwise some of them
//! go to another workload of the node. How many are which is a figure, too.

use std::{
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, Node, Pod, PodSpec},
    manifests::{self, Folder, ServicePort},
    mesh::{Mesh, MeshSpec},
    process::{Program, Running},
    programs, wait,
};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};

use super::{
    measure::{IDLE_AFTER, Value as Taken, idle_percent, value},
    scene::{ECHO, FAR, NEAR, SERVER},
    weft::{self, first_answer, resident},
};

/// Workloads on the near node.
const WORKLOADS: usize = 250;
/// Connections that are open in the end, at least.
const CONNECTIONS: usize = 20_000;
/// Descriptors that a process needs to hold them all.
const DESCRIPTORS: u64 = 32_768;
/// Connections of each workload to the other node when processes may have fewer descriptors: each takes one of the
/// agent's. The rest are within the node, where the kernel carries them.
const TUNNELLED_EACH_AT_MOST: usize = 32;
/// Services of the mesh.
const SERVICES: usize = 1000;
/// Endpoints of each.
const ENDPOINTS_EACH: usize = 20;
/// Nodes that the endpoints are spread over.
const NODES: usize = 200;
/// How often an endpoint changes.
const CHANGES: usize = 5;

/// The service whose endpoint changes.
const CHANGING: [u8; 4] = [10, 97, 0, 1];
/// Its port.
const CHANGING_PORT: u16 = 80;

/// The workload of the near node that the others connect to.
const NEIGHBOUR: &str = "w1";

/// Longest wait for any step.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// The large lab with what runs in it.
struct Large {
    servers: [Running; 2],
    mesh: Mesh,
    lab: Lab,
    benchtool: PathBuf,
}

/// Takes all figures of scale.
///
/// # Errors
/// A step fails or takes longer than two minutes.
pub fn measure() -> Result<Vec<Taken>> {
    let mut large = Large::build()?;
    let mut values = large.start()?;
    values.extend(large.enrol()?);
    values.extend(large.open()?);
    for server in &mut large.servers {
        server.check_running()?;
    }
    Ok(values)
}

impl Large {
    /// The pods, the manifests, and a server on the far node.
    fn build() -> Result<Self> {
        let near = (1..=WORKLOADS).map(|number| PodSpec::new(&format!("w{number}")));
        let spec = LabSpec::new(Families::V4)
            .node(NEAR, near)
            .node(FAR, [PodSpec::new(SERVER)]);
        let lab = Lab::build(spec)?;
        let mesh = weft::prepare(&lab, MeshSpec::default())?;
        write_services(&mesh.manifests)?;
        let ports = [ServicePort {
            name: "tcp",
            port: CHANGING_PORT,
            target: ECHO,
        }];
        let changing =
            manifests::service("default", "changing", SERVER, &[CHANGING.into()], &ports);
        mesh.manifests.write("service-changing", &[changing])?;
        let benchtool = programs::own("benchtool")?;
        let echo = Program::new(&benchtool).arg("echo-server");
        let echo = echo.arg(format!("0.0.0.0:{ECHO}"));
        let serve = |pod: &Pod| lab.serve(pod, &echo, pod.at(ECHO), STEP_LIMIT);
        let servers = [serve(lab.pod(SERVER)?)?, serve(lab.pod(NEIGHBOUR)?)?];
        Ok(Self {
            servers,
            mesh,
            lab,
            benchtool,
        })
    }

    /// The control plane reads the folder; an agent learns all of it.
    fn start(&mut self) -> Result<Vec<Taken>> {
        let (near, far) = (self.lab.node(NEAR)?, self.lab.node(FAR)?);
        let began = Instant::now();
        self.mesh.start_control(&self.lab)?;
        let control_start = began.elapsed();
        self.mesh.start_agent(&self.lab, far)?;
        self.mesh.wait_ready(&self.lab, far)?;
        for pod in &far.pods {
            self.mesh.enroll(&self.lab, far, pod)?;
            self.mesh.wait_enrolled(&self.lab, far, pod)?;
        }
        let began = Instant::now();
        self.mesh.start_agent(&self.lab, near)?;
        let held = |kind: &'static str| move |mesh: &Mesh| held(mesh, near, kind);
        let (workloads, services) = (held("workload"), held("service"));
        wait::until("the agent to know the whole mesh", STEP_LIMIT, || {
            let knows_all = workloads(&self.mesh) >= (SERVICES * ENDPOINTS_EACH) as f64
                && services(&self.mesh) >= SERVICES as f64;
            Ok(knows_all.then_some(()))
        })?;
        let sync = began.elapsed();
        self.mesh.wait_ready(&self.lab, near)?;
        wait::pace_until(Instant::now() + IDLE_AFTER);
        Ok(vec![
            value("scale-control-start-s", control_start.as_secs_f64()),
            value("scale-sync-s", sync.as_secs_f64()),
            value(
                "scale-control-mb",
                megabytes(resident(self.mesh.control()?.pid())?),
            ),
            value("scale-agent-mesh-mb", self.agent_megabytes(NEAR)?),
        ])
    }

    /// All workloads but one, then the last one by itself.
    fn enrol(&mut self) -> Result<Vec<Taken>> {
        let node = self.lab.node(NEAR)?;
        let (last, most) = node.pods.split_last().context("there are pods")?;
        let began = Instant::now();
        for pod in most {
            self.mesh.enroll(&self.lab, node, pod)?;
        }
        self.wait_whole(node, most.len())?;
        let all = began.elapsed();
        let server = self.lab.pod(SERVER)?.at(ECHO);
        let probe = Program::new(&self.benchtool).arg("first-answer");
        let probe = self.lab.spawn(last, &probe.arg(server.to_string()))?;
        let began = SystemTime::now();
        self.mesh.enroll(&self.lab, node, last)?;
        let one = first_answer(probe, began)?;
        self.wait_whole(node, WORKLOADS)?;
        wait::pace_until(Instant::now() + IDLE_AFTER);
        Ok(vec![
            value("scale-enrol-s", all.as_secs_f64()),
            value("scale-enrol-last-ms", one.as_secs_f64() * 1e3),
            value("scale-agent-enrolled-mb", self.agent_megabytes(NEAR)?),
            value(
                "scale-cpu-idle-percent",
                idle_percent(self.lab.node(NEAR)?)?,
            ),
        ])
    }

    /// Waits until so many workloads are captured and have certificates.
    fn wait_whole(&self, node: &Node, count: usize) -> Result<()> {
        let mut whole = 0;
        let outcome = wait::until("all workloads to be enrolled", STEP_LIMIT, || {
            let status = self.mesh.status(&self.lab, node)?.unwrap_or_default();
            let workloads = status["workloads"]
                .as_array()
                .map_or(&[][..], Vec::as_slice);
            let is_whole = |one: &&Value| one["capture"] == "ok" && one["certificate"] == "valid";
            whole = workloads.iter().filter(is_whole).count();
            Ok((whole >= count).then_some(()))
        });
        outcome.with_context(|| format!("{whole} of {count}\n{}", self.mesh.log_of(node)))
    }

    /// Every workload opens its share of connections and holds them; while they are open, an endpoint changes.
    fn open(&mut self) -> Result<Vec<Taken>> {
        let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let tunnelled_each = match CONNECTIONS / WORKLOADS {
            each if descriptors >= DESCRIPTORS => each,
            each => each.min(TUNNELLED_EACH_AT_MOST),
        };
        let tunnelled = tunnelled_each * WORKLOADS;
        let same_node_each = (CONNECTIONS - tunnelled).div_ceil(WORKLOADS - 1);
        let began = Instant::now();
        let mut holders = vec![self.hold(SERVER, tunnelled_each, false)?];
        if same_node_each > 0 {
            holders.push(self.hold(NEIGHBOUR, same_node_each, true)?);
        }
        let opened = began.elapsed();
        wait::pace_until(Instant::now() + IDLE_AFTER);
        let mut values = vec![
            value("scale-open-s", opened.as_secs_f64()),
            value("scale-agent-open-mb", self.agent_megabytes(NEAR)?),
            value("scale-far-agent-open-mb", self.agent_megabytes(FAR)?),
        ];
        let node = self.lab.node(NEAR)?;
        values.push(value("scale-cpu-open-percent", idle_percent(node)?));
        values.push(value("scale-endpoint-ms", self.endpoint_change()?));
        let metrics = self.mesh.metrics(node)?;
        let open = |security| {
            let labels = [("direction", "outbound"), ("security", security)];
            metrics.sum("weft_connections_open", &labels)
        };
        let (carried, kernel) = (open("mutual_tls"), open("kernel"));
        values.push(value("scale-tunnelled", carried));
        values.push(value("scale-same-node", kernel));
        for holder in &mut holders {
            holder.check_running()?;
        }
        if carried + kernel < CONNECTIONS as f64 {
            bail!("{carried} connections are open by tunnel and {kernel} in the kernel");
        }
        Ok(values)
    }

    /// Opens connections from every workload to a pod. Those that the kernel shall carry begin in the cgroups of
    /// their workloads.
    fn hold(&self, server: &str, each: usize, in_cgroups: bool) -> Result<Running> {
        let (node, address) = (self.lab.node(NEAR)?, self.lab.pod(server)?.at(ECHO));
        let mut holder = Program::new(&self.benchtool)
            .args(["idle-hold", &address.to_string()])
            .args(["--connections", &each.to_string()]);
        for pod in node.pods.iter().filter(|pod| pod.spec.name != server) {
            holder = holder.arg(format!("--netns={}", pod.netns.display()));
            if in_cgroups {
                holder = holder.arg(format!("--cgroup={}", pod.cgroup.display()));
            }
        }
        let mut holder = self.lab.spawn(node, &holder)?;
        holder.wait_for_output("held", STEP_LIMIT)?;
        Ok(holder)
    }

    /// Median time from a pod's manifest that says ready to the first answer through its service, milliseconds.
    fn endpoint_change(&self) -> Result<f64> {
        let (far, server) = (self.lab.node(FAR)?, self.lab.pod(SERVER)?);
        let client = self
            .lab
            .node(NEAR)?
            .pods
            .first()
            .context("there are pods")?;
        let mut times = Vec::new();
        for _ in 0..CHANGES {
            self.mesh.write_pod(far, server, false)?;
            wait::until("the service to be dead", STEP_LIMIT, || {
                let tried = self
                    .lab
                    .run(client, &self.through_service("0"), STEP_LIMIT)?;
                Ok((!tried.status.success()).then_some(()))
            })?;
            let probe = self.lab.spawn(client, &self.through_service("60"))?;
            let began = SystemTime::now();
            self.mesh.write_pod(far, server, true)?;
            times.push(first_answer(probe, began)?);
        }
        times.sort_unstable();
        let median = times.get(times.len() / 2).context("there were changes")?;
        Ok(median.as_secs_f64() * 1e3)
    }

    fn through_service(&self, limit_seconds: &str) -> Program {
        let [a, b, c, d] = CHANGING;
        Program::new(&self.benchtool)
            .args(["first-answer", &format!("{a}.{b}.{c}.{d}:{CHANGING_PORT}")])
            .args(["--limit", limit_seconds])
    }

    fn agent_megabytes(&mut self, node: &str) -> Result<f64> {
        let agent = self.mesh.agent(self.lab.node(node)?)?;
        Ok(megabytes(resident(agent.pid())?))
    }
}

/// Resources of a kind that an agent holds; none while it cannot be asked.
fn held(mesh: &Mesh, node: &Node, kind: &str) -> f64 {
    mesh.metrics(node).map_or(0.0, |metrics| {
        metrics.sum("weft_xds_resources", &[("type", kind)])
    })
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A file per service, with its endpoints: pods of the mesh that are said to be on nodes that do not exist.
fn write_services(folder: &Folder) -> Result<()> {
    for service in 0..SERVICES {
        let name = format!("s{service}");
        let address = [10, 96, (service / 250) as u8, (service % 250 + 1) as u8];
        let ports = [ServicePort {
            name: "http",
            port: 80,
            target: 8080,
        }];
        let mut objects = vec![manifests::service(
            "large",
            &name,
            &name,
            &[address.into()],
            &ports,
        )];
        objects.extend((0..ENDPOINTS_EACH).map(|endpoint| {
            let number = service * ENDPOINTS_EACH + endpoint;
            endpoint_pod(&name, endpoint, number)
        }));
        folder.write(&format!("large-{name}"), &objects)?;
    }
    Ok(())
}

fn endpoint_pod(service: &str, endpoint: usize, number: usize) -> Value {
    let address = format!(
        "10.{}.{}.{}",
        128 + number / 62_500,
        number / 250 % 250,
        number % 250 + 1
    );
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("{service}-{endpoint}"),
            "namespace": "large",
            "labels": { "app": service, "weft.dev/mesh": "enabled" },
        },
        "spec": {
            "nodeName": format!("node{}", number % NODES),
            "serviceAccountName": service,
            "containers": [{ "name": "app", "image": "app" }],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{ "ip": address }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bench::figures;

    #[test]
    fn endpoints_have_addresses_of_their_own() {
        let all: BTreeSet<String> = (0..SERVICES * ENDPOINTS_EACH)
            .map(|number| endpoint_pod("s", 0, number)["status"]["podIP"].to_string())
            .collect();
        assert_eq!(all.len(), SERVICES * ENDPOINTS_EACH);
    }

    #[test]
    fn there_is_a_figure_for_every_step() {
        assert_eq!(figures::parse(figures::SCALE).expect("a group").0.len(), 15);
    }
}
