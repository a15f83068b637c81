//! The sidecar index of a segment as bytes, and looking things up in it. Pure.
//!
//! The index is a hint that saves reading: a reader always walks batch headers from the entry it found, and an index
//! that does not fit its segment is built again from the segment.

use crate::codec::Cursor;

pub const INDEX_HEADER_BYTES: usize = 16;
pub const INDEX_ENTRY_BYTES: usize = 40;

/// A reader walks at most this much to its target, some ten microseconds, while the index of a segment of 1 GiB stays
/// below 1 MiB in memory.
pub const INDEX_INTERVAL_BYTES: u64 = 64 * 1024;

const MAGIC: [u8; 4] = *b"FLIX";
const VERSION: u16 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    pub offset: i64,
    pub position: u32,
    pub term: u32,
    /// Raft index of the batch at `position`; 0 when rebuilt from the segment, which does not have it.
    pub raft_index: u64,
    /// Largest timestamp of all batches before `position`; `i64::MIN` for none.
    pub max_timestamp_before: i64,
}

pub fn encode_header(base_offset: i64) -> [u8; INDEX_HEADER_BYTES] {
    let mut out = [0; INDEX_HEADER_BYTES];
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[8..].copy_from_slice(&base_offset.to_le_bytes());
    out
}

pub fn encode_entry(entry: &IndexEntry) -> [u8; INDEX_ENTRY_BYTES] {
    let mut out = [0; INDEX_ENTRY_BYTES];
    out[..8].copy_from_slice(&entry.offset.to_le_bytes());
    out[8..12].copy_from_slice(&entry.position.to_le_bytes());
    out[12..16].copy_from_slice(&entry.term.to_le_bytes());
    out[16..24].copy_from_slice(&entry.raft_index.to_le_bytes());
    out[24..32].copy_from_slice(&entry.max_timestamp_before.to_le_bytes());
    let crc = crc32c::crc32c(&out[..32]);
    out[32..36].copy_from_slice(&crc.to_le_bytes());
    out
}

pub fn decode_entry(bytes: &[u8]) -> Option<IndexEntry> {
    let raw = bytes.first_chunk::<INDEX_ENTRY_BYTES>()?;
    let mut cursor = Cursor::new(raw);
    let entry = IndexEntry {
        offset: cursor.i64()?,
        position: cursor.u32()?,
        term: cursor.u32()?,
        raft_index: cursor.u64()?,
        max_timestamp_before: cursor.i64()?,
    };
    (cursor.u32()? == crc32c::crc32c(&raw[..32])).then_some(entry)
}

/// All good entries from the front that lie within `segment_bytes`; `None` when this is no index of that segment.
/// Stops at the first entry that is damaged or does not rise.
pub fn decode(bytes: &[u8], base_offset: i64, segment_bytes: u64) -> Option<Vec<IndexEntry>> {
    let (header, rest) = bytes.split_first_chunk::<INDEX_HEADER_BYTES>()?;
    if *header != encode_header(base_offset) {
        return None;
    }
    let mut entries: Vec<IndexEntry> = Vec::with_capacity(rest.len() / INDEX_ENTRY_BYTES);
    for raw in rest.chunks_exact(INDEX_ENTRY_BYTES) {
        let Some(entry) = decode_entry(raw) else { break };
        let rises = match entries.last() {
            None => entry.offset >= base_offset,
            Some(last) => {
                entry.offset >= last.offset
                    && entry.position >= last.position
                    && entry.max_timestamp_before >= last.max_timestamp_before
            }
        };
        if !rises || u64::from(entry.position) > segment_bytes {
            break;
        }
        entries.push(entry);
    }
    Some(entries)
}

/// Where to start walking to reach `offset`: position and offset there.
pub fn seek_offset(entries: &[IndexEntry], base_offset: i64, offset: i64) -> (u64, i64) {
    let after = entries.partition_point(|entry| entry.offset <= offset);
    match after.checked_sub(1).and_then(|at| entries.get(at)) {
        Some(entry) => (u64::from(entry.position), entry.offset),
        None => (0, base_offset),
    }
}

/// Where to start walking to reach the first batch with a timestamp of at least `timestamp`.
pub fn seek_timestamp(entries: &[IndexEntry], base_offset: i64, timestamp: i64) -> (u64, i64) {
    let after = entries.partition_point(|entry| entry.max_timestamp_before < timestamp);
    match after.checked_sub(1).and_then(|at| entries.get(at)) {
        Some(entry) => (u64::from(entry.position), entry.offset),
        None => (0, base_offset),
    }
}

/// Chooses which batches of a segment get an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexBuilder {
    pub max_timestamp: i64,
    last_position: u64,
}

impl IndexBuilder {
    pub fn new() -> Self {
        Self::resume(i64::MIN, 0)
    }

    /// Goes on after an entry at `position` with `max_timestamp` before it.
    pub fn resume(max_timestamp: i64, position: u64) -> Self {
        Self { max_timestamp, last_position: position }
    }

    /// A batch lies at `position`. Returns its entry when one is due.
    pub fn batch(
        &mut self,
        offset: i64,
        position: u64,
        term: u32,
        raft_index: u64,
        timestamp: i64,
    ) -> Option<IndexEntry> {
        // The first batch of a segment has one for its index, which nothing else tells.
        let first = position == 0 && raft_index > 0;
        let entry = (first || position >= self.last_position + INDEX_INTERVAL_BYTES)
            .then(|| self.entry(offset, position, term, raft_index));
        self.max_timestamp = self.max_timestamp.max(timestamp);
        entry.flatten()
    }

    /// The entry that ends a run, at the present end of the segment.
    pub fn end(&mut self, next_offset: i64, position: u64, term: u32, raft_index: u64) -> Option<IndexEntry> {
        self.entry(next_offset, position, term, raft_index)
    }

    fn entry(&mut self, offset: i64, position: u64, term: u32, raft_index: u64) -> Option<IndexEntry> {
        let entry = IndexEntry {
            offset,
            // Segments roll before 4 GiB; an entry that could not be written is only a longer walk.
            position: u32::try_from(position).ok()?,
            term,
            raft_index,
            max_timestamp_before: self.max_timestamp,
        };
        self.last_position = position;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn build(batches: &[(u32, i64)]) -> (Vec<u8>, Vec<IndexEntry>, u64) {
        let mut bytes = encode_header(100).to_vec();
        let (mut position, mut offset) = (0u64, 100);
        let mut builder = IndexBuilder::new();
        for (size, timestamp) in batches {
            if let Some(entry) = builder.batch(offset, position, 1, 0, *timestamp) {
                bytes.extend_from_slice(&encode_entry(&entry));
            }
            position += u64::from(*size);
            offset += 1;
        }
        let end = builder.end(offset, position, 1, 7).unwrap();
        bytes.extend_from_slice(&encode_entry(&end));
        let entries = decode(&bytes, 100, position).unwrap();
        (bytes, entries, position)
    }

    proptest! {
        #[test]
        fn lookups_never_pass_their_target(
            batches in prop::collection::vec((61u32..90_000, 0i64..500), 1..60),
            offset in 0usize..60,
            timestamp in 0i64..500,
        ) {
            let (_, entries, size) = build(&batches);
            prop_assert_eq!(u64::from(entries.last().unwrap().position), size);
            let offset = 100 + (offset % batches.len()) as i64;
            let (position, at) = seek_offset(&entries, 100, offset);
            prop_assert!(at <= offset);
            let want: u64 = batches[..(at - 100) as usize].iter().map(|b| u64::from(b.0)).sum();
            prop_assert_eq!(position, want);
            let (_, at) = seek_timestamp(&entries, 100, timestamp);
            if let Some(first) = batches.iter().position(|b| b.1 >= timestamp) {
                prop_assert!(at <= 100 + first as i64);
            }
        }

        #[test]
        fn damage_only_shortens(
            batches in prop::collection::vec((40_000u32..90_000, 0i64..500), 1..40),
            at in 0usize..10_000,
            bit in 0u8..8,
        ) {
            let (mut bytes, entries, size) = build(&batches);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            match decode(&bytes, 100, size) {
                None => prop_assert!(at < INDEX_HEADER_BYTES),
                Some(got) => prop_assert!(entries.starts_with(&got)),
            }
        }

        #[test]
        fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            decode(&bytes, 0, 1 << 30);
        }
    }
}
