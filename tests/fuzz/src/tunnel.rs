//! Tunnels: TLS, and HTTP/2 on either end, with the agent's own codec and limits.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use mesh_agent::proxy::{
    Limits, TunnelCodec,
    tunnel::{
        ConnectRequest, Incoming, TunnelClient, TunnelServer, TunnelStream,
        headers::{TraceParent, forwarded_host, parse_authority},
        transport::accept_tls,
    },
};
use tokio::{task::spawn_local, time::Instant};

use crate::{
    World,
    script::{Script, in_virtual_time},
};

/// Nobody gets through TLS by bytes alone: that takes a key that the authority has certified.
pub(crate) fn tls(bytes: &[u8]) {
    let config = World::get().certified.server.clone();
    in_virtual_time(async {
        let deadline = Instant::now() + Duration::from_secs(10);
        let shaken = accept_tls(config, Script::new(bytes), deadline).await;
        let error = shaken.expect_err("a handshake without a certificate");
        drop(error.to_string());
    });
}

/// The agent accepts a tunnel; each request is looked at as `proxy::inbound` does, and answered.
pub(crate) fn server(bytes: &[u8]) {
    in_virtual_time(async {
        let limits = Limits::default();
        let script = Script::new(bytes);
        let Ok(mut server) = TunnelServer::handshake(TunnelCodec::default(), script, &limits).await
        else {
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
    });
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

async fn send(stream: &mut TunnelStream, mut bytes: Bytes) {
    while !bytes.is_empty() {
        let wanted = bytes.len();
        let room = std::future::poll_fn(|cx| stream.send.poll_room(cx, wanted));
        let Ok(Ok(room)) = tokio::time::timeout(Duration::from_millis(1), room).await else {
            return;
        };
        assert!(room > 0 && room <= wanted, "{room} of {wanted}");
        if stream.send.send(bytes.split_to(room)).is_err() {
            return;
        }
    }
}

/// The agent has opened a tunnel, and a stream on it; the bytes are what the server says.
pub(crate) fn client(bytes: &[u8]) {
    in_virtual_time(async {
        let limits = Limits::default();
        let script = Script::new(bytes);
        let codec = TunnelCodec::default();
        let Ok(client) = TunnelClient::handshake(codec, script, &limits, None).await else {
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
    });
}
