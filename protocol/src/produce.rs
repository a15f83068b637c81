//! Produce requests and responses, written by hand because they are on the hot path.
//!
//! A decoded request owns disjoint mutable slices of its own frame: no record byte is copied, and the log can stamp
//! base offset and leader epoch in place. Decoding costs no work per record and allocates nothing but the two vectors
//! and the topic names. Counts are checked against what remains before anything is reserved.
//! Batches are not validated here; that is `record_batch::validate_produced`.

use bytes::{Buf, BufMut, BytesMut};

use crate::api;
use crate::error_code::ErrorCode;
use crate::header::put_response_header;
use crate::wire::{self, Reader, WireError};

/// Produce requests below this version may not carry zstd (answer `UNSUPPORTED_COMPRESSION_TYPE`).
pub const ZSTD_MIN_VERSION: i16 = 7;

/// How a request names a topic: by name up to version 12, by id from version 13.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TopicRef {
    Name(Box<str>),
    Id(uuid::Uuid),
}

#[derive(Debug, PartialEq, Eq)]
pub struct ProduceRequest {
    pub transactional_id: Option<Box<str>>,
    pub acks: i16,
    pub timeout_ms: i32,
    pub topics: Vec<TopicRef>,
    /// In request order, so sorted by topic.
    pub partitions: Vec<ProducePartition>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct ProducePartition {
    /// Index into the request's topics.
    pub topic: u32,
    pub partition: i32,
    /// This partition's part of the frame; empty when the request carried null.
    pub records: BytesMut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("version {0} of Produce is not served")]
    UnsupportedVersion(i16),
    #[error("a field reaches past the end of the frame")]
    Truncated,
    #[error("a length or count is malformed")]
    BadLength,
    #[error("a string is not UTF-8")]
    NotUtf8,
    #[error("a field that may not be null is null")]
    UnexpectedNull,
}

impl From<WireError> for DecodeError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Truncated => Self::Truncated,
            WireError::BadLength => Self::BadLength,
        }
    }
}

/// The frame, from whose front records are split off. Fields are read at a position that runs ahead, so that the buffer
/// itself is moved once per partition and not once per field.
struct Frame {
    bytes: BytesMut,
    position: usize,
}

impl Frame {
    #[inline]
    fn read<T>(
        &mut self,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, DecodeError> {
        let mut reader = Reader::new(&self.bytes[self.position..]);
        let value = read(&mut reader)?;
        self.position = self.bytes.len() - reader.remaining();
        Ok(value)
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// Splits off the next `length` bytes, which the caller has seen to be there.
    #[inline]
    fn split(&mut self, length: usize) -> BytesMut {
        // An empty split would still take a reference to the frame.
        if length == 0 {
            return BytesMut::new();
        }
        self.bytes.advance(self.position);
        self.position = 0;
        self.bytes.split_to(length)
    }
}

fn utf8(bytes: &[u8]) -> Result<Box<str>, DecodeError> {
    std::str::from_utf8(bytes).map(Box::from).map_err(|_| DecodeError::NotUtf8)
}

/// Decodes the body that starts at `body_offset` of a whole frame (no length prefix).
pub fn decode_produce(
    frame: BytesMut,
    body_offset: usize,
    version: i16,
) -> Result<ProduceRequest, DecodeError> {
    if !api::supports(api::PRODUCE, version) {
        return Err(DecodeError::UnsupportedVersion(version));
    }
    if body_offset > frame.len() {
        return Err(DecodeError::Truncated);
    }
    let mut frame = Frame { bytes: frame, position: body_offset };
    let flexible = version >= 9;
    let by_id = version >= 13;
    // The smallest encodings: name or id, array count, tagged fields; and index, records length, tagged fields.
    let topic_bytes_min = match (by_id, flexible) {
        (true, _) => 18,
        (false, true) => 3,
        (false, false) => 6,
    };
    let partition_bytes_min = if flexible { 6 } else { 8 };

    let (transactional_id, acks, timeout_ms, topic_count) = frame.read(|reader| {
        let transactional_id = reader.nullable_string(flexible)?.map(utf8).transpose()?;
        let acks = reader.i16()?;
        let timeout_ms = reader.i32()?;
        let topics = reader.nullable_count(flexible, topic_bytes_min)?.ok_or(DecodeError::UnexpectedNull)?;
        Ok((transactional_id, acks, timeout_ms, topics))
    })?;
    let mut topics = Vec::with_capacity(topic_count);
    let mut partitions: Vec<ProducePartition> = Vec::new();
    for topic_index in 0..topic_count {
        let (topic, partition_count) = frame.read(|reader| {
            let topic = if by_id {
                TopicRef::Id(reader.uuid()?)
            } else {
                let name = reader.nullable_string(flexible)?.ok_or(DecodeError::UnexpectedNull)?;
                TopicRef::Name(utf8(name)?)
            };
            let count =
                reader.nullable_count(flexible, partition_bytes_min)?.ok_or(DecodeError::UnexpectedNull)?;
            Ok((topic, count))
        })?;
        topics.push(topic);
        reserve_bounded(&mut partitions, partition_count, frame.remaining() / partition_bytes_min);
        for _ in 0..partition_count {
            let (partition, length) = frame.read(|reader| {
                let partition = reader.i32()?;
                Ok((partition, reader.nullable_bytes_length(flexible)?.unwrap_or(0)))
            })?;
            let records = frame.split(length);
            partitions.push(ProducePartition { topic: topic_index as u32, partition, records });
            if flexible {
                frame.read(|reader| Ok(reader.skip_tagged_fields()?))?;
            }
        }
        if flexible {
            frame.read(|reader| Ok(reader.skip_tagged_fields()?))?;
        }
    }
    if flexible {
        frame.read(|reader| Ok(reader.skip_tagged_fields()?))?;
    }
    Ok(ProduceRequest { transactional_id, acks, timeout_ms, topics, partitions })
}

/// Reserves for `more` partitions: exactly for the first topic, doubling after it, but never beyond what the rest of
/// the frame can hold, so that many tiny topics cannot turn doubling into an amplifier.
fn reserve_bounded(partitions: &mut Vec<ProducePartition>, more: usize, possible: usize) {
    if partitions.capacity() - partitions.len() < more {
        let doubled = partitions.len().min(possible);
        partitions.reserve_exact(more.max(doubled));
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProducePartitionResult {
    /// Index into the response's topics.
    pub topic: u32,
    pub partition: i32,
    pub error: ErrorCode,
    pub base_offset: i64,
    /// -1 unless the topic stamps the broker's time.
    pub log_append_time_ms: i64,
    pub log_start_offset: i64,
    pub error_message: Option<Box<str>>,
    /// The records to blame, where the batch was refused for some of them: a client then tells their senders from
    /// those whose records merely shared the batch. Sent from version 8.
    pub record_errors: Box<[RecordError]>,
    /// Leader id and epoch, sent from version 10 when the client asked the wrong broker.
    pub current_leader: Option<(i32, i32)>,
}

/// One record for which its batch was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordError {
    /// Place of the record in its batch, from 0.
    pub batch_index: i32,
    pub message: &'static str,
}

impl ProducePartitionResult {
    pub fn failed(topic: u32, partition: i32, error: ErrorCode) -> Self {
        Self {
            topic,
            partition,
            error,
            base_offset: -1,
            log_append_time_ms: -1,
            log_start_offset: -1,
            error_message: None,
            record_errors: Box::default(),
            current_leader: None,
        }
    }
}

/// Where a leader named in `current_leader` listens; saves the client a Metadata round trip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEndpoint {
    pub node_id: i32,
    pub host: Box<str>,
    pub port: i32,
    pub rack: Option<Box<str>>,
}

/// A whole response with length prefix and header. `results` is sorted by topic; topics without results are left out.
pub fn encode_produce_response(
    version: i16,
    correlation_id: i32,
    topics: &[TopicRef],
    results: &[ProducePartitionResult],
    throttle_ms: i32,
) -> BytesMut {
    encode_produce_response_with_endpoints(version, correlation_id, topics, results, throttle_ms, &[])
}

/// As [`encode_produce_response`], with the endpoints of the leaders named in it (sent from version 10).
pub fn encode_produce_response_with_endpoints(
    version: i16,
    correlation_id: i32,
    topics: &[TopicRef],
    results: &[ProducePartitionResult],
    throttle_ms: i32,
    endpoints: &[NodeEndpoint],
) -> BytesMut {
    debug_assert!(results.is_sorted_by_key(|result| result.topic));
    let flexible = version >= 9;
    let mut buf = BytesMut::with_capacity(response_bytes_hint(topics, results));
    buf.put_u32(0);
    put_response_header(&mut buf, api::PRODUCE, version, correlation_id);
    let groups = || results.chunk_by(|a, b| a.topic == b.topic);
    wire::put_count(&mut buf, groups().count(), flexible);
    for group in groups() {
        put_topic(&mut buf, &topics[group[0].topic as usize], version >= 13, flexible);
        wire::put_count(&mut buf, group.len(), flexible);
        for result in group {
            put_result(&mut buf, result, version);
        }
        if flexible {
            buf.put_u8(0);
        }
    }
    if version >= 1 {
        buf.put_i32(throttle_ms);
    }
    if flexible {
        put_endpoints(&mut buf, if version >= 10 { endpoints } else { &[] });
    }
    set_length_prefix(&mut buf);
    buf
}

fn put_result(buf: &mut BytesMut, result: &ProducePartitionResult, version: i16) {
    let flexible = version >= 9;
    buf.put_i32(result.partition);
    buf.put_i16(result.error.0);
    buf.put_i64(result.base_offset);
    if version >= 2 {
        buf.put_i64(result.log_append_time_ms);
    }
    if version >= 5 {
        buf.put_i64(result.log_start_offset);
    }
    if version >= 8 {
        wire::put_count(buf, result.record_errors.len(), flexible);
        for error in &result.record_errors {
            buf.put_i32(error.batch_index);
            wire::put_nullable_string(buf, Some(error.message), flexible);
            if flexible {
                buf.put_u8(0);
            }
        }
        wire::put_nullable_string(buf, result.error_message.as_deref(), flexible);
    }
    if flexible {
        match result.current_leader {
            Some((leader_id, leader_epoch)) if version >= 10 => {
                buf.put_u8(1);
                put_leader(buf, 0, leader_id, leader_epoch);
            }
            _ => buf.put_u8(0),
        }
    }
}

/// A tagged `LeaderIdAndEpoch`: tag, size, two integers, no tags of its own.
pub(crate) fn put_leader(buf: &mut BytesMut, tag: u8, leader_id: i32, leader_epoch: i32) {
    buf.put_slice(&[tag, 9]);
    buf.put_i32(leader_id);
    buf.put_i32(leader_epoch);
    buf.put_u8(0);
}

pub(crate) fn put_topic(buf: &mut BytesMut, topic: &TopicRef, by_id: bool, flexible: bool) {
    match (topic, by_id) {
        (TopicRef::Id(id), true) => buf.put_slice(id.as_bytes()),
        (TopicRef::Name(name), false) => wire::put_string(buf, name, flexible),
        // A response names topics as its request did; were that broken, the client would see an unknown topic.
        (TopicRef::Name(_), true) => buf.put_slice(uuid::Uuid::nil().as_bytes()),
        (TopicRef::Id(_), false) => wire::put_string(buf, "", flexible),
    }
}

/// The tagged fields that end a Produce or Fetch response: node endpoints under tag 0, when there are any.
pub(crate) fn put_endpoints(buf: &mut BytesMut, endpoints: &[NodeEndpoint]) {
    if endpoints.is_empty() {
        buf.put_u8(0);
        return;
    }
    let mut field = BytesMut::new();
    wire::put_count(&mut field, endpoints.len(), true);
    for endpoint in endpoints {
        field.put_i32(endpoint.node_id);
        wire::put_string(&mut field, &endpoint.host, true);
        field.put_i32(endpoint.port);
        wire::put_nullable_string(&mut field, endpoint.rack.as_deref(), true);
        field.put_u8(0);
    }
    buf.put_slice(&[1, 0]);
    wire::put_uvarint(buf, field.len() as u32);
    buf.put_slice(&field);
}

fn set_length_prefix(buf: &mut BytesMut) {
    let length = i32::try_from(buf.len() - 4).expect("a response of more than 2 GiB");
    buf[..4].copy_from_slice(&length.to_be_bytes());
}

fn response_bytes_hint(topics: &[TopicRef], results: &[ProducePartitionResult]) -> usize {
    // The largest fixed parts: a partition takes 54 bytes with its leader, a topic 8 besides its name.
    let names: usize = topics.iter().map(|topic| topic_bytes(topic) + 8).sum();
    let messages: usize =
        results.iter().filter_map(|result| result.error_message.as_deref()).map(str::len).sum();
    32 + names + messages + results.len() * 54
}

pub(crate) fn topic_bytes(topic: &TopicRef) -> usize {
    match topic {
        TopicRef::Name(name) => name.len(),
        TopicRef::Id(_) => 16,
    }
}
