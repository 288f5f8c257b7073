//! The few `bpf(2)` commands that aya has no call for: links that are pinned, adopted and updated in place.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

// include/uapi/linux/bpf.h, enum bpf_cmd
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
/// enum bpf_link_type
const BPF_LINK_TYPE_NETNS: u32 = 5;

/// Where a program is attached (enum bpf_attach_type).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// `sock_ops` on a cgroup.
    SockOps = 3,
    /// `connect4` on a cgroup.
    Connect4 = 10,
    /// `connect6` on a cgroup.
    Connect6 = 11,
    /// `sk_lookup` on a network namespace.
    SkLookup = 36,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

/// The beginning of `struct bpf_link_info`, with its part for cgroups and namespaces.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    /// `cgroup.cgroup_id`, or `netns.netns_ino` and `netns.attach_type`.
    target: [u32; 2],
    /// `cgroup.attach_type`.
    attach_type: u32,
    padding_2: u32,
}

/// What a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Number of its program.
    pub program: u32,
    /// Inode of the cgroup or of the namespace; 0 once the link was detached or its target has gone.
    pub place: u64,
    /// The hook there: an [`AttachType`], or one that is none of ours.
    pub attach_type: u32,
}

/// Attaches a program to a cgroup or a network namespace; the attachment lives as long as the link does.
///
/// # Errors
/// Those of `BPF_LINK_CREATE`: `EPERM` without the capability, `EINVAL` on a kernel without that link type.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    kind: AttachType,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: raw(program),
        target_fd: raw(target),
        attach_type: kind as u32,
        flags: 0,
    };
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program of a link atomically: no packet sees neither or both.
///
/// # Errors
/// Those of `BPF_LINK_UPDATE`: `ENOLINK` when the cgroup or namespace of the link is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(|_| ())
}

/// Gives an object a name in bpffs, which keeps it alive without a process.
///
/// # Errors
/// Those of `BPF_OBJ_PIN`: `EEXIST`, `EINVAL` when the path is not on bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        pathname: name.as_ptr() as u64,
        bpf_fd: raw(object),
        file_flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(|_| ())
}

/// Opens a pinned object.
///
/// # Errors
/// Those of `BPF_OBJ_GET`: `ENOENT` without such a pin.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        pathname: name.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Looks at a link.
///
/// # Errors
/// `EINVAL` when it is none.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info: RawLinkInfo = info_of(link)?;
    let [first, second] = info.target;
    let (place, attach_type) = match info.kind {
        BPF_LINK_TYPE_NETNS => (first.into(), second),
        _ => {
            let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
            let cgroup_id = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
            (cgroup_id, info.attach_type)
        }
    };
    Ok(LinkInfo {
        program: info.program,
        place,
        attach_type,
    })
}

/// Number of a loaded program.
///
/// # Errors
/// `EINVAL` when it is none.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    info_of::<ProgramInfo>(program).map(|info| info.id)
}

/// The kernel writes as much of its structure as `T` has room for (kernel/bpf/syscall.c, `bpf_obj_get_info_by_fd`).
fn info_of<T: Copy + Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = GetInfo {
        bpf_fd: raw(object),
        info_len: size_of::<T>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Runs a program once on a hand-made context (`BPF_PROG_TEST_RUN`) and gives its return value.
///
/// # Errors
/// `EOPNOTSUPP` for program types that cannot be run so.
pub fn test_run(program: BorrowedFd<'_>, context: &mut [u8]) -> io::Result<u32> {
    let mut attr = TestRun {
        prog_fd: raw(program),
        ctx_size_in: context.len() as u32,
        ctx_size_out: context.len() as u32,
        ctx_in: context.as_ptr() as u64,
        ctx_out: context.as_mut_ptr() as u64,
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf<T: Copy>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: pointer and size describe `attr`, a plain struct laid out as the command's part of `union bpf_attr`;
    // pointers inside it outlive the call at every call site above.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as libc::c_int)
    }
}
