//! Ports 15001 and 15006 read nothing of what applications say: they pass it on. So the input is what two applications do,
//! and what is checked is that no byte changes, appears or moves.

use std::{cell::Cell, net::SocketAddr, rc::Rc, time::Duration};

use http::HeaderMap;
use mesh_agent::{
    identity::tls::dummy_server_name,
    proxy::{
        Limits, TunnelCodec,
        registry::CloseSignal,
        relay::{End, Meter, relay_tcp, relay_tunnel},
        tunnel::{
            ConnectRequest, TunnelClient, TunnelServer,
            transport::{accept_tls, connect_tls},
        },
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    net::{TcpListener, TcpStream},
    task::spawn_local,
    time::Instant,
};

use crate::{World, script::in_real_time};

/// Silence that ends a half-closed connection; never reached, since the applications always end.
const HALF_CLOSE_IDLE: Duration = Duration::from_secs(5);
/// Longer than any conversation here takes.
const LIMIT: Duration = Duration::from_secs(20);
/// One step sends at most this many times 256 bytes.
const SCALE: usize = 40;

#[derive(Debug, Default)]
struct Counted {
    up: Cell<usize>,
    down: Cell<usize>,
}

impl Meter for Counted {
    fn near_to_far(&self, bytes: usize) {
        self.up.set(self.up.get() + bytes);
    }

    fn far_to_near(&self, bytes: usize) {
        self.down.set(self.down.get() + bytes);
    }

    fn waits(&self, _up: bool, _down: bool) {}

    fn ended(&self, _: Option<&TcpStream>) {}
}

/// What an application does, one byte a step.
#[derive(Debug, Clone, Copy)]
enum Step {
    Send(usize),
    Finish,
    Reset,
}

/// What became of an application's end.
#[derive(Debug)]
struct Saw {
    sent: Vec<u8>,
    heard: Vec<u8>,
    heard_end: bool,
    reset: bool,
}

/// The first byte chooses the way (bit 0: tunnel, bits 1 and 2: its codecs); of the others the top bit chooses who acts.
pub(crate) fn relay(bytes: &[u8]) {
    let Some((way, steps)) = bytes.split_first() else {
        return;
    };
    let steps_of = |actor: u8| -> Vec<Step> {
        steps
            .iter()
            .filter(|step| **step >> 7 == actor)
            .map(|step| match step & 0x7f {
                0 => Step::Finish,
                1 => Step::Reset,
                size => Step::Send(usize::from(size) * SCALE),
            })
            .collect()
    };
    let (client, server) = (steps_of(0), steps_of(1));
    let codec = |bit: u8| match way >> bit & 1 {
        0 => TunnelCodec::Native,
        _ => TunnelCodec::H2,
    };
    let tunnel = (way & 1 == 1).then(|| (codec(1), codec(2)));
    in_real_time(async move {
        let conversation = async {
            let (app, near) = pair().await;
            let (far, other) = pair().await;
            let carried = spawn_local(carry(near, far, tunnel));
            let (client, server) = tokio::join!(act(app, client), act(other, server));
            carried.await.expect("the relay does not panic");
            compare(&client, &server);
            compare(&server, &client);
        };
        let done = tokio::time::timeout(LIMIT, conversation).await;
        done.expect("a connection whose ends have ended stays open");
    });
}

/// Everything that was heard was sent, in this order; where nobody reset, everything arrived.
fn compare(sender: &Saw, receiver: &Saw) {
    assert!(
        sender.sent.starts_with(&receiver.heard),
        "bytes were changed on their way"
    );
    if receiver.heard_end && !sender.reset && !receiver.reset {
        assert_eq!(
            sender.sent.len(),
            receiver.heard.len(),
            "bytes were lost before FIN"
        );
    }
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address: SocketAddr = listener.local_addr().expect("bound");
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.expect("connects"), accepted.expect("accepts").0)
}

async fn carry(near: TcpStream, far: TcpStream, tunnel: Option<(TunnelCodec, TunnelCodec)>) -> End {
    let meter = Rc::new(Counted::default());
    let close = CloseSignal::default();
    let Some((codec, serving)) = tunnel else {
        return relay_tcp(near, far, &*meter, &close, HALF_CLOSE_IDLE).await;
    };
    let (here, there) = duplex(64 * 1024);
    let certified = &World::get().certified;
    let server = spawn_local(async move {
        let deadline = Instant::now() + LIMIT;
        let secured = accept_tls(serving, certified.server.clone(), there, deadline).await;
        let secured = secured.expect("our own client");
        let mut server = TunnelServer::handshake(secured, &Limits::default())
            .await
            .expect("our own client");
        let mut far = Some(far);
        while let Some(Ok(incoming)) = server.accept().await {
            let stream = incoming.accept(HeaderMap::new()).expect("just opened");
            let far = far.take().expect("one stream");
            spawn_local(async move {
                let (meter, close) = (Rc::new(Counted::default()), CloseSignal::default());
                relay_tunnel(far, stream, &meter, &close, HALF_CLOSE_IDLE).await
            });
        }
    });
    let deadline = Instant::now() + LIMIT;
    let config = certified.client([World::get().identity.clone()].into());
    let secured = connect_tls(codec, config, dummy_server_name(), here, deadline).await;
    let secured = secured.expect("our own server");
    let client = TunnelClient::handshake(secured, &Limits::default(), None)
        .await
        .expect("our own server");
    let request = ConnectRequest {
        authority: "10.1.0.5:80".into(),
        headers: HeaderMap::new(),
    };
    let (stream, _) = client.open(request).await.expect("accepted");
    let end = relay_tunnel(near, stream, &meter, &close, HALF_CLOSE_IDLE).await;
    drop(client);
    server.await.expect("the tunnel does not panic");
    end
}

/// Plays an application: its steps, then FIN, while it reads until the other side has ended.
async fn act(socket: TcpStream, steps: Vec<Step>) -> Saw {
    let mut saw = Saw {
        sent: Vec::new(),
        heard: Vec::new(),
        heard_end: false,
        reset: steps.iter().any(|step| matches!(step, Step::Reset)),
    };
    let (mut read, mut write) = socket.into_split();
    let (mut heard, mut heard_end) = (Vec::new(), false);
    let hearing = async {
        heard_end = read.read_to_end(&mut heard).await.is_ok();
    };
    let acting = async {
        for step in steps {
            match step {
                Step::Send(count) => {
                    let from = saw.sent.len();
                    // A pattern whose period no buffer shares.
                    let bytes: Vec<u8> = (from..from + count).map(|at| (at % 251) as u8).collect();
                    saw.sent.extend(&bytes);
                    if write.write_all(&bytes).await.is_err() {
                        return None;
                    }
                }
                Step::Finish => break,
                Step::Reset => return Some(()),
            }
        }
        // The other side may have reset it.
        let _ = write.shutdown().await;
        None
    };
    let both = async {
        tokio::pin!(hearing);
        tokio::pin!(acting);
        let mut heard_all = false;
        loop {
            tokio::select! {
                () = &mut hearing, if !heard_all => heard_all = true,
                reset = &mut acting => {
                    if reset.is_none() && !heard_all {
                        hearing.await;
                    }
                    return reset.is_some();
                }
            }
        }
    };
    let resets = both.await;
    let socket = read.reunite(write).expect("halves of one socket");
    if resets {
        let linger = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
        linger.expect("always possible");
    }
    drop(socket);
    saw.heard = heard;
    saw.heard_end = heard_end;
    saw
}
