//! Every limit of the proxy, with the reason for its default.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use crate::config::AgentConfig;

/// Limits of the data path. All counts are per node unless their name says otherwise. docs/limits.md lists them with
/// their metrics and tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections, in and out, of one workload. One pod must not use up what the others need.
    pub connections_per_workload: u64,
    /// Connections, in and out, of all workloads: no more than the kernel can record (`kernel.flowsMax`), because one
    /// that it cannot record would not reach its application. Shared like descriptors.
    pub connections_per_node: u64,
    /// Descriptors that connections, tunnels and listeners of all workloads may hold;
    /// [`Limits::for_this_process`] derives it from the descriptor limit. How they are shared: [`super::share`].
    pub descriptors: u64,
    /// Bytes that may wait here.
    pub memory: MemoryLimits,
    /// Limits of tunnels.
    pub tunnel: TunnelLimits,
    /// Deadlines.
    pub time: TimeLimits,
}

/// Bytes that may wait here because somebody does not read. How they bound what is held: [`super::memory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Of one workload: sixty-four stopped streams with whole windows.
    pub per_workload_bytes: u64,
    /// Of the node: four workloads with as much.
    pub per_node_bytes: u64,
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
    /// TLS handshakes that one worker has in flight for one workload, whoever they are with: strangers hold a place
    /// of the workload that they dial until they have shown who they are.
    pub handshakes_per_workload: usize,
    /// Tunnels that one workload has open to peers: two on each of two workers to a thousand peers.
    pub outbound_per_workload: u64,
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

/// Descriptors that connections never use: eBPF maps and links, admin, discovery, certificates, logs, and an enrolment
/// on its way.
pub const RESERVED_DESCRIPTORS: u64 = 512;
/// Below this the node would be of no use; a process with fewer descriptors is told so by `weft check`.
pub const MIN_DESCRIPTORS: u64 = 128;

/// HTTP/2 stream window, 4 MiB: what Istio's ztunnel uses; 10 Gbit/s at 3 ms. It is the byte budget of one stream: a
/// reader that stops holds no more, which is less than the kernel's own receive buffer would (6 MiB, `tcp_rmem`).
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Least HTTP/2 stream window, 64 KiB: what streams of a workload get that has used up its bytes. It is the protocol's
/// own initial window (RFC 9113 section 6.9.2), which every peer works with.
pub const STREAM_WINDOW_MIN_BYTES: u32 = 64 << 10;
/// Connection window that our own codec grants, 16 MiB: what may be on its way for all streams of a tunnel, 10 Gbit/s
/// at 12 ms. It is given back on receipt, so that streams whose readers stopped hold nothing of it; what they hold is
/// bounded by their own windows.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
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
/// Streams that the `h2` crate remembers as reset by us, to ignore frames still on their way.
pub const MAX_LOCAL_RESET_STREAMS: usize = 64;
/// Streams reset by us because of the peer's errors; more and the connection is closed (CVE-2025-8671).
pub const MAX_LOCAL_ERROR_RESETS: usize = 1024;
/// CONTINUATION frames of one header block: four of the smallest maximum size hold the largest list we take; more is
/// an attack (CVE-2024-27316).
pub const MAX_CONTINUATION_FRAMES: usize = 16;
/// Streams that our own codec remembers as reset by us, to ignore frames still on their way: five times as many as may be
/// open, so that a tunnel survives the reset of all of them under load. 4 KiB at most.
pub const MAX_IGNORED_STREAMS: usize = 1024;
/// Parameters in one SETTINGS frame: six are known, the rest leaves room for extensions.
pub const MAX_SETTINGS_PER_FRAME: usize = 64;
/// Frames in a second that carry nothing (PING, SETTINGS, GOAWAY, DATA that is empty or all padding, PRIORITY, unknown
/// ones, interim answers, resets of nothing, tiny credit) without a byte or a request between them, nor one of ours
/// (CVE-2019-9512, 9513, 9515, 9518). Honest peers send a few.
pub const MAX_EMPTY_FRAMES_PER_SECOND: u32 = 1000;
/// Credit below this is tiny: an honest peer gives it only for bytes that we have just sent.
pub const SMALL_CREDIT_BYTES: u32 = 1024;
/// Queued answers to PING, SETTINGS and mistakes at which a peer counts as one that does not read them.
pub const MAX_QUEUED_ANSWER_BYTES: usize = 64 << 10;
/// Reads up to this go to the tunnel with those of other streams in one record; larger ones are sent at once.
pub const SMALL_SEND_BYTES: usize = 4 << 10;
/// Streams that sent within this are taken to send again: then a small send waits for theirs, one turn of the worker.
pub const CROWD_WINDOW: Duration = Duration::from_millis(1);

/// Connections that a listener accepts, or refuses, before other tasks have their turn: some 20 µs each.
pub const ACCEPT_BATCH: usize = 16;
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
/// How often the certificate of an open tunnel's client is judged again: it may have ended, or its root been withdrawn.
pub const REJUDGE_INTERVAL: Duration = Duration::from_secs(5);
/// Shortest time between two evaluations of all live connections: policy edits come in bursts, and a second is
/// promised.
pub const REEVALUATION_PAUSE: Duration = Duration::from_millis(50);
/// Live connections evaluated in one go before bytes are moved again.
pub const REEVALUATION_BATCH: usize = 128;

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_workload: 20_000,
            connections_per_node: mesh_ebpf::FLOWS_MAX.into(),
            descriptors: 16_384,
            memory: MemoryLimits {
                per_workload_bytes: 256 << 20,
                per_node_bytes: 1 << 30,
            },
            tunnel: TunnelLimits {
                per_key: 64,
                spread: 2,
                spread_at_streams: 4,
                per_source: 256,
                client_streams: 100,
                server_streams: 200,
                handshakes_per_source: 64,
                handshakes_per_workload: 1024,
                outbound_per_workload: 4096,
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
    /// What is configured, with as many descriptors as the process may open.
    #[must_use]
    pub fn for_this_process(config: &AgentConfig) -> Self {
        let proxy = &config.proxy;
        let mut limits = Self {
            connections_per_workload: proxy.max_connections_per_workload,
            connections_per_node: u64::from(config.kernel.flows_max),
            memory: MemoryLimits {
                per_workload_bytes: proxy.max_buffered_bytes_per_workload,
                per_node_bytes: proxy.max_buffered_bytes,
            },
            ..Self::default()
        };
        let ping = &proxy.tunnel_ping;
        limits.time.ping_interval = Duration::from_secs(ping.interval_seconds);
        limits.time.ping_timeout = Duration::from_secs(ping.timeout_seconds);
        match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((soft, _)) => limits.descriptors = descriptors_of(soft),
            Err(error) => {
                tracing::warn!(%error, "cannot read the descriptor limit; keeping the default")
            }
        }
        limits
    }
}

/// Of the descriptors that the process may open, those that are for workloads.
fn descriptors_of(process: u64) -> u64 {
    process
        .saturating_sub(RESERVED_DESCRIPTORS)
        .max(MIN_DESCRIPTORS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_connections_than_the_kernel_can_record() {
        let mut config = AgentConfig::default();
        config.kernel.flows_max = 100;
        assert_eq!(Limits::for_this_process(&config).connections_per_node, 100);
    }

    #[test]
    fn workloads_leave_the_reserved_descriptors_alone() {
        assert_eq!(descriptors_of(20_000), 19_488);
        assert_eq!(descriptors_of(RESERVED_DESCRIPTORS), MIN_DESCRIPTORS);
        assert_eq!(descriptors_of(0), MIN_DESCRIPTORS);
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
