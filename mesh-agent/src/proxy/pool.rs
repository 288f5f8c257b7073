//! Tunnels of one worker, shared by connections that agree in everything that the peer sees or that we verified:
//! whose identity we show, whose we accept, where we dial, from where, and by which roots we judge.
//!
//! One set-up at a time per key: later callers wait for it. The pool belongs to one thread; how a tunnel is made is
//! the [`Connector`]'s business.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use mesh_api::identity::Identity;
use tokio::{sync::Notify, time::Instant};

use super::{
    fair,
    limits::{TimeLimits, TunnelLimits},
    tunnel::TunnelError,
};
use crate::sys::netns::NetnsCookie;

/// What two connections must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose certificate we show.
    pub source: Identity,
    /// Whose certificate we accept.
    pub expected: Arc<[Identity]>,
    /// The peer's tunnel port.
    pub destination: SocketAddr,
    /// The namespace that is dialled from.
    pub netns: NetnsCookie,
    /// The source workload's address, where it has several (`None`: the kernel chooses).
    pub source_address: Option<IpAddr>,
    /// The roots that the peer is judged by.
    pub roots: [u8; 32],
}

/// What the pool asks of a tunnel.
pub trait Pooled: Clone + 'static {
    /// Whether new streams can be opened.
    fn is_open(&self) -> bool;
    /// Streams that the peer allows at a time.
    fn peer_streams(&self) -> usize;
}

/// Something that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolEvent {
    /// A connection found a tunnel.
    Hit,
    /// A connection needed a new tunnel.
    Miss,
    /// A connection begins to wait for a tunnel.
    Waits,
    /// It waits no more.
    WaitsNoMore,
    /// So many tunnels were thrown out.
    Evicted(usize),
    /// A key has as many tunnels as it may.
    Full,
}

/// Makes tunnels.
pub trait Connector: 'static {
    /// What is needed beside the key: the workload and its certificate.
    type Context: Clone + 'static;
    /// What it makes.
    type Tunnel: Pooled;

    /// Dials, shakes hands and verifies. Has its own deadline.
    ///
    /// # Errors
    /// [`TunnelError`] says which step failed.
    fn connect(
        &self,
        key: &PoolKey,
        context: &Self::Context,
    ) -> impl Future<Output = Result<Self::Tunnel, TunnelError>>;

    /// Whether a tunnel that was made with `old` may carry new streams of a connection that has `new`: not after
    /// the certificate was renewed.
    fn interchangeable(old: &Self::Context, new: &Self::Context) -> bool;

    /// Counts.
    fn note(&self, event: PoolEvent);
}

/// The tunnels of one worker.
pub struct Pool<C: Connector> {
    connector: C,
    limits: TunnelLimits,
    idle: std::time::Duration,
    entries: RefCell<HashMap<PoolKey, Rc<Entry<C>>>>,
}

struct Entry<C: Connector> {
    tunnels: RefCell<Vec<Rc<Slot<C>>>>,
    connecting: Cell<bool>,
    /// The latest set-up's error, and how many set-ups there were.
    outcome: RefCell<(u64, Option<TunnelError>)>,
    changed: Notify,
}

struct Slot<C: Connector> {
    tunnel: C::Tunnel,
    context: C::Context,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    /// Gets no new streams.
    retired: Cell<bool>,
}

impl<C: Connector> Slot<C> {
    fn usable(&self, context: &C::Context) -> bool {
        self.tunnel.is_open() && !self.retired.get() && C::interchangeable(&self.context, context)
    }
}

/// A tunnel, and the right to one stream in it.
pub struct Lease<C: Connector> {
    slot: Rc<Slot<C>>,
}

impl<C: Connector> Lease<C> {
    /// The tunnel.
    #[must_use]
    pub fn tunnel(&self) -> &C::Tunnel {
        &self.slot.tunnel
    }

    /// Keeps new streams off the tunnel; those that are on it stay until they or it end.
    pub fn retire(&self) {
        self.slot.retired.set(true);
    }
}

impl<C: Connector> Drop for Lease<C> {
    fn drop(&mut self) {
        self.slot
            .streams
            .set(self.slot.streams.get().saturating_sub(1));
        self.slot.idle_since.set(Instant::now());
    }
}

impl<C: Connector> Pool<C> {
    /// An empty pool.
    #[must_use]
    pub fn new(connector: C, limits: &TunnelLimits, time: &TimeLimits) -> Rc<Self> {
        Rc::new(Self {
            connector,
            limits: limits.clone(),
            idle: time.tunnel_idle,
            entries: RefCell::new(HashMap::new()),
        })
    }

    /// A tunnel with room for one more stream: one that is there, or a new one.
    ///
    /// # Errors
    /// Those of the connector; [`TunnelError::Limit`] when this key has as many tunnels as it may.
    pub async fn lease(
        self: &Rc<Self>,
        key: &PoolKey,
        context: &C::Context,
    ) -> Result<Lease<C>, TunnelError> {
        let entry = self.entry(key);
        let mut waits: Option<Waits<'_, C>> = None;
        loop {
            if let Some(lease) = self.lease_open(&entry, context) {
                self.spread(key, &entry, context);
                if waits.is_none() {
                    self.connector.note(PoolEvent::Hit);
                }
                return Ok(lease);
            }
            waits.get_or_insert_with(|| Waits::new(&self.connector));
            // Registered before the set-up can end, so that its end is not missed.
            let changed = entry.changed.notified();
            let before = entry.outcome.borrow().0;
            self.connect(key, &entry, context)?;
            changed.await;
            let outcome = entry.outcome.borrow();
            if outcome.0 != before
                && let Some(error) = &outcome.1
            {
                return Err(error.clone());
            }
        }
    }

    fn entry(&self, key: &PoolKey) -> Rc<Entry<C>> {
        let mut entries = self.entries.borrow_mut();
        if let Some(entry) = entries.get(key) {
            return entry.clone();
        }
        let entry = Rc::new(Entry {
            tunnels: RefCell::default(),
            connecting: Cell::new(false),
            outcome: RefCell::default(),
            changed: Notify::new(),
        });
        entries.insert(key.clone(), entry.clone());
        entry
    }

    /// The least loaded of the usable tunnels; dead ones are evicted on the way.
    fn lease_open(&self, entry: &Entry<C>, context: &C::Context) -> Option<Lease<C>> {
        let mut tunnels = entry.tunnels.borrow_mut();
        let before = tunnels.len();
        tunnels.retain(|slot| {
            slot.tunnel.is_open() && (slot.streams.get() > 0 || slot.usable(context))
        });
        if tunnels.len() < before {
            let gone = before - tunnels.len();
            self.connector.note(PoolEvent::Evicted(gone));
        }
        // A new tunnel's peer has not said yet how many it takes; it will not say more than on its other tunnels. Zero
        // is a tunnel that is to end, and says nothing of others.
        let told = tunnels.iter().map(|slot| slot.tunnel.peer_streams());
        let most = told.filter(|streams| *streams > 0).min();
        let most = self.limits.client_streams.min(most.unwrap_or(usize::MAX));
        let slot = tunnels
            .iter()
            .filter(|slot| slot.usable(context))
            .filter(|slot| slot.streams.get() < most.min(slot.tunnel.peer_streams()))
            .min_by_key(|slot| slot.streams.get())?;
        slot.streams.set(slot.streams.get() + 1);
        Some(Lease { slot: slot.clone() })
    }

    /// Opens another tunnel in the background when those that are there are busy.
    fn spread(self: &Rc<Self>, key: &PoolKey, entry: &Rc<Entry<C>>, context: &C::Context) {
        let least = {
            let tunnels = entry.tunnels.borrow();
            let usable = tunnels.iter().filter(|slot| slot.usable(context));
            if usable.clone().count() >= self.limits.spread {
                return;
            }
            usable.map(|slot| slot.streams.get()).min()
        };
        if least.is_some_and(|streams| streams >= self.limits.spread_at_streams) {
            // A failure is told to nobody: the connection has its tunnel.
            let _ = self.connect(key, entry, context);
        }
    }

    /// Starts a set-up unless one is on its way. It belongs to nobody: a caller that gives up does not end it for
    /// those who wait.
    fn connect(
        self: &Rc<Self>,
        key: &PoolKey,
        entry: &Rc<Entry<C>>,
        context: &C::Context,
    ) -> Result<(), TunnelError> {
        if entry.connecting.get() {
            return Ok(());
        }
        if entry.tunnels.borrow().len() >= self.limits.per_key {
            self.connector.note(PoolEvent::Full);
            return Err(TunnelError::Limit);
        }
        entry.connecting.set(true);
        let (pool, key, context) = (self.clone(), key.clone(), context.clone());
        // What is told when the set-up panics.
        let error = Some(TunnelError::NotTaken);
        let mut settle = Settle {
            entry: entry.clone(),
            error,
        };
        fair::spawn_local(async move {
            let outcome = match pool.connector.connect(&key, &context).await {
                Ok(tunnel) => {
                    let slot = Slot {
                        tunnel,
                        context,
                        streams: Cell::new(0),
                        idle_since: Cell::new(Instant::now()),
                        retired: Cell::new(false),
                    };
                    settle.entry.tunnels.borrow_mut().push(Rc::new(slot));
                    None
                }
                Err(error) => Some(error),
            };
            settle.tell(outcome);
        });
        Ok(())
    }

    /// Releases tunnels that nobody has used for long, and forgets dead ones.
    pub fn sweep(&self, now: Instant) {
        self.entries.borrow_mut().retain(|_, entry| {
            let mut tunnels = entry.tunnels.borrow_mut();
            let before = tunnels.len();
            tunnels.retain(|slot| {
                let unused_for = now.duration_since(slot.idle_since.get());
                let idle =
                    slot.streams.get() == 0 && (slot.retired.get() || unused_for >= self.idle);
                slot.tunnel.is_open() && !idle
            });
            if tunnels.len() < before {
                let gone = before - tunnels.len();
                self.connector.note(PoolEvent::Evicted(gone));
            }
            entry.connecting.get() || !tunnels.is_empty() || Rc::strong_count(entry) > 1
        });
    }

    /// Keys that a new stream would find a tunnel for.
    pub fn open_keys(&self) -> Vec<PoolKey> {
        let entries = self.entries.borrow();
        let open = entries.iter().filter(|(_, entry)| {
            let tunnels = entry.tunnels.borrow();
            tunnels
                .iter()
                .any(|slot| slot.tunnel.is_open() && !slot.retired.get())
        });
        open.map(|(key, _)| key.clone()).collect()
    }

    /// Tunnels that are there.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries
            .borrow()
            .values()
            .map(|entry| entry.tunnels.borrow().len())
            .sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Releases every tunnel; streams in them go on.
    pub fn clear(&self) {
        self.entries.borrow_mut().clear();
    }
}

/// Counts a connection that has to wait for a tunnel, until it has one or gives up.
struct Waits<'a, C: Connector>(&'a C);

impl<'a, C: Connector> Waits<'a, C> {
    fn new(connector: &'a C) -> Self {
        connector.note(PoolEvent::Miss);
        connector.note(PoolEvent::Waits);
        Self(connector)
    }
}

impl<C: Connector> Drop for Waits<'_, C> {
    fn drop(&mut self) {
        self.0.note(PoolEvent::WaitsNoMore);
    }
}

/// Tells those who wait for a set-up how it went, also when it panicked.
struct Settle<C: Connector> {
    entry: Rc<Entry<C>>,
    error: Option<TunnelError>,
}

impl<C: Connector> Settle<C> {
    fn tell(&mut self, error: Option<TunnelError>) {
        self.error = error;
    }
}

impl<C: Connector> Drop for Settle<C> {
    fn drop(&mut self) {
        let mut outcome = self.entry.outcome.borrow_mut();
        *outcome = (outcome.0 + 1, self.error.take());
        drop(outcome);
        self.entry.connecting.set(false);
        self.entry.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
