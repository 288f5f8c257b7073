//! What capture needs inside a workload's namespace: one policy rule and one local route per address family, and the
//! sysctls that let replies of spoofed connections find their way. All of it is undone on un-enrolment.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use mesh_ebpf::CAPTURE_MARK;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::error::CaptureError;
use crate::sys::netns::Netns;

/// Routing table of the capture route. Any number that nobody else uses; the kernel knows 253 to 255.
pub const ROUTE_TABLE: u32 = 15_001;
/// Before the main table (32766), after the local one (0).
const RULE_PRIORITY: u32 = 15_001;
/// `lo` in every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// Switches that send replies to a spoofed client address over the local route back to the agent
/// (Documentation/networking/ip-sysctl.rst): accepted sockets take the mark of their SYN, for both address families, and
/// so do the RST and ICMP messages that no socket sends. Without the latter a port on which nothing listens would look
/// like a black hole to the agent.
const MARK_SWITCHES: [&str; 3] = [
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
];

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
pub async fn install(netns: &Netns, addresses: &[IpAddr]) -> Result<String, CaptureError> {
    let handle = connect(netns)?;
    for family in families(addresses) {
        let added = handle.rule().add();
        let mut rule = added
            .fw_mark(CAPTURE_MARK)
            .table_id(ROUTE_TABLE)
            .priority(RULE_PRIORITY)
            .action(RuleAction::ToTable);
        rule.message_mut().header.family = family;
        rule.message_mut()
            .attributes
            .push(RuleAttribute::FwMask(CAPTURE_MARK));
        let result = match family {
            AddressFamily::Inet => rule.v4().execute().await,
            _ => rule.v6().execute().await,
        };
        ignore(result, libc::EEXIST).map_err(failure(netns, "add the capture rule"))?;
    }
    for route in routes(addresses) {
        handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(|error| failure(netns, "add the capture route")(error.to_string()))?;
    }
    netns
        .run(switch_on)
        .map_err(|source| CaptureError::Netns {
            path: netns.path().to_owned(),
            source,
        })?
        .map_err(CaptureError::file("set", MARK_SWITCHES[0]))
}

/// Undoes [`install`]. Goes on after a failure, so that as much as possible is undone, and reports the first one.
pub async fn remove(
    netns: &Netns,
    addresses: &[IpAddr],
    former_sysctls: &str,
) -> Result<(), CaptureError> {
    let handle = connect(netns)?;
    let mut first_error = None;
    for family in families(addresses) {
        let result = handle.rule().del(rule_message(family)).execute().await;
        if let Err(error) =
            ignore(result, libc::ENOENT).map_err(failure(netns, "remove the capture rule"))
        {
            first_error.get_or_insert(error);
        }
    }
    for route in routes(addresses) {
        let result = handle.route().del(route).execute().await;
        if let Err(error) =
            ignore(result, libc::ESRCH).map_err(failure(netns, "remove the capture route"))
        {
            first_error.get_or_insert(error);
        }
    }
    let restored = netns
        .run(|| switch_back(former_sysctls))
        .map_err(|source| CaptureError::Netns {
            path: netns.path().to_owned(),
            source,
        })
        .and_then(|written| written.map_err(CaptureError::file("restore", MARK_SWITCHES[0])));
    if let Err(error) = restored {
        first_error.get_or_insert(error);
    }
    first_error.map_or(Ok(()), Err)
}

/// Sets every switch; returns their former values, separated by spaces.
fn switch_on() -> std::io::Result<String> {
    let mut former = Vec::with_capacity(MARK_SWITCHES.len());
    for switch in present_switches() {
        former.push(fs::read_to_string(switch)?.trim().to_owned());
        fs::write(switch, "1")?;
    }
    Ok(former.join(" "))
}

/// Gives every switch its former value; off where none is known.
fn switch_back(former: &str) -> std::io::Result<()> {
    let mut values = former.split_whitespace();
    present_switches().try_for_each(|switch| fs::write(switch, values.next().unwrap_or("0")))
}

/// A kernel booted without IPv6 has no switches for it.
fn present_switches() -> impl Iterator<Item = &'static str> {
    let has_v6 = Path::new("/proc/sys/net/ipv6").is_dir();
    MARK_SWITCHES
        .into_iter()
        .filter(move |switch| has_v6 || !switch.contains("/ipv6/"))
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

fn ignore(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<(), String> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code().abs() == errno => Ok(()),
        other => other.map_err(|error| error.to_string()),
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
