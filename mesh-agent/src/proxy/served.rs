//! A workload that is served: what workers share about it, and the handle that keeps it so.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    room::Place,
    worker::{FORCED_CLOSE_WAIT, Shared},
};
use crate::{capture::LocalWorkload, telemetry::CloseReason};

/// A workload whose listeners are served.
#[derive(Debug)]
pub(super) struct Served {
    pub id: u64,
    pub local: Arc<LocalWorkload>,
    /// Accept no more; tunnels say GOAWAY.
    pub stop: CancellationToken,
    /// A listener was ended by somebody else (`SOCK_DESTROY`): it accepts nothing for ever.
    pub lost_listener: AtomicBool,
    pub live: AtomicUsize,
    pub empty: Notify,
    /// What the listeners need.
    pub _listeners: Place,
}

/// Keeps one workload served. Dropped, it stops accepting; connections that are open go on.
#[derive(Debug)]
pub struct ServeHandle {
    pub(super) served: Arc<Served>,
    pub(super) shared: Arc<Shared>,
}

impl ServeHandle {
    /// Stops accepting and closes the listeners; tunnels take no more streams; what is open goes on.
    pub fn stop(&self) {
        self.served.stop.cancel();
    }

    /// Whether a listener has to be opened anew.
    #[must_use]
    pub fn has_lost_listener(&self) -> bool {
        self.served.lost_listener.load(Ordering::Acquire)
    }

    /// Names the workload among those that are served.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.served.id
    }

    /// Connections open now, tunnels included.
    #[must_use]
    pub fn live(&self) -> usize {
        self.served.live.load(Ordering::Acquire)
    }

    /// Stops accepting, lets connections finish until `deadline` has passed, then closes the rest. Returns how many
    /// had to be closed.
    pub async fn drain(self, deadline: Duration) -> usize {
        self.stop();
        wait_zero(&self.served.live, &self.served.empty, deadline).await;
        let left = self.live();
        if left > 0 {
            self.shared
                .close(Some(self.served.id), CloseReason::Drained);
            wait_zero(&self.served.live, &self.served.empty, FORCED_CLOSE_WAIT).await;
        }
        left
    }
}

impl Drop for ServeHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits until nothing is left, or until `limit`.
pub(super) async fn wait_zero(count: &AtomicUsize, empty: &Notify, limit: Duration) {
    // At the limit the caller looks at the count itself.
    let _ = timeout(limit, async {
        loop {
            let notified = empty.notified();
            if count.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    })
    .await;
}
