//! When a group may sleep (see `hibernate`).

use raft::StateRole;

use super::Group;
use crate::message::{Body, Message};

impl Group {
    pub(super) fn everybody_has_everything(&self) -> bool {
        let raft = &self.node.raft;
        let last = raft.raft_log.last_index();
        let own = raft.raft_log.applied == last && raft.raft_log.persisted == last;
        let busy = raft.lead_transferee.is_some()
            || raft.pending_read_count() > 0
            || self.membership.is_joint()
            || !self.kept_back.is_empty()
            // A heartbeat behind the notice would wake whom that put to sleep.
            || !raft.msgs.is_empty()
            || !self.released.is_empty();
        let has_everything = |progress: &raft::Progress| {
            progress.matched == last && progress.committed_index >= last && progress.recent_active
        };
        let own_id = raft.id;
        own && !busy && raft.prs().iter().all(|(id, progress)| *id == own_id || has_everything(progress))
    }

    pub(super) fn send_to_sleep(&mut self) {
        let raft = &self.node.raft;
        let (from, term, commit) = (raft.id, raft.term, raft.raft_log.committed);
        for to in self.membership.others(from) {
            let body = Body::Heartbeat { commit, read: None, sleep: true };
            self.released.push(Message { from, to, term, body });
        }
        self.fall_asleep();
    }

    pub(super) fn fall_asleep(&mut self) {
        self.asleep = true;
        self.node.raft.maybe_free_inflight_buffers();
    }

    pub(super) fn agrees_to_sleep(&self, message: &Message, commit: u64) -> bool {
        let raft = &self.node.raft;
        let log = &raft.raft_log;
        raft.state == StateRole::Follower
            && (raft.term, raft.leader_id) == (message.term, message.from)
            && [log.last_index(), log.committed, log.persisted] == [commit; 3]
            && self.unpersisted.is_empty()
    }
}
