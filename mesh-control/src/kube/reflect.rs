//! Follows one kind: lists it, watches it from there, and begins anew where the API server has forgotten.
//!
//! What happens goes to the source as [`Event`]s, in order, through a bounded queue: a source that is busy slows the
//! reading down, and the API server's own buffers take it from there.

use kube::core::WatchEvent;
use mesh_api::manifest::Kind;
use tokio::{
    sync::{mpsc, watch},
    time::{Duration, Instant, sleep},
};
use tokio_stream::StreamExt as _;
use tracing::{debug, info, warn};

use super::metrics::KubeMetrics;
use super::{
    api::{Api, ApiError},
    backoff::{Backoff, Dice},
    inputs::Event,
    objects::Watched,
};

/// Refusals in a row after which a watch is given up and the kind listed again: an API server whose data was restored from
/// a backup refuses versions that it has not reached yet.
const REFUSALS_MAX: u32 = 3;
/// A watch that lived this long did work, whatever it brought.
const WORKED: Duration = Duration::from_secs(10);

/// Where events go.
pub(super) type Events = mpsc::Sender<(Kind, Event)>;

/// Nobody takes the events any more.
struct Closed;

/// Why a watch ended.
#[derive(Debug)]
enum End {
    /// The server ended it, or the connection broke: resume.
    Ended,
    /// It has to be listed again.
    Gone,
    /// It failed: resume after a pause.
    Failed(ApiError),
}

/// Follows the objects of kind `T` until `stop` turns true or nobody takes the events.
pub(super) async fn reflect<T: Watched>(
    api: Api,
    events: Events,
    metrics: KubeMetrics,
    dice: Dice,
    mut stop: watch::Receiver<bool>,
) {
    let reflector = Reflector {
        api,
        events,
        metrics,
        backoff: Backoff::new(dice),
        complaint: String::new(),
    };
    tokio::select! {
        Err(Closed) = reflector.run::<T>() => {}
        () = crate::stopped(&mut stop) => {}
    }
}

struct Reflector {
    api: Api,
    events: Events,
    metrics: KubeMetrics,
    backoff: Backoff,
    /// The last error that was logged.
    complaint: String,
}

impl Reflector {
    async fn run<T: Watched>(mut self) -> Result<(), Closed> {
        loop {
            let version = match self.list::<T>().await? {
                Ok(version) => version,
                Err(error) => {
                    self.failed::<T>("list", &error).await;
                    continue;
                }
            };
            self.follow::<T>(version).await?;
            self.metrics
                .relists
                .with_label_values(&[T::KIND.name()])
                .inc();
        }
    }

    /// Lists page by page. Returns the version from which to watch.
    async fn list<T: Watched>(&mut self) -> Result<Result<String, ApiError>, Closed> {
        self.send(T::KIND, Event::Begin).await?;
        let mut continue_token = None;
        let mut objects = 0_usize;
        loop {
            let page = match self.api.list::<T>(&T::RESOURCE, continue_token).await {
                Ok(page) => page,
                Err(error) => return Ok(Err(error)),
            };
            objects += page.items.len();
            for object in page.items {
                let item = Box::new(object.into_item());
                self.send(T::KIND, Event::Listed(item)).await?;
            }
            continue_token = page
                .metadata
                .continue_token
                .filter(|token| !token.is_empty());
            if continue_token.is_none() {
                self.send(T::KIND, Event::End).await?;
                // No reason yet to pause less: a server that forgets every list at once must not be asked in a tight loop.
                self.answered(T::KIND);
                info!(kind = T::KIND.name(), objects, "listed");
                return Ok(Ok(page.metadata.resource_version));
            }
        }
    }

    /// Watches from `version` on; returns when the kind has to be listed again.
    async fn follow<T: Watched>(&mut self, mut version: String) -> Result<(), Closed> {
        let mut refusals = 0;
        loop {
            let begun = Instant::now();
            let before = version.clone();
            let end = self.watch::<T>(&mut version).await?;
            let advanced = version != before;
            if advanced || begun.elapsed() >= WORKED {
                self.answered(T::KIND);
                self.backoff.reset();
                refusals = 0;
            }
            match end {
                End::Gone => {
                    info!(
                        kind = T::KIND.name(),
                        "the API server has forgotten; listing again"
                    );
                    sleep(self.backoff.pause()).await;
                    return Ok(());
                }
                End::Ended if advanced || begun.elapsed() >= WORKED => {
                    debug!(kind = T::KIND.name(), "watch ended; resuming");
                }
                End::Ended => sleep(self.backoff.pause()).await,
                End::Failed(error) => {
                    refusals += u32::from(error.may_be_the_version());
                    self.failed::<T>("watch", &error).await;
                    if refusals >= REFUSALS_MAX {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// One watch. Moves `version` forward with what it brings.
    async fn watch<T: Watched>(&mut self, version: &mut String) -> Result<End, Closed> {
        let mut stream = match self.api.watch::<T>(&T::RESOURCE, version).await {
            Ok(stream) => stream,
            Err(ApiError::Gone) => return Ok(End::Gone),
            Err(error) => return Ok(End::Failed(error)),
        };
        while let Some(event) = stream.next().await {
            match event {
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    let item = Box::new(object.into_item());
                    version.clone_from(&item.version);
                    self.send(T::KIND, Event::Upsert(item)).await?;
                }
                Ok(WatchEvent::Deleted(object)) => {
                    let item = object.into_item();
                    version.clone_from(&item.version);
                    self.send(T::KIND, Event::Delete(item.key)).await?;
                }
                Ok(WatchEvent::Bookmark(bookmark)) => {
                    *version = bookmark.metadata.resource_version;
                }
                // `Api::watch` made it an error.
                Ok(WatchEvent::Error(_)) | Err(ApiError::Gone) => return Ok(End::Gone),
                // Silence for so long that the connection may be dead: a new one tells.
                Err(ApiError::Slow(_)) => return Ok(End::Ended),
                Err(error) => return Ok(End::Failed(error)),
            }
        }
        Ok(End::Ended)
    }

    async fn send(&self, kind: Kind, event: Event) -> Result<(), Closed> {
        self.events.send((kind, event)).await.map_err(|_| Closed)
    }

    fn answered(&mut self, kind: Kind) {
        if !self.complaint.is_empty() {
            info!(kind = kind.name(), "the API server answers again");
            self.complaint.clear();
        }
    }

    /// Says so, once per reason, and waits.
    async fn failed<T: Watched>(&mut self, what: &str, error: &ApiError) {
        let kind = T::KIND.name();
        self.metrics.errors.with_label_values(&[kind]).inc();
        let complaint = complaint::<T>(what, error);
        if complaint != self.complaint {
            warn!(kind, "{complaint}");
            self.complaint = complaint;
        }
        sleep(self.backoff.pause()).await;
    }
}

/// What failed and what to look at.
fn complaint<T: Watched>(what: &str, error: &ApiError) -> String {
    let kind = T::KIND;
    let hint = match error {
        ApiError::NotFound(_) if kind.api_version() == mesh_api::manifest::WEFT_API_VERSION => {
            "; install Weft's CustomResourceDefinitions (they are part of the Helm chart). Until then nothing is served"
        }
        _ => "",
    };
    format!("cannot {what} {}: {error}{hint}", T::RESOURCE.path)
}

#[cfg(test)]
#[path = "reflect_tests.rs"]
mod tests;
