//! One error per operation.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another flumen process uses {0}: stop it, or choose another --data-dir")]
    Locked(PathBuf),
    #[error("{path} has format version {found}, this binary reads {ours}: use the version that wrote it")]
    Version { path: PathBuf, found: String, ours: u32 },
    #[error("{0} is not a directory: choose another --data-dir")]
    NotADirectory(PathBuf),
    #[error("{0} has files but no FORMAT file, so it is not a data directory of flumen: choose an empty one")]
    NotOurs(PathBuf),
    #[error("cannot write to {path}: {source}; check its owner and that its file system is not read-only")]
    ReadOnly { path: PathBuf, source: io::Error },
    #[error("no space left in {path}: free some, then start again; nothing acknowledged is lost")]
    Full { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl OpenError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(io::Error) -> OpenError {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                OpenError::ReadOnly { path, source }
            }
            io::ErrorKind::StorageFull => OpenError::Full { path },
            io::ErrorKind::NotADirectory => OpenError::NotADirectory(path),
            _ => OpenError::Io { path, source },
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("cannot create {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
}

/// Nothing was stored and nothing will be.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error("the log has no room")]
    NoSpace,
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
    #[error("the log of this partition is damaged: {0}")]
    Damaged(String),
}

/// A write or sync failed. What was in flight is in an unknown state until the next start reads it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a write to the log failed: {0}")]
pub struct LogPoisoned(pub String);

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("offset outside {start}..{end}")]
    OutOfRange { start: i64, end: i64 },
    #[error("damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}
