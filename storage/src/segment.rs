//! A segment: Kafka v2 batches back to back, and a sparse index beside it.
//!
//! The index (`<base>.idx`) is a convenience: 32-byte entries {base offset, position, largest timestamp
//! before it, CRC}. A bad or missing one is rebuilt from the `.log`.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flumen_protocol::record_batch::{self, BatchHeader, HEADER_BYTES};

use crate::producer_state::take;

/// One index entry for at least this many bytes of batches: a look-up reads at most this much too far.
pub(crate) const INDEX_INTERVAL_BYTES: u64 = 32 << 10;
const INDEX_ENTRY_BYTES: usize = 32;
/// Read at once while a segment is scanned.
const SCAN_BYTES: usize = 1 << 20;
/// A batch that claims more than this is not one (the protocol's own limit is far below).
pub(crate) const BATCH_BYTES_MAX: usize = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) base_offset: i64,
    pub(crate) position: u64,
    /// Largest record timestamp of the batches before `position` in this segment; i64::MIN for none.
    pub(crate) max_timestamp_before: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) base_offset: i64,
    /// Offset after the last record.
    pub(crate) end_offset: i64,
    pub(crate) bytes: u64,
    /// i64::MIN while empty.
    pub(crate) max_timestamp: i64,
    /// Timestamp of the first batch: what the age of a segment counts from.
    pub(crate) first_timestamp: i64,
    pub(crate) index: Vec<IndexEntry>,
    /// Entries of `index` already in the file.
    pub(crate) index_written: usize,
}

impl Segment {
    pub(crate) fn new(base_offset: i64) -> Segment {
        Segment {
            base_offset,
            end_offset: base_offset,
            bytes: 0,
            max_timestamp: i64::MIN,
            first_timestamp: i64::MIN,
            index: Vec::new(),
            index_written: 0,
        }
    }

    /// Takes note of a batch that was written at the end.
    pub(crate) fn note(&mut self, header: &BatchHeader) {
        let due = self.index.last().is_none_or(|e| self.bytes - e.position >= INDEX_INTERVAL_BYTES);
        if due {
            self.index.push(IndexEntry {
                base_offset: header.base_offset,
                position: self.bytes,
                max_timestamp_before: self.max_timestamp,
            });
        }
        if self.first_timestamp == i64::MIN {
            self.first_timestamp = header.max_timestamp;
        }
        self.bytes += header.total_bytes() as u64;
        self.end_offset = header.next_offset();
        self.max_timestamp = self.max_timestamp.max(header.max_timestamp);
    }

    /// Where to start reading for `offset`.
    pub(crate) fn position_before(&self, offset: i64) -> u64 {
        let at = self.index.partition_point(|e| e.base_offset <= offset);
        at.checked_sub(1).map_or(0, |at| self.index[at].position)
    }

    /// Where to start looking for the first record at or after `timestamp`.
    pub(crate) fn position_before_timestamp(&self, timestamp: i64) -> u64 {
        let at = self.index.partition_point(|e| e.max_timestamp_before < timestamp);
        at.checked_sub(1).map_or(0, |at| self.index[at].position)
    }

    /// Index entries not yet in the file, encoded.
    pub(crate) fn take_unwritten_index(&mut self) -> Vec<u8> {
        let mut out = Vec::with_capacity((self.index.len() - self.index_written) * INDEX_ENTRY_BYTES);
        for entry in &self.index[self.index_written..] {
            encode_index_entry(entry, &mut out);
        }
        self.index_written = self.index.len();
        out
    }
}

fn encode_index_entry(entry: &IndexEntry, out: &mut Vec<u8>) {
    let from = out.len();
    out.extend(entry.base_offset.to_le_bytes());
    out.extend(entry.position.to_le_bytes());
    out.extend(entry.max_timestamp_before.to_le_bytes());
    let crc = crc32c::crc32c(&out[from..]);
    out.extend(crc.to_le_bytes());
    out.extend([0; 4]);
}

fn decode_index(bytes: &[u8], base_offset: i64, log_bytes: u64) -> Vec<IndexEntry> {
    let mut entries: Vec<IndexEntry> = Vec::new();
    for chunk in bytes.chunks_exact(INDEX_ENTRY_BYTES) {
        let mut rest = chunk;
        let entry = (|| {
            let entry = IndexEntry {
                base_offset: i64::from_le_bytes(take(&mut rest)?),
                position: u64::from_le_bytes(take(&mut rest)?),
                max_timestamp_before: i64::from_le_bytes(take(&mut rest)?),
            };
            (u32::from_le_bytes(take(&mut rest)?) == crc32c::crc32c(&chunk[..24])).then_some(entry)
        })();
        let Some(entry) = entry else { break };
        let follows = match entries.last() {
            Some(last) => entry.base_offset > last.base_offset && entry.position > last.position,
            None => entry.position == 0 && entry.base_offset >= base_offset,
        };
        if !follows || entry.position >= log_bytes {
            break;
        }
        entries.push(entry);
    }
    entries
}

pub(crate) fn log_path(dir: &Path, base_offset: i64) -> PathBuf {
    dir.join(format!("{base_offset:020}.log"))
}

pub(crate) fn index_path(dir: &Path, base_offset: i64) -> PathBuf {
    dir.join(format!("{base_offset:020}.idx"))
}

/// Base offsets of the segments in a directory, in order.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<i64>> {
    let mut bases = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if let Some(base) = name.to_str().and_then(|n| n.strip_suffix(".log")).and_then(|n| n.parse().ok()) {
            bases.push(base);
        }
    }
    bases.sort_unstable();
    Ok(bases)
}

/// A segment as found on disk.
pub(crate) struct Loaded {
    pub(crate) segment: Segment,
    /// Why reading stopped before the end of the file, if it did.
    pub(crate) stopped: Option<String>,
}

/// Reads a segment's index and scans what the index does not cover, or, from `verify_from` on, all:
/// batches whose last offset is at or after it must also have a right checksum. `each` sees the header
/// of every batch at or after `headers_from`.
pub(crate) fn load(
    dir: &Path,
    base_offset: i64,
    verify_from: i64,
    headers_from: i64,
    mut each: impl FnMut(&BatchHeader),
) -> io::Result<Loaded> {
    let mut file = fs::File::open(log_path(dir, base_offset))?;
    let file_bytes = file.metadata()?.len();
    let index_bytes = fs::read(index_path(dir, base_offset)).unwrap_or_default();
    let mut entries = decode_index(&index_bytes, base_offset, file_bytes);
    // The scan starts where both the caller's wishes and the index allow.
    let want = verify_from.min(headers_from);
    while entries.len() > 1 && entries.last().is_some_and(|e| e.base_offset > want) {
        entries.pop();
    }
    let start = entries.last().copied();
    let mut segment = Segment::new(base_offset);
    segment.index = entries;
    segment.index_written = segment.index.len();
    if let Some(start) = start {
        segment.bytes = start.position;
        segment.end_offset = start.base_offset;
        segment.max_timestamp = start.max_timestamp_before;
        if start.position > 0 {
            let mut head = [0u8; HEADER_BYTES];
            file.read_exact(&mut head)?;
            if let Ok(first) = record_batch::parse_header(&head) {
                segment.first_timestamp = first.max_timestamp;
            }
        }
        // `note` pushes an entry for the batch at this position again.
        segment.index.pop();
        segment.index_written = segment.index.len();
    }
    let stopped = scan(&mut file, file_bytes, &mut segment, verify_from, |header| {
        if header.last_offset() >= headers_from {
            each(header);
        }
    })?;
    Ok(Loaded { segment, stopped })
}

fn scan(
    file: &mut fs::File,
    file_bytes: u64,
    segment: &mut Segment,
    verify_from: i64,
    mut each: impl FnMut(&BatchHeader),
) -> io::Result<Option<String>> {
    let mut buffer: Vec<u8> = Vec::new();
    let mut at = 0usize;
    file.seek(SeekFrom::Start(segment.bytes))?;
    loop {
        let left = file_bytes - segment.bytes;
        if left == 0 {
            return Ok(None);
        }
        let position = segment.bytes;
        let mut need = HEADER_BYTES;
        if buffer.len() - at >= HEADER_BYTES {
            match record_batch::parse_header(&buffer[at..]) {
                Ok(header) if header.base_offset < segment.end_offset => {
                    return Ok(Some(format!("offset {} again at position {position}", header.base_offset)));
                }
                Ok(header) if header.total_bytes() > BATCH_BYTES_MAX => {
                    return Ok(Some(format!(
                        "a batch of {} bytes at position {position}",
                        header.total_bytes()
                    )));
                }
                Ok(header) if header.total_bytes() as u64 > left => {
                    return Ok(Some(format!("a batch cut short at position {position}")));
                }
                Ok(header) => {
                    let total = header.total_bytes();
                    let verify = header.last_offset() >= verify_from;
                    if buffer.len() - at >= total {
                        if verify && !record_batch::crc_ok(&buffer[at..at + total]) {
                            return Ok(Some(format!("a batch with a wrong checksum at position {position}")));
                        }
                        each(&header);
                        segment.note(&header);
                        at += total;
                        continue;
                    }
                    need = total;
                }
                Err(_) => return Ok(Some(format!("no batch at position {position}"))),
            }
        }
        buffer.drain(..at);
        at = 0;
        let more = need.saturating_sub(buffer.len()).max(SCAN_BYTES);
        let before = buffer.len();
        Read::take(&mut *file, more as u64).read_to_end(&mut buffer)?;
        if buffer.len() == before {
            return Ok(Some(format!("the file ends inside a batch at position {position}")));
        }
        if buffer.len() < HEADER_BYTES {
            return Ok(Some(format!("{} stray bytes at position {position}", buffer.len())));
        }
    }
}

/// Cuts a segment (and its index) to what `segment` says and makes that durable.
pub(crate) fn truncate(dir: &Path, segment: &mut Segment) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).open(log_path(dir, segment.base_offset))?;
    file.set_len(segment.bytes)?;
    file.sync_all()?;
    rewrite_index(dir, segment)
}

pub(crate) fn rewrite_index(dir: &Path, segment: &mut Segment) -> io::Result<()> {
    segment.index_written = 0;
    let bytes = segment.take_unwritten_index();
    let mut file = fs::File::create(index_path(dir, segment.base_offset))?;
    file.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flumen_protocol::record::BatchBuilder;

    fn batch(base_offset: i64, timestamp: i64, bytes: usize) -> Vec<u8> {
        let mut builder = BatchBuilder::new();
        builder.append(timestamp, None, Some(&vec![7; bytes]), &[]);
        builder.build(base_offset).to_vec()
    }

    fn write(dir: &Path, batches: &[Vec<u8>]) {
        fs::write(log_path(dir, 0), batches.concat()).unwrap();
    }

    #[test]
    fn a_missing_index_is_rebuilt_and_a_written_one_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let batches: Vec<_> = (0..100).map(|i| batch(i, 1000 + i, 2000)).collect();
        write(dir.path(), &batches);
        let mut seen = 0;
        let mut first = load(dir.path(), 0, i64::MAX, 0, |_| seen += 1).unwrap();
        assert_eq!((seen, first.segment.end_offset, first.stopped.clone()), (100, 100, None));
        assert!(first.segment.index.len() > 4);
        rewrite_index(dir.path(), &mut first.segment).unwrap();
        let mut again = 0;
        let second = load(dir.path(), 0, i64::MAX, i64::MAX, |_| again += 1).unwrap();
        assert_eq!(again, 0);
        assert_eq!(second.segment.index, first.segment.index);
        assert_eq!(
            (second.segment.end_offset, second.segment.bytes, second.segment.max_timestamp),
            (first.segment.end_offset, first.segment.bytes, first.segment.max_timestamp)
        );
    }

    #[test]
    fn a_torn_tail_stops_the_scan_at_the_last_whole_batch() {
        let dir = tempfile::tempdir().unwrap();
        let batches: Vec<_> = (0..10).map(|i| batch(i, i, 100)).collect();
        let whole = batches.concat();
        let last = whole.len() - batches[9].len();
        for cut in [last + 1, last + 61, whole.len() - 1] {
            fs::write(log_path(dir.path(), 0), &whole[..cut]).unwrap();
            let mut loaded = load(dir.path(), 0, 0, 0, |_| ()).unwrap();
            assert_eq!((loaded.segment.end_offset, loaded.segment.bytes), (9, last as u64));
            assert!(loaded.stopped.is_some());
            truncate(dir.path(), &mut loaded.segment).unwrap();
            assert_eq!(load(dir.path(), 0, 0, 0, |_| ()).unwrap().stopped, None);
        }
    }

    #[test]
    fn a_flipped_bit_is_found_where_checksums_are_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut batches: Vec<_> = (0..10).map(|i| batch(i, i, 100)).collect();
        let at = batches[5].len() - 3;
        batches[5][at] ^= 4;
        write(dir.path(), &batches);
        assert_eq!(load(dir.path(), 0, 0, 0, |_| ()).unwrap().segment.end_offset, 5);
        assert_eq!(
            load(dir.path(), 0, 8, 0, |_| ()).unwrap().segment.end_offset,
            10,
            "below it nobody asked"
        );
    }

    #[test]
    fn looks_up_offsets_and_timestamps() {
        let mut segment = Segment::new(0);
        for i in 0..1000 {
            let b = batch(i, i * 10, 1000);
            segment.note(&record_batch::parse(&b).unwrap());
        }
        let at = |p: u64| segment.index.iter().find(|e| e.position == p).unwrap().base_offset;
        for offset in [0, 1, 499, 999] {
            let found = at(segment.position_before(offset));
            assert!(found <= offset && offset - found < 40);
            let found = at(segment.position_before_timestamp(offset * 10));
            assert!(found <= offset && offset - found < 80, "{found} for {offset}");
        }
    }
}
