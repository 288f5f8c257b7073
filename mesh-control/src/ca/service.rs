//! `IstioCertificateService`: who may get which certificate.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::{
    identity::Identity,
    proto::ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
};
use prost_types::{Struct, value};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tracing::{error, info, warn};

use super::{Authority, CSR_MAX_BYTES, CsrError, SigningRequest};
use crate::{authn::Nodes, credentials::NodeName, hub::Hub, telemetry::Metrics};

/// Metadata field in which a node agent names the workload that it asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Largest request message: the CSR and room for metadata.
const REQUEST_MAX_BYTES: usize = CSR_MAX_BYTES + 16 * 1024;

/// Signs for nodes what they run.
#[derive(Debug)]
pub(crate) struct CaService {
    pub authority: watch::Receiver<Arc<Authority>>,
    pub nodes: Nodes,
    pub hub: Hub,
    pub metrics: Metrics,
}

pub(crate) fn service(ca: CaService) -> IstioCertificateServiceServer<CaService> {
    IstioCertificateServiceServer::new(ca).max_decoding_message_size(REQUEST_MAX_BYTES)
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let answer = match self.nodes.authenticate(request.metadata()).await {
            Ok(caller) => self.answer(&caller.node, request.into_inner(), SystemTime::now()),
            Err(status) => Err(status),
        };
        match answer {
            Ok(response) => {
                self.metrics.certificates_signed.inc();
                Ok(Response::new(response))
            }
            Err(status) => {
                let reason = format!("{:?}", status.code());
                self.metrics
                    .certificates_refused
                    .with_label_values(&[&reason])
                    .inc();
                Err(status)
            }
        }
    }
}

impl CaService {
    fn answer(
        &self,
        node: &NodeName,
        message: IstioCertificateRequest,
        now: SystemTime,
    ) -> Result<IstioCertificateResponse, Status> {
        let invalid = |error: CsrError| {
            warn!(%node, %error, "refused a signing request");
            Status::invalid_argument(error.to_string())
        };
        let impersonated = impersonated(message.metadata.as_ref())?;
        let csr = SigningRequest::from_pem(&message.csr).map_err(invalid)?;
        let identity = csr.identity(impersonated).map_err(invalid)?;
        if !self.hub.runs_on(&node.0, &identity) {
            warn!(%node, %identity, "refused to sign: the node runs no workload of that identity");
            return Err(Status::permission_denied(format!(
                "node {node} runs no workload with the identity {identity}"
            )));
        }
        let requested = u64::try_from(message.validity_duration)
            .ok()
            .filter(|seconds| *seconds > 0);
        let authority = self.authority.borrow().clone();
        let signed = authority
            .sign(&csr, &identity, requested.map(Duration::from_secs), now)
            .map_err(|error| {
                error!(%identity, %error, "could not sign");
                Status::unavailable(error.to_string())
            })?;
        let lifetime_s = signed
            .not_after
            .duration_since(now)
            .unwrap_or_default()
            .as_secs();
        info!(%node, %identity, lifetime_s, "signed a certificate");
        Ok(IstioCertificateResponse {
            cert_chain: signed.chain,
        })
    }
}

fn impersonated(metadata: Option<&Struct>) -> Result<Option<Identity>, Status> {
    let Some(value) = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY))
    else {
        return Ok(None);
    };
    let Some(value::Kind::StringValue(text)) = &value.kind else {
        return Err(Status::invalid_argument(format!(
            "{IMPERSONATED_IDENTITY} is not a string"
        )));
    };
    let identity: Identity = text
        .parse()
        .map_err(|error| Status::invalid_argument(format!("{error}")))?;
    Ok(Some(identity))
}
