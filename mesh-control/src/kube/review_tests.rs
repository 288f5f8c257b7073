use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use mesh_api::manifest::{Kind, ObjectKey};

use super::*;

const AUDIENCE: &str = "weft-control";

fn key(name: &str) -> ObjectKey {
    ObjectKey {
        kind: Kind::Pod,
        namespace: "weft-system".into(),
        name: name.into(),
    }
}

/// One agent per node: `agent-a` on `node-a`, `agent-b` on `node-b`.
fn agents() -> AgentPods {
    let agents = AgentPods::new(
        [ServiceAccount {
            namespace: "weft-system".into(),
            name: "weft-agent".into(),
        }]
        .into(),
    );
    for (name, node) in [("agent-a", "node-a"), ("agent-b", "node-b")] {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(format!("uid-{name}"));
        pod.spec = Some(PodSpec {
            node_name: Some(node.into()),
            service_account_name: Some("weft-agent".into()),
            ..PodSpec::default()
        });
        agents.set(&key(name), Some(&pod));
    }
    agents
}

/// What a real API server says of the token of `agent-a`.
fn answer() -> TokenReviewStatus {
    let extra = [
        (POD_NAME, "agent-a"),
        (POD_UID, "uid-agent-a"),
        (NODE_NAME, "node-a"),
    ];
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec![AUDIENCE.into()]),
        user: Some(UserInfo {
            username: Some("system:serviceaccount:weft-system:weft-agent".into()),
            extra: Some(
                extra
                    .map(|(k, v)| (k.to_owned(), vec![v.to_owned()]))
                    .into(),
            ),
            ..UserInfo::default()
        }),
        error: None,
    }
}

fn judged(change: impl FnOnce(&mut TokenReviewStatus)) -> Result<Bearer, Refusal> {
    let mut answer = answer();
    change(&mut answer);
    judge(&answer, AUDIENCE, &agents())
}

fn extra(status: &mut TokenReviewStatus) -> &mut BTreeMap<String, Vec<String>> {
    let user = status.user.as_mut().expect("a user");
    user.extra.as_mut().expect("claims")
}

#[test]
fn a_projected_token_of_an_agent_proves_its_node() {
    let bearer = judged(|_| {}).expect("good");
    assert_eq!(&*bearer.node.0, "node-a");
    let older = judged(|status| {
        extra(status).remove(NODE_NAME);
    });
    assert_eq!(older, Ok(bearer), "a server before 1.30 names no node");
}

#[test]
fn whatever_else_proves_nothing() {
    type Change = fn(&mut TokenReviewStatus);
    let cases: [(&str, &str, Change); 12] = [
        ("forged or expired", "unknown", |status| {
            status.authenticated = Some(false);
        }),
        ("not said to be good", "unknown", |status| {
            status.authenticated = None
        }),
        ("for the API server", "audience", |status| {
            status.audiences = Some(vec!["https://kubernetes.default.svc".into()]);
        }),
        ("a server without audiences", "audience", |status| {
            status.audiences = None
        }),
        ("another account", "account", |status| {
            status.user.as_mut().expect("a user").username =
                Some("system:serviceaccount:weft-system:default".into());
        }),
        ("the same name elsewhere", "account", |status| {
            status.user.as_mut().expect("a user").username =
                Some("system:serviceaccount:shop:weft-agent".into());
        }),
        ("a user who is no account", "account", |status| {
            status.user.as_mut().expect("a user").username = Some("weft-agent".into());
        }),
        ("nobody", "account", |status| status.user = None),
        ("a token of a Secret", "unbound", |status| {
            extra(status).remove(POD_NAME);
        }),
        (
            "a pod that was replaced by one of its name",
            "pod",
            |status| {
                extra(status).insert(POD_UID.into(), vec!["uid-earlier".into()]);
            },
        ),
        ("a pod that is gone", "pod", |status| {
            extra(status).insert(POD_NAME.into(), vec!["agent-c".into()]);
        }),
        ("another node than the pod's", "node", |status| {
            extra(status).insert(NODE_NAME.into(), vec!["node-b".into()]);
        }),
    ];
    for (case, label, change) in cases {
        let refusal = judged(change).expect_err(case);
        assert_eq!(refusal.label(), label, "{case}");
    }
    let two_names = judged(|status| {
        extra(status).insert(POD_NAME.into(), vec!["agent-a".into(), "agent-b".into()]);
    });
    assert_eq!(two_names, Err(Refusal::Unbound));
}

#[test]
fn only_a_pod_that_is_not_known_yet_is_worth_another_try() {
    assert_eq!(
        Refusal::Pod("a/b".into()).to_status().code(),
        tonic::Code::Unavailable
    );
    let audience = Refusal::Audience("x".into()).to_status();
    assert_eq!(audience.code(), tonic::Code::Unauthenticated);
}
