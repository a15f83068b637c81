//! Aligned buffers that are used again.
//!
//! A fresh mapping costs a page fault for every block that is touched, more than the disk's own work for it; a buffer
//! that was used a moment ago is mapped and mostly in the cache. One pool per `Disk`; buffers come back from whatever
//! thread drops them. What is in a buffer is left over from its last use.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::{AlignedBuf, BLOCK_BYTES};

/// Sizes on the shelves: the usual reads and writes (256 KiB, 1 MiB, 4 MiB) and a block at either end of them. What is
/// larger is rare and mapped for once.
const CLASSES: [usize; 3] =
    [(256 << 10) + 2 * BLOCK_BYTES, (1 << 20) + 2 * BLOCK_BYTES, (4 << 20) + 2 * BLOCK_BYTES];

/// Unused buffers of one class, in bytes; more go back to the system.
const CLASS_BYTES_KEPT: usize = 8 << 20;

#[derive(Debug, Default)]
struct Shelves([Mutex<Vec<AlignedBuf>>; CLASSES.len()]);

#[derive(Debug, Clone, Default)]
pub struct BufferPool(Arc<Shelves>);

impl BufferPool {
    /// A buffer of at least `len` bytes.
    pub fn take(&self, len: usize) -> PooledBuf {
        let class = CLASSES.iter().position(|size| len <= *size);
        let found = class.and_then(|class| self.0.0[class].lock().expect("no panic under this lock").pop());
        let buf = found.unwrap_or_else(|| AlignedBuf::zeroed(class.map_or(len, |class| CLASSES[class])));
        PooledBuf { buf: Some(buf), class, shelves: Arc::clone(&self.0) }
    }

    #[cfg(test)]
    fn unused(&self) -> usize {
        self.0.0.iter().map(|shelf| shelf.lock().unwrap().len()).sum()
    }
}

#[derive(Debug)]
pub struct PooledBuf {
    /// `None` only while an operation has it, and in `drop`.
    buf: Option<AlignedBuf>,
    class: Option<usize>,
    shelves: Arc<Shelves>,
}

impl PooledBuf {
    /// Part of it as shared bytes; the buffer goes back with the last reference.
    pub fn freeze(self, range: Range<usize>) -> Bytes {
        Bytes::from_owner(self).slice(range)
    }

    pub(crate) fn lend(&mut self) -> AlignedBuf {
        self.buf.take().expect("lent to one operation at a time")
    }

    pub(crate) fn give_back(&mut self, buf: AlignedBuf) {
        self.buf = Some(buf);
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        // An operation that was abandoned keeps the buffer until the kernel is done, and it does not come back.
        let (Some(buf), Some(class)) = (self.buf.take(), self.class) else { return };
        let mut shelf = self.shelves.0[class].lock().expect("no panic under this lock");
        if buf.len() == CLASSES[class] && (shelf.len() + 1) * CLASSES[class] <= CLASS_BYTES_KEPT {
            shelf.push(buf);
        }
    }
}

impl Deref for PooledBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_deref().unwrap_or(&[])
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_deref_mut().unwrap_or(&mut [])
    }
}

impl AsRef<[u8]> for PooledBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_pool_is_bounded() {
        let pool = BufferPool::default();
        let first = pool.take(10);
        let at = first.as_ptr();
        assert_eq!((first.len(), at as usize % BLOCK_BYTES), (CLASSES[0], 0));
        let part = first.freeze(5..9);
        let again = part.slice(1..2);
        drop(part);
        assert_eq!(pool.unused(), 0, "a slice is left");
        std::thread::spawn(move || drop(again)).join().unwrap();
        assert_eq!(pool.unused(), 1);
        assert_eq!(pool.take(CLASSES[0]).as_ptr(), at);
        let many: Vec<_> = (0..100).map(|_| pool.take(1 << 20)).collect();
        drop(many);
        assert_eq!(pool.unused(), 1 + CLASS_BYTES_KEPT / CLASSES[1]);
        let large = pool.take(20 << 20);
        assert!(large.len() >= 20 << 20);
        drop(large);
        assert_eq!(pool.unused(), 1 + CLASS_BYTES_KEPT / CLASSES[1], "too large to keep");
    }
}
