use std::{cell::RefCell, time::Duration};

use tokio::{sync::Semaphore, task::LocalSet};

use super::*;
use crate::proxy::{Limits, testing::identity};

/// A tunnel that remembers for which key it was made.
#[derive(Debug, Clone)]
struct FakeTunnel {
    key: PoolKey,
    open: Rc<Cell<bool>>,
    peer_streams: Rc<Cell<usize>>,
}

impl Pooled for FakeTunnel {
    fn is_open(&self) -> bool {
        self.open.get()
    }

    fn peer_streams(&self) -> usize {
        self.peer_streams.get()
    }
}

/// Connects when it is given a permit; fails while `failing`.
#[derive(Clone)]
struct FakeConnector {
    permits: Rc<Semaphore>,
    made: Rc<RefCell<Vec<FakeTunnel>>>,
    failing: Rc<Cell<bool>>,
    panicking: Rc<Cell<bool>>,
}

impl FakeConnector {
    fn ready() -> Self {
        Self::with_permits(Semaphore::MAX_PERMITS)
    }

    fn with_permits(permits: usize) -> Self {
        Self {
            permits: Rc::new(Semaphore::new(permits)),
            made: Rc::default(),
            failing: Rc::default(),
            panicking: Rc::default(),
        }
    }
}

impl Connector for FakeConnector {
    type Context = u32;
    type Tunnel = FakeTunnel;

    async fn connect(&self, key: &PoolKey, _: &u32) -> Result<FakeTunnel, TunnelError> {
        self.permits.acquire().await.expect("never closed").forget();
        assert!(!self.panicking.get(), "a panic that a test asked for");
        if self.failing.get() {
            return Err(TunnelError::TimedOut("answer"));
        }
        let tunnel = FakeTunnel {
            key: key.clone(),
            open: Rc::new(Cell::new(true)),
            peer_streams: Rc::new(Cell::new(1000)),
        };
        self.made.borrow_mut().push(tunnel.clone());
        Ok(tunnel)
    }

    fn interchangeable(old: &u32, new: &u32) -> bool {
        old == new
    }

    fn note(&self, _event: PoolEvent) {}
}

fn key(source: &str, destination: &str) -> PoolKey {
    PoolKey {
        source: identity(source),
        expected: Arc::from([identity(destination)]),
        destination: "10.1.0.5:15008".parse().expect("literal"),
        netns: NetnsCookie(1),
        source_address: None,
        roots: [0; 32],
    }
}

fn pool(connector: &FakeConnector) -> Rc<Pool<FakeConnector>> {
    let mut limits = Limits::default();
    limits.tunnel.client_streams = 3;
    limits.tunnel.per_key = 2;
    limits.tunnel.spread = 1;
    Pool::new(connector.clone(), &limits.tunnel, &limits.time)
}

#[tokio::test]
async fn callers_of_one_key_share_one_set_up() {
    let connector = FakeConnector::with_permits(0);
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let callers: Vec<_> = (0..3)
                .map(|_| {
                    let (pool, key) = (pool.clone(), key.clone());
                    tokio::task::spawn_local(async move { pool.lease(&key, &0).await })
                })
                .collect();
            connector.permits.add_permits(10);
            for caller in callers {
                assert!(caller.await.expect("no panic").is_ok());
            }
        })
        .await;
    assert_eq!(connector.made.borrow().len(), 1);
}

#[tokio::test]
async fn a_caller_that_gives_up_does_not_end_the_set_up_of_the_others() {
    let connector = FakeConnector::with_permits(0);
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let (first_pool, first_key) = (pool.clone(), key.clone());
            let first = tokio::task::spawn_local(async move {
                first_pool.lease(&first_key, &0).await.map(drop)
            });
            tokio::task::yield_now().await;
            let (second_pool, second_key) = (pool.clone(), key.clone());
            let second = tokio::task::spawn_local(async move {
                second_pool.lease(&second_key, &0).await.map(drop)
            });
            tokio::task::yield_now().await;
            first.abort();
            connector.permits.add_permits(1);
            assert!(second.await.expect("no panic").is_ok());
        })
        .await;
    assert_eq!(connector.made.borrow().len(), 1);
}

#[tokio::test]
async fn a_failed_set_up_is_told_to_all_who_wait_and_the_next_call_tries_again() {
    let connector = FakeConnector::with_permits(0);
    connector.failing.set(true);
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let waiting = futures::future::join(pool.lease(&key, &0), pool.lease(&key, &0));
            connector.permits.add_permits(1);
            let (first, second) = waiting.await;
            assert!(first.is_err() && second.is_err());
            connector.failing.set(false);
            connector.permits.add_permits(1);
            assert!(pool.lease(&key, &0).await.is_ok());
        })
        .await;
}

/// Connects that ask for one key at once.
const STORM: usize = 1000;

async fn storm(connector: &FakeConnector) -> Vec<Result<Lease<FakeConnector>, TunnelError>> {
    let mut limits = Limits::default();
    limits.tunnel.client_streams = STORM;
    limits.tunnel.spread = 1;
    let pool = Pool::new(connector.clone(), &limits.tunnel, &limits.time);
    let key = key("web", "cart");
    let callers: Vec<_> = (0..STORM)
        .map(|_| {
            let (pool, key) = (pool.clone(), key.clone());
            tokio::task::spawn_local(async move { pool.lease(&key, &0).await })
        })
        .collect();
    tokio::task::yield_now().await;
    // A second dial would wait for a permit for ever.
    connector.permits.add_permits(1);
    let outcomes = futures::future::join_all(callers).await;
    outcomes
        .into_iter()
        .map(|outcome| outcome.expect("no panic"))
        .collect()
}

#[tokio::test]
async fn a_storm_of_connects_to_one_key_is_one_dial() {
    let connector = FakeConnector::with_permits(0);
    let outcomes = LocalSet::new().run_until(storm(&connector)).await;
    assert!(outcomes.iter().all(Result::is_ok));
    assert_eq!(connector.made.borrow().len(), 1);
}

#[tokio::test]
async fn a_dial_that_fails_is_told_to_the_whole_storm_and_not_repeated_for_each() {
    let connector = FakeConnector::with_permits(0);
    connector.failing.set(true);
    let outcomes = LocalSet::new().run_until(storm(&connector)).await;
    let failed = |outcome: &Result<_, _>| matches!(outcome, Err(TunnelError::TimedOut("answer")));
    assert_eq!(outcomes.iter().filter(|one| failed(one)).count(), STORM);
}

#[tokio::test]
async fn identities_never_share_a_tunnel() {
    let connector = FakeConnector::ready();
    let mut limits = Limits::default();
    limits.tunnel.client_streams = 100;
    let pool = Pool::new(connector.clone(), &limits.tunnel, &limits.time);
    LocalSet::new()
        .run_until(async {
            for round in 0..3 {
                for source in 0..20 {
                    for destination in 0..20 {
                        let key = key(&format!("s{source}"), &format!("d{destination}"));
                        let lease = pool.lease(&key, &0).await.expect("connects");
                        assert_eq!(lease.tunnel().key, key, "round {round}");
                    }
                }
            }
        })
        .await;
    assert_eq!(connector.made.borrow().len(), 400);
}

#[tokio::test]
async fn every_part_of_the_key_separates() {
    let connector = FakeConnector::ready();
    let pool = pool(&connector);
    let base = key("web", "cart");
    let others = [
        PoolKey {
            destination: "10.1.0.6:15008".parse().expect("literal"),
            ..base.clone()
        },
        PoolKey {
            netns: NetnsCookie(2),
            ..base.clone()
        },
        PoolKey {
            roots: [1; 32],
            ..base.clone()
        },
        PoolKey {
            source_address: Some(IpAddr::from([10, 1, 0, 4])),
            ..base.clone()
        },
        PoolKey {
            expected: Arc::from([identity("cart"), identity("other")]),
            ..base.clone()
        },
    ];
    LocalSet::new()
        .run_until(async {
            let _held = pool.lease(&base, &0).await.expect("connects");
            for other in &others {
                assert_eq!(
                    pool.lease(other, &0).await.expect("connects").tunnel().key,
                    *other
                );
            }
        })
        .await;
    assert_eq!(connector.made.borrow().len(), 1 + others.len());
}

#[tokio::test]
async fn a_full_tunnel_gets_a_neighbour_and_the_limit_holds() {
    let connector = FakeConnector::ready();
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let mut held = Vec::new();
            for _ in 0..6 {
                held.push(
                    pool.lease(&key, &0)
                        .await
                        .expect("two tunnels of three streams"),
                );
            }
            assert_eq!(connector.made.borrow().len(), 2);
            assert!(matches!(
                pool.lease(&key, &0).await,
                Err(TunnelError::Limit)
            ));
            held.pop();
            assert!(
                pool.lease(&key, &0).await.is_ok(),
                "a returned stream is used again"
            );
        })
        .await;
}

#[tokio::test]
async fn busy_tunnels_are_joined_by_another_without_waiting_for_it() {
    let connector = FakeConnector::ready();
    let mut limits = Limits::default();
    limits.tunnel.spread = 2;
    limits.tunnel.spread_at_streams = 2;
    let pool = Pool::new(connector.clone(), &limits.tunnel, &limits.time);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let first = pool.lease(&key, &0).await.expect("connects");
            assert_eq!(connector.made.borrow().len(), 1);
            let second = pool.lease(&key, &0).await.expect("there");
            while pool.len() < 2 {
                tokio::task::yield_now().await;
            }
            let third = pool.lease(&key, &0).await.expect("there");
            assert!(Rc::ptr_eq(&first.slot, &second.slot));
            assert!(
                !Rc::ptr_eq(&first.slot, &third.slot),
                "the new one is less loaded"
            );
        })
        .await;
}

#[tokio::test]
async fn dead_and_retired_tunnels_take_no_new_streams() {
    let connector = FakeConnector::ready();
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            drop(pool.lease(&key, &0).await.expect("connects"));
            connector.made.borrow()[0].open.set(false);
            let old = pool.lease(&key, &0).await.expect("connects again");
            assert_eq!(connector.made.borrow().len(), 2);
            let renewed = pool
                .lease(&key, &1)
                .await
                .expect("connects with the new certificate");
            assert!(!Rc::ptr_eq(&old.slot, &renewed.slot));
            assert_eq!(connector.made.borrow().len(), 3);
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn idle_tunnels_are_released_and_used_ones_are_not() {
    let connector = FakeConnector::ready();
    let pool = pool(&connector);
    LocalSet::new()
        .run_until(async {
            drop(pool.lease(&key("web", "cart"), &0).await.expect("connects"));
            let _used = pool
                .lease(&key("web", "other"), &0)
                .await
                .expect("connects");
            let idle = Limits::default().time.tunnel_idle;
            pool.sweep(Instant::now() + idle - Duration::from_millis(1));
            assert_eq!(pool.len(), 2);
            pool.sweep(Instant::now() + idle);
            assert_eq!(pool.len(), 1);
        })
        .await;
}

#[tokio::test]
async fn a_set_up_that_panics_is_a_failure_and_the_next_call_tries_again() {
    let connector = FakeConnector::ready();
    connector.panicking.set(true);
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            assert!(pool.lease(&key, &0).await.is_err());
            connector.panicking.set(false);
            assert!(pool.lease(&key, &0).await.is_ok());
        })
        .await;
}

#[tokio::test]
async fn what_a_peer_takes_on_one_tunnel_is_expected_of_its_next() {
    let connector = FakeConnector::ready();
    let pool = pool(&connector);
    let key = key("web", "cart");
    LocalSet::new()
        .run_until(async {
            let first = pool.lease(&key, &0).await.expect("made");
            connector.made.borrow()[0].peer_streams.set(1);
            // The second tunnel's peer has not told anything yet, and gets one stream all the same.
            let second = pool.lease(&key, &0).await.expect("made");
            assert_eq!(connector.made.borrow().len(), 2);
            let third = pool.lease(&key, &0).await;
            assert!(
                matches!(third, Err(TunnelError::Limit)),
                "two tunnels at most"
            );
            // A tunnel that takes none is about to end: others are not judged by it.
            connector.made.borrow()[0].peer_streams.set(0);
            let third = pool.lease(&key, &0).await.expect("the second has room");
            drop((first, second, third));
        })
        .await;
    assert_eq!(connector.made.borrow().len(), 2);
}
