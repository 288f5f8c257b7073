//! What capture needs inside a workload's namespace: one policy rule and one local route per address family, and the
//! sysctls that let replies of spoofed connections, and tunnels over paths that lose large packets, find their way.
//! All of it is undone on un-enrolment.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use mesh_ebpf::CAPTURE_MARK;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use serde::{Deserialize, Serialize};

use super::{error::CaptureError, netlink};
use crate::sys::netns::Netns;

/// Routing table of the capture route. Any number that nobody else uses; the kernel knows 253 to 255.
pub const ROUTE_TABLE: u32 = 15_001;
/// Before the main table (32766), after the local one (0).
const RULE_PRIORITY: u32 = 15_001;
/// `lo` in every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// Answers take the mark of what they answer, so that answers to a spoofed client address take the local route back
/// to the agent (Documentation/networking/ip-sysctl.rst). `tcp_fwmark_accept`, one switch for both address families,
/// does so for accepted sockets; `fwmark_reflect` for what the kernel answers without a socket: without it the RST
/// of a closed port leaves the namespace, and a refused connection looks like a timeout.
///
/// `tcp_mtu_probing` makes TCP, over either family, send smaller segments when large ones vanish without ICMP's telling
/// so (RFC 4821; net/ipv4/tcp_timer.c, `tcp_mtu_probing`): after some seconds without an acknowledgement. There is no
/// option of a single socket for it. 1, "only when packets vanish": 2 begins every connection with small segments, those
/// over loopback too.
const SYSCTLS: [&str; 4] = [
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    "/proc/sys/net/ipv4/tcp_mtu_probing",
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
];
/// Room for their values, which are integers.
const SYSCTL_BYTES: usize = 16;
/// All of [`SYSCTLS`] are on with any value but this.
const OFF: &str = "0";
/// The one of [`SYSCTLS`] that a kernel without IPv6 lacks.
const IPV6_SYSCTLS: &str = "/proc/sys/net/ipv6/";

/// Values of the sysctls before capture, by path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FormerSysctls(BTreeMap<String, String>);

impl FormerSysctls {
    /// The kernel's own defaults, for when nobody knows the former values.
    #[must_use]
    pub fn kernel_defaults() -> Self {
        Self(SYSCTLS.map(|path| (path.to_owned(), OFF.to_owned())).into())
    }

    /// What was recorded first counts; `found` has what an earlier agent did not know of.
    #[must_use]
    pub fn or(&self, found: &Self) -> Self {
        let mut all = found.0.clone();
        all.extend(self.0.clone());
        Self(all)
    }
}

/// Addresses of a namespace by family, loopback and link-local ones left out.
pub fn addresses(netns: &Netns) -> Result<Vec<IpAddr>, CaptureError> {
    let failed = |source| CaptureError::Netns {
        path: netns.path().to_owned(),
        source,
    };
    let interfaces = netns
        .run(|| nix::ifaddrs::getifaddrs().map(Iterator::collect::<Vec<_>>))
        .map_err(failed)?
        .map_err(|errno| failed(errno.into()))?;
    let mut found = Vec::new();
    for interface in interfaces {
        let Some(address) = interface.address else {
            continue;
        };
        let ip = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        let usable = match ip {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified() && !v4.is_link_local(),
            IpAddr::V6(v6) => {
                !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local()
            }
        };
        if usable && !found.contains(&ip) {
            found.push(ip);
        }
    }
    Ok(found)
}

/// Installs rule, routes and sysctls. Idempotent: what a previous agent left is taken over. Returns the former values
/// of the sysctls, to be given to [`remove`].
pub async fn install(netns: &Netns, addresses: &[IpAddr]) -> Result<FormerSysctls, CaptureError> {
    let handle = connect(netns)?;
    add_rules(&handle, netns, addresses).await?;
    for route in routes(addresses) {
        handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(|error| failure(netns, "add the capture route")(error.to_string()))?;
    }
    in_namespace(netns, set_sysctls)?
}

/// Puts back what of [`install`] is missing. Returns whether anything was. This is asked of every workload every few
/// seconds, so it takes one visit to the namespace and few system calls.
pub fn mend(netns: &Netns, addresses: &[IpAddr]) -> Result<bool, CaptureError> {
    let rules = families(addresses).map(rule_message);
    let requests = rules.map(RouteNetlinkMessage::NewRule).chain(
        routes(addresses)
            .into_iter()
            .map(RouteNetlinkMessage::NewRoute),
    );
    let (added, sysctls) = in_namespace(netns, || (netlink::add(requests), set_sysctls()))?;
    let added = added.map_err(|error| {
        failure(netns, "put back the capture rule and route")(error.to_string())
    })?;
    let changed = sysctls?.0.values().any(|value| value == OFF);
    Ok(added || changed)
}

async fn add_rules(
    handle: &Handle,
    netns: &Netns,
    addresses: &[IpAddr],
) -> Result<(), CaptureError> {
    for family in families(addresses) {
        let mut added = handle.rule().add();
        *added.message_mut() = rule_message(family);
        let result = added.execute().await;
        done(result, libc::EEXIST).map_err(failure(netns, "add the capture rule"))?;
    }
    Ok(())
}

/// Sets those of the calling thread's namespace. Returns the former values.
fn set_sysctls() -> Result<FormerSysctls, CaptureError> {
    let mut former = FormerSysctls(BTreeMap::new());
    for path in SYSCTLS {
        let value = match read_sysctl(path) {
            Ok(value) => value,
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && path.starts_with(IPV6_SYSCTLS) =>
            {
                continue;
            }
            Err(error) => return Err(CaptureError::file("read", path)(error)),
        };
        if value == OFF {
            fs::write(path, "1").map_err(CaptureError::file("set", path))?;
        }
        former.0.insert(path.to_owned(), value);
    }
    Ok(former)
}

/// The kernel gives the whole value to one read(2) (fs/proc/proc_sysctl.c).
fn read_sysctl(path: &str) -> io::Result<String> {
    let mut buffer = [0; SYSCTL_BYTES];
    let length = fs::File::open(path)?.read(&mut buffer)?;
    let value = buffer.get(..length).unwrap_or_default();
    Ok(String::from_utf8_lossy(value).trim().to_owned())
}

/// Undoes [`install`]. Goes on after a failure, so that as much as possible is undone, and reports the first one.
pub async fn remove(
    netns: &Netns,
    addresses: &[IpAddr],
    former: &FormerSysctls,
) -> Result<(), CaptureError> {
    let handle = connect(netns)?;
    let mut first_error = None;
    for family in families(addresses) {
        let result = handle.rule().del(rule_message(family)).execute().await;
        if let Err(error) =
            done(result, libc::ENOENT).map_err(failure(netns, "remove the capture rule"))
        {
            first_error.get_or_insert(error);
        }
    }
    for route in routes(addresses) {
        let result = handle.route().del(route).execute().await;
        if let Err(error) =
            done(result, libc::ESRCH).map_err(failure(netns, "remove the capture route"))
        {
            first_error.get_or_insert(error);
        }
    }
    // Only paths that we know: the values may come from a file.
    for path in SYSCTLS {
        let Some(value) = former.0.get(path) else {
            continue;
        };
        let restored = in_namespace(netns, || fs::write(path, value))
            .and_then(|written| written.map_err(CaptureError::file("restore", path)));
        if let Err(error) = restored {
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn in_namespace<T>(netns: &Netns, run: impl FnOnce() -> T) -> Result<T, CaptureError> {
    netns.run(run).map_err(|source| CaptureError::Netns {
        path: netns.path().to_owned(),
        source,
    })
}

fn rule_message(family: AddressFamily) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::FwMark(CAPTURE_MARK),
        RuleAttribute::FwMask(CAPTURE_MARK),
        RuleAttribute::Table(ROUTE_TABLE),
        RuleAttribute::Priority(RULE_PRIORITY),
    ];
    rule
}

/// One local default route per family. It names the source, else the kernel would take the destination as source.
fn routes(addresses: &[IpAddr]) -> Vec<RouteMessage> {
    let v4 = addresses.iter().find_map(|a| {
        if let IpAddr::V4(ip) = a {
            Some(*ip)
        } else {
            None
        }
    });
    let v6 = addresses.iter().find_map(|a| {
        if let IpAddr::V6(ip) = a {
            Some(*ip)
        } else {
            None
        }
    });
    let v4 = v4.map(|source| {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .pref_source(source)
            .output_interface(LOOPBACK_INDEX)
            .table_id(ROUTE_TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .protocol(RouteProtocol::Static)
            .build()
    });
    let v6 = v6.map(|source| {
        RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
            .pref_source(source)
            .output_interface(LOOPBACK_INDEX)
            .table_id(ROUTE_TABLE)
            .kind(RouteType::Local)
            .protocol(RouteProtocol::Static)
            .build()
    });
    v4.into_iter().chain(v6).collect()
}

fn families(addresses: &[IpAddr]) -> impl Iterator<Item = AddressFamily> {
    let v4 = addresses
        .iter()
        .any(IpAddr::is_ipv4)
        .then_some(AddressFamily::Inet);
    let v6 = addresses
        .iter()
        .any(IpAddr::is_ipv6)
        .then_some(AddressFamily::Inet6);
    v4.into_iter().chain(v6)
}

/// A netlink socket stays in the namespace it was made in.
fn connect(netns: &Netns) -> Result<Handle, CaptureError> {
    let failed = |source| CaptureError::Netns {
        path: netns.path().to_owned(),
        source,
    };
    let (connection, handle, _) = netns
        .run(rtnetlink::new_connection)
        .map_err(failed)?
        .map_err(failed)?;
    // Ends by itself when the handle is dropped.
    tokio::spawn(connection);
    Ok(handle)
}

/// Whether something was done; `errno` says that there was nothing to do.
fn done(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<bool, String> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code().abs() == errno => {
            Ok(false)
        }
        other => other.map(|()| true).map_err(|error| error.to_string()),
    }
}

fn failure(netns: &Netns, action: &'static str) -> impl FnOnce(String) -> CaptureError {
    let path = netns.path().to_owned();
    move |reason| CaptureError::Route {
        action,
        path,
        reason,
    }
}
