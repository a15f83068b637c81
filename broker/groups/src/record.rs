//! Records of `__consumer_offsets`, byte for byte as Kafka writes them.
//!
//! Keys begin with a 16-bit type: 0 and 1 commit an offset, 2 describes a group; others (KIP-848, share and
//! streams groups) are skipped by the reader. Values begin with their own version: written are OffsetCommitValue
//! 3 (1 when the commit carries its own expiry) and GroupMetadataValue 3; read are 0 to 4 of both, where 4 is the
//! flexible form. No value means a tombstone. Nothing here panics on what it reads; what it writes was bounded to
//! [`MAX_STRING_BYTES`] when the request came in.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

use crate::types::MAX_STRING_BYTES;

/// Key and value of one record; no value is a tombstone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffsetsRecord {
    pub key: Bytes,
    pub value: Option<Bytes>,
}

const KEY_OFFSET_COMMIT_LEGACY: i16 = 0;
const KEY_OFFSET_COMMIT: i16 = 1;
const KEY_GROUP_METADATA: i16 = 2;
/// Written where the topic's id is not known.
const OFFSET_COMMIT_VALUE_VERSION: i16 = 3;
const OFFSET_COMMIT_VALUE_VERSION_WITH_TOPIC_ID: i16 = 4;
/// The only version that can carry the expiry asked for by an OffsetCommit of version 2 to 4.
const OFFSET_COMMIT_VALUE_VERSION_EXPIRING: i16 = 1;
const GROUP_METADATA_VALUE_VERSION: i16 = 3;
const NEWEST_VALUE_VERSION: i16 = 4;
const FIRST_FLEXIBLE_VERSION: i16 = 4;
const TAG_TOPIC_ID: u32 = 0;
/// Bytes the smallest member of a group record takes; bounds what a claimed count may reserve.
const MIN_MEMBER_BYTES: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    #[error("record ends inside a field")]
    Truncated,
    #[error("string is not UTF-8")]
    NotUtf8,
    #[error("length {0} is not possible here")]
    BadLength(i64),
    #[error("value version {0} is not known")]
    UnknownVersion(i16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordKey {
    Offset {
        group: String,
        topic: String,
        partition: i32,
    },
    Group {
        group: String,
    },
    /// A type this coordinator does not keep.
    Other {
        key_type: i16,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OffsetCommitValue {
    pub offset: i64,
    /// -1: not known.
    pub leader_epoch: i32,
    pub metadata: String,
    pub commit_timestamp_ms: i64,
    /// -1: by the coordinator's retention.
    pub expire_timestamp_ms: i64,
    /// Zero: not known. Only version 4 has it.
    pub topic_id: u128,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupMetadataValue {
    pub protocol_type: String,
    pub generation: i32,
    pub protocol: Option<String>,
    pub leader: Option<String>,
    /// -1: not known.
    pub current_state_timestamp_ms: i64,
    pub members: Vec<MemberValue>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberValue {
    pub member_id: String,
    pub group_instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub rebalance_timeout_ms: i32,
    pub session_timeout_ms: i32,
    pub subscription: Bytes,
    pub assignment: Bytes,
}

pub fn offset_commit_key(group: &str, topic: &str, partition: i32) -> Bytes {
    let mut out = BytesMut::with_capacity(10 + group.len() + topic.len());
    out.put_i16(KEY_OFFSET_COMMIT);
    put_string(&mut out, group);
    put_string(&mut out, topic);
    out.put_i32(partition);
    out.freeze()
}

pub fn group_metadata_key(group: &str) -> Bytes {
    let mut out = BytesMut::with_capacity(4 + group.len());
    out.put_i16(KEY_GROUP_METADATA);
    put_string(&mut out, group);
    out.freeze()
}

impl RecordKey {
    pub fn decode(key: &[u8]) -> Result<RecordKey, RecordError> {
        let mut reader = Reader { rest: key };
        match reader.i16()? {
            KEY_OFFSET_COMMIT_LEGACY | KEY_OFFSET_COMMIT => Ok(RecordKey::Offset {
                group: reader.string()?,
                topic: reader.string()?,
                partition: reader.i32()?,
            }),
            KEY_GROUP_METADATA => Ok(RecordKey::Group { group: reader.string()? }),
            key_type => Ok(RecordKey::Other { key_type }),
        }
    }
}

impl OffsetCommitValue {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(32 + self.metadata.len());
        if self.expire_timestamp_ms >= 0 {
            out.put_i16(OFFSET_COMMIT_VALUE_VERSION_EXPIRING);
            out.put_i64(self.offset);
            put_string(&mut out, &self.metadata);
            out.put_i64(self.commit_timestamp_ms);
            out.put_i64(self.expire_timestamp_ms);
        } else if self.topic_id != 0 {
            out.put_i16(OFFSET_COMMIT_VALUE_VERSION_WITH_TOPIC_ID);
            out.put_i64(self.offset);
            out.put_i32(self.leader_epoch);
            put_compact_string(&mut out, &self.metadata);
            out.put_i64(self.commit_timestamp_ms);
            // One tagged field: the id, 16 bytes.
            out.put_slice(&[1, TAG_TOPIC_ID as u8, 16]);
            out.put_u128(self.topic_id);
        } else {
            out.put_i16(OFFSET_COMMIT_VALUE_VERSION);
            out.put_i64(self.offset);
            out.put_i32(self.leader_epoch);
            put_string(&mut out, &self.metadata);
            out.put_i64(self.commit_timestamp_ms);
        }
        out.freeze()
    }

    pub fn decode(value: &[u8]) -> Result<OffsetCommitValue, RecordError> {
        let mut reader = Reader { rest: value };
        let version = reader.version()?;
        let mut topic_id = 0;
        let offset = reader.i64()?;
        let leader_epoch = if version >= 3 { reader.i32()? } else { -1 };
        let metadata = reader.string_of(version)?;
        let commit_timestamp_ms = reader.i64()?;
        let expire_timestamp_ms = if version == 1 { reader.i64()? } else { -1 };
        if version >= FIRST_FLEXIBLE_VERSION {
            reader.tagged_fields(|tag, mut field| {
                if tag == TAG_TOPIC_ID {
                    topic_id = field.u128()?;
                }
                Ok(())
            })?;
        }
        Ok(OffsetCommitValue {
            offset,
            leader_epoch,
            metadata,
            commit_timestamp_ms,
            expire_timestamp_ms,
            topic_id,
        })
    }
}

impl GroupMetadataValue {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64 + self.members.len() * 256);
        out.put_i16(GROUP_METADATA_VALUE_VERSION);
        put_string(&mut out, &self.protocol_type);
        out.put_i32(self.generation);
        put_nullable_string(&mut out, self.protocol.as_deref());
        put_nullable_string(&mut out, self.leader.as_deref());
        out.put_i64(self.current_state_timestamp_ms);
        put_count(&mut out, self.members.len());
        for member in &self.members {
            put_string(&mut out, &member.member_id);
            put_nullable_string(&mut out, member.group_instance_id.as_deref());
            put_string(&mut out, &member.client_id);
            put_string(&mut out, &member.client_host);
            out.put_i32(member.rebalance_timeout_ms);
            out.put_i32(member.session_timeout_ms);
            put_count(&mut out, member.subscription.len());
            out.put_slice(&member.subscription);
            put_count(&mut out, member.assignment.len());
            out.put_slice(&member.assignment);
        }
        out.freeze()
    }

    pub fn decode(value: &[u8]) -> Result<GroupMetadataValue, RecordError> {
        let mut reader = Reader { rest: value };
        let version = reader.version()?;
        let protocol_type = reader.string_of(version)?;
        let generation = reader.i32()?;
        let protocol = reader.nullable_string_of(version)?;
        let leader = reader.nullable_string_of(version)?;
        let current_state_timestamp_ms = if version >= 2 { reader.i64()? } else { -1 };
        let count = reader.array_len_of(version)?;
        let mut members = Vec::with_capacity(count.min(reader.rest.len() / MIN_MEMBER_BYTES));
        for _ in 0..count {
            members.push(MemberValue::decode(&mut reader, version)?);
        }
        if version >= FIRST_FLEXIBLE_VERSION {
            reader.tagged_fields(|_, _| Ok(()))?;
        }
        Ok(GroupMetadataValue {
            protocol_type,
            generation,
            protocol,
            leader,
            current_state_timestamp_ms,
            members,
        })
    }
}

impl MemberValue {
    fn decode(reader: &mut Reader<'_>, version: i16) -> Result<MemberValue, RecordError> {
        let member_id = reader.string_of(version)?;
        let group_instance_id = if version >= 3 { reader.nullable_string_of(version)? } else { None };
        let client_id = reader.string_of(version)?;
        let client_host = reader.string_of(version)?;
        let rebalance_timeout_ms = if version >= 1 { Some(reader.i32()?) } else { None };
        let session_timeout_ms = reader.i32()?;
        let subscription = reader.bytes_of(version)?;
        let assignment = reader.bytes_of(version)?;
        if version >= FIRST_FLEXIBLE_VERSION {
            reader.tagged_fields(|_, _| Ok(()))?;
        }
        Ok(MemberValue {
            member_id,
            group_instance_id,
            client_id,
            client_host,
            // Version 0 knew one timeout for both.
            rebalance_timeout_ms: rebalance_timeout_ms.unwrap_or(session_timeout_ms),
            session_timeout_ms,
            subscription,
            assignment,
        })
    }
}

fn put_string(out: &mut BytesMut, text: &str) {
    assert!(text.len() <= MAX_STRING_BYTES, "strings are bounded when the request comes in");
    out.put_i16(text.len() as i16);
    out.put_slice(text.as_bytes());
}

fn put_compact_string(out: &mut BytesMut, text: &str) {
    assert!(text.len() <= MAX_STRING_BYTES, "strings are bounded when the request comes in");
    let mut length = text.len() + 1;
    while length >= 0x80 {
        out.put_u8(length as u8 | 0x80);
        length >>= 7;
    }
    out.put_u8(length as u8);
    out.put_slice(text.as_bytes());
}

fn put_nullable_string(out: &mut BytesMut, text: Option<&str>) {
    match text {
        Some(text) => put_string(out, text),
        None => out.put_i16(-1),
    }
}

fn put_count(out: &mut BytesMut, count: usize) {
    out.put_i32(i32::try_from(count).expect("requests are smaller than 2 GiB"));
}

/// Reads the fields of keys, values and embedded protocols.
pub(crate) struct Reader<'a> {
    pub(crate) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], RecordError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn i16(&mut self) -> Result<i16, RecordError> {
        self.array().map(i16::from_be_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, RecordError> {
        self.array().map(i32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, RecordError> {
        self.array().map(i64::from_be_bytes)
    }

    fn u128(&mut self) -> Result<u128, RecordError> {
        self.array().map(u128::from_be_bytes)
    }

    fn version(&mut self) -> Result<i16, RecordError> {
        match self.i16()? {
            version @ 0..=NEWEST_VALUE_VERSION => Ok(version),
            version => Err(RecordError::UnknownVersion(version)),
        }
    }

    fn varint(&mut self) -> Result<u32, RecordError> {
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| RecordError::BadLength(value as i64));
            }
        }
        Err(RecordError::BadLength(value as i64))
    }

    /// The length of a compact field: what is written is one more, and zero is null.
    fn compact_len(&mut self) -> Result<Option<usize>, RecordError> {
        Ok(self.varint()?.checked_sub(1).map(|len| len as usize))
    }

    fn text(&mut self, len: usize) -> Result<String, RecordError> {
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| RecordError::NotUtf8)
    }

    fn short_len(&mut self) -> Result<Option<usize>, RecordError> {
        match self.i16()? {
            -1 => Ok(None),
            len => usize::try_from(len).map(Some).map_err(|_| RecordError::BadLength(len.into())),
        }
    }

    fn nullable_string_of(&mut self, version: i16) -> Result<Option<String>, RecordError> {
        let len = if version >= FIRST_FLEXIBLE_VERSION { self.compact_len()? } else { self.short_len()? };
        len.map(|len| self.text(len)).transpose()
    }

    fn string_of(&mut self, version: i16) -> Result<String, RecordError> {
        self.nullable_string_of(version)?.ok_or(RecordError::BadLength(-1))
    }

    pub(crate) fn string(&mut self) -> Result<String, RecordError> {
        self.string_of(0)
    }

    /// Length of an array or of bytes.
    fn array_len_of(&mut self, version: i16) -> Result<usize, RecordError> {
        if version >= FIRST_FLEXIBLE_VERSION {
            self.compact_len()?.ok_or(RecordError::BadLength(-1))
        } else {
            let len = self.i32()?;
            usize::try_from(len).map_err(|_| RecordError::BadLength(len.into()))
        }
    }

    fn bytes_of(&mut self, version: i16) -> Result<Bytes, RecordError> {
        let len = self.array_len_of(version)?;
        self.take(len).map(Bytes::copy_from_slice)
    }

    fn tagged_fields(
        &mut self,
        mut field: impl FnMut(u32, Reader<'a>) -> Result<(), RecordError>,
    ) -> Result<(), RecordError> {
        for _ in 0..self.varint()? {
            let tag = self.varint()?;
            let len = self.varint()? as usize;
            let rest = self.take(len)?;
            field(tag, Reader { rest })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The hexadecimal vectors are what Kafka 4.3.1's own message classes write for these values.

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn offset_value() -> OffsetCommitValue {
        OffsetCommitValue {
            offset: 42,
            leader_epoch: 5,
            metadata: "mé".to_owned(),
            commit_timestamp_ms: 1000,
            expire_timestamp_ms: -1,
            topic_id: 0,
        }
    }

    fn group_value() -> GroupMetadataValue {
        GroupMetadataValue {
            protocol_type: "consumer".to_owned(),
            generation: 3,
            protocol: Some("range".to_owned()),
            leader: Some("m-1".to_owned()),
            current_state_timestamp_ms: 99,
            members: vec![MemberValue {
                member_id: "m-1".to_owned(),
                group_instance_id: Some("i".to_owned()),
                client_id: "c".to_owned(),
                client_host: "/h".to_owned(),
                rebalance_timeout_ms: 60_000,
                session_timeout_ms: 30_000,
                subscription: Bytes::from_static(&[1, 2]),
                assignment: Bytes::from_static(&[3]),
            }],
        }
    }

    const OFFSET_VALUES: [&str; 5] = [
        "0000000000000000002a00036dc3a900000000000003e8",
        "0001000000000000002a00036dc3a900000000000003e800000000000007d0",
        "0002000000000000002a00036dc3a900000000000003e8",
        "0003000000000000002a0000000500036dc3a900000000000003e8",
        "0004000000000000002a00000005046dc3a900000000000003e801001000000000000000010000000000000002",
    ];

    const GROUP_VALUES: [&str; 5] = [
        "00000008636f6e73756d657200000003000572616e676500036d2d310000000100036d2d3100016300022f68000075300000000201\
         020000000103",
        "00010008636f6e73756d657200000003000572616e676500036d2d310000000100036d2d3100016300022f680000ea600000753000\
         00000201020000000103",
        "00020008636f6e73756d657200000003000572616e676500036d2d3100000000000000630000000100036d2d3100016300022f6800\
         00ea60000075300000000201020000000103",
        "00030008636f6e73756d657200000003000572616e676500036d2d3100000000000000630000000100036d2d310001690001630002\
         2f680000ea60000075300000000201020000000103",
        "000409636f6e73756d6572000000030672616e6765046d2d31000000000000006302046d2d3102690263032f680000ea6000007530\
         03010202030000",
    ];

    #[test]
    fn keys() {
        let offset = offset_commit_key("grp", "tpc", 7);
        assert_eq!(offset, bytes("00010003677270000374706300000007"));
        let decoded = RecordKey::Offset { group: "grp".to_owned(), topic: "tpc".to_owned(), partition: 7 };
        assert_eq!(RecordKey::decode(&offset), Ok(decoded));
        let group = group_metadata_key("grp");
        assert_eq!(group, bytes("00020003677270"));
        assert_eq!(RecordKey::decode(&group), Ok(RecordKey::Group { group: "grp".to_owned() }));
        assert_eq!(RecordKey::decode(&[0, 3, 9]), Ok(RecordKey::Other { key_type: 3 }));
    }

    #[test]
    fn offset_values() {
        assert_eq!(offset_value().encode(), bytes(OFFSET_VALUES[3]));
        let expiring = OffsetCommitValue { expire_timestamp_ms: 2000, ..offset_value() };
        assert_eq!(expiring.encode(), bytes(OFFSET_VALUES[1]));
        let identified = OffsetCommitValue { topic_id: 1 << 64 | 2, ..offset_value() };
        assert_eq!(identified.encode(), bytes(OFFSET_VALUES[4]));
        let long = OffsetCommitValue { metadata: "m".repeat(MAX_STRING_BYTES), ..identified };
        assert_eq!(OffsetCommitValue::decode(&long.encode()), Ok(long));
        for (version, hex) in OFFSET_VALUES.iter().enumerate() {
            let expected = OffsetCommitValue {
                leader_epoch: if version >= 3 { 5 } else { -1 },
                expire_timestamp_ms: if version == 1 { 2000 } else { -1 },
                topic_id: if version == 4 { 1 << 64 | 2 } else { 0 },
                ..offset_value()
            };
            assert_eq!(OffsetCommitValue::decode(&bytes(hex)), Ok(expected), "version {version}");
        }
    }

    #[test]
    fn group_values() {
        assert_eq!(group_value().encode(), bytes(GROUP_VALUES[3]));
        for (version, hex) in GROUP_VALUES.iter().enumerate() {
            let mut expected = group_value();
            if version < 1 {
                expected.members[0].rebalance_timeout_ms = 30_000;
            }
            if version < 2 {
                expected.current_state_timestamp_ms = -1;
            }
            if version < 3 {
                expected.members[0].group_instance_id = None;
            }
            assert_eq!(GroupMetadataValue::decode(&bytes(hex)), Ok(expected), "version {version}");
        }
        let empty = GroupMetadataValue {
            generation: 1,
            current_state_timestamp_ms: -1,
            ..GroupMetadataValue::default()
        };
        assert_eq!(empty.encode(), bytes("0003000000000001ffffffffffffffffffffffff00000000"));
        assert_eq!(GroupMetadataValue::decode(&empty.encode()), Ok(empty));
    }

    #[test]
    fn every_cut_is_an_error() {
        for hex in OFFSET_VALUES {
            let whole = bytes(hex);
            for len in 0..whole.len() {
                assert!(OffsetCommitValue::decode(&whole[..len]).is_err());
            }
        }
        for hex in GROUP_VALUES {
            let whole = bytes(hex);
            for len in 0..whole.len() {
                assert!(GroupMetadataValue::decode(&whole[..len]).is_err());
            }
        }
        assert_eq!(OffsetCommitValue::decode(&[0, 5]), Err(RecordError::UnknownVersion(5)));
        assert_eq!(OffsetCommitValue::decode(&[255, 255]), Err(RecordError::UnknownVersion(-1)));
    }

    proptest::proptest! {
        #[test]
        fn rubbish_never_panics(version in 0u8..6, mut rest: Vec<u8>) {
            rest.splice(0..0, [0, version]);
            let _ = RecordKey::decode(&rest);
            let _ = OffsetCommitValue::decode(&rest);
            let _ = GroupMetadataValue::decode(&rest);
        }
    }
}
