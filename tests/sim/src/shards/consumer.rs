//! Consumers: each reads one partition from its beginning on, from whoever it takes for the leader and sometimes from another
//! replica, up to the high watermark, and writes down what it got. It names the newest leader epoch that it was told, as
//! Kafka's clients do.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_broker::partition::{FetchError, Partition};
use flumen_checker::Event;
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch::batches;

use super::broker::Broker;
use super::producer::LeaderKnown;
use super::world::{World, name_of};

const PATIENCE: Duration = Duration::from_millis(1_000);
const DECODED_BYTES_MAX: usize = 1 << 20;

pub(super) struct Read {
    pub records: Vec<Bytes>,
    pub high_watermark: i64,
    pub epoch: i32,
    pub serves: bool,
}

pub(super) async fn read(
    partition: Rc<Partition>,
    asked: i32,
    offset: i64,
    max_bytes: usize,
) -> Result<Read, (FetchError, bool)> {
    let serves = partition.serves();
    let epoch = partition.leader_epoch();
    partition.check_epoch(asked).map_err(|error| (error, serves))?;
    let slice = partition.fetch(offset, max_bytes).await.map_err(|error| (error, serves))?;
    Ok(Read { records: slice.records, high_watermark: slice.high_watermark, epoch, serves })
}

/// (offset, value) of every record from an offset on, or what is wrong with the bytes.
pub(super) fn decode(records: &[Bytes], from: i64) -> Result<Vec<(i64, u64)>, String> {
    let (mut out, mut scratch) = (Vec::new(), Vec::new());
    for bytes in records {
        for batch in batches(bytes) {
            let (header, batch) = batch.map_err(|e| e.to_string())?;
            let records =
                decode_records(batch, &mut scratch, DECODED_BYTES_MAX).map_err(|e| e.to_string())?;
            for (offset, record) in (header.base_offset..).zip(records) {
                let record = record.map_err(|e| e.to_string())?;
                let value = record.value.and_then(|value| value.try_into().ok()).map(u64::from_be_bytes);
                let value = value.ok_or_else(|| format!("offset {offset} has no value of ours"))?;
                if offset >= from {
                    out.push((offset, value));
                }
            }
        }
    }
    Ok(out)
}

/// A request and its answer, each with its way.
pub(super) async fn call<T: 'static, F: Future<Output = T> + 'static>(
    world: &World,
    broker: &Broker,
    work: impl FnOnce(Rc<Partition>) -> F + 'static,
    group: u64,
) -> Option<T> {
    tokio::time::sleep(Duration::from_micros(world.between(100, 2_000))).await;
    let asked = broker.ask(move |shard| async move {
        match shard.partition(group) {
            Some(partition) => Some(work(partition).await),
            None => None,
        }
    });
    let answer = tokio::time::timeout(PATIENCE, asked).await.ok()??;
    tokio::time::sleep(Duration::from_micros(world.between(100, 2_000))).await;
    answer
}

pub(super) async fn consume(world: Rc<World>, group: u64, number: u64) {
    let consumer = group << 8 | number;
    let pace = world.pick(&[10, 60]);
    let mut position = 0;
    let mut leader = LeaderKnown::nobody(&world);
    while world.is_sound() && !world.clients_stop.get() {
        tokio::time::sleep(Duration::from_millis(world.between(1, pace))).await;
        let known = leader.ask(&world, group);
        let broker = match world.below(5) {
            0 => world.brokers[world.below(world.brokers.len() as u64) as usize].clone(),
            _ => known,
        };
        let known_epoch = leader.epoch;
        let max_bytes = world.pick(&[1, 2_000, 20_000]);
        let from = position;
        let Some(answer) = call(&world, &broker, move |p| read(p, known_epoch, from, max_bytes), group).await
        else {
            continue;
        };
        let partition = name_of(group);
        match answer {
            Ok(read) => {
                let records = match decode(&read.records, position) {
                    Ok(records) => records,
                    Err(what) => {
                        return world.fail(format!("broker {} gave bytes of {partition}: {what}", broker.id));
                    }
                };
                world.heard.borrow_mut().read(group, &read.records);
                if let Some((last, _)) = records.last() {
                    position = last + 1;
                    if !read.serves {
                        world.count("read from a follower");
                    }
                }
                let (leader_epoch, high_watermark) = (read.epoch, read.high_watermark);
                if position > high_watermark && !records.is_empty() && !world.is_voided(group) {
                    world.fail(format!("broker {} gave {partition} beyond its high watermark", broker.id));
                }
                if read.serves {
                    let last_stable = high_watermark;
                    let partition = partition.clone();
                    world.note(Event::Watermarks {
                        observer: consumer,
                        partition,
                        leader_epoch,
                        high_watermark,
                        last_stable,
                    });
                }
                world.note(Event::Poll {
                    consumer,
                    partition,
                    records,
                    committed_only: true,
                    seek: false,
                    txn: None,
                });
            }
            Err((FetchError::OutOfRange { start, end, .. }, serves)) => {
                let (seek, records) = (true, Vec::new());
                if position < start {
                    world.count("reader behind the log start");
                    position = start;
                } else if serves {
                    if !world.is_voided(group) {
                        let what = format!(
                            "broker {} leads {partition} to {end}, and {position} was read",
                            broker.id
                        );
                        world.fail(what);
                    }
                    position = end;
                } else {
                    continue;
                }
                world.note(Event::Poll {
                    consumer,
                    partition,
                    records,
                    committed_only: true,
                    seek,
                    txn: None,
                });
            }
            // Another one is asked.
            Err(_) => {}
        }
    }
}
