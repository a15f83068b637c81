//! From what a crash left to whole segments. Runs once, before any shard, with plain blocking calls.
//!
//! Order: checkpoints -> segments (scan what they do not vouch for) -> WAL entries beyond the segments ->
//! sync -> one new checkpoint -> old checkpoints and WALs removed. A crash in here finds the same again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flumen_io::BLOCK_BYTES;
use flumen_protocol::record_batch;

use crate::checkpoint::{self, Checkpoint, GroupCheckpoint};
use crate::data_dir::{DELETED_SUFFIX, DataDir, group_of};
use crate::entry::{GroupHealth, GroupId, RecoveredGroup};
use crate::error::OpenError;
use crate::producer_state::ProducerState;
use crate::segment::{self, Segment};
use crate::wal::wal_files;
use crate::wal_format::{self, BLOCK_HEADER_BYTES, BlockHeader, Record};

/// Marks a group whose damage was found by an earlier start; removed by hand after a repair.
const DAMAGED_FILE: &str = "DAMAGED";

/// What one lane's files say.
#[derive(Default)]
struct LaneContent {
    records: Vec<Record>,
    damage: Option<String>,
    damaged_groups: BTreeSet<GroupId>,
}

pub(crate) fn recover(dir: &DataDir) -> Result<Vec<RecoveredGroup>, OpenError> {
    let wal_root = dir.wal_root();
    let log_root = dir.log_root();
    let old_checkpoints = files_with(&wal_root, "checkpoint").map_err(OpenError::io(&wal_root))?;
    let mut known = Checkpoint::new();
    for path in &old_checkpoints {
        let bytes = fs::read(path).map_err(OpenError::io(path))?;
        let Some(checkpoint) = checkpoint::decode(&bytes) else {
            return Err(OpenError::io(path)(io::Error::other(
                "the checkpoint is damaged; restore it from a copy, or remove it to let every segment be scanned",
            )));
        };
        for (id, group) in checkpoint {
            let newer = known.get(&id).is_none_or(|k| {
                (k.last_index, k.hard_state.term, k.synced_end_offset)
                    < (group.last_index, group.hard_state.term, group.synced_end_offset)
            });
            if newer {
                known.insert(id, group);
            }
        }
    }

    let lanes = directories(&wal_root).map_err(OpenError::io(&wal_root))?;
    let mut entries: BTreeMap<GroupId, Vec<Record>> = BTreeMap::new();
    let mut damaged_groups: BTreeMap<GroupId, String> = BTreeMap::new();
    let mut lane_dirs = Vec::new();
    for lane in lanes {
        if lane.file_name().and_then(|n| n.to_str()).is_none_or(|n| n.starts_with("damaged-")) {
            continue;
        }
        let content = read_lane(&lane).map_err(OpenError::io(&lane))?;
        if let Some(reason) = &content.damage {
            tracing::error!(wal = %lane.display(), %reason, groups = content.damaged_groups.len(), "the write-ahead log is damaged");
            for group in &content.damaged_groups {
                damaged_groups.insert(*group, format!("{}: {reason}", lane.display()));
            }
        }
        for record in content.records {
            entries.entry(record.group()).or_default().push(record);
        }
        lane_dirs.push((lane, content.damage.is_some()));
    }

    let mut recovered = Vec::new();
    let mut next = Checkpoint::new();
    for path in directories(&log_root).map_err(OpenError::io(&log_root))? {
        let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_string) else { continue };
        if name.ends_with(DELETED_SUFFIX) {
            fs::remove_dir_all(&path).map_err(OpenError::io(&path))?;
            continue;
        }
        let Some(id) = group_of(&name) else { continue };
        let records = entries.remove(&id).unwrap_or_default();
        let checkpoint = known.remove(&id).unwrap_or_default();
        let marked = fs::read_to_string(path.join(DAMAGED_FILE)).ok();
        let damage = marked.clone().or_else(|| damaged_groups.remove(&id));
        let group = match damage {
            Some(reason) => Err(reason),
            None => recover_group(&path, &name, id, &checkpoint, records).map_err(OpenError::io(&path))?,
        };
        match group {
            Ok((group, checkpoint)) => {
                next.insert(id, checkpoint);
                recovered.push(group);
            }
            Err(reason) => {
                if marked.is_none() {
                    tracing::error!(directory = %name, %reason, "the log is damaged; the partition refuses to serve");
                    checkpoint::write_atomically(&path.join(DAMAGED_FILE), reason.as_bytes())
                        .map_err(OpenError::io(&path))?;
                }
                let segments = Vec::new();
                recovered.push(RecoveredGroup {
                    group_id: id,
                    dir_name: name,
                    health: GroupHealth::Damaged { reason },
                    hard_state: checkpoint.hard_state,
                    last_index: checkpoint.last_index,
                    last_term: checkpoint.last_term,
                    log_start_offset: checkpoint.log_start_offset,
                    log_end_offset: checkpoint.synced_end_offset,
                    producers: ProducerState::default(),
                    leader_epochs: checkpoint.leader_epochs.clone(),
                    segments,
                });
                next.insert(id, checkpoint);
            }
        }
    }

    let path = wal_root.join("recovered.checkpoint");
    checkpoint::write_atomically(&path, &checkpoint::encode(&next)).map_err(OpenError::io(&path))?;
    for old in old_checkpoints.iter().filter(|p| **p != path) {
        fs::remove_file(old).map_err(OpenError::io(old))?;
    }
    for (lane, damaged) in lane_dirs {
        if damaged {
            keep_damaged(&wal_root, &lane).map_err(OpenError::io(&lane))?;
        } else {
            fs::remove_dir_all(&lane).map_err(OpenError::io(&lane))?;
        }
    }
    flumen_io::sync_dir(&wal_root).map_err(OpenError::io(&wal_root))?;
    Ok(recovered)
}

type Recovered = Result<(RecoveredGroup, GroupCheckpoint), String>;

fn recover_group(
    path: &Path,
    name: &str,
    id: GroupId,
    checkpoint: &GroupCheckpoint,
    mut records: Vec<Record>,
) -> io::Result<Recovered> {
    let mut hard_state = checkpoint.hard_state;
    let mut log_start = checkpoint.log_start_offset;
    let mut by_index: BTreeMap<u64, (u64, Option<Bytes>)> = BTreeMap::new();
    for record in records.drain(..) {
        match record {
            Record::HardState { state, .. } if state.term >= hard_state.term => hard_state = state,
            Record::HardState { .. } => {}
            Record::LogStart { offset, .. } => log_start = log_start.max(offset),
            Record::Batch { index, term, bytes, .. } => place(&mut by_index, index, term, Some(bytes)),
            Record::Control { index, term, .. } => place(&mut by_index, index, term, None),
        }
    }

    // Producer state: the newest readable snapshot, then every header after it.
    let mut producers = ProducerState::default();
    let mut headers_from = 0;
    let mut snapshots = files_with(path, "snapshot")?;
    snapshots.sort();
    while let Some(snapshot) = snapshots.pop() {
        let offset = snapshot.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse::<i64>().ok());
        if let (Some(offset), Some(state)) = (offset, ProducerState::decode(&fs::read(&snapshot)?)) {
            producers = state;
            headers_from = offset;
            break;
        }
        fs::remove_file(&snapshot)?;
    }

    let mut epochs = checkpoint.leader_epochs.clone();
    let mut segments: Vec<Segment> = Vec::new();
    let bases = segment::list(path)?;
    let synced_end = checkpoint.synced_end_offset;
    for (at, base) in bases.iter().enumerate() {
        let last = at + 1 == bases.len();
        let scanned = segment::load(path, *base, synced_end, headers_from, |header| {
            producers.apply(header);
            epochs.note(header.leader_epoch, header.base_offset);
        })?;
        let mut segment = scanned.segment;
        if let Some(before) = segments.last()
            && before.end_offset != *base
            && before.end_offset > log_start
        {
            let end = before.end_offset;
            return Ok(Err(format!("{name}: segment {base} does not follow the one that ends at {end}")));
        }
        if let Some(reason) = scanned.stopped {
            if segment.end_offset < synced_end {
                return Ok(Err(format!(
                    "{name}: segment {base} ends at offset {} ({reason}) although {synced_end} was synced",
                    segment.end_offset
                )));
            }
            // Beyond what was synced everything is in the WAL too.
            tracing::info!(directory = name, base, reason, "cutting an unsynced tail; the WAL has it");
            segment::truncate(path, &mut segment)?;
            segments.push(segment);
            for later in &bases[at + 1..] {
                fs::remove_file(segment::log_path(path, *later))?;
                let _ = fs::remove_file(segment::index_path(path, *later));
            }
            break;
        }
        // Whole to its end but shorter than what was synced: bytes are gone.
        if last && segment.end_offset < synced_end {
            return Ok(Err(format!(
                "{name}: segments end at {} although {synced_end} was synced",
                segment.end_offset
            )));
        }
        segments.push(segment);
    }
    if bases.is_empty() && synced_end > log_start {
        return Ok(Err(format!("{name}: the segments are gone although {synced_end} was synced")));
    }

    let mut end = segments.last().map_or(log_start.max(synced_end), |s| s.end_offset);
    let (mut last_index, mut last_term) = (checkpoint.last_index, checkpoint.last_term);
    let mut run = Vec::new();
    for (index, (term, batch)) in by_index {
        if let Some(batch) = batch {
            let Ok(header) = record_batch::parse(&batch) else {
                return Ok(Err(format!("{name}: entry {index} of the WAL is not a batch")));
            };
            if header.next_offset() <= end {
                // In a segment already.
            } else if header.base_offset == end {
                if !record_batch::crc_ok(&batch) {
                    return Ok(Err(format!("{name}: entry {index} of the WAL has a wrong checksum")));
                }
                end = header.next_offset();
                producers.apply(&header);
                epochs.note(header.leader_epoch, header.base_offset);
                run.push((header, batch));
            } else {
                return Ok(Err(format!(
                    "{name}: the log ends at offset {end} and the WAL goes on at {}",
                    header.base_offset
                )));
            }
        }
        if index > last_index {
            last_index = index;
            last_term = term;
        }
    }
    if !run.is_empty() {
        append_run(path, &mut segments, &run)?;
    }
    let state = GroupCheckpoint {
        hard_state,
        last_index,
        last_term,
        log_start_offset: log_start,
        synced_end_offset: end,
        leader_epochs: epochs.clone(),
    };
    let group = RecoveredGroup {
        group_id: id,
        dir_name: name.to_string(),
        health: GroupHealth::Ok,
        hard_state,
        last_index,
        last_term,
        log_start_offset: log_start,
        log_end_offset: end,
        producers,
        leader_epochs: epochs,
        segments,
    };
    Ok(Ok((group, state)))
}

/// An entry at a known index replaces it and all after it, if its term is not older.
fn place(by_index: &mut BTreeMap<u64, (u64, Option<Bytes>)>, index: u64, term: u64, batch: Option<Bytes>) {
    if by_index.get(&index).is_some_and(|(known, _)| *known > term) {
        return;
    }
    if by_index.insert(index, (term, batch)).is_some_and(|(known, _)| known != term) {
        by_index.split_off(&(index + 1));
    }
}

fn append_run(
    path: &Path,
    segments: &mut Vec<Segment>,
    run: &[(record_batch::BatchHeader, Bytes)],
) -> io::Result<()> {
    let Some((first, _)) = run.first() else { return Ok(()) };
    if segments.is_empty() {
        segments.push(Segment::new(first.base_offset));
    }
    let Some(segment) = segments.last_mut() else { return Ok(()) };
    let log = segment::log_path(path, segment.base_offset);
    let mut file = io::BufWriter::new(fs::OpenOptions::new().create(true).append(true).open(&log)?);
    for (header, batch) in run {
        file.write_all(batch)?;
        segment.note(header);
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    segment::rewrite_index(path, segment)?;
    flumen_io::sync_dir(path)
}

fn files_with(dir: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == extension) {
            out.push(path);
        }
    }
    Ok(out)
}

fn directories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            out.push(entry.path());
        }
    }
    out.sort();
    Ok(out)
}

/// Keeps the bytes of a damaged WAL for whoever repairs it.
fn keep_damaged(wal_root: &Path, lane: &Path) -> io::Result<()> {
    let name = lane.file_name().and_then(|n| n.to_str()).unwrap_or("wal");
    let free = (0..).map(|n| wal_root.join(format!("damaged-{name}-{n}"))).find(|p| !p.exists());
    free.map_or(Ok(()), |to| fs::rename(lane, to))
}

/// One block found in a file.
struct Found {
    header: BlockHeader,
    payload: Bytes,
    crc_ok: bool,
}

fn read_lane(dir: &Path) -> io::Result<LaneContent> {
    let mut blocks: BTreeMap<u64, Found> = BTreeMap::new();
    for path in wal_files(dir)? {
        let bytes = Bytes::from(fs::read(&path)?);
        for found in scan_file(&bytes) {
            blocks.insert(found.header.lsn, found);
        }
    }
    Ok(judge(blocks))
}

/// Every block of the newest round of a file. Blocks of older rounds lie behind it and have lower numbers.
fn scan_file(bytes: &Bytes) -> Vec<Found> {
    let mut out: Vec<Found> = Vec::new();
    let mut at = 0;
    let mut newest = 0;
    while at + BLOCK_HEADER_BYTES <= bytes.len() {
        let Some(header) = wal_format::decode_block_header(&bytes[at..]) else {
            at += BLOCK_BYTES;
            continue;
        };
        let from = at + BLOCK_HEADER_BYTES;
        let to = from + header.payload_len as usize;
        if header.file_seq < newest {
            at += BLOCK_BYTES;
            continue;
        }
        newest = header.file_seq;
        let payload = if to <= bytes.len() { bytes.slice(from..to) } else { Bytes::new() };
        let crc_ok = to <= bytes.len() && crc32c::crc32c(&payload) == header.payload_crc;
        out.push(Found { header, payload, crc_ok });
        // A torn block may be followed by remains of an older round: look at every boundary in it.
        at = if crc_ok { to.next_multiple_of(BLOCK_BYTES) } else { at + BLOCK_BYTES };
    }
    out.retain(|f| f.header.file_seq == newest);
    out
}

/// The tail rule: a block that is missing or torn ends the log if nothing valid comes after it; if
/// something does, it is damage within what was acknowledged.
fn judge(blocks: BTreeMap<u64, Found>) -> LaneContent {
    let mut content = LaneContent::default();
    let Some(last_good) = blocks.values().filter(|f| f.crc_ok).map(|f| f.header.lsn).next_back() else {
        return content;
    };
    let mut expected = None;
    let mut everyone: BTreeSet<GroupId> = BTreeSet::new();
    let mut whole_lane = false;
    for (lsn, found) in blocks.range(..=last_good) {
        if expected.is_some_and(|e| e != *lsn) {
            content.damage = Some(format!("block {} is missing before block {lsn}", expected.unwrap_or(0)));
            whole_lane = true;
        }
        expected = Some(lsn + 1);
        if found.crc_ok {
            match wal_format::decode_records(&found.payload) {
                Some(records) => {
                    everyone.extend(records.iter().map(Record::group));
                    content.records.extend(records);
                }
                None => {
                    content.damage = Some(format!("block {lsn} has records of an unknown kind"));
                    whole_lane = true;
                }
            }
            continue;
        }
        content.damage = Some(format!("block {lsn} has a wrong checksum and is not the last"));
        // Which groups it holds can be told when its record headers still make sense and a batch in it
        // does not match its own checksum.
        match wal_format::decode_records(&found.payload) {
            Some(records) => {
                let bad: Vec<_> = records
                    .iter()
                    .filter(|r| matches!(r, Record::Batch { bytes, .. } if !record_batch::crc_ok(bytes)))
                    .map(Record::group)
                    .collect();
                if bad.len() == 1 {
                    content.damaged_groups.extend(bad);
                    everyone.extend(records.iter().map(Record::group));
                    content.records.extend(records);
                } else {
                    whole_lane = true;
                    everyone.extend(records.iter().map(Record::group));
                }
            }
            None => whole_lane = true,
        }
    }
    if whole_lane {
        content.damaged_groups = everyone;
    }
    content
}
