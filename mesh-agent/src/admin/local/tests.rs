//! Against a real socket in a folder of its own.

use mesh_api::local::Enrolment;
use tempfile::TempDir;

use super::*;

struct Echo;

impl LocalHandler for Echo {
    async fn handle(&self, request: Request) -> Response {
        match request {
            Request::Enroll(Enrolment {
                namespace, name, ..
            }) => Response::Done {
                message: format!("{namespace}/{name}"),
            },
            Request::Top => std::future::pending().await,
            Request::Dump => panic!("scripted"),
            other => Response::Done {
                message: format!("{other:?}"),
            },
        }
    }
}

struct Lab {
    folder: TempDir,
}

impl Lab {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let server = LocalServer::bind(folder.path()).expect("bound");
        tokio::spawn(server.serve(Arc::new(Echo), CancellationToken::new()));
        Self { folder }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join(SOCKET_NAME))
            .await
            .expect("served")
    }

    /// Sends raw bytes, optionally ends the direction, and returns the answer if there is one.
    async fn raw(&self, bytes: &[u8], end: bool) -> Option<Response> {
        let mut stream = self.connect().await;
        // The server may refuse and close before everything is written.
        let _ = stream.write_all(bytes).await;
        if end {
            let _ = stream.shutdown().await;
        }
        receive(&mut stream).await
    }

    async fn refusal(&self, bytes: &[u8], end: bool) -> String {
        match self.raw(bytes, end).await {
            Some(Response::Error { message }) => message,
            other => panic!("expected an error, got {other:?}"),
        }
    }
}

async fn receive(stream: &mut UnixStream) -> Option<Response> {
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    (!answer.is_empty()).then(|| serde_json::from_slice(&answer).expect("one JSON line"))
}

#[tokio::test]
async fn a_request_is_carried_out_and_answered_on_one_line() {
    let lab = Lab::start();
    let request = br#"{"op":"enroll","namespace":"shop","name":"web","netns":"/run/netns/web"}"#;
    let answer = lab.raw(&[request.as_slice(), b"\n"].concat(), false).await;
    assert_eq!(
        answer,
        Some(Response::Done {
            message: "shop/web".to_owned()
        })
    );
}

#[tokio::test]
async fn malformed_requests_are_answered_with_the_place_and_the_server_goes_on() {
    let lab = Lab::start();
    let table: [(&[u8], &str); 7] = [
        (b"\n", "column"),
        (b"\xff\xfe\n", "column"),
        (b"{\"op\":\"status\"\n", "line 1 column"),
        (b"{\"op\":\"reboot\"}\n", "unknown variant"),
        (
            b"{\"op\":\"enroll\",\"namespace\":\"shop\"}\n",
            "missing field",
        ),
        (
            b"{\"op\":\"enroll\",\"namespace\":1,\"name\":\"a\",\"netns\":\"b\"}\n",
            "invalid type",
        ),
        (
            b"{\"op\":\"enroll\",\"namespace\":\"s\",\"name\":\"a\",\"netns\":\"b\",\"extra\":1}\n",
            "unknown field",
        ),
    ];
    for (bytes, expected) in table {
        let message = lab.refusal(bytes, false).await;
        assert!(
            message.contains("malformed request") && message.contains(expected),
            "{message}"
        );
    }
    assert!(
        lab.refusal(b"{\"op\":\"status\"}", true)
            .await
            .contains("without a newline")
    );
    let answer = lab.raw(b"{\"op\":\"status\"}\n", false).await;
    assert_eq!(
        answer,
        Some(Response::Done {
            message: "Status".to_owned()
        })
    );
}

#[tokio::test]
async fn the_longest_line_is_accepted_and_one_byte_more_is_not() {
    let lab = Lab::start();
    let request = b"{\"op\":\"status\"}";
    let padded = |length: usize| {
        [
            &vec![b' '; length - request.len() - 1],
            request.as_slice(),
            b"\n",
        ]
        .concat()
    };
    let answer = lab.raw(&padded(REQUEST_MAX_BYTES), false).await;
    assert_eq!(
        answer,
        Some(Response::Done {
            message: "Status".to_owned()
        })
    );
    assert!(
        lab.refusal(&padded(REQUEST_MAX_BYTES + 1), false)
            .await
            .contains("longer than")
    );
    let endless = vec![b'a'; 4 * REQUEST_MAX_BYTES];
    // Unread bytes may turn the answer into a reset; the server must go on either way.
    let _ = lab.raw(&endless, false).await;
    assert!(lab.raw(b"{\"op\":\"status\"}\n", false).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn silent_clients_and_slow_handlers_end_in_time_and_hold_nobody_up() {
    let lab = Lab::start();
    let mut silent = Vec::new();
    for _ in 0..CLIENTS_MAX {
        silent.push(lab.connect().await);
    }
    assert!(
        lab.raw(b"{\"op\":\"status\"}\n", false).await.is_some(),
        "served after the silent ones are closed"
    );
    for mut stream in silent {
        let Some(Response::Error { message }) = receive(&mut stream).await else {
            panic!("a reason is given")
        };
        assert!(message.contains("no request line"), "{message}");
    }
    assert!(
        lab.refusal(b"{\"op\":\"top\"}\n", false)
            .await
            .contains("gave up")
    );
}

#[tokio::test]
async fn a_panic_in_the_handler_ends_one_connection_only() {
    let lab = Lab::start();
    assert_eq!(lab.raw(b"{\"op\":\"dump\"}\n", false).await, None);
    for _ in 0..CLIENTS_MAX {
        assert_eq!(lab.raw(b"{\"op\":\"dump\"}\n", false).await, None);
    }
    assert!(
        lab.raw(b"{\"op\":\"status\"}\n", false).await.is_some(),
        "no slot was lost"
    );
}

#[tokio::test]
async fn folder_and_socket_are_for_the_owner_only() {
    let outer = tempfile::tempdir().expect("a folder");
    let folder = outer.path().join("run/weft");
    let server = LocalServer::bind(&folder).expect("bound");
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    assert_eq!((mode(&folder), mode(server.path())), (0o700, 0o600));
    let path = server.path().to_owned();
    drop(server);
    assert!(!path.exists(), "removed at the end");
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).expect("ours");
    let _server = LocalServer::bind(&folder).expect("bound");
    assert_eq!(mode(&folder), 0o700, "tightened");
}

#[tokio::test]
async fn a_folder_that_others_can_write_to_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o1777)).expect("ours");
    assert!(matches!(
        LocalServer::bind(folder.path()),
        Err(LocalSocketError::Unsafe { .. })
    ));
    assert_eq!(
        fs::metadata(folder.path()).expect("there").mode() & 0o7777,
        0o1777
    );
}

#[tokio::test]
async fn a_stale_socket_is_replaced_a_living_one_and_other_files_are_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(SOCKET_NAME);
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists(), "stale");
    let living = LocalServer::bind(folder.path()).expect("replaced");
    assert!(matches!(
        LocalServer::bind(folder.path()),
        Err(LocalSocketError::InUse { .. })
    ));
    drop(living);
    fs::write(&path, "a file").expect("written");
    assert!(matches!(
        LocalServer::bind(folder.path()),
        Err(LocalSocketError::InTheWay { .. })
    ));
    assert_eq!(fs::read_to_string(&path).expect("kept"), "a file");
}

#[tokio::test]
async fn a_successors_socket_is_not_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let old = LocalServer::bind(folder.path()).expect("bound");
    // Keeps the inode of the old file from being used again.
    fs::hard_link(old.path(), folder.path().join("kept")).expect("linked");
    fs::remove_file(old.path()).expect("ours");
    let new = LocalServer::bind(folder.path()).expect("bound");
    drop(old);
    assert!(new.path().exists());
}

#[test]
fn only_root_and_the_agents_user_may_ask() {
    assert_eq!(admit(0, 1000), Ok(()));
    assert_eq!(admit(1000, 1000), Ok(()));
    assert!(matches!(admit(1001, 1000), Err(Response::Error { .. })));
}
