//! A whole control plane against a small API server, with a client in the place of an agent.

use mesh_api::proto::ca::IstioCertificateResponse;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::{authority::BUNDLE_KEY, fake::FakeApi, *};

#[path = "../../tests/client/mod.rs"]
mod client;
use client::Agent;

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const SECRETS: &str = "/api/v1/secrets";
const CONFIG_MAPS: &str = "/api/v1/configmaps";
const EVENTS: &str = "/apis/events.k8s.io/v1/events";
const LEASES: &str = "/apis/coordination.k8s.io/v1/leases";
const POLICIES: &str = "/apis/weft.dev/v1alpha1/authorizationpolicies";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn pod(namespace: &str, name: &str, account: &str, node: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn policy(name: &str, principal: &str, generation: i64) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "generation": generation},
        "spec": {"action": "DENY", "rules": [{"from": [{"principals": [principal]}]}]},
    })
}

/// A cluster with agents on `node-a` and `node-b` and a pod `web` on `node-a`.
async fn cluster() -> FakeApi {
    let fake = FakeApi::start().await;
    fake.put(
        NAMESPACES,
        json!({"metadata": {"name": "shop", "labels": {"weft.dev/mesh": "enabled"}}}),
    );
    fake.put(PODS, pod("shop", "web", "web", "node-a", "10.0.0.1"));
    for node in ["node-a", "node-b"] {
        let name = format!("agent-{node}");
        fake.put(
            PODS,
            pod("weft-system", &name, "weft-agent", node, "10.0.0.100"),
        );
        let extra = json!({
            "authentication.kubernetes.io/pod-name": [name],
            "authentication.kubernetes.io/pod-uid": [format!("uid-weft-system-{name}")],
            "authentication.kubernetes.io/node-name": [node],
        });
        let status = json!({
            "authenticated": true,
            "audiences": ["weft"],
            "user": {"username": "system:serviceaccount:weft-system:weft-agent", "extra": extra},
        });
        fake.set_token(&format!("token-of-{node}"), status);
    }
    fake
}

struct Replica {
    handle: KubernetesHandle,
}

impl Replica {
    async fn start(fake: &FakeApi, name: &str) -> Self {
        let mut config = KubernetesConfig::default();
        config.cluster.replica = name.into();
        let handle = start_with(fake.api(), config, Registry::new()).await;
        Self {
            handle: handle.expect("started"),
        }
    }

    async fn ready(&self) {
        let mut waits = self.handle.waits();
        let ready = waits.wait_for(Vec::is_empty);
        let ready = tokio::time::timeout(std::time::Duration::from_secs(30), ready);
        ready.await.expect("in time").expect("it runs");
    }

    async fn channel(&self, fake: &FakeApi) -> tonic::transport::Channel {
        let url = format!("https://{}", self.handle.address());
        client::channel(url, &roots(fake).await).await
    }

    async fn sign(
        &self,
        fake: &FakeApi,
        token: &str,
        names: &[&str],
    ) -> Result<IstioCertificateResponse, Status> {
        client::sign(self.channel(fake).await, token, names).await
    }

    async fn agent(&self, fake: &FakeApi, token: &str) -> Agent {
        let agent = Agent::connect(self.channel(fake).await, token).await;
        agent.expect("known")
    }
}

/// The bundle that agents mount, once it is there.
async fn roots(fake: &FakeApi) -> String {
    fake.until(|fake| fake.count(CONFIG_MAPS) == 1).await;
    let map = fake
        .get(CONFIG_MAPS, "weft-system", "weft-roots")
        .expect("there");
    map["data"][BUNDLE_KEY].as_str().expect("text").to_owned()
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|it| it["type"] == kind));
    found.unwrap_or(&Value::Null)
}

#[tokio::test]
async fn agents_are_served_once_the_whole_mesh_is_known() {
    let fake = cluster().await;
    fake.set_absent(POLICIES, true);
    let replica = Replica::start(&fake, "a").await;
    // Pods are listed last, and so not at all while the policies cannot be.
    fake.until(|fake| fake.requests("authorizationpolicies") >= 2)
        .await;
    let waits = replica.handle.waits().borrow().clone();
    assert!(
        waits.contains(&"the list of AuthorizationPolicy".to_owned()),
        "{waits:?}"
    );
    let refused = tokio::net::TcpStream::connect(replica.handle.address()).await;
    assert!(refused.is_err(), "the port is closed");

    fake.set_absent(POLICIES, false);
    replica.ready().await;
    let mut agent = replica.agent(&fake, "token-of-node-a").await;
    agent.until("Kubernetes//Pod/shop/web").await;
}

#[tokio::test]
async fn a_certificate_is_for_what_the_node_runs_now() {
    let fake = cluster().await;
    let replica = Replica::start(&fake, "a").await;
    replica.ready().await;
    let signed = replica
        .sign(&fake, "token-of-node-a", &[WEB])
        .await
        .expect("its own");
    assert!(signed.cert_chain.len() >= 2);
    let code =
        |answer: Result<IstioCertificateResponse, Status>| answer.expect_err("refused").code();
    let another_node = replica.sign(&fake, "token-of-node-b", &[WEB]).await;
    assert_eq!(code(another_node), Code::PermissionDenied);
    let another_name = [WEB, "spiffe://cluster.local/ns/shop/sa/cart"];
    let forged = replica.sign(&fake, "token-of-node-a", &another_name).await;
    assert_eq!(code(forged), Code::InvalidArgument);
    let stranger = replica.sign(&fake, "token-of-nobody", &[WEB]).await;
    assert_eq!(code(stranger), Code::Unauthenticated);

    // Of a host-network pod nothing is signed: it is never enrolled.
    let mut host = pod("shop", "host", "host", "node-a", "172.16.0.1");
    host["spec"]["hostNetwork"] = json!(true);
    fake.put(PODS, host);
    let mut agent = replica.agent(&fake, "token-of-node-a").await;
    agent.until("Kubernetes//Pod/shop/host").await;
    let host = replica
        .sign(
            &fake,
            "token-of-node-a",
            &["spiffe://cluster.local/ns/shop/sa/host"],
        )
        .await;
    assert_eq!(code(host), Code::PermissionDenied);

    fake.delete(PODS, "shop", "web");
    agent.until("Kubernetes//Pod/shop/web").await;
    let gone = replica.sign(&fake, "token-of-node-a", &[WEB]).await;
    assert_eq!(code(gone), Code::PermissionDenied);
    fake.delete(PODS, "weft-system", "agent-node-a");
    agent
        .until("Kubernetes//Pod/weft-system/agent-node-a")
        .await;
    let stale = replica.sign(&fake, "token-of-node-a", &[WEB]).await;
    assert_eq!(code(stale), Code::Unavailable, "its pod is gone");
}

#[tokio::test]
async fn replicas_agree_on_the_authority_and_one_of_them_writes() {
    let fake = cluster().await;
    let (a, b) = tokio::join!(Replica::start(&fake, "a"), Replica::start(&fake, "b"));
    a.ready().await;
    b.ready().await;
    assert_eq!(fake.count(SECRETS), 1);
    let (of_a, of_b) = (
        a.sign(&fake, "token-of-node-a", &[WEB])
            .await
            .expect("signed"),
        b.sign(&fake, "token-of-node-a", &[WEB])
            .await
            .expect("signed"),
    );
    assert_eq!(
        of_a.cert_chain.last(),
        of_b.cert_chain.last(),
        "the same roots"
    );

    let holder = |fake: &FakeApi| {
        let lease = fake.get(LEASES, "weft-system", "weft-control");
        let holder =
            lease.and_then(|lease| lease["spec"]["holderIdentity"].as_str().map(str::to_owned));
        holder.unwrap_or_default()
    };
    fake.until(|fake| !holder(fake).is_empty()).await;
    let first = holder(&fake);
    let (leaver, stayer, heir) = if first == "a" {
        (a, b, "b")
    } else {
        (b, a, "a")
    };
    leaver.handle.shutdown().await;
    fake.until(|fake| holder(fake) == heir).await;
    drop(stayer);
}

#[tokio::test]
async fn the_status_says_what_was_understood_and_who_has_applied_it() {
    let fake = cluster().await;
    let replica = Replica::start(&fake, "a").await;
    replica.ready().await;
    fake.put(POLICIES, policy("p", "a", 1));
    let is = |fake: &FakeApi, kind: &str, status: &str, message: &str| {
        let object = fake.get(POLICIES, "shop", "p").expect("there");
        let condition = condition(&object, kind).clone();
        let says = condition["message"]
            .as_str()
            .unwrap_or_default()
            .contains(message);
        condition["status"] == status && says
    };
    fake.until(|fake| {
        is(fake, "Accepted", "True", "") && is(fake, "Programmed", "Unknown", "no agent")
    })
    .await;
    let mut agent = replica.agent(&fake, "token-of-node-a").await;
    agent.until("shop/p").await;
    let follow = tokio::spawn(async move {
        loop {
            agent.next().await;
        }
    });
    fake.until(|fake| is(fake, "Programmed", "True", "all 1 agents"))
        .await;
    assert_eq!(fake.count(EVENTS), 0, "nothing is wrong");

    let mut bad = policy("p", "a*b", 2);
    bad["status"] = fake.get(POLICIES, "shop", "p").expect("there")["status"].clone();
    fake.put(POLICIES, bad);
    fake.until(|fake| is(fake, "Accepted", "False", "last good version"))
        .await;
    fake.until(|fake| fake.count(EVENTS) == 1).await;
    let writes = fake.requests("PATCH");
    assert!(writes <= 4, "only changes are written: {writes}");
    follow.abort();
}

#[tokio::test]
async fn the_mesh_is_served_on_while_the_api_server_is_away() {
    let fake = cluster().await;
    let replica = Replica::start(&fake, "a").await;
    replica.ready().await;
    let mut agent = replica.agent(&fake, "token-of-node-a").await;
    agent.until("Kubernetes//Pod/shop/web").await;
    replica
        .sign(&fake, "token-of-node-a", &[WEB])
        .await
        .expect("reviewed");

    fake.go_down().await;
    replica
        .sign(&fake, "token-of-node-a", &[WEB])
        .await
        .expect("the verdict stands");
    let workloads = replica.handle.hub().objects();
    assert!(workloads.contains(&(Kind::Pod, 3)), "{workloads:?}");

    // It comes back having forgotten everything, and with another pod.
    fake.delete(PODS, "shop", "web");
    fake.put(PODS, pod("shop", "cart", "cart", "node-a", "10.0.0.1"));
    fake.forget();
    fake.come_back();
    let response = agent.until("Kubernetes//Pod/shop/cart").await;
    assert!(
        response.removed_resources.is_empty()
            || response.removed_resources == ["Kubernetes//Pod/shop/web"]
    );
}

#[test]
fn every_metric_is_documented() {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry).expect("registered");
    let kube_metrics = KubeMetrics::new(&registry).expect("registered");
    for vector in [&metrics.objects, &metrics.resources, &kube_metrics.listed] {
        vector.with_label_values(&["x"]);
    }
    for vector in [
        &metrics.pushes,
        &metrics.nacks,
        &metrics.certificates_refused,
        &kube_metrics.errors,
        &kube_metrics.relists,
        &kube_metrics.token_reviews,
        &kube_metrics.status_writes,
    ] {
        vector.with_label_values(&["x"]);
    }
    let documented = include_str!("../../../docs/control-plane.md");
    let families = registry.gather();
    assert_eq!(families.len(), 16);
    for family in families {
        let name = format!("`{}`", family.name());
        assert!(documented.contains(&name), "{name} is missing");
    }
}
