//! Which other brokers are up: those that have connections to this one on which they are heard; and which of the others are
//! heard by those (`hearsay`).
//!
//! A connection that ends is news for every shard (`Shard::on_node_down`): Raft's groups sleep when they have nothing to
//! do, and nobody else would notice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

#[derive(Debug, Clone, Copy)]
struct Member {
    boot_id: u64,
    connections: usize,
}

#[derive(Debug, Default)]
pub struct Members {
    up: Mutex<BTreeMap<i32, Member>>,
    /// Which nodes others hear: who says so, and which.
    told: Mutex<BTreeSet<(i32, i32)>>,
    /// Who decides about the metadata, as far as this node has its log.
    metadata_voters: Mutex<Vec<i32>>,
}

impl Members {
    /// A connection of this broker begins. Refused, with the boot that is connected, when that is another process.
    pub fn arrive(&self, node_id: i32, boot_id: u64) -> Result<(), u64> {
        let mut up = self.up.lock().expect("no panic under this lock");
        let member = up.entry(node_id).or_insert(Member { boot_id, connections: 0 });
        if member.boot_id != boot_id {
            return Err(member.boot_id);
        }
        member.connections += 1;
        Ok(())
    }

    pub fn leave(&self, node_id: i32, boot_id: u64) {
        let mut up = self.up.lock().expect("no panic under this lock");
        if let Some(member) = up.get_mut(&node_id)
            && member.boot_id == boot_id
        {
            member.connections -= 1;
            if member.connections == 0 {
                up.remove(&node_id);
            }
        }
    }

    pub fn is_up(&self, node_id: i32) -> bool {
        self.up.lock().expect("no panic under this lock").contains_key(&node_id)
    }

    pub fn set_metadata_voters(&self, voters: Vec<i32>) {
        *self.metadata_voters.lock().expect("no panic under this lock") = voters;
    }

    /// This node hears no majority of those who decide about the metadata, itself among them: what it knows of the cluster may be
    /// old. That others are down is no matter: a cluster may go on without most of its nodes.
    pub fn is_cut_off(&self, own_id: i32) -> bool {
        let voters = self.metadata_voters.lock().expect("no panic under this lock");
        let heard = voters.iter().filter(|id| **id == own_id || self.is_up(**id)).count();
        2 * heard <= voters.len()
    }

    /// One that is heard says whether it hears a node that is not.
    pub fn note_told(&self, teller: i32, node_id: i32, is_heard: bool) {
        let mut told = self.told.lock().expect("no panic under this lock");
        if is_heard {
            told.insert((teller, node_id))
        } else {
            told.remove(&(teller, node_id))
        };
    }

    /// Heard here, or by one who is: clients may be sent there.
    pub fn is_reachable(&self, node_id: i32) -> bool {
        let up = self.up.lock().expect("no panic under this lock");
        if up.contains_key(&node_id) {
            return true;
        }
        let told = self.told.lock().expect("no panic under this lock");
        told.iter().any(|(teller, of)| *of == node_id && up.contains_key(teller))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_up_while_one_process_of_it_is_connected() {
        let members = Members::default();
        assert!(!members.is_up(2));
        assert_eq!(members.arrive(2, 20), Ok(()));
        assert_eq!(members.arrive(2, 20), Ok(()));
        assert_eq!(members.arrive(2, 21), Err(20), "two processes under one id");
        members.leave(2, 20);
        assert!(members.is_up(2));
        members.leave(2, 99);
        members.leave(2, 20);
        assert!(!members.is_up(2));
        assert_eq!(members.arrive(2, 21), Ok(()), "started again");
    }

    #[test]
    fn who_hears_those_who_decide_is_not_cut_off() {
        let members = Members::default();
        assert!(members.is_cut_off(1), "it does not know who decides");
        members.set_metadata_voters(vec![1, 2, 3]);
        assert!(members.is_cut_off(1));
        members.arrive(4, 40).unwrap();
        assert!(members.is_cut_off(1), "another that decides nothing");
        members.arrive(3, 30).unwrap();
        assert!(!members.is_cut_off(1));
        assert!(members.is_cut_off(5), "one of three, and it has no vote itself");
        // Regression: two that went on without the other three of five took themselves for cut off, and named those as leaders.
        members.set_metadata_voters(vec![1, 3]);
        assert!(!members.is_cut_off(1));
        members.set_metadata_voters(vec![1]);
        assert!(!members.is_cut_off(1));
    }

    #[test]
    fn what_others_hear_counts_while_they_are_heard() {
        let members = Members::default();
        members.arrive(2, 20).unwrap();
        assert!(members.is_reachable(2) && !members.is_reachable(3));
        members.note_told(2, 3, true);
        assert!(members.is_reachable(3) && !members.is_up(3));
        members.leave(2, 20);
        assert!(!members.is_reachable(3));
        members.arrive(2, 20).unwrap();
        members.note_told(2, 3, false);
        assert!(!members.is_reachable(3));
    }
}
