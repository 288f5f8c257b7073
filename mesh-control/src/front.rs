//! What agents talk to: discovery and certificates behind one TLS listener, whatever the source is.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, service::InterceptorLayer, transport::Server};
use tracing::{error, info};

use crate::{
    authn::Nodes,
    ca::{Authority, CaService, grpc_service},
    hub::Hub,
    server::{self, ServerError, Serving},
    telemetry::Metrics,
    xds::{self, Discovery, Progress},
};

/// How long streams may take to end after a stop before they are cut.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// HTTP/2 keepalive towards agents: a vanished agent is noticed within their sum.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Most concurrent streams of one connection: an agent needs one for discovery and a few for certificates.
const CONNECTION_STREAMS_MAX: u32 = 128;

/// Everything that serving needs.
#[derive(Debug)]
pub(crate) struct Front {
    pub hub: Hub,
    pub nodes: Nodes,
    pub authority: watch::Receiver<Arc<Authority>>,
    pub metrics: Metrics,
    pub progress: Arc<Progress>,
    /// Names that agents dial, beside those that always lead here.
    pub tls_names: Vec<String>,
}

impl Front {
    /// Serves in `tasks` until `stop` turns true.
    ///
    /// # Errors
    /// When the serving certificate cannot be made.
    pub fn serve(
        self,
        listener: TcpListener,
        stop: &watch::Receiver<bool>,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), ServerError> {
        let address = listener.local_addr().map_err(ServerError::Listener)?;
        let names = server::serving_names(&self.tls_names, address.ip());
        let serving = Serving::new(self.authority.clone(), names, SystemTime::now());
        let serving = Arc::new(serving?);
        let tls = server::tls_config(serving.clone())?;
        tasks.spawn(serving.renew(stop.clone()));
        let discovery = Discovery {
            hub: self.hub.clone(),
            nodes: self.nodes.clone(),
            metrics: self.metrics.clone(),
            progress: self.progress,
            stop: stop.clone(),
            streams: Arc::new(Semaphore::new(xds::STREAMS_MAX)),
        };
        let ca = CaService {
            authority: self.authority,
            nodes: self.nodes,
            hub: self.hub,
            metrics: self.metrics.clone(),
        };
        let incoming = server::accept(listener, tls, self.metrics, stop.clone());
        tasks.spawn(answer(
            discovery,
            ca,
            ReceiverStream::new(incoming),
            stop.clone(),
        ));
        info!(%address, "listening on {address}");
        Ok(())
    }
}

async fn answer(
    discovery: Discovery,
    ca: CaService,
    incoming: ReceiverStream<io::Result<server::Counted>>,
    stop: watch::Receiver<bool>,
) {
    let mut graceful = stop.clone();
    let mut cut = stop;
    let serving = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(CONNECTION_STREAMS_MAX)
        .layer(InterceptorLayer::new(note_use))
        .add_service(xds::service(discovery))
        .add_service(grpc_service(ca))
        .serve_with_incoming_shutdown(incoming, async move {
            crate::stopped(&mut graceful).await;
        });
    let deadline = async move {
        crate::stopped(&mut cut).await;
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                error!(%error, "the listener failed");
            }
        }
        () = deadline => info!("some streams did not end in time and were cut"),
    }
}

/// An interceptor: lets every request through.
fn note_use(request: Request<()>) -> Result<Request<()>, Status> {
    if let Some(used) = request.extensions().get::<server::Used>() {
        used.note();
    }
    Ok(request)
}
