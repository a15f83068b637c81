//! One partition's directory at start: segments brought to what its state says, replayed entries added, indexes and
//! producers rebuilt where they are missing.
//!
//! Offline, plain calls. Nothing is removed or shortened here before the new `group.meta` is durable, unless it is
//! beyond what the old one counts; so recovery can be cut short anywhere and run again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flumen_io::{DirEntry, FileSystem, Mode};
use flumen_protocol::record_batch::{self, BatchHeader};

use crate::flush::{position_of, snapshots, write_snapshot};
use crate::group_state::GroupState;
use crate::leader_epochs::LeaderEpochs;
use crate::marks::{Marks, Numbering};
use crate::mutant::{self, Mutant};
use crate::producer_state::ProducerState;
use crate::receive;
use crate::replay::{LogEntry, Replayed};
use crate::restore_numbers::{Counted, Numbered};
use crate::segment_index::{
    self, INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, IndexBuilder, IndexEntry, encode_entry, encode_header,
};
use crate::segment_name::{self, Compacted, SegmentName};
use crate::states_file::SNAPSHOT_BYTES_MAX;
use crate::tail::TailEntry;
use crate::walk::{Step, Walk};

/// Recovery does not know the topic's segment size; this is Kafka's default.
const ROLL_BYTES: u64 = 1 << 30;
const PIECE_BYTES: usize = 1 << 20;

/// What `attach` needs beyond the public part of a recovered group.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    pub segments: Vec<RestoredSegment>,
    pub epochs: LeaderEpochs,
    pub snapshot_offset: i64,
    pub marks: Marks,
    pub membership: Option<(u64, Bytes)>,
    pub committed_index: u64,
    pub warm: Vec<TailEntry>,
}

#[derive(Debug)]
pub(crate) struct RestoredSegment {
    pub name: SegmentName,
    pub bytes: u64,
    /// Raft index of its first batch; 0: unknown.
    pub first_index: u64,
}

#[derive(Debug)]
pub(crate) enum RestoreError {
    Damaged(String),
    Io(PathBuf, io::Error),
}

/// What is known of the directory beforehand.
pub(crate) struct Found {
    pub listed: Vec<DirEntry>,
    /// Producers as the last recovery knew them; may be empty, of another log, or damaged.
    pub snapshot: Option<Bytes>,
}

/// Things to do once the new state is durable.
#[derive(Debug)]
pub(crate) enum Afterwards {
    Shorten(PathBuf, u64),
    Remove(PathBuf),
}

pub(crate) struct Outcome {
    pub state: GroupState,
    pub producers: ProducerState,
    /// To be saved with the state.
    pub snapshot: Option<Bytes>,
    pub restored: Restored,
    pub last_index: u64,
    pub last_term: u64,
    pub log_end: i64,
    /// Files to sync before the state is written.
    pub written: Vec<PathBuf>,
    pub afterwards: Vec<Afterwards>,
    pub changed: bool,
    /// The directory has names to sync before the state is written.
    pub names_changed: bool,
}

fn log_path(dir: &Path, base: i64) -> PathBuf {
    dir.join(SegmentName::plain(base).log_file())
}

/// What a directory has, by base.
pub(crate) struct OnDisk {
    /// Segments that count, with their lengths.
    segments: BTreeMap<i64, u64>,
    /// Which of them compaction has written.
    pub(crate) compacted: BTreeMap<i64, Compacted>,
    /// What compaction left unfinished, or did not come to remove.
    leftovers: Vec<PathBuf>,
}

impl OnDisk {
    fn of(listed: &[DirEntry], dir: &Path) -> OnDisk {
        let mut leftovers = Vec::new();
        let mut found = Vec::new();
        for entry in listed {
            if entry.name.ends_with(crate::compact::UNFINISHED) || receive::is_unplaced(&entry.name) {
                leftovers.push(dir.join(&entry.name));
            }
            found.extend(SegmentName::parse(&entry.name).map(|name| (name, entry.len)));
        }
        let (kept, replaced) = segment_name::choose(found);
        for name in replaced {
            leftovers.extend([dir.join(name.index_file()), dir.join(name.log_file())]);
        }
        OnDisk {
            segments: kept.iter().map(|(name, len)| (name.base, *len)).collect(),
            compacted: kept.iter().filter_map(|(name, _)| Some((name.base, name.compacted?))).collect(),
            leftovers,
        }
    }

    pub(crate) fn name(&self, base: i64) -> SegmentName {
        SegmentName { base, compacted: self.compacted.get(&base).copied() }
    }
}

/// Walks a segment from a batch on to `bytes`; returns the offset reached. All of a compacted one must have the checksum
/// that its name says.
pub(crate) fn scan(
    files: &FileSystem,
    (dir, name): (&Path, SegmentName),
    bytes: u64,
    (mut position, mut offset): (u64, i64),
    mut each: impl FnMut(&BatchHeader, u64, &[u8]) -> Result<(), String>,
) -> Result<i64, RestoreError> {
    let path = &dir.join(name.log_file());
    let mut crc = name.compacted.filter(|_| position == 0).map(|compacted| (0, compacted.crc));
    let io = |error| RestoreError::Io(path.to_owned(), error);
    let damaged = |reason: String| RestoreError::Damaged(format!("{}: {reason}", path.display()));
    let file = files.open(path, Mode::default()).map_err(io)?;
    let left = usize::try_from(bytes.saturating_sub(position)).unwrap_or(usize::MAX);
    let mut piece = vec![0; left.min(PIECE_BYTES)];
    while position < bytes {
        let want = usize::try_from(bytes - position).unwrap_or(usize::MAX).min(piece.len());
        let got = file.read_full_at(&mut piece[..want], position).map_err(io)?;
        let mut walk = Walk::with_holes(&piece[..got], offset, name.holes_to());
        let mut need = 0;
        loop {
            match walk.step() {
                Step::Batch(header, at) => {
                    let batch = &piece[at..at + header.total_bytes()];
                    each(&header, position + at as u64, batch).map_err(damaged)?;
                }
                Step::End => break,
                Step::Short(bytes) => {
                    need = bytes;
                    break;
                }
                Step::Damaged(reason) => return Err(damaged(reason)),
            }
        }
        let (advanced, reached) = (walk.at(), walk.offset());
        if advanced == 0 {
            if got < want || need <= want || need as u64 > bytes - position {
                return Err(damaged(format!("ends inside of the batch at offset {offset}")));
            }
            piece.resize(need, 0);
        }
        if let Some((so_far, _)) = &mut crc {
            *so_far = crc32c::crc32c_append(*so_far, &piece[..advanced]);
        }
        position += advanced as u64;
        offset = reached;
    }
    if crc.is_some_and(|(found, named)| found != named) {
        return Err(damaged("its content is not what compaction wrote".to_owned()));
    }
    Ok(offset)
}

pub(crate) struct Index {
    pub entries: Vec<IndexEntry>,
    builder: IndexBuilder,
    pub rebuilt: bool,
    /// So many of the entries are in the file, and nothing else is.
    pub in_file: Option<usize>,
}

/// The index of a segment that must end at `end` after `bytes`; from its file as far as that is good. `numbering` is where the
/// segment begins, and afterwards where it ends.
pub(crate) fn load_index(
    files: &FileSystem,
    dir: &Path,
    name: SegmentName,
    bytes: u64,
    end: i64,
    numbering: &mut Numbering<'_>,
    from_scratch: bool,
) -> Result<Index, RestoreError> {
    let base = name.base;
    if name.holes_to().is_some_and(|named| named != end) {
        let reason = format!("the segment after {name} is missing: the next one begins at {end}");
        return Err(RestoreError::Damaged(format!("{}: {reason}", dir.display())));
    }
    let raw = files.read(&dir.join(name.index_file())).unwrap_or_default();
    let mut entries = segment_index::decode(&raw, base, bytes).unwrap_or_default();
    if from_scratch {
        entries.clear();
    }
    // An entry that disagrees with where the segment ends was written for other content.
    entries
        .retain(|entry| entry.offset <= end && (u64::from(entry.position) == bytes) == (entry.offset == end));
    // So was one that names an index which has another term, and all behind it.
    let stale = entries
        .iter()
        .position(|entry| !numbering.may_be(entry.raft_index, u64::from(entry.term), entry.offset));
    entries.truncate(stale.unwrap_or(entries.len()));
    let whole = entries.last().is_some_and(|e| u64::from(e.position) == bytes && e.offset == end);
    // Missing batches leave no trace where holes are allowed, but in the checksum over all of them.
    if name.compacted.is_some() && !whole {
        entries.clear();
    }
    let last = entries.last().copied();
    let (position, offset, max) =
        last.map_or((0, base, i64::MIN), |e| (u64::from(e.position), e.offset, e.max_timestamp_before));
    let mut builder = IndexBuilder::resume(max, position);
    let at_start = numbering.next();
    if name.compacted.is_some() {
        numbering.resume(0);
    } else if let Some(last) = last.filter(|last| last.raft_index > 0 || last.position > 0) {
        numbering.resume(last.raft_index);
    }
    if whole || mutant::is(Mutant::TrustsIndex) {
        let exact = raw.len() == INDEX_HEADER_BYTES + entries.len() * INDEX_ENTRY_BYTES;
        let in_file = exact.then_some(entries.len());
        return Ok(Index { entries, builder, rebuilt: false, in_file });
    }
    let path = dir.join(name.log_file());
    let mut term = 0;
    let walk = |from: (u64, i64),
                builder: &mut IndexBuilder,
                entries: &mut Vec<IndexEntry>,
                numbering: &mut Numbering<'_>,
                term: &mut u32| {
        scan(files, (dir, name), bytes, from, |header, position, _| {
            *term = u32::try_from(header.leader_epoch).unwrap_or(0);
            let timestamp = header.newest_record_ms().unwrap_or(i64::MIN);
            // Of a compacted one, nobody knows the indexes any more.
            let index = if name.compacted.is_some() { 0 } else { numbering.batch(header.base_offset) };
            entries.extend(builder.batch(header.base_offset, position, *term, index, timestamp));
            Ok(())
        })
    };
    let mut reached = walk((position, offset), &mut builder, &mut entries, numbering, &mut term);
    if position > 0 && !matches!(reached, Ok(reached) if reached == end) {
        // The index led to the wrong place; the segment itself decides.
        entries.clear();
        builder = IndexBuilder::new();
        numbering.resume(if name.compacted.is_some() { 0 } else { at_start });
        reached = walk((0, base), &mut builder, &mut entries, numbering, &mut term);
    }
    let reached = reached?;
    if reached != end && name.compacted.is_none() {
        let reason = format!("{}: ends at offset {reached}, not at {end}", path.display());
        return Err(RestoreError::Damaged(reason));
    }
    entries.extend(builder.end(end, bytes, term, numbering.next()));
    Ok(Index { entries, builder, rebuilt: true, in_file: None })
}

pub(crate) fn write_index(
    files: &FileSystem,
    dir: &Path,
    name: SegmentName,
    entries: &[IndexEntry],
) -> io::Result<()> {
    files.write(&dir.join(name.index_file()), &index_bytes(name.base, entries))
}

fn add_to_index(
    files: &FileSystem,
    dir: &Path,
    name: SegmentName,
    entries: &[IndexEntry],
    count: usize,
) -> io::Result<()> {
    let file = files.open(&dir.join(name.index_file()), Mode { write: true, ..Mode::default() })?;
    let bytes: Vec<u8> = entries.iter().flat_map(encode_entry).collect();
    file.write_all_at(&bytes, (INDEX_HEADER_BYTES + count * INDEX_ENTRY_BYTES) as u64)
}

pub(crate) fn index_bytes(base: i64, entries: &[IndexEntry]) -> Vec<u8> {
    let mut out = encode_header(base).to_vec();
    for entry in entries {
        out.extend_from_slice(&encode_entry(entry));
    }
    out
}

/// Producers, and the snapshot that they were taken from.
struct Producers {
    state: ProducerState,
    /// `i64::MIN`: none was usable.
    snapshot_offset: i64,
    /// Its bytes, unless it has a file of its own.
    saved: Option<Bytes>,
    /// Else it is written again, with what is known of epochs now: once the log has records it would not be believed.
    fits_as_it_is: bool,
}

/// Producers as of `end`: the newest usable snapshot, and the headers after it. Segments below the log start count where there is
/// no such snapshot yet; some of those may be gone, and the rest still tells of the last batches in it.
fn restore_producers(
    files: &FileSystem,
    dir: &Path,
    listed: &[DirEntry],
    candidates: [Option<&Bytes>; 3],
    (on_disk, below, segments): (&OnDisk, &[(i64, u64)], &[(i64, u64)]),
    (flushed_index, flushed_end): (u64, i64),
    (entries, committed): (&[LogEntry], u64),
    (log_start, log_end, epochs): (i64, i64, &LeaderEpochs),
    names_changed: &mut bool,
) -> Result<Producers, RestoreError> {
    let io = |error| RestoreError::Io(dir.to_owned(), error);
    let first = segments.first().map_or(flushed_end, |segment| segment.0);
    // One that was taken before the log was cut, and should be gone, knows of another leader. Between one from below the
    // first segment that is left and that, producers may have gone on.
    let usable = |bytes: &[u8], first: i64| {
        let (state, at, epoch) = ProducerState::decode(bytes).ok()?;
        // Versions before this one forgot the epoch of what went; where the last segment went it is believed nevertheless, but a
        // log that has records and was cut may have a snapshot of what is not there any more.
        let known = epochs.epoch_at(at - 1);
        let is_of_all = known < 0 && at == log_end && log_start == log_end;
        let fits = epoch == known || is_of_all || mutant::is(Mutant::TakesForeignSnapshot);
        let lost = mutant::is(Mutant::LosesProducerSnapshot);
        let state = if lost { ProducerState::new() } else { state };
        (fits && (first..=log_end).contains(&at)).then_some((state, at, epoch == known))
    };
    let mut found = snapshots(listed, dir);
    // Of a log that the kernel lost the end of. Another could grow to there with the same terms, which were lost too.
    for (_, path) in found.extract_if(.., |(offset, _)| *offset > log_end) {
        files.remove_file(&path).map_err(io)?;
        *names_changed = true;
    }
    let newest_from = |first: i64| {
        let mut best = candidates
            .into_iter()
            .flatten()
            .filter_map(|bytes| {
                let (state, snapshot_offset, fits_as_it_is) = usable(bytes, first)?;
                Some(Producers { state, snapshot_offset, saved: Some(bytes.clone()), fits_as_it_is })
            })
            .max_by_key(|producers| producers.snapshot_offset);
        for (offset, path) in found.iter().rev() {
            if *offset < first || best.as_ref().is_some_and(|best| best.snapshot_offset >= *offset) {
                break;
            }
            match files.read(path).ok().and_then(|bytes| usable(&bytes, first)) {
                Some((state, at, fits_as_it_is)) if at == *offset => {
                    best = Some(Producers { state, snapshot_offset: at, saved: None, fits_as_it_is });
                    break;
                }
                _ => {
                    tracing::warn!(path = %path.display(), "unusable producer snapshot; building it from the log")
                }
            }
        }
        best
    };
    let none = || Producers {
        state: ProducerState::new(),
        snapshot_offset: i64::MIN,
        saved: None,
        fits_as_it_is: false,
    };
    let below_first = below.first().map(|segment| segment.0);
    let newest = newest_from(first).or_else(|| newest_from(below_first?));
    let mut producers = newest.unwrap_or_else(none);
    let start_of = |base: i64, bytes: u64, from: i64| {
        if from <= base {
            return (0, base);
        }
        let raw = files.read(&dir.join(on_disk.name(base).index_file())).unwrap_or_default();
        let entries = segment_index::decode(&raw, base, bytes).unwrap_or_default();
        segment_index::seek_offset(&entries, base, from)
    };
    let apply = |state: &mut ProducerState, from: i64, header: &BatchHeader, batch: &[u8]| {
        if header.base_offset >= from {
            // What duplicates are told by is not taken from bytes that nobody vouches for.
            if header.has_producer_id() && !record_batch::crc_ok(batch) {
                return Err(format!("wrong checksum of the batch at offset {}", header.base_offset));
            }
            // A clean stop or a recovery moved what was not committed, too; which of these it is nobody needs to know.
            match committed >= flushed_index {
                true => state.apply(header),
                false => state.apply_for_now(header, flushed_index),
            }
        }
        Ok(())
    };
    for (at, (base, bytes)) in below.iter().enumerate() {
        let end = below.get(at + 1).or(segments.first()).map_or(flushed_end, |next| next.0);
        let from = producers.snapshot_offset;
        if end <= from {
            continue;
        }
        let scanned = scan(
            files,
            (dir, on_disk.name(*base)),
            *bytes,
            start_of(*base, *bytes, from),
            |header, _, batch| apply(&mut producers.state, from, header, batch),
        );
        // What is known of before a gap may not be the last of it.
        if scanned.ok() != Some(end) {
            producers = none();
        }
    }
    let (state, from) = (&mut producers.state, producers.snapshot_offset);
    for (at, (base, bytes)) in segments.iter().enumerate() {
        let end = segments.get(at + 1).map_or(flushed_end, |next| next.0);
        if end <= from {
            continue;
        }
        let start = start_of(*base, *bytes, from);
        scan(files, (dir, on_disk.name(*base)), *bytes, start, |header, _, batch| {
            apply(state, from, header, batch)
        })?;
    }
    for entry in entries.iter().filter(|entry| entry.is_batch && entry.offset >= from) {
        if let Some(header) = crate::flush::is_one_batch(&entry.payload) {
            state.apply_for_now(&header, entry.index);
        }
    }
    state.settle(committed);
    Ok(producers)
}

/// Writes entries behind the last segment, in large writes.
struct Appender<'a> {
    files: &'a FileSystem,
    dir: &'a Path,
    segments: &'a mut Vec<(i64, u64)>,
    /// The last one is compaction's, and nothing is added to it.
    closed: bool,
    index: Option<(i64, Index)>,
    pending: Vec<u8>,
    written: &'a mut Vec<PathBuf>,
}

impl Appender<'_> {
    fn flush(&mut self) -> Result<(), RestoreError> {
        let Some((base, bytes)) = self.segments.last_mut() else { return Ok(()) };
        if self.pending.is_empty() {
            return Ok(());
        }
        let path = log_path(self.dir, *base);
        let write = || {
            let file = self.files.open(&path, Mode { write: true, create: true, ..Mode::default() })?;
            file.write_all_at(&self.pending, *bytes)
        };
        write().map_err(|error| RestoreError::Io(path.clone(), error))?;
        *bytes += self.pending.len() as u64;
        self.pending.clear();
        if self.written.last() != Some(&path) {
            self.written.push(path);
        }
        Ok(())
    }

    fn finish_index(&mut self, end: i64, term: u32, next_index: u64) -> Result<(), RestoreError> {
        self.flush()?;
        let (Some((base, mut index)), Some((_, bytes))) = (self.index.take(), self.segments.last()) else {
            return Ok(());
        };
        index.entries.extend(index.builder.end(end, *bytes, term, next_index));
        // Not synced: a bad index is built again. Emptying a file to fill it again costs a file system more than adding to it.
        let name = SegmentName::plain(base);
        let written = match index.in_file {
            Some(count) => add_to_index(self.files, self.dir, name, &index.entries[count..], count),
            None => write_index(self.files, self.dir, name, &index.entries),
        };
        written.map_err(|error| RestoreError::Io(self.dir.to_owned(), error))
    }

    fn append(&mut self, entry: &LogEntry, last: &mut (u32, u64)) -> Result<(), RestoreError> {
        let size = entry.payload.len() as u64;
        let at = self.segments.last().map_or(u64::MAX, |(_, bytes)| bytes + self.pending.len() as u64);
        let roll = self.segments.is_empty()
            || std::mem::take(&mut self.closed)
            || (at > 0 && at.saturating_add(size) > ROLL_BYTES);
        if roll {
            self.finish_index(entry.offset, last.0, last.1)?;
            self.segments.push((entry.offset, 0));
            let index =
                Index { entries: Vec::new(), builder: IndexBuilder::new(), rebuilt: true, in_file: None };
            self.index = Some((entry.offset, index));
            let path = log_path(self.dir, entry.offset);
            // What a cut short recovery left.
            let fresh = self
                .files
                .open(&path, Mode { write: true, create: true, ..Mode::default() })
                .and_then(|file| file.set_len(0));
            fresh.map_err(|error| RestoreError::Io(path, error))?;
        }
        let position = if roll { 0 } else { at };
        let term = u32::try_from(entry.term).unwrap_or(u32::MAX);
        if let Some((_, index)) = &mut self.index {
            let timestamp = crate::flush::is_one_batch(&entry.payload).map_or(i64::MIN, |h| h.max_timestamp);
            index.entries.extend(index.builder.batch(entry.offset, position, term, entry.index, timestamp));
        }
        *last = (term, entry.index + 1);
        self.pending.extend_from_slice(&entry.payload);
        if self.pending.len() >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }
}

/// `changed`: there were WAL records, so the state must be written again even if nothing else happens.
pub(crate) fn restore(
    files: &FileSystem,
    dir: &Path,
    found: Found,
    replayed: Replayed,
    mut changed: bool,
    warm_bytes: &mut usize,
) -> Result<Outcome, RestoreError> {
    let io = |error| RestoreError::Io(dir.to_owned(), error);
    fn damaged<T>(reason: String) -> Result<T, RestoreError> {
        Err(RestoreError::Damaged(reason))
    }
    let Replayed { mut state, entries, producers: wal_snapshot, began, received, cut, .. } = replayed;
    let mut afterwards = Vec::new();
    // The record that says so is safe, so nothing else counts any more.
    let placed = match &received {
        Some(segments) => {
            receive::place_at_start(files, dir, &found.listed, segments, state.log_start).map_err(io)?
        }
        None => Ok(found.listed),
    };
    let listed = placed.or_else(damaged)?;
    let on_disk = OnDisk::of(&listed, dir);
    let mut below = Vec::new();
    let mut segments: Vec<(i64, u64)> = on_disk
        .segments
        .range(..cut.unwrap_or(i64::MAX))
        .filter(|(base, _)| **base <= state.active_base)
        .map(|(base, bytes)| (*base, *bytes))
        .collect();
    let shown = dir.join(on_disk.name(state.active_base).log_file());
    let is_active = |segment: &(i64, u64)| segment.0 == state.active_base;
    match cut {
        // What was cut off may have gone already, and been written again; and the log start may have passed all of it.
        Some(offset) if state.log_start >= offset => {
            below = std::mem::take(&mut segments);
            if let Some((base, bytes)) = below.last_mut()
                && !on_disk.compacted.contains_key(base)
            {
                let file = files.open(&log_path(dir, *base), Mode::default());
                // One that does not read any more counts no longer anyway.
                *bytes = file.and_then(|file| position_of(&file, *base, *bytes, offset)).unwrap_or(0);
            }
            changed = true;
        }
        Some(offset) => {
            // A compacted one holds only what is committed, which no cut takes away.
            if let Some((base, bytes)) =
                segments.last_mut().filter(|(base, _)| !on_disk.compacted.contains_key(base))
                && !mutant::is(Mutant::CutsInTheWrongPlace)
            {
                let path = log_path(dir, *base);
                *bytes = files
                    .open(&path, Mode::default())
                    .and_then(|file| position_of(&file, *base, *bytes, offset))
                    .map_err(|error| match error.raw_os_error() {
                        // The disk did not read it this time, which says nothing about what is there.
                        Some(_) => RestoreError::Io(path.clone(), error),
                        None => RestoreError::Damaged(format!("{}: {error}", path.display())),
                    })?;
            }
            changed = true;
        }
        None if state.active_base < 0 => {}
        None => match segments.last_mut().filter(|segment| is_active(segment)) {
            Some((base, bytes)) if on_disk.compacted.contains_key(base) => {
                if *bytes != state.active_bytes {
                    let reason = format!("{} has {bytes} bytes of {}", shown.display(), state.active_bytes);
                    return damaged(reason);
                }
            }
            Some((_, bytes)) if *bytes >= state.active_bytes => {
                if *bytes > state.active_bytes && !mutant::is(Mutant::KeepsUncountedEnd) {
                    let file = files.open(&shown, Mode { write: true, ..Mode::default() });
                    file.and_then(|file| file.set_len(state.active_bytes)).map_err(io)?;
                    *bytes = state.active_bytes;
                    changed = true;
                }
            }
            Some((_, bytes)) => {
                let reason = format!("{} has {bytes} bytes of {}", shown.display(), state.active_bytes);
                return damaged(reason);
            }
            // Retention may take the last segment as well.
            None if state.log_start >= state.flushed_end => below = std::mem::take(&mut segments),
            None => return damaged(format!("{} is missing", shown.display())),
        },
    }
    // What lies below the log start is on its way out; which of these files are gone already is up to the file system.
    while segments.get(1).is_some_and(|next| next.0 <= state.log_start) {
        below.push(segments.remove(0));
    }
    let marks = state.marks.up_to(state.flushed_index);
    let counted = Counted {
        files,
        dir,
        on_disk: &on_disk,
        segments: &segments,
        marks: &marks,
        flushed: (state.flushed_index, state.flushed_end),
    };
    let Numbered { first_indexes, last_index, after_batches, .. } = counted.check()?;
    counted.begin_where_known(&first_indexes, &mut state.marks);
    let log_end = entries.last().map_or(state.flushed_end, |entry| entry.next_offset);
    // A killed process may have left the name of what replaces these to the kernel; they go only when it is sure.
    let mut names_changed = !on_disk.leftovers.is_empty() || received.is_some();
    let producers = restore_producers(
        files,
        dir,
        &listed,
        // A later one may be of entries that were replaced.
        [found.snapshot.as_ref(), wal_snapshot.as_ref(), began.as_ref().map(|(_, producers)| producers)],
        (&on_disk, &below, &segments),
        (state.flushed_index, state.flushed_end),
        (&entries, state.committed_index.max(state.hard_state.commit)),
        (state.log_start, log_end, &state.epochs),
        &mut names_changed,
    )?;
    let mut written = Vec::new();
    // In none of its segments; a later snapshot goes with what Raft cuts.
    if let Some((offset, producers)) = began {
        let path = dir.join(format!("{offset:020}.snapshot"));
        files.write(&path, &producers).map_err(io)?;
        written.push(path);
        names_changed = true;
    }
    let last_term =
        after_batches.checked_sub(1).and_then(|last| marks.term_at(last)).unwrap_or(state.flushed_term);
    let mut last = (u32::try_from(last_term).unwrap_or(0), after_batches);
    let mut appender = Appender {
        files,
        dir,
        closed: segments.last().is_some_and(|(base, _)| on_disk.compacted.contains_key(base)),
        segments: &mut segments,
        index: last_index,
        pending: Vec::new(),
        written: &mut written,
    };
    let batches = entries.iter().any(|entry| entry.is_batch);
    for entry in entries.iter().filter(|entry| entry.is_batch) {
        appender.append(entry, &mut last)?;
    }
    if batches {
        appender.finish_index(log_end, last.0, last.1)?;
    }
    if let (Some(_), Some((base, bytes))) = (cut, segments.last())
        && !on_disk.compacted.contains_key(base)
    {
        afterwards.push(Afterwards::Shorten(log_path(dir, *base), *bytes));
    }
    // Below the log start, beyond the cut, or begun after the state was written; the WAL had what still counts of it.
    for base in on_disk.segments.keys().filter(|base| segments.iter().all(|(kept, _)| kept != *base)) {
        let name = on_disk.name(*base);
        afterwards.push(Afterwards::Remove(dir.join(name.log_file())));
        afterwards.push(Afterwards::Remove(dir.join(name.index_file())));
    }
    let (snapshot_offset, settled) = producers.state.settled(log_end);
    let snapshot = match producers.snapshot_offset == snapshot_offset && producers.fits_as_it_is {
        // A copy, because it may be a piece of a whole WAL file.
        true => producers.saved.map(|bytes| Bytes::copy_from_slice(&bytes)),
        false => {
            let bytes = settled.encode(snapshot_offset, state.epochs.epoch_at(snapshot_offset - 1));
            let is_small = bytes.len() <= SNAPSHOT_BYTES_MAX;
            if !is_small {
                write_snapshot(files, dir, (snapshot_offset, -1), &bytes).map_err(io)?;
            }
            is_small.then(|| bytes.into())
        }
    };
    // It has a file, and what it knows of is perhaps nowhere else soon.
    if snapshot.is_none() && !below.is_empty() {
        written.push(dir.join(format!("{snapshot_offset:020}.snapshot")));
    }
    let (last_index, last_term) =
        entries.last().map_or((state.flushed_index, state.flushed_term), |entry| (entry.index, entry.term));
    if state.hard_state.commit > last_index || state.log_start > log_end {
        if !state.os {
            return damaged(format!(
                "committed up to entry {} and offset {}, but the log ends at entry {last_index} and offset {log_end}",
                state.hard_state.commit, state.log_start
            ));
        }
        tracing::warn!(group = state.group, "a log kept by the kernel lost its end with the machine's power");
        state.hard_state.commit = state.hard_state.commit.min(last_index);
        state.log_start = state.log_start.min(log_end);
    }
    // An entry of a term is proof of that term, in which nothing is known of a vote.
    if last_term > state.hard_state.term {
        state.hard_state.term = last_term;
        state.hard_state.vote = 0;
    }
    let first = segments.first().map_or(state.flushed_end, |segment| segment.0);
    if first > state.log_start {
        return damaged(format!("the segment with offset {} is missing", state.log_start));
    }
    state.committed_index = state.committed_index.min(last_index);
    let warm = warm(&entries, warm_bytes);
    let active = segments.last().copied();
    state.flushed_index = last_index;
    state.flushed_term = last_term;
    state.flushed_end = log_end;
    (state.active_base, state.active_bytes) = active.unwrap_or((-1, 0));
    state.epochs.truncate_end(log_end);
    state.epochs.truncate_start(state.log_start);
    // Those that were begun here begin with an entry that was replayed.
    let first_index = |at: usize, base: i64| {
        let replayed = || entries.iter().find(|entry| entry.is_batch && entry.offset == base);
        first_indexes.get(at).copied().unwrap_or_else(|| replayed().map_or(0, |entry| entry.index))
    };
    let segments = segments.iter().enumerate().map(|(at, (base, bytes))| RestoredSegment {
        name: on_disk.name(*base),
        bytes: *bytes,
        first_index: first_index(at, *base),
    });
    let restored = Restored {
        segments: segments.collect(),
        epochs: state.epochs.clone(),
        snapshot_offset,
        marks: state.marks.clone(),
        membership: state.membership.clone(),
        committed_index: state.committed_index,
        warm,
    };
    afterwards.extend(on_disk.leftovers.into_iter().map(Afterwards::Remove));
    let names_changed = names_changed || !written.is_empty();
    Ok(Outcome {
        state,
        producers: producers.state,
        snapshot,
        restored,
        last_index,
        last_term,
        log_end,
        written,
        afterwards,
        changed,
        names_changed,
    })
}

/// The newest entries, copied out of the WAL's pages, as far as the budget goes.
fn warm(entries: &[LogEntry], budget: &mut usize) -> Vec<TailEntry> {
    let mut from = entries.len();
    while from > 0 && entries[from - 1].payload.len() <= *budget {
        from -= 1;
        *budget -= entries[from].payload.len();
    }
    entries[from..]
        .iter()
        .map(|entry| TailEntry {
            index: entry.index,
            term: entry.term,
            base_offset: entry.offset,
            next_offset: entry.next_offset,
            max_timestamp: crate::flush::is_one_batch(&entry.payload).map_or(i64::MIN, |h| h.max_timestamp),
            bytes: Bytes::copy_from_slice(&entry.payload),
            file_seq: 0,
            lane: crate::types::Lane::Durable,
        })
        .collect()
}
