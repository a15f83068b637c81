//! Numbers and byte strings in a frame's body, both ways.

use bytes::{BufMut, Bytes, BytesMut};

/// Payloads from here on become segments of their own; smaller ones are cheaper to copy than to send apart.
const SPLICE_BYTES_MIN: usize = 1024;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    #[error("the body ends too early")]
    Truncated,
    #[error("{0} bytes behind the end of the body")]
    Trailing(usize),
    #[error("{what} is {value}, at most {limit} are allowed")]
    TooMany { what: &'static str, value: u64, limit: u64 },
    #[error("{0} is none that this version knows")]
    Unknown(&'static str),
    #[error("{0} is malformed")]
    Malformed(&'static str),
}

/// Collects a body as segments.
#[derive(Default)]
pub(crate) struct Writer {
    segments: Vec<Bytes>,
    open: BytesMut,
    len: usize,
}

impl Writer {
    pub fn len(&self) -> usize {
        self.len + self.open.len()
    }

    pub fn u8(&mut self, value: u8) {
        self.open.put_u8(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.open.put_u16(value);
    }

    pub fn u32(&mut self, value: u32) {
        self.open.put_u32(value);
    }

    pub fn u64(&mut self, value: u64) {
        self.open.put_u64(value);
    }

    pub fn slice(&mut self, value: &[u8]) {
        self.open.put_slice(value);
    }

    pub fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.open.put_u8((value as u8) | 0x80);
            value >>= 7;
        }
        self.open.put_u8(value as u8);
    }

    /// The difference to the number before, small both ways.
    pub fn step(&mut self, previous: &mut u64, value: u64) {
        let difference = value.wrapping_sub(*previous) as i64;
        self.number(((difference << 1) ^ (difference >> 63)) as u64);
        *previous = value;
    }

    pub fn payload(&mut self, bytes: &Bytes) {
        self.u32(u32::try_from(bytes.len()).expect("no payload is larger than a frame"));
        if bytes.len() < SPLICE_BYTES_MIN {
            self.open.put_slice(bytes);
        } else {
            self.close();
            self.len += bytes.len();
            self.segments.push(bytes.clone());
        }
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            let done = self.open.split().freeze();
            self.len += done.len();
            self.segments.push(done);
        }
    }

    pub fn finish(mut self) -> Vec<Bytes> {
        self.close();
        self.segments
    }
}

/// Reads a body from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    rest: Bytes,
}

impl Reader {
    pub fn new(body: Bytes) -> Reader {
        Reader { rest: body }
    }

    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub fn bytes(&mut self, count: usize) -> Result<Bytes, DecodeError> {
        if count > self.rest.len() {
            return Err(DecodeError::Truncated);
        }
        Ok(self.rest.split_to(count))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (array, _) = self.rest.split_first_chunk::<N>().ok_or(DecodeError::Truncated)?;
        let array = *array;
        let _ = self.rest.split_to(N);
        Ok(array)
    }

    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    pub fn array16(&mut self) -> Result<[u8; 16], DecodeError> {
        self.array()
    }

    /// Only the shortest form of a number is one, so that a message has one encoding.
    pub fn number(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for (at, byte) in self.rest.iter().copied().enumerate().take(10) {
            let bits = u64::from(byte & 0x7f);
            let shifted = bits << (7 * at);
            if shifted >> (7 * at) != bits {
                return Err(DecodeError::Malformed("a number"));
            }
            value |= shifted;
            if byte < 0x80 {
                if byte == 0 && at > 0 {
                    return Err(DecodeError::Malformed("a number"));
                }
                let _ = self.rest.split_to(at + 1);
                return Ok(value);
            }
        }
        Err(if self.rest.len() < 10 { DecodeError::Truncated } else { DecodeError::Malformed("a number") })
    }

    pub fn step(&mut self, previous: &mut u64) -> Result<u64, DecodeError> {
        let coded = self.number()?;
        let difference = ((coded >> 1) as i64) ^ -((coded & 1) as i64);
        *previous = previous.wrapping_add(difference as u64);
        Ok(*previous)
    }

    /// A count of things of which each takes at least `least` bytes.
    pub fn count(&mut self, what: &'static str, limit: u64, least: usize) -> Result<usize, DecodeError> {
        let value = self.number()?;
        if value > limit {
            return Err(DecodeError::TooMany { what, value, limit });
        }
        let count = usize::try_from(value).map_err(|_| DecodeError::Truncated)?;
        if count.saturating_mul(least) > self.remaining() {
            return Err(DecodeError::Truncated);
        }
        Ok(count)
    }

    pub fn payload(&mut self) -> Result<Bytes, DecodeError> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }

    pub fn text(&mut self, what: &'static str, limit: usize) -> Result<String, DecodeError> {
        let len = usize::from(self.u16()?);
        if len > limit {
            return Err(DecodeError::TooMany { what, value: len as u64, limit: limit as u64 });
        }
        let bytes = self.bytes(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError::Malformed(what))
    }

    pub fn end(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.rest.len())) }
    }
}
