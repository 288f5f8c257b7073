//! Following the mesh: every change reaches the kernel, the local workloads and the certificates.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use mesh_api::identity::Identity;
use tokio::time::timeout;

use super::{AgentError, agent::Agent, enrolment::Key};
use crate::{
    capture::{CaptureError, Enrolled},
    discovery::model::CaptureSettings,
    proxy::ServeHandle,
};

/// How often the kernel is asked whether capture is whole. A lost piece means uncaptured connections, so well within
/// the ten seconds that are promised; asking costs a few system calls per workload.
const REPAIR_INTERVAL: Duration = Duration::from_secs(5);
/// When same-node flows are looked at again after a change: a `connect(2)` that had read its verdict just before the
/// change is recorded just after the first look.
const SECOND_LOOK: Duration = Duration::from_millis(500);

impl Agent {
    /// Compares the kernel with what should be there, and puts back what is missing, for ever.
    pub(super) async fn keep_captured(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(REPAIR_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.is_active() {
                continue;
            }
            let listening = self.capture.listening();
            for one in self.capture.enrolled() {
                let listens = listening.contains(&one.local.cookie());
                self.keep_one_captured(&one, listens).await;
            }
        }
    }

    async fn keep_one_captured(&self, one: &Enrolled, listens: bool) {
        let _one_at_a_time = self.enrolling.lock().await;
        // Another agent may have taken over meanwhile, and it is its programs that belong there.
        if !self.is_active() {
            return;
        }
        let (namespace, name) = (&one.local.namespace, &one.local.name);
        let still = self.capture.find(namespace, name);
        if still.is_none_or(|still| still.local.cookie() != one.local.cookie()) {
            return;
        }
        let workload = format!("{namespace}/{name}");
        let known = one.local.workload.load_full();
        let settings = known.map(|workload| workload.capture);
        let repaired = self.repair(one, settings, listens).await;
        self.telemetry
            .capture
            .set_state(&workload, repaired.is_ok());
        match repaired {
            Ok(false) => {}
            Ok(true) => {
                self.telemetry.capture.repairs.inc();
                tracing::error!(%workload, "capture had been taken apart; put back");
            }
            Err(error) => {
                tracing::error!(%workload, %error, "capture is not whole and cannot be put back");
            }
        }
    }

    /// Returns whether anything had to be put back.
    async fn repair(
        &self,
        one: &Enrolled,
        settings: Option<CaptureSettings>,
        listens: bool,
    ) -> Result<bool, AgentError> {
        let repaired = self.capture.repair(one, settings).await?;
        let enrolment = &one.record.enrolment;
        let key = (enrolment.namespace.clone(), enrolment.name.clone());
        let has_lost_one = {
            let serving = self.serving();
            serving
                .get(&key)
                .is_some_and(ServeHandle::has_lost_listener)
        };
        // Asked before the lock was taken, it may have been enrolled only then.
        let listens = listens || self.capture.listening().contains(&one.local.cookie());
        if listens && !has_lost_one {
            return Ok(repaired);
        }
        self.put_back_listeners(one, key).await?;
        Ok(true)
    }

    async fn put_back_listeners(&self, one: &Enrolled, key: Key) -> Result<(), AgentError> {
        let id = self.serving().get(&key).map(ServeHandle::id);
        let mut lent = self.workers.lend(id).await?;
        let listeners = lent
            .pop()
            .ok_or_else(|| CaptureError::NoListener(format!("workload {}/{}", key.0, key.1)))?;
        if let Some(listeners) = self.capture.put_back_listeners(one, listeners)? {
            let handle = self.workers.serve(one.local.clone(), listeners)?;
            // The one before accepts no more; what it has goes on.
            self.serving().insert(key, handle);
        }
        Ok(())
    }

    /// Applies the mesh as it is, then every change, until the mesh ends.
    pub(super) async fn follow_mesh(self: Arc<Self>) {
        let mut generations = self.mesh.generation();
        loop {
            generations.borrow_and_update();
            self.mesh_changed();
            let mut next = timeout(SECOND_LOOK, generations.changed()).await;
            if next.is_err() {
                self.end_forbidden_flows();
                next = Ok(generations.changed().await);
            }
            if !matches!(next, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Brings everything in line with the mesh. The kernel's verdicts of older generations are void from here on. While
    /// another agent captures, the kernel is left alone.
    pub(super) fn mesh_changed(&self) {
        let generation = *self.mesh.generation().borrow();
        let enrolled = self.capture.enrolled();
        let mut identities = BTreeSet::new();
        let dead = {
            let state = self.mesh.read();
            for one in &enrolled {
                let local = &one.local;
                let known =
                    state.local_workload(&self.config.node.name, &local.namespace, &local.name);
                identities.extend(known.as_ref().map(|workload| workload.identity.clone()));
                local.workload.store(known);
            }
            state.dead_destinations()
        };
        if self.is_active() {
            self.bring_kernel_in_line(&enrolled, generation, &dead);
        }
        self.telemetry
            .agent
            .workloads
            .set(i64::try_from(enrolled.len()).unwrap_or(i64::MAX));
        let identities: Vec<Identity> = identities.into_iter().collect();
        self.certificates.retain(&identities);
        self.end_forbidden_flows();
    }

    fn bring_kernel_in_line(&self, enrolled: &[Enrolled], generation: u64, dead: &[SocketAddr]) {
        let listening = self.capture.listening();
        for one in enrolled {
            let settings = one
                .local
                .workload
                .load()
                .as_ref()
                .map(|workload| workload.capture);
            // A workload that discovery forgot keeps the settings it had: forgetting must not open anything.
            let Some(settings) = settings else { continue };
            let workload = format!("{}/{}", one.local.namespace, one.local.name);
            let applied = self.capture.apply_settings(one, settings);
            let is_whole = applied.is_ok() && self.capture.is_captured(one, &listening);
            self.telemetry.capture.set_state(&workload, is_whole);
            if let Err(error) = applied {
                tracing::error!(%workload, %error, "cannot apply capture settings");
            }
        }
        if let Err(error) = self.capture.mesh_changed(generation, dead) {
            tracing::error!(%error, "cannot void the kernel's verdicts; they end by their time");
        }
    }

    /// Settings of a local workload as discovery has them, or the defaults (fail closed).
    pub(super) fn settings(&self, namespace: &str, name: &str) -> CaptureSettings {
        let known = self
            .mesh
            .read()
            .local_workload(&self.config.node.name, namespace, name);
        known.map_or_else(CaptureSettings::default, |workload| workload.capture)
    }
}
