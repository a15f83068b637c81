//! How fast replicas that lack much are filled, so that producers do not notice.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What a broker fetches per second of records that its leaders cannot send as entries, for all its partitions: a tenth of a
/// disk that does 600 MB/s, as compaction. What a replica in step is sent is never held up.
pub const CATCH_UP_BYTES_PER_S: u64 = 64 << 20;

/// A budget of bytes per second that several tasks share, in the order in which they ask. Nothing is saved up.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: u64,
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    pub fn new(bytes_per_s: u64) -> Pace {
        Pace { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::default() }
    }

    /// So many bytes were moved: how long to wait before the next ones.
    pub fn pay(&self, now: Instant, bytes: usize) -> Duration {
        let takes = Duration::from_micros((bytes as u64).saturating_mul(1_000_000) / self.bytes_per_s);
        let mut free_at = self.free_at.lock().expect("no panic under this lock");
        let from = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(from + takes);
        (from + takes).saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_share_wait_for_each_other_and_nothing_is_saved_up() {
        let pace = Pace::new(1_000_000);
        let start = Instant::now();
        assert_eq!(pace.pay(start, 500_000), Duration::from_millis(500));
        assert_eq!(pace.pay(start, 500_000), Duration::from_millis(1000));
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.pay(later, 100_000), Duration::from_millis(100));
    }
}
