//! CreateTopics, DeleteTopics, CreatePartitions.

use kafka_protocol::messages::create_partitions_request::{
    CreatePartitionsAssignment, CreatePartitionsTopic,
};
use kafka_protocol::messages::create_topics_request::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfig,
};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::{BrokerId, CreatePartitionsRequest, CreateTopicsRequest, DeleteTopicsRequest};

use super::{Bed, NOBODY, Probes};
use crate::wire::{text, topic_name};

const CREATE: (i16, i16) = (2, 7);
const DELETE: (i16, i16) = (1, 6);
const GROW: (i16, i16) = (0, 3);

/// The one broker of either kind.
const NODE: i32 = 1;

/// What a topic's partitions are assigned to.
const ASSIGNMENTS: &[(&str, &[(i32, &[i32])])] = &[
    ("good", &[(0, &[NODE]), (1, &[NODE])]),
    ("with a gap", &[(0, &[NODE]), (2, &[NODE])]),
    ("not from zero", &[(1, &[NODE])]),
    ("twice", &[(0, &[NODE]), (0, &[NODE])]),
    ("to nobody", &[(0, &[])]),
    ("to an unknown broker", &[(0, &[77])]),
    ("to one broker twice", &[(0, &[NODE, NODE])]),
    ("negative", &[(-1, &[NODE])]),
];

/// What one new partition is assigned to.
const ADDED: &[(&str, &[&[i32]])] = &[
    ("good", &[&[NODE]]),
    ("none", &[]),
    ("too many", &[&[NODE], &[NODE]]),
    ("nobody", &[&[]]),
    ("unknown broker", &[&[77]]),
    ("one broker twice", &[&[NODE, NODE]]),
];

fn topic(name: &str, partitions: i32, replicas: i16) -> CreatableTopic {
    CreatableTopic::default()
        .with_name(topic_name(name))
        .with_num_partitions(partitions)
        .with_replication_factor(replicas)
}

fn dry(topics: Vec<CreatableTopic>) -> CreateTopicsRequest {
    CreateTopicsRequest::default().with_timeout_ms(30_000).with_validate_only(true).with_topics(topics)
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
    topic(name, -1, -1).with_assignments(assignments)
}

fn configured(name: &str, configs: &[(&str, Option<&str>)]) -> CreatableTopic {
    let configs = configs
        .iter()
        .map(|(k, v)| CreatableTopicConfig::default().with_name(text(k)).with_value(v.map(text)))
        .collect();
    topic(name, 1, 1).with_configs(configs)
}

fn delete(version: i16, names: &[&str]) -> DeleteTopicsRequest {
    let request = DeleteTopicsRequest::default().with_timeout_ms(30_000);
    if version >= 6 {
        let named = |name: &&str| DeleteTopicState::default().with_name(Some(topic_name(name)));
        request.with_topics(names.iter().map(named).collect())
    } else {
        request.with_topic_names(names.iter().map(|n| topic_name(n)).collect())
    }
}

fn grow(topics: Vec<CreatePartitionsTopic>) -> CreatePartitionsRequest {
    CreatePartitionsRequest::default().with_timeout_ms(30_000).with_validate_only(true).with_topics(topics)
}

fn to(name: &str, count: i32, assignments: Option<&[&[i32]]>) -> CreatePartitionsTopic {
    let assignments = assignments.map(|list| {
        list.iter()
            .map(|brokers| {
                CreatePartitionsAssignment::default()
                    .with_broker_ids(brokers.iter().copied().map(BrokerId).collect())
            })
            .collect()
    });
    CreatePartitionsTopic::default()
        .with_name(topic_name(name))
        .with_count(count)
        .with_assignments(assignments)
}

pub fn add(probes: &mut Probes) {
    probes.one("CreateTopics/made", CREATE, |_, v| {
        dry(vec![topic(&format!("made-{v}"), 2, 1)]).with_validate_only(false)
    });
    probes.one("CreateTopics/dry", CREATE, |_, _| dry(vec![topic("dry", 2, 1)]));
    probes.one("CreateTopics/exists", CREATE, |_, _| dry(vec![topic("plain", 2, 1)]));
    probes.one("CreateTopics/no topics", CREATE, |_, _| dry(Vec::new()));
    for (what, name) in [("bad", "no name!"), ("empty", ""), ("dot", "."), ("colliding", "dotted_name")] {
        probes.one(&format!("CreateTopics/{what} name"), CREATE, move |_, _| dry(vec![topic(name, 1, 1)]));
    }
    probes.one("CreateTopics/long name", CREATE, |_, _| dry(vec![topic(&"x".repeat(250), 1, 1)]));
    probes.one("CreateTopics/longest name", CREATE, |_, _| dry(vec![topic(&"x".repeat(249), 1, 1)]));
    probes.one("CreateTopics/internal name", CREATE, |_, _| dry(vec![topic("__transaction_state", 1, 1)]));
    probes.one("CreateTopics/metadata's name", CREATE, |_, _| dry(vec![topic("__cluster_metadata", 1, 1)]));
    for partitions in [0, -1, -2, 10_001] {
        probes.one(&format!("CreateTopics/{partitions} partitions"), CREATE, move |_, _| {
            dry(vec![topic("odd", partitions, 1)])
        });
    }
    for replicas in [0, -1, -2, 2, i16::MAX] {
        probes.one(&format!("CreateTopics/{replicas} replicas"), CREATE, move |_, _| {
            dry(vec![topic("odd", 1, replicas)])
        });
    }
    probes.one("CreateTopics/all by default", CREATE, |_, _| dry(vec![topic("odd", -1, -1)]));
    for (what, list) in ASSIGNMENTS {
        probes.one(&format!("CreateTopics/assigned {what}"), CREATE, move |_, _| {
            dry(vec![assigned("odd", list)])
        });
    }
    probes.one("CreateTopics/assigned and counted", CREATE, |_, _| {
        let mut both = assigned("odd", &[(0, &[NODE])]);
        both.num_partitions = 1;
        both.replication_factor = 1;
        dry(vec![both])
    });
    for (what, name, value) in [
        ("good", "retention.ms", Some("1000")),
        ("unknown", "no.such.config", Some("1")),
        ("not a number", "retention.ms", Some("soon")),
        ("out of range", "segment.bytes", Some("10")),
        ("null", "retention.ms", None),
        ("removed", "message.format.version", Some("2.0")),
        ("list", "cleanup.policy", Some("compact,delete")),
        ("empty list", "cleanup.policy", Some("")),
        ("bad list", "cleanup.policy", Some("compact,shred")),
    ] {
        probes.one(&format!("CreateTopics/config {what}"), CREATE, move |_, _| {
            dry(vec![configured("odd", &[(name, value)])])
        });
    }
    probes.one("CreateTopics/config twice", CREATE, |_, _| {
        dry(vec![configured("odd", &[("retention.ms", Some("1")), ("retention.ms", Some("2"))])])
    });
    probes.one("CreateTopics/topic twice", CREATE, |_, _| {
        dry(vec![topic("twice", 1, 1), topic("twice", 2, 1)])
    });
    probes.one("CreateTopics/good and bad together", CREATE, |_, _| {
        dry(vec![topic("alpha", 1, 1), topic("no name!", 1, 1), topic("plain", 1, 1)])
    });

    probes.exchange("DeleteTopics/made", DELETE, |bed: &mut Bed, version| {
        bed.create(&format!("doomed-{version}"), 1, &[])?;
        bed.ask(version, &delete(version, &[&format!("doomed-{version}")]))
    });
    probes.exchange("DeleteTopics/by id", (6, 6), |bed, version| {
        bed.create("doomed-by-id", 1, &[])?;
        let topic = DeleteTopicState::default().with_name(None).with_topic_id(bed.id("doomed-by-id"));
        bed.ask(version, &DeleteTopicsRequest::default().with_timeout_ms(30_000).with_topics(vec![topic]))
    });
    probes.one("DeleteTopics/unknown name", DELETE, |_, version| delete(version, &["nowhere"]));
    probes.one("DeleteTopics/bad name", DELETE, |_, version| delete(version, &["no name!"]));
    probes.one("DeleteTopics/no topics", DELETE, |_, version| delete(version, &[]));
    probes.one("DeleteTopics/twice", DELETE, |_, version| delete(version, &["plain", "plain"]));
    let by = |name: Option<&str>, id: uuid::Uuid| {
        let topic = DeleteTopicState::default().with_name(name.map(topic_name)).with_topic_id(id);
        DeleteTopicsRequest::default().with_timeout_ms(30_000).with_topics(vec![topic])
    };
    probes.one("DeleteTopics/unknown id", (6, 6), move |_, _| by(None, NOBODY));
    probes.one("DeleteTopics/neither name nor id", (6, 6), move |_, _| by(None, uuid::Uuid::nil()));
    probes.one("DeleteTopics/name and id", (6, 6), move |bed, _| by(Some("plain"), bed.id("plain")));
    probes.one("DeleteTopics/the same by name and by id", (6, 6), |bed, _| {
        let by_name = DeleteTopicState::default().with_name(Some(topic_name("plain")));
        let by_id = DeleteTopicState::default().with_name(None).with_topic_id(bed.id("plain"));
        DeleteTopicsRequest::default().with_timeout_ms(30_000).with_topics(vec![by_name, by_id])
    });

    probes.one("CreatePartitions/more", GROW, |_, _| grow(vec![to("plain", 4, None)]));
    probes.exchange("CreatePartitions/made", GROW, |bed, version| {
        bed.create(&format!("growing-{version}"), 1, &[])?;
        let request = grow(vec![to(&format!("growing-{version}"), 3, None)]).with_validate_only(false);
        bed.ask(version, &request)
    });
    for count in [3, 2, 0, -1, 100_000] {
        probes.one(&format!("CreatePartitions/{count} of 3"), GROW, move |_, _| {
            grow(vec![to("plain", count, None)])
        });
    }
    probes.one("CreatePartitions/unknown topic", GROW, |_, _| grow(vec![to("nowhere", 4, None)]));
    probes.one("CreatePartitions/twice", GROW, |_, _| grow(vec![to("plain", 4, None), to("plain", 5, None)]));
    probes.one("CreatePartitions/no topics", GROW, |_, _| grow(Vec::new()));
    for (what, list) in ADDED {
        probes.one(&format!("CreatePartitions/assigned {what}"), GROW, move |_, _| {
            grow(vec![to("plain", 4, Some(list))])
        });
    }
}
