//! A client with a valid identity of the mesh that speaks HTTP/2 to hurt: floods, bombs, and windows that are wrong.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_tests::conversation::Server;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, split},
    time::timeout,
};

use super::{CODECS, PORT, World, attacks::honest_clients, identity, within};
use crate::{
    peer::{self, Credentials, LIMIT, TUNNEL_PORT},
    raw::{
        CONTINUATION, DATA, END_HEADERS, HEADERS, PADDED, PING, PREFACE, PRIORITY, RST_STREAM,
        SETTINGS, WINDOW_UPDATE, frame, header_block,
    },
};

/// How long a flood goes on against an agent that bears it.
const FLOOD: Duration = Duration::from_secs(2);
/// Bytes of a burst, about.
const BURST_BYTES: usize = 16 << 10;
/// What an agent may grow by, whatever it is sent: the queues of one tunnel and its streams.
const GROWTH_MAX_KB: u64 = 64 << 10;

/// What a flooder sends after the preface.
struct Flood {
    name: &'static str,
    /// Frames that come first.
    first: fn(&[u8]) -> Vec<u8>,
    /// One round of what follows again and again, by the round's number.
    round: fn(&[u8], u32) -> Vec<u8>,
    /// Whether it also leaves everything unread.
    deaf: bool,
    /// Our own codec ends the tunnel.
    ends: bool,
}

fn one(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame(&mut bytes, kind, flags, stream, payload);
    bytes
}

fn connect(authority: &[u8], stream: u32) -> Vec<u8> {
    let fields: [(&[u8], &[u8]); 2] = [(b":method", b"CONNECT"), (b":authority", authority)];
    let block = header_block(&fields).expect("short fields");
    one(HEADERS, END_HEADERS, stream, &block)
}

/// Nothing comes first.
fn nothing(_: &[u8]) -> Vec<u8> {
    Vec::new()
}

fn one_stream(authority: &[u8]) -> Vec<u8> {
    connect(authority, 1)
}

fn floods() -> Vec<Flood> {
    let flood = |name, first, round| Flood {
        name,
        first,
        round,
        deaf: false,
        ends: true,
    };
    vec![
        flood("streams reset at once", nothing, |authority, round| {
            let stream = 2 * round + 1;
            let reset = one(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            [connect(authority, stream), reset].concat()
        }),
        flood(
            "a header block without end",
            |_| one(HEADERS, 0, 1, &[]),
            |_, _| one(CONTINUATION, 0, 1, &[]),
        ),
        flood("settings", nothing, |_, _| one(SETTINGS, 0, 0, &[])),
        flood("pings", nothing, |_, _| one(PING, 0, 0, &[7; 8])),
        Flood {
            deaf: true,
            ..flood("pings, answers unread", nothing, |_, _| {
                one(PING, 0, 0, &[7; 8])
            })
        },
        flood("empty data", one_stream, |_, _| one(DATA, 0, 1, &[])),
        flood("padding", one_stream, |_, _| {
            one(DATA, PADDED, 1, &[&[255][..], &[0; 255]].concat())
        }),
        flood("priorities", nothing, |_, _| {
            one(PRIORITY, 0, 1, &[0, 0, 0, 3, 7])
        }),
        flood("unknown frames", nothing, |_, _| one(0xbe, 0, 0, b"?")),
        flood("credit beyond the largest window", nothing, |_, _| {
            one(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes())
        }),
        flood("credit of nothing", nothing, |_, _| {
            one(WINDOW_UPDATE, 0, 0, &[0; 4])
        }),
        flood("a header table without end", nothing, |_, round| {
            // RFC 7541 section 6.3: a size of 2^21.
            one(
                HEADERS,
                END_HEADERS,
                2 * round + 1,
                &[0x3f, 0xe1, 0xff, 0x7f],
            )
        }),
        flood(
            "a long field a thousand times by its index",
            nothing,
            |_, round| {
                // Remembered (section 6.2.1), then named by index 62, the newest of the dynamic table.
                let field = [&[0x40, 1, b'a', 0x7f, 0xa1, 0x1e][..], &[b'b'; 4000]].concat();
                let block = [field, vec![0xbe; 1000]].concat();
                one(HEADERS, END_HEADERS, 2 * round + 1, &block)
            },
        ),
        Flood {
            ends: false,
            ..flood(
                "streams without a window",
                |_| one(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
                |authority, round| match round {
                    0..100 => connect(authority, 2 * round + 1),
                    _ => one(DATA, 0, 1, b"x"),
                },
            )
        },
        Flood {
            ends: false,
            ..flood("bytes one by one", one_stream, |_, _| one(DATA, 0, 1, b"x"))
        },
    ]
}

#[test]
fn floods_end_the_flooders_tunnel_and_nobody_elses() -> Result<()> {
    for codec in CODECS {
        flooders_hurt_nobody(codec).context(codec)?;
    }
    Ok(())
}

fn flooders_hurt_nobody(codec: &str) -> Result<()> {
    let mut world = World::start(codec)?;
    let (victim, evil) = (world.lab.pod("victim")?, world.lab.pod("evil")?);
    let server = Server::start(&world.lab, victim, PORT)?;
    let node = world.lab.node("n2")?;
    let agent = world.mesh.agent(node)?.pid().as_raw();
    let before = resident_peak_kb(agent)?;
    let valid = world.certificate("evil")?;
    let over = AtomicBool::new(false);
    let (flooded, honest) = std::thread::scope(|scope| {
        let honest = scope.spawn(|| honest_clients(&world, server.address, &over));
        let flooded = within(&evil.netns, || {
            flood_all(victim.address(), &valid, codec == "native")
        });
        over.store(true, Ordering::Relaxed);
        (flooded, honest.join())
    });
    flooded?;
    let rounds = honest.map_err(|_| anyhow!("the honest client panicked"))??;
    ensure!(rounds > 0, "no honest client was served meanwhile");
    let metrics = world.mesh.metrics(node)?;
    ensure!(
        metrics.sum("weft_agent_panics_total", &[]) == 0.0,
        "the agent panicked"
    );
    if codec == "native" {
        let told = metrics.sum("weft_limit_reached_total", &[("limit", "tunnel_abuse")]);
        ensure!(told >= 5.0, "floods were counted {told} times");
    }
    let grown = resident_peak_kb(agent)? - before;
    ensure!(grown <= GROWTH_MAX_KB, "the agent took {grown} KiB more");
    Ok(())
}

/// The most that a process has ever had in memory (proc(5), VmHWM).
fn resident_peak_kb(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.context("no VmHWM")?.trim().trim_end_matches(" kB");
    Ok(number.parse()?)
}

async fn flood_all(victim: IpAddr, valid: &Credentials, native: bool) -> Result<()> {
    for flood in floods() {
        let ended = send(victim, valid, &flood).await.context(flood.name)?;
        ensure!(
            ended || !(native && flood.ends),
            "{}: the tunnel is still open",
            flood.name
        );
        ensure!(
            !ended || flood.ends || !native,
            "{}: the tunnel was closed",
            flood.name
        );
    }
    Ok(())
}

/// Floods until the tunnel ends, which is true, or for [`FLOOD`].
async fn send(victim: IpAddr, valid: &Credentials, flood: &Flood) -> Result<bool> {
    let config = peer::client_config(Some(valid), valid, &identity("victim"))?;
    let stream = peer::connect(SocketAddr::new(victim, TUNNEL_PORT), config).await?;
    let authority = format!("{victim}:{PORT}");
    let authority = authority.as_bytes();
    let (mut read, mut write) = split(stream);
    let begin = [
        PREFACE,
        &one(SETTINGS, 0, 0, &[]),
        &(flood.first)(authority),
    ];
    write.write_all(&begin.concat()).await?;
    let mut round = 0;
    let flooding = async {
        loop {
            let mut burst = Vec::new();
            while burst.len() < BURST_BYTES {
                burst.extend((flood.round)(authority, round));
                round += 1;
            }
            if write.write_all(&burst).await.is_err() {
                return;
            }
        }
    };
    let listening = async {
        if flood.deaf {
            std::future::pending().await
        } else {
            read_to_end(&mut read).await;
        }
    };
    let both = async {
        tokio::select! {
            () = flooding => {}
            () = listening => {}
        }
    };
    if timeout(FLOOD, both).await.is_ok() {
        return Ok(true);
    }
    // A deaf flooder whose own writes no longer go through learns of the end here.
    let ended = timeout(LIMIT, read_to_end(&mut read)).await.is_ok();
    Ok(flood.deaf && ended)
}

async fn read_to_end(read: &mut (impl AsyncRead + Unpin)) {
    let mut buffer = vec![0; 16 << 10];
    while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}
