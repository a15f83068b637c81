//! One lane of a shard's write-ahead log: group commit into a ring of preallocated files.
//!
//! Entries are copied into the block that is being filled; while one block is on its way to the disk the
//! next one fills, so the number of entries per write follows the load and there is no timer. A block is
//! one write at a block boundary: `header | records | zeros`.
//!
//! Invariants
//! - Blocks of a lane are written in LSN order, one write in flight.
//! - A file is written from its start to its end exactly once per `file_seq`; its old content has lower
//!   numbers and is never taken for new.
//! - A file returns to the ring only when the store says that the segments it fed are synced.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use flumen_io::{AlignedBuf, BLOCK_BYTES, Disk, File, Mode};
use tokio::sync::Notify;

use crate::entry::{Lane, Lsn};
use crate::error::LogPoisoned;
use crate::wal_format::{self, BLOCK_HEADER_BYTES, BLOCK_PAYLOAD_MAX, BlockHeader};

/// A block is closed when it holds this much; larger entries get a block of their own.
const BLOCK_TARGET_BYTES: usize = 512 << 10;
/// Blocks waiting for the disk, in bytes, beyond which the store has no room for more.
const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Files of a lane at most, as a multiple of its normal ring: how far segments may lag behind the WAL.
const RING_GROWTH_MAX: usize = 8;
/// Zeroed before the first entry: the rest of a fresh file is unwritten extents, slower but no less safe.
const ZERO_AT_START_BYTES: usize = 4 << 20;
/// Written at once while a file is zeroed in the background: short enough not to hold up a commit.
const ZERO_STEP_BYTES: usize = 512 << 10;
/// How often a full disk is tried again.
const SPACE_RETRY: std::time::Duration = std::time::Duration::from_millis(200);
/// Buffers kept for reuse: one filling, one in flight, one spare.
const SPARE_BUFFERS: usize = 3;

struct Block {
    lsn: Lsn,
    buffer: AlignedBuf,
    len: usize,
    entries: usize,
}

impl Block {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

struct WalFile {
    slot: usize,
    file: File,
}

pub(crate) struct Wal {
    lane: Lane,
    dir: PathBuf,
    disk: Disk,
    file_bytes: u64,
    ring: usize,
    filling: RefCell<Option<Block>>,
    queued: RefCell<VecDeque<Block>>,
    queued_bytes: Cell<usize>,
    spare: RefCell<Vec<AlignedBuf>>,
    next_lsn: Cell<Lsn>,
    durable_lsn: Cell<Lsn>,
    file_seq: Cell<u64>,
    current: RefCell<Option<WalFile>>,
    position: Cell<u64>,
    free: RefCell<VecDeque<WalFile>>,
    /// Full files by sequence, oldest first.
    full: RefCell<BTreeMap<u64, WalFile>>,
    /// First LSN of every file that still holds something: tells which file an entry is in.
    first_lsn: RefCell<BTreeMap<u64, Lsn>>,
    files: Cell<usize>,
    no_space: Cell<bool>,
    poison: RefCell<Option<LogPoisoned>>,
    work: Notify,
    pub(crate) progressed: Notify,
    /// Told when a file is full, so that the store retires the oldest.
    pub(crate) file_filled: Rc<Notify>,
    file_freed: Notify,
    pub(crate) bytes_written: Cell<u64>,
    pub(crate) commits: Cell<u64>,
    closing: Cell<bool>,
}

impl Wal {
    /// Opens an empty lane: recovery has removed what was there.
    pub(crate) fn open(
        dir: PathBuf,
        lane: Lane,
        disk: Disk,
        file_bytes: u64,
        ring: usize,
        first_file_seq: u64,
        file_filled: Rc<Notify>,
    ) -> std::io::Result<Rc<Wal>> {
        std::fs::create_dir_all(&dir)?;
        flumen_io::sync_dir(dir.parent().unwrap_or(&dir))?;
        let wal = Rc::new(Wal {
            lane,
            dir,
            disk,
            file_bytes,
            ring,
            filling: RefCell::new(None),
            queued: RefCell::default(),
            queued_bytes: Cell::new(0),
            spare: RefCell::default(),
            next_lsn: Cell::new(1),
            durable_lsn: Cell::new(0),
            file_seq: Cell::new(first_file_seq),
            current: RefCell::new(None),
            position: Cell::new(0),
            free: RefCell::default(),
            full: RefCell::default(),
            first_lsn: RefCell::default(),
            files: Cell::new(0),
            no_space: Cell::new(false),
            poison: RefCell::new(None),
            work: Notify::new(),
            progressed: Notify::new(),
            file_filled,
            file_freed: Notify::new(),
            bytes_written: Cell::new(0),
            commits: Cell::new(0),
            closing: Cell::new(false),
        });
        tokio::task::spawn_local(wal.clone().write_blocks());
        Ok(wal)
    }

    fn mode(&self) -> Mode {
        let disk = self.lane == Lane::Durable;
        Mode { write: true, create: true, direct: disk, dsync: disk }
    }

    pub(crate) fn durable_lsn(&self) -> Lsn {
        self.durable_lsn.get()
    }

    pub(crate) fn poisoned(&self) -> Option<LogPoisoned> {
        self.poison.borrow().clone()
    }

    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        !self.no_space.get()
            && self.queued_bytes.get() + bytes <= QUEUED_BYTES_MAX
            && bytes <= self.entry_bytes_max()
    }

    /// The largest entry that a block of this ring can hold.
    pub(crate) fn entry_bytes_max(&self) -> usize {
        BLOCK_PAYLOAD_MAX.min(usize::try_from(self.file_bytes).unwrap_or(usize::MAX) - BLOCK_BYTES)
            - BLOCK_BYTES
    }

    pub(crate) fn no_space(&self) -> bool {
        self.no_space.get()
    }

    /// Copies one record into the block that is being filled. Returns the LSN of that block.
    pub(crate) fn stage(&self, parts: &[&[u8]], is_entry: bool) -> Lsn {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let mut filling = self.filling.borrow_mut();
        if filling.as_ref().is_some_and(|b| b.len + len > b.buffer.len())
            && let Some(block) = filling.take()
        {
            self.queued_bytes.set(self.queued_bytes.get() + block.len);
            self.queued.borrow_mut().push_back(block);
        }
        let block = filling.get_or_insert_with(|| {
            let lsn = self.next_lsn.get();
            self.next_lsn.set(lsn + 1);
            let buffer = if BLOCK_HEADER_BYTES + len > BLOCK_TARGET_BYTES {
                AlignedBuf::zeroed(BLOCK_HEADER_BYTES + len)
            } else {
                self.spare.borrow_mut().pop().unwrap_or_else(|| AlignedBuf::zeroed(BLOCK_TARGET_BYTES))
            };
            Block { lsn, buffer, len: BLOCK_HEADER_BYTES, entries: 0 }
        });
        for part in parts {
            block.push(part);
        }
        block.entries += usize::from(is_entry);
        let lsn = block.lsn;
        drop(filling);
        self.work.notify_one();
        lsn
    }

    fn next_block(&self) -> Option<Block> {
        if let Some(block) = self.queued.borrow_mut().pop_front() {
            self.queued_bytes.set(self.queued_bytes.get() - block.len);
            return Some(block);
        }
        self.filling.borrow_mut().take()
    }

    async fn write_blocks(self: Rc<Self>) {
        loop {
            let Some(block) = self.next_block() else {
                if self.closing.get() {
                    return;
                }
                self.work.notified().await;
                // Tasks that are ready now may have more to stage: let them, it is the same write.
                tokio::task::yield_now().await;
                continue;
            };
            if let Err(error) = self.write_block(block).await {
                *self.poison.borrow_mut() = Some(LogPoisoned(format!("{}: {error}", self.dir.display())));
                self.progressed.notify_waiters();
                self.file_filled.notify_one();
                return;
            }
        }
    }

    async fn write_block(&self, block: Block) -> std::io::Result<()> {
        let Block { lsn, mut buffer, len: used, .. } = block;
        let padded = used.next_multiple_of(BLOCK_BYTES);
        buffer[used..padded].fill(0);
        if self.current.borrow().is_none() || self.position.get() + padded as u64 > self.file_bytes {
            self.next_file().await?;
        }
        let file_seq = self.file_seq.get();
        let header = BlockHeader {
            file_seq,
            lsn,
            payload_len: (used - BLOCK_HEADER_BYTES) as u32,
            payload_crc: crc32c::crc32c(&buffer[BLOCK_HEADER_BYTES..used]),
        };
        buffer[..BLOCK_HEADER_BYTES].copy_from_slice(&wal_format::encode_block_header(&header));
        self.first_lsn.borrow_mut().entry(file_seq).or_insert(lsn);
        let file =
            self.current.borrow().as_ref().map(|f| f.file.clone()).ok_or(std::io::ErrorKind::NotFound)?;
        let position = self.position.get();
        let buffer = match self.lane {
            // A copy into the page cache: no wait to hide, so no trip through the ring.
            Lane::Os => {
                file.write_all_at(&buffer[..padded], position)?;
                buffer
            }
            Lane::Durable => {
                let (buffer, written) = self.disk.write_at(&file, buffer, padded, position).await;
                written?;
                buffer
            }
        };
        self.position.set(position + padded as u64);
        self.bytes_written.set(self.bytes_written.get() + padded as u64);
        self.commits.set(self.commits.get() + 1);
        self.durable_lsn.set(lsn);
        self.progressed.notify_waiters();
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_BUFFERS && buffer.len() == BLOCK_TARGET_BYTES {
            spare.push(buffer);
        }
        Ok(())
    }

    /// Makes a file current: a free one, or a new one while segments lag. Waits while the ring is full or
    /// the disk is; only an error that is not about space poisons.
    async fn next_file(&self) -> std::io::Result<()> {
        if let Some(full) = self.current.borrow_mut().take() {
            self.full.borrow_mut().insert(self.file_seq.get(), full);
            self.file_filled.notify_one();
        }
        loop {
            let free = self.free.borrow_mut().pop_front();
            let next = match free {
                Some(file) => Some(file),
                None if self.files.get() < self.ring * RING_GROWTH_MAX => match self.create_file() {
                    Ok(file) => Some(file),
                    Err(e) if e.kind() == std::io::ErrorKind::StorageFull => None,
                    Err(e) => return Err(e),
                },
                None => None,
            };
            if let Some(file) = next {
                self.no_space.set(false);
                self.file_seq.set(self.file_seq.get() + 1);
                self.position.set(0);
                *self.current.borrow_mut() = Some(file);
                return Ok(());
            }
            self.no_space.set(true);
            self.file_filled.notify_one();
            tokio::select! {
                () = self.file_freed.notified() => {}
                () = tokio::time::sleep(SPACE_RETRY) => {}
            }
        }
    }

    fn create_file(&self) -> std::io::Result<WalFile> {
        let slot = self.files.get();
        let path = self.dir.join(format!("{slot:03}.wal"));
        let file = File::open(&path, self.mode())?;
        let made = file.allocate(self.file_bytes).and_then(|()| {
            if slot == 0 && self.lane == Lane::Durable {
                let zeros = AlignedBuf::zeroed(ZERO_AT_START_BYTES.min(self.file_bytes as usize));
                file.write_all_at(&zeros, 0)?;
            }
            flumen_io::sync_dir(&self.dir)
        });
        if let Err(error) = made {
            // A file without its blocks would fail later, in the middle of a commit.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        self.files.set(slot + 1);
        Ok(WalFile { slot, file })
    }

    /// The newest LSN in the oldest full file: everything up to it must be in synced segments before
    /// `retire_oldest`.
    pub(crate) fn oldest_full(&self) -> Option<(u64, Lsn)> {
        let (seq, _) = self.full.borrow().first_key_value().map(|(s, f)| (*s, f.slot))?;
        let firsts = self.first_lsn.borrow();
        let next = firsts.range(seq + 1..).next().map_or(self.next_lsn.get(), |(_, lsn)| *lsn);
        Some((seq, next - 1))
    }

    pub(crate) fn full_files(&self) -> usize {
        self.full.borrow().len()
    }

    /// Gives the oldest full file back to the ring, or to the file system when the ring has grown.
    pub(crate) fn retire(&self, seq: u64) -> std::io::Result<()> {
        let Some(file) = self.full.borrow_mut().remove(&seq) else { return Ok(()) };
        self.first_lsn.borrow_mut().remove(&seq);
        self.free.borrow_mut().push_back(file);
        self.file_freed.notify_one();
        Ok(())
    }

    pub(crate) fn last_staged_lsn(&self) -> Lsn {
        self.next_lsn.get() - 1
    }

    pub(crate) fn close(&self) {
        self.closing.set(true);
        self.work.notify_one();
    }

    /// Zeroes a file ahead of its first use, so that commits into it need no metadata write. Returns
    /// whether there was one to prepare.
    pub(crate) async fn prepare_file(&self) -> std::io::Result<bool> {
        if self.lane != Lane::Durable || self.files.get() >= self.ring || self.files.get() == 0 {
            return Ok(false);
        }
        let file = self.create_file()?;
        let mut at = 0;
        let mut zeros = AlignedBuf::zeroed(ZERO_STEP_BYTES);
        while at < self.file_bytes {
            let len = ZERO_STEP_BYTES.min((self.file_bytes - at) as usize);
            let (back, written) = self.disk.write_at(&file.file, zeros, len, at).await;
            written?;
            zeros = back;
            at += len as u64;
        }
        self.free.borrow_mut().push_back(file);
        self.file_freed.notify_one();
        Ok(true)
    }
}

/// Names of the files of a lane, in no particular order.
pub(crate) fn wal_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "wal") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
