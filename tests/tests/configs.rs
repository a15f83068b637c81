//! Configurations altered over the protocol while the broker runs: where they come from, and that they count at once.

use flumen_protocol::error_code::ErrorCode;
use flumen_tests::flumen::Flumen;
use flumen_tests::wire::{Wire, batch, produce, text, topic_name};
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::DescribeConfigsResourceResult;
use kafka_protocol::messages::incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{
    DeleteTopicsRequest, DescribeConfigsRequest, IncrementalAlterConfigsRequest, MetadataRequest,
};
use kafka_protocol::protocol::StrBytes;
use serde_json::json;

const TOPIC: i8 = 2;
const BROKER: i8 = 4;
const GROUP: i8 = 32;

/// Sets, or with `None` deletes.
fn alter(wire: &mut Wire, kind: i8, resource: &str, name: &str, value: Option<&str>) -> ErrorCode {
    let config = AlterableConfig::default()
        .with_name(text(name))
        .with_config_operation(i8::from(value.is_none()))
        .with_value(value.map(text));
    let resource = AlterConfigsResource::default()
        .with_resource_type(kind)
        .with_resource_name(text(resource))
        .with_configs(vec![config]);
    let request = IncrementalAlterConfigsRequest::default().with_resources(vec![resource]);
    ErrorCode(wire.ask(1, &request).unwrap().responses[0].error_code)
}

fn described(wire: &mut Wire, kind: i8, resource: &str, name: &str) -> DescribeConfigsResourceResult {
    let resource = DescribeConfigsResource::default()
        .with_resource_type(kind)
        .with_resource_name(text(resource))
        .with_configuration_keys(Some(vec![text(name)]));
    let request =
        DescribeConfigsRequest::default().with_resources(vec![resource]).with_include_synonyms(true);
    let mut response = wire.ask(4, &request).unwrap();
    assert_eq!(response.results[0].error_code, 0);
    response.results[0].configs.remove(0)
}

/// Value, source, and the synonyms as (name, value, source).
fn summary(found: &DescribeConfigsResourceResult) -> (String, i8, Vec<(String, String, i8)>) {
    let value = |v: &Option<StrBytes>| v.as_deref().unwrap_or("null").to_string();
    let synonyms = found.synonyms.iter().map(|s| (s.name.to_string(), value(&s.value), s.source)).collect();
    (value(&found.value), found.config_source, synonyms)
}

fn partitions_of(wire: &mut Wire, topic: &str) -> Result<usize, ErrorCode> {
    let request = MetadataRequest::default()
        .with_allow_auto_topic_creation(true)
        .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(topic_name(topic)))]));
    let answer = wire.ask(12, &request).unwrap();
    match ErrorCode(answer.topics[0].error_code) {
        ErrorCode::NONE => Ok(answer.topics[0].partitions.len()),
        error => Err(error),
    }
}

#[test]
fn broker_configs_count_at_once_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut flumen = Flumen::start(dir.path(), &["num.partitions=2"]).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let of = |name: &str, value: &str, source: i8| (name.to_string(), value.to_string(), source);
    let fixed = [of("num.partitions", "2", 4), of("num.partitions", "1", 5)];
    assert_eq!(
        summary(&described(&mut wire, BROKER, "1", "num.partitions")),
        ("2".into(), 4, fixed.to_vec())
    );
    assert_eq!(partitions_of(&mut wire, "first"), Ok(2));

    // For all brokers, then for this one, which counts first.
    assert_eq!(alter(&mut wire, BROKER, "", "num.partitions", Some("3")), ErrorCode::NONE);
    assert_eq!(partitions_of(&mut wire, "second"), Ok(3));
    assert_eq!(alter(&mut wire, BROKER, "1", "num.partitions", Some("5")), ErrorCode::NONE);
    assert_eq!(partitions_of(&mut wire, "third"), Ok(5));
    let layers = [&[of("num.partitions", "5", 2), of("num.partitions", "3", 3)][..], &fixed].concat();
    let expected = ("5".to_string(), 2, layers);
    assert_eq!(summary(&described(&mut wire, BROKER, "1", "num.partitions")), expected);
    assert_eq!(summary(&described(&mut wire, BROKER, "", "num.partitions")).1, 3);

    assert_eq!(alter(&mut wire, BROKER, "1", "message.max.bytes", Some("1000")), ErrorCode::NONE);
    let large = batch(&[&"x".repeat(1000)], |_| {});
    let error = |wire: &mut Wire| {
        let answer = wire.ask(9, &produce("first", 0, -1, Some(large.clone()))).unwrap();
        ErrorCode(answer.responses[0].partition_responses[0].error_code)
    };
    assert_eq!(error(&mut wire), ErrorCode::MESSAGE_TOO_LARGE);
    assert_eq!(summary(&described(&mut wire, TOPIC, "first", "max.message.bytes")).1, 2);
    // The topic's own value counts before the broker's.
    assert_eq!(alter(&mut wire, TOPIC, "first", "max.message.bytes", Some("5000")), ErrorCode::NONE);
    assert_eq!(error(&mut wire), ErrorCode::NONE);
    assert_eq!(alter(&mut wire, TOPIC, "first", "max.message.bytes", None), ErrorCode::NONE);
    assert_eq!(error(&mut wire), ErrorCode::MESSAGE_TOO_LARGE);

    assert_eq!(alter(&mut wire, BROKER, "", "auto.create.topics.enable", Some("false")), ErrorCode::NONE);
    assert_eq!(partitions_of(&mut wire, "fourth"), Err(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION));
    assert_eq!(alter(&mut wire, BROKER, "", "delete.topic.enable", Some("false")), ErrorCode::NONE);
    let delete = DeleteTopicsRequest::default().with_topic_names(vec![topic_name("second")]);
    assert_eq!(wire.ask(5, &delete).unwrap().responses[0].error_code, ErrorCode::TOPIC_DELETION_DISABLED.0);
    assert!(flumen.call("DELETE", "/v1/topics/second", None).is_err());
    assert_eq!(alter(&mut wire, GROUP, "g", "consumer.session.timeout.ms", Some("50000")), ErrorCode::NONE);

    assert_eq!(alter(&mut wire, BROKER, "1", "node.id", Some("7")), ErrorCode::INVALID_REQUEST);
    assert_eq!(alter(&mut wire, BROKER, "1", "num.partitions", Some("0")), ErrorCode::INVALID_REQUEST);
    assert_eq!(alter(&mut wire, BROKER, "9", "num.partitions", Some("3")), ErrorCode::INVALID_REQUEST);

    flumen.kill_9();
    flumen.restart().unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    assert_eq!(summary(&described(&mut wire, BROKER, "1", "num.partitions")), expected);
    assert_eq!(error(&mut wire), ErrorCode::MESSAGE_TOO_LARGE);
    assert_eq!(partitions_of(&mut wire, "fourth"), Err(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION));
    let session = summary(&described(&mut wire, GROUP, "g", "consumer.session.timeout.ms"));
    assert_eq!((session.0.as_str(), session.1), ("50000", 8));
    for name in ["auto.create.topics.enable", "num.partitions"] {
        assert_eq!(alter(&mut wire, BROKER, "", name, None), ErrorCode::NONE);
    }
    assert_eq!(alter(&mut wire, BROKER, "1", "num.partitions", None), ErrorCode::NONE);
    assert_eq!(partitions_of(&mut wire, "fourth"), Ok(2));
}

#[test]
fn retention_of_the_broker_reaches_topics_that_set_none() {
    let dir = tempfile::tempdir().unwrap();
    let flumen = Flumen::start(dir.path(), &[]).unwrap();
    flumen.create_topic("short", 1, &json!({ "segment.bytes": "1048576" })).unwrap();
    flumen.create_topic("long", 1, &json!({ "segment.bytes": "1048576", "retention.bytes": "-1" })).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let value = "x".repeat(500_000);
    for topic in ["short", "long"] {
        for _ in 0..12 {
            let answer = wire.ask(9, &produce(topic, 0, -1, Some(batch(&[&value], |_| {})))).unwrap();
            assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
        }
    }
    assert_eq!(alter(&mut wire, BROKER, "", "log.retention.bytes", Some("2000000")), ErrorCode::NONE);
    let start = |topic: &str| {
        flumen.get(&format!("/v1/topics/{topic}")).unwrap()["partition_list"][0]["log_start_offset"]
            .as_i64()
            .unwrap()
    };
    while start("short") == 0 {
        std::thread::yield_now();
    }
    assert_eq!(start("long"), 0);
}
