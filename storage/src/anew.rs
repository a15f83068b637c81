//! A log that begins anew: a replica that was away for longer than others keep their logs gets the place where theirs begin,
//! and nothing before it.
//!
//! One record says all of it, so it happened or it did not. What lay in segments before goes once that record is safe, and
//! before anything is written to a segment again (`finish_cut` in `flush.rs`); a recovery in between finds by the record that
//! none of those files counts. See FORMAT.md.

use std::rc::Rc;

use bytes::Bytes;

use crate::codec::Cursor;
use crate::group::{GroupLog, MEMBERSHIP_BYTES_MAX};
use crate::group_state::GroupState;
use crate::leader_epochs::LeaderEpochs;
use crate::marks::{Before, Marks};
use crate::producer_state::ProducerState;
use crate::ring::Class;
use crate::tail::Tail;
use crate::types::{Beginning, Lane, Lsn, StageError};
use crate::wal_format::{BEGINNING, RecordHeader};

/// Length of the state u32, state, producer snapshot.
fn encode(state: &GroupState, producers: &[u8]) -> Vec<u8> {
    let state = state.encode();
    let mut out = Vec::with_capacity(4 + state.len() + producers.len());
    out.extend_from_slice(&(state.len() as u32).to_le_bytes());
    out.extend_from_slice(&state);
    out.extend_from_slice(producers);
    out
}

/// The state, and where in the payload the producers begin.
pub(crate) fn decode(payload: &[u8]) -> Option<(GroupState, usize)> {
    let mut cursor = Cursor::new(payload);
    let length = usize::try_from(cursor.u32()?).ok()?;
    let state = GroupState::decode(cursor.take(length)?)?;
    Some((state, 4 + length))
}

impl GroupLog {
    /// What a replica needs to know of producers that begins at `offset`: those batches of theirs that it will not see.
    pub fn producers_at(&self, offset: i64) -> Bytes {
        let mut producers = self.group.producers.borrow().clone();
        producers.truncate(offset);
        producers.encode(offset, -1).into()
    }

    /// The log begins with this, in place of everything that it had. All or nothing, as `stage`.
    pub fn begin_anew(&self, beginning: &Beginning) -> Result<(Lane, Lsn), StageError> {
        let shard = &self.shard;
        self.check_open()?;
        let Beginning { hard_state, index, term, offset, membership, .. } = beginning;
        let (hard_state, index, term, offset) = (*hard_state, *index, *term, *offset);
        let gap = |reason| StageError::Gap { index, reason };
        if index == 0 || offset < 0 || membership.1.len() > MEMBERSHIP_BYTES_MAX {
            return Err(gap("it is no place where a log can begin"));
        }
        let mut inner = self.group.inner.borrow_mut();
        let inner = &mut *inner;
        if index <= inner.committed_index {
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
        let snapshot = producers.encode(offset, -1);
        let membership = (membership.0, Bytes::copy_from_slice(&membership.1));
        let before = Before { index, term, offset };
        let lane = self.next_lane(inner);
        let state = GroupState {
            os: lane == Lane::Os,
            hard_state,
            flushed_index: index,
            flushed_term: term,
            flushed_end: offset,
            log_start: offset,
            committed_index: index,
            membership: Some(membership.clone()),
            marks: Marks::beginning(before),
            ..GroupState::new(self.group.id, &self.group.dir_name)
        };
        let payload = encode(&state, &snapshot);
        let limit = shard.wal(lane).largest_record();
        if payload.len() > limit {
            return Err(StageError::TooLarge { bytes: payload.len(), limit });
        }
        if !shard.wal(lane).fits_all(payload.len(), payload.len(), 1) {
            shard.wake_flusher();
            return Err(StageError::NoSpace);
        }
        let wal = self.enter_lane(inner, lane);
        let record = RecordHeader { kind: BEGINNING, group: self.group.id, index, term, offset };
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
        inner.epochs = LeaderEpochs::default();
        (inner.last_index, inner.flushed_index, inner.committed_index) = (index, index, index);
        (inner.last_term, inner.flushed_term) = (term, term);
        (inner.log_start, inner.log_end, inner.flushed_end, inner.high_watermark) =
            (offset, offset, offset, offset);
        (inner.counted_base, inner.clean_offset, inner.bytes_since_snapshot) = (0, Some(0), 0);
        inner.snapshot_offset = -1;
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

    #[test]
    fn a_record_has_both() {
        let state = GroupState::new(7, "t-0.g7");
        let payload = encode(&state, b"producers");
        let (found, at) = decode(&payload).unwrap();
        assert_eq!((found, &payload[at..]), (state, &b"producers"[..]));
        assert!((0..at).all(|end| decode(&payload[..end]).is_none()));
    }
}
