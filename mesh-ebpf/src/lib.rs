//! The ABI that Weft's eBPF programs share with the agent: keys and values of the maps, and their sizes.
//!
//! `no_std` and without dependencies, so that no offset is written twice. Every struct is `repr(C)` with explicit
//! padding, because the kernel compares map keys byte by byte. A change of layout needs a new [`ABI_VERSION`], which
//! names the folder of the pins: programs and maps of two versions never mix.
#![no_std]
#![deny(unsafe_code)]

/// Names the bpffs folder (`<bpffs root>/weft/v<ABI_VERSION>`).
pub const ABI_VERSION: u32 = 2;

/// Bit of the socket mark that sends a connection through the workload's local route. One bit, so that marks of the
/// application and of the CNI live on beside it.
pub const CAPTURE_MARK: u32 = 0x0800_0000;

/// Enrolled workloads of one node.
pub const WORKLOADS_MAX: u32 = 4096;
/// Addresses of enrolled workloads of one node; several per workload (dual stack, secondary addresses).
pub const ADDRESSES_MAX: u32 = 16_384;
/// Listeners: three classes per workload.
pub const LISTENERS_MAX: u32 = WORKLOADS_MAX * 3;
/// Cached verdicts (LRU: a lost one only means that the agent is asked again).
pub const VERDICTS_MAX: u32 = 65_536;
/// Service addresses without endpoints.
pub const DEAD_MAX: u32 = 16_384;
/// Same-node flows, for as long as they live. Not an LRU: forgetting a live one would put it out of reach of revocation.
/// What does not fit goes by tunnel. The agent may choose another size.
pub const FLOWS_MAX: u32 = 65_536;
/// The agent's own connections to applications are in a map that workloads cannot fill, with room for as many of one
/// agent and as many of the one that it has replaced.
pub const AGENT_FLOWS_PER_FLOW: u32 = 2;
/// Same-node edges counted (LRU, per CPU).
pub const EDGES_MAX: u32 = 8192;
/// Sockets between `connect(2)` and their SYN that go the same-node way (LRU).
pub const FAST_SOCKETS_MAX: u32 = 65_536;

/// How long a flow entry may let a SYN through, nanoseconds: `tcp_syn_retries` = 6 gives up after 127 s
/// (Documentation/networking/ip-sysctl.rst), and an older entry can only belong to an earlier connection.
pub const FLOW_SYN_WINDOW_NS: u64 = 130_000_000_000;

/// An address in IPv6 form, IPv4 ones mapped (RFC 4291, section 2.5.5.2); network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Address {
    /// Sixteen bytes as four words, as the kernel hands them to the programs.
    pub words: [u32; 4],
}

/// Second-last word of an IPv4-mapped address.
pub const V4_MAPPED_WORD: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// From an IPv4 address in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(ip: u32) -> Self {
        Self {
            words: [0, 0, V4_MAPPED_WORD, ip],
        }
    }

    /// From sixteen bytes.
    #[must_use]
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        let mut words = [0; 4];
        let mut i = 0;
        while i < 4 {
            words[i] = u32::from_ne_bytes([
                octets[4 * i],
                octets[4 * i + 1],
                octets[4 * i + 2],
                octets[4 * i + 3],
            ]);
            i += 1;
        }
        Self { words }
    }

    /// The sixteen bytes.
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let mut octets = [0; 16];
        let mut i = 0;
        while i < 4 {
            let word = self.words[i].to_ne_bytes();
            octets[4 * i] = word[0];
            octets[4 * i + 1] = word[1];
            octets[4 * i + 2] = word[2];
            octets[4 * i + 3] = word[3];
            i += 1;
        }
        octets
    }

    /// `127.0.0.0/8`, `0.0.0.0`, `::1` or `::`: never leaves the host.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words;
        if a != 0 || b != 0 {
            return false;
        }
        if c == V4_MAPPED_WORD {
            return d == 0 || u32::from_be(d) >> 24 == 127;
        }
        c == 0 && u32::from_be(d) <= 1
    }

    /// `fe80::/10`: means nothing without an interface, so it is never captured.
    #[inline(always)]
    #[must_use]
    pub const fn is_link_local_v6(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }
}

/// The kernel refuses connections of this workload (and to it) while no agent listens. Without the bit they go on as
/// if there were no mesh.
pub const FLAG_FAIL_CLOSED: u32 = 1;
/// Flows of this workload may go the same-node way (its cgroup carries the flow program).
pub const FLAG_SAME_NODE: u32 = 2;

/// Value of `WORKLOADS` (key: network-namespace cookie) and of `ADDRESSES` (key: [`Address`]).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Workload {
    /// Cookie of the namespace.
    pub cookie: u64,
    /// `FLAG_*`.
    pub flags: u32,
    /// Zero.
    pub padding: u32,
    /// Inode of its cgroup, which names it (`bpf_get_current_ancestor_cgroup_id`); 0 without one.
    pub cgroup: u64,
}

/// Listener of captured outbound connections.
pub const CLASS_OUTBOUND: u32 = 1;
/// Listener of captured inbound plaintext.
pub const CLASS_PLAINTEXT: u32 = 2;
/// Listener of inbound tunnels.
pub const CLASS_TUNNEL: u32 = 3;

/// Key of `LISTENERS`. The kernel removes an entry when the listener's last descriptor is closed: that is how the
/// programs know that the agent is gone.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenerKey {
    /// Namespace of the workload.
    pub cookie: u64,
    /// `CLASS_*`.
    pub class: u32,
    /// Zero.
    pub padding: u32,
}

/// Key of `VERDICTS` and of `EDGES`: who dials what.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EdgeKey {
    /// Namespace of the source.
    pub cookie: u64,
    /// Destination address.
    pub address: Address,
    /// Destination port, host byte order.
    pub port: u32,
    /// Zero.
    pub padding: u32,
}

/// Leave the socket alone.
pub const VERDICT_PASS: u32 = 1;
/// Application to application in the kernel.
pub const VERDICT_SAME_NODE: u32 = 2;
/// Fail `connect(2)` with `EACCES`.
pub const VERDICT_DENIED: u32 = 3;

/// Value of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// The mesh's generation when it was taken; another one voids it.
    pub generation: u64,
    /// End of validity on `CLOCK_MONOTONIC`, nanoseconds.
    pub expires_ns: u64,
    /// Namespace of the destination (same-node verdicts), else 0.
    pub peer_cookie: u64,
    /// `VERDICT_*`.
    pub action: u32,
    /// Zero.
    pub padding: u32,
}

/// Key of `DEAD`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Destination {
    /// Service address.
    pub address: Address,
    /// Port, host byte order.
    pub port: u32,
}

/// Key of `FLOWS` and of `AGENT_FLOWS`: a connection as its client sees it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    /// Client's address.
    pub source: Address,
    /// Server's address.
    pub destination: Address,
    /// Client's port, host byte order.
    pub source_port: u32,
    /// Server's port, host byte order.
    pub destination_port: u32,
}

/// Value of `FLOWS` and of `AGENT_FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Flow {
    /// When its SYN was sent, `CLOCK_MONOTONIC`, nanoseconds.
    pub started_ns: u64,
    /// Namespace of the client; 0 for the agent's own connection to an application.
    pub source_cookie: u64,
    /// Namespace that may accept it.
    pub destination_cookie: u64,
}

/// Value of `FAST_SOCKETS` (key: socket cookie): what `connect(2)` decided, until the source port is known.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FastSocket {
    /// Who dials what.
    pub edge: EdgeKey,
    /// Namespace of the destination.
    pub peer_cookie: u64,
    /// Generation of the verdict. With TCP Fast Open the SYN leaves at the first write, at any time after `connect(2)`
    /// (Documentation/networking/ip-sysctl.rst, `tcp_fastopen`): a verdict that is void by then is none.
    pub generation: u64,
    /// End of the verdict's validity; see [`Verdict::expires_ns`].
    pub expires_ns: u64,
}

/// Value of `EDGES`, per CPU: what same-node flows did.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EdgeCounters {
    /// Connections that were established.
    pub opened: u64,
    /// Established connections that ended.
    pub closed: u64,
    /// Connections that were never established.
    pub failed: u64,
    /// Bytes from client to server of ended connections (`bytes_acked`: SYN and FIN count as one each).
    pub sent_bytes: u64,
    /// Bytes from server to client of ended connections (`bytes_received`: FIN counts as one).
    pub received_bytes: u64,
    /// Segments sent again by ended connections.
    pub retransmits: u64,
    /// Smoothed round-trip time of the last ended connection, microseconds.
    pub rtt_us: u64,
}

/// The only element of `GLOBALS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Globals {
    /// Generation of the mesh; see [`Verdict::generation`].
    pub generation: u64,
}

/// Indices of the per-CPU array `COUNTERS`.
pub mod counter {
    /// Connections captured.
    pub const CAPTURED: u32 = 0;
    /// Connections let through because their destination is outside the mesh.
    pub const PASSED: u32 = 1;
    /// Connections that went the same-node way.
    pub const SAME_NODE: u32 = 2;
    /// Connections refused in `connect(2)` because policy denies them.
    pub const DENIED: u32 = 3;
    /// Connections refused in `connect(2)` because the service has no endpoint.
    pub const NO_ENDPOINT: u32 = 4;
    /// Connections refused because no agent listens (fail closed).
    pub const AGENT_DEAD: u32 = 5;
    /// Connections let through because no agent listens (fail open).
    pub const FAILED_OPEN: u32 = 6;
    /// Inbound connections to an address that is nobody's, refused.
    pub const UNKNOWN_ADDRESS: u32 = 7;
    /// Same-node flows that could not be recorded, hence went by tunnel, and connections of the agent to applications
    /// that could not.
    pub const FLOWS_FULL: u32 = 8;
    /// Inbound connections given to the agent.
    pub const INBOUND: u32 = 9;
    /// How many there are.
    pub const COUNT: u32 = 10;
}

// The layout is what user space and kernel agree on; a mistake must not compile.
const _: () = {
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<Workload>() == 24);
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<EdgeKey>() == 32);
    assert!(size_of::<Verdict>() == 32);
    assert!(size_of::<Destination>() == 20);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 24);
    assert!(size_of::<FastSocket>() == 56);
    assert!(size_of::<EdgeCounters>() == 56);
    assert!(size_of::<Globals>() == 8);
};

#[cfg(feature = "user")]
#[expect(
    unsafe_code,
    reason = "aya asks for a promise that these are plain bytes"
)]
mod user {
    macro_rules! pod {
        ($($name:ident),* $(,)?) => {
            // SAFETY: the type is repr(C), made of integers only and without implicit padding (the size asserts above).
            $(unsafe impl aya::Pod for crate::$name {})*
        };
    }
    pod!(
        Address,
        Workload,
        ListenerKey,
        EdgeKey,
        Verdict,
        Destination,
        FlowKey,
        Flow,
        FastSocket,
        EdgeCounters,
        Globals,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_their_bytes() {
        let octets = [0x20, 1, 0xd, 0xb8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        assert_eq!(Address::from_octets(octets).octets(), octets);
        let mapped = Address::v4(u32::from_ne_bytes([10, 1, 2, 3])).octets();
        assert_eq!(
            mapped,
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]
        );
    }

    #[test]
    fn loopback_and_unspecified_never_leave_the_host() {
        let v4 = |a, b, c, d| Address::v4(u32::from_ne_bytes([a, b, c, d]));
        let v6 = |last| {
            let mut octets = [0; 16];
            octets[15] = last;
            Address::from_octets(octets)
        };
        for yes in [
            v4(127, 0, 0, 1),
            v4(127, 9, 9, 9),
            v4(0, 0, 0, 0),
            v6(0),
            v6(1),
        ] {
            assert!(yes.is_loopback(), "{:?}", yes.octets());
        }
        for no in [v4(10, 0, 0, 1), v4(128, 0, 0, 1), v6(2)] {
            assert!(!no.is_loopback(), "{:?}", no.octets());
        }
    }

    #[test]
    fn link_local_is_fe80_slash_10() {
        let address = |a, b| {
            let mut octets = [0; 16];
            (octets[0], octets[1]) = (a, b);
            Address::from_octets(octets)
        };
        assert!(address(0xfe, 0x80).is_link_local_v6());
        assert!(address(0xfe, 0xbf).is_link_local_v6());
        assert!(!address(0xfe, 0xc0).is_link_local_v6());
        assert!(!address(0xfd, 0x80).is_link_local_v6());
    }
}
