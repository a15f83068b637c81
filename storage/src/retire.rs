//! A WAL file is emptied so that its slot can be written over: its entries go to segments, or are written again, and what is
//! in segments is counted by group states. Also for one partition alone (`checkpoint`).
//!
//! Runs in the flusher, under its lock: what a group state says stays true until it is in a block, because nobody else writes
//! to segments. Does not decide when (`wal.rs`, `compact.rs`), nor what a state means after a crash (`replay.rs`).

use std::rc::Rc;

use futures_util::stream::{self, StreamExt};

use crate::direct;
use crate::failpoint::{self, Failpoint};
use crate::flush::{FlushError, encode_producers, finish_cut, flush_run, sync_segments};
use crate::group::Group;
use crate::mutant::{self, Mutant};
use crate::ring::Class;
use crate::states_file::SNAPSHOT_BYTES_MAX;
use crate::store::{Shard, add};
use crate::types::{LANES, Lane, Lsn};
use crate::wal::sync_os_lane;
use crate::wal_format::{GROUP_STATE, PRODUCERS, RecordHeader};

/// Producer snapshots that are written beside the group states of a retirement take no more than this part of a file: they
/// save a start from reading segments, and must not fill the ring that is being emptied.
const PRODUCERS_SHARE: u64 = 8;

/// So often a retirement waits for a partition that goes on writing to the other lane; then it is tried again later.
const WAITS_FOR_OTHER_LANE: u32 = 16;

/// Empties the oldest file of a lane so that its slot can be written over. `Ok(false)`: not now.
pub(crate) async fn retire(shard: &Rc<Shard>, lane: Lane) -> Result<bool, FlushError> {
    let wal = shard.wal(lane);
    let Some((file_seq, touched)) = wal.retirable() else { return Ok(false) };
    let groups: Vec<Rc<Group>> = touched.iter().filter_map(|id| shard.group(*id)).collect();
    let in_file = |group: &Group| {
        let inner = group.inner.borrow();
        let mut unflushed = inner.tail.unflushed();
        // (something of this file is left, and it may be flushed)
        unflushed
            .find(|entry| entry.lane == lane && entry.file_seq <= file_seq)
            .map(|entry| inner.is_committed(entry))
    };
    let mut runs = stream::iter(&groups)
        .map(|group| async move {
            while in_file(group) == Some(true) {
                if !flush_run(shard, group).await? {
                    break;
                }
                tokio::task::yield_now().await;
            }
            Ok(())
        })
        .buffer_unordered(wal.runs_in_flight());
    // All of them to their end: a run that is dropped half way would leave its group marked as flushing.
    let mut outcome = Ok(());
    while let Some(result) = runs.next().await {
        outcome = outcome.and(result);
    }
    drop(runs);
    outcome?;
    // What they wrote may be counted below, and somebody waits for it.
    direct::serve(shard).await?;
    for group in groups.iter().filter(|group| !group.deleted.get()) {
        finish_cut(shard, group).await?;
    }
    let mut moved = [0; LANES.len()];
    // What is replaced by entries in the other lane is left behind here, so those must be there first.
    for group in groups.iter().filter(|group| !group.deleted.get()) {
        let inner = group.inner.borrow();
        moved[inner.lane as usize] = inner.last_lsn.max(moved[inner.lane as usize]);
    }
    for group in groups.iter().filter(|group| !group.deleted.get() && in_file(group).is_some()) {
        if mutant::is(Mutant::RetiresWithEntries) {
            continue;
        }
        let Some((lane, lsn)) = write_again(shard, group, lane) else { return Ok(false) };
        moved[lane as usize] = lsn.max(moved[lane as usize]);
    }
    for other in LANES.into_iter().filter(|other| *other != lane) {
        shard.wait_durable(other, moved[other as usize]).await.map_err(|_| FlushError::Poisoned)?;
    }
    sync_segments(shard, &groups).await?;
    failpoint::pass(Failpoint::RetireSynced);
    // What a group state says stays true until it is in a block, because flushing is this task's alone.
    let mut since_yield = 0;
    let mut producers_left =
        usize::try_from(shard.config.wal_file_bytes / PRODUCERS_SHARE).unwrap_or(usize::MAX);
    let mut counted = Vec::with_capacity(groups.len());
    for group in &groups {
        if group.deleted.get() {
            continue;
        }
        if !is_sure_elsewhere(shard, group, lane).await? {
            return Ok(false);
        }
        // A state says that the segments have their names.
        if !group.unplaced.borrow().is_empty() {
            return Ok(false);
        }
        let state = group.state(shard.wal_id, 0);
        group.inner.borrow_mut().record_in(shard, lane);
        // It began anew since: the state says so, and may be safe before the record of the other lane that has the producers.
        let begun_with = group.inner.borrow().begun_with.clone();
        if let Some((offset, producers)) = &begun_with {
            let record =
                RecordHeader { kind: PRODUCERS, group: group.id, index: 0, term: 0, offset: *offset };
            match wal.append(&shard.next_lsn, &record, producers, Class::System) {
                Ok((_, at)) => group.touch(wal, at),
                Err(_) => return Ok(false),
            }
        }
        let record = RecordHeader { kind: GROUP_STATE, group: group.id, index: 0, term: 0, offset: 0 };
        match wal.append(&shard.next_lsn, &record, &state.encode(), Class::System) {
            Ok((_, at)) => group.touch(wal, at),
            Err(_) => return Ok(false),
        }
        let bytes = group.producers.borrow().encoded_len();
        if begun_with.is_none()
            && bytes <= SNAPSHOT_BYTES_MAX.min(producers_left)
            && group.inner.borrow().producers_whole
        {
            let (offset, snapshot) = encode_producers(&group.inner.borrow(), &group.producers.borrow());
            let record = RecordHeader { kind: PRODUCERS, group: group.id, index: 0, term: 0, offset };
            // An entry's share of the ring at most: whatever does not get in is found in the segments.
            match wal.append(&shard.next_lsn, &record, &snapshot, Class::Stage) {
                Ok((_, at)) => group.touch(wal, at),
                Err(_) => producers_left = 0,
            }
            producers_left = producers_left.saturating_sub(bytes);
        }
        counted.push((Rc::clone(group), state.active_base, group.inner.borrow().begun));
        since_yield += 1;
        if since_yield % 256 == 0 {
            wal.wake_writer();
            tokio::task::yield_now().await;
            if !shard.is_live() {
                return Err(FlushError::Poisoned);
            }
        }
    }
    if lane == Lane::Durable {
        let mut tombstones = shard.tombstones.borrow_mut();
        tombstones.retain(|of| of.is_saved || shard.wal(Lane::Os).has_records_of(of.group));
        if !tombstones.iter().all(|of| shard.record_deletion(of.group).is_some()) {
            return Ok(false);
        }
    }
    let end = RecordHeader {
        kind: crate::wal_format::NOTHING,
        group: crate::types::UNKNOWN_GROUP,
        index: 0,
        term: 0,
        offset: 0,
    };
    let Ok((lsn, _)) = wal.append(&shard.next_lsn, &end, &[], Class::System) else { return Ok(false) };
    wal.announce_retired(file_seq);
    wal.wake_writer();
    shard.wait_durable(lane, lsn).await.map_err(|_| FlushError::Poisoned)?;
    if lane == Lane::Os {
        sync_os_lane(shard).await.map_err(|_| FlushError::Poisoned)?;
    }
    for (group, base, begun) in counted {
        if !crate::anew::is_of_this_log(&group, begun) {
            continue;
        }
        group.inner.borrow_mut().counted_base = base.max(0);
    }
    failpoint::pass(Failpoint::RetireCounted);
    wal.retired(file_seq);
    add(&shard.counters.files_retired, 1);
    Ok(true)
}

/// What a state says of votes, commits and the log start may stand in the other lane, and must be sure there before: either
/// may lose its end alone. False: the partition is too busy there now.
async fn is_sure_elsewhere(shard: &Rc<Shard>, group: &Rc<Group>, lane: Lane) -> Result<bool, FlushError> {
    for _ in 0..WAITS_FOR_OTHER_LANE {
        let (other, lsn) = {
            let inner = group.inner.borrow();
            (inner.lane, inner.last_lsn)
        };
        if other == lane || lsn <= shard.durable_lsn(other) {
            return Ok(true);
        }
        shard.wait_durable(other, lsn).await.map_err(|_| FlushError::Poisoned)?;
    }
    Ok(false)
}

/// Makes what is in the segments of a group count: from here on no recovery takes any of it from the WAL again. False if
/// there is no room for the record now.
pub(crate) async fn checkpoint(shard: &Rc<Shard>, group: &Rc<Group>) -> Result<bool, FlushError> {
    let _alone = shard.flush_lock.lock().await;
    if group.deleted.get() || shard.closing.get() || group.inner.borrow().begun_with.is_some() {
        return Ok(false);
    }
    sync_segments(shard, std::slice::from_ref(group)).await?;
    if group.deleted.get() {
        return Ok(false);
    }
    if group.inner.borrow().begun_with.is_some() {
        return Ok(false);
    }
    let state = group.state(shard.wal_id, 0);
    let (lane, begun) = {
        let inner = group.inner.borrow();
        (inner.lane, inner.begun)
    };
    let wal = shard.wal(lane);
    let record = RecordHeader { kind: GROUP_STATE, group: group.id, index: 0, term: 0, offset: 0 };
    group.inner.borrow_mut().record_in(shard, lane);
    let Ok((lsn, file_seq)) = wal.append(&shard.next_lsn, &record, &state.encode(), Class::Stage) else {
        return Ok(false);
    };
    group.touch(wal, file_seq);
    wal.wake_writer();
    shard.wait_safe(lane, lsn).await.map_err(|_| FlushError::Poisoned)?;
    if !crate::anew::is_of_this_log(group, begun) {
        return Ok(false);
    }
    group.inner.borrow_mut().counted_base = state.active_base.max(0);
    Ok(true)
}

/// Entries that are not committed cannot leave the WAL; they move to the newest file of `lane`, or of the durable lane
/// if some of them are there, as they must not become less safe than they were. Returns where they are.
fn write_again(shard: &Rc<Shard>, group: &Rc<Group>, lane: Lane) -> Option<(Lane, Lsn)> {
    let mut inner = group.inner.borrow_mut();
    let durable = inner.tail.unflushed().any(|entry| entry.lane == Lane::Durable);
    let lane = if durable { Lane::Durable } else { lane };
    let wal = shard.wal(lane);
    let (total, largest, count) = inner.unflushed_size(|_| true);
    if !wal.fits_all(total, largest, count) {
        return None;
    }
    inner.record_in(shard, lane);
    let lsn = inner.log_unflushed(shard, group.id, wal, |_| true);
    wal.wake_writer();
    Some((lane, lsn))
}
