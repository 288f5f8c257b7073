//! What a lab shall look like.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Address families in use. The other family is switched off in every namespace of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl Families {
    /// Whether IPv4 is in use.
    #[must_use]
    pub fn has_v4(self) -> bool {
        self != Self::V6
    }

    /// Whether IPv6 is in use.
    #[must_use]
    pub fn has_v6(self) -> bool {
        self != Self::V4
    }
}

/// Where the addresses come from: `pod_v4` a.b.0.0 gives a.b.NODE.POD, `pod_v6` p:: gives p:NODE::POD in its third
/// group, and the same for the link's addresses with the node in the last place.
#[derive(Debug, Clone, Copy)]
pub struct Addressing {
    /// Base of the pods' IPv4 addresses (a /16).
    pub pod_v4: Ipv4Addr,
    /// Base of the pods' IPv6 addresses (a /32).
    pub pod_v6: Ipv6Addr,
    /// Base of the link's IPv4 addresses (a /24).
    pub link_v4: Ipv4Addr,
    /// Base of the link's IPv6 addresses (a /64).
    pub link_v6: Ipv6Addr,
}

impl Default for Addressing {
    fn default() -> Self {
        Self {
            pod_v4: Ipv4Addr::new(10, 244, 0, 0),
            pod_v6: Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0),
            link_v4: Ipv4Addr::new(172, 30, 0, 0),
            link_v6: Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 0),
        }
    }
}

impl Addressing {
    pub(super) fn node(&self, families: Families, node: u8) -> Vec<IpAddr> {
        let [a, b, c, _] = self.link_v4.octets();
        let mut v6 = self.link_v6.segments();
        v6[7] = u16::from(node);
        of_families(families, Ipv4Addr::new(a, b, c, node), v6.into())
    }

    pub(super) fn pod(&self, families: Families, node: u8, pod: u8) -> Vec<IpAddr> {
        let [a, b, ..] = self.pod_v4.octets();
        let mut v6 = self.pod_v6.segments();
        v6[2] = u16::from(node);
        v6[7] = u16::from(pod);
        of_families(families, Ipv4Addr::new(a, b, node, pod), v6.into())
    }
}

fn of_families(families: Families, v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<IpAddr> {
    let mut addresses = Vec::with_capacity(2);
    if families.has_v4() {
        addresses.push(v4.into());
    }
    if families.has_v6() {
        addresses.push(v6.into());
    }
    addresses
}

/// A pod to make.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// Name, unique in the lab (pods and nodes).
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the mesh shall have it.
    pub meshed: bool,
    /// Its addresses; empty for the next free ones.
    pub addresses: Vec<IpAddr>,
}

impl PodSpec {
    /// A meshed pod in namespace `default` whose service account and `app` label are its name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            service_account: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            meshed: true,
            addresses: Vec::new(),
        }
    }

    /// Sets the Kubernetes namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Sets the service account.
    #[must_use]
    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.service_account);
        self
    }

    /// Sets a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Keeps it out of the mesh.
    #[must_use]
    pub fn unmeshed(mut self) -> Self {
        self.meshed = false;
        self
    }

    /// Gives it this address (call twice for two families).
    #[must_use]
    pub fn address(mut self, address: IpAddr) -> Self {
        self.addresses.push(address);
        self
    }
}

/// A node to make.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Name, unique in the lab.
    pub name: String,
    /// Its pods.
    pub pods: Vec<PodSpec>,
}

/// The lab to make.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// What all names begin with; `None` for one that is free.
    pub prefix: Option<String>,
    /// Address families.
    pub families: Families,
    /// Address plan.
    pub addressing: Addressing,
    /// MTU of the link between the nodes, in bytes; `None` for the kernel's default.
    pub link_mtu: Option<u32>,
    /// MTU of the pods' interfaces, in bytes; `None` for the kernel's default.
    pub pod_mtu: Option<u32>,
    /// The nodes.
    pub nodes: Vec<NodeSpec>,
    /// Programs stay when the harness ends (for a lab that is kept to play with).
    pub outlive: bool,
}

impl LabSpec {
    /// A lab without nodes yet.
    #[must_use]
    pub fn new(families: Families) -> Self {
        Self {
            prefix: None,
            families,
            addressing: Addressing::default(),
            link_mtu: None,
            pod_mtu: None,
            nodes: Vec::new(),
            outlive: false,
        }
    }

    /// Adds a node with its pods.
    #[must_use]
    pub fn node(mut self, name: &str, pods: impl IntoIterator<Item = PodSpec>) -> Self {
        self.nodes.push(NodeSpec {
            name: name.to_owned(),
            pods: pods.into_iter().collect(),
        });
        self
    }

    /// Sets the link's MTU, in bytes.
    #[must_use]
    pub fn link_mtu(mut self, bytes: u32) -> Self {
        self.link_mtu = Some(bytes);
        self
    }

    /// Sets the address plan.
    #[must_use]
    pub fn addressing(mut self, addressing: Addressing) -> Self {
        self.addressing = addressing;
        self
    }

    /// Sets the prefix.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = Some(prefix.to_owned());
        self
    }

    /// Lets programs stay when the harness ends.
    #[must_use]
    pub fn outliving(mut self) -> Self {
        self.outlive = true;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_plan() {
        let plan = Addressing::default();
        let text = |addresses: Vec<IpAddr>| {
            addresses
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            text(plan.pod(Families::Dual, 2, 7)),
            ["10.244.2.7", "fd00:244:2::7"]
        );
        assert_eq!(text(plan.pod(Families::V6, 1, 1)), ["fd00:244:1::1"]);
        assert_eq!(text(plan.node(Families::V4, 3)), ["172.30.0.3"]);
    }
}
