//! Requests of Kafka clients that only the leader of the metadata can answer, passed to it as they came.
//!
//! Clients that know better ask the controller themselves, and none of this happens.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;
use tokio::time::Instant;

use super::requests::{self, Answered, AskError};
use crate::controller::METADATA_GROUP;
use crate::dispatch::Answer;
use crate::shard::Shard;

/// As long as an election takes, and some more.
const LEADER_TIME_MAX: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The leader's answer. None: this node leads, or nobody does for now, and the answer is to be given here. An error when the
/// leader went away before it answered.
pub async fn to_controller(shard: &Rc<Shard>, frame: Bytes) -> Option<Result<Answer, String>> {
    let deadline = Instant::now() + LEADER_TIME_MAX;
    let own = shard.node.config.node_id;
    loop {
        match shard.node.leaders.get(METADATA_GROUP) {
            Some((leader, _)) if leader == own => return None,
            Some((leader, _)) if leader >= 0 => {
                match shard.links.ask(leader, requests::KAFKA, frame.clone()).await {
                    Ok(Answered { code: 0, body }) => return Some(Ok(Answer::Ready(vec![body]))),
                    Ok(Answered { code, .. }) if ErrorCode(code) != ErrorCode::NOT_CONTROLLER => {
                        return Some(Err(format!("the controller refused it: {}", ErrorCode(code))));
                    }
                    Ok(_) | Err(AskError::NotSent) => {}
                    Err(AskError::Lost) => return Some(Err("the controller went away".to_string())),
                }
            }
            _ => {}
        }
        if Instant::now() > deadline {
            return None;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}
