//! Metrics of the control plane, and the small HTTP server that shows them.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tracing::{debug, warn};

/// Most scrapes at a time; further connections wait in the kernel's queue.
const SCRAPES_MAX: usize = 16;
/// How long a scraper may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Every metric. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Objects by kind.
    pub objects: IntGaugeVec,
    /// Problems of the source's objects, now.
    pub source_problems: IntGauge,
    /// Resources by type.
    pub resources: IntGaugeVec,
    /// Discovery streams open now.
    pub clients: IntGauge,
    /// Responses sent, by type.
    pub pushes: IntCounterVec,
    /// Responses that a client refused, by type.
    pub nacks: IntCounterVec,
    /// Certificates signed.
    pub certificates_signed: IntCounter,
    /// Signing requests refused, by gRPC code.
    pub certificates_refused: IntCounterVec,
    /// TLS handshakes of the listener that failed.
    pub handshakes_failed: IntCounter,
}

impl Metrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// When `registry` already holds one of that name.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(format!("weft_control_{name}"), help);
        let metrics = Self {
            objects: IntGaugeVec::new(opts("objects", "Objects by kind."), &["kind"])?,
            source_problems: IntGauge::with_opts(opts(
                "source_problems",
                "Problems of the source's objects, now.",
            ))?,
            resources: IntGaugeVec::new(opts("resources", "Resources by type."), &["type"])?,
            clients: IntGauge::with_opts(opts("clients", "Discovery streams open now."))?,
            pushes: IntCounterVec::new(opts("pushes_total", "Responses sent."), &["type"])?,
            nacks: IntCounterVec::new(
                opts("nacks_total", "Responses refused by clients."),
                &["type"],
            )?,
            certificates_signed: IntCounter::with_opts(opts(
                "certificates_signed_total",
                "Workload certificates signed.",
            ))?,
            certificates_refused: IntCounterVec::new(
                opts(
                    "certificates_refused_total",
                    "Signing requests refused, by gRPC code.",
                ),
                &["reason"],
            )?,
            handshakes_failed: IntCounter::with_opts(opts(
                "handshakes_failed_total",
                "TLS handshakes that failed.",
            ))?,
        };
        let all: [Box<dyn prometheus::core::Collector>; 9] = [
            Box::new(metrics.objects.clone()),
            Box::new(metrics.source_problems.clone()),
            Box::new(metrics.resources.clone()),
            Box::new(metrics.clients.clone()),
            Box::new(metrics.pushes.clone()),
            Box::new(metrics.nacks.clone()),
            Box::new(metrics.certificates_signed.clone()),
            Box::new(metrics.certificates_refused.clone()),
            Box::new(metrics.handshakes_failed.clone()),
        ];
        for metric in all {
            registry.register(metric)?;
        }
        Ok(metrics)
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop` turns true. `waits` is what agents are not served for yet.
pub(crate) async fn serve(
    listener: TcpListener,
    registry: Registry,
    waits: watch::Receiver<Vec<String>>,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(SCRAPES_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = crate::stopped(&mut stop) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "metrics listener could not accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (registry, waits) = (registry.clone(), waits.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&registry, &waits.borrow(), &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!(%error, "metrics connection ended");
            }
            drop(permit);
        });
    }
}

fn answer<B>(registry: &Registry, waits: &[String], request: &Request<B>) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match TextEncoder::new().encode_to_string(&registry.gather())
        {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        (&Method::GET, "/healthz") => (StatusCode::OK, "ok\n".to_owned()),
        (&Method::GET, "/readyz") if waits.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
        (&Method::GET, "/readyz") => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("waits for {}\n", waits.join(", ")),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            "try /metrics, /healthz or /readyz\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}
