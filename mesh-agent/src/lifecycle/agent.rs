//! The running agent: start in an order that can be undone, run until a signal, drain.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aya_log::EbpfLogger;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{
    AgentError, credentials,
    enrolment::{Key, Missing},
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
        Capture,
        kernel::{Found, Kernel},
    },
    config::AgentConfig,
    discovery::{DiscoveryClient, DiscoveryConfig, DiscoveryStatus, Mesh},
    identity::{Certificates, IdentityConfig, tls},
    proxy::{Limits, ProxyContext, ServeHandle, TunnelCodec, Workers},
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
    pub enrolling: tokio::sync::Mutex<()>,
    pub serving: Mutex<HashMap<Key, ServeHandle>>,
    pub missing: Mutex<HashMap<Key, Missing>>,
}

impl Agent {
    /// Handles of the workloads that are served.
    pub(super) fn serving(&self) -> MutexGuard<'_, HashMap<Key, ServeHandle>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// Why it cannot start; what it made until then is removed, what an earlier agent left is kept.
pub fn run(config: AgentConfig, logs: LogControl, confined: &Confined) -> Result<(), AgentError> {
    confined.tell();
    let system = |what| move |source| AgentError::System { what, source };
    raise_descriptor_limit();
    tls::control_provider()
        .install_default()
        .map_err(|_| AgentError::CryptoProvider)?;
    let run_dir = RunDir::open(&config.node.run_dir)?;
    // One thread: discovery, certificates and admin must never take a core from the workers.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("weft-admin")
        .enable_all()
        .build()
        .map_err(system("the admin runtime"))?;
    let result = runtime.block_on(start_and_run(config, &run_dir, logs));
    // Whatever hangs in a blocking call (a resolver) must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if result.is_err() {
        run_dir.undo();
    }
    result
}

async fn start_and_run(
    config: AgentConfig,
    run_dir: &RunDir,
    logs: LogControl,
) -> Result<(), AgentError> {
    let system = |what| move |source| AgentError::System { what, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(system("the SIGTERM handler"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("the SIGINT handler"))?;
    // Ports first: a port in use must be known before anything is changed in the kernel.
    let addresses = AdminAddresses {
        metrics: config.listen.metrics,
        readiness: config.listen.readiness,
        admin: config.listen.admin,
    };
    let admin = AdminServers::bind(addresses).await?;
    let local = LocalServer::bind(run_dir.path())?;
    let shutdown = CancellationToken::new();
    let upstream = standalone::upstream(&config, run_dir.path()).await?;
    credentials::check(&upstream)?;
    let (kernel, found) = Kernel::start(kernel_config(&config))?;
    let started = Agent::start(config.clone(), kernel, &upstream, run_dir, &shutdown);
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
    agent.adopt(records, &config.workloads).await;
    tokio::spawn(agent.clone().follow_mesh());
    tokio::spawn(agent.clone().report_same_node());
    tokio::spawn(agent.clone().keep_captured());
    tokio::spawn(async {
        tokio::time::sleep(START_UP).await;
        sys::keep_memory_at_hand();
        sys::forget_startup_code();
    });
    tokio::spawn(admin.serve(Arc::new(AdminView {
        agent: agent.clone(),
        logs,
    })));
    tokio::spawn(local.serve(agent.clone()));
    tracing::info!(node = %config.node.name, ?found, "agent is running");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    let cut = agent
        .workers
        .drain(Duration::from_secs(config.proxy.drain_deadline_seconds))
        .await;
    tracing::info!(
        cut,
        "drained; capture stays in place until an agent runs again or `mesh-agent uninstall`"
    );
    shutdown.cancel();
    upstream.stop().await;
    agent.workers.shut_down();
    Ok(())
}

impl Agent {
    fn start(
        config: AgentConfig,
        mut kernel: Kernel,
        upstream: &Upstream,
        run_dir: &RunDir,
        shutdown: &CancellationToken,
    ) -> Result<Arc<Self>, AgentError> {
        log_kernel_messages(&mut kernel);
        let runtime = tokio::runtime::Handle::current();
        let telemetry = Telemetry::new(env!("CARGO_PKG_VERSION"));
        let capture = Capture::new(kernel)?;
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
            limits: Arc::new(Limits::for_this_process(&config.proxy)),
            node: config.node.name.as_str().into(),
            codec: TunnelCodec::default(),
        };
        let count = match config.proxy.workers {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            count => count,
        };
        let workers = Workers::start(count, &context)?;
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
            enrolling: tokio::sync::Mutex::default(),
            serving: Mutex::default(),
            missing: Mutex::default(),
        }))
    }
}

/// Until the mesh is known and the first certificates are there; memory is kept small so long.
const START_UP: Duration = Duration::from_secs(3);

/// Log lines of the kernel programs appear among ours.
fn log_kernel_messages(kernel: &mut Kernel) {
    let logger = EbpfLogger::init(kernel.programs_mut())
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
