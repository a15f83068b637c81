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

    #[cold]
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
        // Ten bytes hold 64 bits.
        for byte in self.bytes.iter().take(10) {
            taken += 1;
            if *byte < 0x80 {
                self.bytes = &self.bytes[taken..];
                return Some(());
            }
        }
        None
    }
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
