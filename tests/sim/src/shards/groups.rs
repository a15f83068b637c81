//! What members of consumer groups were told, and what must be true of it.
//!
//! - A fetched offset is what was committed last, as far as anybody was told: no commit that ended before the question, and began
//!   after the one that is told had ended, may be missing. What has been read once counts as committed.
//! - A commit of an older generation is refused from the moment on in which a member was given its share of a newer one.
//! - One partition has one owner in one generation (`flumen_checker`).
//! - After the last fault every member that lives has a share, all of a group in the same generation, and in the end every replica of
//!   an offsets partition holds for every key what the others do.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_groups::OffsetFetchPartition;
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch::batches;

use super::members::{Consumer, fetch_of};
use super::world::World;

/// For a fetch in the end, when nothing fails any more.
const FINAL_TRIES: u32 = 50;
const DECODED_BYTES_MAX: usize = 1 << 20;
/// A member whose last heartbeat was answered longer ago does not live in its group.
const SILENT_MS_MAX: u64 = 3_000;

/// Of one commit of one partition's offset, in the world's numbers.
#[derive(Clone, Copy)]
struct Commit {
    began: u64,
    /// None as long as nobody was told: it may have happened, or happen yet.
    ended: Option<u64>,
}

/// Commits by group, partition and offset, which no two of them share.
#[derive(Default)]
pub(super) struct GroupsHeard {
    commits: BTreeMap<(usize, i32), BTreeMap<i64, Commit>>,
    /// Newest generation in which a member was given its share, by group.
    generations: BTreeMap<usize, i32>,
    /// By group and number of the member.
    members: BTreeMap<(usize, u64), Standing>,
}

/// How a member stands, as it believes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Standing {
    /// None unless it has a share.
    pub generation: Option<i32>,
    pub heard_ms: u64,
}

impl GroupsHeard {
    pub fn begins(&mut self, group: usize, partition: i32, offset: i64, began: u64) {
        let commit = Commit { began, ended: None };
        self.commits.entry((group, partition)).or_default().insert(offset, commit);
    }

    pub fn ended(&mut self, group: usize, partition: i32, offset: i64, ended: u64) {
        let commit = self.commits.get_mut(&(group, partition)).and_then(|commits| commits.get_mut(&offset));
        if let Some(commit) = commit {
            commit.ended.get_or_insert(ended);
        }
    }

    pub fn newest_generation(&self, group: usize) -> i32 {
        self.generations.get(&group).copied().unwrap_or(0)
    }

    pub fn has_share(&mut self, group: usize, generation: i32) {
        let newest = self.generations.entry(group).or_insert(0);
        *newest = generation.max(*newest);
    }

    pub fn stands(&mut self, group: usize, member: u64, standing: Standing) {
        self.members.insert((group, member), standing);
    }

    /// What is wrong with an offset that was asked for and told, -1 for none.
    fn judge(&mut self, group: usize, partition: i32, told: i64, asked: u64, now: u64) -> Option<String> {
        let commits = self.commits.entry((group, partition)).or_default();
        let of_told = match commits.get(&told) {
            Some(commit) => Some(*commit),
            None if told == -1 => None,
            None => return Some(format!("is said to be at {told}, which nobody committed")),
        };
        // Before which all commits are allowed to be missing.
        let ended = match of_told {
            Some(commit) => commit.ended.unwrap_or(u64::MAX),
            None => 0,
        };
        let is_missing = |commit: &Commit| commit.began > ended && commit.ended.is_some_and(|e| e < asked);
        let missing = commits.iter().find(|(_, commit)| is_missing(commit)).map(|(offset, _)| *offset);
        if let Some(offset) = missing {
            return Some(format!("is said to be at {told}, and {offset} was committed after that"));
        }
        if let Some(commit) = commits.get_mut(&told) {
            commit.ended.get_or_insert(now);
        }
        None
    }
}

/// Offsets that were told, to a question of this number.
pub(super) fn fetched(world: &World, group: usize, asked: u64, told: &[OffsetFetchPartition]) {
    for one in told.iter().filter(|one| one.error == ErrorCode::NONE) {
        let now = world.number();
        let wrong = world.groups_heard.borrow_mut().judge(group, one.partition, one.offset, asked, now);
        if let Some(what) = wrong {
            world.fail(format!("{}: partition {} {what}", name_of_group(group), one.partition));
        }
    }
}

pub(super) fn name_of_group(group: usize) -> String {
    format!("g-{group}")
}

/// Every member stands in the newest generation of its group, and nothing that was committed is missing.
pub(super) async fn judge(world: &Rc<World>) {
    let heard = world.groups_heard.borrow().members.clone();
    for (group, plan) in world.plan.groups.iter().enumerate() {
        let of_group: Vec<Standing> =
            heard.iter().filter(|((of, _), _)| *of == group).map(|(_, standing)| *standing).collect();
        let first = of_group.first().and_then(|standing| standing.generation);
        let lives = |standing: &Standing| standing.heard_ms + SILENT_MS_MAX > world.now_ms();
        let well = |standing: &Standing| standing.generation == first && first.is_some() && lives(standing);
        if of_group.len() as u64 != plan.members || !of_group.iter().all(well) {
            world.fail(format!("{} does not come to rest: {of_group:?}", name_of_group(group)));
        }
    }
    world.members_stop.set(true);
    for group in 0..world.plan.groups.len() {
        if !world.is_sound() {
            return;
        }
        if !fetch_finally(world, group).await {
            world.fail(format!("the offsets of {} cannot be fetched", name_of_group(group)));
        }
    }
}

async fn fetch_finally(world: &Rc<World>, group: usize) -> bool {
    let mut consumer = Consumer::new(world, group);
    for _ in 0..FINAL_TRIES {
        if fetch_of(&mut consumer, world.plan.data_partitions()).await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    false
}

/// For each key what was said of it last below an offset; keys of which nothing is kept are left out.
pub(super) fn state_of(content: &[Bytes], up_to: i64) -> Result<BTreeMap<Bytes, Bytes>, String> {
    let (mut state, mut scratch) = (BTreeMap::new(), Vec::new());
    for bytes in content {
        for batch in batches(bytes) {
            let (header, batch) = batch.map_err(|e| e.to_string())?;
            if header.is_control() || header.base_offset >= up_to {
                continue;
            }
            let records =
                decode_records(batch, &mut scratch, DECODED_BYTES_MAX).map_err(|e| e.to_string())?;
            for record in records {
                let record = record.map_err(|e| e.to_string())?;
                let key = Bytes::copy_from_slice(record.key.unwrap_or_default());
                match record.value {
                    Some(value) => drop(state.insert(key, Bytes::copy_from_slice(value))),
                    None => drop(state.remove(&key)),
                }
            }
        }
    }
    Ok(state)
}
