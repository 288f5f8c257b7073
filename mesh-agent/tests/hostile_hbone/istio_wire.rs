//! Istio's workload API in protobuf, field by field from the wire description. Shares no code with the generated types,
//! so that a wrong number in those cannot hide itself.

use std::net::IpAddr;

/// A message in the making.
#[derive(Debug, Default, Clone)]
pub struct Message(Vec<u8>);

impl Message {
    /// Adds an integer, a boolean or an enumerator.
    pub fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    /// Adds a string or bytes.
    pub fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// Adds a message.
    pub fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, value.0)
    }

    /// What goes over the wire.
    pub fn encoded(self) -> Vec<u8> {
        self.0
    }

    /// A later version of the API may have fields that nobody here knows.
    fn with_unknown_fields(self) -> Self {
        self.number(901, 7)
            .message(902, Self::default().bytes(1, "unknown"))
    }

    fn varint(&mut self, mut value: u64) {
        while value > 0x7f {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// `Address` of a pod of namespace `default` that has HBONE. The trust domain is left to its default.
pub fn workload(
    name: &str,
    node: &str,
    address: IpAddr,
    service: Option<(&str, u16, u16)>,
    policies: &[&str],
) -> Message {
    let mut workload = Message::default()
        .bytes(1, name)
        .bytes(2, "default")
        .bytes(3, octets(address))
        .number(5, 1)
        .bytes(7, name)
        .bytes(9, node)
        .bytes(10, name)
        .bytes(11, "v1")
        .number(12, 2)
        .bytes(13, name)
        .bytes(18, "Kubernetes")
        .bytes(20, uid(name));
    for policy in policies {
        workload = workload.bytes(16, policy);
    }
    if let Some((key, from, to)) = service {
        let port = Message::default()
            .number(1, from.into())
            .number(2, to.into());
        let ports = Message::default().message(1, port);
        let entry = Message::default().bytes(1, key).message(2, ports);
        workload = workload.message(22, entry);
    }
    Message::default().message(1, workload.with_unknown_fields())
}

/// A pod's key, as istiod makes it.
pub fn uid(name: &str) -> String {
    format!("Kubernetes//Pod/default/{name}")
}

/// `Address` of a service of namespace `default`.
pub fn service(name: &str, address: IpAddr, from: u16, to: u16) -> Message {
    let port = Message::default()
        .number(1, from.into())
        .number(2, to.into());
    let vip = Message::default().bytes(2, octets(address));
    let service = Message::default()
        .bytes(1, name)
        .bytes(2, "default")
        .bytes(3, hostname(name))
        .message(4, vip)
        .message(5, port)
        .with_unknown_fields();
    Message::default().message(2, service)
}

/// A service's name in the cluster.
pub fn hostname(name: &str) -> String {
    format!("{name}.default.svc.cluster.local")
}

/// `Authorization` in namespace `default`, for the workloads that list it: refuses a service account.
pub fn deny_account(name: &str, account: &str) -> Message {
    let account = Message::default().bytes(1, "default").bytes(2, account);
    deny(name, Message::default().message(11, account))
}

/// What istiod makes of strict mutual TLS: refuses who has no identity.
pub fn deny_plaintext(name: &str) -> Message {
    let present = Message::default().message(4, Message::default());
    deny(name, Message::default().message(4, present))
}

fn deny(name: &str, what: Message) -> Message {
    let clause = Message::default().message(2, what);
    let rule = Message::default().message(1, clause);
    Message::default()
        .bytes(1, name)
        .bytes(2, "default")
        .number(3, 2)
        .number(4, 1)
        .message(5, rule)
        .with_unknown_fields()
}
