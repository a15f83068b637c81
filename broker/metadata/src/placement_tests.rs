use std::collections::BTreeSet;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::command::Command;
use crate::image::NodeInfo;
use crate::nodes::NodeRecord;

fn node(id: i32, rack: Option<usize>) -> Command {
    Command::RegisterNode(NodeRecord {
        id,
        host: format!("h{id}"),
        port: 9092,
        rack: rack.map(|rack| format!("r{rack}")),
        rpc_address: format!("h{id}:33145"),
        directory_id: Uuid::from_u128(1),
        boot_id: 1,
        version_max: 1,
        state: NodeState::Active,
    })
}

fn cluster(racks: &[Option<usize>]) -> MetadataImage {
    let info = NodeInfo { id: 0, host: "h0".into(), port: 9092, rack: None };
    let mut image = MetadataImage::empty(info);
    for (id, rack) in (0..).zip(racks) {
        image.apply(&node(id, *rack)).unwrap();
    }
    image
}

fn spread(counts: &BTreeMap<i32, usize>, nodes: usize) -> usize {
    let most = counts.values().copied().max().unwrap_or(0);
    let least = if counts.len() < nodes { 0 } else { counts.values().copied().min().unwrap_or(0) };
    most - least
}

fn count<'a>(ids: impl Iterator<Item = &'a i32>) -> BTreeMap<i32, usize> {
    let mut counts = BTreeMap::new();
    for id in ids {
        *counts.entry(*id).or_default() += 1;
    }
    counts
}

proptest! {
    /// Topics one after another, as a cluster sees them.
    #[test]
    fn replicas_are_apart_and_nodes_are_even(
        nodes in 1usize..9,
        racks in proptest::option::of(1usize..5),
        topics in proptest::collection::vec((1usize..14, 1usize..6), 1..8),
    ) {
        let of: Vec<Option<usize>> = (0..nodes).map(|at| racks.map(|racks| at % racks)).collect();
        let mut image = cluster(&of);
        for (number, (partitions, replication_factor)) in (1u128..).zip(&topics) {
            let placed = Placer::new(&image, NodeHealth::ALL_WELL).place(&[], *partitions, *replication_factor);
            if *replication_factor > nodes {
                prop_assert_eq!(placed, None);
                continue;
            }
            let assignments = placed.unwrap();
            prop_assert_eq!(assignments.len(), *partitions);
            let all_racks: BTreeSet<_> = of.iter().collect();
            for replicas in &assignments {
                let distinct: BTreeSet<_> = replicas.iter().collect();
                prop_assert_eq!(distinct.len(), *replication_factor, "a node twice in {:?}", replicas);
                let in_racks: BTreeSet<_> = replicas.iter().map(|id| of[*id as usize]).collect();
                prop_assert_eq!(in_racks.len(), all_racks.len().min(*replication_factor));
            }
            // Racks of unlike sizes cannot be both spread and even.
            if racks.is_none_or(|racks| nodes % racks == 0) {
                let uneven = 1 + usize::from(racks.is_some());
                prop_assert!(spread(&count(assignments.iter().flatten()), nodes) <= uneven, "{:?}", assignments);
                let first = count(assignments.iter().filter_map(|replicas| replicas.first()));
                prop_assert!(spread(&first, nodes) <= uneven, "{:?}", assignments);
            }
            let name = format!("t{number}");
            let id = Uuid::from_u128(number);
            let configs = BTreeMap::new();
            image.apply(&Command::CreateTopic { name, id, assignments, configs }).unwrap();
        }
        if racks.is_none() {
            let partitions: Vec<_> = image.topics.values().flat_map(|topic| &topic.partitions).collect();
            prop_assert!(spread(&count(partitions.iter().flat_map(|info| &info.replicas)), nodes) <= 1);
        }
    }
}

#[test]
fn nodes_that_do_not_run_or_are_leaving_are_avoided() {
    let mut image = cluster(&[None; 4]);
    image.apply(&Command::SetNodeState { id: 3, state: NodeState::Decommissioning }).unwrap();
    let mut placer = Placer::new(&image, NodeHealth { is_up: &|id| id != 1, ..NodeHealth::ALL_WELL });
    assert_eq!(placer.node_count(), 3);
    let placed = placer.place(&[], 6, 2).unwrap();
    assert!(placed.iter().flatten().all(|id| matches!(id, 0 | 2)), "{placed:?}");
    // With nobody else left, one that does not run is better than none, and does not come first.
    let placed = placer.place(&[], 3, 3).unwrap();
    assert!(placed.iter().all(|replicas| replicas[2] == 1), "{placed:?}");
    assert_eq!(placer.place(&[], 1, 4), None);
}

#[test]
fn full_nodes_are_taken_only_where_there_are_not_enough_others() {
    let image = cluster(&[Some(0), Some(0), Some(1), Some(2)]);
    let full = |ids: &'static [i32]| move |id: i32| !ids.contains(&id);
    let place = |has_room: &dyn Fn(i32) -> bool, is_up: &dyn Fn(i32) -> bool, count, factor| {
        Placer::new(&image, NodeHealth { is_up, has_room }).place(&[], count, factor).unwrap()
    };
    let holders = |placed: &[Vec<i32>]| placed.iter().flatten().copied().collect::<BTreeSet<i32>>();
    // Rather in one rack than on a full disk.
    let placed = place(&full(&[2, 3]), &|_| true, 6, 2);
    assert_eq!(holders(&placed), [0, 1].into());
    // As few of them as it takes, and none leads.
    let placed = place(&full(&[2, 3]), &|_| true, 6, 3);
    assert!(placed.iter().all(|replicas| replicas[..2].iter().all(|id| *id < 2)), "{placed:?}");
    assert_eq!(holders(&placed), [0, 1, 2, 3].into());
    let first = count(placed.iter().map(|replicas| &replicas[0]));
    assert_eq!(first, [(0, 3), (1, 3)].into());
    // One that does not run is worse, full or not.
    let placed = place(&full(&[1, 3]), &|id| id != 3, 1, 4);
    assert_eq!(placed, [[0, 2, 1, 3]]);
    let placed = place(&full(&[1, 3]), &|id| id != 2, 1, 3);
    assert_eq!(holders(&placed), [0, 1, 3].into());
    // Where all are full it is as if none were.
    assert_eq!(place(&|_| false, &|_| true, 6, 3), place(&|_| true, &|_| true, 6, 3));
    // What stays stays, and what comes has room.
    let topic = [PartitionInfo::at_rest(1, vec![2, 0])];
    let has_room = full(&[2, 3]);
    let health = NodeHealth { is_up: &|_| true, has_room: &has_room };
    assert_eq!(Placer::new(&image, health).place_again(&topic, &[2, 0], 3), Some(vec![2, 0, 1]));
    assert_eq!(Placer::new(&image, health).place_again(&topic, &[2, 0], 4), Some(vec![2, 0, 1, 3]));
}

#[test]
fn a_new_node_does_not_get_a_whole_topic() {
    let mut image = cluster(&[None; 2]);
    let assignments = vec![vec![0], vec![1], vec![0], vec![1]];
    let configs = BTreeMap::new();
    image
        .apply(&Command::CreateTopic { name: "old".into(), id: Uuid::from_u128(1), assignments, configs })
        .unwrap();
    image.apply(&node(2, None)).unwrap();
    let placed = Placer::new(&image, NodeHealth::ALL_WELL).place(&[], 4, 1).unwrap();
    assert_eq!(placed, [[2], [0], [1], [2]]);
    // More partitions of a topic go where it has fewest.
    let existing = [PartitionInfo::at_rest(1, vec![2]), PartitionInfo::at_rest(2, vec![0])];
    assert_eq!(Placer::new(&image, NodeHealth::ALL_WELL).place(&existing, 1, 1).unwrap(), [[1]]);
}

/// Regression: the rack of a node that takes no new replicas was not counted.
#[test]
fn the_rack_of_a_node_in_maintenance_counts() {
    let mut image = cluster(&[Some(0), Some(0), Some(1)]);
    image.apply(&Command::SetNodeState { id: 0, state: NodeState::Maintenance }).unwrap();
    let placed = Placer::new(&image, NodeHealth::ALL_WELL).place_again(&[], &[0], 2);
    assert_eq!(placed, Some(vec![0, 2]), "node 1 is in the rack of the one that stays");
}

#[test]
fn what_stays_stays_and_the_new_one_is_in_another_rack() {
    let image = cluster(&[Some(0), Some(0), Some(1), Some(2)]);
    let topic = [PartitionInfo::at_rest(1, vec![2, 0])];
    let placed = Placer::new(&image, NodeHealth::ALL_WELL).place_again(&topic, &[2, 0], 3);
    assert_eq!(placed, Some(vec![2, 0, 3]));
    assert_eq!(Placer::new(&image, NodeHealth::ALL_WELL).place_again(&topic, &[2, 0], 5), None);
}
