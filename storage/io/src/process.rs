//! What the process as a whole asks of the kernel.

use std::io;

/// No transparent huge pages for this process. Filling one with zeros on its first touch takes up to five milliseconds,
/// and a shard thread that grows its memory would spend them at once, with every connection waiting; small pages take
/// the same time in pieces that nobody notices. Allocators ask for huge pages even where the system leaves it to them.
pub fn refuse_huge_pages() -> io::Result<()> {
    // SAFETY: the call takes no pointers; its unused arguments must be zero.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn huge_pages_are_off_afterwards() {
        super::refuse_huge_pages().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) }, 1);
    }
}
