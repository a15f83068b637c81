//! The door to the disk: everything that storage does to a file goes through `FileSystem`, `File` and `Disk`.
//!
//! `Disk` is what a shard thread does all the time: write, read, sync. Three drivers do the same things and pass the same
//! suite (`conformance.rs`): io_uring (`uring.rs`), pread/pwrite on tokio's blocking pool (`blocking.rs`) for hosts that
//! forbid io_uring, and a simulated disk (`simulated.rs`) on which a test decides what fails. `Disk` lives on one shard
//! thread (it is not `Send`), inside a `LocalSet`. Names, locks and whole small files are plain calls on `FileSystem`,
//! truncating and preallocating on `File`.
//!
//! Invariants:
//! - A buffer given to an operation is owned by the driver until the kernel is done with it, also when the future that
//!   waits for it is dropped. A dropped write may or may not have happened.
//! - A write is whole or an error; a read is short only at the end of the file.
//! - No error is retried here except interruption.
//!
//! This crate and `sink/embedded` are the only ones with `unsafe`.

mod aligned;
mod append;
mod blocking;
mod file;
mod file_system;
mod pool;
mod process;
pub mod simulated;
mod uring;

#[cfg(test)]
mod conformance;

use std::io;
use std::path::Path;
use std::rc::Rc;

pub use aligned::{AlignedBuf, BLOCK_BYTES};
pub use append::LastBlock;
pub use file::{File, Mode};
pub use file_system::{DirEntry, FileSystem, Metadata};
pub use process::refuse_huge_pages;

use bytes::Bytes;
use pool::BufferPool;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskKind {
    #[default]
    Auto,
    Uring,
    Sync,
}

#[derive(Debug, thiserror::Error)]
#[error("io_uring does not work here: {0}")]
pub struct UringError(pub String);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    Write,
    Read,
    Sync,
}

/// What an operation is about to do; see `Disk::with_faults`.
#[derive(Debug)]
pub struct Op<'a> {
    pub kind: OpKind,
    pub path: &'a Path,
    pub at: u64,
    pub len: usize,
}

/// Asked before every operation; an error is returned in its place and the disk is not touched.
pub type Faults = Rc<dyn Fn(&Op<'_>) -> Option<io::Error>>;

#[derive(Clone)]
enum Driver {
    Uring(Rc<uring::Ring>),
    Blocking,
    Simulated(simulated::Simulated),
}

#[derive(Clone)]
pub struct Disk {
    driver: Driver,
    description: Rc<str>,
    faults: Option<Faults>,
    pool: BufferPool,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("driver", &self.description).finish()
    }
}

impl Disk {
    /// Must be called on the thread that will use it, within a tokio `LocalSet`.
    pub fn open(kind: DiskKind) -> Result<Disk, UringError> {
        let (driver, description): (Driver, Rc<str>) = match kind {
            DiskKind::Sync => (Driver::Blocking, "pread/pwrite".into()),
            DiskKind::Uring => (Driver::Uring(uring::Ring::open().map_err(UringError)?), "io_uring".into()),
            DiskKind::Auto => match uring::Ring::open() {
                Ok(ring) => (Driver::Uring(ring), "io_uring".into()),
                Err(reason) => {
                    (Driver::Blocking, format!("pread/pwrite (io_uring does not work here: {reason})").into())
                }
            },
        };
        Ok(Disk { driver, description, faults: None, pool: BufferPool::default() })
    }

    /// For the files of `files`: a simulated file system has a simulated disk, whatever `kind` asks for.
    pub fn open_for(files: &FileSystem, kind: DiskKind) -> Result<Disk, UringError> {
        match files.kind() {
            file_system::Kind::Machine => Disk::open(kind),
            file_system::Kind::Simulated(sim) => Ok(Disk::simulated(sim.clone())),
        }
    }

    pub(crate) fn simulated(sim: simulated::Simulated) -> Disk {
        Disk {
            driver: Driver::Simulated(sim),
            description: "simulated".into(),
            faults: None,
            pool: BufferPool::default(),
        }
    }

    /// The same disk with faults in front of it, for tests of what the store does about them.
    pub fn with_faults(mut self, faults: Faults) -> Disk {
        self.faults = Some(faults);
        self
    }

    /// Which driver, and why not the other one.
    pub fn description(&self) -> &str {
        &self.description
    }

    pub(crate) fn pool(&self) -> &BufferPool {
        &self.pool
    }

    fn fault(&self, kind: OpKind, file: &File, at: u64, len: usize) -> io::Result<()> {
        match &self.faults {
            None => Ok(()),
            Some(faults) => match faults(&Op { kind, path: file.path(), at, len }) {
                None => Ok(()),
                Some(error) => Err(error),
            },
        }
    }

    /// Writes the first `len` bytes of `buf` at `at` and gives the buffer back.
    pub async fn write_at(
        &self,
        file: &File,
        buf: AlignedBuf,
        len: usize,
        at: u64,
    ) -> (AlignedBuf, io::Result<()>) {
        assert!(len <= buf.len(), "write of {len} bytes out of a buffer of {}", buf.len());
        if let Err(error) = self.fault(OpKind::Write, file, at, len) {
            return (buf, Err(error));
        }
        match &self.driver {
            Driver::Uring(ring) => ring.write_at(file, buf, len, at).await,
            Driver::Blocking => blocking::write_at(file, buf, len, at).await,
            Driver::Simulated(sim) => match file.handle() {
                Ok(handle) => sim.disk_write(handle, buf, len, at).await,
                Err(error) => (buf, Err(error)),
            },
        }
    }

    /// Writes where it stands, without waiting: for files that are not opened for direct or synchronous writes, where
    /// a write is a copy into the page cache and a trip through the ring costs more than it.
    pub fn write_now(&self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        self.fault(OpKind::Write, file, at, bytes.len())?;
        file.write_all_at(bytes, at)
    }

    /// Writes `bufs` one after the other, beginning at `at`.
    pub async fn write_vectored_at(&self, file: &File, bufs: Vec<Bytes>, at: u64) -> io::Result<()> {
        self.fault(OpKind::Write, file, at, bufs.iter().map(Bytes::len).sum())?;
        match &self.driver {
            Driver::Uring(ring) => ring.write_vectored_at(file, bufs, at).await,
            Driver::Blocking => blocking::write_vectored_at(file, bufs, at).await,
            Driver::Simulated(sim) => sim.disk_write_bytes(file.handle()?, bufs.concat(), at).await,
        }
    }

    /// Reads `len` bytes, fewer only if the file ends before. A file that is opened for direct reads is read in whole
    /// blocks into a pooled buffer, past the page cache.
    pub async fn read_at(&self, file: &File, at: u64, len: usize) -> io::Result<Bytes> {
        self.fault(OpKind::Read, file, at, len)?;
        if file.is_direct() {
            return self.read_blocks(file, at, len).await;
        }
        match &self.driver {
            Driver::Uring(ring) => ring.read_at(file, at, len).await,
            Driver::Blocking => blocking::read_at(file, at, len).await,
            Driver::Simulated(sim) => sim.disk_read(file.handle()?, at, len).await,
        }
    }

    async fn read_blocks(&self, file: &File, at: u64, len: usize) -> io::Result<Bytes> {
        // A reader may ask for more than there is; only what there is takes memory.
        let there = file.len()?.saturating_sub(at);
        let len = len.min(usize::try_from(there).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(Bytes::new());
        }
        let before = (at % BLOCK_BYTES as u64) as usize;
        let whole = (before + len).next_multiple_of(BLOCK_BYTES);
        let from = at - before as u64;
        let mut buffer = self.pool.take(whole);
        let buf = buffer.lend();
        let (back, read) = match &self.driver {
            Driver::Uring(ring) => ring.read_aligned(file, buf, whole, from).await,
            Driver::Blocking => blocking::read_aligned(file, buf, whole, from).await,
            Driver::Simulated(sim) => match file.handle() {
                Ok(handle) => sim.disk_read_aligned(handle, buf, whole, from).await,
                Err(error) => (buf, Err(error)),
            },
        };
        buffer.give_back(back);
        let got = read?.saturating_sub(before).min(len);
        Ok(buffer.freeze(before..before + got))
    }

    pub async fn fdatasync(&self, file: &File) -> io::Result<()> {
        self.fault(OpKind::Sync, file, 0, 0)?;
        match &self.driver {
            Driver::Uring(ring) => ring.fdatasync(file).await,
            Driver::Blocking => blocking::fdatasync(file).await,
            Driver::Simulated(sim) => sim.disk_sync(file.handle()?).await,
        }
    }

    /// Runs plain calls on `FileSystem` and `File` away from the shard's thread; on a simulated disk, later.
    pub async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        match &self.driver {
            Driver::Uring(_) | Driver::Blocking => blocking::run(work).await,
            Driver::Simulated(sim) => {
                sim.wait().await;
                let done = work();
                sim.unless_down().await;
                Ok(done)
            }
        }
    }
}
