//! A cluster by kind, for machines with a container engine.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::checked;

/// A cluster of kind's.
#[derive(Debug)]
pub struct Kind {
    name: String,
    kubeconfig: PathBuf,
}

impl Kind {
    pub(super) fn up(name: &str, nodes: u8) -> Result<Self> {
        let config = Self::file(name, "kind.json");
        let workers = std::iter::repeat_n(json!({"role": "worker"}), usize::from(nodes));
        let all: Vec<Value> = std::iter::once(json!({"role": "control-plane"}))
            .chain(workers)
            .collect();
        let text = json!({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": all});
        std::fs::write(&config, text.to_string())
            .with_context(|| format!("cannot write {}", config.display()))?;
        let kubeconfig = Self::file(name, "kubeconfig");
        kind(&[
            "create",
            "cluster",
            "--name",
            name,
            "--wait",
            "120s",
            "--config",
            &config.display().to_string(),
            "--kubeconfig",
            &kubeconfig.display().to_string(),
        ])?;
        Ok(Self {
            name: name.to_owned(),
            kubeconfig,
        })
    }

    pub(super) fn open(name: &str) -> Result<Option<Self>> {
        let known = kind(&["get", "clusters"])?;
        let kubeconfig = Self::file(name, "kubeconfig");
        let is_known = known.lines().any(|line| line == name) && kubeconfig.is_file();
        Ok(is_known.then(|| Self {
            name: name.to_owned(),
            kubeconfig,
        }))
    }

    pub(super) fn down(name: &str) -> Result<()> {
        kind(&["delete", "cluster", "--name", name])?;
        for file in ["kind.json", "kubeconfig"] {
            // They hold nothing that outlives the cluster.
            drop(std::fs::remove_file(Self::file(name, file)));
        }
        Ok(())
    }

    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    pub(super) fn load_image(&self, archive: &Path) -> Result<()> {
        let archive = archive.display().to_string();
        kind(&["load", "image-archive", "--name", &self.name, &archive]).map(drop)
    }

    fn file(name: &str, file: &str) -> PathBuf {
        std::env::temp_dir().join(format!("{name}.{file}"))
    }
}

fn kind(arguments: &[&str]) -> Result<String> {
    let output = Command::new("kind")
        .args(arguments)
        .output()
        .context("cannot run kind")?;
    checked(output, || format!("kind {}", arguments.join(" ")))
}
