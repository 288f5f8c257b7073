//! Processor time of one worker, shared among workloads: who has a thousand busy connections gets no more than a
//! neighbour with one that is busy, too.
//!
//! A worker's runtime polls tasks in the order in which they woke up, so time would go by the number of tasks. Here
//! every task belongs to a workload's *flow*, and flows are served by deficit round robin (Shreedhar and Varghese,
//! 1995). A flow has credit for [`QUANTUM_NS`]; what its tasks use is charged to it. A task of a flow without credit
//! waits in the flow's queue until a round gives credit again. Between two quanta the runtime looks for events, so a
//! workload that wakes up waits for one quantum of its busy neighbours, not for all of their tasks.
//!
//! While only one workload is active nothing is measured and nobody waits: two comparisons per poll.
//!
//! The rules know neither sockets nor a clock; [`Fair`] measures.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use tokio::{
    task::{JoinHandle, coop, yield_now},
    time::sleep,
};

/// Time that a flow gets at a time: some ten requests, or one large read with its encryption. Shorter costs more looks
/// for events (some 2 µs each), longer is what a neighbour waits.
pub const QUANTUM_NS: i64 = 250_000;
/// Most that a flow may owe. Time is the clock's, so what the kernel gave to other threads meanwhile is in it: nobody
/// shall wait for that longer than a few quanta.
const DEBT_MAX_NS: i64 = 4 * QUANTUM_NS;
/// A workload counts as active for this long, and up to twice as long, after its last task ran: a neighbour that is
/// asked once in some seconds must not meet a worker that serves one workload without a look at the others.
pub const ACTIVE_FOR: Duration = Duration::from_secs(5);
/// Operations on sockets in one poll of a long task while others are active, of the runtime's 128: a tunnel with much
/// to write would else keep everybody waiting for milliseconds.
const OPERATIONS_PER_POLL: usize = 16;
/// A task one poll of which took more than a quantum is a long one, until a poll takes less than this.
const SHORT_NS: i64 = QUANTUM_NS / 16;
/// The runtime's own limit (tokio `task::coop`, "budget").
const RUNTIME_OPERATIONS_PER_POLL: usize = 128;

thread_local! {
    /// The flow of the task that is being polled.
    static CURRENT: RefCell<Option<Rc<Flow>>> = const { RefCell::new(None) };
}

/// One worker's time. Lives as long as the worker does.
#[derive(Debug)]
pub struct Processor {
    /// What time it is, in nanoseconds since whenever.
    clock_ns: fn() -> u64,
    /// Counts tasks that had to wait for their turn.
    waits: IntCounter,
    /// Flows that are active.
    active: Cell<usize>,
    /// Counts up every [`ACTIVE_FOR`] while any flow is active.
    period: Cell<u64>,
    /// Counts up when every waiting flow has had its quantum.
    round: Cell<u64>,
    left_in_round: Cell<usize>,
    /// Those that have tasks, and those that were active lately.
    flows: RefCell<HashMap<u64, Rc<Flow>>>,
    /// Flows with waiting tasks.
    backlog: RefCell<VecDeque<Rc<Flow>>>,
    /// Who serves the backlog and the periods.
    server: RefCell<Option<Waker>>,
}

/// One workload's part in it.
#[derive(Debug)]
pub struct Flow {
    processor: Rc<Processor>,
    /// The period that a task last ran in.
    seen: Cell<u64>,
    is_active: Cell<bool>,
    is_queued: Cell<bool>,
    credit_ns: Cell<i64>,
    round: Cell<u64>,
    waiting: RefCell<VecDeque<Rc<Seat>>>,
}

/// A task's place in its flow's queue.
#[derive(Debug, Default)]
struct Seat {
    state: Cell<SeatState>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum SeatState {
    /// Not in the queue, or its task is gone.
    #[default]
    Out,
    Waiting,
    /// It is its turn.
    Called,
}

impl Processor {
    /// For one worker. Counts in `waits` tasks that had to wait.
    #[must_use]
    pub fn new(waits: IntCounter) -> Rc<Self> {
        Self::with_clock(waits, monotonic_ns)
    }

    fn with_clock(waits: IntCounter, clock_ns: fn() -> u64) -> Rc<Self> {
        Rc::new(Self {
            clock_ns,
            waits,
            active: Cell::new(0),
            period: Cell::new(0),
            round: Cell::new(0),
            left_in_round: Cell::new(0),
            flows: RefCell::default(),
            backlog: RefCell::default(),
            server: RefCell::default(),
        })
    }

    /// The flow of a workload, named by the cookie of its network namespace.
    #[must_use]
    pub fn flow(self: &Rc<Self>, cookie: u64) -> Rc<Flow> {
        let mut flows = self.flows.borrow_mut();
        if let Some(flow) = flows.get(&cookie) {
            return flow.clone();
        }
        let flow = Rc::new(Flow {
            processor: self.clone(),
            seen: Cell::new(u64::MAX),
            is_active: Cell::new(false),
            is_queued: Cell::new(false),
            credit_ns: Cell::new(QUANTUM_NS),
            round: Cell::new(self.round.get()),
            waiting: RefCell::default(),
        });
        flows.insert(cookie, flow.clone());
        flow
    }

    /// Whether more than one workload is active.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.active.get() > 1
    }

    fn wake_server(&self) {
        let waker = self.server.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Serves one flow that has waiting tasks. False when there is none.
    fn serve_next(&self) -> bool {
        let flow = loop {
            let Some(flow) = self.backlog.borrow_mut().pop_front() else {
                self.left_in_round.set(0);
                return false;
            };
            if !flow.waiting.borrow().is_empty() {
                break flow;
            }
            flow.is_queued.set(false);
        };
        if self.left_in_round.get() == 0 {
            self.round.set(self.round.get() + 1);
            self.left_in_round.set(self.backlog.borrow().len() + 1);
        }
        self.left_in_round.set(self.left_in_round.get() - 1);
        flow.round.set(self.round.get());
        flow.give(1);
        if !self.is_shared() {
            while flow.call_next() {}
        } else if flow.credit_ns.get() > 0 {
            flow.call_next();
        }
        self.backlog.borrow_mut().push_back(flow);
        true
    }

    /// Begins a new period: flows that did nothing in the last one are active no more.
    fn begin_period(&self) {
        let over = self.period.get();
        self.period.set(over + 1);
        self.flows.borrow_mut().retain(|_, flow| {
            if flow.is_active.get() && flow.seen.get() != over {
                flow.is_active.set(false);
                self.active.set(self.active.get().saturating_sub(1));
            }
            flow.is_active.get() || Rc::strong_count(flow) > 1
        });
    }

    fn poll_work(&self, cx: &Context<'_>, wanted: impl Fn(&Self) -> bool) -> Poll<()> {
        if wanted(self) {
            return Poll::Ready(());
        }
        *self.server.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Serves waiting tasks for as long as the worker runs.
    pub async fn serve(self: Rc<Self>) {
        loop {
            let work = |own: &Self| own.active.get() > 0 || !own.backlog.borrow().is_empty();
            poll_fn(|cx| self.poll_work(cx, work)).await;
            let mut period = std::pin::pin!(sleep(ACTIVE_FOR));
            loop {
                let is_over = poll_fn(|cx| {
                    if period.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(true);
                    }
                    self.poll_work(cx, |own| !own.backlog.borrow().is_empty())
                        .map(|()| false)
                });
                if is_over.await {
                    break;
                }
                while !period.is_elapsed() && self.serve_next() {
                    // The runtime looks for events before it goes on.
                    yield_now().await;
                }
            }
            self.begin_period();
        }
    }
}

impl Flow {
    /// Whether the worker need not be shared now.
    fn is_alone(&self) -> bool {
        if self.seen.get() != self.processor.period.get() {
            self.note_active();
        }
        self.processor.active.get() <= 1
    }

    fn note_active(&self) {
        self.seen.set(self.processor.period.get());
        if !self.is_active.replace(true) {
            let active = self.processor.active.get() + 1;
            self.processor.active.set(active);
            if active == 1 {
                self.processor.wake_server();
            }
        }
    }

    /// Adds the credit of `rounds`; it does not pile up.
    fn give(&self, rounds: u64) {
        let rounds = i64::try_from(rounds.min(1 << 20)).unwrap_or(1);
        let credit = self.credit_ns.get() + QUANTUM_NS.saturating_mul(rounds);
        self.credit_ns.set(credit.min(QUANTUM_NS));
    }

    /// Ready when a task may run now.
    fn poll_turn(self: &Rc<Self>, cx: &Context<'_>, seat: &mut Option<Rc<Seat>>) -> Poll<()> {
        if let Some(seat) = seat {
            match seat.state.get() {
                SeatState::Called => {
                    seat.state.set(SeatState::Out);
                    return Poll::Ready(());
                }
                SeatState::Waiting => {
                    *seat.waker.borrow_mut() = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                SeatState::Out => {}
            }
        }
        if self.waiting.borrow().is_empty() {
            let missed =
                self.processor.round.get() - self.round.replace(self.processor.round.get());
            self.give(missed);
            if self.credit_ns.get() > 0 {
                return Poll::Ready(());
            }
        }
        let seat = seat.get_or_insert_with(Rc::default);
        seat.state.set(SeatState::Waiting);
        *seat.waker.borrow_mut() = Some(cx.waker().clone());
        self.waiting.borrow_mut().push_back(seat.clone());
        let processor = &self.processor;
        processor.waits.inc();
        if !self.is_queued.replace(true) {
            processor.backlog.borrow_mut().push_back(self.clone());
            processor.wake_server();
        }
        Poll::Pending
    }

    /// Charges what a task used. With credit left, the next one has its turn.
    fn charge(&self, used_ns: i64) {
        let credit = self.credit_ns.get().saturating_sub(used_ns);
        self.credit_ns.set(credit.max(-DEBT_MAX_NS));
        if credit > 0 {
            self.call_next();
        }
    }

    fn call_next(&self) -> bool {
        while let Some(seat) = self.waiting.borrow_mut().pop_front() {
            if seat.state.get() == SeatState::Waiting {
                seat.state.set(SeatState::Called);
                let waker = seat.waker.borrow_mut().take();
                if let Some(waker) = waker {
                    waker.wake();
                }
                return true;
            }
        }
        false
    }
}

/// A task that takes its turn among those of its worker.
#[derive(Debug)]
pub struct Fair<F> {
    flow: Rc<Flow>,
    seat: Option<Rc<Seat>>,
    is_long: bool,
    task: Pin<Box<F>>,
}

impl<F: Future> Fair<F> {
    /// `task`, on behalf of the workload of `flow`.
    pub fn new(flow: Rc<Flow>, task: F) -> Self {
        Self {
            flow,
            seat: None,
            is_long: false,
            task: Box::pin(task),
        }
    }
}

impl<F: Future> Future for Fair<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let is_out = |seat: &Rc<Seat>| seat.state.get() == SeatState::Out;
        if this.flow.is_alone() && this.seat.as_ref().is_none_or(is_out) {
            let _current = Entered::new(&this.flow);
            return this.task.as_mut().poll(cx);
        }
        ready!(this.flow.poll_turn(cx, &mut this.seat));
        let _current = Entered::new(&this.flow);
        if this.is_long {
            ready!(leave_operations(cx, OPERATIONS_PER_POLL));
        }
        let clock_ns = this.flow.processor.clock_ns;
        let began = clock_ns();
        let outcome = this.task.as_mut().poll(cx);
        let used = clock_ns().saturating_sub(began);
        let used = i64::try_from(used).unwrap_or(i64::MAX);
        this.is_long = used > QUANTUM_NS || (this.is_long && used > SHORT_NS);
        this.flow.charge(used);
        outcome
    }
}

impl<F> Drop for Fair<F> {
    fn drop(&mut self) {
        if let Some(seat) = &self.seat {
            seat.state.set(SeatState::Out);
        }
    }
}

fn monotonic_ns() -> u64 {
    thread_local! {
        static BEGAN: Instant = Instant::now();
    }
    let since = BEGAN.with(Instant::elapsed).as_nanos();
    u64::try_from(since).unwrap_or(u64::MAX)
}

/// Uses up what the runtime allows a task beyond `operations`.
fn leave_operations(cx: &mut Context<'_>, operations: usize) -> Poll<()> {
    for _ in operations..RUNTIME_OPERATIONS_PER_POLL {
        let mut one = std::pin::pin!(coop::consume_budget());
        ready!(one.as_mut().poll(cx));
    }
    Poll::Ready(())
}

/// Says whose task is being polled.
struct Entered(Option<Rc<Flow>>);

impl Entered {
    fn new(flow: &Rc<Flow>) -> Self {
        Self(CURRENT.with_borrow_mut(|current| current.replace(flow.clone())))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let before = self.0.take();
        CURRENT.with_borrow_mut(|current| *current = before);
    }
}

/// Begins a task on behalf of the workload whose task begins it.
pub fn spawn_local<F: Future + 'static>(task: F) -> JoinHandle<F::Output> {
    match CURRENT.with_borrow(Clone::clone) {
        Some(flow) => tokio::task::spawn_local(Fair::new(flow, task)),
        None => tokio::task::spawn_local(task),
    }
}

/// Whether the task that is being polled shares its worker with another workload's.
#[must_use]
pub fn is_shared() -> bool {
    CURRENT.with_borrow(|current| {
        current
            .as_ref()
            .is_some_and(|flow| flow.processor.is_shared())
    })
}

#[cfg(test)]
mod tests;
