//! One partition's log: the tail in memory, the segments behind it, and what is known of its producers.
//!
//! The tail holds entries in log order: first those that are in segments already (cache, may go at any
//! time), then those that are only in the WAL (stay until they are flushed). Lives on its shard.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;
use flumen_io::{File, Mode};
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch::{self, HEADER_BYTES};

use crate::entry::{Entry, GroupConfig, GroupHealth, GroupId, HardState, Lane, Lsn, Payload};
use crate::error::{ReadError, StageError};
use crate::leader_epochs::LeaderEpochs;
use crate::producer_state::ProducerState;
use crate::segment::{self, Segment};
use crate::store::ShardStore;
use crate::wal_format;

/// One catch-up read at least: a request for less is cut from it.
const READ_BYTES: usize = 256 << 10;
/// Decompressed bytes looked at when a record is sought by time.
const TIME_LOOKUP_BYTES_MAX: usize = 64 << 20;

pub(crate) struct TailEntry {
    pub(crate) index: u64,
    pub(crate) term: u64,
    /// Equal offsets for a control entry.
    pub(crate) base_offset: i64,
    pub(crate) next_offset: i64,
    pub(crate) bytes: Bytes,
    pub(crate) lane: Lane,
    pub(crate) lsn: Lsn,
}

pub(crate) struct Group {
    pub(crate) id: GroupId,
    pub(crate) dir: PathBuf,
    pub(crate) health: RefCell<GroupHealth>,
    pub(crate) config: RefCell<GroupConfig>,
    pub(crate) state: RefCell<GroupState>,
    pub(crate) producers: RefCell<ProducerState>,
    /// A flush of this group is under way, or it waits for one.
    pub(crate) flushing: Cell<bool>,
    pub(crate) queued: Cell<bool>,
    pub(crate) deleted: Cell<bool>,
}

pub(crate) struct GroupState {
    pub(crate) hard_state: HardState,
    pub(crate) last_index: u64,
    pub(crate) last_term: u64,
    pub(crate) log_start_offset: i64,
    pub(crate) log_end_offset: i64,
    pub(crate) high_watermark: i64,
    pub(crate) tail: VecDeque<TailEntry>,
    /// Entries at the front of `tail` that are in segments.
    pub(crate) flushed: usize,
    pub(crate) unflushed_bytes: usize,
    pub(crate) flushed_index: u64,
    pub(crate) flushed_term: u64,
    pub(crate) segments: Vec<Segment>,
    pub(crate) active: Option<File>,
    /// Written since its last sync.
    pub(crate) dirty: Vec<File>,
    pub(crate) synced_end_offset: i64,
    pub(crate) snapshot_offset: i64,
    pub(crate) leader_epochs: LeaderEpochs,
}

/// What the broker holds of a partition's log. Cheap to clone.
#[derive(Clone)]
pub struct GroupLog {
    pub(crate) group: Rc<Group>,
    pub(crate) store: ShardStore,
}

impl GroupLog {
    pub fn health(&self) -> GroupHealth {
        self.group.health.borrow().clone()
    }

    pub fn hard_state(&self) -> HardState {
        self.group.state.borrow().hard_state
    }

    pub fn last_index(&self) -> u64 {
        self.group.state.borrow().last_index
    }

    pub fn last_term(&self) -> u64 {
        self.group.state.borrow().last_term
    }

    pub fn log_start_offset(&self) -> i64 {
        self.group.state.borrow().log_start_offset
    }

    /// End of what was staged.
    pub fn log_end_offset(&self) -> i64 {
        self.group.state.borrow().log_end_offset
    }

    /// Entries below this offset are committed: they may leave the WAL for segments.
    pub fn set_high_watermark(&self, offset: i64) {
        let due = {
            let mut state = self.group.state.borrow_mut();
            state.high_watermark = state.high_watermark.max(offset);
            state.unflushed_bytes >= crate::store::RUN_BYTES
        };
        if due {
            self.store.0.queue_flush(&self.group);
        }
    }

    pub fn set_config(&self, config: GroupConfig) {
        *self.group.config.borrow_mut() = config;
    }

    pub fn size_bytes(&self) -> u64 {
        let state = self.group.state.borrow();
        state.segments.iter().map(|s| s.bytes).sum::<u64>() + state.unflushed_bytes as u64
    }

    pub fn producers(&self) -> RefMut<'_, ProducerState> {
        self.group.producers.borrow_mut()
    }

    /// Lane that entries go to now.
    pub fn lane(&self) -> Lane {
        self.group.config.borrow().durability.lane()
    }

    /// Whether an entry of this size would be accepted now.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.store.0.wal(self.lane()).is_ok_and(|wal| wal.has_room(bytes)) && !self.store.0.no_space.get()
    }

    /// The largest batch that fits into the WAL.
    pub fn entry_bytes_max(&self) -> usize {
        self.store.0.wal(self.lane()).map_or(0, |wal| wal.entry_bytes_max())
    }

    /// Hands entries to the WAL, in order, without waiting. They are stored when the lane's durable LSN
    /// reaches the returned one. An entry at a known index replaces it and all after it.
    pub fn stage(&self, hard_state: Option<HardState>, entries: &[Entry]) -> Result<(Lane, Lsn), StageError> {
        if let GroupHealth::Damaged { reason } = &*self.group.health.borrow() {
            return Err(StageError::Damaged(reason.clone()));
        }
        let lane = self.lane();
        let wal = self
            .store
            .0
            .wal(lane)
            .map_err(|e| StageError::Poisoned(crate::error::LogPoisoned(e.to_string())))?;
        if let Some(poison) = self.store.0.poisoned() {
            return Err(StageError::Poisoned(poison));
        }
        let id = self.group.id;
        let mut lsn = wal.last_staged_lsn();
        if let Some(hard_state) = hard_state {
            lsn = wal.stage(&[&wal_format::hard_state_record(id, &hard_state)], false);
            self.group.state.borrow_mut().hard_state = hard_state;
        }
        for entry in entries {
            self.truncate_from(entry.index);
            let mut state = self.group.state.borrow_mut();
            assert!(entry.index == state.last_index + 1 || state.last_index == 0, "the log stays contiguous");
            let (bytes, base_offset, next_offset) = match &entry.payload {
                Payload::Control(bytes) => {
                    let head = wal_format::control_header(id, entry.index, entry.term, bytes.len());
                    lsn = wal.stage(&[&head, bytes], true);
                    (bytes.clone(), state.log_end_offset, state.log_end_offset)
                }
                Payload::Batch(bytes) => {
                    let header = record_batch::parse_header(bytes).expect("the broker stages whole batches");
                    assert_eq!(header.base_offset, state.log_end_offset, "offsets stay contiguous");
                    let head = wal_format::batch_header(id, entry.index, entry.term, bytes.len());
                    lsn = wal.stage(&[&head, bytes], true);
                    self.group.producers.borrow_mut().apply(&header);
                    state.leader_epochs.note(header.leader_epoch, header.base_offset);
                    (bytes.clone(), header.base_offset, header.next_offset())
                }
            };
            state.last_index = entry.index;
            state.last_term = entry.term;
            state.log_end_offset = next_offset;
            state.unflushed_bytes += bytes.len();
            self.store.0.note_appended(&self.group, bytes.len());
            state.tail.push_back(TailEntry {
                index: entry.index,
                term: entry.term,
                base_offset,
                next_offset,
                bytes,
                lane,
                lsn,
            });
        }
        Ok((lane, lsn))
    }

    /// Drops entries from `index` on. Only entries that are not in segments can go: those are committed.
    fn truncate_from(&self, index: u64) {
        let mut state = self.group.state.borrow_mut();
        while state.tail.len() > state.flushed && state.tail.back().is_some_and(|e| e.index >= index) {
            if let Some(gone) = state.tail.pop_back() {
                state.unflushed_bytes -= gone.bytes.len();
                state.log_end_offset = gone.base_offset;
                state.last_index = gone.index - 1;
                state.last_term = state.tail.back().map_or(state.flushed_term, |e| e.term);
            }
        }
    }

    /// Batches from the one that holds `from` on, none ending beyond `upper`, at most `max_bytes` but at
    /// least one. `None`: the tail does not reach back that far.
    pub fn read_cached(&self, from: i64, upper: i64, max_bytes: usize) -> Option<Vec<Bytes>> {
        let state = self.group.state.borrow();
        if state.tail.front().is_none_or(|e| e.base_offset > from) {
            return None;
        }
        let start = state.tail.partition_point(|e| e.next_offset <= from);
        let mut out = Vec::new();
        let mut taken = 0;
        for entry in state.tail.range(start..) {
            if entry.next_offset == entry.base_offset {
                continue;
            }
            if entry.next_offset > upper || (!out.is_empty() && taken + entry.bytes.len() > max_bytes) {
                break;
            }
            taken += entry.bytes.len();
            out.push(entry.bytes.clone());
        }
        Some(out)
    }

    /// The same from segments, and on into the tail where they end.
    pub async fn read(&self, from: i64, upper: i64, max_bytes: usize) -> Result<Vec<Bytes>, ReadError> {
        if let GroupHealth::Damaged { reason } = &*self.group.health.borrow() {
            return Err(ReadError::Damaged(reason.clone()));
        }
        let found = {
            let state = self.group.state.borrow();
            let (start, end) = (state.log_start_offset, state.log_end_offset);
            if from < start || from > end {
                return Err(ReadError::OutOfRange { start, end });
            }
            let at = state.segments.partition_point(|s| s.end_offset <= from);
            state.segments.get(at).map(|s| (s.base_offset, s.position_before(from), s.bytes))
        };
        let Some((base, position, bytes)) = found else {
            return Ok(self.read_cached(from, upper, max_bytes).unwrap_or_default());
        };
        let file = File::open(&segment::log_path(&self.group.dir, base), Mode::default())?;
        let mut want = max_bytes.clamp(READ_BYTES, 8 << 20);
        loop {
            let left = usize::try_from(bytes - position).unwrap_or(usize::MAX);
            let chunk = self.store.0.disk.read_at(&file, position, want.min(left)).await?;
            match cut(&chunk, from, upper, max_bytes) {
                Cut::Some(range) => return Ok(vec![chunk.slice(range)]),
                Cut::Nothing => return Ok(Vec::new()),
                Cut::More(need) if chunk.len() < left && need > want => want = need,
                Cut::More(_) | Cut::Bad => {
                    let reason = format!(
                        "segment {base} of {} has no valid batch for offset {from}",
                        self.group.dir.display()
                    );
                    *self.group.health.borrow_mut() = GroupHealth::Damaged { reason: reason.clone() };
                    tracing::error!(%reason, "the log is damaged; the partition refuses to serve");
                    return Err(ReadError::Damaged(reason));
                }
            }
        }
    }

    /// First record at or after `timestamp` and below `upper`: (its timestamp, its offset).
    pub async fn find_timestamp(&self, timestamp: i64, upper: i64) -> Result<Option<(i64, i64)>, ReadError> {
        let mut offset = {
            let state = self.group.state.borrow();
            match state.segments.iter().find(|s| s.max_timestamp >= timestamp) {
                Some(segment) => {
                    let at = segment.position_before_timestamp(timestamp);
                    let base = segment
                        .index
                        .iter()
                        .find(|e| e.position == at)
                        .map_or(segment.base_offset, |e| e.base_offset);
                    base.max(state.log_start_offset)
                }
                None => state
                    .segments
                    .last()
                    .map_or(state.log_start_offset, |s| s.end_offset.max(state.log_start_offset)),
            }
        };
        let start = self.log_start_offset();
        while offset < upper {
            let batches = match self.read_cached(offset, upper, READ_BYTES) {
                Some(found) => found,
                None => self.read(offset, upper, READ_BYTES).await?,
            };
            if batches.is_empty() {
                break;
            }
            for bytes in batches {
                for batch in record_batch::batches(&bytes) {
                    let (header, batch) = batch.map_err(|e| ReadError::Damaged(e.to_string()))?;
                    offset = header.next_offset();
                    if header.max_timestamp < timestamp || header.is_control() {
                        continue;
                    }
                    let mut scratch = Vec::new();
                    let records = decode_records(batch, &mut scratch, TIME_LOOKUP_BYTES_MAX)
                        .map_err(|e| ReadError::Damaged(e.to_string()))?;
                    for record in records {
                        let record = record.map_err(|e| ReadError::Damaged(e.to_string()))?;
                        if record.timestamp >= timestamp && record.offset >= start {
                            return Ok(Some((record.timestamp, record.offset)));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// Largest timestamp and the first offset that has it.
    pub async fn max_timestamp(&self) -> Result<Option<(i64, i64)>, ReadError> {
        let (max, upper) = {
            let state = self.group.state.borrow();
            let segments = state.segments.iter().map(|s| s.max_timestamp).max().unwrap_or(i64::MIN);
            let tail = state
                .tail
                .iter()
                .filter(|e| e.next_offset > e.base_offset && e.next_offset <= state.high_watermark)
                .filter_map(|e| record_batch::parse_header(&e.bytes).ok())
                .map(|h| h.max_timestamp)
                .max()
                .unwrap_or(i64::MIN);
            (segments.max(tail), state.high_watermark)
        };
        if max == i64::MIN { Ok(None) } else { self.find_timestamp(max, upper).await }
    }

    /// Kafka's OffsetForLeaderEpoch: the largest epoch not above `epoch`, and where it ends.
    pub fn epoch_end_offset(&self, epoch: i32) -> (i32, i64) {
        let state = self.group.state.borrow();
        state.leader_epochs.end_offset(epoch, state.log_end_offset)
    }

    /// The epoch in which the record at `offset` was written.
    pub fn epoch_at(&self, offset: i64) -> i32 {
        self.group.state.borrow().leader_epochs.at(offset)
    }

    /// Records below `offset` may not be read any more; whole segments below it go.
    pub fn advance_log_start(&self, offset: i64) -> Result<(), StageError> {
        let lane = self.lane();
        let wal = self.store.0.wal(lane).map_err(|_| StageError::NoSpace)?;
        let target = {
            let state = self.group.state.borrow();
            offset.min(state.high_watermark)
        };
        if target <= self.log_start_offset() {
            return Ok(());
        }
        wal.stage(&[&wal_format::log_start_record(self.group.id, target)], false);
        self.group.state.borrow_mut().log_start_offset = target;
        self.remove_segments_below(target);
        Ok(())
    }

    /// Applies size and time limits. Nothing at or above `hold_offset` goes. Returns deleted segments.
    pub fn enforce_retention(&self, now_ms: i64, hold_offset: i64) -> usize {
        let config = self.group.config.borrow().clone();
        let target = {
            let state = self.group.state.borrow();
            let mut size: u64 =
                state.segments.iter().map(|s| s.bytes).sum::<u64>() + state.unflushed_bytes as u64;
            let mut target = state.log_start_offset;
            // The active segment stays: it is what new records go to.
            let sealed = state.segments.len().saturating_sub(1);
            for segment in &state.segments[..sealed] {
                let too_big = config.retention_bytes >= 0
                    && size.saturating_sub(segment.bytes)
                        >= u64::try_from(config.retention_bytes).unwrap_or(0);
                let too_old = config.retention_ms >= 0
                    && segment.max_timestamp.saturating_add(config.retention_ms) < now_ms;
                if !(too_big || too_old) || segment.end_offset > hold_offset {
                    break;
                }
                size -= segment.bytes;
                target = segment.end_offset;
            }
            target
        };
        if target <= self.log_start_offset() {
            return 0;
        }
        let before = self.group.state.borrow().segments.len();
        if self.advance_log_start(target).is_err() {
            return 0;
        }
        before - self.group.state.borrow().segments.len()
    }

    fn remove_segments_below(&self, offset: i64) {
        let mut gone = Vec::new();
        {
            let mut state = self.group.state.borrow_mut();
            while state.segments.len() > 1 && state.segments[0].end_offset <= offset {
                gone.push(state.segments.remove(0).base_offset);
            }
            while state.flushed > 0 && state.tail.front().is_some_and(|e| e.next_offset <= offset) {
                state.tail.pop_front();
                state.flushed -= 1;
            }
        }
        self.store.0.remove_segments(&self.group, gone);
    }
}

enum Cut {
    Some(std::ops::Range<usize>),
    /// The batch with the offset needs this many bytes from the start of the chunk.
    More(usize),
    Nothing,
    Bad,
}

/// Finds the batches to return in a chunk that starts at a batch. Checksums are verified: what comes from
/// the disk may have rotted there.
fn cut(chunk: &[u8], from: i64, upper: i64, max_bytes: usize) -> Cut {
    let mut at = 0;
    let mut start = None;
    let mut end = 0;
    let mut next = from;
    loop {
        let rest = &chunk[at..];
        if rest.len() < HEADER_BYTES {
            break;
        }
        let Ok(header) = record_batch::parse_header(rest) else { return Cut::Bad };
        let total = header.total_bytes();
        if header.last_offset() < from {
            at += total;
            if at > chunk.len() {
                return Cut::More(at + READ_BYTES);
            }
            continue;
        }
        // Offsets are dense: a batch that does not start where it must has a rotten header.
        let follows = if at == end && start.is_some() {
            header.base_offset == next
        } else {
            header.base_offset <= from
        };
        if !follows {
            if start.is_none() {
                return Cut::Bad;
            }
            break;
        }
        if header.next_offset() > upper {
            break;
        }
        if rest.len() < total {
            if start.is_none() {
                return Cut::More(at + total);
            }
            break;
        }
        if start.is_some() && at + total - start.unwrap_or(0) > max_bytes {
            break;
        }
        if !record_batch::crc_ok(&rest[..total]) {
            if start.is_none() {
                return Cut::Bad;
            }
            break;
        }
        start.get_or_insert(at);
        next = header.next_offset();
        at += total;
        end = at;
    }
    match start {
        Some(start) => Cut::Some(start..end),
        None if at + HEADER_BYTES > chunk.len() => Cut::More(at + READ_BYTES),
        None => Cut::Nothing,
    }
}
