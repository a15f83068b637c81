//! The commands of the metadata log and their binary form: one byte of version, one of type, then the fields.
//!
//! A released form never changes: a new field means a new version or a new type.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::assignment::{read_ids, write_ids};
use crate::codec::{CodecError, Reader, Writer};
use crate::nodes::{NodeRecord, NodeState};

const VERSION: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    ClusterCreated {
        cluster_id: String,
    },
    /// As brokers wrote it that knew of no other: the replicas are on the broker itself.
    CreateTopicAlone {
        name: String,
        id: Uuid,
        partitions: i32,
        replication_factor: i16,
        configs: BTreeMap<String, String>,
    },
    DeleteTopic {
        id: Uuid,
    },
    /// As [`Command::CreateTopicAlone`].
    CreatePartitionsAlone {
        topic_id: Uuid,
        total: i32,
    },
    /// `None` removes an override.
    SetTopicConfigs {
        topic_id: Uuid,
        set: BTreeMap<String, Option<String>>,
    },
    /// Without a node id: the default of all brokers.
    SetBrokerConfigs {
        node_id: Option<i32>,
        set: BTreeMap<String, Option<String>>,
    },
    AllocateProducerIds {
        count: i64,
    },
    /// Configurations of a consumer or share group; the group itself need not exist.
    SetGroupConfigs {
        group: String,
        set: BTreeMap<String, Option<String>>,
    },
    /// A node that is new, or that came back with another address or process. The state in the record is not looked at.
    RegisterNode(NodeRecord),
    RemoveNode {
        id: i32,
    },
    SetNodeState {
        id: i32,
        state: NodeState,
    },
    /// One list of replicas for each partition.
    CreateTopic {
        name: String,
        id: Uuid,
        assignments: Vec<Vec<i32>>,
        configs: BTreeMap<String, String>,
    },
    /// One list of replicas for each partition that is added.
    CreatePartitions {
        topic_id: Uuid,
        assignments: Vec<Vec<i32>>,
    },
    /// Where a partition is to be; `None` gives up a move that is under way.
    SetReplicas {
        topic_id: Uuid,
        partition: i32,
        target: Option<Vec<i32>>,
    },
    /// Raft's members are those of the target.
    ReplicasReached {
        topic_id: Uuid,
        partition: i32,
        replicas: Vec<i32>,
    },
    /// All nodes speak this version of the protocol between brokers, and none goes back behind it.
    FinalizeVersion {
        version: u16,
    },
}

impl Command {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(VERSION);
        match self {
            Command::ClusterCreated { cluster_id } => {
                out.u8(0);
                out.string(cluster_id);
            }
            Command::CreateTopicAlone { name, id, partitions, replication_factor, configs } => {
                out.u8(1);
                out.string(name);
                out.uuid(*id);
                out.signed(i64::from(*partitions));
                out.signed(i64::from(*replication_factor));
                out.map(configs);
            }
            Command::DeleteTopic { id } => {
                out.u8(2);
                out.uuid(*id);
            }
            Command::CreatePartitionsAlone { topic_id, total } => {
                out.u8(3);
                out.uuid(*topic_id);
                out.signed(i64::from(*total));
            }
            Command::SetTopicConfigs { topic_id, set } => {
                out.u8(4);
                out.uuid(*topic_id);
                out.changes(set);
            }
            Command::SetBrokerConfigs { node_id, set } => {
                out.u8(5);
                match node_id {
                    None => out.u8(0),
                    Some(id) => {
                        out.u8(1);
                        out.signed(i64::from(*id));
                    }
                }
                out.changes(set);
            }
            Command::AllocateProducerIds { count } => {
                out.u8(6);
                out.signed(*count);
            }
            Command::SetGroupConfigs { group, set } => {
                out.u8(7);
                out.string(group);
                out.changes(set);
            }
            Command::RegisterNode(record) => {
                out.u8(8);
                record.write(&mut out);
            }
            Command::RemoveNode { id } => {
                out.u8(9);
                out.signed(i64::from(*id));
            }
            Command::SetNodeState { id, state } => {
                out.u8(10);
                out.signed(i64::from(*id));
                state.write(&mut out);
            }
            Command::CreateTopic { name, id, assignments, configs } => {
                out.u8(11);
                out.string(name);
                out.uuid(*id);
                write_assignments(&mut out, assignments);
                out.map(configs);
            }
            Command::CreatePartitions { topic_id, assignments } => {
                out.u8(12);
                out.uuid(*topic_id);
                write_assignments(&mut out, assignments);
            }
            Command::SetReplicas { topic_id, partition, target } => {
                out.u8(13);
                out.uuid(*topic_id);
                out.signed(i64::from(*partition));
                match target {
                    None => out.u8(0),
                    Some(target) => {
                        out.u8(1);
                        write_ids(&mut out, target);
                    }
                }
            }
            Command::ReplicasReached { topic_id, partition, replicas } => {
                out.u8(14);
                out.uuid(*topic_id);
                out.signed(i64::from(*partition));
                write_ids(&mut out, replicas);
            }
            Command::FinalizeVersion { version } => {
                out.u8(15);
                out.varint(u64::from(*version));
            }
        }
        out.bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Command, CodecError> {
        let mut input = Reader::new(bytes);
        let version = input.u8("command version")?;
        if version != VERSION {
            return Err(CodecError::UnknownVersion(version));
        }
        let command = match input.u8("command type")? {
            0 => Command::ClusterCreated { cluster_id: input.string("cluster id")? },
            1 => Command::CreateTopicAlone {
                name: input.string("topic name")?,
                id: input.uuid("topic id")?,
                partitions: input.i32("partitions")?,
                replication_factor: input.i16("replication factor")?,
                configs: input.map("topic configs")?,
            },
            2 => Command::DeleteTopic { id: input.uuid("topic id")? },
            3 => Command::CreatePartitionsAlone {
                topic_id: input.uuid("topic id")?,
                total: input.i32("total")?,
            },
            4 => Command::SetTopicConfigs {
                topic_id: input.uuid("topic id")?,
                set: input.changes("topic configs")?,
            },
            5 => {
                let node_id = match input.u8("node id")? {
                    0 => None,
                    1 => Some(input.i32("node id")?),
                    _ => return Err(CodecError::OutOfRange("node id")),
                };
                Command::SetBrokerConfigs { node_id, set: input.changes("broker configs")? }
            }
            6 => Command::AllocateProducerIds { count: input.signed("producer ids")? },
            7 => Command::SetGroupConfigs {
                group: input.string("group")?,
                set: input.changes("group configs")?,
            },
            8 => Command::RegisterNode(NodeRecord::read(&mut input)?),
            9 => Command::RemoveNode { id: input.i32("node id")? },
            10 => Command::SetNodeState { id: input.i32("node id")?, state: NodeState::read(&mut input)? },
            11 => Command::CreateTopic {
                name: input.string("topic name")?,
                id: input.uuid("topic id")?,
                assignments: read_assignments(&mut input)?,
                configs: input.map("topic configs")?,
            },
            12 => Command::CreatePartitions {
                topic_id: input.uuid("topic id")?,
                assignments: read_assignments(&mut input)?,
            },
            13 => Command::SetReplicas {
                topic_id: input.uuid("topic id")?,
                partition: input.i32("partition")?,
                target: match input.u8("target")? {
                    0 => None,
                    1 => Some(read_ids(&mut input)?),
                    _ => return Err(CodecError::OutOfRange("target")),
                },
            },
            14 => Command::ReplicasReached {
                topic_id: input.uuid("topic id")?,
                partition: input.i32("partition")?,
                replicas: read_ids(&mut input)?,
            },
            15 => Command::FinalizeVersion { version: input.u16("version")? },
            other => return Err(CodecError::UnknownCommand(other)),
        };
        input.end()?;
        Ok(command)
    }
}

fn write_assignments(out: &mut Writer, assignments: &[Vec<i32>]) {
    out.varint(assignments.len() as u64);
    for replicas in assignments {
        write_ids(out, replicas);
    }
}

fn read_assignments(input: &mut Reader<'_>) -> Result<Vec<Vec<i32>>, CodecError> {
    (0..input.count(1, "assignments")?).map(|_| read_ids(input)).collect()
}

#[cfg(test)]
#[path = "command_tests.rs"]
pub(crate) mod tests;
