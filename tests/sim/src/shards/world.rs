//! A run: brokers start, clients work, faults happen for a while, then none, then the judgement.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use flumen_broker::cluster::requests::Answered;
use flumen_checker::{Event, History};
use flumen_crash_test::{paused, take_panic, watch_panics};
use flumen_metadata::PartitionInfo;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::broker::Broker;
use super::groups::{self, GroupsHeard};
use super::nemesis;
use super::plan::Plan;
use super::questions::{self, Heard};
use super::{consumer, judge, losses, members, producer};
use crate::network::{Network, Time};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::world::{Report, Settings};

/// After the last fault every partition takes records within this.
const RECOVERY_MS: u64 = 10_000;
/// For what is on its way when clients stop.
const LAST_ANSWERS_MS: u64 = 10_000;

type Action = Box<dyn FnOnce(&Rc<World>)>;

pub(super) struct World {
    pub plan: Plan,
    rng: RefCell<Rng>,
    started: Instant,
    pub network: RefCell<Network>,
    pub last_arrival: RefCell<BTreeMap<(u64, u64), Time>>,
    pub brokers: Vec<Rc<Broker>>,
    /// What the metadata says of each group.
    pub partitions: RefCell<BTreeMap<u64, PartitionInfo>>,
    /// Groups of which something went that their durability does not promise to keep.
    pub voided: RefCell<BTreeSet<u64>>,
    /// Brokers and groups whose log was lost there in part, of which there is to be another.
    pub lost: RefCell<BTreeSet<(i32, u64)>>,
    /// Requests between brokers that wait for an answer.
    pub asked: RefCell<BTreeMap<u64, oneshot::Sender<Answered>>>,
    pub oracle: RefCell<Oracle>,
    pub history: RefCell<History>,
    /// What clients know, by which answers of leaders are judged.
    pub heard: RefCell<Heard>,
    pub groups_heard: RefCell<GroupsHeard>,
    pub faults: Cell<bool>,
    pub clients_stop: Cell<bool>,
    /// Members of consumer groups go on for longer.
    pub members_stop: Cell<bool>,
    pub acknowledged: Cell<u64>,
    actions: RefCell<BTreeMap<(Time, u64), Action>>,
    actions_changed: Notify,
    numbers: Cell<u64>,
    trace: Cell<u64>,
    pub simulated_ms: Cell<u64>,
}

pub fn run(settings: Settings) -> Report {
    watch_panics();
    let _ = take_panic();
    let kept: Rc<RefCell<Option<Rc<World>>>> = Rc::default();
    let seen = kept.clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        paused(async move {
            let world = World::new(settings.seed);
            *kept.borrow_mut() = Some(world.clone());
            world.live().await;
        });
    }));
    let panic = take_panic();
    let world = seen.borrow_mut().take();
    let mut failure = match (outcome, panic) {
        (_, Some(what)) => Some(format!("panic: {what}")),
        (Err(_), None) => Some("panic".to_owned()),
        (Ok(()), None) => None,
    };
    let Some(world) = world else {
        return Report { failure, ..Report::nothing(settings.seed) };
    };
    // Before what followed from it.
    failure = world.oracle.borrow().failure().cloned().or(failure);
    let failure = failure.or_else(|| judge::anomalies(&world));
    let failure = failure.map(|what| format!("{what} [{}]", world.plan));
    for broker in &world.brokers {
        world.mix(&[broker.machine.trace()]);
    }
    let oracle = world.oracle.borrow();
    let report = Report {
        seed: settings.seed,
        failure,
        trace: world.trace.get(),
        counts: nemesis::counts(&world),
        elections: oracle.elections,
        commits: oracle.commits,
        acknowledged: world.acknowledged.get(),
        simulated_ms: world.simulated_ms.get(),
        history: world.history.borrow().clone(),
    };
    drop(oracle);
    report
}

impl World {
    fn new(seed: u64) -> Rc<World> {
        let mut rng = Rng::new(seed ^ 0x7368_6172_6473);
        let plan = Plan::of(seed, &mut rng);
        let started = Instant::now();
        let brokers = (0..plan.brokers as i32)
            .map(|id| Rc::new(Broker::new(id, seed, plan.sector_bytes, started)))
            .collect();
        let partitions = (1..)
            .zip(&plan.partitions)
            .map(|(group, partition)| (group, PartitionInfo::at_rest(group, partition.replicas.clone())))
            .collect();
        Rc::new(World {
            plan,
            rng: RefCell::new(rng),
            started,
            network: RefCell::default(),
            last_arrival: RefCell::default(),
            brokers,
            partitions: RefCell::new(partitions),
            voided: RefCell::default(),
            lost: RefCell::default(),
            asked: RefCell::default(),
            oracle: RefCell::default(),
            history: RefCell::default(),
            heard: RefCell::default(),
            groups_heard: RefCell::default(),
            faults: Cell::new(true),
            clients_stop: Cell::new(false),
            members_stop: Cell::new(false),
            acknowledged: Cell::new(0),
            actions: RefCell::default(),
            actions_changed: Notify::new(),
            numbers: Cell::new(1),
            trace: Cell::new(seed),
            simulated_ms: Cell::new(0),
        })
    }

    async fn live(self: &Rc<World>) {
        tokio::task::spawn_local(self.clone().act());
        for broker in &self.brokers {
            tokio::task::spawn_local(broker.clone().supervise(self.clone()));
        }
        for group in self.groups().into_iter().filter(|group| !self.plan.keeps_groups(*group)) {
            tokio::task::spawn_local(producer::idempotent(self.clone(), group));
            tokio::task::spawn_local(producer::plain(self.clone(), group));
            tokio::task::spawn_local(questions::ask(self.clone(), group));
            for consumer in 0..2 {
                tokio::task::spawn_local(consumer::consume(self.clone(), group, consumer));
            }
        }
        for (group, plan) in self.plan.groups.iter().enumerate() {
            for number in 0..plan.members {
                tokio::task::spawn_local(members::take_part(self.clone(), group, number));
            }
        }
        tokio::task::spawn_local(nemesis::move_replicas(self.clone()));
        tokio::task::spawn_local(nemesis::disturb(self.clone()));
        tokio::task::spawn_local(losses::lose_logs(self.clone()));
        self.pass(self.plan.faults_ms).await;
        nemesis::heal(self);
        self.note(Event::Healed { bound_ms: RECOVERY_MS });
        self.pass(RECOVERY_MS).await;
        self.clients_stop.set(true);
        self.pass(LAST_ANSWERS_MS).await;
        groups::judge(self).await;
        judge::judge(self).await;
        self.note(Event::Over);
        self.simulated_ms.set(self.now_ms());
    }

    /// Time goes by, unless something is wrong already.
    async fn pass(&self, ms: u64) {
        let end = self.now_ms() + ms;
        while self.now_ms() < end && self.is_sound() {
            tokio::time::sleep(Duration::from_millis((end - self.now_ms()).min(500))).await;
        }
    }

    /// A client waits.
    pub async fn pause(&self, low_ms: u64, high_ms: u64) {
        self.pause_us(low_ms * 1_000, high_ms * 1_000).await;
    }

    pub async fn pause_us(&self, low: Time, high: Time) {
        tokio::time::sleep(Duration::from_micros(self.between(low, high))).await;
    }

    pub fn is_sound(&self) -> bool {
        self.oracle.borrow().failure().is_none()
    }

    /// Does what is due, in the order of its time.
    async fn act(self: Rc<World>) {
        loop {
            let next = self.actions.borrow().first_key_value().map(|((at, _), _)| *at);
            match next {
                Some(at) if at <= self.now() => {
                    let action = self.actions.borrow_mut().pop_first();
                    if let Some(((at, number), action)) = action {
                        self.mix(&[at, number]);
                        action(&self);
                    }
                }
                Some(at) => {
                    let due = self.started + Duration::from_micros(at);
                    tokio::select! {
                        biased;
                        () = self.actions_changed.notified() => {}
                        () = tokio::time::sleep_until(due) => {}
                    }
                }
                None => self.actions_changed.notified().await,
            }
        }
    }

    pub fn at(&self, time: Time, action: impl FnOnce(&Rc<World>) + 'static) {
        self.actions.borrow_mut().insert((time, self.number()), Box::new(action));
        self.actions_changed.notify_one();
    }

    /// Microseconds since the run began.
    pub fn now(&self) -> Time {
        self.started.elapsed().as_micros() as Time
    }

    pub fn now_ms(&self) -> u64 {
        self.now() / 1000
    }

    /// Never given out before.
    pub fn number(&self) -> u64 {
        self.numbers.replace(self.numbers.get() + 1)
    }

    pub fn mix(&self, numbers: &[u64]) {
        let mut trace = self.trace.get();
        for n in numbers {
            trace = (trace ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        }
        self.trace.set(trace);
    }

    pub fn note(&self, event: Event) {
        self.mix(&[self.now()]);
        self.history.borrow_mut().push(self.now_ms(), event);
    }

    pub fn fail(&self, what: String) {
        self.oracle.borrow_mut().fail(format!("{what} (at {} ms)", self.now_ms()));
    }

    pub fn count(&self, fault: &'static str) {
        tracing::trace!(at_ms = self.now_ms(), fault);
        self.network.borrow_mut().count(fault);
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().below(bound)
    }

    pub fn between(&self, low: u64, high: u64) -> u64 {
        self.rng.borrow_mut().between(low, high)
    }

    pub fn pick<T: Copy>(&self, from: &[T]) -> T {
        self.rng.borrow_mut().pick(from)
    }

    pub fn with_rng<T>(&self, work: impl FnOnce(&mut Rng, &mut Network) -> T) -> T {
        work(&mut self.rng.borrow_mut(), &mut self.network.borrow_mut())
    }

    pub fn groups(&self) -> Vec<u64> {
        self.partitions.borrow().keys().copied().collect()
    }

    pub fn is_voided(&self, group: u64) -> bool {
        self.voided.borrow().contains(&group)
    }
}

/// As the history names it.
pub(super) fn name_of(group: u64) -> String {
    format!("t-{group}")
}
