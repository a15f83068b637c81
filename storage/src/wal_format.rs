//! Bytes of the write-ahead log. Pure; see FORMAT.md for the diagrams.

use bytes::Bytes;

use crate::entry::{GroupId, HardState};
use crate::producer_state::take;

pub(crate) const BLOCK_HEADER_BYTES: usize = 48;
pub(crate) const RECORD_HEADER_BYTES: usize = 29;
/// Largest payload of one commit block. Bounds the memory of recovery and the time of one write.
pub(crate) const BLOCK_PAYLOAD_MAX: usize = 16 << 20;
const MAGIC: u32 = 0x464C_574C;
const VERSION: u16 = 1;

const BATCH: u8 = 1;
const CONTROL: u8 = 2;
const HARD_STATE: u8 = 3;
const LOG_START: u8 = 4;

/// One commit block's header. `lsn` grows by one per block of a lane, across files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    pub(crate) file_seq: u64,
    pub(crate) lsn: u64,
    pub(crate) payload_len: u32,
    pub(crate) payload_crc: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Batch { group: GroupId, index: u64, term: u64, bytes: Bytes },
    Control { group: GroupId, index: u64, term: u64, bytes: Bytes },
    HardState { group: GroupId, state: HardState },
    LogStart { group: GroupId, offset: i64 },
}

impl Record {
    pub(crate) fn group(&self) -> GroupId {
        match self {
            Record::Batch { group, .. }
            | Record::Control { group, .. }
            | Record::HardState { group, .. }
            | Record::LogStart { group, .. } => *group,
        }
    }
}

pub(crate) fn encode_block_header(header: &BlockHeader) -> [u8; BLOCK_HEADER_BYTES] {
    let mut out = [0u8; BLOCK_HEADER_BYTES];
    out[..4].copy_from_slice(&MAGIC.to_le_bytes());
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[8..16].copy_from_slice(&header.file_seq.to_le_bytes());
    out[16..24].copy_from_slice(&header.lsn.to_le_bytes());
    out[24..28].copy_from_slice(&header.payload_len.to_le_bytes());
    out[28..32].copy_from_slice(&header.payload_crc.to_le_bytes());
    let crc = crc32c::crc32c(&out[..BLOCK_HEADER_BYTES - 4]);
    out[BLOCK_HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    out
}

pub(crate) fn decode_block_header(bytes: &[u8]) -> Option<BlockHeader> {
    let bytes = bytes.first_chunk::<BLOCK_HEADER_BYTES>()?;
    let (body, crc) = bytes.split_at(BLOCK_HEADER_BYTES - 4);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return None;
    }
    let mut rest = body;
    if u32::from_le_bytes(take(&mut rest)?) != MAGIC || u16::from_le_bytes(take(&mut rest)?) != VERSION {
        return None;
    }
    take::<2>(&mut rest)?;
    let header = BlockHeader {
        file_seq: u64::from_le_bytes(take(&mut rest)?),
        lsn: u64::from_le_bytes(take(&mut rest)?),
        payload_len: u32::from_le_bytes(take(&mut rest)?),
        payload_crc: u32::from_le_bytes(take(&mut rest)?),
    };
    (header.payload_len as usize <= BLOCK_PAYLOAD_MAX).then_some(header)
}

/// Header of a record; its payload follows.
pub(crate) fn record_header(
    kind: u8,
    group: GroupId,
    index: u64,
    term: u64,
    len: usize,
) -> [u8; RECORD_HEADER_BYTES] {
    let mut out = [0u8; RECORD_HEADER_BYTES];
    out[0] = kind;
    out[1..9].copy_from_slice(&group.to_le_bytes());
    out[9..17].copy_from_slice(&index.to_le_bytes());
    out[17..25].copy_from_slice(&term.to_le_bytes());
    out[25..29].copy_from_slice(&(len as u32).to_le_bytes());
    out
}

pub(crate) fn batch_header(group: GroupId, index: u64, term: u64, len: usize) -> [u8; RECORD_HEADER_BYTES] {
    record_header(BATCH, group, index, term, len)
}

pub(crate) fn control_header(group: GroupId, index: u64, term: u64, len: usize) -> [u8; RECORD_HEADER_BYTES] {
    record_header(CONTROL, group, index, term, len)
}

/// Vote and commit travel in the payload.
pub(crate) fn hard_state_record(group: GroupId, state: &HardState) -> Vec<u8> {
    let mut out = record_header(HARD_STATE, group, 0, state.term, 16).to_vec();
    out.extend(state.vote.to_le_bytes());
    out.extend(state.commit.to_le_bytes());
    out
}

pub(crate) fn log_start_record(group: GroupId, offset: i64) -> Vec<u8> {
    let mut out = record_header(LOG_START, group, 0, 0, 8).to_vec();
    out.extend(offset.to_le_bytes());
    out
}

/// Records of a block whose checksum was right; `None` says that it was not written by this code.
pub(crate) fn decode_records(payload: &Bytes) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    let mut at = 0;
    while at < payload.len() {
        let mut rest = payload.get(at..at + RECORD_HEADER_BYTES)?;
        let [kind] = take(&mut rest)?;
        let group = u64::from_le_bytes(take(&mut rest)?);
        let index = u64::from_le_bytes(take(&mut rest)?);
        let term = u64::from_le_bytes(take(&mut rest)?);
        let len = u32::from_le_bytes(take(&mut rest)?) as usize;
        let from = at + RECORD_HEADER_BYTES;
        let to = from.checked_add(len).filter(|to| *to <= payload.len())?;
        let bytes = payload.slice(from..to);
        let mut body: &[u8] = &bytes;
        records.push(match kind {
            BATCH => Record::Batch { group, index, term, bytes },
            CONTROL => Record::Control { group, index, term, bytes },
            HARD_STATE => Record::HardState {
                group,
                state: HardState {
                    term,
                    vote: u64::from_le_bytes(take(&mut body)?),
                    commit: u64::from_le_bytes(take(&mut body)?),
                },
            },
            LOG_START => Record::LogStart { group, offset: i64::from_le_bytes(take(&mut body)?) },
            _ => return None,
        });
        at = to;
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_a_flipped_bit_does_not() {
        let header = BlockHeader { file_seq: 3, lsn: 99, payload_len: 1000, payload_crc: 7 };
        let bytes = encode_block_header(&header);
        assert_eq!(decode_block_header(&bytes), Some(header));
        for at in 0..bytes.len() {
            let mut bad = bytes;
            bad[at] ^= 0x10;
            assert_eq!(decode_block_header(&bad), None);
        }
        assert_eq!(decode_block_header(&[0; 4096]), None, "a zeroed file has no blocks");
    }

    #[test]
    fn records_come_back_and_truncated_ones_do_not() {
        let mut payload = Vec::new();
        payload.extend(batch_header(5, 6, 7, 3));
        payload.extend(b"abc");
        payload.extend(control_header(5, 7, 7, 0));
        payload.extend(hard_state_record(9, &HardState { term: 1, vote: 2, commit: 3 }));
        payload.extend(log_start_record(9, 1234));
        let records = decode_records(&Bytes::from(payload.clone())).unwrap();
        assert_eq!(records.len(), 4);
        assert_eq!(
            records[0],
            Record::Batch { group: 5, index: 6, term: 7, bytes: Bytes::from_static(b"abc") }
        );
        assert_eq!(records[3], Record::LogStart { group: 9, offset: 1234 });
        assert_eq!(records[2].group(), 9);
        let whole = [0, 32, 61, 61 + 16 + 13];
        for end in 0..payload.len() {
            if let Some(some) = decode_records(&Bytes::from(payload[..end].to_vec())) {
                assert!(some.len() < 4, "cut at {end}, whole at {whole:?}");
            }
        }
    }
}
