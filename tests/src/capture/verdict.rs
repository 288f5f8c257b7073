//! The verdict over all frames of all links.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, bail};
use serde::Serialize;

use super::{
    packet::{Packet, Segment, parse},
    pcap,
    stream::Stream,
};

/// Port of the tunnels between workloads.
pub const TUNNEL_PORT: u16 = 15008;

/// Most flows named in a verdict; enough to find the leak, short enough to read.
const NAMED_FLOWS_MAX: usize = 20;

/// What crossed the links.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// TCP payload between pods, tunnel port, well-formed TLS records.
    pub tls_bytes: u64,
    /// TCP payload between pods that is not.
    pub plaintext_bytes: u64,
    /// Bytes that could not be judged: not captured from their beginning, fragments, truncated frames.
    pub unjudged_bytes: u64,
    /// TCP payload where at least one end is no pod (agents to the control plane, probes).
    pub other_tcp_bytes: u64,
    /// Frames seen.
    pub frames: u64,
    /// How often each marker text was found in any payload.
    pub markers: BTreeMap<String, u64>,
    /// Flows with plaintext, and how many bytes of it.
    pub plaintext_flows: BTreeMap<String, u64>,
}

impl Verdict {
    /// Whether everything between pods was TLS and everything could be judged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.plaintext_bytes == 0
            && self.unjudged_bytes == 0
            && self.markers.values().all(|count| *count == 0)
    }

    /// Makes sure that everything between pods was TLS, and that there was something to judge.
    ///
    /// # Errors
    /// What was wrong, with the flows.
    pub fn require_tls_only(&self) -> Result<()> {
        if !self.is_clean() {
            bail!("the links carried more than TLS between pods: {self}");
        }
        if self.tls_bytes == 0 {
            bail!("nothing crossed the links between pods: {self}");
        }
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes of TLS, {} of plaintext, {} not judged, {} frames",
            self.tls_bytes, self.plaintext_bytes, self.unjudged_bytes, self.frames
        )?;
        for (marker, count) in self.markers.iter().filter(|(_, count)| **count > 0) {
            write!(f, "; marker {marker:?} seen {count} times")?;
        }
        for (flow, bytes) in &self.plaintext_flows {
            write!(f, "; {bytes} plaintext bytes {flow}")?;
        }
        Ok(())
    }
}

/// Judges frames.
#[derive(Debug)]
pub struct Judge {
    pods: HashSet<IpAddr>,
    markers: Vec<String>,
    streams: HashMap<(SocketAddr, SocketAddr), Stream>,
    plaintext: HashMap<(SocketAddr, SocketAddr), u64>,
    verdict: Verdict,
}

impl Judge {
    /// A judge that knows the pods' addresses and the texts that must not be seen.
    #[must_use]
    pub fn new(pods: impl IntoIterator<Item = IpAddr>, markers: &[&str]) -> Self {
        let markers: Vec<String> = markers.iter().map(|marker| (*marker).to_owned()).collect();
        let verdict = Verdict {
            markers: markers.iter().map(|m| (m.clone(), 0)).collect(),
            ..Verdict::default()
        };
        Self {
            pods: pods.into_iter().collect(),
            markers,
            streams: HashMap::new(),
            plaintext: HashMap::new(),
            verdict,
        }
    }

    /// Takes all frames of a pcap file.
    ///
    /// # Errors
    /// The file is not whole.
    pub fn file(&mut self, file: &[u8]) -> Result<()> {
        for frame in pcap::frames(file)? {
            if frame.truncated {
                self.verdict.unjudged_bytes += frame.bytes.len() as u64;
            }
            self.frame(frame.bytes);
        }
        Ok(())
    }

    /// Takes one frame.
    pub fn frame(&mut self, frame: &[u8]) {
        self.verdict.frames += 1;
        match parse(frame) {
            Packet::Tcp(segment) => {
                self.search(segment.payload);
                self.segment(segment);
            }
            Packet::Other(bytes) => self.search(bytes),
            Packet::Opaque(bytes) => {
                self.search(bytes);
                self.verdict.unjudged_bytes += bytes.len() as u64;
            }
        }
    }

    /// The verdict over everything taken.
    #[must_use]
    pub fn finish(mut self) -> Verdict {
        for (flow, stream) in self.streams {
            let counts = stream.finish();
            self.verdict.tls_bytes += counts.tls_bytes;
            self.verdict.unjudged_bytes += counts.unjudged_bytes;
            if counts.plaintext_bytes > 0 {
                *self.plaintext.entry(flow).or_default() += counts.plaintext_bytes;
            }
        }
        let mut flows: Vec<_> = self.plaintext.into_iter().collect();
        flows.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        self.verdict.plaintext_bytes = flows.iter().map(|(_, bytes)| bytes).sum();
        self.verdict.plaintext_flows = flows
            .into_iter()
            .take(NAMED_FLOWS_MAX)
            .map(|((source, destination), bytes)| (format!("{source} -> {destination}"), bytes))
            .collect();
        self.verdict
    }

    fn segment(&mut self, segment: Segment<'_>) {
        let Segment {
            source,
            destination,
            sequence,
            syn,
            payload,
        } = segment;
        let between_pods =
            self.pods.contains(&source.ip()) && self.pods.contains(&destination.ip());
        if !between_pods {
            self.verdict.other_tcp_bytes += payload.len() as u64;
        } else if source.port() == TUNNEL_PORT || destination.port() == TUNNEL_PORT {
            if syn && let Some(earlier) = self.streams.remove(&(source, destination)) {
                self.reused(source, destination, earlier, sequence);
            }
            self.streams
                .entry((source, destination))
                .or_default()
                .segment(sequence, syn, payload);
        } else if !payload.is_empty() {
            *self.plaintext.entry((source, destination)).or_default() += payload.len() as u64;
        }
    }

    /// A second SYN on the same addresses: the same connection's SYN again, or a new connection with old ports.
    fn reused(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        earlier: Stream,
        sequence: u32,
    ) {
        if earlier.began_at(sequence) {
            self.streams.insert((source, destination), earlier);
            return;
        }
        let counts = earlier.finish();
        self.verdict.tls_bytes += counts.tls_bytes;
        self.verdict.unjudged_bytes += counts.unjudged_bytes;
        if counts.plaintext_bytes > 0 {
            *self.plaintext.entry((source, destination)).or_default() += counts.plaintext_bytes;
        }
    }

    fn search(&mut self, payload: &[u8]) {
        for marker in &self.markers {
            let found = payload
                .windows(marker.len().max(1))
                .filter(|window| *window == marker.as_bytes())
                .count();
            if found > 0 {
                *self.verdict.markers.entry(marker.clone()).or_default() += found as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::packet::testing::*, *};

    const CLIENT: &str = "10.244.1.1:40000";
    const TUNNEL: &str = "10.244.2.1:15008";

    fn judge() -> Judge {
        let pods = ["10.244.1.1", "10.244.2.1", "fd00::1", "fd00::2"]
            .map(|text| text.parse().expect("an address"));
        Judge::new(pods, &["MARKER"])
    }

    fn send(judge: &mut Judge, from: &str, to: &str, sequence: u32, syn: bool, payload: &[u8]) {
        let (from, to) = (
            from.parse().expect("an address"),
            to.parse().expect("an address"),
        );
        judge.frame(&tcp_frame(from, to, sequence, syn, payload));
    }

    #[test]
    fn a_tunnel_is_clean_in_both_directions() -> Result<()> {
        let mut judge = judge();
        for (from, to) in [(CLIENT, TUNNEL), (TUNNEL, CLIENT)] {
            send(&mut judge, from, to, 1, true, b"");
            send(&mut judge, from, to, 2, false, &[22, 3, 1, 0, 2, 9, 9]);
            send(&mut judge, from, to, 9, false, &[23, 3, 3, 0, 1, 9]);
        }
        let verdict = judge.finish();
        assert_eq!(verdict.tls_bytes, 26);
        verdict.require_tls_only()
    }

    #[test]
    fn plaintext_between_pods_is_counted_and_named() {
        let mut judge = judge();
        send(
            &mut judge,
            "[fd00::1]:5000",
            "[fd00::2]:80",
            2,
            false,
            b"GET /",
        );
        send(
            &mut judge,
            CLIENT,
            "10.244.2.1:6379",
            2,
            false,
            b"has a MARKER in it",
        );
        let verdict = judge.finish();
        assert_eq!(verdict.plaintext_bytes, 23);
        assert_eq!(verdict.markers["MARKER"], 1);
        assert_eq!(verdict.plaintext_flows["[fd00::1]:5000 -> [fd00::2]:80"], 5);
        assert!(verdict.require_tls_only().is_err());
    }

    #[test]
    fn traffic_of_others_is_not_judged_but_searched() {
        let mut judge = judge();
        send(
            &mut judge,
            "172.30.0.1:5000",
            "172.30.0.2:15012",
            2,
            false,
            b"MARKER",
        );
        let addresses = (
            "10.244.1.1".parse().expect("v4"),
            "10.244.2.1".parse().expect("v4"),
        );
        judge.frame(&ip_frame(
            addresses.0,
            addresses.1,
            17,
            b"MARKER in a datagram",
        ));
        let verdict = judge.finish();
        assert_eq!((verdict.plaintext_bytes, verdict.other_tcp_bytes), (0, 6));
        assert_eq!(verdict.markers["MARKER"], 2);
    }

    #[test]
    fn an_empty_capture_proves_nothing() {
        assert!(judge().finish().require_tls_only().is_err());
    }

    #[test]
    fn ports_may_be_used_again_by_another_connection() {
        let mut judge = judge();
        for start in [1, 500_000] {
            send(&mut judge, CLIENT, TUNNEL, start, true, b"");
            send(&mut judge, CLIENT, TUNNEL, start, true, b"");
            send(
                &mut judge,
                CLIENT,
                TUNNEL,
                start + 1,
                false,
                &[22, 3, 1, 0, 1, 9],
            );
        }
        let verdict = judge.finish();
        assert_eq!(
            (
                verdict.tls_bytes,
                verdict.plaintext_bytes,
                verdict.unjudged_bytes
            ),
            (12, 0, 0)
        );
    }
}
