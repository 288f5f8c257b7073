//! Credentials of nodes: bearer tokens, from a file and from the embedding process.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rand::{Rng, rngs::ThreadRng};
use sha2::{Digest, Sha256};
use tonic::{Status, metadata::MetadataMap};
use tracing::{error, info};
use zeroize::Zeroizing;

/// Shortest token: below 16 characters even random ones can be guessed.
pub const TOKEN_MIN_BYTES: usize = 16;
/// Longest token: HTTP/2 header lists are bounded, and nothing is gained beyond.
pub const TOKEN_MAX_BYTES: usize = 512;
/// Most credentials: an order above the 1,000 nodes that a control plane is built for.
pub const CREDENTIALS_MAX: usize = 20_000;
/// Largest token file, from the two limits above with room for names.
pub const TOKEN_FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// A file that was rewritten in place, or whose last line has no end, may still be being written: it counts once it has
/// not changed for this long. One that was renamed into place is whole and counts at once.
const SETTLE: Duration = Duration::from_secs(2);
/// Longest node name: a Kubernetes object name.
const NODE_NAME_MAX_BYTES: usize = 253;
/// Bits of the mode that let others than owner and group in.
const OTHERS_ACCESS: u32 = 0o007;
/// Random bytes of a token that the embedding process asks for: as many as an AES-256 key.
const GENERATED_TOKEN_BYTES: usize = 32;

/// Name of a node, as manifests spell it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeName(pub Arc<str>);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a token file was refused. Until it is repaired, what was read before stays valid.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be opened or read.
    #[error("node token file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Everybody may read it, so that the tokens prove nothing.
    #[error("node token file {path} is accessible to others (mode {mode:04o}); make it 0600")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is larger than [`TOKEN_FILE_MAX_BYTES`].
    #[error("node token file {path} has {bytes} bytes, at most {TOKEN_FILE_MAX_BYTES} are allowed")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It holds no credential. When it is read again that would withdraw every node, and is rather a mistake.
    #[error(
        "node token file {path} holds no token; to withdraw every node, stop the control plane"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is not `<token> <node name>`.
    #[error("node token file {path}, line {line}: {message}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong. Never holds the token.
        message: &'static str,
    },
}

/// Only digests are kept, so that neither a look-up's time nor a memory dump tells a token.
struct Credential {
    digest: [u8; 32],
    node: NodeName,
}

impl Credential {
    fn new(token: &str, node: NodeName) -> Self {
        Self {
            digest: Sha256::digest(token.as_bytes()).into(),
            node,
        }
    }
}

/// What tells a changed file from an unchanged one.
type Fingerprint = (u64, u64, i64, i64, u64);

#[derive(Default)]
struct State {
    fingerprint: Option<Fingerprint>,
    /// The fingerprint of a file that was refused, so that it is reported once.
    refused: Option<Fingerprint>,
    /// The fingerprint of a file that may still be being written, and when it was first seen.
    unsettled: Option<(Fingerprint, SystemTime)>,
    from_file: Vec<Credential>,
    issued: Vec<Credential>,
}

impl State {
    /// Whether a file that changed is to be left for later.
    fn may_be_unfinished(
        &mut self,
        file: Fingerprint,
        read: Option<&Read>,
        now: SystemTime,
    ) -> bool {
        let id = |(device, inode, ..): Fingerprint| (device, inode);
        let in_place = self.fingerprint.is_some_and(|known| id(known) == id(file));
        if !in_place && read.is_some_and(|read| read.ends_with_a_line) {
            return false;
        }
        let since = match self.unsettled {
            Some((seen, since)) if seen == file => since,
            _ => now,
        };
        self.unsettled = Some((file, since));
        // A clock that went back says nothing about time that passed.
        now.duration_since(since)
            .is_ok_and(|passed| passed < SETTLE)
    }
}

/// Knows which token belongs to which node.
pub struct NodeCredentials {
    file: Option<PathBuf>,
    state: Mutex<State>,
}

impl fmt::Debug for NodeCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeCredentials")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// A node that proved itself, and the proof that lets a long stream ask again whether it still holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authenticated {
    /// The node.
    pub node: NodeName,
    digest: [u8; 32],
}

impl NodeCredentials {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// When the file cannot be used: at the start that is fatal.
    pub fn open(file: Option<PathBuf>) -> Result<Self, TokenFileError> {
        let mut state = State::default();
        if let Some(path) = &file {
            let read = read_file(path)?;
            (state.fingerprint, state.from_file) = (Some(read.fingerprint), read.credentials);
        }
        Ok(Self {
            file,
            state: Mutex::new(state),
        })
    }

    /// Makes a token for `node` that is valid in this process only.
    #[must_use]
    pub fn issue(&self, node: &str) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new([0_u8; GENERATED_TOKEN_BYTES]);
        ThreadRng::default().fill(&mut *bytes);
        let token: Zeroizing<String> =
            Zeroizing::new(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        let credential = Credential::new(&token, NodeName(node.into()));
        self.lock().issued.push(credential);
        token
    }

    /// The node whose token the request bears.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, with the same words whatever was wrong.
    pub fn authenticate(&self, metadata: &MetadataMap) -> Result<Authenticated, Status> {
        self.refresh(SystemTime::now());
        let token = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .filter(|token| token.len() <= TOKEN_MAX_BYTES);
        let known = token.and_then(|token| self.find(&Sha256::digest(token.as_bytes()).into()));
        known.ok_or_else(|| {
            Status::unauthenticated("the request bears no token of a known node; see --node-tokens")
        })
    }

    /// Whether the token with which a stream began is still valid.
    #[must_use]
    pub fn still_valid(&self, authenticated: &Authenticated) -> bool {
        self.refresh(SystemTime::now());
        self.find(&authenticated.digest).as_ref() == Some(authenticated)
    }

    /// Compares with every credential, in a time that does not depend on where they differ.
    fn find(&self, digest: &[u8; 32]) -> Option<Authenticated> {
        let state = self.lock();
        let mut found = None;
        for credential in state.from_file.iter().chain(&state.issued) {
            if equal_in_constant_time(&credential.digest, digest) {
                found = Some(Authenticated {
                    node: credential.node.clone(),
                    digest: *digest,
                });
            }
        }
        found
    }

    /// Reads the file again if it is another one than last time. What cannot be used is reported once and ignored.
    fn refresh(&self, now: SystemTime) {
        let Some(path) = &self.file else { return };
        let present = fs::metadata(path)
            .ok()
            .map(|metadata| fingerprint(&metadata));
        let mut state = self.lock();
        if present.is_some() && (present == state.fingerprint || present == state.refused) {
            return;
        }
        let read = read_file(path);
        // Refusals wait as well: half a file is a mistake only if it stays so.
        if present.is_some_and(|it| state.may_be_unfinished(it, read.as_ref().ok(), now)) {
            return;
        }
        let read = read.and_then(|read| match read.credentials.is_empty() {
            true => Err(TokenFileError::Empty { path: path.clone() }),
            false => Ok(read),
        });
        match read {
            Ok(read) => {
                let credentials = read.credentials.len();
                info!(file = %path.display(), credentials, "node tokens read again");
                state.fingerprint = Some(read.fingerprint);
                state.refused = None;
                state.from_file = read.credentials;
            }
            Err(error) => {
                // A file that is gone has no fingerprint: zeroes stand for it.
                let refused = Some(present.unwrap_or_default());
                if state.refused != refused {
                    error!(%error, "node tokens could not be read again; the previous ones stay valid");
                    state.refused = refused;
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn equal_in_constant_time(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a
        .iter()
        .zip(b)
        .fold(0_u8, |difference, (a, b)| difference | (a ^ b));
    std::hint::black_box(difference) == 0
}

fn fingerprint(metadata: &fs::Metadata) -> Fingerprint {
    let (seconds, nanoseconds) = (metadata.ctime(), metadata.ctime_nsec());
    (
        metadata.dev(),
        metadata.ino(),
        seconds,
        nanoseconds,
        metadata.len(),
    )
}

/// What a token file said.
struct Read {
    fingerprint: Fingerprint,
    credentials: Vec<Credential>,
    ends_with_a_line: bool,
}

fn read_file(path: &Path) -> Result<Read, TokenFileError> {
    let read_error = |source| TokenFileError::Read {
        path: path.into(),
        source,
    };
    let file = fs::File::open(path).map_err(read_error)?;
    let metadata = file.metadata().map_err(read_error)?;
    let mode = metadata.mode() & 0o7777;
    if mode & OTHERS_ACCESS != 0 {
        return Err(TokenFileError::Exposed {
            path: path.into(),
            mode,
        });
    }
    let bytes = metadata.len();
    if bytes > TOKEN_FILE_MAX_BYTES {
        return Err(TokenFileError::TooLarge {
            path: path.into(),
            bytes,
        });
    }
    let mut text = Zeroizing::new(String::new());
    file.take(TOKEN_FILE_MAX_BYTES)
        .read_to_string(&mut text)
        .map_err(read_error)?;
    let credentials = parse_tokens(&text).map_err(|(line, message)| TokenFileError::Line {
        path: path.into(),
        line,
        message,
    })?;
    Ok(Read {
        fingerprint: fingerprint(&metadata),
        credentials,
        ends_with_a_line: text.ends_with('\n'),
    })
}

fn parse_tokens(text: &str) -> Result<Vec<Credential>, (usize, &'static str)> {
    let mut credentials: Vec<Credential> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let [token, node] = words[..] else {
            return Err((line_number, "must be `<token> <node name>`"));
        };
        if !(TOKEN_MIN_BYTES..=TOKEN_MAX_BYTES).contains(&token.len())
            || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err((
                line_number,
                "the token must be 16 to 512 printable ASCII characters",
            ));
        }
        if node.len() > NODE_NAME_MAX_BYTES {
            return Err((line_number, "the node name is too long"));
        }
        if credentials.len() == CREDENTIALS_MAX {
            return Err((line_number, "there are too many credentials"));
        }
        let credential = Credential::new(token, NodeName(node.into()));
        credentials.push(credential);
    }
    let mut digests: Vec<_> = credentials
        .iter()
        .map(|credential| credential.digest)
        .collect();
    digests.sort_unstable();
    if digests.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err((0, "two lines have the same token"));
    }
    Ok(credentials)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TOKEN_A: &str = "aaaaaaaaaaaaaaaaaaaaaaaa";
    const TOKEN_B: &str = "bbbbbbbbbbbbbbbbbbbbbbbb";

    fn write(path: &Path, text: &str) {
        let staged = path.with_extension("new");
        fs::write(&staged, text).expect("write");
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o600)).expect("chmod");
        fs::rename(&staged, path).expect("rename");
    }

    fn bearer(token: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert(
            "authorization",
            format!("Bearer {token}").parse().expect("ascii"),
        );
        metadata
    }

    #[test]
    fn a_changed_file_changes_who_may_connect() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("tokens");
        write(&path, &format!("# nodes\n{TOKEN_A} node-a\n"));
        let credentials = NodeCredentials::open(Some(path.clone())).expect("usable");
        let a = credentials.authenticate(&bearer(TOKEN_A)).expect("known");
        assert_eq!(&*a.node.0, "node-a");
        assert!(credentials.authenticate(&bearer(TOKEN_B)).is_err());

        write(&path, &format!("{TOKEN_B} node-b\n"));
        assert!(!credentials.still_valid(&a));
        assert!(credentials.authenticate(&bearer(TOKEN_A)).is_err());
        assert!(credentials.authenticate(&bearer(TOKEN_B)).is_ok());
    }

    #[test]
    fn a_spoilt_or_missing_file_keeps_the_previous_tokens() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("tokens");
        write(&path, &format!("{TOKEN_A} node-a\n"));
        let credentials = NodeCredentials::open(Some(path.clone())).expect("usable");
        write(&path, "short node-b\n");
        assert!(credentials.authenticate(&bearer(TOKEN_A)).is_ok());
        fs::remove_file(&path).expect("remove");
        assert!(credentials.authenticate(&bearer(TOKEN_A)).is_ok());
    }

    #[test]
    fn a_file_that_is_being_rewritten_withdraws_nobody() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("tokens");
        write(&path, &format!("{TOKEN_A} node-a\n{TOKEN_B} node-b\n"));
        let credentials = NodeCredentials::open(Some(path.clone())).expect("usable");
        let known = |token: &str, now| {
            credentials.refresh(now);
            credentials
                .find(&Sha256::digest(token.as_bytes()).into())
                .is_some()
        };
        let start = SystemTime::now();
        let step = |steps| start + SETTLE * steps;

        fs::write(&path, format!("{TOKEN_B} node-b\n")).expect("write in place");
        assert!(known(TOKEN_A, step(0)), "the rest may be to come");
        assert!(!known(TOKEN_A, step(1)), "it did not come");
        for (now, text) in [
            (2, String::new()),
            (4, format!("{TOKEN_A} no")),
            (6, "# none\n".to_owned()),
        ] {
            fs::write(&path, &text).expect("write in place");
            assert!(known(TOKEN_B, step(now)), "{text:?}");
        }
        assert!(known(TOKEN_B, step(7)), "no credential at all is a mistake");
        write(&path, &format!("{TOKEN_A} node-a"));
        assert!(!known(TOKEN_A, step(8)), "its last line may be cut");
        assert!(known(TOKEN_A, step(9)));
        write(&path, &format!("{TOKEN_B} node-b\n"));
        assert!(known(TOKEN_B, step(9)), "whole, as it was renamed");
    }

    #[test]
    fn refuses_files_that_prove_nothing() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("tokens");
        write(&path, &format!("{TOKEN_A} node-a\n"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        let refused = NodeCredentials::open(Some(path.clone()));
        assert!(matches!(
            refused,
            Err(TokenFileError::Exposed { mode: 0o644, .. })
        ));
        for (text, wrong_line) in [
            ("short node\n".to_owned(), 1),
            (format!("{TOKEN_A}\n"), 1),
            (format!("{TOKEN_A} node-a\n{TOKEN_B} node b\n"), 2),
            (format!("{TOKEN_A} node-a\n{TOKEN_A} node-b\n"), 0),
            (format!("{} node-a\n", "a".repeat(TOKEN_MAX_BYTES + 1)), 1),
        ] {
            write(&path, &text);
            match NodeCredentials::open(Some(path.clone())) {
                Err(TokenFileError::Line { line, .. }) => assert_eq!(line, wrong_line, "{text}"),
                other => panic!("{text:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn an_issued_token_belongs_to_its_node() {
        let credentials = NodeCredentials::open(None).expect("no file");
        let token = credentials.issue("here");
        let node = credentials
            .authenticate(&bearer(&token))
            .expect("issued")
            .node;
        assert_eq!(&*node.0, "here");
        assert!(credentials.authenticate(&MetadataMap::new()).is_err());
    }
}
