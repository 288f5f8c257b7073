//! A slow reader slows its writer down, costs the agents a bounded amount of memory, and disturbs nobody else.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_tests::{
    paths::{self, MESH, Path, pattern},
    sockets::{Seen, finish, look},
    world::World,
};

#[test]
fn a_frozen_reader_stops_its_writer_and_nobody_else() -> Result<()> {
    let mut world = paths::start()?;
    for path in [&MESH[0], &MESH[3], &MESH[4]] {
        frozen_readers(&mut world, path)?;
        world.wait_nothing_open()?;
    }
    Ok(())
}

fn frozen_readers(world: &mut World, path: &Path) -> Result<()> {
    /// Eight on each of the two tunnels: more than any window of a few streams would have room for.
    const FROZEN: usize = 16;
    /// A write that cannot go on within this is stopped.
    const STOPPED_AFTER: Duration = Duration::from_secs(2);
    /// The kernels' buffers of all legs (4 MiB to send, 6 MiB to receive, each doubled at most) and the stream window.
    const SENT_MAX: u64 = 64 << 20;
    /// Memory of both agents per frozen stream: the stream window of 4 MiB and the reads that its frames were cut from
    /// (7 MiB were measured), on the other side 512 KiB to send, as TLS records again, and a read (2 MiB).
    const MEMORY_PER_STREAM_KIB: u64 = 10 << 10;
    /// Beside the streams: code first touched, allocator arenas.
    const MEMORY_BASE_KIB: u64 = 16 << 10;

    let listener = path.listen(world)?;
    let neighbour = path.pair(world, &listener)?;
    let mut pairs = Vec::new();
    for _ in 0..FROZEN {
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
    let allowed = FROZEN as u64 * MEMORY_PER_STREAM_KIB + MEMORY_BASE_KIB;
    assert!(
        grown <= allowed,
        "{}: the agents grew by {grown} KiB, {allowed} KiB are allowed; sent {sent:?}",
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
