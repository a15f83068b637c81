//! Bounds-checked reading and plain writing of Kafka's primitive types, shared by the hand-written codecs.
//!
//! Reading never panics: a short or malformed field is a [`WireError`]. Lengths are checked against what remains
//! before anything is sliced, and nothing here allocates.

use bytes::{BufMut, BytesMut};

/// Kafka's own limit for a string, in both encodings; a longer one is malformed, not merely unusual.
pub(crate) const STRING_BYTES_MAX: usize = i16::MAX as usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a field reaches past the end of the frame")]
    Truncated,
    #[error("a length or count is malformed")]
    BadLength,
}

/// Reads fields from the front of a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    #[inline]
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len()
    }

    #[inline]
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.bytes.split_at_checked(n).ok_or(WireError::Truncated)?;
        self.bytes = tail;
        Ok(head)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.bytes = tail;
        Ok(*head)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    #[inline]
    pub(crate) fn i16(&mut self) -> Result<i16, WireError> {
        Ok(i16::from_be_bytes(self.array()?))
    }

    #[inline]
    pub(crate) fn i32(&mut self) -> Result<i32, WireError> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub(crate) fn uuid(&mut self) -> Result<uuid::Uuid, WireError> {
        Ok(uuid::Uuid::from_bytes(self.array()?))
    }

    /// At most five bytes, and the fifth may only carry the top four bits: `kafka-protocol` silently cuts a longer
    /// one, so accepting it here would let the two readers disagree about where the next field starts.
    #[inline]
    pub(crate) fn uvarint(&mut self) -> Result<u32, WireError> {
        // Nearly every varint on the wire is one byte long.
        if let Some((&byte @ 0..0x80, tail)) = self.bytes.split_first() {
            self.bytes = tail;
            return Ok(u32::from(byte));
        }
        let mut value = 0u32;
        for shift in [0u32, 7, 14, 21, 28] {
            let byte = self.u8()?;
            if shift == 28 && byte > 0x0f {
                return Err(WireError::BadLength);
            }
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(WireError::BadLength)
    }

    /// A varint length written as `n + 1`, with 0 for null.
    #[inline]
    fn compact_length(&mut self) -> Result<Option<usize>, WireError> {
        Ok((self.uvarint()? as usize).checked_sub(1))
    }

    pub(crate) fn nullable_string(&mut self, flexible: bool) -> Result<Option<&'a [u8]>, WireError> {
        let length = if flexible {
            self.compact_length()?
        } else {
            match self.i16()? {
                -1 => None,
                n => Some(usize::try_from(n).map_err(|_| WireError::BadLength)?),
            }
        };
        match length {
            None => Ok(None),
            Some(n) if n > STRING_BYTES_MAX => Err(WireError::BadLength),
            Some(n) => self.take(n).map(Some),
        }
    }

    /// Length of a nullable byte field, proven to fit what remains.
    #[inline]
    pub(crate) fn nullable_bytes_length(&mut self, flexible: bool) -> Result<Option<usize>, WireError> {
        let length = if flexible {
            self.compact_length()?
        } else {
            match self.i32()? {
                -1 => None,
                n => Some(usize::try_from(n).map_err(|_| WireError::BadLength)?),
            }
        };
        match length {
            Some(n) if n > self.remaining() => Err(WireError::Truncated),
            other => Ok(other),
        }
    }

    /// Element count of a nullable array, proven to fit what remains at `element_bytes_min` bytes per element.
    #[inline]
    pub(crate) fn nullable_count(
        &mut self,
        flexible: bool,
        element_bytes_min: usize,
    ) -> Result<Option<usize>, WireError> {
        let count = if flexible {
            self.compact_length()?
        } else {
            match self.i32()? {
                -1 => None,
                n => Some(usize::try_from(n).map_err(|_| WireError::BadLength)?),
            }
        };
        match count {
            Some(n) if n > self.remaining() / element_bytes_min.max(1) => Err(WireError::Truncated),
            other => Ok(other),
        }
    }

    /// Skips a section of tagged fields; each takes at least two bytes (tag, size).
    #[inline]
    pub(crate) fn skip_tagged_fields(&mut self) -> Result<(), WireError> {
        let count = self.uvarint()? as usize;
        if count > self.remaining() / 2 {
            return Err(WireError::Truncated);
        }
        for _ in 0..count {
            self.uvarint()?;
            let size = self.uvarint()? as usize;
            self.take(size)?;
        }
        Ok(())
    }
}

pub(crate) fn put_uvarint(buf: &mut BytesMut, mut value: u32) {
    while value >= 0x80 {
        buf.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    buf.put_u8(value as u8);
}

/// Writes an array count in either encoding. Counts come from our own vectors, which a frame bounded before.
pub(crate) fn put_count(buf: &mut BytesMut, count: usize, flexible: bool) {
    let count = u32::try_from(count).expect("an array of more than 4 billion elements");
    if flexible {
        put_uvarint(buf, count + 1);
    } else {
        buf.put_u32(count);
    }
}

/// Writes a string in either encoding, cut at a character boundary when it is longer than Kafka's limit.
pub(crate) fn put_string(buf: &mut BytesMut, text: &str, flexible: bool) {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text.as_bytes()[..end];
    if flexible {
        put_uvarint(buf, text.len() as u32 + 1);
    } else {
        buf.put_i16(text.len() as i16);
    }
    buf.put_slice(text);
}

pub(crate) fn put_nullable_string(buf: &mut BytesMut, text: Option<&str>, flexible: bool) {
    match text {
        Some(text) => put_string(buf, text, flexible),
        None if flexible => buf.put_u8(0),
        None => buf.put_i16(-1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uvarints_round_trip_and_reject_what_does_not_fit() {
        for value in [0, 1, 127, 128, 300, 16_383, 16_384, u32::MAX - 1, u32::MAX] {
            let mut buf = BytesMut::new();
            put_uvarint(&mut buf, value);
            assert_eq!(Reader::new(&buf).uvarint(), Ok(value));
        }
        assert_eq!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x1f]).uvarint(), Err(WireError::BadLength));
        assert_eq!(Reader::new(&[0x80, 0x80, 0x80, 0x80, 0x80, 0]).uvarint(), Err(WireError::BadLength));
        assert_eq!(Reader::new(&[0x80]).uvarint(), Err(WireError::Truncated));
    }

    #[test]
    fn counts_are_bounded_by_what_remains() {
        assert_eq!(Reader::new(&[0, 0, 0, 2, 1, 2]).nullable_count(false, 1), Ok(Some(2)));
        assert_eq!(Reader::new(&[0, 0, 0, 3, 1, 2]).nullable_count(false, 1), Err(WireError::Truncated));
        assert_eq!(Reader::new(&[0xff; 4]).nullable_count(false, 1), Ok(None));
        assert_eq!(
            Reader::new(&[0xff, 0xff, 0xff, 0xfe]).nullable_count(false, 1),
            Err(WireError::BadLength)
        );
    }

    #[test]
    fn long_strings_are_cut_at_a_character() {
        let text = "é".repeat(20_000);
        let mut buf = BytesMut::new();
        put_string(&mut buf, &text, false);
        assert_eq!(buf.len(), 2 + 32_766);
        assert!(std::str::from_utf8(&buf[2..]).is_ok());
    }
}
