//! One broker: its groups, what it staged, and what it knows of the other brokers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::{Bytes, BytesMut};
use flumen_peer::{BODY_MAX, Frame, RaftFrame, cut_frame};
use flumen_raft::{AwakeSet, Message, Outputs, Role};

use crate::clients::Answer;
use crate::disk::{Disk, Write, snapshot_offset};
use crate::mutant::DriverMutant;
use crate::network::Time;
use crate::replica::Replica;
use crate::world::{Ev, World};

/// Without a word for so many ticks a broker counts as gone.
const SILENT_TICKS: u64 = 20;
const ALIVE_TICKS: u64 = 5;
const PROTOCOL: u16 = 1;

pub(crate) struct Broker {
    pub id: u64,
    pub disks: Vec<Disk>,
    pub process: Option<Process>,
    pub boots: u64,
    pub tick_us: Time,
    /// What reaches it before waits until then.
    pub paused_until: Time,
    pub disk_stalled_until: Time,
}

pub(crate) struct Process {
    pub boot: u64,
    pub replicas: Vec<Replica>,
    staged: VecDeque<(usize, Write)>,
    syncing: usize,
    ticks: u64,
    heard: BTreeMap<u64, u64>,
    down: BTreeSet<u64>,
    awake: AwakeSet,
    outbox: BTreeMap<u64, Vec<(u64, Message)>>,
}

impl Process {
    pub fn has_staged(&self, group: usize) -> bool {
        self.staged.iter().any(|(of, _)| *of == group)
    }
}

impl World {
    pub(crate) fn boot(&mut self, broker: &mut Broker) {
        broker.boots += 1;
        let mut replicas = Vec::new();
        for (group, disk) in broker.disks.iter_mut().enumerate() {
            if self.mutant == Some(DriverMutant::ForgetsMembers) {
                disk.membership = self.first_members.clone();
                disk.membership_index = disk.entries.last().map_or(disk.before.0, |e| e.index);
            }
            if self.mutant == Some(DriverMutant::LosesVote) {
                disk.hard_state.vote = 0;
            }
            match Replica::start(disk, broker.id, group as u64) {
                Ok(replica) => replicas.push(replica),
                Err(error) => {
                    return self.oracle.fail(format!("broker {} group {group}: {error}", broker.id));
                }
            }
        }
        let mut awake = AwakeSet::default();
        (0..replicas.len()).for_each(|slot| awake.wake(slot));
        broker.process = Some(Process {
            boot: broker.boots,
            replicas,
            staged: VecDeque::new(),
            syncing: 0,
            ticks: 0,
            heard: BTreeMap::new(),
            down: BTreeSet::new(),
            awake,
            outbox: BTreeMap::new(),
        });
        let at = self.now + self.rng.between(1, broker.tick_us);
        self.at(at, Ev::Tick { node: broker.id, boot: broker.boots });
    }

    /// What was staged and not synced is gone, but for a first part that the disk may have had already.
    pub(crate) fn crash(&mut self, broker: &mut Broker) {
        let Some(mut process) = broker.process.take() else { return };
        self.network.count("crash");
        if !process.staged.is_empty() {
            self.network.count("lost unsynced state");
        }
        let survive = self.rng.below(process.syncing as u64 + 1) as usize;
        for (group, write) in process.staged.drain(..survive) {
            broker.disks[group].write(&write, self.mutant);
        }
    }

    pub(crate) fn tick(&mut self, broker: &mut Broker) {
        let Some(process) = &mut broker.process else { return };
        process.ticks += 1;
        let mut ticked = Vec::new();
        let replicas = &mut process.replicas;
        process.awake.tick_all(|slot| {
            ticked.push(slot);
            replicas[slot].group.tick()
        });
        if ticked.len() < process.replicas.len() {
            self.network.count("sleep");
        }
        let now = process.ticks;
        let silent: Vec<u64> = self.nodes.iter().copied().filter(|id| *id != broker.id).collect();
        for id in silent {
            let heard = *process.heard.entry(id).or_insert(now);
            if now - heard > SILENT_TICKS && process.down.insert(id) {
                for (slot, replica) in process.replicas.iter_mut().enumerate() {
                    if replica.group.on_node_down(id) {
                        process.awake.wake(slot);
                        ticked.push(slot);
                    }
                }
            }
        }
        let boot = process.boot;
        if now.is_multiple_of(ALIVE_TICKS) {
            for to in self.nodes.clone().into_iter().filter(|id| *id != broker.id) {
                self.transmit(broker.id, to, &Frame::Alive { sequence: now });
            }
        }
        for slot in ticked {
            self.work(broker, slot);
        }
        let at = self.now + broker.tick_us;
        self.at(at, Ev::Tick { node: broker.id, boot });
    }

    /// Acts on everything that a group puts out, as `broker::partition` does.
    pub(crate) fn work(&mut self, broker: &mut Broker, slot: usize) {
        let id = broker.id;
        let Some(process) = &mut broker.process else { return };
        let replica = &mut process.replicas[slot];
        while let Some(mut outputs) = replica.group.take_outputs() {
            if let Some(fault) = &outputs.fault {
                self.oracle.fail(format!("broker {id} group {slot}: {fault}"));
            }
            if let Some(found) = outputs.contradiction {
                self.oracle
                    .fail(format!("broker {id} group {slot}: its leader has others committed: {found:?}"));
            }
            for message in outputs.messages.drain(..) {
                self.oracle.sends(slot as u64, &message);
                process.outbox.entry(message.to).or_default().push((slot as u64, message));
            }
            if outputs.must_persist() {
                process.staged.push_back((slot, Write::of(&outputs)));
            }
            self.take_entries(id, slot, replica, &outputs);
            self.take_commits(id, slot, replica, &outputs);
            self.take_leadership(id, slot, replica, &outputs);
            for wanted in &outputs.entries_wanted {
                self.network.count("read of old entries");
                let at = self.now + self.rng.between(100, 4_000);
                let (node, boot, low, high) = (id, process.boot, wanted.low, wanted.high);
                self.at(at, Ev::Read { node, boot, slot, low, high });
            }
            if !outputs.snapshot_wanted_for.is_empty() {
                self.network.count("snapshot");
                replica.group.offer_snapshot(Bytes::copy_from_slice(&replica.start_offset.to_be_bytes()));
            }
            for read in &outputs.confirmed_reads {
                if let Some(at) = replica.asked.iter().position(|(token, ..)| *token == read.token) {
                    let (_, client, op) = replica.asked.swap_remove(at);
                    if replica.committed < read.index {
                        self.oracle.fail(format!("broker {id} group {slot}: a read beyond what is applied"));
                    }
                    self.reply(client, op, Answer::End(replica.high_watermark));
                }
            }
            if outputs.must_persist() && self.mutant == Some(DriverMutant::ReportsBeforeSync) {
                replica.group.on_persisted(outputs.number);
            }
        }
        if !replica.group.is_asleep() {
            process.awake.wake(slot);
        }
        self.flush(broker);
        self.start_sync(broker);
    }

    fn take_entries(&mut self, id: u64, slot: usize, replica: &mut Replica, outputs: &Outputs) {
        if let Some(install) = &outputs.install {
            replica.install(install.index, snapshot_offset(&install.data));
        }
        if outputs.replaces {
            self.network.count("truncation");
        }
        if let Err(error) = replica.append(&outputs.entries) {
            self.oracle.fail(format!("broker {id} group {slot}: {error}"));
        }
        if let Some((_, members)) = &outputs.membership {
            replica.members = members.clone();
        }
    }

    fn take_commits(&mut self, id: u64, slot: usize, replica: &mut Replica, outputs: &Outputs) {
        let Some(committed) = outputs.committed_index else { return };
        for index in replica.committed + 1..=committed {
            let Some(entry) = replica.entry(index) else {
                return self
                    .oracle
                    .fail(format!("broker {id} group {slot}: committed {index}, which it has not"));
            };
            self.oracle.commits(slot as u64, id, entry);
        }
        replica.committed = committed;
        let end = replica.ends[(committed - replica.before - 1) as usize];
        if end < replica.high_watermark {
            self.oracle.fail(format!("broker {id} group {slot}: the high watermark goes back"));
        }
        replica.high_watermark = end;
        while let Some(waiting) = replica.answerable(committed) {
            if replica.entry(waiting.index).is_some_and(|e| e.term == waiting.term) {
                self.reply(waiting.client, waiting.op, Answer::Appended(waiting.base));
            }
        }
    }

    fn take_leadership(&mut self, id: u64, slot: usize, replica: &mut Replica, outputs: &Outputs) {
        let Some(leadership) = outputs.leadership else { return };
        self.mix(&[id, slot as u64, leadership.term, leadership.role as u64]);
        if leadership.role == Role::Leader {
            self.oracle.leads(slot as u64, leadership.term, id);
        } else {
            replica.waiting.clear();
            replica.asked.clear();
        }
        if leadership.role == Role::Leader {
            let keeps = self.mutant == Some(DriverMutant::KeepsOffsets) && replica.next_offset > 0;
            if !keeps && replica.waiting.is_empty() {
                replica.next_offset = replica.log_end();
            }
        }
    }

    fn flush(&mut self, broker: &mut Broker) {
        let Some(process) = &mut broker.process else { return };
        for (to, messages) in std::mem::take(&mut process.outbox) {
            let mut frame = RaftFrame::new(broker.id, to);
            for (group, message) in &messages {
                let mut group = *group;
                if self.mutant == Some(DriverMutant::MixesGroups) && self.rng.permille(5) {
                    group = (group + 1) % broker.disks.len() as u64;
                }
                if !frame.push(group, message) {
                    let full = std::mem::replace(&mut frame, RaftFrame::new(broker.id, to));
                    self.transmit(broker.id, to, &Frame::Raft(full));
                    frame.push(group, message);
                }
            }
            self.transmit(broker.id, to, &Frame::Raft(frame));
        }
    }

    fn transmit(&mut self, from: u64, to: u64, frame: &Frame) {
        let mut bytes = BytesMut::new();
        frame.encode(PROTOCOL).iter().for_each(|segment| bytes.extend_from_slice(segment));
        let bytes = bytes.freeze();
        for delay in self.network.arrivals(&mut self.rng, from, to) {
            let mut bytes = bytes.clone();
            if self.rng.permille(self.network.flip_permille) {
                self.network.count("flipped bit");
                let mut changed = bytes.to_vec();
                let at = self.rng.below(changed.len() as u64) as usize;
                changed[at] ^= 1 << self.rng.below(8);
                bytes = changed.into();
            }
            let at = self.now + delay;
            let last = self.last_arrival.entry((from, to)).or_insert(0);
            if at < *last {
                self.network.count("reorder");
            }
            *last = (*last).max(at);
            self.at(at, Ev::Frame { from, to, bytes });
        }
    }

    pub(crate) fn receive(&mut self, broker: &mut Broker, from: u64, bytes: &Bytes) {
        let Some(process) = &mut broker.process else { return };
        let mut input = BytesMut::from(&bytes[..]);
        // A damaged frame ends the connection: it and nothing of it is heard.
        let Ok(Some(raw)) = cut_frame(&mut input, BODY_MAX) else { return };
        let frame = match Frame::decode(raw) {
            Ok(frame) => frame,
            Err(error) => return self.oracle.fail(format!("a frame with a right checksum: {error}")),
        };
        process.heard.insert(from, process.ticks);
        process.down.remove(&from);
        let Frame::Raft(raft) = frame else { return };
        for item in raft.items() {
            let (group, message) = match item {
                Ok(item) => item,
                Err(error) => return self.oracle.fail(format!("a message with a right checksum: {error}")),
            };
            let slot = group as usize;
            let Some(process) = &mut broker.process else { return };
            // Refused ones are those of replicas that the group does not know (any more).
            if let Err(flumen_raft::StepError::LostEntries(what)) = process.replicas[slot].group.step(message)
            {
                self.oracle.fail(format!("broker {} group {slot}: {what}", broker.id));
            }
            self.work(broker, slot);
        }
    }

    pub(crate) fn read_done(&mut self, broker: &mut Broker, slot: usize, low: u64, high: u64) {
        let Some(process) = &mut broker.process else { return };
        let replica = &mut process.replicas[slot];
        let entries = (low..high.min(low + 8)).map_while(|index| replica.entry(index).cloned()).collect();
        replica.group.entries_read(low, entries);
        self.work(broker, slot);
    }

    fn start_sync(&mut self, broker: &mut Broker) {
        let Some(process) = &mut broker.process else { return };
        if process.syncing > 0 || process.staged.is_empty() {
            return;
        }
        process.syncing = process.staged.len();
        let at = broker.disk_stalled_until.max(self.now) + self.rng.between(200, 3_000);
        let (node, boot) = (broker.id, process.boot);
        self.at(at, Ev::Synced { node, boot });
    }

    pub(crate) fn synced(&mut self, broker: &mut Broker) {
        let Some(process) = &mut broker.process else { return };
        let mut touched = BTreeSet::new();
        for _ in 0..std::mem::take(&mut process.syncing) {
            let Some((slot, write)) = process.staged.pop_front() else { break };
            broker.disks[slot].write(&write, self.mutant);
            process.replicas[slot].group.on_persisted(write.number);
            touched.insert(slot);
        }
        if self.mutant == Some(DriverMutant::AcknowledgesBeforeMajority) {
            for slot in &touched {
                let stored = broker.disks[*slot].entries.last().map_or(0, |e| e.index);
                let replica = &mut process.replicas[*slot];
                while let Some(waiting) = replica.answerable(stored) {
                    self.reply(waiting.client, waiting.op, Answer::Appended(waiting.base));
                }
            }
        }
        for slot in touched {
            self.work(broker, slot);
        }
        self.start_sync(broker);
    }
}
