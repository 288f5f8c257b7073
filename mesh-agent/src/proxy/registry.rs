//! The live connections of one worker: what is needed to close one from outside, and to ask policy again.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use crate::{capture::LocalWorkload, policy, telemetry::CloseReason};

/// Tells one connection to end. Belongs to one thread.
#[derive(Debug, Default)]
pub struct CloseSignal {
    reason: Cell<Option<CloseReason>>,
    waker: RefCell<Option<Waker>>,
}

impl CloseSignal {
    /// Asks the connection to end; the first reason stays.
    pub fn close(&self, reason: CloseReason) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
        }
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ready once the connection shall end. One task may wait at a time.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        if let Some(reason) = self.reason.get() {
            return Poll::Ready(reason);
        }
        match &mut *self.waker.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Waits until the connection shall end.
    pub async fn closed(&self) -> CloseReason {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }
}

/// An inbound connection, as policy was asked about it.
#[derive(Debug, Clone)]
pub struct Judged {
    /// Whose application it reaches.
    pub local: Arc<LocalWorkload>,
    /// What policy was told.
    pub connection: policy::Connection,
}

#[derive(Debug)]
struct Live {
    close: Rc<CloseSignal>,
    served: u64,
    judged: Option<Judged>,
}

/// The live connections of one worker.
#[derive(Debug, Default)]
pub struct Registry {
    next: Cell<u64>,
    live: RefCell<HashMap<u64, Live>>,
}

impl Registry {
    /// Enters a connection of the workload served as `served`; the guard takes it out.
    #[must_use]
    pub fn enter(self: &Rc<Self>, served: u64, judged: Option<Judged>) -> Registered {
        let id = self.next.get();
        self.next.set(id + 1);
        let close = Rc::new(CloseSignal::default());
        self.live.borrow_mut().insert(
            id,
            Live {
                close: close.clone(),
                served,
                judged,
            },
        );
        Registered {
            registry: self.clone(),
            id,
            close,
        }
    }

    /// Closes every connection, or those of one served workload.
    pub fn close(&self, served: Option<u64>, reason: CloseReason) {
        for live in self.live.borrow().values() {
            if served.is_none_or(|served| served == live.served) {
                live.close.close(reason);
            }
        }
    }

    /// Every connection that policy was asked about, to ask again.
    #[must_use]
    pub fn judged(&self) -> Vec<(u64, Judged)> {
        let live = self.live.borrow();
        live.iter()
            .filter_map(|(id, live)| Some((*id, live.judged.clone()?)))
            .collect()
    }

    /// Closes one connection, if it is still there.
    pub fn close_one(&self, id: u64, reason: CloseReason) {
        if let Some(live) = self.live.borrow().get(&id) {
            live.close.close(reason);
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.live.borrow().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.borrow().is_empty()
    }
}

/// An entry of the registry.
#[derive(Debug)]
pub struct Registered {
    registry: Rc<Registry>,
    id: u64,
    close: Rc<CloseSignal>,
}

impl Registered {
    /// What tells this connection to end.
    #[must_use]
    pub fn signal(&self) -> &CloseSignal {
        &self.close
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.live.borrow_mut().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_one_workload_leaves_the_others() {
        let registry = Rc::new(Registry::default());
        let mine = registry.enter(1, None);
        let other = registry.enter(2, None);
        registry.close(Some(1), CloseReason::Drained);
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(
            mine.signal().poll(&mut cx),
            Poll::Ready(CloseReason::Drained)
        );
        assert!(other.signal().poll(&mut cx).is_pending());
    }

    #[test]
    fn a_dropped_connection_leaves_nothing_behind() {
        let registry = Rc::new(Registry::default());
        let entry = registry.enter(1, None);
        assert_eq!(registry.len(), 1);
        drop(entry);
        assert!(registry.is_empty());
    }

    #[test]
    fn the_first_reason_stays() {
        let signal = CloseSignal::default();
        signal.close(CloseReason::Revoked);
        signal.close(CloseReason::Drained);
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(signal.poll(&mut cx), Poll::Ready(CloseReason::Revoked));
    }
}
