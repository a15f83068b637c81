//! What is left in the end: whether replicas are the same, what can be read, and what the directories look like.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use flumen_broker::partition::{Partition, raft_id};
use flumen_checker::{Event, History, Options, Record, check};
use flumen_metadata::PartitionInfo;

use super::broker::Broker;
use super::consumer::{decode, read};
use super::world::{World, name_of};
use super::{groups, questions};

/// For replicas to become the same once nothing is written any more.
const SETTLE_MS: u64 = 10_000;
const READ_BYTES: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq)]
struct Seen {
    broker: i32,
    start: i64,
    high_watermark: i64,
    end: i64,
    serves: bool,
    is_damaged: bool,
    /// Raft ids, and whether the members are changing.
    voters: Vec<u64>,
    is_joint: bool,
    /// Id, epoch, last sequence.
    producers: Vec<(i64, i16, i32)>,
    status: String,
}

async fn look(world: &World, group: u64) -> Vec<Seen> {
    let mut seen = Vec::new();
    for broker in &world.brokers {
        if !world.partitions.borrow()[&group].is_held_by(broker.id) {
            continue;
        }
        let id = broker.id;
        let one = broker.ask(move |shard| async move {
            let Some(partition) = shard.partition(group) else { return None };
            let members = partition.raft_status().membership;
            Some(Seen {
                broker: id,
                start: partition.log_start_offset(),
                high_watermark: partition.high_watermark(),
                end: partition.log_end_offset(),
                serves: partition.serves(),
                is_damaged: partition.damage().is_some(),
                is_joint: members.is_joint(),
                voters: members.voters,
                producers: producers_of(&partition),
                status: match partition.damage() {
                    Some(damage) => format!("refuses: {damage}"),
                    None => format!(
                        "must wait: {}, {:?}",
                        partition.must_wait(256 << 10, 10 << 10, 10),
                        partition.raft_status()
                    ),
                },
            })
        });
        match one.await.flatten() {
            Some(one) => seen.push(one),
            None => world.fail(format!("broker {id} has no {}", name_of(group))),
        }
    }
    seen
}

fn producers_of(partition: &Partition) -> Vec<(i64, i16, i32)> {
    let known = partition.producers().into_iter();
    let mut known: Vec<_> = known.map(|(id, epoch, sequence, _)| (id, epoch, sequence)).collect();
    known.sort_unstable();
    known
}

/// Replicas are the same, one leads, and who should vote does.
fn agree(info: &PartitionInfo, seen: &[Seen]) -> bool {
    let same = |one: &Seen| {
        one.high_watermark == seen[0].high_watermark && one.end == one.high_watermark && !one.is_damaged
    };
    let mut replicas: Vec<u64> = info.replicas.iter().map(|id| raft_id(*id)).collect();
    replicas.sort_unstable();
    let votes = |one: &&Seen| {
        let mut voters = one.voters.clone();
        voters.sort_unstable();
        !one.is_joint && (voters == replicas || info.target.is_some())
    };
    let mut leaders = seen.iter().filter(|one| one.serves);
    let leads = leaders.next().is_some_and(|one| votes(&one)) && leaders.next().is_none();
    leads && seen.iter().all(same)
}

/// No majority of those who vote is whole, as any of them knows it: nothing can be promised then, and nothing happens
/// (`cluster::mending`). Only what was damaged by a loss of power that the topic's durability does not cover may come to that.
fn is_beyond_mending(seen: &[Seen]) -> bool {
    let is_whole = |id: &&u64| seen.iter().any(|one| raft_id(one.broker) == **id && !one.is_damaged);
    let lacks = |one: &Seen| 2 * one.voters.iter().filter(is_whole).count() <= one.voters.len();
    seen.iter().any(|one| one.is_damaged) && seen.iter().all(|one| one.is_damaged || lacks(one))
}

pub(super) async fn judge(world: &Rc<World>) {
    for group in world.groups() {
        let until = world.now_ms() + SETTLE_MS;
        let mut seen = look(world, group).await;
        let info = || world.partitions.borrow()[&group].clone();
        while world.is_sound() && !agree(&info(), &seen) && world.now_ms() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
            seen = look(world, group).await;
        }
        if world.is_voided(group) && is_beyond_mending(&seen) {
            world.count("beyond mending");
            continue;
        }
        let info = info();
        if !agree(&info, &seen) {
            world.fail(format!("{}: replicas do not come to agree: {info:?} {seen:#?}", name_of(group)));
        }
        if !world.is_sound() {
            return;
        }
        // Whoever leads next must know the producers as this one does, also those whose records retention took. Only a loss of
        // power may take the latter: their snapshots are not synced before their records go, and what it left of both that were
        // kept was unusable (seen in seed 753). What a replica knows of one it must know right.
        let may_forget = world.plan.theme.loses_power();
        let same = |one: &Seen| {
            let knows = |known: &(i64, i16, i32)| seen[0].producers.iter().any(|(id, ..)| *id == known.0);
            match may_forget {
                true => one.producers.iter().filter(|p| knows(p)).all(|p| seen[0].producers.contains(p)),
                false => one.producers == seen[0].producers,
            }
        };
        if let Some(other) = seen.iter().find(|one| !same(one))
            && !world.is_voided(group)
        {
            let (a, b) = (&seen[0], other);
            world.fail(format!(
                "{}: brokers {} and {} know different producers: {:?}, {:?}",
                name_of(group),
                a.broker,
                b.broker,
                a.producers.iter().filter(|known| !b.producers.contains(known)).collect::<Vec<_>>(),
                b.producers.iter().filter(|known| !a.producers.contains(known)).collect::<Vec<_>>()
            ));
        }
        // What retention took of one replica is no matter of the others.
        let from = seen.iter().map(|one| one.start).max().unwrap_or(0);
        let up_to = seen[0].high_watermark;
        if world.plan.keeps_groups(group) {
            compare_state(world, group, &seen, up_to).await;
            continue;
        }
        for one in &seen {
            let start = if one.serves { one.start } else { from };
            let Some(bytes) = content(world, &world.brokers[one.broker as usize], group, start, up_to).await
            else {
                return;
            };
            world.heard.borrow_mut().read(group, &bytes);
            let records = match decode(&bytes, start) {
                Ok(records) => records,
                Err(what) => return world.fail(format!("broker {}: {}: {what}", one.broker, name_of(group))),
            };
            let digest = digest(&bytes, from);
            world.mix(&[digest]);
            world.note(Event::Digest { node: one.broker as u64, partition: name_of(group), up_to, digest });
            if one.serves {
                let committed = records.iter().map(|(_, value)| *value).collect();
                world.note(Event::FinalRead {
                    partition: name_of(group),
                    log_start: start,
                    records,
                    committed,
                });
            }
        }
    }
    questions::judge(world);
    for broker in &world.brokers {
        // With what it takes to close the log; or it just ends.
        let stops = world.below(4) > 0;
        if stops && broker.ask(|shard| async move { shard.shutdown().await }).await != Some(Ok(())) {
            world.fail(format!("broker {} does not stop cleanly", broker.id));
        }
        broker.ends(world, stops);
    }
}

/// Replicas of an offsets partition say the same of every key.
async fn compare_state(world: &World, group: u64, seen: &[Seen], up_to: i64) {
    let mut first = None;
    for one in seen {
        let broker = &world.brokers[one.broker as usize];
        let Some(bytes) = content(world, broker, group, one.start, up_to).await else { return };
        let state = match groups::state_of(&bytes, up_to) {
            Ok(state) => state,
            Err(what) => return world.fail(format!("broker {}: {}: {what}", one.broker, name_of(group))),
        };
        let first = first.get_or_insert_with(|| state.clone());
        if *first != state {
            let differ: Vec<_> = state.iter().filter(|(key, value)| first.get(*key) != Some(value)).collect();
            let what = format!("has {} keys, the first replica {}: {differ:?}", state.len(), first.len());
            return world.fail(format!("broker {}: {} {what}", one.broker, name_of(group)));
        }
    }
}

/// Whole batches from an offset on.
async fn content(
    world: &World,
    broker: &Broker,
    group: u64,
    from: i64,
    up_to: i64,
) -> Option<Vec<bytes::Bytes>> {
    let asked = broker.ask(move |shard| async move {
        let partition = shard.partition(group).ok_or("it is gone".to_owned())?;
        let (mut out, mut at) = (Vec::new(), from);
        while at < up_to {
            let slice =
                read(partition.clone(), -1, at, READ_BYTES).await.map_err(|(error, _)| error.to_string())?;
            let before = at;
            for bytes in &slice.records {
                for batch in flumen_protocol::record_batch::batches(bytes) {
                    at = batch.map_err(|e| e.to_string())?.0.next_offset();
                }
            }
            if at <= before {
                return Err(format!("nothing can be read at {at} of {up_to}"));
            }
            out.extend(slice.records);
        }
        Ok(out)
    });
    match asked.await {
        Some(Ok(bytes)) => Some(bytes),
        Some(Err(what)) => {
            world.fail(format!("broker {}: {} from {from}: {what}", broker.id, name_of(group)));
            None
        }
        None => {
            world.fail(format!("broker {} died in the end", broker.id));
            None
        }
    }
}

/// Of the batches that end behind an offset.
fn digest(bytes: &[bytes::Bytes], from: i64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for bytes in bytes {
        for batch in flumen_protocol::record_batch::batches(bytes) {
            let Ok((header, batch)) = batch else { continue };
            if header.next_offset() > from {
                for byte in batch {
                    hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
                }
            }
        }
    }
    hash
}

/// What the checker finds in what clients saw. Of groups that lost what their durability does not promise nothing is judged
/// here; that brokers live with them is, and that their replicas are the same in the end.
pub(super) fn anomalies(world: &World) -> Option<String> {
    let found = check(&judged(world), Options::default());
    found.first().map(|a| format!("{}: {} ({} anomalies)", a.check, a.what, found.len()))
}

fn judged(world: &World) -> History {
    let history = world.history.borrow();
    let voided: Vec<String> = world.voided.borrow().iter().map(|group| name_of(*group)).collect();
    let mut ops: BTreeSet<u64> = BTreeSet::new();
    let mut counts = |record: &&Record| match &record.event {
        Event::Send { op, partition, .. } => {
            let counts = !voided.contains(partition);
            if counts {
                ops.insert(*op);
            }
            counts
        }
        Event::AskEnd { op, partition } => {
            let counts = !voided.contains(partition);
            if counts {
                ops.insert(*op);
            }
            counts
        }
        Event::Sent { op, .. } | Event::End { op, .. } => ops.contains(op),
        Event::Poll { partition, .. }
        | Event::Watermarks { partition, .. }
        | Event::FinalRead { partition, .. } => !voided.contains(partition),
        _ => true,
    };
    History { records: history.records.iter().filter(|record| counts(record)).cloned().collect() }
}
