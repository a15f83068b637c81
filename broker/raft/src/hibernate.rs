//! Quiet groups sleep: a broker with 10,000 partitions of which few are written to ticks only those few.
//!
//! A leader whose followers all have everything, and know that it is committed, tells them that it goes to sleep
//! (`Body::Heartbeat` with `sleep`) and stops ticking; a follower that agrees stops too, so no election time-out runs out.
//! Anything that happens wakes a group: a proposal, any message, `Group::wake`. A sleeping
//! follower does not notice that its leader died; whoever keeps the connections to other brokers does, once per broker
//! instead of once per partition, and wakes every group that has a replica there (`Group::on_node_down`): the leader then
//! finds out whether it still has a majority, the followers whether they still have a leader.
//!
//! Sleeping changes nothing about safety: a group that does not tick is a group whose clock is slow.

/// Heartbeat intervals without work before a group sleeps: long enough that a steady trickle of records never pays for it.
pub(crate) const QUIET_TICKS: u32 = 20;

/// Which of a shard's groups tick. Waking and ticking cost the same however many sleep.
#[derive(Debug, Default)]
pub struct AwakeSet {
    awake: Vec<usize>,
    is_awake: Vec<bool>,
}

impl AwakeSet {
    pub fn wake(&mut self, slot: usize) {
        if self.is_awake.len() <= slot {
            self.is_awake.resize(slot + 1, false);
        }
        if !std::mem::replace(&mut self.is_awake[slot], true) {
            self.awake.push(slot);
        }
    }

    /// Calls `tick` for every group that is awake; it answers whether the group stays so. Oldest first, so that a run can be
    /// repeated.
    pub fn tick_all(&mut self, mut tick: impl FnMut(usize) -> bool) {
        let is_awake = &mut self.is_awake;
        self.awake.retain(|slot| {
            let stays = tick(*slot);
            is_awake[*slot] = stays;
            stays
        });
    }

    pub fn len(&self) -> usize {
        self.awake.len()
    }

    pub fn is_empty(&self) -> bool {
        self.awake.is_empty()
    }
}
