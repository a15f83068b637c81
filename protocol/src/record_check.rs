//! Whether the records of a produced batch are what its header says: as many, each as long as it claims, offsets without
//! gap or double, nothing after the last.
//!
//! One walk over the lengths of an uncompressed batch; keys, values and headers are skipped, not read. Records of a
//! compressed batch would have to be decompressed for that, which costs more than all the rest of a produce: there the
//! count is only held to what so many bytes of that codec can make, and readers check the rest.

use crate::compression::Compression;
use crate::record_batch::{BatchError, BatchHeader};

/// Length, attributes, two deltas, key and value lengths, count of headers: one byte each.
const RECORD_BYTES_MIN: u64 = 7;

/// `body` is the whole batch after its header. Count and last offset delta of the header agree already.
pub(crate) fn check_records(header: &BatchHeader, body: &[u8]) -> Result<(), BatchError> {
    let codec = header.compression()?;
    if codec != Compression::None {
        let possible = body.len() as u64 * expansion_max(codec) / RECORD_BYTES_MIN;
        let claimed = u64::try_from(header.record_count).unwrap_or(0);
        return if claimed <= possible {
            Ok(())
        } else {
            Err(BatchError::BadRecord { index: i32::try_from(possible).unwrap_or(i32::MAX) })
        };
    }
    let mut walk = Walk { bytes: body };
    for index in 0..header.record_count {
        walk.record(index).ok_or(BatchError::BadRecord { index })?;
    }
    if walk.bytes.is_empty() { Ok(()) } else { Err(BatchError::BytesAfterRecords(walk.bytes.len())) }
}

/// Decompressed bytes that one compressed byte can stand for at most, rounded up, by the formats: deflate has 258 bytes for
/// two bits, a length byte of LZ4 stands for 255, Snappy copies 64 bytes by three, and a Zstandard block of four bytes may
/// be 128 KiB of one byte. Frames and headers only make it less.
fn expansion_max(codec: Compression) -> u64 {
    match codec {
        Compression::None => 1,
        Compression::Gzip => 1032,
        Compression::Snappy => 22,
        Compression::Lz4 => 255,
        Compression::Zstd => 32 << 10,
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
}

impl Walk<'_> {
    /// Goes past one record, which must have this offset delta.
    #[inline(always)]
    fn record(&mut self, index: i32) -> Option<()> {
        let length = usize::try_from(self.varint()?).ok()?;
        let (record, rest) = self.bytes.split_at_checked(length)?;
        self.bytes = rest;
        if is_plain(record, index) { Some(()) } else { Self::check_parts(record, index) }
    }

    /// What a record is made of, part by part.
    #[inline(never)]
    fn check_parts(record: &[u8], index: i32) -> Option<()> {
        // Attributes, which no record has yet.
        let (_, parts) = record.split_first()?;
        let mut parts = Walk { bytes: parts };
        parts.skip_varlong()?;
        if parts.varint()? != index {
            return None;
        }
        parts.skip_nullable()?;
        parts.skip_nullable()?;
        let headers = parts.varint()?;
        if headers != 0 {
            parts.skip_headers(headers)?;
        }
        parts.bytes.is_empty().then_some(())
    }

    fn skip_headers(&mut self, count: i32) -> Option<()> {
        // Each takes two bytes at least, so a false count ends soon.
        for _ in 0..u32::try_from(count).ok()? {
            let key = usize::try_from(self.varint()?).ok()?;
            self.skip(key)?;
            self.skip_nullable()?;
        }
        Some(())
    }

    #[inline(always)]
    fn skip_nullable(&mut self) -> Option<()> {
        match self.varint()? {
            -1 => Some(()),
            length => self.skip(usize::try_from(length).ok()?),
        }
    }

    #[inline(always)]
    fn skip(&mut self, length: usize) -> Option<()> {
        self.bytes = self.bytes.get(length..)?;
        Some(())
    }

    /// Zigzag, as every number of a record; most take one or two bytes.
    #[inline(always)]
    fn varint(&mut self) -> Option<i32> {
        let (value, rest) = match *self.bytes {
            [a @ 0..=0x7f, ref rest @ ..] => (u32::from(a), rest),
            [a, b @ 0..=0x7f, ref rest @ ..] => (u32::from(a & 0x7f) | u32::from(b) << 7, rest),
            _ => long_varint(self.bytes)?,
        };
        self.bytes = rest;
        Some((value >> 1) as i32 ^ -((value & 1) as i32))
    }

    #[inline(always)]
    fn skip_varlong(&mut self) -> Option<()> {
        let mut taken = 0;
        // Ten bytes hold 64 bits, the last of them one.
        for byte in self.bytes.iter().take(10) {
            taken += 1;
            if *byte < 0x80 {
                self.bytes = &self.bytes[taken..];
                return (taken < 10 || *byte <= 1).then_some(());
            }
        }
        None
    }
}

/// Whether this is a whole record of the common shape: a key of less than 64 bytes or none, a value, no headers, numbers in
/// their shortest form. No means only that it takes a closer look.
#[inline(always)]
fn is_plain(record: &[u8], index: i32) -> bool {
    // All lengths before the value's lie in here.
    let Some(head) = record.first_chunk::<16>() else { return false };
    let at = match head {
        [_, 0..=0x7f, ..] => 2,
        [_, _, 0..=0x7f, ..] => 3,
        [_, _, _, 0..=0x7f, ..] => 4,
        _ => return false,
    };
    // The index in zigzag, of one byte or two.
    let zigzag = (index as u32) << 1;
    let at = if zigzag < 1 << 7 {
        if u32::from(head[at]) != zigzag {
            return false;
        }
        at + 1
    } else {
        let two = u32::from(head[at] & 0x7f) | u32::from(head[at + 1]) << 7;
        if head[at] < 0x80 || head[at + 1] >= 0x80 || two != zigzag {
            return false;
        }
        at + 2
    };
    let at = match head[at] {
        1 => at + 1,
        key if key & 0x81 == 0 => at + 1 + usize::from(key >> 1),
        _ => return false,
    };
    let (zigzag, taken) = match record.get(at..) {
        Some(&[1, ..]) => (0, 1),
        Some(&[a @ 0..=0x7f, ..]) => (usize::from(a), 1),
        Some(&[a, b @ 0..=0x7f, ..]) => (usize::from(a & 0x7f) | usize::from(b) << 7, 2),
        Some(&[a, b, c @ 0..=0x7f, ..]) => {
            (usize::from(a & 0x7f) | usize::from(b & 0x7f) << 7 | usize::from(c) << 14, 3)
        }
        _ => return false,
    };
    // The last byte is the count of headers.
    zigzag & 1 == 0 && at + taken + (zigzag >> 1) + 1 == record.len() && record.last() == Some(&0)
}

#[cold]
fn long_varint(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let mut value = 0u32;
    for (at, byte) in bytes.iter().take(5).enumerate() {
        if at == 4 && *byte > 0x0f {
            return None;
        }
        value |= u32::from(byte & 0x7f) << (7 * at);
        if *byte < 0x80 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{BatchBuilder, decode_records};
    use crate::record_batch::{HEADER_BYTES, parse};

    /// SplitMix64.
    struct Rng(u64);

    impl Rng {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % n.max(1) as u64) as usize
        }
    }

    fn check(batch: &[u8]) -> Result<(), BatchError> {
        check_records(&parse(batch).expect("a whole batch"), &batch[HEADER_BYTES..])
    }

    /// Keys, values and headers of none, no, one, two and three bytes of length, times before and after the first.
    fn batch(rng: &mut Rng, records: usize) -> Vec<u8> {
        const LENGTHS: [usize; 8] = [0, 1, 5, 63, 64, 200, 8191, 8192];
        let bytes = vec![b'v'; 8192];
        let mut builder = BatchBuilder::new();
        for _ in 0..records {
            let mut some = || (rng.below(4) > 0).then(|| &bytes[..LENGTHS[rng.below(LENGTHS.len())]]);
            let (key, value, content) = (some(), some(), some());
            let headers = [("name", content), ("", None)];
            let headers = &headers[..rng.below(3)];
            let at = rng.below(1 << 40) as i64 - (1 << 39);
            builder.append(at, key, value, headers);
        }
        builder.build(0).to_vec()
    }

    /// What a reader makes of it: all records, at the offsets that the header promises.
    fn readable(batch: &[u8]) -> bool {
        let mut scratch = Vec::new();
        let Ok(records) = decode_records(batch, &mut scratch, 1 << 20) else { return false };
        let offsets: Result<Vec<i64>, _> = records.map(|record| record.map(|r| r.offset)).collect();
        let count = parse(batch).expect("a whole batch").record_count;
        offsets.is_ok_and(|offsets| offsets.into_iter().eq(0..i64::from(count)))
    }

    #[test]
    fn what_a_client_makes_is_accepted() {
        let mut rng = Rng(1);
        for records in [1, 2, 3, 63, 64, 65, 130, 200] {
            let bytes = batch(&mut rng, records);
            assert_eq!(check(&bytes), Ok(()), "{records} records");
            assert!(readable(&bytes));
        }
    }

    #[test]
    fn it_accepts_exactly_what_a_reader_can_read() {
        let (mut accepted, mut refused) = (0, 0);
        for seed in 0..400 {
            let mut rng = Rng(seed);
            let records = 1 + rng.below(5);
            let whole = batch(&mut rng, records);
            for _ in 0..200 {
                let mut bytes = whole.clone();
                // No time can overflow that counts from 0.
                bytes[27..35].fill(0);
                for _ in 0..=rng.below(2) {
                    // Mostly where a record begins, which is where its numbers are.
                    let reach = if rng.below(2) == 0 { 16 } else { bytes.len() - HEADER_BYTES };
                    let at = HEADER_BYTES + rng.below(reach.min(bytes.len() - HEADER_BYTES));
                    bytes[at] = rng.below(256) as u8;
                }
                if rng.below(4) == 0 {
                    let count = 1 + rng.below(6) as u8;
                    (bytes[60], bytes[26]) = (count, count - 1);
                }
                let outcome = check(&bytes);
                assert_eq!(outcome.is_ok(), readable(&bytes), "seed {seed}: {outcome:?} for {bytes:?}");
                if outcome.is_ok() { accepted += 1 } else { refused += 1 }
            }
        }
        assert!(accepted > 1_000 && refused > 1_000, "{accepted} accepted, {refused} refused");
    }

    #[test]
    fn each_fault_is_named() {
        let mut builder = BatchBuilder::new();
        for value in [b"aaa", b"bbb", b"ccc"] {
            builder.append(0, None, Some(value), &[]);
        }
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = builder.clone().build(0).to_vec();
            change(&mut bytes);
            check(&bytes)
        };
        let count = |n: u8| {
            move |bytes: &mut Vec<u8>| {
                (bytes[60], bytes[26]) = (n, n - 1);
            }
        };
        let bad = |index| Err(BatchError::BadRecord { index });
        assert_eq!(changed(&count(3)), Ok(()));
        assert_eq!(changed(&count(4)), bad(3));
        assert_eq!(changed(&count(2)), Err(BatchError::BytesAfterRecords(10)));
        // Offset delta of the second: the first's again.
        assert_eq!(changed(&|b| b[HEADER_BYTES + 13] = 0), bad(1));
        assert_eq!(changed(&|b| b[HEADER_BYTES] = 0x80), bad(0));
        // As many headers as 32 bits can say end with the bytes, not with the count.
        assert_eq!(changed(&|b| b[HEADER_BYTES + 9] = 0xfe), bad(0));
    }

    #[test]
    fn a_compressed_batch_is_held_to_what_its_bytes_can_make() {
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
            let mut builder = BatchBuilder::new();
            for _ in 0..5_000 {
                // The smallest record there is, and nothing but it: as dense as a batch can be.
                builder.append(0, None, None, &[]);
            }
            let bytes = builder.compression(codec).build(0).to_vec();
            assert_eq!(check(&bytes), Ok(()), "{codec:?}");
            let mut header = parse(&bytes).expect("whole");
            let body = &bytes[HEADER_BYTES..];
            header.record_count = i32::MAX;
            assert!(
                matches!(check_records(&header, &body[..100]), Err(BatchError::BadRecord { .. })),
                "{codec:?}"
            );
        }
    }
}
