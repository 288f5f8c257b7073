//! Programs that cargo installs.

use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Need, Requirement};
use crate::shell::{cargo, output, run, say};

/// A program from crates.io.
#[derive(Debug, Clone, Copy)]
struct Tool {
    need: Need,
    name: &'static str,
    /// Exact version where a later one would not do.
    version: Option<&'static str>,
    why: &'static str,
}

/// bpf-linker 0.10 loads the LLVM inside rustup's toolchain; 0.11 and later want a system LLVM.
const TOOLS: [Tool; 2] = [
    Tool {
        need: Need::Build,
        name: "bpf-linker",
        version: Some("0.10.3"),
        why: "links the eBPF programs",
    },
    Tool {
        need: Need::Check,
        name: "cargo-deny",
        version: None,
        why: "checks licences, bans and advisories",
    },
];

impl Requirement for Tool {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn why(&self) -> String {
        self.why.to_owned()
    }

    fn found(&self) -> Option<String> {
        output(Command::new(self.name).arg("--version"))
    }

    fn remedy(&self) -> String {
        format!("cargo {}", self.arguments().join(" "))
    }
}

impl Tool {
    fn arguments(&self) -> Vec<String> {
        let version = self
            .version
            .map_or(String::new(), |version| format!("@{version}"));
        vec![
            "install".to_owned(),
            "--locked".to_owned(),
            format!("{}{version}", self.name),
        ]
    }
}

/// The tools of these needs.
pub fn all(needs: &[Need]) -> impl Iterator<Item = Box<dyn Requirement>> {
    TOOLS
        .into_iter()
        .filter(move |tool| needs.contains(&tool.need))
        .map(|tool| Box::new(tool) as Box<dyn Requirement>)
}

/// Installs the tools of these needs that are missing.
pub fn ensure(needs: &[Need]) -> Result<()> {
    for tool in TOOLS.iter().filter(|tool| needs.contains(&tool.need)) {
        if tool.found().is_some() {
            continue;
        }
        say(&format!(
            "installing {} ({}): it is compiled, which takes minutes on a small machine",
            tool.name, tool.why
        ));
        run(cargo().args(tool.arguments()))
            .with_context(|| format!("cannot install {}", tool.name))?;
    }
    Ok(())
}
