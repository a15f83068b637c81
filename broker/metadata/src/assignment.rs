//! Where a partition's replicas are, and where they move to.
//!
//! A move is one target: the Raft group works out the steps, and its leader tells when it is there. A move that is given
//! up is a move back; who was to get a replica holds it until the group no longer counts on it.
//!
//! Invariants
//! - `replicas` is where the group was when it last rested; with a target, it is somewhere on the way.
//! - A node keeps its log of the group as long as it is among `holders`.

use std::sync::Arc;

use uuid::Uuid;

use crate::codec::{CodecError, Reader, Writer};
use crate::image::{Applied, ApplyError, MetadataImage, Topic};

/// Replicas of one partition. Kafka installations use 3 to 5.
pub const REPLICAS_MAX: usize = 15;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PartitionInfo {
    /// Raft group of the partition.
    pub group_id: u64,
    /// The first one is the leader that is preferred.
    pub replicas: Vec<i32>,
    /// Where they are to be.
    pub target: Option<Vec<i32>>,
    /// Nodes that an earlier target named and this one does not.
    pub dropped: Vec<i32>,
}

impl PartitionInfo {
    pub fn at_rest(group_id: u64, replicas: Vec<i32>) -> PartitionInfo {
        PartitionInfo { group_id, replicas, target: None, dropped: Vec::new() }
    }

    /// Where the group is to be in the end.
    pub fn goal(&self) -> &[i32] {
        self.target.as_deref().unwrap_or(&self.replicas)
    }

    /// Every node that must keep the group's log, the goal's first, each once.
    pub fn holders(&self) -> Vec<i32> {
        let mut holders = self.goal().to_vec();
        for id in self.replicas.iter().chain(&self.dropped) {
            if !holders.contains(id) {
                holders.push(*id);
            }
        }
        holders
    }

    pub fn is_held_by(&self, id: i32) -> bool {
        self.goal().contains(&id) || self.replicas.contains(&id) || self.dropped.contains(&id)
    }

    /// Members of the goal that are not replicas yet.
    pub fn adding(&self) -> Vec<i32> {
        self.goal().iter().copied().filter(|id| !self.replicas.contains(id)).collect()
    }

    /// Nodes that give up what they hold.
    pub fn removing(&self) -> Vec<i32> {
        self.holders().into_iter().filter(|id| !self.goal().contains(id)).collect()
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.varint(self.group_id);
        write_ids(out, &self.replicas);
        match &self.target {
            None => out.u8(0),
            Some(target) => {
                out.u8(1);
                write_ids(out, target);
                write_ids(out, &self.dropped);
            }
        }
    }

    /// `with_moves` is false in snapshots of releases that moved nothing.
    pub(crate) fn read(input: &mut Reader<'_>, with_moves: bool) -> Result<PartitionInfo, CodecError> {
        let group_id = input.varint("group id")?;
        let replicas = read_ids(input)?;
        let mut info = PartitionInfo::at_rest(group_id, replicas);
        if with_moves {
            match input.u8("target")? {
                0 => {}
                1 => {
                    info.target = Some(read_ids(input)?);
                    info.dropped = read_ids(input)?;
                }
                _ => return Err(CodecError::OutOfRange("target")),
            }
        }
        Ok(info)
    }
}

pub(crate) fn write_ids(out: &mut Writer, ids: &[i32]) {
    out.varint(ids.len() as u64);
    for id in ids {
        out.signed(i64::from(*id));
    }
}

pub(crate) fn read_ids(input: &mut Reader<'_>) -> Result<Vec<i32>, CodecError> {
    (0..input.count(1, "replicas")?).map(|_| input.i32("replica")).collect()
}

/// A partition whose replicas are to be somewhere else, or have got there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedPartition {
    pub topic: String,
    pub topic_id: Uuid,
    pub partition: i32,
    pub group_id: u64,
    /// Who has to keep the log from now on; everybody else drops it.
    pub holders: Vec<i32>,
    /// Who kept it before.
    pub holders_before: Vec<i32>,
}

impl MetadataImage {
    /// Whether these nodes can hold a partition. Without registered nodes there is only the broker itself, whoever reads.
    pub(crate) fn check_replicas(&self, replicas: &[i32]) -> Result<(), ApplyError> {
        let possible = !replicas.is_empty()
            && replicas.len() <= REPLICAS_MAX
            && replicas.iter().enumerate().all(|(at, id)| !replicas[..at].contains(id))
            && if self.nodes.is_empty() {
                replicas.len() == 1
            } else {
                replicas.iter().all(|id| self.nodes.contains_key(id))
            };
        if possible { Ok(()) } else { Err(ApplyError::BadReplicas(replicas.to_vec())) }
    }

    fn partition_of(&self, topic_id: Uuid, partition: i32) -> Result<(Topic, usize), ApplyError> {
        let topic = self.topic_by_id(&topic_id).ok_or(ApplyError::NoSuchTopic(topic_id))?;
        let at = usize::try_from(partition).ok().filter(|at| *at < topic.partitions.len());
        let at = at.ok_or(ApplyError::NoSuchPartition { topic: topic.name.clone(), partition })?;
        Ok(((**topic).clone(), at))
    }

    /// Gives a partition a target, or none: then it goes back to where it last rested.
    pub(crate) fn set_replicas(
        &mut self,
        topic_id: Uuid,
        partition: i32,
        target: Option<&[i32]>,
    ) -> Result<Applied, ApplyError> {
        let (mut topic, at) = self.partition_of(topic_id, partition)?;
        if let Some(target) = target {
            self.check_replicas(target)?;
        }
        let info = &mut topic.partitions[at];
        let before = info.holders();
        let wanted = match target {
            Some(target) => target.to_vec(),
            None if info.target.is_none() => return Ok(Applied::default()),
            None => info.replicas.clone(),
        };
        info.dropped = before.iter().copied().filter(|id| !wanted.contains(id)).collect();
        info.dropped.retain(|id| !info.replicas.contains(id));
        info.target = Some(wanted);
        Ok(self.moved(topic, at, before))
    }

    /// The group's members are those of its target.
    pub(crate) fn replicas_reached(
        &mut self,
        topic_id: Uuid,
        partition: i32,
        replicas: &[i32],
    ) -> Result<Applied, ApplyError> {
        let (mut topic, at) = self.partition_of(topic_id, partition)?;
        let info = &mut topic.partitions[at];
        let same = |target: &Vec<i32>| {
            target.len() == replicas.len() && target.iter().all(|id| replicas.contains(id))
        };
        // Another target was set meanwhile, or this was told before.
        let Some(target) = info.target.take_if(|target| same(target)) else {
            return Err(ApplyError::NotTheTarget { topic: topic.name, partition });
        };
        let before = PartitionInfo { target: Some(target.clone()), ..info.clone() }.holders();
        info.replicas = target;
        info.dropped = Vec::new();
        Ok(self.moved(topic, at, before))
    }

    fn moved(&mut self, topic: Topic, at: usize, holders_before: Vec<i32>) -> Applied {
        let moved = MovedPartition {
            topic: topic.name.clone(),
            topic_id: topic.id,
            partition: i32::try_from(at).unwrap_or(i32::MAX),
            group_id: topic.partitions[at].group_id,
            holders: topic.partitions[at].holders(),
            holders_before,
        };
        Arc::make_mut(&mut self.topics).insert(topic.name.clone(), Arc::new(topic));
        Applied { moved: vec![moved], ..Applied::default() }
    }
}
