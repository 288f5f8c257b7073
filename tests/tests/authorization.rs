//! Authorization as pods feel it: who reaches whom under which policy, and that a refused connection costs the
//! application nothing, not even a SYN.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    conversation::{AppSyns, LIMIT, Server, client, reaches, report},
    lab::{Families, Lab, LabSpec, PodSpec},
    manifests::{self, policy},
    mesh::{Mesh, MeshSpec},
    wait,
};
use serde_json::{Value, json};

const PORT: u16 = 7000;
const OTHER_PORT: u16 = 7001;
const ROOT: &str = "weft-system";
/// Rounds of the race between a policy and the workload it protects; each takes about a second.
const RACE_ROUNDS: usize = 5;
/// New connections per second of the refused client during a round, and for how many seconds.
const STORM: (u64, u64) = (100, 2);

/// One state of the mesh and who then reaches `api`.
struct Case {
    name: &'static str,
    objects: Vec<Value>,
    /// Keys that agents then have, generated ones included.
    policies: &'static [&'static str],
    /// Client, port, whether it is served.
    expected: &'static [(&'static str, u16, bool)],
}

fn authorization(name: &str, action: &str, rules: Value) -> Value {
    policy(
        "AuthorizationPolicy",
        "shop",
        name,
        json!({ "selector": { "matchLabels": { "app": "api" } }, "action": action, "rules": rules }),
    )
}

fn mtls(namespace: &str, spec: Value) -> Value {
    policy("MeshPolicy", namespace, "mtls", spec)
}

fn everybody(name: &'static str, objects: Vec<Value>, policies: &'static [&'static str]) -> Case {
    let expected = &[
        ("web", PORT, true),
        ("cart", PORT, true),
        ("bot", PORT, true),
        ("plain", PORT, true),
    ];
    Case {
        name,
        objects,
        policies,
        expected,
    }
}

fn allow_and_deny(web: IpAddr, plain: IpAddr) -> Vec<Case> {
    const ONLY_WEB: &[(&str, u16, bool)] = &[
        ("web", PORT, true),
        ("cart", PORT, false),
        ("bot", PORT, false),
        ("plain", PORT, false),
    ];
    let from = |source: Value| json!([{ "from": [source] }]);
    vec![
        everybody("nothing is forbidden without policies", vec![], &[]),
        Case {
            name: "allow a principal",
            objects: vec![authorization(
                "principal",
                "ALLOW",
                from(json!({ "principals": ["cluster.local/ns/shop/sa/web"] })),
            )],
            policies: &["shop/principal"],
            expected: ONLY_WEB,
        },
        Case {
            name: "allow a namespace",
            objects: vec![authorization(
                "namespace",
                "ALLOW",
                from(json!({ "namespaces": ["shop"] })),
            )],
            policies: &["shop/namespace"],
            expected: &[
                ("web", PORT, true),
                ("cart", PORT, true),
                ("bot", PORT, false),
                ("plain", PORT, false),
            ],
        },
        Case {
            name: "allow a service account",
            objects: vec![authorization(
                "account",
                "ALLOW",
                from(json!({ "serviceAccounts": ["crawl/bot"] })),
            )],
            policies: &["shop/account"],
            expected: &[("web", PORT, false), ("bot", PORT, true)],
        },
        Case {
            name: "allow an address block, for peers with and without identity",
            objects: vec![authorization(
                "block",
                "ALLOW",
                from(json!({ "ipBlocks": [format!("{web}/32"), plain.to_string()] })),
            )],
            policies: &["shop/block"],
            expected: &[
                ("web", PORT, true),
                ("cart", PORT, false),
                ("bot", PORT, false),
                ("plain", PORT, true),
            ],
        },
        by_port(),
        Case {
            name: "DENY goes before ALLOW",
            objects: vec![
                authorization(
                    "allow",
                    "ALLOW",
                    from(json!({ "namespaces": ["shop", "crawl"] })),
                ),
                authorization(
                    "deny",
                    "DENY",
                    from(json!({ "serviceAccounts": ["shop/cart"] })),
                ),
            ],
            policies: &["shop/allow", "shop/deny"],
            expected: &[
                ("web", PORT, true),
                ("cart", PORT, false),
                ("bot", PORT, true),
                ("plain", PORT, false),
            ],
        },
        everybody(
            "AUDIT forbids nothing",
            vec![authorization(
                "audit",
                "AUDIT",
                from(json!({ "namespaces": ["shop"] })),
            )],
            &["shop/audit"],
        ),
    ]
}

fn by_port() -> Case {
    Case {
        name: "allow a port",
        objects: vec![authorization(
            "port",
            "ALLOW",
            json!([{ "to": [{ "ports": [PORT] }] }]),
        )],
        policies: &["shop/port"],
        expected: &[
            ("web", PORT, true),
            ("web", OTHER_PORT, false),
            ("plain", PORT, true),
            ("plain", OTHER_PORT, false),
        ],
    }
}

fn plaintext() -> Vec<Case> {
    const STRICT: &[(&str, u16, bool)] = &[
        ("web", PORT, true),
        ("plain", PORT, false),
        ("web", OTHER_PORT, true),
        ("plain", OTHER_PORT, false),
    ];
    const STRICT_PORT: &[(&str, u16, bool)] = &[
        ("web", PORT, true),
        ("plain", PORT, false),
        ("plain", OTHER_PORT, true),
    ];
    let selector = json!({ "matchLabels": { "app": "api" } });
    let strict = json!({ "mode": "STRICT" });
    vec![
        Case {
            name: "strict for the mesh",
            objects: vec![mtls(ROOT, json!({ "mtls": strict }))],
            policies: &["weft-system/weft_strict"],
            expected: STRICT,
        },
        Case {
            name: "strict for the namespace",
            objects: vec![mtls("shop", json!({ "mtls": strict }))],
            policies: &["weft-system/weft_strict"],
            expected: STRICT,
        },
        Case {
            name: "strict for the workload",
            objects: vec![mtls(
                "shop",
                json!({ "selector": selector, "mtls": strict }),
            )],
            policies: &["weft-system/weft_strict"],
            expected: STRICT,
        },
        everybody(
            "strict for another workload",
            vec![mtls(
                "shop",
                json!({ "selector": { "matchLabels": { "app": "web" } }, "mtls": strict }),
            )],
            &["weft-system/weft_strict"],
        ),
        Case {
            name: "strict for a port",
            objects: vec![mtls(
                "shop",
                json!({ "mtls": { "mode": "PERMISSIVE", "ports": { "7000": "STRICT" } } }),
            )],
            policies: &["weft-system/weft_strict_only_7000"],
            expected: STRICT_PORT,
        },
        Case {
            name: "permissive for a port",
            objects: vec![mtls(
                "shop",
                json!({ "mtls": { "mode": "STRICT", "ports": { "7001": "PERMISSIVE" } } }),
            )],
            policies: &["weft-system/weft_strict_except_7001"],
            expected: STRICT_PORT,
        },
        everybody("permissive again", vec![], &[]),
    ]
}

/// Clients of three identities and one without on the first node, `api` on the second.
fn shop() -> Result<Lab> {
    Lab::build(
        LabSpec::new(Families::V4)
            .node(
                "n1",
                [
                    PodSpec::new("web").namespace("shop"),
                    PodSpec::new("cart").namespace("shop"),
                    PodSpec::new("bot").namespace("crawl"),
                    PodSpec::new("plain").unmeshed(),
                ],
            )
            .node("n2", [PodSpec::new("api").namespace("shop")]),
    )
}

/// Every connection that the application got, by the address of its client.
fn served_from(servers: &[&Server], client: IpAddr) -> Result<u64> {
    let mut count = 0;
    for server in servers {
        count += server
            .served()?
            .iter()
            .filter(|served| served.peer.ip() == client)
            .count() as u64;
    }
    Ok(count)
}

#[test]
fn policies_decide_who_reaches_the_application_and_a_refusal_never_gets_to_it() -> Result<()> {
    let lab = shop()?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let api = lab.pod("api")?;
    let servers = [
        Server::start(&lab, api, PORT)?,
        Server::start(&lab, api, OTHER_PORT)?,
    ];
    let sources: Vec<IpAddr> = ["web", "cart", "bot", "plain"]
        .iter()
        .map(|name| Ok(lab.pod(name)?.address()))
        .collect::<Result<_>>()?;
    let syns = AppSyns::install(&lab, api, &sources)?;

    let mut cases = allow_and_deny(sources[0], sources[3]);
    cases.extend(plaintext());
    let mut allowed = vec![0_u64; sources.len()];
    for case in cases {
        mesh.manifests.write("policies", &case.objects)?;
        mesh.wait_policies(&lab, case.policies)
            .with_context(|| format!("case: {}", case.name))?;
        for (client, port, served) in case.expected {
            let pod = lab.pod(client)?;
            let reached = reaches(&lab, pod, api.at(*port))
                .with_context(|| format!("case: {}, {client} to {port}", case.name))?;
            ensure!(
                reached == *served,
                "{}: {client} to port {port}: served is {reached}\n{}",
                case.name,
                mesh.log_of(&lab.nodes()[1])
            );
            let place = sources.iter().position(|source| *source == pod.address());
            allowed[place.context("a client of the table")?] += u64::from(reached);
        }
    }
    for (source, allowed) in sources.iter().zip(&allowed) {
        wait::until(&format!("the server's log of {source}"), LIMIT, || {
            Ok((served_from(&[&servers[0], &servers[1]], *source)? >= *allowed).then_some(()))
        })?;
        let served = served_from(&[&servers[0], &servers[1]], *source)?;
        ensure!(
            served == *allowed,
            "{source} was served {served} times, allowed {allowed}"
        );
        let dialled = syns.count(&lab, api, *source)?;
        ensure!(
            dialled == *allowed,
            "{source}: {dialled} SYNs at the application, allowed {allowed}"
        );
    }
    audits_are_counted(&lab, &mesh)
}

/// The audit case above let `web` and `cart` in, once each; `bot` and `plain` did not match.
fn audits_are_counted(lab: &Lab, mesh: &Mesh) -> Result<()> {
    let metrics = mesh.metrics(lab.node("n2")?)?;
    let audited = metrics.sum("weft_policy_audit_total", &[("policy", "shop/audit")]);
    ensure!(audited == 2.0, "the audit policy counted {audited}");
    ensure!(
        metrics.sum("weft_policy_denied_total", &[("direction", "inbound")]) > 0.0,
        "denials are not counted"
    );
    Ok(())
}

/// The denied client dials all the time while its target appears together with, or just after, the policy that
/// forbids it: whatever arrives first at the agent, the application must not hear of it.
#[test]
fn a_refused_client_never_gets_through_while_policy_is_being_delivered() -> Result<()> {
    let lab = shop()?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    let (api, bot, node) = (lab.pod("api")?, lab.pod("bot")?, lab.node("n2")?);
    let server = Server::start(&lab, api, PORT)?;
    let sources = [bot.address(), lab.pod("web")?.address()];
    let syns = AppSyns::install(&lab, api, &sources)?;
    // An ALLOW policy: while one agent does not know `api` yet, `bot` comes without identity, which a DENY policy that
    // names an identity does not match (only STRICT refuses plaintext as such).
    let only_web = authorization(
        "only-web",
        "ALLOW",
        json!([{ "from": [{ "serviceAccounts": ["web"] }] }]),
    );
    let pod = manifests::pod(node, api, true);
    for round in 0..RACE_ROUNDS {
        mesh.delete_pod(api)?;
        mesh.manifests.write("policies", &[])?;
        mesh.wait_policies(&lab, &[])?;
        wait_known(&lab, &mesh, "api", false)?;
        let storm = client(api.at(PORT))?.args([
            "--rate",
            &STORM.0.to_string(),
            "--seconds",
            &STORM.1.to_string(),
        ]);
        let storm = lab.spawn(bot, &storm)?;
        match round % 3 {
            // The policy first, as two changes that may be delivered as one.
            0 => {
                mesh.manifests
                    .write("policies", std::slice::from_ref(&only_web))?;
                mesh.write_pod(node, api, true)?;
            }
            // In one change, the pod first.
            1 => mesh
                .manifests
                .write("pod-shop-api", &[pod.clone(), only_web.clone()])?,
            // In one change, the policy first.
            _ => mesh
                .manifests
                .write("pod-shop-api", &[only_web.clone(), pod.clone()])?,
        }
        mesh.wait_policies(&lab, &["shop/only-web"])?;
        wait_known(&lab, &mesh, "api", true)?;
        let storm = report(storm)?;
        ensure!(
            storm.complete == 0 && storm.records == 0,
            "round {round}: {storm:?}"
        );
        ensure!(
            storm.connections == STORM.0 * STORM.1,
            "round {round}: {storm:?}"
        );
        // The negative control: the way is open, for others.
        ensure!(
            reaches(&lab, lab.pod("web")?, api.at(PORT))?,
            "round {round}: web"
        );
    }
    ensure!(
        served_from(&[&server], bot.address())? == 0,
        "bot was served"
    );
    let (of_bot, of_web) = (
        syns.count(&lab, api, sources[0])?,
        syns.count(&lab, api, sources[1])?,
    );
    ensure!(
        of_bot == 0,
        "{of_bot} SYNs of the refused client reached the application"
    );
    ensure!(
        of_web == RACE_ROUNDS as u64,
        "{of_web} SYNs of the allowed client were counted"
    );
    Ok(())
}

#[test]
fn a_workload_that_the_control_plane_does_not_know_is_refused_both_ways() -> Result<()> {
    let mut lab = shop()?;
    let mesh = Mesh::start(&lab, MeshSpec::default())?;
    lab.add_pod("n2", PodSpec::new("ghost").namespace("shop"))?;
    let (ghost, node) = (lab.pod("ghost")?, lab.node("n2")?);
    let hidden = Server::start(&lab, ghost, PORT)?;
    let server = Server::start(&lab, lab.pod("api")?, PORT)?;
    mesh.enroll(&lab, node, ghost)?;
    for client in ["web", "plain"] {
        ensure!(
            !reaches(&lab, lab.pod(client)?, hidden.address)?,
            "{client} reached the unknown"
        );
    }
    ensure!(
        !reaches(&lab, ghost, server.address)?,
        "the unknown reached api"
    );
    ensure!(hidden.served()?.is_empty(), "the unknown was served");
    // Negative control: once it is known, it is served.
    mesh.write_pod(node, ghost, true)?;
    mesh.wait_enrolled(&lab, node, ghost)?;
    wait_known(&lab, &mesh, "ghost", true)?;
    ensure!(
        reaches(&lab, lab.pod("web")?, hidden.address)?,
        "web does not reach the known"
    );
    ensure!(
        reaches(&lab, ghost, server.address)?,
        "the known does not reach api"
    );
    Ok(())
}

/// Waits until all agents know a pod of namespace `shop`, or until none does.
fn wait_known(lab: &Lab, mesh: &Mesh, pod: &str, known: bool) -> Result<()> {
    for node in lab.nodes() {
        let what = format!("{pod} to be known on {}: {known}", node.name);
        wait::until(&what, LIMIT, || {
            let dump: Value =
                serde_json::from_str(&mesh.weft(lab, node, &["-o", "json", "dump"])?.ok()?)?;
            let workloads = dump["mesh"]["workloads"]["items"]
                .as_array()
                .context("a dump has workloads")?;
            let found = workloads
                .iter()
                .any(|workload| workload["name"] == pod && workload["namespace"] == "shop");
            Ok((found == known).then_some(()))
        })?;
    }
    Ok(())
}
