//! Who leads, for clients that came to the wrong broker (KIP-951): saves them a look at the metadata.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::produce::NodeEndpoint;

use crate::node::Node;

/// Errors upon which a client looks for the leader.
pub(super) fn tells_leader(error: ErrorCode) -> bool {
    matches!(error, ErrorCode::NOT_LEADER_OR_FOLLOWER | ErrorCode::FENCED_LEADER_EPOCH)
}

/// Leaders that are named in one answer.
#[derive(Default)]
pub(super) struct Hints {
    named: BTreeSet<i32>,
}

impl Hints {
    /// Leader and epoch, where another broker that clients can go to is known to lead. That this one does is no news to whoever was refused
    /// here a moment ago.
    pub(super) fn leader_of(&mut self, node: &Node, group_id: u64) -> Option<(i32, i32)> {
        let cluster = node.cluster.as_ref()?;
        let (leader, epoch) = node.leaders.get(group_id)?;
        if leader < 0 || leader == node.config.node_id || !cluster.members.is_reachable(leader) {
            return None;
        }
        self.named.insert(leader);
        Some((leader, epoch))
    }

    /// Where those listen that were named.
    pub(super) fn endpoints(&self, node: &Node) -> Vec<NodeEndpoint> {
        if self.named.is_empty() {
            return Vec::new();
        }
        let image = node.image.load();
        let brokers = image.brokers();
        let named = brokers.iter().filter(|broker| self.named.contains(&broker.id));
        named
            .map(|broker| NodeEndpoint {
                node_id: broker.id,
                host: broker.host.into(),
                port: i32::from(broker.port),
                rack: broker.rack.map(Into::into),
            })
            .collect()
    }
}
