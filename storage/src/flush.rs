//! The flusher of a shard: committed entries leave the WAL for their segments in runs, and WAL files retire (`retire.rs`).
//!
//! One task, under `flush_lock`; one run at a time, and several of different groups when a ring fills faster than that.
//! No space means waiting and trying again, with everything still in the WAL and in memory; any other failed write, and
//! any failed sync, poisons the shard: after it the kernel may have dropped the bytes, so trying again would prove nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_io::{BLOCK_BYTES, DirEntry, FileSystem, Mode};
use flumen_protocol::record_batch;
use futures_util::stream::{self, StreamExt};

use crate::direct;
use crate::failpoint::{self, Failpoint};
use crate::group::{FLUSH_RUN_BYTES, Group, Inner, Segment};
use crate::mutant::{self, Mutant};
use crate::producer_state::ProducerState;
use crate::receive;
use crate::retire::retire;
use crate::segment_index::{
    INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, IndexBuilder, IndexEntry, encode_entry, encode_header,
};
use crate::segment_name::SegmentName;
use crate::store::{Shard, add, is_no_space};
use crate::tail::TailEntry;
use crate::types::{LANES, Lsn};
use crate::walk::{Step, Walk};

/// Partitions that hold eviction up and are seen to before a WAL file is emptied. Emptying one takes some ten runs, and
/// what it moves is of one lane: without this a quiet partition of the other lane could hold up everybody's eviction.
const EVICTIONS_PER_TURN: usize = 16;

/// One write takes about this much of one partition.
const FLUSH_MAX_BYTES: u64 = 1 << 20;

/// After this much of a partition went to segments its producers are written down, so that a restart after a crash reads
/// the headers of no more than that.
const SNAPSHOT_INTERVAL_BYTES: u64 = 64 << 20;
/// The newest, and one more in case it is damaged.
const SNAPSHOTS_KEPT: usize = 2;
/// Syncs of one retirement in flight together; the disk's queue is deeper, but readers want some of it.
const SYNCS_IN_FLIGHT: usize = 16;

/// Beyond this many files one sync of the whole file system is cheaper than one each.
pub(crate) const SYNC_EACH_MAX: usize = 64;

/// Pauses between tries while the disk is full: 100 ms, doubling to 2 s.
const NO_SPACE_PAUSE_MS: (u64, u64) = (100, 2_000);

/// A retirement that waits for the high watermark looks again after this.
const RETIRE_PAUSE: Duration = Duration::from_millis(20);

/// A growing segment is at most this much longer on the disk than what it holds.
const RESERVE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug)]
pub(crate) enum FlushError {
    NoSpace,
    Poisoned,
}

struct Run {
    /// Of which log it is, should that begin anew meanwhile.
    begun: u64,
    base: i64,
    /// Raft index of its first batch.
    first_index: u64,
    new_segment: bool,
    sealed: Option<(i64, u64)>,
    /// How long the file is already, beyond what counts of it.
    reserved: u64,
    position: u64,
    bufs: Vec<Bytes>,
    bytes: u64,
    count: usize,
    index: Vec<IndexEntry>,
    builder: IndexBuilder,
    last_index: u64,
    /// Of its last batch; a control entry behind that may be replaced, and leaves no trace in the segment.
    last_batch: u64,
    last_batch_term: u64,
    last_term: u64,
    end: i64,
    first_timestamp: i64,
}

/// The next run of entries of a group that are committed, or not above `upto`, and the segment it goes to.
fn plan_run(inner: &Inner, upto: u64) -> Option<Run> {
    let may_go = |entry: &&TailEntry| entry.index <= upto || inner.is_committed(entry);
    let mut committed = inner.tail.unflushed().take_while(may_go).peekable();
    committed.peek()?;
    let limit = inner.segment_limit();
    let active = inner.segments.back().filter(|segment| segment.compacted.is_none());
    let mut run = Run {
        begun: inner.begun,
        first_index: 0,
        base: active.map_or(inner.flushed_end, |segment| segment.base),
        new_segment: active.is_none(),
        sealed: None,
        reserved: active.map_or(0, |segment| segment.reserved),
        position: active.map_or(0, |segment| segment.bytes),
        bufs: Vec::new(),
        bytes: 0,
        count: 0,
        index: Vec::new(),
        builder: IndexBuilder::resume(
            active.and_then(|segment| segment.max_timestamp).unwrap_or(i64::MIN),
            active.map_or(0, |segment| segment.bytes),
        ),
        last_index: inner.flushed_index,
        last_batch: 0,
        last_batch_term: 0,
        last_term: inner.flushed_term,
        end: inner.flushed_end,
        first_timestamp: active.and_then(|segment| segment.first_timestamp).unwrap_or(-1),
    };
    for entry in committed {
        if entry.is_batch() {
            let bytes = entry.bytes.len() as u64;
            let position = run.position + run.bytes;
            let too_big = position > 0 && position + bytes > limit;
            let too_old = position > 0
                && inner.config.segment_ms >= 0
                && run.first_timestamp >= 0
                && entry.max_timestamp.saturating_sub(run.first_timestamp) > inner.config.segment_ms;
            if too_big || too_old {
                if run.count > 0 {
                    break;
                }
                run.sealed = (!run.new_segment).then_some((run.base, run.position));
                run.base = entry.base_offset;
                run.new_segment = true;
                run.reserved = 0;
                run.position = 0;
                run.first_timestamp = -1;
                run.builder = IndexBuilder::new();
            }
            if run.bytes > 0 && run.bytes + bytes > FLUSH_MAX_BYTES {
                break;
            }
            if run.bytes == 0 {
                run.first_index = entry.index;
            }
            if run.first_timestamp < 0 {
                run.first_timestamp = entry.max_timestamp;
            }
            let term = u32::try_from(entry.term).unwrap_or(u32::MAX);
            let position = run.position + run.bytes;
            run.index.extend(run.builder.batch(
                entry.base_offset,
                position,
                term,
                entry.index,
                entry.max_timestamp,
            ));
            (run.last_batch, run.last_batch_term) = (entry.index, entry.term);
            run.bufs.push(entry.bytes.clone());
            run.bytes += bytes;
        }
        run.count += 1;
        run.last_index = entry.index;
        run.last_term = entry.term;
        run.end = entry.next_offset;
    }
    if run.bytes > 0 {
        let term = u32::try_from(run.last_batch_term).unwrap_or(u32::MAX);
        run.index.extend(run.builder.end(run.end, run.position + run.bytes, term, run.last_batch + 1));
    }
    Some(run)
}

/// Moves one run of a group to its segment. `Ok(false)` when nothing committed is left.
pub(crate) async fn flush_run(shard: &Rc<Shard>, group: &Rc<Group>) -> Result<bool, FlushError> {
    flush_run_to(shard, group, 0).await
}

/// As `flush_run`; entries up to the index `upto` need not be committed.
pub(crate) async fn flush_run_to(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    upto: u64,
) -> Result<bool, FlushError> {
    if group.deleted.get() {
        return Ok(false);
    }
    finish_cut(shard, group).await?;
    // After a start nobody knows yet how new the segment's records are; its index must say so truly from here on.
    let unknown = {
        let inner = group.inner.borrow();
        inner.segments.back().filter(|segment| segment.max_timestamp.is_none()).map(|segment| segment.base)
    };
    if let Some(base) = unknown {
        crate::read::learn_timestamps(shard, group, base).await;
    }
    let Some(run) = plan_run(&group.inner.borrow(), upto) else { return Ok(false) };
    group.set_flushing(true);
    let result = write_run(shard, group, run).await;
    group.set_flushing(false);
    result.map(|()| true)
}

/// What a cut left behind, or a log that began anew, goes once that is safe; before that it still counts.
pub(crate) async fn finish_cut(shard: &Rc<Shard>, group: &Rc<Group>) -> Result<(), FlushError> {
    loop {
        let cut = group.inner.borrow().cut_by;
        let early = mutant::is(Mutant::WritesOverBeforeCutIsSafe) && group.unplaced.borrow().is_empty();
        let Some((lane, lsn)) = cut.filter(|_| !early) else {
            return Ok(());
        };
        shard.wait_safe(lane, lsn).await.map_err(|_| FlushError::Poisoned)?;
        // Another cut may have come meanwhile, and what it left still counts.
        if group.inner.borrow().cut_by == cut {
            break;
        }
    }
    let (cut, left, begun_with) = {
        let mut inner = group.inner.borrow_mut();
        (inner.cut_by.take(), std::mem::take(&mut inner.cut_files), inner.begun_with.take())
    };
    for name in left {
        for path in [group.segment_path(name), group.segment_index_path(name)] {
            match shard.files.remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    shard.poison(&format!("removing {}: {error}", path.display()));
                    return Err(FlushError::Poisoned);
                }
                _ => {}
            }
        }
    }
    if let Err((path, error)) = receive::put_in_place(shard, group) {
        let going = group.deleting.get() || group.deleted.get();
        if !going && !is_no_space(&error) {
            shard.poison(&format!("giving {} its name: {error}", path.display()));
            return Err(FlushError::Poisoned);
        }
        if !going {
            shard.note_no_space("giving a segment its name", &error);
        }
        let mut inner = group.inner.borrow_mut();
        inner.begun_with = inner.begun_with.take().or(begun_with);
        inner.cut_by = inner.cut_by.or(cut);
        return Err(FlushError::NoSpace);
    }
    let Some((offset, producers)) = begun_with else { return Ok(()) };
    let (files, dir, snapshot) = (shard.files.clone(), group.dir.clone(), producers.clone());
    let mut alone = shard.sync_alone().await.map_err(|_| FlushError::Poisoned)?;
    let put = shard.disk.off_thread(move || put_beginning(&files, &dir, offset, &snapshot)).await;
    match put.and_then(|result| result) {
        Ok(()) => {
            let mut inner = group.inner.borrow_mut();
            if inner.begun_with.is_none() {
                inner.snapshot_offset = offset;
            }
            Ok(())
        }
        Err(_) if group.deleting.get() || group.deleted.get() => Ok(()),
        Err(error) if is_no_space(&error) => {
            shard.note_no_space("writing producers", &error);
            let mut inner = group.inner.borrow_mut();
            inner.begun_with.get_or_insert((offset, producers));
            inner.cut_by = inner.cut_by.or(cut);
            Err(FlushError::NoSpace)
        }
        Err(error) => {
            shard.sync_failed(&mut alone, &group.dir, &error);
            Err(FlushError::Poisoned)
        }
    }
}

/// The producers with which a log began are in none of its segments: they stand in a file that is synced, and nothing else of
/// the kind is left, nor what compaction knew of the former log.
fn put_beginning(files: &FileSystem, dir: &Path, offset: i64, producers: &[u8]) -> io::Result<()> {
    let old = snapshots(&files.list(dir)?, dir).into_iter().map(|(_, path)| path);
    for path in old.chain([dir.join(crate::compact::CLEAN_FILE)]) {
        match files.remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let path = dir.join(format!("{offset:020}.snapshot"));
    files.write(&path, producers)?;
    sync_snapshot(files, dir, &path)
}

/// Its content and its name.
pub(crate) fn sync_snapshot(files: &FileSystem, dir: &Path, path: &Path) -> io::Result<()> {
    files.open(path, Mode { write: true, ..Mode::default() })?.sync_data()?;
    files.sync_dir(dir)
}

async fn write_run(shard: &Rc<Shard>, group: &Rc<Group>, mut run: Run) -> Result<(), FlushError> {
    if run.bytes > 0 {
        let fail = |doing: &str, error: io::Error| {
            // A directory that is gone with its deleted group is no failure.
            if group.deleted.get() {
                return FlushError::NoSpace;
            }
            if is_no_space(&error) {
                shard.note_no_space(doing, &error);
                // The next try may go on in the segment before, and then this file must not stand among the segments.
                if run.new_segment && !abandon(shard, group, run.base) {
                    return FlushError::Poisoned;
                }
                return FlushError::NoSpace;
            }
            shard.poison(&format!("{doing} {}: {error}", group.log_path(run.base).display()));
            FlushError::Poisoned
        };
        if let Some((base, bytes)) = run.sealed {
            seal(shard, group, base, bytes).map_err(|e| fail("closing segment before", e))?;
        }
        let file = if run.new_segment {
            let file = shard.create_file(group, run.base).map_err(|e| fail("creating segment", e))?;
            failpoint::pass(Failpoint::RollCreated);
            file
        } else {
            shard.file(group, run.base).map_err(|e| fail("opening segment", e))?
        };
        let (end, limit) = (run.position + run.bytes, group.inner.borrow().segment_limit());
        if let Some(length) = reservation(end, run.reserved, limit).filter(|_| file.is_direct()) {
            let grown = file.clone();
            let reserved = shard.disk.off_thread(move || grown.allocate(length)).await;
            reserved.and_then(|result| result).map_err(|e| fail("reserving space for segment", e))?;
            run.reserved = length;
        }
        let mut last_block = shard.take_last_block(group.id, run.base);
        shard
            .disk
            .append_at(&file, &mut last_block, &run.bufs, run.position)
            .await
            .map_err(|e| fail("writing segment", e))?;
        shard.leave_last_block(group.id, run.base, last_block);
        if run.new_segment {
            failpoint::pass(Failpoint::RollWritten);
        }
        if let Err(error) = append_index(&shard.files, group, run.base, run.new_segment, &run.index) {
            // An index that lacks its end is rebuilt from the segment.
            tracing::warn!(group = group.id, %error, "index not written");
        }
        shard.note_space();
        add(&shard.counters.segment_bytes, run.bytes);
    }
    if group.deleted.get() {
        return Ok(());
    }
    if !crate::anew::is_of_this_log(group, run.begun) {
        // What was written is of a log that is no more.
        shard.forget_file(group.id, run.base);
        group.inner.borrow_mut().cut_files.push(SegmentName::plain(run.base));
        return Ok(());
    }
    let snapshot_due = {
        let mut inner = group.inner.borrow_mut();
        let inner = &mut *inner;
        if run.bytes > 0 {
            if run.new_segment {
                let first_index = run.first_index;
                inner.segments.push_back(Segment { first_index, ..Segment::new(run.base, 0) });
                inner.dir_dirty = true;
            }
            // A sealed one may have been shortened, and from now on its length is where it ends.
            for base in run.sealed.map(|(base, _)| base).into_iter().chain([run.base]) {
                if !inner.dirty.contains(&base) {
                    inner.dirty.push(base);
                }
            }
            if let Some(segment) = inner.segments.back_mut() {
                segment.reserved = run.reserved;
                segment.bytes = run.position + run.bytes;
                segment.max_timestamp = Some(run.builder.max_timestamp);
                segment.first_timestamp = Some(run.first_timestamp);
                if let Some(index) = &segment.index {
                    index.borrow_mut().extend_from_slice(&run.index);
                }
            }
        }
        let before = inner.tail.unflushed_bytes();
        inner.tail.mark_flushed(run.count);
        let moved = before - inner.tail.unflushed_bytes();
        shard.unflushed_bytes.set(shard.unflushed_bytes.get().saturating_sub(moved));
        inner.flushed_index = run.last_index;
        inner.flushed_term = run.last_term;
        inner.flushed_end = run.end;
        inner.committed_index = inner.committed_index.max(run.last_index);
        inner.bytes_since_snapshot = inner.bytes_since_snapshot.saturating_add(run.bytes);
        inner.next_run_bytes = FLUSH_RUN_BYTES;
        inner.meta_dirty = true;
        let due = inner.bytes_since_snapshot >= SNAPSHOT_INTERVAL_BYTES
            || (run.new_segment && inner.segments.len() > 1);
        due && inner.producers_whole
    };
    if snapshot_due {
        let group = Rc::clone(group);
        let (keep, (offset, bytes)) = {
            let inner = &mut *group.inner.borrow_mut();
            (inner.snapshot_safe, snapshot_of(inner, &group.producers.borrow()))
        };
        let dir = group.dir.clone();
        let files = shard.files.clone();
        let written =
            shard.disk.off_thread(move || write_snapshot(&files, &dir, (offset, keep), &bytes)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(group = group.id, %error, "producer snapshot not written");
            // A clean stop tries again.
            group.inner.borrow_mut().snapshot_offset = -1;
        }
    }
    shard.evict();
    Ok(())
}

/// Removes a segment that was begun and has nothing that counts. `false`: the shard is poisoned.
fn abandon(shard: &Shard, group: &Group, base: i64) -> bool {
    shard.forget_file(group.id, base);
    let path = group.log_path(base);
    match shard.files.remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            shard.poison(&format!("removing {}: {error}", path.display()));
            false
        }
        _ => true,
    }
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

fn append_index(
    files: &FileSystem,
    group: &Group,
    base: i64,
    fresh: bool,
    entries: &[IndexEntry],
) -> io::Result<()> {
    let path = group.index_path(base);
    let file = files.open(&path, Mode { write: true, create: true, ..Mode::default() })?;
    let mut out = Vec::with_capacity(INDEX_HEADER_BYTES + entries.len() * INDEX_ENTRY_BYTES);
    let length = if fresh { 0 } else { file.len()? as usize };
    let mut at = 0;
    if length < INDEX_HEADER_BYTES {
        file.set_len(0)?;
        out.extend_from_slice(&encode_header(base));
    } else {
        // A torn entry at the end is written over.
        at = INDEX_HEADER_BYTES + (length - INDEX_HEADER_BYTES) / INDEX_ENTRY_BYTES * INDEX_ENTRY_BYTES;
    }
    for entry in entries {
        out.extend_from_slice(&encode_entry(entry));
    }
    file.write_all_at(&out, at as u64)
}

/// The producers before what is not committed, which may be cut away again; with the offset where that begins.
pub(crate) fn encode_producers(inner: &Inner, producers: &ProducerState) -> (i64, Vec<u8>) {
    let uncommitted = inner.tail.iter().rev().take_while(|entry| entry.index > inner.committed_index).last();
    let committed_end = uncommitted.map_or(inner.log_end, |entry| entry.base_offset);
    producers.encode_settled(committed_end, |offset| inner.epochs.epoch_at(offset))
}

/// To be written to a file at once.
pub(crate) fn snapshot_of(inner: &mut Inner, producers: &ProducerState) -> (i64, Vec<u8>) {
    let (offset, bytes) = encode_producers(inner, producers);
    inner.snapshot_offset = offset;
    inner.bytes_since_snapshot = 0;
    (offset, bytes)
}

pub(crate) fn snapshots(listed: &[DirEntry], dir: &Path) -> Vec<(i64, PathBuf)> {
    let mut found: Vec<(i64, PathBuf)> = listed
        .iter()
        .filter_map(|entry| {
            Some((entry.name.strip_suffix(".snapshot")?.parse().ok()?, dir.join(&entry.name)))
        })
        .collect();
    found.sort();
    found
}

/// Not synced: a torn one fails its checksum and is ignored. Older ones go, but for the last before it and the one at `keep`,
/// which is not written over either.
pub(crate) fn write_snapshot(
    files: &FileSystem,
    dir: &Path,
    (offset, keep): (i64, i64),
    bytes: &[u8],
) -> io::Result<PathBuf> {
    let path = dir.join(format!("{offset:020}.snapshot"));
    if offset != keep {
        failpoint::pass_torn(Failpoint::ProducersTorn, || files.write(&path, &bytes[..bytes.len() / 2]));
        files.write(&path, bytes)?;
        failpoint::pass(Failpoint::ProducersWritten);
    }
    let found = snapshots(&files.list(dir)?, dir);
    for (at, old) in &found[..found.len().saturating_sub(SNAPSHOTS_KEPT)] {
        if *at != keep {
            files.remove_file(old)?;
        }
    }
    Ok(path)
}

/// Where in its segment a cut at `offset` would be; `None` if it is between two. Reads headers with plain calls: this
/// happens at most once after a change of leader. Changes nothing, so that a cut that cannot be made is refused.
pub(crate) fn place_of_cut(
    shard: &Shard,
    group: &Group,
    inner: &Inner,
    offset: i64,
) -> io::Result<Option<u64>> {
    let Some(segment) = inner.segments.iter().rev().find(|segment| segment.base < offset) else {
        return Ok(None);
    };
    // A compacted one holds nothing above what is committed, so there is nothing to cut in it.
    if segment.compacted.is_some() {
        return Ok(None);
    }
    let file = shard.files.open(&group.log_path(segment.base), Mode::default())?;
    position_of(&file, segment.base, segment.bytes, offset).map(Some)
}

/// Raft replaced entries that were in segments already (recovery puts all there). Cuts the log in memory, at the place
/// that `place_of_cut` has found; the files are written over once the replacing entries are durable.
pub(crate) fn cut_segments(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    inner: &mut Inner,
    (index, offset, place): (u64, i64, Option<u64>),
) {
    while inner.segments.back().is_some_and(|segment| segment.base >= offset) {
        if let Some(segment) = inner.segments.pop_back() {
            inner.dirty.retain(|base| *base != segment.base);
            shard.forget_file(group.id, segment.base);
            // Until the cut is durable the file still counts.
            inner.cut_files.push(segment.name());
        }
    }
    if let (Some(segment), Some(place)) = (inner.segments.back_mut(), place) {
        segment.bytes = place;
        segment.reserved = 0;
        segment.index = None;
        segment.max_timestamp = None;
        let _ = shard.files.remove_file(&group.index_path(segment.base));
    }
    inner.cuts += 1;
    inner.flushed_end = offset;
    inner.flushed_index = index - 1;
    inner.flushed_term = inner.last_term;
    // Set to the commit of the replacing entries once they have one.
    inner.cut_by = Some((inner.lane, Lsn::MAX));
    shard.read_ahead.borrow_mut().retain(|ahead| ahead.group != group.id);
}

/// Where the batch with `offset` begins.
pub(crate) fn position_of(file: &flumen_io::File, base: i64, bytes: u64, offset: i64) -> io::Result<u64> {
    let mut position = 0;
    let mut at = base;
    let mut piece = vec![0; 1 << 20];
    while position < bytes && at < offset {
        let want = piece.len().min((bytes - position) as usize);
        let got = file.read_full_at(&mut piece[..want], position)?;
        let mut walk = Walk::new(&piece[..got], at);
        let mut need = 0;
        while walk.offset() < offset {
            match walk.step() {
                Step::Batch(..) => {}
                Step::End => break,
                Step::Short(bytes) => {
                    need = bytes;
                    break;
                }
                Step::Damaged(reason) => return Err(io::Error::other(reason)),
            }
        }
        position += walk.at() as u64;
        at = walk.offset();
        if walk.at() == 0 {
            // What a header claims is not believed beyond the end.
            if got < want || need <= piece.len() || need as u64 > bytes - position {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            piece.resize(need, 0);
        }
    }
    Ok(position)
}

async fn back_off(shard: &Rc<Shard>, pause_ms: &mut u64) {
    tokio::time::sleep(Duration::from_millis(*pause_ms)).await;
    *pause_ms = (*pause_ms * 2).min(NO_SPACE_PAUSE_MS.1);
    if !shard.is_live() {
        *pause_ms = NO_SPACE_PAUSE_MS.0;
    }
}

/// Whether there is another run to make of a group right after one.
fn flush_again(shard: &Shard, group: &Group) -> bool {
    let bytes = group.unflushed_bytes();
    let pressed = shard.cache_bytes.get() > shard.config.cache_bytes as u64;
    group.may_flush() && !group.deleted.get() && (bytes >= FLUSH_RUN_BYTES || (pressed && bytes > 0))
}

/// The flusher task.
pub(crate) async fn run(shard: Rc<Shard>) {
    let mut pause_ms = NO_SPACE_PAUSE_MS.0;
    while shard.is_live() {
        let mut worked = false;
        {
            let _alone = shard.flush_lock.lock().await;
            if shard.closing.get() {
                return;
            }
            // Somebody waits for these.
            match direct::serve(&shard).await {
                Ok(served) => worked |= served,
                Err(FlushError::NoSpace) => back_off(&shard, &mut pause_ms).await,
                Err(FlushError::Poisoned) => return,
            }
            for _ in 0..EVICTIONS_PER_TURN {
                // Writing a run evicts, and that names the next.
                let Some(group) = shard.evicts_next.take() else { break };
                worked = true;
                match flush_run(&shard, &group).await {
                    Ok(true) => {}
                    // Not committed yet: its commit comes back to it.
                    Ok(false) => break,
                    Err(FlushError::NoSpace) => {
                        back_off(&shard, &mut pause_ms).await;
                        break;
                    }
                    Err(FlushError::Poisoned) => return,
                }
            }
            for lane in LANES {
                if shard.wal(lane).wants_retirement() {
                    match retire(&shard, lane).await {
                        Ok(true) => worked = true,
                        Ok(false) => {}
                        Err(FlushError::NoSpace) => back_off(&shard, &mut pause_ms).await,
                        Err(FlushError::Poisoned) => return,
                    }
                }
            }
            let width = LANES.iter().map(|lane| shard.wal(*lane).runs_in_flight()).max().unwrap_or(1);
            let next: Vec<Rc<Group>> = {
                let mut queue = shard.flush_queue.borrow_mut();
                let count = width.min(queue.len());
                queue.drain(..count).collect()
            };
            // Each group stands in the queue once, so no two runs are of one group.
            let flushes = next.iter().map(|group| {
                group.queued.set(false);
                flush_run(&shard, group)
            });
            let outcomes = futures_util::future::join_all(flushes).await;
            for (group, outcome) in next.into_iter().zip(outcomes) {
                worked = true;
                match outcome {
                    Ok(_) => {
                        pause_ms = NO_SPACE_PAUSE_MS.0;
                        if flush_again(&shard, &group) {
                            shard.queue_flush(&group);
                        }
                    }
                    Err(FlushError::NoSpace) => {
                        shard.queue_flush(&group);
                        back_off(&shard, &mut pause_ms).await;
                    }
                    Err(FlushError::Poisoned) => return,
                }
            }
        }
        if worked {
            // Requests first: the flusher fills the gaps.
            tokio::task::yield_now().await;
        } else if LANES.iter().any(|lane| shard.wal(*lane).wants_retirement()) {
            let _ = tokio::time::timeout(RETIRE_PAUSE, shard.flush_wake.notified()).await;
        } else {
            shard.flush_wake.notified().await;
        }
    }
}

/// Makes everything written to the segments of `groups` durable.
pub(crate) async fn sync_segments(shard: &Rc<Shard>, groups: &[Rc<Group>]) -> Result<(), FlushError> {
    let mut files = Vec::new();
    let mut dirs = Vec::new();
    for group in groups {
        if group.deleted.get() {
            continue;
        }
        let mut inner = group.inner.borrow_mut();
        for base in std::mem::take(&mut inner.dirty) {
            files.push((Rc::clone(group), base));
        }
        if std::mem::take(&mut inner.dir_dirty) {
            dirs.push(group.dir.clone());
        }
    }
    if shard.log_dir_dirty.replace(false) {
        dirs.push(shard.segments_root());
    }
    if mutant::is(Mutant::SkipsSegmentSync) {
        files.clear();
    }
    if mutant::is(Mutant::SkipsDirectorySync) {
        dirs.clear();
    }
    add(&shard.counters.segment_syncs, files.len() as u64);
    let mut alone = shard.sync_alone().await.map_err(|_| FlushError::Poisoned)?;
    let result = if files.len() + dirs.len() > SYNC_EACH_MAX {
        let root = shard.root.clone();
        let files = shard.files.clone();
        shard.disk.off_thread(move || files.sync_all(&root)).await.and_then(|result| result)
    } else {
        sync_each(shard, files, dirs).await
    };
    if mutant::is(Mutant::IgnoresFailedSync) {
        return Ok(());
    }
    result.map_err(|error| {
        shard.sync_failed(&mut alone, &shard.segments_root(), &error);
        FlushError::Poisoned
    })
}

async fn sync_each(shard: &Rc<Shard>, files: Vec<(Rc<Group>, i64)>, dirs: Vec<PathBuf>) -> io::Result<()> {
    let mut syncs = stream::iter(files)
        .map(|(group, base)| async move {
            let file = match shard.file(&group, base) {
                Ok(file) => file,
                // Deleted meanwhile, by retention or with its group.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            };
            match shard.disk.fdatasync(&file).await {
                Err(_) if mutant::is(Mutant::RetriesFailedSync) => shard.disk.fdatasync(&file).await,
                result => result,
            }
        })
        .buffer_unordered(SYNCS_IN_FLIGHT);
    while let Some(result) = syncs.next().await {
        result?;
    }
    if dirs.is_empty() {
        return Ok(());
    }
    let names = shard.files.clone();
    let synced = shard.disk.off_thread(move || {
        for dir in dirs {
            match names.sync_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    });
    synced.await?
}

/// Whether `bytes` is one whole batch; recovery trusts a block's checksum, not its writer.
pub(crate) fn is_one_batch(bytes: &[u8]) -> Option<record_batch::BatchHeader> {
    record_batch::parse(bytes).ok().filter(|header| header.total_bytes() == bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_grow_by_what_they_have() {
        assert_eq!(reservation(10, 0, 1 << 30), Some(4096));
        assert_eq!(reservation(4096, 4096, 1 << 30), None);
        assert_eq!(reservation(4097, 4096, 1 << 30), Some(12288));
        assert_eq!(reservation(1 << 20, 12288, 1 << 30), Some(2 << 20));
        assert_eq!(reservation(100 << 20, 1 << 20, 1 << 30), Some(116 << 20));
        // Never past the segment's limit, unless one batch is larger than it.
        assert_eq!(reservation(9 << 20, 0, 10 << 20), Some(10 << 20));
        assert_eq!(reservation((11 << 20) + 1, 0, 10 << 20), Some((11 << 20) + 4096));
    }
}
