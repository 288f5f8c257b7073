//! Sets of trusted roots, PEM.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::files::certificates;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// The certificates of all `texts`, each once, in the order in which they come. What is no certificate is left out.
pub(crate) fn union(texts: &[&str]) -> String {
    let mut seen = BTreeSet::new();
    let mut all = String::new();
    for block in texts.iter().flat_map(|text| blocks(text)) {
        let Some(certificate) = certificates(&block).and_then(|mut all| all.pop()) else {
            continue;
        };
        if seen.insert(certificate.to_vec()) {
            all.push_str(&block);
        }
    }
    all
}

/// Whether both hold the same certificates.
pub(crate) fn equal(a: &str, b: &str) -> bool {
    digest(a) == digest(b)
}

/// Names a set of certificates, whatever their order: hexadecimal SHA-256.
pub(crate) fn digest(text: &str) -> String {
    let set: BTreeSet<_> = certificates(text)
        .unwrap_or_default()
        .into_iter()
        .map(|certificate| certificate.to_vec())
        .collect();
    let mut hasher = Sha256::new();
    for certificate in set {
        hasher.update(Sha256::digest(certificate));
    }
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The PEM blocks of certificates, each with its last line ended.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(BEGIN) {
        let from_start = &rest[start..];
        let Some(end) = from_start.find(END) else {
            break;
        };
        let (block, after) = from_start.split_at(end + END.len());
        let lines = block.lines().map(str::trim_end);
        blocks.push(lines.fold(String::new(), |text, line| text + line + "\n"));
        rest = after;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::ca::Authority;

    fn root() -> String {
        let made =
            Authority::ephemeral("cluster.local", Duration::from_secs(60), SystemTime::now());
        made.expect("made").roots_pem().to_owned()
    }

    #[test]
    fn every_certificate_is_there_once() {
        let (a, b) = (root(), root());
        let windows = a.replace('\n', "\r\n");
        assert_eq!(union(&[&a, "", &b, &windows]), format!("{a}{b}"));
        assert_eq!(union(&["no pem", BEGIN]), "");
        assert!(equal(&format!("{a}{b}"), &format!("{b}\n{a}{a}")));
        assert!(!equal(&a, &b));
        assert_eq!(digest(&a).len(), 64);
    }
}
