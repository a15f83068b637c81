//! The data directory: its lock, its version, and the id of the present run's WAL.
//!
//! Plain system calls before the shards start; shared read-only by all of them afterwards.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use flumen_io::{File, Mode, lock_file, sync_dir};

use crate::store::is_no_space;
use crate::types::{OpenError, RecoveredGroup};

const FORMAT: &str = "flumen 1";

/// Held by the directory and by every shard opened on it.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "holding it is the point")] File);

#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    lock: Arc<Lock>,
    wal_id: OnceLock<u64>,
}

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
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let file = File::open(&temporary, Mode { write: true, create: true, ..Mode::default() })?;
    file.set_len(0)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Changes with every start of the machine. Where the system does not say, every start of the process counts as one.
pub(crate) fn boot_id() -> u64 {
    static BOOT_ID: OnceLock<u64> = OnceLock::new();
    *BOOT_ID.get_or_init(|| match std::fs::read("/proc/sys/kernel/random/boot_id") {
        Ok(id) => u64::from(crc32c::crc32c(&id)) << 32 | u64::from(crc32c::crc32c_append(1, &id)),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    })
}

impl DataDir {
    /// Creates the directory if needed, locks it and checks its version.
    pub fn open(path: impl AsRef<Path>) -> Result<DataDir, OpenError> {
        let path = path.as_ref();
        if path.exists() && !path.is_dir() {
            return Err(OpenError::NotADirectory { path: path.display().to_string() });
        }
        std::fs::create_dir_all(path).map_err(|e| open_error(path, "creating the directory", e))?;
        // One path for it, whatever the process does with its working directory.
        let path = &path.canonicalize().map_err(|e| open_error(path, "resolving", e))?;
        let format_path = path.join("FORMAT");
        if !format_path.exists() {
            // A lock and an unfinished FORMAT are what a first start that died leaves; lost+found is a mount point's.
            let entries = std::fs::read_dir(path).map_err(|e| open_error(path, "listing", e))?;
            let ours = |name: &str| matches!(name, "LOCK" | "FORMAT.new" | "lost+found");
            if entries.flatten().any(|entry| !entry.file_name().to_str().is_some_and(ours)) {
                return Err(OpenError::NotOurs { path: path.display().to_string() });
            }
        }
        let lock_path = path.join("LOCK");
        let lock = lock_file(&lock_path)
            .map_err(|e| open_error(path, "locking the directory", e))?
            .ok_or_else(|| OpenError::InUse { path: path.display().to_string() })?;
        match std::fs::read(&format_path) {
            Ok(found) if found.trim_ascii() == FORMAT.as_bytes() => {}
            Ok(found) => {
                let found = String::from_utf8_lossy(found.trim_ascii()).chars().take(60).collect();
                return Err(OpenError::Format { path: path.display().to_string(), found, want: FORMAT });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let line = format!("{FORMAT}\n");
                replace_file(&format_path, line.as_bytes())
                    .map_err(|e| open_error(path, "writing FORMAT", e))?;
            }
            Err(error) => return Err(open_error(path, "reading FORMAT", error)),
        }
        for name in ["wal", "log"] {
            let sub = path.join(name);
            std::fs::create_dir_all(&sub).map_err(|e| open_error(&sub, "creating the directory", e))?;
        }
        sync_dir(path).map_err(|e| open_error(path, "syncing the directory", e))?;
        // The lock and the directories may be from a time when it was writable.
        let probe = path.join("wal").join("probe");
        std::fs::write(&probe, b"").map_err(|e| open_error(path, "writing", e))?;
        std::fs::remove_file(&probe).map_err(|e| open_error(path, "writing", e))?;
        Ok(DataDir { path: path.to_owned(), lock: Arc::new(Lock(lock)), wal_id: OnceLock::new() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that may still be written on its disk.
    pub fn free_bytes(&self) -> io::Result<u64> {
        flumen_io::free_bytes(&self.path)
    }

    /// Brings everything that a former run left in its WALs into the partitions' segments. Before the shards start, once;
    /// their number may differ from the former run's. Keeps up to `cache_hint` bytes of the newest batches in memory.
    pub fn recover(&self, cache_hint: usize) -> Result<Vec<RecoveredGroup>, OpenError> {
        if self.wal_id.get().is_some() {
            return Err(OpenError::Config("the data directory is recovered once per start".to_owned()));
        }
        let (groups, wal_id) = crate::recovery::recover(&self.path, cache_hint)?;
        let _ = self.wal_id.set(wal_id);
        Ok(groups)
    }

    /// Removes the directory of a partition that no shard has taken over.
    pub fn remove_group(&self, dir_name: &str) -> io::Result<()> {
        if !crate::group_state::valid_dir_name(dir_name) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let root = self.path.join("log");
        let from = root.join(dir_name);
        // The group is not in this run's WAL, so its number is of no use to a recovery.
        let to = root.join(format!("{dir_name}.{}.deleted", crate::types::UNKNOWN_GROUP));
        std::fs::rename(&from, &to)?;
        sync_dir(&root)?;
        std::fs::remove_dir_all(&to)
    }

    pub(crate) fn wal_id(&self) -> Option<u64> {
        self.wal_id.get().copied()
    }

    pub(crate) fn lock(&self) -> Arc<Lock> {
        Arc::clone(&self.lock)
    }
}
