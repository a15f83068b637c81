//! Reading a partition up to the high watermark, and finding offsets.

use bytes::Bytes;

use flumen_protocol::error_code::ErrorCode;
use flumen_storage::ReadError;

use super::Partition;
use crate::cluster::node_id_of;
use crate::mutant::{self, Mutant};

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("offset {offset} is outside {start}..={end}")]
    OutOfRange { offset: i64, start: i64, end: i64 },
    #[error("leader epoch {asked} is older than {current}")]
    FencedEpoch { asked: i32, current: i32 },
    #[error("leader epoch {asked} is newer than {current}")]
    UnknownEpoch { asked: i32, current: i32 },
    #[error("this node does not lead the partition")]
    NotLeader,
    #[error("this node has just begun to lead the partition")]
    NotYet,
    #[error("{0}")]
    Storage(String),
}

impl FetchError {
    pub fn code(&self) -> ErrorCode {
        match self {
            FetchError::OutOfRange { .. } => ErrorCode::OFFSET_OUT_OF_RANGE,
            FetchError::FencedEpoch { .. } => ErrorCode::FENCED_LEADER_EPOCH,
            FetchError::UnknownEpoch { .. } => ErrorCode::UNKNOWN_LEADER_EPOCH,
            FetchError::NotLeader => ErrorCode::NOT_LEADER_OR_FOLLOWER,
            FetchError::NotYet => ErrorCode::LEADER_NOT_AVAILABLE,
            FetchError::Storage(_) => ErrorCode::KAFKA_STORAGE_ERROR,
        }
    }
}

/// As what a replica answers a client's Fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    AsLeader,
    /// For clients of the same rack; up to the high watermark that it knows.
    AsFollower,
    NothingYet,
}

/// Whole record batches; the first may start before the offset that was asked for.
#[derive(Default)]
pub struct FetchedSlice {
    pub records: Vec<Bytes>,
    pub high_watermark: i64,
    pub log_start_offset: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffsetAt {
    pub offset: i64,
    pub timestamp: i64,
    pub leader_epoch: i32,
}

impl Partition {
    /// Kafka's rule: -1 skips the check, an older epoch is fenced, a newer one is unknown.
    pub fn check_epoch(&self, asked: i32) -> Result<(), FetchError> {
        let current = self.leader_epoch();
        if asked == -1 || asked == current {
            Ok(())
        } else if asked < current {
            Err(FetchError::FencedEpoch { asked, current })
        } else {
            Err(FetchError::UnknownEpoch { asked, current })
        }
    }

    /// Whether a client may read here. A leader that has committed nothing of its own term knows less than the one before
    /// told its clients, and where the log begins it may not know either: there is nothing to read for a moment. One
    /// that was deposed and does not know it serves what is committed, which no other leader contradicts.
    pub fn check_reader(&self, near: bool) -> Result<Reading, FetchError> {
        match self.check_serves() {
            Ok(()) => Ok(Reading::AsLeader),
            Err(FetchError::NotYet) => Ok(Reading::NothingYet),
            Err(_) if near && !self.joining.get() => Ok(Reading::AsFollower),
            Err(error) => Err(error),
        }
    }

    /// What a client hears that may have to wait.
    pub fn nothing_yet(&self) -> FetchedSlice {
        FetchedSlice {
            records: Vec::new(),
            high_watermark: self.high_watermark(),
            log_start_offset: self.log_start_offset(),
        }
    }

    /// Of these brokers the first that follows this leader and has what comes before `offset`.
    pub fn follower_with(&self, candidates: &[i32], offset: i64) -> Option<i32> {
        if candidates.is_empty() || self.alone.get() || offset < self.log_start_offset() {
            return None;
        }
        let status = self.raft_status();
        let has = |matched: u64| {
            matched >= status.last_index || self.log.end_of(matched).is_some_and(|end| end >= offset)
        };
        let others = status.peers.iter().filter(|peer| peer.id != self.node_id);
        let mut able = others.filter(|peer| has(peer.matched_index)).filter_map(|p| node_id_of(p.id));
        able.find(|id| candidates.contains(id))
    }

    /// Committed records from `offset` on, at most `max_bytes` but at least one batch.
    pub async fn fetch(&self, offset: i64, max_bytes: usize) -> Result<FetchedSlice, FetchError> {
        if let Some(reason) = self.damage() {
            return Err(FetchError::Storage(reason.to_string()));
        }
        let (high_watermark, end) = {
            let state = self.state.borrow();
            let uncommitted = mutant::is(Mutant::ServesUncommitted);
            (if uncommitted { state.next_offset } else { state.high_watermark }, state.next_offset)
        };
        let log_start_offset = self.log.log_start_offset();
        // A follower does not know how far the log goes.
        if offset > end && !self.is_leader() {
            return Err(FetchError::NotLeader);
        }
        if offset < log_start_offset || offset > end {
            return Err(FetchError::OutOfRange { offset, start: log_start_offset, end });
        }
        let mut slice = FetchedSlice { records: Vec::new(), high_watermark, log_start_offset };
        if offset >= high_watermark || max_bytes == 0 {
            return Ok(slice);
        }
        slice.records = match self.log.read_cached(offset, high_watermark, max_bytes) {
            Some(records) => records,
            None => match self.log.read(offset, high_watermark, max_bytes).await {
                Ok(records) => records,
                Err(ReadError::OutOfRange { start, end }) => {
                    return Err(FetchError::OutOfRange { offset, start, end });
                }
                Err(error) => {
                    tracing::error!(topic = %self.topic, partition = self.index, offset, %error, "read failed");
                    return Err(FetchError::Storage(error.to_string()));
                }
            },
        };
        Ok(slice)
    }

    /// ListOffsets: the special timestamps of Kafka, or the first record at or after a time.
    pub async fn offset_at(&self, timestamp: i64) -> Result<Option<OffsetAt>, FetchError> {
        // Where the log ends, and where it begins, another leader may have changed without this one knowing.
        self.confirm_leads().await?;
        let high_watermark = self.high_watermark();
        let leader_epoch = self.leader_epoch();
        let storage = |e: ReadError| FetchError::Storage(e.to_string());
        let found = match timestamp {
            // Latest: end of what may be read. Nothing is uncommitted to a reader, so both levels agree.
            -1 => Some(OffsetAt { offset: high_watermark, timestamp: -1, leader_epoch }),
            // Earliest, and earliest local: there is no remote tier.
            -2 | -4 => {
                let offset = self.log.log_start_offset();
                // An empty log has no epoch of its own: what comes first will be of the current one.
                let epoch = if offset == high_watermark { leader_epoch } else { self.epoch_at(offset) };
                Some(OffsetAt { offset, timestamp: -1, leader_epoch: epoch })
            }
            -3 => self.log.max_timestamp().await.map_err(storage)?.map(|(timestamp, offset)| OffsetAt {
                offset,
                timestamp,
                leader_epoch: self.epoch_at(offset),
            }),
            // Latest tiered, earliest pending upload: nothing is tiered.
            -5 | -6 => None,
            at => self.log.find_timestamp(at, high_watermark).await.map_err(storage)?.map(
                |(timestamp, offset)| OffsetAt { offset, timestamp, leader_epoch: self.epoch_at(offset) },
            ),
        };
        Ok(found)
    }

    fn epoch_at(&self, offset: i64) -> i32 {
        self.log.epoch_at(offset)
    }

    /// (epoch, end offset) of the largest epoch not above `epoch`; (-1, -1) when there is none.
    pub fn epoch_end_offset(&self, epoch: i32) -> (i32, i64) {
        let current = self.leader_epoch();
        if epoch == current {
            return (current, self.log_end_offset());
        }
        if epoch > current {
            return (-1, -1);
        }
        self.log.epoch_end_offset(epoch)
    }

    /// DeleteRecords: -1 stands for the high watermark. Returns the new log start offset.
    pub async fn delete_records(&self, offset: i64) -> Result<i64, FetchError> {
        self.check_serves()?;
        let high_watermark = self.high_watermark();
        let target = if offset == -1 { high_watermark } else { offset };
        if target < 0 || target > high_watermark {
            let start = self.log_start_offset();
            return Err(FetchError::OutOfRange { offset, start, end: high_watermark });
        }
        let target = target.min(self.hold_offset.get());
        // Also when retention took as much of this replica: others may have it still, or get it from segments that begin earlier.
        if target > 0 {
            self.commit_log_start(target).await?;
        }
        self.cut_below(target).await
    }

    /// Lets the log of this replica, whether it leads or not, begin at an offset up to the high watermark.
    pub async fn cut_below(&self, offset: i64) -> Result<i64, FetchError> {
        // What an export still needs stays; the caller sees how far it went.
        let target = offset.min(self.hold_offset.get()).min(self.high_watermark());
        if target > self.log_start_offset() {
            // Answered when no crash can bring them back.
            self.log.delete_below(target).await.map_err(|e| FetchError::Storage(e.to_string()))?;
            self.note_log_start();
            if let Some(shard) = self.shard.upgrade() {
                shard.floors_changed.notify_one();
            }
        }
        self.publish_gauges();
        Ok(self.log_start_offset())
    }
}
