use serde_json::json;

use super::*;

fn item<T: Watched>(value: serde_json::Value) -> Item {
    serde_json::from_value::<T>(value)
        .expect("readable")
        .into_item()
}

fn pod() -> serde_json::Value {
    json!({
        "metadata": {
            "name": "web-1", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
            "labels": {"app": "web"},
            "annotations": {"large": "and of no interest"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5", "uid": "u0", "controller": true}],
        },
        "spec": {
            "nodeName": "n1", "serviceAccountName": "web", "volumes": [{"name": "x"}],
            "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}],
        },
        "status": {
            "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": null}, {"type": "Initialized", "status": "True"}],
        },
    })
}

#[test]
fn a_pod_keeps_what_the_index_reads() {
    let item = item::<KubePod>(pod());
    assert_eq!(item.key.to_string(), "Pod shop/web-1");
    assert_eq!(item.version, "7");
    let Content::Good(object, problems) = item.content else {
        panic!("refused");
    };
    assert!(problems.is_empty());
    let Object::Pod(pod) = *object else {
        panic!("not a pod");
    };
    let (spec, status) = (pod.spec.expect("spec"), pod.status.expect("status"));
    assert_eq!(spec.node_name.as_deref(), Some("n1"));
    assert_eq!(spec.service_account_name.as_deref(), Some("web"));
    let ports = spec.containers[0].ports.as_ref().expect("ports");
    assert_eq!(ports[0].container_port, 8080);
    assert_eq!(status.pod_ips.expect("addresses").len(), 2);
    assert_eq!(status.conditions.expect("conditions")[0].type_, "Ready");
    assert_eq!(
        pod.metadata.owner_references.expect("owner")[0].name,
        "web-5"
    );
}

#[test]
fn what_the_mesh_does_not_need_does_not_change_a_pods_fingerprint() {
    let before = item::<KubePod>(pod()).fingerprint;
    let change = |path: &str, value: serde_json::Value| {
        let mut changed = pod();
        *changed.pointer_mut(path).expect("there") = value;
        item::<KubePod>(changed).fingerprint
    };
    assert_eq!(before, change("/metadata/resourceVersion", json!("8")));
    assert_eq!(before, change("/metadata/annotations/large", json!("x")));
    assert_eq!(
        before,
        change("/status/conditions/1/status", json!("False"))
    );
    assert_ne!(before, change("/metadata/uid", json!("u2")));
    assert_ne!(
        before,
        change("/status/conditions/0/status", json!("False"))
    );
    assert_ne!(before, change("/status/podIP", json!("10.0.0.2")));
    assert_ne!(before, change("/metadata/labels/app", json!("cart")));
    assert_ne!(before, change("/spec/serviceAccountName", json!("cart")));
}

#[test]
fn a_pod_that_no_kubelet_has_reported_on_is_not_ready() {
    let item = item::<KubePod>(
        json!({"metadata": {"name": "a", "namespace": "b"}, "spec": {"containers": []}}),
    );
    let Content::Good(object, _) = item.content else {
        panic!("refused");
    };
    let Object::Pod(pod) = *object else {
        panic!("not a pod");
    };
    let conditions = pod.status.and_then(|status| status.conditions);
    assert_eq!(conditions.expect("made")[0].status, "False");
}

#[test]
fn a_value_that_only_kubernetes_knows_does_not_hide_an_object() {
    let item = item::<Service>(json!({
        "metadata": {"name": "web", "namespace": "shop", "labels": {"weft.dev/mesh": "yes"}},
        "spec": {"clusterIP": "10.96.0.7", "trafficDistribution": "PreferTomorrow", "ports": [{"port": 80}]},
    }));
    let Content::Good(_, problems) = item.content else {
        panic!("refused");
    };
    assert_eq!(problems.len(), 2, "{problems:?}");
}

#[test]
fn a_policy_is_read_as_manifest_files_are() {
    let value = json!({
        "metadata": {"name": "only-web", "namespace": "shop", "uid": "u", "resourceVersion": "9", "generation": 3,
                     "managedFields": [{"manager": "kubectl"}]},
        "spec": {"action": "ALLOW", "rules": [{"from": [{"serviceAccounts": ["web"]}]}]},
        "status": {"conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
                                   "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 3}]},
    });
    let good = item::<KubeAuthorizationPolicy>(value.clone());
    assert!(matches!(good.content, Content::Good(..)), "{good:?}");
    let own = good.own.expect("one of ours");
    assert_eq!((own.generation, own.conditions.len()), (3, 1));

    let mut status = value.clone();
    *status
        .pointer_mut("/status/conditions/0/message")
        .expect("there") = json!("other");
    *status
        .pointer_mut("/metadata/resourceVersion")
        .expect("there") = json!("10");
    let again = item::<KubeAuthorizationPolicy>(status);
    assert_eq!(again.fingerprint, good.fingerprint, "a status is no change");

    let mut bad = value;
    *bad.pointer_mut("/spec/rules/0/from/0").expect("there") = json!({"principals": ["a*b"]});
    let bad = item::<KubeAuthorizationPolicy>(bad);
    assert_eq!(bad.key, good.key);
    let Content::Refused { problems, policy } = bad.content else {
        panic!("accepted");
    };
    assert_eq!(problems[0].field, "spec.rules[0].from[0].principals[0]");
    assert!(policy.is_some_and(|policy| policy.is_named()));
}
