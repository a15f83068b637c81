//! Produce and InitProducerId.

use bytes::{Bytes, BytesMut};
use flumen_protocol::compression::Compression;
use flumen_protocol::record::BatchBuilder;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{
    InitProducerIdRequest, MetadataRequest, ProduceRequest, ProducerId, TransactionalId,
};
use uuid::Uuid;

use super::{Bed, NOBODY, Probes, shown, three};
use crate::wire::{batch, now_ms, text, topic_name};

const ALL: (i16, i16) = (3, 13);
/// Topics are named by id from here on.
const BY_ID: i16 = 13;

fn topic(bed: &Bed, version: i16, name: &str, partitions: &[(i32, Option<Bytes>)]) -> TopicProduceData {
    let data = partitions
        .iter()
        .map(|(index, records)| {
            PartitionProduceData::default().with_index(*index).with_records(records.clone())
        })
        .collect();
    let topic = TopicProduceData::default().with_partition_data(data);
    if version >= BY_ID { topic.with_topic_id(bed.id(name)) } else { topic.with_name(topic_name(name)) }
}

fn request(topics: Vec<TopicProduceData>) -> ProduceRequest {
    ProduceRequest::default().with_acks(-1).with_timeout_ms(30_000).with_topic_data(topics)
}

fn to(bed: &Bed, version: i16, name: &str, records: Bytes) -> ProduceRequest {
    request(vec![topic(bed, version, name, &[(0, Some(records))])])
}

/// A batch with one byte or more of its header changed; the checksum is made right again unless that is the point.
fn tampered(change: impl Fn(&mut BytesMut), sum: bool) -> Bytes {
    let mut bytes = BytesMut::from(&three()[..]);
    change(&mut bytes);
    if sum { summed(bytes) } else { bytes.freeze() }
}

/// With the right checksum.
fn summed(mut bytes: BytesMut) -> Bytes {
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.freeze()
}

/// Bit by bit: a few hundred bytes in tests need no table.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn old_message_set() -> Bytes {
    // Offset 0, one message of magic 1 without key and value; its checksum does not matter.
    let mut bytes = vec![0; 8];
    bytes.extend(22i32.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 1, 0]);
    bytes.extend([0; 8]);
    bytes.extend((-1i32).to_be_bytes());
    bytes.extend((-1i32).to_be_bytes());
    bytes.into()
}

fn of_producer(id: i64, epoch: i16, sequence: i32, records: usize) -> Bytes {
    batch(&vec!["v"; records], |b| {
        b.producer(id, epoch, sequence);
    })
}

/// Batches of one producer to one partition, one request after the other; what is shown is the last answer.
fn sequence(bed: &mut Bed, version: i16, batches: &[(i16, i32, usize)]) -> anyhow::Result<String> {
    let mut wire = bed.wire()?;
    let id = wire
        .ask(4, &InitProducerIdRequest::default().with_producer_id(ProducerId(-1)).with_producer_epoch(-1))?;
    let mut last = String::new();
    for (epoch, first, records) in batches {
        let partition = i32::from(version);
        let records = of_producer(id.producer_id.0, *epoch, *first, *records);
        let produce = request(vec![topic(bed, version, "idempotent", &[(partition, Some(records))])]);
        wire.send(version, &produce)?;
        last = shown::<ProduceRequest>(&mut wire, version)?;
    }
    Ok(last)
}

/// Three records of ten bytes each: length, attributes, timestamp delta, offset delta, key, value of three bytes, headers.
fn three_of_ten_bytes() -> BatchBuilder {
    let mut builder = BatchBuilder::new();
    for value in [b"aaa", b"bbb", b"ccc"] {
        builder.append(now_ms_whole(), None, Some(value), &[]);
    }
    builder
}

/// The same for all records of a batch, and within the limits of every topic.
fn now_ms_whole() -> i64 {
    now_ms() / 60_000 * 60_000
}

const RECORDS_AT: usize = 61;
const TEN: usize = 10;

/// Where header and records, or a record's own parts, do not fit each other.
fn inside(probes: &mut Probes) {
    type Change = fn(&mut BytesMut);
    fn count(bytes: &mut BytesMut, records: u8) {
        bytes[60] = records;
        bytes[26] = records - 1;
    }
    let changes: [(&str, Change); 15] = [
        ("count below records", |b| count(b, 2)),
        ("count one above records", |b| count(b, 4)),
        ("bytes after the records", |b| {
            b.extend_from_slice(&[0, 0]);
            let length = (b.len() - 12) as u32;
            b[8..12].copy_from_slice(&length.to_be_bytes());
        }),
        ("no bytes for the records", |b| {
            b.truncate(RECORDS_AT);
            let length = (b.len() - 12) as u32;
            b[8..12].copy_from_slice(&length.to_be_bytes());
        }),
        ("record longer than the batch", |b| b[RECORDS_AT + 2 * TEN] = 2 * 40),
        ("record one byte longer", |b| b[RECORDS_AT] = 2 * 10),
        ("record one byte shorter", |b| b[RECORDS_AT] = 2 * 8),
        ("record of no bytes", |b| b[RECORDS_AT] = 0),
        ("record of negative length", |b| b[RECORDS_AT] = 1),
        ("key longer than the record", |b| b[RECORDS_AT + 4] = 2 * 30),
        ("key of length -2", |b| b[RECORDS_AT + 4] = 3),
        ("value longer than the record", |b| b[RECORDS_AT + 5] = 2 * 30),
        ("negative count of headers", |b| b[RECORDS_AT + 9] = 1),
        ("more headers than bytes", |b| b[RECORDS_AT + 9] = 2 * 5),
        ("offset delta twice", |b| b[RECORDS_AT + TEN + 3] = 0),
    ];
    for (what, change) in changes {
        probes.one(&format!("Produce/{what}"), ALL, move |bed, version| {
            let mut bytes = three_of_ten_bytes().build(0);
            assert_eq!(bytes.len(), RECORDS_AT + 3 * TEN);
            change(&mut bytes);
            to(bed, version, "poisoned", summed(bytes))
        });
    }
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let versions = if codec == Compression::Zstd { (7, 13) } else { ALL };
        let packed = move || three_of_ten_bytes().compression(codec).build(0);
        for (what, records) in [("below", 2), ("above", 4)] {
            probes.one(&format!("Produce/{codec:?} count {what} records"), versions, move |bed, version| {
                let mut bytes = packed();
                count(&mut bytes, records);
                to(bed, version, "poisoned", summed(bytes))
            });
        }
        probes.one(
            &format!("Produce/{codec:?} wrong count on a compacted topic"),
            versions,
            move |bed, version| {
                let mut builder = BatchBuilder::new();
                for key in [b"aaa", b"bbb", b"ccc"] {
                    builder.append(now_ms_whole(), Some(key), Some(b"v"), &[]);
                }
                let mut bytes = builder.compression(codec).build(0);
                count(&mut bytes, if version % 2 == 0 { 2 } else { 4 });
                to(bed, version, "compacted", summed(bytes))
            },
        );
        probes.one(&format!("Produce/{codec:?} body that is not"), versions, move |bed, version| {
            let mut bytes = packed();
            bytes[RECORDS_AT..].fill(0x2a);
            to(bed, version, "poisoned", summed(bytes))
        });
    }
}

pub fn add(probes: &mut Probes) {
    for acks in [-1, 0, 1, 2, -2] {
        probes.exchange(&format!("Produce/acks={acks}"), ALL, move |bed, version| {
            let produce = to(bed, version, "stamped", three()).with_acks(acks);
            if acks != 0 {
                return bed.ask(version, &produce);
            }
            // No answer comes: the next request's is the next one.
            let mut wire = bed.wire()?;
            wire.send(version, &produce)?;
            wire.ask(12, &MetadataRequest::default().with_topics(Some(Vec::new())))?;
            Ok("goes on without an answer".to_string())
        });
    }
    probes.exchange("Produce/acks=0 and an error", ALL, |bed, version| {
        let produce = to(bed, version, "nowhere", three()).with_acks(0);
        let mut wire = bed.wire()?;
        wire.send(version, &produce)?;
        wire.send(12, &MetadataRequest::default().with_topics(Some(Vec::new())))?;
        Ok(if wire.receive_frame()?.is_some() { "goes on" } else { "closed" }.to_string())
    });
    probes.one("Produce/no topics", ALL, |_, _| request(Vec::new()));
    probes.one("Produce/no partitions", ALL, |bed, version| request(vec![topic(bed, version, "plain", &[])]));
    probes.one("Produce/unknown topic", ALL, |bed, version| to(bed, version, "nowhere", three()));
    probes.one("Produce/unknown topic and bad acks", ALL, |bed, version| {
        to(bed, version, "nowhere", three()).with_acks(2)
    });
    probes.one("Produce/bad topic name", (3, 12), |bed, version| to(bed, version, "no name!", three()));
    probes.one("Produce/empty topic name", (3, 12), |bed, version| to(bed, version, "", three()));
    probes.one("Produce/unknown id", (13, 13), |_, _| {
        let data = vec![PartitionProduceData::default().with_records(Some(three()))];
        request(vec![TopicProduceData::default().with_topic_id(NOBODY).with_partition_data(data)])
    });
    probes.one("Produce/zero id", (13, 13), |_, _| {
        let data = vec![PartitionProduceData::default().with_records(Some(three()))];
        request(vec![TopicProduceData::default().with_topic_id(Uuid::nil()).with_partition_data(data)])
    });
    for partition in [3, -1, i32::MAX] {
        probes.one(&format!("Produce/partition {partition}"), ALL, move |bed, version| {
            request(vec![topic(bed, version, "plain", &[(partition, Some(three()))])])
        });
    }
    probes.one("Produce/null records", ALL, |bed, version| {
        request(vec![topic(bed, version, "stamped", &[(0, None)])])
    });
    probes.one("Produce/no records", ALL, |bed, version| to(bed, version, "stamped", Bytes::new()));
    probes.one("Produce/good and bad together", ALL, |bed, version| {
        request(vec![
            topic(bed, version, "idempotent", &[(0, Some(three())), (99, Some(three()))]),
            topic(bed, version, "stamped", &[(0, Some(Bytes::new()))]),
        ])
    });
    probes.one("Produce/wrong checksum", ALL, |bed, version| {
        to(bed, version, "stamped", tampered(|b| b[70] ^= 1, false))
    });
    probes.one("Produce/cut short", ALL, |bed, version| {
        let whole = three();
        to(bed, version, "stamped", whole.slice(..whole.len() - 5))
    });
    probes.one("Produce/a few bytes", ALL, |bed, version| {
        to(bed, version, "stamped", Bytes::from_static(b"xyz"))
    });
    probes.one("Produce/magic 1", ALL, |bed, version| to(bed, version, "stamped", old_message_set()));
    probes.one("Produce/magic 3", ALL, |bed, version| {
        to(bed, version, "stamped", tampered(|b| b[16] = 3, true))
    });
    probes.one("Produce/two batches", ALL, |bed, version| {
        to(bed, version, "stamped", [&three()[..], &three()[..]].concat().into())
    });
    probes.one("Produce/unknown codec", ALL, |bed, version| {
        to(bed, version, "stamped", tampered(|b| b[22] |= 7, true))
    });
    probes.one("Produce/control batch", ALL, |bed, version| {
        to(
            bed,
            version,
            "stamped",
            batch(&["x"], |b| {
                b.control();
            }),
        )
    });
    probes.one("Produce/transactional batch without transaction", ALL, |bed, version| {
        to(
            bed,
            version,
            "stamped",
            batch(&["x"], |b| {
                b.producer(9_999, 0, 0).transactional();
            }),
        )
    });
    probes.one("Produce/count below offsets", ALL, |bed, version| {
        to(bed, version, "stamped", tampered(|b| b[60] = 2, true))
    });
    probes.one("Produce/count above records", ALL, |bed, version| {
        to(
            bed,
            version,
            "poisoned",
            tampered(
                |b| {
                    b[60] = 9;
                    b[26] = 8;
                },
                true,
            ),
        )
    });
    inside(probes);
    probes.one("Produce/no count", ALL, |bed, version| {
        to(bed, version, "stamped", tampered(|b| b[60] = 0, true))
    });
    probes.one("Produce/no producer epoch", ALL, |bed, version| {
        to(
            bed,
            version,
            "poisoned",
            batch(&["x"], |b| {
                b.producer(5, -1, 0);
            }),
        )
    });
    probes.one("Produce/too large", ALL, |bed, version| {
        to(bed, version, "small", batch(&[&"x".repeat(1000)], |_| {}))
    });
    probes.one("Produce/no key on a compacted topic", ALL, |bed, version| {
        to(bed, version, "compacted", three())
    });
    probes.one("Produce/some keys on a compacted topic", ALL, |bed, version| {
        let mut builder = BatchBuilder::new();
        for key in [Some(&b"k"[..]), None, Some(b"l"), None] {
            builder.append(now_ms(), key, Some(b"v"), &[]);
        }
        to(bed, version, "compacted", builder.build(0).freeze())
    });
    for (what, shift_ms) in [("old", -7_200_000), ("new", 7_200_000)] {
        probes.one(&format!("Produce/too {what} a timestamp"), ALL, move |bed, version| {
            let mut builder = BatchBuilder::new();
            for at in [0, shift_ms] {
                builder.append(now_ms() + at, None, Some(b"v"), &[]);
            }
            to(bed, version, "timed", builder.build(0).freeze())
        });
    }
    probes.one("Produce/no timestamp", ALL, |bed, version| {
        let mut builder = BatchBuilder::new();
        builder.append(-1, None, Some(b"v"), &[]);
        to(bed, version, "timed", builder.build(0).freeze())
    });
    probes.exchange("Produce/internal topic", (3, 12), |bed, version| {
        super::groups::make_offsets_topic(bed)?;
        let produce = to(bed, version, "__consumer_offsets", three());
        bed.ask(version, &produce)
    });
    probes.one("Produce/transactional id", ALL, |bed, version| {
        to(bed, version, "stamped", three()).with_transactional_id(Some(TransactionalId(text("nobody"))))
    });

    probes.exchange("Produce/first of a producer", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3)]));
    probes.exchange("Produce/first with a later sequence", ALL, |bed, v| sequence(bed, v, &[(0, 77, 3)]));
    probes.exchange("Produce/repeated", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3), (0, 3, 2), (0, 0, 3)]));
    probes.exchange("Produce/repeated in part", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3), (0, 1, 2)]));
    probes.exchange("Produce/repeated after five others", ALL, |bed, v| {
        sequence(bed, v, &[(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 1), (0, 5, 1), (0, 0, 1)])
    });
    probes.exchange("Produce/gap", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3), (0, 5, 1)]));
    probes.exchange("Produce/new epoch", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3), (1, 0, 1)]));
    probes
        .exchange("Produce/new epoch not from zero", ALL, |bed, v| sequence(bed, v, &[(0, 0, 3), (1, 3, 1)]));
    probes.exchange("Produce/old epoch", ALL, |bed, v| sequence(bed, v, &[(1, 0, 3), (0, 3, 1)]));
    probes.exchange("Produce/sequence wraps", ALL, |bed, v| {
        sequence(bed, v, &[(0, i32::MAX - 1, 2), (0, 0, 1)])
    });
    probes.exchange("Produce/sequence wraps inside a batch", ALL, |bed, v| {
        sequence(bed, v, &[(0, i32::MAX, 3), (0, 2, 1)])
    });

    let init = |id: i64, epoch: i16, version: i16| {
        let request = InitProducerIdRequest::default().with_transaction_timeout_ms(60_000);
        if version >= 3 {
            request.with_producer_id(ProducerId(id)).with_producer_epoch(epoch)
        } else {
            request
        }
    };
    probes.one("InitProducerId/new", (0, 5), move |_, version| init(-1, -1, version));
    probes.one("InitProducerId/with an id", (3, 5), move |_, version| init(5, 0, version));
    probes.one("InitProducerId/with half an id", (3, 5), move |_, version| init(5, -1, version));
    probes.one("InitProducerId/empty transactional id", (0, 5), move |_, version| {
        init(-1, -1, version).with_transactional_id(Some(TransactionalId(text(""))))
    });
}
