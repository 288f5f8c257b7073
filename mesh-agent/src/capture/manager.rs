//! Enrolling and un-enrolling: the order of steps, and undoing them.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_api::local::Enrolment;
use mesh_ebpf::{FLAG_FAIL_CLOSED, FLAG_SAME_NODE};
use serde::{Deserialize, Serialize};

use super::{
    Keepalive, Listeners, LocalWorkload, Verdicts, dial,
    error::CaptureError,
    kernel::{Kernel, cgroup_id},
    steering,
    steering::FormerSysctls,
};
use crate::{
    discovery::model::{CaptureSettings, FailureMode, SameNode},
    sys::{
        self,
        netns::{Netns, NetnsCookie},
    },
};

/// What must outlive the agent to undo an enrolment; kept in the run directory by `lifecycle`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for.
    pub enrolment: Enrolment,
    /// Cookie of the namespace at that time: the path may name another one later.
    pub cookie: u64,
    /// Addresses that were captured.
    pub addresses: Vec<IpAddr>,
    /// The namespace's sysctls before.
    pub former_sysctls: FormerSysctls,
}

/// A workload whose traffic is captured.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// For the proxy.
    pub local: Arc<LocalWorkload>,
    /// For undoing it.
    pub record: Record,
}

impl Enrolled {
    fn new(netns: Netns, record: Record, keepalive: Keepalive) -> Self {
        let local = LocalWorkload {
            namespace: record.enrolment.namespace.as_str().into(),
            name: record.enrolment.name.as_str().into(),
            netns: Arc::new(netns),
            addresses: record.addresses.clone(),
            keepalive,
            workload: arc_swap::ArcSwapOption::empty(),
            holds: Arc::default(),
        };
        Self {
            local: Arc::new(local),
            record,
        }
    }
}

/// The kernel side of the node and the workloads enrolled on it.
#[derive(Debug)]
pub struct Capture {
    kernel: Arc<Kernel>,
    generation_base: u64,
    keepalive: Keepalive,
    enrolled: Mutex<HashMap<(String, String), Enrolled>>,
}

impl Capture {
    /// Manages workloads on a kernel side that was started. Verdicts of earlier agents are void from here on.
    ///
    /// # Errors
    /// When the kernel refuses the generation.
    pub fn new(kernel: Kernel) -> Result<Self, CaptureError> {
        let capture = Self::beside(kernel);
        capture.kernel.set_generation(capture.generation_base)?;
        Ok(capture)
    }

    /// The same on a kernel side that another agent still uses, whose verdicts hold until [`Capture::mesh_changed`].
    #[must_use]
    pub fn beside(kernel: Kernel) -> Self {
        Self {
            kernel: Arc::new(kernel),
            // Greater than any sum that an earlier agent of this boot can have used.
            generation_base: sys::monotonic_ns(),
            keepalive: Keepalive::default(),
            enrolled: Mutex::default(),
        }
    }

    /// How sockets of workloads find out that their peer has gone; the default's way otherwise.
    #[must_use]
    pub fn with_keepalive(mut self, keepalive: Keepalive) -> Self {
        self.keepalive = keepalive;
        self
    }

    /// The programs, for the kernel logger. Only before the kernel side is shared.
    pub fn programs_mut(&mut self) -> Option<&mut aya::Ebpf> {
        Arc::get_mut(&mut self.kernel).map(Kernel::programs_mut)
    }

    /// The kernel side, for counters.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    /// The verdict cache.
    #[must_use]
    pub fn verdicts(&self) -> Verdicts {
        Verdicts::new(self.kernel.clone(), self.generation_base)
    }

    /// All enrolled workloads.
    #[must_use]
    pub fn enrolled(&self) -> Vec<Enrolled> {
        let mut all: Vec<Enrolled> = self.lock().values().cloned().collect();
        all.sort_by(|a, b| {
            (&a.local.namespace, &a.local.name).cmp(&(&b.local.namespace, &b.local.name))
        });
        all
    }

    /// The workload of that name.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<Enrolled> {
        self.lock()
            .get(&(namespace.to_owned(), name.to_owned()))
            .cloned()
    }

    /// Who owns a namespace.
    #[must_use]
    pub fn by_cookie(&self, cookie: NetnsCookie) -> Option<Enrolled> {
        self.lock()
            .values()
            .find(|e| e.local.cookie() == cookie)
            .cloned()
    }

    /// Captures a workload. `former` is its record of an earlier agent, if there is one. The steps are ordered so that
    /// at no moment a connection is captured that nobody accepts: listeners, addresses, inbound, outbound.
    ///
    /// # Errors
    /// Says what failed; everything done until then is undone. What an earlier agent had captured stays captured
    /// instead, without listeners: the kernel then refuses the workload's connections, or lets them pass by its
    /// failure mode.
    pub async fn enrol(
        &self,
        enrolment: &Enrolment,
        settings: CaptureSettings,
        former: Option<&Record>,
    ) -> Result<(Enrolled, Listeners), CaptureError> {
        let path = PathBuf::from(&enrolment.netns);
        let netns = Netns::open(&path).map_err(|source| CaptureError::Netns {
            path: path.clone(),
            source,
        })?;
        let addresses = self.check(enrolment, &netns)?;
        let former = former.filter(|record| record.cookie == netns.cookie().0);
        let listeners = dial::listen(&netns, self.keepalive)?;
        let sysctls = steering::install(&netns, &addresses).await;
        let record = Record {
            enrolment: enrolment.clone(),
            cookie: netns.cookie().0,
            addresses: addresses.clone(),
            former_sysctls: match (former, &sysctls) {
                (Some(record), Ok(values)) => record.former_sysctls.or(values),
                (Some(record), Err(_)) => record.former_sysctls.clone(),
                (None, Ok(values)) => values.clone(),
                (None, Err(_)) => FormerSysctls::kernel_defaults(),
            },
        };
        let enrolled = Enrolled::new(netns, record, self.keepalive);
        if let Err(error) = sysctls
            .map(|_| ())
            .and_then(|()| self.capture(&enrolled, &listeners, settings))
        {
            if former.is_none() {
                self.undo(&enrolled).await;
            }
            return Err(error);
        }
        self.remember(&enrolled);
        Ok((enrolled, listeners))
    }

    /// Knows a workload that an agent which still runs has captured. The kernel is not touched.
    ///
    /// # Errors
    /// When its namespace is no longer at its path.
    pub fn inherit(&self, record: &Record) -> Result<Enrolled, CaptureError> {
        let path = PathBuf::from(&record.enrolment.netns);
        let failed = |source| CaptureError::Netns {
            path: path.clone(),
            source,
        };
        let netns = Netns::open(&path).map_err(failed)?;
        if netns.cookie().0 != record.cookie {
            return Err(failed(std::io::ErrorKind::NotFound.into()));
        }
        let enrolled = Enrolled::new(netns, record.clone(), self.keepalive);
        self.remember(&enrolled);
        Ok(enrolled)
    }

    /// Puts our programs and entries in the place of the other agent's, for workloads that were [inherited], then for
    /// the node. Without settings, those that the kernel has stay.
    ///
    /// [inherited]: Capture::inherit
    ///
    /// # Errors
    /// Says what failed; [`Capture::put_back`] of the other agent undoes what was done.
    pub fn put_in_place<'a>(
        &self,
        workloads: impl IntoIterator<Item = (&'a Enrolled, &'a Listeners, Option<CaptureSettings>)>,
    ) -> Result<(), CaptureError> {
        for (enrolled, listeners, settings) in workloads {
            if let Err(error) = dial::adopt(listeners, self.keepalive) {
                let workload = &enrolled.local.name;
                tracing::warn!(%error, %workload, "listeners keep the other agent's keepalive");
            }
            let present = self.kernel.workload(enrolled.local.cookie());
            let value = match (settings, present) {
                (None, Some(present)) => present,
                (settings, _) => kernel_workload(enrolled, settings.unwrap_or_default()),
            };
            self.place(enrolled, listeners, value)?;
        }
        self.kernel.attach_node().map(drop)
    }

    /// Puts our programs back into every link, after another agent had begun to take over.
    ///
    /// # Errors
    /// Says which program; the other agent's stays there, which works on the same maps.
    pub fn put_back(&self) -> Result<(), CaptureError> {
        for enrolled in self.enrolled() {
            let cookie = enrolled.local.cookie();
            if let Some(cgroup) = &enrolled.record.enrolment.cgroup {
                self.kernel.attach_flow(cookie, Path::new(cgroup))?;
            }
            self.kernel.attach_lookup(&enrolled.local.netns)?;
        }
        self.kernel.attach_node()?;
        self.kernel.remove_other_versions();
        Ok(())
    }

    /// What an agent of another ABI had captured and this one could not take over stays refused.
    ///
    /// # Errors
    /// When the kernel refuses the entry.
    pub fn keep_refused(&self, record: &Record) -> Result<(), CaptureError> {
        if self.kernel.workload(NetnsCookie(record.cookie)).is_some() {
            return Ok(());
        }
        let value = mesh_ebpf::Workload {
            cookie: record.cookie,
            flags: FLAG_FAIL_CLOSED,
            padding: 0,
            cgroup: 0,
        };
        self.kernel.set_addresses(value, &record.addresses)?;
        self.kernel.set_workload(value)
    }

    fn remember(&self, enrolled: &Enrolled) {
        let enrolment = &enrolled.record.enrolment;
        self.lock().insert(
            (enrolment.namespace.clone(), enrolment.name.clone()),
            enrolled.clone(),
        );
    }

    /// Stops capturing a workload: connections begun after this go their own way. Those that the agent carries still
    /// need the rule and the routes, which [`Capture::clean`] removes once they have ended.
    ///
    /// # Errors
    /// [`CaptureError::NotEnrolled`].
    pub fn release(&self, namespace: &str, name: &str) -> Result<Enrolled, CaptureError> {
        let enrolled = self
            .lock()
            .remove(&(namespace.to_owned(), name.to_owned()))
            .ok_or_else(|| CaptureError::NotEnrolled(format!("workload {namespace}/{name}")))?;
        self.kernel.let_go(enrolled.local.cookie());
        Ok(enrolled)
    }

    /// No longer manages a workload whose listeners are gone, and leaves the kernel side as it is: its connections are
    /// refused from now on, or pass by its failure mode.
    pub fn close(&self, namespace: &str, name: &str) {
        self.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// Removes what is left of a released workload in its namespace.
    ///
    /// # Errors
    /// Says what stays behind. A namespace that is gone has nothing left.
    pub async fn clean(&self, released: &Enrolled) -> Result<(), CaptureError> {
        let Record {
            addresses,
            former_sysctls,
            ..
        } = &released.record;
        steering::remove(&released.local.netns, addresses, former_sysctls).await
    }

    /// Brings the kernel's entries of a workload in line with its settings. Returns whether anything was different.
    ///
    /// # Errors
    /// When the kernel refuses the entry.
    pub fn apply_settings(
        &self,
        enrolled: &Enrolled,
        settings: CaptureSettings,
    ) -> Result<bool, CaptureError> {
        self.apply(enrolled, kernel_workload(enrolled, settings))
    }

    fn apply(&self, enrolled: &Enrolled, value: mesh_ebpf::Workload) -> Result<bool, CaptureError> {
        let addresses = &enrolled.local.addresses;
        if self.kernel.workload(enrolled.local.cookie()) == Some(value)
            && self.kernel.has_addresses(value, addresses)
        {
            return Ok(false);
        }
        self.kernel.set_addresses(value, addresses)?;
        self.kernel.set_workload(value)?;
        Ok(true)
    }

    /// Looks whether what captures for the whole node is there, and puts back what is not. Returns whether something was
    /// missing.
    ///
    /// # Errors
    /// When it cannot be put back.
    pub fn repair_node(&self) -> Result<bool, CaptureError> {
        self.kernel.attach_node()
    }

    /// Looks whether everything else in the kernel that captures a workload is there, and puts back what is not. Returns
    /// whether something was missing. Without settings, those that the kernel has stay.
    ///
    /// # Errors
    /// When it cannot be put back.
    pub fn repair(
        &self,
        enrolled: &Enrolled,
        settings: Option<CaptureSettings>,
    ) -> Result<bool, CaptureError> {
        let mut repaired = self.kernel.attach_lookup(&enrolled.local.netns)?;
        let cgroup = enrolled.record.enrolment.cgroup.as_deref().map(Path::new);
        // One that has gone has no processes left.
        if let Some(cgroup) = cgroup.filter(|path| path.is_dir()) {
            let cookie = enrolled.local.cookie();
            repaired |= self.kernel.attach_flow(cookie, cgroup)?;
        }
        repaired |= match (settings, self.kernel.workload(enrolled.local.cookie())) {
            (Some(settings), _) => self.apply_settings(enrolled, settings)?,
            (None, Some(value)) => self.apply(enrolled, value)?,
            (None, None) => self.apply_settings(enrolled, CaptureSettings::default())?,
        };
        // A namespace that lost its name is a deleted pod's: it has no interface for the routes any more.
        let local = &enrolled.local;
        if local.netns.is_at_its_path() {
            repaired |= steering::mend(&local.netns, &local.addresses)?;
        }
        Ok(repaired)
    }

    /// Namespaces whose listeners the programs find.
    #[must_use]
    pub fn listening(&self) -> HashSet<NetnsCookie> {
        self.kernel.listening()
    }

    /// Puts the listeners of a workload back where the programs find them. Those that listen no more, because somebody
    /// ended their sockets, are opened anew. Returns what is to be served, if anything is new.
    ///
    /// # Errors
    /// When a port is taken, or the kernel refuses an entry.
    pub fn put_back_listeners(
        &self,
        enrolled: &Enrolled,
        listeners: Listeners,
    ) -> Result<Option<Listeners>, CaptureError> {
        let (listeners, is_new) = dial::revive(&enrolled.local.netns, listeners, self.keepalive)?;
        self.kernel
            .set_listeners(enrolled.local.cookie(), &listeners)?;
        Ok(is_new.then_some(listeners))
    }

    /// Tells the kernel that the mesh changed: older verdicts are void, and these service addresses are dead.
    ///
    /// # Errors
    /// When the kernel refuses the generation.
    pub fn mesh_changed(&self, generation: u64, dead: &[SocketAddr]) -> Result<(), CaptureError> {
        self.kernel
            .set_generation(self.generation_base + generation)?;
        self.kernel.set_dead(dead);
        Ok(())
    }

    /// Whether the kernel programs know the workload, its addresses and its listeners, and the inbound one is in its
    /// place.
    #[must_use]
    pub fn is_captured(&self, enrolled: &Enrolled, listening: &HashSet<NetnsCookie>) -> bool {
        let cookie = enrolled.local.cookie();
        self.kernel.workload(cookie).is_some_and(|workload| {
            self.kernel
                .has_addresses(workload, &enrolled.local.addresses)
        }) && listening.contains(&cookie)
            && self.kernel.has_lookup(&enrolled.local.netns)
    }

    /// Forgets namespaces that an earlier agent captured and nobody enrols any more. Those in `kept` stay as they are:
    /// they are on record and could not be taken over.
    pub fn forget_strangers(&self, kept: &[NetnsCookie]) {
        let enrolled: Vec<NetnsCookie> = self.lock().values().map(|e| e.local.cookie()).collect();
        for cookie in self.kernel.known_workloads() {
            if !enrolled.contains(&cookie) && !kept.contains(&cookie) {
                tracing::info!(
                    cookie = cookie.0,
                    "forgetting a namespace of an earlier agent"
                );
                self.kernel.let_go(cookie);
            }
        }
    }

    /// Undoes what an earlier agent did for a workload that this one could not take over.
    ///
    /// # Errors
    /// Says what stays behind. A namespace that is gone has nothing left.
    pub async fn abandon(&self, record: &Record) -> Result<(), CaptureError> {
        self.kernel.let_go(NetnsCookie(record.cookie));
        undo_record(record).await
    }

    fn check(&self, enrolment: &Enrolment, netns: &Netns) -> Result<Vec<IpAddr>, CaptureError> {
        let own =
            Netns::open(Path::new("/proc/self/ns/net")).map_err(|source| CaptureError::Netns {
                path: "/proc/self/ns/net".into(),
                source,
            })?;
        if own.cookie() == netns.cookie() {
            return Err(CaptureError::OwnNamespace(netns.path().to_owned()));
        }
        let addresses = steering::addresses(netns)?;
        if addresses.is_empty() {
            return Err(CaptureError::NoAddress(netns.path().to_owned()));
        }
        let all = self.lock();
        if all.contains_key(&(enrolment.namespace.clone(), enrolment.name.clone())) {
            return Err(CaptureError::AlreadyEnrolled(format!(
                "workload {}/{}",
                enrolment.namespace, enrolment.name
            )));
        }
        for other in all.values() {
            if other.local.cookie() == netns.cookie() {
                let name = format!(
                    "{} (as {}/{})",
                    netns.path().display(),
                    other.local.namespace,
                    other.local.name
                );
                return Err(CaptureError::AlreadyEnrolled(name));
            }
            if let Some(address) = addresses.iter().find(|a| other.local.owns(**a)) {
                return Err(CaptureError::AddressTaken {
                    address: *address,
                    path: netns.path().to_owned(),
                });
            }
        }
        if all.len() >= mesh_ebpf::WORKLOADS_MAX as usize {
            return Err(CaptureError::Limit {
                name: "workloads per node",
                limit: mesh_ebpf::WORKLOADS_MAX,
            });
        }
        Ok(addresses)
    }

    fn capture(
        &self,
        enrolled: &Enrolled,
        listeners: &Listeners,
        settings: CaptureSettings,
    ) -> Result<(), CaptureError> {
        self.place(enrolled, listeners, kernel_workload(enrolled, settings))
    }

    fn place(
        &self,
        enrolled: &Enrolled,
        listeners: &Listeners,
        value: mesh_ebpf::Workload,
    ) -> Result<(), CaptureError> {
        let cookie = enrolled.local.cookie();
        self.kernel.set_listeners(cookie, listeners)?;
        self.kernel
            .set_addresses(value, &enrolled.local.addresses)?;
        if let Some(cgroup) = &enrolled.record.enrolment.cgroup {
            self.kernel.attach_flow(cookie, Path::new(cgroup))?;
        }
        self.kernel.attach_lookup(&enrolled.local.netns)?;
        self.kernel.set_workload(value)
    }

    async fn undo(&self, enrolled: &Enrolled) {
        self.kernel.let_go(enrolled.local.cookie());
        if let Err(error) = self.clean(enrolled).await {
            let workload = &enrolled.record.enrolment.name;
            tracing::warn!(%workload, %error, "something of the failed enrolment stays behind");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Enrolled>> {
        self.enrolled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Undoes, without an agent, what a record tells of. The namespace may be gone or may be another one by now.
///
/// # Errors
/// When the rule or the routes cannot be removed.
pub async fn undo_record(record: &Record) -> Result<(), CaptureError> {
    let Ok(netns) = Netns::open(Path::new(&record.enrolment.netns)) else {
        return Ok(());
    };
    if netns.cookie().0 != record.cookie {
        return Ok(());
    }
    steering::remove(&netns, &record.addresses, &record.former_sysctls).await
}

fn kernel_workload(enrolled: &Enrolled, settings: CaptureSettings) -> mesh_ebpf::Workload {
    let cgroup = &enrolled.record.enrolment.cgroup;
    // A cgroup that has gone has no processes left, so nothing of it goes the same-node way.
    let cgroup = cgroup
        .as_ref()
        .and_then(|path| cgroup_id(Path::new(path)).ok());
    let cgroup = cgroup.unwrap_or_default();
    let mut flags = 0;
    if settings.failure_mode == FailureMode::Closed {
        flags |= FLAG_FAIL_CLOSED;
    }
    if settings.same_node == SameNode::Kernel && cgroup != 0 {
        flags |= FLAG_SAME_NODE;
    }
    mesh_ebpf::Workload {
        cookie: enrolled.local.cookie().0,
        flags,
        padding: 0,
        cgroup,
    }
}
