//! The Helm chart with many sets of values: what every set must keep, and what single ones are for. No cluster is needed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use mesh_tests::{
    chart::{self, NAMESPACE, Rendered, containers, describe, render, texts},
    programs, skip,
};
use serde_json::{Value, json};

/// What an agent may hold (docs/threat-model.md).
const CAPABILITIES: [&str; 4] = ["DAC_READ_SEARCH", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"];

/// Notes a skip where helm is missing.
fn helm_is_here(test: &str) -> Result<bool> {
    if !chart::has_helm() {
        skip::note(test, "helm is not installed (cargo xtask setup)")?;
    }
    Ok(chart::has_helm())
}

/// The default values, those of the distributions, and those of the tests, with their names.
fn value_sets() -> Result<Vec<(String, Option<PathBuf>)>> {
    let mut sets = vec![("defaults".to_owned(), None)];
    for folder in [
        chart::folder().join("distributions"),
        chart::repository().join("tests/chart/values"),
    ] {
        for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
            let path = entry?.path();
            sets.push((path.display().to_string(), Some(path)));
        }
    }
    Ok(sets)
}

fn test_values(name: &str) -> PathBuf {
    chart::repository().join("tests/chart/values").join(name)
}

/// Renders every set and applies a check; the error names the set.
fn with_every_set(check: impl Fn(&Rendered) -> Result<()>) -> Result<()> {
    let sets = value_sets()?;
    assert!(sets.len() >= 10, "only {} sets of values", sets.len());
    for (name, file) in sets {
        let files: Vec<&Path> = file.as_deref().into_iter().collect();
        let outcome = render(&files, &[]).and_then(|rendered| check(&rendered));
        outcome.with_context(|| format!("with {name}"))?;
    }
    Ok(())
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    anyhow::ensure!(holds, "{}", otherwise());
    Ok(())
}

#[test]
fn the_chart_has_no_lint() -> Result<()> {
    if !helm_is_here("chart::the_chart_has_no_lint")? {
        return Ok(());
    }
    for (name, file) in value_sets()? {
        let folder = chart::folder().display().to_string();
        let mut arguments = vec!["lint", "--strict", &folder];
        let file = file.map(|path| path.display().to_string());
        if let Some(file) = &file {
            arguments.extend(["--values", file]);
        }
        let output = chart::helm(&arguments)?;
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(())
}

#[test]
fn no_container_has_more_rights_than_it_needs() -> Result<()> {
    if !helm_is_here("chart::no_container_has_more_rights_than_it_needs")? {
        return Ok(());
    }
    with_every_set(|rendered| {
        for (owner, pod) in rendered.pods() {
            let seccomp = &pod["spec"]["securityContext"]["seccompProfile"]["type"];
            let is_agent = owner.starts_with("DaemonSet/");
            ensure(is_agent || seccomp == "RuntimeDefault", || {
                format!("{owner}: seccomp profile {seccomp}")
            })?;
            ensure(
                pod["spec"]["automountServiceAccountToken"].is_boolean(),
                || format!("{owner}: says nothing of the service account's token"),
            )?;
            for container in containers(pod) {
                let name = format!("{owner}, container {}", container["name"]);
                let security = &container["securityContext"];
                ensure(security["privileged"] != true, || {
                    format!("{name}: privileged")
                })?;
                ensure(security["allowPrivilegeEscalation"] == false, || {
                    format!("{name}: may gain rights")
                })?;
                ensure(security["readOnlyRootFilesystem"] == true, || {
                    format!("{name}: writable root")
                })?;
                ensure(security["capabilities"]["drop"] == json!(["ALL"]), || {
                    format!("{name}: keeps capabilities")
                })?;
                let added: Vec<&str> = texts(&security["capabilities"]["add"]).collect();
                let allowed: &[&str] = if is_agent { &CAPABILITIES } else { &[] };
                ensure(added.iter().all(|one| allowed.contains(one)), || {
                    format!("{name}: adds {added:?}")
                })?;
                let is_root = !added.is_empty();
                let forbidden_root = pod["spec"]["securityContext"]["runAsNonRoot"] == true
                    || security["runAsNonRoot"] == true;
                ensure(is_root || forbidden_root, || {
                    format!("{name}: runs as root")
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn objects_fit_together() -> Result<()> {
    if !helm_is_here("chart::objects_fit_together")? {
        return Ok(());
    }
    with_every_set(|rendered| {
        for object in &rendered.objects {
            let name = describe(object);
            let labels = &object["metadata"]["labels"];
            ensure(labels["app.kubernetes.io/part-of"] == "weft", || {
                format!("{name}: lacks the common labels")
            })?;
            let cluster_wide = [
                "ClusterRole",
                "ClusterRoleBinding",
                "CustomResourceDefinition",
            ];
            let namespaced = !cluster_wide.iter().any(|kind| object["kind"] == *kind);
            ensure(
                !namespaced || object["metadata"]["namespace"] == NAMESPACE,
                || format!("{name}: not in the release's namespace"),
            )?;
            if let Some(wanted) = object["spec"]["selector"]["matchLabels"].as_object() {
                let template = &object["spec"]["template"]["metadata"]["labels"];
                let fits = wanted
                    .iter()
                    .all(|(label, value)| template[label] == *value);
                ensure(template.is_null() || fits, || {
                    format!("{name}: does not select its own pods")
                })?;
            }
        }
        for (owner, pod) in rendered.pods() {
            ensure(
                pod["metadata"]["labels"]["weft.dev/mesh"] == "disabled",
                || format!("{owner}: a part of the mesh would be captured by it"),
            )?;
            let volumes: BTreeSet<&str> = pod["spec"]["volumes"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|volume| volume["name"].as_str())
                .collect();
            for container in containers(pod) {
                let image = container["image"].as_str().unwrap_or_default();
                ensure(image.contains(':'), || format!("{owner}: image {image:?}"))?;
                for mount in container["volumeMounts"].as_array().into_iter().flatten() {
                    let volume = mount["name"].as_str().unwrap_or_default();
                    ensure(volumes.contains(volume), || {
                        format!("{owner}: no volume {volume}")
                    })?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_second_agent_fits_on_the_node_and_takes_over() -> Result<()> {
    if !helm_is_here("chart::a_second_agent_fits_on_the_node_and_takes_over")? {
        return Ok(());
    }
    with_every_set(|rendered| {
        let agent = rendered.get("DaemonSet", "weft-agent")?;
        assert_eq!(
            agent["spec"]["updateStrategy"]["rollingUpdate"],
            json!({"maxSurge": 1, "maxUnavailable": 0})
        );
        let pod = &agent["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        // With the host's network a declared port is a host port, and the scheduler would refuse the second pod.
        assert!(container["ports"].is_null());
        assert!(texts(&container["args"]).any(|argument| argument == "--take-over"));
        // The node's ports answer for whichever agent serves: only a probe of the pod itself tells them apart.
        assert_eq!(
            container["readinessProbe"]["exec"]["command"],
            json!(["/weft", "pod", "ready"])
        );
        assert!(container["livenessProbe"].is_null());
        let drain = texts(&container["args"])
            .find_map(|argument| argument.strip_prefix("--upgrade-drain="))
            .context("no drain deadline")?
            .parse::<u64>()?;
        let hook = &container["lifecycle"]["preStop"]["exec"]["command"];
        ensure(texts(hook).take(3).eq(["/weft", "pod", "drain"]), || {
            format!("the hook does not wait: {hook}")
        })?;
        let grace = pod["terminationGracePeriodSeconds"].as_u64();
        assert!(
            grace > Some(drain),
            "{grace:?} s of grace for {drain} s of draining"
        );
        Ok(())
    })
}

#[test]
fn roles_hold_single_verbs_and_no_foreign_secrets() -> Result<()> {
    if !helm_is_here("chart::roles_hold_single_verbs_and_no_foreign_secrets")? {
        return Ok(());
    }
    with_every_set(|rendered| {
        for role in rendered.of("ClusterRole").chain(rendered.of("Role")) {
            let name = describe(role);
            for rule in role["rules"].as_array().into_iter().flatten() {
                let words: Vec<&str> = ["apiGroups", "resources", "verbs"]
                    .iter()
                    .flat_map(|list| texts(&rule[list]))
                    .collect();
                ensure(!words.contains(&"*"), || {
                    format!("{name}: a star in {rule}")
                })?;
                let secret = words.contains(&"secrets");
                ensure(!secret || role["kind"] == "Role", || {
                    format!("{name}: secrets of every namespace")
                })?;
                let only_create = rule["verbs"] == json!(["create"]);
                ensure(
                    !secret || only_create || rule["resourceNames"].is_array(),
                    || format!("{name}: every secret of the namespace"),
                )?;
            }
        }
        // Agents ask the control plane only.
        for binding in rendered
            .of("ClusterRoleBinding")
            .chain(rendered.of("RoleBinding"))
        {
            let subjects = binding["subjects"].as_array().into_iter().flatten();
            for subject in subjects {
                ensure(subject["name"] != "weft-agent", || describe(binding))?;
            }
        }
        Ok(())
    })
}

#[test]
fn an_agent_understands_its_configuration() -> Result<()> {
    if !helm_is_here("chart::an_agent_understands_its_configuration")? {
        return Ok(());
    }
    let agent = programs::own("mesh-agent")?;
    let file = std::env::temp_dir().join(format!("weft-chart-{}.yaml", std::process::id()));
    let outcome = with_every_set(|rendered| {
        let text = rendered.get("ConfigMap", "weft-agent")?["data"]["agent.yaml"]
            .as_str()
            .context("no agent.yaml")?
            // In a pod the environment names the node.
            .replacen("node:\n", "node:\n  name: node-a\n", 1);
        fs::write(&file, text)?;
        let output = Command::new(&agent)
            .arg("check-config")
            .arg(&file)
            .output()?;
        ensure(output.status.success(), || {
            String::from_utf8_lossy(&output.stderr).into_owned()
        })
    });
    fs::remove_file(&file)?;
    outcome
}

#[test]
fn host_paths_take_the_name_of_the_node() -> Result<()> {
    if !helm_is_here("chart::host_paths_take_the_name_of_the_node")? {
        return Ok(());
    }
    let rendered = render(&[&test_values("shared-machine.yaml")], &[])?;
    for name in ["weft-agent", "weft-uninstall"] {
        let pod = &rendered.get("DaemonSet", name)?["spec"]["template"]["spec"];
        for volume in pod["volumes"].as_array().into_iter().flatten() {
            let path = volume["hostPath"]["path"].as_str().unwrap_or_default();
            assert!(
                !path.contains('$'),
                "{name}: hostPath knows no variables: {path}"
            );
        }
        let lists = [&pod["initContainers"][0], &pod["containers"][0]];
        let mounts = lists
            .iter()
            .filter_map(|container| container["volumeMounts"].as_array())
            .flatten();
        let run = mounts
            .clone()
            .find(|mount| mount["name"] == "run")
            .context("no run folder")?;
        assert_eq!(run["mountPath"], "/run/weft");
        assert_eq!(run["subPathExpr"], "$(NODE_NAME)/weft");
        // Paths of namespaces are told from outside, so they must be the same inside.
        let netns = mounts
            .clone()
            .find(|mount| mount["name"] == "netns")
            .context("no namespaces")?;
        assert_eq!(netns["mountPath"], "/run/lab");
        assert!(netns["subPathExpr"].is_null());
        assert_eq!(netns["mountPropagation"], "HostToContainer");
    }
    Ok(())
}

#[test]
fn values_turn_parts_on_and_off() -> Result<()> {
    if !helm_is_here("chart::values_turn_parts_on_and_off")? {
        return Ok(());
    }
    let plain = render(&[], &[])?;
    let full = render(&[&test_values("production.yaml")], &[])?;
    let own = render(&[&test_values("own-authority.yaml")], &[])?;
    let small = render(&[&test_values("one-node.yaml")], &[])?;

    for kind in ["PodMonitor", "PrometheusRule", "NetworkPolicy"] {
        assert_eq!(plain.of(kind).count(), 0, "{kind} by default");
        assert_ne!(full.of(kind).count(), 0, "{kind}");
    }
    let dashboards = full
        .of("ConfigMap")
        .filter(|map| map["metadata"]["labels"]["grafana_dashboard"] == "1");
    assert_eq!(dashboards.count(), 3);

    assert_eq!(plain.of("CustomResourceDefinition").count(), 3);
    assert!(plain.of("CustomResourceDefinition").all(|definition| {
        definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    }));
    assert_eq!(own.of("CustomResourceDefinition").count(), 0);
    assert!(plain.find("Job", "weft-uninstall").is_some());
    assert!(own.find("Job", "weft-uninstall").is_none());

    assert!(plain.find("PodDisruptionBudget", "weft-control").is_some());
    assert!(small.find("PodDisruptionBudget", "weft-control").is_none());

    let affinity = |rendered: &Rendered| -> Result<Value> {
        let control = rendered.get("Deployment", "weft-control")?;
        Ok(control["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"].clone())
    };
    assert!(affinity(&plain)?["preferredDuringSchedulingIgnoredDuringExecution"].is_array());
    assert!(affinity(&full)?["requiredDuringSchedulingIgnoredDuringExecution"].is_array());

    // Secrets are named by the values.
    let role = serde_json::to_string(own.get("Role", "weft-control")?)?;
    assert!(
        role.contains(r#"["mesh-intermediate"]"#) && !role.contains("weft-ca"),
        "{role}"
    );
    let control = own.get("Deployment", "weft-control")?;
    let arguments = &control["spec"]["template"]["spec"]["containers"][0]["args"];
    assert!(texts(arguments).any(|argument| argument == "--ca-create=false"));
    // The alert on certificates follows their lifetime.
    let rules = serde_json::to_string(own.get("PrometheusRule", "weft")?)?;
    assert!(
        rules.contains("- time() < 900") && !rules.contains("21600"),
        "{rules}"
    );
    Ok(())
}

#[test]
fn images_are_named_by_registry_tag_and_digest() -> Result<()> {
    if !helm_is_here("chart::images_are_named_by_registry_tag_and_digest")? {
        return Ok(());
    }
    let image = |file: Option<&str>, kind: &str, name: &str| -> Result<String> {
        let files: Vec<PathBuf> = file.map(test_values).into_iter().collect();
        let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        let rendered = render(&files, &[])?;
        let pod = &rendered.get(kind, name)?["spec"]["template"]["spec"];
        Ok(pod["containers"][0]["image"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    };
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        image(None, "DaemonSet", "weft-agent")?,
        format!("weft/agent:{version}"),
        "the chart's appVersion is the workspace's version"
    );
    assert_eq!(
        image(Some("production.yaml"), "Deployment", "weft-control")?,
        "registry.example.com/weft/weft/control:v1.2.3"
    );
    assert!(
        image(Some("pinned.yaml"), "DaemonSet", "weft-agent")?
            .starts_with("mirror/weft-agent@sha256:")
    );
    Ok(())
}

#[test]
fn values_that_make_no_sense_are_refused_with_a_reason() -> Result<()> {
    if !helm_is_here("chart::values_that_make_no_sense_are_refused_with_a_reason")? {
        return Ok(());
    }
    for (setting, named) in [
        ("agnet.workers=2", "agnet"),
        ("agent.workers=many", "/agent/workers"),
        ("agent.ports.metrics=99999", "/agent/ports/metrics"),
        ("agent.ports.metrics=15021", "three different ports"),
        ("agent.ports.metrics=15008", "15008 is one of the ports"),
        (
            "agent.drain.upgradeSeconds=1",
            "upgradeSeconds must not be less",
        ),
        (
            "agent.certificateLifetimeSeconds=90000",
            "more than the control plane signs",
        ),
        ("agent.extraArgs={workers}", "/agent/extraArgs/0"),
        (
            "agent.resources.limits.memory=lots",
            "/agent/resources/limits/memory",
        ),
        (
            "agent.security.seccompProfile.type=None",
            "/agent/security/seccompProfile",
        ),
        ("control.replicas=0", "/control/replicas"),
        ("control.ports.metrics=15012", "must be different ports"),
        ("control.antiAffinity=maybe", "/control/antiAffinity"),
        ("hostPaths.runDir=run/weft", "/hostPaths/runDir"),
        ("hostPaths.runDir=/run/../etc", "/hostPaths/runDir"),
        (
            "hostPaths.runDir=/run/weft-$(NODE_NAME)",
            "/hostPaths/runDir",
        ),
        ("hostPaths.netns=/$(NODE_NAME)/netns", "hostPaths.netns"),
        ("ca.secretName=Weft_CA", "/ca/secretName"),
        ("mesh.trustDomain=Not A Domain", "/mesh/trustDomain"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        (
            "monitoring.podMonitor.interval=often",
            "/monitoring/podMonitor/interval",
        ),
    ] {
        let error = render(&[], &[setting])
            .err()
            .with_context(|| format!("{setting} was accepted"))?
            .to_string();
        assert!(error.contains(named), "{setting}: {error}");
    }
    let hard = render(&[], &["control.antiAffinity=hard", "control.replicas=1"]);
    let error = hard.err().context("one replica on two nodes")?.to_string();
    assert!(error.contains("less than 2 replicas"), "{error}");
    Ok(())
}
