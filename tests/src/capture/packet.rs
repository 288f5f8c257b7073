//! Ethernet, IP and TCP headers, as far as the oracle needs them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const PROTOCOL_TCP: u8 = 6;
const ETHERNET_HEADER_BYTES: usize = 14;
const IPV6_HEADER_BYTES: usize = 40;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet<'a> {
    /// A TCP segment.
    Tcp(Segment<'a>),
    /// Something that is not judged, with everything behind the Ethernet header.
    Other(&'a [u8]),
    /// An IP packet whose headers make no sense or that hides what it carries (fragments, extension headers).
    Opaque(&'a [u8]),
}

/// A TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Sender.
    pub source: SocketAddr,
    /// Receiver.
    pub destination: SocketAddr,
    /// Sequence number of the first byte of the payload, or of the SYN.
    pub sequence: u32,
    /// Whether SYN is set.
    pub syn: bool,
    /// What it carries.
    pub payload: &'a [u8],
}

/// Reads a frame.
#[must_use]
pub fn parse(frame: &[u8]) -> Packet<'_> {
    let Some(body) = frame.get(ETHERNET_HEADER_BYTES..) else {
        return Packet::Other(frame);
    };
    let parsed = match be16(frame, 12) {
        Some(ETHERTYPE_IPV4) => ipv4(body),
        Some(ETHERTYPE_IPV6) => ipv6(body),
        _ => return Packet::Other(body),
    };
    parsed.unwrap_or(Packet::Opaque(body))
}

fn ipv4(packet: &[u8]) -> Option<Packet<'_>> {
    let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
    // Offset or "more fragments": the segment is not whole (RFC 791 section 3.1).
    if be16(packet, 6)? & 0x3fff != 0 {
        return None;
    }
    let total = usize::from(be16(packet, 2)?);
    // Zero where the capture saw a packet before segmentation offload filled the length in.
    let end = if total == 0 { packet.len() } else { total };
    let payload = packet.get(header_bytes..end)?;
    if *packet.get(9)? != PROTOCOL_TCP {
        return Some(Packet::Other(payload));
    }
    let address = |at: usize| Some(IpAddr::from(Ipv4Addr::from(be32(packet, at)?)));
    tcp(address(12)?, address(16)?, payload)
}

fn ipv6(packet: &[u8]) -> Option<Packet<'_>> {
    let length = usize::from(be16(packet, 4)?);
    let end = if length == 0 {
        packet.len()
    } else {
        IPV6_HEADER_BYTES + length
    };
    let payload = packet.get(IPV6_HEADER_BYTES..end)?;
    match *packet.get(6)? {
        PROTOCOL_TCP => {}
        // UDP, ICMPv6, no next header: not judged. Hop-by-hop options carry multicast listener reports.
        17 | 58 | 59 | 0 => return Some(Packet::Other(payload)),
        _ => return None,
    }
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    tcp(address(8)?, address(24)?, payload)
}

fn tcp(source: IpAddr, destination: IpAddr, segment: &[u8]) -> Option<Packet<'_>> {
    let header_bytes = usize::from(segment.get(12)? >> 4) * 4;
    Some(Packet::Tcp(Segment {
        source: SocketAddr::new(source, be16(segment, 0)?),
        destination: SocketAddr::new(destination, be16(segment, 2)?),
        sequence: be32(segment, 4)?,
        syn: segment.get(13)? & 0x02 != 0,
        payload: segment.get(header_bytes..)?,
    }))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Hand-made frames for the tests of this folder.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// A frame with a TCP segment in it.
    pub fn tcp_frame(
        source: SocketAddr,
        destination: SocketAddr,
        sequence: u32,
        syn: bool,
        payload: &[u8],
    ) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(source.port().to_be_bytes());
        segment.extend(destination.port().to_be_bytes());
        segment.extend(sequence.to_be_bytes());
        segment.extend([
            0,
            0,
            0,
            0,
            5 << 4,
            if syn { 0x02 } else { 0x10 },
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        segment.extend(payload);
        ip_frame(source.ip(), destination.ip(), PROTOCOL_TCP, &segment)
    }

    /// A frame with an IP packet in it.
    pub fn ip_frame(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        let length = u16::try_from(payload.len()).expect("hand-made packets are short");
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend(ETHERTYPE_IPV4.to_be_bytes());
                frame.extend([0x45, 0]);
                frame.extend((length + 20).to_be_bytes());
                frame.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend(ETHERTYPE_IPV6.to_be_bytes());
                frame.extend([0x60, 0, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([protocol, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            _ => panic!("both ends of a hand-made packet are of one family"),
        }
        frame.extend(payload);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    fn pair(source: &str, destination: &str) -> (SocketAddr, SocketAddr) {
        (
            source.parse().expect("an address"),
            destination.parse().expect("an address"),
        )
    }

    #[test]
    fn a_segment_is_read_from_both_families() {
        for (source, destination) in [
            pair("10.0.0.1:40000", "10.0.0.2:15008"),
            pair("[fd00::1]:40000", "[fd00::2]:15008"),
        ] {
            let frame = tcp_frame(source, destination, 77, false, b"payload");
            let expected = Segment {
                source,
                destination,
                sequence: 77,
                syn: false,
                payload: b"payload",
            };
            assert_eq!(parse(&frame), Packet::Tcp(expected));
        }
    }

    #[test]
    fn ethernet_padding_is_no_payload() {
        let (source, destination) = pair("10.0.0.1:1", "10.0.0.2:2");
        let mut frame = tcp_frame(source, destination, 1, false, b"");
        frame.extend([0; 6]);
        assert!(matches!(parse(&frame), Packet::Tcp(segment) if segment.payload.is_empty()));
    }

    #[test]
    fn what_hides_its_content_is_opaque_and_never_panics() {
        let (source, destination) = pair("10.0.0.1:1", "10.0.0.2:2");
        let whole = tcp_frame(source, destination, 1, false, b"secret");
        let mut fragment = whole.clone();
        fragment[20] = 0x20;
        assert!(matches!(parse(&fragment), Packet::Opaque(_)));
        for end in 0..whole.len() {
            assert!(
                !matches!(parse(&whole[..end]), Packet::Tcp(_)),
                "{end} bytes passed for a segment"
            );
        }
        let routed = ip_frame(
            "fd00::1".parse().expect("v6"),
            "fd00::2".parse().expect("v6"),
            43,
            b"x",
        );
        assert!(matches!(parse(&routed), Packet::Opaque(_)));
    }
}
