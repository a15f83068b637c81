//! Free space of the data directory's file system, and when clients have to wait for more of it.
//!
//! Owns the watch and the rule; runs on the main thread. Clients are turned away while a little is still free, so that
//! what frees space (deleting topics, retention, the export that lets retention go on) can still write its own records,
//! and what clients were promised can move from the shard log to segments. Invariant: nothing but new client records is
//! refused here. It does not handle a disk that is full all the same: the store does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use flumen_storage::DataDir;

/// Below this, clients are turned away. A few files of the shard log, each of which may have to become segments.
const LOW_BYTES: u64 = 128 << 20;
/// From here on they may go on: a margin, so that one freed segment does not let them in for a moment.
const ENOUGH_BYTES: u64 = LOW_BYTES + (32 << 20);
/// With this much free, nothing can fill the disk between two slow looks.
const PLENTY_BYTES: u64 = 16 << 30;
const LOOK_OFTEN: Duration = Duration::from_millis(100);
const LOOK_SELDOM: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct DiskSpace {
    free_bytes: AtomicU64,
    low: AtomicBool,
}

impl DiskSpace {
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Clients have to wait.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    /// Takes a reading; returns when to take the next.
    pub fn look(&self, data_dir: &DataDir) -> Duration {
        let Ok(free) = data_dir.free_bytes() else { return LOOK_SELDOM };
        self.free_bytes.store(free, Ordering::Relaxed);
        let was_low = self.is_low();
        let low = is_low(free, was_low);
        if low != was_low {
            self.low.store(low, Ordering::Relaxed);
            match low {
                true => tracing::error!(
                    free_bytes = free,
                    "the disk is nearly full: producers get KAFKA_STORAGE_ERROR until space is freed; reads, deletion, \
                     retention and exports go on"
                ),
                false => tracing::info!(free_bytes = free, "the disk has room again: producers go on"),
            }
        }
        if free > PLENTY_BYTES { LOOK_SELDOM } else { LOOK_OFTEN }
    }
}

fn is_low(free_bytes: u64, was_low: bool) -> bool {
    free_bytes < if was_low { ENOUGH_BYTES } else { LOW_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_low_it_takes_a_margin_to_go_on() {
        assert!(!is_low(LOW_BYTES, false));
        assert!(is_low(LOW_BYTES - 1, false));
        assert!(is_low(LOW_BYTES, true));
        assert!(!is_low(ENOUGH_BYTES, true));
    }
}
