//! Who waits for a partition: produces for the high watermark, fetches for new records.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::produce::ProducePartitionResult;
use tokio::sync::{Notify, oneshot};

use super::Partition;
use super::turned_away::Place;

/// Dead fetch waiters are swept once a list is longer than this; a list only grows on a partition
/// that gets no records while its consumers come and go.
const WAITERS_SWEEP: usize = 64;

pub(super) struct Pending {
    /// Complete when the high watermark is at or above this.
    pub(super) need: i64,
    pub(super) completion: Completion,
    pub(super) place: Option<Place>,
}

pub enum Completion {
    /// One partition of a produce request.
    Produce(Rc<ProduceInFlight>, usize),
    /// As `Produce`, for a client that waits for this replica alone (acks=1, or 0).
    ProduceHere(Rc<ProduceInFlight>, usize),
    /// Anything the broker itself appends: group state, metadata, export plans, dead letters.
    Callback(Box<dyn FnOnce()>),
}

/// A produce request (or the part of it for this shard) that waits for its partitions.
pub struct ProduceInFlight {
    results: RefCell<Vec<ProducePartitionResult>>,
    remaining: Cell<usize>,
    done: RefCell<Option<oneshot::Sender<Vec<ProducePartitionResult>>>>,
}

impl ProduceInFlight {
    pub fn new(
        results: Vec<ProducePartitionResult>,
        done: oneshot::Sender<Vec<ProducePartitionResult>>,
    ) -> Rc<ProduceInFlight> {
        // One more than the partitions, taken back by `submitted`, so that it cannot end while it is built.
        let remaining = Cell::new(results.len() + 1);
        Rc::new(ProduceInFlight { results: RefCell::new(results), remaining, done: RefCell::new(Some(done)) })
    }

    pub fn set(&self, slot: usize, fill: impl FnOnce(&mut ProducePartitionResult)) {
        if let Some(result) = self.results.borrow_mut().get_mut(slot) {
            fill(result);
        }
    }

    pub fn fail(&self, slot: usize, error: ErrorCode, message: Option<Box<str>>) {
        self.set(slot, |r| {
            r.error = error;
            r.error_message = message;
        });
        self.finish_one();
    }

    pub fn submitted(&self) {
        self.finish_one();
    }

    pub fn finish_one(&self) {
        let left = self.remaining.get() - 1;
        self.remaining.set(left);
        if left == 0
            && let Some(done) = self.done.borrow_mut().take()
        {
            // The connection may be gone; the records stay where they are.
            let _ = done.send(std::mem::take(&mut self.results.borrow_mut()));
        }
    }
}

/// A fetch that waits for any of its partitions to get a committed record.
#[derive(Default)]
pub struct DataWaiter {
    pub notify: Notify,
}

impl Partition {
    pub fn wait_for_data(&self, waiter: &Rc<DataWaiter>) {
        let mut state = self.state.borrow_mut();
        if state.waiters.len() >= WAITERS_SWEEP {
            state.waiters.retain(|w| w.strong_count() > 0);
        }
        state.waiters.push(Rc::downgrade(waiter));
    }

    pub(super) fn wait_for_offset(&self, need: i64, completion: Completion, place: Option<Place>) {
        let mut state = self.state.borrow_mut();
        if state.high_watermark >= need {
            drop(state);
            run(completion);
            return;
        }
        let at = match state.pending.back() {
            Some(last) if last.need > need => state.pending.partition_point(|p| p.need <= need),
            _ => state.pending.len(),
        };
        state.pending.insert(at, Pending { need, completion, place });
    }

    pub(super) fn complete(&self, high_watermark: i64) {
        loop {
            let next = {
                let mut state = self.state.borrow_mut();
                match state.pending.front() {
                    Some(p) if p.need <= high_watermark => state.pending.pop_front(),
                    _ => None,
                }
            };
            let Some(pending) = next else { break };
            run(pending.completion);
        }
        self.wake_readers();
    }

    pub(super) fn wake_readers(&self) {
        let waiters = std::mem::take(&mut self.state.borrow_mut().waiters);
        for waiter in waiters.iter().filter_map(std::rc::Weak::upgrade) {
            waiter.notify.notify_one();
        }
    }
}

impl Partition {
    /// Completes when what was staged last is on this disk.
    pub(super) fn wait_until_stored(&self, completion: Completion, place: Option<Place>) {
        let number = self.staged_number.get();
        if self.persisted_number.get() >= number {
            run(completion);
            return;
        }
        self.state.borrow_mut().pending_here.push_back((number, completion, place));
    }

    pub(super) fn complete_here(&self) {
        let stored = self.persisted_number.get();
        loop {
            let next = {
                let mut state = self.state.borrow_mut();
                match state.pending_here.front() {
                    Some((number, ..)) if *number <= stored => state.pending_here.pop_front(),
                    _ => None,
                }
            };
            let Some((_, completion, _)) = next else { break };
            run(completion);
        }
    }

    /// What waits for an entry of this leader has an unknown outcome: the next leader may have it or not. Clients hear what
    /// Kafka tells them then, refresh their metadata and send again, and an idempotent producer's batch is known by its
    /// sequence wherever it got to. Callbacks are dropped, which their owners notice.
    pub(super) fn lose_leadership(&self) {
        let (pending, here) = {
            let mut state = self.state.borrow_mut();
            state.reads.clear();
            state.starts_wanted.clear();
            (std::mem::take(&mut state.pending), std::mem::take(&mut state.pending_here))
        };
        let all = pending
            .into_iter()
            .map(|p| (p.completion, p.place))
            .chain(here.into_iter().map(|(_, completion, place)| (completion, place)));
        for (completion, place) in all {
            // Should it lead again before the client heard: what is behind these on the wire must not come first.
            if let Some(place) = place {
                self.turned_away.borrow_mut().note(place, ErrorCode::NOT_LEADER_OR_FOLLOWER);
            }
            if let Completion::Produce(request, slot) | Completion::ProduceHere(request, slot) = completion {
                request.set(slot, |r| r.base_offset = -1);
                request.fail(slot, ErrorCode::NOT_LEADER_OR_FOLLOWER, None);
            }
        }
    }
}

fn run(completion: Completion) {
    match completion {
        Completion::Produce(request, _slot) | Completion::ProduceHere(request, _slot) => request.finish_one(),
        Completion::Callback(callback) => callback(),
    }
}
