//! A false successor: speaks the hand-over's protocol with a running agent, up to where a test wants it to die, and
//! programs that the kernel rejects.

use std::{
    fs,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
    },
};
use serde_json::{Value, json};

use crate::lab::Node;

/// Longest message, and most descriptors of one, by docs/upgrade.md.
const MESSAGE_MAX_BYTES: usize = 64 * 1024;
const DESCRIPTORS_MAX: usize = 192;
/// Longest wait for one message, in seconds.
const LIMIT_SECONDS: i64 = 20;

/// A conversation with the agent of a node. Dropped, it has died.
#[derive(Debug)]
pub struct FalseSuccessor {
    socket: OwnedFd,
    /// What it was given.
    pub descriptors: Vec<OwnedFd>,
}

impl FalseSuccessor {
    /// Connects.
    ///
    /// # Errors
    /// No agent answers.
    pub fn connect(node: &Node) -> Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let path = node.run_dir.join("handover.sock");
        connect(&socket, &SocketAddrUnix::new(&path)?)
            .with_context(|| format!("nobody answers at {}", path.display()))?;
        Ok(Self {
            socket,
            descriptors: Vec::new(),
        })
    }

    /// Says one thing.
    ///
    /// # Errors
    /// The agent has gone.
    pub fn say(&self, message: &Value) -> Result<()> {
        self.say_text(&message.to_string())
    }

    /// Says one thing that need not be JSON.
    ///
    /// # Errors
    /// The agent has gone.
    pub fn say_text(&self, text: &str) -> Result<()> {
        let mut control = SendAncillaryBuffer::default();
        let text = [IoSlice::new(text.as_bytes())];
        sendmsg(&self.socket, &text, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Says hello as an agent of `node` would.
    ///
    /// # Errors
    /// The agent has gone.
    pub fn hello(&self, node: &Node) -> Result<()> {
        self.say(&json!({
            "say": "hello",
            "protocol": 1,
            "version": "0.0.0",
            "place": {
                "node": node.name,
                "cgroup_root": node.cgroup_root,
                "bpffs_root": node.bpffs_root,
            },
        }))
    }

    /// Hears one thing; keeps its descriptors. `None` when the agent has closed.
    ///
    /// # Errors
    /// Nothing comes, or no JSON.
    pub fn hear(&mut self) -> Result<Option<Value>> {
        let limit = Timespec {
            tv_sec: LIMIT_SECONDS,
            tv_nsec: 0,
        };
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        ensure!(poll(&mut ready, Some(&limit))? > 0, "the agent is silent");
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; MESSAGE_MAX_BYTES];
        let received = recvmsg(
            self.socket.as_fd(),
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                self.descriptors.extend(some);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        text.truncate(received.bytes);
        Ok(Some(serde_json::from_slice(&text)?))
    }

    /// Hears until this is said.
    ///
    /// # Errors
    /// Something else ends the conversation.
    pub fn hear_until(&mut self, say: &str) -> Result<Value> {
        loop {
            let message = self.hear()?.with_context(|| format!("gone before {say}"))?;
            match &message["say"] {
                said if said == say => return Ok(message),
                said if said == "refused" => bail!("refused: {message}"),
                _ => {}
            }
        }
    }
}

/// Writes a copy of an agent's program with a rejected eBPF program inside, see [`reject_program`].
///
/// # Errors
/// The program holds no such object.
pub fn with_rejected_program(agent: &Path, section: &str, copy: &Path) -> Result<PathBuf> {
    fs::write(copy, reject_program(fs::read(agent)?, section)?)?;
    fs::set_permissions(copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy.to_owned())
}

/// Gives the eBPF program of this section a first instruction that no verifier takes: `r0 = r9`, before r9 was set.
///
/// # Errors
/// There is no eBPF object inside, or no such section in it.
pub fn reject_program(mut bytes: Vec<u8>, section: &str) -> Result<Vec<u8>> {
    const READS_R9: [u8; 8] = [0xbf, 0x90, 0, 0, 0, 0, 0, 0];
    let object = bpf_object(&bytes).context("no eBPF object inside")?;
    let offset = object + section_offset(&bytes[object..], section)?;
    bytes[offset..offset + READS_R9.len()].copy_from_slice(&READS_R9);
    Ok(bytes)
}

/// Where an ELF file of machine EM_BPF (247) begins inside another file.
fn bpf_object(bytes: &[u8]) -> Option<usize> {
    let head = |at: &usize| bytes[*at..].starts_with(b"\x7fELF\x02\x01");
    let machine = |at: &usize| bytes.get(at + 18..at + 20) == Some(&247_u16.to_le_bytes());
    (0..bytes.len().saturating_sub(64))
        .filter(|at| bytes[*at] == 0x7f)
        .find(|at| head(at) && machine(at))
}

/// Offset of a section's content, by the section headers (ELF-64, little-endian: elf(5)).
fn section_offset(elf: &[u8], section: &str) -> Result<usize> {
    let number = |at: usize, bytes: usize| -> Result<usize> {
        let field = elf.get(at..at + bytes).context("the object is cut short")?;
        let mut whole = [0; 8];
        whole[..bytes].copy_from_slice(field);
        Ok(usize::try_from(u64::from_le_bytes(whole))?)
    };
    let (table, entry) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let names = number(table + names * entry + 0x18, 8)?;
    for index in 0..count {
        let header = table + index * entry;
        let name = names + number(header, 4)?;
        let end = name + section.len();
        if elf.get(name..end) == Some(section.as_bytes()) && elf.get(end) == Some(&0) {
            return number(header + 0x18, 8);
        }
    }
    bail!("no section {section}")
}
