//! Windows of streams that change while they are open, as our own codec grants them.

use std::cell::Cell;

use super::*;
use crate::proxy::limits::{STREAM_WINDOW_BYTES, STREAM_WINDOW_MIN_BYTES};

/// What a codec may take beyond the window: what waits to be encrypted, and what was.
const BEYOND: usize = MIB;

/// A tunnel whose server grants what the cell says.
async fn granting() -> (TunnelClient, TunnelServer<DuplexStream>, Rc<Cell<u32>>) {
    let codecs = (TunnelCodec::Native, TunnelCodec::Native);
    let (client, mut server) = tunnel(codecs).await;
    let window = Rc::new(Cell::new(STREAM_WINDOW_BYTES));
    let wanted = window.clone();
    server.follow_window(Rc::new(move || wanted.get()));
    (client, server, window)
}

/// Hands every stream of the server to `served`.
fn accept_all(mut server: TunnelServer<DuplexStream>) -> tokio::sync::mpsc::Receiver<TunnelStream> {
    let (tell, told) = tokio::sync::mpsc::channel(8);
    spawn_local(async move {
        while let Some(Ok(incoming)) = server.accept().await {
            let stream = incoming.accept(HeaderMap::new()).expect("there");
            tell.send(stream).await.expect("wanted");
        }
    });
    told
}

/// Sends until no more goes; returns how much went.
async fn fill(stream: &mut TunnelStream) -> usize {
    let piece = vec![7; 64 << 10];
    let mut sent = 0;
    // Time is the runtime's: it passes when nothing else can happen.
    while timeout(Duration::from_secs(1), send(&mut stream.send, &piece))
        .await
        .is_ok_and(|sent| sent.is_ok())
    {
        sent += piece.len();
    }
    sent
}

fn assert_within(window: u32, sent: usize) {
    let window = usize::try_from(window).expect("small");
    assert!(
        (window - MIB / 8..=window + BEYOND).contains(&sent),
        "{sent}"
    );
}

#[tokio::test(start_paused = true)]
async fn streams_get_the_window_that_the_workload_may_have_now() {
    LocalSet::new()
        .run_until(async {
            let (client, server, window) = granting().await;
            let mut told = accept_all(server);
            let (mut first, _) = client.open(request()).await.expect("200");
            assert_within(STREAM_WINDOW_BYTES, fill(&mut first).await);
            window.set(1 << 20);
            // The change goes out with the answer to this one.
            let _second = client.open(request()).await.expect("200");
            let (mut last, _) = client.open(request()).await.expect("200");
            assert_within(1 << 20, fill(&mut last).await);
            told.close();
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_full_stream_whose_window_shrank_goes_on_when_it_is_read() {
    LocalSet::new()
        .run_until(async {
            let (client, server, window) = granting().await;
            let mut told = accept_all(server);
            let (mut full, _) = client.open(request()).await.expect("200");
            let mut reader = told.recv().await.expect("accepted");
            let before = fill(&mut full).await;
            window.set(STREAM_WINDOW_MIN_BYTES);
            let _other = client.open(request()).await.expect("200");
            // Nothing more goes: the window is closed, by more than it was before.
            assert!(fill(&mut full).await <= BEYOND);
            let reading = spawn_local(async move { read_to_end(&mut reader.receive).await });
            let more = vec![7; 8 * MIB];
            let sending = timeout(Duration::from_secs(30), send(&mut full.send, &more));
            let sent = sending.await.expect("the window opens again");
            sent.expect("open");
            full.send.finish().expect("open");
            let received = reading.await.expect("no panic").expect("an end");
            assert!(received.len() >= before + more.len());
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn credit_that_was_not_due_is_given_when_a_window_shrinks_below_it() {
    LocalSet::new()
        .run_until(async {
            let (client, server, window) = granting().await;
            let mut told = accept_all(server);
            let (mut calm, _) = client.open(request()).await.expect("200");
            let mut reader = told.recv().await.expect("accepted");
            // Less than what a whole window is opened by again, and more than a least window.
            let first = vec![7; MIB / 2];
            send(&mut calm.send, &first).await.expect("open");
            let mut read = 0;
            while read < first.len() {
                let bytes = poll_fn(|cx| reader.receive.poll_data(cx)).await;
                let bytes = bytes.expect("more").expect("open");
                reader.receive.consumed(bytes.len());
                read += bytes.len();
            }
            window.set(STREAM_WINDOW_MIN_BYTES);
            let _other = client.open(request()).await.expect("200");
            let reading = spawn_local(async move { read_to_end(&mut reader.receive).await });
            let more = vec![7; 2 * MIB];
            let sending = timeout(Duration::from_secs(30), send(&mut calm.send, &more));
            sending.await.expect("the window is open").expect("open");
            calm.send.finish().expect("open");
            assert_eq!(reading.await.expect("no panic"), Ok(more));
        })
        .await;
}

#[tokio::test]
async fn a_stream_that_is_turned_away_may_be_tried_elsewhere() {
    LocalSet::new()
        .run_until(async {
            for codecs in PAIRS {
                let (client, mut server) = tunnel(codecs).await;
                spawn_local(async move {
                    while let Some(Ok(incoming)) = server.accept().await {
                        incoming.turn_away();
                    }
                });
                let refused = client.open(request()).await.map(drop);
                assert!(matches!(refused, Err(TunnelError::NotTaken)), "{codecs:?}");
            }
        })
        .await;
}
