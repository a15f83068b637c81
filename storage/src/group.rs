//! One partition's log on its shard: the tail in memory, what is in segments, and its small state.
//!
//! Everything here is synchronous and runs on the shard thread; staging entries is in `stage.rs`, reading segments in
//! `read.rs`, writing them in `segment_writer.rs`, counting what is written as part of them in `flush.rs`.
//!
//! Invariants:
//! - `flushed_end <= high_watermark` except right after recovery: only committed entries leave the WAL.
//! - Segments hold offsets `[segments[0].base, flushed_end)` without gaps; the tail continues there.
//! - An entry at an index that exists replaces it and everything after it.

use std::cell::{Cell, OnceCell, Ref, RefCell, RefMut};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;

use crate::group_state::GroupState;
use crate::layout::{Layout, Limits};
use crate::leader_epochs::LeaderEpochs;
use crate::producer_state::ProducerState;
use crate::segment_index::IndexEntry;
use crate::segment_writer::Written;
use crate::stage::{Part, Ticket};
use crate::store::Shard;
use crate::tail::{Tail, TailEntry};
use crate::types::{GroupConfig, GroupHealth, GroupId, HardState, Lane, Lsn, RecoveredGroup};
use crate::wal::Wal;

/// A run of this size is worth a write of its own.
pub(crate) const FLUSH_RUN_BYTES: u64 = 256 << 10;

#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub base: i64,
    pub bytes: u64,
    /// Unknown after a start until somebody asks.
    pub max_timestamp: Option<i64>,
    pub first_timestamp: Option<i64>,
    pub index: Option<Rc<RefCell<Vec<IndexEntry>>>>,
}

impl Segment {
    pub fn new(base: i64, bytes: u64) -> Self {
        Self { base, bytes, max_timestamp: None, first_timestamp: None, index: None }
    }
}

pub(crate) struct Inner {
    pub config: GroupConfig,
    pub hard_state: HardState,
    pub last_index: u64,
    pub last_term: u64,
    pub log_start: i64,
    pub log_end: i64,
    pub high_watermark: i64,
    pub tail: Tail,
    pub epochs: LeaderEpochs,
    pub segments: VecDeque<Segment>,
    pub flushed_index: u64,
    pub flushed_term: u64,
    pub flushed_end: i64,
    /// Segments written and not synced.
    pub dirty: Vec<i64>,
    pub dir_dirty: bool,
    /// Segments were cut; nothing is written to them before this commit is done. `Lsn::MAX`: it is being staged.
    pub cut_by: Option<(Lane, Lsn)>,
    /// Segments that the cut left without a place in the log; removed when it is durable.
    pub cut_files: Vec<i64>,
    /// (index, log end before it) of entries recovered above the commit index.
    pub recovered_tail: Vec<(u64, i64)>,
    /// Where the next batch goes.
    pub layout: Layout,
    /// How far segments are written, which may be beyond what counts of them.
    pub written: Written,
    /// How often entries were replaced.
    pub cuts: u64,
    /// What is staged and not in the WAL yet, behind a large batch that is being written.
    pub unrecorded: VecDeque<Part>,
    /// A task sees to `unrecorded`.
    pub direct_busy: bool,
    /// Numbers of `stage` that are not safe yet, in order.
    pub tickets: VecDeque<Ticket>,
    /// The commit that will tell this group when it is done.
    pub listed_in: Lsn,
    /// Of large batches, counted as part of segments since the last group state in the WAL.
    pub direct_since_state: u64,
    /// Lane of its next entries, and the newest commit in it that has something of this group.
    pub lane: Lane,
    pub last_lsn: Lsn,
    /// The commit that moved the log start last; what lies below it may go once that is safe.
    pub log_start_by: (Lane, Lsn),
    /// Lane of its last record of any kind.
    recorded_in: Lane,
    touched: [Option<u64>; 2],
    /// State differs from `group.meta`.
    pub meta_dirty: bool,
    pub snapshot_offset: i64,
    /// The log was not cut since the start, so nothing is missing from the producers; only then they are written down.
    pub producers_whole: bool,
    pub bytes_since_snapshot: u64,
    flushing: bool,
}

pub(crate) struct Group {
    pub id: GroupId,
    pub dir_name: String,
    pub dir: PathBuf,
    /// Why it refuses to serve. Set once: what was wrong with the bytes stays wrong until the next start looks again.
    pub damage: OnceCell<String>,
    /// Damaged since the start: nothing of it is written, so that it stays as it was found.
    pub frozen: Cell<bool>,
    /// Its deletion was asked for: it takes nothing more.
    pub deleting: Cell<bool>,
    /// It is deleted: its directory has another name.
    pub deleted: Cell<bool>,
    pub queued: Cell<bool>,
    /// The largest number of `stage` for which all is safe, and whether the broker is yet to hear of it.
    pub persisted: Cell<u64>,
    pub has_news: Cell<bool>,
    /// Held while its segments are written: one write at a time.
    pub writing: tokio::sync::Mutex<()>,
    pub inner: RefCell<Inner>,
    pub producers: RefCell<ProducerState>,
}

impl Group {
    fn new(shard: &Shard, id: GroupId, dir_name: &str, config: GroupConfig) -> Self {
        Self {
            id,
            dir_name: dir_name.to_owned(),
            dir: shard.segments_root().join(dir_name),
            damage: OnceCell::new(),
            frozen: Cell::new(false),
            deleting: Cell::new(false),
            deleted: Cell::new(false),
            queued: Cell::new(false),
            persisted: Cell::new(0),
            has_news: Cell::new(false),
            writing: tokio::sync::Mutex::new(()),
            inner: RefCell::new(Inner {
                lane: Lane::Durable,
                recorded_in: Lane::Durable,
                config,
                hard_state: HardState::default(),
                last_index: 0,
                last_term: 0,
                log_start: 0,
                log_end: 0,
                high_watermark: 0,
                tail: Tail::default(),
                epochs: LeaderEpochs::default(),
                segments: VecDeque::new(),
                flushed_index: 0,
                flushed_term: 0,
                flushed_end: 0,
                dirty: Vec::new(),
                dir_dirty: false,
                cut_by: None,
                cut_files: Vec::new(),
                recovered_tail: Vec::new(),
                layout: Layout::empty(),
                written: Written::default(),
                cuts: 0,
                unrecorded: VecDeque::new(),
                direct_busy: false,
                tickets: VecDeque::new(),
                listed_in: 0,
                direct_since_state: 0,
                last_lsn: 0,
                log_start_by: (Lane::Durable, 0),
                touched: [None; 2],
                meta_dirty: false,
                snapshot_offset: -1,
                producers_whole: true,
                bytes_since_snapshot: 0,
                flushing: false,
            }),
            producers: RefCell::default(),
        }
    }

    /// `lsn`: the commit that says that it exists.
    pub fn create(shard: &Rc<Shard>, id: GroupId, dir_name: &str, config: GroupConfig, lsn: Lsn) -> Self {
        let group = Self::new(shard, id, dir_name, config);
        {
            let mut inner = group.inner.borrow_mut();
            inner.meta_dirty = true;
            inner.dir_dirty = true;
            inner.last_lsn = lsn;
        }
        group
    }

    pub fn attach(shard: &Rc<Shard>, recovered: RecoveredGroup, config: GroupConfig) -> Self {
        let group = Self::new(shard, recovered.group_id, &recovered.dir_name, config);
        if let GroupHealth::Damaged { reason } = recovered.health {
            group.frozen.set(true);
            group.note_damage(reason);
        }
        {
            let mut inner = group.inner.borrow_mut();
            let restored = recovered.restored;
            inner.hard_state = recovered.hard_state;
            inner.last_index = recovered.last_index;
            inner.last_term = recovered.last_term;
            inner.log_start = recovered.log_start_offset;
            inner.log_end = recovered.log_end_offset;
            inner.high_watermark = recovered.log_start_offset;
            inner.flushed_index = recovered.last_index;
            inner.flushed_term = recovered.last_term;
            inner.flushed_end = recovered.log_end_offset;
            inner.epochs = restored.epochs;
            inner.snapshot_offset = restored.snapshot_offset;
            inner.recovered_tail = restored.above_commit;
            inner.segments =
                restored.segments.iter().map(|(base, bytes)| Segment::new(*base, *bytes)).collect();
            if let Some(active) = inner.segments.back_mut() {
                active.first_timestamp = restored.first_timestamp;
                active.max_timestamp = restored.max_timestamp;
            }
            inner.layout = inner.layout_at_end();
            inner.written = Written::up_to(inner.last_index, inner.layout);
            for entry in restored.warm {
                shard.cache_push(group.id, entry.bytes.len());
                inner.tail.push_flushed(entry);
            }
        }
        *group.producers.borrow_mut() = recovered.producers;
        shard.evict();
        group
    }

    pub fn note_damage(&self, reason: String) {
        // The first reason stays.
        let _ = self.damage.set(reason);
    }

    pub fn is_damaged(&self) -> bool {
        self.damage.get().is_some()
    }

    pub fn log_path(&self, base: i64) -> PathBuf {
        self.dir.join(format!("{base:020}.log"))
    }

    pub fn index_path(&self, base: i64) -> PathBuf {
        self.dir.join(format!("{base:020}.idx"))
    }

    pub fn segment_bases(&self) -> Vec<i64> {
        self.inner.borrow().segments.iter().map(|segment| segment.base).collect()
    }

    pub fn unflushed_bytes(&self) -> u64 {
        self.inner.borrow().tail.unflushed_bytes()
    }

    pub fn evict_one(&self) -> Option<usize> {
        self.inner.borrow_mut().tail.evict()
    }

    /// Its records are in `file_seq` of `wal`: that file may not go before this group is seen to.
    pub fn touch(&self, wal: &Wal, file_seq: u64) {
        self.inner.borrow_mut().touch(self.id, wal, file_seq);
    }

    pub fn mark_deleted(&self, shard: &Shard) {
        self.deleted.set(true);
        let mut inner = self.inner.borrow_mut();
        let cached: u64 = inner.tail.iter().map(|entry| entry.bytes.len() as u64).sum();
        let unflushed = inner.tail.unflushed_bytes();
        shard.cache_bytes.set(shard.cache_bytes.get().saturating_sub(cached));
        shard.unflushed_bytes.set(shard.unflushed_bytes.get().saturating_sub(unflushed));
        inner.tail = Tail::default();
        shard.read_ahead.borrow_mut().retain(|ahead| ahead.group != self.id);
    }

    /// The state as it is in segments and records so far; what `flushed` covers must be synced before this is written.
    pub fn state(&self, wal_id: u64, lsn: Lsn) -> GroupState {
        let inner = self.inner.borrow();
        let active = inner.segments.back();
        // What waits for its place in the WAL comes behind this record, and nothing that depends on it may come before.
        let waiting = inner.tail.unrecorded().next();
        let hard_state = HardState {
            commit: waiting.map_or(u64::MAX, |entry| entry.index - 1).min(inner.hard_state.commit),
            ..inner.hard_state
        };
        let log_start = waiting.map_or(i64::MAX, |entry| entry.base_offset).min(inner.log_start);
        GroupState {
            group: self.id,
            dir_name: self.dir_name.clone(),
            os: inner.lane == Lane::Os,
            wal_id,
            lsn,
            hard_state,
            flushed_index: inner.flushed_index,
            flushed_term: inner.flushed_term,
            flushed_end: inner.flushed_end,
            active_base: active.map_or(-1, |segment| segment.base),
            active_bytes: active.map_or(0, |segment| segment.bytes),
            active_first_timestamp: active.and_then(|segment| segment.first_timestamp),
            active_max_timestamp: active.and_then(|segment| segment.max_timestamp),
            log_start,
            epochs: inner.epochs.clone(),
        }
    }

    pub fn set_flushing(&self, flushing: bool) {
        self.inner.borrow_mut().flushing = flushing;
    }
}

impl Inner {
    pub fn touch(&mut self, id: GroupId, wal: &Wal, file_seq: u64) {
        let touched = &mut self.touched[wal.lane as usize];
        if *touched != Some(file_seq) {
            *touched = Some(file_seq);
            wal.touch(file_seq, id);
        }
    }

    /// To be called before a record of this group goes to a lane: its records lie in LSN order, whatever their lanes.
    pub fn record_in(&mut self, shard: &Shard, lane: Lane) {
        if self.recorded_in != lane {
            self.recorded_in = lane;
            shard.wal(lane).begin_after(shard.next_lsn.get() - 1);
        }
    }

    /// Offset at which the entry at `index` begins, for replacing it.
    pub fn offset_of(&self, index: u64) -> Option<i64> {
        if let Some(entry) = self.tail.get(index) {
            return Some(entry.base_offset);
        }
        self.recovered_tail.iter().find(|(known, _)| *known == index).map(|(_, offset)| *offset)
    }

    /// May leave the WAL. The high watermark counts records: whether an entry without any that stands right at it is
    /// committed, only the hard state says.
    pub fn is_committed(&self, entry: &TailEntry) -> bool {
        if entry.is_batch() {
            entry.next_offset <= self.high_watermark
        } else {
            entry.base_offset < self.high_watermark || entry.index <= self.hard_state.commit
        }
    }

    pub fn size_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum::<u64>() + self.tail.unflushed_bytes()
    }

    /// End of the segment at `position` in `segments`.
    pub fn segment_end(&self, position: usize) -> i64 {
        self.segments.get(position + 1).map_or(self.flushed_end, |next| next.base)
    }

    pub fn is_flushing(&self) -> bool {
        self.flushing
    }

    pub fn limits(&self) -> Limits {
        Limits { segment_bytes: self.config.segment_bytes, segment_ms: self.config.segment_ms }
    }

    /// Where the log ends, behind everything staged.
    pub fn layout_at_end(&self) -> Layout {
        let mut unflushed = self.tail.unflushed().rev().filter(|entry| entry.is_batch());
        let active = self.segments.back();
        match (unflushed.next(), active) {
            (Some(last), _) => {
                let base = last.place.base;
                let began =
                    std::iter::once(last).chain(unflushed).find(|e| e.place.starts && e.place.base == base);
                let first = began.map(|entry| entry.max_timestamp);
                let first = first.or(active.and_then(|segment| segment.first_timestamp)).unwrap_or(-1);
                Layout::resume(base, last.place.end(last.bytes.len()), first)
            }
            (None, Some(active)) => {
                Layout::resume(active.base, active.bytes, active.first_timestamp.unwrap_or(-1))
            }
            (None, None) => Layout::empty(),
        }
    }

    /// The commit is known that carries what replaced entries in segments.
    pub fn note_cut_by(&mut self, lane: Lane) {
        if self.cut_by.is_some_and(|(_, by)| by == Lsn::MAX) {
            self.cut_by = Some((lane, self.last_lsn));
        }
    }

    /// Something was written to a segment that is not synced.
    pub fn note_unsynced(&mut self, base: i64) {
        if !self.dirty.contains(&base) {
            self.dirty.push(base);
        }
    }
}

/// One partition's log. Cheap to clone; stays on its shard's thread.
#[derive(Clone)]
pub struct GroupLog {
    pub(crate) shard: Rc<Shard>,
    pub(crate) group: Rc<Group>,
}

impl std::fmt::Debug for GroupLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GroupLog({} {})", self.group.id, self.group.dir_name)
    }
}

impl GroupLog {
    fn inner(&self) -> Ref<'_, Inner> {
        self.group.inner.borrow()
    }

    pub fn group_id(&self) -> GroupId {
        self.group.id
    }

    pub fn dir_name(&self) -> &str {
        &self.group.dir_name
    }

    pub fn health(&self) -> GroupHealth {
        match self.damage() {
            None => GroupHealth::Ok,
            Some(reason) => GroupHealth::Damaged { reason: reason.to_owned() },
        }
    }

    /// Why it refuses to serve, if it does.
    pub fn damage(&self) -> Option<&str> {
        self.group.damage.get().map(String::as_str)
    }

    pub fn hard_state(&self) -> HardState {
        self.inner().hard_state
    }

    pub fn log_start_offset(&self) -> i64 {
        self.inner().log_start
    }

    pub fn log_end_offset(&self) -> i64 {
        self.inner().log_end
    }

    pub fn last_index(&self) -> u64 {
        self.inner().last_index
    }

    pub fn last_term(&self) -> u64 {
        self.inner().last_term
    }

    pub fn size_bytes(&self) -> u64 {
        self.inner().size_bytes()
    }

    /// Entries below `offset` are committed and may leave the WAL.
    pub fn set_high_watermark(&self, offset: i64) {
        let ripe = {
            let mut inner = self.group.inner.borrow_mut();
            if offset <= inner.high_watermark {
                return;
            }
            inner.high_watermark = offset.min(inner.log_end);
            inner.recovered_tail.retain(|(_, at)| *at >= offset);
            inner.tail.unflushed_bytes() >= FLUSH_RUN_BYTES
        };
        if ripe {
            self.shard.queue_flush(&self.group);
        }
        self.shard.evict();
    }

    pub fn high_watermark(&self) -> i64 {
        self.inner().high_watermark
    }

    /// Batches from the one that holds `from`, none ending above `upper`, up to `max_bytes` and at least one. `None` when
    /// they are not in memory; `read` then has them.
    pub fn read_cached(&self, from: i64, upper: i64, max_bytes: usize) -> Option<Vec<Bytes>> {
        let inner = self.inner();
        if self.group.is_damaged() || from < inner.log_start {
            return None;
        }
        if from == inner.log_end {
            return Some(Vec::new());
        }
        inner.tail.read(from, upper, max_bytes)
    }

    /// (epoch, end offset) of the largest epoch not above `epoch`, as OffsetForLeaderEpoch answers; (-1, -1) if unknown.
    pub fn epoch_end_offset(&self, epoch: i32) -> (i32, i64) {
        let inner = self.inner();
        inner.epochs.end_offset(epoch, inner.log_end)
    }

    /// Leader epoch of the record at `offset`; -1 if unknown.
    pub fn epoch_at(&self, offset: i64) -> i32 {
        self.inner().epochs.epoch_at(offset)
    }

    pub fn set_config(&self, config: GroupConfig) {
        let mut inner = self.group.inner.borrow_mut();
        inner.meta_dirty = true;
        inner.config = config;
    }

    /// The producers of this partition. Not to be held over `stage`.
    pub fn producers(&self) -> RefMut<'_, ProducerState> {
        self.group.producers.borrow_mut()
    }
}
