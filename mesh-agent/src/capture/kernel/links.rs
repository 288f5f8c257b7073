//! Links: each program at its place, by a link that is pinned and outlives the process.

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use super::{CaptureError, Kernel, open_dir, remove_folder};
use crate::sys::{
    bpf::{self, AttachType, LinkInfo},
    netns::{Netns, NetnsCookie},
};

impl Kernel {
    /// Attaches what looks at the whole node. Returns whether anything was not in its place.
    ///
    /// # Errors
    /// Says which program and where.
    pub fn attach_node(&self) -> Result<bool, CaptureError> {
        // The agent's own sockets first: were it captured before it is known, it would loop.
        let mut changed = self.attach_agent_flow()?;
        let cgroup_root = open_dir(&self.config.cgroup_root)?;
        for (program, pin, kind) in [
            ("weft_connect4", "connect4", AttachType::Connect4),
            ("weft_connect6", "connect6", AttachType::Connect6),
        ] {
            changed |= self.attach(program, pin, cgroup_root.as_fd(), kind)?;
        }
        Ok(changed)
    }

    pub(super) fn attach_agent_flow(&self) -> Result<bool, CaptureError> {
        let agent_dir = open_dir(&self.config.agent_cgroup())?;
        self.attach(
            "weft_agent_flow",
            "agent-flow",
            agent_dir.as_fd(),
            AttachType::SockOps,
        )
    }

    /// Whether an agent of another ABI has left, or still has, kernel objects here. After a start it has to be followed
    /// by [`Kernel::attach_node`] and [`Kernel::remove_other_versions`] once the workloads are known.
    #[must_use]
    pub fn follows_another_abi(&self) -> bool {
        !self.other_versions().is_empty()
    }

    /// Puts a program at its place: into the pinned link if there is one that still holds, else by a new link. Returns
    /// whether it was not there, as the kernel has it: a link can be detached, or get another program, with its pin
    /// unchanged.
    fn attach(
        &self,
        program: &'static str,
        pin: &str,
        target: BorrowedFd<'_>,
        kind: AttachType,
    ) -> Result<bool, CaptureError> {
        let path = self.link_path(pin);
        let failed = |source| CaptureError::Attach {
            program,
            target: pin.to_owned(),
            source,
        };
        let fd = self.program_fd(program)?;
        let own = bpf::program_id(fd).map_err(failed)?;
        let place = fs::File::from(target.try_clone_to_owned().map_err(failed)?);
        let place = place.metadata().map_err(failed)?.ino();
        let is_here = |found: &LinkInfo| (found.place, found.attach_type) == (place, kind as u32);
        if let Ok(link) = bpf::open_pin(&path) {
            match bpf::link_info(link.as_fd()) {
                Ok(found) if is_here(&found) && found.program == own => return Ok(false),
                Ok(found) if is_here(&found) => match bpf::link_update(link.as_fd(), fd) {
                    Ok(()) => return Ok(true),
                    Err(error) => {
                        tracing::info!(pin, %error, "pinned link is dead, attaching anew")
                    }
                },
                // Detached, or the cgroup or namespace of the link is gone and its successor needs a link of its own.
                found => tracing::info!(pin, ?found, "pinned link is elsewhere, attaching anew"),
            }
            fs::remove_file(&path).map_err(CaptureError::file("remove", &path))?;
        }
        let link = match self.link_of_another_abi(pin, fd) {
            Some(link) => link,
            None => bpf::link_create(fd, target, kind).map_err(failed)?,
        };
        bpf::pin(link.as_fd(), &path).map_err(CaptureError::file("pin a link at", &path))?;
        Ok(true)
    }

    /// The link that an agent of another ABI has pinned for the same place, with our program in it by now.
    fn link_of_another_abi(&self, pin: &str, program: BorrowedFd<'_>) -> Option<OwnedFd> {
        self.other_versions().into_iter().find_map(|dir| {
            let link = bpf::open_pin(&dir.join(format!("link-{pin}"))).ok()?;
            bpf::link_update(link.as_fd(), program).ok()?;
            Some(link)
        })
    }

    fn other_versions(&self) -> Vec<PathBuf> {
        let own = self.config.pin_dir();
        let entries = fs::read_dir(self.config.node_dir());
        let folders = entries.into_iter().flatten().flatten();
        folders
            .map(|entry| entry.path())
            .filter(|path| *path != own && path.is_dir())
            .collect()
    }

    /// Removes what agents of other ABIs have pinned, after their links were taken over for all workloads that are
    /// known. Links of others are taken along: a namespace that nobody serves must stay refused.
    pub fn remove_other_versions(&self) {
        for dir in self.other_versions() {
            let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
            for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
                let Some(pin) = name.strip_prefix("link-") else {
                    continue;
                };
                if let Err(error) = self.take_along(pin) {
                    tracing::error!(pin, %error, "a link of another version is lost");
                }
            }
            tracing::info!(path = %dir.display(), "removing the kernel objects of another version");
            remove_folder(&dir);
        }
    }

    fn take_along(&self, pin: &str) -> Result<(), CaptureError> {
        if self.is_pinned(pin) {
            return Ok(());
        }
        let program = match pin.split_once('-') {
            Some(("lookup", _)) => "weft_lookup",
            Some(("flow", _)) => "weft_flow",
            _ => return Ok(()),
        };
        let path = self.link_path(pin);
        match self.link_of_another_abi(pin, self.program_fd(program)?) {
            Some(link) => {
                bpf::pin(link.as_fd(), &path).map_err(CaptureError::file("pin a link at", &path))
            }
            None => Ok(()),
        }
    }

    fn detach(&self, pin: &str) {
        let path = self.link_path(pin);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a pinned link");
        }
    }

    /// Captures inbound connections of a namespace. Returns whether that was not so.
    pub(in crate::capture) fn attach_lookup(&self, netns: &Netns) -> Result<bool, CaptureError> {
        self.attach(
            "weft_lookup",
            &lookup_pin(netns.cookie()),
            netns.as_fd(),
            AttachType::SkLookup,
        )
    }

    /// Counts flows of a workload's cgroup, and lets them go the same-node way. Returns whether that was not so.
    pub(in crate::capture) fn attach_flow(
        &self,
        cookie: NetnsCookie,
        cgroup: &Path,
    ) -> Result<bool, CaptureError> {
        let dir = open_dir(cgroup)?;
        self.attach(
            "weft_flow",
            &flow_pin(cookie),
            dir.as_fd(),
            AttachType::SockOps,
        )
    }

    /// Whether the kernel has a program for the inbound connections of a namespace, by our link.
    pub(in crate::capture) fn has_lookup(&self, netns: &Netns) -> bool {
        let link = bpf::open_pin(&self.link_path(&lookup_pin(netns.cookie())));
        link.and_then(|link| bpf::link_info(link.as_fd()))
            .is_ok_and(|found| found.place == netns.inode())
    }

    fn is_pinned(&self, pin: &str) -> bool {
        self.link_path(pin).exists()
    }

    fn link_path(&self, pin: &str) -> PathBuf {
        self.config.pin_dir().join(format!("link-{pin}"))
    }

    /// Removes the links of a workload.
    pub(super) fn detach_workload(&self, cookie: NetnsCookie) {
        self.detach(&lookup_pin(cookie));
        self.detach(&flow_pin(cookie));
    }
}

fn lookup_pin(cookie: NetnsCookie) -> String {
    format!("lookup-{:x}", cookie.0)
}

fn flow_pin(cookie: NetnsCookie) -> String {
    format!("flow-{:x}", cookie.0)
}
