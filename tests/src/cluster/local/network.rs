//! The namespaces of a local cluster and the switch between them.

use anyhow::Result;

use crate::netns;

/// Name of the control plane's namespace.
pub(super) const CONTROL: &str = "ctl";
/// Name of the switch's namespace.
const SWITCH: &str = "switch";
/// Address of the API server.
pub(super) const API_ADDRESS: &str = "172.30.0.10";

/// Address of a node.
pub(super) fn node_address(number: u8) -> String {
    format!("172.30.0.{}", 100_u16 + u16::from(number))
}

/// Addresses of a node's pods.
pub(super) fn pod_range(number: u8) -> String {
    format!("10.42.{number}.0/24")
}

/// Makes the namespaces, joins them, and tells each the way to every node's pods.
pub(super) fn build(name: &str, nodes: &[String]) -> Result<()> {
    let full = |place: &str| format!("{name}-{place}");
    netns::add(&full(SWITCH))?;
    netns::ip_batch(
        &full(SWITCH),
        &[
            "link add bridge0 type bridge".into(),
            "link set bridge0 up".into(),
        ],
    )?;
    let numbered: Vec<(u8, &String)> = (1..).zip(nodes).collect();
    let nodes = numbered
        .iter()
        .map(|(number, node)| (node.as_str(), node_address(*number), Some(*number)));
    let places: Vec<_> = std::iter::once((CONTROL, API_ADDRESS.to_owned(), None))
        .chain(nodes)
        .collect();
    for (place, address, own) in places {
        netns::add(&full(place))?;
        netns::sysctl(&netns::path(&full(place)), &[("ipv4/ip_forward", "1")])?;
        netns::ip_batch(
            &full(SWITCH),
            &[
                format!(
                    "link add {place} type veth peer name eth0 netns {}",
                    full(place)
                ),
                format!("link set {place} master bridge0 up"),
            ],
        )?;
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("addr add {address}/24 dev eth0"),
            "link set eth0 up".to_owned(),
        ];
        if own.is_some() {
            // kube-proxy translates addresses of Services only for packets that have a route.
            lines.push(format!("route add default via {API_ADDRESS}"));
        }
        for (number, _) in &numbered {
            if own != Some(*number) {
                let (range, via) = (pod_range(*number), node_address(*number));
                lines.push(format!("route add {range} via {via}"));
            }
        }
        netns::ip_batch(&full(place), &lines)?;
    }
    Ok(())
}
