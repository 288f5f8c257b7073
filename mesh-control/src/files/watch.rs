//! Events of one folder.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent},
};
use tokio::io::unix::AsyncFd;

use super::is_manifest;

/// `AsyncFd` wants a raw descriptor, which nix's type does not show by itself.
#[derive(Debug)]
struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Manifests that changed, came or went.
    pub names: BTreeSet<String>,
    /// Anything may have changed.
    pub everything: bool,
    /// The folder is gone or was moved: this watch will report nothing more.
    pub lost: bool,
}

/// A watch on a folder.
#[derive(Debug)]
pub(crate) struct FolderWatch {
    events: AsyncFd<Events>,
    path: PathBuf,
}

impl FolderWatch {
    /// # Errors
    /// When the folder is absent or the limits of inotify are reached. Must be called within a tokio runtime.
    pub fn open(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(path, flags)?;
        Ok(Self {
            events: Self::register(Events(inotify))?,
            path: path.into(),
        })
    }

    #[expect(
        deprecated,
        reason = "its replacement is unsafe, because a type might close its descriptor early; `Events` owns its own"
    )]
    fn register(events: Events) -> io::Result<AsyncFd<Events>> {
        AsyncFd::new(events)
    }

    /// Waits for something that matters. Safe to cancel.
    pub async fn next(&mut self) -> Seen {
        loop {
            let Ok(mut ready) = self.events.readable().await else {
                return Seen {
                    lost: true,
                    ..Seen::default()
                };
            };
            let read = ready.try_io(|events| events.get_ref().0.read_events().map_err(io_error));
            match read {
                Ok(Ok(events)) => {
                    let seen = interpret(&self.path, &events);
                    if seen.lost || seen.everything || !seen.names.is_empty() {
                        return seen;
                    }
                }
                Ok(Err(_)) => {
                    return Seen {
                        lost: true,
                        ..Seen::default()
                    };
                }
                Err(_would_block) => {}
            }
        }
    }
}

fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno as i32)
}

fn interpret(folder: &Path, events: &[InotifyEvent]) -> Seen {
    let mut seen = Seen::default();
    for event in events {
        let ended = AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_IGNORED
            | AddWatchFlags::IN_UNMOUNT;
        if event.mask.intersects(ended) {
            seen.lost = true;
        }
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            seen.everything = true;
        }
        match event.name.as_ref().and_then(|name| name.to_str()) {
            Some(name) if is_manifest(name) => {
                if event.mask.contains(AddWatchFlags::IN_CREATE) && !is_link(&folder.join(name)) {
                    continue;
                }
                seen.names.insert(name.to_owned());
            }
            // Mounted ConfigMaps swap a link of that name; what the visible links lead to changes with it.
            Some("..data") => seen.everything = true,
            _ => {}
        }
    }
    seen
}

/// Whether a file is whole when it is made: a link, symbolic or hard, is. Any other one is reported again when it is closed
/// after writing.
fn is_link(path: &Path) -> bool {
    let metadata = fs::symlink_metadata(path);
    metadata.is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1)
}
