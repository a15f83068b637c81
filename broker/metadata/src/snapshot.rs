//! Binary form of the replicated part of an image: `FMI`, a version, then its fields in a fixed order.
//!
//! Equal images give equal bytes, so that replicas can be compared by them. On disk a snapshot lies in an envelope that
//! says how far in the metadata log it reaches and shows damage.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::assignment::PartitionInfo;
use crate::codec::{CodecError, Reader, Writer};
use crate::image::{MetadataImage, NodeInfo, Topic};
use crate::nodes::NodeRecord;
use crate::topic_config::TopicConfig;
use crate::topic_name;

const MAGIC: [u8; 3] = *b"FMI";
/// 2 added the configurations of groups, at the end; 3 the targets of partitions, and behind the groups the finalized
/// version and the nodes.
const VERSION: u8 = 3;
const OLDEST_VERSION: u8 = 1;
/// Name, id, partition count and config count.
const TOPIC_BYTES_MIN: usize = 19;
/// Id, host, port, rack, address, directory id, boot id, version and state.
const NODE_BYTES_MIN: usize = 24;

const FILE_MAGIC: [u8; 4] = *b"FLMS";
const FILE_VERSION: u16 = 1;
/// Magic, version, zero, offset, length.
const FILE_HEADER_BYTES: usize = 20;
const FILE_TRAILER_BYTES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotFileError {
    #[error("not a snapshot of the metadata, or not a whole one")]
    Malformed,
    #[error("version {0} of the snapshot file is not known to this release")]
    UnknownVersion(u16),
    #[error("the checksum does not match")]
    BadChecksum,
}

/// The content of a snapshot file: `snapshot` holds every command below `next_offset` of the metadata log.
pub fn encode_snapshot_file(next_offset: i64, snapshot: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(FILE_HEADER_BYTES + snapshot.len() + FILE_TRAILER_BYTES);
    out.extend(FILE_MAGIC);
    out.extend(FILE_VERSION.to_le_bytes());
    out.extend([0; 2]);
    out.extend(next_offset.to_le_bytes());
    let length = u32::try_from(snapshot.len()).expect("metadata of more than 4 GiB");
    out.extend(length.to_le_bytes());
    out.extend(snapshot);
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    out
}

/// Next offset and snapshot of a file that is whole.
pub fn decode_snapshot_file(bytes: &[u8]) -> Result<(i64, &[u8]), SnapshotFileError> {
    let malformed = SnapshotFileError::Malformed;
    let (body, crc) = bytes.split_last_chunk::<FILE_TRAILER_BYTES>().ok_or(malformed)?;
    let (header, snapshot) = body.split_first_chunk::<FILE_HEADER_BYTES>().ok_or(malformed)?;
    if header[..4] != FILE_MAGIC {
        return Err(malformed);
    }
    if crc32c::crc32c(body).to_le_bytes() != *crc {
        return Err(SnapshotFileError::BadChecksum);
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    if version != FILE_VERSION {
        return Err(SnapshotFileError::UnknownVersion(version));
    }
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[8..16]);
    let mut length = [0; 4];
    length.copy_from_slice(&header[16..20]);
    if u32::from_le_bytes(length) as usize != snapshot.len() {
        return Err(malformed);
    }
    Ok((i64::from_le_bytes(offset), snapshot))
}

impl MetadataImage {
    pub fn snapshot(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes.extend_from_slice(&MAGIC);
        out.u8(VERSION);
        out.string(&self.cluster_id);
        out.varint(self.next_group_id);
        out.signed(self.next_producer_id);
        out.map(&self.broker_configs);
        out.varint(self.node_configs.len() as u64);
        for (id, configs) in &self.node_configs {
            out.signed(i64::from(*id));
            out.map(configs);
        }
        out.varint(self.topics.len() as u64);
        for topic in self.topics.values() {
            out.string(&topic.name);
            out.uuid(topic.id);
            out.varint(topic.partitions.len() as u64);
            for partition in &topic.partitions {
                partition.write(&mut out);
            }
            out.map(&topic.configs);
        }
        out.varint(self.group_configs.len() as u64);
        for (group, configs) in self.group_configs.iter() {
            out.string(group);
            out.map(configs);
        }
        out.varint(u64::from(self.finalized_version));
        out.varint(self.nodes.len() as u64);
        for node in self.nodes.values() {
            node.write(&mut out);
        }
        out.bytes
    }

    /// The image as seen by `node`. Its configuration file is not part of a snapshot; see
    /// [`MetadataImage::with_static_configs`].
    pub fn restore(node: NodeInfo, bytes: &[u8]) -> Result<MetadataImage, CodecError> {
        let mut image = MetadataImage::empty(node);
        let mut input = Reader::new(bytes);
        for expected in MAGIC {
            if input.u8("magic")? != expected {
                return Err(CodecError::Inconsistent("this is not a metadata snapshot"));
            }
        }
        let version = input.u8("version")?;
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(CodecError::UnknownVersion(version));
        }
        image.cluster_id = input.string("cluster id")?;
        image.next_group_id = input.varint("next group id")?;
        image.next_producer_id = input.signed("next producer id")?;
        image.broker_configs = input.map("broker configs")?;
        for _ in 0..input.count(2, "node configs")? {
            let id = input.i32("node id")?;
            image.node_configs.insert(id, input.map("node configs")?);
        }
        let mut topics = BTreeMap::new();
        let mut ids = BTreeMap::new();
        let mut groups = BTreeSet::new();
        for _ in 0..input.count(TOPIC_BYTES_MIN, "topics")? {
            let topic = read_topic(&mut input, version, &image, &mut groups)?;
            if ids.insert(topic.id, topic.name.clone()).is_some()
                || topics.insert(topic.name.clone(), Arc::new(topic)).is_some()
            {
                return Err(CodecError::Inconsistent("a topic appears twice"));
            }
        }
        if version >= 2 {
            let groups = Arc::make_mut(&mut image.group_configs);
            for _ in 0..input.count(2, "group configs")? {
                let group = input.string("group")?;
                groups.insert(group, input.map("group configs")?);
            }
        }
        if version >= 3 {
            image.finalized_version = input.u16("finalized version")?;
            let nodes = Arc::make_mut(&mut image.nodes);
            for _ in 0..input.count(NODE_BYTES_MIN, "nodes")? {
                let node = NodeRecord::read(&mut input)?;
                if nodes.insert(node.id, node).is_some() {
                    return Err(CodecError::Inconsistent("a node appears twice"));
                }
            }
        }
        input.end()?;
        image.topics = Arc::new(topics);
        image.topic_ids = Arc::new(ids);
        Ok(image)
    }
}

fn read_topic(
    input: &mut Reader<'_>,
    version: u8,
    image: &MetadataImage,
    groups: &mut BTreeSet<u64>,
) -> Result<Topic, CodecError> {
    let name = input.string("topic name")?;
    topic_name::check(&name).map_err(|_| CodecError::OutOfRange("topic name"))?;
    let id = input.uuid("topic id")?;
    let mut partitions = Vec::new();
    for _ in 0..input.count(2, "partitions")? {
        let info = PartitionInfo::read(input, version >= 3)?;
        let group_id = info.group_id;
        if group_id == 0 || group_id >= image.next_group_id || !groups.insert(group_id) {
            return Err(CodecError::Inconsistent("a partition's group id"));
        }
        partitions.push(info);
    }
    let configs = input.map("topic configs")?;
    let effective = Arc::new(TopicConfig::resolve(&configs, &image.layers()));
    let internal = topic_name::is_internal(&name);
    Ok(Topic { name, id, partitions, configs, effective, internal })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_file_comes_back_whole_or_not_at_all() {
        let file = encode_snapshot_file(77, b"the image");
        assert_eq!(decode_snapshot_file(&file), Ok((77, &b"the image"[..])));
        for at in 0..file.len() {
            assert!(decode_snapshot_file(&file[..at]).is_err());
            let mut bad = file.clone();
            bad[at] ^= 4;
            assert!(decode_snapshot_file(&bad).is_err(), "byte {at}");
        }
        let mut newer = file[..file.len() - 4].to_vec();
        newer[4] = 2;
        newer.extend(crc32c::crc32c(&newer).to_le_bytes());
        assert_eq!(decode_snapshot_file(&newer), Err(SnapshotFileError::UnknownVersion(2)));
    }
}
