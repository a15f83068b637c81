//! A replica that has committed records which the other two lost: they get back the directories that they had before.

use std::fs;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use flumen_metadata::Durability;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::*;
use crate::cluster::inbound::answer_of_replicas;
use crate::cluster::links::Carrier;
use crate::cluster::requests::{Answered, AskError};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Questions go straight to whom they are for.
struct Asks(Vec<Arc<Node>>);

impl Carrier for Asks {
    fn ask(
        &self,
        node_id: i32,
        kind: u16,
        body: Bytes,
    ) -> LocalBoxFuture<'static, Result<Answered, AskError>> {
        let node = self.0.iter().find(|node| node.config.node_id == node_id).cloned();
        async move {
            let node = node.ok_or(AskError::NotSent)?;
            // None of these answers depends on who asks.
            Ok(answer_of_replicas(&node, -1, kind, body).await)
        }
        .boxed_local()
    }
}

/// Broker 0 has five records of all, and three that the others lost; in their place those have two.
async fn contradicting(three: &Rc<Three>) {
    for _ in 0..5 {
        produce(three, b"kept", None).await;
    }
    three.lead_again(0).await;
    three.agree(0).await;
    let saved = tempfile::tempdir().unwrap();
    let kept = |at: usize| saved.path().join(at.to_string());
    for at in [1, 2] {
        three.kill(at).await;
        copy(three.dirs[at].path(), &kept(at));
        three.start(at);
        three.agree(0).await;
    }
    assert_eq!(three.leader().await, 0);
    for _ in 0..3 {
        produce(three, b"lost", None).await;
    }
    three.agree(0).await;
    // It knows that they are committed, which after a start it might not.
    three.cut_off.borrow_mut().insert(0);
    for at in [1, 2] {
        three.kill(at).await;
    }
    for at in [1, 2] {
        fs::remove_dir_all(three.dirs[at].path()).unwrap();
        copy(&kept(at), three.dirs[at].path());
        three.start(at);
    }
    assert_eq!(produce(three, b"instead", None).await, 5);
    assert_eq!(produce(three, b"instead", None).await, 6);
    let asks = Asks(three.up().iter().map(|broker| broker.node.clone()).collect());
    three.at(0).node.shards[0].post(move |shard| shard.links.carry_by(Box::new(asks))).await.unwrap();
    three.cut_off.borrow_mut().remove(&0);
}

fn count(log: &[u8], value: &[u8]) -> usize {
    log.windows(value.len()).filter(|found| *found == value).count()
}

#[test]
fn what_only_one_replica_has_left_goes_where_memory_acknowledges() {
    with_durability(Durability::Os, &[0, 1, 2], |three| async move {
        contradicting(&three).await;
        let begun = || async { three.at(0).run(|p| p.gauges.begun_over.load(Ordering::Relaxed)).await };
        // Until then it may take itself for the leader.
        until(|| async { begun().await > 0 }).await;
        let log = three.agree(0).await;
        assert_eq!((count(&log, b"kept"), count(&log, b"lost"), count(&log, b"instead")), (5, 0, 2));
        assert_eq!(begun().await, 1);
        // It takes part again, also after a start of its own: without it nothing could be committed here.
        three.kill(0).await;
        produce(&three, b"while it is away", None).await;
        three.start(0);
        three.agree(0).await;
        let leader = three.leader().await;
        three.kill(if leader == 0 { 1 } else { leader }).await;
        assert_eq!(produce(&three, b"with its vote", None).await, 8);
        assert_eq!(count(&three.agree(0).await, b"kept"), 5);
    });
}

#[test]
fn what_only_one_replica_has_left_stays_where_disks_acknowledge() {
    with_durability(Durability::Durable, &[0, 1, 2], |three| async move {
        contradicting(&three).await;
        until(|| async { three.at(0).run(|p| p.damage().is_some()).await }).await;
        let (damage, end) =
            three.at(0).run(|p| (p.damage().unwrap_or_default().to_owned(), p.log_end_offset())).await;
        assert!(damage.starts_with("offsets 5 to 8 are committed here"), "{damage}");
        assert!(damage.contains("kafka-reassign-partitions") && damage.contains("debug recover"), "{damage}");
        assert_eq!(end, 8);
        // The others go on, and nothing has gone after the next start.
        assert_eq!(produce(&three, b"instead", None).await, 7);
        three.kill(0).await;
        three.start(0);
        until(|| async { three.at(0).run(|p| p.damage().is_some()).await }).await;
        assert_eq!(three.at(0).run(|p| p.log_end_offset()).await, 8);
        three.kill(0).await;
    });
}
