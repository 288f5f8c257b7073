//! Enrolling and un-enrolling on request, and taking over what an earlier agent had enrolled.

use std::{collections::HashMap, sync::PoisonError, time::Duration};

use mesh_api::local::Enrolment;

use super::{AgentError, agent::Agent};
use crate::{
    capture::{CaptureError, Enrolled, Record},
    config::validate_enrolment,
    discovery::model::CaptureSettings,
    sys::netns::NetnsCookie,
};

/// Connections of an un-enrolled workload get this long to end by themselves: they depend on routes that go then.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

/// Key of a workload: namespace and name.
pub(super) type Key = (String, String);

impl Agent {
    /// Captures a workload from now on, and remembers it across restarts.
    ///
    /// # Errors
    /// Says which field, step or limit; nothing is left behind then.
    pub(super) async fn enrol(&self, enrolment: &Enrolment) -> Result<Enrolled, String> {
        validate_enrolment(enrolment)?;
        let _one_at_a_time = self.enrolling.lock().await;
        self.require_active()?;
        let enrolled = self
            .capture_and_serve(enrolment, None)
            .await
            .map_err(|error| error.to_string())?;
        if let Err(error) = self.save_records() {
            // Not remembered would mean: silently uncaptured after a restart. Then rather not enrolled.
            self.release(&enrolment.namespace, &enrolment.name)
                .await
                .map_err(|error| error.to_string())?;
            return Err(error.to_string());
        }
        self.mesh_changed();
        Ok(enrolled)
    }

    /// Stops capturing a workload and removes every trace of it.
    ///
    /// # Errors
    /// When it is not enrolled, or something cannot be removed.
    pub(super) async fn unenrol(&self, namespace: &str, name: &str) -> Result<(), String> {
        let _one_at_a_time = self.enrolling.lock().await;
        self.require_active()?;
        let undone = match self.take_missing(&(namespace.to_owned(), name.to_owned())) {
            None => self.release(namespace, name).await,
            Some(Missing { record: None, .. }) => Ok(()),
            Some(Missing {
                record: Some(record),
                ..
            }) => self.capture.abandon(&record).await,
        };
        undone.map_err(|error| error.to_string())?;
        self.save_records().map_err(|error| error.to_string())?;
        self.mesh_changed();
        Ok(())
    }

    fn require_active(&self) -> Result<(), String> {
        if self.is_active() {
            return Ok(());
        }
        Err("another agent has just taken over from this one; ask again".to_owned())
    }

    /// Takes over recorded and configured workloads. One that fails (its namespace is gone) is reported and does not
    /// keep the others.
    pub(super) async fn adopt(&self, records: Vec<Record>, configured: &[Enrolment]) {
        let _one_at_a_time = self.enrolling.lock().await;
        let mut wanted: Vec<(Enrolment, Option<Record>)> = records
            .into_iter()
            .map(|record| (record.enrolment.clone(), Some(record)))
            .collect();
        for enrolment in configured {
            let known = wanted.iter().any(|(other, _)| {
                (&other.namespace, &other.name) == (&enrolment.namespace, &enrolment.name)
            });
            if !known {
                wanted.push((enrolment.clone(), None));
            }
        }
        for (enrolment, record) in wanted {
            if self
                .capture
                .find(&enrolment.namespace, &enrolment.name)
                .is_some()
            {
                continue;
            }
            match self.capture_and_serve(&enrolment, record.as_ref()).await {
                Ok(_) => {}
                Err(error) => self.report_missing(enrolment, record, &error),
            }
        }
        self.replace_another_abi();
        let on_record: Vec<NetnsCookie> = self
            .missing()
            .values()
            .filter_map(|missing| missing.record.as_ref())
            .map(|record| NetnsCookie(record.cookie))
            .collect();
        // Enrolments that are no longer known may be among the strangers: they must not become open.
        if !self.records.are_damaged() {
            self.capture.forget_strangers(&on_record);
        }
        if let Err(error) = self.save_records() {
            tracing::error!(%error, "enrolments are not recorded; a restarted agent will not know them");
        }
        self.mesh_changed();
    }

    /// Ends what an agent of another ABI has in the kernel, now that everything that is known is captured anew.
    fn replace_another_abi(&self) {
        if !self.capture.kernel().follows_another_abi() {
            return;
        }
        for record in self
            .missing()
            .values()
            .filter_map(|one| one.record.as_ref())
        {
            if let Err(error) = self.capture.keep_refused(record) {
                let workload = &record.enrolment.name;
                tracing::error!(%workload, %error, "its connections are no longer refused");
            }
        }
        // Not removed: the other version's programs go on refusing what they had captured.
        match self.capture.kernel().attach_node() {
            Ok(_) => self.capture.kernel().remove_other_versions(),
            Err(error) => tracing::error!(%error, "the programs of another version stay"),
        }
    }

    async fn capture_and_serve(
        &self,
        enrolment: &Enrolment,
        former: Option<&Record>,
    ) -> Result<Enrolled, AgentError> {
        let known = self.mesh.read().local_workload(
            &self.config.node.name,
            &enrolment.namespace,
            &enrolment.name,
        );
        let settings = known
            .as_ref()
            .map_or_else(CaptureSettings::default, |workload| workload.capture);
        let (enrolled, listeners) = self.capture.enrol(enrolment, settings, former).await?;
        enrolled.local.workload.store(known);
        let key = (enrolment.namespace.clone(), enrolment.name.clone());
        match self.workers.serve(enrolled.local.clone(), listeners) {
            Ok(handle) => {
                self.serving().insert(key, handle);
                tracing::info!(
                    workload = %format_args!("{}/{}", enrolment.namespace, enrolment.name),
                    netns = %enrolment.netns,
                    addresses = ?enrolled.local.addresses,
                    "enrolled"
                );
                Ok(enrolled)
            }
            // What an earlier agent had captured must not become open because of it.
            Err(error) if former.is_some() => {
                self.capture.close(&enrolment.namespace, &enrolment.name);
                Err(error.into())
            }
            Err(error) => {
                let released = self
                    .capture
                    .release(&enrolment.namespace, &enrolment.name)?;
                self.capture.clean(&released).await?;
                Err(error.into())
            }
        }
    }

    async fn release(&self, namespace: &str, name: &str) -> Result<(), CaptureError> {
        let released = self.capture.release(namespace, name)?;
        let key = (namespace.to_owned(), name.to_owned());
        let handle = self.serving().remove(&key);
        if let Some(handle) = handle {
            let cut = handle.drain(RELEASE_DEADLINE).await;
            tracing::info!(workload = %format_args!("{namespace}/{name}"), cut, "un-enrolled");
        }
        self.telemetry
            .forget_workload(&format!("{namespace}/{name}"));
        self.capture.clean(&released).await
    }

    /// A recorded workload that cannot be captured stays on record and in the status, until it is un-enrolled.
    fn report_missing(&self, enrolment: Enrolment, record: Option<Record>, error: &AgentError) {
        let workload = format!("{}/{}", enrolment.namespace, enrolment.name);
        tracing::error!(%workload, %error, "cannot capture; its connections are refused or pass by, as its kernel entries say");
        self.telemetry.capture.set_state(&workload, false);
        let key = (enrolment.namespace.clone(), enrolment.name.clone());
        let has_vanished = record.is_some()
            && matches!(
                error,
                AgentError::Capture(CaptureError::Netns { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound
            );
        self.missing().insert(
            key,
            Missing {
                enrolment,
                record,
                reason: error.to_string(),
                has_vanished,
            },
        );
    }

    fn take_missing(&self, key: &Key) -> Option<Missing> {
        let missing = self.missing().remove(key)?;
        self.telemetry
            .forget_workload(&format!("{}/{}", key.0, key.1));
        Some(missing)
    }

    /// Workloads that should be captured and are not.
    pub(super) fn missing(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Missing>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save_records(&self) -> Result<(), AgentError> {
        let mut records: Vec<Record> = self
            .capture
            .enrolled()
            .into_iter()
            .map(|enrolled| enrolled.record)
            .collect();
        records.extend(
            self.missing()
                .values()
                .filter_map(|missing| missing.record.clone()),
        );
        Ok(self.records.save(records)?)
    }
}

/// A workload that should be captured and is not.
#[derive(Debug, Clone)]
pub(super) struct Missing {
    /// What was asked for.
    pub enrolment: Enrolment,
    /// What an earlier agent recorded.
    pub record: Option<Record>,
    /// Why it is not captured.
    pub reason: String,
    /// Its namespace went while no agent ran, as when a pod is deleted: nothing that readiness should wait for.
    pub has_vanished: bool,
}
