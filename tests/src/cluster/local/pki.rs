//! Certificates of a local cluster, by the openssl of the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{checked, network::API_ADDRESS};

/// Longer than any test cluster lives.
const DAYS: &str = "30";

/// The authority of a cluster, and the folder of everything that it signed.
#[derive(Debug)]
pub(super) struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// Makes the authority and the key that signs tokens of service accounts.
    pub(super) fn make(folder: &Path) -> Result<Self> {
        let authority = Self {
            folder: folder.to_owned(),
        };
        openssl(
            folder,
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-noenc",
                "-days",
                DAYS,
                "-subj",
                "/CN=cluster",
                "-keyout",
                "ca.key",
                "-out",
                "ca.crt",
            ],
        )?;
        openssl(folder, &["genrsa", "-out", "accounts.key", "2048"])?;
        Ok(authority)
    }

    /// Issues `<name>.crt` and `<name>.key` for clients and servers; `names` as in `subjectAltName`.
    pub(super) fn issue(&self, name: &str, subject: &str, names: &[String]) -> Result<()> {
        let (key, request) = (format!("{name}.key"), format!("{name}.csr"));
        let (certificate, extensions) = (format!("{name}.crt"), format!("{name}.ext"));
        openssl(
            &self.folder,
            &[
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-noenc",
                "-subj",
                subject,
                "-keyout",
                &key,
                "-out",
                &request,
            ],
        )?;
        let mut text = "extendedKeyUsage=clientAuth,serverAuth\n".to_owned();
        if !names.is_empty() {
            text += &format!("subjectAltName={}\n", names.join(","));
        }
        fs::write(self.folder.join(&extensions), text)?;
        openssl(
            &self.folder,
            &[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                DAYS,
                "-extfile",
                &extensions,
                "-out",
                &certificate,
            ],
        )
    }

    /// Issues a client's certificate and writes its kubeconfig.
    pub(super) fn client(&self, name: &str, subject: &str, config: &Path) -> Result<()> {
        self.issue(name, subject, &[])?;
        self.write_config(name, config)
    }

    /// Writes a kubeconfig for a certificate that was issued.
    pub(super) fn write_config(&self, name: &str, config: &Path) -> Result<()> {
        let file = |file: String| self.folder.join(file).display().to_string();
        let text: Value = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "local", "cluster": {
                "server": format!("https://{API_ADDRESS}:6443"),
                "certificate-authority": file("ca.crt".into()),
            }}],
            "users": [{"name": name, "user": {
                "client-certificate": file(format!("{name}.crt")),
                "client-key": file(format!("{name}.key")),
            }}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": name}}],
            "current-context": "local",
        });
        fs::write(config, text.to_string())
            .with_context(|| format!("cannot write {}", config.display()))
    }
}

fn openssl(folder: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .context("cannot run openssl (Debian package openssl)")?;
    checked(output, || format!("openssl {}", arguments.join(" "))).map(drop)
}
