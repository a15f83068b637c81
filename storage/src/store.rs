//! One shard's storage: both lanes of the WAL, the groups, and the work behind them.
//!
//! Background, on the shard's thread: `flush` moves committed runs to segments; `retire` syncs segments,
//! writes a checkpoint and gives the oldest WAL file back. Order in `retire` is what makes a crash safe:
//! segments synced -> checkpoint durable -> file reused.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flumen_io::{Disk, File, Mode};
use flumen_protocol::record_batch;
use tokio::sync::Notify;

use crate::checkpoint::{self, Checkpoint, GroupCheckpoint};
use crate::data_dir::{DELETED_SUFFIX, DataDir};
use crate::entry::{
    GroupConfig, GroupHealth, GroupId, HardState, Lane, Lsn, RecoveredGroup, StoreConfig, StoreStats,
};
use crate::error::{CreateError, LogPoisoned, OpenError};
use crate::group::{Group, GroupLog, GroupState};
use crate::leader_epochs::LeaderEpochs;
use crate::producer_state::ProducerState;
use crate::segment::{self, Segment};
use crate::wal::Wal;

/// A group is flushed when this much of it is only in the WAL; larger runs cost less per byte.
pub(crate) const RUN_BYTES: usize = 512 << 10;
/// One write to a segment at most.
const RUN_BYTES_MAX: usize = 2 << 20;
/// A producer snapshot for every this much of log: what recovery reads again per partition.
const SNAPSHOT_BYTES: u64 = 64 << 20;
/// Full WAL files before the oldest is retired: entries of a quiet partition wait for a bigger run.
const FULL_FILES_KEPT: usize = 1;
/// How often a full disk is tried again by the flusher.
const SPACE_RETRY: Duration = Duration::from_millis(200);

#[derive(Clone)]
pub struct ShardStore(pub(crate) Rc<Store>);

pub(crate) struct Store {
    config: StoreConfig,
    dir: Arc<DataDir>,
    pub(crate) disk: Disk,
    durable: Rc<Wal>,
    /// Opened by the first topic that asks for it.
    os: OnceCell<Rc<Wal>>,
    groups: RefCell<HashMap<GroupId, Rc<Group>>>,
    flush_queue: RefCell<VecDeque<Weak<Group>>>,
    flush_due: Notify,
    file_filled: Rc<Notify>,
    /// Appends in order, to evict the oldest first.
    cache_order: RefCell<VecDeque<(Weak<Group>, usize)>>,
    cache_bytes: Cell<usize>,
    pub(crate) no_space: Cell<bool>,
    poison: RefCell<Option<LogPoisoned>>,
    bytes_appended: Cell<u64>,
    segment_bytes: Cell<u64>,
    stopping: Cell<bool>,
}

impl ShardStore {
    /// Opens the shard's WAL. Must run on the shard's thread, in its `LocalSet`, after `DataDir::recover`.
    pub async fn open(dir: &Arc<DataDir>, config: StoreConfig) -> Result<ShardStore, OpenError> {
        let disk = Disk::open(config.io).map_err(|e| OpenError::Io {
            path: dir.path().to_path_buf(),
            source: io::Error::other(e.to_string()),
        })?;
        tracing::debug!(shard = config.shard, io = disk.description(), "log opened");
        let file_filled = Rc::new(Notify::new());
        let path = dir.wal_dir(config.shard, Lane::Durable);
        let durable = Wal::open(
            path.clone(),
            Lane::Durable,
            disk.clone(),
            config.wal_file_bytes,
            config.wal_files,
            0,
            file_filled.clone(),
        )
        .map_err(OpenError::io(&path))?;
        let store = Rc::new(Store {
            config,
            dir: dir.clone(),
            disk,
            durable,
            os: OnceCell::new(),
            groups: RefCell::default(),
            flush_queue: RefCell::default(),
            flush_due: Notify::new(),
            file_filled,
            cache_order: RefCell::default(),
            cache_bytes: Cell::new(0),
            no_space: Cell::new(false),
            poison: RefCell::new(None),
            bytes_appended: Cell::new(0),
            segment_bytes: Cell::new(0),
            stopping: Cell::new(false),
        });
        tokio::task::spawn_local(store.clone().keep_flushing());
        tokio::task::spawn_local(store.clone().keep_retiring());
        Ok(ShardStore(store))
    }

    /// Takes over a group that recovery returned.
    pub fn attach(&self, found: RecoveredGroup, config: GroupConfig) -> GroupLog {
        let group = Rc::new(Group {
            id: found.group_id,
            dir: self.0.dir.log_root().join(&found.dir_name),
            health: RefCell::new(found.health),
            config: RefCell::new(config),
            producers: RefCell::new(found.producers),
            state: RefCell::new(GroupState {
                hard_state: found.hard_state,
                last_index: found.last_index,
                last_term: found.last_term,
                log_start_offset: found.log_start_offset,
                log_end_offset: found.log_end_offset,
                high_watermark: found.log_end_offset,
                tail: VecDeque::new(),
                flushed: 0,
                unflushed_bytes: 0,
                flushed_index: found.last_index,
                flushed_term: found.last_term,
                snapshot_offset: found.log_end_offset,
                synced_end_offset: found.log_end_offset,
                segments: found.segments,
                active: None,
                dirty: Vec::new(),
                leader_epochs: found.leader_epochs,
            }),
            flushing: Cell::new(false),
            queued: Cell::new(false),
            deleted: Cell::new(false),
        });
        self.0.groups.borrow_mut().insert(group.id, group.clone());
        GroupLog { group, store: self.clone() }
    }

    /// Creates an empty group: its directory is durable when this returns.
    pub fn create(
        &self,
        group_id: GroupId,
        dir_name: &str,
        config: GroupConfig,
    ) -> Result<GroupLog, CreateError> {
        if let Some(poison) = self.0.poisoned() {
            return Err(poison.into());
        }
        let path = self.0.dir.log_root().join(dir_name);
        let made = std::fs::create_dir_all(&path).and_then(|()| flumen_io::sync_dir(&self.0.dir.log_root()));
        made.map_err(|source| CreateError::Io { path, source })?;
        Ok(self.attach(
            RecoveredGroup {
                group_id,
                dir_name: dir_name.to_string(),
                health: GroupHealth::Ok,
                hard_state: HardState::default(),
                last_index: 0,
                last_term: 0,
                log_start_offset: 0,
                log_end_offset: 0,
                producers: ProducerState::default(),
                leader_epochs: LeaderEpochs::default(),
                segments: Vec::new(),
            },
            config,
        ))
    }

    /// Forgets a group and removes its files. The rename is what decides; the rest may be cut short.
    pub async fn delete(&self, group_id: GroupId) -> io::Result<()> {
        let Some(group) = self.0.groups.borrow_mut().remove(&group_id) else { return Ok(()) };
        group.deleted.set(true);
        {
            let mut state = group.state.borrow_mut();
            state.tail.clear();
            state.flushed = 0;
            state.unflushed_bytes = 0;
            state.active = None;
            state.dirty.clear();
        }
        let mut doomed = group.dir.clone().into_os_string();
        doomed.push(DELETED_SUFFIX);
        std::fs::rename(&group.dir, &doomed)?;
        flumen_io::sync_dir(&self.0.dir.log_root())?;
        tokio::task::spawn_blocking(move || std::fs::remove_dir_all(doomed))
            .await
            .map_err(io::Error::other)?
    }

    pub fn durable_lsn(&self, lane: Lane) -> Lsn {
        match lane {
            Lane::Durable => self.0.durable.durable_lsn(),
            Lane::Os => self.0.os.get().map_or(0, |wal| wal.durable_lsn()),
        }
    }

    /// Waits until the lane's durable LSN is above `seen`, and returns it.
    pub async fn next_durable(&self, lane: Lane, seen: Lsn) -> Result<Lsn, LogPoisoned> {
        let wal = self.0.wal(lane).map_err(|e| LogPoisoned(e.to_string()))?;
        loop {
            let progressed = wal.progressed.notified();
            let lsn = wal.durable_lsn();
            if lsn > seen {
                return Ok(lsn);
            }
            if let Some(poison) = self.0.poisoned() {
                return Err(poison);
            }
            progressed.await;
        }
    }

    /// Puts everything into segments and says so in a checkpoint, so that the next start has no WAL to read.
    pub async fn shutdown(&self) -> Result<(), LogPoisoned> {
        let store = &self.0;
        for wal in store.wals() {
            let mut seen = wal.durable_lsn();
            let lane = wal_lane(store, &wal);
            while seen < wal.last_staged_lsn() {
                seen = self.next_durable(lane, seen).await?;
            }
        }
        store.stopping.set(true);
        let groups: Vec<_> = store.groups.borrow().values().cloned().collect();
        for group in &groups {
            store.flush_all(group).await?;
        }
        store.checkpoint_all(true).await?;
        for wal in store.wals() {
            wal.close();
        }
        Ok(())
    }

    pub fn stats(&self) -> StoreStats {
        let store = &self.0;
        let sum = |f: fn(&Wal) -> u64| store.wals().iter().map(|w| f(w)).sum();
        StoreStats {
            wal_bytes_written: sum(|w| w.bytes_written.get()),
            wal_commits: sum(|w| w.commits.get()),
            segment_bytes_written: store.segment_bytes.get(),
            bytes_appended: store.bytes_appended.get(),
            cache_bytes: store.cache_bytes.get(),
            no_space: store.no_space.get() || store.wals().iter().any(|w| w.no_space()),
        }
    }
}

fn wal_lane(store: &Store, wal: &Rc<Wal>) -> Lane {
    if Rc::ptr_eq(&store.durable, wal) { Lane::Durable } else { Lane::Os }
}

impl Store {
    pub(crate) fn wal(&self, lane: Lane) -> io::Result<Rc<Wal>> {
        match lane {
            Lane::Durable => Ok(self.durable.clone()),
            Lane::Os => {
                if let Some(wal) = self.os.get() {
                    return Ok(wal.clone());
                }
                let wal = Wal::open(
                    self.dir.wal_dir(self.config.shard, Lane::Os),
                    Lane::Os,
                    self.disk.clone(),
                    self.config.wal_file_bytes,
                    self.config.wal_files,
                    0,
                    self.file_filled.clone(),
                )?;
                Ok(self.os.get_or_init(|| wal).clone())
            }
        }
    }

    fn wals(&self) -> Vec<Rc<Wal>> {
        std::iter::once(self.durable.clone()).chain(self.os.get().cloned()).collect()
    }

    pub(crate) fn poisoned(&self) -> Option<LogPoisoned> {
        self.poison
            .borrow()
            .clone()
            .or_else(|| self.durable.poisoned())
            .or_else(|| self.os.get().and_then(|w| w.poisoned()))
    }

    fn set_poison(&self, what: &std::path::Path, error: &io::Error) -> LogPoisoned {
        let poison = LogPoisoned(format!("{}: {error}", what.display()));
        *self.poison.borrow_mut() = Some(poison.clone());
        for wal in self.wals() {
            wal.progressed.notify_waiters();
        }
        poison
    }

    pub(crate) fn note_appended(&self, group: &Rc<Group>, bytes: usize) {
        self.bytes_appended.set(self.bytes_appended.get() + bytes as u64);
        self.cache_bytes.set(self.cache_bytes.get() + bytes);
        self.cache_order.borrow_mut().push_back((Rc::downgrade(group), bytes));
    }

    /// Lets the oldest entries go while the cache is over its budget; those not yet in a segment stay.
    fn evict(&self) {
        let mut order = self.cache_order.borrow_mut();
        while self.cache_bytes.get() > self.config.cache_bytes {
            let Some((group, bytes)) = order.front() else { break };
            let bytes = *bytes;
            if let Some(group) = group.upgrade() {
                let mut state = group.state.borrow_mut();
                // Retention may have taken it already: then the count below is off by one entry, in the
                // direction of evicting early.
                if state.flushed > 0 {
                    state.tail.pop_front();
                    state.flushed -= 1;
                } else if !state.tail.is_empty() {
                    break;
                }
            }
            order.pop_front();
            self.cache_bytes.set(self.cache_bytes.get() - bytes);
        }
    }

    pub(crate) fn queue_flush(&self, group: &Rc<Group>) {
        if !group.queued.replace(true) {
            self.flush_queue.borrow_mut().push_back(Rc::downgrade(group));
            self.flush_due.notify_one();
        }
    }

    async fn keep_flushing(self: Rc<Self>) {
        loop {
            let next = self.flush_queue.borrow_mut().pop_front();
            let Some(group) = next else {
                self.flush_due.notified().await;
                continue;
            };
            let Some(group) = group.upgrade() else { continue };
            group.queued.set(false);
            if self.flush_run(&group).await.is_err() {
                return;
            }
            if group.state.borrow().unflushed_bytes >= RUN_BYTES {
                self.queue_flush(&group);
                // A group whose entries are not committed yet must not spin.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Flushes what is committed of a group, in as many runs as it takes.
    async fn flush_all(&self, group: &Rc<Group>) -> Result<(), LogPoisoned> {
        while self.flush_run(group).await? {}
        Ok(())
    }

    /// Moves one run of committed entries to the active segment. Returns whether there may be more.
    async fn flush_run(&self, group: &Rc<Group>) -> Result<bool, LogPoisoned> {
        while group.flushing.get() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        group.flushing.set(true);
        let outcome = self.flush_run_alone(group).await;
        group.flushing.set(false);
        self.evict();
        outcome
    }

    async fn flush_run_alone(&self, group: &Rc<Group>) -> Result<bool, LogPoisoned> {
        let mut run: Vec<Bytes> = Vec::new();
        let mut count = 0;
        let mut bytes = 0usize;
        let mut last = (0, 0);
        {
            let mut state = group.state.borrow_mut();
            let config = group.config.borrow();
            let start = state.flushed;
            let first_batch = state.tail.range(start..).find(|e| e.next_offset > e.base_offset);
            if let Some(first) = first_batch.filter(|e| e.next_offset <= state.high_watermark) {
                let (base, size) = (first.base_offset, first.bytes.len() as u64);
                let timestamp = record_batch::parse_header(&first.bytes).map_or(0, |h| h.max_timestamp);
                let roll = state.segments.last().is_none_or(|s| {
                    s.bytes > 0
                        && (s.bytes + size > config.segment_bytes
                            || timestamp.saturating_sub(s.first_timestamp) >= config.segment_ms)
                });
                if roll {
                    state.active = None;
                    if state.segments.last().is_none_or(|s| s.base_offset != base) {
                        state.segments.push(Segment::new(base));
                    }
                }
            }
            let room = state.segments.last().map_or(0, |s| config.segment_bytes.saturating_sub(s.bytes));
            for entry in state.tail.range(start..) {
                let durable = match entry.lane {
                    Lane::Durable => self.durable.durable_lsn(),
                    Lane::Os => self.os.get().map_or(0, |w| w.durable_lsn()),
                };
                if entry.next_offset > state.high_watermark || entry.lsn > durable {
                    break;
                }
                let is_batch = entry.next_offset > entry.base_offset;
                if is_batch {
                    let over = (bytes + entry.bytes.len()) as u64 > room && bytes > 0;
                    if over || bytes + entry.bytes.len() > RUN_BYTES_MAX && bytes > 0 {
                        break;
                    }
                    bytes += entry.bytes.len();
                    run.push(entry.bytes.clone());
                }
                last = (entry.index, entry.term);
                count += 1;
            }
        }
        if count == 0 {
            return Ok(false);
        }
        if !run.is_empty() {
            self.write_run(group, &run, bytes).await?;
        }
        if group.deleted.get() {
            return Ok(false);
        }
        let mut state = group.state.borrow_mut();
        state.flushed += count;
        state.flushed_index = last.0;
        state.flushed_term = last.1;
        state.unflushed_bytes -= bytes;
        // Control entries are in no segment and nobody reads them back.
        Ok(true)
    }

    async fn write_run(&self, group: &Rc<Group>, run: &[Bytes], bytes: usize) -> Result<(), LogPoisoned> {
        let (base, position) = {
            let state = group.state.borrow();
            match state.segments.last() {
                Some(s) => (s.base_offset, s.bytes),
                None => return Ok(()),
            }
        };
        let path = segment::log_path(&group.dir, base);
        loop {
            let opened = self.active_file(group, &path);
            let written = match opened {
                Ok(file) => self.disk.write_vectored_at(&file, run.to_vec(), position).await,
                Err(e) => Err(e),
            };
            match written {
                Ok(()) => break,
                Err(_) if group.deleted.get() => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                    // The entries are safe in the WAL; the disk may get room again.
                    self.no_space.set(true);
                    tokio::time::sleep(SPACE_RETRY).await;
                }
                Err(e) => return Err(self.set_poison(&path, &e)),
            }
        }
        self.no_space.set(false);
        self.segment_bytes.set(self.segment_bytes.get() + bytes as u64);
        let mut state = group.state.borrow_mut();
        if let Some(segment) = state.segments.last_mut() {
            for batch in run {
                segment.note(&record_batch::parse_header(batch).expect("staged batches are whole"));
            }
        }
        Ok(())
    }

    fn active_file(&self, group: &Rc<Group>, path: &std::path::Path) -> io::Result<File> {
        let mut state = group.state.borrow_mut();
        if let Some(file) = &state.active {
            return Ok(file.clone());
        }
        let fresh = !path.exists();
        let file = File::open(path, Mode { write: true, create: true, ..Mode::default() })?;
        if fresh {
            flumen_io::sync_dir(&group.dir)?;
        }
        state.active = Some(file.clone());
        state.dirty.push(file.clone());
        Ok(file)
    }

    async fn keep_retiring(self: Rc<Self>) {
        loop {
            self.file_filled.notified().await;
            for wal in self.wals() {
                while wal.full_files() > FULL_FILES_KEPT || (wal.full_files() > 0 && wal.no_space()) {
                    let Some((seq, lsn)) = wal.oldest_full() else { break };
                    let lane = wal_lane(&self, &wal);
                    if self.retire(&wal, lane, seq, lsn).await.is_err() {
                        return;
                    }
                }
                // A ring that is still growing gets its next file zeroed before it is needed.
                match wal.prepare_file().await {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::StorageFull => {}
                    Err(e) => {
                        self.set_poison(self.dir.path(), &e);
                        return;
                    }
                }
            }
        }
    }

    async fn retire(&self, wal: &Rc<Wal>, lane: Lane, seq: u64, lsn: Lsn) -> Result<(), LogPoisoned> {
        let behind = |g: &Rc<Group>| {
            let state = g.state.borrow();
            state.tail.range(state.flushed..).any(|e| e.lane == lane && e.lsn <= lsn)
        };
        let groups: Vec<_> = self.groups.borrow().values().cloned().collect();
        for group in groups {
            while behind(&group) && !group.deleted.get() {
                if !self.flush_run(&group).await? {
                    // Not committed yet: durable entries of a group of one are, a moment later.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
        self.checkpoint_all(false).await?;
        wal.retire(seq).map_err(|e| self.set_poison(self.dir.path(), &e))
    }

    /// Syncs every dirty segment and writes the shard's checkpoint.
    async fn checkpoint_all(&self, snapshot_everything: bool) -> Result<(), LogPoisoned> {
        let groups: BTreeMap<GroupId, Rc<Group>> =
            self.groups.borrow().iter().map(|(id, g)| (*id, g.clone())).collect();
        let mut checkpoint = Checkpoint::new();
        for (id, group) in groups {
            if !matches!(&*group.health.borrow(), GroupHealth::Ok) {
                continue;
            }
            let (dirty, end, index, term) = {
                let mut state = group.state.borrow_mut();
                let dirty = std::mem::take(&mut state.dirty);
                // The active file stays open and will be dirty again with the next run.
                if let Some(active) = state.active.clone() {
                    state.dirty.push(active);
                }
                let end = state.segments.last().map_or(state.log_start_offset, |s| s.end_offset);
                (dirty, end, state.flushed_index, state.flushed_term)
            };
            let unsynced = group.state.borrow().synced_end_offset < end;
            if unsynced {
                for file in dirty {
                    if let Err(e) = self.disk.fdatasync(&file).await
                        && !group.deleted.get()
                    {
                        return Err(self.set_poison(&group.dir, &e));
                    }
                }
                self.write_index(&group);
            }
            self.snapshot_producers(&group, snapshot_everything);
            let mut state = group.state.borrow_mut();
            state.synced_end_offset = end;
            if snapshot_everything {
                state.active = None;
                state.dirty.clear();
            }
            checkpoint.insert(
                id,
                GroupCheckpoint {
                    hard_state: state.hard_state,
                    last_index: index,
                    last_term: term,
                    log_start_offset: state.log_start_offset,
                    synced_end_offset: end,
                    leader_epochs: state.leader_epochs.clone(),
                },
            );
        }
        let path = self.dir.wal_root().join(format!("{}.checkpoint", self.config.shard));
        let bytes = checkpoint::encode(&checkpoint);
        loop {
            match checkpoint::write_atomically(&path, &bytes) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::StorageFull && !self.stopping.get() => {
                    self.no_space.set(true);
                    tokio::time::sleep(SPACE_RETRY).await;
                }
                Err(e) => return Err(self.set_poison(&path, &e)),
            }
        }
    }

    /// Index entries are a convenience: a failure costs the next start a scan.
    fn write_index(&self, group: &Group) {
        let mut state = group.state.borrow_mut();
        for segment in state.segments.iter_mut().filter(|s| s.index_written < s.index.len()) {
            let fresh = segment.index_written == 0;
            let bytes = segment.take_unwritten_index();
            let path = segment::index_path(&group.dir, segment.base_offset);
            let written = std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .append(!fresh)
                .truncate(fresh)
                .open(&path)
                .and_then(|mut f| io::Write::write_all(&mut f, &bytes));
            if let Err(error) = written {
                tracing::debug!(path = %path.display(), %error, "index not written; the next start rebuilds it");
            }
        }
    }

    /// A snapshot holds what is in synced segments and a little more: applying a batch twice changes
    /// nothing, since the later state wins.
    fn snapshot_producers(&self, group: &Group, even_if_recent: bool) {
        let (end, bytes_since, has_tail) = {
            let state = group.state.borrow();
            let end = state.segments.last().map_or(0, |s| s.end_offset);
            let since: u64 =
                state.segments.iter().filter(|s| s.end_offset > state.snapshot_offset).map(|s| s.bytes).sum();
            (end, since, state.tail.len() > state.flushed)
        };
        let producers = group.producers.borrow();
        let fresh = group.state.borrow().snapshot_offset;
        // Only a state that is exactly that of the segments may stand for them.
        if has_tail || end == fresh || (producers.is_empty() && fresh == 0) {
            return;
        }
        if !even_if_recent && bytes_since < SNAPSHOT_BYTES {
            return;
        }
        let path = group.dir.join(format!("{end:020}.snapshot"));
        if checkpoint::write_atomically(&path, &producers.encode()).is_ok() {
            let old = group.dir.join(format!("{fresh:020}.snapshot"));
            group.state.borrow_mut().snapshot_offset = end;
            let _ = std::fs::remove_file(old);
        }
    }

    /// Unlinks segments off the thread: freeing a large file's blocks takes milliseconds.
    pub(crate) fn remove_segments(&self, group: &Rc<Group>, bases: Vec<i64>) {
        if bases.is_empty() {
            return;
        }
        let dir = group.dir.clone();
        tokio::task::spawn_blocking(move || {
            for base in bases {
                // The index goes first: a log without one is whole, an index without a log is litter.
                let _ = std::fs::remove_file(segment::index_path(&dir, base));
                if let Err(error) = std::fs::remove_file(segment::log_path(&dir, base)) {
                    tracing::warn!(dir = %dir.display(), base, %error, "an old segment could not be removed");
                }
            }
        });
    }
}
