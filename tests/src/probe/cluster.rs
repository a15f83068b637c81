//! ApiVersions, Metadata and what describes the cluster.

use bytes::{BufMut, BytesMut};
use kafka_protocol::messages::describe_log_dirs_request::DescribableLogDirTopic;
use kafka_protocol::messages::describe_topic_partitions_request::{Cursor, TopicRequest};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{
    ApiVersionsRequest, DescribeClusterRequest, DescribeLogDirsRequest, DescribeTopicPartitionsRequest,
    MetadataRequest,
};
use uuid::Uuid;

use super::{NOBODY, Probes};
use crate::wire::{text, topic_name};

const METADATA: (i16, i16) = (0, 13);

fn metadata(version: i16, names: &[&str]) -> MetadataRequest {
    let topics =
        names.iter().map(|name| MetadataRequestTopic::default().with_name(Some(topic_name(name)))).collect();
    flagged(version, MetadataRequest::default().with_topics(Some(topics)))
}

fn flagged(version: i16, request: MetadataRequest) -> MetadataRequest {
    // Creating on demand is off at the broker; asking for it shows what is answered then.
    if version >= 4 { request.with_allow_auto_topic_creation(true) } else { request }
}

pub fn add(probes: &mut Probes) {
    probes.one("ApiVersions/plain", (0, 4), |_, version| {
        let request = ApiVersionsRequest::default();
        if version >= 3 {
            request.with_client_software_name(text("probe")).with_client_software_version(text("1.0"))
        } else {
            request
        }
    });
    probes.one("ApiVersions/bad client name", (3, 4), |_, _| {
        ApiVersionsRequest::default()
            .with_client_software_name(text("-x-"))
            .with_client_software_version(text("1"))
    });
    probes.one("ApiVersions/no client name", (3, 4), |_, _| ApiVersionsRequest::default());
    probes.exchange("ApiVersions/unknown version", (0, 0), |bed, _| {
        let mut wire = bed.wire()?;
        let mut frame = BytesMut::new();
        frame.put_slice(&[0, 0, 0, 15, 0, 18, 0, 99, 0, 0, 0, 7, 0, 1, b'c', 0, 1, 1, 0]);
        wire.send_raw(&frame)?;
        let Some(answer) = wire.receive_frame()? else { return Ok("closed".into()) };
        // A body of version 0: correlation id, then the code.
        Ok(format!("error_code: {},", i16::from_be_bytes([answer[4], answer[5]])))
    });
    for (what, key, version) in [("key", 999i16, 0i16), ("version", 3, 99), ("Produce version", 0, 2)] {
        probes.exchange(&format!("Header/unknown {what}"), (0, 0), move |bed, _| {
            let mut wire = bed.wire()?;
            let mut frame = BytesMut::new();
            frame.put_i32(12);
            frame.put_i16(key);
            frame.put_i16(version);
            frame.put_slice(&[0, 0, 0, 7, 0, 1, b'c', 0]);
            let length = (frame.len() - 4) as u32;
            frame[..4].copy_from_slice(&length.to_be_bytes());
            wire.send_raw(&frame)?;
            Ok(if wire.receive_frame()?.is_some() { "answered" } else { "closed" }.to_string())
        });
    }
    probes.exchange("Header/shorter than one", (0, 0), |bed, _| {
        let mut wire = bed.wire()?;
        wire.send_raw(&[0, 0, 0, 2, 0, 3])?;
        Ok(if wire.receive_frame()?.is_some() { "answered" } else { "closed" }.to_string())
    });

    probes.one("Metadata/one topic", METADATA, |_, version| metadata(version, &["plain"]));
    probes.one("Metadata/unknown topic", METADATA, |_, version| metadata(version, &["nowhere"]));
    probes.one("Metadata/unknown topic beside a known one", METADATA, |_, version| {
        metadata(version, &["nowhere", "plain"])
    });
    for (what, name) in [("bad", "no name!"), ("empty", ""), ("dots", "..")] {
        probes.one(&format!("Metadata/{what} name"), METADATA, move |_, version| metadata(version, &[name]));
    }
    probes.one("Metadata/long name", METADATA, |_, version| metadata(version, &[&"x".repeat(250)]));
    probes.one("Metadata/colliding name", METADATA, |_, version| metadata(version, &["dotted_name"]));
    probes.one("Metadata/twice the same", METADATA, |_, version| metadata(version, &["plain", "plain"]));
    probes.one("Metadata/empty list", (1, 13), |_, version| metadata(version, &[]));
    probes.exchange("Metadata/all topics", METADATA, |bed, version| {
        let topics = if version == 0 { Some(Vec::new()) } else { None };
        let mut wire = bed.wire()?;
        let answer = wire.ask(version, &flagged(version, MetadataRequest::default().with_topics(topics)))?;
        let listed = answer.topics.iter().filter_map(|t| t.name.as_ref()).any(|n| n.as_str() == "plain");
        Ok(format!("plain is listed: {listed}, brokers: {}", answer.brokers.len()))
    });
    probes.one("Metadata/by id", (12, 13), |bed, version| {
        let topic = MetadataRequestTopic::default().with_topic_id(bed.id("plain")).with_name(None);
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/by id before its time", (10, 11), |bed, version| {
        let topic = MetadataRequestTopic::default()
            .with_topic_id(bed.id("plain"))
            .with_name(Some(topic_name("plain")));
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/null name before its time", (10, 11), |_, version| {
        let topic = MetadataRequestTopic::default().with_name(None);
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/unknown id", (12, 13), |_, version| {
        let topic = MetadataRequestTopic::default().with_topic_id(NOBODY).with_name(None);
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/neither name nor id", (12, 13), |_, version| {
        let topic = MetadataRequestTopic::default().with_topic_id(Uuid::nil()).with_name(None);
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/name and id of different topics", (12, 13), |bed, version| {
        let topic = MetadataRequestTopic::default()
            .with_topic_id(bed.id("plain"))
            .with_name(Some(topic_name("empty")));
        flagged(version, MetadataRequest::default().with_topics(Some(vec![topic])))
    });
    probes.one("Metadata/authorized operations", (8, 13), |_, version| {
        let request = metadata(version, &["plain"]).with_include_topic_authorized_operations(true);
        if version <= 10 { request.with_include_cluster_authorized_operations(true) } else { request }
    });

    let all = (0, 2);
    probes.one("DescribeCluster/plain", all, |_, _| DescribeClusterRequest::default());
    probes.one("DescribeCluster/authorized operations", all, |_, _| {
        DescribeClusterRequest::default().with_include_cluster_authorized_operations(true)
    });
    for endpoint in [0, 2, 9] {
        probes.one(&format!("DescribeCluster/endpoint type {endpoint}"), (1, 2), move |_, _| {
            DescribeClusterRequest::default().with_endpoint_type(endpoint)
        });
    }

    let partitions = |names: &[&str]| {
        let topics = names.iter().map(|name| TopicRequest::default().with_name(topic_name(name))).collect();
        DescribeTopicPartitionsRequest::default().with_topics(topics).with_response_partition_limit(2000)
    };
    let only = (0, 0);
    probes.one("DescribeTopicPartitions/two topics", only, move |_, _| partitions(&["plain", "empty"]));
    probes.one("DescribeTopicPartitions/unknown topic", only, move |_, _| partitions(&["nowhere"]));
    probes.one("DescribeTopicPartitions/bad name", only, move |_, _| partitions(&["no name!"]));
    probes.one("DescribeTopicPartitions/unsorted and twice", only, move |_, _| {
        partitions(&["plain", "empty", "plain"])
    });
    probes.one("DescribeTopicPartitions/limited", only, move |_, _| {
        partitions(&["plain", "empty"]).with_response_partition_limit(2)
    });
    for limit in [0, -1] {
        probes.one(&format!("DescribeTopicPartitions/limit {limit}"), only, move |_, _| {
            partitions(&["plain", "empty"]).with_response_partition_limit(limit)
        });
    }
    for (what, name, index) in
        [("inside", "plain", 1), ("before all", "a", 0), ("after all", "zzz", 0), ("negative", "plain", -1)]
    {
        probes.one(&format!("DescribeTopicPartitions/cursor {what}"), only, move |_, _| {
            let cursor = Cursor::default().with_topic_name(topic_name(name)).with_partition_index(index);
            partitions(&["plain", "empty"]).with_cursor(Some(cursor))
        });
    }

    let dirs = |topic: &str, partitions: Vec<i32>| {
        let topic =
            DescribableLogDirTopic::default().with_topic(topic_name(topic)).with_partitions(partitions);
        DescribeLogDirsRequest::default().with_topics(Some(vec![topic]))
    };
    let all = (1, 4);
    probes.one("DescribeLogDirs/one partition", all, move |_, _| dirs("plain", vec![0]));
    probes.one("DescribeLogDirs/unknown topic", all, move |_, _| dirs("nowhere", vec![0]));
    probes.one("DescribeLogDirs/unknown partition", all, move |_, _| dirs("plain", vec![9]));
    probes.one("DescribeLogDirs/no topics", all, |_, _| {
        DescribeLogDirsRequest::default().with_topics(Some(Vec::new()))
    });
}
