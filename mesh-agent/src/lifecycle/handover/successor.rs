//! The agent that takes over.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mesh_api::{
    handover::{
        FromPredecessor, FromSuccessor, LISTENERS_PER_WORKLOAD, NodeDescriptor, OfferedWorkload,
        OpenTunnel, PROTOCOL, Place, TUNNELS_MAX,
    },
    identity::Identity,
};
use mesh_ebpf::WORKLOADS_MAX;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{
    Door, HandoverError, READY_LIMIT, STEP_LIMIT,
    channel::{Channel, channel, knock},
};
use crate::{
    capture::{Enrolled, Listeners, Record},
    config::AgentConfig,
    discovery::Phase,
    lifecycle::{AgentError, agent::Agent, enrolment::Key},
    proxy::{connect::Source, pool::PoolKey},
};

/// For the control plane's first answers. Without them the snapshot serves, as after a restart.
const FRESH_LIMIT: Duration = Duration::from_secs(5);
/// Answers that make the state whole: one per type of resource (workloads and services, policies).
const FRESH_RESPONSES: u64 = 2;
/// For opening tunnels in advance; a peer that is away must not hold up the hand-over.
const WARM_LIMIT: Duration = Duration::from_secs(3);
/// Between two requests for a certificate that was refused.
const CERTIFICATE_PAUSE: Duration = Duration::from_millis(200);

/// An agent that runs, as its successor sees it.
#[derive(Debug)]
pub(in crate::lifecycle) struct Predecessor {
    socket: OwnedFd,
}

impl Predecessor {
    /// The agent that serves `run_dir`, if one does.
    pub(in crate::lifecycle) fn find(run_dir: &Path) -> Result<Option<Self>, HandoverError> {
        Ok(knock(run_dir)?.map(|socket| Self { socket }))
    }

    /// Asks for everything. Needs a runtime.
    pub(in crate::lifecycle) async fn ask(
        self,
        config: &AgentConfig,
    ) -> Result<Offer, HandoverError> {
        let channel = channel(self.socket)?;
        let hello = FromSuccessor::Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            place: Place::from(config),
        };
        channel.send(&hello, &[], STEP_LIMIT).await?;
        let mut offer = Offer::first(channel).await?;
        offer.rest().await?;
        tracing::info!(
            pid = offer.pid,
            version = offer.version,
            workloads = offer.workloads.len(),
            tunnels = offer.tunnels.len(),
            "has the listeners of the running agent"
        );
        Ok(offer)
    }
}

/// Tells the agent that runs, so that who asked it for an upgrade hears why there is none.
pub(in crate::lifecycle) async fn report_failure(run_dir: &Path, reason: String) {
    let told = async {
        let Some(socket) = knock(run_dir)? else {
            return Ok(());
        };
        let abort = FromSuccessor::Abort { reason };
        channel(socket)?.send(&abort, &[], STEP_LIMIT).await
    };
    if let Err(error) = told.await {
        tracing::debug!(%error, "the running agent does not hear why");
    }
}

/// What the predecessor gives.
#[derive(Debug)]
pub(in crate::lifecycle) struct Offer {
    channel: Channel,
    /// Its process id.
    pub pid: u32,
    version: String,
    /// Where it serves metrics, readiness and admin.
    pub addresses: [std::net::SocketAddr; 3],
    node: HashMap<NodeDescriptor, OwnedFd>,
    workloads: Vec<(OfferedWorkload, Listeners)>,
    tunnels: Vec<OpenTunnel>,
}

impl Offer {
    async fn first(channel: Channel) -> Result<Self, HandoverError> {
        let (message, descriptors) = channel.receive(2 * STEP_LIMIT).await?;
        let (version, pid, addresses) = match message {
            FromPredecessor::Offer {
                version,
                pid,
                abi: _,
                addresses,
            } => (version, pid, addresses),
            FromPredecessor::Refused { reason } => return Err(HandoverError::Refused(reason)),
            other => return Err(HandoverError::Malformed(format!("{other:?} at first"))),
        };
        if descriptors.len() != NodeDescriptor::ALL.len() {
            return Err(HandoverError::Malformed(format!(
                "{} descriptors of the node",
                descriptors.len()
            )));
        }
        Ok(Self {
            channel,
            pid,
            version,
            addresses,
            node: NodeDescriptor::ALL.into_iter().zip(descriptors).collect(),
            workloads: Vec::new(),
            tunnels: Vec::new(),
        })
    }

    async fn rest(&mut self) -> Result<(), HandoverError> {
        loop {
            let (message, descriptors) = self.channel.receive(STEP_LIMIT).await?;
            match message {
                FromPredecessor::Workloads { workloads } => self.add(workloads, descriptors)?,
                FromPredecessor::Tunnels { tunnels } => self.tunnels.extend(tunnels),
                FromPredecessor::Complete => return Ok(()),
                FromPredecessor::Refused { reason } => return Err(HandoverError::Refused(reason)),
                other => return Err(HandoverError::Malformed(format!("{other:?} in an offer"))),
            }
            if self.workloads.len() > WORKLOADS_MAX as usize || self.tunnels.len() > TUNNELS_MAX {
                return Err(HandoverError::Malformed(
                    "more than a node holds".to_owned(),
                ));
            }
        }
    }

    fn add(
        &mut self,
        workloads: Vec<OfferedWorkload>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), HandoverError> {
        if descriptors.len() != workloads.len() * LISTENERS_PER_WORKLOAD {
            return Err(HandoverError::Malformed(format!(
                "{} descriptors for {} workloads",
                descriptors.len(),
                workloads.len()
            )));
        }
        let mut descriptors = descriptors.into_iter();
        for workload in workloads {
            let (Some(outbound), Some(plaintext), Some(tunnel)) =
                (descriptors.next(), descriptors.next(), descriptors.next())
            else {
                break;
            };
            let listeners = Listeners {
                outbound: outbound.into(),
                plaintext: plaintext.into(),
                tunnel: tunnel.into(),
            };
            self.workloads.push((workload, listeners));
        }
        Ok(())
    }

    /// Takes a descriptor of the node.
    pub(in crate::lifecycle) fn take(
        &mut self,
        which: NodeDescriptor,
    ) -> Result<OwnedFd, HandoverError> {
        let missing = || HandoverError::Malformed(format!("{which:?} is missing"));
        self.node.remove(&which).ok_or_else(missing)
    }

    /// Takes the lock of the agent's cgroup.
    pub(in crate::lifecycle) fn take_cgroup_lock(&mut self) -> Result<File, HandoverError> {
        self.take(NodeDescriptor::CgroupLock).map(File::from)
    }

    /// Takes the hand-over socket.
    pub(in crate::lifecycle) fn take_door(&mut self) -> Result<Door, HandoverError> {
        self.take(NodeDescriptor::Handover)
            .and_then(Door::inherited)
    }

    /// Tells the predecessor that there will be no hand-over.
    pub(in crate::lifecycle) async fn give_up(&self, reason: String) {
        let abort = FromSuccessor::Abort { reason };
        if let Err(error) = self.channel.send(&abort, &[], STEP_LIMIT).await {
            tracing::debug!(%error, "the running agent does not hear why");
        }
    }

    /// Takes over: until this returns `Ok`, the predecessor can go on. Returns the records that nobody served.
    pub(in crate::lifecycle) async fn carry_out(
        &mut self,
        agent: &Arc<Agent>,
        records: Vec<Record>,
    ) -> Result<Vec<Record>, AgentError> {
        let (inherited, rest) = self.inherit(agent, records);
        agent.mesh_changed();
        tokio::spawn(agent.clone().follow_mesh());
        self.until_ready(agent, &inherited).await?;
        let warm = agent.workers.warm(self.sources(agent), WARM_LIMIT).await?;
        tracing::info!(warm, of = self.tunnels.len(), "is ready");
        let workloads: Vec<_> = inherited
            .iter()
            .map(|one| {
                let known = one.enrolled.local.workload.load_full();
                let settings = known.map(|workload| workload.capture);
                (&one.enrolled, &one.listeners, settings)
            })
            .collect();
        agent.capture.put_in_place(workloads)?;
        self.until_paused(agent.config.proxy.upgrade_drain_seconds)
            .await?;
        for one in inherited {
            let handle = agent.workers.serve(one.enrolled.local, one.listeners)?;
            agent.serving().insert(one.key, handle);
        }
        agent.is_active.store(true, Ordering::Release);
        agent.mesh_changed();
        match self
            .channel
            .send(&FromSuccessor::Serving, &[], STEP_LIMIT)
            .await
        {
            Ok(()) => tracing::info!(pid = self.pid, "has taken over"),
            Err(error) => tracing::warn!(pid = self.pid, %error, "the agent before is gone"),
        }
        Ok(rest)
    }

    /// Knows the offered workloads. Those whose namespace is no longer at its path are left to enrolment, which says
    /// what is wrong with them.
    fn inherit(&mut self, agent: &Agent, records: Vec<Record>) -> (Vec<Inherited>, Vec<Record>) {
        let mut offered: HashMap<Key, (OfferedWorkload, Listeners)> = self
            .workloads
            .drain(..)
            .map(|(workload, listeners)| {
                let key = (workload.namespace.clone(), workload.name.clone());
                (key, (workload, listeners))
            })
            .collect();
        let (mut inherited, mut rest) = (Vec::new(), Vec::new());
        for record in records {
            let key = (
                record.enrolment.namespace.clone(),
                record.enrolment.name.clone(),
            );
            let known = match offered.remove(&key) {
                Some((workload, listeners)) if workload.cookie == record.cookie => {
                    let enrolled = agent.capture.inherit(&record);
                    enrolled
                        .ok()
                        .map(|enrolled| (enrolled, workload, listeners))
                }
                _ => None,
            };
            match known {
                Some((enrolled, workload, listeners)) => inherited.push(Inherited {
                    key,
                    enrolled,
                    listeners,
                    certified: workload.certified,
                }),
                None => rest.push(record),
            }
        }
        (inherited, rest)
    }

    async fn until_ready(
        &self,
        agent: &Agent,
        inherited: &[Inherited],
    ) -> Result<(), HandoverError> {
        let deadline = Instant::now() + READY_LIMIT;
        let mut discovery = agent.discovery.clone();
        let fresh = discovery.wait_for(|status| {
            status.phase == Phase::Connected && status.responses >= FRESH_RESPONSES
        });
        if timeout(FRESH_LIMIT, fresh).await.is_err() {
            tracing::warn!("the control plane does not answer; the snapshot serves");
        }
        let ready = timeout_at(deadline, discovery.wait_for(|status| status.ready)).await;
        if !matches!(ready, Ok(Ok(_))) {
            let error = agent.discovery.borrow().last_error.clone();
            let error = error.unwrap_or_else(|| "no answer".to_owned());
            return Err(HandoverError::NotReady(format!("discovery: {error}")));
        }
        agent.mesh_changed();
        for one in inherited.iter().filter(|one| one.certified) {
            let Some(workload) = one.enrolled.local.workload.load_full() else {
                continue;
            };
            certified(agent, &workload.identity, deadline).await?;
        }
        Ok(())
    }

    /// From here on the predecessor is only good for draining: if it has died, so much the worse for its connections.
    async fn until_paused(&self, drain_deadline_seconds: u64) -> Result<(), HandoverError> {
        let commit = FromSuccessor::Commit {
            drain_deadline_seconds,
        };
        let paused = async {
            self.channel.send(&commit, &[], STEP_LIMIT).await?;
            self.channel.receive(STEP_LIMIT).await
        };
        match paused.await {
            Ok((FromPredecessor::Paused, _)) => Ok(()),
            Ok((other, _)) => Err(HandoverError::Malformed(format!("{other:?} to a commit"))),
            Err(HandoverError::Gone) => {
                tracing::warn!(
                    pid = self.pid,
                    "the running agent is gone; going on without it"
                );
                Ok(())
            }
            // Stopped, so that it accepts nothing; when it goes on it will read the commitment.
            Err(HandoverError::Silent(_)) => {
                tracing::warn!(
                    pid = self.pid,
                    "the running agent does not answer; going on"
                );
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// How to open the predecessor's tunnels.
    fn sources(&self, agent: &Agent) -> Vec<(usize, PoolKey, Source)> {
        let source = |tunnel: &OpenTunnel| {
            let cookie = crate::sys::netns::NetnsCookie(tunnel.cookie);
            let local = agent.capture.by_cookie(cookie)?.local;
            let certified = agent.certificates.current(&tunnel.source)?;
            let key = PoolKey {
                source: tunnel.source.clone(),
                expected: tunnel.expected.as_slice().into(),
                destination: tunnel.destination,
                netns: cookie,
                source_address: tunnel.source_address,
                roots: certified.roots_fingerprint,
            };
            Some((tunnel.worker, key, Source { local, certified }))
        };
        self.tunnels.iter().filter_map(source).collect()
    }
}

/// A workload with the predecessor's listeners.
struct Inherited {
    key: Key,
    enrolled: Enrolled,
    listeners: Listeners,
    certified: bool,
}

async fn certified(
    agent: &Agent,
    identity: &Identity,
    deadline: Instant,
) -> Result<(), HandoverError> {
    loop {
        let error = match timeout_at(deadline, agent.certificates.get(identity)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if Instant::now() + CERTIFICATE_PAUSE >= deadline {
            let reason = format!("no certificate for {identity}: {error}");
            return Err(HandoverError::NotReady(reason));
        }
        sleep(CERTIFICATE_PAUSE).await;
    }
}
