//! A node of a local cluster: containerd, kubelet and kube-proxy with their files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    BOX_IMAGE, Local,
    network::{node_address, pod_range},
    pki::Authority,
    servers::{Server, of_place},
};
use crate::programs;

/// Where Debian puts the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Plugins that a node has: copied, so that each node has a folder of its own to install others into.
const NODE_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
/// Address of DNS, as in `tests/cluster/dns.yaml`.
const DNS_ADDRESS: &str = "10.96.0.10";

/// The folders and files of a node.
#[derive(Debug)]
pub(super) struct NodePaths {
    name: String,
    folder: PathBuf,
}

impl NodePaths {
    pub(super) fn new(local: &Local, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            folder: local.directory.join(name),
        }
    }

    pub(super) fn containerd_socket(&self) -> PathBuf {
        self.folder.join("containerd.sock")
    }

    /// As text, for configurations.
    fn at(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }
}

/// Writes a node's files and says which servers it has.
pub(super) fn prepare(
    local: &Local,
    authority: &Authority,
    name: &str,
    number: u8,
) -> Result<Vec<Server>> {
    let paths = NodePaths::new(local, name);
    for folder in ["cni", "cni-bin", "kubelet"] {
        let folder = paths.folder.join(folder);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    for plugin in NODE_PLUGINS {
        let source = Path::new(PLUGINS).join(plugin);
        fs::copy(&source, paths.folder.join("cni-bin").join(plugin)).with_context(|| {
            format!(
                "cannot copy {} (Debian package containernetworking-plugins)",
                source.display()
            )
        })?;
    }
    let certificate = format!("kubelet-{name}");
    let names = [
        format!("DNS:{name}"),
        format!("IP:{}", node_address(number)),
    ];
    authority.issue(
        &certificate,
        &format!("/O=system:nodes/CN=system:node:{name}"),
        &names,
    )?;
    authority.write_config(&certificate, Path::new(&paths.at("kubelet.conf")))?;
    write(&paths.at("cni/10-bridge.conflist"), &cni(&paths, number))?;
    write(
        &paths.at("kubelet.json"),
        &kubelet(local, &paths, &certificate),
    )?;
    write(&paths.at("proxy.json"), &proxy(local, name))?;
    let containerd = paths.at("containerd.toml");
    fs::write(&containerd, containerd_config(&paths))
        .with_context(|| format!("cannot write {containerd}"))?;
    Ok(servers(local, &paths, number))
}

/// The servers of a node, in the order of their start.
pub(super) fn servers(local: &Local, paths: &NodePaths, number: u8) -> Vec<Server> {
    let node = &paths.name;
    let containerd = Server {
        name: format!("containerd-{node}"),
        place: node.clone(),
        program: programs::installed("containerd").unwrap_or_else(|| "containerd".into()),
        arguments: vec!["--config".into(), paths.at("containerd.toml")],
    };
    let kubelet = vec![
        format!("--config={}", paths.at("kubelet.json")),
        format!("--kubeconfig={}", paths.at("kubelet.conf")),
        format!("--root-dir={}", paths.at("kubelet")),
        format!("--hostname-override={node}"),
        format!("--node-ip={}", node_address(number)),
    ];
    let proxy = vec![format!("--config={}", paths.at("proxy.json"))];
    vec![
        containerd,
        of_place(local, "kubelet", format!("kubelet-{node}"), node, kubelet),
        of_place(local, "proxy", format!("proxy-{node}"), node, proxy),
    ]
}

fn write(path: &str, value: &Value) -> Result<()> {
    fs::write(path, value.to_string()).with_context(|| format!("cannot write {path}"))
}

fn cni(paths: &NodePaths, number: u8) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "dataDir": paths.at("addresses"),
                    "ranges": [[{"subnet": pod_range(number)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// Without `netns_mounts_under_state_dir` the namespaces of all nodes' pods would lie in one folder. The score of the killer
/// may not be lowered, nor cgroups of version 1 be refused, on machines whose root is not allowed to.
fn containerd_config(paths: &NodePaths) -> String {
    format!(
        r#"version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{BOX_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{networks}"
"#,
        root = paths.at("containerd"),
        state = paths.at("containerd-state"),
        socket = paths.at("containerd.sock"),
        plugins = paths.at("cni-bin"),
        networks = paths.at("cni"),
    )
}

fn kubelet(local: &Local, paths: &NodePaths, certificate: &str) -> Value {
    let pki = |file: &str| local.directory.join("pki").join(file).display().to_string();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki(&format!("{certificate}.crt")),
        "tlsPrivateKeyFile": pki(&format!("{certificate}.key")),
        "containerRuntimeEndpoint": format!("unix://{}", paths.at("containerd.sock")),
        "cgroupDriver": "cgroupfs",
        // The nodes share one cgroup tree, so none may own it.
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "podLogsDir": paths.at("logs"),
        "maxPods": 250,
        "registryPullQPS": 0,
        // The disk belongs to the developer, who may have filled it.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1%"},
    })
}

/// No setting of conntrack, because those belong to the machine.
fn proxy(local: &Local, name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": local.directory.join("proxy.conf").display().to_string()},
        "hostnameOverride": name,
        "mode": "iptables",
        "clusterCIDR": "10.42.0.0/16",
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
}
