//! Snapshots of the metadata on disk: `<data dir>/metadata/<next offset>.snapshot`, so that a start replays what came
//! after the newest one and not the whole history.
//!
//! Owns the directory. Runs on the thread that asks (the controller writes from a blocking thread, never from its
//! shard). A file appears whole or not at all: temporary file, sync, rename, sync of the directory. Two are kept, and
//! the log is only ever cut below the older one, so one that turns out damaged costs a longer replay and nothing else.
//! It does not decide when to write one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use flumen_metadata::{MetadataImage, NodeInfo, decode_snapshot_file, encode_snapshot_file};
use flumen_storage::failpoint::{self, Failpoint};

/// The newest and one to fall back to.
const KEPT: usize = 2;
const SUFFIX: &str = ".snapshot";
/// There from before the log is replaced by an empty one until the next snapshot is written.
const ANEW: &str = "anew";
/// Larger than any metadata that a node can serve (some 100 bytes per partition); a file beyond it is not ours.
const FILE_BYTES_MAX: u64 = 1 << 30;

#[derive(Debug, Clone)]
pub struct MetadataSnapshots {
    directory: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    /// The disk lost something, and does not say that it lost only this.
    #[error("syncing {path}: {error}")]
    Sync { path: PathBuf, error: io::Error },
}

impl MetadataSnapshots {
    pub fn open(data_dir: &Path) -> Result<MetadataSnapshots, SnapshotError> {
        let directory = data_dir.join("metadata");
        fs::create_dir_all(&directory)
            .and_then(|()| flumen_io::FileSystem::machine().sync_dir(data_dir))
            .map_err(|error| SnapshotError::Io { path: directory.clone(), error })?;
        Ok(MetadataSnapshots { directory })
    }

    fn path(&self, next_offset: i64) -> PathBuf {
        self.directory.join(format!("{next_offset:020}{SUFFIX}"))
    }

    fn io(&self) -> impl Fn(io::Error) -> SnapshotError {
        let path = self.directory.clone();
        move |error| SnapshotError::Io { path: path.clone(), error }
    }

    /// Offsets of the snapshots that are there, newest first.
    fn offsets(&self) -> io::Result<Vec<i64>> {
        let mut offsets = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let offset = name.to_str().and_then(|n| n.strip_suffix(SUFFIX)?.parse::<i64>().ok());
            offsets.extend(offset);
        }
        offsets.sort_unstable_by(|a, b| b.cmp(a));
        Ok(offsets)
    }

    /// The newest snapshot that is whole, and how far it reaches. Damaged ones are put aside under another name.
    pub fn newest(&self, node: &NodeInfo) -> Result<Option<(i64, MetadataImage)>, SnapshotError> {
        for offset in self.offsets().map_err(self.io())? {
            let path = self.path(offset);
            let reason = match read(&path, offset, node).map_err(self.io())? {
                Ok(image) => return Ok(Some((offset, image))),
                Err(reason) => reason,
            };
            tracing::error!(path = %path.display(), reason, "a metadata snapshot is damaged; falling back to what came before it");
            fs::rename(&path, path.with_extension("damaged")).map_err(self.io())?;
        }
        Ok(None)
    }

    /// The log is to be replaced. What snapshots hold is older than what this node has done by it, and so is what comes into the
    /// new log first: gone through once more it would have this node delete what it was given again later.
    pub fn begin_anew(&self) -> Result<(), SnapshotError> {
        let path = self.directory.join(ANEW);
        fs::File::create(&path)
            .and_then(|_| flumen_io::FileSystem::machine().sync_dir(&self.directory))
            .map_err(|error| SnapshotError::Io { path, error })
    }

    /// The log was replaced, and no snapshot was written since.
    pub fn is_anew(&self) -> Result<bool, SnapshotError> {
        self.directory.join(ANEW).try_exists().map_err(self.io())
    }

    /// Stores a snapshot and drops those that are no longer needed. Returns below which offset the log is not needed
    /// either.
    pub fn write(&self, next_offset: i64, image: &MetadataImage) -> Result<Option<i64>, SnapshotError> {
        let path = self.path(next_offset);
        let temporary = path.with_extension("tmp");
        let sync_failed = |error| SnapshotError::Sync { path: self.directory.clone(), error };
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&encode_snapshot_file(next_offset, &image.snapshot()))?;
            Ok(file)
        };
        write().map_err(self.io())?.sync_all().map_err(sync_failed)?;
        failpoint::pass(Failpoint::MetadataWritten);
        fs::rename(&temporary, &path).map_err(self.io())?;
        flumen_io::FileSystem::machine().sync_dir(&self.directory).map_err(sync_failed)?;
        failpoint::pass(Failpoint::MetadataRenamed);
        if self.is_anew()? {
            fs::remove_file(self.directory.join(ANEW)).map_err(self.io())?;
        }
        let offsets = self.offsets().map_err(self.io())?;
        for old in offsets.iter().skip(KEPT) {
            fs::remove_file(self.path(*old)).map_err(self.io())?;
        }
        Ok(offsets.get(KEPT - 1).copied())
    }
}

/// Outer error: the file cannot be read at all. Inner: what it holds is no snapshot.
fn read(path: &Path, offset: i64, node: &NodeInfo) -> io::Result<Result<MetadataImage, String>> {
    if fs::metadata(path)?.len() > FILE_BYTES_MAX {
        return Ok(Err("it is larger than any snapshot".to_string()));
    }
    let bytes = fs::read(path)?;
    let decoded = decode_snapshot_file(&bytes).map_err(|e| e.to_string()).and_then(|(next_offset, body)| {
        if next_offset != offset {
            return Err(format!("it reaches to {next_offset}, its name says {offset}"));
        }
        MetadataImage::restore(node.clone(), body).map_err(|e| e.to_string())
    });
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use flumen_metadata::Command;

    use super::*;

    fn node() -> NodeInfo {
        NodeInfo { id: 1, host: "h".into(), port: 1, rack: None }
    }

    fn image(producer_ids: i64) -> MetadataImage {
        let mut image = MetadataImage::empty(node());
        image.apply(&Command::AllocateProducerIds { count: producer_ids }).unwrap();
        image
    }

    fn newest(snapshots: &MetadataSnapshots) -> Option<(i64, i64)> {
        snapshots.newest(&node()).unwrap().map(|(offset, image)| (offset, image.next_producer_id))
    }

    #[test]
    fn the_newest_two_are_kept_and_the_newest_whole_one_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = MetadataSnapshots::open(dir.path()).unwrap();
        assert_eq!(newest(&snapshots), None);
        assert_eq!(snapshots.write(10, &image(1)).unwrap(), None);
        assert_eq!(snapshots.write(20, &image(2)).unwrap(), Some(10));
        assert_eq!(snapshots.write(300, &image(3)).unwrap(), Some(20));
        assert_eq!(snapshots.offsets().unwrap(), [300, 20]);
        assert_eq!(newest(&snapshots), Some((300, 3)));

        // What a crash while writing leaves is no snapshot.
        fs::write(snapshots.path(400).with_extension("tmp"), b"half").unwrap();
        assert_eq!(newest(&snapshots), Some((300, 3)));

        let mut bytes = fs::read(snapshots.path(300)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(snapshots.path(300), bytes).unwrap();
        assert_eq!(newest(&snapshots), Some((20, 2)));
        assert_eq!(snapshots.offsets().unwrap(), [20], "the damaged one is out of the way");
        assert_eq!(snapshots.write(500, &image(5)).unwrap(), Some(20));
        assert!(!snapshots.is_anew().unwrap());
        snapshots.begin_anew().unwrap();
        assert!(snapshots.is_anew().unwrap() && newest(&snapshots) == Some((500, 5)));
        snapshots.write(500, &image(5)).unwrap();
        assert!(!snapshots.is_anew().unwrap());
        // A file that was renamed by hand does not pass for another offset.
        fs::rename(snapshots.path(500), snapshots.path(600)).unwrap();
        assert_eq!(newest(&snapshots), Some((20, 2)));
    }
}
