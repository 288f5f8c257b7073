//! Work buffers: large, pooled per thread, held only while there are bytes in them.
//!
//! A fresh 256 KiB allocation per read costs page faults each time (measured as a tenth of the byte path), while a
//! buffer kept per connection costs memory when it idles. So a thread keeps a few and lends them.

use std::cell::RefCell;

use bytes::Bytes;

/// Small buffers: interactive traffic and TLS records (at most 16 KiB of plaintext, RFC 8446 section 5.1).
pub const SMALL_BYTES: usize = 16 << 10;
/// Medium buffers: what TLS reads from; 256 KiB were a tenth slower there (measured).
pub const MEDIUM_BYTES: usize = 64 << 10;
/// Large buffers: bulk reads of applications. 64 KiB were 14 % slower, 512 KiB not faster (measured).
pub const LARGE_BYTES: usize = 256 << 10;
/// Idle small buffers that a thread keeps: 1 MiB.
const SMALL_KEPT: usize = 64;
/// Idle medium buffers that a thread keeps: 1 MiB.
const MEDIUM_KEPT: usize = 16;
/// Idle large buffers that a thread keeps: 4 MiB.
const LARGE_KEPT: usize = 16;
/// Below this a copy costs less than lending a buffer to a queue.
const COPY_BELOW_BYTES: usize = 2048;

thread_local! {
    static SMALL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
    static MEDIUM: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
    static LARGE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Which buffer to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// [`SMALL_BYTES`].
    Small,
    /// [`MEDIUM_BYTES`].
    Medium,
    /// [`LARGE_BYTES`].
    Large,
}

impl Size {
    /// Capacity in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Small => SMALL_BYTES,
            Self::Medium => MEDIUM_BYTES,
            Self::Large => LARGE_BYTES,
        }
    }

    /// The size for the next read: `bulk` after a read that filled the `room` it had, small again after one that would
    /// have fitted into a small buffer.
    #[must_use]
    pub fn after_read(self, read: usize, room: usize, bulk: Self) -> Self {
        if read >= room {
            bulk
        } else if read < SMALL_BYTES {
            Self::Small
        } else {
            self
        }
    }
}

/// A borrowed buffer; dropping it gives it back to the thread that drops it.
#[derive(Debug)]
pub struct Buffer {
    memory: Box<[u8]>,
    filled: usize,
}

impl Buffer {
    /// Takes a buffer. Its contents are those of an earlier user until overwritten, hence [`Buffer::freeze`] shows
    /// only what was filled.
    #[must_use]
    pub fn take(size: Size) -> Self {
        let pool = match size {
            Size::Small => &SMALL,
            Size::Medium => &MEDIUM,
            Size::Large => &LARGE,
        };
        let kept = pool.try_with(|pool| pool.borrow_mut().pop()).ok().flatten();
        Self {
            memory: kept.unwrap_or_else(|| vec![0; size.bytes()].into_boxed_slice()),
            filled: 0,
        }
    }

    /// All of its memory, for a read to fill.
    pub fn memory(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// Declares the first `filled` bytes as read.
    pub fn set_filled(&mut self, filled: usize) {
        self.filled = filled.min(self.memory.len());
    }

    /// What was read.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        self.memory.get(..self.filled).unwrap_or_default()
    }

    /// What was read, as shared bytes; small amounts are copied and the buffer goes back at once.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        if self.filled <= COPY_BELOW_BYTES {
            Bytes::copy_from_slice(self.filled())
        } else {
            Bytes::from_owner(self)
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.filled()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let (pool, kept) = match memory.len() {
            SMALL_BYTES => (&SMALL, SMALL_KEPT),
            MEDIUM_BYTES => (&MEDIUM, MEDIUM_KEPT),
            LARGE_BYTES => (&LARGE, LARGE_KEPT),
            _ => return,
        };
        // A thread that ends has no pool any more: the memory is then simply freed.
        let _ = pool.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < kept {
                pool.push(memory);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_shows_only_what_was_filled() {
        let mut first = Buffer::take(Size::Small);
        first.memory().fill(7);
        first.set_filled(SMALL_BYTES);
        drop(first);
        let mut second = Buffer::take(Size::Small);
        second.set_filled(3);
        assert_eq!(
            second.freeze().len(),
            3,
            "the former user's bytes stay hidden"
        );
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_limit() {
        let lent: Vec<_> = (0..LARGE_KEPT + 5)
            .map(|_| Buffer::take(Size::Large))
            .collect();
        drop(lent);
        assert_eq!(LARGE.with(|pool| pool.borrow().len()), LARGE_KEPT);
    }

    #[test]
    fn frozen_bytes_return_to_the_pool_with_their_last_user() {
        let mut buffer = Buffer::take(Size::Large);
        buffer.set_filled(LARGE_BYTES);
        let bytes = buffer.freeze();
        let before = LARGE.with(|pool| pool.borrow().len());
        drop(bytes);
        assert_eq!(LARGE.with(|pool| pool.borrow().len()), before + 1);
    }

    #[test]
    fn reads_grow_and_shrink_the_buffer() {
        let next = |size: Size, read| size.after_read(read, size.bytes(), Size::Large);
        assert_eq!(next(Size::Small, SMALL_BYTES), Size::Large);
        assert_eq!(next(Size::Large, 100), Size::Small);
        assert_eq!(next(Size::Large, SMALL_BYTES + 1), Size::Large);
        assert_eq!(next(Size::Small, 100), Size::Small);
        assert_eq!(
            Size::Small.after_read(SMALL_BYTES, SMALL_BYTES, Size::Medium),
            Size::Medium
        );
        assert_eq!(
            Size::Small.after_read(9_000, 9_000, Size::Large),
            Size::Large,
            "there was room for no more"
        );
    }
}
