//! Reading segments: fetches that the tail cache cannot answer, and look-ups by time.
//!
//! Runs on the shard thread; the disk works behind `Disk`. Answers are slices of one read, whole batches, never copied.
//! What is read here does not enter the tail cache. Offsets of batches are checked as they are walked, and checksums of
//! those that are given out, since bytes may have rotted on the disk: a segment that is not what it should be gives an
//! error, never other records, and the partition serves no more until somebody has looked at it.
//!
//! Between two waits a segment may be replaced by a compacted one, or deleted. Its content goes by its full name, which
//! is never used again, so a reader gets what it began with or finds it gone, and then looks again.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use bytes::Bytes;
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch::{self, BatchHeader};

use crate::group::{Group, GroupLog, Inner};
use crate::marks::Numbering;
use crate::read_ahead::{Rest, Slot};
use crate::segment_index::{self, IndexBuilder, IndexEntry};
use crate::segment_name::SegmentName;
use crate::store::Shard;
use crate::types::ReadError;
use crate::walk::{Step, Walk};

/// A catch-up read takes at least this much from the disk, whatever the reader asked for.
const READ_MIN_BYTES: usize = 256 << 10;
/// And at most this much, unless one batch is larger.
const READ_MAX_BYTES: usize = 4 << 20;

/// Entries of segment indexes held in memory per shard: 8 MiB, enough for 12 GiB of log that is being read.
const LOADED_ENTRIES_MAX: usize = (8 << 20) / size_of::<IndexEntry>();

/// What a batch may unfold to when a record is looked up in it.
const DECOMPRESSED_MAX_BYTES: usize = 128 << 20;

#[derive(Debug, PartialEq, Eq)]
enum Selected {
    /// Batches in this part of the piece; `next` is the offset after them.
    Range {
        start: usize,
        end: usize,
        next: i64,
    },
    /// The first batch wanted begins at `at` (with `offset`) and needs `bytes` from there.
    Short {
        at: usize,
        offset: i64,
        bytes: usize,
    },
    /// The piece ends before the batch wanted.
    Beyond {
        offset: i64,
    },
    Damaged(String),
}

/// Chooses whole batches from a piece that begins with the batch at `first`, or with the first one that is left after it.
fn select(
    piece: &[u8],
    (first, holes_to): (i64, Option<i64>),
    from: i64,
    upper: i64,
    max_bytes: usize,
) -> Selected {
    let mut walk = Walk::with_holes(piece, first, holes_to);
    let mut chosen: Option<(usize, usize, i64)> = None;
    loop {
        let (at, offset) = (walk.at(), walk.offset());
        let step = walk.step();
        match (step, chosen) {
            (Step::Batch(header, _), _) if header.next_offset() <= from => {}
            (Step::Batch(header, at), None) => {
                // First, so that nobody waits for an offset that only a flipped bit puts above the limit.
                if !record_batch::crc_ok(&piece[at..walk.at()]) {
                    return Selected::Damaged(format!("wrong checksum of the batch at offset {offset}"));
                }
                if header.next_offset() > upper {
                    return Selected::Range { start: at, end: at, next: offset };
                }
                chosen = Some((at, walk.at(), header.next_offset()));
            }
            (Step::Batch(header, _), Some((start, end, next))) => {
                // One with a wrong checksum is reported to whoever asks for it.
                let fits = header.next_offset() <= upper && walk.at() - start <= max_bytes;
                if !fits || !record_batch::crc_ok(&piece[at..walk.at()]) {
                    return Selected::Range { start, end, next };
                }
                chosen = Some((start, walk.at(), header.next_offset()));
            }
            (_, Some((start, end, next))) => return Selected::Range { start, end, next },
            (Step::Short(bytes), None) => return Selected::Short { at, offset, bytes },
            (Step::End, None) => return Selected::Beyond { offset },
            (Step::Damaged(reason), None) => return Selected::Damaged(reason),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub name: SegmentName,
    pub bytes: u64,
    pub end: i64,
    /// Of the group, when this was true.
    cuts: u64,
}

impl Place {
    pub fn of(inner: &Inner, at: usize) -> Place {
        let segment = &inner.segments[at];
        Place { name: segment.name(), bytes: segment.bytes, end: inner.segment_end(at), cuts: inner.cuts }
    }

    /// Raft index of its first batch; 0: unknown.
    fn first_index(&self, group: &Group) -> u64 {
        let inner = group.inner.borrow();
        inner
            .segments
            .iter()
            .find(|segment| segment.name() == self.name)
            .map_or(0, |segment| segment.first_index)
    }

    /// Raft has not cut the segments since; their files are shortened and written over after that.
    pub fn holds(&self, group: &Group) -> bool {
        self.cuts == group.inner.borrow().cuts
    }
}

/// What a reader gets that was overtaken by a cut; it looks again.
fn overtaken() -> ReadError {
    ReadError::Io(io::ErrorKind::Interrupted.into())
}

fn is_overtaken(error: &ReadError) -> bool {
    matches!(error, ReadError::Io(error) if error.kind() == io::ErrorKind::Interrupted)
}

pub(crate) fn damaged_at(group: &Group, place: Place, reason: String) -> ReadError {
    if place.holds(group) { damaged(group, place.name, reason) } else { overtaken() }
}

/// A search by time starts over when segments were replaced under it. Each replacement is a compaction of its own, which
/// takes longer than a search; beyond this something else is wrong.
const SEARCHES_MAX: usize = 16;

fn is_gone(error: &ReadError) -> bool {
    matches!(error, ReadError::Io(error) if error.kind() == io::ErrorKind::NotFound)
}

pub(crate) fn damaged(group: &Group, name: SegmentName, reason: String) -> ReadError {
    tracing::error!(
        group = group.id,
        directory = group.dir_name(),
        segment = %name,
        reason,
        "damaged segment; the partition refuses to serve"
    );
    let reason = format!("{}: {reason}", group.segment_path(name).display());
    group.note_damage(reason.clone());
    ReadError::Damaged { reason }
}

/// The index of a segment, from memory or its file; what the file lacks is read from the segment.
pub(crate) async fn index_of(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    place: Place,
) -> Result<Rc<RefCell<Vec<IndexEntry>>>, ReadError> {
    {
        let inner = group.inner.borrow();
        if let Some(index) =
            inner.segments.iter().find(|s| s.name() == place.name).and_then(|s| s.index.clone())
        {
            return Ok(index);
        }
    }
    let path = group.segment_index_path(place.name);
    let files = shard.files.clone();
    let bytes = shard.disk.off_thread(move || files.read(&path)).await?;
    let mut entries = match bytes {
        Ok(bytes) => segment_index::decode(&bytes, place.name.base, place.bytes).unwrap_or_default(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let (position, offset, max) = match entries.last() {
        Some(last) => (u64::from(last.position), last.offset, last.max_timestamp_before),
        None => (0, place.name.base, i64::MIN),
    };
    if position < place.bytes {
        let mut builder = IndexBuilder::resume(max, position);
        let mut term = 0;
        let mut found = Vec::new();
        let marks = group.inner.borrow().marks.clone();
        let mut numbering = Numbering::new(&marks, None);
        match (entries.last(), place.first_index(group)) {
            _ if place.name.compacted.is_some() => {}
            (Some(last), _) => numbering.resume(last.raft_index),
            (None, first) => numbering.resume(first),
        }
        let end = scan(shard, group, place, (position, offset), |header, position, _| {
            term = u32::try_from(header.leader_epoch).unwrap_or(0);
            let timestamp = header.newest_record_ms().unwrap_or(i64::MIN);
            let index = numbering.batch(header.base_offset);
            found.extend(builder.batch(header.base_offset, position, term, index, timestamp));
            false
        })
        .await?;
        // Where a compacted segment ends, its name says.
        let end = place.name.holes_to().unwrap_or(end);
        found.extend(builder.end(end, place.bytes, term, numbering.next()));
        entries.extend(found);
    }
    let index = Rc::new(RefCell::new(entries));
    if !place.holds(group) {
        return Err(overtaken());
    }
    let mut inner = group.inner.borrow_mut();
    if let Some(segment) = inner.segments.iter_mut().find(|s| s.name() == place.name) {
        segment.index = Some(Rc::clone(&index));
    }
    drop(inner);
    let mut loaded = shard.loaded_indexes.borrow_mut();
    loaded.push_back((group.id, place.name.base, index.borrow().len()));
    let mut entries: usize = loaded.iter().map(|(_, _, entries)| entries).sum();
    while entries > LOADED_ENTRIES_MAX && loaded.len() > 1 {
        let Some((id, base, freed)) = loaded.pop_front() else { break };
        entries -= freed;
        if let Some(other) = shard.group(id)
            && let Some(segment) = other.inner.borrow_mut().segments.iter_mut().find(|s| s.base == base)
        {
            segment.index = None;
        }
    }
    Ok(index)
}

/// Walks a segment from a batch on, until `stop` says so or the segment ends. Returns the offset reached.
async fn scan(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    place: Place,
    (mut position, mut offset): (u64, i64),
    mut stop: impl FnMut(&BatchHeader, u64, &[u8]) -> bool,
) -> Result<i64, ReadError> {
    let mut want = 1 << 20;
    while position < place.bytes {
        let file = shard.segment_file(group, place.name)?;
        let len = usize::try_from(place.bytes - position).unwrap_or(usize::MAX).min(want);
        let piece = shard.disk.read_at(&file, position, len).await?;
        if piece.is_empty() {
            let reason = format!("the file has {position} bytes of {}", place.bytes);
            return Err(damaged_at(group, place, reason));
        }
        let mut walk = Walk::with_holes(&piece, offset, place.name.holes_to());
        loop {
            match walk.step() {
                Step::Batch(header, at) => {
                    let batch = &piece[at..walk.at()];
                    if stop(&header, position + at as u64, batch) {
                        return Ok(header.base_offset);
                    }
                }
                Step::End => break,
                Step::Short(bytes) if walk.at() == 0 => {
                    // One that claims to reach over the end would be read again for ever.
                    if piece.len() < len || bytes <= len || bytes as u64 > place.bytes - position {
                        return Err(damaged_at(group, place, format!("ends inside of offset {offset}")));
                    }
                    want = bytes;
                    break;
                }
                Step::Short(_) => break,
                Step::Damaged(reason) => return Err(damaged_at(group, place, reason)),
            }
        }
        position += walk.at() as u64;
        offset = walk.offset();
    }
    Ok(offset)
}

/// First and largest timestamp of a segment, for its index and for retention.
pub(crate) async fn learn_timestamps(shard: &Rc<Shard>, group: &Rc<Group>, base: i64) {
    // Again only when Raft cut the segments meanwhile.
    loop {
        let place = {
            let inner = group.inner.borrow();
            let Some(at) = inner.segments.iter().position(|segment| segment.base == base) else { return };
            Place::of(&inner, at)
        };
        let max = match index_of(shard, group, place).await {
            Ok(index) => index.borrow().last().map_or(i64::MIN, |entry| entry.max_timestamp_before),
            Err(error) if is_overtaken(&error) => continue,
            // Replaced or deleted meanwhile: whoever wants to know looks again.
            Err(error) if is_gone(&error) => return,
            Err(error) => {
                tracing::warn!(group = group.id, segment = base, %error, "timestamps unknown");
                -1
            }
        };
        let mut first = -1;
        // Only the first batch; an unreadable one has been reported above.
        let _ = scan(shard, group, place, (0, base), |header, _, _| {
            first = header.newest_record_ms().unwrap_or(-1);
            first >= 0
        })
        .await;
        if !place.holds(group) {
            continue;
        }
        let mut inner = group.inner.borrow_mut();
        if let Some(segment) = inner.segments.iter_mut().find(|segment| segment.name() == place.name) {
            segment.max_timestamp.get_or_insert(max);
            segment.first_timestamp.get_or_insert(first);
        }
        return;
    }
}

/// First record of a batch at or after a time and at or above an offset.
fn record_at(batch: &[u8], timestamp: i64, from: i64) -> Option<(i64, i64)> {
    let mut scratch = Vec::new();
    let records = decode_records(batch, &mut scratch, DECOMPRESSED_MAX_BYTES).ok()?;
    records
        .map_while(Result::ok)
        .find(|record| record.timestamp >= timestamp && record.offset >= from)
        .map(|record| (record.timestamp, record.offset))
}

/// Largest timestamp of the records of a batch at or above an offset that lies in it.
fn newest_from(batch: &[u8], from: i64) -> i64 {
    let mut scratch = Vec::new();
    let records = decode_records(batch, &mut scratch, DECOMPRESSED_MAX_BYTES);
    let records = records.into_iter().flatten().map_while(Result::ok);
    records.filter(|record| record.offset >= from).map(|record| record.timestamp).max().unwrap_or(-1)
}

impl GroupLog {
    fn place_of(&self, from: i64) -> Option<Place> {
        let inner = self.group.inner.borrow();
        let after = inner.segments.partition_point(|segment| segment.base <= from);
        let at = after.checked_sub(1)?;
        let end = inner.segment_end(at);
        (from < end).then(|| Place::of(&inner, at))
    }

    fn readable(&self, from: i64) -> Result<(), ReadError> {
        let inner = self.group.inner.borrow();
        if let Some(reason) = self.group.damage.get() {
            return Err(ReadError::Damaged { reason: reason.clone() });
        }
        if from < inner.log_start || from > inner.log_end {
            return Err(ReadError::OutOfRange { start: inner.log_start, end: inner.log_end });
        }
        Ok(())
    }

    /// Batches from the one that holds `from`, or the next one where compaction has taken that out, none ending above
    /// `upper`, up to `max_bytes` and at least one; from memory or disk. Empty at the end of the log.
    pub async fn read(&self, from: i64, upper: i64, max_bytes: usize) -> Result<Vec<Bytes>, ReadError> {
        let group = &self.group;
        let mut from = from;
        // Bounds the turns: each either answers, or goes on at a later offset or segment, or needs a larger piece.
        loop {
            self.readable(from)?;
            if let Some(cached) = self.read_cached(from, upper, max_bytes) {
                return Ok(cached);
            }
            if from >= upper {
                return Ok(Vec::new());
            }
            let Some(place) = self.place_of(from) else {
                let name = SegmentName::plain(from);
                return Err(damaged(group, name, format!("no segment holds offset {from}")));
            };
            match self.read_segment(place, from, upper, max_bytes).await {
                // Bounded by how often Raft cuts.
                Err(error) if is_overtaken(&error) => {}
                // Retention or compaction took the segment away meanwhile, look again.
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                    let still = self.place_of(from).is_some_and(|now| now.name == place.name);
                    if still && !group.deleting.get() && from >= self.log_start_offset() {
                        return Err(damaged_at(group, place, "the segment is missing".to_owned()));
                    }
                    if group.deleting.get() {
                        return Err(ReadError::Io(error));
                    }
                }
                Err(error) => return Err(error),
                Ok(Some(found)) => return Ok(found),
                // Nothing is left in this one from there on.
                Ok(None) => from = place.end,
            }
        }
    }

    async fn read_segment(
        &self,
        place: Place,
        from: i64,
        upper: i64,
        max_bytes: usize,
    ) -> Result<Option<Vec<Bytes>>, ReadError> {
        let (shard, group) = (&self.shard, &self.group);
        let ahead = shard.read_ahead.borrow_mut().take(group.id, place.name, from);
        let reads_on = ahead.is_some();
        let (mut position, mut offset, mut piece) = match ahead {
            Some(slot) if slot.position <= place.bytes => {
                let bytes = match slot.rest {
                    Rest::Place => Bytes::new(),
                    Rest::Here(bytes) => bytes,
                    // What could not be read in advance is read now, and fails now if it has to.
                    Rest::Coming(_, read) => read.await.ok().and_then(Result::ok).unwrap_or_default(),
                };
                if !place.holds(group) {
                    return Err(overtaken());
                }
                (slot.position, slot.offset, bytes)
            }
            _ => {
                let index = index_of(shard, group, place).await?;
                let (position, offset) = segment_index::seek_offset(&index.borrow(), place.name.base, from);
                if position >= place.bytes || offset > from {
                    (0, place.name.base, Bytes::new())
                } else {
                    (position, offset, Bytes::new())
                }
            }
        };
        let mut want = max_bytes.clamp(READ_MIN_BYTES, READ_MAX_BYTES);
        loop {
            if piece.is_empty() {
                if position >= place.bytes && place.name.compacted.is_some() {
                    return Ok(None);
                }
                if position >= place.bytes {
                    return Err(damaged_at(group, place, format!("ends before offset {from}")));
                }
                let file = shard.segment_file(group, place.name)?;
                let len = usize::try_from(place.bytes - position).unwrap_or(usize::MAX).min(want);
                piece = shard.disk.read_at(&file, position, len).await?;
                if piece.len() < len {
                    return Err(damaged_at(group, place, format!("shorter than its {} bytes", place.bytes)));
                }
            }
            match select(&piece, (offset, place.name.holes_to()), from, upper, max_bytes) {
                Selected::Range { start, end, next } => {
                    let first = record_batch::parse_header(&piece[start..]);
                    if end == start && first.is_ok_and(|header| header.next_offset() > place.end) {
                        let reason = format!("the batch at offset {next} reaches over the end");
                        return Err(damaged_at(group, place, reason));
                    }
                    if end > start && next < place.end && place.holds(group) {
                        let at = position + end as u64;
                        let rest = self.rest_of(place, at, piece.slice(end..), (piece.len(), reads_on, want));
                        let slot =
                            Slot { group: group.id, segment: place.name, offset: next, position: at, rest };
                        shard.read_ahead.borrow_mut().keep(slot);
                    }
                    return Ok(Some(if end > start { vec![piece.slice(start..end)] } else { Vec::new() }));
                }
                Selected::Short { at, offset: reached, bytes } => {
                    if at == 0 && bytes <= piece.len() {
                        return Err(damaged_at(group, place, format!("no whole batch at offset {reached}")));
                    }
                    position += at as u64;
                    offset = reached;
                    if position + bytes as u64 > place.bytes {
                        return Err(damaged_at(
                            group,
                            place,
                            format!("offset {reached} reaches over the end"),
                        ));
                    }
                    want = want.max(bytes);
                    piece = Bytes::new();
                }
                Selected::Beyond { offset: reached } => {
                    position += piece.len() as u64;
                    offset = reached;
                    piece = Bytes::new();
                }
                Selected::Damaged(reason) => return Err(damaged_at(group, place, reason)),
            }
        }
    }

    /// What is kept for the next read, which begins `at`. Of a piece that was read for a small reader, the rest; a reader that
    /// reads on in large pieces gets the next one fetched, as far as the segment goes.
    fn rest_of(
        &self,
        place: Place,
        at: u64,
        rest: Bytes,
        (piece_bytes, reads_on, want): (usize, bool, usize),
    ) -> Rest {
        let shard = &self.shard;
        // More than half of a piece that was fetched for an answer that had less room in the end.
        if piece_bytes <= READ_MIN_BYTES || rest.len() > piece_bytes / 2 {
            return Rest::Here(rest);
        }
        let len = usize::try_from(place.bytes - at).unwrap_or(usize::MAX).min(want);
        if !reads_on || len < READ_MIN_BYTES || !shard.read_ahead.borrow_mut().has_room(len) {
            return Rest::Place;
        }
        let Ok(file) = shard.segment_file(&self.group, place.name) else { return Rest::Place };
        let (arrived, coming) = tokio::sync::oneshot::channel();
        let disk = shard.disk.clone();
        tokio::task::spawn_local(async move {
            // Whoever wanted it may have gone away meanwhile.
            let _ = arrived.send(disk.read_at(&file, at, len).await);
        });
        Rest::Coming(len, coming)
    }

    fn places(&self) -> Vec<Place> {
        let inner = self.group.inner.borrow();
        (0..inner.segments.len()).map(|at| Place::of(&inner, at)).collect()
    }

    /// Largest timestamp of a segment; `None` when it was replaced or deleted meanwhile.
    async fn newest_in(&self, name: SegmentName) -> Option<i64> {
        let known = |group: &Group| {
            let inner = group.inner.borrow();
            let segment = inner.segments.iter().find(|segment| segment.name() == name)?;
            Some(segment.max_timestamp)
        };
        if let Some(known) = known(&self.group)?.filter(|timestamp| *timestamp != i64::MAX) {
            return Some(known);
        }
        learn_timestamps(&self.shard, &self.group, name.base).await;
        Some(known(&self.group)?.unwrap_or(-1))
    }

    /// Whether a segment that was gone when it was read is one that the log no longer wants.
    fn has_passed(&self, place: Place) -> bool {
        place.end <= self.log_start_offset()
    }

    /// First record with a timestamp of at least `timestamp`, below `upper`, as (timestamp, offset).
    pub async fn find_timestamp(&self, timestamp: i64, upper: i64) -> Result<Option<(i64, i64)>, ReadError> {
        for _ in 0..SEARCHES_MAX {
            match self.search_timestamp(timestamp, upper).await {
                Err(error) if is_gone(&error) => {}
                result => return result,
            }
        }
        Err(ReadError::Io(io::ErrorKind::NotFound.into()))
    }

    async fn search_timestamp(&self, timestamp: i64, upper: i64) -> Result<Option<(i64, i64)>, ReadError> {
        let (shard, group) = (&self.shard, &self.group);
        let log_start = self.log_start_offset();
        self.readable(log_start)?;
        let found = |at: Option<(i64, i64)>| at.filter(|(_, offset)| *offset < upper);
        // Together with the segments, as what is here now is in others later on.
        let places = self.places();
        let unflushed = {
            let inner = group.inner.borrow();
            let entries = inner.tail.unflushed().filter(|entry| {
                entry.is_batch() && entry.max_timestamp >= timestamp && entry.next_offset > log_start
            });
            let mut hits = entries.filter_map(|entry| record_at(&entry.bytes, timestamp, log_start));
            hits.next()
        };
        for place in places {
            if place.end <= log_start {
                continue;
            }
            match self.newest_in(place.name).await {
                Some(newest) if newest < timestamp => continue,
                Some(_) => {}
                None if self.has_passed(place) => continue,
                None => return Err(ReadError::Io(io::ErrorKind::NotFound.into())),
            }
            let mut hit = None;
            let search = async {
                let index = index_of(shard, group, place).await?;
                let from = segment_index::seek_timestamp(&index.borrow(), place.name.base, timestamp);
                scan(shard, group, place, from, |header, _, batch| {
                    if header.max_timestamp >= timestamp && header.next_offset() > log_start {
                        hit = record_at(batch, timestamp, log_start);
                    }
                    hit.is_some()
                })
                .await
            };
            match search.await {
                // Gone with retention: what it held is no longer asked for.
                Err(error) if is_gone(&error) && self.has_passed(place) => continue,
                result => result?,
            };
            if hit.is_some() {
                return Ok(found(hit));
            }
        }
        Ok(found(unflushed))
    }

    /// The committed record with the largest timestamp, the first of them if there are several, as (timestamp, offset).
    pub async fn max_timestamp(&self) -> Result<Option<(i64, i64)>, ReadError> {
        for _ in 0..SEARCHES_MAX {
            let log_start = self.log_start_offset();
            match self.search_max_timestamp().await {
                Err(error) if is_gone(&error) => {}
                // The newest record went meanwhile.
                Ok(None) if self.log_start_offset() != log_start => {}
                result => return result,
            }
        }
        Err(ReadError::Io(io::ErrorKind::NotFound.into()))
    }

    async fn search_max_timestamp(&self) -> Result<Option<(i64, i64)>, ReadError> {
        let (upper, max) = self.newest_below_watermark(false).await?;
        if max < 0 {
            return Ok(None);
        }
        if let Some(found) = self.find_timestamp(max, upper).await? {
            return Ok(Some(found));
        }
        // The newest of all is not committed yet, or came meanwhile.
        let (upper, max) = self.newest_below_watermark(true).await?;
        if max < 0 { Ok(None) } else { self.find_timestamp(max, upper).await }
    }

    /// The high watermark, and the largest timestamp below it; without `exactly` something above may count.
    async fn newest_below_watermark(&self, exactly: bool) -> Result<(i64, i64), ReadError> {
        let (log_start, upper) = (self.log_start_offset(), self.high_watermark());
        // Together with the segments, as what is here now is in others later on.
        let places = self.places();
        let mut max = {
            let inner = self.group.inner.borrow();
            let committed = inner.tail.unflushed().take_while(|entry| entry.next_offset <= upper);
            let counted = committed.filter(|entry| entry.is_batch() && entry.next_offset > log_start);
            let newest = counted.map(|entry| match record_batch::parse_header(&entry.bytes) {
                Ok(header) if header.base_offset < log_start => newest_from(&entry.bytes, log_start),
                _ => entry.max_timestamp,
            });
            newest.fold(i64::MIN, i64::max)
        };
        let last = places.last().map(|place| place.name);
        for place in places {
            if place.end <= log_start {
                continue;
            }
            if place.name.base >= log_start && !(exactly && Some(place.name) == last) {
                let newest = self.newest_in(place.name).await;
                max = max.max(newest.ok_or(ReadError::Io(io::ErrorKind::NotFound.into()))?);
                continue;
            }
            // Only part of this segment counts.
            scan(&self.shard, &self.group, place, (0, place.name.base), |header, _, batch| {
                if header.base_offset < log_start && header.next_offset() > log_start {
                    max = max.max(newest_from(batch, log_start));
                } else if header.next_offset() > log_start && header.next_offset() <= upper {
                    max = max.max(header.newest_record_ms().unwrap_or(-1));
                }
                false
            })
            .await?;
        }
        Ok((upper, max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flumen_protocol::record::BatchBuilder;

    fn piece() -> (Vec<u8>, usize) {
        let mut out = Vec::new();
        for base in [10, 12, 14] {
            let mut builder = BatchBuilder::new();
            for k in 0..2 {
                builder.append(1000 + base + k, None, Some(b"value"), &[]);
            }
            out.extend_from_slice(&builder.build(base));
        }
        let one = out.len() / 3;
        (out, one)
    }

    #[test]
    fn selection() {
        let (piece, one) = piece();
        let range =
            |start: usize, end: usize, next| Selected::Range { start: start * one, end: end * one, next };
        assert_eq!(select(&piece, (10, None), 10, 99, 1 << 20), range(0, 3, 16));
        assert_eq!(select(&piece, (10, None), 13, 99, 1 << 20), range(1, 3, 16));
        assert_eq!(select(&piece, (10, None), 10, 99, 1), range(0, 1, 12));
        assert_eq!(select(&piece, (10, None), 10, 99, 2 * one), range(0, 2, 14));
        assert_eq!(select(&piece, (10, None), 10, 15, 1 << 20), range(0, 2, 14));
        assert_eq!(select(&piece, (10, None), 10, 11, 1 << 20), range(0, 0, 10));
        assert_eq!(select(&piece, (10, None), 16, 99, 1), Selected::Beyond { offset: 16 });
        assert_eq!(
            select(&piece[..2 * one + 5], (10, None), 14, 99, 1),
            Selected::Short { at: 2 * one, offset: 14, bytes: 61 }
        );
        assert_eq!(select(&piece[..2 * one + 5], (10, None), 12, 99, 1 << 20), range(1, 2, 14));
        assert!(matches!(select(&piece, (11, None), 11, 99, 1), Selected::Damaged(_)));
        let mut rotten = piece.clone();
        rotten[2 * one - 1] ^= 1;
        assert_eq!(select(&rotten, (10, None), 10, 99, 1 << 20), range(0, 1, 12));
        assert!(matches!(select(&rotten, (10, None), 12, 99, 1 << 20), Selected::Damaged(_)));
        assert_eq!(select(&rotten, (10, None), 14, 99, 1 << 20), range(2, 3, 16));
        // Regression: one that a flipped bit makes end above the limit is damage, not something to wait for.
        let mut far = piece.clone();
        far[one + 23] ^= 0x40;
        assert!(matches!(select(&far, (10, None), 12, 99, 1 << 20), Selected::Damaged(_)));
        assert_eq!(record_at(&piece[one..2 * one], 1013, 0), Some((1013, 13)));
        assert_eq!(record_at(&piece[one..2 * one], 1014, 0), None);
        assert_eq!(record_at(&piece[one..2 * one], 0, 13), Some((1013, 13)));
    }
}
