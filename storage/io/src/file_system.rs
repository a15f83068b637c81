//! The door to names: directories, renames, whole small files, locks and the facts about the machine.
//!
//! `FileSystem` is either the machine's own or a simulated one (`simulated.rs`); storage asks nobody else. All calls
//! here are plain: they block, and belong before the shards start or into `Disk::off_thread`. Cheap to clone, `Send`.
//!
//! What it promises about a crash is what POSIX promises: a name that was created, renamed or removed is sure after
//! `sync_dir` of its directory, the content of a file after a sync of the file, and neither implies the other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

use crate::simulated::Simulated;
use crate::{File, Mode, file};

#[derive(Debug, Clone)]
pub struct FileSystem {
    kind: Kind,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Machine,
    Simulated(Simulated),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    pub is_dir: bool,
    pub len: u64,
    /// Milliseconds since 1970; 0 where the file system does not say.
    pub modified_ms: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: String,
    pub is_dir: bool,
    pub len: u64,
}

impl Default for FileSystem {
    fn default() -> Self {
        Self::machine()
    }
}

impl FileSystem {
    pub fn machine() -> Self {
        Self { kind: Kind::Machine }
    }

    pub(crate) fn simulated(sim: Simulated) -> Self {
        Self { kind: Kind::Simulated(sim) }
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    pub fn open(&self, path: &Path, mode: Mode) -> io::Result<File> {
        match &self.kind {
            Kind::Machine => File::open(path, mode),
            Kind::Simulated(sim) => Ok(File::simulated(sim.open(path, mode)?, path)),
        }
    }

    /// Takes the exclusive lock of `path`, creating the file; the lock lives as long as the returned handle. `Ok(None)`
    /// when somebody else has it.
    pub fn lock(&self, path: &Path) -> io::Result<Option<File>> {
        match &self.kind {
            Kind::Machine => file::lock_file(path),
            Kind::Simulated(sim) => Ok(sim.lock(path)?.map(|handle| File::simulated(handle, path))),
        }
    }

    pub fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        match &self.kind {
            Kind::Machine => {
                let found = fs::metadata(path)?;
                let since = found.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
                Ok(Metadata {
                    is_dir: found.is_dir(),
                    len: found.len(),
                    modified_ms: since.and_then(|at| i64::try_from(at.as_millis()).ok()).unwrap_or(0),
                })
            }
            Kind::Simulated(sim) => sim.metadata(path),
        }
    }

    /// One absolute name for an existing path, whatever the process does with its working directory later.
    pub fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        match &self.kind {
            Kind::Machine => fs::canonicalize(path),
            // It knows neither links nor a working directory.
            Kind::Simulated(sim) => sim.metadata(path).map(|_| path.to_owned()),
        }
    }

    pub fn exists(&self, path: &Path) -> bool {
        self.metadata(path).is_ok()
    }

    pub fn is_dir(&self, path: &Path) -> bool {
        self.metadata(path).is_ok_and(|found| found.is_dir)
    }

    /// What is in a directory, in the order of names. Names that are not UTF-8 are not ours and are left out.
    pub fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = match &self.kind {
            Kind::Machine => {
                let mut entries = Vec::new();
                for entry in fs::read_dir(path)? {
                    let entry = entry?;
                    let Ok(name) = entry.file_name().into_string() else { continue };
                    match entry.metadata() {
                        Ok(found) => {
                            entries.push(DirEntry { name, is_dir: found.is_dir(), len: found.len() })
                        }
                        // Removed since it was listed.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
                entries
            }
            Kind::Simulated(sim) => sim.list(path)?,
        };
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The whole file.
    pub fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        match &self.kind {
            Kind::Machine => fs::read(path),
            Kind::Simulated(sim) => {
                let handle = sim.open(path, Mode::default())?;
                let len = usize::try_from(handle.len()?).unwrap_or(usize::MAX);
                let mut bytes = vec![0; len];
                let got = handle.read_at(&mut bytes, 0)?;
                bytes.truncate(got);
                Ok(bytes)
            }
        }
    }

    /// Creates or empties the file and writes it; synced by nobody.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = self.open(path, Mode { write: true, create: true, ..Mode::default() })?;
        file.set_len(0)?;
        file.write_all_at(bytes, 0)
    }

    pub fn create_dir(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => fs::create_dir(path),
            Kind::Simulated(sim) => sim.create_dir(path),
        }
    }

    /// With the directories above it; none of the names is synced.
    pub fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => fs::create_dir_all(path),
            Kind::Simulated(sim) => {
                let mut above = PathBuf::new();
                for part in path.components() {
                    above.push(part);
                    match sim.metadata(&above) {
                        Ok(found) if found.is_dir => {}
                        Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => sim.create_dir(&above)?,
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            }
        }
    }

    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => fs::remove_file(path),
            Kind::Simulated(sim) => sim.remove_file(path),
        }
    }

    /// An empty directory.
    pub fn remove_dir(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => fs::remove_dir(path),
            Kind::Simulated(sim) => sim.remove_dir(path),
        }
    }

    pub fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => fs::remove_dir_all(path),
            Kind::Simulated(sim) => {
                for entry in sim.list(path)? {
                    let inner = path.join(&entry.name);
                    if entry.is_dir { self.remove_dir_all(&inner)? } else { sim.remove_file(&inner)? }
                }
                sim.remove_dir(path)
            }
        }
    }

    /// Gives `from` another name in the same directory; what had that name is replaced, all at once. Moving between
    /// directories would need two of them synced and is refused.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if from.parent() != to.parent() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match &self.kind {
            Kind::Machine => fs::rename(from, to),
            Kind::Simulated(sim) => sim.rename(from, to),
        }
    }

    /// Makes names created, renamed or removed in a directory durable.
    pub fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => file::sync_dir(path),
            Kind::Simulated(sim) => sim.sync_dir(path),
        }
    }

    /// Makes everything on the file system of `path` durable in one call; cheaper than many single syncs.
    pub fn sync_all(&self, path: &Path) -> io::Result<()> {
        match &self.kind {
            Kind::Machine => file::sync_filesystem(path),
            Kind::Simulated(sim) => sim.sync_all(),
        }
    }

    /// Bytes that an ordinary user may still write on the file system of `path`.
    pub fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        match &self.kind {
            Kind::Machine => file::free_bytes(path),
            Kind::Simulated(sim) => sim.free_bytes(),
        }
    }

    /// Changes with every start of the machine. Where the system does not say, every start of the process counts as
    /// one.
    pub fn boot_id(&self) -> [u8; 16] {
        static BOOT_ID: OnceLock<[u8; 16]> = OnceLock::new();
        match &self.kind {
            Kind::Machine => {
                *BOOT_ID.get_or_init(|| match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
                    Ok(text) => parse_uuid(&text).unwrap_or_else(random_id),
                    Err(_) => random_id(),
                })
            }
            Kind::Simulated(sim) => sim.boot_id(),
        }
    }

    /// A number that no other run will use.
    pub fn random_id(&self) -> u64 {
        match &self.kind {
            Kind::Machine => u128::from_le_bytes(random_id()) as u64,
            Kind::Simulated(sim) => sim.random_id(),
        }
    }
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    Some(u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32)?.to_le_bytes())
}

fn random_id() -> [u8; 16] {
    let mut bytes = [0; 16];
    // SAFETY: sixteen writable bytes, alive over the call.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Up to 256 bytes come whole, once the machine has any randomness at all.
    assert_eq!(got, 16, "the system has no random numbers: {}", io::Error::last_os_error());
    bytes
}
