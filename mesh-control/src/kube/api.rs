//! Requests to the API server, each with a deadline. Thin: what to ask and what an answer means is decided elsewhere.
//!
//! Bodies are read here and never logged: some hold keys.

use std::{fmt, future::Future, path::PathBuf, pin::Pin, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    core::{
        WatchEvent,
        params::{GetParams, ListParams, Patch, PatchParams, PostParams, WatchParams},
        request::Request,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt as _};

/// How long a TCP and TLS connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one answer may take, body included. A page of a list stays far below; a busy API server may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Objects per page of a list: what the API server's own clients ask for; about 2 MiB of pods.
pub(super) const PAGE_MAX: u32 = 500;
/// How long a watch is asked to last, seconds. The server ends it by itself, so that connections spread over API servers.
const WATCH_SECONDS: u32 = 290;
/// Longest silence of a watch. The server sends a bookmark about every minute; resuming costs one request and loses nothing.
const WATCH_IDLE_MAX: Duration = Duration::from_secs(90);
/// Who writes, as `managedFields` names it.
const FIELD_MANAGER: &str = "weft-control";
/// Bytes of a server's message that are kept.
const MESSAGE_MAX_BYTES: usize = 1024;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// What was asked for is too old to be followed: list again.
    #[error("the API server no longer has that resource version")]
    Gone,
    /// There is no such object, or no such kind.
    #[error("the API server has no {0}")]
    NotFound(String),
    /// Somebody else changed or created the object first.
    #[error("somebody else was first: {0}")]
    Conflict(String),
    /// This account may not.
    #[error("the API server forbids it (look at the control plane's ClusterRole): {0}")]
    Forbidden(String),
    /// Another refusal; `code` is the HTTP status. Those from 500 on, and 429, are worth a retry.
    #[error("the API server answered {code}: {message}")]
    Refused {
        /// HTTP status.
        code: u16,
        /// What it said.
        message: String,
    },
    /// No answer: the server cannot be reached, or the connection broke. Worth a retry.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// No answer in time. Worth a retry.
    #[error("the API server did not answer within {} s", .0.as_secs())]
    Slow(Duration),
    /// An answer that is not what it should be.
    #[error("the API server's answer cannot be read: {0}")]
    Malformed(String),
}

impl ApiError {
    /// Whether the version from which was asked may be at fault. (504 is "too large resource version": the server has not
    /// reached it, and after a restored backup never will.)
    pub(super) fn may_be_the_version(&self) -> bool {
        matches!(
            self,
            Self::NotFound(_)
                | Self::Malformed(_)
                | Self::Refused {
                    code: 400 | 422 | 504,
                    ..
                }
        )
    }

    fn of_status(status: &kube::core::Status) -> Self {
        let message = shortened(&status.message);
        match status.code {
            410 => Self::Gone,
            404 => Self::NotFound(message),
            409 => Self::Conflict(message),
            401 | 403 => Self::Forbidden(message),
            code => Self::Refused { code, message },
        }
    }
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(&status),
            // serde_json's message holds at most a short excerpt of the text; it is left out all the same.
            kube::Error::SerdeError(error) => Self::Malformed(format!(
                "line {}, column {}: {:?} error",
                error.line(),
                error.column(),
                error.classify()
            )),
            kube::Error::FromUtf8(_) => Self::Malformed("not UTF-8".into()),
            kube::Error::BuildRequest(error) => Self::Malformed(error.to_string()),
            other => Self::Unreachable(shortened(&chain(&other))),
        }
    }
}

/// An error and its causes: the outermost alone says only that there was one.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(MESSAGE_MAX_BYTES)].to_owned()
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}: {message}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// This process does not run in a pod.
    #[error("not in a pod with a service account, and no --kubeconfig was given: {0}")]
    InCluster(String),
    /// The client could not be made.
    #[error("client of the API server: {0}")]
    Client(String),
}

/// Deadlines. One value for production; tests shorten it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    pub answer: Duration,
    pub watch_idle: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            answer: ANSWER_TIMEOUT,
            watch_idle: WATCH_IDLE_MAX,
        }
    }
}

/// What is listed and watched, and which part of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resource {
    /// Path of the collection, `/api/v1/pods`.
    pub path: &'static str,
    /// Field selector.
    pub fields: Option<&'static str>,
    /// Label selector.
    pub labels: Option<&'static str>,
    /// Whether only the metadata is wanted.
    pub metadata_only: bool,
}

/// One page of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Page<T> {
    pub metadata: PageMeta,
    #[serde(default = "Vec::new")]
    pub items: Vec<T>,
}

/// Where the page is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMeta {
    #[serde(default)]
    pub resource_version: String,
    #[serde(default, rename = "continue")]
    pub continue_token: Option<String>,
}

/// What a watch brings.
pub(super) type Events<T> = Pin<Box<dyn Stream<Item = Result<WatchEvent<T>, ApiError>> + Send>>;

/// The API server. Cheap to clone.
#[derive(Clone)]
pub(super) struct Api {
    client: Client,
    deadlines: Deadlines,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// With a kubeconfig, or as the pod that this process runs in. Nothing is sent yet.
    pub async fn new(kubeconfig: Option<&PathBuf>) -> Result<Self, ConnectError> {
        let config = match kubeconfig {
            Some(path) => {
                let failed = |message: String| ConnectError::Kubeconfig {
                    path: path.clone(),
                    message,
                };
                let file = Kubeconfig::read_from(path).map_err(|error| failed(chain(&error)))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(|error| failed(chain(&error)))?
            }
            None => Config::incluster().map_err(|error| ConnectError::InCluster(chain(&error)))?,
        };
        Self::of_config(config, Deadlines::default())
    }

    pub fn of_config(mut config: Config, deadlines: Deadlines) -> Result<Self, ConnectError> {
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Retries are ours: bounded, jittered, counted.
        config.default_retry = false;
        let client = Client::try_from(config);
        let client = client.map_err(|error| ConnectError::Client(chain(&error)))?;
        Ok(Self { client, deadlines })
    }

    /// One page of `resource`; `continue_token` comes from the page before.
    pub async fn list<T: DeserializeOwned>(
        &self,
        resource: &Resource,
        continue_token: Option<String>,
    ) -> Result<Page<T>, ApiError> {
        let params = ListParams {
            label_selector: resource.labels.map(Into::into),
            field_selector: resource.fields.map(Into::into),
            limit: Some(PAGE_MAX),
            continue_token,
            ..ListParams::default()
        };
        let request = Request::new(resource.path);
        let request = if resource.metadata_only {
            request.list_metadata(&params)
        } else {
            request.list(&params)
        };
        self.ask(request).await
    }

    /// What happens to `resource` after `version`. The stream ends with the watch, or with an error when it is silent
    /// for too long.
    pub async fn watch<T: DeserializeOwned + Clone + Send + 'static>(
        &self,
        resource: &Resource,
        version: &str,
    ) -> Result<Events<T>, ApiError> {
        let params = WatchParams {
            label_selector: resource.labels.map(Into::into),
            field_selector: resource.fields.map(Into::into),
            timeout: Some(WATCH_SECONDS),
            ..WatchParams::default()
        };
        let request = Request::new(resource.path);
        let request = if resource.metadata_only {
            request.watch_metadata(&params, version)
        } else {
            request.watch(&params, version)
        };
        let request = request.map_err(|error| ApiError::Malformed(error.to_string()))?;
        let events = self
            .in_time(self.client.request_events::<T>(request))
            .await?;
        let idle = self.deadlines.watch_idle;
        Ok(Box::pin(events.timeout(idle).map(
            move |event| match event {
                Ok(Ok(WatchEvent::Error(status))) => Err(ApiError::of_status(&status)),
                Ok(event) => event.map_err(Into::into),
                Err(_) => Err(ApiError::Slow(idle)),
            },
        )))
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str, name: &str) -> Result<T, ApiError> {
        let request = Request::new(path).get(name, &GetParams::default());
        self.ask(request).await
    }

    pub async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        object: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body = serde_json::to_vec(object);
        let body = body.map_err(|error| ApiError::Malformed(error.to_string()))?;
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        self.ask(Request::new(path).create(&params, body)).await
    }

    /// Replaces an object; its `metadata.resourceVersion` says which version is meant.
    pub async fn replace<T: DeserializeOwned>(
        &self,
        path: &str,
        name: &str,
        object: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body = serde_json::to_vec(object);
        let body = body.map_err(|error| ApiError::Malformed(error.to_string()))?;
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        self.ask(Request::new(path).replace(name, &params, body))
            .await
    }

    /// Merges `patch` into the status of an object.
    pub async fn patch_status(
        &self,
        path: &str,
        name: &str,
        patch: &serde_json::Value,
    ) -> Result<(), ApiError> {
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        let request =
            Request::new(path).patch_subresource("status", name, &params, &Patch::Merge(patch));
        self.ask::<serde::de::IgnoredAny>(request).await.map(drop)
    }

    /// Deletes an object if it is still the one of that version.
    pub async fn delete(&self, path: &str, name: &str, version: &str) -> Result<(), ApiError> {
        let params = kube::core::params::DeleteParams {
            preconditions: Some(kube::core::params::Preconditions {
                resource_version: Some(version.into()),
                uid: None,
            }),
            ..Default::default()
        };
        let request = Request::new(path).delete(name, &params);
        self.ask::<serde::de::IgnoredAny>(request).await.map(drop)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, ApiError> {
        let request = request.map_err(|error| ApiError::Malformed(error.to_string()))?;
        // Not `Client::request`: it logs a body that it cannot read.
        let text = self.in_time(self.client.request_text(request)).await?;
        let text = zeroize::Zeroizing::new(text);
        serde_json::from_str(&text).map_err(|error| kube::Error::SerdeError(error).into())
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ApiError> {
        match timeout(self.deadlines.answer, answer).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(ApiError::Slow(self.deadlines.answer)),
        }
    }
}
