//! The agent that is replaced.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mesh_api::handover::{
    FromPredecessor, FromSuccessor, OfferedWorkload, OpenTunnel, PROTOCOL, Place,
    TUNNEL_IDENTITIES_MAX, TUNNELS_MAX, TUNNELS_PER_MESSAGE, WORKLOADS_PER_MESSAGE,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{
    HandoverError, Outcome, READY_LIMIT, STEP_LIMIT,
    channel::{Channel, Door},
};
use crate::{
    capture::{Enrolled, Listeners},
    lifecycle::{agent::Agent, enrolment::Key},
};

/// Pause after a failed accept (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What belongs to the node and goes to the successor, in the order of [`mesh_api::handover::NodeDescriptor::ALL`].
#[derive(Debug)]
pub(in crate::lifecycle) struct Descriptors {
    pub run_lock: OwnedFd,
    pub cgroup_lock: OwnedFd,
    pub local: OwnedFd,
    /// Metrics, readiness, admin.
    pub admin: [OwnedFd; 3],
}

/// Another agent serves from here on.
#[derive(Debug)]
pub(in crate::lifecycle) struct HandedOver {
    /// What the connections of this one get.
    pub drain_deadline: Duration,
}

/// A workload with copies of its listeners.
type Lent = (Key, Enrolled, Listeners);

/// Answers successors one after the other, until one has taken over.
pub(in crate::lifecycle) async fn hand_over_to_successors(
    agent: Arc<Agent>,
    mut door: Door,
    descriptors: Descriptors,
    done: oneshot::Sender<HandedOver>,
) {
    loop {
        let channel = match door.accept().await {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the hand-over socket");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let conversation = Conversation {
            agent: &agent,
            channel: &channel,
        };
        // Who waits for an upgrade hears of either end.
        match Box::pin(conversation.run(&door, &descriptors)).await {
            Ok(handed_over) => {
                door.leave();
                agent.attempts.tell(Outcome::HandedOver {
                    drain_deadline: handed_over.drain_deadline,
                });
                // Without a receiver the process is ending anyway.
                let _ = done.send(handed_over);
                return;
            }
            Err(error) => {
                tracing::error!(%error, "nothing was handed over; this agent goes on");
                agent.attempts.tell(Outcome::Failed(error.to_string()));
            }
        }
    }
}

struct Conversation<'a> {
    agent: &'a Arc<Agent>,
    channel: &'a Channel,
}

impl Conversation<'_> {
    async fn run(
        &self,
        door: &Door,
        descriptors: &Descriptors,
    ) -> Result<HandedOver, HandoverError> {
        self.greet().await?;
        // Nobody is enrolled or un-enrolled until it is clear who serves.
        let enrolling = timeout(STEP_LIMIT, self.agent.enrolling.lock()).await;
        let Ok(_unchanged) = enrolling else {
            return Err(self.refuse("an enrolment is under way; try again").await);
        };
        let result = self.carry_out(door, descriptors).await;
        if let Err(error) = &result {
            self.fence(error);
            if let Err(error) = self.agent.capture.put_back() {
                tracing::error!(%error, "a program of the other agent stays");
            }
        }
        result
    }

    async fn greet(&self) -> Result<(), HandoverError> {
        match self.channel.receive(STEP_LIMIT).await?.0 {
            FromSuccessor::Hello {
                protocol,
                version,
                place,
            } => {
                tracing::info!(%version, pid = self.channel.peer_pid(), "another agent asks to take over");
                if protocol != PROTOCOL {
                    let reason = format!("it speaks protocol {PROTOCOL}, not {protocol}");
                    return Err(self.refuse(&reason).await);
                }
                let own = Place::from(&self.agent.config);
                if place != own {
                    let reason = format!("it serves {own:?}, not {place:?}");
                    return Err(self.refuse(&reason).await);
                }
                Ok(())
            }
            FromSuccessor::Abort { reason } => Err(HandoverError::Aborted(reason)),
            other => Err(HandoverError::Malformed(format!("{other:?} at first"))),
        }
    }

    async fn refuse(&self, reason: &str) -> HandoverError {
        let refusal = FromPredecessor::Refused {
            reason: reason.to_owned(),
        };
        // It may have gone already; what counts is said here.
        let _ = self.channel.send(&refusal, &[], STEP_LIMIT).await;
        HandoverError::Refused(reason.to_owned())
    }

    /// A successor that has the listeners and does not answer could wake up and serve beside us.
    fn fence(&self, error: &HandoverError) {
        if matches!(error, HandoverError::Gone | HandoverError::Aborted(_)) {
            return;
        }
        // Its end of the channel is still open, so the process id is still its own.
        let pid = self.channel.peer_pid();
        if pid <= 1 {
            tracing::error!("the agent that was to take over cannot be ended from here");
            return;
        }
        if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
            tracing::error!(pid, %error, "cannot end the agent that was to take over");
        }
    }

    async fn carry_out(
        &self,
        door: &Door,
        descriptors: &Descriptors,
    ) -> Result<HandedOver, HandoverError> {
        let lent = self.offer(door, descriptors).await?;
        let asked = match self.channel.receive(READY_LIMIT + STEP_LIMIT).await?.0 {
            FromSuccessor::Commit {
                drain_deadline_seconds,
            } => drain_deadline_seconds,
            FromSuccessor::Abort { reason } => return Err(HandoverError::Aborted(reason)),
            other => return Err(HandoverError::Malformed(format!("{other:?} too early"))),
        };
        self.agent.is_active.store(false, Ordering::Release);
        // Dropped, the handles stop the accept loops; the copies keep the queues.
        let stopped: HashMap<_, _> = std::mem::take(&mut *self.agent.serving());
        drop(stopped);
        let served = self.see_it_serve().await;
        if let Err(error) = served {
            self.resume(lent);
            return Err(error);
        }
        let seconds = self
            .agent
            .attempts
            .drain_deadline_seconds()
            .unwrap_or(asked);
        Ok(HandedOver {
            drain_deadline: Duration::from_secs(seconds),
        })
    }

    async fn see_it_serve(&self) -> Result<(), HandoverError> {
        self.channel
            .send(&FromPredecessor::Paused, &[], STEP_LIMIT)
            .await?;
        match self.channel.receive(STEP_LIMIT).await?.0 {
            FromSuccessor::Serving => Ok(()),
            FromSuccessor::Abort { reason } => Err(HandoverError::Aborted(reason)),
            other => Err(HandoverError::Malformed(format!("{other:?} too late"))),
        }
    }

    /// Accepts again what has waited meanwhile.
    fn resume(&self, lent: Vec<Lent>) {
        for (key, enrolled, listeners) in lent {
            match self.agent.workers.serve(enrolled.local, listeners) {
                Ok(handle) => drop(self.agent.serving().insert(key, handle)),
                Err(error) => {
                    tracing::error!(namespace = key.0, name = key.1, %error, "no longer served");
                }
            }
        }
        self.agent.is_active.store(true, Ordering::Release);
        self.agent.mesh_changed();
    }

    async fn offer(
        &self,
        door: &Door,
        descriptors: &Descriptors,
    ) -> Result<Vec<Lent>, HandoverError> {
        let lent = self.lend().await?;
        let [metrics, readiness, admin] = &descriptors.admin;
        let node = [
            descriptors.run_lock.as_fd(),
            descriptors.cgroup_lock.as_fd(),
            door.as_fd(),
            descriptors.local.as_fd(),
            metrics.as_fd(),
            readiness.as_fd(),
            admin.as_fd(),
        ];
        let listen = &self.agent.config.listen;
        let offer = FromPredecessor::Offer {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            abi: self.agent.capture.kernel().config().abi,
            addresses: [listen.metrics, listen.readiness, listen.admin],
        };
        self.channel.send(&offer, &node, STEP_LIMIT).await?;
        for some in lent.chunks(WORKLOADS_PER_MESSAGE) {
            let workloads = some.iter().map(|(_, enrolled, _)| self.offered(enrolled));
            let message = FromPredecessor::Workloads {
                workloads: workloads.collect(),
            };
            let listeners: Vec<BorrowedFd<'_>> = some
                .iter()
                .flat_map(|(_, _, listeners)| {
                    [
                        listeners.outbound.as_fd(),
                        listeners.plaintext.as_fd(),
                        listeners.tunnel.as_fd(),
                    ]
                })
                .collect();
            self.channel.send(&message, &listeners, STEP_LIMIT).await?;
        }
        for some in self.open_tunnels().await?.chunks(TUNNELS_PER_MESSAGE) {
            let message = FromPredecessor::Tunnels {
                tunnels: some.to_vec(),
            };
            self.channel.send(&message, &[], STEP_LIMIT).await?;
        }
        self.channel
            .send(&FromPredecessor::Complete, &[], STEP_LIMIT)
            .await?;
        Ok(lent)
    }

    async fn lend(&self) -> Result<Vec<Lent>, HandoverError> {
        let failed = |error| HandoverError::Io(io::Error::other(error));
        let enrolled: HashMap<Key, Enrolled> = self
            .agent
            .capture
            .enrolled()
            .into_iter()
            .map(|one| {
                let enrolment = &one.record.enrolment;
                ((enrolment.namespace.clone(), enrolment.name.clone()), one)
            })
            .collect();
        let ids: Vec<(Key, u64)> = {
            let serving = self.agent.serving();
            let ids = serving.iter();
            ids.map(|(key, handle)| (key.clone(), handle.id()))
                .collect()
        };
        let listeners = self
            .agent
            .workers
            .lend(ids.iter().map(|(_, id)| *id))
            .await
            .map_err(failed)?;
        let lent = ids
            .into_iter()
            .zip(listeners)
            .filter_map(|((key, _), listeners)| {
                let one = enrolled.get(&key)?.clone();
                Some((key, one, listeners))
            });
        Ok(lent.collect())
    }

    fn offered(&self, enrolled: &Enrolled) -> OfferedWorkload {
        let workload = enrolled.local.workload.load();
        let certificates = &self.agent.certificates;
        let certificate = workload
            .as_ref()
            .and_then(|workload| certificates.current(&workload.identity));
        OfferedWorkload {
            namespace: enrolled.local.namespace.to_string(),
            name: enrolled.local.name.to_string(),
            cookie: enrolled.local.cookie().0,
            certified: certificate.is_some(),
        }
    }

    async fn open_tunnels(&self) -> Result<Vec<OpenTunnel>, HandoverError> {
        let held = self.agent.workers.tunnels().await;
        let held = held.map_err(|error| HandoverError::Io(io::Error::other(error)))?;
        let told = held
            .into_iter()
            .filter(|(_, key)| key.expected.len() <= TUNNEL_IDENTITIES_MAX)
            .take(TUNNELS_MAX)
            .map(|(worker, key)| OpenTunnel {
                worker,
                cookie: key.netns.0,
                source: key.source,
                expected: key.expected.to_vec(),
                destination: key.destination,
                source_address: key.source_address,
            });
        Ok(told.collect())
    }
}

impl From<&crate::config::AgentConfig> for Place {
    fn from(config: &crate::config::AgentConfig) -> Self {
        Self {
            node: config.node.name.clone(),
            cgroup_root: config.kernel.cgroup_root.display().to_string(),
            bpffs_root: config.kernel.bpffs_root.display().to_string(),
        }
    }
}
