//! What the export knows of itself, shared by its tasks on the export thread and published for others.
//!
//! Owns the status document, the clock marks that lag is measured by, and the metrics. Invariant: `publish` never blocks
//! on anything but the short lock around a pointer.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::client::CallError;
use crate::plan::ExportState;
use crate::settle::{Alarm, Class};
use crate::status::{
    ExportMetrics, ExportStatus, LastError, OpenPlanStatus, PartitionStatus, Percentile, Percentiles,
    Published, Recent, State, StateChange,
};

/// State changes kept in the status.
const HISTORY: usize = 20;
/// Marks per partition; when full, every other one is dropped, which only coarsens the lag shown.
const MAX_MARKS: usize = 256;
/// Open plans listed in the status.
const MAX_PLANS_SHOWN: usize = 50;
/// Window of the rates shown.
const RATE_WINDOW: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Ends {
    last_stable_offset: i64,
    log_start_offset: i64,
    /// (end of log, when it was first seen), oldest first, of what is not settled.
    marks: VecDeque<(i64, Instant)>,
}

pub struct Board {
    pub status: ExportStatus,
    pub metrics: Arc<ExportMetrics>,
    published: Arc<Published>,
    ends: BTreeMap<i32, Ends>,
    settled: BTreeMap<i32, i64>,
    planned: BTreeMap<i32, i64>,
    batch_rows: Recent,
    insert: Recent,
    visibility: Recent,
    /// (when, rows, bytes)
    rates: VecDeque<(Instant, u64, u64)>,
    started: Instant,
    /// Recent insert time, for how long a block may wait.
    pub insert_ewma_ms: f64,
}

pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

impl Board {
    pub fn new(status: ExportStatus, metrics: Arc<ExportMetrics>, published: Arc<Published>) -> Board {
        Board {
            status,
            metrics,
            published,
            ends: BTreeMap::new(),
            settled: BTreeMap::new(),
            planned: BTreeMap::new(),
            batch_rows: Recent::default(),
            insert: Recent::default(),
            visibility: Recent::default(),
            rates: VecDeque::new(),
            started: Instant::now(),
            insert_ewma_ms: 20.0,
        }
    }

    pub fn monotonic_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub fn set_state(&mut self, state: State, reason: &str) {
        let index = State::ALL.iter().position(|s| *s == state).unwrap_or(0);
        self.metrics.state.store(index as u64, Relaxed);
        let other_state = self.status.state != state || self.status.since_ms == 0;
        if other_state || self.status.reason != reason {
            tracing::info!(topic = %self.status.topic, state = state.as_str(), reason, "export state");
            self.status.history.push(StateChange { at_ms: now_ms(), state, reason: reason.to_owned() });
            if self.status.history.len() > HISTORY {
                self.status.history.remove(0);
            }
            reason.clone_into(&mut self.status.reason);
        }
        if other_state {
            self.status.state = state;
            self.status.since_ms = now_ms();
        }
        self.publish();
    }

    pub fn seen(&mut self, partition: i32, last_stable_offset: i64, log_start_offset: i64) {
        let settled = self.settled.get(&partition).copied().unwrap_or(0);
        let ends = self.ends.entry(partition).or_default();
        let known = ends.marks.back().map_or(settled, |mark| mark.0).max(settled);
        if last_stable_offset > known {
            if ends.marks.len() >= MAX_MARKS {
                let mut keep = false;
                ends.marks.retain(|_| {
                    keep = !keep;
                    keep
                });
            }
            ends.marks.push_back((last_stable_offset, Instant::now()));
        }
        ends.last_stable_offset = last_stable_offset;
        ends.log_start_offset = log_start_offset;
    }

    /// Takes over positions after any change of the state; acknowledged marks count as visible.
    pub fn positions(&mut self, state: &ExportState, acknowledged: bool) {
        self.settled = state.settled_offsets();
        self.planned = state.planned.clone();
        let now = self.monotonic_ms();
        for (partition, ends) in &mut self.ends {
            let settled = self.settled.get(partition).copied().unwrap_or(0);
            while let Some((offset, seen)) = ends.marks.front() {
                if *offset > settled {
                    break;
                }
                if acknowledged {
                    let ms = seen.elapsed().as_secs_f64() * 1000.0;
                    self.visibility.record(now, ms);
                    self.metrics.visibility_seconds.record(ms / 1000.0);
                }
                ends.marks.pop_front();
            }
        }
        self.status.sink_epoch = state.sink_epoch;
        self.status.rows_total = state.rows;
        self.status.dead_letters_total = state.dead_letters;
        self.status.skipped_total = state.skipped;
        self.status.open_plans = state
            .open
            .values()
            .take(MAX_PLANS_SHOWN)
            .map(|open| OpenPlanStatus {
                seq: open.plan.seq,
                rows: open.plan.rows,
                dead_letters: open.plan.dead_letters,
                repairs: open.repairs,
                ranges: open.plan.ranges.iter().map(|r| (r.partition, r.first, r.last)).collect(),
            })
            .collect();
        self.metrics.open_plans.store(state.open.len() as u64, Relaxed);
    }

    pub fn inserted(&mut self, rows: u64, bytes: u64, took: Duration) {
        let ms = took.as_secs_f64() * 1000.0;
        let now = self.monotonic_ms();
        self.insert_ewma_ms += (ms - self.insert_ewma_ms) * 0.2;
        self.insert.record(now, ms);
        self.batch_rows.record(now, rows as f64);
        self.metrics.insert_seconds.record(ms / 1000.0);
        self.metrics.batch_rows.record(rows as f64);
        self.metrics.inserts.fetch_add(1, Relaxed);
        self.metrics.block_bytes.fetch_add(bytes, Relaxed);
        self.status.last_success_ms = Some(now_ms());
        self.metrics.last_success_s.store(now_ms().unsigned_abs() / 1000, Relaxed);
    }

    pub fn settled(&mut self, rows: u64, records: u64, bytes: u64) {
        self.metrics.rows.fetch_add(rows, Relaxed);
        self.metrics.records.fetch_add(records, Relaxed);
        self.rates.push_back((Instant::now(), rows, bytes));
    }

    pub fn error(
        &mut self,
        class: Option<Class>,
        alarm: Option<Alarm>,
        error: Option<&CallError>,
        message: &str,
        hint: &str,
    ) {
        let now = now_ms();
        let ch_code = error.and_then(|e| e.code);
        self.metrics.error(class.map_or("alarm", Class::as_str), ch_code);
        match &mut self.status.last_error {
            Some(last) if last.message == message && last.class == class => {
                last.count += 1;
                last.last_seen_ms = now;
            }
            last => {
                tracing::warn!(topic = %self.status.topic, ?class, ?alarm, ch_code, message, hint, "export error");
                *last = Some(LastError {
                    class,
                    alarm,
                    ch_code,
                    message: message.to_owned(),
                    hint: hint.to_owned(),
                    first_seen_ms: now,
                    last_seen_ms: now,
                    count: 1,
                });
            }
        }
    }

    pub fn publish(&mut self) {
        let now = self.monotonic_ms();
        let status = &mut self.status;
        status.partitions = self
            .settled
            .iter()
            .map(|(partition, settled)| {
                let ends = self.ends.get(partition);
                let last_stable_offset = ends.map_or(*settled, |e| e.last_stable_offset);
                PartitionStatus {
                    partition: *partition,
                    settled_offset: *settled,
                    planned_offset: self.planned.get(partition).copied().unwrap_or(*settled),
                    last_stable_offset,
                    log_start_offset: ends.map_or(0, |e| e.log_start_offset),
                    lag_records: last_stable_offset.saturating_sub(*settled).max(0),
                }
            })
            .collect();
        status.lag_records = status.partitions.iter().map(|p| p.lag_records).sum();
        let oldest = self.ends.values().filter_map(|e| e.marks.front()).map(|mark| mark.1).min();
        let lag = oldest.map_or(Duration::ZERO, |at| at.elapsed());
        status.lag_seconds = (lag.as_secs_f64() * 1000.0).round() / 1000.0;
        status.target_lag_met = lag.as_millis() <= u128::from(status.target_lag_ms);
        while self.rates.front().is_some_and(|(at, _, _)| at.elapsed() > RATE_WINDOW) {
            self.rates.pop_front();
        }
        let window = RATE_WINDOW.min(self.started.elapsed()).as_secs_f64().max(1.0);
        status.rows_per_second = self.rates.iter().map(|r| r.1).sum::<u64>() as f64 / window;
        status.bytes_per_second = self.rates.iter().map(|r| r.2).sum::<u64>() as f64 / window;
        let (p50, p99) = self.batch_rows.quantiles(now);
        status.batch_rows = Percentile { p50: p50 as u64, p99: p99 as u64 };
        let (p50_ms, p99_ms) = self.insert.quantiles(now);
        status.insert = Percentiles { p50_ms, p99_ms };
        let (p50_ms, p99_ms) = self.visibility.quantiles(now);
        status.visibility = Percentiles { p50_ms, p99_ms };
        let records = self.metrics.records.load(Relaxed);
        let lag_records = status.lag_records.unsigned_abs();
        let raw = u128::from(self.metrics.raw_bytes.load(Relaxed));
        let lag_bytes = (raw * u128::from(lag_records)).checked_div(u128::from(records)).unwrap_or(0);
        self.metrics.lag_bytes.store(u64::try_from(lag_bytes).unwrap_or(u64::MAX), Relaxed);
        self.metrics.target_lag_met.store(u64::from(status.target_lag_met), Relaxed);
        self.metrics.lag_records.store(status.lag_records.unsigned_abs(), Relaxed);
        self.metrics.lag_ms.store(u64::try_from(lag.as_millis()).unwrap_or(u64::MAX), Relaxed);
        self.published.set(status.clone());
    }
}
