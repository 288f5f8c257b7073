//! What the meter is told about directions that wait.

use super::*;

/// Waits until a meter says that these directions wait.
async fn until_waits(counted: &Counted, expected: (bool, bool)) {
    let told = async {
        while counted.waits.get() != expected {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), told)
        .await
        .expect("the meter is told");
}

#[tokio::test]
async fn what_waits_for_a_slow_reader_is_told_and_so_is_its_end() {
    LocalSet::new()
        .run_until(async {
            let (mut client, client_near) = pair().await;
            let (server_near, mut server) = pair().await;
            let counted = Rc::new(Counted::default());
            let meter = counted.clone();
            let relay = spawn_local(async move {
                let signal = CloseSignal::default();
                relay_tcp(client_near, server_near, &*meter, &signal, HALF_CLOSE_IDLE).await
            });
            let block = vec![7; 256 << 10];
            let mut sent = 0;
            while counted.waits.get() != (true, false) {
                let writing = timeout(Duration::from_millis(1), client.write(&block)).await;
                sent += writing.map_or(0, |count| count.expect("open"));
            }
            let mut received = vec![0; sent];
            server.read_exact(&mut received).await.expect("open");
            until_waits(&counted, (false, false)).await;
            drop((client, server));
            relay.await.expect("no panic");
        })
        .await;
}
