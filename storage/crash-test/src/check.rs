//! Comparing what recovery found, and what readers get, with the model.

use std::collections::BTreeMap;

use bytes::Bytes;
use flumen_io::simulated::Machine;
use flumen_protocol::record::{self, RecordError};
use flumen_protocol::record_batch;
use flumen_storage::{GroupLog, Payload, ReadError, RecoveredGroup};

use crate::model::{Entry, Log, Partition};

/// Where in a batch the fields end that Kafka's checksum does not cover: base offset, length, leader epoch, magic, and
/// the checksum itself.
const UNCHECKED_BYTES: usize = 21;

/// No batch of the workload unfolds to more.
const RECORDS_BYTES_MAX: usize = 1 << 20;

#[derive(Debug)]
pub enum Mismatch {
    /// A reader sees that something is wrong with it; that is what damage may do.
    Noticeable(String),
    Wrong(String),
}

/// `found` must be the batches from the one with `from` on, in order and byte by byte, none above `upper`.
pub fn same_batches(state: &Log, from: i64, upper: i64, found: &[Bytes]) -> Result<i64, Mismatch> {
    let mut at = from;
    if from < upper && found.iter().all(Bytes::is_empty) {
        return Err(Mismatch::Wrong(format!("nothing at {from} below {upper}")));
    }
    for piece in found {
        for batch in record_batch::batches(piece) {
            let (header, bytes) =
                batch.map_err(|error| Mismatch::Wrong(format!("no batch at {at}: {error}")))?;
            let Some(want) = state.batch_at(at) else {
                return Err(Mismatch::Wrong(format!("a batch at {at}, where the log ends")));
            };
            let want_bytes = want.batch.as_deref().unwrap_or_default();
            if bytes != want_bytes {
                if !record_batch::crc_ok(bytes) {
                    return Err(Mismatch::Noticeable(format!("the batch at {at} fails its checksum")));
                }
                let checked = |bytes: &[u8]| bytes.get(UNCHECKED_BYTES..).map(<[u8]>::to_vec);
                if checked(bytes) == checked(want_bytes) && header.base_offset == want.base {
                    return Err(Mismatch::Noticeable(format!("the batch at {at} has another leader epoch")));
                }
                // Where offsets may be missing, nothing but the checksum of the whole file tells that this one is wrong.
                let same =
                    |below: &Entry| checked(below.batch.as_deref().unwrap_or_default()) == checked(bytes);
                if state.below.iter().any(same) {
                    return Err(Mismatch::Noticeable(format!("the batch at {at} has another offset")));
                }
                return Err(Mismatch::Wrong(format!(
                    "another batch at {at}: found {}, wanted {}",
                    describe(bytes),
                    describe(want_bytes)
                )));
            }
            at = want.next;
            if at > upper {
                return Err(Mismatch::Wrong(format!("a batch up to {at} above {upper}")));
            }
        }
    }
    Ok(at)
}

/// As `same_batches` where `bound` is `None`. Below it, compaction may have taken out what has a newer record of its key
/// below it too, and tombstones; `still`: nobody compacts meanwhile, so a tombstone went with everything older of its key.
pub fn same_records(
    state: &Log,
    bound: Option<i64>,
    (from, upper): (i64, i64),
    found: &[Bytes],
    still: bool,
) -> Result<i64, Mismatch> {
    let Some(bound) = bound else { return same_batches(state, from, upper, found) };
    let wrong = |what: String| Err(Mismatch::Wrong(what));
    let mut records = BTreeMap::new();
    let mut at = from;
    for piece in found {
        for batch in record_batch::batches(piece) {
            let (header, bytes) =
                batch.map_err(|error| Mismatch::Wrong(format!("no batch at {at}: {error}")))?;
            let Some(want) =
                state.batch_at(header.base_offset).filter(|want| want.base == header.base_offset)
            else {
                return wrong(format!("a batch at {}, where none was", header.base_offset));
            };
            if header.next_offset() <= at || header.next_offset() > upper {
                return wrong(format!(
                    "a batch at {} to {} between {at} and {upper}",
                    want.base,
                    header.next_offset()
                ));
            }
            let original = want.batch.as_deref().unwrap_or_default();
            if bytes != original {
                if want.next > bound {
                    // Nothing took anything out of it.
                    same_batches(state, want.base, want.next, &[Bytes::copy_from_slice(bytes)])?;
                }
                if !record_batch::crc_ok(bytes) {
                    return Err(Mismatch::Noticeable(format!(
                        "the batch at {} fails its checksum",
                        want.base
                    )));
                }
            }
            let original_records = decoded(original)?;
            for (offset, record) in decoded(bytes)? {
                if original_records.get(&offset) != Some(&record) {
                    return wrong(format!("another record at {offset}"));
                }
                records.insert(offset, record);
            }
            let identity = |bytes: &[u8]| {
                let header = record_batch::parse_header(bytes).ok();
                header.map(|h| (h.next_offset(), h.producer_id, h.producer_epoch, h.last_sequence()))
            };
            if identity(bytes) != identity(original) {
                return wrong(format!("{} was {}", describe(bytes), describe(original)));
            }
            let epoch = |bytes: &[u8]| record_batch::parse_header(bytes).ok().map(|h| h.leader_epoch);
            if epoch(bytes) != epoch(original) {
                // No checksum of Kafka's covers it.
                let what = format!("{} was {}", describe(bytes), describe(original));
                return Err(Mismatch::Noticeable(what));
            }
            at = header.next_offset();
        }
    }
    let reached = if records.is_empty() && at == from { upper } else { at };
    let wanted = from.max(state.log_start)..reached;
    let mut newest: Option<BTreeMap<Vec<u8>, i64>> = None;
    for entry in state.batches().filter(|entry| entry.next > wanted.start && entry.base < wanted.end) {
        for (offset, (key, value)) in decoded(entry.batch.as_deref().unwrap_or_default())? {
            if !wanted.contains(&offset) || records.contains_key(&offset) {
                continue;
            }
            if newest.is_none() {
                newest = Some(newest_below(state, bound)?);
            }
            let superseded =
                newest.as_ref().is_some_and(|newest| newest.get(&key).is_some_and(|at| *at > offset));
            let tombstone = value.is_none();
            if offset >= bound || !(superseded || tombstone) {
                return wrong(format!(
                    "the record at {offset} is gone; compaction may have been up to {bound}"
                ));
            }
            if still && !superseded && records.range(..offset).any(|(_, (other, _))| *other == key) {
                return wrong(format!("the tombstone at {offset} went before what it deletes"));
            }
        }
    }
    Ok(reached)
}

type KeyAndValue = (Vec<u8>, Option<Vec<u8>>);

fn decoded(batch: &[u8]) -> Result<BTreeMap<i64, KeyAndValue>, Mismatch> {
    let bad = |error: RecordError| Mismatch::Wrong(format!("{} cannot be decoded: {error}", describe(batch)));
    let mut scratch = Vec::new();
    let mut found = BTreeMap::new();
    for record in record::decode_records(batch, &mut scratch, RECORDS_BYTES_MAX).map_err(bad)? {
        let record = record.map_err(bad)?;
        let value = record.value.map(<[u8]>::to_vec);
        found.insert(record.offset, (record.key.unwrap_or_default().to_vec(), value));
    }
    Ok(found)
}

/// The newest record of every key below an offset.
fn newest_below(state: &Log, bound: i64) -> Result<BTreeMap<Vec<u8>, i64>, Mismatch> {
    let mut newest = BTreeMap::new();
    for batch in state.all().filter(|entry| entry.base < bound).filter_map(|e| e.batch.as_deref()) {
        let below = decoded(batch)?.into_iter().filter(|(offset, _)| *offset < bound);
        newest.extend(below.map(|(offset, (key, _))| (key, offset)));
    }
    Ok(newest)
}

fn describe(batch: &[u8]) -> String {
    let text: String = batch.iter().skip(66).take(24).map(|byte| char::from(*byte)).collect();
    match record_batch::parse_header(batch) {
        Ok(header) => format!(
            "[{} to {}, epoch {}, {} bytes, {text:?}]",
            header.base_offset,
            header.next_offset(),
            header.leader_epoch,
            batch.len()
        ),
        Err(error) => format!("[{error}]"),
    }
}

/// How much of what it was told a partition may have forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing that was acknowledged.
    Kill,
    /// What only the kernel had.
    PowerLoss,
    /// The end: the newest commits of a ring, when they are damaged, cannot be told from ones that were never finished.
    DamagedEnd,
}

/// A write that goes astray covers so many blocks of a ring at most, each of them a commit.
const COMMITS_DAMAGED_MAX: usize = 16;

/// The states of the model that recovery's account agrees with, best first. `Err` says why none does.
pub fn matching(
    id: u64,
    partition: &Partition,
    loss: Loss,
    found: Option<&RecoveredGroup>,
) -> Result<Vec<Option<Log>>, String> {
    let from = match loss {
        Loss::Kill => partition.lower_bound(false),
        Loss::PowerLoss => partition.lower_bound(true),
        Loss::DamagedEnd if partition.is_durable() => partition.before_last_commits(COMMITS_DAMAGED_MAX),
        // The os lane of a machine that lost power ends where the first damage is.
        Loss::DamagedEnd => 0,
    };
    let candidates = partition.states_from(from);
    let mixed = loss != Loss::Kill && !partition.is_durable();
    let (_, floor) = &candidates[candidates.len() - 1];
    let mut reasons = Vec::new();
    let mut matching = Vec::new();
    // A file of one lane retires with what its partitions are by then, which may still be on its way in the other lane:
    // vote and log start run ahead of entries then, and neither was acknowledged.
    let ahead = partition.has_two_lanes();
    // Where the os lane ends at damage in its middle, the durable one can have a log start of after that; and a log start
    // does not wait for what goes past the logs.
    let start = found.map(|found| found.log_start_offset).filter(|start| {
        // A state says no more than what it counts allows: of a topic that commits from memory, a part of the way.
        let known = floor.as_ref().map_or(0, |floor| floor.log_start);
        let is_it = |head: &Log| match partition.has_direct() {
            true => (known..=head.log_start).contains(start),
            false => loss == Loss::DamagedEnd && head.log_start == *start,
        };
        candidates.iter().any(|(_, head)| head.as_ref().is_some_and(is_it))
    });
    let moved = |head: &Option<Log>| {
        head.as_ref().map(|head| Log { log_start: start.unwrap_or(head.log_start), ..head.clone() })
    };
    for (at, (steps, state)) in candidates.iter().enumerate() {
        let states = if mixed {
            without_tail(state, floor, &candidates, found, (loss, &moved))
        } else if ahead {
            candidates[..=at]
                .iter()
                .rev()
                .filter_map(|(_, head)| with_head(state.as_ref(), moved(head).as_ref()))
                .collect()
        } else {
            with_head(state.as_ref(), state.as_ref()).into_iter().collect()
        };
        // The nearest of them is worth reporting.
        let mut reason: Option<String> = None;
        let distance = |why: &String| why.matches(", not ").count();
        for mut state in states {
            if let (Some(log), Some(found), true) = (&mut state, found, partition.has_direct()) {
                // A state that counts does not say that more is committed than what it counts.
                let known = floor.as_ref().map_or(0, |floor| floor.hard.commit);
                log.hard.commit = log.hard.commit.min(found.hard_state.commit.max(known));
            }
            match differs(state.as_ref(), found, mixed || loss == Loss::DamagedEnd) {
                None => {
                    if let (Some(log), Some(found)) = (&mut state, found) {
                        let gone = log
                            .producers()
                            .into_iter()
                            .filter(|(id, _)| found.producers.producer(*id).is_none());
                        log.forgotten.extend(gone.map(|(id, (_, _, base))| (id, base)).collect::<Vec<_>>());
                    }
                    matching.push(state);
                }
                Some(why) => reason = reason.into_iter().chain([why]).min_by_key(distance),
            }
        }
        reasons.extend(reason.map(|reason| format!("after {steps} steps: {reason}")));
    }
    if !matching.is_empty() {
        return Ok(matching);
    }
    // The nearest first.
    reasons.sort_by_key(|reason| reason.matches(", not ").count());
    reasons.truncate(6);
    Err(format!(
        "group {id} is in none of its {} possible states ({} steps, {from} must be there, {loss:?}):\n  {}",
        candidates.len(),
        partition.steps().len(),
        reasons.join("\n  ")
    ))
}

/// What the os lane may leave of a state when the power goes: entries from the end may be missing, but none that was there
/// at `floor` and was not replaced since; and the rest may be of another time, as far as the durable lane knows it.
fn without_tail(
    state: &Option<Log>,
    floor: &Option<Log>,
    heads: &[(usize, Option<Log>)],
    found: Option<&RecoveredGroup>,
    (loss, moved): (Loss, &dyn Fn(&Option<Log>) -> Option<Log>),
) -> Vec<Option<Log>> {
    let mut entries = state.clone();
    if let (Some(log), Some(found)) = (&mut entries, found) {
        let kept = floor.as_ref().map_or(0, |floor| floor.common(log));
        if found.last_index >= kept.max(log.before.0) {
            log.entries.truncate(usize::try_from(found.last_index - log.before.0).unwrap_or(usize::MAX));
        }
    }
    // Damage can take out of one lane that the log began anew, and leave what the other lane had after that.
    let before = entries.as_ref().filter(|_| loss == Loss::DamagedEnd).map(|log| log.before);
    let of_this_log =
        |head: Option<Log>| head.map(|head| Log { before: before.unwrap_or(head.before), ..head });
    heads
        .iter()
        .filter_map(|(_, head)| with_head(entries.as_ref(), of_this_log(moved(head)).as_ref()))
        .collect()
}

/// Entries of one state, the rest of another, cut to what the entries allow. `None`: they do not go together.
fn with_head(state: Option<&Log>, head: Option<&Log>) -> Option<Option<Log>> {
    match (state, head) {
        (None, None) => Some(None),
        // What is known since it began anew says that it did.
        (Some(state), Some(head)) if state.before != head.before => None,
        (Some(state), Some(head)) => {
            let mut log = state.clone();
            log.hard = head.hard;
            log.membership.clone_from(&head.membership);
            log.hard.commit = log.hard.commit.min(log.last_index());
            // An entry proves its term, and nobody has voted in a term of which there is only that.
            if log.last_term() > log.hard.term {
                (log.hard.term, log.hard.vote) = (log.last_term(), 0);
            }
            log.log_start = head.log_start.min(log.log_end());
            Some(Some(log))
        }
        _ => None,
    }
}

fn differs(state: Option<&Log>, found: Option<&RecoveredGroup>, may_forget: bool) -> Option<String> {
    let (state, found) = match (state, found) {
        (None, None) => return None,
        (Some(_), None) => return Some("it should exist".to_owned()),
        (None, Some(_)) => return Some("it should not exist".to_owned()),
        (Some(state), Some(found)) => (state, found),
    };
    let mut reasons = Vec::new();
    let mut compare = |what: &str, found: i128, want: i128| {
        if found != want {
            reasons.push(format!("{what} is {found}, not {want}"));
        }
    };
    compare("last index", found.last_index.into(), state.last_index().into());
    compare("last term", found.last_term.into(), state.last_term().into());
    compare("log end", found.log_end_offset.into(), state.log_end().into());
    compare("log start", found.log_start_offset.into(), state.log_start.into());
    compare("term", found.hard_state.term.into(), state.hard.term.into());
    compare("vote", found.hard_state.vote.into(), state.hard.vote.into());
    compare("commit", found.hard_state.commit.into(), state.hard.commit.into());
    if reasons.is_empty()
        && let Err(reason) = producers(state, found, may_forget)
    {
        reasons.push(reason);
    }
    (!reasons.is_empty()).then(|| reasons.join(", "))
}

/// Every producer is known with its last batch, also when that is gone, unless it `may_forget` those: where the power
/// took what only the kernel had, or the disk damaged the end of the WAL, snapshots may be of more than what is left.
fn producers(state: &Log, found: &RecoveredGroup, may_forget: bool) -> Result<(), String> {
    let want = state.producers();
    for (id, (epoch, sequence, base)) in &want {
        match found.producers.producer(*id) {
            Some(known) if known == (*epoch, *sequence) => {}
            None if may_forget && *base < state.log_start => {}
            known => {
                return Err(format!("producer {id} is {known:?}, not {:?}", (epoch, sequence)));
            }
        }
    }
    match found.producers.producers().find(|(id, ..)| !want.contains_key(id)) {
        Some((id, ..)) => Err(format!("producer {id} wrote nothing")),
        None => Ok(()),
    }
}

/// Reads a whole recovered log and compares it with each state; returns the first that it is.
pub async fn content(
    machine: &Machine,
    log: &GroupLog,
    bound: Option<i64>,
    candidates: Vec<Option<Log>>,
    max_bytes: usize,
) -> Result<Log, Mismatch> {
    let (start, end) = (log.log_start_offset(), log.log_end_offset());
    let mut pieces = Vec::new();
    let mut at = start;
    while at < end {
        let found = match log.read_cached(at, end, max_bytes) {
            Some(found) => found,
            None => log.read(at, end, max_bytes).await.map_err(|error| match error {
                ReadError::Damaged { .. } => Mismatch::Noticeable(format!("reading at {at}: {error}")),
                error => Mismatch::Wrong(format!("reading at {at}: {error}")),
            })?,
        };
        let last = found.iter().flat_map(|piece| record_batch::batches(piece)).last();
        match last {
            // All the rest is compacted away.
            None if bound.is_some() => at = end,
            Some(Ok((header, _))) if header.next_offset() > at => at = header.next_offset(),
            _ => return Err(Mismatch::Wrong(format!("reading at {at} of {start} to {end} gets nowhere"))),
        }
        pieces.extend(found);
    }
    machine.note(&format!("{} read from {start} to {end}", log.group_id()));
    let mut mismatch = Mismatch::Wrong("no candidate".to_owned());
    for state in candidates.into_iter().flatten() {
        let bound = bound.map(|bound| bound.min(state.log_end()));
        match same_records(&state, bound, (start, end), &pieces, true) {
            Ok(reached) if reached == end && log.raft_start().membership != state.membership => {
                let (found, want) = (log.raft_start().membership, &state.membership);
                // Where bits rot, the middle of what was said may be missing.
                mismatch = Mismatch::Noticeable(format!("the members are {found:?}, not {want:?}"));
            }
            Ok(reached) if reached == end => {
                epochs(&state, log).map_err(Mismatch::Wrong)?;
                all_entries(&state, log, bound, max_bytes).await?;
                return Ok(state);
            }
            Ok(reached) => mismatch = Mismatch::Wrong(format!("the log reaches {reached}, not {end}")),
            Err(found) => mismatch = found,
        }
    }
    Err(mismatch)
}

/// What Raft is told of the log, and every entry that other replicas could be sent.
async fn all_entries(
    state: &Log,
    log: &GroupLog,
    bound: Option<i64>,
    max_bytes: usize,
) -> Result<(), Mismatch> {
    let wrong = |what: String| Err(Mismatch::Wrong(what));
    let start = log.raft_start();
    let ((before, term), offset) = (start.before, log.before().2);
    if (start.last_index, start.last_term) != (state.last_index(), state.last_term()) {
        return wrong(format!(
            "Raft is told that the log ends at {} in term {}",
            start.last_index, start.last_term
        ));
    }
    // Only compaction takes indexes away.
    if bound.is_none() && offset > state.log_start.max(state.before.2) {
        // Where bits rot, indexes go too.
        let what = format!("entries can be sent from {offset} on, and the log begins at {}", state.log_start);
        return Err(Mismatch::Noticeable(what));
    }
    if let Some(entry) = state.entry(before)
        && (entry.term, entry.next) != (term, offset)
    {
        return wrong(format!("before the first entry is {before} of term {term} up to {offset}"));
    }
    let mut at = before + 1;
    while at <= start.last_index {
        let found =
            log.read_entries(at, start.last_index + 1, max_bytes).await.map_err(|error| match error {
                ReadError::Damaged { .. } => Mismatch::Noticeable(format!("reading entry {at}: {error}")),
                error => Mismatch::Wrong(format!("reading entry {at}: {error}")),
            })?;
        if found.is_empty() {
            return wrong(format!("no entry {at} of {} to {}", before + 1, start.last_index));
        }
        for entry in &found {
            same_entry(state, entry)?;
            let run = start.terms.iter().rev().find(|(first, _)| *first <= entry.index);
            if run.map_or(term, |(_, term)| *term) != entry.term {
                return wrong(format!(
                    "Raft is told another term of entry {} than {}",
                    entry.index, entry.term
                ));
            }
        }
        at += found.len() as u64;
    }
    let changes = state
        .entries
        .iter()
        .filter(|entry| entry.index > before && entry.batch.is_none() && !entry.control.is_empty());
    let changes: Vec<_> = changes.map(|entry| (entry.index, entry.control.clone())).collect();
    if changes != start.controls {
        return wrong(format!("Raft is told of control entries {:?}, not {changes:?}", start.controls));
    }
    for index in [before, before + (start.last_index - before) / 2, start.last_index] {
        if log.end_of(index) != Some(state.end_of(index)) && index >= before {
            return wrong(format!(
                "entry {index} ends at {:?}, not {}",
                log.end_of(index),
                state.end_of(index)
            ));
        }
    }
    Ok(())
}

/// An entry as it was staged.
pub fn same_entry(state: &Log, found: &flumen_storage::Entry) -> Result<(), Mismatch> {
    let Some(want) = state.entry(found.index) else {
        return Err(Mismatch::Wrong(format!("entry {}, where the log ends", found.index)));
    };
    let same = match (&found.payload, &want.batch) {
        (Payload::Batch(bytes), Some(batch)) => bytes == batch,
        (Payload::Control(bytes), None) => *bytes == want.control,
        _ => false,
    };
    if found.term != want.term || !same {
        let shown = |payload: &Payload| match payload {
            Payload::Batch(bytes) => describe(bytes),
            Payload::Control(bytes) => format!("control {bytes:?}"),
        };
        let wanted = want.batch.as_deref().map_or_else(|| format!("control {:?}", want.control), describe);
        let what = format!(
            "entry {} is {} of term {}, not {wanted} of term {}",
            found.index,
            shown(&found.payload),
            found.term,
            want.term
        );
        // Nothing that Kafka's checksum covers may differ unnoticed.
        return Err(match &found.payload {
            Payload::Batch(bytes) if !record_batch::crc_ok(bytes) => Mismatch::Noticeable(what),
            _ => Mismatch::Wrong(what),
        });
    }
    Ok(())
}

/// Leader epochs are those of the batches.
fn epochs(state: &Log, log: &GroupLog) -> Result<(), String> {
    for entry in state.batches() {
        let (at, term) = (entry.base.max(state.log_start), entry.term as i32);
        let found = log.epoch_at(at);
        if found != term {
            return Err(format!("offset {at} has leader epoch {found}, not {term}"));
        }
    }
    Ok(())
}
