//! A partition as one replica of several: what it hears from the others, what time does to it, and whether it leads.
//!
//! Nothing here waits. What Raft answers is carried out by `Partition::advance`.

use flumen_raft::{Message, StepError};

use super::Partition;

impl Partition {
    /// Leads; may not serve yet.
    pub fn is_leader(&self) -> bool {
        self.state.borrow().raft.is_leader()
    }

    /// Leads, and knows everything that was ever acknowledged.
    pub fn may_serve(&self) -> bool {
        self.state.borrow().raft.may_serve()
    }

    /// What another replica says. A message that makes no sense is dropped, and so is one that there is no room for: Raft
    /// says it again.
    pub fn step(&self, from: u64, message: Message) {
        if self.damage().is_some() || message.from != from {
            return;
        }
        let outcome = self.state.borrow_mut().raft.step(message);
        match outcome {
            Ok(()) | Err(StepError::UnknownPeer) => {}
            Err(error) => {
                tracing::warn!(topic = %self.topic, partition = self.index, from, %error, "a message of another replica was refused");
            }
        }
        self.advance();
        self.stay_awake();
    }

    /// Time passes for Raft; false when the group sleeps. `advance` has to follow.
    pub fn tick(&self) -> bool {
        self.damage().is_none() && self.state.borrow_mut().raft.tick()
    }

    /// Another broker is gone; true when this partition has a replica there.
    pub fn on_node_down(&self, raft_id: u64) -> bool {
        self.damage().is_none() && self.state.borrow_mut().raft.on_node_down(raft_id)
    }

    /// Sees to it that the group is ticked for as long as it does not sleep. A group of one needs no time.
    pub(crate) fn stay_awake(&self) {
        let awake = {
            let raft = &self.state.borrow().raft;
            !raft.is_asleep() && !raft.membership().is_alone(self.node_id)
        };
        if awake && let Some(shard) = self.shard.upgrade() {
            shard.wake(self.slot.get());
        }
    }
}
