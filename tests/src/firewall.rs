//! Rules of a pod's or a node's own packet filter, to break a path on purpose.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};

use crate::{
    conversation::LIMIT,
    lab::{Lab, Place},
    process::Program,
    programs,
};

/// Packets that are discarded until [`Drops::lift`], or until the lab goes.
#[derive(Debug)]
pub struct Drops {
    table: String,
}

impl Drops {
    /// Discards what one of `matches` (nft's language) matches, wherever it passes: to, from or through the place.
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn install(lab: &Lab, place: &impl Place, matches: &[String]) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let table = format!("drops{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut rules = format!("table inet {table} {{\n");
        for hook in ["input", "output", "forward"] {
            rules.push_str(&format!(
                "chain {hook} {{ type filter hook {hook} priority -300;\n"
            ));
            for text in matches {
                rules.push_str(&format!("{text} drop\n"));
            }
            rules.push_str("}\n");
        }
        rules.push_str("}\n");
        let file = lab.directory().join(format!("{table}.nft"));
        fs::write(&file, rules).with_context(|| format!("cannot write {}", file.display()))?;
        nft(lab, place, &["-f", &file.to_string_lossy()])?;
        Ok(Self { table })
    }

    /// Lets everything pass again.
    ///
    /// # Errors
    /// nft refuses.
    pub fn lift(self, lab: &Lab, place: &impl Place) -> Result<()> {
        nft(lab, place, &["delete", "table", "inet", &self.table]).map(drop)
    }
}

/// Runs nft in a place and returns what it prints.
///
/// # Errors
/// It is missing, or fails.
pub fn nft(lab: &Lab, place: &impl Place, arguments: &[&str]) -> Result<String> {
    let nft = programs::installed("nft").context("nft is missing (Debian package nftables)")?;
    lab.run(place, &Program::new(nft).args(arguments), LIMIT)?
        .ok()
}
