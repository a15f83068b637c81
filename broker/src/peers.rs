//! What this shard has to say to other brokers: Raft's messages, by the broker they are for, until a link takes them.
//!
//! Bounded: what does not fit is dropped, and Raft says it again. One broker's queue is of no concern to another's.
//! Lives on the shard's thread; who carries the messages, and whether anybody does, is not known here.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use flumen_raft::{Body, Message};
use tokio::sync::Notify;

/// Waiting for one broker: what a gigabit link carries in about a third of a second. A leader has at most 16 MiB
/// unanswered per partition, so only many partitions that catch up together come here.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// What a message costs beside its payloads.
const MESSAGE_BYTES: usize = 64;

#[derive(Default)]
struct Queue {
    messages: VecDeque<(u64, Message)>,
    bytes: usize,
    arrived: Rc<Notify>,
}

/// Raft ids name brokers here (node id + 1).
#[derive(Default)]
pub struct Outbox {
    queues: RefCell<HashMap<u64, Queue>>,
}

fn bytes_of(message: &Message) -> usize {
    let payload = match &message.body {
        Body::Append { entries, .. } => entries.iter().map(|entry| entry.data.len() + MESSAGE_BYTES).sum(),
        Body::Snapshot { data, .. } => data.len(),
        _ => 0,
    };
    payload + MESSAGE_BYTES
}

impl Outbox {
    /// False when it was dropped.
    pub fn push(&self, to: u64, group_id: u64, message: Message) -> bool {
        let mut queues = self.queues.borrow_mut();
        let queue = queues.entry(to).or_default();
        let bytes = bytes_of(&message);
        // One message always fits into an empty queue.
        if queue.bytes + bytes > WAITING_BYTES_MAX && !queue.messages.is_empty() {
            return false;
        }
        queue.bytes += bytes;
        queue.messages.push_back((group_id, message));
        queue.arrived.notify_one();
        true
    }

    /// All that waits for a broker, oldest first.
    pub fn take(&self, to: u64) -> Vec<(u64, Message)> {
        let mut queues = self.queues.borrow_mut();
        let Some(queue) = queues.get_mut(&to) else { return Vec::new() };
        queue.bytes = 0;
        std::mem::take(&mut queue.messages).into()
    }

    /// Waits until something is there for this broker. One waiter per broker at a time.
    pub async fn wait(&self, to: u64) {
        let arrived = {
            let mut queues = self.queues.borrow_mut();
            let queue = queues.entry(to).or_default();
            if !queue.messages.is_empty() {
                return;
            }
            queue.arrived.clone()
        };
        arrived.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use flumen_raft::{Entry, Membership};

    fn heartbeat(to: u64) -> Message {
        Message { from: 1, to, term: 1, body: Body::Heartbeat { commit: 0, read: None, sleep: false } }
    }

    fn large(to: u64) -> Message {
        let entry = Entry { index: 1, term: 1, data: Bytes::from(vec![0; 20 << 20]), is_membership: false };
        let body = Body::Append { prev_index: 0, prev_term: 0, commit: 0, entries: vec![entry] };
        Message { from: 1, to, term: 1, body }
    }

    #[test]
    fn each_broker_has_a_bounded_queue_of_its_own() {
        let outbox = Outbox::default();
        assert!(outbox.push(2, 7, large(2)));
        assert!(!outbox.push(2, 8, large(2)), "it does not fit");
        assert!(outbox.push(2, 9, heartbeat(2)) && outbox.push(3, 7, large(3)));
        let groups: Vec<u64> = outbox.take(2).into_iter().map(|(group, _)| group).collect();
        assert_eq!(groups, [7, 9]);
        assert!(outbox.take(2).is_empty());
        let membership = Membership::of_voters([1]);
        let body = Body::Snapshot { index: 1, term: 1, membership, data: vec![0; 64 << 20].into() };
        assert!(outbox.push(2, 7, Message { from: 1, to: 2, term: 1, body }), "one always fits");
    }

    #[tokio::test]
    async fn who_waits_is_woken_once_something_is_there() {
        let outbox = Outbox::default();
        let woken = async {
            outbox.wait(2).await;
            outbox.take(2).len()
        };
        let pushed = async {
            tokio::task::yield_now().await;
            outbox.push(2, 7, heartbeat(2));
            outbox.push(2, 7, heartbeat(2));
        };
        assert_eq!(tokio::join!(woken, pushed).0, 2);
        outbox.push(2, 7, heartbeat(2));
        outbox.wait(2).await;
    }
}
