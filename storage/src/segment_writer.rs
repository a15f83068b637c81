//! Writing segments: batches go to the places that they were given, in order, one write of a partition at a time.
//!
//! Writing and counting are two things. `flush.rs` counts committed batches as part of their segments, and has them
//! written first; `direct.rs` has large ones written before they are committed, and with them whatever stands before
//! them. Bytes that nobody counts and no pointer in the WAL names mean nothing.
//!
//! Segments are written past the page cache, whole blocks into space reserved ahead; so a file that is being written
//! ends with zeros. No space and a deleted partition are the caller's matter; any other failed write poisons the shard.

use std::io;
use std::rc::Rc;

use bytes::Bytes;
use flumen_io::BLOCK_BYTES;

use crate::flush::FlushError;
use crate::group::{Group, Inner};
use crate::layout::Layout;
use crate::store::{Shard, add, is_no_space};

/// One write takes about this much of one partition.
const WRITE_BYTES_MAX: u64 = 1 << 20;

/// A growing segment is at most this much longer on the disk than what it holds.
const RESERVE_BYTES_MAX: u64 = 16 << 20;

/// How far the segments of a partition are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// The last entry.
    pub index: u64,
    /// Segment (-1: none) and the position behind its last byte.
    pub base: i64,
    pub position: u64,
    /// Length of its file, as far as that is known to be longer: zeros that later writes write over.
    pub reserved: u64,
}

impl Default for Written {
    fn default() -> Self {
        Self::up_to(0, Layout::empty())
    }
}

impl Written {
    pub fn up_to(index: u64, layout: Layout) -> Self {
        let (base, position) = layout.end();
        Self { index, base, position, reserved: 0 }
    }
}

struct Run {
    base: i64,
    starts: bool,
    /// The segment that ends where this one begins.
    sealed: Option<(i64, u64)>,
    position: u64,
    reserved: u64,
    bufs: Vec<Bytes>,
    bytes: u64,
    last_index: u64,
    /// As it was when this was planned.
    cuts: u64,
}

/// The next batches to write, none behind `index`.
fn plan(inner: &Inner, index: u64) -> Option<Run> {
    let written = inner.written;
    let batches = inner.tail.after(written.index).filter(|entry| entry.is_batch());
    let mut batches = batches.take_while(|entry| entry.index <= index);
    let first = batches.next()?;
    let place = first.place;
    let (base, position) = (place.base, u64::from(place.position));
    assert!(
        place.starts || (base, position) == (written.base, written.position),
        "batches are written in order"
    );
    let mut run = Run {
        base,
        starts: place.starts,
        sealed: (place.starts && written.base >= 0).then_some((written.base, written.position)),
        position,
        reserved: if place.starts { 0 } else { written.reserved },
        bufs: vec![first.bytes.clone()],
        bytes: first.bytes.len() as u64,
        last_index: first.index,
        cuts: inner.cuts,
    };
    for entry in batches {
        let bytes = entry.bytes.len() as u64;
        if entry.place.starts || run.bytes + bytes > WRITE_BYTES_MAX {
            break;
        }
        run.bufs.push(entry.bytes.clone());
        run.bytes += bytes;
        run.last_index = entry.index;
    }
    Some(run)
}

/// Writes everything up to an entry, as far as that has not happened.
pub(crate) async fn write_up_to(shard: &Rc<Shard>, group: &Rc<Group>, index: u64) -> Result<(), FlushError> {
    let _alone = group.writing.lock().await;
    crate::flush::settle_cut(shard, group).await?;
    while !group.deleted.get() {
        let Some(run) = plan(&group.inner.borrow(), index) else { break };
        let base = run.base;
        write(shard, group, run).await.map_err(|(doing, error)| {
            if group.deleted.get() {
                // A directory that is gone with its deleted group is no failure.
                return FlushError::NoSpace;
            }
            if is_no_space(&error) {
                shard.note_no_space(doing, &error);
                return FlushError::NoSpace;
            }
            shard.poison(&format!("{doing} {}: {error}", group.log_path(base).display()));
            FlushError::Poisoned
        })?;
    }
    Ok(())
}

async fn write(shard: &Rc<Shard>, group: &Rc<Group>, run: Run) -> Result<(), (&'static str, io::Error)> {
    if let Some((base, bytes)) = run.sealed {
        seal(shard, group, base, bytes).map_err(|e| ("closing segment before", e))?;
    }
    let file = shard.file_or_create(group, run.base).map_err(|e| ("opening segment", e))?;
    let (end, limit) = (run.position + run.bytes, group.inner.borrow().config.segment_bytes);
    let mut reserved = run.reserved;
    if let Some(length) = reservation(end, reserved, limit).filter(|_| file.is_direct()) {
        let grown = file.clone();
        let result = shard.disk.off_thread(move || grown.allocate(length)).await;
        result.and_then(|result| result).map_err(|e| ("reserving space for segment", e))?;
        reserved = length;
    }
    let mut last_block = shard.take_last_block(group.id, run.base);
    let appended = shard.disk.append_at(&file, &mut last_block, &run.bufs, run.position).await;
    appended.map_err(|e| ("writing segment", e))?;
    shard.leave_last_block(group.id, run.base, last_block);
    shard.note_space();
    add(&shard.counters.segment_bytes, run.bytes);
    let mut inner = group.inner.borrow_mut();
    // A sealed one may have been shortened, and from now on its length is where it ends.
    for base in run.sealed.map(|(base, _)| base).into_iter().chain([run.base]) {
        inner.note_unsynced(base);
    }
    inner.dir_dirty |= run.starts;
    if inner.cuts == run.cuts {
        inner.written = Written { index: run.last_index, base: run.base, position: end, reserved };
    }
    Ok(())
}

/// The length to which a segment's file should grow before an append that ends at `end`; `None` when there is room. Grows
/// by as much again as there is, so that a small segment stays small on the disk and a large one is extended rarely and
/// lies in few pieces.
fn reservation(end: u64, reserved: u64, limit: u64) -> Option<u64> {
    let block = BLOCK_BYTES as u64;
    let need = end.next_multiple_of(block);
    if need <= reserved {
        return None;
    }
    let wanted = (end + end.min(RESERVE_BYTES_MAX)).min(limit.max(end));
    Some(wanted.next_multiple_of(block).max(need))
}

/// Neither what was reserved nor what a cut left behind its end must become part of a finished segment.
pub(crate) fn seal(shard: &Rc<Shard>, group: &Group, base: i64, bytes: u64) -> io::Result<()> {
    let file = shard.file(group, base)?;
    if file.len()? > bytes { file.set_len(bytes) } else { Ok(()) }
}
