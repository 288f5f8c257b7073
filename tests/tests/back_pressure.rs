//! A slow reader slows its writer down, costs the agents a bounded amount of memory, and disturbs nobody else.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    netns,
    paths::{self, MESH, Path, pattern},
    sockets::{Seen, finish, look},
    world::World,
};

/// Beside the streams: code first touched, allocator arenas.
const MEMORY_BASE_KIB: u64 = 16 << 10;

#[test]
fn a_frozen_reader_stops_its_writer_and_nobody_else() -> Result<()> {
    /// Eight on each of the two tunnels: more than any window of a few streams would have room for.
    const FROZEN: u64 = 16;
    /// Memory of both agents per frozen stream: the stream window of 4 MiB and the reads that its frames were cut from
    /// (7 MiB were measured), on the other side 512 KiB to send, as TLS records again, and a read (2 MiB).
    const MEMORY_PER_STREAM_KIB: u64 = 10 << 10;
    let mut world = paths::start()?;
    for path in [&MESH[0], &MESH[3], &MESH[4]] {
        let allowed = FROZEN * MEMORY_PER_STREAM_KIB + MEMORY_BASE_KIB;
        frozen_readers(&mut world, path, FROZEN, allowed)?;
        world.wait_nothing_open()?;
    }
    Ok(())
}

#[test]
fn many_frozen_readers_of_one_pod_stay_within_its_budget() -> Result<()> {
    /// Whole windows for them would be 240 MiB, and some 600 MiB of memory.
    const FROZEN: u64 = 60;
    /// What is configured, in KiB, and what is measured for it: frames are cut from larger reads.
    const BUDGET_KIB: u64 = 32 << 10;
    const MEASURED_PER_BUDGET: u64 = 2;
    /// The least window, what waits to be sent on the other side, and reads.
    const MEMORY_PER_STREAM_KIB: u64 = 2 << 10;
    let (lab, mut mesh) = paths::lab();
    mesh.agent_config = Some(format!(
        "proxy: {{ maxBufferedBytesPerWorkload: {} }}\n",
        BUDGET_KIB << 10
    ));
    let mut world = World::start(lab, mesh)?;
    // Else the kernel's own buffers of so many connections use up what it has for TCP in all.
    for pod in world.lab.pods() {
        let most = [
            ("ipv4/tcp_rmem", "4096 131072 1048576"),
            ("ipv4/tcp_wmem", "4096 16384 1048576"),
        ];
        netns::sysctl(&pod.netns, &most)?;
    }
    let allowed =
        BUDGET_KIB * MEASURED_PER_BUDGET + FROZEN * MEMORY_PER_STREAM_KIB + MEMORY_BASE_KIB;
    frozen_readers(&mut world, &MESH[0], FROZEN, allowed)?;
    let limit = [("limit", "buffered_bytes")];
    let reached = world.sum("n2", "weft_limit_reached_total", &limit)?;
    assert!(reached > 0.0, "the budget was never used up");
    world.wait_nothing_open()
}

fn frozen_readers(world: &mut World, path: &Path, frozen: u64, allowed_kib: u64) -> Result<()> {
    /// A write that cannot go on within this is stopped.
    const STOPPED_AFTER: Duration = Duration::from_secs(2);
    /// The kernels' buffers of all legs (4 MiB to send, 6 MiB to receive, each doubled at most) and the stream window.
    const SENT_MAX: u64 = 64 << 20;

    let listener = path.listen(world)?;
    let neighbour = path.pair(world, &listener)?;
    let mut pairs = Vec::new();
    for _ in 0..frozen {
        pairs.push(path.pair(world, &listener)?);
    }
    let before = agents_memory_kib(world)?;
    let sent: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = pairs
            .iter()
            .map(|(client, _)| scope.spawn(|| write_until_stopped(client, STOPPED_AFTER, SENT_MAX)))
            .collect();
        let join = |writer: std::thread::ScopedJoinHandle<'_, Result<u64>>| {
            writer.join().expect("the writing thread does not panic")
        };
        writers.into_iter().map(join).collect::<Result<_>>()
    })
    .with_context(|| path.name.to_owned())?;
    let grown = agents_memory_kib(world)?.saturating_sub(before);
    assert!(
        grown <= allowed_kib,
        "{}: the agents grew by {grown} KiB, {allowed_kib} KiB are allowed; sent {sent:?}",
        path.name
    );

    // Neighbours on the same tunnels go on: one that was there before, and a new one.
    for (client, server) in [neighbour, path.pair(world, &listener)?] {
        (&client).write_all(b"hello")?;
        assert_eq!(look(&server, 5), Seen::Bytes(b"hello".to_vec()));
        (&server).write_all(b"hello back")?;
        assert_eq!(look(&client, 10), Seen::Bytes(b"hello back".to_vec()));
    }

    // Thawed, everything that was sent arrives. (Negative control: it had not arrived by itself.)
    for ((client, mut server), sent) in pairs.into_iter().zip(sent) {
        finish(&client)?;
        let received = std::io::copy(&mut server, &mut std::io::sink())
            .with_context(|| format!("{}: thawed", path.name))?;
        assert_eq!(received, sent, "{}", path.name);
    }
    Ok(())
}

/// Writes until a write does not go on; returns how many bytes went.
fn write_until_stopped(mut client: &TcpStream, stopped: Duration, max: u64) -> Result<u64> {
    client.set_write_timeout(Some(stopped))?;
    let piece = pattern(64 << 10);
    let mut sent = 0;
    while sent < max {
        match client.write(&piece) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(sent),
            Err(error) => return Err(error.into()),
        }
    }
    bail!("nothing stopped the writer after {sent} bytes")
}

/// Resident memory of all agents, in KiB.
fn agents_memory_kib(world: &mut World) -> Result<u64> {
    let mut sum = 0;
    for node in world.lab.nodes() {
        let pid = world.mesh.agent(node)?.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let value = line.and_then(|line| line.split_whitespace().next());
        sum += value.context("no VmRSS")?.parse::<u64>()?;
    }
    Ok(sum)
}
