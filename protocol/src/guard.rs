//! The check that every request except Produce passes before `kafka-protocol` decodes it.
//!
//! `kafka-protocol` reserves whatever a length prefix claims, and a failed allocation aborts the process. The guard
//! walks the body by the layout in `schema` and proves that each length fits, that strings are UTF-8, that nothing is
//! null that may not be, and that the decoded structs stay within a small multiple of the body. A body it accepts
//! decodes without error and without surprise. Bytes after the end of the request are ignored, as Kafka does:
//! librdkafka sends some after a Metadata request for all topics.
//!
//! Pure and allocation-free. Depth is bounded by the layout, which does not recurse, never by the input.
//! Decode from `Bytes`, not from a slice: then the strings are handles into the frame and not copies.

use crate::api;
use crate::schema::{self, Field, HANDLE_BYTES, Kind, Message};
use crate::wire::{Reader, WireError};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuardError {
    #[error("API key {key} version {version} is not decoded behind the guard")]
    NotServed { key: i16, version: i16 },
    #[error("{field}: reaches past the end of the request")]
    Truncated { field: &'static str },
    #[error("{field}: malformed length, null or content")]
    Malformed { field: &'static str },
    #[error("{field}: more elements than a request of this size may ask for")]
    TooManyElements { field: &'static str },
}

/// Decoded bytes allowed per byte of body. Real requests stay below 12 (the densest is a list of short topic names);
/// the rest of the promised 16 is for the allocator's own rounding.
const DECODED_PER_BYTE_MAX: usize = 14;
/// And what every request may use besides, so that small ones full of empty strings pass.
const DECODED_BYTES_FREE: usize = 48 << 10;

/// A first unknown tagged field allocates a B-tree leaf of eleven entries.
const FIRST_TAG_DECODED_BYTES: usize = 512;
/// Further ones share leaves that are at least half full.
const MORE_TAG_DECODED_BYTES: usize = 96;

/// Proves that decoding `body` (the frame after the request header) is safe.
pub fn check_request(key: i16, version: i16, body: &[u8]) -> Result<(), GuardError> {
    let not_served = GuardError::NotServed { key, version };
    let spec = api::spec(key).ok_or(not_served)?;
    let message = schema::request(key).ok_or(not_served)?;
    if !api::supports(key, version) {
        return Err(not_served);
    }
    let mut walk = Walk {
        reader: Reader::new(body),
        version,
        flexible: version >= spec.first_flexible,
        decoded_left: body.len().saturating_mul(DECODED_PER_BYTE_MAX).saturating_add(DECODED_BYTES_FREE),
    };
    walk.message(message, spec.name)
}

struct Walk<'a> {
    reader: Reader<'a>,
    version: i16,
    flexible: bool,
    /// How much more the decoded request may occupy.
    decoded_left: usize,
}

/// Names the field in which reading failed.
fn at(field: &'static str) -> impl Fn(WireError) -> GuardError {
    move |error| match error {
        WireError::Truncated => GuardError::Truncated { field },
        WireError::BadLength => GuardError::Malformed { field },
    }
}

impl Walk<'_> {
    fn message(&mut self, message: &'static Message, name: &'static str) -> Result<(), GuardError> {
        for field in message.fields {
            if field.2.contain(self.version) {
                self.field(field)?;
            }
        }
        if self.flexible { self.tagged_fields(message, name) } else { Ok(()) }
    }

    fn field(&mut self, &Field(name, ref kind, _): &Field) -> Result<(), GuardError> {
        match *kind {
            Kind::Bool | Kind::I8 => self.skip(1, name),
            Kind::I16 => self.skip(2, name),
            Kind::I32 => self.skip(4, name),
            Kind::I64 => self.skip(8, name),
            Kind::Uuid => self.skip(16, name),
            Kind::String => self.string(false, name),
            Kind::NullableString => self.string(true, name),
            Kind::Bytes => {
                let length = self.reader.nullable_bytes_length(self.flexible).map_err(at(name))?;
                self.skip(length.ok_or(GuardError::Malformed { field: name })?, name)
            }
            Kind::Int8s => {
                let count = self.count(1, 1, false, name)?;
                self.skip(count, name)
            }
            Kind::Int32s | Kind::NullableInt32s => {
                let count = self.count(4, 4, matches!(kind, Kind::NullableInt32s), name)?;
                // The count fits what remains at four bytes each, so the product does not overflow.
                self.skip(count * 4, name)
            }
            Kind::Strings | Kind::NullableStrings => {
                let nullable = matches!(kind, Kind::NullableStrings);
                let string_bytes_min = if self.flexible { 1 } else { 2 };
                for _ in 0..self.count(string_bytes_min, HANDLE_BYTES, nullable, name)? {
                    self.string(false, name)?;
                }
                Ok(())
            }
            Kind::Structs(message) | Kind::NullableStructs(message) => {
                let nullable = matches!(kind, Kind::NullableStructs(_));
                for _ in 0..self.count(1, message.decoded_bytes(), nullable, name)? {
                    self.message(message, name)?;
                }
                Ok(())
            }
            Kind::Struct(message) => self.message(message, name),
            Kind::NullableStruct(message) => match self.reader.u8().map_err(at(name))? {
                1 => self.message(message, name),
                0xff => Ok(()),
                _ => Err(GuardError::Malformed { field: name }),
            },
        }
    }

    fn skip(&mut self, bytes: usize, name: &'static str) -> Result<(), GuardError> {
        self.reader.take(bytes).map(drop).map_err(at(name))
    }

    fn string(&mut self, nullable: bool, name: &'static str) -> Result<(), GuardError> {
        match self.reader.nullable_string(self.flexible).map_err(at(name))? {
            Some(text) if std::str::from_utf8(text).is_ok() => Ok(()),
            None if nullable => Ok(()),
            _ => Err(GuardError::Malformed { field: name }),
        }
    }

    /// Reads an array's count and charges what its elements will occupy, before any of them is looked at.
    fn count(
        &mut self,
        element_bytes_min: usize,
        element_decoded_bytes: usize,
        nullable: bool,
        name: &'static str,
    ) -> Result<usize, GuardError> {
        let count = self.reader.nullable_count(self.flexible, element_bytes_min).map_err(at(name))?;
        let Some(count) = count else {
            return if nullable { Ok(0) } else { Err(GuardError::Malformed { field: name }) };
        };
        self.charge(count.saturating_mul(element_decoded_bytes), name)?;
        Ok(count)
    }

    fn charge(&mut self, decoded_bytes: usize, name: &'static str) -> Result<(), GuardError> {
        let left = self.decoded_left.checked_sub(decoded_bytes);
        self.decoded_left = left.ok_or(GuardError::TooManyElements { field: name })?;
        Ok(())
    }

    fn tagged_fields(&mut self, message: &'static Message, name: &'static str) -> Result<(), GuardError> {
        let count = self.reader.uvarint().map_err(at(name))?;
        let mut tag_decoded_bytes = FIRST_TAG_DECODED_BYTES;
        for _ in 0..count {
            let tag = self.reader.uvarint().map_err(at(name))?;
            let size = self.reader.uvarint().map_err(at(name))? as usize;
            let Some((_, field)) = message.tagged.iter().find(|(known, _)| *known == tag) else {
                self.charge(tag_decoded_bytes, name)?;
                tag_decoded_bytes = MORE_TAG_DECODED_BYTES;
                self.skip(size, name)?;
                continue;
            };
            if !field.2.contain(self.version) || size > self.reader.remaining() {
                return Err(GuardError::Malformed { field: field.0 });
            }
            // `kafka-protocol` ignores the size of a field it knows, so both must agree.
            let before = self.reader.remaining();
            self.field(field)?;
            if before - self.reader.remaining() != size {
                return Err(GuardError::Malformed { field: field.0 });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_field_it_refuses() {
        // Metadata v1 claiming 2^31-1 topics.
        let claim = [0x7f, 0xff, 0xff, 0xff];
        assert_eq!(check_request(3, 1, &claim), Err(GuardError::Truncated { field: "topics" }));
        let null_group = [0, 0, 0, 1, 0xff, 0xff];
        assert_eq!(check_request(15, 0, &null_group), Err(GuardError::Malformed { field: "groups" }));
        assert_eq!(check_request(3, 1, &[0xff; 4]), Ok(()));
    }

    #[test]
    fn refuses_what_is_not_behind_it() {
        for (key, version) in [(0, 9), (3, 14), (3, -1), (4, 0), (i16::MIN, 0)] {
            assert_eq!(check_request(key, version, &[]), Err(GuardError::NotServed { key, version }));
        }
    }

    #[test]
    fn crowds_of_empty_elements_are_refused() {
        // DeleteGroups v2: 2000 empty names pass under the free allowance only up to a point.
        let body = |count: usize| {
            let mut body = Vec::new();
            let mut value = count as u32 + 1;
            while value >= 0x80 {
                body.push(value as u8 | 0x80);
                value >>= 7;
            }
            body.push(value as u8);
            body.extend(std::iter::repeat_n(1u8, count));
            body.push(0);
            body
        };
        assert_eq!(check_request(42, 2, &body(1000)), Ok(()));
        let refused = Err(GuardError::TooManyElements { field: "groups_names" });
        assert_eq!(check_request(42, 2, &body(100_000)), refused);
    }
}
