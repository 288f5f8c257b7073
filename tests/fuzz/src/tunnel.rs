//! Tunnels: TLS, and HTTP/2 on either end, with the agent's own limits and by every codec it has.

use std::{io::Read as _, time::Duration};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Method, StatusCode};
use mesh_agent::{
    identity::tls::dummy_server_name,
    proxy::{
        Limits, TunnelCodec,
        buffers::Size,
        tunnel::{
            ConnectRequest, Incoming, TunnelClient, TunnelServer, TunnelStream,
            headers::{TraceParent, forwarded_host, parse_authority},
            transport::{accept_tls, connect_tls},
        },
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional, duplex},
    task::spawn_local,
    time::Instant,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    World,
    script::{Script, in_virtual_time},
};

/// Both are reached by the same bytes.
const CODECS: [TunnelCodec; 2] = [TunnelCodec::Native, TunnelCodec::H2];
/// What is on its way between the ends of a tunnel in memory.
const PIPE_BYTES: usize = 64 << 10;

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Nobody gets through TLS by bytes alone: that takes a key that the authority has certified.
pub(crate) fn tls(bytes: &[u8]) {
    let config = World::get().certified.server.clone();
    for codec in CODECS {
        in_virtual_time(async {
            let shaken = accept_tls(codec, config.clone(), Script::new(bytes), deadline()).await;
            let error = shaken.expect_err("a handshake without a certificate");
            drop(error.to_string());
        });
    }
}

/// A peer with a good certificate says `bytes` inside TLS.
async fn say(bytes: &[u8], shaken: impl AsyncRead + AsyncWrite + Unpin + 'static) {
    let (mut shaken, mut script) = (shaken, Script::new(bytes));
    // Ends when the script or the agent does.
    let _ = copy_bidirectional(&mut script, &mut shaken).await;
}

/// The agent accepts a tunnel; each request is looked at as `proxy::inbound` does, and answered.
pub(crate) fn server(bytes: &[u8]) {
    for codec in CODECS {
        in_virtual_time(serve(codec, bytes.to_vec()));
    }
}

async fn serve(codec: TunnelCodec, bytes: Vec<u8>) {
    let certified = &World::get().certified;
    let (near, far) = duplex(PIPE_BYTES);
    let config = certified.client([World::get().identity.clone()].into());
    spawn_local(async move {
        let connector = TlsConnector::from(config);
        let shaken = connector.connect(dummy_server_name(), far).await;
        say(&bytes, shaken.expect("certified by the same authority")).await;
    });
    let secured = accept_tls(codec, certified.server.clone(), near, deadline()).await;
    let secured = secured.expect("certified by the same authority");
    let Ok(mut server) = TunnelServer::handshake(secured, &Limits::default()).await else {
        return;
    };
    let mut streams = 0_u32;
    loop {
        match server.accept().await {
            Some(Ok(incoming)) => {
                streams += 1;
                if streams % 8 == 7 {
                    server.shut_down();
                }
                drop(spawn_local(answer(incoming)));
            }
            Some(Err(error)) => return drop(error.to_string()),
            None => return,
        }
    }
}

async fn answer(incoming: Incoming) {
    let request = &incoming.request;
    let authority = request.uri.authority().map(http::uri::Authority::as_str);
    let parsed = parse_authority(authority.unwrap_or_default());
    drop(forwarded_host(&request.headers).map(str::to_owned));
    let _ = TraceParent::from_headers(&request.headers);
    if request.method != Method::CONNECT || parsed.is_err() {
        return incoming.refuse(StatusCode::BAD_REQUEST);
    }
    if let Ok(stream) = incoming.accept(HeaderMap::new()) {
        echo(stream).await;
    }
}

/// Sends back what comes, as far as the peer's windows allow, until the stream ends.
async fn echo(mut stream: TunnelStream) {
    while let Some(Ok(bytes)) = std::future::poll_fn(|cx| stream.receive.poll_data(cx)).await {
        stream.receive.consumed(bytes.len());
        send(&mut stream, bytes).await;
    }
    // The peer may have reset it.
    let _ = stream.send.finish();
}

async fn send(stream: &mut TunnelStream, bytes: Bytes) {
    let mut rest = bytes.reader();
    while rest.get_ref().has_remaining() {
        let before = rest.get_ref().remaining();
        let sent = std::future::poll_fn(|cx| {
            stream
                .send
                .poll_read_from(cx, Size::Small, |into| rest.read_vectored(into))
        });
        let Ok(Ok(sent)) = tokio::time::timeout(Duration::from_millis(1), sent).await else {
            return;
        };
        let sent = sent.expect("memory can be read");
        assert!(sent > 0 && sent <= before, "{sent} of {before}");
    }
}

/// The agent has opened a tunnel, and a stream on it; the bytes are what the server says.
pub(crate) fn client(bytes: &[u8]) {
    for codec in CODECS {
        in_virtual_time(ask(codec, bytes.to_vec()));
    }
}

async fn ask(codec: TunnelCodec, bytes: Vec<u8>) {
    let certified = &World::get().certified;
    let (near, far) = duplex(PIPE_BYTES);
    let config = certified.server.clone();
    spawn_local(async move {
        let shaken = TlsAcceptor::from(config).accept(far).await;
        say(&bytes, shaken.expect("certified by the same authority")).await;
    });
    let config = certified.client([World::get().identity.clone()].into());
    let secured = connect_tls(codec, config, dummy_server_name(), near, deadline()).await;
    let secured = secured.expect("certified by the same authority");
    let Ok(client) = TunnelClient::handshake(secured, &Limits::default(), None).await else {
        return;
    };
    for _ in 0..2 {
        let request = ConnectRequest {
            authority: "10.1.0.5:80".into(),
            headers: HeaderMap::new(),
        };
        match tokio::time::timeout(Duration::from_secs(10), client.open(request)).await {
            Ok(Ok((stream, headers))) => {
                drop(headers);
                echo(stream).await;
            }
            Ok(Err(error)) => drop(error.to_string()),
            Err(_) => return,
        }
    }
    let _ = (client.is_open(), client.peer_streams());
}
