//! Messages of many groups from one broker to another, in one frame.
//!
//! Consecutive messages of one kind form a run: the kind and their count once, then each with the difference of its group and
//! term to the one before. So the heartbeats of a thousand groups are a few bytes each, and the order is what it was.

use bytes::Bytes;
use flumen_raft::{Body, Entry, Membership, Message};

use crate::frame::BODY_MAX;
use crate::wire::{DecodeError, Reader, Writer};

/// Messages in a frame: the heartbeats of more groups than a broker has.
pub const ITEMS_MAX: usize = 1 << 17;
/// Entries in a message. The smallest batch has 61 bytes, so 256 KiB of them are far fewer.
pub const ENTRIES_MAX: usize = 1 << 16;
/// Term, flags and length of an entry.
const ENTRY_BYTES_MIN: usize = 6;
/// Group, term and something.
const ITEM_BYTES_MIN: usize = 2;
const MEMBERSHIP_BYTES_MAX: usize = 2048;

const HEARTBEAT: u8 = 1;
const HEARTBEAT_ANSWER: u8 = 2;
const APPEND: u8 = 3;
const ACCEPTED: u8 = 4;
const REJECTED: u8 = 5;
const VOTE_REQUEST: u8 = 6;
const VOTE_ANSWER: u8 = 7;
const TIMEOUT_NOW: u8 = 8;
const SNAPSHOT: u8 = 9;

#[derive(Clone, Debug)]
pub struct RaftFrame {
    /// The replicas, that is, brokers, between which all of its messages go.
    pub from: u64,
    pub to: u64,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    ToSend(Vec<(u64, Message)>, usize),
    Received(Reader),
}

impl RaftFrame {
    pub fn new(from: u64, to: u64) -> RaftFrame {
        RaftFrame { from, to, content: Content::ToSend(Vec::new(), 0) }
    }

    /// Adds a message; false, and nothing happened, when it belongs into the next frame.
    pub fn push(&mut self, group: u64, message: &Message) -> bool {
        let Content::ToSend(items, bytes) = &mut self.content else { return false };
        debug_assert_eq!((message.from, message.to), (self.from, self.to));
        let more = bytes_max(message);
        if !items.is_empty() && (items.len() >= ITEMS_MAX || *bytes + more > BODY_MAX) {
            return false;
        }
        *bytes += more;
        items.push((group, message.clone()));
        true
    }

    pub fn is_empty(&self) -> bool {
        match &self.content {
            Content::ToSend(items, _) => items.is_empty(),
            Content::Received(reader) => reader.remaining() == 0,
        }
    }

    pub(crate) fn segments(&self) -> Vec<Bytes> {
        let mut out = Writer::default();
        out.number(self.from);
        out.number(self.to);
        let items = match &self.content {
            Content::ToSend(items, _) => items,
            // One that was received goes on as it is.
            Content::Received(reader) => {
                let mut segments = out.finish();
                segments.extend(reader.clone().bytes(reader.remaining()));
                return segments;
            }
        };
        let (mut group, mut term) = (0, 0);
        for run in items.chunk_by(|(_, a), (_, b)| tag(a) == tag(b)) {
            out.u8(tag(&run[0].1));
            out.number(run.len() as u64);
            for (of, message) in run {
                out.step(&mut group, *of);
                out.step(&mut term, message.term);
                write_body(&mut out, &message.body);
            }
        }
        debug_assert!(out.len() <= BODY_MAX + 64 || items.len() == 1);
        out.finish()
    }

    pub(crate) fn read(mut reader: Reader) -> Result<RaftFrame, DecodeError> {
        let (from, to) = (reader.number()?, reader.number()?);
        if from == 0 || to == 0 || from == to {
            return Err(DecodeError::Malformed("who speaks to whom"));
        }
        Ok(RaftFrame { from, to, content: Content::Received(reader) })
    }

    /// The messages, in order. After an error there are no more.
    pub fn items(&self) -> RaftItems {
        let reader = match &self.content {
            Content::Received(reader) => reader.clone(),
            Content::ToSend(..) => {
                let mut body = bytes::BytesMut::new();
                for segment in self.segments() {
                    body.extend_from_slice(&segment);
                }
                let mut reader = Reader::new(body.freeze());
                let _ = (reader.number(), reader.number());
                reader
            }
        };
        RaftItems { from: self.from, to: self.to, reader, tag: 0, left: 0, seen: 0, group: 0, term: 0 }
    }
}

pub struct RaftItems {
    from: u64,
    to: u64,
    reader: Reader,
    tag: u8,
    left: usize,
    seen: usize,
    group: u64,
    term: u64,
}

impl Iterator for RaftItems {
    type Item = Result<(u64, Message), DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 && self.reader.remaining() == 0 {
            return None;
        }
        let item = self.read_item();
        if item.is_err() {
            (self.left, self.reader) = (0, Reader::new(Bytes::new()));
        }
        Some(item)
    }
}

impl RaftItems {
    fn read_item(&mut self) -> Result<(u64, Message), DecodeError> {
        if self.left == 0 {
            let tag = self.reader.u8()?;
            if !(HEARTBEAT..=SNAPSHOT).contains(&tag) {
                return Err(DecodeError::Unknown("the kind of a message"));
            }
            let limit = (ITEMS_MAX - self.seen) as u64;
            let count = self.reader.count("the number of messages", limit, ITEM_BYTES_MIN)?;
            if count == 0 || tag == self.tag {
                return Err(DecodeError::Malformed("a run of messages"));
            }
            (self.tag, self.left) = (tag, count);
            self.seen += count;
        }
        self.left -= 1;
        let group = self.reader.step(&mut self.group)?;
        let term = self.reader.step(&mut self.term)?;
        let body = read_body(&mut self.reader, self.tag)?;
        Ok((group, Message { from: self.from, to: self.to, term, body }))
    }
}

fn tag(message: &Message) -> u8 {
    match message.body {
        Body::Heartbeat { .. } => HEARTBEAT,
        Body::HeartbeatAnswer { .. } => HEARTBEAT_ANSWER,
        Body::Append { .. } => APPEND,
        Body::AppendAccepted { .. } => ACCEPTED,
        Body::AppendRejected { .. } => REJECTED,
        Body::VoteRequest { .. } => VOTE_REQUEST,
        Body::VoteAnswer { .. } => VOTE_ANSWER,
        Body::TimeoutNow => TIMEOUT_NOW,
        Body::Snapshot { .. } => SNAPSHOT,
    }
}

/// More than the message takes.
fn bytes_max(message: &Message) -> usize {
    const NUMBERS: usize = 80;
    match &message.body {
        Body::Append { entries, .. } => NUMBERS + entries.iter().map(|e| e.data.len() + 16).sum::<usize>(),
        Body::Snapshot { data, .. } => NUMBERS + data.len() + MEMBERSHIP_BYTES_MAX,
        _ => NUMBERS,
    }
}

fn write_body(out: &mut Writer, body: &Body) {
    let bits = |bits: &[bool]| bits.iter().rev().fold(0u8, |all, bit| all << 1 | u8::from(*bit));
    match body {
        Body::Heartbeat { commit, read, sleep } => {
            out.u8(bits(&[read.is_some(), *sleep]));
            out.number(*commit);
            if let Some(read) = read {
                out.number(*read);
            }
        }
        Body::HeartbeatAnswer { commit, read } => {
            out.u8(bits(&[read.is_some()]));
            out.number(*commit);
            if let Some(read) = read {
                out.number(*read);
            }
        }
        Body::Append { prev_index, prev_term, commit, entries } => {
            for number in [*prev_index, *prev_term, *commit, entries.len() as u64] {
                out.number(number);
            }
            let mut term = *prev_term;
            for entry in entries {
                out.step(&mut term, entry.term);
                out.u8(bits(&[entry.is_membership]));
                out.payload(&entry.data);
            }
        }
        Body::AppendAccepted { index, commit } => {
            out.number(*index);
            out.number(*commit);
        }
        Body::AppendRejected { index, hint_index, hint_term, commit } => {
            for number in [*index, *hint_index, *hint_term, *commit] {
                out.number(number);
            }
        }
        Body::VoteRequest { pre, forced, last_index, last_term, commit, commit_term } => {
            out.u8(bits(&[*pre, *forced]));
            for number in [*last_index, *last_term, *commit, *commit_term] {
                out.number(number);
            }
        }
        Body::VoteAnswer { pre, granted, commit, commit_term } => {
            out.u8(bits(&[*pre, *granted]));
            out.number(*commit);
            out.number(*commit_term);
        }
        Body::TimeoutNow => {}
        Body::Snapshot { index, term, membership, data } => {
            out.number(*index);
            out.number(*term);
            out.payload(&membership.encode());
            out.payload(data);
        }
    }
}

fn read_body(reader: &mut Reader, tag: u8) -> Result<Body, DecodeError> {
    Ok(match tag {
        HEARTBEAT => {
            let [has_read, sleep] = read_bits(reader)?;
            let commit = reader.number()?;
            Body::Heartbeat { commit, read: read_if(reader, has_read)?, sleep }
        }
        HEARTBEAT_ANSWER => {
            let [has_read] = read_bits(reader)?;
            let commit = reader.number()?;
            Body::HeartbeatAnswer { commit, read: read_if(reader, has_read)? }
        }
        APPEND => read_append(reader)?,
        ACCEPTED => Body::AppendAccepted { index: reader.number()?, commit: reader.number()? },
        REJECTED => Body::AppendRejected {
            index: reader.number()?,
            hint_index: reader.number()?,
            hint_term: reader.number()?,
            commit: reader.number()?,
        },
        VOTE_REQUEST => {
            let [pre, forced] = read_bits(reader)?;
            Body::VoteRequest {
                pre,
                forced,
                last_index: reader.number()?,
                last_term: reader.number()?,
                commit: reader.number()?,
                commit_term: reader.number()?,
            }
        }
        VOTE_ANSWER => {
            let [pre, granted] = read_bits(reader)?;
            Body::VoteAnswer { pre, granted, commit: reader.number()?, commit_term: reader.number()? }
        }
        TIMEOUT_NOW => Body::TimeoutNow,
        _ => {
            let (index, term) = (reader.number()?, reader.number()?);
            let membership =
                Membership::decode(&reader.payload()?).map_err(|_| DecodeError::Malformed("a membership"))?;
            Body::Snapshot { index, term, membership, data: reader.payload()? }
        }
    })
}

fn read_append(reader: &mut Reader) -> Result<Body, DecodeError> {
    let (prev_index, prev_term, commit) = (reader.number()?, reader.number()?, reader.number()?);
    let count = reader.count("the number of entries", ENTRIES_MAX as u64, ENTRY_BYTES_MIN)?;
    let mut entries = Vec::with_capacity(count);
    let mut term = prev_term;
    let mut index = prev_index;
    for _ in 0..count {
        index = index.checked_add(1).ok_or(DecodeError::Malformed("an index"))?;
        let term = reader.step(&mut term)?;
        let [is_membership] = read_bits(reader)?;
        entries.push(Entry { index, term, data: reader.payload()?, is_membership });
    }
    Ok(Body::Append { prev_index, prev_term, commit, entries })
}

fn read_bits<const N: usize>(reader: &mut Reader) -> Result<[bool; N], DecodeError> {
    let byte = reader.u8()?;
    if byte >> N != 0 {
        return Err(DecodeError::Unknown("a flag of a message"));
    }
    Ok(std::array::from_fn(|at| byte >> at & 1 == 1))
}

fn read_if(reader: &mut Reader, present: bool) -> Result<Option<u64>, DecodeError> {
    present.then(|| reader.number()).transpose()
}
