//! The running agent: start in an order that can be undone, or take over from one that runs; run until a signal or until
//! another agent has taken over; drain.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya_log::EbpfLogger;
use mesh_api::{handover::NodeDescriptor, local::DrainingAgent};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{oneshot, watch},
};
use tokio_util::sync::CancellationToken;

use super::{
    AgentError, credentials,
    enrolment::{Key, Missing},
    handover::{
        Attempts, Descriptors, Door, Notice, Offer, Predecessor, hand_over_to_successors,
        report_failure,
    },
    harden::Confined,
    kernel_metrics,
    records::Records,
    requests::AdminView,
    run_dir::RunDir,
    standalone::{self, Upstream},
    uninstall::{kernel_config, remove_kernel_side},
};
use crate::{
    admin::{AdminAddresses, AdminServers, LocalServer},
    capture::{
        Capture, Record,
        kernel::{Found, Kernel},
    },
    config::AgentConfig,
    discovery::{DiscoveryClient, DiscoveryConfig, DiscoveryStatus, Mesh},
    identity::{Certificates, IdentityConfig, tls},
    proxy::{Limits, ProxyContext, ServeHandle, Workers},
    sys,
    telemetry::{Telemetry, logging::LogControl},
};

/// The agent. Workers, discovery, certificates and admin run beside it and are reached through its handles.
#[derive(Debug)]
pub(super) struct Agent {
    pub config: AgentConfig,
    pub capture: Capture,
    pub mesh: Mesh,
    pub discovery: watch::Receiver<DiscoveryStatus>,
    pub certificates: Certificates,
    pub telemetry: Arc<Telemetry>,
    pub workers: Workers,
    pub records: Records,
    pub started: Instant,
    /// This agent captures: it alone changes kernel objects, enrolments and the snapshot. Not so before it has taken
    /// over from another one, and after another one has taken over.
    pub is_active: Arc<AtomicBool>,
    pub attempts: Attempts,
    pub enrolling: tokio::sync::Mutex<()>,
    pub serving: Mutex<HashMap<Key, ServeHandle>>,
    pub missing: Mutex<HashMap<Key, Missing>>,
}

impl Agent {
    /// Handles of the workloads that are served.
    pub(super) fn serving(&self) -> MutexGuard<'_, HashMap<Key, ServeHandle>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_active(&self) -> bool {
        self.is_active.load(Ordering::Acquire)
    }
}

/// Runs the agent until SIGTERM or SIGINT, or until another one has taken over and the connections have ended. With
/// `take_over` it takes over from the agent that runs with the same run directory, if one does.
///
/// # Errors
/// Why it cannot start; what it made until then is removed, what an earlier agent left is kept, and one that runs goes
/// on.
pub fn run(
    config: AgentConfig,
    logs: LogControl,
    confined: &Confined,
    take_over: bool,
) -> Result<(), AgentError> {
    confined.tell();
    let system = |what| move |source| AgentError::System { what, source };
    raise_descriptor_limit();
    tls::control_provider()
        .install_default()
        .map_err(|_| AgentError::CryptoProvider)?;
    let predecessor = match take_over {
        true => Predecessor::find(&config.node.run_dir)?,
        false => None,
    };
    let run_dir = match &predecessor {
        Some(_) => None,
        None => Some(RunDir::open(&config.node.run_dir)?),
    };
    // One thread: discovery, certificates and admin must never take a core from the workers.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("weft-admin")
        .enable_all()
        .build()
        .map_err(system("the admin runtime"))?;
    let result = match (predecessor, &run_dir) {
        (Some(predecessor), _) => runtime.block_on(take_over_and_run(config, predecessor, logs)),
        (None, Some(run_dir)) => runtime.block_on(start_and_run(config, run_dir, logs)),
        (None, None) => Ok(()),
    };
    // Whatever hangs in a blocking call (a resolver) must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let (Err(_), Some(run_dir)) = (&result, run_dir) {
        run_dir.undo();
    }
    result
}

/// Tells the agent that runs with `run_dir` why the one that should take over from it did not even start.
pub fn report_failed_start(run_dir: &Path, reason: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(report_failure(run_dir, reason.to_owned())),
        Err(error) => tracing::debug!(%error, "the running agent does not hear why"),
    }
}

async fn start_and_run(
    config: AgentConfig,
    run_dir: &RunDir,
    logs: LogControl,
) -> Result<(), AgentError> {
    let signals = Signals::new()?;
    // Ports first: a port in use must be known before anything is changed in the kernel.
    let admin = AdminServers::bind(admin_addresses(&config)).await?;
    let local = LocalServer::bind(run_dir.path())?;
    let door = Door::open(run_dir.path())?;
    let shutdown = CancellationToken::new();
    let upstream = standalone::upstream(&config, run_dir.path()).await?;
    credentials::check(&upstream)?;
    let (kernel, found) = Kernel::start(kernel_config(&config))?;
    let started = Capture::new(kernel)
        .map_err(AgentError::from)
        .and_then(|capture| {
            Agent::start(config.clone(), capture, &upstream, run_dir, &shutdown, true)
        });
    let agent = match started {
        Ok(agent) => agent,
        Err(error) => {
            if found == Found::Nothing {
                remove_kernel_side(&config);
            }
            return Err(error);
        }
    };
    let records = agent.records.load().unwrap_or_else(|error| {
        tracing::error!(%error, "earlier enrolments are not taken over");
        Vec::new()
    });
    let descriptors = descriptors(run_dir, &agent, &local, &admin)?;
    agent.adopt(records, &config.workloads).await;
    tokio::spawn(agent.clone().follow_mesh());
    tracing::info!(node = %config.node.name, ?found, "agent is running");
    let running = Running {
        agent,
        admin,
        local,
        door,
        descriptors,
        upstream,
        shutdown,
    };
    running.until_end(run_dir, logs, signals).await
}

/// Until the agent that runs has handed over, a failure leaves it as it was.
async fn take_over_and_run(
    config: AgentConfig,
    predecessor: Predecessor,
    logs: LogControl,
) -> Result<(), AgentError> {
    let signals = Signals::new()?;
    let mut offer = predecessor.ask(&config).await?;
    let taken = Box::pin(take_over(&config, &mut offer)).await;
    let (running, run_dir, rest) = match taken {
        Ok(taken) => taken,
        Err(error) => {
            offer.give_up(error.to_string()).await;
            return Err(error);
        }
    };
    drop(offer);
    running.agent.adopt(rest, &config.workloads).await;
    tracing::info!(node = %config.node.name, "agent is running, in the place of another one");
    running.until_end(&run_dir, logs, signals).await
}

async fn take_over(
    config: &AgentConfig,
    offer: &mut Offer,
) -> Result<(Running, RunDir, Vec<Record>), AgentError> {
    let run_dir = RunDir::inherited(
        &config.node.run_dir,
        offer.take(NodeDescriptor::RunLock)?.into(),
    );
    let listeners = [
        offer.take(NodeDescriptor::Metrics)?,
        offer.take(NodeDescriptor::Readiness)?,
        offer.take(NodeDescriptor::Admin)?,
    ];
    let admin = AdminServers::inherit(admin_addresses(config), offer.addresses, listeners).await?;
    let mut local =
        LocalServer::inherit(run_dir.path(), offer.take(NodeDescriptor::Local)?.into())?;
    let mut door = offer.take_door()?;
    let shutdown = CancellationToken::new();
    let upstream = standalone::upstream(config, run_dir.path()).await?;
    credentials::check(&upstream)?;
    let kernel = Kernel::beside(kernel_config(config), offer.take_cgroup_lock()?)?;
    let capture = Capture::beside(kernel);
    let agent = Agent::start(
        config.clone(),
        capture,
        &upstream,
        &run_dir,
        &shutdown,
        false,
    )?;
    let records = agent.records.load()?;
    let descriptors = descriptors(&run_dir, &agent, &local, &admin)?;
    let rest = Box::pin(offer.carry_out(&agent, records)).await?;
    // Only now are the files those of this agent.
    local.claim();
    door.claim(run_dir.path());
    let running = Running {
        agent,
        admin,
        local,
        door,
        descriptors,
        upstream,
        shutdown,
    };
    Ok((running, run_dir, rest))
}

fn admin_addresses(config: &AgentConfig) -> AdminAddresses {
    AdminAddresses {
        metrics: config.listen.metrics,
        readiness: config.listen.readiness,
        admin: config.listen.admin,
    }
}

/// What ends an agent from outside.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, AgentError> {
        let system = |what| move |source| AgentError::System { what, source };
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(system("the SIGTERM handler"))?,
            interrupt: signal(SignalKind::interrupt()).map_err(system("the SIGINT handler"))?,
        })
    }

    async fn any(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// A started agent with what it answers on.
struct Running {
    agent: Arc<Agent>,
    admin: AdminServers,
    local: LocalServer,
    door: Door,
    descriptors: Descriptors,
    upstream: Upstream,
    shutdown: CancellationToken,
}

/// Copies of what an agent that takes over needs, made while failing does no harm.
fn descriptors(
    run_dir: &RunDir,
    agent: &Agent,
    local: &LocalServer,
    admin: &AdminServers,
) -> Result<Descriptors, AgentError> {
    let copies = || -> std::io::Result<Descriptors> {
        Ok(Descriptors {
            run_lock: run_dir.share_lock()?.into(),
            cgroup_lock: agent.capture.kernel().share_lock()?.into(),
            local: local.copy()?,
            admin: admin.copies()?,
        })
    };
    copies().map_err(|source| AgentError::System {
        what: "copies of what an agent that takes over needs",
        source,
    })
}

impl Running {
    async fn until_end(
        self,
        run_dir: &RunDir,
        logs: LogControl,
        mut signals: Signals,
    ) -> Result<(), AgentError> {
        let agent = self.agent;
        tokio::spawn(agent.clone().report_same_node());
        tokio::spawn(agent.clone().keep_captured());
        tokio::spawn(agent.clone().forget_ended_flows());
        tokio::spawn(async {
            tokio::time::sleep(START_UP).await;
            sys::keep_memory_at_hand();
            sys::forget_startup_code();
        });
        let elsewhere = CancellationToken::new();
        let view = Arc::new(AdminView {
            agent: agent.clone(),
            logs,
        });
        tokio::spawn(self.admin.serve(view, elsewhere.clone()));
        tokio::spawn(self.local.serve(agent.clone(), elsewhere.clone()));
        let (tell, handed_over) = oneshot::channel();
        let handing = hand_over_to_successors(agent.clone(), self.door, self.descriptors, tell);
        let handing = tokio::spawn(handing);
        tokio::select! {
            name = signals.any() => {
                tracing::info!("{name}: draining");
                let deadline = Duration::from_secs(agent.config.proxy.drain_deadline_seconds);
                let cut = agent.workers.drain(deadline).await;
                tracing::info!(
                    cut,
                    "drained; capture stays in place until an agent runs again or `mesh-agent uninstall`"
                );
                // Its end takes the socket's file away.
                handing.abort();
            }
            Ok(handed_over) = handed_over => {
                elsewhere.cancel();
                run_dir.give_up();
                agent.capture.kernel().give_up_lock();
                drain_beside_successor(&agent, handed_over.drain_deadline, &mut signals).await;
            }
        }
        self.shutdown.cancel();
        self.upstream.stop().await;
        agent.workers.shut_down();
        Ok(())
    }
}

/// Serves what was accepted before the hand-over, and tells how much is left.
async fn drain_beside_successor(agent: &Agent, deadline: Duration, signals: &mut Signals) {
    let ends_at = SystemTime::now() + deadline;
    let state = || DrainingAgent {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        connections: agent.workers.live() as u64,
        ends_at: i64::try_from(
            ends_at
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
        )
        .unwrap_or(i64::MAX),
    };
    tracing::info!(
        connections = agent.workers.live(),
        ?deadline,
        "another agent serves; draining"
    );
    let notice = Notice::post(&agent.config.node.run_dir, &state())
        .inspect_err(|error| tracing::warn!(%error, "draining is not in the status"))
        .ok();
    let mut ticks = tokio::time::interval(NOTICE_INTERVAL);
    let mut draining = std::pin::pin!(agent.workers.drain(deadline));
    let cut = loop {
        tokio::select! {
            cut = &mut draining => break cut,
            name = signals.any() => {
                tracing::info!("{name}: draining faster");
                let sooner = Duration::from_secs(agent.config.proxy.drain_deadline_seconds);
                break agent.workers.drain(sooner.min(deadline)).await;
            }
            _ = ticks.tick() => {
                let told = notice.as_ref().map(|notice| notice.update(&state()));
                if let Some(Err(error)) = told {
                    tracing::debug!(%error, "the status tells an old number of connections");
                }
            }
        }
    };
    tracing::info!(cut, "drained; another agent serves");
}

impl Agent {
    fn start(
        config: AgentConfig,
        mut capture: Capture,
        upstream: &Upstream,
        run_dir: &RunDir,
        shutdown: &CancellationToken,
        is_active: bool,
    ) -> Result<Arc<Self>, AgentError> {
        log_kernel_messages(&mut capture);
        let capture = capture.with_keepalive(config.proxy.keepalive.keepalive());
        let is_active = Arc::new(AtomicBool::new(is_active));
        let runtime = tokio::runtime::Handle::current();
        let telemetry = Telemetry::new(env!("CARGO_PKG_VERSION"));
        if let Err(error) = kernel_metrics::register(telemetry.registry(), capture.kernel().clone())
        {
            tracing::error!(%error, "no kernel counters in the metrics");
        }
        let (writer, mesh) = Mesh::channel(&config.node.network);
        let discovery_config = DiscoveryConfig {
            address: upstream.address.clone(),
            roots_file: upstream.roots_file.clone(),
            server_name: upstream.server_name.clone(),
            token_file: upstream.token_file.clone(),
            node: config.node.name.clone(),
            cluster: config.node.cluster.clone(),
            network: config.node.network.clone(),
            snapshot_file: Some(run_dir.path().join(RunDir::SNAPSHOT)),
            writes_snapshot: is_active.clone(),
        };
        let (client, discovery) = DiscoveryClient::new(discovery_config, writer, rand::random())?;
        runtime.spawn(client.run(shutdown.clone()));
        let identity_config = IdentityConfig {
            ca_address: upstream.address.clone(),
            roots_file: upstream.roots_file.clone(),
            server_name: upstream.server_name.clone(),
            token_file: upstream.token_file.clone(),
            cluster: config.node.cluster.clone(),
            requested_lifetime: Duration::from_secs(config.proxy.certificate_lifetime_seconds),
            trust_domain: config.node.trust_domain.clone(),
        };
        let certificates = Certificates::start(identity_config, telemetry.clone(), &runtime)?;
        let context = ProxyContext {
            mesh: mesh.clone(),
            certificates: certificates.clone(),
            telemetry: telemetry.clone(),
            verdicts: capture.verdicts(),
            limits: Arc::new(Limits::for_this_process(&config)),
            node: config.node.name.as_str().into(),
            codec: config.proxy.tunnel_codec,
        };
        let count = match config.proxy.workers {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            count => count,
        };
        let workers = Workers::start(count, &context)?;
        let attempts = Attempts::new().map_err(|source| AgentError::System {
            what: "upgrades: this program's own path",
            source,
        })?;
        Ok(Arc::new(Self {
            records: Records::new(&config.node.run_dir),
            config,
            capture,
            mesh,
            discovery,
            certificates,
            telemetry,
            workers,
            started: Instant::now(),
            is_active,
            attempts,
            enrolling: tokio::sync::Mutex::default(),
            serving: Mutex::default(),
            missing: Mutex::default(),
        }))
    }
}

/// How often a draining agent tells how many connections it has.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);
/// Until the mesh is known and the first certificates are there; memory is kept small so long.
const START_UP: Duration = Duration::from_secs(3);

/// Log lines of the kernel programs appear among ours.
fn log_kernel_messages(capture: &mut Capture) {
    let Some(programs) = capture.programs_mut() else {
        return;
    };
    let logger = EbpfLogger::init(programs)
        .map_err(|error| error.to_string())
        .and_then(|logger| sys::watch_fd(logger).map_err(|error| error.to_string()));
    let mut logger = match logger {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "no log lines of the kernel programs"),
    };
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}

/// Each connection needs two descriptors; the soft limit of most systems is 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of file descriptors");
    }
}
