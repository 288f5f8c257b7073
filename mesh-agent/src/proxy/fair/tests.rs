use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
};

use tokio::task::LocalSet;

use super::*;

thread_local! {
    /// The time of these tests: it passes only when a task works.
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
}

fn now_ns() -> u64 {
    NOW_NS.get()
}

fn work(ns: u64) {
    NOW_NS.set(NOW_NS.get() + ns);
}

fn processor() -> Rc<Processor> {
    let waits = IntCounter::new("waits", "of tasks").expect("a valid name");
    Processor::with_clock(waits, now_ns)
}

const QUANTUM: u64 = QUANTUM_NS as u64;

/// Runs tasks until `until`, with the server of the processor beside them, and returns how long each flow has worked.
async fn run(
    processor: &Rc<Processor>,
    until_ns: u64,
    tasks: impl IntoIterator<Item = (u64, u64)>,
) -> HashMap<u64, u64> {
    let worked = Rc::new(RefCell::new(HashMap::new()));
    let server = tokio::task::spawn_local(processor.clone().serve());
    let tasks: Vec<_> = tasks
        .into_iter()
        .map(|(flow, cost_ns)| {
            let worked = worked.clone();
            let busy = async move {
                while now_ns() < until_ns {
                    work(cost_ns);
                    *worked.borrow_mut().entry(flow).or_insert(0) += cost_ns;
                    wake_and_wait().await;
                }
            };
            tokio::task::spawn_local(Fair::new(processor.flow(flow), busy))
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    server.abort();
    Rc::try_unwrap(worked).expect("all are over").into_inner()
}

/// Ready at the next poll, which is due at once: a task that is never idle.
async fn wake_and_wait() {
    let mut again = true;
    poll_fn(|cx| {
        if std::mem::take(&mut again) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_thousand_busy_tasks_get_no_more_than_one() {
    let processor = processor();
    let many = (0..1000).map(|_| (1, 50_000));
    let local = LocalSet::new();
    let worked = local
        .run_until(run(
            &processor,
            2_000 * QUANTUM,
            [(2, 50_000)].into_iter().chain(many),
        ))
        .await;
    let (storm, neighbour) = (worked[&1], worked[&2]);
    assert!(neighbour * 10 >= storm * 9, "{storm} and {neighbour}");
    assert!(processor.waits.get() > 0);
}

#[tokio::test]
async fn three_flows_with_tasks_of_different_length_get_the_same() {
    let processor = processor();
    let tasks = (0..100)
        .map(|_| (1, 20_000))
        .chain((0..3).map(|_| (2, 400_000)))
        .chain((0..10).map(|_| (3, 90_000)));
    let local = LocalSet::new();
    let worked = local
        .run_until(run(&processor, 6_000 * QUANTUM, tasks))
        .await;
    let least = worked.values().min().expect("three flows");
    let most = worked.values().max().expect("three flows");
    assert!(most - least <= most / 10, "{worked:?}");
}

#[tokio::test]
async fn a_workload_alone_is_neither_measured_nor_made_to_wait() {
    let processor = processor();
    let local = LocalSet::new();
    let tasks = (0..100).map(|_| (1, 50_000));
    local.run_until(run(&processor, 200 * QUANTUM, tasks)).await;
    assert_eq!(processor.waits.get(), 0);
    assert_eq!(processor.flow(1).credit_ns.get(), QUANTUM_NS);
}

/// How long a task of flow 2 waits for its turn at most, when it wakes up now and then and works for `cost_ns`.
async fn longest_wait(processor: &Rc<Processor>, storm_tasks: usize, cost_ns: u64) -> u64 {
    let until_ns = 1_000 * QUANTUM;
    let bell = Rc::new(tokio::sync::Notify::new());
    let rung = Rc::new(Cell::new(0));
    let longest = Rc::new(Cell::new(0));
    let (ear, since, worst) = (bell.clone(), rung.clone(), longest.clone());
    let light = async move {
        while now_ns() < until_ns {
            ear.notified().await;
            worst.set(worst.get().max(now_ns() - since.get()));
            work(cost_ns);
        }
    };
    let light = tokio::task::spawn_local(Fair::new(processor.flow(2), light));
    // Rings when the runtime looks for events, as the kernel would.
    let ringer = tokio::task::spawn_local(async move {
        let mut next = 0;
        loop {
            if now_ns() >= next {
                next = now_ns() + 3 * QUANTUM;
                rung.set(now_ns());
                bell.notify_one();
            }
            yield_now().await;
        }
    });
    run(processor, until_ns, (0..storm_tasks).map(|_| (1, 60_000))).await;
    ringer.abort();
    light.abort();
    longest.get()
}

#[tokio::test]
async fn a_workload_that_wakes_up_waits_for_one_quantum_of_a_storm() {
    let processor = processor();
    let local = LocalSet::new();
    let longest = local
        .run_until(longest_wait(&processor, 1000, 20_000))
        .await;
    // The task that used up the quantum may have gone a little beyond it.
    assert!(longest <= QUANTUM + 60_000, "{longest} ns");
    assert!(longest > 0, "it must have had to wait for something");
}

#[tokio::test]
async fn a_task_that_never_pauses_is_interrupted_sooner_while_others_are_active() {
    let processor = processor();
    let until_ns = 100 * QUANTUM;
    let per_poll = Rc::new(RefCell::new(Vec::new()));
    let seen = per_poll.clone();
    // As a socket that always has more: only the runtime ends a poll.
    let endless = poll_fn(move |cx| {
        for operations in 0.. {
            if now_ns() >= until_ns {
                break;
            }
            let mut next = std::pin::pin!(coop::consume_budget());
            if next.as_mut().poll(cx).is_pending() {
                seen.borrow_mut().push(operations);
                return Poll::Pending;
            }
            work(QUANTUM / 50);
        }
        Poll::Ready(())
    });
    let scene = async {
        let server = tokio::task::spawn_local(processor.clone().serve());
        assert!(processor.flow(2).is_alone());
        let task = Fair::new(processor.flow(1), endless);
        tokio::task::spawn_local(task).await.expect("no panic");
        server.abort();
    };
    LocalSet::new().run_until(scene).await;
    let per_poll = per_poll.borrow();
    assert!(per_poll[0] > OPERATIONS_PER_POLL, "{per_poll:?}");
    assert!(per_poll.len() > 2);
    assert!(
        per_poll[1..]
            .iter()
            .all(|operations| *operations <= OPERATIONS_PER_POLL),
        "{per_poll:?}"
    );
}

/// A task's waker that remembers.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A task that waits: its seat, and whether it was woken.
fn waiting(flow: &Rc<Flow>) -> (Option<Rc<Seat>>, Arc<Flag>) {
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(flag.clone());
    let mut seat = None;
    let turn = flow.poll_turn(&Context::from_waker(&waker), &mut seat);
    assert!(turn.is_pending());
    (seat, flag)
}

/// Two flows that are active, the first without credit.
fn contended() -> (Rc<Processor>, Rc<Flow>, Rc<Flow>) {
    let processor = processor();
    let (storm, neighbour) = (processor.flow(1), processor.flow(2));
    assert!(storm.is_alone());
    assert!(!neighbour.is_alone());
    storm.charge(QUANTUM_NS);
    (processor, storm, neighbour)
}

#[test]
fn a_task_that_goes_away_does_not_strand_those_behind_it() {
    let (processor, storm, _neighbour) = contended();
    let (first, _) = waiting(&storm);
    let (_second, woken) = waiting(&storm);
    first.expect("it waits").state.set(SeatState::Out);
    assert!(processor.serve_next());
    assert!(woken.0.load(Ordering::Relaxed));
}

#[test]
fn a_task_that_was_called_and_goes_away_delays_the_next_by_one_round_only() {
    let (processor, storm, _neighbour) = contended();
    let _gone = waiting(&storm);
    let (_next, woken) = waiting(&storm);
    assert!(processor.serve_next());
    assert!(!woken.0.load(Ordering::Relaxed));
    assert!(processor.serve_next());
    assert!(woken.0.load(Ordering::Relaxed));
}

#[test]
fn a_flow_in_debt_sits_out_until_it_is_paid_and_never_long() {
    let (processor, storm, _neighbour) = contended();
    storm.charge(i64::MAX);
    let (_seat, woken) = waiting(&storm);
    let rounds = (1..100)
        .find(|_| {
            assert!(processor.serve_next());
            woken.0.load(Ordering::Relaxed)
        })
        .expect("its turn comes");
    assert_eq!(rounds, DEBT_MAX_NS / QUANTUM_NS + 1);
}

#[test]
fn workloads_that_fall_silent_are_forgotten_and_nobody_waits_for_them() {
    let (processor, storm, neighbour) = contended();
    let (_seat, woken) = waiting(&storm);
    drop(neighbour);
    processor.begin_period();
    assert!(
        !storm.is_alone(),
        "the neighbour was active in the last period"
    );
    processor.begin_period();
    assert!(storm.is_alone());
    assert!(processor.serve_next());
    assert!(woken.0.load(Ordering::Relaxed));
    processor.begin_period();
    processor.begin_period();
    let numbers: Vec<u64> = processor.flows.borrow().keys().copied().collect();
    assert_eq!(numbers, [1], "held by this test");
}

#[test]
fn a_task_begins_others_on_behalf_of_its_own_workload() {
    let processor = processor();
    let flow = processor.flow(7);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let nested = Fair::new(flow.clone(), async {
        let inner = spawn_local(async { CURRENT.with_borrow(|flow| flow.is_some()) });
        inner.await.expect("no panic")
    });
    assert!(LocalSet::new().block_on(&runtime, nested));
    assert!(CURRENT.with_borrow(Option::is_none), "nobody's, outside");
}
