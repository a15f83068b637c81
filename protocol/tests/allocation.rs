//! Hostile input against every reader in the crate, under an allocator that counts.
//!
//! Asserts what the crate promises: no panic, no error past the guard, and a peak below a small multiple of the frame.

#[path = "support/counting_allocator.rs"]
mod counting_allocator;
mod support;

use bytes::{Bytes, BytesMut};
use counting_allocator::peak_of;
use flumen_protocol::compression::Compression;
use flumen_protocol::frame::FrameAssembler;
use flumen_protocol::record::{BatchBuilder, decode_records};
use flumen_protocol::{guard, header, produce, record_batch};
use kafka_protocol::messages::{ApiKey, ProduceRequest, RequestKind, TopicName};
use kafka_protocol::protocol::Encodable;
use support::{default_request, encode, guarded_versions, mutate, rich_request};

/// The promised bound.
const PER_BYTE_MAX: usize = 16;
const FREE_BYTES: usize = 64 << 10;

fn bound(frame_bytes: usize) -> usize {
    frame_bytes * PER_BYTE_MAX + FREE_BYTES
}

fn check_guarded(key: i16, version: i16, body: &[u8]) {
    let mut bytes = Bytes::copy_from_slice(body);
    let (accepted, peak) = peak_of(|| {
        let verdict = guard::check_request(key, version, &bytes);
        verdict.is_ok().then(|| {
            let api_key = ApiKey::try_from(key).expect("known key");
            RequestKind::decode(api_key, &mut bytes, version).map(drop).is_ok()
        })
    });
    assert!(peak < bound(body.len()), "{key} v{version}: {peak} bytes for {} {body:x?}", body.len());
    assert_ne!(accepted, Some(false), "{key} v{version}: accepted but not decodable {body:x?}");
}

#[test]
fn guarded_requests() {
    for (key, version) in guarded_versions() {
        let seed = (key as u64) << 16 | version as u64;
        mutate(&encode(&rich_request(key, version), version), seed, 1000, |body| {
            check_guarded(key, version, body)
        });
        mutate(&encode(&default_request(key), version), seed, 200, |body| check_guarded(key, version, body));
    }
}

/// Bodies of nothing but tiny values: the densest things a decoder can be asked to build.
#[test]
fn guarded_requests_of_repeated_bytes() {
    for (key, version) in guarded_versions() {
        for length in [64, 4096, 65_536] {
            for byte in [0, 1, 2, 0xff] {
                for claim in support::CLAIMS {
                    let mut body = claim.to_vec();
                    body.resize(length, byte);
                    check_guarded(key, version, &body);
                }
            }
            for head in 0..24 {
                // A group name or the like first, then as many elements as the rest can hold.
                let mut body = vec![1; length];
                let count = (length as u32 / 2).to_be_bytes();
                body[head..head + 4].copy_from_slice(&count);
                check_guarded(key, version, &body);
                body[head..head + 3].copy_from_slice(&[0xff, 0x7f, 1]);
                check_guarded(key, version, &body);
            }
        }
    }
}

/// Requests that are well formed and nothing but the smallest elements: the most memory a byte can ask for.
fn dense_requests(n: usize, tagged: bool) -> Vec<(i16, RequestKind)> {
    use flumen_protocol::api;
    use kafka_protocol::messages::*;
    fn many<T: Clone>(element: T, n: usize) -> Vec<T> {
        vec![element; n]
    }
    macro_rules! element {
        ($kind:ty) => {{
            let element = <$kind>::default();
            if tagged { element.with_unknown_tagged_field(0x70, Bytes::new()) } else { element }
        }};
    }
    vec![
        (
            api::METADATA,
            RequestKind::Metadata(MetadataRequest::default().with_topics(Some(many(
                element!(metadata_request::MetadataRequestTopic).with_name(Some(Default::default())),
                n,
            )))),
        ),
        (
            api::FIND_COORDINATOR,
            RequestKind::FindCoordinator(
                FindCoordinatorRequest::default().with_coordinator_keys(many(Default::default(), n)),
            ),
        ),
        (
            api::JOIN_GROUP,
            RequestKind::JoinGroup(
                JoinGroupRequest::default()
                    .with_protocols(many(element!(join_group_request::JoinGroupRequestProtocol), n)),
            ),
        ),
        (
            api::LEAVE_GROUP,
            RequestKind::LeaveGroup(
                LeaveGroupRequest::default()
                    .with_members(many(element!(leave_group_request::MemberIdentity), n)),
            ),
        ),
        (
            api::OFFSET_FETCH,
            RequestKind::OffsetFetch(
                OffsetFetchRequest::default()
                    .with_groups(many(element!(offset_fetch_request::OffsetFetchRequestGroup), n)),
            ),
        ),
        (
            api::CREATE_TOPICS,
            RequestKind::CreateTopics(CreateTopicsRequest::default().with_topics(vec![
                create_topics_request::CreatableTopic::default()
                    .with_configs(many(element!(create_topics_request::CreatableTopicConfig), n)),
            ])),
        ),
        (
            api::CREATE_PARTITIONS,
            RequestKind::CreatePartitions(CreatePartitionsRequest::default().with_topics(vec![
                create_partitions_request::CreatePartitionsTopic::default().with_assignments(Some(many(
                    element!(create_partitions_request::CreatePartitionsAssignment),
                    n,
                ))),
            ])),
        ),
        (
            api::DELETE_GROUPS,
            RequestKind::DeleteGroups(
                DeleteGroupsRequest::default().with_groups_names(many(Default::default(), n)),
            ),
        ),
        (
            api::FETCH,
            RequestKind::Fetch(
                FetchRequest::default().with_topics(many(element!(fetch_request::FetchTopic), n)),
            ),
        ),
        (
            api::ELECT_LEADERS,
            RequestKind::ElectLeaders(
                ElectLeadersRequest::default()
                    .with_topic_partitions(Some(many(element!(elect_leaders_request::TopicPartitions), n))),
            ),
        ),
        (
            api::ALTER_PARTITION_REASSIGNMENTS,
            RequestKind::AlterPartitionReassignments(
                AlterPartitionReassignmentsRequest::default().with_topics(vec![
                    alter_partition_reassignments_request::ReassignableTopic::default().with_partitions(
                        many(element!(alter_partition_reassignments_request::ReassignablePartition), n),
                    ),
                ]),
            ),
        ),
        (
            api::ALTER_CLIENT_QUOTAS,
            RequestKind::AlterClientQuotas(
                AlterClientQuotasRequest::default()
                    .with_entries(many(element!(alter_client_quotas_request::EntryData), n)),
            ),
        ),
        (
            api::LIST_CONFIG_RESOURCES,
            RequestKind::ListConfigResources(
                ListConfigResourcesRequest::default().with_resource_types(many(0, n)),
            ),
        ),
        (
            api::DESCRIBE_TOPIC_PARTITIONS,
            RequestKind::DescribeTopicPartitions(
                DescribeTopicPartitionsRequest::default()
                    .with_topics(many(element!(describe_topic_partitions_request::TopicRequest), n)),
            ),
        ),
    ]
}

#[test]
fn guarded_requests_of_empty_elements() {
    let (mut accepted, mut refused) = (0, 0);
    for n in [10, 100, 300, 600, 1000, 2000, 5000, 50_000] {
        for tagged in [false, true] {
            for (key, request) in dense_requests(n, tagged) {
                for (_, version) in guarded_versions().filter(|&(other, _)| other == key) {
                    let mut body = BytesMut::new();
                    if request.encode(&mut body, version).is_err() {
                        continue;
                    }
                    check_guarded(key, version, &body);
                    match guard::check_request(key, version, &body) {
                        Ok(()) => accepted += 1,
                        Err(_) => refused += 1,
                    }
                }
            }
        }
    }
    assert!(
        accepted > 100 && refused > 100,
        "{accepted} accepted, {refused} refused: the test misses the boundary"
    );
}

/// One struct with very many unknown tagged fields.
#[test]
fn guarded_requests_of_many_tags() {
    for n in [1usize, 10, 100, 400, 600, 2000, 16_000] {
        // ListGroups v3 has no fields but these.
        let mut body = Vec::new();
        put_uvarint(&mut body, n);
        for tag in 0..n {
            put_uvarint(&mut body, tag * 7);
            body.push(0);
        }
        check_guarded(flumen_protocol::api::LIST_GROUPS, 3, &body);
        check_guarded(flumen_protocol::api::API_VERSIONS, 3, &[&[1, 1][..], &body].concat());
    }
}

fn put_uvarint(body: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        body.push(value as u8 | 0x80);
        value >>= 7;
    }
    body.push(value as u8);
}

#[test]
fn request_headers() {
    for (key, version) in guarded_versions() {
        let mut frame = Vec::new();
        frame.extend_from_slice(&key.to_be_bytes());
        frame.extend_from_slice(&version.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 5, 0, 6]);
        frame.extend_from_slice(b"client\x02\x00\x03abc\x64\x01z rest of the body");
        mutate(&frame, 11, 500, |frame| {
            let (parsed, peak) = peak_of(|| header::parse_request_header(frame));
            assert!(peak < bound(frame.len()));
            if let Ok(parsed) = parsed {
                assert!(parsed.body_offset <= frame.len());
                let first = header::peek(frame);
                assert_eq!(first, Some((parsed.api_key, parsed.api_version, parsed.correlation_id)));
            }
        });
    }
}

#[test]
fn frame_assembler() {
    let mut stream = Vec::new();
    for payload in [&b"12345678"[..], &[7; 300], &[0; 5000], b"abcd"] {
        stream.extend_from_slice(&(payload.len() as i32).to_be_bytes());
        stream.extend_from_slice(payload);
    }
    for piece in [1, 7, 1000, usize::MAX] {
        // A prefix of the stream keeps the number of positions small; the long frame is then always cut.
        for end in [40, 400] {
            mutate(&stream[..end], 13, 2000, |bytes| {
                let (frames, peak) = peak_of(|| {
                    let mut assembler = FrameAssembler::new(100 << 20);
                    let mut out = Vec::new();
                    for chunk in bytes.chunks(piece) {
                        if assembler.push(chunk, &mut out).is_err() {
                            break;
                        }
                    }
                    out.iter().map(|frame| frame.len() + 4).sum::<usize>()
                });
                assert!(frames <= bytes.len());
                assert!(peak < bound(bytes.len()), "{peak} for {}", bytes.len());
            });
        }
    }
}

fn batch(codec: Compression) -> BytesMut {
    let mut builder = BatchBuilder::new();
    builder.compression(codec).producer(7, 1, 100);
    for n in 0..6 {
        let value = format!("value {n} value value value value");
        let key = (n % 2 == 0).then_some(&b"key"[..]);
        builder.append(1000 + n, key, Some(value.as_bytes()), &[("h", Some(b"1")), ("empty", None)]);
    }
    builder.append(5, None, None, &[]);
    builder.build(40)
}

fn produce_body(version: i16) -> Bytes {
    use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
    let tag = Bytes::from_static(b"tagged");
    let partition = |index, records| {
        PartitionProduceData::default()
            .with_index(index)
            .with_records(records)
            .with_unknown_tagged_field(100, tag.clone())
    };
    let topic = |name: &str| {
        let records = batch(Compression::None).freeze().slice(..64);
        let mut topic = TopicProduceData::default()
            .with_partition_data(vec![partition(0, Some(records)), partition(1, None)])
            .with_unknown_tagged_field(100, tag.clone());
        if version >= 13 {
            topic = topic.with_topic_id(uuid::Uuid::from_u128(77));
        } else {
            topic = topic.with_name(TopicName(support::s(name)));
        }
        topic
    };
    let mut body = BytesMut::new();
    ProduceRequest::default()
        .with_acks(-1)
        .with_timeout_ms(1000)
        .with_topic_data(vec![topic("clicks"), topic("o")])
        .with_unknown_tagged_field(100, tag.clone())
        .encode(&mut body, version)
        .expect("encodes");
    body.freeze()
}

fn check_produce(version: i16, body: &[u8]) {
    // The frame itself is there before decoding; only what decoding adds is counted.
    let frame = BytesMut::from(body);
    let (decoded, peak) = peak_of(|| produce::decode_produce(frame, 0, version));
    assert!(peak < bound(body.len()), "v{version}: {peak} bytes for {}", body.len());
    if let Ok(request) = decoded {
        let records: usize = request.partitions.iter().map(|partition| partition.records.len()).sum();
        assert!(records <= body.len());
        assert!(request.partitions.iter().all(|partition| (partition.topic as usize) < request.topics.len()));
        let (_, peak) = peak_of(|| {
            for partition in &request.partitions {
                let _ = record_batch::validate_produced(&partition.records);
            }
        });
        assert_eq!(peak, 0, "validation allocates nothing");
    }
}

#[test]
fn produce_requests() {
    for version in 3..=13 {
        mutate(&produce_body(version), version as u64, 20_000, |body| check_produce(version, body));
    }
}

/// Many topics with few partitions each, and few with many: the densest frames that are well formed.
#[test]
fn produce_requests_of_tiny_partitions() {
    for per_topic in [0usize, 1, 2, 3, 10, 100, 20_000] {
        for topics in [1usize, 2, 3, 100, 5000] {
            let mut body = vec![0, 0, 1, 0, 0, 0, 1];
            put_uvarint(&mut body, topics + 1);
            for _ in 0..topics {
                body.extend_from_slice(&[2, b'a']);
                put_uvarint(&mut body, per_topic + 1);
                for _ in 0..per_topic.min(2_000_000 / topics) {
                    body.extend_from_slice(&[0, 0, 0, 0, 0, 0]);
                }
                body.push(0);
            }
            body.push(0);
            check_produce(9, &body);
        }
    }
}

/// What decompression may write in these tests.
const DECOMPRESSED_MAX: usize = 1 << 16;

fn check_records(batch: &[u8]) {
    let (_, peak) = peak_of(|| {
        let mut scratch = Vec::new();
        if let Ok(records) = decode_records(batch, &mut scratch, DECOMPRESSED_MAX) {
            let mut count = 0;
            for record in records.flatten() {
                count += 1 + record.headers.count();
            }
            assert!(count <= DECOMPRESSED_MAX + batch.len());
        }
        assert!(scratch.len() <= DECOMPRESSED_MAX);
    });
    // Growing the scratch buffer holds the old and the new for a moment.
    assert!(peak < bound(batch.len()) + 2 * DECOMPRESSED_MAX, "{peak} for {}", batch.len());
    let (_, peak) = peak_of(|| {
        let _ = record_batch::validate_produced(batch);
        record_batch::batches(batch).count()
    });
    assert_eq!(peak, 0);
}

const CODECS: [Compression; 5] =
    [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];

#[test]
fn record_batches_of_every_codec() {
    for codec in CODECS {
        mutate(&batch(codec), 17, 20_000, check_records);
    }
}

#[test]
fn record_batches_under_the_wrong_codec() {
    for codec in CODECS {
        for claimed in 0..8u8 {
            let mut bytes = batch(codec).to_vec();
            bytes[22] = bytes[22] & !7 | claimed;
            mutate(&bytes, 19 + u64::from(claimed), 500, check_records);
        }
    }
}
