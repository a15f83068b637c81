//! Random sequences of requests, time, append results and restarts: nothing panics, nobody is answered twice or
//! never, and the groups keep their invariants.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use flumen_groups::*;
use flumen_protocol::error_code::ErrorCode;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Join {
        group: u8,
        who: u8,
        kind: u8,
        version: i16,
    },
    Sync {
        group: u8,
        who: u8,
        wrong: bool,
    },
    Beat {
        group: u8,
        who: u8,
    },
    Leave {
        group: u8,
        who: u8,
        instance: bool,
    },
    Commit {
        group: u8,
        who: u8,
        topic: u8,
    },
    TxnCommit {
        group: u8,
        who: u8,
        topic: u8,
        producer: i64,
    },
    EndTxn {
        producer: i64,
        committed: bool,
    },
    Delete {
        group: u8,
    },
    DeleteOffsets {
        group: u8,
        topic: u8,
    },
    RemoveTopic {
        topic: u8,
    },
    Advance {
        ms: u32,
    },
    Appended {
        count: u8,
        fails: bool,
    },
    /// An append that is refused at once, before older ones are through.
    NewestRefused,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let group = || 0..2u8;
    let who = || 0..8u8;
    let step = prop_oneof![
        12 => (group(), who(), 0..4u8, prop_oneof![Just(3i16), Just(5), Just(9)])
            .prop_map(|(group, who, kind, version)| Step::Join { group, who, kind, version }),
        8 => (group(), who(), prop::bool::weighted(0.1)).prop_map(|(group, who, wrong)| Step::Sync { group, who, wrong }),
        6 => (group(), who()).prop_map(|(group, who)| Step::Beat { group, who }),
        2 => (group(), who(), any::<bool>()).prop_map(|(group, who, instance)| Step::Leave { group, who, instance }),
        5 => (group(), who(), 0..2u8).prop_map(|(group, who, topic)| Step::Commit { group, who, topic }),
        3 => (group(), who(), 0..2u8, 0..2i64).prop_map(|(group, who, topic, producer)| Step::TxnCommit { group, who, topic, producer }),
        2 => (0..2i64, any::<bool>()).prop_map(|(producer, committed)| Step::EndTxn { producer, committed }),
        1 => group().prop_map(|group| Step::Delete { group }),
        1 => (group(), 0..2u8).prop_map(|(group, topic)| Step::DeleteOffsets { group, topic }),
        1 => (0..2u8).prop_map(|topic| Step::RemoveTopic { topic }),
        6 => prop_oneof![0..100u32, 0..4_000u32, 0..30_000u32].prop_map(|ms| Step::Advance { ms }),
        1 => Just(Step::Advance { ms: 700_000_000 }),
        8 => (1..4u8, prop::bool::weighted(0.15)).prop_map(|(count, fails)| Step::Appended { count, fails }),
        1 => Just(Step::NewestRefused),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..160)
}

/// What the clients know: of each slot in each group its member id, generation and whether it leads.
struct World {
    rig: Rig,
    ids: BTreeMap<(u8, u8), (String, i32, Vec<String>)>,
    /// Tokens of joins, and of all requests not yet answered.
    joins: BTreeMap<u64, (u8, u8, i16)>,
    open: BTreeSet<u64>,
    /// Leaders by group and generation, as the responses name them.
    leaders: BTreeMap<(u8, i32), String>,
    expected: Offsets,
    /// Offsets of open transactions.
    held: BTreeMap<i64, Offsets>,
    replayed: usize,
}

/// By group, topic and partition: place in the log and offset.
type Offsets = BTreeMap<(String, String, i32), (usize, i64)>;

fn group_name(group: u8) -> String {
    format!("group-{group}")
}

fn topic_name(topic: u8) -> String {
    ["topic", "other"][usize::from(topic)].to_owned()
}

impl World {
    fn instance(who: u8) -> Option<String> {
        (who < 3).then(|| format!("i{who}"))
    }

    fn known(&self, group: u8, who: u8) -> (String, i32, Vec<String>) {
        self.ids.get(&(group, who)).cloned().unwrap_or((String::new(), 0, Vec::new()))
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Join { group, who, kind, version } => {
                let protocols: &[&str] = match kind {
                    0 | 1 => &["range", "sticky"],
                    2 => &["sticky", "range"],
                    _ => &["range"],
                };
                let (id, ..) = self.known(group, who);
                // Static members forget their id now and then, as a restarted process does.
                let id = if kind == 1 && who < 3 { String::new() } else { id };
                let mut request = join(&group_name(group), &id, protocols);
                if version >= 5 {
                    request.group_instance_id = Self::instance(who).map(|id| s(&id));
                }
                let token = self.rig.join(request, version);
                self.joins.insert(token, (group, who, version));
                self.open.insert(token);
            }
            Step::Sync { group, who, wrong } => {
                let (id, generation, members) = self.known(group, who);
                let members: Vec<&str> = members.iter().map(String::as_str).collect();
                let generation = generation + i32::from(wrong);
                let token = self.rig.sync(sync(&group_name(group), &id, generation, &members));
                self.open.insert(token);
            }
            Step::Beat { group, who } => {
                let (id, generation, _) = self.known(group, who);
                let error = self.rig.beat(&group_name(group), &id, generation);
                if error == ErrorCode::UNKNOWN_MEMBER_ID {
                    self.ids.remove(&(group, who));
                }
            }
            Step::Leave { group, who, instance } => {
                let (id, ..) = self.known(group, who);
                let instance = Self::instance(who).filter(|_| instance);
                let member = kafka_protocol::messages::leave_group_request::MemberIdentity::default()
                    .with_member_id(s(&id))
                    .with_group_instance_id(instance.map(|id| s(&id)));
                let request = kafka_protocol::messages::LeaveGroupRequest::default()
                    .with_group_id(s(&group_name(group)).into())
                    .with_members(vec![member]);
                let token = self.rig.send(GroupRequest::Leave { request, version: 5 });
                self.open.insert(token);
                self.ids.remove(&(group, who));
            }
            Step::Commit { group, who, topic } => {
                let (id, generation, _) = self.known(group, who);
                let generation = if id.is_empty() { -1 } else { generation };
                let offset = self.rig.token as i64;
                let request = commit(&group_name(group), &id, generation, &topic_name(topic), offset);
                let token = self.rig.commit(request, 8);
                self.open.insert(token);
            }
            Step::TxnCommit { group, who, topic, producer } => {
                let (id, generation, _) = self.known(group, who);
                let generation = if id.is_empty() { -1 } else { generation };
                let offset = self.rig.token as i64;
                let request = commit(&group_name(group), &id, generation, &topic_name(topic), offset);
                let token = self.rig.txn_commit(producer, request);
                self.open.insert(token);
            }
            Step::EndTxn { producer, committed } => self.rig.end_transaction(producer, committed),
            Step::Delete { group } => {
                let token = self.rig.send(GroupRequest::Delete { group_id: s(&group_name(group)) });
                self.open.insert(token);
            }
            Step::DeleteOffsets { group, topic } => {
                let topic =
                    kafka_protocol::messages::offset_delete_request::OffsetDeleteRequestTopic::default()
                        .with_name(name(&topic_name(topic)))
                        .with_partitions(vec![Default::default()]);
                let request = kafka_protocol::messages::OffsetDeleteRequest::default()
                    .with_group_id(s(&group_name(group)).into())
                    .with_topics(vec![topic]);
                let token = self.rig.send(GroupRequest::OffsetDelete { request });
                self.open.insert(token);
            }
            Step::RemoveTopic { topic } => {
                let outputs = self.rig.coordinator.remove_topic(&topic_name(topic));
                self.rig.absorb(outputs);
            }
            Step::Advance { ms } => self.rig.advance(i64::from(ms)),
            Step::Appended { count, fails } => {
                let result = if fails { Err(ErrorCode::NOT_ENOUGH_REPLICAS) } else { Ok(()) };
                self.rig.finish(usize::from(count), result);
            }
            Step::NewestRefused => {
                if let Some((append_id, _)) = self.rig.appends.pop() {
                    let refused = Err(ErrorCode::COORDINATOR_NOT_AVAILABLE);
                    let outputs = self.rig.coordinator.append_done(append_id, refused, self.rig.now_ms);
                    self.rig.absorb(outputs);
                }
            }
            Step::Restart => {
                // Whoever waited hears of it from the connection.
                self.rig.restart();
                let waiting = std::mem::take(&mut self.open);
                self.joins.retain(|token, _| !waiting.contains(token) || self.rig.answered.contains(token));
                self.open = waiting.into_iter().filter(|token| self.rig.answered.contains(token)).collect();
                self.leaders.clear();
            }
        }
        self.read_replies();
        self.check();
    }

    fn read_replies(&mut self) {
        for (token, response) in std::mem::take(&mut self.rig.replies) {
            self.open.remove(&token);
            let GroupResponse::Join(response) = response else { continue };
            let Some((group, who, version)) = self.joins.remove(&token) else { continue };
            let member_id = response.member_id.to_string();
            match ErrorCode(response.error_code) {
                ErrorCode::NONE => {
                    let leader = response.leader.to_string();
                    if version >= 9 || !response.members.is_empty() {
                        // Static replacement renames a leader inside a generation; the members know by their role.
                        let known = self.leaders.insert((group, response.generation_id), leader.clone());
                        if let Some(known) = known
                            && known != leader
                        {
                            assert!(
                                known.starts_with('i'),
                                "two leaders in one generation: {known} {leader}"
                            );
                        }
                    }
                    assert!(response.generation_id >= 1);
                    if !response.members.is_empty() {
                        assert_eq!(leader, member_id, "only the leader sees the members");
                    }
                    let members =
                        response.members.iter().map(|member| member.member_id.to_string()).collect();
                    self.ids.insert((group, who), (member_id, response.generation_id, members));
                }
                ErrorCode::MEMBER_ID_REQUIRED => {
                    assert!(version >= 4 && !member_id.is_empty());
                    self.ids.insert((group, who), (member_id, 0, Vec::new()));
                }
                ErrorCode::UNKNOWN_MEMBER_ID | ErrorCode::FENCED_INSTANCE_ID => {
                    self.ids.remove(&(group, who));
                }
                _ => {}
            }
        }
    }

    /// What the log says, worked out again from its records.
    fn replay(&mut self) {
        for (place, logged) in self.rig.log.iter().enumerate().skip(self.replayed) {
            let (producer_id, record) = match logged {
                Logged::Record(record) => (None, record),
                Logged::Transactional(producer_id, record) => (Some(*producer_id), record),
                Logged::Marker(producer_id, committed) => {
                    for (key, held) in self.held.remove(producer_id).unwrap_or_default() {
                        if *committed && self.expected.get(&key).is_none_or(|known| known.0 < held.0) {
                            self.expected.insert(key, held);
                        }
                    }
                    continue;
                }
            };
            let Ok(record::RecordKey::Offset { group, topic, partition }) =
                record::RecordKey::decode(&record.key)
            else {
                continue;
            };
            let key = (group, topic, partition);
            match &record.value {
                Some(value) => {
                    let offset = record::OffsetCommitValue::decode(value).unwrap().offset;
                    let offsets = match producer_id {
                        Some(producer_id) => self.held.entry(producer_id).or_default(),
                        None => &mut self.expected,
                    };
                    offsets.insert(key, (place, offset));
                }
                None => {
                    self.expected.remove(&key);
                    for offsets in self.held.values_mut() {
                        offsets.remove(&key);
                    }
                }
            }
        }
        self.replayed = self.rig.log.len();
    }

    fn check(&mut self) {
        self.replay();
        let seen: BTreeMap<(String, String, i32), i64> = self
            .rig
            .coordinator
            .lag_view()
            .map(|(group, topic, partition, offset)| {
                ((group.to_owned(), topic.to_owned(), partition), offset)
            })
            .collect();
        let expected = self.expected.iter().map(|(key, (_, offset))| (key.clone(), *offset)).collect();
        assert_eq!(seen, expected, "what is visible is what the log holds");
        self.rig.coordinator.assert_consistent();
        // A group that was forgotten begins again with its first generation.
        let rig = &self.rig;
        self.leaders.retain(|(group, _), _| rig.state(&group_name(*group)).is_some());
    }

    /// After enough time and all appends, nobody may be left waiting.
    fn settle(&mut self) {
        for round in 0..50 {
            self.rig.finish(usize::MAX, Ok(()));
            if round == 0 {
                (0..2).for_each(|producer| self.rig.end_transaction(producer, true));
            }
            self.rig.advance(REBALANCE_MS + 1_000);
            self.read_replies();
            if self.rig.appends.is_empty() && self.open.is_empty() {
                break;
            }
        }
        self.check();
        assert!(self.open.is_empty(), "never answered: {:?}", self.open);
        let stuck = self.rig.coordinator.group_states().find(|group| group.members > 0);
        assert_eq!(stuck, None, "silent members leave");
    }
}

fn run(steps: Vec<Step>, delay_ms: i64, members_max: usize) {
    let mut rig = Rig::new(GroupsConfig {
        initial_rebalance_delay_ms: delay_ms,
        group_members_max: members_max,
        ..config()
    });
    rig.auto = false;
    let mut world = World {
        rig,
        ids: BTreeMap::new(),
        joins: BTreeMap::new(),
        open: BTreeSet::new(),
        leaders: BTreeMap::new(),
        expected: BTreeMap::new(),
        held: BTreeMap::new(),
        replayed: 0,
    };
    for step in steps {
        world.run(step);
    }
    world.settle();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history(steps in steps(), delay_ms in prop_oneof![Just(0i64), Just(3_000)], members_max in prop_oneof![Just(3usize), Just(200)]) {
        run(steps, delay_ms, members_max);
    }
}
