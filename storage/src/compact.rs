//! Compaction of one partition: of every key the last record stays, of the others nothing.
//!
//! Runs as a task of the shard, one partition at a time, and only in segments: never the one that is written to, nothing
//! above the high watermark, nothing that recovery might still take from the WAL. A pass reads the dirty part and
//! remembers the newest offset of each key (`compact_scan`), then rewrites the log up to there (`compact_filter`), a few
//! segments at a time: into a file with a name of its own, which is synced, gets its final name, and from then on stands
//! for the range of the segments that it replaces, whether those are still there or not (`segment_name`). So a crash
//! leaves the old or the new, and readers find either.
//!
//! Batches are decoded away from the shard's thread in small pieces, with a pause after each, so that requests do not
//! wait. A full disk, or a log that changes meanwhile, ends the pass; what it has replaced by then is good, and the clean
//! offset moves only when it has ended well.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_io::{File, FileSystem, LastBlock, Mode};
use flumen_protocol::record_batch::{self, BatchHeader};

use crate::codec::Cursor;
use crate::compact_filter::{Fate, Filter, Rules};
use crate::compact_map::KEYS_MAX;
use crate::compact_policy::{self, Candidate};
use crate::compact_scan::Scan;
use crate::failpoint::{self, Failpoint};
use crate::flush::FlushError;
use crate::group::{Group, GroupLog, Segment};
use crate::mutant::{self, Mutant};
use crate::read::{Place, damaged, learn_timestamps};
use crate::restore::index_bytes;
use crate::retire::checkpoint;
use crate::segment_index::{IndexBuilder, IndexEntry};
use crate::segment_name::{Compacted, SegmentName};
use crate::store::{Shard, add, is_no_space};
use crate::types::{CompactError, CompactionConfig, CompactionOutcome, Lane, ReadError};
use crate::walk::{Step, Walk};

/// What a file is called until it is complete. Recovery removes those.
pub(crate) const UNFINISHED: &str = ".compacting";

/// Holds the clean offset of a partition.
pub(crate) const CLEAN_FILE: &str = "cleaned";
const CLEAN_MAGIC: [u8; 4] = *b"FLCL";
const CLEAN_VERSION: u16 = 1;

/// Read, decoded and written at a time, unless one batch is larger: about a millisecond of work.
const PIECE_BYTES: usize = 256 << 10;

/// What compaction reads and writes per second and shard, at most: a tenth of a disk that does 600 MB/s.
const BYTES_PER_S: u64 = 64 << 20;

/// Passes of one call; a log with more keys goes on with the next one.
const PASSES_MAX: u32 = 16;

fn encode_clean(offset: i64) -> Vec<u8> {
    let mut out = CLEAN_MAGIC.to_vec();
    out.extend_from_slice(&CLEAN_VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&offset.to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

fn decode_clean(bytes: &[u8]) -> Option<i64> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    let mut cursor = Cursor::new(body.get(8..)?);
    let offset = cursor.i64().filter(|offset| *offset >= 0 && cursor.is_empty())?;
    let good = crc32c::crc32c(body) == u32::from_le_bytes(*crc)
        && body[..4] == CLEAN_MAGIC
        && body[4..6] == CLEAN_VERSION.to_le_bytes();
    good.then_some(offset)
}

/// Whole batches of a segment, as they come from the disk.
struct Piece {
    bytes: Bytes,
    batches: Vec<(BatchHeader, usize)>,
}

impl Piece {
    fn batches(&self) -> impl Iterator<Item = (&BatchHeader, Bytes)> + '_ {
        self.batches.iter().map(|(header, at)| (header, self.bytes.slice(*at..at + header.total_bytes())))
    }

    /// What is rewritten gets a checksum of its own, so nothing may be wrong with it before.
    fn check(&self) -> Result<(), String> {
        match self.batches().find(|(_, batch)| !record_batch::crc_ok(batch)) {
            None => Ok(()),
            Some((header, _)) => Err(format!("wrong checksum of the batch at offset {}", header.base_offset)),
        }
    }
}

struct Reader {
    place: Place,
    file: File,
    position: u64,
    offset: i64,
    want: usize,
    crc: u32,
}

impl Reader {
    fn open(pass: &Pass, place: Place) -> Result<Self, CompactError> {
        let path = pass.group.segment_path(place.name);
        let mode = Mode { direct: true, ..Mode::default() };
        let file = pass.shard.files.open(&path, mode).map_err(|error| pass.failed(&path, error))?;
        Ok(Self { place, file, position: 0, offset: place.name.base, want: PIECE_BYTES, crc: 0 })
    }

    async fn next(&mut self, pass: &Pass) -> Result<Option<Piece>, CompactError> {
        let bad = |reason: String| pass.damaged(self.place.name, reason);
        while self.position < self.place.bytes {
            pass.go_on()?;
            let left = self.place.bytes - self.position;
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(self.want);
            let bytes = pass
                .shard
                .disk
                .read_at(&self.file, self.position, len)
                .await
                .map_err(|error| pass.failed(self.file.path(), error))?;
            add(&pass.shard.counters.compaction_read, bytes.len() as u64);
            pass.pause(bytes.len()).await;
            let mut walk = Walk::with_holes(&bytes, self.offset, self.place.name.holes_to());
            let mut batches = Vec::new();
            let need = loop {
                match walk.step() {
                    Step::Batch(header, at) => batches.push((header, at)),
                    Step::End => break 0,
                    Step::Short(need) => break need,
                    Step::Damaged(reason) => return Err(bad(reason)),
                }
            };
            if batches.is_empty() {
                if bytes.len() < len || need as u64 > left {
                    return Err(bad(format!("ends inside of the batch at offset {}", self.offset)));
                }
                self.want = self.want.max(need);
                continue;
            }
            let whole = walk.at();
            self.position += whole as u64;
            self.offset = walk.offset();
            self.want = PIECE_BYTES;
            let bytes = bytes.slice(..whole);
            self.crc = crc32c::crc32c_append(self.crc, &bytes);
            return Ok(Some(Piece { bytes, batches }));
        }
        if self.place.name.compacted.is_some_and(|compacted| compacted.crc != self.crc) {
            return Err(bad("its content is not what compaction wrote".to_owned()));
        }
        Ok(None)
    }
}

/// The segment that a pass is writing.
struct Output {
    path: PathBuf,
    file: File,
    last: LastBlock,
    bytes: u64,
    crc: u32,
    changed: bool,
    builder: IndexBuilder,
    index: Vec<IndexEntry>,
    term: u32,
    first_ms: Option<i64>,
}

struct Pass {
    shard: Rc<Shard>,
    group: Rc<Group>,
    /// Of which log it is.
    begun: u64,
}

impl Pass {
    /// Nothing to do for a log that is going away, or a store.
    fn go_on(&self) -> Result<(), CompactError> {
        let stop = self.shard.closing.get() || self.group.deleting.get() || self.group.deleted.get();
        // What it would put in the place of segments must not stand above those with which the log begins.
        let other = !crate::anew::is_of_this_log(&self.group, self.begun);
        if stop || other || self.group.is_damaged() {
            Err(CompactError::Interrupted)
        } else {
            Ok(self.shard.check_poison()?)
        }
    }

    fn damaged(&self, name: SegmentName, reason: String) -> CompactError {
        match damaged(&self.group, name, reason) {
            ReadError::Damaged { reason } => CompactError::Damaged { reason },
            other => CompactError::Damaged { reason: other.to_string() },
        }
    }

    fn failed(&self, path: &Path, error: io::Error) -> CompactError {
        match error.kind() {
            _ if is_no_space(&error) => CompactError::NoSpace,
            // Retention, or the deletion of the partition, took it away.
            io::ErrorKind::NotFound => CompactError::Interrupted,
            _ => CompactError::Io { path: path.display().to_string(), source: error },
        }
    }

    async fn pause(&self, bytes: usize) {
        tokio::time::sleep(Duration::from_micros(bytes as u64 * 1_000_000 / BYTES_PER_S)).await;
    }

    /// Runs plain calls away from the shard's thread.
    async fn away<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CompactError> {
        self.shard.disk.off_thread(work).await.map_err(|error| self.failed(&self.group.dir, error))
    }

    async fn clean_offset(&self) -> Result<i64, CompactError> {
        if let Some(known) = self.group.inner.borrow().clean_offset {
            return Ok(known);
        }
        let (files, path) = (self.shard.files.clone(), self.group.dir.join(CLEAN_FILE));
        // Without it everything counts as dirty.
        let found = self.away(move || files.read(&path).ok().and_then(|bytes| decode_clean(&bytes))).await?;
        let mut inner = self.group.inner.borrow_mut();
        let offset = found.filter(|offset| *offset <= inner.flushed_end).unwrap_or(0);
        Ok(*inner.clean_offset.get_or_insert(offset))
    }

    async fn set_clean_offset(&self, offset: i64) -> Result<(), CompactError> {
        self.group.inner.borrow_mut().clean_offset = Some(offset);
        let (files, path) = (self.shard.files.clone(), self.group.dir.join(CLEAN_FILE));
        // Not synced: an older one means more work, a torn one that all is to be done again.
        let written = self.away(move || files.write(&path, &encode_clean(offset))).await?;
        if let Err(error) = written {
            tracing::warn!(group = self.group.id, %error, "clean offset not written");
        }
        Ok(())
    }

    /// Segments that are not written to any more.
    fn closed(&self) -> Vec<(Candidate, Place)> {
        let inner = self.group.inner.borrow();
        let count = inner.segments.len().saturating_sub(1);
        let known = |timestamp: Option<i64>| timestamp.filter(|timestamp| *timestamp >= 0);
        (0..count)
            .map(|at| {
                let segment = &inner.segments[at];
                let end = inner.segment_end(at);
                let candidate = Candidate {
                    base: segment.base,
                    end,
                    bytes: segment.bytes,
                    oldest_ms: known(segment.first_timestamp),
                    newest_ms: known(segment.max_timestamp),
                };
                (candidate, Place::of(&inner, at))
            })
            .collect()
    }

    /// Up to where the log is to be compacted now.
    async fn due(
        &self,
        config: &CompactionConfig,
        now_ms: i64,
        hold: i64,
    ) -> Result<Option<i64>, CompactError> {
        let clean = self.clean_offset().await?;
        if config.min_lag_ms > 0 || config.max_lag_ms < i64::MAX {
            for (segment, place) in self.closed() {
                if segment.end > clean && segment.newest_ms.is_none() && segment.bytes > 0 {
                    learn_timestamps(&self.shard, &self.group, place.name.base).await;
                }
            }
        }
        let segments: Vec<Candidate> = self.closed().into_iter().map(|(segment, _)| segment).collect();
        let limit = {
            let inner = self.group.inner.borrow();
            hold.min(inner.high_watermark).min(inner.flushed_end)
        };
        Ok(compact_policy::due(&segments, clean, limit, config, now_ms))
    }

    /// Reads the log from the clean offset up to `upper`, or as far as there is room for its keys.
    async fn scan(&self, clean: i64, upper: i64, keys_max: usize) -> Result<Scan, CompactError> {
        let mut scan = Scan::new(self.shard.files.random_id(), clean, keys_max);
        let dirty =
            self.closed().into_iter().filter(|(segment, _)| segment.end > clean && segment.end <= upper);
        for (_, place) in dirty {
            let mut reader = Reader::open(self, place)?;
            while let Some(piece) = reader.next(self).await? {
                let (back, went_on) = self
                    .away(move || {
                        let taken = piece.check().map(|()| {
                            piece
                                .batches()
                                .filter(|(header, _)| header.next_offset() > clean)
                                .all(|(header, batch)| scan.take(header, &batch))
                        });
                        (scan, taken)
                    })
                    .await?;
                scan = back;
                if !went_on.map_err(|reason| self.damaged(place.name, reason))? {
                    return Ok(scan);
                }
            }
        }
        Ok(scan)
    }

    async fn begin(&self, base: i64) -> Result<Output, CompactError> {
        let path = self.group.dir.join(format!("{base:020}{UNFINISHED}"));
        let (files, at) = (self.shard.files.clone(), path.clone());
        let opened = self.away(move || {
            let file =
                files.open(&at, Mode { write: true, create: true, direct: true, ..Mode::default() })?;
            // A pass that ended early may have left one.
            file.set_len(0).map(|()| file)
        });
        let file = opened.await?.map_err(|error| self.failed(&path, error))?;
        Ok(Output {
            path,
            file,
            last: LastBlock::default(),
            bytes: 0,
            crc: 0,
            changed: false,
            builder: IndexBuilder::new(),
            index: Vec::new(),
            term: 0,
            first_ms: None,
        })
    }

    /// Rewrites one segment behind what `output` has.
    async fn rewrite(
        &self,
        place: Place,
        mut filter: Filter,
        output: &mut Output,
    ) -> Result<Filter, CompactError> {
        let mut reader = Reader::open(self, place)?;
        while let Some(piece) = reader.next(self).await? {
            let (back, decided) = self
                .away(move || {
                    let decided = piece.check().map(|()| {
                        let fate =
                            |(header, batch): (&BatchHeader, Bytes)| match filter.decide(header, &batch) {
                                Fate::Goes => (*header, None, true),
                                Fate::Stays => (*header, Some(batch), false),
                                Fate::Replaced(new) => (*header, Some(new), true),
                            };
                        piece.batches().map(fate).collect::<Vec<_>>()
                    });
                    (filter, decided)
                })
                .await?;
            filter = back;
            let mut bufs = Vec::new();
            let at = output.bytes;
            for (old, kept, changed) in decided.map_err(|reason| self.damaged(place.name, reason))? {
                output.changed |= changed;
                let Some(batch) = kept else { continue };
                // One that was replaced has timestamps of its own.
                let header = record_batch::parse_header(&batch).unwrap_or(old);
                let newest = header.newest_record_ms();
                output.term = u32::try_from(header.leader_epoch).unwrap_or(0);
                output.first_ms = output.first_ms.or(newest);
                let (offset, position, term) = (header.base_offset, output.bytes, output.term);
                let entry = output.builder.batch(offset, position, term, 0, newest.unwrap_or(i64::MIN));
                output.index.extend(entry);
                output.bytes += batch.len() as u64;
                output.crc = crc32c::crc32c_append(output.crc, &batch);
                bufs.push(batch);
            }
            if bufs.is_empty() {
                continue;
            }
            let written = self.shard.disk.append_at(&output.file, &mut output.last, &bufs, at).await;
            written.map_err(|error| self.failed(&output.path, error))?;
            let bytes = output.bytes - at;
            add(&self.shard.counters.compaction_written, bytes);
            self.pause(usize::try_from(bytes).unwrap_or(usize::MAX)).await;
        }
        Ok(filter)
    }

    /// Puts what was written in the place of the segments that it was made of.
    async fn swap(&self, sources: &[(Candidate, Place)], mut output: Output) -> Result<bool, CompactError> {
        let (Some((first, _)), Some((last, _))) = (sources.first(), sources.last()) else { return Ok(false) };
        self.go_on()?;
        if !output.changed && sources.len() == 1 {
            self.give_up(&output.path).await;
            return Ok(false);
        }
        let bytes = output.bytes;
        let cut = output.file.clone();
        let cut = self.away(move || cut.set_len(bytes)).await?;
        cut.map_err(|error| self.failed(&output.path, error))?;
        self.sync(&output).await?;
        failpoint::pass(Failpoint::CompactWritten);
        self.go_on()?;
        let generation = {
            let inner = self.group.inner.borrow();
            let known = inner.segments.iter().filter_map(|segment| segment.compacted);
            known.map(|compacted| compacted.generation).max().unwrap_or(0).saturating_add(1)
        };
        let compacted = Compacted { end: last.end, generation, crc: output.crc };
        let name = SegmentName { base: first.base, compacted: Some(compacted) };
        output.index.extend(output.builder.end(last.end, bytes, output.term, 0));
        let index = index_bytes(first.base, &output.index);
        let (files, dir) = (self.shard.files.clone(), self.group.dir.clone());
        let (from, to) = (output.path.clone(), self.group.segment_path(name));
        let index_path = self.group.segment_index_path(name);
        let mut alone = self.shard.sync_alone().await?;
        let (renamed, synced) = self
            .away(move || {
                // Not synced: one that does not fit is built again.
                let renamed = files.write(&index_path, &index).and_then(|()| files.rename(&from, &to));
                failpoint::pass(Failpoint::CompactRenamed);
                (renamed, files.sync_dir(&dir))
            })
            .await?;
        // A directory that has another name, or none, because its partition is being deleted, is no failure.
        let going = self.group.deleting.get() || self.group.deleted.get();
        if let Err(error) = synced
            && !(going && error.kind() == io::ErrorKind::NotFound)
        {
            // Nobody knows which name is on the disk, so nothing may be removed for it.
            self.shard.sync_failed(&mut alone, &self.group.segment_path(name), &error);
        }
        self.shard.check_poison()?;
        drop(alone);
        renamed.map_err(|error| self.failed(&output.path, error))?;
        failpoint::pass(Failpoint::CompactSwapped);
        let mut inner = self.group.inner.borrow_mut();
        let at = inner.segments.iter().position(|segment| segment.base == first.base);
        let same = at.is_some_and(|at| {
            let now = inner.segments.iter().skip(at).map(Segment::name);
            now.take(sources.len()).eq(sources.iter().map(|(_, place)| place.name))
        });
        let (Some(at), true) = (at, same) else {
            drop(inner);
            // The log start passed some of them meanwhile. What was written holds all that is left, so nothing is lost
            // should a crash come before it is gone.
            self.throw_away(name);
            return Err(CompactError::Interrupted);
        };
        let mut segment = Segment::of(name, bytes);
        segment.max_timestamp = Some(output.builder.max_timestamp);
        segment.first_timestamp = Some(output.first_ms.unwrap_or(-1));
        inner.compactions += 1;
        inner.segments.drain(at..at + sources.len());
        inner.segments.insert(at, segment);
        // What is left of it has no indexes, and holes.
        inner.raise_before(last.end);
        inner.meta_dirty = true;
        inner.dirty.retain(|base| sources.iter().all(|(source, _)| source.base != *base));
        drop(inner);
        let gone = |name: SegmentName| sources.iter().any(|(_, place)| place.name == name);
        let mut ahead = self.shard.read_ahead.borrow_mut();
        ahead.retain(|slot| slot.group != self.group.id || !gone(slot.segment));
        drop(ahead);
        self.shard.uncache(&self.group, last.end);
        for (_, place) in sources {
            self.throw_away(place.name);
        }
        Ok(true)
    }

    /// A failed one says that the disk lost something, and not that it lost only this: no way to go on.
    async fn sync(&self, output: &Output) -> Result<(), CompactError> {
        let mut alone = self.shard.sync_alone().await?;
        if mutant::is(Mutant::CompactsWithoutSync) {
            return Ok(());
        }
        if let Err(error) = self.shard.disk.fdatasync(&output.file).await {
            self.shard.sync_failed(&mut alone, &output.path, &error);
        }
        Ok(self.shard.check_poison()?)
    }

    fn throw_away(&self, name: SegmentName) {
        self.shard.forget_file(self.group.id, name.base);
        for path in [self.group.segment_index_path(name), self.group.segment_path(name)] {
            self.shard.throw_away(path, (Lane::Durable, 0), Some(Rc::clone(&self.group)));
        }
    }

    async fn give_up(&self, path: &Path) {
        let (files, path): (FileSystem, PathBuf) = (self.shard.files.clone(), path.to_owned());
        // One that stays is written over, or removed at the next start.
        let _ = self.away(move || files.remove_file(&path)).await;
    }

    /// Rewrites as many of `sources` as fit into one segment. Returns how many those were, and how many are there now.
    async fn rewrite_some(
        &self,
        sources: &[(Candidate, Place)],
        mut filter: Filter,
        mut output: Output,
    ) -> Result<(Filter, usize, usize), CompactError> {
        let limit = self.group.inner.borrow().segment_limit();
        let mut taken = 0;
        for (source, place) in sources {
            let base = sources[0].0.base;
            if taken > 0 && !compact_policy::joins((base, output.bytes), source, limit) {
                break;
            }
            filter = self.rewrite(*place, filter, &mut output).await?;
            taken += 1;
        }
        let swapped = self.swap(&sources[..taken], output).await?;
        Ok((filter, taken, if swapped { 1 } else { taken }))
    }

    /// One pass. Returns the new clean offset, or `None` when there is nothing that may be compacted now.
    async fn run(
        &self,
        (upper, keys_max): (i64, usize),
        rules: Rules,
        outcome: &mut CompactionOutcome,
    ) -> Result<Option<i64>, CompactError> {
        let clean = self.clean_offset().await?;
        let scan = self.scan(clean, upper, keys_max).await?;
        let upper = scan.upper().min(upper);
        if upper <= clean {
            return Ok(None);
        }
        let sources: Vec<(Candidate, Place)> =
            self.closed().into_iter().filter(|(segment, _)| segment.base < upper).collect();
        outcome.segments_before = sources.len();
        outcome.segments_after = 0;
        let newest: Vec<_> = self.group.producers.borrow().newest_batches(upper).collect();
        let mut filter = Filter::new(scan, Rules { upper, ..rules }, newest.into_iter());
        // Oldest first, each for good before the next: a tombstone that is gone has nothing older behind it.
        let mut rest = &sources[..];
        while let Some((first, _)) = rest.first() {
            let output = self.begin(first.base).await?;
            let path = output.path.clone();
            match self.rewrite_some(rest, filter, output).await {
                Ok((back, taken, left)) => {
                    (filter, rest) = (back, &rest[taken..]);
                    outcome.segments_after += left;
                }
                Err(error) => {
                    self.give_up(&path).await;
                    return Err(error);
                }
            }
        }
        outcome.records_dropped += filter.records_dropped;
        self.go_on()?;
        self.set_clean_offset(upper).await?;
        Ok(Some(upper))
    }
}

impl GroupLog {
    /// Compacts the log if its topic wants that and it is due; nothing at or above `hold_offset`. Returns when it is done,
    /// which may take as long as reading and writing all of it.
    pub async fn compact(&self, now_ms: i64, hold_offset: i64) -> Result<CompactionOutcome, CompactError> {
        self.compact_bounded(now_ms, hold_offset, KEYS_MAX).await
    }

    /// As `compact`, with room for fewer keys per pass: for tests of what happens when they do not fit.
    #[doc(hidden)]
    pub async fn compact_bounded(
        &self,
        now_ms: i64,
        hold_offset: i64,
        keys_max: usize,
    ) -> Result<CompactionOutcome, CompactError> {
        let mut outcome = CompactionOutcome::default();
        let Some(config) = self.group.inner.borrow().config.compaction else { return Ok(outcome) };
        let _alone = self.shard.compacting.lock().await;
        // The log was cut and took the only batches with it that were known of a producer: nobody could say which of those
        // that are left must stay for its sake. The next start finds out.
        if !self.group.inner.borrow().producers_whole {
            return Ok(outcome);
        }
        let begun = self.group.inner.borrow().begun;
        let pass = Pass { shard: Rc::clone(&self.shard), group: Rc::clone(&self.group), begun };
        pass.go_on()?;
        let Some(target) = pass.due(&config, now_ms, hold_offset).await? else { return Ok(outcome) };
        let counted = self.group.inner.borrow().counted_base;
        if pass.closed().iter().any(|(segment, _)| segment.end <= target && segment.base >= counted) {
            match checkpoint(&self.shard, &self.group).await {
                Ok(true) => {}
                Ok(false) | Err(FlushError::NoSpace) => return Err(CompactError::Interrupted),
                Err(FlushError::Poisoned) => {
                    self.shard.check_poison()?;
                    return Err(CompactError::Interrupted);
                }
            }
        }
        let counters = &self.shard.counters;
        let before = (counters.compaction_read.get(), counters.compaction_written.get());
        let rules = Rules { upper: target, now_ms, delete_retention_ms: config.delete_retention_ms };
        while outcome.passes < PASSES_MAX {
            let Some(clean) = pass.run((target, keys_max), rules, &mut outcome).await? else { break };
            outcome.passes += 1;
            outcome.clean_offset = clean;
            add(&counters.compactions, 1);
            if clean >= target {
                break;
            }
        }
        outcome.bytes_read = counters.compaction_read.get() - before.0;
        outcome.bytes_written = counters.compaction_written.get() - before.1;
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_offsets_are_read_as_written_or_not_at_all() {
        let bytes = encode_clean(1234);
        assert_eq!(decode_clean(&bytes), Some(1234));
        for at in 0..bytes.len() {
            let mut rotten = bytes.clone();
            rotten[at] ^= 1;
            assert_eq!(decode_clean(&rotten), None, "byte {at}");
        }
        assert_eq!(decode_clean(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode_clean(&[]), None);
    }
}
