//! Members of consumer groups, as Kafka's clients have them: each finds its coordinator, joins, gets its share, sends heartbeats,
//! commits and fetches offsets, and leaves, dies, stands still or goes on. The one that leads its group gives out the shares.
//!
//! What a member committed are numbers that nobody else commits. Requests that were given up may still arrive.

use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_broker::handlers::groups::{ask_partition, home_of};
use flumen_checker::Event;
use flumen_groups::{GroupRequest, GroupResponse, OffsetFetchGroup};
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::{
    GroupId, HeartbeatRequest, JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest, OffsetCommitRequest,
    SyncGroupRequest, TopicName,
};
use kafka_protocol::protocol::StrBytes;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::broker::{Broker, TOPIC};
use super::groups::{Standing, fetched, name_of_group};
use super::world::{World, name_of};

const HEARTBEAT_MS: u64 = 150;
/// A request that only needs the coordinator is given up after this; one that needs the other members, so much after they were to
/// come.
const PATIENCE_MS: u64 = 1_000;
/// Some requests are on their way for longer than they are waited for.
const LATE_MS_MAX: u64 = 3_000;
const COMMIT_VERSION: i16 = 8;
const LEAVE_VERSION: i16 = 4;
const PROTOCOL_TYPE: &str = "consumer";
const PROTOCOL: &str = "range";
const CLIENT_HOST: &str = "/127.0.0.1";

fn text(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

/// Who asks the coordinator of a group, and follows it.
pub(super) struct Consumer {
    world: Rc<World>,
    group: usize,
    coordinator: Option<Rc<Broker>>,
}

impl Consumer {
    pub fn new(world: &Rc<World>, group: usize) -> Consumer {
        Consumer { world: world.clone(), group, coordinator: None }
    }

    fn name(&self) -> StrBytes {
        text(&name_of_group(self.group))
    }

    fn id(&self) -> GroupId {
        GroupId(self.name())
    }

    /// FindCoordinator, of anybody.
    async fn find(&mut self) -> Option<Rc<Broker>> {
        if self.coordinator.is_none() {
            let some = self.world.brokers[self.world.below(self.world.brokers.len() as u64) as usize].clone();
            let name = name_of_group(self.group);
            let asked = some.ask(move |shard| async move {
                let home = home_of(&shard, &name).await.ok()?;
                Some(shard.node.leaders.get(home)?.0)
            });
            let leader = timeout(Duration::from_millis(PATIENCE_MS), asked).await.ok().flatten().flatten()?;
            self.coordinator = self.world.brokers.get(usize::try_from(leader).ok()?).cloned();
        }
        self.coordinator.clone()
    }

    /// What the coordinator answers; `None` when nothing came back, and nobody knows what became of it.
    async fn ask(
        &mut self,
        request: GroupRequest,
        patience_ms: u64,
    ) -> Option<Result<GroupResponse, ErrorCode>> {
        let Some(broker) = self.find().await else {
            self.world.pause(20, 200).await;
            return None;
        };
        let (boot, name) = (broker.boot(), name_of_group(self.group));
        let (answer, answered) = oneshot::channel();
        let is_late = self.world.faults.get() && self.world.below(30) == 0;
        let travel_ms = if is_late { self.world.between(1, LATE_MS_MAX) } else { 0 };
        let at = self.world.now() + self.world.between(100, 2_000) + travel_ms * 1_000;
        self.world.at(at, move |_| {
            let machine = broker.machine.clone();
            if boot.is_none() || broker.boot() != boot {
                return;
            }
            broker.post(move |shard| {
                let shard = shard.clone();
                tokio::task::spawn_local(async move {
                    let outcome = match home_of(&shard, &name).await {
                        Ok(home) => {
                            ask_partition(&shard, home, "sim".to_owned(), CLIENT_HOST.to_owned(), request)
                                .await
                        }
                        Err(error) => Err(error),
                    };
                    if !machine.is_down() {
                        let _ = answer.send(outcome);
                    }
                });
            });
        });
        let outcome = timeout(Duration::from_millis(patience_ms), answered).await.ok().and_then(Result::ok);
        if outcome.is_none() {
            self.coordinator = None;
        }
        self.world.pause_us(100, 2_000).await;
        outcome
    }

    /// What an error says of the coordinator.
    async fn heed(&mut self, error: ErrorCode) {
        match error {
            ErrorCode::NOT_COORDINATOR | ErrorCode::COORDINATOR_NOT_AVAILABLE => {
                self.world.count("coordinator moved");
                self.coordinator = None;
            }
            ErrorCode::COORDINATOR_LOAD_IN_PROGRESS => self.world.count("coordinator was loading"),
            _ => return,
        }
        self.world.pause(5, 100).await;
    }
}

/// Asks for the offsets of these partitions; false when they were not told.
pub(super) async fn fetch_of(consumer: &mut Consumer, partitions: Vec<i32>) -> bool {
    let (world, asked) = (consumer.world.clone(), consumer.world.number());
    let topics = Some(vec![(TopicName(text(TOPIC)), partitions)]);
    let group = OffsetFetchGroup { group_id: consumer.name(), topics, ..OffsetFetchGroup::default() };
    match consumer.ask(GroupRequest::OffsetFetch { group }, PATIENCE_MS).await {
        Some(Ok(GroupResponse::OffsetFetch(told))) if told.error == ErrorCode::NONE => {
            world.count("offsets fetched");
            told.topics.iter().for_each(|topic| fetched(&world, consumer.group, asked, &topic.partitions));
            true
        }
        Some(Err(error)) => {
            consumer.heed(error).await;
            false
        }
        _ => false,
    }
}

struct Member {
    consumer: Consumer,
    number: u64,
    /// What it is called, when it comes again under the same name.
    instance: Option<StrBytes>,
    version: i16,
    id: StrBytes,
    generation: i32,
    share: Vec<i32>,
}

pub(super) async fn take_part(world: Rc<World>, group: usize, number: u64) {
    let is_static = world.below(4) == 0;
    let version = world.pick(&[3, 5, 9]);
    let mut member = Member {
        consumer: Consumer::new(&world, group),
        number,
        instance: is_static.then(|| text(&format!("instance-{number}"))),
        version: if is_static { version.max(5) } else { version },
        id: StrBytes::default(),
        generation: -1,
        share: Vec::new(),
    };
    while world.is_sound() && !world.members_stop.get() {
        member.stands(None);
        if member.join().await {
            member.live().await;
        } else {
            world.pause(1, 60).await;
        }
    }
}

impl Member {
    fn world(&self) -> Rc<World> {
        self.consumer.world.clone()
    }

    fn stands(&self, generation: Option<i32>) {
        let standing = Standing { generation, heard_ms: self.world().now_ms() };
        self.world().groups_heard.borrow_mut().stands(self.consumer.group, self.number, standing);
    }

    fn forget(&mut self) {
        self.id = StrBytes::default();
        self.generation = -1;
        self.share.clear();
    }

    /// As others know it.
    fn owner(&self) -> String {
        self.instance.as_ref().unwrap_or(&self.id).to_string()
    }

    async fn refused(&mut self, error: ErrorCode) {
        let world = self.world();
        match error {
            ErrorCode::UNKNOWN_MEMBER_ID => {
                world.count("member forgotten");
                self.forget();
            }
            // A request of its own that it had given up took its place.
            ErrorCode::FENCED_INSTANCE_ID => {
                world.count("instance fenced");
                self.forget();
            }
            ErrorCode::ILLEGAL_GENERATION => world.count("old generation refused"),
            ErrorCode::REBALANCE_IN_PROGRESS => world.count("rebalance heard"),
            ErrorCode::NOT_COORDINATOR
            | ErrorCode::COORDINATOR_NOT_AVAILABLE
            | ErrorCode::COORDINATOR_LOAD_IN_PROGRESS => self.consumer.heed(error).await,
            error => {
                let name = name_of_group(self.consumer.group);
                world.fail(format!("{name} told member {}: {error:?}", self.number));
            }
        }
    }

    /// Until it has a share; false when it has to try again.
    async fn join(&mut self) -> bool {
        let world = self.world();
        let plan = world.plan.groups[self.consumer.group].clone();
        let request = JoinGroupRequest::default()
            .with_group_id(self.consumer.id())
            .with_session_timeout_ms(plan.session_timeout_ms)
            .with_rebalance_timeout_ms(plan.rebalance_timeout_ms)
            .with_member_id(self.id.clone())
            .with_group_instance_id(self.instance.clone())
            .with_protocol_type(text(PROTOCOL_TYPE))
            .with_protocols(vec![
                JoinGroupRequestProtocol::default().with_name(text(PROTOCOL)).with_metadata(subscription()),
            ]);
        let request = GroupRequest::Join { request, version: self.version };
        let patience_ms = plan.rebalance_timeout_ms as u64 + plan.initial_delay_ms as u64 + PATIENCE_MS;
        let joined = match self.consumer.ask(request, patience_ms).await {
            Some(Ok(GroupResponse::Join(joined))) => joined,
            Some(Err(error)) => {
                self.consumer.heed(error).await;
                return false;
            }
            _ => return false,
        };
        match ErrorCode(joined.error_code) {
            ErrorCode::NONE => {}
            ErrorCode::MEMBER_ID_REQUIRED => {
                self.id = joined.member_id;
                return false;
            }
            error => {
                self.refused(error).await;
                return false;
            }
        }
        self.id = joined.member_id.clone();
        self.generation = joined.generation_id;
        self.sync(&joined, plan.rebalance_timeout_ms as u64 + PATIENCE_MS).await
    }

    async fn sync(&mut self, joined: &JoinGroupResponse, patience_ms: u64) -> bool {
        let world = self.world();
        let leads = joined.leader == self.id && !joined.skip_assignment;
        let named = (self.version >= 5).then(|| (text(PROTOCOL_TYPE), text(PROTOCOL)));
        let request = SyncGroupRequest::default()
            .with_group_id(self.consumer.id())
            .with_generation_id(self.generation)
            .with_member_id(self.id.clone())
            .with_group_instance_id(self.instance.clone())
            .with_protocol_type(named.as_ref().map(|(kind, _)| kind.clone()))
            .with_protocol_name(named.map(|(_, name)| name))
            .with_assignments(if leads { shares(&world, joined) } else { Vec::new() });
        let request = GroupRequest::Sync { request, version: if self.version >= 5 { 5 } else { 3 } };
        let given = match self.consumer.ask(request, patience_ms).await {
            Some(Ok(GroupResponse::Sync(given))) => given,
            Some(Err(error)) => {
                self.consumer.heed(error).await;
                return false;
            }
            _ => return false,
        };
        if given.error_code != 0 {
            self.refused(ErrorCode(given.error_code)).await;
            return false;
        }
        world.count("share given");
        self.share = share_of(given.assignment);
        let group = self.consumer.group;
        world.groups_heard.borrow_mut().has_share(group, self.generation);
        world.note(Event::Assigned {
            group: name_of_group(group),
            generation: i64::from(self.generation),
            member: self.owner(),
            partitions: self.share.iter().map(|partition| name_of(*partition as u64 + 1)).collect(),
        });
        self.stands(Some(self.generation));
        true
    }

    /// With its share, until it has to join again, or dies.
    async fn live(&mut self) {
        let world = self.world();
        while world.is_sound() && !world.members_stop.get() {
            world.pause(HEARTBEAT_MS / 2, HEARTBEAT_MS).await;
            if world.below(2) == 0 {
                let mut asked = self.share.clone();
                if world.below(4) == 0 {
                    // Also of what others have.
                    asked = world.plan.data_partitions();
                }
                fetch_of(&mut self.consumer, asked).await;
            }
            if world.below(2) == 0 && !self.share.is_empty() {
                self.commit().await;
            }
            if world.faults.get() {
                match world.below(60) {
                    0 => return self.leave().await,
                    1 => {
                        world.count("member died");
                        self.forget();
                        return world.pause(5, 1_500).await;
                    }
                    2 => {
                        world.count("member stood still");
                        world.pause(500, 4_000).await;
                        // It commits before it hears that it is a member no more.
                        self.commit().await;
                    }
                    _ => {}
                }
            }
            if !self.heartbeat().await {
                return;
            }
        }
    }

    /// False: it has to join again.
    async fn heartbeat(&mut self) -> bool {
        let request = HeartbeatRequest::default()
            .with_group_id(self.consumer.id())
            .with_generation_id(self.generation)
            .with_member_id(self.id.clone())
            .with_group_instance_id(self.instance.clone());
        match self.consumer.ask(GroupRequest::Heartbeat { request, version: 4 }, PATIENCE_MS).await {
            Some(Ok(GroupResponse::Heartbeat(heard))) => match ErrorCode(heard.error_code) {
                ErrorCode::NONE => {
                    self.stands(Some(self.generation));
                    true
                }
                error => {
                    if error == ErrorCode::REBALANCE_IN_PROGRESS && self.world().below(2) == 0 {
                        self.commit().await;
                    }
                    self.refused(error).await;
                    false
                }
            },
            Some(Err(error)) => {
                self.consumer.heed(error).await;
                true
            }
            _ => true,
        }
    }

    async fn commit(&mut self) {
        let (world, group) = (self.world(), self.consumer.group);
        let newest = world.groups_heard.borrow().newest_generation(group);
        let mut offsets = Vec::new();
        for partition in &self.share {
            let (offset, began) = (world.number() as i64, world.number());
            world.groups_heard.borrow_mut().begins(group, *partition, offset, began);
            offsets.push((*partition, offset));
        }
        let partitions = offsets.iter().map(|(partition, offset)| {
            OffsetCommitRequestPartition::default()
                .with_partition_index(*partition)
                .with_committed_offset(*offset)
        });
        let topic = OffsetCommitRequestTopic::default()
            .with_name(TopicName(text(TOPIC)))
            .with_partitions(partitions.collect());
        let request = OffsetCommitRequest::default()
            .with_group_id(self.consumer.id())
            .with_generation_id_or_member_epoch(self.generation)
            .with_member_id(self.id.clone())
            .with_group_instance_id(self.instance.clone())
            .with_topics(vec![topic]);
        let request = GroupRequest::OffsetCommit { request, version: COMMIT_VERSION };
        let answer = match self.consumer.ask(request, PATIENCE_MS).await {
            Some(Ok(GroupResponse::OffsetCommit(answer))) => answer,
            Some(Err(error)) => return self.consumer.heed(error).await,
            _ => return,
        };
        for told in answer.topics.iter().flat_map(|topic| &topic.partitions) {
            let offset = offsets.iter().find(|(partition, _)| *partition == told.partition_index);
            match (ErrorCode(told.error_code), offset) {
                (ErrorCode::NONE, Some((partition, offset))) => {
                    world.count("offset committed");
                    let now = world.number();
                    world.groups_heard.borrow_mut().ended(group, *partition, *offset, now);
                    if self.generation < newest {
                        world.fail(format!(
                            "{}: a commit of generation {} was taken when generation {newest} was there",
                            name_of_group(group),
                            self.generation
                        ));
                    }
                }
                (ErrorCode::ILLEGAL_GENERATION, _) => world.count("old generation refused"),
                (ErrorCode::UNKNOWN_MEMBER_ID, _) => world.count("commit of a stranger refused"),
                // What is wrong is said again with the next heartbeat.
                _ => {}
            }
        }
    }

    async fn leave(&mut self) {
        let identity = MemberIdentity::default()
            .with_member_id(self.id.clone())
            .with_group_instance_id(self.instance.clone());
        let request =
            LeaveGroupRequest::default().with_group_id(self.consumer.id()).with_members(vec![identity]);
        self.world().count("member left");
        let _ = self.consumer.ask(GroupRequest::Leave { request, version: LEAVE_VERSION }, PATIENCE_MS).await;
        self.forget();
        self.world().pause(5, 1_500).await;
    }
}

/// Version, topics, user data: what consumers say that they want.
fn subscription() -> Bytes {
    let mut out = BytesMut::new();
    out.put_i16(0);
    out.put_i32(1);
    out.put_i16(TOPIC.len() as i16);
    out.put_slice(TOPIC.as_bytes());
    out.put_i32(-1);
    out.freeze()
}

/// Who gets what. Whoever leads next would decide otherwise.
fn shares(world: &World, joined: &JoinGroupResponse) -> Vec<SyncGroupRequestAssignment> {
    let mut shares: Vec<BytesMut> = joined.members.iter().map(|_| BytesMut::new()).collect();
    let first = world.below(shares.len().max(1) as u64) as usize;
    for partition in world.plan.data_partitions() {
        let at = (first + partition as usize) % shares.len().max(1);
        if let Some(share) = shares.get_mut(at) {
            share.put_i32(partition);
        }
    }
    let to = |(member, share): (
        &kafka_protocol::messages::join_group_response::JoinGroupResponseMember,
        BytesMut,
    )| {
        SyncGroupRequestAssignment::default()
            .with_member_id(member.member_id.clone())
            .with_assignment(share.freeze())
    };
    joined.members.iter().zip(shares).map(to).collect()
}

fn share_of(mut bytes: Bytes) -> Vec<i32> {
    let mut share = Vec::new();
    while bytes.remaining() >= 4 {
        share.push(bytes.get_i32());
    }
    share
}
