//! Primitives of the crate's own binary form: little varints, length-prefixed strings, fixed-width ids.
//!
//! Reading never panics and never allocates more than the input holds.

use std::collections::BTreeMap;

use uuid::Uuid;

/// Config values and names come from Kafka strings, which end at 32 KiB in most versions; nothing valid is longer.
const STRING_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("the input ends inside {0}")]
    Truncated(&'static str),
    #[error("version {0} is not known to this release")]
    UnknownVersion(u8),
    #[error("command type {0} is not known to this release")]
    UnknownCommand(u8),
    #[error("{0} is out of range")]
    OutOfRange(&'static str),
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    #[error("{0} bytes follow the end")]
    Trailing(usize),
    #[error("inconsistent: {0}")]
    Inconsistent(&'static str),
}

#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push((value as u8 & 0x7f) | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    /// Zig-zag, so that -1 is short.
    pub(crate) fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    pub(crate) fn string(&mut self, value: &str) {
        self.varint(value.len() as u64);
        self.bytes.extend_from_slice(value.as_bytes());
    }

    pub(crate) fn uuid(&mut self, value: Uuid) {
        self.bytes.extend_from_slice(value.as_bytes());
    }

    pub(crate) fn map(&mut self, map: &BTreeMap<String, String>) {
        self.varint(map.len() as u64);
        for (key, value) in map {
            self.string(key);
            self.string(value);
        }
    }

    pub(crate) fn changes(&mut self, map: &BTreeMap<String, Option<String>>) {
        self.varint(map.len() as u64);
        for (key, value) in map {
            self.string(key);
            match value {
                None => self.u8(0),
                Some(value) => {
                    self.u8(1);
                    self.string(value);
                }
            }
        }
    }
}

pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, CodecError> {
        let (&first, rest) = self.rest.split_first().ok_or(CodecError::Truncated(what))?;
        self.rest = rest;
        Ok(first)
    }

    pub(crate) fn varint(&mut self, what: &'static str) -> Result<u64, CodecError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                return Err(CodecError::OutOfRange(what));
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(CodecError::OutOfRange(what))
    }

    pub(crate) fn signed(&mut self, what: &'static str) -> Result<i64, CodecError> {
        let raw = self.varint(what)?;
        Ok(((raw >> 1) as i64) ^ -((raw & 1) as i64))
    }

    pub(crate) fn i32(&mut self, what: &'static str) -> Result<i32, CodecError> {
        i32::try_from(self.signed(what)?).map_err(|_| CodecError::OutOfRange(what))
    }

    pub(crate) fn i16(&mut self, what: &'static str) -> Result<i16, CodecError> {
        i16::try_from(self.signed(what)?).map_err(|_| CodecError::OutOfRange(what))
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, CodecError> {
        u16::try_from(self.varint(what)?).map_err(|_| CodecError::OutOfRange(what))
    }

    /// A number of things of which each takes `bytes_each` bytes at least, so that a claimed count cannot
    /// outgrow the input.
    pub(crate) fn count(&mut self, bytes_each: usize, what: &'static str) -> Result<usize, CodecError> {
        let count = usize::try_from(self.varint(what)?).map_err(|_| CodecError::OutOfRange(what))?;
        if count > self.rest.len() / bytes_each.max(1) {
            return Err(CodecError::Truncated(what));
        }
        Ok(count)
    }

    pub(crate) fn string(&mut self, what: &'static str) -> Result<String, CodecError> {
        let length = usize::try_from(self.varint(what)?).map_err(|_| CodecError::OutOfRange(what))?;
        if length > STRING_BYTES_MAX {
            return Err(CodecError::OutOfRange(what));
        }
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(CodecError::Truncated(what))?;
        self.rest = rest;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| CodecError::NotUtf8(what))
    }

    pub(crate) fn uuid(&mut self, what: &'static str) -> Result<Uuid, CodecError> {
        let (bytes, rest) = self.rest.split_first_chunk::<16>().ok_or(CodecError::Truncated(what))?;
        self.rest = rest;
        Ok(Uuid::from_bytes(*bytes))
    }

    pub(crate) fn map(&mut self, what: &'static str) -> Result<BTreeMap<String, String>, CodecError> {
        let count = self.count(2, what)?;
        let mut map = BTreeMap::new();
        for _ in 0..count {
            let key = self.string(what)?;
            map.insert(key, self.string(what)?);
        }
        Ok(map)
    }

    pub(crate) fn changes(
        &mut self,
        what: &'static str,
    ) -> Result<BTreeMap<String, Option<String>>, CodecError> {
        let count = self.count(2, what)?;
        let mut map = BTreeMap::new();
        for _ in 0..count {
            let key = self.string(what)?;
            let value = match self.u8(what)? {
                0 => None,
                1 => Some(self.string(what)?),
                _ => return Err(CodecError::OutOfRange(what)),
            };
            map.insert(key, value);
        }
        Ok(map)
    }

    pub(crate) fn end(&self) -> Result<(), CodecError> {
        if self.rest.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.rest.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_at_their_limits() {
        for value in [0, 1, -1, 63, 64, -64, -65, i64::MAX, i64::MIN] {
            let mut out = Writer::default();
            out.signed(value);
            let mut input = Reader::new(&out.bytes);
            assert_eq!(input.signed("n"), Ok(value));
            assert_eq!(input.end(), Ok(()));
        }
        for value in [0, 127, 128, u64::MAX] {
            let mut out = Writer::default();
            out.varint(value);
            assert_eq!(Reader::new(&out.bytes).varint("n"), Ok(value));
        }
    }

    #[test]
    fn overlong_and_truncated_input_is_refused() {
        assert_eq!(Reader::new(&[0xff; 11]).varint("n"), Err(CodecError::OutOfRange("n")));
        assert_eq!(Reader::new(&[0x80]).varint("n"), Err(CodecError::Truncated("n")));
        // Claims a string of almost 2^63 bytes.
        let mut out = Writer::default();
        out.varint(u64::MAX >> 1);
        assert_eq!(Reader::new(&out.bytes).string("s"), Err(CodecError::OutOfRange("s")));
        assert_eq!(Reader::new(&[5, b'a']).string("s"), Err(CodecError::Truncated("s")));
        assert_eq!(Reader::new(&[2, 0xc3, 0x28]).string("s"), Err(CodecError::NotUtf8("s")));
        assert_eq!(Reader::new(&[200, 1, 0]).count(1, "c"), Err(CodecError::Truncated("c")));
    }
}
