//! One shard's store: its two WAL lanes, its partitions, the budget of the tail cache, and the background tasks.
//!
//! Lives on one shard thread inside a `LocalSet`; nothing here is `Send`. Raft, offset assignment and acknowledgement
//! are the broker's. The flow of an append: `GroupLog::stage` -> lane block -> one write -> `durable_lsn` rises -> the
//! broker commits and calls `set_high_watermark` -> the flusher moves the run to its segment -> the WAL file retires.
//!
//! Invariants:
//! - Each lane reports by itself: `durable_lsn(lane)` is its newest commit that is done, and so are all before it.
//! - LSNs are given out over both lanes, and the records of one group lie in LSN order whatever its lanes were; replay
//!   after a crash goes by that order.
//! - After a failed WAL write or sync nothing more is reported durable, and nothing is retried.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use flumen_io::{Disk, DiskKind, File, FileSystem, LastBlock, Mode};
use tokio::sync::Notify;

use crate::data_dir::{DataDir, Leaving, Lock, Syncing};
use crate::direct::{self, Direct};
use crate::failpoint::{self, Failpoint};
use crate::flush;
use crate::group::{Group, GroupLog};
use crate::group_state::{GroupState, valid_dir_name};
use crate::mutant::{self, Mutant};
use crate::read_ahead::ReadAhead;
use crate::ring::Class;
use crate::segment_name::SegmentName;
use crate::stop;
use crate::types::{
    COMMIT_BUCKETS_US, COMMIT_LANES, CreateError, DeleteError, GroupConfig, GroupId, IoKind, LANES, Lane,
    LogPoisoned, Lsn, OpenError, RecoveredGroup, ShutdownError, StageError, StoreConfig, StoreStats,
};
use crate::wal::{self, Wal, sync_os_lane};
use crate::wal_format::{GROUP_DELETE, GROUP_STATE, RecordHeader};

/// Smaller rings cannot hold the records that emptying them needs.
const MIN_WAL_FILE_BYTES: u64 = 256 << 10;
/// One being written, one being retired, one in between.
const MIN_WAL_FILES: usize = 3;

/// Descriptors kept open for segments, per shard: enough for the partitions written and read at one time, and far below
/// the usual limit of the process. Others are opened again when needed, some ten microseconds.
const OPEN_FILES: usize = 256;

/// Files of deleted segments go one by one with this pause, so that freeing their blocks does not stall the journal.
const UNLINK_PAUSE: Duration = Duration::from_millis(5);

pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

struct OpenSegment {
    file: File,
    used: u64,
    /// What the next append has to write again; `None` while an append has it.
    last_block: Option<LastBlock>,
}

#[derive(Default)]
struct FileCache {
    files: HashMap<(u64, SegmentName), OpenSegment>,
    clock: u64,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub bytes_appended: Cell<u64>,
    pub batches_appended: Cell<u64>,
    pub wal_bytes: Cell<u64>,
    pub wal_commits: Cell<u64>,
    pub segment_bytes: Cell<u64>,
    pub segment_syncs: Cell<u64>,
    pub compaction_read: Cell<u64>,
    pub compaction_written: Cell<u64>,
    pub compactions: Cell<u64>,
    pub files_retired: Cell<u64>,
    commit_buckets: RefCell<[u64; COMMIT_BUCKETS_US.len() + 1]>,
    commit_sum_us: Cell<u64>,
}

pub(crate) fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get() + n);
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Tombstone {
    pub group: GroupId,
    /// The states file of this run has it. Otherwise only records in the os lane do, until that has moved on.
    pub is_saved: bool,
}

struct Trash {
    path: PathBuf,
    after: (Lane, Lsn),
    of: Option<Rc<Group>>,
}

/// Batches of partitions that cannot commit, which one eviction looks at before it leaves the rest to the next.
const PASSED_OVER_MAX: usize = 64;

pub(crate) struct Shard {
    pub config: StoreConfig,
    pub root: PathBuf,
    pub wal_id: u64,
    pub files: FileSystem,
    pub disk: Disk,
    wals: [Wal; 2],
    os_started: Cell<bool>,
    pub groups: RefCell<BTreeMap<GroupId, Rc<Group>>>,
    pub next_lsn: Cell<Lsn>,
    durable: [Cell<Lsn>; COMMIT_LANES.len()],
    durable_changed: [Notify; COMMIT_LANES.len()],
    pub direct: Direct,
    poisoned: RefCell<Option<String>>,
    pub closing: Cell<bool>,
    closed: Cell<bool>,
    /// Order in which cached batches came in over all groups, as (group, bytes); eviction follows it.
    cache_order: RefCell<VecDeque<(GroupId, u32)>>,
    pub cache_bytes: Cell<u64>,
    pub unflushed_bytes: Cell<u64>,
    pub flush_queue: RefCell<VecDeque<Rc<Group>>>,
    pub flush_wake: Notify,
    /// Whose oldest batch stands in the way of eviction; goes to its segment before anything else does.
    pub evicts_next: RefCell<Option<Rc<Group>>>,
    /// Held over each piece of flushing; shutdown takes it to be alone.
    pub flush_lock: tokio::sync::Mutex<()>,
    /// Held by the compaction of one partition; shutdown takes it, so that nobody changes segments after it.
    pub compacting: tokio::sync::Mutex<()>,
    syncing: Arc<Syncing>,
    leaving: Leaving,
    open_files: RefCell<FileCache>,
    pub read_ahead: RefCell<ReadAhead>,
    /// In the order in which they were loaded, with how many entries each had.
    pub loaded_indexes: RefCell<VecDeque<(GroupId, i64, usize)>>,
    no_space: Cell<bool>,
    pub log_dir_dirty: Cell<bool>,
    /// Deletions whose record is written again when its WAL file goes: something that would bring the partition back, if it
    /// were found beside a directory of the same name, is there still.
    pub tombstones: RefCell<Vec<Tombstone>>,
    /// To be removed once the commit is durable that says why.
    trash: RefCell<VecDeque<Trash>>,
    /// Held over a removal and over the renaming of a deletion, so that no removal meets the files of a namesake.
    removing: tokio::sync::Mutex<()>,
    trash_wake: Notify,
    pub counters: Counters,
    /// The directory's lock lives as long as any shard does.
    _lock: Arc<Lock>,
}

impl Shard {
    pub fn is_live(&self) -> bool {
        !self.closed.get() && self.poisoned.borrow().is_none()
    }

    pub fn is_poisoned(&self) -> bool {
        self.poisoned.borrow().is_some()
    }

    pub fn check_poison(&self) -> Result<(), LogPoisoned> {
        match &*self.poisoned.borrow() {
            Some(reason) => Err(LogPoisoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    pub fn poison(&self, reason: &str) {
        if self.poisoned.borrow().is_none() {
            tracing::error!(shard = self.config.shard, reason, "the shard log failed");
            *self.poisoned.borrow_mut() = Some(reason.to_owned());
        }
        self.wake_everybody();
    }

    fn wake_everybody(&self) {
        for wal in &self.wals {
            wal.wake_all();
        }
        self.flush_wake.notify_one();
        self.direct.wake();
        self.trash_wake.notify_one();
        for changed in &self.durable_changed {
            changed.notify_waiters();
        }
    }

    /// For one sync, or several together; what is held is for `sync_failed`. Where one has failed before, of whatever shard,
    /// this one's log fails too.
    pub async fn sync_alone(&self) -> Result<tokio::sync::MutexGuard<'_, Option<String>>, LogPoisoned> {
        let failed = self.syncing.lock().await;
        if let Some(reason) = &*failed
            && !mutant::is(Mutant::IgnoresFailedSync)
        {
            self.poison(reason);
        }
        self.check_poison().map(|()| failed)
    }

    pub fn sync_failed(&self, failed: &mut Option<String>, what: &Path, error: &io::Error) {
        let reason = format!("syncing {}: {error}", what.display());
        self.poison(&reason);
        *failed = Some(reason);
    }

    pub fn note_no_space(&self, doing: &str, error: &io::Error) {
        if !self.no_space.replace(true) {
            tracing::error!(shard = self.config.shard, doing, %error, "no space on the disk; waiting for some");
        }
    }

    pub fn is_out_of_space(&self) -> bool {
        self.no_space.get()
    }

    pub fn note_space(&self) {
        if self.no_space.replace(false) {
            tracing::info!(shard = self.config.shard, "the disk has space again");
        }
    }

    pub fn wal(&self, lane: Lane) -> &Wal {
        &self.wals[lane as usize]
    }

    /// A block of a lane is done; those before it were written before it.
    pub fn note_commit(&self, lane: Lane, lsn: Lsn, bytes: u64, took: Duration) {
        let counters = &self.counters;
        add(&counters.wal_bytes, bytes);
        add(&counters.wal_commits, 1);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        add(&counters.commit_sum_us, us);
        let bucket =
            COMMIT_BUCKETS_US.iter().position(|bound| us <= *bound).unwrap_or(COMMIT_BUCKETS_US.len());
        counters.commit_buckets.borrow_mut()[bucket] += 1;
        if self.is_poisoned() {
            return;
        }
        self.durable[lane as usize].set(lsn);
        self.durable_changed[lane as usize].notify_waiters();
    }

    /// What was staged as `Lane::Direct` up to this number is done.
    pub fn note_direct(&self, number: Lsn) {
        if !self.is_poisoned() {
            self.durable[Lane::Direct as usize].set(number);
            self.durable_changed[Lane::Direct as usize].notify_waiters();
        }
    }

    pub fn durable_lsn(&self, lane: Lane) -> Lsn {
        self.durable[lane as usize].get()
    }

    pub async fn next_durable(&self, lane: Lane, seen: Lsn) -> Result<Lsn, LogPoisoned> {
        loop {
            let changed = self.durable_changed[lane as usize].notified();
            // What became durable before the failure still is; it is reported first.
            let durable = self.durable_lsn(lane);
            if durable > seen {
                return Ok(durable);
            }
            self.check_poison()?;
            if self.closed.get() {
                return Err(LogPoisoned { reason: "the store is shut down".to_owned() });
            }
            changed.await;
        }
    }

    pub async fn wait_durable(&self, lane: Lane, lsn: Lsn) -> Result<(), LogPoisoned> {
        while self.durable_lsn(lane) < lsn {
            self.next_durable(lane, self.durable_lsn(lane)).await?;
        }
        Ok(())
    }

    /// Waits until no loss of power can take the commit back, in the os lane too: what destroys older bytes because of a
    /// record must not reach the disk before it.
    pub async fn wait_safe(self: &Rc<Self>, lane: Lane, lsn: Lsn) -> Result<(), LogPoisoned> {
        self.wait_durable(lane, lsn).await?;
        if lane == Lane::Os { sync_os_lane(self).await } else { Ok(()) }
    }

    pub fn wake_flusher(&self) {
        self.flush_wake.notify_one();
    }

    pub fn queue_flush(&self, group: &Rc<Group>) {
        if !group.queued.replace(true) {
            self.flush_queue.borrow_mut().push_back(Rc::clone(group));
            self.flush_wake.notify_one();
        }
    }

    pub fn group(&self, id: GroupId) -> Option<Rc<Group>> {
        self.groups.borrow().get(&id).cloned()
    }

    /// The lane's tasks and directory exist from its first use on.
    pub fn use_os_lane(self: &Rc<Self>) {
        if !self.os_started.replace(true) {
            keep_running(self, "the writer of the os lane", wal::write_blocks(Rc::clone(self), Lane::Os));
        }
    }

    pub fn cache_push(&self, group: GroupId, bytes: usize) {
        self.cache_order.borrow_mut().push_back((group, u32::try_from(bytes).unwrap_or(u32::MAX)));
        add(&self.cache_bytes, bytes as u64);
    }

    /// Drops the oldest cached batches that are in segments until the budget is met.
    pub fn evict(&self) {
        let budget = self.config.cache_bytes as u64;
        if self.cache_bytes.get() <= budget {
            return;
        }
        let mut order = self.cache_order.borrow_mut();
        let mut passed_over = 0;
        while self.cache_bytes.get() > budget {
            let Some((id, bytes)) = order.pop_front() else { return };
            let Some(group) = self.group(id) else { continue };
            match group.evict_one() {
                Some(freed) => self.cache_bytes.set(self.cache_bytes.get().saturating_sub(freed as u64)),
                None if group.unflushed_bytes() == 0 => {}
                None if group.may_flush() => {
                    // Its oldest is not in a segment yet: it goes as soon as it is, out of turn.
                    order.push_front((id, bytes));
                    *self.evicts_next.borrow_mut() = Some(group);
                    self.flush_wake.notify_one();
                    return;
                }
                None if passed_over < PASSED_OVER_MAX => {
                    // Nothing of it is committed, and that may take long; others need not wait for it.
                    order.push_back((id, bytes));
                    passed_over += 1;
                }
                None => {
                    order.push_back((id, bytes));
                    return;
                }
            }
        }
    }

    /// Drops what is cached of a partition below `offset`, in segments as it is: compaction has taken some of it out.
    pub fn uncache(&self, group: &Group, offset: i64) {
        let (mut count, mut bytes) = (0usize, 0u64);
        while let Some(freed) = group.evict_below(offset) {
            count += 1;
            bytes += freed as u64;
        }
        self.cache_bytes.set(self.cache_bytes.get().saturating_sub(bytes));
        // All of the queue, but only once per segment that compaction writes.
        self.cache_order.borrow_mut().retain(|(id, _)| {
            let gone = *id == group.id && count > 0;
            count -= usize::from(gone);
            !gone
        });
    }

    /// A segment, opened past the page cache: what is read and written goes through `Disk`.
    pub fn file(&self, group: &Group, base: i64) -> io::Result<File> {
        self.segment_file(group, SegmentName::plain(base))
    }

    pub fn segment_file(&self, group: &Group, name: SegmentName) -> io::Result<File> {
        let mut cache = self.open_files.borrow_mut();
        cache.clock += 1;
        let clock = cache.clock;
        if let Some(open) = cache.files.get_mut(&(group.id, name)) {
            open.used = clock;
            return Ok(open.file.clone());
        }
        let mode = Mode { write: true, direct: true, ..Mode::default() };
        let file = self.files.open(&group.segment_path(name), mode)?;
        self.remember(&mut cache, (group.id, name), file.clone());
        Ok(file)
    }

    pub fn create_file(&self, group: &Group, base: i64) -> io::Result<File> {
        let mode = Mode { write: true, create: true, direct: true, ..Mode::default() };
        let file = self.files.open(&group.log_path(base), mode)?;
        let mut cache = self.open_files.borrow_mut();
        cache.clock += 1;
        self.remember(&mut cache, (group.id, SegmentName::plain(base)), file.clone());
        Ok(file)
    }

    fn remember(&self, cache: &mut FileCache, key: (u64, SegmentName), file: File) {
        if cache.files.len() >= OPEN_FILES
            && let Some(oldest) = cache.files.iter().min_by_key(|(_, open)| open.used).map(|(key, _)| *key)
        {
            cache.files.remove(&oldest);
        }
        cache.files.insert(key, OpenSegment { file, used: cache.clock, last_block: None });
    }

    /// An append takes it and, if it succeeded, leaves it. One that is not there costs the append a read.
    pub fn take_last_block(&self, group: GroupId, base: i64) -> LastBlock {
        let mut cache = self.open_files.borrow_mut();
        cache
            .files
            .get_mut(&(group, SegmentName::plain(base)))
            .and_then(|open| open.last_block.take())
            .unwrap_or_default()
    }

    pub fn leave_last_block(&self, group: GroupId, base: i64, last: LastBlock) {
        let key = (group, SegmentName::plain(base));
        if let Some(open) = self.open_files.borrow_mut().files.get_mut(&key) {
            open.last_block = Some(last);
        }
    }

    pub fn forget_file(&self, group: GroupId, base: i64) {
        self.open_files.borrow_mut().files.retain(|(of, name), _| *of != group || name.base != base);
    }

    /// Removes a file or directory once the commit is safe that makes it worthless. One in the directory of a partition
    /// goes with that, should the partition be deleted before.
    pub fn throw_away(&self, path: PathBuf, after: (Lane, Lsn), of: Option<Rc<Group>>) {
        self.trash.borrow_mut().push_back(Trash { path, after, of });
        self.trash_wake.notify_one();
    }

    fn is_leaving(&self, dir_name: &str) -> bool {
        self.leaving.lock().expect("no panic under this lock").contains(dir_name)
    }

    fn leaves(&self, dir_name: &str) {
        self.leaving.lock().expect("no panic under this lock").insert(dir_name.to_owned());
    }

    fn has_left(&self, dir_name: &str) {
        self.leaving.lock().expect("no panic under this lock").remove(dir_name);
    }

    /// `None`: the ring is full to its last reserve.
    pub fn record_deletion(&self, group: GroupId) -> Option<Lsn> {
        let record = RecordHeader { kind: GROUP_DELETE, group, index: 0, term: 0, offset: 0 };
        if mutant::is(Mutant::ForgetsDeletion) {
            return Some(self.durable_lsn(Lane::Durable));
        }
        let placed = self.wal(Lane::Durable).append(&self.next_lsn, &record, &[], Class::System);
        placed.ok().map(|(lsn, _)| lsn)
    }

    pub fn segments_root(&self) -> PathBuf {
        self.root.join("log")
    }
}

/// Runs a task without which the shard only seems to live: should it panic, which is a broken invariant, the log fails, and
/// nobody waits for ever.
fn keep_running(shard: &Rc<Shard>, what: &'static str, task: impl Future<Output = ()> + 'static) {
    let (running, shard) = (tokio::task::spawn_local(task), Rc::clone(shard));
    tokio::task::spawn_local(async move {
        if let Err(error) = running.await
            && error.is_panic()
        {
            shard.poison(&format!("{what} met a broken invariant and ended"));
        }
    });
}

async fn empty_trash(shard: Rc<Shard>) {
    while shard.is_live() {
        let Some(Trash { path, after: (lane, lsn), of }) = shard.trash.borrow_mut().pop_front() else {
            shard.trash_wake.notified().await;
            continue;
        };
        if !mutant::is(Mutant::RemovesBeforeRecordIsSafe) && shard.wait_safe(lane, lsn).await.is_err() {
            return;
        }
        let alone = shard.removing.lock().await;
        if of.is_some_and(|group| group.deleted.get()) {
            continue;
        }
        let (shown, files) = (path.clone(), shard.files.clone());
        let removed = shard.disk.off_thread(move || remove(&files, &path)).await;
        match removed {
            Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %shown.display(), %error, "could not remove; the next start tries again");
            }
            _ => {}
        }
        drop(alone);
        tokio::time::sleep(UNLINK_PAUSE).await;
    }
}

fn remove(files: &FileSystem, path: &Path) -> io::Result<()> {
    if files.is_dir(path) { files.remove_dir_all(path) } else { files.remove_file(path) }
}

/// One shard's log. Cheap to clone; stays on the thread that opened it.
#[derive(Clone)]
pub struct ShardStore {
    shard: Rc<Shard>,
}

impl std::fmt::Debug for ShardStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardStore").field("shard", &self.shard.config.shard).finish_non_exhaustive()
    }
}

impl ShardStore {
    /// After `DataDir::recover`, on the shard's thread, inside its `LocalSet`: spawns the writer and the flusher there.
    pub async fn open(dir: &DataDir, config: StoreConfig) -> Result<ShardStore, OpenError> {
        let kind = match config.io {
            IoKind::Auto => DiskKind::Auto,
            IoKind::Uring => DiskKind::Uring,
            IoKind::Sync => DiskKind::Sync,
        };
        let disk = Disk::open_for(dir.files(), kind).map_err(|error| OpenError::Uring(error.0))?;
        Self::open_on(dir, config, disk).await
    }

    /// As `open`, on a disk of the caller's choice (one with faults, in tests).
    pub async fn open_on(dir: &DataDir, config: StoreConfig, disk: Disk) -> Result<ShardStore, OpenError> {
        if config.wal_file_bytes < MIN_WAL_FILE_BYTES || config.wal_files_max < MIN_WAL_FILES {
            return Err(OpenError::Config(format!(
                "a WAL ring needs at least {MIN_WAL_FILES} files of {MIN_WAL_FILE_BYTES} bytes"
            )));
        }
        let wal_id = dir.wal_id().ok_or(OpenError::NotRecovered)?;
        let (root, files) = (dir.path().to_owned(), dir.files().clone());
        let shard_number = u32::try_from(config.shard)
            .map_err(|_| OpenError::Config("shard number out of range".to_owned()))?;
        let file_bytes = config.wal_file_bytes.next_multiple_of(4096);
        let wal = |lane: Lane| {
            let name = match lane {
                Lane::Durable => format!("{shard_number}"),
                Lane::Os => format!("{shard_number}-os"),
                Lane::Direct => unreachable!("it has no log"),
            };
            let path = root.join("wal").join(name);
            files.create_dir_all(&path).map_err(|source| OpenError::Io {
                path: path.display().to_string(),
                action: "creating the directory",
                source,
            })?;
            let ids = (wal_id, crate::data_dir::boot_id(&files));
            Ok::<_, OpenError>(Wal::new(
                lane,
                files.clone(),
                path,
                shard_number,
                ids,
                file_bytes,
                config.wal_files_max,
            ))
        };
        let wals = [wal(Lane::Durable)?, wal(Lane::Os)?];
        let wal_root = root.join("wal");
        files.sync_dir(&wal_root).map_err(|source| OpenError::Io {
            path: wal_root.display().to_string(),
            action: "syncing the directory",
            source,
        })?;
        if disk.description() != "io_uring" {
            tracing::info!(shard = config.shard, io = disk.description(), "disk driver");
        }
        let shard = Rc::new(Shard {
            config,
            root,
            wal_id,
            files,
            disk,
            wals,
            os_started: Cell::new(false),
            groups: RefCell::default(),
            next_lsn: Cell::new(1),
            durable: Default::default(),
            durable_changed: Default::default(),
            direct: Direct::default(),
            poisoned: RefCell::new(None),
            closing: Cell::new(false),
            closed: Cell::new(false),
            cache_order: RefCell::default(),
            cache_bytes: Cell::new(0),
            unflushed_bytes: Cell::new(0),
            flush_queue: RefCell::default(),
            flush_wake: Notify::new(),
            evicts_next: RefCell::default(),
            flush_lock: tokio::sync::Mutex::new(()),
            compacting: tokio::sync::Mutex::new(()),
            syncing: dir.syncing(),
            leaving: dir.leaving(),
            open_files: RefCell::default(),
            read_ahead: RefCell::default(),
            loaded_indexes: RefCell::default(),
            no_space: Cell::new(false),
            log_dir_dirty: Cell::new(false),
            tombstones: RefCell::default(),
            trash: RefCell::default(),
            removing: tokio::sync::Mutex::new(()),
            trash_wake: Notify::new(),
            counters: Counters::default(),
            _lock: dir.lock(),
        });
        keep_running(&shard, "the writer of the log", wal::write_blocks(Rc::clone(&shard), Lane::Durable));
        keep_running(&shard, "the filling of the log's files", wal::fill_zeros(Rc::clone(&shard)));
        keep_running(&shard, "the flusher", flush::run(Rc::clone(&shard)));
        keep_running(&shard, "the answering of direct runs", direct::acknowledge(Rc::clone(&shard)));
        keep_running(&shard, "the removal of files", empty_trash(Rc::clone(&shard)));
        Ok(ShardStore { shard })
    }

    /// Takes over a partition that recovery found.
    pub fn attach(&self, recovered: RecoveredGroup, config: GroupConfig) -> GroupLog {
        let group = Rc::new(Group::attach(&self.shard, recovered, config));
        self.insert(group)
    }

    fn insert(&self, group: Rc<Group>) -> GroupLog {
        let mut groups = self.shard.groups.borrow_mut();
        assert!(!groups.contains_key(&group.id), "group {} is attached twice", group.id);
        groups.insert(group.id, Rc::clone(&group));
        for wal in &self.shard.wals {
            wal.set_groups(groups.len());
        }
        GroupLog { shard: Rc::clone(&self.shard), group }
    }

    /// Creates an empty partition. It is durable with the first commit that follows.
    pub fn create(
        &self,
        group_id: GroupId,
        dir_name: &str,
        config: GroupConfig,
    ) -> Result<GroupLog, CreateError> {
        let shard = &self.shard;
        if let Some(reason) = &*shard.poisoned.borrow() {
            return Err(CreateError::Poisoned(reason.clone()));
        }
        if shard.groups.borrow().contains_key(&group_id) {
            return Err(CreateError::GroupExists(group_id));
        }
        if !valid_dir_name(dir_name) {
            return Err(CreateError::BadName(dir_name.to_owned()));
        }
        if shard.is_leaving(dir_name) {
            return Err(CreateError::DirectoryExists(dir_name.to_owned()));
        }
        let path = shard.segments_root().join(dir_name);
        match shard.files.create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(CreateError::DirectoryExists(dir_name.to_owned()));
            }
            Err(error) if is_no_space(&error) => return Err(CreateError::NoSpace),
            Err(source) => return Err(CreateError::Io { path: path.display().to_string(), source }),
        }
        // That a partition exists is always durable; one of the os lane goes there once this is done.
        let state = GroupState::new(group_id, dir_name);
        let record = RecordHeader { kind: GROUP_STATE, group: group_id, index: 0, term: 0, offset: 0 };
        let wal = shard.wal(Lane::Durable);
        let Ok((lsn, file_seq)) = wal.append(&shard.next_lsn, &record, &state.encode(), Class::Stage) else {
            let _ = shard.files.remove_dir(&path);
            return Err(CreateError::NoSpace);
        };
        shard.log_dir_dirty.set(true);
        let group = Rc::new(Group::create(shard, group_id, dir_name, config, lsn));
        group.touch(wal, file_seq);
        wal.wake_writer();
        Ok(self.insert(group))
    }

    pub fn group(&self, group_id: GroupId) -> Option<GroupLog> {
        self.shard.group(group_id).map(|group| GroupLog { shard: Rc::clone(&self.shard), group })
    }

    /// Deletes a partition. When this returns, no restart brings it back; its files go in the background.
    pub async fn delete(&self, group_id: GroupId) -> Result<(), DeleteError> {
        let shard = &self.shard;
        let group = shard.group(group_id).ok_or(DeleteError::Unknown(group_id))?;
        // Takes no more entries; the second of two deletions finds nothing to do.
        if group.deleting.replace(true) {
            return Err(DeleteError::Unknown(group_id));
        }
        // Not while a run of it is on its way to a segment, nor while a WAL file retires: until the new name is sure, a
        // restart would find the partition, and all of its records with it.
        let alone = (shard.flush_lock.lock().await, shard.removing.lock().await);
        let root = shard.segments_root();
        let from = root.join(group.dir_name());
        let to = root.join(format!("{}.{group_id}.deleted", group.dir_name()));
        let (files, renamed) = (shard.files.clone(), to.clone());
        shard.leaves(group.dir_name());
        let rename = shard.disk.off_thread(move || files.rename(&from, &renamed)).await;
        if let Err(source) = rename.and_then(|result| result) {
            shard.has_left(group.dir_name());
            group.deleting.set(false);
            return Err(DeleteError::Io { path: to.display().to_string(), source });
        }
        let files = shard.files.clone();
        let mut syncing = shard.sync_alone().await?;
        let synced = shard.disk.off_thread(move || files.sync_dir(&root)).await;
        if let Err(error) = synced.and_then(|result| result) {
            // Nobody knows which name is on the disk.
            shard.sync_failed(&mut syncing, &to, &error);
        }
        drop(syncing);
        failpoint::pass(Failpoint::DeletionRenamed);
        shard.groups.borrow_mut().remove(&group_id);
        group.mark_deleted(shard);
        for base in group.segment_bases() {
            shard.forget_file(group_id, base);
        }
        if group.was_recovered || shard.wal(Lane::Os).has_records_of(group_id) {
            let tombstone = Tombstone { group: group_id, is_saved: group.was_recovered };
            shard.tombstones.borrow_mut().push(tombstone);
        }
        drop(alone);
        let lsn = shard.record_deletion(group_id).ok_or(StageError::NoSpace)?;
        shard.wal(Lane::Durable).wake_writer();
        shard.wait_durable(Lane::Durable, lsn).await?;
        shard.has_left(group.dir_name());
        failpoint::pass(Failpoint::DeletionRecorded);
        shard.throw_away(to, (Lane::Durable, lsn), None);
        Ok(())
    }

    /// Everything staged in this lane under this LSN or a lower one is as safe as its topic asked for.
    pub fn durable_lsn(&self, lane: Lane) -> Lsn {
        self.shard.durable_lsn(lane)
    }

    /// Waits until the lane's durable LSN is above `seen`.
    pub async fn next_durable(&self, lane: Lane, seen: Lsn) -> Result<Lsn, LogPoisoned> {
        self.shard.next_durable(lane, seen).await
    }

    /// Moves everything committed to segments, writes snapshots and checkpoints, and ends the background tasks. Nothing
    /// may be staged afterwards.
    pub async fn shutdown(&self) -> Result<(), ShutdownError> {
        let result = stop::shut_down(&self.shard).await;
        self.shard.closed.set(true);
        self.shard.wake_everybody();
        result
    }

    pub fn stats(&self) -> StoreStats {
        let shard = &self.shard;
        let counters = &shard.counters;
        StoreStats {
            bytes_appended: counters.bytes_appended.get(),
            batches_appended: counters.batches_appended.get(),
            wal_bytes_written: counters.wal_bytes.get(),
            wal_commits: counters.wal_commits.get(),
            segment_bytes_written: counters.segment_bytes.get(),
            segment_syncs: counters.segment_syncs.get(),
            compaction_bytes_read: counters.compaction_read.get(),
            compaction_bytes_written: counters.compaction_written.get(),
            compactions: counters.compactions.get(),
            cache_bytes: shard.cache_bytes.get(),
            unflushed_bytes: shard.unflushed_bytes.get(),
            wal_files_in_use: LANES.iter().map(|lane| shard.wal(*lane).files_in_use()).sum(),
            wal_files_retired: counters.files_retired.get(),
            groups: shard.groups.borrow().len() as u64,
            open_files: shard.open_files.borrow().files.len() as u64,
            no_space: shard.no_space.get(),
            poisoned: shard.is_poisoned(),
            commit_time_buckets: *counters.commit_buckets.borrow(),
            commit_time_sum_us: counters.commit_sum_us.get(),
            io: shard.disk.description().to_owned(),
        }
    }
}
