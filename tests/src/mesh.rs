//! Weft in a lab: a control plane on the first node, an agent on every node, manifests, enrolment.
//!
//! The programs are used as an operator would: by their command lines, the folder of manifests, `weft`, and metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    http,
    lab::{Lab, Node, Pod},
    manifests::{self, Folder},
    metrics::Metrics,
    process::{Finished, Program, Running},
    programs, wait,
};

/// Port of the control plane.
pub const CONTROL_PORT: u16 = 15012;

/// Port of every agent's metrics.
pub const METRICS_PORT: u16 = 15020;

/// Port of every agent's readiness.
pub const READINESS_PORT: u16 = 15021;

/// Port of every agent's administration, on loopback.
pub const ADMIN_PORT: u16 = 15000;

/// How long a program of ours may take to start, to stop, or to answer.
pub const LIMIT: Duration = Duration::from_secs(30);

/// What an agent logs once it serves in the place of another one.
pub const TOOK_OVER: &str = "in the place of another one";

/// How the mesh shall be.
#[derive(Debug, Clone, Default)]
pub struct MeshSpec {
    /// First part of every identity; `None` for the programs' default.
    pub trust_domain: Option<String>,
    /// Further arguments of every agent.
    pub agent_arguments: Vec<String>,
    /// Further arguments of the control plane.
    pub control_arguments: Vec<String>,
    /// Descriptors that an agent may open; `None` for as many as this process.
    pub agent_descriptors: Option<u64>,
    /// YAML of the agents' configuration file; `None` for none.
    pub agent_config: Option<String>,
    /// Manifests beside those of the pods: file name (without ending) and objects.
    pub manifests: Vec<(String, Vec<Value>)>,
}

impl MeshSpec {
    /// Adds a manifest file.
    #[must_use]
    pub fn manifest(mut self, name: &str, objects: impl IntoIterator<Item = Value>) -> Self {
        self.manifests
            .push((name.to_owned(), objects.into_iter().collect()));
        self
    }
}

/// A running mesh. Dropping it kills its programs; what they left in the kernel goes with the lab.
#[derive(Debug)]
pub struct Mesh {
    spec: MeshSpec,
    /// The folder of manifests that the control plane watches.
    pub manifests: Folder,
    directory: PathBuf,
    control_address: SocketAddr,
    control: Option<Running>,
    agents: BTreeMap<String, Running>,
}

impl Mesh {
    /// Writes the manifests of the lab's pods, starts the control plane and the agents, waits until they are ready
    /// and enrols every meshed pod.
    ///
    /// # Errors
    /// A program is not built, does not become ready, or refuses a pod.
    pub fn start(lab: &Lab, spec: MeshSpec) -> Result<Self> {
        let mut mesh = Self::prepare(lab, spec)?;
        mesh.write_pods(lab)?;
        mesh.start_control(lab)?;
        for node in lab.nodes() {
            mesh.start_agent(lab, node)?;
        }
        for node in lab.nodes() {
            mesh.wait_ready(lab, node)?;
        }
        mesh.enroll_all(lab)?;
        Ok(mesh)
    }

    /// Makes the files of a mesh (manifests folder, node tokens, agent configuration) and starts nothing.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn prepare(lab: &Lab, spec: MeshSpec) -> Result<Self> {
        let directory = lab.directory().join("mesh");
        let first = lab.nodes().first().context("a mesh needs a node")?;
        let mesh = Self {
            manifests: Folder::create(&directory.join("manifests"))?,
            control_address: SocketAddr::new(first.address(), CONTROL_PORT),
            control: None,
            agents: BTreeMap::new(),
            directory,
            spec,
        };
        fs::set_permissions(&mesh.directory, fs::Permissions::from_mode(0o700))?;
        let mut tokens = Vec::new();
        for node in lab.nodes() {
            tokens.push((node.name.clone(), fresh_token()?));
        }
        let lines: String = tokens
            .iter()
            .map(|(node, token)| format!("{token} {node}\n"))
            .collect();
        write_secret(&mesh.tokens_file(), &lines)?;
        for (node, token) in &tokens {
            write_secret(&mesh.token_file(node), &format!("{token}\n"))?;
        }
        for (name, objects) in &mesh.spec.manifests {
            mesh.manifests.write(name, objects)?;
        }
        if let Some(config) = &mesh.spec.agent_config {
            fs::write(mesh.config_file(), config)
                .context("cannot write the agents' configuration")?;
        }
        Ok(mesh)
    }

    /// Writes one manifest file per pod of the lab, with its service account.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn write_pods(&self, lab: &Lab) -> Result<()> {
        for node in lab.nodes() {
            for pod in &node.pods {
                self.write_pod(node, pod, true)?;
            }
        }
        Ok(())
    }

    /// Writes a pod's manifest, ready or not, with its service account.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_pod(&self, node: &Node, pod: &Pod, ready: bool) -> Result<()> {
        let account = manifests::service_account(&pod.spec.namespace, &pod.spec.service_account);
        let account_file = format!(
            "account-{}-{}",
            pod.spec.namespace, pod.spec.service_account
        );
        self.manifests.write(&account_file, &[account])?;
        self.manifests
            .write(&pod_file(pod), &[manifests::pod(node, pod, ready)])
    }

    /// Removes a pod's manifest, as when the pod is deleted.
    ///
    /// # Errors
    /// It was not there.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        self.manifests.remove(&pod_file(pod))
    }

    /// Starts the control plane on the first node and waits until it accepts connections.
    ///
    /// # Errors
    /// It is not built, or ends.
    pub fn start_control(&mut self, lab: &Lab) -> Result<()> {
        let first = lab.nodes().first().context("a mesh needs a node")?;
        let mut program = Program::new(programs::own("mesh-control")?)
            .args(["run", "--source"])
            .arg(self.manifests.path())
            .args(["--listen", &self.control_address.to_string(), "--ca-dir"])
            .arg(self.directory.join("ca"))
            .arg("--node-tokens")
            .arg(self.tokens_file());
        if let Some(domain) = &self.spec.trust_domain {
            program = program.args(["--trust-domain", domain]);
        }
        let program = program.args(&self.spec.control_arguments);
        self.control = Some(lab.serve(first, &program, self.control_address, LIMIT)?);
        Ok(())
    }

    /// The command line of a node's agent.
    ///
    /// # Errors
    /// It is not built.
    pub fn agent_program(&self, node: &Node) -> Result<Program> {
        let program = Program::new(programs::own("mesh-agent")?)
            .named(&format!("agent-{}", node.name))
            .args(["run", "--node", &node.name, "--run-dir"])
            .arg(&node.run_dir)
            .arg("--cgroup-root")
            .arg(&node.cgroup_root)
            .arg("--bpffs-root")
            .arg(&node.bpffs_root)
            .args([
                "--control-plane",
                &self.control_plane(),
                "--control-plane-ca",
            ])
            .arg(self.root_file())
            .arg("--token-file")
            .arg(self.token_file(&node.name))
            .args([
                "--metrics-addr",
                &any(node, METRICS_PORT),
                "--readiness-addr",
                &any(node, READINESS_PORT),
            ])
            .args(["--admin-addr", &format!("127.0.0.1:{ADMIN_PORT}")]);
        let program = match &self.spec.trust_domain {
            Some(domain) => program.args(["--trust-domain", domain]),
            None => program,
        };
        let program = match &self.spec.agent_config {
            Some(_) => program.arg("--config").arg(self.config_file()),
            None => program,
        };
        let program = program.args(&self.spec.agent_arguments);
        Ok(match self.spec.agent_descriptors {
            Some(most) => program.with_descriptors(most),
            None => program,
        })
    }

    /// Starts a node's agent; it may not be ready yet.
    ///
    /// # Errors
    /// It is not built, or one runs already.
    pub fn start_agent(&mut self, lab: &Lab, node: &Node) -> Result<()> {
        if self.agents.contains_key(&node.name) {
            bail!("the agent of {} runs already", node.name);
        }
        let program = self.agent_program(node)?;
        let agent = lab.spawn_agent(node, &program)?;
        self.agents.insert(node.name.clone(), agent);
        Ok(())
    }

    /// Starts another agent of a node that takes over from the one that runs, and waits until it has. Returns the one
    /// that was replaced; it may still serve connections.
    ///
    /// # Errors
    /// It does not take over.
    pub fn take_over(&mut self, lab: &Lab, node: &Node, arguments: &[&str]) -> Result<Running> {
        let program = self.agent_program(node)?.arg("--take-over").args(arguments);
        let mut agent = lab.spawn_agent(node, &program)?;
        agent.wait_for_output(TOOK_OVER, LIMIT)?;
        let replaced = self.release_agent(node)?;
        self.agents.insert(node.name.clone(), agent);
        Ok(replaced)
    }

    /// Makes an agent that was started otherwise the one of a node.
    ///
    /// # Errors
    /// Another one is.
    pub fn adopt_agent(&mut self, node: &Node, agent: Running) -> Result<()> {
        match self.agents.insert(node.name.clone(), agent) {
            None => Ok(()),
            Some(_) => bail!("the agent of {} runs already", node.name),
        }
    }

    /// Gives a node's agent away, as it is.
    ///
    /// # Errors
    /// None was started.
    pub fn release_agent(&mut self, node: &Node) -> Result<Running> {
        self.agents
            .remove(&node.name)
            .with_context(|| format!("no agent runs on {}", node.name))
    }

    /// Waits until a node's agent waits for nothing any more.
    ///
    /// # Errors
    /// It ends, or still waits for something after the limit.
    pub fn wait_ready(&mut self, lab: &Lab, node: &Node) -> Result<()> {
        let mut pending = String::from("its socket");
        let outcome = wait::until(
            &format!("the agent of {} to be ready", node.name),
            LIMIT,
            || {
                self.agent(node)?.check_running()?;
                let Some(status) = self.status(lab, node)? else {
                    return Ok(None);
                };
                pending = status["pending"].to_string();
                Ok((status["pending"].as_array().is_some_and(Vec::is_empty)).then_some(()))
            },
        );
        outcome.with_context(|| format!("the agent waits for {pending}\n{}", self.log_of(node)))
    }

    /// Enrols every meshed pod and waits until each is captured and has a certificate.
    ///
    /// # Errors
    /// An agent refuses, or a pod does not get so far.
    pub fn enroll_all(&self, lab: &Lab) -> Result<()> {
        for node in lab.nodes() {
            for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
                self.enroll(lab, node, pod)?;
            }
        }
        for node in lab.nodes() {
            for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
                self.wait_enrolled(lab, node, pod)?;
            }
        }
        Ok(())
    }

    /// Enrols a pod.
    ///
    /// # Errors
    /// The agent refuses.
    pub fn enroll(&self, lab: &Lab, node: &Node, pod: &Pod) -> Result<()> {
        let (netns, cgroup) = (pod.netns.to_string_lossy(), pod.cgroup.to_string_lossy());
        let spec = &pod.spec;
        let arguments = [
            "enroll",
            "--namespace",
            &spec.namespace,
            "--name",
            &spec.name,
            "--netns",
            &netns,
            "--cgroup",
            &cgroup,
        ];
        self.weft(lab, node, &arguments)?
            .ok()
            .with_context(|| format!("cannot enrol {}", spec.name))
            .map(drop)
    }

    /// Un-enrols a pod.
    ///
    /// # Errors
    /// The agent refuses.
    pub fn unenroll(&self, lab: &Lab, node: &Node, pod: &Pod) -> Result<()> {
        let spec = &pod.spec;
        let arguments = [
            "unenroll",
            "--namespace",
            &spec.namespace,
            "--name",
            &spec.name,
        ];
        self.weft(lab, node, &arguments)?
            .ok()
            .with_context(|| format!("cannot un-enrol {}", spec.name))
            .map(drop)
    }

    /// Waits until a pod is captured and has a valid certificate.
    ///
    /// # Errors
    /// It does not get so far; the error carries its status.
    pub fn wait_enrolled(&self, lab: &Lab, node: &Node, pod: &Pod) -> Result<()> {
        let mut last = Value::Null;
        let outcome = wait::until(&format!("{} to be enrolled", pod.spec.name), LIMIT, || {
            let status = self.status(lab, node)?.unwrap_or_default();
            let workloads = status["workloads"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default();
            let found = workloads.iter().find(|workload| {
                workload["name"] == pod.spec.name.as_str()
                    && workload["namespace"] == pod.spec.namespace.as_str()
            });
            last = found.cloned().unwrap_or_default();
            Ok((last["capture"] == "ok" && last["certificate"] == "valid").then_some(()))
        });
        outcome.with_context(|| format!("its status is {last}\n{}", self.log_of(node)))
    }

    /// Runs the `weft` command line against a node's agent.
    ///
    /// # Errors
    /// It is not built, or hangs. What it says is in the [`Finished`].
    pub fn weft(&self, lab: &Lab, node: &Node, arguments: &[&str]) -> Result<Finished> {
        let program = Program::new(programs::own("weft")?)
            .arg("--run-dir")
            .arg(&node.run_dir)
            .args(arguments);
        lab.run(node, &program, LIMIT)
    }

    /// What `weft status` says as JSON; `None` while the agent cannot be reached.
    ///
    /// # Errors
    /// The command cannot be run or prints no JSON.
    pub fn status(&self, lab: &Lab, node: &Node) -> Result<Option<Value>> {
        let finished = self.weft(lab, node, &["-o", "json", "status"])?;
        if !finished.status.success() {
            return Ok(None);
        }
        Ok(Some(
            serde_json::from_str(&finished.stdout).context("weft status printed no JSON")?,
        ))
    }

    /// Waits until every agent enforces exactly these policies (`<namespace>/<name>`), generated ones included, and
    /// those that select workloads are listed by some.
    ///
    /// # Errors
    /// They do not arrive; the error carries what an agent has.
    pub fn wait_policies(&self, lab: &Lab, expected: &[&str]) -> Result<()> {
        let expected: BTreeSet<String> = expected.iter().map(|key| (*key).to_owned()).collect();
        for node in lab.nodes() {
            let mut last = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            wait::until(
                &format!("the policies {expected:?} on {}", node.name),
                LIMIT,
                || {
                    let text = self.weft(lab, node, &["-o", "json", "dump"])?.ok()?;
                    let state: Value = serde_json::from_str(&text)?;
                    last = policies(&state["mesh"]);
                    let (known, selecting, listed) = &last;
                    Ok((*known == expected && selecting == listed).then_some(()))
                },
            )
            .with_context(|| format!("known, selecting, listed: {last:?}"))?;
        }
        Ok(())
    }

    /// Scrapes a node's agent.
    ///
    /// # Errors
    /// It does not answer with metrics.
    pub fn metrics(&self, node: &Node) -> Result<Metrics> {
        let address = SocketAddr::new(node.address(), METRICS_PORT);
        let response = http::get(&node.netns, address, "/metrics", LIMIT)?;
        if response.status != 200 {
            bail!("metrics of {}: status {}", node.name, response.status);
        }
        Metrics::parse(&response.body)
    }

    /// A node's running agent.
    ///
    /// # Errors
    /// It was not started.
    pub fn agent(&mut self, node: &Node) -> Result<&mut Running> {
        self.agents
            .get_mut(&node.name)
            .with_context(|| format!("no agent runs on {}", node.name))
    }

    /// Ends a node's agent with a signal and waits until it is gone; what it did to the kernel stays.
    ///
    /// # Errors
    /// No agent runs there, or it does not end.
    pub fn stop_agent(&mut self, node: &Node, signal: Signal) -> Result<Finished> {
        self.release_agent(node)?.stop(signal, LIMIT)
    }

    /// Removes everything a stopped agent has left in the kernel, with its own `uninstall`.
    ///
    /// # Errors
    /// It fails.
    pub fn uninstall(&self, lab: &Lab, node: &Node) -> Result<()> {
        let program = Program::new(programs::own("mesh-agent")?)
            .args(["uninstall", "--node", &node.name, "--run-dir"])
            .arg(&node.run_dir)
            .arg("--cgroup-root")
            .arg(&node.cgroup_root)
            .arg("--bpffs-root")
            .arg(&node.bpffs_root);
        let uninstall = lab.spawn_agent(node, &program)?;
        uninstall.wait(LIMIT)?.ok().map(drop)
    }

    /// Ends the control plane with a signal and waits until it is gone.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub fn stop_control(&mut self, signal: Signal) -> Result<Finished> {
        self.control
            .take()
            .context("the control plane does not run")?
            .stop(signal, LIMIT)
    }

    /// The running control plane.
    ///
    /// # Errors
    /// It was not started.
    pub fn control(&self) -> Result<&Running> {
        self.control
            .as_ref()
            .context("the control plane does not run")
    }

    /// Makes sure that every program that was started still runs.
    ///
    /// # Errors
    /// One has ended; the error carries its last words.
    pub fn check_running(&mut self) -> Result<()> {
        for program in self.control.iter_mut().chain(self.agents.values_mut()) {
            program.check_running()?;
        }
        Ok(())
    }

    /// The folder of the mesh's files (certificate authority, tokens, manifests).
    #[must_use]
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// The last lines that a node's agent logged.
    #[must_use]
    pub fn log_of(&self, node: &Node) -> String {
        /// Lines shown of a log.
        const LINES: usize = 30;
        let Some(agent) = self.agents.get(&node.name) else {
            return "no agent runs".to_owned();
        };
        let log = agent.stderr();
        let lines: Vec<&str> = log.lines().collect();
        format!(
            "log of {}:\n{}",
            node.name,
            lines[lines.len().saturating_sub(LINES)..].join("\n")
        )
    }

    /// Everything that a node's running agent has logged; empty without one.
    #[must_use]
    pub fn full_log_of(&self, node: &Node) -> String {
        self.agents
            .get(&node.name)
            .map(Running::stderr)
            .unwrap_or_default()
    }

    /// What the running control plane has logged; empty without one.
    #[must_use]
    pub fn control_log(&self) -> String {
        self.control
            .as_ref()
            .map(Running::stderr)
            .unwrap_or_default()
    }

    fn tokens_file(&self) -> PathBuf {
        self.directory.join("node-tokens")
    }

    /// Where the control plane is, as an agent is told.
    #[must_use]
    pub fn control_plane(&self) -> String {
        format!("https://{}", self.control_address)
    }

    /// The file of the certificate authority's roots.
    #[must_use]
    pub fn root_file(&self) -> PathBuf {
        self.directory.join("ca/root-cert.pem")
    }

    /// The file of a node's token.
    #[must_use]
    pub fn token_file(&self, node: &str) -> PathBuf {
        self.directory.join(format!("token-{node}"))
    }

    fn config_file(&self) -> PathBuf {
        self.directory.join("agent.yaml")
    }
}

/// Of a dump: the keys of all policies, of those that select workloads, and of those that workloads list.
fn policies(mesh: &Value) -> (BTreeSet<String>, BTreeSet<String>, BTreeSet<String>) {
    fn items(section: &Value) -> impl Iterator<Item = &Value> {
        section["items"].as_array().into_iter().flatten()
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let known = items(&mesh["policies"]).map(|policy| text(&policy["key"]));
    let selecting = items(&mesh["policies"])
        .filter(|policy| policy["scope"] == "Selected")
        .map(|policy| text(&policy["key"]));
    let listed = items(&mesh["workloads"])
        .flat_map(|workload| workload["policies"].as_array().into_iter().flatten())
        .map(text);
    (known.collect(), selecting.collect(), listed.collect())
}

fn pod_file(pod: &Pod) -> String {
    format!("pod-{}-{}", pod.spec.namespace, pod.spec.name)
}

/// All addresses of a node's family: dual-stack sockets where the lab has IPv6.
fn any(node: &Node, port: u16) -> String {
    if node.addresses.iter().any(std::net::IpAddr::is_ipv6) {
        format!("[::]:{port}")
    } else {
        format!("0.0.0.0:{port}")
    }
}

fn fresh_token() -> Result<String> {
    use std::io::Read as _;
    let mut bytes = [0; 32];
    fs::File::open("/dev/urandom")?
        .read_exact(&mut bytes)
        .context("cannot read randomness")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_secret(path: &std::path::Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut options = fs::File::options();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
