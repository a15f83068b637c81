//! The commands of the metadata log and their binary form: one byte of version, one of type, then the fields.
//!
//! A released form never changes: a new field means a new version or a new type.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::codec::{CodecError, Reader, Writer};

const VERSION: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    ClusterCreated {
        cluster_id: String,
    },
    CreateTopic {
        name: String,
        id: Uuid,
        partitions: i32,
        replication_factor: i16,
        configs: BTreeMap<String, String>,
    },
    DeleteTopic {
        id: Uuid,
    },
    CreatePartitions {
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
            Command::CreateTopic { name, id, partitions, replication_factor, configs } => {
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
            Command::CreatePartitions { topic_id, total } => {
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
            1 => Command::CreateTopic {
                name: input.string("topic name")?,
                id: input.uuid("topic id")?,
                partitions: input.i32("partitions")?,
                replication_factor: input.i16("replication factor")?,
                configs: input.map("topic configs")?,
            },
            2 => Command::DeleteTopic { id: input.uuid("topic id")? },
            3 => Command::CreatePartitions { topic_id: input.uuid("topic id")?, total: input.i32("total")? },
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
            other => return Err(CodecError::UnknownCommand(other)),
        };
        input.end()?;
        Ok(command)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        "[a-zA-Z0-9._é-]{0,12}"
    }

    fn changes() -> impl Strategy<Value = BTreeMap<String, Option<String>>> {
        proptest::collection::btree_map(text(), proptest::option::of(text()), 0..4)
    }

    fn id() -> impl Strategy<Value = Uuid> {
        any::<u128>().prop_map(Uuid::from_u128)
    }

    pub(crate) fn command() -> impl Strategy<Value = Command> {
        prop_oneof![
            text().prop_map(|cluster_id| Command::ClusterCreated { cluster_id }),
            (text(), id(), any::<i32>(), any::<i16>(), proptest::collection::btree_map(text(), text(), 0..4))
                .prop_map(|(name, id, partitions, replication_factor, configs)| {
                    Command::CreateTopic { name, id, partitions, replication_factor, configs }
                }),
            id().prop_map(|id| Command::DeleteTopic { id }),
            (id(), any::<i32>()).prop_map(|(topic_id, total)| Command::CreatePartitions { topic_id, total }),
            (id(), changes()).prop_map(|(topic_id, set)| Command::SetTopicConfigs { topic_id, set }),
            (proptest::option::of(any::<i32>()), changes())
                .prop_map(|(node_id, set)| Command::SetBrokerConfigs { node_id, set }),
            any::<i64>().prop_map(|count| Command::AllocateProducerIds { count }),
            (text(), changes()).prop_map(|(group, set)| Command::SetGroupConfigs { group, set }),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(command in command()) {
            let bytes = command.encode();
            prop_assert_eq!(Command::decode(&bytes), Ok(command));
            // No proper prefix is a command, nor is anything longer.
            for length in 0..bytes.len() {
                prop_assert!(Command::decode(&bytes[..length]).is_err());
            }
            let mut longer = bytes.clone();
            longer.push(0);
            prop_assert!(Command::decode(&longer).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Command::decode(&bytes);
            let mut with_version = vec![VERSION];
            with_version.extend(bytes);
            let _ = Command::decode(&with_version);
        }
    }

    #[test]
    fn the_released_form_stays() {
        let command = Command::CreateTopic {
            name: "t".into(),
            id: Uuid::from_u128(1),
            partitions: 3,
            replication_factor: 1,
            configs: BTreeMap::from([("a".to_string(), "b".to_string())]),
        };
        let mut expected = vec![1, 1, 1, b't'];
        expected.extend([0; 15]);
        expected.extend([1, 6, 2, 1, 1, b'a', 1, b'b']);
        assert_eq!(command.encode(), expected);
        assert_eq!(Command::decode(&[2, 0, 0]), Err(CodecError::UnknownVersion(2)));
        assert_eq!(Command::decode(&[1, 99]), Err(CodecError::UnknownCommand(99)));
    }
}
