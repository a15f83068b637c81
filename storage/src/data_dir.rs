//! The data directory: its lock, its format version, its layout.
//!
//! `FORMAT` (version), `LOCK`, `wal/<shard>-<lane>/<slot>.wal`, `wal/<name>.checkpoint`,
//! `log/<topic>-<partition>.g<group id>/` with segments.

use std::fs;
use std::path::{Path, PathBuf};

use crate::entry::{GroupId, Lane, RecoveredGroup};
use crate::error::OpenError;
use crate::recovery;

/// Raised when an older binary could misread what a newer one wrote.
const FORMAT_VERSION: u32 = 1;
const FORMAT_FILE: &str = "FORMAT";

pub struct DataDir {
    root: PathBuf,
    /// Held until the process ends.
    _lock: flumen_io::File,
}

impl DataDir {
    /// Creates or opens, and locks. Refuses what is not a data directory of this format.
    pub fn open(path: &Path) -> Result<DataDir, OpenError> {
        if path.exists() && !path.is_dir() {
            return Err(OpenError::NotADirectory(path.to_path_buf()));
        }
        fs::create_dir_all(path).map_err(OpenError::io(path))?;
        let root = path.canonicalize().map_err(OpenError::io(path))?;
        let format = root.join(FORMAT_FILE);
        let found = match fs::read_to_string(&format) {
            Ok(text) => Some(text.trim().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(OpenError::io(&format)(e)),
        };
        if found.is_none() {
            let mut entries = fs::read_dir(&root).map_err(OpenError::io(&root))?;
            // A lock file alone is what a first start that died left behind; lost+found is a mount point's.
            let strange = entries.any(|e| {
                e.is_ok_and(|e| !matches!(e.file_name().to_str(), Some("LOCK" | "lost+found" | "FORMAT.tmp")))
            });
            if strange {
                return Err(OpenError::NotOurs(root));
            }
        }
        let lock_path = root.join("LOCK");
        let lock = flumen_io::lock_file(&lock_path)
            .map_err(OpenError::io(&lock_path))?
            .ok_or_else(|| OpenError::Locked(root.clone()))?;
        match found {
            None => {
                for directory in ["wal", "log"] {
                    let path = root.join(directory);
                    fs::create_dir_all(&path).map_err(OpenError::io(&path))?;
                }
                // Last: a directory without it is still empty in the eyes of the check above.
                crate::checkpoint::write_atomically(&format, format!("{FORMAT_VERSION}\n").as_bytes())
                    .map_err(OpenError::io(&format))?;
            }
            Some(version) if version == FORMAT_VERSION.to_string() => {}
            Some(version) => {
                return Err(OpenError::Version { path: root, found: version, ours: FORMAT_VERSION });
            }
        }
        Ok(DataDir { root, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.root
    }

    pub(crate) fn wal_root(&self) -> PathBuf {
        self.root.join("wal")
    }

    pub(crate) fn wal_dir(&self, shard: usize, lane: Lane) -> PathBuf {
        let lane = match lane {
            Lane::Durable => "durable",
            Lane::Os => "os",
        };
        self.wal_root().join(format!("{shard}-{lane}"))
    }

    pub(crate) fn log_root(&self) -> PathBuf {
        self.root.join("log")
    }

    /// Turns what the last run left into segments and returns every group. Must run before any shard
    /// opens its store.
    pub fn recover(&self) -> Result<Vec<RecoveredGroup>, OpenError> {
        recovery::recover(self)
    }

    /// Removes a group that no topic names any more.
    pub fn remove_group(&self, dir_name: &str) -> std::io::Result<()> {
        let path = self.log_root().join(dir_name);
        let doomed = self.log_root().join(format!("{dir_name}{DELETED_SUFFIX}"));
        fs::rename(&path, &doomed)?;
        flumen_io::sync_dir(&self.log_root())?;
        fs::remove_dir_all(&doomed)
    }
}

pub(crate) const DELETED_SUFFIX: &str = ".deleted";

/// The group id at the end of a partition's directory name.
pub(crate) fn group_of(dir_name: &str) -> Option<GroupId> {
    dir_name.rsplit_once(".g")?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        let first = DataDir::open(&path).unwrap();
        assert!(matches!(DataDir::open(&path), Err(OpenError::Locked(_))));
        drop(first);
        drop(DataDir::open(&path).unwrap());
        fs::write(path.join(FORMAT_FILE), "99\n").unwrap();
        assert!(matches!(DataDir::open(&path), Err(OpenError::Version { .. })));
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        assert!(matches!(DataDir::open(&file), Err(OpenError::NotADirectory(_))));
        let other = dir.path().join("o");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("precious.txt"), "x").unwrap();
        assert!(matches!(DataDir::open(&other), Err(OpenError::NotOurs(_))));
    }

    #[test]
    fn reads_the_group_from_the_directory_name() {
        assert_eq!(group_of("orders-0.g17"), Some(17));
        assert_eq!(group_of("a.g-3.gb-1.g2"), Some(2));
        assert_eq!(group_of("orders-0"), None);
        assert_eq!(group_of("orders-0.g17.deleted"), None);
    }
}
