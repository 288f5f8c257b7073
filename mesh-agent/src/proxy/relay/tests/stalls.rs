//! Streams whose readers stop.

use super::*;

/// More streams than any window of a few of them would have room for.
const STALLED: usize = 12;
/// Who cannot write for so long has filled every buffer on the way.
const STALL: Duration = Duration::from_millis(200);

/// `STALLED` streams of one tunnel whose readers stop, at the server's side or at the client's, and a neighbour that
/// was opened before.
async fn stalled_streams_do_not_stop_a_neighbour(
    codecs: (TunnelCodec, TunnelCodec),
    frozen_at_server: bool,
) {
    let (tunnel, tunnel_server) = tunnel(codecs).await;
    let (mut clients, mut servers, mut fars) = (Vec::new(), Vec::new(), Vec::new());
    let mut nears = Vec::new();
    for _ in 0..=STALLED {
        let (client, near) = pair().await;
        let (far, server) = pair().await;
        clients.push(client);
        nears.push(near);
        fars.push(far);
        servers.push(server);
    }
    serve(tunnel_server, fars);
    for near in nears {
        let (stream, _) = tunnel.open(request()).await.expect("200");
        spawn_local(async move {
            let signal = CloseSignal::default();
            let meter = Rc::<Counted>::default();
            relay_tunnel(near, stream, &meter, &signal, HALF_CLOSE_IDLE).await
        });
    }
    let (mut writers, mut readers) = match frozen_at_server {
        true => (clients, servers),
        false => (servers, clients),
    };
    let (mut writer, mut reader) = (writers.remove(0), readers.remove(0));
    // They stay open, full to the brim.
    let mut full = Vec::new();
    for mut stalled in writers {
        full.push(spawn_local(async move {
            let block = vec![7; 256 << 10];
            while timeout(STALL, stalled.write(&block)).await.is_ok() {}
            stalled
        }));
    }
    let mut held = Vec::new();
    for stalled in full {
        held.push(stalled.await.expect("no panic"));
    }
    let writing = spawn_local(async move {
        writer.write_all(&vec![7; 20 * MIB]).await.expect("open");
    });
    let mut received = vec![0; 20 * MIB];
    let limit = Duration::from_secs(60);
    let read = timeout(limit, reader.read_exact(&mut received)).await;
    read.expect("the neighbour goes on").expect("open");
    writing.await.expect("no panic");
}

#[tokio::test]
async fn stalled_streams_do_not_stop_their_neighbour() {
    for codecs in PAIRS {
        for frozen_at_server in [true, false] {
            LocalSet::new()
                .run_until(stalled_streams_do_not_stop_a_neighbour(
                    codecs,
                    frozen_at_server,
                ))
                .await;
        }
    }
}
