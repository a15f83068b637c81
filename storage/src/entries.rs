//! The log as Raft sees it: what it needs at a start, and entries by index for replicas that are behind.
//!
//! Batches come from the tail in memory or from segments, control entries from the marks. An index is found from the nearest
//! place where one is known, by walking batch headers; nothing here guesses: what cannot be said is an error, and whoever
//! asked asks again or gives up.

use std::io;
use std::rc::Rc;

use bytes::Bytes;
use flumen_protocol::record_batch;

use crate::group::{Group, GroupLog, Inner};
use crate::inspect::{Batches, Found};
use crate::marks::Numbering;
use crate::read::{Place, damaged_at, index_of};
use crate::segment_index::{self, IndexEntry};
use crate::store::Shard;
use crate::types::{Entry, HardState, Payload, RaftStart, ReadError, StageError};
use crate::walk::{Step, Walk};

/// Taken from the disk at a time, unless one batch is larger.
const PIECE_BYTES: usize = 512 << 10;

/// A known index in a segment: that of the entry which has, or is followed by, the batch at `offset`.
#[derive(Debug, Clone, Copy)]
struct Anchor {
    /// Position in the list of segments.
    segment: usize,
    offset: i64,
    index: u64,
}

impl Inner {
    /// The last known index at or before `index` among the segments.
    fn anchor(&self, index: u64) -> Option<Anchor> {
        let known = |segment: &crate::group::Segment| segment.first_index > 0 && segment.first_index <= index;
        let before = self.marks.before();
        let found = self.segments.iter().rposition(known).map(|at| Anchor {
            segment: at,
            offset: self.segments[at].base,
            index: self.segments[at].first_index,
        });
        if found.is_some_and(|anchor| anchor.offset >= before.offset) {
            return found;
        }
        let after = self.segments.partition_point(|segment| segment.base <= before.offset);
        (index > before.index).then_some(Anchor {
            segment: after.checked_sub(1)?,
            offset: before.offset,
            index: before.index + 1,
        })
    }

    /// With a log start of `offset`: index of the last entry that goes with its segment, and the offset after it.
    pub fn gone_below(&self, offset: i64) -> Option<(u64, i64)> {
        let last = self.segments.len().checked_sub(1)?;
        let first = (0..last).find(|at| self.segment_end(*at) > offset).unwrap_or(last);
        let segment = &self.segments[first];
        (segment.first_index > 0).then(|| (segment.first_index - 1, segment.base))
    }

    /// Other replicas cannot be sent what lies below `offset`, which is where a segment begins, or the end of all.
    pub fn raise_before(&mut self, offset: i64) {
        if offset <= self.marks.before().offset {
            return;
        }
        let first = self.segments.iter().find(|segment| segment.base >= offset);
        match first.filter(|segment| segment.first_index > 0) {
            Some(segment) => {
                let (index, base) = (segment.first_index - 1, segment.base);
                self.marks.raise(index, base);
            }
            None => self.marks.raise(self.flushed_index, self.flushed_end),
        }
    }
}

/// Where to walk from to find `index`: position, and the index of the next entry there. Nearest of what the segment's index
/// and the anchor say; an index of `None` is known at the anchor's offset.
fn start(entries: &[IndexEntry], base: i64, anchor: Anchor, index: u64) -> (u64, i64, Option<u64>) {
    let near = |entry: &&IndexEntry| {
        (anchor.index..=index).contains(&entry.raft_index) && entry.offset >= anchor.offset
    };
    if let Some(entry) = entries.iter().rev().find(near) {
        return (u64::from(entry.position), entry.offset, Some(entry.raft_index));
    }
    let (position, offset) = segment_index::seek_offset(entries, base, anchor.offset);
    (position, offset, (offset == anchor.offset).then_some(anchor.index))
}

/// Numbers of the batches of one segment from a start on.
struct Counter<'a> {
    numbering: Numbering<'a>,
    anchor: Anchor,
}

impl Counter<'_> {
    fn batch(&mut self, offset: i64) -> u64 {
        if self.numbering.next() == 0 && offset == self.anchor.offset {
            self.numbering.resume(self.anchor.index);
        }
        self.numbering.batch(offset)
    }
}

impl GroupLog {
    /// What Raft needs to start with this log.
    pub fn raft_start(&self) -> RaftStart {
        let inner = self.group.inner.borrow();
        let before = inner.marks.before();
        let controls = inner.marks.iter().filter_map(|mark| Some((mark.index, mark.control.clone()?)));
        RaftStart {
            hard_state: HardState {
                commit: inner.hard_state.commit.max(inner.committed_index).min(inner.last_index),
                ..inner.hard_state
            },
            last_index: inner.last_index,
            last_term: inner.last_term,
            membership: inner.membership.clone(),
            controls: controls.filter(|(_, payload)| !payload.is_empty()).collect(),
            before: (before.index, before.term),
            terms: inner.marks.terms(),
        }
    }

    /// Index and term of the entry before the first that `read_entries` has, and the offset after it. Where that lies above the
    /// log start offset, there are records that no new replica can be sent.
    pub fn before(&self) -> (u64, u64, i64) {
        let before = self.group.inner.borrow().marks.before();
        (before.index, before.term, before.offset)
    }

    /// Offset at which an entry of the log begins, for replacing it. Plain calls: this happens at most once after a change of
    /// leader, and mostly finds it in memory.
    pub(crate) fn offset_of(&self, inner: &Inner, index: u64) -> Result<i64, StageError> {
        match locate(&self.shard, &self.group, inner, index) {
            Ok(Some(offset)) => Ok(offset),
            Ok(None) => {
                Err(StageError::Gap { index, reason: "nobody knows where the entry is that it replaces" })
            }
            Err(error) => {
                self.group.note_damage(format!("could not find entry {index}: {error}"));
                Err(StageError::Damaged)
            }
        }
    }

    /// The offset after an entry of the log; `None` where it cannot be said. Plain calls, as `offset_of`.
    pub fn end_of(&self, index: u64) -> Option<i64> {
        let inner = self.group.inner.borrow();
        if index >= inner.last_index {
            return (index == inner.last_index).then_some(inner.log_end);
        }
        if index == inner.marks.before().index {
            return Some(inner.marks.before().offset);
        }
        locate(&self.shard, &self.group, &inner, index + 1).ok().flatten()
    }

    /// Entries from `low` on, below `high`, up to `max_bytes` and at least one, or none at the end of the log. `OutOfRange`:
    /// the log no longer has the first of them.
    pub async fn read_entries(&self, low: u64, high: u64, max_bytes: usize) -> Result<Vec<Entry>, ReadError> {
        let mut out = Entries { entries: Vec::new(), next: low, high, left: max_bytes };
        loop {
            let (place, anchor) = {
                let inner = self.group.inner.borrow();
                if let Some(reason) = self.group.damage.get() {
                    return Err(ReadError::Damaged { reason: reason.clone() });
                }
                if out.next <= inner.marks.before().index {
                    return Err(ReadError::OutOfRange {
                        start: inner.marks.before().offset,
                        end: inner.log_end,
                    });
                }
                if out.take_from_memory(&inner) || out.next > inner.last_index {
                    return Ok(out.entries);
                }
                let Some(anchor) = inner.anchor(out.next) else { return Ok(out.entries) };
                (Place::of(&inner, anchor.segment), anchor)
            };
            let before = out.next;
            let done = read_segment(&self.shard, &self.group, place, anchor, &mut out).await?;
            // Gone meanwhile.
            if out.next == before && out.entries.is_empty() && low <= self.before().0 {
                let inner = self.group.inner.borrow();
                return Err(ReadError::OutOfRange { start: inner.marks.before().offset, end: inner.log_end });
            }
            if done || out.next == before {
                return Ok(out.entries);
            }
        }
    }
}

struct Entries {
    entries: Vec<Entry>,
    next: u64,
    high: u64,
    left: usize,
}

impl Entries {
    fn is_full(&self) -> bool {
        self.next >= self.high || (self.left == 0 && !self.entries.is_empty())
    }

    /// False when there is no room for it.
    fn push(&mut self, term: u64, payload: Payload) -> bool {
        let bytes = payload.bytes().len();
        if self.is_full() || (bytes > self.left && !self.entries.is_empty()) {
            return false;
        }
        self.left = self.left.saturating_sub(bytes);
        self.entries.push(Entry { index: self.next, term, payload });
        self.next += 1;
        true
    }

    /// Takes what the tail and the marks have. True when there is no room for more.
    fn take_from_memory(&mut self, inner: &Inner) -> bool {
        loop {
            if self.is_full() {
                return true;
            }
            let (term, payload) = if let Some(entry) = inner.tail.get(self.next) {
                let bytes = entry.bytes.clone();
                (entry.term, if entry.is_batch() { Payload::Batch(bytes) } else { Payload::Control(bytes) })
            } else if let Some(mark) = inner.marks.at(self.next)
                && let Some(payload) = &mark.control
            {
                (mark.term, Payload::Control(payload.clone()))
            } else {
                return false;
            };
            if !self.push(term, payload) {
                return true;
            }
        }
    }
}

/// Takes batches of one segment, from memory what lies between them. True when there is no room for more.
async fn read_segment(
    shard: &Rc<Shard>,
    group: &Rc<Group>,
    place: Place,
    anchor: Anchor,
    out: &mut Entries,
) -> Result<bool, ReadError> {
    let index = index_of(shard, group, place).await?;
    let (mut position, mut offset, mut next) = start(&index.borrow(), place.name.base, anchor, out.next);
    let mut want = PIECE_BYTES;
    while position < place.bytes {
        let file = shard.segment_file(group, place.name)?;
        let len = usize::try_from(place.bytes - position).unwrap_or(usize::MAX).min(want);
        let piece: Bytes = shard.disk.read_at(&file, position, len).await?;
        if piece.is_empty() {
            let reason = format!("the file has {position} bytes of {}", place.bytes);
            return Err(damaged_at(group, place, reason));
        }
        // What is read belongs to this log only if it was not cut, and did not begin anew, since.
        if !place.holds(group) {
            return Err(ReadError::Io(io::ErrorKind::Interrupted.into()));
        }
        let inner = group.inner.borrow();
        if out.next <= inner.marks.before().index {
            // It went meanwhile; what is left of the marks does not tell what it was.
            return Ok(false);
        }
        let mut counter = Counter { numbering: Numbering::new(&inner.marks, next), anchor };
        let mut walk = Walk::with_holes(&piece, offset, place.name.holes_to());
        let mut short = None;
        loop {
            match walk.step() {
                Step::Batch(header, at) => {
                    let number = counter.batch(header.base_offset);
                    if number == 0 || number < out.next {
                        continue;
                    }
                    let bytes = piece.slice(at..walk.at());
                    let wrong = match number {
                        _ if number > out.next => Some("has another index than it should"),
                        _ if !record_batch::crc_ok(&bytes) => Some("has a wrong checksum"),
                        _ => None,
                    };
                    if let Some(what) = wrong {
                        drop(inner);
                        let reason = format!("the batch at offset {} {what}", header.base_offset);
                        return Err(damaged_at(group, place, reason));
                    }
                    let term = inner.marks.term_at(number).unwrap_or(0);
                    if !out.push(term, Payload::Batch(bytes)) || out.take_from_memory(&inner) {
                        return Ok(true);
                    }
                }
                Step::End => break,
                Step::Short(bytes) => {
                    short = Some(bytes);
                    break;
                }
                Step::Damaged(reason) => {
                    drop(inner);
                    return Err(damaged_at(group, place, reason));
                }
            }
        }
        if let (0, Some(bytes)) = (walk.at(), short) {
            if piece.len() < len || bytes <= len || bytes as u64 > place.bytes - position {
                drop(inner);
                return Err(damaged_at(group, place, format!("ends inside of offset {offset}")));
            }
            want = bytes;
        }
        position += walk.at() as u64;
        offset = walk.offset();
        next = Some(counter.numbering.next()).filter(|next| *next > 0);
    }
    Ok(false)
}

/// Offset at which an entry begins; `None` where it cannot be said.
fn locate(shard: &Shard, group: &Group, inner: &Inner, index: u64) -> io::Result<Option<i64>> {
    if let Some(entry) = inner.tail.get(index) {
        return Ok(Some(entry.base_offset));
    }
    if let Some(mark) = inner.marks.at(index) {
        return Ok(Some(mark.offset));
    }
    let Some(anchor) = inner.anchor(index) else { return Ok(None) };
    let segment = &inner.segments[anchor.segment];
    let raw = match shard.files.read(&group.segment_index_path(segment.name())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        result => result?,
    };
    let entries = segment_index::decode(&raw, segment.base, segment.bytes).unwrap_or_default();
    let (position, _, next) = start(&entries, segment.base, anchor, index);
    let file = shard.files.open(&group.segment_path(segment.name()), flumen_io::Mode::default())?;
    let mut counter = Counter { numbering: Numbering::new(&inner.marks, next), anchor };
    let mut batches = Batches::starting(&file, segment.bytes, position);
    loop {
        match batches.step()? {
            Found::Batch(header, _) => {
                let number = counter.batch(header.base_offset);
                if number >= index {
                    return Ok((number == index).then_some(header.base_offset));
                }
            }
            Found::End => return Ok(None),
            Found::Damaged(reason) => return Err(io::Error::other(reason)),
        }
    }
}
