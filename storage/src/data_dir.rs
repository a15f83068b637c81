//! The data directory: its lock, its version, and the id of the present run's WAL.
//!
//! Plain system calls before the shards start; shared read-only by all of them afterwards.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use flumen_io::{File, FileSystem, Mode};

use crate::mutant::{self, Mutant};
use crate::store::is_no_space;
use crate::types::{OpenError, RecoveredGroup};

pub(crate) const FORMAT: &str = "flumen 3";
/// Older ones that are read; the first recovery makes the directory one of `FORMAT`, which older versions refuse.
pub(crate) const FORMATS_READ: [&str; 2] = ["flumen 1", "flumen 2"];

pub(crate) fn is_read(format: &[u8]) -> bool {
    let format = format.trim_ascii();
    format == FORMAT.as_bytes() || FORMATS_READ.iter().any(|old| old.as_bytes() == format)
}

/// Held by the directory and by every shard opened on it.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "holding it is the point")] File);

#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    files: FileSystem,
    lock: Arc<Lock>,
    syncing: Arc<Syncing>,
    wal_id: OnceLock<u64>,
    leaving: Leaving,
}

/// Directory names of partitions whose deletion has begun and is not sure yet, over all shards. Whoever took one of them now
/// would share it, after a crash, with a partition that came back.
pub(crate) type Leaving = Arc<Mutex<BTreeSet<String>>>;

/// Held over every sync of every shard but a commit's own; inside, why one of them failed. A disk that fails one may have
/// lost what another, under way at the same time, then calls safe; so nobody relies on a sync before those that were under
/// way with it are known to be good.
pub(crate) type Syncing = tokio::sync::Mutex<Option<String>>;

pub(crate) fn open_error(path: &Path, action: &'static str, source: io::Error) -> OpenError {
    let shown = path.display().to_string();
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable { path: shown }
        }
        io::ErrorKind::NotADirectory => OpenError::NotADirectory { path: shown },
        _ if is_no_space(&source) => OpenError::NoSpace { path: shown },
        _ => OpenError::Io { path: shown, action, source },
    }
}

/// Replaces a small file so that a crash leaves the old or the new one, and makes that durable.
pub(crate) fn replace_file(files: &FileSystem, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let file = files.open(&temporary, Mode { write: true, create: true, ..Mode::default() })?;
    file.set_len(0)?;
    file.write_all_at(bytes, 0)?;
    if !mutant::is(Mutant::SkipsSyncBeforeRename) {
        file.sync_all()?;
    }
    files.rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => files.sync_dir(parent),
        None => Ok(()),
    }
}

/// Makes the names of a directory and of `count - 1` above it sure: without that, all that will ever be synced inside can
/// be lost with the directory's own name. Also for one that exists: a start that was cut short may have left it unsynced.
fn sync_names(files: &FileSystem, path: &Path, count: usize) -> io::Result<()> {
    for above in path.ancestors().skip(1).take(count) {
        match files.sync_dir(above) {
            // Who may not read the directory above has not put a name there.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            result => result?,
        }
    }
    Ok(())
}

/// Of the machine's start, shortened to what a block has room for.
pub(crate) fn boot_id(files: &FileSystem) -> u64 {
    let id = files.boot_id();
    u64::from(crc32c::crc32c(&id)) << 32 | u64::from(crc32c::crc32c_append(1, &id))
}

impl DataDir {
    /// Creates the directory if needed, locks it and checks its version.
    pub fn open(path: impl AsRef<Path>) -> Result<DataDir, OpenError> {
        Self::open_on(FileSystem::machine(), path)
    }

    /// As `open`, on a file system of the caller's choice (a simulated one, in tests).
    pub fn open_on(files: FileSystem, path: impl AsRef<Path>) -> Result<DataDir, OpenError> {
        let path = path.as_ref();
        if files.exists(path) && !files.is_dir(path) {
            return Err(OpenError::NotADirectory { path: path.display().to_string() });
        }
        let missing = path.ancestors().skip(1).take_while(|above| !files.exists(above)).count();
        files.create_dir_all(path).map_err(|e| open_error(path, "creating the directory", e))?;
        // One path for it, whatever the process does with its working directory.
        let path = &files.canonicalize(path).map_err(|e| open_error(path, "resolving", e))?;
        sync_names(&files, path, missing + 1).map_err(|e| open_error(path, "syncing its name", e))?;
        let format_path = path.join("FORMAT");
        if !files.exists(&format_path) {
            // A lock and an unfinished FORMAT are what a first start that died leaves; lost+found is a mount point's.
            let entries = files.list(path).map_err(|e| open_error(path, "listing", e))?;
            let ours = |name: &str| matches!(name, "LOCK" | "FORMAT.new" | "lost+found");
            if entries.iter().any(|entry| !ours(&entry.name)) {
                return Err(OpenError::NotOurs { path: path.display().to_string() });
            }
        }
        let lock_path = path.join("LOCK");
        let lock = files
            .lock(&lock_path)
            .map_err(|e| open_error(path, "locking the directory", e))?
            .ok_or_else(|| OpenError::InUse { path: path.display().to_string() })?;
        match files.read(&format_path) {
            Ok(found) if is_read(&found) => {}
            Ok(found) => {
                let found = String::from_utf8_lossy(found.trim_ascii()).chars().take(60).collect();
                return Err(OpenError::Format { path: path.display().to_string(), found, want: FORMAT });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let line = format!("{FORMAT}\n");
                replace_file(&files, &format_path, line.as_bytes())
                    .map_err(|e| open_error(path, "writing FORMAT", e))?;
            }
            Err(error) => return Err(open_error(path, "reading FORMAT", error)),
        }
        for name in ["wal", "log"] {
            let sub = path.join(name);
            files.create_dir_all(&sub).map_err(|e| open_error(&sub, "creating the directory", e))?;
        }
        files.sync_dir(path).map_err(|e| open_error(path, "syncing the directory", e))?;
        // The lock and the directories may be from a time when it was writable.
        let probe = path.join("wal").join("probe");
        files.write(&probe, b"").map_err(|e| open_error(path, "writing", e))?;
        files.remove_file(&probe).map_err(|e| open_error(path, "writing", e))?;
        Ok(DataDir {
            path: path.to_owned(),
            files,
            lock: Arc::new(Lock(lock)),
            syncing: Arc::default(),
            wal_id: OnceLock::new(),
            leaving: Leaving::default(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that may still be written on its disk.
    pub fn free_bytes(&self) -> io::Result<u64> {
        self.files.free_bytes(&self.path)
    }

    /// Brings everything that a former run left in its WALs into the partitions' segments. Before the shards start, once;
    /// their number may differ from the former run's. Keeps up to `cache_hint` bytes of the newest batches in memory.
    pub fn recover(&self, cache_hint: usize) -> Result<Vec<RecoveredGroup>, OpenError> {
        if self.wal_id.get().is_some() {
            return Err(OpenError::Config("the data directory is recovered once per start".to_owned()));
        }
        let (groups, wal_id) = crate::recovery::recover(&self.files, &self.path, cache_hint)?;
        let _ = self.wal_id.set(wal_id);
        Ok(groups)
    }

    /// Removes the directory of a partition that no shard has taken over. Its name is free for others from the next start on:
    /// until then the last recovery's states may say that it is this one's.
    pub fn remove_group(&self, dir_name: &str) -> io::Result<()> {
        if !crate::group_state::valid_dir_name(dir_name) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let root = self.path.join("log");
        let from = root.join(dir_name);
        // The group is not in this run's WAL, so its number is of no use to a recovery.
        let to = root.join(format!("{dir_name}.{}.deleted", crate::types::UNKNOWN_GROUP));
        self.files.rename(&from, &to)?;
        self.files.sync_dir(&root)?;
        self.files.remove_dir_all(&to)
    }

    pub(crate) fn files(&self) -> &FileSystem {
        &self.files
    }

    pub(crate) fn wal_id(&self) -> Option<u64> {
        self.wal_id.get().copied()
    }

    pub(crate) fn syncing(&self) -> Arc<Syncing> {
        Arc::clone(&self.syncing)
    }

    pub(crate) fn leaving(&self) -> Leaving {
        Arc::clone(&self.leaving)
    }

    pub(crate) fn lock(&self) -> Arc<Lock> {
        Arc::clone(&self.lock)
    }
}
