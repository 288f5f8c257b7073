//! The authority's folder.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use tracing::info;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{Authority, Material, make_root, roots};

const KEY_FILE: &str = "ca-key.pem";
const CERTIFICATE_FILE: &str = "ca-cert.pem";
const EXTRA_ROOTS_FILE: &str = "roots.pem";
/// What agents are given.
pub(crate) const BUNDLE_FILE: &str = "root-cert.pem";
/// Largest file read: a bundle of a few hundred roots.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// Bits of the mode that let anybody but the owner read or write the key. Its group may not either: it is the mesh.
const KEY_FORBIDDEN_ACCESS: u32 = 0o077;

/// Why the authority cannot be used. All are fatal at the start.
#[derive(Debug, thiserror::Error)]
pub enum CaFilesError {
    /// A file or the folder cannot be read or written.
    #[error("certificate authority: {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One of key and certificate is there, the other is not.
    #[error(
        "certificate authority: {0} is missing; restore it, or remove its counterpart to begin a new mesh"
    )]
    Half(PathBuf),
    /// Others may read the key.
    #[error(
        "certificate authority: {path} is accessible to others (mode {mode:04o}); make it 0600"
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key cannot be read.
    #[error(
        "certificate authority: {KEY_FILE} is not a PEM PKCS#8 private key of a supported kind"
    )]
    Key,
    /// The certificate cannot be used.
    #[error("certificate authority: {CERTIFICATE_FILE} {0}")]
    Certificate(&'static str),
    /// The further roots cannot be used.
    #[error("certificate authority: {EXTRA_ROOTS_FILE} {0}")]
    ExtraRoots(&'static str),
    /// A new authority could not be made.
    #[error("certificate authority: a new key could not be made: {0}")]
    Make(rcgen::Error),
}

impl Authority {
    /// Opens the authority in `folder`, or makes one there if there is none, and writes the bundle for the agents.
    ///
    /// # Errors
    /// When files are missing, exposed, malformed or do not fit each other.
    pub fn open(
        folder: &Path,
        trust_domain: &str,
        leaf_max_lifetime: Duration,
        now: SystemTime,
    ) -> Result<Self, CaFilesError> {
        let (key_path, certificate_path) = (folder.join(KEY_FILE), folder.join(CERTIFICATE_FILE));
        match (key_path.exists(), certificate_path.exists()) {
            (true, true) => {}
            (false, false) => create(folder, trust_domain, now)?,
            (true, false) => return Err(CaFilesError::Half(certificate_path)),
            (false, true) => return Err(CaFilesError::Half(key_path)),
        }
        let mode = fs::metadata(&key_path).map_err(io_error(&key_path))?.mode() & 0o7777;
        if mode & KEY_FORBIDDEN_ACCESS != 0 {
            return Err(CaFilesError::Exposed {
                path: key_path,
                mode,
            });
        }
        let material = Material {
            key: Zeroizing::new(read(&key_path)?),
            certificate: read(&certificate_path)?,
        };
        let extra_path = folder.join(EXTRA_ROOTS_FILE);
        let extra = if extra_path.exists() {
            read(&extra_path)?
        } else {
            String::new()
        };
        let authority = Self::from_material(&material, &extra, leaf_max_lifetime)?;
        write_atomically(folder, BUNDLE_FILE, authority.roots_pem().as_bytes(), 0o644)?;
        Ok(authority)
    }
}

fn create(folder: &Path, trust_domain: &str, now: SystemTime) -> Result<(), CaFilesError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(io_error(folder))?;
    let material = make_root(trust_domain, now).map_err(CaFilesError::Make)?;
    // The key comes last: a crash in between leaves a certificate without a key, which the next start names.
    write_atomically(
        folder,
        CERTIFICATE_FILE,
        material.certificate.as_bytes(),
        0o644,
    )?;
    write_atomically(folder, KEY_FILE, material.key.as_bytes(), 0o600)?;
    info!(folder = %folder.display(), trust_domain, "made a new certificate authority");
    Ok(())
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> CaFilesError + '_ {
    move |source| CaFilesError::Io {
        path: path.into(),
        source,
    }
}

fn read(path: &Path) -> Result<String, CaFilesError> {
    let bytes = fs::metadata(path).map_err(io_error(path))?.len();
    if bytes > FILE_MAX_BYTES {
        let source = io::Error::new(io::ErrorKind::FileTooLarge, "the file is too large");
        return Err(CaFilesError::Io {
            path: path.into(),
            source,
        });
    }
    fs::read_to_string(path).map_err(io_error(path))
}

/// Writes beside the target, flushes, and renames: a reader sees the old file or the whole new one.
fn write_atomically(
    folder: &Path,
    name: &str,
    bytes: &[u8],
    mode: u32,
) -> Result<(), CaFilesError> {
    let staged = folder.join(format!(".{name}.{}.new", std::process::id()));
    let target = folder.join(name);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&staged, &target)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| {
        // The staged file may hold a key; whether it could be removed changes nothing about the error.
        let _ = fs::remove_file(&staged);
        CaFilesError::Io {
            path: target.clone(),
            source,
        }
    })
}

/// An authority's certificate that was found usable.
pub(super) struct Checked {
    pub certificate: CertificateDer<'static>,
    pub intermediate: Option<String>,
    pub roots: String,
    pub not_after: SystemTime,
}

pub(super) fn certificates(pem: &str) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .ok()
}

pub(super) fn check_authority(
    pem: &str,
    public_key: &[u8],
    extra_roots: &str,
) -> Result<Checked, CaFilesError> {
    let refuse = |message| Err(CaFilesError::Certificate(message));
    let Some([certificate]) = certificates(pem)
        .as_deref()
        .and_then(|all| all.first_chunk().cloned())
    else {
        return refuse("holds no PEM certificate");
    };
    let Ok((_, parsed)) = X509Certificate::from_der(&certificate) else {
        return refuse("is not a certificate");
    };
    if !parsed.is_ca() {
        return refuse("is not an authority's: basicConstraints lack CA");
    }
    if *parsed.public_key().subject_public_key.data != *public_key {
        return refuse("does not belong to the key");
    }
    let not_after = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    let not_after = UNIX_EPOCH + Duration::from_secs(not_after);
    let extra = match certificates(extra_roots) {
        None => {
            return Err(CaFilesError::ExtraRoots(
                "is not a list of PEM certificates",
            ));
        }
        Some(extra) if extra.is_empty() && !extra_roots.trim().is_empty() => {
            return Err(CaFilesError::ExtraRoots("holds no PEM certificate"));
        }
        Some(_) => extra_roots,
    };
    let is_root = parsed.subject() == parsed.issuer();
    if !is_root && extra.trim().is_empty() {
        return refuse("is an intermediate, so roots.pem must hold its root");
    }
    let roots = roots::union(&[if is_root { pem } else { "" }, extra]);
    let intermediate = (!is_root).then(|| pem.to_owned());
    Ok(Checked {
        certificate: certificate.clone(),
        intermediate,
        roots,
        not_after,
    })
}
