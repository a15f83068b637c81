//! At start: whether the segments of a partition are there, batch after batch, and which Raft index each begins with.
//!
//! Whole indexes say so without reading the segments. They are not synced, so after a loss of power one may be missing, torn,
//! or of entries that were replaced since. What they say of Raft indexes must fit the marks, and come out at what the state
//! says; else the batches are counted, from where the log begins, or back from its end where the beginning has gone.

use std::path::Path;

use flumen_io::FileSystem;

use crate::marks::{Marks, Numbering};
use crate::restore::{Index, OnDisk, RestoreError, load_index, scan, write_index};

/// The segments that count, and what is known of them.
pub(crate) struct Counted<'a> {
    pub files: &'a FileSystem,
    pub dir: &'a Path,
    pub on_disk: &'a OnDisk,
    /// Base and bytes of each.
    pub segments: &'a [(i64, u64)],
    /// Up to the last entry in them.
    pub marks: &'a Marks,
    /// Its index, and the offset after it.
    pub flushed: (u64, i64),
}

#[derive(Default)]
pub(crate) struct Numbered {
    /// Of each segment's first batch; 0: unknown.
    pub first_indexes: Vec<u64>,
    /// Base and index of the last segment, where that can be added to.
    pub last_index: Option<(i64, Index)>,
    /// Of the entry after the last batch; 0: unknown.
    pub after_batches: u64,
    /// An index names another entry than the count before it.
    disagrees: bool,
}

impl Counted<'_> {
    /// Checks all segments and builds indexes that are not whole.
    pub fn check(&self) -> Result<Numbered, RestoreError> {
        let mut found = self.look(false)?;
        if found.disagrees || !self.fits(&found) {
            found = self.look(true)?;
        }
        self.count_back(&mut found)?;
        if !self.fits(&found) {
            found.first_indexes.fill(0);
            found.after_batches = 0;
        }
        Ok(found)
    }

    fn end_of(&self, at: usize) -> i64 {
        self.segments.get(at + 1).map_or(self.flushed.1, |next| next.0)
    }

    fn is_compacted(&self, at: usize) -> bool {
        self.on_disk.compacted.contains_key(&self.segments[at].0)
    }

    fn load(
        &self,
        at: usize,
        numbering: &mut Numbering<'_>,
        from_scratch: bool,
    ) -> Result<Index, RestoreError> {
        let (base, bytes) = self.segments[at];
        let name = self.on_disk.name(base);
        let index = load_index(self.files, self.dir, name, bytes, self.end_of(at), numbering, from_scratch)?;
        // What a run left there that was cut off is not what will be appended.
        if index.rebuilt || index.in_file.is_none() {
            write_index(self.files, self.dir, name, &index.entries)
                .map_err(|error| RestoreError::Io(self.dir.to_owned(), error))?;
        }
        Ok(index)
    }

    fn look(&self, from_scratch: bool) -> Result<Numbered, RestoreError> {
        let mut numbering = Numbering::new(self.marks, None);
        let mut found = Numbered::default();
        for (at, (base, _)) in self.segments.iter().enumerate() {
            numbering.meet(*base);
            let counted = self.marks.next_batch(numbering.next());
            // What compaction has written has no indexes, and needs none of this.
            let index = self.load(at, &mut numbering, from_scratch && !self.is_compacted(at))?;
            let first = index.entries.first().filter(|entry| entry.position == 0);
            let named = first.map_or(0, |entry| entry.raft_index);
            // Two that disagree are as good as none.
            let disagree = named > 0 && counted > 0 && named != counted;
            found.disagrees |= disagree;
            found.first_indexes.push(match named {
                _ if self.is_compacted(at) || disagree => 0,
                0 => counted,
                named => named,
            });
            if at + 1 == self.segments.len() && !self.is_compacted(at) {
                found.last_index = Some((*base, index));
            }
        }
        found.after_batches = numbering.next();
        Ok(found)
    }

    /// Whether the indexes come out at the last entry, and follow each other; where nothing is known, nothing is wrong.
    fn fits(&self, found: &Numbered) -> bool {
        let begins = self.marks.before();
        let known =
            |at: &usize| self.segments[*at].0 >= begins.offset && found.first_indexes[*at] > begins.index;
        let known: Vec<u64> =
            (0..self.segments.len()).filter(known).map(|at| found.first_indexes[at]).collect();
        let rises = known.windows(2).all(|pair| pair[0] < pair[1]);
        let after = found.after_batches;
        let ends = after <= begins.index || self.marks.next_batch(after) == self.flushed.0 + 1;
        rises && ends
    }

    /// A segment of which only the end is known, as all before it went, and its own index with them.
    fn count_back(&self, found: &mut Numbered) -> Result<(), RestoreError> {
        for at in (0..self.segments.len()).rev() {
            let (base, bytes) = self.segments[at];
            if self.is_compacted(at) || base <= self.marks.before().offset {
                break;
            }
            if found.first_indexes[at] > 0 {
                continue;
            }
            let after = found.first_indexes.get(at + 1).copied().unwrap_or(self.flushed.0 + 1);
            let mut count = 0;
            scan(self.files, (self.dir, self.on_disk.name(base)), bytes, (0, base), |_, _, _| {
                count += 1;
                Ok(())
            })?;
            let Some(first) = self.marks.batches_back(after, count) else { break };
            let mut numbering = Numbering::new(self.marks, Some(first));
            let index = self.load(at, &mut numbering, true)?;
            found.first_indexes[at] = first;
            if at + 1 == self.segments.len() {
                found.last_index = Some((base, index));
                found.after_batches = numbering.next();
            }
        }
        Ok(())
    }

    /// Lets the log begin, for other replicas, no earlier than all that follows is there, whole, and has indexes.
    pub fn begin_where_known(&self, first_indexes: &[u64], marks: &mut Marks) {
        let before = marks.before();
        let first = self.segments.first().map_or(self.flushed.1, |segment| segment.0);
        let mut from = before.offset.max(first);
        for (at, (base, _)) in self.segments.iter().enumerate() {
            let unknown = self.is_compacted(at) || (first_indexes[at] == 0 && *base >= before.offset);
            if unknown && self.end_of(at) > before.offset {
                from = from.max(self.end_of(at));
            }
        }
        if from == before.offset {
            return;
        }
        match self.segments.iter().position(|segment| segment.0 == from).filter(|at| first_indexes[*at] > 0) {
            Some(at) => marks.raise(first_indexes[at] - 1, from),
            None => marks.raise(self.flushed.0, self.flushed.1),
        }
    }
}
