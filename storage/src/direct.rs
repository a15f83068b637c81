//! Large batches: written once, straight to their place in the segment, with only a pointer in the WAL.
//!
//! The data comes first: in the durable lane it is written and synced, in the os lane written, and only then does the
//! pointer enter a commit. So a pointer in the WAL says that its batch is in the segment, and one that does not find its
//! batch there has found damage. What the partition stages meanwhile waits behind it (`stage.rs`), what other partitions
//! stage does not: a sync takes a few times as long as a commit, and only those who ask for it wait for it.
//!
//! In the os lane the write is a copy into the page cache and happens inside `stage`. In the durable lane one task per
//! partition with large batches writes everything that has gathered, syncs once, and looks again.
//!
//! Why a plain write and fdatasync of a growing file: against a direct write to zero-filled space, which would have to be
//! written twice, it took 1.4 to 2 times as long (medians of 128 KiB and 1 MiB, one and four files at a time); space
//! reserved ahead instead of growth gained a tenth at most.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_io::sync_dir;

use crate::group::{Group, Inner};
use crate::layout::Place;
use crate::stage::Recorded;
use crate::store::{Shard, add, is_no_space};
use crate::tail::TailEntry;
use crate::types::{Lane, LogPoisoned, Lsn};

/// Batches from this size on go straight to their segment. Producers set to batches of 128 KiB fill them to somewhat
/// less; far below, the sync costs more than writing the bytes twice.
pub(crate) const DIRECT_BYTES: usize = 96 << 10;

/// Batches in memory that are not counted as part of a segment yet, beyond which no large one is accepted: as much as a
/// full ring of the WAL may hold of small ones.
const UNFLUSHED_BYTES_MAX: u64 = 256 << 20;

/// Pauses between tries while the disk is full: 100 ms, doubling to 2 s.
const NO_SPACE_PAUSE_MS: (u64, u64) = (100, 2_000);

/// How long the WAL may take to get room before it is asked again.
const ROOM_PAUSE: Duration = Duration::from_millis(5);

pub(crate) fn has_room(shard: &Shard, bytes: usize) -> bool {
    shard.unflushed_bytes.get() + bytes as u64 <= UNFLUSHED_BYTES_MAX
}

/// Large batches come faster than they are counted.
pub(crate) fn is_pressed(shard: &Shard) -> bool {
    shard.unflushed_bytes.get() > UNFLUSHED_BYTES_MAX / 4 * 3
}

/// Writes a batch to its place without waiting. `false`: there was no space, or the log has failed.
pub(crate) fn write_now(shard: &Rc<Shard>, group: &Group, inner: &mut Inner, entry: &TailEntry) -> bool {
    let place = entry.place;
    let written = shard
        .file_or_create(group, place.base)
        .and_then(|file| shard.disk.write_now(&file, &entry.bytes, u64::from(place.position)));
    match written {
        Ok(()) => {
            inner.note_unsynced(place.base);
            add(&shard.counters.segment_bytes, entry.bytes.len() as u64);
            true
        }
        Err(error) if is_no_space(&error) => {
            shard.note_no_space("writing segment", &error);
            false
        }
        Err(error) => {
            shard.poison(&format!("writing {}: {error}", group.log_path(place.base).display()));
            false
        }
    }
}

/// Sees to what waits in `unrecorded`.
pub(crate) fn start(shard: &Rc<Shard>, group: &Rc<Group>, inner: &mut Inner) {
    if !std::mem::replace(&mut inner.direct_busy, true) {
        tokio::task::spawn_local(work(Rc::clone(shard), Rc::clone(group)));
    }
}

struct Batch {
    index: u64,
    term: u64,
    place: Place,
    bytes: Bytes,
}

async fn work(shard: Rc<Shard>, group: Rc<Group>) {
    let mut pause_ms = NO_SPACE_PAUSE_MS.0;
    while shard.is_live() && !group.deleted.get() {
        let (batches, lane) = {
            let inner = group.inner.borrow();
            let waiting = inner.tail.unrecorded().filter(|entry| entry.direct && !entry.written);
            let batches: Vec<Batch> = waiting
                .map(|entry| Batch {
                    index: entry.index,
                    term: entry.term,
                    place: entry.place,
                    bytes: entry.bytes.clone(),
                })
                .collect();
            (batches, inner.lane)
        };
        match write(&shard, &group, lane, &batches).await {
            Ok(()) => pause_ms = NO_SPACE_PAUSE_MS.0,
            Err(_) if group.deleted.get() => return,
            Err(error) if is_no_space(&error) => {
                shard.note_no_space("writing segment", &error);
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                pause_ms = (pause_ms * 2).min(NO_SPACE_PAUSE_MS.1);
                continue;
            }
            Err(error) => {
                shard.poison(&format!("writing segments in {}: {error}", group.dir.display()));
                return;
            }
        }
        let outcome = {
            let mut inner = group.inner.borrow_mut();
            for batch in &batches {
                inner.tail.note_written(batch.index, batch.term);
            }
            let outcome = group.record_waiting(&shard, &mut inner);
            inner.direct_busy = outcome != Recorded::All;
            outcome
        };
        match outcome {
            Recorded::All => {
                shard.recorded.notify_waiters();
                return;
            }
            Recorded::Direct => {}
            Recorded::Full => {
                shard.wake_flusher();
                tokio::time::sleep(ROOM_PAUSE).await;
            }
        }
    }
}

/// Writes batches to their places, and makes them durable where the lane asks for it.
async fn write(shard: &Rc<Shard>, group: &Rc<Group>, lane: Lane, batches: &[Batch]) -> io::Result<()> {
    let mut at = 0;
    let mut bases: Vec<i64> = Vec::new();
    while let Some(first) = batches.get(at) {
        let mut end = u64::from(first.place.position);
        let mut run = Vec::new();
        for batch in &batches[at..] {
            if batch.place.base != first.place.base || u64::from(batch.place.position) != end {
                break;
            }
            end += batch.bytes.len() as u64;
            run.push(batch.bytes.clone());
        }
        at += run.len();
        let file = shard.file_or_create(group, first.place.base)?;
        let position = u64::from(first.place.position);
        shard.disk.write_vectored_at(&file, run, position).await?;
        add(&shard.counters.segment_bytes, end - position);
        if !bases.contains(&first.place.base) {
            bases.push(first.place.base);
        }
    }
    let new = {
        let mut inner = group.inner.borrow_mut();
        if lane == Lane::Os {
            bases.iter().for_each(|base| inner.note_unsynced(*base));
            return Ok(());
        }
        bases.iter().any(|base| inner.segments.iter().all(|segment| segment.base != *base))
    };
    for base in bases {
        shard.disk.fdatasync(&shard.file_or_create(group, base)?).await?;
        add(&shard.counters.segment_syncs, 1);
    }
    if new {
        // A segment that nothing counts yet: its name must be there before the pointer is.
        let dir = group.dir.clone();
        tokio::task::spawn_blocking(move || sync_dir(&dir)).await.map_err(io::Error::other)??;
    }
    Ok(())
}

/// Waits until everything staged has its record in the WAL; returns the newest commit with one.
pub(crate) async fn wait_recorded(shard: &Shard, group: &Group) -> Result<(Lane, Lsn), LogPoisoned> {
    loop {
        let changed = shard.recorded.notified();
        {
            let inner = group.inner.borrow();
            if inner.unrecorded.is_empty() || group.deleted.get() {
                return Ok((inner.lane, inner.last_lsn));
            }
        }
        shard.check_live()?;
        changed.await;
    }
}
