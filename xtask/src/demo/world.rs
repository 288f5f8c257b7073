//! The demo's stage: two nodes, six pods, Debian's programs in them, and the mesh around.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use mesh_tests::{
    lab::{Families, Lab, LabSpec, Pod, PodSpec},
    manifests::{self, ServicePort},
    mesh::MeshSpec,
    process::{Program, Running},
    programs,
};
use serde_json::json;

/// How long a server may take to start.
pub const START_LIMIT: Duration = Duration::from_secs(20);

/// Kubernetes namespace of everything.
pub const NAMESPACE: &str = "shop";

/// Port of the nginx servers.
pub const WEB_PORT: u16 = 8080;

/// Port of redis, in the pod and of the service.
pub const CACHE_PORT: u16 = 6379;

/// Port of the iperf3 server.
pub const BULK_PORT: u16 = 5201;

/// Port of the web service.
pub const SERVICE_PORT: u16 = 80;

/// Addresses of the services; nothing routes them, only the mesh knows them.
const WEB_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);
const CACHE_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 20);

/// The stage.
pub struct World {
    /// Nodes and pods.
    pub lab: Lab,
    /// nginx by pod.
    pub web: Vec<(String, Running)>,
    /// Other servers: they run as long as this lives.
    pub others: Vec<Running>,
}

/// `web` as a service, IPv4.
pub fn web_service() -> SocketAddr {
    (WEB_V4, SERVICE_PORT).into()
}

/// `web` as a service, IPv6.
pub fn web_service_v6() -> SocketAddr {
    (WEB_V6, SERVICE_PORT).into()
}

/// `cache` as a service.
pub fn cache_service() -> SocketAddr {
    (CACHE_V4, CACHE_PORT).into()
}

impl World {
    /// Builds the lab: the client and one of two web servers on the first node, the rest on the second.
    pub fn build(keep: bool) -> Result<Self> {
        let pod = |name: &str| PodSpec::new(name).namespace(NAMESPACE);
        let web = |name: &str| pod(name).account("web").label("app", "web");
        let spec = LabSpec::new(Families::Dual)
            .node("n1", [pod("client"), web("web-1"), pod("intruder")])
            .node("n2", [web("web-2"), pod("cache"), pod("bulk")]);
        let lab = Lab::build(if keep { spec.outliving() } else { spec })?;
        Ok(Self {
            lab,
            web: Vec::new(),
            others: Vec::new(),
        })
    }

    /// Starts nginx, redis and iperf3 as Debian ships them.
    pub fn start_servers(&mut self) -> Result<()> {
        for name in ["web-1", "web-2"] {
            let nginx = self.start_nginx(name)?;
            self.web.push((name.to_owned(), nginx));
        }
        let cache = self.lab.pod("cache")?;
        let redis = Program::new(installed("redis-server")?)
            .args([
                "--port",
                &CACHE_PORT.to_string(),
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .args(["--bind", "*", "-::*", "--dir"])
            .arg(self.folder("cache")?);
        self.others.push(
            self.lab
                .serve(cache, &redis, cache.at(CACHE_PORT), START_LIMIT)?,
        );
        let iperf3 = Program::new(installed("iperf3")?).args([
            "-s",
            "--forceflush",
            "-p",
            &BULK_PORT.to_string(),
        ]);
        let mut iperf3 = self.lab.spawn(self.lab.pod("bulk")?, &iperf3)?;
        iperf3.wait_for_output("Server listening", START_LIMIT)?;
        self.others.push(iperf3);
        Ok(())
    }

    /// Starts nginx in a pod; it answers every request with its name and the address that it sees.
    pub fn start_nginx(&self, pod: &str) -> Result<Running> {
        let folder = self.folder(pod)?;
        let place = folder.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("  {kind}_temp_path {place}/{kind};\n"))
            .concat();
        let configuration = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid {place}/nginx.pid;\nerror_log {place}/error.log;\n\
             events {{ worker_connections 1024; }}\nhttp {{\n  access_log {place}/access.log;\n{temporary}  \
             keepalive_requests 1000000;\n  server {{\n    listen {WEB_PORT};\n    listen [::]:{WEB_PORT};\n    \
             location / {{\n      default_type text/plain;\n      return 200 \"{pod} answers $remote_addr\\n\";\n    }}\n  \
             }}\n}}\n"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, configuration).context("cannot write nginx's configuration")?;
        let log = folder.join("error.log");
        let nginx = Program::new(installed("nginx")?)
            .arg("-p")
            .arg(&folder)
            .arg("-e")
            .arg(&log)
            .arg("-c")
            .arg(&file);
        let pod = self.lab.pod(pod)?;
        self.lab.serve(pod, &nginx, pod.at(WEB_PORT), START_LIMIT)
    }

    /// What nginx has logged in a pod.
    pub fn nginx_log(&self, pod: &str) -> Result<String> {
        let file = self.folder(pod)?.join("access.log");
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }

    /// Folder for the files of a pod's programs.
    pub fn folder(&self, pod: &str) -> Result<PathBuf> {
        let folder = self.lab.directory().join(pod);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder)
    }
}

/// The mesh: two services, strict mutual TLS, one identity shut out, the cache open to the client only.
pub fn mesh_spec(lab: &Lab) -> Result<MeshSpec> {
    let identity = |pod: &Pod| {
        format!(
            "cluster.local/ns/{NAMESPACE}/sa/{}",
            pod.spec.service_account
        )
    };
    let (client, intruder) = (identity(lab.pod("client")?), identity(lab.pod("intruder")?));
    let web = [IpAddr::from(WEB_V4), WEB_V6.into()];
    let http = ServicePort {
        name: "tcp-web",
        port: SERVICE_PORT,
        target: WEB_PORT,
    };
    let redis = ServicePort {
        name: "tcp-redis",
        port: CACHE_PORT,
        target: CACHE_PORT,
    };
    let strict = json!({ "mtls": { "mode": "STRICT" } });
    let no_intruder =
        json!({ "action": "DENY", "rules": [{ "from": [{ "principals": [intruder] }] }] });
    let only_client = json!({
        "selector": { "matchLabels": { "app": "cache" } },
        "action": "ALLOW",
        "rules": [{ "from": [{ "principals": [client] }], "to": [{ "ports": [CACHE_PORT] }] }],
    });
    let service = manifests::service;
    Ok(MeshSpec::default()
        .manifest(
            "service-web",
            [service(NAMESPACE, "web", "web", &web, &[http])],
        )
        .manifest(
            "service-cache",
            [service(
                NAMESPACE,
                "cache",
                "cache",
                &[CACHE_V4.into()],
                &[redis],
            )],
        )
        .manifest(
            "policy-strict",
            [manifests::policy("MeshPolicy", NAMESPACE, "strict", strict)],
        )
        .manifest(
            "policy-no-intruder",
            [manifests::policy(
                "AuthorizationPolicy",
                NAMESPACE,
                "no-intruder",
                no_intruder,
            )],
        )
        .manifest(
            "policy-cache",
            [manifests::policy(
                "AuthorizationPolicy",
                NAMESPACE,
                "cache",
                only_client,
            )],
        ))
}

/// A program of the distribution.
pub fn installed(name: &str) -> Result<PathBuf> {
    programs::installed(name)
        .with_context(|| format!("{name} is not installed (cargo xtask setup)"))
}
