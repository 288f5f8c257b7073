//! A whole control plane over loopback TLS, driven by a small client.
#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at whatever it did not expect"
)]

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use mesh_api::proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status as WireStatus,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    security::{AUTHORIZATION_TYPE_URL, Authorization},
    workload::ADDRESS_TYPE_URL,
};
use mesh_control::{
    ControlHandle, ControlPlane, StartError,
    config::{ControlConfig, NodesConfig, ServerConfig, SourceConfig},
};
use prometheus::Registry;
use prost::Message as _;
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_RSA_SHA256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig},
};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn pod(name: &str, node: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {name}}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n---\n"
    )
}

struct World {
    folder: tempfile::TempDir,
    control: ControlHandle,
}

impl World {
    async fn start(manifests: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let world = folder.path();
        fs::create_dir(world.join("manifests")).unwrap();
        fs::write(world.join("manifests/all.yaml"), manifests).unwrap();
        write_tokens(&world.join("tokens"), &format!("{TOKEN} node-a\n"));
        let config = config(world);
        let control = ControlPlane::start(config, Registry::new()).await.unwrap();
        Self { folder, control }
    }

    fn write(&self, manifests: &str) {
        let staged = self.folder.path().join("staged");
        fs::write(&staged, manifests).unwrap();
        fs::rename(staged, self.folder.path().join("manifests/all.yaml")).unwrap();
    }

    async fn channel(&self) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.control.roots_pem()))
            .domain_name("localhost");
        let url = format!("https://{}", self.control.address());
        Channel::from_shared(url)
            .unwrap()
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    async fn sign(
        &self,
        token: &str,
        csr: &str,
        identity: Option<&str>,
    ) -> Result<IstioCertificateResponse, Status> {
        let fields = identity.map(|identity| {
            let value = Value {
                kind: Some(Kind::StringValue(identity.to_owned())),
            };
            ("ImpersonatedIdentity".to_owned(), value)
        });
        let message = IstioCertificateRequest {
            csr: csr.to_owned(),
            validity_duration: 3600,
            metadata: Some(Struct {
                fields: fields.into_iter().collect(),
            }),
        };
        let mut client = IstioCertificateServiceClient::new(self.channel().await);
        client
            .create_certificate(bearing(token, message))
            .await
            .map(tonic::Response::into_inner)
    }

    async fn metric(&self, name: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.control.metrics_address().unwrap())
            .await
            .unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next().map(str::to_owned)
    }
}

fn write_tokens(path: &Path, text: &str) {
    let staged = path.with_extension("new");
    fs::write(&staged, text).unwrap();
    fs::set_permissions(&staged, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(staged, path).unwrap();
}

fn config(world: &Path) -> ControlConfig {
    ControlConfig {
        source: SourceConfig {
            folder: world.join("manifests"),
            last_good: None,
        },
        server: ServerConfig {
            metrics: Some(([127, 0, 0, 1], 0).into()),
            ..ServerConfig::default()
        },
        nodes: NodesConfig {
            tokens: Some(world.join("tokens")),
        },
        ..ControlConfig::default()
    }
}

fn bearing<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

fn csr(key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serialize_request(key).unwrap().pem().unwrap()
}

/// A discovery client that answers when it is told to.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn connect(
        world: &World,
        token: &str,
        first: DeltaDiscoveryRequest,
    ) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(16);
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(world.channel().await);
        let request = bearing(token, ReceiverStream::new(outgoing));
        let responses = client
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        Ok(Self {
            requests,
            responses,
        })
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        self.responses
            .message()
            .await
            .unwrap()
            .expect("the stream goes on")
    }

    async fn ack(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        self.send(DeltaDiscoveryRequest {
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| WireStatus {
                message: message.into(),
                ..WireStatus::default()
            }),
            ..subscribe(&response.type_url)
        })
        .await;
    }
}

fn subscribe(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.into(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}

#[tokio::test]
async fn an_agent_follows_changes_of_the_folder_and_reconnects() {
    let world = World::start(&pod("web", "node-a", "10.0.0.1")).await;
    let mut client = Client::connect(&world, TOKEN, subscribe(ADDRESS_TYPE_URL))
        .await
        .unwrap();
    client.send(subscribe(AUTHORIZATION_TYPE_URL)).await;
    let policies = client.next().await;
    assert_eq!(
        (policies.type_url.as_str(), policies.resources.len()),
        (AUTHORIZATION_TYPE_URL, 0)
    );
    client.ack(&policies, None).await;
    let first = client.next().await;
    assert_eq!(names(&first), ["Kubernetes//Pod/shop/web"]);
    client.ack(&first, None).await;

    world.write(&(pod("web", "node-a", "10.0.0.1") + &pod("cart", "node-b", "10.0.0.2")));
    let second = client.next().await;
    assert_eq!(names(&second), ["Kubernetes//Pod/shop/cart"]);
    client.ack(&second, Some("no such thing")).await;
    world.write(&pod("cart", "node-b", "10.0.0.3"));
    let third = client.next().await;
    assert_eq!(names(&third), ["Kubernetes//Pod/shop/cart"]);
    assert_eq!(third.removed_resources, ["Kubernetes//Pod/shop/web"]);
    assert_eq!(
        world
            .metric("weft_control_nacks_total{type=\"address\"}")
            .await
            .as_deref(),
        Some("1")
    );
    assert_eq!(
        world.metric("weft_control_clients").await.as_deref(),
        Some("1")
    );

    drop(client);
    let held = [&first.resources[0], &third.resources[0]];
    let again = DeltaDiscoveryRequest {
        initial_resource_versions: held.map(|it| (it.name.clone(), it.version.clone())).into(),
        ..subscribe(ADDRESS_TYPE_URL)
    };
    let mut client = Client::connect(&world, TOKEN, again).await.unwrap();
    let difference = client.next().await;
    assert!(difference.resources.is_empty());
    assert_eq!(difference.removed_resources, ["Kubernetes//Pod/shop/web"]);
    world.control.shutdown().await;
}

/// The policies that a new agent is told.
async fn policies(world: &World) -> Vec<Authorization> {
    let first = subscribe(AUTHORIZATION_TYPE_URL);
    let mut client = Client::connect(world, TOKEN, first).await.unwrap();
    let told = client.next().await.resources.into_iter();
    told.map(|it| Authorization::decode(&*it.resource.unwrap().value).unwrap())
        .collect()
}

#[tokio::test]
async fn a_policy_that_is_bad_at_a_restart_opens_nothing() {
    const DENY: &str = "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
        metadata: {name: closed, namespace: shop}\nspec: {action: DENY, rules: [{}]}\n---\n";
    let world = World::start(&(DENY.to_owned() + &pod("web", "node-a", "10.0.0.1"))).await;
    let before = policies(&world).await;
    assert_eq!(before.len(), 1);
    world.control.shutdown().await;

    let bad = DENY.replace("rules: [{}]", "rules: [{frm: []}]");
    let path = world.folder.path().to_owned();
    let config = || config(&path);
    let file = path.join("manifests/all.yaml");
    fs::write(&file, bad + &pod("web", "node-a", "10.0.0.1")).unwrap();
    let control = ControlPlane::start(config(), Registry::new()).await;
    let world = World {
        control: control.unwrap(),
        ..world
    };
    assert_eq!(policies(&world).await, before, "everything is denied still");
    assert_eq!(
        world
            .metric("weft_control_source_problems")
            .await
            .as_deref(),
        Some("2"),
        "the mistake and what it does"
    );

    world.control.shutdown().await;
    fs::write(&file, [0xff]).unwrap();
    let unread = ControlPlane::start(config(), Registry::new()).await;
    assert!(
        matches!(unread, Err(StartError::Source(_))),
        "agents keep what they know: {unread:?}"
    );
}

/// The addresses that a new agent is told.
async fn addresses(world: &World) -> Vec<String> {
    let first = subscribe(ADDRESS_TYPE_URL);
    let mut client = Client::connect(world, TOKEN, first).await.unwrap();
    let told = client.next().await;
    names(&told).into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn what_is_bad_at_a_restart_keeps_its_last_good_version() {
    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
        spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n---\n";
    const DENY: &str = "apiVersion: weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
        metadata: {name: closed, namespace: shop}\nspec: {action: DENY, rules: [{}]}\n---\n";
    let good = pod("web", "node-a", "10.0.0.1") + SERVICE + DENY;
    let all = [
        "Kubernetes//Pod/shop/web",
        "shop/web.shop.svc.cluster.local",
    ];
    let mut world = World::start("").await;
    let path = world.folder.path().to_owned();
    let file = path.join("manifests/all.yaml");
    let keeping = |last_good: Option<&str>| {
        let mut config = config(&path);
        config.source.last_good = last_good.map(|name| path.join(name));
        ControlPlane::start(config, Registry::new())
    };
    // What the file says, with and without keeping; whether the mesh is as before.
    let broken = good
        .replace("podIPs", "podIP")
        .replace("clusterIP", "clusterIPP")
        .replace("rules", "rulez");
    let texts = [
        (broken.clone().into_bytes(), true),
        (b"{ no: [yaml".to_vec(), true),
        (vec![0xff], true),
        (pod("cart", "node-a", "10.0.0.2").into_bytes(), false),
    ];
    for (text, kept) in texts {
        world.control.shutdown().await;
        fs::write(&file, &good).unwrap();
        world.control = keeping(Some("kept")).await.unwrap();
        let before = (addresses(&world).await, policies(&world).await);
        assert_eq!(before.0, all);
        world.control.shutdown().await;
        fs::write(&file, &text).unwrap();
        world.control = keeping(Some("kept")).await.unwrap();
        let after = (addresses(&world).await, policies(&world).await);
        assert_eq!(after == before, kept, "{after:?}");
        let request = csr(&KeyPair::generate().unwrap());
        let signed = world.sign(TOKEN, &request, Some(WEB)).await;
        assert_eq!(signed.is_ok(), kept, "{signed:?}");
    }
    // The control: without it the broken objects are gone.
    world.control.shutdown().await;
    fs::write(&file, &broken).unwrap();
    world.control = keeping(None).await.unwrap();
    assert!(addresses(&world).await.is_empty());
    // A file that is removed is gone for good, also if it comes back broken.
    for text in [Some(&good), None, Some(&broken)] {
        world.control.shutdown().await;
        match text {
            Some(text) => fs::write(&file, text).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        world.control = keeping(Some("kept")).await.unwrap();
    }
    assert!(addresses(&world).await.is_empty());
}

#[tokio::test]
async fn strangers_and_withdrawn_tokens_are_cut_off() {
    let world = World::start("").await;
    for token in ["", "0123456789abcdef0123456789abcdee"] {
        let refused = Client::connect(&world, token, subscribe(ADDRESS_TYPE_URL)).await;
        assert_eq!(
            refused.err().map(|status| status.code()),
            Some(Code::Unauthenticated)
        );
    }
    let mut client = Client::connect(&world, TOKEN, subscribe(ADDRESS_TYPE_URL))
        .await
        .unwrap();
    client.next().await;
    write_tokens(
        &world.folder.path().join("tokens"),
        "fedcba9876543210 node-a\n",
    );
    let end = client
        .responses
        .message()
        .await
        .expect_err("the stream ends");
    assert_eq!(end.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn streams_end_when_the_control_plane_stops() {
    let world = World::start("").await;
    let mut client = Client::connect(&world, TOKEN, subscribe(ADDRESS_TYPE_URL))
        .await
        .unwrap();
    client.next().await;
    let address = world.control.address();
    world.control.shutdown().await;
    let end = client
        .responses
        .message()
        .await
        .expect_err("the stream ends");
    assert_eq!(end.code(), Code::Unavailable);
    assert!(
        TcpStream::connect(address).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn a_node_gets_certificates_for_what_it_runs_and_for_nothing_else() {
    let world =
        World::start(&(pod("web", "node-a", "10.0.0.1") + &pod("cart", "node-b", "10.0.0.2")))
            .await;
    let good = csr(&KeyPair::generate().unwrap());
    let signed = world.sign(TOKEN, &good, Some(WEB)).await.unwrap();
    assert_eq!(signed.cert_chain.len(), 2);
    assert_eq!(signed.cert_chain[1], world.control.roots_pem());

    let embedded = world.control.node_token("node-b");
    let cart = "spiffe://cluster.local/ns/shop/sa/cart";
    assert!(world.sign(&embedded, &good, Some(cart)).await.is_ok());

    let rsa = csr(&KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap());
    let cases = [
        (
            "of another node",
            TOKEN,
            &good,
            Some(cart),
            Code::PermissionDenied,
        ),
        (
            "of nobody",
            TOKEN,
            &good,
            Some("spiffe://cluster.local/ns/shop/sa/nobody"),
            Code::PermissionDenied,
        ),
        (
            "of another mesh",
            TOKEN,
            &good,
            Some("spiffe://elsewhere/ns/shop/sa/web"),
            Code::PermissionDenied,
        ),
        (
            "no identity",
            TOKEN,
            &good,
            Some("web"),
            Code::InvalidArgument,
        ),
        ("no name at all", TOKEN, &good, None, Code::InvalidArgument),
        (
            "a foreign token",
            "ffffffffffffffffffffffffffffffff",
            &good,
            Some(WEB),
            Code::Unauthenticated,
        ),
        (
            "garbage",
            TOKEN,
            &"garbage".to_owned(),
            Some(WEB),
            Code::InvalidArgument,
        ),
        ("an RSA key", TOKEN, &rsa, Some(WEB), Code::InvalidArgument),
    ];
    for (case, token, csr, identity, expected) in cases {
        let status = world.sign(token, csr, identity).await.expect_err(case);
        assert_eq!(status.code(), expected, "{case}: {}", status.message());
    }
    assert_eq!(
        world
            .metric("weft_control_certificates_signed_total")
            .await
            .as_deref(),
        Some("2")
    );
    let refused = world
        .metric("weft_control_certificates_refused_total{reason=\"PermissionDenied\"}")
        .await;
    assert_eq!(refused.as_deref(), Some("3"));
}

#[tokio::test]
async fn a_client_that_does_not_trust_the_mesh_does_not_connect() {
    let world = World::start("").await;
    let other = World::start("").await;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(other.control.roots_pem()))
        .domain_name("localhost");
    let url = format!("https://{}", world.control.address());
    let channel = Channel::from_shared(url).unwrap().tls_config(tls).unwrap();
    assert!(channel.connect().await.is_err());
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let world = World::start("").await;
    let folder = world.folder.path();
    let start = |change: fn(&mut ControlConfig, &World)| {
        let mut config = config(folder);
        change(&mut config, &world);
        ControlPlane::start(config, Registry::new())
    };
    let busy = start(|config, world| config.server.listen = world.control.address()).await;
    assert!(matches!(busy, Err(StartError::Listen { .. })), "{busy:?}");
    let no_folder = start(|config, _| config.source.folder = "/nonexistent".into()).await;
    assert!(
        matches!(no_folder, Err(StartError::Source(_))),
        "{no_folder:?}"
    );
    let no_tokens = start(|config, _| config.nodes.tokens = Some("/nonexistent".into())).await;
    assert!(
        matches!(no_tokens, Err(StartError::Tokens(_))),
        "{no_tokens:?}"
    );
    let bad_name = start(|config, _| config.server.tls_names = vec!["not ascii: ü".into()]).await;
    assert!(
        matches!(bad_name, Err(StartError::Server(_))),
        "{bad_name:?}"
    );
    let short = start(|config, _| config.ca.leaf_max_lifetime = Duration::from_secs(1)).await;
    assert!(matches!(short, Err(StartError::Config(_))), "{short:?}");
}

#[test]
fn validate_prints_every_problem_and_fails() {
    let folder = tempfile::tempdir().unwrap();
    let validate = |folder: &Path| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_mesh-control"))
            .arg("validate")
            .arg(folder)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    fs::write(
        folder.path().join("a.yaml"),
        pod("web", "node-a", "10.0.0.1"),
    )
    .unwrap();
    assert_eq!(
        validate(folder.path()),
        (Some(0), "1 objects, no problems\n".into())
    );
    fs::write(
        folder.path().join("b.yaml"),
        pod("web", "node-b", "10.0.0.1"),
    )
    .unwrap();
    fs::write(
        folder.path().join("c.yaml"),
        pod("cart", "node-b", "10.0.0.x"),
    )
    .unwrap();
    let (code, printed) = validate(folder.path());
    assert_eq!(code, Some(1));
    assert_eq!(
        printed.lines().collect::<Vec<_>>(),
        [
            "b.yaml: Pod shop/web is already defined in a.yaml, whose version is used",
            "c.yaml: document 1 (line 1), Pod shop/cart, field status.podIPs[0].ip: \"10.0.0.x\" is not an IP address",
        ]
    );
    assert_eq!(validate(Path::new("/nonexistent")).0, Some(2));
}
