//! A clean stop: everything goes to segments, `group.meta` and `CLEAN`, so that the next start reads no ring.
//!
//! Alone on its shard: it holds the locks of flusher and compaction, and nothing may be staged any more.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use flumen_io::FileSystem;

use crate::data_dir::replace_file;
use crate::direct;
use crate::flush::{SYNC_EACH_MAX, flush_run_to, seal, snapshot_of, sync_segments, write_snapshot};
use crate::group::Group;
use crate::store::Shard;
use crate::types::{GroupId, LANES, LogPoisoned, ShutdownError};
use crate::wal::sync_os_lane;

fn poisoned(shard: &Shard) -> ShutdownError {
    ShutdownError::Poisoned(LogPoisoned {
        reason: if shard.is_poisoned() {
            "it failed before it was shut down".to_owned()
        } else {
            "no space left on the disk".to_owned()
        },
    })
}

pub(crate) async fn shut_down(shard: &Rc<Shard>) -> Result<(), ShutdownError> {
    shard.closing.set(true);
    shard.wake_flusher();
    let _no_compaction = shard.compacting.lock().await;
    let _alone = shard.flush_lock.lock().await;
    // Nobody writes records any more, so what is said below contains all there are.
    let last = shard.next_lsn.get() - 1;
    for lane in LANES {
        shard.wal(lane).wake_writer();
        if let Some(lsn) = shard.wal(lane).newest_pending() {
            shard.wait_durable(lane, lsn).await?;
        }
    }
    // What is said to be in segments below was synced, unless a sync failed: then nobody knows, and nothing is said.
    shard.check_poison()?;
    let groups: Vec<Rc<Group>> = shard.groups.borrow().values().cloned().collect();
    let mut everything = true;
    for group in &groups {
        // A full disk is no reason to hang: the WAL has it all.
        let upto = direct::waiting_upto(group);
        while flush_run_to(shard, group, upto).await.map_err(|_| poisoned(shard))? {}
        everything &= group.inner.borrow().tail.first_unflushed().is_none();
    }
    // A segment of a stopped store is as long as what it holds, for whoever reads it next.
    for group in &groups {
        let active = group
            .inner
            .borrow()
            .segments
            .back()
            .map(|segment| (segment.base, segment.bytes, segment.reserved));
        if let Some((base, bytes, reserved)) = active
            && reserved > bytes
            && !group.deleted.get()
            && !group.frozen.get()
        {
            seal(shard, group, base, bytes).map_err(|source| ShutdownError::Io {
                path: group.log_path(base).display().to_string(),
                source,
            })?;
            let mut inner = group.inner.borrow_mut();
            if !inner.dirty.contains(&base) {
                inner.dirty.push(base);
            }
        }
    }
    sync_segments(shard, &groups).await.map_err(|_| poisoned(shard))?;
    sync_os_lane(shard).await?;
    let mut metas = Vec::new();
    for group in &groups {
        let (dirty, snapshot) = {
            let mut inner = group.inner.borrow_mut();
            let inner = &mut *inner;
            if group.frozen.get() {
                continue;
            }
            let due = inner.producers_whole && inner.snapshot_offset != inner.log_end;
            let keep = inner.snapshot_safe;
            let snapshot = due.then(|| (keep, snapshot_of(inner, &group.producers.borrow())));
            (std::mem::take(&mut inner.meta_dirty), snapshot)
        };
        let meta = dirty.then(|| group.state(shard.wal_id, last).encode());
        if meta.is_some() || snapshot.is_some() {
            metas.push((group.dir.clone(), meta, snapshot));
        }
    }
    let root = shard.root.clone();
    let clean = everything.then(|| {
        let dir = shard.root.join("wal").join(format!("{}", shard.config.shard));
        let tombstones = shard.tombstones.borrow();
        let deleted: Vec<GroupId> = tombstones.iter().filter(|of| of.is_saved).map(|of| of.group).collect();
        (dir.join("CLEAN"), clean_line(shard.wal_id, &deleted))
    });
    let files = shard.files.clone();
    let written = shard.disk.off_thread(move || {
        let mut replaced = Vec::new();
        for (dir, meta, snapshot) in metas {
            if let Some((keep, (offset, bytes))) = snapshot {
                write_snapshot(&files, &dir, (offset, keep), &bytes)?;
            }
            if let Some(meta) = meta {
                replaced.push((dir.join("group.meta"), meta));
            }
        }
        replace_many(&files, &root, replaced)?;
        if let Some((path, id)) = clean {
            replace_file(&files, &path, id.as_bytes())?;
        }
        Ok(())
    });
    let written = written.await.and_then(|result: io::Result<()>| result);
    written.map_err(|source| ShutdownError::Io { path: shard.root.display().to_string(), source })?;
    // The states just written count what was on its way past the WAL.
    shard.note_direct(shard.direct.issued());
    Ok(())
}

/// Replaces files as `replace_file` does; many of them with two syncs of the file system instead of two each.
pub(crate) fn replace_many(files: &FileSystem, root: &Path, new: Vec<(PathBuf, Vec<u8>)>) -> io::Result<()> {
    if new.len() <= SYNC_EACH_MAX / 4 {
        for (path, bytes) in new {
            replace_file(files, &path, &bytes)?;
        }
        return Ok(());
    }
    for (path, bytes) in &new {
        files.write(&path.with_extension("new"), bytes)?;
    }
    files.sync_all(root)?;
    for (path, _) in &new {
        files.rename(&path.with_extension("new"), path)?;
    }
    files.sync_all(root)
}

/// Content of `CLEAN`: the WAL's id, and the partitions that were deleted and that its states file still has; their records
/// are not looked for in a ring that is not read.
pub(crate) fn clean_line(wal_id: u64, deleted: &[GroupId]) -> String {
    let mut line = wal_id.to_string();
    for group in deleted {
        line.push_str(&format!(" {group}"));
    }
    let crc = crc32c::crc32c(line.as_bytes());
    if deleted.is_empty() { line } else { format!("{line} {crc:08x}") }
}

/// The deleted partitions that a `CLEAN` for this WAL names; `None`: it is for another, or damaged.
pub(crate) fn parse_clean(text: &str, wal_id: u64) -> Option<Vec<GroupId>> {
    let text = text.trim();
    if text == wal_id.to_string() {
        return Some(Vec::new());
    }
    let (line, crc) = text.rsplit_once(' ')?;
    let mut words = line.split(' ');
    let whole = u32::from_str_radix(crc, 16).is_ok_and(|crc| crc == crc32c::crc32c(line.as_bytes()));
    (whole && words.next()?.parse() == Ok(wal_id))
        .then(|| words.map_while(|word| word.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_names_what_was_deleted() {
        for deleted in [vec![], vec![7], vec![1, u64::MAX]] {
            let line = clean_line(12, &deleted);
            assert_eq!(parse_clean(&line, 12), Some(deleted));
            assert_eq!(parse_clean(&line, 1), None);
        }
        assert_eq!(parse_clean(&clean_line(12, &[71, 5]).replace("71", "72"), 12), None);
        assert_eq!(parse_clean("12 71", 12), None);
    }
}
