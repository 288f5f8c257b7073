//! The client of the certificate service (`istio.v1.auth.IstioCertificateService`).

use std::{
    error::Error,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::BoxFuture;
use mesh_api::{
    identity::Identity,
    proto::ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
};
use prost_types::{Struct, Value, value::Kind};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use zeroize::Zeroizing;

use super::{CertificateError, IdentityConfig};

/// One call, connection included. Signing takes milliseconds; what takes longer is better asked again.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Setting up TCP and TLS.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 pings on the channel, so that a dead control plane is noticed between calls.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer: a chain of [`super::response::CHAIN_MAX`] elements with [`super::roots::ROOTS_MAX`] roots of 4 KiB.
const ANSWER_MAX_BYTES: usize = 512 * 1024;
/// Longest token or roots file that is read, bytes: a wrong path must not fill the memory.
const FILE_MAX_BYTES: u64 = 1024 * 1024;

/// Signs certificate requests. The network client is [`CaClient`]; tests script their own.
pub trait Authority: Send + Sync {
    /// Asks for a certificate of `identity` for the PEM PKCS#10 `request`. Answers the chain in wire order: leaf,
    /// intermediates, roots.
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        request: String,
    ) -> BoxFuture<'a, Result<Vec<String>, CertificateError>>;
}

/// Asks over gRPC with TLS. The channel is kept between calls and made anew when the roots file has changed.
pub struct CaClient {
    config: IdentityConfig,
    endpoint: Endpoint,
    cluster: MetadataValue<Ascii>,
    channel: tokio::sync::Mutex<Option<(Vec<u8>, Channel)>>,
}

impl std::fmt::Debug for CaClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaClient")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl CaClient {
    /// Checks the configuration; connects on the first call.
    ///
    /// # Errors
    /// When the address is not an https one.
    pub fn new(config: IdentityConfig) -> Result<Self, CertificateError> {
        let wrong = |detail: String| CertificateError::Config {
            address: config.ca_address.clone(),
            detail,
        };
        let address = match config.ca_address.split_once("://") {
            None => format!("https://{}", config.ca_address),
            Some(("https", _)) => config.ca_address.clone(),
            Some((scheme, _)) => {
                return Err(wrong(format!("{scheme} is not accepted, only https")));
            }
        };
        let endpoint = Endpoint::from_shared(address).map_err(|error| wrong(error.to_string()))?;
        if endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(wrong("there is no host in it".to_owned()));
        }
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        let cluster = MetadataValue::try_from(config.cluster.as_str()).map_err(|_| {
            wrong(format!(
                "cluster name {:?} cannot be sent in a header",
                config.cluster
            ))
        })?;
        Ok(Self {
            config,
            endpoint,
            cluster,
            channel: tokio::sync::Mutex::default(),
        })
    }

    async fn channel(&self) -> Result<Channel, CertificateError> {
        const PURPOSE: &str = "roots of the certificate service";
        let roots = read(PURPOSE, &self.config.roots_file).await?;
        let mut cached = self.channel.lock().await;
        if let Some((_, channel)) = cached.as_ref().filter(|(known, _)| *known == *roots) {
            return Ok(channel.clone());
        }
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&*roots))
            .timeout(CONNECT_TIMEOUT);
        if let Some(name) = &self.config.server_name {
            tls = tls.domain_name(name);
        }
        let endpoint =
            self.endpoint
                .clone()
                .tls_config(tls)
                .map_err(|error| CertificateError::File {
                    purpose: PURPOSE,
                    path: self.config.roots_file.clone(),
                    detail: causes(&error),
                })?;
        let channel = endpoint.connect_lazy();
        *cached = Some((roots.to_vec(), channel.clone()));
        Ok(channel)
    }

    /// The `authorization` header, from the file as it is now: tokens in Kubernetes are replaced every hour.
    async fn bearer(&self) -> Result<Option<MetadataValue<Ascii>>, CertificateError> {
        const PURPOSE: &str = "token";
        let Some(path) = &self.config.token_file else {
            return Ok(None);
        };
        let bytes = read(PURPOSE, path).await?;
        let unusable = |detail: &str| CertificateError::File {
            purpose: PURPOSE,
            path: path.clone(),
            detail: detail.to_owned(),
        };
        let token = std::str::from_utf8(&bytes)
            .map_err(|_| unusable("it is not text"))?
            .trim();
        if token.is_empty() {
            return Err(unusable("it is empty"));
        }
        let header = Zeroizing::new(format!("Bearer {token}"));
        let mut value = MetadataValue::try_from(header.as_str())
            .map_err(|_| unusable("it holds characters that a header may not hold"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn call(
        &self,
        identity: &Identity,
        csr: String,
    ) -> Result<Vec<String>, CertificateError> {
        let (channel, bearer) = (self.channel().await?, self.bearer().await?);
        let validity_duration =
            i64::try_from(self.config.requested_lifetime.as_secs()).unwrap_or(i64::MAX);
        let impersonated = Value {
            kind: Some(Kind::StringValue(identity.to_string())),
        };
        let fields = [("ImpersonatedIdentity".to_owned(), impersonated)].into();
        let message = IstioCertificateRequest {
            csr,
            validity_duration,
            metadata: Some(Struct { fields }),
        };
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("clusterid", self.cluster.clone());
        if let Some(bearer) = bearer {
            request.metadata_mut().insert("authorization", bearer);
        }
        let mut client =
            IstioCertificateServiceClient::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
        // The endpoint's own timeout does not cover waiting for the connection.
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.create_certificate(request)).await;
        match answer {
            Ok(Ok(answer)) => Ok(answer.into_inner().cert_chain),
            Ok(Err(status)) => Err(self.failure(&status)),
            Err(_) => {
                Err(self.unreachable(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
            }
        }
    }

    /// Tells an authority that is away from one that says no.
    fn failure(&self, status: &Status) -> CertificateError {
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                self.unreachable(causes(status))
            }
            code => CertificateError::Refused {
                code: format!("{code:?}"),
                message: status.message().to_owned(),
            },
        }
    }

    fn unreachable(&self, detail: String) -> CertificateError {
        CertificateError::Unreachable {
            address: self.config.ca_address.clone(),
            detail,
        }
    }
}

impl Authority for CaClient {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        request: String,
    ) -> BoxFuture<'a, Result<Vec<String>, CertificateError>> {
        Box::pin(self.call(identity, request))
    }
}

/// A whole small file.
async fn read(purpose: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, CertificateError> {
    use tokio::io::AsyncReadExt;
    let failed = |detail: String| CertificateError::File {
        purpose,
        path: PathBuf::from(path),
        detail,
    };
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(FILE_MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .await
        .map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(failed(format!("it is larger than {FILE_MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// An error with its causes: tonic's own text is only "transport error".
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
