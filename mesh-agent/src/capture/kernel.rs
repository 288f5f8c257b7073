//! Programs, maps and links of this node: loaded once, pinned, and taken over from a previous agent.
//!
//! Pins live in `<bpffs root>/weft-<node>/v<ABI>/`: maps by name, links as `link-…`. Programs need no pin: links hold
//! them. A restarted agent loads its own programs against the pinned maps and swaps them into the pinned links, so
//! there is never a moment without a program or with two. An agent of another ABI makes maps of its own in a folder
//! beside, swaps its programs into the same links, and removes the other folder once nothing needs it.

use std::{
    fs,
    net::IpAddr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap, SockHash},
    programs::{CgroupSockAddr, SkLookup, SockOps},
};
use mesh_ebpf::{
    AGENT_FLOWS_PER_FLOW, Address, Destination, EdgeCounters, EdgeKey, Flow, FlowKey, Globals,
    ListenerKey, Verdict, Workload,
};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::error::CaptureError;
use crate::sys::bpf;

mod links;
mod maps;

/// The programs, as the build script made them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weft-ebpf.o"));

/// Where the kernel objects of one agent live.
#[derive(Debug, Clone)]
pub struct KernelConfig {
    /// cgroup v2 folder below which connections are looked at; normally the root of the hierarchy.
    pub cgroup_root: PathBuf,
    /// A bpffs mount or a folder on one.
    pub bpffs_root: PathBuf,
    /// Names the pins and the agent's cgroup, so that several agents can share a kernel.
    pub node: String,
    /// Names the folder of the pins: [`mesh_ebpf::ABI_VERSION`], but for tests of what happens when that changes.
    pub abi: u32,
    /// Same-node flows that can be recorded, in maps that are made anew.
    pub flows_max: u32,
}

impl KernelConfig {
    /// Folder of this node's pins, all versions.
    #[must_use]
    pub fn node_dir(&self) -> PathBuf {
        self.bpffs_root.join(format!("weft-{}", self.node))
    }

    /// Folder of the pins of this ABI.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        self.node_dir().join(format!("v{}", self.abi))
    }

    /// The agent's own cgroup: processes in it are never captured.
    #[must_use]
    pub fn agent_cgroup(&self) -> PathBuf {
        self.cgroup_root.join(format!("weft-agent-{}", self.node))
    }
}

/// Handles on the maps. One lock for all: they are changed on enrolment and on changes of the mesh, not per byte.
pub struct Maps {
    globals: Array<MapData, Globals>,
    workloads: HashMap<MapData, u64, Workload>,
    addresses: HashMap<MapData, Address, Workload>,
    listeners: SockHash<MapData, ListenerKey>,
    dead: HashMap<MapData, Destination, u32>,
    flows: HashMap<MapData, FlowKey, Flow>,
    agent_flows: HashMap<MapData, FlowKey, Flow>,
    edges: PerCpuHashMap<MapData, EdgeKey, EdgeCounters>,
    counters: PerCpuArray<MapData, u64>,
}

/// The kernel side of one agent.
pub struct Kernel {
    config: KernelConfig,
    /// Held by the one agent of this node that captures; agents that only drain share the cgroup without it.
    cgroup_lock: Mutex<Option<fs::File>>,
    programs: Ebpf,
    maps: Mutex<Maps>,
    /// Of its own, because workers write it while connections are set up.
    verdicts: Mutex<HashMap<MapData, EdgeKey, Verdict>>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// What an adopted or new kernel side was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing was there.
    Nothing,
    /// Maps and links of a previous agent were taken over.
    Previous,
}

impl Kernel {
    /// Moves the process into its cgroup, loads the programs against new or pinned maps, and attaches the connect
    /// hooks. On failure nothing stays behind that was not there before.
    ///
    /// # Errors
    /// Says which program, file or file system is at fault.
    pub fn start(config: KernelConfig) -> Result<(Self, Found), CaptureError> {
        check_file_system(
            &config.bpffs_root,
            BPF_FS_MAGIC,
            "bpf",
            "mount -t bpf bpf /sys/fs/bpf",
            "--bpffs-root",
        )?;
        check_file_system(
            &config.cgroup_root,
            CGROUP2_SUPER_MAGIC,
            "cgroup2",
            "mount -t cgroup2 none /sys/fs/cgroup",
            "--cgroup-root",
        )?;
        let found = if config.node_dir().is_dir() {
            Found::Previous
        } else {
            Found::Nothing
        };
        let started = lock_agent_cgroup(&config).and_then(|lock| {
            let kernel = Self::load(config.clone(), lock, OBJECT)?;
            if kernel.follows_another_abi() {
                // Its maps know nobody yet: with the connect hooks now, what was captured would be open.
                kernel.attach_agent_flow()?;
            } else {
                kernel.attach_node()?;
            }
            Ok(kernel)
        });
        if started.is_err() && found == Found::Nothing {
            remove_node_pins(&config);
            remove_agent_cgroup(&config);
        }
        started.map(|kernel| (kernel, found))
    }

    /// The same beside an agent that runs and has given its lock of the cgroup: enters the cgroup and loads, but puts
    /// no program anywhere.
    ///
    /// # Errors
    /// Says which program or file is at fault; the other agent's are untouched.
    pub fn beside(config: KernelConfig, cgroup_lock: fs::File) -> Result<Self, CaptureError> {
        Self::beside_with(config, cgroup_lock, OBJECT)
    }

    /// [`Kernel::beside`] with other programs, for tests of programs that the kernel rejects.
    ///
    /// # Errors
    /// As there.
    pub fn beside_with(
        config: KernelConfig,
        cgroup_lock: fs::File,
        object: &[u8],
    ) -> Result<Self, CaptureError> {
        let is_new = !config.pin_dir().is_dir();
        let loaded = Self::load(config.clone(), cgroup_lock, object);
        if loaded.is_err() && is_new {
            remove_folder(&config.pin_dir());
        }
        loaded
    }

    fn load(
        config: KernelConfig,
        cgroup_lock: fs::File,
        object: &[u8],
    ) -> Result<Self, CaptureError> {
        let agent_cgroup = enter_agent_cgroup(&config)?;
        let pin_dir = config.pin_dir();
        fs::create_dir_all(&pin_dir).map_err(CaptureError::file("create", &pin_dir))?;
        // The programs read no kernel structure, so they need no relocation against the kernel's BTF. Parsing that would
        // cost 25 MB and a third of the start.
        let mut programs = EbpfLoader::new()
            .btf(None)
            .default_map_pin_directory(&pin_dir)
            .override_global("AGENT_CGROUP", &agent_cgroup, true)
            .map_max_entries("FLOWS", config.flows_max)
            .map_max_entries(
                "AGENT_FLOWS",
                config.flows_max.saturating_mul(AGENT_FLOWS_PER_FLOW),
            )
            .load(object)
            .map_err(|error| CaptureError::Load {
                program: "all".into(),
                reason: chain(&error),
            })?;
        for name in ["weft_connect4", "weft_connect6"] {
            load::<CgroupSockAddr>(&mut programs, name, CgroupSockAddr::load)?;
        }
        for name in ["weft_flow", "weft_agent_flow"] {
            load::<SockOps>(&mut programs, name, SockOps::load)?;
        }
        load::<SkLookup>(&mut programs, "weft_lookup", SkLookup::load)?;
        let maps = Maps {
            globals: take(&mut programs, "GLOBALS")?,
            workloads: take(&mut programs, "WORKLOADS")?,
            addresses: take(&mut programs, "ADDRESSES")?,
            listeners: take(&mut programs, "LISTENERS")?,
            dead: take(&mut programs, "DEAD")?,
            flows: take(&mut programs, "FLOWS")?,
            agent_flows: take(&mut programs, "AGENT_FLOWS")?,
            edges: take(&mut programs, "EDGES")?,
            counters: take(&mut programs, "COUNTERS")?,
        };
        let verdicts = take(&mut programs, "VERDICTS")?;
        Ok(Self {
            config,
            cgroup_lock: Mutex::new(Some(cgroup_lock)),
            programs,
            maps: Mutex::new(maps),
            verdicts: Mutex::new(verdicts),
        })
    }

    /// A copy of the lock of the agent's cgroup, for the agent that takes over.
    ///
    /// # Errors
    /// When it was given up, or the process is out of descriptors.
    pub fn share_lock(&self) -> std::io::Result<fs::File> {
        let lock = self.cgroup_lock.lock();
        let lock = lock.unwrap_or_else(PoisonError::into_inner);
        lock.as_ref()
            .ok_or(std::io::ErrorKind::NotFound)?
            .try_clone()
    }

    /// Gives up the lock of the agent's cgroup: another agent captures from here on.
    pub fn give_up_lock(&self) {
        let lock = self.cgroup_lock.lock();
        *lock.unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Configuration it was started with.
    #[must_use]
    pub fn config(&self) -> &KernelConfig {
        &self.config
    }

    /// For the kernel logger.
    pub fn programs_mut(&mut self) -> &mut Ebpf {
        &mut self.programs
    }

    fn program_fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, CaptureError> {
        let missing = || CaptureError::Load {
            program: name.to_owned(),
            reason: "not in the object".to_owned(),
        };
        let program = self.programs.program(name).ok_or_else(missing)?;
        program
            .fd()
            .map(|fd| fd.as_fd())
            .map_err(|error| CaptureError::Load {
                program: name.to_owned(),
                reason: chain(&error),
            })
    }

    /// Runs the inbound program on a hand-made `struct bpf_sk_lookup`, for tests.
    ///
    /// # Errors
    /// Those of `BPF_PROG_TEST_RUN`.
    pub fn test_lookup(&self, context: &mut [u8]) -> Result<u32, CaptureError> {
        let fd = self.program_fd("weft_lookup")?;
        bpf::test_run(fd, context).map_err(CaptureError::file("run", "weft_lookup"))
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The form in which programs know addresses.
pub(super) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => Address::from_octets(v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Address::from_octets(v6.octets()),
    }
}

/// The form in which people know them.
pub(super) fn ip(address: &Address) -> IpAddr {
    IpAddr::V6(address.octets().into()).to_canonical()
}

/// Removes every pin of this node. Links go with their pins, programs with their links.
pub fn remove_node_pins(config: &KernelConfig) {
    remove_folder(&config.node_dir());
}

fn remove_folder(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %dir.display(), %error, "cannot remove pins");
    }
}

/// Removes the agent's cgroup; the process goes back to the cgroup root first.
pub fn remove_agent_cgroup(config: &KernelConfig) {
    let dir = config.agent_cgroup();
    if !dir.is_dir() {
        return;
    }
    let own = std::process::id().to_string();
    let inside = fs::read_to_string(dir.join("cgroup.procs"))
        .is_ok_and(|procs| procs.lines().any(|pid| pid == own));
    if inside && let Err(error) = fs::write(config.cgroup_root.join("cgroup.procs"), &own) {
        tracing::warn!(%error, "cannot leave the agent's cgroup");
    }
    if let Err(error) = fs::remove_dir(&dir) {
        tracing::warn!(path = %dir.display(), %error, "cannot remove the agent's cgroup");
    }
}

/// Two agents with one set of pins would take the listeners out of each other's hands, so the one that captures holds
/// a lock on its cgroup (flock(2), which works on any folder). Agents that only drain may be in it, too.
fn lock_agent_cgroup(config: &KernelConfig) -> Result<fs::File, CaptureError> {
    let dir = config.agent_cgroup();
    fs::create_dir_all(&dir).map_err(CaptureError::file("create", &dir))?;
    let file = fs::File::open(&dir).map_err(CaptureError::file("open", &dir))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            let procs = dir.join("cgroup.procs");
            let inside = fs::read_to_string(&procs).map_err(CaptureError::file("read", &procs))?;
            Err(CaptureError::AnotherAgent {
                node: config.node.clone(),
                pids: inside.split_whitespace().collect::<Vec<_>>().join(", "),
                cgroup: dir,
            })
        }
        Err(fs::TryLockError::Error(error)) => Err(CaptureError::file("lock", dir)(error)),
    }
}

/// The kernel's name of a cgroup is the inode of its folder.
pub(super) fn cgroup_id(dir: &Path) -> Result<u64, CaptureError> {
    fs::metadata(dir)
        .map(|metadata| metadata.ino())
        .map_err(CaptureError::file("look at", dir))
}

/// Returns the cgroup's id.
fn enter_agent_cgroup(config: &KernelConfig) -> Result<u64, CaptureError> {
    let dir = config.agent_cgroup();
    let procs = dir.join("cgroup.procs");
    let own = std::process::id().to_string();
    fs::write(&procs, own).map_err(CaptureError::file("enter the cgroup by", &procs))?;
    cgroup_id(&dir)
}

fn check_file_system(
    path: &Path,
    magic: FsType,
    expected: &'static str,
    hint: &'static str,
    option: &'static str,
) -> Result<(), CaptureError> {
    let found = statfs(path).map_err(|errno| CaptureError::file("look at", path)(errno.into()))?;
    if found.filesystem_type() == magic {
        return Ok(());
    }
    Err(CaptureError::WrongFileSystem {
        path: path.to_owned(),
        expected,
        hint,
        option,
    })
}

fn open_dir(path: &Path) -> Result<OwnedFd, CaptureError> {
    fs::File::open(path)
        .map(OwnedFd::from)
        .map_err(CaptureError::file("open", path))
}

fn load<'a, P>(
    programs: &'a mut Ebpf,
    name: &str,
    load: impl FnOnce(&mut P) -> Result<(), aya::programs::ProgramError>,
) -> Result<(), CaptureError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
    P: 'a,
{
    let failed = |reason: String| CaptureError::Load {
        program: name.to_owned(),
        reason,
    };
    let program = programs
        .program_mut(name)
        .ok_or_else(|| failed("not in the object".to_owned()))?;
    let program: &mut P = program.try_into().map_err(|error| failed(chain(&error)))?;
    load(program).map_err(|error| failed(chain(&error)))
}

fn take<M>(programs: &mut Ebpf, name: &'static str) -> Result<M, CaptureError>
where
    M: TryFrom<Map>,
    M::Error: std::fmt::Display,
{
    let map = programs
        .take_map(name)
        .ok_or_else(|| CaptureError::map(name, "not in the object"))?;
    M::try_from(map).map_err(|error| CaptureError::map(name, error))
}

/// Of a long reason: characters shown of its beginning, which says what failed, and of its end, which is where the
/// verifier says why.
const REASON_HEAD_CHARS: usize = 400;
const REASON_TAIL_CHARS: usize = 1600;

/// An error with all its causes, cut in the middle: the verifier's output is in the last one.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    let length = text.chars().count();
    if length <= REASON_HEAD_CHARS + REASON_TAIL_CHARS {
        return text;
    }
    let head = text.chars().take(REASON_HEAD_CHARS);
    let tail = text.chars().skip(length - REASON_TAIL_CHARS);
    head.chain(" … ".chars()).chain(tail).collect()
}
