//! What one operation does to the simulated disk, and what may happen to it instead.

use std::io;
use std::path::Path;

use super::content::{Content, PAGE_BYTES, SyncPoint, pages};
use super::faults::Fault;
use super::handle::Handle;
use super::tree::{Dir, Node, NodeId, errno};
use super::{FULL_STEPS_MAX, Flight, Latency, STALE_PAGES, Simulated, State, is_off};
use crate::file_system::{DirEntry, Metadata};
use crate::{BLOCK_BYTES, Mode};

/// A stray write carries at most this much astray; longer ones are split by every disk anyway.
const STRAY_BYTES_MAX: usize = 64 << 10;

impl State {
    /// Every operation begins here. `Ok(true)`: the machine goes down in the middle of this one.
    fn enter(&mut self, generation: u64, what: &str, node: NodeId, at: u64, len: u64) -> io::Result<bool> {
        if self.down.is_some() || self.generation != generation {
            return Err(is_off());
        }
        self.steps += 1;
        self.digest(what.as_bytes());
        for number in [node, at, len] {
            self.digest(&number.to_le_bytes());
        }
        if self.settings.log && node != NodeId::MAX {
            let path = self.tree.path(node);
            self.log_line(|| format!("{what} {} at {at}, {len}", path.display()));
        }
        let rates = self.settings.rates;
        if self.random.chance(rates.bit_flips) {
            self.flip_a_bit();
        }
        if self.steps >= self.full_until && self.random.chance(rates.no_space) {
            self.counters.count(Fault::NoSpace);
            self.full_until = self.steps + 1 + self.random.below(FULL_STEPS_MAX);
            self.full_for_all = self.random.below(8) == 0;
            self.log_line(|| "no space".to_owned());
        }
        Ok(self.crash_at.is_some_and(|(at, _)| self.steps >= at))
    }

    fn crash(&mut self) -> io::Error {
        if let Some((_, crash)) = self.crash_at {
            self.go_down(crash);
        }
        is_off()
    }

    fn fail(&mut self, error: io::Error) -> io::Error {
        self.digest(b"error");
        self.log_line(|| format!("   {error}"));
        error
    }

    fn is_full(&self) -> bool {
        self.steps < self.full_until
    }

    fn take_page(&mut self) -> io::Result<()> {
        let capacity = self.settings.capacity_bytes / PAGE_BYTES as u64;
        if self.is_full() || self.used_pages >= capacity {
            return Err(self.fail(errno(libc::ENOSPC)));
        }
        self.used_pages += 1;
        Ok(())
    }

    /// A change of names: done, or by chance not, when the machine goes down in it.
    fn name_change<T>(
        &mut self,
        crash: bool,
        change: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        if !crash {
            return change(self).map_err(|error| self.fail(error));
        }
        if self.random.below(2) == 0 {
            let _ = change(self);
        }
        Err(self.crash())
    }

    /// How much of a write finds space.
    fn room_for(&mut self, node: NodeId, at: u64, len: usize) -> io::Result<usize> {
        let full = self.is_full();
        let capacity = self.settings.capacity_bytes / PAGE_BYTES as u64;
        let extra = self.tree.file(node)?.extra_charge(at, len);
        if full && (extra > 0 || self.full_for_all) {
            return Ok(self.random.below(len as u64) as usize);
        }
        let left = capacity.saturating_sub(self.used_pages);
        if extra > left {
            return Ok(usize::try_from(left).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES).min(len - 1));
        }
        Ok(len)
    }

    fn put(&mut self, node: NodeId, at: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        let file = self.tree.file(node)?;
        let extra = file.extra_charge(at, bytes.len());
        file.write(at, bytes, durable);
        let last = pages(at, bytes.len()).next_back().map(|page| file.page(page));
        self.used_pages += extra;
        if let Some(page) = last {
            if self.stale.len() == STALE_PAGES {
                self.stale.pop_front();
            }
            self.stale.push_back(page);
        }
        Ok(())
    }

    /// The end of a write: it is done, in part, or elsewhere.
    fn land(&mut self, flight: Flight) -> io::Result<()> {
        let Flight { node, at, bytes, direct, dsync } = flight;
        let rates = self.settings.rates;
        let newness = self.newness();
        if self.random.chance(rates.write_fails) {
            self.counters.count(Fault::WriteFails);
            self.with_fate(Some(node), newness, |file, fate| file.write_partly(at, &bytes, dsync, fate))?;
            return Err(self.fail(errno(libc::EIO)));
        }
        let room = if bytes.is_empty() { 0 } else { self.room_for(node, at, bytes.len())? };
        if room < bytes.len() {
            self.put(node, at, &bytes[..room], dsync)?;
            return Err(self.fail(errno(libc::ENOSPC)));
        }
        if !bytes.is_empty() && bytes.len() <= STRAY_BYTES_MAX && self.random.chance(rates.stray_writes) {
            return self.go_astray(node, at, &bytes, direct);
        }
        self.put(node, at, &bytes, dsync)
    }

    fn go_astray(&mut self, node: NodeId, at: u64, bytes: &[u8], direct: bool) -> io::Result<()> {
        let files = self.tree.files();
        let target = self.random.pick(&files).copied().unwrap_or(node);
        let chosen = self.random.draw();
        if !direct {
            // The cache has it right; only the disk does not.
            self.put(node, at, bytes, false)?;
            self.tree.file(node)?.forget_dirty(at, bytes.len());
        }
        self.note_damage(Fault::StrayWrite, node, at);
        let Ok(file) = self.tree.file(target) else { return Ok(()) };
        let Some(first) = file.nth_page(chosen) else { return Ok(()) };
        for (page, chunk) in (first..).zip(bytes.chunks(PAGE_BYTES)) {
            file.damage(page, |page| page[..chunk.len()].copy_from_slice(chunk));
        }
        self.note_damage(Fault::StrayWrite, target, first * PAGE_BYTES as u64);
        Ok(())
    }

    fn sync_file(&mut self, node: NodeId, point: Option<SyncPoint>) -> io::Result<()> {
        if self.random.chance(self.settings.rates.sync_fails) {
            self.counters.count(Fault::SyncFails);
            let newness = self.newness();
            // The file's pages, or the cache of the disk with what any file had in it.
            let lost = if self.random.below(2) == 0 { vec![node] } else { self.tree.files() };
            for node in lost {
                self.with_fate(Some(node), newness, Content::lose_sync)?;
            }
            return Err(self.fail(errno(libc::EIO)));
        }
        let file = self.tree.file(node)?;
        match point {
            Some(point) => file.end_sync(point),
            None => file.sync(),
        }
        Ok(())
    }

    fn latency(&mut self, sync: bool) -> Latency {
        if sync && self.random.chance(self.settings.rates.sync_stalls) {
            self.counters.count(Fault::SyncStalls);
            return Latency::Ms(self.settings.stall_ms);
        }
        match self.random.below(8) {
            0 => Latency::Ms(1 + self.random.below(4)),
            _ => Latency::Turns(self.random.below(6)),
        }
    }
}

impl Simulated {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.shared.lock();
        let was_up = state.down.is_none();
        let result = work(&mut state);
        let went_down = was_up && state.down.is_some();
        drop(state);
        if went_down {
            self.shared.down.notify_waiters();
        }
        result
    }

    /// A call about a path, which need not exist.
    fn at_path<T>(
        &self,
        what: &'static str,
        path: &Path,
        work: impl FnOnce(&mut State, bool) -> io::Result<T>,
    ) -> io::Result<T> {
        self.with(|state| {
            let node = state.tree.find(path).unwrap_or(NodeId::MAX);
            state.digest(path.as_os_str().as_encoded_bytes());
            let crash = state.enter(self.generation, what, node, 0, 0)?;
            if node == NodeId::MAX {
                state.log_line(|| format!("{what} {}, which is not there", path.display()));
            }
            work(state, crash)
        })
    }

    pub fn is_down(&self) -> bool {
        let state = self.shared.lock();
        state.down.is_some() || state.generation != self.generation
    }

    pub fn open(&self, path: &Path, mode: Mode) -> io::Result<Handle> {
        let node = self.at_path("open", path, |state, crash| {
            let found = state.tree.find(path);
            match found {
                Ok(node) if state.tree.is_dir(node) && mode.write => Err(state.fail(errno(libc::EISDIR))),
                Err(error) if error.kind() == io::ErrorKind::NotFound && mode.create && mode.write => state
                    .name_change(crash, |state| {
                        state.take_page()?;
                        state.tree.create(path, Node::File(Content::default()))
                    }),
                _ if crash => Err(state.crash()),
                found => found,
            }
        })?;
        Ok(Handle::new(self.clone(), node, mode))
    }

    pub fn lock(&self, path: &Path) -> io::Result<Option<Handle>> {
        let mut handle = self.open(path, Mode { write: true, create: true, ..Mode::default() })?;
        let node = handle.node();
        let taken = self.with(|state| {
            if state.locks.contains_key(&node) {
                return Ok(false);
            }
            state.locks.insert(node, self.generation);
            Ok(true)
        })?;
        if !taken {
            return Ok(None);
        }
        handle.holds_lock();
        Ok(Some(handle))
    }

    pub fn unlock(&self, node: NodeId) {
        let mut state = self.shared.lock();
        if state.locks.get(&node) == Some(&self.generation) {
            state.locks.remove(&node);
        }
    }

    pub fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.at_path("stat", path, |state, crash| {
            if crash {
                return Err(state.crash());
            }
            let node = state.tree.find(path)?;
            let (is_dir, len) = (state.tree.is_dir(node), state.tree.len(node));
            Ok(Metadata { is_dir, len, modified_ms: state.now_ms() })
        })
    }

    pub fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.at_path("list", path, |state, crash| {
            if crash {
                return Err(state.crash());
            }
            let names = state.tree.find(path).and_then(|node| state.tree.list(node))?;
            Ok(names
                .into_iter()
                .map(|(name, node)| DirEntry {
                    name,
                    is_dir: state.tree.is_dir(node),
                    len: state.tree.len(node),
                })
                .collect())
        })
    }

    pub fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.at_path("mkdir", path, |state, crash| {
            state.name_change(crash, |state| {
                if state.tree.find(path).is_err() {
                    state.take_page()?;
                }
                state.tree.create(path, Node::Dir(Dir::default())).map(drop)
            })
        })
    }

    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.remove(path, false)
    }

    pub fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.remove(path, true)
    }

    fn remove(&self, path: &Path, dir: bool) -> io::Result<()> {
        self.at_path("remove", path, |state, crash| {
            state.name_change(crash, |state| {
                let freed = state.tree.find(path).map(|node| state.tree.charge(node));
                state.tree.remove(path, dir)?;
                state.used_pages = state.used_pages.saturating_sub(freed.unwrap_or(0));
                Ok(())
            })
        })
    }

    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.at_path("rename", from, |state, crash| {
            state.name_change(crash, |state| {
                // A directory may have to grow for the new name.
                let replaced = state.tree.find(to);
                if replaced.is_err() && state.is_full() {
                    return Err(errno(libc::ENOSPC));
                }
                let freed = replaced.map_or(0, |node| state.tree.charge(node));
                state.tree.rename(from, to)?;
                state.used_pages = state.used_pages.saturating_sub(freed);
                Ok(())
            })
        })
    }

    pub fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.at_path("syncdir", path, |state, crash| {
            if crash {
                return Err(state.crash());
            }
            let node = state.tree.find(path)?;
            if state.random.chance(state.settings.rates.sync_fails) {
                // Names are in a journal: they may still arrive, but nothing may rely on it.
                state.counters.count(Fault::SyncFails);
                return Err(state.fail(errno(libc::EIO)));
            }
            state.tree.dir(node)?.sync();
            Ok(())
        })
    }

    pub fn sync_all(&self) -> io::Result<()> {
        self.at_path("syncfs", Path::new("/"), |state, crash| {
            if crash {
                return Err(state.crash());
            }
            if state.random.chance(state.settings.rates.sync_fails) {
                state.counters.count(Fault::SyncFails);
                let newness = state.newness();
                for node in state.tree.files() {
                    if state.random.below(2) == 0 {
                        state.with_fate(Some(node), newness, Content::lose_sync)?;
                    }
                }
                return Err(state.fail(errno(libc::EIO)));
            }
            state.tree.sync_all();
            Ok(())
        })
    }

    pub fn free_bytes(&self) -> io::Result<u64> {
        self.with(|state| {
            let capacity = state.settings.capacity_bytes / PAGE_BYTES as u64;
            let free = if state.is_full() { 0 } else { capacity.saturating_sub(state.used_pages) };
            Ok(free * PAGE_BYTES as u64)
        })
    }

    pub fn boot_id(&self) -> [u8; 16] {
        self.shared.lock().boot_id
    }

    pub fn random_id(&self) -> u64 {
        self.shared.lock().random.draw()
    }

    pub fn len(&self, node: NodeId) -> io::Result<u64> {
        self.with(|state| {
            if state.enter(self.generation, "len", node, 0, 0)? {
                return Err(state.crash());
            }
            Ok(state.tree.len(node))
        })
    }

    pub fn set_len(&self, node: NodeId, len: u64) -> io::Result<()> {
        self.with(|state| {
            let crash = state.enter(self.generation, "truncate", node, len, 0)?;
            if !crash || state.random.below(2) == 0 {
                let file = state.tree.file(node)?;
                let before = file.charge();
                file.set_len(len);
                let freed = before.saturating_sub(file.charge());
                state.used_pages = state.used_pages.saturating_sub(freed);
            }
            if crash { Err(state.crash()) } else { Ok(()) }
        })
    }

    pub fn allocate(&self, node: NodeId, len: u64) -> io::Result<()> {
        self.with(|state| {
            if state.enter(self.generation, "allocate", node, len, 0)? {
                return Err(state.crash());
            }
            let capacity = state.settings.capacity_bytes / PAGE_BYTES as u64;
            let file = state.tree.file(node)?;
            let before = file.charge();
            let mut grown = file.clone();
            grown.reserve(len);
            let extra = grown.charge() - before;
            if extra > 0 && (state.is_full() || state.used_pages + extra > capacity) {
                return Err(state.fail(errno(libc::ENOSPC)));
            }
            *state.tree.file(node)? = grown;
            state.used_pages += extra;
            Ok(())
        })
    }

    pub fn written_until(&self, node: NodeId) -> io::Result<u64> {
        self.with(|state| {
            if state.enter(self.generation, "seekhole", node, 0, 0)? {
                return Err(state.crash());
            }
            Ok(state.tree.file(node)?.written_until())
        })
    }

    pub fn read(&self, node: NodeId, at: u64, out: &mut [u8]) -> io::Result<usize> {
        self.with(|state| {
            if state.enter(self.generation, "read", node, at, out.len() as u64)? {
                return Err(state.crash());
            }
            let file = state.tree.file(node)?;
            let got = file.read(at, out);
            if got > 0 && state.random.chance(state.settings.rates.read_fails) {
                state.counters.count(Fault::ReadFails);
                return Err(state.fail(errno(libc::EIO)));
            }
            Ok(got)
        })
    }

    fn begin(&self, flight: Flight) -> io::Result<(u64, Latency)> {
        self.with(|state| {
            let len = flight.bytes.len();
            state.tree.file(flight.node)?;
            // The first and the last bytes stand for all: our own records have checksums there.
            state.digest(&flight.bytes[..len.min(512)]);
            state.digest(&flight.bytes[len.saturating_sub(64)..]);
            let crash = state.enter(self.generation, "write", flight.node, flight.at, len as u64)?;
            let number = state.next_flight;
            state.next_flight += 1;
            state.flights.insert(number, flight);
            if crash {
                return Err(state.crash());
            }
            Ok((number, state.latency(false)))
        })
    }

    fn end(&self, number: u64) -> io::Result<()> {
        self.with(|state| {
            let Some(flight) = state.flights.get(&number) else { return Err(is_off()) };
            let (node, at, len) = (flight.node, flight.at, flight.bytes.len() as u64);
            if state.enter(self.generation, "written", node, at, len)? {
                return Err(state.crash());
            }
            let flight = state.flights.remove(&number).ok_or(is_off())?;
            state.land(flight)
        })
    }

    /// Nobody waits for the write any more: it happens, or it had not begun.
    fn abandon(&self, number: u64) {
        let mut state = self.shared.lock();
        // What was in flight when the machine went down waits for its fate.
        if state.down.is_none()
            && state.generation == self.generation
            && let Some(flight) = state.flights.remove(&number)
            && state.random.below(2) == 0
        {
            // Whether it failed is nobody's concern either.
            let _ = state.land(flight);
        }
    }

    pub fn write(&self, node: NodeId, at: u64, bytes: &[u8], mode: Mode) -> io::Result<()> {
        check_alignment(mode, at, bytes.len())?;
        let (flight, _) = self.begin(Flight::new(node, at, bytes.to_vec(), mode))?;
        self.end(flight)
    }

    pub async fn write_later(&self, node: NodeId, at: u64, bytes: Vec<u8>, mode: Mode) -> io::Result<()> {
        check_alignment(mode, at, bytes.len())?;
        let (number, latency) = self.begin(Flight::new(node, at, bytes, mode))?;
        let flight = InFlight { sim: self, number: Some(number) };
        self.pass(latency).await;
        flight.end()
    }

    pub fn sync(&self, node: NodeId) -> io::Result<()> {
        self.with(|state| {
            if state.enter(self.generation, "sync", node, 0, 0)? {
                return Err(state.crash());
            }
            state.sync_file(node, None)
        })
    }

    pub async fn sync_later(&self, node: NodeId) -> io::Result<()> {
        let (point, latency) = self.with(|state| {
            if state.enter(self.generation, "sync", node, 0, 0)? {
                return Err(state.crash());
            }
            let point = state.tree.file(node)?.begin_sync();
            Ok((point, state.latency(true)))
        })?;
        self.pass(latency).await;
        self.with(|state| {
            if state.enter(self.generation, "synced", node, 0, 0)? {
                return Err(state.crash());
            }
            state.sync_file(node, Some(point))
        })
    }

    /// Lets the time of an operation pass; for ever if the machine goes down meanwhile.
    pub async fn wait(&self) {
        let latency = self.shared.lock().latency(false);
        self.pass(latency).await;
    }

    async fn pass(&self, latency: Latency) {
        match latency {
            Latency::Turns(turns) => {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            }
            Latency::Ms(ms) => tokio::time::sleep(std::time::Duration::from_millis(ms)).await,
        }
        self.unless_down().await;
    }

    pub async fn unless_down(&self) {
        if self.is_down() {
            std::future::pending::<()>().await;
        }
    }
}

fn check_alignment(mode: Mode, at: u64, len: usize) -> io::Result<()> {
    let blocks = at.is_multiple_of(BLOCK_BYTES as u64) && len.is_multiple_of(BLOCK_BYTES);
    if mode.direct && !blocks { Err(errno(libc::EINVAL)) } else { Ok(()) }
}

impl Flight {
    fn new(node: NodeId, at: u64, bytes: Vec<u8>, mode: Mode) -> Self {
        Self { node, at, bytes, direct: mode.direct, dsync: mode.dsync }
    }
}

struct InFlight<'a> {
    sim: &'a Simulated,
    number: Option<u64>,
}

impl InFlight<'_> {
    fn end(mut self) -> io::Result<()> {
        match self.number.take() {
            Some(number) => self.sim.end(number),
            None => Ok(()),
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number.take() {
            self.sim.abandon(number);
        }
    }
}
