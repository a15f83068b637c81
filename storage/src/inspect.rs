//! Looking at a data directory that no broker uses: what is in it, and whether all of it is whole.
//!
//! Offline, synchronous, and writes nothing. Judges the write-ahead log with the code that recovery judges it with, so
//! what is called damage here is what a start would refuse to serve, and what recovery repairs by itself is said to be so.
//! Memory is bounded by one WAL ring and one batch at a time, never by a segment. Does not decode records (`dump.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use flumen_io::{DirEntry, File, FileSystem, Mode};
use flumen_protocol::record_batch::{self, BatchHeader, HEADER_BYTES};

use crate::data_dir::{FORMAT, is_read, open_error};
use crate::group_state::GroupState;
use crate::producer_state::ProducerState;
use crate::receive;
use crate::recovery::{self, Current, Records, Ring};
use crate::replay::{Action, replay};
use crate::segment_index::{self, INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, IndexEntry};
use crate::segment_name::{self, SegmentName};
use crate::types::{GroupId, LANES, Lane, OpenError};

/// Read at once: some hundred batches of a kilobyte.
const WINDOW_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// What a crash leaves, or a running store; the next start deals with it.
    Normal,
    /// Damaged, but made again from something that is whole.
    Rebuilt,
    /// Acknowledged records may be unreadable: a start refuses to serve the partition.
    Damage,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub path: PathBuf,
    /// Byte in the file, where it is one place.
    pub position: Option<u64>,
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    pub partitions: u64,
    pub segments: u64,
    pub segment_bytes: u64,
    pub batches: u64,
    pub records: u64,
    /// In the WAL only.
    pub unflushed_entries: u64,
    pub wal_commits: u64,
    pub index_entries: u64,
    pub snapshots: u64,
    pub damaged: u64,
    pub rebuilt: u64,
}

/// A data directory as it lies there. Holds its lock, so that no broker starts meanwhile.
pub struct Inspection {
    files: FileSystem,
    root: PathBuf,
    _lock: Option<File>,
}

/// One partition, as its `group.meta` and the WAL say together.
struct Partition {
    dir_name: String,
    state: GroupState,
    /// Segments are good up to this offset; what follows is replaced by entries in the WAL.
    cut: Option<i64>,
    unflushed: usize,
    received: Option<Vec<(SegmentName, u64)>>,
}

impl Inspection {
    pub fn open(root: impl AsRef<Path>) -> Result<Inspection, OpenError> {
        Self::open_on(FileSystem::machine(), root)
    }

    pub fn open_on(files: FileSystem, root: impl AsRef<Path>) -> Result<Inspection, OpenError> {
        let root = root.as_ref();
        let shown = || root.display().to_string();
        if !files.is_dir(root) {
            return Err(OpenError::NotADirectory { path: shown() });
        }
        match files.read(&root.join("FORMAT")) {
            Ok(found) if is_read(&found) => {}
            Ok(found) => {
                let found = String::from_utf8_lossy(found.trim_ascii()).chars().take(60).collect();
                return Err(OpenError::Format { path: shown(), found, want: FORMAT });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(OpenError::NotOurs { path: shown() });
            }
            Err(error) => return Err(open_error(root, "reading FORMAT", error)),
        }
        let lock_path = root.join("LOCK");
        let lock = match files.exists(&lock_path).then(|| files.lock(&lock_path)) {
            Some(Ok(Some(lock))) => Some(lock),
            Some(Ok(None)) => return Err(OpenError::InUse { path: shown() }),
            // A copy, or a disk that may only be read: nobody can write there.
            None => None,
            Some(Err(error)) if is_read_only(&error) => None,
            Some(Err(error)) => return Err(open_error(&lock_path, "locking", error)),
        };
        Ok(Inspection { files, root: root.to_owned(), _lock: lock })
    }

    pub(crate) fn files(&self) -> &FileSystem {
        &self.files
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Reads everything and reports what is not as it should be, in no particular order of importance.
    pub fn verify(&self, report: &mut dyn FnMut(Finding)) -> Result<Summary, OpenError> {
        let mut summary = Summary::default();
        let (mut damaged, mut rebuilt) = (0, 0);
        let mut count = |finding: Finding| {
            match finding.severity {
                Severity::Damage => damaged += 1,
                Severity::Rebuilt => rebuilt += 1,
                Severity::Normal => {}
            }
            report(finding);
        };
        let (current, records) = self.read_wal(&mut summary, &mut count)?;
        let partitions = self.partitions(current, &records, &mut count)?;
        for partition in &partitions {
            summary.partitions += 1;
            summary.unflushed_entries += partition.unflushed as u64;
            self.verify_partition(partition, &mut summary, &mut count)?;
        }
        summary.damaged = damaged;
        summary.rebuilt = rebuilt;
        Ok(summary)
    }

    fn read_wal(
        &self,
        summary: &mut Summary,
        report: &mut dyn FnMut(Finding),
    ) -> Result<(Option<Current>, Records), OpenError> {
        let wal = self.root.join("wal");
        let mut all = Records::new();
        let path = wal.join("current");
        let current = match recovery::read_current(&self.files, &path) {
            Ok(Some(current)) => current,
            Ok(None) => return Ok((None, all)),
            Err(OpenError::Config(what)) => {
                report(Finding { severity: Severity::Damage, path, position: None, what });
                return Ok((None, all));
            }
            Err(error) => return Err(error),
        };
        let wal_id = current.wal_id;
        for (shard, lanes) in recovery::rings(&self.files, &wal, wal_id)? {
            let durable = lanes[Lane::Durable as usize].as_ref();
            if let Some(deleted) = durable.and_then(|ring| recovery::clean(&self.files, ring, wal_id)) {
                all.extend(deleted.into_iter().map(|group| (group, vec![((u64::MAX, 0), Action::Delete)])));
                continue;
            }
            for (lane, path) in LANES.into_iter().zip(&lanes) {
                let Some(path) = path else { continue };
                let ring: Ring = recovery::read_ring(&self.files, path, lane, shard, wal_id, &mut all)?;
                summary.wal_commits += ring.commits;
                if ring.torn {
                    let what = "ends in an unfinished commit, which was never acknowledged".to_owned();
                    report(Finding { severity: Severity::Normal, path: path.clone(), position: None, what });
                }
                for (what, _) in ring.damage {
                    report(Finding { severity: Severity::Damage, path: path.clone(), position: None, what });
                }
            }
        }
        for records in all.values_mut() {
            records.sort_by_key(|(position, _)| *position);
        }
        Ok((Some(current), all))
    }

    /// Every partition with what is known of it; reports directories that are no partition's.
    fn partitions(
        &self,
        current: Option<Current>,
        records: &Records,
        report: &mut dyn FnMut(Finding),
    ) -> Result<Vec<Partition>, OpenError> {
        let (log, wal) = (self.root.join("log"), self.root.join("wal"));
        let wal_id = current.map_or(0, |current| current.wal_id);
        let mut saved = recovery::read_states(&self.files, &wal, current)?;
        if let Some(what) = saved.damage() {
            let path = wal.join(crate::states_file::file_name(wal_id));
            report(Finding { severity: Severity::Damage, path, position: None, what });
        }
        let mut states: BTreeMap<GroupId, GroupState> = BTreeMap::new();
        let mut without: Vec<(String, Vec<DirEntry>)> = Vec::new();
        let mut normal = |path: PathBuf, what: &str| {
            let what = what.to_owned();
            report(Finding { severity: Severity::Normal, path, position: None, what });
        };
        let mut deleted: BTreeSet<GroupId> = BTreeSet::new();
        let mut marked: Vec<(PathBuf, String)> = Vec::new();
        for entry in self.files.list(&log).map_err(|e| open_error(&log, "listing", e))? {
            let path = log.join(&entry.name);
            if !entry.is_dir {
                continue;
            }
            if entry.name.ends_with(".deleted") {
                deleted.extend(recovery::deleted_group(&entry.name));
                normal(path, "a deletion that was decided; the next start carries it out");
                continue;
            }
            let listed = recovery::list(&self.files, &path)?;
            let known = recovery::look_at(&self.files, &path, &entry.name, &listed, &mut saved, current)?;
            marked.extend(known.marked.map(|reason| (path.join(recovery::MARKER), reason)));
            match known.base.state {
                Some(state) => drop(states.insert(state.group, state)),
                None => without.push((entry.name, listed)),
            }
        }
        for (path, what) in marked {
            let what = format!("put aside by an earlier start: {what}");
            report(Finding { severity: Severity::Damage, path, position: None, what });
        }
        let mut partitions = Vec::new();
        let groups: BTreeSet<GroupId> = states.keys().chain(records.keys()).copied().collect();
        for group in groups.difference(&deleted) {
            let base = states.get(group).map(|state| recovery::as_base(state.clone(), wal_id));
            let path = match &base {
                Some((state, _)) => log.join(&state.dir_name).join("group.meta"),
                None => log.clone(),
            };
            let found = records.get(group).map_or(&[][..], Vec::as_slice);
            match replay(base, found) {
                Ok(Some(replayed)) if !replayed.deleted => {
                    without.retain(|(name, _)| *name != replayed.state.dir_name);
                    partitions.push(Partition {
                        dir_name: replayed.state.dir_name.clone(),
                        unflushed: replayed.entries.len(),
                        cut: replayed.cut,
                        received: replayed.received,
                        state: replayed.state,
                    });
                }
                Ok(_) => {}
                Err(what) => {
                    let what = format!("group {group}: {what}");
                    report(Finding { severity: Severity::Damage, path, position: None, what });
                }
            }
        }
        for (name, listed) in &without {
            let path = log.join(name);
            let (severity, what) = match recovery::is_unused(listed) && !saved.hidden {
                true => {
                    (Severity::Normal, "created, and nothing of it was committed; the next start removes it")
                }
                false => (Severity::Damage, recovery::STATELESS),
            };
            report(Finding { severity, path, position: None, what: what.to_owned() });
        }
        Ok(partitions)
    }

    fn verify_partition(
        &self,
        partition: &Partition,
        summary: &mut Summary,
        report: &mut dyn FnMut(Finding),
    ) -> Result<(), OpenError> {
        let dir = self.root.join("log").join(&partition.dir_name);
        if !self.files.is_dir(&dir) {
            // Its first run never came; all of it is in the WAL.
            return Ok(());
        }
        let state = &partition.state;
        let (segments, rest) = match &partition.received {
            Some(names) => self.received(&dir, names, state.log_start, report)?,
            None => self.segments(&dir)?,
        };
        let waiting = |name: SegmentName| {
            let path = dir.join(receive::waiting_log(name));
            partition.received.is_some() && self.files.exists(&path)
        };
        let counted = |base: i64, len: u64| match base.cmp(&state.active_base) {
            std::cmp::Ordering::Less => Some(len),
            std::cmp::Ordering::Equal => Some(state.active_bytes),
            std::cmp::Ordering::Greater => None,
        };
        let mut reached: Option<i64> = None;
        let first = summary.segments;
        for (name, len) in &segments {
            let base = &name.base;
            let path = match waiting(*name) {
                true => dir.join(receive::waiting_log(*name)),
                false => dir.join(name.log_file()),
            };
            let mut say = |severity, position, what: String| {
                report(Finding { severity, path: path.clone(), position, what });
            };
            let Some(bytes) = counted(*base, *len) else {
                let what = "begun and not counted yet; the next start writes it again from the WAL";
                say(Severity::Normal, None, what.to_owned());
                continue;
            };
            // What lies behind a cut that is due may have gone already; that all before it is there shows in the offsets.
            let bytes = if partition.cut.is_some() { bytes.min(*len) } else { bytes };
            if bytes > *len {
                let what = format!("{len} bytes where {bytes} are counted");
                say(Severity::Damage, None, what);
                continue;
            }
            if let Some(end) = reached.replace(*base).filter(|end| end != base)
                && *base > state.log_start
            {
                say(
                    Severity::Damage,
                    None,
                    format!("records from offset {end} to {base} are missing before it"),
                );
            }
            if summary.segments == first && *base > state.log_start {
                say(
                    Severity::Damage,
                    None,
                    format!("records from offset {} on are missing", state.log_start),
                );
            }
            summary.segments += 1;
            summary.segment_bytes += bytes;
            let index_path = match waiting(*name) {
                true => dir.join(receive::waiting_index(*name)),
                false => dir.join(name.index_file()),
            };
            let index = self.read_index(&index_path, *name, bytes);
            let walked = self.verify_segment(&path, *name, bytes, index.as_ref().ok(), summary)?;
            if let Some((position, what)) = walked.damage {
                if partition.cut.is_some_and(|cut| walked.end >= cut) {
                    say(Severity::Normal, Some(position), format!("behind what the next start cuts: {what}"));
                    reached = Some(walked.end);
                    continue;
                }
                say(Severity::Damage, Some(position), what);
                reached = None;
                continue;
            }
            reached = Some(walked.end);
            if *len > bytes {
                let what = format!(
                    "{} bytes after what is counted: reserved, or written again from the WAL",
                    len - bytes
                );
                say(Severity::Normal, Some(bytes), what);
            }
            let wrong = match index {
                Ok(_) => walked.index_wrong,
                Err(what) => Some(what),
            };
            if let Some(what) = wrong {
                report(Finding { severity: Severity::Rebuilt, path: index_path, position: None, what });
            }
        }
        // Offsets of Raft entries in segments; a cut that is due takes its part away.
        let end = partition.cut.map_or(state.flushed_end, |cut| cut.min(state.flushed_end));
        if segments.iter().any(|(name, _)| name.base <= state.active_base)
            && let Some(found) = reached
            && found < end
        {
            let what = format!("segments end at offset {found}, and offset {end} is counted");
            report(Finding { severity: Severity::Damage, path: dir.clone(), position: None, what });
        }
        if segments.is_empty() && state.flushed_end > state.log_start {
            let what =
                format!("no segment where records {} to {} are counted", state.log_start, state.flushed_end);
            report(Finding { severity: Severity::Damage, path: dir.clone(), position: None, what });
        }
        for name in rest {
            let path = dir.join(&name);
            if partition.received.is_some() && SegmentName::parse(&name).is_some() {
                let what = "of the log that was there before this one began; the next start removes it";
                report(Finding { severity: Severity::Normal, path, position: None, what: what.to_owned() });
                continue;
            }
            if receive::is_unplaced(&name) {
                let what =
                    "received from another replica, and not part of the log; the next start removes it";
                report(Finding { severity: Severity::Normal, path, position: None, what: what.to_owned() });
                continue;
            }
            if SegmentName::parse(&name).is_some() || name.ends_with(crate::compact::UNFINISHED) {
                let what = "left by compaction, which has replaced it or did not finish it; the next start removes it";
                report(Finding { severity: Severity::Normal, path, position: None, what: what.to_owned() });
                continue;
            }
            if let Some(offset) = name.strip_suffix(".snapshot").and_then(|name| name.parse::<i64>().ok()) {
                summary.snapshots += 1;
                let bytes = self.files.read(&path).map_err(|e| open_error(&path, "reading", e))?;
                let what = match ProducerState::decode(&bytes) {
                    Ok((_, at, _)) if at == offset => continue,
                    Ok((_, at, _)) => format!("says that it is of offset {at}"),
                    Err(error) => error.to_string(),
                };
                let what = format!("{what}; producer state is made again from batch headers");
                report(Finding { severity: Severity::Rebuilt, path, position: None, what });
            }
        }
        Ok(())
    }

    /// As `segments`, of a log that began with those that it received, some of which have not got their names.
    fn received(
        &self,
        dir: &Path,
        names: &[(SegmentName, u64)],
        log_start: i64,
        report: &mut dyn FnMut(Finding),
    ) -> Result<(Vec<(SegmentName, u64)>, Vec<String>), OpenError> {
        let listed = self.files.list(dir).map_err(|e| open_error(dir, "listing", e))?;
        let mut segments = Vec::new();
        for (name, _) in names {
            let files = [receive::waiting_log(*name), name.log_file()];
            match files.iter().find_map(|file| listed.iter().find(|entry| entry.name == *file)) {
                Some(entry) => segments.push((*name, entry.len)),
                None if receive::is_gone(*name, log_start) => {}
                None => {
                    let what = format!("the segment {name}, with which the log began, is missing");
                    let path = dir.to_owned();
                    report(Finding { severity: Severity::Damage, path, position: None, what });
                }
            }
        }
        let is_one = |file: &str| {
            names.iter().any(|(name, _)| {
                [receive::waiting_log(*name), receive::waiting_index(*name), name.log_file()]
                    .iter()
                    .any(|of| of == file)
            })
        };
        let rest = listed.into_iter().map(|entry| entry.name).filter(|file| !is_one(file)).collect();
        Ok((segments, rest))
    }

    /// Names and file lengths of the segments of a partition that count, in order, and the names of other files.
    pub(crate) fn segments(&self, dir: &Path) -> Result<(Vec<(SegmentName, u64)>, Vec<String>), OpenError> {
        let (mut found, mut rest) = (Vec::new(), Vec::new());
        for entry in self.files.list(dir).map_err(|e| open_error(dir, "listing", e))? {
            match SegmentName::parse(&entry.name) {
                Some(name) => found.push((name, entry.len)),
                None => rest.push(entry.name),
            }
        }
        let (segments, replaced) = segment_name::choose(found);
        rest.extend(replaced.iter().map(SegmentName::log_file));
        rest.sort_unstable();
        Ok((segments, rest))
    }

    fn read_index(&self, path: &Path, name: SegmentName, bytes: u64) -> Result<Vec<IndexEntry>, String> {
        let base = name.base;
        let raw = self.files.read(path).map_err(|error| format!("cannot be read: {error}"))?;
        let entries = segment_index::decode(&raw, base, bytes).ok_or("its header is damaged")?;
        let written = raw.len().saturating_sub(INDEX_HEADER_BYTES) / INDEX_ENTRY_BYTES;
        // Those of a run that was not counted are beyond the segment, and decoding ends there.
        let beyond = raw[INDEX_HEADER_BYTES..]
            .chunks_exact(INDEX_ENTRY_BYTES)
            .skip(entries.len())
            .all(|raw| segment_index::decode_entry(raw).is_some_and(|e| u64::from(e.position) > bytes));
        match beyond {
            true => Ok(entries),
            false => Err(format!("entry {} of {written} is damaged", entries.len())),
        }
    }

    fn verify_segment(
        &self,
        path: &Path,
        name: SegmentName,
        bytes: u64,
        index: Option<&Vec<IndexEntry>>,
        summary: &mut Summary,
    ) -> Result<Walked, OpenError> {
        let file = self.files.open(path, Mode::default()).map_err(|e| open_error(path, "opening", e))?;
        let mut crc = 0;
        let mut walked = Walked { end: name.base, damage: None, index_wrong: None };
        let mut index = index.map_or(&[][..], Vec::as_slice).iter().peekable();
        summary.index_entries += index.len() as u64;
        let mut max_timestamp = i64::MIN;
        let mut batches = Batches::new(&file, bytes);
        loop {
            let position = batches.position();
            while let Some(entry) = index.next_if(|entry| u64::from(entry.position) <= position) {
                let offset_right = match name.holes_to() {
                    None => entry.offset == walked.end,
                    Some(end) if position == bytes => entry.offset == end,
                    Some(end) => (walked.end..end).contains(&entry.offset),
                };
                let right = u64::from(entry.position) == position
                    && offset_right
                    && entry.max_timestamp_before == max_timestamp;
                if !right {
                    let what = format!("the entry for offset {} does not lead to it", entry.offset);
                    walked.index_wrong.get_or_insert(what);
                }
            }
            match batches.step().map_err(|e| open_error(path, "reading", e))? {
                Found::End => {
                    if let Some(compacted) = name.compacted {
                        walked.end = compacted.end;
                        if crc != compacted.crc {
                            let what = "the segment does not have the checksum that its name says".to_owned();
                            walked.damage = Some((0, what));
                        }
                    }
                    return Ok(walked);
                }
                Found::Damaged(what) => {
                    walked.damage = Some((position, what));
                    return Ok(walked);
                }
                Found::Batch(header, batch) => {
                    crc = crc32c::crc32c_append(crc, batch);
                    let fits = match name.holes_to() {
                        None => header.base_offset == walked.end,
                        Some(end) => header.base_offset >= walked.end && header.next_offset() <= end,
                    };
                    let what = if !fits {
                        format!(
                            "batch with offset {} where offset {} should be",
                            header.base_offset, walked.end
                        )
                    } else if !record_batch::crc_ok(batch) {
                        format!("the batch of offset {} does not have its checksum", header.base_offset)
                    } else {
                        summary.batches += 1;
                        summary.records += u64::try_from(header.record_count).unwrap_or(0);
                        walked.end = header.next_offset();
                        max_timestamp = max_timestamp.max(header.newest_record_ms().unwrap_or(i64::MIN));
                        continue;
                    };
                    walked.damage = Some((position, what));
                    return Ok(walked);
                }
            }
        }
    }
}

struct Walked {
    end: i64,
    damage: Option<(u64, String)>,
    index_wrong: Option<String>,
}

fn is_read_only(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

pub(crate) enum Found<'a> {
    Batch(BatchHeader, &'a [u8]),
    Damaged(String),
    End,
}

/// Whole batches of a segment one after the other.
pub(crate) struct Batches<'f> {
    file: &'f File,
    end: u64,
    window: Vec<u8>,
    /// Where the window begins in the file, and how far in it the next batch begins.
    from: u64,
    at: usize,
}

impl<'f> Batches<'f> {
    pub fn new(file: &'f File, end: u64) -> Self {
        Self { file, end, window: Vec::new(), from: 0, at: 0 }
    }

    /// From a batch on that is known to begin there.
    pub fn starting(file: &'f File, end: u64, position: u64) -> Self {
        Self { file, end, window: Vec::new(), from: position, at: 0 }
    }

    pub fn position(&self) -> u64 {
        self.from + self.at as u64
    }

    /// Makes the next `want` bytes part of the window; `false` when the segment ends before them.
    fn fill(&mut self, want: usize) -> io::Result<bool> {
        if self.window.len() - self.at >= want {
            return Ok(true);
        }
        let left = self.end - self.position();
        if left < want as u64 {
            return Ok(false);
        }
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(want.max(WINDOW_BYTES));
        (self.from, self.at) = (self.position(), 0);
        self.window.resize(take, 0);
        let got = self.file.read_full_at(&mut self.window, self.from)?;
        self.window.truncate(got);
        Ok(got >= want)
    }

    pub fn step(&mut self) -> io::Result<Found<'_>> {
        let position = self.position();
        if position >= self.end {
            return Ok(Found::End);
        }
        if !self.fill(HEADER_BYTES)? {
            return Ok(Found::Damaged(format!("{} bytes at the end are no batch", self.end - position)));
        }
        let header = match record_batch::parse_header(&self.window[self.at..]) {
            Ok(header) => header,
            Err(error) => return Ok(Found::Damaged(format!("no batch: {error}"))),
        };
        let total = header.total_bytes();
        if !self.fill(total)? {
            let what = format!("the batch of offset {} goes on beyond the end", header.base_offset);
            return Ok(Found::Damaged(what));
        }
        let start = self.at;
        self.at += total;
        Ok(Found::Batch(header, &self.window[start..start + total]))
    }
}
