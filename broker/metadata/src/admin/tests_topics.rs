use kafka_protocol::messages::create_partitions_request::{
    CreatePartitionsAssignment, CreatePartitionsTopic,
};
use kafka_protocol::messages::create_topics_request::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfig,
};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::{BrokerId, CreatePartitionsRequest, CreateTopicsRequest, DeleteTopicsRequest};
use uuid::Uuid;

use super::testing::*;
use super::*;
use crate::broker_config::BrokerConfig;
use crate::placement::NodeHealth;

fn new(name: &str, partitions: i32, replication_factor: i16) -> CreatableTopic {
    CreatableTopic::default()
        .with_name(topic(name))
        .with_num_partitions(partitions)
        .with_replication_factor(replication_factor)
}

fn with_config(topic: CreatableTopic, name: &str, value: Option<&str>) -> CreatableTopic {
    topic.with_configs(vec![CreatableTopicConfig::default().with_name(s(name)).with_value(value.map(s))])
}

fn assigned(name: &str, assignments: &[(i32, &[i32])]) -> CreatableTopic {
    let assignments = assignments
        .iter()
        .map(|(index, brokers)| {
            CreatableReplicaAssignment::default()
                .with_partition_index(*index)
                .with_broker_ids(brokers.iter().copied().map(BrokerId).collect())
        })
        .collect();
    new(name, -1, -1).with_assignments(assignments)
}

fn creating(topics: Vec<CreatableTopic>) -> CreateTopicsRequest {
    CreateTopicsRequest::default().with_topics(topics)
}

#[test]
fn topics_are_created_with_defaults_in_every_version() {
    let config = config(&[("num.partitions", "4")]);
    for version in 2..=7 {
        let mut image = image(&[]);
        let topics = vec![with_config(new("a", -1, -1), "retention.ms", Some(" 5 ")), new("b", 2, 1)];
        let request = wire(&creating(topics), version);
        let plan = create_topics(&request, version, &image, &config, NodeHealth::ALL_WELL, ids());
        let response = wire(&plan.response, version);
        assert!(response.topics.iter().all(|t| t.error_code == 0 && t.error_message.is_none()));
        if version >= 5 {
            let a = &response.topics[0];
            assert_eq!((a.num_partitions, a.replication_factor), (4, 1));
            let configs = a.configs.as_ref().unwrap();
            let retention = configs.iter().find(|c| &*c.name == "retention.ms").unwrap();
            assert_eq!((retention.value.as_deref(), retention.config_source), (Some("5"), 1));
            let policy = configs.iter().find(|c| &*c.name == "cleanup.policy").unwrap();
            assert_eq!((policy.value.as_deref(), policy.config_source), (Some("delete"), 5));
        }
        if version >= 7 {
            assert_eq!(response.topics[1].topic_id, Uuid::from_u128(1001));
        }
        assert_eq!(commit(&mut image, &plan).iter().map(|a| a.created.len()).sum::<usize>(), 6);
        assert_eq!(image.topics["a"].effective.retention_ms, 5);
    }
}

#[test]
fn creation_is_refused_for_kafkas_reasons() {
    let image = image(&[("here", 1, 1), ("a.b", 1, 2)]);
    let config = BrokerConfig::default();
    for (asked, code) in [
        (new("here", 1, 1), 36),
        (new("a_b", 1, 1), 17),
        (new("bad name", 1, 1), 17),
        (new("", 1, 1), 17),
        (new("..", 1, 1), 17),
        (new("__cluster_metadata", 1, 1), 42),
        (new("t", 0, 1), 37),
        (new("t", -2, 1), 37),
        (new("t", 1, 0), 38),
        (new("t", 1, -2), 38),
        (new("t", 1, 2), 38),
        (new("t", 10_001, 1), 44),
        (new("t", i32::MAX, 1), 44),
        (with_config(new("t", 1, 1), "nope", Some("1")), 40),
        (with_config(new("t", 1, 1), "retention.ms", Some("soon")), 40),
        (with_config(new("t", 1, 1), "segment.bytes", Some("1024")), 40),
        (with_config(new("t", 1, 1), "retention.ms", None), 40),
        (assigned("t", &[(0, &[2])]), 39),
        (assigned("t", &[(0, &[])]), 39),
        (assigned("t", &[(0, &[1, 1])]), 39),
        (assigned("t", &[(0, &[1]), (0, &[1])]), 39),
        (assigned("t", &[(1, &[1])]), 39),
        (assigned("t", &[(0, &[1]), (2, &[1])]), 39),
        (assigned("t", &[(0, &[1])]).with_num_partitions(1), 42),
        (assigned("t", &[(0, &[1])]).with_replication_factor(1), 42),
    ] {
        for version in 2..=7 {
            let request = creating(vec![asked.clone(), new("fine", 1, 1)]);
            let plan = create_topics(&request, version, &image, &config, NodeHealth::ALL_WELL, ids());
            let response = wire(&plan.response, version);
            assert_eq!(response.topics[0].error_code, code, "{asked:?}");
            assert!(response.topics[0].error_message.is_some());
            assert_eq!(response.topics[1].error_code, 0);
            assert_eq!(plan.commands.len(), 1);
        }
    }
}

#[test]
fn assignments_give_the_partition_count() {
    let mut image = image(&[]);
    let request = creating(vec![assigned("t", &[(1, &[1]), (0, &[1])])]);
    let plan = create_topics(&request, 7, &image, &BrokerConfig::default(), NodeHealth::ALL_WELL, ids());
    commit(&mut image, &plan);
    assert_eq!(image.topics["t"].partitions.len(), 2);
}

#[test]
fn validate_only_creates_nothing() {
    let request = creating(vec![new("a", 2, 1), new("b", 0, 1)]).with_validate_only(true);
    let plan = create_topics(&request, 7, &image(&[]), &BrokerConfig::default(), NodeHealth::ALL_WELL, ids());
    assert!(plan.commands.is_empty());
    assert_eq!((plan.response.topics[0].error_code, plan.response.topics[1].error_code), (0, 37));
    assert_eq!(plan.response.topics[0].num_partitions, 2);
    assert_ne!(plan.response.topics[0].topic_id, Uuid::nil(), "Kafka tells one as well");
}

#[test]
fn a_request_is_one_batch() {
    let config = BrokerConfig::default();
    let request = creating(vec![new("a", 1, 1), new("a", 1, 1), new("b.c", 1, 1), new("b_c", 1, 1)]);
    let plan = create_topics(&request, 7, &image(&[]), &config, NodeHealth::ALL_WELL, ids());
    let codes: Vec<_> = plan.response.topics.iter().map(|t| (t.name.to_string(), t.error_code)).collect();
    assert_eq!(codes, [("a".to_string(), 42), ("b.c".to_string(), 0), ("b_c".to_string(), 17)]);
    let request = creating((0..3).map(|i| new(&format!("t{i}"), 4000, 1)).collect());
    let plan = create_topics(&request, 7, &image(&[]), &config, NodeHealth::ALL_WELL, ids());
    let codes: Vec<_> = plan.response.topics.iter().map(|t| t.error_code).collect();
    assert_eq!(codes, [0, 0, 44]);
    // Too few ids is the caller's mistake and no reason to panic.
    let plan =
        create_topics(&creating(vec![new("a", 1, 1)]), 7, &image(&[]), &config, NodeHealth::ALL_WELL, []);
    assert_eq!((plan.response.topics[0].error_code, plan.commands.len()), (-1, 0));
}

#[test]
fn removed_configs_are_dropped_and_the_offsets_topic_is_compacted() {
    let mut image = image(&[]);
    let old = with_config(new("old", 1, 1), "message.format.version", Some("2.8"));
    let request = creating(vec![old, new("__consumer_offsets", 3, 1)]);
    let plan = create_topics(&request, 7, &image, &BrokerConfig::default(), NodeHealth::ALL_WELL, ids());
    commit(&mut image, &plan);
    assert!(image.topics["old"].configs.is_empty());
    assert!(
        image.topics["__consumer_offsets"].effective.compacts()
            && image.topics["__consumer_offsets"].internal
    );
}

#[test]
fn failed_commits_take_successes_back() {
    let request = creating(vec![new("a", 1, 1), new("b", 0, 1)]);
    let mut plan =
        create_topics(&request, 7, &image(&[]), &BrokerConfig::default(), NodeHealth::ALL_WELL, ids());
    plan.response.fail(ErrorCode::REQUEST_TIMED_OUT);
    let codes: Vec<_> = plan.response.topics.iter().map(|t| t.error_code).collect();
    assert_eq!(codes, [7, 37]);
    assert!(plan.response.topics[0].topic_id.is_nil());
    for version in 2..=7 {
        wire(&plan.response, version);
    }
}

#[test]
fn the_broker_makes_topics_by_itself() {
    let id = Uuid::from_u128(5);
    let mut image = image(&[("here", 1, 1), ("a.b", 1, 2)]);
    let on = config(&[("num.partitions", "4"), ("offsets.topic.num.partitions", "7")]);
    let commands = plan_auto_create(&image, &on, NodeHealth::ALL_WELL, "new", id).unwrap();
    assert_eq!(image.apply(&commands[0]).unwrap().created.len(), 4);
    assert_eq!(plan_auto_create(&image, &on, NodeHealth::ALL_WELL, "here", id), Ok(vec![]));
    let code = |name: &str, config: &BrokerConfig| {
        plan_auto_create(&image, config, NodeHealth::ALL_WELL, name, id).unwrap_err().code.0
    };
    assert_eq!((code("a_b", &on), code("x y", &on), code("__cluster_metadata", &on)), (17, 17, 42));
    assert_eq!(code("t", &config(&[("auto.create.topics.enable", "false")])), 3);
    let commands =
        plan_auto_create(&image, &on, NodeHealth::ALL_WELL, "__consumer_offsets", Uuid::from_u128(6))
            .unwrap();
    assert_eq!(commands, plan_offsets_topic(&image, &on, NodeHealth::ALL_WELL, Uuid::from_u128(6)));
    assert_eq!(image.apply(&commands[0]).unwrap().created.len(), 7);
    assert!(plan_offsets_topic(&image, &on, NodeHealth::ALL_WELL, id).is_empty());
}

fn deleting(version: i16, names: &[&str], by_id: &[u128]) -> DeleteTopicsRequest {
    if version < 6 {
        return DeleteTopicsRequest::default().with_topic_names(names.iter().map(|n| topic(n)).collect());
    }
    let named = names.iter().map(|n| DeleteTopicState::default().with_name(Some(topic(n))));
    let ids = by_id
        .iter()
        .map(|id| DeleteTopicState::default().with_name(None).with_topic_id(Uuid::from_u128(*id)));
    DeleteTopicsRequest::default().with_topics(named.chain(ids).collect())
}

#[test]
fn topics_are_deleted_by_name_and_id() {
    let config = BrokerConfig::default();
    for version in 1..=6 {
        let mut image = image(&[("a", 1, 1), ("b", 2, 2), ("__consumer_offsets", 1, 3)]);
        let request = wire(&deleting(version, &["a", "nope", "__consumer_offsets"], &[2, 9, 0]), version);
        let plan = delete_topics(&request, version, &image, &config);
        let response = wire(&plan.response, version);
        let codes: Vec<_> = response.responses.iter().map(|r| r.error_code).collect();
        assert_eq!(codes, if version >= 6 { vec![0, 3, 42, 0, 100, 42] } else { vec![0, 3, 42] });
        if version >= 6 {
            assert_eq!(response.responses[0].topic_id, Uuid::from_u128(1));
            assert_eq!(response.responses[3].name.as_deref().map(|n| n.as_str()), Some("b"));
            assert_eq!(response.responses[4].name, None);
        }
        commit(&mut image, &plan);
        assert_eq!(image.topics.len(), if version >= 6 { 1 } else { 2 });
    }
}

#[test]
fn deletion_is_refused_when_disabled_or_ambiguous() {
    let image = image(&[("a", 1, 1), ("b", 1, 2)]);
    let off = config(&[("delete.topic.enable", "false")]);
    let plan = delete_topics(&deleting(6, &["a"], &[2]), 6, &image, &off);
    assert!(plan.response.responses.iter().all(|r| r.error_code == 73) && plan.commands.is_empty());
    let on = BrokerConfig::default();
    // The same topic by name and by id, or by name twice: one refusal for both.
    let plan = delete_topics(&deleting(6, &["a", "b"], &[1]), 6, &image, &on);
    let codes: Vec<_> = plan.response.responses.iter().map(|r| r.error_code).collect();
    assert_eq!((codes, plan.commands.len()), (vec![42, 0], 1));
    let plan = delete_topics(&deleting(5, &["a", "b", "a"], &[]), 5, &image, &on);
    let codes: Vec<_> = plan.response.responses.iter().map(|r| r.error_code).collect();
    assert_eq!((codes, plan.commands.len()), (vec![42, 0], 1));
    let both = DeleteTopicState::default().with_name(Some(topic("a"))).with_topic_id(Uuid::from_u128(1));
    let plan = delete_topics(&DeleteTopicsRequest::default().with_topics(vec![both]), 6, &image, &on);
    assert_eq!(plan.response.responses[0].error_code, 42);
    let mut plan = delete_topics(&deleting(5, &["a", "nope"], &[]), 5, &image, &on);
    plan.response.fail(ErrorCode::NOT_CONTROLLER);
    let codes: Vec<_> = plan.response.responses.iter().map(|r| r.error_code).collect();
    assert_eq!(codes, [41, 3]);
}

fn growing(name: &str, count: i32, assignments: Option<&[&[i32]]>) -> CreatePartitionsTopic {
    let assignments = assignments.map(|lists| {
        lists
            .iter()
            .map(|l| {
                CreatePartitionsAssignment::default()
                    .with_broker_ids(l.iter().copied().map(BrokerId).collect())
            })
            .collect()
    });
    CreatePartitionsTopic::default().with_name(topic(name)).with_count(count).with_assignments(assignments)
}

#[test]
fn partitions_are_added_and_never_taken() {
    let mut image = image(&[("a", 2, 1), ("b", 1, 2), ("__consumer_offsets", 1, 3)]);
    for (asked, code) in [
        (growing("a", 2, None), 37),
        (growing("a", 1, None), 37),
        (growing("a", 0, None), 37),
        (growing("a", -5, None), 37),
        (growing("nope", 3, None), 3),
        (growing("a", 20_000, None), 44),
        (growing("a", i32::MAX, None), 44),
        (growing("__consumer_offsets", 2, None), 42),
        (growing("a", 4, Some(&[&[1]])), 39),
        (growing("a", 3, Some(&[&[2]])), 39),
        (growing("a", 3, Some(&[&[]])), 39),
    ] {
        for version in 0..=3 {
            let topics = vec![asked.clone(), growing("b", 2, None)];
            let request = wire(&CreatePartitionsRequest::default().with_topics(topics), version);
            let plan = create_partitions(&request, &image, NodeHealth::ALL_WELL);
            let response = wire(&plan.response, version);
            assert_eq!(response.results[0].error_code, code, "{asked:?}");
            assert_eq!((response.results[1].error_code, plan.commands.len()), (0, 1));
        }
    }
    let grow = CreatePartitionsRequest::default().with_topics(vec![growing("a", 3, Some(&[&[1]]))]);
    let dry = create_partitions(&grow.clone().with_validate_only(true), &image, NodeHealth::ALL_WELL);
    assert!(dry.commands.is_empty() && dry.response.results[0].error_code == 0);
    let mut plan = create_partitions(&grow, &image, NodeHealth::ALL_WELL);
    commit(&mut image, &plan);
    assert_eq!(image.topics["a"].partitions.len(), 3);
    plan.response.fail(ErrorCode::REQUEST_TIMED_OUT);
    assert_eq!(plan.response.results[0].error_code, 7);
    let twice =
        CreatePartitionsRequest::default().with_topics(vec![growing("b", 2, None), growing("b", 3, None)]);
    let plan = create_partitions(&twice, &image, NodeHealth::ALL_WELL);
    assert_eq!((plan.response.results.len(), plan.response.results[0].error_code), (1, 42));
}
