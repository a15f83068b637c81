//! Members of a consumer group that write down all they are given, and the history that the checker judges.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use flumen_checker::{Event, History, Options, Outcome};
use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::message::Message;

use crate::kafka::{Place, Record};
use crate::load::number_of;

/// What a member got, in its order.
#[derive(Clone, Debug)]
pub struct Polled {
    pub place: Place,
    pub number: u64,
    /// The first one of its partition since the partition was given to the member.
    pub is_first: bool,
}

#[derive(Clone, Default)]
struct Positions(Arc<Mutex<BTreeSet<i32>>>);

impl ClientContext for Positions {}

impl ConsumerContext for Positions {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(_) = rebalance {
            self.0.lock().expect("no panic under this lock").clear();
        }
    }
}

/// One member of a group, which commits what it has written down.
pub struct Witness {
    polled: Arc<Mutex<Vec<Polled>>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Witness {
    pub fn start(kafka: &str, topic: &str, group: &str) -> anyhow::Result<Witness> {
        let positions = Positions::default();
        let consumer: BaseConsumer<Positions> = ClientConfig::new()
            .set("bootstrap.servers", kafka)
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "500")
            .set("reconnect.backoff.max.ms", "200")
            .set("retry.backoff.max.ms", "200")
            .set("check.crcs", "true")
            .create_with_context(positions.clone())?;
        consumer.subscribe(&[topic])?;
        let polled: Arc<Mutex<Vec<Polled>>> = Arc::default();
        let stopped = Arc::new(AtomicBool::new(false));
        let thread = {
            let (polled, stopped) = (polled.clone(), stopped.clone());
            std::thread::spawn(move || consume(&consumer, &positions, &polled, &stopped))
        };
        Ok(Witness { polled, stopped, thread: Some(thread) })
    }

    pub fn polled(&self) -> Vec<Polled> {
        self.polled.lock().expect("no panic under this lock").clone()
    }

    pub fn count(&self) -> usize {
        self.polled.lock().expect("no panic under this lock").len()
    }

    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.stopped.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow::anyhow!("a consumer panicked"))?,
            None => Ok(()),
        }
    }
}

fn consume(
    consumer: &BaseConsumer<Positions>,
    positions: &Positions,
    polled: &Mutex<Vec<Polled>>,
    stopped: &AtomicBool,
) -> anyhow::Result<()> {
    let mut since_commit = 0;
    while !stopped.load(Ordering::Relaxed) {
        match consumer.poll(Duration::from_millis(100)) {
            // Brokers go away here; the client finds the next one.
            None | Some(Err(_)) => {}
            Some(Ok(message)) => {
                let number = number_of(message.payload().unwrap_or_default())?;
                let is_first =
                    positions.0.lock().expect("no panic under this lock").insert(message.partition());
                let place = (message.partition(), message.offset());
                polled.lock().expect("no panic under this lock").push(Polled { place, number, is_first });
                since_commit += 1;
                if since_commit == 100 {
                    since_commit = 0;
                    // Whether it arrived shows after the next rebalance.
                    let _ = consumer.commit_consumer_state(CommitMode::Async);
                }
            }
        }
    }
    Ok(())
}

/// Lets the checker judge what one producer sent to a topic, the members of a group were given, and is there at the end.
/// Everything that was acknowledged must be there, and the group must have seen all of it.
pub fn judge(
    topic: &str,
    acknowledged: &BTreeMap<Place, u64>,
    witnesses: &[Witness],
    stored: &[Record],
) -> anyhow::Result<()> {
    let name = |partition: i32| format!("{topic}-{partition}");
    let mut history = History::default();
    // The producer keeps the order of what it is given, so its numbers are its order.
    let by_number: BTreeMap<u64, Place> =
        acknowledged.iter().map(|(place, number)| (*number, *place)).collect();
    ensure!(by_number.len() == acknowledged.len(), "a record was acknowledged at two places");
    for (number, (partition, offset)) in &by_number {
        let partition = name(*partition);
        history.push(
            0,
            Event::Send { op: *number, producer: 1, epoch: 0, partition, value: *number, txn: None },
        );
        history.push(0, Event::Sent { op: *number, outcome: Outcome::Ok, offset: Some(*offset) });
    }
    let mut seen = BTreeSet::new();
    for (consumer, witness) in (1..).zip(witnesses) {
        for Polled { place: (partition, offset), number, is_first } in witness.polled() {
            seen.insert((partition, offset));
            history.push(
                0,
                Event::Poll {
                    consumer,
                    partition: name(partition),
                    records: vec![(offset, number)],
                    committed_only: false,
                    seek: is_first,
                    txn: None,
                },
            );
        }
    }
    let mut finals: BTreeMap<i32, Vec<(i64, u64)>> = BTreeMap::new();
    for record in stored {
        let number = number_of(&record.value).with_context(|| format!("at {:?}", record.place))?;
        finals.entry(record.place.0).or_default().push((record.place.1, number));
    }
    for (partition, records) in &finals {
        for (place, (offset, _)) in (0i64..).zip(records) {
            ensure!(place == *offset, "{} has a hole before {offset}", name(*partition));
        }
        history.push(
            0,
            Event::FinalRead {
                partition: name(*partition),
                log_start: 0,
                records: records.clone(),
                committed: records.iter().map(|(_, number)| *number).collect(),
            },
        );
    }
    let anomalies = flumen_checker::check(&history, Options::default());
    ensure!(
        anomalies.is_empty(),
        "{} anomalies, first {:?}",
        anomalies.len(),
        &anomalies[..anomalies.len().min(5)]
    );
    // Idempotent, and all of it acknowledged: nothing more is stored than that.
    ensure!(
        stored.len() == acknowledged.len(),
        "{} stored, {} acknowledged",
        stored.len(),
        acknowledged.len()
    );
    if !witnesses.is_empty() {
        let missed = acknowledged.keys().filter(|place| !seen.contains(place)).count();
        ensure!(missed == 0, "the group was never given {missed} of {} records", acknowledged.len());
    }
    Ok(())
}
