//! One lane of a shard's write-ahead log: the blocks being filled, the writer task, and the files of the ring.
//!
//! Runs on the shard thread. `append` is synchronous and copies into the block that is filling; the writer takes blocks
//! in order and has one write in flight, so everything staged meanwhile shares the next one (group commit without a
//! timer). The durable lane writes through the ring; the os lane copies into the page cache where it stands, which has
//! no wait to hide. A failed write poisons the shard; it is never retried, because the disk may have lost earlier bytes
//! with it.
//!
//! How long a commit waits. A commit costs some 40 microseconds of CPU however much is in it, so under load fewer and
//! larger ones are better. There is no clock per batch and no measure of load for that: a commit that comes within
//! `COMMIT_INTERVAL` of the one before is held back for one turn of the event loop, and again as long as turns keep
//! bringing entries. On a busy thread every turn brings some, so the interval is the least time between commits; on an
//! idle one the first turn brings none, and the commit starts some microseconds later than it could have.
//!
//! Does not decide when files are retired (`flush.rs`, `retire.rs`) nor what counts after a crash (`wal_format.rs`).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use flumen_io::{AlignedBuf, File, FileSystem, Mode};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::mutant::{self, Mutant};
use crate::ring::{Class, Plan};
use crate::store::Shard;
use crate::types::{GroupId, Lane, LogPoisoned, Lsn};
use crate::wal_format::{
    BLOCK_HEADER_BYTES, BlockHeader, Bloom, RECORD_HEADER_BYTES, RecordHeader, block_bytes, write_record,
};

/// Where a commit stops growing: at 1 MiB the disk's transfer time exceeds its latency, more would only add delay.
const COMMIT_BYTES: usize = 1 << 20;

/// Buffers kept for reuse: one in flight, one filling, two to ride out a slow commit.
const SPARE_BUFFERS: usize = 4;

/// How far the zero-filled part of a fresh file leads the writer at least: some tens of milliseconds at full speed.
const ZERO_AHEAD_BYTES: u64 = 8 << 20;
/// Zeros that share one sync. The sync is a commit of the file system's journal, which other writes feel for
/// milliseconds: one a MiB was the p99 of a fresh broker.
const ZERO_BATCH_BYTES: u64 = 16 << 20;
/// One write of zeros: a commit behind it waits for a quarter of a millisecond and not for four times that.
const ZERO_CHUNK_BYTES: u64 = 256 << 10;

/// See the module header. At 400 microseconds a commit is a tenth of a busy core, and the wait is what the slowest of the
/// disks this is for needs anyway.
const COMMIT_INTERVAL: Duration = Duration::from_micros(400);

/// Files in use before the oldest is emptied: the longer entries stay, the larger the runs that go to segments, and the
/// longer a restart after a crash reads.
const FILES_KEPT: u64 = 3;

/// Runs of 256 KiB to 1 MiB that keep a fast disk busy.
const PRESSED_RUNS_IN_FLIGHT: usize = 8;

/// Pause between tries to get space for a WAL file.
const NO_SPACE_PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(crate) struct Full;

struct Block {
    buf: AlignedBuf,
    /// Header and records so far.
    len: usize,
    lsn: Lsn,
    sequence: u64,
    file_seq: u64,
    slot: usize,
    position: u64,
    oldest_live: u64,
    groups: Bloom,
    /// Whom the last record belongs to: a run of one group enters the filter once.
    last_group: GroupId,
}

impl Block {
    fn note_group(&mut self, group: GroupId) {
        if self.last_group != group {
            self.last_group = group;
            self.groups.insert(group);
        }
    }
}

struct SlotFile {
    file: File,
    /// Up to here the file has been written once, so that writing again changes no metadata.
    zeroed: u64,
}

struct State {
    plan: Plan,
    queue: VecDeque<Block>,
    /// The block at the back takes more records.
    open: bool,
    in_flight: Option<Lsn>,
    next_sequence: u64,
    /// First sequence of each file in use, oldest first.
    files: VecDeque<(u64, u64)>,
    touched: BTreeMap<u64, Vec<GroupId>>,
    spare: Vec<AlignedBuf>,
    previous_groups: Bloom,
    previous_payload_crc: u32,
    slots: Vec<Option<SlotFile>>,
    /// Slot of each file that may not be written over.
    slot_of: Vec<(u64, usize)>,
    /// Slot and range that is being filled with zeros.
    zeroing: Option<(usize, u64, u64)>,
}

pub(crate) struct Wal {
    pub lane: Lane,
    file_system: FileSystem,
    dir: PathBuf,
    shard: u32,
    wal_id: u64,
    boot_id: u64,
    file_bytes: u64,
    files_max: u64,
    state: RefCell<State>,
    /// Records so far.
    appended: Cell<u64>,
    wake: Notify,
    writer_idle: Cell<bool>,
    /// The writer waits for more, up to `LINGER`, since nobody waits for what there is; `hurry` ends that.
    lingers: Cell<bool>,
    hurry: Notify,
    zero_wake: Notify,
    zero_done: Notify,
    /// A file for the ring could not be made; entering it is refused until that works.
    pub no_space: Cell<bool>,
    /// The next durable commit must find this (os) lane on the disk up to this LSN: a partition changed its durability.
    owed_to_durable: Cell<Option<Lsn>>,
    /// Written and not synced since; os lane only.
    unsynced: Cell<bool>,
    /// Held over a sync, so that nobody takes one that is under way for done.
    syncing: tokio::sync::Mutex<()>,
}

impl Wal {
    pub fn new(
        lane: Lane,
        file_system: FileSystem,
        dir: PathBuf,
        shard: u32,
        (wal_id, boot_id): (u64, u64),
        file_bytes: u64,
        files_max: usize,
    ) -> Self {
        Self {
            lane,
            file_system,
            dir,
            shard,
            wal_id,
            boot_id,
            file_bytes,
            files_max: files_max as u64,
            state: RefCell::new(State {
                plan: Plan::new(file_bytes, files_max as u64),
                queue: VecDeque::new(),
                open: false,
                in_flight: None,
                next_sequence: 1,
                files: VecDeque::new(),
                touched: BTreeMap::new(),
                spare: Vec::new(),
                previous_groups: Bloom::default(),
                previous_payload_crc: 0,
                slots: (0..files_max).map(|_| None).collect(),
                slot_of: Vec::new(),
                zeroing: None,
            }),
            appended: Cell::new(0),
            wake: Notify::new(),
            writer_idle: Cell::new(false),
            lingers: Cell::new(false),
            hurry: Notify::new(),
            zero_wake: Notify::new(),
            zero_done: Notify::new(),
            no_space: Cell::new(false),
            owed_to_durable: Cell::new(None),
            unsynced: Cell::new(false),
            syncing: tokio::sync::Mutex::new(()),
        }
    }

    pub fn set_groups(&self, groups: usize) {
        self.state.borrow_mut().plan.set_groups(groups);
    }

    /// Copies a record into the filling block. Returns the commit it will be part of and its file.
    pub fn append(
        &self,
        next_lsn: &Cell<Lsn>,
        record: &RecordHeader,
        payload: &[u8],
        class: Class,
    ) -> Result<(Lsn, u64), Full> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        self.appended.set(self.appended.get() + 1);
        let need = RECORD_HEADER_BYTES + payload.len();
        if state.open {
            let block = state.queue.back_mut().expect("an open block is at the back of the queue");
            let len = block.len + need;
            if len <= block.buf.len()
                && state.plan.may_grow(block.position, len.next_multiple_of(4096) as u64, class)
            {
                write_record(&mut block.buf[block.len..], record, payload);
                block.len = len;
                block.note_group(record.group);
                return Ok((block.lsn, block.file_seq));
            }
        }
        let bytes = block_bytes(need);
        // What the open block takes is only known when it closes; it must close before a new one is placed.
        state.close();
        let (file_seq, position) = state.plan.place(bytes as u64, class).ok_or(Full)?;
        if file_seq != state.plan.file_seq && self.refuses_file(state, class) {
            return Err(Full);
        }
        let slot = state.slot(file_seq);
        let buf = if bytes > COMMIT_BYTES {
            AlignedBuf::zeroed(bytes)
        } else {
            state.spare.pop().unwrap_or_else(|| AlignedBuf::zeroed(COMMIT_BYTES))
        };
        if state.files.back().is_none_or(|(last, _)| *last != file_seq) {
            state.files.push_back((file_seq, state.next_sequence));
        }
        let lsn = next_lsn.get();
        next_lsn.set(lsn + 1);
        let mut block = Block {
            buf,
            len: BLOCK_HEADER_BYTES + need,
            lsn,
            sequence: state.next_sequence,
            file_seq,
            slot,
            position,
            oldest_live: state.files.front().map_or(state.next_sequence, |(_, first)| *first),
            groups: Bloom::default(),
            last_group: record.group,
        };
        state.next_sequence += 1;
        block.groups.insert(record.group);
        write_record(&mut block.buf[BLOCK_HEADER_BYTES..], record, payload);
        state.plan.file_seq = file_seq;
        state.plan.position = position;
        state.queue.push_back(block);
        state.open = true;
        Ok((lsn, file_seq))
    }

    /// The next record goes to a commit with a number above every other there is: for a group whose last record is in
    /// the other lane, since replay goes by these numbers.
    pub fn begin_after(&self, newest: Lsn) {
        let mut state = self.state.borrow_mut();
        if state.open && state.queue.back().is_some_and(|block| block.lsn < newest) {
            state.close();
        }
    }

    fn refuses_file(&self, state: &State, class: Class) -> bool {
        // A file that exists is recycled and needs no space.
        class != Class::System
            && self.no_space.get()
            && state.free_slot().is_none_or(|slot| state.slots[slot].is_none())
    }

    /// Whether a batch of `len` bytes may be accepted now: whether it would be taken, and as much again as is accepted at
    /// the same time.
    pub fn has_room(&self, len: usize) -> bool {
        self.has_room_for(len, len, 1)
    }

    /// The same for several batches.
    pub fn has_room_for(&self, total: usize, largest: usize, count: usize) -> bool {
        let margin = self.state.borrow().plan.margin() as usize;
        self.fits_all(total + margin, largest, count)
    }

    /// Whether entries of `total` bytes together, none above `largest`, surely fit.
    pub fn fits_all(&self, total: usize, largest: usize, count: usize) -> bool {
        let state = self.state.borrow();
        let plan = &state.plan;
        let largest_block = block_bytes(RECORD_HEADER_BYTES + largest) as u64;
        if largest_block > plan.largest() {
            return false;
        }
        // The open block, each file's end and each block's padding may be lost; what counts is a bound.
        let padding = (2 * total / COMMIT_BYTES + 2) * (4096 + BLOCK_HEADER_BYTES);
        let mut need = (total + count * RECORD_HEADER_BYTES + padding) as u64;
        let open_bytes = match (state.open, state.queue.back()) {
            (true, Some(block)) => block.len.next_multiple_of(4096) as u64,
            _ => 0,
        };
        let mut file_seq = plan.file_seq;
        let mut position = plan.position + open_bytes;
        loop {
            let mut probe = plan.clone();
            (probe.file_seq, probe.position) = (file_seq, position);
            if probe.may_grow(position, need, Class::Stage) {
                return true;
            }
            need = need.saturating_sub(self.file_bytes.saturating_sub(position + largest_block));
            probe.position = self.file_bytes;
            match probe.place(largest_block, Class::Stage) {
                Some((next, _)) if !self.refuses_file(&state, Class::Stage) => {
                    (file_seq, position) = (next, 0);
                }
                _ => return false,
            }
        }
    }

    pub fn largest_record(&self) -> usize {
        let block = self.state.borrow().plan.largest() as usize;
        block.saturating_sub(BLOCK_HEADER_BYTES + RECORD_HEADER_BYTES + 4096)
    }

    /// A group has records in a file; called once per group and file.
    pub fn touch(&self, file_seq: u64, group: GroupId) {
        self.state.borrow_mut().touched.entry(file_seq).or_default().push(group);
    }

    /// Whether a file that is not retired has records of a group.
    pub fn has_records_of(&self, group: GroupId) -> bool {
        self.state.borrow().touched.values().any(|groups| groups.contains(&group))
    }

    /// No durable commit from the one that is filling on is written before everything up to `lsn` here is on the disk.
    pub fn sync_before_durable(&self, lsn: Lsn) {
        self.owed_to_durable.set(self.owed_to_durable.get().max(Some(lsn)));
    }

    pub fn wake_writer(&self) {
        if self.lingers.replace(false) {
            self.hurry.notify_one();
        }
        if self.writer_idle.replace(false) {
            self.wake.notify_one();
        }
    }

    /// For records that nobody waits for: they are written with others that are, or when a block is full, or after
    /// `LINGER`.
    pub fn wake_writer_later(&self) {
        if self.state.borrow().queue.len() > 1 {
            self.wake_writer();
        } else if self.writer_idle.replace(false) {
            self.lingers.set(true);
            self.wake.notify_one();
        }
    }

    pub fn wake_all(&self) {
        self.wake.notify_one();
        self.hurry.notify_one();
        self.zero_wake.notify_one();
        self.zero_done.notify_waiters();
    }

    /// The newest commit of this lane that is not done.
    pub fn newest_pending(&self) -> Option<Lsn> {
        let state = self.state.borrow();
        state.queue.back().map(|block| block.lsn).or(state.in_flight)
    }

    pub fn files_in_use(&self) -> u64 {
        let state = self.state.borrow();
        if state.files.is_empty() { 0 } else { state.plan.files_in_use() }
    }

    /// The ring is so full that its oldest file should be emptied.
    /// Runs that go to segments at the same time. One, as more of them would stand between a commit and the disk; but a
    /// ring that grows beyond what is kept anyway shows that one is not enough, and producers will soon wait for room.
    pub fn runs_in_flight(&self) -> usize {
        if self.files_in_use() > FILES_KEPT { PRESSED_RUNS_IN_FLIGHT } else { 1 }
    }

    pub fn wants_retirement(&self) -> bool {
        self.files_in_use() >= FILES_KEPT.min(self.files_max - 1)
    }

    /// The oldest file in use that the writer has left for good, and the groups with records in it.
    pub fn retirable(&self) -> Option<(u64, Vec<GroupId>)> {
        let state = self.state.borrow();
        let (file_seq, _) = *state.files.front()?;
        if state.files.len() < 2 {
            return None;
        }
        Some((file_seq, state.touched.get(&file_seq).cloned().unwrap_or_default()))
    }

    /// From the filling block on, blocks say that the oldest file is no longer needed. The caller has just appended to
    /// that block, in the same turn, the last record that makes this true.
    pub fn announce_retired(&self, file_seq: u64) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        assert_eq!(state.files.front().map(|(seq, _)| *seq), Some(file_seq), "files retire in order");
        assert!(state.open, "the caller has just appended");
        state.files.pop_front();
        state.touched.remove(&file_seq);
        let first = state.files.front().map(|(_, first)| *first);
        if let (Some(block), Some(first)) = (state.queue.back_mut(), first) {
            block.oldest_live = first;
        }
    }

    /// The announcement is durable: the file's slot may be written over.
    pub fn retired(&self, file_seq: u64) {
        let mut state = self.state.borrow_mut();
        state.plan.oldest = file_seq + 1;
        state.slot_of.retain(|(known, _)| *known != file_seq);
        drop(state);
        self.wake_writer();
    }

    pub fn files(&self) -> Vec<File> {
        self.state.borrow().slots.iter().flatten().map(|slot| slot.file.clone()).collect()
    }

    /// Opens or makes the file of a slot. Plain system calls: happens once per slot and run.
    fn open_slot(&self, slot: usize) -> io::Result<File> {
        if let Some(open) = &self.state.borrow().slots[slot] {
            return Ok(open.file.clone());
        }
        let durable = self.lane == Lane::Durable;
        let path = self.dir.join(format!("{slot:08}.wal"));
        let mode = Mode { write: true, create: true, direct: durable, dsync: durable };
        let file = self.file_system.open(&path, mode)?;
        if file.len()? != self.file_bytes {
            file.set_len(0)?;
            if let Err(error) = file.allocate(self.file_bytes) {
                // What was reserved goes back.
                file.set_len(0)?;
                return Err(error);
            }
            file.sync_all()?;
        }
        // Also the name of one that was there: a run that ended before this may have made it.
        if !mutant::is(Mutant::SkipsNameOfFormerRun) {
            self.file_system.sync_dir(&self.dir)?;
        }
        let zeroed = if durable { file.written_until()?.min(self.file_bytes) } else { self.file_bytes };
        self.state.borrow_mut().slots[slot] = Some(SlotFile { file: file.clone(), zeroed });
        Ok(file)
    }

    /// The next block to write, closed.
    fn take(&self) -> Option<Block> {
        let mut state = self.state.borrow_mut();
        if state.open && state.queue.len() == 1 {
            state.close();
        }
        let block = state.queue.pop_front()?;
        state.in_flight = Some(block.lsn);
        Some(block)
    }

    fn seal(&self, block: &mut Block) -> usize {
        let mut state = self.state.borrow_mut();
        let payload_crc = crc32c::crc32c(&block.buf[BLOCK_HEADER_BYTES..block.len]);
        let header = BlockHeader {
            lane: self.lane as u16,
            shard: self.shard,
            payload_len: (block.len - BLOCK_HEADER_BYTES) as u32,
            wal_id: self.wal_id,
            boot_id: self.boot_id,
            sequence: block.sequence,
            lsn: block.lsn,
            file_seq: block.file_seq,
            oldest_live: block.oldest_live,
            groups: block.groups,
            previous_groups: state.previous_groups,
            payload_crc,
            previous_payload_crc: state.previous_payload_crc,
        };
        header.encode(&mut block.buf);
        state.previous_groups = block.groups;
        state.previous_payload_crc = payload_crc;
        let bytes = block.len.next_multiple_of(4096);
        // What an earlier use left behind stays off the disk.
        block.buf[block.len..bytes].fill(0);
        bytes
    }

    fn done(&self, block: Block) {
        let mut state = self.state.borrow_mut();
        state.in_flight = None;
        if block.buf.len() == COMMIT_BYTES && state.spare.len() < SPARE_BUFFERS {
            state.spare.push(block.buf);
        }
    }

    fn zeroing_overlaps(&self, block: &Block, bytes: u64) -> bool {
        self.state.borrow().zeroing.is_some_and(|(slot, from, to)| {
            slot == block.slot && from < block.position + bytes && block.position < to
        })
    }

    /// Next part of a fresh file to fill with zeros, up to `lead` ahead of everything planned.
    fn next_zeros(&self, lead: u64) -> Option<(usize, File, u64, u64)> {
        let state = self.state.borrow();
        let planned = match (state.open, state.queue.back()) {
            (true, Some(block)) => block.position + block.len.next_multiple_of(4096) as u64,
            _ => state.plan.position,
        };
        let lead_to = planned + lead;
        let current = state.slot_of.iter().find(|(seq, _)| *seq == state.plan.file_seq);
        let here = (current.map(|(_, slot)| *slot), planned, lead_to.min(self.file_bytes));
        let beyond = lead_to.saturating_sub(self.file_bytes).min(self.file_bytes);
        let next = (state.free_slot(), 0, beyond);
        for (slot, from, to) in [here, next] {
            let Some((number, slot)) = slot.and_then(|slot| Some((slot, state.slots.get(slot)?.as_ref()?)))
            else {
                continue;
            };
            let from = slot.zeroed.max(from);
            if from < to {
                let to = (from + ZERO_CHUNK_BYTES).min(self.file_bytes);
                return Some((number, slot.file.clone(), from, to));
            }
        }
        None
    }

    /// The slot of the next file, when it will be needed soon and does not exist yet.
    fn wants_next_file(&self) -> Option<usize> {
        let state = self.state.borrow();
        let near = state.plan.position + ZERO_AHEAD_BYTES.min(self.file_bytes / 2) > self.file_bytes;
        let slot = state.free_slot().filter(|slot| near && state.slots[*slot].is_none());
        slot.filter(|_| state.plan.file_seq + 1 < state.plan.oldest + self.files_max)
    }
}

impl State {
    /// Where the next file would go: a file that exists before one that has to be made.
    fn free_slot(&self) -> Option<usize> {
        let free = |slot: &usize| self.slot_of.iter().all(|(_, used)| used != slot);
        let exists = |slot: &usize| self.slots[*slot].is_some();
        let all = 0..self.slots.len();
        all.clone().find(|slot| free(slot) && exists(slot)).or_else(|| all.clone().find(free))
    }

    fn slot(&mut self, file_seq: u64) -> usize {
        if let Some((_, slot)) = self.slot_of.iter().find(|(known, _)| *known == file_seq) {
            return *slot;
        }
        let slot = self.free_slot().expect("the plan never has more files in use than there are slots");
        self.slot_of.push((file_seq, slot));
        slot
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.open)
            && let Some(block) = self.queue.back()
        {
            self.plan.position = block.position + block.len.next_multiple_of(4096) as u64;
        }
    }
}

fn is_no_space(error: &io::Error) -> bool {
    crate::store::is_no_space(error)
}

/// What was acknowledged from memory is written this much later at most: that much of it a killed process loses.
const LINGER: Duration = Duration::from_millis(10);

/// Lets the event loop turn while that brings more for the next commit; see the module header.
async fn gather(wal: &Wal, last_start: Instant) {
    while last_start.elapsed() < COMMIT_INTERVAL && wal.state.borrow().queue.len() == 1 {
        let before = wal.appended.get();
        tokio::task::yield_now().await;
        if wal.appended.get() == before {
            return;
        }
    }
}

/// The writer of one lane; ends when the shard is closed or poisoned.
pub(crate) async fn write_blocks(shard: Rc<Shard>, lane: Lane) {
    let wal = shard.wal(lane);
    let mut last_start: Option<Instant> = None;
    while shard.is_live() {
        if wal.state.borrow().queue.is_empty() {
            wal.writer_idle.set(true);
            wal.wake.notified().await;
            continue;
        }
        if wal.lingers.get() {
            let _ = tokio::time::timeout(LINGER, wal.hurry.notified()).await;
            wal.lingers.set(false);
        }
        if let Some(last_start) = last_start {
            gather(wal, last_start).await;
        }
        let Some(mut block) = wal.take() else { continue };
        let file = loop {
            match wal.open_slot(block.slot) {
                Ok(file) => {
                    if wal.no_space.replace(false) {
                        shard.note_space();
                    }
                    break file;
                }
                Err(error) if is_no_space(&error) => {
                    // Nothing of this block is on disk, so waiting is not a retry.
                    wal.no_space.set(true);
                    shard.note_no_space("making a WAL file", &error);
                    tokio::time::sleep(NO_SPACE_PAUSE).await;
                    if !shard.is_live() {
                        return;
                    }
                }
                Err(error) => {
                    shard.poison(&format!("opening a WAL file in {}: {error}", wal.dir.display()));
                    return;
                }
            }
        };
        wal.zero_wake.notify_one();
        let bytes = wal.seal(&mut block);
        while wal.zeroing_overlaps(&block, bytes as u64) {
            wal.zero_done.notified().await;
        }
        if lane == Lane::Durable
            && let Some(owed) = shard.wal(Lane::Os).owed_to_durable.take()
        {
            if shard.wait_durable(Lane::Os, owed).await.is_err() {
                return;
            }
            if sync_os_lane(&shard).await.is_err() {
                return;
            }
        }
        let start = Instant::now();
        last_start = Some(start);
        if mutant::is(Mutant::AcknowledgesEarly) {
            shard.note_commit(lane, block.lsn, 0, Duration::ZERO);
        }
        let result = match lane {
            Lane::Os => {
                wal.unsynced.set(true);
                shard.disk.write_now(&file, &block.buf[..bytes], block.position)
            }
            Lane::Durable | Lane::Direct => {
                let (buf, result) = shard.disk.write_at(&file, block.buf, bytes, block.position).await;
                block.buf = buf;
                result
            }
        };
        if let Err(error) = result
            && !mutant::is(Mutant::IgnoresFailedWrite)
        {
            shard.poison(&format!("writing {}: {error}", file.path().display()));
            return;
        }
        {
            let mut state = wal.state.borrow_mut();
            let end = block.position + bytes as u64;
            if let Some(slot) = &mut state.slots[block.slot]
                && slot.zeroed >= block.position
            {
                slot.zeroed = slot.zeroed.max(end);
            }
        }
        let (lsn, entered_file) = (block.lsn, block.position == 0);
        wal.done(block);
        shard.note_commit(lane, lsn, bytes as u64, start.elapsed());
        if entered_file {
            shard.wake_flusher();
        }
    }
}

/// Makes everything written to the os lane so far durable. A failure poisons the shard before anybody else gets to ask:
/// the kernel calls the pages clean now, and the next sync would find nothing to do.
pub(crate) async fn sync_os_lane(shard: &Rc<Shard>) -> Result<(), LogPoisoned> {
    let wal = shard.wal(Lane::Os);
    let _alone = wal.syncing.lock().await;
    shard.check_poison()?;
    if !wal.unsynced.replace(false) {
        return Ok(());
    }
    let mut alone = shard.sync_alone().await?;
    for file in wal.files() {
        if let Err(error) = shard.disk.fdatasync(&file).await {
            shard.sync_failed(&mut alone, file.path(), &error);
        }
        shard.check_poison()?;
    }
    Ok(())
}

/// Fills fresh files with zeros ahead of the writer, and makes the next file in time. Durable lane only: without a sync
/// per commit there is nothing to gain.
pub(crate) async fn fill_zeros(shard: Rc<Shard>) {
    let wal = shard.wal(Lane::Durable);
    let mut chunk = Some(AlignedBuf::zeroed(ZERO_CHUNK_BYTES as usize));
    let mut plain: Option<(usize, File)> = None;
    let mut unsynced_bytes = 0;
    while shard.is_live() {
        if let Some(next) = wal.wants_next_file() {
            match wal.open_slot(next) {
                Ok(_) => {
                    if wal.no_space.replace(false) {
                        shard.note_space();
                    }
                }
                Err(error) if is_no_space(&error) => {
                    wal.no_space.set(true);
                    shard.note_no_space("making a WAL file", &error);
                    tokio::time::sleep(NO_SPACE_PAUSE).await;
                    continue;
                }
                Err(error) => {
                    shard.poison(&format!("opening a WAL file in {}: {error}", wal.dir.display()));
                    return;
                }
            }
        }
        // Once it has begun it goes on until a whole batch is there.
        let lead = if unsynced_bytes == 0 { ZERO_AHEAD_BYTES } else { ZERO_AHEAD_BYTES + ZERO_BATCH_BYTES };
        let next = wal.next_zeros(lead);
        let same_file = next.as_ref().is_some_and(|next| plain.as_ref().is_some_and(|open| open.0 == next.0));
        if unsynced_bytes > 0 && (!same_file || unsynced_bytes >= ZERO_BATCH_BYTES) {
            unsynced_bytes = 0;
            let Ok(mut alone) = shard.sync_alone().await else { return };
            if let Some((_, file)) = &plain
                && let Err(error) = shard.disk.fdatasync(file).await
            {
                shard.sync_failed(&mut alone, file.path(), &error);
                return;
            }
            continue;
        }
        let Some((slot, file, from, to)) = next else {
            // Idle rings hold no memory for this.
            chunk = None;
            plain = None;
            wal.zero_wake.notified().await;
            continue;
        };
        // Without O_DSYNC: one sync at the end of a batch instead.
        if !same_file {
            let mode = Mode { write: true, create: false, direct: true, dsync: false };
            match wal.file_system.open(file.path(), mode) {
                Ok(file) => plain = Some((slot, file)),
                Err(error) => {
                    shard.poison(&format!("opening {}: {error}", file.path().display()));
                    return;
                }
            }
        }
        let Some((_, file)) = &plain else { continue };
        wal.state.borrow_mut().zeroing = Some((slot, from, to));
        let zeros = chunk.take().unwrap_or_else(|| AlignedBuf::zeroed(ZERO_CHUNK_BYTES as usize));
        let (zeros, result) = shard.disk.write_at(file, zeros, (to - from) as usize, from).await;
        chunk = Some(zeros);
        unsynced_bytes += to - from;
        {
            let mut state = wal.state.borrow_mut();
            state.zeroing = None;
            if let Some(slot) = &mut state.slots[slot] {
                slot.zeroed = slot.zeroed.max(to);
            }
        }
        wal.zero_done.notify_waiters();
        if let Err(error) = result {
            shard.poison(&format!("writing {}: {error}", file.path().display()));
            return;
        }
    }
}
