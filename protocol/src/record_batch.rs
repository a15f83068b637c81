//! The header of a v2 record batch: reading it, checking what a producer sent, and the few fields a broker rewrites.
//!
//! Works on one batch at a time; the only look at records is that of `record_check` on what was produced. Base offset and
//! leader epoch lie before the checksummed part, so assigning them costs no hash; only log append time recomputes the
//! checksum.

use crate::compression::Compression;
use crate::error_code::ErrorCode;
use crate::record_check::check_records;

pub const HEADER_BYTES: usize = 61;

/// Bytes before the part that `batch_length` counts: base offset and the length itself.
const LENGTH_OVERHEAD_BYTES: usize = 12;
const MAGIC_V2: i8 = 2;

const LEADER_EPOCH_AT: usize = 12;
const CRC_AT: usize = 17;
/// The checksum covers everything from here to the end of the batch.
const ATTRIBUTES_AT: usize = 21;
const MAX_TIMESTAMP_AT: usize = 35;

const CODEC_MASK: i16 = 0x07;
const LOG_APPEND_TIME: i16 = 0x08;
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;
pub(crate) const DELETE_HORIZON: i16 = 0x40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    pub base_offset: i64,
    pub batch_length: i32,
    pub leader_epoch: i32,
    pub magic: i8,
    pub crc: u32,
    pub attributes: i16,
    pub last_offset_delta: i32,
    pub base_timestamp: i64,
    pub max_timestamp: i64,
    pub producer_id: i64,
    pub producer_epoch: i16,
    pub base_sequence: i32,
    pub record_count: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("{have} bytes where the batch needs {need}")]
    Truncated { need: usize, have: usize },
    #[error("batch length {0} is shorter than a batch header")]
    BadLength(i32),
    #[error("magic {0}; only 2 is accepted")]
    BadMagic(i8),
    #[error("checksum mismatch")]
    BadCrc,
    #[error("{0} bytes after the batch; a partition takes exactly one batch per request")]
    TrailingBytes(usize),
    #[error("no record batch")]
    Empty,
    #[error("{record_count} records but last offset delta {last_offset_delta}")]
    BadCount { record_count: i32, last_offset_delta: i32 },
    #[error("record {index} does not fit its own length, its place in the batch, or what the batch holds")]
    BadRecord { index: i32 },
    #[error("{0} bytes after the last record of the batch")]
    BytesAfterRecords(usize),
    #[error("clients may not write control batches")]
    ControlBatch,
    #[error(
        "a batch with a producer id needs a non-negative epoch and sequence; a transactional one needs a producer id"
    )]
    BadProducer,
    #[error("unknown compression codec {0}")]
    UnknownCodec(i16),
}

impl BatchError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::BadLength(_) | Self::BadCrc => ErrorCode::CORRUPT_MESSAGE,
            // What is newer than anything known may be damage, which a producer tries again; what is older is the
            // producer's own doing, and so is a batch that is not all there: Kafka does not see a batch in it.
            Self::BadMagic(magic) if *magic > MAGIC_V2 => ErrorCode::CORRUPT_MESSAGE,
            Self::UnknownCodec(_) => ErrorCode::UNSUPPORTED_COMPRESSION_TYPE,
            Self::BadMagic(_)
            | Self::Truncated { .. }
            | Self::TrailingBytes(_)
            | Self::Empty
            | Self::BadCount { .. }
            | Self::BadRecord { .. }
            | Self::BytesAfterRecords(_)
            | Self::ControlBatch
            | Self::BadProducer => ErrorCode::INVALID_RECORD,
        }
    }
}

impl BatchHeader {
    /// The whole batch, header included.
    pub fn total_bytes(&self) -> usize {
        // `parse` refuses negative lengths; a header built by hand with one counts as empty.
        usize::try_from(self.batch_length).unwrap_or(0) + LENGTH_OVERHEAD_BYTES
    }

    pub fn last_offset(&self) -> i64 {
        self.base_offset.saturating_add(i64::from(self.last_offset_delta))
    }

    pub fn next_offset(&self) -> i64 {
        self.last_offset().saturating_add(1)
    }

    pub fn compression(&self) -> Result<Compression, BatchError> {
        let codec = self.attributes & CODEC_MASK;
        Compression::from_id(codec).ok_or(BatchError::UnknownCodec(codec))
    }

    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    pub fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// From when on compaction may drop the tombstones of this batch, or the marker that it is (KIP-534). The field of the
    /// base timestamp holds it then, and the records' timestamps count from it.
    pub fn delete_horizon_ms(&self) -> Option<i64> {
        (self.attributes & DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    /// Largest timestamp of its records; `None` for a batch that compaction has left without any.
    pub fn newest_record_ms(&self) -> Option<i64> {
        (self.record_count > 0).then_some(self.max_timestamp)
    }

    pub fn has_producer_id(&self) -> bool {
        self.producer_id >= 0
    }

    /// Sequence of the last record; sequences run from 0 to `i32::MAX` and start over. -1 without a sequence.
    pub fn last_sequence(&self) -> i32 {
        if self.base_sequence < 0 {
            return -1;
        }
        let last = i64::from(self.base_sequence) + i64::from(self.last_offset_delta);
        (last & i64::from(i32::MAX)) as i32
    }

    /// Whether the broker's clock, not the producer's, stamped the records.
    pub fn log_append_time(&self) -> bool {
        self.attributes & LOG_APPEND_TIME != 0
    }
}

#[inline(always)]
fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    // Offsets are constants below, all within the header.
    let mut out = [0; N];
    out.copy_from_slice(&header[at..at + N]);
    out
}

/// Reads a header of which the records may lie elsewhere. Checks what can be checked without them.
pub fn parse_header(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let Some(raw) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(BatchError::Truncated { need: HEADER_BYTES, have: bytes.len() });
    };
    let header = BatchHeader {
        base_offset: i64::from_be_bytes(field(raw, 0)),
        batch_length: i32::from_be_bytes(field(raw, 8)),
        leader_epoch: i32::from_be_bytes(field(raw, LEADER_EPOCH_AT)),
        magic: i8::from_be_bytes(field(raw, 16)),
        crc: u32::from_be_bytes(field(raw, CRC_AT)),
        attributes: i16::from_be_bytes(field(raw, ATTRIBUTES_AT)),
        last_offset_delta: i32::from_be_bytes(field(raw, 23)),
        base_timestamp: i64::from_be_bytes(field(raw, 27)),
        max_timestamp: i64::from_be_bytes(field(raw, MAX_TIMESTAMP_AT)),
        producer_id: i64::from_be_bytes(field(raw, 43)),
        producer_epoch: i16::from_be_bytes(field(raw, 51)),
        base_sequence: i32::from_be_bytes(field(raw, 53)),
        record_count: i32::from_be_bytes(field(raw, 57)),
    };
    if header.magic != MAGIC_V2 {
        return Err(BatchError::BadMagic(header.magic));
    }
    if header.batch_length < (HEADER_BYTES - LENGTH_OVERHEAD_BYTES) as i32 {
        return Err(BatchError::BadLength(header.batch_length));
    }
    if header.last_offset_delta < 0 || header.record_count < 0 {
        return Err(BatchError::BadCount {
            record_count: header.record_count,
            last_offset_delta: header.last_offset_delta,
        });
    }
    Ok(header)
}

/// Reads the header of a batch that lies whole at the front of `bytes`. The checksum is not checked here.
pub fn parse(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = parse_header(bytes)?;
    if header.total_bytes() > bytes.len() {
        return Err(BatchError::Truncated { need: header.total_bytes(), have: bytes.len() });
    }
    Ok(header)
}

/// Whether the stored checksum matches; `batch` is exactly one batch.
pub fn crc_ok(batch: &[u8]) -> bool {
    match (batch.first_chunk::<HEADER_BYTES>(), batch.get(ATTRIBUTES_AT..)) {
        (Some(raw), Some(covered)) => u32::from_be_bytes(field(raw, CRC_AT)) == crc32c::crc32c(covered),
        _ => false,
    }
}

/// Everything a broker checks on a produced partition: the header, the checksum, and that header and records agree.
pub fn validate_produced(records: &[u8]) -> Result<BatchHeader, BatchError> {
    if records.is_empty() {
        return Err(BatchError::Empty);
    }
    let header = parse(records)?;
    if records.len() > header.total_bytes() {
        return Err(BatchError::TrailingBytes(records.len() - header.total_bytes()));
    }
    header.compression()?;
    if header.is_control() {
        return Err(BatchError::ControlBatch);
    }
    if header.record_count < 1 || header.last_offset_delta != header.record_count - 1 {
        return Err(BatchError::BadCount {
            record_count: header.record_count,
            last_offset_delta: header.last_offset_delta,
        });
    }
    let sequenced = header.producer_epoch >= 0 && header.base_sequence >= 0;
    if (header.has_producer_id() && !sequenced) || (header.is_transactional() && !header.has_producer_id()) {
        return Err(BatchError::BadProducer);
    }
    // The checksum reads the whole batch, so it comes after what is cheaper, and the walk over the records finds them in
    // the cache.
    if !crc_ok(records) {
        return Err(BatchError::BadCrc);
    }
    check_records(&header, &records[HEADER_BYTES..])?;
    Ok(header)
}

/// Assigns the offset of the first record. `batch` is at least a batch header, as `parse` has shown.
pub fn set_base_offset(batch: &mut [u8], base_offset: i64) {
    batch[..8].copy_from_slice(&base_offset.to_be_bytes());
}

/// Stamps the term of the leader that appended the batch. `batch` is at least a batch header.
pub fn set_leader_epoch(batch: &mut [u8], leader_epoch: i32) {
    batch[LEADER_EPOCH_AT..LEADER_EPOCH_AT + 4].copy_from_slice(&leader_epoch.to_be_bytes());
}

/// Makes the broker's clock the time of every record. `batch` is exactly one batch.
pub fn set_log_append_time(batch: &mut [u8], now_ms: i64) {
    let attributes = i16::from_be_bytes([batch[ATTRIBUTES_AT], batch[ATTRIBUTES_AT + 1]]) | LOG_APPEND_TIME;
    batch[ATTRIBUTES_AT..ATTRIBUTES_AT + 2].copy_from_slice(&attributes.to_be_bytes());
    batch[MAX_TIMESTAMP_AT..MAX_TIMESTAMP_AT + 8].copy_from_slice(&now_ms.to_be_bytes());
    write_crc(batch);
}

/// Whether the batch at the front of `bytes` is compressed with zstd, which clients of old request versions cannot
/// read. No when there is none.
pub fn starts_with_zstd(bytes: &[u8]) -> bool {
    parse_header(bytes).is_ok_and(|header| header.compression() == Ok(Compression::Zstd))
}

/// Whether the batch at the front of `bytes` belongs to a transaction. No when there is none.
pub fn starts_transactional(bytes: &[u8]) -> bool {
    // Every produced batch is asked, so only the one byte is looked at.
    bytes.len() >= HEADER_BYTES && i16::from(bytes[ATTRIBUTES_AT + 1]) & TRANSACTIONAL != 0
}

/// Recomputes the checksum after a checksummed field changed.
pub(crate) fn write_crc(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[ATTRIBUTES_AT..]);
    batch[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_be_bytes());
}

impl BatchHeader {
    /// The header's 61 bytes, for the batch builder.
    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.base_offset.to_be_bytes());
        put(8, &self.batch_length.to_be_bytes());
        put(LEADER_EPOCH_AT, &self.leader_epoch.to_be_bytes());
        put(16, &self.magic.to_be_bytes());
        put(CRC_AT, &self.crc.to_be_bytes());
        put(ATTRIBUTES_AT, &self.attributes.to_be_bytes());
        put(23, &self.last_offset_delta.to_be_bytes());
        put(27, &self.base_timestamp.to_be_bytes());
        put(MAX_TIMESTAMP_AT, &self.max_timestamp.to_be_bytes());
        put(43, &self.producer_id.to_be_bytes());
        put(51, &self.producer_epoch.to_be_bytes());
        put(53, &self.base_sequence.to_be_bytes());
        put(57, &self.record_count.to_be_bytes());
        out
    }
}

/// Walks batches that lie back to back, as in a segment or a fetch response. Ends after the first error.
pub fn batches(bytes: &[u8]) -> Batches<'_> {
    Batches { rest: bytes }
}

#[derive(Debug, Clone)]
pub struct Batches<'a> {
    rest: &'a [u8],
}

impl<'a> Batches<'a> {
    /// What has not been walked yet; nothing after an error.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Batches<'a> {
    type Item = Result<(BatchHeader, &'a [u8]), BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match parse(self.rest) {
            Ok(header) => {
                let (batch, rest) = self.rest.split_at(header.total_bytes());
                self.rest = rest;
                Some(Ok((header, batch)))
            }
            Err(error) => {
                self.rest = &[];
                Some(Err(error))
            }
        }
    }
}

impl std::iter::FusedIterator for Batches<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::BatchBuilder;

    fn batch() -> Vec<u8> {
        let mut builder = BatchBuilder::new();
        builder.producer(9, 1, 5);
        builder.append(10, Some(b"k"), Some(b"v"), &[]).append(11, None, Some(b"w"), &[]);
        builder.build(0).to_vec()
    }

    /// Changes the batch and makes its checksum right again.
    fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = batch();
        change(&mut bytes);
        write_crc(&mut bytes);
        bytes
    }

    #[test]
    fn a_good_batch_is_accepted_and_headers_round_trip() {
        let bytes = batch();
        let header = validate_produced(&bytes).expect("valid");
        assert_eq!(header.total_bytes(), bytes.len());
        assert_eq!(header.to_bytes(), bytes[..HEADER_BYTES]);
        assert_eq!(
            (header.last_sequence(), header.has_producer_id(), header.is_transactional()),
            (6, true, false)
        );
    }

    #[test]
    fn each_fault_has_its_error_and_code() {
        let count =
            |record_count, last_offset_delta| BatchError::BadCount { record_count, last_offset_delta };
        let attributes = |low: u8| move |bytes: &mut Vec<u8>| bytes[22] = low;
        let cases: Vec<(Vec<u8>, BatchError, ErrorCode)> = vec![
            (vec![], BatchError::Empty, ErrorCode::INVALID_RECORD),
            (batch()[..60].to_vec(), BatchError::Truncated { need: 61, have: 60 }, ErrorCode::INVALID_RECORD),
            (changed(|b| b[16] = 1), BatchError::BadMagic(1), ErrorCode::INVALID_RECORD),
            (changed(|b| b[16] = 3), BatchError::BadMagic(3), ErrorCode::CORRUPT_MESSAGE),
            (changed(|b| b[8] = 0xff), BatchError::BadLength(-16_777_142), ErrorCode::CORRUPT_MESSAGE),
            (changed(attributes(0x20)), BatchError::ControlBatch, ErrorCode::INVALID_RECORD),
            (changed(attributes(5)), BatchError::UnknownCodec(5), ErrorCode::UNSUPPORTED_COMPRESSION_TYPE),
            (changed(|b| b[60] = 3), count(3, 1), ErrorCode::INVALID_RECORD),
            (changed(|b| b[60] = 0), count(0, 1), ErrorCode::INVALID_RECORD),
            (changed(|b| b[57] = 0x80), count(i32::MIN + 2, 1), ErrorCode::INVALID_RECORD),
            (changed(|b| b[53] = 0xff), BatchError::BadProducer, ErrorCode::INVALID_RECORD),
        ];
        for (bytes, error, code) in cases {
            let got = validate_produced(&bytes).expect_err("refused");
            match (got, error) {
                (BatchError::BadLength(_), BatchError::BadLength(_)) => {}
                _ => assert_eq!(got, error),
            }
            assert_eq!(got.code(), code, "{got}");
        }
        let mut flipped = batch();
        *flipped.last_mut().expect("not empty") ^= 1;
        assert_eq!(validate_produced(&flipped), Err(BatchError::BadCrc));
        let two = [batch(), batch()].concat();
        assert_eq!(validate_produced(&two), Err(BatchError::TrailingBytes(two.len() / 2)));
        let short = &batch()[..batch().len() - 1];
        assert!(matches!(validate_produced(short), Err(BatchError::Truncated { .. })));
    }

    #[test]
    fn a_transaction_needs_a_producer() {
        let mut builder = BatchBuilder::new();
        builder.transactional().append(1, None, None, &[]);
        assert_eq!(validate_produced(&builder.build(0)), Err(BatchError::BadProducer));
        builder.producer(1, 0, 0);
        assert!(validate_produced(&builder.build(0)).is_ok());
    }

    #[test]
    fn sequences_wrap() {
        let mut header = parse(&batch()).expect("valid");
        header.base_sequence = i32::MAX;
        assert_eq!(header.last_sequence(), 0);
        header.base_sequence = i32::MAX - 1;
        assert_eq!(header.last_sequence(), i32::MAX);
        header.base_sequence = -1;
        assert_eq!(header.last_sequence(), -1);
    }

    #[test]
    fn batches_are_walked_up_to_the_first_fault() {
        let whole = [batch(), batch(), batch()].concat();
        assert_eq!(batches(&whole).filter_map(Result::ok).count(), 3);
        let cut = &whole[..whole.len() - 1];
        let walked: Vec<_> = batches(cut).collect();
        assert_eq!(walked.len(), 3);
        assert!(walked[0].is_ok() && walked[1].is_ok() && walked[2].is_err());
    }
}
