//! `mesh-control`: the control plane of Weft as a process of its own.
//!
//! ```text
//! mesh-control run --source DIR --listen ADDR --ca-dir DIR --node-tokens FILE [--last-good DIR] [--tls-name NAME]...
//!                  [--metrics-addr ADDR] [--trust-domain NAME] [--cluster-id NAME] [--cluster-domain NAME]
//!                  [--root-namespace NAME] [--network NAME] [--leaf-max-lifetime SECONDS]
//!                  [--log FILTER] [--log-format text|json]
//! mesh-control run --source kubernetes --listen ADDR [--kubeconfig FILE] [--namespace NAME] [--replica NAME]
//!                  [--ca-secret NAME] [--ca-create true|false] [--agent-account NAMESPACE/NAME]... (and the above)
//! mesh-control validate DIR
//! ```
//!
//! Every flag is also read from an environment variable: `WEFT_CONTROL_` and the flag's name in capitals, dashes as
//! underscores (`WEFT_CONTROL_NODE_TOKENS`). Two are read from what a pod's manifest usually sets: `--namespace` from
//! `POD_NAMESPACE`, `--replica` from `POD_NAME`.
//!
//! # Files
//! - `--source DIR`: manifests, `*.yaml`, `*.yml` and `*.json` directly in the folder; hidden files and other names are
//!   ignored. The folder is watched. `docs/manifests.md` describes the kinds. `validate DIR` prints every problem
//!   of such a folder, one a line, and exits with 1 if there is any (2: the folder cannot be read).
//! - `--ca-dir DIR`: the certificate authority. Made at the first start (folder mode 0700) when `DIR` holds neither file:
//!   - `ca-key.pem`: its private key, PKCS#8, mode 0600. The only key that a control plane keeps on disk.
//!   - `ca-cert.pem`: its certificate. To use an authority of your own, put both files there before the first start.
//!   - `roots.pem` (optional, yours): further roots that are trusted, for the overlap while roots change. Required
//!     when `ca-cert.pem` is an intermediate.
//!   - `root-cert.pem`: written at every start: all trusted roots. **Give this file to the agents**; it holds no secret.
//! - `--last-good DIR` (default: `last-good` in `--ca-dir`): the last good objects of every manifest file, so that a file
//!   that is broken when the control plane restarts costs nothing. Nobody but the control plane writes there; it may
//!   be removed while the control plane is stopped.
//! - `--node-tokens FILE`: credentials of nodes. One per line: `<token> <node name>`, separated by blanks; `#` begins a
//!   comment line. A token is 16 to 512 printable ASCII characters without blanks; `openssl rand -hex 32` makes a good one.
//!   The node name is what manifests say in `spec.nodeName` (Pods) or `spec.node` (ExternalWorkloads). Two lines may
//!   give one node two tokens, to change them without a gap. The file must not be accessible to others (mode 0600 or
//!   0640) and is read again when it changes; a token that is gone ends its streams within seconds.
//!   An agent sends its token as `authorization: Bearer <token>`; its own token file holds the token alone.
//!
//! # Addresses
//! - `--listen`: discovery (delta ADS) and certificates, gRPC over TLS 1.3. The serving certificate is issued from the own
//!   authority for `localhost`, `127.0.0.1`, `::1`, the listening address and every `--tls-name` (a DNS name or an IP
//!   address), and renewed before it expires.
//! - `--metrics-addr` (optional): plain HTTP, `/metrics` (Prometheus text), `/healthz`, and `/readyz`: whether agents are
//!   served, or what is waited for.
//!
//! # In a cluster
//! With `--source kubernetes` the API server takes the place of the folder, a Secret that of `--ca-dir`, and projected tokens
//! of service accounts that of `--node-tokens`. `docs/control-plane.md` describes it.
//!
//! On SIGINT or SIGTERM it ends its streams and exits with 0. It prints `listening on ADDR` to the log once it serves.

use std::{
    collections::BTreeSet, io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum, error::ErrorKind};
use mesh_api::one_line::OneLine;
use mesh_control::{
    ControlHandle, ControlPlane,
    config::{
        CaConfig, ControlConfig, DEFAULT_LEAF_MAX_LIFETIME, MeshConfig, NodesConfig, ServerConfig,
        SourceConfig,
    },
    files::FilesSource,
    kube::{
        self, AgentsConfig, ClusterConfig, KubernetesConfig, KubernetesHandle, SecretCaConfig,
        ServiceAccount,
    },
};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

/// Where the last good objects are kept, in the authority's folder.
const LAST_GOOD_FOLDER: &str = "last-good";

/// The control plane of Weft: tells agents what exists and what is allowed, and signs certificates.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve agents until SIGINT or SIGTERM.
    Run(Box<RunArgs>),
    /// Print every problem of a folder of manifests; exit with 1 if there is any.
    Validate {
        /// The folder.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// The value of `--source` that is no folder. (A folder of that name is `./kubernetes`.)
const KUBERNETES: &str = "kubernetes";

#[derive(Debug, Args)]
struct RunArgs {
    /// Folder of manifests (*.yaml, *.yml, *.json), watched; or `kubernetes`: the API server of a cluster.
    #[arg(long, value_name = "DIR|kubernetes", env = "WEFT_CONTROL_SOURCE")]
    source: PathBuf,
    /// Address for agents: discovery and certificates over TLS.
    #[arg(
        long,
        value_name = "ADDR",
        env = "WEFT_CONTROL_LISTEN",
        default_value = "127.0.0.1:15012"
    )]
    listen: SocketAddr,
    /// Folder of the certificate authority; made at the first start. Required with a folder of manifests.
    #[arg(long, value_name = "DIR", env = "WEFT_CONTROL_CA_DIR")]
    ca_dir: Option<PathBuf>,
    /// Folder in which the last good objects of every manifest are kept over restarts [default: last-good in --ca-dir].
    #[arg(long, value_name = "DIR", env = "WEFT_CONTROL_LAST_GOOD")]
    last_good: Option<PathBuf>,
    /// File of node credentials: lines `<token> <node name>`, mode 0600. Required with a folder of manifests.
    #[arg(long, value_name = "FILE", env = "WEFT_CONTROL_NODE_TOKENS")]
    node_tokens: Option<PathBuf>,
    #[command(flatten, next_help_heading = "With --source kubernetes")]
    cluster: ClusterArgs,
    /// DNS name or IP address that agents dial, beside localhost and the listening address. Repeatable.
    #[arg(
        long = "tls-name",
        value_name = "NAME",
        env = "WEFT_CONTROL_TLS_NAME",
        value_delimiter = ','
    )]
    tls_names: Vec<String>,
    /// Address for /metrics and /healthz, plain HTTP. Off by default.
    #[arg(long, value_name = "ADDR", env = "WEFT_CONTROL_METRICS_ADDR")]
    metrics_addr: Option<SocketAddr>,
    #[command(flatten)]
    mesh: MeshArgs,
    /// Longest lifetime of a workload certificate, in seconds.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "WEFT_CONTROL_LEAF_MAX_LIFETIME",
        default_value_t = DEFAULT_LEAF_MAX_LIFETIME.as_secs()
    )]
    leaf_max_lifetime: u64,
    /// What to log: a level, or a filter such as `info,mesh_control::xds=debug`.
    #[arg(
        long,
        value_name = "FILTER",
        env = "WEFT_CONTROL_LOG",
        default_value = "info"
    )]
    log: String,
    /// Form of the log.
    #[arg(long, env = "WEFT_CONTROL_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Debug, Args)]
struct ClusterArgs {
    /// How to reach the API server; without it, as the pod that this process runs in.
    #[arg(long, value_name = "FILE", env = "WEFT_CONTROL_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of the control plane's own objects: Lease, Secret and trust bundle.
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAMESPACE",
        default_value = "weft-system"
    )]
    namespace: String,
    /// Lease with which the replicas elect the one that writes.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_LEASE",
        default_value = "weft-control"
    )]
    lease: String,
    /// Name of this replica, different for each. Default: the host's name, which in a pod is the pod's.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    replica: Option<String>,
    /// Secret with the certificate authority.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_CA_SECRET",
        default_value = "weft-ca"
    )]
    ca_secret: String,
    /// Make that Secret where it does not exist; `false` where cert-manager or you make it.
    #[arg(
        long,
        value_name = "BOOL",
        env = "WEFT_CONTROL_CA_CREATE",
        default_value_t = true,
        action = clap::ArgAction::Set
    )]
    ca_create: bool,
    /// ConfigMap in which the trusted roots are published, for agents to mount.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_CA_BUNDLE",
        default_value = "weft-roots"
    )]
    ca_bundle: String,
    /// Service account of the agents' pods. Repeatable. Default: weft-agent in --namespace.
    #[arg(
        long = "agent-account",
        value_name = "NAMESPACE/NAME",
        env = "WEFT_CONTROL_AGENT_ACCOUNT",
        value_delimiter = ',',
        value_parser = service_account
    )]
    agent_accounts: Vec<ServiceAccount>,
    /// Audience of the agents' projected tokens.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_TOKEN_AUDIENCE",
        default_value = "weft"
    )]
    token_audience: String,
}

fn service_account(text: &str) -> Result<ServiceAccount, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(ServiceAccount {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            })
        }
        _ => Err("must be NAMESPACE/NAME".to_owned()),
    }
}

#[derive(Debug, Args)]
struct MeshArgs {
    /// First part of every identity.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_TRUST_DOMAIN",
        default_value = "cluster.local"
    )]
    trust_domain: String,
    /// First part of every workload's uid.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_CLUSTER_ID",
        default_value = "Kubernetes"
    )]
    cluster_id: String,
    /// DNS suffix of services.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_CLUSTER_DOMAIN",
        default_value = "cluster.local"
    )]
    cluster_domain: String,
    /// Namespace whose policies apply to the whole mesh.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_ROOT_NAMESPACE",
        default_value = "weft-system"
    )]
    root_namespace: String,
    /// Network of workloads that name none.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROL_NETWORK",
        default_value = ""
    )]
    network: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl From<MeshArgs> for MeshConfig {
    fn from(args: MeshArgs) -> Self {
        Self {
            trust_domain: args.trust_domain,
            cluster_id: args.cluster_id,
            cluster_domain: args.cluster_domain,
            root_namespace: args.root_namespace,
            network: args.network,
        }
    }
}

/// What is to be run.
enum Plan {
    Files(Box<ControlConfig>),
    Kubernetes(Box<KubernetesConfig>),
}

/// What runs.
enum Running {
    Files(ControlHandle),
    Kubernetes(KubernetesHandle),
}

impl RunArgs {
    fn plan(self) -> anyhow::Result<Plan> {
        let server = ServerConfig {
            listen: self.listen,
            tls_names: self.tls_names,
            metrics: self.metrics_addr,
        };
        let leaf_max_lifetime = Duration::from_secs(self.leaf_max_lifetime);
        if self.source.as_os_str() == KUBERNETES {
            let config = self
                .cluster
                .config(server, self.mesh.into(), leaf_max_lifetime)?;
            return Ok(Plan::Kubernetes(Box::new(config)));
        }
        let (Some(ca_dir), Some(node_tokens)) = (self.ca_dir, self.node_tokens) else {
            let message = "a folder of manifests needs --ca-dir and --node-tokens as well";
            Cli::command()
                .error(ErrorKind::MissingRequiredArgument, message)
                .exit();
        };
        Ok(Plan::Files(Box::new(ControlConfig {
            source: SourceConfig {
                folder: self.source,
                last_good: Some(
                    self.last_good
                        .unwrap_or_else(|| ca_dir.join(LAST_GOOD_FOLDER)),
                ),
            },
            server,
            ca: CaConfig {
                folder: Some(ca_dir),
                leaf_max_lifetime,
            },
            nodes: NodesConfig {
                tokens: Some(node_tokens),
            },
            mesh: self.mesh.into(),
        })))
    }
}

impl ClusterArgs {
    fn config(
        self,
        server: ServerConfig,
        mesh: MeshConfig,
        leaf_max_lifetime: Duration,
    ) -> anyhow::Result<KubernetesConfig> {
        let replica = match self.replica {
            Some(replica) => replica,
            None => nix::unistd::gethostname()
                .context("cannot read the host's name; set --replica")?
                .to_string_lossy()
                .into_owned(),
        };
        let mut accounts: BTreeSet<_> = self.agent_accounts.into_iter().collect();
        if accounts.is_empty() {
            accounts.insert(ServiceAccount {
                namespace: self.namespace.clone(),
                name: "weft-agent".to_owned(),
            });
        }
        Ok(KubernetesConfig {
            cluster: ClusterConfig {
                kubeconfig: self.kubeconfig,
                namespace: self.namespace,
                lease: self.lease,
                replica,
            },
            server,
            ca: SecretCaConfig {
                secret: self.ca_secret,
                create: self.ca_create,
                bundle: self.ca_bundle,
                leaf_max_lifetime,
            },
            agents: AgentsConfig {
                accounts,
                audience: self.token_audience,
            },
            mesh,
        })
    }
}

impl Plan {
    async fn start(self) -> anyhow::Result<Running> {
        let registry = prometheus::Registry::new();
        Ok(match self {
            Self::Files(config) => Running::Files(ControlPlane::start(*config, registry).await?),
            Self::Kubernetes(config) => Running::Kubernetes(kube::start(*config, registry).await?),
        })
    }
}

impl Running {
    async fn shutdown(self) {
        match self {
            Self::Files(control) => control.shutdown().await,
            Self::Kubernetes(control) => control.shutdown().await,
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Validate { folder } => validate(&folder),
        Command::Run(args) => match run(*args).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("mesh-control: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

/// The authority's key is in this process: no core dump holds it, and no debugger of the same user reads it.
fn keep_the_key_in_memory() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot forbid core dumps")?;
    prctl::set_dumpable(false).context("cannot protect the memory of this process")
}

fn validate(folder: &std::path::Path) -> ExitCode {
    let (source, changes) =
        match FilesSource::open(folder, &MeshConfig::default().root_namespace, None) {
            Ok(opened) => opened,
            Err(error) => {
                eprintln!("mesh-control: {error}");
                return ExitCode::from(2);
            }
        };
    let problems = source.problems();
    for problem in &problems {
        println!("{problem}");
    }
    if problems.is_empty() {
        println!("{} objects, no problems", changes.len());
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}

/// A thousand agents with two connections each exceed the usual soft limit.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of file descriptors");
    }
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).context("--log is not a filter")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => log.with_writer(|| OneLine(std::io::stderr())).init(),
        LogFormat::Json => log.with_writer(std::io::stderr).json().init(),
    }
    raise_descriptor_limit();
    keep_the_key_in_memory()?;
    // Before anything is started, so that a signal during the start is not lost.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let control = args.plan()?.start().await?;
    tokio::select! {
        _ = interrupt.recv() => info!("SIGINT: stopping"),
        _ = terminate.recv() => info!("SIGTERM: stopping"),
    }
    control.shutdown().await;
    Ok(())
}
