//! `cargo xtask bench`: what the mesh costs, against no mesh and against other meshes.
//!
//! Every repeat builds a fresh lab for every variant, puts the variant's mesh onto it, takes all measurements and
//! removes it again. The order of the variants turns around with each repeat, so that a drift of the machine hits all
//! alike. `docs/bench.md` explains each figure and the contract of a peer's script.

mod figures;
mod measure;
mod mixed;
mod peer;
mod report;
mod scene;
mod weft;

use std::{
    env, fs, os::unix::process::CommandExt as _, path::PathBuf, process::Command, time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    peer::{Part, Peer},
    programs,
};
use nix::unistd::Pid;

use self::{
    figures::{Audience, Figure},
    measure::{MEASUREMENTS, Measurement, Settings},
    mixed::Mixed,
    peer::PeerOption,
    report::Samples,
    scene::{FAR, NEAR, Scene},
    weft::Weft,
};
use crate::{build, shell};

/// Measure the mesh against no mesh, and against others
///
/// Needs root and an otherwise idle machine. Builds optimised programs first, unless WEFT_BIN_DIR names a folder that
/// has them. The table goes to standard output, progress to standard error. Exits with 1 if a measurement failed.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these figures, separated by commas; all when absent
    #[arg(long, value_delimiter = ',', value_parser = figures::parse, value_name = "LIST")]
    figures: Vec<&'static Figure>,

    /// How often everything is measured; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,

    /// Length of one measurement, in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,

    /// Also measure another mesh, which this script puts onto the lab (docs/bench.md); may be repeated
    #[arg(long, value_name = "NAME=SCRIPT")]
    peer: Vec<PeerOption>,

    /// Also measure Weft on one node and another mesh on the other, both ways round: `weft-NAME`, whose clients are
    /// Weft's, and `NAME-weft`; may be repeated
    #[arg(long, value_name = "NAME=SCRIPT")]
    mixed: Vec<PeerOption>,

    /// Write the figures to this file, as a list of JSON objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured against what.
#[derive(Debug)]
enum Variant {
    Direct,
    Weft,
    Peer(PeerOption),
    /// Weft on this node, the peer on the other.
    Mixed(PeerOption, &'static str),
}

impl Variant {
    fn all(options: &Options) -> Vec<Self> {
        let mut variants = vec![Self::Direct, Self::Weft];
        variants.extend(options.peer.iter().cloned().map(Self::Peer));
        for peer in &options.mixed {
            variants.extend([NEAR, FAR].map(|weft| Self::Mixed(peer.clone(), weft)));
        }
        variants
    }

    fn name(&self) -> String {
        let peer = |peer: &PeerOption| peer.name.clone();
        match self {
            Self::Direct => figures::DIRECT.to_owned(),
            Self::Weft => figures::WEFT.to_owned(),
            Self::Peer(option) => peer(option),
            Self::Mixed(option, NEAR) => format!("{}-{}", figures::WEFT, peer(option)),
            Self::Mixed(option, _) => format!("{}-{}", peer(option), figures::WEFT),
        }
    }

    fn takes(&self, figure: &Figure) -> bool {
        match figure.audience {
            Audience::All => true,
            Audience::Meshes => !matches!(self, Self::Direct),
            Audience::Weft => matches!(self, Self::Weft),
        }
    }
}

/// A mesh that is up on a scene.
#[derive(Debug)]
enum Mesh {
    Direct,
    Weft(Box<Weft>),
    Peer(Peer),
    Mixed(Box<Mixed>),
}

impl Mesh {
    /// Puts the variant onto the scene; ready for traffic when it returns.
    fn up(variant: &Variant, scene: &Scene) -> Result<Self> {
        Ok(match variant {
            Variant::Direct => Self::Direct,
            Variant::Weft => Self::Weft(Box::new(Weft::up(scene)?)),
            Variant::Peer(option) => Self::Peer(Peer::up(&option.script, &scene.lab, Part::Whole)?),
            Variant::Mixed(option, weft) => {
                Self::Mixed(Box::new(Mixed::up(&option.script, scene, weft)?))
            }
        })
    }

    /// The proxy processes, for their memory; empty where there are none or they are not known.
    fn proxies(&self) -> Result<Vec<Pid>> {
        match self {
            Self::Direct => Ok(Vec::new()),
            Self::Weft(weft) => Ok(weft.agents()),
            Self::Peer(peer) => peer.proxies(),
            Self::Mixed(mixed) => mixed.proxies(),
        }
    }

    /// Removes what the lab's removal would not.
    fn down(self, scene: &Scene) -> Result<()> {
        match self {
            Self::Direct | Self::Weft(_) => Ok(()),
            Self::Peer(peer) => peer.down(&scene.lab),
            Self::Mixed(mixed) => mixed.down(scene),
        }
    }
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !shell::is_root() {
        bail!("the bench makes network namespaces and needs root");
    }
    if env::var_os(programs::DIRECTORY_VARIABLE).is_none() {
        return with_release_programs();
    }
    let mut variants = Variant::all(options);
    let names: Vec<String> = variants.iter().map(Variant::name).collect();
    let wanted: Vec<&'static Figure> = if options.figures.is_empty() {
        figures::FIGURES.iter().collect()
    } else {
        options.figures.clone()
    };
    let settings = Settings {
        duration: Duration::from_secs(options.seconds),
    };

    let mut samples = Samples::default();
    let mut failures = Vec::new();
    for repeat in 0..options.repeats {
        if repeat > 0 {
            variants.reverse();
        }
        for variant in &variants {
            let what = format!(
                "repeat {} of {}, {}",
                repeat + 1,
                options.repeats,
                variant.name()
            );
            let due: Vec<&Measurement> = MEASUREMENTS
                .iter()
                .filter(|measurement| {
                    let mut figures = measurement.figures.iter();
                    figures.any(|name| {
                        wanted
                            .iter()
                            .any(|figure| figure.name == *name && variant.takes(figure))
                    })
                })
                .collect();
            if due.is_empty() {
                continue;
            }
            if let Err(error) = pass(variant, &due, &settings, &what, &mut samples, &mut failures) {
                failures.push(format!("{what}: {error:#}"));
                eprintln!("!! {what}: {error:#}");
            }
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    finish(options, &wanted, &names, &samples, &failures)
}

/// Builds and starts this command again with the folder of what was built: the lab finds the programs by it.
fn with_release_programs() -> Result<()> {
    build::programs(true)?;
    let this = env::current_exe().context("cannot find the running executable")?;
    let error = Command::new(this)
        .args(env::args_os().skip(1))
        .env(programs::DIRECTORY_VARIABLE, shell::target_directory(true))
        .exec();
    Err(error).context("cannot start the bench again")
}

/// One variant, once: lab, mesh, measurements, removal. A failed measurement does not stop the others.
fn pass(
    variant: &Variant,
    due: &[&Measurement],
    settings: &Settings,
    what: &str,
    samples: &mut Samples,
    failures: &mut Vec<String>,
) -> Result<()> {
    let scene = Scene::build()?;
    let mut mesh = Mesh::up(variant, &scene).context("the mesh does not come up")?;
    for measurement in due {
        eprint!("==> {what}: {} ... ", measurement.title);
        match (measurement.take)(&scene, &mut mesh, settings) {
            Ok(values) => {
                let shown: Vec<String> = values
                    .iter()
                    .map(|value| format!("{} {}", value.figure, report::number(value.value)))
                    .collect();
                eprintln!("{}", shown.join(", "));
                for value in values {
                    let name = value.variant.map_or_else(|| variant.name(), str::to_owned);
                    samples.add(value.figure, &name, value.value);
                }
            }
            Err(error) => {
                eprintln!("FAILED: {error:#}");
                failures.push(format!("{what}: {}: {error:#}", measurement.title));
            }
        }
    }
    mesh.down(&scene)
}

fn finish(
    options: &Options,
    wanted: &[&'static Figure],
    names: &[&str],
    samples: &Samples,
    failures: &[String],
) -> Result<()> {
    let rows = report::rows(wanted, names, samples);
    print!("{}", report::table(wanted, names, &rows));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !failures.is_empty() {
        bail!(
            "{} measurements failed:\n  {}",
            failures.len(),
            failures.join("\n  ")
        );
    }
    Ok(())
}
