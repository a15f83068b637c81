//! Batches of a log that another replica has and cannot send as entries: those below the place where its entries begin.
//!
//! They are received into files of their own, which count for nothing, in the form of compacted segments: offsets may be
//! missing, indexes are unknown, and the name has the checksum of all of it. When all is there and synced, one record
//! (`GroupLog::begin_with`) makes them the log, in place of what was there; only then they get their names
//! (`put_in_place`), which the flusher or recovery sees to. So a crash leaves the old log or the new one. See FORMAT.md.
//!
//! Does not fetch anything, and does not know from whom it comes.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use flumen_io::{DirEntry, File, FileSystem, LastBlock, Mode};
use flumen_protocol::record_batch::{self, BatchHeader};

use crate::failpoint::{self, Failpoint};
use crate::group::{Group, GroupLog, Segment};
use crate::leader_epochs::LeaderEpochs;
use crate::mutant::{self, Mutant};
use crate::restore::index_bytes;
use crate::segment_index::{IndexBuilder, IndexEntry};
use crate::segment_name::{Compacted, SegmentName};
use crate::store::{Shard, is_no_space};
use crate::types::ReceiveError;
use crate::walk::{Step, Walk};

/// What a file is called while it is written, and when it is whole and does not count yet. Recovery removes both, unless the
/// log begins with it.
pub(crate) const UNFINISHED: &str = ".receiving";
pub(crate) const WAITING: &str = ".received";

/// Segments are at least this large, whatever the topic says, so that one record can name those of a terabyte.
const SEGMENT_BYTES_MIN: u64 = 64 << 20;
/// Index positions are 32 bits wide, and a segment is read as a whole to check it.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// What one record names: 2 MiB of it.
pub(crate) const SEGMENTS_MAX: usize = 1 << 16;

/// Generations of what is received are so far above those of the former log that none which compaction is giving away
/// meanwhile comes near.
const GENERATIONS_ABOVE: u32 = 1 << 16;

pub(crate) fn waiting_log(name: SegmentName) -> String {
    format!("{}{WAITING}", name.log_file())
}

pub(crate) fn waiting_index(name: SegmentName) -> String {
    format!("{}{WAITING}", name.index_file())
}

/// A segment that is being written.
struct Output {
    path: PathBuf,
    file: File,
    last: LastBlock,
    base: i64,
    /// Taken, and so much of it written.
    bytes: u64,
    written: u64,
    crc: u32,
    builder: IndexBuilder,
    index: Vec<IndexEntry>,
    term: u32,
    first_ms: Option<i64>,
}

impl Output {
    fn take(&mut self, header: &BatchHeader, batch: &[u8]) {
        let newest = header.newest_record_ms();
        self.term = u32::try_from(header.leader_epoch).unwrap_or(0);
        self.first_ms = self.first_ms.or(newest);
        let entry =
            self.builder.batch(header.base_offset, self.bytes, self.term, 0, newest.unwrap_or(i64::MIN));
        self.index.extend(entry);
        self.bytes += batch.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, batch);
    }
}

/// Takes batches for as long as they come, in order.
pub struct Receiver {
    shard: Rc<Shard>,
    group: Rc<Group>,
    /// Of the group's receivers; only the newest goes on.
    number: u64,
    begun: u64,
    log_start: i64,
    end: i64,
    next: i64,
    generation: u32,
    segment_bytes: u64,
    output: Option<Output>,
    segments: Vec<Segment>,
    epochs: LeaderEpochs,
    bytes: u64,
}

/// All that lies between a log start and the place where entries begin; on the disk, and not part of the log.
pub struct Received {
    group: u64,
    number: u64,
    begun: u64,
    pub(crate) log_start: i64,
    pub(crate) end: i64,
    pub(crate) segments: Vec<Segment>,
    pub(crate) epochs: LeaderEpochs,
}

impl Received {
    /// Where the log starts that it becomes.
    pub fn log_start(&self) -> i64 {
        self.log_start
    }

    /// Where its entries begin.
    pub fn end(&self) -> i64 {
        self.end
    }

    pub(crate) fn is_for(&self, group: &Group, offset: i64) -> bool {
        (self.group, self.number, self.begun) == (group.id, group.receivers.get(), group.inner.borrow().begun)
            && self.end == offset
    }
}

impl GroupLog {
    /// What it began with has not got its names yet: it cannot begin anew now.
    pub fn is_beginning(&self) -> bool {
        !self.group.unplaced.borrow().is_empty()
    }

    /// Makes ready for the batches from `log_start` to `end`. What earlier receivers have is worth nothing from now on.
    pub async fn receive(&self, log_start: i64, end: i64) -> Result<Receiver, ReceiveError> {
        if log_start < 0 || log_start >= end {
            return Err(ReceiveError::Malformed(format!("nothing lies from offset {log_start} to {end}")));
        }
        let (begun, generation, segment_bytes) = {
            let inner = self.group.inner.borrow();
            let known = inner.segments.iter().filter_map(|segment| segment.compacted);
            let highest = known.map(|compacted| compacted.generation).max().unwrap_or(0);
            let limit = inner.segment_limit().clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
            self.group.receivers.set(self.group.receivers.get() + 1);
            // With the number of the receiver, as the files of one may be removed while the next one writes.
            let above = GENERATIONS_ABOVE.saturating_add(self.group.receivers.get() as u32);
            (inner.begun, highest.saturating_add(above), limit)
        };
        let receiver = Receiver {
            shard: Rc::clone(&self.shard),
            group: Rc::clone(&self.group),
            number: self.group.receivers.get(),
            begun,
            log_start,
            end,
            next: log_start,
            generation,
            segment_bytes,
            output: None,
            segments: Vec::new(),
            epochs: LeaderEpochs::default(),
            bytes: 0,
        };
        receiver.go_on()?;
        self.remove_received().await?;
        receiver.go_on()?;
        Ok(receiver)
    }

    async fn remove_received(&self) -> Result<(), ReceiveError> {
        let (files, dir) = (self.shard.files.clone(), self.group.dir.clone());
        let of = |error: io::Error| ReceiveError::of(&self.group.dir, error);
        // Listed before another receiver can begin, as its files must stay however late this happens; no two have one name.
        let old: Vec<PathBuf> = files
            .list(&dir)
            .map_err(of)?
            .into_iter()
            .filter(|entry| is_unplaced(&entry.name))
            .map(|entry| dir.join(entry.name))
            .collect();
        if old.is_empty() {
            return Ok(());
        }
        let removed = self.shard.disk.off_thread(move || {
            old.iter().try_for_each(|path| match files.remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            })
        });
        removed.await.and_then(|result| result).map_err(of)
    }
}

/// A file that was received and has not got its name.
pub(crate) fn is_unplaced(file_name: &str) -> bool {
    file_name.ends_with(UNFINISHED) || file_name.ends_with(WAITING)
}

impl ReceiveError {
    fn of(path: &Path, error: io::Error) -> ReceiveError {
        match error.kind() {
            _ if is_no_space(&error) => ReceiveError::NoSpace,
            // The partition's deletion took it away.
            io::ErrorKind::NotFound => ReceiveError::Interrupted,
            _ => ReceiveError::Io { path: path.display().to_string(), source: error },
        }
    }
}

impl Receiver {
    /// Everything below it is here.
    pub fn next_offset(&self) -> i64 {
        self.next
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whoever sends has lost what lies below: it is no part of the log any more.
    pub fn skip_to(&mut self, log_start: i64) {
        if (self.next..self.end).contains(&log_start) {
            self.next = log_start;
            self.log_start = log_start;
        }
    }

    fn go_on(&self) -> Result<(), ReceiveError> {
        let group = &self.group;
        let stop = self.shard.closing.get() || group.deleting.get() || group.deleted.get();
        let other = group.inner.borrow().begun != self.begun
            || !group.unplaced.borrow().is_empty()
            || group.receivers.get() != self.number;
        if stop || other || group.is_damaged() {
            return Err(ReceiveError::Interrupted);
        }
        Ok(self.shard.check_poison()?)
    }

    async fn away<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, ReceiveError> {
        let done = self.shard.disk.off_thread(work).await;
        done.and_then(|result| result).map_err(|error| ReceiveError::of(path, error))
    }

    async fn begin(&self, base: i64) -> Result<Output, ReceiveError> {
        // No other receiver has a file of this name, should one still be at it.
        let path = self.group.dir.join(format!("{base:020}.{}{UNFINISHED}", self.number));
        let (files, at) = (self.shard.files.clone(), path.clone());
        let file = self
            .away(&path, move || {
                let mode = Mode { write: true, create: true, direct: true, ..Mode::default() };
                let file = files.open(&at, mode)?;
                file.set_len(0).map(|()| file)
            })
            .await?;
        Ok(Output {
            path,
            file,
            last: LastBlock::default(),
            base,
            bytes: 0,
            written: 0,
            crc: 0,
            builder: IndexBuilder::new(),
            index: Vec::new(),
            term: 0,
            first_ms: None,
        })
    }

    /// Takes whole batches that follow what is here; offsets may be missing between them. After an error it is of no use.
    pub async fn append(&mut self, batches: Bytes) -> Result<(), ReceiveError> {
        self.go_on()?;
        let malformed = |what: String| Err(ReceiveError::Malformed(what));
        if self.segments.is_empty()
            && self.output.is_none()
            && let Ok(first) = record_batch::parse_header(&batches)
            && first.next_offset() > self.next
        {
            // The log may start in the middle of it.
            self.next = self.next.min(first.base_offset);
        }
        let mut walk = Walk::with_holes(&batches, self.next, Some(self.end));
        let mut found = Vec::new();
        loop {
            match walk.step() {
                Step::Batch(header, at) => {
                    if !record_batch::crc_ok(&batches[at..walk.at()]) {
                        return malformed(format!("a wrong checksum at offset {}", header.base_offset));
                    }
                    found.push((header, batches.slice(at..walk.at())));
                }
                Step::End => break,
                Step::Short(_) => return malformed(format!("part of a batch at offset {}", walk.offset())),
                Step::Damaged(reason) => return malformed(reason),
            }
        }
        let mut bufs: Vec<Bytes> = Vec::new();
        for (header, batch) in found {
            let full = self.output.as_ref().is_some_and(|output| {
                output.bytes > 0 && output.bytes + batch.len() as u64 > self.segment_bytes
            });
            if full {
                self.write(&mut bufs).await?;
                self.close(header.base_offset).await?;
            }
            if self.output.is_none() {
                // The first begins where the log starts, or with the batch that this lies in; others follow each other.
                let base = self.segments.last().and_then(|last| last.compacted).map(|last| last.end);
                self.output = Some(self.begin(base.unwrap_or(self.next.min(header.base_offset))).await?);
            }
            let Some(output) = &mut self.output else { return Err(ReceiveError::Interrupted) };
            output.take(&header, &batch);
            self.epochs.assign(header.leader_epoch, header.base_offset);
            self.bytes += batch.len() as u64;
            self.next = header.next_offset();
            bufs.push(batch);
        }
        self.write(&mut bufs).await
    }

    async fn write(&mut self, bufs: &mut Vec<Bytes>) -> Result<(), ReceiveError> {
        self.go_on()?;
        let Some(output) = self.output.as_mut().filter(|_| !bufs.is_empty()) else { return Ok(()) };
        let written = self.shard.disk.append_at(&output.file, &mut output.last, bufs, output.written).await;
        written.map_err(|error| ReceiveError::of(&output.path, error))?;
        output.written = output.bytes;
        bufs.clear();
        self.go_on()
    }

    /// The segment that is being written goes up to `end`, and is synced.
    async fn close(&mut self, end: i64) -> Result<(), ReceiveError> {
        let Some(mut output) = self.output.take() else { return Ok(()) };
        if self.segments.len() >= SEGMENTS_MAX {
            return Err(ReceiveError::Malformed("more segments than one record can name".to_owned()));
        }
        let (cut, bytes) = (output.file.clone(), output.bytes);
        self.away(&output.path, move || cut.set_len(bytes)).await?;
        {
            let mut alone = self.shard.sync_alone().await?;
            if !mutant::is(Mutant::ReceivesWithoutSync)
                && let Err(error) = self.shard.disk.fdatasync(&output.file).await
            {
                self.shard.sync_failed(&mut alone, &output.path, &error);
            }
            self.shard.check_poison()?;
        }
        self.go_on()?;
        let compacted = Compacted { end, generation: self.generation, crc: output.crc };
        let name = SegmentName { base: output.base, compacted: Some(compacted) };
        output.index.extend(output.builder.end(end, bytes, output.term, 0));
        let index = index_bytes(output.base, &output.index);
        let dir = &self.group.dir;
        let (files, from) = (self.shard.files.clone(), output.path.clone());
        let (to, index_path) = (dir.join(waiting_log(name)), dir.join(waiting_index(name)));
        // The index is not synced: one that does not fit is built again.
        self.away(&output.path, move || {
            files.write(&index_path, &index)?;
            files.rename(&from, &to)
        })
        .await?;
        let mut segment = Segment::of(name, bytes);
        segment.max_timestamp = Some(output.builder.max_timestamp);
        segment.first_timestamp = Some(output.first_ms.unwrap_or(-1));
        self.segments.push(segment);
        Ok(())
    }

    /// Everything up to the end has come. On the disk when this returns.
    pub async fn finish(mut self) -> Result<Received, ReceiveError> {
        self.go_on()?;
        if self.output.is_none() && self.segments.is_empty() {
            // Compaction has left nothing.
            self.output = Some(self.begin(self.log_start).await?);
        }
        self.close(self.end).await?;
        let (files, dir) = (self.shard.files.clone(), self.group.dir.clone());
        let root = self.shard.segments_root();
        {
            let mut alone = self.shard.sync_alone().await?;
            // The directory may be new, and its own name not sure.
            let synced = self
                .shard
                .disk
                .off_thread(move || files.sync_dir(&dir).and_then(|()| files.sync_dir(&root)))
                .await;
            if let Err(error) = synced.and_then(|result| result) {
                let going = self.group.deleting.get() || self.group.deleted.get();
                if !(going && error.kind() == io::ErrorKind::NotFound) {
                    self.shard.sync_failed(&mut alone, &self.group.dir, &error);
                }
            }
            self.shard.check_poison()?;
        }
        self.go_on()?;
        failpoint::pass(Failpoint::ReceivedSynced);
        Ok(Received {
            group: self.group.id,
            number: self.number,
            begun: self.begun,
            log_start: self.log_start,
            end: self.end,
            segments: self.segments,
            epochs: self.epochs,
        })
    }
}

/// Gives what a log began with its names. Plain calls, so that nobody reads in between. `Err`: some have not got theirs, and
/// the rest is to be done again.
pub(crate) fn put_in_place(shard: &Shard, group: &Group) -> Result<(), (PathBuf, io::Error)> {
    loop {
        let next = group.unplaced.borrow().last().copied();
        let Some(name) = next else { break };
        let path = |file: String| group.dir.join(file);
        let (index, log) = (path(waiting_index(name)), path(waiting_log(name)));
        let counts = group.inner.borrow().segments.iter().any(|segment| segment.name() == name);
        let done = match counts {
            true => {
                // One that is not there is built again.
                let _ = shard.files.rename(&index, &path(name.index_file()));
                shard.files.rename(&log, &path(name.log_file()))
            }
            // Retention has taken it since.
            false => {
                let _ = shard.files.remove_file(&index);
                shard.files.remove_file(&log)
            }
        };
        match done {
            Err(error) if counts || error.kind() != io::ErrorKind::NotFound => return Err((log, error)),
            _ => shard.forget_file(group.id, name.base),
        }
        group.unplaced.borrow_mut().pop();
    }
    failpoint::pass(Failpoint::ReceivedPlaced);
    Ok(())
}

/// Retention may have taken it since.
pub(crate) fn is_gone(name: SegmentName, log_start: i64) -> bool {
    name.holes_to().is_some_and(|end| end <= log_start)
}

/// At a start: the log is these segments, each under one of its names, and no other file counts. Returns what is in the
/// directory then; `Err`: what is missing. Whoever calls has to sync the directory.
pub(crate) fn place_at_start(
    files: &FileSystem,
    dir: &Path,
    listed: &[DirEntry],
    segments: &[(SegmentName, u64)],
    log_start: i64,
) -> io::Result<Result<Vec<DirEntry>, String>> {
    let there = |name: &str| listed.iter().any(|entry| entry.name == name);
    let lacks = segments.iter().find(|(name, _)| {
        !is_gone(*name, log_start) && !there(&waiting_log(*name)) && !there(&name.log_file())
    });
    if let Some((name, _)) = lacks {
        return Ok(Err(format!("the segment {name}, with which the log began, is missing")));
    }
    for entry in listed {
        let other = SegmentName::parse(&entry.name).filter(|name| segments.iter().all(|(of, _)| of != name));
        if let Some(other) = other {
            files.remove_file(&dir.join(&entry.name))?;
            if there(&other.index_file()) {
                files.remove_file(&dir.join(other.index_file()))?;
            }
        }
    }
    for (name, _) in segments {
        for (from, to) in [(waiting_index(*name), name.index_file()), (waiting_log(*name), name.log_file())] {
            if there(&from) {
                files.rename(&dir.join(from), &dir.join(to))?;
            }
        }
    }
    files.list(dir).map(Ok)
}

/// Number u32, and per segment base i64, end i64, generation u32, crc u32, bytes u64.
pub(crate) fn encode_names(segments: &[Segment], out: &mut Vec<u8>) {
    out.extend_from_slice(&(segments.len() as u32).to_le_bytes());
    for segment in segments {
        let Compacted { end, generation, crc } = segment.compacted.expect("what is received has such names");
        out.extend_from_slice(&segment.base.to_le_bytes());
        out.extend_from_slice(&end.to_le_bytes());
        out.extend_from_slice(&generation.to_le_bytes());
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&segment.bytes.to_le_bytes());
    }
}

pub(crate) fn decode_names(cursor: &mut crate::codec::Cursor<'_>) -> Option<Vec<(SegmentName, u64)>> {
    let count = usize::try_from(cursor.u32()?).ok().filter(|count| (1..=SEGMENTS_MAX).contains(count))?;
    let mut names = Vec::new();
    for _ in 0..count {
        let base = cursor.i64().filter(|base| *base >= 0)?;
        let end = cursor.i64().filter(|end| *end > base)?;
        let compacted = Compacted { end, generation: cursor.u32()?, crc: cursor.u32()? };
        names.push((SegmentName { base, compacted: Some(compacted) }, cursor.u64()?));
    }
    Some(names)
}
