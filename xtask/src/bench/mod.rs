//! `cargo xtask bench`: what the mesh costs, against no mesh and against other meshes.
//!
//! Every repeat builds a fresh lab for every variant, puts the variant's mesh onto it, takes all measurements and
//! removes it again. The order of the variants turns around with each repeat, so that a drift of the machine hits all
//! alike. `docs/bench.md` explains each figure and the contract of a peer's script.

mod figures;
mod measure;
mod mixed;
mod neighbour;
mod peer;
mod report;
mod scale;
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
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

use self::{
    figures::{Audience, Bound, Figure, Selection},
    measure::{MEASUREMENTS, Measurement, Settings, Stage},
    mixed::Mixed,
    peer::PeerOption,
    report::{Comparison, Samples},
    scene::{FAR, NEAR, Scene},
    weft::Weft,
};
use crate::{build, shell};

/// Measure the mesh against no mesh, and against others
///
/// Needs root and an otherwise idle machine. Builds optimised programs first, unless WEFT_BIN_DIR names a folder that
/// has them. The tables go to standard output, progress to standard error. Exits with 1 if a measurement failed.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these figures, separated by commas; all but those of `scale` when absent, which names a whole group
    #[arg(long, value_delimiter = ',', value_parser = figures::parse, value_name = "LIST")]
    figures: Vec<Selection>,

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

    /// Also measure Weft with this implementation of the tunnels, as a variant of its own; may be repeated
    #[arg(long, value_enum, value_name = "NAME")]
    codec: Vec<Codec>,

    /// Write the figures to this file, as a list of JSON objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Also exit with 1 if a promise is missed
    #[arg(long)]
    strict: bool,
}

/// Descriptors that every process may have, as container runtimes allow: 10,000 connections need more than many
/// shells do.
const DESCRIPTORS: u64 = 1_048_576;

/// An implementation of the tunnels, as the agent's `--tunnel-codec` knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Codec {
    Native,
    H2,
}

impl Codec {
    fn argument(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::H2 => "h2",
        }
    }

    fn variant(self) -> &'static str {
        match self {
            Self::Native => figures::WEFT_NATIVE,
            Self::H2 => figures::WEFT_H2,
        }
    }
}

/// What is measured against what.
#[derive(Debug)]
enum Variant {
    Direct,
    /// With its default codec, or a given one.
    Weft(Option<Codec>),
    Peer(PeerOption),
    /// Weft on this node, the peer on the other.
    Mixed(PeerOption, &'static str),
}

impl Variant {
    fn all(options: &Options) -> Vec<Self> {
        let mut variants = vec![Self::Direct, Self::Weft(None)];
        let codecs = options.codec.iter();
        variants.extend(codecs.map(|codec| Self::Weft(Some(*codec))));
        variants.extend(options.peer.iter().cloned().map(Self::Peer));
        for peer in &options.mixed {
            variants.extend([NEAR, FAR].map(|weft| Self::Mixed(peer.clone(), weft)));
        }
        variants
    }

    fn name(&self) -> String {
        match self {
            Self::Direct => figures::DIRECT.to_owned(),
            Self::Weft(None) => figures::WEFT.to_owned(),
            Self::Weft(Some(codec)) => codec.variant().to_owned(),
            Self::Peer(peer) => peer.name.clone(),
            Self::Mixed(peer, NEAR) => format!("{}-{}", figures::WEFT, peer.name),
            Self::Mixed(peer, _) => format!("{}-{}", peer.name, figures::WEFT),
        }
    }

    /// What it is compared with Weft for; where Weft is at one end only, with the other mesh at both.
    fn comparison(&self) -> Option<Comparison> {
        if let Self::Mixed(peer, _) = self {
            return Some(Comparison {
                one: self.name(),
                other: peer.name.clone(),
                promise: |figure| figure.to_peer.map(Bound::no_worse),
            });
        }
        let promise: fn(&Figure) -> Option<Bound> = match self {
            Self::Direct => |figure| figure.to_direct,
            Self::Weft(None) => return None,
            Self::Weft(Some(_)) | Self::Mixed(..) => |_| None,
            Self::Peer(_) => |figure| figure.to_peer,
        };
        Some(Comparison {
            one: figures::WEFT.to_owned(),
            other: self.name(),
            promise,
        })
    }

    fn takes(&self, figure: &Figure) -> bool {
        match figure.audience {
            Audience::All => true,
            Audience::Meshes => !matches!(self, Self::Direct),
            Audience::Weft => matches!(self, Self::Weft(_)),
            Audience::Scale => false,
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
            Variant::Weft(codec) => Self::Weft(Box::new(Weft::up(scene, *codec)?)),
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
    let comparisons: Vec<Comparison> = variants.iter().filter_map(Variant::comparison).collect();
    let wanted: Vec<&'static Figure> = if options.figures.is_empty() {
        figures::default_selection()
    } else {
        let selected = options.figures.iter();
        selected.flat_map(|selection| selection.0.clone()).collect()
    };
    raise_descriptor_limit()?;
    let mut run = Run {
        settings: Settings {
            duration: Duration::from_secs(options.seconds),
        },
        repeats: options.repeats,
        samples: Samples::default(),
        failures: Vec::new(),
    };
    for repeat in 0..options.repeats {
        if repeat > 0 {
            variants.reverse();
        }
        for variant in &variants {
            for stage in [Stage::Few, Stage::Crowd] {
                run.variant(repeat, variant, stage, &wanted);
            }
        }
        let is_scale = |figure: &&Figure| figure.audience == Audience::Scale;
        if wanted.iter().any(is_scale) {
            run.scale(repeat);
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    finish(options, &wanted, &names, &comparisons, run)
}

/// For us and all that we start, as far as we may: a machine can withhold CAP_SYS_RESOURCE from root.
fn raise_descriptor_limit() -> Result<()> {
    if setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).is_err() {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        shell::say(&format!(
            "the limit of file descriptors cannot be raised above {most}"
        ));
    }
    Ok(())
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

/// What has been measured so far.
#[derive(Debug)]
struct Run {
    settings: Settings,
    repeats: u32,
    samples: Samples,
    failures: Vec<String>,
}

impl Run {
    /// One variant, once: lab, mesh, measurements, removal. A failure does not stop the others.
    fn variant(&mut self, repeat: u32, variant: &Variant, stage: Stage, wanted: &[&Figure]) {
        let wants = |name: &&'static str| {
            let mut wanted = wanted.iter();
            wanted.any(|figure| figure.name == *name && variant.takes(figure))
        };
        let due: Vec<&Measurement> = MEASUREMENTS
            .iter()
            .filter(|measurement| {
                measurement.stage == stage && measurement.figures.iter().any(wants)
            })
            .collect();
        if due.is_empty() {
            return;
        }
        if let Err(error) = self.measure(repeat, variant, stage, &due) {
            self.failed(repeat, &variant.name(), &format!("{error:#}"));
        }
    }

    fn measure(
        &mut self,
        repeat: u32,
        variant: &Variant,
        stage: Stage,
        due: &[&Measurement],
    ) -> Result<()> {
        let scene = Scene::build(stage == Stage::Crowd)?;
        let mut mesh = Mesh::up(variant, &scene).context("the mesh does not come up")?;
        for measurement in due {
            eprint!(
                "==> repeat {} of {}, {}: {} ... ",
                repeat + 1,
                self.repeats,
                variant.name(),
                measurement.title
            );
            match (measurement.take)(&scene, &mut mesh, &self.settings) {
                Ok(values) => self.take(repeat, &variant.name(), values),
                Err(error) => {
                    let text = format!("{}: {error:#}", measurement.title);
                    self.failed(repeat, &variant.name(), &text);
                }
            }
        }
        mesh.down(&scene)
    }

    /// The large node and mesh, once.
    fn scale(&mut self, repeat: u32) {
        eprint!("==> repeat {} of {}, scale ... ", repeat + 1, self.repeats);
        match scale::measure() {
            Ok(values) => self.take(repeat, figures::WEFT, values),
            Err(error) => self.failed(repeat, figures::SCALE, &format!("{error:#}")),
        }
    }

    fn take(&mut self, repeat: u32, variant: &str, values: Vec<measure::Value>) {
        let shown: Vec<String> = values
            .iter()
            .map(|value| format!("{} {}", value.figure, report::number(value.value)))
            .collect();
        eprintln!("{}", shown.join(", "));
        for value in values {
            let variant = value.variant.unwrap_or(variant);
            self.samples.add(repeat, value.figure, variant, value.value);
        }
    }

    fn failed(&mut self, repeat: u32, what: &str, error: &str) {
        eprintln!("FAILED: {error}");
        let repeat = repeat + 1;
        self.failures
            .push(format!("repeat {repeat}, {what}: {error}"));
    }
}

fn finish(
    options: &Options,
    wanted: &[&'static Figure],
    names: &[&str],
    comparisons: &[Comparison],
    mut run: Run,
) -> Result<()> {
    run.samples.derive_added(names);
    let rows = report::rows(wanted, names, comparisons, &run.samples);
    let tables = report::tables(wanted, names, comparisons, &rows);
    print!("{tables}");
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let missed = report::missed(&rows);
    if !missed.is_empty() {
        let (count, list) = (missed.len(), missed.join("\n  "));
        eprintln!("{count} promises missed:\n  {list}");
    }
    if !run.failures.is_empty() {
        bail!(
            "{} measurements failed:\n  {}",
            run.failures.len(),
            run.failures.join("\n  ")
        );
    }
    if options.strict && !missed.is_empty() {
        bail!("{} promises missed", missed.len());
    }
    Ok(())
}
