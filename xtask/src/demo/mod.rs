//! `cargo xtask demo`: Weft at work, with evidence.

mod report;
mod scenes;
mod world;

use std::time::Instant;

use anyhow::{Result, bail};
use mesh_tests::{capture::LinkCapture, mesh::Mesh, programs};

use self::{report::Report, world::World};
use crate::{
    build,
    setup::{self, Need},
    shell::{is_root, say, target_directory},
};

/// Show Weft at work: unmodified programs in two nodes talk through it, with evidence
///
/// Builds two nodes and six pods as network namespaces, runs curl, nginx, redis and iperf3 as Debian ships them, first
/// without and then with the mesh, and shows who talked to whom with which identity, that only TLS crossed the link, a
/// denied identity being refused, failover, and latency with and without. Needs root. Installs missing Debian packages
/// and builds the programs first. Exit code 0 only if all of it held. Ctrl-C removes everything.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Leave everything up at the end and say how to play with it
    #[arg(long)]
    keep: bool,
    /// Print the report as one JSON object on standard output; progress goes to standard error
    #[arg(long)]
    json: bool,
    /// Use unoptimised programs: quicker to build, but its latencies mean nothing
    #[arg(long)]
    dev: bool,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::default();
    let outcome = prepare(!options.dev).and_then(|()| {
        let began = Instant::now();
        let outcome = perform(options, &mut report);
        report.seconds = began.elapsed().as_secs_f64();
        outcome
    });
    report.error = outcome.err().map(|error| format!("{error:#}"));
    report.conclude();
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.text());
    }
    if !report.passed {
        bail!("the demo did not hold");
    }
    Ok(())
}

fn prepare(release: bool) -> Result<()> {
    if !is_root() {
        bail!("the demo makes network namespaces and loads eBPF programs: run it as root");
    }
    setup::ensure(&[Need::Build, Need::Lab])?;
    build::programs(release)?;
    programs::use_directory(&target_directory(release))
}

fn perform(options: &Options, report: &mut Report) -> Result<()> {
    say("building two nodes and six pods");
    let mut world = World::build(options.keep)?;
    report.prefix = world.lab.prefix().to_owned();
    let outcome = play(&mut world, report);
    if options.keep {
        print_instructions(&world, !options.dev);
        world.lab.keep();
    } else {
        say("removing everything");
    }
    outcome
}

fn play(world: &mut World, report: &mut Report) -> Result<()> {
    say("starting nginx (twice), redis and iperf3, as Debian ships them");
    world.start_servers()?;
    say("without the mesh: latency, and what a capture on the link sees");
    scenes::direct(world, report)?;
    say("starting the control plane and two agents, enrolling the running pods");
    let mut mesh = Mesh::start(&world.lab, world::mesh_spec(&world.lab)?)?;
    say("capturing on the link from here on; curl, redis-cli and iperf3 through the mesh");
    let capture = LinkCapture::start(&world.lab)?;
    scenes::web(world, report)?;
    scenes::cache(world, report)?;
    scenes::bulk(world, report)?;
    say("an identity without permission");
    scenes::denied(world, report)?;
    say("killing an endpoint of the service");
    scenes::failover(world, report)?;
    say("judging every byte of the capture");
    scenes::wire(capture, report)?;
    say("with the mesh: latency");
    scenes::latency(world, report)?;
    say("reading the agents' metrics");
    scenes::identities(world, &mesh, report)?;
    mesh.check_running()
}

fn print_instructions(world: &World, release: bool) {
    let programs = target_directory(release);
    let (bin, prefix) = (programs.display(), world.lab.prefix());
    let directory = world.lab.directory().display();
    eprintln!("\nEverything stays up. Some things to try:");
    eprintln!(
        "  {bin}/lab exec {prefix} client curl http://{}/",
        world::web_service()
    );
    eprintln!(
        "  {bin}/lab exec {prefix} intruder curl http://{}/",
        world::web_service()
    );
    for node in world.lab.nodes() {
        eprintln!(
            "  {bin}/weft --run-dir {} status      (or top, dump)",
            node.run_dir.display()
        );
    }
    eprintln!(
        "  edit {directory}/mesh/manifests/policy-no-intruder.yaml and try the intruder again"
    );
    eprintln!("  logs: {directory}/logs");
    eprintln!("Remove it with:\n  {bin}/lab cleanup --prefix {prefix}");
}
