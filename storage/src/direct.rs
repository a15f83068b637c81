//! Large batches: written once, straight to their place in the segment, with only a pointer in the WAL.
//!
//! The data comes first: in the durable lane it is written and synced, in the os lane written, and only then does the
//! pointer enter a commit. So a pointer in the WAL says that its batch is in the segment, and one that does not find its
//! batch there has found damage. What the partition stages meanwhile waits behind it (`stage.rs`), what other partitions
//! stage does not: a sync takes a few times as long as a commit, and only those who ask for it wait for it. One task per
//! partition with large batches writes everything that has gathered, syncs once, and looks again.
//!
//! Why a write and an fdatasync of a growing file: against a direct write to zero-filled space, which would have to be
//! written twice, it took 1.4 to 2 times as long (medians of 128 KiB and 1 MiB, one and four files at a time); space
//! reserved ahead instead of growth gained a tenth at most.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use crate::flush::FlushError;
use crate::group::{Group, Inner};
use crate::segment_writer::write_up_to;
use crate::stage::Recorded;
use crate::store::{Shard, add};
use crate::types::{Lane, LogPoisoned};

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

pub(crate) fn has_room(shard: &Shard) -> bool {
    shard.unflushed_bytes.get() < UNFLUSHED_BYTES_MAX
}

/// Sees to what waits in `unrecorded`.
pub(crate) fn start(shard: &Rc<Shard>, group: &Rc<Group>, inner: &mut Inner) {
    if !std::mem::replace(&mut inner.direct_busy, true) {
        tokio::task::spawn_local(work(Rc::clone(shard), Rc::clone(group)));
    }
}

/// A large batch that is to be written.
struct Batch {
    index: u64,
    term: u64,
    base: i64,
}

async fn work(shard: Rc<Shard>, group: Rc<Group>) {
    let mut pause_ms = NO_SPACE_PAUSE_MS.0;
    while shard.is_live() && !group.deleted.get() {
        let (batches, lane) = {
            let inner = group.inner.borrow();
            let waiting = inner.tail.unrecorded().filter(|entry| entry.direct && !entry.written);
            let batches: Vec<Batch> = waiting
                .map(|entry| Batch { index: entry.index, term: entry.term, base: entry.place.base })
                .collect();
            (batches, inner.lane)
        };
        match write(&shard, &group, lane, &batches).await {
            Ok(()) => pause_ms = NO_SPACE_PAUSE_MS.0,
            Err(FlushError::NoSpace) => {
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                pause_ms = (pause_ms * 2).min(NO_SPACE_PAUSE_MS.1);
                continue;
            }
            Err(FlushError::Poisoned) => return,
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
async fn write(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    lane: Lane,
    batches: &[Batch],
) -> Result<(), FlushError> {
    let Some(last) = batches.last() else { return Ok(()) };
    write_up_to(shard, group, last.index).await?;
    if lane == Lane::Os || group.deleted.get() {
        return Ok(());
    }
    let synced = sync(shard, group, batches).await;
    synced.map_err(|error| {
        if !group.deleted.get() {
            shard.poison(&format!("syncing segments in {}: {error}", group.dir.display()));
        }
        FlushError::Poisoned
    })
}

async fn sync(shard: &Rc<Shard>, group: &Rc<Group>, batches: &[Batch]) -> io::Result<()> {
    let mut bases: Vec<i64> = batches.iter().map(|batch| batch.base).collect();
    bases.dedup();
    let counted = |base: &i64| group.inner.borrow().segments.iter().any(|segment| segment.base == *base);
    let new = !bases.iter().all(counted);
    for base in bases {
        shard.disk.fdatasync(&shard.file(group, base)?).await?;
        add(&shard.counters.segment_syncs, 1);
    }
    if new {
        // A segment that nothing counts yet: its name must be there before the pointer is.
        let (files, dir) = (shard.files.clone(), group.dir.clone());
        shard.disk.off_thread(move || files.sync_dir(&dir)).await??;
    }
    Ok(())
}

/// Waits until everything staged has its record in the WAL.
pub(crate) async fn wait_recorded(shard: &Shard, group: &Group) -> Result<(), LogPoisoned> {
    loop {
        let changed = shard.recorded.notified();
        if group.inner.borrow().unrecorded.is_empty() || group.deleted.get() {
            return Ok(());
        }
        shard.check_live()?;
        changed.await;
    }
}
