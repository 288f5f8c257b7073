//! Against a real gRPC server with TLS on loopback.

use std::sync::{Arc, Mutex};

use mesh_api::proto::ca::{
    IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Response,
    transport::{Identity as ServerIdentity, Server, ServerTlsConfig},
};

use super::*;
use crate::identity::testing::identity;

/// What the server saw of one call.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    csr: String,
    validity: i64,
    impersonated: Option<Kind>,
    authorization: Option<String>,
    cluster: Option<String>,
}

#[derive(Clone)]
struct Service {
    seen: Arc<Mutex<Vec<Seen>>>,
    answer: Result<Vec<String>, Code>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| {
            request
                .metadata()
                .get(name)
                .map(|value| value.to_str().expect("ASCII").to_owned())
        };
        let (authorization, cluster) = (header("authorization"), header("clusterid"));
        let message = request.into_inner();
        let mut fields = message.metadata.unwrap_or_default().fields;
        self.seen.lock().expect("not poisoned").push(Seen {
            csr: message.csr,
            validity: message.validity_duration,
            impersonated: fields
                .remove("ImpersonatedIdentity")
                .and_then(|value| value.kind),
            authorization,
            cluster,
        });
        match &self.answer {
            Ok(chain) => Ok(Response::new(IstioCertificateResponse {
                cert_chain: chain.clone(),
            })),
            Err(code) => Err(Status::new(*code, "not this one")),
        }
    }
}

struct Lab {
    folder: TempDir,
    config: IdentityConfig,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// A server whose certificate is for `ca.weft.test`, and a configuration that fits it.
async fn lab(answer: Result<Vec<String>, Code>) -> Lab {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).expect("a root");
    let server_key = KeyPair::generate().expect("a key");
    let server = CertificateParams::new(vec!["ca.weft.test".to_owned()])
        .and_then(|server| server.signed_by(&server_key, &Issuer::new(params, key)))
        .expect("a server certificate");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("loopback");
    let address = listener.local_addr().expect("bound");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let service = Service {
        seen: seen.clone(),
        answer,
    };
    let tls = ServerTlsConfig::new().identity(ServerIdentity::from_pem(
        server.pem(),
        server_key.serialize_pem(),
    ));
    let serving = Server::builder()
        .tls_config(tls)
        .expect("TLS")
        .add_service(IstioCertificateServiceServer::new(service))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    let folder = tempfile::tempdir().expect("a folder");
    let (roots_file, token_file) = (folder.path().join("roots.pem"), folder.path().join("token"));
    std::fs::write(&roots_file, root.pem()).expect("written");
    std::fs::write(&token_file, "first\n").expect("written");
    let config = IdentityConfig {
        ca_address: address.to_string(),
        roots_file,
        server_name: Some("ca.weft.test".to_owned()),
        token_file: Some(token_file),
        cluster: "c1".to_owned(),
        requested_lifetime: Duration::from_secs(3600),
        trust_domain: "cluster.local".to_owned(),
    };
    Lab {
        folder,
        config,
        seen,
    }
}

fn answer() -> Vec<String> {
    vec!["leaf".to_owned(), "root".to_owned()]
}

async fn ask(config: &IdentityConfig) -> Result<Vec<String>, CertificateError> {
    let client = CaClient::new(config.clone())?;
    client.sign(&identity("web"), "CSR".to_owned()).await
}

#[tokio::test]
async fn the_call_carries_what_the_wire_asks_for_and_reads_the_token_each_time() {
    let lab = lab(Ok(answer())).await;
    let client = CaClient::new(lab.config.clone()).expect("usable");
    assert_eq!(
        client.sign(&identity("web"), "CSR".to_owned()).await,
        Ok(answer())
    );
    std::fs::write(lab.folder.path().join("token"), "second").expect("written");
    assert_eq!(
        client.sign(&identity("web"), "CSR".to_owned()).await,
        Ok(answer())
    );
    let first = Seen {
        csr: "CSR".to_owned(),
        validity: 3600,
        impersonated: Some(Kind::StringValue(identity("web").to_string())),
        authorization: Some("Bearer first".to_owned()),
        cluster: Some("c1".to_owned()),
    };
    let second = Seen {
        authorization: Some("Bearer second".to_owned()),
        ..first.clone()
    };
    assert_eq!(*lab.seen.lock().expect("not poisoned"), [first, second]);
}

#[tokio::test]
async fn a_refusal_is_told_from_an_outage() {
    let denied = lab(Err(Code::PermissionDenied)).await;
    let error = ask(&denied.config).await.expect_err("refused");
    assert!(
        matches!(&error, CertificateError::Refused { message, .. } if message == "not this one")
    );
    assert!(!error.is_outage());
    let away = lab(Err(Code::Unavailable)).await;
    assert!(ask(&away.config).await.expect_err("away").is_outage());
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let config = IdentityConfig {
        ca_address: nobody.expect("a free port").to_string(),
        ..denied.config.clone()
    };
    let error = ask(&config).await.expect_err("nobody there");
    assert!(
        error.is_outage() && error.to_string().contains("refused"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_of_another_name_or_root_is_not_believed() {
    let lab = lab(Ok(answer())).await;
    let config = IdentityConfig {
        server_name: Some("other.test".to_owned()),
        ..lab.config.clone()
    };
    let error = ask(&config).await.expect_err("wrong name");
    assert!(
        error.is_outage() && error.to_string().contains("certificate"),
        "{error}"
    );
    let other = self::lab(Ok(answer())).await;
    let config = IdentityConfig {
        roots_file: other.config.roots_file.clone(),
        ..lab.config.clone()
    };
    ask(&config).await.expect_err("wrong root");
    assert!(
        lab.seen.lock().expect("not poisoned").is_empty(),
        "no token was sent to either"
    );
}

#[tokio::test]
async fn new_roots_are_taken_up_without_a_restart() {
    let (lab, other) = (lab(Ok(answer())).await, lab(Ok(answer())).await);
    let right = std::fs::read(&lab.config.roots_file).expect("read");
    std::fs::copy(&other.config.roots_file, &lab.config.roots_file).expect("copied");
    let client = CaClient::new(lab.config.clone()).expect("usable");
    client
        .sign(&identity("web"), "CSR".to_owned())
        .await
        .expect_err("wrong root");
    std::fs::write(&lab.config.roots_file, right).expect("written");
    assert_eq!(
        client.sign(&identity("web"), "CSR".to_owned()).await,
        Ok(answer())
    );
}

#[tokio::test]
async fn unusable_files_are_named() {
    let lab = lab(Ok(answer())).await;
    let token = lab.folder.path().join("token");
    for content in ["", " \n", "two\nlines"] {
        std::fs::write(&token, content).expect("written");
        let error = ask(&lab.config).await.expect_err("unusable token");
        assert!(error.to_string().contains("token"), "{error}");
    }
    std::fs::write(
        &token,
        "a".repeat(usize::try_from(FILE_MAX_BYTES).expect("small") + 1),
    )
    .expect("written");
    assert!(
        ask(&lab.config)
            .await
            .expect_err("huge token")
            .to_string()
            .contains("larger than")
    );
    std::fs::remove_file(&token).expect("removed");
    assert!(matches!(
        ask(&lab.config).await,
        Err(CertificateError::File {
            purpose: "token",
            ..
        })
    ));
    std::fs::write(&lab.config.roots_file, "garbage").expect("written");
    assert!(ask(&lab.config).await.is_err());
    assert!(lab.seen.lock().expect("not poisoned").is_empty());
}

#[tokio::test]
async fn only_https_addresses_are_accepted() {
    let lab = lab(Ok(answer())).await;
    for bad in [
        "http://127.0.0.1:1",
        "unix:///run/ca",
        "",
        "https://",
        "https://a b",
    ] {
        let config = IdentityConfig {
            ca_address: bad.to_owned(),
            ..lab.config.clone()
        };
        assert!(
            matches!(CaClient::new(config), Err(CertificateError::Config { .. })),
            "{bad:?}"
        );
    }
}

#[tokio::test]
async fn an_oversize_answer_is_refused() {
    let lab = lab(Ok(vec!["a".repeat(ANSWER_MAX_BYTES), "root".to_owned()])).await;
    let error = ask(&lab.config).await.expect_err("too large");
    assert!(error.to_string().contains("too large"), "{error}");
}

/// Paused time jumps to the next timer as soon as nothing else can happen.
#[tokio::test(start_paused = true)]
async fn a_service_that_never_answers_is_given_up_in_time() {
    let lab = lab(Ok(answer())).await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = silent.local_addr().expect("bound").to_string();
    let before = tokio::time::Instant::now();
    let error = ask(&IdentityConfig {
        ca_address: address,
        ..lab.config.clone()
    })
    .await
    .expect_err("silent");
    assert!(error.is_outage(), "{error}");
    assert!(before.elapsed() <= CALL_TIMEOUT, "{:?}", before.elapsed());
}
