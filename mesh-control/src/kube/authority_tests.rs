use serde_json::Value;

use super::*;
use crate::{ca::roots, kube::fake::FakeApi};

const SECRETS: &str = "/api/v1/secrets";
const CONFIG_MAPS: &str = "/api/v1/configmaps";
const HOUR: Duration = Duration::from_secs(3600);

fn places(create: bool) -> Places {
    Places {
        namespace: "weft-system".into(),
        secret: "weft-ca".into(),
        bundle: "weft-roots".into(),
        create,
    }
}

/// A keeper at work.
struct Kept {
    authority: watch::Receiver<Option<Arc<Authority>>>,
    leader: watch::Sender<bool>,
    _stop: watch::Sender<bool>,
}

impl Kept {
    fn start(fake: &FakeApi, leads: bool, create: bool) -> Self {
        let (leader, on_leader) = watch::channel(leads);
        let (authority, on_authority) = watch::channel(None);
        let (stop, on_stop) = watch::channel(false);
        let keeper = Keeper {
            api: fake.api(),
            places: places(create),
            trust_domain: "cluster.local".into(),
            leaf_max_lifetime: HOUR,
            look_interval: Duration::from_millis(20),
            leader: on_leader,
            authority,
        };
        tokio::spawn(keeper.run(on_stop));
        Self {
            authority: on_authority,
            leader,
            _stop: stop,
        }
    }

    /// The roots in use, once `wanted` holds of them.
    async fn roots(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let there = self.authority.wait_for(|authority| {
            authority
                .as_ref()
                .is_some_and(|authority| wanted(authority.roots_pem()))
        });
        let there = tokio::time::timeout(Duration::from_secs(30), there).await;
        let there = there.expect("in time").expect("it runs");
        there.as_ref().expect("an authority").roots_pem().to_owned()
    }
}

fn bundle(fake: &FakeApi) -> Option<String> {
    let map = fake.get(CONFIG_MAPS, "weft-system", "weft-roots")?;
    map["data"][BUNDLE_KEY].as_str().map(ToOwned::to_owned)
}

/// A Secret with a new root.
fn secret(name: &str) -> Value {
    let made = SecretMaterial::make("cluster.local", SystemTime::now()).expect("made");
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some("weft-system".into()),
            ..ObjectMeta::default()
        },
        data: Some(made.to_data()),
        ..Secret::default()
    };
    serde_json::to_value(secret).expect("JSON")
}

fn any(_: &str) -> bool {
    true
}

#[tokio::test]
async fn replicas_that_start_together_use_one_authority_and_the_leader_publishes_it() {
    let fake = FakeApi::start().await;
    let (mut a, mut b) = (
        Kept::start(&fake, false, true),
        Kept::start(&fake, false, true),
    );
    let roots = a.roots(any).await;
    assert_eq!(b.roots(any).await, roots);
    assert_eq!(fake.count(SECRETS), 1);
    assert_eq!(bundle(&fake), None, "nobody writes yet");
    b.leader.send_replace(true);
    fake.until(|fake| bundle(fake).as_deref() == Some(&roots))
        .await;
}

#[tokio::test]
async fn a_new_root_is_published_and_the_old_one_goes_on_signing() {
    let fake = FakeApi::start().await;
    let (mut a, mut b) = (
        Kept::start(&fake, true, true),
        Kept::start(&fake, false, true),
    );
    let old = a.roots(any).await;
    b.roots(any).await;
    fake.until(|fake| bundle(fake).is_some()).await;
    let first = fake.get(SECRETS, "weft-system", "weft-ca").expect("made");
    fake.put(SECRETS, secret("weft-ca"));
    let both = |roots: &str| roots.matches("BEGIN").count() == 2;
    let told = a.roots(both).await;
    assert!(roots::equal(&told, &b.roots(both).await));
    fake.until(|fake| bundle(fake).as_deref().is_some_and(both))
        .await;
    let outgoing = fake
        .get(SECRETS, "weft-system", "weft-ca-outgoing")
        .expect("remembered");
    assert_eq!(outgoing["data"]["ca-key.pem"], first["data"]["ca-key.pem"]);

    // Who starts now signs with the old one as well.
    let mut late = Kept::start(&fake, false, true);
    assert!(roots::equal(&late.roots(any).await, &told));
    let authority = late.authority.borrow().clone().expect("one");
    let serving = authority
        .serving(&["localhost".into()], SystemTime::now())
        .expect("signed");
    let leaf = serving.chain.first().expect("a leaf");
    assert!(is_issued_by(leaf, &old));
}

/// Whether the signature of `leaf` is that of `issuer`.
fn is_issued_by(leaf: &[u8], issuer_pem: &str) -> bool {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let (_, leaf) = X509Certificate::from_der(leaf).expect("a certificate");
    let (_, issuer) = x509_parser::pem::parse_x509_pem(issuer_pem.as_bytes()).expect("PEM");
    let issuer = issuer.parse_x509().expect("a certificate");
    leaf.verify_signature(Some(issuer.public_key())).is_ok()
}

#[tokio::test]
async fn a_secret_that_cannot_be_used_changes_nothing() {
    let fake = FakeApi::start().await;
    let mut kept = Kept::start(&fake, true, true);
    let roots = kept.roots(any).await;
    let mut broken = secret("weft-ca");
    broken["data"]["ca-key.pem"] = secret("other")["data"]["ca-key.pem"].clone();
    fake.put(SECRETS, broken);
    let looks = fake.requests("secrets/weft-ca?");
    fake.until(|fake| fake.requests("secrets/weft-ca?") >= looks + 2)
        .await;
    assert_eq!(kept.roots(any).await, roots);
    assert!(
        fake.get(SECRETS, "weft-system", "weft-ca-outgoing")
            .is_none()
    );
}

#[tokio::test]
async fn who_is_not_to_make_the_secret_waits_for_it() {
    let fake = FakeApi::start().await;
    let mut kept = Kept::start(&fake, true, false);
    fake.until(|fake| fake.requests("secrets/weft-ca?") >= 2)
        .await;
    assert!(kept.authority.borrow().is_none());
    assert_eq!(fake.count(SECRETS), 0);
    fake.put(SECRETS, secret("weft-ca"));
    kept.roots(any).await;
}
