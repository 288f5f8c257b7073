//! What crosses a process border in Weft: the protobuf and gRPC messages that agents and control planes
//! exchange, the manifests that users write, the messages of the agent's local socket, and the newtypes
//! (identities, names) that all of them share.
//!
//! This crate does no I/O and knows nothing of sockets, the kernel or a particular source of truth.

#![forbid(unsafe_code)]

pub mod handover;
pub mod identity;
pub mod limits;
pub mod local;
pub mod manifest;
pub mod names;
pub mod one_line;
pub mod proto;
