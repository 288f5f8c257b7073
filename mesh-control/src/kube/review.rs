//! Tokens of service accounts: whom the API server says they belong to, and which node that makes the caller.
//!
//! An agent's token is projected into its pod by the kubelet: bound to the pod, for one audience, for an hour. The API
//! server says (TokenReview) whether it is genuine; [`judge`] decides what that proves. A node that is taken over can ask
//! for what its own pods may have, and for nothing else.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use sha2::{Digest, Sha256};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tonic::Status;
use tracing::warn;

use super::{
    agents::{AgentPods, ServiceAccount},
    api::{Api, ApiError},
    metrics::KubeMetrics,
};
use crate::{authn::Review, credentials::NodeName};

const REVIEWS_PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// What a service account's user name begins with.
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";
/// Claims of a pod's token, as the API server tells them (KEP-4193; node name since Kubernetes 1.30).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Most reviews at a time: a thousand agents that come at once are through in seconds, and the API server has others to
/// serve.
const REVIEWS_MAX: usize = 32;
/// How long a caller waits for its review.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a verdict stands: an agent asks for a certificate per workload, one after the other. That the agent's pod still
/// exists is looked up every time.
const VERDICT_FRESH: Duration = Duration::from_secs(60);
/// How long a verdict stands while the API server cannot be asked, so that its restart stops no renewal.
const VERDICT_STALE_MAX: Duration = Duration::from_secs(10 * 60);
/// Verdicts that are kept: four times the agents that a control plane is built for.
const VERDICTS_MAX: usize = 4_096;

/// An agent that proved which pod it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bearer {
    /// The node of that pod.
    pub node: NodeName,
    namespace: String,
    pod: String,
    uid: String,
}

/// Why a token proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The API server did not make it, or it has expired, or its pod is gone.
    #[error("the API server does not know the token: {0}")]
    Unknown(String),
    /// It was made for somebody else.
    #[error(
        "the token is not meant for {0:?}; look at the audience of the agent's projected token"
    )]
    Audience(String),
    /// It is not an agent's.
    #[error("the token belongs to {0:?}, which is not the service account of an agent")]
    Account(String),
    /// It is not bound to a pod, as tokens of Secrets are.
    #[error("the token is not bound to a pod; use a projected token")]
    Unbound,
    /// Its pod is not known here; perhaps not yet.
    #[error("the pod {0} of the token is not known; if it has just started, this passes")]
    Pod(String),
    /// Pod and claim name different nodes.
    #[error("the token says node {claimed:?}, but its pod runs on {actual}")]
    Node {
        /// The claim.
        claimed: String,
        /// Where the pod runs.
        actual: NodeName,
    },
}

impl Refusal {
    fn to_status(&self) -> Status {
        match self {
            Self::Pod(_) => Status::unavailable(self.to_string()),
            _ => Status::unauthenticated(self.to_string()),
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "unknown",
            Self::Audience(_) => "audience",
            Self::Account(_) => "account",
            Self::Unbound => "unbound",
            Self::Pod(_) => "pod",
            Self::Node { .. } => "node",
        }
    }
}

/// What the API server's answer about a token proves.
///
/// # Errors
/// See [`Refusal`].
pub(super) fn judge(
    status: &TokenReviewStatus,
    audience: &str,
    agents: &AgentPods,
) -> Result<Bearer, Refusal> {
    if status.authenticated != Some(true) {
        let why = status.error.clone().unwrap_or_default();
        return Err(Refusal::Unknown(why));
    }
    // A server that knows nothing of audiences names none, and then the token may be meant for anybody.
    let meant = status.audiences.iter().flatten().any(|it| it == audience);
    if !meant {
        return Err(Refusal::Audience(audience.to_owned()));
    }
    let user = status.user.clone().unwrap_or_default();
    let name = user.username.clone().unwrap_or_default();
    let account = account(&name).filter(|account| agents.is_agent(account));
    let Some(account) = account else {
        return Err(Refusal::Account(name));
    };
    let (Some(pod), Some(uid)) = (claim(&user, POD_NAME), claim(&user, POD_UID)) else {
        return Err(Refusal::Unbound);
    };
    let known = agents
        .get(&account.namespace, pod)
        .filter(|known| known.uid == uid)
        .ok_or_else(|| Refusal::Pod(format!("{}/{pod}", account.namespace)))?;
    // Before 1.30 there is no such claim; the pod alone then says where it runs, and only that pod can bear the token.
    if let Some(claimed) = claim(&user, NODE_NAME)
        && *claimed != *known.node.0
    {
        return Err(Refusal::Node {
            claimed: claimed.to_owned(),
            actual: known.node,
        });
    }
    Ok(Bearer {
        node: known.node,
        namespace: account.namespace,
        pod: pod.to_owned(),
        uid: uid.to_owned(),
    })
}

fn account(user: &str) -> Option<ServiceAccount> {
    let (namespace, name) = user.strip_prefix(ACCOUNT_PREFIX)?.split_once(':')?;
    Some(ServiceAccount {
        namespace: namespace.into(),
        name: name.into(),
    })
}

/// The one value of a claim.
fn claim<'a>(user: &'a UserInfo, name: &str) -> Option<&'a str> {
    match user.extra.as_ref()?.get(name)?.as_slice() {
        [value] if !value.is_empty() => Some(value),
        _ => None,
    }
}

/// A token that was found good.
#[derive(Debug)]
struct Verdict {
    bearer: Bearer,
    at: Instant,
}

/// Asks the API server whose token it is.
pub(super) struct TokenReviewer {
    api: Api,
    audience: String,
    agents: AgentPods,
    metrics: KubeMetrics,
    permits: Semaphore,
    /// By digest, so that no token stays in memory.
    verdicts: Mutex<HashMap<[u8; 32], Verdict>>,
}

impl fmt::Debug for TokenReviewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenReviewer")
            .field("audience", &self.audience)
            .finish_non_exhaustive()
    }
}

impl TokenReviewer {
    pub fn new(api: Api, audience: String, agents: AgentPods, metrics: KubeMetrics) -> Self {
        Self {
            api,
            audience,
            agents,
            metrics,
            permits: Semaphore::new(REVIEWS_MAX),
            verdicts: Mutex::default(),
        }
    }

    async fn reviewed(&self, token: &str) -> Result<Bearer, Status> {
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(bearer) = self.recall(&digest, VERDICT_FRESH, Instant::now()) {
            return self.require_pod(bearer);
        }
        let asked = match timeout(REVIEW_TIMEOUT, self.ask(token)).await {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ApiError::Slow(REVIEW_TIMEOUT)),
        };
        let status = match asked {
            Ok(status) => status,
            Err(error) => {
                self.count("failed");
                if let Some(bearer) = self.recall(&digest, VERDICT_STALE_MAX, Instant::now()) {
                    return self.require_pod(bearer);
                }
                warn!(%error, "cannot review an agent's token");
                return Err(Status::unavailable(
                    "the control plane cannot ask the API server about the token",
                ));
            }
        };
        match judge(&status, &self.audience, &self.agents) {
            Ok(bearer) => {
                self.count("accepted");
                self.keep(digest, bearer.clone(), Instant::now());
                Ok(bearer)
            }
            Err(refusal) => {
                self.count(refusal.label());
                warn!(%refusal, "refused a token");
                Err(refusal.to_status())
            }
        }
    }

    /// Whether the pod of the token still runs where it ran.
    fn runs(&self, bearer: &Bearer) -> bool {
        self.agents
            .get(&bearer.namespace, &bearer.pod)
            .is_some_and(|known| known.uid == bearer.uid && known.node == bearer.node)
    }

    fn require_pod(&self, bearer: Bearer) -> Result<Bearer, Status> {
        if self.runs(&bearer) {
            return Ok(bearer);
        }
        let refusal = Refusal::Pod(format!("{}/{}", bearer.namespace, bearer.pod));
        self.count(refusal.label());
        Err(refusal.to_status())
    }

    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, ApiError> {
        // The semaphore is never closed; were it, the review would go on unbounded, not unreviewed.
        let _permit = self.permits.acquire().await;
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let answer: TokenReview = self.api.create(REVIEWS_PATH, &review).await?;
        Ok(answer.status.unwrap_or_default())
    }

    fn recall(&self, digest: &[u8; 32], not_older: Duration, now: Instant) -> Option<Bearer> {
        let verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = verdicts.get(digest)?;
        (now.duration_since(verdict.at) < not_older).then(|| verdict.bearer.clone())
    }

    fn keep(&self, digest: [u8; 32], bearer: Bearer, now: Instant) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        if verdicts.len() >= VERDICTS_MAX {
            verdicts.retain(|_, verdict| now.duration_since(verdict.at) < VERDICT_STALE_MAX);
        }
        if verdicts.len() < VERDICTS_MAX {
            verdicts.insert(digest, Verdict { bearer, at: now });
        }
    }

    fn count(&self, result: &str) {
        self.metrics
            .token_reviews
            .with_label_values(&[result])
            .inc();
    }
}

#[tonic::async_trait]
impl Review for TokenReviewer {
    async fn review(&self, token: &str) -> Result<Bearer, Status> {
        self.reviewed(token).await
    }

    fn still_valid(&self, bearer: &Bearer) -> bool {
        self.runs(bearer)
    }
}

#[cfg(test)]
#[path = "review_tests.rs"]
mod tests;
