//! Options that name another mesh and the script for it (the contract is in docs/bench.md).

use std::{fs, path::PathBuf, str::FromStr};

use super::figures::{DIRECT, WEFT, WEFT_H2, WEFT_NATIVE};

/// `NAME=SCRIPT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerOption {
    /// Name of the variant.
    pub name: String,
    /// The script.
    pub script: PathBuf,
}

impl FromStr for PeerOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, script) = text.split_once('=').ok_or("not of the form NAME=SCRIPT")?;
        let plain = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !plain || [DIRECT, WEFT, WEFT_NATIVE, WEFT_H2].contains(&name) {
            return Err(format!(
                "{name:?} cannot be a variant's name: use letters, digits, dashes, and none of ours"
            ));
        }
        let script = fs::canonicalize(script).map_err(|error| format!("{script}: {error}"))?;
        Ok(Self {
            name: name.to_owned(),
            script,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_needs_a_name_of_its_own_and_a_script_that_exists() {
        let peer: PeerOption = "other-1=/bin/true".parse().expect("fine");
        assert_eq!(peer.name, "other-1");
        for bad in [
            "/bin/true",
            "=/bin/true",
            "weft=/bin/true",
            "direct=/bin/true",
            "a b=/bin/true",
            "x=/nowhere",
        ] {
            assert!(bad.parse::<PeerOption>().is_err(), "{bad}");
        }
    }
}
