//! Kafka primitives for the hand-written Produce and Fetch of the generator: plain writing, checked reading.
//!
//! Pure, any thread. Kept apart from the broker's codecs on purpose, so that neither hides the other's mistakes.

use anyhow::{Result, bail};
use bytes::{BufMut, BytesMut};

pub const PRODUCE: i16 = 0;
pub const FETCH: i16 = 1;

/// The first version whose encoding is "flexible" (compact lengths, tagged fields).
pub const PRODUCE_FLEXIBLE: i16 = 9;

pub fn put_uvarint(buf: &mut BytesMut, mut value: u32) {
    while value >= 0x80 {
        buf.put_u8((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    buf.put_u8(value as u8);
}

/// Zigzag, as used inside records.
pub fn put_varint(buf: &mut BytesMut, value: i32) {
    put_uvarint(buf, ((value << 1) ^ (value >> 31)) as u32);
}

pub fn put_compact_str(buf: &mut BytesMut, s: &str) {
    put_uvarint(buf, s.len() as u32 + 1);
    buf.put_slice(s.as_bytes());
}

pub fn put_str(buf: &mut BytesMut, s: &str) {
    buf.put_i16(s.len() as i16);
    buf.put_slice(s.as_bytes());
}

/// Request header version 2 (flexible) behind a length that is patched by [`finish_frame`].
pub fn start_request(buf: &mut BytesMut, key: i16, version: i16, correlation_id: i32, client_id: &str) {
    buf.put_i32(0);
    buf.put_i16(key);
    buf.put_i16(version);
    buf.put_i32(correlation_id);
    put_str(buf, client_id);
    buf.put_u8(0);
}

/// Writes the frame's length at `start`; `beyond` bytes of the frame are sent from elsewhere.
pub fn finish_frame(buf: &mut BytesMut, start: usize, beyond: usize) {
    let len = (buf.len() - start - 4 + beyond) as i32;
    buf[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

/// Reads fields from the front of a slice; a short field is an error, never a panic.
#[derive(Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        match self.0.split_at_checked(n) {
            Some((head, tail)) => {
                self.0 = tail;
                Ok(head)
            }
            None => bail!("frame ends {} bytes early", n - self.0.len()),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.0.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.0 = tail;
                Ok(*head)
            }
            None => bail!("frame ends inside a field of {N} bytes"),
        }
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub fn i16(&mut self) -> Result<i16> {
        Ok(i16::from_be_bytes(self.array()?))
    }

    pub fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    pub fn uvarint(&mut self) -> Result<u32> {
        let mut value = 0u32;
        for shift in [0u32, 7, 14, 21, 28] {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        bail!("a varint is longer than five bytes")
    }

    /// A compact length: `None` for null.
    pub fn compact_len(&mut self) -> Result<Option<usize>> {
        Ok((self.uvarint()? as usize).checked_sub(1))
    }

    pub fn compact_bytes(&mut self) -> Result<Option<&'a [u8]>> {
        match self.compact_len()? {
            Some(n) => Ok(Some(self.take(n)?)),
            None => Ok(None),
        }
    }

    pub fn bytes_i16(&mut self) -> Result<Option<&'a [u8]>> {
        match usize::try_from(self.i16()?) {
            Ok(n) => Ok(Some(self.take(n)?)),
            Err(_) => Ok(None),
        }
    }

    pub fn bytes_i32(&mut self) -> Result<Option<&'a [u8]>> {
        match usize::try_from(self.i32()?) {
            Ok(n) => Ok(Some(self.take(n)?)),
            Err(_) => Ok(None),
        }
    }

    pub fn tags(&mut self) -> Result<()> {
        for _ in 0..self.uvarint()? {
            self.uvarint()?;
            let n = self.uvarint()? as usize;
            self.take(n)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip() {
        for v in [0u32, 1, 127, 128, 300, 16_383, 16_384, 1 << 28, u32::MAX] {
            let mut b = BytesMut::new();
            put_uvarint(&mut b, v);
            let mut r = Reader(&b);
            assert_eq!(r.uvarint().unwrap(), v);
            assert!(r.0.is_empty());
        }
        let mut b = BytesMut::new();
        put_varint(&mut b, -1);
        assert_eq!(&b[..], &[1]);
    }

    #[test]
    fn short_frames_are_errors() {
        assert!(Reader(&[0, 0, 0]).i32().is_err());
        assert!(Reader(&[5, b'a']).compact_bytes().is_err());
        assert!(Reader(&[0x80; 6]).uvarint().is_err());
    }
}
