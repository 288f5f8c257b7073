//! Weft on the scene: a control plane, an agent per node, the pods enrolled, plaintext refused.

use std::{
    fs,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Lab, Node},
    load::connect::FirstAnswer,
    manifests,
    mesh::{Mesh, MeshSpec},
    process::Running,
    wait,
};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{
    Codec,
    measure::IDLE_AFTER,
    scene::{self, CLIENT, CROWD, ECHO, FAR, NEAR, SERVER, Scene},
};

/// How long a probe may wait for its first answer, beyond the limit that it has itself.
pub const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// Weft, running.
#[derive(Debug)]
pub struct Weft {
    near: Running,
    mesh: Mesh,
    far: Pid,
    far_before_crowd: u64,
    cold_start: Duration,
}

impl Weft {
    /// Starts everything. The last to start is the near node's agent, with its pods in its configuration and an empty
    /// run directory: from its start to the first ping that is answered through the mesh is the cold start. Mutual
    /// TLS is strict, so that nothing is answered past the mesh.
    ///
    /// # Errors
    /// A program fails or is not ready in time.
    pub fn up(scene: &Scene, codec: Option<Codec>) -> Result<Self> {
        let (lab, near, far) = (&scene.lab, scene.lab.node(NEAR)?, scene.lab.node(FAR)?);
        let codec = codec.map(|codec| ["--tunnel-codec", codec.argument()].map(String::from));
        let spec = MeshSpec {
            agent_arguments: codec.into_iter().flatten().collect(),
            ..MeshSpec::default()
        };
        let mut mesh = control_plane(lab, spec)?;
        mesh.start_agent(lab, far)?;
        mesh.wait_ready(lab, far)?;
        let mut far_before_crowd = 0;
        for (number, pod) in far.pods.iter().enumerate() {
            // The first one brings about what one more does not cost.
            if number == 1 && far.pods.len() >= CROWD {
                wait::pace_until(Instant::now() + IDLE_AFTER);
                far_before_crowd = resident(mesh.agent(far)?.pid())?;
            }
            mesh.enroll(lab, far, pod)?;
            mesh.wait_enrolled(lab, far, pod)?;
        }
        let config = mesh.directory().join(format!("{NEAR}.yaml"));
        // JSON is YAML.
        fs::write(&config, workloads_config(near).to_string())
            .with_context(|| format!("cannot write {}", config.display()))?;
        let agent = mesh.agent_program(near)?.arg("--config").arg(&config);
        let probe = probe(scene)?;
        let began = SystemTime::now();
        let near_agent = lab.spawn_agent(near, &agent)?;
        let cold_start = first_answer(probe, began)
            .with_context(|| format!("agent of {NEAR}:\n{}", near_agent.stderr()))?;
        for pod in near.pods.iter().filter(|pod| pod.spec.meshed) {
            mesh.wait_enrolled(lab, near, pod)?;
        }
        let far = mesh.agent(far)?.pid();
        Ok(Self {
            near: near_agent,
            mesh,
            far,
            far_before_crowd,
            cold_start,
        })
    }

    /// Resident memory of the far node's agent, bytes: with one workload, if there came to be a crowd.
    pub fn far_before_crowd(&self) -> u64 {
        self.far_before_crowd
    }

    /// The same now.
    ///
    /// # Errors
    /// It has ended.
    pub fn far_resident(&self) -> Result<u64> {
        resident(self.far)
    }

    /// The agents' processes.
    pub fn agents(&self) -> Vec<Pid> {
        vec![self.near.pid(), self.far]
    }

    /// How long the near node's agent took from its start.
    pub fn cold_start(&self) -> Duration {
        self.cold_start
    }

    /// Un-enrols the client and measures from the start of `weft enroll` to its first ping through the mesh.
    ///
    /// # Errors
    /// The agent refuses, or no ping is answered in time.
    pub fn enrol(&self, scene: &Scene) -> Result<Duration> {
        let (node, pod) = (scene.lab.node(NEAR)?, scene.pod(CLIENT)?);
        self.mesh.unenroll(&scene.lab, node, pod)?;
        let probe = probe(scene)?;
        let began = SystemTime::now();
        self.mesh.enroll(&scene.lab, node, pod)?;
        first_answer(probe, began)
    }
}

/// The mesh of a lab, nothing running yet: every pod known, plaintext refused.
///
/// # Errors
/// Files cannot be written.
pub fn prepare(lab: &Lab, spec: MeshSpec) -> Result<Mesh> {
    let mesh = Mesh::prepare(lab, spec)?;
    mesh.write_pods(lab)?;
    let strict = json!({"mtls": {"mode": "STRICT"}});
    let policy = manifests::policy("MeshPolicy", "weft-system", "default", strict);
    mesh.manifests.write("mesh", &[policy])?;
    Ok(mesh)
}

/// Resident memory of one process, bytes.
///
/// # Errors
/// It has ended.
pub fn resident(pid: Pid) -> Result<u64> {
    Ok(scene::resident_bytes(&[pid])?.into_iter().sum())
}

/// The control plane of [`prepare`], running.
///
/// # Errors
/// Files cannot be written, or it does not start.
pub fn control_plane(lab: &Lab, spec: MeshSpec) -> Result<Mesh> {
    let mut mesh = prepare(lab, spec)?;
    mesh.start_control(lab)?;
    Ok(mesh)
}

fn workloads_config(node: &Node) -> Value {
    let meshed = node.pods.iter().filter(|pod| pod.spec.meshed);
    let workloads: Vec<Value> = meshed
        .map(|pod| {
            json!({
                "namespace": pod.spec.namespace,
                "name": pod.spec.name,
                "netns": pod.netns,
                "cgroup": pod.cgroup,
            })
        })
        .collect();
    json!({ "workloads": workloads })
}

/// A client in the client's pod that tries until the far server answers. It is started before what it waits for.
pub fn probe(scene: &Scene) -> Result<Running> {
    let client = scene.client("first-answer", scene.at(SERVER, ECHO)?, &[]);
    scene.lab.spawn(scene.pod(CLIENT)?, &client)
}

/// From `began` until the probe got its answer.
///
/// # Errors
/// It got none, or one before.
pub fn first_answer(probe: Running, began: SystemTime) -> Result<Duration> {
    let text = probe
        .wait(PROBE_LIMIT)?
        .ok()
        .context("nothing came through the mesh")?;
    let answer: FirstAnswer =
        serde_json::from_str(&text).with_context(|| format!("the probe printed {text:?}"))?;
    let answered = UNIX_EPOCH + Duration::from_nanos(answer.unix_nanos);
    answered
        .duration_since(began)
        .context("a ping was answered before the mesh was there: plaintext is not refused")
}
