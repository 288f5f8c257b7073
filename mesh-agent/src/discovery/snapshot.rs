//! The last good state on disk, so that an agent that restarts while the control plane is away serves what it knew.
//!
//! Format, numbers big-endian: `WEFTSNAP`, version (u32), length of the payload (u64), SHA-256 of the payload, payload.
//! The payload is a sequence of length-delimited protobuf messages: the `Node` that wrote it, then one `Resource` per
//! resource in force. The checksum finds damage; it does not authenticate. The file is as trusted as its directory,
//! which only root may write.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_api::proto::discovery::{Node, Resource};
use prost::Message;
use prost_types::Any;
use sha2::{Digest as _, Sha256};

use super::subscription::{Kind, Record};

/// Changes that arrive within this time share one write, after the first. A restart may lose that much, and the control
/// plane repeats it on connecting.
pub const SNAPSHOT_DEBOUNCE: Duration = Duration::from_secs(1);
/// After a write, pause this many times its duration: under constant change the disk is busy 5 % of the time.
pub const SNAPSHOT_PAUSE_FACTOR: u32 = 20;
/// After a failed write, for example on a full disk, pause this long and try again.
pub const SNAPSHOT_RETRY: Duration = Duration::from_secs(30);
/// Largest file, read or written. 100,000 workloads take some 40 MiB.
pub const SNAPSHOT_MAX_BYTES: u64 = 256 * 1024 * 1024;

const MAGIC: &[u8; 8] = b"WEFTSNAP";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 8 + 32;

/// Why a snapshot could not be read or written. None of them stops the agent: it waits for the control plane instead,
/// or goes on with the older file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system refused; on ENOSPC, make room.
    #[error("cannot {action} snapshot {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Larger than [`SNAPSHOT_MAX_BYTES`].
    #[error("snapshot {0} is larger than {SNAPSHOT_MAX_BYTES} bytes")]
    TooLarge(PathBuf),
    /// Not a snapshot of this program.
    #[error("{0} is not a Weft snapshot")]
    Foreign(PathBuf),
    /// A snapshot of a version that this agent does not read.
    #[error("snapshot {path} has version {version}, this agent reads version {VERSION}")]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Cut short, or longer than it says.
    #[error("snapshot {path} is {found} bytes long and should be {expected}")]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// Its length by its header.
        expected: u64,
    },
    /// The checksum does not match.
    #[error("snapshot {0} is damaged: its checksum does not match")]
    Checksum(PathBuf),
    /// The checksum matches but the content does not parse.
    #[error("snapshot {path} holds an unreadable record: {reason}")]
    Record {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by another node.
    #[error("snapshot {path} was written by node {found:?}, this is {expected:?}")]
    OtherNode {
        /// Which file.
        path: PathBuf,
        /// Who wrote it.
        found: String,
        /// Who reads it.
        expected: String,
    },
}

/// Reads a snapshot that `node` wrote; `None` if there is none.
///
/// # Errors
/// [`SnapshotError`] for anything but a whole, undamaged snapshot of this node.
pub fn load(path: &Path, node: &Node) -> Result<Option<Vec<Record>>, SnapshotError> {
    let io_error = |source| SnapshotError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(e)),
    };
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grew is noticed too.
    file.take(SNAPSHOT_MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error)?;
    if bytes.len() as u64 > SNAPSHOT_MAX_BYTES {
        return Err(SnapshotError::TooLarge(path.to_owned()));
    }
    let payload = checked_payload(path, &bytes)?;
    parse(path, payload, node).map(Some)
}

fn checked_payload<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a [u8], SnapshotError> {
    let foreign = || SnapshotError::Foreign(path.to_owned());
    let rest = bytes.strip_prefix(MAGIC.as_slice()).ok_or_else(foreign)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(foreign)?;
    let version = u32::from_be_bytes(*version);
    if version != VERSION {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            version,
        });
    }
    let (length, rest) = rest.split_first_chunk::<8>().ok_or_else(foreign)?;
    let (checksum, payload) = rest.split_first_chunk::<32>().ok_or_else(foreign)?;
    let expected = u64::from_be_bytes(*length);
    if payload.len() as u64 != expected {
        let expected = expected.saturating_add(HEADER_BYTES as u64);
        return Err(SnapshotError::Length {
            path: path.to_owned(),
            found: bytes.len() as u64,
            expected,
        });
    }
    if Sha256::digest(payload).as_slice() != checksum {
        return Err(SnapshotError::Checksum(path.to_owned()));
    }
    Ok(payload)
}

fn parse(path: &Path, mut payload: &[u8], node: &Node) -> Result<Vec<Record>, SnapshotError> {
    let unreadable = |reason: String| SnapshotError::Record {
        path: path.to_owned(),
        reason,
    };
    let writer =
        Node::decode_length_delimited(&mut payload).map_err(|e| unreadable(e.to_string()))?;
    if writer.id != node.id || writer.cluster != node.cluster {
        let name = |n: &Node| format!("{} of cluster {}", n.id, n.cluster);
        return Err(SnapshotError::OtherNode {
            path: path.to_owned(),
            found: name(&writer),
            expected: name(node),
        });
    }
    let mut records = Vec::new();
    while !payload.is_empty() {
        let resource = Resource::decode_length_delimited(&mut payload)
            .map_err(|e| unreadable(e.to_string()))?;
        let any = resource.resource.unwrap_or_default();
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| kind.type_url() == any.type_url);
        let kind = kind.ok_or_else(|| unreadable(format!("unknown type {:?}", any.type_url)))?;
        let (name, version) = (resource.name.into(), resource.version.into());
        records.push(Record {
            kind,
            name,
            version,
            body: any.value.into(),
        });
    }
    Ok(records)
}

/// Writes a snapshot atomically: whatever happens, `path` holds either the old one or the new one, whole.
///
/// # Errors
/// [`SnapshotError`]; the file at `path` is then untouched.
pub fn save(path: &Path, node: &Node, records: &[Record]) -> Result<(), SnapshotError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let saved = write_file(&temporary, node, records).and_then(|()| {
        let io_error = |action, source| SnapshotError::Io {
            action,
            path: path.to_owned(),
            source,
        };
        fs::rename(&temporary, path).map_err(|e| io_error("replace", e))?;
        // The rename itself has to survive a power cut.
        let directory = path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(directory)
            .and_then(|d| d.sync_all())
            .map_err(|e| io_error("sync the directory of", e))
    });
    if saved.is_err() {
        // Best effort: what is left over is replaced by the next attempt.
        let _ = fs::remove_file(&temporary);
    }
    saved
}

fn write_file(path: &Path, node: &Node, records: &[Record]) -> Result<(), SnapshotError> {
    let io_error = |action| {
        move |source| SnapshotError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path).map_err(io_error("create"))?;
    let mut payload = Payload {
        out: BufWriter::new(file),
        sum: Sha256::new(),
        length: 0,
        buffer: Vec::new(),
    };
    let written = (|| {
        payload.out.write_all(&[0; HEADER_BYTES])?;
        payload.push(node)?;
        for record in records {
            payload.push(&Resource {
                name: record.name.to_string(),
                version: record.version.to_string(),
                resource: Some(Any {
                    type_url: record.kind.type_url().to_owned(),
                    value: record.body.to_vec(),
                }),
                ..Resource::default()
            })?;
        }
        payload.finish()
    })();
    match written.map_err(io_error("write"))? {
        length if length > SNAPSHOT_MAX_BYTES => Err(SnapshotError::TooLarge(path.to_owned())),
        _ => Ok(()),
    }
}

/// The payload as it is written: summed and counted on the way.
struct Payload {
    out: BufWriter<File>,
    sum: Sha256,
    length: u64,
    buffer: Vec<u8>,
}

impl Payload {
    fn push(&mut self, message: &impl Message) -> io::Result<()> {
        if self.length > SNAPSHOT_MAX_BYTES {
            return Ok(()); // Too large already; the caller refuses it.
        }
        self.buffer.clear();
        message.encode_length_delimited(&mut self.buffer)?;
        self.sum.update(&self.buffer);
        self.length += self.buffer.len() as u64;
        self.out.write_all(&self.buffer)
    }

    /// Writes the header and returns the length of the file.
    fn finish(mut self) -> io::Result<u64> {
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(MAGIC)?;
        self.out.write_all(&VERSION.to_be_bytes())?;
        self.out.write_all(&self.length.to_be_bytes())?;
        self.out.write_all(&self.sum.finalize())?;
        self.out
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()?;
        Ok(self.length + HEADER_BYTES as u64)
    }
}
