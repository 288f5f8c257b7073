use super::*;
use crate::proxy::Limits;

#[tokio::test(start_paused = true)]
async fn a_task_that_panics_is_counted_and_begun_anew() {
    let panics = IntCounter::new("panics", "of tasks").expect("a valid name");
    let mut begun = 0;
    let supervised = supervise("test", panics.clone(), || {
        begun += 1;
        let fails = begun <= 2;
        async move { assert!(!fails, "a bug") }
    });
    supervised.await;
    assert_eq!((begun, panics.get()), (3, 2));
}

/// One worker that takes nothing, with room for one order and one socket.
fn stuck_worker(
    telemetry: &Arc<Telemetry>,
) -> (Arc<Shared>, mpsc::Receiver<Accepted>, mpsc::Receiver<Order>) {
    let limits = Arc::new(Limits::default());
    let (sockets, socket_inbox) = mpsc::channel(1);
    let (orders, order_inbox) = mpsc::channel(1);
    let shared = Shared {
        mailboxes: vec![Mailbox {
            load: AtomicUsize::new(0),
            sockets,
            orders,
        }],
        telemetry: telemetry.clone(),
        room: Arc::new(Room::new(limits.clone(), telemetry.clone())),
        memory: Memory::new(limits.memory.clone(), telemetry.clone()),
        total: AtomicUsize::new(0),
        empty: Notify::new(),
    };
    (Arc::new(shared), socket_inbox, order_inbox)
}

#[tokio::test]
async fn queues_that_are_full_are_told() {
    let telemetry = Telemetry::new("1");
    let (shared, _sockets, _orders) = stuck_worker(&telemetry);
    assert!(shared.order(0, Order::Exit).is_ok());
    assert!(shared.order(0, Order::Exit).is_err());
    let local = crate::proxy::testing::local("web");
    let served = Arc::new(Served {
        id: 1,
        _listeners: shared.room.enrol(&local),
        local,
        stop: CancellationToken::new(),
        lost_listener: AtomicBool::new(false),
        live: AtomicUsize::new(0),
        empty: Notify::new(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound");
    let accepted = || {
        let socket = std::net::TcpStream::connect(address).expect("it listens");
        let admission = shared.admit(0, &served, Need::Connection).expect("room");
        Accepted::new(socket, address, Kind::Outbound, admission)
    };
    assert!(shared.hand_over(0, accepted()).is_ok());
    let back = shared.hand_over(0, accepted());
    assert!(back.is_err(), "it stays with the worker that accepted it");
    let text = telemetry.render();
    for limit in [Limit::OrderQueue, Limit::HandoverQueue] {
        let line = format!("weft_limit_reached_total{{limit=\"{}\"}} 1", limit.name());
        assert!(text.contains(&line), "{line}");
    }
}

#[test]
fn a_live_connection_of_an_unknown_workload_must_end() {
    assert_eq!(forbids(None), Some(None));
}

#[test]
fn a_connection_stays_unless_another_worker_is_clearly_less_loaded() {
    for (own, loads, expected) in [
        (0, vec![0, 0], 0),
        (0, vec![1, 0], 0),
        (0, vec![2, 0], 1),
        (1, vec![0, 2], 0),
        (0, vec![101, 100], 0),
        (0, vec![120, 100], 1),
        (0, vec![5], 0),
    ] {
        assert_eq!(
            less_loaded(own, loads.iter().copied()),
            expected,
            "{own} of {loads:?}"
        );
    }
}
