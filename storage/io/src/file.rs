//! Files as storage needs them: open flags for direct and synchronous writes, preallocation, locks, free space.
//!
//! All calls here are plain system calls on the calling thread; the ones on a hot path are in `Disk`. A file of a
//! simulated disk answers the same calls.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::simulated::Handle;

#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    pub write: bool,
    pub create: bool,
    /// Bypass the page cache where the file system can; buffers, lengths and offsets must be whole blocks.
    pub direct: bool,
    /// Every write returns after its bytes are on the disk.
    pub dsync: bool,
}

#[derive(Debug)]
enum Kind {
    Machine(fs::File),
    Simulated(Handle),
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    path: PathBuf,
    direct: bool,
}

/// A shared handle: an operation in flight keeps its file open.
#[derive(Debug, Clone)]
pub struct File {
    inner: Arc<Inner>,
}

impl File {
    /// On the machine's own file system; `FileSystem::open` is for everybody else.
    pub(crate) fn open(path: &Path, mode: Mode) -> io::Result<File> {
        let open = |direct: bool| {
            let mut flags = libc::O_CLOEXEC;
            if direct {
                flags |= libc::O_DIRECT;
            }
            if mode.dsync {
                flags |= libc::O_DSYNC;
            }
            fs::OpenOptions::new()
                .read(true)
                .write(mode.write)
                .create(mode.create && mode.write)
                .custom_flags(flags)
                .open(path)
        };
        let (file, direct) = match open(mode.direct) {
            Ok(file) => (file, mode.direct),
            // Some file systems have no direct I/O; everything else works the same on them.
            Err(error) if mode.direct && error.raw_os_error() == Some(libc::EINVAL) => (open(false)?, false),
            Err(error) => return Err(error),
        };
        Ok(File { inner: Arc::new(Inner { kind: Kind::Machine(file), path: path.to_owned(), direct }) })
    }

    pub(crate) fn simulated(handle: Handle, path: &Path) -> File {
        let direct = handle.is_direct();
        File { inner: Arc::new(Inner { kind: Kind::Simulated(handle), path: path.to_owned(), direct }) }
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    pub fn is_direct(&self) -> bool {
        self.inner.direct
    }

    /// The descriptor, for a ring; a simulated file has none, and no ring may be given one.
    pub(crate) fn fd(&self) -> RawFd {
        match &self.inner.kind {
            Kind::Machine(file) => file.as_raw_fd(),
            Kind::Simulated(_) => -1,
        }
    }

    pub(crate) fn handle(&self) -> io::Result<&Handle> {
        match &self.inner.kind {
            Kind::Simulated(handle) => Ok(handle),
            Kind::Machine(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    pub fn len(&self) -> io::Result<u64> {
        match &self.inner.kind {
            Kind::Machine(file) => Ok(file.metadata()?.len()),
            Kind::Simulated(handle) => handle.len(),
        }
    }

    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        match &self.inner.kind {
            Kind::Machine(file) => file.set_len(len),
            Kind::Simulated(handle) => handle.set_len(len),
        }
    }

    pub fn sync_all(&self) -> io::Result<()> {
        match &self.inner.kind {
            Kind::Machine(file) => file.sync_all(),
            Kind::Simulated(handle) => handle.sync(),
        }
    }

    pub fn sync_data(&self) -> io::Result<()> {
        match &self.inner.kind {
            Kind::Machine(file) => file.sync_data(),
            Kind::Simulated(handle) => handle.sync(),
        }
    }

    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match &self.inner.kind {
            Kind::Machine(file) => file.write_all_at(bytes, at),
            Kind::Simulated(handle) => handle.write_at(bytes, at),
        }
    }

    /// Fills `buf` as far as the file reaches; returns how much that was.
    pub fn read_full_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let file = match &self.inner.kind {
            Kind::Machine(file) => file,
            Kind::Simulated(handle) => return handle.read_at(buf, at),
        };
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Reserves disk space for `len` bytes and makes the file that long. Where the file system cannot reserve, the file
    /// only gets its length, and running out of space shows at the first write.
    pub fn allocate(&self, len: u64) -> io::Result<()> {
        if let Kind::Simulated(handle) = &self.inner.kind {
            return handle.allocate(len);
        }
        let length = libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        loop {
            // SAFETY: the descriptor is open for the duration of the call; no memory is passed.
            let result = unsafe { libc::fallocate(self.fd(), 0, 0, length) };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => return self.set_len(len),
                _ => return Err(error),
            }
        }
    }

    /// Up to where the file has been written: the first hole, or extent that is reserved and not written yet. A file
    /// system that cannot tell says the file's length.
    pub fn written_until(&self) -> io::Result<u64> {
        if let Kind::Simulated(handle) = &self.inner.kind {
            return handle.written_until();
        }
        // SAFETY: the descriptor is open for the duration of the call. The file position it moves is used by nobody:
        // all reads and writes name their offset.
        let hole = unsafe { libc::lseek(self.fd(), 0, libc::SEEK_HOLE) };
        match u64::try_from(hole) {
            Ok(hole) => Ok(hole),
            Err(_) => match io::Error::last_os_error().raw_os_error() {
                // Past the end: the file is empty.
                Some(libc::ENXIO) => Ok(0),
                _ => self.len(),
            },
        }
    }
}

pub(crate) fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let file = File::open(path, Mode { write: true, create: true, ..Mode::default() })?;
    loop {
        // SAFETY: the descriptor is open for the duration of the call; no memory is passed.
        if unsafe { libc::flock(file.fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(Some(file));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EWOULDBLOCK) => return Ok(None),
            _ => return Err(error),
        }
    }
}

pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the path is a valid C string and `stat` a writable struct of the right type, both alive over the call.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed is a valid statvfs, and the call has filled it.
    let stat = unsafe { stat.assume_init() };
    #[allow(clippy::unnecessary_cast)] // the field widths differ between platforms
    Ok((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
}

/// Makes names created, renamed or removed in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

pub(crate) fn sync_filesystem(path: &Path) -> io::Result<()> {
    let file = fs::File::open(path)?;
    // SAFETY: the descriptor is open for the duration of the call; no memory is passed.
    if unsafe { libc::syncfs(file.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
