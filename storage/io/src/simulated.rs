//! A disk in memory that fails as real ones do: a seed decides everything, and the same seed gives the same run.
//!
//! It stands behind the same doors as the real one (`FileSystem`, `File`, `Disk`). What it promises is what POSIX
//! promises and no more: content is durable after a sync of the file or with O_DSYNC when the write returns, names after
//! a sync of their directory. `Machine` is the test's side: when to crash, how, what to break, and what has happened.
//!
//! A crash freezes the disk: from then on every plain call is an error without effect and every future waits for ever,
//! so whatever still runs cannot change anything. `Machine::restart` decides what the crash left; the next process opens
//! everything anew, what the former one still holds stays dead.
//!
//! Used by one thread at a time. Not simulated: permissions, links, moving between directories.

mod content;
mod faults;
mod handle;
mod operations;
mod random;
mod tree;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use self::content::{Content, Fate, PAGE_BYTES, Page};
pub use self::faults::{Counters, Fault, Rates};
pub(crate) use self::handle::Handle;
pub use self::random::Random;
use self::tree::{NodeId, Tree, errno};
use crate::{Disk, FileSystem};

/// Pages kept to fill garbage sectors with: enough that blocks of former runs are among them.
const STALE_PAGES: usize = 64;

/// A window without space lasts up to this many operations: long enough that the waiting of the store is seen, short
/// enough that a run gets on.
const FULL_STEPS_MAX: u64 = 300;

/// Operations remembered as text when asked for, to be read after a failure.
const LOG_LINES_MAX: usize = 50_000;

/// A date in 2023, from which a simulated clock goes on by one millisecond per operation.
const EPOCH_MS: i64 = 1_700_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The process ends; the kernel keeps what it was given.
    Kill,
    /// The machine ends; what was not synced is anybody's guess.
    PowerLoss,
}

#[derive(Debug, Clone)]
pub struct Settings {
    /// 512 or 4096: the unit that is written as one.
    pub sector_bytes: usize,
    pub capacity_bytes: u64,
    pub rates: Rates,
    /// A stalled sync takes this long, in simulated time.
    pub stall_ms: u64,
    /// Keeps the last operations as text.
    pub log: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sector_bytes: 4096,
            capacity_bytes: 1 << 30,
            rates: Rates::default(),
            stall_ms: 30_000,
            log: false,
        }
    }
}

/// Damage done to bytes that had been durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub fault: Fault,
    pub path: PathBuf,
    /// Where in the file.
    pub at: u64,
}

/// How long an operation takes: some turns of the scheduler, or some simulated milliseconds.
#[derive(Debug, Clone, Copy)]
enum Latency {
    Turns(u64),
    Ms(u64),
}

/// A write that has been submitted and has not ended.
struct Flight {
    node: NodeId,
    at: u64,
    bytes: Vec<u8>,
    direct: bool,
    dsync: bool,
}

struct State {
    tree: Tree,
    settings: Settings,
    random: Random,
    counters: Counters,
    steps: u64,
    crash_at: Option<(u64, Crash)>,
    down: Option<Crash>,
    generation: u64,
    boot_id: [u8; 16],
    flights: BTreeMap<u64, Flight>,
    next_flight: u64,
    locks: BTreeMap<NodeId, u64>,
    used_pages: u64,
    /// Without space until this operation, and whether even writes to places that a file already has are refused.
    full_until: u64,
    full_for_all: bool,
    damage: Vec<Damage>,
    stale: VecDeque<Page>,
    trace: u64,
    log: VecDeque<String>,
}

struct Shared {
    state: Mutex<State>,
    down: Notify,
}

/// The process's side: what `FileSystem`, `File` and `Disk` hold. Belongs to one process of the machine; after a crash
/// it is dead.
#[derive(Clone)]
pub(crate) struct Simulated {
    shared: Arc<Shared>,
    generation: u64,
}

impl std::fmt::Debug for Simulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulated(process {})", self.generation)
    }
}

/// What every call of a dead process gets.
fn is_off() -> io::Error {
    io::Error::other("the simulated machine is off")
}

/// A simulated machine with one disk.
#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(step {})", self.lock().steps)
    }
}

impl Machine {
    pub fn new(seed: u64, settings: Settings) -> Self {
        assert!(PAGE_BYTES.is_multiple_of(settings.sector_bytes), "sectors divide a page");
        let mut random = Random::new(seed);
        let boot_id = id(&mut random);
        let state = State {
            tree: Tree::new(),
            settings,
            random,
            counters: Counters::default(),
            steps: 0,
            crash_at: None,
            down: None,
            generation: 0,
            boot_id,
            flights: BTreeMap::new(),
            next_flight: 0,
            locks: BTreeMap::new(),
            used_pages: 1,
            full_until: 0,
            full_for_all: false,
            damage: Vec::new(),
            stale: VecDeque::new(),
            trace: 0xcbf2_9ce4_8422_2325,
            log: VecDeque::new(),
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), down: Notify::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    fn process(&self) -> Simulated {
        Simulated { shared: Arc::clone(&self.shared), generation: self.lock().generation }
    }

    /// The file system as the present process sees it.
    pub fn file_system(&self) -> FileSystem {
        FileSystem::simulated(self.process())
    }

    /// The driver for the present process; needs a tokio runtime with time.
    pub fn disk(&self) -> Disk {
        Disk::simulated(self.process())
    }

    /// The machine crashes within the operation that comes after `steps` others.
    pub fn crash_after(&self, steps: u64, crash: Crash) {
        let mut state = self.lock();
        state.crash_at = Some((state.steps + steps, crash));
    }

    pub fn crash_now(&self, crash: Crash) {
        self.lock().go_down(crash);
        self.shared.down.notify_waiters();
    }

    /// No crash but the ones that are asked for from now on.
    pub fn cancel_crash(&self) {
        self.lock().crash_at = None;
    }

    pub fn is_down(&self) -> bool {
        self.lock().down.is_some()
    }

    /// Waits until the machine is down.
    pub async fn down(&self) {
        loop {
            let down = self.shared.down.notified();
            if self.is_down() {
                return;
            }
            down.await;
        }
    }

    /// Starts the machine (or just the process) again. A process that still ran is killed. Says what happened.
    pub fn restart(&self) -> Crash {
        let mut state = self.lock();
        let crash = state.down.unwrap_or(Crash::Kill);
        if state.down.is_none() {
            state.go_down(Crash::Kill);
        }
        state.come_up(crash);
        crash
    }

    /// What can go wrong from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.lock().settings.rates = rates;
    }

    /// Ends a window without space.
    pub fn free_space(&self) {
        self.lock().full_until = 0;
    }

    /// Begins a window without space that only `free_space` ends.
    pub fn fill_up(&self) {
        let mut state = self.lock();
        state.counters.count(Fault::NoSpace);
        state.full_until = u64::MAX;
    }

    /// Changes one bit somewhere on the disk.
    pub fn flip_a_bit(&self) {
        self.lock().flip_a_bit();
    }

    pub fn steps(&self) -> u64 {
        self.lock().steps
    }

    pub fn now_ms(&self) -> i64 {
        self.lock().now_ms()
    }

    pub fn counters(&self) -> Counters {
        self.lock().counters.clone()
    }

    pub fn damage(&self) -> Vec<Damage> {
        self.lock().damage.clone()
    }

    /// A digest of every operation and its outcome so far: equal for equal runs.
    pub fn trace(&self) -> u64 {
        self.lock().trace
    }

    /// The last operations, if `Settings::log` asks for them.
    pub fn log(&self) -> Vec<String> {
        self.lock().log.iter().cloned().collect()
    }

    /// Puts a line of the test's own into digest and log.
    pub fn note(&self, line: &str) {
        let mut state = self.lock();
        state.digest(line.as_bytes());
        state.log_line(|| format!("-- {line}"));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held is the test's failure already.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn id(random: &mut Random) -> [u8; 16] {
    let (high, low) = (random.draw(), random.draw());
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

impl State {
    fn now_ms(&self) -> i64 {
        EPOCH_MS + i64::try_from(self.steps).unwrap_or(0)
    }

    fn digest(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.trace = (self.trace ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn log_line(&mut self, line: impl FnOnce() -> String) {
        if self.settings.log {
            if self.log.len() == LOG_LINES_MAX {
                self.log.pop_front();
            }
            let line = format!("{:6} {}", self.steps, line());
            self.log.push_back(line);
        }
    }

    fn go_down(&mut self, crash: Crash) {
        if self.down.is_none() {
            self.down = Some(crash);
            self.crash_at = None;
            self.digest(&[crash as u8]);
            self.log_line(|| format!("{crash:?}"));
        }
    }

    fn with_fate<T>(
        &mut self,
        node: Option<NodeId>,
        new_per_mille: u64,
        with: impl FnOnce(&mut Content, &mut Fate<'_>) -> T,
    ) -> io::Result<T> {
        let stale: Vec<Page> = self.stale.iter().cloned().collect();
        let mut fate = Fate {
            random: &mut self.random,
            rates: &self.settings.rates,
            counters: &mut self.counters,
            sector_bytes: self.settings.sector_bytes,
            new_per_mille,
            stale: &stale,
        };
        let node = node.ok_or(errno(libc::ENOENT))?;
        Ok(with(self.tree.file(node)?, &mut fate))
    }

    fn come_up(&mut self, crash: Crash) {
        self.counters.count(match crash {
            Crash::Kill => Fault::Kill,
            Crash::PowerLoss => Fault::PowerLoss,
        });
        let new_per_mille = self.newness();
        for flight in std::mem::take(&mut self.flights).into_values() {
            self.counters.count(Fault::MidWrite);
            // At a loss of power its sectors share the fate of all others that are not synced.
            let _ = match crash {
                Crash::PowerLoss => {
                    self.tree.file(flight.node).map(|file| file.write(flight.at, &flight.bytes, false))
                }
                Crash::Kill => self.with_fate(Some(flight.node), new_per_mille, |file, fate| {
                    let sound = Rates::default();
                    // The kernel lives: what it did not write is whole, old or new.
                    let mut fate = Fate {
                        rates: &sound,
                        random: fate.random,
                        counters: fate.counters,
                        sector_bytes: fate.sector_bytes,
                        new_per_mille: fate.new_per_mille,
                        stale: fate.stale,
                    };
                    file.write_partly(flight.at, &flight.bytes, flight.direct && flight.dsync, &mut fate);
                }),
            };
        }
        match crash {
            Crash::Kill => {
                let (rate, random) = (self.settings.rates.evicted, &mut self.random);
                let mut evicted = 0;
                self.tree.each_file(|file| evicted += file.evict(random, rate));
                (0..evicted).for_each(|_| self.counters.count(Fault::Evicted));
                self.tree.forget_unreachable();
            }
            Crash::PowerLoss => {
                self.tree.lose_power(&mut self.random, &mut self.counters);
                for node in self.tree.files() {
                    let _ = self.with_fate(Some(node), new_per_mille, |file, fate| file.lose_power(fate));
                }
                self.boot_id = id(&mut self.random);
            }
        }
        self.locks.clear();
        self.used_pages = self.tree.pages();
        self.full_until = 0;
        self.generation += 1;
        self.down = None;
    }

    /// Some crashes keep nearly everything that was not synced, some nearly nothing, most a mixture.
    fn newness(&mut self) -> u64 {
        match self.random.below(4) {
            0 => 20,
            1 => 980,
            _ => self.random.below(1001),
        }
    }

    fn flip_a_bit(&mut self) {
        let files = self.tree.files();
        let Some(node) = self.random.pick(&files).copied() else { return };
        let (at, bit) = (self.random.draw(), self.random.below(8));
        let within = self.random.below(PAGE_BYTES as u64) as usize;
        let Ok(file) = self.tree.file(node) else { return };
        let Some(page) = file.nth_page(at) else { return };
        file.damage(page, |bytes| bytes[within] ^= 1 << bit);
        self.note_damage(Fault::BitFlip, node, page * PAGE_BYTES as u64 + within as u64);
    }

    fn note_damage(&mut self, fault: Fault, node: NodeId, at: u64) {
        self.counters.count(fault);
        let path = self.tree.path(node);
        self.log_line(|| format!("{fault:?} in {} at {at}", path.display()));
        self.damage.push(Damage { fault, path, at });
    }
}
