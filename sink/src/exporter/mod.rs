//! One task per exported topic: reads its partitions, records plans, sends blocks, settles outcomes.
//!
//! Owns the export's life: connecting, admission, recovery, the pipeline, back-off, pause, replay. Runs on the export
//! thread inside a `LocalSet`; other threads only hold the `ExportHandle`. Invariants: nothing is sent that is not
//! recorded; every open plan is settled before a new one is recorded after any failure; a failure that a person must
//! look at stops the export where it is, and the settled offset keeps the log. Decisions lie in `plan`, `settle` and
//! `breaker`; this shell does what they say.

mod audit;
mod board;
mod collect;
mod deliver;
mod encode;
mod session;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::breaker::Breaker;
use crate::client::{CallError, Endpoint};
use crate::config::ExportConfig;
use crate::plan::{ExportState, StateError, codec};
use crate::settle::{Alarm, Class, hint};
use crate::source::{Source, SourceError, StateLog, StateLogError};
use crate::status::{ExportMetrics, ExportStatus, Published, State};

use board::Board;
use encode::{Encoder, MappingInUse};

/// Commands waiting for an export; a person sends one at a time.
const MAX_COMMANDS: usize = 16;
/// How often the status is published while nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// How often an export that waits for a person looks whether the cause is gone.
const RECHECK: Duration = Duration::from_secs(30);
/// How long a stop waits for the insert that is on its way; after that the insert's outcome is looked up at the next
/// start.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// Identical failures of an unknown kind before the export waits for a person.
const MAX_UNKNOWN: u32 = 3;

/// Where a partition's export is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetTo {
    Earliest,
    Latest,
    Offset(i64),
}

#[derive(Debug)]
pub enum Command {
    Pause {
        reason: String,
    },
    Resume,
    /// Export again from these positions, in a new epoch; partitions not named stay where they are. Exactly-once
    /// exports insert only what is not in the table.
    Reset {
        positions: Vec<(i32, ResetTo)>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Stop,
}

/// The commands that wait, with the next one at hand.
struct Commands {
    receiver: mpsc::Receiver<Command>,
    next: Option<Command>,
    /// Every handle is gone, which counts as a stop.
    closed: bool,
}

impl Commands {
    /// Returns when a command waits or none can come any more. Safe to drop at any time.
    async fn arrived(&mut self) {
        if self.next.is_none() && !self.closed {
            self.next = self.receiver.recv().await;
            self.closed = self.next.is_none();
        }
    }

    fn waiting(&mut self) -> bool {
        if self.next.is_none() && !self.closed {
            match self.receiver.try_recv() {
                Ok(command) => self.next = Some(command),
                Err(mpsc::error::TryRecvError::Empty) => {}
                Err(mpsc::error::TryRecvError::Disconnected) => self.closed = true,
            }
        }
        self.next.is_some() || self.closed
    }
}

/// The export as other threads see it.
#[derive(Clone, Debug)]
pub struct ExportHandle {
    commands: mpsc::Sender<Command>,
    published: Arc<Published>,
    metrics: Arc<ExportMetrics>,
}

/// The export's task has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the export is not running")]
pub struct NotRunning;

impl ExportHandle {
    pub fn status(&self) -> Arc<ExportStatus> {
        self.published.get()
    }

    pub fn metrics(&self) -> &Arc<ExportMetrics> {
        &self.metrics
    }

    pub async fn pause(&self, reason: &str) -> Result<(), NotRunning> {
        self.send(Command::Pause { reason: reason.to_owned() }).await
    }

    pub async fn resume(&self) -> Result<(), NotRunning> {
        self.send(Command::Resume).await
    }

    /// Returns at once; the task ends within a few seconds.
    pub async fn stop(&self) -> Result<(), NotRunning> {
        self.send(Command::Stop).await
    }

    /// Waits until the new epoch is recorded.
    pub async fn reset(&self, positions: Vec<(i32, ResetTo)>) -> Result<Result<(), String>, NotRunning> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Reset { positions, reply }).await?;
        answer.await.map_err(|_| NotRunning)
    }

    async fn send(&self, command: Command) -> Result<(), NotRunning> {
        self.commands.send(command).await.map_err(|_| NotRunning)
    }
}

/// What an export is made of.
pub struct ExportSetup<S, L> {
    /// Unique per Flumen cluster: part of every token, so that two clusters may share a table's server.
    pub cluster_id: String,
    pub topic_id: [u8; 16],
    pub config: ExportConfig,
    /// The configured endpoint, or the broker's `clickhouse.url`.
    pub endpoint: Endpoint,
    pub source: S,
    pub state_log: L,
    /// Everything the state log holds, oldest first.
    pub records: Vec<Bytes>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    #[error("the export's state log cannot be replayed: {0}")]
    State(#[from] StateError),
    #[error("the export's state belongs to topic id {found}, this topic is {expected}")]
    OtherTopic { found: uuid::Uuid, expected: uuid::Uuid },
}

/// Why a session ended.
#[derive(Debug)]
enum Trouble {
    Call(CallError),
    Source(SourceError),
    StateLog(StateLogError),
    Alarm {
        alarm: Alarm,
        message: String,
    },
    /// A person must act; looked at again by itself if `recheck`.
    Failed {
        message: String,
        hint: String,
        recheck: bool,
    },
    /// Not an error: begin the session anew (the table changed).
    Again,
    /// Not an error: a command wants the export's attention.
    Interrupted,
}

impl From<CallError> for Trouble {
    fn from(error: CallError) -> Trouble {
        Trouble::Call(error)
    }
}

impl From<SourceError> for Trouble {
    fn from(error: SourceError) -> Trouble {
        Trouble::Source(error)
    }
}

impl From<StateLogError> for Trouble {
    fn from(error: StateLogError) -> Trouble {
        Trouble::StateLog(error)
    }
}

/// Where the export stands between two sessions.
enum Mode {
    Run,
    BackOff,
    Paused,
    Failed { recheck: bool },
    Stop,
}

pub struct Exporter<S, L> {
    cluster_id: String,
    topic_id: [u8; 16],
    config: ExportConfig,
    endpoint: Endpoint,
    source: Rc<S>,
    log: L,
    state: ExportState,
    /// Open plans of which this process knows that nothing was ever sent.
    fresh: BTreeSet<u64>,
    mappings: BTreeMap<u32, Rc<MappingInUse>>,
    board: Rc<RefCell<Board>>,
    commands: Option<Commands>,
    /// A command waits: long waits end early.
    interrupt: Rc<Cell<bool>>,
    breaker: Breaker,
    unknown_in_a_row: u32,
    rejected_in_a_row: usize,
    /// Rows per plan, lowered when the server lacks memory.
    row_limit: usize,
    audit: audit::Audit,
    encoder: Option<Encoder>,
    attempts: u64,
    turn: usize,
    next_insert_at: Instant,
}

impl<S: Source + 'static, L: StateLog + 'static> Exporter<S, L> {
    /// Replays the state log. Every plan found open counts as ambiguous and is settled first when the export runs.
    pub fn recover(setup: ExportSetup<S, L>) -> Result<(Exporter<S, L>, ExportHandle), RecoverError> {
        let state = ExportState::replay(setup.records.iter().map(|bytes| &bytes[..]))?;
        if state.is_opened() && state.topic_id != setup.topic_id {
            return Err(RecoverError::OtherTopic {
                found: uuid::Uuid::from_bytes(state.topic_id),
                expected: uuid::Uuid::from_bytes(setup.topic_id),
            });
        }
        let metrics = Arc::new(ExportMetrics::default());
        let published = Arc::new(Published::default());
        let config = setup.config;
        let status = ExportStatus {
            topic: config.topic.clone(),
            endpoint: setup.endpoint.shown(),
            database: config.database.clone().unwrap_or_else(|| setup.endpoint.database.clone()),
            table: config.table.clone(),
            target_lag_ms: config.target_lag_ms,
            dead_letter_topic: config.dead_letter_topic.clone(),
            ..ExportStatus::default()
        };
        let mut board = Board::new(status, metrics.clone(), published.clone());
        board.positions(&state, false);
        board.set_state(State::Starting, "the export starts");
        for (partition, offset) in state.settled_offsets() {
            setup.source.settled(partition, offset);
        }
        let (sender, commands) = mpsc::channel(MAX_COMMANDS);
        let audit = audit::Audit::from_records(&setup.records, &state);
        let exporter = Exporter {
            cluster_id: setup.cluster_id,
            topic_id: setup.topic_id,
            row_limit: config.flush_rows,
            config,
            endpoint: setup.endpoint,
            source: Rc::new(setup.source),
            log: setup.state_log,
            state,
            fresh: BTreeSet::new(),
            mappings: BTreeMap::new(),
            board: Rc::new(RefCell::new(board)),
            commands: Some(Commands { receiver: commands, next: None, closed: false }),
            interrupt: Rc::new(Cell::new(false)),
            breaker: Breaker::new(),
            unknown_in_a_row: 0,
            rejected_in_a_row: 0,
            audit,
            encoder: None,
            // Query ids must differ from those of an earlier process whose insert may still run.
            attempts: board::now_ms().unsigned_abs(),
            turn: 0,
            next_insert_at: Instant::now(),
        };
        Ok((exporter, ExportHandle { commands: sender, published, metrics }))
    }

    /// Runs until it is told to stop, the topic is gone, or another broker took the export over. Must run inside a
    /// `LocalSet` or a current-thread runtime's `block_on`.
    pub async fn run(mut self) {
        let Some(mut commands) = self.commands.take() else { return };
        let mut mode = if self.config.paused {
            self.set_state(State::Paused, "flumen.clickhouse.paused is true");
            Mode::Paused
        } else {
            Mode::Run
        };
        loop {
            mode = match mode {
                Mode::Run => {
                    let trouble = self.session(&mut commands).await;
                    self.after_session(trouble, &mut commands).await
                }
                Mode::BackOff => {
                    let wait = Duration::from_millis(self.breaker.wait_ms(self.monotonic_ms()));
                    self.board.borrow().metrics.backoff_ms.fetch_add(wait.as_millis() as u64, Relaxed);
                    self.rest(&mut commands, Some(wait), Mode::BackOff).await
                }
                Mode::Paused => self.rest(&mut commands, None, Mode::Paused).await,
                Mode::Failed { recheck } => {
                    let wait = recheck.then_some(RECHECK);
                    self.rest(&mut commands, wait, Mode::Failed { recheck }).await
                }
                Mode::Stop => break,
            };
        }
        self.set_state(State::Stopped, "the export was stopped");
    }

    fn monotonic_ms(&self) -> u64 {
        self.board.borrow().monotonic_ms()
    }

    fn set_state(&self, state: State, reason: &str) {
        let mut board = self.board.borrow_mut();
        board.status.log_holds_until_ms =
            if state == State::Running { None } else { self.source.held_until_ms() };
        board.status.breaker = Some(self.breaker.state(board.monotonic_ms()));
        board.metrics.breaker_open.store(u64::from(self.breaker.needs_probe()), Relaxed);
        board.status.retry_in_ms =
            (state == State::BackingOff).then(|| self.breaker.wait_ms(board.monotonic_ms()));
        board.set_state(state, reason);
    }

    /// Waits for time or a command, keeping the status fresh.
    async fn rest(&mut self, commands: &mut Commands, wait: Option<Duration>, resting: Mode) -> Mode {
        let until = wait.map(|wait| Instant::now() + wait);
        loop {
            let left = until.map_or(TICK, |until| until.saturating_duration_since(Instant::now()).min(TICK));
            tokio::select! {
                biased;
                () = commands.arrived() => match commands.next.take() {
                    None | Some(Command::Stop) => return Mode::Stop,
                    Some(Command::Resume) => return Mode::Run,
                    Some(Command::Pause { reason }) => {
                        self.set_state(State::Paused, &reason);
                        return Mode::Paused;
                    }
                    Some(Command::Reset { positions, reply }) => {
                        let outcome = self.reset(&positions).await;
                        let failed = matches!(resting, Mode::Failed { .. }) && outcome.is_ok();
                        let _ = reply.send(outcome);
                        // The reset was the way out.
                        if failed {
                            return Mode::Run;
                        }
                    }
                },
                () = tokio::time::sleep(left) => {
                    if until.is_some_and(|until| Instant::now() >= until) {
                        return Mode::Run;
                    }
                    self.look_at_ends().await;
                    let mut board = self.board.borrow_mut();
                    board.status.log_holds_until_ms = self.source.held_until_ms();
                    board.publish();
                }
            }
        }
    }

    /// Keeps lag and log start current while nothing is read.
    async fn look_at_ends(&self) {
        for (partition, position) in self.state.settled_offsets() {
            match self.source.read(partition, position, 1).await {
                Ok(read) => {
                    self.board.borrow_mut().seen(partition, read.last_stable_offset, read.log_start_offset);
                }
                Err(SourceError::OffsetOutOfRange { log_start_offset, last_stable_offset, .. }) => {
                    self.board.borrow_mut().seen(partition, last_stable_offset, log_start_offset);
                }
                Err(_) => {}
            }
        }
    }

    async fn after_session(&mut self, trouble: Trouble, commands: &mut Commands) -> Mode {
        self.interrupt.set(false);
        let (class, error) = match trouble {
            Trouble::Again => return Mode::Run,
            Trouble::Interrupted => return self.obey(commands).await,
            Trouble::StateLog(StateLogError::Fenced) => {
                self.set_state(State::Stopped, "another broker has taken this export over");
                return Mode::Stop;
            }
            Trouble::Source(SourceError::TopicDeleted) => {
                self.set_state(State::Stopped, "the topic was deleted");
                return Mode::Stop;
            }
            Trouble::Alarm { alarm, message } => {
                let hint = alarm_hint(alarm);
                self.board.borrow_mut().error(None, Some(alarm), None, &message, hint);
                self.set_state(State::Failed, &message);
                return Mode::Failed { recheck: false };
            }
            Trouble::Failed { message, hint, recheck } => {
                self.board.borrow_mut().error(Some(Class::Operator), None, None, &message, &hint);
                self.set_state(State::Failed, &message);
                return Mode::Failed { recheck };
            }
            Trouble::Source(SourceError::OffsetOutOfRange {
                partition,
                offset,
                log_start_offset,
                last_stable_offset,
            }) => {
                let message = format!(
                    "partition {partition}: the next offset to export is {offset}, but the log holds \
                     {log_start_offset} to {last_stable_offset}; nothing was skipped"
                );
                let hint = format!(
                    "to go on without the lost records: flumen export reset {} --partition {partition} --to-earliest",
                    self.config.topic
                );
                self.board.borrow_mut().error(Some(Class::Operator), None, None, &message, &hint);
                self.set_state(State::Failed, &message);
                return Mode::Failed { recheck: false };
            }
            Trouble::StateLog(e @ StateLogError::Failed(_)) => {
                (Class::Transient, broker_error(e.to_string()))
            }
            Trouble::Source(e) => (Class::Transient, broker_error(e.to_string())),
            Trouble::Call(e) => (e.class(), e),
        };
        let advice = match error.kind {
            crate::client::CallKind::Answer if error.code.is_none() && class == Class::Transient => {
                "the broker could not read or write its own log; the export keeps trying"
            }
            _ => hint(class, error.code),
        };
        self.board.borrow_mut().error(Some(class), None, Some(&error), &error.message, advice);
        self.unknown_in_a_row = if class == Class::Unknown { self.unknown_in_a_row + 1 } else { 0 };
        if class == Class::Operator || self.unknown_in_a_row >= MAX_UNKNOWN {
            self.set_state(State::Failed, &error.message);
            return Mode::Failed { recheck: true };
        }
        self.breaker.failed(self.monotonic_ms());
        self.set_state(State::BackingOff, &error.message);
        Mode::BackOff
    }

    /// Does what the waiting command says.
    async fn obey(&mut self, commands: &mut Commands) -> Mode {
        if !commands.waiting() {
            return Mode::Run;
        }
        match commands.next.take() {
            Some(Command::Stop) | None => Mode::Stop,
            Some(Command::Pause { reason }) => {
                self.set_state(State::Paused, &reason);
                Mode::Paused
            }
            Some(Command::Reset { positions, reply }) => {
                let _ = reply.send(self.reset(&positions).await);
                Mode::Run
            }
            Some(Command::Resume) => Mode::Run,
        }
    }

    /// Records a new epoch that goes on at these positions.
    async fn reset(&mut self, positions: &[(i32, ResetTo)]) -> Result<(), String> {
        let mut start = self.state.settled_offsets();
        for (partition, to) in positions {
            let (earliest, latest) = self.ends(*partition).await.map_err(|e| e.to_string())?;
            let offset = match to {
                ResetTo::Earliest => earliest,
                ResetTo::Latest => latest,
                ResetTo::Offset(offset) if (earliest..=latest).contains(offset) => *offset,
                ResetTo::Offset(offset) => {
                    return Err(format!(
                        "offset {offset} of partition {partition} is outside the log, which holds {earliest} to {latest}"
                    ));
                }
            };
            start.insert(*partition, offset);
        }
        let opened = self.state.reopen(self.topic_id, &start, &BTreeMap::new());
        self.record(&opened).await.map_err(|e| e.to_string())?;
        self.fresh.clear();
        self.audit.forget();
        for (partition, offset) in self.state.settled_offsets() {
            self.source.settled(partition, offset);
        }
        let mut board = self.board.borrow_mut();
        board.positions(&self.state, false);
        board.publish();
        Ok(())
    }

    /// First offset held and last stable offset.
    async fn ends(&self, partition: i32) -> Result<(i64, i64), SourceError> {
        match self.source.read(partition, 0, 1).await {
            Ok(read) => Ok((read.log_start_offset, read.last_stable_offset)),
            Err(SourceError::OffsetOutOfRange { log_start_offset, last_stable_offset, .. }) => {
                Ok((log_start_offset, last_stable_offset))
            }
            Err(e) => Err(e),
        }
    }

    /// Makes a record durable, then true.
    async fn record(&mut self, record: &crate::plan::Record) -> Result<(), StateLogError> {
        self.log.append(codec::encode(record)).await?;
        if let Err(e) = self.state.apply(record) {
            // The record was made from this very state: only a defect here can bring us to this line, and going on
            // with a state that replay would refuse must not happen.
            panic!("the export recorded what its own state refuses: {e}");
        }
        Ok(())
    }
}

fn broker_error(message: String) -> CallError {
    CallError { kind: crate::client::CallKind::Answer, code: None, message }
}

fn alarm_hint(alarm: Alarm) -> &'static str {
    match alarm {
        Alarm::DuplicatesDetected => {
            "the table holds rows of these offsets more than once: find who else inserted them, remove the surplus, then resume the export"
        }
        Alarm::RepairsExhausted => {
            "the server acknowledges inserts but does not keep their rows: check its disks, then resume the export"
        }
        Alarm::BlockChanged => {
            "the log no longer gives the bytes that were planned: compare the partition's log with a replica or backup before resuming"
        }
        Alarm::TooManyRejected => {
            "the server refuses row after row: compare the table's constraints and types with the records, then resume the export"
        }
    }
}
