//! Workers: one thread and one current-thread runtime per core. A connection lives on one worker from accept to
//! close; its pool, registry and counts belong to that thread.

use std::{
    cell::RefCell,
    future::Future,
    net::{IpAddr, TcpListener},
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use futures::FutureExt;
use mesh_api::names::NamespacedName;
use prometheus::IntCounter;
use tokio::{
    sync::{Notify, mpsc},
    task::LocalSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    ProxyContext,
    accept::{self, Accepted, Kind},
    balance::{BalanceLimits, Balancer},
    connect::{Dialer, Source},
    fair::{Fair, Processor},
    handover::{HeldTunnel, Lent, Shown},
    limits::{
        FAILURE_LINES, HANDOVER_QUEUE, ORDER_QUEUE, REEVALUATION_BATCH, REEVALUATION_PAUSE,
        RESTART_PAUSE, SWEEP_INTERVAL,
    },
    memory::{Far, Memory, Stalls},
    pool::{Pool, PoolKey},
    registry::Registry,
    room::{Need, Place, Refused, Room},
    served::{ServeHandle, Served, wait_zero},
    sources::Counts,
};
use crate::{
    capture::{Listeners, LocalWorkload},
    policy::Decision,
    telemetry::{CloseReason, Limit, Telemetry, seldom::Seldom},
};

/// After the drain deadline connections are told to end; this is how long they have for it.
pub(super) const FORCED_CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Why workers cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A thread could not be started. Look at the process limits.
    #[error("cannot start a worker: {0}")]
    Start(#[source] std::io::Error),
    /// A worker has ended or is hopelessly behind with its orders.
    #[error("worker {0} takes no orders")]
    NoOrders(usize),
    /// A worker is hopelessly busy.
    #[error("a worker did not answer within {0:?}")]
    Silent(Duration),
    /// A listener cannot be copied. Look at the limit of descriptors.
    #[error("cannot copy a listener: {0}")]
    Lend(#[source] std::io::Error),
    /// A listener could not be watched when its workload was enrolled; the log of that time says why.
    #[error("a workload has no {0:?} listener")]
    NoListener(Kind),
}

/// All workers. Cheap to clone; the threads end when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Workers {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    stop: CancellationToken,
    threads: Mutex<Vec<JoinHandle<()>>>,
    next_served: AtomicU64,
    next_listener: AtomicUsize,
}

/// What all workers know of each other.
#[derive(Debug)]
pub(super) struct Shared {
    mailboxes: Vec<Mailbox>,
    pub telemetry: Arc<Telemetry>,
    pub room: Arc<Room>,
    pub memory: Arc<Memory>,
    total: AtomicUsize,
    empty: Notify,
}

#[derive(Debug)]
struct Mailbox {
    load: AtomicUsize,
    sockets: mpsc::Sender<Accepted>,
    orders: mpsc::Sender<Order>,
}

#[derive(Debug)]
pub(super) enum Order {
    Listen {
        listener: TcpListener,
        kind: Kind,
        served: Arc<Served>,
    },
    Close {
        served: Option<u64>,
        reason: CloseReason,
    },
    /// Give copies of all listeners.
    Lend(mpsc::Sender<Vec<Result<Lent, WorkerError>>>),
    /// Tell which tunnels are open.
    Tunnels(mpsc::Sender<Vec<HeldTunnel>>),
    /// Have a tunnel open.
    Warm {
        key: Box<PoolKey>,
        source: Box<Source>,
        done: mpsc::Sender<bool>,
    },
    Exit,
}

impl Workers {
    /// Starts `count` workers (at least one).
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn start(count: usize, context: &ProxyContext) -> Result<Self, WorkerError> {
        let (mut mailboxes, mut inboxes) = (Vec::new(), Vec::new());
        for _ in 0..count.max(1) {
            let (sockets, socket_inbox) = mpsc::channel(HANDOVER_QUEUE);
            let (orders, order_inbox) = mpsc::channel(ORDER_QUEUE);
            mailboxes.push(Mailbox {
                load: AtomicUsize::new(0),
                sockets,
                orders,
            });
            inboxes.push((socket_inbox, order_inbox));
        }
        let shared = Arc::new(Shared {
            mailboxes,
            telemetry: context.telemetry.clone(),
            room: Arc::new(Room::new(context.limits.clone(), context.telemetry.clone())),
            memory: Memory::new(context.limits.memory.clone(), context.telemetry.clone()),
            total: AtomicUsize::new(0),
            empty: Notify::new(),
        });
        let inner = Arc::new(Inner {
            shared: shared.clone(),
            stop: CancellationToken::new(),
            threads: Mutex::default(),
            next_served: AtomicU64::new(0),
            next_listener: AtomicUsize::new(0),
        });
        for (index, (sockets, orders)) in inboxes.into_iter().enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(WorkerError::Start)?;
            let (context, shared) = (context.clone(), shared.clone());
            let thread = std::thread::Builder::new()
                .name(format!("weft-worker-{index}"))
                .spawn(move || {
                    LocalSet::new().block_on(&runtime, run(index, context, shared, sockets, orders))
                })
                .map_err(WorkerError::Start)?;
            inner
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(Self { inner })
    }

    /// Serves a workload's listeners until the handle is dropped or stopped.
    ///
    /// # Errors
    /// When a worker takes no orders.
    pub fn serve(
        &self,
        local: Arc<LocalWorkload>,
        listeners: Listeners,
    ) -> Result<ServeHandle, WorkerError> {
        let listening = self.inner.shared.room.enrol(&local);
        let served = Arc::new(Served {
            id: self.inner.next_served.fetch_add(1, Ordering::Relaxed),
            local,
            stop: self.inner.stop.child_token(),
            lost_listener: AtomicBool::new(false),
            live: AtomicUsize::new(0),
            empty: Notify::new(),
            _listeners: listening,
        });
        let handle = ServeHandle {
            served: served.clone(),
            shared: self.inner.shared.clone(),
        };
        let Listeners {
            outbound,
            plaintext,
            tunnel,
        } = listeners;
        for (listener, kind) in [
            (outbound, Kind::Outbound),
            (plaintext, Kind::Plaintext),
            (tunnel, Kind::Tunnel),
        ] {
            let next = self.inner.next_listener.fetch_add(1, Ordering::Relaxed);
            let index = next % self.inner.shared.mailboxes.len();
            self.inner.shared.order(
                index,
                Order::Listen {
                    listener,
                    kind,
                    served: served.clone(),
                },
            )?;
        }
        Ok(handle)
    }

    /// Stops accepting everywhere, lets connections finish until `deadline` has passed, then closes the rest.
    /// Returns how many had to be closed.
    pub async fn drain(&self, deadline: Duration) -> usize {
        self.inner.stop.cancel();
        self.inner.shared.wait_empty(deadline).await;
        let left = self.live();
        if left > 0 {
            self.inner.shared.close(None, CloseReason::Drained);
            self.inner.shared.wait_empty(FORCED_CLOSE_WAIT).await;
        }
        left
    }

    /// Ends the worker threads and waits for them; connections that are left end with them. Blocks.
    pub fn shut_down(&self) {
        self.inner.exit();
        let threads = std::mem::take(
            &mut *self
                .inner
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread had panicked");
            }
        }
    }

    /// How many there are; at least one.
    pub(super) fn count(&self) -> usize {
        self.inner.shared.mailboxes.len()
    }

    pub(super) fn order(&self, index: usize, order: Order) -> Result<(), WorkerError> {
        self.inner.shared.order(index, order)
    }

    /// Connections and tunnels that were accepted and have not ended.
    #[must_use]
    pub fn live(&self) -> usize {
        self.inner.shared.total.load(Ordering::Acquire)
    }

    /// Connections and streams on each worker now.
    #[must_use]
    pub fn loads(&self) -> Vec<usize> {
        self.inner
            .shared
            .mailboxes
            .iter()
            .map(|mailbox| mailbox.load.load(Ordering::Relaxed))
            .collect()
    }
}

impl Inner {
    fn exit(&self) {
        for mailbox in &self.shared.mailboxes {
            // A full queue of orders is for a worker that is stuck: there is nobody to tell.
            let _ = mailbox.orders.try_send(Order::Exit);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.exit();
    }
}

impl Shared {
    fn order(&self, index: usize, order: Order) -> Result<(), WorkerError> {
        let mailbox = self
            .mailboxes
            .get(index)
            .ok_or(WorkerError::NoOrders(index))?;
        mailbox.orders.try_send(order).map_err(|_| {
            self.telemetry.limits.reached(Limit::OrderQueue);
            WorkerError::NoOrders(index)
        })
    }

    pub fn close(&self, served: Option<u64>, reason: CloseReason) {
        for index in 0..self.mailboxes.len() {
            if let Err(error) = self.order(index, Order::Close { served, reason }) {
                tracing::error!(%error, "cannot close connections");
            }
        }
    }

    async fn wait_empty(&self, limit: Duration) {
        wait_zero(&self.total, &self.empty, limit).await;
    }

    /// The worker for a new connection that `own` accepted: itself unless another is clearly less loaded.
    pub fn worker_for(&self, own: usize) -> usize {
        let loads = self
            .mailboxes
            .iter()
            .map(|mailbox| mailbox.load.load(Ordering::Relaxed));
        less_loaded(own, loads)
    }

    /// Hands a socket to another worker; gives it back when that one's queue is full.
    pub fn hand_over(&self, index: usize, accepted: Accepted) -> Result<(), Box<Accepted>> {
        let Some(mailbox) = self.mailboxes.get(index) else {
            return Err(accepted.into());
        };
        mailbox
            .sockets
            .try_send(accepted)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(accepted) => {
                    self.telemetry.limits.reached(Limit::HandoverQueue);
                    accepted.into()
                }
                mpsc::error::TrySendError::Closed(accepted) => accepted.into(),
            })
    }

    /// Counts a connection on worker `index` against every limit.
    pub fn admit(
        self: &Arc<Self>,
        index: usize,
        served: &Arc<Served>,
        need: Need,
    ) -> Result<Admission, Refused> {
        let place = self.room.enter(&served.local, need)?;
        self.total.fetch_add(1, Ordering::AcqRel);
        served.live.fetch_add(1, Ordering::AcqRel);
        let mut admission = Admission {
            shared: self.clone(),
            served: served.clone(),
            index,
            place,
        };
        admission.count_on(index);
        Ok(admission)
    }
}

/// Stays where it is unless the least loaded worker has two connections less, and an eighth.
fn less_loaded(own: usize, loads: impl Iterator<Item = usize>) -> usize {
    let loads: Vec<usize> = loads.collect();
    let mine = loads.get(own).copied().unwrap_or(usize::MAX);
    match loads.iter().enumerate().min_by_key(|(_, load)| **load) {
        Some((index, least)) if mine > least + 1 + least / 8 => index,
        _ => own,
    }
}

/// A connection that counts against the limits while this is held.
#[derive(Debug)]
pub(super) struct Admission {
    shared: Arc<Shared>,
    served: Arc<Served>,
    index: usize,
    place: Place,
}

impl Admission {
    fn count_on(&mut self, index: usize) {
        self.index = index;
        if let Some(mailbox) = self.shared.mailboxes.get(index) {
            mailbox.load.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The workload it belongs to.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// The account of what it may hold here.
    pub fn stalls(&self, far: Far) -> Stalls {
        Stalls::new(&self.shared.memory, &self.served.local.holds, far)
    }

    /// It goes on as a stream of a tunnel.
    pub fn tunnelled(&mut self) {
        self.place.tunnelled();
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some(mailbox) = self.shared.mailboxes.get(self.index) {
            mailbox.load.fetch_sub(1, Ordering::Relaxed);
        }
        if self.served.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.served.empty.notify_waiters();
        }
        if self.shared.total.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.empty.notify_waiters();
        }
    }
}

/// What belongs to one worker's thread.
pub(super) struct Worker {
    pub index: usize,
    pub context: ProxyContext,
    pub shared: Arc<Shared>,
    pub pool: Rc<Pool<Dialer>>,
    pub registry: Rc<Registry>,
    pub processor: Rc<Processor>,
    pub listeners: Shown,
    pub balancer: RefCell<Balancer>,
    /// In flight, by source address and by workload ([`Served::id`]).
    pub handshakes: (Counts<IpAddr>, Counts<u64>),
    pub tunnels: Counts<IpAddr>,
    pub accept_failures: Seldom,
    pub handshake_failures: Seldom,
}

impl Worker {
    /// Runs a connection of a workload as a task of its own; a panic costs that connection only.
    pub fn spawn(&self, local: &LocalWorkload, connection: impl Future<Output = ()> + 'static) {
        let telemetry = self.context.telemetry.clone();
        // Not an async block, which would hold the connection's state twice: as captured and as awaited.
        let contained = AssertUnwindSafe(connection).catch_unwind().map(move |end| {
            if end.is_err() {
                telemetry.agent.panics.inc();
                tracing::error!("a connection ended in a panic");
            }
        });
        let flow = self.processor.flow(local.cookie().0);
        tokio::task::spawn_local(Fair::new(flow, contained));
    }
}

async fn run(
    index: usize,
    context: ProxyContext,
    shared: Arc<Shared>,
    mut sockets: mpsc::Receiver<Accepted>,
    mut orders: mpsc::Receiver<Order>,
) {
    let dialer = Dialer::new(&context, shared.room.clone());
    let worker = Rc::new(Worker {
        index,
        pool: Pool::new(dialer, &context.limits.tunnel, &context.limits.time),
        registry: Rc::new(Registry::default()),
        processor: Processor::new(context.telemetry.agent.waits.clone()),
        listeners: Shown::default(),
        balancer: RefCell::new(Balancer::new(rand::random(), BalanceLimits::default())),
        handshakes: Default::default(),
        tunnels: Counts::default(),
        accept_failures: Seldom::every(FAILURE_LINES),
        handshake_failures: Seldom::every(FAILURE_LINES),
        context,
        shared,
    });
    let panics = &worker.context.telemetry.agent.panics;
    let own = worker.clone();
    tokio::task::spawn_local(supervise("sweep", panics.clone(), move || {
        sweep(own.clone())
    }));
    let processor = worker.processor.clone();
    tokio::task::spawn_local(supervise("turns", panics.clone(), move || {
        processor.clone().serve()
    }));
    let own = worker.clone();
    tokio::task::spawn_local(supervise("reevaluate", panics.clone(), move || {
        reevaluate(own.clone())
    }));
    loop {
        tokio::select! {
            Some(accepted) = sockets.recv() => accept::adopt(&worker, accepted),
            order = orders.recv() => match order {
                Some(Order::Listen { listener, kind, served }) => {
                    accept::listen(&worker, listener, kind, served);
                }
                Some(Order::Close { served, reason }) => worker.registry.close(served, reason),
                Some(Order::Lend(answers)) => worker.lend(&answers),
                Some(Order::Tunnels(answers)) => worker.tell_tunnels(&answers),
                Some(Order::Warm { key, source, done }) => worker.warm(key, source, done),
                Some(Order::Exit) | None => return,
            },
        }
    }
}

/// Runs a task that the worker cannot do without; a panic is counted, and it is begun anew.
async fn supervise<F: Future<Output = ()>>(
    name: &'static str,
    panics: IntCounter,
    mut task: impl FnMut() -> F,
) {
    while AssertUnwindSafe(task()).catch_unwind().await.is_err() {
        panics.inc();
        tracing::error!(
            name,
            "a task of a worker ended in a panic and is begun anew"
        );
        sleep(RESTART_PAUSE).await;
    }
}

async fn sweep(worker: Rc<Worker>) {
    let mut ticks = interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        worker.pool.sweep(Instant::now());
    }
}

/// Asks policy again about every live inbound connection whenever the mesh has changed, and at the beginning: what the
/// task was at when it panicked is done again.
async fn reevaluate(worker: Rc<Worker>) {
    let mut generation = worker.context.mesh.generation();
    loop {
        generation.borrow_and_update();
        for batch in worker.registry.judged().chunks(REEVALUATION_BATCH) {
            for (id, judged) in batch {
                let decision = worker.context.judge(&judged.local, &judged.connection);
                if let Some(policy) = forbids(decision) {
                    tracing::info!(peer = ?judged.connection.peer, ?policy, "connection is no longer allowed");
                    worker.registry.close_one(*id, CloseReason::Revoked);
                }
            }
            tokio::task::yield_now().await;
        }
        sleep(REEVALUATION_PAUSE).await;
        if generation.changed().await.is_err() {
            return;
        }
    }
}

/// Whether a live connection must end, and by which policy. No decision, because discovery has lost sight of the
/// workload, is a denial as for new connections: unknown means deny.
fn forbids(decision: Option<Decision>) -> Option<Option<NamespacedName>> {
    match decision {
        Some(Decision::Allowed(_)) => None,
        Some(Decision::Denied { policy, .. }) => Some(policy),
        None => Some(None),
    }
}

#[cfg(test)]
mod tests;
