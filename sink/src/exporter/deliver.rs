//! Doing what the delivery machine of each open plan says.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::collect::read_ranges;
use super::encode::{Encoded, Encoder, Refused, Rules};
use super::session::{Link, PlannedBlock};
use super::{Exporter, Trouble};
use crate::client::{CallError, Insert};
use crate::config::Delivery as Promise;
use crate::mapping::ENCODER_VERSION;
use crate::plan::{MAX_REJECTED_ROWS, Origin, Plan, Range, Record, Rejected};
use crate::settle::{Action, Alarm, Class, Delivery, Event, Sent, repair_number};
use crate::source::{Source, StateLog};
use crate::status::State;

/// Between two looks at whether an insert still runs.
const QUIET_FIRST: Duration = Duration::from_millis(50);
const QUIET_MAX: Duration = Duration::from_secs(2);
/// Blocks are not made smaller than this when the server lacks memory.
const MIN_ROWS: usize = 1000;

impl<S: Source + 'static, L: StateLog + 'static> Exporter<S, L> {
    /// Settles every open plan, lowest first, those that come out of splits included.
    pub(super) async fn deliver_all(
        &mut self,
        link: &mut Link,
        mut block: Option<PlannedBlock>,
    ) -> Result<(), Trouble> {
        while let Some(seq) = self.state.open.keys().next().copied() {
            let in_memory = block.take_if(|block| block.seq == seq);
            self.deliver(link, seq, in_memory).await?;
            if self.interrupt.get() && !self.state.open.is_empty() {
                return Err(Trouble::Interrupted);
            }
        }
        Ok(())
    }

    async fn deliver(
        &mut self,
        link: &mut Link,
        seq: u64,
        in_memory: Option<PlannedBlock>,
    ) -> Result<(), Trouble> {
        let Some(open) = self.state.open.get(&seq).cloned() else { return Ok(()) };
        let plan = open.plan;
        let mut traits = link.traits;
        traits.read_back &= self.config.delivery == Promise::ExactlyOnce;
        if plan.encoder_version != ENCODER_VERSION {
            // The same records give other bytes now, which ClickHouse would not recognise: only missing rows go in.
            traits.deduplicates = false;
        }
        let mut machine = Delivery::new(&plan, open.dead_letters_written, open.repairs, traits);
        let raw_bytes = in_memory.as_ref().map_or(plan.block_bytes, |b| b.raw_bytes);
        let (mut block, mut refused) = match in_memory {
            Some(PlannedBlock { block, refused, .. }) => (Some(block), Some(refused)),
            None => (None, None),
        };
        let metrics = self.board.borrow().metrics.clone();
        let fresh = self.fresh.contains(&seq);
        if !fresh {
            metrics.ambiguous.fetch_add(1, Relaxed);
        }
        let mut event = if fresh { Event::Fresh } else { Event::Resume };
        let mut last_error: Option<CallError> = None;
        let mut repair_acknowledged = None;
        loop {
            event = match machine.step(event) {
                Action::WriteDeadLetters => {
                    let letters = match refused.take() {
                        Some(letters) => letters,
                        None => self.rebuild(&plan, None).await?.refused,
                    };
                    self.write_dead_letters(&plan, letters).await?;
                    Event::DeadLettersWritten
                }
                Action::Send => {
                    let bytes = match &block {
                        Some(bytes) => bytes.clone(),
                        None => block.insert(self.rebuild_block(&plan).await?).clone(),
                    };
                    machine.sending_to(link.info.started_s);
                    let token = plan.token(&self.cluster_id);
                    self.fresh.remove(&seq);
                    match self.insert(link, &plan, bytes, plan.rows, &token).await {
                        Ok(()) => Event::Sent(Sent::Acknowledged),
                        Err(e) => {
                            let class = e.class();
                            last_error = Some(e);
                            Event::Sent(Sent::Failed(class))
                        }
                    }
                }
                Action::AwaitQuiet => {
                    self.await_quiet(link, &plan).await?;
                    Event::Quiet
                }
                Action::ReadBack => {
                    let mapping = self.mapping(plan.mapping_version)?;
                    let place = self.place(&mapping);
                    if link.traits.token_commits_with_part {
                        // A replica other than the one that took the insert may lag.
                        let sync = format!("SYSTEM SYNC REPLICA {} LIGHTWEIGHT", place.table_sql());
                        link.server.execute(&sync).await?;
                    }
                    let found = link.server.read_back(&place, &plan.ranges).await?;
                    let server_started_s = link.server.started_s().await?;
                    link.info.started_s = server_started_s;
                    Event::Found { found, server_started_s }
                }
                Action::Repair => match self.repair(link, &plan, &mut repair_acknowledged).await? {
                    Ok(rows) => {
                        metrics.repaired_rows.fetch_add(rows, Relaxed);
                        Event::Repaired(Sent::Acknowledged)
                    }
                    Err(e) => {
                        let class = e.class();
                        last_error = Some(e);
                        Event::Repaired(Sent::Failed(class))
                    }
                },
                Action::Split(class) => return self.split(link, &plan, class, last_error).await,
                Action::Settle => {
                    self.record(&Record::Settled { seq }).await?;
                    self.fresh.remove(&seq);
                    self.settled(link, &plan, raw_bytes);
                    return Ok(());
                }
                Action::BackOff(class) => {
                    metrics.retries.fetch_add(1, Relaxed);
                    if class == Class::Resource {
                        self.shrink();
                    }
                    return Err(match last_error {
                        Some(e) => Trouble::Call(e),
                        None => Trouble::Again,
                    });
                }
                Action::Alarm(alarm) => {
                    let message = format!(
                        "{}: plan {} ({} rows, {})",
                        alarm_text(alarm),
                        plan.seq,
                        plan.rows,
                        ranges_text(&plan.ranges)
                    );
                    return Err(Trouble::Alarm { alarm, message });
                }
            };
        }
    }

    async fn insert(
        &mut self,
        link: &Link,
        plan: &Plan,
        block: Bytes,
        rows: u64,
        token: &str,
    ) -> Result<(), CallError> {
        let mapping = match self.mapping(plan.mapping_version) {
            Ok(mapping) => mapping,
            Err(_) => return Err(super::broker_error("the plan's mapping is not readable".to_owned())),
        };
        self.attempts = self.attempts.wrapping_add(1);
        let query_id = format!("{token}#{}", self.attempts);
        let started = Instant::now();
        self.next_insert_at =
            started + Duration::from_millis(1000 / self.config.max_inserts_per_second.max(1));
        let bytes = block.len() as u64;
        let insert = Insert {
            sql: &mapping.insert_sql,
            block,
            token,
            query_id: &query_id,
            timeout: Duration::from_millis(self.config.insert_timeout_ms),
            known_settings: &link.info.known_settings,
        };
        self.board.borrow().metrics.inflight_bytes.store(bytes, Relaxed);
        let result = link.server.insert(&insert, self.config.compress).await;
        let mut board = self.board.borrow_mut();
        board.metrics.inflight_bytes.store(0, Relaxed);
        match &result {
            Ok(()) => board.inserted(rows, bytes, started.elapsed()),
            Err(e) => {
                board.metrics.insert_failures.fetch_add(1, Relaxed);
                tracing::debug!(topic = %self.config.topic, query_id, error = %e, "insert failed");
            }
        }
        result
    }

    async fn write_dead_letters(&mut self, plan: &Plan, letters: Vec<Refused>) -> Result<(), Trouble> {
        if letters.len() != plan.dead_letters as usize {
            return Err(Trouble::Alarm {
                alarm: Alarm::BlockChanged,
                message: format!(
                    "plan {} had {} dead letters when it was planned and has {} now",
                    plan.seq,
                    plan.dead_letters,
                    letters.len()
                ),
            });
        }
        self.ensure_producer().await?;
        let Some(producer_id) = self.state.producer_id else { return Ok(()) };
        let count = letters.len() as u64;
        let records = letters.into_iter().map(|l| l.dead_letter(&self.config.topic, plan.seq)).collect();
        self.source
            .append_dead_letters(
                &self.config.dead_letter_topic,
                producer_id,
                0,
                plan.dlq_first_sequence,
                records,
            )
            .await?;
        self.record(&Record::DeadLettersWritten { seq: plan.seq }).await?;
        self.board.borrow().metrics.dead_letters.fetch_add(count, Relaxed);
        Ok(())
    }

    /// Encodes a plan's ranges again; `without` leaves rows out.
    async fn rebuild(
        &mut self,
        plan: &Plan,
        without: Option<std::collections::BTreeSet<(i32, i64)>>,
    ) -> Result<Encoded, Trouble> {
        let rules = Rules { without, ..rules_of(plan) };
        self.encode_again(plan, &rules).await
    }

    async fn encode_again(&mut self, plan: &Plan, rules: &Rules) -> Result<Encoded, Trouble> {
        let mapping = self.mapping(plan.mapping_version)?;
        let inputs = read_ranges(&*self.source, plan).await?;
        let mut encoder = Encoder::new(&self.config.topic, mapping);
        Ok(encoder.encode(&inputs, rules, None).await)
    }

    async fn rebuild_block(&mut self, plan: &Plan) -> Result<Bytes, Trouble> {
        let encoded = self.rebuild(plan, None).await?;
        let same = crc32c::crc32c(&encoded.block) == plan.block_crc && encoded.rows == plan.rows;
        if !same && plan.encoder_version == ENCODER_VERSION {
            return Err(Trouble::Alarm {
                alarm: Alarm::BlockChanged,
                message: format!(
                    "plan {}: {} rows with checksum {:08x} were planned, the log now gives {} rows with {:08x} ({})",
                    plan.seq,
                    plan.rows,
                    plan.block_crc,
                    encoded.rows,
                    crc32c::crc32c(&encoded.block),
                    ranges_text(&plan.ranges)
                ),
            });
        }
        Ok(encoded.block)
    }

    async fn await_quiet(&mut self, link: &Link, plan: &Plan) -> Result<(), Trouble> {
        let token = match plan.look_first {
            true => plan.topic_token(&self.cluster_id),
            false => plan.token(&self.cluster_id),
        };
        let mut wait = QUIET_FIRST;
        while link.server.is_running(&token).await? {
            if self.interrupt.get() {
                return Err(Trouble::Interrupted);
            }
            self.board
                .borrow_mut()
                .set_state(State::BackingOff, "an insert whose answer was lost still runs");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(QUIET_MAX);
        }
        Ok(())
    }

    /// Inserts the rows that are not there, under a token of their own.
    async fn repair(
        &mut self,
        link: &Link,
        plan: &Plan,
        acknowledged: &mut Option<u32>,
    ) -> Result<Result<u64, CallError>, Trouble> {
        let mapping = self.mapping(plan.mapping_version)?;
        let present = link.server.list_present(&self.place(&mapping), &plan.ranges).await?;
        let encoded = self.rebuild(plan, Some(present)).await?;
        if encoded.rows == 0 {
            return Ok(Ok(0));
        }
        let block_crc = crc32c::crc32c(&encoded.block);
        let (last, last_crc) =
            self.state.open.get(&plan.seq).map_or((0, 0), |open| (open.repairs, open.repair_crc));
        let n = repair_number(last, last_crc, block_crc, *acknowledged);
        if n != last {
            self.record(&Record::Repairing { seq: plan.seq, n, block_crc }).await?;
        }
        tracing::warn!(
            topic = %self.config.topic,
            plan = plan.seq,
            rows = encoded.rows,
            "inserting rows that an insert left out"
        );
        let token = plan.repair_token(&self.cluster_id, n);
        let inserted = self.insert(link, plan, encoded.block, encoded.rows, &token).await;
        *acknowledged = inserted.is_ok().then_some(n);
        Ok(inserted.map(|()| encoded.rows))
    }

    /// Rows of a settled plan that the audit misses, inserted again. Returns how many. `n` is the number of this plan's
    /// repairs that were acknowledged: as long as one is not, the same rows go under the same token, so that a repair
    /// whose answer was lost is recognised.
    pub(super) async fn repair_settled(&mut self, link: &Link, plan: &Plan, n: u32) -> Result<u64, Trouble> {
        let Ok(mapping) = self.mapping(plan.mapping_version) else { return Ok(0) };
        self.await_quiet(link, plan).await?;
        let present = link.server.list_present(&self.place(&mapping), &plan.ranges).await?;
        let encoded = match self.rebuild(plan, Some(present)).await {
            Ok(encoded) => encoded,
            // The log no longer has them.
            Err(Trouble::Source(_)) => return Ok(0),
            Err(trouble) => return Err(trouble),
        };
        if encoded.rows == 0 {
            return Ok(0);
        }
        let token = format!("{}~a{n}-{:08x}", plan.token(&self.cluster_id), crc32c::crc32c(&encoded.block));
        self.insert(link, plan, encoded.block, encoded.rows, &token).await?;
        Ok(encoded.rows)
    }

    fn shrink(&mut self) {
        self.row_limit =
            (self.row_limit.min(self.config.flush_rows) / 2).max(MIN_ROWS.min(self.config.flush_rows));
    }

    /// Replaces a plan that the server refused as a whole.
    async fn split(
        &mut self,
        link: &Link,
        plan: &Plan,
        class: Class,
        error: Option<CallError>,
    ) -> Result<(), Trouble> {
        let ch_code = error.as_ref().and_then(|e| e.code).unwrap_or(0);
        let give_up = |error: Option<CallError>| match error {
            Some(e) => Err(Trouble::Call(e)),
            None => Err(Trouble::Again),
        };
        if class != Class::BadRows {
            self.shrink();
        }
        let rules = Rules { list_rows: true, ..rules_of(plan) };
        let encoded = self.encode_again(plan, &rules).await?;
        let places = encoded.row_places;
        if places.len() as u64 != plan.rows {
            return Err(Trouble::Alarm {
                alarm: Alarm::BlockChanged,
                message: format!(
                    "plan {}: {} rows were planned, {} found",
                    plan.seq,
                    plan.rows,
                    places.len()
                ),
            });
        }
        let mut children: Vec<(Vec<Range>, Vec<Rejected>)> = Vec::new();
        match (places.as_slice(), class) {
            ([], _) => return give_up(error),
            ([(partition, offset)], Class::BadRows) => {
                self.rejected_in_a_row += 1;
                if self.rejected_in_a_row > MAX_REJECTED_ROWS {
                    let what = error.map(|e| e.message).unwrap_or_default();
                    return Err(Trouble::Alarm {
                        alarm: Alarm::TooManyRejected,
                        message: format!("ClickHouse refused {MAX_REJECTED_ROWS} rows in a row: {what}"),
                    });
                }
                let rejected = Rejected { partition: *partition, offset: *offset, ch_code };
                let ranges = plan.ranges.iter().map(|r| Range { rows: 0, ..*r }).collect();
                children.push((ranges, vec![rejected]));
                self.ensure_producer().await?;
            }
            ([_], _) => return give_up(error),
            (places, _) => {
                let (first, second) = halves(&plan.ranges, places);
                children.push((first, Vec::new()));
                children.push((second, Vec::new()));
            }
        }
        let mut into = Vec::new();
        let mut seq = self.state.next_seq;
        for (ranges, rejected) in children {
            let mut child = Plan {
                seq,
                rows: ranges.iter().map(|r| r.rows).sum(),
                ranges,
                dead_letters: u32::try_from(rejected.len()).unwrap_or(0),
                skipped: 0,
                dlq_first_sequence: self.state.dlq_next_sequence,
                encoder_version: ENCODER_VERSION,
                origin: Origin::Split { parent: plan.seq },
                rejected,
                server_started_s: link.info.started_s,
                look_first: false,
                ..plan.clone()
            };
            let rules = rules_of(&child);
            let encoded = self.encode_again(&child, &rules).await?;
            child.block_crc = crc32c::crc32c(&encoded.block);
            child.block_bytes = encoded.block.len() as u64;
            into.push(child);
            seq += 1;
        }
        let seqs: Vec<u64> = into.iter().map(|child| child.seq).collect();
        self.record(&Record::Split { seq: plan.seq, into }).await?;
        self.fresh.remove(&plan.seq);
        self.fresh.extend(seqs);
        Ok(())
    }

    fn settled(&mut self, link: &Link, plan: &Plan, raw_bytes: u64) {
        let settled = self.state.settled_offsets();
        for range in &plan.ranges {
            if let Some(offset) = settled.get(&range.partition) {
                self.source.settled(range.partition, *offset);
            }
        }
        self.breaker.succeeded();
        self.unknown_in_a_row = 0;
        if plan.origin == Origin::Log {
            self.rejected_in_a_row = 0;
            self.row_limit = (self.row_limit + self.row_limit / 8 + 1).min(self.config.flush_rows);
        }
        if link.traits.read_back && plan.rows > 0 {
            self.audit.settled(plan.clone(), link.info.started_s);
        }
        let offsets: u64 = plan.ranges.iter().map(|r| (r.last - r.first + 1).unsigned_abs()).sum();
        let mut board = self.board.borrow_mut();
        board.metrics.skipped.fetch_add(plan.skipped, Relaxed);
        board.settled(plan.rows, offsets, raw_bytes);
        board.positions(&self.state, true);
        if board.status.state == State::BackingOff {
            board.set_state(State::Running, "the outcome is settled");
        }
        board.publish();
    }
}

fn rules_of(plan: &Plan) -> Rules {
    Rules {
        without_found_dead_letters: matches!(plan.origin, Origin::Split { .. }),
        rejected: plan.rejected.clone(),
        without: None,
        list_rows: false,
    }
}

/// Two halves of a plan's ranges, by rows; `places` are its rows in order, at least two.
fn halves(ranges: &[Range], places: &[(i32, i64)]) -> (Vec<Range>, Vec<Range>) {
    let middle = places.len() / 2;
    let Some((cut_partition, cut_offset)) = places.get(middle).copied() else {
        return (ranges.to_vec(), Vec::new());
    };
    let count = |partition: i32, first: i64, last: i64| {
        places.iter().filter(|(p, o)| *p == partition && (first..=last).contains(o)).count() as u64
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut passed = false;
    for range in ranges {
        if range.partition == cut_partition {
            passed = true;
            if cut_offset > range.first {
                let last = cut_offset - 1;
                before.push(Range { last, rows: count(range.partition, range.first, last), ..*range });
            }
            let rows = count(range.partition, cut_offset, range.last);
            after.push(Range { first: cut_offset, rows, ..*range });
        } else if passed {
            after.push(*range);
        } else {
            before.push(*range);
        }
    }
    (before, after)
}

fn alarm_text(alarm: Alarm) -> &'static str {
    match alarm {
        Alarm::DuplicatesDetected => "duplicates_detected: the table holds more rows than were planned",
        Alarm::RepairsExhausted => "rows keep missing after acknowledged inserts",
        Alarm::BlockChanged => "the block encoded from the log changed",
        Alarm::TooManyRejected => "too many rows were refused one by one",
    }
}

fn ranges_text(ranges: &[Range]) -> String {
    const SHOWN: usize = 5;
    let mut text: Vec<String> = ranges
        .iter()
        .take(SHOWN)
        .map(|r| format!("partition {} offsets {}-{}", r.partition, r.first, r.last))
        .collect();
    if ranges.len() > SHOWN {
        text.push(format!("{} more partitions", ranges.len() - SHOWN));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_cover_and_count() {
        let ranges = [
            Range { partition: 0, first: 10, last: 19, rows: 3 },
            Range { partition: 1, first: 0, last: 9, rows: 4 },
            Range { partition: 2, first: 5, last: 5, rows: 1 },
        ];
        let places = [(0, 11), (0, 12), (0, 19), (1, 0), (1, 3), (1, 4), (1, 9), (2, 5)];
        let (before, after) = halves(&ranges, &places);
        assert_eq!(before, [ranges[0], Range { partition: 1, first: 0, last: 2, rows: 1 }]);
        assert_eq!(after, [Range { partition: 1, first: 3, last: 9, rows: 3 }, ranges[2]]);
        // The cut at a range's first offset leaves nothing of it in the first half.
        let (before, after) = halves(&ranges[..2], &[(0, 11), (1, 0)]);
        assert_eq!(before.iter().map(|r| r.partition).collect::<Vec<_>>(), [0]);
        assert_eq!(after.len(), 1);
    }
}
