//! Carries out what Raft puts out, in its order: what must be stored goes to the log, messages to the outbox, commits move the
//! high watermark, and a change of leadership is told to whoever serves because of it.
//!
//! A group of one takes the short way: its entries get their offsets when they are proposed, and nobody else has a say.
//! In a group of several the offsets follow the log: entries may come from another leader, and may take the place of others.

use std::sync::atomic::Ordering;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_metadata::Durability;
use flumen_protocol::record_batch;
use flumen_raft::{Entry, Install, Leadership, Outputs, Role};
use flumen_storage::{Beginning, HardState, Lane, Lsn, Payload, ProducerState, ReadError, StageError};

use super::Partition;
use crate::cluster::node_id_of;
use crate::coordinator::OFFSETS_TOPIC;
use crate::export::STATE_TOPIC;
use crate::mutant::{self, Mutant};

/// Read at a time for a replica that is behind: what a few messages carry.
pub(super) const READ_BYTES_MAX: usize = 1 << 20;
/// Nothing lies below the place where entries begin; or something does.
const SNAPSHOT_VERSION: u8 = 1;
const SNAPSHOT_ABOVE_RECORDS: u8 = 2;

/// With what a replica begins whose leader no longer has the entries that it lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Brought {
    /// Records from there on lie below the place, and have to be fetched; else equal to it.
    pub log_start: i64,
    pub offset: i64,
    pub producers: Bytes,
}

/// version u8, offset i64, in version 2 log start i64, producer snapshot.
fn encode_snapshot(log_start: i64, offset: i64, producers: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(17 + producers.len());
    let above = log_start < offset;
    out.put_u8(if above { SNAPSHOT_ABOVE_RECORDS } else { SNAPSHOT_VERSION });
    out.put_i64(offset);
    if above {
        out.put_i64(log_start);
    }
    out.put_slice(producers);
    out.freeze()
}

pub(super) fn decode_snapshot(mut data: Bytes) -> Option<Brought> {
    if data.len() < 9 {
        return None;
    }
    let (version, offset) = (data.get_u8(), data.get_i64());
    let log_start = match version {
        SNAPSHOT_VERSION => offset,
        SNAPSHOT_ABOVE_RECORDS if data.len() >= 8 => data.get_i64(),
        _ => return None,
    };
    (0 <= log_start && log_start <= offset).then_some(Brought { log_start, offset, producers: data })
}

/// Where the log begins, as an entry of it: u8, offset i64. No change of members begins with this byte, and no batch is as short.
const LOG_START: u8 = 2;
const LOG_START_BYTES: usize = 9;

pub(super) fn encode_log_start(offset: i64) -> Bytes {
    let mut out = BytesMut::with_capacity(LOG_START_BYTES);
    out.put_u8(LOG_START);
    out.put_i64(offset);
    out.freeze()
}

/// The log start that a control entry sets, if it is one that does.
pub(super) fn decode_log_start(data: &[u8]) -> Option<i64> {
    let [LOG_START, offset @ ..] = data else { return None };
    Some(i64::from_be_bytes(offset.try_into().ok()?))
}

fn to_storage(entry: Entry) -> flumen_storage::Entry {
    let is_control = entry.is_membership || entry.data.len() <= LOG_START_BYTES;
    let payload = if is_control { Payload::Control(entry.data) } else { Payload::Batch(entry.data) };
    flumen_storage::Entry { index: entry.index, term: entry.term, payload }
}

fn from_storage(entry: flumen_storage::Entry) -> Entry {
    let (data, is_membership) = match entry.payload {
        Payload::Batch(bytes) => (bytes, false),
        Payload::Control(bytes) => {
            let changes = !bytes.is_empty() && decode_log_start(&bytes).is_none();
            (bytes, changes)
        }
    };
    Entry { index: entry.index, term: entry.term, data, is_membership }
}

impl Partition {
    /// Runs raft's outputs: entries go to the shard log, commits move the high watermark.
    pub(crate) fn advance(&self) {
        let mut high_watermark = None;
        let mut moved = false;
        loop {
            let Some(mut outputs) = self.state.borrow_mut().raft.take_outputs() else { break };
            let several = !self.alone.get() || outputs.membership.is_some();
            if several && !self.before_storing(&mut outputs) {
                return;
            }
            let leadership = outputs.leadership;
            let committed = outputs.committed_index;
            let membership = outputs.membership.take();
            let (wanted, lacking) = (
                std::mem::take(&mut outputs.entries_wanted),
                std::mem::take(&mut outputs.snapshot_wanted_for),
            );
            if outputs.must_persist() && !self.store(outputs, membership.as_ref()) {
                return;
            }
            if let Some((_, members)) = membership {
                self.set_alone(members.has_only(self.node_id));
            }
            if several {
                moved = true;
                for range in wanted {
                    self.read_for_others(range.low, range.high);
                }
                for follower in lacking {
                    self.offer_beginning(follower);
                }
            }
            if let Some(index) = committed {
                high_watermark = self.commit(index, several).or(high_watermark);
            }
            if let Some(leadership) = leadership {
                self.note_leadership(leadership);
            }
        }
        if moved {
            let end = self.log.log_end_offset();
            let mut state = self.state.borrow_mut();
            let keeps = mutant::is(Mutant::KeepsOffsets) && state.next_offset > end;
            if !keeps {
                state.next_offset = end;
            }
            drop(state);
            if let Some(index) = self.committed.get() {
                self.log.set_committed(index);
            }
        }
        if let Some(high_watermark) = high_watermark {
            self.log.set_high_watermark(high_watermark);
        }
        if moved {
            self.begin_where_told();
        }
        if let Some(high_watermark) = high_watermark {
            self.gauges.high_watermark.store(high_watermark, Ordering::Relaxed);
            self.complete(high_watermark);
        }
    }

    /// What of the outputs of a group of several comes before they are stored. False: the partition serves no more.
    fn before_storing(&self, outputs: &mut Outputs) -> bool {
        if let Some(fault) = outputs.fault.take() {
            self.refuse(&format!("its replicas contradict each other: {fault}"));
            return false;
        }
        if let Some(found) = outputs.contradiction.take()
            && !self.contradicted(found)
        {
            return false;
        }
        if !outputs.messages.is_empty()
            && let Some(shard) = self.shard.upgrade()
        {
            for message in outputs.messages.drain(..) {
                shard.outbox.push(message.to, self.group_id, message);
            }
        }
        if !outputs.confirmed_reads.is_empty() {
            let mut state = self.state.borrow_mut();
            let confirmed = |token: u64| outputs.confirmed_reads.iter().any(|read| read.token == token);
            // What is committed is carried out before whoever waits runs.
            for (_, waits) in state.reads.extract_if(.., |(token, _)| confirmed(*token)) {
                let _ = waits.send(());
            }
        }
        if let Some(first) = outputs.entries.first().map(|entry| entry.index) {
            self.take_ends(first, &outputs.entries);
        }
        true
    }

    /// Remembers where the entries end, in place of those that they replace.
    fn take_ends(&self, first: u64, entries: &[Entry]) {
        let recovered = self.state.borrow().recovered;
        if first <= recovered.0 {
            let end = self.log.end_of(first - 1).unwrap_or(recovered.1);
            self.state.borrow_mut().recovered = (first - 1, end);
        }
        let mut state = self.state.borrow_mut();
        let cuts = !mutant::is(Mutant::KeepsUncommitted);
        while cuts && state.uncommitted.back().is_some_and(|(index, _)| *index >= first) {
            state.uncommitted.pop_back();
        }
        while state.log_starts.back().is_some_and(|(index, _)| *index >= first) {
            state.log_starts.pop_back();
        }
        self.catch_ups.note_appended(entries.iter().map(|entry| entry.data.len()).sum());
        for entry in entries.iter().filter(|entry| !entry.is_membership && !entry.data.is_empty()) {
            if let Some(offset) = decode_log_start(&entry.data) {
                state.log_starts.push_back((entry.index, offset));
                continue;
            }
            // What is no batch is refused when it is staged.
            if let Ok(header) = record_batch::parse_header(&entry.data) {
                state.uncommitted.push_back((entry.index, header.next_offset()));
            }
        }
    }

    /// Hands to the log what must survive. False: the log refused, and this partition or all of them serve no more.
    fn store(&self, outputs: Outputs, membership: Option<&(u64, flumen_raft::Membership)>) -> bool {
        let number = outputs.number;
        let hard_state =
            outputs.hard_state.map(|hs| HardState { term: hs.term, vote: hs.vote, commit: hs.commit });
        let entries: Vec<flumen_storage::Entry> = outputs.entries.into_iter().map(to_storage).collect();
        let votes = hard_state.is_some_and(|new| {
            let known = self.log.hard_state();
            (new.term, new.vote) != (known.term, known.vote)
        });
        // Whoever is alone cannot contradict anybody. With the first other member comes all that was before.
        let over = outputs.install.as_ref().is_some_and(|install| install.index == 0);
        let matters = (votes && !self.alone.get()) || membership.is_some() || over;
        let from_memory = outputs.install.is_none()
            && ((!matters && self.acknowledges_from_memory(hard_state))
                || mutant::is(Mutant::ReportsBeforeStored));
        let must_force = matters && self.config.borrow().acknowledges() != Durability::Durable;
        let begun = match &outputs.install {
            Some(install) if install.index == 0 => {
                self.store_begin_over(install, hard_state.unwrap_or_default()).map(Some)
            }
            Some(install) => self.begin_anew(install, hard_state),
            None => Ok(None),
        };
        let staged = begun.and_then(|begun| {
            let rest = begun.is_none() || !entries.is_empty();
            let abstains = self.state.borrow().raft.abstains_below();
            let membership = membership.map(|(index, members)| (*index, members.encode_stored(abstains)));
            // The beginning has the hard state already.
            let hard_state = if begun.is_some() { None } else { hard_state };
            match rest {
                true => self.log.stage_with(hard_state, membership, &entries),
                false => Ok(begun.expect("there is nothing else to store")),
            }
        });
        match staged {
            Ok(_) if from_memory => {
                self.staged_number.set(number);
                self.persisted_number.set(number);
                self.state.borrow_mut().raft.on_persisted(number);
            }
            Ok((lane, lsn)) => {
                self.staged_number.set(number);
                if must_force && !mutant::is(Mutant::LeavesVotesToTheKernel) {
                    self.force_vote(number);
                }
                if let Some(shard) = self.shard.upgrade() {
                    shard.note_staged(lane, lsn, self.group_id, number);
                }
            }
            // Raft already counts these entries in its log; the shard is about to stop, and
            // whoever waits for them hears nothing, which is the truth: the outcome is unknown.
            // The others do not know yet that this broker stops, and go on talking to it.
            Err(_) if self.shard.upgrade().is_none_or(|shard| shard.is_stopping()) => return false,
            Err(error) => {
                tracing::error!(topic = %self.topic, partition = self.index, %error, "the log refused an entry that raft had accepted");
                // What another broker sent may be wrong; that is no reason to stop serving what is not.
                if !self.alone.get() && !matches!(error, StageError::Poisoned) {
                    self.refuse(&format!(
                        "it could not take what its leader sent: {error}; start this broker again"
                    ));
                } else if let Some(shard) = self.shard.upgrade() {
                    shard.poison(&error.to_string());
                }
                return false;
            }
        }
        true
    }

    fn begin_anew(
        &self,
        install: &Install,
        hard_state: Option<HardState>,
    ) -> Result<Option<(Lane, Lsn)>, StageError> {
        let malformed =
            StageError::Gap { index: install.index, reason: "what it should begin with is malformed" };
        let Brought { log_start, offset, producers } =
            decode_snapshot(install.data.clone()).ok_or(malformed)?;
        let received = self.take_shipment(install.index, offset);
        if log_start < offset && received.is_none() {
            return Err(StageError::Gap {
                index: install.index,
                reason: "records lie below it that were not fetched",
            });
        }
        let hard_state = hard_state.unwrap_or_else(|| self.log.hard_state());
        let abstains = self.state.borrow().raft.abstains_below();
        let beginning = Beginning {
            hard_state: HardState { commit: install.index, ..hard_state },
            index: install.index,
            term: install.term,
            offset,
            membership: (install.membership_index, install.membership.encode_stored(abstains)),
            producers,
        };
        let staged = match received {
            Some(received) => self.log.begin_with(&beginning, received)?,
            None => self.log.begin_anew(&beginning)?,
        };
        tracing::info!(topic = %self.topic, partition = self.index, log_start, offset, "the log begins anew: its leader no longer has the entries that came before");
        self.set_alone(install.membership.has_only(self.node_id));
        self.committed.set(Some(install.index));
        let mut state = self.state.borrow_mut();
        state.uncommitted.clear();
        state.log_starts.clear();
        state.recovered = (install.index, offset);
        state.next_offset = offset;
        state.high_watermark = state.high_watermark.max(offset);
        drop(state);
        // Readers find that the log begins further on.
        self.complete(offset);
        Ok(Some(staged))
    }

    /// The new high watermark, if it moves.
    fn commit(&self, index: u64, several: bool) -> Option<i64> {
        let mut end = None;
        if several {
            self.committed.set(Some(index));
            let (recovered, end_of_all) = self.state.borrow().recovered;
            // What was there at the start and not known to be committed.
            end = if index >= recovered { Some(end_of_all) } else { self.log.end_of(index) };
        }
        let mut state = self.state.borrow_mut();
        while state.uncommitted.front().is_some_and(|(i, _)| *i <= index) {
            end = state.uncommitted.pop_front().map(|(_, end)| end);
        }
        let end = end.filter(|end| *end > state.high_watermark || !several)?;
        assert!(end > state.high_watermark, "the high watermark never goes back");
        state.high_watermark = end;
        Some(end)
    }

    /// Lets the log begin where committed entries say. What an export on this node holds stays until leaders tell it again.
    pub(super) fn begin_where_told(&self) {
        let Some(committed) = self.committed.get() else { return };
        let mut told = None;
        {
            let mut state = self.state.borrow_mut();
            while state.log_starts.front().is_some_and(|(index, _)| *index <= committed) {
                told = told.max(state.log_starts.pop_front().map(|(_, offset)| offset));
            }
            for (_, waits) in state.starts_wanted.extract_if(.., |(index, _)| *index <= committed) {
                let _ = waits.send(());
            }
        }
        if let Some(offset) = told {
            self.advance_log_start(offset);
        }
    }

    fn note_leadership(&self, now: Leadership) {
        let leads = now.role == Role::Leader;
        let led = self.leads.replace(leads);
        let served = self.serves.replace(now.may_serve);
        let Some(shard) = self.shard.upgrade() else { return };
        let leader_id = node_id_of(now.leader_id).unwrap_or(-1);
        if leads {
            let (last, others) = {
                let raft = &self.state.borrow().raft;
                (raft.last_index(), raft.membership().others(self.node_id))
            };
            self.in_sync.borrow_mut().begin(self.leader_epoch(), last, others);
        }
        let others = self.others_than(leader_id);
        shard.node.leaders.note(self.group_id, leader_id, self.leader_epoch(), others);
        self.publish_gauges();
        if led && !leads && !mutant::is(Mutant::KeepsWaiters) {
            self.lose_leadership();
        }
        if served != now.may_serve && !self.alone.get() {
            // Fetches that wait here may read now, or have to go elsewhere.
            self.wake_readers();
        }
        if served && !now.may_serve {
            shard.coordinators.remove(self.group_id);
        }
        // Exports run where their state is led.
        if served != now.may_serve && &*self.topic == STATE_TOPIC {
            shard.node.exports.metadata_changed();
        }
        if now.may_serve && !served && !self.alone.get() && &*self.topic == OFFSETS_TOPIC {
            // In a turn of its own: reading begins with this partition, which is in the middle of something.
            let group_id = self.group_id;
            tokio::task::spawn_local(async move { drop(shard.coordinators.of(&shard, group_id)) });
        }
    }

    /// Entries that a follower lacks and Raft no longer has in memory.
    fn read_for_others(&self, low: u64, high: u64) {
        let (Some(shard), log, group_id) = (self.shard.upgrade(), self.log.clone(), self.group_id) else {
            return;
        };
        if !self.catch_ups.begin(low) {
            // Somebody else wants the same, or the same one again.
            return self.let_go_of_reads();
        }
        tokio::task::spawn_local(async move {
            let Some(partition) = shard.partition(group_id) else { return };
            let turn = partition.await_read_turn(&shard, low).await;
            let read = log.read_entries(low, high, turn.bytes_max).await;
            partition.catch_ups.end(low);
            let read_bytes = |entry: &flumen_storage::Entry| match &entry.payload {
                Payload::Batch(bytes) | Payload::Control(bytes) => bytes.len(),
            };
            let bytes = read.iter().flatten().map(read_bytes).sum();
            partition.pay(&shard, turn, bytes);
            let Some(partition) = shard.partition(group_id) else { return };
            let entries: Vec<Entry> = match read {
                Ok(entries) => entries.into_iter().map(from_storage).collect(),
                // An empty answer: the follower is asked again, and then may have to begin anew.
                Err(ReadError::OutOfRange { .. }) => Vec::new(),
                Err(error) => {
                    tracing::warn!(topic = %partition.topic, partition = partition.index, low, %error, "could not read for a follower");
                    Vec::new()
                }
            };
            tracing::debug!(topic = %partition.topic, partition = partition.index, low, high, read = entries.len(), "read for a follower");
            partition.note_log_start();
            partition.entries_read(low, entries);
        });
    }

    fn entries_read(&self, low: u64, entries: Vec<Entry>) {
        self.state.borrow_mut().raft.entries_read(low, entries);
        self.advance();
    }

    /// A follower lacks what the log no longer has as entries: it begins where this log's do, with what lies below, if
    /// anything does.
    fn offer_beginning(&self, follower: u64) {
        self.note_log_start();
        let (index, _, offset) = self.log.before();
        let start = self.log.log_start_offset().min(offset);
        let mut state = self.state.borrow_mut();
        if index > 0 && state.raft.log_start() == index {
            let producers = if mutant::is(Mutant::ForgetsProducersOfBeginning) {
                ProducerState::default().encode(offset, -1).into()
            } else {
                self.log.producers_at(offset)
            };
            tracing::debug!(topic = %self.topic, partition = self.index, node = follower as i64 - 1, start, offset, "a replica is to begin anew");
            state.raft.offer_snapshot(encode_snapshot(start, offset, &producers));
        }
    }

    /// Tells Raft from where on the log can be sent to others.
    pub(super) fn note_log_start(&self) {
        let (index, ..) = self.log.before();
        if index > self.told_before.replace(index) {
            self.state.borrow_mut().raft.set_log_start(index);
        }
    }

    /// Whether what is staged next counts at once. Not a vote or a term, which must never be forgotten, and not before
    /// what was staged earlier and has to wait.
    fn acknowledges_from_memory(&self, hard_state: Option<HardState>) -> bool {
        self.config.borrow().acknowledges() == Durability::Memory
            && self.staged_number.get() == self.persisted_number.get()
            && hard_state.is_none_or(|new| {
                let known = self.log.hard_state();
                (new.term, new.vote) == (known.term, known.vote)
            })
    }

    /// The partition serves no more until the next start: what is on its disk stays as it is.
    pub(super) fn refuse(&self, reason: &str) {
        tracing::error!(topic = %self.topic, partition = self.index, reason, "this replica refuses to serve");
        self.keeps_its_log.set(true);
        self.log.refuse(reason);
        self.cease();
    }

    /// A reader found damage: whoever has it may not lead, or lag, as if it had all.
    pub(crate) fn cease_if_damaged(&self) {
        if self.damage().is_some() && (self.leads.get() || self.serves.get()) {
            self.cease();
        }
    }

    fn cease(&self) {
        let leads = self.leads.replace(false);
        self.serves.set(false);
        if let Some(shard) = self.shard.upgrade() {
            shard.coordinators.remove(self.group_id);
            if leads {
                shard.node.leaders.note(self.group_id, -1, self.leader_epoch(), self.others_than(-1));
            }
        }
        self.lose_leadership();
        self.publish_gauges();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_start_comes_back_or_is_none() {
        assert_eq!(decode_log_start(&encode_log_start(77)), Some(77));
        assert_eq!(encode_log_start(0).len(), LOG_START_BYTES);
        for other in [&[][..], &[LOG_START], &[LOG_START; 10], &[1, 0], &[1; LOG_START_BYTES]] {
            assert_eq!(decode_log_start(other), None);
        }
    }

    #[test]
    fn a_beginning_comes_back_or_is_refused() {
        for log_start in [77, 5] {
            let data = encode_snapshot(log_start, 77, b"producers");
            let brought = Brought { log_start, offset: 77, producers: Bytes::from_static(b"producers") };
            assert_eq!(decode_snapshot(data.clone()), Some(brought));
            assert_eq!(decode_snapshot(data.slice(..8)), None);
        }
        assert_eq!(decode_snapshot(encode_snapshot(5, 77, b"").slice(..16)), None);
        assert_eq!(decode_snapshot(Bytes::from_static(&[9; 12])), None);
    }

    #[test]
    fn entries_are_the_same_on_both_sides() {
        for (data, is_membership) in
            [(Bytes::new(), false), (Bytes::from_static(&[1, 0]), true), (encode_log_start(i64::MAX), false)]
        {
            let entry = Entry { index: 4, term: 2, data, is_membership };
            assert_eq!(from_storage(to_storage(entry.clone())), entry);
        }
    }
}
