//! What one pod does to the agent that it shares with its neighbours: storms of connections, and descriptors that run
//! out.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{Server, client_with, report, require_service, wait_for_service},
    lab::{Families, LabSpec, PodSpec},
    mesh::{METRICS_PORT, MeshSpec},
    netns,
    sockets::{Seen, look},
    wait,
    world::{LIMIT, World},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::process::{Pid, Rlimit, prlimit};

const PORT: u16 = 7000;
/// Descriptors of an agent: 512 are reserved, so some 700 are for workloads.
const DESCRIPTORS: u64 = 1_200;
/// Connections that the noisy pod tries to hold: more than twice what there is room for.
const STORM: usize = 1_500;

fn lab() -> LabSpec {
    LabSpec::new(Families::V4)
        .node("n1", [PodSpec::new("noisy"), PodSpec::new("quiet")])
        .node("n2", [PodSpec::new("target"), PodSpec::new("other")])
}

/// The storm's sockets are this process's.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}

fn reached(world: &World, node: &str, limit: &str) -> Result<f64> {
    world.sum(node, "weft_limit_reached_total", &[("limit", limit)])
}

/// Connections that the noisy pod holds, refused ones included: those are reset.
fn storm(world: &World, to: SocketAddr) -> Result<Vec<TcpStream>> {
    (0..STORM)
        .map(|_| world.opener("noisy")?.connect(to)?.context("captured"))
        .collect()
}

/// Whether a connection that carries nothing is still there.
fn is_alive(mut stream: &TcpStream) -> Result<bool> {
    stream.set_nonblocking(true)?;
    let seen = stream.read(&mut [0]);
    Ok(matches!(seen, Err(error) if error.kind() == ErrorKind::WouldBlock))
}

#[test]
fn a_pods_storm_leaves_room_for_its_neighbours_and_breaks_nothing() -> Result<()> {
    raise_descriptor_limit()?;
    let spec = MeshSpec {
        agent_descriptors: Some(DESCRIPTORS),
        ..MeshSpec::default()
    };
    let world = World::start(lab(), spec)?;
    let (noisy, quiet) = (world.lab.pod("noisy")?, world.lab.pod("quiet")?);
    let target = Server::start(&world.lab, world.lab.pod("target")?, PORT)?;
    let other = Server::start(&world.lab, world.lab.pod("other")?, PORT)?;
    require_service(&world.lab, noisy, target.address)?;

    // Opened before the storm and open all the time.
    let old = client_with(
        other.address,
        "--seconds 10 --interval-ms 20 --stall-ms 5000",
    )?;
    let old = world.lab.spawn(quiet, &old)?;
    // New ones all the time.
    let new = client_with(other.address, "--rate 20 --seconds 10 --stall-ms 5000")?;
    let new = world.lab.spawn(quiet, &new)?;
    let held = storm(&world, target.address)?;
    wait::until("the storm to be refused", LIMIT, || {
        let reached = |node| reached(&world, node, "descriptor_share");
        Ok((reached("n1")? + reached("n2")? > 0.0).then_some(()))
    })?;
    let (old, new) = (report(old)?, report(new)?);
    ensure!(old.complete == 1 && old.lost() == 0, "old: {old:?}");
    ensure!(new.complete == 200 && new.lost() == 0, "new: {new:?}");

    // The limit bites, and it bites the noisy one.
    let alive = held
        .iter()
        .filter_map(|one| is_alive(one).ok())
        .filter(|alive| *alive)
        .count();
    ensure!(
        (100..STORM - 100).contains(&alive),
        "{alive} of the storm's are open"
    );
    let refused = |node, workload| {
        let labels = [("workload", workload)];
        world.sum(node, "weft_workload_refused_total", &labels)
    };
    let of_storm = refused("n1", "default/noisy")? + refused("n2", "default/target")?;
    let of_others = refused("n1", "default/quiet")? + refused("n2", "default/other")?;
    ensure!(of_storm > 0.0, "nothing of the storm was refused");
    ensure!(of_others == 0.0, "{of_others} of the others' were refused");

    // Over, the noisy one is served as before.
    drop(held);
    wait_for_service(&world.lab, noisy, target.address, LIMIT)
}

/// The smallest descriptor that a process does not have open: the next one that it would get.
fn next_descriptor(pid: i32) -> Result<u64> {
    let open: BTreeSet<u64> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    (0..)
        .find(|number| !open.contains(number))
        .context("all are open")
}

#[test]
fn without_descriptors_the_agent_waits_and_goes_on_at_once_when_there_are_some() -> Result<()> {
    /// Dialled while there are none: more than any backlog of handshakes would hide.
    const DIALS: usize = 60;
    raise_descriptor_limit()?;
    let mut world = World::start(lab(), MeshSpec::default())?;
    let listener = world.listen("target", PORT)?;
    let to = world.at("target", PORT)?;
    let client = world.dial("quiet", to)?;
    let (server, _) = listener.accept(LIMIT)?;

    let pid = world.mesh.agent(world.lab.node("n1")?)?.pid().as_raw();
    let agent = Pid::from_raw(pid).context("a process")?;
    // The agent's hard limit is inherited from here.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let none = Rlimit {
        current: Some(next_descriptor(pid)?),
        maximum: Some(hard),
    };
    let before = prlimit(Some(agent), rustix::process::Resource::Nofile, none)?;
    let began = Instant::now();
    let waiting: Vec<TcpStream> = (0..DIALS)
        .map(|_| world.opener("noisy")?.connect(to)?.context("captured"))
        .collect::<Result<_>>()?;
    // What was open goes on.
    for _ in 0..20 {
        (&client).write_all(b"hello")?;
        ensure!(
            look(&server, 5) == Seen::Bytes(b"hello".to_vec()),
            "established"
        );
        wait::pace_until(Instant::now() + Duration::from_millis(50));
    }
    prlimit(Some(agent), rustix::process::Resource::Nofile, before)?;
    let exhausted = began.elapsed();

    // Everything that waited is served, without anybody dialling again.
    for _ in 0..DIALS {
        listener.accept(LIMIT).context("after the release")?;
    }
    drop(waiting);
    // Each listener may try every 100 ms: more would be a loop that spins.
    let tries = reached(&world, "n1", "accept")?;
    let most = exhausted.as_secs_f64() * 10.0 + 10.0;
    ensure!(
        (1.0..=most).contains(&tries),
        "{tries} failures to accept in {exhausted:?}"
    );
    Ok(())
}

#[test]
fn scrapers_that_do_not_read_delay_nobody() -> Result<()> {
    /// As many as the agent answers at a time, and some that wait.
    const SCRAPERS: usize = 80;
    let world = World::start(lab(), MeshSpec::default())?;
    let (node, quiet) = (world.lab.node("n1")?, world.lab.pod("quiet")?);
    let other = Server::start(&world.lab, world.lab.pod("other")?, PORT)?;
    let scrape = SocketAddr::new(node.address(), METRICS_PORT);
    let scrapers: Vec<TcpStream> = netns::within(&node.netns, || {
        (0..SCRAPERS)
            .map(|_| {
                let mut stream = TcpStream::connect(scrape)?;
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n")?;
                Ok(stream)
            })
            .collect::<Result<_>>()
    })??;
    let program = client_with(other.address, "--rate 50 --seconds 4 --stall-ms 2000")?;
    let seen = report(world.lab.spawn(quiet, &program)?)?;
    ensure!(seen.complete == 200 && seen.lost() == 0, "{seen:?}");
    drop(scrapers);
    Ok(())
}
