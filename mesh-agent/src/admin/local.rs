//! The agent's local socket: one JSON request per connection, answered by one JSON line (`mesh_api::local`).
//!
//! Who may ask: only root and the agent's own user. The folder's and the socket's modes say so, and because modes can
//! be got wrong from outside, the kernel is asked for the peer's user as well.

use std::{
    fs::{self, DirBuilder, Permissions},
    future::Future,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_api::local::{REQUEST_MAX_BYTES, Request, Response, SOCKET_NAME};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use crate::sys::netns::duplicate;

/// Requests at a time. Only administrators ask; enrolling a node full of pods in parallel must work.
pub const CLIENTS_MAX: usize = 32;
/// From accepting to the end of the request line.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// For carrying out a request: enrolment loads kernel programs, which takes a second on a slow machine.
pub const HANDLER_TIMEOUT: Duration = Duration::from_secs(60);
/// For sending the answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of descriptors).
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// No file has it (it marks an unused directory entry).
const NO_INODE: u64 = 0;
const FOLDER_MODE: u32 = 0o700;
const SOCKET_MODE: u32 = 0o600;

/// Carries out requests.
pub trait LocalHandler: Send + Sync + 'static {
    /// Carries out one request. Dropped when it takes longer than [`HANDLER_TIMEOUT`].
    fn handle(&self, request: Request) -> impl Future<Output = Response> + Send;
}

/// Why there is no local socket.
#[derive(Debug, thiserror::Error)]
pub enum LocalSocketError {
    /// The folder cannot be made or looked at.
    #[error("cannot use {} as run directory: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others could replace the socket.
    #[error("run directory {} {problem}; choose one that only the agent's user can change", path.display())]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Something that is no socket is in the way.
    #[error("{} is in the way and not a socket; remove it", path.display())]
    InTheWay {
        /// The path.
        path: PathBuf,
    },
    /// Another agent answers on it.
    #[error("another agent already serves {}", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The socket, bound and not yet served. The file is removed when this is dropped.
#[derive(Debug)]
pub struct LocalServer {
    listener: UnixListener,
    path: PathBuf,
    /// Inode of our socket file, so that a successor's is not removed.
    inode: u64,
    owner: u32,
}

impl LocalServer {
    /// Makes `run_dir` (mode 0700) and the socket in it (mode 0600). A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// When the folder is not safe, something else is in the way, or another agent serves the socket.
    pub fn bind(run_dir: &Path) -> Result<Self, LocalSocketError> {
        let owner = nix::unistd::geteuid().as_raw();
        prepare_folder(run_dir, owner)?;
        let path = run_dir.join(SOCKET_NAME);
        remove_stale(&path)?;
        let failed = |source| LocalSocketError::Bind {
            path: path.clone(),
            source,
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
        let inode = fs::symlink_metadata(&path).map_err(failed)?.ino();
        Ok(Self {
            listener,
            path,
            inode,
            owner,
        })
    }

    /// A socket that is served by an agent from which this one takes over. The file is not ours before
    /// [`LocalServer::claim`].
    ///
    /// # Errors
    /// When the folder is not safe.
    pub fn inherit(
        run_dir: &Path,
        listener: std::os::unix::net::UnixListener,
    ) -> Result<Self, LocalSocketError> {
        let owner = nix::unistd::geteuid().as_raw();
        prepare_folder(run_dir, owner)?;
        let path = run_dir.join(SOCKET_NAME);
        let failed = |source| LocalSocketError::Bind {
            path: path.clone(),
            source,
        };
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self {
            listener,
            path,
            inode: NO_INODE,
            owner,
        })
    }

    /// The file is this agent's: it goes when this is dropped.
    pub fn claim(&mut self) {
        match fs::symlink_metadata(&self.path) {
            Ok(found) => self.inode = found.ino(),
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "the local socket cannot be found");
            }
        }
    }

    /// A copy of the listener, for an agent that takes over.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        duplicate(self.listener.as_fd())
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until another agent does, which `handed_over` says. Requests that were accepted are still answered; the
    /// file is the other agent's.
    pub async fn serve<H: LocalHandler>(mut self, handler: Arc<H>, handed_over: CancellationToken) {
        let slots = Arc::new(Semaphore::new(CLIENTS_MAX));
        let mut clients = tokio::task::JoinSet::new();
        loop {
            let next = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            let Some((Ok(slot), accepted)) = handed_over.run_until_cancelled(next).await else {
                break;
            };
            while clients.try_join_next().is_some() {}
            match accepted {
                Ok((stream, _)) => {
                    let (handler, owner) = (handler.clone(), self.owner);
                    clients.spawn(async move {
                        if let Err(error) = client(stream, owner, &*handler).await {
                            tracing::debug!(%error, "local client went away");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the local socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // The file is the other agent's.
        self.inode = NO_INODE;
        drop(self);
        while clients.join_next().await.is_some() {}
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            // A socket file that stays is only stale: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn prepare_folder(folder: &Path, owner: u32) -> Result<(), LocalSocketError> {
    let failed = |source| LocalSocketError::Folder {
        path: folder.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .map_err(failed)?;
    let found = fs::metadata(folder).map_err(failed)?;
    let wrong = |problem| {
        Err(LocalSocketError::Unsafe {
            path: folder.to_owned(),
            problem,
        })
    };
    if found.uid() != owner {
        return wrong("belongs to another user");
    }
    if found.mode() & 0o022 != 0 {
        // Never tightened by us: a folder that others write to, such as /tmp, is theirs as well.
        return wrong("can be written to by other users");
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE)).map_err(failed)?;
    }
    Ok(())
}

fn remove_stale(path: &Path) -> Result<(), LocalSocketError> {
    let failed = |source| LocalSocketError::Bind {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(LocalSocketError::InTheWay {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(LocalSocketError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

async fn client<H: LocalHandler>(
    mut stream: UnixStream,
    owner: u32,
    handler: &H,
) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let response = match admit(uid, owner) {
        Ok(()) => serve_one(&mut stream, handler).await?,
        Err(refusal) => refusal,
    };
    let mut line = serde_json::to_vec(&response)?;
    line.push(b'\n');
    let sending = async {
        stream.write_all(&line).await?;
        stream.shutdown().await
    };
    tokio::time::timeout(ANSWER_TIMEOUT, sending).await?
}

fn admit(uid: u32, owner: u32) -> Result<(), Response> {
    if uid == 0 || uid == owner {
        return Ok(());
    }
    tracing::warn!(uid, "refused on the local socket");
    Err(error(format!(
        "user {uid} may not ask this agent; use root"
    )))
}

/// Reads the one request of a client that may ask, and carries it out.
///
/// # Errors
/// The stream's.
pub async fn serve_one<H: LocalHandler>(
    stream: &mut (impl AsyncRead + Unpin),
    handler: &H,
) -> io::Result<Response> {
    let Ok(line) = tokio::time::timeout(REQUEST_TIMEOUT, read_line(stream)).await else {
        return Ok(error(format!(
            "no request line within {} s",
            REQUEST_TIMEOUT.as_secs()
        )));
    };
    let request = match line?.and_then(|line| parse(&line)) {
        Ok(request) => request,
        Err(refusal) => return Ok(refusal),
    };
    let answer = tokio::time::timeout(HANDLER_TIMEOUT, handler.handle(request)).await;
    Ok(answer.unwrap_or_else(|_| {
        error(format!(
            "gave up after {} s; see the agent's log",
            HANDLER_TIMEOUT.as_secs()
        ))
    }))
}

fn error(message: String) -> Response {
    Response::Error { message }
}

/// The first line without its newline. What follows it is not read.
async fn read_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<Vec<u8>, Response>> {
    let mut line = Vec::with_capacity(512);
    let mut limited = stream.take(REQUEST_MAX_BYTES as u64);
    loop {
        let before = line.len();
        let read = limited.read_buf(&mut line).await?;
        if let Some(end) = line[before..].iter().position(|byte| *byte == b'\n') {
            line.truncate(before + end);
            return Ok(Ok(line));
        }
        if line.len() >= REQUEST_MAX_BYTES {
            return Ok(Err(error(format!(
                "the request is longer than {REQUEST_MAX_BYTES} bytes"
            ))));
        }
        if read == 0 {
            return Ok(Err(error(format!(
                "the request ended after {} bytes without a newline",
                line.len()
            ))));
        }
    }
}

fn parse(line: &[u8]) -> Result<Request, Response> {
    serde_json::from_slice(line).map_err(|problem| error(format!("malformed request: {problem}")))
}

#[cfg(test)]
mod tests;
