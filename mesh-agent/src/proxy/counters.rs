//! What the proxy counts beside connections: limits reached, errors of accept, panics, tunnels. Plain atomics; the
//! metrics endpoint reads them.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters and gauges of the proxy, shared by all workers.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Count,)*
        }

        impl Counters {
            /// Name and value of each, for the metrics endpoint.
            #[must_use]
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// `accept(2)` failed for want of descriptors or memory; each is followed by a pause.
    accept_errors,
    /// Connections reset because the node's limit was reached.
    node_limit,
    /// Connections reset because their workload's limit was reached.
    workload_limit,
    /// Tunnels refused because their source has too many handshakes in flight or too many tunnels.
    source_limit,
    /// TLS or HTTP/2 set-ups that failed or ran out of time, as server.
    handshake_failures,
    /// Connections that ended in a panic of ours.
    panics,
    /// Sockets handed to a less loaded worker.
    handed_over,
    /// Tunnels opened as client.
    tunnels_opened,
    /// Tunnels that could not be opened as client.
    tunnels_failed,
    /// Tunnels open as client (gauge).
    tunnels_open,
    /// Tunnels accepted as server.
    tunnels_accepted,
    /// Live connections closed because a policy changed.
    revoked,
}

/// One counter or gauge.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// One less, for gauges.
    pub fn sub(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
