//! Bytes that may wait in the proxy because somebody does not read, per workload and for the node.
//!
//! A stream whose reader stops holds up to its window here. That window is granted before, so what a workload may come
//! to hold is counted when a direction stops, whole, and taken back when it goes on; idle and flowing connections count
//! nothing. The more of its budget a workload holds, the smaller are the windows of its tunnels from then on:
//! an eighth of what is free, so that eight more stopped streams still fit. Nothing is refused and nothing is dropped:
//! slow readers slow their own writers down earlier.
//!
//! Only numbers live here. [`Stalls`] is fed by the relay, [`Memory::window`] is followed by the tunnels.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    buffers::LARGE_BYTES,
    limits::{
        MemoryLimits, STREAM_SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES, STREAM_WINDOW_MIN_BYTES,
    },
    share::admits,
};
use crate::{
    capture::Holdings,
    telemetry::{Limit, Telemetry},
};

/// Stopped streams that what is free shall still have room for.
const STREAMS_TO_COME: u64 = 8;

/// The window for a stream of a workload that holds `own` of the `used` bytes of the node: a power of two.
#[must_use]
pub fn window(limits: &MemoryLimits, own: u64, used: u64) -> u32 {
    if admits(limits.per_node_bytes, used, own, 0).is_err() {
        return STREAM_WINDOW_MIN_BYTES;
    }
    let free = limits.per_workload_bytes.saturating_sub(own);
    let each = u32::try_from(free / STREAMS_TO_COME).unwrap_or(u32::MAX);
    let whole = each.checked_ilog2().map_or(0, |exponent| 1 << exponent);
    whole.clamp(STREAM_WINDOW_MIN_BYTES, STREAM_WINDOW_BYTES)
}

/// The node's account.
#[derive(Debug)]
pub struct Memory {
    limits: MemoryLimits,
    used: AtomicU64,
    telemetry: Arc<Telemetry>,
}

impl Memory {
    /// An empty account.
    #[must_use]
    pub fn new(limits: MemoryLimits, telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            used: AtomicU64::new(0),
            telemetry,
        })
    }

    /// What a direction of `holder` may hold was `before` and is `now`.
    fn change(&self, holder: &Holdings, before: u64, now: u64) {
        let change = |account: &AtomicU64| {
            account.fetch_add(now, Ordering::Relaxed);
            account.fetch_sub(before, Ordering::Relaxed)
        };
        change(&self.used);
        let own = change(&holder.buffered_bytes).saturating_sub(before);
        let used = self.used.load(Ordering::Relaxed);
        let gauge = &self.telemetry.limits.buffered_bytes;
        gauge.set(i64::try_from(used).unwrap_or(i64::MAX));
        let next = window(&self.limits, own, used);
        let last = holder.stream_window_bytes.swap(next, Ordering::Relaxed);
        if next == STREAM_WINDOW_MIN_BYTES && last != next {
            self.telemetry.limits.reached(Limit::BufferedBytes);
        }
    }
}

/// What a relay has on its far side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Far {
    /// A tunnel's stream.
    Stream,
    /// A socket.
    Socket,
}

/// What one connection may hold now.
#[derive(Debug)]
pub struct Stalls {
    memory: Arc<Memory>,
    holder: Arc<Holdings>,
    far: Far,
    up_bytes: Cell<u64>,
    down_bytes: Cell<u64>,
}

impl Stalls {
    /// Of a connection of `holder`, nothing of which is stopped.
    #[must_use]
    pub fn new(memory: &Arc<Memory>, holder: &Arc<Holdings>, far: Far) -> Self {
        Self {
            memory: memory.clone(),
            holder: holder.clone(),
            far,
            up_bytes: Cell::new(0),
            down_bytes: Cell::new(0),
        }
    }

    /// Says which directions are stopped: what the application sent waits for the other side (`up`), or what the other
    /// side sent waits for the application (`down`).
    pub fn set(&self, up: bool, down: bool) {
        self.set_direction(&self.up_bytes, up, || match self.far {
            Far::Stream => STREAM_SEND_BUFFER_BYTES as u64,
            Far::Socket => LARGE_BYTES as u64,
        });
        self.set_direction(&self.down_bytes, down, || match self.far {
            Far::Stream => u64::from(stream_window(&self.holder)),
            Far::Socket => LARGE_BYTES as u64,
        });
    }

    fn set_direction(&self, held: &Cell<u64>, is_stopped: bool, may_hold: impl Fn() -> u64) {
        let now = match (is_stopped, held.get()) {
            (false, _) => 0,
            (true, 0) => may_hold(),
            // The window was granted when it stopped.
            (true, before) => before,
        };
        let before = held.replace(now);
        if before != now {
            self.memory.change(&self.holder, before, now);
        }
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.set(false, false);
    }
}

/// The window that a workload's streams shall have now.
#[must_use]
pub fn stream_window(holder: &Holdings) -> u32 {
    match holder.stream_window_bytes.load(Ordering::Relaxed) {
        // Nothing of it was ever stopped.
        0 => STREAM_WINDOW_BYTES,
        window => window,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits() -> MemoryLimits {
        MemoryLimits {
            per_workload_bytes: 64 * MIB,
            per_node_bytes: 160 * MIB,
        }
    }

    fn memory() -> (Arc<Memory>, Arc<Telemetry>) {
        let telemetry = Telemetry::new("1");
        (Memory::new(limits(), telemetry.clone()), telemetry)
    }

    #[test]
    fn windows_shrink_as_the_budget_is_used_up_and_never_below_the_least() {
        let of = |own_mib: u64| window(&limits(), own_mib * MIB, own_mib * MIB);
        assert_eq!(of(0), STREAM_WINDOW_BYTES);
        assert_eq!(of(32), 4 << 20);
        assert_eq!(of(33), 2 << 20);
        assert_eq!(of(56), 1 << 20);
        assert_eq!(of(63), 128 << 10);
        assert_eq!(of(64), STREAM_WINDOW_MIN_BYTES);
        assert_eq!(of(1000), STREAM_WINDOW_MIN_BYTES);
    }

    #[test]
    fn where_the_node_has_little_left_only_workloads_that_hold_much_get_less() {
        let used = 150 * MIB;
        assert_eq!(window(&limits(), 11 * MIB, used), STREAM_WINDOW_MIN_BYTES);
        assert_eq!(window(&limits(), 0, used), STREAM_WINDOW_BYTES);
    }

    #[test]
    fn a_thousand_slow_readers_stay_within_the_budget_and_a_least_window_each() {
        let (memory, telemetry) = memory();
        let (slow, neighbour) = (Arc::new(Holdings::default()), Arc::new(Holdings::default()));
        let stalls: Vec<_> = (0..1000)
            .map(|_| {
                let stalls = Stalls::new(&memory, &slow, Far::Stream);
                stalls.set(false, true);
                stalls
            })
            .collect();
        let held = slow.buffered_bytes.load(Ordering::Relaxed);
        let least = u64::from(STREAM_WINDOW_MIN_BYTES);
        assert!(held <= limits().per_workload_bytes + 1000 * least, "{held}");
        assert_eq!(stream_window(&neighbour), STREAM_WINDOW_BYTES);
        let text = telemetry.render();
        let line = "weft_limit_reached_total{limit=\"buffered_bytes\"} 1";
        assert!(text.contains(line), "told once, not a thousand times");
        assert!(text.contains(&format!("weft_buffered_bytes {held}")));
        drop(stalls);
        assert_eq!(slow.buffered_bytes.load(Ordering::Relaxed), 0);
        assert_eq!(stream_window(&slow), STREAM_WINDOW_BYTES, "as before");
    }

    #[test]
    fn a_stopped_direction_counts_once_and_what_it_was_granted() {
        let (memory, _) = memory();
        let holder = Arc::new(Holdings::default());
        let stalls = Stalls::new(&memory, &holder, Far::Stream);
        stalls.set(false, true);
        holder
            .stream_window_bytes
            .store(STREAM_WINDOW_MIN_BYTES, Ordering::Relaxed);
        stalls.set(true, true);
        let both = u64::from(STREAM_WINDOW_BYTES) + STREAM_SEND_BUFFER_BYTES as u64;
        assert_eq!(holder.buffered_bytes.load(Ordering::Relaxed), both);
        stalls.set(true, false);
        let up = STREAM_SEND_BUFFER_BYTES as u64;
        assert_eq!(holder.buffered_bytes.load(Ordering::Relaxed), up);
    }
}
