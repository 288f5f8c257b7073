//! The plaintext oracle: a capture on every link between nodes, and a verdict on every byte that crossed it.
//!
//! Between pods, bytes of TCP from or to port 15008 must be well-formed TLS records that begin with a handshake;
//! every other byte of TCP payload is plaintext. UDP, ICMP and neighbour discovery are not judged, but every payload
//! of every protocol is searched for the marker texts that a test lets its applications send.

mod link;
mod packet;
mod pcap;
mod stream;
mod verdict;

pub use self::{
    link::LinkCapture,
    verdict::{Judge, TUNNEL_PORT, Verdict},
};
