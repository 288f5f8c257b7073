//! What one agent's workers give to another's: copies of their listeners, and which tunnels they have open.

use std::{os::fd::AsFd, rc::Rc, time::Duration};

use tokio::{net::TcpListener, sync::mpsc, time::timeout};

use super::{
    accept::Kind,
    connect::Source,
    pool::PoolKey,
    worker::{Order, Worker, WorkerError, Workers},
};
use crate::{capture::Listeners, sys::netns::duplicate};

/// Workers answer between two events; one that does not within this is stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A copy of a listener that a worker accepts from.
#[derive(Debug)]
pub(super) struct Lent {
    served: u64,
    kind: Kind,
    listener: std::net::TcpListener,
}

/// A tunnel that a worker has open, and which worker that is.
pub type HeldTunnel = (usize, PoolKey);

impl Workers {
    /// Copies of the listeners of these workloads ([`super::ServeHandle::id`]), in their order. Both the copies and the originals accept.
    ///
    /// # Errors
    /// When a worker does not answer, the process is out of descriptors, or a listener is not there.
    pub async fn lend(
        &self,
        served: impl IntoIterator<Item = u64>,
    ) -> Result<Vec<Listeners>, WorkerError> {
        let lent = self.gather(Order::Lend).await?;
        let mut lent = lent.into_iter().collect::<Result<Vec<Lent>, _>>()?;
        let mut take = |served: u64, kind: Kind| {
            let index = lent
                .iter()
                .position(|one| (one.served, one.kind) == (served, kind));
            index
                .map(|index| lent.swap_remove(index).listener)
                .ok_or(WorkerError::NoListener(kind))
        };
        served
            .into_iter()
            .map(|served| {
                Ok(Listeners {
                    outbound: take(served, Kind::Outbound)?,
                    plaintext: take(served, Kind::Plaintext)?,
                    tunnel: take(served, Kind::Tunnel)?,
                })
            })
            .collect()
    }

    /// Tunnels that are open to peers.
    ///
    /// # Errors
    /// When a worker does not answer.
    pub async fn tunnels(&self) -> Result<Vec<HeldTunnel>, WorkerError> {
        self.gather(Order::Tunnels).await
    }

    /// Opens these tunnels before anybody asks for them. Returns how many are open when all have been tried or `limit`
    /// is over.
    ///
    /// # Errors
    /// When a worker takes no orders.
    pub async fn warm(
        &self,
        tunnels: Vec<(usize, PoolKey, Source)>,
        limit: Duration,
    ) -> Result<usize, WorkerError> {
        // Room for the result of each.
        let (done, mut results) = mpsc::channel(tunnels.len().max(1));
        for (worker, key, source) in tunnels {
            let order = Order::Warm {
                key: Box::new(key),
                source: Box::new(source),
                done: done.clone(),
            };
            self.order(worker % self.count(), order)?;
        }
        drop(done);
        let mut open = 0;
        // What is not open by then is opened when it is needed.
        let _ = timeout(limit, async {
            while let Some(opened) = results.recv().await {
                open += usize::from(opened);
            }
        })
        .await;
        Ok(open)
    }

    /// Gives one order to every worker and collects what they answer.
    async fn gather<T>(
        &self,
        order: impl Fn(mpsc::Sender<Vec<T>>) -> Order,
    ) -> Result<Vec<T>, WorkerError> {
        // Room for the answer of each.
        let (answers, mut inbox) = mpsc::channel(self.count());
        for index in 0..self.count() {
            self.order(index, order(answers.clone()))?;
        }
        drop(answers);
        let mut all = Vec::new();
        let gathering = async {
            while let Some(answer) = inbox.recv().await {
                all.extend(answer);
            }
        };
        timeout(ANSWER_LIMIT, gathering)
            .await
            .map_err(|_| WorkerError::Silent(ANSWER_LIMIT))?;
        Ok(all)
    }
}

/// Listeners that a worker accepts from now.
pub(super) type Shown = std::cell::RefCell<Vec<(u64, Kind, Rc<TcpListener>)>>;

impl Worker {
    /// Answers [`Order::Lend`].
    pub(super) fn lend(&self, answers: &mpsc::Sender<Vec<Result<Lent, WorkerError>>>) {
        let listeners = self.listeners.borrow();
        let lend = |(served, kind, listener): &(u64, Kind, Rc<TcpListener>)| {
            let copy = duplicate(listener.as_fd()).map_err(WorkerError::Lend)?;
            Ok(Lent {
                served: *served,
                kind: *kind,
                listener: copy.into(),
            })
        };
        // Nobody waits any more: the copies go with the message.
        let _ = answers.try_send(listeners.iter().map(lend).collect());
    }

    /// Answers [`Order::Tunnels`].
    pub(super) fn tell_tunnels(&self, answers: &mpsc::Sender<Vec<HeldTunnel>>) {
        let held = self.pool.open_keys().into_iter();
        // As above.
        let _ = answers.try_send(held.map(|key| (self.index, key)).collect());
    }

    /// Carries out [`Order::Warm`].
    pub(super) fn warm(&self, key: Box<PoolKey>, source: Box<Source>, done: mpsc::Sender<bool>) {
        let pool = self.pool.clone();
        self.spawn(&source.local.clone(), async move {
            let opened = pool.lease(&key, &source).await;
            // A failure is told by the pool, as for a connection.
            let _ = done.try_send(opened.is_ok());
        });
    }
}
