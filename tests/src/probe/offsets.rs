//! ListOffsets, OffsetForLeaderEpoch, DeleteRecords.

use kafka_protocol::messages::delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::offset_for_leader_epoch_request::{
    OffsetForLeaderPartition, OffsetForLeaderTopic,
};
use kafka_protocol::messages::{
    BrokerId, DeleteRecordsRequest, ListOffsetsRequest, OffsetForLeaderEpochRequest,
};

use super::{PLAIN_TIMESTAMP, Probes};
use crate::wire::topic_name;

const ALL: (i16, i16) = (1, 10);

fn list(topic: &str, partitions: &[(i32, i64, i32)], version: i16) -> ListOffsetsRequest {
    let partitions = partitions
        .iter()
        .map(|(index, timestamp, epoch)| {
            let p = ListOffsetsPartition::default().with_partition_index(*index).with_timestamp(*timestamp);
            if version >= 4 { p.with_current_leader_epoch(*epoch) } else { p }
        })
        .collect();
    ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![
        ListOffsetsTopic::default().with_name(topic_name(topic)).with_partitions(partitions),
    ])
}

fn epochs(topic: &str, partitions: &[(i32, i32, i32)]) -> OffsetForLeaderEpochRequest {
    let partitions = partitions
        .iter()
        .map(|(index, current, epoch)| {
            OffsetForLeaderPartition::default()
                .with_partition(*index)
                .with_current_leader_epoch(*current)
                .with_leader_epoch(*epoch)
        })
        .collect();
    OffsetForLeaderEpochRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![
        OffsetForLeaderTopic::default().with_topic(topic_name(topic)).with_partitions(partitions),
    ])
}

fn delete(topic: &str, partitions: &[(i32, i64)]) -> DeleteRecordsRequest {
    let partitions = partitions
        .iter()
        .map(|(index, offset)| {
            DeleteRecordsPartition::default().with_partition_index(*index).with_offset(*offset)
        })
        .collect();
    DeleteRecordsRequest::default().with_timeout_ms(30_000).with_topics(vec![
        DeleteRecordsTopic::default().with_name(topic_name(topic)).with_partitions(partitions),
    ])
}

pub fn add(probes: &mut Probes) {
    for (what, timestamp) in [
        ("latest", -1),
        ("earliest", -2),
        ("largest timestamp", -3),
        ("earliest local", -4),
        ("latest tiered", -5),
        ("timestamp -6", -6),
        ("timestamp -99", -99),
        ("time zero", 0),
        ("a record's time", PLAIN_TIMESTAMP + 4000),
        ("between two records", PLAIN_TIMESTAMP + 4001),
        ("after the last record", PLAIN_TIMESTAMP + 1_000_000),
    ] {
        probes.one(&format!("ListOffsets/{what}"), ALL, move |_, v| list("plain", &[(0, timestamp, -1)], v));
        probes.one(&format!("ListOffsets/{what}, empty partition"), ALL, move |_, v| {
            list("empty", &[(0, timestamp, -1)], v)
        });
    }
    probes.one("ListOffsets/no topics", ALL, |_, _| {
        ListOffsetsRequest::default().with_replica_id(BrokerId(-1))
    });
    probes.one("ListOffsets/no partitions", ALL, |_, v| list("plain", &[], v));
    probes.one("ListOffsets/unknown topic", ALL, |_, v| list("nowhere", &[(0, -1, -1)], v));
    probes.one("ListOffsets/bad topic name", ALL, |_, v| list("no name!", &[(0, -1, -1)], v));
    for index in [3, -1] {
        probes.one(&format!("ListOffsets/partition {index}"), ALL, move |_, v| {
            list("plain", &[(index, -1, -1)], v)
        });
    }
    probes.one("ListOffsets/same partition twice", ALL, |_, v| list("plain", &[(0, -1, -1), (0, -2, -1)], v));
    for (what, shift) in [("right", 0), ("ahead", 5)] {
        probes.one(&format!("ListOffsets/leader epoch {what}"), (4, 10), move |bed, v| {
            list("plain", &[(0, -1, bed.epoch + shift)], v)
        });
    }
    probes.one("ListOffsets/leader epoch -2", (4, 10), |_, v| list("plain", &[(0, -1, -2)], v));
    probes.one("ListOffsets/isolation level 1", (2, 10), |_, v| {
        list("plain", &[(0, -1, -1)], v).with_isolation_level(1)
    });

    let all = (2, 4);
    probes
        .one("OffsetForLeaderEpoch/the current epoch", all, |bed, _| epochs("plain", &[(0, -1, bed.epoch)]));
    for (what, epoch) in [("a later epoch", 9), ("epoch -1", -1), ("epoch -5", -5)] {
        probes.one(&format!("OffsetForLeaderEpoch/{what}"), all, move |_, _| {
            epochs("plain", &[(0, -1, epoch)])
        });
    }
    for (what, shift) in [("right", 0), ("unknown", 9)] {
        probes.one(&format!("OffsetForLeaderEpoch/a current epoch that is {what}"), all, move |bed, _| {
            epochs("plain", &[(0, bed.epoch + shift, bed.epoch)])
        });
    }
    probes.one("OffsetForLeaderEpoch/unknown topic", all, |_, _| epochs("nowhere", &[(0, -1, 0)]));
    probes.one("OffsetForLeaderEpoch/unknown partition", all, |_, _| epochs("plain", &[(3, -1, 0)]));
    probes.one("OffsetForLeaderEpoch/no topics", all, |_, _| {
        OffsetForLeaderEpochRequest::default().with_replica_id(BrokerId(-1))
    });

    let all = (0, 2);
    for offset in [-1, -2, 100, i64::MAX] {
        probes
            .one(&format!("DeleteRecords/offset {offset}"), all, move |_, _| delete("empty", &[(0, offset)]));
    }
    probes.one("DeleteRecords/up to an offset", all, |_, version| {
        delete("trimmed", &[(0, i64::from(version) + 1)])
    });
    probes.one("DeleteRecords/below the start", all, |_, _| delete("trimmed", &[(0, 0)]));
    probes.one("DeleteRecords/unknown topic", all, |_, _| delete("nowhere", &[(0, 0)]));
    probes.one("DeleteRecords/unknown partition", all, |_, _| delete("plain", &[(3, 0), (-1, 0)]));
    probes.one("DeleteRecords/compacted topic", all, |_, _| delete("compacted", &[(0, 0)]));
    probes.one("DeleteRecords/no topics", all, |_, _| DeleteRecordsRequest::default().with_timeout_ms(1000));
    probes.exchange("DeleteRecords/internal topic", all, |bed, version| {
        super::groups::make_offsets_topic(bed)?;
        bed.ask(version, &delete("__consumer_offsets", &[(0, 0)]))
    });
    probes.exchange("Fetch/below a start that moved", (4, 12), |bed, version| {
        use kafka_protocol::messages::FetchRequest;
        use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
        let partition =
            FetchPartition::default().with_partition_max_bytes(1000).with_current_leader_epoch(-1);
        let topic = FetchTopic::default().with_topic(topic_name("trimmed")).with_partitions(vec![partition]);
        let fetch = FetchRequest::default().with_max_bytes(1000).with_topics(vec![topic]);
        bed.ask(version, &if version >= 7 { fetch.with_session_epoch(-1) } else { fetch })
    });
}
