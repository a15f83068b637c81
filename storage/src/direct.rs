//! Large runs go past the WAL, straight to their segments: each byte is written once, and a record that counts them.
//!
//! What the WAL has must move to a segment later, so every byte is written twice. That is worth it for small batches, which
//! share one write with those of a hundred other partitions. Where a single partition gets much more than the log and the
//! flusher keep up with, it is not: such a batch stays in memory, the flusher writes it and all before it to the segment at
//! once, syncs the segment, and commits a group state that counts it. A commit of the WAL then carries some hundred bytes.
//! On an idle shard large batches go through the WAL like any other, which is one write and no sync of a file.
//!
//! Only for durable topics: to others the WAL is a copy in memory, which is cheaper than a write of their own (measured: a
//! fifth less throughput past it). What is on its way when a topic becomes one of them still gets there.
//!
//! Runs on the shard thread: `stage` queues, the flusher serves (`serve`, under its lock, since nobody else may write to
//! segments), `acknowledge` tells in the order of staging. Who waits is told a number of `Lane::Direct`.
//!
//! Invariants
//! - While anything of a partition is on its way here, all that is staged for it follows it here: entries are never reported
//!   out of order, and lie in the segment, and in the WAL, in the order of their indexes.
//! - A run is counted only after its segment was synced.
//! - Only in partitions that never had another replica (`GroupConfig::direct`, and no membership stored): what is written
//!   here is not committed yet, and nothing may replace it.
//! - A full disk never loses or blocks what is on its way: it goes to the WAL after all, which has its space already.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use tokio::sync::Notify;

use crate::failpoint::{self, Failpoint};
use crate::flush::{FlushError, flush_run_to, sync_segments};
use crate::group::{Group, GroupLog, Inner, append_hard_state, hard_state_payload};
use crate::mutant::{self, Mutant};
use crate::ring::Class;
use crate::store::{Shard, add};
use crate::tail::TailEntry;
use crate::types::{Durability, Entry, HardState, LANES, Lane, Lsn};
use crate::wal_format::{GROUP_STATE, RecordHeader};

/// A batch that is large by itself: what producers make of a `batch.size` of 128 KiB, which they rarely fill.
pub(crate) const BATCH_BYTES: usize = 96 << 10;

/// So much of one partition makes a write to its segment worth more than the wait for it: a write of a megabyte takes some
/// 0.5 ms, one of 128 KiB 0.2 ms.
pub(crate) const RUN_BYTES: u64 = 512 << 10;

/// What may be in memory alone and on its way at the same time, per shard: as much as one file of the WAL.
const PENDING_BYTES_MAX: u64 = 32 << 20;

/// Not in any file of the WAL.
const NOWHERE: u64 = u64::MAX;

/// Partitions whose runs are written at the same time; the disk's queue is deeper, but commits want some of it.
const GROUPS_IN_FLIGHT: usize = 8;

#[derive(Default)]
pub(crate) struct Direct {
    queue: RefCell<VecDeque<Rc<Group>>>,
    /// The newest number given out.
    issued: Cell<Lsn>,
    pending_bytes: Cell<u64>,
    /// Commits of the two lanes that those served since the last report rest on.
    needs: Cell<[Lsn; 2]>,
    /// Everything up to a number is served, and done when these commits are.
    served: RefCell<VecDeque<(Lsn, [Lsn; 2])>>,
    served_wake: Notify,
}

impl Direct {
    pub fn wake(&self) {
        self.served_wake.notify_one();
    }

    /// The newest number given out.
    pub fn issued(&self) -> Lsn {
        self.issued.get()
    }

    fn queue(&self, group: &Rc<Group>) {
        if !group.direct_queued.replace(true) {
            self.queue.borrow_mut().push_back(Rc::clone(group));
        }
    }

    fn is_served(&self, job: &Job, lane: Lane, lsn: Lsn) {
        let mut needs = self.needs.get();
        needs[lane as usize] = needs[lane as usize].max(lsn);
        self.needs.set(needs);
        self.pending_bytes.set(self.pending_bytes.get().saturating_sub(job.bytes));
    }
}

impl GroupLog {
    /// Whether what is staged next goes past the WAL.
    pub(crate) fn goes_direct(&self, inner: &Inner, entries: &[Entry]) -> bool {
        if inner.direct_pending {
            return true;
        }
        let config = &self.shard.config;
        let bytes: usize = entries.iter().map(|entry| entry.payload.bytes().len()).sum();
        bytes >= config.direct_batch_bytes
            && inner.config.direct
            && inner.membership.is_none()
            && inner.config.durability == Durability::Durable
            && inner.tail.unflushed_bytes() + bytes as u64 >= config.direct_run_bytes
            && !self.shard.is_out_of_space()
    }

    /// `admit` has checked all of it, and nothing is replaced.
    pub(crate) fn stage_direct(
        &self,
        inner: &mut Inner,
        lane: Lane,
        hard_state: Option<HardState>,
        membership: Option<(u64, Bytes)>,
        entries: &[Entry],
    ) -> Lsn {
        let direct = &self.shard.direct;
        if !inner.direct_pending {
            inner.direct_from = (inner.last_index + 1, inner.log_end);
        }
        for entry in entries {
            let bytes = entry.payload.bytes().len() as u64;
            add(&direct.pending_bytes, bytes);
            inner.direct_bytes += bytes;
            self.take(inner, entry, NOWHERE, lane);
        }
        // A group state has the hard state in it.
        inner.hard_state = hard_state.unwrap_or(inner.hard_state);
        inner.committed_index = inner.committed_index.max(inner.hard_state.commit);
        inner.membership = membership.or(inner.membership.take());
        inner.meta_dirty = true;
        inner.direct_pending = true;
        inner.direct_durable |= lane == Lane::Durable;
        direct.queue(&self.group);
        direct.issued.set(direct.issued.get() + 1);
        self.shard.wake_flusher();
        direct.issued.get()
    }

    /// Whether a producer has to wait for what is on its way already.
    pub(crate) fn is_direct_full(&self) -> bool {
        self.group.inner.borrow().direct_pending && self.shard.direct.pending_bytes.get() >= PENDING_BYTES_MAX
    }
}

/// What one turn has to do for a partition.
struct Job {
    log: GroupLog,
    /// The newest entry when the turn began.
    upto: u64,
    bytes: u64,
    /// Some of it was staged for the durable lane, whatever the topic asks for now.
    durable: bool,
    /// It got other replicas meanwhile: nothing may go to a segment that is not committed.
    is_replicated: bool,
    outcome: Result<(), FlushError>,
}

impl Job {
    /// Nothing of it went to a segment already, which the flusher does with what is committed from memory: only a state can
    /// count that.
    fn is_in_memory(&self) -> bool {
        let inner = self.log.group.inner.borrow();
        !self.log.group.deleted.get() && inner.flushed_index < inner.direct_from.0
    }

    fn lane(&self) -> Lane {
        if self.durable { Lane::Durable } else { self.log.next_lane(&self.log.group.inner.borrow()) }
    }
}

/// Serves everything queued. `Ok(false)`: there was nothing, or the WAL has no room for the states now. The flusher calls it,
/// holding its lock.
pub(crate) async fn serve(shard: &Rc<Shard>) -> Result<bool, FlushError> {
    let direct = &shard.direct;
    let upto = direct.issued.get();
    let queued: Vec<Rc<Group>> = direct.queue.borrow_mut().drain(..).collect();
    if queued.is_empty() {
        return Ok(false);
    }
    let begin = |group: Rc<Group>| {
        group.direct_queued.set(false);
        let (upto, bytes, durable, is_replicated) = {
            let mut inner = group.inner.borrow_mut();
            let durable = inner.tail.unflushed().any(|entry| entry.lane == Lane::Durable);
            let bytes = std::mem::take(&mut inner.direct_bytes);
            let is_replicated = inner.membership.is_some() || !inner.config.direct;
            (inner.last_index, bytes, durable || inner.direct_durable, is_replicated)
        };
        let log = GroupLog { shard: Rc::clone(shard), group };
        Job { log, upto, bytes, durable, is_replicated, outcome: Ok(()) }
    };
    // What came in since the last turn is little: one write for all of these is better than one each.
    let (mut large, mut left) = (Vec::new(), Vec::new());
    for job in queued.into_iter().map(begin) {
        let is_little = job.bytes < shard.config.direct_run_bytes / 2;
        let to_log = (is_little || job.is_replicated) && job.is_in_memory();
        match to_log.then(|| into_wal(shard, &job)).flatten() {
            Some((lane, lsn)) => direct.is_served(&job, lane, lsn),
            None if to_log && job.is_replicated => left.push(job),
            None => large.push(job),
        }
    }
    let write = |mut job: Job| async move {
        if !job.is_replicated {
            job.outcome = write_all(shard, &job.log.group, job.upto).await;
        }
        job
    };
    // All of them to their end: a run that is dropped half way would leave its group marked as flushing.
    let jobs: Vec<Job> = stream::iter(large).map(write).buffer_unordered(GROUPS_IN_FLIGHT).collect().await;
    if jobs.iter().any(|job| matches!(job.outcome, Err(FlushError::Poisoned))) {
        return Err(FlushError::Poisoned);
    }
    failpoint::pass(Failpoint::DirectWritten);
    if !mutant::is(Mutant::CountsBeforeSync) {
        let groups: Vec<Rc<Group>> = jobs.iter().map(|job| Rc::clone(&job.log.group)).collect();
        sync_segments(shard, &groups).await?;
    }
    failpoint::pass(Failpoint::DirectSynced);
    let no_space = jobs.iter().any(|job| job.outcome.is_err());
    for job in jobs {
        match count(shard, &job) {
            Some((lane, lsn)) => direct.is_served(&job, lane, lsn),
            None => left.push(job),
        }
    }
    let all = left.is_empty();
    for Job { log, bytes, .. } in left.into_iter().rev() {
        log.group.inner.borrow_mut().direct_bytes += bytes;
        if !log.group.direct_queued.replace(true) {
            direct.queue.borrow_mut().push_front(log.group);
        }
    }
    if all {
        direct.served.borrow_mut().push_back((upto, direct.needs.take()));
        direct.wake();
    }
    if no_space { Err(FlushError::NoSpace) } else { Ok(all) }
}

/// Up to which entry a stop has to write a partition's entries though nothing says that they are committed: they are nowhere
/// else.
pub(crate) fn waiting_upto(group: &Group) -> u64 {
    let inner = group.inner.borrow();
    if inner.direct_pending { inner.last_index } else { 0 }
}

async fn write_all(shard: &Rc<Shard>, group: &Rc<Group>, upto: u64) -> Result<(), FlushError> {
    // Files of a partition that no record knows yet would be nobody's.
    let (lane, lsn) = {
        let inner = group.inner.borrow();
        (inner.lane, inner.last_lsn)
    };
    shard.wait_durable(lane, lsn).await.map_err(|_| FlushError::Poisoned)?;
    let is_left = || group.inner.borrow().tail.first_unflushed().is_some_and(|entry| entry.index <= upto);
    while !group.deleted.get() && is_left() {
        if !flush_run_to(shard, group, upto).await? {
            break;
        }
    }
    Ok(())
}

/// Commits the state that counts what was written; what a full disk did not take follows it there, where space is reserved
/// already. `None`: no room there now.
fn count(shard: &Rc<Shard>, job: &Job) -> Option<(Lane, Lsn)> {
    let group = &job.log.group;
    if group.deleted.get() {
        return Some((Lane::Durable, 0));
    }
    let lane = job.lane();
    let mut state = group.state(shard.wal_id, 0);
    state.os = lane == Lane::Os;
    let state = state.encode();
    if !shard.wal(lane).fits_all(state.len(), state.len(), 1) {
        return None;
    }
    let wal = job.log.enter_lane(&mut group.inner.borrow_mut(), lane);
    let record = RecordHeader { kind: GROUP_STATE, group: group.id, index: 0, term: 0, offset: 0 };
    let placed = wal.append(&shard.next_lsn, &record, &state, Class::Stage);
    let (lsn, file_seq) = placed.expect("there was room for it");
    group.touch(wal, file_seq);
    wal.wake_writer();
    {
        let mut inner = group.inner.borrow_mut();
        inner.last_lsn = lsn;
        inner.direct_from = inner.direct_from.max((inner.flushed_index + 1, inner.flushed_end));
    }
    if job.outcome.is_err() || job.is_replicated {
        return into_wal(shard, job);
    }
    leave(shard, job, lane, lsn)
}

/// What is not in a segment goes to the WAL, with what the log should know of it. `None`: no room there now.
fn into_wal(shard: &Rc<Shard>, job: &Job) -> Option<(Lane, Lsn)> {
    let group = &job.log.group;
    if group.deleted.get() {
        return Some((Lane::Durable, 0));
    }
    let lane = job.lane();
    let mut guard = group.inner.borrow_mut();
    let inner = &mut *guard;
    let is_nowhere = |entry: &TailEntry| entry.file_seq == NOWHERE;
    let (total, largest, count) = inner.unflushed_size(is_nowhere);
    let hard_state = hard_state_payload(inner.hard_state, inner.membership.as_ref());
    // (a hard state and a log start)
    if !shard.wal(lane).fits_all(total + hard_state.len(), largest.max(hard_state.len()), count + 2) {
        return None;
    }
    let wal = job.log.enter_lane(inner, lane);
    inner.log_unflushed(shard, group.id, wal, is_nowhere);
    inner.direct_from = (inner.last_index + 1, inner.log_end);
    let placed = append_hard_state(shard, wal, group.id, inner.hard_state.term, &hard_state, Class::Stage);
    let (lsn, file_seq) = placed.expect("there was room for all of it");
    inner.touch(group.id, wal, file_seq);
    inner.last_lsn = lsn;
    wal.wake_writer();
    drop(guard);
    leave(shard, job, lane, lsn)
}

/// The last of what the log has to know of a partition's turn. `None`: no room for it now.
fn leave(shard: &Rc<Shard>, job: &Job, lane: Lane, mut lsn: Lsn) -> Option<(Lane, Lsn)> {
    let (group, wal) = (&job.log.group, shard.wal(lane));
    let mut inner = group.inner.borrow_mut();
    if inner.direct_log_start && inner.log_start <= inner.direct_from.1 {
        // What is removed below it must not come back.
        let (record, begins) = inner.log_start_record(group.id, inner.log_start);
        let (at, file_seq) = wal.append(&shard.next_lsn, &record, &begins, Class::System).ok()?;
        inner.touch(group.id, wal, file_seq);
        lsn = at;
        inner.direct_log_start = false;
        inner.log_start_by = (lane, lsn);
        crate::retention::drop_below_start(shard, group, &mut inner);
    }
    inner.last_lsn = lsn;
    // Whatever was staged meanwhile has queued it again.
    inner.direct_pending = group.direct_queued.get();
    inner.direct_durable &= inner.direct_pending;
    Some((lane, lsn))
}

/// Tells who waits, in order; ends when the shard is closed or poisoned.
pub(crate) async fn acknowledge(shard: Rc<Shard>) {
    let direct = &shard.direct;
    while shard.is_live() {
        let Some((number, needs)) = direct.served.borrow_mut().pop_front() else {
            direct.served_wake.notified().await;
            continue;
        };
        for lane in LANES.into_iter().filter(|_| !mutant::is(Mutant::AnswersBeforeItCounts)) {
            if shard.wait_durable(lane, needs[lane as usize]).await.is_err() {
                return;
            }
        }
        shard.note_direct(number);
    }
}
