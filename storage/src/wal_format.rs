//! Blocks and records of the write-ahead log as bytes, and the rule that says which blocks of a ring count.
//!
//! Pure: no file is opened here. See FORMAT.md for the layout and the reasons.

use crate::codec::Cursor;
use crate::mutant::{self, Mutant};
use crate::types::GroupId;

pub const BLOCK_ALIGN: usize = 4096;
pub const BLOCK_HEADER_BYTES: usize = 336;
pub const RECORD_HEADER_BYTES: usize = 40;

const MAGIC: [u8; 4] = *b"FLWB";
const VERSION: u16 = 1;
const HEADER_CRC_AT: usize = 332;

pub const BATCH: u8 = 1;
pub const CONTROL: u8 = 2;
pub const HARD_STATE: u8 = 3;
pub const LOG_START: u8 = 4;
pub const GROUP_STATE: u8 = 5;
pub const GROUP_DELETE: u8 = 6;
/// Only there so that a block says which file is the oldest in use.
pub const NOTHING: u8 = 8;
pub const PRODUCERS: u8 = 9;
/// The log begins anew; nothing before it counts.
pub const BEGINNING: u8 = 10;
/// The same, with segments that were received from another replica.
pub const BEGINNING_WITH: u8 = 11;

/// Which groups have records in a block. May name a group too many, never one too few.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bloom([u64; 16]);

impl Bloom {
    fn bits(group: GroupId) -> [usize; 2] {
        // The finalizer of splitmix64: spreads small consecutive numbers over all bits.
        let mut x = group.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        [(x & 1023) as usize, ((x >> 32) & 1023) as usize]
    }

    pub fn insert(&mut self, group: GroupId) {
        for bit in Self::bits(group) {
            self.0[bit / 64] |= 1 << (bit % 64);
        }
    }

    pub fn contains(&self, group: GroupId) -> bool {
        Self::bits(group).into_iter().all(|bit| self.0[bit / 64] & (1 << (bit % 64)) != 0)
    }

    fn write(&self, out: &mut [u8]) {
        for (word, slot) in self.0.iter().zip(out.chunks_exact_mut(8)) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn read(cursor: &mut Cursor<'_>) -> Option<Self> {
        let mut words = [0; 16];
        for word in &mut words {
            *word = cursor.u64()?;
        }
        Some(Self(words))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHeader {
    pub lane: u16,
    pub shard: u32,
    pub payload_len: u32,
    pub wal_id: u64,
    pub boot_id: u64,
    pub sequence: u64,
    pub lsn: u64,
    pub file_seq: u64,
    pub oldest_live: u64,
    pub groups: Bloom,
    pub previous_groups: Bloom,
    pub payload_crc: u32,
    pub previous_payload_crc: u32,
}

pub const fn block_bytes(payload_len: usize) -> usize {
    (BLOCK_HEADER_BYTES + payload_len).next_multiple_of(BLOCK_ALIGN)
}

impl BlockHeader {
    /// `out` is at least a header.
    pub fn encode(&self, out: &mut [u8]) {
        let out = &mut out[..BLOCK_HEADER_BYTES];
        out.fill(0);
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &VERSION.to_le_bytes());
        put(6, &self.lane.to_le_bytes());
        put(8, &self.shard.to_le_bytes());
        put(12, &self.payload_len.to_le_bytes());
        put(16, &self.wal_id.to_le_bytes());
        put(24, &self.boot_id.to_le_bytes());
        put(32, &self.sequence.to_le_bytes());
        put(40, &self.lsn.to_le_bytes());
        put(48, &self.file_seq.to_le_bytes());
        put(56, &self.oldest_live.to_le_bytes());
        put(320, &self.payload_crc.to_le_bytes());
        put(324, &self.previous_payload_crc.to_le_bytes());
        self.groups.write(&mut out[64..192]);
        self.previous_groups.write(&mut out[192..320]);
        let crc = crc32c::crc32c(&out[..HEADER_CRC_AT]);
        out[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }

    /// `None` unless the bytes begin with a whole, undamaged header of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let raw = bytes.first_chunk::<BLOCK_HEADER_BYTES>()?;
        if raw[..4] != MAGIC || raw[4..6] != VERSION.to_le_bytes() {
            return None;
        }
        let mut crc = Cursor::new(&raw[HEADER_CRC_AT..]);
        if crc.u32()? != crc32c::crc32c(&raw[..HEADER_CRC_AT]) {
            return None;
        }
        let mut cursor = Cursor::new(&raw[6..]);
        Some(Self {
            lane: cursor.u16()?,
            shard: cursor.u32()?,
            payload_len: cursor.u32()?,
            wal_id: cursor.u64()?,
            boot_id: cursor.u64()?,
            sequence: cursor.u64()?,
            lsn: cursor.u64()?,
            file_seq: cursor.u64()?,
            oldest_live: cursor.u64()?,
            groups: Bloom::read(&mut cursor)?,
            previous_groups: Bloom::read(&mut cursor)?,
            payload_crc: cursor.u32()?,
            previous_payload_crc: cursor.u32()?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    pub kind: u8,
    pub group: GroupId,
    pub index: u64,
    pub term: u64,
    pub offset: i64,
}

/// Writes a record at the front of `out`, which must have room for it.
pub fn write_record(out: &mut [u8], header: &RecordHeader, payload: &[u8]) {
    let (head, rest) = out.split_at_mut(RECORD_HEADER_BYTES);
    head[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    head[4..8].copy_from_slice(&[header.kind, 0, 0, 0]);
    head[8..16].copy_from_slice(&header.group.to_le_bytes());
    head[16..24].copy_from_slice(&header.index.to_le_bytes());
    head[24..32].copy_from_slice(&header.term.to_le_bytes());
    head[32..40].copy_from_slice(&header.offset.to_le_bytes());
    rest[..payload.len()].copy_from_slice(payload);
}

/// Records of a payload: header and where in `payload` its bytes lie. `None` as an item means malformed; it is the last.
pub fn records(payload: &[u8]) -> impl Iterator<Item = Option<(RecordHeader, std::ops::Range<usize>)>> + '_ {
    let mut at = 0;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || at >= payload.len() {
            return None;
        }
        let one = (|| {
            let mut cursor = Cursor::new(&payload[at..]);
            let len = usize::try_from(cursor.u32()?).ok()?;
            let [kind, ..] = cursor.array::<4>()?;
            let header = RecordHeader {
                kind,
                group: cursor.u64()?,
                index: cursor.u64()?,
                term: cursor.u64()?,
                offset: cursor.i64()?,
            };
            cursor.take(len)?;
            let start = at + RECORD_HEADER_BYTES;
            at = start + len;
            Some((header, start..at))
        })();
        failed = one.is_none();
        Some(one)
    })
}

/// One block found in a file of a ring.
#[derive(Debug, Clone)]
pub struct Found {
    pub header: BlockHeader,
    /// Number of the file among those scanned, and where the payload begins in it.
    pub file: usize,
    pub payload_at: usize,
    pub payload_ok: bool,
}

/// Every block with a good header of this ring in one file. Content of other runs and rings is passed over.
pub fn scan(bytes: &[u8], file: usize, wal_id: u64, lane: u16, shard: u32, found: &mut Vec<Found>) {
    let mut at = 0;
    while at + BLOCK_HEADER_BYTES <= bytes.len() {
        let header = BlockHeader::decode(&bytes[at..])
            .filter(|h| h.wal_id == wal_id && h.lane == lane && h.shard == shard);
        let Some(header) = header else {
            at += BLOCK_ALIGN;
            continue;
        };
        let payload_at = at + BLOCK_HEADER_BYTES;
        let payload_len = header.payload_len as usize;
        let payload = payload_at.checked_add(payload_len).and_then(|end| bytes.get(payload_at..end));
        let payload_ok = payload.is_some_and(|payload| crc32c::crc32c(payload) == header.payload_crc);
        // A torn block may reach over older blocks that are of no interest, as its sequence is higher than theirs. But
        // its length must not hide what lies behind the end of the file.
        at += if payload.is_some() { block_bytes(payload_len) } else { BLOCK_ALIGN };
        found.push(Found { header, file, payload_at, payload_ok });
    }
}

/// Who may have lost something to a damaged block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Suspects {
    Groups(Bloom),
    All,
}

impl Suspects {
    pub fn contains(&self, group: GroupId) -> bool {
        match self {
            Self::Groups(bloom) => bloom.contains(group),
            Self::All => true,
        }
    }
}

#[derive(Debug, Default)]
pub struct Judgement {
    /// Numbers into the given list of the blocks that count, in order of their sequence.
    pub live: Vec<usize>,
    pub damage: Vec<(u64, Suspects)>,
    /// Something after the last counting block was cut.
    pub torn: bool,
}

/// Missing blocks are named one by one only up to this many; more than that and everybody is a suspect anyway.
const MAX_NAMED_DAMAGE: u64 = 1024;

/// The newest block that has all blocks before it that it names as live, and these. A newer one may have reached the disk
/// without them, so what it says of files that are no longer needed does not count either; none of them is written over
/// before that is synced.
fn longest_whole(found: &[Found], order: &[usize]) -> Judgement {
    let mut run_from = 0;
    let mut before: Option<(u64, u32)> = None;
    let mut best: Option<(usize, usize)> = None;
    for (at, block) in order.iter().map(|k| &found[*k]).enumerate() {
        if !block.payload_ok {
            before = None;
            continue;
        }
        let header = &block.header;
        if before != header.sequence.checked_sub(1).map(|last| (last, header.previous_payload_crc)) {
            run_from = at;
        }
        before = Some((header.sequence, header.payload_crc));
        let first = header.oldest_live.min(header.sequence);
        let run_first = found[order[run_from]].header.sequence;
        if let Some(skip) = first.checked_sub(run_first) {
            best = Some((run_from + skip as usize, at));
        }
    }
    let live = best.map_or(&[][..], |(first, last)| &order[first..=last]);
    Judgement { live: live.to_vec(), damage: Vec::new(), torn: live.last() != order.last() }
}

/// Decides which blocks count. `cut_at_gap`: the ring may legitimately have lost blocks anywhere (the os lane after a
/// loss of power), and ends where one that is missing is needed.
pub fn judge(found: &[Found], cut_at_gap: bool) -> Judgement {
    let mut order: Vec<usize> = (0..found.len()).collect();
    // Of two blocks with one sequence (a rewrite after a torn write of an earlier start cannot happen, but bytes may be
    // anything) the valid one counts.
    order.sort_by_key(|k| (found[*k].header.sequence, !found[*k].payload_ok));
    order.dedup_by_key(|k| found[*k].header.sequence);
    if cut_at_gap {
        return longest_whole(found, &order);
    }
    let by_sequence = |sequence: u64| {
        order.binary_search_by_key(&sequence, |k| found[*k].header.sequence).ok().map(|at| order[at])
    };
    let counts = |k: &usize| found[*k].payload_ok || mutant::is(Mutant::TakesTornCommit);
    let Some(newest) = order.iter().rev().copied().find(counts) else {
        return Judgement { torn: !found.is_empty(), ..Judgement::default() };
    };
    let last = found[newest].header.sequence;
    let first = found[newest].header.oldest_live.min(last);
    let mut out =
        Judgement { torn: order.iter().any(|k| found[*k].header.sequence > last), ..Judgement::default() };
    if last - first > MAX_NAMED_DAMAGE + order.len() as u64 {
        out.damage.push((first, Suspects::All));
        return out;
    }
    let mut sequence = first;
    let mut previous_crc = None;
    loop {
        let here = by_sequence(sequence);
        match here {
            Some(k)
                if (found[k].payload_ok || mutant::is(Mutant::TakesTornCommit))
                    && previous_crc.is_none_or(|crc| crc == found[k].header.previous_payload_crc) =>
            {
                previous_crc = Some(found[k].header.payload_crc);
                out.live.push(k);
            }
            _ if mutant::is(Mutant::CutsAtBadChecksum) => break,
            _ => {
                let own = here.map(|k| found[k].header.groups);
                let next = sequence.checked_add(1).and_then(by_sequence);
                let copy = next.map(|k| found[k].header.previous_groups);
                out.damage.push((sequence, own.or(copy).map_or(Suspects::All, Suspects::Groups)));
                previous_crc = None;
            }
        }
        if sequence == last {
            break;
        }
        sequence += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(sequence: u64, payload: &[u8], previous: u32) -> BlockHeader {
        let mut groups = Bloom::default();
        groups.insert(sequence);
        let mut previous_groups = Bloom::default();
        previous_groups.insert(sequence.wrapping_sub(1));
        BlockHeader {
            lane: 0,
            shard: 3,
            payload_len: payload.len() as u32,
            wal_id: 77,
            boot_id: 5,
            sequence,
            lsn: sequence,
            file_seq: 1,
            oldest_live: 10,
            groups,
            previous_groups,
            payload_crc: crc32c::crc32c(payload),
            previous_payload_crc: previous,
        }
    }

    /// Blocks 10..10+n with a payload of their own; returns the file and where each block begins.
    fn file(n: u64) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut starts, mut previous) = (Vec::new(), Vec::new(), 0);
        for sequence in 10..10 + n {
            let payload = vec![sequence as u8; 100 + 3000 * (sequence as usize % 3)];
            let header = header(sequence, &payload, previous);
            previous = header.payload_crc;
            starts.push(bytes.len());
            let at = bytes.len();
            bytes.resize(at + block_bytes(payload.len()), 0);
            header.encode(&mut bytes[at..]);
            bytes[at + BLOCK_HEADER_BYTES..][..payload.len()].copy_from_slice(&payload);
        }
        (bytes, starts)
    }

    fn verdict(bytes: &[u8], cut_at_gap: bool) -> (Vec<u64>, Vec<(u64, Suspects)>, bool) {
        let mut found = Vec::new();
        scan(bytes, 0, 77, 0, 3, &mut found);
        let judged = judge(&found, cut_at_gap);
        (judged.live.iter().map(|k| found[*k].header.sequence).collect(), judged.damage, judged.torn)
    }

    #[test]
    fn a_whole_ring_counts() {
        let (mut bytes, _) = file(6);
        bytes.resize(bytes.len() + 8192, 0);
        assert_eq!(verdict(&bytes, false), ((10..16).collect(), Vec::new(), false));
        assert_eq!(verdict(&[], false), (Vec::new(), Vec::new(), false));
    }

    #[test]
    fn a_torn_tail_is_cut() {
        let (mut bytes, starts) = file(6);
        bytes[starts[5] + BLOCK_HEADER_BYTES + 50] ^= 1;
        assert_eq!(verdict(&bytes, false), ((10..15).collect(), Vec::new(), true));
        bytes[starts[5]..][..4096].fill(0);
        assert_eq!(verdict(&bytes, false), ((10..15).collect(), Vec::new(), false));
    }

    #[test]
    fn damage_inside_names_its_groups() {
        let (mut bytes, starts) = file(6);
        bytes[starts[2] + BLOCK_HEADER_BYTES + 50] ^= 1;
        let (live, damage, _) = verdict(&bytes, false);
        assert_eq!(live, [10, 11, 13, 14, 15]);
        assert_eq!(damage.len(), 1);
        assert!(damage[0].1.contains(12) && !damage[0].1.contains(13));
        // The header too: the next block still knows.
        bytes[starts[2]] ^= 1;
        let (_, damage, _) = verdict(&bytes, false);
        assert!(damage[0].1.contains(12) && !damage[0].1.contains(14));
        // Two in a row without headers: the first is named by nobody.
        bytes[starts[3]] ^= 1;
        let (live, damage, _) = verdict(&bytes, false);
        assert_eq!(live, [10, 11, 14, 15]);
        assert_eq!(damage[0], (12, Suspects::All));
        assert!(damage[1].1.contains(13) && !damage[1].1.contains(12));
        let (live, damage, torn) = verdict(&bytes, true);
        assert_eq!((live, damage.len(), torn), (vec![10, 11], 0, true));
    }

    #[test]
    fn what_a_lone_block_says_of_retired_files_does_not_count() {
        let (mut bytes, starts) = file(6);
        // The last block reached the disk, those before it did not, and it calls them the oldest that are needed.
        let mut last = BlockHeader::decode(&bytes[starts[5]..]).unwrap();
        last.oldest_live = 13;
        last.encode(&mut bytes[starts[5]..]);
        for lost in [3, 4] {
            bytes[starts[lost]..][..4096].fill(0);
        }
        assert_eq!(verdict(&bytes, true), (vec![10, 11, 12], Vec::new(), true));
        // With all of them it counts.
        let (mut bytes, starts) = file(6);
        last.encode(&mut bytes[starts[5]..]);
        assert_eq!(verdict(&bytes, true), (vec![13, 14, 15], Vec::new(), false));
        bytes[..4096].fill(0);
        assert_eq!(verdict(&bytes, true).0, [13, 14, 15]);
    }

    #[test]
    fn older_blocks_behind_new_ones_are_ignored() {
        let (bytes, starts) = file(6);
        // The file is used again: block 16 over the beginning of it; the live range begins at 13.
        let mut bytes = bytes;
        let mut again = header(16, &[1; 100], 0);
        again.oldest_live = 16;
        bytes[..4096].fill(0);
        again.encode(&mut bytes);
        bytes[BLOCK_HEADER_BYTES..][..100].fill(1);
        assert_eq!(verdict(&bytes, false), (vec![16], Vec::new(), false));
        assert!(starts.len() == 6);
    }

    #[test]
    fn records_round_trip() {
        let mut buf = vec![0; 300];
        let a = RecordHeader { kind: BATCH, group: 9, index: 4, term: 2, offset: -5 };
        let b = RecordHeader { kind: CONTROL, group: 1, index: 5, term: 3, offset: 8 };
        write_record(&mut buf, &a, &[7; 10]);
        write_record(&mut buf[50..], &b, &[]);
        let back: Vec<_> = records(&buf[..90]).collect();
        assert_eq!(back, [Some((a, 40..50)), Some((b, 90..90))]);
        assert_eq!(records(&buf[..89]).last(), Some(None));
    }

    proptest! {
        #[test]
        fn any_flip_is_cut_or_reported(at in 0usize..1 << 20, bit in 0u8..8) {
            let (mut bytes, starts) = file(6);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let (live, damage, _) = verdict(&bytes, false);
            let block = starts.iter().rposition(|start| *start <= at).unwrap() as u64 + 10;
            let all: Vec<u64> = (10..16).collect();
            if live != all {
                let rest: Vec<u64> = all.into_iter().filter(|s| *s != block).collect();
                prop_assert_eq!(live, rest);
                if block != 15 {
                    prop_assert!(damage.iter().any(|(s, who)| *s == block && who.contains(block)));
                }
            }
        }

        #[test]
        fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            verdict(&bytes, false);
            for record in records(&bytes) {
                if let Some((_, range)) = record { prop_assert!(range.end <= bytes.len()); }
            }
        }
    }
}
