//! DescribeLogDirs: the one data directory, and the size of each partition in it.

use std::collections::{BTreeMap, BTreeSet};

use kafka_protocol::messages::describe_log_dirs_response::{
    DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic,
};
use kafka_protocol::messages::{DescribeLogDirsRequest, DescribeLogDirsResponse, TopicName};

use super::{StatusOf, index_of, text};
use crate::assignment::PartitionInfo;
use crate::image::{MetadataImage, Topic};

/// The data directory and its file system, which the shell looks up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogDir<'a> {
    pub path: &'a str,
    /// -1 when not known.
    pub total_bytes: i64,
    pub usable_bytes: i64,
}

pub fn describe_log_dirs(
    request: &DescribeLogDirsRequest,
    version: i16,
    image: &MetadataImage,
    dir: LogDir<'_>,
    status: StatusOf<'_>,
) -> DescribeLogDirsResponse {
    let topics = match &request.topics {
        None => image
            .topics
            .values()
            .map(|topic| described(topic, None, image, status))
            // A topic of which all is elsewhere is not named.
            .filter(|topic| !topic.partitions.is_empty())
            .collect(),
        Some(asked) => {
            let mut wanted: BTreeMap<&str, BTreeSet<i32>> = BTreeMap::new();
            for topic in asked {
                wanted.entry(topic.topic.as_str()).or_default().extend(&topic.partitions);
            }
            wanted
                .iter()
                .filter_map(|(name, partitions)| image.topics.get(*name).map(|topic| (topic, partitions)))
                .map(|(topic, partitions)| described(topic, Some(partitions), image, status))
                .filter(|topic| !topic.partitions.is_empty())
                .collect()
        }
    };
    let mut result = DescribeLogDirsResult::default().with_log_dir(text(dir.path)).with_topics(topics);
    if version >= 4 {
        result.total_bytes = dir.total_bytes;
        result.usable_bytes = dir.usable_bytes;
    }
    DescribeLogDirsResponse::default().with_results(vec![result])
}

fn described(
    topic: &Topic,
    only: Option<&BTreeSet<i32>>,
    image: &MetadataImage,
    status: StatusOf<'_>,
) -> DescribeLogDirsTopic {
    let here = |info: &PartitionInfo| image.nodes.is_empty() || info.is_held_by(image.node.id);
    let partitions = topic
        .partitions
        .iter()
        .enumerate()
        .map(|(position, info)| (index_of(position), info))
        .filter(|(index, info)| here(info) && only.is_none_or(|only| only.contains(index)))
        .map(|(index, info)| {
            DescribeLogDirsPartition::default()
                .with_partition_index(index)
                .with_partition_size(status(info.group_id).size_bytes)
        })
        .collect();
    DescribeLogDirsTopic::default().with_name(TopicName(text(&topic.name))).with_partitions(partitions)
}
