//! Which other brokers are up: those that have connections to this one on which they are heard.
//!
//! A connection that ends is news for every shard (`Shard::on_node_down`): Raft's groups sleep when they have nothing to
//! do, and nobody else would notice.

use std::collections::BTreeMap;
use std::sync::Mutex;

#[derive(Debug, Clone, Copy)]
struct Member {
    boot_id: u64,
    connections: usize,
}

#[derive(Debug, Default)]
pub struct Members {
    up: Mutex<BTreeMap<i32, Member>>,
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
}
