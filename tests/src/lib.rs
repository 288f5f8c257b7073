//! The lab: nodes and pods as network namespaces of one machine, and what tests, demo and bench need in it.
//!
//! This crate owns the making and removing of namespaces, cgroups and processes, the oracles that judge what crossed
//! the wire, and the helpers that start Weft's own programs in it. It must not know how Weft works inside: it uses
//! the programs as a user does, by command line, manifests, metrics and sockets.
//!
//! Everything here needs root. Everything a [`lab::Lab`] makes bears its prefix and goes away when it is dropped, on
//! a panic, and on SIGINT or SIGTERM; [`cleanup::remove`] (`lab cleanup --prefix P`) removes what a killed run left.

#![forbid(unsafe_code)]

pub mod bpf;
pub mod capture;
pub mod cgroup;
pub mod chart;
pub mod cleanup;
pub mod cluster;
pub mod conversation;
pub mod firewall;
pub mod histogram;
pub mod http;
pub mod inventory;
pub mod lab;
pub mod load;
pub mod manifests;
pub mod memory;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod oci;
pub mod paths;
pub mod peer;
pub mod process;
pub mod programs;
pub mod promql;
pub mod seqecho;
pub mod skip;
pub mod sockets;
pub mod successor;
pub mod wait;
pub mod world;
