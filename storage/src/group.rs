//! One partition's log on its shard: staging entries, the tail in memory, what is in segments, and its small state.
//!
//! Everything here is synchronous and runs on the shard thread; reading segments is in `read.rs`, moving runs to them in
//! `flush.rs`.
//!
//! Invariants:
//! - `flushed_end <= high_watermark` except right after recovery: only committed entries leave the WAL.
//! - Segments hold offsets `[segments[0].base, flushed_end)` without gaps, but for what compaction has taken out of those
//!   that it wrote; the tail continues there, and only a segment that compaction has not written is appended to.
//! - An entry at an index that exists replaces it and everything after it.

use std::cell::{Cell, OnceCell, Ref, RefCell, RefMut};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;
use flumen_protocol::record_batch;

use crate::group_state::GroupState;
use crate::leader_epochs::LeaderEpochs;
use crate::marks::Marks;
use crate::mutant::{self, Mutant};
use crate::producer_state::ProducerState;
use crate::receive;
use crate::restore::RestoredSegment;
use crate::ring::Class;
use crate::segment_index::IndexEntry;
use crate::segment_name::{Compacted, SegmentName};
use crate::store::{Shard, add};
use crate::tail::{Tail, TailEntry};
use crate::types::{
    AdvanceError, Durability, Entry, GroupConfig, GroupHealth, GroupId, HardState, Lane, LogPoisoned, Lsn,
    Payload, RecoveredGroup, StageError,
};
use crate::wal::{Full, Wal};
use crate::wal_format::{BATCH, CONTROL, HARD_STATE, LOG_START, RecordHeader};

/// Room in the WAL that waiting producers leave alone: metadata, groups and export plans go on under any load.
const RING_RESERVE_BYTES: usize = 4 << 20;

/// A run of this size is worth a write of its own.
pub(crate) const FLUSH_RUN_BYTES: u64 = 256 << 10;

/// The first run of a group is due somewhere between half and all of `FLUSH_RUN_BYTES`: partitions that fill at one rate
/// would otherwise all go to their segments in one burst, and WAL writes would wait behind it.
fn first_run_bytes(id: GroupId) -> u64 {
    let share = id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    FLUSH_RUN_BYTES / 2 + (share * (FLUSH_RUN_BYTES / 2) >> 32)
}

/// What `GroupLog::stage_with` takes of a membership: far above what 32 members of each kind need.
pub const MEMBERSHIP_BYTES_MAX: usize = 4 << 10;

/// vote u64, commit u64, and with a membership: its index u64, and it.
pub(crate) fn hard_state_payload(hard_state: HardState, membership: Option<&(u64, Bytes)>) -> Vec<u8> {
    let vote = if mutant::is(Mutant::ForgetsVote) { 0 } else { hard_state.vote };
    let mut payload = Vec::with_capacity(16);
    payload.extend_from_slice(&vote.to_le_bytes());
    payload.extend_from_slice(&hard_state.commit.to_le_bytes());
    if let Some((index, members)) = membership
        && !mutant::is(Mutant::ForgetsMembers)
    {
        payload.extend_from_slice(&index.to_le_bytes());
        payload.extend_from_slice(members);
    }
    payload
}

/// Index positions are 32 bits wide.
const MAX_SEGMENT_BYTES: u64 = 2 << 30;

#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub base: i64,
    /// Written by compaction: it has holes, and nothing is added to it.
    pub compacted: Option<Compacted>,
    pub bytes: u64,
    /// Unknown after a start until somebody asks.
    pub max_timestamp: Option<i64>,
    pub first_timestamp: Option<i64>,
    pub index: Option<Rc<RefCell<Vec<IndexEntry>>>>,
    /// Length of the file, as far as it is known to be longer than `bytes`: zeros that later appends write over.
    pub reserved: u64,
    /// Raft index of its first batch; 0: unknown.
    pub first_index: u64,
}

impl Segment {
    pub fn new(base: i64, bytes: u64) -> Self {
        Self::of(SegmentName::plain(base), bytes)
    }

    pub fn of(name: SegmentName, bytes: u64) -> Self {
        Self {
            base: name.base,
            compacted: name.compacted,
            bytes,
            max_timestamp: None,
            first_timestamp: None,
            index: None,
            reserved: 0,
            first_index: 0,
        }
    }

    pub fn name(&self) -> SegmentName {
        SegmentName { base: self.base, compacted: self.compacted }
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
    /// Segments that begin below this are whole in a group state that is safe: no recovery adds to them or cuts them, so
    /// compaction may replace them.
    pub counted_base: i64,
    /// Compaction has compared everything below it; `None` until its file is read.
    pub clean_offset: Option<i64>,
    /// Segments written and not synced.
    pub dirty: Vec<i64>,
    pub dir_dirty: bool,
    /// Segments were cut; nothing is written to them before this commit is done. `Lsn::MAX`: it is being staged.
    pub cut_by: Option<(Lane, Lsn)>,
    /// How often segments were cut: who began to read before that must not believe what it sees behind.
    pub cuts: u64,
    /// Segments that the cut left without a place in the log; removed when it is durable.
    pub cut_files: Vec<SegmentName>,
    /// How often compaction has replaced segments, in this run.
    pub compactions: u64,
    /// How often the log began anew, and the producers that it began with, until they are in a file.
    pub begun: u64,
    pub begun_with: Option<(i64, Vec<u8>)>,
    /// The commit of this run with which it began anew last; 0: it did not.
    pub anew_lsn: Lsn,
    pub marks: Marks,
    /// See `GroupLog::stage_with`.
    pub membership: Option<(u64, Bytes)>,
    /// Entries up to here are committed, as far as the log was told or can tell.
    pub committed_index: u64,
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
    /// Of the newest snapshot of producers; -1 for none that one knows of.
    pub snapshot_offset: i64,
    /// Of the one that retention wrote before it deleted, which no crash takes; -1 for none since the start.
    pub snapshot_safe: i64,
    /// No batch of theirs without a way back was cut off since the start, so nothing can be missing from the producers; only
    /// then they are written down.
    pub producers_whole: bool,
    pub bytes_since_snapshot: u64,
    /// So much unflushed makes the next run.
    pub next_run_bytes: u64,
    flushing: bool,
    /// Something of it is on its way to a segment past the WAL; all that is staged follows it there, see `direct.rs`.
    pub direct_pending: bool,
    /// Some of that was staged while the topic was a durable one; and so many bytes of it are not being served yet.
    pub direct_durable: bool,
    /// Index of the first entry of that, and the log end offset before it.
    pub direct_from: (u64, i64),
    /// What lies below the log start goes when that is counted.
    pub direct_log_start: bool,
    pub direct_bytes: u64,
}

pub(crate) struct Group {
    pub id: GroupId,
    pub dir: PathBuf,
    /// It is older than this run.
    pub was_recovered: bool,
    /// Why it refuses to serve. Set once: what was wrong with the bytes stays wrong until the next start looks again.
    pub damage: OnceCell<String>,
    /// Damaged since the start: nothing of it is written, so that it stays as it was found.
    pub frozen: Cell<bool>,
    /// Its deletion was asked for: it takes nothing more.
    pub deleting: Cell<bool>,
    /// It is deleted: its directory has another name.
    pub deleted: Cell<bool>,
    pub queued: Cell<bool>,
    pub direct_queued: Cell<bool>,
    /// Segments with which the log began, and whose files have not got their names: see `receive.rs`.
    pub unplaced: RefCell<Vec<SegmentName>>,
    /// How many receivers there were: what an earlier one has is worth nothing.
    pub receivers: Cell<u64>,
    pub inner: RefCell<Inner>,
    pub producers: RefCell<ProducerState>,
}

impl Group {
    pub fn dir_name(&self) -> &str {
        self.dir.file_name().and_then(|name| name.to_str()).expect("made of a name that was checked")
    }

    fn new(shard: &Shard, id: GroupId, dir_name: &str, config: GroupConfig) -> Self {
        Self {
            id,
            dir: shard.segments_root().join(dir_name),
            was_recovered: false,
            damage: OnceCell::new(),
            frozen: Cell::new(false),
            deleting: Cell::new(false),
            deleted: Cell::new(false),
            queued: Cell::new(false),
            direct_queued: Cell::new(false),
            unplaced: RefCell::default(),
            receivers: Cell::new(0),
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
                counted_base: 0,
                clean_offset: None,
                dirty: Vec::new(),
                dir_dirty: false,
                cut_by: None,
                cuts: 0,
                cut_files: Vec::new(),
                compactions: 0,
                begun: 0,
                begun_with: None,
                anew_lsn: 0,
                marks: Marks::default(),
                membership: None,
                committed_index: 0,
                last_lsn: 0,
                log_start_by: (Lane::Durable, 0),
                touched: [None; 2],
                meta_dirty: false,
                snapshot_offset: -1,
                snapshot_safe: -1,
                producers_whole: true,
                bytes_since_snapshot: 0,
                next_run_bytes: first_run_bytes(id),
                flushing: false,
                direct_pending: false,
                direct_durable: false,
                direct_from: (0, 0),
                direct_log_start: false,
                direct_bytes: 0,
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
        let mut group = Self::new(shard, recovered.group_id, &recovered.dir_name, config);
        group.was_recovered = true;
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
            inner.marks = restored.marks;
            inner.membership = restored.membership;
            inner.committed_index = restored.committed_index.max(inner.hard_state.commit);
            inner.counted_base = restored.segments.last().map_or(0, |segment| segment.name.base);
            let segment = |found: &RestoredSegment| Segment {
                first_index: found.first_index,
                ..Segment::of(found.name, found.bytes)
            };
            inner.segments = restored.segments.iter().map(segment).collect();
            for entry in restored.warm {
                shard.cache_push(group.id, entry.bytes.len());
                inner.tail.push_flushed(entry);
            }
        }
        let mut producers = recovered.producers;
        if group.inner.borrow().config.direct {
            // The only replica: all that is there is committed.
            producers.settle(u64::MAX);
        }
        *group.producers.borrow_mut() = producers;
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
        self.segment_path(SegmentName::plain(base))
    }

    pub fn index_path(&self, base: i64) -> PathBuf {
        self.segment_index_path(SegmentName::plain(base))
    }

    pub fn segment_path(&self, name: SegmentName) -> PathBuf {
        match self.unplaced.borrow().contains(&name) {
            true => self.dir.join(receive::waiting_log(name)),
            false => self.dir.join(name.log_file()),
        }
    }

    pub fn segment_index_path(&self, name: SegmentName) -> PathBuf {
        match self.unplaced.borrow().contains(&name) {
            true => self.dir.join(receive::waiting_index(name)),
            false => self.dir.join(name.index_file()),
        }
    }

    pub fn segment_bases(&self) -> Vec<i64> {
        self.inner.borrow().segments.iter().map(|segment| segment.base).collect()
    }

    pub fn unflushed_bytes(&self) -> u64 {
        self.inner.borrow().tail.unflushed_bytes()
    }

    /// Whether there is a committed entry that could go to a segment.
    pub fn may_flush(&self) -> bool {
        let inner = self.inner.borrow();
        inner.tail.first_unflushed().is_some_and(|entry| inner.is_committed(entry))
    }

    pub fn evict_one(&self) -> Option<usize> {
        self.inner.borrow_mut().tail.evict()
    }

    /// As `evict_one`, but only what ends at `offset` or before.
    pub fn evict_below(&self, offset: i64) -> Option<usize> {
        let mut inner = self.inner.borrow_mut();
        inner.tail.iter().next().filter(|oldest| oldest.next_offset <= offset)?;
        inner.tail.evict()
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
        let (mut hard_state, mut log_start) = (inner.hard_state, inner.log_start);
        let mut committed_index = inner.committed_index;
        if inner.direct_pending {
            // What is not in the WAL and not in a segment may be lost, and then it was never committed.
            let (index, offset) = inner.direct_from;
            let known = inner.flushed_index.max(index - 1);
            hard_state.commit = hard_state.commit.min(known);
            committed_index = committed_index.min(known);
            log_start = log_start.min(inner.flushed_end.max(offset));
        }
        GroupState {
            group: self.id,
            dir_name: self.dir_name().to_owned(),
            os: inner.lane == Lane::Os,
            wal_id,
            lsn,
            hard_state,
            flushed_index: inner.flushed_index,
            flushed_term: inner.flushed_term,
            flushed_end: inner.flushed_end,
            active_base: active.map_or(-1, |segment| segment.base),
            active_bytes: active.map_or(0, |segment| segment.bytes),
            log_start,
            epochs: inner.epochs.clone(),
            committed_index,
            anew_lsn: inner.anew_lsn,
            membership: inner.membership.clone(),
            marks: inner.marks.up_to(inner.flushed_index),
        }
    }

    pub fn set_flushing(&self, flushing: bool) {
        self.inner.borrow_mut().flushing = flushing;
    }
}

impl Inner {
    /// Epochs are known for as long as segments are there: snapshots of producers that end in them are told from those of another
    /// log by them.
    pub(crate) fn forget_epochs(&mut self) {
        let first = self.segments.front().map_or(self.log_start, |segment| segment.base);
        self.epochs.truncate_start(first.min(self.log_start));
    }

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

    /// May leave the WAL. The high watermark counts records: whether an entry without any that stands right at it is
    /// committed, only the hard state says.
    pub fn is_committed(&self, entry: &TailEntry) -> bool {
        if entry.is_batch() {
            entry.next_offset <= self.high_watermark
        } else {
            entry.base_offset < self.high_watermark || entry.index <= self.committed_index
        }
    }

    /// What the WAL must have room for to take the entries that are not in a segment and `due`: bytes of all and of the
    /// largest, and how many.
    pub fn unflushed_size(&self, due: impl Fn(&TailEntry) -> bool) -> (usize, usize, usize) {
        self.tail.unflushed().filter(|entry| due(entry)).fold((0, 0, 0), |(total, largest, count), entry| {
            (total + entry.bytes.len(), largest.max(entry.bytes.len()), count + 1)
        })
    }

    /// Puts these entries into the WAL, where there is room for them; `record_in` was called. Returns the last commit.
    pub fn log_unflushed(
        &mut self,
        shard: &Shard,
        group: GroupId,
        wal: &Wal,
        due: impl Fn(&TailEntry) -> bool,
    ) -> Lsn {
        let mut lsn = 0;
        let mut files = VecDeque::new();
        for entry in self.tail.unflushed().filter(|entry| due(entry)) {
            let placed = wal.append(&shard.next_lsn, &entry.record(group), &entry.bytes, Class::Stage);
            let (at, file_seq) = placed.expect("there was room for all of it");
            files.push_back(file_seq);
            lsn = at;
        }
        for file_seq in &files {
            self.touch(group, wal, *file_seq);
        }
        self.tail.move_unflushed(|entry| match due(entry) {
            true => (files.pop_front().expect("as many as were written"), wal.lane),
            false => (entry.file_seq, entry.lane),
        });
        lsn
    }

    /// With the index of the last entry that goes, and where the next one begins: with the segments the places go that would
    /// tell.
    pub fn log_start_record(&self, group: GroupId, offset: i64) -> (RecordHeader, [u8; 8]) {
        let (index, begins) = self.gone_below(offset).unwrap_or((0, 0));
        (RecordHeader { kind: LOG_START, group, index, term: 0, offset }, begins.to_le_bytes())
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

    pub fn segment_limit(&self) -> u64 {
        self.config.segment_bytes.min(MAX_SEGMENT_BYTES)
    }
}

/// `payload`: from `hard_state_payload`.
pub(crate) fn append_hard_state(
    shard: &Shard,
    wal: &Wal,
    group: GroupId,
    term: u64,
    payload: &[u8],
    class: Class,
) -> Result<(Lsn, u64), Full> {
    let record = RecordHeader { kind: HARD_STATE, group, index: 0, term, offset: 0 };
    wal.append(&shard.next_lsn, &record, payload, class)
}

/// One partition's log. Cheap to clone; stays on its shard's thread.
#[derive(Clone)]
pub struct GroupLog {
    pub(crate) shard: Rc<Shard>,
    pub(crate) group: Rc<Group>,
}

impl std::fmt::Debug for GroupLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GroupLog({} {})", self.group.id, self.group.dir_name())
    }
}

impl GroupLog {
    pub(crate) fn inner(&self) -> Ref<'_, Inner> {
        self.group.inner.borrow()
    }

    pub fn group_id(&self) -> GroupId {
        self.group.id
    }

    pub fn dir_name(&self) -> &str {
        self.group.dir_name()
    }

    /// Puts entries and hard state into the commit that is filling, and entries into the tail. They are safe once
    /// `durable_lsn` of the returned lane reaches the returned LSN. All or nothing: an error has changed nothing.
    pub fn stage(&self, hard_state: Option<HardState>, entries: &[Entry]) -> Result<(Lane, Lsn), StageError> {
        self.stage_with(hard_state, None, entries)
    }

    /// As `stage`. `membership`: who the members are, in at most `MEMBERSHIP_BYTES_MAX` bytes of the caller's, and the index of
    /// the entry that made it so; part of the hard state, with which it must come.
    pub fn stage_with(
        &self,
        hard_state: Option<HardState>,
        membership: Option<(u64, Bytes)>,
        entries: &[Entry],
    ) -> Result<(Lane, Lsn), StageError> {
        let shard = &self.shard;
        self.check_open()?;
        let mut inner = self.group.inner.borrow_mut();
        let inner = &mut *inner;
        let lane = self.next_lane(inner);
        assert!(
            membership
                .as_ref()
                .is_none_or(|(_, bytes)| hard_state.is_some() && bytes.len() <= MEMBERSHIP_BYTES_MAX),
            "a membership is small, and comes with a hard state"
        );
        let hard_payload = hard_state.map(|hard_state| hard_state_payload(hard_state, membership.as_ref()));
        let cut = self.admit(inner, shard.wal(lane), hard_payload.as_ref().map(Vec::len), entries)?;
        if hard_state.is_none() && entries.is_empty() {
            return Ok(self.newest(inner));
        }
        let goes_direct = self.goes_direct(inner, entries);
        if let Some((index, offset)) = cut {
            if goes_direct {
                return Err(StageError::Gap {
                    index,
                    reason: "the entry it replaces is on its way to a segment",
                });
            }
            self.truncate(inner, index, offset)?;
        }
        if goes_direct {
            return Ok((Lane::Direct, self.stage_direct(inner, lane, hard_state, membership, entries)));
        }
        let wal = self.enter_lane(inner, lane);
        let votes = hard_state
            .is_some_and(|new| (new.term, new.vote) != (inner.hard_state.term, inner.hard_state.vote));
        let mut lsn = inner.last_lsn;
        for entry in entries {
            let kind = if matches!(entry.payload, Payload::Batch(_)) { BATCH } else { CONTROL };
            let record = RecordHeader {
                kind,
                group: self.group.id,
                index: entry.index,
                term: entry.term,
                offset: inner.log_end,
            };
            let placed = wal.append(&shard.next_lsn, &record, entry.payload.bytes(), Class::Stage);
            let (at, file_seq) = placed.expect("`admit` has found room for all of it");
            lsn = at;
            inner.touch(self.group.id, wal, file_seq);
            self.take(inner, entry, file_seq, wal.lane);
        }
        // Behind the entries: cut off in between, the entries are there and nothing that depends on them.
        if let (Some(hard_state), Some(payload)) = (hard_state, hard_payload) {
            let placed =
                append_hard_state(shard, wal, self.group.id, hard_state.term, &payload, Class::Stage);
            let (at, file_seq) = placed.expect("`admit` has found room for all of it");
            lsn = at;
            inner.touch(self.group.id, wal, file_seq);
            inner.hard_state = hard_state;
            inner.committed_index = inner.committed_index.max(hard_state.commit);
            self.group.producers.borrow_mut().settle(inner.committed_index);
            inner.membership = membership.or(inner.membership.take());
        }
        inner.meta_dirty = true;
        inner.last_lsn = lsn;
        if inner.cut_by.is_some_and(|(_, by)| by == Lsn::MAX) {
            inner.cut_by = Some((lane, lsn));
        }
        // Nobody waits for it, so it waits for more.
        if inner.config.durability == Durability::Memory && lane == Lane::Os && !votes {
            wal.wake_writer_later();
        } else {
            wal.wake_writer();
        }
        Ok((lane, lsn))
    }

    /// Into the tail, and what is known of the log's end.
    pub(crate) fn take(&self, inner: &mut Inner, entry: &Entry, file_seq: u64, lane: Lane) {
        let shard = &self.shard;
        let bytes = entry.payload.bytes();
        let mut next_offset = inner.log_end;
        let mut max_timestamp = i64::MIN;
        if let Payload::Batch(bytes) = &entry.payload {
            let header = record_batch::parse_header(bytes).expect("`admit` has parsed it");
            next_offset = header.next_offset();
            max_timestamp = header.max_timestamp;
            if header.has_producer_id() {
                let mut producers = self.group.producers.borrow_mut();
                // Where this is the only replica nothing is ever cut away.
                match inner.config.direct {
                    true => producers.apply(&header),
                    false => producers.apply_for_now(&header, entry.index),
                }
            }
            inner.epochs.assign(header.leader_epoch, header.base_offset);
            add(&shard.counters.bytes_appended, bytes.len() as u64);
            add(&shard.counters.batches_appended, 1);
        }
        let control = matches!(entry.payload, Payload::Control(_)).then_some(bytes);
        if control.is_some() || entry.term != inner.last_term {
            inner.marks.note(entry.index, entry.term, inner.log_end, control, inner.committed_index);
        }
        shard.cache_push(self.group.id, bytes.len());
        add(&shard.unflushed_bytes, bytes.len() as u64);
        inner.tail.push(TailEntry {
            index: entry.index,
            term: entry.term,
            base_offset: inner.log_end,
            next_offset,
            max_timestamp,
            bytes: bytes.clone(),
            file_seq,
            lane,
        });
        inner.last_index = entry.index;
        inner.last_term = entry.term;
        inner.log_end = next_offset;
    }

    /// When what was staged so far is as safe as its topic asks.
    pub(crate) fn newest(&self, inner: &Inner) -> (Lane, Lsn) {
        match inner.direct_pending {
            true => (Lane::Direct, self.shard.direct.issued()),
            false => (inner.lane, inner.last_lsn),
        }
    }

    /// Whether anything may be written at all.
    pub(crate) fn check_open(&self) -> Result<(), StageError> {
        if self.shard.is_poisoned() || self.shard.closing.get() {
            return Err(StageError::Poisoned);
        }
        if self.group.deleting.get() {
            return Err(StageError::Deleted);
        }
        if self.group.is_damaged() {
            return Err(StageError::Damaged);
        }
        Ok(())
    }

    /// Where the next record goes. An entry must not be safe before the one it follows: the os lane, which waits for no
    /// disk, has to wait until the durable one is done with this partition.
    pub(crate) fn next_lane(&self, inner: &Inner) -> Lane {
        let want = inner.config.durability.lane();
        let done = inner.last_lsn <= self.shard.durable_lsn(inner.lane);
        if want == Lane::Durable || done { want } else { inner.lane }
    }

    /// To be called right before a record is appended. The durable lane can be told to wait for what it follows in the
    /// other one, so a partition is as safe as its topic asks from the first record on.
    pub(crate) fn enter_lane(&self, inner: &mut Inner, lane: Lane) -> &Wal {
        if lane != inner.lane {
            match lane {
                Lane::Os => self.shard.use_os_lane(),
                Lane::Durable if mutant::is(Mutant::LeavesOsLaneBehind) => {}
                Lane::Durable => self.shard.wal(Lane::Os).sync_before_durable(inner.last_lsn),
                Lane::Direct => unreachable!("no record goes there"),
            }
            inner.lane = lane;
        }
        inner.record_in(&self.shard, lane);
        self.shard.wal(lane)
    }

    /// Checks everything about entries before anything changes. Returns index and offset to cut at, if they replace some.
    fn admit(
        &self,
        inner: &Inner,
        wal: &Wal,
        hard_state_bytes: Option<usize>,
        entries: &[Entry],
    ) -> Result<Option<(u64, i64)>, StageError> {
        let (mut total, mut largest, mut count) = (0, 0, entries.len());
        if let Some(bytes) = hard_state_bytes {
            (total, largest, count) = (bytes, bytes, count + 1);
        }
        let mut cut = None;
        let mut offset = inner.log_end;
        let mut next_index = inner.last_index + 1;
        for (at, entry) in entries.iter().enumerate() {
            let gap = |reason| StageError::Gap { index: entry.index, reason };
            if at == 0 && entry.index <= inner.last_index {
                if entry.index <= inner.committed_index {
                    return Err(gap("the entry it replaces is committed"));
                }
                offset = self.offset_of(inner, entry.index)?;
                cut = Some((entry.index, offset));
                next_index = entry.index;
            }
            if entry.index != next_index {
                return Err(gap("its index does not follow"));
            }
            next_index += 1;
            let bytes = entry.payload.bytes();
            if let Payload::Batch(bytes) = &entry.payload {
                let header =
                    record_batch::parse_header(bytes).map_err(|_| gap("it is not a record batch"))?;
                if header.total_bytes() != bytes.len() {
                    return Err(gap("it is not exactly one record batch"));
                }
                if header.base_offset != offset {
                    return Err(gap("its base offset is not the log end offset"));
                }
                offset = header.next_offset();
            }
            total += bytes.len();
            largest = largest.max(bytes.len());
        }
        if largest > wal.largest_record() {
            return Err(StageError::TooLarge { bytes: largest, limit: wal.largest_record() });
        }
        if !wal.fits_all(total, largest, count) {
            self.shard.wake_flusher();
            return Err(StageError::NoSpace);
        }
        Ok(cut)
    }

    /// A segment in which the place of the cut cannot be found leaves everything as it was: what is counted of it must
    /// stay what is in it.
    fn truncate(&self, inner: &mut Inner, index: u64, offset: i64) -> Result<(), StageError> {
        let shard = &self.shard;
        let place = if index <= inner.flushed_index {
            crate::flush::place_of_cut(shard, &self.group, inner, offset).map_err(|error| {
                self.group.note_damage(format!("could not cut the log at offset {offset}: {error}"));
                StageError::Damaged
            })?
        } else {
            None
        };
        let (removed, unflushed) = inner.tail.truncate(index);
        shard.cache_bytes.set(shard.cache_bytes.get().saturating_sub(removed));
        shard.unflushed_bytes.set(shard.unflushed_bytes.get().saturating_sub(unflushed));
        inner.marks.truncate(index, offset);
        inner.epochs.truncate_end(offset);
        inner.producers_whole &= !self.group.producers.borrow_mut().truncate(offset);
        inner.last_index = index - 1;
        inner.log_end = offset;
        inner.last_term = inner.marks.term_at(index - 1).unwrap_or(inner.flushed_term);
        if index <= inner.flushed_index {
            crate::flush::cut_segments(shard, &self.group, inner, (index, offset, place));
        }
        if inner.snapshot_offset.max(inner.snapshot_safe) > offset {
            (inner.snapshot_offset, inner.snapshot_safe) = (-1, -1);
        }
        Ok(())
    }

    /// Whether a batch of `bytes` may be accepted: what `stage` is sure to take, with a margin for what is accepted at
    /// the same time.
    pub fn has_room(&self, bytes: usize) -> bool {
        let shard = &self.shard;
        if self.check_open().is_err() {
            return false;
        }
        let wal = shard.wal(self.next_lane(&self.inner()));
        let room = bytes <= wal.largest_record() && wal.has_room(bytes);
        if !room {
            shard.wake_flusher();
        }
        room
    }

    /// Whether the WAL has no room for `count` batches, `total` bytes together and none above `largest`, only because what
    /// it holds is still on its way to segments: there will be room soon. Keeps a part of the ring for records that are not
    /// clients'. What can never fit, and anything on a full disk, does not wait: it is for `has_room` to refuse.
    pub fn must_wait(&self, total: usize, largest: usize, count: usize) -> bool {
        let shard = &self.shard;
        if self.check_open().is_err() {
            return false;
        }
        let wal = shard.wal(self.next_lane(&self.inner()));
        if largest > wal.largest_record() || shard.is_out_of_space() {
            return false;
        }
        if self.is_direct_full() {
            return true;
        }
        let file_bytes = usize::try_from(shard.config.wal_file_bytes).unwrap_or(usize::MAX);
        let reserve = RING_RESERVE_BYTES.min(file_bytes / 4);
        // A request of more than half a file is let in when that much is free.
        if wal.has_room_for(total.min(file_bytes / 2) + reserve, largest, count) {
            return false;
        }
        shard.wake_flusher();
        true
    }

    /// The largest batch that this log ever takes.
    pub fn entry_bytes_max(&self) -> usize {
        self.shard.wal(self.inner().lane).largest_record()
    }

    pub fn health(&self) -> GroupHealth {
        match self.damage() {
            None => GroupHealth::Ok,
            Some(reason) => GroupHealth::Damaged { reason: reason.to_owned() },
        }
    }

    /// It serves no more, until the next start; what it has stays as it is.
    pub fn refuse(&self, reason: &str) {
        self.group.note_damage(reason.to_owned());
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

    /// Records below it are in segments, which is where retention deletes; the others are in the WAL only.
    pub fn flushed_offset(&self) -> i64 {
        self.inner().flushed_end
    }

    pub fn last_index(&self) -> u64 {
        self.inner().last_index
    }

    pub fn last_term(&self) -> u64 {
        self.inner().last_term
    }

    /// How often compaction has replaced segments since the start: who reads a log in pieces and sees it change has pieces of
    /// different logs.
    pub fn compactions(&self) -> u64 {
        self.inner().compactions
    }

    pub fn size_bytes(&self) -> u64 {
        self.inner().size_bytes()
    }

    /// Entries up to `index` are committed: none of them is ever replaced. With `set_high_watermark`, which counts records, it
    /// says this of entries without any, too.
    pub fn set_committed(&self, index: u64) {
        let mut inner = self.group.inner.borrow_mut();
        inner.committed_index = inner.committed_index.max(index.min(inner.last_index));
        self.group.producers.borrow_mut().settle(inner.committed_index);
    }

    /// Entries below `offset` are committed and may leave the WAL.
    pub fn set_high_watermark(&self, offset: i64) {
        let ripe = {
            let mut inner = self.group.inner.borrow_mut();
            if offset <= inner.high_watermark {
                return;
            }
            inner.high_watermark = offset.min(inner.log_end);
            inner.tail.unflushed_bytes() >= inner.next_run_bytes
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
        let (known, end) = inner.epochs.end_offset(epoch, inner.log_end);
        // Of those below the log start clients know no more than that.
        if (0..inner.log_start).contains(&end) { (epoch, inner.log_start) } else { (known, end) }
    }

    /// Leader epoch of the record at `offset`; -1 if unknown.
    pub fn epoch_at(&self, offset: i64) -> i32 {
        self.inner().epochs.epoch_at(offset)
    }

    /// Records below `offset` are gone for readers at once, and for good with the returned commit; whole segments below
    /// it are deleted.
    pub fn advance_log_start(&self, offset: i64) -> Result<(Lane, Lsn), AdvanceError> {
        let mut inner = self.group.inner.borrow_mut();
        let inner = &mut *inner;
        let (start, end) = (inner.log_start, inner.log_end);
        if offset < start || offset > end {
            return Err(AdvanceError::OutOfRange { offset, start, end });
        }
        self.stage_log_start(inner, offset).map_err(AdvanceError::Stage)
    }

    /// As `advance_log_start`, and waits for the commit.
    pub async fn delete_below(&self, offset: i64) -> Result<(), AdvanceError> {
        let (lane, lsn) = self.advance_log_start(offset)?;
        self.shard.wait_durable(lane, lsn).await?;
        Ok(())
    }

    pub(crate) fn stage_log_start(&self, inner: &mut Inner, offset: i64) -> Result<(Lane, Lsn), StageError> {
        let shard = &self.shard;
        self.check_open()?;
        if offset == inner.log_start {
            return Ok(self.newest(inner));
        }
        let lane = self.next_lane(inner);
        if inner.direct_pending && offset > inner.direct_from.1 {
            inner.log_start = offset;
            inner.direct_log_start = true;
            return Ok((Lane::Direct, self.stage_direct(inner, lane, None, None, &[])));
        }
        // Before the lane changes: it is the one of the last record.
        if !shard.wal(lane).fits_all(8, 8, 1) {
            return Err(StageError::NoSpace);
        }
        let wal = self.enter_lane(inner, lane);
        let (record, begins) = inner.log_start_record(self.group.id, offset);
        let placed = wal.append(&shard.next_lsn, &record, &begins, Class::Stage);
        let (lsn, file_seq) = placed.expect("there was room for it");
        inner.touch(self.group.id, wal, file_seq);
        inner.last_lsn = lsn;
        inner.log_start_by = (lane, lsn);
        inner.log_start = offset;
        inner.meta_dirty = true;
        wal.wake_writer();
        crate::retention::drop_below_start(shard, &self.group, inner);
        inner.forget_epochs();
        Ok((wal.lane, lsn))
    }

    pub fn set_config(&self, config: GroupConfig) {
        let mut inner = self.group.inner.borrow_mut();
        // Every partition is told at every start: a state that has not changed is not written again.
        if inner.config != config {
            inner.meta_dirty = true;
            // What was written down for a topic of the kernel's was not synced.
            if inner.config.durability != config.durability {
                inner.snapshot_safe = -1;
            }
            inner.config = config;
        }
    }

    /// Waits until no loss of power takes back what was staged so far.
    pub async fn force(&self) -> Result<(), LogPoisoned> {
        let direct = self.inner().direct_pending;
        if direct {
            self.shard.wait_durable(Lane::Direct, self.shard.direct.issued()).await?;
        }
        let (lane, lsn) = {
            let inner = self.inner();
            (inner.lane, inner.last_lsn)
        };
        self.shard.wal(lane).wake_writer();
        self.shard.wait_safe(lane, lsn).await
    }

    /// The producers of this partition. Not to be held over `stage`.
    pub fn producers(&self) -> RefMut<'_, ProducerState> {
        self.group.producers.borrow_mut()
    }
}
