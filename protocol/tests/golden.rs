//! The hand-written codecs against `kafka-protocol`: every version, both directions.

mod support;

use bytes::{BufMut, Bytes, BytesMut};
use flumen_protocol::api;
use flumen_protocol::compression::{self, Compression};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::fetch::{
    FetchPartitionData, FetchTopicData, encode_fetch_response, encode_fetch_response_with_endpoints,
};
use flumen_protocol::header::{parse_request_header, put_response_header};
use flumen_protocol::produce::{
    NodeEndpoint, ProducePartitionResult, RecordError, TopicRef, decode_produce, encode_produce_response,
    encode_produce_response_with_endpoints,
};
use flumen_protocol::record::{BatchBuilder, decode_records};
use flumen_protocol::record_batch;
use kafka_protocol::messages::{self as km, BrokerId, ProducerId, RequestHeader, TopicName, TransactionalId};
use kafka_protocol::protocol::{Decodable, Encodable, encode_request_header_into_buffer};
use kafka_protocol::records as kr;
use support::s;
use uuid::Uuid;

const CORRELATION_ID: i32 = 4242;

fn topic_ref(version: i16, by_id_from: i16, n: u8) -> TopicRef {
    if version >= by_id_from {
        TopicRef::Id(Uuid::from_u128(1000 + u128::from(n)))
    } else {
        TopicRef::Name(format!("topic-{n}").into())
    }
}

#[test]
fn produce_requests_decode_as_the_crate_wrote_them() {
    use km::produce_request::{PartitionProduceData, TopicProduceData};
    for version in 3..=13 {
        for topics in 0..3u8 {
            for partitions in 0..4i32 {
                let tag = Bytes::from_static(b"tag");
                let mut request = km::ProduceRequest::default()
                    .with_transactional_id((topics == 1).then(|| TransactionalId(s("tx"))))
                    .with_acks(-1)
                    .with_timeout_ms(1500)
                    .with_unknown_tagged_field(9, tag.clone());
                for topic in 0..topics {
                    let data = (0..partitions).map(|index| {
                        let records =
                            (index != 1).then(|| Bytes::from(vec![index as u8; 10 * index as usize]));
                        PartitionProduceData::default()
                            .with_index(index)
                            .with_records(records)
                            .with_unknown_tagged_field(9, tag.clone())
                    });
                    let mut entry = TopicProduceData::default()
                        .with_partition_data(data.collect())
                        .with_unknown_tagged_field(9, tag.clone());
                    match topic_ref(version, 13, topic) {
                        TopicRef::Name(name) => entry = entry.with_name(TopicName(s(&name))),
                        TopicRef::Id(id) => entry = entry.with_topic_id(id),
                    }
                    request.topic_data.push(entry);
                }
                let mut frame = BytesMut::new();
                let head = RequestHeader::default()
                    .with_request_api_key(0)
                    .with_request_api_version(version)
                    .with_correlation_id(CORRELATION_ID)
                    .with_client_id(Some(s("tester")));
                encode_request_header_into_buffer(&mut frame, &head).expect("header");
                request.encode(&mut frame, version).expect("body");

                let parsed = parse_request_header(&frame).expect("header");
                assert_eq!(parsed.client_id.as_deref(), Some("tester"));
                let decoded = decode_produce(frame, parsed.body_offset, version).expect("body");
                let expected_tx = request.transactional_id.as_ref().map(|id| id.0.as_str());
                assert_eq!(decoded.transactional_id.as_deref(), expected_tx);
                assert_eq!((decoded.acks, decoded.timeout_ms), (-1, 1500));
                let expected: Vec<TopicRef> = (0..topics).map(|n| topic_ref(version, 13, n)).collect();
                assert_eq!(decoded.topics, expected);
                let mut got = decoded.partitions.iter();
                for (index, topic) in request.topic_data.iter().enumerate() {
                    for partition in &topic.partition_data {
                        let ours = got.next().expect("as many partitions");
                        assert_eq!((ours.topic as usize, ours.partition), (index, partition.index));
                        assert_eq!(&ours.records[..], partition.records.as_deref().unwrap_or_default());
                    }
                }
                assert!(got.next().is_none());
            }
        }
    }
}

#[test]
fn produce_records_are_slices_of_the_frame() {
    use km::produce_request::{PartitionProduceData, TopicProduceData};
    let data =
        [7u8, 8].map(|fill| PartitionProduceData::default().with_records(Some(vec![fill; 500].into())));
    let topic = TopicProduceData::default().with_name(TopicName(s("t"))).with_partition_data(data.to_vec());
    let mut frame = BytesMut::new();
    km::ProduceRequest::default().with_topic_data(vec![topic]).encode(&mut frame, 9).expect("body");
    let range = frame.as_ptr_range();
    let mut decoded = decode_produce(frame, 0, 9).expect("body");
    for partition in &mut decoded.partitions {
        assert!(range.contains(&partition.records.as_ptr()));
        record_batch::set_base_offset(&mut partition.records, -1);
    }
    assert_eq!(decoded.partitions[0].records[8..], [7; 492]);
    assert_eq!(decoded.partitions[1].records[8..], [8; 492]);
}

fn produce_results() -> Vec<ProducePartitionResult> {
    let good = ProducePartitionResult {
        topic: 0,
        partition: 3,
        error: ErrorCode::NONE,
        base_offset: 1 << 40,
        log_append_time_ms: 1_700_000_000_000,
        log_start_offset: 17,
        error_message: None,
        record_errors: Box::default(),
        current_leader: None,
    };
    let mut moved = ProducePartitionResult::failed(0, 4, ErrorCode::NOT_LEADER_OR_FOLLOWER);
    moved.current_leader = Some((2, 9));
    moved.error_message = Some("moved".into());
    moved.record_errors =
        [0, 7].map(|batch_index| RecordError { batch_index, message: "no key" }).into_iter().collect();
    let other = ProducePartitionResult { topic: 2, partition: 0, ..good.clone() };
    vec![good, moved, other]
}

fn endpoints() -> Vec<NodeEndpoint> {
    let endpoint = |node_id, rack: Option<&str>| NodeEndpoint {
        node_id,
        host: "host".into(),
        port: 9092,
        rack: rack.map(Into::into),
    };
    vec![endpoint(1, None), endpoint(2, Some("rack"))]
}

fn with_prefix_and_header(key: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_u32(0);
    put_response_header(&mut out, key, version, CORRELATION_ID);
    out.put_slice(body);
    let length = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out.to_vec()
}

#[test]
fn produce_responses_are_byte_identical() {
    use km::produce_response as pr;
    for version in 3..=13 {
        let topics: Vec<TopicRef> = (0..3).map(|n| topic_ref(version, 13, n)).collect();
        let results = produce_results();
        for endpoints in [vec![], endpoints()] {
            let mut responses: Vec<pr::TopicProduceResponse> = Vec::new();
            for group in results.chunk_by(|a, b| a.topic == b.topic) {
                let partitions = group.iter().map(|result| {
                    let mut partition = pr::PartitionProduceResponse::default()
                        .with_index(result.partition)
                        .with_error_code(result.error.0)
                        .with_base_offset(result.base_offset)
                        .with_log_append_time_ms(result.log_append_time_ms)
                        .with_log_start_offset(result.log_start_offset)
                        .with_error_message(result.error_message.as_deref().map(s))
                        .with_record_errors(
                            result
                                .record_errors
                                .iter()
                                .map(|error| {
                                    pr::BatchIndexAndErrorMessage::default()
                                        .with_batch_index(error.batch_index)
                                        .with_batch_index_error_message(Some(s(error.message)))
                                })
                                .collect(),
                        );
                    if let (Some((id, epoch)), true) = (result.current_leader, version >= 10) {
                        let leader = pr::LeaderIdAndEpoch::default()
                            .with_leader_id(BrokerId(id))
                            .with_leader_epoch(epoch);
                        partition = partition.with_current_leader(leader);
                    }
                    partition
                });
                let mut response =
                    pr::TopicProduceResponse::default().with_partition_responses(partitions.collect());
                match &topics[group[0].topic as usize] {
                    TopicRef::Name(name) => response = response.with_name(TopicName(s(name))),
                    TopicRef::Id(id) => response = response.with_topic_id(*id),
                }
                responses.push(response);
            }
            let mut expected =
                km::ProduceResponse::default().with_responses(responses).with_throttle_time_ms(5);
            if version >= 10 {
                expected = expected.with_node_endpoints(
                    endpoints
                        .iter()
                        .map(|endpoint| {
                            pr::NodeEndpoint::default()
                                .with_node_id(BrokerId(endpoint.node_id))
                                .with_host(s(&endpoint.host))
                                .with_port(endpoint.port)
                                .with_rack(endpoint.rack.as_deref().map(s))
                        })
                        .collect(),
                );
            }
            let mut body = BytesMut::new();
            expected.encode(&mut body, version).expect("encodes");
            let ours = encode_produce_response_with_endpoints(
                version,
                CORRELATION_ID,
                &topics,
                &results,
                5,
                &endpoints,
            );
            assert_eq!(ours, with_prefix_and_header(api::PRODUCE, version, &body), "v{version}");
        }
    }
}

#[test]
fn produce_responses_before_version_three_lack_what_came_later() {
    let topics = [TopicRef::Name("t".into())];
    let results = [ProducePartitionResult::failed(0, 0, ErrorCode::UNSUPPORTED_VERSION)];
    let length = |version| encode_produce_response(version, 1, &topics, &results, 0).len();
    // v0: prefix 4, correlation id 4, topic array 4, name 3, partition array 4, partition 14.
    assert_eq!((length(0), length(1), length(2)), (33, 37, 45));
}

#[test]
fn an_empty_produce_response_is_well_formed() {
    for version in 3..=13 {
        let mut body = BytesMut::new();
        km::ProduceResponse::default().encode(&mut body, version).expect("encodes");
        let ours = encode_produce_response(version, CORRELATION_ID, &[], &[], 0);
        assert_eq!(ours, with_prefix_and_header(api::PRODUCE, version, &body));
    }
}

fn fetch_partitions() -> Vec<FetchPartitionData> {
    let full = FetchPartitionData {
        partition: 0,
        error: ErrorCode::NONE,
        high_watermark: 900,
        last_stable_offset: 800,
        log_start_offset: 3,
        aborted: Some(vec![(7, 100), (8, 200)]),
        preferred_read_replica: -1,
        current_leader: None,
        diverging_epoch: None,
        records: vec![Bytes::from(vec![1; 300]), Bytes::new(), Bytes::from(vec![2; 5])],
    };
    let mut moved = FetchPartitionData::failed(1, ErrorCode::FENCED_LEADER_EPOCH);
    moved.current_leader = Some((3, 12));
    let mut diverging = FetchPartitionData::failed(2, ErrorCode::NONE);
    diverging.diverging_epoch = Some((4, 77));
    diverging.current_leader = Some((3, 12));
    diverging.aborted = Some(vec![]);
    let caught_up = FetchPartitionData { partition: 3, records: vec![Bytes::new()], ..full.clone() };
    let last = FetchPartitionData { partition: 4, aborted: None, ..full.clone() };
    vec![full, moved, diverging, caught_up, last]
}

fn expected_fetch(version: i16, topics: &[FetchTopicData], endpoints: &[NodeEndpoint]) -> Vec<u8> {
    use km::fetch_response as fr;
    let responses = topics.iter().map(|topic| {
        let partitions = topic.partitions.iter().map(|ours| {
            let mut partition = fr::PartitionData::default()
                .with_partition_index(ours.partition)
                .with_error_code(ours.error.0)
                .with_high_watermark(ours.high_watermark)
                .with_last_stable_offset(ours.last_stable_offset)
                .with_log_start_offset(ours.log_start_offset)
                .with_aborted_transactions(ours.aborted.as_ref().map(|aborted| {
                    aborted
                        .iter()
                        .map(|&(id, first)| {
                            fr::AbortedTransaction::default()
                                .with_producer_id(ProducerId(id))
                                .with_first_offset(first)
                        })
                        .collect()
                }))
                .with_records(Some(ours.records.concat().into()));
            if version >= 11 {
                partition = partition.with_preferred_read_replica(BrokerId(ours.preferred_read_replica));
            }
            if version >= 12 {
                if let Some((epoch, end_offset)) = ours.diverging_epoch {
                    let diverging =
                        fr::EpochEndOffset::default().with_epoch(epoch).with_end_offset(end_offset);
                    partition = partition.with_diverging_epoch(diverging);
                }
                if let Some((id, epoch)) = ours.current_leader {
                    let leader =
                        fr::LeaderIdAndEpoch::default().with_leader_id(BrokerId(id)).with_leader_epoch(epoch);
                    partition = partition.with_current_leader(leader);
                }
            }
            partition
        });
        let response = fr::FetchableTopicResponse::default().with_partitions(partitions.collect());
        match &topic.topic {
            TopicRef::Name(name) => response.with_topic(TopicName(s(name))),
            TopicRef::Id(id) => response.with_topic_id(*id),
        }
    });
    let mut response =
        km::FetchResponse::default().with_throttle_time_ms(6).with_responses(responses.collect());
    if version >= 7 {
        response = response.with_error_code(ErrorCode::INVALID_FETCH_SESSION_EPOCH.0).with_session_id(99);
    }
    if version >= 16 {
        let nodes = endpoints.iter().map(|endpoint| {
            fr::NodeEndpoint::default()
                .with_node_id(BrokerId(endpoint.node_id))
                .with_host(s(&endpoint.host))
                .with_port(endpoint.port)
                .with_rack(endpoint.rack.as_deref().map(s))
        });
        response = response.with_node_endpoints(nodes.collect());
    }
    let mut body = BytesMut::new();
    response.encode(&mut body, version).expect("encodes");
    with_prefix_and_header(api::FETCH, version, &body)
}

#[test]
fn fetch_responses_are_byte_identical() {
    for version in 4..=18 {
        let all = fetch_partitions();
        for partitions in [vec![], all[..1].to_vec(), all[1..4].to_vec(), all] {
            for count in 0..3 {
                for endpoints in [vec![], endpoints()] {
                    let topics: Vec<FetchTopicData> = (0..count)
                        .map(|n| FetchTopicData {
                            topic: topic_ref(version, 13, n),
                            partitions: partitions.clone(),
                        })
                        .collect();
                    let segments = encode_fetch_response_with_endpoints(
                        version,
                        CORRELATION_ID,
                        6,
                        ErrorCode::INVALID_FETCH_SESSION_EPOCH,
                        99,
                        &topics,
                        &endpoints,
                    );
                    assert!(segments.iter().all(|segment| !segment.is_empty()));
                    assert_eq!(segments.concat(), expected_fetch(version, &topics, &endpoints), "v{version}");
                }
            }
        }
    }
}

#[test]
fn fetch_records_are_handles_not_copies() {
    let records = Bytes::from(vec![5; 1 << 20]);
    let mut partition = FetchPartitionData::failed(0, ErrorCode::NONE);
    partition.records = vec![records.slice(..1000), records.slice(1000..)];
    let topics = [FetchTopicData { topic: TopicRef::Name("t".into()), partitions: vec![partition] }];
    let segments = encode_fetch_response(12, 1, 0, ErrorCode::NONE, 0, &topics);
    assert_eq!(segments[1].as_ptr(), records.as_ptr());
    assert_eq!(segments[2].as_ptr(), records[1000..].as_ptr());
    assert_eq!(segments.len(), 4);
}

const CODECS: [Compression; 5] =
    [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];

/// Our codec behind the crate's record reader, so that the crate's own codecs need not be built.
fn decode_with_crate(batch: &[u8]) -> kr::RecordSet {
    let decompress = |bytes: &mut Bytes, codec: kr::Compression| {
        let codec = Compression::from_id(codec as i16).expect("known codec");
        let mut out = Vec::new();
        compression::decompress(codec, bytes, &mut out, 1 << 24)?;
        Ok(Bytes::from(out))
    };
    let mut bytes = Bytes::copy_from_slice(batch);
    kr::RecordBatchDecoder::decode_with_custom_compression(&mut bytes, Some(decompress)).expect("decodes")
}

#[test]
fn built_batches_decode_with_the_crate() {
    for codec in CODECS {
        let mut builder = BatchBuilder::new();
        builder.compression(codec).producer(77, 3, i32::MAX - 1).leader_epoch(5).transactional();
        let large = vec![b'x'; 100_000];
        builder.append(1_000, Some(b"k0"), Some(b"v0"), &[]);
        builder.append(900, None, Some(&large), &[("a", Some(b"1")), ("b", None), ("c", Some(b""))]);
        builder.append(2_000, Some(b""), None, &[]);
        assert!(!builder.is_empty());
        let batch = builder.build(50);
        let header = record_batch::validate_produced(&batch).expect("valid");
        assert_eq!((header.base_offset, header.last_offset(), header.next_offset()), (50, 52, 53));
        assert_eq!((header.base_timestamp, header.max_timestamp), (1_000, 2_000));
        assert_eq!(header.last_sequence(), 0, "sequences start over after i32::MAX");
        assert_eq!(header.compression(), Ok(codec));

        let set = decode_with_crate(&batch);
        let mut scratch = Vec::new();
        let ours: Vec<_> = decode_records(&batch, &mut scratch, 1 << 24)
            .expect("opens")
            .collect::<Result<_, _>>()
            .expect("decodes");
        assert_eq!(set.records.len(), ours.len());
        for (theirs, ours) in set.records.iter().zip(&ours) {
            assert_eq!((theirs.offset, theirs.timestamp), (ours.offset, ours.timestamp));
            assert_eq!((theirs.key.as_deref(), theirs.value.as_deref()), (ours.key, ours.value));
            let headers: Vec<_> =
                theirs.headers.iter().map(|(key, value)| (key.as_bytes(), value.as_deref())).collect();
            assert_eq!(headers, ours.headers.clone().collect::<Vec<_>>());
            assert_eq!((theirs.producer_id, theirs.producer_epoch), (77, 3));
            assert!(theirs.transactional && !theirs.control);
        }
    }
}

#[test]
fn batches_of_the_crate_decode_here() {
    let record = |n: i64| kr::Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: 2,
        producer_id: 5,
        producer_epoch: 1,
        timestamp_type: kr::TimestampType::Creation,
        offset: 10 + n,
        sequence: 3 + n as i32,
        timestamp: 1000 + n * 7,
        key: (n % 2 == 0).then(|| Bytes::from(format!("key-{n}"))),
        value: (n % 3 != 0).then(|| Bytes::from(vec![n as u8; n as usize * 50])),
        headers: (0..n).map(|h| (s(&format!("h{h}")), (h % 2 == 0).then(|| Bytes::from("v")))).collect(),
    };
    let records: Vec<kr::Record> = (0..8).map(record).collect();
    for codec in CODECS {
        let crate_codec = match codec {
            Compression::None => kr::Compression::None,
            Compression::Gzip => kr::Compression::Gzip,
            Compression::Snappy => kr::Compression::Snappy,
            Compression::Lz4 => kr::Compression::Lz4,
            Compression::Zstd => kr::Compression::Zstd,
        };
        let options = kr::RecordEncodeOptions { version: 2, compression: crate_codec };
        let compress = |from: &mut BytesMut, to: &mut BytesMut, _| {
            to.put_slice(&compression::compress(codec, from));
            Ok(())
        };
        let mut batch = BytesMut::new();
        kr::RecordBatchEncoder::encode_with_custom_compression(
            &mut batch,
            records.iter(),
            &options,
            Some(compress),
        )
        .expect("encodes");
        let header = record_batch::validate_produced(&batch).expect("valid");
        assert_eq!((header.base_offset, header.record_count, header.base_sequence), (10, 8, 3));
        let mut scratch = Vec::new();
        let ours: Vec<_> = decode_records(&batch, &mut scratch, 1 << 20)
            .expect("opens")
            .collect::<Result<_, _>>()
            .expect("decodes");
        assert_eq!(ours.len(), records.len());
        for (theirs, ours) in records.iter().zip(&ours) {
            assert_eq!((theirs.offset, theirs.timestamp), (ours.offset, ours.timestamp));
            assert_eq!((theirs.key.as_deref(), theirs.value.as_deref()), (ours.key, ours.value));
            let headers: Vec<_> =
                theirs.headers.iter().map(|(key, value)| (key.as_bytes(), value.as_deref())).collect();
            assert_eq!(headers, ours.headers.clone().collect::<Vec<_>>());
        }
    }
}

#[test]
fn stamped_batches_stay_readable() {
    let mut builder = BatchBuilder::new();
    builder.append(100, None, Some(b"v"), &[]).append(300, None, Some(b"w"), &[]);
    let mut batch = builder.build(0);
    record_batch::set_base_offset(&mut batch, 777);
    record_batch::set_leader_epoch(&mut batch, 9);
    assert!(record_batch::crc_ok(&batch), "neither lies under the checksum");
    record_batch::set_log_append_time(&mut batch, 5_000);
    let header = record_batch::validate_produced(&batch).expect("valid");
    assert!(header.log_append_time());
    assert_eq!((header.base_offset, header.leader_epoch, header.max_timestamp), (777, 9, 5_000));
    let set = decode_with_crate(&batch);
    assert_eq!(set.records[1].offset, 778);
    assert_eq!(set.records[1].timestamp_type, kr::TimestampType::LogAppend);
    let mut scratch = Vec::new();
    for record in decode_records(&batch, &mut scratch, 0).expect("opens") {
        assert_eq!(record.expect("decodes").timestamp, 5_000);
    }
}

#[test]
fn response_bodies_decode_from_our_bytes() {
    let topics = [FetchTopicData { topic: TopicRef::Name("t".into()), partitions: fetch_partitions() }];
    let whole: Bytes = encode_fetch_response(12, 5, 1, ErrorCode::NONE, 3, &topics).concat().into();
    let mut body = whole.slice(4 + 5..);
    let decoded = km::FetchResponse::decode(&mut body, 12).expect("decodes");
    assert!(body.is_empty());
    assert_eq!(decoded.responses[0].partitions.len(), 5);
    assert_eq!(decoded.responses[0].partitions[4].records.as_deref().map(<[u8]>::len), Some(305));
}
