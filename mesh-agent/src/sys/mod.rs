//! System calls that no well-kept crate offers: network namespaces, raw `bpf(2)`, socket options. The only module
//! of the agent, with `capture::maps`, that holds `unsafe` code.
#![allow(unsafe_code)]

pub mod netns;
pub mod socket;
