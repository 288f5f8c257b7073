//! A client in the place of an agent.

use mesh_api::proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    security::AUTHORIZATION_TYPE_URL,
    workload::ADDRESS_TYPE_URL,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig},
};

/// A connection to the control plane at `url`, which `roots` vouch for.
pub async fn channel(url: String, roots: &str) -> Channel {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(roots))
        .domain_name("localhost");
    let channel = Channel::from_shared(url).expect("a URL");
    let channel = channel.tls_config(tls).expect("usable");
    channel.connect().await.expect("trusted")
}

/// Asks for a certificate with a request that names `names`.
pub async fn sign(
    channel: Channel,
    token: &str,
    names: &[&str],
) -> Result<IstioCertificateResponse, Status> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names
        .iter()
        .map(|name| SanType::URI((*name).try_into().expect("ascii")))
        .collect();
    let key = KeyPair::generate().expect("a key");
    let csr = params.serialize_request(&key).expect("a request");
    let message = IstioCertificateRequest {
        csr: csr.pem().expect("pem"),
        validity_duration: 3600,
        metadata: None,
    };
    let mut client = IstioCertificateServiceClient::new(channel);
    let signed = client.create_certificate(bearing(token, message)).await;
    signed.map(tonic::Response::into_inner)
}

fn bearing<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().expect("ascii");
    request.metadata_mut().insert("authorization", value);
    request
}

/// An agent that acknowledges everything.
pub struct Agent {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Agent {
    /// Asks for everything.
    pub async fn connect(channel: Channel, token: &str) -> Result<Self, Status> {
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let (requests, outgoing) = mpsc::channel(8);
        for type_url in [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL] {
            let first = DeltaDiscoveryRequest {
                type_url: type_url.into(),
                resource_names_subscribe: vec!["*".into()],
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(first).await.expect("room");
        }
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

    /// The next response, acknowledged.
    pub async fn next(&mut self) -> DeltaDiscoveryResponse {
        let response = self.responses.message().await.expect("whole");
        let response = response.expect("not the end");
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(ack).await.expect("room");
        response
    }

    /// Takes responses until one brings or removes `name`.
    pub async fn until(&mut self, name: &str) -> DeltaDiscoveryResponse {
        loop {
            let response = self.next().await;
            let mut brought = response.resources.iter();
            let brings = brought.any(|resource| resource.name == name);
            let mut removed = response.removed_resources.iter();
            if brings || removed.any(|removed| removed == name) {
                return response;
            }
        }
    }
}
