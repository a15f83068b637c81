//! Staging: entries and hard state of a partition on their way into the WAL, and the news that they are safe.
//!
//! Synchronous, on the shard thread. What `stage` accepts is in the tail at once; its record goes to the WAL at once too,
//! unless a large batch before it is still being written to its segment (`direct.rs`): records stand in the WAL in the
//! order of the log, so what follows waits in `unrecorded`.
//!
//! Each call of `stage` carries a number of the caller's. Numbers are reported, in their order, when everything of the
//! call is as safe as the topic asked for, and so is everything before it.

use std::rc::Rc;

use flumen_protocol::record_batch::{self, BatchHeader};

use crate::direct::DIRECT_BYTES;
use crate::group::{Group, GroupLog, Inner};
use crate::layout::Place;
use crate::ring::Class;
use crate::segment_writer::Written;
use crate::store::{Shard, add};
use crate::tail::TailEntry;
use crate::types::{AdvanceError, Entry, GroupId, HardState, Lane, LogPoisoned, Lsn, Payload, StageError};
use crate::wal::{Full, Wal};
use crate::wal_format::{
    BATCH, CONTROL, HARD_STATE, LOG_START, POINTER, POINTER_BYTES, RecordHeader, encode_pointer,
};

/// Room in the WAL that waiting producers leave alone: metadata, groups and export plans go on under any load.
const RING_RESERVE_BYTES: usize = 4 << 20;

/// What waits for its place in the WAL.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// By index, both ends included; those that were replaced since are passed over.
    Entries {
        first: u64,
        last: u64,
    },
    Hard(HardState),
    LogStart(i64),
    /// The caller's number: all parts before it belong to it.
    Number(u64),
}

/// Numbers whose records are in the WAL, in a commit that is not done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    lane: Lane,
    lsn: Lsn,
    number: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    All,
    /// The next part is a batch that has to be in its segment first.
    Direct,
    /// The WAL has no room now.
    Full,
}

/// Writes the record of an entry. Returns the file it is in.
pub(crate) fn record_entry(
    shard: &Shard,
    wal: &Wal,
    group: GroupId,
    inner: &mut Inner,
    entry: &TailEntry,
) -> Result<u64, Full> {
    let record = |kind| RecordHeader {
        kind,
        starts_segment: entry.place.starts,
        group,
        index: entry.index,
        term: entry.term,
        offset: entry.base_offset,
    };
    let (lsn, file_seq) = if entry.direct {
        let pointer = encode_pointer(entry.place.base, entry.place.position, &entry.bytes);
        wal.append(&shard.next_lsn, &record(POINTER), &pointer, Class::Stage)?
    } else {
        let kind = if entry.is_batch() { BATCH } else { CONTROL };
        wal.append(&shard.next_lsn, &record(kind), &entry.bytes, Class::Stage)?
    };
    inner.last_lsn = lsn;
    inner.touch(group, wal, file_seq);
    Ok(file_seq)
}

fn record_hard(
    shard: &Shard,
    wal: &Wal,
    group: GroupId,
    inner: &mut Inner,
    hard: HardState,
) -> Result<(), Full> {
    let mut payload = [0; 16];
    payload[..8].copy_from_slice(&hard.vote.to_le_bytes());
    payload[8..].copy_from_slice(&hard.commit.to_le_bytes());
    let record = RecordHeader { term: hard.term, ..RecordHeader::of(HARD_STATE, group) };
    let (lsn, file_seq) = wal.append(&shard.next_lsn, &record, &payload, Class::Stage)?;
    inner.last_lsn = lsn;
    inner.touch(group, wal, file_seq);
    Ok(())
}

fn record_log_start(
    shard: &Shard,
    wal: &Wal,
    group: GroupId,
    inner: &mut Inner,
    offset: i64,
) -> Result<(), Full> {
    let record = RecordHeader { offset, ..RecordHeader::of(LOG_START, group) };
    let (lsn, file_seq) = wal.append(&shard.next_lsn, &record, &[], Class::Stage)?;
    inner.last_lsn = lsn;
    inner.log_start_by = (wal.lane, lsn);
    inner.touch(group, wal, file_seq);
    Ok(())
}

impl Group {
    /// Everything so far recorded belongs to `number`.
    pub fn give_ticket(self: &Rc<Self>, shard: &Shard, wal: &Wal, inner: &mut Inner, number: u64) {
        let (lane, lsn) = (wal.lane, inner.last_lsn);
        if lsn <= shard.durable_lsn(lane) && inner.tickets.is_empty() {
            // Nothing of it was new.
            shard.report(self, number);
            return;
        }
        if inner.listed_in != lsn {
            inner.listed_in = lsn;
            wal.list(Rc::clone(self), lsn);
        }
        inner.tickets.push_back(Ticket { lane, lsn, number });
    }

    /// A commit is done that has records of this group.
    pub fn committed(self: &Rc<Self>, shard: &Shard, lane: Lane, lsn: Lsn) {
        let mut done = None;
        {
            let mut inner = self.inner.borrow_mut();
            while let Some(ticket) = inner.tickets.front().filter(|t| t.lane == lane && t.lsn <= lsn) {
                done = Some(ticket.number);
                inner.tickets.pop_front();
            }
        }
        if let Some(number) = done {
            shard.report(self, number);
        }
    }

    /// Moves what waits into the WAL, as far as possible.
    pub fn record_waiting(self: &Rc<Self>, shard: &Shard, inner: &mut Inner) -> Recorded {
        let wal = shard.wal(inner.lane);
        inner.record_in(shard, wal.lane);
        while let Some(part) = inner.unrecorded.front().copied() {
            let done = match part {
                Part::Entries { first, last } => {
                    let Some(entry) = inner.tail.get(first) else {
                        // Replaced meanwhile; what replaced it has parts of its own further on.
                        inner.unrecorded.pop_front();
                        continue;
                    };
                    if entry.is_recorded() {
                        Ok(())
                    } else if entry.direct && !entry.written {
                        return Recorded::Direct;
                    } else {
                        let entry = entry.clone();
                        let placed = record_entry(shard, wal, self.id, inner, &entry);
                        placed.map(|file_seq| inner.tail.note_recorded(first, file_seq, wal.lane))
                    }
                    .map(|()| {
                        if first < last {
                            inner.unrecorded[0] = Part::Entries { first: first + 1, last };
                        }
                        first == last
                    })
                }
                Part::Hard(hard) => record_hard(shard, wal, self.id, inner, hard).map(|()| true),
                Part::LogStart(offset) => record_log_start(shard, wal, self.id, inner, offset).map(|()| true),
                Part::Number(number) => {
                    self.give_ticket(shard, wal, inner, number);
                    Ok(true)
                }
            };
            match done {
                Ok(true) => drop(inner.unrecorded.pop_front()),
                Ok(false) => {}
                Err(Full) => {
                    wal.wake_writer();
                    return Recorded::Full;
                }
            }
        }
        inner.note_cut_by(wal.lane);
        wal.wake_writer();
        Recorded::All
    }
}

impl GroupLog {
    /// Takes entries and hard state into the log. `number` is reported by `ShardStore::next_persisted` once all of it is
    /// safe. All or nothing: an error has changed nothing.
    pub fn stage(
        &self,
        hard_state: Option<HardState>,
        entries: &[Entry],
        number: u64,
    ) -> Result<(), StageError> {
        let (shard, group) = (&self.shard, &self.group);
        self.may_write()?;
        let mut inner = group.inner.borrow_mut();
        let inner = &mut *inner;
        let lane = self.next_lane(inner);
        let cut = self.admit(inner, shard.wal(lane), hard_state.is_some(), entries)?;
        if let Some((index, offset)) = cut {
            self.truncate(inner, index, offset);
        }
        let mut waits = !inner.unrecorded.is_empty() || inner.direct_busy;
        let wal = match hard_state.is_none() && entries.is_empty() {
            true => shard.wal(inner.lane),
            false => self.enter_lane(inner, lane),
        };
        for (at, entry) in entries.iter().enumerate() {
            let mut added = self.tail_entry(inner, entry);
            waits |= added.direct;
            if !waits {
                let placed = record_entry(shard, wal, group.id, inner, &added);
                added.file_seq = placed.expect("`admit` has found room for all of it");
                added.lane = wal.lane;
            } else if let Some(Part::Entries { last, .. }) = inner.unrecorded.back_mut().filter(|_| at > 0) {
                *last = added.index;
            } else {
                let (first, last) = (added.index, added.index);
                inner.unrecorded.push_back(Part::Entries { first, last });
            }
            shard.cache_push(group.id, added.bytes.len());
            add(&shard.unflushed_bytes, added.bytes.len() as u64);
            inner.last_index = added.index;
            inner.last_term = added.term;
            inner.log_end = added.next_offset;
            inner.tail.push(added);
        }
        // Behind the entries: cut off in between, the entries are there and nothing that depends on them.
        if let Some(hard) = hard_state {
            inner.hard_state = hard;
            if waits {
                inner.unrecorded.push_back(Part::Hard(hard));
            } else {
                record_hard(shard, wal, group.id, inner, hard).expect("`admit` has found room for all of it");
            }
        }
        inner.meta_dirty = true;
        if waits {
            inner.unrecorded.push_back(Part::Number(number));
            crate::direct::start(shard, group, inner);
            return Ok(());
        }
        group.give_ticket(shard, wal, inner, number);
        inner.note_cut_by(lane);
        wal.wake_writer();
        Ok(())
    }

    /// What the tail keeps of an entry, with the batch's place in a segment; its record is still to be written.
    fn tail_entry(&self, inner: &mut Inner, entry: &Entry) -> TailEntry {
        let shard = &self.shard;
        let bytes = entry.payload.bytes();
        let mut added = TailEntry {
            index: entry.index,
            term: entry.term,
            base_offset: inner.log_end,
            next_offset: inner.log_end,
            max_timestamp: i64::MIN,
            bytes: bytes.clone(),
            place: Place::NONE,
            direct: false,
            written: false,
            file_seq: TailEntry::NOT_RECORDED,
            lane: inner.lane,
        };
        if let Payload::Batch(_) = entry.payload {
            let header = record_batch::parse_header(bytes).expect("`admit` has parsed it");
            added.next_offset = header.next_offset();
            added.max_timestamp = header.max_timestamp;
            added.direct = self.goes_direct(inner, bytes.len());
            let limits = inner.limits();
            added.place = inner.layout.place(added.base_offset, bytes.len(), header.max_timestamp, limits);
            if header.has_producer_id() {
                self.group.producers.borrow_mut().apply(&header);
            }
            inner.epochs.assign(header.leader_epoch, header.base_offset);
            add(&shard.counters.bytes_appended, bytes.len() as u64);
            add(&shard.counters.batches_appended, 1);
        }
        added
    }

    /// Whether a batch of this size is written straight to its segment.
    fn goes_direct(&self, inner: &Inner, bytes: usize) -> bool {
        // Nothing is written to segments that are being cut, and little helps where there is no space.
        bytes >= DIRECT_BYTES && inner.cut_by.is_none() && !self.shard.is_out_of_space()
    }

    fn may_write(&self) -> Result<(), StageError> {
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
    fn next_lane(&self, inner: &Inner) -> Lane {
        if !inner.unrecorded.is_empty() {
            return inner.lane;
        }
        let want = inner.config.durability.lane();
        let done = inner.last_lsn <= self.shard.durable_lsn(inner.lane);
        if want == Lane::Durable || done { want } else { inner.lane }
    }

    /// To be called right before a record is appended. The durable lane can be told to wait for what it follows in the
    /// other one, so a partition is as safe as its topic asks from the first record on.
    fn enter_lane(&self, inner: &mut Inner, lane: Lane) -> &Wal {
        if lane != inner.lane {
            match lane {
                Lane::Os => self.shard.use_os_lane(),
                Lane::Durable => self.shard.wal(Lane::Os).sync_before_durable(inner.last_lsn),
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
        has_hard_state: bool,
        entries: &[Entry],
    ) -> Result<Option<(u64, i64)>, StageError> {
        let (mut total, mut largest, mut count) = (0, 0, entries.len());
        if has_hard_state {
            (total, largest, count) = (16, 16, count + 1);
        }
        let mut cut = None;
        let mut offset = inner.log_end;
        let mut next_index = inner.last_index + 1;
        for (at, entry) in entries.iter().enumerate() {
            let gap = |reason| StageError::Gap { index: entry.index, reason };
            if at == 0 && entry.index <= inner.last_index {
                offset = inner.offset_of(entry.index).ok_or(gap("the entry it replaces is committed"))?;
                cut = Some((entry.index, offset));
                next_index = entry.index;
            }
            if entry.index != next_index {
                return Err(gap("its index does not follow"));
            }
            next_index += 1;
            let mut bytes = entry.payload.bytes().len();
            if let Payload::Batch(batch) = &entry.payload {
                let header = one_batch(batch).map_err(gap)?;
                if header.base_offset != offset {
                    return Err(gap("its base offset is not the log end offset"));
                }
                offset = header.next_offset();
                if cut.is_none_or(|(index, _)| index > inner.flushed_index) && self.goes_direct(inner, bytes)
                {
                    bytes = POINTER_BYTES;
                }
            }
            total += bytes;
            largest = largest.max(bytes);
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

    fn truncate(&self, inner: &mut Inner, index: u64, offset: i64) {
        let shard = &self.shard;
        let (removed, unflushed) = inner.tail.truncate(index);
        shard.cache_bytes.set(shard.cache_bytes.get().saturating_sub(removed));
        shard.unflushed_bytes.set(shard.unflushed_bytes.get().saturating_sub(unflushed));
        inner.recovered_tail.retain(|(known, _)| *known < index);
        inner.epochs.truncate_end(offset);
        inner.producers_whole &= !self.group.producers.borrow_mut().truncate(offset);
        inner.last_index = index - 1;
        inner.log_end = offset;
        inner.last_term = inner.tail.get(index - 1).map_or(inner.flushed_term, |entry| entry.term);
        if index <= inner.flushed_index {
            crate::flush::cut_segments(shard, &self.group, inner, index, offset);
        }
        inner.layout = inner.layout_at_end();
        inner.cuts += 1;
        if inner.written.index >= index {
            inner.written = Written::up_to(index - 1, inner.layout);
        }
        if inner.snapshot_offset > offset {
            inner.snapshot_offset = -1;
        }
    }

    /// Whether a batch of `bytes` may be accepted: what `stage` is sure to take, with a margin for what is accepted at
    /// the same time.
    pub fn has_room(&self, bytes: usize) -> bool {
        if self.may_write().is_err() {
            return false;
        }
        let inner = self.group.inner.borrow();
        let wal = self.shard.wal(self.next_lane(&inner));
        let room = if self.goes_direct(&inner, bytes) {
            crate::direct::has_room(&self.shard) && wal.has_room(POINTER_BYTES)
        } else {
            bytes <= wal.largest_record() && wal.has_room(bytes)
        };
        if !room {
            self.shard.wake_flusher();
        }
        room
    }

    /// Whether there is no room for `count` batches, `total` bytes together and none above `largest`, only because what
    /// is here already is still on its way to segments: there will be room soon. Keeps a part of the ring for records
    /// that are not clients'. What can never fit, and anything on a full disk, does not wait: it is for `has_room` to
    /// refuse.
    pub fn must_wait(&self, total: usize, largest: usize, count: usize) -> bool {
        let shard = &self.shard;
        if self.may_write().is_err() || shard.is_out_of_space() {
            return false;
        }
        let inner = self.group.inner.borrow();
        let wal = shard.wal(self.next_lane(&inner));
        // Large ones take little room in the WAL, and some in memory until they are counted.
        let (mut in_wal, mut largest_in_wal, mut room) = (total, largest, true);
        if self.goes_direct(&inner, largest) {
            in_wal = total - largest + POINTER_BYTES;
            largest_in_wal = DIRECT_BYTES.min(in_wal);
            room = crate::direct::has_room(shard);
        }
        if largest_in_wal > wal.largest_record() {
            return false;
        }
        let file_bytes = usize::try_from(shard.config.wal_file_bytes).unwrap_or(usize::MAX);
        let reserve = RING_RESERVE_BYTES.min(file_bytes / 4);
        // A request of more than half a file is let in when that much is free.
        if room && wal.has_room_for(in_wal.min(file_bytes / 2) + reserve, largest_in_wal, count) {
            return false;
        }
        shard.wake_flusher();
        true
    }

    /// The largest number of `stage` for which all is safe; 0 before the first.
    pub fn persisted(&self) -> u64 {
        self.group.persisted.get()
    }

    /// Waits until `number` is safe.
    pub async fn wait_persisted(&self, number: u64) -> Result<(), LogPoisoned> {
        while self.persisted() < number {
            self.shard.any_persisted().await?;
        }
        Ok(())
    }

    /// Records below `offset` are gone for readers at once, and for good once the record of it is safe; whole segments
    /// below it are deleted.
    pub fn advance_log_start(&self, offset: i64) -> Result<(), AdvanceError> {
        let mut inner = self.group.inner.borrow_mut();
        let inner = &mut *inner;
        let (start, end) = (inner.log_start, inner.log_end);
        if offset < start || offset > end {
            return Err(AdvanceError::OutOfRange { offset, start, end });
        }
        self.stage_log_start(inner, offset).map_err(AdvanceError::Stage)
    }

    /// As `advance_log_start`, and waits until no crash can bring the records back.
    pub async fn delete_below(&self, offset: i64) -> Result<(), AdvanceError> {
        self.advance_log_start(offset)?;
        crate::direct::wait_recorded(&self.shard, &self.group).await?;
        let (lane, lsn) = self.group.inner.borrow().log_start_by;
        self.shard.wait_durable(lane, lsn).await?;
        Ok(())
    }

    pub(crate) fn stage_log_start(&self, inner: &mut Inner, offset: i64) -> Result<(), StageError> {
        let shard = &self.shard;
        self.may_write()?;
        if offset == inner.log_start {
            return Ok(());
        }
        if inner.unrecorded.is_empty() {
            let lane = self.next_lane(inner);
            let wal = self.enter_lane(inner, lane);
            record_log_start(shard, wal, self.group.id, inner, offset).map_err(|Full| StageError::NoSpace)?;
            wal.wake_writer();
        } else {
            inner.unrecorded.push_back(Part::LogStart(offset));
        }
        inner.log_start = offset;
        inner.epochs.truncate_start(offset);
        inner.meta_dirty = true;
        crate::retention::drop_below_start(shard, &self.group, inner);
        Ok(())
    }
}

fn one_batch(bytes: &[u8]) -> Result<BatchHeader, &'static str> {
    let header = record_batch::parse_header(bytes).map_err(|_| "it is not a record batch")?;
    if header.total_bytes() == bytes.len() { Ok(header) } else { Err("it is not exactly one record batch") }
}
