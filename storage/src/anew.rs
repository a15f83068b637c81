//! A log that begins anew: a replica that was away for longer than others keep their logs gets the place where theirs begin,
//! and nothing before it. Where others have records before that place and cannot send them as entries, it begins with what it
//! has received of them (`receive.rs`). One whose committed entries the others lost begins at nothing, with index and offset 0:
//! the only case in which what is committed goes, and log start, end and high watermark go back.
//!
//! One record says all of it, so it happened or it did not. What lay in segments before goes once that record is safe, and
//! before anything is written to a segment again (`finish_cut` in `flush.rs`); a recovery in between finds by the record that
//! none of those files counts. See FORMAT.md.

use std::rc::Rc;

use bytes::Bytes;

use crate::codec::Cursor;
use crate::group::{GroupLog, MEMBERSHIP_BYTES_MAX, Segment};
use crate::group_state::GroupState;
use crate::leader_epochs::LeaderEpochs;
use crate::marks::{Before, Marks};
use crate::producer_state::ProducerState;
use crate::receive::{self, Received};
use crate::ring::Class;
use crate::segment_name::SegmentName;
use crate::tail::Tail;
use crate::types::{Beginning, Lane, Lsn, StageError};
use crate::wal_format::{BEGINNING, BEGINNING_WITH, RecordHeader};

/// Length of the state u32, state, names of segments where there are some, producer snapshot.
fn encode(state: &GroupState, segments: Option<&[Segment]>, producers: &[u8]) -> Vec<u8> {
    let state = state.encode();
    let mut out = Vec::with_capacity(4 + state.len() + producers.len());
    out.extend_from_slice(&(state.len() as u32).to_le_bytes());
    out.extend_from_slice(&state);
    if let Some(segments) = segments {
        receive::encode_names(segments, &mut out);
    }
    out.extend_from_slice(producers);
    out
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    pub state: GroupState,
    /// Of which the log consists, with their lengths.
    pub segments: Option<Vec<(SegmentName, u64)>>,
    /// Where in the payload the producers begin.
    pub producers_at: usize,
}

pub(crate) fn decode(payload: &[u8], kind: u8) -> Option<Begun> {
    let mut cursor = Cursor::new(payload);
    let length = usize::try_from(cursor.u32()?).ok()?;
    let state = GroupState::decode(cursor.take(length)?)?;
    let segments = match kind {
        BEGINNING_WITH => Some(receive::decode_names(&mut cursor)?),
        _ => None,
    };
    Some(Begun { state, segments, producers_at: payload.len() - cursor.left() })
}

impl GroupLog {
    /// What a replica needs to know of producers that begins at `offset`: those batches of theirs that it will not see.
    pub fn producers_at(&self, offset: i64) -> Bytes {
        let mut producers = self.group.producers.borrow().clone();
        producers.truncate(offset);
        producers.encode(offset, -1).into()
    }

    /// The log begins with this, in place of everything that it had. All or nothing, as `stage`. With index, term and offset 0
    /// also in place of what is committed.
    pub fn begin_anew(&self, beginning: &Beginning) -> Result<(Lane, Lsn), StageError> {
        self.begin(beginning, None)
    }

    /// As `begin_anew`; what lies below its offset is what was received.
    pub fn begin_with(&self, beginning: &Beginning, received: Received) -> Result<(Lane, Lsn), StageError> {
        self.begin(beginning, Some(received))
    }

    fn begin(&self, beginning: &Beginning, received: Option<Received>) -> Result<(Lane, Lsn), StageError> {
        let shard = &self.shard;
        self.check_open()?;
        let Beginning { hard_state, index, term, offset, membership, .. } = beginning;
        let (hard_state, index, term, offset) = (*hard_state, *index, *term, *offset);
        let gap = |reason| StageError::Gap { index, reason };
        if received.as_ref().is_some_and(|received| !received.is_for(&self.group, offset)) {
            return Err(gap("what was received belongs to another log, or does not reach to it"));
        }
        if self.is_beginning() {
            return Err(gap("what it began with has not got its place yet"));
        }
        // At nothing: what was committed here, others have not.
        let over = (index, term, offset) == (0, 0, 0) && received.is_none();
        if (index == 0 && !over) || offset < 0 || membership.1.len() > MEMBERSHIP_BYTES_MAX {
            return Err(gap("it is no place where a log can begin"));
        }
        let mut inner = self.group.inner.borrow_mut();
        let inner = &mut *inner;
        if index <= inner.committed_index && !over {
            return Err(gap("what is committed here reaches as far"));
        }
        if inner.direct_pending {
            return Err(gap("what it replaces is on its way to a segment"));
        }
        let (producers, at, _) =
            ProducerState::decode(&beginning.producers).map_err(|_| gap("its producers cannot be read"))?;
        if at != offset {
            return Err(gap("its producers are of another offset"));
        }
        let (mut log_start, mut segments, mut epochs) = (offset, Vec::new(), LeaderEpochs::default());
        let with = received.is_some();
        if let Some(received) = received {
            // It never goes back.
            log_start = received.log_start.max(inner.log_start).min(offset);
            (segments, epochs) = (received.segments, received.epochs);
            epochs.truncate_start(log_start);
        }
        let snapshot = producers.encode(offset, epochs.epoch_at(offset - 1));
        let membership = (membership.0, Bytes::copy_from_slice(&membership.1));
        let before = Before { index, term, offset };
        let lane = self.next_lane(inner);
        let state = GroupState {
            os: lane == Lane::Os,
            hard_state,
            flushed_index: index,
            flushed_term: term,
            flushed_end: offset,
            active_base: segments.last().map_or(-1, |segment| segment.base),
            active_bytes: segments.last().map_or(0, |segment| segment.bytes),
            log_start,
            epochs: epochs.clone(),
            committed_index: index,
            membership: Some(membership.clone()),
            marks: Marks::beginning(before),
            ..GroupState::new(self.group.id, self.group.dir_name())
        };
        let payload = encode(&state, with.then_some(&segments[..]), &snapshot);
        let limit = shard.wal(lane).largest_record();
        if payload.len() > limit {
            return Err(StageError::TooLarge { bytes: payload.len(), limit });
        }
        if !shard.wal(lane).fits_all(payload.len(), payload.len(), 1) {
            shard.wake_flusher();
            return Err(StageError::NoSpace);
        }
        let wal = self.enter_lane(inner, lane);
        let record = RecordHeader {
            kind: if with { BEGINNING_WITH } else { BEGINNING },
            group: self.group.id,
            index,
            term,
            offset,
        };
        let placed = wal.append(&shard.next_lsn, &record, &payload, Class::Stage);
        let (lsn, file_seq) = placed.expect("there was room for it");
        inner.touch(self.group.id, wal, file_seq);

        let cached: u64 = inner.tail.iter().map(|entry| entry.bytes.len() as u64).sum();
        let unflushed = inner.tail.unflushed_bytes();
        shard.cache_bytes.set(shard.cache_bytes.get().saturating_sub(cached));
        shard.unflushed_bytes.set(shard.unflushed_bytes.get().saturating_sub(unflushed));
        inner.tail = Tail::default();
        for segment in std::mem::take(&mut inner.segments) {
            shard.forget_file(self.group.id, segment.base);
            inner.cut_files.push(segment.name());
        }
        // From here on their files are found under the names that they have.
        *self.group.unplaced.borrow_mut() = segments.iter().map(Segment::name).collect();
        inner.segments = segments.into();
        shard.read_ahead.borrow_mut().retain(|ahead| ahead.group != self.group.id);
        inner.dirty.clear();
        inner.cuts += 1;
        inner.begun += 1;
        inner.begun_with = Some((offset, snapshot));
        inner.cut_by = Some((lane, lsn));
        inner.anew_lsn = lsn;
        inner.last_lsn = lsn;
        inner.log_start_by = (lane, lsn);
        inner.hard_state = hard_state;
        inner.membership = Some(membership);
        inner.marks = Marks::beginning(before);
        inner.epochs = epochs;
        (inner.last_index, inner.flushed_index, inner.committed_index) = (index, index, index);
        (inner.last_term, inner.flushed_term) = (term, term);
        (inner.log_start, inner.log_end, inner.flushed_end, inner.high_watermark) =
            (log_start, offset, offset, offset);
        (inner.counted_base, inner.clean_offset, inner.bytes_since_snapshot) = (0, Some(0), 0);
        (inner.snapshot_offset, inner.snapshot_safe) = (-1, -1);
        inner.producers_whole = true;
        inner.meta_dirty = true;
        *self.group.producers.borrow_mut() = producers;
        wal.wake_writer();
        // What was there goes soon, not with the next run.
        shard.queue_flush(&self.group);
        Ok((lane, lsn))
    }
}

/// Whether the log that a run was made for is still there.
pub(crate) fn is_of_this_log(group: &Rc<crate::group::Group>, begun: u64) -> bool {
    group.inner.borrow().begun == begun
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment_name::Compacted;

    #[test]
    fn a_record_has_all_of_it() {
        let state = GroupState::new(7, "t-0.g7");
        let compacted = Compacted { end: 90, generation: 3, crc: 77 };
        let name = SegmentName { base: 5, compacted: Some(compacted) };
        for (kind, segments) in [(BEGINNING, None), (BEGINNING_WITH, Some([Segment::of(name, 1234)]))] {
            let payload = encode(&state, segments.as_ref().map(|segments| &segments[..]), b"producers");
            let begun = decode(&payload, kind).unwrap();
            assert_eq!((&begun.state, &payload[begun.producers_at..]), (&state, &b"producers"[..]));
            assert_eq!(begun.segments, segments.map(|_| vec![(name, 1234)]));
            assert!((0..begun.producers_at).all(|end| decode(&payload[..end], kind).is_none()));
        }
    }
}
