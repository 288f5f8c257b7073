//! The chart on a real Kubernetes (`cargo xtask cluster test`): what the API server itself says about it. The tests share one
//! cluster, and each removes what it made.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    chart::{self, NAMESPACE},
    cluster::{
        Cluster,
        local::{BOX_IMAGE, Local},
    },
    programs, skip,
};
use serde_json::{Value, json};

/// Longest wait for a pod or an object.
const LIMIT: Duration = Duration::from_secs(120);

/// The cluster of this run; notes a skip without one.
fn cluster(test: &str) -> Result<Option<Cluster>> {
    let cluster = Cluster::of_tests()?;
    if cluster.is_none() {
        skip::note(test, "no cluster (cargo xtask cluster test starts one)")?;
    }
    Ok(cluster)
}

/// A local cluster; notes a skip on another.
fn local(test: &str) -> Result<Option<(Cluster, Local)>> {
    let Some(cluster) = cluster(test)? else {
        return Ok(None);
    };
    match &cluster {
        Cluster::Local(local) => {
            let local = local.clone();
            Ok(Some((cluster, local)))
        }
        _ => {
            skip::note(test, "needs the nodes of a local cluster")?;
            Ok(None)
        }
    }
}

/// A namespace that goes when this is dropped.
struct Namespace<'a> {
    cluster: &'a Cluster,
    name: &'a str,
}

impl<'a> Namespace<'a> {
    fn make(cluster: &'a Cluster, name: &'a str) -> Result<Self> {
        // What a killed run has left.
        let arguments = [
            "delete",
            "namespace",
            name,
            "--ignore-not-found",
            "--timeout=60s",
        ];
        cluster.kubectl(&arguments)?;
        cluster.kubectl(&["create", "namespace", name])?;
        Ok(Self { cluster, name })
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        let arguments = ["delete", "namespace", self.name, "--timeout=60s"];
        if let Err(error) = self.cluster.kubectl(&arguments) {
            eprintln!("cluster: {error:#}");
        }
    }
}

/// The definitions of the chart, removed when this is dropped.
struct Definitions<'a>(&'a Cluster);

impl<'a> Definitions<'a> {
    fn install(cluster: &'a Cluster) -> Result<Self> {
        let folder = chart::folder().join("files/crds").display().to_string();
        let output =
            cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &folder])?;
        let installed = Self(cluster);
        ensure!(output.lines().count() == 3, "{output}");
        for kind in ["authorizationpolicies", "externalworkloads", "meshpolicies"] {
            let name = format!("crd/{kind}.weft.dev");
            cluster.kubectl(&[
                "wait",
                "--for=condition=Established",
                "--timeout=60s",
                &name,
            ])?;
            let conditions = cluster.get(&[&name])?["status"]["conditions"].clone();
            let structural = conditions.as_array().into_iter().flatten();
            let faults: Vec<&Value> = structural
                .filter(|condition| condition["type"] == "NonStructuralSchema")
                .collect();
            ensure!(faults.is_empty(), "{kind}: {faults:?}");
        }
        Ok(installed)
    }
}

impl Drop for Definitions<'_> {
    fn drop(&mut self) {
        let folder = chart::folder().join("files/crds").display().to_string();
        if let Err(error) = self.0.kubectl(&["delete", "-f", &folder, "--timeout=60s"]) {
            eprintln!("cluster: {error:#}");
        }
    }
}

fn object(kind: &str, spec: &Value) -> String {
    json!({
        "apiVersion": "weft.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": "tried"},
        "spec": spec,
    })
    .to_string()
}

#[test]
fn pods_of_both_nodes_reach_each_other_and_find_services_by_name() -> Result<()> {
    let Some((cluster, local)) = local("cluster::pods_of_both_nodes_reach_each_other")? else {
        return Ok(());
    };
    let namespace = Namespace::make(&cluster, "harness")?;
    let pod = |name: &str, node: &str, command: &str| {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "box", "image": BOX_IMAGE, "imagePullPolicy": "Never",
                    "command": ["/bin/sh", "-c", command],
                }],
            },
        })
        .to_string()
    };
    let [first, second] = local.nodes() else {
        anyhow::bail!("the test is for two nodes, not {:?}", local.nodes());
    };
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server"},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    let server = pod(
        "server",
        first,
        "mkdir -p /tmp/w && echo well > /tmp/w/index.html && httpd -f -p 8080 -h /tmp/w",
    );
    let client = pod("client", second, "sleep 3600");
    cluster.kubectl_with(
        &["-n", namespace.name, "apply", "-f", "-"],
        Some(&format!("{server}\n---\n{client}\n---\n{service}\n")),
    )?;
    cluster.wait_for(
        &[
            "-n",
            namespace.name,
            "wait",
            "--for=condition=Ready",
            "pod",
            "--all",
            "--timeout=1s",
        ],
        LIMIT,
    )?;
    let answer = cluster.wait_for(
        &[
            "-n",
            namespace.name,
            "exec",
            "client",
            "--",
            "wget",
            "-q",
            "-T",
            "5",
            "-O",
            "-",
            "http://server.harness.svc.cluster.local/",
        ],
        LIMIT,
    )?;
    assert_eq!(answer.trim(), "well");
    Ok(())
}

/// Objects that mean something.
fn good_objects() -> Vec<(&'static str, Value)> {
    vec![
        ("AuthorizationPolicy", json!({})),
        (
            "AuthorizationPolicy",
            json!({"action": "ALLOW", "rules": [{}]}),
        ),
        (
            "AuthorizationPolicy",
            json!({
                "selector": {"matchLabels": {"app": "db"}},
                "action": "DENY",
                "rules": [{
                    "from": [{
                        "principals": ["cluster.local/ns/*", "*"], "notNamespaces": ["test"],
                        "serviceAccounts": ["web", "shop/cart"], "ipBlocks": ["10.0.0.0/8", "fd00::1"],
                    }],
                    "to": [{"ports": [5432], "notPorts": [1]}],
                }],
            }),
        ),
        (
            "MeshPolicy",
            json!({"mtls": {"mode": "STRICT", "ports": {"8080": "PERMISSIVE"}}, "failureMode": "open"}),
        ),
        (
            "MeshPolicy",
            json!({"sameNode": "tunnel", "selector": {"matchLabels": {"app": "db"}}}),
        ),
        (
            "ExternalWorkload",
            json!({"addresses": ["192.0.2.1", "2001:db8::1"], "ports": {"http": 80}, "mesh": "enabled"}),
        ),
    ]
}

/// Objects that are refused, and what the refusal names.
fn bad_objects() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        (
            "AuthorizationPolicy",
            json!({"action": "PERHAPS"}),
            "spec.action",
        ),
        ("AuthorizationPolicy", json!({"rulez": []}), "rulez"),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{}]}]}),
            "spec.rules[0].from[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"to": [{"ports": [0]}]}]}),
            "ports[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"to": [{"ports": [65536]}]}]}),
            "ports[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"namespaces": ["a*b"]}]}]}),
            "namespaces[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"ipBlocks": ["everywhere"]}]}]}),
            "ipBlocks[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"serviceAccounts": ["A/B"]}]}]}),
            "serviceAccounts[0]",
        ),
        ("MeshPolicy", json!({}), "sets nothing"),
        (
            "MeshPolicy",
            json!({"mtls": {"mode": "DISABLE"}}),
            "spec.mtls.mode",
        ),
        (
            "MeshPolicy",
            json!({"mtls": {"ports": {"0": "STRICT"}}}),
            "between 1 and 65535",
        ),
        (
            "ExternalWorkload",
            json!({"addresses": []}),
            "spec.addresses",
        ),
        (
            "ExternalWorkload",
            json!({"addresses": ["192.0.2.0/24"]}),
            "without a range",
        ),
        (
            "ExternalWorkload",
            json!({"addresses": ["192.0.2.1"], "weight": 0}),
            "spec.weight",
        ),
    ]
}

#[test]
fn the_api_server_takes_the_definitions_and_refuses_bad_objects() -> Result<()> {
    let test = "cluster::the_api_server_takes_the_definitions_and_refuses_bad_objects";
    let Some(cluster) = cluster(test)? else {
        return Ok(());
    };
    let _definitions = Definitions::install(&cluster)?;
    let try_object = |kind: &str, spec: &Value| {
        cluster.kubectl_with(
            &["create", "--dry-run=server", "--validate=strict", "-f", "-"],
            Some(&object(kind, spec)),
        )
    };
    for (kind, spec) in good_objects() {
        try_object(kind, &spec).with_context(|| format!("{kind} {spec}"))?;
    }
    for (kind, spec, named) in bad_objects() {
        let refused = try_object(kind, &spec).err();
        let error = refused.with_context(|| format!("{kind} {spec} was accepted"))?;
        let error = format!("{error:#}");
        ensure!(error.contains(named), "{kind} {spec}: {error}");
    }
    Ok(())
}

#[test]
fn columns_and_categories_show_policies() -> Result<()> {
    let Some(cluster) = cluster("cluster::columns_and_categories_show_policies")? else {
        return Ok(());
    };
    let _definitions = Definitions::install(&cluster)?;
    let namespace = Namespace::make(&cluster, "columns")?;
    let spec = json!({"mtls": {"mode": "STRICT"}, "failureMode": "open"});
    cluster.kubectl_with(
        &["-n", namespace.name, "create", "-f", "-"],
        Some(&object("MeshPolicy", &spec)),
    )?;
    let table = cluster.kubectl(&["-n", namespace.name, "get", "weft"])?;
    let heading = table.lines().next().unwrap_or_default();
    for column in ["MTLS", "ON DEATH", "ACCEPTED", "AGE"] {
        ensure!(heading.contains(column), "no {column} in:\n{table}");
    }
    ensure!(
        table.contains("STRICT") && table.contains("open"),
        "{table}"
    );
    Ok(())
}

#[test]
fn the_api_server_takes_what_the_chart_renders() -> Result<()> {
    let test = "cluster::the_api_server_takes_what_the_chart_renders";
    let Some(cluster) = cluster(test)? else {
        return Ok(());
    };
    let _definitions = Definitions::install(&cluster)?;
    let _namespace = Namespace::make(&cluster, NAMESPACE)?;
    let mut sets = vec![PathBuf::new()];
    for folder in [
        chart::folder().join("distributions"),
        chart::repository().join("tests/chart/values"),
    ] {
        for entry in fs::read_dir(folder)? {
            sets.push(entry?.path());
        }
    }
    for values in sets {
        let files: Vec<&std::path::Path> = match values.as_os_str().is_empty() {
            true => Vec::new(),
            false => vec![&values],
        };
        let rendered = chart::render(&files, &[])?;
        // Kinds of Prometheus' operator, which is not installed here.
        let known = rendered
            .objects
            .iter()
            .filter(|object| object["apiVersion"] != "monitoring.coreos.com/v1");
        let documents: Vec<String> = known.map(Value::to_string).collect();
        cluster
            .kubectl_with(
                &[
                    "apply",
                    "--server-side",
                    "--dry-run=server",
                    "--validate=strict",
                    "-f",
                    "-",
                ],
                Some(&documents.join("\n---\n")),
            )
            .with_context(|| format!("with {}", values.display()))?;
    }
    Ok(())
}

#[test]
fn images_run_in_pods() -> Result<()> {
    let Some((cluster, _)) = local("cluster::images_run_in_pods")? else {
        return Ok(());
    };
    programs::own("mesh-agent")?;
    let namespace = Namespace::make(&cluster, "images")?;
    for (name, image, command, user) in [
        (
            "agent",
            "localhost/weft/agent:test",
            json!(["/mesh-agent", "--version"]),
            0,
        ),
        (
            "weft",
            "localhost/weft/agent:test",
            json!(["/weft", "--version"]),
            65532,
        ),
        (
            "control",
            "localhost/weft/control:test",
            json!(["/mesh-control", "--version"]),
            65532,
        ),
    ] {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "containers": [{
                    "name": name, "image": image, "imagePullPolicy": "Never", "command": command,
                    "securityContext": {
                        "runAsUser": user, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }],
            },
        });
        let arguments = ["-n", namespace.name, "apply", "-f", "-"];
        cluster.kubectl_with(&arguments, Some(&pod.to_string()))?;
    }
    for name in ["agent", "weft", "control"] {
        let pod = format!("pod/{name}");
        let phase = "--for=jsonpath={.status.phase}=Succeeded";
        let arguments = ["-n", namespace.name, "wait", phase, &pod, "--timeout=1s"];
        let waited = cluster.wait_for(&arguments, LIMIT);
        let log = cluster.kubectl(&["-n", namespace.name, "logs", name]);
        waited.with_context(|| format!("{log:?}"))?;
        ensure!(
            log?.contains(env!("CARGO_PKG_VERSION")),
            "{name} prints its version"
        );
    }
    Ok(())
}
