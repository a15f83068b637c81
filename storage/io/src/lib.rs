//! The door to the disk: everything that storage does to a file on a shard thread goes through `Disk`.
//!
//! Two drivers do the same things and pass the same suite (`conformance.rs`): io_uring (`uring.rs`), and pread/pwrite on
//! tokio's blocking pool (`blocking.rs`) for hosts that forbid io_uring. `Disk` lives on one shard thread (it is not
//! `Send`), inside a `LocalSet`. Opening, locking, truncating and the other rare calls are plain calls on `File`.
//!
//! Invariants:
//! - A buffer given to an operation is owned by the driver until the kernel is done with it, also when the future that
//!   waits for it is dropped. A dropped write may or may not have happened.
//! - A write is whole or an error; a read is short only at the end of the file.
//! - No error is retried here except interruption.
//!
//! This crate and `sink/embedded` are the only ones with `unsafe`.

mod aligned;
mod blocking;
mod file;
mod uring;

#[cfg(test)]
mod conformance;

use std::io;
use std::path::Path;
use std::rc::Rc;

pub use aligned::{AlignedBuf, BLOCK_BYTES};
pub use file::{File, Mode, free_bytes, lock_file, sync_dir, sync_filesystem};

use bytes::Bytes;

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
}

#[derive(Clone)]
pub struct Disk {
    driver: Driver,
    description: Rc<str>,
    faults: Option<Faults>,
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
        Ok(Disk { driver, description, faults: None })
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
        }
    }

    /// Reads `len` bytes, fewer only if the file ends before.
    pub async fn read_at(&self, file: &File, at: u64, len: usize) -> io::Result<Bytes> {
        self.fault(OpKind::Read, file, at, len)?;
        match &self.driver {
            Driver::Uring(ring) => ring.read_at(file, at, len).await,
            Driver::Blocking => blocking::read_at(file, at, len).await,
        }
    }

    pub async fn fdatasync(&self, file: &File) -> io::Result<()> {
        self.fault(OpKind::Sync, file, 0, 0)?;
        match &self.driver {
            Driver::Uring(ring) => ring.fdatasync(file).await,
            Driver::Blocking => blocking::fdatasync(file).await,
        }
    }
}
