//! Which segments may go. The choice is pure (`choose`); `enforce_retention` acts on it.
//!
//! Only whole segments from the front go, and none that reaches above the hold offset (what an export has not settled)
//! or the high watermark.

use std::io;
use std::rc::Rc;

use crate::flush::{snapshot_of, sync_snapshot, write_snapshot};
use crate::group::{Group, GroupLog, Inner, Segment};
use crate::mutant::{self, Mutant};
use crate::segment_index::{INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, decode_entry};
use crate::store::Shard;
use crate::types::{Durability, LogPoisoned, RetentionOutcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    end: i64,
    bytes: u64,
    /// When its newest record was written.
    newest_ms: i64,
    /// Being written to; goes only when all of it is too old.
    active: bool,
}

#[derive(Debug, Clone, Copy)]
struct Rules {
    now_ms: i64,
    retention_ms: i64,
    retention_bytes: i64,
    log_start: i64,
    /// Nothing at or above this goes.
    hold: i64,
    /// Not in segments, and counted for the size.
    unflushed_bytes: u64,
}

/// How many segments, from the oldest, may go.
fn choose(segments: &[Candidate], rules: Rules) -> usize {
    let mut size: u64 = segments.iter().map(|segment| segment.bytes).sum::<u64>() + rules.unflushed_bytes;
    let mut chosen = 0;
    for segment in segments {
        if segment.end > rules.hold {
            break;
        }
        let below_start = segment.end <= rules.log_start;
        let too_old =
            rules.retention_ms >= 0 && rules.now_ms.saturating_sub(segment.newest_ms) > rules.retention_ms;
        // As Kafka: a segment goes only if what remains still has the promised size.
        let too_much =
            u64::try_from(rules.retention_bytes).is_ok_and(|keep| size.saturating_sub(segment.bytes) >= keep);
        let goes = if segment.active { too_old || below_start } else { too_old || too_much || below_start };
        if !goes {
            break;
        }
        size = size.saturating_sub(segment.bytes);
        chosen += 1;
    }
    chosen
}

/// Largest timestamp of a segment: remembered, or from the end of its index, or the file's own time.
fn newest_ms(shard: &Shard, group: &Group, segment: &Segment) -> i64 {
    if let Some(known) = segment.max_timestamp.filter(|timestamp| *timestamp >= 0) {
        return known;
    }
    // Compaction left nothing in it, so there is nothing to keep it for.
    if segment.bytes == 0 && segment.compacted.is_some() {
        return i64::MIN;
    }
    let from_index = || {
        let bytes = shard.files.read(&group.segment_index_path(segment.name())).ok()?;
        let entries = (bytes.len().checked_sub(INDEX_HEADER_BYTES)?) / INDEX_ENTRY_BYTES;
        let at = INDEX_HEADER_BYTES + entries.checked_sub(1)? * INDEX_ENTRY_BYTES;
        decode_entry(bytes.get(at..)?)
            .map(|entry| entry.max_timestamp_before)
            .filter(|timestamp| *timestamp >= 0)
    };
    let from_file = || {
        let modified = shard.files.metadata(&group.segment_path(segment.name())).ok()?.modified_ms;
        Some(modified).filter(|modified| *modified > 0)
    };
    // A segment of which nothing can be said is as young as can be.
    from_index().or_else(from_file).unwrap_or(i64::MAX)
}

/// Takes `count` segments from the front out of the log and hands their files to the remover.
fn drop_front(shard: &Shard, group: &Rc<Group>, inner: &mut Inner, count: usize) -> u64 {
    let mut bytes = 0;
    for _ in 0..count {
        let Some(segment) = inner.segments.pop_front() else { break };
        bytes += segment.bytes;
        inner.dirty.retain(|base| *base != segment.base);
        shard.forget_file(group.id, segment.base);
        for path in [group.segment_index_path(segment.name()), group.segment_path(segment.name())] {
            shard.throw_away(path, inner.log_start_by, Some(Rc::clone(group)));
        }
    }
    if count > 0 {
        inner.meta_dirty = true;
        let first = inner.segments.front().map_or(inner.flushed_end, |segment| segment.base);
        inner.raise_before(first);
        inner.forget_epochs();
    }
    bytes
}

/// Whole segments below the log start go; the one being written stays, and retention takes what alone knows of producers.
pub(crate) fn drop_below_start(shard: &Rc<Shard>, group: &Rc<Group>, inner: &mut Inner) {
    let count = (0..inner.segments.len().saturating_sub(1))
        .take_while(|at| {
            let end = inner.segment_end(*at);
            end <= inner.log_start && !lacks_producers(group, inner, end)
        })
        .count();
    drop_front(shard, group, inner, count);
}

/// A producer is known until it expires, however soon its records go, as in Kafka: a snapshot that knows of all batches below
/// `end` must be there before those go, which no crash takes.
fn lacks_producers(group: &Group, inner: &Inner, end: i64) -> bool {
    inner.snapshot_safe < end && inner.producers_whole && !group.producers.borrow().is_empty()
}

fn unchanged(inner: &Inner) -> RetentionOutcome {
    RetentionOutcome { log_start_offset: inner.log_start, ..RetentionOutcome::default() }
}

/// Segments at the front that nothing keeps any more, the offset after them, and their bytes.
struct Expired {
    segments: usize,
    end: i64,
    bytes: u64,
}

impl GroupLog {
    /// Deletes what `retention.ms` and `retention.bytes` no longer keep, nothing at or above `hold_offset`.
    pub async fn enforce_retention(&self, now_ms: i64, hold_offset: i64) -> RetentionOutcome {
        {
            let inner = &mut *self.group.inner.borrow_mut();
            match self.expired(inner, now_ms, hold_offset) {
                None => return unchanged(inner),
                Some(expired) if !lacks_producers(&self.group, inner, expired.end) => {
                    return self.drop_expired(inner, expired);
                }
                Some(_) => {}
            }
        }
        let saved = self.save_producers().await;
        let inner = &mut *self.group.inner.borrow_mut();
        match self.expired(inner, now_ms, hold_offset).filter(|_| saved.is_ok()) {
            None => unchanged(inner),
            Some(expired) => self.drop_expired(inner, expired),
        }
    }

    /// Writes down who the producers are, so that no crash takes it, nor the end of the log that it tells of: one beyond the end
    /// of the log would not be used. A disk that has no room for it gets the room.
    async fn save_producers(&self) -> Result<(), LogPoisoned> {
        let (shard, group) = (&self.shard, &self.group);
        let offset = {
            // Nobody else writes or removes snapshots meanwhile.
            let _alone = shard.flush_lock.lock().await;
            let (offset, bytes, keep, durable) = {
                let inner = &mut *group.inner.borrow_mut();
                let (offset, bytes) = snapshot_of(inner, &group.producers.borrow());
                (offset, bytes, inner.snapshot_safe, inner.config.durability == Durability::Durable)
            };
            if group.deleted.get() {
                return Ok(());
            }
            let sync = durable && !mutant::is(Mutant::SnapshotsWithoutSync);
            let mut alone = if sync { Some(shard.sync_alone().await?) } else { None };
            let (files, dir) = (shard.files.clone(), group.dir.clone());
            let written = shard.disk.off_thread(move || {
                let path = write_snapshot(&files, &dir, (offset, keep), &bytes)?;
                Ok(if sync { sync_snapshot(&files, &dir, &path) } else { Ok(()) })
            });
            let written: io::Result<io::Result<()>> = written.await.and_then(|result| result);
            match (written, &mut alone) {
                (Ok(Ok(())), _) => {}
                _ if group.deleting.get() || group.deleted.get() => return Ok(()),
                (Ok(Err(error)), Some(alone)) => {
                    shard.sync_failed(alone, &group.dir, &error);
                    return Err(shard.check_poison().expect_err("poisoned just now"));
                }
                (Ok(Err(error)) | Err(error), _) => {
                    tracing::warn!(group = group.id, %error, "producer snapshot not written");
                    group.inner.borrow_mut().snapshot_offset = -1;
                    return Ok(());
                }
            }
            offset
        };
        if self.inner().config.durability == Durability::Durable {
            self.force().await?;
        } else {
            // Nobody counts on more than that a kill does not take it.
            let (lane, lsn) = self.newest(&self.inner());
            shard.wait_durable(lane, lsn).await?;
        }
        let inner = &mut *group.inner.borrow_mut();
        // Else it was cut meanwhile, or the log is another.
        if inner.snapshot_offset >= offset {
            inner.snapshot_safe = offset;
        }
        Ok(())
    }

    fn expired(&self, inner: &Inner, now_ms: i64, hold_offset: i64) -> Option<Expired> {
        if self.group.is_damaged()
            || self.group.deleting.get()
            || self.group.deleted.get()
            || inner.is_flushing()
            || inner.segments.is_empty()
        {
            return None;
        }
        let (retention_ms, retention_bytes) = (inner.config.retention_ms, inner.config.retention_bytes);
        let active = inner.segments.len() - 1;
        // The last segment may go too, but not while records for it wait.
        let last_may_go = inner.tail.unflushed().all(|entry| !entry.is_batch());
        let mut candidates = Vec::new();
        for at in 0..inner.segments.len() {
            let is_active = at == active;
            if is_active && !last_may_go {
                break;
            }
            let segment = &inner.segments[at];
            let newest =
                if retention_ms >= 0 { newest_ms(&self.shard, &self.group, segment) } else { i64::MAX };
            candidates.push(Candidate {
                end: inner.segment_end(at),
                bytes: segment.bytes,
                newest_ms: newest,
                active: is_active,
            });
            // No need to look at what cannot go before this one does.
            if inner.segment_end(at) > inner.log_start
                && newest != i64::MAX
                && now_ms.saturating_sub(newest) <= retention_ms
                && retention_bytes < 0
            {
                break;
            }
        }
        let in_candidates: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
        let rules = Rules {
            now_ms,
            retention_ms,
            retention_bytes,
            log_start: inner.log_start,
            hold: hold_offset.min(inner.high_watermark),
            unflushed_bytes: inner.size_bytes().saturating_sub(in_candidates),
        };
        let segments = choose(&candidates, rules);
        let end = candidates.get(segments.checked_sub(1)?)?.end;
        Some(Expired { segments, end, bytes: candidates[..segments].iter().map(|c| c.bytes).sum() })
    }

    fn drop_expired(&self, inner: &mut Inner, expired: Expired) -> RetentionOutcome {
        let new_start = expired.end.max(inner.log_start);
        // The log start goes first into the WAL; should that be lost, the missing segments say the same.
        if new_start > inner.log_start && self.stage_log_start(inner, new_start).is_err() {
            return unchanged(inner);
        }
        if inner.direct_log_start {
            // It goes past the WAL: the segments go when it is counted.
            return unchanged(inner);
        }
        // `stage_log_start` has dropped what lies below already, except the one being written.
        let left = inner.segments.iter().filter(|segment| segment.base < expired.end).count();
        drop_front(&self.shard, &self.group, inner, left);
        RetentionOutcome {
            deleted_segments: expired.segments,
            deleted_bytes: expired.bytes,
            log_start_offset: inner.log_start,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments() -> Vec<Candidate> {
        (1..=4)
            .map(|k| Candidate { end: k * 100, bytes: 1000, newest_ms: k * 10_000, active: k == 4 })
            .collect()
    }

    const RULES: Rules = Rules {
        now_ms: 45_000,
        retention_ms: -1,
        retention_bytes: -1,
        log_start: 0,
        hold: i64::MAX,
        unflushed_bytes: 0,
    };

    #[test]
    fn by_time_size_start_and_hold() {
        let all = segments();
        assert_eq!(choose(&all, RULES), 0);
        assert_eq!(choose(&all, Rules { retention_ms: 20_000, ..RULES }), 2);
        assert_eq!(choose(&all, Rules { retention_ms: 0, ..RULES }), 4);
        assert_eq!(choose(&all, Rules { retention_ms: 0, hold: 299, ..RULES }), 2);
        assert_eq!(choose(&all, Rules { retention_ms: 0, hold: 300, ..RULES }), 3);
        assert_eq!(choose(&all, Rules { retention_bytes: 2500, ..RULES }), 1);
        assert_eq!(choose(&all, Rules { retention_bytes: 3000, ..RULES }), 1);
        assert_eq!(choose(&all, Rules { retention_bytes: 3001, ..RULES }), 0);
        // The segment being written does not go for its size.
        assert_eq!(choose(&all, Rules { retention_bytes: 0, ..RULES }), 3);
        assert_eq!(choose(&all, Rules { retention_bytes: 3000, unflushed_bytes: 2000, ..RULES }), 3);
        assert_eq!(choose(&all, Rules { log_start: 250, ..RULES }), 2);
    }
}
