//! Clients that ask where a partition begins and ends, where the records of a time are, and where a leader epoch ended, and
//! what must be true of the answers.
//!
//! - An end is no lower than what was acknowledged, or told, before it was asked for (`flumen_checker`).
//! - A beginning is no higher than what may be read, than what anybody asked to delete where nothing else deletes, and no lower than
//!   what was deleted before the question. What begins there can be read.
//! - No record of a time, or of a later one, comes before the one that is named, and that one has the time that is told with it.
//! - All that was acknowledged in an epoch, or before it, lies below its end, and nothing of a later one does.
//!
//! Nothing is said of groups that lost what their durability does not promise.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_broker::handlers::offsets::{end_of_epoch, list_offset};
use flumen_broker::partition::{FetchError, OffsetAt, Partition};
use flumen_checker::Event;
use flumen_io::simulated::Fault;
use flumen_protocol::record_batch::batches;

use super::broker::{Broker, EPOCH_MS};
use super::consumer::{call, read};
use super::producer::{LeaderKnown, TIMESTAMPS, timestamp_of};
use super::world::{World, name_of};

/// As ListOffsets names them.
const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
const NEWEST: i64 = -3;

/// What clients were told in the course of the run. Numbers are the world's: who has a lower one was told before.
#[derive(Default)]
pub(super) struct Heard {
    /// Number and value, by group and offset.
    acknowledged: BTreeMap<(u64, i64), (u64, u64)>,
    /// Of committed batches, by group and first offset: the last one, and the leader epoch.
    batches: BTreeMap<(u64, i64), (i64, i32)>,
    /// The highest offset below which records were asked to be deleted, and were, by group.
    to_delete: BTreeMap<u64, i64>,
    deleted: BTreeMap<u64, i64>,
    answers: Vec<Answer>,
}

struct Answer {
    group: u64,
    broker: i32,
    asked: u64,
    /// Where the log began when the answer was made, or later.
    log_start: i64,
    told: Told,
}

enum Told {
    Time { timestamp: i64, found: Option<OffsetAt> },
    Epoch { asked: i32, current: i32, epoch: i32, end: i64 },
}

impl Heard {
    pub fn acknowledged(&mut self, group: u64, offset: i64, number: u64, value: u64) {
        self.acknowledged.insert((group, offset), (number, value));
    }

    /// Committed batches, which some reader got.
    pub fn read(&mut self, group: u64, records: &[Bytes]) {
        for bytes in records {
            for (header, _) in batches(bytes).flatten() {
                let known = (header.next_offset() - 1, header.leader_epoch);
                self.batches.insert((group, header.base_offset), known);
            }
        }
    }

    pub fn delete(&mut self, group: u64, below: i64) {
        let highest = self.to_delete.entry(group).or_insert(0);
        *highest = below.max(*highest);
    }

    pub fn deleted(&mut self, group: u64, below: i64) {
        let highest = self.deleted.entry(group).or_insert(0);
        *highest = below.max(*highest);
    }

    fn epoch_at(&self, group: u64, offset: i64) -> Option<i32> {
        let (_, (last, epoch)) = self.batches.range((group, 0)..=(group, offset)).next_back()?;
        (*last >= offset).then_some(*epoch)
    }
}

/// Asks whom it takes for the leader, one question at a time.
pub(super) async fn ask(world: Rc<World>, group: u64) {
    let pace = world.pick(&[20, 100]);
    let mut leader = LeaderKnown::nobody(&world);
    while world.is_sound() && !world.clients_stop.get() {
        tokio::time::sleep(Duration::from_millis(world.between(1, pace))).await;
        let broker = leader.ask(&world, group);
        let epoch = if world.below(2) == 0 { leader.epoch } else { -1 };
        let refused = match world.below(5) {
            0 => ask_end(&world, &broker, group, epoch).await,
            1 => ask_beginning(&world, &broker, group, epoch).await,
            2 => {
                let timestamp = EPOCH_MS + world.below(TIMESTAMPS) as i64;
                ask_time(&world, &broker, group, epoch, timestamp).await
            }
            3 => ask_time(&world, &broker, group, epoch, NEWEST).await,
            _ => {
                let asked = world.below(leader.epoch.max(0) as u64 + 2) as i32;
                ask_epoch(&world, &broker, group, epoch, asked).await
            }
        };
        if let Err((FetchError::NotLeader, true)) = refused {
            world.count("leader could not be sure");
        }
    }
}

/// An error, and whether the one who was asked took itself for the leader.
type Refused = (FetchError, bool);

async fn list(
    partition: Rc<Partition>,
    epoch: i32,
    timestamp: i64,
) -> Result<(Option<OffsetAt>, i64, i64), Refused> {
    let serves = partition.serves();
    let found = list_offset(&partition, epoch, timestamp).await.map_err(|error| (error, serves))?;
    Ok((found, partition.log_start_offset(), partition.high_watermark()))
}

async fn ask_end(world: &World, broker: &Broker, group: u64, epoch: i32) -> Result<(), Refused> {
    let op = world.number();
    world.note(Event::AskEnd { op, partition: name_of(group) });
    if let Some(answer) = call(world, broker, move |p| list(p, epoch, LATEST), group).await
        && let (Some(at), ..) = answer?
    {
        world.count("end asked");
        world.note(Event::End { op, offset: at.offset });
    }
    Ok(())
}

async fn ask_beginning(world: &World, broker: &Broker, group: u64, epoch: i32) -> Result<(), Refused> {
    let deleted = world.heard.borrow().deleted.get(&group).copied().unwrap_or(0);
    let Some(answer) = call(world, broker, move |p| list(p, epoch, EARLIEST), group).await else {
        return Ok(());
    };
    let (Some(OffsetAt { offset, .. }), _, high_watermark) = answer? else { return Ok(()) };
    world.count("beginning asked");
    let keeps = world.plan.partitions[group as usize - 1].config.retention_bytes == -1;
    let to_delete = world.heard.borrow().to_delete.get(&group).copied().unwrap_or(0);
    let is_wrong = offset > high_watermark || offset < deleted || (keeps && offset > to_delete);
    if is_wrong && !world.is_voided(group) {
        world.fail(format!(
            "broker {} says that {} begins at {offset}; its high watermark is {high_watermark}, {deleted} was deleted, {to_delete} asked to be",
            broker.id,
            name_of(group)
        ));
    }
    let begun = call(world, broker, move |p| read(p, -1, offset, 1), group).await;
    if let Some(Err((FetchError::OutOfRange { start, end, .. }, true))) = begun
        && start <= offset
        && !world.is_voided(group)
    {
        world.fail(format!(
            "broker {} says that {} begins at {offset}, and then that it has {start} to {end}",
            broker.id,
            name_of(group)
        ));
    }
    Ok(())
}

async fn ask_time(
    world: &World,
    broker: &Broker,
    group: u64,
    epoch: i32,
    timestamp: i64,
) -> Result<(), Refused> {
    let asked = world.number();
    let Some(answer) = call(world, broker, move |p| list(p, epoch, timestamp), group).await else {
        return Ok(());
    };
    let (found, log_start, high_watermark) = answer?;
    world.count(if timestamp == NEWEST { "newest record asked" } else { "place of a time asked" });
    if let Some(at) = found
        && at.offset >= high_watermark
        && !world.is_voided(group)
    {
        world.fail(format!(
            "broker {} says that {} has a record of {timestamp} at {}, and nothing is committed from {high_watermark} on",
            broker.id,
            name_of(group),
            at.offset
        ));
    }
    let told = Told::Time { timestamp, found };
    world.heard.borrow_mut().answers.push(Answer { group, broker: broker.id, asked, log_start, told });
    Ok(())
}

async fn ask_epoch(
    world: &World,
    broker: &Broker,
    group: u64,
    epoch: i32,
    asked_epoch: i32,
) -> Result<(), Refused> {
    let asked = world.number();
    let end_of = move |partition: Rc<Partition>| async move {
        let serves = partition.serves();
        let end = end_of_epoch(&partition, epoch, asked_epoch).await.map_err(|error| (error, serves))?;
        Ok((end, partition.log_start_offset(), partition.leader_epoch()))
    };
    let Some(answer) = call(world, broker, end_of, group).await else { return Ok(()) };
    let ((epoch, end), log_start, current) = answer?;
    world.count("end of an epoch asked");
    let told = Told::Epoch { asked: asked_epoch, current, epoch, end };
    world.heard.borrow_mut().answers.push(Answer { group, broker: broker.id, asked, log_start, told });
    Ok(())
}

/// All that was told, by what is known now.
pub(super) fn judge(world: &World) {
    let heard = world.heard.borrow();
    for answer in heard.answers.iter().filter(|answer| !world.is_voided(answer.group)) {
        // A read that fails leaves a segment without timestamps until the next start, and what is in it is missed (seed 209).
        let read_failed = world.brokers[answer.broker as usize].machine.counters().of(Fault::ReadFails) > 0;
        let wrong = match &answer.told {
            Told::Time { .. } if read_failed => None,
            Told::Time { timestamp, found } => heard.wrong_time(answer, *timestamp, *found),
            Told::Epoch { asked, current, epoch, end } => {
                heard.wrong_epoch(answer, *asked, *current, *epoch, *end)
            }
        };
        if let Some(what) = wrong {
            world.fail(format!("broker {}, {}: {what}", answer.broker, name_of(answer.group)));
        }
    }
}

impl Heard {
    /// Offsets and values of what was acknowledged before the question, and was still there.
    fn before<'a>(&'a self, answer: &'a Answer) -> impl Iterator<Item = (i64, u64)> + 'a {
        let of_group = (answer.group, answer.log_start)..(answer.group + 1, 0);
        let known = self.acknowledged.range(of_group);
        known.filter(|(_, (number, _))| *number < answer.asked).map(|((_, at), (_, value))| (*at, *value))
    }

    fn wrong_time(&self, answer: &Answer, timestamp: i64, found: Option<OffsetAt>) -> Option<String> {
        let is_newest = timestamp == NEWEST;
        let upto = found.map_or(i64::MAX, |at| at.offset);
        let newest = found.map_or(i64::MIN, |at| at.timestamp);
        let is_missed =
            |at: i64, time: i64| if is_newest { time > newest } else { at < upto && time >= timestamp };
        if let Some((at, value)) =
            self.before(answer).find(|(at, value)| is_missed(*at, timestamp_of(*value)))
        {
            let time = timestamp_of(value);
            return Some(format!("{timestamp} is at {found:?}, and {at} was acknowledged with {time}"));
        }
        let found = found?;
        let known = self.acknowledged.get(&(answer.group, found.offset));
        let is_wrong = known.is_some_and(|(_, value)| timestamp_of(*value) != found.timestamp)
            || (!is_newest && found.timestamp < timestamp);
        if is_wrong {
            return Some(format!("{timestamp} is at {found:?}, where {known:?} is"));
        }
        let epoch = self.epoch_at(answer.group, found.offset)?;
        // Of what goes while it is looked for the epoch is not known any more.
        if found.leader_epoch == -1 && found.offset < answer.log_start {
            return None;
        }
        (epoch != found.leader_epoch).then(|| format!("{found:?} is of epoch {epoch}"))
    }

    fn wrong_epoch(&self, answer: &Answer, asked: i32, current: i32, epoch: i32, end: i64) -> Option<String> {
        if epoch == -1 {
            // Of an epoch that the leader had not heard of.
            return (asked <= current)
                .then(|| format!("knows no epoch up to {asked}, and leads in {current}"));
        }
        let told = || format!("said in epoch {current} that epoch {asked}, as {epoch}, ended at {end}");
        for (at, _) in self.before(answer) {
            let Some(of) = self.epoch_at(answer.group, at) else { continue };
            if of <= asked && at >= end {
                return Some(format!("{}; {at} was acknowledged in epoch {of}", told()));
            }
        }
        let of_group = (answer.group, answer.log_start)..(answer.group + 1, 0);
        for ((_, first), (_, of)) in self.batches.range(of_group) {
            // What the leader's own epoch had at its end may have been given up.
            let is_later = *of > asked && *first < end && asked < current;
            if is_later || (epoch < *of && *of <= asked) {
                return Some(format!("{}; what is at {first} is of epoch {of}", told()));
            }
        }
        None
    }
}
