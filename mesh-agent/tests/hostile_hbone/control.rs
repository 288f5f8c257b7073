//! Agents under a control plane that is not ours: written from the wire description, with istiod's habits. Resources
//! have no versions and aliases beside their names, fields that nobody knows, and types that nobody asked for.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_api::proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
};
use mesh_tests::{
    conversation::{LIMIT, Server, client_with, reaches, talk},
    lab::{Families, Lab, LabSpec, PodSpec},
    mesh::{Mesh, MeshSpec},
    wait,
};
use prost_types::Any;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Identity as TlsIdentity, Server as GrpcServer, ServerTlsConfig},
};

use super::{PORT, within};
use crate::istio_wire as wire;

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// A type that istiod has and no agent asks for.
const UNASKED: &str = "type.googleapis.com/istio.workload.Workload";
const SERVICE_PORT: u16 = 80;
const CART_SERVICE: [u8; 4] = [10, 96, 0, 1];

/// The mesh by resource name, for each type.
type Resources = BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>;

/// An authority and a control plane.
struct Foreign {
    authority: CertifiedIssuer<'static, KeyPair>,
    resources: watch::Receiver<Resources>,
    complaints: Mutex<Vec<String>>,
}

impl Foreign {
    fn complain(&self, text: String) {
        let mut complaints = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        complaints.push(text);
    }
}

/// Everything that a stream is to hear of now; `known` is what it has heard.
fn news(
    resources: &Resources,
    kind: &str,
    known: &mut BTreeMap<String, Vec<u8>>,
) -> DeltaDiscoveryResponse {
    let all = resources.get(kind).cloned().unwrap_or_default();
    let gone = known.keys().filter(|name| !all.contains_key(*name));
    let removed_resources = gone.cloned().collect();
    let changed = all
        .iter()
        .filter(|(name, value)| known.get(*name) != Some(*value));
    let resources = changed
        .map(|(name, value)| Resource {
            name: name.clone(),
            aliases: vec![format!("/alias-of-{name}")],
            resource: Some(Any {
                type_url: kind.to_owned(),
                value: value.clone(),
            }),
            ..Default::default()
        })
        .collect();
    *known = all;
    DeltaDiscoveryResponse {
        type_url: kind.to_owned(),
        resources,
        removed_resources,
        nonce: format!("{:016x}", rand::random::<u64>()),
        ..Default::default()
    }
}

#[derive(Clone)]
struct Service(Arc<Foreign>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, stream) = mpsc::channel(4);
        let foreign = self.0.clone();
        tokio::spawn(async move {
            // Ends with the stream.
            drop(discovery(&foreign, request.into_inner(), &responses).await);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

async fn discovery(
    foreign: &Foreign,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) -> Result<()> {
    let mut resources = foreign.resources.clone();
    let mut known: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    loop {
        let kinds: Vec<String> = tokio::select! {
            request = requests.message() => {
                let request = request?.context("the agent has gone")?;
                if let Some(error) = &request.error_detail {
                    foreign.complain(format!("{}: {}", request.type_url, error.message));
                }
                if !request.response_nonce.is_empty() {
                    continue;
                }
                known.entry(request.type_url.clone()).or_default();
                let unasked = DeltaDiscoveryResponse {
                    type_url: UNASKED.to_owned(),
                    nonce: "unasked".to_owned(),
                    ..Default::default()
                };
                responses.send(Ok(unasked)).await?;
                vec![request.type_url]
            }
            changed = resources.changed() => {
                changed?;
                known.keys().cloned().collect()
            }
        };
        for kind in kinds {
            let known = known.entry(kind.clone()).or_default();
            let news = news(&resources.borrow_and_update(), &kind, known);
            responses.send(Ok(news)).await?;
        }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        if request.metadata().get("authorization").is_none() {
            return Err(Status::unauthenticated("no token"));
        }
        let signed = sign(&self.0, &request.into_inner().csr);
        let cert_chain = signed.map_err(|error| Status::internal(format!("{error:#}")))?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The leaf, and the roots: ours and one that nobody uses yet.
fn sign(foreign: &Foreign, request: &str) -> Result<Vec<String>> {
    let mut request = CertificateSigningRequestParams::from_pem(request)?;
    request.params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let now = std::time::SystemTime::now();
    let hour = std::time::Duration::from_secs(3600);
    request.params.not_before = (now - hour).into();
    request.params.not_after = (now + hour).into();
    let leaf = request.signed_by(&foreign.authority)?;
    let next = authority()?;
    Ok(vec![
        leaf.pem(),
        foreign.authority.pem() + "\n" + &next.pem(),
    ])
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

/// Serves until `over`.
async fn serve(
    at: SocketAddr,
    foreign: Arc<Foreign>,
    ready: std::sync::mpsc::SyncSender<()>,
    over: Arc<Notify>,
) -> Result<()> {
    let key = KeyPair::generate()?;
    let own = CertificateParams::new(vec![at.ip().to_string()])?;
    let own = own.signed_by(&key, &foreign.authority)?;
    let identity = TlsIdentity::from_pem(own.pem(), key.serialize_pem());
    let service = Service(foreign);
    let server = GrpcServer::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))?
        .add_service(AggregatedDiscoveryServiceServer::new(service.clone()))
        .add_service(IstioCertificateServiceServer::new(service));
    let listener = tokio::net::TcpListener::bind(at).await?;
    ready.send(())?;
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    Ok(server
        .serve_with_incoming_shutdown(incoming, over.notified())
        .await?)
}

/// `web` and `evil` on `n1`, `cart` on `n2` behind a service; `cart` refuses `evil`, and plaintext.
fn resources(lab: &Lab) -> Result<Resources> {
    let key = format!("default/{}", wire::hostname("cart"));
    let listed = ["default/deny-evil", "default/istio_converted_static_strict"];
    let mut addresses = BTreeMap::new();
    for node in lab.nodes() {
        for pod in node.pods.iter().filter(|pod| pod.spec.meshed) {
            let name = pod.spec.name.as_str();
            let cart = name == "cart";
            let service = cart.then_some((key.as_str(), SERVICE_PORT, PORT));
            let policies: &[&str] = if cart { &listed } else { &[] };
            let workload = wire::workload(name, &node.name, pod.address(), service, policies);
            addresses.insert(wire::uid(name), workload.encoded());
        }
    }
    let service = wire::service("cart", CART_SERVICE.into(), SERVICE_PORT, PORT);
    addresses.insert(key, service.encoded());
    let policies = [
        (listed[0], wire::deny_account("deny-evil", "evil")),
        (
            listed[1],
            wire::deny_plaintext("istio_converted_static_strict"),
        ),
    ];
    let policies = policies.map(|(name, policy)| (name.to_owned(), policy.encoded()));
    Ok([(ADDRESS, addresses), (AUTHORIZATION, policies.into())].into())
}

#[test]
fn agents_serve_under_a_control_plane_of_the_field() -> Result<()> {
    let lab = Lab::build(
        LabSpec::new(Families::V4)
            .node(
                "n1",
                [
                    PodSpec::new("web"),
                    PodSpec::new("evil"),
                    PodSpec::new("plain").unmeshed(),
                ],
            )
            .node("n2", [PodSpec::new("cart")]),
    )?;
    let mut mesh = Mesh::prepare(&lab, MeshSpec::default())?;
    let (change, resources) = watch::channel(resources(&lab)?);
    let foreign = Arc::new(Foreign {
        authority: authority()?,
        resources,
        complaints: Mutex::default(),
    });
    let root = mesh.root_file();
    fs::create_dir_all(root.parent().context("the root file lies in a folder")?)?;
    fs::write(root, foreign.authority.pem())?;
    let first = lab.nodes().first().context("a lab has nodes")?;
    let at: SocketAddr = mesh
        .control_plane()
        .trim_start_matches("https://")
        .parse()?;
    let over = Arc::new(Notify::new());
    let (ready, listening) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            within(&first.netns, || {
                serve(at, foreign.clone(), ready, over.clone())
            })
        });
        // The server's own error says more than a closed channel.
        let ran = listening
            .recv()
            .context("no server")
            .and_then(|()| under_it(&lab, &mut mesh, &change));
        let logs = || lab.nodes().iter().map(|node| mesh.log_of(node));
        let ran = ran.with_context(|| logs().collect::<Vec<_>>().join("\n"));
        // Agents hold streams open: without their end the server would wait for them.
        for node in lab.nodes() {
            drop(mesh.stop_agent(node, nix::sys::signal::Signal::SIGKILL));
        }
        over.notify_one();
        serving
            .join()
            .map_err(|_| anyhow!("the server panicked"))??;
        ran
    })?;
    let complaints = foreign
        .complaints
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    ensure!(complaints.is_empty(), "agents complain: {complaints:?}");
    Ok(())
}

fn under_it(lab: &Lab, mesh: &mut Mesh, change: &watch::Sender<Resources>) -> Result<()> {
    for node in lab.nodes() {
        mesh.start_agent(lab, node)?;
    }
    for node in lab.nodes() {
        mesh.wait_ready(lab, node)?;
    }
    mesh.enroll_all(lab)?;
    let (web, evil, cart) = (lab.pod("web")?, lab.pod("evil")?, lab.pod("cart")?);
    let plain = lab.pod("plain")?;
    let server = Server::start(lab, cart, PORT)?;
    let reverse = Server::start(lab, web, PORT)?;
    let service = SocketAddr::from((CART_SERVICE, SERVICE_PORT));
    for (from, to) in [
        (web, server.address),
        (web, service),
        (cart, reverse.address),
    ] {
        let report = talk(
            lab,
            from,
            &client_with(to, "--connections 10 --records 100")?,
        )?;
        ensure!(
            report.lost() == 0 && report.complete == 10,
            "{to}: {report:?}"
        );
    }
    ensure!(
        !reaches(lab, evil, server.address)?,
        "a denied account was served"
    );
    ensure!(
        !reaches(lab, plain, server.address)?,
        "plaintext was served"
    );
    // The policies and the service go; what they said goes with them.
    change.send_modify(|resources| {
        resources.insert(AUTHORIZATION, BTreeMap::new());
        let addresses = resources.entry(ADDRESS).or_default();
        addresses.retain(|name, _| !name.contains(".svc."));
        let cart = wire::workload("cart", "n2", cart.address(), None, &[]);
        addresses.insert(wire::uid("cart"), cart.encoded());
    });
    wait::until("the policies to be gone", LIMIT, || {
        let served = talk(lab, evil, &client_with(server.address, "")?)?.complete == 1;
        Ok(served.then_some(()))
    })?;
    ensure!(
        reaches(lab, plain, server.address)?,
        "plaintext is still refused"
    );
    wait::until("the service to be gone", LIMIT, || {
        Ok(
            (talk(lab, web, &client_with(service, "--limit-ms 2000")?)?.complete == 0)
                .then_some(()),
        )
    })
}
