//! Strangers at the tunnel port who hold what they can: connections that say nothing, or a byte a second.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use mesh_tests::conversation::Server;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::interval,
};

use super::{PORT, World, attacks::honest_clients, within};
use crate::peer::TUNNEL_PORT;

/// Clients that connect and say nothing.
const SILENT: usize = 5_000;
/// Clients that begin a TLS record and go on with one byte a second.
const DRIBBLING: usize = 1_000;
/// Until all are gone: the agent's deadline of 10 s for a handshake, and the time that connecting takes.
const GONE: Duration = Duration::from_secs(20);

/// Connects, says `hello`, then one byte a second if it dribbles, until the agent ends it.
async fn stranger(to: SocketAddr, dribbles: bool) {
    // Reset at once, which connect(2) may already tell.
    let Ok(mut stream) = TcpStream::connect(to).await else {
        return;
    };
    let (mut read, mut write) = stream.split();
    let ended = async {
        let mut answer = [0; 64];
        while read.read(&mut answer).await.is_ok_and(|count| count > 0) {}
    };
    let dribble = async {
        // A ClientHello that says to be 512 bytes long (RFC 8446 section 5.1).
        let mut alive = write.write_all(&[22, 3, 1, 2, 0]).await.is_ok();
        let mut seconds = interval(Duration::from_secs(1));
        while alive {
            seconds.tick().await;
            alive = write.write_all(&[1]).await.is_ok();
        }
    };
    if dribbles {
        tokio::select! {
            () = ended => {}
            () = dribble => {}
        }
    } else {
        ended.await;
    }
}

#[test]
fn silent_and_dribbling_strangers_are_gone_in_time_and_honest_clients_lose_nothing() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let world = World::start("native")?;
    let lab = &world.lab;
    let (victim, evil) = (lab.pod("victim")?, lab.pod("evil")?);
    let server = Server::start(lab, victim, PORT)?;
    let to = SocketAddr::new(victim.address(), TUNNEL_PORT);
    let over = AtomicBool::new(false);
    let (took, honest) = std::thread::scope(|scope| {
        let honest = scope.spawn(|| honest_clients(&world, server.address, &over));
        let took = within(&evil.netns, || async {
            let began = Instant::now();
            let mut strangers = JoinSet::new();
            for number in 0..SILENT + DRIBBLING {
                strangers.spawn(stranger(to, number < DRIBBLING));
            }
            while strangers.join_next().await.is_some() {}
            Ok(began.elapsed())
        });
        over.store(true, Ordering::Relaxed);
        (took, honest.join())
    });
    let took = took?;
    let rounds = honest.map_err(|_| anyhow!("the honest client panicked"))??;
    ensure!(rounds > 0, "no honest client was served meanwhile");
    ensure!(took < GONE, "the last stranger was there for {took:?}");
    // Both limits had to do something.
    let metrics = world.mesh.metrics(lab.node("n2")?)?;
    for limit in ["handshakes_per_source", "handshake_deadline"] {
        let reached = metrics.sum("weft_limit_reached_total", &[("limit", limit)]);
        ensure!(reached > 0.0, "{limit} was never reached");
    }
    Ok(())
}
