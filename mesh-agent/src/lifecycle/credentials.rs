//! Looks at the files that discovery and certificates need before anything starts: a wrong path or a damaged file is
//! an operator's mistake, and an agent that retries it for ever would only hide it.

use std::{fs, path::Path};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use zeroize::Zeroizing;

use super::{AgentError, standalone::Upstream};
use crate::{discovery::client::TOKEN_MAX_BYTES, identity::roots::TrustRoots};

/// Checks the roots file and the token file.
///
/// # Errors
/// Names the file, what is wrong with it and where a good one comes from.
pub(super) fn check(upstream: &Upstream) -> Result<(), AgentError> {
    roots(&upstream.roots_file).map_err(|reason| AgentError::Credential {
        what: "roots of the control plane's certificate",
        option: "--control-plane-ca",
        path: upstream.roots_file.clone(),
        reason,
        hint: "copy root-cert.pem from the control plane's --ca-dir, where its first start writes it",
    })?;
    let Some(path) = &upstream.token_file else {
        return Ok(());
    };
    token(path).map_err(|reason| AgentError::Credential {
        what: "this node's token",
        option: "--token-file",
        path: path.clone(),
        reason,
        hint: "write the token that the control plane's --node-tokens has for this node into it",
    })
}

fn roots(path: &Path) -> Result<(), String> {
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<CertificateDer<'static>>, _>>()
        .map_err(|error| format!("it is no PEM: {error}"))?;
    if certificates.is_empty() {
        return Err("there is no PEM certificate in it".to_owned());
    }
    TrustRoots::new(certificates)
        .map(drop)
        .map_err(|error| error.to_string())
}

fn token(path: &Path) -> Result<(), String> {
    let text = Zeroizing::new(fs::read_to_string(path).map_err(|error| error.to_string())?);
    let token = text.trim();
    if token.is_empty() {
        return Err("it is empty".to_owned());
    }
    if token.len() > TOKEN_MAX_BYTES || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!(
            "it is not one line of at most {TOKEN_MAX_BYTES} printable ASCII characters"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temp file");
        fs::write(file.path(), text).expect("written");
        file
    }

    #[test]
    fn roots_that_cannot_be_trusted_are_told_apart() {
        let cases = [
            ("garbage", "no PEM certificate"),
            ("", "no PEM certificate"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "not a usable certificate",
            ),
            (
                "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
                "no PEM",
            ),
        ];
        for (text, expected) in cases {
            let reason = roots(file(text).path()).expect_err(text);
            assert!(reason.contains(expected), "{text:?}: {reason}");
        }
        roots(Path::new("/nonexistent/roots.pem")).expect_err("missing");
    }

    #[test]
    fn a_token_is_one_printable_line() {
        token(file("0123456789abcdef\n").path()).expect("good");
        for text in ["", "\n", "two words", "two\nlines", "\u{7}"] {
            token(file(text).path()).expect_err(text);
        }
        token(Path::new("/nonexistent/token")).expect_err("missing");
    }
}
