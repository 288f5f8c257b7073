//! The agent's own servers: HTTP and the local socket.

use std::sync::{Arc, Mutex};

use mesh_agent::{
    admin::{
        AdminState, LocalHandler,
        http::{Site, connection},
        local::serve_one,
    },
    config::validate_enrolment,
};
use mesh_api::local::{Request, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

use crate::script::{Script, in_virtual_time};

#[derive(Debug, Default)]
struct Fake {
    filter: Mutex<String>,
}

impl AdminState for Fake {
    fn pending(&self) -> Vec<String> {
        Vec::new()
    }

    fn metrics(&self) -> String {
        "weft_build_info 1\n".to_owned()
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn dump(&self) -> Value {
        json!({})
    }

    fn log_filter(&self) -> String {
        self.filter.lock().expect("nothing panics with it").clone()
    }

    fn set_log_filter(&self, filter: &str) -> Result<(), String> {
        filter.clone_into(&mut self.filter.lock().expect("nothing panics with it"));
        Ok(())
    }
}

/// The first byte chooses the site.
pub(crate) fn admin_http(bytes: &[u8]) {
    let Some((site, request)) = bytes.split_first() else {
        return;
    };
    let site = match site % 3 {
        0 => Site::Metrics,
        1 => Site::Readiness,
        _ => Site::Admin,
    };
    let request = request.to_vec();
    let is_post = request.starts_with(b"POST ") || request.windows(6).any(|it| it == b"\nPOST ");
    let state = Arc::new(Fake::default());
    in_virtual_time(async {
        let (mut near, far) = duplex(64 * 1024);
        let asking = async {
            // The server may have had enough before everything was written.
            let _ = near.write_all(&request).await;
            let _ = near.shutdown().await;
            let mut answer = Vec::new();
            let _ = near.read_to_end(&mut answer).await;
            answer
        };
        let (answer, ()) = tokio::join!(asking, connection(site, far, state.clone()));
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1."),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    });
    assert!(
        state.log_filter().is_empty() || (is_post && site == Site::Admin),
        "the log filter was changed without being asked for"
    );
}

struct Handler;

impl LocalHandler for Handler {
    async fn handle(&self, request: Request) -> Response {
        if let Request::Enroll(enrolment) = &request {
            if let Err(message) = validate_enrolment(enrolment) {
                return Response::Error { message };
            }
            for path in [Some(&enrolment.netns), enrolment.cgroup.as_ref()] {
                assert!(
                    path.is_none_or(|path| path.starts_with('/')),
                    "{enrolment:?}"
                );
            }
        }
        Response::Done {
            message: format!("{request:?}"),
        }
    }
}

/// Whatever is asked, there is an answer that the command line understands.
pub(crate) fn local_socket(bytes: &[u8]) {
    in_virtual_time(async {
        let answer = serve_one(&mut Script::new(bytes), &Handler).await;
        let answer = answer.expect("a script does not fail");
        let line = serde_json::to_vec(&answer).expect("an answer can be written");
        assert!(!line.contains(&b'\n'));
        let again: Response = serde_json::from_slice(&line).expect("and read");
        assert_eq!(again, answer);
    });
}
