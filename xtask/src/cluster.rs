//! `cargo xtask cluster`: a Kubernetes to test on.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    cluster::{self, Choice, Cluster, DEFAULT_NAME, NAME_VARIABLE, local},
    netns, programs,
};

use crate::{
    build, image,
    setup::{self, Need, kubernetes},
    shell::{say, target_directory},
    test,
};

/// Registry and tag of the images that the tests use: `localhost/weft/agent:test`.
const REGISTRY: &str = "localhost";
const TAG: &str = "test";

/// Start and use a Kubernetes cluster, and run the cluster tests on it
///
/// Which: the cluster of KUBECONFIG where that is set, else one made by kind where kind is installed, else a local one of our
/// own: two nodes as network namespaces of this machine, without a container engine. The local one needs root and installs
/// what it lacks: Debian packages, helm, and Go with which it builds the servers of Kubernetes once.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The cluster's name: 4 to 16 lower-case letters and digits; everything of a local one bears it
    #[arg(long, default_value = DEFAULT_NAME, global = true)]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Start a cluster
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
    },
    /// Remove it, and whatever a start that failed has left
    Down,
    /// Run kubectl as the cluster's administrator
    #[command(disable_help_flag = true)]
    Kubectl {
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run helm as the cluster's administrator
    #[command(disable_help_flag = true)]
    Helm {
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run a command in the network namespace of a local cluster's node (`node1`) or control plane (`ctl`)
    On {
        /// Where
        place: String,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Load image archives on every node; without one, build Weft's own images (unoptimised) and load those
    Image {
        /// OCI archives
        archives: Vec<PathBuf>,
    },
    /// Kill a server of a local cluster and start it again: etcd, apiserver, controllers, scheduler, kubelet-node1, …
    Restart {
        /// Which
        server: String,
    },
    /// Run the cluster tests, on a cluster that is started for them unless it is up
    Test {
        /// Only tests whose name contains this
        #[arg(long)]
        filter: Option<String>,
        /// Leave the cluster up
        #[arg(long)]
        keep: bool,
    },
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let name = &options.name;
    match &options.action {
        Action::Up { nodes } => up(name, *nodes).map(drop),
        Action::Down => Cluster::down(name),
        Action::Kubectl { arguments } => {
            client(name, Command::new(cluster::kubectl()?).args(arguments))
        }
        Action::Helm { arguments } => {
            let helm = programs::tool("helm").context("helm is missing (cargo xtask setup)")?;
            client(name, Command::new(helm).args(arguments))
        }
        Action::On { place, command } => on(name, place, command),
        Action::Image { archives } if archives.is_empty() => {
            build::programs(false)?;
            load_own_images(&open(name)?)
        }
        Action::Image { archives } => {
            let cluster = open(name)?;
            archives
                .iter()
                .try_for_each(|archive| cluster.load_image(archive))
        }
        Action::Restart { server } => match open(name)? {
            Cluster::Local(local) => local.restart(server),
            _ => bail!("only a local cluster's servers are ours to restart"),
        },
        Action::Test { filter, keep } => test(name, filter.as_deref(), *keep),
    }
}

fn open(name: &str) -> Result<Cluster> {
    Cluster::open(name)?
        .with_context(|| format!("no cluster {name} is up (cargo xtask cluster up)"))
}

/// Says which kind of cluster it takes, and why.
fn up(name: &str, nodes: u8) -> Result<Cluster> {
    setup::ensure(&[Need::Chart])?;
    match Cluster::choice() {
        Choice::Given => say("using the cluster of KUBECONFIG"),
        Choice::Kind => say("kind is installed: starting a cluster with it"),
        Choice::Local => {
            say("neither KUBECONFIG nor kind: starting a local cluster");
            setup::ensure(&[Need::Lab, Need::Cluster])?;
            kubernetes::ensure()?;
        }
    }
    let cluster = Cluster::up(name, nodes)?;
    say(&format!(
        "cluster {name} is up; its access: {}",
        cluster.kubeconfig().display()
    ));
    Ok(cluster)
}

fn client(name: &str, command: &mut Command) -> Result<()> {
    let cluster = open(name)?;
    command.env("KUBECONFIG", cluster.kubeconfig());
    if !cluster.interactive(command)? {
        bail!("{} failed", command.get_program().to_string_lossy());
    }
    Ok(())
}

fn on(name: &str, place: &str, words: &[OsString]) -> Result<()> {
    let Cluster::Local(local) = open(name)? else {
        bail!("only a local cluster's nodes are namespaces of this machine");
    };
    let (program, arguments) = words.split_first().context("no command")?;
    let status = netns::within(&local.netns(place), || {
        Command::new(program).args(arguments).status()
    })?;
    if !status?.success() {
        bail!("{} failed", program.to_string_lossy());
    }
    Ok(())
}

fn load_own_images(cluster: &Cluster) -> Result<()> {
    let folder = image::default_folder();
    let programs = target_directory(false);
    for written in image::write(&programs, REGISTRY, TAG, &folder)? {
        cluster.load_image(&written.path)?;
    }
    Ok(())
}

/// Every cluster test shares one cluster: they tidy up after themselves, and starting one takes longer than most of them.
fn test(name: &str, filter: Option<&str>, keep: bool) -> Result<()> {
    setup::ensure(&[Need::Build])?;
    build::programs_and_tests()?;
    let (cluster, was_up) = match Cluster::open(name)? {
        Some(cluster) => (cluster, true),
        None => (up(name, 2)?, false),
    };
    let outcome = environment(name, &cluster).and_then(|environment| {
        load_own_images(&cluster)?;
        test::cluster(&cluster, &environment, filter)
    });
    if keep || was_up {
        say(&format!(
            "cluster {name} stays up; remove it with: cargo xtask cluster down --name {name}"
        ));
        return outcome;
    }
    outcome.and(Cluster::down(name))
}

/// What the tests are told: which cluster, how to reach and to restart its API server, and where the servers of a local one are.
fn environment(name: &str, cluster: &Cluster) -> Result<Vec<(&'static str, OsString)>> {
    let mut environment = vec![
        (NAME_VARIABLE, name.into()),
        ("WEFT_TEST_KUBECONFIG", cluster.kubeconfig().into()),
        (local::SERVERS_VARIABLE, local::servers_directory().into()),
    ];
    if let Cluster::Local(_) = cluster {
        let ourselves = env::current_exe().context("cannot find this program")?;
        let restart = format!(
            "{} cluster --name {name} restart apiserver",
            ourselves.display()
        );
        environment.push(("WEFT_TEST_RESTART", restart.into()));
    }
    Ok(environment)
}
