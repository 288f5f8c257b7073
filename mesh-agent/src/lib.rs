//! The node agent: it enrols workloads, steers their connections to itself in the kernel, and proxies them with
//! mutual TLS, balancing, policy and telemetry.
//!
//! Borders: `capture` owns every kernel object (programs, maps, links, rules, routes, listeners); `discovery` owns
//! what exists in the mesh; `policy` decides; `identity` owns keys and certificates; `proxy` moves bytes; `telemetry`
//! counts; `admin` answers questions; `lifecycle` starts, adopts and stops. Only `sys` and `capture::maps` hold
//! `unsafe` code.

#![deny(unsafe_code)]

pub mod admin;
pub mod capture;
pub mod config;
pub mod discovery;
pub mod identity;
pub mod lifecycle;
pub mod policy;
pub mod proxy;
pub mod sys;
pub mod telemetry;
