//! Network namespaces: opening them, naming them by cookie, and running code inside one.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};

/// The kernel's name of a network namespace (`SO_NETNS_COOKIE`, Linux 5.14): unique until reboot, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

/// An open network namespace. While it is open the namespace lives on, even without processes.
#[derive(Debug)]
pub struct Netns {
    file: OwnedFd,
    path: PathBuf,
    cookie: NetnsCookie,
}

/// The namespace that the agent's threads belong to, opened once before any thread changes its own.
static HOME: OnceLock<OwnedFd> = OnceLock::new();

/// Remembers the current namespace as the one every thread returns to. Call it at the start of `main`, before
/// threads exist.
///
/// # Errors
/// When `/proc/self/ns/net` cannot be opened.
pub fn remember_home() -> io::Result<()> {
    home().map(|_| ())
}

fn home() -> io::Result<BorrowedFd<'static>> {
    if HOME.get().is_none() {
        let file = File::open("/proc/self/ns/net")?;
        // Another thread may have been first; both files name the same namespace.
        let _ = HOME.set(file.into());
    }
    HOME.get()
        .map(AsFd::as_fd)
        .ok_or_else(|| io::Error::other("home namespace was not remembered"))
}

impl Netns {
    /// Opens the namespace at `path` (`/run/netns/NAME`, `/proc/PID/ns/net`).
    ///
    /// # Errors
    /// When the path cannot be opened or is not a network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file: OwnedFd = File::open(path)?.into();
        let mut netns = Self {
            file,
            path: path.to_owned(),
            cookie: NetnsCookie(0),
        };
        netns.cookie = netns.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
            super::socket::netns_cookie(socket.as_fd())
        })??;
        Ok(netns)
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its cookie.
    #[must_use]
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Its inode, by which links to it are known; 0 when the kernel does not tell.
    #[must_use]
    pub fn inode(&self) -> u64 {
        nix::sys::stat::fstat(&self.file).map_or(0, |stat| stat.st_ino)
    }

    /// Whether the path still names this namespace: its name is removed or given to another one when a pod is deleted,
    /// while our descriptor keeps the namespace itself alive.
    #[must_use]
    pub fn is_at_its_path(&self) -> bool {
        // Two files of nsfs are the same namespace exactly if their inodes are (namespaces(7)).
        let opened = nix::sys::stat::fstat(&self.file);
        let named = nix::sys::stat::stat(&self.path);
        match (opened, named) {
            (Ok(opened), Ok(named)) => {
                (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)
            }
            _ => false,
        }
    }

    /// Runs `work` on this thread inside the namespace and comes back. `work` must not await and must not start
    /// threads. Sockets made inside stay inside; costs two `setns(2)` calls.
    ///
    /// # Errors
    /// When the namespace cannot be entered. A failure to come back ends the process: every later socket of this
    /// thread would be made in a workload's namespace.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        let _back = ComeBack(home);
        Ok(work())
    }
}

/// Returns the thread to the agent's namespace, also when the work panics.
struct ComeBack(BorrowedFd<'static>);

impl Drop for ComeBack {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot return to the agent's network namespace; stopping the process");
            std::process::abort();
        }
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Duplicates a descriptor with close-on-exec set.
///
/// # Errors
/// When the process is out of file descriptors.
pub fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a descriptor that is borrowed, hence open, for the length of the call.
    let new = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
