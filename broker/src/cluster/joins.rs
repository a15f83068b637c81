//! How a new replica of a group learns who the members are.
//!
//! Its log is empty, and what comes into it begins with changes of members that are long past. Taken one by one from a wrong
//! beginning they would make it believe to be a voter of groups that were; so it takes part in nothing until the leader has
//! told it the membership and the entry that made it so, and skips all changes up to that one, as after a snapshot.

use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;
use flumen_raft::{Contradiction, Membership};

use super::node_id_of;
use super::requests::{self, Answered};
use crate::node::Node;
use crate::partition::Partition;
use crate::shard::Shard;

/// Between two questions; the leader makes it a member when it sees fit.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks until it is told, or the partition goes.
pub async fn join(shard: Rc<Shard>, partition: Rc<Partition>) {
    let group_id = partition.group_id;
    while partition.is_joining() && !shard.is_stopping() {
        if shard.partition(group_id).is_none_or(|now| !Rc::ptr_eq(&now, &partition)) {
            return;
        }
        let leader = shard.node.leaders.get(group_id).map(|(leader_id, _)| leader_id);
        if let Some(leader) = leader.filter(|id| *id >= 0 && *id != shard.node.config.node_id)
            && let Ok(answered) = shard
                .links
                .ask(leader, requests::MEMBERS, Bytes::copy_from_slice(&group_id.to_be_bytes()))
                .await
            && let Some((index, membership)) = decode(answered)
        {
            partition.join(index, membership);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A replica that contradicts its leader asks that leader, until it may begin over, or another leads. The members need not be
/// confirmed: it is one of them already, what the leader has applied no later leader undoes, and without this replica there may
/// be nobody to confirm anything.
pub async fn ask_to_begin_over(shard: Rc<Shard>, partition: Rc<Partition>, found: Contradiction) {
    let group_id = partition.group_id;
    let mut question = BytesMut::with_capacity(16);
    question.put_u64(group_id);
    question.put_u64(found.term);
    let question = question.freeze();
    while partition.still_contradicts(&found) && !shard.is_stopping() {
        if shard.partition(group_id).is_none_or(|now| !Rc::ptr_eq(&now, &partition)) {
            return;
        }
        if let Some(leader) = node_id_of(found.leader_id)
            && let Ok(answered) = shard.links.ask(leader, requests::MEMBERS, question.clone()).await
            && let Some((index, membership)) = decode(answered)
            && partition.still_contradicts(&found)
            && partition.begin_over(&found, index, &membership)
        {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn decode(answered: Answered) -> Option<(u64, Membership)> {
    let mut body = answered.body;
    if answered.code != 0 || body.len() < 8 {
        return None;
    }
    let index = body.get_u64();
    Some((index, Membership::decode(&body).ok()?))
}

pub(super) async fn answer(node: &Node, mut body: Bytes) -> Answered {
    if body.len() != 8 && body.len() != 16 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let group_id = body.get_u64();
    let of_term = (body.len() == 8).then(|| body.get_u64());
    let members = node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id)?;
            match of_term {
                Some(term) => {
                    let now = partition.raft_status().leadership;
                    (partition.is_leader() && now.term == term).then(|| partition.members())
                }
                // A leader that was deposed without knowing it would name members of before, and the new replica would take
                // part in a group that is no more.
                None => {
                    partition.confirm_leads().await.ok()?;
                    Some(partition.members())
                }
            }
        })
        .await;
    match members {
        Ok(Some((index, membership))) => {
            let mut out = BytesMut::new();
            out.put_u64(index);
            out.put_slice(&membership.encode());
            Answered { code: 0, body: out.freeze() }
        }
        _ => Answered { code: ErrorCode::NOT_LEADER_OR_FOLLOWER.0, body: Bytes::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_back() {
        let membership = Membership { learners: vec![4], ..Membership::of_voters([1, 2, 3]) };
        let body = [&9u64.to_be_bytes()[..], &membership.encode()].concat();
        assert_eq!(decode(Answered { code: 0, body: body.clone().into() }), Some((9, membership)));
        assert_eq!(decode(Answered { code: 6, body: body.clone().into() }), None);
        assert_eq!(decode(Answered { code: 0, body: body[..9].to_vec().into() }), None);
    }
}
