//! Pre-encoded v2 record batches: built once, sent millions of times, with only the idempotent fields patched.
//!
//! Pure, any thread. The checksum is precomputed. CRC is linear over XOR, so a changed base sequence changes it by
//! the XOR of one precomputed word per set bit, whatever the size of the batch.

use bytes::{Bytes, BytesMut};

use crate::wire::put_varint;

pub const HEADER_BYTES: usize = 61;
const CRC_AT: usize = 17;
const CRC_FROM: usize = 21;
const PRODUCER_ID_AT: usize = 43;
const SEQUENCE_AT: usize = 53;
const SEQUENCE_BYTES: usize = 4;

/// One record before it is encoded.
pub struct Record<'a> {
    pub key: Option<&'a [u8]>,
    pub value: &'a [u8],
}

/// Encodes a whole batch with offsets from 0, producer id -1, and a valid checksum.
pub fn encode<'a>(records: impl Iterator<Item = Record<'a>>, timestamp_ms: i64) -> Bytes {
    let mut out = BytesMut::zeroed(HEADER_BYTES);
    let mut body = BytesMut::new();
    let mut count = 0i32;
    for record in records {
        body.clear();
        body.extend_from_slice(&[0, 0]);
        put_varint(&mut body, count);
        match record.key {
            Some(key) => {
                put_varint(&mut body, key.len() as i32);
                body.extend_from_slice(key);
            }
            None => put_varint(&mut body, -1),
        }
        put_varint(&mut body, record.value.len() as i32);
        body.extend_from_slice(record.value);
        put_varint(&mut body, 0);
        put_varint(&mut out, body.len() as i32);
        out.extend_from_slice(&body);
        count += 1;
    }
    let length = (out.len() - 12) as i32;
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(8, &length.to_be_bytes());
    put(12, &(-1i32).to_be_bytes());
    put(16, &[2]);
    put(23, &(count - 1).to_be_bytes());
    put(27, &timestamp_ms.to_be_bytes());
    put(35, &timestamp_ms.to_be_bytes());
    put(PRODUCER_ID_AT, &(-1i64).to_be_bytes());
    put(51, &(-1i16).to_be_bytes());
    put(SEQUENCE_AT, &(-1i32).to_be_bytes());
    put(57, &count.to_be_bytes());
    let crc = crc32c::crc32c(&out[CRC_FROM..]);
    out[CRC_AT..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
    out.freeze()
}

/// `records` records of `value_bytes` bytes each; the content does not compress, so that no one gains by trying.
pub fn encode_filler(records: usize, value_bytes: usize, key: Option<&[u8]>, timestamp_ms: i64) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let value: Vec<u8> = (0..value_bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    encode((0..records).map(|_| Record { key, value: &value }), timestamp_ms)
}

/// What the header of an encoded batch says; `None` when it is not a whole v2 header.
pub struct Header {
    pub base_offset: i64,
    pub total_bytes: usize,
    pub records: i64,
}

pub fn header(bytes: &[u8]) -> Option<Header> {
    let base_offset = i64::from_be_bytes(bytes.get(0..8)?.try_into().ok()?);
    let length = i32::from_be_bytes(bytes.get(8..12)?.try_into().ok()?);
    let last_delta = i32::from_be_bytes(bytes.get(23..27)?.try_into().ok()?);
    let total_bytes = usize::try_from(length).ok()?.checked_add(12)?;
    (total_bytes >= HEADER_BYTES).then_some(Header {
        base_offset,
        total_bytes,
        records: i64::from(last_delta) + 1,
    })
}

/// A batch as one producer sends it: fixed but for its base sequence.
pub struct Template {
    header: [u8; HEADER_BYTES],
    /// Everything after the header, shared by all connections.
    pub records: Bytes,
    pub record_count: i32,
    /// The checksum with sequence 0.
    crc: u32,
    /// By how much each bit of the sequence changes the checksum; empty for a producer without an id.
    deltas: Vec<u32>,
}

impl Template {
    pub fn plain(batch: &Bytes) -> Self {
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&batch[..HEADER_BYTES]);
        let crc = u32::from_be_bytes([header[17], header[18], header[19], header[20]]);
        let record_count = i32::from_be_bytes([header[57], header[58], header[59], header[60]]);
        Self { header, records: batch.slice(HEADER_BYTES..), record_count, crc, deltas: Vec::new() }
    }

    pub fn idempotent(batch: &Bytes, producer_id: i64, producer_epoch: i16, deltas: &[u32]) -> Self {
        let mut t = Self::plain(batch);
        t.header[PRODUCER_ID_AT..PRODUCER_ID_AT + 8].copy_from_slice(&producer_id.to_be_bytes());
        t.header[51..53].copy_from_slice(&producer_epoch.to_be_bytes());
        t.header[SEQUENCE_AT..SEQUENCE_AT + SEQUENCE_BYTES].fill(0);
        t.crc = crc32c::crc32c_append(crc32c::crc32c(&t.header[CRC_FROM..]), &t.records);
        t.deltas = deltas.to_vec();
        t
    }

    pub fn total_bytes(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    pub fn header(&self, sequence: i32) -> [u8; HEADER_BYTES] {
        let mut header = self.header;
        if !self.deltas.is_empty() {
            let mut crc = self.crc;
            let mut bits = sequence as u32;
            while bits != 0 {
                let bit = bits.trailing_zeros();
                crc ^= self.deltas[bit as usize];
                bits &= bits - 1;
            }
            header[SEQUENCE_AT..SEQUENCE_AT + SEQUENCE_BYTES].copy_from_slice(&sequence.to_be_bytes());
            header[CRC_AT..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
        }
        header
    }
}

/// The checksum change of each sequence bit, for batches of this length.
pub fn sequence_deltas(batch_bytes: usize) -> Vec<u32> {
    let mut zeros = vec![0u8; batch_bytes - CRC_FROM];
    let none = crc32c::crc32c(&zeros);
    (0..32)
        .map(|bit| {
            let at = SEQUENCE_AT - CRC_FROM;
            zeros[at..at + SEQUENCE_BYTES].copy_from_slice(&(1u32 << bit).to_be_bytes());
            let with = crc32c::crc32c(&zeros);
            zeros[at..at + SEQUENCE_BYTES].fill(0);
            with ^ none
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc_is_right(batch: &[u8]) -> bool {
        crc32c::crc32c(&batch[CRC_FROM..]).to_be_bytes() == batch[CRC_AT..CRC_FROM]
    }

    #[test]
    fn the_other_codec_reads_what_we_write() {
        use kafka_protocol::records::RecordBatchDecoder;
        let batch = encode_filler(3, 100, Some(b"key"), 1_700_000_000_000);
        assert!(crc_is_right(&batch));
        let mut input = batch.clone();
        let set = RecordBatchDecoder::decode(&mut input).unwrap();
        assert_eq!(set.records.len(), 3);
        assert_eq!(set.records[2].offset, 2);
        assert_eq!(set.records[2].value.as_ref().unwrap().len(), 100);
        assert_eq!(set.records[1].key.as_deref(), Some(&b"key"[..]));
        let h = header(&batch).unwrap();
        assert_eq!((h.total_bytes, h.records), (batch.len(), 3));
    }

    #[test]
    fn patched_sequences_keep_the_checksum_right() {
        for bytes in [1usize, 1024, 70_000] {
            let batch = encode_filler(1, bytes, None, 5);
            let t = Template::idempotent(&batch, 77, 3, &sequence_deltas(batch.len()));
            for sequence in [0, 1, 2, 3, 0x00ff_00ff, i32::MAX] {
                let mut whole = t.header(sequence).to_vec();
                whole.extend_from_slice(&t.records);
                assert!(crc_is_right(&whole), "{bytes} bytes, sequence {sequence}");
            }
        }
    }

    #[test]
    fn a_plain_template_is_the_batch() {
        let batch = encode_filler(2, 10, None, 5);
        let t = Template::plain(&batch);
        let mut whole = t.header(9).to_vec();
        whole.extend_from_slice(&t.records);
        assert_eq!(whole, batch);
    }
}
