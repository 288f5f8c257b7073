//! The servers of the control plane: what they are started with.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    Local,
    network::{API_ADDRESS, CONTROL},
    pki::Authority,
};

/// Addresses of Services; the first is the API server's.
const SERVICE_RANGE: &str = "10.96.0.0/16";
const API_SERVICE: &str = "10.96.0.1";

/// A process of the cluster.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub name: String,
    /// Namespace that it runs in.
    pub place: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

/// Certificates and access of the control plane.
pub(super) fn prepare(local: &Local, authority: &Authority) -> Result<()> {
    let mut names: Vec<String> = [API_ADDRESS, API_SERVICE, "127.0.0.1"]
        .map(|address| format!("IP:{address}"))
        .into();
    names.extend(
        [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ]
        .map(|name| format!("DNS:{name}")),
    );
    authority.issue("apiserver", "/CN=kube-apiserver", &names)?;
    for (name, subject) in [
        ("admin", "/O=system:masters/CN=admin"),
        ("controllers", "/CN=system:kube-controller-manager"),
        ("scheduler", "/CN=system:kube-scheduler"),
        ("proxy", "/CN=system:kube-proxy"),
    ] {
        authority.client(name, subject, &local.directory.join(format!("{name}.conf")))?;
    }
    Ok(())
}

/// What has to serve before anything else.
pub(super) fn first(local: &Local) -> Vec<Server> {
    let pki = |file: &str| local.directory.join("pki").join(file).display().to_string();
    let data = local.directory.join("etcd").display().to_string();
    let api = [
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--bind-address={API_ADDRESS}"),
        format!("--advertise-address={API_ADDRESS}"),
        "--secure-port=6443".to_owned(),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("admin.crt")),
        format!("--kubelet-client-key={}", pki("admin.key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", pki("accounts.key")),
        format!("--service-account-signing-key-file={}", pki("accounts.key")),
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
    ];
    vec![
        server(local, "etcd", vec![data]),
        server(local, "apiserver", api.into()),
    ]
}

/// What needs the API server.
pub(super) fn second(local: &Local) -> Vec<Server> {
    let pki = |file: &str| local.directory.join("pki").join(file).display().to_string();
    let config = |name: &str| {
        format!(
            "--kubeconfig={}",
            local.directory.join(format!("{name}.conf")).display()
        )
    };
    let common = [
        "--leader-elect=false".to_owned(),
        "--bind-address=127.0.0.1".to_owned(),
    ];
    let mut controllers = vec![
        config("controllers"),
        "--use-service-account-credentials=true".to_owned(),
        format!("--service-account-private-key-file={}", pki("accounts.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
    ];
    controllers.extend(common.clone());
    let mut scheduler = vec![config("scheduler")];
    scheduler.extend(common);
    vec![
        server(local, "controllers", controllers),
        server(local, "scheduler", scheduler),
    ]
}

/// A server of the control plane.
fn server(local: &Local, role: &str, arguments: Vec<String>) -> Server {
    of_place(local, role, role.to_owned(), CONTROL, arguments)
}

/// One of the servers in the common binary, wherever it runs.
pub(super) fn of_place(
    local: &Local,
    role: &str,
    name: String,
    place: &str,
    arguments: Vec<String>,
) -> Server {
    Server {
        name,
        place: place.to_owned(),
        program: local.programs.join("servers"),
        arguments: std::iter::once(role.to_owned()).chain(arguments).collect(),
    }
}
