//! A topic in memory: real v2 batches, retention held by the export, an idempotent dead-letter topic. It outlives the
//! export's crashes, as a broker's log does.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_sink::source::{DeadLetter, Source, SourceError, SourceRead, StateLog, StateLogError};
use tokio::sync::Notify;

#[derive(Default)]
struct Partition {
    batches: Vec<Bytes>,
    next_offset: i64,
    log_start: i64,
    settled: i64,
}

#[derive(Default)]
struct Inner {
    partitions: Vec<Partition>,
    dead_letters: Vec<DeadLetter>,
    /// Next sequence per producer.
    sequences: BTreeMap<i64, i32>,
    next_producer_id: i64,
}

#[derive(Clone)]
pub struct MemoryTopic {
    id: [u8; 16],
    inner: Rc<RefCell<Inner>>,
    appended: Rc<Notify>,
}

impl MemoryTopic {
    pub fn new(partitions: usize) -> MemoryTopic {
        let inner = Inner {
            partitions: (0..partitions).map(|_| Partition::default()).collect(),
            next_producer_id: 1000,
            ..Inner::default()
        };
        MemoryTopic {
            id: *uuid::Uuid::new_v4().as_bytes(),
            inner: Rc::new(RefCell::new(inner)),
            appended: Rc::new(Notify::new()),
        }
    }

    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    pub fn produce(&self, partition: usize, values: &[Option<String>]) {
        let mut batch = BatchBuilder::new();
        for value in values {
            batch.append(
                1_790_000_000_000,
                Some(b"key"),
                value.as_deref().map(str::as_bytes),
                &[("h", Some(b"v"))],
            );
        }
        self.append(partition, &batch);
    }

    pub fn append(&self, partition: usize, batch: &BatchBuilder) {
        let mut inner = self.inner.borrow_mut();
        let partition = &mut inner.partitions[partition];
        let bytes = batch.build(partition.next_offset).freeze();
        partition.next_offset = record_batch::parse(&bytes).expect("a batch").next_offset();
        partition.batches.push(bytes);
        drop(inner);
        self.appended.notify_waiters();
    }

    pub fn add_partition(&self) {
        self.inner.borrow_mut().partitions.push(Partition::default());
        self.appended.notify_waiters();
    }

    /// Retention: drops everything below the offset, whatever the export holds.
    pub fn cut(&self, partition: usize, log_start: i64) {
        let mut inner = self.inner.borrow_mut();
        let partition = &mut inner.partitions[partition];
        partition.log_start = log_start;
        partition.batches.retain(|b| record_batch::parse(b).expect("a batch").last_offset() >= log_start);
    }

    pub fn all_settled(&self) -> bool {
        self.inner.borrow().partitions.iter().all(|p| p.settled >= p.next_offset)
    }

    pub fn records(&self) -> i64 {
        self.inner.borrow().partitions.iter().map(|p| p.next_offset).sum()
    }

    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.inner.borrow().dead_letters.clone()
    }
}

impl Source for MemoryTopic {
    async fn partitions(&self) -> Vec<i32> {
        tokio::task::yield_now().await;
        (0..self.inner.borrow().partitions.len() as i32).collect()
    }

    async fn read(&self, partition: i32, from: i64, max_bytes: usize) -> Result<SourceRead, SourceError> {
        tokio::task::yield_now().await;
        let inner = self.inner.borrow();
        let log = &inner.partitions[partition as usize];
        if from < log.log_start || from > log.next_offset {
            return Err(SourceError::OffsetOutOfRange {
                partition,
                offset: from,
                log_start_offset: log.log_start,
                last_stable_offset: log.next_offset,
            });
        }
        let at =
            log.batches.partition_point(|b| record_batch::parse(b).expect("a batch").last_offset() < from);
        let mut bytes = 0;
        let batches = log.batches[at..]
            .iter()
            .take_while(|batch| {
                let taken = bytes == 0 || bytes + batch.len() <= max_bytes;
                bytes += batch.len();
                taken
            })
            .cloned()
            .collect();
        Ok(SourceRead { batches, last_stable_offset: log.next_offset, log_start_offset: log.log_start })
    }

    async fn wait(&self, positions: &[(i32, i64)], timeout: Duration) {
        let notified = self.appended.notified();
        let behind =
            positions.iter().any(|(p, o)| self.inner.borrow().partitions[*p as usize].next_offset > *o);
        if !behind {
            let _ = tokio::time::timeout(timeout, notified).await;
        }
    }

    fn settled(&self, partition: i32, offset: i64) {
        let mut inner = self.inner.borrow_mut();
        let log = &mut inner.partitions[partition as usize];
        assert!(offset <= log.next_offset, "settled beyond the log's end");
        log.settled = offset;
    }

    async fn append_dead_letters(
        &self,
        topic: &str,
        producer_id: i64,
        producer_epoch: i16,
        first_sequence: i32,
        records: Vec<DeadLetter>,
    ) -> Result<(), SourceError> {
        tokio::task::yield_now().await;
        assert!(topic.ends_with(".dlq") && producer_epoch == 0);
        {
            let mut inner = self.inner.borrow_mut();
            let next = inner.sequences.get(&producer_id).copied().unwrap_or(0);
            if first_sequence + records.len() as i32 <= next {
                return Ok(());
            }
            assert_eq!(first_sequence, next, "dead letters out of sequence");
            inner.sequences.insert(producer_id, next + records.len() as i32);
            inner.dead_letters.extend(records);
        }
        // The answer may get lost: a crash can fall between the append and what follows.
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn producer_id(&self) -> Result<i64, SourceError> {
        let mut inner = self.inner.borrow_mut();
        inner.next_producer_id += 1;
        Ok(inner.next_producer_id)
    }
}

/// The state log: durable as soon as `append` has passed its first await.
#[derive(Clone, Default)]
pub struct MemoryLog {
    records: Rc<RefCell<Vec<Bytes>>>,
    /// Set: appends reach the log at once, and are answered when it is cleared.
    stalled: Rc<Cell<bool>>,
    waiting: Rc<Cell<usize>>,
    released: Rc<Notify>,
}

impl MemoryLog {
    pub fn records(&self) -> Vec<Bytes> {
        self.records.borrow().clone()
    }

    pub fn stall(&self) {
        self.stalled.set(true);
    }

    pub fn release(&self) {
        self.stalled.set(false);
        self.released.notify_waiters();
    }

    /// Appends that are in the log and not answered.
    pub fn waiting(&self) -> usize {
        self.waiting.get()
    }
}

impl StateLog for MemoryLog {
    async fn append(&self, record: Bytes) -> Result<(), StateLogError> {
        // A crash before or after the write, with and without the caller knowing.
        tokio::task::yield_now().await;
        self.records.borrow_mut().push(record);
        self.waiting.set(self.waiting.get() + 1);
        while self.stalled.get() {
            self.released.notified().await;
        }
        tokio::task::yield_now().await;
        self.waiting.set(self.waiting.get() - 1);
        Ok(())
    }

    fn truncate_before_snapshot(&self) {
        let mut records = self.records.borrow_mut();
        let keep = records.len() - 1;
        records.drain(..keep);
    }
}
