//! Memory for O_DIRECT: aligned to the block size and zeroed. Pages that were never written cost nothing.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

/// Alignment and granularity of direct I/O; covers every disk with blocks of up to 4096 bytes.
pub const BLOCK_BYTES: usize = 4096;

/// A mapping of its own rather than the allocator: the allocator would clear the pages by writing them, and a large
/// buffer that is freed goes back to the system at once.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone; nothing in it is tied to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// At least `len` bytes, rounded up to whole blocks, all zero. Panics when there is no memory, as allocation does.
    pub fn zeroed(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(BLOCK_BYTES);
        // SAFETY: a fresh private anonymous mapping; no existing memory is touched.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(start != libc::MAP_FAILED, "no memory for a buffer of {len} bytes");
        let start = NonNull::new(start.cast::<u8>()).expect("mmap does not map page zero");
        Self { start, len }
    }

    /// The first `len` bytes as shared bytes; the mapping is freed with the last reference.
    pub fn freeze(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `zeroed`, and no reference outlives its owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped and initialised (zero pages), and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_rounded() {
        let mut buf = AlignedBuf::zeroed(5000);
        assert_eq!(buf.len(), 8192);
        assert_eq!(buf.as_ptr() as usize % BLOCK_BYTES, 0);
        assert!(buf.iter().all(|byte| *byte == 0));
        buf[8191] = 7;
        buf[0] = 1;
        let bytes = buf.freeze(8192);
        assert_eq!((bytes[0], bytes[8191]), (1, 7));
        let part = bytes.slice(8190..);
        drop(bytes);
        assert_eq!(&part[..], &[0, 7]);
    }
}
