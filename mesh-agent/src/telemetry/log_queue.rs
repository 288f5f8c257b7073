//! Log lines on their way to their destination. Whoever logs only puts a line into a bounded queue; one thread writes.
//! A destination that takes nothing (a pipe whose reader hangs) costs lines, which are counted, and delays nobody.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that wait to be written, 4 MiB: some 8,000 lines of the access log. Further lines are dropped.
pub const QUEUE_BYTES: usize = 4 << 20;

/// How long the thread rests after a write: lines that come meanwhile are written together, and nobody who logs has to wake
/// it. With thousands of connections a second that saved a twentieth of the processor time of each (measured).
const REST: Duration = Duration::from_millis(5);
/// Bytes at which it rests no longer.
const REST_BYTES: usize = QUEUE_BYTES / 4;

/// The queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogQueue {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write, or all of it has been written.
    changed: Condvar,
    dropped: IntCounter,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    writing: bool,
    /// The thread waits for a first line, and has to be told of it.
    asleep: bool,
    /// Somebody waits until everything is written.
    hurry: bool,
}

impl State {
    /// Whether to write without a rest.
    fn is_urgent(&self) -> bool {
        self.hurry || self.waiting.len() >= REST_BYTES
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogQueue {
    /// Starts the thread that writes to `destination`; lines that find no room are counted in `dropped`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        destination: impl Write + Send + 'static,
        dropped: IntCounter,
    ) -> io::Result<Self> {
        Self::start_with(REST, destination, dropped)
    }

    fn start_with(
        rest: Duration,
        destination: impl Write + Send + 'static,
        dropped: IntCounter,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            dropped,
        });
        let queue = Self {
            shared: shared.clone(),
        };
        thread::Builder::new()
            .name("weft-log".to_owned())
            .spawn(move || write_all(&shared, rest, destination))?;
        Ok(queue)
    }

    /// Waits until everything that was logged before has been written, at most for `patience`.
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state();
        if !state.waiting.is_empty() {
            state.hurry = true;
            self.shared.changed.notify_all();
        }
        while state.writing || !state.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.shared.state();
        if state.waiting.len() + line.len() > QUEUE_BYTES {
            drop(state);
            return self.shared.dropped.inc();
        }
        state.waiting.extend_from_slice(line);
        let must_tell = std::mem::take(&mut state.asleep) || state.waiting.len() >= REST_BYTES;
        drop(state);
        if must_tell {
            self.shared.changed.notify_all();
        }
    }
}

/// Runs for as long as the process.
fn write_all(shared: &Shared, rest: Duration, mut destination: impl Write) {
    let mut batch = Vec::new();
    loop {
        let mut state = wait_for_lines(shared, shared.state());
        std::mem::swap(&mut state.waiting, &mut batch);
        state.writing = true;
        drop(state);
        if destination
            .write_all(&batch)
            .and_then(|()| destination.flush())
            .is_err()
        {
            // There is nobody to tell but the metric.
            let lines = batch.iter().filter(|byte| **byte == b'\n').count();
            shared.dropped.inc_by(lines as u64);
        }
        batch.clear();
        let mut state = shared.state();
        state.writing = false;
        if state.waiting.is_empty() {
            state.hurry = false;
            shared.changed.notify_all();
        }
        let rested = shared
            .changed
            .wait_timeout_while(state, rest, |state| !state.is_urgent());
        drop(rested);
    }
}

fn wait_for_lines<'a>(
    shared: &'a Shared,
    mut state: MutexGuard<'a, State>,
) -> MutexGuard<'a, State> {
    state.asleep = state.waiting.is_empty();
    let woken = shared
        .changed
        .wait_while(state, |state| state.waiting.is_empty());
    let mut state = woken.unwrap_or_else(PoisonError::into_inner);
    state.asleep = false;
    state
}

/// One line; `tracing-subscriber` writes each in one piece.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// More calls than a test makes.
    const CALLS: usize = 8;

    /// Takes what it is given only when it is let go on.
    struct Gate {
        go_on: mpsc::Receiver<()>,
        written: mpsc::SyncSender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Without the test on the other end it is closed for good.
            let _ = self.go_on.recv();
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "lines").expect("a valid name")
    }

    #[test]
    fn a_destination_that_takes_nothing_blocks_nobody_and_lost_lines_are_counted() {
        let (go_on, gate) = mpsc::sync_channel(CALLS);
        let (written, arrived) = mpsc::sync_channel(CALLS);
        let dropped = counter();
        let gate = Gate {
            go_on: gate,
            written,
        };
        let queue = LogQueue::start(gate, dropped.clone()).expect("starts");
        let mut logger = queue.clone();
        logger.write_all(b"first\n").expect("never fails");
        while !queue.shared.state().writing {
            thread::yield_now();
        }
        let line = [b'x'; 1024];
        let room = QUEUE_BYTES / line.len();
        // Were it not for the queue, the first of these would wait forever.
        for _ in 0..room + 7 {
            logger.write_all(&line).expect("never fails");
        }
        assert_eq!(dropped.get(), 7);
        queue.flush(Duration::from_millis(1));
        go_on.send(()).expect("the thread lives");
        assert_eq!(arrived.recv().expect("the thread lives"), b"first\n");
        go_on.send(()).expect("the thread lives");
        let rest = arrived.recv().expect("the thread lives");
        assert_eq!(rest.len(), QUEUE_BYTES, "what there was room for arrives");
        logger.write_all(b"again\n").expect("never fails");
        assert_eq!(dropped.get(), 7, "there is room again");
    }

    /// The first line is written at once; those that come while the thread rests are written together, at the latest when
    /// somebody waits for them.
    #[test]
    fn lines_of_a_burst_are_written_together() {
        let (go_on, gate) = mpsc::sync_channel(CALLS);
        let (written, arrived) = mpsc::sync_channel(CALLS);
        drop(go_on);
        let gate = Gate {
            go_on: gate,
            written,
        };
        let long = Duration::from_secs(3600);
        let queue = LogQueue::start_with(long, gate, counter()).expect("starts");
        let mut logger = queue.clone();
        logger.write_all(b"first\n").expect("never fails");
        assert_eq!(arrived.recv().expect("the thread lives"), b"first\n");
        for line in [b"two\n", b"six\n", b"ten\n"] {
            logger.write_all(line).expect("never fails");
        }
        queue.flush(Duration::from_secs(60));
        assert_eq!(arrived.try_recv().expect("written"), b"two\nsix\nten\n");
    }

    #[test]
    fn what_was_logged_is_written_when_the_flush_returns() {
        let (go_on, gate) = mpsc::sync_channel(CALLS);
        let (written, arrived) = mpsc::sync_channel(CALLS);
        // Open: every `recv` fails at once.
        drop(go_on);
        let gate = Gate {
            go_on: gate,
            written,
        };
        let queue = LogQueue::start(gate, counter()).expect("starts");
        queue
            .clone()
            .write_all(b"last words\n")
            .expect("never fails");
        queue.flush(Duration::from_secs(60));
        assert_eq!(arrived.try_recv().expect("written"), b"last words\n");
    }
}
