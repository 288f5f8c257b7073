//! The control plane against the API server of a real cluster. Skipped, and said so, unless one is named:
//!
//! ```text
//! WEFT_TEST_KUBECONFIG=FILE [WEFT_TEST_RESTART='COMMAND'] cargo test -p mesh-control --test cluster -- --test-threads=1
//! ```
//!
//! The account needs to be an administrator. The nodes of these tests exist as objects only: no kubelet is needed, and what
//! one would report is written by the tests. COMMAND restarts the API server.

mod client;

use std::{path::PathBuf, time::Duration};

use client::Agent;
use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret, ServiceAccount},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, CustomResourceExt as _, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use mesh_api::manifest::{AuthorizationPolicy, Condition, ExternalWorkload, MeshPolicy};
use mesh_control::kube::{KubernetesConfig, KubernetesHandle, ServiceAccount as Account};
use prometheus::Registry;
use serde_json::{Value, json};
use tonic::Code;

const SYSTEM: &str = "weft-system";
const SHOP: &str = "weft-test-shop";
const WEB: &str = "spiffe://cluster.local/ns/weft-test-shop/sa/web";
const NODES: [&str; 2] = ["weft-test-a", "weft-test-b"];
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Names the kubeconfig of the cluster.
const KUBECONFIG: &str = "WEFT_TEST_KUBECONFIG";
/// Names the command that restarts its API server.
const RESTART: &str = "WEFT_TEST_RESTART";

/// The value of a setting, or a note that `test` cannot run without it.
fn setting(name: &str, test: &str) -> Option<String> {
    let value = std::env::var(name).ok();
    if value.is_none() {
        let noted = mesh_tests::skip::note(test, &format!("{name} is not set"));
        noted.expect("a skipped test is noted");
    }
    value
}

/// A cluster with the objects that all tests need.
struct Cluster {
    client: Client,
    kubeconfig: PathBuf,
}

impl Cluster {
    async fn prepare(test: &str) -> Option<Self> {
        let kubeconfig = PathBuf::from(setting(KUBECONFIG, test)?);
        let file = Kubeconfig::read_from(&kubeconfig).expect("readable");
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(file, &options).await;
        let client = Client::try_from(config.expect("usable")).expect("a client");
        let cluster = Self { client, kubeconfig };
        cluster.remove().await;
        for crd in [
            AuthorizationPolicy::crd(),
            MeshPolicy::crd(),
            ExternalWorkload::crd(),
        ] {
            let name = crd.metadata.name.clone().expect("named");
            let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
            let params = PatchParams::apply("weft-test").force();
            let applied = api.patch(&name, &params, &Patch::Apply(&crd)).await;
            applied.expect("applied");
        }
        cluster
            .create::<Namespace>(None, json!({"metadata": {"name": SYSTEM}}))
            .await;
        let labels = json!({"weft.dev/mesh": "enabled"});
        cluster
            .create::<Namespace>(None, json!({"metadata": {"name": SHOP, "labels": labels}}))
            .await;
        for (namespace, account) in [(SYSTEM, "weft-agent"), (SHOP, "web")] {
            let account = json!({"metadata": {"name": account}});
            cluster
                .create::<ServiceAccount>(Some(namespace), account)
                .await;
        }
        for node in NODES {
            cluster
                .create::<Node>(None, json!({"metadata": {"name": node}}))
                .await;
            cluster
                .pod(
                    SYSTEM,
                    &format!("agent-{node}"),
                    "weft-agent",
                    node,
                    "192.0.2.1",
                )
                .await;
        }
        cluster
            .pod(SHOP, "web", "web", NODES[0], "192.0.2.10")
            .await;
        Some(cluster)
    }

    /// What an earlier run left.
    async fn remove(&self) {
        let at_once = DeleteParams::default().grace_period(0);
        for namespace in [SYSTEM, SHOP] {
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            let _ = pods.delete_collection(&at_once, &Default::default()).await;
            let namespaces: Api<Namespace> = Api::all(self.client.clone());
            if namespaces.delete(namespace, &at_once).await.is_ok() {
                until("the namespace is gone", async || {
                    namespaces
                        .get_opt(namespace)
                        .await
                        .is_ok_and(|it| it.is_none())
                })
                .await;
            }
        }
        for node in NODES {
            let nodes: Api<Node> = Api::all(self.client.clone());
            let _ = nodes.delete(node, &at_once).await;
        }
    }

    async fn create<K>(&self, namespace: Option<&str>, object: Value) -> K
    where
        K: Resource<DynamicType = ()> + serde::de::DeserializeOwned,
    {
        let meta = K::api_version(&());
        let kind = K::kind(&());
        let mut object = object;
        object["apiVersion"] = json!(meta);
        object["kind"] = json!(kind);
        let url = K::url_path(&(), namespace);
        let body = serde_json::to_vec(&object).expect("JSON");
        let request = kube::core::Request::new(url).create(&PostParams::default(), body);
        let made = self.client.request(request.expect("a request")).await;
        made.expect("created")
    }

    /// A pod that runs, as a kubelet would report it.
    async fn pod(&self, namespace: &str, name: &str, account: &str, node: &str, ip: &str) -> Pod {
        let containers = json!([{"name": "c", "image": "none"}]);
        let spec = json!({"nodeName": node, "serviceAccountName": account, "containers": containers,
                          "tolerations": [{"operator": "Exists"}]});
        let pod: Pod = self
            .create(
                Some(namespace),
                json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}),
            )
            .await;
        let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                            "conditions": [{"type": "Ready", "status": "True"}]}});
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let patched = pods
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await;
        patched.expect("reported");
        pod
    }

    async fn delete_pod(&self, namespace: &str, name: &str) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let deleted = pods
            .delete(name, &DeleteParams::default().grace_period(0))
            .await;
        deleted.expect("deleted");
    }

    /// A token as the kubelet projects it into a pod.
    async fn token(&self, pod: &str, audience: &str) -> String {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM);
        let uid = pods.get(pod).await.expect("there").metadata.uid;
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec![audience.to_owned()]),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(pod.into()),
                    uid,
                }),
                expiration_seconds: Some(3600),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), SYSTEM);
        let params = PostParams::default();
        let made = accounts.create_token_request("weft-agent", &params, &request);
        let status = made.await.expect("made").status;
        status.and_then(|status| status.token).expect("a token")
    }

    async fn start(&self, replica: &str) -> KubernetesHandle {
        let mut config = KubernetesConfig::default();
        config.cluster.kubeconfig = Some(self.kubeconfig.clone());
        config.cluster.replica = replica.into();
        config.agents.accounts = [Account {
            namespace: SYSTEM.into(),
            name: "weft-agent".into(),
        }]
        .into();
        let handle = mesh_control::kube::start(config, Registry::new()).await;
        let handle = handle.expect("started");
        let mut waits = handle.waits();
        let ready = tokio::time::timeout(PATIENCE, waits.wait_for(Vec::is_empty)).await;
        ready.expect("in time").expect("it runs");
        handle
    }

    async fn channel(&self, control: &KubernetesHandle) -> tonic::transport::Channel {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), SYSTEM);
        until("the bundle is published", async || {
            maps.get("weft-roots").await.is_ok()
        })
        .await;
        let map = maps.get("weft-roots").await.expect("there");
        let roots = map.data.expect("data")["root-cert.pem"].clone();
        client::channel(format!("https://{}", control.address()), &roots).await
    }

    fn policies(&self) -> Api<AuthorizationPolicy> {
        Api::namespaced(self.client.clone(), SHOP)
    }

    async fn apply_policy(&self, principal: &str) {
        let policy = json!({
            "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": SHOP},
            "spec": {"action": "DENY", "rules": [{"from": [{"principals": [principal]}]}]},
        });
        let params = PatchParams::apply("weft-test").force();
        let applied = self
            .policies()
            .patch("p", &params, &Patch::Apply(policy))
            .await;
        applied.expect("applied");
    }

    async fn condition(&self, kind: &str) -> Option<Condition> {
        let policy = self.policies().get("p").await.ok()?;
        let mut conditions = policy.status?.conditions.into_iter();
        conditions.find(|condition| condition.r#type == kind)
    }
}

/// Waits until `holds`, asking ten times a second.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, all).await.is_ok(), "{what}");
}

fn pod_key(namespace: &str, name: &str) -> String {
    format!("Kubernetes//Pod/{namespace}/{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_what_it_runs_and_the_user_sees_what_was_understood() {
    let Some(cluster) =
        Cluster::prepare("a_node_gets_what_it_runs_and_the_user_sees_what_was_understood").await
    else {
        return;
    };
    let control = cluster.start("a").await;
    let token = cluster.token("agent-weft-test-a", "weft").await;
    let channel = cluster.channel(&control).await;
    let signed = client::sign(channel.clone(), &token, &[WEB]).await;
    signed.expect("its own");
    let code = async |token: &str, names: &[&str]| {
        let answer = client::sign(channel.clone(), token, names).await;
        answer.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    let other_node = cluster.token("agent-weft-test-b", "weft").await;
    assert_eq!(code(&other_node, &[WEB]).await, Code::PermissionDenied);
    let other_audience = cluster.token("agent-weft-test-a", "other").await;
    assert_eq!(code(&other_audience, &[WEB]).await, Code::Unauthenticated);
    assert_eq!(code("no token", &[WEB]).await, Code::Unauthenticated);

    let mut agent = Agent::connect(channel.clone(), &token)
        .await
        .expect("known");
    agent.until(&pod_key(SHOP, "web")).await;
    cluster.apply_policy("cluster.local/ns/x/sa/y").await;
    agent.until(&format!("{SHOP}/p")).await;
    let mut acknowledging = agent;
    let follow = tokio::spawn(async move {
        loop {
            acknowledging.next().await;
        }
    });
    let is = async |kind: &str, status: &str| {
        cluster
            .condition(kind)
            .await
            .is_some_and(|it| it.status == status)
    };
    until("accepted", async || is("Accepted", "True").await).await;
    until("programmed", async || is("Programmed", "True").await).await;
    cluster.apply_policy("a*b").await;
    until("refused", async || is("Accepted", "False").await).await;
    let events: Api<Event> = Api::namespaced(cluster.client.clone(), SHOP);
    until("an event", async || {
        let all = events.list(&Default::default()).await.expect("listed");
        all.items
            .iter()
            .any(|event| event.reason.as_deref() == Some("Invalid"))
    })
    .await;
    follow.abort();

    cluster.delete_pod(SHOP, "web").await;
    until("nothing of a pod that is gone is signed", async || {
        code(&token, &[WEB]).await == Code::PermissionDenied
    })
    .await;
    cluster.delete_pod(SYSTEM, "agent-weft-test-a").await;
    until("a token ends with its pod", async || {
        code(&token, &[WEB]).await != Code::PermissionDenied
    })
    .await;
    control.shutdown().await;
    cluster.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_have_one_authority_and_a_new_one_is_announced() {
    let Some(cluster) =
        Cluster::prepare("two_replicas_have_one_authority_and_a_new_one_is_announced").await
    else {
        return;
    };
    let (a, b) = tokio::join!(cluster.start("a"), cluster.start("b"));
    let token = cluster.token("agent-weft-test-a", "weft").await;
    let roots = async |control: &KubernetesHandle| {
        let signed = client::sign(cluster.channel(control).await, &token, &[WEB]).await;
        signed.expect("signed").cert_chain.pop().expect("roots")
    };
    assert_eq!(roots(&a).await, roots(&b).await);
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let first = secrets.get("weft-ca").await.expect("made");

    let next = rcgen_root();
    let patch = json!({"data": null, "stringData": {"ca-cert.pem": next.0, "ca-key.pem": next.1}});
    let patched = secrets
        .patch("weft-ca", &PatchParams::default(), &Patch::Merge(patch))
        .await;
    patched.expect("replaced");
    until("both roots are told", async || {
        let (of_a, of_b) = (roots(&a).await, roots(&b).await);
        of_a == of_b && of_a.matches("BEGIN").count() == 2
    })
    .await;
    let outgoing = secrets.get("weft-ca-outgoing").await.expect("remembered");
    let key = |secret: &Secret| secret.data.as_ref().map(|data| data["ca-key.pem"].clone());
    assert_eq!(key(&outgoing), key(&first), "the old one still signs");
    a.shutdown().await;
    b.shutdown().await;
    cluster.remove().await;
}

fn rcgen_root() -> (String, String) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).expect("signed");
    (certificate.pem(), key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_api_server_is_not_noticed() {
    const TEST: &str = "a_restart_of_the_api_server_is_not_noticed";
    let Some(command) = setting(RESTART, TEST) else {
        return;
    };
    let Some(cluster) = Cluster::prepare(TEST).await else {
        return;
    };
    let control = cluster.start("a").await;
    let token = cluster.token("agent-weft-test-a", "weft").await;
    let channel = cluster.channel(&control).await;
    let mut agent = Agent::connect(channel.clone(), &token)
        .await
        .expect("known");
    agent.until(&pod_key(SHOP, "web")).await;
    client::sign(channel.clone(), &token, &[WEB])
        .await
        .expect("signed");

    let status = std::process::Command::new("sh")
        .args(["-c", &command])
        .status();
    assert!(status.expect("run").success());
    client::sign(channel, &token, &[WEB])
        .await
        .expect("signed while it is away");
    until("the API server is back", async || {
        cluster.policies().list(&Default::default()).await.is_ok()
    })
    .await;
    let objects = control.hub().objects();
    cluster
        .pod(SHOP, "cart", "web", NODES[1], "192.0.2.11")
        .await;
    let response = agent.until(&pod_key(SHOP, "cart")).await;
    assert!(
        response.removed_resources.is_empty(),
        "nothing was thought to be gone"
    );
    assert!(!objects.is_empty());
    control.shutdown().await;
    cluster.remove().await;
}

/// Pods that come and go, each with the address of the one before: what the control plane says of an address is true in the
/// end, and no certificate is signed for an account that has no pod left.
#[tokio::test(flavor = "multi_thread")]
async fn reused_addresses_have_one_owner_while_pods_churn() {
    let Some(cluster) = Cluster::prepare("reused_addresses_have_one_owner_while_pods_churn").await
    else {
        return;
    };
    let control = cluster.start("a").await;
    let token = cluster.token("agent-weft-test-a", "weft").await;
    let channel = cluster.channel(&control).await;
    for account in ["even", "odd"] {
        cluster
            .create::<ServiceAccount>(Some(SHOP), json!({"metadata": {"name": account}}))
            .await;
    }
    let identity = |account: &str| format!("spiffe://cluster.local/ns/{SHOP}/sa/{account}");
    for round in 0..100 {
        let (account, other) = if round % 2 == 0 {
            ("even", "odd")
        } else {
            ("odd", "even")
        };
        let name = format!("churn-{round}");
        cluster
            .pod(SHOP, &name, account, NODES[0], "192.0.2.99")
            .await;
        until("it is known", async || {
            client::sign(channel.clone(), &token, &[&identity(account)])
                .await
                .is_ok()
        })
        .await;
        let refused = client::sign(channel.clone(), &token, &[&identity(other)]).await;
        assert_eq!(
            refused.expect_err("no such pod").code(),
            Code::PermissionDenied,
            "round {round}"
        );
        cluster.delete_pod(SHOP, &name).await;
        until("it is forgotten", async || {
            let index = control.hub().read();
            index.store().resolve("/192.0.2.99").is_empty()
        })
        .await;
    }
    control.shutdown().await;
    cluster.remove().await;
}
