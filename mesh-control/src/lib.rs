//! The control plane: from Kubernetes-shaped objects to what agents need to know, and certificates for what they run.
//!
//! ```text
//!  files ──► manifest::parse ─┬─► Hub(Index) ──► xds (delta ADS) ──┐
//!  kube ──► lists and watches ┘       │                           ├─► one TLS listener ◄── agents
//!                                     └──────► ca (signing) ──────┘
//! ```
//!
//! [`ControlPlane::start`] runs all of it inside a process: `mesh-control` and `mesh-agent run --standalone` use the same
//! code. In a cluster [`kube::start`] does the same with the API server as source and a Secret for the authority. This crate must
//! not know how agents capture or proxy; what it says to them is `mesh_api::proto`.

#![forbid(unsafe_code)]

pub mod authn;
pub mod ca;
pub mod config;
pub mod credentials;
pub mod files;
mod front;
pub mod hub;
pub mod index;
pub mod kube;
mod server;
mod telemetry;
pub mod xds;

use std::{io, net::SocketAddr, sync::Arc, time::SystemTime};

use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use zeroize::Zeroizing;

use authn::Nodes;
use ca::{Authority, CaFilesError};
use config::{ConfigError, ControlConfig};
use credentials::{NodeCredentials, TokenFileError};
use files::{FilesSource, SourceError};
use front::Front;
use hub::Hub;
use index::ResourceType;
pub use server::ServerError;
use telemetry::Metrics;

/// Why the control plane did not start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The folder of manifests cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The authority's files cannot be used.
    #[error(transparent)]
    Ca(#[from] CaFilesError),
    /// The node credentials cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
    /// TLS could not be set up.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// There is no way to the API server.
    #[error(transparent)]
    Connect(#[from] kube::ConnectError),
    /// The registry already holds the control plane's metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Starts control planes.
///
/// ```no_run
/// # async fn embed() -> Result<(), mesh_control::StartError> {
/// use mesh_control::{ControlPlane, config::{ControlConfig, SourceConfig}};
///
/// let config = ControlConfig {
///     source: SourceConfig { folder: "manifests".into(), last_good: None },
///     ..ControlConfig::default() // a free port of 127.0.0.1, an authority in memory
/// };
/// let control = ControlPlane::start(config, prometheus::Registry::new()).await?;
/// let (address, roots) = (control.address(), control.roots_pem());
/// let token = control.node_token("node-a");
/// // Dial `address` over TLS with `roots` (names: `localhost`, `127.0.0.1`), bearing `token`.
/// # let _ = (address, roots, token);
/// control.shutdown().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ControlPlane;

/// A running control plane. Dropping it stops it without waiting; [`ControlHandle::shutdown`] waits.
#[derive(Debug)]
pub struct ControlHandle {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    roots_pem: String,
    credentials: Arc<NodeCredentials>,
    hub: Hub,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl ControlPlane {
    /// Reads the source, listens and serves. Metrics go into `registry`, which `server.metrics` shows if configured.
    ///
    /// # Errors
    /// See [`StartError`]. Malformed manifests are logged, not errors; but a file that cannot be read at all is one:
    /// agents that know what it held keep it, and must not be told that it is gone.
    pub async fn start(
        config: ControlConfig,
        registry: Registry,
    ) -> Result<ControlHandle, StartError> {
        config.validate()?;
        let metrics = Metrics::new(&registry)?;
        let credentials = Arc::new(NodeCredentials::open(config.nodes.tokens.clone())?);
        let authority = open_authority(&config, SystemTime::now())?;
        let hub = Hub::new(config.mesh.clone());
        let watch = files::watch_folder(&config.source.folder);
        let (source, changes) = FilesSource::open(
            &config.source.folder,
            &config.mesh.root_namespace,
            config.source.last_good.as_deref(),
        )?;
        source.require_read()?;
        hub.apply(changes);

        let (listener, address) = listen(config.server.listen).await?;
        let (stop, on_stop) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let mut metrics_address = None;
        if let Some(address) = config.server.metrics {
            let (listener, bound) = listen(address).await?;
            metrics_address = Some(bound);
            let (_, waits) = watch::channel(Vec::new());
            tasks.spawn(telemetry::serve(listener, registry, waits, on_stop.clone()));
        }
        tasks.spawn(source.run(watch, hub.clone(), metrics.clone(), on_stop.clone()));
        let roots_pem = authority.roots_pem().to_owned();
        let front = Front {
            hub: hub.clone(),
            nodes: Nodes::Listed(credentials.clone()),
            authority: watch::channel(Arc::new(authority)).1,
            metrics,
            progress: Arc::default(),
            tls_names: config.server.tls_names,
        };
        front.serve(listener, &on_stop, &mut tasks)?;
        Ok(ControlHandle {
            address,
            metrics_address,
            roots_pem,
            credentials,
            hub,
            stop,
            tasks,
        })
    }
}

fn open_authority(config: &ControlConfig, now: SystemTime) -> Result<Authority, CaFilesError> {
    let (domain, lifetime) = (&config.mesh.trust_domain, config.ca.leaf_max_lifetime);
    match &config.ca.folder {
        Some(folder) => Authority::open(folder, domain, lifetime, now),
        None => Authority::ephemeral(domain, lifetime, now),
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Returns when `stop` turns true, or when the handle is gone, which also is a stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn publish_objects(hub: &Hub, metrics: &Metrics) {
    for (kind, count) in hub.objects() {
        metrics
            .objects
            .with_label_values(&[kind.name()])
            .set(count as i64);
    }
    let index = hub.read();
    for kind in ResourceType::ALL {
        metrics
            .resources
            .with_label_values(&[xds::label(kind)])
            .set(index.store().len(kind) as i64);
    }
}

impl ControlHandle {
    /// Where agents connect to, with the port that was bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are served, if they are.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// The roots that clients must trust, PEM.
    #[must_use]
    pub fn roots_pem(&self) -> &str {
        &self.roots_pem
    }

    /// A token for `node`, valid as long as this control plane runs.
    #[must_use]
    pub fn node_token(&self, node: &str) -> Zeroizing<String> {
        self.credentials.issue(node)
    }

    /// The index, to look at or to feed from another source.
    #[must_use]
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Ends streams, stops listening and waits for both, at most a few seconds.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}
