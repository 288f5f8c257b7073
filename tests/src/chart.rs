//! The Helm chart: rendering it, and looking things up in what comes out.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize as _;
use serde_json::Value;

use crate::programs;

/// Namespace that the chart is rendered for.
pub const NAMESPACE: &str = "weft-system";

/// The chart's folder.
#[must_use]
pub fn folder() -> PathBuf {
    repository().join("charts/weft")
}

/// The root of the repository.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate is a folder of the repository")
}

/// Whether helm is here; a test that needs it notes a skip otherwise.
#[must_use]
pub fn has_helm() -> bool {
    programs::tool("helm").is_some()
}

/// Runs helm.
///
/// # Errors
/// It is not installed or cannot be started; its own failure is in the output.
pub fn helm(arguments: &[&str]) -> Result<Output> {
    let program = programs::tool("helm").context("helm is missing (cargo xtask setup)")?;
    Command::new(program)
        .args(arguments)
        .env_remove("KUBECONFIG")
        .output()
        .context("cannot run helm")
}

/// Renders the chart with files of values and single settings.
///
/// # Errors
/// What helm said.
pub fn render(values: &[&Path], settings: &[&str]) -> Result<Rendered> {
    let chart = folder().display().to_string();
    let mut arguments = vec!["template", "weft", &chart, "--namespace", NAMESPACE];
    let files: Vec<String> = values
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    for file in &files {
        arguments.extend(["--values", file]);
    }
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    let output = helm(&arguments)?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Rendered::parse(&String::from_utf8_lossy(&output.stdout))
}

/// Objects that came out.
#[derive(Debug)]
pub struct Rendered {
    /// In the order of the text.
    pub objects: Vec<Value>,
}

impl Rendered {
    /// Reads a stream of YAML documents.
    ///
    /// # Errors
    /// A document is no YAML.
    pub fn parse(text: &str) -> Result<Self> {
        let mut objects = Vec::new();
        for document in serde_norway::Deserializer::from_str(text) {
            let object = Value::deserialize(document).context("the chart renders no YAML")?;
            if !object.is_null() {
                objects.push(object);
            }
        }
        Ok(Self { objects })
    }

    /// The object of this kind and name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, kind: &str, name: &str) -> Result<&Value> {
        self.find(kind, name)
            .with_context(|| format!("the chart renders no {kind} {name}"))
    }

    /// The object of this kind and name, if there is one.
    #[must_use]
    pub fn find(&self, kind: &str, name: &str) -> Option<&Value> {
        self.objects
            .iter()
            .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
    }

    /// All objects of a kind.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects
            .iter()
            .filter(move |object| object["kind"] == kind)
    }

    /// The pod specification of every object that makes pods, with the object's kind and name.
    pub fn pods(&self) -> impl Iterator<Item = (String, &Value)> {
        self.objects.iter().filter_map(|object| {
            let template = match object["kind"].as_str()? {
                "Pod" => object,
                "DaemonSet" | "Deployment" | "Job" => &object["spec"]["template"],
                _ => return None,
            };
            Some((describe(object), template))
        })
    }
}

/// `Kind/name`.
#[must_use]
pub fn describe(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!(
        "{}/{}",
        text(&object["kind"]),
        text(&object["metadata"]["name"])
    )
}

/// Every container of a pod, those that run before the others included.
pub fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"]
        .into_iter()
        .filter_map(|list| pod["spec"][list].as_array())
        .flatten()
}

/// The texts of a list; empty if it is none.
pub fn texts(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}
