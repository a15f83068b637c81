//! How fast replicas that lack much are filled, so that producers do not notice.
//!
//! Every broker has limits for what it sends to such replicas as a leader and for what it gets for its own: one that holds
//! unless something else is said (`flumen.catch.up.rate`), and one for the replicas that an operator throttles as in Kafka
//! (`leader.` and `follower.replication.throttled.rate`, and the topic's `.throttled.replicas`). Who is held up at all is
//! decided elsewhere (`partition/catch_up.rs`); nobody in sync ever comes here.

use std::sync::Mutex;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_metadata::ThrottledReplicas;
use flumen_protocol::error_code::ErrorCode;
use tokio::sync::MutexGuard;
use tokio::time::Instant;

use super::requests::{self, Answered};
use crate::node::Node;
use crate::shard::Shard;

/// Whoever waits looks again after so long, as the rate may be another one then.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A follower that takes longer to say whether it has room is not waited for: it may not know the question.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

/// No limit.
pub const UNLIMITED: u64 = i64::MAX as u64;

/// A budget of bytes per second that several tasks share, in the order in which they ask. Nothing is saved up.
#[derive(Debug, Default)]
pub struct Pace {
    owed: Mutex<Owed>,
    line: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Owed {
    bytes: f64,
    at: Option<Instant>,
}

impl Owed {
    fn settle(&mut self, now: Instant, rate: u64) {
        let passed = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.bytes = (self.bytes - passed.as_secs_f64() * rate as f64).max(0.0);
        self.at = Some(now);
    }
}

impl Pace {
    /// So many bytes were moved; negative: fewer than was said before.
    pub fn pay(&self, now: Instant, rate: u64, bytes: i64) {
        let mut owed = self.owed.lock().expect("no panic under this lock");
        owed.settle(now, rate);
        owed.bytes = (owed.bytes + bytes as f64).max(0.0);
    }

    /// How long until more may be moved, at this rate in bytes per second. Whatever was moved is paid for by then.
    pub fn until_free(&self, now: Instant, rate: u64) -> Duration {
        let mut owed = self.owed.lock().expect("no panic under this lock");
        owed.settle(now, rate);
        match owed.bytes / rate.max(1) as f64 {
            // Rounding must not leave anybody waiting for nothing, nor overflow.
            seconds if seconds < 1e-6 => Duration::ZERO,
            seconds => Duration::from_secs_f64(seconds.min(1e6)),
        }
    }

    /// Waits for its turn; whoever has it moves something, pays, and lets go of it.
    pub async fn turn(&self, rate: impl Fn() -> u64) -> MutexGuard<'_, ()> {
        let turn = self.line.lock().await;
        loop {
            match self.until_free(Instant::now(), rate()) {
                Duration::ZERO => return turn,
                wait => tokio::time::sleep(wait.min(LOOK_INTERVAL)).await,
            }
        }
    }
}

/// The limits of one direction.
#[derive(Debug, Default)]
pub struct Paces {
    usual: Pace,
    asked: Pace,
}

/// What this broker sends to replicas that lack much, and what it gets for its own.
#[derive(Debug, Default)]
pub struct CatchUp {
    sent: Paces,
    received: Paces,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Sent,
    Received,
}

/// What holds for a replica.
pub struct Limit<'a> {
    pub pace: &'a Pace,
    /// Bytes per second.
    pub rate: u64,
    /// An operator asked for it: everything counts. Otherwise what is written meanwhile does not, so that every replica comes
    /// nearer however much that is.
    pub is_asked: bool,
}

/// The limit for what this node sends or gets of a partition, `throttled` being the replicas that its topic throttles.
pub fn limit<'a>(
    node: &'a Node,
    direction: Direction,
    throttled: &ThrottledReplicas,
    partition: i32,
) -> Limit<'a> {
    let (paces, name) = match direction {
        Direction::Sent => (&node.catch_up.sent, "leader.replication.throttled.rate"),
        Direction::Received => (&node.catch_up.received, "follower.replication.throttled.rate"),
    };
    let image = node.image.load();
    let given = |name| node.config.number_now(&image, name);
    if throttled.has(partition, node.config.node_id)
        && let Some(rate) = given(name)
    {
        return Limit { pace: &paces.asked, rate: in_range(rate), is_asked: true };
    }
    let rate = given("flumen.catch.up.rate").map_or(UNLIMITED, in_range);
    Limit { pace: &paces.usual, rate, is_asked: false }
}

/// A rate of 0 would be a replica that never comes.
fn in_range(rate: i64) -> u64 {
    u64::try_from(rate).unwrap_or(0).max(1)
}

/// What a follower says to a leader that wants to send it something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    Go,
    AskAgainIn(Duration),
}

/// Asks a follower's node whether a replica of its may be sent so many bytes; negative: so many less than was asked for.
pub async fn ask(shard: &Shard, node_id: i32, group_id: u64, bytes: i64) -> Grant {
    let mut body = BytesMut::with_capacity(16);
    body.put_u64(group_id);
    body.put_i64(bytes);
    let asked = shard.links.ask(node_id, requests::PACE, body.freeze());
    match tokio::time::timeout(ANSWER_TIME_MAX, asked).await {
        Ok(Ok(Answered { code: 0, mut body })) if body.len() == 4 => match body.get_u32() {
            0 => Grant::Go,
            wait_ms => Grant::AskAgainIn(Duration::from_millis(wait_ms.into()).min(LOOK_INTERVAL)),
        },
        // Gone, or older than the question.
        _ => Grant::Go,
    }
}

pub(super) async fn answer(node: &Node, mut body: Bytes) -> Answered {
    if body.len() != 16 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let (group_id, bytes) = (body.get_u64(), body.get_i64());
    let wait = node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id)?;
            let (node, now) = (&shard.node, Instant::now());
            let throttled = partition.throttled(Direction::Received);
            let limit = limit(node, Direction::Received, &throttled, partition.index);
            let wait = limit.pace.until_free(now, limit.rate);
            if wait.is_zero() || bytes < 0 {
                limit.pace.pay(now, limit.rate, bytes);
            }
            Some(wait)
        })
        .await;
    let wait = match wait {
        Ok(Some(wait)) => wait.min(LOOK_INTERVAL),
        // Nothing is sent to a replica that is not here.
        _ => LOOK_INTERVAL,
    };
    let wait_ms = u32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u32::MAX);
    Answered { code: 0, body: Bytes::copy_from_slice(&wait_ms.to_be_bytes()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_moved_is_paid_for_and_nothing_is_saved_up() {
        let pace = Pace::default();
        let (rate, start) = (1_000_000, Instant::now());
        assert_eq!(pace.until_free(start, rate), Duration::ZERO);
        pace.pay(start, rate, 500_000);
        pace.pay(start, rate, 500_000);
        assert_eq!(pace.until_free(start, rate), Duration::from_secs(1));
        // Half of it was not needed.
        pace.pay(start, rate, -500_000);
        assert_eq!(pace.until_free(start, rate), Duration::from_millis(500));
        // What is owed at another rate takes as long as it takes at that.
        assert_eq!(pace.until_free(start, rate / 10), Duration::from_secs(5));
        assert_eq!(pace.until_free(start, UNLIMITED), Duration::ZERO);
        let later = start + Duration::from_secs(60);
        pace.pay(later, rate, 100_000);
        assert_eq!(pace.until_free(later, rate), Duration::from_millis(100));
    }

    #[tokio::test]
    async fn those_who_share_wait_for_each_other() {
        let pace = Pace::default();
        let begun = Instant::now();
        let moves = |bytes| {
            let pace = &pace;
            async move {
                for _ in 0..5 {
                    let _turn = pace.turn(|| 10_000_000).await;
                    pace.pay(Instant::now(), 10_000_000, bytes);
                }
            }
        };
        // What comes last is not waited for.
        tokio::join!(moves(100_000), moves(300_000));
        assert!(begun.elapsed() >= Duration::from_millis(170), "{:?}", begun.elapsed());
    }
}
