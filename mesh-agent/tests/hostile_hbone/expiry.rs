//! A client that keeps its tunnel beyond the end of its certificate.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::conversation::Server;
use rcgen::ExtendedKeyUsagePurpose;
use tokio::time::timeout;

use super::{CODECS, PORT, World, identity, within};
use crate::{
    peer::{self, Forgery, LIMIT, TUNNEL_PORT},
    raw::{self, Answer},
};

/// How long the client's certificate lasts, seconds: enough for one handshake.
const LIFE_S: i64 = 6;

#[test]
fn a_tunnel_takes_no_more_connections_once_its_clients_certificate_has_ended() -> Result<()> {
    for codec in CODECS {
        a_tunnel_ends_with_its_clients_certificate(codec).context(codec)?;
    }
    Ok(())
}

fn a_tunnel_ends_with_its_clients_certificate(codec: &str) -> Result<()> {
    let world = World::start(codec)?;
    let (victim, evil) = (world.lab.pod("victim")?, world.lab.pod("evil")?);
    let _server = Server::start(&world.lab, victim, PORT)?;
    let begun = Instant::now();
    let own = identity("evil");
    let forgery = Forgery {
        uris: &[&own],
        by_the_mesh: true,
        ends_in_s: LIFE_S,
        usage: ExtendedKeyUsagePurpose::ClientAuth,
    };
    let credentials = peer::forge(world.mesh.directory(), &forgery)?;
    let authority = victim.at(PORT).to_string();
    within(&evil.netns, || async {
        let config = peer::client_config(Some(&credentials), &credentials, &identity("victim"))?;
        let mut stream = peer::connect(victim.at(TUNNEL_PORT), config).await?;
        let fields: [(&[u8], &[u8]); 2] = [
            (b":method", b"CONNECT"),
            (b":authority", authority.as_bytes()),
        ];
        let answer = raw::request(&mut stream, &fields).await?;
        ensure!(answer == Answer::Accepted, "while it lasts: {answer:?}");
        timeout(LIMIT, raw::until_goaway(&mut stream))
            .await
            .context("no GOAWAY")??;
        let kept = begun.elapsed();
        ensure!(
            kept >= Duration::from_secs(LIFE_S.unsigned_abs() - 1),
            "it was still good after {kept:?}"
        );
        let another = timeout(LIMIT, raw::takes_another(&mut stream, &fields)).await;
        ensure!(
            !another.context("no answer to PING")??,
            "another was let in"
        );
        Ok(())
    })
}
