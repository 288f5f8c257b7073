//! Every limit of the proxy, with the reason for its default.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

/// Limits of the data path. All counts are per node unless their name says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections, in and out, of one workload. One pod must not use up what the others need.
    pub connections_per_workload: u64,
    /// Connections of the node; [`Limits::for_this_process`] derives it from the descriptor limit.
    pub connections_per_node: usize,
    /// Limits of tunnels.
    pub tunnel: TunnelLimits,
    /// Deadlines.
    pub time: TimeLimits,
}

/// Limits of tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Tunnels that one worker keeps to one pool key.
    pub per_key: usize,
    /// Tunnels that one worker opens to one pool key when streams could share fewer: bulk streams do better on
    /// several TCP connections.
    pub spread: usize,
    /// Streams on the least loaded tunnel at which another is opened, until there are `spread`.
    pub spread_at_streams: usize,
    /// Tunnels that one worker accepts from one source address.
    pub per_source: usize,
    /// Streams that a client puts on one tunnel, or fewer if the peer allows fewer.
    pub client_streams: usize,
    /// Streams that a server advertises (`SETTINGS_MAX_CONCURRENT_STREAMS`).
    pub server_streams: u32,
    /// TLS handshakes that one worker has in flight with one source address.
    pub handshakes_per_source: usize,
}

impl TunnelLimits {
    /// The connection window to grant a peer that may have `streams` open: a window for each. The `h2` crate gives
    /// connection credit back only for bytes that the application took, so with less, streams whose readers stopped
    /// would hold the credit of all others. What a tunnel may hold is bounded by its streams.
    #[must_use]
    pub fn connection_window(streams: u32) -> u32 {
        streams
            .saturating_mul(STREAM_WINDOW_BYTES)
            .clamp(STREAM_WINDOW_BYTES, WINDOW_MAX_BYTES)
    }
}

/// Deadlines and periods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeLimits {
    /// From an application's connect to its upstream being ready, everything included: TCP, TLS, the answer to CONNECT,
    /// and another endpoint. Also for setting up a tunnel, and for dialling a local application.
    pub connect: Duration,
    /// A TLS handshake, including getting the certificate; no longer than what is left of `connect`.
    pub handshake: Duration,
    /// From the end of the handshake to the client's HTTP/2 preface.
    pub first_frame: Duration,
    /// Silence that ends a connection one direction of which has finished.
    pub half_close_idle: Duration,
    /// An unused tunnel is released after this.
    pub tunnel_idle: Duration,
    /// From one keepalive PING to the next.
    pub ping_interval: Duration,
    /// A tunnel whose PING is not answered within this is dead.
    pub ping_timeout: Duration,
}

/// Descriptors that connections never use: listeners, eBPF maps and links, admin, discovery, logs.
pub const RESERVED_DESCRIPTORS: u64 = 512;
/// Descriptors that one connection may need: the accepted socket and the dialled one.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Below this the node would be of no use; a process with fewer descriptors is told so by `weft check`.
pub const MIN_CONNECTIONS_PER_NODE: usize = 64;

/// HTTP/2 stream window, 4 MiB: what Istio's ztunnel uses; 10 Gbit/s at 3 ms. It is the byte budget of one stream: a
/// reader that stops holds no more, which is less than the kernel's own receive buffer would (6 MiB, `tcp_rmem`).
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Largest window of a connection or stream (RFC 9113 section 6.9.1).
pub const WINDOW_MAX_BYTES: u32 = (1 << 31) - 1;
/// Largest frame we accept, 1 MiB: 16 KiB frames cost the `h2` crate a quarter of its throughput (measured).
pub const MAX_FRAME_BYTES: u32 = 1 << 20;
/// Bytes of one stream that wait inside the codec to be sent: two large reads, so that one is encrypted while the
/// next is read. A stalled stream holds this much beyond the peer's window.
pub const STREAM_SEND_BUFFER_BYTES: usize = 512 << 10;
/// Header list that a client accepts in a response: baggage and little else.
pub const CLIENT_HEADER_LIST_BYTES: u32 = 16 << 10;
/// Header list that a server accepts in a request.
pub const SERVER_HEADER_LIST_BYTES: u32 = 64 << 10;
/// Largest segment on a path where larger ones vanish: what the least link of IPv6, 1280 bytes, carries beside the
/// headers of either family (RFC 8200 section 5).
pub const NARROW_SEGMENT_BYTES: u32 = 1220;
/// TCP acknowledges what arrives within a round trip, however busy the peer is. A handshake that is not acknowledged for
/// this long, after the SYN was, did not arrive, and then it was too large for the path.
pub const VANISHED_AFTER: Duration = Duration::from_secs(1);
/// How often that is looked at.
pub const VANISHED_LOOK: Duration = Duration::from_millis(250);
/// Streams that the peer reset before we accepted them; more and the connection is closed (rapid reset,
/// CVE-2023-44487).
pub const MAX_PENDING_RESET_STREAMS: usize = 20;
/// Streams that we remember as reset by us, to ignore frames still on their way.
pub const MAX_LOCAL_RESET_STREAMS: usize = 64;
/// Streams reset by us because of the peer's errors; more and the connection is closed (CVE-2025-8671).
pub const MAX_LOCAL_ERROR_RESETS: usize = 1024;

/// Pause of an accept loop after the system refused (descriptors or memory): long enough not to spin, short enough
/// that accepting resumes well within a second.
pub const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Least time between two log lines of one worker about failures that strangers, or the system, can cause at any rate.
pub const FAILURE_LINES: Duration = Duration::from_secs(1);
/// Accepted sockets that wait for another worker; when it is full they stay where they were accepted.
pub const HANDOVER_QUEUE: usize = 1024;
/// Orders (listen, close) that wait for a worker.
pub const ORDER_QUEUE: usize = 4096;
/// Pause before a worker's task that panicked is begun anew: a bug that comes back at once must not spin.
pub const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// How often a worker looks for idle and dead tunnels.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Shortest time between two evaluations of all live connections: policy edits come in bursts, and a second is
/// promised.
pub const REEVALUATION_PAUSE: Duration = Duration::from_millis(50);
/// Live connections evaluated in one go before bytes are moved again.
pub const REEVALUATION_BATCH: usize = 128;

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_workload: 20_000,
            connections_per_node: 8_192,
            tunnel: TunnelLimits {
                per_key: 64,
                spread: 2,
                spread_at_streams: 4,
                per_source: 256,
                client_streams: 100,
                server_streams: 200,
                handshakes_per_source: 64,
            },
            time: TimeLimits {
                connect: Duration::from_secs(10),
                handshake: Duration::from_secs(10),
                first_frame: Duration::from_secs(10),
                half_close_idle: Duration::from_secs(300),
                tunnel_idle: Duration::from_secs(300),
                ping_interval: Duration::from_secs(10),
                ping_timeout: Duration::from_secs(20),
            },
        }
    }
}

impl Limits {
    /// The defaults, with as many connections as the process has descriptors for.
    #[must_use]
    pub fn for_this_process() -> Self {
        let mut limits = Self::default();
        match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((soft, _)) => limits.connections_per_node = connections_for(soft),
            Err(error) => {
                tracing::warn!(%error, "cannot read the descriptor limit; keeping the default")
            }
        }
        limits
    }

    /// No more connections than the kernel can record (`kernel.flowsMax`): one that it cannot record would not reach its
    /// application.
    #[must_use]
    pub fn with_room_for(mut self, flows: u32) -> Self {
        let flows = usize::try_from(flows).unwrap_or(usize::MAX);
        self.connections_per_node = self.connections_per_node.min(flows);
        self
    }
}

/// Connections that `descriptors` allow, the reserve left out.
fn connections_for(descriptors: u64) -> usize {
    let usable = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_PER_CONNECTION;
    usize::try_from(usable)
        .unwrap_or(usize::MAX)
        .max(MIN_CONNECTIONS_PER_NODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_connections_than_the_kernel_can_record() {
        let limits = Limits::default();
        let few = limits.clone().with_room_for(100);
        assert_eq!(few.connections_per_node, 100);
        assert_eq!(limits.clone().with_room_for(u32::MAX), limits);
    }

    #[test]
    fn connections_leave_the_reserved_descriptors_alone() {
        assert_eq!(connections_for(20_000), 9_744);
        assert_eq!(
            connections_for(RESERVED_DESCRIPTORS),
            MIN_CONNECTIONS_PER_NODE
        );
        assert_eq!(connections_for(0), MIN_CONNECTIONS_PER_NODE);
    }

    #[test]
    fn every_stream_has_a_window_of_its_own() {
        let streams = Limits::default().tunnel.server_streams;
        let window = TunnelLimits::connection_window(streams);
        assert_eq!(window / STREAM_WINDOW_BYTES, streams);
        assert_eq!(TunnelLimits::connection_window(0), STREAM_WINDOW_BYTES);
        assert_eq!(TunnelLimits::connection_window(u32::MAX), WINDOW_MAX_BYTES);
    }
}
