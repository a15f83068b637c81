//! Records inside a batch: reading them (export, compaction, look-ups by time) and building batches.
//!
//! Never used on the produce or fetch path. Decoding borrows from the batch, or from a scratch buffer when the batch is
//! compressed, and copies nothing else. The checksum is the caller's to check.

use bytes::{BufMut, BytesMut};

use crate::compression::{self, Compression, CompressionError};
use crate::record_batch::{self, BatchError, BatchHeader, DELETE_HORIZON, HEADER_BYTES};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    pub offset: i64,
    /// Milliseconds; the batch's append time where the topic stamps the broker's clock.
    pub timestamp: i64,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub headers: Headers<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(transparent)]
    Compression(#[from] CompressionError),
    #[error("a record is malformed")]
    Malformed,
    #[error("{0} bytes after the last record")]
    TrailingBytes(usize),
}

/// Headers of one record, read as they are asked for; the record was checked when it was cut out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers<'a> {
    left: usize,
    bytes: &'a [u8],
}

impl<'a> Headers<'a> {
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }
}

impl<'a> Iterator for Headers<'a> {
    type Item = (&'a [u8], Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let mut cursor = Cursor { bytes: self.bytes };
        match cursor.header() {
            Some(header) => {
                self.left -= 1;
                self.bytes = cursor.bytes;
                Some(header)
            }
            // Cannot happen after the check in `Records`; ends rather than trusts it.
            None => {
                self.left = 0;
                None
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Headers<'_> {}
impl std::iter::FusedIterator for Headers<'_> {}

/// Scratch for decompressed batches, kept between batches so that its memory is reused.
#[derive(Debug, Default)]
pub struct RecordsBuf {
    bytes: Vec<u8>,
}

impl RecordsBuf {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn decode<'a>(
        &'a mut self,
        batch: &'a [u8],
        max_decompressed: usize,
    ) -> Result<Records<'a>, RecordError> {
        decode_records(batch, &mut self.bytes, max_decompressed)
    }
}

/// Opens the batch at the front of `batch`. `scratch` is only written when the batch is compressed, and then holds at
/// most `max_decompressed` bytes.
pub fn decode_records<'a>(
    batch: &'a [u8],
    scratch: &'a mut Vec<u8>,
    max_decompressed: usize,
) -> Result<Records<'a>, RecordError> {
    let header = record_batch::parse(batch)?;
    // `parse` has shown that the batch is at least a header and all there.
    let payload = &batch[HEADER_BYTES..header.total_bytes()];
    let bytes = match header.compression()? {
        Compression::None => payload,
        codec => {
            compression::decompress(codec, payload, scratch, max_decompressed)?;
            scratch.as_slice()
        }
    };
    Ok(Records { header, left: header.record_count, cursor: Cursor { bytes } })
}

/// Records of one batch in order. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    header: BatchHeader,
    left: i32,
    cursor: Cursor<'a>,
}

impl<'a> Records<'a> {
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    fn cut_record(&mut self) -> Option<Record<'a>> {
        let length = usize::try_from(self.cursor.varint()?).ok()?;
        let mut record = Cursor { bytes: self.cursor.take(length)? };
        let _attributes = record.take(1)?;
        let timestamp_delta = record.varlong()?;
        let offset_delta = record.varint()?;
        if offset_delta < 0 || offset_delta > self.header.last_offset_delta {
            return None;
        }
        let key = record.nullable_bytes()?;
        let value = record.nullable_bytes()?;
        let left = usize::try_from(record.varint()?).ok()?;
        let bytes = record.bytes;
        // A header takes at least two bytes; each is walked once here so that `Headers` need not fail.
        if left > bytes.len() / 2 {
            return None;
        }
        for _ in 0..left {
            record.header()?;
        }
        if !record.bytes.is_empty() {
            return None;
        }
        let timestamp = if self.header.log_append_time() {
            self.header.max_timestamp
        } else {
            self.header.base_timestamp.checked_add(timestamp_delta)?
        };
        let offset = self.header.base_offset.checked_add(i64::from(offset_delta))?;
        Some(Record { offset, timestamp, key, value, headers: Headers { left, bytes } })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            let trailing = self.cursor.bytes.len();
            self.cursor.bytes = &[];
            return (trailing > 0).then_some(Err(RecordError::TrailingBytes(trailing)));
        }
        match self.cut_record() {
            Some(record) => {
                self.left -= 1;
                Some(Ok(record))
            }
            None => {
                self.left = 0;
                self.cursor.bytes = &[];
                Some(Err(RecordError::Malformed))
            }
        }
    }
}

impl std::iter::FusedIterator for Records<'_> {}

/// Zigzag varints over a slice; `None` on anything malformed.
#[derive(Debug, Clone, Copy)]
struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(n)?;
        self.bytes = tail;
        Some(head)
    }

    fn varlong(&mut self) -> Option<i64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, tail) = self.bytes.split_first()?;
            self.bytes = tail;
            if shift == 63 && byte > 1 {
                return None;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        None
    }

    fn varint(&mut self) -> Option<i32> {
        let mut value = 0u32;
        for shift in (0..32).step_by(7) {
            let (&byte, tail) = self.bytes.split_first()?;
            self.bytes = tail;
            if shift == 28 && byte > 0x0f {
                return None;
            }
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some((value >> 1) as i32 ^ -((value & 1) as i32));
            }
        }
        None
    }

    fn nullable_bytes(&mut self) -> Option<Option<&'a [u8]>> {
        match self.varint()? {
            -1 => Some(None),
            n => self.take(usize::try_from(n).ok()?).map(Some),
        }
    }

    fn header(&mut self) -> Option<(&'a [u8], Option<&'a [u8]>)> {
        let key = self.nullable_bytes()??;
        Some((key, self.nullable_bytes()?))
    }
}

fn put_varlong(buf: &mut Vec<u8>, value: i64) {
    let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
    while zigzag >= 0x80 {
        buf.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    buf.push(zigzag as u8);
}

fn varlong_bytes(value: i64) -> usize {
    let zigzag = ((value << 1) ^ (value >> 63)) as u64;
    ((64 - (zigzag | 1).leading_zeros()) as usize).div_ceil(7)
}

fn put_nullable_bytes(buf: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        None => put_varlong(buf, -1),
        Some(bytes) => {
            put_varlong(buf, bytes.len() as i64);
            buf.extend_from_slice(bytes);
        }
    }
}

fn nullable_bytes_size(bytes: Option<&[u8]>) -> usize {
    bytes.map_or(1, |bytes| varlong_bytes(bytes.len() as i64) + bytes.len())
}

/// Builds one batch: for internal topics, dead letters, compaction and tests.
#[derive(Debug, Clone)]
pub struct BatchBuilder {
    records: Vec<u8>,
    header: BatchHeader,
    compression: Compression,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    pub fn new() -> Self {
        let header = BatchHeader {
            base_offset: 0,
            batch_length: 0,
            leader_epoch: -1,
            magic: 2,
            crc: 0,
            attributes: 0,
            last_offset_delta: -1,
            base_timestamp: -1,
            max_timestamp: -1,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            record_count: 0,
        };
        Self { records: Vec::new(), header, compression: Compression::None }
    }

    /// A batch that takes the place of the one with this header: the same offsets, producer, sequence, kind, timestamps
    /// and compression, and no records yet. With `build(header.base_offset)` it covers what the other one did.
    pub fn replacing(header: &BatchHeader, delete_horizon_ms: Option<i64>) -> Result<Self, BatchError> {
        let compression = header.compression()?;
        let horizon = delete_horizon_ms.or(header.delete_horizon_ms());
        let kind = header.attributes & !compression.id() & !DELETE_HORIZON;
        let builder = BatchHeader {
            attributes: kind | if horizon.is_some() { DELETE_HORIZON } else { 0 },
            base_timestamp: horizon.unwrap_or(-1),
            last_offset_delta: -1,
            record_count: 0,
            ..*header
        };
        Ok(Self { records: Vec::new(), header: builder, compression })
    }

    /// Adds a record at the next offset. The first record's timestamp becomes the base.
    pub fn append(
        &mut self,
        timestamp_ms: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&str, Option<&[u8]>)],
    ) -> &mut Self {
        let headers = headers.iter().map(|(key, value)| (key.as_bytes(), *value));
        self.append_at(self.header.last_offset_delta + 1, timestamp_ms, key, value, headers)
    }

    /// Adds a record at an offset delta of its own, as compaction leaves gaps. Deltas must rise.
    pub fn append_at<'h>(
        &mut self,
        offset_delta: i32,
        timestamp_ms: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl Iterator<Item = (&'h [u8], Option<&'h [u8]>)> + Clone,
    ) -> &mut Self {
        assert!(offset_delta > self.header.last_offset_delta, "offset deltas must rise");
        if self.is_empty() {
            if self.header.delete_horizon_ms().is_none() {
                self.header.base_timestamp = timestamp_ms;
            }
            self.header.max_timestamp = timestamp_ms;
        }
        let timestamp_delta = timestamp_ms.wrapping_sub(self.header.base_timestamp);
        let (mut header_count, mut header_bytes) = (0i64, 0);
        for (name, content) in headers.clone() {
            header_count += 1;
            header_bytes += nullable_bytes_size(Some(name)) + nullable_bytes_size(content);
        }
        let length = 1
            + varlong_bytes(timestamp_delta)
            + varlong_bytes(i64::from(offset_delta))
            + nullable_bytes_size(key)
            + nullable_bytes_size(value)
            + varlong_bytes(header_count)
            + header_bytes;
        let out = &mut self.records;
        put_varlong(out, length as i64);
        out.push(0);
        put_varlong(out, timestamp_delta);
        put_varlong(out, i64::from(offset_delta));
        put_nullable_bytes(out, key);
        put_nullable_bytes(out, value);
        put_varlong(out, header_count);
        for (name, content) in headers {
            put_nullable_bytes(out, Some(name));
            put_nullable_bytes(out, content);
        }
        self.header.last_offset_delta = offset_delta;
        self.header.max_timestamp = self.header.max_timestamp.max(timestamp_ms);
        self.header.record_count += 1;
        self
    }

    pub fn producer(&mut self, id: i64, epoch: i16, base_sequence: i32) -> &mut Self {
        self.header.producer_id = id;
        self.header.producer_epoch = epoch;
        self.header.base_sequence = base_sequence;
        self
    }

    pub fn compression(&mut self, compression: Compression) -> &mut Self {
        self.compression = compression;
        self
    }

    pub fn transactional(&mut self) -> &mut Self {
        self.header.attributes |= 0x10;
        self
    }

    /// A transaction marker; only a broker may write one.
    pub fn control(&mut self) -> &mut Self {
        self.header.attributes |= 0x20;
        self
    }

    pub fn leader_epoch(&mut self, leader_epoch: i32) -> &mut Self {
        self.header.leader_epoch = leader_epoch;
        self
    }

    /// Keeps the offset range of a compacted batch whose last records are gone.
    pub fn last_offset_delta(&mut self, delta: i32) -> &mut Self {
        self.header.last_offset_delta = self.header.last_offset_delta.max(delta);
        self
    }

    pub fn is_empty(&self) -> bool {
        self.header.record_count == 0
    }

    pub fn record_count(&self) -> i32 {
        self.header.record_count
    }

    /// Size of the batch before compression.
    pub fn size_bytes(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    pub fn build(&self, base_offset: i64) -> BytesMut {
        let compressed;
        let payload = match self.compression {
            Compression::None => self.records.as_slice(),
            codec => {
                compressed = compression::compress(codec, &self.records);
                compressed.as_slice()
            }
        };
        let header = BatchHeader {
            base_offset,
            batch_length: i32::try_from(HEADER_BYTES - 12 + payload.len())
                .expect("a batch of more than 2 GiB"),
            attributes: self.header.attributes | self.compression.id(),
            last_offset_delta: self.header.last_offset_delta.max(0),
            ..self.header
        };
        let mut batch = BytesMut::with_capacity(HEADER_BYTES + payload.len());
        batch.put_slice(&header.to_bytes());
        batch.put_slice(payload);
        record_batch::write_crc(&mut batch);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varint_sizes_are_what_is_written() {
        for value in [0, -1, 1, 63, 64, -64, -65, 8191, 8192, i64::from(i32::MAX), i64::MAX, i64::MIN] {
            let mut buf = Vec::new();
            put_varlong(&mut buf, value);
            assert_eq!(buf.len(), varlong_bytes(value), "{value}");
            assert_eq!(Cursor { bytes: &buf }.varlong(), Some(value));
        }
        assert_eq!(Cursor { bytes: &[0xff; 10] }.varlong(), None);
        assert_eq!(Cursor { bytes: &[0xff, 0xff, 0xff, 0xff, 0x1f] }.varint(), None);
    }

    #[test]
    fn compacted_batches_keep_their_offsets() {
        let mut builder = BatchBuilder::new();
        builder.append_at(2, 10, Some(b"a"), Some(b"1"), std::iter::empty());
        builder.append_at(7, 12, Some(b"b"), Some(b"2"), [(&b"h"[..], None)].into_iter());
        builder.last_offset_delta(9);
        assert_eq!(builder.size_bytes(), builder.build(0).len());
        let batch = builder.build(100);
        let header = record_batch::parse(&batch).expect("valid");
        assert_eq!((header.record_count, header.last_offset()), (2, 109));
        let mut buf = RecordsBuf::new();
        let records: Vec<_> =
            buf.decode(&batch, 0).expect("opens").map(|record| record.expect("decodes")).collect();
        assert_eq!(records.iter().map(|record| record.offset).collect::<Vec<_>>(), [102, 107]);
        assert_eq!(records[1].headers.clone().collect::<Vec<_>>(), [(&b"h"[..], None)]);
        assert_eq!(records[1].headers.len(), 1);
    }

    #[test]
    fn a_replacing_batch_covers_what_the_other_one_did() {
        let mut builder = BatchBuilder::new();
        builder.producer(7, 2, 40).leader_epoch(3).compression(Compression::Lz4).transactional();
        for k in 0..5 {
            builder.append(1000 + k, Some(b"k"), None, &[("h", None)]);
        }
        let batch = builder.build(100);
        let header = record_batch::parse(&batch).expect("valid");
        assert_eq!(header.delete_horizon_ms(), None);
        let mut buf = RecordsBuf::new();
        let mut kept = BatchBuilder::replacing(&header, Some(90_000)).expect("known codec");
        for record in buf.decode(&batch, 1 << 20).expect("opens").map(|record| record.expect("decodes")) {
            if record.offset == 103 {
                kept.append_at(3, record.timestamp, record.key, record.value, record.headers);
            }
        }
        kept.last_offset_delta(header.last_offset_delta);
        let rebuilt = kept.build(100);
        let new = record_batch::parse(&rebuilt).expect("valid");
        assert!(record_batch::crc_ok(&rebuilt));
        assert_eq!(new.delete_horizon_ms(), Some(90_000));
        assert_eq!((new.base_offset, new.last_offset(), new.last_sequence()), (100, 104, 44));
        assert_eq!((new.producer_id, new.producer_epoch, new.leader_epoch), (7, 2, 3));
        assert_eq!((new.max_timestamp, new.record_count), (1003, 1));
        assert!(new.is_transactional() && new.compression() == Ok(Compression::Lz4));
        let records: Vec<_> =
            buf.decode(&rebuilt, 1 << 20).expect("opens").map(|record| record.expect("decodes")).collect();
        assert_eq!((records[0].offset, records[0].timestamp, records[0].value), (103, 1003, None));
        // Once set, the horizon stays, and an empty one keeps the time for the producer's sake.
        let mut empty = BatchBuilder::replacing(&new, None).expect("known codec");
        empty.compression(Compression::None).last_offset_delta(4);
        let empty = empty.build(100);
        let last = record_batch::parse(&empty).expect("valid");
        assert_eq!((last.delete_horizon_ms(), last.max_timestamp), (Some(90_000), 1003));
        assert_eq!((last.newest_record_ms(), last.last_sequence(), empty.len()), (None, 44, HEADER_BYTES));
    }

    #[test]
    fn a_batch_without_records_is_empty() {
        let batch = BatchBuilder::new().build(5);
        let mut scratch = Vec::new();
        assert_eq!(decode_records(&batch, &mut scratch, 0).expect("opens").count(), 0);
    }

    #[test]
    fn too_few_and_too_many_records_are_errors() {
        let mut builder = BatchBuilder::new();
        builder.append(1, None, Some(b"v"), &[]).append(2, None, Some(b"w"), &[]);
        let good = builder.build(0);
        let mut scratch = Vec::new();
        for (count, error) in [(1, RecordError::TrailingBytes(8)), (3, RecordError::Malformed)] {
            let mut bytes = good.to_vec();
            bytes[60] = count;
            let results: Vec<_> = decode_records(&bytes, &mut scratch, 0).expect("opens").collect();
            assert_eq!(results.last().and_then(|last| last.as_ref().err()), Some(&error));
        }
    }
}
