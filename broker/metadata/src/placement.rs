//! Which nodes get the replicas of a partition, and which of them is to lead.
//!
//! Nodes that run and have room on their disks first; the others only where there are not enough of those. Then racks: as many
//! different ones as there are replicas, where the nodes allow it. Then the load: a topic's own
//! replicas are spread evenly, and what does not divide goes to the nodes that hold least of everything. The first replica
//! leads where it can, so first places are spread in the same way.
//!
//! Pure and deterministic: equal images give equal choices, and equal nodes are taken in the order of their ids. It
//! knows nothing of sizes and rates: a count is the same on every node at every time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::admin::IsUp;
use crate::assignment::PartitionInfo;
use crate::image::MetadataImage;
use crate::nodes::NodeState;

/// What the metadata does not know of the nodes.
#[derive(Clone, Copy)]
pub struct NodeHealth<'a> {
    pub is_up: IsUp<'a>,
    /// Whether there is room on its disk.
    pub has_room: &'a dyn Fn(i32) -> bool,
}

#[cfg(test)]
impl NodeHealth<'_> {
    pub const ALL_WELL: NodeHealth<'static> = NodeHealth { is_up: &|_| true, has_room: &|_| true };
}

/// The less the better.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    #[default]
    None,
    /// It votes, and takes little: a replica there is behind as soon as much is written.
    IsFull,
    /// A replica there is behind from its first record on.
    IsDown,
}

/// Nodes that may be given replicas, with what they hold already.
#[derive(Debug, Clone)]
pub struct Placer {
    nodes: Vec<Candidate>,
    /// Of all nodes, also those that take no new replicas.
    racks: BTreeMap<i32, Option<String>>,
}

#[derive(Debug, Clone, Default)]
struct Candidate {
    id: i32,
    rack: Option<String>,
    trouble: Trouble,
    /// Of the topic that is being placed, and of all.
    of_topic: Load,
    of_all: Load,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    replicas: usize,
    first: usize,
}

impl Placer {
    pub fn new(image: &MetadataImage, health: NodeHealth<'_>) -> Placer {
        let trouble = |id: i32| match ((health.is_up)(id), (health.has_room)(id)) {
            (false, _) => Trouble::IsDown,
            (true, false) => Trouble::IsFull,
            (true, true) => Trouble::None,
        };
        let active = image.brokers().into_iter().filter(|broker| broker.state == NodeState::Active);
        let nodes = active.map(|broker| Candidate {
            id: broker.id,
            rack: broker.rack.map(str::to_string),
            trouble: trouble(broker.id),
            ..Candidate::default()
        });
        // Those that take no new replicas keep the ones they have, and their racks count.
        let racks = image.brokers().into_iter().map(|broker| (broker.id, broker.rack.map(str::to_string)));
        let mut placer = Placer { nodes: nodes.collect(), racks: racks.collect() };
        let mut loads: BTreeMap<i32, Load> = BTreeMap::new();
        for info in image.topics.values().flat_map(|topic| &topic.partitions) {
            for (at, id) in info.goal().iter().enumerate() {
                let load = loads.entry(*id).or_default();
                load.replicas += 1;
                load.first += usize::from(at == 0);
            }
        }
        for node in &mut placer.nodes {
            node.of_all = loads.get(&node.id).copied().unwrap_or_default();
        }
        placer
    }

    /// How many nodes there are to choose from.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Assignments for `count` new partitions of a topic that has `existing` ones. `None` when there are not enough nodes.
    pub fn place(
        &mut self,
        existing: &[PartitionInfo],
        count: usize,
        replication_factor: usize,
    ) -> Option<Vec<Vec<i32>>> {
        if replication_factor == 0 || replication_factor > self.nodes.len() {
            return None;
        }
        self.begin_topic(existing);
        let mut placed: Vec<Vec<usize>> = (0..count).map(|_| self.place_one(replication_factor)).collect();
        self.even_first_places(&mut placed);
        let ids = |replicas: Vec<usize>| replicas.into_iter().map(|at| self.nodes[at].id).collect();
        Some(placed.into_iter().map(ids).collect())
    }

    /// Taken one after another, first places may come out uneven although the replicas are even. Whoever has two more than
    /// another passes one on, over others where no partition is on both.
    fn even_first_places(&mut self, placed: &mut [Vec<usize>]) {
        while let Some(path) = self.passing(placed) {
            for (from, to) in path {
                let replicas =
                    placed.iter_mut().find(|replicas| replicas[0] == from && replicas.contains(&to));
                let Some(replicas) = replicas else { return };
                let place = replicas.iter().position(|at| *at == to).unwrap_or(0);
                replicas.swap(0, place);
                for (at, more) in [(from, false), (to, true)] {
                    let node = &mut self.nodes[at];
                    for load in [&mut node.of_topic, &mut node.of_all] {
                        load.first = if more { load.first + 1 } else { load.first.saturating_sub(1) };
                    }
                }
            }
        }
    }

    /// Steps by which a node with most first places gets rid of one, to a node with at least two fewer.
    fn passing(&self, placed: &[Vec<usize>]) -> Option<Vec<(usize, usize)>> {
        let mut next: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); self.nodes.len()];
        for replicas in placed {
            next[replicas[0]]
                .extend(replicas[1..].iter().filter(|at| self.nodes[**at].trouble == Trouble::None));
        }
        let first = |at: usize| self.nodes[at].of_topic.first;
        let most = (0..self.nodes.len()).filter(|at| !next[*at].is_empty()).map(first).max()?;
        for start in (0..self.nodes.len()).filter(|at| first(*at) == most) {
            let mut from: BTreeMap<usize, usize> = BTreeMap::from([(start, start)]);
            let mut queue = VecDeque::from([start]);
            while let Some(at) = queue.pop_front() {
                if first(at) + 2 <= most {
                    let mut path = Vec::new();
                    let mut to = at;
                    while to != start {
                        path.push((from[&to], to));
                        to = from[&to];
                    }
                    // The last step first: nobody passes on what it has not been given.
                    return Some(path);
                }
                for to in &next[at] {
                    if !from.contains_key(to) {
                        from.insert(*to, at);
                        queue.push_back(*to);
                    }
                }
            }
        }
        None
    }

    /// Where a partition of a topic goes when `kept` of its replicas stay and it needs `replication_factor`. Those that stay
    /// keep their order before those that come.
    pub fn place_again(
        &mut self,
        topic: &[PartitionInfo],
        kept: &[i32],
        replication_factor: usize,
    ) -> Option<Vec<i32>> {
        self.begin_topic(topic);
        let able = self.nodes.iter().filter(|node| !kept.contains(&node.id)).count();
        if kept.len() + able < replication_factor {
            return None;
        }
        let racks: Vec<Option<String>> = kept.iter().map(|id| self.rack_of(*id)).collect();
        let chosen = self.choose(kept, &racks, replication_factor);
        let mut replicas = kept.to_vec();
        replicas.extend(chosen.iter().map(|at| self.nodes[*at].id));
        for at in chosen {
            self.nodes[at].of_all.replicas += 1;
        }
        Some(replicas)
    }

    fn rack_of(&self, id: i32) -> Option<String> {
        self.racks.get(&id).cloned().flatten()
    }

    fn begin_topic(&mut self, existing: &[PartitionInfo]) {
        for node in &mut self.nodes {
            node.of_topic = Load {
                replicas: existing.iter().filter(|info| info.goal().contains(&node.id)).count(),
                first: existing.iter().filter(|info| info.goal().first() == Some(&node.id)).count(),
            };
        }
    }

    fn place_one(&mut self, replication_factor: usize) -> Vec<usize> {
        let mut chosen = self.choose(&[], &[], replication_factor);
        // Each place in the order of those who have it least often, so that the second in line is spread too.
        chosen.sort_by_key(|at| {
            let node = &self.nodes[*at];
            (node.trouble, node.of_topic.first, node.of_all.first, node.of_topic.replicas, node.id)
        });
        for (place, at) in chosen.iter().enumerate() {
            let node = &mut self.nodes[*at];
            for load in [&mut node.of_topic, &mut node.of_all] {
                load.replicas += 1;
                load.first += usize::from(place == 0);
            }
        }
        chosen
    }

    /// Positions of the nodes that are added to `taken`, whose racks are `racks`.
    fn choose(&self, taken: &[i32], racks: &[Option<String>], replication_factor: usize) -> Vec<usize> {
        let mut chosen: Vec<usize> = Vec::with_capacity(replication_factor);
        while taken.len() + chosen.len() < replication_factor {
            let in_rack = |rack: &Option<String>| {
                racks.iter().filter(|other| *other == rack).count()
                    + chosen.iter().filter(|at| self.nodes[**at].rack == *rack).count()
            };
            let free = (0..self.nodes.len())
                .filter(|at| !chosen.contains(at) && !taken.contains(&self.nodes[*at].id));
            let best = free.min_by_key(|at| {
                let node = &self.nodes[*at];
                let load =
                    (node.of_topic.replicas, node.of_all.replicas, node.of_topic.first, node.of_all.first);
                (node.trouble, in_rack(&node.rack), load, node.id)
            });
            let Some(best) = best else { break };
            chosen.push(best);
        }
        chosen
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
