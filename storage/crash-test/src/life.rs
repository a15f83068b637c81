//! One seed: a data directory from its first start, through crashes and recoveries, to the last check.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;
use std::sync::Once;
use std::time::Duration;

use flumen_io::simulated::{Counters, Crash, Fault, Machine, Random, Rates};
use flumen_storage::{
    COMMIT_LANES, DataDir, GroupHealth, GroupId, OpenError, RecoveredGroup, ShardStore, StoreConfig,
};

use crate::check::{self, Loss, Mismatch};
use crate::model::Log;
use crate::settings::{Plan, Theme};
use crate::workload::{self, Shared, Slot, World};

const DIR: &str = "/data";

/// Actions of one client in one round; a round ends before that with most crashes.
const ACTIONS: u64 = 400;

/// A recovery that fails this often for faults of the disk gets a sound one: what is tested then is that it works at
/// last.
const TRIES_MAX: u64 = 12;

/// If nothing at all happens for this long on a clock that only goes on when nothing can, the store waits for something
/// that will not come. Longer than every stall.
const HANG: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
pub struct Failure {
    pub seed: u64,
    /// Crashes survived before.
    pub crashes: u64,
    pub reason: String,
    pub log: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub crashes: u64,
    pub crashes_in_recovery: u64,
    pub clean_stops: u64,
    pub poisonings: u64,
    pub refusals: u64,
    pub staged: u64,
    pub compactions: u64,
    pub begun: u64,
    /// Of those, at nothing.
    pub over: u64,
    /// Of those, with segments of another replica.
    pub received: u64,
    pub counters: Counters,
    pub trace: u64,
}

impl Report {
    pub fn add(&mut self, other: &Report) {
        self.crashes += other.crashes;
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.clean_stops += other.clean_stops;
        self.poisonings += other.poisonings;
        self.refusals += other.refusals;
        self.staged += other.staged;
        self.compactions += other.compactions;
        self.begun += other.begun;
        self.over += other.over;
        self.received += other.received;
        self.counters.add(&other.counters);
    }

    pub fn crash_points(&self) -> u64 {
        self.crashes + self.crashes_in_recovery
    }
}

pub struct Life {
    plan: Plan,
    machine: Machine,
    random: Random,
    slots: BTreeMap<GroupId, Slot>,
    next_group: GroupId,
    /// Deleted, and it must stay so.
    gone: BTreeSet<GroupId>,
    /// Damaged and reported; nothing is asked of them any more.
    refused: BTreeSet<GroupId>,
    /// Created, and lost before it was acknowledged; the metadata still knows it.
    lost: Vec<(GroupId, Slot)>,
    /// The last recovery was not the first attempt.
    recovered_twice: bool,
    report: Report,
}

/// How a round ended.
enum Ended {
    Crashed,
    /// The store took no more writes; the process exits.
    Poisoned,
    Stopped,
}

type Check<T> = Result<T, String>;

thread_local! {
    /// The last panic of this thread, whoever caught it.
    static PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// Keeps what every panic says, also one that ends a background task of the store and nothing else.
pub fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANIC.set(Some(info.to_string()));
            before(info);
        }));
    });
}

/// What the last panic of this thread said, once.
pub fn take_panic() -> Option<String> {
    PANIC.take()
}

impl Life {
    /// Lives through one seed.
    pub fn run(seed: u64, crashes: u64, log: bool) -> Result<Report, Box<Failure>> {
        watch_panics();
        let plan = Plan::of(seed, crashes, log);
        let machine = Machine::new(seed, plan.disk.clone());
        let mut life = Life {
            plan,
            machine: machine.clone(),
            random: Random::new(seed ^ 0x6c69_6665),
            slots: BTreeMap::new(),
            next_group: 1,
            gone: BTreeSet::new(),
            refused: BTreeSet::new(),
            lost: Vec::new(),
            recovered_twice: false,
            report: Report::default(),
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| life.rounds()));
        // The store's background tasks end alone.
        let outcome = match take_panic() {
            Some(what) if matches!(outcome, Ok(Ok(()))) => {
                Ok(Err(format!("a task of the store ended: {what}")))
            }
            _ => outcome,
        };
        let failure =
            |reason: String, crashes: u64| Box::new(Failure { seed, crashes, reason, log: machine.log() });
        match outcome {
            Ok(Ok(())) => {
                life.report.counters = machine.counters();
                life.report.trace = machine.trace();
                Ok(life.report)
            }
            Ok(Err(reason)) => Err(failure(reason, life.report.crashes)),
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                Err(failure(format!("panic: {}", text.unwrap_or_default()), life.report.crashes))
            }
        }
    }

    fn rounds(&mut self) -> Check<()> {
        let mut crash = Crash::Kill;
        let mut power_lost = false;
        while self.report.crashes < self.plan.crashes {
            let (dir, found) = match self.recover(crash, &mut power_lost)? {
                Some(recovered) => recovered,
                None => return Ok(()),
            };
            let shards = 1 + usize::try_from(self.random.below(2)).unwrap_or(0);
            let ended = self.round(&dir, found, shards, power_lost)?;
            crash = match ended {
                Ended::Crashed => self.machine.restart(),
                Ended::Poisoned | Ended::Stopped => {
                    let crash = self.either();
                    self.machine.crash_now(crash);
                    self.machine.restart()
                }
            };
            power_lost = false;
            self.report.crashes += 1;
        }
        let found = self.recover(crash, &mut power_lost)?;
        match found {
            Some((dir, found)) => self.round(&dir, found, 1, power_lost).map(drop),
            None => Ok(()),
        }
    }

    fn either(&mut self) -> Crash {
        if self.random.below(3) == 0 { Crash::Kill } else { Crash::PowerLoss }
    }

    /// Opens and recovers, through crashes and failures of the disk, until it works. `power_lost`: since the last
    /// check the machine lost its power at least once. `None`: the damage done was reported, and nobody can go on.
    fn recover(
        &mut self,
        crash: Crash,
        power_lost: &mut bool,
    ) -> Check<Option<(DataDir, Vec<RecoveredGroup>)>> {
        *power_lost |= crash == Crash::PowerLoss;
        for attempt in 0.. {
            let sound = attempt >= TRIES_MAX;
            self.machine.set_rates(if sound { quiet(self.plan.theme) } else { self.plan.theme.rates() });
            if sound {
                self.machine.free_space();
            } else if self.random.below(3) == 0 {
                let reach = if self.random.below(2) == 0 { 40 } else { 400 };
                let steps = 1 + self.random.below(reach);
                let crash = self.either();
                self.machine.crash_after(steps, crash);
            }
            let files = self.machine.file_system();
            let opened = DataDir::open_on(files, Path::new(DIR)).and_then(|dir| {
                let cache = usize::try_from(self.random.below(200_000)).unwrap_or(0);
                let found = dir.recover(cache)?;
                Ok((dir, found))
            });
            self.machine.cancel_crash();
            self.recovered_twice = attempt > 0;
            match opened {
                Ok(opened) if !self.machine.is_down() => return Ok(Some(opened)),
                Ok(_) => self.report.crashes_in_recovery += 1,
                Err(_) if self.machine.is_down() => self.report.crashes_in_recovery += 1,
                Err(error) if self.plan.theme == Theme::Damage && reports_damage(&error) => {
                    self.report.refusals += 1;
                    return Ok(None);
                }
                Err(OpenError::Io { .. } | OpenError::NoSpace { .. }) if !sound => {}
                Err(error) => return Err(format!("recovery: {error}")),
            }
            // A process that could not start exits, and somebody starts it again.
            if self.machine.restart() == Crash::PowerLoss {
                *power_lost = true;
            }
        }
        unreachable!("the attempts are not counted out")
    }

    /// Checks what was found, then lets clients work until something ends it.
    fn round(
        &mut self,
        dir: &DataDir,
        found: Vec<RecoveredGroup>,
        shards: usize,
        power_lost: bool,
    ) -> Check<Ended> {
        let matched = self.account(found, power_lost)?;
        let world: Shared = Rc::new(RefCell::new(World {
            machine: self.machine.clone(),
            theme: self.plan.theme,
            random: Random::new(self.random.draw()),
            stores: Vec::new(),
            slots: std::mem::take(&mut self.slots),
            next_group: self.next_group,
            partitions: self.plan.partitions,
            replicated: self.plan.replicated,
            receives: self.plan.receives,
            violation: None,
            poisoned: false,
            process_ends: Rc::default(),
            stage_count: self.report.staged,
            compactions: 0,
            begun: 0,
            over: 0,
            received: 0,
        }));
        let seen = Rc::clone(&world);
        let result = paused(async {
            self.machine.set_rates(quiet(self.plan.theme));
            self.machine.free_space();
            let opened = self.open(dir, &world, shards, matched).await;
            opened?;
            self.work(&world).await
        });
        let mut world = seen.borrow_mut();
        self.slots = std::mem::take(&mut world.slots);
        self.next_group = world.next_group;
        self.report.staged = world.stage_count;
        self.report.compactions += world.compactions;
        self.report.begun += world.begun;
        self.report.over += world.over;
        self.report.received += world.received;
        for slot in self.slots.values_mut() {
            slot.log = None;
        }
        world.stores.clear();
        match world.violation.take() {
            Some(violation) => Err(violation),
            None => result,
        }
    }

    /// Which state each partition may be in, from what recovery says of it.
    fn account(
        &mut self,
        found: Vec<RecoveredGroup>,
        power_lost: bool,
    ) -> Check<Vec<(GroupId, RecoveredGroup, Vec<Option<Log>>)>> {
        let damage = self.plan.theme == Theme::Damage;
        let sync_failed = self.machine.counters().of(Fault::SyncFails) > 0;
        let mut matched = Vec::new();
        let mut by_id: BTreeMap<GroupId, RecoveredGroup> = BTreeMap::new();
        for group in found {
            if let GroupHealth::Damaged { reason } = &group.health {
                // The kernel lost what it had promised to keep: there is no other copy, so it is damage, and said to be.
                let not_durable =
                    self.slots.get(&group.group_id).is_some_and(|slot| !slot.model.is_durable());
                let os_ring = ["-os is damaged", "-os.damaged-"].iter().any(|text| reason.contains(text));
                let lost_by_kernel = sync_failed && (not_durable || os_ring);
                if !damage && !lost_by_kernel && !self.refused.contains(&group.group_id) {
                    return Err(format!("group {} is called damaged: {reason}", group.group_id));
                }
                self.report.refusals += 1;
                for (id, slot) in &mut self.slots {
                    slot.refused |= *id == group.group_id || slot.dir_name == group.dir_name;
                }
                continue;
            }
            let id = group.group_id;
            if self.refused.contains(&id) {
                continue;
            }
            if by_id.insert(id, group).is_some() {
                return Err(format!("group {id} was found twice"));
            }
        }
        let mut empty = Vec::new();
        for (id, slot) in &mut self.slots {
            if slot.refused {
                by_id.remove(id);
                empty.push(*id);
                continue;
            }
            let group = by_id.remove(id);
            // A failed sync drops pages: to what the kernel alone had, that is as good as a loss of power.
            let lossy = power_lost || (sync_failed && !slot.model.is_durable());
            let loss = if lossy { Loss::PowerLoss } else { Loss::Kill };
            let mut states = check::matching(*id, &slot.model, loss, group.as_ref());
            if damage && states.is_err() {
                states = check::matching(*id, &slot.model, Loss::DamagedEnd, group.as_ref());
            }
            match (group, states?) {
                (None, _) => {
                    slot.model.rebase(None);
                    empty.push(*id);
                }
                (Some(group), states) => matched.push((*id, group, states)),
            }
        }
        if let Some((id, group)) = by_id.into_iter().next() {
            let back = if self.gone.contains(&id) { "deleted before" } else { "never created" };
            return Err(format!("group {id} in {} was found, {back}", group.dir_name));
        }
        for id in empty {
            let Some(slot) = self.slots.remove(&id) else { continue };
            if slot.refused {
                self.refused.insert(id);
            } else if slot.deleting {
                self.gone.insert(id);
            } else {
                self.lost.push((id, slot));
            }
        }
        Ok(matched)
    }

    /// Opens the stores, attaches what was found and reads all of it.
    async fn open(
        &mut self,
        dir: &DataDir,
        world: &Shared,
        shards: usize,
        matched: Vec<(GroupId, RecoveredGroup, Vec<Option<Log>>)>,
    ) -> Check<()> {
        for shard in 0..shards {
            let config = StoreConfig { shard, ..self.plan.store.clone() };
            let store = ShardStore::open(dir, config).await.map_err(|error| format!("opening: {error}"))?;
            world.borrow_mut().stores.push(store);
        }
        for (id, group, states) in matched {
            let at = usize::try_from(id % shards as u64).unwrap_or(0);
            let (store, config) = {
                let world = world.borrow();
                (world.stores[at].clone(), world.slots[&id].config.clone())
            };
            let log = store.attach(group, config);
            let max_bytes = 1 + usize::try_from(self.random.below(60_000)).unwrap_or(0);
            let bound = world.borrow().slots[&id].bound(id);
            let state = check::content(&self.machine, &log, bound, states, max_bytes).await;
            let mut world = world.borrow_mut();
            let Some(slot) = world.slots.get_mut(&id) else { continue };
            match state {
                Ok(state) => {
                    slot.commit = slot.commit.min(state.last_index()).max(state.hard.commit);
                    slot.sequences = state
                        .producers()
                        .into_iter()
                        .map(|(producer, (_, sequence, _))| (producer, sequence + 1))
                        .collect();
                    slot.settled = match slot.model.floor() {
                        _ if self.recovered_twice => state.last_index(),
                        Some(floor) => floor.common(&state),
                        None => 0,
                    };
                    slot.compacting = 0;
                    slot.compacted_to = slot.compacted_to.min(state.log_end());
                    slot.model.rebase(Some(state));
                    slot.store = at;
                    slot.elected = false;
                    slot.log = Some(log);
                }
                Err(Mismatch::Noticeable(_)) if self.plan.theme == Theme::Damage => {
                    self.report.refusals += 1;
                    slot.refused = true;
                }
                Err(Mismatch::Noticeable(reason) | Mismatch::Wrong(reason)) => {
                    return Err(format!("group {id}: {reason}"));
                }
            }
        }
        let mut world = world.borrow_mut();
        for (id, slot) in std::mem::take(&mut self.lost) {
            workload::create_as(&mut world, id, slot.dir_name, slot.config);
        }
        while world.slots.values().filter(|slot| slot.log.is_some()).count() < self.plan.partitions as usize {
            let before = world.next_group;
            workload::create_any(&mut world);
            if world.next_group == before {
                break;
            }
        }
        Ok(())
    }

    async fn work(&mut self, world: &Shared) -> Check<Ended> {
        let stop = self.random.below(6) == 0;
        self.machine.set_rates(self.plan.theme.rates());
        let reach = 30 << self.random.below(8);
        let (after, crash) = (1 + self.random.below(reach), self.either());
        if !stop {
            self.machine.crash_after(after, crash);
        }
        let work = async {
            let mut tasks = tokio::task::JoinSet::new();
            let stores = world.borrow().stores.clone();
            for at in 0..stores.len() {
                for lane in COMMIT_LANES {
                    tokio::task::spawn_local(workload::listener(Rc::clone(world), at, lane));
                }
            }
            let actions = if stop { self.random.below(ACTIONS) } else { ACTIONS };
            for _ in 0..self.plan.clients {
                tasks.spawn_local(workload::client(Rc::clone(world), actions));
            }
            while let Some(done) = tasks.join_next().await {
                if let Err(error) = done
                    && error.is_panic()
                {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
            if world.borrow().poisoned || world.borrow().violation.is_some() {
                return Ended::Poisoned;
            }
            if !stop {
                return Ended::Crashed;
            }
            // A clean stop, which may be cut short as well.
            if self.random.below(2) == 0 {
                self.machine.crash_after(1 + self.random.below(150), crash);
            }
            for store in &stores {
                if store.shutdown().await.is_err() {
                    return Ended::Poisoned;
                }
            }
            self.machine.cancel_crash();
            Ended::Stopped
        };
        let process_ends = Rc::clone(&world.borrow().process_ends);
        let ended = tokio::select! {
            biased;
            () = self.machine.down() => Ended::Crashed,
            () = process_ends.notified() => Ended::Poisoned,
            ended = work => ended,
            () = tokio::time::sleep(HANG) => return Err("nothing happens any more".to_owned()),
        };
        match ended {
            _ if self.machine.is_down() => Ok(Ended::Crashed),
            Ended::Crashed => {
                // The clients came to their end before the crash did.
                self.machine.crash_now(crash);
                Ok(Ended::Crashed)
            }
            Ended::Poisoned => {
                self.report.poisonings += 1;
                Ok(Ended::Poisoned)
            }
            Ended::Stopped => {
                self.report.clean_stops += 1;
                for slot in world.borrow_mut().slots.values_mut().filter(|slot| slot.log.is_some()) {
                    slot.model.stopped_cleanly();
                }
                Ok(Ended::Stopped)
            }
        }
    }
}

/// The rates of a crash, without any fault while the machine runs.
fn quiet(theme: Theme) -> Rates {
    let rates = theme.rates();
    Rates {
        torn: rates.torn,
        zero: rates.zero,
        garbage: rates.garbage,
        ruins: rates.ruins,
        evicted: rates.evicted,
        ..Rates::default()
    }
}

fn reports_damage(error: &OpenError) -> bool {
    matches!(error, OpenError::Config(_) | OpenError::Format { .. })
}

/// One thread, and a clock that goes on only when nobody has anything to do.
pub fn paused<F: Future<Output = T>, T>(work: F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without a driver needs nothing from the system");
    tokio::task::LocalSet::new().block_on(&runtime, work)
}
