//! What the leader of the metadata does by itself, in turns: the id of the cluster, who has a vote about its metadata, and
//! where replicas and leaders go (`balancer`).
//!
//! Each turn looks at what is there and does the next step; nothing is remembered, so that another leader goes on.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use flumen_metadata::{Command, NodeState};
use flumen_raft::{ProposeError, Status, Target};

use super::Controller;
use crate::balancer;
use crate::cluster::identity::FOUNDERS_MAX;
use crate::cluster::node_id_of;
use crate::partition::raft_id;

const TURN_INTERVAL: Duration = Duration::from_millis(250);
/// A learner that lacks at most so many entries may vote.
const CAUGHT_UP_ENTRIES_MAX: u64 = 1000;

impl Controller {
    pub(super) async fn keep_up(self: Rc<Self>) {
        let mut home = tokio::time::Instant::now();
        while !self.shard.is_stopping() {
            self.say_who_votes();
            tokio::time::sleep(TURN_INTERVAL).await;
            if !self.leads() {
                continue;
            }
            self.name_cluster().await;
            self.finalize_version().await;
            self.look_after_members();
            balancer::balance(&self.shard, &mut home).await;
        }
    }

    fn say_who_votes(&self) {
        let Some(cluster) = &self.shard.node.cluster else { return };
        if self.log().damage().is_some() {
            // It does not know.
            return;
        }
        let voters = self.log().raft_status().membership.voters;
        cluster.members.set_metadata_voters(voters.into_iter().filter_map(node_id_of).collect());
    }

    async fn name_cluster(self: &Rc<Self>) {
        let Some(cluster) = &self.shard.node.cluster else { return };
        let cluster_id = cluster.identity.cluster_id.to_string();
        if !self.image.borrow().cluster_id.is_empty() {
            return;
        }
        if let Err(error) = self.commit(vec![Command::ClusterCreated { cluster_id }]).await {
            tracing::debug!(%error, "the id of the cluster could not be written; trying again");
        }
    }

    /// All nodes that are registered speak a version that is newer than what was agreed on.
    async fn finalize_version(self: &Rc<Self>) {
        let version = {
            let image = self.image.borrow();
            let common = image.nodes.values().map(|node| node.version_max).min().unwrap_or(0);
            // A founder that has not come yet may be older.
            let founders = self.shard.node.cluster.as_ref().map_or(0, |c| c.identity.founders.len());
            (image.nodes.len() >= founders && common > image.finalized_version).then_some(common)
        };
        if let Some(version) = version
            && let Err(error) = self.commit(vec![Command::FinalizeVersion { version }]).await
        {
            tracing::warn!(%error, version, "the version of the protocol between brokers could not be agreed on");
        }
    }

    /// Every node has the metadata; the first of them vote about it.
    fn look_after_members(&self) {
        let Some(cluster) = &self.shard.node.cluster else { return };
        let nodes: BTreeSet<u64> = self.image.borrow().nodes.keys().map(|id| raft_id(*id)).collect();
        let young = nodes.len() < cluster.identity.founders.len();
        let status = self.log().raft_status();
        let (up, has_room) = (self.shard.node.is_up(), self.shard.node.has_room());
        let active: BTreeSet<u64> = (self.image.borrow().nodes.values())
            .filter(|node| node.state == NodeState::Active && up(node.id) && has_room(node.id))
            .map(|node| raft_id(node.id))
            .collect();
        if let Some(to) = successor_wanted(&status, &active, young) {
            tracing::info!(to, "this node is to lead nothing; another is to lead the metadata");
            // A refusal means that it leads no more.
            let _ = self.log().transfer_leader(to);
            return;
        }
        let Some(target) = members_wanted(&status, &nodes, young) else { return };
        tracing::info!(voters = ?target.voters, learners = ?target.learners, "members of the metadata group change");
        match self.log().propose_membership(target) {
            Ok(()) | Err(ProposeError::ChangePending | ProposeError::NoChange | ProposeError::NotLeader) => {}
            Err(error) => tracing::warn!(%error, "the members of the metadata group could not be changed"),
        }
    }
}

/// Who is to lead when the leader is to stop doing so, or to leave: of the nodes that may lead the voter that has most.
fn successor_wanted(status: &Status, active: &BTreeSet<u64>, young: bool) -> Option<u64> {
    let own = status.leadership.leader_id;
    if young || active.contains(&own) || status.membership.is_joint() {
        return None;
    }
    let able =
        status.peers.iter().filter(|peer| peer.id != own && !peer.is_learner && active.contains(&peer.id));
    able.max_by_key(|peer| peer.matched_index).map(|peer| peer.id)
}

/// The members that the group of the metadata should have next, when not those that it has. `young`: not all founders have
/// come yet.
fn members_wanted(status: &Status, nodes: &BTreeSet<u64>, young: bool) -> Option<Target> {
    let membership = &status.membership;
    if membership.is_joint() || nodes.is_empty() {
        return None;
    }
    let own = status.leadership.leader_id;
    let mut voters: BTreeSet<u64> = membership.voters.iter().copied().collect();
    // One at a time, and not the one that leads: it is removed by the next leader.
    let removed = voters.iter().copied().find(|id| !young && !nodes.contains(id) && *id != own);
    if let Some(removed) = removed {
        voters.remove(&removed);
    } else {
        let wanted = match nodes.len().min(FOUNDERS_MAX) {
            even if even.is_multiple_of(2) => even - 1,
            odd => odd,
        };
        let able = |id: &u64| {
            status.peers.iter().any(|peer| {
                peer.id == *id
                    && peer.is_active
                    // A new member passes for active before anything was heard of it.
                    && peer.matched_index > 0
                    && peer.matched_index + CAUGHT_UP_ENTRIES_MAX >= status.last_index
            })
        };
        if voters.len() < wanted
            && let Some(next) = membership.learners.iter().copied().filter(|id| nodes.contains(id)).find(able)
        {
            voters.insert(next);
        }
    }
    let learners: Vec<u64> = nodes.iter().copied().filter(|id| !voters.contains(id)).collect();
    let have = (membership.voters.iter().copied().collect(), membership.learners.iter().copied().collect());
    let want = (voters, learners.iter().copied().collect::<BTreeSet<u64>>());
    let target = Target { voters: want.0.iter().copied().collect(), learners };
    (have != want && target.voters.iter().all(|id| node_id_of(*id).is_some())).then_some(target)
}

#[cfg(test)]
mod tests {
    use flumen_raft::{Membership, PeerStatus};

    use super::*;
    use crate::partition::leading;

    fn status(voters: &[u64], learners: &[u64], behind: &[u64]) -> Status {
        let membership = Membership { learners: learners.to_vec(), ..Membership::of_voters(voters) };
        let all = voters.iter().chain(learners);
        let peer = |id: &u64| PeerStatus {
            id: *id,
            matched_index: if behind.contains(id) { 10 } else { 4990 },
            next_index: 5001,
            is_active: true,
            is_learner: learners.contains(id),
        };
        leading(voters[0], 5000, membership, all.map(peer).collect())
    }

    fn wanted(status: &Status, nodes: &[u64], young: bool) -> Option<(Vec<u64>, Vec<u64>)> {
        members_wanted(status, &nodes.iter().copied().collect(), young).map(|t| (t.voters, t.learners))
    }

    #[test]
    fn every_node_gets_the_metadata_and_an_odd_number_of_them_a_vote() {
        // Founders that have not come are still voters.
        assert_eq!(wanted(&status(&[1, 2, 3], &[], &[]), &[1, 2], true), None);
        assert_eq!(wanted(&status(&[1, 2, 3], &[], &[]), &[1, 2, 3], false), None);
        // A fourth listens.
        let four = Some((vec![1, 2, 3], vec![4]));
        assert_eq!(wanted(&status(&[1, 2, 3], &[], &[]), &[1, 2, 3, 4], false), four);
        assert_eq!(wanted(&status(&[1, 2, 3], &[4], &[]), &[1, 2, 3, 4], false), None);
        // A fifth makes five voters, one after the other, once they have caught up.
        let nodes = [1, 2, 3, 4, 5];
        assert_eq!(wanted(&status(&[1, 2, 3], &[4, 5], &[4, 5]), &nodes, false), None);
        assert_eq!(
            wanted(&status(&[1, 2, 3], &[4, 5], &[4]), &nodes, false),
            Some((vec![1, 2, 3, 5], vec![4]))
        );
        assert_eq!(wanted(&status(&[1, 2, 3, 5], &[4], &[]), &nodes, false), Some((nodes.to_vec(), vec![])));
        // From one to three.
        assert_eq!(wanted(&status(&[1], &[], &[]), &[1, 2], false), Some((vec![1], vec![2])));
        assert_eq!(wanted(&status(&[1], &[2], &[]), &[1, 2], false), None);
        assert_eq!(wanted(&status(&[1], &[2, 3], &[]), &[1, 2, 3], false), Some((vec![1, 2], vec![3])));
    }

    #[test]
    fn a_removed_node_loses_its_vote_unless_it_leads() {
        assert_eq!(wanted(&status(&[1, 2, 3], &[4], &[]), &[1, 2, 4], false), Some((vec![1, 2], vec![4])));
        assert_eq!(wanted(&status(&[1, 2], &[4], &[]), &[1, 2, 4], false), Some((vec![1, 2, 4], vec![])));
        assert_eq!(wanted(&status(&[3, 1, 2], &[], &[]), &[1, 2], false), None, "the leader goes last");
        let successor = |behind: &[u64], nodes: &[u64], young| {
            let nodes = nodes.iter().copied().collect();
            successor_wanted(&status(&[3, 1, 2], &[4], behind), &nodes, young)
        };
        assert_eq!(successor(&[1], &[1, 2, 4], false), Some(2), "and hands over to who has most");
        assert_eq!(successor(&[], &[1, 2, 3], false), None);
        assert_eq!(successor(&[], &[1, 2], true), None);
        let mut joint = status(&[1, 2], &[], &[]);
        joint.membership.outgoing = vec![1, 2, 3];
        assert_eq!(wanted(&joint, &[1, 2, 3], false), None);
    }
}
