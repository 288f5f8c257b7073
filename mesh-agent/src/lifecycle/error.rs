//! Why an agent does not start or cannot do what it was asked.

use std::{io, path::PathBuf};

use super::{handover::HandoverError, records::RecordsError};
use crate::{
    admin::{BindError, LocalSocketError},
    capture::CaptureError,
    discovery::DiscoveryError,
    identity::CertificateError,
    proxy::WorkerError,
};

/// A failure of the agent as a whole.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file or folder.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent uses the run directory.
    #[error(
        "another agent is running with {0}; stop it first, or give this one a --run-dir of its own"
    )]
    Running(PathBuf),
    /// A port of the node.
    #[error(transparent)]
    Listen(#[from] BindError),
    /// The local socket.
    #[error(transparent)]
    LocalSocket(#[from] LocalSocketError),
    /// The runtime or a signal handler.
    #[error("cannot set up {what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The process was started with too few rights. Look at the container's or service's list of capabilities.
    #[error(
        "the process lacks {0}, without which programs cannot be loaded nor namespaces entered; add it to the capabilities it is started with"
    )]
    Capabilities(String),
    /// The cryptographic provider.
    #[error("cannot install the cryptographic provider: another one is installed already")]
    CryptoProvider,
    /// The embedded control plane.
    #[error("control plane: {0}")]
    ControlPlane(String),
    /// A file that the control plane's clients need.
    #[error("{option}: cannot use {path} as {what}: {reason}; {hint}")]
    Credential {
        /// What it should hold.
        what: &'static str,
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What the operator can do.
        hint: &'static str,
    },
    /// The kernel side.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The discovery client.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The certificate client.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// The proxy.
    #[error(transparent)]
    Workers(#[from] WorkerError),
    /// Taking over from a running agent.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// Agents that were replaced still serve connections.
    #[error(
        "agents that were replaced still serve connections (process {0}); wait for them, or end them with SIGTERM, then try again"
    )]
    Draining(String),
    /// The file of enrolments.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

impl AgentError {
    pub(super) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
