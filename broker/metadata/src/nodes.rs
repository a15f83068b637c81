//! The nodes of the cluster: who is registered, where they are reached, what may be placed on them.
//!
//! Invariants
//! - A node that leaves the metadata holds no replica, neither of an assignment nor of a move.
//! - The finalized version never goes back, and every registered node speaks it.
//!
//! Whether a node runs just now is not metadata: the shell knows it, and passes it to whoever answers or places.

use std::sync::Arc;

use uuid::Uuid;

use crate::assignment::PartitionInfo;
use crate::codec::{CodecError, Reader, Writer};
use crate::image::{Applied, ApplyError, MetadataImage, NodeInfo};

/// Nodes of one cluster: far more than one metadata group should feed, few enough that a command cannot exhaust memory.
pub const NODES_MAX: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodeState {
    /// Leads and takes new replicas.
    #[default]
    Active,
    /// Keeps its replicas and leads nothing, so that it can be stopped without anybody noticing.
    Maintenance,
    /// Gives its replicas to others; once it has none it can be removed.
    Decommissioning,
}

impl NodeState {
    pub const fn name(self) -> &'static str {
        match self {
            NodeState::Active => "active",
            NodeState::Maintenance => "maintenance",
            NodeState::Decommissioning => "decommissioning",
        }
    }

    fn number(self) -> u8 {
        match self {
            NodeState::Active => 0,
            NodeState::Maintenance => 1,
            NodeState::Decommissioning => 2,
        }
    }

    fn from_number(number: u8) -> Result<NodeState, CodecError> {
        match number {
            0 => Ok(NodeState::Active),
            1 => Ok(NodeState::Maintenance),
            2 => Ok(NodeState::Decommissioning),
            _ => Err(CodecError::OutOfRange("node state")),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    pub id: i32,
    /// Where clients reach it.
    pub host: String,
    pub port: u16,
    pub rack: Option<String>,
    /// Where other brokers reach it.
    pub rpc_address: String,
    /// Made once with its data directory: tells a node that came back from an empty or copied one under the same id.
    pub directory_id: Uuid,
    /// New at every start of its process.
    pub boot_id: u64,
    /// The newest version of the protocol between brokers that its program speaks.
    pub version_max: u16,
    pub state: NodeState,
}

impl NodeRecord {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.signed(i64::from(self.id));
        out.string(&self.host);
        out.varint(u64::from(self.port));
        match &self.rack {
            None => out.u8(0),
            Some(rack) => {
                out.u8(1);
                out.string(rack);
            }
        }
        out.string(&self.rpc_address);
        out.uuid(self.directory_id);
        out.varint(self.boot_id);
        out.varint(u64::from(self.version_max));
        self.state.write(out);
    }

    pub(crate) fn read(input: &mut Reader<'_>) -> Result<NodeRecord, CodecError> {
        Ok(NodeRecord {
            id: input.i32("node id")?,
            host: input.string("host")?,
            port: input.u16("port")?,
            rack: match input.u8("rack")? {
                0 => None,
                1 => Some(input.string("rack")?),
                _ => return Err(CodecError::OutOfRange("rack")),
            },
            rpc_address: input.string("rpc address")?,
            directory_id: input.uuid("directory id")?,
            boot_id: input.varint("boot id")?,
            version_max: input.u16("version")?,
            state: NodeState::read(input)?,
        })
    }
}

impl NodeState {
    pub(crate) fn write(self, out: &mut Writer) {
        out.u8(self.number());
    }

    pub(crate) fn read(input: &mut Reader<'_>) -> Result<NodeState, CodecError> {
        NodeState::from_number(input.u8("node state")?)
    }
}

impl MetadataImage {
    /// Everybody who may hold replicas, in the order of their ids: the registered nodes, or this one of a broker that
    /// knows of no cluster.
    pub fn brokers(&self) -> Vec<Broker<'_>> {
        if self.nodes.is_empty() {
            let NodeInfo { id, host, port, rack } = &self.node;
            return vec![Broker {
                id: *id,
                host,
                port: *port,
                rack: rack.as_deref(),
                state: NodeState::Active,
            }];
        }
        self.nodes.values().map(Broker::of).collect()
    }

    pub fn broker(&self, id: i32) -> Option<Broker<'_>> {
        if self.nodes.is_empty() {
            return self.brokers().into_iter().find(|broker| broker.id == id);
        }
        self.nodes.get(&id).map(Broker::of)
    }

    /// How many nodes may be given new replicas.
    pub fn active_brokers(&self) -> usize {
        self.brokers().iter().filter(|broker| broker.state == NodeState::Active).count()
    }

    /// Registers a node, or tells what is new about one that came back. Its state stays as it was.
    pub(crate) fn register_node(&mut self, record: &NodeRecord) -> Result<Applied, ApplyError> {
        if record.id < 0 {
            return Err(ApplyError::BadNodeId(record.id));
        }
        if record.version_max < self.finalized_version {
            return Err(ApplyError::VersionTooOld {
                id: record.id,
                speaks: record.version_max,
                finalized: self.finalized_version,
            });
        }
        let known = self.nodes.get(&record.id);
        if known.is_none() && self.nodes.len() >= NODES_MAX {
            return Err(ApplyError::TooManyNodes);
        }
        if known.is_some_and(|known| known.directory_id != record.directory_id) {
            return Err(ApplyError::OtherDirectory(record.id));
        }
        let mut record = record.clone();
        record.state = known.map_or(NodeState::Active, |known| known.state);
        if self.nodes.is_empty() {
            self.resolve_founder(record.id);
        }
        Arc::make_mut(&mut self.nodes).insert(record.id, record);
        Ok(Applied { nodes_changed: true, ..Applied::default() })
    }

    /// What a broker made while it was alone lies on it, whoever reads its log. The first to be registered is that one.
    fn resolve_founder(&mut self, founder: i32) {
        for topic in Arc::make_mut(&mut self.topics).values_mut() {
            if topic.partitions.iter().any(|info| info.holders() != [founder] || info.target.is_some()) {
                for info in &mut Arc::make_mut(topic).partitions {
                    *info = PartitionInfo::at_rest(info.group_id, vec![founder]);
                }
            }
        }
    }

    pub(crate) fn remove_node(&mut self, id: i32) -> Result<Applied, ApplyError> {
        if !self.nodes.contains_key(&id) {
            return Err(ApplyError::NoSuchNode(id));
        }
        if self.nodes.len() == 1 {
            return Err(ApplyError::LastNode(id));
        }
        let replicas = self.replicas_on(id);
        if replicas > 0 {
            return Err(ApplyError::NodeHoldsReplicas { id, replicas });
        }
        Arc::make_mut(&mut self.nodes).remove(&id);
        let broker_configs_changed = self.node_configs.remove(&id).is_some();
        let topics_reconfigured = if broker_configs_changed { self.reconfigure_all() } else { Vec::new() };
        Ok(Applied { nodes_changed: true, broker_configs_changed, topics_reconfigured, ..Applied::default() })
    }

    /// Partitions that the node holds or is about to hold.
    pub fn replicas_on(&self, id: i32) -> usize {
        self.topics.values().flat_map(|topic| &topic.partitions).filter(|info| info.is_held_by(id)).count()
    }

    pub(crate) fn set_node_state(&mut self, id: i32, state: NodeState) -> Result<Applied, ApplyError> {
        let known = self.nodes.get(&id).ok_or(ApplyError::NoSuchNode(id))?;
        if known.state == state {
            return Ok(Applied::default());
        }
        let record = NodeRecord { state, ..known.clone() };
        Arc::make_mut(&mut self.nodes).insert(id, record);
        Ok(Applied { nodes_changed: true, ..Applied::default() })
    }

    pub(crate) fn finalize_version(&mut self, version: u16) -> Result<Applied, ApplyError> {
        if version < self.finalized_version {
            return Err(ApplyError::VersionGoesBack { from: self.finalized_version, to: version });
        }
        if let Some(node) = self.nodes.values().find(|node| node.version_max < version) {
            return Err(ApplyError::VersionTooOld {
                id: node.id,
                speaks: node.version_max,
                finalized: version,
            });
        }
        self.finalized_version = version;
        Ok(Applied { nodes_changed: true, ..Applied::default() })
    }
}

/// A node as answers and placement see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broker<'a> {
    pub id: i32,
    pub host: &'a str,
    pub port: u16,
    pub rack: Option<&'a str>,
    pub state: NodeState,
}

impl<'a> Broker<'a> {
    fn of(record: &'a NodeRecord) -> Broker<'a> {
        Broker {
            id: record.id,
            host: &record.host,
            port: record.port,
            rack: record.rack.as_deref(),
            state: record.state,
        }
    }
}
