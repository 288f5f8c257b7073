//! `mesh-agent`: the node agent of Weft.
//!
//! ```text
//! mesh-agent run --node NAME (--control-plane https://HOST:PORT --control-plane-ca FILE [--token-file FILE] | --standalone DIR)
//! mesh-agent uninstall --node NAME
//! mesh-agent check-config FILE
//! ```

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_agent::{config::AgentConfig, lifecycle, proxy::TunnelCodec, sys, telemetry::logging};

// Long-lived process with many small, short-lived buffers: glibc's allocator keeps what it got.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The node agent of Weft: captures the traffic of enrolled workloads and proxies it.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log, for example `info` or `mesh_agent=debug,info`.
    #[arg(long, global = true, env = "WEFT_AGENT_LOG", default_value = "info")]
    log: String,
    /// How to log.
    #[arg(long, global = true, env = "WEFT_AGENT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl From<LogFormat> for logging::Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// Implementations of the tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Codec {
    /// Our own.
    Native,
    /// The `h2` crate.
    H2,
}

impl From<Codec> for TunnelCodec {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Native => Self::Native,
            Codec::H2 => Self::H2,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent until SIGTERM or SIGINT.
    ///
    /// Stopping leaves the capture of enrolled workloads in place: the kernel refuses their connections (or lets them
    /// pass, by failure mode) until an agent runs again. `uninstall` removes it.
    Run(Box<RunArgs>),
    /// Remove everything that an agent of this node left in the kernel: programs, rules, routes, pins, state files.
    /// The agent must not be running.
    Uninstall(PathArgs),
    /// Check a configuration file and print what the agent would use.
    CheckConfig {
        /// The file.
        file: PathBuf,
    },
}

/// Flags override the configuration file.
#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    paths: PathArgs,
    /// Take over from the agent that runs with the same run directory, if one does, without a lost connection.
    #[arg(long)]
    take_over: bool,
    /// Seconds that the open connections of the agent before get to end by themselves.
    #[arg(long, value_name = "SECONDS")]
    upgrade_drain: Option<u64>,
    /// For tests: pretend that kernel objects have this layout, as a later version of the agent would.
    #[arg(long, hide = true, value_name = "VERSION")]
    kernel_abi: Option<u32>,
    /// `https://HOST:PORT` of the control plane.
    #[arg(long, env = "WEFT_CONTROL_PLANE")]
    control_plane: Option<String>,
    /// PEM file of the roots of the control plane's certificate.
    #[arg(long, value_name = "FILE")]
    control_plane_ca: Option<PathBuf>,
    /// Name in the control plane's certificate, where it is not the host dialled.
    #[arg(long, value_name = "NAME")]
    control_plane_name: Option<String>,
    /// File with this node's token.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Run the control plane inside the agent, on this folder of manifests.
    #[arg(long, value_name = "DIR", conflicts_with = "control_plane")]
    standalone: Option<PathBuf>,
    /// Network of this node; empty is the default one.
    #[arg(long)]
    network: Option<String>,
    /// Cluster of this node.
    #[arg(long)]
    cluster: Option<String>,
    /// First part of every identity.
    #[arg(long)]
    trust_domain: Option<String>,
    /// Workers of the proxy; 0 means one per core.
    #[arg(long)]
    workers: Option<usize>,
    /// Which implementation of HTTP/2 writes the tunnels; peers need not agree.
    #[arg(long, value_enum)]
    tunnel_codec: Option<Codec>,
    /// Where to serve Prometheus metrics.
    #[arg(long, value_name = "IP:PORT")]
    metrics_addr: Option<SocketAddr>,
    /// Where to serve readiness.
    #[arg(long, value_name = "IP:PORT")]
    readiness_addr: Option<SocketAddr>,
    /// Where to serve admin; loopback only.
    #[arg(long, value_name = "IP:PORT")]
    admin_addr: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct PathArgs {
    /// Configuration file (YAML); flags override it.
    #[arg(long, env = "WEFT_AGENT_CONFIG")]
    config: Option<PathBuf>,
    /// Node name, as manifests spell it.
    #[arg(long, env = "NODE_NAME")]
    node: Option<String>,
    /// Folder of the local socket and of state.
    #[arg(long, env = "WEFT_RUN_DIR", value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// cgroup v2 folder below which connections are captured.
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// A bpffs mount, or a folder on one.
    #[arg(long, value_name = "DIR")]
    bpffs_root: Option<PathBuf>,
}

fn main() -> ExitCode {
    sys::keep_memory_small();
    let cli = Cli::parse();
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The last lines are the ones that say why.
struct FlushAtEnd(logging::LogControl);

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        self.0.flush();
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::CheckConfig { file } => {
            let config = AgentConfig::read(&file)?;
            config.validate()?;
            let text = serde_norway::to_string(&config).context("print the configuration")?;
            print!("{text}");
            Ok(())
        }
        Command::Run(args) => {
            let (take_over, run_dir) = (args.take_over, args.paths.run_dir.clone());
            let prepared = prepare(*args, &cli.log, cli.log_format);
            if let (Err(error), true) = (&prepared, take_over) {
                let run_dir = run_dir.unwrap_or_else(|| AgentConfig::default().node.run_dir);
                lifecycle::report_failed_start(&run_dir, &format!("{error:#}"));
            }
            let (config, confined, logs) = prepared?;
            let _flush = FlushAtEnd(logs.clone());
            Ok(lifecycle::run(config, logs, &confined, take_over)?)
        }
        Command::Uninstall(paths) => {
            let config = path_config(paths)?;
            anyhow::ensure!(!config.node.name.is_empty(), "name the node with --node");
            let _flush = FlushAtEnd(logging::init(&cli.log, cli.log_format.into())?);
            require_root()?;
            sys::netns::remember_home().context("open the agent's own network namespace")?;
            Ok(lifecycle::uninstall(&config)?)
        }
    }
}

/// Everything that can be wrong before anything is touched.
fn prepare(
    args: RunArgs,
    log: &str,
    format: LogFormat,
) -> anyhow::Result<(AgentConfig, lifecycle::Confined, logging::LogControl)> {
    let config = run_config(args)?;
    config.validate()?;
    require_root()?;
    let confined = lifecycle::confine()?;
    let logs = logging::init(log, format.into())?;
    sys::netns::remember_home().context("open the agent's own network namespace")?;
    Ok((config, confined, logs))
}

fn path_config(paths: PathArgs) -> anyhow::Result<AgentConfig> {
    let mut config = match &paths.config {
        Some(file) => AgentConfig::read(file)?,
        None => AgentConfig::default(),
    };
    override_with(&mut config.node.name, paths.node);
    override_with(&mut config.node.run_dir, paths.run_dir);
    override_with(&mut config.kernel.cgroup_root, paths.cgroup_root);
    override_with(&mut config.kernel.bpffs_root, paths.bpffs_root);
    Ok(config)
}

fn run_config(args: RunArgs) -> anyhow::Result<AgentConfig> {
    let mut config = path_config(args.paths)?;
    override_with(&mut config.control_plane.address, args.control_plane);
    override_with(&mut config.control_plane.ca_file, args.control_plane_ca);
    config.control_plane.server_name = args.control_plane_name.or(config.control_plane.server_name);
    config.control_plane.token_file = args.token_file.or(config.control_plane.token_file);
    config.control_plane.standalone = args.standalone.or(config.control_plane.standalone);
    override_with(&mut config.node.network, args.network);
    override_with(&mut config.node.cluster, args.cluster);
    override_with(&mut config.node.trust_domain, args.trust_domain);
    override_with(&mut config.proxy.workers, args.workers);
    override_with(
        &mut config.proxy.tunnel_codec,
        args.tunnel_codec.map(TunnelCodec::from),
    );
    override_with(&mut config.proxy.upgrade_drain_seconds, args.upgrade_drain);
    override_with(&mut config.kernel.abi, args.kernel_abi);
    override_with(&mut config.listen.metrics, args.metrics_addr);
    override_with(&mut config.listen.readiness, args.readiness_addr);
    override_with(&mut config.listen.admin, args.admin_addr);
    Ok(config)
}

fn override_with<T>(setting: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *setting = value;
    }
}

fn require_root() -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "must run as root: loading eBPF programs and entering network namespaces need CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
    );
    Ok(())
}
