//! What one partition's WAL records add to its last known state. Pure: records come in, in order; the entries that must
//! go to its segments, and where these are to be cut first, go out.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::flush::is_one_batch;
use crate::group_state::GroupState;
use crate::mutant::{self, Mutant};
use crate::segment_name::SegmentName;
use crate::types::HardState;

/// Where a record stands: commit, and number of the record in it.
pub type Position = (u64, u32);

#[derive(Debug, Clone)]
pub enum Action {
    State(Box<GroupState>),
    /// With the membership, where one came with it.
    Hard(HardState, Option<(u64, Bytes)>),
    /// The log begins with this state, these producers, and, where some were received, these segments and their lengths;
    /// nothing before it counts.
    Beginning(Box<GroupState>, Bytes, Option<Vec<(SegmentName, u64)>>),
    /// With the index of the last entry that went with its segment, and the offset after it.
    LogStart(i64, Option<(u64, i64)>),
    Entry {
        index: u64,
        term: u64,
        offset: i64,
        is_batch: bool,
        payload: Bytes,
    },
    /// A producer snapshot; what it is worth is for its reader to find out.
    Producers(Bytes),
    Delete,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub index: u64,
    pub term: u64,
    pub offset: i64,
    pub next_offset: i64,
    pub is_batch: bool,
    pub payload: Bytes,
}

#[derive(Debug)]
pub struct Replayed {
    /// Hard state, log start and epochs as of the end; flushed as the segments have it after the cut.
    pub state: GroupState,
    /// Not in segments; continue at `state.flushed_index`.
    pub entries: Vec<LogEntry>,
    /// The newest producer snapshot.
    pub producers: Option<Bytes>,
    /// The log began anew at this offset, with these.
    pub began: Option<(i64, Bytes)>,
    /// All that is in the directory are these segments, perhaps under their first names: nothing has been done since.
    pub received: Option<Vec<(SegmentName, u64)>>,
    /// Segments are to be cut at this offset before anything is added.
    pub cut: Option<i64>,
    pub deleted: bool,
}

/// `base`: from `group.meta`, with the position up to which it contains this WAL.
pub fn replay(
    base: Option<(GroupState, Position)>,
    records: &[(Position, Action)],
) -> Result<Option<Replayed>, String> {
    let mut newest = base;
    for (position, action) in records {
        if let Action::State(state) | Action::Beginning(state, ..) = action
            && newest.as_ref().is_none_or(|(_, at)| position > at)
        {
            newest = Some(((**state).clone(), *position));
        }
    }
    let begins_at = beginning(newest.as_ref().map(|(state, _)| &*state), records);
    let deleted = records.iter().any(|(_, action)| matches!(action, Action::Delete));
    let Some((mut state, base_at)) = newest else {
        if deleted || records.is_empty() {
            return Ok(None);
        }
        return Err(
            "the WAL has records of it, but neither group.meta nor the WAL says what it is".to_owned()
        );
    };
    if deleted {
        // From its deletion on nobody keeps its records together.
        return Ok(Some(Replayed {
            state,
            entries: Vec::new(),
            producers: None,
            began: None,
            received: None,
            cut: None,
            deleted,
        }));
    }
    let mut entries: VecDeque<LogEntry> = VecDeque::new();
    let mut cut = None;
    let mut producers = None;
    let mut began = None;
    let mut received = None;
    let mut begins_after: Option<(u64, i64)> = None;
    // The last entry that came before the ones it follows, and its term. Those were in a file that is gone, and all that
    // was not in segments by then is written again further on, unless it was replaced before.
    let mut ahead: Option<(u64, u64)> = None;
    for (position, action) in records.iter().filter(|(position, _)| *position >= begins_at) {
        match action {
            Action::State(_) | Action::Delete => {}
            Action::Beginning(state, snapshot, segments) => {
                received = segments.clone().filter(|_| *position == base_at);
                producers = Some(snapshot.clone());
                began = Some((state.flushed_end, snapshot.clone()));
            }
            Action::Producers(snapshot) => producers = Some(snapshot.clone()),
            Action::LogStart(..) if mutant::is(Mutant::ForgetsLogStart) => {}
            Action::Hard(hard, membership) => {
                if *position > base_at {
                    state.hard_state = *hard;
                    state.membership = membership.clone().or(state.membership.take());
                }
            }
            Action::LogStart(offset, gone) => {
                state.log_start = state.log_start.max(*offset);
                begins_after = begins_after.max(*gone);
            }
            Action::Entry { index, term, offset, is_batch, payload } => {
                let (index, term, offset) = (*index, *term, *offset);
                ahead = ahead.filter(|(at, of)| index > *at || term <= *of);
                // Replaced before the state was written: terms never fall along a log, so an entry of an older term than
                // the last one in segments cannot stand behind it.
                if *position <= base_at && (index <= state.flushed_index || term < state.flushed_term) {
                    continue;
                }
                if index <= state.flushed_index {
                    // An entry in a segment was replaced after the state was written.
                    if index == 0 || offset > state.flushed_end {
                        return Err(format!(
                            "entry {index} at offset {offset} does not fit the log before it"
                        ));
                    }
                    entries.clear();
                    state.flushed_index = index - 1;
                    state.flushed_end = offset;
                    state.marks.truncate(index, offset);
                    let epoch = state.epochs.epoch_before(offset).unwrap_or(0);
                    state.flushed_term =
                        state.marks.term_at(index - 1).filter(|term| *term > 0).unwrap_or(epoch);
                    state.epochs.truncate_end(offset);
                    cut = Some(cut.map_or(offset, |at: i64| at.min(offset)));
                }
                let same = entries
                    .front()
                    .and_then(|first| entries.get(usize::try_from(index.checked_sub(first.index)?).ok()?));
                if let Some(same) = same {
                    // Written again to free a file, not replaced: what follows it stays.
                    if same.term == term {
                        continue;
                    }
                    while entries.back().is_some_and(|last| last.index >= index) {
                        entries.pop_back();
                    }
                }
                let (last_index, end) = entries
                    .back()
                    .map_or((state.flushed_index, state.flushed_end), |e| (e.index, e.next_offset));
                if index != last_index + 1 || offset != end {
                    let known = ahead.filter(|(_, of)| *of == term).map_or(0, |(at, _)| at);
                    ahead = Some((index.max(known), term));
                    continue;
                }
                let mut next_offset = end;
                if *is_batch {
                    let header = is_one_batch(payload)
                        .filter(|header| header.base_offset == end)
                        .ok_or_else(|| format!("entry {index} is not the record batch for offset {end}"))?;
                    next_offset = header.next_offset();
                }
                let payload = payload.clone();
                entries.push_back(LogEntry {
                    index,
                    term,
                    offset,
                    next_offset,
                    is_batch: *is_batch,
                    payload,
                });
            }
        }
    }
    let (last_index, end) =
        entries.back().map_or((state.flushed_index, state.flushed_end), |e| (e.index, e.next_offset));
    // What the kernel alone had may be gone with the machine's power, and with it what replaced the entries in between.
    if let Some((ahead, _)) = ahead.filter(|(at, _)| *at > last_index && !state.os) {
        return Err(match ahead - last_index {
            1 => format!("entry {ahead} is not the one for offset {end}, where the log ends"),
            _ => format!("entries {} to {} are missing", last_index + 1, ahead - 1),
        });
    }
    for entry in entries.iter().filter(|entry| entry.is_batch && !mutant::is(Mutant::ForgetsEpochs)) {
        if let Some(header) = is_one_batch(&entry.payload) {
            // Entries that were replaced may have left their epoch; offsets decide.
            state.epochs.truncate_end(entry.offset);
            state.epochs.assign(header.leader_epoch, header.base_offset);
        }
    }
    for entry in &entries {
        let control = (!entry.is_batch).then_some(&entry.payload);
        state.marks.note(entry.index, entry.term, entry.offset, control, state.flushed_index);
    }
    if let Some((index, offset)) = begins_after.filter(|(_, offset)| *offset <= state.log_start) {
        state.marks.raise(index, offset);
    }
    Ok(Some(Replayed { state, entries: entries.into(), producers, began, received, cut, deleted }))
}

/// Where the log began anew last: what stands before that does not count. A state that was written since says so too, as the
/// record itself may have been in a file that is gone while older ones of the other lane are still there.
fn beginning(newest: Option<&GroupState>, records: &[(Position, Action)]) -> Position {
    let recorded = records.iter().filter_map(|(position, action)| match action {
        Action::Beginning(..) => Some(*position),
        Action::State(state) => Some((state.anew_lsn, 0)),
        _ => None,
    });
    if mutant::is(Mutant::ForgetsBeginning) {
        return (0, 0);
    }
    recorded.chain(newest.map(|state| (state.anew_lsn, 0))).max().unwrap_or((0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flumen_protocol::record::BatchBuilder;
    use flumen_protocol::record_batch::set_base_offset;

    fn entry(index: u64, term: u64, offset: i64, records: i64) -> Action {
        let payload = if records == 0 {
            Bytes::new()
        } else {
            let mut builder = BatchBuilder::new();
            builder.leader_epoch(term as i32);
            for _ in 0..records {
                builder.append(1, None, Some(b"v"), &[]);
            }
            let mut batch = builder.build(offset);
            set_base_offset(&mut batch, offset);
            batch.freeze()
        };
        Action::Entry { index, term, offset, is_batch: records > 0, payload }
    }

    fn at(actions: Vec<Action>) -> Vec<(Position, Action)> {
        actions.into_iter().enumerate().map(|(k, action)| ((k as u64 + 1, 0), action)).collect()
    }

    fn fresh() -> Action {
        Action::State(Box::new(GroupState::new(5, "t-0")))
    }

    fn indexes(replayed: &Replayed) -> Vec<(u64, u64)> {
        replayed.entries.iter().map(|entry| (entry.index, entry.term)).collect()
    }

    #[test]
    fn entries_replace_and_repeat() {
        let records = at(vec![
            fresh(),
            entry(1, 1, 0, 0),
            entry(2, 1, 0, 3),
            entry(3, 1, 3, 2),
            Action::Hard(HardState { term: 2, vote: 1, commit: 2 }, None),
            entry(3, 2, 3, 1),
            entry(4, 2, 4, 1),
            // Written again; cut short before 4.
            entry(3, 2, 3, 1),
            Action::LogStart(2, None),
        ]);
        let out = replay(None, &records).unwrap().unwrap();
        assert_eq!(indexes(&out), [(1, 1), (2, 1), (3, 2), (4, 2)]);
        assert_eq!((out.state.hard_state.commit, out.state.log_start, out.cut), (2, 2, None));
        assert_eq!(out.state.epochs.entries(), [(1, 0), (2, 3)]);
    }

    #[test]
    fn a_newer_state_wins_and_a_cut_is_seen() {
        let mut state = GroupState::new(5, "t-0");
        (state.flushed_index, state.flushed_end, state.active_base, state.active_bytes) = (3, 5, 0, 500);
        state.hard_state.term = 9;
        let records = at(vec![
            fresh(),
            entry(2, 1, 0, 3),
            entry(3, 1, 3, 2),
            Action::Hard(HardState { term: 1, vote: 1, commit: 2 }, None),
            Action::State(Box::new(state.clone())),
            entry(4, 1, 5, 1),
        ]);
        let out = replay(None, &records).unwrap().unwrap();
        assert_eq!((indexes(&out), out.state.hard_state.term, out.cut), (vec![(4, 1)], 9, None));
        let mut more = records.clone();
        more.push(((9, 0), entry(3, 2, 3, 1)));
        let out = replay(None, &more).unwrap().unwrap();
        assert_eq!((indexes(&out), out.cut, out.state.flushed_end), (vec![(3, 2)], Some(3), 3));
        // The meta file contains everything: nothing is left to do.
        let out = replay(Some((state.clone(), (u64::MAX, 0))), &records[..4]).unwrap().unwrap();
        assert!(out.entries.is_empty());
        let mut deleted = records;
        deleted.push(((9, 0), Action::Delete));
        assert!(replay(Some((state, (0, 0))), &deleted).unwrap().unwrap().deleted);
    }

    #[test]
    fn entries_written_again_fill_the_hole_that_their_file_left() {
        let mut state = GroupState::new(5, "t-0");
        (state.flushed_index, state.flushed_end) = (3, 3);
        // The file with entry 4 is gone; 5 and 6 stand in the next one, before 4, 5 and 6 again.
        let records = at(vec![
            entry(5, 1, 4, 1),
            entry(6, 1, 5, 1),
            entry(4, 1, 3, 1),
            entry(5, 1, 4, 1),
            entry(6, 1, 5, 1),
            Action::State(Box::new(state)),
            entry(7, 1, 6, 1),
        ]);
        let out = replay(None, &records).unwrap().unwrap();
        assert_eq!(indexes(&out), [(4, 1), (5, 1), (6, 1), (7, 1)]);
        // Nothing filled it.
        let mut torn = records.clone();
        torn.remove(2);
        assert!(replay(None, &torn).unwrap_err().contains("entries 4 to"));
        // What stood beyond it was replaced since: 5 in term 2, and no 6.
        let mut replaced = records[..2].to_vec();
        for (lsn, action) in [(3, entry(5, 2, 4, 1)), (4, entry(4, 1, 3, 1)), (5, entry(5, 2, 4, 1))] {
            replaced.push(((lsn, 0), action));
        }
        replaced.push(records[5].clone());
        let out = replay(None, &replaced).unwrap().unwrap();
        assert_eq!(indexes(&out), [(4, 1), (5, 2)]);
        // What it follows was replaced, and that stood in a file that is gone: 5 in term 2, at another offset.
        let mut replaced =
            at(vec![entry(4, 1, 3, 1), entry(5, 1, 4, 1), entry(5, 2, 6, 1), entry(6, 2, 7, 1)]);
        for (lsn, action) in [(6, entry(4, 2, 3, 3)), (7, entry(5, 2, 6, 1)), (8, entry(6, 2, 7, 1))] {
            replaced.push(((lsn, 0), action));
        }
        replaced.push(((9, 0), records[5].1.clone()));
        assert_eq!(indexes(&replay(None, &replaced).unwrap().unwrap()), [(4, 2), (5, 2), (6, 2)]);
        // Replaced before it was written again: 4 in term 2, and neither 5 nor 6.
        let mut shorter = records[..2].to_vec();
        shorter.push(((3, 0), entry(4, 2, 3, 1)));
        shorter.push(records[5].clone());
        assert_eq!(indexes(&replay(None, &shorter).unwrap().unwrap()), [(4, 2)]);
    }

    /// The replacement of 4 and 5 was in the os lane and is gone with the machine's power; the file with 4 and 5 has retired.
    #[test]
    fn a_hole_that_the_kernel_left_is_where_the_log_ends() {
        let mut state = GroupState::new(5, "t-0");
        (state.flushed_index, state.flushed_end, state.os) = (3, 3, true);
        let records = at(vec![entry(6, 1, 5, 1), Action::State(Box::new(state))]);
        let out = replay(None, &records).unwrap().unwrap();
        assert!(out.entries.is_empty() && out.state.flushed_end == 3);
    }

    #[test]
    fn holes_are_errors() {
        assert!(replay(None, &at(vec![fresh(), entry(2, 1, 0, 1)])).unwrap_err().contains("missing"));
        assert!(replay(None, &at(vec![fresh(), entry(1, 1, 7, 1)])).unwrap_err().contains("offset"));
        assert!(replay(None, &at(vec![entry(1, 1, 0, 1)])).is_err());
        assert!(replay(None, &[]).unwrap().is_none());
    }
}
