//! From connecting to the first failure: admission, opening, settling what is open, then the pipeline.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flumen_protocol::record::decode_records;

use super::audit::{AuditPass, audit_pass};
use super::collect::{CollectArgs, CollectEnd, Prepared, collect};
use super::encode::{Encoded, Encoder, Limits, MappingInUse, Refused};
use super::{Commands, Exporter, RECHECK, STOP_GRACE, TICK, Trouble};
use crate::admission::{Admission, admit};
use crate::breaker::BreakerState;
use crate::client::{ClickHouse, RowPlace, ServerInfo};
use crate::config::{Delivery, Start};
use crate::ddl::{quote_ident, quote_string};
use crate::mapping::ENCODER_VERSION;
use crate::plan::{Action, Event, MappingRecord, Origin, Plan, Record, next_step};
use crate::settle::Traits;
use crate::source::{Source, StateLog};
use crate::status::State;

/// Record values that columns are guessed from.
const MAX_SAMPLES: usize = 100;
const SAMPLE_BYTES: usize = 256 << 10;
/// A batch of samples may grow to this when decompressed.
const MAX_SAMPLE_BATCH: usize = 64 << 20;
/// How often the table's columns are looked at for changes.
const SCHEMA_CHECK: Duration = Duration::from_secs(30);

/// A server that has admitted the export.
pub(super) struct Link {
    pub server: ClickHouse,
    pub info: ServerInfo,
    pub traits: Traits,
    pub rows_may_vanish: bool,
    pub mapping: std::rc::Rc<MappingInUse>,
}

impl<S: Source + 'static, L: StateLog + 'static> Exporter<S, L> {
    /// Returns only with trouble.
    pub(super) async fn session(&mut self, commands: &mut Commands) -> Trouble {
        let mut link = {
            let connect = self.connect();
            tokio::pin!(connect);
            // A server that does not answer must not keep a stop waiting.
            loop {
                tokio::select! {
                    biased;
                    link = &mut connect => match link {
                        Ok(link) => break link,
                        Err(trouble) => return trouble,
                    },
                    () = tokio::time::sleep(TICK) => {
                        if commands.waiting() {
                            return Trouble::Interrupted;
                        }
                    }
                }
            }
        };
        match self.pipeline(&mut link, commands).await {
            Ok(never) => match never {},
            Err(trouble) => trouble,
        }
    }

    fn database(&self) -> String {
        self.config.database.clone().unwrap_or_else(|| self.endpoint.database.clone())
    }

    pub(super) async fn connect(&mut self) -> Result<Link, Trouble> {
        let server = ClickHouse::new(&self.endpoint);
        if self.breaker.state(self.monotonic_ms()) != BreakerState::Closed {
            server.probe().await?;
        }
        let info = server.server_info().await?;
        self.board.borrow_mut().status.server_version = Some(info.version.clone());
        let admission = self.admit(&server).await?;
        {
            let mut board = self.board.borrow_mut();
            board.status.guarantee = Some(admission.guarantee);
            board.status.warnings = admission.warnings.clone();
        }
        let (Some(schema), Some(traits)) = (&admission.schema, admission.traits) else {
            return Err(refusal(&admission));
        };
        let (record, _) =
            MappingRecord::new(schema, &admission.options, self.config.tombstones_to_dead_letters)
                .map_err(|e| failed(e.to_string(), "change the table's columns"))?;
        let place = RowPlace {
            database: schema.database.clone(),
            table: schema.table.clone(),
            topic: record.columns.iter().any(|c| c.name == "_topic").then(|| self.config.topic.clone()),
        };
        if !self.state.is_opened() {
            self.open(&server, &place).await?;
        }
        if self.state.mapping_version != Some(record.version) {
            self.record(&Record::Mapped(record.clone())).await?;
        }
        let mapping = self.mapping(record.version)?;
        Ok(Link { server, info, traits, rows_may_vanish: admission.rows_may_vanish, mapping })
    }

    /// Judges the table, creating it where that is wanted.
    async fn admit(&mut self, server: &ClickHouse) -> Result<Admission, Trouble> {
        let database = self.database();
        let samples = match (&self.config.columns, self.config.auto_create) {
            (None, true) => self.samples().await,
            _ => Vec::new(),
        };
        let values: Vec<&[u8]> = samples.iter().map(|value| &value[..]).collect();
        let mut admission = admit(server, &database, &self.config, &values).await?;
        if admission.waits_for_record {
            return Err(Trouble::NoRecord);
        }
        if admission.admitted
            && let Some(ddl) = &admission.ddl
        {
            tracing::info!(topic = %self.config.topic, ddl, "creating the export's table");
            server.execute(ddl).await?;
            admission = admit(server, &database, &self.config, &values).await?;
        }
        if admission.admitted { Ok(admission) } else { Err(refusal(&admission)) }
    }

    /// The topic's first record values.
    pub(super) async fn samples(&self) -> Vec<Bytes> {
        let mut samples = Vec::new();
        let mut scratch = Vec::new();
        for partition in self.source.partitions().await {
            let Ok((earliest, _)) = self.ends(partition).await else { continue };
            let Ok(read) = self.source.read(partition, earliest, SAMPLE_BYTES).await else { continue };
            for batch in &read.batches {
                let Ok(records) = decode_records(batch, &mut scratch, MAX_SAMPLE_BATCH) else { continue };
                if records.header().is_control() {
                    continue;
                }
                let values = records.filter_map(Result::ok).filter_map(|record| record.value);
                samples.extend(values.take(MAX_SAMPLES).map(Bytes::copy_from_slice));
                if samples.len() >= MAX_SAMPLES {
                    return samples;
                }
            }
        }
        samples
    }

    /// The first start: where each partition begins is decided once and recorded.
    async fn open(&mut self, server: &ClickHouse, place: &RowPlace) -> Result<(), Trouble> {
        let mut start = BTreeMap::new();
        for partition in self.source.partitions().await {
            let (earliest, latest) = self.ends(partition).await?;
            let offset = if self.config.start == Start::Latest { latest } else { earliest };
            start.insert(partition, offset);
        }
        let mut look_until = BTreeMap::new();
        if self.config.delivery == Delivery::ExactlyOnce && !start.is_empty() {
            let from: Vec<(i32, i64)> = start.iter().map(|(p, o)| (*p, *o)).collect();
            let rows = server.rows_from(place, &from).await?;
            if rows > 0 && !self.config.trust_existing_rows {
                return Err(failed(
                    format!(
                        "{} already holds {rows} rows with offsets that this new export would insert",
                        place.table_sql()
                    ),
                    &format!(
                        "empty the table or name another one; if the rows are this topic's records, set \
                         flumen.clickhouse.existing.rows=trust on topic {}",
                        self.config.topic
                    ),
                ));
            }
            if rows > 0 {
                look_until = ends_in_table(server, place).await?;
            }
        }
        let opened = self.state.reopen(self.topic_id, &start, &look_until);
        self.record(&opened).await?;
        self.tell_settled();
        Ok(())
    }

    pub(super) fn tell_settled(&self) {
        for (partition, offset) in self.state.settled_offsets() {
            self.source.settled(partition, offset);
        }
        self.board.borrow_mut().positions(&self.state, false);
    }

    /// A recorded mapping, ready for use.
    pub(super) fn mapping(&mut self, version: u32) -> Result<std::rc::Rc<MappingInUse>, Trouble> {
        if let Some(mapping) = self.mappings.get(&version) {
            return Ok(mapping.clone());
        }
        let Some(record) = self.state.mappings.get(&version) else {
            return Err(failed(format!("mapping {version:08x} is not recorded"), "report this defect"));
        };
        let mapping = MappingInUse::new(record.clone())
            .map_err(|e| failed(e.to_string(), "a newer broker wrote this mapping: start that version"))?;
        self.mappings.retain(|version, _| self.state.mappings.contains_key(version));
        self.mappings.insert(version, mapping.clone());
        Ok(mapping)
    }

    async fn pipeline(
        &mut self,
        link: &mut Link,
        commands: &mut Commands,
    ) -> Result<std::convert::Infallible, Trouble> {
        let steps = next_step(&self.state, Event::Recovered);
        if steps.iter().any(|step| matches!(step, Action::Settle { .. })) {
            self.guarded(link, commands, None).await?;
        }
        self.set_state(State::Running, "the export runs");
        self.breaker.succeeded();

        let mut collecting = None;
        let mut ready: Option<Box<Prepared>> = None;
        let mut auditing = None;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut schema_checked = Instant::now();
        loop {
            if collecting.is_none() && ready.is_none() {
                collecting = Some(Box::pin(self.collector(link)));
            }
            let ended = tokio::select! {
                biased;
                // `obey` does what it says.
                () = commands.arrived() => return Err(Trouble::Interrupted),
                _ = tick.tick() => {
                    if auditing.is_none() && let Some(items) = self.audit.due(&self.config, Instant::now()) {
                        let place = self.place(&link.mapping);
                        auditing = Some(Box::pin(audit_pass(link.server.clone(), place, items)));
                    }
                    if schema_checked.elapsed() >= SCHEMA_CHECK {
                        schema_checked = Instant::now();
                        self.check_schema(link).await?;
                    }
                    self.snapshot_if_wanted().await?;
                    self.board.borrow_mut().publish();
                    None
                }
                pass = async { match &mut auditing { Some(pass) => pass.await, None => std::future::pending().await } } => {
                    auditing = None;
                    self.audited(link, pass).await?;
                    None
                }
                end = async { match &mut collecting { Some(end) => end.await, None => std::future::pending().await } },
                    if ready.is_none() => Some(end),
            };
            if let Some(end) = ended {
                collecting = None;
                match end {
                    CollectEnd::Prepared(prepared) => ready = Some(prepared),
                    CollectEnd::NewPartitions(partitions) => self.start_partitions(&partitions).await?,
                    CollectEnd::Failed(e) => return Err(e.into()),
                }
            }
            // Deliver; what was read meanwhile is delivered right after.
            while let Some(prepared) = ready.take() {
                let Prepared { encoder, encoded } = *prepared;
                self.encoder = Some(encoder);
                let steps = next_step(&self.state, Event::Prepared { records: encoded.offsets() });
                if !steps.contains(&Action::Plan) {
                    break;
                }
                let block = self.plan(link, encoded).await?;
                collecting = Some(Box::pin(self.collector(link)));
                let mut next = None;
                {
                    let deliver = self.guarded(link, commands, Some(block));
                    tokio::pin!(deliver);
                    loop {
                        tokio::select! {
                            biased;
                            done = &mut deliver => {
                                done?;
                                break;
                            }
                            end = async { match &mut collecting { Some(end) => end.await, None => std::future::pending().await } } => {
                                collecting = None;
                                next = Some(end);
                            }
                        }
                    }
                }
                if next_step(&self.state, Event::Settled).contains(&Action::Snapshot) {
                    self.write_snapshot().await?;
                }
                match next {
                    Some(CollectEnd::Prepared(prepared)) => ready = Some(prepared),
                    Some(CollectEnd::NewPartitions(partitions)) => self.start_partitions(&partitions).await?,
                    Some(CollectEnd::Failed(e)) => return Err(e.into()),
                    None => {}
                }
                if commands.waiting() {
                    return Err(Trouble::Interrupted);
                }
            }
        }
    }

    /// Settles all open plans in order; a command cuts long waits short, a stop cuts everything after a grace.
    async fn guarded(
        &mut self,
        link: &mut Link,
        commands: &mut Commands,
        block: Option<PlannedBlock>,
    ) -> Result<(), Trouble> {
        let interrupt = self.interrupt.clone();
        let board = self.board.clone();
        let deliver = self.deliver_all(link, block);
        tokio::pin!(deliver);
        let mut grace: Option<Instant> = None;
        loop {
            tokio::select! {
                biased;
                done = &mut deliver => return done,
                () = tokio::time::sleep(TICK.min(STOP_GRACE / 4)) => {
                    board.borrow_mut().publish();
                    if commands.waiting() {
                        interrupt.set(true);
                        let since = grace.get_or_insert_with(Instant::now);
                        if since.elapsed() >= STOP_GRACE {
                            return Err(Trouble::Interrupted);
                        }
                    }
                }
            }
        }
    }

    fn collector(&mut self, link: &Link) -> impl Future<Output = CollectEnd> + use<S, L> {
        let encoder = match self.encoder.take() {
            Some(encoder) if encoder.mapping.record.version == link.mapping.record.version => encoder,
            _ => Encoder::new(&self.config.topic, link.mapping.clone()),
        };
        self.turn = self.turn.wrapping_add(1);
        let target = self.config.target_lag_ms as f64;
        // What an insert usually takes, and the steps around it, come off the time a record may wait.
        let expected = self.board.borrow().insert_ewma_ms * 1.5 + 30.0;
        let linger = (target - expected).clamp(target / 5.0, target);
        let args = CollectArgs {
            positions: self.state.planned.clone(),
            limits: Limits {
                rows: self.row_limit.min(self.config.flush_rows),
                bytes: self.config.flush_bytes,
            },
            linger: Duration::from_secs_f64(linger / 1000.0),
            not_before: self.next_insert_at,
            turn: self.turn,
        };
        collect(self.source.clone(), self.board.clone(), encoder, args)
    }

    async fn start_partitions(&mut self, partitions: &[i32]) -> Result<(), Trouble> {
        for partition in partitions {
            // A partition that was added to the topic is exported from its first record.
            let (offset, _) = self.ends(*partition).await?;
            self.record(&Record::Started { partition: *partition, offset }).await?;
        }
        self.tell_settled();
        Ok(())
    }

    /// Records the plan for an encoded block.
    async fn plan(&mut self, link: &Link, encoded: Encoded) -> Result<PlannedBlock, Trouble> {
        let Encoded { ranges, block, rows, refused, skipped, raw_bytes, .. } = encoded;
        if !refused.is_empty() {
            self.ensure_producer().await?;
        }
        let look_first = self.state.must_look_first(&ranges);
        let plan = Plan {
            topic_id: self.topic_id,
            sink_epoch: self.state.sink_epoch,
            seq: self.state.next_seq,
            rows,
            dead_letters: u32::try_from(refused.len()).unwrap_or(u32::MAX),
            skipped,
            dlq_first_sequence: self.state.dlq_next_sequence,
            mapping_version: link.mapping.record.version,
            encoder_version: ENCODER_VERSION,
            block_crc: crc32c::crc32c(&block),
            block_bytes: block.len() as u64,
            origin: Origin::Log,
            rejected: Vec::new(),
            server_started_s: link.info.started_s,
            look_first,
            ranges,
        };
        let seq = plan.seq;
        self.record(&Record::Planned(plan)).await?;
        self.fresh.insert(seq);
        self.board.borrow_mut().positions(&self.state, false);
        Ok(PlannedBlock { seq, block, refused, raw_bytes })
    }

    pub(super) async fn ensure_producer(&mut self) -> Result<(), Trouble> {
        if self.state.producer_id.is_none() {
            let id = self.source.producer_id().await?;
            self.record(&Record::Producer { id }).await?;
        }
        Ok(())
    }

    pub(super) fn place(&self, mapping: &MappingInUse) -> RowPlace {
        RowPlace {
            database: mapping.record.database.clone(),
            table: mapping.record.table.clone(),
            topic: mapping.has_topic.then(|| self.config.topic.clone()),
        }
    }

    /// Notices that the table's columns or what hangs on it changed; the session then starts anew.
    async fn check_schema(&mut self, link: &Link) -> Result<(), Trouble> {
        let database = self.database();
        let admission = admit(&link.server, &database, &self.config, &[]).await?;
        if !admission.admitted {
            return Err(refusal(&admission));
        }
        let Some(schema) = &admission.schema else { return Err(Trouble::Again) };
        let record = MappingRecord::new(schema, &admission.options, self.config.tombstones_to_dead_letters);
        let same = record.is_ok_and(|(record, _)| record.version == link.mapping.record.version)
            && admission.traits == Some(link.traits);
        if same { Ok(()) } else { Err(Trouble::Again) }
    }

    async fn audited(&mut self, link: &mut Link, pass: AuditPass) -> Result<(), Trouble> {
        let repairs = self.audit.judge(pass, link, &self.board);
        for (plan, n) in repairs {
            let inserted = self.repair_settled(link, &plan, n).await?;
            self.audit.repaired(&plan, inserted, &self.board);
        }
        Ok(())
    }
}

/// A block that was just planned, still in memory.
pub(super) struct PlannedBlock {
    pub seq: u64,
    pub block: Bytes,
    pub refused: Vec<Refused>,
    pub raw_bytes: u64,
}

fn failed(message: String, hint: &str) -> Trouble {
    Trouble::Failed { message, hint: hint.to_owned(), recheck: true }
}

fn refusal(admission: &Admission) -> Trouble {
    let hint = match admission.fixes.first() {
        Some(fix) => format!("run: {fix}"),
        None => "change the table or the topic's flumen.clickhouse.* configs".to_owned(),
    };
    let hint = format!("{hint}; the export looks again every {} s", RECHECK.as_secs());
    Trouble::Failed { message: admission.reasons.join("; "), hint, recheck: true }
}

/// Per partition, the offset after the highest in the table.
async fn ends_in_table(server: &ClickHouse, place: &RowPlace) -> Result<BTreeMap<i32, i64>, Trouble> {
    #[derive(serde::Deserialize)]
    struct Row {
        p: i32,
        o: i64,
    }
    let filter = match &place.topic {
        Some(topic) => format!(" WHERE {} = {}", quote_ident("_topic"), quote_string(topic)),
        None => String::new(),
    };
    let sql = format!(
        "SELECT toInt32(`_partition`) AS p, toInt64(max(`_offset`)) + 1 AS o FROM {}{filter} GROUP BY p",
        place.table_sql()
    );
    Ok(server.rows::<Row>(&sql).await?.into_iter().map(|row| (row.p, row.o)).collect())
}
