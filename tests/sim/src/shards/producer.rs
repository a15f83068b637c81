//! Producers. The idempotent one keeps up to five batches of one partition unanswered and sends them again as Java's and
//! librdkafka's do: in order, with the same sequences; Java's sends the oldest alone while it is tried again. It takes a new
//! id only when it is started anew. The other one never sends a batch twice.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use flumen_broker::handlers::produce::{Item, Results, append_all};
use flumen_checker::{Event, Outcome};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::BatchBuilder;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::broker::{Broker, EPOCH_MS};
use super::world::{World, name_of};
use crate::network::Time;

const IN_FLIGHT_MAX: usize = 5;
const RECORDS_MAX: u64 = 3;
/// Some batches are large enough that several of them fill a segment.
const PADDING_BYTES_MAX: u64 = 2_000;
/// Records have so many different timestamps.
pub(super) const TIMESTAMPS: u64 = 1_000;

struct Answered {
    connection: u64,
    tag: i32,
    /// Error and base offset; none when the connection is closed.
    result: Option<(ErrorCode, i64)>,
}

type Line = mpsc::UnboundedSender<(i32, oneshot::Receiver<Results>)>;

/// To one process of a broker. Requests arrive in the order in which they were sent, and are answered in it. One that was
/// given up may still have requests on their way.
struct Connection {
    number: u64,
    broker: Rc<Broker>,
    boot: Option<u64>,
    last_arrival: Cell<Time>,
    last_answer: Cell<Time>,
    answers: mpsc::UnboundedSender<Answered>,
    line: RefCell<Option<Line>>,
}

impl Connection {
    fn new(world: &World, broker: Rc<Broker>, answers: &mpsc::UnboundedSender<Answered>) -> Rc<Connection> {
        Rc::new(Connection {
            number: world.number(),
            boot: broker.boot(),
            broker,
            last_arrival: Cell::new(0),
            last_answer: Cell::new(0),
            answers: answers.clone(),
            line: RefCell::default(),
        })
    }

    fn send(self: &Rc<Self>, world: &Rc<World>, group: u64, tag: i32, records: BytesMut, for_all: bool) {
        let at = (world.now() + world.between(100, 2_000)).max(self.last_arrival.get());
        self.last_arrival.set(at);
        let connection = self.clone();
        world.at(at, move |world| {
            let item = Item { topic: 0, partition: group as i32, group_id: group, for_all, records };
            connection.arrives(world, tag, item);
        });
    }

    fn arrives(self: Rc<Self>, world: &Rc<World>, tag: i32, item: Item) {
        let (connection, for_job) = (self.clone(), world.clone());
        let is_same = self.boot.is_some() && self.broker.boot() == self.boot;
        let posted = is_same
            && self.broker.post(move |shard| {
                let (done, answer) = oneshot::channel();
                append_all(shard, vec![item], done);
                connection.wait_in_line(&for_job, tag, answer);
            });
        if !posted {
            self.answer(world, tag, None);
        }
    }

    fn wait_in_line(self: Rc<Self>, world: &Rc<World>, tag: i32, answer: oneshot::Receiver<Results>) {
        let mut line = self.line.borrow_mut();
        let sender = line.get_or_insert_with(|| {
            let (sender, mut waiting) = mpsc::unbounded_channel::<(i32, oneshot::Receiver<Results>)>();
            let (connection, world) = (self.clone(), world.clone());
            tokio::task::spawn_local(async move {
                while let Some((tag, answer)) = waiting.recv().await {
                    let results = answer.await.ok();
                    if connection.broker.machine.is_down() {
                        return;
                    }
                    let result = results.and_then(|all| all.first().map(|r| (r.error, r.base_offset)));
                    connection.answer(&world, tag, result);
                }
            });
            sender
        });
        let _ = sender.send((tag, answer));
    }

    fn answer(&self, world: &World, tag: i32, result: Option<(ErrorCode, i64)>) {
        let answered = Answered { connection: self.number, tag, result };
        let answers = self.answers.clone();
        let at = (world.now() + world.between(100, 2_000)).max(self.last_answer.get());
        self.last_answer.set(at);
        world.at(at, move |_| drop(answers.send(answered)));
    }
}

/// Whom a client takes for the leader.
pub(super) struct LeaderKnown {
    leader: Rc<Broker>,
    pub epoch: i32,
}

impl LeaderKnown {
    pub fn nobody(world: &World) -> LeaderKnown {
        LeaderKnown { leader: world.brokers[0].clone(), epoch: -1 }
    }

    /// Asks a broker's metadata. What is older than what is known is not believed, as Kafka's clients do not; who is told
    /// nothing tries anybody.
    pub fn ask(&mut self, world: &World, group: u64) -> Rc<Broker> {
        let some = world.brokers[world.below(world.brokers.len() as u64) as usize].clone();
        match leader_told_by(world, &some, group) {
            Some((leader, epoch)) if epoch >= self.epoch => *self = LeaderKnown { leader, epoch },
            None if self.epoch == -1 => return some,
            _ => {}
        }
        self.leader.clone()
    }
}

/// As Metadata of this broker says.
fn leader_told_by(world: &World, broker: &Broker, group: u64) -> Option<(Rc<Broker>, i32)> {
    let (leader, epoch) = broker.node()?.leaders.get(group)?;
    let leader = world.brokers.get(usize::try_from(leader).ok()?)?;
    Some((leader.clone(), epoch))
}

/// They do not grow with the offsets.
pub(super) fn timestamp_of(value: u64) -> i64 {
    EPOCH_MS + (value % TIMESTAMPS) as i64
}

fn batch_of(first: u64, count: u64, producer: Option<(i64, i32)>) -> BytesMut {
    let mut builder = BatchBuilder::new();
    // The same bytes whenever it is sent again.
    let padding =
        vec![b'.'; (first.wrapping_mul(0x9E37_79B9) % PADDING_BYTES_MAX) as usize / (1 + first as usize % 7)];
    for value in first..first + count {
        builder.append(timestamp_of(value), Some(&padding), Some(&value.to_be_bytes()), &[]);
    }
    if let Some((id, sequence)) = producer {
        builder.producer(id, 0, sequence);
    }
    builder.build(0)
}

/// Numbers of values that follow each other.
fn values(world: &World, producer: u64, group: u64) -> (u64, u64) {
    let count = world.between(1, RECORDS_MAX);
    let first = world.number();
    for _ in 1..count {
        world.number();
    }
    for op in first..first + count {
        let partition = name_of(group);
        world.note(Event::Send { op, producer, epoch: 0, partition, value: op, txn: None });
    }
    (first, count)
}

fn ended(world: &World, group: u64, (first, count): (u64, u64), base_offset: Option<i64>) {
    let outcome = if base_offset.is_some() { Outcome::Ok } else { Outcome::Unknown };
    for n in 0..count {
        let offset = base_offset.map(|base| base + n as i64);
        if let Some(offset) = offset {
            let number = world.number();
            world.heard.borrow_mut().acknowledged(group, offset, number, first + n);
        }
        world.note(Event::Sent { op: first + n, outcome, offset });
    }
    if base_offset.is_some() {
        world.acknowledged.set(world.acknowledged.get() + 1);
    }
}

struct Batch {
    sequence: i32,
    values: (u64, u64),
    sent: bool,
    tries: u32,
}

struct Producer {
    world: Rc<World>,
    group: u64,
    id: i64,
    next_sequence: i32,
    queue: VecDeque<Batch>,
    any_acknowledged: bool,
    leader: LeaderKnown,
    one_by_one: bool,
    connection: Option<Rc<Connection>>,
    /// The connection is left once all that is on it is answered.
    leaving: bool,
    not_before: Instant,
    progress: Instant,
    patience: Duration,
}

impl Producer {
    fn new(world: &Rc<World>, group: u64) -> Producer {
        Producer {
            group,
            id: world.number() as i64,
            next_sequence: 0,
            queue: VecDeque::new(),
            any_acknowledged: false,
            leader: LeaderKnown::nobody(world),
            one_by_one: world.below(2) == 0,
            connection: None,
            leaving: false,
            not_before: Instant::now(),
            progress: Instant::now(),
            patience: Duration::from_millis(world.between(300, 3_000)),
            world: world.clone(),
        }
    }

    fn push(&mut self) {
        let values = values(&self.world, self.id as u64, self.group);
        self.queue.push_back(Batch { sequence: self.next_sequence, values, sent: false, tries: 0 });
        self.next_sequence += values.1 as i32;
    }

    fn give_up_connection(&mut self) {
        self.connection = None;
        self.leaving = false;
        for batch in self.queue.iter_mut().filter(|batch| batch.sent) {
            batch.sent = false;
            batch.tries += 1;
        }
    }

    fn send_due(&mut self, answers: &mpsc::UnboundedSender<Answered>) {
        let in_flight = self.queue.iter().filter(|batch| batch.sent).count();
        if self.leaving && in_flight == 0 {
            self.give_up_connection();
        }
        if self.leaving || self.queue.is_empty() || Instant::now() < self.not_before {
            return;
        }
        let world = self.world.clone();
        let group = self.group;
        let leader = &mut self.leader;
        let connection = self
            .connection
            .get_or_insert_with(|| Connection::new(&world, leader.ask(&world, group), answers))
            .clone();
        // Kafka takes any first sequence of a producer that it does not know, so nobody sends more before the first is there.
        let most = if self.any_acknowledged { IN_FLIGHT_MAX } else { 1 };
        let mut retried = false;
        for (at, batch) in self.queue.iter_mut().enumerate().take(most) {
            retried |= batch.tries > 0;
            if at > 0 && retried && self.one_by_one {
                break;
            }
            if !batch.sent {
                batch.sent = true;
                let (first, count) = batch.values;
                let records = batch_of(first, count, Some((self.id, batch.sequence)));
                if batch.tries > 0 {
                    world.count("batch sent again");
                }
                self.progress = Instant::now();
                connection.send(&world, group, batch.sequence, records, true);
            }
        }
    }

    /// False: it has to be started anew.
    fn take(&mut self, answered: Answered) -> bool {
        if self.connection.as_ref().is_none_or(|c| c.number != answered.connection) {
            return true;
        }
        let Some((error, base_offset)) = answered.result else {
            self.give_up_connection();
            self.back_off();
            return true;
        };
        let Some(at) = self.queue.iter().position(|b| b.sequence == answered.tag && b.sent) else {
            return true;
        };
        self.progress = Instant::now();
        let broker = self.connection.as_ref().map_or(-1, |c| c.broker.id);
        tracing::debug!(
            at_ms = self.world.now_ms(),
            group = self.group,
            producer = self.id,
            sequence = answered.tag,
            ?error,
            base_offset,
            broker,
            "answered"
        );
        match error {
            ErrorCode::NONE => {
                let Some(batch) = self.queue.remove(at) else { return true };
                self.any_acknowledged = true;
                ended(&self.world, self.group, batch.values, Some(base_offset));
                return true;
            }
            ErrorCode::OUT_OF_ORDER_SEQUENCE_NUMBER if at == 0 => {
                if !self.world.is_voided(self.group) {
                    let (id, sequence) = (self.id, answered.tag);
                    self.world.fail(format!(
                        "broker {broker}: {} told producer {id} that its oldest batch, sequence {sequence}, leaves a gap",
                        name_of(self.group)
                    ));
                }
                return false;
            }
            ErrorCode::OUT_OF_ORDER_SEQUENCE_NUMBER => self.world.count("batch behind a refused one"),
            ErrorCode::NOT_LEADER_OR_FOLLOWER
            | ErrorCode::LEADER_NOT_AVAILABLE
            | ErrorCode::KAFKA_STORAGE_ERROR
            | ErrorCode::UNKNOWN_TOPIC_OR_PARTITION => self.leaving = true,
            error => {
                let what = format!("{} told producer {}: {error:?}", name_of(self.group), self.id);
                self.world.fail(what);
            }
        }
        self.queue[at].sent = false;
        self.queue[at].tries += 1;
        self.back_off();
        true
    }

    fn back_off(&mut self) {
        self.not_before = Instant::now() + Duration::from_millis(self.world.between(2, 80));
    }
}

pub(super) async fn idempotent(world: Rc<World>, group: u64) {
    let (answers, mut answered) = mpsc::unbounded_channel();
    let mut producer = Producer::new(&world, group);
    let mut next = Instant::now();
    let pace = world.pick(&[20, 60, 200]);
    while world.is_sound() && !(world.clients_stop.get() && producer.queue.is_empty()) {
        let room = producer.queue.len() < IN_FLIGHT_MAX;
        if room && !world.clients_stop.get() && Instant::now() >= next {
            producer.push();
            next = Instant::now() + Duration::from_millis(world.below(5).min(1) * world.between(1, pace));
        }
        producer.send_due(&answers);
        let wait = match room && !world.clients_stop.get() {
            true => next.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)),
            false => Duration::from_millis(50),
        };
        let heard = timeout(wait.max(Duration::from_millis(1)), answered.recv()).await;
        let mut anew = world.faults.get() && world.below(2_000) == 0;
        if let Ok(Some(answer)) = heard {
            anew |= !producer.take(answer);
        } else if producer.connection.is_some() && producer.progress.elapsed() > producer.patience {
            producer.give_up_connection();
            producer.progress = Instant::now();
            world.count("request given up");
        }
        if anew {
            world.count("producer started anew");
            producer.queue.iter().for_each(|batch| ended(&world, group, batch.values, None));
            producer = Producer::new(&world, group);
        }
    }
}

/// Sends each batch once, and waits for all replicas or for the leader alone; what is not acknowledged by all may be anywhere.
pub(super) async fn plain(world: Rc<World>, group: u64) {
    let mut leader = LeaderKnown::nobody(&world);
    while world.is_sound() && !world.clients_stop.get() {
        tokio::time::sleep(Duration::from_millis(world.between(5, 200))).await;
        let (answers, mut answered) = mpsc::unbounded_channel();
        let connection = Connection::new(&world, leader.ask(&world, group), &answers);
        // Each batch is a producer's only one: nothing keeps the order of those that were given up.
        let values = values(&world, world.number(), group);
        let for_all = world.below(3) > 0;
        connection.send(&world, group, 0, batch_of(values.0, values.1, None), for_all);
        let heard = timeout(Duration::from_millis(world.between(200, 2_000)), answered.recv()).await;
        let base = match heard {
            Ok(Some(Answered { result: Some((ErrorCode::NONE, base_offset)), .. })) if for_all => {
                Some(base_offset)
            }
            _ => None,
        };
        ended(&world, group, values, base);
    }
}
