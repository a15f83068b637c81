//! One partition on three brokers, each a shard on a thread of its own with a real log; the wires between them are this test's.

mod over;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use flumen_metadata::{BrokerConfig, Durability, MetadataImage, NodeInfo, TopicConfig};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::produce::ProducePartitionResult;
use flumen_protocol::record::BatchBuilder;
use flumen_raft::{Body, Message, Target};
use flumen_storage::{DataDir, ShardStore, StoreConfig};
use tokio::sync::oneshot;

use super::{AppendError, Completion, Origin, Partition, PartitionSpec, ProduceInFlight, Reading};
use crate::export::Exports;
use crate::mailbox::ShardHandle;
use crate::node::{Node, now_ms};
use crate::shard::{Shard, group_of};

const GROUP: u64 = 7;

fn spec(replicas: &[i32]) -> PartitionSpec {
    PartitionSpec {
        topic: "orders".into(),
        index: 0,
        group_id: GROUP,
        config: TopicConfig { segment_bytes: 1 << 20, retention_ms: -1, ..TopicConfig::default() }.into(),
        replicas: replicas.to_vec(),
        exported: false,
    }
}

struct Broker {
    node: Arc<Node>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

fn start(id: i32, path: &Path, replicas: &[i32], durability: Durability) -> Broker {
    let config = BrokerConfig { node_id: id, ..BrokerConfig::default() };
    let info = NodeInfo { id, host: "localhost".to_owned(), port: 9092, rack: None };
    let (handle, mailbox) = ShardHandle::new();
    let (exports, _) = Exports::new();
    let node = Node::new(config, path.to_owned(), MetadataImage::empty(info), vec![handle], exports, None);
    let node = Arc::new(node);
    let (stop, stopped) = oneshot::channel();
    let (for_thread, path, mut spec) = (node.clone(), path.to_owned(), spec(replicas));
    Arc::make_mut(&mut spec.config).durability = durability;
    let thread = std::thread::spawn(move || {
        let dir = DataDir::open(&path).unwrap();
        let recovered = dir.recover(1 << 20).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async move {
            let config =
                StoreConfig { wal_file_bytes: 4 << 20, cache_bytes: 2 << 20, ..StoreConfig::default() };
            let store = ShardStore::open(&dir, config).await.unwrap();
            let shard = Shard::new(0, for_thread, store);
            match recovered.into_iter().find(|group| group_of(group.group_id) == GROUP) {
                Some(group) => drop(shard.attach(spec, group)),
                None => drop(shard.create(spec).unwrap()),
            }
            tokio::select! {
                () = shard.serve(mailbox) => {}
                _ = stopped => {}
            }
        });
    });
    Broker { node, stop, thread }
}

impl Broker {
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Rc<Partition>) -> T + Send + 'static) -> T {
        let asked = self.node.shards[0].run(|shard| async move { work(&shard.partition(GROUP).unwrap()) });
        asked.await.unwrap()
    }

    /// As a process that is killed: nothing is flushed.
    fn kill(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

struct Three {
    dirs: Vec<tempfile::TempDir>,
    brokers: RefCell<Vec<Option<Rc<Broker>>>>,
    /// As the metadata says.
    replicas: RefCell<Vec<i32>>,
    durability: Durability,
    /// Nothing gets in or out.
    cut_off: RefCell<BTreeSet<usize>>,
    /// What they send gets through but for entries of the log.
    mute: RefCell<BTreeSet<usize>>,
}

impl Three {
    fn new(replicas: &[i32], durability: Durability) -> Rc<Three> {
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
        let three = Three {
            dirs,
            brokers: RefCell::new(vec![None, None, None]),
            replicas: RefCell::new(replicas.to_vec()),
            durability,
            cut_off: RefCell::default(),
            mute: RefCell::default(),
        };
        (0..3).for_each(|at| three.start(at));
        Rc::new(three)
    }

    fn start(&self, at: usize) {
        let broker = start(at as i32, self.dirs[at].path(), &self.replicas.borrow(), self.durability);
        self.brokers.borrow_mut()[at] = Some(Rc::new(broker));
    }

    async fn kill(&self, at: usize) {
        let mut broker = self.brokers.borrow_mut()[at].take().unwrap();
        // The wires may have it in hand.
        let broker = loop {
            match Rc::try_unwrap(broker) {
                Ok(broker) => break broker,
                Err(again) => broker = again,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        broker.kill();
        self.tell_down(at).await;
    }

    /// Those who can notice hear that a broker is gone, and it that they are.
    async fn tell_down(&self, at: usize) {
        for other in 0..3 {
            let broker = self.brokers.borrow()[other].clone();
            let downs: Vec<usize> =
                if other == at { (0..3).filter(|id| *id != at).collect() } else { vec![at] };
            let Some(broker) = broker else { continue };
            let tell =
                move |shard: &Rc<Shard>| downs.into_iter().for_each(|id| shard.on_node_down(id as u64 + 1));
            broker.node.shards[0].post(tell).await.unwrap();
        }
    }

    /// Cut off, as all notice who can.
    async fn isolate(&self, at: usize) {
        self.cut_off.borrow_mut().insert(at);
        self.tell_down(at).await;
    }

    fn up(&self) -> Vec<Rc<Broker>> {
        self.brokers.borrow().iter().flatten().cloned().collect()
    }

    fn at(&self, at: usize) -> Rc<Broker> {
        self.brokers.borrow()[at].clone().unwrap()
    }

    /// Carries messages for ever.
    async fn wires(self: Rc<Self>) {
        loop {
            for from in 0..3 {
                let Some(broker) = self.brokers.borrow()[from].clone() else { continue };
                let taken: Vec<(u64, Vec<(u64, Message)>)> = broker.node.shards[0]
                    .run(|shard| async move { (1..=3).map(|to| (to, shard.outbox.take(to))).collect() })
                    .await
                    .unwrap();
                for (to, messages) in taken {
                    let to = to as usize - 1;
                    let cut = |at: usize| self.cut_off.borrow().contains(&at);
                    let Some(target) = self.brokers.borrow()[to].clone() else { continue };
                    if cut(from) || cut(to) {
                        continue;
                    }
                    let mute = self.mute.borrow().contains(&from);
                    let deliver = move |shard: &Rc<Shard>| {
                        for (group, message) in messages {
                            if mute && matches!(message.body, Body::Append { .. }) {
                                continue;
                            }
                            shard.deliver(from as u64 + 1, group, message);
                        }
                    };
                    target.node.shards[0].post(deliver).await.unwrap();
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The leader, once all have the same log.
    async fn agreed_leader(&self) -> (usize, Rc<Broker>) {
        self.agree(0).await;
        let at = self.leader().await;
        (at, self.at(at))
    }

    /// Has whoever leads hand over to this one until it does.
    async fn lead_again(&self, at: usize) {
        while self.leader().await != at {
            let now = self.at(self.leader().await);
            let _ = now.run(move |p| p.transfer_leader(at as u64 + 1)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Who leads, and may serve.
    async fn leader(&self) -> usize {
        loop {
            for at in 0..3 {
                let Some(broker) = self.brokers.borrow()[at].clone() else { continue };
                let leads = |shard: Rc<Shard>| async move {
                    shard.partition(GROUP).is_some_and(|partition| partition.serves())
                };
                if !self.cut_off.borrow().contains(&at) && broker.node.shards[0].run(leads).await.unwrap() {
                    return at;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Until all that are there have the same log, all of it committed. Returns its bytes from `from` on.
    async fn agree(&self, from: i64) -> Vec<u8> {
        let leader = self.leader().await;
        let end = self.at(leader).run(|p| p.log_end_offset()).await;
        for broker in self.up() {
            while broker.run(|p| (p.high_watermark(), p.log_end_offset())).await != (end, end) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let mut logs = Vec::new();
        for broker in self.up() {
            logs.push(content(&broker, from).await);
        }
        assert!(logs.iter().all(|log| *log == logs[0]), "the logs differ");
        logs.remove(0)
    }
}

async fn content(broker: &Broker, from: i64) -> Vec<u8> {
    let read = move |shard: Rc<Shard>| async move {
        let partition = shard.partition(GROUP).unwrap();
        let (mut out, mut at) = (Vec::new(), from);
        while at < partition.high_watermark() {
            let slice = partition.fetch(at, 1 << 20).await.unwrap();
            for bytes in &slice.records {
                for batch in flumen_protocol::record_batch::batches(bytes) {
                    at = batch.unwrap().0.next_offset();
                }
                out.extend_from_slice(bytes);
            }
        }
        out
    };
    broker.node.shards[0].run(read).await.unwrap()
}

fn batch(value: &[u8], producer: Option<(i64, i32)>) -> BytesMut {
    let mut builder = BatchBuilder::new();
    // Of now: a producer of long ago is forgotten.
    builder.append(now_ms(), None, Some(value), &[]);
    if let Some((id, sequence)) = producer {
        builder.producer(id, 0, sequence);
    }
    builder.build(0)
}

/// Sends one batch; the answer comes when there is one.
async fn send(
    broker: &Broker,
    records: BytesMut,
    for_all: bool,
) -> Result<oneshot::Receiver<Vec<ProducePartitionResult>>, AppendError> {
    broker
        .run(move |partition| {
            let (done, answer) = oneshot::channel();
            let result = ProducePartitionResult {
                topic: 0,
                partition: 0,
                error: ErrorCode::NONE,
                base_offset: -1,
                log_append_time_ms: -1,
                log_start_offset: -1,
                error_message: None,
                record_errors: Box::default(),
                current_leader: None,
            };
            let in_flight = ProduceInFlight::new(vec![result], done);
            let completion = match for_all {
                true => Completion::Produce(in_flight.clone(), 0),
                false => Completion::ProduceHere(in_flight.clone(), 0),
            };
            let appended =
                partition.append(records, Origin::Client, now_ms(), Some(completion)).map_err(|(e, _)| e)?;
            in_flight.set(0, |r| r.base_offset = appended.base_offset);
            in_flight.submitted();
            Ok(answer)
        })
        .await
}

/// As a client does: to whoever leads, until it is acknowledged. Returns its offset.
async fn produce(three: &Three, value: &[u8], producer: Option<(i64, i32)>) -> i64 {
    loop {
        let leader = three.at(three.leader().await);
        if let Ok(answer) = send(&leader, batch(value, producer), true).await
            && let Ok(results) = answer.await
            && results[0].error == ErrorCode::NONE
        {
            return results[0].base_offset;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn with_three<Fut: Future<Output = ()>>(test: impl FnOnce(Rc<Three>) -> Fut) {
    with_replicas(&[0, 1, 2], test);
}

fn with_replicas<Fut: Future<Output = ()>>(replicas: &[i32], test: impl FnOnce(Rc<Three>) -> Fut) {
    with_durability(Durability::Durable, replicas, test);
}

fn with_durability<Fut: Future<Output = ()>>(
    durability: Durability,
    replicas: &[i32],
    test: impl FnOnce(Rc<Three>) -> Fut,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let three = Three::new(replicas, durability);
        tokio::task::spawn_local(three.clone().wires());
        test(three.clone()).await;
        for at in 0..3 {
            if three.brokers.borrow()[at].is_some() {
                three.kill(at).await;
            }
        }
    });
}

#[test]
fn three_replicas_have_one_log() {
    with_three(|three| async move {
        for n in 0..50 {
            assert_eq!(produce(&three, format!("value {n}").as_bytes(), None).await, n);
        }
        assert!(!three.agree(0).await.is_empty());
        let leader = three.leader().await;
        for (at, broker) in three.up().iter().enumerate() {
            assert_eq!(broker.node.leaders.get(GROUP).unwrap().0, leader as i32);
            if at != leader {
                let refused = send(broker, batch(b"no", None), true).await;
                assert!(matches!(refused, Err(AppendError::NotLeader)));
                let asked = broker.node.shards[0].run(|shard| async move {
                    shard.partition(GROUP).unwrap().offset_at(-1).await.map_err(|error| error.code())
                });
                assert_eq!(asked.await.unwrap().unwrap_err(), ErrorCode::NOT_LEADER_OR_FOLLOWER);
            }
        }
    });
}

#[test]
fn records_that_a_client_deletes_go_on_every_replica() {
    with_three(|three| async move {
        for _ in 0..10 {
            produce(&three, b"value", None).await;
        }
        three.agree(0).await;
        let leader = three.leader().await;
        let delete = |shard: Rc<Shard>| async move {
            let partition = shard.partition(GROUP).unwrap();
            partition.delete_records(7).await.map_err(|error| error.code())
        };
        for (at, broker) in three.up().iter().enumerate().filter(|(at, _)| *at != leader) {
            let refused = broker.node.shards[0].run(delete).await.unwrap();
            assert_eq!(refused, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER), "node {at}");
        }
        assert_eq!(three.at(leader).node.shards[0].run(delete).await.unwrap(), Ok(7));
        three.agree(7).await;
        for broker in three.up() {
            until(|| broker.run(|p| p.log_start_offset() == 7)).await;
        }
        // Retention tells by floors.
        let retained =
            |shard: Rc<Shard>| async move { shard.partition(GROUP).unwrap().cut_below(8).await.ok() };
        assert_eq!(three.at(leader).node.shards[0].run(retained).await.unwrap(), Some(8));
        let (epoch, floor) = three.at(leader).run(|p| p.floor_to_tell(false).unwrap()).await;
        assert_eq!(three.at(leader).run(|p| p.floor_to_tell(false)).await, None, "it is not new");
        for broker in three.up() {
            broker.run(move |p| p.hear_floor(epoch - 1, floor)).await;
            broker.run(move |p| p.hear_floor(epoch, floor)).await;
            assert_eq!(broker.run(|p| p.log_start_offset()).await, 8);
        }
        three.agree(8).await;
    });
}

#[test]
fn a_killed_leader_is_replaced_and_comes_back() {
    with_three(|three| async move {
        for n in 0..20 {
            produce(&three, format!("before {n}").as_bytes(), Some((9, n))).await;
        }
        for round in 1..=3 {
            let leader = three.leader().await;
            three.kill(leader).await;
            for n in 0..20 {
                let sequence = round * 20 + n;
                assert_eq!(produce(&three, b"after", Some((9, sequence))).await, i64::from(sequence));
            }
            three.start(leader);
        }
        three.agree(0).await;
        // Whoever leads knows the producer: a batch of before is told to be one.
        assert_eq!(produce(&three, b"after", Some((9, 78))).await, 78);
    });
}

#[test]
fn a_replica_that_is_far_behind_is_sent_what_segments_have() {
    with_three(|three| async move {
        produce(&three, b"first", None).await;
        let away = (three.leader().await + 1) % 3;
        three.kill(away).await;
        let value = vec![b'v'; 60_000];
        for _ in 0..150 {
            produce(&three, &value, None).await;
        }
        // Of several leaders, so that entries without records lie in between.
        let leader = three.leader().await;
        three.kill(leader).await;
        three.start(leader);
        for _ in 0..20 {
            produce(&three, &value, None).await;
        }
        three.start(away);
        assert!(three.agree(0).await.len() > 170 * 60_000);
    });
}

#[test]
fn a_replica_that_lacks_what_retention_took_begins_anew() {
    with_three(|three| async move {
        for n in 0..3 {
            produce(&three, b"known producer", Some((5, n))).await;
        }
        let away = (three.leader().await + 1) % 3;
        three.agree(0).await;
        three.kill(away).await;
        let value = vec![b'v'; 60_000];
        for _ in 0..100 {
            produce(&three, &value, None).await;
        }
        for broker in three.up() {
            let flushed = move |shard: Rc<Shard>| async move {
                let partition = shard.partition(GROUP).unwrap();
                // Whole segments go once they are there.
                while partition.log.flushed_offset() < 80 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                partition.log.delete_below(80).await.unwrap();
                partition.note_log_start();
                // They stay until it is written down who produced to them.
                partition.enforce_retention(0).await;
                assert!(partition.log.before().2 > 3);
            };
            broker.node.shards[0].run(flushed).await.unwrap();
        }
        three.start(away);
        three.agree(90).await;
        let start = three.at(away).run(|p| p.log_start_offset()).await;
        assert!(start > 3 && start <= 80, "it begins at {start}");
        // It leads one day, and knows producers of which it never had a batch.
        while three.leader().await != away {
            let leader = three.at(three.leader().await);
            let _ = leader.run(move |p| p.transfer_leader(away as u64 + 1)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(produce(&three, b"known producer", Some((5, 2))).await, 2);
        three.kill(away).await;
        three.start(away);
        three.agree(90).await;
    });
}

#[test]
fn what_a_cut_off_leader_wrote_alone_is_replaced() {
    with_three(|three| async move {
        for n in 0..5 {
            produce(&three, b"shared", Some((3, n))).await;
        }
        three.agree(0).await;
        let old = three.leader().await;
        three.isolate(old).await;
        let alone = three.at(old);
        let mut lost = Vec::new();
        for n in 5..10 {
            lost.push(send(&alone, batch(b"nobody hears", Some((3, n))), true).await.unwrap());
        }
        // One that waits for this replica alone gets its answer, as in Kafka.
        let here = send(&alone, batch(b"nobody hears", None), false).await.unwrap().await.unwrap();
        assert_eq!((here[0].error, here[0].base_offset), (ErrorCode::NONE, 10));
        for answer in lost {
            // It steps down when it has not heard of a majority for long enough.
            let results: Vec<ProducePartitionResult> = answer.await.unwrap();
            assert_eq!((results[0].error, results[0].base_offset), (ErrorCode::NOT_LEADER_OR_FOLLOWER, -1));
        }
        for n in 5..8 {
            assert_eq!(produce(&three, b"the others", Some((3, n))).await, i64::from(n));
        }
        drop(alone);
        three.cut_off.borrow_mut().clear();
        let log = three.agree(0).await;
        let has = |what: &[u8]| log.windows(what.len()).any(|bytes| bytes == what);
        assert!(has(b"the others") && !has(b"nobody hears"));
        three.kill(old).await;
        three.start(old);
        assert_eq!(three.agree(0).await, log);
        let producers = three.at(old).run(|p| p.producers()).await;
        assert_eq!(producers.iter().map(|p| (p.0, p.2)).collect::<Vec<_>>(), [(3, 7)]);
    });
}

async fn until<Fut: Future<Output = bool>>(mut met: impl FnMut() -> Fut) {
    while !met().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a batch of producer 9 hears at once, if it is not taken.
async fn refusal(broker: &Broker, sequence: i32) -> Option<ErrorCode> {
    send(broker, batch(b"piped", Some((9, sequence))), true).await.err().map(|error| error.code())
}

/// Regression: some batches of a pipeline were refused by a leader without a first commit, and the next one was not.
#[test]
fn a_leader_takes_batches_before_it_may_serve() {
    with_three(|three| async move {
        produce(&three, b"first", Some((9, 0))).await;
        three.agree(0).await;
        three.mute.borrow_mut().extend(0..3);
        let old = three.leader().await;
        three.kill(old).await;
        let others: Vec<usize> = (0..3).filter(|at| *at != old).collect();
        let mut leader = None;
        while leader.is_none() {
            for at in &others {
                if three.at(*at).run(|p| p.is_leader()).await {
                    leader = Some(*at);
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let leader = three.at(leader.unwrap());
        let mut answers = Vec::new();
        for sequence in 1..4 {
            answers.push(send(&leader, batch(b"piped", Some((9, sequence))), true).await.unwrap());
        }
        // What it had before it led is told to be a repeat.
        let repeat = send(&leader, batch(b"first", Some((9, 0))), true).await.unwrap();
        assert!(!leader.run(|p| p.serves()).await, "nothing of its term is committed yet");
        three.mute.borrow_mut().clear();
        for (answer, offset) in answers.into_iter().zip(1..) {
            let results = answer.await.unwrap();
            assert_eq!((results[0].error, results[0].base_offset), (ErrorCode::NONE, offset));
        }
        assert_eq!(repeat.await.unwrap()[0].base_offset, 0);
    });
}

#[test]
fn a_hand_over_that_fails_leaves_no_gap() {
    with_three(|three| async move {
        produce(&three, b"known", Some((9, 0))).await;
        let (at, leader) = three.agreed_leader().await;
        // One that hears no entries is never ready to lead.
        three.mute.borrow_mut().insert(at);
        let waits = send(&leader, batch(b"piped", Some((9, 1))), true).await.unwrap();
        let to = (at as u64 + 1) % 3 + 1;
        leader.run(move |p| p.transfer_leader(to).unwrap()).await;
        assert_eq!(refusal(&leader, 2).await, Some(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        // Of a producer that nobody knows.
        let first = send(&leader, batch(b"new", Some((10, 0))), true).await;
        assert!(matches!(first, Err(AppendError::NotLeader)));
        until(|| leader.run(|p| p.raft_status().transfer_to.is_none())).await;
        three.mute.borrow_mut().clear();
        assert!(leader.run(|p| p.serves()).await);
        for sequence in [3, 4] {
            assert_eq!(refusal(&leader, sequence).await, Some(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        }
        let second = send(&leader, batch(b"new", Some((10, 1))), true).await;
        assert!(matches!(second, Err(AppendError::Behind(_))));
        for (id, sequence) in [(9, 2), (9, 3), (9, 4), (10, 0), (10, 1)] {
            let answer = send(&leader, batch(b"again", Some((id, sequence))), true).await.unwrap();
            assert_eq!(answer.await.unwrap()[0].error, ErrorCode::NONE);
        }
        assert_eq!(waits.await.unwrap()[0].base_offset, 1);
    });
}

#[test]
fn others_that_do_not_keep_up_for_a_moment_leave_no_gap() {
    with_three(|three| async move {
        produce(&three, b"known", Some((9, 0))).await;
        let (at, leader) = three.agreed_leader().await;
        three.mute.borrow_mut().insert(at);
        let (mut sequence, mut answers) = (1, Vec::new());
        let refused = loop {
            let records = batch(&vec![b'v'; 900_000], Some((9, sequence)));
            match send(&leader, records, true).await {
                Ok(answer) => answers.push(answer),
                Err(error) => break error,
            }
            sequence += 1;
        };
        assert_eq!(refused.code(), ErrorCode::KAFKA_STORAGE_ERROR);
        three.mute.borrow_mut().clear();
        for answer in answers {
            assert_eq!(answer.await.unwrap()[0].error, ErrorCode::NONE);
        }
        assert_eq!(refusal(&leader, sequence + 1).await, Some(ErrorCode::KAFKA_STORAGE_ERROR));
        assert_eq!(refusal(&leader, sequence).await, None);
        assert_eq!(refusal(&leader, sequence + 1).await, None);
    });
}

#[test]
fn a_leadership_that_is_lost_and_won_again_leaves_no_gap() {
    with_three(|three| async move {
        produce(&three, b"known", Some((9, 0))).await;
        let (at, leader) = three.agreed_leader().await;
        three.isolate(at).await;
        let mut told = Vec::new();
        for sequence in 1..3 {
            told.push(send(&leader, batch(b"nobody hears", Some((9, sequence))), true).await.unwrap());
        }
        for answer in told {
            assert_eq!(answer.await.unwrap()[0].error, ErrorCode::NOT_LEADER_OR_FOLLOWER);
        }
        // Another leads, so that what was refused is cut off; and the first leads again.
        three.leader().await;
        three.cut_off.borrow_mut().clear();
        three.agree(0).await;
        three.lead_again(at).await;
        assert_eq!(refusal(&leader, 3).await, Some(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        for sequence in 1..4 {
            let answer = send(&leader, batch(b"again", Some((9, sequence))), true).await.unwrap();
            assert_eq!(answer.await.unwrap()[0].error, ErrorCode::NONE);
        }
        // To a producer that others served meanwhile nothing is missing here.
        let next = three.at((at + 1) % 3);
        assert_eq!(refusal(&next, 4).await, Some(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        for sequence in 4..9 {
            produce(&three, b"goes on", Some((9, sequence))).await;
        }
        while three.leader().await != (at + 1) % 3 {
            let now = three.at(three.leader().await);
            let _ = now.run(move |p| p.transfer_leader((at as u64 + 1) % 3 + 1)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(refusal(&next, 9).await, None);
    });
}

/// A leader that is cut off does not know of the one that replaces it, and says nothing of where the log ends or begins.
#[test]
fn a_deposed_leader_answers_nothing_that_another_contradicts() {
    with_three(|three| async move {
        // Sent again where the answer is lost, and stored once.
        produce(&three, b"old", Some((7, 0))).await;
        let (at, old) = three.agreed_leader().await;
        three.cut_off.borrow_mut().insert(at);
        let asked = [-1, -2, 0].map(|timestamp| {
            old.node.shards[0].run(move |shard| async move {
                let partition = shard.partition(GROUP).unwrap();
                assert!(partition.serves(), "it knows nothing yet");
                partition.offset_at(timestamp).await.map_err(|error| error.code())
            })
        });
        for answer in futures_util::future::join_all(asked).await {
            assert_eq!(answer.unwrap(), Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        }
        assert_eq!(produce(&three, b"new", Some((7, 1))).await, 1);
        let end = three.at(three.leader().await).node.shards[0]
            .run(|shard| async move { shard.partition(GROUP).unwrap().offset_at(-1).await.unwrap().unwrap() })
            .await
            .unwrap();
        assert_eq!(end.offset, 2);
        // All replicas sleep when there is nothing to do, and whoever asks is answered all the same.
        three.cut_off.borrow_mut().clear();
        three.agree(0).await;
        let leader = three.at(three.leader().await);
        until(|| leader.run(|p| p.is_asleep())).await;
        let end = leader.node.shards[0]
            .run(|shard| async move { shard.partition(GROUP).unwrap().offset_at(-1).await.unwrap().unwrap() })
            .await
            .unwrap();
        assert_eq!(end.offset, 2);
    });
}

#[test]
fn clients_read_where_they_may() {
    with_three(|three| async move {
        for _ in 0..3 {
            produce(&three, b"value", None).await;
        }
        let (at, leader) = three.agreed_leader().await;
        let others: Vec<i32> = (0..3).filter(|id| *id != at as i32).collect();
        assert_eq!(leader.run(|p| p.check_reader(false).unwrap()).await, Reading::AsLeader);
        let follower = three.at(others[0] as usize);
        let refused = follower.run(|p| p.check_reader(false).map_err(|error| error.code())).await;
        assert_eq!(refused, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        assert_eq!(follower.run(|p| p.check_reader(true).unwrap()).await, Reading::AsFollower);
        // Who has all of it, and is no further than that.
        let (own, both) = (at as i32, others.clone());
        let chosen = leader.run(move |p| (p.follower_with(&[own], 3), p.follower_with(&both, 3))).await;
        assert!(chosen.0.is_none() && others.contains(&chosen.1.unwrap()));
        three.mute.borrow_mut().insert(at);
        let waits = send(&leader, batch(b"on its way", None), false).await.unwrap();
        waits.await.unwrap();
        let both = others.clone();
        assert_eq!(leader.run(move |p| p.follower_with(&both, 4)).await, None);
        // One that leads and has committed nothing yet lets them wait.
        three.mute.borrow_mut().extend(0..3);
        drop((leader, follower));
        three.kill(at).await;
        until(|| async {
            let states = [three.at(others[0] as usize), three.at(others[1] as usize)];
            let leads = |broker: Rc<Broker>| async move {
                broker.run(|p| p.is_leader().then(|| p.check_reader(false).unwrap())).await
            };
            let [first, second] = states;
            let seen = (leads(first).await, leads(second).await);
            assert!(![seen.0, seen.1].contains(&Some(Reading::AsLeader)), "nothing is committed");
            [seen.0, seen.1].contains(&Some(Reading::NothingYet))
        })
        .await;
        three.mute.borrow_mut().clear();
        three.leader().await;
    });
}

async fn delete_below(broker: &Broker, offset: i64) -> Result<i64, ErrorCode> {
    let delete = move |shard: Rc<Shard>| async move {
        let partition = shard.partition(GROUP).unwrap();
        partition.delete_records(offset).await.map_err(|error| error.code())
    };
    broker.node.shards[0].run(delete).await.unwrap()
}

/// Regression: the leader alone acknowledged it, and under the next one the records were back.
#[test]
fn a_delete_that_was_acknowledged_outlives_its_leader() {
    with_three(|three| async move {
        for _ in 0..10 {
            produce(&three, b"value", None).await;
        }
        three.agree(0).await;
        for offset in [3, 7] {
            let leader = three.leader().await;
            assert_eq!(delete_below(&three.at(leader), offset).await, Ok(offset));
            three.kill(leader).await;
            let next = three.leader().await;
            assert_eq!(three.at(next).run(|p| p.log_start_offset()).await, offset);
            three.start(leader);
            three.agree(offset).await;
            for broker in three.up() {
                until(|| broker.run(move |p| p.log_start_offset() == offset)).await;
            }
        }
        // All at once, and from what each has on its disk.
        for at in 0..3 {
            three.kill(at).await;
        }
        (0..3).for_each(|at| three.start(at));
        three.agree(7).await;
        for broker in three.up() {
            until(|| broker.run(|p| p.log_start_offset() == 7)).await;
        }
        // Without a majority it is not acknowledged, and it does not happen.
        let at = three.leader().await;
        three.isolate(at).await;
        let refused = delete_below(&three.at(at), 9).await;
        assert_eq!(refused, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        three.leader().await;
        three.cut_off.borrow_mut().clear();
        produce(&three, b"later", None).await;
        three.agree(7).await;
        for broker in three.up() {
            assert_eq!(broker.run(|p| p.log_start_offset()).await, 7);
        }
    });
}

/// Regression: a producer was unknown after a cut that took all of its batches that were kept, until the next start, and could
/// have written again what the log had.
#[test]
fn a_producer_is_what_it_was_before_what_is_cut_off() {
    with_three(|three| async move {
        for n in 0..3 {
            produce(&three, b"shared", Some((3, n))).await;
        }
        let (at, old) = three.agreed_leader().await;
        three.isolate(at).await;
        for n in 3..13 {
            drop(send(&old, batch(b"nobody hears", Some((3, n))), true).await.unwrap());
        }
        drop(send(&old, batch(b"nobody hears", Some((4, 0))), true).await.unwrap());
        produce(&three, b"the others", None).await;
        until(|| old.run(|p| !p.is_leader())).await;
        three.cut_off.borrow_mut().clear();
        three.agree(0).await;
        let known = old.run(|p| p.producers()).await;
        assert_eq!(known.iter().map(|p| (p.0, p.2)).collect::<Vec<_>>(), [(3, 2)]);
        three.lead_again(at).await;
        assert_eq!(produce(&three, b"shared", Some((3, 1))).await, 1, "a repeat is told to be one");
        assert_eq!(produce(&three, b"next", Some((3, 3))).await, 4);
    });
}

impl Three {
    /// Asks whoever leads until the members are these; a new replica hears from the leader who they are.
    async fn move_to(&self, voters: &[u64], learners: &[u64]) {
        let target = Target { voters: voters.to_vec(), learners: learners.to_vec() };
        loop {
            let leader = self.at(self.leader().await);
            let wanted = target.clone();
            let (index, members) = leader
                .run(move |p| {
                    let _ = p.propose_membership(wanted);
                    p.members()
                })
                .await;
            for broker in self.up() {
                let members = members.clone();
                broker.run(move |p| p.join(index, members)).await;
            }
            if members.voters == voters && members.learners == learners && !members.is_joint() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// As the metadata does with a replica that is moved away.
    async fn remove(&self, at: usize) {
        let delete = |shard: Rc<Shard>| async move { shard.delete(GROUP).await };
        self.at(at).node.shards[0].run(delete).await.unwrap();
    }

    async fn create(&self, at: usize, replicas: &[i32]) {
        let spec = spec(replicas);
        let create = move |shard: Rc<Shard>| async move { drop(shard.create(spec).unwrap()) };
        self.at(at).node.shards[0].run(create).await.unwrap();
        *self.replicas.borrow_mut() = replicas.to_vec();
    }
}

/// Regression: the replica that came back took old changes of members from a wrong beginning; and its number, which the store
/// had seen deleted, made the next start take it for deleted.
#[test]
fn a_replica_moves_away_and_back() {
    with_replicas(&[0, 1], |three| async move {
        for _ in 0..5 {
            produce(&three, b"before", None).await;
        }
        // To the third, and away from each of the first two in turn.
        three.move_to(&[1, 2], &[3]).await;
        three.agree(0).await;
        three.move_to(&[1, 2, 3], &[]).await;
        for (away, voters, replicas) in [(0, [2, 3], [1, 2]), (1, [1, 3], [0, 2])] {
            three.move_to(&voters, &[]).await;
            three.remove(away).await;
            produce(&three, b"without it", None).await;
            three.create(away, &replicas).await;
            three.move_to(&voters, &[away as u64 + 1]).await;
            three.agree(0).await;
            three.move_to(&[1, 2, 3], &[]).await;
            produce(&three, b"with it", None).await;
            three.kill(away).await;
            produce(&three, b"while it is away", None).await;
            three.start(away);
            three.agree(0).await;
        }
    });
}
