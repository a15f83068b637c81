//! Fetch responses, written by hand because they are on the hot path.
//!
//! A response leaves as a list of segments for one vectored write: small pieces of framing, all slices of one
//! buffer, between the record slices the log or its cache handed out. Record bytes are never copied.
//! Fetch requests are decoded by `kafka-protocol`, after the guard.

use bytes::{BufMut, Bytes, BytesMut};

use crate::api;
use crate::error_code::ErrorCode;
use crate::header::put_response_header;
pub use crate::produce::NodeEndpoint;
use crate::produce::{TopicRef, put_endpoints, put_leader, put_topic, topic_bytes};
use crate::wire;

/// Fetch responses below this version may not carry zstd (answer `UNSUPPORTED_COMPRESSION_TYPE`).
pub const ZSTD_MIN_VERSION: i16 = 10;

#[derive(Debug, Clone)]
pub struct FetchPartitionData {
    pub partition: i32,
    pub error: ErrorCode,
    pub high_watermark: i64,
    pub last_stable_offset: i64,
    pub log_start_offset: i64,
    /// Producer id and first offset of aborted transactions in the range, for read_committed; `None` is sent as null.
    pub aborted: Option<Vec<(i64, i64)>>,
    pub preferred_read_replica: i32,
    /// Leader id and epoch, when the client asked the wrong broker.
    pub current_leader: Option<(i32, i32)>,
    /// Epoch and end offset at which the fetcher's log departs from ours.
    pub diverging_epoch: Option<(i32, i64)>,
    /// Whole batches, in order; several slices are sent as one run of bytes.
    pub records: Vec<Bytes>,
}

impl FetchPartitionData {
    pub fn failed(partition: i32, error: ErrorCode) -> Self {
        Self {
            partition,
            error,
            high_watermark: -1,
            last_stable_offset: -1,
            log_start_offset: -1,
            aborted: None,
            preferred_read_replica: -1,
            current_leader: None,
            diverging_epoch: None,
            records: Vec::new(),
        }
    }

    fn records_bytes(&self) -> usize {
        self.records.iter().map(Bytes::len).sum()
    }
}

#[derive(Debug, Clone)]
pub struct FetchTopicData {
    pub topic: TopicRef,
    pub partitions: Vec<FetchPartitionData>,
}

/// Segments of a whole response, the first of which starts with the length prefix. No segment is empty.
pub fn encode_fetch_response(
    version: i16,
    correlation_id: i32,
    throttle_ms: i32,
    error: ErrorCode,
    session_id: i32,
    topics: &[FetchTopicData],
) -> Vec<Bytes> {
    encode_fetch_response_with_endpoints(version, correlation_id, throttle_ms, error, session_id, topics, &[])
}

/// As [`encode_fetch_response`], with the endpoints of the leaders named in it (sent from version 16).
pub fn encode_fetch_response_with_endpoints(
    version: i16,
    correlation_id: i32,
    throttle_ms: i32,
    error: ErrorCode,
    session_id: i32,
    topics: &[FetchTopicData],
    endpoints: &[NodeEndpoint],
) -> Vec<Bytes> {
    let flexible = version >= 12;
    let size = size_of_parts(topics);
    let mut framing = BytesMut::with_capacity(size.framing_bytes);
    // Where in the framing each partition's records go.
    let mut cuts: Vec<usize> = Vec::with_capacity(size.partitions_with_records);
    framing.put_u32(0);
    put_response_header(&mut framing, api::FETCH, version, correlation_id);
    framing.put_i32(throttle_ms);
    if version >= 7 {
        framing.put_i16(error.0);
        framing.put_i32(session_id);
    }
    wire::put_count(&mut framing, topics.len(), flexible);
    for topic in topics {
        put_topic(&mut framing, &topic.topic, version >= 13, flexible);
        wire::put_count(&mut framing, topic.partitions.len(), flexible);
        for partition in &topic.partitions {
            if put_partition_before_records(&mut framing, partition, version) {
                cuts.push(framing.len());
            }
            if flexible {
                put_partition_tags(&mut framing, partition);
            }
        }
        if flexible {
            framing.put_u8(0);
        }
    }
    if flexible {
        put_endpoints(&mut framing, if version >= 16 { endpoints } else { &[] });
    }
    let total = framing.len() - 4 + size.records_bytes;
    let prefix = i32::try_from(total).expect("a response of more than 2 GiB");
    framing[..4].copy_from_slice(&prefix.to_be_bytes());
    splice(framing.freeze(), &cuts, topics, size.record_slices)
}

/// Puts the record slices between the pieces of framing. `cuts` holds one position per partition with records.
fn splice(framing: Bytes, cuts: &[usize], topics: &[FetchTopicData], record_slices: usize) -> Vec<Bytes> {
    let mut segments = Vec::with_capacity(record_slices + cuts.len() + 1);
    let mut from = 0;
    let with_records =
        topics.iter().flat_map(|topic| &topic.partitions).filter(|part| part.records_bytes() > 0);
    for (partition, &cut) in with_records.zip(cuts) {
        segments.push(framing.slice(from..cut));
        segments.extend(partition.records.iter().filter(|slice| !slice.is_empty()).cloned());
        from = cut;
    }
    if from < framing.len() {
        segments.push(framing.slice(from..));
    }
    segments
}

/// Returns whether records follow.
fn put_partition_before_records(buf: &mut BytesMut, partition: &FetchPartitionData, version: i16) -> bool {
    let flexible = version >= 12;
    buf.put_i32(partition.partition);
    buf.put_i16(partition.error.0);
    buf.put_i64(partition.high_watermark);
    buf.put_i64(partition.last_stable_offset);
    if version >= 5 {
        buf.put_i64(partition.log_start_offset);
    }
    match &partition.aborted {
        None if flexible => buf.put_u8(0),
        None => buf.put_i32(-1),
        Some(aborted) => {
            wire::put_count(buf, aborted.len(), flexible);
            for &(producer_id, first_offset) in aborted {
                buf.put_i64(producer_id);
                buf.put_i64(first_offset);
                if flexible {
                    buf.put_u8(0);
                }
            }
        }
    }
    if version >= 11 {
        buf.put_i32(partition.preferred_read_replica);
    }
    let records_bytes = partition.records_bytes();
    // Empty rather than null: some clients fail on null records even beside an error code.
    wire::put_count(buf, records_bytes, flexible);
    records_bytes > 0
}

fn put_partition_tags(buf: &mut BytesMut, partition: &FetchPartitionData) {
    let tags = u8::from(partition.diverging_epoch.is_some()) + u8::from(partition.current_leader.is_some());
    buf.put_u8(tags);
    if let Some((epoch, end_offset)) = partition.diverging_epoch {
        buf.put_slice(&[0, 13]);
        buf.put_i32(epoch);
        buf.put_i64(end_offset);
        buf.put_u8(0);
    }
    if let Some((leader_id, leader_epoch)) = partition.current_leader {
        put_leader(buf, 1, leader_id, leader_epoch);
    }
}

struct Parts {
    /// An upper bound, so that the framing is allocated once.
    framing_bytes: usize,
    records_bytes: usize,
    record_slices: usize,
    partitions_with_records: usize,
}

fn size_of_parts(topics: &[FetchTopicData]) -> Parts {
    // Largest fixed parts: response 40, topic 8 besides its name, partition 43 and 27 of tags, abort 17.
    let mut parts =
        Parts { framing_bytes: 40, records_bytes: 0, record_slices: 0, partitions_with_records: 0 };
    for topic in topics {
        parts.framing_bytes += 8 + topic_bytes(&topic.topic);
        for partition in &topic.partitions {
            parts.framing_bytes += 72 + 17 * partition.aborted.as_ref().map_or(0, Vec::len);
            let bytes = partition.records_bytes();
            parts.records_bytes += bytes;
            parts.record_slices += partition.records.len();
            parts.partitions_with_records += usize::from(bytes > 0);
        }
    }
    parts
}
