//! Counting settled rows again, in the background.
//!
//! Owns which settled plans are counted when, and what a difference means. Runs on the export thread beside the
//! pipeline, one query at a time. Rows vanish after an acknowledged insert if the server crashed before they were on its
//! disk; they are inserted again only where that explanation fits: the server was restarted since, or the loss shows
//! within minutes. Nothing is repaired in a table whose rows vanish by themselves (TTL, mutations), nor when all rows
//! are gone at once (somebody emptied the table). Invariant: bounded memory and a bounded query rate.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::board::{Board, now_ms};
use super::session::Link;
use crate::client::{CallError, ClickHouse, RowPlace};
use crate::config::{Delivery, ExportConfig};
use crate::plan::{ExportState, Plan, Range, Record, codec};
use crate::settle::{Found, START_JITTER_S};

/// Settled plans remembered; beyond that the oldest are no longer audited.
const MAX_PLANS: usize = 8192;
/// Plans counted in one pass: one or two queries.
const MAX_PER_PASS: usize = 512;
/// A plan is first counted at this age, so that a pass never meets an insert.
const MIN_AGE: Duration = Duration::from_secs(5);
/// A plan is counted a last time at this age: by then the server's file system has written its parts, in the default
/// configuration of Linux within a minute.
const LAST_AGE: Duration = Duration::from_secs(900);
/// A loss that shows this early is repaired even if the server was not restarted.
const EARLY: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
struct Item {
    plan: Plan,
    settled_at: Instant,
    /// The server's start when the plan was settled; 0 if not known.
    server_started_s: i64,
    counted: u32,
    /// Repairs that the server acknowledged.
    repairs: u32,
}

#[derive(Debug, Default)]
pub struct Audit {
    items: VecDeque<Item>,
    last_pass: Option<Instant>,
}

/// What one pass found, plan by plan.
pub struct AuditPass {
    items: Vec<Plan>,
    outcome: Result<(Vec<Vec<Found>>, i64), CallError>,
}

impl Audit {
    /// Plans that the state log still shows as settled in this epoch.
    pub fn from_records(records: &[Bytes], state: &ExportState) -> Audit {
        let mut plans: BTreeMap<u64, Plan> = BTreeMap::new();
        let mut audit = Audit::default();
        for record in records.iter().filter_map(|bytes| codec::decode(bytes).ok()) {
            match record {
                Record::Planned(plan) => {
                    plans.insert(plan.seq, plan);
                }
                Record::Split { seq, into } => {
                    plans.remove(&seq);
                    plans.extend(into.into_iter().map(|plan| (plan.seq, plan)));
                }
                Record::Settled { seq } => {
                    if let Some(plan) = plans.remove(&seq)
                        && plan.sink_epoch == state.sink_epoch
                        && plan.rows > 0
                    {
                        audit.push(plan, 0);
                    }
                }
                _ => {}
            }
        }
        audit
    }

    fn push(&mut self, plan: Plan, server_started_s: i64) {
        if self.items.len() >= MAX_PLANS {
            self.items.pop_front();
        }
        self.items.push_back(Item {
            plan,
            settled_at: Instant::now(),
            server_started_s,
            counted: 0,
            repairs: 0,
        });
    }

    pub fn settled(&mut self, plan: Plan, server_started_s: i64) {
        self.push(plan, server_started_s);
    }

    /// A new epoch: what the table holds is no longer known by plans.
    pub fn forget(&mut self) {
        self.items.clear();
    }

    /// The plans to count now, if it is time.
    pub fn due(&mut self, config: &ExportConfig, now: Instant) -> Option<Vec<Plan>> {
        if config.audit_interval_ms == 0 || config.delivery != Delivery::ExactlyOnce {
            return None;
        }
        let interval = Duration::from_millis(config.audit_interval_ms);
        if self.last_pass.is_some_and(|at| now.duration_since(at) < interval) {
            return None;
        }
        self.last_pass = Some(now);
        let min_age = MIN_AGE.min(interval);
        let due = self.items.iter().filter(|item| {
            let age = now.duration_since(item.settled_at);
            (item.counted == 0 && age >= min_age) || age >= LAST_AGE
        });
        let plans: Vec<Plan> = due.take(MAX_PER_PASS).map(|item| item.plan.clone()).collect();
        Some(plans).filter(|plans| !plans.is_empty())
    }

    /// Takes a pass's outcome in; returns plans with rows to insert again, and how often that was done before.
    pub fn judge(&mut self, pass: AuditPass, link: &Link, board: &Rc<RefCell<Board>>) -> Vec<(Plan, u32)> {
        let mut board = board.borrow_mut();
        let (found, server_started_s) = match pass.outcome {
            Ok(outcome) => outcome,
            Err(e) => {
                // The pipeline notices a server in trouble by itself; the plans are counted in a later pass.
                tracing::debug!(error = %e, "audit pass failed");
                return Vec::new();
            }
        };
        board.status.audit.last_ms = Some(now_ms());
        let (mut missing, mut surplus, mut present) = (0u64, 0u64, 0u64);
        let mut short: Vec<u64> = Vec::new();
        for (plan, found) in pass.items.iter().zip(&found) {
            let mut plan_missing = 0;
            for (range, found) in plan.ranges.iter().zip(found) {
                present += found.rows;
                plan_missing += range.rows.saturating_sub(found.offsets);
                surplus += found.rows.saturating_sub(range.rows.min(found.offsets));
            }
            if plan_missing > 0 {
                short.push(plan.seq);
                missing += plan_missing;
            }
        }
        board.status.audit.missing_rows += missing;
        board.status.audit.duplicate_rows += surplus;
        board.metrics.audit_missing_rows.fetch_add(missing, Relaxed);
        board.metrics.audit_duplicate_rows.fetch_add(surplus, Relaxed);
        let off = if link.rows_may_vanish {
            Some("the table has a TTL or mutations, which remove rows rightly")
        } else if missing > 0 && present == 0 {
            Some("all counted rows are gone at once: somebody emptied the table")
        } else {
            None
        };
        board.status.audit.repairs_off = off.map(str::to_owned);
        if missing > 0 || surplus > 0 {
            tracing::warn!(topic = %board.status.topic, missing, surplus, plans = short.len(), off, "audit found a difference");
        }
        let mut repairs = Vec::new();
        for plan in &pass.items {
            let Some(at) = self.items.iter().position(|item| item.plan.seq == plan.seq) else { continue };
            let Some(item) = self.items.get_mut(at) else { continue };
            item.counted += 1;
            let age = item.settled_at.elapsed();
            let restarted = item.server_started_s != 0
                && (server_started_s - item.server_started_s).abs() > START_JITTER_S;
            if short.contains(&plan.seq) && off.is_none() && (restarted || age < EARLY) {
                // Counted once more after the repair.
                item.counted = 0;
                repairs.push((plan.clone(), item.repairs));
            } else if age >= LAST_AGE {
                self.items.remove(at);
            }
        }
        repairs
    }

    pub fn repaired(&mut self, plan: &Plan, rows: u64, board: &Rc<RefCell<Board>>) {
        if let Some(item) = self.items.iter_mut().find(|item| item.plan.seq == plan.seq) {
            item.repairs += 1;
        }
        let mut board = board.borrow_mut();
        board.status.audit.repaired_rows += rows;
        board.metrics.repaired_rows.fetch_add(rows, Relaxed);
    }
}

/// Counts the plans' ranges: neighbours together first, one by one only where that differs.
pub async fn audit_pass(server: ClickHouse, place: RowPlace, items: Vec<Plan>) -> AuditPass {
    let outcome = count(&server, &place, &items).await;
    AuditPass { items, outcome }
}

async fn count(
    server: &ClickHouse,
    place: &RowPlace,
    items: &[Plan],
) -> Result<(Vec<Vec<Found>>, i64), CallError> {
    let started_s = server.started_s().await?;
    let merged = merge(items.iter().flat_map(|plan| plan.ranges.iter().copied()));
    let found = server.read_back(place, &merged).await?;
    let equal = merged.iter().zip(&found).all(|(r, f)| f.rows == r.rows && f.offsets == r.rows);
    if equal {
        let as_planned =
            |plan: &Plan| plan.ranges.iter().map(|r| Found { rows: r.rows, offsets: r.rows }).collect();
        return Ok((items.iter().map(as_planned).collect(), started_s));
    }
    let mut all = Vec::with_capacity(items.len());
    for plan in items {
        all.push(server.read_back(place, &plan.ranges).await?);
    }
    Ok((all, started_s))
}

/// Ranges that touch, joined.
fn merge(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut sorted: Vec<Range> = ranges.collect();
    sorted.sort_by_key(|r| (r.partition, r.first));
    let mut merged: Vec<Range> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if last.partition == range.partition && last.last.saturating_add(1) == range.first => {
                last.last = range.last;
                last.rows += range.rows;
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join() {
        let range = |partition, first, last, rows| Range { partition, first, last, rows };
        let merged = merge(
            [range(0, 10, 19, 10), range(1, 0, 9, 9), range(0, 0, 9, 5), range(0, 21, 30, 1)].into_iter(),
        );
        assert_eq!(merged, [range(0, 0, 19, 15), range(0, 21, 30, 1), range(1, 0, 9, 9)]);
    }
}
