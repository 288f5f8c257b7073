//! Over loopback, with raw bytes.

use std::sync::Mutex;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

struct Fake {
    pending: Mutex<Vec<String>>,
    filter: Mutex<String>,
}

impl AdminState for Fake {
    fn pending(&self) -> Vec<String> {
        self.pending.lock().expect("not poisoned").clone()
    }

    fn metrics(&self) -> String {
        "weft_build_info 1\n".to_owned()
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({"node": "node-a"})
    }

    fn dump(&self) -> serde_json::Value {
        serde_json::json!({"workloads": []})
    }

    fn log_filter(&self) -> String {
        self.filter.lock().expect("not poisoned").clone()
    }

    fn set_log_filter(&self, filter: &str) -> Result<(), String> {
        if filter == "nonsense!" {
            return Err("not a filter".to_owned());
        }
        filter.clone_into(&mut self.filter.lock().expect("not poisoned"));
        Ok(())
    }
}

struct Lab {
    at: AdminAddresses,
    state: Arc<Fake>,
}

async fn lab() -> Lab {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let servers = AdminServers::bind(AdminAddresses {
        metrics: any,
        readiness: any,
        admin: any,
    })
    .await;
    let servers = servers.expect("free ports");
    let at = servers.addresses().expect("bound");
    let state = Arc::new(Fake {
        pending: Mutex::default(),
        filter: Mutex::new("info".to_owned()),
    });
    tokio::spawn(servers.serve(state.clone(), CancellationToken::new()));
    Lab { at, state }
}

#[tokio::test]
async fn a_server_on_every_address_answers_both_families() {
    let listener = listen((Ipv6Addr::UNSPECIFIED, 0).into()).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let ipv4 = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await;
    ipv4.expect("IPv4 is served, with IPv6 or without");
}

/// Sends raw bytes and reads until the server closes.
async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.expect("loopback");
    // The server may refuse and close before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).expect("UTF-8")
}

async fn ask(to: SocketAddr, method: &str, target: &str) -> (u16, String) {
    let answer = raw(
        to,
        format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes(),
    )
    .await;
    let status = answer
        .get(9..12)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    (status, answer)
}

#[tokio::test]
async fn metrics_are_served_under_both_paths_in_the_prometheus_format() {
    let lab = lab().await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, answer) = ask(lab.at.metrics, "GET", path).await;
        assert_eq!(status, 200);
        assert!(
            answer.contains("text/plain; version=0.0.4") && answer.ends_with("weft_build_info 1\n"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn readiness_names_what_it_waits_for() {
    let lab = lab().await;
    assert_eq!(ask(lab.at.readiness, "GET", "/healthz/ready").await.0, 200);
    *lab.state.pending.lock().expect("not poisoned") =
        vec!["discovery".to_owned(), "capture".to_owned()];
    let (status, answer) = ask(lab.at.readiness, "GET", "/healthz/ready").await;
    assert_eq!(status, 503);
    assert!(
        answer.ends_with("waiting for: discovery, capture\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn admin_shows_state_and_changes_the_log_filter() {
    let lab = lab().await;
    assert_eq!(ask(lab.at.admin, "GET", "/healthz/live").await.0, 200);
    let (status, answer) = ask(lab.at.admin, "GET", "/config_dump").await;
    assert!(
        status == 200 && answer.contains("application/json") && answer.contains("node-a"),
        "{answer}"
    );
    assert!(
        ask(lab.at.admin, "GET", "/dump")
            .await
            .1
            .contains("workloads")
    );
    assert!(
        ask(lab.at.admin, "GET", "/logging")
            .await
            .1
            .ends_with("info\n")
    );
    let (status, answer) = ask(lab.at.admin, "POST", "/logging?level=info%2Caccess=off").await;
    assert!(
        status == 200 && answer.ends_with("info,access=off\n"),
        "{answer}"
    );
    for bad in [
        "/logging",
        "/logging?level=",
        "/logging?level=%zz",
        "/logging?level=%ff",
        "/logging?level=nonsense!",
    ] {
        assert_eq!(ask(lab.at.admin, "POST", bad).await.0, 400, "{bad}");
    }
    assert_eq!(
        lab.state.log_filter(),
        "info,access=off",
        "a refused filter changes nothing"
    );
}

#[tokio::test]
async fn other_methods_and_paths_are_refused() {
    let lab = lab().await;
    let table = [
        (lab.at.metrics, "GET", "/", 404),
        (lab.at.metrics, "GET", "/dump", 404),
        (lab.at.metrics, "POST", "/metrics", 405),
        (lab.at.readiness, "GET", "/metrics", 404),
        (lab.at.readiness, "DELETE", "/healthz/ready", 405),
        (lab.at.admin, "GET", "/../../etc/passwd", 404),
        (lab.at.admin, "POST", "/dump", 405),
        (lab.at.admin, "GET", "/logging?level=debug", 405),
        (lab.at.admin, "PUT", "/logging?level=debug", 405),
        (lab.at.admin, "CONNECT", "example.test:80", 403),
    ];
    for (to, method, target, expected) in table {
        assert_eq!(
            ask(to, method, target).await.0,
            expected,
            "{method} {target}"
        );
    }
    assert_eq!(lab.state.log_filter(), "info");
}

#[tokio::test]
async fn garbage_oversize_heads_and_bodies_are_refused_and_the_server_goes_on() {
    let lab = lab().await;
    let long_header = format!(
        "GET /dump HTTP/1.1\r\nX: {}\r\n\r\n",
        "a".repeat(2 * HEAD_MAX_BYTES)
    );
    let many_headers = format!(
        "GET /dump HTTP/1.1\r\n{}\r\n",
        "A: b\r\n".repeat(HEADERS_MAX + 1)
    );
    let attacks: [(&str, &[u8], &[&str]); 6] = [
        ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", &["400", ""]),
        ("not HTTP", b"hello there\r\n\r\n", &["400", ""]),
        ("long header", long_header.as_bytes(), &["431", "400", ""]),
        ("many headers", many_headers.as_bytes(), &["431", "400", ""]),
        ("body", b"POST /logging?level=debug HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", &["413"]),
        (
            "chunked",
            b"POST /logging?level=debug HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &["413"],
        ),
    ];
    for (name, bytes, accepted) in attacks {
        let mut stream = TcpStream::connect(lab.at.admin).await.expect("loopback");
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(
            accepted.contains(&answer.get(9..12).unwrap_or_default()),
            "{name}: {answer}"
        );
    }
    assert_eq!(lab.state.log_filter(), "info");
    assert_eq!(ask(lab.at.admin, "GET", "/healthz/live").await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn silent_and_dribbling_clients_are_closed_in_time() {
    let state: Arc<dyn AdminState> = Arc::new(Fake {
        pending: Mutex::default(),
        filter: Mutex::default(),
    });
    let long_ago = tokio::time::Instant::now();
    for start in [&b""[..], b"GET /dump HT"] {
        let (mut client, server) = tokio::io::duplex(1024);
        client.write_all(start).await.expect("memory");
        connection(Site::Admin, server, state.clone()).await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(long_ago.elapsed().as_secs(), 2 * HEAD_TIMEOUT.as_secs());
    // One that asks and never reads the answer.
    let (mut client, server) = tokio::io::duplex(8);
    let before = tokio::time::Instant::now();
    let asking = async {
        client
            .write_all(b"GET /dump HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await
            .expect("memory");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = connection(Site::Admin, server, state) => {}
        () = asking => {}
    }
    assert_eq!(before.elapsed().as_secs(), CONNECTION_TIMEOUT.as_secs());
}

#[tokio::test]
async fn beyond_the_limit_clients_wait_and_are_served_when_a_place_is_free() {
    let lab = lab().await;
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        silent.push(TcpStream::connect(lab.at.admin).await.expect("loopback"));
    }
    let waiting = tokio::spawn(ask(lab.at.admin, "GET", "/healthz/live"));
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    drop(silent);
    assert_eq!(waiting.await.expect("no panic").0, 200);
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let address = taken.local_addr().expect("bound");
    let error = AdminServers::bind(AdminAddresses {
        metrics: any,
        readiness: address,
        admin: any,
    })
    .await;
    let text = error.expect_err("taken").to_string();
    assert!(
        text.contains(&address.to_string()) && text.contains("readiness"),
        "{text}"
    );
}

#[test]
fn percent_encoding_is_decoded_or_refused() {
    assert_eq!(percent_decode("a%2Cb").as_deref(), Some("a,b"));
    for bad in ["%", "%1", "%+1", "%gg", "%ff"] {
        assert_eq!(percent_decode(bad), None, "{bad}");
    }
}

#[tokio::test]
async fn admin_answers_to_names_of_this_machine_and_to_no_web_page() {
    let lab = lab().await;
    let status = async |to: SocketAddr, head: &str| {
        let answer = raw(to, format!("{head}\r\n\r\n").as_bytes()).await;
        answer.get(9..12).map(str::to_owned).unwrap_or_default()
    };
    for head in [
        "GET /dump HTTP/1.1\r\nHost: 127.0.0.1:15000",
        "GET /dump HTTP/1.1\r\nHost: [::1]:15000",
        "GET /dump HTTP/1.1\r\nHost: LocalHost",
        "GET /dump HTTP/1.0",
    ] {
        assert_eq!(status(lab.at.admin, head).await, "200", "{head}");
    }
    for head in [
        "GET /dump HTTP/1.1\r\nHost: rebound.example:15000",
        "GET /dump HTTP/1.1\r\nHost: localhost.example",
        "GET /dump HTTP/1.1\r\nHost: 127.0.0.1.example",
        "GET /dump HTTP/1.1\r\nHost: 10.0.0.1",
        "GET /dump HTTP/1.1\r\nHost: localhost\r\nHost: rebound.example",
        "GET http://rebound.example/dump HTTP/1.1\r\nHost: localhost",
        "POST /logging?level=trace HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://page.example",
        "POST /logging?level=trace HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: null",
    ] {
        assert_eq!(status(lab.at.admin, head).await, "403", "{head}");
    }
    let scrape = "GET /metrics HTTP/1.1\r\nHost: node-a.example:15020";
    assert_eq!(status(lab.at.metrics, scrape).await, "200");
}
