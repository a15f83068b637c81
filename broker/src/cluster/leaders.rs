//! Who leads each group, as far as this node knows: its own replicas tell it, and the other nodes tell what they lead.
//!
//! Read for every partition of a Metadata answer and written when a leadership changes, from all shards; so it is a few
//! locks, each over a share of the groups, held for one look-up.
//!
//! Invariants
//! - The epoch of a group never goes back, and old news never wins over new.
//! - One epoch has one leader: once it is known, nothing of the same epoch replaces it but the leader itself, when it
//!   stopped leading.
//! - Who is in sync with a leader only that leader says. Until it has, nobody is.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, RwLock};

use tokio::sync::Notify;

const STRIPES: usize = 16;
/// Groups whose news wait to be told. More than that at once happens at start, and then everything is told anyway.
const UNTOLD_MAX: usize = 1 << 16;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    leader_id: i32,
    epoch: i32,
    /// Replicas that are behind, as the leader says; until it has said so, all others.
    lagging: Vec<i32>,
    /// This node led it until now, and has not heard who does since.
    gave_up: bool,
}

impl Known {
    fn as_led(&self, group_id: u64, leader_id: i32) -> Option<Led> {
        let led = || Led { group_id, epoch: self.epoch, lagging: self.lagging.clone() };
        (self.leader_id == leader_id).then(led)
    }
}

/// A group that somebody leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Led {
    pub group_id: u64,
    pub epoch: i32,
    pub lagging: Vec<i32>,
}

pub struct LeaderTable {
    own_id: i32,
    stripes: [RwLock<HashMap<u64, Known>>; STRIPES],
    untold: Mutex<Untold>,
    /// Rung when this node has begun or ceased to lead something.
    pub news: Notify,
}

#[derive(Default)]
struct Untold {
    groups: BTreeSet<u64>,
    overflowed: bool,
}

/// What there is to tell others.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// These groups, led by this node.
    Of(Vec<Led>),
    /// More than was kept: everything has to be told.
    Everything,
}

impl LeaderTable {
    pub fn new(own_id: i32) -> LeaderTable {
        LeaderTable { own_id, stripes: Default::default(), untold: Mutex::default(), news: Notify::new() }
    }

    fn stripe(&self, group_id: u64) -> &RwLock<HashMap<u64, Known>> {
        &self.stripes[(group_id % STRIPES as u64) as usize]
    }

    /// A replica of this node sees this leader (-1: none) in this epoch. `others` are all replicas but that leader.
    pub fn note(&self, group_id: u64, leader_id: i32, epoch: i32, others: Vec<i32>) {
        let changed = {
            let mut known = self.stripe(group_id).write().expect("no panic under this lock");
            let before = known.get(&group_id);
            let gave_up =
                leader_id == -1 && before.is_some_and(|b| b.leader_id == self.own_id && b.epoch <= epoch);
            let newer = match before {
                None => true,
                Some(b) if epoch != b.epoch => epoch > b.epoch,
                Some(b) => b.leader_id == -1 && leader_id != -1,
            };
            // An election that is under way is no reason to forget who led until now, unless that was this node.
            let epoch = if leader_id == -1 && !gave_up { before.map_or(epoch, |b| b.epoch) } else { epoch };
            let leader_id =
                if leader_id == -1 && !gave_up { before.map_or(-1, |b| b.leader_id) } else { leader_id };
            let lagging = match before {
                // Nobody says anything new.
                Some(before) if leader_id == -1 => before.lagging.clone(),
                _ => others,
            };
            let now = Known { leader_id, epoch, lagging, gave_up };
            let same = before.is_some_and(|b| (b.leader_id, b.epoch) == (leader_id, epoch));
            if (newer || gave_up) && !same {
                known.insert(group_id, now);
                leader_id == self.own_id
            } else {
                false
            }
        };
        if changed {
            self.tell(group_id);
        }
    }

    /// Another node says that it leads this group in this epoch.
    pub fn hear(&self, group_id: u64, leader_id: i32, epoch: i32, lagging: Vec<i32>) {
        if leader_id >= 0 && leader_id != self.own_id {
            self.note(group_id, leader_id, epoch, lagging.clone());
            self.set_lagging(group_id, leader_id, epoch, lagging);
        }
    }

    /// Whoever led it says that it does not any more: clients are not to be sent there until another leads.
    pub fn hear_gone(&self, group_id: u64, leader_id: i32) {
        let mut known = self.stripe(group_id).write().expect("no panic under this lock");
        if let Some(k) = known.get_mut(&group_id)
            && k.leader_id == leader_id
            && leader_id != self.own_id
        {
            k.leader_id = -1;
        }
    }

    /// What the leader sees of its replicas; true when that is new.
    fn set_lagging(&self, group_id: u64, leader_id: i32, epoch: i32, lagging: Vec<i32>) -> bool {
        let mut known = self.stripe(group_id).write().expect("no panic under this lock");
        match known.get_mut(&group_id) {
            Some(k) if (k.leader_id, k.epoch) == (leader_id, epoch) && k.lagging != lagging => {
                k.lagging = lagging;
                true
            }
            _ => false,
        }
    }

    /// These replicas of a group that this node leads in this epoch are behind.
    pub fn note_lagging(&self, group_id: u64, epoch: i32, lagging: Vec<i32>) {
        if self.set_lagging(group_id, self.own_id, epoch, lagging) {
            self.tell(group_id);
        }
    }

    fn tell(&self, group_id: u64) {
        self.untold.lock().expect("no panic under this lock").add(group_id);
        self.news.notify_one();
    }

    /// Replicas that are not in sync; none where nothing is known of the group.
    pub fn lagging(&self, group_id: u64) -> Option<Vec<i32>> {
        let known = self.stripe(group_id).read().expect("no panic under this lock");
        known.get(&group_id).map(|k| k.lagging.clone())
    }

    /// Leader (-1 when there is none) and epoch.
    pub fn get(&self, group_id: u64) -> Option<(i32, i32)> {
        let known = self.stripe(group_id).read().expect("no panic under this lock");
        known.get(&group_id).map(|k| (k.leader_id, k.epoch))
    }

    /// This node ceased to lead it and has not heard who does since.
    pub fn is_given_up(&self, group_id: u64) -> bool {
        let known = self.stripe(group_id).read().expect("no panic under this lock");
        known.get(&group_id).is_some_and(|k| k.gave_up)
    }

    pub fn is_led_here(&self, group_id: u64) -> bool {
        self.get(group_id).is_some_and(|(leader_id, _)| leader_id == self.own_id)
    }

    pub fn forget(&self, group_id: u64) {
        self.stripe(group_id).write().expect("no panic under this lock").remove(&group_id);
    }

    /// Everything that this node leads, by group.
    pub fn led_here(&self) -> Vec<Led> {
        self.led_by(self.own_id)
    }

    /// Everything that a node leads as far as is known here, by group.
    pub fn led_by(&self, leader_id: i32) -> Vec<Led> {
        let mut led = Vec::new();
        for stripe in &self.stripes {
            let known = stripe.read().expect("no panic under this lock");
            led.extend(known.iter().filter_map(|(group, k)| k.as_led(*group, leader_id)));
        }
        led.sort_unstable_by_key(|l| l.group_id);
        led
    }

    /// What has changed since the last call.
    pub fn take_news(&self) -> News {
        let untold = std::mem::take(&mut *self.untold.lock().expect("no panic under this lock"));
        if untold.overflowed {
            return News::Everything;
        }
        let led = untold.groups.into_iter().filter_map(|group| {
            let known = self.stripe(group).read().expect("no panic under this lock");
            known.get(&group)?.as_led(group, self.own_id)
        });
        News::Of(led.collect())
    }
}

impl Untold {
    fn add(&mut self, group_id: u64) {
        if self.groups.len() >= UNTOLD_MAX {
            self.overflowed = true;
            self.groups.clear();
        }
        if !self.overflowed {
            self.groups.insert(group_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_news_never_wins() {
        let table = LeaderTable::new(1);
        assert_eq!(table.get(5), None);
        table.note(5, -1, 1, vec![]);
        assert_eq!(table.get(5), Some((-1, 1)));
        table.hear(5, 2, 3, vec![]);
        table.hear(5, 3, 2, vec![]);
        assert_eq!(table.get(5), Some((2, 3)));
        // The same epoch cannot have another leader, and a candidate does not know better.
        table.hear(5, 3, 3, vec![]);
        table.note(5, -1, 3, vec![]);
        table.note(5, -1, 4, vec![]);
        assert_eq!(table.get(5), Some((2, 3)));
        table.note(5, 1, 4, vec![]);
        assert_eq!(table.get(5), Some((1, 4)));
        // One that says that it does not lead any more is believed until it leads again.
        table.hear(6, 3, 4, vec![]);
        table.hear_gone(6, 2);
        assert_eq!(table.get(6), Some((3, 4)));
        table.hear_gone(6, 3);
        assert_eq!((table.get(6), table.is_given_up(6)), (Some((-1, 4)), false));
        table.note(6, -1, 5, vec![]);
        table.hear(6, 2, 5, vec![]);
        assert_eq!(table.get(6), Some((2, 5)));
        table.hear_gone(5, 1);
        // Nobody else knows better than this node that it leads, nor that it ceased to.
        table.hear(5, 1, 9, vec![]);
        assert_eq!(table.get(5), Some((1, 4)));
        assert!(!table.is_given_up(5));
        table.note(5, -1, 4, vec![]);
        assert_eq!(table.get(5), Some((-1, 4)));
        table.note(5, -1, 6, vec![]);
        assert!(table.is_given_up(5));
        table.hear(5, 2, 5, vec![]);
        assert_eq!(table.get(5), Some((2, 5)));
        assert!(!table.is_given_up(5));
    }

    fn led(group_id: u64, epoch: i32) -> Led {
        Led { group_id, epoch, lagging: vec![] }
    }

    #[test]
    fn what_this_node_leads_is_told_once() {
        let table = LeaderTable::new(1);
        table.note(7, 1, 1, vec![]);
        table.note(8, 2, 1, vec![]);
        table.note(9, 1, 2, vec![]);
        table.note(9, 1, 3, vec![]);
        assert_eq!(table.take_news(), News::Of(vec![led(7, 1), led(9, 3)]));
        assert_eq!(table.take_news(), News::Of(vec![]));
        table.note(7, 1, 1, vec![]);
        assert_eq!(table.take_news(), News::Of(vec![]), "nothing new");
        assert_eq!(table.led_here(), [led(7, 1), led(9, 3)]);
        assert_eq!(table.led_by(2), [led(8, 1)]);
        // Who is behind is told, too.
        table.note_lagging(9, 3, vec![2]);
        table.note_lagging(9, 2, vec![4]);
        assert_eq!(table.take_news(), News::Of(vec![Led { lagging: vec![2], ..led(9, 3) }]));
        table.note_lagging(9, 3, vec![2]);
        assert_eq!(table.take_news(), News::Of(vec![]));
        assert_eq!(table.lagging(9).unwrap(), [2]);
        table.hear(9, 2, 4, vec![1]);
        assert_eq!(table.lagging(9).unwrap(), [1]);
        table.hear(9, 2, 3, vec![5]);
        assert_eq!(table.lagging(9).unwrap(), [1], "old news");
        // Until the next leader has said who is not, everybody is.
        assert_eq!(table.lagging(10), None);
        table.note(9, 1, 5, vec![2, 3]);
        assert_eq!(table.take_news(), News::Of(vec![Led { lagging: vec![2, 3], ..led(9, 5) }]));
        table.note_lagging(9, 5, vec![]);
        table.note(9, 3, 6, vec![1, 2]);
        assert_eq!(table.lagging(9).unwrap(), [1, 2]);
        table.note(9, -1, 7, vec![1, 2, 3]);
        table.hear(9, 3, 6, vec![2]);
        table.note(9, 3, 6, vec![1, 2]);
        assert_eq!(table.lagging(9).unwrap(), [2]);
        // One that gave up knows nothing better than what it saw last.
        table.note(9, 1, 8, vec![2, 3]);
        table.note_lagging(9, 8, vec![3]);
        table.note(9, -1, 8, vec![1, 2, 3]);
        assert_eq!(table.lagging(9).unwrap(), [3]);
        table.take_news();
        for group in 0..=UNTOLD_MAX as u64 {
            table.note(100 + group, 1, 1, vec![]);
        }
        assert_eq!(table.take_news(), News::Everything);
        assert_eq!(table.take_news(), News::Of(vec![]));
    }
}
