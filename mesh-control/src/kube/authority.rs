//! The certificate authority of a cluster: kept in a Secret, followed through rotations, published as a bundle.
//!
//! Every replica looks at three objects of its own namespace every few seconds and decides the same (`ca::rotation`):
//! the Secret with the authority that is to be used, the Secret with the one that is being replaced, and the ConfigMap with
//! the trusted roots. The leader alone writes; only the very first Secret is made by whoever comes first, and the others
//! use it: creating fails where the object exists.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::{
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};
use tokio::{sync::watch, time::sleep};
use tracing::{error, info, warn};

use super::{
    api::{Api, ApiError},
    backoff::{Backoff, Dice},
};
use crate::ca::{
    Authority, BACKDATE, CaSecretError,
    rotation::{self, Decision, Outgoing, Seen, Signer, Write},
    secret::SecretMaterial,
};

/// How often the objects are looked at. Rotations take hours; a first start waits for this at most once.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Key of the bundle in its ConfigMap: the name of the file that agents mount.
pub(super) const BUNDLE_KEY: &str = "root-cert.pem";
/// Annotation of the outgoing authority: since when, RFC 3339.
const SINCE: &str = "weft.dev/replaced-at";
/// Annotation of the outgoing authority: digest of the roots that replace it.
const REPLACED_BY: &str = "weft.dev/replaced-by";
/// Key of the outgoing Secret with all roots that were trusted.
const TRUSTED_KEY: &str = "trusted-roots.pem";

/// Where the authority is.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub namespace: String,
    /// Secret with the authority.
    pub secret: String,
    /// ConfigMap with the roots.
    pub bundle: String,
    /// Whether to make the Secret where there is none. Not where cert-manager or the user is to make it.
    pub create: bool,
}

impl Places {
    fn secrets(&self) -> String {
        format!("/api/v1/namespaces/{}/secrets", self.namespace)
    }

    fn config_maps(&self) -> String {
        format!("/api/v1/namespaces/{}/configmaps", self.namespace)
    }

    /// Secret with the authority that is being replaced.
    fn outgoing(&self) -> String {
        format!("{}-outgoing", self.secret)
    }
}

/// Why there is no authority, or no newer one.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{what}: {error}")]
    Api { what: String, error: ApiError },
    #[error(
        "Secret {0} does not exist; create it, or let the control plane make one (--ca-create)"
    )]
    Absent(String),
    #[error("Secret {name} {error}; what was used before stays in use")]
    Unusable { name: String, error: CaSecretError },
    #[error("the wall clock cannot be written as a date")]
    Clock,
}

/// The authority, followed.
pub(super) struct Keeper {
    pub api: Api,
    pub places: Places,
    pub trust_domain: String,
    pub leaf_max_lifetime: Duration,
    /// Time between two looks; [`LOOK_INTERVAL`] outside of tests.
    pub look_interval: Duration,
    /// Whether this replica writes.
    pub leader: watch::Receiver<bool>,
    /// What is in use.
    pub authority: watch::Sender<Option<Arc<Authority>>>,
}

/// What the cluster holds.
struct Found {
    present: SecretMaterial,
    /// With its resource version.
    outgoing: Option<(Outgoing, Option<SecretMaterial>, String)>,
    bundle: Option<ConfigMap>,
}

/// What this process used last.
#[derive(Default)]
struct Active {
    material: Option<SecretMaterial>,
    /// Its certificate and all roots, to tell a change.
    in_use: String,
}

impl Keeper {
    /// Follows the authority until `stop` turns true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            () = self.follow() => {}
            () = crate::stopped(&mut stop) => {}
        }
    }

    async fn follow(&self) {
        let mut active = Active::default();
        let mut backoff = Backoff::new(Dice::random());
        let mut complaint = String::new();
        let mut leader = self.leader.clone();
        loop {
            match self.look(&mut active).await {
                Ok(wrote) => {
                    backoff.reset();
                    complaint.clear();
                    if wrote {
                        continue;
                    }
                    tokio::select! {
                        () = sleep(Dice::random().jitter(self.look_interval)) => {}
                        // What was left to another writer may now be ours to write.
                        _ = leader.wait_for(|leads| *leads), if !*leader.borrow() => {}
                    }
                }
                Err(failure) => {
                    let text = failure.to_string();
                    if text != complaint {
                        error!("certificate authority: {text}");
                        complaint = text;
                    }
                    sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// One look. Returns whether something was written, so that the next look is due at once.
    async fn look(&self, active: &mut Active) -> Result<bool, Failure> {
        let found = self.find().await?;
        let unusable = |error| Failure::Unusable {
            name: self.places.secret.clone(),
            error,
        };
        let authority = found.present.authority(self.leaf_max_lifetime);
        let authority = authority.map_err(unusable)?;
        let bundle = found.bundle.as_ref().map(|map| bundle_of(map).to_owned());
        let decision = rotation::decide(
            Seen {
                present: authority.roots_pem(),
                bundle: bundle.as_deref(),
                outgoing: found.outgoing.as_ref().map(|(outgoing, ..)| outgoing),
                active: active.material.is_some(),
            },
            self.leaf_max_lifetime + BACKDATE,
            SystemTime::now(),
        );
        let leads = *self.leader.borrow();
        if matches!(decision.write, Some(Write::Remember(_))) && !leads && active.material.is_none()
        {
            // Another replica still has the key that is to sign for a while. This one has just started, and can wait.
            return Ok(false);
        }
        let write = decision.write.clone().filter(|_| leads);
        if let Some(write) = &write {
            self.write(write, &decision, active, &found).await?;
        }
        self.take(active, found, authority, &decision)
            .map_err(unusable)?;
        Ok(write.is_some())
    }

    /// Uses what was decided.
    fn take(
        &self,
        active: &mut Active,
        found: Found,
        present: Authority,
        decision: &Decision,
    ) -> Result<(), CaSecretError> {
        let outgoing = found.outgoing.and_then(|(_, material, _)| material);
        let (material, authority) = match (decision.signer, outgoing) {
            (Signer::Outgoing, Some(material)) => {
                let authority = material.authority(self.leaf_max_lifetime)?;
                (material, authority)
            }
            (Signer::Active, _) if active.material.is_some() => {
                let Some(material) = active.material.take() else {
                    return Ok(());
                };
                let authority = material.authority(self.leaf_max_lifetime)?;
                (material, authority)
            }
            _ => (found.present, present),
        };
        let in_use = format!("{}{}", material.certificate(), decision.roots);
        active.material = Some(material);
        if in_use != active.in_use {
            info!(signer = ?decision.signer, roots = decision.roots.matches("BEGIN").count(), "certificate authority in use");
            active.in_use = in_use;
            let authority = authority.with_roots(decision.roots.clone());
            self.authority.send_replace(Some(Arc::new(authority)));
        }
        Ok(())
    }

    async fn find(&self) -> Result<Found, Failure> {
        let name = &self.places.secret;
        let present = match self.secret(name).await? {
            Some(secret) => secret,
            None if self.places.create => self.make().await?,
            None => return Err(Failure::Absent(name.clone())),
        };
        let present = SecretMaterial::take(present.data.unwrap_or_default());
        let present = present.map_err(|error| Failure::Unusable {
            name: name.clone(),
            error,
        })?;
        let outgoing = self.secret(&self.places.outgoing()).await?;
        let maps = self.places.config_maps();
        let bundle = self.api.get(&maps, &self.places.bundle).await;
        let bundle = found(bundle, || format!("ConfigMap {}", self.places.bundle))?;
        Ok(Found {
            present,
            outgoing: outgoing.and_then(read_outgoing),
            bundle,
        })
    }

    async fn secret(&self, name: &str) -> Result<Option<Secret>, Failure> {
        let secret = self.api.get(&self.places.secrets(), name).await;
        found(secret, || format!("Secret {name}"))
    }

    /// Makes the first authority, unless somebody else does.
    async fn make(&self) -> Result<Secret, Failure> {
        let name = &self.places.secret;
        let made = SecretMaterial::make(&self.trust_domain, SystemTime::now());
        let made = made.map_err(|error| Failure::Unusable {
            name: name.clone(),
            error,
        })?;
        let secret = self.secret_of(name, &made, BTreeMap::new());
        let what = || format!("Secret {name}");
        match self.api.create(&self.places.secrets(), &secret).await {
            Ok(secret) => {
                info!(name, "made a new certificate authority");
                Ok(secret)
            }
            Err(ApiError::Conflict(_)) => {
                let theirs = self.secret(name).await?;
                theirs.ok_or_else(|| Failure::Absent(name.clone()))
            }
            Err(error) => Err(Failure::Api {
                what: what(),
                error,
            }),
        }
    }

    fn secret_of(
        &self,
        name: &str,
        material: &SecretMaterial,
        annotations: BTreeMap<String, String>,
    ) -> Secret {
        Secret {
            metadata: self.metadata(name, annotations),
            data: Some(material.to_data()),
            type_: Some("Opaque".into()),
            ..Secret::default()
        }
    }

    fn metadata(&self, name: &str, annotations: BTreeMap<String, String>) -> ObjectMeta {
        let label = (
            "app.kubernetes.io/managed-by".to_owned(),
            "weft-control".to_owned(),
        );
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.places.namespace.clone()),
            labels: Some([label].into()),
            annotations: (!annotations.is_empty()).then_some(annotations),
            ..ObjectMeta::default()
        }
    }

    async fn write(
        &self,
        write: &Write,
        decision: &Decision,
        active: &Active,
        found: &Found,
    ) -> Result<(), Failure> {
        match write {
            Write::Bundle => self.publish(&decision.roots, found.bundle.as_ref()).await,
            Write::Remember(outgoing) => self.remember(outgoing, active, found).await,
            Write::Forget => {
                let Some((.., version)) = &found.outgoing else {
                    return Ok(());
                };
                let (secrets, name) = (self.places.secrets(), self.places.outgoing());
                let deleted = self.api.delete(&secrets, &name, version).await;
                info!("the previous certificate authority is forgotten");
                raced(deleted, || format!("Secret {name}"))
            }
        }
    }

    async fn publish(&self, roots: &str, present: Option<&ConfigMap>) -> Result<(), Failure> {
        let name = &self.places.bundle;
        let maps = self.places.config_maps();
        let mut map = present.cloned().unwrap_or_else(|| ConfigMap {
            metadata: self.metadata(name, BTreeMap::new()),
            ..ConfigMap::default()
        });
        let data = map.data.get_or_insert_default();
        data.insert(BUNDLE_KEY.to_owned(), roots.to_owned());
        let written = match present {
            None => self.api.create::<ConfigMap>(&maps, &map).await,
            Some(_) => self.api.replace(&maps, name, &map).await,
        };
        info!(name, "published the trusted roots");
        raced(written.map(drop), || format!("ConfigMap {name}"))
    }

    async fn remember(
        &self,
        outgoing: &Outgoing,
        active: &Active,
        found: &Found,
    ) -> Result<(), Failure> {
        let name = self.places.outgoing();
        let since = Timestamp::try_from(outgoing.since).map_err(|_| Failure::Clock)?;
        let annotations = [
            (SINCE.to_owned(), since.to_string()),
            (REPLACED_BY.to_owned(), outgoing.replaced_by.clone()),
        ];
        let mut secret = Secret {
            metadata: self.metadata(&name, annotations.into()),
            type_: Some("Opaque".into()),
            ..Secret::default()
        };
        let material = active.material.as_ref().filter(|_| outgoing.signs);
        let mut data = material.map(SecretMaterial::to_data).unwrap_or_default();
        let roots = outgoing.roots.as_bytes().to_vec();
        data.insert(TRUSTED_KEY.to_owned(), k8s_openapi::ByteString(roots));
        secret.data = Some(data);
        let secrets = self.places.secrets();
        let written = match &found.outgoing {
            None => self.api.create::<Secret>(&secrets, &secret).await,
            Some((.., version)) => {
                secret.metadata.resource_version = Some(version.clone());
                self.api.replace(&secrets, &name, &secret).await
            }
        };
        warn!("the certificate authority changes; the previous one stays trusted for two overlaps");
        raced(written.map(drop), || format!("Secret {name}"))
    }
}

fn bundle_of(map: &ConfigMap) -> &str {
    let data = map.data.as_ref().and_then(|data| data.get(BUNDLE_KEY));
    data.map_or("", String::as_str)
}

fn read_outgoing(secret: Secret) -> Option<(Outgoing, Option<SecretMaterial>, String)> {
    let annotations = secret.metadata.annotations.unwrap_or_default();
    let data = secret.data.unwrap_or_default();
    let since: Option<Timestamp> = annotations.get(SINCE).and_then(|text| text.parse().ok());
    let roots = data.get(TRUSTED_KEY).map(|roots| roots.0.clone());
    let material = SecretMaterial::take(data).ok();
    let outgoing = Outgoing {
        signs: material.is_some(),
        roots: roots
            .and_then(|roots| String::from_utf8(roots).ok())
            .unwrap_or_default(),
        replaced_by: annotations.get(REPLACED_BY).cloned().unwrap_or_default(),
        // One that cannot be read ended long ago.
        since: since.map_or(SystemTime::UNIX_EPOCH, SystemTime::from),
    };
    Some((outgoing, material, secret.metadata.resource_version?))
}

/// An object that may be absent.
fn found<T>(answer: Result<T, ApiError>, what: impl Fn() -> String) -> Result<Option<T>, Failure> {
    match answer {
        Ok(object) => Ok(Some(object)),
        Err(ApiError::NotFound(_)) => Ok(None),
        Err(error) => Err(Failure::Api {
            what: what(),
            error,
        }),
    }
}

/// A write that another replica may have done first: the next look tells.
fn raced(answer: Result<(), ApiError>, what: impl Fn() -> String) -> Result<(), Failure> {
    match answer {
        Ok(()) | Err(ApiError::Conflict(_) | ApiError::NotFound(_)) => Ok(()),
        Err(error) => Err(Failure::Api {
            what: what(),
            error,
        }),
    }
}

#[cfg(test)]
#[path = "authority_tests.rs"]
mod tests;
