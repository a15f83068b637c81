//! A replica that lacks what its leader cannot send as entries: records that were compacted, or written before there were
//! indexes.
//!
//! The leader's snapshot then says that records lie below the place where entries begin. It is held back here until they have
//! been fetched (`cluster/ship.rs`) and are on the disk; Raft hears of it only then, so that until then this replica has, and
//! says that it has, what it had before. Whoever offers again (every few seconds, or as a new leader) says whether what is
//! being fetched is still what is wanted.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use flumen_raft::{Body, Message};
use flumen_storage::{GroupLog, ReadError, Received};

use super::Partition;
use super::outputs::{Brought, decode_snapshot};
use crate::cluster::node_id_of;
use crate::cluster::ship;

/// Raft's own prefix of what a snapshot brings: the index of the newest membership.
const PREFIX_BYTES: usize = 8;

/// What the leader has below the place where its entries begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub leader: i32,
    /// The entry before the first that can be sent.
    pub index: u64,
    pub term: u64,
    pub log_start: i64,
    /// Where entries begin.
    pub offset: i64,
}

impl Offer {
    /// They lie in the same log, as far as it goes.
    fn is_of(&self, other: &Offer) -> bool {
        (self.leader, self.index, self.term, self.offset)
            == (other.leader, other.index, other.term, other.offset)
    }
}

pub(super) struct Shipment {
    offer: Offer,
    /// Raft's, to be told when all is there.
    message: Message,
    received: Option<Received>,
}

/// A piece of what a leader has, for a replica that fetches it.
pub(crate) struct Piece {
    pub log_start: i64,
    /// Two of different ones are of different logs.
    pub stamp: (u64, u64),
    pub batches: Vec<Bytes>,
}

impl Partition {
    /// The message, if Raft may hear of it now.
    pub(super) fn hold_back(&self, message: Message) -> Option<Message> {
        let Body::Snapshot { index, term, data, .. } = &message.body else { return Some(message) };
        // What it began with last comes first.
        if self.log.is_beginning() {
            return None;
        }
        let brought = data.get(PREFIX_BYTES..).and_then(|_| decode_snapshot(data.slice(PREFIX_BYTES..)));
        // What is malformed is refused where it is installed.
        let Some(Brought { log_start, offset, .. }) = brought else { return Some(message) };
        let leader = node_id_of(message.from)?;
        let offer = Offer { leader, index: *index, term: *term, log_start, offset };
        if log_start >= offset || self.raft_status().committed_index >= *index {
            return Some(message);
        }
        let mut shipment = self.shipment.borrow_mut();
        match shipment.as_mut().filter(|known| known.offer.is_of(&offer)) {
            Some(known) if known.received.is_some() => return Some(message),
            Some(known) => {
                known.message = message;
                return None;
            }
            None => {}
        }
        *shipment = Some(Box::new(Shipment { offer, message, received: None }));
        drop(shipment);
        if let Some(shard) = self.shard.upgrade()
            && let Some(partition) = shard.partition(self.group_id)
        {
            tracing::info!(
                topic = %self.topic, partition = self.index, leader, log_start, offset,
                "fetching records that the leader cannot send as entries"
            );
            tokio::task::spawn_local(ship::fetch(shard, partition, offer));
        }
        None
    }

    pub(crate) fn log(&self) -> &GroupLog {
        &self.log
    }

    /// Whether this is still what is wanted; `next`: so far it has come.
    pub(crate) fn still_wants(&self, offer: &Offer, next: i64) -> bool {
        let shipment = self.shipment.borrow();
        let current = shipment.as_ref().filter(|known| known.offer == *offer && known.received.is_none());
        if current.is_some() {
            self.show_fetched(next, offer.offset);
        }
        current.is_some() && self.damage().is_none() && self.raft_status().committed_index < offer.index
    }

    /// All of it is on the disk.
    pub(crate) fn fetched(self: &Rc<Self>, offer: &Offer, received: Received) {
        if !self.still_wants(offer, offer.offset) {
            return;
        }
        let message = {
            let mut shipment = self.shipment.borrow_mut();
            let Some(known) = shipment.as_mut() else { return };
            known.received = Some(received);
            known.message.clone()
        };
        tracing::info!(topic = %self.topic, partition = self.index, offset = offer.offset, "has what the leader cannot send as entries");
        self.step(message.from, message);
    }

    /// It will not come; the next offer begins again.
    pub(crate) fn gave_up(&self, offer: &Offer) {
        let mut shipment = self.shipment.borrow_mut();
        if shipment.as_ref().is_some_and(|known| known.offer == *offer) {
            *shipment = None;
            self.show_fetched(0, 0);
        }
    }

    /// What Raft begins anew with, if that was fetched.
    pub(super) fn take_shipment(&self, index: u64, offset: i64) -> Option<Received> {
        let known = self.shipment.borrow_mut().take()?;
        self.show_fetched(0, 0);
        let fits = known.offer.index == index && known.offer.offset == offset;
        known.received.filter(|_| fits)
    }

    fn show_fetched(&self, next: i64, end: i64) {
        self.gauges.fetched.0.store(next, Ordering::Relaxed);
        self.gauges.fetched.1.store(end, Ordering::Relaxed);
    }

    /// For a replica that fetches: batches from an offset on, below the place after the entry `index`. `None`: this is not,
    /// or no longer, where entries begin, or another broker leads.
    pub(crate) async fn piece(&self, from: i64, index: u64, max_bytes: usize) -> Option<Piece> {
        let stamp = || (self.raft_status().leadership.term, self.log.compactions());
        let (before, before_reading) = (self.log.before(), stamp());
        if !self.serves() || self.damage().is_some() || before.0 != index {
            return None;
        }
        let from = from.max(self.log.log_start_offset());
        let batches = match self.log.read(from, before.2, max_bytes).await {
            Ok(batches) => batches,
            // The log start moved; asked again, it goes on there.
            Err(ReadError::OutOfRange { .. }) => return None,
            Err(error) => {
                tracing::warn!(topic = %self.topic, partition = self.index, from, %error, "could not read for a new replica");
                return None;
            }
        };
        let same = self.serves() && stamp() == before_reading;
        same.then_some(Piece { log_start: self.log.log_start_offset(), stamp: before_reading, batches })
    }
}
