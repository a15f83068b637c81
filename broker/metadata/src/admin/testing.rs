//! What the tests of this folder share: an image, requests that go through the wire, answers that encode.

use std::collections::BTreeMap;

use bytes::BytesMut;
use kafka_protocol::messages::TopicName;
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes};
use uuid::Uuid;

use super::{AdminPlan, Live, PartitionStatus, StatusOf};
use crate::broker_config::BrokerConfig;
use crate::command::Command;
use crate::image::{Applied, MetadataImage, NodeInfo};

pub(super) const NODE_ID: i32 = 1;

pub(super) fn config(pairs: &[(&str, &str)]) -> BrokerConfig {
    BrokerConfig::from_map(&map(pairs)).unwrap()
}

pub(super) fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// Topics by name, partitions and id.
pub(super) fn image(topics: &[(&str, i32, u128)]) -> MetadataImage {
    let node = NodeInfo { id: NODE_ID, host: "broker.example".into(), port: 9092, rack: Some("r1".into()) };
    let mut image = MetadataImage::empty(node);
    image.apply(&Command::ClusterCreated { cluster_id: "cluster".into() }).unwrap();
    for (name, partitions, id) in topics {
        let command = Command::CreateTopic {
            name: name.to_string(),
            id: Uuid::from_u128(*id),
            assignments: (0..*partitions).map(|_| vec![NODE_ID]).collect(),
            configs: BTreeMap::new(),
        };
        image.apply(&command).unwrap();
    }
    image
}

pub(super) fn ids() -> impl Iterator<Item = Uuid> {
    (1000u128..).map(Uuid::from_u128)
}

pub(super) fn healthy(_: u64) -> PartitionStatus {
    PartitionStatus { leader_id: NODE_ID, leader_epoch: 3, size_bytes: 100, ..PartitionStatus::default() }
}

/// All nodes run, and the first one leads.
pub(super) fn live(status: StatusOf<'_>) -> Live<'_> {
    Live { controller_id: NODE_ID, status, is_up: &|_| true }
}

pub(super) fn up(_: i32) -> bool {
    true
}

pub(super) fn s(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_string())
}

pub(super) fn topic(name: &str) -> TopicName {
    TopicName(s(name))
}

/// As the other side reads it. Fails when a field is set that the version does not carry.
pub(super) fn wire<M: Encodable + Decodable>(message: &M, version: i16) -> M {
    let mut out = BytesMut::new();
    message.encode(&mut out, version).unwrap_or_else(|e| panic!("version {version}: {e}"));
    let mut bytes = out.freeze();
    let read = M::decode(&mut bytes, version).unwrap_or_else(|e| panic!("version {version}: {e}"));
    assert!(bytes.is_empty());
    read
}

/// Applies the commands, which a plan promises to be possible.
pub(super) fn commit<R>(image: &mut MetadataImage, plan: &AdminPlan<R>) -> Vec<Applied> {
    plan.commands.iter().map(|command| image.apply(command).unwrap()).collect()
}
