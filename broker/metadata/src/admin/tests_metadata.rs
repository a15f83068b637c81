use kafka_protocol::messages::describe_log_dirs_request::DescribableLogDirTopic;
use kafka_protocol::messages::describe_topic_partitions_request::{Cursor, TopicRequest};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{
    DescribeClusterRequest, DescribeLogDirsRequest, DescribeTopicPartitionsRequest,
    DescribeTopicPartitionsResponse, MetadataRequest,
};
use uuid::Uuid;

use super::testing::*;
use super::*;
use crate::broker_config::BrokerConfig;

fn named(name: &str) -> MetadataRequestTopic {
    MetadataRequestTopic::default().with_name(Some(topic(name)))
}

fn by_id(id: u128) -> MetadataRequestTopic {
    MetadataRequestTopic::default().with_name(None).with_topic_id(Uuid::from_u128(id))
}

fn asking(topics: Option<Vec<MetadataRequestTopic>>) -> MetadataRequest {
    MetadataRequest::default().with_topics(topics)
}

#[test]
fn all_topics_or_none_depends_on_the_version() {
    let image = image(&[("a", 2, 1), ("__consumer_offsets", 1, 2)]);
    let config = BrokerConfig::default();
    for version in 0..=13 {
        let all = if version == 0 { asking(Some(vec![])) } else { asking(None) };
        let plan = metadata(&wire(&all, version), version, &image, &config, live(&healthy));
        let response = wire(&plan.response, version);
        assert_eq!(response.topics.len(), 2, "{version}");
        let a = &response.topics[1];
        assert_eq!((a.error_code, a.partitions.len()), (0, 2));
        assert_eq!((a.partitions[1].leader_id.0, a.partitions[1].isr_nodes.len()), (NODE_ID, 1));
        assert_eq!((&*response.brokers[0].host, response.brokers[0].port), ("broker.example", 9092));
        if version >= 1 {
            assert_eq!(response.controller_id.0, NODE_ID);
            assert!(response.topics[0].is_internal && !a.is_internal);
        }
        if version >= 2 {
            assert_eq!(response.cluster_id.as_deref(), Some("cluster"));
        }
        if version >= 7 {
            assert_eq!(a.partitions[0].leader_epoch, 3);
        }
        if version >= 10 {
            assert_eq!(a.topic_id, Uuid::from_u128(1));
        }
        assert_eq!(
            (a.topic_authorized_operations, response.cluster_authorized_operations),
            (i32::MIN, i32::MIN)
        );
        assert!(plan.to_create.is_empty());
        if version >= 1 {
            let none =
                metadata(&wire(&asking(Some(vec![])), version), version, &image, &config, live(&healthy));
            assert!(none.response.topics.is_empty());
        }
    }
}

#[test]
fn unknown_names_are_created_when_the_client_and_the_broker_agree() {
    let image = image(&[("a.b", 1, 1)]);
    let on = BrokerConfig::default();
    let off = config(&[("auto.create.topics.enable", "false")]);
    for version in 0..=13 {
        let topics = ["new", "new", "a_b", "no good", "__consumer_offsets", "__cluster_metadata"];
        let request = asking(Some(topics.iter().map(|name| named(name)).collect()));
        let request = wire(&request, version);
        let plan = metadata(&request, version, &image, &on, live(&healthy));
        let codes: Vec<_> = wire(&plan.response, version).topics.iter().map(|t| t.error_code).collect();
        assert_eq!(codes, [3, 17, 17, 3, 3], "{version}");
        assert_eq!(plan.to_create, ["__consumer_offsets", "new"]);
        let plan = metadata(&request, version, &image, &off, live(&healthy));
        let codes: Vec<_> = plan.response.topics.iter().map(|t| t.error_code).collect();
        assert_eq!((codes, plan.to_create.len()), (vec![3, 3, 17, 3, 3], 0));
        let quiet = request.with_allow_auto_topic_creation(false);
        let plan = metadata(&quiet, version, &image, &on, live(&healthy));
        assert_eq!(plan.to_create.is_empty(), version >= 4, "{version}");
    }
}

#[test]
fn one_request_creates_a_bounded_number_of_topics() {
    let request = asking(Some((0..1500).map(|i| named(&format!("t{i}"))).collect()));
    let plan = metadata(&request, 9, &image(&[]), &BrokerConfig::default(), live(&healthy));
    assert_eq!((plan.response.topics.len(), plan.to_create.len()), (1500, 1000));
}

#[test]
fn topics_are_found_by_id_from_version_12() {
    let image = image(&[("a", 1, 1)]);
    let config = BrokerConfig::default();
    for version in 12..=13 {
        let request = wire(&asking(Some(vec![by_id(1), by_id(9), by_id(0)])), version);
        let plan = metadata(&request, version, &image, &config, live(&healthy));
        let response = wire(&plan.response, version);
        let found: Vec<_> = response
            .topics
            .iter()
            .map(|t| (t.error_code, t.name.as_deref().map(|n| n.to_string())))
            .collect();
        assert_eq!(found, [(0, Some("a".to_string())), (100, None), (42, None)]);
        assert_eq!(response.topics[1].topic_id, Uuid::from_u128(9));
        assert!(plan.to_create.is_empty());
    }
    for version in 10..=11 {
        let request = asking(Some(vec![by_id(1).with_name(Some(topic("a")))]));
        let plan = metadata(&wire(&request, version), version, &image, &config, live(&healthy));
        assert_eq!(wire(&plan.response, version).topics[0].error_code, 42);
    }
}

#[test]
fn damaged_partitions_have_no_leader() {
    let image = image(&[("a", 2, 1)]);
    let status = |group: u64| PartitionStatus { damaged: group == 2, ..healthy(group) };
    for version in 0..=13 {
        let request = asking(Some(vec![named("a")]));
        let plan = metadata(&request, version, &image, &BrokerConfig::default(), live(&status));
        let response = wire(&plan.response, version);
        let [good, bad] = &response.topics[0].partitions[..] else { panic!() };
        assert_eq!((good.error_code, bad.error_code, bad.leader_id.0), (0, 5, -1));
        assert!(bad.isr_nodes.is_empty() && (version < 5 || bad.offline_replicas.len() == 1));
    }
}

#[test]
fn operations_are_listed_when_asked_for() {
    let image = image(&[("a", 1, 1)]);
    let request = asking(None)
        .with_include_topic_authorized_operations(true)
        .with_include_cluster_authorized_operations(true);
    for version in 0..=13 {
        let plan = metadata(&request, version, &image, &BrokerConfig::default(), live(&healthy));
        let response = wire(&plan.response, version);
        let topic_operations = response.topics[0].topic_authorized_operations;
        assert_eq!(topic_operations, if version >= 8 { 3576 } else { i32::MIN });
        let asked = (8..=10).contains(&version);
        assert_eq!(response.cluster_authorized_operations, if asked { 8096 } else { i32::MIN });
    }
}

#[test]
fn a_dynamic_switch_counts() {
    let mut image = image(&[]);
    let set = [("auto.create.topics.enable".to_string(), Some("false".to_string()))].into();
    image.apply(&crate::Command::SetBrokerConfigs { node_id: None, set }).unwrap();
    let request = asking(Some(vec![named("new")]));
    let plan = metadata(&request, 9, &image, &BrokerConfig::default(), live(&healthy));
    assert!(plan.to_create.is_empty());
}

#[test]
fn the_cluster_is_described() {
    let image = image(&[]);
    for version in 0..=2 {
        let request = DescribeClusterRequest::default().with_include_cluster_authorized_operations(true);
        let response =
            wire(&describe_cluster(&wire(&request, version), version, &image, live(&healthy)), version);
        assert_eq!((response.error_code, &*response.cluster_id), (0, "cluster"));
        assert_eq!((response.controller_id.0, response.brokers.len()), (NODE_ID, 1));
        assert_eq!(response.brokers[0].rack.as_deref(), Some("r1"));
        assert_eq!(response.cluster_authorized_operations, 8096);
    }
    for (endpoint, code) in [(2, 114), (3, 115), (0, 115)] {
        let request = DescribeClusterRequest::default().with_endpoint_type(endpoint);
        let response = wire(&describe_cluster(&request, 1, &image, live(&healthy)), 1);
        assert_eq!((response.error_code, response.brokers.len()), (code, 0));
    }
}

fn page(
    image: &crate::MetadataImage,
    names: &[&str],
    cursor: Option<(&str, i32)>,
    limit: i32,
) -> DescribeTopicPartitionsResponse {
    let request = DescribeTopicPartitionsRequest::default()
        .with_topics(names.iter().map(|n| TopicRequest::default().with_name(topic(n))).collect())
        .with_response_partition_limit(limit)
        .with_cursor(
            cursor.map(|(name, at)| Cursor::default().with_topic_name(topic(name)).with_partition_index(at)),
        );
    wire(&describe_topic_partitions(&wire(&request, 0), image, live(&healthy)), 0)
}

fn shape(response: &DescribeTopicPartitionsResponse) -> Vec<(String, i16, Vec<i32>)> {
    let topic = |t: &kafka_protocol::messages::describe_topic_partitions_response::DescribeTopicPartitionsResponseTopic| {
        let partitions = t.partitions.iter().map(|p| p.partition_index).collect();
        (t.name.as_ref().map(|n| n.to_string()).unwrap_or_default(), t.error_code, partitions)
    };
    response.topics.iter().map(topic).collect()
}

#[test]
fn topic_partitions_come_in_pages() {
    let image = image(&[("a", 3, 1), ("b", 2, 2)]);
    let whole = page(&image, &[], None, 2000);
    assert_eq!(shape(&whole), [("a".into(), 0, vec![0, 1, 2]), ("b".into(), 0, vec![0, 1])]);
    assert!(whole.next_cursor.is_none());
    let first = page(&image, &[], None, 2);
    assert_eq!(shape(&first), [("a".into(), 0, vec![0, 1])]);
    let next = first.next_cursor.as_ref().map(|c| (c.topic_name.to_string(), c.partition_index));
    assert_eq!(next, Some(("a".into(), 2)));
    let second = page(&image, &[], Some(("a", 2)), 1);
    assert_eq!(shape(&second), [("a".into(), 0, vec![2])]);
    let next = second.next_cursor.as_ref().map(|c| (c.topic_name.to_string(), c.partition_index));
    assert_eq!(next, Some(("b".into(), 0)));
    let last = page(&image, &[], Some(("b", 0)), 9);
    assert_eq!((shape(&last).len(), last.next_cursor.is_none()), (1, true));
    let some = page(&image, &["zz", "b", "b", "x y"], None, 0);
    assert_eq!(shape(&some), [("b".into(), 0, vec![0])]);
    let some = page(&image, &["zz", "b", "x y"], None, 10);
    assert_eq!(
        shape(&some),
        [("b".into(), 0, vec![0, 1]), ("x y".into(), 17, vec![]), ("zz".into(), 3, vec![])]
    );
    // A cursor from nowhere neither panics nor loops.
    assert_eq!(shape(&page(&image, &["a"], Some(("a", i32::MAX)), 5)), [("a".into(), 0, vec![])]);
    assert!(shape(&page(&image, &[], Some(("zzz", -1)), 5)).is_empty());
}

#[test]
fn log_dirs_carry_the_sizes() {
    let image = image(&[("a", 2, 1), ("b", 1, 2)]);
    let dir = LogDir { path: "/data", total_bytes: 1000, usable_bytes: 10 };
    for version in 1..=4 {
        let all = wire(&DescribeLogDirsRequest::default().with_topics(None), version);
        let response = wire(&describe_log_dirs(&all, version, &image, dir, &healthy), version);
        let result = &response.results[0];
        assert_eq!((&*result.log_dir, result.topics.len(), result.error_code), ("/data", 2, 0));
        assert_eq!(result.topics[0].partitions[1].partition_size, 100);
        assert_eq!(result.total_bytes, if version >= 4 { 1000 } else { -1 });
        let asked = |name: &str, partitions: Vec<i32>| {
            DescribableLogDirTopic::default().with_topic(topic(name)).with_partitions(partitions)
        };
        let some = DescribeLogDirsRequest::default().with_topics(Some(vec![
            asked("a", vec![1, 7]),
            asked("nope", vec![0]),
            asked("b", vec![5]),
        ]));
        let response = wire(&describe_log_dirs(&some, version, &image, dir, &healthy), version);
        let topics = &response.results[0].topics;
        assert_eq!((topics.len(), topics[0].partitions.len()), (1, 1));
        assert_eq!(topics[0].partitions[0].partition_index, 1);
    }
}
