//! The control plane in a cluster: the API server as source, a Secret as authority.
//!
//! # Plan
//!
//! ```text
//!                 ┌ reflect (one per kind: list, watch, relist) ─┐
//!  API server ◄───┤                                              ├─ events ─► source: Inputs (pure) ─► Hub(Index) ─► front
//!                 │ review (TokenReview)  ◄── calls of agents ── │                 │                     ▲            │
//!                 │ authority (Secret, ConfigMap) ───────────────┼─────────────────┼─────────────────────┘            │
//!                 │ lease (leader election) ──► leader? ──┐      │                 └─ reports ─┐                      │
//!                 └ reporter (status, Events) ◄───────────┴──────┴─────────────────────────────┴── progress ◄─────────┘
//! ```
//!
//! **What is watched.** Namespaces and Nodes (metadata only: their labels), Pods that have not ended (read into small types),
//! Services, the EndpointSlices that Kubernetes does not derive from a selector, and Weft's own kinds. Readiness comes from
//! the pods themselves, from which Kubernetes derives the slices of Services with a selector: one hop earlier, and a rollout of a
//! large Service is as many small changes as it has pods. Which pods are enrolled, and that host-network pods never are,
//! the index decides, as for manifest files.
//!
//! **Never half a truth.** Nothing is served before every kind was listed as a whole (`inputs`), so that no agent mistakes
//! a list that was cut off for a mesh that shrank. Later lists only add until they end. A watch that breaks is resumed where
//! it ended; when the API server has forgotten that version (410), the kind is listed again. Lists are consistent reads, so
//! that an API server that lags never takes the mesh back in time. Every request has a deadline, every retry a capped,
//! jittered pause. While the API server is away, what is known is served on.
//!
//! **Who is who.** Agents show a projected token, bound to their pod and to our audience; `review` has it reviewed and takes
//! the node from the pod. A certificate is signed for a node that runs a pod of that service account now: the same rule,
//! `Index::runs_on`, as with manifest files.
//!
//! **Two replicas serve, one writes.** Every replica reads, serves and signs; whoever holds the Lease also writes status,
//! Events, the trust bundle and the steps of a rotation (`ca::rotation`).
//!
//! **Pure and not.** Decisions are in `inputs`, `objects`, `election`, `status`, `review::judge` and `ca::rotation`, without I/O
//! and with the clock as an argument; `api` is the only place that talks to the API server.

mod agents;
mod api;
mod authority;
mod backoff;
mod config;
mod election;
#[cfg(test)]
mod fake;
mod inputs;
mod lease;
mod metrics;
mod objects;
mod reflect;
mod reporter;
mod review;
mod source;
mod status;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use mesh_api::manifest::Kind;
use prometheus::Registry;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::{error, info};

pub use agents::ServiceAccount;
pub use api::{ApiError, ConnectError};
pub use config::{AgentsConfig, ClusterConfig, KubernetesConfig, SecretCaConfig};
pub use review::Bearer;

use crate::{
    StartError,
    authn::Nodes,
    ca::Authority,
    front::Front,
    hub::Hub,
    telemetry::{self, Metrics},
    xds::Progress,
};
use agents::AgentPods;
use api::Api;
use authority::{Keeper, Places};
use backoff::Dice;
use inputs::Inputs;
use metrics::KubeMetrics;
use objects::{
    KubeAuthorizationPolicy, KubeExternalWorkload, KubeMeshPolicy, KubeNamespace, KubeNode,
    KubePod, Watched,
};
use reflect::reflect;
use reporter::Reporter;
use review::TokenReviewer;
use source::{EVENTS_QUEUED_MAX, Source};

/// The kinds that are followed. Pods come last: with everything else known, each is computed once.
const KINDS: [Kind; 8] = [
    Kind::Namespace,
    Kind::Node,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::AuthorizationPolicy,
    Kind::MeshPolicy,
    Kind::ExternalWorkload,
    Kind::Pod,
];
/// Connections that wait to be accepted: a thousand agents that come back at once.
const BACKLOG: u32 = 1_024;

/// A control plane that runs in a cluster. Dropping it stops it without waiting; [`KubernetesHandle::shutdown`] waits.
#[derive(Debug)]
pub struct KubernetesHandle {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    waits: watch::Receiver<Vec<String>>,
    hub: Hub,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl KubernetesHandle {
    /// Where agents connect to, once [`KubernetesHandle::waits`] is empty.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are served, if they are.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// What is waited for before agents are served; empty when they are.
    #[must_use]
    pub fn waits(&self) -> watch::Receiver<Vec<String>> {
        self.waits.clone()
    }

    /// The index, to look at.
    #[must_use]
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Ends streams, gives the Lease back, stops listening and waits for it, at most a few seconds.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Starts a control plane in a cluster. Returns before the API server was asked anything: what is waited for is in
/// [`KubernetesHandle::waits`] and at `/readyz`, and until then the port is closed.
///
/// # Errors
/// When a setting cannot work, an address is taken, or there is no way to find the API server.
pub async fn start(
    config: KubernetesConfig,
    registry: Registry,
) -> Result<KubernetesHandle, StartError> {
    config.validate()?;
    let api = Api::new(config.cluster.kubeconfig.as_ref()).await?;
    start_with(api, config, registry).await
}

async fn start_with(
    api: Api,
    config: KubernetesConfig,
    registry: Registry,
) -> Result<KubernetesHandle, StartError> {
    let metrics = Metrics::new(&registry)?;
    let kube_metrics = KubeMetrics::new(&registry)?;
    let (socket, address) = reserve(config.server.listen)?;
    let hub = Hub::new(config.mesh.clone());
    let agents = AgentPods::new(config.agents.accounts.clone());
    let progress = Arc::<Progress>::default();
    let (stop, on_stop) = watch::channel(false);
    let (waiting, waits) = watch::channel(vec!["the API server".to_owned()]);
    let mut tasks = JoinSet::new();

    let mut metrics_address = None;
    if let Some(address) = config.server.metrics {
        let (listener, bound) = crate::listen(address).await?;
        metrics_address = Some(bound);
        let waits = waits.clone();
        tasks.spawn(telemetry::serve(listener, registry, waits, on_stop.clone()));
    }
    let (leader, leads) = watch::channel(false);
    let place = lease::Place {
        namespace: config.cluster.namespace.clone(),
        name: config.cluster.lease.clone(),
    };
    let me = config.cluster.replica.clone();
    let election = lease::elect(
        api.clone(),
        place,
        me,
        kube_metrics.clone(),
        leader,
        on_stop.clone(),
    );
    tasks.spawn(election);

    let (authority, authorities) = watch::channel(None);
    let keeper = Keeper {
        api: api.clone(),
        places: Places {
            namespace: config.cluster.namespace.clone(),
            secret: config.ca.secret.clone(),
            bundle: config.ca.bundle.clone(),
            create: config.ca.create,
        },
        trust_domain: config.mesh.trust_domain.clone(),
        leaf_max_lifetime: config.ca.leaf_max_lifetime,
        look_interval: authority::LOOK_INTERVAL,
        leader: leads.clone(),
        authority,
    };
    tasks.spawn(keeper.run(on_stop.clone()));

    let (missing, reports) = follow(
        &api,
        &config,
        &hub,
        &agents,
        (metrics.clone(), kube_metrics.clone()),
        &on_stop,
        &mut tasks,
    );
    let reporter = Reporter {
        api: api.clone(),
        reports,
        progress: progress.clone(),
        leader: leads,
        replica: config.cluster.replica.clone(),
        metrics: kube_metrics.clone(),
    };
    tasks.spawn(reporter.run(on_stop.clone()));

    let reviewer = TokenReviewer::new(api, config.agents.audience, agents, kube_metrics);
    let opening = Opening {
        socket,
        hub: hub.clone(),
        nodes: Nodes::Reviewed(Arc::new(reviewer)),
        metrics,
        progress,
        tls_names: config.server.tls_names,
        missing,
        authorities,
        waiting,
    };
    tasks.spawn(opening.run(on_stop));
    Ok(KubernetesHandle {
        address,
        metrics_address,
        waits,
        hub,
        stop,
        tasks,
    })
}

/// Follows every kind. Returns what is not listed yet, and what is to be told of Weft's own objects.
fn follow(
    api: &Api,
    config: &KubernetesConfig,
    hub: &Hub,
    agents: &AgentPods,
    (metrics, kube_metrics): (Metrics, KubeMetrics),
    stop: &watch::Receiver<bool>,
    tasks: &mut JoinSet<()>,
) -> (
    watch::Receiver<Vec<Kind>>,
    watch::Receiver<reporter::Reports>,
) {
    let (missing, on_missing) = watch::channel(KINDS.to_vec());
    let (reports, on_reports) = watch::channel(Arc::default());
    let (events, on_events) = mpsc::channel(EVENTS_QUEUED_MAX);
    let source = Source {
        inputs: Inputs::new(&KINDS, &config.mesh.root_namespace, agents.clone()),
        hub: hub.clone(),
        metrics,
        kube_metrics: kube_metrics.clone(),
        missing,
        reports,
        reported: BTreeMap::new(),
    };
    tasks.spawn(source.run(on_events, stop.clone()));
    let mut spawn = Spawner {
        api,
        events,
        metrics: kube_metrics,
        stop,
        tasks,
    };
    spawn.kind::<KubeNamespace>();
    spawn.kind::<KubeNode>();
    spawn.kind::<Service>();
    spawn.kind::<EndpointSlice>();
    spawn.kind::<KubeAuthorizationPolicy>();
    spawn.kind::<KubeMeshPolicy>();
    spawn.kind::<KubeExternalWorkload>();
    spawn.last::<KubePod>(on_missing.clone());
    (on_missing, on_reports)
}

struct Spawner<'a> {
    api: &'a Api,
    events: reflect::Events,
    metrics: KubeMetrics,
    stop: &'a watch::Receiver<bool>,
    tasks: &'a mut JoinSet<()>,
}

impl Spawner<'_> {
    fn reflection<T: Watched>(&self) -> impl Future<Output = ()> + Send + use<T> {
        reflect::<T>(
            self.api.clone(),
            self.events.clone(),
            self.metrics.clone(),
            Dice::random(),
            self.stop.clone(),
        )
    }

    fn kind<T: Watched>(&mut self) {
        let reflection = self.reflection::<T>();
        self.tasks.spawn(reflection);
    }

    /// Begins when every other kind is known.
    fn last<T: Watched>(&mut self, mut missing: watch::Receiver<Vec<Kind>>) {
        let reflection = self.reflection::<T>();
        let mut stop = self.stop.clone();
        self.tasks.spawn(async move {
            let others = missing.wait_for(|missing| missing.iter().all(|kind| *kind == T::KIND));
            tokio::select! {
                known = others => if known.is_err() { return },
                () = crate::stopped(&mut stop) => return,
            }
            reflection.await;
        });
    }
}

/// Takes the address without listening yet: who connects before the mesh is known is refused, and comes again.
fn reserve(address: SocketAddr) -> Result<(TcpSocket, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { address, source };
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(failed)?;
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(address).map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}

/// What has to come together before agents are served.
struct Opening {
    socket: TcpSocket,
    hub: Hub,
    nodes: Nodes,
    metrics: Metrics,
    progress: Arc<Progress>,
    tls_names: Vec<String>,
    missing: watch::Receiver<Vec<Kind>>,
    authorities: watch::Receiver<Option<Arc<Authority>>>,
    waiting: watch::Sender<Vec<String>>,
}

impl Opening {
    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let on_stop = stop.clone();
        tokio::select! {
            () = self.wait() => {}
            () = crate::stopped(&mut stop) => return,
        }
        let mut tasks = JoinSet::new();
        if let Err(error) = self.open(&on_stop, &mut tasks) {
            error!(%error, "cannot serve");
            return;
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Until the mesh and the authority are known.
    async fn wait(&mut self) {
        loop {
            let missing = self.missing.borrow_and_update().clone();
            let mut waits: Vec<_> = missing
                .iter()
                .map(|kind| format!("the list of {kind}"))
                .collect();
            if self.authorities.borrow_and_update().is_none() {
                waits.push("the certificate authority".to_owned());
            }
            if waits.is_empty() {
                return;
            }
            self.waiting.send_if_modified(|known| {
                let differs = *known != waits;
                *known = waits;
                differs
            });
            tokio::select! {
                changed = self.missing.changed() => if changed.is_err() { std::future::pending().await },
                changed = self.authorities.changed() => if changed.is_err() { std::future::pending().await },
            }
        }
    }

    fn open(self, stop: &watch::Receiver<bool>, tasks: &mut JoinSet<()>) -> Result<(), StartError> {
        let address = self.socket.local_addr();
        let listener = self.socket.listen(BACKLOG);
        let listener: TcpListener = listener.map_err(|source| StartError::Listen {
            address: address.unwrap_or_else(|_| ([0, 0, 0, 0], 0).into()),
            source,
        })?;
        let Some(first) = self.authorities.borrow().clone() else {
            return Ok(());
        };
        let (authority, current) = watch::channel(first);
        let mut authorities = self.authorities;
        tasks.spawn(async move {
            while authorities.changed().await.is_ok() {
                if let Some(next) = authorities.borrow_and_update().clone() {
                    authority.send_replace(next);
                }
            }
        });
        let front = Front {
            hub: self.hub,
            nodes: self.nodes,
            authority: current,
            metrics: self.metrics,
            progress: self.progress,
            tls_names: self.tls_names,
        };
        front.serve(listener, stop, tasks)?;
        self.waiting.send_replace(Vec::new());
        info!("the mesh is known; agents are served");
        Ok(())
    }
}

#[cfg(test)]
mod tests;
