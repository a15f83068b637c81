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
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::breaker::{Breaker, BreakerState};
use crate::client::{CallError, Endpoint};
use crate::config::ExportConfig;
use crate::plan::{ExportState, Record, StateError, codec};
use crate::settle::{Alarm, Class, hint};
use crate::source::{Source, SourceError, StateLog, StateLogError};
use crate::status::{ExportMetrics, ExportStatus, Published, State, StateChange};

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
/// How long a reset waits for the outcome of plans that are open. A Kafka client waits 30 s for its answer.
const RESET_SETTLE_MAX: Duration = Duration::from_secs(20);
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
    /// exports insert only what is not in the table. Refused while the export runs.
    Reset {
        positions: Vec<(i32, ResetTo)>,
        reply: oneshot::Sender<Result<(), ResetError>>,
    },
    Stop,
}

/// Why an export stays where it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResetError {
    #[error("the export is running: pause it, reset it, then resume it")]
    Running,
    #[error(
        "the export has not started yet, so it has no position: let it run once, or choose where it starts with \
         flumen.clickhouse.start"
    )]
    NotStarted,
    #[error(
        "offset {offset} of partition {partition} is outside the log, which holds {earliest} to {latest}"
    )]
    OutOfRange { partition: i32, offset: i64, earliest: i64, latest: i64 },
    #[error("there is no partition {0}")]
    NoPartition(i32),
    /// What was sent before could arrive after the reset, and double rows.
    #[error(
        "an insert is open whose outcome is not known yet ({0}): when ClickHouse answers again, reset again; nothing \
         was changed"
    )]
    Unsettled(String),
    #[error("the new position could not be recorded: {0}")]
    NotRecorded(String),
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
    snapshot_wanted: Arc<AtomicBool>,
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

    /// For the export that follows this one.
    pub fn before(&self) -> Before {
        Before { metrics: self.metrics.clone(), history: self.status().history.clone() }
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

    /// Asks for a snapshot in the state log, so that what lies before it can be dropped. The export writes it when it
    /// next has nothing better to do, within a second or so.
    pub fn want_snapshot(&self) {
        self.snapshot_wanted.store(true, Relaxed);
    }

    /// Waits until the new epoch is recorded.
    pub async fn reset(&self, positions: Vec<(i32, ResetTo)>) -> Result<Result<(), ResetError>, NotRunning> {
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
    /// What the export counted and went through before it was started anew, in this process.
    pub before: Option<Before>,
}

/// What outlives an export that is started anew with other settings.
#[derive(Clone, Debug)]
pub struct Before {
    metrics: Arc<ExportMetrics>,
    history: Vec<StateChange>,
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
    /// Not an error: the table is made from the topic's first record, and there is none yet.
    NoRecord,
    /// Not an error: begin the session anew (the table changed).
    Again,
    /// Not an error: a command wants the export's attention.
    Interrupted,
}

impl Trouble {
    /// What happened, in one sentence.
    fn text(&self) -> String {
        match self {
            Trouble::Call(e) => e.to_string(),
            Trouble::Source(e) => e.to_string(),
            Trouble::StateLog(e) => e.to_string(),
            Trouble::Alarm { message, .. } | Trouble::Failed { message, .. } => message.clone(),
            Trouble::NoRecord | Trouble::Again | Trouble::Interrupted => {
                "the server did not say what became of it".to_owned()
            }
        }
    }
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
    /// Until the topic holds a record to take columns from.
    AwaitRecord,
    Paused,
    Failed {
        recheck: bool,
    },
    Stop,
}

/// A record handed to the state log. It may be on its way, so nothing else happens before its end is known, whatever
/// the caller that wanted it has come to.
struct Appending {
    record: Record,
    done: Pin<Box<dyn Future<Output = Result<(), StateLogError>>>>,
}

pub struct Exporter<S, L> {
    cluster_id: String,
    topic_id: [u8; 16],
    config: ExportConfig,
    endpoint: Endpoint,
    source: Rc<S>,
    log: Rc<L>,
    appending: Option<Appending>,
    state: ExportState,
    /// Open plans of which this process knows that nothing was ever sent.
    fresh: BTreeSet<u64>,
    mappings: BTreeMap<u32, Rc<MappingInUse>>,
    board: Rc<RefCell<Board>>,
    commands: Option<Commands>,
    /// A command waits: long waits end early.
    interrupt: Rc<Cell<bool>>,
    snapshot_wanted: Arc<AtomicBool>,
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
        let (metrics, history) = match setup.before {
            Some(before) => (before.metrics, before.history),
            None => (Arc::default(), Vec::new()),
        };
        let published = Arc::new(Published::default());
        let config = setup.config;
        let status = ExportStatus {
            topic: config.topic.clone(),
            endpoint: setup.endpoint.shown(),
            database: config.database.clone().unwrap_or_else(|| setup.endpoint.database.clone()),
            table: config.table.clone(),
            target_lag_ms: config.target_lag_ms,
            dead_letter_topic: config.dead_letter_topic.clone(),
            history,
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
        let snapshot_wanted = Arc::new(AtomicBool::new(false));
        let exporter = Exporter {
            cluster_id: setup.cluster_id,
            topic_id: setup.topic_id,
            row_limit: config.flush_rows,
            config,
            endpoint: setup.endpoint,
            source: Rc::new(setup.source),
            log: Rc::new(setup.state_log),
            appending: None,
            state,
            fresh: BTreeSet::new(),
            mappings: BTreeMap::new(),
            board: Rc::new(RefCell::new(board)),
            commands: Some(Commands { receiver: commands, next: None, closed: false }),
            interrupt: Rc::new(Cell::new(false)),
            snapshot_wanted: snapshot_wanted.clone(),
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
        Ok((exporter, ExportHandle { commands: sender, published, metrics, snapshot_wanted }))
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
                Mode::AwaitRecord => self.rest(&mut commands, None, Mode::AwaitRecord).await,
                Mode::Paused => self.rest(&mut commands, None, Mode::Paused).await,
                Mode::Failed { recheck } => {
                    let wait = recheck.then_some(RECHECK);
                    self.rest(&mut commands, wait, Mode::Failed { recheck }).await
                }
                Mode::Stop => break,
            };
        }
        // Whoever takes over reads the log: nothing may arrive there behind its back.
        let _ = self.finish_append().await;
        self.set_state(State::Stopped, "the export was stopped");
    }

    fn monotonic_ms(&self) -> u64 {
        self.board.borrow().monotonic_ms()
    }

    fn set_state(&self, state: State, reason: &str) {
        let mut board = self.board.borrow_mut();
        board.status.log_holds_until_ms =
            if state == State::Running { None } else { self.source.held_until_ms() };
        self.show_breaker(&mut board);
        board.status.retry_in_ms =
            (state == State::BackingOff).then(|| self.breaker.wait_ms(board.monotonic_ms()));
        board.set_state(state, reason);
    }

    fn show_breaker(&self, board: &mut Board) {
        let state = self.breaker.state(board.monotonic_ms());
        let code = BreakerState::ALL.iter().position(|s| *s == state).unwrap_or(0);
        board.status.breaker = Some(state);
        board.metrics.breaker.store(code as u64, Relaxed);
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
                        let outcome = match resting {
                            Mode::Paused | Mode::Failed { .. } => self.reset(&positions).await,
                            // It moves by itself as soon as the server answers.
                            _ => Err(ResetError::Running),
                        };
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
                    if matches!(resting, Mode::AwaitRecord) && !self.samples().await.is_empty() {
                        return Mode::Run;
                    }
                    self.look_at_ends().await;
                    // A log that cannot be written to is noticed when it is needed.
                    let _ = self.snapshot_if_wanted().await;
                    let mut board = self.board.borrow_mut();
                    self.show_breaker(&mut board);
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
        let trouble = match self.finish_append().await {
            Ok(()) => trouble,
            Err(e) => Trouble::StateLog(e),
        };
        let (class, error) = match trouble {
            Trouble::Again => return Mode::Run,
            Trouble::NoRecord => {
                let reason = "waits for the topic's first record, to take the table's columns from it";
                self.set_state(State::Starting, reason);
                return Mode::AwaitRecord;
            }
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
            Some(Command::Reset { reply, .. }) => {
                let _ = reply.send(Err(ResetError::Running));
                Mode::Run
            }
            Some(Command::Resume) => Mode::Run,
        }
    }

    /// Records a new epoch that goes on at these positions.
    async fn reset(&mut self, positions: &[(i32, ResetTo)]) -> Result<(), ResetError> {
        let not_recorded = |e: StateLogError| ResetError::NotRecorded(e.to_string());
        self.finish_append().await.map_err(not_recorded)?;
        if !self.state.is_opened() {
            return Err(ResetError::NotStarted);
        }
        let partitions = self.source.partitions().await;
        let mut wanted = BTreeMap::new();
        for (partition, to) in positions {
            if !partitions.contains(partition) {
                return Err(ResetError::NoPartition(*partition));
            }
            let ends = self.ends(*partition).await;
            let (earliest, latest) = ends.map_err(|e| ResetError::NotRecorded(e.to_string()))?;
            let offset = match to {
                ResetTo::Earliest => earliest,
                ResetTo::Latest => latest,
                ResetTo::Offset(offset) if (earliest..=latest).contains(offset) => *offset,
                ResetTo::Offset(offset) => {
                    return Err(ResetError::OutOfRange {
                        partition: *partition,
                        offset: *offset,
                        earliest,
                        latest,
                    });
                }
            };
            wanted.insert(*partition, offset);
        }
        // An insert that is still on its way would arrive under a token of the old epoch, which nothing compares with
        // what the new epoch inserts.
        if !self.state.open.is_empty() {
            let (state, reason) = {
                let board = self.board.borrow();
                (board.status.state, board.status.reason.clone())
            };
            let settled = tokio::time::timeout(RESET_SETTLE_MAX, self.settle_open()).await;
            self.set_state(state, &reason);
            self.finish_append().await.map_err(not_recorded)?;
            match settled {
                Ok(Ok(())) => {}
                // It waits for a person, and this is what the person decided.
                Ok(Err(Trouble::Alarm { .. })) => {}
                Ok(Err(trouble)) => return Err(ResetError::Unsettled(trouble.text())),
                Err(_) => return Err(ResetError::Unsettled("ClickHouse takes long to answer".to_owned())),
            }
        }
        let mut start = self.state.settled_offsets();
        start.extend(wanted);
        let opened = self.state.reopen(self.topic_id, &start, &BTreeMap::new());
        self.record(&opened).await.map_err(not_recorded)?;
        self.fresh.clear();
        self.audit.forget();
        for (partition, offset) in self.state.settled_offsets() {
            self.source.settled(partition, offset);
        }
        self.look_at_ends().await;
        let mut board = self.board.borrow_mut();
        board.positions(&self.state, false);
        board.publish();
        Ok(())
    }

    async fn settle_open(&mut self) -> Result<(), Trouble> {
        let mut link = self.connect().await?;
        self.deliver_all(&mut link, None).await
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

    /// Makes a record durable, then true. Dropped half-way, it is finished by whoever records or stops next.
    async fn record(&mut self, record: &Record) -> Result<(), StateLogError> {
        self.finish_append().await?;
        let (log, bytes) = (self.log.clone(), codec::encode(record));
        let done = Box::pin(async move { log.append(bytes).await });
        self.appending = Some(Appending { record: record.clone(), done });
        self.finish_append().await
    }

    async fn finish_append(&mut self) -> Result<(), StateLogError> {
        let Some(appending) = &mut self.appending else { return Ok(()) };
        let outcome = appending.done.as_mut().await;
        let Some(Appending { record, .. }) = self.appending.take() else { return Ok(()) };
        outcome?;
        if let Err(e) = self.state.apply(&record) {
            // The record was made from this very state: only a defect here can bring us to this line, and going on
            // with a state that replay would refuse must not happen.
            panic!("the export recorded what its own state refuses: {e}");
        }
        Ok(())
    }

    /// A snapshot, and leave for the log to forget what came before it.
    async fn write_snapshot(&mut self) -> Result<(), StateLogError> {
        self.finish_append().await?;
        self.record(&self.state.snapshot()).await?;
        self.log.truncate_before_snapshot();
        Ok(())
    }

    async fn snapshot_if_wanted(&mut self) -> Result<(), StateLogError> {
        if self.snapshot_wanted.swap(false, Relaxed) {
            self.write_snapshot().await?;
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
