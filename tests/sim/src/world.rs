//! A run: events in the order of their time, faults for a while, then none, then the judgement.

use std::collections::BTreeMap;

use bytes::Bytes;
use flumen_checker::{Event, History, Options, check};
use flumen_raft::{Membership, Target};

use crate::broker::Broker;
use crate::clients::{Answer, Asked, Client, partition};
use crate::disk::Disk;
use crate::mutant::DriverMutant;
use crate::network::{Network, Time};
use crate::oracle::Oracle;
use crate::rng::Rng;

const TICK_US: Time = 10_000;
/// After the last fault every partition takes records within this.
const RECOVERY_MS: u64 = 3_000;
const CLIENTS_PER_GROUP: usize = 2;

/// Every kind of fault, and everything else that must have happened in a set of runs for them to be worth anything.
pub const FAULTS: [&str; 22] = [
    "isolate one",
    "split in two",
    "one way",
    "partial",
    "loss",
    "delay",
    "duplicate",
    "reorder",
    "flipped bit",
    "crash",
    "crash of all",
    "lost unsynced state",
    "disk stall",
    "pause",
    "clock",
    "transfer",
    "membership",
    "retention",
    "snapshot",
    "truncation",
    "read of old entries",
    "sleep",
];

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub seed: u64,
    pub mutant: Option<DriverMutant>,
}

#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub failure: Option<String>,
    /// Same seed, same trace.
    pub trace: u64,
    pub counts: BTreeMap<&'static str, u64>,
    pub elections: u64,
    pub commits: u64,
    pub acknowledged: u64,
    pub simulated_ms: u64,
    pub history: History,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Tick { node: u64, boot: u64 },
    Frame { from: u64, to: u64, bytes: Bytes },
    Synced { node: u64, boot: u64 },
    Read { node: u64, boot: u64, slot: usize, low: u64, high: u64 },
    Request { node: u64, client: usize, op: u64, asked: Asked },
    Reply { client: usize, op: u64, answer: Answer },
    GiveUp { client: usize, op: u64 },
    Client(usize),
    Restart(u64),
    Nemesis,
}

pub(crate) struct World {
    pub rng: Rng,
    pub now: Time,
    sequence: u64,
    events: BTreeMap<(Time, u64), Ev>,
    brokers: BTreeMap<u64, Broker>,
    pub nodes: Vec<u64>,
    pub network: Network,
    pub last_arrival: BTreeMap<(u64, u64), Time>,
    pub oracle: Oracle,
    pub clients: Vec<Client>,
    pub clients_stop: bool,
    pub history: History,
    pub next_op: u64,
    pub acknowledged: u64,
    pub mutant: Option<DriverMutant>,
    pub first_members: Membership,
    faults: bool,
    groups: usize,
    trace: u64,
}

impl Report {
    pub(crate) fn nothing(seed: u64) -> Report {
        Report {
            seed,
            failure: None,
            trace: 0,
            counts: BTreeMap::new(),
            elections: 0,
            commits: 0,
            acknowledged: 0,
            simulated_ms: 0,
            history: History::default(),
        }
    }
}

pub fn run(settings: Settings) -> Report {
    let mut world = World::new(settings);
    let faults_us = world.rng.between(2_000_000, 8_000_000);
    world.run_until(faults_us);
    world.heal();
    world.run_until(world.now + (RECOVERY_MS + 500) * 1000);
    world.clients_stop = true;
    world.run_until(world.now + 1_500_000);
    world.judge();
    let failure = world.oracle.failure().cloned().or_else(|| {
        let anomalies = check(&world.history, Options::default());
        anomalies.first().map(|a| format!("{}: {} ({} anomalies)", a.check, a.what, anomalies.len()))
    });
    Report {
        seed: settings.seed,
        failure,
        trace: world.trace,
        counts: world.network.counts,
        elections: world.oracle.elections,
        commits: world.oracle.commits,
        acknowledged: world.acknowledged,
        simulated_ms: world.now / 1000,
        history: world.history,
    }
}

impl World {
    fn new(settings: Settings) -> World {
        let mut rng = Rng::new(settings.seed);
        let count = rng.pick(&[3, 4, 5]);
        let nodes: Vec<u64> = (1..=count).collect();
        let first_members = Membership::of_voters(nodes[..3].to_vec());
        let groups = rng.between(1, 4) as usize;
        let mut world = World {
            rng,
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            brokers: BTreeMap::new(),
            nodes: nodes.clone(),
            network: Network::default(),
            last_arrival: BTreeMap::new(),
            oracle: Oracle::default(),
            clients: Vec::new(),
            clients_stop: false,
            history: History::default(),
            next_op: 1,
            acknowledged: 0,
            mutant: settings.mutant,
            first_members: first_members.clone(),
            faults: true,
            groups,
            trace: 0,
        };
        for id in nodes {
            let disk = Disk { membership: first_members.clone(), ..Disk::default() };
            let mut broker = Broker {
                id,
                disks: vec![disk; groups],
                process: None,
                boots: 0,
                tick_us: TICK_US,
                paused_until: 0,
                disk_stalled_until: 0,
            };
            world.boot(&mut broker);
            world.brokers.insert(id, broker);
        }
        for client in 0..groups * CLIENTS_PER_GROUP {
            world.clients.push(Client::new(client % groups));
            world.at(client as Time * 100, Ev::Client(client));
        }
        world.at(100_000, Ev::Nemesis);
        world
    }

    pub fn at(&mut self, time: Time, event: Ev) {
        self.sequence += 1;
        self.events.insert((time, self.sequence), event);
    }

    pub fn mix(&mut self, numbers: &[u64]) {
        for n in numbers {
            self.trace = (self.trace ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        }
    }

    fn run_until(&mut self, end: Time) {
        while let Some(((time, _), _)) = self.events.first_key_value()
            && *time <= end
            && self.oracle.failure().is_none()
        {
            let ((time, _), event) = self.events.pop_first().expect("just seen");
            self.now = time;
            self.handle(event);
        }
        self.now = end;
    }

    fn handle(&mut self, event: Ev) {
        let node = match &event {
            Ev::Tick { node, .. } | Ev::Synced { node, .. } | Ev::Read { node, .. } => *node,
            Ev::Frame { to, .. } => *to,
            Ev::Request { node, .. } | Ev::Restart(node) => *node,
            Ev::Reply { .. } | Ev::GiveUp { .. } | Ev::Client(_) | Ev::Nemesis => 0,
        };
        self.mix(&[self.now, node]);
        match event {
            Ev::Reply { client, op, answer } => return self.answered(client, op, answer),
            Ev::GiveUp { client, op } => return self.gives_up(client, op),
            Ev::Client(client) => return self.client_begins(client),
            Ev::Nemesis => return self.nemesis(),
            _ => {}
        }
        let Some(mut broker) = self.brokers.remove(&node) else { return };
        if broker.paused_until > self.now {
            self.at(broker.paused_until, event);
        } else {
            self.handle_at(&mut broker, event);
        }
        self.brokers.insert(node, broker);
    }

    fn handle_at(&mut self, broker: &mut Broker, event: Ev) {
        let alive = broker.process.as_ref().map_or(0, |p| p.boot);
        match event {
            Ev::Tick { boot, .. } if boot == alive => self.tick(broker),
            Ev::Synced { boot, .. } if boot == alive => self.synced(broker),
            Ev::Read { boot, slot, low, high, .. } if boot == alive => {
                self.read_done(broker, slot, low, high)
            }
            Ev::Frame { from, bytes, .. } => {
                self.mix(&[from, bytes.len() as u64]);
                self.receive(broker, from, &bytes);
            }
            Ev::Request { client, op, asked, .. } => self.request(broker, client, op, asked),
            Ev::Restart(_) if broker.process.is_none() => self.boot(broker),
            _ => {}
        }
    }

    fn with_broker(&mut self, id: u64, act: impl FnOnce(&mut World, &mut Broker)) {
        if let Some(mut broker) = self.brokers.remove(&id) {
            act(self, &mut broker);
            self.brokers.insert(id, broker);
        }
    }

    fn nemesis(&mut self) {
        if !self.faults {
            return;
        }
        let node = self.rng.pick(&self.nodes);
        let slot = self.rng.below(self.groups as u64) as usize;
        match self.rng.below(15) {
            0..=1 => {
                let nodes = self.nodes.clone();
                self.network.split(&mut self.rng, &nodes);
            }
            2..=3 => self.network.heal(),
            4 => {
                self.network.loss_permille = self.rng.below(100);
                self.network.duplicate_permille = self.rng.below(80);
                self.network.late_permille = self.rng.below(60);
                self.network.flip_permille = self.rng.below(20);
            }
            5..=6 => self.crash_and_restart(node),
            7 => {
                if self.rng.below(3) == 0 {
                    self.network.count("crash of all");
                    self.nodes.clone().into_iter().for_each(|node| self.crash_and_restart(node));
                }
            }
            8 => {
                self.network.count("disk stall");
                let until = self.now + self.rng.between(10_000, 400_000);
                self.with_broker(node, |_, broker| broker.disk_stalled_until = until);
            }
            9 => {
                self.network.count("pause");
                let until = self.now + self.rng.between(10_000, 600_000);
                self.with_broker(node, |_, broker| broker.paused_until = until);
            }
            10 => {
                self.network.count("clock");
                let tick_us = self.rng.between(TICK_US / 2, TICK_US * 2);
                self.with_broker(node, |_, broker| broker.tick_us = tick_us);
            }
            11 => {
                let to = self.rng.pick(&self.nodes);
                self.with_leader(slot, |world, broker| {
                    let replica = broker.process.as_mut().map(|p| &mut p.replicas[slot]);
                    if replica.is_some_and(|r| r.group.transfer_leader(to).is_ok()) {
                        world.network.count("transfer");
                    }
                });
            }
            12..=13 => self.change_members(slot),
            _ => self.retain(node, slot),
        }
        let at = self.now + self.rng.between(10_000, 250_000);
        self.at(at, Ev::Nemesis);
    }

    fn crash_and_restart(&mut self, node: u64) {
        self.with_broker(node, |world, broker| world.crash(broker));
        let at = self.now + self.rng.between(5_000, 900_000);
        self.at(at, Ev::Restart(node));
    }

    fn with_leader(&mut self, slot: usize, act: impl FnOnce(&mut World, &mut Broker)) {
        let leads = |broker: &&Broker| {
            broker.process.as_ref().is_some_and(|p| p.replicas[slot].group.may_serve())
                && broker.paused_until <= self.now
        };
        let Some(id) = self.brokers.values().rev().find(leads).map(|b| b.id) else { return };
        self.with_broker(id, |world, broker| {
            act(world, broker);
            world.work(broker, slot);
        });
    }

    fn change_members(&mut self, slot: usize) {
        let voters = self.rng.pick(&[1usize, 2, 3, 3, 3]);
        let mut ids = self.nodes.clone();
        for at in (1..ids.len()).rev() {
            ids.swap(at, self.rng.below(at as u64 + 1) as usize);
        }
        let learners = self.rng.below(2) as usize;
        let target = Target {
            voters: ids[..voters].to_vec(),
            learners: ids[voters..].iter().copied().take(learners).collect(),
        };
        self.with_leader(slot, |world, broker| {
            let Some(process) = &mut broker.process else { return };
            let replica = &mut process.replicas[slot];
            if replica.group.propose_membership(target).is_ok() {
                world.network.count("membership");
            }
        });
    }

    /// Entries at the front go, never ones that are not applied and stored.
    fn retain(&mut self, node: u64, slot: usize) {
        let keep = self.rng.between(1, 20);
        self.with_broker(node, |world, broker| {
            let Some(process) = &mut broker.process else { return };
            if process.has_staged(slot) {
                return;
            }
            let replica = &mut process.replicas[slot];
            let index = replica.group.status().applied_index.min(replica.committed).saturating_sub(keep);
            if index > replica.before {
                world.network.count("retention");
                let offset = replica.cut_front(index);
                replica.group.set_log_start(index);
                broker.disks[slot].cut_front(index, offset);
            }
        });
    }

    fn heal(&mut self) {
        self.faults = false;
        self.network.heal();
        for id in self.nodes.clone() {
            self.with_broker(id, |world, broker| {
                (broker.paused_until, broker.disk_stalled_until, broker.tick_us) = (0, 0, TICK_US);
                if broker.process.is_none() {
                    world.boot(broker);
                }
            });
        }
        self.note(Event::Healed { bound_ms: RECOVERY_MS });
    }

    /// What clients can read in the end, and whether replicas are the same.
    fn judge(&mut self) {
        for slot in 0..self.groups {
            let name = partition(slot);
            let replicas = |world: &World| -> Vec<(u64, i64, i64)> {
                let all =
                    world.brokers.values().filter_map(|b| Some((b.id, &b.process.as_ref()?.replicas[slot])));
                all.map(|(id, r)| (id, r.start_offset, r.high_watermark)).collect()
            };
            let leader = self.brokers.values().find_map(|b| {
                let replica = &b.process.as_ref()?.replicas[slot];
                replica.group.may_serve().then_some(replica)
            });
            let Some(leader) = leader else { continue };
            let records = leader.records(0, leader.high_watermark, usize::MAX);
            let (log_start, members) = (leader.start_offset, leader.members.clone());
            let committed = records.iter().map(|(_, value)| *value).collect();
            self.note(Event::FinalRead { partition: name.clone(), log_start, records, committed });
            let replicas: Vec<_> =
                replicas(self).into_iter().filter(|(id, ..)| members.contains(*id)).collect();
            let from = replicas.iter().map(|(_, start, _)| *start).max().unwrap_or(0);
            let up_to = replicas.iter().map(|(.., high)| *high).min().unwrap_or(0);
            if replicas.iter().any(|(.., high)| *high != up_to) {
                let status = self.brokers.values().find_map(|b| {
                    let group = &b.process.as_ref()?.replicas[slot].group;
                    group.may_serve().then(|| group.status())
                });
                self.oracle
                    .fail(format!("{name}: replicas did not catch up: {replicas:?}; leader: {status:?}"));
            }
            for (id, ..) in replicas {
                let process = self.brokers[&id].process.as_ref();
                let digest = process.map_or(0, |p| p.replicas[slot].digest(from, up_to));
                self.note(Event::Digest { node: id, partition: name.clone(), up_to, digest });
                self.mix(&[digest]);
            }
        }
        self.note(Event::Over);
    }
}
