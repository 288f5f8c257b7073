//! Limits of what is told to agents. An agent refuses a resource beyond them, so manifests beyond them are refused before.

/// Most addresses of one workload or service.
pub const ADDRESSES_MAX: usize = 256;
/// Most ports of one service.
pub const PORTS_MAX: usize = 4_096;
/// Most values of one policy: rules, sources and operations count one each, and so do their fields' values.
pub const VALUES_PER_POLICY_MAX: usize = 10_000;
