//! The network between brokers: what shards have to say goes through real frames, and arrives or not.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flumen_broker::cluster::inbound::answer_of_replicas;
use flumen_broker::cluster::leaders::{Led, News};
use flumen_broker::cluster::links::{Carrier, raft_frames};
use flumen_broker::cluster::node_id_of;
use flumen_broker::cluster::requests::{Answered, AskError};
use flumen_broker::partition::raft_id;
use flumen_broker::shard::Shard;
use flumen_io::simulated::Fault;
use flumen_peer::{Answer, BODY_MAX, Frame, Lead, Request, VERSION_MAX, cut_frame};
use flumen_raft::{Body, Message};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::broker::Broker;
use super::world::{World, name_of};

/// An answer that takes longer was lost with its connection.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(800);
/// A broker that is not heard of for so long is taken for dead.
const SILENCE_MS: u64 = 1_200;
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Who leads what is told again so often, as frames get lost here.
const LEADS_INTERVAL: Duration = Duration::from_millis(500);

/// What a broker asks others, in frames of this network.
struct Wire {
    world: Rc<World>,
    broker: Rc<Broker>,
}

pub(super) fn carrier(world: &Rc<World>, broker: &Rc<Broker>) -> Box<dyn Carrier> {
    Box::new(Wire { world: world.clone(), broker: broker.clone() })
}

impl Carrier for Wire {
    fn ask(
        &self,
        node_id: i32,
        kind: u16,
        body: Bytes,
    ) -> LocalBoxFuture<'static, Result<Answered, AskError>> {
        let (world, broker) = (self.world.clone(), self.broker.clone());
        async move {
            let id = world.number();
            let (answer, answered) = oneshot::channel();
            world.asked.borrow_mut().insert(id, answer);
            transmit(&world, &broker, node_id, &Frame::Request(Request { id, kind, body }));
            let outcome = timeout(ANSWER_TIME_MAX, answered).await;
            world.asked.borrow_mut().remove(&id);
            outcome.ok().and_then(Result::ok).ok_or(AskError::Lost)
        }
        .boxed_local()
    }
}

/// Takes from the outbox what is for one other broker, as a link does.
pub(super) async fn send_raft(world: Rc<World>, broker: Rc<Broker>, shard: Rc<Shard>, to: i32) {
    let raft_to = raft_id(to);
    loop {
        shard.outbox.wait(raft_to).await;
        // What is said at about the same time shares a frame.
        tokio::task::yield_now().await;
        let messages = shard.outbox.take(raft_to);
        if broker.machine.is_down() {
            return;
        }
        for (group, message) in &messages {
            observe(&world, *group, message);
        }
        for frame in raft_frames(broker.raft_id(), raft_to, &messages) {
            transmit(&world, &broker, to, &Frame::Raft(frame));
        }
    }
}

/// What a message gives away.
fn observe(world: &World, group: u64, message: &Message) {
    let mut oracle = world.oracle.borrow_mut();
    tracing::trace!(at_ms = world.now_ms(), group, from = message.from, to = message.to, term = message.term, body = ?message.body, "says");
    oracle.sends(group, message);
    match &message.body {
        Body::Append { entries, .. } => {
            oracle.leads(group, message.term, message.from);
            oracle.commits += entries.len() as u64;
        }
        Body::Heartbeat { .. } => oracle.leads(group, message.term, message.from),
        Body::Snapshot { .. } => world.count("snapshot"),
        _ => {}
    }
}

fn transmit(world: &Rc<World>, broker: &Broker, to: i32, frame: &Frame) {
    if broker.machine.is_down() {
        return;
    }
    let mut bytes = BytesMut::new();
    frame.encode(VERSION_MAX).iter().for_each(|segment| bytes.extend_from_slice(segment));
    let bytes = bytes.freeze();
    let (from, at) = (broker.id, world.now());
    world.mix(&[from as u64, to as u64, u64::from(crc(&bytes))]);
    let arrivals = world.with_rng(|rng, network| network.arrivals(rng, raft_id(from), raft_id(to)));
    for delay in arrivals {
        let bytes = world.with_rng(|rng, network| {
            if !rng.permille(network.flip_permille) {
                return bytes.clone();
            }
            network.count("flipped bit");
            let mut changed = bytes.to_vec();
            let at = rng.below(changed.len() as u64) as usize;
            changed[at] ^= 1 << rng.below(8);
            changed.into()
        });
        let at = at + delay;
        {
            let mut arrivals = world.last_arrival.borrow_mut();
            let last = arrivals.entry((raft_id(from), raft_id(to))).or_insert(0);
            if at < *last {
                world.count("reorder");
            }
            *last = at.max(*last);
        }
        world.at(at, move |world| receive(world, from, to, bytes));
    }
}

fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |hash: u32, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// A frame is there: the process hears it when it comes to it.
fn receive(world: &Rc<World>, from: i32, to: i32, bytes: Bytes) {
    let mut input = BytesMut::from(&bytes[..]);
    // A damaged frame ends the connection: it and nothing of it is heard.
    let Ok(Some(raw)) = cut_frame(&mut input, BODY_MAX) else { return };
    let frame = match Frame::decode(raw) {
        Ok(frame) => frame,
        Err(error) => return world.fail(format!("a frame with a right checksum: {error}")),
    };
    let broker = world.brokers[to as usize].clone();
    let for_job = (world.clone(), broker.clone());
    broker.post(move |shard| {
        let (world, broker) = for_job;
        hear(&world, &broker, shard, from, frame);
    });
}

fn hear(world: &Rc<World>, broker: &Rc<Broker>, shard: &Rc<Shard>, from: i32, frame: Frame) {
    match frame {
        Frame::Raft(raft) => {
            for item in raft.items() {
                match item {
                    Ok((group, message)) => shard.deliver(raft.from, group, message),
                    Err(error) => return world.fail(format!("a message with a right checksum: {error}")),
                }
            }
        }
        Frame::Leads(leads) => {
            for lead in leads {
                let lagging = lead.lagging.into_iter().filter_map(node_id_of).collect();
                shard.node.leaders.hear(lead.group, from, lead.epoch as i32, lagging);
            }
        }
        Frame::Request(Request { id, kind, body }) => {
            let (world, broker, shard) = (world.clone(), broker.clone(), shard.clone());
            tokio::task::spawn_local(async move {
                let Answered { code, body } = answer_of_replicas(&shard.node, from, kind, body).await;
                transmit(&world, &broker, from, &Frame::Answer(Answer { id, code, body }));
            });
        }
        Frame::Answer(Answer { id, code, body }) => {
            if let Some(asked) = world.asked.borrow_mut().remove(&id) {
                let _ = asked.send(Answered { code, body });
            }
        }
        other => world.fail(format!("nobody says {other:?} here")),
    }
}

/// Tells the others what this broker leads, as `cluster::news` does.
pub(super) async fn tell_leads(world: Rc<World>, broker: Rc<Broker>, shard: Rc<Shard>) {
    let leaders = &shard.node.leaders;
    loop {
        let news = timeout(LEADS_INTERVAL, leaders.news.notified()).await;
        let led = match news.map(|()| leaders.take_news()) {
            Ok(News::Of(led)) => led,
            Ok(News::Everything) | Err(_) => leaders.led_here(),
        };
        if led.is_empty() {
            continue;
        }
        let lead = |led: &Led| {
            let epoch = u64::try_from(led.epoch).ok()?;
            Some(Lead {
                group: led.group_id,
                epoch,
                lagging: led.lagging.iter().copied().map(raft_id).collect(),
            })
        };
        let frame = Frame::Leads(led.iter().filter_map(lead).collect());
        for other in world.brokers.iter().filter(|other| other.id != broker.id) {
            transmit(&world, &broker, other.id, &frame);
        }
    }
}

/// The high watermark of a replica is where its committed entries end. One whose disk did not read when it asked where that is may
/// say less until the next entry is committed, which harms nobody (seen in seed 1005).
fn look_at_own(world: &World, broker: &Broker, shard: &Shard) {
    for group in world.groups() {
        let Some(partition) = shard.partition(group) else { continue };
        let status = partition.raft_status();
        // All that a lone voter found on its disk is committed, and Raft hears of it a moment later.
        if status.membership.is_alone(broker.raft_id()) {
            continue;
        }
        let committed = status.applied_index;
        let Some(end) = partition.end_of_entry(committed) else { continue };
        let (watermark, start) = (partition.high_watermark(), partition.log_start_offset());
        let says_less = watermark < end.max(start) && broker.machine.counters().of(Fault::ReadFails) > 0;
        if partition.damage().is_none() && !partition.serves() && watermark != end.max(start) && !says_less {
            world.fail(format!(
                "broker {}: {} is committed to entry {committed}, which ends at {end}; the high watermark is {watermark}",
                broker.id,
                name_of(group)
            ));
        }
    }
}

/// Notices that others are gone: their process is another one, or nothing of them has come for long.
pub(super) async fn watch_others(world: Rc<World>, broker: Rc<Broker>, shard: Rc<Shard>) {
    let mut boots: BTreeMap<i32, u64> = BTreeMap::new();
    let mut silent_since: BTreeMap<i32, (u64, bool)> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        look_at_own(&world, &broker, &shard);
        for other in world.brokers.iter().filter(|other| other.id != broker.id) {
            let reaches = world.network.borrow().reaches(other.raft_id(), broker.raft_id());
            let boot = other.boot().filter(|_| reaches);
            match boot {
                Some(boot) => {
                    if boots.insert(other.id, boot).is_some_and(|before| before != boot) {
                        shard.on_node_down(other.raft_id());
                    }
                    silent_since.remove(&other.id);
                }
                None => {
                    let (since, told) = silent_since.entry(other.id).or_insert((world.now_ms(), false));
                    if !*told && world.now_ms() - *since > SILENCE_MS {
                        *told = true;
                        shard.on_node_down(other.raft_id());
                    }
                }
            }
        }
    }
}
