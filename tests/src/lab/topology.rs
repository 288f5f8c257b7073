//! The namespaces and wires of a lab.

use std::{net::IpAddr, path::Path};

use anyhow::{Context as _, Result, bail};

use super::{Families, LINK, Node, POD_INTERFACE};
use crate::{cleanup::BPFFS, netns};

/// Name of the namespace with the bridge that joins more than two nodes.
pub(super) const BRIDGE_NODE: &str = "bridge";

/// Gateway address of every pod, IPv4: link-local, so that it takes nothing from any address plan.
const GATEWAY_V4: &str = "169.254.1.1";

/// Gateway address of every pod, IPv6.
const GATEWAY_V6: &str = "fe80::1";

/// Mounts the BPF file system where nobody has. It stays: others may have come to use it, and it is where every
/// distribution mounts it at boot.
pub(super) fn mount_bpffs() -> Result<()> {
    use nix::{
        mount::{MsFlags, mount},
        sys::statfs::{BPF_FS_MAGIC, statfs},
    };
    let kind =
        statfs(BPFFS).with_context(|| format!("{BPFFS} is missing: does the kernel have BPF?"))?;
    if kind.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("cannot mount bpffs at {BPFFS}"))
}

/// Makes a namespace in which addresses are usable at once: no duplicate address detection.
pub(super) fn make_namespace(name: &str, families: Families, routes: bool) -> Result<()> {
    netns::add(name)?;
    let forward = if routes { "1" } else { "0" };
    let disable_v6 = if families.has_v6() { "0" } else { "1" };
    let path = netns::path(name);
    netns::sysctl(
        &path,
        &[
            ("ipv4/ip_forward", forward),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv6/conf/all/disable_ipv6", disable_v6),
            ("ipv6/conf/default/disable_ipv6", disable_v6),
        ],
    )?;
    if families.has_v6() {
        netns::sysctl(
            &path,
            &[
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/default/dad_transmits", "0"),
                ("ipv6/conf/all/accept_ra", "0"),
                ("ipv6/conf/default/accept_ra", "0"),
                ("ipv6/conf/all/forwarding", forward),
            ],
        )?;
    }
    netns::ip_batch(name, &["link set lo up".to_owned()])
}

/// Joins the nodes: two by a veth pair, more by a bridge in a namespace of its own.
pub(super) fn link_nodes(prefix: &str, nodes: &[Node], mtu: Option<u32>) -> Result<()> {
    match nodes {
        [] => bail!("a lab needs a node"),
        [_] => return Ok(()),
        [first, second] => netns::ip_batch(
            &namespace_of(first)?,
            &[format!(
                "link add {LINK} type veth peer name {LINK} netns {}",
                namespace_of(second)?
            )],
        )?,
        many => bridge(prefix, many, mtu)?,
    }
    let mtu = mtu.map_or(String::new(), |bytes| format!(" mtu {bytes}"));
    for node in nodes {
        let mut lines = vec![format!("link set {LINK}{mtu} up")];
        for address in &node.addresses {
            let length = if address.is_ipv4() { 24 } else { 64 };
            lines.push(format!(
                "addr add {address}/{length} dev {LINK}{}",
                no_dad(*address)
            ));
        }
        netns::ip_batch(&namespace_of(node)?, &lines)?;
    }
    Ok(())
}

fn bridge(prefix: &str, nodes: &[Node], mtu: Option<u32>) -> Result<()> {
    let name = format!("{prefix}-{BRIDGE_NODE}");
    make_namespace(&name, Families::V4, false)?;
    let mtu = mtu.map_or(String::new(), |bytes| format!(" mtu {bytes}"));
    let mut lines = vec![
        "link add br0 type bridge".to_owned(),
        "link set br0 up".to_owned(),
    ];
    for node in nodes {
        let port = format!("port{}", node.index);
        lines.push(format!(
            "link add {port} type veth peer name {LINK} netns {}",
            namespace_of(node)?
        ));
        lines.push(format!("link set {port} master br0{mtu} up"));
    }
    netns::ip_batch(&name, &lines)
}

/// Wires a pod to its node, and tells every node the way to it. Routes are replaced, not added, because an address
/// may have belonged to a pod that has gone or lives elsewhere now.
pub(super) fn attach_pod(
    namespace: &str,
    nodes: &[Node],
    home: usize,
    number: u8,
    addresses: &[IpAddr],
    mtu: Option<u32>,
) -> Result<()> {
    let node = nodes.get(home).context("the pod's node exists")?;
    let outside = format!("pod{number}");
    let mtu = mtu.map_or(String::new(), |bytes| format!(" mtu {bytes}"));
    let mut at_node = vec![
        format!("link add {outside} type veth peer name {POD_INTERFACE} netns {namespace}"),
        format!("link set {outside}{mtu} up"),
    ];
    let mut at_pod = vec![format!("link set {POD_INTERFACE}{mtu} up")];
    for &address in addresses {
        let (gateway, length) = if address.is_ipv4() {
            (GATEWAY_V4, 32)
        } else {
            (GATEWAY_V6, 128)
        };
        at_node.push(format!(
            "addr add {gateway}/{} dev {outside}{}",
            gateway_length(address),
            no_dad(address)
        ));
        let source = node
            .addresses
            .iter()
            .find(|own| own.is_ipv4() == address.is_ipv4() && nodes.len() > 1);
        let source = source.map_or(String::new(), |own| format!(" src {own}"));
        at_node.push(format!(
            "route replace {address}/{length} dev {outside}{source}"
        ));
        at_pod.push(format!(
            "addr add {address}/{length} dev {POD_INTERFACE}{}",
            no_dad(address)
        ));
        at_pod.push(format!(
            "route add default via {gateway} dev {POD_INTERFACE} onlink src {address}"
        ));
    }
    netns::ip_batch(&namespace_of(node)?, &at_node)?;
    netns::ip_batch(namespace, &at_pod)?;
    for other in nodes.iter().filter(|other| other.index != node.index) {
        let lines = addresses
            .iter()
            .map(|address| route_via(*address, node))
            .collect::<Result<Vec<_>>>()?;
        netns::ip_batch(&namespace_of(other)?, &lines)?;
    }
    Ok(())
}

fn route_via(address: IpAddr, node: &Node) -> Result<String> {
    let via = node
        .addresses
        .iter()
        .find(|own| own.is_ipv4() == address.is_ipv4())
        .with_context(|| {
            format!(
                "node {} has no address of the family of {address}",
                node.name
            )
        })?;
    let length = if address.is_ipv4() { 32 } else { 128 };
    Ok(format!(
        "route replace {address}/{length} via {via} dev {LINK}"
    ))
}

fn gateway_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 64 }
}

fn no_dad(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "" } else { " nodad" }
}

fn namespace_of(node: &Node) -> Result<String> {
    name_of(&node.netns)
}

fn name_of(netns: &Path) -> Result<String> {
    let name = netns.file_name().and_then(|name| name.to_str());
    Ok(name.context("namespaces of the lab have names")?.to_owned())
}
