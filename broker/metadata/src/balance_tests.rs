use std::collections::BTreeMap;

use uuid::Uuid;

use super::*;
use crate::admin::PartitionStatus;
use crate::image::NodeInfo;
use crate::nodes::NodeRecord;

fn cluster(nodes: i32, assignments: &[&[i32]]) -> MetadataImage {
    let info = NodeInfo { id: 1, host: "h".into(), port: 9092, rack: None };
    let mut image = MetadataImage::empty(info);
    for id in 1..=nodes {
        let record = NodeRecord {
            id,
            host: "h".into(),
            port: 9092,
            rack: None,
            rpc_address: "h:1".into(),
            directory_id: Uuid::from_u128(1),
            boot_id: 1,
            version_max: 1,
            state: NodeState::Active,
        };
        image.apply(&Command::RegisterNode(record)).unwrap();
    }
    let assignments = assignments.iter().map(|replicas| replicas.to_vec()).collect();
    let (name, id, configs) = ("t".to_string(), Uuid::from_u128(1), BTreeMap::new());
    image.apply(&Command::CreateTopic { name, id, assignments, configs }).unwrap();
    image
}

fn set_state(image: &mut MetadataImage, id: i32, state: NodeState) {
    image.apply(&Command::SetNodeState { id, state }).unwrap();
}

/// (partition, from, to) with these leaders by group and these nodes down.
fn transfers(image: &MetadataImage, leaders: &[i32], down: &[i32]) -> Vec<(i32, i32, i32)> {
    transfers_with(image, leaders, down, &[])
}

/// The same with disks of these nodes full.
fn transfers_with(
    image: &MetadataImage,
    leaders: &[i32],
    down: &[i32],
    full: &[i32],
) -> Vec<(i32, i32, i32)> {
    let status = |group: u64| PartitionStatus {
        leader_id: leaders[usize::try_from(group).unwrap() - 1],
        ..PartitionStatus::default()
    };
    let live = Live { controller_id: 1, status: &status, is_up: &|id| !down.contains(&id) };
    let planned = leader_transfers(image, live, &|id| !full.contains(&id));
    planned.into_iter().map(|t| (t.partition, t.from, t.to)).collect()
}

#[test]
fn leaders_go_home_when_home_is_there() {
    let image = cluster(3, &[&[1, 2, 3], &[2, 3, 1], &[3, 1, 2]]);
    assert_eq!(transfers(&image, &[1, 2, 3], &[]), []);
    assert_eq!(transfers(&image, &[1, 1, 1], &[]), [(1, 1, 2), (2, 1, 3)]);
    assert_eq!(transfers(&image, &[1, 1, 1], &[2]), [(2, 1, 3)]);
    assert_eq!(transfers(&image, &[-1, 1, 3], &[2]), []);
}

#[test]
fn a_node_whose_disk_is_full_is_given_nothing() {
    let mut image = cluster(3, &[&[1, 2, 3], &[2, 3, 1], &[3, 1, 2]]);
    assert_eq!(transfers_with(&image, &[2, 2, 2], &[], &[1]), [(2, 2, 3)]);
    assert_eq!(transfers_with(&image, &[2, 2, 2], &[], &[2]), [], "it gives them up by itself");
    set_state(&mut image, 2, NodeState::Maintenance);
    assert_eq!(transfers_with(&image, &[2, 2, 2], &[], &[1]), [(0, 2, 3), (1, 2, 3), (2, 2, 3)]);
    assert_eq!(transfers_with(&image, &[2, 2, 2], &[], &[1, 3]), [], "nobody has room");
}

#[test]
fn nodes_in_maintenance_lead_nothing() {
    let mut image = cluster(3, &[&[1, 2, 3], &[1, 3, 2], &[1, 2, 3], &[1]]);
    set_state(&mut image, 1, NodeState::Maintenance);
    // Evenly over the others; a partition that has no other replica stays where it is.
    assert_eq!(transfers(&image, &[1, 1, 1, 1], &[]), [(0, 1, 2), (1, 1, 3), (2, 1, 2)]);
    assert_eq!(transfers(&image, &[2, 3, 2, 1], &[]), []);
    assert_eq!(plan_maintenance(&image, 1, true), Ok(None));
    let back = Command::SetNodeState { id: 1, state: NodeState::Active };
    assert_eq!(plan_maintenance(&image, 1, false), Ok(Some(back)));
    assert!(plan_maintenance(&image, 9, true).is_err());
}

#[test]
fn a_turn_is_bounded() {
    let many: Vec<&[i32]> = vec![&[1, 2]; 100];
    let mut image = cluster(3, &many);
    assert_eq!(transfers(&image, &[2; 100], &[]).len(), TRANSFERS_PER_TURN_MAX);
    set_state(&mut image, 1, NodeState::Decommissioning);
    let mut turns = 0;
    while image.replicas_on(1) > 0 {
        let commands = evacuations(&image, NodeHealth::ALL_WELL);
        assert!(!commands.is_empty() && commands.len() <= MOVES_AT_ONCE_MAX);
        for command in &commands {
            image.apply(command).unwrap();
        }
        assert!(evacuations(&image, NodeHealth::ALL_WELL).is_empty(), "no more at once");
        let progress = decommission_progress(&image, 1);
        assert_eq!((progress.moving, progress.blocked), (commands.len(), None));
        for command in commands {
            let Command::SetReplicas { topic_id, partition, target: Some(replicas) } = command else {
                panic!("{command:?}")
            };
            image.apply(&Command::ReplicasReached { topic_id, partition, replicas }).unwrap();
        }
        turns += 1;
    }
    assert_eq!(turns, 100usize.div_ceil(MOVES_AT_ONCE_MAX));
    image.apply(&Command::RemoveNode { id: 1 }).unwrap();
    assert!(image.topics["t"].partitions.iter().all(|info| info.replicas == [2, 3]));
}

/// Regression: three of five were lost and decommissioned one after the other; the move away from the first went to replicas on the
/// second, and waited for that one for ever.
#[test]
fn a_move_to_a_node_that_leaves_goes_elsewhere() {
    let mut image = cluster(6, &[&[1, 2, 3], &[3, 1, 2]]);
    set_state(&mut image, 3, NodeState::Decommissioning);
    let up = |id| id == 1 || id > 3;
    let apply = |image: &mut MetadataImage| {
        let commands = evacuations(image, NodeHealth { is_up: &up, ..NodeHealth::ALL_WELL });
        for command in &commands {
            image.apply(command).unwrap();
        }
        commands.len()
    };
    assert_eq!(apply(&mut image), 2);
    assert!(image.topics["t"].partitions.iter().all(|info| info.goal().contains(&2)));
    set_state(&mut image, 2, NodeState::Decommissioning);
    assert_eq!(apply(&mut image), 2);
    assert_eq!(apply(&mut image), 0, "each is changed once");
    // Where one of the new ones is lost, too.
    let lost = image.topics["t"].partitions[0].adding()[0];
    set_state(&mut image, lost, NodeState::Decommissioning);
    apply(&mut image);
    for info in &image.topics["t"].partitions {
        let (goal, mut distinct) = (info.goal(), info.goal().to_vec());
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() == 3 && goal.contains(&1), "{goal:?}");
        assert!(goal.iter().all(|id| ![2, 3, lost].contains(id)), "{goal:?}");
        // What the nodes were given on the way is theirs until the group has let go of them.
        assert!(info.replicas.iter().all(|id| info.is_held_by(*id)));
    }
    assert!(image.topics["t"].partitions[0].is_held_by(lost));
}

#[test]
fn a_node_that_is_needed_cannot_leave() {
    let mut image = cluster(3, &[&[1, 2, 3]]);
    let refused = plan_decommission(&image, 1).unwrap_err();
    assert!(refused.message.ends_with("add a node first"), "{refused}");
    set_state(&mut image, 1, NodeState::Decommissioning);
    assert!(evacuations(&image, NodeHealth::ALL_WELL).is_empty());
    assert!(decommission_progress(&image, 1).blocked.is_some());
    let mut image = cluster(4, &[&[1, 2, 3]]);
    let leave = Command::SetNodeState { id: 1, state: NodeState::Decommissioning };
    assert_eq!(plan_decommission(&image, 1), Ok(Some(leave.clone())));
    image.apply(&leave).unwrap();
    assert_eq!(plan_decommission(&image, 1), Ok(None));
    assert!(plan_maintenance(&image, 1, true).is_err());
    let target = Some(vec![2, 3, 4]);
    let expected = Command::SetReplicas { topic_id: Uuid::from_u128(1), partition: 0, target };
    assert_eq!(evacuations(&image, NodeHealth::ALL_WELL), [expected]);
}
