//! Counters of one shard, and their text form.
//!
//! A shard writes its own counters (relaxed, one writer, so a plain add); a scrape on another thread
//! reads them. Nothing here is looked up by label on the request path.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flumen_storage::{COMMIT_BUCKETS_US, StoreStats};

/// Requests are counted per API key; keys above this share the last slot.
const API_KEYS: usize = 96;
/// Upper bounds of the request time buckets, in microseconds: doubling from 64 us to about 8 s.
const BUCKETS: usize = 18;
const FIRST_BUCKET_US: u64 = 64;

pub struct ShardMetrics {
    requests: [AtomicU64; API_KEYS],
    request_us_sum: [AtomicU64; API_KEYS],
    handling: [AtomicU64; BUCKETS + 1],
    pub batches_in: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub records_in: AtomicU64,
    pub duplicates: AtomicU64,
    pub failed_produces: AtomicU64,
    pub fetches: AtomicU64,
    pub hops: AtomicU64,
    pub wal_bytes: AtomicU64,
    pub wal_commits: AtomicU64,
    commit_times: [AtomicU64; COMMIT_BUCKETS_US.len() + 1],
    commit_us_sum: AtomicU64,
    pub segment_bytes: AtomicU64,
    pub compactions: AtomicU64,
    pub compaction_bytes_read: AtomicU64,
    pub compaction_bytes_written: AtomicU64,
    pub appended_bytes: AtomicU64,
    pub cache_bytes: AtomicU64,
    pub no_space: AtomicU64,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        ShardMetrics {
            requests: std::array::from_fn(|_| zero()),
            request_us_sum: std::array::from_fn(|_| zero()),
            handling: std::array::from_fn(|_| zero()),
            batches_in: zero(),
            bytes_in: zero(),
            bytes_out: zero(),
            records_in: zero(),
            duplicates: zero(),
            failed_produces: zero(),
            fetches: zero(),
            hops: zero(),
            wal_bytes: zero(),
            wal_commits: zero(),
            commit_times: std::array::from_fn(|_| zero()),
            commit_us_sum: zero(),
            segment_bytes: zero(),
            compactions: zero(),
            compaction_bytes_read: zero(),
            compaction_bytes_written: zero(),
            appended_bytes: zero(),
            cache_bytes: zero(),
            no_space: zero(),
        }
    }
}

/// One writer per counter: a load and a store are enough and cost less than a locked add.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl ShardMetrics {
    pub fn request(&self, key: i16, took: Duration) {
        let slot = usize::try_from(key).unwrap_or(API_KEYS - 1).min(API_KEYS - 1);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        add(&self.requests[slot], 1);
        add(&self.request_us_sum[slot], us);
        let bucket = (0..BUCKETS).find(|b| us <= FIRST_BUCKET_US << b).unwrap_or(BUCKETS);
        add(&self.handling[bucket], 1);
    }

    pub fn produced(&self, batches: usize, bytes: usize) {
        add(&self.batches_in, batches as u64);
        add(&self.bytes_in, bytes as u64);
    }

    pub fn appended(&self, records: i64, duplicate: bool) {
        if duplicate {
            add(&self.duplicates, 1);
        } else {
            add(&self.records_in, u64::try_from(records).unwrap_or(0));
        }
    }

    pub fn produce_failures(&self, partitions: usize) {
        if partitions > 0 {
            add(&self.failed_produces, partitions as u64);
        }
    }

    pub fn fetched(&self, bytes: usize) {
        add(&self.fetches, 1);
        add(&self.bytes_out, bytes as u64);
    }

    pub fn hopped(&self) {
        add(&self.hops, 1);
    }

    pub fn set_store_stats(&self, stats: &StoreStats) {
        self.wal_bytes.store(stats.wal_bytes_written, Ordering::Relaxed);
        self.wal_commits.store(stats.wal_commits, Ordering::Relaxed);
        for (slot, count) in self.commit_times.iter().zip(stats.commit_time_buckets) {
            slot.store(count, Ordering::Relaxed);
        }
        self.commit_us_sum.store(stats.commit_time_sum_us, Ordering::Relaxed);
        self.segment_bytes.store(stats.segment_bytes_written, Ordering::Relaxed);
        self.compactions.store(stats.compactions, Ordering::Relaxed);
        self.compaction_bytes_read.store(stats.compaction_bytes_read, Ordering::Relaxed);
        self.compaction_bytes_written.store(stats.compaction_bytes_written, Ordering::Relaxed);
        self.appended_bytes.store(stats.bytes_appended, Ordering::Relaxed);
        self.cache_bytes.store(stats.cache_bytes, Ordering::Relaxed);
        self.no_space.store(u64::from(stats.no_space), Ordering::Relaxed);
    }

    /// (api key, count, microseconds) of every API that was asked for.
    pub fn requests(&self) -> impl Iterator<Item = (i16, u64, u64)> + '_ {
        (0..API_KEYS).filter_map(|k| {
            let count = self.requests[k].load(Ordering::Relaxed);
            let us = self.request_us_sum[k].load(Ordering::Relaxed);
            (count > 0).then_some((i16::try_from(k).unwrap_or(i16::MAX), count, us))
        })
    }

    /// All requests by the time they took.
    pub fn handling_times(&self) -> Times {
        let bounds_us: Vec<u64> = (0..BUCKETS).map(|b| FIRST_BUCKET_US << b).collect();
        let sum_us = self.request_us_sum.iter().map(|us| us.load(Ordering::Relaxed)).sum();
        Times::new(&bounds_us, &self.handling, sum_us)
    }

    /// Group commits by the time their write took.
    pub fn commit_times(&self) -> Times {
        Times::new(&COMMIT_BUCKETS_US, &self.commit_times, self.commit_us_sum.load(Ordering::Relaxed))
    }
}

/// A histogram as Prometheus wants it: (upper bound in seconds, events at or below it), the last bound infinite.
pub struct Times {
    pub cumulative: Vec<(f64, u64)>,
    pub sum_seconds: f64,
}

impl Times {
    fn new(bounds_us: &[u64], counts: &[AtomicU64], sum_us: u64) -> Times {
        let bounds = bounds_us.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        let mut total = 0;
        let cumulative = bounds.zip(counts).map(|(bound, count)| {
            total += count.load(Ordering::Relaxed);
            (bound, total)
        });
        Times { cumulative: cumulative.collect(), sum_seconds: sum_us as f64 / 1e6 }
    }
}
