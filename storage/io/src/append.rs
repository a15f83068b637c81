//! Appending to a file that is opened for direct writes, at any position.
//!
//! The disk takes whole blocks, a log grows by batches: the block in which the last append ended is written again with
//! what follows, and the file ends with zeros up to a block boundary until somebody cuts it. What is written again has
//! the same bytes as before, so that a write torn between sectors changes nothing that was there.

use std::io;

use bytes::Bytes;

use crate::{BLOCK_BYTES, Disk, File};

/// One write takes this much; a longer append goes out in several.
const WRITE_BYTES: usize = 1 << 20;

/// The bytes before the end of a log that share its last block. Whoever appends keeps it between appends to one file;
/// a new one costs the first append a read.
#[derive(Default)]
pub struct LastBlock {
    /// Where the block begins, and how many of its bytes are known.
    start: u64,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for LastBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LastBlock({} bytes at {})", self.bytes.len(), self.start)
    }
}

impl Disk {
    /// Writes `bufs` one after the other, beginning at `at`, which is where the log ends now. The file must be written by
    /// one append at a time. After an error the end of the file is unknown and `last` is empty.
    pub async fn append_at(
        &self,
        file: &File,
        last: &mut LastBlock,
        bufs: &[Bytes],
        at: u64,
    ) -> io::Result<()> {
        if !file.is_direct() {
            return self.write_vectored_at(file, bufs.to_vec(), at).await;
        }
        let mut known = std::mem::take(last);
        let mut start = at - at % BLOCK_BYTES as u64;
        let head = (at - start) as usize;
        if known.start != start || known.bytes.len() < head {
            known.bytes =
                if head == 0 { Vec::new() } else { self.read_at(file, start, head).await?.to_vec() };
            if known.bytes.len() < head {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        known.bytes.truncate(head);
        let mut left: u64 = head as u64 + bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        let mut rest = std::iter::once(&known.bytes[..]).chain(bufs.iter().map(|buf| &buf[..]));
        let mut piece: &[u8] = &[];
        let mut tail = Vec::new();
        while left > 0 {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(WRITE_BYTES);
            let whole = take.next_multiple_of(BLOCK_BYTES);
            let mut buffer = self.pool().take(whole);
            let mut filled = 0;
            while filled < take {
                if piece.is_empty() {
                    piece = rest.next().expect("the lengths were added up above");
                    continue;
                }
                let (now, later) = piece.split_at(piece.len().min(take - filled));
                buffer[filled..filled + now.len()].copy_from_slice(now);
                filled += now.len();
                piece = later;
            }
            buffer[take..whole].fill(0);
            let end = take - take % BLOCK_BYTES;
            tail = buffer[end..take].to_vec();
            let (back, written) = self.write_at(file, buffer.lend(), whole, start).await;
            buffer.give_back(back);
            written?;
            left -= take as u64;
            start += end as u64;
        }
        *last = LastBlock { start, bytes: tail };
        Ok(())
    }
}
