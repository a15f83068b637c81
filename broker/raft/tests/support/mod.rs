//! A handful of groups with disks in memory and a network that does what a script says. No randomness: a script is a list
//! of events, and what is checked is what our boundary puts out.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use flumen_raft::{
    Body, ConfirmedRead, Contradiction, Entry, Group, GroupStart, HardState, Leadership, Membership, Message,
    Outputs, Role, StepError,
};

#[derive(Clone, Default)]
pub struct Disk {
    pub hard_state: HardState,
    pub membership: Membership,
    pub membership_index: u64,
    pub abstains_below: u64,
    /// Index and term before the first entry.
    pub before: (u64, u64),
    pub entries: Vec<Entry>,
}

impl Disk {
    pub fn last(&self) -> (u64, u64) {
        self.entries.last().map_or(self.before, |e| (e.index, e.term))
    }

    pub fn start(&self, id: u64) -> GroupStart {
        let (last_index, last_term) = self.last();
        let mut terms: Vec<(u64, u64)> = Vec::new();
        for entry in &self.entries {
            if terms.last().map_or(self.before.1, |(_, term)| *term) != entry.term {
                terms.push((entry.index, entry.term));
            }
        }
        let changes = self.entries.iter().filter(|e| e.is_membership && e.index > self.membership_index);
        GroupStart {
            node_id: id,
            membership: self.membership.clone(),
            membership_index: self.membership_index,
            membership_entries: changes.map(|e| (e.index, e.data.clone())).collect(),
            hard_state: self.hard_state,
            before: self.before,
            terms,
            last_index,
            last_term,
            seed: 1,
            abstains_below: self.abstains_below,
        }
    }

    fn store(&mut self, outputs: &Outputs) {
        if let Some(install) = &outputs.install {
            self.before = (install.index, install.term);
            self.entries.clear();
            self.membership = install.membership.clone();
            self.membership_index = install.membership_index;
        }
        if outputs.install.as_ref().is_some_and(|install| install.index == 0) {
            self.abstains_below = outputs.hard_state.map_or(0, |hard| hard.term);
        }
        if let Some(first) = outputs.entries.first() {
            let kept = self.entries.iter().position(|e| e.index >= first.index);
            assert_eq!(outputs.replaces, kept.is_some(), "replacement must be announced");
            self.entries.truncate(kept.unwrap_or(self.entries.len()));
            self.entries.extend(outputs.entries.iter().cloned());
        }
        if let Some((index, membership)) = &outputs.membership {
            (self.membership, self.membership_index) = (membership.clone(), *index);
        }
        self.hard_state = outputs.hard_state.unwrap_or(self.hard_state);
    }
}

pub struct Node {
    pub group: Group,
    pub disk: Disk,
    /// Outputs that wait for the disk.
    waiting: VecDeque<Outputs>,
    pub slow_disk: bool,
    pub leadership: Option<Leadership>,
    pub committed: u64,
    pub reads: Vec<ConfirmedRead>,
    pub refused: Vec<StepError>,
    pub snapshots_made: usize,
    pub entries_read: usize,
    pub contradiction: Option<Contradiction>,
}

#[derive(Default)]
pub struct Net {
    pub nodes: BTreeMap<u64, Node>,
    pub queue: VecDeque<Message>,
    pub cut: BTreeSet<(u64, u64)>,
    pub sent: Vec<Message>,
}

impl Net {
    pub fn of(ids: &[u64]) -> Net {
        let disk = Disk { membership: Membership::of_voters(ids.to_vec()), ..Disk::default() };
        let mut net = Net::default();
        for id in ids {
            net.add(*id, disk.clone());
        }
        net
    }

    /// A cluster in which every node has a log of these terms, each with the hard state of its newest.
    pub fn with_logs(logs: &[(u64, &[u64])]) -> Net {
        let voters: Vec<u64> = logs.iter().map(|(id, _)| *id).collect();
        let mut net = Net::default();
        for (id, terms) in logs {
            let entry = |(at, term): (usize, &u64)| Entry {
                index: at as u64 + 1,
                term: *term,
                data: Bytes::from(format!("{term}/{}", at + 1)),
                is_membership: false,
            };
            let disk = Disk {
                hard_state: HardState { term: terms.last().copied().unwrap_or(0), vote: 0, commit: 0 },
                membership: Membership::of_voters(voters.clone()),
                entries: terms.iter().enumerate().map(entry).collect(),
                ..Disk::default()
            };
            net.add(*id, disk);
        }
        net
    }

    pub fn add(&mut self, id: u64, disk: Disk) {
        let group = Group::start(&disk.start(id)).unwrap();
        let node = Node {
            group,
            disk,
            waiting: VecDeque::new(),
            slow_disk: false,
            leadership: None,
            committed: 0,
            reads: Vec::new(),
            refused: Vec::new(),
            snapshots_made: 0,
            entries_read: 0,
            contradiction: None,
        };
        self.nodes.insert(id, node);
    }

    pub fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// Forgets what was not on the disk, and starts from what was.
    pub fn crash(&mut self, id: u64) {
        let disk = self.nodes.remove(&id).unwrap().disk;
        self.queue.retain(|m| m.from != id && m.to != id);
        self.add(id, disk);
    }

    /// Handles what the group puts out, as a shell must.
    pub fn work(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id).unwrap();
        while let Some(mut outputs) = node.group.take_outputs() {
            assert_eq!(outputs.fault, None);
            for message in outputs.messages.drain(..) {
                self.sent.push(message.clone());
                self.queue.push_back(message);
            }
            node.leadership = outputs.leadership.or(node.leadership);
            node.contradiction = outputs.contradiction.or(node.contradiction);
            if outputs.install.as_ref().is_some_and(|install| install.index == 0) {
                node.committed = 0;
            }
            if let Some(index) = outputs.committed_index {
                assert!(index > node.committed, "the commit index never goes back");
                node.committed = index;
            }
            node.reads.append(&mut outputs.confirmed_reads);
            for wanted in std::mem::take(&mut outputs.entries_wanted) {
                let stored =
                    node.disk.entries.iter().filter(|e| (wanted.low..wanted.high).contains(&e.index));
                let entries: Vec<Entry> = stored.take(3).cloned().collect();
                node.entries_read += entries.len();
                node.group.entries_read(wanted.low, entries);
            }
            if !outputs.snapshot_wanted_for.is_empty() {
                node.snapshots_made += 1;
                node.group.offer_snapshot(Bytes::from_static(b"log start"));
            }
            if outputs.must_persist() {
                node.waiting.push_back(outputs);
                if !node.slow_disk {
                    self.persist(id);
                    return self.work(id);
                }
            }
        }
    }

    /// The disk catches up with everything that waits for it.
    pub fn persist(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id).unwrap();
        while let Some(outputs) = node.waiting.pop_front() {
            node.disk.store(&outputs);
            node.group.on_persisted(outputs.number);
        }
    }

    pub fn campaign(&mut self, id: u64) {
        self.node(id).group.campaign().unwrap();
        self.settle();
    }

    pub fn propose(&mut self, id: u64, data: &'static str) -> u64 {
        let (index, _) = self.node(id).group.propose(Bytes::from_static(data.as_bytes())).unwrap();
        self.settle();
        index
    }

    /// Delivers until nothing moves.
    pub fn settle(&mut self) {
        for id in self.ids() {
            self.work(id);
        }
        while let Some(message) = self.queue.pop_front() {
            let to = message.to;
            if self.cut.contains(&(message.from, to)) || !self.nodes.contains_key(&to) {
                continue;
            }
            if let Err(error) = self.node(to).group.step(message) {
                self.node(to).refused.push(error);
            }
            self.work(to);
        }
    }

    pub fn tick(&mut self, ids: &[u64], times: usize) {
        for _ in 0..times {
            for id in ids {
                self.node(*id).group.tick();
            }
            self.settle();
        }
    }

    pub fn tick_all(&mut self, times: usize) {
        let ids = self.ids();
        self.tick(&ids, times);
    }

    pub fn ids(&self) -> Vec<u64> {
        self.nodes.keys().copied().collect()
    }

    pub fn isolate(&mut self, id: u64) {
        for other in self.ids() {
            self.cut.insert((id, other));
            self.cut.insert((other, id));
        }
    }

    pub fn split(&mut self, a: &[u64], b: &[u64]) {
        for (x, y) in a.iter().flat_map(|x| b.iter().map(move |y| (*x, *y))) {
            self.cut.insert((x, y));
            self.cut.insert((y, x));
        }
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    pub fn leaders(&self) -> Vec<u64> {
        self.nodes.iter().filter(|(_, n)| n.group.is_leader()).map(|(id, _)| *id).collect()
    }

    pub fn terms(&self, id: u64) -> Vec<u64> {
        self.nodes[&id].disk.entries.iter().map(|e| e.term).collect()
    }

    pub fn role(&self, id: u64) -> Option<Role> {
        self.nodes[&id].leadership.map(|l| l.role)
    }
}

pub fn is_append(message: &Message) -> bool {
    matches!(&message.body, Body::Append { entries, .. } if !entries.is_empty())
}
